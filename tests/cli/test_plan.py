"""``pyengine-plan``: a table of 80 columns, JSON, pictures, exit codes, messages."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest

import pyengine
from tests.support import ROOT

ENV = {k: v for k, v in os.environ.items() if k not in {"PYENGINE_ISA", "NO_COLOR"}} | {"PYTHONPATH": str(ROOT)}


def run(*args: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "pyengine.cli.plan", *map(str, args)]
    return subprocess.run(
        command, capture_output=True, text=True, timeout=60, env=ENV, cwd=ROOT, check=False, stdin=subprocess.DEVNULL
    )


def output(*args: str | Path) -> str:
    done = run(*args)
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout


@pytest.mark.parametrize("card", ["r1-8b-card", "r1-distill-qwen-32b"])
def test_the_tables_are_plain_text_of_80_columns_when_nobody_watches(card: str) -> None:
    text = output(card, "--ram", "16G")
    assert "\x1b" not in text
    assert max(map(len, text.splitlines())) <= 80
    assert "Tokens a second" not in text  # nothing is said about the speed of another machine


def test_the_63k_row_of_the_card_is_the_table_that_people_look_for() -> None:
    text = output("r1-8b-card", "--ram", "64G", "-q", "q4_k_m", "-c", "1k,63k")
    # 5.22 GiB of weights + 640 KiB x 64512 + scratch + process
    assert re.search(r"^Q4_K_M +6\.0 +44\.8 ", text, re.MULTILINE)
    assert re.search(r"^KV f16 +0\.62 +39\.4$", text, re.MULTILINE)
    assert re.search(r"^KV q8_0 +0\.33 +20\.9$", text, re.MULTILINE)


def test_what_does_not_fit_is_marked_without_colours_too() -> None:
    text = output("r1-8b-card", "--ram", "16G", "-q", "Q4_K_M,Q2_K", "-c", "4k,16k,32k", "--kv-type", "f16")
    assert re.search(r"^Q4_K_M +7\.9 +15\.4! +25\.4! ", text, re.MULTILINE)
    assert re.search(r"^Q2_K +6\.0 +13\.5~ +23\.5! ", text, re.MULTILINE)


def test_json_is_the_python_plan() -> None:
    said = json.loads(output("r1-distill-llama-8b", "--json", "--ram", "16G", "-c", "1000,32k", "-t", "2"))
    plan = pyengine.plan("r1-distill-llama-8b", ram=16 << 30, contexts=[1000, 32768], threads=2)
    assert len(said["cells"]) == len(plan.cells) == 8 * 2 * 2
    for cell, mine in zip(said["cells"], plan.cells, strict=True):
        assert cell["memory"]["total"] == mine.memory.total
        assert (cell["quantisation"], cell["kv_type"], cell["context"]) == (
            mine.quantisation,
            mine.kv_type,
            mine.context,
        )
        assert (cell["verdict"], cell["machine"]) == (mine.verdict, mine.machine)
    assert said["speed"] is None


def test_a_file_is_planned_for_this_machine_with_its_speed() -> None:
    said = json.loads(output(pyengine.demo_model_path(), "--json", "-q", "q8_0"))
    assert said["rows"][0]["quantisation"] == "this file"
    assert said["rows"][0]["prefill"] > 0
    assert all(cell["decode"] > 0 for cell in said["cells"])
    assert "prefill" in output(pyengine.demo_model_path(), "-q", "q8_0")


def test_a_picture_shows_every_cell(tmp_path: Path) -> None:
    picture = tmp_path / "plan.svg"
    output("r1-8b-card", "--ram", "16G", "--plot", picture)
    plan = pyengine.plan("r1-8b-card", ram=16 << 30)
    root = ElementTree.fromstring(picture.read_text())
    svg = "{http://www.w3.org/2000/svg}"
    cells = [e for e in root.iter(f"{svg}rect") if e.find(f"{svg}title") is not None]
    assert len(cells) == len(plan.cells)
    words = {"fits": "fits", "tight": "tight", "no": "does not fit"}
    assert sorted(e.find(f"{svg}title").text for e in cells) == sorted(words[c.verdict] for c in plan.cells)  # type: ignore[union-attr]
    assert "44.8" in [e.text for e in root.iter(f"{svg}text")]
    refused = run("r1-8b-card", "--ram", "16G", "--plot", picture)
    assert refused.returncode == 1
    assert "exists already; --force replaces it" in refused.stderr
    output("r1-8b-card", "--ram", "16G", "--plot", picture, "--force")


def test_a_png_needs_matplotlib_and_says_so(tmp_path: Path) -> None:
    picture = tmp_path / "plan.png"
    done = run("r1-8b-card", "--ram", "16G", "--plot", picture)
    if importlib.util.find_spec("matplotlib"):
        assert done.returncode == 0
        assert picture.read_bytes().startswith(b"\x89PNG")
    else:
        assert done.returncode == 1
        assert "pip install 'pyengine[plot]'" in done.stderr
        assert not picture.exists()


@pytest.mark.parametrize(
    ("args", "code", "words"),
    [
        (["r1-8b"], 2, "'r1-8b' is neither a file nor a folder nor a built-in card; cards: r1-8b-card"),
        (["r1-8b-card", "--ram", "lots"], 2, "'lots' is no size; expected such as 16G"),
        (["r1-8b-card", "--ram", "1G"], 2, "ram is 1 GiB; expected more than 2"),
        (["r1-8b-card", "-c", "64q"], 2, "'64q' is no number of tokens; expected such as 4096 or 4k"),
        (["r1-8b-card", "-c", "128k"], 2, "a context of 131072 tokens; expected 1..65536"),
        (["r1-8b-card", "-q", "Q9"], 2, "unknown type 'Q9'; known are F32, F16"),
        (["r1-8b-card", "--kv-type", "q4"], 2, "a KV type is 'q4'; expected f16, f32, q8_0"),
        (["r1-8b-card", "--plot", "plan.jpg"], 2, "plan.jpg: pictures are .svg or .png"),
        (["missing.gguf"], 1, "missing.gguf"),
    ],
)
def test_what_makes_no_sense_is_one_line_that_says_what_does(args: list[str], code: int, words: str) -> None:
    done = run(*args)
    assert (done.returncode, done.stdout) == (code, "")
    assert words in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


def test_the_table_of_the_readme_is_what_the_plan_says() -> None:
    lines = re.findall(r"^\| `(r1-[\w.-]+)` \| (\w+) \|(.*)\|$", (ROOT / "README.md").read_text(), re.MULTILINE)
    assert len(lines) == 9
    for card, quantisation, values in lines:
        plan = pyengine.plan(card, quantisations=[quantisation], kv_types=["f16"], ram=64 << 30, threads=2)
        cells = [f"{cell.memory.total / 2**30:.1f}" for cell in plan.cells]
        assert [v.strip() for v in values.split("|") if v.strip()] == cells
