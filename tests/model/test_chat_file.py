"""Conversations in files: what comes back, what is refused, and that a resumed text is the uninterrupted one."""

from __future__ import annotations

import hashlib
import json
import math
import os
import random
import resource
import signal
import tracemalloc
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from pyengine import Chat, End, Model, SamplerSettings, demo_model_path, files
from pyengine.chat_file import (
    MAGIC,
    MAX_HEADER,
    load_chat,
    read_chat,
    restore_chat,
    restore_keys,
    save_chat,
    save_keys,
)
from pyengine.errors import EngineError, FileError, FormatError, InvalidArgument
from pyengine.generate import Stats
from pyengine.model import KvType
from tests.support import DATA, needs_data

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


@needs_data
@pytest.mark.parametrize("kv_type", ["f16", "q8_0"])
@pytest.mark.parametrize("name", ["llama-256d-Q4_0", "qwen2-256d-Q4_K_M", "qwen3-256d-Q8_0"])
def test_trained_models_resume_token_for_token(name: str, kv_type: KvType, tmp_path: Path) -> None:
    template = "{% for m in messages %}{{ bos_token + m.content }}{% endfor %}{{ bos_token }}"
    settings = SamplerSettings(seed=3, temperature=1.2)  # with some tokens that the tokenizer would not have chosen
    with Model.open(DATA / "gguf" / f"stories260K-{name}.gguf", prefix_bytes=0) as model:
        with model.session(n_ctx=512, kv_type=kv_type, threads=1) as session:
            chat = Chat(model, session=session, template=template, settings=settings, max_tokens=80)
            answer(chat, "Once upon a time")
            save_chat(tmp_path / "keys", chat)
            save_chat(tmp_path / "messages", chat, keys=False)
            held = len(session)
            expected = [answer(chat, text)[0] for text in ("Then Lily", "The end")]
        for file, known in (("keys", held), ("messages", 0)):
            with model.session(n_ctx=512, kv_type=kv_type, threads=1) as session:
                resumed = load_chat(tmp_path / file, model, session=session)
                assert len(session) == known
                assert [answer(resumed, text)[0] for text in ("Then Lily", "The end")] == expected


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


def test_a_failed_write_leaves_the_old_file(model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
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
        with pytest.raises(FileError, match="no folder is no directory"):
            save_chat(tmp_path / "no folder" / "chat", chat)
        with pytest.raises(FileError, match="is a directory"):
            save_chat(tmp_path, chat)
        with monkeypatch.context() as patched:
            patched.setattr(files.shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
            with pytest.raises(FileError, match=r"has 0\.00 GB free"):
                save_chat(path, chat)
        deep: Any = "x"
        for _ in range(100):
            deep = [deep]
        for message, words in (
            ({"role": "user", "content": b"x"}, "content of type bytes"),
            ({"role": "user", "content": "x", "extra": {1, 2}}, "no place in a file"),
            ({"role": "user", "content": "x", "extra": deep}, "nested more than 64 deep"),
            ({"role": "user", "content": "\ud800"}, "valid Unicode"),
        ):  # what could not be read again is not written
            chat.messages.append(message)  # type: ignore[arg-type]
            with pytest.raises(InvalidArgument, match=words):
                save_chat(path, chat)
            chat.messages.pop()
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


# ---- damage ----


def corrupted(data: bytes, other: bytes, rng: random.Random) -> bytes:
    """One accident: a flipped bit, a cut, a part that is zero, moved, doubled or another file's, a wrong length."""
    a, b = sorted(rng.sample(range(len(data)), 2))
    match rng.randrange(10):
        case 0 | 1:
            flipped = bytearray(data)
            flipped[a if rng.random() < 0.5 else a % 4000] ^= 1 << rng.randrange(8)
            return bytes(flipped)
        case 2:
            return data[:a]
        case 3:
            return data[:a] + bytes(b - a) + data[b:]
        case 4:  # two parts change places
            middle = (a + b) // 2
            return data[:a] + data[middle:b] + data[a:middle] + data[b:]
        case 5:
            return data[:b] + data[a:]
        case 6:
            return data[:a] + other[a:]
        case 7:  # the length of the header
            return data[:12] + rng.choice([0, 1, 47, 2**16, 2**24, 2**31, 2**32 - 1]).to_bytes(4, "little") + data[16:]
        case 8:
            return data[:a] + data[b:]
        case _:
            return data + bytes(rng.randrange(1, 100))


def refusal(path: Path, chat: Chat) -> EngineError | None:
    try:
        restore_chat(path, chat)
    except EngineError as error:
        return error
    return None


def damage(model: Model, folder: Path, count: int, seed: int) -> int:
    """How many of so many accidents were refused; the others must have changed nothing. Any other outcome fails."""
    with conversation(model) as chat, chat.session:
        save_chat(folder / "good", chat)
        answer(chat, "And if he gives 19 away?")
        save_chat(folder / "other", chat)
        data, other = (folder / "good").read_bytes(), (folder / "other").read_bytes()
        messages, tokens, held = chat.messages[:], chat.session.tokens, chat.settings
        rng = random.Random(seed)
        path = folder / "bad"
        refused = 0
        for number in range(count):
            bad = corrupted(data, other, rng)
            path.write_bytes(bad)
            error = refusal(path, chat)
            if error is None:
                assert bad == data, number
                chat.messages = messages[:]
                continue
            refused += 1
            assert isinstance(error, FormatError), (number, error)
            assert str(path) in error.message
            assert len(error.message) > len(str(path)) + 20
            assert chat.messages == messages
            assert chat.settings == held
        assert len(messages) == 5
        # What of the session was overwritten is right as far as it goes.
        restore_chat(folder / "other", chat)
        assert (chat.messages, chat.session.tokens) == (messages, tokens)
    return refused


def test_a_thousand_accidents_are_refused_with_a_reason(model: Model, tmp_path: Path) -> None:
    tracemalloc.start()
    try:
        assert damage(model, tmp_path, 1000, seed=1) >= 990
        assert tracemalloc.get_traced_memory()[1] < 16 << 20  # whatever sizes a file claims
    finally:
        tracemalloc.stop()


def with_header(data: bytes, header: Any) -> bytes:
    """A file whose checksum is right and whose header is ``header``."""
    length = int.from_bytes(data[12:16], "little")
    text = json.dumps(header).encode()
    prefix = data[:12] + len(text).to_bytes(4, "little")
    return prefix + hashlib.sha256(prefix + text).digest() + text + data[48 + length :]


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Every place in a JSON value."""
    yield path
    if isinstance(value, (dict, list)):
        for key, item in value.items() if isinstance(value, dict) else enumerate(value):
            yield from places(item, (*path, key))


def test_an_impossible_header_is_refused_by_name_though_its_checksum_is_right(model: Model, tmp_path: Path) -> None:
    """Every value of the header in turn is missing, or of every other type, or far out of range."""
    with conversation(model) as chat, chat.session:
        chat.written = {"x": (5, 6)}
        save_chat(tmp_path / "good", chat)
        data = (tmp_path / "good").read_bytes()
        good = json.loads(data[48 : 48 + int.from_bytes(data[12:16], "little")])
        strange = [None, True, -1, 2**70, 1.5, "", "text", [], {}, [[]], {"role": 5}, float("1e300")]
        path, tried, refused = tmp_path / "bad", 0, 0
        for place in places(good):
            for value in [*strange, "gone"]:
                header = json.loads(json.dumps(good))
                if place:
                    inner = header
                    for key in place[:-1]:
                        inner = inner[key]
                    if value == "gone":
                        del inner[place[-1]]
                    else:
                        inner[place[-1]] = value
                else:
                    header = value
                path.write_bytes(with_header(data, header))
                tried += 1
                error = refusal(path, chat)
                if error is not None:
                    refused += 1
                    assert isinstance(error, FormatError) or error.code == "other_model", (place, value, error)
                    assert str(path) in error.message
                chat.clear()
        assert tried > 700
        assert refused > tried * 0.6
        path.write_bytes(with_header(data, {**good, "keys": {**good["keys"], "tokens": 2**40}}))
        with pytest.raises(FormatError):
            restore_chat(path, chat)
        path.write_bytes(with_header(data, {**good, "written": {"hello": [model.tokenizer.eos_id]}}))
        with pytest.raises(FormatError, match="say something else"):  # no control token by the back door
            restore_chat(path, chat)


def test_a_header_of_too_many_bytes_is_neither_written_nor_read(model: Model, tmp_path: Path) -> None:
    with conversation(model) as chat, chat.session:
        chat.messages.append({"role": "user", "content": "x" * MAX_HEADER})
        with pytest.raises(InvalidArgument, match=str(MAX_HEADER)):
            save_chat(tmp_path / "large", chat)
        assert os.listdir(tmp_path) == []


def test_keys_of_another_model_are_refused(model: Model, tmp_path: Path) -> None:
    """Also where only the weights differ: of the same shapes and vocabulary."""
    changed = bytearray(demo_model_path().read_bytes())
    with Model.open(demo_model_path()) as original:
        tensor = original.file.tensors["blk.1.ffn_up.weight"]
    for at in range(tensor.offset, tensor.offset + tensor.size):
        changed[at] ^= 1 if (at - tensor.offset) % 34 == 5 else 0  # one code of each block
    (tmp_path / "tuned.gguf").write_bytes(changed)
    with conversation(model) as chat, chat.session, Model.open(tmp_path / "tuned.gguf") as tuned:
        save_chat(tmp_path / "chat", chat)
        save_keys(tmp_path / "keys", chat.session)
        with pytest.raises(InvalidArgument, match="fingerprint") as caught:
            load_chat(tmp_path / "chat", tuned)
        assert caught.value.code == "other_model"
        with tuned.session() as session, pytest.raises(InvalidArgument, match="fingerprint"):
            restore_keys(tmp_path / "keys", session)
        with load_chat(tmp_path / "chat", tuned, any_model=True) as other:
            assert other.messages == chat.messages
            assert (other.settings.seed, other.settings.logit_bias) == (11, {})
            assert len(other.session) == 0
            assert answer(other, "What is 1 + 2?")[1].reused_tokens == 0
        with Model.open(demo_model_path(), copy=True) as copy, copy.session() as session:
            assert restore_keys(tmp_path / "keys", session).tokens == len(chat.session)
