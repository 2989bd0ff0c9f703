"""``pyengine-doctor [MODEL]``: is this machine in order, and what would be slow. docs/doctor.md is its manual."""

from __future__ import annotations

import argparse
import json
import sys
import textwrap

from pyengine.cli.common import EXIT_ERROR, EXIT_OK, Status, printable, run_command, use_utf8
from pyengine.cli.models import MODEL_HELP, model_file

NAME = "pyengine-doctor"


def main(argv: list[str] | None = None) -> int:
    """The command; returns its exit code."""
    use_utf8()
    args = build_parser().parse_args(argv)
    return run_command(NAME, lambda: run(args), debug=args.debug)


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=NAME,
        description="Compares this machine's kernels with the specification, measures memory and arithmetic, shows how "
        "a model's prompt begins, and says what would be slow and why.",
        epilog="Exit codes: 0 in order, 1 a check failed (or the file could not be opened), 2 usage, 130 interrupted.",
    )
    parser.add_argument("model", nargs="?", metavar="MODEL", help=f"to look at, too: {MODEL_HELP}")
    parser.add_argument("--no-speed", action="store_true", help="checks alone: measure nothing (saves some seconds)")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--debug", action="store_true", help="show where an error came from")
    return parser


def run(args: argparse.Namespace) -> int:
    from pyengine.doctor import diagnose, lines, report

    path = None if args.model is None else model_file(args.model)
    status = Status()
    try:
        found = diagnose(path, speed=not args.no_speed, tell=status.show)
    finally:
        status.clear()
    if args.json:
        print(json.dumps(report(found), ensure_ascii=False))
    else:
        for line in lines(found):
            indent = "  " if line.startswith(("- ", "  ")) else " " * 19  # below what stands in the second column
            for part in textwrap.wrap(printable(line), 100, subsequent_indent=indent) or [""]:
                print(part)
    return EXIT_OK if found.healthy else EXIT_ERROR


if __name__ == "__main__":
    sys.exit(main())
