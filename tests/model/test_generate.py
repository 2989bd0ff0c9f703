"""Generation against a scripted model: events, stop strings, budgets, cancelling, conversations.

The fake session checks what the real one checks and predicts a script, so every expected text is written down here. The
commands' tests (tests/cli) run the same paths with a real model.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence

import numpy as np
import pytest

from pyengine import chat as chat_module
from pyengine.chat import PromptIds
from pyengine.errors import Cancelled, ContextFull, InvalidArgument, NumericError
from pyengine.generate import THINK_CLOSE, Chat, End, Event, Reasoning, Text, collect, generate
from pyengine.sampling import SamplerSettings
from pyengine.stops import StopMatcher

END = 256
GREEDY = SamplerSettings(temperature=0.0)


MARKERS = {"</think>": 257, "<think>": 258, "<|user|>": 259}


class Bytes:
    """A tokenizer: one token for each byte, one that ends, and markers."""

    n_vocab = 260
    eog_ids = frozenset({END})

    def token_bytes(self, token: int) -> bytes:
        return bytes([token]) if token < 256 else {v: k for k, v in MARKERS.items()}[token].encode()

    def encode(self, text: str, *, add_special: bool = True, parse_special: bool = False) -> list[int]:
        if parse_special:
            for marker, token in MARKERS.items():
                if marker in text:
                    before, after = text.split(marker, 1)
                    return [*before.encode(), token, *self.encode(after, parse_special=True)]
        return list(text.encode())

    def stream(self) -> Stream:
        return Stream(self)


class Stream:
    def __init__(self, tokenizer: Bytes) -> None:
        self.tokenizer = tokenizer
        self.held = b""

    def feed(self, token: int) -> str:
        self.held += self.tokenizer.token_bytes(token)
        for cut in range(len(self.held), -1, -1):
            try:
                text = self.held[:cut].decode()
            except UnicodeDecodeError:
                continue
            if len(self.held) - cut < 4:
                self.held = self.held[cut:]
                return text
        return ""

    def flush(self) -> str:
        held, self.held = self.held, b""
        return held.decode(errors="replace")


class Scripted:
    """A session whose model says, after ``prompt``, the next token of ``script``, whatever was forced in between."""

    def __init__(self, script: Callable[[list[int]], int], n_ctx: int = 10000) -> None:
        self.script = script
        self.n_ctx = n_ctx
        self.tokens: list[int] = []
        self.evaluated = 0
        self.cancelled = False
        self.after: Callable[[], None] = lambda: None

    def prefill(self, tokens: Sequence[int]) -> None:
        assert tokens
        if self.cancelled:
            self.cancelled = False
            raise Cancelled("cancelled", code="cancelled")
        if len(self.tokens) + len(tokens) > self.n_ctx:
            raise ContextFull("full", code="context_full")
        self.tokens += tokens
        self.evaluated += len(tokens)

    def eval(self, tokens: Sequence[int], all_logits: bool = False, out: np.ndarray | None = None) -> np.ndarray:
        self.prefill(tokens)
        self.after()
        n = len(tokens) if all_logits else 1
        rows = np.empty((n, 264), dtype=np.float32) if out is None else out[:n]
        rows[:] = 0.0
        rows[:, 260:] = 50.0  # padding rows of the embedding
        for i in range(n):
            rows[i, self.script(self.tokens[: len(self.tokens) - n + 1 + i])] = 9.0
        return rows if all_logits else rows[0]

    def truncate(self, n: int) -> None:
        assert 0 <= n <= len(self.tokens)
        del self.tokens[n:]

    def check_cancel(self) -> None:
        if self.cancelled:
            self.cancelled = False
            raise Cancelled("cancelled", code="cancelled")

    def reuse(self, tokens: Sequence[int]) -> int:
        kept = 0
        while kept < min(len(self.tokens), len(tokens) - 1) and self.tokens[kept] == tokens[kept]:
            kept += 1
        del self.tokens[kept:]
        return kept

    def cancel(self) -> None:
        self.cancelled = True

    def clear_cancel(self) -> None:
        self.cancelled = False

    def close(self) -> None:
        pass

    def __len__(self) -> int:
        return len(self.tokens)


def says(text: str | list[int], after: int = 3) -> Callable[[list[int]], int]:
    """A script: ``text`` after a prompt of ``after`` tokens, then the end."""
    ids = [*(text.encode() if isinstance(text, str) else text), END]
    return lambda tokens: ids[min(len(tokens) - after, len(ids) - 1)]


def run(session: Scripted, prompt: str = "abc", **options: object) -> list[Event]:
    return list(generate(session, prompt, GREEDY, tokenizer=Bytes(), **options))  # type: ignore[arg-type]


def last(events: list[Event]) -> End:
    assert isinstance(events[-1], End)
    assert not any(isinstance(e, End) for e in events[:-1])
    return events[-1]


def ids(events: list[Event]) -> list[int]:
    return [token.id for event in events for token in event.tokens]


# ---- stop strings ----


def first_stop(text: str, stops: Sequence[str]) -> tuple[str, str | None]:
    """The plain definition: character by character, the first stop string complete; the longest of those."""
    for end in range(1, len(text) + 1):
        hits = [stop for stop in stops if text[:end].endswith(stop)]
        if hits:
            longest = max(hits, key=len)
            return text[: end - len(longest)], longest
    return text, None


@pytest.mark.parametrize(
    ("text", "stops"),
    [
        ("hello world", ["world"]),
        ("aaab", ["aab"]),
        ("abcabd", ["abd", "bca"]),
        ("xabcx", ["abc", "b"]),
        ("xabcx", ["abc", "bc", "c"]),
        ("no stop here", ["STOP", "herein"]),
        ("ends in hal", ["half", "al!"]),
        ("ababab", ["abac"]),
        ("é–日本", ["–日"]),
    ],
)
def test_stop_strings_do_not_depend_on_how_the_text_is_cut(text: str, stops: list[str]) -> None:
    expected = first_stop(text, stops)
    for cuts in range(1 << (len(text) - 1)):
        pieces, start = [], 0
        for at in range(1, len(text) + 1):
            if at == len(text) or cuts >> (at - 1) & 1:
                pieces.append(text[start:at])
                start = at
        matcher = StopMatcher(stops)
        out = "".join(map(matcher.feed, pieces))
        out += matcher.flush()
        assert matcher.matched is None or matcher.feed("more") == ""
        assert (out, matcher.matched) == expected


def test_nothing_that_may_begin_a_stop_string_is_given_out() -> None:
    matcher = StopMatcher(["</end>"])
    assert matcher.feed("text </en") == "text "
    assert matcher.feed("ough> and") == "</enough> and"


def test_a_stop_string_ends_the_answer_and_is_cut_from_it() -> None:
    events = run(Scripted(says("one two STOP three")), stop=["STOP", "three"])
    assert collect(events).text == "one two "
    assert (last(events).reason, last(events).stop) == ("stop", "STOP")
    assert bytes(ids(events)) == b"one two STOP"


def test_stop_strings_are_not_looked_for_in_the_reasoning() -> None:
    events = run(Scripted(says("first X.</think>\n\nthen X!")), stop=["X"], starts_in_reasoning=True)
    assert collect(events) == ("then ", "first X.")
    assert last(events).reason == "stop"


def test_text_held_back_for_a_stop_string_comes_at_the_end() -> None:
    events = run(Scripted(says("almost STO")), stop=["STOP"])
    assert collect(events).text == "almost STO"
    assert last(events).reason == "eog"


# ---- events ----


def test_the_end_carries_the_reason_and_the_numbers() -> None:
    events = run(Scripted(says("hi"), n_ctx=50))
    end = last(events)
    assert collect(events) == ("hi", "")
    assert end.reason == "eog"
    assert ids(events) == [*b"hi", END]
    s = end.stats
    assert (s.prompt_tokens, s.reused_tokens, s.generated_tokens, s.reasoning_tokens) == (3, 0, 3, 0)
    assert (s.decode_steps, s.context_used, s.context_size) == (2, 5, 50)
    assert s.prefill_seconds > 0
    assert s.decode_rate > 0


def test_characters_are_never_cut() -> None:
    for text in ("naïve", "日本語", "🙂🙂", "e\u0301"):
        events = run(Scripted(says(text)))
        assert [e.text for e in events if isinstance(e, Text)] == list(text)


def test_a_character_that_never_ends_is_shown_as_such() -> None:
    events = run(Scripted(says([0xE6, 0x97])))
    assert collect(events).text == "�"
    assert ids(events) == [0xE6, 0x97, END]


@pytest.mark.parametrize("max_tokens", [1, 4, 5])
def test_max_tokens_is_exact(max_tokens: int) -> None:
    session = Scripted(says("a long story"))
    events = run(session, max_tokens=max_tokens)
    assert last(events).reason == "length"
    assert collect(events).text == "a long story"[:max_tokens]
    assert session.evaluated == 3 + max_tokens - 1  # the last token needs no evaluation


def test_a_full_context_is_told_with_numbers() -> None:
    events = run(Scripted(says("a long story"), n_ctx=8))
    end = last(events)
    assert (end.reason, end.stats.context_used, end.stats.context_size) == ("context", 8, 8)
    assert collect(events).text == "a long"  # 8 - 3 evaluated, and the one they predict


def test_a_prompt_that_does_not_fit_is_an_error_with_numbers() -> None:
    with pytest.raises(ContextFull, match=r"3 tokens.*holds 2"):
        generate(Scripted(says("x"), n_ctx=2), "abc", tokenizer=Bytes())


def test_what_the_session_holds_is_reused() -> None:
    session = Scripted(says("hi"))
    run(session)
    session.evaluated = 0
    session.script = says("yo", after=5)
    events = run(session, "abchX")
    assert last(events).stats.reused_tokens == 4
    assert session.evaluated == 1 + 2
    assert collect(events).text == "yo"


def test_progress_of_the_prompt_is_reported() -> None:
    seen: list[tuple[int, int]] = []
    session = Scripted(says("hi", after=1000))
    events = run(session, "x" * 1000, on_prefill=lambda done, total: seen.append((done, total)))
    assert seen == [(0, 1000), (256, 1000), (512, 1000), (768, 1000)]
    assert collect(events).text == "hi"


def test_the_same_seed_draws_the_same_text() -> None:
    def flat(session: Scripted) -> list[int]:
        settings = SamplerSettings(seed=5, top_k=0, top_p=1.0, min_p=0.0, temperature=8.0)
        return ids(list(generate(session, "abc", settings, tokenizer=Bytes(), max_tokens=20)))

    fresh, warm = Scripted(says("zzz")), Scripted(says("zzz"))
    run(warm, "abcdefg")
    assert flat(fresh) == flat(warm) == flat(warm)


@pytest.mark.parametrize(
    ("options", "field"),
    [
        ({"max_tokens": 0}, "max_tokens"),
        ({"think_budget": -1}, "think_budget"),
        ({"loop_limit": 0}, "loop_limit"),
        ({"stop": "x"}, "stop"),
    ],
)
def test_impossible_options_are_refused_at_once(options: dict[str, object], field: str) -> None:
    with pytest.raises(InvalidArgument) as error:
        generate(Scripted(says("x")), "abc", tokenizer=Bytes(), **options)  # type: ignore[arg-type]
    assert error.value.field == field


def test_an_empty_prompt_is_refused() -> None:
    with pytest.raises(InvalidArgument, match="empty"):
        generate(Scripted(says("x")), [], tokenizer=Bytes())


# ---- reasoning ----


def test_reasoning_and_answer_are_different_events() -> None:
    for script, starts in (("<think>\nwhy\n</think>\n\nbecause", False), ("why\n</think>\n\nbecause", True)):
        events = run(Scripted(says(script)), starts_in_reasoning=starts)
        kinds = [type(e) for e in events]
        assert kinds == sorted(kinds, key=[Reasoning, Text, End].index)
        assert collect(events) == ("because", "why")
        assert 3 <= last(events).stats.reasoning_tokens < len(script)
        assert ids(events) == [*script.encode(), END]


def test_reasoning_can_be_left_in_the_text() -> None:
    events = run(Scripted(says("<think>a</think>b")), reasoning=False)
    assert collect(events) == ("<think>a</think>b", "")


def test_text_before_a_lone_closing_marker_was_reasoning() -> None:
    events = run(Scripted(says("thinking\n</think>\n\nanswer")))
    assert collect(events) == ("answer", "thinking\n")
    assert last(events).misread == len("thinking\n")


@pytest.mark.parametrize("budget", [0, 1, 5])
def test_a_thinking_budget_ends_in_an_answer(budget: int) -> None:
    def endless(tokens: list[int]) -> int:
        closed = 257 in tokens
        answer = [*b"42", END]
        return answer[len(tokens) - tokens.index(257) - 3] if closed else ord("m")

    session = Scripted(endless, n_ctx=200)
    events = run(session, starts_in_reasoning=True, think_budget=budget)
    assert collect(events) == ("42", "m" * budget)
    assert last(events).reason == "eog"
    assert session.tokens == [*b"abc", *b"m" * budget, *b"\n", 257, *b"\n\n", *b"42"]


@pytest.mark.parametrize("max_tokens", [5, 6, 8, 9, 10])
def test_max_tokens_holds_for_what_the_budget_writes_too(max_tokens: int) -> None:
    events = run(Scripted(says("m" * 50)), starts_in_reasoning=True, think_budget=5, max_tokens=max_tokens)
    assert last(events).reason == "length"
    assert last(events).stats.generated_tokens == max_tokens


def test_a_model_within_its_budget_is_left_alone() -> None:
    events = run(Scripted(says("ok</think>fine")), starts_in_reasoning=True, think_budget=100)
    assert collect(events) == ("fine", "ok")


# ---- cancelling ----


def test_cancel_ends_the_stream_and_nothing_else() -> None:
    session = Scripted(says("a long story"))
    events = []
    for event in generate(session, "abc", GREEDY, tokenizer=Bytes()):
        events.append(event)
        if isinstance(event, Text) and collect(events).text == "a lo":
            session.cancel()
    assert last(events).reason == "cancelled"
    assert collect(events).text == "a lo"
    assert collect(run(session)).text == "a long story"


def test_cancel_from_another_thread_during_the_prompt() -> None:
    session = Scripted(says("x"))
    threading.Thread(target=session.cancel).start()
    while not session.cancelled:
        pass
    events = run(session)
    assert [last(events).reason, collect(events).text] == ["cancelled", ""]


def test_a_cancel_that_came_too_late_does_not_hit_the_next_generation() -> None:
    session = Scripted(says("hi"))
    session.after = lambda: session.cancel() if len(session) == 5 else None  # while the last logits are computed
    assert last(run(session)).reason == "eog"
    session.after = lambda: None
    assert collect(run(session)).text == "hi"


def test_leaving_early_leaves_a_usable_session() -> None:
    session = Scripted(says("a long story"))
    stream = generate(session, "abc", GREEDY, tokenizer=Bytes())
    next(stream)
    session.cancel()
    stream.close()  # type: ignore[attr-defined]
    assert collect(run(session)).text == "a long story"


# ---- conversations ----


class Template:
    source = "{# none #}"


class Model:
    def __init__(self) -> None:
        self.metadata: dict[str, object] = {}
        self.tokenizer = Bytes()


@pytest.fixture
def chat(monkeypatch: pytest.MonkeyPatch) -> Chat:
    """A chat whose prompt is the contents, one after the other: user text ends with "?", answers with "."."""

    def build(template: object, tokenizer: Bytes, messages: list[dict[str, str]], **options: object) -> PromptIds:
        text = "".join(m["content"] for m in messages)
        return PromptIds(list(text.encode()), text, False)

    def script(tokens: list[int]) -> int:
        said = bytes(t for t in tokens if t < 256).decode()
        reply = {"hi?": "hello."}.get(said[: said.rfind("?") + 1][-3:], "yes indeed.")
        done = said[said.rfind("?") + 1 :]
        return END if done == reply else ord(reply[len(done)])

    monkeypatch.setattr(chat_module, "build_prompt", build)
    monkeypatch.setattr(chat_module, "written_pieces", lambda *args: {})
    session = Scripted(script, n_ctx=60)
    return Chat(Model(), system="S:", template=Template(), session=session, settings=GREEDY)  # type: ignore[arg-type]


def roles(chat: Chat) -> str:
    return "".join(m["role"][0] for m in chat.messages)


def test_a_conversation_keeps_its_messages_and_its_cache(chat: Chat) -> None:
    assert collect(chat.send("hi?")).text == "hello."
    assert [m["content"] for m in chat.messages] == ["S:", "hi?", "hello."]
    events = list(chat.send("and?"))
    assert last(events).stats.reused_tokens == len("S:hi?hello.")
    assert roles(chat) == "suaua"
    assert chat.undo()
    assert roles(chat) == "sua"
    chat.clear()
    assert roles(chat) == "s"
    assert not chat.undo()


def test_a_cancelled_answer_stays_as_far_as_it_went(chat: Chat) -> None:
    events = []
    for event in chat.send("long?"):
        events.append(event)
        if isinstance(event, Text) and collect(events).text == "yes":
            chat.session.cancel()
    assert last(events).reason == "cancelled"
    assert chat.messages[-1] == {"role": "assistant", "content": "yes"}


def test_leaving_early_keeps_what_was_said(chat: Chat) -> None:
    stream = chat.send("long?")
    next(stream), next(stream)
    stream.close()  # type: ignore[attr-defined]
    assert chat.messages[-1]["content"] == "ye"


def test_a_turn_cancelled_before_any_answer_is_taken_back(chat: Chat) -> None:
    chat.session.cancel()
    assert last(list(chat.send("hi?"))).reason == "cancelled"
    assert roles(chat) == "s"
    assert collect(chat.send("hi?")).text == "hello."


def test_a_failed_turn_leaves_the_conversation_as_it_was(chat: Chat) -> None:
    assert collect(chat.send("hi?")).text == "hello."
    before = [dict(m) for m in chat.messages]

    def broken(tokens: list[int]) -> int:
        raise NumericError("NaN", code="nan")

    works, chat.session.script = chat.session.script, broken  # type: ignore[attr-defined]
    with pytest.raises(NumericError):
        list(chat.send("more?"))
    with pytest.raises(ContextFull):
        chat.send("x" * 100 + "?")
    with pytest.raises(InvalidArgument):
        chat.send(" \n")
    assert chat.messages == before
    chat.session.script = works  # type: ignore[attr-defined]
    assert collect(chat.send("and?")).text == "yes indeed."


def test_a_full_context_ends_the_answer_and_keeps_it(chat: Chat) -> None:
    events = list(chat.send("x" * 50 + "?"))
    assert last(events).reason == "context"
    assert chat.messages[-1]["content"] == "yes inde"


# ---- going round in circles ----


def test_an_answer_that_repeats_itself_is_ended_and_says_so() -> None:
    script = "<think>so</think>Well. " + "again " * 500
    events = run(Scripted(says(script)), loop_limit=100)
    assert last(events).reason == "loop"
    assert collect(events).text == "Well." + (" again" * 100)[:100]
    assert last(run(Scripted(says(script)))).reason == "eog"  # nobody asked


def test_a_thought_that_repeats_itself_is_closed_and_answered() -> None:
    thought = "so:" + (" wait," * 100)[:100]
    forced = "x" * len(Bytes().encode(THINK_CLOSE, parse_special=True))  # what the closing comes in place of
    events = run(Scripted(says(f"<think>{thought}{forced}Yes.")), loop_limit=100)
    assert collect(events) == ("Yes.", thought)
    assert (last(events).reason, last(events).stats.thought_looped) == ("eog", True)
    events = run(Scripted(says("<think>" + "wait, " * 500)), loop_limit=100)  # and then the answer does, too
    assert (last(events).reason, last(events).stats.thought_looped) == ("loop", True)
    assert len(collect(events).text) == 100


def test_the_end_of_a_thought_is_told_at_once_with_its_tokens() -> None:
    events = run(Scripted(says("<think>why\n</think>\n\nbecause")))
    thought = [event for event in events if isinstance(event, Reasoning)]
    assert thought[-1].text == ""
    assert sum(len(event.tokens) for event in thought) == len("<think>why\n</think>")
