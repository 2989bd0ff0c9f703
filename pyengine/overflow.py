"""A conversation that is longer than the context: which turns the model no longer sees."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from typing import TYPE_CHECKING

from pyengine.errors import ContextFull
from pyengine.events import Shifted, Stats

if TYPE_CHECKING:
    from pyengine.chat import PromptIds
    from pyengine.generate import Chat


class Turn:
    """A message on its way: its prompt, and the turns dropped for it. The chat changes when the turn is kept."""

    def __init__(self, chat: Chat, user: dict[str, str]) -> None:
        self.chat = chat
        self.user = user
        self.dropped = chat.dropped
        self.prompt = chat.build([*chat.messages, user])
        self.shifted: Shifted | None = None
        n_ctx = chat.session.n_ctx
        if chat.overflow == "shift" and len(self.prompt.ids) > n_ctx:
            before = len(self.prompt.ids)
            shorter = self.shorten(0)
            if shorter is not None:
                ids, messages = shorter
                self.shifted = Shifted(messages, len(ids), before - len(ids), n_ctx)

    def shorten(self, n_answer: int) -> tuple[Sequence[int], int] | None:
        """A prompt that leaves a quarter of the context free after ``n_answer`` tokens of the answer, or some of it."""
        chat, size = self.chat, self.chat.session.n_ctx
        turns = [*chat.messages, self.user][chat.n_system :]
        cuts = [i for i in range(self.dropped + 1, len(turns)) if turns[i]["role"] == "user"]
        if not cuts:
            return None
        prompts: dict[int, PromptIds] = {}

        def frees_enough(cut: int) -> bool:
            prompts[cut] = chat.build([*chat.messages, self.user], dropped=cut)
            return len(prompts[cut].ids) + n_answer + size // 4 <= size

        cut = cuts[min(bisect_left(cuts, True, key=frees_enough), len(cuts) - 1)]
        if len(prompts[cut].ids) + n_answer >= size:
            return None
        dropped, self.dropped, self.prompt = cut - self.dropped, cut, prompts[cut]
        return self.prompt.ids, dropped


def overflowed(stats: Stats) -> ContextFull:
    """An answer that did not fit."""
    return ContextFull(
        f"the context of {stats.context_size} tokens is full: the prompt took {stats.prompt_tokens}, the answer "
        f"{stats.generated_tokens} and was not finished",
        code="context_full",
    )
