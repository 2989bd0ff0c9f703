"""The one-answer contract over its whole matrix: one hash per model, prompt and cache type, whatever computes it.

    python -m tests.determinism.matrix [--quick] [--only MODEL ...] [--kv TYPE ...] [--data FOLDER]

An answer is the logits of every position of a prompt and of the text generated after it, with that text. It is worked
out on every instruction-set tier of this machine (a process each), with 1, 2, 3, 4 and 7 threads, in chunks of 1, 3,
32, 128 and 512 tokens, from a cold session and from every kind of cache hit, with speculation and without, and all the
answers to one question must have one hash. Answers to different questions, such as another cache type, must differ.
Exit status 1 when anything differs that must not, or does not that must.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import itertools
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from pyengine import End, Model, SamplerSettings, quant
from pyengine.generate import collect, generate
from pyengine.model import KV_TYPES, KvType, Session
from pyengine.speculate import MAX_DRAFT, Drafter, Gate, NgramDrafter
from tests.determinism import models
from tests.support import DATA, HAVE_DATA

THREADS = (1, 2, 3, 4, 7)
CHUNKS = (1, 3, 32, 128, 512)
SPECULATION = ("off", "ngram", "foreseen")
N_TEXT = 12  # tokens generated after a prompt
SETTINGS = SamplerSettings(seed=1, temperature=0.8)

_PHRASE = [3 + (7 * i * i + 3 * i) % 401 for i in range(24)]
PROMPTS = {
    "short": _PHRASE * 3,  # repeats, so that n-grams are found
    # more than two of attention's chunks of 256 positions, and more than the largest prefill chunk
    "long": [3 + (5 * i * i + 11 * i) % 397 for i in range(530 - 24)] + _PHRASE,
}


class Hit(NamedTuple):
    """Whose beginning of the prompt is taken over, and how many tokens of it the other text shares."""

    whose: str  # "nobody", "own" (rolled back), "living" or "closed" (another session)
    shared: int
    taken: int  # of those: what a session that is closed kept are whole blocks of 64

    def __str__(self) -> str:
        return f"{self.whose}:{self.taken}"


COLD = Hit("nobody", 0, 0)
HITS = {
    "short": (COLD, Hit("own", 37, 37), Hit("living", 65, 65), Hit("closed", 70, 64)),
    "long": (COLD, Hit("own", 256, 256), Hit("living", 505, 505), Hit("closed", 520, 512)),
}


class Cell(NamedTuple):
    """Configurations that are computed one after the other: every kind of speculation for one way to the prompt."""

    model: str
    prompt: str
    kv: KvType
    threads: int
    chunk: int
    hit: Hit


def cells(name: str, tier: str, quick: bool, kv_types: Sequence[KvType] = tuple(KV_TYPES)) -> Iterator[Cell]:
    """What one tier computes of a model.

    The short prompt: the whole product for one weight type of each architecture on the fast tiers; for the other types
    all threads with all chunks, the hits in turn; with scalar kernels (a hundred times slower) and in the quick share
    all threads, chunks and hits, but not all with one another. The long prompt goes beyond the borders that the short
    one does not reach; where it is computed in small steps (a barrier costs more than their work) they begin at a hit.
    """
    short, long = HITS["short"], HITS["long"]
    fast = tier != "scalar"
    pairs = list(itertools.product(THREADS, CHUNKS))
    few = [(threads, CHUNKS[(n + 2) % len(CHUNKS)]) for n, threads in enumerate(THREADS)]
    for i, kv in enumerate(KV_TYPES):
        if kv not in kv_types:
            continue
        whole = fast and not quick and (name.endswith("Q4_K_M") or name == models.DEMO)
        for n, (threads, chunk) in enumerate(pairs if fast and not quick else few):
            for hit in short if whole else (short[(n + i) % len(short)],):
                yield Cell(name, "short", kv, threads, chunk, hit)
        if whole:
            for threads, chunk in pairs:
                yield Cell(name, "long", kv, threads, chunk, COLD if chunk >= 32 else long[2])
        if fast or not quick:
            for hit in long[3:] if quick or not fast else long[1:]:
                yield Cell(name, "long", kv, 2, 128, hit)


# ---- one answer ----


class Recorder:
    """A session that remembers the logits of every position it holds, as they were computed when the position was."""

    def __init__(self, session: Session) -> None:
        self.session = session
        self.model = session.model
        self.n_ctx = session.n_ctx
        self.rows: list[bytes] = []  # digests; b"" where nobody asked for the logits

    def eval(
        self, tokens: Sequence[int], all_logits: bool = False, out: npt.NDArray[np.float32] | None = None
    ) -> npt.NDArray[np.float32]:
        logits = self.session.eval(tokens, all_logits, out)
        rows = logits if all_logits else logits[np.newaxis]
        self.rows += [b""] * (len(tokens) - len(rows))
        self.rows += [hashlib.blake2b(row.tobytes(), digest_size=16).digest() for row in rows]
        return logits

    def prefill(self, tokens: Sequence[int]) -> None:
        self.session.prefill(tokens)
        self.rows += [b""] * len(tokens)

    def truncate(self, n: int) -> None:
        self.session.truncate(n)
        del self.rows[n:]

    def reuse(self, tokens: Sequence[int]) -> int:
        n = self.session.reuse(tokens)
        del self.rows[n:]
        return n

    def check_cancel(self) -> None:
        self.session.check_cancel()

    def clear_cancel(self) -> None:
        self.session.clear_cancel()

    def __len__(self) -> int:
        return len(self.session)


class Eager(NgramDrafter):
    """Guesses wherever it can, whatever that costs."""

    def propose(self, history: Sequence[int], gate: Gate, limit: int) -> Sequence[int]:
        self._rates = [1.0] * len(self._rates)
        return super().propose(history, Gate(), limit)


class Foreseen:
    """Knows the text, and is wrong now and then."""

    def __init__(self, text: Sequence[int]) -> None:
        self._text = text
        self._random = random.Random(len(text))

    def propose(self, history: Sequence[int], gate: Gate, limit: int) -> Sequence[int]:
        n = min(self._random.randint(1, MAX_DRAFT), limit)
        guesses = self._text[len(history) : len(history) + n]
        return [g if self._random.random() < 0.8 else 3 + g % 50 for g in guesses]


def hold(session: Recorder, cell: Cell, prompt: Sequence[int], stack: ExitStack) -> None:
    """Brings the session to the prompt the cell's way, with the logits of every position."""
    hit = cell.hit
    other = [*prompt[: hit.shared], *(3 + (t + 1) % 50 for t in prompt[hit.shared : hit.shared + 5])]
    if hit.whose == "own":
        session.eval(other, all_logits=True)
        taken = session.reuse(prompt)
    elif hit.whose != "nobody":
        donor = Recorder(stack.enter_context(_session(session.model, cell)))
        donor.eval(other, all_logits=True)
        if hit.whose == "closed":
            donor.session.close()
        taken = session.reuse(prompt)
        session.rows = donor.rows[:taken]
    else:
        taken = 0
    if taken != hit.taken:
        raise AssertionError(f"{taken} tokens were taken over, not {hit.taken}")
    session.eval(prompt[taken:], all_logits=True)


def _session(model: Model, cell: Cell) -> Session:
    return model.session(len(PROMPTS[cell.prompt]) + N_TEXT + 8, cell.threads, 0, cell.kv, cell.chunk)


def answers(cell: Cell, path: Path, texts: dict[Any, list[int]], spoil: bool = False) -> Iterator[dict[str, Any]]:
    """The answers of a cell, one for each kind of speculation. ``spoil``: to another question instead."""
    prompt = list(PROMPTS[cell.prompt])
    if spoil:
        prompt[5] += 1
    with ExitStack() as stack:
        model = stack.enter_context(Model.open(path))  # of its own: no cell hits what another one computed
        session = Recorder(stack.enter_context(_session(model, cell)))
        hold(session, cell, prompt, stack)
        for speculation in SPECULATION:
            drafter: Drafter | str = "off"
            if speculation == "ngram":
                drafter = Eager()
            elif speculation == "foreseen":
                drafter = Foreseen(texts[cell[:3]])
            events = list(generate(session, prompt, SETTINGS, max_tokens=N_TEXT, speculate=drafter))  # type: ignore[arg-type]
            end = events[-1]
            assert isinstance(end, End)
            ids = [token.id for event in events for token in event.tokens]
            texts.setdefault(cell[:3], [*prompt, *ids])
            said = json.dumps([ids, end.reason, *collect(events)])
            yield {
                "cell": cell,
                "speculation": speculation,
                "hash": hashlib.sha256(b"".join(session.rows) + said.encode()).hexdigest(),
                "positions": [row[:4].hex() for row in session.rows],
                "guesses": [end.stats.drafted_tokens, end.stats.accepted_tokens],
            }
            session.truncate(len(prompt))


def work(names: Sequence[str], folder: Path, quick: bool, kv_types: Sequence[KvType], spoil: int) -> None:
    """One tier's share, a line of JSON for each answer."""
    tier = quant.tier_active()
    number = itertools.count()
    for name in names:
        texts: dict[Any, list[int]] = {}
        for cell in cells(name, tier, quick, kv_types):
            try:
                for answer in answers(cell, folder / f"{name}.gguf", texts, spoil=next(number) == spoil):
                    print(json.dumps({"tier": tier, **answer}), flush=True)
            except Exception as e:
                print(json.dumps({"tier": tier, "cell": cell, "error": f"{type(e).__name__}: {e}"}), flush=True)


# ---- all of them ----


@dataclasses.dataclass
class Verdict:
    """What has been seen; ``failures`` are sentences."""

    first: dict[tuple[str, str, str], dict[str, Any]] = dataclasses.field(default_factory=dict)
    n: int = 0
    guesses: Counter[str] = dataclasses.field(default_factory=Counter)
    failures: list[str] = dataclasses.field(default_factory=list)

    def take(self, answer: dict[str, Any]) -> None:
        self.n += 1
        model, prompt, kv, threads, chunk, (whose, _, taken) = answer["cell"]
        place = f"{model} {prompt} {kv}: {answer['tier']}, {threads} threads, chunks of {chunk}, hit {whose}:{taken}"
        if "error" in answer:
            self.failures.append(f"{place}: {answer['error']}")
            return
        self.guesses["all"] += answer["guesses"][0]
        self.guesses["right"] += answer["guesses"][1]
        first = self.first.setdefault((model, prompt, kv), answer)
        if answer["hash"] != first["hash"]:
            both = itertools.zip_longest(answer["positions"], first["positions"])
            where = next((f"from position {i}" for i, (a, b) in enumerate(both) if a != b), "in the text")
            self.failures.append(f"{place}, speculation {answer['speculation']}: another answer {where}")

    def close(self) -> None:
        """What can only be said at the end."""
        seen: dict[str, tuple[str, str, str]] = {}
        for question, answer in self.first.items():
            other = seen.setdefault(answer["hash"], question)
            if other != question:
                self.failures.append(f"{question} has the answer of {other}: this proof could not see a difference")
        if not self.guesses["right"] or self.guesses["right"] == self.guesses["all"]:
            self.failures.append(
                f"of {self.guesses['all']} guesses {self.guesses['right']} were right: nothing is shown"
            )


def run(
    names: Sequence[str],
    folder: Path,
    quick: bool,
    kv_types: Sequence[KvType] = tuple(KV_TYPES),
    spoil: int = -1,
    progress: bool = False,
) -> Verdict:
    verdict, start = Verdict(), time.monotonic()
    plan = (cells(name, tier, quick, kv_types) for tier in quant.tiers() for name in names)
    expected = len(SPECULATION) * sum(1 for each in plan for _ in each)
    for tier in reversed(quant.tiers()):
        command = [
            sys.executable,
            "-m",
            "tests.determinism.matrix",
            "--worker",
            str(folder),
            "--only",
            *names,
            "--kv",
            *kv_types,
        ]
        command += ["--quick"] * quick + ["--spoil", str(spoil if tier == quant.tier_active() else -1)]
        with subprocess.Popen(
            command, stdout=subprocess.PIPE, text=True, env={**os.environ, "PYENGINE_ISA": tier}
        ) as worker:
            assert worker.stdout is not None
            for line in worker.stdout:
                verdict.take(json.loads(line))
                if progress and verdict.n % 60 == 0:
                    seconds = time.monotonic() - start
                    print(
                        f"\r{verdict.n} of {expected}, {seconds:.0f} s, {tier}, {len(verdict.failures)} failures ",
                        end="",
                        file=sys.stderr,
                        flush=True,
                    )
        if worker.returncode != 0:
            verdict.failures.append(f"{tier}: the process ended with {worker.returncode}")
    verdict.close()
    if verdict.n != expected:
        verdict.failures.append(f"{verdict.n} answers, expected {expected}")
    if progress:
        print(file=sys.stderr)
    return verdict


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a share of it")
    parser.add_argument("--only", nargs="+", metavar="MODEL", help="such as qwen2-Q4_0 or demo-q8_0; default: all")
    parser.add_argument("--kv", nargs="+", choices=KV_TYPES, default=list(KV_TYPES), help="cache types; default: all")
    parser.add_argument(
        "--data", type=Path, default=DATA if HAVE_DATA else None, help="test data (default: %(default)s)"
    )
    parser.add_argument("--spoil", type=int, default=-1, help=argparse.SUPPRESS)  # ask this cell something else
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        work(args.only, args.worker, args.quick, args.kv, args.spoil)
        return 0
    if args.data is None:
        print("no test data (PYENGINE_TEST_DATA, ../shared/data): the demo model only", file=sys.stderr)
    names = args.only or models.names(args.data)
    with tempfile.TemporaryDirectory(prefix="pyengine-determinism-") as folder:
        for name in names:
            models.make(name, Path(folder), args.data)
        verdict = run(names, Path(folder), args.quick, args.kv, args.spoil, sys.stderr.isatty())
    for failure in verdict.failures[:20]:
        print(f"FAILED: {failure}")
    print(
        f"determinism: {verdict.n} configurations on {', '.join(quant.tiers())}, "
        f"{len(verdict.first)} questions, {len({a['hash'] for a in verdict.first.values()})} hashes, "
        f"{verdict.guesses['right']} of {verdict.guesses['all']} guesses right, {len(verdict.failures)} failures"
    )
    return 1 if verdict.failures else 0


if __name__ == "__main__":
    sys.exit(main())
