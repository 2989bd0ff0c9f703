"""A GGUF reader in a few lines that trusts its file: the oracle for files too large for the gguf package's reader."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

from tests.gguf.builder import ARRAY, BOOL, SCALARS, STRING


class Plain:
    def __init__(self, path: Path) -> None:
        self._raw = path.read_bytes()
        self._at = 4
        (self.version,) = self._take("I")
        n_tensors, n_keys = self._take("QQ")
        self.metadata: dict[str, Any] = {}
        for _ in range(n_keys):
            key = self._text()
            (kind,) = self._take("I")
            self.metadata[key] = self._value(kind)
        self.tensors: list[tuple[str, tuple[int, ...], int, int]] = []  # name, dims, type, offset within the data
        for _ in range(n_tensors):
            name = self._text()
            (n_dims,) = self._take("I")
            dims = self._take(f"{n_dims}Q")
            self.tensors.append((name, dims, *self._take("IQ")))

    def _take(self, layout: str) -> tuple[Any, ...]:
        out = struct.unpack_from("<" + layout, self._raw, self._at)
        self._at += struct.calcsize("<" + layout)
        return out

    def _text(self) -> str:
        (length,) = self._take("Q")
        self._at += length
        return self._raw[self._at - length : self._at].decode("utf-8")

    def _value(self, kind: int) -> Any:
        if kind == STRING:
            return self._text()
        if kind == ARRAY:
            element, count = self._take("IQ")
            if element == STRING:
                return [self._text() for _ in range(count)]
            return list(self._take(f"{count}{SCALARS[element]}"))
        (scalar,) = self._take(SCALARS[kind])
        return bool(scalar) if kind == BOOL else scalar
