"""The tokenizer is built beside the model: logits do not wait for it, and its errors are told to whoever asks."""

from __future__ import annotations

import os
import threading
from pathlib import Path

import pytest

from pyengine import FormatError, Model, demo_model_path
from pyengine.gguf_file import GgufFile
from pyengine.tokenizer import Tokenizer


@pytest.fixture
def held(monkeypatch: pytest.MonkeyPatch) -> threading.Event:
    """Building a tokenizer from a file takes until this is set."""
    go, build = threading.Event(), Tokenizer.from_gguf

    def wait(path: str) -> Tokenizer:
        assert go.wait(30)
        return build(path)

    monkeypatch.setattr(Tokenizer, "from_gguf", wait)
    return go


def test_logits_do_not_wait_for_the_tokenizer(held: threading.Event, monkeypatch: pytest.MonkeyPatch) -> None:
    with Model.open(demo_model_path()) as model, model.session(n_ctx=16, threads=1) as session:
        assert session.eval([1, 2, 3]).shape == (model.n_vocab,)
        held.set()
        monkeypatch.setattr(Tokenizer, "from_metadata", None)  # it is not built a second time
        with GgufFile.open(demo_model_path()) as file:
            assert model.tokenizer.encode("What is 2 + 3?") == Tokenizer(file.metadata).encode("What is 2 + 3?")


def test_a_model_may_be_closed_while_its_tokenizer_is_built(held: threading.Event) -> None:
    model = Model.open(demo_model_path())
    model.close()
    held.set()
    assert model.tokenizer.n_vocab > 0


def test_a_tokenizer_that_cannot_be_built_keeps_its_cause_for_everyone_who_asks(tmp_path: Path) -> None:
    data = demo_model_path().read_bytes()
    key = b"tokenizer.ggml.merges"
    assert data.count(key) == 1
    broken = tmp_path / "no-merges.gguf"
    broken.write_bytes(data.replace(key, b"tokenizer.ggml.mergez"))
    with GgufFile.open(broken) as file, pytest.raises(FormatError) as expected:
        Tokenizer.from_metadata(file.metadata)
    with Model.open(broken) as model, model.session(n_ctx=16, threads=1) as session:
        session.eval([1, 2, 3])
        for _ in range(2):
            with pytest.raises(FormatError) as error:
                _ = model.tokenizer
            assert str(error.value) == str(expected.value)
            assert (error.value.code, error.value.field) == (expected.value.code, expected.value.field)
            assert any("tokenizer.py" in str(entry.path) for entry in error.traceback)


def test_a_system_without_another_thread_builds_it_when_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", refuse)
    with Model.open(demo_model_path()) as model:
        assert model.tokenizer.n_vocab > 0


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_the_child_of_a_fork_does_not_wait_for_a_thread_it_does_not_have(held: threading.Event) -> None:
    model = Model.open(demo_model_path())
    child = os.fork()
    if child == 0:
        os._exit(0 if model.tokenizer.n_vocab > 0 else 1)
    assert os.waitpid(child, 0)[1] == 0
    held.set()
    model.close()
