"""A share of ``make hostile-text``: hostile templates, special strings in content, long runs of a character."""

from __future__ import annotations

import time
from collections.abc import Callable

import pytest

from pyengine.chat import ChatTemplate
from tests.support import needs_data
from tests.text.hostile import (
    MARKED,
    TEMPLATES,
    UNITS,
    check_markers,
    check_run,
    check_template,
    run_checks,
    template_sources,
    tokenizer_named,
)
from tests.text.vocabularies import small_metadata

QUICK_SIZE = 1 << 17  # bytes of a run; quadratic work on it is well above the noise


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_hostile_template_ends_in_an_error_after_little_work_and_memory(name: str) -> None:
    assert check_template(TEMPLATES[name]) == ""


def test_the_check_of_templates_can_fail() -> None:
    assert "renders" in check_template("{{ messages[0].content }}")
    assert "template_raised" in check_template("{{ raise_exception('no') }}")


@needs_data
@pytest.mark.parametrize("name", MARKED)
def test_no_special_string_in_content_becomes_a_control_token(name: str) -> None:
    """Some of every vocabulary x template x marker x role x position; ``make hostile-text`` takes all of them."""
    sources = template_sources()
    for number, (template_name, source) in enumerate(sources.items()):
        found = list(check_markers(name, template_name, source, every=331 if name == "llama-bpe" else 37, start=number))
        assert len(found) >= 25
        assert [problem for problem in found if problem] == []


@needs_data
@pytest.mark.parametrize("unit", UNITS)
def test_a_long_run_takes_linear_time(unit: str) -> None:
    """Encoder, streaming decoder, reasoning splitter, stop strings, prompt; with room up to what is quadratic."""
    tokenizer = tokenizer_named("r1-distill-qwen")
    source = template_sources()["Qwen-Qwen3-0.6B.jinja"]
    template = ChatTemplate.from_metadata({"tokenizer.chat_template": source}, tokenizer)
    for what, prepare in run_checks(tokenizer, template).items():
        half, whole, linear = check_run(prepare, UNITS[unit], QUICK_SIZE)
        assert linear, f"{what}: {half:.3f} s for half, {whole:.3f} s for all"


def test_the_check_of_runs_can_fail() -> None:
    def prepare(power: int) -> Callable[[str], Callable[[], object]]:
        def work(text: str) -> None:
            end = time.process_time() + 0.4 * (len(text) / QUICK_SIZE) ** power
            while time.process_time() < end:
                pass

        return lambda text: lambda: work(text)

    assert check_run(prepare(1), "a", QUICK_SIZE)[2]
    assert not check_run(prepare(2), "a", QUICK_SIZE)[2]


def test_the_guard_is_what_keeps_markers_out() -> None:
    """Without it the same conversation has control ids: the check of markers sees them."""
    from pyengine.tokenizer import Tokenizer

    tokenizer = Tokenizer.from_metadata(small_metadata((("<|im_start|>", 3), ("<|im_end|>", 3))))
    text = "x<|im_end|>"
    assert tokenizer.special_strings["<|im_end|>"] in tokenizer.encode(text, parse_special=True)
    assert tokenizer.special_strings["<|im_end|>"] not in tokenizer.encode(text)
