"""``pyengine-bench``: figures that fit together, files that vanish, messages that say what was expected."""

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
from pyengine import Model, bench, synthetic
from pyengine.errors import FileError
from pyengine.forecast import Work
from pyengine.shape import CARDS
from tests.support import ROOT

ENV = {k: v for k, v in os.environ.items() if k not in {"PYENGINE_ISA", "NO_COLOR"}} | {"PYTHONPATH": str(ROOT)}
DEMO = str(pyengine.demo_model_path())


def run(*args: str | Path, **env: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "pyengine.cli.bench", *map(str, args)]
    return subprocess.run(
        command, capture_output=True, text=True, timeout=120, env=ENV | env, check=False, stdin=subprocess.DEVNULL
    )


def test_every_round_of_every_combination_is_in_the_json_and_shares_follow_from_the_figures() -> None:
    done = run(DEMO, "-p", "8,32", "-n", "4", "-d", "0,64", "-t", "1,2", "--kv-type", "f16,q8_0", "-r", "3", "--json")
    assert (done.returncode, done.stderr) == (0, "")
    said = json.loads(done.stdout)
    assert [limits["threads"] for limits in said["limits"]] == [1, 2]
    facts = {(r["facts"]["kind"], r["facts"].get("depth", r["facts"]["tokens"]), *_how(r)) for r in said["rows"]}
    assert facts == {
        (kind, n, threads, kv)
        for kind, ns in (("prefill", (8, 32)), ("decode", (0, 64)))
        for n in ns
        for threads in (1, 2)
        for kv in ("f16", "q8_0")
    }
    with Model.open(DEMO, tokenizer_ahead=False) as model:
        work = Work.of_model(model)
        matrices = [t for t in model.file.tensors.values() if len(t.dims) == 2]  # its embedding makes the logits, too
        assert work.total_bytes == sum(t.size for t in matrices)
        for row in said["rows"]:
            assert len(row["values"]) == 3
            assert all(v > 0 for v in row["values"])
            assert row["median"] == sorted(row["values"])[1]
            limits = said["limits"][row["facts"]["threads"] - 1]
            kv = row["facts"]["kv_type"]
            if row["facts"]["kind"] == "decode":  # on average two of the four tokens precede
                position = model.session_bytes(n_ctx=1024, kv_type=kv)[0] / 1024
                cache = position * (row["facts"]["depth"] + 2)
                assert row["fraction"] == pytest.approx(
                    (work.total_bytes + cache) * row["median"] / limits["read_bytes"]
                )
            elif limits["int8_macs"]:
                n = row["facts"]["tokens"]
                head = next(t for t in matrices if t.name == "token_embd.weight")
                products = sum(t.rows * t.cols for t in matrices) - head.rows * head.cols * (n - 1) / n
                most = limits["int8_macs"] * limits["clock_hz"] * limits["threads"]
                assert row["fraction"] == pytest.approx(products * row["median"] / most)


def _how(row: dict) -> tuple[int, str]:
    return row["facts"]["threads"], row["facts"]["kv_type"]


def test_every_second_round_goes_backwards() -> None:
    ran: list[str] = []
    bench.interleave(3, {name: lambda name=name: ran.append(name) for name in "abc"})
    assert "".join(ran) == "abccbaabc"


def test_a_table_for_people_and_one_in_markdown() -> None:
    plain = run(DEMO, "-p", "8", "-n", "2", "-r", "1", "--no-limits").stdout.splitlines()
    assert plain[0].startswith("demo-q8_0.gguf, ")
    assert plain[-2].startswith("prefill 8 ")
    assert plain[-1].startswith("decode 2 after 0 ")
    marked = run(DEMO, "-p", "none", "-n", "2", "-r", "1", "--markdown").stdout.splitlines()
    assert any(line.startswith("- limits: ") for line in marked)
    assert marked[-1].startswith("| decode 2 after 0 | ")
    assert marked[-1].count("|") == marked[-2].count("|") == 6


@pytest.mark.parametrize("kind", ["Q4_K_M", "Q8_0", "IQ3_S", "f16"])
def test_random_weights_of_a_card_run_and_leave_nothing_behind(tmp_path: Path, kind: str) -> None:
    done = run(
        *("--synthetic", f"r1-distill-qwen-1.5b:{kind}", "--layers", "1", "--folder", tmp_path),
        *("-p", "4", "-n", "2", "-r", "1", "--no-limits", "--json"),
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert [row["median"] > 0 for row in json.loads(done.stdout)["rows"]] == [True, True]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="files without a name are Linux's")
def test_a_killed_run_leaves_no_file_behind(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "pyengine.cli.bench", "--synthetic", "r1-distill-qwen-1.5b", "--layers", "4"]
    process = subprocess.Popen([*command, "--folder", tmp_path], env=ENV, stdout=subprocess.DEVNULL)
    time.sleep(1.5)
    process.kill()
    process.wait()
    assert list(tmp_path.iterdir()) == []


def test_ctrl_c_ends_it_while_a_long_prompt_is_read(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "pyengine.cli.bench", DEMO, "-p", "1024", "-r", "1000", "--no-limits"]
    process = subprocess.Popen(
        command, env=ENV, stdout=subprocess.PIPE, stderr=subprocess.PIPE, preexec_fn=_interruptible
    )
    time.sleep(2.0)
    process.send_signal(signal.SIGINT)
    begin = time.monotonic()
    _, said = process.communicate(timeout=60)
    assert time.monotonic() - begin < 5
    assert process.returncode == 130
    assert said.decode().strip() == "pyengine-bench: interrupted"


def _interruptible() -> None:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # a background job of a shell ignores it


def test_there_is_room_or_a_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shape = CARDS["r1-distill-llama-8b"]
    free = 4 << 30
    monkeypatch.setattr(synthetic.shutil, "disk_usage", lambda _: type("Usage", (), {"free": free}))
    with pytest.raises(FileError, match=r"4\.6 GiB does not fit in .*: 4\.0 GiB are free"):  # noqa: SIM117
        with synthetic.temporary(shape, synthetic.table(shape, "Q4_K_M"), tmp_path):
            pass
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("args", "code", "words"),
    [
        ([], 2, "give a GGUF file or --synthetic"),
        ([DEMO, "--synthetic", "r1-8b-card"], 2, "give a GGUF file or --synthetic"),
        (["--synthetic", "r1-9b"], 2, "cards: r1-8b-card"),
        (["--synthetic", "r1-8b-card:Q4_X"], 2, "unknown type 'Q4_X'; known are F32"),
        (["--synthetic", "r1-8b-card", "--layers", "41"], 2, "--layers is 41; expected 1..40"),
        ([DEMO, "--layers", "2"], 2, "belong to --synthetic"),
        ([DEMO, "-p", "2k"], 2, "a prompt of 2048 tokens; expected 1..1024"),
        ([DEMO, "-d", "1000"], 2, "a depth of 1000 tokens; expected 0..992"),
        ([DEMO, "-t", "513"], 2, "threads is 513; expected 0..512"),
        ([DEMO, "-t", "two"], 2, "--threads: 'two' is no number"),
        ([DEMO, "-r", "0"], 2, "0 rounds; expected 1..1000"),
        ([DEMO, "-p", "none", "-n", "0"], 2, "nothing to measure"),
        ([DEMO, "--kv-type", "q4"], 2, "--kv-type: 'q4' is none of f16"),
        ([DEMO, "--json", "--markdown"], 2, "not both"),
        (["missing.gguf"], 1, "missing.gguf"),
        (["--synthetic", "r1-8b-card", "--folder", "/nowhere"], 1, "cannot write to /nowhere"),
    ],
)
def test_what_makes_no_sense_is_one_line_that_says_what_does(args: list[str], code: int, words: str) -> None:
    done = run(*args)
    assert (done.returncode, done.stdout) == (code, "")
    assert words in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
