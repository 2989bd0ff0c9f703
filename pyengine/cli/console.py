"""What ``pyengine-run`` draws: the answer on stdout; reasoning, progress and remarks on stderr.

Output is only ever appended, but for one status line, so that a terminal's history holds the conversation whatever its
size becomes.
"""

from __future__ import annotations

import contextlib
import os
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Literal, TextIO

from pyengine.cli.common import Interrupt, Status, can_draw, columns, duration, fitted, in_background, printable, say

if TYPE_CHECKING:
    from pyengine.generate import End, Event, Shifted, Stats

Think = Literal["show", "dim", "hide"]
THINK: tuple[Think, ...] = ("show", "dim", "hide")
_DIM = "2"
_PATIENCE = 0.5  # seconds without a word before progress is shown
_CALM = 0.1  # seconds between two drawings of the status line
_NARROW = 60  # columns below which the status line is a counter only


class Console:
    """Draws the events of answers. All but :meth:`reading` is for the main thread.

    Args:
        think: reasoning: ``show`` all of it, ``dim`` a line that follows it and ends as "thought for 12.3 s, 341
            tokens", ``hide`` nothing; None: ``dim`` on a terminal, else ``hide``.
        exact: keeps the line breaks that an answer begins with.

    Attributes:
        think: as above; may be changed between answers.
        thought: the reasoning of the last answer.
    """

    def __init__(self, *, think: Think | None, exact: bool = False) -> None:
        self.think: Think = think or ("dim" if sys.stderr.isatty() else "hide")
        self.thought = ""
        self._exact = exact
        self._status = Status()
        self._dim = can_dim(sys.stderr)
        self._clean = sys.stdout.isatty()
        self._fresh_line = True  # of stdout
        self._begin()

    def answer(
        self,
        start: Callable[[], Iterator[Event]],
        cancel: Callable[[], object],
        show: Callable[[Event], None] | None = None,
    ) -> End:
        """Shows a generation; Ctrl-C cancels it (its ``End`` comes then), a second one raises ``Leave``.

        Args:
            start: begins it, in another thread, because already the tokens of a long prompt take a while.
            cancel: ends it early.
            show: takes the events instead of :meth:`show`.
        """
        from pyengine.generate import End

        def events() -> Iterator[Event]:
            yield from start()

        self._begin()
        stream = in_background(events(), cancel, self.idle)
        with Interrupt(cancel), contextlib.closing(stream):
            try:
                for event in stream:
                    if show is None:
                        self.show(event)
                    else:
                        self._answering = True
                        self._status.clear()
                        show(event)
                    if isinstance(event, End):
                        return event
            finally:
                self._finish()
        raise AssertionError("a generation always ends with End")

    def _begin(self) -> None:
        self.thought = ""
        self._start = self._begun = time.monotonic()  # of all, and of the evaluation
        self._read = (0, 0, self._start)  # tokens done and to do, and when
        self._thinking_since: float | None = None
        self._n_thought = 0  # tokens
        self._line = ""  # of the thought, for the status line
        self._drawn = 0.0  # when
        self._answering = False

    def reading(self, done: int, total: int) -> None:
        """From any thread: ``done`` of the ``total`` tokens that the prompt adds are evaluated."""
        now = time.monotonic()
        if not done:
            self._begun = now
        self._read = (done, total, now)

    def idle(self) -> None:
        """Nothing new: shows how far the prompt is, with the time that is left."""
        now = time.monotonic()
        if self._thinking_since is not None:
            self._follow_thought(now)
        elif not self._answering and now - self._start > _PATIENCE:
            self._status.show(self._progress(now))

    def _progress(self, now: float) -> str:
        done, total, at = self._read
        if not done:
            return f"reading {total:,} tokens" if total else "reading"
        seconds = (at - self._begun) / done * (total - done) - (now - at)
        return f"reading {done:,}/{total:,} tokens, {duration(max(0.0, seconds))} left"

    def show(self, event: Event) -> None:
        from pyengine.generate import Reasoning, Shifted, Text

        if isinstance(event, Shifted):
            self._break_line()
            self.remark(explain_shift(event))
        elif isinstance(event, Reasoning):
            self._think(event.text, len(event.tokens))
        elif isinstance(event, Text):
            self._end_thought()
            text = event.text if self._answering or self._exact else event.text.lstrip("\r\n")
            if text:
                self._status.clear()
                self._answering = True
                self._fresh_line = text.endswith("\n")
                sys.stdout.write(printable(text) if self._clean else text)
                sys.stdout.flush()

    def _finish(self) -> None:
        """The end of an answer, however it came: leaves both streams at the beginning of a line."""
        self._end_thought()
        self._status.clear()
        self._break_line()

    def _break_line(self) -> None:
        if not self._fresh_line:
            self._fresh_line = True
            sys.stdout.write("\n")
            sys.stdout.flush()

    def progress(self, text: str) -> None:
        """What is being done, until the next output."""
        self._status.show(text)

    def tell(self, text: str) -> None:
        """Lines that were asked for, broken between words."""
        self._status.clear()
        width = max(20, columns(sys.stderr) - 1)
        say("\n".join(textwrap.fill(line, width, break_on_hyphens=False) for line in text.splitlines()))

    def remark(self, text: str) -> None:
        """Lines of ours in the conversation, faint."""
        self._status.clear()
        with self._dimmed():
            self.tell(text)

    def _think(self, text: str, n_tokens: int) -> None:
        if self._thinking_since is None:
            self._status.clear()
            self._thinking_since = time.monotonic()
        self.thought += text
        self._n_thought += n_tokens
        if self.think == "show":
            with self._dimmed():
                say(text, end="")
        elif self.think == "dim":
            self._line = _last_line(self._line, text, columns(sys.stderr) - len(self._clock(0.0)) - 3)
        now = time.monotonic()
        if now - self._drawn > _CALM:
            self._follow_thought(now)

    def _follow_thought(self, now: float) -> None:
        if self.think == "show" or self._thinking_since is None:
            return
        self._drawn = now
        line = "" if columns(sys.stderr) < _NARROW else self._line.strip()
        self._status.show(self._clock(now - self._thinking_since) + (f"  {line}" if line else ""), self._style())

    def _clock(self, seconds: float) -> str:
        return f"thinking, {seconds:2.0f} s, {self._n_thought:,} tokens"

    def _end_thought(self) -> None:
        if self._thinking_since is None:
            return
        seconds = time.monotonic() - self._thinking_since
        self._thinking_since = None
        self._status.clear()
        if self.think == "show":
            say("\n" if self.thought and not self.thought.endswith("\n") else "")
        if sys.stderr.isatty() and self.think != "hide":
            self.remark(f"thought for {seconds:.1f} s, {self._n_thought:,} tokens")

    def _style(self) -> str:
        return _DIM if self._dim else ""

    @contextlib.contextmanager
    def _dimmed(self) -> Iterator[None]:
        if self._dim:
            _escape(f"\x1b[{_DIM}m")
        try:
            yield
        finally:
            if self._dim:
                _escape("\x1b[0m")


def _last_line(line: str, text: str, width: int) -> str:
    """What a line of ``width`` columns shows of a text when it is filled from the left, and begun anew when full."""
    for char in printable(text):
        if char == "\n":
            line = line if line.endswith("\n") or not line else line + "\n"  # stays until something follows
            continue
        if line.endswith("\n"):
            line = ""
        if char == "\t" or (char == " " and not line):
            char = " " if line else ""
        if fitted(line + char, width) != line + char:
            line = line.rpartition(" ")[2] if " " in line and char != " " else ""
        line += char
    return line


def can_dim(stream: TextIO) -> bool:
    """Whether a terminal knows faint letters, and the user wants such things (``NO_COLOR``)."""
    if os.environ.get("NO_COLOR") or not can_draw(stream):
        return False
    try:
        import curses

        curses.setupterm(fd=stream.fileno())
        return curses.tigetstr("dim") is not None
    except ImportError:  # Windows
        return True
    except (curses.error, OSError, ValueError):  # a terminal that nobody has described
        return False


def _escape(code: str) -> None:
    with contextlib.suppress(OSError):
        sys.stderr.write(code)


@contextlib.contextmanager
def quiet_keys() -> Iterator[None]:
    """What is typed meanwhile is not echoed into the answer; it waits for the next prompt."""
    try:
        import termios
    except ImportError:  # Windows
        yield
        return
    try:
        before = termios.tcgetattr(sys.stdin.fileno())
    except (termios.error, OSError, ValueError):
        yield
        return
    quiet = [*before]
    quiet[3] &= ~termios.ECHO
    termios.tcsetattr(sys.stdin.fileno(), termios.TCSANOW, quiet)
    try:
        yield
    finally:
        with contextlib.suppress(termios.error):
            termios.tcsetattr(sys.stdin.fileno(), termios.TCSANOW, before)


def explain_shift(event: Shifted) -> str:
    """What a person must know when turns are dropped."""
    return (
        f"(the context of {event.context_size} tokens is full: the model no longer sees the {event.dropped_messages} "
        f"oldest messages, {event.freed_tokens} tokens; the other {event.prompt_tokens} are read again)"
    )


def explain_end(end: End, *, verbose: bool) -> None:
    """What a person must know about how an answer ended, on stderr; ``verbose``: and its numbers."""
    s = end.stats
    if end.reason == "context":
        say(
            f"pyengine-run: the context of {s.context_size} tokens is full (prompt {s.prompt_tokens}, answer "
            f"{s.generated_tokens}): the answer is cut off; --ctx-size makes it larger"
        )
    if end.reason == "loop":
        say("pyengine-run: the answer was repeating itself word for word and was ended; --loop-limit 0 lets it go on")
    elif s.thought_looped:
        say("pyengine-run: the thought was repeating itself word for word and was closed; --loop-limit 0 lets it go on")
    if verbose:
        say(
            f"prompt: {s.prompt_tokens} tokens, {s.reused_tokens} reused, {s.prefill_rate:.1f} tokens/s; "
            f"answer: {s.generated_tokens} tokens ({s.reasoning_tokens} reasoning), {s.decode_rate:.1f} tokens/s; "
            f"context {s.context_used} of {s.context_size}; seed {s.seed}; end: {end.reason}"
        )
        if s.drafted_tokens:
            say(f"speculation: {s.accepted_tokens} of {s.drafted_tokens} guesses were right")


def table_of(s: Stats) -> str:
    """The numbers of an answer for a person."""
    new = s.prompt_tokens - s.reused_tokens
    lines = [
        f"prompt   {s.prompt_tokens:,} tokens: {s.reused_tokens:,} kept, {new:,} new, read in "
        f"{s.prefill_seconds:.2f} s ({s.prefill_rate:.1f} tokens/s)",
        f"answer   {s.generated_tokens:,} tokens, {s.reasoning_tokens:,} of them thought, in {s.decode_seconds:.2f} s "
        f"({s.decode_rate:.1f} tokens/s)",
        f"context  {s.context_used:,} of {s.context_size:,} tokens",
        f"seed     {s.seed}",
    ]
    if s.drafted_tokens:
        lines.append(f"guesses  {s.accepted_tokens:,} of {s.drafted_tokens:,} right")
    return "\n".join(lines)
