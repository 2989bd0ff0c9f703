"""A folder of safetensors files, read a few rows at a time.

The format (huggingface/safetensors): uint64 length N, N bytes of JSON {name: {dtype, shape, data_offsets}}, then the
data, without holes. The header is checked completely before any tensor is read. Data is read with ordinary reads into
private buffers, not through a mapping: a file that shrinks meanwhile is an error, never a SIGBUS, and the memory in use
is that of the rows in flight.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeGuard

import numpy as np
import numpy.typing as npt

from pyengine import quant
from pyengine.errors import FileError, FormatError, UnsupportedError
from pyengine.json_fields import parse
from pyengine_convert.source import read_json

ITEM_BYTES: Mapping[str, int] = {"F32": 4, "F16": 2, "BF16": 2}  # what can be converted
_ALL_ITEM_BYTES: Mapping[str, int] = {
    **ITEM_BYTES,
    **{"F64": 8, "I64": 8, "U64": 8, "I32": 4, "U32": 4, "I16": 2, "U16": 2, "I8": 1, "U8": 1, "BOOL": 1},
    **{"F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1},
}
_MAX_HEADER = 16 << 20  # bytes: over 100,000 tensors a file; parsed it takes some ten times as much memory


@dataclass(frozen=True)
class SourceTensor:
    """One tensor of a checkpoint: ``shape`` in numpy order, data at ``offset`` of ``path``."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    path: Path
    offset: int

    @property
    def rows(self) -> int:
        return math.prod(self.shape[:-1])

    @property
    def cols(self) -> int:
        return self.shape[-1]

    def read(self, start: int, count: int) -> npt.NDArray[np.uint8]:
        """Rows [start, start + count) as they are, [count, bytes of a row]. Safe to call from several threads."""
        row = self.cols * ITEM_BYTES[self.dtype]
        where = self.offset + start * row
        raw = np.empty((count, row), np.uint8)
        view, done = raw.reshape(-1).data, 0
        try:
            with open(self.path, "rb", buffering=0) as file:
                file.seek(where)
                while done < raw.size:
                    got = file.readinto(view[done:])
                    if not got:
                        raise FormatError(
                            f"{self.path} ends inside {self.name}: it changed while it was read",
                            code="truncated",
                            offset=where + done,
                        )
                    done += got
        except OSError as error:
            raise FileError(f"cannot read {self.path}: {error.strerror}", code="cannot_read") from error
        return raw

    def read_rows(self, start: int, count: int) -> npt.NDArray[np.float32]:
        """The same as float32 [count, cols], exactly."""
        return quant.dequantise(self.dtype, self.read(start, count), count, self.cols)


def open_checkpoint(folder: Path) -> dict[str, SourceTensor]:
    """All tensors of a folder, by name. Errors: ``FileError``, ``FormatError``, ``UnsupportedError``."""
    index, single = folder / "model.safetensors.index.json", folder / "model.safetensors"
    if index.exists():
        return _open_sharded(folder, index)
    if single.exists():
        return read_header(single)
    found = sorted(p.name for p in folder.iterdir() if p.suffix in {".safetensors", ".bin", ".pt", ".pth", ".gguf"})
    other = f"; found {', '.join(found[:8])}" if found else ""
    pickled = any(name.endswith((".bin", ".pt", ".pth")) for name in found)
    hint = ". Pickled weights (.bin, .pt, .pth) are not read: they can run code" if pickled else ""
    raise FileError(
        f"{folder} has neither model.safetensors nor model.safetensors.index.json{other}{hint}", code="no_weights"
    )


def _open_sharded(folder: Path, index: Path) -> dict[str, SourceTensor]:
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(v, str) for v in weight_map.values()):
        raise FormatError(f'{index}: expected "weight_map", an object of tensor name: file name', code="bad_index")
    tensors: dict[str, SourceTensor] = {}
    for shard in sorted(set(weight_map.values())):
        if Path(shard).name != shard or shard in {"", ".", ".."}:
            raise FormatError(f"{index} names {shard!r}; expected a file in the same folder", code="bad_index")
        if not (folder / shard).exists():
            raise FileError(f"{index.name} names {shard}, which is missing: download it again", code="missing_shard")
        for name, tensor in read_header(folder / shard).items():
            if weight_map.get(name, shard) != shard:
                raise FormatError(f"{name} is in {shard}; {index.name} says {weight_map[name]}", code="bad_index")
            if name in tensors:
                raise FormatError(f"{name} is in both {tensors[name].path.name} and {shard}", code="duplicate_tensor")
            tensors[name] = tensor
    if missing := sorted(set(weight_map) - set(tensors)):
        raise FormatError(
            f"{index.name} says {weight_map[missing[0]]} has {missing[0]}, but it has not"
            + (f" (and {len(missing) - 1} more)" if len(missing) > 1 else ""),
            code="missing_tensor",
            field=missing[0],
        )
    return tensors


def read_header(path: Path) -> dict[str, SourceTensor]:
    """The checked tensor table of one safetensors file. Errors: as :func:`open_checkpoint`."""
    if path.exists() and not path.is_file():  # a pipe would be waited for
        raise FileError(f"{path} is no regular file", code="not_regular_file")
    try:
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            head = file.read(8)
            length = int.from_bytes(head, "little")
            _check_start(path, head, size, length)
            text = file.read(length)
    except OSError as error:
        raise FileError(f"cannot read {path}: {error.strerror}", code="cannot_read") from error
    try:
        header = parse(text)  # no name twice: two readers would see two files
    except ValueError as error:
        raise FormatError(f"{path}: the header is not valid JSON ({error})", code="bad_header", offset=8) from None
    if not isinstance(header, dict):
        raise FormatError(f"{path}: the header is not a JSON object", code="bad_header", offset=8)
    header.pop("__metadata__", None)
    spans = [(*_entry(path, name, entry), name) for name, entry in header.items()]
    data_size, end = size - 8 - length, 0
    for start, stop, _dtype, _shape, name in sorted(spans, key=lambda span: span[:2]):
        if start != end:
            raise FormatError(f"{path}: {name} begins at {start}; expected {end}", code="bad_header", field=name)
        end = stop
    if end != data_size:
        what = (
            f"the file ends {end - data_size} bytes early: download it again"
            if end > data_size
            else "bytes are left over"
        )
        raise FormatError(f"{path}: tensors take {end} bytes, the file has {data_size}; {what}", code="truncated")
    return {
        name: SourceTensor(name, dtype, shape, path, 8 + length + start) for start, _stop, dtype, shape, name in spans
    }


def _check_start(path: Path, head: bytes, size: int, length: int) -> None:
    if head.startswith(b"version "):
        raise FormatError(f"{path} is a Git LFS pointer, not the weights: run `git lfs pull`", code="lfs_pointer")
    if head[:1] == b"<":
        raise FormatError(f"{path} is a web page, not the weights: download it again", code="web_page")
    if len(head) < 8 or length > size - 8:
        raise FormatError(
            f"{path} is no safetensors file, or it is cut short ({size} bytes)", code="bad_header", offset=0
        )
    if length > _MAX_HEADER:
        raise FormatError(
            f"{path} has a header of {length} bytes; expected at most {_MAX_HEADER}", code="bad_header", offset=0
        )


def _entry(path: Path, name: str, entry: Any) -> tuple[int, int, str, tuple[int, ...]]:
    """Checks one entry: (start, stop, dtype, shape)."""
    fields: dict[str, Any] = entry if isinstance(entry, dict) else {}
    dtype, shape, span = (fields.get(key) for key in ("dtype", "shape", "data_offsets"))
    if not isinstance(dtype, str) or not _sizes(shape, 8) or not _sizes(span, 2) or len(span) != 2:
        raise FormatError(
            f"{path}: the entry of {name} is damaged; expected dtype, shape and data_offsets",
            code="bad_header",
            field=name,
        )
    if dtype not in _ALL_ITEM_BYTES:
        raise UnsupportedError(
            f"{path}: {name} has dtype {dtype}; expected F32, F16 or BF16", code="unsupported_dtype", field=name
        )
    expected = math.prod(shape) * _ALL_ITEM_BYTES[dtype]
    if span[1] - span[0] != expected:
        raise FormatError(
            f"{path}: {name} ({dtype} {shape}) has {span[1] - span[0]} bytes; expected {expected}",
            code="bad_header",
            field=name,
        )
    return span[0], span[1], dtype, tuple(shape)


def _sizes(value: Any, at_most: int) -> TypeGuard[list[int]]:
    """A list of at most so many non-negative integers."""
    return (
        isinstance(value, list)
        and len(value) <= at_most
        and all(isinstance(n, int) and not isinstance(n, bool) and 0 <= n < 2**48 for n in value)
    )
