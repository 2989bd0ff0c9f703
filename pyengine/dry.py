"""DRY, "don't repeat yourself": what would continue a repeat of the end of a text, for :mod:`pyengine.sampling`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

import numpy as np
import numpy.typing as npt

_Ids = npt.NDArray[np.int64]


class BreakerTokens(Protocol):
    """What DRY needs of a tokenizer to find its sequence breakers."""

    n_vocab: int

    def token_bytes(self, token: int, /) -> bytes: ...
    def encode(self, text: str, /, *, add_special: bool = ...) -> Sequence[int]: ...


def find_breakers(tokenizer: BreakerTokens, strings: Sequence[str]) -> dict[int, list[tuple[int, ...]]]:
    """The token sequences that break a repeat: first token -> the ids that must follow it (often none).

    A token that contains a breaker breaks alone; one that ends with the beginning of a breaker does so together with
    the tokens of the rest.
    """
    whole = [text.encode() for text in strings]
    splits = [
        (text[:i].encode(), tuple(tokenizer.encode(text[i:], add_special=False)))
        for text in strings
        for i in range(1, len(text))
    ]
    found: dict[int, list[tuple[int, ...]]] = {}
    for token in range(tokenizer.n_vocab):
        text = tokenizer.token_bytes(token)
        tails: list[tuple[int, ...]] = [()]
        if not any(w in text for w in whole):
            tails = [tail for head, tail in splits if text.endswith(head)]
        if tails:
            found[token] = tails
    return found


def unbroken_length(window: _Ids, breakers: Mapping[int, list[tuple[int, ...]]]) -> int:
    """How many last tokens follow the last sequence breaker."""
    n = len(window)
    for i in range(n if breakers else 0):  # a breaker that starts i tokens before the last one
        tails = breakers.get(int(window[n - 1 - i]))
        if tails is None:
            continue
        following = tuple(window[n - i :].tolist()) if i else ()
        longest = max((len(tail) for tail in tails if following[: len(tail)] == tail), default=-1)
        if longest >= 0:
            return i - longest
    return n


def repeats_of(window: _Ids, least: int, limit: int) -> dict[int, int]:
    """For each token that would continue a repeat of the window's end: the length of the longest one, least..limit."""
    last = len(window) - 1
    lengths: dict[int, int] = {}
    ends: _Ids = np.arange(last, dtype=np.int64)  # earlier places that agree with the last `length` tokens
    for length in range(limit + 1):
        if length >= least:
            lengths.update(dict.fromkeys(window[ends + 1].tolist(), length))
        ends = ends[ends >= length]
        ends = ends[window[ends - length] == window[last - length]]
        if not len(ends):
            break
    return lengths
