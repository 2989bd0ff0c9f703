"""Sessions of one model take over each other's beginnings, and no logit shows it."""

from __future__ import annotations

import itertools

import pytest

from pyengine import End, Model, SamplerSettings
from pyengine.generate import generate
from pyengine.model import KV_TYPES
from tests.support import DATA, comparisons, needs_data, run_check

MODELS = [
    "stories260K-llama-256d-Q4_K_M.gguf",
    "stories260K-qwen2-256d-Q4_K_M.gguf",
    "stories260K-qwen3-256d-Q8_0.gguf",
]
TEXT = [3 + (7 * i * i + 3 * i) % 400 for i in range(300)]
BLOCK = 64  # PrefixCache::kBlock


@needs_data
def test_what_is_taken_over_equals_what_a_cold_session_computes_even_if_every_hash_is_the_same() -> None:
    assert comparisons(run_check("prefix_check", *(DATA / "gguf" / name for name in MODELS))) > 2000


@needs_data
@pytest.mark.parametrize("name", MODELS)
def test_a_session_takes_over_what_living_and_closed_sessions_held(name: str) -> None:
    with Model.open(DATA / "gguf" / name) as model:
        for kv_type, cut in itertools.product(KV_TYPES, (1, 63, 64, 65, 200, 299)):
            text = [*TEXT[:cut], 499 - TEXT[cut], *TEXT[cut + 1 :]]
            with (
                Model.open(DATA / "gguf" / name, prefix_bytes=0) as alone,
                alone.session(n_ctx=300, threads=1, kv_type=kv_type) as cold,
            ):
                expected = cold.eval(text).tobytes()
            with model.session(n_ctx=310, threads=1, kv_type=kv_type) as first:
                first.prefill(TEXT)
                with model.session(n_ctx=300, threads=2, kv_type=kv_type) as second:
                    held = second.reuse(text)
                    assert held >= cut
                    assert second.tokens == text[:held]
                    assert second.eval(text[held:]).tobytes() == expected
                    assert first.tokens == TEXT
            with model.session(n_ctx=305, threads=1, kv_type=kv_type) as third:
                held = third.reuse(text)
                assert held >= (300 - 1) // BLOCK * BLOCK
                assert third.eval(text[held:]).tobytes() == expected


@needs_data
def test_going_on_to_another_text_and_back_evaluates_the_first_only_once() -> None:
    with Model.open(DATA / "gguf" / MODELS[0]) as model, model.session(n_ctx=400, threads=1) as session:
        expected = session.eval(TEXT).tobytes()
        assert session.reuse([5] * 100) == 0
        session.prefill([5] * 100)
        held = session.reuse(TEXT)
        assert held == len(TEXT) // BLOCK * BLOCK
        assert session.eval(TEXT[held:]).tobytes() == expected


@needs_data
def test_nothing_is_shared_where_it_is_not_wanted() -> None:
    with Model.open(DATA / "gguf" / MODELS[0], prefix_bytes=0) as model, model.session(threads=1) as first:
        first.prefill(TEXT)
        with model.session(threads=1) as second:
            assert second.reuse(TEXT) == 0


@needs_data
def test_a_second_conversation_with_the_same_instructions_reads_only_what_is_new() -> None:
    with Model.open(DATA / "gguf" / MODELS[1]) as model:
        stats = []
        for question in ([7, 8, 9], [17, 18]):
            with model.session(n_ctx=400, threads=1) as session:
                *_, end = generate(session, [*TEXT, *question], SamplerSettings(seed=1), max_tokens=10)
                assert isinstance(end, End)
                stats.append(end.stats)
        assert stats[0].reused_tokens == 0
        assert stats[1].reused_tokens == len(TEXT) // BLOCK * BLOCK
