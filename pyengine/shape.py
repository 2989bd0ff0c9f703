"""The sizes of a model that memory and speed depend on: from a file, a ``config.json``, or a built-in card."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pyengine.errors import FileError, FormatError, InvalidArgument, UnsupportedError

if TYPE_CHECKING:
    from pyengine.model import Model


@dataclass(frozen=True)
class Shape:
    """Sizes of a decoder.

    Attributes:
        name: for people.
        arch: ``"llama"``, ``"qwen2"`` or ``"qwen3"``.
        layers, embd, ff, heads, kv_heads, head_dim, vocab: counts; ``heads`` is a multiple of ``kv_heads``.
        context: tokens the model was made for.
        tied: the embedding makes the logits, too.
        merges: of the tokenizer; estimated where no file says.
        rope_factors: the file holds a tensor of rope factors (Llama 3.1).
        biases: of q, k, v and the attention output, which ones there are.
    """

    name: str
    arch: str
    layers: int
    embd: int
    ff: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    context: int
    tied: bool = False
    merges: int = 0
    rope_factors: bool = False
    biases: str = ""

    @property
    def group(self) -> int:
        """Query heads for each KV head."""
        return self.heads // self.kv_heads

    def tensors(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        """(name, shape with rows first) of every tensor of a GGUF file."""
        q, kv = self.heads * self.head_dim, self.kv_heads * self.head_dim
        outputs = {"q": q, "k": kv, "v": kv, "output": self.embd}
        yield "token_embd.weight", (self.vocab, self.embd)
        for i in range(self.layers):
            layer = f"blk.{i}."
            yield layer + "attn_norm.weight", (self.embd,)
            for part, rows in outputs.items():
                yield f"{layer}attn_{part}.weight", (rows, q if part == "output" else self.embd)
                if part[0] in self.biases:
                    yield f"{layer}attn_{part}.bias", (rows,)
            if self.arch == "qwen3":
                yield layer + "attn_q_norm.weight", (self.head_dim,)
                yield layer + "attn_k_norm.weight", (self.head_dim,)
            yield layer + "ffn_norm.weight", (self.embd,)
            yield layer + "ffn_gate.weight", (self.ff, self.embd)
            yield layer + "ffn_up.weight", (self.ff, self.embd)
            yield layer + "ffn_down.weight", (self.embd, self.ff)
        yield "output_norm.weight", (self.embd,)
        if not self.tied:
            yield "output.weight", (self.vocab, self.embd)
        if self.rope_factors:
            yield "rope_freqs.weight", (self.head_dim // 2,)


_LLAMA3_MERGES, _QWEN_MERGES = 280147, 151387


def _qwen2(name: str, layers: int, embd: int, ff: int, heads: int, kv_heads: int, vocab: int) -> Shape:
    return Shape(
        name, "qwen2", layers, embd, ff, heads, kv_heads, 128, vocab, 131072, merges=_QWEN_MERGES, biases="qkv"
    )


# Each but the first is compared with its published config.json in tests/cli/test_plan.py.
CARDS: Mapping[str, Shape] = {
    # The card leaves the feed-forward width and the vocabulary open: 11008 and Llama 3's, as in the benchmarks.
    "r1-8b-card": Shape(
        "DeepSeek-R1 8B (40-layer card)",
        "llama",
        40,
        4096,
        11008,
        64,
        64,
        64,
        context=65536,
        vocab=128256,
        merges=_LLAMA3_MERGES,
    ),
    "r1-distill-llama-8b": Shape(
        "DeepSeek-R1-Distill-Llama-8B",
        "llama",
        32,
        4096,
        14336,
        32,
        8,
        128,
        context=131072,
        rope_factors=True,
        vocab=128256,
        merges=_LLAMA3_MERGES,
    ),
    "r1-0528-qwen3-8b": Shape(
        "DeepSeek-R1-0528-Qwen3-8B",
        "qwen3",
        36,
        4096,
        12288,
        32,
        8,
        128,
        context=131072,
        vocab=151936,
        merges=_QWEN_MERGES,
    ),
    "r1-distill-qwen-1.5b": _qwen2("DeepSeek-R1-Distill-Qwen-1.5B", 28, 1536, 8960, 12, 2, 151936),
    "r1-distill-qwen-7b": _qwen2("DeepSeek-R1-Distill-Qwen-7B", 28, 3584, 18944, 28, 4, 152064),
    "r1-distill-qwen-14b": _qwen2("DeepSeek-R1-Distill-Qwen-14B", 48, 5120, 13824, 40, 8, 152064),
    "r1-distill-qwen-32b": _qwen2("DeepSeek-R1-Distill-Qwen-32B", 64, 5120, 27648, 40, 8, 152064),
}


def of_model(model: Model, name: str) -> Shape:
    """The shape of an open model."""
    if model.head_dim_k != model.head_dim_v:
        raise UnsupportedError(
            f"keys have {model.head_dim_k} values a head and values {model.head_dim_v}: nothing plans for that",
            code="unsupported_shape",
        )
    tensors = model.file.tensors
    return Shape(
        name=str(model.metadata.get("general.name", name)),
        arch=model.architecture,
        layers=model.n_layers,
        embd=model.n_embd,
        ff=model.n_ff,
        heads=model.n_heads,
        kv_heads=model.n_kv_heads,
        head_dim=model.head_dim_k,
        vocab=model.n_vocab,
        context=model.n_ctx_train,
        tied="output.weight" not in tensors,
        merges=len(model.metadata.get("tokenizer.ggml.merges", ())),
        rope_factors="rope_freqs.weight" in tensors,
        biases="".join(p[0] for p in ("q", "k", "v", "output") if f"blk.0.attn_{p}.bias" in tensors),
    )


# The class a config.json names -> (architecture, projections that always have a bias, head_dim where none is given)
_CLASSES: Mapping[str, tuple[str, str, int | None]] = {
    "LlamaForCausalLM": ("llama", "", None),
    "MistralForCausalLM": ("llama", "", None),
    "Qwen2ForCausalLM": ("qwen2", "qkv", None),
    "Qwen3ForCausalLM": ("qwen3", "", 128),
}


def from_config(path: str | os.PathLike[str]) -> Shape:
    """The shape that a Hugging Face ``config.json`` (or the folder it lies in) describes.

    Errors: ``FileError``, ``FormatError`` (names the key, what was found and expected), ``UnsupportedError``.
    """
    path = Path(path)
    path = path / "config.json" if path.is_dir() else path
    config = _read_object(path)

    def integer(key: str, default: int | None = None, high: int = 2**24) -> int:
        value = config.get(key)
        value = default if value is None else value
        if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= high:
            found = "missing" if value is None else json.dumps(value)[:80]
            raise FormatError(
                f"{path}: {key} is {found}; expected an integer from 1 to {high}", code="bad_config", field=key
            )
        return value

    names = config.get("architectures")
    known = (
        _CLASSES.get(names[0]) if isinstance(names, list) and len(names) == 1 and isinstance(names[0], str) else None
    )
    if known is None:
        raise UnsupportedError(
            f"{path}: architectures is {json.dumps(names)[:80]}; expected one of {', '.join(_CLASSES)}",
            code="unknown_architecture",
            field="architectures",
        )
    arch, biases, head_dim = known
    embd, heads = integer("hidden_size"), integer("num_attention_heads", high=65536)
    kv_heads = integer("num_key_value_heads", heads if arch == "llama" else None, high=heads)
    for key, value, whole in (("num_key_value_heads", heads, kv_heads), ("num_attention_heads", embd, heads)):
        if value % whole and (whole is kv_heads or (config.get("head_dim") is None and head_dim is None)):
            raise FormatError(f"{path}: {key} is {whole}; expected a divisor of {value}", code="bad_config", field=key)
    vocab = integer("vocab_size", high=1048576)
    scaling = config.get("rope_scaling")
    kind = scaling.get("rope_type", scaling.get("type")) if isinstance(scaling, dict) else None
    return Shape(
        name=path.resolve().parent.name if path.name == "config.json" else path.name.removesuffix(".config.json"),
        arch=arch,
        layers=integer("num_hidden_layers", high=512),
        embd=embd,
        ff=integer("intermediate_size"),
        heads=heads,
        kv_heads=kv_heads,
        head_dim=integer("head_dim", head_dim or embd // heads, high=65536),
        vocab=vocab,
        context=integer("max_position_embeddings"),
        tied=config.get("tie_word_embeddings") is True,
        merges=2 * vocab if arch == "llama" else vocab,
        rope_factors=kind == "llama3",
        biases=biases or ("qkvo" if config.get("attention_bias") is True else ""),
    )


def _read_object(path: Path) -> dict[str, Any]:
    try:
        text = path.read_bytes().decode("utf-8")
    except OSError as error:
        raise FileError(f"cannot read {path}: {error.strerror}", code="cannot_read") from error
    except UnicodeDecodeError as error:
        raise FormatError(f"{path} is not UTF-8 text (byte {error.start})", code="bad_utf8") from None
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:  # ValueError: also an integer of too many digits
        raise FormatError(f"{path} is not valid JSON: {error}", code="bad_json") from None
    if not isinstance(value, dict):
        raise FormatError(f"{path} holds a JSON {type(value).__name__}; expected an object", code="bad_json")
    return value


def find_card(name: str) -> Shape:
    """A built-in card by its name, in any case. Errors: ``InvalidArgument``."""
    shape = CARDS.get(name.lower())
    if shape is None:
        raise InvalidArgument(
            f"{name!r} is neither a file nor a folder nor a built-in card; cards: {', '.join(CARDS)}",
            code="unknown_card",
        )
    return shape
