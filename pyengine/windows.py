"""A text cut into windows of equal length, each evaluated on its own: what perplexity and importance matrices use."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from pyengine.errors import InvalidArgument

if TYPE_CHECKING:
    from pyengine.model import Session
    from pyengine.tokenizer import Tokenizer

Ids = npt.NDArray[np.int32]
Floats = npt.NDArray[np.float32]

LEAST_CONTEXT = 8  # tokens of a window that has something to score


def scored_rows(n_ctx: int) -> int:
    """Positions of a window that perplexity scores: the second half, without the last, whose next token is unknown."""
    return n_ctx - 1 - n_ctx // 2


def text_windows(tokenizer: Tokenizer, text: str, n_ctx: int, limit: int | None = None) -> Ids:
    """Ids int32 [windows, n_ctx] of consecutive windows, at most ``limit``; what is left at the end is not used.

    Where the file asks for a beginning-of-sequence token it begins the text, and takes the place of the first token of
    every window: the definition of llama.cpp's tools, so that figures compare.

    Errors: ``InvalidArgument`` when the text is shorter than a window.
    """
    head = [tokenizer.bos_id] if tokenizer.add_bos and tokenizer.bos_id is not None else []
    ids = np.array(head + tokenizer.encode(text, add_special=False), dtype=np.int32)
    count = len(ids) // n_ctx
    if count == 0:
        raise InvalidArgument(
            f"the text has {len(ids)} tokens; expected at least {n_ctx}, one window", code="text_too_short"
        )
    windows = ids[: min(count, limit or count) * n_ctx].reshape(-1, n_ctx)
    if head:
        windows[:, 0] = head[0]
    return windows


class RowBuffer:
    """Logits of many positions, some rows at a time: as many as ``limit`` bytes hold, but 16 at least."""

    def __init__(self, n_vocab: int, limit: int = 64 << 20) -> None:
        self.rows = min(max(limit // (4 * n_vocab), 16), 256)
        self._memory = np.empty((self.rows, n_vocab), dtype=np.float32)

    def eval(self, session: Session, ids: Ids) -> Iterator[Floats]:
        """All rows of ``ids``, evaluated after what the session holds; each array is overwritten by the next."""
        for at in range(0, len(ids), self.rows):
            yield session.eval(ids[at : at + self.rows], all_logits=True, out=self._memory)
