"""Small random checkpoints, written with the ``safetensors`` package: the converter's input, made without its code."""

from __future__ import annotations

import gzip
import json
import shutil
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt
from safetensors.numpy import save_file

from tests.support import DATA

Tensors = dict[str, npt.NDArray[Any]]
DTYPES = {"F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16}
STORIES = ("stories260K-llama", "stories260K-llama-256d", "stories260K-qwen2-256d", "stories260K-qwen3-256d")


def config(arch: str = "LlamaForCausalLM", **changes: Any) -> dict[str, Any]:
    """A tiny configuration with distinct sizes, so that a mixed-up one shows. None as a change removes the key."""
    values: dict[str, Any] = {
        "architectures": [arch],
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "max_position_embeddings": 128,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "tie_word_embeddings": False,
        "vocab_size": 300,
        "hidden_act": "silu",
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    values.update(changes)
    return {key: value for key, value in values.items() if value is not None}


def weights(values: dict[str, Any], seed: int = 0, dtype: str = "F32") -> Tensors:
    """Random weights for a configuration. float16-safe and exact in every dtype: multiples of 1/64 below 4."""
    rng = np.random.default_rng(seed)
    embd, ff, vocab = values["hidden_size"], values["intermediate_size"], values["vocab_size"]
    dim = values.get("head_dim") or embd // values["num_attention_heads"]
    q, kv = values["num_attention_heads"] * dim, values["num_key_value_heads"] * dim
    arch = values["architectures"][0]

    def make(*shape: int) -> npt.NDArray[Any]:
        return (rng.integers(-127, 128, shape) / 64).astype(DTYPES[dtype])

    out = {"model.embed_tokens.weight": make(vocab, embd), "model.norm.weight": make(embd)}
    if not values.get("tie_word_embeddings"):
        out["lm_head.weight"] = make(vocab, embd)
    for i in range(values["num_hidden_layers"]):
        p = f"model.layers.{i}."
        out[p + "input_layernorm.weight"] = make(embd)
        out[p + "post_attention_layernorm.weight"] = make(embd)
        for name, rows, cols in (("q", q, embd), ("k", kv, embd), ("v", kv, embd), ("o", embd, q)):
            out[p + f"self_attn.{name}_proj.weight"] = make(rows, cols)
            if values.get("attention_bias") or (arch.startswith("Qwen2") and name != "o"):
                out[p + f"self_attn.{name}_proj.bias"] = make(rows)
        if arch.startswith("Qwen3"):
            out[p + "self_attn.q_norm.weight"], out[p + "self_attn.k_norm.weight"] = make(dim), make(dim)
        for name, rows, cols in (("gate", ff, embd), ("up", ff, embd), ("down", embd, ff)):
            out[p + f"mlp.{name}_proj.weight"] = make(rows, cols)
    return out


def bpe_tokenizer(n_plain: int = 8) -> dict[str, Any]:
    """A byte-level BPE tokenizer.json with qwen2's rules: 256 bytes, a few merges, two added tokens."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    alphabet = [chr(b) for b in printable] + [chr(256 + i) for i in range(256 - len(printable))]
    merges = [["a", "b"], ["ab", "c"], ["d", "e"], ["Ġ", "a"], ["Ġa", "b"], ["h", "i"], ["hi", "d"], ["x", "y"]][
        :n_plain
    ]
    vocab = {text: i for i, text in enumerate([*alphabet, *("".join(m) for m in merges)])}
    n = len(vocab)
    return {
        "added_tokens": [
            {"id": n, "content": "<|end|>", "special": True},
            {"id": n + 1, "content": "<think>", "special": False},
        ],
        "normalizer": {"type": "NFC"},
        "pre_tokenizer": qwen2_pre_tokenizer(),
        "post_processor": None,
        "model": {"type": "BPE", "vocab": vocab, "merges": merges, "ignore_merges": False, "byte_fallback": False},
    }


def qwen2_pre_tokenizer() -> Any:
    """As the published Qwen tokenizers have it."""
    with gzip.open(DATA / "tokenizers" / "qwen3.tokenizer.json.gz") as file:
        return json.load(file)["pre_tokenizer"]


def save(folder: Path, values: dict[str, Any], tensors: Tensors | None = None, tokenizer: Any = None) -> Path:
    """Writes a whole checkpoint folder."""
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "config.json", values)
    write_json(folder / "tokenizer.json", tokenizer if tokenizer is not None else bpe_tokenizer())
    save_file(tensors if tensors is not None else weights(values), folder / "model.safetensors")
    return folder


def write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, ensure_ascii=False), encoding="utf-8")


def copy_writable(name: str, to: Path) -> Path:
    """A copy of a shared model folder that a test may change."""
    to.mkdir(parents=True, exist_ok=True)
    for path in (DATA / "models" / name).iterdir():
        shutil.copyfile(path, to / path.name)
    return to
