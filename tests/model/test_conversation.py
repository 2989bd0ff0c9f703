"""Conversations that evaluate only what is new, and what happens when they are longer than the context."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest

from pyengine import Chat, ContextFull, End, InvalidArgument, Model, SamplerSettings, demo_model_path
from pyengine.chat import build_prompt
from pyengine.errors import Cancelled
from pyengine.events import Event, Reasoning, Shifted, Stats, collect
from tests.support import DATA, needs_data

QUESTIONS = (
    "Tom has 48 apples and buys 27 more. How many apples does he have now?",
    "And if he gives 19 away?",
    "What is 12 + 30?",
    "Anna has 5 pens. She buys 6 more. How many?",
)


@pytest.fixture(scope="module")
def model() -> Iterator[Model]:
    with Model.open(demo_model_path(), prefix_bytes=0) as opened:
        yield opened


def talk(chat: Chat, text: str) -> tuple[list[Event], Stats]:
    events = list(chat.send(text))
    assert isinstance(events[-1], End)
    return events, events[-1].stats


def ids(events: list[Event]) -> list[int]:
    return [token.id for event in events for token in event.tokens]


# ---- only what is new ----


def test_a_turn_evaluates_the_last_answer_and_the_new_message_though_reasoning_is_dropped(model: Model) -> None:
    with model.session(n_ctx=1024, threads=1) as session:
        chat = Chat(model, session=session)
        for question in QUESTIONS:
            before = chat.messages[:]
            events, stats = talk(chat, question)
            assert any(isinstance(event, Reasoning) for event in events)
            if not before:
                continue
            # Known are the turns before the last one, and the last message: what follows it lost its reasoning.
            answer = before[-1]["content"]
            fresh = model.tokenizer.encode(answer, add_special=False) + model.tokenizer.encode(question)
            assert stats.prompt_tokens - stats.reused_tokens <= len(fresh) + 6  # markers around them
            thoughts = [m["reasoning_content"] for m in chat.messages if m["role"] == "assistant"]
            assert not any(thought in chat.build(chat.messages).text for thought in thoughts)


def test_after_reading_ahead_a_turn_evaluates_the_new_message_alone(model: Model) -> None:
    with model.session(n_ctx=1024, threads=1) as session, model.session(n_ctx=1024, threads=1) as other:
        settings = SamplerSettings(seed=8)
        chat, plain = (Chat(model, session=s, settings=settings) for s in (session, other))
        for question in QUESTIONS:
            n_history = len(chat.build(chat.messages, add_generation_prompt=False).ids) if chat.messages else 0
            events, stats = talk(chat, question)
            assert ids(events) == ids(talk(plain, question)[0])  # nothing but the counts is different
            assert stats.reused_tokens == n_history
            message = build_prompt(chat.template, chat.tokenizer, [{"role": "user", "content": question}]).ids
            assert stats.prompt_tokens - stats.reused_tokens <= len(message)
            assert chat.read_ahead() > 0
            assert chat.read_ahead() == 0


def test_reading_ahead_ends_with_the_block_and_leaves_the_session_usable(model: Model) -> None:
    with model.session(n_ctx=1024, threads=1) as session:
        chat = Chat(model, session=session, settings=SamplerSettings(seed=8))
        expected = [ids(talk(chat, question)[0]) for question in QUESTIONS[:2]]
        chat.clear()
        for question, wanted in zip(QUESTIONS, expected, strict=False):
            with chat.reading_ahead():
                pass
            assert ids(talk(chat, question)[0]) == wanted
        session.cancel()
        with pytest.raises(Cancelled):
            chat.read_ahead()
        assert threading.active_count() < 5


@needs_data
def test_what_the_model_wrote_in_unusual_tokens_is_not_evaluated_again() -> None:
    template = (
        "{% for m in messages %}{{ bos_token + m.content }}{% endfor %}"
        "{% if add_generation_prompt %}{{ bos_token }}{% endif %}"
    )
    with Model.open(DATA / "gguf" / "stories260K-llama-F32.gguf", prefix_bytes=0) as model:
        unusual = 0
        for seed in range(8):
            with model.session(n_ctx=512, threads=1) as session:
                chat = Chat(
                    model,
                    session=session,
                    template=template,
                    settings=SamplerSettings(seed=seed, temperature=1.6, top_k=0, top_p=1.0, min_p=0.0),
                    max_tokens=60,
                )
                first, _ = talk(chat, "Once upon a time")
                held = session.tokens
                usual = model.tokenizer.encode(model.tokenizer.decode(held), add_special=True)
                unusual += usual != held
                if collect(first).text != collect(first).text.rstrip("\ufffd"):
                    continue  # cut inside a character: the text cannot be what was written
                _, stats = talk(chat, "Then Lily")
                assert stats.reused_tokens == len(held), seed
        assert unusual > 0  # else this proves nothing


# ---- longer than the context ----


def test_stop_ends_the_answer_and_keeps_it(model: Model) -> None:
    with model.session(n_ctx=64, threads=1) as session:
        chat = Chat(model, session=session)
        events, stats = talk(chat, QUESTIONS[0])
        assert events[-1].reason == "context"  # type: ignore[union-attr]
        assert stats.context_used == stats.context_size == 64
        with pytest.raises(ContextFull, match=r"the prompt has \d+ tokens, the context holds 64"):
            chat.send("word " * 100)


def test_error_takes_the_turn_back_with_the_numbers(model: Model) -> None:
    with model.session(n_ctx=64, threads=1) as session:
        chat = Chat(model, session=session, overflow="error", system="Be brief.")
        with pytest.raises(ContextFull, match=r"64 tokens is full: the prompt took \d+, the answer \d+"):
            list(chat.send(QUESTIONS[0]))
        assert [m["role"] for m in chat.messages] == ["system"]


def test_shift_drops_the_oldest_turns_says_so_and_keeps_the_system_prompt(model: Model) -> None:
    with model.session(n_ctx=160, threads=1) as session:
        chat = Chat(model, session=session, overflow="shift", system="Be brief.")
        shifts = 0
        for turn in range(12):
            events, stats = talk(chat, QUESTIONS[turn % 4])
            assert events[-1].reason == "eog", turn  # type: ignore[union-attr]
            assert stats.context_used <= 160
            assert 0 <= stats.reused_tokens < stats.prompt_tokens
            assert stats.prefill_rate > 0
            assert stats.generated_tokens == len(ids(events))
            for event in events:
                if isinstance(event, Shifted):
                    shifts += 1
                    assert event.dropped_messages % 2 == 0
                    assert event.dropped_messages > 0
                    assert event.freed_tokens > 0
                    assert event.prompt_tokens <= 160 * 3 // 4
                    assert event.context_size == 160
            shown = chat.shown(chat.messages)
            assert shown[0] == {"role": "system", "content": "Be brief."}
            assert shown[1]["role"] == "user"
            assert shown[-1] == chat.messages[-1]
            assert len(chat.messages) == 1 + 2 * (turn + 1)  # none is lost to the user
        assert shifts >= 2
        assert chat.dropped > 0


def test_a_shifted_answer_is_that_of_a_conversation_without_the_dropped_turns(model: Model) -> None:
    """No cached key is moved: after a shift everything is evaluated where it stands now."""
    greedy = SamplerSettings(temperature=0.0)
    with model.session(n_ctx=160, threads=1) as session, model.session(n_ctx=160, threads=1) as fresh:
        chat = Chat(model, session=session, overflow="shift", settings=greedy)
        compared = 0
        for turn in range(10):
            before = chat.messages[:]
            events, _ = talk(chat, QUESTIONS[turn % 4])
            if isinstance(events[0], Shifted):  # before the answer: the whole answer was given after the shift
                fresh.truncate(0)
                short = Chat(model, session=fresh, settings=greedy)
                short.messages = before[chat.dropped :]
                assert ids(talk(short, QUESTIONS[turn % 4])[0]) == ids(events)
                compared += 1
            else:
                for at, event in enumerate(events):
                    if isinstance(event, Shifted):  # in the middle: what follows continues the shorter prompt
                        n = len(ids(events[:at]))
                        prompt = chat.build([*before, {"role": "user", "content": QUESTIONS[turn % 4]}]).ids
                        with model.session(n_ctx=160, threads=1) as again:
                            tokens = prompt + ids(events)[:n]
                            for expected in ids(events)[n:]:
                                logits = again.eval(tokens)
                                assert int(logits[: model.tokenizer.n_vocab].argmax()) == expected
                                tokens = [expected]
                        compared += 1
        assert compared >= 2


def test_a_single_turn_longer_than_the_context_ends_as_without_shift(model: Model) -> None:
    with model.session(n_ctx=48, threads=1) as session:
        chat = Chat(model, session=session, overflow="shift")
        events, _ = talk(chat, QUESTIONS[0])
        assert events[-1].reason == "context"  # type: ignore[union-attr]
        with pytest.raises(ContextFull):
            chat.send("word " * 100)
        assert chat.dropped == 0
        with pytest.raises(InvalidArgument, match="stop, shift, error"):
            Chat(model, session=session, overflow="slide")  # type: ignore[arg-type]
