"""Importance matrices: how strongly each column of a model's matrices is used, for quantisers that weigh errors by it.

The file is the GGUF form that llama.cpp reads and writes (docs/quality.md).
"""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO, Self

import numpy as np
import numpy.typing as npt

from pyengine.errors import FormatError, InvalidArgument, NumericError
from pyengine.files import replacing
from pyengine.gguf_file import GgufFile
from pyengine.memory import NUMPY_BYTES, need_memory
from pyengine.model import Session
from pyengine.windows import Ids, RowBuffer

Doubles = npt.NDArray[np.float64]

_SUMS, _COUNTS = ".in_sum2", ".counts"
_ALIGNMENT = 32  # GGUF's default
_U32, _STRING, _ARRAY, _F32 = 4, 8, 9, 0  # GGUF's ids: three types of values, one of tensors


@dataclass
class Entry:
    """One tensor of the model: a matrix, or the matrices of several experts.

    Attributes:
        squares: float64 [matrices, cols], the sum of x[col]² over the inputs x of each.
        counts: float64 [matrices], how many inputs those were.
    """

    squares: Doubles
    counts: Doubles


@dataclass
class ImportanceMatrix:
    """Entries by tensor name, the texts they come from, and the tokens of a window."""

    chunk_size: int
    datasets: list[str] = field(default_factory=list)
    entries: dict[str, Entry] = field(default_factory=dict)

    @property
    def chunk_count(self) -> int:
        """Windows, counted as llama.cpp does: by the entry that saw most."""
        return int(max((entry.counts.max() for entry in self.entries.values()), default=0)) // self.chunk_size

    def add(self, name: str, entry: Entry) -> None:
        """Adds sums and counts to what there is. ``InvalidArgument`` when the shapes differ."""
        mine = self.entries.setdefault(name, Entry(np.zeros_like(entry.squares), np.zeros_like(entry.counts)))
        if mine.squares.shape != entry.squares.shape:
            raise InvalidArgument(
                f"{name} has {_shape(entry.squares)} here and {_shape(mine.squares)} before: these are of different "
                "models",
                code="other_model",
                field=name,
            )
        mine.squares += entry.squares
        mine.counts += entry.counts

    def merge(self, other: ImportanceMatrix) -> None:
        """Adds another one's entries; tensors that only one of them has are kept."""
        for name, entry in other.entries.items():
            self.add(name, entry)
        self.datasets += other.datasets

    def write(self, path: Path) -> None:
        """Writes the file whole or not at all, the same bytes for the same sums. ``FileError``."""
        with replacing(path) as file:
            _write(file, self)

    @classmethod
    def read(cls, path: str | os.PathLike[str]) -> Self:
        """Reads a file of ours or of llama.cpp's (GGUF, not its older ``.dat``).

        Errors: ``FileError``; ``FormatError`` when it is no importance matrix, or a damaged one.
        """
        try:
            file = GgufFile.open(path, load="copy")
        except FormatError as error:
            if error.code != "bad_magic":
                raise
            raise FormatError(
                f"{path} is no GGUF file: {error.message}. An old importance matrix (.dat) is rewritten by llama.cpp's "
                f"llama-imatrix --in-file {path} -o NEW.gguf",
                code="not_imatrix",
            ) from error
        with file:
            return cls._from(file, path)

    @classmethod
    def _from(cls, file: GgufFile, path: str | os.PathLike[str]) -> Self:
        kind = file.metadata.get("general.type")
        if kind != "imatrix":
            raise FormatError(
                f"{path} has general.type {kind!r}; expected 'imatrix'", code="not_imatrix", field="general.type"
            )
        size, datasets = file.metadata.get("imatrix.chunk_size"), file.metadata.get("imatrix.datasets")
        if not isinstance(size, int) or size < 1:
            raise FormatError(
                f"{path} has imatrix.chunk_size {size!r}; expected a whole number above 0",
                code="bad_value",
                field="imatrix.chunk_size",
            )
        if not isinstance(datasets, list) or not all(isinstance(text, str) for text in datasets):
            raise FormatError(
                f"{path} has imatrix.datasets {datasets!r}; expected strings",
                code="bad_value",
                field="imatrix.datasets",
            )
        matrix = cls(size, datasets)
        names = {name.removesuffix(end) for name in file.tensors for end in (_SUMS, _COUNTS) if name.endswith(end)}
        for name in sorted(names):
            matrix.entries[name] = _entry(file, path, name)
        if not names:
            raise FormatError(f"{path} holds no sums: no tensor ends in {_SUMS}", code="not_imatrix")
        return matrix


def collect(session: Session, windows: Ids, *, output: bool = False) -> Iterator[dict[str, Entry]]:
    """The entries of each window of windows int32 [count, n_ctx], evaluated from an empty session.

    ``output``: of the matrix of the logits, too; its logits are computed for that, which takes longer.
    Errors: ``NumericError`` when an activation overflows.
    """
    buffer = RowBuffer(session.model.n_vocab) if output else None
    for ids in windows:
        session.truncate(0)
        need_memory(NUMPY_BYTES, "numpy")
        session.observe()
        if buffer is None:
            session.prefill(ids)
        else:
            for _ in buffer.eval(session, ids):
                pass
        entries = {}
        for name, sums in session.inputs.items():
            if sums.tokens == 0:
                continue
            if not np.isfinite(sums.squares).all():
                raise NumericError(f"the input of {name} contains NaN or infinity", code="not_finite", field=name)
            entries[name] = Entry(sums.squares[None], np.array([float(sums.tokens)]))
        yield entries


def _entry(file: GgufFile, path: str | os.PathLike[str], name: str) -> Entry:
    arrays = []
    for tensor in (name + _SUMS, name + _COUNTS):
        info = file.tensors.get(tensor)
        if info is None:
            raise FormatError(f"{path} has no tensor {tensor}, which {name} needs", code="missing_tensor", field=tensor)
        if info.type != _F32:
            raise FormatError(f"{path}: {tensor} is {info.type_name}; expected F32", code="wrong_type", field=tensor)
        arrays.append(file.data(tensor).view("<f4").astype(np.float64).reshape(info.rows, info.cols))
    squares, counts = arrays[0], arrays[1].reshape(-1)
    if len(counts) != len(squares):
        raise FormatError(
            f"{path}: {name} has {len(squares)} rows of sums and {len(counts)} counts; expected as many",
            code="wrong_shape",
            field=name,
        )
    if not (np.isfinite(squares).all() and (squares >= 0).all() and np.isfinite(counts).all() and (counts >= 0).all()):
        raise FormatError(f"{path}: {name} holds a negative or no finite number", code="bad_value", field=name)
    return Entry(squares, counts)


def _shape(squares: Doubles) -> str:
    rows, cols = squares.shape
    return f"{cols} columns" if rows == 1 else f"{rows} x {cols} columns"


# ---- the file ----


def _write(file: BinaryIO, matrix: ImportanceMatrix) -> None:
    tensors: dict[str, npt.NDArray[np.float32]] = {}
    for name, entry in sorted(matrix.entries.items()):
        tensors[name + _SUMS] = entry.squares.astype("<f4")
        tensors[name + _COUNTS] = entry.counts.astype("<f4")[:, None]
    keys = {
        "general.type": _string_value("imatrix"),
        "imatrix.datasets": _strings_value(matrix.datasets),
        "imatrix.chunk_count": struct.pack("<II", _U32, matrix.chunk_count),
        "imatrix.chunk_size": struct.pack("<II", _U32, matrix.chunk_size),
    }
    header = struct.pack("<4sIQQ", b"GGUF", 3, len(tensors), len(keys))
    header += b"".join(_string(key) + value for key, value in keys.items())
    header += _table(tensors)
    file.write(header + bytes(-len(header) % _ALIGNMENT))
    for array in tensors.values():
        file.write(array.data)
        file.write(bytes(-array.nbytes % _ALIGNMENT))


def _table(tensors: Mapping[str, npt.NDArray[np.float32]]) -> bytes:
    table, offset = b"", 0
    for name, array in tensors.items():
        table += _string(name) + struct.pack("<IQQIQ", 2, array.shape[1], array.shape[0], _F32, offset)
        offset += array.nbytes + -array.nbytes % _ALIGNMENT
    return table


def _string(text: str) -> bytes:
    data = text.encode("utf-8")
    return struct.pack("<Q", len(data)) + data


def _string_value(text: str) -> bytes:
    return struct.pack("<I", _STRING) + _string(text)


def _strings_value(texts: Sequence[str]) -> bytes:
    return struct.pack("<IIQ", _ARRAY, _STRING, len(texts)) + b"".join(map(_string, texts))
