"""What every command does alike: exit codes, messages, terminals, Ctrl-C, UTF-8."""

from __future__ import annotations

import errno
import os
import queue
import signal
import sys
import threading
import time
import traceback
import unicodedata
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from types import FrameType
from typing import Any, TextIO, TypeVar

from pyengine.errors import ContextFull, EngineError, InvalidArgument
from pyengine.gguf_file import guard_mapped_files
from pyengine.memory import memory_is_refused
from pyengine.threads import Task

EXIT_OK = 0
EXIT_ERROR = 1  # the file, the model, the machine
EXIT_USAGE = 2  # the command line or the text given to it
EXIT_CONTEXT = 3  # the context is full
EXIT_INTERRUPTED = 130  # Ctrl-C: 128 + SIGINT
EXIT_PIPE = 141  # the reader of our output went away: 128 + SIGPIPE

_T = TypeVar("_T")


class UsageError(Exception):
    """What the user asked for makes no sense; the message says why."""


def run_command(name: str, command: Callable[[], int], *, debug: bool = False) -> int:
    """Runs a command and turns every failure into one message on stderr and an exit code.

    That includes a model file that is cut or overwritten meanwhile.
    """
    try:
        guard_mapped_files()
        code = command()
        sys.stdout.flush()
        return code
    except BrokenPipeError:
        return _closed_pipe()
    except KeyboardInterrupt:
        return _fail(name, "interrupted", EXIT_INTERRUPTED, debug)
    except UsageError as error:
        return _fail(name, f"error: {error}", EXIT_USAGE, debug)
    except ContextFull as error:
        return _fail(name, f"error: {error.message}", EXIT_CONTEXT, debug)
    except EngineError as error:
        code = EXIT_USAGE if isinstance(error, InvalidArgument) else EXIT_ERROR
        return _fail(name, f"error: {describe(error)}", code, debug)
    except MemoryError:
        return _fail(name, "error: out of memory", EXIT_ERROR, debug)
    except OSError as error:
        what = f"{error.filename}: {error.strerror}" if error.filename and error.strerror else str(error)
        return _fail(name, f"error: {what}", EXIT_ERROR, debug)
    except Exception as error:
        if _is_refused_memory(error):
            return _fail(name, "error: out of memory", EXIT_ERROR, debug)
        hint = "" if debug else "; --debug shows where"
        return _fail(name, f"internal error: {type(error).__name__}: {error}{hint}", EXIT_ERROR, debug)


def _is_refused_memory(error: BaseException | None) -> bool:
    """Whether an exception of another kind, or what led to it, says that memory ran out."""
    while error is not None:
        if isinstance(error, MemoryError) or (isinstance(error, OSError) and error.errno == errno.ENOMEM):
            return True
        words = ("new thread", "map segment", "allocate memory")  # RuntimeError of threading, ImportError of the loader
        if isinstance(error, RuntimeError | ImportError) and any(word in str(error) for word in words):
            return True
        if isinstance(error, SystemError) and memory_is_refused():  # a library that failed without saying why
            return True
        error = error.__cause__ or error.__context__
    return False


def describe(error: EngineError) -> str:
    """The message, and where in the file when the message does not say so itself."""
    where = [error.field] if error.field and error.field not in error.message else []
    if error.offset:  # 0 means the file as a whole
        where.append(f"byte {error.offset}")
    return error.message + (f" ({', '.join(where)})" if where else "")


def _fail(name: str, message: str, code: int, debug: bool) -> int:
    if debug:
        traceback.print_exc()
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        _closed_pipe()
    say(f"{name}: {message}")
    return code


def _closed_pipe() -> int:
    """Nobody reads our output any more: be quiet, also when Python flushes at exit."""
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, sys.stdout.fileno())
    os.close(null)
    return EXIT_PIPE


def say(text: str, end: str = "\n") -> None:
    """A line for the person at the terminal, on stderr; never fails."""
    try:
        sys.stderr.write(printable(text) + end)
        sys.stderr.flush()
    except (OSError, ValueError):
        pass


def use_utf8() -> None:
    """Output is UTF-8 whatever the locale; undecodable input stays recognisable (see :func:`check_utf8`).

    A standard stream that the caller closed (``<&-``) becomes an empty one.
    """
    for name, mode, errors in (
        ("stdin", "r", "surrogateescape"),
        ("stdout", "w", "replace"),
        ("stderr", "w", "backslashreplace"),
    ):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, open(os.devnull, mode, encoding="utf-8", errors=errors))  # noqa: SIM115
        elif hasattr(stream, "reconfigure"):
            stream.reconfigure(encoding="utf-8", errors=errors)


def check_utf8(text: str, what: str) -> str:
    """``text``, unless it came from bytes that are no UTF-8."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        at = len(text[: error.start].encode())
        raise UsageError(
            f"{what} is not valid UTF-8 (byte {at + 1}): convert it first, for example with iconv"
        ) from None
    return text


def state_folder() -> Path | None:
    """Where what is remembered between runs belongs: ``$XDG_STATE_HOME/pyengine``; None where there is no home."""
    base = os.environ.get("XDG_STATE_HOME", "")
    if os.path.isabs(base):  # the specification says to ignore others
        return Path(base, "pyengine")
    try:
        return Path.home() / ".local" / "state" / "pyengine"
    except RuntimeError:
        return None


def read_utf8(data: bytes, what: str) -> str:
    """Bytes from outside as text; a byte order mark is dropped."""
    return check_utf8(data.removeprefix(b"\xef\xbb\xbf").decode("utf-8", "surrogateescape"), what)


_BIDI = (*range(0x202A, 0x202F), *range(0x2066, 0x206A))  # embeddings, overrides, isolates
_CONTROL = {code: None for code in (*range(32), *range(0x7F, 0xA0), *_BIDI) if chr(code) not in "\n\t"}


def printable(text: str) -> str:
    """Text without control and direction-changing characters: a model or a file must not steer the terminal."""
    return text.translate(_CONTROL)


def can_draw(stream: TextIO) -> bool:
    """Whether a stream is a terminal that can go back and erase."""
    return stream.isatty() and os.environ.get("TERM", "" if os.name == "posix" else "ansi") not in (
        "",
        "dumb",
        "unknown",
    )


def columns(stream: TextIO) -> int:
    """Width of a terminal now."""
    try:
        return os.get_terminal_size(stream.fileno()).columns or 80
    except (OSError, ValueError):
        return 80


def fitted(text: str, width: int) -> str:
    """The beginning of a line that takes at most ``width`` columns."""
    for at, char in enumerate(text):
        width -= 2 if unicodedata.east_asian_width(char) in "WF" else not unicodedata.combining(char)
        if width < 0:
            return text[:at]
    return text


class Status:
    """A line on stderr that is overwritten and disappears; nothing at all where stderr cannot do that.

    The cursor waits at its beginning: wherever a terminal that was made narrower has put the rest of the line, erasing
    from there on hits it, and never anything that stood before.
    """

    def __init__(self, stream: TextIO | None = None) -> None:
        self._stream = stream or sys.stderr
        self._on = can_draw(self._stream)
        self._shown = ""

    def show(self, text: str, style: str = "") -> None:
        """``style``: the codes of an SGR sequence, such as ``"2"``."""
        text = fitted(printable(text), columns(self._stream) - 1) if self._on else ""
        if text != self._shown:
            self._shown = text
            self._write("\x1b[J" + (f"\x1b[{style}m{text}\x1b[0m" if style else text) + "\r")

    def clear(self) -> None:
        if self._shown:
            self._shown = ""
            self._write("\x1b[J")

    def _write(self, text: str) -> None:
        try:
            self._stream.write(text)
            self._stream.flush()
        except OSError:
            self._on = False


class Progress:
    """Equal steps on the status line, with the time that is left; the line goes when the ``with`` block ends."""

    def __init__(self, what: str, total: int) -> None:
        self._what, self._total, self._done = what, total, 0
        self._status = Status()
        self._start = time.monotonic()

    def advance(self, note: str = "") -> None:
        self._done += 1
        left = (time.monotonic() - self._start) / self._done * (self._total - self._done)
        self._status.show(f"{self._what} {self._done} of {self._total}{note}, {duration(left)} left")

    def __enter__(self) -> Progress:
        self._status.show(f"{self._what} 0 of {self._total}")
        return self

    def __exit__(self, *exc: object) -> None:
        self._status.clear()

    @property
    def seconds(self) -> float:
        """Since it began."""
        return time.monotonic() - self._start


def duration(seconds: float) -> str:
    """``0:07``, ``12:30``, ``3:02:01``."""
    minutes, s = divmod(round(seconds), 60)
    hours, m = divmod(minutes, 60)
    return f"{hours}:{m:02}:{s:02}" if hours else f"{m}:{s:02}"


class Leave(KeyboardInterrupt):
    """Ctrl-C a second time: the user means the program, not the answer."""


class Interrupt:
    """Ctrl-C while a ``with`` block runs: the first one calls ``cancel``, a second one raises :class:`Leave`.

    Does nothing outside the main thread or where the program was started with Ctrl-C ignored.
    """

    def __init__(self, cancel: Callable[[], object]) -> None:
        self._cancel = cancel
        self._old: Any = None
        self.count = 0

    def _handle(self, signum: int, frame: FrameType | None) -> None:
        self.count += 1
        self._cancel()
        if self.count > 1:
            raise Leave

    def __enter__(self) -> Interrupt:
        ignored = signal.getsignal(signal.SIGINT) == signal.SIG_IGN
        if threading.current_thread() is threading.main_thread() and not ignored:
            self._old = signal.signal(signal.SIGINT, self._handle)
        return self

    def __exit__(self, *exc: object) -> None:
        if self._old is not None:
            signal.signal(signal.SIGINT, self._old)


def in_background(
    items: Iterator[_T], cancel: Callable[[], object], idle: Callable[[], object] = lambda: None
) -> Generator[_T, None, None]:
    """The same items, produced by another thread, so that this one sees Ctrl-C at once even during long native calls.

    ``idle`` is called by this thread ten times a second while there is no item.
    When the consumer leaves early (an exception, ``close``), the producer is cancelled and waited for.
    """
    done = object()
    results: queue.SimpleQueue[Any] = queue.SimpleQueue()  # items, and done
    leaving = threading.Event()

    def produce() -> None:
        try:
            for item in items:
                results.put(item)
                if leaving.is_set():
                    return items.close() if isinstance(items, Generator) else None
        finally:
            results.put(done)

    worker = Task(produce, abandon=True)
    try:
        while True:
            try:
                item = results.get(timeout=0.1)  # a bound, because Windows delivers no signal to a blocked get
            except queue.Empty:
                if worker.alive or not results.empty():
                    idle()
                    continue
                item = done  # which it had no memory to say
            if item is done:
                return worker.result()
            yield item
    finally:
        leaving.set()
        if worker.alive:
            cancel()
            worker.wait(2.0)
