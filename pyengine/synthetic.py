"""Models of a real shape with random weights: nothing to download, nothing to train, for measuring.

Every code of a block occurs as often as any other, and scales are set so that a weight has a standard deviation of
1/sqrt(columns): activations keep their size through the layers. Blocks repeat after a few MiB, so that a file of
several GB is written as fast as the system takes it; no kernel's speed depends on that.
"""

from __future__ import annotations

import math
import os
import shutil
import struct
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from functools import cache
from pathlib import Path
from typing import IO, Any

import numpy as np
import numpy.typing as npt

from pyengine import quant
from pyengine.errors import FileError, InvalidArgument
from pyengine.memory import available_memory
from pyengine.recipe import RECIPES, Facts, find_recipe, fitting
from pyengine.shape import Shape

Blocks = npt.NDArray[np.uint8]  # [n, bytes of a block]
Table = Sequence[tuple[str, tuple[int, ...], quant.Format]]  # (tensor, shape with rows first, format) in file order
Progress = Callable[[int, int], object]  # (bytes written, of how many)

_ALIGNMENT = 32
_PERIOD = 4 << 20  # bytes after which blocks repeat
_SPARE = 256 << 20  # bytes left free where a file is written

# --- random blocks --------------------------------------------------------------------------------------------------

# Formats whose blocks are random bytes but for a scale.
CODED = (
    *("IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S", "IQ4_NL", "IQ4_XS"),
    *("TQ1_0", "TQ2_0", "MXFP4"),
)


def _bytes_of(values: npt.NDArray[Any]) -> Blocks:
    return values.view(np.uint8).reshape(len(values), -1)


def _scales(rng: np.random.Generator, n: int, scale: float) -> Blocks:
    """n float16 scales within 10 % of ``scale``, as bytes [n, 2]."""
    return _bytes_of((scale * rng.uniform(0.9, 1.1, n)).astype("<f2").reshape(n, 1))


def _random(rng: np.random.Generator, n: int, size: int) -> Blocks:
    return np.frombuffer(rng.bytes(n * size), np.uint8).reshape(n, size).copy()


def _q4_0(rng: np.random.Generator, n: int, sigma: float) -> Blocks:
    # codes - 8 uniform on -8..7: standard deviation 4.61
    return np.concatenate([_scales(rng, n, sigma / 4.61), _random(rng, n, 16)], axis=1)


def _q8_0(rng: np.random.Generator, n: int, sigma: float) -> Blocks:
    return np.concatenate([_scales(rng, n, sigma / 73.9), _random(rng, n, 32)], axis=1)


def _q45_k(rng: np.random.Generator, n: int, sigma: float, extra: int) -> Blocks:
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


def _q6_k(rng: np.random.Generator, n: int, sigma: float) -> Blocks:
    """128 bytes of low bits, 64 of high bits, 16 int8 scales, d. codes - 32 uniform: deviation 18.5; scales 64..127."""
    scales = rng.integers(64, 128, (n, 16), dtype=np.uint8)
    return np.concatenate([_random(rng, n, 192), scales, _scales(rng, n, sigma / 18.5 / 96)], axis=1)


def with_scales(name: str, blocks: Blocks, d: npt.NDArray[np.float16]) -> Blocks:
    """Blocks of a coded format with the scales d [n] (of MXFP4: the next power of two)."""
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


def _coded(rng: np.random.Generator, n: int, name: str) -> Blocks:
    blocks = _random(rng, n, quant.find(name).block_bytes)
    if name == "TQ2_0":  # digits 0, 1, 2: a 3 becomes a 1
        blocks[:, :64] ^= blocks[:, :64] & 0xAA & (blocks[:, :64] & 0x55) << 1
    return blocks


@cache
def _deviation(name: str) -> float:
    """Standard deviation of the weights of random blocks with a scale of 1."""
    blocks = with_scales(name, _coded(np.random.default_rng(0), 1024, name), np.ones(1024, np.float16))
    return float(quant.dequantise(name, blocks, 1024, quant.find(name).block_size).std())


def coded_blocks(rng: np.random.Generator, n: int, sigma: float, name: str) -> Blocks:
    """n random blocks of a coded format whose weights have the standard deviation sigma."""
    d = sigma / _deviation(name) * rng.uniform(0.9, 1.1, n)
    return with_scales(name, _coded(rng, n, name), d.astype("<f2"))


def _quantised(rng: np.random.Generator, n: int, sigma: float, name: str) -> Blocks:
    size = quant.find(name).block_size
    return quant.quantise(name, rng.standard_normal((n, size), np.float32) * np.float32(sigma))


_MAKERS: Mapping[str, Callable[[np.random.Generator, int, float], Blocks]] = {
    "Q4_0": _q4_0,
    "Q8_0": _q8_0,
    "Q4_K": lambda rng, n, sigma: _q45_k(rng, n, sigma, 0),
    "Q5_K": lambda rng, n, sigma: _q45_k(rng, n, sigma, 32),
    "Q6_K": _q6_k,
}


def random_blocks(rng: np.random.Generator, n: int, sigma: float, name: str) -> Blocks:
    """n blocks [n, bytes of a block] of a format whose weights have about the standard deviation sigma."""
    if name in _MAKERS:
        return _MAKERS[name](rng, n, sigma)
    return (coded_blocks if name in CODED else _quantised)(rng, n, sigma, name)


# --- which tensors --------------------------------------------------------------------------------------------------


def table(shape: Shape, kind: str) -> Table:
    """The tensors of a file of ``kind``: a recipe ("Q4_K_M"), or a format that all matrices but the head then have.

    Errors: ``InvalidArgument``.
    """
    if kind.upper() in RECIPES:
        recipe = find_recipe(kind)
        facts = Facts(shape.arch, shape.layers, shape.group, shape.tied)
        return [(name, dims, quant.find(recipe.format_of(name, dims, facts))) for name, dims in shape.tensors()]
    if kind.upper() not in quant.FORMATS:
        known = ", ".join(dict.fromkeys([*RECIPES, *quant.FORMATS]))
        raise InvalidArgument(f"unknown type {kind!r}; known are {known}", code="unknown_type")
    return uniform(shape, kind.upper(), head="Q5_K" if kind.upper()[:3] in {"IQ1", "IQ2"} else "Q6_K")


def uniform(shape: Shape, name: str, head: str = "") -> Table:
    """All matrices in one format, as far as their rows are whole blocks of it; the head in another one."""

    def chosen(tensor: str, dims: tuple[int, ...]) -> quant.Format:
        wanted = head if head and tensor == "output.weight" else name
        return quant.find(fitting(wanted, dims[-1]) if len(dims) > 1 else "F32")

    return [(tensor, dims, chosen(tensor, dims)) for tensor, dims in shape.tensors()]


def tensor_bytes(dims: tuple[int, ...], fmt: quant.Format) -> int:
    """Of one tensor's data."""
    return math.prod(dims[:-1]) * fmt.row_bytes(dims[-1])


# --- the file -------------------------------------------------------------------------------------------------------


def _string(text: str) -> bytes:
    data = text.encode()
    return struct.pack("<Q", len(data)) + data


def header(shape: Shape, tensors: Table) -> bytes:
    """The beginning of a GGUF file (version 3) up to its tensors' data. Without a vocabulary: ids in, logits out."""
    arch = shape.arch
    integers = {
        "block_count": shape.layers,
        "context_length": shape.context,
        "embedding_length": shape.embd,
        "feed_forward_length": shape.ff,
        "attention.head_count": shape.heads,
        "attention.head_count_kv": shape.kv_heads,
        "attention.key_length": shape.head_dim,
        "attention.value_length": shape.head_dim,
        "rope.dimension_count": shape.head_dim,
    }
    values = [_string("general.architecture") + struct.pack("<I", 8) + _string(arch)]
    values += [_string("general.name") + struct.pack("<I", 8) + _string(f"random weights, {shape.name}")]
    values += [_string(f"{arch}.{key}") + struct.pack("<II", 4, value) for key, value in integers.items()]
    values += [_string(f"{arch}.attention.layer_norm_rms_epsilon") + struct.pack("<If", 6, 1e-5)]
    out = [b"GGUF", struct.pack("<IQQ", 3, len(tensors), len(values)), *values]
    at = 0
    for name, dims, fmt in tensors:
        out.append(_string(name) + struct.pack(f"<I{len(dims)}QIQ", len(dims), *reversed(dims), fmt.type, at))
        at += -(-tensor_bytes(dims, fmt) // _ALIGNMENT) * _ALIGNMENT
    text = b"".join(out)
    return text + bytes(-len(text) % _ALIGNMENT)


def size(shape: Shape, tensors: Table) -> int:
    """Bytes of the file."""
    data = (-(-tensor_bytes(dims, fmt) // _ALIGNMENT) * _ALIGNMENT for _, dims, fmt in tensors)
    return len(header(shape, tensors)) + sum(data)


def write(out: IO[bytes], shape: Shape, tensors: Table, progress: Progress | None = None, seed: int = 0) -> int:
    """Writes a GGUF file; returns its bytes. The same arguments give the same bytes."""
    rng = np.random.default_rng(seed)
    kept: dict[tuple[str, float], memoryview] = {}

    def data(name: str, dims: tuple[int, ...], fmt: quant.Format) -> memoryview:
        """A period of the tensor's bytes, or all of them."""
        if len(dims) == 1:
            ones = name.endswith("norm.weight") or name == "rope_freqs.weight"
            values = np.ones(dims, "<f4") if ones else rng.standard_normal(dims).astype("<f4")
            return memoryview(values.tobytes())
        sigma = 1.0 if name == "token_embd.weight" else 1 / math.sqrt(dims[-1])
        if (fmt.name, sigma) not in kept:
            n = max(1, _PERIOD // fmt.block_bytes)
            kept[fmt.name, sigma] = memoryview(random_blocks(rng, n, sigma, fmt.name).tobytes())
        return kept[fmt.name, sigma]

    total, done = size(shape, tensors), out.write(header(shape, tensors))
    for name, dims, fmt in tensors:
        left = tensor_bytes(dims, fmt)
        padding = -left % _ALIGNMENT
        period = data(name, dims, fmt)
        while left:
            piece = period[:left]
            out.write(piece)
            left -= len(piece)
            done += len(piece)
            if progress is not None:
                progress(done, total)
        done += out.write(bytes(padding))
    return done


@contextmanager
def temporary(
    shape: Shape, tensors: Table, folder: str | os.PathLike[str] | None = None, progress: Progress | None = None
) -> Iterator[Path]:
    """A file of it in ``folder`` (default: where temporary files go), gone at the end even of a killed process (Linux).

    Errors: ``FileError`` when there is too little space, or the folder is memory and too little of that is available.
    """
    place = Path(folder or tempfile.gettempdir())
    _check_space(place, size(shape, tensors))
    with tempfile.TemporaryFile(dir=place) if _PROC.is_dir() else tempfile.NamedTemporaryFile(dir=place) as file:
        write(file, shape, tensors, progress)
        file.flush()
        with_sync = getattr(os, "fdatasync", os.fsync)
        with_sync(file.fileno())  # or the system writes it out while something is being measured
        yield _PROC / str(file.fileno()) if _PROC.is_dir() else Path(file.name)


@contextmanager
def in_memory(shape: Shape, tensors: Table) -> Iterator[Path]:
    """The same in memory, for files of some hundred MiB; like :func:`temporary` where the system cannot."""
    if not hasattr(os, "memfd_create") or not _PROC.is_dir():
        with temporary(shape, tensors) as path:
            yield path
        return
    with open(os.memfd_create("pyengine-random-weights"), "wb") as file:
        write(file, shape, tensors)
        file.flush()
        yield _PROC / str(file.fileno())


_PROC = Path("/proc/self/fd")


def _check_space(folder: Path, needed: int) -> None:
    try:
        free = shutil.disk_usage(folder).free
    except OSError as error:
        raise FileError(f"cannot write to {folder}: {error.strerror}", code="cannot_write") from error
    where = f"in {folder}"
    available = available_memory()
    if available is not None and _is_memory(folder):
        free, where = min(free, available), f"in {folder}, which is memory"
    if needed + _SPARE > free:
        raise FileError(
            f"a file of {needed / 2**30:.1f} GiB does not fit {where}: {free / 2**30:.1f} GiB are free; name another "
            "folder, a smaller type or fewer layers",
            code="no_space",
        )


def _is_memory(folder: Path) -> bool:
    """Whether files in the folder live in memory (tmpfs)."""
    best, kind = "", ""
    with nullcontext() if not Path("/proc/mounts").exists() else open("/proc/mounts", encoding="utf-8") as mounts:
        for line in mounts or ():
            _, mount, fs, *_ = line.split()
            if len(mount) >= len(best) and folder.resolve().is_relative_to(mount):
                best, kind = mount, fs
    return kind in {"tmpfs", "ramfs"}
