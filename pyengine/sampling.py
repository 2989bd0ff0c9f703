"""Choosing the next token: settings, the chain of samplers, and a generator that gives the same draw everywhere.

The chain works on *candidates*: token ids in ascending order with their logits in float64. A step either changes logits
(penalties, dry, temperature) or keeps a subset; the candidates stay in id order, so every tie goes to the lower id.

A vocabulary has 150,000 tokens and a chain keeps a few dozen, so the whole row is looked at natively and once: where
the first step that removes candidates is top_k, top_p, min_p or greedy choice, a shortlist is made of the raw logits
and of the few logits that bias and penalties change, and the chain goes on with that. What it gives is what the chain
gives on all candidates, bit for bit (tests/text/test_sampling.py runs both).

Same seed, same text, on every machine and numpy: all decisions use only IEEE additions, multiplications, divisions and
square roots in a fixed order (running sums, an exponential of our own), because ``exp``, ``log`` and pairwise sums
differ in the last bit between CPUs and releases. Reported log-probabilities decide nothing and use the usual functions.
"""

from __future__ import annotations

import math
import secrets
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from pyengine import _core
from pyengine.dry import BreakerTokens, find_breakers, repeats_of, unbroken_length
from pyengine.errors import InvalidArgument, NumericError

SAMPLERS = ("penalties", "dry", "top_n_sigma", "top_k", "typical_p", "top_p", "min_p", "xtc", "temperature")
"""Every step of the chain, in the default order."""

_Floats = npt.NDArray[np.float64]
_Ids = npt.NDArray[np.int64]
_MASK = 2**64 - 1


@dataclass(frozen=True)
class SamplerSettings:
    """How the next token is chosen. The defaults are the ones users of GGUF engines know.

    Attributes:
        temperature: divides the logits; 0 always takes the most likely token.
        top_k: keep the k most likely; <= 0: all.
        top_p: keep the smallest set of most likely tokens whose probability reaches p; >= 1: all.
        min_p: keep tokens at least this probable relative to the best; 0: all.
        typical_p: keep the tokens whose information is closest to the entropy, up to probability p; >= 1: all.
        top_n_sigma: keep logits within n standard deviations of the largest; <= 0: all.
        xtc_probability: chance of removing all tokens above ``xtc_threshold`` but the least likely of them.
        xtc_threshold: see above; above 0.5: never.
        dry_multiplier: strength of the penalty on continuing a repeated sequence; 0: off.
        dry_base: the penalty is ``multiplier * base ** (repeated length - allowed length)``; below 1: off.
        dry_allowed_length: the longest repeat that costs nothing.
        dry_penalty_last_n: how many last tokens are searched; -1: all, 0: off.
        dry_sequence_breakers: a repeat never reaches across these strings.
        repeat_penalty: divides positive and multiplies negative logits of tokens seen; 1: off.
        repeat_last_n: how many last tokens the three token penalties look at; -1: all, 0: off.
        presence_penalty: subtracted from the logit of every token seen.
        frequency_penalty: subtracted once per occurrence.
        seed: 0..2^64-1; ``None``: a fresh random one for every :class:`Sampler`.
        logit_bias: added to the logits by token id before everything else; ``-inf`` forbids a token.
        top_logprobs: report log-probabilities: of the chosen token, and of this many most likely; ``None``: none.
        samplers: the steps of the chain, in order; a step left out is off.

    Errors: ``InvalidArgument`` with ``field`` naming the setting.
    """

    temperature: float = 0.8
    top_k: int = 40
    top_p: float = 0.95
    min_p: float = 0.05
    typical_p: float = 1.0
    top_n_sigma: float = -1.0
    xtc_probability: float = 0.0
    xtc_threshold: float = 0.1
    dry_multiplier: float = 0.0
    dry_base: float = 1.75
    dry_allowed_length: int = 2
    dry_penalty_last_n: int = -1
    dry_sequence_breakers: tuple[str, ...] = ("\n", ":", '"', "*")
    repeat_penalty: float = 1.0
    repeat_last_n: int = 64
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    seed: int | None = None
    logit_bias: Mapping[int, float] = field(default_factory=dict, hash=False)
    top_logprobs: int | None = None
    samplers: tuple[str, ...] = SAMPLERS

    def __post_init__(self) -> None:
        for name, low, high in _RANGES:
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not low <= value <= high:
                raise _bad(name, value, _range_text(low, high))
        for name in _INTEGERS:
            if not isinstance(getattr(self, name), int):
                raise _bad(name, getattr(self, name), "a whole number")
        if self.seed is not None and not (isinstance(self.seed, int) and 0 <= self.seed <= _MASK):
            raise _bad("seed", self.seed, "a whole number in 0..2^64-1, or None for a random one")
        if self.top_logprobs is not None and not (isinstance(self.top_logprobs, int) and self.top_logprobs >= 0):
            raise _bad("top_logprobs", self.top_logprobs, "a whole number >= 0, or None")
        object.__setattr__(self, "dry_sequence_breakers", _strings("dry_sequence_breakers", self.dry_sequence_breakers))
        object.__setattr__(self, "samplers", _strings("samplers", self.samplers))
        unknown = [name for name in self.samplers if name not in SAMPLERS]
        if unknown or len(set(self.samplers)) != len(self.samplers):
            raise _bad("samplers", self.samplers, f"each at most once, out of {', '.join(SAMPLERS)}")
        for token, bias in self.logit_bias.items():
            if not (isinstance(token, int) and 0 <= token < 2**31) or math.isnan(bias) or bias == math.inf:
                raise _bad("logit_bias", {token: bias}, "a token id and a number (or -inf)")
        object.__setattr__(self, "logit_bias", dict(self.logit_bias))


_RANGES = (
    ("temperature", 0.0, 1e6),
    ("top_k", -(2**31), 2**31),
    ("top_p", 0.0, math.inf),
    ("min_p", 0.0, 1.0),
    ("typical_p", 0.0, math.inf),
    ("top_n_sigma", -1e6, 1e6),
    ("xtc_probability", 0.0, 1.0),
    ("xtc_threshold", 0.0, 1.0),
    ("dry_multiplier", 0.0, 1e6),
    ("dry_base", 0.0, 1e6),
    ("dry_allowed_length", 0, 2**31),
    ("dry_penalty_last_n", -1, 2**31),
    ("repeat_penalty", 1e-3, 1e3),
    ("repeat_last_n", -1, 2**31),
    ("presence_penalty", -1e6, 1e6),
    ("frequency_penalty", -1e6, 1e6),
)
_INTEGERS = ("top_k", "dry_allowed_length", "dry_penalty_last_n", "repeat_last_n")


def _bad(name: str, value: object, expected: str) -> InvalidArgument:
    return InvalidArgument(f"{name} is {value!r}; expected {expected}", code="bad_option", field=name)


def _range_text(low: float, high: float) -> str:
    return f"a number >= {low:g}" if high == math.inf else f"a number in {low:g}..{high:g}"


def _strings(name: str, value: Iterable[str]) -> tuple[str, ...]:
    items = (value,) if isinstance(value, str) else tuple(value)
    if not all(isinstance(item, str) and item for item in items):
        raise _bad(name, value, "non-empty strings")
    return items


class TokenLogprob(NamedTuple):
    """A token and its natural log-probability under the model's own distribution (before bias and samplers)."""

    id: int
    logprob: float


class SampleResult(NamedTuple):
    """One chosen token; ``logprob`` is ``None`` and ``top_logprobs`` empty unless the settings ask for them."""

    id: int
    logprob: float | None = None
    top_logprobs: tuple[TokenLogprob, ...] = ()


class _Candidates:
    """Token ids, ascending, and their logits: int64 [n], float64 [n]."""

    __slots__ = ("ids", "logits")

    def __init__(self, ids: _Ids, logits: _Floats) -> None:
        self.ids = ids
        self.logits = logits

    def keep(self, which: npt.NDArray[np.bool_] | _Ids) -> None:
        """Keeps a mask's or an ascending index list's candidates."""
        self.ids = self.ids[which]
        self.logits = self.logits[which]

    def find(self, tokens: _Ids) -> tuple[_Ids, npt.NDArray[np.bool_]]:
        """Positions of ``tokens`` among the candidates, and which of them are present."""
        at = np.minimum(np.searchsorted(self.ids, tokens), len(self.ids) - 1)
        return at, self.ids[at] == tokens


class _Change(NamedTuple):
    """New logits for some tokens: ids, ascending and distinct, and what makes their new logits of the old ones."""

    ids: _Ids
    apply: Callable[[_Floats], _Floats]

    def to(self, c: _Candidates) -> None:
        """Applies it to the candidates among the tokens."""
        at, present = c.find(self.ids)
        c.logits[at[present]] = self.apply(c.logits[at])[present]


_NO_CHANGE = _Change(np.empty(0, dtype=np.int64), lambda logits: logits)
_SHORTLIST = 256  # candidates that top_p and min_p look at first


class Sampler:
    """Applies :class:`SamplerSettings` to logits. Not shared between threads.

    The result depends on the logits, the history, the position and the seed alone, never on earlier calls.

    Args:
        settings: what to do.
        tokenizer: needed when DRY is on, to find its sequence breakers in the vocabulary.
    """

    def __init__(self, settings: SamplerSettings | None = None, tokenizer: BreakerTokens | None = None) -> None:
        self.settings = s = settings or SamplerSettings()
        self.seed: int = secrets.randbits(64) if s.seed is None else s.seed
        active = [name for name in s.samplers if _active(name, s)]
        self._steps: list[Callable[[_Candidates, Sequence[int], int], None]] = [
            getattr(self, f"_{name}") for name in active
        ]
        self._n_changing = next((i for i, name in enumerate(active) if name not in _CHANGES), len(active))
        self._first = "" if self._n_changing == len(active) else active[self._n_changing]  # that removes candidates
        if s.temperature == 0 and {"temperature"} <= set(active[self._n_changing :]) <= _KEEP_THE_BEST:
            self._first = "greedy"
        self._bias = _NO_CHANGE
        if s.logit_bias:
            tokens = sorted(s.logit_bias)
            biases = np.array([s.logit_bias[t] for t in tokens], dtype=np.float64)
            self._bias = _Change(np.array(tokens, dtype=np.int64), lambda logits: logits + biases)
        self._breakers: Mapping[int, list[tuple[int, ...]]] = {}
        if self._dry in self._steps and s.dry_sequence_breakers:
            if tokenizer is None:
                raise _bad("dry_sequence_breakers", s.dry_sequence_breakers, "() when the sampler has no tokenizer")
            self._breakers = find_breakers(tokenizer, s.dry_sequence_breakers)

    def sample(
        self, logits: npt.NDArray[np.floating], history: Sequence[int] = (), position: int | None = None
    ) -> SampleResult:
        """Chooses the token that follows ``history``.

        Args:
            logits: [n_vocab], left unchanged.
            history: the ids so far, prompt included: what the penalties look at.
            position: which random numbers to use, 0..2^64-1; by default ``len(history)``.

        Errors: ``NumericError`` when a logit is NaN or +inf, or when every token is forbidden.
        """
        position = len(history) if position is None else position
        ids, weights = self._run(logits, history, position)
        if len(ids) == 1:
            chosen = int(ids[0])
        else:
            cumulative = np.cumsum(weights)
            at = int(np.searchsorted(cumulative, uniform(self.seed, position, 0) * cumulative[-1], side="right"))
            chosen = int(ids[min(at, len(ids) - 1)])
        if self.settings.top_logprobs is None:
            return SampleResult(chosen)
        return _with_logprobs(np.asarray(logits), chosen, self.settings.top_logprobs)

    def distribution(
        self, logits: npt.NDArray[np.floating], history: Sequence[int] = (), position: int | None = None
    ) -> tuple[_Ids, _Floats]:
        """What :meth:`sample` draws from: ids int64 [n], ascending, and their probabilities float64 [n]."""
        ids, weights = self._run(logits, history, len(history) if position is None else position)
        return ids, weights / _sum(weights)

    def _run(self, logits: npt.NDArray[np.floating], history: Sequence[int], position: int) -> tuple[_Ids, _Floats]:
        """The remaining ids and their unnormalised probabilities."""
        raw = np.asarray(logits)
        if raw.ndim != 1 or raw.size == 0:
            raise InvalidArgument(f"logits have shape {raw.shape}; expected [n_vocab]", code="bad_logits")
        if len(self._bias.ids) and self._bias.ids[-1] >= len(raw):
            raise InvalidArgument(
                f"logit_bias names token {self._bias.ids[-1]}; the vocabulary has {len(raw)}", code="bad_token"
            )
        candidates, done = self._start(raw, history)
        for step in self._steps[done:]:
            step(candidates, history, position)
        return candidates.ids, _exp(candidates.logits - candidates.logits.max())

    def _start(self, raw: npt.NDArray[np.floating], history: Sequence[int]) -> tuple[_Candidates, int]:
        """The first candidates, and how many steps have been done for them."""
        if self._first not in _SHORTENING or raw.dtype != np.float32:
            return self._everything(raw), 0
        row = np.ascontiguousarray(raw)
        steps = self._steps[: self._n_changing]
        changes = [
            self._token_penalties(history) if s == self._penalties else self._dry_penalties(history) for s in steps
        ]
        row_changes = _Changed(row, [self._bias, *changes])
        if self._first in ("greedy", "top_k"):
            shortlist = row_changes.best(1 if self._first == "greedy" else self.settings.top_k)
            return shortlist, self._n_changing + 1 if self._first == "top_k" else len(self._steps)
        return self._reach(row_changes), self._n_changing + 1

    def _reach(self, row: _Changed) -> _Candidates:
        """What top_p or min_p, as the first step that removes candidates, keeps of the row."""
        s, k, total = self.settings, _SHORTLIST, 0.0
        while True:
            c = row.best(k)
            peak = float(c.logits.max())
            if self._first == "top_p" and total == 0.0:
                total = row.softmax_sum(peak)
            weights = _exp(c.logits - peak)
            if self._first == "top_p":
                # The same sums as over all candidates: from the largest on.
                if len(c.ids) < k or _sum(weights[_largest(c.logits, k)]) >= s.top_p * total:
                    _keep_mass(c, c.logits, weights, s.top_p * total, strictly=False)
                    return c
            elif len(c.ids) < k or weights.min() < s.min_p * 0.999:  # the rest is smaller still
                c.keep(weights >= s.min_p)
                return c
            k *= 8

    def _everything(self, raw: npt.NDArray[np.floating]) -> _Candidates:
        """All tokens but the forbidden ones."""
        values = raw.astype(np.float64)
        if not values.max() < math.inf:  # catches NaN too
            raise NumericError("the logits contain NaN or infinity: the weights are damaged", code="bad_logits")
        candidates = _Candidates(np.arange(len(values), dtype=np.int64), values)
        self._bias.to(candidates)
        if values.min() == -math.inf:
            candidates.keep(values > -math.inf)
            if not len(candidates.ids):
                raise _no_candidates()
        return candidates

    # ---- the steps, in the default order; each is called only when its settings make it active ----

    def _penalties(self, c: _Candidates, history: Sequence[int], position: int) -> None:
        self._token_penalties(history).to(c)

    def _token_penalties(self, history: Sequence[int]) -> _Change:
        s = self.settings
        tokens, counts = np.unique(_window(history, s.repeat_last_n), return_counts=True)

        def apply(seen: _Floats) -> _Floats:
            seen = np.where(seen <= 0, seen * s.repeat_penalty, seen / s.repeat_penalty)
            return seen - counts * s.frequency_penalty - s.presence_penalty

        return _Change(tokens, apply)

    def _dry(self, c: _Candidates, history: Sequence[int], position: int) -> None:
        self._dry_penalties(history).to(c)

    def _dry_penalties(self, history: Sequence[int]) -> _Change:
        s = self.settings
        window = _window(history, s.dry_penalty_last_n)
        if len(window) <= s.dry_allowed_length:
            return _NO_CHANGE
        limit = unbroken_length(window, self._breakers)
        if limit < s.dry_allowed_length:
            return _NO_CHANGE
        # Beyond base^e = 2^128 the penalty does not grow: the peers' float32 limit, and ours on the search.
        most = int(math.log(2) * 128 / math.log(s.dry_base)) if s.dry_base > 1.000001 else 0
        repeats = sorted(repeats_of(window, s.dry_allowed_length, min(limit, s.dry_allowed_length + most)).items())
        penalties = np.array(
            [s.dry_multiplier * _power(s.dry_base, length - s.dry_allowed_length) for _, length in repeats],
            dtype=np.float64,
        )
        return _Change(np.array([token for token, _ in repeats], dtype=np.int64), lambda logits: logits - penalties)

    def _top_n_sigma(self, c: _Candidates, history: Sequence[int], position: int) -> None:
        mean = _sum(c.logits) / len(c.logits)
        sigma = math.sqrt(_sum((c.logits - mean) ** 2) / len(c.logits))
        c.keep(c.logits >= c.logits.max() - self.settings.top_n_sigma * sigma)

    def _top_k(self, c: _Candidates, history: Sequence[int], position: int) -> None:
        if self.settings.top_k < len(c.ids):
            c.keep(np.sort(_largest(c.logits, self.settings.top_k)))

    def _typical_p(self, c: _Candidates, history: Sequence[int], position: int) -> None:
        # -log p - entropy = sum(p * shifted) - shifted, with shifted = logit - max: the normaliser cancels.
        shifted = c.logits - c.logits.max()
        weights = _exp(shifted)
        total = _sum(weights)
        distance = np.abs(_sum(weights * shifted) / total - shifted)
        _keep_mass(c, -distance, weights, self.settings.typical_p * total, strictly=True)

    def _top_p(self, c: _Candidates, history: Sequence[int], position: int) -> None:
        weights = _exp(c.logits - c.logits.max())
        _keep_mass(c, c.logits, weights, self.settings.top_p * _sum(weights), strictly=False)

    def _min_p(self, c: _Candidates, history: Sequence[int], position: int) -> None:
        c.keep(_exp(c.logits - c.logits.max()) >= self.settings.min_p)

    def _xtc(self, c: _Candidates, history: Sequence[int], position: int) -> None:
        s = self.settings
        if len(c.ids) < 2 or uniform(self.seed, position, 1) >= s.xtc_probability:
            return
        weights = _exp(c.logits - c.logits.max())
        above = np.flatnonzero(weights >= s.xtc_threshold * _sum(weights))
        if len(above) > 1:  # the least likely of them stays; among equals the highest id, as everywhere
            kept = above[len(above) - 1 - int(np.argmin(c.logits[above][::-1]))]
            mask = np.ones(len(c.ids), dtype=np.bool_)
            mask[above] = False
            mask[kept] = True
            c.keep(mask)

    def _temperature(self, c: _Candidates, history: Sequence[int], position: int) -> None:
        if self.settings.temperature == 0:
            c.keep(np.array([np.argmax(c.logits)], dtype=np.int64))  # the first of equals: the lowest id
        else:
            c.logits = c.logits / max(self.settings.temperature, 1e-100)  # the bound keeps every quotient finite


_CHANGES = ("penalties", "dry")  # the steps that change a few logits and remove nothing
_KEEP_THE_BEST = {"top_n_sigma", "top_k", "top_p", "min_p", "temperature"}  # the best candidate survives these
_SHORTENING = ("greedy", "top_k", "top_p", "min_p")


class _Changed:
    """A whole row of logits, float32 [n_vocab], with a few of them changed."""

    def __init__(self, row: npt.NDArray[np.float32], changes: Sequence[_Change]) -> None:
        self.row = row
        if not any(len(change.ids) for change in changes):  # the usual case, made quick
            self.ids, self.changed = _NO_CHANGE.ids, _Candidates(_NO_CHANGE.ids, np.empty(0))
            return
        ids = np.unique(np.concatenate([change.ids for change in changes]))
        self.ids = ids = ids[(ids >= 0) & (ids < len(row))]  # the history may name tokens that the row lacks
        self.changed = c = _Candidates(ids, row[ids].astype(np.float64))  # less the forbidden ones
        for i, change in enumerate(changes):
            if len(c.ids):
                change.to(c)
            if i == 0:  # the bias
                c.keep(c.logits > -math.inf)

    def best(self, k: int) -> _Candidates:
        """The k largest of the changed row (fewer only where there are no more), ids ascending, ties to lower ids."""
        c = _Candidates(*_core.top_k(self.row, k + len(self.ids)))  # at most len(ids) of them give way to changed ones
        if len(self.ids):
            c.keep(~np.isin(c.ids, self.ids, assume_unique=True))
            ids = np.concatenate([c.ids, self.changed.ids])
            order = np.argsort(ids)
            c = _Candidates(ids[order], np.concatenate([c.logits, self.changed.logits])[order])
        if len(c.ids) and c.logits.min() == -math.inf:
            c.keep(c.logits > -math.inf)
        if not len(c.ids):
            raise _no_candidates()
        if k < len(c.ids):
            c.keep(np.sort(_largest(c.logits, k)))
        return c

    def softmax_sum(self, peak: float) -> float:
        """The sum of e^(logit - peak) over the changed row, in the order of the ids."""
        values = np.full(len(self.ids), -math.inf)  # the forbidden ones count nothing
        if len(self.ids):
            values[np.searchsorted(self.ids, self.changed.ids)] = self.changed.logits
        return _core.softmax_sum(self.row, peak, self.ids.astype(np.int32), values)


def _no_candidates() -> NumericError:
    return NumericError("every token is forbidden: no logit is above -inf", code="no_candidates")


def _active(name: str, s: SamplerSettings) -> bool:
    """Whether a step can change anything with these settings."""
    match name:
        case "penalties":
            return s.repeat_last_n != 0 and (s.repeat_penalty, s.presence_penalty, s.frequency_penalty) != (1, 0, 0)
        case "dry":
            return s.dry_multiplier > 0 and s.dry_base >= 1 and s.dry_penalty_last_n != 0
        case "top_n_sigma":
            return s.top_n_sigma > 0
        case "top_k":
            return s.top_k > 0
        case "typical_p":
            return s.typical_p < 1
        case "top_p":
            return s.top_p < 1
        case "min_p":
            return s.min_p > 0
        case "xtc":
            return s.xtc_probability > 0 and s.xtc_threshold <= 0.5
        case _:
            return s.temperature != 1


def _with_logprobs(raw: npt.NDArray[np.floating], chosen: int, n_top: int) -> SampleResult:
    values = raw.astype(np.float64)
    peak = values.max()
    log_total = float(peak + np.log(np.sum(np.exp(values - peak))))
    best = _largest(values, min(n_top, len(values)))
    top = tuple(TokenLogprob(int(i), float(values[i]) - log_total) for i in best)
    return SampleResult(chosen, float(values[chosen]) - log_total, top)


# ---- selection ----


def _largest(keys: _Floats, k: int) -> _Ids:
    """Indices of the k largest keys, largest first, ties by lower index. Sorts only what can be among them.

    The smallest of the k largest group maxima is a lower bound of the k-th largest key (k keys reach it), so one pass
    leaves hardly more than k of 152k keys to sort.
    """
    groups = len(keys) // 64
    if k <= 0:
        return np.empty(0, dtype=np.int64)
    if k < groups:
        maxima = keys[: groups * 64].reshape(64, groups).max(axis=0)
        some = np.flatnonzero(keys >= np.partition(maxima, groups - k)[groups - k])
    elif k < len(keys):
        some = np.flatnonzero(keys >= np.partition(keys, len(keys) - k)[len(keys) - k])
    else:
        some = np.arange(len(keys), dtype=np.int64)
    return some[np.argsort(-keys[some], kind="stable")[:k]]


def _keep_mass(c: _Candidates, keys: _Floats, weights: _Floats, mass: float, *, strictly: bool) -> None:
    """Keeps the fewest candidates, by descending key, whose weights sum to at least (``strictly``: above) ``mass``."""
    k = min(256, len(keys))
    while True:
        order = _largest(keys, k)
        cumulative = np.cumsum(weights[order])
        n = int(np.searchsorted(cumulative, mass, side="right" if strictly else "left")) + 1
        if n <= k or k == len(keys):
            return c.keep(np.sort(order[:n]))
        k = min(8 * k, len(keys))


def _window(history: Sequence[int], last_n: int) -> _Ids:
    """The last n tokens (-1: all), int64 [<= n]."""
    return np.asarray(history[max(0, len(history) - last_n) if last_n >= 0 else 0 :], dtype=np.int64)


# ---- arithmetic that gives the same bits everywhere ----


def _exp(x: _Floats) -> _Floats:
    """e^x for x <= 0, float64 [n], error < 2 units in the last place; below -700 the value at -700."""
    return _core.exp(np.ascontiguousarray(x))


def _sum(x: _Floats) -> float:
    """The sum from the first element to the last, in that order."""
    return float(np.cumsum(x)[-1])


def _power(base: float, exponent: int) -> float:
    """base^exponent by squaring: the same roundings everywhere, unlike the platform's pow."""
    result = 1.0
    while exponent:
        if exponent & 1:
            result *= base
        base *= base
        exponent >>= 1
    return result


# ---- random numbers: a counter in, a number out, no state ----


def uniform(seed: int, position: int, stream: int) -> float:
    """A number in [0, 1), a multiple of 2^-53, determined by its arguments (each 0..2^64-1)."""
    return (philox4x64(seed, (position, stream, 0, 0))[0] >> 11) * 2.0**-53


def philox4x64(seed: int, counter: tuple[int, int, int, int]) -> tuple[int, int, int, int]:
    """Philox4x64-10 with key (seed, 0): four random 64-bit numbers for a 256-bit counter, low word first.

    Salmon, Moraes, Dror, Shaw: "Parallel random numbers: as easy as 1, 2, 3" (SC 2011).
    """
    c0, c1, c2, c3 = counter
    k0, k1 = seed & _MASK, 0
    for _ in range(10):
        p0, p1 = c0 * 0xD2E7470EE14C6C93, c2 * 0xCA5A826395121157
        c0, c1, c2, c3 = (p1 >> 64) ^ c1 ^ k0, p1 & _MASK, (p0 >> 64) ^ c3 ^ k1, p0 & _MASK
        k0, k1 = (k0 + 0x9E3779B97F4A7C15) & _MASK, (k1 + 0xBB67AE8584CAA73B) & _MASK
    return c0, c1, c2, c3
