"""float32 rows -> the bytes of a format."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from pyengine import quant
from pyengine.errors import FormatError, NumericError


def encode(type_name: str, rows: npt.NDArray[np.float32], name: str, first_row: int) -> npt.NDArray[np.uint8]:
    """float32 [n, cols] -> uint8 [n, row bytes], rounding to nearest, ties to even.

    ``name`` and ``first_row`` place errors: ``NumericError`` for NaN and infinity, ``FormatError`` for a value beyond
    F16's 65504.
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
    return quant.quantise(type_name, rows)


def _float16(rows: npt.NDArray[np.float32], name: str, first_row: int) -> npt.NDArray[np.uint8]:
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
