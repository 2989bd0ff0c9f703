"""Every failure of the engine as one small family of exceptions.

The core reports a status, a stable code, a byte offset, a field and one sentence (see ``pe_error`` in ``pyengine.h``);
:func:`raise_error` turns that into the exception whose class says what kind of thing went wrong.
"""

from __future__ import annotations

from typing import NoReturn

NO_OFFSET = 2**64 - 1


class EngineError(Exception):
    """Base of all engine errors.

    Attributes:
        code: stable identifier, such as ``"bad_magic"``; safe to compare with.
        offset: byte offset in the file, or ``None`` where none applies.
        field: what was being read, such as ``"llama.block_count"``; ``""`` where none applies.
        message: one sentence a person can act on.
    """

    def __init__(self, message: str, *, code: str = "error", offset: int | None = None, field: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.code = code
        self.offset = offset
        self.field = field


class InvalidArgument(EngineError, ValueError):
    """The caller passed something impossible."""


class FileError(EngineError, OSError):
    """The operating system refused: missing file, permission, read error."""

    def __str__(self) -> str:
        return self.message


class FormatError(EngineError):
    """The file is malformed; ``offset`` and ``field`` say where."""


class UnsupportedError(EngineError):
    """The file is well formed, but this build does not run it."""


class OutOfMemory(EngineError, MemoryError):
    """An allocation failed."""


class Cancelled(EngineError):
    """The operation was asked to stop."""


class ContextFull(EngineError):
    """The tokens do not fit into the session's context."""


class NumericError(EngineError):
    """NaN or infinity in the logits: the weights are damaged."""


class CpuError(EngineError):
    """The processor lacks a forced instruction-set tier."""


class InternalError(EngineError):
    """A bug in the engine: please report."""


# pe_status -> exception; tests/api compares the keys with the header.
BY_STATUS: dict[int, type[EngineError]] = {
    1: InvalidArgument,
    2: FileError,
    3: FormatError,
    4: UnsupportedError,
    5: OutOfMemory,
    6: Cancelled,
    7: ContextFull,
    8: NumericError,
    9: CpuError,
    10: InternalError,
}


def raise_error(status: int, code: str, offset: int, field: str, message: str) -> NoReturn:
    """Raises the exception for one ``pe_error``."""
    kind = BY_STATUS.get(status, InternalError)
    raise kind(message, code=code, offset=None if offset == NO_OFFSET else offset, field=field)
