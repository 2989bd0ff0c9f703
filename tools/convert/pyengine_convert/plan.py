"""What will be written: every tensor with its name, shape, type and where its rows come from."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from pyengine import quant

Rows = npt.NDArray[np.float32]
ReadRows = Callable[[int, int], Rows]  # (first row, count) -> float32 [count, cols]
ReadPacked = Callable[[int, int], npt.NDArray[np.uint8]]  # the same rows as they lie in the source


@dataclass(frozen=True)
class PlannedTensor:
    """One tensor of the output.

    Attributes:
        name: in GGUF.
        shape: numpy order, rows first.
        type: format name.
        read_rows: called from several threads at once, in any order.
        row_unit: reads begin and end at multiples of it.
        source: name and dtype in the checkpoint, for the report.
        note: why the type is not the usual one.
        importance: [cols], what the squared error of each column counts.
        read_packed: where the source has the same type: its bytes, to be copied.
    """

    name: str
    shape: tuple[int, ...]
    type: str
    read_rows: ReadRows
    row_unit: int = 1
    source: str = ""
    note: str = ""
    importance: Rows | None = None
    read_packed: ReadPacked | None = None

    @property
    def rows(self) -> int:
        return math.prod(self.shape[:-1])

    @property
    def cols(self) -> int:
        return self.shape[-1]

    @property
    def row_bytes(self) -> int:
        return quant.find(self.type).row_bytes(self.cols)

    @property
    def size(self) -> int:
        """Bytes in the file, without padding."""
        return self.rows * self.row_bytes


def permute_heads(rows: Rows, head_dim: int) -> Rows:
    """Reorders the rows of Q or K, [n * head_dim, cols], from half-split rope to rope on adjacent pairs.

    Within a head, row 2 i + j of the result is row j * head_dim / 2 + i:  0 1 2 3 4 5  ->  0 3 1 4 2 5
    """
    cols = rows.shape[1]
    halves = rows.reshape(-1, 2, head_dim // 2, cols)
    return np.ascontiguousarray(halves.swapaxes(1, 2)).reshape(-1, cols)
