"""Reads messages from the terminal: with prompt_toolkit, or plain lines where that is missing or the terminal dumb.

A message is one line; a paste, of any length; or what stands between ``\"\"\"`` and ``\"\"\"``.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import select
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from pyengine.cli.common import UsageError, can_draw, check_utf8, say

if TYPE_CHECKING:
    from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent

PROMPT, MORE = ">>> ", "... "
_QUOTES = '"""'
_TALL, _LONG = 10, 2000  # a paste of more lines or characters stands in the line as a short name for itself
_PASTE_GAP = 0.1  # seconds: lines that come closer to each other than that were not typed

Complete = Callable[[str], Iterable[tuple[str, int]]]
"""For the text before the cursor: what may stand there, and how many characters of the text it replaces."""


class LineEditor(Protocol):
    """Where messages come from."""

    def read(self, prefill: str = "") -> str:
        """The next message, ``prefill`` being there to be edited. Errors: ``EOFError`` (Ctrl-D), ``KeyboardInterrupt``
        (Ctrl-C where there is no line to take back), ``UsageError`` (no UTF-8)."""
        ...


def open_line_editor(complete: Complete, history: Path | None) -> LineEditor:
    """The best that the terminal allows. ``history``: the file for lines of earlier days; None: none is kept."""
    if sys.stdin.isatty() and sys.stdout.isatty() and can_draw(sys.stdout):
        with contextlib.suppress(ImportError):
            return _Editor(complete, history)
    return _Lines()


def _is_unfinished(text: str) -> bool:
    return text.lstrip().startswith(_QUOTES) and text.count(_QUOTES) == 1


def _message(text: str) -> str:
    """Without the quotes around several lines."""
    try:
        check_utf8(text, "the message")
    except UsageError as error:
        raise UsageError(f"{error}; nothing was sent") from None
    found = re.fullmatch(r'\s*"""\n?(.*?)\n?"""\s*', text, re.DOTALL)
    return found[1] if found else text


class _Lines:
    """Whole lines from the terminal as it is."""

    def read(self, prefill: str = "") -> str:
        say((prefill and prefill + "\n") + PROMPT, end="")  # what cannot be edited can be read and typed anew
        try:
            text = self._line()
            while _is_unfinished(text):
                say(MORE, end="")
                text += "\n" + self._line()
        except (EOFError, KeyboardInterrupt):
            say("")  # ends the line
            raise
        return _message(text)

    def _line(self) -> str:
        """A line, and those that come right behind it: pasted ones."""
        lines = [self._raw_line()]
        if not lines[0]:
            raise EOFError
        while lines[-1].endswith(b"\n") and self._more_comes():
            lines.append(self._raw_line())
        return b"".join(lines).decode("utf-8", "surrogateescape").removesuffix("\n")

    def _more_comes(self) -> bool:
        try:
            return bool(select.select([sys.stdin.fileno()], [], [], _PASTE_GAP)[0])
        except OSError:  # Windows cannot wait for a console
            return False

    def _raw_line(self) -> bytes:
        """Up to the line break; Ctrl-D ends a line without one, and gives nothing where there is none."""
        try:
            return os.read(sys.stdin.fileno(), 1 << 16)
        except OSError as error:
            if error.errno == errno.EIO:  # the terminal is gone
                return b""
            raise


class _Editor:
    """prompt_toolkit's line editor: Enter sends, Alt-Enter begins a new line, Tab completes commands."""

    def __init__(self, complete: Complete, history: Path | None) -> None:
        from prompt_toolkit import PromptSession
        from prompt_toolkit.output.vt100 import Vt100_Output
        from prompt_toolkit.shortcuts import CompleteStyle

        from pyengine.cli.history import MessageHistory

        self._pastes: dict[str, str] = {}  # name -> text
        self._history = MessageHistory(history)
        output = None
        if os.name == "posix":
            output = Vt100_Output.from_pty(sys.stdout, term=os.environ.get("TERM"))
            output.enable_cpr = False  # terminals that do not say where the cursor is would be waited for
        self._session: PromptSession[str] = PromptSession(
            history=self._history,
            output=output,
            completer=_completer(complete),
            complete_while_typing=False,
            complete_style=CompleteStyle.READLINE_LIKE,
            reserve_space_for_menu=0,
            multiline=True,
            prompt_continuation=lambda width, line, wrapped: "" if wrapped else MORE,
            key_bindings=self._keys(),
            enable_suspend=True,
            enable_open_in_editor=True,
            tempfile_suffix=".txt",
        )

    def read(self, prefill: str = "") -> str:
        self._pastes.clear()
        while True:
            try:
                text = self._session.prompt(PROMPT, default=self._short(prefill))
            except KeyboardInterrupt:
                if prefill or not self._session.default_buffer.text:
                    raise
                continue  # it took the line back
            except OSError as error:
                if error.errno == errno.EIO:  # the terminal is gone
                    raise EOFError from None
                raise
            text = _message(self._whole(text))
            self._history.add(text)
            return text

    def _short(self, text: str) -> str:
        """The text, or a name for it in the line."""
        lines = len(text.splitlines())
        if lines <= _TALL and len(text) <= _LONG:
            return text
        size = f"{lines:,} lines" if lines > 1 else f"{len(text):,} characters"
        name = f"[paste {len(self._pastes) + 1}: {size}]"
        self._pastes[name] = text
        return name

    def _whole(self, text: str) -> str:
        """With the pastes in place of their names."""
        names = "|".join(map(re.escape, self._pastes))
        return re.sub(names, lambda found: self._pastes[found[0]], text) if names else text

    def _keys(self) -> KeyBindings:
        from prompt_toolkit.key_binding import KeyBindings
        from prompt_toolkit.keys import Keys

        keys = KeyBindings()

        @keys.add("enter")
        def send(event: KeyPressEvent) -> None:
            buffer = event.current_buffer
            if _is_unfinished(buffer.text):
                buffer.insert_text("\n")
            else:
                buffer.cursor_position = len(buffer.text)
                buffer.validate_and_handle()

        @keys.add("escape", "enter")
        def new_line(event: KeyPressEvent) -> None:
            event.current_buffer.insert_text("\n")

        @keys.add(Keys.BracketedPaste)
        def paste(event: KeyPressEvent) -> None:
            text = event.data.replace("\r\n", "\n").replace("\r", "\n")
            event.current_buffer.insert_text(self._short(text))

        @keys.add("backspace")
        def delete(event: KeyPressEvent) -> None:
            before = event.current_buffer.document.text_before_cursor
            name = next((name for name in self._pastes if before.endswith(name)), " ")
            event.current_buffer.delete_before_cursor(len(name))

        return keys


def _completer(complete: Complete) -> Any:
    from prompt_toolkit.completion import Completer, Completion
    from prompt_toolkit.document import Document

    class Commands(Completer):
        def get_completions(self, document: Document, event: object) -> Iterable[Completion]:
            for text, replaced in complete(document.text_before_cursor):
                yield Completion(text, start_position=-replaced)

    return Commands()
