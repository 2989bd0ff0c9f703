"""Reasoning is told from the answer, however the text is cut; the R1 profile follows from what a file says."""

from __future__ import annotations

import itertools
import math
import random

import numpy as np
import pytest

from pyengine.errors import FormatError
from pyengine.reasoning import ReasoningSplitter, reasoning_profile, split_reasoning
from pyengine.sampling import SamplerSettings
from tests.support import DATA, needs_data
from tests.text.vocabularies import from_hf

REPLIES = [
    # text, prompt opened the section, reasoning, answer
    ("<think>\nab\n</think>\n\nHi", False, "ab", "Hi"),
    ("ab\n</think>\n\nHi", True, "ab", "Hi"),
    ("\nab</think>Hi", True, "ab", "Hi"),
    ("<think>\nab</think>Hi", True, "ab", "Hi"),  # the model repeats the marker the prompt ended with
    (" \n<think>a\n\nb</think> \n \n  code", False, "a\n\nb", "  code"),
    ("<think>\n\n</think>\n\nHi", False, "", "Hi"),
    ("Hi <b>\n", False, "", "Hi <b>\n"),
    ("\n\nHi", False, "", "\n\nHi"),
    ("Hi <think>x</thin", False, "", "Hi <think>x</thin"),
    ("<thin", False, "", "<thin"),
    ("<thin", True, "<thin", ""),
    ("<think>a</thin\n\n", False, "a</thin\n\n", ""),  # cut off inside
    ("<think>a<</think></think>", False, "a<", "</think>"),
    ("<think>a</think>b<think>c</think>", False, "a", "b<think>c</think>"),
    ("", False, "", ""),
    ("", True, "", ""),
    ("<think>", False, "", ""),
    ("a</think>\n", True, "a", ""),
    ("<think>é👩\u200d👧\n</think>\nß", False, "é👩\u200d👧", "ß"),
]


def run(pieces: list[str], opened: bool) -> tuple[str, str]:
    splitter = ReasoningSplitter(opened)
    parts = [part for piece in pieces for part in splitter.feed(piece)] + splitter.flush()
    assert all(text for _, text in parts)
    kinds = [kind for kind, _ in itertools.groupby(parts, key=lambda part: part[0])]
    assert kinds in ([], [True], [False], [True, False])  # never back
    return tuple("".join(text for is_reasoning, text in parts if is_reasoning is kind) for kind in (True, False))  # type: ignore[return-value]


def cuttings(text: str) -> list[list[str]]:
    """Every cutting of a short text; of a longer one all at up to two places, single characters, and some more."""
    n = len(text)
    if n <= 11:
        choices = itertools.chain.from_iterable(itertools.combinations(range(1, n), k) for k in range(n))
    else:
        rng = random.Random(text)
        few = itertools.chain.from_iterable(itertools.combinations(range(1, n), k) for k in range(3))
        more = (tuple(sorted(rng.sample(range(1, n), rng.randrange(3, n)))) for _ in range(300))
        choices = itertools.chain(few, more, [tuple(range(1, n))])
    return [[text[i:j] for i, j in itertools.pairwise((0, *cuts, n))] for cuts in choices]


@pytest.mark.parametrize(("text", "opened", "reasoning", "answer"), REPLIES)
def test_the_split_does_not_depend_on_the_pieces(text: str, opened: bool, reasoning: str, answer: str) -> None:
    assert split_reasoning(text, opened) == (reasoning, answer)
    for pieces in cuttings(text):
        assert run(pieces, opened) == (reasoning, answer), pieces


def test_any_text_is_split_alike_under_any_cutting() -> None:
    rng = random.Random(5)
    parts = ["<think>", "</think>", "<", "</", "think>", "\n", " ", "a", "b\n\n", "é"]
    for _ in range(400):
        text = "".join(rng.choices(parts, k=rng.randrange(9)))
        for opened in (False, True):
            whole = run([text], opened)
            for _ in range(6):
                cuts = sorted(rng.sample(range(len(text) + 1), min(len(text), 4)))
                pieces = [text[i:j] for i, j in itertools.pairwise((0, *cuts, len(text)))]
                assert run(pieces, opened) == whole == run(list(text), opened)


def test_a_lone_closing_marker_is_noticed() -> None:
    splitter = ReasoningSplitter()
    assert splitter.feed("ab\n</think>\n\nHi") == [(False, "ab\n"), (False, "Hi")]
    assert splitter.lone_closer
    assert split_reasoning("ab\n</think>\n\nHi") == ("ab", "Hi")


def test_text_is_not_held_back_longer_than_needed() -> None:
    splitter = ReasoningSplitter()
    assert splitter.feed("Hello") == [(False, "Hello")]
    assert splitter.feed(" </b") == [(False, " </b")]
    assert splitter.feed("<") == []
    assert splitter.feed("i>") == [(False, "<i>")]
    assert not splitter.in_reasoning
    splitter = ReasoningSplitter(True)
    assert splitter.in_reasoning
    assert splitter.feed("so") == [(True, "so")]
    assert splitter.in_reasoning
    splitter.feed("</think>")
    assert not splitter.in_reasoning


@needs_data
@pytest.mark.parametrize("name", ["qwen3", "r1-distill-qwen"])
def test_markers_work_as_one_token_and_as_several(name: str) -> None:
    tokenizer = from_hf(name)
    text = "<think>\nTwo and two.\n</think>\n\n4 👍"
    for parse in (True, False):
        ids = tokenizer.encode(text, add_special=False, parse_special=parse)
        assert (tokenizer.token_id("<think>") in ids) is parse
        stream = tokenizer.stream()
        assert run([*map(stream.feed, ids), stream.flush()], False) == ("Two and two.", "4 👍")


# --- the profile ---


@needs_data
@pytest.mark.parametrize(
    "name",
    [
        "DeepSeek-R1-Distill.official.jinja",
        "deepseek-ai-DeepSeek-R1-Distill-Llama-8B.jinja",
        "deepseek-ai-DeepSeek-R1-Distill-Qwen-32B.jinja",
        "llama-cpp-deepseek-r1.jinja",
    ],
)
def test_r1_is_known_by_its_template(name: str) -> None:
    template = (DATA / "templates" / name).read_text(encoding="utf-8")
    profile = reasoning_profile({"general.name": "Model", "tokenizer.chat_template": template})
    assert profile.is_r1
    assert profile.reasons
    assert profile.sampling == {"temperature": 0.6, "top_p": 0.95, "min_p": 0.0, "repeat_penalty": 1.0}
    assert any("template" in line for line in profile.evidence)
    SamplerSettings(**profile.sampling)  # every name is one of the sampler's


@pytest.mark.parametrize(
    "name", ["DeepSeek R1 Distill Llama 8B", "DeepSeek-R1-0528-Qwen3-8B", "deepseek_r1", "R1-Distill-Qwen-7B"]
)
def test_r1_is_known_by_its_name(name: str) -> None:
    assert reasoning_profile({"general.name": name}).is_r1
    assert reasoning_profile({"general.name": "x", "general.basename": name}).is_r1


@needs_data
def test_other_models_are_not_r1() -> None:
    qwen3 = (DATA / "templates" / "Qwen-Qwen3-0.6B.jinja").read_text(encoding="utf-8")
    profile = reasoning_profile({"general.name": "Qwen3 8B"}, qwen3)
    assert (profile.reasons, profile.is_r1, profile.sampling) == (True, False, {})
    llama = (DATA / "templates" / "meta-llama-Llama-3.1-8B-Instruct.jinja").read_text(encoding="utf-8")
    for name in ("Llama 3.1 8B Instruct", "DeepSeek LLM 7B", "DeepSeek V3", "Granite R100"):
        profile = reasoning_profile({"general.name": name, "tokenizer.chat_template": llama})
        assert (profile.reasons, profile.is_r1, profile.sampling, profile.evidence) == (False, False, {}, ())


def test_what_the_file_states_about_sampling_comes_first() -> None:
    stated = {"temp": float(np.float32(0.7)), "top_k": 20, "penalty_repeat": float(np.float32(1.05)), "sequence": "x"}
    metadata = {"general.name": "DeepSeek-R1", **{f"general.sampling.{key}": value for key, value in stated.items()}}
    profile = reasoning_profile(metadata)
    expected = {"temperature": 0.7, "top_k": 20, "top_p": 0.95, "min_p": 0.0, "repeat_penalty": 1.05}
    assert profile.sampling == expected
    assert isinstance(profile.sampling["top_k"], int)
    assert any("stated by the file: temperature 0.7" in line for line in profile.evidence)
    SamplerSettings(**profile.sampling)


@pytest.mark.parametrize(
    ("key", "value"),
    [("temp", -1.0), ("temp", math.nan), ("top_k", math.inf), ("top_k", 40.5), ("min_p", "x"), ("xtc_threshold", 9.0)],
)
def test_sampling_values_that_make_no_sense_are_refused_by_key(key: str, value: object) -> None:
    with pytest.raises(FormatError, match=rf"^general\.sampling\.{key}: .* is {value!r}; expected") as caught:
        reasoning_profile({f"general.sampling.{key}": value})
    assert caught.value.field == f"general.sampling.{key}"
