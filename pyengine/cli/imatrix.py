"""``pyengine-imatrix MODEL -f TEXT -o FILE``: an importance matrix for quantisers. docs/quality.md is its manual."""

from __future__ import annotations

import argparse
import contextlib
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from pyengine.cli.common import EXIT_OK, Progress, UsageError, duration, in_background, run_command, say, use_utf8
from pyengine.cli.corpus import add_corpus_options, check_corpus_options, count_of, read_text
from pyengine.cli.models import MODEL_HELP, model_file

if TYPE_CHECKING:
    from pyengine.imatrix import ImportanceMatrix

NAME = "pyengine-imatrix"
_DEFAULT_CONTEXT = 512


def main(argv: list[str] | None = None) -> int:
    """The command; returns its exit code."""
    use_utf8()
    args = build_parser().parse_args(argv)
    return run_command(NAME, lambda: run(args), debug=args.debug)


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=NAME,
        usage=f"{NAME} [options] MODEL -f TEXT -o FILE   or   {NAME} --in-file A --in-file B ... -o FILE",
        description="Importance matrix of a model: the squares of what each matrix is multiplied with, added up over a "
        "text, column by column. The file is the GGUF form that llama.cpp reads, too.",
        epilog="Exit codes: 0 done, 1 model or machine, 2 usage, 130 interrupted.",
    )
    parser.add_argument("model", nargs="?", metavar="MODEL", help=MODEL_HELP)
    add_corpus_options(parser)
    parser.add_argument("-o", "--out", required=True, metavar="FILE", help="the file to write, for example m.gguf")
    parser.add_argument(
        "--in-file", action="append", default=[], metavar="FILE", help="add an importance matrix to it; repeatable"
    )
    parser.add_argument("--process-output", action="store_true", help="of the matrix of the logits, too")
    parser.add_argument("--save-every", type=int, default=0, metavar="N", help="write FILE after every N windows, too")
    return parser


def run(args: argparse.Namespace) -> int:
    from pyengine.files import check_target
    from pyengine.imatrix import ImportanceMatrix

    check_corpus_options(args, 1)
    if args.save_every < 0:
        raise UsageError(f"--save-every is {args.save_every}; expected at least 0")
    if (args.model is None) != (args.file is None):
        raise UsageError("MODEL and -f TEXT belong together: a model runs over a text")
    if args.model is None and not args.in_file:
        raise UsageError("what of? give MODEL -f TEXT, or --in-file FILE for every matrix to merge")
    out = Path(args.out)
    check_target(out, force=args.force)
    given = [ImportanceMatrix.read(path) for path in args.in_file]
    size = args.ctx or (given[0].chunk_size if args.model is None else _DEFAULT_CONTEXT)
    matrix = ImportanceMatrix(size)
    for other in given:
        matrix.merge(other)
    what = f"{len(given)} files merged" if args.model is None else _collect(args, matrix, out)
    matrix.write(out)
    say(f"{out}: {len(matrix.entries)} matrices, {what}")
    return EXIT_OK


def _collect(args: argparse.Namespace, matrix: ImportanceMatrix, out: Path) -> str:
    """Adds the text's sums; returns what to say about it."""
    from pyengine.imatrix import ImportanceMatrix, collect
    from pyengine.model import Model
    from pyengine.windows import text_windows

    text = read_text(args.file)
    matrix.datasets.append("standard input" if args.file == "-" else args.file)
    with Model.open(model_file(args.model), prefix_bytes=0) as model:
        windows = text_windows(model.tokenizer, text, matrix.chunk_size, args.chunks)
        total = matrix.chunk_count + len(windows)
        progress = Progress("window", len(windows))
        saving = False  # whether the file may be ours
        with model.session(n_ctx=matrix.chunk_size, threads=args.threads, kv_type=args.kv_type) as session:
            items = in_background(collect(session, windows, output=args.process_output), session.cancel)
            try:
                with contextlib.closing(items), progress:
                    for done, entries in enumerate(items, 1):
                        for name, entry in entries.items():
                            matrix.add(name, entry)
                        progress.advance()
                        if args.save_every and done % args.save_every == 0:
                            saving = True
                            matrix.write(out)
            except BaseException:
                if saving and out.exists():  # which of two saves it is, only the file knows
                    say(f"{out}: {ImportanceMatrix.read(out).chunk_count} of {total} windows were saved")
                raise
    return f"{count_of(windows)}, {duration(progress.seconds)}"


if __name__ == "__main__":
    sys.exit(main())
