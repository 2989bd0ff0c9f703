"""Decode and prefill with 1 .. n threads.

python benchmarks/threads.py MODEL.gguf [--threads 8] [--prompt 128] [--tokens 16]
"""

from __future__ import annotations

from common import interleave, model_path, parser, prompt, start, timed

from pyengine import Model


def main() -> None:
    p = parser(__doc__)
    p.add_argument("--prompt", type=int, default=128)
    p.add_argument("--tokens", type=int, default=16, help="decoded each round")
    args = p.parse_args()
    path = model_path(args)
    report = start(args, f"prefill {args.prompt}, decode {args.tokens}", path)
    with Model.open(path) as model:
        ids = prompt(args.prompt + args.tokens, model.n_vocab)
        most = args.threads or model.session(n_ctx=1).threads
        runs = {}
        for n in range(1, most + 1):
            session = model.session(n_ctx=len(ids), threads=n)
            rows = report.row(f"prefill, {n} threads", "tokens/s"), report.row(f"decode, {n} threads", "tokens/s")

            def run(session=session, rows=rows) -> None:  # type: ignore[no-untyped-def]
                session.truncate(0)
                rows[0].values.append(args.prompt / timed(lambda: session.eval(ids[: args.prompt])))
                rows[1].values.append(args.tokens / timed(lambda: [session.eval([i]) for i in ids[args.prompt :]]))

            runs[f"{n} threads"] = run
        interleave(args.rounds, runs)
        for i, row in enumerate(report.rows):
            one = report.rows[i % 2]
            row.share = f"{row.median / one.median:.2f} x one thread"
    report.finish(args)


if __name__ == "__main__":
    main()
