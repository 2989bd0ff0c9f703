"""The commands of a conversation: lines that begin with a slash."""

from __future__ import annotations

import difflib
import os
import re
import sys
import textwrap
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from pyengine.cli.common import UsageError, columns, printable, read_utf8, say
from pyengine.cli.console import THINK, table_of
from pyengine.cli.options import SETTINGS, changed, described
from pyengine.errors import EngineError

if TYPE_CHECKING:
    from pyengine.cli.terminal import Conversation

_MOST_BYTES = 16 << 20  # of a file to read: more than any context holds
_LIMITS = {"n-predict": ("max_tokens", 1), "think-budget": ("think_budget", 0), "loop-limit": ("loop_limit", 1)}


@dataclass(frozen=True)
class Command:
    """``values``: what Tab offers after the name; ``None``: names of files."""

    name: str
    argument: str
    help: str
    run: Callable[[Conversation, str], None]
    values: tuple[str, ...] | None = ()
    takes_text: bool = False  # the argument may have several lines


def obey(text: str, talk: Conversation) -> None:
    """Does the command, or sends the message, that a text from the terminal is.

    Errors: ``UsageError`` for what cannot be done; ``EOFError`` when the user leaves.
    """
    found = re.match(r"(/[A-Za-z?]+)(?:\s+(.*))?\Z", text.rstrip(), re.DOTALL)
    name, argument = (found[1], found[2] or "") if found else ("", "")
    command = _BY_NAME.get(name)
    one_line = "\n" not in text.rstrip()
    if command is not None and (one_line or command.takes_text):
        command.run(talk, argument)
    elif name and one_line:
        close = difflib.get_close_matches(name, _BY_NAME, 1)
        hint = f"did you mean {close[0]}?" if close else "/help lists them; a space before it makes it a message"
        raise UsageError(f"unknown command {name}: {hint}")
    elif text.strip() or talk.attached:
        talk.send(text)


def complete(text: str) -> Iterator[tuple[str, int]]:
    """What Tab offers behind ``text``: (text, how many characters it replaces)."""
    name, space, typed = text.partition(" ")
    if not space:
        yield from ((c.name, len(name)) for c in COMMANDS if c.name.startswith(name) and name.startswith("/"))
        return
    command = _BY_NAME.get(name)
    if command is None:
        return
    offered = _files(typed) if command.values is None else iter(command.values)
    yield from ((value, len(typed)) for value in offered if value.startswith(typed))


def _files(typed: str) -> Iterator[str]:
    folder, slash, _ = typed.rpartition("/")
    try:
        entries = sorted(os.scandir(os.path.expanduser(folder + slash) or "."), key=lambda entry: entry.name)
    except OSError:
        return
    for entry in entries:
        if not entry.name.startswith(".") or typed.rpartition("/")[2].startswith("."):
            yield folder + slash + entry.name + "/" * entry.is_dir()


# ---- the commands ----


def _help(talk: Conversation, argument: str) -> None:
    width = columns(sys.stderr) - 1
    usages = [f"{command.name} {command.argument}".rstrip() for command in COMMANDS]
    indent = max(map(len, usages)) + 2
    for usage, command in zip(usages, COMMANDS, strict=True):
        if width < 2 * indent:
            say(usage)
            say(textwrap.fill(command.help, width, initial_indent="    ", subsequent_indent="    "))
        else:
            first, rest = usage.ljust(indent), " " * indent
            say(textwrap.fill(command.help, width, initial_indent=first, subsequent_indent=rest))
    say("")
    say(textwrap.fill(_KEYS, width))


_KEYS = (
    "Enter sends, Alt-Enter begins a new line, a paste is one message, and so is what stands between "
    '""" and """. Ctrl-C stops an answer, pressed again it leaves; Ctrl-D leaves.'
)


def _clear(talk: Conversation, argument: str) -> None:
    talk.chat.clear()
    talk.attached = []
    talk.console.remark("(a new conversation)")


def _undo(talk: Conversation, argument: str) -> None:
    if talk.attached:
        talk.attached = []
        talk.console.remark("(the file was put away)")
    else:
        talk.console.remark("(taken back)" if talk.chat.undo() else "(nothing to take back)")


def _last_message(talk: Conversation) -> str:
    for message in reversed(talk.chat.messages):
        if message["role"] == "user":
            return message["content"]
    raise UsageError("there is no message yet")


def _regen(talk: Conversation, argument: str) -> None:
    text, before = _last_message(talk), talk.past()
    if talk.chat.settings.seed is not None:
        talk.console.remark("(the seed is fixed, so this is the same answer again; /set seed -1 draws a new one)")
    talk.chat.undo()
    talk.send(text, instead_of=before)


def _edit(talk: Conversation, argument: str) -> None:
    text, before = _last_message(talk), talk.past()
    try:
        text = talk.editor.read(prefill=text)
    except KeyboardInterrupt:
        text = ""
    if not text.strip():
        talk.console.remark("(left as it was)")
        return
    talk.chat.undo()
    talk.send(text, instead_of=before)


def _system(talk: Conversation, argument: str) -> None:
    if argument:
        talk.chat.system = None if argument == "-" else argument
    say(f"system prompt: {talk.chat.system}" if talk.chat.system is not None else "(no system prompt)")


def _set(talk: Conversation, argument: str) -> None:
    name, _, value = argument.replace("=", " ", 1).partition(" ")
    name, value = name.lstrip("-").replace("_", "-"), value.strip()
    if not name:
        talk.console.tell(_settings(talk))
    elif not value:
        raise UsageError(f"/set {name} needs a value")
    elif name in _LIMITS:
        attribute, least = _LIMITS[name]
        setattr(talk.chat, attribute, _limit(name, value, least))
    elif name in SETTINGS:
        talk.chat.settings = changed(talk.chat.settings, name, value)
    else:
        close = difflib.get_close_matches(name, [*SETTINGS, *_LIMITS], 1)
        raise UsageError(f"there is no setting {name}" + (f": did you mean {close[0]}?" if close else ""))


def _limit(name: str, value: str, least: int) -> int | None:
    if value in ("-1", "off", "none") or (value == "0" and least > 0):
        return None
    if not re.fullmatch(r"\d{1,9}", value):
        raise UsageError(f"{name} is {value!r}; expected a whole number, at least {least}, or off")
    return int(value)


def _settings(talk: Conversation) -> str:
    limits = {name: getattr(talk.chat, attribute) for name, (attribute, _) in _LIMITS.items()}
    own = (f"{name} {'off' if value is None else value}" for name, value in limits.items())
    return ", ".join([*described(talk.chat.settings), *own])


def _show(talk: Conversation, argument: str) -> None:
    chat, setup = talk.chat, talk.setup
    if argument == "template":
        say(chat.template.source)
    elif argument == "messages":
        for message in chat.messages:
            say(f"[{message['role']}]\n{message['content']}\n")
    elif argument:
        raise UsageError(f"/show {argument}: expected nothing, template or messages")
    else:
        m, s = setup.model, setup.session
        lines = [
            f"model     {setup.path.name}: {m.architecture}, {m.n_params / 1e6:,.1f} M parameters",
            f"context   {len(s):,} of {s.n_ctx:,} tokens used; KV {s.kv_type}, {s.threads} threads",
            f"template  {chat.template.origin}",
            f"system    {chat.system or '(none)'}",
            f"messages  {len(chat.messages)}",
            f"thinking  {talk.console.think}",
            _settings(talk),
        ]
        talk.console.tell("\n".join(lines))


def _stats(talk: Conversation, argument: str) -> None:
    if argument in ("on", "off"):
        talk.stats = argument == "on"
        talk.console.remark(f"(numbers after every answer: {argument})")
    elif argument:
        raise UsageError(f"/stats {argument}: expected nothing, on or off")
    elif talk.end is None:
        raise UsageError("there is no answer yet")
    else:
        talk.console.tell(table_of(talk.end.stats))


def _save(talk: Conversation, argument: str) -> None:
    from pyengine.chat_file import read_chat, save_chat

    path, rest = _path_and_rest(argument)
    if rest not in ("", "--text"):
        raise UsageError(f"/save: expected FILE, or FILE --text, not {rest!r} behind it (quote a name with spaces)")
    if path.exists():
        try:
            read_chat(path)
        except EngineError as error:
            raise UsageError(f"{path} exists and is not replaced: {error.message}") from None
    talk.console.progress("saving")
    save_chat(path, talk.chat, keys=not rest)
    tokens = 0 if rest else len(talk.setup.session)
    size = f"{path.stat().st_size / 2**20:,.1f} MiB"
    talk.console.remark(f"({path}: {len(talk.chat.messages)} messages, the keys of {tokens:,} tokens, {size})")


def _load(talk: Conversation, argument: str) -> None:
    from pyengine.chat_file import restore_chat

    path, rest = _path_and_rest(argument)
    if rest:
        raise UsageError(f"/load: expected FILE, not {rest!r} behind it (quote a name with spaces)")
    talk.console.progress("loading")
    restored = restore_chat(path, talk.chat)
    talk.attached, talk.end = [], None
    note = f"; {restored.note}" if restored.note else ""
    talk.console.remark(f"({path}: {restored.messages} messages, the keys of {restored.tokens:,} tokens{note})")


def _read(talk: Conversation, argument: str) -> None:
    path, words = _path_and_rest(argument)
    text = _file_text(path)
    talk.attached.append(text.strip("\r\n"))
    lines = text.count("\n") + (not text.endswith("\n"))
    if words:
        talk.send(words)
    else:
        talk.console.remark(f"({path.name}: {lines:,} lines, {len(text):,} characters; goes before your next message)")


def _path_and_rest(argument: str) -> tuple[Path, str]:
    """A path with spaces needs quotes, unless the whole argument is one."""
    if not argument:
        raise UsageError("which file?")
    name, rest = argument, ""
    if not os.path.exists(os.path.expanduser(name)):  # which takes any text, unlike Path
        if name[0] in "'\"":
            name, _, rest = argument[1:].partition(argument[0])
        else:
            name, _, rest = re.sub(r"\s+", " ", argument, count=1).partition(" ")
    return Path(os.path.expanduser(name)), rest.strip()


def _file_text(path: Path) -> str:
    try:
        if not path.is_file():
            raise UsageError(f"{path} is {'no regular file' if path.exists() else 'not there'}")
        if path.stat().st_size > _MOST_BYTES:
            raise UsageError(f"{path} has {path.stat().st_size:,} bytes; no context holds more than {_MOST_BYTES:,}")
        text = read_utf8(path.read_bytes(), str(path))
    except OSError as error:
        raise UsageError(f"{path}: {error.strerror}") from None
    if not text.strip():
        raise UsageError(f"{path} is empty")
    return text


def _think(talk: Conversation, argument: str) -> None:
    if argument in THINK:
        talk.console.think = argument
        talk.console.remark(f"(reasoning: {argument})")
    elif argument:
        raise UsageError(f"/think {argument}: expected nothing or one of {', '.join(THINK)}")
    elif not talk.console.thought.strip():
        raise UsageError("the last answer had no reasoning")
    else:
        talk.console.remark(printable(talk.console.thought.strip()))


def _bye(talk: Conversation, argument: str) -> None:
    raise EOFError


COMMANDS = (
    Command("/help", "", "this list", _help),
    Command("/clear", "", "forget the conversation; the system prompt stays", _clear),
    Command("/undo", "", "take back your last message and its answer", _undo),
    Command("/regen", "", "answer your last message again", _regen),
    Command("/edit", "", "change your last message and send it again", _edit),
    Command("/system", "[TEXT | -]", "show, set or remove the system prompt", _system, takes_text=True),
    Command("/set", "[NAME VALUE]", "show or change how tokens are chosen", _set, (*SETTINGS, *_LIMITS)),
    Command("/show", "[messages | template]", "the model, the context, all settings", _show, ("messages", "template")),
    Command("/stats", "[on | off]", "numbers of the last answer, or of every one", _stats, ("on", "off")),
    Command("/save", "FILE [--text]", "keep the conversation; --text: without what the model has read", _save, None),
    Command("/load", "FILE", "go on with a kept conversation", _load, None),
    Command("/read", "FILE [MESSAGE]", "put a text file before your message, or the next", _read, None, True),
    Command("/think", "[show | dim | hide]", "the last reasoning in full, or how to show it", _think, THINK),
    Command("/bye", "", "leave", _bye),
)
_BY_NAME = {command.name: command for command in COMMANDS} | {"/exit": COMMANDS[-1], "/quit": COMMANDS[-1]}
