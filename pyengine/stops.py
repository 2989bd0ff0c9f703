"""Stop strings: text that ends an answer and is no part of it."""

from __future__ import annotations

from collections.abc import Sequence

from pyengine.reasoning import overlap


class StopMatcher:
    """Finds the first stop string in streamed text, wherever the pieces are cut.

    Of several stop strings the one that is complete first counts (of those, the one that began first), as if the text
    arrived character by character. Text that may become a stop string is held back.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stops)
        self._held = ""
        self.matched: str | None = None

    def feed(self, text: str) -> str:
        """Text that is certainly outside every stop string. Nothing comes after a match."""
        if self.matched is not None:
            return ""
        text = self._held + text
        hits = [(at + len(stop), at, stop) for stop in self._stops if (at := text.find(stop)) >= 0]
        if hits:
            _, at, self.matched = min(hits)
            self._held = ""
            return text[:at]
        held = max((overlap(text, stop) for stop in self._stops), default=0)
        self._held = text[len(text) - held :]
        return text[: len(text) - held]

    def flush(self) -> str:
        """The text still held back, once it is known that nothing follows."""
        held, self._held = self._held, ""
        return held
