"""Reads GGUF with the format's own package: the oracle beside our reader."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from gguf import GGUFReader
from gguf.quants import dequantize


class Readback:
    """Metadata and tensors of a file, copied out so that nothing stays mapped."""

    def __init__(self, path: Path) -> None:
        reader = GGUFReader(path)
        self.metadata: dict[str, Any] = {
            name: field.contents() for name, field in reader.fields.items() if not name.startswith("GGUF.")
        }
        self.types = {t.name: t.tensor_type.name for t in reader.tensors}
        self.shapes = {t.name: tuple(int(n) for n in t.shape[::-1]) for t in reader.tensors}
        self.bytes: dict[str, bytes] = {t.name: t.data.tobytes() for t in reader.tensors}
        self.values: dict[str, npt.NDArray[np.float32]] = {
            t.name: dequantize(t.data, t.tensor_type).astype(np.float32).reshape(self.shapes[t.name])
            for t in reader.tensors
        }
