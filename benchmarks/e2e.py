"""One request from start to end: time to the first token, to the last, and Python's share of a decoded token.

    python benchmarks/e2e.py MODEL.gguf [--prompt 256] [--tokens 64]

Greedy generation from random ids through the public ``generate``, a fresh session each round; as many steps through
``Session.eval`` alone give the share of everything that is not evaluation.
"""

from __future__ import annotations

import time

from common import finish, interleave, model_path, parser, prompt, start, timed

from pyengine import Model
from pyengine.generate import End, generate
from pyengine.sampling import SamplerSettings


def main() -> None:
    p = parser(__doc__)
    p.add_argument("--prompt", type=int, default=256)
    p.add_argument("--tokens", type=int, default=64)
    args = p.parse_args()
    path = model_path(args)
    report = start(args, f"prompt of {args.prompt}, {args.tokens} generated", path)
    first, last = report.row("to the first token", "s"), report.row("to the last token", "s")
    rest = report.row("a token after the first", "ms")
    alone = report.row("a step of Session.eval alone", "ms")
    with Model.open(path) as model:
        ids = prompt(args.prompt, model.n_vocab)

        def whole() -> None:
            session = model.session(n_ctx=args.prompt + args.tokens + 1, threads=args.threads)
            begin = time.perf_counter()
            *_, end = generate(session, ids, SamplerSettings(temperature=0), max_tokens=args.tokens)
            seconds = time.perf_counter() - begin
            session.close()
            assert isinstance(end, End)
            first.values.append(end.stats.prefill_seconds)
            last.values.append(seconds)
            if end.stats.decode_steps:  # none when the model ends at once
                rest.values.append(1e3 * (seconds - end.stats.prefill_seconds) / end.stats.decode_steps)

        def steps() -> None:
            session = model.session(n_ctx=args.prompt + args.tokens + 1, threads=args.threads)
            session.prefill(ids)
            n = args.tokens - 1
            alone.values.append(1e3 * timed(lambda: [session.eval([i]) for i in ids[:n]]) / n)
            session.close()

        interleave(args.rounds, {"generate": whole, "eval": steps})
    if rest.values:
        rest.share = f"{100 * (rest.median - alone.median) / rest.median:.1f} % is not evaluation"
    finish(report, args)


if __name__ == "__main__":
    main()
