"""Writing a file whole or not at all."""

from __future__ import annotations

import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from pyengine.errors import FileError


def check_target(path: Path, *, force: bool, size: int = 0) -> None:
    """Whether a file of ``size`` bytes can be written. ``FileError`` says why not, before any work is done."""
    if path.is_dir():
        raise FileError(f"{path} is a directory; expected a file name", code="is_directory")
    if not path.parent.is_dir():
        raise FileError(f"{path.parent} is no directory", code="no_directory")
    if path.exists() and not force:
        raise FileError(f"{path} exists already; --force replaces it", code="exists")
    free = shutil.disk_usage(path.parent).free
    if size > free:
        raise FileError(
            f"{path.parent} has {free / 1e9:.2f} GB free; the file needs {size / 1e9:.2f} GB", code="no_space"
        )


@contextmanager
def replacing(path: Path, *, private: bool = False) -> Iterator[BinaryIO]:
    """A new file that takes the name, and the place of a file that had it, when the block ends without an error.

    ``private``: nobody but its owner may read it.
    """
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    if part.exists():  # another thread writes it, or a process of this number left it behind
        part = path.with_name(f".{path.name}.{os.getpid()}-{secrets.token_hex(4)}.part")
    mode = 0o600 if private else 0o666
    try:
        with open(part, "xb", opener=lambda name, flags: os.open(name, flags, mode)) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
        _sync_folder(path.parent)
    except OSError as error:
        if isinstance(error, FileError):
            raise
        raise FileError(f"cannot write {path}: {error.strerror or error}", code="cannot_write") from error
    finally:
        with suppress(OSError):
            part.unlink()


def _sync_folder(folder: Path) -> None:
    """Makes the rename durable, where folders can be synced."""
    with suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
