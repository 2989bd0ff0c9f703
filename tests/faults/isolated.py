"""Runs functions in forked children of this process, which has imported everything once: trials by the thousand."""

from __future__ import annotations

import os
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from typing import NamedTuple

ESCAPED = 99  # the exit code of a child that an exception left


class Outcome(NamedTuple):
    """How a child ended: its exit code (minus the number of the signal that ended it), and what it wrote to stderr."""

    code: int
    messages: str


class Child:
    """A child that runs ``work``, with nothing to read, and exits with what it returns."""

    def __init__(self, work: Callable[[], int]) -> None:
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115
        sys.stdout.flush()
        sys.stderr.flush()
        self.pid = os.fork()
        if self.pid == 0:
            self._become(work)

    def _become(self, work: Callable[[], int]) -> None:
        code = ESCAPED
        try:
            null = os.open(os.devnull, os.O_RDWR)
            os.dup2(null, 0)
            os.dup2(null, 1)
            os.dup2(self._errors.fileno(), 2)
            signal.alarm(600)  # a hang
            try:
                code = work()
            except SystemExit as end:
                code = end.code if isinstance(end.code, int) else ESCAPED
            except BaseException:
                traceback.print_exc()
            sys.stderr.flush()
        finally:
            os._exit(code)

    def running(self) -> bool:
        return os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None

    def wait(self) -> Outcome:
        _, status = os.waitpid(self.pid, 0)
        self._errors.seek(0)
        messages = self._errors.read().decode("utf-8", "replace")
        self._errors.close()
        return Outcome(os.waitstatus_to_exitcode(status), messages)


def run(work: Callable[[], int]) -> Outcome:
    """``work`` in a child of its own."""
    return Child(work).wait()


class Tally:
    """Counts trials and collects what went wrong."""

    def __init__(self, what: str) -> None:
        self.what = what
        self.trials = 0
        self.ends: dict[str, int] = {}
        self.failures: list[str] = []
        self._start = time.monotonic()

    def add(self, end: str) -> None:
        self.trials += 1
        self.ends[end] = self.ends.get(end, 0) + 1

    def check(self, good: bool, what: str) -> None:
        if not good:
            self.failures.append(what)
            if len(self.failures) <= 20:
                short = what if len(what) < 1500 else what[:300] + " ... " + what[-1200:]
                print(f"FAILED: {self.what}: {short}", flush=True)

    def report(self) -> bool:
        """Prints the line with the figures; whether all went well."""
        ends = ", ".join(f"{count} {end}" for end, count in sorted(self.ends.items()))
        seconds = time.monotonic() - self._start
        print(f"{self.what}: {self.trials} trials ({ends}), {len(self.failures)} failures, {seconds:.0f} s", flush=True)
        return not self.failures


def one_message(messages: str, program: str) -> bool:
    """Whether stderr holds the program's own message and no traceback."""
    return f"{program}: " in messages and "Traceback" not in messages and "terminate called" not in messages
