"""``pyengine-convert``: arguments, progress and messages. Everything is written to stderr; the file is the output."""

from __future__ import annotations

import argparse
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from types import FrameType
from typing import NoReturn

from pyengine.errors import EngineError, InvalidArgument

EXIT_FAILED, EXIT_USAGE, EXIT_INTERRUPTED = 1, 2, 130


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit code: 0 done, 1 failed, 2 wrong usage, 130 interrupted."""
    args = _parser().parse_args(arguments)
    try:
        from pyengine_convert import convert  # after parsing: --help works without the extra packages

        bar = _Progress()
    except ModuleNotFoundError as error:
        return _say(f"the package {error.name} is missing: pip install 'pyengine[convert]'", EXIT_FAILED)
    signal.signal(signal.SIGTERM, _interrupt)
    try:
        report = convert.convert(
            args.source,
            args.out,
            args.type,
            threads=args.threads or usable_cores(),
            force=args.force,
            name=args.name,
            pre=args.pre,
            on_plan=lambda plan: bar.start(plan.size),
            progress=bar.advance,
        )
    except InvalidArgument as error:
        return _say(f"error: {error}", EXIT_USAGE, bar)
    except EngineError as error:
        return _say(f"error: {error}", EXIT_FAILED, bar)
    except KeyboardInterrupt:
        return _say("interrupted: nothing was written", EXIT_INTERRUPTED, bar)
    bar.close()
    if args.verbose:
        _print_table(report)
    _print_summary(report)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="pyengine-convert", description="Convert a Hugging Face checkpoint (llama, qwen2, qwen3) to a GGUF file."
    )
    parser.add_argument("source", type=Path, metavar="SRC", help="folder with config.json, safetensors and a tokenizer")
    parser.add_argument("-o", "--out", type=Path, required=True, metavar="OUT.gguf", help="the file to write")
    parser.add_argument(
        "--type", default="q8_0", choices=("f32", "f16", "bf16", "q8_0", "q4_0"), help="weight type (default: q8_0)"
    )
    parser.add_argument("--threads", type=_positive, metavar="N", help="default: one per usable core")
    parser.add_argument("--force", action="store_true", help="replace OUT.gguf when it exists")
    parser.add_argument("--name", help="general.name (default: the folder's name)")
    parser.add_argument("--pre", metavar="NAME", help="pre-tokenizer family, where it is not recognised")
    parser.add_argument("--verbose", action="store_true", help="print a line for every tensor")
    return parser


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no positive number")
    return int(text)


def usable_cores() -> int:
    """Processors this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _interrupt(_signal: int, _frame: FrameType | None) -> NoReturn:
    raise KeyboardInterrupt


class _Progress:
    """A progress bar on stderr when that is a terminal; nothing otherwise."""

    def __init__(self) -> None:
        from tqdm import tqdm

        self._bar: tqdm[NoReturn] = tqdm(
            unit="B", unit_scale=True, unit_divisor=1000, file=sys.stderr, disable=not sys.stderr.isatty(), leave=False
        )

    def start(self, total: int) -> None:
        self._bar.reset(total)

    def advance(self, size: int) -> None:
        self._bar.update(size)

    def close(self) -> None:
        self._bar.close()


def _say(message: str, code: int, bar: _Progress | None = None) -> int:
    if bar is not None:
        bar.close()
    print(f"pyengine-convert: {printable(message)}", file=sys.stderr)
    return code


def printable(text: str) -> str:
    """Text from files made safe for a terminal: control and direction-changing characters become U+FFFD."""
    return "".join(c if c.isprintable() else "\ufffd" for c in text)


def _print_table(report: object) -> None:
    from pyengine_convert.convert import Report

    assert isinstance(report, Report)
    print(f"{'tensor':<32} {'shape':<16} {'type':<6} {'bytes':>12}  from", file=sys.stderr)
    for t in report.tensors:
        shape = " x ".join(map(str, t.shape))
        note = f"  ({t.note})" if t.note else ""
        print(f"{t.name:<32} {shape:<16} {t.type:<6} {t.size:>12}  {printable(t.source)}{note}", file=sys.stderr)


def _print_summary(report: object) -> None:
    from pyengine_convert.convert import Report

    assert isinstance(report, Report)
    fallen = [t for t in report.tensors if t.note.startswith("rows of")]
    if fallen:
        print(f"note: {len(fallen)} tensors kept in F16, e.g. {fallen[0].name}: {fallen[0].note}", file=sys.stderr)
    for note in report.notes:
        print(f"note: {printable(note)}", file=sys.stderr)
    print(
        f"{printable(str(report.path))}: {report.size / 1e6:.1f} MB, {report.weights / 1e6:.2f} M weights, "
        f"{report.bits_per_weight:.2f} bits each, {report.seconds:.1f} s",
        file=sys.stderr,
    )


if __name__ == "__main__":
    sys.exit(main())
