"""Writes blocks.npz: blocks of the formats that we only read, as llama.cpp's quantiser makes them.

    python tests/quant/make_blocks.py FOLDER    # where libggml-base.so is

Normally distributed weights of standard deviation 0.02, an importance matrix of ones, 16 blocks of each format.
"""

from __future__ import annotations

import ctypes
import sys
from pathlib import Path

import numpy as np
import numpy.typing as npt
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

NAMES = ("IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S", "TQ1_0", "TQ2_0", "MXFP4")


def quantiser(folder: Path) -> ctypes.CDLL:
    ggml = ctypes.CDLL(str(folder / "libggml-base.so"))
    pointer, number = ctypes.c_void_p, ctypes.c_int64
    ggml.ggml_quantize_chunk.argtypes = [ctypes.c_int, pointer, pointer, number, number, number, pointer]
    ggml.ggml_quantize_chunk.restype = ctypes.c_size_t
    return ggml


def quantise(ggml: ctypes.CDLL, name: str, values: npt.NDArray[np.float32]) -> npt.NDArray[np.uint8]:
    """float32 [rows, cols] -> packed [rows, bytes]."""
    kind = GGMLQuantizationType[name]
    size, block_bytes = GGML_QUANT_SIZES[kind]
    rows, cols = values.shape
    values = np.ascontiguousarray(values, np.float32)
    out = np.zeros((rows, cols // size * block_bytes), np.uint8)
    ones = np.ones(cols, np.float32)
    written = ggml.ggml_quantize_chunk(kind.value, values.ctypes.data, out.ctypes.data, 0, rows, cols, ones.ctypes.data)
    assert written == out.nbytes
    return out


def main() -> None:
    ggml = quantiser(Path(sys.argv[1]))
    rng = np.random.default_rng(0)
    blocks = {}
    for name in NAMES:
        size = GGML_QUANT_SIZES[GGMLQuantizationType[name]][0]
        values = (0.02 * rng.standard_normal((16, size))).astype(np.float32)
        blocks[name] = quantise(ggml, name, values)
    np.savez_compressed(Path(__file__).parent / "blocks.npz", **blocks)


if __name__ == "__main__":
    main()
