"""Tokens a second of decoding, one at a time, at a short context.

python benchmarks/decode.py MODEL.gguf [--tokens 64] [--prompt 32]
python benchmarks/decode.py --synthetic r1-qwen-1.5b:q4_0
"""

from __future__ import annotations

from common import Work, interleave, model_path, parser, prompt, start, timed

from pyengine import Model


def main() -> None:
    p = parser(__doc__)
    p.add_argument("--tokens", type=int, default=64, help="decoded each round")
    p.add_argument("--prompt", type=int, default=32, help="tokens before them")
    args = p.parse_args()
    path = model_path(args)
    report = start(args, f"decode {args.tokens} after {args.prompt}", path)
    with Model.open(path) as model:
        work = Work.of(model)
        ids = prompt(args.prompt + args.tokens, model.n_vocab)
        session = model.session(n_ctx=args.prompt + args.tokens, threads=args.threads)
        session.eval(ids)  # touches every page
        speed, step = report.row("decode", "tokens/s"), report.row("median step", "ms")

        def run() -> None:
            session.truncate(args.prompt)
            times = [timed(lambda i=i: session.eval([i])) for i in ids[args.prompt :]]
            speed.values.append(args.tokens / sum(times))
            step.values.append(1e3 * sorted(times)[len(times) // 2])

        interleave(args.rounds, {"decode": run})
        report.of_stream(speed, work.bytes * speed.median * 1e-9)
        report.of_stream(step, work.bytes / step.median * 1e-6)
    report.finish(args)


if __name__ == "__main__":
    main()
