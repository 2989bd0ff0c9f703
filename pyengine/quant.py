"""Tensor formats: quantise, dequantise, and the engine's own linear operation on packed weights."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from pyengine import _core
from pyengine.errors import InvalidArgument, UnsupportedError


@dataclass(frozen=True)
class Format:
    """A tensor format: ``block_size`` weights in ``block_bytes`` bytes; a row holds whole blocks."""

    type: int
    name: str
    block_size: int
    block_bytes: int
    can_quantise: bool

    def row_bytes(self, cols: int) -> int:
        """Bytes of a row of ``cols`` weights; ``InvalidArgument`` when they are no whole number of blocks."""
        if cols % self.block_size:
            raise InvalidArgument(
                f"a {self.name} row has {cols} columns; expected a multiple of {self.block_size}", code="bad_shape"
            )
        return cols // self.block_size * self.block_bytes


FORMATS: dict[str, Format] = {f[1]: Format(*f) for f in _core.formats()}
BY_TYPE: dict[int, Format] = {f.type: f for f in FORMATS.values()}


def find(name: str) -> Format:
    """The format of a name, in any case."""
    try:
        return FORMATS[name.upper()]
    except KeyError:
        known = ", ".join(FORMATS)
        raise UnsupportedError(f"unknown tensor format {name!r}; known: {known}", code="unknown_format") from None


def dequantise(type_name: str, data: npt.NDArray[np.uint8] | bytes, rows: int, cols: int) -> npt.NDArray[np.float32]:
    """Packed blocks of ``rows`` x ``cols`` weights -> float32 [rows, cols], exactly."""
    packed = np.frombuffer(data, np.uint8) if isinstance(data, bytes) else np.ascontiguousarray(data).view(np.uint8)
    return _core.dequantise(find(type_name).type, packed.reshape(-1), rows, cols)


def quantise(
    type_name: str, array: npt.ArrayLike, threads: int = 1, importance: npt.ArrayLike | None = None
) -> npt.NDArray[np.uint8]:
    """float32 [rows, cols] -> packed uint8 [rows, row_bytes], with the least squared error.

    Args:
        threads: how many share the rows. The bytes depend on neither that nor the machine.
        importance: [cols], what the squared error of each column counts; None: all alike.

    Errors: ``InvalidArgument``, for NaN and infinity naming the place.
    """
    values = np.ascontiguousarray(array, np.float32)
    if values.ndim != 2:
        raise InvalidArgument(f"the array has {values.ndim} dimensions; expected 2 (rows, cols)", code="bad_shape")
    fmt = find(type_name)
    weights = None if importance is None else np.ascontiguousarray(importance, np.float32)
    if weights is not None and weights.shape != values.shape[1:]:
        raise InvalidArgument(
            f"importance has shape {weights.shape}; expected one value for each of {values.shape[1]} columns",
            code="bad_shape",
        )
    return _core.quantise(fmt.type, values, fmt.row_bytes(values.shape[1]), threads, weights)


def convert(
    source: str,
    data: npt.NDArray[np.uint8],
    type_name: str,
    rows: int,
    cols: int,
    importance: npt.ArrayLike | None = None,
) -> tuple[npt.NDArray[np.uint8], float, float]:
    """Packed rows in one format -> (packed uint8 [rows, row_bytes] in another, squared error, squares of the weights).

    As :func:`quantise` of :func:`dequantise`, on one thread; the sums are over all weights. ``importance``: as there.

    Errors: ``InvalidArgument``, for NaN and infinity naming the place.
    """
    fmt = find(type_name)
    weights = None if importance is None else np.ascontiguousarray(importance, np.float32)
    if weights is not None and weights.shape != (cols,):
        raise InvalidArgument(
            f"importance has shape {weights.shape}; expected one value for each of {cols} columns", code="bad_shape"
        )
    packed = np.ascontiguousarray(data).view(np.uint8).reshape(-1)
    return _core.convert(find(source).type, packed, fmt.type, rows, cols, fmt.row_bytes(cols), weights)


def linear(
    tier: str, type_name: str, weights: npt.NDArray[np.uint8] | bytes, rows: int, cols: int, x: npt.ArrayLike
) -> npt.NDArray[np.float32]:
    """y [tokens, rows] = x [tokens, cols] times packed weights [rows, cols] transposed, with one tier's kernels."""
    packed = np.frombuffer(weights, np.uint8) if isinstance(weights, bytes) else weights
    values = np.ascontiguousarray(x, np.float32)
    if values.ndim != 2 or values.shape[1] != cols:
        raise InvalidArgument(f"x has shape {values.shape}; expected (tokens, {cols})", code="bad_shape")
    packed = np.ascontiguousarray(packed).view(np.uint8).reshape(-1)
    return _core.linear(tier, find(type_name).type, packed, rows, cols, values)


def attend(
    tier: str, kv_type: int, keys: npt.NDArray[np.uint8], values: npt.NDArray[np.uint8], n_keys: int, q: npt.ArrayLike
) -> npt.NDArray[np.float32]:
    """Attention of one token's queries q [heads, head_dim], which share a KV head, with one tier's kernels.

    On one thread. ``keys``, ``values``: packed rows [n_keys] of tensor type ``kv_type`` (1 F16, 0 F32, 8 Q8_0). Scores
    are divided by sqrt(head_dim), a multiple of 32. Returns float32 [heads, head_dim].
    """
    queries = np.ascontiguousarray(q, np.float32)
    if queries.ndim != 2:
        raise InvalidArgument(f"q has {queries.ndim} dimensions; expected 2 (heads, head_dim)", code="bad_shape")
    return _core.attend(tier, kv_type, keys, values, n_keys, queries)


def tiers() -> list[str]:
    """Instruction-set tiers this machine can run, from "scalar" upwards."""
    return _core.tiers()


def tier_active() -> str:
    """The tier in use (``PYENGINE_ISA`` forces one)."""
    return _core.tier_active()
