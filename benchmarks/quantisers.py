"""Our quantisers beside llama.cpp's on trained models: errors of every tensor, and what each recipe does to a model.

    python benchmarks/quantisers.py ../shared/data --bin build/bin [--tables] [--recipes] [--only Q4_K ...]

Models: those of the data folder that are 256 columns wide, and the demo model's checkpoint. --bin: llama.cpp's
llama-quantize and llama-perplexity, with libggml-base.so beside them or in ../lib.

--tables: for each type and model the ratio of true RMSE, ours / theirs, tensor by tensor (the same float32 rows, read
back by the `gguf` package); then of importance-weighted RMSE with an importance matrix of `pyengine-imatrix` over a
text, both quantisers having it.

--recipes: both make a file of each recipe from the same F32 file, without and with the importance matrix. Perplexity
and mean KL divergence from the F32 model, each file measured by both engines: windows of 256 tokens, each engine
against its own F32 logits. A file of ours is worse than theirs where its divergence, or its perplexity, is higher by
more than two standard errors of the difference (taken as independent, which two files of the same model are not).

The text: stories for the story models, held-out problems with their solutions for the demo model.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import numpy.typing as npt
from gguf.quants import dequantize

from pyengine import quant
from pyengine.gguf_file import GgufFile
from pyengine.imatrix import ImportanceMatrix
from pyengine_convert.convert import Options, convert
from pyengine_convert.recipe import RECIPES

ROOT = Path(__file__).resolve().parents[1]
STORIES = ("stories260K-llama-256d", "stories260K-qwen2-256d", "stories260K-qwen3-256d")
DEMO = "demo"
# Without importance those whose bytes the format's reference defines have a ratio of 1.
TYPES = ["Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_NL", "IQ4_XS", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0"]
WINDOW = 256
Floats = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Subject:
    """A model: its F32 file, a text it knows, and an importance matrix from another text."""

    name: str
    full: Path
    text: Path
    imatrix: Path


def subjects(data: Path, names: list[str], folder: Path) -> Iterator[Subject]:
    for name in names:
        source = ROOT / "tools" / "demo" / "checkpoint" if name == DEMO else data / "models" / name
        full, text, other, imatrix = (
            folder / f"{name}-{x}" for x in ("f32.gguf", "text", "calibration", "imatrix.gguf")
        )
        convert(source, full, "f32")
        text.write_text(problems(20_000) if name == DEMO else stories(data, 0), encoding="utf-8")
        other.write_text(problems(77) if name == DEMO else stories(data, 1), encoding="utf-8")
        command = [sys.executable, "-m", "pyengine.cli.imatrix", full, "-f", other, "-o", imatrix]
        subprocess.run(
            [*command, "-c", str(WINDOW), "--chunks", "40", "--process-output"], check=True, capture_output=True
        )
        yield Subject(name, full, text, imatrix)


def stories(data: Path, half: int) -> str:
    text = (data / "text" / "tinystories.txt").read_text(encoding="utf-8")
    return text[half * len(text) // 2 : (half + 1) * len(text) // 2]


def problems(seed: int) -> str:
    """Held-out problems and their solutions, as the demo model was taught to write them."""
    sys.path.insert(0, str(ROOT / "tools" / "demo"))
    from problems import held_out

    return "\n".join(f"{p.question}\n<think>\n{p.steps}\n</think>\n\n{p.answer_text}" for p in held_out(400, seed))


# ---- tensors ----


def their_quantiser(folder: Path) -> ctypes.CDLL:
    found = [p for place in (folder, folder.parent / "lib") for p in sorted(place.glob("libggml-base.so*"))]
    if not found:
        raise SystemExit(f"{folder} has no libggml-base.so")
    lib = ctypes.CDLL(str(found[0]))
    lib.ggml_quantize_chunk.restype = ctypes.c_size_t
    lib.ggml_quantize_chunk.argtypes = [
        ctypes.c_int,
        ctypes.c_void_p,
        ctypes.c_void_p,
        *[ctypes.c_int64] * 3,
        ctypes.c_void_p,
    ]
    return lib


def theirs(lib: ctypes.CDLL, name: str, x: Floats, importance: Floats | None) -> npt.NDArray[np.uint8]:
    fmt = quant.find(name)
    out = np.zeros((x.shape[0], fmt.row_bytes(x.shape[1])), np.uint8)
    weights = None if importance is None else importance.ctypes.data
    lib.ggml_quantize_chunk(fmt.type, x.ctypes.data, out.ctypes.data, 0, *x.shape, weights)
    return out


def error(name: str, x: Floats, importance: Floats | None, packed: npt.NDArray[np.uint8]) -> float:
    squares = (dequantize(packed, gguf.GGMLQuantizationType[name]).reshape(x.shape).astype(np.float64) - x) ** 2
    return float(np.sqrt((squares if importance is None else squares * importance).mean()))


def tensor_tables(all_of: list[Subject], types: list[str], lib: ctypes.CDLL) -> bool:
    worst = 0.0
    for subject in all_of:
        found = ImportanceMatrix.read(subject.imatrix).entries
        ratios: dict[str, dict[bool, dict[str, float]]] = {t: {False: {}, True: {}} for t in types}
        with GgufFile.open(subject.full) as file:
            for name, tensor in file.tensors.items():
                if len(tensor.dims) < 2:
                    continue
                x = file.dequantise(name)
                entry = found.get(name)
                weights = None if entry is None else (entry.squares[0] / entry.counts[0]).astype(np.float32)
                for kind in types:
                    if tensor.cols % quant.find(kind).block_size:
                        continue
                    for importance in (None, weights) if weights is not None else (None,):
                        mine = error(kind, x, importance, quant.quantise(kind, x, importance=importance))
                        ratio = mine / error(kind, x, importance, theirs(lib, kind, x, importance))
                        ratios[kind][importance is not None][name] = ratio
        roles = list(dict.fromkeys(role_of(n) for n in ratios[types[-1]][False]))
        for weighted in (False, True):
            what = "importance-weighted RMSE" if weighted else "RMSE"
            print(f"\n{subject.name}, {what}, ours / theirs; of several layers the worst\n")
            print("| tensor |" + "".join(f" {t} |" for t in types))
            print("|---|" + "---|" * len(types))
            for role in roles:
                cells = [[r for n, r in ratios[t][weighted].items() if role_of(n) == role] for t in types]
                if any(cells):
                    print(f"| {role} |" + "".join(f" {max(c):.3f} |" if c else " |" for c in cells))
            means = [list(ratios[t][weighted].values()) for t in types]
            print("| mean of all |" + "".join(f" {np.mean(m):.3f} |" for m in means), flush=True)
            worst = max(worst, *(max(m) for m in means))
    print(f"\nworst ratio: {worst:.4f}")
    return worst <= 1 + 1e-6


def role_of(name: str) -> str:
    return re.sub(r"^blk\.\d+\.|\.weight$", "", name)


# ---- recipes ----


@dataclass(frozen=True)
class Measured:
    """Perplexity / the F32 model's, divergence from it; each with its standard error."""

    ratio: float
    ratio_error: float
    divergence: float
    divergence_error: float

    def worse_than(self, other: Measured) -> bool:
        by_ratio = self.ratio - other.ratio > 2 * np.hypot(self.ratio_error, other.ratio_error)
        by_divergence = self.divergence - other.divergence > 2 * np.hypot(self.divergence_error, other.divergence_error)
        return bool(by_ratio or by_divergence)


def measured_here(path: Path, base: Path, chunks: int) -> Measured:
    command = [
        sys.executable,
        "-m",
        "pyengine.cli.perplexity",
        path,
        "--kl-divergence",
        base,
        "--json",
        "--chunks",
        str(chunks),
    ]
    done = subprocess.run([*map(str, command)], check=True, capture_output=True, text=True)
    d = json.loads(done.stdout)["divergence"]
    return Measured(d["ratio"]["value"], d["ratio"]["error"], d["mean"]["value"], d["mean"]["error"])


def measured_there(tools: Path, path: Path, base: Path, chunks: int) -> Measured:
    text = their_tool(tools, path, chunks, "--kl-divergence-base", base, "--kl-divergence", says="Same top p:")
    values = []
    for label in (r"Mean PPL\(Q\)/PPL\(base\)", "Mean +KLD"):
        found = re.search(label + r" *: +([-\d.]+) ± +([\d.]+)", text)
        assert found, text
        values += [float(found[1]), float(found[2])]
    return Measured(*values)


def their_tool(tools: Path, path: Path, chunks: int, *args: Any, says: str) -> str:
    """What llama-perplexity prints. Its log sometimes loses its last lines: again until it ``says`` that."""
    command = [
        tools / "llama-perplexity",
        "-m",
        path,
        "-c",
        WINDOW,
        "-b",
        WINDOW,
        "-t",
        2,
        "-fa",
        "off",
        "--chunks",
        chunks,
        *args,
    ]
    for _ in range(40):
        done = subprocess.run([*map(str, command)], capture_output=True, text=True, check=False)
        if done.returncode:
            raise SystemExit(done.stderr[-2000:])
        if says in done.stdout + done.stderr:
            return done.stdout + done.stderr
    raise SystemExit(f"llama-perplexity never printed {says!r}")


def recipe_tables(all_of: list[Subject], recipes: list[str], tools: Path, chunks: int, folder: Path) -> bool:
    worse = 0
    for subject in all_of:
        base_here, base_there = folder / "base-here", folder / "base-there"
        save = [sys.executable, "-m", "pyengine.cli.perplexity", subject.full, "-f", subject.text, "-c", WINDOW]
        subprocess.run(
            [*map(str, save), "--chunks", str(chunks), "--save-logits", base_here], check=True, capture_output=True
        )
        their_tool(tools, subject.full, chunks, "-f", subject.text, "--save-all-logits", base_there, says="PPL = ")
        print(
            f"\n{subject.name}: divergence from F32, perplexity / F32's; our file and theirs, measured here and there\n"
        )
        print(
            "| recipe | KLD here: ours / theirs | KLD there: ours / theirs | perplexity here: ours / theirs | there |"
        )
        print("|---|---|---|---|---|")
        for recipe in recipes:
            for imatrix in (None, subject.imatrix):
                a, b = folder / "ours.gguf", folder / "theirs.gguf"
                convert(subject.full, a, recipe, force=True, threads=2, options=Options(imatrix=imatrix))
                options = ["--imatrix", imatrix] if imatrix else []
                command = [tools / "llama-quantize", *options, subject.full, b, recipe, 2]
                subprocess.run([*map(str, command)], check=True, capture_output=True)
                here = [measured_here(path, base_here, chunks) for path in (a, b)]
                there = [measured_there(tools, path, base_there, chunks) for path in (a, b)]
                bad = here[0].worse_than(here[1]) or there[0].worse_than(there[1])
                worse += bad
                print(
                    f"| {recipe}{' imatrix' if imatrix else ''} "
                    f"| {here[0].divergence:.5f} / {here[1].divergence:.5f} ± {here[0].divergence_error:.5f} "
                    f"| {there[0].divergence:.5f} / {there[1].divergence:.5f} ± {there[0].divergence_error:.5f} "
                    f"| {here[0].ratio:.4f} / {here[1].ratio:.4f} ± {here[0].ratio_error:.4f} "
                    f"| {there[0].ratio:.4f} / {there[1].ratio:.4f} ± {there[0].ratio_error:.4f} |"
                    f"{' WORSE' if bad else ''}",
                    flush=True,
                )
                for path in (a, b):
                    path.unlink()
        for path in (base_here, base_there):
            path.unlink()
    print(f"\n{worse} files of ours are worse")
    return worse == 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, help="the folder that holds models/ and text/")
    parser.add_argument("--bin", type=Path, required=True, help="llama.cpp's programs")
    parser.add_argument("--models", nargs="+", default=[*STORIES, DEMO])
    parser.add_argument("--tables", action="store_true")
    parser.add_argument("--recipes", action="store_true")
    parser.add_argument("--only", nargs="+", help="these types, or recipes")
    parser.add_argument("--chunks", type=int, default=40, help="windows of a text")
    args = parser.parse_args()
    good = True
    with tempfile.TemporaryDirectory() as name:
        all_of = list(subjects(args.data, args.models, Path(name)))
        if args.tables:
            good &= tensor_tables(all_of, args.only or TYPES, their_quantiser(args.bin))
        if args.recipes:
            recipes = args.only or [r for r in RECIPES if r not in ("F32", "F16", "BF16")]
            good &= recipe_tables(all_of, recipes, args.bin, args.chunks, Path(name))
    return 0 if good else 1


if __name__ == "__main__":
    with contextlib.suppress(BrokenPipeError):
        sys.exit(main())
