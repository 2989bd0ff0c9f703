"""``pyengine-run MODEL [PROMPT]``: an answer, or a chat. docs/generation.md is its manual."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import os
import re
import select
import stat
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pyengine.cli.common import (
    EXIT_CONTEXT,
    EXIT_INTERRUPTED,
    EXIT_OK,
    Interrupt,
    Status,
    UsageError,
    check_utf8,
    describe,
    in_background,
    printable,
    read_utf8,
    run_command,
    say,
    use_utf8,
)
from pyengine.cli.options import add_sampler_options, sampler_settings
from pyengine.errors import ContextFull, EngineError, UnsupportedError

if TYPE_CHECKING:
    from pyengine.chat import ChatTemplate
    from pyengine.generate import Chat, End, Event, Speculate
    from pyengine.model import Model, Session
    from pyengine.sampling import SamplerSettings

NAME = "pyengine-run"
_LEAST_CONTEXT = 4096  # what a session gets when memory is short or unknown
_HELP = """\
/clear   forget the conversation     /undo   take back your last message and its answer
/help    this list                   /bye    leave (also Ctrl-D)
Ctrl-C stops an answer; pressed again it leaves."""


def main(argv: list[str] | None = None) -> int:
    """The command; returns its exit code."""
    use_utf8()
    args = build_parser().parse_intermixed_args(argv)  # options may stand between MODEL and PROMPT
    return run_command(NAME, lambda: run(args), debug=args.debug)


def build_parser() -> argparse.ArgumentParser:
    from pyengine import __version__

    parser = argparse.ArgumentParser(
        prog=NAME,
        usage=f"{NAME} [options] MODEL [PROMPT]   or   {NAME} [options] --demo [PROMPT]",
        description="Answers a prompt with a GGUF model, or chats when there is none. "
        "The answer goes to standard output, everything else to standard error.",
        epilog="Exit codes: 0 done, 1 model or machine, 2 usage, 3 context full, 130 interrupted.",
    )
    parser.add_argument("model", nargs="?", metavar="MODEL", help="a GGUF file (the first part of a split one)")
    parser.add_argument("prompt", nargs="?", metavar="PROMPT", help="text to answer; piped input is put before it")
    parser.add_argument("--demo", action="store_true", help="use the small arithmetic model that comes with pyengine")
    parser.add_argument("--version", action="version", version=f"pyengine {__version__}")

    text = parser.add_argument_group("the prompt")
    text.add_argument("--system", metavar="TEXT", help="system prompt")
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
        "--think", choices=("show", "hide"), help="reasoning on standard error (default: on a terminal)"
    )
    answer.add_argument("--think-budget", type=int, metavar="N", help="close the reasoning after N tokens")
    answer.add_argument("--json", action="store_true", help="print one JSON object at the end")
    answer.add_argument("-v", "--verbose", action="store_true", help="settings, notes and statistics on standard error")
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


def run(args: argparse.Namespace) -> int:
    path = _model_path(args)
    sampler_settings(args, {})  # complain about options before reading gigabytes
    for option, texts in (("--system", [args.system]), ("--stop", args.stop)):
        for text in texts:
            if text is not None and not check_utf8(text, option):
                raise UsageError(f"{option} is empty")
    if args.raw and args.system is not None:
        raise UsageError("--raw uses no template, so there is no place for --system")
    prompt = _prompt(args)
    if prompt is None and (args.json or args.raw):
        raise UsageError(f"{'--json' if args.json else '--raw'} needs a prompt: as an argument or piped in")
    if args.n_predict == 0 or args.n_predict < -1:
        raise UsageError(f"--n-predict is {args.n_predict}; expected at least 1, or -1 for no limit")
    if args.think_budget is not None and args.think_budget < 0:
        raise UsageError(f"--think-budget is {args.think_budget}; expected at least 0")
    if args.draft is not None and args.speculate is not None:
        raise UsageError("--draft replaces --speculate: give one of them")
    if args.draft == "":
        raise UsageError("the name of the draft model is empty")
    with contextlib.ExitStack() as stack:
        model = stack.enter_context(_open_model(path, args))
        draft = stack.enter_context(_load(Path(args.draft), args)) if args.draft is not None else None
        return _Runner(args, model, draft).run(prompt)


def _model_path(args: argparse.Namespace) -> Path:
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


def _prompt(args: argparse.Namespace) -> str | None:
    """Piped text, then the argument; ``None`` when there is neither, which means a chat."""
    parts = []
    if args.prompt == "-":
        args.prompt = None
    if not sys.stdin.isatty() and (args.prompt is None or _is_piped(sys.stdin.fileno())):
        _tell_when_waiting(sys.stdin.fileno())
        piped = read_utf8(sys.stdin.buffer.read(), "standard input")
        if piped.strip() or args.prompt is None:
            parts.append(piped if args.raw and args.prompt is None else piped.strip("\r\n"))
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


def _open_model(path: Path, args: argparse.Namespace) -> Model:
    model = _load(path, args, rope_attn_scale=args.rope_attn_scale)
    if args.override_kv:
        from pyengine.tokenizer import Tokenizer

        model.tokenizer = Tokenizer.from_metadata(model.metadata, override=_pre_tokenizer(args.override_kv))
    return model


def _load(path: Path, args: argparse.Namespace, *, rope_attn_scale: float | None = None) -> Model:
    from pyengine.model import Model

    status, start = Status(), time.monotonic()

    def progress(done: float) -> None:
        if time.monotonic() - start > 0.5:
            status.show(f"loading {done:.0%}")

    try:  # with one session there is nobody to share beginnings with
        return Model.open(path, copy=args.copy, rope_attn_scale=rope_attn_scale, progress=progress, prefix_bytes=0)
    finally:
        status.clear()


def _pre_tokenizer(overrides: list[str]) -> str:
    match = re.fullmatch(r"tokenizer\.ggml\.pre=str:(.+)", overrides[-1])
    if match is None or len(overrides) > 1:
        raise UsageError("--override-kv: only tokenizer.ggml.pre=str:NAME can be replaced")
    return match[1]


class _Runner:
    """One run of the command, with the model open."""

    def __init__(self, args: argparse.Namespace, model: Model, draft: Model | None) -> None:
        from pyengine.reasoning import reasoning_profile

        self.args = args
        self.model = model
        self.no_template: EngineError | None = None
        self.template = self._template()
        self.profile = reasoning_profile(model.metadata, self.template.source if self.template else None)
        self.settings: SamplerSettings = sampler_settings(args, self.profile.sampling)
        self.session: Session = model.session(
            n_ctx=_context_size(model, args),
            threads=args.threads,
            threads_prefill=args.threads_prefill,
            kv_type=args.kv_type,
        )
        self.speculate: Speculate = args.speculate or "ngram"
        self.draft_session: Session | None = None
        if draft is not None:
            from pyengine.speculate import ModelDrafter

            size = min(self.session.n_ctx, draft.n_ctx_train)
            self.draft_session = draft.session(n_ctx=size, threads=args.threads, kv_type=args.kv_type)
            self.speculate = ModelDrafter(model, self.draft_session)
        self.max_tokens = None if args.n_predict < 0 else args.n_predict
        self.status = Status()
        self.display = _Display(self.status, show_reasoning=_show_reasoning(args), exact=args.raw)

    def run(self, prompt: str | None) -> int:
        if self.args.verbose:
            self._explain()
        if self.session.n_ctx > self.model.n_ctx_train:
            say(f"note: the model was made for {self.model.n_ctx_train} tokens; --ctx-size asks for more")
        with self.session, self.draft_session or contextlib.nullcontext():
            if self.no_template is not None and (prompt is None or self.args.system is not None):
                raise self.no_template
            if prompt is None:
                return self._converse(self._chat())
            if self.template is not None:
                return self._one_shot(lambda: self._chat().send(prompt))
            if not self.args.raw:
                say("note: the model has no chat template; the prompt is continued as plain text (--raw)")
            return self._one_shot(lambda: self._raw(prompt))

    def _template(self) -> ChatTemplate | None:
        """The user's, else the model's; none with --raw or where the model has none."""
        from pyengine.chat import BUILTIN_TEMPLATES, ChatTemplate

        if self.args.raw:
            return None
        override: str | None = self.args.chat_template
        if override is not None and override not in BUILTIN_TEMPLATES:
            path = Path(override)
            override = read_utf8(path.read_bytes(), str(path))
            if "{" not in override:
                raise UsageError(f"--chat-template: {path} is no Jinja template")
        try:
            return ChatTemplate.from_metadata(self.model.metadata, self.model.tokenizer, override=override)
        except UnsupportedError as error:
            if error.code != "no_chat_template":
                raise
            self.no_template = error
            return None

    def _explain(self) -> None:
        m, s = self.model, self.session
        say(
            f"model: {m.architecture}, {m.n_params / 1e6:.1f} M parameters, {m.weight_bytes / 2**20:.1f} MiB of weights"
        )
        say(f"session: context {s.n_ctx} of {m.n_ctx_train}, {s.threads} threads, KV {self.args.kv_type}")
        for note in m.notes:
            say(f"note: {note}")
        if self.template is not None:
            say(f"chat template: {self.template.origin}")
        for sentence in self.profile.evidence:
            say(sentence)
        shown = {f.name: getattr(self.settings, f.name) for f in dataclasses.fields(self.settings)}
        say("sampling: " + ", ".join(f"{name} {value!r}" for name, value in shown.items()))

    def _chat(self) -> Chat:
        from pyengine.generate import Chat

        return Chat(
            self.model,
            system=self.args.system,
            session=self.session,
            template=self.template,
            settings=self.settings,
            max_tokens=self.max_tokens,
            stop=self.args.stop,
            think_budget=self.args.think_budget,
            on_prefill=self._on_prefill,
            speculate=self.speculate,
        )

    def _raw(self, prompt: str) -> Iterator[Event]:
        from pyengine.generate import generate

        ids = self.model.tokenizer.encode(prompt, parse_special=self.args.parse_special)
        return generate(
            self.session,
            ids,
            self.settings,
            max_tokens=self.max_tokens,
            stop=self.args.stop,
            reasoning=False,
            on_prefill=self._on_prefill,
            speculate=self.speculate,
        )

    def _on_prefill(self, done: int, total: int) -> None:
        if done:
            self.status.show(f"reading {done} of {total} tokens")

    def _one_shot(self, start: Callable[[], Iterator[Event]]) -> int:
        collected = _Collected()
        show = collected.add if self.args.json else self.display.show
        end = self._answer(start(), show)
        if self.args.json:
            print(json.dumps(collected.report(end, self.settings), ensure_ascii=False))
        self._explain_end(end)
        if end.reason == "cancelled":
            say(f"{NAME}: interrupted; the answer is incomplete")
            return EXIT_INTERRUPTED
        return EXIT_CONTEXT if end.reason == "context" else EXIT_OK

    def _answer(self, events: Iterator[Event], show: Callable[[Event], None]) -> End:
        """Shows the events; Ctrl-C ends them, twice leaves the program."""
        from pyengine.generate import End

        stream = in_background(events, self.session.cancel)
        with Interrupt(self.session.cancel), contextlib.closing(stream):
            try:
                for event in stream:
                    show(event)
                    if isinstance(event, End):
                        return event
            finally:
                self.status.clear()
                self.display.finish()
        raise AssertionError("a generation always ends with End")

    def _explain_end(self, end: End) -> None:
        s = end.stats
        if end.reason == "context":
            say(
                f"{NAME}: the context of {s.context_size} tokens is full (prompt {s.prompt_tokens}, answer "
                f"{s.generated_tokens}): the answer is cut off; --ctx-size makes it larger"
            )
        if self.args.verbose:
            say(
                f"prompt: {s.prompt_tokens} tokens, {s.reused_tokens} reused, {s.prefill_rate:.1f} tokens/s; "
                f"answer: {s.generated_tokens} tokens ({s.reasoning_tokens} reasoning), {s.decode_rate:.1f} tokens/s; "
                f"context {s.context_used} of {s.context_size}; seed {s.seed}; end: {end.reason}"
            )
            if s.drafted_tokens:
                say(f"speculation: {s.accepted_tokens} of {s.drafted_tokens} guesses were right")

    def _converse(self, chat: Chat) -> int:
        if sys.stderr.isatty():
            say("/help lists the commands; Ctrl-D leaves")
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401 - gives input() line editing
        interrupts = 0  # since the last line
        while True:
            try:
                line = _read_line()
            except EOFError:
                say("")
                return EXIT_OK
            except KeyboardInterrupt:
                say("")
                if interrupts:
                    raise
                interrupts = 1
                say("(Ctrl-C again or Ctrl-D leaves)")
                continue
            except UsageError as error:
                say(f"{error}; nothing was sent")
                continue
            interrupts = 0
            if re.fullmatch(r"/\w+", line.strip()):
                if self._command(line.strip(), chat):
                    return EXIT_OK
            elif line.strip():
                interrupts = self._turn(chat, line)

    def _turn(self, chat: Chat, line: str) -> int:
        """One answer; a failure is told and the conversation goes on. Returns 1 when Ctrl-C ended it."""
        before = len(chat.messages)
        try:
            end = self._answer(chat.send(line), self.display.show)
        except ContextFull as error:
            say(f"{error.message}. Your message was taken back; /clear starts afresh")
            return 0
        except EngineError as error:
            say(f"error: {describe(error)}. Your message was taken back")
            return 0
        self._explain_end(end)
        stopped = end.reason == "cancelled"
        remarks = ["stopped"] * stopped
        remarks += ["your message was taken back, because no answer had begun"] * (len(chat.messages) == before)
        remarks += ["Ctrl-C again leaves"] * stopped
        if remarks:
            say(f"({'; '.join(remarks)})")
        return int(stopped)

    def _command(self, line: str, chat: Chat) -> bool:
        """Does a /command; True means leave."""
        if line in ("/bye", "/exit", "/quit"):
            return True
        if line == "/help":
            say(_HELP)
        elif line == "/clear":
            chat.clear()
            say("(a new conversation)")
        elif line == "/undo":
            say("(taken back)" if chat.undo() else "(nothing to take back)")
        else:
            say(f"unknown command {line}; /help lists them")
        return False


class _Display:
    """Shows events: the answer on stdout, reasoning on stderr, dimmed on a terminal.

    ``exact``: keeps the line breaks that an answer begins with.
    """

    def __init__(self, status: Status, *, show_reasoning: bool, exact: bool) -> None:
        self._status = status
        self._show_reasoning = show_reasoning
        self._exact = exact
        self._dim = sys.stderr.isatty() and not os.environ.get("NO_COLOR")
        self._clean = sys.stdout.isatty()
        self._reasoning_open = self._answer_open = False
        self._fresh_line = True  # of stdout

    def show(self, event: Event) -> None:
        from pyengine.generate import Reasoning, Text

        self._status.clear()
        if isinstance(event, Reasoning):
            if self._show_reasoning:
                self._open_reasoning()
                say(event.text, end="")
        elif isinstance(event, Text):
            self._close_reasoning()
            text = event.text if self._answer_open or self._exact else event.text.lstrip("\r\n")
            if text:
                self._answer_open = True
                self._fresh_line = text.endswith("\n")
                sys.stdout.write(printable(text) if self._clean else text)
                sys.stdout.flush()

    def finish(self) -> None:
        """The end of an answer, however it came: leaves both streams at the beginning of a line."""
        self._close_reasoning()
        self._answer_open = False
        if not self._fresh_line:
            self._fresh_line = True
            sys.stdout.write("\n")
            sys.stdout.flush()

    def _open_reasoning(self) -> None:
        if not self._reasoning_open and self._dim:
            _escape("\x1b[2m")
        self._reasoning_open = True

    def _close_reasoning(self) -> None:
        if self._reasoning_open:
            self._reasoning_open = False
            if self._dim:
                _escape("\x1b[0m")
            say("\n")


def _escape(code: str) -> None:
    with contextlib.suppress(OSError):
        sys.stderr.write(code)


class _Collected:
    """Everything of an answer, for ``--json``."""

    def __init__(self) -> None:
        self.events: list[Event] = []

    def add(self, event: Event) -> None:
        self.events.append(event)

    def report(self, end: End, settings: SamplerSettings) -> dict[str, Any]:
        from pyengine.generate import collect

        reply, s = collect(self.events), end.stats
        tokens = [token for event in self.events for token in event.tokens]
        report: dict[str, Any] = {
            "text": reply.text,
            "reasoning": reply.reasoning,
            "ids": [token.id for token in tokens],
            "finish_reason": end.reason,
            "stop": end.stop,
            "seed": s.seed,
            "usage": {
                "prompt_tokens": s.prompt_tokens,
                "reused_tokens": s.reused_tokens,
                "completion_tokens": s.generated_tokens,
                "reasoning_tokens": s.reasoning_tokens,
                "drafted_tokens": s.drafted_tokens,
                "accepted_tokens": s.accepted_tokens,
            },
            "timings": {
                "prefill_seconds": round(s.prefill_seconds, 6),
                "decode_seconds": round(s.decode_seconds, 6),
                "prefill_tokens_per_second": round(s.prefill_rate, 3),
                "decode_tokens_per_second": round(s.decode_rate, 3),
            },
        }
        if settings.top_logprobs is not None:
            report["logprobs"] = [
                {"id": t.id, "logprob": t.logprob, "top": [{"id": o.id, "logprob": o.logprob} for o in t.top_logprobs]}
                for t in tokens
            ]
        return report


def _read_line() -> str:
    """A line from the terminal. The prompt goes to stdout only where stdout is the terminal too."""
    if not sys.stdout.isatty():
        say(">>> ", end="")
    return check_utf8(input(">>> " if sys.stdout.isatty() else ""), "the line")


def _show_reasoning(args: argparse.Namespace) -> bool:
    return bool(sys.stderr.isatty() if args.think is None else args.think == "show")


def _context_size(model: Model, args: argparse.Namespace) -> int:
    """The user's; else the model's, halved until the cache fits into half of the memory that the weights leave."""
    if args.ctx_size:
        return int(args.ctx_size)
    from pyengine.memory import available_memory

    available = available_memory()
    spare = 0 if available is None else (available - model.weight_bytes) // 2
    size = model.n_ctx_train
    while size > _LEAST_CONTEXT:
        needed = model.session_bytes(n_ctx=size, threads=args.threads, kv_type=args.kv_type)
        if sum(needed) <= spare:
            return size
        size //= 2
    return min(model.n_ctx_train, _LEAST_CONTEXT)


if __name__ == "__main__":
    sys.exit(main())
