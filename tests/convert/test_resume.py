"""A conversion that was killed, however often and wherever, goes on and ends in the same bytes as one that was not."""

from __future__ import annotations

import random
import shutil
import signal
import subprocess
from pathlib import Path
from typing import Any

import pytest

from pyengine.errors import FileError
from pyengine_convert import writer
from pyengine_convert.convert import Options, convert
from tests.convert.test_all_or_nothing import child, names
from tests.support import DATA, needs_data

pytestmark = needs_data

SOURCE = DATA / "models" / "stories260K-llama-256d"
# Checkpoints after every piece; small pieces, written slowly enough to be killed in the middle of anything.
CHILD = """
import sys, time
from pathlib import Path
from pyengine_convert import writer
from pyengine_convert.convert import convert
writer._PIECE, writer._CHECKPOINT = 1 << 14, 1 << 15
print("ready", flush=True)
split = int(sys.argv[3]) or None
convert(Path(sys.argv[1]), Path(sys.argv[2]), "q4_k_m", threads=2, split=split, resume=sys.argv[4] == "resume",
        force=True, progress=lambda size: time.sleep(0.002))
print("done", flush=True)
"""


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writer, "_PIECE", 1 << 14)
    monkeypatch.setattr(writer, "_CHECKPOINT", 1 << 15)


def kill_once(out: Path, split: int, mode: str, delay: float) -> str:
    """ "killed", or what the child said at its end."""
    with child(CHILD, SOURCE, out, split, mode) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        try:
            printed, messages = process.communicate(timeout=delay)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            return "killed"
    return printed + messages


@pytest.mark.parametrize("split", [0, 300_000])
@pytest.mark.parametrize("seed", [1, 2])
def test_kills_at_random_moments_end_in_the_identical_bytes(tmp_path: Path, small: None, split: int, seed: int) -> None:
    report = convert(SOURCE, tmp_path / "m.gguf", "q4_k_m", split=split or None)
    expected = {path.name: path.read_bytes() for path in report.paths}
    folder = tmp_path / "out"
    folder.mkdir()
    rng, kills = random.Random(seed), 0
    while True:
        result = kill_once(folder / "m.gguf", split, "resume", rng.uniform(0.01, 0.3))
        if result == "killed" and names(folder) != sorted(expected):
            kills += 1
            for path in folder.glob("[!.]*"):  # whatever has its final name already is complete
                assert path.read_bytes() == expected[path.name]
            assert kills < 60
            continue
        assert result in ("killed", "done\n"), result
        break
    assert kills > 0
    assert {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()} == expected
    assert names(folder) == sorted(expected)


def test_a_kill_before_the_last_remains_are_gone_is_resumed(
    tmp_path: Path, small: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "m.gguf"
    options: dict[str, Any] = {"split": 300_000, "resume": True, "force": True}
    with monkeypatch.context() as patch:
        patch.setattr(writer, "_remove_remains", lambda out: shutil.rmtree(writer._folder_name(out)))
        report = convert(SOURCE, out, "q4_k_m", **options)
    expected = {path.name: path.read_bytes() for path in report.paths}
    assert names(tmp_path) == sorted([*expected, ".m.gguf.journal"])
    convert(SOURCE, out, "q4_k_m", **options)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == expected


def interrupted(out: Path, after: int, **options: Any) -> None:
    """A resumable conversion stopped by Ctrl-C: leaves what a kill leaves."""
    calls = 0

    def stop(_size: int) -> None:
        nonlocal calls
        calls += 1
        if calls > after:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert(SOURCE, out, "q4_k_m", resume=True, progress=stop, **options)


def test_what_was_done_is_not_done_again_and_the_losses_are_those_of_the_whole(tmp_path: Path, small: None) -> None:
    out = tmp_path / "m.gguf"
    interrupted(out, after=40)
    assert names(tmp_path) == [".m.gguf.journal", ".m.gguf.part"]
    seen: list[int] = []
    resumed = convert(SOURCE, out, "q4_k_m", resume=True, progress=seen.append)
    whole = convert(SOURCE, tmp_path / "n.gguf", "q4_k_m", options=Options(name=SOURCE.name))
    assert out.read_bytes() == (tmp_path / "n.gguf").read_bytes()
    assert seen[0] > 3 * seen[1]  # the first call tells what there was
    assert sum(seen) == sum(t.size for t in whole.tensors)
    assert resumed.losses == whole.losses
    assert names(tmp_path) == ["m.gguf", "n.gguf"]


def test_resuming_with_other_options_or_another_source_is_refused_and_changes_nothing(
    tmp_path: Path, small: None
) -> None:
    out = tmp_path / "m.gguf"
    interrupted(out, after=40)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    for source, kind, options in (
        (SOURCE, "q5_k_m", None),
        (SOURCE, "q4_k_m", Options(name="other")),
        (DATA / "models" / "stories260K-qwen2-256d", "q4_k_m", None),
    ):
        with pytest.raises(FileError, match="other options"):
            convert(source, out, kind, resume=True, options=options)
        assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_resume_with_nothing_there_starts_at_the_beginning(tmp_path: Path) -> None:
    convert(SOURCE, tmp_path / "m.gguf", "q8_0", resume=True)
    convert(SOURCE, tmp_path / "n.gguf", "q8_0")
    assert (tmp_path / "m.gguf").read_bytes() == (tmp_path / "n.gguf").read_bytes()
    assert names(tmp_path) == ["m.gguf", "n.gguf"]
    with pytest.raises(FileError, match="exists already"):
        convert(SOURCE, tmp_path / "m.gguf", "q8_0", resume=True)


@pytest.mark.parametrize("damage", ["missing", "shorter"])
def test_what_the_journal_says_but_the_disk_has_not_is_written_again(tmp_path: Path, small: None, damage: str) -> None:
    out = tmp_path / "m.gguf"
    interrupted(out, after=60)
    part = tmp_path / ".m.gguf.part"
    if damage == "missing":
        part.unlink()
    else:
        part.write_bytes(part.read_bytes()[:200_000])
    convert(SOURCE, out, "q4_k_m", resume=True)
    convert(SOURCE, tmp_path / "n.gguf", "q4_k_m")
    assert out.read_bytes() == (tmp_path / "n.gguf").read_bytes()


def test_a_full_disk_at_any_moment_leaves_what_resume_completes(tmp_path: Path, small: None) -> None:
    """The limit on file size stands for the disk. Never anything under the final name but the whole file."""
    out = tmp_path / "m.gguf"
    limited = "import resource; size = int(sys.argv[5]); resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))\n"
    code = CHILD.replace("print(", limited + "print(", 1)
    for limit in (500, 30_000, 200_000, 210_000, 700_000, 1_300_000):
        with child(code, SOURCE, out, 0, "resume", limit) as process:
            _, messages = process.communicate(timeout=60)
        assert process.returncode == 1
        assert "File too large" in messages
        assert not out.exists()
    convert(SOURCE, out, "q4_k_m", resume=True)
    convert(SOURCE, tmp_path / "n.gguf", "q4_k_m")
    assert out.read_bytes() == (tmp_path / "n.gguf").read_bytes()
    assert names(tmp_path) == ["m.gguf", "n.gguf"]


def test_a_journal_cut_off_anywhere_is_as_good_as_the_lines_it_has(tmp_path: Path, small: None) -> None:
    out = tmp_path / "m.gguf"
    interrupted(out, after=60)
    journal, part = tmp_path / ".m.gguf.journal", tmp_path / ".m.gguf.part"
    lines, data = journal.read_bytes(), part.read_bytes()
    convert(SOURCE, tmp_path / "n.gguf", "q4_k_m", options=Options(name=SOURCE.name))
    first = lines.index(b"\n") + 1
    for cut in range(first, len(lines), max((len(lines) - first) // 7, 1)):
        journal.write_bytes(lines[:cut])
        part.write_bytes(data)
        convert(SOURCE, out, "q4_k_m", resume=True, force=True)
        assert out.read_bytes() == (tmp_path / "n.gguf").read_bytes()
