"""Rows as they are read -> the bytes of a format, and what was lost."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from pyengine import quant
from pyengine.errors import EngineError, FormatError, InvalidArgument, NumericError
from pyengine_convert.plan import Packed, PlannedTensor, Rows


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


def encode(tensor: PlannedTensor, rows: Packed, first_row: int) -> tuple[Packed, Loss]:
    """Rows of a tensor as they were read, from ``first_row`` on -> its format, and what was lost.

    Errors: ``NumericError`` for NaN and infinity, ``FormatError`` for a value beyond the format's range (F16: 65504).
    """
    count = len(rows)
    try:
        data, *lost = quant.convert(tensor.format, rows, tensor.type, count, tensor.cols, tensor.importance)
    except InvalidArgument as error:
        values = quant.dequantise(tensor.format, rows, count, tensor.cols)
        raise _explained(error, values, tensor, first_row) from None
    return data, Loss(*lost, count * tensor.cols)


def _explained(error: InvalidArgument, values: Rows, tensor: PlannedTensor, first_row: int) -> EngineError:
    """Which value of ``values`` the format cannot store."""
    name = tensor.name
    if (place := _first(~np.isfinite(values))) is not None:
        row, col = place
        return NumericError(
            f"{name}[{first_row + row}, {col}] is {values[row, col]}: the checkpoint is damaged",
            code="not_finite",
            field=name,
        )
    if tensor.type == "F16" and (place := _first(np.abs(values) >= 65520)) is not None:  # rounds to infinity
        row, col = place
        return FormatError(
            f"{name}[{first_row + row}, {col}] is {values[row, col]:g}, beyond F16's 65504: use --type bf16 or f32",
            code="beyond_f16",
            field=name,
        )
    return FormatError(f"{name}, from row {first_row} on: {error}", code="beyond_range", field=name)


def _first(bad: npt.NDArray[np.bool_]) -> tuple[int, int] | None:
    places = np.argwhere(bad)
    return (int(places[0][0]), int(places[0][1])) if len(places) else None
