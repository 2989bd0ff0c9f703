"""``pyengine-bench MODEL``: how fast a model runs here, beside the machine's limits. docs/bench.md is its manual."""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pyengine.cli.common import EXIT_OK, Status, UsageError, in_background, printable, run_command, use_utf8
from pyengine.cli.models import MODEL_HELP, model_file

if TYPE_CHECKING:
    from pyengine.model import Session

NAME = "pyengine-bench"


def main(argv: list[str] | None = None) -> int:
    """The command; returns its exit code."""
    use_utf8()
    args = build_parser().parse_args(argv)
    return run_command(NAME, lambda: run(args), debug=args.debug)


def build_parser() -> argparse.ArgumentParser:
    from pyengine.shape import CARDS

    parser = argparse.ArgumentParser(
        prog=NAME,
        description="Tokens a second of prompts and of generation, medians of interleaved rounds, and how near that is "
        "to what the machine can read and multiply.",
        epilog="Exit codes: 0 done, 1 file or machine, 2 usage, 130 interrupted.",
    )
    parser.add_argument("model", nargs="?", metavar="MODEL", help=MODEL_HELP)
    parser.add_argument(
        "--synthetic",
        metavar="CARD[:TYPE]",
        help=f"no file, but random weights of a card's shape, as in r1-distill-llama-8b:Q4_K_M; of {', '.join(CARDS)}",
    )
    parser.add_argument("--layers", type=int, metavar="N", help="with --synthetic: only so many of the card's layers")
    parser.add_argument("--folder", metavar="DIR", help="with --synthetic: where the temporary file goes")
    parser.add_argument("-p", "--prefill", metavar="LIST", default="512", help="tokens of the prompts; none: no prompt")
    parser.add_argument("-n", "--decode", type=int, default=32, metavar="N", help="tokens generated; 0: none")
    parser.add_argument(
        "-d", "--depth", metavar="LIST", default="0", help="tokens in the context before those, as in 0,4k"
    )
    parser.add_argument("-t", "--threads", metavar="LIST", default="0", help="as in 1,2,4; default: performance cores")
    parser.add_argument("--kv-type", metavar="LIST", default="f16", help="of f16, q8_0, f32 (default f16)")
    parser.add_argument("-r", "--rounds", type=int, default=5, metavar="N", help="each does all once (default 5)")
    parser.add_argument("--no-limits", action="store_true", help="do not measure the machine first (some two seconds)")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--markdown", action="store_true", help="print a Markdown table")
    parser.add_argument("--debug", action="store_true", help="show where an error came from")
    return parser


def run(args: argparse.Namespace) -> int:
    from pyengine.bench import Plan, bench, default_title
    from pyengine.model import KV_TYPES, Model

    if (args.model is None) == (args.synthetic is None):
        raise UsageError("give a GGUF file or --synthetic CARD[:TYPE]")
    if args.json and args.markdown:
        raise UsageError("--json or --markdown, not both")
    if args.synthetic is None and (args.layers is not None or args.folder is not None):
        raise UsageError("--layers and --folder belong to --synthetic")
    kv_types: Any = _words(args.kv_type)
    for kv in kv_types:
        if kv not in KV_TYPES:
            raise UsageError(f"--kv-type: {kv!r} is none of {', '.join(KV_TYPES)}")
    plan = Plan(
        prefill=() if args.prefill == "none" else _numbers("--prefill", args.prefill),
        decode=args.decode,
        depths=_numbers("--depth", args.depth),
        threads=_numbers("--threads", args.threads),
        kv_types=kv_types,
        rounds=args.rounds,
    )
    status = Status()
    with ExitStack() as stack:
        path, what = _model(args, stack, status)
        model = stack.enter_context(Model.open(path, tokenizer_ahead=False))
        stack.callback(status.clear)
        sessions: list[Session] = []
        measured = (
            bench(
                model,
                plan,
                default_title(printable(what), plan.rounds),
                limits=not args.no_limits,
                on_round=lambda i, n, name: status.show(f"round {i} of {n}: {name}"),
                on_session=sessions.append,
            )
            for _ in range(1)
        )
        # In another thread, so that Ctrl-C is seen at once even while a long prompt is read.
        report = next(in_background(measured, lambda: _cancel(sessions)))
        status.clear()
    print(json.dumps(report.json()) if args.json else "\n".join(report.lines(args.markdown)))
    return EXIT_OK


def _cancel(sessions: list[Session]) -> None:
    for session in sessions:
        session.cancel()


def _model(args: argparse.Namespace, stack: ExitStack, status: Status) -> tuple[Path, str]:
    """The file to measure, a temporary one of random weights where that was asked for, and what to call it."""
    if args.synthetic is None:
        path = model_file(args.model)
        return path, path.name
    from pyengine import synthetic
    from pyengine.shape import find_card

    card, _, kind = args.synthetic.partition(":")
    shape = find_card(card)
    kind = kind or "Q4_K_M"
    if args.layers is not None:
        if not 1 <= args.layers <= shape.layers:
            raise UsageError(f"--layers is {args.layers}; expected 1..{shape.layers}")
        shape = dataclasses.replace(shape, layers=args.layers)
    table = synthetic.table(shape, kind)

    def progress(done: int, total: int) -> None:
        if done >= total:
            status.show("waiting for the disk")
        elif done % (64 << 20) < (4 << 20):
            status.show(f"writing random weights: {done / 2**30:.1f} of {total / 2**30:.1f} GiB")

    path = stack.enter_context(synthetic.temporary(shape, table, args.folder, progress))
    layers = f", {args.layers} layers" if args.layers is not None else ""
    return path, f"random weights of {card.lower()}, {kind.upper()}{layers}"


def _words(text: str) -> tuple[str, ...]:
    return tuple(dict.fromkeys(part.strip() for part in text.split(",") if part.strip()))


def _numbers(option: str, text: str) -> tuple[int, ...]:
    numbers = []
    for word in _words(text):
        digits, factor = (word[:-1], 1024) if word[-1] in "kK" else (word, 1)
        if not digits.isdecimal() or len(digits) > 9:
            raise UsageError(f"{option}: {word!r} is no number; expected such as 512 or 4k")
        numbers.append(int(digits) * factor)
    if not numbers:
        raise UsageError(f"{option} is empty")
    return tuple(dict.fromkeys(numbers))


if __name__ == "__main__":
    sys.exit(main())
