"""``pyengine-doctor``: it finds what is wrong, says so, and fails; what is in order it measures."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest

import pyengine
from pyengine import doctor, quant
from pyengine.cli.doctor import main
from pyengine.machine import Cpus, Limits

DEMO = str(pyengine.demo_model_path())


def test_a_sound_machine_passes_every_check_and_every_format_is_checked(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--no-speed", "--json", DEMO]) == 0
    said = json.loads(capsys.readouterr().out)
    names = {check["name"] for check in said["checks"]}
    assert {f"linear {name}" for name in quant.FORMATS} <= names
    assert {"attention f16", "attention f32", "attention q8_0", "answers, 1 thread"} <= names
    assert said["healthy"] is True
    assert said["tier"] == quant.tier_active()
    model = said["model"]
    assert model["bos"] == 1
    assert model["ids"][0] == pyengine.Model.open(DEMO).tokenizer.bos_id
    assert "".join(model["pieces"][1:2]) in model["prompt"]
    assert doctor.QUESTION in model["prompt"]


def test_one_wrong_bit_of_a_kernel_is_found_and_fails(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    right = quant.linear
    calls = []

    def wrong(tier: str, name: str, *rest: object) -> np.ndarray:
        y = right(tier, name, *rest)  # type: ignore[arg-type]
        if name == "Q6_K" and not calls:
            calls.append(tier)
            y.view(np.uint32)[0, 5] ^= 1
        return y

    monkeypatch.setattr(quant, "linear", wrong)
    assert main(["--no-speed"]) == 1
    text = capsys.readouterr().out
    assert "FAILED linear Q6_K: 1 of 5159 values differ from scalar" in text
    assert text.count("FAILED") == 1
    assert "Please report it" in text


def test_wrong_answers_are_found_too(monkeypatch: pytest.MonkeyPatch) -> None:
    right = doctor.answer
    monkeypatch.setattr(doctor, "answer", lambda threads, chunk: right(threads, chunk)[::-1])
    assert not any(check.good for check in doctor.check_answers())
    monkeypatch.setattr(doctor, "_ANSWER", "raise SystemExit('no such tier')")
    (check,) = doctor.check_answers()
    assert not check.good
    assert "no such tier" in check.detail


def test_the_whole_examination_with_speeds(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([DEMO]) == 0
    text = capsys.readouterr().out
    for words in ("GB/s", "GMAC/s", "KV f16", "available of", "template: the file's", "of them BOS"):
        assert words in text
    assert max(map(len, text.splitlines())) <= 100


@pytest.fixture(scope="module")
def found() -> doctor.Diagnosis:
    return doctor.diagnose(speed=False)


QUIET = Limits(2, 4e9, 60e9, 58e9, 61e9, 128, 32, 1e-6)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"tiers": ["scalar", "avx2"], "tier": "scalar", "forced": True}, "PYENGINE_ISA forces scalar: avx2"),
        ({"tiers": ["scalar"], "tier": "scalar"}, "no AVX2"),
        ({"cpus": Cpus(8, 8, 8, 2.5), "threads": 3}, "grants 2.5 CPUs of 8 cores"),
        ({"cpus": Cpus(16, 12, 4, 0), "threads": 4}, "4 of 12 cores are of the fast kind"),
        ({"load": 3.0}, "On average 3.0 threads of other programs"),
        ({"memory_available": 1 << 30}, "Only 1.0 GiB of memory"),
        ({"limits": dataclasses.replace(QUIET, barrier_seconds=90e-6)}, "Threads need 90 us to meet"),
        ({"limits": dataclasses.replace(QUIET, read_lowest=20e9)}, "Memory gave from 20 to 61 GB/s"),
        ({"kernels": [doctor.Kernel("IQ2_XXS", 9e9, 1e11, 0.15, 0.1)]}, "IQ2_XXS is read at 9.0 GB/s, 15 %"),
    ],
)
def test_what_is_slow_is_said_with_its_reason(found: doctor.Diagnosis, change: dict, words: str) -> None:
    calm = {"tiers": ["scalar", "avx2"], "tier": "avx2", "forced": False, "cpus": Cpus(2, 2, 2, 0), "threads": 2}
    calm |= {"load": 0.0, "memory_available": 16 << 30, "limits": QUIET, "kernels": [], "checks": []}
    assert doctor.advise(dataclasses.replace(found, **calm), 0) == []
    said = doctor.advise(dataclasses.replace(found, **(calm | change)), 0)
    assert any(words in sentence for sentence in said), said


def test_a_model_that_does_not_fit_is_named_slow(found: doctor.Diagnosis) -> None:
    said = doctor.advise(dataclasses.replace(found, memory_available=4 << 30), 5 << 30)
    assert any("needs 5.0 GiB" in sentence and "4.0 are available" in sentence for sentence in said)


def test_a_missing_file_is_one_line(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main([str(tmp_path / "none.gguf"), "--no-speed"]) == 1
    assert "none.gguf" in capsys.readouterr().err
