"""Importance matrices: for each tensor, what the squared error of every column counts.

A GGUF file of ``general.type`` "imatrix" holds, for a tensor NAME, NAME.in_sum2 (sums of squared activations of each
column) and NAME.counts (how many were added): the form llama.cpp and ``pyengine-imatrix`` write.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import numpy.typing as npt

from pyengine.errors import FormatError
from pyengine.gguf_file import GgufFile

Importance = Mapping[str, npt.NDArray[np.float32]]
_SUMS, _COUNTS = ".in_sum2", ".counts"


def read_imatrix(path: Path) -> Importance:
    """Tensor name -> mean square of each column's activations; tensors that saw none are left out.

    Errors: ``FileError``, ``FormatError``.
    """
    with GgufFile.open(path) as file:
        if file.metadata.get("general.type") != "imatrix":
            raise FormatError(f'{path} is no importance matrix: its general.type is not "imatrix"', code="no_imatrix")
        found = {}
        for name in file.tensors:
            if name.endswith(_SUMS):
                tensor = name.removesuffix(_SUMS)
                mean = _mean(file, path, tensor)
                if mean is not None:
                    found[tensor] = mean
    if not found:
        raise FormatError(f"{path} holds no tensor NAME{_SUMS} with counts", code="no_imatrix")
    return found


def importance_of(importance: Importance, name: str, shape: tuple[int, ...]) -> npt.NDArray[np.float32] | None:
    """A tensor's importance, None where there is none. Errors: ``FormatError`` when it is of another width."""
    weights = importance.get(name)
    if weights is not None and weights.shape != shape[-1:]:
        raise FormatError(
            f"the importance matrix has {weights.size} columns for {name}, which has {shape[-1]}",
            code="bad_imatrix",
            field=name,
        )
    return weights


def _mean(file: GgufFile, path: Path, tensor: str) -> npt.NDArray[np.float32] | None:
    if tensor + _COUNTS not in file.tensors:
        raise FormatError(f"{path} has {tensor}{_SUMS} without {tensor}{_COUNTS}", code="no_imatrix", field=tensor)
    sums, counts = file.dequantise(tensor + _SUMS), file.dequantise(tensor + _COUNTS)
    if sums.shape[0] != 1 or counts.size != 1:
        raise FormatError(f"{path}: {tensor} has one row for each expert, which is not supported", code="no_imatrix")
    if counts[0, 0] == 0:
        return None
    mean = sums[0] / counts[0, 0]
    if not (np.isfinite(mean).all() and (mean >= 0).all()):
        raise FormatError(f"{path}: {tensor} has sums that are NaN, infinite or negative", code="bad_imatrix")
    return mean
