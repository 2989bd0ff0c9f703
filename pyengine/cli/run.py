"""``pyengine-run MODEL [PROMPT]``: an answer, or a chat. docs/generation.md is its manual.

The rest of the command: ``arguments`` (what may be given), ``setup`` (what is opened), ``console`` (what is drawn),
``terminal`` and ``commands`` (the conversation).
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from pyengine.cli import models
from pyengine.cli.arguments import NAME, build_parser, check, model_path, read_prompt
from pyengine.cli.common import EXIT_CONTEXT, EXIT_INTERRUPTED, EXIT_OK, UsageError, run_command, say, use_utf8
from pyengine.cli.console import Console, explain_end
from pyengine.cli.report import logprobs, shift_numbers, timings, usage
from pyengine.cli.setup import Setup

if TYPE_CHECKING:
    from pyengine.generate import End, Event
    from pyengine.sampling import SamplerSettings


def main(argv: list[str] | None = None) -> int:
    """The command; returns its exit code."""
    use_utf8()
    argv = sys.argv[1:] if argv is None else argv
    if argv and argv[0] in models.COMMANDS:
        return models.main(argv, NAME)
    args = build_parser().parse_intermixed_args(argv)  # options may stand between MODEL and PROMPT
    return run_command(NAME, lambda: run(args), debug=args.debug)


def run(args: argparse.Namespace) -> int:
    path = model_path(args)
    check(args)
    if args.stream_json:
        from pyengine.cli.stream import serve

        return serve(path, args, Setup)
    prompt = read_prompt(args)
    if prompt is None and (args.json or args.raw):
        raise UsageError(f"{'--json' if args.json else '--raw'} needs a prompt: as an argument or piped in")
    with Setup(path, args) as setup:
        if args.verbose:
            setup.explain()
        if setup.session.n_ctx > setup.model.n_ctx_train:
            say(f"note: the model was made for {setup.model.n_ctx_train} tokens; --ctx-size asks for more")
        needs_template = prompt is None or args.system is not None or args.session is not None
        if setup.no_template is not None and needs_template:
            raise setup.no_template
        console = Console(think=args.think, exact=args.raw)
        if prompt is None:
            from pyengine.cli.terminal import converse

            return converse(setup, console)
        if setup.template is not None:
            chat = setup.chat(console.reading)
            return _answer(setup, console, lambda: chat.send(prompt))
        if not args.raw:
            say("note: the model has no chat template; the prompt is continued as plain text (--raw)")
        return _answer(setup, console, lambda: setup.plain(prompt, console.reading))


def _answer(setup: Setup, console: Console, start: Callable[[], Iterator[Event]]) -> int:
    """One answer and no more; returns the exit code."""
    collected: list[Event] = []
    end = console.answer(start, setup.session.cancel, collected.append if setup.args.json else None)
    if setup.args.json:
        print(json.dumps(_report(collected, end, setup.settings), ensure_ascii=False))
    explain_end(end, verbose=setup.args.verbose)
    if end.reason == "cancelled":
        say(f"{NAME}: interrupted; the answer is incomplete")
        return EXIT_INTERRUPTED
    return EXIT_CONTEXT if end.reason == "context" else EXIT_OK


def _report(events: list[Event], end: End, settings: SamplerSettings) -> dict[str, Any]:
    """The object of ``--json``."""
    from pyengine.generate import Shifted, collect

    reply, s = collect(events), end.stats
    tokens = [token for event in events for token in event.tokens]
    report: dict[str, Any] = {
        "text": reply.text,
        "reasoning": reply.reasoning,
        "ids": [token.id for token in tokens],
        "finish_reason": end.reason,
        "stop": end.stop,
        "seed": s.seed,
        "usage": usage(s),
        "timings": timings(s),
    }
    shifts = [event for event in events if isinstance(event, Shifted)]
    if shifts:
        report["shifted"] = [shift_numbers(shift) for shift in shifts]
    if settings.top_logprobs is not None:
        report["logprobs"] = [logprobs(token) for token in tokens]
    return report


if __name__ == "__main__":
    sys.exit(main())
