"""Conversations in files: what comes back, what is refused, and that a resumed text is the uninterrupted one."""

from __future__ import annotations

import math
import os
import resource
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from pyengine import Chat, End, Model, SamplerSettings, demo_model_path
from pyengine.chat_file import MAGIC, load_chat, read_chat, restore_chat, save_chat
from pyengine.errors import FileError, FormatError, InvalidArgument
from pyengine.generate import Stats
from pyengine.model import KvType

SETTINGS = SamplerSettings(seed=11, temperature=0.9, top_p=math.inf, logit_bias={7: -math.inf, 9: 0.25})


@pytest.fixture(scope="module")
def model() -> Iterator[Model]:
    with Model.open(demo_model_path(), prefix_bytes=0) as opened:
        yield opened


def answer(chat: Chat, text: str) -> tuple[list[int], Stats]:
    """All generated ids and the numbers of a turn."""
    events = list(chat.send(text))
    assert isinstance(events[-1], End)
    return [token.id for event in events for token in event.tokens], events[-1].stats


def conversation(model: Model, kv_type: KvType = "f16") -> Chat:
    session = model.session(n_ctx=512, kv_type=kv_type, threads=1)
    chat = Chat(model, system="Be brief.", settings=SETTINGS, session=session, stop=["###"], max_tokens=200)
    answer(chat, "Tom has 48 apples and buys 27 more. How many apples does he have now?")
    return chat


@pytest.mark.parametrize("kv_type", ["f16", "q8_0", "f32"])
def test_a_resumed_text_is_the_uninterrupted_one(model: Model, kv_type: KvType, tmp_path: Path) -> None:
    with conversation(model, kv_type) as chat, chat.session:
        save_chat(tmp_path / "keys", chat)
        save_chat(tmp_path / "messages", chat, keys=False)
        held = len(chat.session)
        expected, stats = answer(chat, "And if he gives 19 away?")
    for name, reused in (("keys", stats.reused_tokens), ("messages", 0)):
        with model.session(n_ctx=512, kv_type=kv_type, threads=1) as session:
            resumed = load_chat(tmp_path / name, model, session=session)
            assert len(session) == (held if reused else 0)
            ids, numbers = answer(resumed, "And if he gives 19 away?")
            assert ids == expected
            assert numbers.reused_tokens == reused


def test_everything_of_a_conversation_comes_back(model: Model, tmp_path: Path) -> None:
    with conversation(model) as chat, chat.session:
        save_chat(tmp_path / "chat", chat)
        with load_chat(tmp_path / "chat", model) as resumed:
            assert resumed.messages == chat.messages
            assert "reasoning_content" in resumed.messages[-1]
            assert resumed.settings == SETTINGS
            assert (resumed.system, resumed.stop, resumed.max_tokens) == ("Be brief.", ("###",), 200)
            assert resumed.template.source == chat.template.source
            resumed.clear()
            assert resumed.messages == chat.messages[:1]
        with load_chat(tmp_path / "chat", model, max_tokens=3, settings=SamplerSettings()) as resumed:
            assert (resumed.max_tokens, resumed.settings, resumed.stop) == (3, SamplerSettings(), ("###",))
    assert (tmp_path / "chat").stat().st_mode & 0o777 == 0o600
    assert os.listdir(tmp_path) == ["chat"]


def test_keys_of_another_type_or_size_are_left_with_a_reason(model: Model, tmp_path: Path) -> None:
    with conversation(model) as chat, chat.session:
        save_chat(tmp_path / "chat", chat)
        held = len(chat.session)
    with model.session(n_ctx=512, kv_type="q8_0") as session:
        chat = Chat(model, session=session)
        restored = restore_chat(tmp_path / "chat", chat)
        assert (restored.messages, restored.tokens) == (3, 0)
        assert "f16" in restored.note
        assert "q8_0" in restored.note
    with model.session(n_ctx=80) as session:
        restored = restore_chat(tmp_path / "chat", Chat(model, session=session))
        assert restored.tokens == len(session) == 64
        assert str(held) in restored.note
        assert "80" in restored.note


def test_a_failed_write_leaves_the_old_file(model: Model, tmp_path: Path) -> None:
    path = tmp_path / "chat"
    with conversation(model) as chat, chat.session:
        save_chat(path, chat, keys=False)
        before = path.read_bytes()
        old_limit = resource.getrlimit(resource.RLIMIT_FSIZE)
        old_handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        try:  # as a full disk: the write fails in the middle
            resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) + 5000, old_limit[1]))
            with pytest.raises(FileError, match="cannot write"):
                save_chat(path, chat)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, old_limit)
            signal.signal(signal.SIGXFSZ, old_handler)
        assert path.read_bytes() == before
        assert os.listdir(tmp_path) == ["chat"]
        with pytest.raises(FileError, match="cannot write"):
            save_chat(tmp_path / "no folder" / "chat", chat)
        chat.messages.append({"role": "user", "content": b"no text"})  # type: ignore[dict-item]
        with pytest.raises(InvalidArgument, match="no place in a file"):
            save_chat(path, chat)
    assert path.read_bytes() == before


def test_a_file_that_is_something_else_is_refused_by_what_it_is(model: Model, tmp_path: Path) -> None:
    path = tmp_path / "x"
    with pytest.raises(FileError, match="No such file"):
        read_chat(path)
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(FileError, match="no regular file"):
        read_chat(tmp_path / "pipe")
    with pytest.raises(FileError, match="directory"):
        read_chat(tmp_path)
    for content, words in ((b"", "is empty"), (b"GGUF....", "GGUF"), (MAGIC + b"\2\0\0\0", "cut")):
        path.write_bytes(content)
        with pytest.raises(FormatError, match=words):
            read_chat(path)
    path.write_bytes(MAGIC + b"\2\0\0\0" + bytes(40))
    with pytest.raises(FormatError, match="version 2; this program reads version 1"):
        read_chat(path)
    path.write_bytes(MAGIC + b"\1\0\0\0\xff\xff\xff\xff" + bytes(40))
    with pytest.raises(FormatError, match="4294967295"):  # and nothing of that size is allocated
        read_chat(path)
