"""Perplexity of a text, and the divergence from saved logits of another model. docs/quality.md has the definitions.

Exponentials are float32, what is summed up is float64: a likelihood is off by 1e-6 or so.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from pyengine.memory import NUMPY_BYTES, need_memory
from pyengine.model import Session
from pyengine.saved_logits import LogitsWriter, SavedLogits
from pyengine.windows import Floats, Ids, RowBuffer

_BLOCK = 1 << 17  # logits

Doubles = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Scores:
    """The scored positions of one window, n of them.

    Attributes:
        nll: float64 [n], negative log likelihood of the token that follows.
        base_nll: the same of the saved logits; the rest is empty, too, where there are none.
        divergence: float64 [n], Kullback-Leibler divergence of the saved distribution from this one.
        same_top: bool [n], whether the most likely token is the same.
    """

    nll: Doubles
    base_nll: Doubles
    divergence: Doubles
    same_top: npt.NDArray[np.bool_]


def score(
    session: Session, windows: Ids, *, base: SavedLogits | None = None, save: LogitsWriter | None = None
) -> Iterator[Scores]:
    """Evaluates windows int32 [count, n_ctx] one after the other, each from an empty session.

    ``base``: compare with these, which hold at least these windows. ``save``: keep the logits.
    """
    buffer, scorer = RowBuffer(session.model.n_vocab), _Scorer(session.model.n_vocab)
    first = windows.shape[1] // 2
    for index, ids in enumerate(windows):
        session.truncate(0)
        need_memory(NUMPY_BYTES, "numpy")
        session.prefill(ids[:first])
        at, parts = 0, []
        for piece in buffer.eval(session, ids[first:-1]):
            for logits in scorer.blocks(piece):
                n = len(logits)
                logits -= logits.max(axis=1, keepdims=True)
                nll = scorer.likelihoods(logits, ids[first + at + 1 : first + at + 1 + n])
                if save is not None:
                    save.add(nll, logits)
                empty = np.empty(0)
                if base is None:
                    parts.append(Scores(nll, empty, empty, empty.astype(bool)))
                else:
                    base_nll, base_logits = base.read_rows(index, at, n)
                    same = logits.argmax(axis=1) == base_logits.argmax(axis=1)
                    parts.append(Scores(nll, base_nll, scorer.divergences(base_logits, logits), same))
                at += n
        yield joined(parts)


def joined(parts: Sequence[Scores]) -> Scores:
    """The positions of all parts."""
    names = [field.name for field in dataclasses.fields(Scores)]
    return Scores(**{name: np.concatenate([getattr(part, name) for part in parts]) for name in names})


class _Scorer:
    """Works on so few rows at a time that they stay in the cache, in memory of its own: fresh memory costs as much as
    the arithmetic. Logits are float32 [n, n_vocab], the largest of each row 0."""

    def __init__(self, n_vocab: int) -> None:
        self._rows = max(_BLOCK // n_vocab, 1)
        self._a, self._b = np.empty((2, n_vocab), dtype=np.float32)

    def blocks(self, piece: Floats) -> Iterator[Floats]:
        for at in range(0, len(piece), self._rows):
            yield piece[at : at + self._rows]

    def likelihoods(self, logits: Floats, targets: Ids) -> Doubles:
        """-log softmax(logits)[target] of each row."""
        sums = np.array([self._sum(row, self._a) for row in logits])
        nll: Doubles = np.log(sums) - logits[np.arange(len(targets)), targets]
        return nll

    def divergences(self, p: Floats, q: Floats) -> Doubles:
        """sum softmax(p) (log softmax(p) - log softmax(q)) of each row."""
        out = np.empty(len(p))
        for i, (a, b) in enumerate(zip(p, q, strict=True)):
            sum_q, sum_p = self._sum(b, self._b), self._sum(a, self._a)
            weighted = np.multiply(self._a, np.subtract(a, b, out=self._b), out=self._a)
            out[i] = weighted.sum(dtype=np.float64) / sum_p - np.log(sum_p) + np.log(sum_q)
        return out

    @staticmethod
    def _sum(row: Floats, exponentials: Floats) -> np.float64:
        total: np.float64 = np.exp(row, out=exponentials).sum(dtype=np.float64)
        return total


@dataclass(frozen=True)
class Estimate:
    """A value and its standard error."""

    value: float
    error: float


@dataclass(frozen=True)
class Divergence:
    """How far a model is from the one whose logits were saved.

    Attributes:
        base: the other model's perplexity, on the same positions.
        ratio: this model's perplexity / base; its error knows that both see the same text.
        mean: of the Kullback-Leibler divergence over the positions, in nats; then its median, the values that 90 %,
            99 % and 99.9 % of the positions do not exceed, and the largest.
        same_top: share of the positions where the most likely token is the same.
    """

    base: Estimate
    ratio: Estimate
    mean: Estimate
    median: float
    p90: float
    p99: float
    p999: float
    maximum: float
    same_top: Estimate


@dataclass(frozen=True)
class Report:
    """Figures over all scored positions.

    Attributes:
        perplexity: exp of the mean negative log likelihood; the error treats positions as independent.
        between_windows: its standard error from the means of the windows, which positions of a window do not share;
            ``None`` with fewer than two.
        positions, windows: how many there were.
        divergence: from saved logits, where they were given.
    """

    perplexity: Estimate
    between_windows: float | None
    positions: int
    windows: int
    divergence: Divergence | None


def report(scores: Sequence[Scores]) -> Report:
    """The figures of some windows, at least one."""
    all_scores = joined(scores)
    log_perplexity = _mean(all_scores.nll)
    perplexity = _exponential(log_perplexity)
    means = np.array([window.nll.mean() for window in scores])
    between = perplexity.value * _mean(means).error if len(means) > 1 else None
    divergence = _divergence(all_scores) if len(all_scores.divergence) else None
    return Report(perplexity, between, len(all_scores.nll), len(scores), divergence)


def _divergence(scores: Scores) -> Divergence:
    same = float(scores.same_top.mean())
    median, p90, p99, p999 = map(float, np.quantile(scores.divergence, [0.5, 0.9, 0.99, 0.999]))
    return Divergence(
        base=_exponential(_mean(scores.base_nll)),
        ratio=_exponential(_mean(scores.nll - scores.base_nll)),
        mean=_mean(scores.divergence),
        median=median,
        p90=p90,
        p99=p99,
        p999=p999,
        maximum=float(scores.divergence.max()),
        same_top=Estimate(same, (same * (1 - same) / (len(scores.same_top) - 1)) ** 0.5),
    )


def _mean(values: Doubles) -> Estimate:
    return Estimate(float(values.mean()), float(values.std(ddof=1) / len(values) ** 0.5))


def _exponential(log: Estimate) -> Estimate:
    value = float(np.exp(log.value))
    return Estimate(value, value * log.error)
