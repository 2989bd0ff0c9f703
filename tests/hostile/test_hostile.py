"""Any file gives a model or an error: a quick share of what ``make hostile`` does in full and under the sanitizers."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from pyengine.errors import FormatError
from pyengine.gguf_file import GgufFile
from tests.gguf.builder import U8, Gguf, value
from tests.hostile import text_half
from tests.support import ROOT, run_check

SAFETY = ROOT / "docs" / "safety.md"


def hostile(*args: object) -> tuple[int, int]:
    """Files opened and refused by ``hostile_check``, which found nothing wrong."""
    last = run_check("hostile_check", *args).strip().splitlines()[-1]
    found = re.fullmatch(r"[a-z ]+: (\d+) cases, (\d+) opened, (\d+) refused, 0 failures", last)
    assert found, last
    assert int(found[1]) == int(found[2]) + int(found[3])
    return int(found[2]), int(found[3])


def test_81_classes_of_malformed_files_give_a_model_that_runs_or_an_error() -> None:
    assert len(set(text_half.classes())) == 81
    opened, refused = hostile("classes", 40)
    assert opened + refused == 81 * 40
    assert opened > 400
    assert refused > 2000


def test_every_known_kind_of_vulnerability_is_answered_as_documented() -> None:
    output = run_check("hostile_check", "incidents")
    rows = sorted(line for line in output.splitlines() if line.startswith("|"))
    assert len(rows) >= 48
    documented = {re.sub(r"\s+", " ", line) for line in SAFETY.read_text().splitlines()}
    assert [row for row in rows if re.sub(r"\s+", " ", row) not in documented] == []
    assert {row.split("`")[1] for row in rows} <= set(text_half.classes())


def test_small_models_cut_at_many_bytes_are_refused() -> None:
    opened, refused = hostile("cut", 61)
    assert (opened, refused > 3000) == (0, True)


def test_substituted_metadata_bytes_give_a_model_that_runs_or_an_error() -> None:
    opened, refused = hostile("bytes", 199)
    assert opened > 1000
    assert refused > 1000


def test_boundary_integers_give_a_model_that_runs_or_an_error() -> None:
    opened, refused = hostile("integers", 17)
    assert opened > 100
    assert refused > 1000


@pytest.mark.parametrize(
    "name",
    [
        "header.zero_tensors",
        "incidents",
        *(
            f"vocabulary.{name}"
            for name in (
                "types",
                "missing",
                "duplicates",
                "bytes",
                "merges",
                "giant",
                "pre_tokenizer",
                "no_eos",
                "template",
                "empty_token",
            )
        ),
    ],
)
def test_tokenizer_and_template_of_malformed_files_work_or_give_an_error(name: str) -> None:
    tried, wrong = text_half.check(name, 0, 25 if "." in name else 100)
    assert tried > 5
    assert wrong == []


def test_a_name_without_visible_letters_is_still_named(tmp_path: Path) -> None:
    """Found by the class key.hidden_text: the message spoke of "the tensor " and the field was empty."""
    path = tmp_path / "m.gguf"
    path.write_bytes(Gguf([value("\u200b\u202e", U8, 1)] * 2).build())
    with pytest.raises(FormatError) as caught:
        GgufFile.open(path)
    assert (caught.value.code, caught.value.field) == ("duplicate_key", "\ufffd")


def test_a_duplicate_key_is_the_field_wherever_it_stands(tmp_path: Path) -> None:
    """Found by the demand that errors name their field: it was the last key of the file."""
    path = tmp_path / "m.gguf"
    path.write_bytes(Gguf([value("twice", U8, 1), value("twice", U8, 1), value("last", U8, 1)]).build())
    with pytest.raises(FormatError) as caught:
        GgufFile.open(path)
    assert caught.value.field == "twice"
    assert "last" not in caught.value.message
