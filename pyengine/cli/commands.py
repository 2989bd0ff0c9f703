"""The commands of a conversation: lines that begin with a slash."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from pyengine.cli.common import say

if TYPE_CHECKING:
    from pyengine.generate import Chat

Turn = Callable[[str], int]
_HELP = """\
/clear   forget the conversation     /undo   take back your last message and its answer
/help    this list                   /bye    leave (also Ctrl-D)
Ctrl-C stops an answer; pressed again it leaves."""


def run(line: str, chat: Chat) -> bool:
    """Does a /command; True means leave."""
    if line in ("/bye", "/exit", "/quit"):
        return True
    if line == "/help":
        say(_HELP)
    elif line == "/clear":
        chat.clear()
        say("(a new conversation)")
    elif line == "/undo":
        say("(taken back)" if chat.undo() else "(nothing to take back)")
    else:
        say(f"unknown command {line}; /help lists them")
    return False
