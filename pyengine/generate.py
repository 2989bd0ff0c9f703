"""Text out of a session: :func:`generate` yields typed events, :class:`Chat` keeps a conversation.

>>> for event in generate(session, "Once upon a time", max_tokens=20):
...     match event:
...         case Text(text):
...             print(text, end="", flush=True)
...         case End(reason, stats):
...             print(f"\\n[{reason}, {stats.decode_rate:.1f} tokens/s]")
"""

from __future__ import annotations

import time
from array import array
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, NamedTuple, Protocol, Self

from pyengine.errors import Cancelled, ContextFull, InvalidArgument
from pyengine.loops import LoopDetector
from pyengine.reasoning import ReasoningSplitter, reasoning_profile
from pyengine.sampling import Sampler, SampleResult, SamplerSettings
from pyengine.speculate import Drafter, Lookahead, LookaheadSession, ModelDrafter, NgramDrafter
from pyengine.stops import StopMatcher

if TYPE_CHECKING:
    from pyengine.chat import ChatTemplate
    from pyengine.model import Model, Session

THINK_CLOSE = "\n</think>\n\n"
"""What a thinking budget writes when it is used up."""
_PREFILL_SLICE = 256  # tokens between two reports of progress


# ---- events ----


@dataclass(frozen=True)
class Reasoning:
    """A piece of the model's reasoning.

    ``tokens``: the tokens taken since the event before. Text may be held back for a while (unfinished characters,
    beginnings of markers and stop strings), so tokens and text agree over the whole stream, not piece by piece. A last
    piece without text brings the tokens that closed the reasoning.
    """

    text: str
    tokens: tuple[SampleResult, ...] = ()


@dataclass(frozen=True)
class Text:
    """A piece of the answer; ``tokens`` as in :class:`Reasoning`."""

    text: str
    tokens: tuple[SampleResult, ...] = ()


EndReason = Literal["eog", "stop", "length", "loop", "context", "cancelled"]


@dataclass(frozen=True)
class Stats:
    """The numbers of one generation.

    Attributes:
        prompt_tokens: length of the prompt; ``reused_tokens`` of them were already in the session.
        generated_tokens: tokens after the prompt, the ending one included; ``reasoning_tokens`` of them are reasoning.
        decode_steps: evaluations after the prompt (the first token needs none).
        drafted_tokens: guessed by speculation; ``accepted_tokens`` of them were right, and needed no evaluation of
            their own.
        prefill_seconds, decode_seconds: time in the model and the sampler, without the consumer's.
        seed: draws this text again.
        context_used, context_size: positions filled at the end, and available.
    """

    prompt_tokens: int
    reused_tokens: int
    generated_tokens: int
    reasoning_tokens: int
    decode_steps: int
    prefill_seconds: float
    decode_seconds: float
    seed: int
    context_used: int
    context_size: int
    drafted_tokens: int = 0
    accepted_tokens: int = 0

    @property
    def prefill_rate(self) -> float:
        """Prompt tokens evaluated per second; 0 when nothing was measured."""
        return (self.prompt_tokens - self.reused_tokens) / self.prefill_seconds if self.prefill_seconds else 0.0

    @property
    def decode_rate(self) -> float:
        """Tokens per second after the prompt; 0 when nothing was measured."""
        return (self.decode_steps + self.accepted_tokens) / self.decode_seconds if self.decode_seconds else 0.0


@dataclass(frozen=True)
class End:
    """The last event.

    Attributes:
        reason: ``"eog"`` the model ended; ``"stop"`` a stop string (``stop`` says which, it is not in the text);
            ``"length"`` ``max_tokens`` reached; ``"loop"`` ``loop_limit`` reached; ``"context"`` the context is
            full (``stats`` has the numbers); ``"cancelled"`` ``session.cancel()``.
        stats: the numbers.
        tokens: tokens that no text event carried, such as the end marker.
        stop: the stop string met.
        misread: so many first characters of the answer were reasoning after all, because the model closed a section
            that it had not opened; :func:`collect` puts it right.
    """

    reason: EndReason
    stats: Stats
    tokens: tuple[SampleResult, ...] = ()
    stop: str | None = None
    misread: int = 0


Event = Reasoning | Text | End


class Reply(NamedTuple):
    """A whole answer."""

    text: str
    reasoning: str


def collect(events: Iterable[Event]) -> Reply:
    """The events of one generation as a whole."""
    events = list(events)
    text = "".join(e.text for e in events if isinstance(e, Text))
    reasoning = "".join(e.text for e in events if isinstance(e, Reasoning))
    misread = sum(e.misread for e in events if isinstance(e, End))
    return Reply(text[misread:], reasoning + text[:misread])


# ---- what generate needs of others ----


class TokenStream(Protocol):
    def feed(self, token: int, /) -> str: ...
    def flush(self) -> str: ...


class GenerationTokenizer(Protocol):
    """The part of :class:`pyengine.tokenizer.Tokenizer` used here."""

    n_vocab: int

    @property
    def eog_ids(self) -> frozenset[int]: ...
    def encode(self, text: str, /, *, add_special: bool = ..., parse_special: bool = ...) -> Sequence[int]: ...
    def token_bytes(self, token: int, /) -> bytes: ...
    def stream(self) -> TokenStream: ...


class GenerationSession(LookaheadSession, Protocol):
    """The part of :class:`pyengine.model.Session` used here."""

    def prefill(self, tokens: Sequence[int], /) -> None: ...
    def reuse(self, tokens: Sequence[int], /) -> int: ...
    def clear_cancel(self) -> None: ...


# ---- generation ----

Speculate = Literal["ngram", "off"] | Drafter


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
        loop_limit: end an answer (or thought) that repeats one passage, token for token, for so many tokens and at
            least three times in a row (:class:`pyengine.loops.LoopDetector`); ``None``: never.
        on_prefill: called with (tokens done, tokens to do) while the prompt is evaluated.
        speculate: how to guess tokens that are then checked several at a time: ``"ngram"`` by what followed the same
            tokens before, where that is quicker; ``"off"``; or a :class:`pyengine.speculate.ModelDrafter`. No effect
            on the text.

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
    drafter = _drafter(speculate, sampler)
    run = _Run(session, tokenizer, ids, sampler, max_tokens, think_budget, loop_limit, on_prefill, drafter)
    return run.events(_Output(tokenizer, stop, reasoning, starts_in_reasoning))


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


class _Output:
    """Turns tokens into events."""

    def __init__(
        self, tokenizer: GenerationTokenizer, stop: Sequence[str], reasoning: bool, starts_in_reasoning: bool
    ) -> None:
        self._stream = tokenizer.stream()
        self._splitter = ReasoningSplitter(starts_in_reasoning) if reasoning else None
        self._stop = StopMatcher(stop)
        self.tokens: list[SampleResult] = []  # not yet carried by an event
        self.misread = 0  # see End
        self._answer_chars = 0
        self._closer_seen = False

    @property
    def in_reasoning(self) -> bool:
        return self._splitter is not None and self._splitter.in_reasoning

    @property
    def stopped_by(self) -> str | None:
        return self._stop.matched

    def feed(self, token: SampleResult) -> Iterator[Event]:
        was_reasoning = self.in_reasoning
        self.tokens.append(token)
        yield from self._emit(self._split(self._stream.feed(token.id)))
        if was_reasoning and not self.in_reasoning and self.tokens:
            tokens, self.tokens = tuple(self.tokens), []
            yield Reasoning("", tokens)

    def finish(self) -> Iterator[Event]:
        """The text held back."""
        pieces = self._split(self._stream.flush())
        yield from self._emit(pieces if self._splitter is None else [*pieces, *self._splitter.flush()])
        yield from self._emit([(False, "")], last=True)

    def _split(self, text: str) -> list[tuple[bool, str]]:
        """(is reasoning, text) pieces, neighbours of one kind joined."""
        if self._splitter is None:
            return [(False, text)]
        pieces: list[tuple[bool, str]] = []
        for char in text:  # one by one, to know where the answer begins when a section is closed that was not opened
            found = self._splitter.feed(char)
            self._answer_chars += sum(len(piece) for is_reasoning, piece in found if not is_reasoning)
            if self._splitter.lone_closer and not self._closer_seen:
                self._closer_seen = True
                self.misread = self._answer_chars
            for is_reasoning, piece in found:
                if pieces and pieces[-1][0] == is_reasoning:
                    piece = pieces.pop()[1] + piece
                pieces.append((is_reasoning, piece))
        return pieces

    def _emit(self, pieces: Sequence[tuple[bool, str]], last: bool = False) -> Iterator[Event]:
        for is_reasoning, text in pieces:
            if not is_reasoning:
                text = self._stop.feed(text) + (self._stop.flush() if last else "")
            if text:
                tokens, self.tokens = tuple(self.tokens), []
                yield Reasoning(text, tokens) if is_reasoning else Text(text, tokens)


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
        drafter: Drafter | None,
    ) -> None:
        self.session = session
        self.lookahead = Lookahead(session, drafter)
        self.tokenizer = tokenizer
        self.sampler = sampler
        self.n_prompt = len(prompt)
        self.history = array("q", prompt)  # prompt and generated ids
        self.max_tokens = max_tokens
        self.think_budget = think_budget
        self.loops = LoopDetector(loop_limit) if loop_limit is not None else None
        self.on_prefill = on_prefill
        self.n_reused = self.n_reasoning = 0
        self.prefill_seconds = self.decode_seconds = 0.0

    def events(self, out: _Output) -> Iterator[Event]:
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

    def _loop(self, out: _Output) -> Generator[Event, None, EndReason]:
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
                return "context"
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
                return "loop"
            pending = [result.id]

    def _room(self) -> int | None:
        """Tokens that ``max_tokens`` still allows."""
        return None if self.max_tokens is None else self.max_tokens - (len(self.history) - self.n_prompt)

    def _is_long_enough(self) -> bool:
        return self._room() == 0

    def _take(self, token: SampleResult, out: _Output) -> Iterator[Event]:
        self.history.append(token.id)
        self.n_reasoning += out.in_reasoning
        yield from out.feed(token)

    def _next(self, pending: list[int]) -> SampleResult:
        """Evaluates what is pending and chooses the next token."""
        start = time.perf_counter()
        first = self.prefill_seconds == 0
        if first and self.on_prefill is not None:
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
            prompt_tokens=self.n_prompt,
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
        )


# ---- conversations ----


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
        self._system: list[dict[str, str]] = [] if system is None else [{"role": "system", "content": system}]
        self.messages: list[dict[str, str]] = list(self._system)
        self._owns_session = session is None
        self.session = model.session() if session is None else session

    def send(self, text: str) -> Iterator[Event]:
        """The answer to ``text``, as :func:`generate` yields it.

        Errors: ``InvalidArgument`` (nothing to send, not valid Unicode), ``ContextFull`` (the conversation does not
        fit), and those of :func:`generate`. None of them changes the conversation.
        """
        from pyengine.chat import build_prompt

        if not text.strip():
            raise InvalidArgument("the message is empty", code="empty_prompt")
        user = {"role": "user", "content": text}
        prompt = build_prompt(self.template, self.tokenizer, [*self.messages, user])
        events = generate(
            self.session,
            prompt.ids,
            self.settings,
            tokenizer=self.tokenizer,
            max_tokens=self.max_tokens,
            stop=self.stop,
            starts_in_reasoning=prompt.starts_in_reasoning,
            think_budget=self.think_budget,
            loop_limit=self.loop_limit,
            on_prefill=self.on_prefill,
            speculate=self.speculate,
        )
        return self._turn(user, events)

    def _turn(self, user: dict[str, str], events: Iterator[Event]) -> Iterator[Event]:
        seen: list[Event] = []
        try:
            for event in events:
                seen.append(event)
                if isinstance(event, End):
                    self._keep(user, collect(seen), ended=event.reason in ("eog", "stop"))
                yield event
        except GeneratorExit:  # the consumer leaves early
            if not any(isinstance(event, End) for event in seen):
                self._keep(user, collect(seen), ended=False)
            raise

    def _keep(self, user: dict[str, str], reply: Reply, *, ended: bool) -> None:
        if ended or reply.text.strip():
            answer = {"role": "assistant", "content": reply.text}
            if reply.reasoning:
                answer["reasoning_content"] = reply.reasoning
            self.messages += [user, answer]

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
                return True
        return False

    def clear(self) -> None:
        """Forgets the conversation; the system prompt stays."""
        self.messages = list(self._system)

    def close(self) -> None:
        """Closes the session, unless it was given."""
        if self._owns_session:
            self.session.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()
