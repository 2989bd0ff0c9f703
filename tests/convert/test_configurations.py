"""config.json -> keys: the R1 family, rope scaling in every spelling, and what is refused."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pyengine.errors import EngineError, FormatError, UnsupportedError
from pyengine_convert.architectures import read_hyper
from pyengine_convert.convert import convert
from pyengine_convert.keyvalues import KeyValues
from pyengine_convert.source import Config
from tests.convert.checkpoints import bpe_tokenizer, config, save, weights
from tests.convert.readback import Readback
from tests.support import DATA, needs_data


def keys_of(values: dict[str, Any]) -> dict[str, Any]:
    keys = KeyValues()
    read_hyper(Config(values, "config.json")).write(keys)
    return {key: value.value for key, value in keys.items()}


# 1 / (base frequency x factor) of transformers' llama3 scaling for R1-Distill-Llama-8B, dims 0..63.
LLAMA3_FACTORS = [1.0] * 29 + [1.2074839, 1.5534145, 2.0263131, 2.6945304, 3.6842537, 5.2573272] + [8.0] * 29

R1_FAMILY: dict[str, dict[str, Any]] = {
    "DeepSeek-R1-Distill-Llama-8B": {
        "llama.rope.freq_base": 500000.0,
        "llama.attention.key_length": 128,
        "llama.attention.value_length": 128,
        "llama.attention.head_count": 32,
        "llama.attention.head_count_kv": 8,
        "llama.attention.layer_norm_rms_epsilon": 1e-5,
        "llama.block_count": 32,
        "llama.feed_forward_length": 14336,
    },
    "DeepSeek-R1-0528-Qwen3-8B": {
        "qwen3.rope.freq_base": 1e6,
        "qwen3.rope.scaling.type": "yarn",
        "qwen3.rope.scaling.factor": 4.0,
        "qwen3.rope.scaling.original_context_length": 32768,
        "qwen3.rope.scaling.attn_factor": 0.8782488562869419,
        "qwen3.attention.key_length": 128,
        "qwen3.block_count": 36,
    },
    "DeepSeek-R1-Distill-Qwen-1.5B": {"qwen2.rope.freq_base": 10000.0, "qwen2.embedding_length": 1536},
    "DeepSeek-R1-Distill-Qwen-7B": {"qwen2.rope.freq_base": 10000.0, "qwen2.embedding_length": 3584},
    "DeepSeek-R1-Distill-Qwen-14B": {"qwen2.attention.layer_norm_rms_epsilon": 1e-5, "qwen2.block_count": 48},
    "DeepSeek-R1-Distill-Qwen-32B": {"qwen2.rope.freq_base": 1e6, "qwen2.block_count": 64},
}


@needs_data
@pytest.mark.parametrize("name", sorted(R1_FAMILY))
def test_every_r1_configuration_gives_its_keys(name: str) -> None:
    values = json.loads((DATA / "configs" / f"{name}.config.json").read_text())
    keys = keys_of(values)
    for key, expected in R1_FAMILY[name].items():
        assert keys[key] == expected, key
    arch = values["model_type"]
    assert keys[f"{arch}.context_length"] == 131072
    assert keys[f"{arch}.vocab_size"] == values["vocab_size"]
    has_scaling = [key for key in keys if ".rope.scaling." in key]
    assert bool(has_scaling) == (name == "DeepSeek-R1-0528-Qwen3-8B")


@needs_data
@pytest.mark.parametrize("name", sorted(R1_FAMILY))
def test_a_small_checkpoint_of_every_r1_flavour_converts(tmp_path: Path, name: str) -> None:
    values = json.loads((DATA / "configs" / f"{name}.config.json").read_text())
    values |= {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 1, "vocab_size": 300}
    values |= {"num_attention_heads": 4, "num_key_value_heads": 2, "bos_token_id": 1, "eos_token_id": 2}
    save(tmp_path / "m", values)
    convert(tmp_path / "m", tmp_path / "m.gguf", "q8_0")
    file = Readback(tmp_path / "m.gguf")
    for key, expected in R1_FAMILY[name].items():
        if ".rope." in key or key.endswith("epsilon"):
            assert file.metadata[key] == (np.float32(expected) if isinstance(expected, float) else expected), key
    assert ("rope_freqs.weight" in file.types) == (name == "DeepSeek-R1-Distill-Llama-8B")
    if "rope_freqs.weight" in file.types:
        np.testing.assert_allclose(file.values["rope_freqs.weight"], LLAMA3_FACTORS, rtol=2e-6)


def effective_scale(keys: dict[str, Any]) -> float:
    """The attention scale a reader computes from the keys."""
    factor = keys["qwen3.rope.scaling.factor"]
    return float((0.1 * math.log(factor) + 1.0) * keys.get("qwen3.rope.scaling.attn_factor", 1.0))


@pytest.mark.parametrize(
    ("extra", "scale"),
    [
        ({}, 0.1 * math.log(4) + 1),
        ({"attention_factor": 1.25}, 1.25),
        ({"attn_factor": 0.5}, 0.5 * (0.1 * math.log(4) + 1)),
        ({"attn_factor": 0.8782488562869419}, 1.0),
        ({"mscale": 0.707, "mscale_all_dim": 0.707}, 1.0),
        ({"mscale": 2.0, "mscale_all_dim": 1.0}, (0.2 * math.log(4) + 1) / (0.1 * math.log(4) + 1)),
    ],
)
def test_yarn_attention_scale_has_the_value_each_spelling_means(extra: dict[str, float], scale: float) -> None:
    scaling = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32, **extra}
    keys = keys_of(config("Qwen3ForCausalLM", rope_scaling=scaling))
    assert effective_scale(keys) == pytest.approx(scale, rel=1e-12)


@pytest.mark.parametrize("kind_key", ["type", "rope_type"])
def test_rope_is_read_from_both_spellings(kind_key: str) -> None:
    old = config(rope_theta=5e5, rope_scaling={kind_key: "linear", "factor": 2.0})
    new = config(rope_theta=None, rope_parameters={"rope_theta": 5e5, "rope_type": "linear", "factor": 2.0})
    assert keys_of(old) == keys_of(new)
    assert keys_of(old)["llama.rope.scaling.type"] == "linear"
    assert keys_of(old)["llama.rope.scaling.factor"] == 2.0
    assert keys_of(old)["llama.rope.freq_base"] == 5e5


@needs_data
def test_dynamic_scaling_leaves_no_trace_within_the_context_and_is_noted(tmp_path: Path) -> None:
    """transformers: "If seq_len <= max_position_embeddings, this factor has no effect"."""
    scaling = {"rope_type": "dynamic", "factor": 2.0}
    assert keys_of(config(rope_scaling=scaling)) == keys_of(config())
    report = convert(save(tmp_path / "m", config(rope_scaling=scaling)), tmp_path / "m.gguf", "f16")
    assert any("beyond the context of 128 tokens" in note for note in report.notes)


def test_yarn_betas_are_kept() -> None:
    scaling = {"type": "yarn", "factor": 2.0, "original_max_position_embeddings": 64, "beta_fast": 16, "beta_slow": 2}
    keys = keys_of(config(rope_scaling=scaling))
    assert (keys["llama.rope.scaling.yarn_beta_fast"], keys["llama.rope.scaling.yarn_beta_slow"]) == (16.0, 2.0)


def test_head_dim_is_written_when_it_is_explicit_or_not_the_quotient() -> None:
    assert "llama.attention.key_length" not in keys_of(config(head_dim=None))
    assert keys_of(config(head_dim=None))["llama.rope.dimension_count"] == 16
    assert keys_of(config(head_dim=16))["llama.attention.key_length"] == 16
    assert keys_of(config("Qwen3ForCausalLM", head_dim=None))["qwen3.attention.value_length"] == 128


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"architectures": ["GemmaForCausalLM"]}, ["GemmaForCausalLM", "LlamaForCausalLM"]),
        ({"architectures": None}, ["architectures", "list of one class name"]),
        ({"hidden_size": None}, ["hidden_size", "missing"]),
        ({"hidden_size": "64"}, ["hidden_size", '"64"', "integer"]),
        ({"num_key_value_heads": 3}, ["num_key_value_heads", "3", "divisor"]),
        ({"num_attention_heads": 7, "head_dim": None}, ["hidden_size", "multiple of num_attention_heads"]),
        ({"rms_norm_eps": 0}, ["rms_norm_eps", "above 0"]),
        ({"hidden_act": "gelu"}, ["hidden_act", "gelu", "silu"]),
        ({"mlp_bias": True}, ["mlp_bias"]),
        ({"tie_word_embeddings": 1}, ["tie_word_embeddings", "true or false"]),
        ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, ["already quantised", "gptq"]),
        ({"quantization_config": {"quant_method": "fp8"}}, ["already quantised", "fp8"]),
        ({"rope_scaling": {"rope_type": "su", "factor": 2.0}}, ["su", "yarn"]),
        ({"rope_scaling": {"rope_type": "longrope"}}, ["longrope", "llama3"]),
        ({"rope_scaling": {"rope_type": "yarn"}}, ["factor", "missing"]),
        ({"architectures": ["MistralForCausalLM"], "sliding_window": 4096}, ["sliding", "4096"]),
        ({"layer_types": ["full_attention", "sliding_attention"]}, ["layer_types", "sliding_attention"]),
        ({"num_hidden_layers": 100000}, ["num_hidden_layers", "512"]),
    ],
)
def test_what_would_not_run_the_same_is_refused_by_name(changes: dict[str, Any], words: list[str]) -> None:
    with pytest.raises((FormatError, UnsupportedError)) as error:
        keys_of(config(**changes))
    for word in words:
        assert word in str(error.value)


def test_windows_that_no_layer_uses_are_accepted() -> None:
    keys_of(config("MistralForCausalLM", sliding_window=None))
    keys_of(config("Qwen2ForCausalLM", head_dim=None, sliding_window=64, use_sliding_window=False))
    keys_of(config("Qwen2ForCausalLM", head_dim=None, sliding_window=64, use_sliding_window=True, max_window_layers=2))
    values = config("Qwen2ForCausalLM", head_dim=None, sliding_window=64, use_sliding_window=True, max_window_layers=1)
    with pytest.raises(UnsupportedError, match="sliding"):
        keys_of(values)


@needs_data
@pytest.mark.parametrize("arch", ["LlamaForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM"])
@pytest.mark.parametrize("dtype", ["F32", "F16", "BF16"])
def test_rows_arrive_where_the_architecture_says(tmp_path: Path, arch: str, dtype: str) -> None:
    """Permutation and names against a plain restatement, from every dtype, biases included."""
    bias = arch != "Qwen2ForCausalLM"
    values = config(arch, head_dim=None if arch.startswith("Qwen2") else 32, attention_bias=bias or None)
    tensors = weights(values, seed=3, dtype=dtype)
    save(tmp_path / "m", values, tensors)
    convert(tmp_path / "m", tmp_path / "m.gguf", "f32")
    file = Readback(tmp_path / "m.gguf")
    dim = values.get("head_dim", 16)
    # Position in the file -> row of the checkpoint: pairs (i, i + dim/2) become neighbours.
    order = [i // 2 + (i % 2) * (dim // 2) for i in range(dim)] if arch.startswith("Llama") else list(range(dim))
    names = {"q": "attn_q", "k": "attn_k", "v": "attn_v", "o": "attn_output"}
    seen = 0
    for hf, gguf in names.items():
        for part in ("weight", "bias"):
            source = tensors.get(f"model.layers.1.self_attn.{hf}_proj.{part}")
            assert (source is not None) == (f"blk.1.{gguf}.{part}" in file.types)
            if source is None:
                continue
            rows = source.astype(np.float32)
            if hf in "qk":
                rows = np.concatenate([head[order] for head in np.split(rows, len(rows) // dim)])
            assert np.array_equal(file.values[f"blk.1.{gguf}.{part}"], rows), (hf, part)
            seen += 1
    assert seen == (7 if arch.startswith("Qwen2") else 8)
    down = tensors["model.layers.0.mlp.down_proj.weight"].astype(np.float32)
    assert np.array_equal(file.values["blk.0.ffn_down.weight"], down)


@needs_data
def test_a_tied_head_is_left_out(tmp_path: Path) -> None:
    values = config(tie_word_embeddings=True)
    tensors = weights(values)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].copy()
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.ones(16, np.float32)
    save(tmp_path / "m", values, tensors)
    report = convert(tmp_path / "m", tmp_path / "m.gguf", "f16")
    assert "output.weight" not in Readback(tmp_path / "m.gguf").types
    assert any("lm_head" in note for note in report.notes)


@needs_data
def test_generation_defaults_and_licence_are_kept(tmp_path: Path) -> None:
    folder = save(tmp_path / "m", config(eos_token_id=[264, 2]), tokenizer=bpe_tokenizer())
    (folder / "generation_config.json").write_text(
        json.dumps(
            {"do_sample": True, "temperature": 0.6, "top_p": 0.95, "top_k": 20, "min_p": 0.0, "eos_token_id": [264, 5]}
        )
    )
    (folder / "README.md").write_text("---\nlicense: mit\nlanguage: en\n---\n# Model\n")
    convert(folder, tmp_path / "m.gguf", "f16")
    found = Readback(tmp_path / "m.gguf").metadata
    assert found["general.sampling.temp"] == np.float32(0.6)
    assert found["general.sampling.top_p"] == np.float32(0.95)
    assert found["general.sampling.top_k"] == 20
    assert found["general.sampling.min_p"] == 0.0
    assert found["general.license"] == "mit"
    assert found["tokenizer.ggml.eos_token_id"] == 264
    assert found["tokenizer.ggml.eot_token_id"] == 5
    (folder / "generation_config.json").write_text(json.dumps({"do_sample": False, "temperature": 0.6}))
    convert(folder, tmp_path / "greedy.gguf", "f16")
    assert not any(key.startswith("general.sampling") for key in Readback(tmp_path / "greedy.gguf").metadata)


CARD = """---
license: other
license_name: llama3.1
license_link: LICENSE
base_model:
- meta-llama/Llama-3.1-8B
- plain
tags: [chat, "a: b", chat]
pipeline_tag: text-generation
language:
- en
- no
datasets: org/stories
---
# Model
license: not here
"""


@needs_data
def test_the_front_matter_of_the_card_becomes_keys(tmp_path: Path) -> None:
    folder = save(tmp_path / "m", config())
    (folder / "README.md").write_text(CARD)
    convert(folder, tmp_path / "m.gguf", "f16")
    found = Readback(tmp_path / "m.gguf").metadata
    expected = {
        "general.license": "other",
        "general.license.name": "llama3.1",
        "general.license.link": "LICENSE",
        "general.base_model.count": 2,
        "general.base_model.0.name": "Llama-3.1-8B",
        "general.base_model.0.organization": "meta-llama",
        "general.base_model.0.repo_url": "https://huggingface.co/meta-llama/Llama-3.1-8B",
        "general.base_model.1.name": "plain",
        "general.dataset.count": 1,
        "general.dataset.0.name": "stories",
        "general.dataset.0.organization": "org",
        "general.dataset.0.repo_url": "https://huggingface.co/datasets/org/stories",
        "general.tags": ["chat", "a: b", "text-generation"],
        "general.languages": ["en", "no"],
    }
    ours = {"architecture", "type", "name", "size_label", "file_type", "quantization_version"}
    assert {k: v for k, v in found.items() if k.startswith("general.") and k.split(".")[1] not in ours} == expected


@needs_data
@pytest.mark.parametrize(
    ("card", "noted"),
    [
        ("# Only text\n", False),
        ("---\nlicense: mit\n", False),  # never closed
        ("---\n- a list\n---\n", False),
        ("---\nlicense: [{a: b}, '']\nlanguage: {en: 1}\n---\n", False),
        ("---\nlicense: [\n---\n", True),
        ("---\nlicense: !!python/object:os.system {command: exit}\n---\n", False),
        ("---\n" + "[" * 5000 + "\n---\n", True),
    ],
)
def test_a_card_that_says_nothing_useful_stops_nothing(tmp_path: Path, card: str, noted: bool) -> None:
    folder = save(tmp_path / "m", config())
    (folder / "README.md").write_text(card)
    report = convert(folder, tmp_path / "m.gguf", "f16")
    assert any("README.md" in note for note in report.notes) == noted
    assert not any(key.startswith(("general.license", "general.languages")) for key in Readback(report.path).metadata)


@needs_data
def test_errors_are_the_engines_own(tmp_path: Path) -> None:
    with pytest.raises(EngineError) as error:
        convert(tmp_path, tmp_path / "m.gguf", "f16")
    assert error.value.code == "no_config"
