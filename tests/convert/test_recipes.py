"""Which type each tensor gets, as in the files of llama.cpp's tool; and what a user may change about it.

`recipes.json` holds, for models of several shapes, the types in the files that llama.cpp's quantiser wrote: for each
part of a layer the types of layers 0, 1, 2, ..., runs as TYPE*count.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from pyengine.errors import InvalidArgument
from pyengine_convert.recipe import RECIPES, Facts, make_choice

TABLE: dict[str, Any] = json.loads((Path(__file__).parent / "recipes.json").read_text())
FACTS = Facts("llama", 32, 4, tied=False)


def expand(runs: str) -> list[str]:
    pairs = (run.partition("*") for run in runs.split(","))
    return [kind for kind, _, count in pairs for _ in range(int(count or 1))]


@pytest.mark.parametrize("title", TABLE)
def test_every_tensor_gets_the_type_it_has_in_llama_cpp_files(title: str) -> None:
    match = re.match(r"(\w+), (\d+) layers, (\d+) heads, (\d+) of them KV", title)
    assert match is not None
    arch, layers, heads, kv_heads = match[1], int(match[2]), int(match[3]), int(match[4])
    facts = Facts(arch, layers, heads // kv_heads, "tied" in title, "importance" in title)
    cols = 288 if "rows of 288" in title else 256
    assert set(TABLE[title]) == set(RECIPES)
    for recipe, parts in TABLE[title].items():
        choice = make_choice(recipe)
        for part, runs in parts.items():
            outer = part in {"output", "token_embd"}
            names = [f"{part}.weight"] if outer else [f"blk.{i}.{part}.weight" for i in range(layers)]
            chosen = [choice.of(name, (64, cols), facts)[0] for name in names]
            assert chosen == expand(runs), (recipe, part)


def test_names_are_known_in_any_case_and_others_are_refused_with_the_list() -> None:
    assert make_choice("q4_K_m").recipe is RECIPES["Q4_K_M"]
    with pytest.raises(InvalidArgument, match=r"'q4_k_x'.*Q4_K_M"):
        make_choice("q4_k_x")
    with pytest.raises(InvalidArgument, match=r"'q9'.*Q6_K"):
        make_choice("q4_0", output="q9")
    with pytest.raises(InvalidArgument, match="regular expression"):
        make_choice("q4_0", [("(", "q8_0")])


def types(choice: Any, facts: Facts = FACTS) -> dict[str, str]:
    names = ["token_embd", "output", "blk.0.attn_v", "blk.4.attn_v", "blk.4.ffn_down", "blk.14.ffn_up"]
    return {name: choice.of(f"{name}.weight", (64, 256), facts)[0] for name in names}


def test_a_user_overrides_single_types() -> None:
    usual = types(make_choice("q4_k_m"))
    assert usual["blk.0.attn_v"] == "Q6_K"
    assert types(make_choice("q4_k_m", output="q5_k")) == usual | {"output": "Q5_K"}
    assert types(make_choice("q4_k_m", embedding="f16")) == usual | {"token_embd": "F16"}
    chosen = types(make_choice("q4_k_m", [(r"blk\.4\.", "q3_k"), ("attn_v|output", "q8_0")], output="q5_k"))
    assert chosen == usual | {
        "blk.4.attn_v": "Q3_K", "blk.4.ffn_down": "Q3_K", "blk.0.attn_v": "Q8_0", "output": "Q8_0"
    }  # fmt: skip
    assert set(types(make_choice("q4_k_m", pure=True)).values()) == {"Q4_K"}


def test_of_a_tied_model_the_embedding_makes_the_logits() -> None:
    tied = Facts("llama", 32, 4, tied=True)
    assert types(make_choice("q4_k_m"), tied)["token_embd"] == "Q6_K"
    assert types(make_choice("q4_k_m", output="q8_0"), tied)["token_embd"] == "Q8_0"
    assert types(make_choice("q4_k_m", output="q8_0", embedding="q5_k"), tied)["token_embd"] == "Q5_K"


def test_norms_and_biases_stay_exact_and_no_pattern_changes_that() -> None:
    choice = make_choice("q2_k", [(".", "q2_k")])
    assert choice.of("blk.0.attn_norm.weight", (256,), FACTS) == ("F32", "")
    assert choice.of("blk.0.attn_q.bias", (256,), FACTS) == ("F32", "")


def test_rows_that_do_not_fit_get_smaller_blocks_and_a_note() -> None:
    choice = make_choice("q4_k_s", pure=True)
    assert choice.of("blk.0.ffn_up.weight", (64, 288), FACTS) == ("Q5_0", "rows of 288 are no multiple of 256")
    assert choice.of("blk.0.ffn_up.weight", (64, 172), FACTS) == ("F16", "rows of 172 are no multiple of 32")
