"""From the command line of ``pyengine-run`` to an open model, a session, and what answers a prompt."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Self

from pyengine.cli.common import Status, UsageError, duration, read_utf8, say
from pyengine.cli.models import model_file
from pyengine.cli.options import sampler_settings
from pyengine.cli.sessions import NamedSession
from pyengine.errors import EngineError, UnsupportedError

if TYPE_CHECKING:
    from pyengine.chat import ChatTemplate
    from pyengine.generate import Chat, Event, Speculate
    from pyengine.model import Model, Session
    from pyengine.sampling import SamplerSettings

_LEAST_CONTEXT = 4096  # what a session gets when memory is short or unknown
_LOOP_LIMIT = 512  # the default of --loop-limit
_PREFIX_BYTES = 256 << 20
OnPrefill = Callable[[int, int], object]


class Setup:
    """An open model with all that the command line says about using it. A context manager, which closes it.

    Attributes:
        args: the parsed options.
        path, model, session: what answers.
        template: the user's, else the model's; None with ``--raw`` or where there is none (``no_template`` says why).
        settings: how tokens are chosen.
    """

    def __init__(self, path: Path, args: argparse.Namespace) -> None:
        from pyengine.reasoning import reasoning_profile

        self.path = path = model_file(path)
        self.args = args
        self.no_template: EngineError | None = None
        with contextlib.ExitStack() as stack:
            self.model = stack.enter_context(_open_model(path, args))
            draft = stack.enter_context(_load(model_file(args.draft), args)) if args.draft is not None else None
            self.template = self._template()
            self.profile = reasoning_profile(self.model.metadata, self.template.source if self.template else None)
            self.settings: SamplerSettings = sampler_settings(args, self.profile.sampling)
            self.session: Session = stack.enter_context(
                self.model.session(
                    n_ctx=_context_size(self.model, args),
                    threads=args.threads,
                    threads_prefill=args.threads_prefill,
                    kv_type=args.kv_type,
                )
            )
            self.speculate: Speculate = args.speculate or "ngram"
            if draft is not None:
                from pyengine.speculate import ModelDrafter

                size = min(self.session.n_ctx, draft.n_ctx_train)
                small = stack.enter_context(draft.session(n_ctx=size, threads=args.threads, kv_type=args.kv_type))
                self.speculate = ModelDrafter(self.model, small)
            self._stack = stack.pop_all()
        self.max_tokens = None if args.n_predict < 0 else args.n_predict
        loop_limit = args.loop_limit if args.loop_limit is not None else 0 if args.raw else _LOOP_LIMIT
        self.loop_limit = loop_limit or None

    def _template(self) -> ChatTemplate | None:
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

    def chat(self, on_prefill: OnPrefill) -> Chat:
        """A conversation in the session; with ``--session`` the one of that name."""
        from pyengine.generate import Chat

        chat = Chat(
            self.model,
            system=self.args.system,
            session=self.session,
            template=self.template,
            settings=self.settings,
            max_tokens=self.max_tokens,
            stop=self.args.stop,
            think_budget=self.args.think_budget,
            loop_limit=self.loop_limit,
            on_prefill=on_prefill,
            speculate=self.speculate,
            overflow=self.args.overflow,
        )
        if self.args.session is not None:
            self._stack.enter_context(NamedSession(chat, self.args))
        return chat

    def plain(self, prompt: str, on_prefill: OnPrefill) -> Iterator[Event]:
        """Continues ``prompt`` as it is."""
        from pyengine.generate import generate

        ids = self.model.tokenizer.encode(prompt, parse_special=self.args.parse_special)
        return generate(
            self.session,
            ids,
            self.settings,
            max_tokens=self.max_tokens,
            stop=self.args.stop,
            reasoning=False,
            loop_limit=self.loop_limit,
            on_prefill=on_prefill,
            speculate=self.speculate,
        )

    def explain(self) -> None:
        """What was opened and how it will be used, on stderr (``--verbose``)."""
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

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self._stack.close()


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
        seconds = time.monotonic() - start
        if seconds > 0.5:
            left = f", {duration(seconds / done * (1.0 - done))} left" if done > 0 else ""
            status.show(f"loading {path.name}: {done:.0%}{left}")

    try:
        return Model.open(
            path,
            copy=args.copy,
            rope_attn_scale=rope_attn_scale,
            progress=progress,
            prefix_bytes=_PREFIX_BYTES if args.stream_json else 0,  # a host may go to and fro between conversations
        )
    finally:
        status.clear()


def _pre_tokenizer(overrides: list[str]) -> str:
    match = re.fullmatch(r"tokenizer\.ggml\.pre=str:(.+)", overrides[-1])
    if match is None or len(overrides) > 1:
        raise UsageError("--override-kv: only tokenizer.ggml.pre=str:NAME can be replaced")
    return match[1]


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
