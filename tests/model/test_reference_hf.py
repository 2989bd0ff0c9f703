"""Logits equal Hugging Face's float32 for llama, qwen2 and qwen3: the numpy oracle first, then the engine."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from gguf import GGMLQuantizationType as Type
from numpy.typing import NDArray
from safetensors.numpy import load_file

from tests.reference.configs import BY_NAME, CONFIGS, ModelConfig, RopeScaling
from tests.reference.decoder import decode, inverse_frequencies, nmse
from tests.reference.gguf_writer import as_stored, gguf_tensors, llama3_divisors, write_gguf
from tests.reference.weights import Weights, checksum, make_weights
from tests.support import DATA, needs_data

TOLERANCE = 1e-10  # NMSE; Hugging Face's own float32 rounding is worth up to 7e-12

every_config = pytest.mark.parametrize("config", CONFIGS, ids=lambda config: config.name)


@pytest.fixture(scope="module")
def hf_logits() -> dict[str, NDArray[Any]]:
    path = Path(__file__).parents[1] / "reference" / "hf_logits.npz"
    with np.load(path) as arrays:
        return dict(arrays)


# --- the oracle ---------------------------------------------------------------------------------------------------


def test_the_configurations_cover_what_is_promised(hf_logits: dict[str, NDArray[Any]]) -> None:
    assert len(CONFIGS) == len(BY_NAME) >= 64
    assert set(hf_logits) == {name for config in CONFIGS for name in (config.name, f"{config.name}/weights")}
    for architecture in ("llama", "qwen2", "qwen3"):
        mine = [config for config in CONFIGS if config.architecture == architecture]
        assert {1, 2, 4, 8} <= {config.num_attention_heads // config.num_key_value_heads for config in mine}
        assert {"linear", "yarn"} <= {config.rope_scaling.kind for config in mine if config.rope_scaling}
        assert {1e-5, 1e-6} == {config.rms_norm_eps for config in mine}
        assert {1, 128} <= {config.prompt_length for config in mine}
        assert {True, False} == {config.tie_word_embeddings for config in mine}
        widths = [(config.head_dim * config.num_attention_heads, config.hidden_size) for config in mine]
        assert {-1, 0, 1} == {(a > b) - (a < b) for a, b in widths}
        assert any(config.intermediate_size % 32 for config in mine)
    kinds = Counter(config.rope_scaling.kind for config in CONFIGS if config.rope_scaling)
    assert min(kinds[kind] for kind in ("linear", "yarn", "llama3")) >= 5
    assert any(config.attention_bias for config in CONFIGS)
    assert any(c.num_hidden_layers == 40 and c.num_key_value_heads == c.num_attention_heads for c in CONFIGS)


@every_config
def test_weights_are_the_ones_hugging_face_ran(config: ModelConfig, hf_logits: dict[str, NDArray[Any]]) -> None:
    assert checksum(make_weights(config)) == hf_logits[f"{config.name}/weights"]


@every_config
def test_numpy_decoder_equals_hugging_face(config: ModelConfig, hf_logits: dict[str, NDArray[Any]]) -> None:
    logits = decode(config, make_weights(config), config.prompt)
    assert nmse(logits[config.kept_positions], hf_logits[config.name]) <= TOLERANCE


# Turns a configuration and its weights into what a reader of the file with one mistake would compute.
Mistake = Callable[[ModelConfig, Weights], ModelConfig]


def _set(**changes: Any) -> Mistake:
    return lambda config, weights: replace(config, **changes)


def _scaled(**changes: Any) -> Mistake:
    def apply(config: ModelConfig, weights: Weights) -> ModelConfig:
        assert config.rope_scaling is not None
        return replace(config, rope_scaling=replace(config.rope_scaling, **changes))

    return apply


def _forgotten(part: str) -> Mistake:
    """Biases of 0 and norm weights of 1."""

    def apply(config: ModelConfig, weights: Weights) -> ModelConfig:
        names = [name for name in weights if part in name]
        assert names
        for name in names:
            weights[name] = np.full_like(weights[name], 0.0 if name.endswith("bias") else 1.0)
        return config

    return apply


MISTAKES: dict[str, tuple[str, Mistake]] = {
    "eps of the other family": ("llama-eps_1e-5", _set(rms_norm_eps=1e-6)),
    "eps of the other family, tied": ("qwen3-tied", _set(rms_norm_eps=1e-5)),
    "rope base": ("qwen2-theta_500000", _set(rope_theta=1e6)),
    "linear scaling ignored": ("qwen2-linear_2", _set(rope_scaling=None)),
    "llama3 scaling ignored": ("llama-llama3_32_theta_500000", _set(rope_scaling=None)),
    "llama3 upper bound": ("llama-llama3_8", _scaled(high_freq_factor=3.0)),
    "llama3 lower bound": ("llama-llama3_8", _scaled(low_freq_factor=0.5)),
    "yarn scaling ignored": ("llama-yarn_2", _set(rope_scaling=None)),
    "yarn attention scale ignored": ("qwen3-r1_0528", _scaled(attention_scale=None)),
    "yarn attention scale not multiplied in": ("qwen2-yarn_2", _scaled(attention_scale=1.0)),
    "yarn frequencies ignored": ("qwen3-yarn_8_inner_ramp", _scaled(original_context=10**9)),
    "yarn beta_fast": ("qwen3-yarn_other_betas", _scaled(beta_fast=32.0)),
    "yarn beta_slow": ("qwen3-yarn_other_betas", _scaled(beta_slow=1.0)),
    "yarn original context": ("qwen3-yarn_8_inner_ramp", _scaled(original_context=32768)),
    "q norm": ("qwen3-gqa4", _forgotten("q_norm")),
    "k norm": ("qwen3-gqa4", _forgotten("k_norm")),
    "q bias": ("qwen2-gqa4", _forgotten("q_proj.bias")),
    "k bias": ("qwen2-gqa4", _forgotten("k_proj.bias")),
    "v bias": ("llama-attention_bias", _forgotten("v_proj.bias")),
    "output bias": ("llama-attention_bias", _forgotten("o_proj.bias")),
    "final norm": ("llama-gqa4", _forgotten("model.norm")),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_in_any_feature_is_seen(mistake: str, hf_logits: dict[str, NDArray[Any]]) -> None:
    name, apply = MISTAKES[mistake]
    config, weights = BY_NAME[name], make_weights(BY_NAME[name])
    logits = decode(apply(config, weights), weights, config.prompt)
    assert nmse(logits[config.kept_positions], hf_logits[name]) > 10 * TOLERANCE


# --- rope scaling, as files say it --------------------------------------------------------------------------------


def _yarn_as_ggml_computes_it(scaling: RopeScaling, head_dim: int, theta: float) -> NDArray[np.float64]:
    """ggml's rope: the kept and the interpolated angle are mixed by a ramp that falls from 1 to 0."""

    def corr_dim(rotations: float) -> float:
        return head_dim * math.log(scaling.original_context / (rotations * 2 * math.pi)) / (2 * math.log(theta))

    low = max(0.0, math.floor(corr_dim(scaling.beta_fast)))
    high = min(head_dim - 1.0, math.ceil(corr_dim(scaling.beta_slow)))
    frequencies = []
    for pair in range(head_dim // 2):
        kept = theta ** (-2.0 * pair / head_dim)
        interpolated = kept * (1.0 / scaling.factor)
        mix = 1.0 - min(1.0, max(0.0, (pair - low) / max(0.001, high - low)))
        frequencies.append(interpolated * (1.0 - mix) + kept * mix)
    return np.array(frequencies)


def test_yarn_of_hugging_face_and_of_ggml_is_one_function() -> None:
    """They part only where even the slowest turn does not fit the original context (beta_slow x 2 pi tokens)."""
    for head_dim in (8, 16, 64, 128):
        for theta in (1e4, 5e5, 1e6):
            for original_context in (6, 7, 32, 64, 512, 4096, 32768, 131072):
                for betas in ((32.0, 1.0), (16.0, 1.0), (1.0, 1.0)):
                    scaling = RopeScaling("yarn", 4.0, original_context, beta_fast=betas[0], beta_slow=betas[1])
                    config = ModelConfig("", "qwen3", head_dim=head_dim, rope_theta=theta, rope_scaling=scaling)
                    ggml = _yarn_as_ggml_computes_it(scaling, head_dim, theta)
                    np.testing.assert_allclose(inverse_frequencies(config), ggml, rtol=1e-13)


def test_llama3_divisors_give_hugging_faces_frequencies() -> None:
    r1_distill = ModelConfig("", "llama", head_dim=128, rope_theta=5e5, rope_scaling=RopeScaling("llama3", 8.0, 8192))
    for config in [*CONFIGS, r1_distill]:
        if config.rope_scaling is None or config.rope_scaling.kind != "llama3":
            continue
        plain = inverse_frequencies(replace(config, rope_scaling=None))
        divisors = llama3_divisors(config)
        np.testing.assert_allclose(plain / divisors, inverse_frequencies(config), rtol=1e-7)
        assert divisors[0] == 1.0
        assert divisors[-1] == config.rope_scaling.factor
        assert any((divisors > 1.0) & (divisors < config.rope_scaling.factor))


# --- the file -----------------------------------------------------------------------------------------------------


@needs_data
@pytest.mark.parametrize(
    "file",
    [
        "stories260K-llama-F32",
        "stories260K-llama-256d-Q8_0",
        "stories260K-qwen2-256d-Q8_0",
        "stories260K-qwen3-256d-Q8_0",
    ],
)
def test_files_are_laid_out_as_llama_cpp_lays_them_out(file: str, tmp_path: Path) -> None:
    folder, _, storage = file.rpartition("-")
    source = DATA / "models" / folder
    config = ModelConfig.from_hf(folder, json.loads((source / "config.json").read_text()))
    weights = {name: value.astype(np.float32) for name, value in load_file(source / "model.safetensors").items()}
    write_gguf(tmp_path / "mine.gguf", config, weights, {"*": Type[storage]})

    mine = gguf.GGUFReader(tmp_path / "mine.gguf")
    theirs = gguf.GGUFReader(DATA / "gguf" / f"{file}.gguf")
    stored = {tensor.name: tensor for tensor in mine.tensors}
    assert set(stored) == {tensor.name for tensor in theirs.tensors}
    for tensor in theirs.tensors:
        assert stored[tensor.name].tensor_type == tensor.tensor_type
        assert stored[tensor.name].shape.tolist() == tensor.shape.tolist()
        assert stored[tensor.name].data.tobytes() == tensor.data.tobytes(), tensor.name
    for key, field in theirs.fields.items():
        if key.startswith(f"{config.architecture}.") and key in mine.fields:
            assert mine.fields[key].contents() == field.contents()
    absent = {key for key in theirs.fields if key.startswith(f"{config.architecture}.") and key not in mine.fields}
    assert absent <= {"llama.attention.key_length", "llama.attention.value_length"}  # their values are the default


@pytest.mark.parametrize("storage", [Type.F16, Type.BF16, Type.Q8_0, Type.Q4_0, Type.Q5_1], ids=lambda t: t.name)
def test_files_hold_the_weights_that_as_stored_names(storage: Type, tmp_path: Path) -> None:
    config = BY_NAME["llama-attention_bias_llama3"]
    types = {"token_embd.weight": Type.F32, "*": storage}
    write_gguf(tmp_path / "model.gguf", config, make_weights(config), types)
    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(tmp_path / "model.gguf").tensors}
    expected = dict(gguf_tensors(config, as_stored(make_weights(config), types)))
    assert set(tensors) == set(expected)
    for name, values in expected.items():
        assert tensors[name].tensor_type == (Type.F32 if values.ndim == 1 or "embd" in name else storage)
        found = gguf.quants.dequantize(tensors[name].data, tensors[name].tensor_type)
        np.testing.assert_array_equal(found, values)


# --- the engine ---------------------------------------------------------------------------------------------------


@every_config
def test_engine_equals_hugging_face(config: ModelConfig, hf_logits: dict[str, NDArray[Any]], tmp_path: Path) -> None:
    import pyengine

    path = tmp_path / "model.gguf"
    write_gguf(path, config, make_weights(config))
    prompt = config.prompt
    with (
        pyengine.Model.open(path) as model,
        model.session(n_ctx=len(prompt), threads=1, kv_type="f32") as session,
    ):
        assert model.n_vocab == config.vocab_size
        logits = session.eval(prompt, all_logits=True)
    assert logits.dtype == np.float32
    assert logits.shape == (len(prompt), config.vocab_size)
    assert nmse(logits[config.kept_positions], hf_logits[config.name]) <= TOLERANCE


@pytest.mark.parametrize("name", ["llama-gqa4", "qwen3-r1_0528"])
def test_engine_opens_a_file_without_a_tokenizer(name: str, hf_logits: dict[str, NDArray[Any]], tmp_path: Path) -> None:
    import pyengine

    config = BY_NAME[name]
    path = tmp_path / "model.gguf"
    write_gguf(path, config, make_weights(config), tokenizer=False)
    with (
        pyengine.Model.open(path) as model,
        model.session(n_ctx=config.prompt_length, threads=1, kv_type="f32") as session,
    ):
        logits = session.eval(config.prompt, all_logits=True)
    assert nmse(logits[config.kept_positions], hf_logits[name]) <= TOLERANCE
