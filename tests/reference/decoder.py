"""The decoder that llama, qwen2 and qwen3 share, in plain numpy float64: written to be read, not to be fast.

T is the prompt length, H the hidden size, D the head size, Q and K the numbers of query and KV heads, V the
vocabulary. Activations are [T, H]; matrices are [outputs, inputs] and applied as `x @ matrix.T`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .configs import ModelConfig, RopeScaling

Array = NDArray[np.float64]


def decode(config: ModelConfig, weights: Mapping[str, NDArray[Any]], tokens: Sequence[int]) -> Array:
    """Logits [T, V] of every position of the prompt `tokens`; `weights` carry their Hugging Face names."""
    w = {name: np.asarray(value, dtype=np.float64) for name, value in weights.items()}
    cos, sin = rope_tables(config, len(tokens))
    eps = config.rms_norm_eps

    embedding = w["model.embed_tokens.weight"]
    x = embedding[np.asarray(tokens)]
    for i in range(config.num_hidden_layers):
        prefix = f"model.layers.{i}."
        layer = {name.removeprefix(prefix): value for name, value in w.items() if name.startswith(prefix)}
        x = x + attention(config, layer, rms_norm(x, layer["input_layernorm.weight"], eps), cos, sin)
        x = x + mlp(layer, rms_norm(x, layer["post_attention_layernorm.weight"], eps))
    x = rms_norm(x, w["model.norm.weight"], eps)
    return x @ (embedding if config.tie_word_embeddings else w["lm_head.weight"]).T


def attention(config: ModelConfig, layer: Mapping[str, Array], x: Array, cos: Array, sin: Array) -> Array:
    """Causal grouped-query attention of the normalised activations x; the residual is the caller's."""
    length, dim, kv_heads = len(x), config.head_dim, config.num_key_value_heads
    q = linear(layer, "self_attn.q_proj", x).reshape(length, config.num_attention_heads, dim)
    k = linear(layer, "self_attn.k_proj", x).reshape(length, kv_heads, dim)
    v = linear(layer, "self_attn.v_proj", x).reshape(length, kv_heads, dim)
    if config.norm_on_qk:  # per head, before the rotation
        q = rms_norm(q, layer["self_attn.q_norm.weight"], config.rms_norm_eps)
        k = rms_norm(k, layer["self_attn.k_norm.weight"], config.rms_norm_eps)
    q, k = rotate(q, cos, sin), rotate(k, cos, sin)

    # Query head h reads KV head h // group: split Q into [K, group].
    grouped = q.reshape(length, kv_heads, config.num_attention_heads // kv_heads, dim)
    scores = np.einsum("tkgd,skd->kgts", grouped, k) / math.sqrt(dim)
    scores = np.where(np.tri(length, dtype=bool), scores, -np.inf)  # position t sees s <= t
    mixed = np.einsum("kgts,skd->tkgd", softmax(scores), v)
    return linear(layer, "self_attn.o_proj", mixed.reshape(length, -1))


def mlp(layer: Mapping[str, Array], x: Array) -> Array:
    gate = linear(layer, "mlp.gate_proj", x)
    silu = gate / (1.0 + np.exp(-gate))
    return linear(layer, "mlp.down_proj", silu * linear(layer, "mlp.up_proj", x))


def linear(layer: Mapping[str, Array], name: str, x: Array) -> Array:
    y = x @ layer[f"{name}.weight"].T
    bias = layer.get(f"{name}.bias")
    return y if bias is None else y + bias


def rms_norm(x: Array, weight: Array, eps: float) -> Array:
    mean_square: Array = np.mean(x * x, axis=-1, keepdims=True)
    return x / np.sqrt(mean_square + eps) * weight


def softmax(scores: Array) -> Array:
    e: Array = np.exp(scores - scores.max(axis=-1, keepdims=True))
    total: Array = e.sum(axis=-1, keepdims=True)
    return e / total


def rotate(x: Array, cos: Array, sin: Array) -> Array:
    """Turns pair i, which is elements (i, i + D/2) of each head of x [T, heads, D], by the angle of (position, i)."""
    half = x.shape[-1] // 2
    a, b = x[..., :half], x[..., half:]
    cos, sin = cos[:, None, :], sin[:, None, :]
    return np.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)


def rope_tables(config: ModelConfig, length: int) -> tuple[Array, Array]:
    """cos and sin [T, D/2], both multiplied by the attention scale (so that scores carry its square)."""
    angles = np.arange(length)[:, None] * inverse_frequencies(config)
    scale = config.rope_scaling.effective_attention_scale if config.rope_scaling else 1.0
    return scale * np.cos(angles), scale * np.sin(angles)


def inverse_frequencies(config: ModelConfig) -> Array:
    """Radians per position of each of the D/2 pairs, as Hugging Face defines them."""
    dim, theta, scaling = config.head_dim, config.rope_theta, config.rope_scaling
    plain = theta ** (-np.arange(0, dim, 2) / dim)
    if scaling is None:
        return plain
    match scaling.kind:
        case "linear":
            return plain / scaling.factor
        case "yarn":
            return _yarn(plain, scaling, dim, theta)
        case "llama3":
            return _llama3(plain, scaling)


def _yarn(plain: Array, scaling: RopeScaling, dim: int, theta: float) -> Array:
    """Fast pairs keep their frequency, slow ones are interpolated, a linear ramp over the pair index joins them."""

    def pair_turning(turns: float) -> float:
        """The (fractional) pair that makes this many full turns within the original context."""
        return dim * math.log(scaling.original_context / (turns * 2 * math.pi)) / (2 * math.log(theta))

    low = max(math.floor(pair_turning(scaling.beta_fast)), 0)
    high = min(math.ceil(pair_turning(scaling.beta_slow)), dim - 1)
    width = high - low if high != low else 0.001
    interpolated = np.clip((np.arange(dim // 2) - low) / width, 0.0, 1.0)  # 0: keep, 1: divide by the factor
    return plain / scaling.factor * interpolated + plain * (1.0 - interpolated)


def _llama3(plain: Array, scaling: RopeScaling) -> Array:
    """Waves that fit the original context often keep their frequency, long ones are interpolated, others blend."""
    turns = scaling.original_context * plain / (2 * math.pi)  # within the original context
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    smooth = np.clip((turns - low) / (high - low), 0.0, 1.0)
    return (1.0 - smooth) * plain / scaling.factor + smooth * plain


def nmse(measured: NDArray[Any], expected: NDArray[Any]) -> float:
    """Normalised mean squared error: sum((measured - expected)^2) / sum(expected^2), in float64."""
    expected = np.asarray(expected, dtype=np.float64)
    difference = np.asarray(measured, dtype=np.float64) - expected
    assert difference.shape == expected.shape
    return float(np.sum(difference**2) / np.sum(expected**2))
