"""Writes `hf_logits.npz`: what Hugging Face computes in float32 for every configuration. Development only.

    python -m tests.reference.make_hf_logits        (needs torch and transformers; the test suite does not)

Of each prompt the logits of `ModelConfig.kept_positions` are kept, as `<name>` float32 [positions, vocabulary], and
beside them the checksum of the weights as `<name>/weights`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from numpy.typing import NDArray

from .configs import CONFIGS, ModelConfig
from .decoder import decode, nmse
from .weights import Weights, checksum, make_weights

PATH = Path(__file__).with_name("hf_logits.npz")

FAMILIES: dict[str, tuple[Any, Any]] = {
    "llama": (transformers.LlamaConfig, transformers.LlamaForCausalLM),
    "qwen2": (transformers.Qwen2Config, transformers.Qwen2ForCausalLM),
    "qwen3": (transformers.Qwen3Config, transformers.Qwen3ForCausalLM),
}


def rope_parameters(config: ModelConfig) -> dict[str, Any]:
    scaling = config.rope_scaling
    if scaling is None:
        return {"rope_type": "default", "rope_theta": config.rope_theta}
    parameters = {"rope_type": scaling.kind, "rope_theta": config.rope_theta, "factor": scaling.factor}
    if scaling.kind != "linear":
        parameters["original_max_position_embeddings"] = scaling.original_context
    if scaling.kind == "llama3":
        parameters |= {"low_freq_factor": scaling.low_freq_factor, "high_freq_factor": scaling.high_freq_factor}
    if scaling.kind == "yarn":
        parameters |= {"beta_fast": scaling.beta_fast, "beta_slow": scaling.beta_slow}
        if scaling.attention_scale is not None:
            parameters["attention_factor"] = scaling.attention_scale
    return parameters


def hf_logits(config: ModelConfig, weights: Weights) -> NDArray[np.float32]:
    """Logits [T, V] of the prompt, with the attention written out in torch ("eager")."""
    config_class, model_class = FAMILIES[config.architecture]
    bias = {"attention_bias": config.attention_bias} if config.architecture != "qwen2" else {}
    model = model_class(
        config_class(
            hidden_size=config.hidden_size,
            intermediate_size=config.intermediate_size,
            num_hidden_layers=config.num_hidden_layers,
            num_attention_heads=config.num_attention_heads,
            num_key_value_heads=config.num_key_value_heads,
            head_dim=config.head_dim,
            vocab_size=config.vocab_size,
            rms_norm_eps=config.rms_norm_eps,
            tie_word_embeddings=config.tie_word_embeddings,
            max_position_embeddings=config.max_position_embeddings,
            rope_parameters=rope_parameters(config),
            attn_implementation="eager",
            **bias,
        )
    )
    state = {name: torch.from_numpy(value) for name, value in weights.items()}
    if config.tie_word_embeddings:
        state["lm_head.weight"] = state["model.embed_tokens.weight"]
    model.load_state_dict(state, strict=True)
    assert all(parameter.dtype == torch.float32 for parameter in model.parameters())
    with torch.inference_mode():
        return model.eval()(torch.tensor([config.prompt])).logits[0].numpy()


def main() -> None:
    torch.set_num_threads(1)
    arrays: dict[str, NDArray[Any]] = {}
    for config in CONFIGS:
        weights = make_weights(config)
        logits = hf_logits(config, weights)
        error = nmse(logits, decode(config, weights, config.prompt))
        print(f"{config.name:40} {error:.1e} from the float64 decoder, logits spread {logits.std():.2f}")
        arrays[config.name] = logits[config.kept_positions]
        arrays[f"{config.name}/weights"] = np.uint32(checksum(weights))
    np.savez_compressed(PATH, **arrays)
    print(f"{len(CONFIGS)} configurations, {PATH.stat().st_size / 1e3:.0f} kB")


if __name__ == "__main__":
    main()
