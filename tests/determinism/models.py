"""The small models that the proof runs on: the demo model and trained ones of every architecture, in many formats."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

from pyengine import demo_model_path
from pyengine.quant import FORMATS
from pyengine_convert.convert import convert
from tools.demo.quantise import requantise

DEMO = "demo-q8_0"  # as it is bundled; "demo-Q4_K" and so on are made of it
ARCHITECTURES = ("llama", "qwen2", "qwen3")
WEIGHTS = ("F16", "Q8_0", "Q4_0", "Q4_K_M", "Q6_K")
DEMO_NAMES = (DEMO, *(f"demo-{f.name}" for f in FORMATS.values() if f.can_quantise and f.name != "Q8_0"))


def names(data: Path | None) -> list[str]:
    """The models of the matrix: with test data every architecture in five weight types, and always the demo model."""
    trained = [f"{arch}-{kind}" for arch in ARCHITECTURES for kind in WEIGHTS] if data is not None else []
    return [*trained, DEMO, "demo-Q4_K"]


def make(name: str, folder: Path, data: Path | None) -> Path:
    """The file of a model in ``folder``, made when it is not there."""
    target = folder / f"{name}.gguf"
    if target.exists():
        return target
    source, _, kind = name.partition("-")
    unfinished = target.with_suffix(".part")
    _maker(source, kind, folder, data)(unfinished)
    unfinished.rename(target)
    return target


def _maker(source: str, kind: str, folder: Path, data: Path | None) -> Callable[[Path], object]:
    if source == "demo":
        original = demo_model_path()
        if kind == "q8_0":
            return lambda out: shutil.copyfile(original, out)
        return lambda out: requantise(original, out, kind)
    assert data is not None, "the trained models need the test data"
    if kind.endswith("_M"):  # a mixture, as llama.cpp's own tools make it
        return lambda out: shutil.copyfile(data / "gguf" / f"stories260K-{source}-256d-{kind}.gguf", out)
    if kind.endswith("_K"):  # exact weights, quantised by the engine
        return lambda out: requantise(make(f"{source}-F32", folder, data), out, kind)
    return lambda out: convert(data / "models" / f"stories260K-{source}-256d", out, kind.lower())
