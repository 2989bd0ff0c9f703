"""Tells a model's reasoning from its answer while the text streams, and knows how reasoning models want to be sampled.

A reply is at most one reasoning section, ``<think>`` ... ``</think>``, and then the answer. The opening marker is often
part of the prompt (the template writes it), and some models leave it out altogether.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from pyengine.errors import FormatError, InvalidArgument
from pyengine.sampling import SamplerSettings

OPENER = "<think>"
CLOSER = "</think>"

# start: is there an opening marker?  opened: line breaks after it  inside: reasoning  closed: blank lines after the
# closing marker  answer: the rest  unsure: answer, unless a lone closing marker turns up
_State = Literal["start", "opened", "inside", "closed", "answer", "unsure"]


class ReasoningSplitter:
    """Takes text in pieces of any size and says of each part whether it is reasoning.

    The markers, the line breaks that set them off (around the reasoning, before the answer), and nothing else, are
    dropped. What may become a marker is held back. The outcome does not depend on how the text is cut into pieces.

    Args:
        starts_in_reasoning: the prompt already opened the section: everything up to ``</think>`` is reasoning, and an
            opening marker that the model repeats is dropped. If False, the text is reasoning where it begins with
            ``<think>``, else it is answer as it comes.

    A model may write ``</think>`` without having opened a section; then all before it was reasoning, but it has been
    given out as answer already: holding back every answer until its end would be no streaming. The marker is dropped,
    and :attr:`lone_closer` says that it was there. :func:`split_reasoning`, which sees the whole text, puts it right.
    A second section is not looked for: after the first one markers are ordinary text.
    """

    def __init__(self, starts_in_reasoning: bool = False) -> None:
        self.lone_closer = False
        self._opened = starts_in_reasoning
        self._state: _State = "start"
        self._blank: list[str] = []  # pieces of white space that may be dropped, apart: a run of it is looked at once
        self._held = ""  # what else was received and is not yet given out; comes after them

    @property
    def in_reasoning(self) -> bool:
        """Whether the reply is inside the reasoning section."""
        return self._state in ("opened", "inside") or (self._state == "start" and self._opened)

    def feed(self, text: str) -> list[tuple[bool, str]]:
        """The parts that are certain now, as (is reasoning, text), none of them empty."""
        if not self._held and self._may_be_dropped(text):
            self._blank.append(text)
            return []
        self._held += text
        parts = self._advance(final=False)
        if self._may_be_dropped(self._held):
            self._blank, self._held = [self._held], ""
        return parts

    def flush(self) -> list[tuple[bool, str]]:
        """What was held back, once nothing follows."""
        return self._advance(final=True)

    def _may_be_dropped(self, text: str) -> bool:
        if self._state == "inside":
            return text.strip("\n") == ""
        return text.isspace() and self._state in ("start", "closed")

    def _advance(self, final: bool) -> list[tuple[bool, str]]:
        self._held = "".join([*self._blank, self._held])
        self._blank = []
        parts: list[tuple[bool, str]] = []
        while True:
            state = self._state
            text = self._step(final)
            if text:
                parts.append((state == "inside", text))
            if self._state == state:
                return parts

    def _step(self, final: bool) -> str:
        """Gives out what the current state may, and moves to the next state where this one has ended."""
        match self._state:
            case "start":
                self._find_opener(final)
                return ""
            case "opened":
                self._held = self._held.lstrip("\n")
                if self._held or final:
                    self._state = "inside"
                return ""
            case "inside" | "unsure":
                return self._until_closer(final)
            case "closed":
                self._skip_blank_lines(final)
                return ""
            case "answer":
                return self._take(len(self._held))

    def _take(self, n: int) -> str:
        text, self._held = self._held[:n], self._held[n:]
        return text

    def _find_opener(self, final: bool) -> None:
        seen = self._held.lstrip()
        if seen.startswith(OPENER):
            self._held = seen.removeprefix(OPENER)
            self._state = "opened"
        elif final or not OPENER.startswith(seen):
            self._state = "opened" if self._opened else "unsure"

    def _until_closer(self, final: bool) -> str:
        """Text up to the closing marker; inside a section the line breaks before the marker are no part of it."""
        inside = self._state == "inside"
        at = self._held.find(CLOSER)
        if at >= 0:
            text = self._take(at)
            self._take(len(CLOSER))
            self.lone_closer = not inside
            self._state = "closed"
            return text.rstrip("\n") if inside else text
        if final:
            return self._take(len(self._held))
        end = len(self._held) - overlap(self._held, CLOSER)
        return self._take(len(self._held[:end].rstrip("\n")) if inside else end)

    def _skip_blank_lines(self, final: bool) -> None:
        """Between marker and answer: drops empty lines, keeps the indentation of the first line that is none."""
        rest = self._held.lstrip()
        if rest or final:
            gap = self._held[: len(self._held) - len(rest)]
            self._held = gap[gap.rfind("\n") + 1 :] + rest if rest else ""
            self._state = "answer"


def overlap(text: str, marker: str) -> int:
    """Length of the longest proper beginning of ``marker`` that ends ``text``: what a stream has to hold back."""
    return next((n for n in range(min(len(marker) - 1, len(text)), 0, -1) if text.endswith(marker[:n])), 0)


class SplitReply(NamedTuple):
    """A whole reply in its two parts, either of which may be empty."""

    reasoning: str
    answer: str


def split_reasoning(text: str, starts_in_reasoning: bool = False) -> SplitReply:
    """Splits a whole reply as :class:`ReasoningSplitter` does, but text before a lone ``</think>`` is reasoning."""
    splitter = ReasoningSplitter(starts_in_reasoning)
    parts = splitter.feed(text) + splitter.flush()
    if splitter.lone_closer:
        return split_reasoning(text, True)
    reasoning = "".join(part for is_reasoning, part in parts if is_reasoning)
    return SplitReply(reasoning, "".join(part for is_reasoning, part in parts if not is_reasoning))


# --- sampling defaults ------------------------------------------------------------------------------------------------

_R1_NAME = re.compile(r"deepseek[-_ .]?r1|\br1[-_ .](?:distill|0528)", re.IGNORECASE)
_R1_TEMPLATE = re.compile(r"<｜Assistant｜>(?:\\n)?<think>")
# What the R1 model cards ask for. No penalty: repeated words are how these models check their steps.
_R1_SAMPLING: Mapping[str, float | int] = {"temperature": 0.6, "top_p": 0.95, "min_p": 0.0, "repeat_penalty": 1.0}
# Keys of the file -> names of SamplerSettings.
_FILE_KEYS: Mapping[str, tuple[str, type[int] | type[float]]] = {
    "temp": ("temperature", float),
    "top_k": ("top_k", int),
    "top_p": ("top_p", float),
    "min_p": ("min_p", float),
    "xtc_probability": ("xtc_probability", float),
    "xtc_threshold": ("xtc_threshold", float),
    "penalty_last_n": ("repeat_last_n", int),
    "penalty_repeat": ("repeat_penalty", float),
}


@dataclass(frozen=True)
class ReasoningProfile:
    """What a file says about how its model wants to be used.

    Attributes:
        reasons: the model writes reasoning sections.
        is_r1: it belongs to the DeepSeek-R1 family.
        sampling: overrides for fields of ``SamplerSettings``, by name; flags of the user come after them.
        evidence: one sentence for each conclusion, for ``--verbose``.
    """

    reasons: bool
    is_r1: bool
    sampling: Mapping[str, float | int]
    evidence: tuple[str, ...]


def reasoning_profile(metadata: Mapping[str, Any], template: str | None = None) -> ReasoningProfile:
    """Judges by the names in the file and by its chat template; ``general.sampling.*`` has the last word.

    Args:
        metadata: GGUF keys and values.
        template: source of the template in use; the file's own when None.

    Errors: ``FormatError`` for a sampling value that makes no sense.
    """
    if template is None:
        stored = metadata.get("tokenizer.chat_template")
        template = stored if isinstance(stored, str) else ""
    evidence: list[str] = []
    is_r1 = False
    for key in ("general.name", "general.basename", "general.finetune", "general.base_model.0.name"):
        name = metadata.get(key)
        if isinstance(name, str) and _R1_NAME.search(name):
            is_r1 = True
            evidence.append(f"DeepSeek-R1 family: {key} is {name!r}")
            break
    if _R1_TEMPLATE.search(template):
        is_r1 = True
        evidence.append("DeepSeek-R1 family: the chat template opens every reply with <think>")
    reasons = is_r1 or OPENER in template or CLOSER in template
    if reasons and not is_r1:
        evidence.append("reasoning model: the chat template knows <think>")
    sampling: dict[str, float | int] = {}
    if is_r1:
        sampling.update(_R1_SAMPLING)
        evidence.append("sampling for DeepSeek-R1: " + _listed(_R1_SAMPLING))
    stated = _stated_sampling(metadata)
    if stated:
        sampling.update(stated)
        evidence.append("sampling stated by the file: " + _listed(stated))
    return ReasoningProfile(reasons, is_r1, sampling, tuple(evidence))


def _stated_sampling(metadata: Mapping[str, Any]) -> dict[str, float | int]:
    stated: dict[str, float | int] = {}
    for key, (name, kind) in _FILE_KEYS.items():
        full = f"general.sampling.{key}"
        value = metadata.get(full)
        if value is None:
            continue
        if isinstance(value, float) and math.isfinite(value):
            # Files hold 32-bit floats: 0.6 comes back as 0.6000000238. Seven digits undo that.
            value = float(f"{value:.7g}")
            value = int(value) if kind is int and value.is_integer() else value
        try:
            SamplerSettings(**{name: value})  # type: ignore[arg-type]
        except InvalidArgument as error:
            raise FormatError(f"{full}: {error.message}", code="bad_sampling", field=full) from None
        stated[name] = value
    return stated


def _listed(sampling: Mapping[str, float | int]) -> str:
    return ", ".join(f"{name} {value:g}" for name, value in sampling.items())
