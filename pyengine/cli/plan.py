"""``pyengine-plan MODEL``: will it fit, and how fast. docs/planning.md is its manual."""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pyengine.cli.common import EXIT_OK, UsageError, printable, run_command, use_utf8
from pyengine.cli.models import model_outline

if TYPE_CHECKING:
    from pyengine.model import KvType
    from pyengine.planner import Cell, Plan

NAME = "pyengine-plan"
_MARKS = {"fits": " ", "tight": "~", "no": "!"}
_COLOURS = {"fits": "32", "tight": "33", "no": "31"}
_UNITS = {"": 30, "M": 20, "G": 30, "T": 40}
_WIDTH = 80


def main(argv: list[str] | None = None) -> int:
    """The command; returns its exit code."""
    use_utf8()
    args = build_parser().parse_args(argv)
    return run_command(NAME, lambda: run(args), debug=args.debug)


def build_parser() -> argparse.ArgumentParser:
    from pyengine.recipe import RECIPES
    from pyengine.shape import CARDS

    parser = argparse.ArgumentParser(
        prog=NAME,
        description="Memory and speed of a model, quantisation by context, before it is downloaded or opened. "
        f"Built-in cards: {', '.join(CARDS)}.",
        epilog="Exit codes: 0 done (whatever fits or not), 1 file or machine, 2 usage, 130 interrupted.",
    )
    parser.add_argument(
        "model", metavar="MODEL", help="a GGUF file, a config.json or its folder, a card, or hf:org/repo[:Q4_K_M]"
    )
    parser.add_argument(
        "--ram", metavar="SIZE", help="for a machine of so much memory, as in 16G; default: this one, now"
    )
    parser.add_argument("-c", "--contexts", metavar="LIST", help="tokens, as in 4k,63k (k = 1024; default 1k ... 128k)")
    parser.add_argument("-q", "--quantisations", metavar="LIST", help=f"of {', '.join(RECIPES)}")
    parser.add_argument("--kv-type", metavar="LIST", help="of f16, q8_0, f32 (default f16,q8_0)")
    parser.add_argument("-t", "--threads", type=int, default=0, metavar="N", help="default: one per usable core")
    parser.add_argument("--no-speed", action="store_true", help="do not measure this machine (some five seconds)")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--plot", metavar="FILE", help="also draw the table: .svg, or .png (needs matplotlib)")
    parser.add_argument("--force", action="store_true", help="--plot may replace a file")
    parser.add_argument("--debug", action="store_true", help="show where an error came from")
    return parser


def run(args: argparse.Namespace) -> int:
    from pyengine.planner import plan

    kv_types: Any = _list(args.kv_type)
    if args.plot is not None:  # before anything is measured
        from pyengine.files import check_target
        from pyengine.heatmap import check_format

        check_format(Path(args.plot))
        check_target(Path(args.plot), force=args.force)
    contexts = [_tokens(c) for c in _list(args.contexts) or []] or None
    ram = None if args.ram is None else _bytes(args.ram)
    with model_outline(args.model) as model:
        result = plan(
            model,
            quantisations=_list(args.quantisations),
            contexts=contexts,
            kv_types=kv_types,
            ram=ram,
            threads=args.threads,
            speed=not args.no_speed and args.ram is None,
        )
    if args.plot is not None:
        from pyengine.heatmap import save

        save(result, Path(args.plot))
    print(json.dumps(report(result), ensure_ascii=False) if args.json else "\n".join(lines(result, _colour())))
    return EXIT_OK


def _list(text: str | None) -> list[str] | None:
    return None if text is None else [part.strip() for part in text.split(",") if part.strip()]


def _tokens(text: str) -> int:
    match = re.fullmatch(r"(\d{1,9})(k?)", text, re.IGNORECASE)
    if not match:
        raise UsageError(f"--contexts: {text!r} is no number of tokens; expected such as 4096 or 4k")
    return int(match[1]) * (1024 if match[2] else 1)


def _bytes(text: str) -> int:
    match = re.fullmatch(r"(\d{1,6}(?:\.\d{1,3})?)\s*([MGT]?)(?:i?B)?", text, re.IGNORECASE)
    if not match:
        raise UsageError(f"--ram: {text!r} is no size; expected such as 16G")
    return int(float(match[1]) * 2 ** _UNITS[match[2].upper()])


def _colour() -> bool:
    return sys.stdout.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"


def report(p: Plan) -> dict[str, Any]:
    """What ``--json`` prints: sizes in bytes, speeds in tokens a second."""
    values = dataclasses.asdict(p)
    for cell, value in zip(p.cells, values["cells"], strict=True):
        value["memory"]["total"] = cell.memory.total
    return values


def lines(p: Plan, colour: bool = False) -> list[str]:
    """The plan as text of at most 80 columns."""
    from pyengine.planner import SYSTEM_BYTES, gib

    s = p.shape
    billions = sum(row.weights * 8 / row.bits for row in p.rows[:1]) / 1e9
    out = [
        _bold(printable(s.name), colour),
        f"{s.arch}, {s.layers} layers, {s.heads} heads, {s.kv_heads} for keys and values, of {s.head_dim}; "
        f"{billions:.2f} B weights",
    ]
    if p.ram is None:
        out.append(f"against {gib(p.available)} GiB available here now")
    else:
        out.append(
            f"against {gib(p.available)} GiB: a machine of {gib(p.ram)} without {gib(SYSTEM_BYTES)} for its system"
        )
    for kv in p.kv_types:
        out += ["", *_memory(p, kv, colour)]
    out += ["", *_split(p)]
    out += ["", *_machines(p)]
    if p.speed is not None:
        out += ["", *_speeds(p)]
    out.append("")
    for sentence in p.advice:
        out += _wrapped(sentence)
    return out


def _memory(p: Plan, kv: KvType, colour: bool) -> list[str]:
    from pyengine.planner import tokens

    out = [_bold(f"Memory in GiB, KV cache {kv}", colour) + "   (~ tight, ! does not fit)", _head(p, "most")]
    for row in p.rows:
        cells = [c for c in p.cells if c.quantisation == row.quantisation and c.kv_type == kv]
        line = "".join(_painted(c, colour) for c in cells)
        most = tokens(row.largest[kv]) if row.largest[kv] else "-"
        out.append(f"{row.quantisation:<10}{line}{most:>7}")
    return out


def _head(p: Plan, last: str = "") -> str:
    from pyengine.planner import tokens

    return f"{'':<10}" + "".join(f"{tokens(c):>7} " for c in p.contexts) + f"{last:>7}".rstrip()


def _painted(cell: Cell, colour: bool) -> str:
    text = f"{cell.memory.total / 2**30:7.1f}{_MARKS[cell.verdict]}"
    return f"\x1b[{_COLOURS[cell.verdict]}m{text}\x1b[0m" if colour else text


def _bold(text: str, colour: bool) -> str:
    return f"\x1b[1m{text}\x1b[0m" if colour else text


def _split(p: Plan) -> list[str]:
    """Where the memory goes: weights by quantisation, the rest by context."""
    from pyengine.planner import gib

    by_context = {kv: [p.cell(p.rows[0].quantisation, c, kv).memory for c in p.contexts] for kv in p.kv_types}
    first = by_context[p.kv_types[0]]
    rows = [(f"KV {kv}", [gib(m.kv) for m in by_context[kv]]) for kv in p.kv_types]
    rows += [("scratch", [gib(m.scratch) for m in first]), ("process", [gib(m.process) for m in first])]
    out = ["Of which in GiB, beside the weights", _head(p).rstrip()]
    out += [f"{name:<10}" + "".join(f"{v:>7} " for v in values).rstrip() for name, values in rows]
    weights = ", ".join(f"{r.quantisation} {gib(r.weights)} ({r.bits:.2f} bits)" for r in p.rows)
    return [*out, *_wrapped(f"Weights, mapped from the file: {weights}")]


def _machines(p: Plan) -> list[str]:
    out = [f"Smallest common machine, GiB of memory, KV cache {p.kv_types[0]}", _head(p).rstrip()]
    for row in p.rows:
        found = [p.cell(row.quantisation, c, p.kv_types[0]).machine for c in p.contexts]
        out.append(f"{row.quantisation:<10}" + "".join(f"{m or '-':>7} " for m in found).rstrip())
    return out


def _speeds(p: Plan) -> list[str]:

    speed, kv = p.speed, p.kv_types[0]
    assert speed is not None
    out = [
        f"Tokens a second here, decode with so much in a {kv} cache, and prefill",
        _head(p, "prefill"),
    ]
    for row in p.rows:
        rates = [p.cell(row.quantisation, c, kv).decode or 0.0 for c in p.contexts]
        out.append(
            f"{row.quantisation:<10}" + "".join(f"{_three(r):>7} " for r in rates) + f"{_three(row.prefill or 0.0):>7}"
        )
    best = max(speed.stream, key=lambda name: speed.stream[name])
    return [
        *out,
        *_wrapped(
            f"Forecast from this machine's kernels ({speed.tier}, {speed.threads} threads): weights are read at up to "
            f"{speed.bandwidth / 1e9:.1f} GB/s ({best})"
        ),
    ]


def _three(value: float) -> str:
    """Three digits."""
    return f"{value:.0f}" if value >= 99.5 else f"{value:.1f}" if value >= 9.95 else f"{value:.2f}"


def _wrapped(text: str) -> list[str]:
    import textwrap

    return textwrap.wrap(text, _WIDTH, subsequent_indent="  ")


if __name__ == "__main__":
    sys.exit(main())
