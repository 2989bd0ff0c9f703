"""What will be written: every tensor with its name, shape, type and where its rows come from."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from pyengine import quant

Rows = npt.NDArray[np.float32]
Packed = npt.NDArray[np.uint8]  # [rows, bytes of a row]
Read = Callable[[int, int], Packed]  # (first row, count) -> these rows


@dataclass(frozen=True)
class PlannedTensor:
    """One tensor of the output.

    Attributes:
        name: in GGUF.
        shape: numpy order, rows first.
        type: format name.
        format: of the rows as they are read.
        read: called from several threads at once, in any order.
        row_unit: reads begin and end at multiples of it.
        source: name and dtype in the checkpoint, for the report.
        note: why the type is not the usual one.
        importance: [cols], what the squared error of each column counts.
        copied: the rows are written as they are read.
    """

    name: str
    shape: tuple[int, ...]
    type: str
    format: str
    read: Read
    row_unit: int = 1
    source: str = ""
    note: str = ""
    importance: Rows | None = None
    copied: bool = False

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


def permute_heads(rows: npt.NDArray[Any], head_dim: int) -> npt.NDArray[Any]:
    """Reorders the rows of Q or K, [n * head_dim, ...], from half-split rope to rope on adjacent pairs.

    Within a head, row 2 i + j of the result is row j * head_dim / 2 + i:  0 1 2 3 4 5  ->  0 3 1 4 2 5
    """
    halves = rows.reshape(-1, 2, head_dim // 2, *rows.shape[1:])
    return np.ascontiguousarray(halves.swapaxes(1, 2)).reshape(rows.shape)
