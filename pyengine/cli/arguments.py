"""The command line of ``pyengine-run``: its options, what makes no sense together, and the prompt."""

from __future__ import annotations

import argparse
import contextlib
import os
import select
import stat
import sys
from pathlib import Path

from pyengine.cli.common import UsageError, check_utf8, read_utf8, say
from pyengine.cli.console import THINK
from pyengine.cli.models import MODEL_HELP
from pyengine.cli.options import add_sampler_options, sampler_settings
from pyengine.cli.sessions import check_name

NAME = "pyengine-run"


def build_parser() -> argparse.ArgumentParser:
    from pyengine import __version__

    parser = argparse.ArgumentParser(
        prog=NAME,
        usage=f"{NAME} [options] MODEL [PROMPT]   or   {NAME} [options] --demo [PROMPT]   or   {NAME} list|show|rm",
        description="Answers a prompt with a GGUF model, or chats when there is none. "
        "The answer goes to standard output, everything else to standard error.",
        epilog="Exit codes: 0 done, 1 model or machine, 2 usage, 3 context full, 130 interrupted.",
    )
    parser.add_argument("model", nargs="?", metavar="MODEL", help=MODEL_HELP)
    parser.add_argument("prompt", nargs="?", metavar="PROMPT", help="text to answer; piped input is put before it")
    parser.add_argument("--demo", action="store_true", help="use the small arithmetic model that comes with pyengine")
    parser.add_argument("--version", action="version", version=f"pyengine {__version__}")

    text = parser.add_argument_group("the prompt")
    text.add_argument(
        "-f", "--file", action="append", default=[], metavar="FILE", help="text to put before PROMPT; repeatable"
    )
    text.add_argument("--system", metavar="TEXT", help="system prompt")
    text.add_argument("--session", metavar="NAME", help="go on with the conversation of this name, and keep it")
    text.add_argument("--chat-template", metavar="FILE", help="a Jinja chat template instead of the model's")
    text.add_argument("--raw", action="store_true", help="no template: continue the prompt as it is")
    text.add_argument("--parse-special", action="store_true", help="with --raw: control tokens in the prompt count")
    text.add_argument("--override-kv", action="append", default=[], metavar="KEY=TYPE:VALUE", help=_OVERRIDE_HELP)

    answer = parser.add_argument_group("the answer")
    answer.add_argument(
        "-n", "--n-predict", type=int, default=-1, metavar="N", help="at most N tokens (default: no limit)"
    )
    answer.add_argument(
        "--stop", action="append", default=[], metavar="TEXT", help="end the answer before TEXT; repeatable"
    )
    answer.add_argument(
        "--think",
        choices=THINK,
        help="reasoning, on standard error: all of it, a dim line that follows it, or nothing "
        "(default: dim on a terminal, else hide)",
    )
    answer.add_argument("--think-budget", type=int, metavar="N", help="close the reasoning after N tokens")
    answer.add_argument(
        "--overflow",
        choices=("stop", "shift", "error"),
        default="stop",
        help="a chat longer than the context: end the answer (stop), drop the oldest turns (shift) or fail (error)",
    )
    answer.add_argument(
        "--loop-limit",
        type=int,
        metavar="N",
        help="end an answer that repeats itself word for word for N tokens; 0: never (default 512; with --raw 0)",
    )
    answer.add_argument("--json", action="store_true", help="print one JSON object at the end")
    answer.add_argument(
        "--stream-json",
        action="store_true",
        help="requests on standard input, events on standard output, one JSON object a line (docs/stream.md)",
    )
    answer.add_argument("-v", "--verbose", action="store_true", help="settings, notes and statistics on standard error")
    answer.add_argument("--no-history", action="store_true", help="a chat neither recalls nor keeps what you type")
    answer.add_argument("--debug", action="store_true", help="show tracebacks")

    engine = parser.add_argument_group("the engine")
    engine.add_argument(
        "-c", "--ctx-size", type=int, default=0, metavar="N", help="context (default: as memory allows)"
    )
    engine.add_argument("-t", "--threads", type=int, default=0, metavar="N", help="threads (default: physical cores)")
    engine.add_argument("--threads-prefill", type=int, default=0, metavar="N", help="threads for the prompt")
    engine.add_argument(
        "--kv-type",
        choices=("f16", "q8_0", "f32"),  # model.KV_TYPES, which would import numpy here
        default="f16",
        help="type of the KV cache (default f16; q8_0 takes half the memory)",
    )
    engine.add_argument("--copy", action="store_true", help="read the file into memory instead of mapping it")
    engine.add_argument("--rope-attn-scale", type=float, metavar="X", help="overrides YaRN's attention scale")
    engine.add_argument(
        "--speculate",
        choices=("ngram", "off"),
        help="guess what repeats and check it several tokens at a time; no effect on the text (default ngram)",
    )
    engine.add_argument("--draft", metavar="FILE", help="let a small model of the same vocabulary guess instead")
    add_sampler_options(parser)
    return parser


_OVERRIDE_HELP = "replace a value of the file; known: tokenizer.ggml.pre=str:NAME"


def check(args: argparse.Namespace) -> None:
    """Complains about impossible options before gigabytes are read. Errors: ``UsageError``."""
    sampler_settings(args, {})
    for option, texts in (("--system", [args.system]), ("--stop", args.stop)):
        for text in texts:
            if text is not None and not check_utf8(text, option):
                raise UsageError(f"{option} is empty")
    if args.raw and args.system is not None:
        raise UsageError("--raw uses no template, so there is no place for --system")
    if args.stream_json:
        for option, given in (("--json", args.json), ("--session", args.session), ("--system", args.system)):
            if given:
                raise UsageError(f"{option} and --stream-json exclude each other: requests say it themselves")
    if args.session is not None:
        check_name(args.session)
    if args.raw and (args.session is not None or args.overflow != "stop"):
        option = "--session" if args.session is not None else f"--overflow {args.overflow}"
        raise UsageError(f"{option} needs a conversation; --raw has none")
    if args.n_predict == 0 or args.n_predict < -1:
        raise UsageError(f"--n-predict is {args.n_predict}; expected at least 1, or -1 for no limit")
    if args.think_budget is not None and args.think_budget < 0:
        raise UsageError(f"--think-budget is {args.think_budget}; expected at least 0")
    if args.loop_limit is not None and args.loop_limit < 0:
        raise UsageError(f"--loop-limit is {args.loop_limit}; expected at least 1, or 0 for none")
    if args.draft is not None and args.speculate is not None:
        raise UsageError("--draft replaces --speculate: give one of them")
    if args.draft == "":
        raise UsageError("the name of the draft model is empty")


def model_path(args: argparse.Namespace) -> Path:
    """The file to open; with ``--demo`` the first positional argument is the prompt."""
    if not args.demo:
        if args.model is None:
            raise UsageError("which model? give a GGUF file, or --demo for the one that comes with pyengine")
        if not args.model:
            raise UsageError("the name of the model is empty")
        return Path(args.model)
    if args.prompt is not None:
        raise UsageError("--demo replaces MODEL: give at most a prompt")
    args.prompt = args.model  # the first positional argument is the prompt then
    from pyengine import demo_model_path

    return demo_model_path()


def read_prompt(args: argparse.Namespace) -> str | None:
    """Piped text, then files, then the argument; ``None`` when there is none of them, which means a chat."""
    if args.prompt == "-":
        args.prompt = None
    parts = []
    alone = args.prompt is None and not args.file
    if not sys.stdin.isatty() and (alone or _is_piped(sys.stdin.fileno())):
        _tell_when_waiting(sys.stdin.fileno())
        parts.append(read_utf8(sys.stdin.buffer.read(), "standard input"))
        if not alone and not parts[0].strip():
            parts.clear()
    parts += [read_utf8(Path(name).read_bytes(), name) for name in args.file]
    if not (args.raw and args.prompt is None and len(parts) == 1):  # raw text alone is taken to the last line break
        parts = [part.strip("\r\n") for part in parts]
    if args.prompt is not None:
        parts.append(check_utf8(args.prompt, "the prompt"))
    if parts and not "".join(parts).strip():
        raise UsageError("the prompt is empty")
    return "\n\n".join(parts) if parts else None


def _tell_when_waiting(descriptor: int) -> None:
    """A pipe that nobody writes to or closes looks like a hang otherwise."""
    with contextlib.suppress(OSError, ValueError):  # Windows cannot wait for a pipe
        if not select.select([descriptor], [], [], 2.0)[0]:
            say(f"{NAME}: waiting for text on standard input ('< /dev/null' if there is none)")


def _is_piped(descriptor: int) -> bool:
    """A pipe, socket or file, not /dev/null or the like: something is meant to be read."""
    mode = os.fstat(descriptor).st_mode
    return stat.S_ISFIFO(mode) or stat.S_ISREG(mode) or stat.S_ISSOCK(mode)
