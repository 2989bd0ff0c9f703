"""``pyengine-perplexity MODEL -f TEXT``: how well a model predicts a text. docs/quality.md is its manual."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import math
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from pyengine.cli.common import EXIT_OK, Progress, UsageError, in_background, run_command, use_utf8
from pyengine.cli.corpus import add_corpus_options, check_corpus_options, count_of, read_text
from pyengine.cli.models import MODEL_HELP, model_file

if TYPE_CHECKING:
    from pyengine.model import Model
    from pyengine.perplexity import Estimate, Report, Scores
    from pyengine.saved_logits import LogitsWriter, SavedLogits
    from pyengine.windows import Ids

NAME = "pyengine-perplexity"
_DEFAULT_CONTEXT = 512


def main(argv: list[str] | None = None) -> int:
    """The command; returns its exit code."""
    use_utf8()
    args = build_parser().parse_args(argv)
    return run_command(NAME, lambda: run(args), debug=args.debug)


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=NAME,
        description="Perplexity of a text: exp of the mean negative log likelihood of its tokens, over the second "
        "halves of consecutive windows. With --kl-divergence also how far the model is from another one.",
        epilog="Exit codes: 0 done, 1 model or machine, 2 usage, 130 interrupted.",
    )
    parser.add_argument("model", metavar="MODEL", help=MODEL_HELP)
    add_corpus_options(parser)
    parser.add_argument("--save-logits", metavar="FILE", help="save the logits, for others to be compared with")
    parser.add_argument(
        "--kl-divergence",
        metavar="FILE",
        help="compare with saved logits; the text and the windows are theirs, and checked where they are given too",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    return parser


def run(args: argparse.Namespace) -> int:
    from pyengine.files import check_target, replacing
    from pyengine.model import Model
    from pyengine.perplexity import report
    from pyengine.saved_logits import LogitsWriter, SavedLogits, file_size
    from pyengine.windows import LEAST_CONTEXT

    check_corpus_options(args, LEAST_CONTEXT)
    if args.file is None and args.kl_divergence is None:
        raise UsageError("which text? give -f TEXT, or --kl-divergence FILE, which holds one")
    text = read_text(args.file) if args.file is not None else None
    with contextlib.ExitStack() as stack:
        base = stack.enter_context(SavedLogits(args.kl_divergence)) if args.kl_divergence is not None else None
        if args.save_logits is not None:  # before the model is read
            check_target(Path(args.save_logits), force=args.force)
        model = stack.enter_context(Model.open(model_file(args.model), prefix_bytes=0))
        windows = _windows(args, model, text, base)
        save: LogitsWriter | None = None
        if args.save_logits is not None:
            check_target(Path(args.save_logits), force=args.force, size=file_size(model.n_vocab, windows))
            file = stack.enter_context(replacing(Path(args.save_logits)))
            save = LogitsWriter(file, model.n_vocab, windows, model.vocabulary)
        progress = Progress("window", len(windows))
        result = report(_evaluate(args, model, windows, base, save, progress))
        _print(args, result, windows, progress.seconds)  # before the file is finished: that may fail
    return EXIT_OK


def _windows(args: argparse.Namespace, model: Model, text: str | None, base: SavedLogits | None) -> Ids:
    from pyengine.windows import text_windows

    n_ctx = args.ctx or (base.n_ctx if base is not None else _DEFAULT_CONTEXT)
    if text is not None:
        windows = text_windows(model.tokenizer, text, n_ctx, args.chunks)
    elif base is not None:
        windows = base.windows[: args.chunks]
    if base is not None:
        if args.ctx and args.ctx != base.n_ctx:
            raise UsageError(f"--ctx is {args.ctx}; {args.kl_divergence} holds windows of {base.n_ctx} tokens")
        if text is not None and args.chunks is None:
            windows = windows[: base.n_windows]  # saved with --chunks
        base.check(model.n_vocab, model.vocabulary, windows)
    return windows


def _evaluate(
    args: argparse.Namespace,
    model: Model,
    windows: Ids,
    base: SavedLogits | None,
    save: LogitsWriter | None,
    progress: Progress,
) -> list[Scores]:
    from pyengine.perplexity import score

    scores = []
    total = 0.0
    with model.session(n_ctx=windows.shape[1], threads=args.threads, kv_type=args.kv_type) as session:
        items = in_background(score(session, windows, base=base, save=save), session.cancel)
        with contextlib.closing(items), progress:
            for window in items:
                scores.append(window)
                total += window.nll.mean()
                progress.advance(f", perplexity {math.exp(total / len(scores)):.4f}")
    return scores


def _print(args: argparse.Namespace, result: Report, windows: Ids, seconds: float) -> None:
    if args.json:
        run = {"model": args.model, "n_ctx": windows.shape[1], "kv_type": args.kv_type, "seconds": round(seconds, 3)}
        print(json.dumps(run | dataclasses.asdict(result), ensure_ascii=False, allow_nan=False))
        return
    lines = [("perplexity", _fixed(result.perplexity, 4))]
    if (d := result.divergence) is not None:
        lines += [
            ("base", _fixed(d.base, 4)),
            ("ratio", _fixed(d.ratio, 6)),
            ("mean KLD", f"{d.mean.value:.6g} ± {d.mean.error:.2g}"),
            ("median KLD", f"{d.median:.6g}"),
            ("90 % KLD", f"{d.p90:.6g}"),
            ("99 % KLD", f"{d.p99:.6g}"),
            ("99.9 % KLD", f"{d.p999:.6g}"),
            ("maximum KLD", f"{d.maximum:.6g}"),
            ("same top token", f"{100 * d.same_top.value:.3f} ± {100 * d.same_top.error:.2g} %"),
        ]
    for label, value in lines:
        print(f"{label:<14}  {value}")
    between = f"; between windows ± {result.between_windows:.2g}" if result.between_windows is not None else ""
    print(f"{count_of(windows)}, {result.positions} tokens scored{between}")


def _fixed(estimate: Estimate, digits: int) -> str:
    return f"{estimate.value:.{digits}f} ± {estimate.error:.{digits}f}"


if __name__ == "__main__":
    sys.exit(main())
