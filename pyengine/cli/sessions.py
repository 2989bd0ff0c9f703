"""``--session NAME``: a conversation that goes on another day.

Two files in ``$XDG_STATE_HOME/pyengine/sessions`` (else ``~/.local/state/...``), which nobody else may read:
``NAME.chat`` has messages and settings and is written after every turn; ``NAME.keys`` has what the model has read and
is written when the program ends. Keys that are older than the messages serve as far as the text agrees, so whatever
happens in between costs time, never text. ``NAME.lock`` keeps a second process out.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import glob
import os
import re
from typing import TYPE_CHECKING, BinaryIO, Self

from pyengine.cli.common import Status, UsageError, describe, say, state_folder
from pyengine.cli.options import sampler_settings
from pyengine.errors import EngineError, FileError

if TYPE_CHECKING:
    from pyengine.generate import Chat

_NAME = re.compile(r"\w[\w.-]{0,59}")


def check_name(name: str) -> str:
    """The name, if it can be one. Errors: ``UsageError``."""
    if not _NAME.fullmatch(name) or len(name.encode("utf-8", "surrogateescape")) > 200:
        raise UsageError(f"--session: {name!r} is no name; expected at most 60 letters, digits, '.', '_' and '-'")
    return name


class NamedSession:
    """Keeps ``chat`` under ``args.session``: restores it now, saves messages after every turn and keys at the end.

    A context manager. Options given on the command line prevail over what was saved.

    Errors: ``FileError`` (in use by another process, no permission), ``FormatError`` (damaged or foreign),
    ``InvalidArgument`` (of another model). None of them changes a file.
    """

    def __init__(self, chat: Chat, args: argparse.Namespace) -> None:
        self.name: str = args.session
        self._chat = chat
        state = state_folder()
        if state is None:
            raise FileError("--session has no place: set XDG_STATE_HOME or HOME", code="no_directory")
        self._folder = state / "sessions"
        self._path, self._keys = (self._folder / f"{self.name}.{kind}" for kind in ("chat", "keys"))
        self._known: list[int] = []  # tokens whose keys the file has
        self._complained = False
        self._lock = self._take_lock()
        try:
            self._remove_unfinished()
            if self._path.exists():
                self._restore(args)
        except BaseException:
            self._lock.close()
            raise
        chat.on_kept = self.save_messages

    def _take_lock(self) -> BinaryIO:
        path = self._folder / f"{self.name}.lock"
        try:
            self._folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            file = open(os.open(path, os.O_RDWR | os.O_CREAT, 0o600), "r+b")  # noqa: SIM115 - closed by __exit__
        except OSError as error:
            raise FileError(f"cannot keep the session in {path}: {error.strerror}", code="cannot_write") from error
        if not _locked(file):
            owner = file.read(20).decode("ascii", "replace").strip()
            file.close()
            raise FileError(
                f"the session {self.name!r} is in use by another process" + (f" ({owner})" if owner.isdigit() else ""),
                code="in_use",
            )
        file.truncate(0)
        file.write(b"%d\n" % os.getpid())
        file.flush()
        return file

    def _remove_unfinished(self) -> None:
        """What a process left that was killed while it wrote."""
        for kind in ("chat", "keys"):
            for part in self._folder.glob(f".{glob.escape(self.name)}.{kind}.*.part"):
                with contextlib.suppress(OSError):
                    part.unlink()

    def _restore(self, args: argparse.Namespace) -> None:
        from pyengine.chat_file import read_chat, restore_chat, restore_keys

        chat = self._chat
        given = {
            "system": args.system is not None,
            "template": args.chat_template is not None,
            "max_tokens": args.n_predict != -1,
            "stop": bool(args.stop),
            "think_budget": args.think_budget is not None,
        }
        saved = read_chat(self._path).settings
        restored = restore_chat(self._path, chat, keys=False, keep=tuple(name for name in given if given[name]))
        fields = dataclasses.fields(saved)
        chat.settings = sampler_settings(args, {field.name: getattr(saved, field.name) for field in fields})
        tokens, note = 0, ""
        if self._keys.exists():
            try:
                _, tokens, note = restore_keys(self._keys, chat.session)
                self._known = chat.session.tokens
            except EngineError as error:
                note = f"{describe(error)}: the conversation is read again"
        said = f"session {self.name}: {restored.messages} messages, {tokens} tokens known"
        say(f"({said})" if not note else f"({said}; {note})")

    def save_messages(self) -> None:
        """Writes the conversation; a failure is told once and loses nothing of the file."""
        from pyengine.chat_file import save_chat

        try:
            save_chat(self._path, self._chat, keys=False)
            self._complained = False
        except EngineError as error:
            if not self._complained:
                say(f"the session {self.name} is not saved: {describe(error)}")
            self._complained = True

    def _save_keys(self) -> None:
        from pyengine.chat_file import save_keys

        session = self._chat.session
        tokens = session.tokens
        if not tokens or tokens == self._known:
            return
        status = Status()
        try:
            status.show(f"saving what {len(tokens)} tokens left in the model's memory")
            save_keys(self._keys, session)
        except EngineError as error:
            say(f"the keys of session {self.name} are not saved, it will be read again: {describe(error)}")
        finally:
            status.clear()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self._chat.on_kept = None
        try:
            if self._path.exists() or len(self._chat.messages) > self._chat.n_system:
                self.save_messages()
                self._save_keys()
        finally:
            self._lock.close()  # which unlocks it


def _locked(file: BinaryIO) -> bool:
    """Locks the file until it is closed; False when another process has it."""
    try:
        import fcntl
    except ImportError:  # Windows
        import msvcrt

        try:
            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)  # type: ignore[attr-defined,unused-ignore]
        except OSError:
            return False
        return True
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True
