"""Text out of a session: :func:`generate` yields typed events, :class:`Chat` keeps a conversation.

>>> for event in generate(session, "Once upon a time", max_tokens=20):
...     match event:
...         case Text(text):
...             print(text, end="", flush=True)
...         case End(reason, stats):
...             print(f"\\n[{reason}, {stats.decode_rate:.1f} tokens/s]")
"""

from __future__ import annotations

import functools
import time
from array import array
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any, Literal, Protocol, Self

from pyengine.errors import Cancelled, ContextFull, EngineError, InvalidArgument
from pyengine.events import End as End
from pyengine.events import EndReason
from pyengine.events import Event as Event
from pyengine.events import Reasoning as Reasoning
from pyengine.events import Reply as Reply
from pyengine.events import Shifted as Shifted
from pyengine.events import Stats as Stats
from pyengine.events import Text as Text
from pyengine.events import collect as collect
from pyengine.loops import LoopDetector
from pyengine.output import Output, OutputTokenizer
from pyengine.overflow import Turn, overflowed
from pyengine.reasoning import reasoning_profile
from pyengine.sampling import Sampler, SampleResult, SamplerSettings
from pyengine.speculate import Drafter, Lookahead, LookaheadSession, ModelDrafter, NgramDrafter
from pyengine.threads import Task

if TYPE_CHECKING:
    from pyengine.chat import ChatTemplate, PromptIds
    from pyengine.model import Model, Session

THINK_CLOSE = "\n</think>\n\n"
"""What a thinking budget writes when it is used up."""
_PREFILL_SLICE = 256  # tokens between two reports of progress


# ---- what generate needs of others ----


class GenerationTokenizer(OutputTokenizer, Protocol):
    """The part of :class:`pyengine.tokenizer.Tokenizer` used here."""

    n_vocab: int

    @property
    def eog_ids(self) -> frozenset[int]: ...
    def encode(self, text: str, /, *, add_special: bool = ..., parse_special: bool = ...) -> Sequence[int]: ...
    def token_bytes(self, token: int, /) -> bytes: ...


class GenerationSession(LookaheadSession, Protocol):
    """The part of :class:`pyengine.model.Session` used here."""

    def prefill(self, tokens: Sequence[int], /) -> None: ...
    def reuse(self, tokens: Sequence[int], /) -> int: ...
    def clear_cancel(self) -> None: ...


# ---- generation ----

Speculate = Literal["ngram", "off"] | Drafter
Shorten = Callable[[int], tuple[Sequence[int], int] | None]
"""Given the tokens of the answer so far: a shorter prompt and how many messages it lacks; None: there is none."""


def generate(
    session: GenerationSession,
    prompt: str | Sequence[int],
    settings: SamplerSettings | None = None,
    *,
    tokenizer: GenerationTokenizer | None = None,
    max_tokens: int | None = None,
    stop: Sequence[str] = (),
    reasoning: bool = True,
    starts_in_reasoning: bool = False,
    think_budget: int | None = None,
    loop_limit: int | None = None,
    on_prefill: Callable[[int, int], object] | None = None,
    speculate: Speculate = "ngram",
    shorten: Shorten | None = None,
) -> Iterator[Event]:
    """Continues a prompt; yields :class:`Reasoning` and :class:`Text` pieces and, last, one :class:`End`.

    What the session already holds of the prompt is reused. ``session.cancel()`` from any thread ends the stream with
    ``End("cancelled")``; closing the iterator early is fine too.

    Args:
        session: evaluates the tokens; it holds prompt and answer afterwards.
        prompt: token ids, or plain text (markers in it stay text).
        settings: how to choose tokens.
        tokenizer: by default the session's model's.
        max_tokens: end after so many, >= 1; ``None``: until the model or the context ends.
        stop: strings that end the answer and are cut from it. They are not looked for in the reasoning.
        reasoning: whether to tell reasoning from answer; ``False`` makes everything :class:`Text`.
        starts_in_reasoning: the prompt ends inside a reasoning section (``<think>`` opened by the template).
        think_budget: after so many tokens of reasoning, close it and let the model answer; ``None``: no limit.
        loop_limit: end an answer that repeats one passage, token for token, for so many tokens and at least three
            times in a row (:class:`pyengine.loops.LoopDetector`), or close such a thought and let the model answer
            (``stats.thought_looped``); ``None``: never.
        on_prefill: called with (tokens done, tokens to do) while the prompt is evaluated.
        speculate: how to guess tokens that are then checked several at a time: ``"ngram"`` by what followed the same
            tokens before, where that is quicker; ``"off"``; or a :class:`pyengine.speculate.ModelDrafter`. No effect
            on the text.
        shorten: asked when the context is full in the middle of an answer; with the prompt that takes the place of
            this one the answer goes on.

    Errors: ``InvalidArgument``; ``ContextFull`` when the prompt alone does not fit; from within the iteration also
    whatever ``session.eval`` raises.
    """
    if tokenizer is None:
        tokenizer = session.model.tokenizer  # type: ignore[attr-defined]
    ids = list(tokenizer.encode(prompt)) if isinstance(prompt, str) else [int(i) for i in prompt]
    if not ids:
        raise InvalidArgument("the prompt is empty", code="empty_prompt")
    limits = (("max_tokens", max_tokens, 1), ("think_budget", think_budget, 0), ("loop_limit", loop_limit, 1))
    for name, value, least in limits:
        if value is not None and value < least:
            raise InvalidArgument(
                f"{name} is {value}; expected at least {least}, or None", code="bad_option", field=name
            )
    if isinstance(stop, str) or not all(isinstance(s, str) and s for s in stop):
        raise InvalidArgument(
            f"stop is {stop!r}; expected a sequence of non-empty strings", code="bad_option", field="stop"
        )
    if len(ids) > session.n_ctx:
        raise ContextFull(
            f"the prompt has {len(ids)} tokens, the context holds {session.n_ctx}: shorten it or open a larger context",
            code="context_full",
        )
    sampler = Sampler(settings, tokenizer)
    drafter = functools.partial(_drafter, speculate, sampler)
    run = _Run(session, tokenizer, ids, sampler, max_tokens, think_budget, loop_limit, on_prefill, drafter, shorten)
    return run.events(Output(tokenizer, stop, reasoning, starts_in_reasoning))


def _drafter(speculate: Speculate, sampler: Sampler) -> Drafter | None:
    if speculate == "off":
        return None
    if speculate == "ngram":
        return NgramDrafter()
    if isinstance(speculate, str) or not hasattr(speculate, "propose"):
        raise InvalidArgument(
            f'speculate is {speculate!r}; expected "ngram", "off" or a drafter', code="bad_option", field="speculate"
        )
    if isinstance(speculate, ModelDrafter):
        speculate.start(sampler)
    return speculate


class _Run:
    """One generation: the loop and its counters."""

    def __init__(
        self,
        session: GenerationSession,
        tokenizer: GenerationTokenizer,
        prompt: list[int],
        sampler: Sampler,
        max_tokens: int | None,
        think_budget: int | None,
        loop_limit: int | None,
        on_prefill: Callable[[int, int], object] | None,
        drafter: Callable[[], Drafter | None],
        shorten: Shorten | None,
    ) -> None:
        self.session = session
        self.drafter = drafter  # makes one for a text that begins now
        self.lookahead = Lookahead(session, drafter())
        self.tokenizer = tokenizer
        self.sampler = sampler
        self.n_given = self.n_prompt = len(prompt)  # at first, and after turns were dropped
        self.history = array("q", prompt)  # prompt and generated ids
        self.max_tokens = max_tokens
        self.think_budget = think_budget
        self.loops = None if loop_limit is None else LoopDetector(loop_limit)
        self.thought_looped = False
        self.on_prefill = on_prefill
        self.shorten = shorten
        self.n_reused = self.n_reasoning = 0
        self.prefill_seconds = self.decode_seconds = 0.0

    def events(self, out: Output) -> Iterator[Event]:
        reason: EndReason = "cancelled"
        try:
            reason = yield from self._loop(out)
        except Cancelled:
            pass
        finally:
            self.lookahead.close()
            self.session.clear_cancel()  # a cancel() that came too late must not stop the next generation
        if out.stopped_by is None:
            yield from out.finish()
        if out.stopped_by is not None:
            reason = "stop"
        yield End(reason, self._stats(), tuple(out.tokens), out.stopped_by, out.misread)

    def _loop(self, out: Output) -> Generator[Event, None, EndReason]:
        self.n_reused = self.session.reuse(self.history)
        pending = self.history[self.n_reused :].tolist()  # taken, not yet evaluated
        while True:
            if self.think_budget is not None and out.in_reasoning and self.n_reasoning >= self.think_budget:
                for token in self.tokenizer.encode(THINK_CLOSE, add_special=False, parse_special=True):
                    pending.append(token)
                    yield from self._take(SampleResult(token), out)
                    if self._is_long_enough():
                        return "length"
            if len(self.lookahead) + len(pending) > self.session.n_ctx:
                shifted = self._shift()
                if shifted is None:
                    return "context"
                yield shifted
                pending = self.history[self.session.reuse(self.history) :].tolist()
            result = self._next(pending)
            if result.id in self.tokenizer.eog_ids:
                self.history.append(result.id)
                out.tokens.append(result)
                return "eog"
            yield from self._take(result, out)
            if out.stopped_by is not None:
                return "stop"
            if self._is_long_enough():
                return "length"
            if self.loops is not None and self.loops.feed(result.id):
                if not out.in_reasoning:
                    return "loop"
                self.thought_looped, self.think_budget = True, self.n_reasoning
                self.loops.restart()
            pending = [result.id]

    def _shift(self) -> Shifted | None:
        """Puts a shorter prompt before the answer so far, where there is one."""
        shorter = None if self.shorten is None else self.shorten(len(self.history) - self.n_prompt)
        if shorter is None:
            return None
        prompt, dropped = shorter
        freed = self.n_prompt - len(prompt)
        self.lookahead.restart(self.drafter())
        self.history = array("q", prompt) + self.history[self.n_prompt :]
        self.n_prompt = len(prompt)
        return Shifted(dropped, len(prompt), freed, self.session.n_ctx)

    def _room(self) -> int | None:
        """Tokens that ``max_tokens`` still allows."""
        return None if self.max_tokens is None else self.max_tokens - (len(self.history) - self.n_prompt)

    def _is_long_enough(self) -> bool:
        return self._room() == 0

    def _take(self, token: SampleResult, out: Output) -> Iterator[Event]:
        self.history.append(token.id)
        self.n_reasoning += out.in_reasoning
        yield from out.feed(token)

    def _next(self, pending: list[int]) -> SampleResult:
        """Evaluates what is pending and chooses the next token."""
        start = time.perf_counter()
        first = self.prefill_seconds == 0
        if self.on_prefill is not None and (first or len(pending) > _PREFILL_SLICE):
            pending = self._prefill(pending, self.on_prefill)
        logits = self.lookahead.after(pending, self.history, self._room())
        # Rows beyond the vocabulary are padding of the embedding: they stand for no text.
        result = self.sampler.sample(logits[: self.tokenizer.n_vocab], self.history)
        if first:
            self.prefill_seconds = time.perf_counter() - start
        else:
            self.decode_seconds += time.perf_counter() - start
        return result

    def _prefill(self, pending: list[int], report: Callable[[int, int], object]) -> list[int]:
        """Evaluates all but the last slice, which is returned, and reports along the way."""
        at = 0
        while len(pending) - at > _PREFILL_SLICE:
            report(at, len(pending))
            self.session.prefill(pending[at : at + _PREFILL_SLICE])
            at += _PREFILL_SLICE
        report(at, len(pending))
        return pending[at:]

    def _stats(self) -> Stats:
        return Stats(
            prompt_tokens=self.n_given,
            reused_tokens=self.n_reused,
            generated_tokens=len(self.history) - self.n_prompt,
            reasoning_tokens=self.n_reasoning,
            decode_steps=self.lookahead.n_evals,
            prefill_seconds=self.prefill_seconds,
            decode_seconds=self.decode_seconds,
            seed=self.sampler.seed,
            context_used=len(self.session),
            context_size=self.session.n_ctx,
            drafted_tokens=self.lookahead.n_drafted,
            accepted_tokens=self.lookahead.n_accepted,
            thought_looped=self.thought_looped,
        )


# ---- conversations ----


Overflow = Literal["stop", "shift", "error"]
OVERFLOWS: tuple[Overflow, ...] = ("stop", "shift", "error")


class Chat:
    """A conversation: keeps the messages, and evaluates only what the session does not hold yet.

    A turn enters :attr:`messages` when it ends, as far as the answer went: also one that was cancelled, met
    ``max_tokens`` or filled the context. A turn that fails, or is cut short before any answer, leaves the conversation
    as it was. Reasoning is kept beside the answer (``reasoning_content``): what of it later prompts show is up to the
    template.

    Args:
        model: the model.
        system: system prompt.
        settings: how to choose tokens; by default what the model recommends.
        template: by default the model's; also Jinja source, or a name (see ``ChatTemplate.from_metadata``).
        session: by default a new one, closed by :meth:`close`.
        max_tokens, stop, think_budget, loop_limit, on_prefill, speculate: see :func:`generate`; for every answer.
        overflow: what happens when the conversation is longer than the context. ``"stop"``: an answer ends there
            (``End("context")``), a message that does not fit raises ``ContextFull``. ``"error"``: so does an answer
            that does not fit, and its turn is taken back. ``"shift"``: the oldest turns are dropped from what the
            model sees (a :class:`Shifted` event says so), until a quarter of the context is free, and the rest is
            evaluated again; the system prompt stays, and so do all :attr:`messages`. A single turn that is longer
            than the context ends as with ``"stop"``.

    Attributes:
        messages: the conversation, oldest first, the system prompt included.
        dropped: so many messages after the system prompt are not shown to the model any more.
        on_kept: called whenever a turn has entered the messages.

    Errors: ``UnsupportedError`` when the model has no usable template.
    """

    def __init__(
        self,
        model: Model,
        *,
        system: str | None = None,
        settings: SamplerSettings | None = None,
        template: ChatTemplate | str | None = None,
        session: Session | None = None,
        max_tokens: int | None = None,
        stop: Sequence[str] = (),
        think_budget: int | None = None,
        loop_limit: int | None = None,
        on_prefill: Callable[[int, int], object] | None = None,
        speculate: Speculate = "ngram",
        overflow: Overflow = "stop",
    ) -> None:
        from pyengine.chat import ChatTemplate  # here, because its imports cost programs without chats 0.1 s

        self.model = model
        self.tokenizer = model.tokenizer
        if template is None or isinstance(template, str):
            template = ChatTemplate.from_metadata(model.metadata, self.tokenizer, override=template)
        self.template = template
        if settings is None:
            profile = reasoning_profile(model.metadata, template.source)
            settings = SamplerSettings(**profile.sampling)  # type: ignore[arg-type]
        self.settings = settings
        self.max_tokens = max_tokens
        self.stop = stop
        self.think_budget = think_budget
        self.loop_limit = loop_limit
        self.on_prefill = on_prefill
        self.speculate = speculate
        if overflow not in OVERFLOWS:
            raise InvalidArgument(
                f"overflow is {overflow!r}; expected one of {', '.join(OVERFLOWS)}", code="bad_option", field="overflow"
            )
        self.overflow = overflow
        self.on_kept: Callable[[], object] | None = None
        self.dropped = 0
        self.written: dict[str, tuple[int, ...]] = {}  # see pyengine.chat.written_pieces
        self._system: list[dict[str, str]] = [] if system is None else [{"role": "system", "content": system}]
        self.messages: list[dict[str, str]] = list(self._system)
        self._owns_session = session is None
        self.session = model.session() if session is None else session

    def send(self, text: str) -> Iterator[Event]:
        """The answer to ``text``, as :func:`generate` yields it.

        Errors: ``InvalidArgument`` (nothing to send, not valid Unicode), ``ContextFull`` (the conversation does not
        fit), and those of :func:`generate`. None of them changes the conversation.
        """
        if not text.strip():
            raise InvalidArgument("the message is empty", code="empty_prompt")
        return self._answer({"role": "user", "content": text})

    def continue_with(self, messages: Sequence[Mapping[str, Any]]) -> Iterator[Event]:
        """The answer to a whole conversation given from outside, whatever its last message is; it takes the place of
        the one there was. Errors: as of :meth:`send`."""
        if not messages:
            raise InvalidArgument("there are no messages", code="empty_prompt")
        first = messages[0]
        self.dropped = 0
        self._system = [dict(first)] if first.get("role") == "system" and len(messages) > 1 else []
        self.messages = [dict(message) for message in messages[:-1]]
        return self._answer(dict(messages[-1]))

    def _answer(self, message: dict[str, Any]) -> Iterator[Event]:
        turn = Turn(self, message)
        events = generate(
            self.session,
            turn.prompt.ids,
            self.settings,
            tokenizer=self.tokenizer,
            max_tokens=self.max_tokens,
            stop=self.stop,
            starts_in_reasoning=turn.prompt.starts_in_reasoning,
            think_budget=self.think_budget,
            loop_limit=self.loop_limit,
            on_prefill=self.on_prefill,
            speculate=self.speculate,
            shorten=turn.shorten if self.overflow == "shift" else None,
        )
        return self._events(turn, events)

    def _events(self, turn: Turn, events: Iterator[Event]) -> Iterator[Event]:
        seen: list[Event] = []
        try:
            if turn.shifted is not None:
                yield turn.shifted
            for event in events:
                seen.append(event)
                if isinstance(event, End):
                    if event.reason == "context" and self.overflow == "error":
                        raise overflowed(event.stats)
                    self._keep(turn, seen, ended=event.reason in ("eog", "stop"))
                yield event
        except GeneratorExit:  # the consumer leaves early
            if not any(isinstance(event, End) for event in seen):
                self._keep(turn, seen, ended=False)
            raise

    def _keep(self, turn: Turn, events: list[Event], *, ended: bool) -> None:
        from pyengine.chat import written_pieces

        reply = collect(events)
        if ended or reply.text.strip():
            answer = {"role": "assistant", "content": reply.text}
            if reply.reasoning:
                answer["reasoning_content"] = reply.reasoning
            self.messages += [turn.user, answer]
            self.dropped = turn.dropped
            ids = [token.id for event in events for token in event.tokens]
            self.written |= written_pieces(self.tokenizer, turn.prompt.ids, ids)
            if self.on_kept is not None:
                self.on_kept()

    def read_ahead(self) -> int:
        """Evaluates what the next prompt will begin with, as far as the session does not hold it.

        Where the template drops the reasoning of earlier turns, the last answer has to be read again without it; this
        does so while nobody waits, and the next turn evaluates the new message alone. No effect on any text.

        Returns how many tokens were evaluated. Errors: those of ``session.prefill``; ``session.cancel()`` from another
        thread ends it with ``Cancelled``.
        """
        if len(self.messages) == self.n_system:
            return 0
        so_far = self.build(self.messages, add_generation_prompt=False).ids
        following = self.build([*self.messages, {"role": "user", "content": "?"}]).ids
        n = next((i for i, (a, b) in enumerate(zip(so_far, following, strict=False)) if a != b), len(so_far))
        if n < 2 or n > self.session.n_ctx:
            return 0
        # reuse() leaves the last token out; what the session holds anyway is not given up for one token
        if len(self.session) >= n and self.session.tokens[:n] == so_far[:n]:
            return 0
        held = self.session.reuse(so_far[:n])
        self.session.prefill(so_far[held:n])
        return n - held

    @contextmanager
    def reading_ahead(self) -> Iterator[None]:
        """Does :meth:`read_ahead` in another thread while the ``with`` block runs, at most until it ends."""

        def read() -> None:
            with suppress(EngineError):  # nothing is lost: the next turn meets the same problem and tells it
                self.read_ahead()

        task = Task(read)
        try:
            yield
        finally:
            self.session.cancel()
            try:
                task.result()
            except KeyboardInterrupt:  # the session is nobody else's before the thread is done with it
                task.wait()
                raise
            finally:
                self.session.clear_cancel()

    @property
    def n_system(self) -> int:
        """How many messages the system prompt is: 0 or 1."""
        return len(self._system)

    def shown(self, messages: list[dict[str, str]], dropped: int | None = None) -> list[dict[str, str]]:
        """Those of the messages that the model sees."""
        n = self.n_system
        return [*messages[:n], *messages[n + (self.dropped if dropped is None else dropped) :]]

    def build(
        self, messages: list[dict[str, str]], *, dropped: int | None = None, add_generation_prompt: bool = True
    ) -> PromptIds:
        """The prompt for a conversation, without the turns that were dropped."""
        from pyengine.chat import build_prompt

        shown = self.shown(messages, dropped)
        return build_prompt(
            self.template, self.tokenizer, shown, add_generation_prompt=add_generation_prompt, written=self.written
        )

    @property
    def system(self) -> str | None:
        """The system prompt. Setting it (None: none) changes what the next answer reads; the conversation stays."""
        return self._system[0]["content"] if self._system else None

    @system.setter
    def system(self, text: str | None) -> None:
        rest = self.messages[len(self._system) :]
        self._system = [] if text is None else [{"role": "system", "content": text}]
        self.messages = [*self._system, *rest]

    def undo(self) -> bool:
        """Takes back the last message of the user and everything after it; False when there is none."""
        for at in range(len(self.messages) - 1, -1, -1):
            if self.messages[at]["role"] == "user":
                del self.messages[at:]
                self.dropped = min(self.dropped, len(self.messages) - self.n_system)
                return True
        return False

    def clear(self) -> None:
        """Forgets the conversation; the system prompt stays."""
        self.messages = list(self._system)
        self.dropped = 0
        self.written = {}

    def close(self) -> None:
        """Closes the session, unless it was given."""
        if self._owns_session:
            self.session.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()
