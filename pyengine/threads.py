"""Calls in threads of their own."""

from __future__ import annotations

import _thread
import atexit
import os
import weakref
from collections.abc import Callable
from typing import Any, Generic, TypeVar

from pyengine import _core
from pyengine.errors import OutOfMemory

_T = TypeVar("_T")
_waited_for: weakref.WeakSet[Task[Any]] = weakref.WeakSet()  # by the interpreter's end; a thread holds its own task


class Task(Generic[_T]):
    """A call in a thread of its own, which runs from here on.

    A thread that begins may be refused the memory for its first line of Python. ``threading.Thread.start`` then waits
    for ever (CPython issue 140746); this raises.

    Args:
        work: what is called.
        abandon: the interpreter may end while it runs. Not under native code that works for long.

    Errors: ``OutOfMemory`` when the system refuses the thread, or memory for its beginning.
    """

    def __init__(self, work: Callable[[], _T], *, abandon: bool = False) -> None:
        self._work = work
        self._values: list[_T] = []  # one, in the end
        self._error: BaseException | None = None
        self._runs = False
        self._process = os.getpid()
        self._begun, self._ended = _thread.allocate_lock(), _thread.allocate_lock()
        self._begun.acquire()
        self._ended.acquire()
        try:
            _thread.start_new_thread(_core.run_task, (self._run, self._begun, self._ended))
        except RuntimeError as refusal:
            raise OutOfMemory("not enough memory: the system refuses a thread", code="thread_create") from refusal
        if not abandon:
            _waited_for.add(self)
        self._begun.acquire()
        if not self._runs:
            self.wait()
            raise OutOfMemory("not enough memory: a thread could not begin", code="thread_create")

    def _run(self) -> None:
        self._runs = True
        self._begun.release()
        try:
            self._values.append(self._work())
        except BaseException as error:
            self._error = error

    @property
    def alive(self) -> bool:
        """Whether it still runs; never in the child of a fork, which has no threads of its parent."""
        return self._ended.locked() and self._process == os.getpid()

    def wait(self, seconds: float = -1) -> bool:
        """Whether it has ended, within so many seconds; -1: however long it takes."""
        if self.alive:
            if not self._ended.acquire(timeout=seconds):
                return False
            self._ended.release()
        return True

    def result(self) -> _T:
        """Waits; what ``work`` returned, or the exception that it raised."""
        self.wait()
        if self._error is not None:
            raise self._error
        if not self._values:
            raise OutOfMemory("not enough memory: a thread ended early", code="thread_create")
        return self._values[0]


@atexit.register
def _wait_for_all() -> None:
    for task in list(_waited_for):
        task.wait()
