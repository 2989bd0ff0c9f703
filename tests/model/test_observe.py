"""What the matrices read, added up: the float64 decoder's activations, and the same bits whatever the way there."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

import pyengine
from pyengine import Cancelled, InvalidArgument, Model, capi
from tests.reference import decoder
from tests.reference.configs import BY_NAME, ModelConfig
from tests.reference.gguf_writer import gguf_name, write_gguf
from tests.reference.weights import Weights, make_weights
from tests.support import DATA, needs_data

PROMPT = [(7 * i * i + 3 * i) % 400 for i in range(300)]
CONFIGS = [BY_NAME[name] for name in ("llama-gqa2", "llama-tied", "qwen2-gqa5", "qwen3-gqa8", "llama-odd_sizes")]


def reference_sums(
    config: ModelConfig, weights: Weights, monkeypatch: pytest.MonkeyPatch
) -> dict[str, NDArray[np.float64]]:
    """Sum of squares of each matrix's input, by GGUF name: what the plain decoder hands to its matrices."""
    inputs: list[tuple[str, decoder.Array]] = []
    normed: list[decoder.Array] = []
    linear, rms_norm = decoder.linear, decoder.rms_norm

    def recording_linear(layer: Mapping[str, decoder.Array], name: str, x: decoder.Array) -> decoder.Array:
        inputs.append((name, x))
        return linear(layer, name, x)

    def recording_norm(*args: Any) -> decoder.Array:
        normed.append(rms_norm(*args))
        return normed[-1]

    monkeypatch.setattr(decoder, "linear", recording_linear)
    monkeypatch.setattr(decoder, "rms_norm", recording_norm)
    decoder.decode(config, weights, config.prompt)
    per_layer = len(inputs) // config.num_hidden_layers
    assert per_layer == 7
    head = "model.embed_tokens.weight" if config.tie_word_embeddings else "lm_head.weight"
    named = {f"model.layers.{i // per_layer}.{name}.weight": x for i, (name, x) in enumerate(inputs)}
    named[head] = normed[-1]  # the last norm is what the head reads
    return {gguf_name(name): (x**2).sum(axis=0) for name, x in named.items()}


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: config.name)
def test_the_sums_are_the_squares_of_the_plain_decoders_activations(
    config: ModelConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights = make_weights(config)
    expected = reference_sums(config, weights, monkeypatch)
    write_gguf(tmp_path / "m.gguf", config, weights)
    with Model.open(tmp_path / "m.gguf") as model, model.session(kv_type="f32") as session:
        session.observe()
        session.eval(config.prompt, all_logits=True)
        found = session.inputs
    assert set(found) == set(expected)
    for name, sums in found.items():
        assert sums.tokens == len(config.prompt), name
        np.testing.assert_allclose(sums.squares, expected[name], rtol=2e-5, err_msg=name)


@needs_data
@pytest.mark.parametrize("kind", ["llama-256d-Q4_0", "llama-256d-Q8_0", "llama-256d-Q6_K", "qwen2-256d-Q4_K_M"])
def test_quantised_matrices_report_the_floats_they_read(kind: str) -> None:
    """The first matrices read normed embeddings: a few lines of numpy. One token at a time takes another path."""
    path = DATA / "gguf" / f"stories260K-{kind}.gguf"
    with Model.open(path) as model:
        x = model.file.dequantise("token_embd.weight").astype(np.float64)[PROMPT]
        eps = model.metadata[f"{model.architecture}.attention.layer_norm_rms_epsilon"]
        x *= model.file.dequantise("blk.0.attn_norm.weight") / np.sqrt((x * x).mean(axis=1, keepdims=True) + eps)
        expected = (x**2).sum(axis=0)
        for pieces in ([PROMPT], [PROMPT[i : i + 1] for i in range(len(PROMPT))]):
            with model.session(n_ctx=320, threads=3) as session:
                session.observe()
                for piece in pieces:
                    session.prefill(piece)
                for name in ("attn_q", "attn_k", "attn_v"):
                    found = session.inputs[f"blk.0.{name}.weight"]
                    np.testing.assert_allclose(found.squares, expected, rtol=2e-6)


def test_sums_are_the_same_bits_for_any_threads_and_chunk_and_logits_are_untouched() -> None:
    with Model.open(pyengine.demo_model_path()) as model:
        ids = [i % model.n_vocab for i in PROMPT]
        with model.session(n_ctx=320) as plain:
            logits = plain.eval(ids, all_logits=True).tobytes()
        expected = None
        for threads, chunk in itertools.product((1, 2, 3), (1, 2, 7, 64, 256, 300)):
            with model.session(n_ctx=320, threads=threads, chunk=chunk) as session:
                session.observe()
                assert session.eval(ids, all_logits=True).tobytes() == logits, f"{threads} threads, chunks of {chunk}"
                got = {name: (sums.tokens, sums.squares.tobytes()) for name, sums in session.inputs.items()}
            expected = expected or got
            assert got == expected, f"{threads} threads, chunks of {chunk}"


def test_the_head_sees_the_tokens_whose_logits_were_asked_for() -> None:
    with Model.open(pyengine.demo_model_path()) as model, model.session(n_ctx=64, threads=2) as session:
        session.observe()
        session.prefill([1, 2, 3])
        session.eval([4, 5, 6])
        session.eval([7, 8], all_logits=True)
        counts = {name: sums.tokens for name, sums in session.inputs.items()}
    head = list(counts)[-1]
    assert counts.pop(head) == 1 + 2
    assert set(counts.values()) == {8}
    assert len(counts) == 7 * model.n_layers


def test_observing_again_starts_at_zero_and_a_failed_eval_leaves_zeros() -> None:
    with Model.open(pyengine.demo_model_path()) as model, model.session(n_ctx=64) as session:
        with pytest.raises(InvalidArgument, match="not observed"):
            _ = session.inputs
        session.observe()
        session.prefill([1, 2, 3])
        session.observe()
        assert all(s.tokens == 0 and not s.squares.any() for s in session.inputs.values())
        session.prefill([1, 2, 3])
        session.cancel()
        with pytest.raises(Cancelled):
            session.prefill([4, 5])
        assert all(s.tokens == 0 and not s.squares.any() for s in session.inputs.values())
        session.observe(False)
        with pytest.raises(InvalidArgument, match="not observed"):
            _ = session.inputs


def test_c_callers_with_an_older_struct_get_the_fields_it_has() -> None:
    ffi, lib = capi.ffi, capi.lib
    model, session = ffi.new("pe_model **"), ffi.new("pe_session **")
    assert lib.pe_model_open(str(pyengine.demo_model_path()).encode(), ffi.NULL, model) == 0
    assert lib.pe_session_create(model[0], ffi.NULL, session) == 0
    out = ffi.new("pe_input *")
    assert lib.pe_session_input_at(session[0], 0, out) == 1  # struct_size 0: pe_input_init was not called
    lib.pe_input_init(out)
    assert lib.pe_session_input_at(session[0], 0, out) == 1  # not observed
    assert lib.pe_session_observe(session[0], 2) == 1
    assert lib.pe_session_observe(session[0], 1) == 0
    assert lib.pe_session_eval(session[0], ffi.new("int32_t[]", [1, 2]), 2, 0, ffi.NULL, 0) == 0
    assert lib.pe_session_input_at(session[0], 0, out) == 0
    assert ffi.string(out.tensor) == b"blk.0.attn_q.weight"
    assert (out.n_tokens, out.squares != ffi.NULL) == (2, True)
    short = ffi.new("pe_input *", {"struct_size": ffi.offsetof("pe_input", "squares")})
    assert lib.pe_session_input_at(session[0], 0, short) == 0
    assert (short.n_cols, short.squares) == (out.n_cols, ffi.NULL)
    index = 0
    while lib.pe_session_input_at(session[0], index, out) == 0:
        index += 1
    assert index % 7 == 1  # seven matrices a layer, and the head
    lib.pe_session_free(session[0])
    lib.pe_model_close(model[0])
