"""Agreement with llama.cpp's own tools: opt-in, with their folder in PYENGINE_LLAMA_CPP_BIN.

PYENGINE_LLAMA_CPP_BIN=.../bin python -m pytest -m peer tests/peers/test_quality_tools.py
"""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

import numpy as np
import pytest

from pyengine.cli import imatrix, perplexity
from pyengine.gguf_file import GgufFile
from pyengine.imatrix import ImportanceMatrix
from tests.support import DATA, needs_data

BIN = Path(os.environ.get("PYENGINE_LLAMA_CPP_BIN", ""))
pytestmark = [
    pytest.mark.peer,
    needs_data,
    pytest.mark.skipif(not (BIN / "llama-imatrix").is_file(), reason="PYENGINE_LLAMA_CPP_BIN names no llama.cpp tools"),
]
TEXT = DATA / "text" / "tinystories.txt"
NAMES = ["llama-256d-F16", "llama-256d-Q4_0", "llama-256d-Q4_K_M", "qwen2-256d-Q8_0", "qwen3-256d-Q4_K_M"]


def model(name: str) -> Path:
    return DATA / "gguf" / f"stories260K-{name}.gguf"


def tool(name: str, *args: object) -> str:
    command = [str(BIN / name), *map(str, args)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout + done.stderr


def theirs(name: str, path: Path, chunks: int, *args: object, says: str = "") -> str:
    """What the tool prints over the text. Its log sometimes loses its last lines: again until it ``says`` that."""
    options = ["-c", 128, "-b", 128, "-t", 1, "-fa", "off", "--chunks", chunks]
    for _ in range(20):
        text = tool(name, "-m", path, "-f", TEXT, *options, *args)
        if says in text:
            return text
    raise AssertionError(f"{name} never printed {says!r}")


def ours(capsys: pytest.CaptureFixture[str], path: Path, *args: object) -> dict[str, float]:
    capsys.readouterr()
    assert perplexity.main([str(path), "-f", str(TEXT), "-c", "128", "--chunks", "60", *map(str, args)]) == 0
    return {line[:15].strip(): float(line[15:].split()[0]) for line in capsys.readouterr().out.splitlines()[:-1]}


@pytest.mark.parametrize("name", NAMES)
def test_perplexity_and_its_error_are_llama_cpps(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    found = re.search(r"PPL = ([\d.]+) \+/- ([\d.]+)", theirs("llama-perplexity", model(name), 60, says="PPL = "))
    assert found is not None
    got = ours(capsys, model(name))
    assert got["perplexity"] == pytest.approx(float(found[1]), rel=1e-3)


def test_divergence_is_llama_cpps(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base, quantised = model("llama-256d-F16"), model("llama-256d-Q4_0")
    theirs("llama-perplexity", base, 60, "--save-all-logits", tmp_path / "theirs")
    options = ("--kl-divergence-base", tmp_path / "theirs", "--kl-divergence")
    text = theirs("llama-perplexity", quantised, 60, *options, says="Same top p:")
    labels = {"mean KLD": r"Mean +KLD", "median KLD": r"Median +KLD", "99 % KLD": r"99\.0% +KLD"}
    labels |= {"same top token": "Same top p", "ratio": r"Mean PPL\(Q\)/PPL\(base\)"}
    ours(capsys, base, "--save-logits", tmp_path / "ours")
    got = ours(capsys, quantised, "--kl-divergence", tmp_path / "ours")
    for label, pattern in labels.items():
        found = re.search(pattern + r" *: +([\d.]+)", text)
        assert found is not None, label
        assert got[label] == pytest.approx(float(found[1]), rel=0.03), label  # two engines round differently


@pytest.mark.parametrize("name", ["llama-256d-F16", "qwen2-256d-Q8_0"])
def test_sums_are_llama_cpps_and_its_tools_read_ours(name: str, tmp_path: Path) -> None:
    a, b, merged, quantised = (tmp_path / f"{n}.gguf" for n in ("ours", "theirs", "merged", "quantised"))
    assert (
        imatrix.main(
            [str(model(name)), "-f", str(TEXT), "-c", "128", "--chunks", "20", "--process-output", "-o", str(a)]
        )
        == 0
    )
    theirs("llama-imatrix", model(name), 20, "--process-output", "--no-ppl", "-o", b)
    tool("llama-imatrix", "-m", model(name), "--in-file", a, "--in-file", b, "-o", merged)
    one, two, both = map(ImportanceMatrix.read, (a, b, merged))
    assert set(one.entries) == set(two.entries) == set(both.entries)
    assert (one.chunk_count, one.chunk_size) == (two.chunk_count, two.chunk_size)
    for key, entry in one.entries.items():
        assert (entry.counts == two.entries[key].counts).all()
        np.testing.assert_allclose(entry.squares.sum(), two.entries[key].squares.sum(), rtol=5e-3, err_msg=key)
        tolerance = 5e-3 if "F16" in name else 5e-2
        np.testing.assert_allclose(entry.squares, two.entries[key].squares, rtol=tolerance, err_msg=key)
        np.testing.assert_allclose(both.entries[key].squares, entry.squares + two.entries[key].squares, rtol=1e-6)
    if "F16" in name:
        tool("llama-quantize", "--imatrix", a, model(name), quantised, "Q4_K_M", 1)
        with GgufFile.open(quantised) as file:
            assert file.metadata["quantize.imatrix.entries_count"] == len(one.entries)
            assert file.metadata["quantize.imatrix.chunks_count"] == 20
