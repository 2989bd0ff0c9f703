"""What speculation gains where text repeats, and costs where it does not.

    python benchmarks/speculation.py MODEL.gguf --vocab VOCABULARY.gguf [--tokens 160]
    python benchmarks/speculation.py --synthetic r1-qwen-1.5b:q4_k_m --vocab qwen2.gguf

The evaluations are the model's own; the texts are real ones: after each evaluation the logits are replaced by such that
name the next token of a given text, with every drafter and with none, so that random weights serve as well. Edited code
is this repository's own, restated with a name changed; prose is its manual. ``--vocab`` cuts them into tokens (default:
the model's tokenizer). Rounds are interleaved and report tokens a second. First, what evaluating n tokens costs in
evaluations of one. Quotients ("x") are of one round's two runs, and then their median is taken: a machine's memory may
change its speed from one round to the next.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import numpy.typing as npt
from common import Row, finish, interleave, model_path, parser, prompt, start, timed

from pyengine import Model, SamplerSettings, Session
from pyengine.generate import End, Speculate, generate
from pyengine.speculate import MAX_DRAFT
from pyengine.tokenizer import Tokenizer

ROOT = Path(__file__).resolve().parent.parent
EVALUATIONS = 4  # of each number of tokens in a round


def quotients(row: Row, by: Row) -> list[float]:
    return [a / b for a, b in zip(row.values, by.values, strict=True)]


class Scripted(Session):
    """Costs what the model costs, says what the script says."""

    script: Sequence[int] = ()

    def eval(
        self,
        tokens: Sequence[int] | npt.NDArray[np.integer],
        all_logits: bool = False,
        out: npt.NDArray[np.float32] | None = None,
    ) -> npt.NDArray[np.float32]:
        logits = super().eval(tokens, all_logits, out)
        end = len(self)
        for at, row in zip(range(end, 0, -1), np.atleast_2d(logits)[::-1], strict=False):
            row.fill(0.0)
            if at < len(self.script):
                row[self.script[at]] = 30.0
        return logits


def texts(tokenizer: Tokenizer, n: int) -> dict[str, tuple[list[int], list[int]]]:
    """Name -> (prompt, answer of at most n tokens)."""
    code = (ROOT / "pyengine" / "reasoning.py").read_text()
    code = code[code.index("class ReasoningSplitter") :]
    prose = (ROOT / "docs" / "numerics.md").read_text()
    half = len(prose) // 2

    def ids(text: str) -> list[int]:
        return list(tokenizer.encode(text, add_special=False))

    source = ids(code)[: n + n // 4]
    edited = ids(tokenizer.decode(source).replace("self._held", "self._kept").replace("text", "piece"))
    thoughts = (
        "So the total is 48 + 27. Let me check: 48 + 27 = 75. Wait, the question asks how many apples Tom has now. "
    )
    restated = "".join(f"{thoughts}Let me check again, step {i}. " for i in range(1, 40))
    return {
        "code, restated with two names changed": (source, edited[:n]),
        "reasoning that restates": (ids(restated)[:40], ids(restated)[40 : 40 + n]),
        "prose": (ids(prose[:half])[-n:], ids(prose[half:])[:n]),
        "nothing repeats": (
            prompt(n, tokenizer.n_vocab),
            [(i * 7919 + 13) % tokenizer.n_vocab for i in range(n, 2 * n)],
        ),
    }


def main() -> None:
    p = parser(__doc__)
    p.add_argument("--vocab", type=Path, help="a GGUF whose tokenizer cuts the texts")
    p.add_argument("--tokens", type=int, default=160, help="of each text")
    p.add_argument("--only", default="", help="texts whose name contains this")
    args = p.parse_args()
    path = model_path(args)
    report = start(args, f"speculation, {args.tokens} tokens of each text", path)
    variants: dict[str, Callable[[], None]] = {}
    pairs: list[tuple[str, Row, Row]] = []
    with Model.open(path, prefix_bytes=0) as model:
        tokenizer = Tokenizer.from_gguf(args.vocab) if args.vocab else model.tokenizer
        session = Scripted(model, 4 * args.tokens + 16, args.threads, 0, "f16", 0)
        out = np.empty((MAX_DRAFT + 1, model.n_vocab), np.float32)
        ids = prompt(64, model.n_vocab)
        costs = {n: report.row(f"evaluating {n} tokens", "ms") for n in (1, 2, 4, 8)}

        def evaluate() -> None:
            session.truncate(0)
            session.prefill(ids)
            took: dict[int, list[float]] = {n: [] for n in costs}
            for i in range(EVALUATIONS):
                for n in list(costs)[:: -1 if i % 2 else 1]:
                    session.truncate(len(ids))
                    took[n].append(1e3 * timed(lambda n=n: Session.eval(session, ids[:n], n > 1, out)))
            for n, row in costs.items():
                row.values.append(median(took[n]))

        variants["evaluating"] = evaluate

        def run(text: tuple[list[int], list[int]], speculate: Speculate, row: Row) -> None:
            before, answer = text
            session.script = [*before, *answer]
            session.truncate(0)
            begin = 0.0
            said = []
            for event in generate(
                session,
                before,
                SamplerSettings(temperature=0.0),
                tokenizer=_NeverEnding(tokenizer),
                max_tokens=len(answer),
                reasoning=False,
                speculate=speculate,
            ):
                begin = begin or time.perf_counter()  # the first token is the prompt's
                said += [token.id for token in event.tokens]
            seconds = time.perf_counter() - begin
            assert said == answer, "the script is followed"
            assert isinstance(event, End)
            row.values.append((len(answer) - 1) / seconds)
            row.facts["right"] = row.facts.get("right", 0) + event.stats.accepted_tokens
            row.facts["guesses"] = row.facts.get("guesses", 0) + event.stats.drafted_tokens

        for name, text in texts(tokenizer, args.tokens).items():
            if args.only not in name:
                continue
            rows = []
            for speculate in ("off", "ngram"):
                row = report.row(f"{name}: {speculate}", "tokens/s")
                rows.append(row)
                variants[row.name] = lambda t=text, s=speculate, r=row: run(t, s, r)
            pairs.append((name, rows[0], rows[1]))
        interleave(args.rounds, variants)
        session.close()
    for row in costs.values():
        row.share = f"{median(quotients(row, costs[1])):.2f} x one token"
    for name, off, on in pairs:
        on.share = f"{on.facts['right']} of {on.facts['guesses']} guesses right"
        report.row(f"x, {name}", "").values += quotients(on, off)
    finish(report, args)


class _NeverEnding:
    """A tokenizer without ends, so that a text may hold any token."""

    eog_ids: frozenset[int] = frozenset()

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer

    def __getattr__(self, name: str) -> Any:
        return getattr(self._tokenizer, name)


if __name__ == "__main__":
    main()
