"""From tokens to events: text, told into reasoning and answer, up to a stop string."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Protocol

from pyengine.events import Event, Reasoning, Text
from pyengine.reasoning import ReasoningSplitter
from pyengine.sampling import SampleResult
from pyengine.stops import StopMatcher


class TokenStream(Protocol):
    def feed(self, token: int, /) -> str: ...
    def flush(self) -> str: ...


class OutputTokenizer(Protocol):
    """The part of :class:`pyengine.tokenizer.Tokenizer` used here."""

    def stream(self) -> TokenStream: ...


class Output:
    """Turns the tokens of one generation into events."""

    def __init__(
        self, tokenizer: OutputTokenizer, stop: Sequence[str], reasoning: bool, starts_in_reasoning: bool
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
