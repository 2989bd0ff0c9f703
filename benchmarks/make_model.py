"""Writes a GGUF of a real model's shape with random weights, for timing: nothing to download, nothing to train.

    python benchmarks/make_model.py --shape r1-llama-8b --type q4_0 -o /models/random-8b.gguf
    python benchmarks/make_model.py --shape card --type q4_k_m --layers 4 --vocab llama-bpe.gguf -o small.gguf

Quantised blocks are random bytes with sane scales: every code occurs as often as any other, as fast as random numbers
come. The scales are set so that a weight has a standard deviation of 1/sqrt(columns): activations keep their size
through the layers and the logits differ. Only numpy and the ``gguf`` package are used; the same arguments give the same
bytes. Files load in llama.cpp, too.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFReader, GGUFValueType, GGUFWriter
from gguf.quants import dequantize

Bytes = npt.NDArray[np.uint8]
ALIGNMENT = 32
PIECE_BLOCKS = 1 << 18  # blocks made at a time: at most 55 MB


@dataclass(frozen=True)
class Shape:
    """Sizes of a model; ``context`` is the trained one."""

    arch: str
    layers: int
    embd: int
    ff: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    context: int
    theta: float
    eps: float
    llama3_rope: bool = False
    yarn: bool = False


SHAPES: Mapping[str, Shape] = {
    "r1-llama-8b": Shape("llama", 32, 4096, 14336, 32, 8, 128, 128256, 131072, 500000.0, 1e-5, llama3_rope=True),
    "card": Shape("llama", 40, 4096, 11008, 64, 64, 64, 128256, 65536, 500000.0, 1e-5),
    "r1-qwen3-8b": Shape("qwen3", 36, 4096, 12288, 32, 8, 128, 151936, 131072, 1e6, 1e-6, yarn=True),
    "r1-qwen-1.5b": Shape("qwen2", 28, 1536, 8960, 12, 2, 128, 151936, 131072, 10000.0, 1e-6),
}


# --- which type a tensor gets ---------------------------------------------------------------------------------------

# Types whose blocks are random bytes but for d, with the number that general.file_type gives their mixes.
CODED_KINDS: Mapping[str, int] = {
    **{"iq1_s": 24, "iq1_m": 31, "iq2_xxs": 19, "iq2_xs": 20, "iq2_s": 28, "iq3_xxs": 23, "iq3_s": 26},
    **{"iq4_nl": 25, "iq4_xs": 30, "tq1_0": 36, "tq2_0": 37, "mxfp4": 38},
}


def _more_bits(layer: int, layers: int) -> bool:
    """The layers that the _M mixes keep in Q6_K: the first and last eighth, and every third between."""
    return layer < layers // 8 or layer >= 7 * layers // 8 or (layer - layers // 8) % 3 == 2


def tensor_type(name: str, kind: str, layer: int, layers: int) -> str:
    """Type of a two-dimensional tensor under ``kind``, as llama.cpp's quantiser assigns them."""
    plain = {"f32": "F32", "f16": "F16", "bf16": "BF16", "q8_0": "Q8_0", "q6_k": "Q6_K"}
    if kind in plain:
        return plain[kind]
    if name == "output.weight":
        return "Q5_K" if kind.startswith(("iq1", "iq2")) else "Q6_K"
    if kind in CODED_KINDS:  # plainer than the real mixes, which spare a few tensors
        return kind.upper()
    base = {"q4_0": "Q4_0", "q4_k_s": "Q4_K", "q4_k_m": "Q4_K", "q5_k_m": "Q5_K"}[kind]
    value, down = name.endswith("attn_v.weight"), name.endswith("ffn_down.weight")
    if kind == "q4_k_s":
        return "Q5_K" if (value and layer < 4) or (down and layer < layers // 8) else base
    return "Q6_K" if kind.endswith("_m") and (value or down) and _more_bits(layer, layers) else base


FILE_TYPES = {
    **{"f32": 0, "f16": 1, "bf16": 32, "q4_0": 2, "q8_0": 7, "q4_k_s": 14, "q4_k_m": 15, "q5_k_m": 17, "q6_k": 18},
    **CODED_KINDS,
}

# --- random blocks --------------------------------------------------------------------------------------------------


def _bytes_of(values: npt.NDArray[Any]) -> Bytes:
    return values.view(np.uint8).reshape(len(values), -1)


def _scales(rng: np.random.Generator, n: int, scale: float) -> Bytes:
    """n float16 scales within 10 % of ``scale``, as bytes [n, 2]."""
    return _bytes_of((scale * rng.uniform(0.9, 1.1, n)).astype("<f2").reshape(n, 1))


def _random(rng: np.random.Generator, n: int, size: int) -> Bytes:
    return np.frombuffer(rng.bytes(n * size), np.uint8).reshape(n, size).copy()


def _q4_0(rng: np.random.Generator, n: int, sigma: float) -> Bytes:
    # codes - 8 uniform on -8..7: standard deviation 4.61
    return np.concatenate([_scales(rng, n, sigma / 4.61), _random(rng, n, 16)], axis=1)


def _q8_0(rng: np.random.Generator, n: int, sigma: float) -> Bytes:
    return np.concatenate([_scales(rng, n, sigma / 73.9), _random(rng, n, 32)], axis=1)


def _q45_k(rng: np.random.Generator, n: int, sigma: float, extra: int) -> Bytes:
    """Q4_K (extra 0) and Q5_K (32 bytes of fifth bits): d, dmin, 12 bytes of 6-bit scales and mins, codes.

    All sub-blocks: scale 32, min 32. Then weight = 32 d code - 32 dmin, centred when dmin = d x mean code.
    The packing of eight 32s (100000b): bytes 0..3 and 4..7 hold the low scales and mins, their top two bits the high
    bits of the second four, bytes 8..11 the low nibbles of those:  32 | 2 << 6 = 0xa0, and nibbles 0.
    """
    top = 31 if extra else 15
    spread = math.sqrt(((top + 1) ** 2 - 1) / 12)
    d = _scales(rng, n, sigma / spread / 32)
    dmin = _bytes_of((d.view("<f2").astype(np.float32) * (top / 2)).astype("<f2"))
    packed = np.tile(np.array([0xA0] * 8 + [0x00] * 4, np.uint8), (n, 1))
    return np.concatenate([d, dmin, packed, _random(rng, n, 128 + extra)], axis=1)


def _q6_k(rng: np.random.Generator, n: int, sigma: float) -> Bytes:
    """128 bytes of low bits, 64 of high bits, 16 int8 scales, d. codes - 32 uniform: deviation 18.5; scales 64..127."""
    scales = rng.integers(64, 128, (n, 16), dtype=np.uint8)
    return np.concatenate([_random(rng, n, 192), scales, _scales(rng, n, sigma / 18.5 / 96)], axis=1)


def with_scales(name: str, blocks: Bytes, d: npt.NDArray[np.float16]) -> Bytes:
    """Blocks [n, bytes] of a type of CODED_KINDS with the scales d [n] (of MXFP4: the next power of two)."""
    out = blocks.copy()
    if name == "MXFP4":
        out[:, 0] = np.round(np.log2(d.astype(np.float64))) + 128
    elif name == "IQ1_M":  # four bits of d in the top of each of four words
        words = out[:, 48:].copy().view("<u2")
        nibbles = d.view("<u2")[:, None] >> np.array([0, 4, 8, 12], np.uint16) & np.uint16(15)
        out[:, 48:] = (words & np.uint16(0x0FFF) | nibbles << np.uint16(12)).view(np.uint8)
    else:
        at = {"TQ1_0": 52, "TQ2_0": 64}.get(name, 0)
        out[:, at : at + 2] = d.view(np.uint8).reshape(-1, 2)
    return out


def _coded(rng: np.random.Generator, n: int, name: str) -> Bytes:
    blocks = _random(rng, n, GGML_QUANT_SIZES[GGMLQuantizationType[name]][1])
    if name == "TQ2_0":  # digits 0, 1, 2: a 3 becomes a 1
        blocks[:, :64] ^= blocks[:, :64] & 0xAA & (blocks[:, :64] & 0x55) << 1
    return blocks


@cache
def _deviation(name: str) -> float:
    """Standard deviation of the weights of random blocks with a scale of 1."""
    blocks = with_scales(name, _coded(np.random.default_rng(0), 1024, name), np.ones(1024, np.float16))
    return float(dequantize(blocks, GGMLQuantizationType[name]).std())


def coded_blocks(rng: np.random.Generator, n: int, sigma: float, name: str) -> Bytes:
    """n random blocks [n, bytes] of a type of CODED_KINDS whose weights have the standard deviation sigma."""
    d = sigma / _deviation(name) * rng.uniform(0.9, 1.1, n)
    return with_scales(name, _coded(rng, n, name), d.astype("<f2"))


def _float(rng: np.random.Generator, n: int, sigma: float, kind: str) -> Bytes:
    values = rng.standard_normal(n, np.float32) * np.float32(sigma)
    if kind == "BF16":
        return _bytes_of((values.view(np.uint32) >> 16).astype("<u2").reshape(n, 1))
    return _bytes_of(values.astype("<f4" if kind == "F32" else "<f2").reshape(n, 1))


MAKERS: Mapping[str, Callable[[np.random.Generator, int, float], Bytes]] = {
    "F32": lambda rng, n, sigma: _float(rng, n, sigma, "F32"),
    "F16": lambda rng, n, sigma: _float(rng, n, sigma, "F16"),
    "BF16": lambda rng, n, sigma: _float(rng, n, sigma, "BF16"),
    "Q4_0": _q4_0,
    "Q8_0": _q8_0,
    "Q4_K": lambda rng, n, sigma: _q45_k(rng, n, sigma, 0),
    "Q5_K": lambda rng, n, sigma: _q45_k(rng, n, sigma, 32),
    "Q6_K": _q6_k,
    **{kind.upper(): partial(coded_blocks, name=kind.upper()) for kind in CODED_KINDS},
}

# --- the model ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Planned:
    """A tensor to write: ``shape`` with rows first, its type, and ``fixed`` values where it is not random."""

    name: str
    shape: tuple[int, ...]
    type: str
    fixed: npt.NDArray[np.float32] | None = None

    @property
    def blocks(self) -> int:
        return math.prod(self.shape) // GGML_QUANT_SIZES[GGMLQuantizationType[self.type]][0]

    @property
    def size(self) -> int:
        return self.blocks * GGML_QUANT_SIZES[GGMLQuantizationType[self.type]][1]


def plan(shape: Shape, kind: str) -> list[Planned]:
    """All tensors in file order."""

    def matrix(name: str, rows: int, cols: int, layer: int = 0) -> Planned:
        return Planned(name, (rows, cols), tensor_type(name, kind, layer, shape.layers))

    def ones(name: str, n: int) -> Planned:
        return Planned(name, (n,), "F32", np.ones(n, np.float32))

    def vector(name: str, n: int) -> Planned:
        return Planned(name, (n,), "F32")

    q, kv = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    tensors = [matrix("token_embd.weight", shape.vocab, shape.embd)]
    for i in range(shape.layers):
        p = f"blk.{i}."
        tensors += [
            ones(p + "attn_norm.weight", shape.embd),
            matrix(p + "attn_q.weight", q, shape.embd, i),
            matrix(p + "attn_k.weight", kv, shape.embd, i),
            matrix(p + "attn_v.weight", kv, shape.embd, i),
            matrix(p + "attn_output.weight", shape.embd, q, i),
        ]
        if shape.arch == "qwen2":
            tensors += [vector(p + "attn_q.bias", q), vector(p + "attn_k.bias", kv), vector(p + "attn_v.bias", kv)]
        if shape.arch == "qwen3":
            tensors += [ones(p + f"attn_{x}_norm.weight", shape.head_dim) for x in "qk"]
        tensors += [
            ones(p + "ffn_norm.weight", shape.embd),
            matrix(p + "ffn_gate.weight", shape.ff, shape.embd, i),
            matrix(p + "ffn_up.weight", shape.ff, shape.embd, i),
            matrix(p + "ffn_down.weight", shape.embd, shape.ff, i),
        ]
    tensors += [ones("output_norm.weight", shape.embd), matrix("output.weight", shape.vocab, shape.embd)]
    if shape.llama3_rope:
        tensors.append(Planned("rope_freqs.weight", (shape.head_dim // 2,), "F32", llama3_factors(shape)))
    return tensors


def llama3_factors(shape: Shape) -> npt.NDArray[np.float32]:
    """Llama 3.1's scaling: factor 8, low 1, high 4, original context 8192."""
    wavelength = 2 * math.pi * shape.theta ** (np.arange(0, shape.head_dim, 2) / shape.head_dim)
    smooth = np.clip((8192 / wavelength - 1) / 3, 0, 1)
    return (1 / ((1 - smooth) / 8 + smooth)).astype(np.float32)


def add_metadata(writer: GGUFWriter, shape: Shape, kind: str, vocab: Path | None) -> None:
    arch = shape.arch
    writer.add_string("general.name", f"random {arch} {shape.layers}x{shape.embd}")
    writer.add_uint32("general.file_type", FILE_TYPES[kind])
    writer.add_uint32("general.quantization_version", 2)
    numbers = {
        **{"block_count": shape.layers, "context_length": shape.context, "embedding_length": shape.embd},
        **{"feed_forward_length": shape.ff, "attention.head_count": shape.heads, "vocab_size": shape.vocab},
        **{"attention.head_count_kv": shape.kv_heads, "rope.dimension_count": shape.head_dim},
        **{"attention.key_length": shape.head_dim, "attention.value_length": shape.head_dim},
    }
    for key, value in numbers.items():
        writer.add_uint32(f"{arch}.{key}", value)
    writer.add_float32(f"{arch}.attention.layer_norm_rms_epsilon", shape.eps)
    writer.add_float32(f"{arch}.rope.freq_base", shape.theta)
    if shape.yarn:  # as R1-0528-Qwen3-8B: an effective attention scale of 1
        writer.add_string(f"{arch}.rope.scaling.type", "yarn")
        writer.add_float32(f"{arch}.rope.scaling.factor", 4.0)
        writer.add_uint32(f"{arch}.rope.scaling.original_context_length", 32768)
        writer.add_float32(f"{arch}.rope.scaling.attn_factor", 1 / (0.1 * math.log(4.0) + 1))
    if vocab is None:
        add_synthetic_vocabulary(writer, shape.vocab)
    else:
        copy_vocabulary(writer, vocab, shape.vocab)


def add_synthetic_vocabulary(writer: GGUFWriter, n: int) -> None:
    """The 256 bytes, three merges (readers want some), two control tokens, numbered words: text becomes bytes."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    tokens = [chr(b) for b in printable] + [chr(256 + i) for i in range(256 - len(printable))]
    tokens += ["wo", "wor", "word", "<|begin|>", "<|end|>"]
    tokens += [f"word{i}" for i in range(len(tokens), n)]
    bos, eos = tokens.index("<|begin|>"), tokens.index("<|end|>")
    types = [3 if i in (bos, eos) else 1 for i in range(n)]
    writer.add_string("tokenizer.ggml.model", "gpt2")
    writer.add_string("tokenizer.ggml.pre", "llama-bpe")
    writer.add_array("tokenizer.ggml.tokens", tokens)
    writer.add_array("tokenizer.ggml.token_type", types)
    writer.add_array("tokenizer.ggml.merges", ["w o", "wo r", "wor d"])
    writer.add_uint32("tokenizer.ggml.bos_token_id", bos)
    writer.add_uint32("tokenizer.ggml.eos_token_id", eos)


def copy_vocabulary(writer: GGUFWriter, path: Path, n: int) -> None:
    """The tokenizer.* keys of another file; unused tokens fill up to ``n``."""
    for name, field in GGUFReader(path).fields.items():
        if not name.startswith("tokenizer."):
            continue
        value = field.contents()
        if name in ("tokenizer.ggml.tokens", "tokenizer.ggml.token_type", "tokenizer.ggml.scores"):
            if len(value) > n:
                raise SystemExit(f"{path} has {len(value)} tokens; this shape has {n}")
            filler: dict[str, Callable[[int], Any]] = {"tokens": lambda i: f"[PAD{i}]", "token_type": lambda _: 5}
            make = filler.get(name.rpartition(".")[2], lambda _: 0.0)
            value = [*value, *(make(i) for i in range(len(value), n))]
        kind = field.types[0]
        writer.add_key_value(name, value, kind, field.types[-1] if kind == GGUFValueType.ARRAY else None)


def pieces(tensor: Planned, seed: int) -> Iterator[Bytes]:
    """The bytes of a tensor, some 10 MB at a time; they depend on its name and the seed alone."""
    if tensor.fixed is not None:
        yield tensor.fixed.astype("<f4").view(np.uint8)
        return
    rng = np.random.Generator(np.random.PCG64([seed, *tensor.name.encode()]))
    sigma = 1.0 if tensor.name == "token_embd.weight" else 1 / math.sqrt(tensor.shape[-1])
    for start in range(0, tensor.blocks, PIECE_BLOCKS):
        yield MAKERS[tensor.type](rng, min(PIECE_BLOCKS, tensor.blocks - start), sigma)


def make_model(out: Path, shape: Shape, kind: str, *, vocab: Path | None = None, seed: int = 0) -> int:
    """Writes the file and returns its size in bytes."""
    writer = GGUFWriter(out, shape.arch)
    add_metadata(writer, shape, kind, vocab)
    tensors = plan(shape, kind)
    for t in tensors:
        writer.add_tensor_info(t.name, t.shape, np.dtype(np.float32), t.size, raw_dtype=GGMLQuantizationType[t.type])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()
    with open(out, "r+b") as file:
        file.seek(0, 2)
        for t in tensors:
            file.write(bytes(-file.tell() % ALIGNMENT))
            for piece in pieces(t, seed):
                file.write(np.ascontiguousarray(piece).data)
        file.write(bytes(-file.tell() % ALIGNMENT))
        return file.tell()


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("-o", "--out", type=Path, required=True)
    parser.add_argument("--shape", choices=tuple(SHAPES), default="r1-llama-8b")
    parser.add_argument("--type", choices=tuple(FILE_TYPES), default="q4_0")
    parser.add_argument("--layers", type=int, help="fewer layers than the shape has, for a quick look")
    parser.add_argument("--vocab", type=Path, help="take the vocabulary of this GGUF (default: a synthetic one)")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    shape = SHAPES[args.shape]
    if args.layers is not None:
        shape = Shape(**{**shape.__dict__, "layers": args.layers})
    size = make_model(args.out, shape, args.type, vocab=args.vocab, seed=args.seed)
    print(f"{args.out}: {size / 1e9:.2f} GB", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
