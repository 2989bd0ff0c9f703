"""Decode and prefill with 1 .. n threads; with all of them also beside a second model and beside another program.

The second model is the same file opened once more, used once and then idle: it must cost nothing. The other program
keeps one CPU busy, so that one thread after the other is made to stand: where no CPU is free, a fair share of the
machine is n / (n + 1) of it.

python benchmarks/threads.py MODEL.gguf [--threads 8] [--prompt 128] [--tokens 16]
"""

from __future__ import annotations

import subprocess
import sys
from contextlib import ExitStack

from common import finish, interleave, model_path, parser, prompt, start, timed

from pyengine import Model


def main() -> None:
    p = parser(__doc__)
    p.add_argument("--prompt", type=int, default=128)
    p.add_argument("--tokens", type=int, default=16, help="decoded each round")
    args = p.parse_args()
    path = model_path(args)
    report = start(args, f"prefill {args.prompt}, decode {args.tokens}", path)
    with ExitStack() as stack:
        model = stack.enter_context(Model.open(path))
        ids = prompt(args.prompt + args.tokens, model.n_vocab)
        most = args.threads or model.session(n_ctx=1).threads
        runs = {}

        def add(name: str, n: int, second: bool = False, busy: bool = False) -> None:
            rows = report.row(f"prefill, {name}", "tokens/s"), report.row(f"decode, {name}", "tokens/s")

            def run() -> None:
                with ExitStack() as mine:
                    if second:
                        idle = mine.enter_context(mine.enter_context(Model.open(path)).session(n_ctx=8, threads=n))
                        idle.eval(ids[:2])
                    if busy:
                        program = mine.enter_context(subprocess.Popen([sys.executable, "-c", "while True: pass"]))
                        mine.callback(program.kill)
                    session = mine.enter_context(model.session(n_ctx=len(ids), threads=n))
                    rows[0].values.append(args.prompt / timed(lambda: session.eval(ids[: args.prompt])))
                    rows[1].values.append(args.tokens / timed(lambda: [session.eval([i]) for i in ids[args.prompt :]]))

            runs[name] = run

        for n in range(1, most + 1):
            add(f"{n} threads", n)
        add(f"{most} threads beside an idle model", most, second=True)
        add(f"{most} threads beside a busy program", most, busy=True)
        interleave(args.rounds, runs)
        for i, row in enumerate(report.rows):
            one, alone = report.rows[i % 2], report.rows[2 * (most - 1) + i % 2]
            row.share = f"{row.median / one.median:.2f} x one thread"
            if i >= 2 * most:
                row.share = f"{row.median / alone.median:.2f} x alone"
    finish(report, args)


if __name__ == "__main__":
    main()
