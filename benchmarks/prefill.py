"""Tokens a second of evaluating a prompt, for several lengths.

python benchmarks/prefill.py MODEL.gguf [--lengths 16,128,512]
"""

from __future__ import annotations

from common import Work, interleave, model_path, parser, prompt, start, timed

from pyengine import Model


def main() -> None:
    p = parser(__doc__)
    p.add_argument("--lengths", default="16,128,512", help="tokens of the prompts")
    args = p.parse_args()
    lengths = [int(n) for n in args.lengths.split(",")]
    path = model_path(args)
    report = start(args, "prefill", path)
    with Model.open(path) as model:
        macs = Work.of(model).macs
        session = model.session(n_ctx=max(lengths), threads=args.threads)
        session.eval(prompt(2, model.n_vocab))
        rows = {n: report.row(f"prompt of {n}", "tokens/s") for n in lengths}

        def run(n: int) -> None:
            session.truncate(0)
            rows[n].values.append(n / timed(lambda: session.eval(prompt(n, model.n_vocab))))

        interleave(args.rounds, {str(n): lambda n=n: run(n) for n in lengths})
        for row in rows.values():
            report.of_arithmetic(row, macs * row.median)  # the output matrix, for the last token only, is counted in
    report.finish(args)


if __name__ == "__main__":
    main()
