"""Generation with a real model: golden text, and one text for one seed whatever is in the cache."""

from __future__ import annotations

import gc
import json
import threading
from collections.abc import Iterator

import pytest

from pyengine import Chat, End, Model, SamplerSettings
from pyengine.generate import collect, generate
from tests.support import DATA, needs_data

pytestmark = needs_data


@pytest.fixture(scope="module")
def model() -> Iterator[Model]:
    with Model.open(DATA / "gguf" / "stories260K-llama-F32.gguf") as opened:
        yield opened


def test_greedy_text_is_the_expected_one(model: Model) -> None:
    golden = json.loads((DATA / "golden" / "golden.json").read_text())["stories260K"]
    n = len(golden["greedy_ids"])
    with model.session(threads=1) as session:
        events = list(generate(session, golden["prompt_ids"], SamplerSettings(temperature=0.0), max_tokens=n))
    assert [token.id for event in events for token in event.tokens] == golden["greedy_ids"]
    assert collect(events).text.strip() == golden["text"].strip()


def test_one_seed_one_text_whatever_the_cache_holds(model: Model) -> None:
    settings = SamplerSettings(seed=3, temperature=1.0, repeat_penalty=1.1, dry_multiplier=0.5)
    prompt = model.tokenizer.encode("One day, a little boy found")

    def text(warm: list[int], **options: int) -> tuple[list[int], int]:
        with model.session(**options) as session:
            if warm:
                session.eval(warm)
            events = list(generate(session, prompt, settings, max_tokens=40))
        assert isinstance(events[-1], End)
        return [t.id for e in events for t in e.tokens], events[-1].stats.reused_tokens

    fresh, reused = text([], threads=1)
    assert reused == 0
    for n in (1, len(prompt) // 2, len(prompt)):
        warm, reused = text([*prompt[:n], 7, 8, 9], threads=2, chunk=3)
        assert warm == fresh
        assert reused == min(n, len(prompt) - 1)


def test_cancel_from_another_thread(model: Model) -> None:
    with model.session(threads=1) as session:
        stream = generate(session, "Once upon a time", SamplerSettings(seed=1))
        events = [next(stream)]
        thread = threading.Thread(target=session.cancel)
        thread.start()
        thread.join()
        events += stream
        assert isinstance(events[-1], End)
        assert events[-1].reason == "cancelled"
        more = list(generate(session, "Once upon a time", SamplerSettings(temperature=0.0), max_tokens=5))
        assert collect(more).text == ", there was a little"


def test_a_stream_may_be_dropped_after_its_session_is_closed(model: Model) -> None:
    with model.session(threads=1) as session:
        stream = generate(session, "Once upon a time", SamplerSettings(seed=1))
        next(stream)
    del stream  # what a generator raises here cannot be caught; pytest makes it an error
    gc.collect()


def test_a_chat_evaluates_only_what_is_new(model: Model) -> None:
    template = "{{ bos_token }}{% for m in messages %}{{ m.content }}\n{% endfor %}"
    settings = SamplerSettings(temperature=0.0)
    with Chat(model, system="A story.", template=template, settings=settings, max_tokens=20) as chat:
        first = collect(chat.send("Once upon a time"))
        second = list(chat.send("Then Lily"))
        end = second[-1]
        assert isinstance(end, End)
        assert end.stats.prompt_tokens > end.stats.reused_tokens >= 20
        assert [m["role"] for m in chat.messages] == ["system", "user", "assistant", "user", "assistant"]
        assert chat.messages[2]["content"] == first.text
    with Chat(model, system="A story.", template=template, settings=settings, max_tokens=20) as other:
        other.messages = chat.messages[:3]
        assert collect(other.send("Then Lily")) == collect(second)
