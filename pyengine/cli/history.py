"""The lines typed on earlier days: a private file of JSON strings, one a line, oldest first."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterable
from pathlib import Path

from prompt_toolkit.history import History

_MOST_BYTES = 1 << 20  # of the file; beyond, the older half goes
_LONGEST = 10_000  # characters of an entry; a longer one is not worth recalling


class MessageHistory(History):
    """Remembers what it is told by :meth:`add`; what the editor would store itself (names of pastes) is ignored.

    ``path``: the file; None, or one that cannot be read or written: this run's messages only.
    """

    def __init__(self, path: Path | None) -> None:
        super().__init__()
        self._path = path

    def add(self, text: str) -> None:
        """The newest message."""
        if text.strip() and len(text) <= _LONGEST and self.get_strings()[-1:] != [text]:
            super().append_string(text)

    def append_string(self, string: str) -> None:
        pass

    def store_string(self, string: str) -> None:
        with contextlib.suppress(OSError):
            if self._path is not None:
                _append(self._path, json.dumps(string, ensure_ascii=False) + "\n")

    def load_history_strings(self) -> Iterable[str]:
        """Newest first."""
        lines: list[bytes] = []
        with contextlib.suppress(OSError):
            if self._path is not None:
                lines = self._path.read_bytes().split(b"\n")
                os.chmod(self._path, 0o600)
        for line in reversed(lines):
            with contextlib.suppress(ValueError):
                text = json.loads(line)
                if isinstance(text, str):
                    yield text


def _append(path: Path, line: str) -> None:
    """Nobody else may read the file, nor the folder if it is ours to make."""
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    with open(os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o600), "r+b") as file:
        file.write(line.encode())
        size = file.tell()
        if size <= _MOST_BYTES:
            return
        file.seek(size // 2)
        newer = file.read().partition(b"\n")[2]
    shorter = path.with_name(f".{path.name}.{os.getpid()}")
    with open(os.open(shorter, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "wb") as file:
        file.write(newer)
    os.replace(shorter, path)
