"""The same checkpoint converted by us and by llama.cpp's own tools, both files read by both: opt-in.

    PYENGINE_LLAMA_CPP_BIN=.../bin PYENGINE_LLAMA_CPP_CONVERT="python .../convert_hf_to_gguf.py" \\
        python -m pytest -m peer tests/peers/test_conversions.py

The Python with which convert_hf_to_gguf.py runs needs torch and transformers, so it is one of its own.
"""

from __future__ import annotations

import functools
import os
import shlex
import subprocess
import tempfile
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

import pyengine
from pyengine.gguf_file import GgufFile
from pyengine_convert.convert import convert
from pyengine_convert.recipe import RECIPES
from tests.peers.test_llama_cpp import MAX_KLD, WINDOW, Rows, compare, theirs, windows
from tests.support import DATA, needs_data

BIN = Path(os.environ.get("PYENGINE_LLAMA_CPP_BIN", ""))
CONVERT = shlex.split(os.environ.get("PYENGINE_LLAMA_CPP_CONVERT", ""))
pytestmark = [
    pytest.mark.peer,
    needs_data,
    pytest.mark.skipif(
        not (BIN / "llama-quantize").is_file(), reason="PYENGINE_LLAMA_CPP_BIN names no llama.cpp tools"
    ),
    pytest.mark.skipif(not CONVERT, reason="PYENGINE_LLAMA_CPP_CONVERT names no convert_hf_to_gguf.py"),
]

MODELS = ["stories260K-llama-256d", "stories260K-qwen2-256d", "stories260K-qwen3-256d"]
# Matrices of these types have the bytes that the format's reference defines, whoever writes them.
DEFINED = {"F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1"}


@functools.cache
def their_conversion(model: str, kind: str) -> Path:
    """What convert_hf_to_gguf.py makes of a checkpoint."""
    out = Path(tempfile.mkdtemp(prefix="peer-")) / f"{model}-{kind}.gguf"
    command = [*CONVERT, str(DATA / "models" / model), "--outfile", str(out), "--outtype", kind]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return out


def their_file(model: str, recipe: str, folder: Path) -> Path:
    if recipe.lower() in ("f32", "f16", "bf16", "q8_0"):
        return their_conversion(model, recipe.lower())
    out = folder / f"theirs-{recipe}.gguf"
    command = [str(BIN / "llama-quantize"), str(their_conversion(model, "f32")), str(out), recipe, "2"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return out


def batches(path: Path) -> list[list[int]]:
    with pyengine.Model.open(path) as model:
        return windows(model, 24)  # with a quarter of them Q4_K differs by a draw of 7 %


@functools.cache
def exact(model: str) -> list[Rows]:
    path = their_conversion(model, "f32")
    return list(theirs(path, batches(path)))


def divergence(p: list[Rows], q: list[Rows]) -> npt.NDArray[np.float64]:
    """KL(p || q) at every position."""
    return np.concatenate([(np.exp(a) * (a - b)).sum(axis=1) for a, b in zip(p, q, strict=True)])


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("model", MODELS)
def test_our_file_gives_there_the_logits_of_its_own_conversion_and_its_file_works_here(
    model: str, recipe: str, tmp_path: Path
) -> None:
    mine, other = tmp_path / "ours.gguf", their_file(model, recipe, tmp_path)
    convert(DATA / "models" / model, mine, recipe)
    with GgufFile.open(mine) as a, GgufFile.open(other) as b:
        assert {n: (t.type_name, t.dims) for n, t in a.tensors.items()} == {
            n: (t.type_name, t.dims) for n, t in b.tensors.items()
        }
        for name, tensor in a.tensors.items():
            if tensor.type_name in DEFINED:
                assert np.array_equal(a.data(name), b.data(name)), name
        same = all(t.type_name in DEFINED for t in a.tensors.values())
    ids = batches(mine)
    assert ids == batches(other)  # the vocabularies are the same, and what they do
    ours_there, theirs_there = (list(theirs(path, ids)) for path in (mine, other))
    if same:
        assert all(np.array_equal(x, y) for x, y in zip(ours_there, theirs_there, strict=True))
    else:
        ours_lost, theirs_lost = (divergence(exact(model), rows) for rows in (ours_there, theirs_there))
        noise = (ours_lost - theirs_lost).std() / len(ours_lost) ** 0.5
        print(f"\n{model} {recipe}: KLD {ours_lost.mean():.5f} ours, {theirs_lost.mean():.5f} theirs, ± {noise:.5f}")
        assert ours_lost.mean() <= theirs_lost.mean() + 2 * noise
    mean, top1 = compare(other)
    lost = 0.0 if same else float(divergence(exact(model), theirs_there).mean())
    assert mean <= max(MAX_KLD, 0.01 * lost)  # a model that has lost much answers every rounding with more
    assert top1 >= (0.97 if lost < 0.1 else 0.95)
    assert len(ids[0]) == WINDOW
