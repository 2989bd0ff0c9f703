"""``pyengine-convert``: arguments, progress and messages. Everything is written to stderr; the file is the output."""

from __future__ import annotations

import argparse
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, NoReturn

from pyengine.cli.common import run_command
from pyengine.cli.models import model_file
from pyengine.errors import EngineError, InvalidArgument

if TYPE_CHECKING:
    from pyengine_convert.convert import Report

EXIT_FAILED, EXIT_USAGE, EXIT_INTERRUPTED = 1, 2, 130


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit code: 0 done, 1 failed, 2 wrong usage, 130 interrupted."""
    arguments = sys.argv[1:] if arguments is None else arguments
    if arguments and arguments[0] == "inspect":
        from pyengine_convert import inspect  # reads only: works without the extra packages

        return inspect.main(arguments[1:])
    args = _parser().parse_args(arguments)
    return run_command("pyengine-convert", lambda: _convert(args))


def _convert(args: argparse.Namespace) -> int:
    try:
        from pyengine_convert import convert  # after parsing: --help works without the extra packages

        bar = _Progress()
    except ModuleNotFoundError as error:
        return _say(f"the package {error.name} is missing: pip install 'pyengine[convert]'", EXIT_FAILED)
    signal.signal(signal.SIGTERM, _interrupt)
    options = convert.Options(
        name=args.name,
        pre=args.pre,
        tensor_types=args.tensor_type,
        output_type=args.output_type,
        embedding_type=args.token_embedding_type,
        pure=args.pure,
        imatrix=args.imatrix,
        lora=args.lora,
        allow_requantize=args.allow_requantize,
    )
    try:
        report = convert.convert(
            model_file(args.source),
            args.out,
            args.type,
            threads=args.threads or usable_cores(),
            force=args.force,
            options=options,
            split=args.split_size,
            resume=args.resume,
            on_plan=lambda plan: bar.start(plan.size),
            progress=bar.advance,
        )
    except InvalidArgument as error:
        return _say(f"error: {error}", EXIT_USAGE, bar)
    except EngineError as error:
        return _say(f"error: {error}", EXIT_FAILED, bar)
    except KeyboardInterrupt:
        left = "--resume goes on from here" if args.resume else "nothing was written"
        return _say(f"interrupted: {left}", EXIT_INTERRUPTED, bar)
    bar.close()
    if args.table or args.verbose:
        _print_table(report)
    _print_summary(report)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="pyengine-convert",
        description="Convert a Hugging Face checkpoint (llama, qwen2, qwen3) or a GGUF file to a GGUF file.",
        epilog="pyengine-convert inspect FILE.gguf prints what a file holds.",
    )
    add = parser.add_argument
    add("source", type=Path, metavar="SRC",
        help="folder with config.json, safetensors and a tokenizer; or a GGUF file, or hf:org/repo:F16")  # fmt: skip
    add("-o", "--out", type=Path, required=True, metavar="OUT.gguf", help="the file to write")
    add("--type", default="q8_0", metavar="TYPE", help="f32 f16 bf16 q8_0 q6_k q5_k_m q5_k_s q5_1 q5_0 q4_k_m q4_k_s "
        "q4_1 q4_0 iq4_nl iq4_xs q3_k_l q3_k_m q3_k_s q2_k (default: q8_0)")  # fmt: skip
    add("--tensor-type", type=_override, action="append", default=[], metavar="PATTERN=TYPE",
        help="another type for matrices whose name holds the regular expression; may be repeated, the first match "
        "decides")  # fmt: skip
    add("--output-type", metavar="TYPE", help="type of the matrix that makes the logits")
    add("--token-embedding-type", metavar="TYPE", help="type of the embedding")
    add("--pure", action="store_true", help="one type for all matrices")
    add("--imatrix", type=Path, metavar="FILE", help="importance matrix: what the error of each column counts")
    add("--lora", type=Path, action="append", default=[], metavar="FOLDER",
        help="merge a PEFT LoRA adapter; may be repeated")  # fmt: skip
    add("--allow-requantize", action="store_true", help="round again what is quantised below 8 bits already")
    add("--split-size", type=_size, metavar="N[M|G]", help="several files of at most so many bytes of tensors")
    add("--resume", action="store_true", help="go on where a killed conversion stopped")
    add("--threads", type=_positive, metavar="N", help="default: one per usable core")
    add("--force", action="store_true", help="replace OUT.gguf when it exists")
    add("--name", help="general.name (default: the folder's name; of a GGUF file: its own)")
    add("--pre", metavar="NAME", help="pre-tokenizer family, where it is not recognised")
    add("--table", action="store_true", help="print a line for every tensor: from, to, error, size")
    add("--verbose", action="store_true", help="the same")
    return parser


def _override(text: str) -> tuple[str, str]:
    pattern, equals, kind = text.rpartition("=")
    if not equals or not pattern or not kind:
        raise argparse.ArgumentTypeError(f"{text!r} is not PATTERN=TYPE")
    return pattern, kind


def _size(text: str) -> int:
    """Bytes: 300M and 2G count in thousands, as disks do."""
    number, unit = (text[:-1], text[-1].upper()) if text[-1:].isalpha() else (text, "")
    factors = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9}
    if not number.isdecimal() or unit not in factors or int(number) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no size like 500M or 2G")
    return int(number) * factors[unit]


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

        tqdm.monitor_interval = 0  # no thread of its own
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


def _print_table(report: Report) -> None:
    print(
        f"{'tensor':<32} {'shape':<16} {'from':<9} {'to':<6} {'RMSE':>9} {'of RMS':>7} {'bytes':>12}", file=sys.stderr
    )
    for t in report.tensors:
        shape, lost = " x ".join(map(str, t.shape)), report.losses[t.name]
        origin = t.source.rpartition(" ")[2]
        note = f"  {t.note}" if t.note else ""
        print(
            f"{printable(t.name):<32} {shape:<16} {printable(origin):<9} {t.type:<6} {lost.rmse:>9.3g} "
            f"{lost.relative:>6.2%} {t.size:>12}{note}",
            file=sys.stderr,
        )


def _print_summary(report: Report) -> None:
    fallen = [t for t in report.tensors if t.note.startswith("rows of")]
    for kind in sorted({t.type for t in fallen}):
        these = [t for t in fallen if t.type == kind]
        count = f"{len(these)} tensor{'s' if len(these) > 1 else ''}"
        print(f"note: {count} kept in {kind}, e.g. {these[0].name}: {these[0].note}", file=sys.stderr)
    for note in report.notes:
        print(f"note: {printable(note)}", file=sys.stderr)
    files = f" and {len(report.paths) - 1} more" if len(report.paths) > 1 else ""
    worst = report.worst
    lost = f", largest loss {report.losses[worst.name].relative:.2%} in {printable(worst.name)}" if worst else ""
    print(
        f"{printable(str(report.path))}{files}: {report.size / 1e6:.1f} MB, {report.weights / 1e6:.2f} M weights, "
        f"{report.bits_per_weight:.2f} bits each, {report.seconds:.1f} s{lost}",
        file=sys.stderr,
    )


if __name__ == "__main__":
    sys.exit(main())
