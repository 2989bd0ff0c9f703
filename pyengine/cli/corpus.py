"""What the commands share that run a model over a text: their options, the text."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from pyengine.cli.common import UsageError, read_utf8

if TYPE_CHECKING:
    from pyengine.windows import Ids


def add_corpus_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("-f", "--file", metavar="TEXT", help="the text, UTF-8; - reads standard input")
    parser.add_argument("-c", "--ctx", type=int, metavar="N", help="tokens of a window (default 512)")
    parser.add_argument("--chunks", type=int, metavar="N", help="at most N windows (default: the whole text)")
    parser.add_argument("-t", "--threads", type=int, default=0, metavar="N", help="threads (default: physical cores)")
    parser.add_argument(
        "--kv-type",
        choices=("f16", "q8_0", "f32"),  # model.KV_TYPES, which would import numpy here
        default="f16",
        help="type of the KV cache (default f16)",
    )
    parser.add_argument("--force", action="store_true", help="replace a file that exists")
    parser.add_argument("--debug", action="store_true", help="show tracebacks")


def check_corpus_options(args: argparse.Namespace, least: int) -> None:
    """Complains about numbers before gigabytes are read; ``least``: tokens a window must have."""
    for option, low in (("ctx", least), ("chunks", 1), ("threads", 0)):
        value = getattr(args, option)
        if value is not None and value < low:
            raise UsageError(f"--{option} is {value}; expected at least {low}")


def read_text(name: str) -> str:
    """The text without one newline at its end, as llama.cpp's tools read it."""
    data = sys.stdin.buffer.read() if name == "-" else Path(name).read_bytes()
    return read_utf8(data, "standard input" if name == "-" else name).removesuffix("\n")


def count_of(windows: Ids) -> str:
    count, n_ctx = windows.shape
    return f"{count} window{'s' * (count != 1)} of {n_ctx} tokens"
