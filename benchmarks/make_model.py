"""Writes a GGUF of a real model's shape with random weights and a vocabulary; llama.cpp loads it, too.

    python benchmarks/make_model.py --shape r1-distill-llama-8b --type Q4_0 -o /models/random-8b.gguf
    python benchmarks/make_model.py --shape r1-8b-card --type Q4_K_M --layers 4 --vocab llama-bpe.gguf -o small.gguf

Shapes, types and random blocks are those of ``pyengine.synthetic``; what that leaves out is here: a vocabulary, rope
constants, and weights that never repeat. The same arguments give the same bytes.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from gguf import GGMLQuantizationType, GGUFReader, GGUFValueType, GGUFWriter

from pyengine.quant import FORMATS, Format
from pyengine.recipe import RECIPES
from pyengine.shape import CARDS, Shape
from pyengine.synthetic import random_blocks, table, tensor_bytes

ALIGNMENT = 32
PIECE_BLOCKS = 1 << 18  # blocks made at a time: at most 55 MB

# What the figures in docs/performance.md call them.
SHORT_NAMES = {
    **{"r1-llama-8b": "r1-distill-llama-8b", "card": "r1-8b-card", "r1-qwen3-8b": "r1-0528-qwen3-8b"},
    **{"r1-qwen-1.5b": "r1-distill-qwen-1.5b"},
}

# Numbers of general.file_type of mixes that no recipe names.
CODED_FILE_TYPES = {
    **{"IQ1_S": 24, "IQ1_M": 31, "IQ2_XXS": 19, "IQ2_XS": 20, "IQ2_S": 28, "IQ3_XXS": 23, "IQ3_S": 26},
    **{"TQ1_0": 36, "TQ2_0": 37, "MXFP4": 38},
}


def find_shape(name: str) -> Shape:
    """A card by its own or its short name."""
    try:
        return CARDS[SHORT_NAMES.get(name, name)]
    except KeyError:
        raise SystemExit(f"--shape {name}: known are {', '.join([*CARDS, *SHORT_NAMES])}") from None


def rope(shape: Shape) -> tuple[float, bool]:
    """Base, and whether positions are scaled by YaRN, as the models published with such shapes have them."""
    return {"llama": 500000.0, "qwen3": 1e6, "qwen2": 10000.0}[shape.arch], shape.arch == "qwen3"


def llama3_factors(shape: Shape) -> npt.NDArray[np.float32]:
    """Llama 3.1's scaling: factor 8, low 1, high 4, original context 8192."""
    wavelength = 2 * math.pi * rope(shape)[0] ** (np.arange(0, shape.head_dim, 2) / shape.head_dim)
    smooth = np.clip((8192 / wavelength - 1) / 3, 0, 1)
    return (1 / ((1 - smooth) / 8 + smooth)).astype(np.float32)


def add_metadata(writer: GGUFWriter, shape: Shape, kind: str, vocab: Path | None) -> None:
    arch = shape.arch
    theta, yarn = rope(shape)
    writer.add_string("general.name", f"random {arch} {shape.layers}x{shape.embd}")
    writer.add_uint32("general.file_type", RECIPES[kind].file_type if kind in RECIPES else CODED_FILE_TYPES[kind])
    writer.add_uint32("general.quantization_version", 2)
    numbers = {
        **{"block_count": shape.layers, "context_length": shape.context, "embedding_length": shape.embd},
        **{"feed_forward_length": shape.ff, "attention.head_count": shape.heads, "vocab_size": shape.vocab},
        **{"attention.head_count_kv": shape.kv_heads, "rope.dimension_count": shape.head_dim},
        **{"attention.key_length": shape.head_dim, "attention.value_length": shape.head_dim},
    }
    for key, value in numbers.items():
        writer.add_uint32(f"{arch}.{key}", value)
    writer.add_float32(f"{arch}.attention.layer_norm_rms_epsilon", 1e-5 if arch == "llama" else 1e-6)
    writer.add_float32(f"{arch}.rope.freq_base", theta)
    if yarn:  # as R1-0528-Qwen3-8B: an effective attention scale of 1
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


def pieces(shape: Shape, name: str, dims: tuple[int, ...], fmt: Format, seed: int) -> Iterator[npt.NDArray[np.uint8]]:
    """The bytes of a tensor, some 10 MB at a time; they depend on its name and the seed alone."""
    fixed: Mapping[str, Callable[[], npt.NDArray[np.float32]]] = {"rope_freqs.weight": lambda: llama3_factors(shape)}
    if name in fixed or name.endswith("norm.weight"):
        yield fixed.get(name, lambda: np.ones(dims, np.float32))().astype("<f4").view(np.uint8)
        return
    rng = np.random.Generator(np.random.PCG64([seed, *name.encode()]))
    sigma = 1.0 if name == "token_embd.weight" else 1 / math.sqrt(dims[-1])
    blocks = tensor_bytes(dims, fmt) // fmt.block_bytes
    for start in range(0, blocks, PIECE_BLOCKS):
        yield random_blocks(rng, min(PIECE_BLOCKS, blocks - start), sigma, fmt.name)


def make_model(out: Path, shape: Shape, kind: str, *, vocab: Path | None = None, seed: int = 0) -> int:
    """Writes the file and returns its size in bytes."""
    kind = kind.upper()
    tensors = table(shape, kind)
    writer = GGUFWriter(out, shape.arch)
    add_metadata(writer, shape, kind, vocab)
    for name, dims, fmt in tensors:
        kinds = GGMLQuantizationType(fmt.type)
        writer.add_tensor_info(name, dims, np.dtype(np.float32), tensor_bytes(dims, fmt), raw_dtype=kinds)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()
    with open(out, "r+b") as file:
        file.seek(0, 2)
        for name, dims, fmt in tensors:
            file.write(bytes(-file.tell() % ALIGNMENT))
            for piece in pieces(shape, name, dims, fmt, seed):
                file.write(np.ascontiguousarray(piece).data)
        file.write(bytes(-file.tell() % ALIGNMENT))
        return file.tell()


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("-o", "--out", type=Path, required=True)
    parser.add_argument("--shape", default="r1-distill-llama-8b", help=", ".join([*CARDS, *SHORT_NAMES]))
    parser.add_argument("--type", default="Q4_0", help=", ".join(dict.fromkeys([*RECIPES, *FORMATS])))
    parser.add_argument("--layers", type=int, help="fewer layers than the shape has, for a quick look")
    parser.add_argument("--vocab", type=Path, help="take the vocabulary of this GGUF (default: a synthetic one)")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    shape = find_shape(args.shape)
    if args.layers is not None:
        shape = dataclasses.replace(shape, layers=args.layers)
    size = make_model(args.out, shape, args.type, vocab=args.vocab, seed=args.seed)
    print(f"{args.out}: {size / 1e9:.2f} GB", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
