"""One answer, whatever computes it: a share of `make determinism`, and that it would see a difference."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import pyengine
from pyengine import quant
from tests.determinism import golden, matrix, models
from tests.support import DATA, ROOT, check_program, needs_data

SHARE = ("llama-Q4_0", "qwen2-Q4_K_M", "qwen3-Q8_0", models.DEMO)


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("models")


@needs_data
def test_every_way_to_the_same_tokens_gives_the_same_hash(folder: Path) -> None:
    for name in SHARE:
        models.make(name, folder, DATA)
    verdict = matrix.run(SHARE, folder, quick=True)
    assert not verdict.failures
    assert len(verdict.first) == len(SHARE) * 2 * 3  # prompts, cache types
    assert verdict.n > 500


def test_the_share_and_the_whole_hold_every_thread_count_chunk_hit_and_cache_type() -> None:
    for tier, quick in (("avx2", True), ("scalar", True), ("scalar", False), ("avx2", False)):
        for name in ("qwen3-Q4_K_M", "llama-F16"):
            cells = list(matrix.cells(name, tier, quick))
            assert {c.threads for c in cells} == {1, 2, 3, 4, 7}
            assert {c.chunk for c in cells} == {1, 3, 32, 128, 512}
            assert {c.kv for c in cells} == {"f16", "f32", "q8_0"}
            assert {c.hit for c in cells if c.prompt == "short"} == set(matrix.HITS["short"])
            assert any(c.hit.taken % 64 for c in cells)  # in the middle of a block
            assert any(c.hit.taken > 256 for c in cells) or (tier, quick) == ("scalar", True)
    whole = [c for c in matrix.cells("qwen3-Q4_K_M", "avx2", False) if c.prompt == "short"]
    assert len(set(whole)) == len(whole) == 5 * 5 * 4 * 3
    assert len({c[3:5] for c in cells if c.prompt == "short"}) == 5 * 5
    total = sum(len(matrix.SPECULATION) for name in models.names(DATA) for _ in matrix.cells(name, "avx2", False))
    assert total >= 768


def test_one_changed_token_in_one_configuration_is_found_and_named(folder: Path) -> None:
    models.make(models.DEMO, folder, None)
    command = [sys.executable, "-m", "tests.determinism.matrix", "--quick", "--only", models.DEMO, "--spoil", "3"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.returncode == 1, done.stderr
    cell = list(matrix.cells(models.DEMO, "avx2", True))[3]
    failures = [line for line in done.stdout.splitlines() if line.startswith("FAILED")]
    assert len(failures) == len(matrix.SPECULATION)
    for failure in failures:
        expected = f"{cell.threads} threads, chunks of {cell.chunk}, hit {cell.hit}"
        assert f"{quant.tier_active()}, {expected}" in failure
        assert failure.endswith("another answer from position 5")


def test_a_difference_in_the_text_alone_and_equal_answers_to_different_questions_are_found() -> None:
    def answer(kv: str, value: str) -> dict[str, object]:
        cell = matrix.Cell("m", "short", kv, 1, 1, matrix.COLD)  # type: ignore[arg-type]
        return {
            "tier": "scalar",
            "cell": cell,
            "speculation": "off",
            "hash": value,
            "positions": ["00"],
            "guesses": [2, 1],
        }

    verdict = matrix.Verdict()
    for kv, value in (("f16", "a"), ("f16", "b"), ("q8_0", "a")):
        verdict.take(answer(kv, value))
    verdict.close()
    assert len(verdict.failures) == 2
    assert verdict.failures[0].endswith("another answer in the text")
    assert "could not see a difference" in verdict.failures[1]


@pytest.mark.parametrize("name", golden.QUICK)
def test_the_bits_of_this_numerics_epoch_are_the_recorded_ones(name: str, folder: Path) -> None:
    """They change only with the epoch, see docs/numerics.md; `make golden` records those of a new one."""
    assert golden.compare([name], folder) == []
    hashes = golden.recorded()[name]
    assert len(set(hashes.values())) == 4  # the weights', and one for each type of cache


def test_the_c_interface_alone_gives_the_recorded_bits(folder: Path) -> None:
    """The program that other processors run."""
    assert golden.compare([models.DEMO], folder, [str(check_program("logits_check"))]) == []


def test_recording_never_changes_a_hash_of_the_same_epoch_and_weights(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recorded = {"weights": golden.weights_hash(models.make(models.DEMO, folder, None)), "f16": "0" * 64}
    changed = tmp_path / "golden.json"
    changed.write_text(json.dumps({str(pyengine.numerics_epoch()): {models.DEMO: recorded}}))
    monkeypatch.setattr(golden, "FILE", changed)
    assert "needs a new numerics epoch" in golden.write([models.DEMO], folder)[0]
    assert golden.recorded()[models.DEMO] == recorded
    assert "other bits" in golden.compare([models.DEMO], folder)[0]


@pytest.mark.parametrize("tier", ["scalar", "avx2"])
def test_the_demo_model_has_the_recorded_bits_on_slower_tiers(tier: str, folder: Path) -> None:
    if tier not in quant.tiers():
        pytest.skip(f"this processor has no {tier}")
    models.make(models.DEMO, folder, None)
    program = (
        "import sys; from pathlib import Path; from tests.determinism import golden; "
        f"sys.exit(bool(golden.compare([{models.DEMO!r}], Path(sys.argv[1]))))"
    )
    environment = {**os.environ, "PYENGINE_ISA": tier}
    command = [sys.executable, "-c", program, str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
