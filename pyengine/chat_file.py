"""A conversation in a file: messages, settings, template, and the keys and values of what the model has read.

docs/sessions.md describes the format. Little-endian:

    8 bytes   "PECHAT\\r\\n"
    uint32    version, 1
    uint32    bytes of the header
    32 bytes  SHA-256 of the 16 bytes before and of the header
    header    JSON, UTF-8
    pieces    keys and values as Session.save gives them, PIECE tokens each; nothing where the header's "keys" is null

Everything is checked before anything is used, sizes against the file itself, so a damaged, cut or foreign file is an
error that says what was found. Files are written whole or not at all, and nobody else may read them.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import stat
import struct
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, NamedTuple

from pyengine.chat import ChatTemplate, check_messages
from pyengine.errors import EngineError, FileError, FormatError, InvalidArgument, OutOfMemory
from pyengine.files import check_target, replacing
from pyengine.json_fields import Fields, check_depth, kind_of, parse, settings_from_json, settings_to_json
from pyengine.sampling import SamplerSettings

if TYPE_CHECKING:
    from pyengine.generate import Chat
    from pyengine.model import Model, Session

MAGIC, VERSION = b"PECHAT\r\n", 1
MAX_HEADER = 16 << 20
"""Bytes: twenty times the text of a context of 128k tokens."""
PIECE = 64
"""Tokens of a piece: 8 MiB of an 8B model's keys and values, which is what saving and loading need of memory."""
_PREFIX = struct.Struct("<8sII32s")


class Restored(NamedTuple):
    """What came out of a file.

    Attributes:
        messages: how many, the system prompt included.
        tokens: whose keys and values the session holds now, so that they are not read again.
        note: why that is not all the file has; ``""`` when it is.
    """

    messages: int
    tokens: int
    note: str


@dataclass(frozen=True)
class ModelIdentity:
    """What tells one model from another: ``name`` is for people, the rest has to be equal."""

    name: str
    architecture: str
    vocabulary: str  # SHA-256 of the tokens
    fingerprint: str  # of numbers and weights, see pe_model_fingerprint

    @classmethod
    def of(cls, model: Model) -> ModelIdentity:
        name = model.metadata.get("general.name")
        return cls(
            name=name if isinstance(name, str) and name else "a model without a name",
            architecture=model.architecture,
            vocabulary=model.vocabulary.hex(),
            fingerprint=f"{model.fingerprint:016x}",
        )

    def difference(self, model: Model) -> str:
        """What of ``model`` is another's, in words; ``""``: nothing."""
        other = ModelIdentity.of(model)
        if self.architecture != other.architecture:
            return f"its architecture is {self.architecture}, that of the open model {other.architecture}"
        if self.vocabulary != other.vocabulary:
            return "its vocabulary is another one"
        if self.fingerprint != other.fingerprint:
            return f"its weights (fingerprint {self.fingerprint}) are not those of the open model ({other.fingerprint})"
        return ""


@dataclass(frozen=True)
class SavedKeys:
    """What a file says of its keys and values: of how many tokens, of which type, in how many bytes."""

    tokens: int
    kv_type: str
    bytes: int


@dataclass(frozen=True)
class SavedChat:
    """The header of a chat file, checked; the fields are those of :class:`pyengine.generate.Chat`."""

    model: ModelIdentity
    system: str | None
    messages: list[dict[str, Any]]
    dropped: int
    written: dict[str, tuple[int, ...]]
    settings: SamplerSettings
    template: ChatTemplate
    max_tokens: int | None
    stop: tuple[str, ...]
    think_budget: int | None
    keys: SavedKeys | None


def save_chat(path: str | os.PathLike[str], chat: Chat, *, keys: bool = True) -> None:
    """Writes a conversation to ``path``; a file of that name is replaced once all is written and on the disk.

    Args:
        path: the file. Nobody but its owner may read it.
        chat: at rest: no answer is being generated.
        keys: also the keys and values of its session, so that loading it reads nothing again. They are large.

    Errors: ``FileError`` (no space, no permission: what was there before is untouched); ``InvalidArgument`` when the
    conversation has no place in a file (a message that is no JSON, more than :data:`MAX_HEADER` bytes of text).
    """
    _write(Path(path), chat_header(chat), chat.session if keys else None)


def read_chat(path: str | os.PathLike[str]) -> SavedChat:
    """What a chat file holds, without its keys and for whatever model.

    Errors: ``FileError``; ``FormatError`` when it is something else, of another version, cut, damaged or impossible.
    """
    with _opened(Path(path)) as opened:
        return _saved(opened)


def load_chat(
    path: str | os.PathLike[str],
    model: Model,
    *,
    session: Session | None = None,
    keys: bool = True,
    any_model: bool = False,
    **options: Any,
) -> Chat:
    """A conversation as :func:`save_chat` wrote it; it goes on as if it had never been interrupted.

    Args:
        path: the file.
        model: the one the conversation was held with.
        session: by default a new one, as for :class:`~pyengine.generate.Chat`; its ``kv_type`` has to be that of the
            file's keys for them to be used.
        keys: take the file's keys and values into the session.
        any_model: let another model go on with messages and settings. Its own template applies, and no keys.
        options: further arguments of ``Chat``; they prevail over what the file says.

    Errors: those of :func:`read_chat`; ``InvalidArgument`` with code ``other_model``.
    """
    from pyengine.generate import Chat

    template = None if any_model else read_chat(path).template
    chat = Chat(model, session=session, **{"template": template, **options})
    try:
        restore_chat(path, chat, keys=keys, any_model=any_model, keep=options)
    except BaseException:
        chat.close()
        raise
    return chat


_SETTINGS = ("settings", "template", "max_tokens", "stop", "think_budget")


def restore_chat(
    path: str | os.PathLike[str],
    chat: Chat,
    *,
    keys: bool = True,
    any_model: bool = False,
    keep: Mapping[str, Any] | tuple[str, ...] = (),
) -> Restored:
    """Puts the conversation of a file in the place of the one that ``chat`` has. On failure that one stays.

    Args:
        path, keys, any_model: see :func:`load_chat`.
        chat: at rest.
        keep: names of what the chat keeps of its own: ``"settings"``, ``"template"``, ``"max_tokens"``, ``"stop"``,
            ``"think_budget"``, ``"system"``.

    Errors: those of :func:`load_chat`. When only the keys of the file are damaged, the message says so, and
    ``keys=False`` reads the rest.
    """
    with _opened(Path(path)) as opened:
        saved = _saved(opened)
        difference = saved.model.difference(chat.model)
        if difference and not any_model:
            raise InvalidArgument(
                f"{path} is a conversation with {saved.model.name}: {difference}", code="other_model", field="model"
            )
        if keys and saved.keys is not None and not difference:
            tokens, note = _restore_keys(opened, saved.keys, chat.session)
        else:
            tokens, note = 0, difference if saved.keys is not None and keys else ""
        written = {} if difference else saved.written
        _check_written(opened, written, chat)
    system = chat.system
    chat.clear()
    chat.system = saved.system
    chat.messages = [dict(message) for message in saved.messages]
    chat.dropped = saved.dropped
    chat.written = dict(written)
    if "system" in keep:
        chat.system = system
    if difference:  # token ids and templates are a model's own
        saved = dataclasses.replace(
            saved, template=chat.template, settings=dataclasses.replace(saved.settings, logit_bias={})
        )
    for name in _SETTINGS:
        if name not in keep:
            setattr(chat, name, getattr(saved, name))
    return Restored(len(chat.messages), tokens, note)


def _check_written(opened: _Opened, written: Mapping[str, tuple[int, ...]], chat: Chat) -> None:
    """Whether ids say what they stand for, so that no text of a file becomes a control token."""
    tokenizer = chat.tokenizer
    for text, ids in written.items():
        plain = max(ids) < tokenizer.n_vocab and not any(tokenizer.is_marker(i) or tokenizer.is_control(i) for i in ids)
        if not plain or text not in (tokenizer.decode(ids), tokenizer.decode(ids, start=False)):
            raise opened.bad(f"has token ids for {text[:40]!r} that say something else", "bad_header", "written")


# ---- keys alone: what a session file keeps beside its messages ----


def save_keys(path: str | os.PathLike[str], session: Session) -> None:
    """Writes what a session holds, tokens, keys and values, as :func:`save_chat` does. Errors: ``FileError``."""
    _write(Path(path), {"model": dataclasses.asdict(ModelIdentity.of(session.model))}, session)


def restore_keys(path: str | os.PathLike[str], session: Session) -> Restored:
    """Makes a session hold what :func:`save_keys` or :func:`save_chat` wrote.

    Errors: those of :func:`load_chat`; the session may hold a beginning of it then, which is right as far as it goes.
    """
    with _opened(Path(path)) as opened:
        saved, fields = _keys_of(opened), opened.fields
        model = _model_of(fields)
        if difference := model.difference(session.model):
            raise InvalidArgument(f"{path} is of {model.name}: {difference}", code="other_model", field="model")
        if saved is None:
            return Restored(0, 0, "the file has no keys")
        return Restored(0, *_restore_keys(opened, saved, session))


def _restore_keys(opened: _Opened, saved: SavedKeys, session: Session) -> tuple[int, str]:
    """How many tokens the session holds now, and why not all."""
    if saved.kv_type != session.kv_type:
        return 0, f"its keys are of type {saved.kv_type}, the session's {session.kv_type}: the text is read again"
    session.truncate(0)
    while (first := len(session)) < saved.tokens:
        n = min(PIECE, saved.tokens - first)
        if first + n > session.n_ctx:
            return first, f"its keys are of {saved.tokens} tokens, the context holds {session.n_ctx}"
        piece = opened.file.read(session.state_bytes(n))
        try:
            session.restore(piece)
        except EngineError as error:
            if error.code == "other_epoch":
                return 0, error.message
            if error.code == "busy" or isinstance(error, OutOfMemory):  # nothing is wrong with the file
                raise
            raise opened.bad(
                f"is damaged in the keys of its tokens {first}..{first + n - 1}: {error.message}; its messages and "
                "settings are whole",
                "damaged",
            ) from error
    return saved.tokens, ""


# ---- the container ----


def _write(path: Path, header: dict[str, Any], session: Session | None) -> None:
    n = 0 if session is None else len(session)
    firsts = range(0, n, PIECE)
    header["keys"] = None
    size = 0
    if session is not None and n:
        size = sum(session.state_bytes(min(PIECE, n - first)) for first in firsts)
        header["keys"] = {"tokens": n, "kv_type": session.kv_type, "bytes": size}
    data = _encode(header)
    check_target(path, force=True, size=len(data) + size)
    with replacing(path, private=True) as file:
        file.write(data)
        for first in firsts:
            assert session is not None
            file.write(session.save(first, min(PIECE, n - first)).data)


def _encode(header: Mapping[str, Any]) -> bytes:
    try:
        check_depth(header)
        text = json.dumps(header, ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode()
    except (TypeError, ValueError, RecursionError) as error:  # ValueError: also text that is no Unicode
        raise InvalidArgument(f"the conversation has no place in a file: {error}", code="bad_message") from None
    if len(text) > MAX_HEADER:
        raise InvalidArgument(
            f"the conversation takes {len(text)} bytes; a chat file holds at most {MAX_HEADER} of text",
            code="bad_message",
        )
    prefix = _PREFIX.pack(MAGIC, VERSION, len(text), b"")[:16]
    return prefix + hashlib.sha256(prefix + text).digest() + text


class _Opened:
    """A file with a checked header, standing behind it."""

    def __init__(self, path: Path, file: BinaryIO, size: int) -> None:
        self.path, self.file, self._size = path, file, size
        self.fields = Fields(self._header(), self._bad_field)

    def bad(self, what: str, code: str, field: str = "") -> FormatError:
        return FormatError(f"{self.path} {what}", code=code, field=field)

    def _bad_field(self, what: str, field: str) -> FormatError:
        return self.bad(f"has an impossible header: {what}", "bad_header", field)

    def _header(self) -> dict[str, Any]:
        prefix = self.file.read(_PREFIX.size)
        if prefix[: len(MAGIC)] != MAGIC:
            found = f"begins with {prefix[:8]!r}" if prefix else "is empty"
            raise self.bad(f"is no chat file: it {found}; expected {MAGIC!r}", "foreign_file")
        if len(prefix) < _PREFIX.size:
            raise self.bad(f"is cut: it has {len(prefix)} bytes; its beginning alone takes {_PREFIX.size}", "cut_file")
        _, version, length, digest = _PREFIX.unpack(prefix)
        if version != VERSION:
            raise self.bad(f"has version {version}; this program reads version {VERSION}", "bad_version")
        if length > MAX_HEADER:
            raise self.bad(f"claims a header of {length} bytes; at most {MAX_HEADER} are expected", "bad_header")
        end = _PREFIX.size + length
        if end > self._size:
            raise self.bad(f"is cut: it has {self._size} bytes; its header ends at {end}", "cut_file")
        text = self.file.read(length)
        if hashlib.sha256(prefix[:16] + text).digest() != digest:
            raise self.bad("is damaged: the checksum of its header is wrong", "damaged")
        try:
            header = parse(text)
        except ValueError as error:
            raise self.bad(f"has a header that is no JSON: {error}", "bad_header") from None
        if not isinstance(header, dict):
            raise self.bad(f"has a header that is {kind_of(header)}; expected an object", "bad_header")
        return header

    def check_size(self, keys_bytes: int) -> None:
        """Whether so many bytes, and no more, follow the header."""
        expected = self.file.tell() + keys_bytes
        if self._size != expected:
            what = "is cut" if self._size < expected else "is too long"
            raise self.bad(f"{what}: it has {self._size} bytes; expected {expected}", "cut_file")


@contextmanager
def _opened(path: Path) -> Iterator[_Opened]:
    """Pipes and devices are never waited for."""
    try:
        with open(path, "rb", opener=lambda name, flags: os.open(name, flags | getattr(os, "O_NONBLOCK", 0))) as file:
            status = os.fstat(file.fileno())
            if not stat.S_ISREG(status.st_mode):
                raise FileError(f"{path} is no regular file; expected a chat file", code="not_regular_file")
            yield _Opened(path, file, status.st_size)
    except OSError as error:
        if isinstance(error, EngineError):
            raise
        raise FileError(f"cannot read {path}: {error.strerror or error}", code="cannot_read") from error


# ---- the header ----


def chat_header(chat: Chat) -> dict[str, Any]:
    """What of a conversation goes into the header, as JSON."""
    from pyengine import __version__

    check_messages(chat.messages)
    return {
        "written_by": f"pyengine {__version__}",
        "model": dataclasses.asdict(ModelIdentity.of(chat.model)),
        "template": {name: getattr(chat.template, name) for name in _TEMPLATE},
        "settings": settings_to_json(chat.settings),
        "max_tokens": chat.max_tokens,
        "stop": list(chat.stop),
        "think_budget": chat.think_budget,
        "system": chat.system,
        "messages": list(chat.messages),
        "dropped": chat.dropped,
        "written": {text: list(ids) for text, ids in chat.written.items()},
    }


_TEMPLATE = ("source", "bos", "eos", "origin")


def _model_of(fields: Fields) -> ModelIdentity:
    model = fields.fields("model")
    return ModelIdentity(**{field.name: model.value(field.name, str) for field in dataclasses.fields(ModelIdentity)})


def _keys_of(opened: _Opened) -> SavedKeys | None:
    """What the header says of the keys, as far as it agrees with the size of the file."""
    if opened.fields.value("keys", dict, type(None)) is None:
        opened.check_size(0)
        return None
    keys = opened.fields.fields("keys")
    saved = SavedKeys(keys.value("tokens", int), keys.value("kv_type", str), keys.value("bytes", int))
    if saved.tokens < 1 or saved.bytes < saved.tokens:
        raise keys.bad("tokens", f"is {saved.tokens}, with {saved.bytes} bytes")
    opened.check_size(saved.bytes)
    return saved


def _ids_of(fields: Fields, text: str) -> tuple[int, ...]:
    ids = fields.values[text]
    if not isinstance(ids, list) or not ids or not all(type(i) is int and 0 <= i < 2**31 for i in ids):
        raise fields.bad(text[:40], "is no list of token ids")
    return tuple(ids)


def _saved(opened: _Opened) -> SavedChat:
    get = opened.fields
    keys = _keys_of(opened)
    template = {name: get.fields("template").value(name, str) for name in _TEMPLATE}
    messages, dropped = get.value("messages", list), get.value("dropped", int)
    if not 0 <= dropped <= len(messages):
        raise get.bad("dropped", f"is {dropped}, of {len(messages)} messages")
    try:
        check_messages(messages)
        return SavedChat(
            model=_model_of(get),
            system=get.value("system", str, type(None)),
            messages=messages,
            dropped=dropped,
            written={text: _ids_of(get.fields("written"), text) for text in get.value("written", dict)},
            settings=settings_from_json(get.fields("settings")),
            template=ChatTemplate(template["source"], template["bos"], template["eos"], origin=template["origin"]),
            max_tokens=get.number("max_tokens", 1),
            stop=get.texts("stop"),
            think_budget=get.number("think_budget", 0),
            keys=keys,
        )
    except EngineError as error:
        if error.code == "bad_header":
            raise
        raise opened.bad(f"has an impossible header: {error.message}", "bad_header", error.field) from error
