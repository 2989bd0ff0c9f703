"""``pyengine-perplexity`` and ``pyengine-imatrix``: results, exit codes, messages, nothing half done."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import pyengine
from pyengine.cli.common import duration
from pyengine.imatrix import ImportanceMatrix
from tests.cli.terminal import Terminal
from tests.support import ROOT

DEMO = pyengine.demo_model_path()
ENV = {k: v for k, v in os.environ.items() if k != "PYENGINE_ISA"} | {"PYTHONPATH": str(ROOT)}
TEXT = "Tom has 48 apples and buys 27 more. How many apples does he have now? " * 12


def command(name: str, *args: str | Path) -> list[str]:
    return [sys.executable, "-m", f"pyengine.cli.{name}", *map(str, args)]


def run(name: str, *args: str | Path, stdin: str | None = None) -> subprocess.CompletedProcess[str]:
    source = {"input": stdin} if stdin is not None else {"stdin": subprocess.DEVNULL}
    return subprocess.run(
        command(name, *args), capture_output=True, text=True, timeout=60, env=ENV, cwd=ROOT, check=False, **source
    )  # type: ignore[call-overload]


def figures(*args: str | Path, stdin: str | None = None) -> dict:
    done = run("perplexity", DEMO, *args, "--json", stdin=stdin)
    assert (done.returncode, done.stderr) == (0, "")
    return json.loads(done.stdout)


def refused(name: str, code: int, *args: str | Path, words: str) -> None:
    """One clear message, no traceback, nothing on stdout."""
    done = run(name, *args)
    assert done.returncode == code, done.stderr
    assert done.stdout == ""
    assert words in done.stderr
    assert "Traceback" not in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1, done.stderr


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text"
    path.write_text(TEXT)
    return path


def test_perplexity_prints_figures_that_do_not_depend_on_threads_or_where_the_text_comes_from(text: Path) -> None:
    one = figures("-f", text, "-c", "32", "--threads", "1")
    two = figures("-f", "-", "-c", "32", "--threads", "2", stdin=TEXT + "\n")  # a newline at the end is no text
    assert {**one, "seconds": 0} == {**two, "seconds": 0}
    assert one["perplexity"]["value"] > 1
    assert one["perplexity"]["error"] > 0
    assert (one["n_ctx"], one["positions"], one["divergence"]) == (32, one["windows"] * 15, None)
    done = run("perplexity", DEMO, "-f", text, "-c", "32")
    assert done.stdout.startswith(f"perplexity      {one['perplexity']['value']:.4f} ± ")
    assert f"{one['windows']} windows of 32 tokens, {one['positions']} tokens scored" in done.stdout
    assert done.stderr == ""


def test_saved_logits_bring_their_text_and_windows(text: Path, tmp_path: Path) -> None:
    saved = tmp_path / "base"
    first = figures("-f", text, "-c", "32", "--chunks", "3", "--save-logits", saved)
    assert set(tmp_path.iterdir()) == {text, saved}
    for args in ([], ["-f", str(text)], ["-f", str(text), "-c", "32", "--chunks", "2"]):
        got = figures(*args, "--kl-divergence", saved)
        assert got["divergence"]["same_top"]["value"] == 1
        assert got["divergence"]["mean"]["value"] < 1e-6
        assert got["windows"] == (2 if "--chunks" in args else 3)
        if "--chunks" not in args:
            assert got["perplexity"] == got["divergence"]["base"] == first["perplexity"]
    other = figures("--kl-divergence", saved, "--kv-type", "q8_0")
    assert other["divergence"]["mean"]["value"] > 1e-6
    shown = run("perplexity", DEMO, "--kl-divergence", saved).stdout
    for label in ("base", "ratio", "mean KLD", "median KLD", "90 % KLD", "99.9 % KLD", "maximum KLD", "same top token"):
        assert label in shown
    text.write_text("Something else altogether. " * 60)
    for args, words in (
        (["-f", text], "holds logits of another text: token "),
        (["-c", "16"], "--ctx is 16; "),
        (["-f", text, "-c", "16"], "--ctx is 16; "),
    ):
        refused("perplexity", 2, DEMO, *args, "--kl-divergence", saved, words=words)
    saved.write_bytes(saved.read_bytes()[:-1])
    refused("perplexity", 1, DEMO, "--kl-divergence", saved, words="is cut: it has")


def test_perplexity_refuses_what_makes_no_sense(text: Path, tmp_path: Path) -> None:
    refused("perplexity", 2, DEMO, words="which text? give -f TEXT")
    refused("perplexity", 2, DEMO, "-f", text, "-c", "7", words="--ctx is 7; expected at least 8")
    refused("perplexity", 2, DEMO, "-f", text, "--chunks", "0", words="--chunks is 0; expected at least 1")
    refused("perplexity", 2, DEMO, "-f", text, "-c", "100000", words="tokens; expected at least 100000, one window")
    refused("perplexity", 1, DEMO, "-f", tmp_path / "none", words="none: No such file")
    refused("perplexity", 1, tmp_path / "none", "-f", text, words="there is no file")
    refused("perplexity", 1, DEMO, "-f", text, "--save-logits", text, words="exists already; --force replaces it")
    refused("perplexity", 1, DEMO, "--kl-divergence", text, words="begins with b'Tom has '")
    (tmp_path / "latin").write_bytes(b"caf\xe9" * 1000)
    refused("perplexity", 2, DEMO, "-f", tmp_path / "latin", words="is not valid UTF-8 (byte 4)")
    assert text.read_text() == TEXT


def test_imatrix_writes_one_file_and_merges(text: Path, tmp_path: Path) -> None:
    whole, part, merged = tmp_path / "whole", tmp_path / "part", tmp_path / "merged"
    done = run("imatrix", DEMO, "-f", text, "-c", "32", "-o", whole)
    assert (done.returncode, done.stdout) == (0, "")
    assert "windows of 32 tokens" in done.stderr
    for args in ([], ["--save-every", "1"], ["--threads", "1", "--kv-type", "f16"]):
        assert run("imatrix", DEMO, "-f", text, "-c", "32", "-o", part, "--force", *args).returncode == 0
        assert part.read_bytes() == whole.read_bytes()
    assert run("imatrix", "--in-file", part, "--in-file", whole, "-o", merged).returncode == 0
    one, two = ImportanceMatrix.read(whole), ImportanceMatrix.read(merged)
    assert two.datasets == [str(text)] * 2
    assert (two.chunk_size, two.chunk_count) == (32, 2 * one.chunk_count)
    for name, entry in one.entries.items():
        assert (two.entries[name].squares == 2 * entry.squares).all()
    again = run("imatrix", DEMO, "-f", text, "-c", "32", "--in-file", whole, "-o", merged, "--force")
    assert again.returncode == 0
    assert ImportanceMatrix.read(merged).chunk_count == 2 * one.chunk_count
    assert set(tmp_path.iterdir()) == {text, whole, part, merged}


def test_imatrix_refuses_what_makes_no_sense(text: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    refused("imatrix", 2, "-o", out, words="what of?")
    refused("imatrix", 2, DEMO, "-o", out, words="MODEL and -f TEXT belong together")
    refused("imatrix", 2, "-f", text, "-o", out, words="MODEL and -f TEXT belong together")
    refused("imatrix", 2, DEMO, "-f", text, "-o", out, "--save-every", "-1", words="--save-every is -1")
    refused("imatrix", 1, DEMO, "-f", text, "-o", text, words="exists already; --force replaces it")
    refused("imatrix", 1, DEMO, "-f", text, "-o", tmp_path / "no" / "out", words="is no directory")
    refused("imatrix", 1, "--in-file", DEMO, "-o", out, words="expected 'imatrix'")
    refused("imatrix", 1, "--in-file", text, "-o", out, words="is no GGUF file")
    assert not out.exists()


def interrupted_once_there_is(path_of_process: str, folder: Path, *args: str | Path) -> str:
    """Ctrl-C when a file of that name is in the folder; the message of the program, which ends with 130."""
    process = subprocess.Popen(command(*map(str, args)), env=ENV, cwd=ROOT, stderr=subprocess.PIPE, text=True)
    path = folder / path_of_process.format(pid=process.pid)
    deadline = time.monotonic() + 60
    while not path.exists():
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, message = process.communicate(timeout=30)
    assert process.returncode == 130, message
    assert message.splitlines()[-1].endswith(": interrupted")
    assert "Traceback" not in message
    return message


def test_ctrl_c_leaves_no_partial_logits(text: Path, tmp_path: Path) -> None:
    text.write_text(TEXT * 400)
    args = ["perplexity", DEMO, "-f", text, "-c", "128", "--save-logits", tmp_path / "out"]
    interrupted_once_there_is(".out.{pid}.part", tmp_path, *args)
    assert set(tmp_path.iterdir()) == {text}


def test_ctrl_c_keeps_what_was_saved_of_an_importance_matrix(text: Path, tmp_path: Path) -> None:
    text.write_text(TEXT * 400)
    args = ["imatrix", DEMO, "-f", text, "-c", "32", "-o", tmp_path / "out", "--save-every", "4"]
    message = interrupted_once_there_is("out", tmp_path, *args)
    assert set(tmp_path.iterdir()) == {text, tmp_path / "out"}
    count = ImportanceMatrix.read(tmp_path / "out").chunk_count
    assert count % 4 == 0
    assert f"out: {count} of " in message


def test_a_terminal_sees_progress_and_the_time_left(text: Path) -> None:
    with Terminal(command("perplexity", DEMO, "-f", text, "-c", "32"), env=ENV | {"TERM": "xterm"}) as terminal:
        shown = terminal.wait_for("tokens scored")
    assert "window 1 of " in shown
    assert ", perplexity " in shown
    assert " left" in shown


def test_durations_read_like_a_clock() -> None:
    assert [duration(s) for s in (0, 7.4, 59.6, 750, 10921)] == ["0:00", "0:07", "1:00", "12:30", "3:02:01"]
