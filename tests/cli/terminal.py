"""A program on a pseudo-terminal, for tests that type, read and look at the screen."""

from __future__ import annotations

import contextlib
import fcntl
import os
import pty
import select
import signal
import struct
import subprocess
import termios
import time
from collections.abc import Callable
from pathlib import Path
from typing import Self

import pyte

PROMPT = ">>>"


class Terminal:
    """Runs ``command`` on a terminal that is its own: Ctrl-C, a change of size and a hang-up reach it as they would a
    person's.

    Attributes:
        seen: everything it printed, control sequences included.
        screen: what that looks like, as pyte draws it (a terminal that does not rewrap when its size changes).
    """

    def __init__(
        self, command: list[str], env: dict[str, str], *, cwd: Path | None = None, columns: int = 80, rows: int = 24
    ) -> None:
        self._master, self._slave = pty.openpty()
        self._screen = pyte.HistoryScreen(columns, rows, history=100_000)
        self._stream = pyte.ByteStream(self._screen)
        self._undrawn = bytearray()
        _set_size(self._slave, columns, rows)
        if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:  # as in a background job, where Ctrl-C would do nothing
            signal.signal(signal.SIGINT, signal.default_int_handler)
        # The leader of a session without a terminal gets the first one that it opens.
        opener = ["sh", "-c", 'exec "$@" <>"$0" >&0 2>&0', os.ttyname(self._slave)]
        self.process = subprocess.Popen([*opener, *command], env=env, cwd=cwd, start_new_session=True)
        self.seen = ""
        self._at = 0

    def wait_for(self, text: str, seconds: float = 60.0) -> str:
        """Reads until ``text`` is printed after what was waited for before; returns what was printed until then."""
        self.wait_until(lambda: text in self.seen[self._at :], seconds, repr(text))
        start, self._at = self._at, self.seen.index(text, self._at) + len(text)
        return self.seen[start : self._at]

    def wait_for_prompt(self, typed: str = "", seconds: float = 60.0) -> str:
        """Reads until the cursor stands in a line that is the prompt and ``typed``; returns what was printed."""
        start, want = self._at, f"{PROMPT} {typed}".rstrip()
        self.wait_until(lambda: self.line() == want, seconds, repr(want))
        self._at = len(self.seen)
        return self.seen[start:]

    @property
    def screen(self) -> pyte.HistoryScreen:
        data, self._undrawn = bytes(self._undrawn), bytearray()
        self._stream.feed(data)
        return self._screen

    @property
    def unread(self) -> str:
        """What was printed after what was waited for last."""
        return self.seen[self._at :]

    def line(self) -> str:
        """The one that the cursor is in."""
        screen = self.screen
        return screen.display[screen.cursor.y].rstrip()

    def lines(self) -> list[str]:
        """What a person sees who scrolls back as well, from the first line to the last that holds anything."""
        past = ["".join(row[x].data for x in range(self.screen.columns)) for row in self.screen.history.top]
        found = [line.rstrip() for line in [*past, *self.screen.display]]
        while found and not found[-1]:
            found.pop()
        return found

    def type(self, data: str | bytes) -> None:
        """As fast as the program takes it."""
        rest = data.encode() if isinstance(data, str) else data
        os.set_blocking(self._master, False)
        try:
            while rest:
                readable, writable, _ = select.select([self._master], [self._master], [], 30.0)
                if readable:
                    self._read()
                if writable:
                    with contextlib.suppress(BlockingIOError):
                        rest = rest[os.write(self._master, rest) :]
        finally:
            os.set_blocking(self._master, True)

    def paste(self, text: str) -> None:
        """As a terminal hands over what is pasted, once the program has asked for that."""
        self.wait_until(lambda: "\x1b[?2004h" in self.seen, 60.0, "bracketed paste")
        self.type(f"\x1b[200~{text}\x1b[201~".replace("\n", "\r"))

    def interrupt(self) -> None:
        """Ctrl-C."""
        self.type(b"\x03")

    def resize(self, columns: int, rows: int) -> None:
        self.screen.resize(rows, columns)
        _set_size(self._master, columns, rows)

    def hang_up(self) -> None:
        """The terminal's window is closed."""
        os.close(self._master)
        self._master = -1

    def exit_code(self, seconds: float = 60.0) -> int:
        """Waits for the end, reading what is still printed."""
        deadline = time.monotonic() + seconds
        while self._master >= 0 and time.monotonic() < deadline:
            if select.select([self._master], [], [], 0.05)[0]:
                self._read()
            elif self.process.poll() is not None:
                break
        return self.process.wait(max(0.1, deadline - time.monotonic()))

    def wait_until(self, done: Callable[[], bool], seconds: float, what: str) -> None:
        """Reads until ``done``; ``what`` it waits for is told when that takes longer."""
        deadline = time.monotonic() + seconds
        while not done():
            left = deadline - time.monotonic()
            assert left > 0, f"{what} did not come; got {self.seen[self._at :]!r}"
            if select.select([self._master], [], [], min(left, 0.1))[0]:
                self._read()
            else:
                assert self.process.poll() is None, f"the program ended before {what}; got {self.seen[self._at :]!r}"

    def _read(self) -> None:
        data = os.read(self._master, 65536)
        self._undrawn += data
        self.seen += data.decode(errors="replace")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()
        if self._master >= 0:
            os.close(self._master)
        os.close(self._slave)


def _set_size(descriptor: int, columns: int, rows: int) -> None:
    fcntl.ioctl(descriptor, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))
