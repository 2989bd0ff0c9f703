"""Agreement with llama.cpp on the same files: opt-in (`make test-peers`), since it needs llama-cpp-python.

Two engines that round activations differently cannot agree bit for bit; two existing engines differ by a mean KL
divergence of 5e-4 to 1e-3 from each other. Free-running text is no measure: one flipped token changes all that follow.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

import pyengine
from pyengine_convert.convert import convert
from pyengine_convert.recipe import RECIPES
from tests.convert.checkpoints import STORIES
from tests.support import DATA, needs_data

pytestmark = [pytest.mark.peer, needs_data]

WINDOW = 256  # tokens per window, BOS first
WINDOWS = 12
MAX_KLD = 2e-3

FILES = [
    "stories260K-llama-256d-F16.gguf",
    "stories260K-llama-256d-Q8_0.gguf",
    "stories260K-llama-256d-Q4_0.gguf",
    "stories260K-llama-256d-Q4_K_M.gguf",
    "stories260K-llama-256d-Q5_K_M.gguf",
    "stories260K-llama-256d-Q6_K.gguf",
    "stories260K-llama-256d-Q3_K_M.gguf",
    "stories260K-llama-256d-Q2_K.gguf",
    "stories260K-qwen2-256d-Q8_0.gguf",
    "stories260K-qwen2-256d-Q4_K_M.gguf",
    "stories260K-qwen3-256d-Q8_0.gguf",
    "stories260K-qwen3-256d-Q4_K_M.gguf",
]
Rows = npt.NDArray[np.float64]


def log_softmax(logits: npt.NDArray[np.float32]) -> Rows:
    x = logits.astype(np.float64)
    x -= x.max(axis=-1, keepdims=True)
    return x - np.log(np.exp(x).sum(axis=-1, keepdims=True))


def windows(model: pyengine.Model, count: int = WINDOWS) -> list[list[int]]:
    text = (DATA / "text" / "tinystories.txt").read_text(encoding="utf-8")[: 40 * WINDOW * count]
    ids = model.tokenizer.encode(text, add_special=False)
    bos = model.tokenizer.bos_id
    head = [bos] if bos is not None else []
    step = WINDOW - len(head)
    return [head + ids[i * step : (i + 1) * step] for i in range(count)]


def theirs(path: Path, batches: list[list[int]]) -> Iterator[Rows]:
    import llama_cpp  # not in any extra: make test-peers installs it

    llm = llama_cpp.Llama(str(path), n_ctx=WINDOW, n_batch=WINDOW, logits_all=True, n_threads=2, verbose=False)
    for ids in batches:
        llm.reset()
        llm.eval(ids)
        yield log_softmax(llm.scores[: len(ids)])
    llm.close()


def compare(path: Path) -> tuple[float, float]:
    """(mean KL divergence from llama.cpp's distribution to ours, argmax agreement), teacher-forced; prints both."""
    divergence, agreed, total, ours_nll, theirs_nll = 0.0, 0, 0, 0.0, 0.0
    with pyengine.Model.open(path) as model, model.session(n_ctx=WINDOW, threads=2) as session:
        batches = windows(model)
        for ids, their_rows in zip(batches, theirs(path, batches), strict=True):
            session.truncate(0)
            our_rows = log_softmax(session.eval(ids, all_logits=True))
            divergence += float((np.exp(their_rows) * (their_rows - our_rows)).sum())
            agreed += int((our_rows.argmax(1) == their_rows.argmax(1)).sum())
            total += len(ids)
            targets = np.array(ids[1:])
            at = np.arange(len(targets))
            ours_nll -= float(our_rows[at, targets].sum())
            theirs_nll -= float(their_rows[at, targets].sum())
    n = total - WINDOWS
    print(
        f"\n{path.name}: mean KLD {divergence / total:.2e}, argmax agreement {100 * agreed / total:.2f} % of {total}, "
        f"perplexity {np.exp(ours_nll / n):.4f} here, {np.exp(theirs_nll / n):.4f} there",
        file=sys.stderr,
    )
    return divergence / total, agreed / total


@pytest.mark.parametrize("name", FILES)
def test_logits_agree_as_closely_as_two_roundings_allow(name: str) -> None:
    mean, top1 = compare(DATA / "gguf" / name)
    assert mean <= MAX_KLD
    assert top1 >= 0.97


@pytest.mark.parametrize("kind", [recipe.lower() for recipe in RECIPES])
@pytest.mark.parametrize("name", STORIES)
def test_files_of_our_converter_load_there_and_mean_the_same(name: str, kind: str, tmp_path: Path) -> None:
    path = tmp_path / f"{name}-{kind}.gguf"
    convert(DATA / "models" / name, path, kind)
    mean, top1 = compare(path)
    assert mean <= (1e-5 if kind == "f32" else MAX_KLD)
    assert top1 >= 0.97


def test_the_demo_model_loads_there() -> None:
    import llama_cpp

    path = pyengine.demo_model_path()
    with pyengine.Model.open(path) as model, model.session(n_ctx=64, threads=1) as session:
        ids = model.tokenizer.encode("What is 12 + 30?")
        ours = session.eval(ids)
    llm = llama_cpp.Llama(str(path), n_ctx=64, logits_all=True, n_threads=1, verbose=False)
    llm.eval(ids)
    assert int(np.argmax(llm.scores[len(ids) - 1])) == int(np.argmax(ours))
    llm.close()
