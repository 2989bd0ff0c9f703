"""The planner's forecast against what then comes: decode near the beginning and at depth, and prefill, in turns.

    python benchmarks/forecast.py A.gguf B.gguf C.gguf [--rounds 5] [--depth 2048] [--tokens 12]

A round of a file is a forecast as ``pyengine-plan`` makes it, then a prompt of 512 tokens, then decoding after it and
at the depth. Memory of a shared machine changes by the minute, so the median of the rounds' quotients counts. Exit
status 1 when one is off by more than ``--tolerance`` (20 %).
"""

from __future__ import annotations

import argparse
import statistics
import sys
from contextlib import ExitStack
from pathlib import Path

from pyengine import Model
from pyengine.bench import markdown, plain, prompt, timed
from pyengine.forecast import PROMPT, Work, measure
from pyengine.model import default_threads
from pyengine.shape import of_model


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", type=Path, metavar="MODEL")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--depth", type=int, default=0, help="tokens; 0: at no depth")
    parser.add_argument("--tokens", type=int, default=12, help="decoded each time")
    parser.add_argument("--kv-type", default="f16")
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--tolerance", type=float, default=0.2)
    parser.add_argument("--markdown", action="store_true")
    args = parser.parse_args()
    threads = args.threads or default_threads()
    cells = [["model", "what", "forecast", "came", "quotient", "range"]]
    worst = 0.0
    for path in args.models:
        with Model.open(path, tokenizer_ahead=False, prefix_bytes=0) as model:
            for what, pairs in rounds(model, path.stem, threads, args).items():
                quotients = [a / b for a, b in pairs]
                median = statistics.median(quotients)
                worst = max(worst, abs(median - 1))
                both = [f"{statistics.median(pair[i] for pair in pairs):.2f}" for i in (0, 1)]
                spread = f"{min(quotients):.2f} .. {max(quotients):.2f}"
                cells.append([path.stem, what, *both, f"{median:.3f}", spread])
                print("  ".join(cells[-1]), file=sys.stderr, flush=True)
    print(markdown(cells) if args.markdown else plain(cells))
    print(f"the worst is off by {100 * worst:.0f} %")
    return 0 if worst <= args.tolerance else 1


def rounds(model: Model, name: str, threads: int, args: argparse.Namespace) -> dict[str, list[tuple[float, float]]]:
    """(forecast, measured) tokens a second of each figure, a round each."""
    shape, work, kv = of_model(model, name), Work.of_model(model), args.kv_type
    depths = [PROMPT, *([args.depth] if args.depth > PROMPT else [])]
    ids = prompt(max(depths) + args.tokens, model.n_vocab)
    position = model.session_bytes(n_ctx=1024, kv_type=kv)[0] / 1024
    found: dict[str, list[tuple[float, float]]] = {}
    with ExitStack() as stack:
        prompts = stack.enter_context(model.session(n_ctx=PROMPT, threads=threads, kv_type=kv))
        sessions = {}
        for depth in depths:
            n_ctx = depth + args.tokens
            sessions[depth] = stack.enter_context(model.session(n_ctx=n_ctx, threads=threads, kv_type=kv))
            sessions[depth].prefill(ids[:depth])
        for _ in range(args.rounds):
            speed = measure(shape, work.bytes, [kv], threads)
            prompts.truncate(0)
            seconds = timed(lambda: prompts.eval(ids[:PROMPT]))
            found.setdefault(f"prefill {PROMPT}", []).append((work.prefill(speed), PROMPT / seconds))
            for depth, session in sessions.items():
                session.truncate(depth)
                new = ids[depth : depth + args.tokens]
                seconds = timed(lambda s=session, more=new: [s.eval([i]) for i in more])
                context = int(position * (depth + args.tokens / 2))
                pair = (work.decode(speed, kv, context), args.tokens / seconds)
                found.setdefault(f"decode after {depth}", []).append(pair)
    return found


if __name__ == "__main__":
    sys.exit(main())
