"""What ``pyengine-run`` draws: the answer on stdout; reasoning and progress on stderr. Output is only ever appended."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from pyengine.cli.common import Interrupt, Status, in_background, printable, say

if TYPE_CHECKING:
    from pyengine.generate import End, Event, Shifted


def play(events: Iterator[Event], show: Callable[[Event], None], cancel: Callable[[], object]) -> End:
    """Shows a generation; Ctrl-C cancels it (its ``End`` comes then), twice raises ``KeyboardInterrupt``."""
    from pyengine.generate import End

    stream = in_background(events, cancel)
    with Interrupt(cancel), contextlib.closing(stream):
        for event in stream:
            show(event)
            if isinstance(event, End):
                return event
    raise AssertionError("a generation always ends with End")


class Console:
    """Shows events: the answer on stdout, reasoning on stderr, dimmed on a terminal.

    ``exact``: keeps the line breaks that an answer begins with.
    """

    def __init__(self, *, think: str | None, exact: bool = False) -> None:
        self._status = Status()
        self._show_reasoning = sys.stderr.isatty() if think is None else think == "show"
        self._exact = exact
        self._dim = sys.stderr.isatty() and not os.environ.get("NO_COLOR")
        self._clean = sys.stdout.isatty()
        self._reasoning_open = self._answer_open = False
        self._fresh_line = True  # of stdout

    def reading(self, done: int, total: int) -> None:
        """The prompt: ``done`` of ``total`` tokens are evaluated."""
        if done:
            self._status.show(f"reading {done} of {total} tokens")

    def show(self, event: Event) -> None:
        from pyengine.generate import Reasoning, Shifted, Text

        self._status.clear()
        if isinstance(event, Shifted):
            say(explain_shift(event))
        elif isinstance(event, Reasoning):
            if self._show_reasoning:
                self._open_reasoning()
                say(event.text, end="")
        elif isinstance(event, Text):
            self._close_reasoning()
            text = event.text if self._answer_open or self._exact else event.text.lstrip("\r\n")
            if text:
                self._answer_open = True
                self._fresh_line = text.endswith("\n")
                sys.stdout.write(printable(text) if self._clean else text)
                sys.stdout.flush()

    def finish(self) -> None:
        """The end of an answer, however it came: leaves both streams at the beginning of a line."""
        self._status.clear()
        self._close_reasoning()
        self._answer_open = False
        if not self._fresh_line:
            self._fresh_line = True
            sys.stdout.write("\n")
            sys.stdout.flush()

    def _open_reasoning(self) -> None:
        if not self._reasoning_open and self._dim:
            _escape("\x1b[2m")
        self._reasoning_open = True

    def _close_reasoning(self) -> None:
        if self._reasoning_open:
            self._reasoning_open = False
            if self._dim:
                _escape("\x1b[0m")
            say("\n")


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
    if verbose:
        say(
            f"prompt: {s.prompt_tokens} tokens, {s.reused_tokens} reused, {s.prefill_rate:.1f} tokens/s; "
            f"answer: {s.generated_tokens} tokens ({s.reasoning_tokens} reasoning), {s.decode_rate:.1f} tokens/s; "
            f"context {s.context_used} of {s.context_size}; seed {s.seed}; end: {end.reason}"
        )
        if s.drafted_tokens:
            say(f"speculation: {s.accepted_tokens} of {s.drafted_tokens} guesses were right")


def _escape(code: str) -> None:
    with contextlib.suppress(OSError):
        sys.stderr.write(code)
