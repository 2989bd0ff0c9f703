"""What choosing a token costs, and the share of a decoded token that is not evaluation.

    python benchmarks/sampling.py MODEL.gguf [--tokens 48]
    python benchmarks/sampling.py --synthetic r1-qwen-1.5b:q4_k_m

Generates through the public ``generate`` with a session that notes the time spent in the engine's eval; what is left
of each token (drafting, sampling, text, events, the loop) is "beside eval". Then the samplers alone, on its logits.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import numpy as np
from common import Row, finish, interleave, model_path, parser, prompt, start, timed

from pyengine import Model, Session
from pyengine.generate import End, generate
from pyengine.sampling import Sampler, SamplerSettings

SETTINGS = {
    "greedy": SamplerSettings(temperature=0.0, seed=1),
    "default": SamplerSettings(seed=1),
    "reasoning (0.6, top-p 0.95)": SamplerSettings(seed=1, temperature=0.6, top_k=0, min_p=0.0),
    "penalties": SamplerSettings(seed=1, repeat_penalty=1.1, presence_penalty=0.2, frequency_penalty=0.1),
    "dry and xtc": SamplerSettings(seed=1, dry_multiplier=0.8, xtc_probability=0.5),
    "log-probabilities": SamplerSettings(seed=1, top_logprobs=5),
}


class Timed(Session):
    """Notes the seconds spent in the engine's eval."""

    seconds = 0.0

    def __init__(self, model: Model, **options: Any) -> None:
        every = {"n_ctx": 0, "threads": 0, "threads_prefill": 0, "kv_type": "f16", "chunk": 0, **options}
        super().__init__(model, **every)
        self._core: Any = _TimedCore(self._core, self)


class _TimedCore:
    def __init__(self, core: Any, owner: Timed) -> None:
        self._core, self._owner = core, owner

    def __getattr__(self, name: str) -> Any:
        return getattr(self._core, name)

    def eval(self, *args: Any) -> Any:
        begin = time.perf_counter()
        try:
            return self._core.eval(*args)
        finally:
            self._owner.seconds += time.perf_counter() - begin


def main() -> None:
    p = parser(__doc__)
    p.add_argument("--prompt", type=int, default=64)
    p.add_argument("--tokens", type=int, default=48, help="decoded each round")
    args = p.parse_args()
    path = model_path(args)
    report = start(args, f"sampling, prompt of {args.prompt}, {args.tokens} generated", path)
    variants: dict[str, Callable[[], None]] = {}
    with Model.open(path) as model:
        ids = prompt(args.prompt, model.n_vocab)
        session = Timed(model, n_ctx=args.prompt + args.tokens + 1, threads=args.threads)

        def whole(settings: SamplerSettings, speculate: Any, token: Row, beside: Row) -> None:
            session.truncate(0)
            events = generate(
                session, ids, settings, max_tokens=args.tokens, speculate=speculate, on_prefill=lambda done, total: None
            )
            engine = begin = 0.0
            event: object = None
            for event in events:  # noqa: B007 - the last one is looked at
                if not begin:  # the prompt and the first token are done
                    begin, engine = time.perf_counter(), session.seconds
            seconds = time.perf_counter() - begin
            assert isinstance(event, End)
            n = event.stats.generated_tokens - 1
            if n > 0:
                token.values.append(1e3 * seconds / n)
                beside.values.append(1e3 * (seconds - (session.seconds - engine)) / n)

        pairs = []
        for name in ("greedy", "default"):
            for speculate in ("off", "ngram"):
                title = f"{name}, speculation {speculate}"
                token, beside = report.row(f"a token, {title}", "ms"), report.row("  of it beside eval", "ms")
                pairs.append((token, beside))
                variants[title] = lambda s=SETTINGS[name], w=speculate, t=token, b=beside: whole(s, w, t, b)

        session.truncate(0)
        logits = session.eval(ids)[: model.tokenizer.n_vocab] * np.float32(4)  # as peaked as text's
        history = ids * 8
        for name, settings in SETTINGS.items():
            sampler, row = Sampler(settings, model.tokenizer), report.row(f"sample, {name}", "us")

            def sample(sampler: Sampler = sampler, row: Row = row) -> None:
                row.values.append(
                    1e6 * statistics.median(timed(lambda: sampler.sample(logits, history)) for _ in range(25))
                )

            variants[name] = sample
        row = report.row("numpy argmax", "us")
        variants["numpy"] = lambda: row.values.append(
            1e6 * statistics.median(timed(lambda: np.argmax(logits)) for _ in range(25))
        )
        interleave(args.rounds, variants)
        session.close()
    for token, beside in pairs:
        if token.values:
            beside.share = f"{100 * beside.median / token.median:.2f} % of a token"
    finish(report, args)


if __name__ == "__main__":
    main()
