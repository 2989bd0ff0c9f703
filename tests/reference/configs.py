"""Small decoder configurations, chosen so that every feature of the three architectures changes the logits."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal
from zlib import crc32

import numpy as np

Architecture = Literal["llama", "qwen2", "qwen3"]


@dataclass(frozen=True)
class RopeScaling:
    """How rotary frequencies are stretched beyond the context a model was trained on."""

    kind: Literal["linear", "yarn", "llama3"]
    factor: float
    original_context: int = 0  # yarn, llama3
    low_freq_factor: float = 1.0  # llama3
    high_freq_factor: float = 4.0  # llama3
    beta_fast: float = 32.0  # yarn: dimensions that turn more often than this keep their frequency
    beta_slow: float = 1.0  # yarn: dimensions that turn less often than this are fully interpolated
    attention_scale: float | None = None  # yarn: what cos and sin are multiplied by; None is the usual value

    @property
    def usual_attention_scale(self) -> float:
        return 0.1 * math.log(self.factor) + 1.0 if self.kind == "yarn" else 1.0

    @property
    def effective_attention_scale(self) -> float:
        return self.usual_attention_scale if self.attention_scale is None else self.attention_scale


@dataclass(frozen=True)
class ModelConfig:
    """One model and one prompt. Field names are those of a Hugging Face `config.json`."""

    name: str
    architecture: Architecture
    hidden_size: int = 64
    intermediate_size: int = 96
    num_hidden_layers: int = 2
    num_attention_heads: int = 4
    num_key_value_heads: int = 2
    head_dim: int = 16
    vocab_size: int = 96
    rms_norm_eps: float = 1e-6
    tie_word_embeddings: bool = False
    attention_bias: bool = False  # llama only: biases on q, k, v and o
    rope_theta: float = 10000.0
    rope_scaling: RopeScaling | None = None
    max_position_embeddings: int = 256
    prompt_length: int = 40

    def __post_init__(self) -> None:
        assert self.num_attention_heads % self.num_key_value_heads == 0
        assert self.head_dim % 2 == 0
        assert self.prompt_length <= self.max_position_embeddings
        assert not self.attention_bias or self.architecture == "llama"

    @property
    def seed(self) -> int:
        """Follows the name, so that adding a configuration leaves the weights of all others alone."""
        return crc32(self.name.encode())

    @property
    def bias_on_qkv(self) -> bool:
        return self.attention_bias or self.architecture == "qwen2"

    @property
    def bias_on_output(self) -> bool:
        return self.attention_bias

    @property
    def norm_on_qk(self) -> bool:
        return self.architecture == "qwen3"

    @property
    def prompt(self) -> list[int]:
        raw = np.random.PCG64([self.seed, crc32(b"prompt")]).random_raw(self.prompt_length)
        return [int(word) % self.vocab_size for word in raw]

    @property
    def kept_positions(self) -> list[int]:
        """The at most 8 evenly spaced prompt positions, first and last included, whose logits are committed."""
        return sorted({i * (self.prompt_length - 1) // 7 for i in range(8)})

    @classmethod
    def from_hf(cls, name: str, hf: Mapping[str, Any]) -> ModelConfig:
        """Reads the fields of a `config.json`; of the rope scalings only their absence, which is all tests need."""
        assert hf.get("rope_scaling") is None
        return cls(
            name=name,
            architecture=hf["model_type"],
            hidden_size=hf["hidden_size"],
            intermediate_size=hf["intermediate_size"],
            num_hidden_layers=hf["num_hidden_layers"],
            num_attention_heads=hf["num_attention_heads"],
            num_key_value_heads=hf["num_key_value_heads"],
            head_dim=hf.get("head_dim") or hf["hidden_size"] // hf["num_attention_heads"],
            vocab_size=hf["vocab_size"],
            rms_norm_eps=hf["rms_norm_eps"],
            tie_word_embeddings=hf.get("tie_word_embeddings", False),
            attention_bias=hf["model_type"] == "llama" and hf.get("attention_bias", False),
            rope_theta=hf.get("rope_theta", 10000.0),
            max_position_embeddings=hf["max_position_embeddings"],
        )


def _yarn(factor: float, original_context: int, **more: float) -> dict[str, Any]:
    """A YaRN file states the stretched context as its own, so both numbers move together."""
    scaling = RopeScaling("yarn", factor, original_context, **more)
    return {"rope_scaling": scaling, "max_position_embeddings": round(factor * original_context)}


def _llama3(factor: float, low: float, high: float, original_context: int) -> dict[str, Any]:
    return {"rope_scaling": RopeScaling("llama3", factor, original_context, low, high)}


# Variations of the default shape that every architecture goes through.
_COMMON: dict[str, dict[str, Any]] = {
    "gqa1": {"num_key_value_heads": 4},
    "gqa2": {"num_key_value_heads": 2, "prompt_length": 100},
    "gqa4": {"num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 8},
    "gqa8": {"num_attention_heads": 8, "num_key_value_heads": 1, "head_dim": 8, "prompt_length": 77},
    "heads_wider_than_hidden": {"hidden_size": 48, "head_dim": 32, "intermediate_size": 100},
    "heads_narrower_than_hidden": {"hidden_size": 128, "head_dim": 8, "vocab_size": 128},
    "tied": {"tie_word_embeddings": True, "intermediate_size": 172},
    "eps_1e-5": {"rms_norm_eps": 1e-5},
    "odd_sizes": {
        "hidden_size": 45, "intermediate_size": 77, "num_hidden_layers": 3, "num_attention_heads": 3,
        "num_key_value_heads": 1, "head_dim": 10, "vocab_size": 67, "prompt_length": 33,
    },
    "theta_500000": {"rope_theta": 500000.0, "head_dim": 32, "prompt_length": 128},
    "theta_1000000_tied": {"rope_theta": 1e6, "tie_word_embeddings": True, "hidden_size": 32, "vocab_size": 64},
    "prompt_of_1": {"prompt_length": 1},
    "prompt_of_128": {"prompt_length": 128, "num_hidden_layers": 3},
    "linear_2": {"rope_scaling": RopeScaling("linear", 2.0), "prompt_length": 128},
    "linear_4.5": {"rope_scaling": RopeScaling("linear", 4.5), "rope_theta": 1000.0, "prompt_length": 64},
    "yarn_2": {**_yarn(2.0, 64), "prompt_length": 128},
    "yarn_4_unit_scale": {**_yarn(4.0, 32, attention_scale=1.0), "prompt_length": 100},
    # Long enough an original context, and heads wide enough, that the ramp begins and ends inside the head.
    "yarn_8_inner_ramp": {**_yarn(8.0, 4096), "head_dim": 32, "prompt_length": 128},
}  # fmt: skip

_LLAMA: dict[str, dict[str, Any]] = {
    "one_layer": {"num_hidden_layers": 1, "prompt_length": 16},
    "llama3_8": {**_llama3(8.0, 1.0, 4.0, 64), "prompt_length": 128},
    "llama3_32_theta_500000": {**_llama3(32.0, 1.0, 4.0, 128), "rope_theta": 500000.0, "head_dim": 32},
    "llama3_2_other_bounds": {**_llama3(2.0, 0.5, 8.0, 100), "head_dim": 24, "prompt_length": 128},
    "llama3_8_tied_gqa1": {**_llama3(8.0, 1.0, 4.0, 32), "tie_word_embeddings": True, "num_key_value_heads": 4},
    "attention_bias": {"attention_bias": True},
    "attention_bias_gqa8_tied": {
        "attention_bias": True, "tie_word_embeddings": True, "num_attention_heads": 8, "num_key_value_heads": 1,
        "head_dim": 20, "prompt_length": 90,
    },
    "attention_bias_llama3": {"attention_bias": True, **_llama3(4.0, 1.0, 4.0, 64), "prompt_length": 120},
    # The "DeepSeek-R1 8B" card in miniature: 40 layers, as many KV heads as heads, hidden = heads x head_dim.
    "card_40_layers": {
        "num_hidden_layers": 40, "num_attention_heads": 8, "num_key_value_heads": 8, "head_dim": 8,
        "intermediate_size": 172, "rms_norm_eps": 1e-5, "rope_theta": 500000.0, "prompt_length": 64,
    },
    "card_40_layers_narrow": {
        "num_hidden_layers": 40, "hidden_size": 32, "num_attention_heads": 8, "num_key_value_heads": 8, "head_dim": 4,
        "intermediate_size": 50, "vocab_size": 64, "prompt_length": 128,
    },
}  # fmt: skip

# The head groupings of R1-Distill-Qwen 32B, 1.5B and 7B.
_QWEN2: dict[str, dict[str, Any]] = {
    "gqa5": {"num_attention_heads": 10, "num_key_value_heads": 2, "hidden_size": 80, "head_dim": 8},
    "gqa6": {"num_attention_heads": 12, "num_key_value_heads": 2, "hidden_size": 96, "head_dim": 8},
    "gqa7": {"num_attention_heads": 7, "num_key_value_heads": 1, "hidden_size": 56, "head_dim": 8},
}

_QWEN3: dict[str, dict[str, Any]] = {
    # R1-0528-Qwen3-8B in miniature: its rope, its effective attention scale of 1, its grouping.
    "r1_0528": {
        **_yarn(4.0, 32768, attention_scale=1.0), "rope_theta": 1e6, "num_attention_heads": 8,
        "num_key_value_heads": 2, "head_dim": 32, "num_hidden_layers": 3, "prompt_length": 128,
    },
    "yarn_other_betas": {**_yarn(4.0, 512, beta_fast=16.0, beta_slow=2.0), "head_dim": 32, "prompt_length": 128},
    "yarn_other_scale": {**_yarn(3.0, 100, attention_scale=0.8), "prompt_length": 110},
    # Both ends of the ramp fall on dimension 0: its width must not be zero.
    "yarn_empty_ramp": {**_yarn(16.0, 6), "prompt_length": 90},
}  # fmt: skip


def _all() -> Iterator[ModelConfig]:
    own = {"llama": _LLAMA, "qwen2": _QWEN2, "qwen3": _QWEN3}
    for architecture, extra in own.items():
        base = ModelConfig(name="", architecture=architecture)  # type: ignore[arg-type]
        for variation, changes in (_COMMON | extra).items():
            yield replace(base, name=f"{architecture}-{variation}", **changes)


CONFIGS: list[ModelConfig] = list(_all())
BY_NAME: dict[str, ModelConfig] = {config.name: config for config in CONFIGS}
