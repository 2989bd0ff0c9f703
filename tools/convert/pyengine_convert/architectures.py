"""The model registry: one small table an architecture.

A table says which tensors a checkpoint must have, their shapes in symbols, and their names in GGUF. A tensor that is
not in the table, is missing, or has another shape is an error: nothing is dropped or guessed.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from pyengine.errors import FormatError, UnsupportedError
from pyengine_convert.keyvalues import KeyValues
from pyengine_convert.rope import Rope, read_rope
from pyengine_convert.source import Config


@dataclass(frozen=True)
class Tensor:
    """One line of a table: names with ``{i}`` for the layer, shape in the symbols of :meth:`Hyper.size`.

    ``heads`` names the count of heads whose rows are permuted (see :func:`pyengine_convert.plan.permute_heads`).
    """

    hf: str
    gguf: str
    shape: tuple[str, ...]
    heads: str = ""


def _llama_block(bias: tuple[str, ...] = (), permuted: bool = False) -> tuple[Tensor, ...]:
    """The decoder block all three share; ``bias`` lists the projections that have one."""
    layer = "model.layers.{i}."
    q, kv = ("heads", "kv_heads") if permuted else ("", "")
    projections = {
        "q": Tensor(layer + "self_attn.q_proj", "blk.{i}.attn_q", ("q", "embd"), q),
        "k": Tensor(layer + "self_attn.k_proj", "blk.{i}.attn_k", ("kv", "embd"), kv),
        "v": Tensor(layer + "self_attn.v_proj", "blk.{i}.attn_v", ("kv", "embd")),
        "o": Tensor(layer + "self_attn.o_proj", "blk.{i}.attn_output", ("embd", "q")),
        "gate": Tensor(layer + "mlp.gate_proj", "blk.{i}.ffn_gate", ("ff", "embd")),
        "up": Tensor(layer + "mlp.up_proj", "blk.{i}.ffn_up", ("ff", "embd")),
        "down": Tensor(layer + "mlp.down_proj", "blk.{i}.ffn_down", ("embd", "ff")),
    }
    return (
        Tensor(layer + "input_layernorm.weight", "blk.{i}.attn_norm.weight", ("embd",)),
        *(Tensor(p.hf + ".weight", p.gguf + ".weight", p.shape, p.heads) for p in projections.values()),
        *(
            Tensor(
                projections[b].hf + ".bias",
                projections[b].gguf + ".bias",
                projections[b].shape[:1],
                projections[b].heads,
            )
            for b in bias
        ),
        Tensor(layer + "post_attention_layernorm.weight", "blk.{i}.ffn_norm.weight", ("embd",)),
    )


_QK_NORM = tuple(
    Tensor(f"model.layers.{{i}}.self_attn.{x}_norm.weight", f"blk.{{i}}.attn_{x}_norm.weight", ("head_dim",))
    for x in "qk"
)
_OUTER = (
    Tensor("model.embed_tokens.weight", "token_embd.weight", ("vocab", "embd")),
    Tensor("model.norm.weight", "output_norm.weight", ("embd",)),
)
_HEAD = Tensor("lm_head.weight", "output.weight", ("vocab", "embd"))


@dataclass(frozen=True)
class Architecture:
    """How the models of one GGUF architecture are laid out.

    ``bias``: projections that always have one; ``optional_bias``: those that have one when attention_bias is set.
    """

    name: str
    permuted: bool = False  # Q and K rows reordered for rope on adjacent pairs
    bias: tuple[str, ...] = ()
    optional_bias: tuple[str, ...] = ()
    extra: tuple[Tensor, ...] = ()
    head_dim: int | None = None  # when the configuration has none; None: hidden_size / heads

    def tensors(self, hyper: Hyper) -> Iterator[Tensor]:
        """Every tensor of a model in file order, layers filled in."""
        bias = self.bias or (self.optional_bias if hyper.attention_bias else ())
        yield _OUTER[0]
        for i in range(hyper.layers):
            for t in (*_llama_block(bias, self.permuted), *self.extra):
                yield Tensor(t.hf.format(i=i), t.gguf.format(i=i), t.shape, t.heads)
        yield _OUTER[1]
        if not hyper.tied:
            yield _HEAD


LLAMA = Architecture("llama", permuted=True, optional_bias=("q", "k", "v", "o"))
QWEN2 = Architecture("qwen2", bias=("q", "k", "v"))
QWEN3 = Architecture("qwen3", optional_bias=("q", "k", "v", "o"), extra=_QK_NORM, head_dim=128)

# The class a config.json names -> the table.
REGISTRY: dict[str, Architecture] = {
    "LlamaForCausalLM": LLAMA,
    "MistralForCausalLM": LLAMA,  # only without a sliding window; checked below
    "Qwen2ForCausalLM": QWEN2,
    "Qwen3ForCausalLM": QWEN3,
}


@dataclass(frozen=True)
class Hyper:
    """The numbers of a model, from its config.json."""

    arch: Architecture
    vocab: int
    embd: int
    ff: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    explicit_head_dim: bool
    context: int
    eps: float
    rope: Rope
    tied: bool
    attention_bias: bool

    def size(self, symbol: str) -> int:
        """The value of a symbol in a table's shape."""
        if symbol == "q":
            return self.heads * self.head_dim
        if symbol == "kv":
            return self.kv_heads * self.head_dim
        value = getattr(self, symbol)
        assert isinstance(value, int)
        return value

    def write(self, keys: KeyValues) -> None:
        """Adds the ``{arch}.*`` keys."""
        arch = self.arch.name
        keys.u32(f"{arch}.block_count", self.layers)
        keys.u32(f"{arch}.context_length", self.context)
        keys.u32(f"{arch}.embedding_length", self.embd)
        keys.u32(f"{arch}.feed_forward_length", self.ff)
        keys.u32(f"{arch}.attention.head_count", self.heads)
        keys.u32(f"{arch}.attention.head_count_kv", self.kv_heads)
        keys.f32(f"{arch}.attention.layer_norm_rms_epsilon", self.eps)
        if self.explicit_head_dim:
            keys.u32(f"{arch}.attention.key_length", self.head_dim)
            keys.u32(f"{arch}.attention.value_length", self.head_dim)
        keys.u32(f"{arch}.vocab_size", self.vocab)
        keys.u32(f"{arch}.rope.dimension_count", self.head_dim)
        self.rope.write(arch, keys)


def read_hyper(config: Config) -> Hyper:
    """Reads and checks a config.json. Errors: ``FormatError``, ``UnsupportedError``."""
    arch = _architecture(config)
    _refuse_unsupported(config, arch)
    embd, heads = config.integer("hidden_size"), config.integer("num_attention_heads")
    head_dim = config.get("head_dim", arch.head_dim)
    if head_dim is None:
        if embd % heads:
            raise config.bad("hidden_size", embd, f"a multiple of num_attention_heads, {heads}, as head_dim is absent")
        head_dim = embd // heads
    head_dim = Config({"head_dim": head_dim}, config.where).integer("head_dim", high=65536)
    if head_dim % 2:
        raise config.bad("head_dim", head_dim, "an even number")
    kv_heads = config.integer("num_key_value_heads", heads if arch is LLAMA else None, high=heads)
    if heads % kv_heads:
        raise config.bad("num_key_value_heads", kv_heads, f"a divisor of num_attention_heads, {heads}")
    return Hyper(
        arch=arch,
        vocab=config.integer("vocab_size"),
        embd=embd,
        ff=config.integer("intermediate_size"),
        layers=config.integer("num_hidden_layers", high=512),
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        explicit_head_dim=config.get("head_dim") is not None or head_dim * heads != embd,
        context=config.integer("max_position_embeddings"),
        eps=config.number("rms_norm_eps", 1e-6),
        rope=read_rope(config),
        tied=config.boolean("tie_word_embeddings", False),
        attention_bias=config.boolean("attention_bias", False),
    )


def _architecture(config: Config) -> Architecture:
    names = config.get("architectures", [])
    if not isinstance(names, list) or len(names) != 1 or not isinstance(names[0], str):
        raise config.bad("architectures", names, "a list of one class name")
    if names[0] not in REGISTRY:
        raise UnsupportedError(
            f"{config.where}: the architecture is {names[0]}; known are {', '.join(REGISTRY)}",
            code="unknown_architecture",
            field="architectures",
        )
    return REGISTRY[names[0]]


def _refuse_unsupported(config: Config, arch: Architecture) -> None:
    """What would convert into a model that answers differently is refused by name."""
    quantised = config.get("quantization_config")
    if quantised is not None:
        method = quantised.get("quant_method", "unknown") if isinstance(quantised, dict) else quantised
        raise UnsupportedError(
            f"{config.where}: the checkpoint is already quantised ({method}); convert the original 16- or 32-bit one",
            code="quantised_checkpoint",
            field="quantization_config",
        )
    if config.string("hidden_act", "silu") != "silu":
        raise config.bad("hidden_act", config.get("hidden_act"), "silu")
    if config.boolean("mlp_bias", False):
        raise UnsupportedError(
            f"{config.where}: mlp_bias is not supported", code="unsupported_config", field="mlp_bias"
        )
    layers = config.integer("num_hidden_layers", high=512)
    # Mistral slides whenever a window is given; Qwen only when told so, in the layers from max_window_layers on.
    window = config.get("sliding_window") is not None and config.boolean("use_sliding_window", arch is LLAMA)
    if window and config.integer("max_window_layers", 0, low=0) < layers:
        raise UnsupportedError(
            f"{config.where}: sliding-window attention (window {config.get('sliding_window')}) is not supported",
            code="unsupported_config",
            field="sliding_window",
        )
    kinds = config.get("layer_types", [])
    if any(kind != "full_attention" for kind in kinds):
        raise config.bad("layer_types", sorted(set(map(str, kinds))), "full_attention in every layer")


def check_shape(tensor: Tensor, shape: tuple[int, ...], hyper: Hyper) -> None:
    """``FormatError`` naming the tensor, its shape and the expected one."""
    expected = tuple(hyper.size(symbol) for symbol in tensor.shape)
    if shape != expected:
        symbols = ", ".join(tensor.shape)
        raise FormatError(
            f"{tensor.hf} has shape {list(shape)}; expected {list(expected)} ({symbols})",
            code="bad_shape",
            field=tensor.hf,
        )
