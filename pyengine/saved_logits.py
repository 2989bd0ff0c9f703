"""Logits of a text in a file, to compare other models with; docs/quality.md describes the format.

Little-endian:

    8 bytes   "PELOGITS"
    uint32    version, 1
    uint32    n_vocab
    uint32    n_ctx, tokens of a window
    uint32    n_windows
    32 bytes  SHA-256 of the vocabulary: of each token's length in bytes (uint64) and UTF-8
    int32     [n_windows][n_ctx] ids, as they were evaluated
    then for every window and each of its positions n_ctx // 2 .. n_ctx - 2:
    float64   negative log likelihood of the next token
    float16   [n_vocab] logits minus the largest of them

A reader gets probabilities by softmax of what is stored, so rounding to 16 bits never makes them miss 1.
"""

from __future__ import annotations

import hashlib
import os
import struct
from collections.abc import Iterable
from pathlib import Path
from typing import Any, BinaryIO, Self

import numpy as np
import numpy.typing as npt

from pyengine.errors import FileError, FormatError, InvalidArgument
from pyengine.windows import LEAST_CONTEXT, Floats, Ids, scored_rows

MAGIC, VERSION = b"PELOGITS", 1
_LOWEST = np.float32(np.finfo(np.float16).min)
_HEADER = struct.Struct("<8s4I32s")

Doubles = npt.NDArray[np.float64]


def vocabulary_hash(tokens: Iterable[str]) -> bytes:
    digest = hashlib.sha256()
    for token in tokens:
        data = token.encode("utf-8")
        digest.update(struct.pack("<Q", len(data)) + data)
    return digest.digest()


def file_size(n_vocab: int, windows: Ids) -> int:
    count, n_ctx = windows.shape
    """Bytes of a file of all the windows."""
    size: int = _HEADER.size + 4 * windows.size + count * scored_rows(n_ctx) * _row_bytes(n_vocab)
    return size


def _row_bytes(n_vocab: int) -> int:
    return 8 + 2 * n_vocab


def _row_type(n_vocab: int) -> np.dtype[np.void]:
    return np.dtype([("nll", "<f8"), ("logits", "<f2", (n_vocab,))])


def _at_least(array: npt.NDArray[Any], count: int) -> npt.NDArray[Any]:
    """The array where it has ``count`` rows, else a new one."""
    return array if len(array) >= count else np.empty((count, *array.shape[1:]), dtype=array.dtype)


class LogitsWriter:
    """Writes saved logits: the header at once, then the positions in order."""

    def __init__(self, file: BinaryIO, n_vocab: int, windows: Ids, vocabulary: bytes) -> None:
        self._file, self._rows = file, np.empty(0, dtype=_row_type(n_vocab))
        count, n_ctx = windows.shape
        file.write(_HEADER.pack(MAGIC, VERSION, n_vocab, n_ctx, count, vocabulary))
        file.write(np.ascontiguousarray(windows, dtype="<i4").data)

    def add(self, nll: Doubles, logits: Floats) -> None:
        """Appends positions: ``nll`` [n], ``logits`` [n, n_vocab] minus the largest of their row."""
        self._rows = _at_least(self._rows, len(nll))
        rows = self._rows[: len(nll)]
        rows["nll"] = nll
        rows["logits"] = logits if logits.min() >= _LOWEST else np.maximum(logits, _LOWEST)
        self._file.write(rows.data.cast("B"))


class SavedLogits:
    """An open file of saved logits.

    Errors: ``FileError``; ``FormatError`` for a file that is something else, of another version, cut or damaged.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        try:
            self._file = open(self.path, "rb")  # noqa: SIM115 - closed by close()
        except OSError as error:
            raise FileError(f"cannot read {self.path}: {error.strerror or error}", code="cannot_read") from error
        try:
            self._read_header()
        except BaseException:
            self.close()
            raise

    def _read_header(self) -> None:
        header = self._file.read(_HEADER.size)
        if header[: len(MAGIC)] != MAGIC:
            raise self._bad(
                f"begins with {header[:8]!r}; expected {MAGIC!r}, as pyengine-perplexity --save-logits writes it",
                "foreign_file",
            )
        if len(header) < _HEADER.size:
            raise self._bad(f"has {len(header)} bytes; its header alone needs {_HEADER.size}", "cut_file")
        _, version, self.n_vocab, self.n_ctx, self.n_windows, self.vocabulary = _HEADER.unpack(header)
        if version != VERSION:
            raise self._bad(f"has version {version}; this program reads version {VERSION}", "bad_version")
        if self.n_vocab == 0 or self.n_windows == 0 or self.n_ctx < LEAST_CONTEXT:
            raise self._bad(
                f"claims {self.n_windows} windows of {self.n_ctx} tokens and a vocabulary of {self.n_vocab}",
                "bad_header",
            )
        self.rows = scored_rows(self.n_ctx)
        self._data = _HEADER.size + 4 * self.n_windows * self.n_ctx
        expected = self._data + self.n_windows * self.rows * _row_bytes(self.n_vocab)
        found = os.fstat(self._file.fileno()).st_size
        if found != expected:
            what = "cut" if found < expected else "too long"
            raise self._bad(
                f"is {what}: it has {found} bytes, {self.n_windows} windows of {self.n_ctx} tokens over a vocabulary "
                f"of {self.n_vocab} take {expected}",
                "cut_file",
            )
        self.windows: Ids = np.empty((self.n_windows, self.n_ctx), dtype="<i4")
        self._read(self.windows)
        self._raw = np.empty(0, dtype=_row_type(self.n_vocab))
        self._logits: Floats = np.empty((0, self.n_vocab), dtype=np.float32)
        if self.windows.min() < 0 or self.windows.max() >= self.n_vocab:
            raise self._bad(f"holds a token id outside 0..{self.n_vocab - 1}", "bad_header")

    def check(self, n_vocab: int, vocabulary: bytes, windows: Ids | None) -> None:
        """Whether a model of this vocabulary, and these windows, compare. ``InvalidArgument`` says what differs."""
        if n_vocab != self.n_vocab:
            raise self._other(f"of a vocabulary of {self.n_vocab} tokens; the model has {n_vocab}", "vocabulary")
        if vocabulary != self.vocabulary:
            raise self._other("of another vocabulary: as many tokens as the model's, but not the same", "vocabulary")
        if windows is None:
            return
        count, n_ctx = windows.shape
        if n_ctx != self.n_ctx:
            raise self._other(f"of windows of {self.n_ctx} tokens; {n_ctx} were asked for", "n_ctx")
        if count > self.n_windows:
            raise self._other(f"of {self.n_windows} windows; {count} were asked for or are in the text", "windows")
        if not np.array_equal(windows, self.windows[:count]):
            window, at = np.argwhere(windows != self.windows[:count])[0]
            raise self._other(
                f"of another text: token {at} of window {window} is {self.windows[window, at]} in the file and "
                f"{windows[window, at]} in the text",
                "text",
            )

    def read_rows(self, window: int, first: int, count: int) -> tuple[Doubles, Floats]:
        """Positions first .. first + count of a window's scored ones: ``nll`` float64 [count], logits float32
        [count, n_vocab], the largest of each row 0. The next call overwrites the logits."""
        self._file.seek(self._data + (window * self.rows + first) * _row_bytes(self.n_vocab))
        self._raw, self._logits = _at_least(self._raw, count), _at_least(self._logits, count)
        rows, logits = self._raw[:count], self._logits[:count]
        self._read(rows)
        nll = rows["nll"].copy()
        logits[...] = rows["logits"]
        if not np.isfinite(nll).all() or (logits.max(axis=1) != 0).any():  # NaN is not 0 either
            raise self._bad(
                f"is damaged: in window {window} a likelihood is not finite, or the largest logit not 0", "damaged"
            )
        return nll, logits

    def _read(self, array: npt.NDArray[Any]) -> None:
        if self._file.readinto(array.data.cast("B")) != array.nbytes:
            raise self._bad("became shorter while it was read", "cut_file")

    def _bad(self, what: str, code: str) -> FormatError:
        return FormatError(f"{self.path} {what}", code=code)

    def _other(self, what: str, field: str) -> InvalidArgument:
        return InvalidArgument(f"{self.path} holds logits {what}", code="other_logits", field=field)

    def close(self) -> None:
        self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()
