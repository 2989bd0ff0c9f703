"""Lines in and lines out of a process that another one hosts: bounded, and aware of a host that is slow or gone."""

from __future__ import annotations

import contextlib
import json
import os
import select
import threading
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any

from pyengine.threads import Task

MAX_LINE = 16 << 20  # bytes, without the line break
MAX_UNREAD = 256  # events that the host has not taken, before whoever makes them waits for it
_PATIENCE = 10.0  # seconds for a host that has ended the talk but still reads


class Host:
    """The other side: lines come from ``stdin``, events go to ``stdout`` (both descriptors).

    Events are written by another thread. Once the host does not read any more, they are dropped.
    """

    def __init__(self, stdin: int, stdout: int) -> None:
        self._stdin, self._stdout = stdin, stdout
        self._events: deque[bytes] = deque()
        self._changed = threading.Condition()
        self._closing = False
        self._hung_up = False  # nothing more is read
        self._gone = False  # nothing more is written
        self._wake_up, self._waker = os.pipe()
        self._writer = Task(self._write, abandon=True)

    @property
    def gone(self) -> bool:
        """The host has closed its end of ``stdout``."""
        return self._gone or bool(_poll(self._stdout, 0, 0))

    def lines(self, limit: int = MAX_LINE) -> Iterator[bytes | None]:
        """Lines without their ends, until the host closes ``stdin`` or ``stdout``, or :meth:`hang_up`.

        None stands for a line that is longer than ``limit`` bytes; it is not kept in memory.
        """
        held = bytearray()
        skipping = False
        while self._wait():
            data = os.read(self._stdin, 1 << 16)
            if not data:
                break
            *ends, rest = data.split(b"\n")
            for end in ends:
                line = None if skipping or len(held) + len(end) > limit + 1 else bytes(held + end).removesuffix(b"\r")
                yield None if line is not None and len(line) > limit else line
                held.clear()
                skipping = False
            if skipping or len(held) + len(rest) > limit + 1:
                held.clear()
                skipping = True
            else:
                held += rest
        if skipping:
            yield None
        elif held:
            yield bytes(held)

    def _wait(self) -> bool:
        """Until there is something to read, or the end of it. Windows cannot wait for a pipe: there the read does."""
        if not hasattr(select, "poll"):
            return not (self._gone or self._hung_up)
        watched = select.poll()
        watched.register(self._stdin, select.POLLIN)
        watched.register(self._stdout, 0)  # reports that the other end is closed, and nothing else
        watched.register(self._wake_up, select.POLLIN)
        ready = dict(watched.poll())
        return not (self._hung_up or self._gone or self._stdout in ready)

    def hang_up(self) -> None:
        """From any thread: no more lines."""
        self._hung_up = True
        os.write(self._waker, b".")

    def put(self, event: dict[str, Any]) -> None:
        """Hands over an event; never waits. For what a host gets once for each of its requests."""
        self._append(_line(event))

    def put_in_turn(self, event: dict[str, Any], drop: Callable[[], bool] = lambda: False) -> None:
        """Hands over an event once there is room; nothing when ``drop()`` is true then (see :meth:`look_again`)."""
        line = _line(event)
        with self._changed:
            self._changed.wait_for(lambda: len(self._events) < MAX_UNREAD or self._gone or drop())
            if drop():
                return
        self._append(line)

    def look_again(self) -> None:
        """Whoever waits for room asks ``drop()`` again."""
        with self._changed:
            self._changed.notify_all()

    def close(self) -> None:
        """Waits, but not forever, until the host has every event."""
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        self._writer.wait(_PATIENCE)

    def _append(self, line: bytes) -> None:
        with self._changed:
            if not self._gone:
                self._events.append(line)
                self._changed.notify_all()

    def _write(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._events or self._closing)
                if not self._events:
                    return
                line = self._events[0]
            try:
                rest = memoryview(line)
                while rest:
                    rest = rest[os.write(self._stdout, rest) :]
            except OSError:
                with self._changed:
                    self._gone = True
                    self._events.clear()
                    self._changed.notify_all()
                return
            with self._changed:
                self._events.popleft()
                self._changed.notify_all()


def _poll(descriptor: int, events: int, milliseconds: int) -> list[tuple[int, int]]:
    with contextlib.suppress(AttributeError):  # Windows has no poll
        watched = select.poll()
        watched.register(descriptor, events)
        return watched.poll(milliseconds)
    return []


# What some languages take for the end of a line.
_LINE_ENDS = {code: f"\\u{code:04x}" for code in (0x85, 0x2028, 0x2029)}


def _line(event: dict[str, Any]) -> bytes:
    text = json.dumps(event, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return (text.translate(_LINE_ENDS) + "\n").encode("utf-8", "replace")
