"""Tokenizers for the tests of this folder, each built once, and the oracles they are compared with."""

from __future__ import annotations

import gzip
import json
import random
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers

from pyengine.gguf_file import GgufFile
from pyengine.tokenizer import Tokenizer
from tests.support import DATA

VOCABULARIES = ("llama-bpe", "qwen2", "llama-spm", "deepseek-llm", "gpt-2")
HF_TOKENIZERS = ("qwen3", "r1-distill-qwen")
CONTROL, USER_DEFINED, UNUSED = 3, 4, 5


def vocabulary_path(name: str) -> Path:
    return DATA / "vocab" / f"ggml-vocab-{name}.gguf"


@cache
def vocabulary(name: str) -> Tokenizer:
    return Tokenizer.from_gguf(vocabulary_path(name))


@cache
def metadata_of(path: Path) -> dict[str, Any]:
    with GgufFile.open(path, load="header") as file:
        return dict(file.metadata)


@cache
def tokenizer_json(name: str) -> dict[str, Any]:
    data: dict[str, Any] = json.loads(gzip.decompress((DATA / "tokenizers" / f"{name}.tokenizer.json.gz").read_bytes()))
    return data


@cache
def hf_tokenizer(name: str) -> tokenizers.Tokenizer:
    """The original tokenizer, which is the oracle."""
    return tokenizers.Tokenizer.from_str(json.dumps(tokenizer_json(name)))


@cache
def from_hf(name: str) -> Tokenizer:
    """Our tokenizer from the metadata that a converter would write for a Hugging Face one."""
    return Tokenizer.from_metadata(metadata_from_hf(name))


def metadata_from_hf(name: str) -> dict[str, Any]:
    data = tokenizer_json(name)
    tokens = dict(data["model"]["vocab"])
    types = {}
    for added in data["added_tokens"]:
        tokens[added["content"]] = added["id"]
        special = added["special"] or added["content"].startswith("<｜")
        types[added["id"]] = CONTROL if special else USER_DEFINED
    n = max(tokens.values()) + 1
    texts = [f"[PAD{i}]" for i in range(n)]
    for text, token in tokens.items():
        texts[token] = text
    known = set(tokens.values())
    ids = {"qwen3": (151643, 151645), "r1-distill-qwen": (151646, 151643)}[name]
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "qwen2" if name == "qwen3" else "deepseek-r1-qwen",
        "tokenizer.ggml.tokens": texts,
        "tokenizer.ggml.token_type": np.array([types.get(i, 1 if i in known else UNUSED) for i in range(n)], np.int32),
        "tokenizer.ggml.merges": [" ".join(pair) for pair in data["model"]["merges"]],
        "tokenizer.ggml.bos_token_id": ids[0],
        "tokenizer.ggml.eos_token_id": ids[1],
        "tokenizer.ggml.add_bos_token": name != "qwen3",
    }


def small_metadata(markers: tuple[tuple[str, int], ...] = (), **changes: Any) -> dict[str, Any]:
    """A byte-level vocabulary of the 256 bytes, ``ab`` and the given (text, token type)."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    rest = [b for b in range(256) if b not in printable]
    texts = [*map(chr, printable), *(chr(256 + i) for i in range(len(rest))), "ab"]
    base = {
        "model": "gpt2",
        "pre": "gpt-2",
        "tokens": [*texts, *(text for text, _ in markers)],
        "token_type": np.array([1] * len(texts) + [kind for _, kind in markers], np.int32),
        "merges": ["a b"],
        **changes,
    }
    return {f"tokenizer.ggml.{key}": value for key, value in base.items() if value is not None}


_PIECES = (
    *("the", "Hello", " world", "'s", "'LL", " don't", "ing", "\n", "\r\n", "\n\n", "\t", " ", "  ", "   ", "123", "7"),
    *(
        " 2024",
        "١٢٣",
        "½",
        "Ⅷ",
        "!",
        "...",
        " --",
        "#$%",
        "()[]{}",
        "é",
        "ñandú",
        "Ünïcödé",
        "ß",
        "中文",
        "日本語",
        "한국어",
    ),
    *(
        "हिन्दी",
        "العربية",
        "עברית",
        "ไทย",
        "Ελλάδα",
        "Привет",
        "ǅ",
        "ª",
        "👩\u200d👩\u200d👧",
        "🏳️\u200d🌈",
        "🇩🇪",
        "e\u0301",
    ),
    *(
        "\u00a0",
        "\u2003",
        "\u3000",
        "\u200b",
        "\ufeff",
        "\x00",
        "\x07",
        "\x85",
        "\u2028",
        "𝒳",
        "𐐷",
        "\ue000",
        "\U0010fffd",
    ),
)


def random_text(rng: random.Random, pieces: int) -> str:
    """Words, digits, marks, spaces and rare characters, as they never occur in books."""
    out = []
    for _ in range(rng.randrange(pieces)):
        roll = rng.random()
        if roll < 0.8:
            out.append(rng.choice(_PIECES))
        elif roll < 0.9:
            out.append("".join(chr(rng.randrange(32, 127)) for _ in range(rng.randrange(8))))
        else:
            code = rng.randrange(0x10FFFF)
            out.append(chr(code) if not 0xD800 <= code < 0xE000 else "?")
    return "".join(out)
