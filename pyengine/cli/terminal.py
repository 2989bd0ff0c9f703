"""A conversation at a terminal: reads messages and commands, answers them."""

from __future__ import annotations

import contextlib
import re
import sys
from typing import TYPE_CHECKING

from pyengine.cli import commands
from pyengine.cli.common import EXIT_OK, UsageError, check_utf8, describe, say
from pyengine.cli.console import Console, explain_end, play
from pyengine.errors import ContextFull, EngineError

if TYPE_CHECKING:
    from pyengine.cli.setup import Setup
    from pyengine.generate import Chat


def converse(setup: Setup, console: Console) -> int:
    """Until the user leaves; returns the exit code."""
    chat = setup.chat(console.reading)
    if sys.stderr.isatty():
        say("/help lists the commands; Ctrl-D leaves")
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401 - gives input() line editing

    def turn(line: str) -> int:
        """One answer; a failure is told and the conversation goes on. Returns 1 when Ctrl-C ended it."""
        before = len(chat.messages)
        try:
            end = play(chat.send(line), console.show, setup.session.cancel)
        except ContextFull as error:
            say(f"{error.message}. Your message was taken back; /clear starts afresh")
            return 0
        except EngineError as error:
            say(f"error: {describe(error)}. Your message was taken back")
            return 0
        finally:
            console.finish()
        explain_end(end, verbose=setup.args.verbose)
        stopped = end.reason == "cancelled"
        remarks = ["stopped"] * stopped
        remarks += ["your message was taken back, because no answer had begun"] * (len(chat.messages) == before)
        remarks += ["Ctrl-C again leaves"] * stopped
        if remarks:
            say(f"({'; '.join(remarks)})")
        return int(stopped)

    return _loop(chat, turn)


def _loop(chat: Chat, turn: commands.Turn) -> int:
    interrupts = 0  # since the last line
    while True:
        try:
            line = _read_line()
        except EOFError:
            say("")
            return EXIT_OK
        except KeyboardInterrupt:
            say("")
            if interrupts:
                raise
            interrupts = 1
            say("(Ctrl-C again or Ctrl-D leaves)")
            continue
        except UsageError as error:
            say(f"{error}; nothing was sent")
            continue
        interrupts = 0
        if re.fullmatch(r"/\w+", line.strip()):
            if commands.run(line.strip(), chat):
                return EXIT_OK
        elif line.strip():
            interrupts = turn(line)


def _read_line() -> str:
    """A line from the terminal. The prompt goes to stdout only where stdout is the terminal too."""
    if not sys.stdout.isatty():
        say(">>> ", end="")
    return check_utf8(input(">>> " if sys.stdout.isatty() else ""), "the line")
