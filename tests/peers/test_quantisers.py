"""Our quantisers beside llama.cpp's, on trained weights: opt-in (`make test-peers`); -s prints a table.

Error: the root of the sum of squared differences to what the `gguf` package reads back, each column's weighted with its
importance where there is one. Speed: weights a second of processor time, one thread each.
"""

from __future__ import annotations

import ctypes
import os
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import gguf
import numpy as np
import numpy.typing as npt
import pytest
from gguf.quants import dequantize

from pyengine import quant
from pyengine.gguf_file import GgufFile
from pyengine.model import Model
from pyengine_convert.checkpoint import open_checkpoint
from pyengine_convert.convert import convert
from pyengine_convert.recipe import RECIPES
from tests.support import DATA, needs_data

pytestmark = [pytest.mark.peer, needs_data]

MODELS = ["stories260K-llama-256d", "stories260K-qwen2-256d", "stories260K-qwen3-256d"]
TYPES = [f.name for f in quant.FORMATS.values() if f.block_size > 1 and f.can_quantise]
Floats = npt.NDArray[np.float32]
Bytes = npt.NDArray[np.uint8]


def library() -> ctypes.CDLL:
    """ggml of llama-cpp-python, or the one PYENGINE_PEER_GGML names."""
    path = os.environ.get("PYENGINE_PEER_GGML")
    if path is None:
        import llama_cpp  # not in any extra: make test-peers installs it

        path = str(next((Path(llama_cpp.__file__).parent / "lib").glob("*ggml-base.so*")))
    lib = ctypes.CDLL(path)
    lib.ggml_quantize_chunk.restype = ctypes.c_size_t
    lib.ggml_quantize_chunk.argtypes = [
        ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64, ctypes.c_int64, ctypes.c_void_p
    ]  # fmt: skip
    return lib


def theirs(lib: ctypes.CDLL, name: str, x: Floats, importance: Floats | None) -> Bytes:
    fmt = quant.find(name)
    out = np.zeros((x.shape[0], fmt.row_bytes(x.shape[1])), np.uint8)
    weights = None if importance is None else importance.ctypes.data
    lib.ggml_quantize_chunk(fmt.type, x.ctypes.data, out.ctypes.data, 0, *x.shape, weights)
    return out


def matrices() -> Iterator[tuple[str, Floats]]:
    for model in MODELS:
        for name, tensor in open_checkpoint(DATA / "models" / model).items():
            if len(tensor.shape) == 2 and tensor.cols % 256 == 0:
                yield f"{model} {name}", tensor.read_rows(0, tensor.rows)


def error(name: str, x: Floats, importance: Floats | None, packed: Bytes) -> float:
    restored = dequantize(packed, gguf.GGMLQuantizationType[name]).reshape(x.shape)
    squares = (restored.astype(np.float64) - x) ** 2
    return float(np.sqrt((squares if importance is None else squares * importance).sum()))


@dataclass
class Row:
    ratios: list[float]
    worst: str
    ours: float
    theirs: float


def measure(lib: ctypes.CDLL, name: str, weighted: bool) -> Row:
    ratios, names, weights, times = [], [], 0, [0.0, 0.0]
    for label, x in matrices():
        rng = np.random.default_rng(len(names))
        importance = np.exp(1.5 * rng.standard_normal(x.shape[1])).astype(np.float32) if weighted else None
        began = time.thread_time()
        mine = quant.quantise(name, x, importance=importance)
        between = time.thread_time()
        other = theirs(lib, name, x, importance)
        times[0] += between - began
        times[1] += time.thread_time() - between
        ratios.append(error(name, x, importance, mine) / error(name, x, importance, other))
        names.append(label)
        weights += x.size
    worst = int(np.argmax(ratios))
    return Row(ratios, names[worst], weights / times[0] / 1e6, weights / times[1] / 1e6)


def quantise_there(source: Path, out: Path, file_type: int) -> None:
    import llama_cpp

    parameters = llama_cpp.llama_model_quantize_default_params()
    parameters.ftype, parameters.nthread = file_type, 2
    assert llama_cpp.llama_model_quantize(str(source).encode(), str(out).encode(), ctypes.byref(parameters)) == 0


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("model", MODELS)
def test_a_recipe_has_the_types_and_keys_of_their_tool_and_loses_no_more(
    model: str, recipe: str, tmp_path: Path
) -> None:
    """Their file opens here, too: the reader and the model code see it."""
    full = tmp_path / "full.gguf"
    convert(DATA / "models" / model, full, "f32")
    convert(full, tmp_path / "ours.gguf", recipe)
    quantise_there(full, tmp_path / "theirs.gguf", RECIPES[recipe].file_type)
    with (
        GgufFile.open(full) as exact,
        GgufFile.open(tmp_path / "ours.gguf") as ours,
        GgufFile.open(tmp_path / "theirs.gguf") as other,
        Model.open(tmp_path / "theirs.gguf"),
    ):
        assert {n: (t.type_name, t.dims) for n, t in ours.tensors.items()} == {
            n: (t.type_name, t.dims) for n, t in other.tensors.items()
        }
        assert {k: str(v) for k, v in ours.metadata.items()} == {k: str(v) for k, v in other.metadata.items()}
        for name, tensor in ours.tensors.items():
            x = exact.dequantise(name)
            mine, theirs = (float(np.linalg.norm(f.dequantise(name) - x)) for f in (ours, other))
            assert mine <= theirs * (1 + 1e-6), (name, tensor.type_name)


@pytest.mark.parametrize("weighted", [False, True], ids=["plain", "importance"])
@pytest.mark.parametrize("name", TYPES)
def test_no_tensor_loses_more_than_with_their_quantiser(name: str, weighted: bool) -> None:
    row = measure(library(), name, weighted)
    print(
        f"\n| {name}{', importance' if weighted else ''} | {np.mean(row.ratios):.3f} | {max(row.ratios):.3f} "
        f"| {row.ours:.0f} | {row.theirs:.0f} |",
        file=sys.stderr,
    )
    assert max(row.ratios) <= 1.0 + 1e-6, row.worst
