"""Planned tensors -> a GGUF file under its final name, complete and verified, or nothing.

The file grows under a temporary name in the same folder, is synced, opened with the engine's own reader and compared
with what was meant, and only then renamed. The temporary name is fixed and locked, so that two conversions to the same
output cannot meet, and what a killed one left behind is replaced by the next.

A pool of threads reads and encodes pieces of a few MiB; this thread writes them in order. Memory in use: about
(threads + 2) pieces, whatever the size of the model.
"""

from __future__ import annotations

import os
import shutil
import zlib
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

import numpy as np
import numpy.typing as npt
from gguf import GGMLQuantizationType, GGUFWriter

from pyengine import quant
from pyengine.errors import FileError, InternalError, InvalidArgument
from pyengine.gguf_file import GgufFile
from pyengine.model import Model
from pyengine_convert.encode import encode
from pyengine_convert.keyvalues import KeyValues
from pyengine_convert.plan import PlannedTensor

try:
    import fcntl
except ImportError:  # Windows: an open file cannot be replaced there, which serves as the lock
    fcntl = None  # type: ignore[assignment]

_ALIGNMENT = 32  # bytes; the format's default
_PIECE = 1 << 20  # weights read and encoded at a time: 4 MiB of float32
_HEADER_RESERVE = 64 << 20  # bytes kept free for metadata when space is checked

Progress = Callable[[int], None]  # called with the bytes just written


def write(
    out: Path,
    keys: KeyValues,
    tensors: Sequence[PlannedTensor],
    *,
    threads: int = 1,
    force: bool = False,
    progress: Progress | None = None,
) -> int:
    """Writes ``out`` and returns its size in bytes. An existing file is replaced only with ``force``.

    Errors: ``FileError`` (exists, no space, the system refused), whatever reading the tensors raises, and
    ``InternalError`` when the file does not read back as meant. After any of them, and after KeyboardInterrupt, no
    file of ours is left under either name.
    """
    if threads < 1:
        raise InvalidArgument(f"threads is {threads}; expected at least 1", code="bad_threads")
    _check_target(out, force)
    _check_space(out, sum(t.size + _ALIGNMENT for t in tensors))
    with _temporary(out) as part:
        try:
            data_start = _write_header(part, keys, tensors)
            checks = _write_data(part, data_start, tensors, threads, progress or (lambda _: None))
            size = part.stat().st_size
            verify(part, keys, tensors, checks)
            _check_target(out, force)
            os.replace(part, out)
            _sync_folder(out.parent)
        except OSError as error:
            if isinstance(error, FileError):
                raise
            raise FileError(f"cannot write {out}: {error.strerror or error}", code="cannot_write") from error
    return size


def _check_target(out: Path, force: bool) -> None:
    if out.is_dir():
        raise FileError(f"{out} is a directory; expected a file name", code="is_directory")
    if not out.parent.is_dir():
        raise FileError(f"{out.parent} is no directory", code="no_directory")
    if out.exists() and not force:
        raise FileError(f"{out} exists already; --force replaces it", code="exists")


def _check_space(out: Path, data: int) -> None:
    free = shutil.disk_usage(out.parent).free
    if data + _HEADER_RESERVE > free:
        raise FileError(
            f"{out.parent} has {free / 1e9:.2f} GB free; the file needs {(data + _HEADER_RESERVE) / 1e9:.2f} GB",
            code="no_space",
        )


def part_name(out: Path) -> Path:
    """The name a file has until it is complete."""
    return out.with_name(f".{out.name}.part")


@contextmanager
def _temporary(out: Path) -> Iterator[Path]:
    """Creates and locks the temporary file; removes it unless it has been renamed."""
    part = part_name(out)
    try:
        lock = os.open(part, os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0), 0o666)
    except OSError as error:
        raise FileError(f"cannot write {part}: {error.strerror}", code="cannot_write") from error
    owned = False
    try:
        if fcntl is not None:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                raise FileError(f"another conversion is writing {out}", code="busy") from None
            # The former owner may have renamed the file between our open and our lock.
            if not part.exists() or not os.path.samestat(os.fstat(lock), part.stat()):
                raise FileError(f"another conversion has just written {out}", code="busy")
        owned = True
        yield part
    finally:
        if owned:
            with suppress(FileNotFoundError):
                part.unlink()
        os.close(lock)


def _write_header(part: Path, keys: KeyValues, tensors: Sequence[PlannedTensor]) -> int:
    """Header, metadata and tensor table by the format's own package; returns where the tensor data begins."""
    writer = GGUFWriter(part, keys["general.architecture"])  # adds general.architecture itself
    for key, value in keys.items():
        if key != "general.architecture":
            writer.add_key_value(key, value.value, value.type, value.element)
    for tensor in tensors:
        kind = GGMLQuantizationType[tensor.type]
        writer.add_tensor_info(tensor.name, tensor.shape, np.dtype(np.float32), tensor.size, raw_dtype=kind)
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
    finally:
        writer.close()
    end = part.stat().st_size
    return -(-end // _ALIGNMENT) * _ALIGNMENT


def _write_data(
    part: Path, data_start: int, tensors: Sequence[PlannedTensor], threads: int, progress: Progress
) -> dict[str, int]:
    """Appends every tensor's bytes, padded; returns the CRC-32 of the first piece of each."""
    checks: dict[str, int] = {}
    with open(part, "r+b", buffering=0) as file:
        file.seek(data_start)
        file.truncate()
        for tensor, start, piece in _pieces(tensors, threads):
            if start == 0:
                _pad(file)
                checks[tensor.name] = zlib.crc32(piece.data)
            _write_all(file, piece)
            progress(piece.nbytes)
        _pad(file)
        os.fsync(file.fileno())
    return checks


def _pieces(
    tensors: Sequence[PlannedTensor], threads: int
) -> Iterator[tuple[PlannedTensor, int, npt.NDArray[np.uint8]]]:
    """Yields (tensor, first row, encoded rows) in file order; ``threads`` pieces are in the making."""

    def make(tensor: PlannedTensor, start: int, count: int) -> npt.NDArray[np.uint8]:
        return encode(tensor.type, tensor.read_rows(start, count), tensor.name, start).reshape(-1)

    pool = ThreadPoolExecutor(threads, thread_name_prefix="convert")
    waiting: deque[tuple[PlannedTensor, int, Future[npt.NDArray[np.uint8]]]] = deque()
    try:
        for tensor in tensors:
            for start, count in piece_bounds(tensor):
                waiting.append((tensor, start, pool.submit(make, tensor, start, count)))
                if len(waiting) > threads:
                    first, at, future = waiting.popleft()
                    yield first, at, future.result()
        while waiting:
            first, at, future = waiting.popleft()
            yield first, at, future.result()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def piece_bounds(tensor: PlannedTensor) -> Iterator[tuple[int, int]]:
    """(first row, count) of the pieces a tensor is written in: whole units of rows, about 2^20 weights."""
    unit = tensor.row_unit
    step = max(_PIECE // tensor.cols // unit, 1) * unit
    for start in range(0, tensor.rows, step):
        yield start, min(step, tensor.rows - start)


def _pad(file: BinaryIO) -> None:
    _write_all(file, np.zeros(-file.tell() % _ALIGNMENT, np.uint8))


def _write_all(file: BinaryIO, data: npt.NDArray[np.uint8]) -> None:
    view, done = data.data, 0
    while done < len(view):
        done += file.write(view[done:])  # an unbuffered write may be short


def _sync_folder(folder: Path) -> None:
    """Makes the rename durable, where folders can be synced."""
    with suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def verify(path: Path, keys: KeyValues, tensors: Sequence[PlannedTensor], checks: dict[str, int]) -> None:
    """Compares what the engine's reader sees with what was meant: keys, tensor table and, of every tensor, the first
    piece. Then opens the file as a model with its tokenizer. ``InternalError`` on a difference: it is a bug of ours."""
    with GgufFile.open(path) as file:
        expected_keys = {key for key, _ in keys.items()}
        if set(file.metadata) != expected_keys:
            raise InternalError(
                f"keys differ after writing: {sorted(set(file.metadata) ^ expected_keys)}", code="verify"
            )
        if list(file.tensors) != [t.name for t in tensors]:
            raise InternalError("the tensor table differs after writing", code="verify")
        for tensor in tensors:
            info = file.tensors[tensor.name]
            if (info.dims, info.type, info.size) != (tensor.shape[::-1], quant.find(tensor.type).type, tensor.size):
                raise InternalError(f"{tensor.name} has another shape or type after writing", code="verify")
            _, count = next(piece_bounds(tensor))
            if zlib.crc32(file.data(tensor.name)[: count * tensor.row_bytes].data) != checks[tensor.name]:
                raise InternalError(f"{tensor.name} has other bytes after writing", code="verify")
    with Model.open(path) as model:
        _ = model.tokenizer  # builds it
