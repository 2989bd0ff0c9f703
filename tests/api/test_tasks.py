"""Calls in threads of their own: what they return, and a beginning or an end that fails for lack of memory."""

import gc
import os
import subprocess
import sys
import threading
import time
import weakref

import pytest

from pyengine.errors import OutOfMemory
from pyengine.threads import Task


def test_a_task_gives_what_its_work_returned_or_raised() -> None:
    assert Task(lambda: 6 * 7).result() == 42
    failing = Task(lambda: 1 // 0)
    for _ in range(2):
        with pytest.raises(ZeroDivisionError):
            failing.result()


def test_a_task_runs_beside_its_caller_and_can_be_waited_for_a_while() -> None:
    go = threading.Event()
    task = Task(go.wait)
    assert task.alive
    assert not task.wait(0.01)
    go.set()
    assert task.wait(60)
    assert not task.alive
    assert task.result() is True


def test_a_thread_that_is_refused_memory_for_its_beginning_is_an_error_and_no_hang() -> None:
    class Refused(Task[None]):
        def _run(self) -> None:  # as when the interpreter has no memory for the first frame
            raise MemoryError

    with pytest.raises(OutOfMemory, match="could not begin") as told:
        Refused(lambda: None)
    assert told.value.code == "thread_create"


def test_a_thread_that_has_no_memory_to_end_is_an_error_and_no_hang() -> None:
    class Ended(Task[None]):
        def _run(self) -> None:
            self._runs = True
            self._begun.release()
            raise MemoryError

    with pytest.raises(OutOfMemory, match="ended early"):
        Ended(lambda: None).result()


def test_a_thread_that_the_system_refuses_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> int:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr("_thread.start_new_thread", refuse)
    with pytest.raises(OutOfMemory, match="refuses a thread"):
        Task(lambda: None)


def test_a_task_that_has_ended_is_kept_by_nobody_but_those_who_ask_for_it() -> None:
    gone = weakref.ref(Task(lambda: None))
    deadline = time.monotonic() + 60
    while gone() is not None and time.monotonic() < deadline:
        gc.collect()
    assert gone() is None


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
def test_the_child_of_a_fork_does_not_wait_for_a_thread_of_its_parent() -> None:
    go = threading.Event()
    task = Task(go.wait)
    child = os.fork()
    if child == 0:
        try:
            task.result()
        except OutOfMemory:
            os._exit(0 if not task.alive else 2)
        os._exit(1)
    _, status = os.waitpid(child, 0)
    go.set()
    assert status == 0
    assert task.result() is True


def test_the_interpreter_ends_after_its_tasks_unless_they_may_be_abandoned() -> None:
    program = """
import sys, time
from pyengine.threads import Task
def work():
    time.sleep(0.3)
    print("done", flush=True)
Task(work, abandon=sys.argv[1] == "abandon")
"""
    for word, printed in (("wait", "done\n"), ("abandon", "")):
        done = subprocess.run(
            [sys.executable, "-c", program, word], capture_output=True, text=True, timeout=60, check=True
        )
        assert (done.stdout, done.stderr) == (printed, "")
