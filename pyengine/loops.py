"""Notices that a text has begun to say the same passage over and over."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

_LONGEST = 2048  # tokens of the longest passage that is recognised
_COPIES = 3


class LoopDetector:
    """Takes the tokens of an answer one by one and says when they have gone round in a circle, token for token.

    A loop is a passage of at most 2048 tokens that came at least three times in a row and fills at least ``limit``
    tokens doing so. Tables of zeros, rulers, refrains and lists whose entries differ in anything stay below that.

    Args:
        limit: at least 1. The default lets 85 copies of a six-token line pass.
    """

    def __init__(self, limit: int = 512) -> None:
        # [period - 1]: the token that many places ago, and for how many tokens the text has agreed with that distance
        self._before = np.full(_LONGEST, -1, dtype=np.int64)
        self._agreed = np.zeros(_LONGEST, dtype=np.int64)
        period = np.arange(1, _LONGEST + 1)
        self._enough: npt.NDArray[np.int64] = np.maximum(limit, _COPIES * period) - period

    def restart(self) -> None:
        """Forgets what came so far."""
        self._before[:] = -1
        self._agreed[:] = 0

    def feed(self, token: int) -> bool:
        """Whether the text, this token included, ends in a loop. About 10 µs."""
        self._agreed += 1
        self._agreed *= self._before == token
        self._before[1:] = self._before[:-1]
        self._before[0] = token
        return bool((self._agreed >= self._enough).any())
