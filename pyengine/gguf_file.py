"""GGUF files as the engine's own reader sees them: checked metadata, tensor table, packed tensor data."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal, Self

import numpy as np
import numpy.typing as npt

from pyengine import _core, quant
from pyengine.errors import InvalidArgument

Load = Literal["mmap", "copy", "header"]
LOADS: dict[Load, int] = {"mmap": 0, "copy": 1, "header": 2}  # pe_load


def load_mode(load: Load) -> int:
    """The ``pe_load`` of a name."""
    if load not in LOADS:
        raise InvalidArgument(f"load is {load!r}; expected one of {', '.join(map(repr, LOADS))}", code="bad_load")
    return LOADS[load]


class Metadata(Mapping[str, Any]):
    """The metadata of a file: numbers, bools and strings as Python's, arrays of numbers as numpy arrays, arrays of
    strings as ``list[str]``. Values are converted when first asked for."""

    def __init__(self, file: _core.File) -> None:
        self._file = file
        self._keys = dict.fromkeys(file.keys())
        self._values: dict[str, Any] = {}

    def __getitem__(self, key: str) -> Any:
        if key not in self._keys:
            raise KeyError(key)
        if key not in self._values:
            self._values[key] = self._file.value(key)
        return self._values[key]

    def value_type(self, key: str) -> tuple[int, int]:
        """The GGUF type ids of a value and, for an array, of its elements (otherwise the same twice)."""
        if key not in self._keys:
            raise KeyError(key)
        return self._file.value_type(key)

    def __iter__(self) -> Iterator[str]:
        return iter(self._keys)

    def __len__(self) -> int:
        return len(self._keys)


@dataclass(frozen=True)
class TensorInfo:
    """One tensor of a file.

    Attributes:
        name: the tensor's name.
        type: GGUF type id; ``type_name`` its name ("Q4_K"), or ``"type 99"`` when this build does not run it.
        dims: lengths, fastest-moving first (``dims[0]`` is a row), as GGUF counts.
        offset: of the data, in bytes from the start of its file; ``part`` says which file of a split model.
        size: bytes.
    """

    name: str
    type: int
    dims: tuple[int, ...]
    offset: int
    size: int
    part: int

    @property
    def type_name(self) -> str:
        known = quant.BY_TYPE.get(self.type)
        return known.name if known else f"type {self.type}"

    @property
    def rows(self) -> int:
        """All dimensions but the first, multiplied."""
        return int(np.prod(self.dims[1:], dtype=np.int64))

    @property
    def cols(self) -> int:
        return self.dims[0]


class GgufFile:
    """A checked GGUF file (v2, v3, all parts of a split model).

    Errors: ``FileError``, ``FormatError`` (malformed: code, offset, field), ``UnsupportedError``, ``OutOfMemory``.
    """

    def __init__(self, core: _core.File) -> None:
        self._core = core
        self.metadata = Metadata(core)
        self.tensors: dict[str, TensorInfo] = {t[0]: TensorInfo(*t) for t in core.tensors()}

    @classmethod
    def open(cls, path: str | os.PathLike[str], load: Load = "mmap") -> Self:
        """Opens ``path``; ``load`` is ``"mmap"``, ``"copy"`` (private memory) or ``"header"`` (no tensor data)."""
        return cls(_core.File.open(fs_path(path), load_mode(load)))

    @property
    def version(self) -> int:
        """GGUF version, 2 or 3."""
        return self._core.version()

    def data(self, name: str) -> npt.NDArray[np.uint8]:
        """The packed bytes of a tensor, uint8 [size], read-only, valid as long as the array lives."""
        array = self._core.data(name)
        if array is None:
            raise InvalidArgument("the file was opened with load='header': it has no tensor data", code="no_data")
        return array

    def dequantise(self, name: str) -> npt.NDArray[np.float32]:
        """A tensor as float32 [rows, cols]. ``FileError`` as from :meth:`check_unchanged`."""
        data = self.data(name)
        tensor = self.tensors[name]
        values = quant.dequantise(tensor.type_name, data, tensor.rows, tensor.cols)
        self.check_unchanged()
        return values

    def check_unchanged(self) -> None:
        """``FileError`` (code ``file_changed``) when a guarded file is no longer what was opened.

        To be called after reading arrays of :meth:`data`, which are zeros then. See :func:`guard_mapped_files`.
        """
        self._core.check_unchanged()

    def close(self) -> None:
        self._core.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def guard_mapped_files() -> None:
    """Guards the files that are mapped from now on against what others do to them meanwhile.

    A model file that is cut or overwritten while it is in use is ``FileError`` (code ``file_changed``) from then on,
    instead of the end of the process by SIGBUS, or garbage. Installs a handler for SIGBUS, once and for the life of the
    process; other faults go on to the handler there was. The commands do this; programs that embed the engine decide.
    """
    _core.guard_mapped_files()


def fs_path(path: str | os.PathLike[str]) -> str:
    """A path as the UTF-8 string the core expects; names that are no UTF-8 are refused by name."""
    text = os.fspath(path)
    if not isinstance(text, str):
        raise InvalidArgument(f"the path is {type(text).__name__}; expected str or os.PathLike[str]", code="bad_path")
    if "\0" in text:
        raise InvalidArgument("the path contains a NUL character", code="bad_path")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        raise InvalidArgument(f"the path {text!r} is not valid UTF-8", code="bad_path") from None
    return text
