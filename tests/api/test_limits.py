"""Edges of the interface: impossible options, text that must not reach a terminal, the child of a fork."""

from __future__ import annotations

import os
import threading
import time
import warnings
from collections.abc import Iterator

import pytest

import pyengine
from pyengine import InvalidArgument, Model, capi


@pytest.fixture(scope="module")
def demo() -> Iterator[Model]:
    with Model.open(pyengine.demo_model_path()) as model:
        yield model


def test_a_prefill_step_is_short_enough_to_be_cancelled(demo: Model) -> None:
    demo.session(n_ctx=2048, threads=1, chunk=1024).close()
    with pytest.raises(InvalidArgument, match=r"n_chunk is 1025; expected 1\.\.1024") as caught:
        demo.session(n_ctx=2048, threads=1, chunk=1025)
    assert caught.value.code == "bad_option"


@pytest.mark.parametrize("all_logits", [False, True])
def test_an_empty_prompt_has_its_own_error(demo: Model, all_logits: bool) -> None:
    with demo.session(n_ctx=16, threads=1) as session, pytest.raises(InvalidArgument) as caught:
        session.eval([], all_logits=all_logits)
    assert caught.value.code == "no_tokens"


def test_messages_are_safe_to_print_whatever_the_caller_passes() -> None:
    ffi, lib = capi.ffi, capi.lib
    model = ffi.new("pe_model **")
    assert lib.pe_model_open(os.fsencode(pyengine.demo_model_path()), ffi.NULL, model) == lib.PE_OK
    file = lib.pe_model_file(model[0])
    for call, out in ((lib.pe_file_value, "pe_value *"), (lib.pe_file_tensor, "pe_tensor *")):
        assert call(file, b"a\x1b[31m\xff", ffi.new(out)) == lib.PE_E_ARGUMENT
        error = lib.pe_last_error()
        assert ffi.string(error.code) == b"not_found"
        assert ffi.string(error.field).decode() == "a[31m\ufffd"
        assert ffi.string(error.message).decode().endswith(" a[31m\ufffd")
    lib.pe_model_close(model[0])


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
def test_a_session_in_use_at_a_fork_is_freed_in_the_child_without_waiting() -> None:
    ffi, lib = capi.ffi, capi.lib
    model, session = ffi.new("pe_model **"), ffi.new("pe_session **")
    assert lib.pe_model_open(os.fsencode(pyengine.demo_model_path()), ffi.NULL, model) == lib.PE_OK
    options = ffi.new("pe_session_options *")
    lib.pe_session_options_init(options)
    options.n_ctx, options.n_threads = 8192, 2
    assert lib.pe_session_create(model[0], options, session) == lib.PE_OK
    tokens, status = [5] * 8000, []
    worker = threading.Thread(
        target=lambda: status.append(
            lib.pe_session_eval(session[0], tokens, len(tokens), lib.PE_LOGITS_NONE, ffi.NULL, 0)
        )
    )
    worker.start()
    while lib.pe_session_length(session[0]) == 0:  # the first chunk is done, 31 are to come
        time.sleep(0.001)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # a fork among threads: what is tested
        child = os.fork()
    if child == 0:
        lib.pe_session_free(session[0])
        os._exit(0)
    end = time.monotonic() + 10
    while (ended := os.waitpid(child, os.WNOHANG))[0] == 0 and time.monotonic() < end:
        time.sleep(0.01)
    if ended[0] == 0:
        os.kill(child, 9)
        os.waitpid(child, 0)
    lib.pe_session_cancel(session[0])
    worker.join()
    lib.pe_session_free(session[0])
    lib.pe_model_close(model[0])
    assert ended == (child, 0), "the child waits for a thread that it does not have"
    assert status == [lib.PE_E_CANCELLED]
