"""What the benchmark scripts share on top of ``pyengine.bench``: options, synthetic files that are kept, new processes.

Every script takes a GGUF file or ``--synthetic CARD[:TYPE]`` (random weights of a card's shape, written once and kept
in ``--folder``), runs its variants in interleaved rounds, prints the median and the spread of each figure, and writes
``--json FILE``. Plain prefill and decode are measured by ``pyengine-bench``.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path

from pyengine import bench, synthetic
from pyengine.bench import Report, Row, prompt, timed
from pyengine.machine import measure_limits
from pyengine.model import default_threads
from pyengine.quant import tier_active
from pyengine.shape import CARDS, find_card

__all__ = [
    "Report",
    "Row",
    "anonymous_bytes",
    "check_program",
    "finish",
    "in_new_process",
    "interleave",
    "model_path",
    "parser",
    "prompt",
    "start",
    "timed",
]

ROOT = Path(__file__).resolve().parent.parent


def parser(doc: str | None, *, model: bool = True) -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    if model:
        p.add_argument("model", nargs="?", type=Path, help="a GGUF file")
        p.add_argument("--synthetic", metavar="CARD[:TYPE]", help=f"random weights: {', '.join(CARDS)}")
        p.add_argument(
            "--folder", type=Path, default=Path(tempfile.gettempdir()), help="where synthetic files are kept"
        )
    p.add_argument("--threads", type=int, default=0, help="default: one per usable core")
    p.add_argument("--rounds", type=int, default=5)
    p.add_argument("--json", type=Path, metavar="FILE", help="write every round's figures and the limits")
    p.add_argument("--markdown", action="store_true", help="print the table as Markdown")
    p.add_argument("--no-limits", action="store_true", help="do not measure the machine first (some 2 s)")
    return p


def model_path(args: argparse.Namespace) -> Path:
    """The file to measure; a synthetic one is written when it is not there yet."""
    if (args.model is None) == (args.synthetic is None):
        raise SystemExit("give a GGUF file or --synthetic CARD[:TYPE]")
    if args.model is not None:
        return Path(args.model)
    card, _, kind = str(args.synthetic).partition(":")
    shape = find_card(card)
    table = synthetic.table(shape, kind or "Q4_0")
    path: Path = args.folder / f"random-{card}-{kind or 'q4_0'}.gguf".lower()
    if not path.exists():
        print(f"writing {path}", file=sys.stderr)
        part = path.with_suffix(".part")
        with open(part, "wb") as file:
            synthetic.write(file, shape, table)
        part.rename(path)
    return path


def start(args: argparse.Namespace, what: str, path: Path | None = None) -> Report:
    """A report headed by what runs where; measures the limits unless told not to."""
    name = f" of {path.name}" if path else ""
    count = args.threads or default_threads()
    title = f"{what}{name}, {tier_active()}, threads: {count}, {args.rounds} rounds"
    return Report(title, {} if args.no_limits else {count: measure_limits(count)})


def finish(report: Report, args: argparse.Namespace) -> None:
    """Prints the table and writes the JSON."""
    print("\n".join(report.lines(args.markdown)))
    if args.json:
        args.json.write_text(json.dumps(report.json(), indent=1))


def interleave(rounds: int, variants: Mapping[str, Callable[[], None]]) -> None:
    """Runs every variant once a round and says so on a terminal."""

    def show(i: int, n: int, name: str) -> None:
        print(f"\r\x1b[Kround {i}/{n}: {name}", end="", file=sys.stderr, flush=True)

    terminal = sys.stderr.isatty()
    bench.interleave(rounds, variants, show if terminal else None)
    if terminal:
        print("\r\x1b[K", end="", file=sys.stderr, flush=True)


def check_program(name: str) -> Path:
    """A built check program."""
    path = Path(os.environ.get("PYENGINE_CHECKS_DIR", ROOT / "build" / "checks")) / name
    if not path.is_file():
        raise SystemExit(f"{path} is not built: run `make limits` once")
    return path


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
