"""Writes one configuration as a GGUF file, laid out as llama.cpp's converter would."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from gguf import GGMLQuantizationType, quants
from numpy.typing import NDArray

from .configs import ModelConfig
from .weights import Weights

# GGUF tensor name patterns to storage types; the first match counts, no match means F32.
Types = Mapping[str, GGMLQuantizationType]

# By GGUF name: matrices that are written as these blocks [rows, bytes].
Packed = Mapping[str, tuple[GGMLQuantizationType, NDArray[np.uint8]]]

_OUTER = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}
_INNER = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def gguf_name(hf_name: str) -> str:
    """`model.layers.3.self_attn.q_proj.weight` -> `blk.3.attn_q.weight`."""
    if hf_name in _OUTER:
        return _OUTER[hf_name]
    layer, _, rest = hf_name.removeprefix("model.layers.").partition(".")
    module, _, kind = rest.rpartition(".")
    return f"blk.{layer}.{_INNER[module]}.{kind}"


def write_gguf(
    path: Path,
    config: ModelConfig,
    weights: Weights,
    types: Types | None = None,
    tokenizer: bool = True,
    packed: Packed | None = None,
) -> None:
    """Writes the file at `path`. One-dimensional tensors stay F32 whatever `types` says, as everywhere.

    A matrix whose columns do not fill the blocks of its type is gguf's QuantShapeError, never a silent F32.
    """
    writer = gguf.GGUFWriter(path, config.architecture)
    _add_metadata(writer, config)
    if tokenizer:
        _add_tokenizer(writer, config.vocab_size)
    for name, values in gguf_tensors(config, weights):
        if packed and name in packed:
            storage, blocks = packed[name]
        else:
            storage = _storage_type(name, values, types or {})
            blocks = quants.quantize(values, storage)
        writer.add_tensor(name, blocks, raw_dtype=storage)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def as_stored(weights: Weights, types: Types) -> Weights:
    """The weights that a file written with `types` holds, dequantised, by Hugging Face name.

    Rows are quantised one by one, so the permutation of Q and K rows makes no difference to the values.
    """
    stored: Weights = {}
    for name, values in weights.items():
        storage = _storage_type(gguf_name(name), values, types)
        stored[name] = quants.dequantize(quants.quantize(values, storage), storage).astype(np.float32)
    return stored


def gguf_tensors(config: ModelConfig, weights: Weights) -> Iterator[tuple[str, NDArray[np.float32]]]:
    """GGUF names and float32 values, in the order of `weights`, then `rope_freqs.weight` where the rope has it."""
    for name, values in weights.items():
        if config.architecture == "llama" and ".q_proj." in name:
            values = pair_rows(values, config.num_attention_heads)
        if config.architecture == "llama" and ".k_proj." in name:
            values = pair_rows(values, config.num_key_value_heads)
        yield gguf_name(name), values
    if config.rope_scaling is not None and config.rope_scaling.kind == "llama3":
        yield "rope_freqs.weight", llama3_divisors(config)


def pair_rows(values: NDArray[np.float32], heads: int) -> NDArray[np.float32]:
    """Rows (0, 1, ... D-1) of each head become (0, D/2, 1, D/2 + 1, ...).

    Llama files rotate adjacent pairs where Hugging Face rotates element i with i + D/2. Takes Q or K weights
    [heads x D, inputs] and biases [heads x D]; qwen2 and qwen3 files keep Hugging Face's order.
    """
    half = values.shape[0] // heads // 2
    paired = values.reshape(heads, 2, half, *values.shape[1:]).swapaxes(1, 2)
    return np.ascontiguousarray(paired.reshape(values.shape))


def llama3_divisors(config: ModelConfig) -> NDArray[np.float32]:
    """What the frequency of each of the D/2 pairs is divided by: the form llama3 scaling takes in a file."""
    scaling = config.rope_scaling
    assert scaling is not None
    assert scaling.kind == "llama3"
    longest_kept = scaling.original_context / scaling.high_freq_factor
    shortest_interpolated = scaling.original_context / scaling.low_freq_factor
    divisors = []
    for pair in range(config.head_dim // 2):
        wavelength = 2 * math.pi * config.rope_theta ** (2 * pair / config.head_dim)
        if wavelength < longest_kept:
            divisors.append(1.0)
        elif wavelength > shortest_interpolated:
            divisors.append(scaling.factor)
        else:
            smooth = scaling.original_context / wavelength - scaling.low_freq_factor
            smooth /= scaling.high_freq_factor - scaling.low_freq_factor
            divisors.append(1 / ((1 - smooth) / scaling.factor + smooth))
    return np.array(divisors, dtype=np.float32)


def _storage_type(name: str, values: NDArray[Any], types: Types) -> GGMLQuantizationType:
    if values.ndim == 1:
        return GGMLQuantizationType.F32
    matches = (storage for pattern, storage in types.items() if fnmatchcase(name, pattern))
    return next(matches, GGMLQuantizationType.F32)


def _add_metadata(writer: gguf.GGUFWriter, config: ModelConfig) -> None:
    writer.add_name(config.name)
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_file_type(gguf.LlamaFileType.ALL_F32)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    # Absent keys mean hidden / heads: a file has them where that is not so, and every qwen3 file has them.
    if config.architecture == "qwen3" or config.head_dim * config.num_attention_heads != config.hidden_size:
        writer.add_key_length(config.head_dim)
        writer.add_value_length(config.head_dim)
    if config.architecture == "llama":
        writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(config.rope_theta)

    scaling = config.rope_scaling
    if scaling is None or scaling.kind == "llama3":  # llama3 scaling is a tensor, not a key
        return
    writer.add_rope_scaling_type(gguf.RopeScalingType(scaling.kind))
    writer.add_rope_scaling_factor(scaling.factor)
    if scaling.kind == "yarn":
        writer.add_rope_scaling_orig_ctx_len(scaling.original_context)
        if scaling.attention_scale is not None:
            # The key is relative to the usual scale: readers multiply it by 0.1 ln(factor) + 1.
            writer.add_rope_scaling_attn_factors(scaling.attention_scale / scaling.usual_attention_scale)
        if (scaling.beta_fast, scaling.beta_slow) != (32.0, 1.0):
            writer.add_rope_scaling_yarn_beta_fast(scaling.beta_fast)
            writer.add_rope_scaling_yarn_beta_slow(scaling.beta_slow)


def _add_tokenizer(writer: gguf.GGUFWriter, vocab_size: int) -> None:
    """A byte-level BPE of printable characters with one merge, one control token and unused tokens as padding."""
    characters = [chr(code) for code in range(ord("!"), ord("~") + 1)][: vocab_size - 2]
    tokens = [*characters, characters[0] + characters[1]]
    types = [gguf.TokenType.NORMAL] * len(tokens)
    while len(tokens) < vocab_size - 1:
        tokens.append(f"[PAD{len(tokens)}]")
        types.append(gguf.TokenType.UNUSED)
    tokens.append("<|end|>")
    types.append(gguf.TokenType.CONTROL)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    writer.add_token_merges([f"{characters[0]} {characters[1]}"])
    writer.add_eos_token_id(vocab_size - 1)
    writer.add_add_bos_token(False)
