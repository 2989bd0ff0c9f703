"""A program on a pseudo-terminal, for tests that type and read."""

from __future__ import annotations

import os
import pty
import select
import signal
import subprocess
import time
from typing import Self


class Terminal:
    """Runs ``command`` with stdin, stdout and stderr on a terminal; :attr:`seen` is all it printed."""

    def __init__(self, command: list[str], env: dict[str, str]) -> None:
        self._master, slave = pty.openpty()
        self.process = subprocess.Popen(
            command, stdin=slave, stdout=slave, stderr=slave, env=env, start_new_session=True, close_fds=True
        )
        os.close(slave)
        self.seen = ""
        self._at = 0

    def wait_for(self, text: str, seconds: float = 30.0) -> str:
        """Reads until ``text`` appears after what was waited for before; returns what came until then."""
        deadline = time.monotonic() + seconds
        while text not in self.seen[self._at :]:
            left = deadline - time.monotonic()
            assert left > 0, f"{text!r} did not come; got {self.seen[self._at :]!r}"
            if select.select([self._master], [], [], left)[0]:
                try:
                    data = os.read(self._master, 65536)
                except OSError:  # the other side is closed
                    data = b""
                assert data, f"the program ended before {text!r}; got {self.seen[self._at :]!r}"
                self.seen += data.decode(errors="replace")
        start, self._at = self._at, self.seen.index(text, self._at) + len(text)
        return self.seen[start : self._at]

    def type(self, data: str | bytes) -> None:
        os.write(self._master, data.encode() if isinstance(data, str) else data)

    def interrupt(self) -> None:
        """Ctrl-C, as a person would: not in the instant between a prompt appearing and the terminal being read, where
        CPython's readline loop would notice it only with the next key."""
        time.sleep(0.2)
        os.killpg(self.process.pid, signal.SIGINT)

    def exit_code(self, seconds: float = 30.0) -> int:
        """Waits for the end, reading what is still printed."""
        deadline = time.monotonic() + seconds
        while self.process.poll() is None and time.monotonic() < deadline:
            if select.select([self._master], [], [], 0.05)[0]:
                try:
                    self.seen += os.read(self._master, 65536).decode(errors="replace")
                except OSError:
                    break
        return self.process.wait(max(0.1, deadline - time.monotonic()))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()
        os.close(self._master)
