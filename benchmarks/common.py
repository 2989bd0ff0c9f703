"""What the benchmarks share: the model, interleaved rounds, the machine's limits, tables.

Every benchmark takes a GGUF file or ``--synthetic SHAPE[:TYPE]`` (random weights of a real model's shape, made by
``make_model.py`` once and kept in ``--folder``), runs its variants in interleaved rounds, prints the median and the
spread of each figure with its share of what the machine can do, and writes ``--json FILE``.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))

import make_model
from limits import Limits, measure_limits

from pyengine import Model
from pyengine.quant import tier_active


def parser(doc: str | None, *, model: bool = True) -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    if model:
        p.add_argument("model", nargs="?", type=Path, help="a GGUF file")
        p.add_argument("--synthetic", metavar="SHAPE[:TYPE]", help=f"random weights: {', '.join(make_model.SHAPES)}")
        p.add_argument(
            "--folder", type=Path, default=Path(tempfile.gettempdir()), help="where synthetic files are kept"
        )
    p.add_argument("--threads", type=int, default=0, help="default: one per usable core")
    p.add_argument("--rounds", type=int, default=5)
    p.add_argument("--json", type=Path, metavar="FILE", help="write every round's figures and the limits")
    p.add_argument("--markdown", action="store_true", help="print the table as Markdown")
    p.add_argument("--no-limits", action="store_true", help="do not measure the machine first (some 3 s)")
    return p


def model_path(args: argparse.Namespace) -> Path:
    """The file to measure; a synthetic one is made when it is not there yet."""
    if (args.model is None) == (args.synthetic is None):
        raise SystemExit("give a GGUF file or --synthetic SHAPE[:TYPE]")
    if args.model is not None:
        return Path(args.model)
    shape, _, kind = str(args.synthetic).partition(":")
    kind = kind or "q4_0"
    if shape not in make_model.SHAPES or kind not in make_model.FILE_TYPES:
        raise SystemExit(
            f"--synthetic {args.synthetic}: shapes are {', '.join(make_model.SHAPES)}; "
            f"types are {', '.join(make_model.FILE_TYPES)}"
        )
    path: Path = args.folder / f"random-{shape}-{kind}.gguf"
    if not path.exists():
        print(f"making {path}", file=sys.stderr)
        part = path.with_suffix(".part")
        make_model.make_model(part, make_model.SHAPES[shape], kind)
        part.rename(path)
    return path


def prompt(n: int, n_vocab: int) -> list[int]:
    """n ids that repeat no pattern; the same as in ``vs_llama_cpp.py``."""
    return [(i * 7919 + 13) % n_vocab for i in range(n)]


@dataclass(frozen=True)
class Work:
    """What one token costs: bytes of weights read, and multiplications of the linear operations."""

    bytes: int
    macs: int

    @classmethod
    def of(cls, model: Model) -> Work:
        """All two-dimensional tensors, but of the embedding only when it is the output matrix, too."""
        tensors = model.file.tensors
        tied = "output.weight" not in tensors
        read = [t for t in tensors.values() if len(t.dims) == 2 and (tied or t.name != "token_embd.weight")]
        return cls(sum(t.size for t in read), sum(t.rows * t.cols for t in read))


@dataclass
class Row:
    """One figure: its values, a round each."""

    name: str
    unit: str
    values: list[float] = field(default_factory=list)
    share: str = ""  # of a limit, in words

    @property
    def median(self) -> float:
        return statistics.median(self.values)


@dataclass
class Report:
    title: str
    limits: Limits | None
    rows: list[Row] = field(default_factory=list)

    def row(self, name: str, unit: str) -> Row:
        self.rows.append(Row(name, unit))
        return self.rows[-1]

    def of_stream(self, row: Row, gigabytes: float) -> None:
        """``gigabytes`` read a second, beside the read stream."""
        if self.limits:
            row.share = f"{gigabytes:.1f} GB/s, {100 * gigabytes / self.limits.stream:.0f} % of the read stream"

    def of_arithmetic(self, row: Row, macs_per_second: float) -> None:
        if self.limits:
            cycle = macs_per_second / (self.limits.clock_ghz * 1e9 * self.limits.threads)
            row.share = f"{cycle:.1f} MAC/cycle/core of {self.limits.int8(tier_active()):.0f}"

    def finish(self, args: argparse.Namespace) -> None:
        """Prints the table and writes the JSON."""
        cells = [["figure", "median", "spread", "unit", "share of the limit"]]
        for r in self.rows:
            cells.append([r.name, f"{r.median:.4g}", f"{min(r.values):.4g} .. {max(r.values):.4g}", r.unit, r.share])
        print(self.title)
        if self.limits:
            print(f"limits: {self.limits.words()}")
        print()
        print(markdown(cells) if args.markdown else plain(cells))
        if args.json:
            limits = asdict(self.limits) if self.limits else None
            args.json.write_text(
                json.dumps({"title": self.title, "limits": limits, "rows": [asdict(r) for r in self.rows]}, indent=1)
            )


def markdown(cells: Sequence[Sequence[str]]) -> str:
    lines = ["| " + " | ".join(row) + " |" for row in cells]
    return "\n".join([lines[0], "|" + "---|" * len(cells[0]), *lines[1:]])


def plain(cells: Sequence[Sequence[str]]) -> str:
    widths = [max(len(row[i]) for row in cells) for i in range(len(cells[0]))]
    return "\n".join("  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip() for row in cells)


def start(args: argparse.Namespace, what: str, path: Path | None = None) -> Report:
    """A report headed by what runs where; measures the limits unless told not to."""
    limits = None if args.no_limits else measure_limits(args.threads)
    name = f" of {path.name}" if path else ""
    threads = args.threads or "as many threads as cores"
    return Report(f"{what}{name}, {tier_active()}, threads: {threads}, {args.rounds} rounds", limits)


def interleave(rounds: int, variants: Mapping[str, Callable[[], None]]) -> None:
    """Runs every variant once a round, so that a change of the machine meets them all."""
    for i in range(rounds):
        for name, run in variants.items():
            if sys.stderr.isatty():
                print(f"\r\x1b[Kround {i + 1}/{rounds}: {name}", end="", file=sys.stderr, flush=True)
            run()
    if sys.stderr.isatty():
        print("\r\x1b[K", end="", file=sys.stderr, flush=True)


def timed(f: Callable[[], Any]) -> float:
    begin = time.perf_counter()
    f()
    return time.perf_counter() - begin


def anonymous_bytes() -> int:
    """Private memory of this process, swapped or not; 0 where the system does not say."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return 0
    return sum(int(line.split()[1]) * 1024 for line in lines if line.startswith(("RssAnon:", "VmSwap:")))


def in_new_process(program: str, *arguments: object) -> dict[str, float]:
    """The figures that a Python program prints as JSON in its last line."""
    env = {**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parent)}
    run = subprocess.run(
        [sys.executable, "-c", program, json.dumps(arguments)], check=True, capture_output=True, text=True, env=env
    )
    figures: dict[str, float] = json.loads(run.stdout.splitlines()[-1])
    return figures
