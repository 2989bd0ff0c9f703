"""What a generation yields: pieces of text as they come, and at the end the reason and the numbers."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal, NamedTuple

from pyengine.sampling import SampleResult


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
        prefill_seconds, decode_seconds: time in the model and the sampler, without the consumer's. What is read again
            after turns were dropped in the middle of an answer counts as decoding.
        seed: draws this text again.
        context_used, context_size: positions filled at the end, and available.
        thought_looped: the reasoning was closed because it repeated itself (``loop_limit``).
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
    thought_looped: bool = False

    @property
    def prefill_rate(self) -> float:
        """Prompt tokens evaluated per second; 0 when nothing was measured."""
        return (self.prompt_tokens - self.reused_tokens) / self.prefill_seconds if self.prefill_seconds else 0.0

    @property
    def decode_rate(self) -> float:
        """Tokens per second after the prompt; 0 when nothing was measured."""
        return (self.decode_steps + self.accepted_tokens) / self.decode_seconds if self.decode_seconds else 0.0


@dataclass(frozen=True)
class Shifted:
    """The context was full, so the oldest turns were dropped from what the model sees (``Chat(overflow="shift")``).

    Attributes:
        dropped_messages: by this shift.
        prompt_tokens: of the prompt that is left.
        freed_tokens: by how many it is shorter.
        context_size: positions available.
        tokens: none.
    """

    dropped_messages: int
    prompt_tokens: int
    freed_tokens: int
    context_size: int
    tokens: tuple[SampleResult, ...] = ()


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


Event = Reasoning | Text | Shifted | End


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
