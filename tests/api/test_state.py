"""The saved state of a session: restored it gives the same bits, and whatever is wrong with it changes nothing."""

from __future__ import annotations

import random
import struct
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

import pyengine
from pyengine import ContextFull, EngineError, FormatError, InvalidArgument, Model, capi
from pyengine.model import KvType
from tests.support import DATA, needs_data

PROMPT = [(7 * i * i + 3 * i) % 500 for i in range(300)]
TYPES: tuple[KvType, ...] = ("f16", "f32", "q8_0")


@pytest.fixture(scope="module")
def demo() -> Iterator[Model]:
    with Model.open(pyengine.demo_model_path(), prefix_bytes=0) as model:
        yield model


def check_same_bits(model: Model, kv_type: KvType) -> None:
    """Whole and in pieces, into contexts of other sizes, with other threads, and cut back afterwards."""
    with model.session(n_ctx=320, kv_type=kv_type, threads=1) as session:
        session.prefill(PROMPT[:290])
        whole = session.save()
        assert len(whole) == session.state_bytes(290)
        pieces = [session.save(first, min(64, 290 - first)) for first in range(0, 290, 64)]
        expected = session.eval(PROMPT[290:], all_logits=True).tobytes()
    for states, n_ctx in (([whole], 300), (pieces, 512)):
        with model.session(n_ctx=n_ctx, kv_type=kv_type, threads=2, chunk=7) as session:
            for state in states:
                session.restore(state)
            assert session.tokens == PROMPT[:290]
            assert session.eval(PROMPT[290:], all_logits=True).tobytes() == expected
            session.truncate(100)
            session.prefill(PROMPT[100:290])
            assert session.eval(PROMPT[290:], all_logits=True).tobytes() == expected
            assert session.truncate(290) is None
            assert session.save().tobytes() == whole.tobytes()  # and so the state of it is the state


@pytest.mark.parametrize("kv_type", TYPES)
def test_a_restored_session_gives_the_same_bits(demo: Model, kv_type: KvType) -> None:
    check_same_bits(demo, kv_type)


@needs_data
@pytest.mark.parametrize("kv_type", ["f16", "q8_0"])
@pytest.mark.parametrize(
    "name", ["llama-256d-Q4_0", "llama-256d-F16", "qwen2-256d-Q4_K_M", "qwen3-256d-Q4_K_M", "qwen3-256d-Q8_0"]
)
def test_trained_models_too(name: str, kv_type: KvType) -> None:
    with Model.open(DATA / "gguf" / f"stories260K-{name}.gguf", prefix_bytes=0) as model:
        check_same_bits(model, kv_type)


def test_accidents_are_refused_and_change_nothing(demo: Model) -> None:
    rng = random.Random(2)
    with demo.session(n_ctx=64, threads=1) as session, demo.session(n_ctx=64, threads=1) as target:
        session.prefill(PROMPT[:40])
        first, second = session.save(0, 20).tobytes(), session.save(20, 20).tobytes()
        target.restore(first)
        before = target.save().tobytes()
        bad: list[bytes] = [second[:n] for n in (0, 1, 7, 8, 55, 56, 57, len(second) - 1)]
        bad += [second + b"\0", b"GGUF" + bytes(100), second[:1000] + second[1008:] + second[1000:1008]]
        for _ in range(400):
            flipped = bytearray(second)
            flipped[rng.randrange(len(second)) if rng.random() < 0.5 else rng.randrange(136)] ^= 1 << rng.randrange(8)
            bad.append(bytes(flipped))
        scattered = np.frombuffer(second, dtype=np.uint8).repeat(2)[::2]
        for buffer in (scattered, scattered[::-1], np.zeros((2, 100), np.uint8), np.zeros(100, np.float32)):
            with pytest.raises(InvalidArgument, match="one behind the other"):
                target.restore(buffer)  # type: ignore[arg-type]
        for state in bad:
            with pytest.raises(FormatError) as caught:
                target.restore(state)
            assert caught.value.code in ("foreign_state", "bad_version", "cut_state", "damaged_state")
            assert target.save().tobytes() == before
        target.restore(second)
        assert target.save().tobytes() == session.save().tobytes()


def other_rope(folder: Path) -> Path:
    """The demo model with another rope base: the same weights, other keys."""
    data = bytearray(pyengine.demo_model_path().read_bytes())
    key = b"qwen3.rope.freq_base"
    at = data.index(key) + len(key) + 4  # behind the type
    data[at : at + 4] = struct.pack("<f", 2 * struct.unpack("<f", data[at : at + 4])[0])
    path = folder / "turned.gguf"
    path.write_bytes(data)
    return path


def test_a_state_is_used_only_where_it_belongs(demo: Model, tmp_path: Path) -> None:
    def refused(target: pyengine.Session, state: np.ndarray, kind: type[EngineError], code: str, *words: str) -> None:
        held = target.tokens
        with pytest.raises(kind) as caught:
            target.restore(state)
        assert caught.value.code == code
        assert all(word in caught.value.message for word in words), caught.value.message
        assert target.tokens == held

    with demo.session(n_ctx=64, threads=1) as session:
        session.prefill(PROMPT[:40])
        first, second = session.save(0, 20), session.save(20)
        with demo.session(n_ctx=64, threads=1, kv_type="q8_0") as target:
            refused(target, first, InvalidArgument, "other_kv_type", "f16", "q8_0")
        with demo.session(n_ctx=30, threads=1) as target:
            refused(target, second, InvalidArgument, "other_text", "20", "0")
            target.restore(first)
            refused(target, first, InvalidArgument, "other_text", "follows 0")
            refused(target, second, ContextFull, "context_full", "20 tokens", "room for 10")
        with demo.session(n_ctx=64, threads=1) as target:
            target.prefill([*PROMPT[:19], 3])  # as many tokens, but not the same
            refused(target, second, InvalidArgument, "other_text", "20 others")
        with pytest.raises(InvalidArgument, match="holds 40"):
            session.save(30, 20)
        with pytest.raises(InvalidArgument, match="holds 40"):
            session.save(2**62, 20)
        for n in (0, 65, 2**62):
            with pytest.raises(InvalidArgument):
                session.state_bytes(n)
            with pytest.raises(InvalidArgument):
                session.save(0, n)
        for count in (-1, 2**63):
            with pytest.raises(InvalidArgument):
                session.state_bytes(count)
        with Model.open(other_rope(tmp_path)) as turned, turned.session(n_ctx=64) as target:
            refused(target, first, InvalidArgument, "other_model")


def test_a_fingerprint_is_the_weights_and_not_the_file(demo: Model, tmp_path: Path) -> None:
    with Model.open(pyengine.demo_model_path(), copy=True) as copy:
        assert copy.fingerprint == demo.fingerprint
    path = tmp_path / "renamed.gguf"
    path.write_bytes(pyengine.demo_model_path().read_bytes().replace(b"pyengine-demo", b"another-name!"))
    with Model.open(path) as renamed:
        assert renamed.metadata["general.name"] == "another-name!"
        assert renamed.fingerprint == demo.fingerprint
    with Model.open(other_rope(tmp_path)) as turned:
        assert turned.fingerprint != demo.fingerprint


def test_misuse_of_the_c_interface_is_refused_with_a_sentence(demo: Model) -> None:
    ffi, lib = capi.ffi, capi.lib
    model, session = ffi.new("pe_model **"), ffi.new("pe_session **")
    size, number = ffi.new("uint64_t *"), ffi.new("uint64_t *")
    assert lib.pe_model_open(str(pyengine.demo_model_path()).encode(), ffi.NULL, model) == lib.PE_OK
    assert lib.pe_session_create(model[0], ffi.NULL, session) == lib.PE_OK
    assert lib.pe_session_eval(session[0], [1, 2, 3], 3, lib.PE_LOGITS_NONE, ffi.NULL, 0) == lib.PE_OK
    assert lib.pe_session_state_bytes(session[0], 3, size) == lib.PE_OK
    data = ffi.new("unsigned char[]", size[0])
    for call in (
        lambda: lib.pe_session_state_bytes(ffi.NULL, 3, size),
        lambda: lib.pe_session_state_bytes(session[0], 3, ffi.NULL),
        lambda: lib.pe_session_save(ffi.NULL, 0, 3, data, len(data)),
        lambda: lib.pe_session_save(session[0], 0, 3, ffi.NULL, len(data)),
        lambda: lib.pe_session_save(session[0], 0, 3, data, len(data) - 1),
        lambda: lib.pe_session_save(session[0], 1, 3, data, len(data)),
        lambda: lib.pe_session_save(session[0], 2**64 - 1, 3, data, len(data)),
        lambda: lib.pe_session_restore(ffi.NULL, data, len(data)),
        lambda: lib.pe_session_restore(session[0], ffi.NULL, len(data)),
        lambda: lib.pe_model_fingerprint(ffi.NULL, number),
        lambda: lib.pe_model_fingerprint(model[0], ffi.NULL),
    ):
        assert call() == lib.PE_E_ARGUMENT
        assert len(ffi.string(lib.pe_last_error().message)) > 10
    assert lib.pe_session_restore(session[0], ffi.NULL, 0) == lib.PE_E_FORMAT
    assert b"empty" in ffi.string(lib.pe_last_error().message)
    assert lib.pe_session_save(session[0], 0, 3, data, len(data)) == lib.PE_OK
    assert lib.pe_model_fingerprint(model[0], number) == lib.PE_OK
    assert number[0] == demo.fingerprint
    lib.pe_session_free(session[0])
    lib.pe_model_close(model[0])
