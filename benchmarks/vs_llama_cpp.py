"""Load, prefill and decode beside llama.cpp on the same file, interleaved, each engine in a process of its own.

    python benchmarks/vs_llama_cpp.py MODEL.gguf [--prompt 512] [--decode 32] [--threads 2] [--rounds 3]

Every round runs both engines one after the other; the figures are medians over the rounds, the ratio is the median of
the rounds' ratios. Peak anonymous memory is RssAnon plus swap of the process, sampled at the end of each phase.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path

OURS = r"""
import json, sys, time
import numpy as np, pyengine
path, prompt, decode, threads, _ = json.loads(sys.argv[1])
t0 = time.perf_counter()
model = pyengine.Model.open(path)
t1 = time.perf_counter()
session = model.session(n_ctx=prompt + decode + 8, threads=threads)
ids = [(i * 7919 + 13) % model.n_vocab for i in range(prompt)]
session.eval(ids[:8]); session.truncate(0)  # warm up
t2 = time.perf_counter()
logits = session.eval(ids)
t3 = time.perf_counter()
for _ in range(decode):
    logits = session.eval([int(np.argmax(logits))])
t4 = time.perf_counter()
"""
THEIRS = r"""
import json, sys, time
import numpy as np, llama_cpp
path, prompt, decode, threads, flash = json.loads(sys.argv[1])
t0 = time.perf_counter()
model = llama_cpp.Llama(path, n_ctx=prompt + decode + 8, n_batch=512, n_ubatch=512, n_threads=threads,
                        n_threads_batch=threads, flash_attn=flash, verbose=False)
t1 = time.perf_counter()
n_vocab = model.n_vocab()
ids = [(i * 7919 + 13) % n_vocab for i in range(prompt)]
model.eval(ids[:8]); model.reset()
t2 = time.perf_counter()
model.eval(ids)
t3 = time.perf_counter()
for _ in range(decode):
    logits = np.ctypeslib.as_array(llama_cpp.llama_get_logits_ith(model.ctx, -1), (n_vocab,))
    model.eval([int(np.argmax(logits))])
t4 = time.perf_counter()
"""
REPORT = r"""
status = open("/proc/self/status").read()
field = lambda name: int(next(l for l in status.splitlines() if l.startswith(name)).split()[1]) * 1024
print(json.dumps({"load": t1 - t0, "prefill": prompt / (t3 - t2), "decode": decode / (t4 - t3),
                  "anonymous": field("RssAnon:") + field("VmSwap:")}))
"""


def measure(python: str, program: str, arguments: list[object]) -> dict[str, float]:
    run = subprocess.run(
        [python, "-c", program + REPORT, json.dumps(arguments)], check=True, capture_output=True, text=True
    )
    return json.loads(run.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--prompt", type=int, default=512, help="tokens of the prompt (default 512)")
    parser.add_argument("--decode", type=int, default=32, help="tokens decoded after it (default 32)")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--peer-python", default=sys.executable, help="an interpreter that has llama-cpp-python")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()

    path = str(Path(args.model).resolve())
    shared = [path, args.prompt, args.decode, args.threads]
    engines = {
        "pyengine": (sys.executable, OURS, [*shared, None]),
        "llama.cpp": (args.peer_python, THEIRS, [*shared, False]),
        "llama.cpp, flash attention": (args.peer_python, THEIRS, [*shared, True]),
    }
    rounds: list[dict[str, dict[str, float]]] = []
    for i in range(args.rounds):
        rounds.append({name: measure(*how) for name, how in engines.items()})
        print(f"round {i + 1}/{args.rounds}: {json.dumps(rounds[-1])}", file=sys.stderr)

    def median(name: str, figure: str) -> float:
        return statistics.median(r[name][figure] for r in rounds)

    table = {name: {figure: median(name, figure) for figure in rounds[0][name]} for name in engines}
    ratios = {
        figure: statistics.median(r["pyengine"][figure] / max(r[p][figure] for p in list(engines)[1:]) for r in rounds)
        for figure in ("prefill", "decode")
    }
    if args.json:
        print(json.dumps({"medians": table, "ratios": ratios, "rounds": rounds}))
        return
    print(
        f"{Path(path).name}, prompt {args.prompt}, {args.decode} decoded, {args.threads} threads, {args.rounds} rounds"
    )
    print("| engine | load s | prefill tokens/s | decode tokens/s | anonymous memory GiB |\n|---|---|---|---|---|")
    for name, row in table.items():
        speed = f"{row['load']:.2f} | {row['prefill']:.2f} | {row['decode']:.2f}"
        print(f"| {name} | {speed} | {row['anonymous'] / 2**30:.2f} |")
    print(f"\nratio to llama.cpp's best: prefill {ratios['prefill']:.2f}, decode {ratios['decode']:.2f}")


if __name__ == "__main__":
    main()
