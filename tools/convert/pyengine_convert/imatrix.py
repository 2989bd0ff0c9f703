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
from pyengine.imatrix import ImportanceMatrix

Importance = Mapping[str, npt.NDArray[np.float32]]


def read_imatrix(path: Path) -> Importance:
    """Tensor name -> mean square of each column's activations; tensors that saw none are left out.

    Errors: ``FileError``, ``FormatError``.
    """
    found = {}
    for name, entry in ImportanceMatrix.read(path).entries.items():
        if entry.counts.size != 1:
            raise FormatError(f"{path}: {name} has one row for each expert, which is not supported", code="bad_imatrix")
        if entry.counts.item():
            found[name] = (entry.squares.reshape(-1) / entry.counts.item()).astype(np.float32)
    if not found:
        raise FormatError(f"{path} holds sums, but none with counts", code="no_imatrix")
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
