"""Weights that are the same bytes on every machine: integer draws from PCG64 and one correctly rounded scaling."""

from __future__ import annotations

from collections.abc import Mapping
from zlib import crc32

import numpy as np
from numpy.typing import NDArray

from .configs import ModelConfig

Weights = dict[str, NDArray[np.float32]]


def draw(seed: int, name: str, shape: tuple[int, ...], std: float, mean: float = 0.0) -> NDArray[np.float32]:
    """Nearly normal numbers: the sum of four uniform 16-bit integers, centred and scaled.

    numpy promises stable raw words of a bit generator between versions, but not a stable `standard_normal`.
    """
    count = int(np.prod(shape))
    words = np.random.PCG64([seed, crc32(name.encode())]).random_raw(count).astype("<u8")
    total = words.view("<u2").reshape(count, 4).sum(axis=1, dtype=np.int64)  # mean 2 x 65535
    deviation = np.sqrt((65536**2 - 1) / 3)  # the variance of one uniform integer is (65536^2 - 1) / 12
    values: NDArray[np.float32] = (mean + std * (total - 2 * 65535) / deviation).astype(np.float32)
    return values.reshape(shape)


def make_weights(config: ModelConfig) -> Weights:
    """Hugging Face names to float32 arrays; matrices are [outputs, inputs].

    Scales are chosen so that tests see every feature: attention scores have a standard deviation near 2 (attention
    far from uniform), biases and norms are far from 0 and 1, and embeddings are small enough for eps to matter.
    """
    hidden, ffn, dim = config.hidden_size, config.intermediate_size, config.head_dim
    q_rows, kv_rows = config.num_attention_heads * dim, config.num_key_value_heads * dim
    weights: Weights = {}

    def matrix(name: str, rows: int, cols: int, gain: float, bias: bool = False) -> None:
        weights[f"{name}.weight"] = draw(config.seed, f"{name}.weight", (rows, cols), gain / np.sqrt(cols))
        if bias:
            weights[f"{name}.bias"] = draw(config.seed, f"{name}.bias", (rows,), 0.5)

    def norm(name: str, size: int, mean: float = 1.0) -> None:
        weights[f"{name}.weight"] = draw(config.seed, f"{name}.weight", (size,), 0.2, mean)

    weights["model.embed_tokens.weight"] = draw(config.seed, "embed", (config.vocab_size, hidden), 0.1)
    for i in range(config.num_hidden_layers):
        layer = f"model.layers.{i}"
        norm(f"{layer}.input_layernorm", hidden)
        matrix(f"{layer}.self_attn.q_proj", q_rows, hidden, 1.4, config.bias_on_qkv)
        matrix(f"{layer}.self_attn.k_proj", kv_rows, hidden, 1.4, config.bias_on_qkv)
        matrix(f"{layer}.self_attn.v_proj", kv_rows, hidden, 1.0, config.bias_on_qkv)
        matrix(f"{layer}.self_attn.o_proj", hidden, q_rows, 1.0, config.bias_on_output)
        if config.norm_on_qk:
            norm(f"{layer}.self_attn.q_norm", dim, 1.4)
            norm(f"{layer}.self_attn.k_norm", dim, 1.4)
        norm(f"{layer}.post_attention_layernorm", hidden)
        matrix(f"{layer}.mlp.gate_proj", ffn, hidden, 1.0)
        matrix(f"{layer}.mlp.up_proj", ffn, hidden, 1.0)
        matrix(f"{layer}.mlp.down_proj", hidden, ffn, 1.0)
    norm("model.norm", hidden)
    if not config.tie_word_embeddings:
        matrix("lm_head", config.vocab_size, hidden, 2.0)
    return weights


def checksum(weights: Mapping[str, NDArray[np.float32]]) -> int:
    """One number for all weights, committed beside the logits to tell drifting weights from wrong logits."""
    value = 0
    for name in sorted(weights):
        value = crc32(weights[name].astype("<f4").tobytes(), crc32(name.encode(), value))
    return value
