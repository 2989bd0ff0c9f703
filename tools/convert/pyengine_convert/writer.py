"""Planned tensors -> a GGUF file (or the parts of a split one) under its final name, complete and verified, or nothing.

The file grows under a temporary name in the same folder, is synced, opened with the engine's own reader and compared
with what was meant, and only then renamed. The temporary name is fixed and locked, so that two conversions to the same
output cannot meet; what a killed one left behind is continued when asked (journal.py), otherwise replaced.
The parts of a split file grow in a folder and are renamed last part first: the first one opens the model.

Threads read and encode pieces of a few MiB, a bounded number at a time; this thread writes them in order, another one
sees that they reach the disk. Memory in use: about (threads + 2) pieces, whatever the size of the model.
"""

from __future__ import annotations

import functools
import hashlib
import os
import re
import shutil
import threading
import zlib
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np
import numpy.typing as npt
from gguf import GGMLQuantizationType, GGUFWriter

import pyengine
from pyengine import quant
from pyengine.errors import FileError, InternalError, InvalidArgument
from pyengine.gguf_file import GgufFile
from pyengine.model import Model
from pyengine.threads import Task
from pyengine_convert import journal
from pyengine_convert.encode import Loss, encode
from pyengine_convert.journal import Journal, State
from pyengine_convert.keyvalues import KeyValues
from pyengine_convert.plan import PlannedTensor

try:
    import fcntl
except ImportError:  # Windows: an open file cannot be replaced there, which serves as the lock
    fcntl = None  # type: ignore[assignment]

_ALIGNMENT = 32  # bytes; the format's default
_PIECE = 1 << 20  # weights read and encoded at a time
_HEADER_RESERVE = 64 << 20  # bytes kept free for metadata when space is checked
_CHECKPOINT = 128 << 20  # bytes between checkpoints; a killed conversion does at most two of them again

Progress = Callable[[int], None]  # called with the bytes just written


class Written(NamedTuple):
    """Paths and bytes of the files together, and what each tensor lost."""

    paths: list[Path]
    size: int
    losses: dict[str, Loss]


@dataclass(frozen=True)
class _Volume:
    """One file to be written: ``path`` until it is complete, ``final`` then."""

    path: Path
    final: Path
    keys: KeyValues
    tensors: Sequence[PlannedTensor]


def write(
    out: Path,
    keys: KeyValues,
    tensors: Sequence[PlannedTensor],
    *,
    threads: int = 1,
    force: bool = False,
    progress: Progress | None = None,
    split: int | None = None,
    resume: bool = False,
    source: str = "",
) -> Written:
    """Writes ``out``. An existing file is replaced only with ``force``.

    Args:
        split: bytes of tensor data a file may hold; more are written as ``OUT-00001-of-0000N.gguf``.
        resume: continue what a killed conversion left, if anything; and leave it for another ``resume`` on
            KeyboardInterrupt.
        source: identifies what the tensors are read from.

    Errors: ``FileError`` (exists, no space, the system refused, another one's remains), whatever reading the tensors
    raises, and ``InternalError`` when the file does not read back as meant. After any of them, and after
    KeyboardInterrupt, no file of ours is left under either name - but with ``resume``, after KeyboardInterrupt and
    ``FileError``, what another ``resume`` can go on with.
    """
    if threads < 1:
        raise InvalidArgument(f"threads is {threads}; expected at least 1", code="bad_threads")
    _check_folder(out)
    volumes = _volumes(out, keys, tensors, split)
    if not resume:
        _check_targets(volumes, force)
    identity = _identity(volumes, source)
    with _temporary(out, resume):
        try:
            state = _resume(out, volumes, identity) if resume else State()
            _check_targets(volumes, force)
            _check_space(out, sum(t.size + _ALIGNMENT for t in tensors) - state.done)
            if len(volumes) > 1:
                _folder_name(out).mkdir(exist_ok=True)
            log = Journal.begin(_journal_name(out), identity, state)
            try:
                _write_volumes(volumes, state, log, threads, progress or (lambda _: None))
            finally:
                log.close()
            size = sum(volume.path.stat().st_size for volume in volumes)
            verify(volumes[0].path, volumes[0].keys, tensors, state.checks)
            _check_targets(volumes, force)
            _publish(volumes)
            _sync_folder(out.parent)
        except OSError as error:
            if isinstance(error, FileError):
                raise
            raise FileError(f"cannot write {out}: {error.strerror or error}", code="cannot_write") from error
    return Written([volume.final for volume in volumes], size, state.losses)


def _publish(volumes: Sequence[_Volume]) -> None:
    """Gives the files their names, the one that opens the model last; all or none."""
    if len(volumes) > 1:  # an older first part must not be seen with newer others
        volumes[0].final.unlink(missing_ok=True)
    named = []
    try:
        for volume in reversed(volumes):
            os.replace(volume.path, volume.final)
            named.append(volume)
    except OSError:
        for volume in named:
            with suppress(OSError):
                os.replace(volume.final, volume.path)
        raise


def _volumes(out: Path, keys: KeyValues, tensors: Sequence[PlannedTensor], split: int | None) -> list[_Volume]:
    """The files to be written: one, or as few as hold ``split`` bytes of tensor data each, a tensor never cut."""
    groups: list[list[PlannedTensor]] = [[]]
    size = 0
    for tensor in tensors:
        if split is not None and groups[-1] and size + tensor.size > split:
            groups.append([])
            size = 0
        groups[-1].append(tensor)
        size += tensor.size
    if len(groups) == 1:
        return [_Volume(part_name(out), out, keys, tensors)]
    if len(groups) > 9999:
        raise InvalidArgument(f"{len(groups)} files of {split} bytes: choose larger ones", code="too_many_parts")
    volumes = []
    for i, group in enumerate(groups):
        name = f"{re.sub(r'[.]gguf$', '', out.name)}-{i + 1:05}-of-{len(groups):05}.gguf"
        own = keys.clone() if i == 0 else KeyValues()
        if i > 0:
            own.string("general.architecture", keys["general.architecture"])
        own.u16("split.no", i)
        own.u16("split.count", len(groups))
        own.i32("split.tensors.count", len(tensors))
        volumes.append(_Volume(_folder_name(out) / name, out.with_name(name), own, group))
    return volumes


def _identity(volumes: Sequence[_Volume], source: str) -> str:
    """The same for two conversions that write the same bytes."""
    digest = hashlib.sha256(f"{pyengine.__version__}\n{source}\n{_PIECE}\n".encode())
    for volume in volumes:
        for key, value in volume.keys.items():
            digest.update(f"{key} {value!r}\n".encode("utf-8", "surrogatepass"))
        for tensor in volume.tensors:
            digest.update(f"{tensor.name} {tensor.shape} {tensor.type} {tensor.source}\n".encode())
            if tensor.importance is not None:
                digest.update(tensor.importance.tobytes())
    return digest.hexdigest()


def _check_folder(out: Path) -> None:
    if out.is_dir():
        raise FileError(f"{out} is a directory; expected a file name", code="is_directory")
    if not out.parent.is_dir():
        raise FileError(f"{out.parent} is no directory", code="no_directory")


def _check_targets(volumes: Sequence[_Volume], force: bool) -> None:
    for volume in volumes:
        if volume.final.is_dir():
            raise FileError(f"{volume.final} is a directory; expected a file name", code="is_directory")
        if volume.final.exists() and not force:
            raise FileError(f"{volume.final} exists already; --force replaces it", code="exists")


def _resume(out: Path, volumes: Sequence[_Volume], identity: str) -> State:
    """How far the files on the disk have come. Errors: ``FileError`` when they are another conversion's."""
    state = journal.read(_journal_name(out), identity)
    for number, volume in enumerate(volumes[: state.volume + 1]):
        if len(volumes) > 1 and not volume.path.exists() and volume.final.exists():  # killed while they got their names
            _folder_name(out).mkdir(exist_ok=True)  # or just after
            os.replace(volume.final, volume.path)
        if not volume.path.exists() or (number == state.volume and volume.path.stat().st_size < state.offset):
            return State()
    return state


def _check_space(out: Path, data: int) -> None:
    free = shutil.disk_usage(out.parent).free
    if data + _HEADER_RESERVE > free:
        raise FileError(
            f"{out.parent} has {free / 1e9:.2f} GB free; the file needs {(data + _HEADER_RESERVE) / 1e9:.2f} GB",
            code="no_space",
        )


def part_name(out: Path) -> Path:
    """The name a file has until it is complete, and the lock of a split one."""
    return out.with_name(f".{out.name}.part")


def _folder_name(out: Path) -> Path:
    """Where the parts of a split file grow."""
    return out.with_name(f".{out.name}.parts")


def _journal_name(out: Path) -> Path:
    return out.with_name(f".{out.name}.journal")


@contextmanager
def _temporary(out: Path, resume: bool) -> Iterator[None]:
    """Creates and locks the temporary file; at the end removes it unless it has been renamed, and what is beside it."""
    part = part_name(out)
    try:
        lock = os.open(part, os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0), 0o666)
    except OSError as error:
        raise FileError(f"cannot write {part}: {error.strerror}", code="cannot_write") from error
    owned = keep = False
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
        if not resume:
            try:
                _remove_remains(out)
            except OSError as error:
                raise FileError(f"cannot write {out}: {error.strerror}", code="cannot_write") from error
        yield
    except KeyboardInterrupt:
        keep = resume
        raise
    except FileError:
        keep = resume
        raise
    finally:
        # What cannot be removed stays, and the failure that led here is told.
        if owned and not keep:
            with suppress(OSError):
                part.unlink()
            with suppress(OSError):
                _remove_remains(out)
        with suppress(OSError):
            os.close(lock)


def _remove_remains(out: Path) -> None:
    shutil.rmtree(_folder_name(out), ignore_errors=True)
    _journal_name(out).unlink(missing_ok=True)


def _write_header(volume: _Volume) -> int:
    """Header, metadata and tensor table by the format's own package; returns where the tensor data begins."""
    writer = GGUFWriter(volume.path, volume.keys["general.architecture"])  # adds general.architecture itself
    for key, value in volume.keys.items():
        if key != "general.architecture":
            writer.add_key_value(key, value.value, value.type, value.element)
    for tensor in volume.tensors:
        kind = GGMLQuantizationType[tensor.type]
        writer.add_tensor_info(tensor.name, tensor.shape, np.dtype(np.float32), tensor.size, raw_dtype=kind)
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
    finally:
        writer.close()
    end = volume.path.stat().st_size
    return -(-end // _ALIGNMENT) * _ALIGNMENT


def _write_volumes(volumes: Sequence[_Volume], state: State, log: Journal, threads: int, progress: Progress) -> None:
    """Writes everything that ``state`` does not have yet, and brings it up to date."""
    if state.done:
        progress(state.done)
    for number in range(state.volume, len(volumes)):
        if state.volume != number or not state.offset:
            state.volume, state.tensor, state.row, state.offset = number, 0, 0, _write_header(volumes[number])
        _write_data(volumes[number], state, log, threads, progress)


def _write_data(volume: _Volume, state: State, log: Journal, threads: int, progress: Progress) -> None:
    """Appends the bytes of the tensors from ``state`` on, padded."""
    with open(volume.path, "r+b", buffering=0) as file:
        file.seek(state.offset)
        file.truncate()
        synced: int = state.offset
        syncing: Task[None] | None = None

        def checkpoint(reached: State) -> None:
            os.fsync(file.fileno())
            log.checkpoint(reached)

        try:
            for piece in _pieces(volume.tensors, state.tensor, state.row, threads):
                name = volume.tensors[piece.tensor].name
                if piece.start == 0:
                    _pad(file)
                    state.checks[name] = zlib.crc32(piece.data.data)
                    state.losses[name] = Loss()
                _write_all(file, piece.data)
                state.losses[name] += piece.loss
                state.done += piece.data.nbytes
                state.tensor, state.row, state.offset = piece.tensor, piece.start + piece.count, file.tell()
                progress(piece.data.nbytes)
                if state.offset - synced >= _CHECKPOINT:
                    if syncing is not None:
                        syncing.result()  # the disk is slower than we are: what waits to be written stays bounded
                    syncing = Task(functools.partial(checkpoint, state.copy()))
                    synced = state.offset
        finally:
            if syncing is not None:
                syncing.wait()
        if syncing is not None:
            syncing.result()
        _pad(file)
        checkpoint(state)


class _Piece(NamedTuple):
    tensor: int
    start: int
    count: int
    data: npt.NDArray[np.uint8]
    loss: Loss


def _make(tensor: PlannedTensor, index: int, start: int, count: int) -> _Piece:
    rows = tensor.read(start, count)
    if tensor.copied:
        return _Piece(index, start, count, rows.reshape(-1), Loss(weights=count * tensor.cols))
    data, lost = encode(tensor, rows, start)
    return _Piece(index, start, count, data.reshape(-1), lost)


def _pieces(tensors: Sequence[PlannedTensor], first: int, row: int, threads: int) -> Iterator[_Piece]:
    """Yields encoded pieces in file order, from row ``row`` of tensor ``first`` on; ``threads`` are in the making."""
    waiting: deque[Task[_Piece]] = deque()
    room = threading.Semaphore(threads)

    def make(index: int, start: int, count: int) -> _Piece:
        with room:
            return _make(tensors[index], index, start, count)

    try:
        for index in range(first, len(tensors)):
            for start, count in piece_bounds(tensors[index]):
                if index == first and start < row:
                    continue
                waiting.append(Task(functools.partial(make, index, start, count)))
                if len(waiting) > threads:
                    yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        for task in waiting:
            task.wait()


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
