"""float32 rows -> the bytes of a format, and what was lost."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from pyengine import quant
from pyengine.errors import FormatError, InvalidArgument, NumericError

Rows = npt.NDArray[np.float32]
Bytes = npt.NDArray[np.uint8]


@dataclass(frozen=True)
class Loss:
    """Sums over weights: squared error of what the file holds, squares of the weights, how many."""

    error: float = 0.0
    energy: float = 0.0
    weights: int = 0

    def __add__(self, other: Loss) -> Loss:
        return Loss(self.error + other.error, self.energy + other.energy, self.weights + other.weights)

    @property
    def rmse(self) -> float:
        """Root of the mean squared error."""
        return (self.error / self.weights) ** 0.5 if self.weights else 0.0

    @property
    def relative(self) -> float:
        """Of the root mean square of the weights."""
        return (self.error / self.energy) ** 0.5 if self.energy else 0.0


def encode(type_name: str, rows: Rows, name: str, first_row: int, importance: Rows | None = None) -> Bytes:
    """float32 [n, cols] -> uint8 [n, row bytes].

    ``name`` and ``first_row`` place errors: ``NumericError`` for NaN and infinity, ``FormatError`` for a value beyond
    the format's range (F16: 65504).
    """
    finite = np.isfinite(rows)
    if not finite.all():
        row, col = np.argwhere(~finite)[0]
        raise NumericError(
            f"{name}[{first_row + row}, {col}] is {rows[row, col]}: the checkpoint is damaged",
            code="not_finite",
            field=name,
        )
    if type_name == "F32":
        return rows.astype("<f4", copy=False).view(np.uint8)
    if type_name == "F16":
        return _float16(rows, name, first_row)
    if type_name == "BF16":
        bits = rows.view(np.uint32)
        return ((bits + (0x7FFF + ((bits >> 16) & 1))) >> 16).astype("<u2").view(np.uint8)
    try:
        return quant.quantise(type_name, rows, importance=importance)
    except InvalidArgument as error:
        raise FormatError(f"{name}, from row {first_row} on: {error}", code="beyond_range", field=name) from None


def loss(type_name: str, rows: Rows, packed: Bytes) -> Loss:
    """What ``packed`` lost of ``rows``."""
    restored = quant.dequantise(type_name, packed, *rows.shape)
    restored -= rows
    return Loss(_squares(restored), _squares(rows), rows.size)


def _squares(values: Rows) -> float:
    """A row at a time: the sum depends on neither pieces nor threads."""
    return float(np.einsum("ij,ij->i", values, values).sum(dtype=np.float64))


def _float16(rows: Rows, name: str, first_row: int) -> Bytes:
    with np.errstate(over="ignore"):
        half = rows.astype("<f2")
    infinite = np.isinf(half)
    if infinite.any():
        row, col = np.argwhere(infinite)[0]
        raise FormatError(
            f"{name}[{first_row + row}, {col}] is {rows[row, col]:g}, beyond F16's 65504: use --type bf16 or f32",
            code="beyond_f16",
            field=name,
        )
    return half.view(np.uint8)
