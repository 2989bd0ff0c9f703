"""Speculation without loss: several tokens from one evaluation, the same text to the last bit.

A *drafter* guesses the tokens to come. The session evaluates the last token and the guesses in one batch, which costs
little more than one token, because the weights are read once. Logits do not depend on the batch, and a draw depends on
(seed, position) alone, so the sampler goes through the rows as if each had been evaluated by itself; where it takes
another token than the guessed one, the rows after it are dropped. A wrong guess costs time, never a different token.

:class:`Lookahead` does this behind the loop of :mod:`pyengine.generate`, which asks for the logits of one token after
the other and cannot tell the difference. How much to guess is decided by measured costs and hit rates (:class:`Gate`).
"""

from __future__ import annotations

import contextlib
import time
from array import array
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Protocol

import numpy as np
import numpy.typing as npt

from pyengine.errors import InvalidArgument, NumericError
from pyengine.sampling import Sampler

if TYPE_CHECKING:
    from pyengine.model import Model, Session

MAX_DRAFT = 8
"""The most tokens guessed at a time."""
_MARGIN = 1.05  # a draft must promise this much gain: estimates are never quite right
_HOPE = 0.1  # what each further token is taken to cost before it is measured
_UNUSED = 5  # token type
_MEMORY = 1 / 16  # weight of the newest observation in a running mean


class Drafter(Protocol):
    """Guesses tokens. Nothing it does changes the text."""

    def propose(self, history: Sequence[int], gate: Gate, limit: int) -> Sequence[int]:
        """At most ``limit`` >= 1 tokens that may follow ``history``, as many as ``gate`` finds worth their cost."""
        ...


class LookaheadSession(Protocol):
    """The part of :class:`pyengine.model.Session` used here."""

    n_ctx: int

    def eval(
        self, tokens: Sequence[int], /, all_logits: bool = ..., out: npt.NDArray[np.float32] | None = ...
    ) -> npt.NDArray[np.float32]: ...
    def truncate(self, n: int, /) -> None: ...
    def check_cancel(self) -> None: ...
    def __len__(self) -> int: ...


class Gate:
    """What an evaluation of n tokens costs, in evaluations of one token: learned while generating.

    Before anything is measured it is taken to be cheap, so that a promising draft is tried; one measurement then tells.
    Dear measurements fade, because another program may have caused them. All this steers when to guess, never what is
    generated.
    """

    def __init__(self) -> None:
        self.seconds = 0.0
        """Of an evaluation of one token; 0 before any."""
        self._singles = 0
        self._measured: dict[int, float] = {}  # n -> cost
        self._costs = [1.0 + _HOPE * n for n in range(MAX_DRAFT + 1)]  # of 1, 2, ... tokens

    def measured(self, n: int, seconds: float) -> None:
        """An evaluation of ``n`` tokens took this long."""
        if n == 1:
            one = self.seconds or seconds
            # Disturbances are upwards: a lower value is believed at once, a higher one by and by.
            self.seconds = one + (min(seconds, 2 * one) - one) * (0.5 if seconds < 0.8 * one else 0.125)
            self._singles += 1
            if self._singles % 16 or not self._measured:
                return
            for m, cost in self._measured.items():
                self._measured[m] = cost + (1.0 + _HOPE * (m - 1) - cost) / 8
        elif self.seconds > 0.0:
            cost = min(max(seconds / self.seconds, 1.0), 1.25 * n)  # beyond: somebody else's work
            known = self._measured.get(n, cost)
            self._measured[n] = known + (cost - known) * 0.25
        # What is not measured lies on a line through one token and the nearest measured number.
        for m in range(2, MAX_DRAFT + 2):
            nearest = min(self._measured, key=lambda k: abs(k - m), default=0)
            if nearest:
                self._costs[m - 1] = 1.0 + (self._measured[nearest] - 1.0) * (m - 1) / (nearest - 1)

    def cost(self, n: int) -> float:
        """Of an evaluation of ``n`` tokens, 1..``MAX_DRAFT`` + 1."""
        return self._costs[n - 1]

    def best_length(self, hit_rates: Iterable[float], cost_per_guess: float = 0.0) -> int:
        """How many tokens to guess; 0: none.

        Args:
            hit_rates: of the first guess, of the second if the first was right, and so on.
            cost_per_guess: what finding one costs, in evaluations of one token.
        """
        best, best_gain = 0, _MARGIN
        tokens = reached = 1.0
        for n, rate in enumerate(hit_rates, start=1):
            reached *= rate
            if reached < 0.1:
                break
            tokens += reached
            gain = tokens / (self._costs[n] + n * cost_per_guess)
            if gain > best_gain:
                best, best_gain = n, gain
        return best


_LONGEST = 32  # match lengths are told apart up to here
_CLASS_OF_LENGTH = [sum(n >= bound for bound in (4, 6, 9, 16, 32)) for n in range(_LONGEST + MAX_DRAFT)]


class NgramDrafter:
    """Guesses that what followed the same tokens last time follows again: restated text, edited code, quotations.

    Keeps where each sequence of 4 and of 2 tokens occurred last. Every token, guessed or not, is compared with what
    would have been guessed, so the hit rates (by length of the match) are known without evaluating a single wrong
    guess, and text in which nothing repeats costs nothing. Work per token does not grow with the text.
    """

    _SIZES = (4, 2)

    def __init__(self) -> None:
        self._last: dict[int, dict[tuple[int, ...], int]] = {size: {} for size in self._SIZES}  # -> index of the next
        self._done = 0  # tokens of the history that are indexed
        self._source = -1  # index of the predicted next token; -1: no prediction
        self._length = 0  # tokens before it that agree with the end of the history
        # Hit rates by class of length; before anything is seen they are what prose gives.
        self._rates = [0.2, 0.45, 0.6, 0.75, 0.85, 0.9]

    def propose(self, history: Sequence[int], gate: Gate, limit: int) -> Sequence[int]:
        self._catch_up(history)
        if self._source < 0:
            return ()
        classes = _CLASS_OF_LENGTH[self._length : self._length + min(limit, MAX_DRAFT)]
        n = gate.best_length(map(self._rates.__getitem__, classes))
        period = len(history) - self._source  # a guess past the end of the history repeats
        return [history[self._source + i % period] for i in range(n)]

    def _catch_up(self, history: Sequence[int]) -> None:
        """Indexes the new tokens, and compares those after the prompt with their predictions."""
        if self._done == 0:  # a prompt tests no prediction
            tokens = tuple(history)
            for size, last in self._last.items():
                for at in range(size, len(tokens)):
                    last[tokens[at - size : at]] = at
            self._done = len(tokens)
            self._find(history)
            return
        for at in range(self._done, len(history)):
            if self._source >= 0:
                hit = history[self._source] == history[at]
                c = _CLASS_OF_LENGTH[self._length]
                self._rates[c] += (hit - self._rates[c]) * _MEMORY
            else:
                hit = False
            for size, last in self._last.items():
                if at >= size:
                    last[tuple(history[at - size : at])] = at
            self._done = at + 1
            if hit:
                self._source += 1
                self._length = min(self._length + 1, _LONGEST)
            else:
                self._find(history)

    def _find(self, history: Sequence[int]) -> None:
        """Looks for the end of the indexed history further up."""
        end = self._done
        for size, last in self._last.items():
            source = last.get(tuple(history[end - size : end]), -1) if end >= size else -1
            if source >= 0:
                length = size
                while (
                    length < _LONGEST and source > length and history[source - 1 - length] == history[end - 1 - length]
                ):
                    length += 1
                self._source, self._length = source, length
                return
        self._source = -1


class ModelDrafter:
    """Guesses with a smaller model of the same vocabulary, which draws as the large one does: same seed, same position.

    Where its guesses do not pay it pauses, twice as long each time (at most 256 tokens).

    Args:
        model: the large model.
        session: a session of the small one, from now on for this drafter alone.

    Errors: ``InvalidArgument`` when the two have different vocabularies.
    """

    _TRY = 0.6  # the hit rate it is given for a try

    def __init__(self, model: Model, session: Session) -> None:
        check_same_vocabulary(model, session.model)
        self._session = session
        self._n_vocab = min(model.tokenizer.n_vocab, session.model.tokenizer.n_vocab)
        self._out = np.empty((1, session.model.n_vocab), dtype=np.float32)
        self._sampler: Sampler | None = None
        self._guesses: list[int] = []
        self._guessed_at = 0
        self._rate = self._TRY
        self._seconds = 0.0  # of one guess
        self._pause = 0  # tokens left of it
        self._next_pause = 8

    def start(self, sampler: Sampler) -> None:
        """A new generation, drawn with ``sampler``."""
        self._sampler = sampler
        self._guesses = []

    def propose(self, history: Sequence[int], gate: Gate, limit: int) -> Sequence[int]:
        self._learn(history)
        if self._pause > 0:
            self._pause -= 1
            return ()
        cost = self._seconds / gate.seconds if gate.seconds else 0.0
        room = min(limit, MAX_DRAFT, self._session.n_ctx - len(history))
        n = gate.best_length([self._rate] * room, cost)
        if n == 0:
            self._pause, self._next_pause = self._next_pause, min(2 * self._next_pause, 256)
            self._rate = self._TRY
            return ()
        self._guesses, self._guessed_at = self._guess(history, n), len(history)
        return self._guesses

    def _learn(self, history: Sequence[int]) -> None:
        """From what became of the last guesses."""
        for guess, token in zip(self._guesses, history[self._guessed_at :], strict=False):
            self._rate += ((guess == token) - self._rate) / 8
            if guess != token:
                break
        self._guesses = []
        if self._rate > 0.8:
            self._next_pause = 8

    def _guess(self, history: Sequence[int], n: int) -> list[int]:
        assert self._sampler is not None
        tokens = array("q", history)
        pending = tokens[self._session.reuse(tokens) :]
        if max(pending) >= self._session.model.n_vocab:  # padding of the large model's vocabulary
            return []
        while True:
            start = time.perf_counter()
            logits = self._session.eval(pending, out=self._out)
            tokens.append(self._sampler.sample(logits[: self._n_vocab], tokens).id)
            if len(pending) <= 2:
                seconds = time.perf_counter() - start
                self._seconds += (seconds - self._seconds) * (_MEMORY if self._seconds else 1.0)
            if len(tokens) == len(history) + n:
                return tokens[len(history) :].tolist()
            pending = tokens[-1:]


def check_same_vocabulary(model: Model, draft: Model) -> None:
    """Raises ``InvalidArgument`` unless token ids mean the same to both models. Unused ids at the end do not matter."""
    key, kinds = "tokenizer.ggml.tokens", "tokenizer.ggml.token_type"
    ours, theirs = model.metadata.get(key), draft.metadata.get(key)
    if not isinstance(ours, list) or not isinstance(theirs, list):
        raise _no_draft(f"{'the model' if not isinstance(ours, list) else 'the draft model'} has no vocabulary ({key})")
    common = min(len(ours), len(theirs))
    for i in range(common):
        if ours[i] != theirs[i]:
            raise _no_draft(f"token {i} is {ours[i]!r} in the model and {theirs[i]!r} in the draft model")
    longer = model if len(ours) > common else draft
    rest = list(longer.metadata.get(kinds, ()))[common:]
    if len(ours) != len(theirs) and (not rest or any(kind != _UNUSED for kind in rest)):
        raise _no_draft(f"the model has {len(ours)} tokens, the draft model {len(theirs)}")


def _no_draft(what: str) -> InvalidArgument:
    return InvalidArgument(
        f"{what}; a draft model needs the vocabulary of the model that it drafts for",
        code="other_vocabulary",
        field="draft",
    )


class Lookahead:
    """Logits of one token after the other, from a session that evaluates guesses along.

    Between two calls the session may hold guesses that are not taken yet; :meth:`close` makes it forget them.
    """

    def __init__(self, session: LookaheadSession, drafter: Drafter | None) -> None:
        self.session = session
        self.n_drafted = 0
        self.n_accepted = 0
        self.n_evals = 0  # after the first
        self._drafter = drafter
        self._gate = Gate()
        self._buffer: npt.NDArray[np.float32] | None = None  # [MAX_DRAFT + 1, n_vocab]
        self._guesses: list[int] = []  # evaluated, not yet taken
        self._rows: npt.NDArray[np.float32] = np.empty((0, 0), dtype=np.float32)
        self._row = 0  # the one that the last taken token was drawn from
        self._length = 0  # of the session, guesses included

    def __len__(self) -> int:
        """Tokens that the session holds, guesses not counted."""
        return len(self.session) - len(self._guesses)

    def after(self, pending: list[int], history: Sequence[int], limit: int | None) -> npt.NDArray[np.float32]:
        """The logits after ``history``, whose last tokens, ``pending``, were not evaluated here yet.

        Valid until the next call. ``limit``: the most tokens that will still be asked for, this one included.
        """
        if self._guesses and pending == self._guesses[:1] and len(self.session) == self._length:
            self.session.check_cancel()
            self.n_accepted += 1
            self._row += 1
            del self._guesses[0]
            taken: npt.NDArray[np.float32] = self._rows[self._row]
            return taken
        self._forget()
        length = len(self.session)
        if self._drafter is not None and len(pending) == 1 and self._buffer is not None:
            room = self.session.n_ctx - length - 1
            room = room if limit is None else min(room, limit - 1)
            guesses = list(self._drafter.propose(history, self._gate, room)) if room > 0 else []
            if guesses and self._evaluate(pending, guesses):
                first: npt.NDArray[np.float32] = self._rows[0]
                return first
        start = time.perf_counter()
        row = self.session.eval(pending, out=self._buffer)
        if len(pending) == 1 and length:
            self._gate.measured(1, time.perf_counter() - start)
        if self._buffer is None:
            self._buffer = np.empty((MAX_DRAFT + 1 if self._drafter else 1, len(row)), dtype=np.float32)
        else:
            self.n_evals += 1
        return row

    def _evaluate(self, pending: list[int], guesses: list[int]) -> bool:
        """Evaluates the guesses along; False when one leads to damaged logits, which the text may never meet."""
        length = len(self.session)
        start = time.perf_counter()
        try:
            self._rows = self.session.eval([*pending, *guesses], all_logits=True, out=self._buffer)
        except NumericError:
            return False
        except BaseException:
            with contextlib.suppress(InvalidArgument):
                self.session.truncate(length)  # a cancelled evaluation may have kept a part
            raise
        self._gate.measured(1 + len(guesses), time.perf_counter() - start)
        self.n_evals += 1
        self.n_drafted += len(guesses)
        self._guesses, self._row, self._length = guesses, 0, len(self.session)
        return True

    def restart(self, drafter: Drafter | None) -> None:
        """From now on for another text, with a new drafter; the counts go on."""
        self._forget()
        self._drafter = drafter

    def _forget(self) -> None:
        """Makes the session forget the guesses, unless somebody else has used it meanwhile."""
        n_guesses, self._guesses = len(self._guesses), []
        if n_guesses and len(self.session) == self._length:
            self.session.truncate(self._length - n_guesses)

    def close(self) -> None:
        """Leaves in the session what was taken. It may be closed already."""
        with contextlib.suppress(InvalidArgument):
            self._forget()
