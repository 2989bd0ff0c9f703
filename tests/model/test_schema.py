"""The schema of an architecture: a model with one thing wrong is refused, with a code and the name of what is wrong."""

from __future__ import annotations

import struct
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from pyengine import FormatError, Model, UnsupportedError
from tests.gguf.builder import BOOL, F32, F64, I32, STRING, T_F16, T_F32, U32, U64, Gguf, Key, Tensor, array, value

EMBD, HEADS, KV_HEADS, HEAD_DIM, FF, VOCAB = 8, 2, 1, 4, 12, 6


@dataclass
class Draft:
    """A small valid model, to be spoilt: keys by name, tensors by name in the order of the file."""

    keys: dict[str, Key] = field(default_factory=dict)
    tensors: dict[str, Tensor] = field(default_factory=dict)

    def set(self, name: str, kind: int, content: float | bool | str) -> None:
        self.keys[name] = value(name, kind, content)

    def set_array(self, name: str, kind: int, items: list[float] | list[str]) -> None:
        self.keys[name] = array(name, kind, items)

    def tensor(self, name: str, *dims: int, kind: int = T_F32) -> None:
        count = 1
        for dim in dims:
            count *= dim
        numbers = [0.01 * (i % 7 - 3) for i in range(count)]
        self.tensors[name] = Tensor(name, dims, kind, struct.pack(f"<{count}{'e' if kind == T_F16 else 'f'}", *numbers))

    def write(self, path: Path) -> Path:
        path.write_bytes(Gguf(keys=list(self.keys.values()), tensors=list(self.tensors.values())).build())
        return path


def draft(arch: str = "llama") -> Draft:
    d = Draft()
    d.set("general.architecture", STRING, arch)
    for name, number in [
        ("block_count", 1),
        ("context_length", 64),
        ("embedding_length", EMBD),
        ("feed_forward_length", FF),
        ("attention.head_count", HEADS),
        ("attention.head_count_kv", KV_HEADS),
    ]:
        d.set(f"{arch}.{name}", U32, number)
    d.set(f"{arch}.attention.layer_norm_rms_epsilon", F32, 1e-5)
    d.set("tokenizer.ggml.model", STRING, "llama")
    d.set_array("tokenizer.ggml.tokens", STRING, ["<unk>", "<s>", "</s>", "a", "b"])  # one row more is padding
    d.set_array("tokenizer.ggml.scores", F32, [0.0] * 5)
    d.set_array("tokenizer.ggml.token_type", I32, [2, 3, 3, 1, 1])
    d.set("tokenizer.ggml.bos_token_id", U32, 1)
    d.set("tokenizer.ggml.eos_token_id", U32, 2)
    d.tensor("token_embd.weight", EMBD, VOCAB)
    d.tensor("blk.0.attn_norm.weight", EMBD)
    d.tensor("blk.0.attn_q.weight", EMBD, HEADS * HEAD_DIM)
    d.tensor("blk.0.attn_k.weight", EMBD, KV_HEADS * HEAD_DIM)
    d.tensor("blk.0.attn_v.weight", EMBD, KV_HEADS * HEAD_DIM)
    d.tensor("blk.0.attn_output.weight", HEADS * HEAD_DIM, EMBD)
    if arch == "qwen2":
        d.tensor("blk.0.attn_q.bias", HEADS * HEAD_DIM)
        d.tensor("blk.0.attn_k.bias", KV_HEADS * HEAD_DIM)
        d.tensor("blk.0.attn_v.bias", KV_HEADS * HEAD_DIM)
    if arch == "qwen3":
        d.tensor("blk.0.attn_q_norm.weight", HEAD_DIM)
        d.tensor("blk.0.attn_k_norm.weight", HEAD_DIM)
    d.tensor("blk.0.ffn_norm.weight", EMBD)
    d.tensor("blk.0.ffn_gate.weight", EMBD, FF)
    d.tensor("blk.0.ffn_up.weight", EMBD, FF)
    d.tensor("blk.0.ffn_down.weight", FF, EMBD)
    d.tensor("output_norm.weight", EMBD)
    return d


Change = Callable[[Draft], object]


def key(name: str, kind: int, content: float | bool | str) -> Change:
    return lambda d: d.set(name, kind, content)


def keys(*entries: tuple[str, int, float | str]) -> Change:
    return lambda d: [d.set(*entry) for entry in entries]


def items(name: str, kind: int, content: list[float] | list[str]) -> Change:
    return lambda d: d.set_array(name, kind, content)


def tensor(name: str, *dims: int, kind: int = T_F32) -> Change:
    return lambda d: d.tensor(name, *dims, kind=kind)


def without(name: str) -> Change:
    return lambda d: d.keys.pop(name) if name in d.keys else d.tensors.pop(name)


HEAD, HEAD_KV = "llama.attention.head_count", "llama.attention.head_count_kv"
KEY_LENGTH, ROPE_DIMS = "llama.attention.key_length", "llama.rope.dimension_count"
SCALING, FACTOR, TYPE = "llama.rope.scaling", "llama.rope.scaling.factor", "llama.rope.scaling.type"
EPSILON = "llama.attention.layer_norm_rms_epsilon"
VOCABULARY = "tokenizer.ggml"

# what is wrong: the change, the code, the field of the error
FORMAT: dict[str, tuple[Change, str, str]] = {
    "no architecture": (without("general.architecture"), "missing_key", "general.architecture"),
    "architecture is a number": (key("general.architecture", U32, 1), "wrong_type", "general.architecture"),
    "no layers key": (without("llama.block_count"), "missing_key", "llama.block_count"),
    "zero layers": (key("llama.block_count", U32, 0), "value_out_of_range", "llama.block_count"),
    "513 layers": (key("llama.block_count", U32, 513), "value_out_of_range", "llama.block_count"),
    "layers as a float": (key("llama.block_count", F32, 1.0), "wrong_type", "llama.block_count"),
    "layers as an array": (items("llama.block_count", U32, [1]), "wrong_type", "llama.block_count"),
    "negative layers": (key("llama.block_count", I32, -1), "value_out_of_range", "llama.block_count"),
    "a layer declared that is not there": (
        key("llama.block_count", U32, 2),
        "missing_tensor",
        "blk.1.attn_norm.weight",
    ),
    "zero context": (key("llama.context_length", U32, 0), "value_out_of_range", "llama.context_length"),
    "context overflow": (key("llama.context_length", U64, 2**32 + 64), "value_out_of_range", "llama.context_length"),
    "context too long": (key("llama.context_length", U32, 2**24 + 1), "value_out_of_range", "llama.context_length"),
    "zero width": (key("llama.embedding_length", U32, 0), "value_out_of_range", "llama.embedding_length"),
    "width too large": (key("llama.embedding_length", U32, 2**20 + 1), "value_out_of_range", "llama.embedding_length"),
    "width unlike the embedding": (key("llama.embedding_length", U32, 2 * EMBD), "wrong_shape", "token_embd.weight"),
    "zero ffn": (key("llama.feed_forward_length", U32, 0), "value_out_of_range", "llama.feed_forward_length"),
    "ffn unlike its tensors": (key("llama.feed_forward_length", U32, FF + 1), "wrong_shape", "blk.0.ffn_gate.weight"),
    "zero heads": (key(HEAD, U32, 0), "value_out_of_range", HEAD),
    "heads that do not divide the width": (keys((HEAD, U32, 3), (HEAD_KV, U32, 3)), "value_out_of_range", HEAD),
    "zero KV heads": (key(HEAD_KV, U32, 0), "value_out_of_range", HEAD_KV),
    "KV heads that do not divide the heads": (keys((HEAD, U32, 4), (HEAD_KV, U32, 3)), "value_out_of_range", HEAD_KV),
    "more KV heads than heads": (key(HEAD_KV, U32, 4), "value_out_of_range", HEAD_KV),
    "zero head size": (key(KEY_LENGTH, U32, 0), "value_out_of_range", KEY_LENGTH),
    "heads too wide together": (
        keys((HEAD, U32, 65536), (KEY_LENGTH, U32, 65536), ("llama.attention.value_length", U32, 1)),
        "value_out_of_range",
        KEY_LENGTH,
    ),
    "values too wide together": (
        keys((HEAD, U32, 65536), (KEY_LENGTH, U32, 1), ("llama.attention.value_length", U32, 65536)),
        "value_out_of_range",
        "llama.attention.value_length",
    ),
    "head size unlike the tensors": (key(KEY_LENGTH, U32, 8), "wrong_shape", "blk.0.attn_q.weight"),
    "value size unlike the tensors": (
        key("llama.attention.value_length", U32, 8),
        "wrong_shape",
        "blk.0.attn_v.weight",
    ),
    "no epsilon": (without(EPSILON), "missing_key", EPSILON),
    "negative epsilon": (key(EPSILON, F32, -1e-5), "value_out_of_range", EPSILON),
    "epsilon is NaN": (key(EPSILON, F32, float("nan")), "value_not_finite", EPSILON),
    "epsilon as an integer": (key(EPSILON, U32, 0), "wrong_type", EPSILON),
    "odd head size": (key(KEY_LENGTH, U32, 3), "value_out_of_range", KEY_LENGTH),
    "odd width of a head": (keys((HEAD, U32, EMBD), (HEAD_KV, U32, EMBD)), "value_out_of_range", HEAD),
    "odd rope dims": (key(ROPE_DIMS, U32, 3), "value_out_of_range", ROPE_DIMS),
    "zero rope dims": (key(ROPE_DIMS, U32, 0), "value_out_of_range", ROPE_DIMS),
    "more rope dims than the head": (key(ROPE_DIMS, U32, HEAD_DIM + 2), "value_out_of_range", ROPE_DIMS),
    "rope base zero": (key("llama.rope.freq_base", F32, 0.0), "value_out_of_range", "llama.rope.freq_base"),
    "rope base infinite": (key("llama.rope.freq_base", F64, 1e300), "value_out_of_range", "llama.rope.freq_base"),
    "negative rope factor": (keys((FACTOR, F32, -2.0), (TYPE, STRING, "linear")), "value_out_of_range", FACTOR),
    "linear scaling without a factor": (key(TYPE, STRING, "linear"), "missing_key", FACTOR),
    "YaRN without a factor": (key(TYPE, STRING, "yarn"), "missing_key", FACTOR),
    "a factor of no kind": (key(FACTOR, F32, 4.0), "missing_key", TYPE),
    "scaling type is a number": (key(TYPE, U32, 1), "wrong_type", TYPE),
    "YaRN from no context": (
        keys((TYPE, STRING, "yarn"), (FACTOR, F32, 4.0), (f"{SCALING}.original_context_length", U32, 0)),
        "value_out_of_range",
        f"{SCALING}.original_context_length",
    ),
    "YaRN with base 1": (
        keys((TYPE, STRING, "yarn"), (FACTOR, F32, 4.0), ("llama.rope.freq_base", F32, 1.0)),
        "rope",
        "rope",
    ),
    "rope_freqs of the wrong length": (tensor("rope_freqs.weight", HEAD_DIM), "wrong_shape", "rope_freqs.weight"),
    "rope_freqs with a zero or a negative": (tensor("rope_freqs.weight", HEAD_DIM // 2), "rope", "rope"),
    "no embedding": (without("token_embd.weight"), "missing_tensor", "token_embd.weight"),
    "no weights at all": (lambda d: d.tensors.clear(), "missing_tensor", "token_embd.weight"),
    "no q": (without("blk.0.attn_q.weight"), "missing_tensor", "blk.0.attn_q.weight"),
    "transposed ffn": (tensor("blk.0.ffn_down.weight", EMBD, FF), "wrong_shape", "blk.0.ffn_down.weight"),
    "short norm": (tensor("output_norm.weight", EMBD - 1), "wrong_shape", "output_norm.weight"),
    "norm of two rows": (tensor("output_norm.weight", EMBD, 2), "wrong_shape", "output_norm.weight"),
    "output of another vocabulary": (tensor("output.weight", EMBD, VOCAB + 1), "wrong_shape", "output.weight"),
    "more tokens than rows": (
        items(f"{VOCABULARY}.tokens", STRING, [str(i) for i in range(VOCAB + 1)]),
        "wrong_length",
        f"{VOCABULARY}.tokens",
    ),
    "no tokens in the list": (items(f"{VOCABULARY}.tokens", STRING, []), "wrong_length", f"{VOCABULARY}.tokens"),
    "tokens are numbers": (items(f"{VOCABULARY}.tokens", U32, [1, 2]), "wrong_type", f"{VOCABULARY}.tokens"),
    "too few scores": (items(f"{VOCABULARY}.scores", F32, [0.0] * 4), "wrong_length", f"{VOCABULARY}.scores"),
    "too many scores": (items(f"{VOCABULARY}.scores", F32, [0.0] * VOCAB), "wrong_length", f"{VOCABULARY}.scores"),
    "scores are integers": (items(f"{VOCABULARY}.scores", I32, [0] * 5), "wrong_type", f"{VOCABULARY}.scores"),
    "too few types": (items(f"{VOCABULARY}.token_type", I32, [1] * 4), "wrong_length", f"{VOCABULARY}.token_type"),
    "types are floats": (items(f"{VOCABULARY}.token_type", F32, [1.0] * 5), "wrong_type", f"{VOCABULARY}.token_type"),
    "merges are numbers": (items(f"{VOCABULARY}.merges", U32, [1]), "wrong_type", f"{VOCABULARY}.merges"),
    "BOS outside the vocabulary": (
        key(f"{VOCABULARY}.bos_token_id", U32, 5),
        "value_out_of_range",
        f"{VOCABULARY}.bos_token_id",
    ),
    "EOS negative": (key(f"{VOCABULARY}.eos_token_id", I32, -1), "value_out_of_range", f"{VOCABULARY}.eos_token_id"),
    "an id that is text": (key(f"{VOCABULARY}.eot_token_id", STRING, "2"), "wrong_type", f"{VOCABULARY}.eot_token_id"),
    "a lesser id outside the vocabulary": (
        key(f"{VOCABULARY}.padding_token_id", U32, 2**32 - 1),
        "value_out_of_range",
        f"{VOCABULARY}.padding_token_id",
    ),
    "an expert count of no type": (key("llama.expert_count", STRING, "8"), "wrong_type", "llama.expert_count"),
}

UNSUPPORTED: dict[str, tuple[Change, str, str]] = {
    "unknown architecture": (
        key("general.architecture", STRING, "gpt9"),
        "unknown_architecture",
        "general.architecture",
    ),
    "experts": (key("llama.expert_count", U32, 8), "unsupported_model", "llama.expert_count"),
    "sliding window": (
        key("llama.attention.sliding_window", U32, 4096),
        "unsupported_model",
        "llama.attention.sliding_window",
    ),
    "sliding window by layer": (
        items("llama.attention.sliding_window", U32, [0, 4096]),
        "unsupported_model",
        "llama.attention.sliding_window",
    ),
    "an empty array for a number": (items("llama.expert_count", U32, []), "unsupported_model", "llama.expert_count"),
    "scaled logits": (key("llama.logit_scale", F32, 0.25), "unsupported_model", "llama.logit_scale"),
    "attention both ways": (key("llama.attention.causal", BOOL, False), "unsupported_model", "llama.attention.causal"),
    "heads by layer": (items(HEAD, U32, [2]), "unsupported_model", HEAD),
    "KV heads by layer": (items(HEAD_KV, U32, [1]), "unsupported_model", HEAD_KV),
    "ffn by layer": (items("llama.feed_forward_length", U32, [FF]), "unsupported_model", "llama.feed_forward_length"),
    "unknown rope scaling": (keys((TYPE, STRING, "longrope"), (FACTOR, F32, 2.0)), "unsupported_model", TYPE),
    "norm not F32": (tensor("output_norm.weight", EMBD, kind=T_F16), "unsupported_tensor_type", "output_norm.weight"),
    "a tensor of a later layer": (tensor("blk.1.ffn_norm.weight", EMBD), "unexpected_tensor", "blk.1.ffn_norm.weight"),
    "a tensor of another architecture": (
        tensor("blk.0.attn_q_norm.weight", HEAD_DIM),
        "unexpected_tensor",
        "blk.0.attn_q_norm.weight",
    ),
}


@pytest.mark.parametrize("arch", ["llama", "qwen2", "qwen3"])
def test_the_model_that_the_cases_spoil_is_valid(arch: str, tmp_path: Path) -> None:
    with Model.open(draft(arch).write(tmp_path / "model.gguf")) as model, model.session(n_ctx=8) as session:
        assert (model.n_vocab, model.n_heads, model.head_dim_k) == (VOCAB, HEADS, HEAD_DIM)
        assert session.eval([1, 5, 3]).shape == (VOCAB,)


@pytest.mark.parametrize("name", FORMAT)
def test_what_is_malformed_is_named(name: str, tmp_path: Path) -> None:
    change, code, where = FORMAT[name]
    d = draft()
    change(d)
    with pytest.raises(FormatError) as caught:
        Model.open(d.write(tmp_path / "model.gguf"))
    assert (caught.value.code, caught.value.field) == (code, where)
    message = str(caught.value)
    assert where in message or (code == "rope" and "rotary" in message) or (not d.tensors and "no weights" in message)


@pytest.mark.parametrize("name", UNSUPPORTED)
def test_what_this_engine_does_not_run_is_named(name: str, tmp_path: Path) -> None:
    change, code, where = UNSUPPORTED[name]
    d = draft()
    change(d)
    with pytest.raises(UnsupportedError) as caught:
        Model.open(d.write(tmp_path / "model.gguf"))
    assert (caught.value.code, caught.value.field) == (code, where)


@pytest.mark.parametrize(
    ("arch", "missing"),
    [("qwen2", "blk.0.attn_k.bias"), ("qwen3", "blk.0.attn_q_norm.weight"), ("qwen3", "blk.0.attn_k_norm.weight")],
)
def test_tensors_an_architecture_needs_are_asked_for(arch: str, missing: str, tmp_path: Path) -> None:
    d = draft(arch)
    del d.tensors[missing]
    with pytest.raises(FormatError) as caught:
        Model.open(d.write(tmp_path / "model.gguf"))
    assert (caught.value.code, caught.value.field) == ("missing_tensor", missing)


@pytest.mark.parametrize(
    "change",
    [
        key("llama.expert_count", U32, 0),
        key("llama.logit_scale", F32, 1.0),
        key("llama.attention.causal", BOOL, True),
        key("llama.block_count", U64, 1),
        keys((TYPE, STRING, "none"), (FACTOR, F32, 4.0)),
        keys((TYPE, STRING, "linear"), (FACTOR, F32, 4.0)),
        tensor("output.weight", EMBD, VOCAB),
        without("tokenizer.ggml.scores"),
        without("tokenizer.ggml.bos_token_id"),
    ],
)
def test_neutral_values_and_absent_options_are_accepted(change: Change, tmp_path: Path) -> None:
    d = draft()
    change(d)
    Model.open(d.write(tmp_path / "model.gguf")).close()


def test_the_name_of_a_strange_tensor_is_shown_without_tricks(tmp_path: Path) -> None:
    d = draft()
    d.tensor("blk.0.\u202eevil", 1)
    with pytest.raises(UnsupportedError) as caught:
        Model.open(d.write(tmp_path / "model.gguf"))
    assert caught.value.field == "blk.0.evil"
    assert "\u202e" not in str(caught.value)
