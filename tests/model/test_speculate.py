"""Speculation changes nothing but the time: the same events, ids, ends and session with any drafter and with none."""

from __future__ import annotations

import dataclasses
import itertools
import random
from collections.abc import Callable, Sequence

import numpy as np
import pytest

from pyengine import End, InvalidArgument, Model, NumericError, SamplerSettings, Session
from pyengine.generate import Event, Text, generate
from pyengine.model import KV_TYPES
from pyengine.speculate import MAX_DRAFT, Gate, Lookahead, ModelDrafter, NgramDrafter, check_same_vocabulary
from tests.model.test_generate import GREEDY, Bytes, Scripted, ids, last, says
from tests.support import DATA, needs_data

MODELS = [
    "stories260K-llama-256d-Q4_K_M.gguf",
    "stories260K-qwen2-256d-Q4_K_M.gguf",
    "stories260K-qwen3-256d-Q8_0.gguf",
]
PROMPTS = ["Once upon a time", "The cat sat. The cat sat. The cat", "Tom said: one, two, three. Tom said: one,"]
SETTINGS = [
    SamplerSettings(seed=0, temperature=0.0),
    SamplerSettings(seed=1),
    SamplerSettings(seed=2, temperature=0.6, min_p=0.0),
    SamplerSettings(seed=3, temperature=1.5, top_k=0, repeat_penalty=1.2, presence_penalty=0.3),
    SamplerSettings(seed=4, dry_multiplier=0.8, xtc_probability=0.3, top_logprobs=2),
]


class Guesses:
    """Guesses from a known text; each guess is spoilt with a probability. Does not ask what it costs."""

    def __init__(self, text: Sequence[int], spoilt: float, seed: int = 0, n: int = MAX_DRAFT) -> None:
        self.text = list(text)
        self.spoilt = spoilt
        self.random = random.Random(seed)
        self.n = n

    def propose(self, history: Sequence[int], gate: Gate, limit: int) -> Sequence[int]:
        assert limit >= 1
        n = min(self.random.randint(0, self.n), limit)
        guesses = self.text[len(history) : len(history) + n]
        return [g if self.random.random() >= self.spoilt else self.random.randrange(3, 200) for g in guesses]


class Eager(NgramDrafter):
    """Guesses wherever it can."""

    def propose(self, history: Sequence[int], gate: Gate, limit: int) -> Sequence[int]:
        self._rates = [1.0] * 6
        return super().propose(history, Gate(), limit)


def outcome(session: Session, events: Sequence[Event]) -> tuple[object, ...]:
    """All that a program can see of a generation but the time and the work it took."""
    end = events[-1]
    assert isinstance(end, End)
    stats = dataclasses.replace(
        end.stats,
        reused_tokens=0,
        prefill_seconds=0,
        decode_seconds=0,
        decode_steps=0,
        drafted_tokens=0,
        accepted_tokens=0,
    )
    return [*events[:-1], dataclasses.replace(end, stats=stats)], session.tokens  # type: ignore[return-value]


@needs_data
@pytest.mark.parametrize("name", MODELS)
def test_the_text_is_the_same_to_the_last_bit_with_any_drafter(name: str) -> None:
    options: list[dict[str, object]] = [
        {"max_tokens": 40},
        {"max_tokens": 60, "stop": ["the", "!"]},
        {"n_ctx": 48},
        {"max_tokens": 50, "starts_in_reasoning": True, "think_budget": 7},
    ]
    seen = set()
    with Model.open(DATA / "gguf" / name) as model:
        for (i, settings), prompt, option in itertools.product(enumerate(SETTINGS), PROMPTS, options):
            option = dict(option)
            n_ctx = int(option.pop("n_ctx", 128))  # type: ignore[call-overload]
            with model.session(n_ctx=n_ctx, threads=1) as session:

                def run(
                    speculate: object,
                    session: Session = session,
                    prompt: str = prompt,
                    settings: SamplerSettings = settings,
                    option: dict[str, object] = option,
                ) -> tuple[object, ...]:
                    session.truncate(0)
                    return outcome(session, list(generate(session, prompt, settings, speculate=speculate, **option)))  # type: ignore[arg-type]

                expected = run("off")
                text = [*expected[1], *[t.id for e in expected[0] for t in e.tokens][-1:]]  # type: ignore[attr-defined,misc,has-type]
                for drafter in ("ngram", Eager(), Guesses(text, 0.0), Guesses(text, 0.3, i), Guesses(text, 1.0, i)):
                    assert run(drafter) == expected, (settings, prompt, option, drafter)
                seen.add(expected[0][-1].reason)  # type: ignore[index]
    assert seen >= {"length", "stop", "context"}


@needs_data
@pytest.mark.parametrize("name", MODELS)
def test_the_text_is_the_same_over_threads_chunks_and_speculation_for_every_cache_type(name: str) -> None:
    prompt = PROMPTS[1] * 4  # longer than every chunk but the last
    with Model.open(DATA / "gguf" / name) as model:
        for kv_type, settings in itertools.product(KV_TYPES, SETTINGS[:2]):
            expected = None
            for threads, chunk in ((1, 0), (1, 3), (2, 1), (2, 32), (3, 7), (4, 128), (7, 32)):
                with model.session(n_ctx=192, threads=threads, chunk=chunk, kv_type=kv_type) as session:
                    for speculate in ("off", "ngram", Eager()):
                        session.truncate(0)
                        events = list(generate(session, prompt, settings, max_tokens=60, speculate=speculate))
                        seen = outcome(session, events)
                        expected = expected or seen
                        assert seen == expected, (threads, chunk, kv_type, settings, speculate)


@needs_data
def test_guesses_that_are_right_need_no_evaluation_of_their_own() -> None:
    with Model.open(DATA / "gguf" / MODELS[0]) as model, model.session(n_ctx=128, threads=1) as session:
        plain = list(generate(session, PROMPTS[0], SETTINGS[1], max_tokens=46, speculate="off"))
        text = [*session.tokens, ids(plain)[-1]]
        session.truncate(0)

        class All(Guesses):
            def propose(self, history: Sequence[int], gate: Gate, limit: int) -> Sequence[int]:
                return self.text[len(history) : len(history) + min(limit, MAX_DRAFT)]

        stats = last(list(generate(session, PROMPTS[0], SETTINGS[1], max_tokens=46, speculate=All(text, 0.0)))).stats
        assert (stats.drafted_tokens, stats.accepted_tokens, stats.decode_steps) == (40, 40, 5)
        assert stats.decode_rate == pytest.approx(45 / stats.decode_seconds)


@needs_data
def test_a_draft_model_changes_no_text_and_its_cache_stays_in_step() -> None:
    with (
        Model.open(DATA / "gguf" / MODELS[0]) as model,
        Model.open(DATA / "gguf" / "stories260K-llama-F32.gguf") as small,
        model.session(n_ctx=256, threads=1) as session,
        small.session(n_ctx=200, threads=1) as draft,
    ):
        drafter = ModelDrafter(model, draft)
        accepted = 0
        for settings, prompt in itertools.product(SETTINGS, PROMPTS):
            session.truncate(0)
            expected = outcome(session, list(generate(session, prompt, settings, max_tokens=100, speculate="off")))
            for _ in range(2):
                session.truncate(0)
                drafter._rate, drafter._pause = 1.0, 0  # whatever it costs here
                events = list(generate(session, prompt, settings, max_tokens=100, speculate=drafter))
                assert outcome(session, events) == expected
                accepted += last(events).stats.accepted_tokens
        assert accepted > 100


@needs_data
def test_a_draft_model_of_another_vocabulary_is_refused_with_the_difference() -> None:
    from pyengine import demo_model_path

    with Model.open(DATA / "gguf" / MODELS[0]) as model, Model.open(demo_model_path()) as other:
        check_same_vocabulary(model, model)
        with pytest.raises(
            InvalidArgument, match=r"token \d+ is .* in the model and .* in the draft model|has \d+ tokens"
        ):
            check_same_vocabulary(model, other)


class Vocabulary:
    def __init__(self, tokens: list[str], types: list[int]) -> None:
        self.metadata = {"tokenizer.ggml.tokens": tokens, "tokenizer.ggml.token_type": np.array(types)}


def test_unused_ids_at_the_end_do_not_make_another_vocabulary() -> None:
    short = Vocabulary(["a", "b"], [1, 1])
    for types, same in (([1, 1, 5, 5], True), ([1, 1, 5, 1], False)):
        padded = Vocabulary(["a", "b", "[PAD]", "c"], types)
        for pair in ((short, padded), (padded, short)):
            if same:
                check_same_vocabulary(*pair)  # type: ignore[arg-type]
            else:
                with pytest.raises(InvalidArgument, match=r"4 tokens.*2|2 tokens.*4"):
                    check_same_vocabulary(*pair)  # type: ignore[arg-type]


def test_cancel_is_met_between_tokens_that_are_already_verified() -> None:
    text = "a long story"
    session = Scripted(says(text))
    events: list[Event] = []
    for event in generate(
        session, "abc", GREEDY, tokenizer=Bytes(), speculate=Guesses([*b"abc", *text.encode()], 0.0, 3)
    ):
        events.append(event)
        if isinstance(event, Text) and "".join(e.text for e in events if isinstance(e, Text)) == "a lo":
            session.cancel()
    assert last(events).reason == "cancelled"
    assert bytes(ids(events)) == b"a lo"
    assert session.tokens == list(b"abca l")


@pytest.mark.parametrize("n_taken", range(1, 10))
def test_leaving_early_leaves_only_what_was_taken_in_the_session(n_taken: int) -> None:
    session = Scripted(says("a long story"))
    guesses = Guesses(b"abca long story", 0.0, n_taken)
    stream = generate(session, "abc", GREEDY, tokenizer=Bytes(), speculate=guesses)
    for _ in range(n_taken):
        next(stream)
    stream.close()  # type: ignore[attr-defined]
    assert session.tokens == list(b"abca long story"[: 3 + n_taken - 1])


def test_a_stream_left_behind_does_not_touch_a_session_that_went_on() -> None:
    session = Scripted(says("a long story"))

    class All(Guesses):
        def propose(self, history: Sequence[int], gate: Gate, limit: int) -> Sequence[int]:
            return self.text[len(history) : len(history) + 5]

    stale = generate(session, "abc", GREEDY, tokenizer=Bytes(), speculate=All(b"abca long story", 0.0))
    next(stale), next(stale)
    assert len(session) == 9
    session.truncate(2)
    session.prefill([1, 2, 3])
    stale.close()  # type: ignore[attr-defined]
    assert session.tokens == [*b"ab", 1, 2, 3]


def test_guesses_that_damage_the_logits_are_dropped_not_reported() -> None:
    session = Scripted(says("abcd"))
    evaluate = session.eval

    def fragile(tokens: Sequence[int], all_logits: bool = False, out: np.ndarray | None = None) -> np.ndarray:
        if 200 in tokens:
            raise NumericError("NaN", code="not_finite")
        return evaluate(tokens, all_logits, out)

    session.eval = fragile  # type: ignore[method-assign]

    class Harmful:
        def propose(self, history: Sequence[int], gate: Gate, limit: int) -> Sequence[int]:
            return [200]

    events = list(generate(session, "abc", GREEDY, tokenizer=Bytes(), speculate=Harmful()))
    assert bytes(ids(events)[:-1]) == b"abcd"
    assert last(events).stats.drafted_tokens == 0


def test_an_unknown_way_to_speculate_is_refused() -> None:
    with pytest.raises(InvalidArgument, match="ngram") as error:
        generate(Scripted(says("x")), "abc", tokenizer=Bytes(), speculate="fast")  # type: ignore[arg-type]
    assert error.value.field == "speculate"


# ---- when to guess ----


def simulate(text: Sequence[int], n_prompt: int, cost: Callable[[int], float], drafter: object) -> tuple[float, int]:
    """(evaluations' cost, in single ones, of saying ``text`` after the prompt; guesses made), by the real code."""
    clock = [0.0]

    class Clocked:
        n_ctx = 10**6

        def __init__(self) -> None:
            self.n = 0

        def eval(self, tokens: Sequence[int], all_logits: bool = False, out: object = None) -> np.ndarray:
            clock[0] += cost(len(tokens))
            self.n += len(tokens)
            return np.zeros((len(tokens), 1), np.float32) if all_logits else np.zeros(1, np.float32)

        def truncate(self, n: int) -> None:
            self.n = n

        def check_cancel(self) -> None: ...
        def __len__(self) -> int:
            return self.n

    import pyengine.speculate

    real, pyengine.speculate.time.perf_counter = pyengine.speculate.time.perf_counter, lambda: clock[0]
    try:
        ahead = Lookahead(Clocked(), drafter)  # type: ignore[arg-type]
        ahead.after(list(text[:n_prompt]), text[:n_prompt], None)
        clock[0] = 0.0
        for at in range(n_prompt, len(text)):
            ahead.after([text[at]], text[: at + 1], None)
    finally:
        pyengine.speculate.time.perf_counter = real
    return clock[0] / cost(1), ahead.n_drafted


FLAT, STEEP = (lambda n: 1 + 0.1 * (n - 1)), (lambda n: 1 + 0.9 * (n - 1))


def test_repeated_text_takes_far_fewer_evaluations() -> None:
    rng = random.Random(1)
    original = [rng.randrange(5000) for _ in range(400)]
    edited = [t if rng.random() > 0.03 else rng.randrange(5000) for t in original]
    seconds, drafted = simulate([*original, *edited], 400, FLAT, NgramDrafter())
    assert drafted > 100
    assert 400 / seconds > 2.0
    seconds, _ = simulate([*original, *edited], 400, lambda n: 1 + 0.35 * (n - 1), NgramDrafter())
    assert 400 / seconds > 1.3


@pytest.mark.parametrize("cost", [FLAT, STEEP, lambda n: 1.2 * n], ids=["cheap", "dear", "hopeless"])
def test_text_without_repeats_loses_nothing_whatever_guesses_cost(cost: Callable[[int], float]) -> None:
    rng = random.Random(2)
    words = [rng.randrange(40) for _ in range(3000)]  # every pair occurs again, and says nothing about what follows
    seconds, _ = simulate(words, 200, cost, NgramDrafter())
    assert seconds / 2800 < 1.03


def test_dear_evaluations_are_not_tried_again_and_again_even_for_good_guesses() -> None:
    pattern = [random.Random(3).randrange(5000) for _ in range(50)]
    seconds, drafted = simulate(pattern * 40, 50, lambda n: 1.2 * n, NgramDrafter())
    assert drafted > 0  # it did try
    assert seconds / 1950 < 1.03


def test_one_disturbed_measurement_does_not_end_speculation() -> None:
    pattern = [random.Random(3).randrange(5000) for _ in range(50)]
    calls = itertools.count()
    seconds, _ = simulate(pattern * 40, 50, lambda n: 30.0 if n > 1 and next(calls) == 0 else FLAT(n), NgramDrafter())
    assert 1950 / seconds > 2.0


def test_a_loop_is_guessed_beyond_its_first_turn() -> None:
    drafter = NgramDrafter()
    history = [1, 2, 3] * 5
    assert list(drafter.propose(history, Gate(), 8))[:6] == [1, 2, 3, 1, 2, 3]
