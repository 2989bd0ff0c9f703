"""A conversation at a terminal: reads messages and commands, answers them."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

from pyengine.cli import commands
from pyengine.cli.common import EXIT_OK, Leave, UsageError, columns, describe, say, state_folder
from pyengine.cli.console import Console, explain_end, quiet_keys, table_of
from pyengine.cli.line_editor import open_line_editor
from pyengine.errors import ContextFull, EngineError

if TYPE_CHECKING:
    from pyengine.cli.setup import Setup
    from pyengine.generate import End


Past = tuple[list[dict[str, str]], int]
"""The messages of a chat, and how many of them the model no longer sees."""


def converse(setup: Setup, console: Console) -> int:
    """Until the user leaves; returns the exit code."""
    return Conversation(setup, console).run()


class Conversation:
    """What the loop and the commands share.

    Attributes:
        setup, console, chat, editor: the model, what draws, the messages, where new ones come from.
        end: how the last answer ended; None before the first.
        attached: texts of files that go before the next message.
        stats: show the numbers after every answer.
    """

    def __init__(self, setup: Setup, console: Console) -> None:
        self.setup = setup
        self.console = console
        self.chat = setup.chat(console.reading)
        folder = None if setup.args.no_history else state_folder()
        self.editor = open_line_editor(commands.complete, folder and folder / "history")
        self.end: End | None = None
        self.attached: list[str] = []
        self.stats = False
        self._stopped = False  # Ctrl-C was the last thing that happened

    def past(self) -> Past:
        """To go back to what is now."""
        return list(self.chat.messages), self.chat.dropped

    def run(self) -> int:
        self._greet()
        while True:
            try:
                with self.chat.reading_ahead():
                    text = self.editor.read()
                self._stopped = False
                commands.obey(text, self)
            except UsageError as error:
                self.console.remark(f"({error})")
            except EngineError as error:  # of a command
                self.console.remark(f"({describe(error)})")
            except BrokenPipeError:
                raise
            except OSError as error:
                self.console.remark(f"({error.filename or 'error'}: {error.strerror or error})")
            except EOFError:
                return EXIT_OK
            except Leave:
                raise
            except KeyboardInterrupt:
                if self._stopped:
                    raise
                self._stopped = True
                self.console.remark("(Ctrl-C again or Ctrl-D leaves)")

    def _greet(self) -> None:
        m, s = self.setup.model, self.setup.session
        about = [self.setup.path.name, f"{m.n_params / 1e6:,.1f} M parameters", f"context {s.n_ctx:,} tokens"]
        if sys.stderr.isatty():
            self.console.remark(", ".join(about) if columns(sys.stderr) > 60 else "\n".join(about))
            self.console.remark("/help lists the commands; Ctrl-D leaves")

    def send(self, text: str, *, instead_of: Past | None = None) -> None:
        """Has a message answered; a failure is told and the conversation goes on.

        ``instead_of``: what to go back to when no new answer begins.
        """
        chat = self.chat
        n_before = len(chat.messages)
        message = "\n\n".join(part for part in (*self.attached, text) if part)
        fate = "your message was taken back" if instead_of is None else "the earlier answer stays"
        try:
            with quiet_keys():
                self.end = end = self.console.answer(lambda: chat.send(message), self.setup.session.cancel)
        except EngineError as error:
            why = error.message if isinstance(error, ContextFull) else f"error: {describe(error)}"
            self.console.remark(f"({why}; {fate})")
            say("")
            return
        finally:
            kept = len(chat.messages) > n_before
            if kept:
                self.attached = []
            elif instead_of is not None:
                chat.messages, chat.dropped = instead_of
        explain_end(end, verbose=self.setup.args.verbose)
        if self.stats:
            self.console.remark(table_of(end.stats))
        self._stopped = end.reason == "cancelled"
        remarks = ["stopped"] * self._stopped
        remarks += [f"no answer had begun: {fate}"] * (not kept)
        remarks += ["Ctrl-C again leaves"] * self._stopped
        if remarks:
            self.console.remark(f"({'; '.join(remarks)})")
        say("")
