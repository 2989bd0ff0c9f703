"""pyengine beside llama.cpp (and ik_llama.cpp) on the same file, interleaved.

    python benchmarks/vs_llama_cpp.py MODEL.gguf                                       prefill 512, decode 128
    python benchmarks/vs_llama_cpp.py MODEL.gguf --prefill 4096 --depth 4096 --ik BUILD
    python benchmarks/vs_llama_cpp.py MODEL.gguf --prefill --depth 8192 --kv q8_0 --keep --only 'pyengine,ik+rtr+fa'

Every round runs every engine once, each in a process of its own that is ended before the next starts, the order
reversed from round to round. Measured, in this order in each process:

    load     from opening the model to the first logits (of one token), the file in the page cache
    prefill  N tokens into an empty context, logits of the last; after an untimed prefill of 64
    decode   N steps of one token after DEPTH tokens (a prefill of DEPTH, untimed; one step made and taken back before
             the first); no sampling on either side
    memory   peak of RssAnon and swap, sampled every 50 ms: private copies of weights, KV cache, scratch

All engines get the same token ids and threads. Peers: batches of 2048 in steps of 512 (their defaults), flash attention
on and off, weights repacked and not. The figure of a table is the median over the rounds; "best" is the variant of a
peer with the best median; a ratio is the median of the rounds' ratios to it. --keep leaves the processes alive (asleep)
between rounds so that a deep context is filled once: then each decode needs one depth only, and load is measured once.
--states DIR: the peers keep filled contexts there and read them the next time.

Without --llama the llama.cpp inside the installed llama-cpp-python is measured; the command says how to install it.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peers import Engine, Peer, Running, built, engines, installed

import pyengine

Figures = dict[str, float]


@dataclass(frozen=True)
class Test:
    """A figure: ``prefill N`` or ``decode N`` at ``depth``."""

    kind: str
    n: int
    depth: int = 0

    @property
    def name(self) -> str:
        return f"{self.kind} {self.n}" + (f" at {self.depth}" if self.depth else "")


LOWER_IS_BETTER = ("load s", "memory GiB")


def bytes_per_token(path: Path) -> int:
    """Weights that a decode step reads: all but the embedding table, or all where it is the output matrix too."""
    with pyengine.Model.open(path) as model:
        names = {t.name: t.size for t in model.file.tensors.values()}
    embedding = names["token_embd.weight"] if "output.weight" in names else 0
    return sum(names.values()) - embedding


def warm(path: Path) -> None:
    with open(path, "rb", buffering=0) as file:
        while file.read(1 << 24):
            pass


def read_stream(program: Path | None, threads: int) -> float | None:
    """GB/s that ``threads`` threads read from a mapped file (`make limits`), or None without the program."""
    if program is None or not program.is_file():
        return None
    command = [str(program), "--quick", "--json", "--threads", str(threads)]
    limits = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    return float(limits["read_gbs"]["file"][str(threads)]["median"])


def measure(run: Running, tests: list[Test], states: Path | None, stem: str) -> Figures:
    """One round of one engine."""
    figures: Figures = {}
    warm_prefill = True
    for test in tests:
        if test.kind == "prefill":
            if warm_prefill:
                run.ask("prefill", 64)
                warm_prefill = False
            figures[test.name] = test.n / run.ask("prefill", test.n)["seconds"][0]
        else:
            state = [states / f"{stem}-{test.depth}.state"] if states and test.depth else []
            steps = run.ask("decode", test.n, test.depth, *state)["seconds"]
            figures[test.name] = test.n / sum(steps)
            figures[f"{test.name}, median step ms"] = 1e3 * statistics.median(steps)
    figures["load s"] = run.load["first"]
    figures["memory GiB"] = run.peak_anonymous / 2**30
    return figures


def plan(args: argparse.Namespace) -> list[Test]:
    """Long prefills come just before the decode at their depth, which then finds its context filled."""
    tests = [Test("prefill", n) for n in args.prefill if n not in args.depth]
    for depth in sorted(args.depth) if args.decode else []:
        tests += [Test("prefill", n) for n in args.prefill if n == depth]
        tests.append(Test("decode", args.decode, depth))
    return tests


@contextmanager
def started(engine: Engine, args: argparse.Namespace, context: int, kept: dict[str, Running]) -> Iterator[Running]:
    run = kept.get(engine.name) or engine.start(args.model, args.threads, context, args.kv)
    if args.keep:
        kept[engine.name] = run
    yield run
    if not args.keep:
        run.close()


def best(family: str, figure: str, rounds: list[dict[str, Figures]], lineup: list[Engine]) -> str | None:
    """The variant of a family with the best median."""
    names = [e.name for e in lineup if e.family == family]
    if not names:
        return None
    pick = min if figure in LOWER_IS_BETTER else max
    return pick(names, key=lambda name: statistics.median(r[name][figure] for r in rounds))


def report(result: dict[str, Any]) -> str:
    """The result as Markdown."""
    rounds, names, figures = result["rounds"], result["engines"], result["figures"]
    lines = [f"**{result['model']}**, {result['threads']} threads, KV cache {result['kv']}, {len(rounds)} rounds", ""]
    lines += [f"- {name}: {version}" for name, version in result["versions"].items()]
    if result["read_stream"]:
        streams = ", ".join(f"{s:.1f}" for s in result["read_stream"])
        lines.append(f"- read stream of the mapped file in each round, GB/s: {streams}")
        lines.append(f"- a decode step reads {result['bytes_per_token'] / 1e9:.3f} GB of weights")
    lines += ["", "| engine | " + " | ".join(figures) + " |", "|---" * (len(figures) + 1) + "|"]
    for name in names:
        cells = []
        for figure in figures:
            values = [r[name][figure] for r in rounds]
            each = f" ({', '.join(f'{v:.2f}' for v in values)})" if len(values) > 1 else ""
            cells.append(f"{statistics.median(values):.2f}{each}")
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    lines += ["", "| pyengine to | " + " | ".join(figures) + " |", "|---" * (len(figures) + 1) + "|"]
    for family, ratios in result["ratios"].items():
        cells = [f"{ratios[f]['ratio']:.2f}x ({ratios[f]['best']})" for f in figures]
        lines.append(f"| {family}'s best | " + " | ".join(cells) + " |")
    for name, share in result["share"].items():
        lines.append(f"\n{name}: pyengine reads {100 * share:.0f} % of the read stream (weights only)")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--prefill", type=int, nargs="*", default=[512], metavar="N", help="prompt lengths")
    parser.add_argument("--decode", type=int, default=128, metavar="N", help="tokens decoded at each depth; 0: none")
    parser.add_argument("--depth", type=int, nargs="*", default=[0], metavar="N", help="tokens held before decoding")
    parser.add_argument("--kv", choices=("f16", "q8_0"), default="f16", help="type of the KV cache, of all engines")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", default="*", help="comma-separated name patterns: pyengine, llama*, ik+rtr+fa, ...")
    parser.add_argument("--isa", default="", help="PYENGINE_ISA for pyengine, as avx2")
    parser.add_argument("--llama", type=Path, metavar="BUILD", help="a build folder of llama.cpp (default: installed)")
    parser.add_argument("--ik", type=Path, metavar="BUILD", help="a build folder of ik_llama.cpp")
    parser.add_argument("--keep", action="store_true", help="leave the processes alive between rounds")
    parser.add_argument("--states", type=Path, metavar="DIR", help="where peers keep filled contexts")
    parser.add_argument("--limits", type=Path, metavar="PROGRAM", help="the program of `make limits`")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write everything measured")
    args = parser.parse_args()
    args.model = args.model.resolve()

    only = args.only.split(",")
    wants_llama = any(p.startswith(("llama", "*")) for p in only)
    llama: Peer | None = None
    if wants_llama:
        llama = built("llama", args.llama) if args.llama else installed(sys.executable)
    ik = built("ik", args.ik) if args.ik else None
    lineup = engines(llama, ik, args.kv, only, args.isa)
    if not lineup:
        parser.error(f"--only {args.only} leaves no engine")
    tests = plan(args)
    need = max([t.n + t.depth for t in tests], default=1)
    context = -(-(need + 8) // 256) * 256
    if args.states:
        args.states.mkdir(parents=True, exist_ok=True)

    warm(args.model)
    rounds: list[dict[str, Figures]] = []
    streams: list[float] = []
    kept: dict[str, Running] = {}
    for i in range(args.rounds):
        stream = read_stream(args.limits, args.threads)
        if stream is not None:
            streams.append(stream)
        this: dict[str, Figures] = {}
        for engine in lineup if i % 2 == 0 else reversed(lineup):
            stem = f"{args.model.stem}-{engine.name}-{args.kv}"
            with started(engine, args, context, kept) as run:
                this[engine.name] = measure(run, tests, args.states, stem)
            cells = ", ".join(f"{k} {v:.2f}" for k, v in this[engine.name].items())
            print(f"round {i + 1}/{args.rounds} {engine.name}: {cells}", file=sys.stderr, flush=True)
        rounds.append(this)
    for run in kept.values():
        run.close()

    names = [e.name for e in lineup]
    figures = [f for f in rounds[0][names[0]] if not f.endswith(" ms")]
    ratios: dict[str, Any] = {}
    if "pyengine" in names:
        for family in ("llama", "ik"):
            if not any(e.family == family for e in lineup):
                continue
            ratios[family] = {}
            for figure in figures:
                name = best(family, figure, rounds, lineup)
                assert name is not None
                ratio = statistics.median(r["pyengine"][figure] / r[name][figure] for r in rounds)
                ratios[family][figure] = {"best": name, "ratio": ratio}
    size = bytes_per_token(args.model)
    share = {}
    if streams and "pyengine" in names:
        for test in tests:
            if test.kind == "decode":
                each = [r["pyengine"][test.name] * size / 1e9 / s for r, s in zip(rounds, streams, strict=True)]
                share[test.name] = statistics.median(each)
    isa = args.isa or pyengine._core.tier_active()
    versions = {"pyengine": f"{pyengine.__version__}, {isa}, epoch {pyengine.numerics_epoch()}"}
    versions |= {p.name: p.version for p in (llama, ik) if p is not None and any(e.family == p.name for e in lineup)}
    result = {
        **{"model": args.model.name, "threads": args.threads, "kv": args.kv, "machine": platform.processor()},
        **{"versions": versions, "engines": names, "figures": figures, "bytes_per_token": size},
        **{"read_stream": streams, "rounds": rounds, "ratios": ratios, "share": share},
    }
    if args.json:
        args.json.write_text(json.dumps(result, indent=1))
    print(report(result))


if __name__ == "__main__":
    main()
