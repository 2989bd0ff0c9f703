"""How many threads run: what is asked for is checked, what is not asked for follows the machine, and no logit cares.
And the one that maps a model's file."""

from __future__ import annotations

import hashlib
import math
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

import pyengine
from pyengine import InvalidArgument, Model
from pyengine.gguf_file import GgufFile
from pyengine.machine import cpus, measure_limits
from pyengine.model import default_threads
from tests.support import ROOT, run_check


@pytest.fixture(scope="module")
def demo() -> Model:
    return Model.open(pyengine.demo_model_path(), tokenizer_ahead=False)


@pytest.mark.parametrize("option", ["threads", "threads_prefill"])
@pytest.mark.parametrize("value", [-1, 513, 2**32])
def test_an_impossible_number_is_refused_by_name_with_its_range(demo: Model, option: str, value: int) -> None:
    with pytest.raises(InvalidArgument, match=f"{option} is {value}; expected 0..512"):
        demo.session(n_ctx=8, **{option: value})  # type: ignore[arg-type]


@pytest.mark.parametrize("option", ["--threads", "--threads-prefill"])
def test_the_command_refuses_it_too(option: str) -> None:
    command = [sys.executable, "-m", "pyengine.cli.run", "--demo", option, "1000", "Hello"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=60, check=False)
    assert done.returncode == 2
    assert "is 1000; expected 0..512" in done.stderr


def test_the_default_is_a_thread_for_each_fast_core_that_may_be_used() -> None:
    here = cpus()
    assert 1 <= here.performance <= here.cores <= here.threads
    granted = min(here.performance, math.ceil(here.quota)) if here.quota else here.performance
    assert default_threads() == min(granted, 512)


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="this system has no affinity masks")
def test_one_allowed_cpu_means_one_thread() -> None:
    one = min(os.sched_getaffinity(0))
    program = (
        f"import os; os.sched_setaffinity(0, [{one}]); import pyengine; from pyengine.machine import cpus;"
        "m = pyengine.Model.open(pyengine.demo_model_path(), tokenizer_ahead=False);"
        "print(m.session(n_ctx=8).threads, cpus().threads, cpus().cores)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.split() == ["1", "1", "1"]


def test_decoding_gives_the_same_bits_however_many_threads_take_part(demo: Model) -> None:
    """So small a model soon runs on fewer threads than it was given; long enough for several changes of mind."""

    def hashed(threads: int) -> str:
        digest = hashlib.sha256()
        with demo.session(n_ctx=400, threads=threads) as session:
            for i in range(400):
                digest.update(session.eval([(i * 31 + 7) % demo.n_vocab]).tobytes())
        return digest.hexdigest()

    assert len({hashed(threads) for threads in (1, 2, 4)}) == 1


def test_limits_are_of_this_machine_and_refuse_what_makes_no_sense() -> None:
    limits = measure_limits(1)
    assert 1e9 < limits.clock_hz < 1e10
    assert 0 < limits.read_lowest <= limits.read_bytes <= limits.read_highest < 1e12
    assert limits.barrier_seconds < 1e-6  # of one thread, which waits for nobody
    with pytest.raises(InvalidArgument, match=r"n_threads is outside 1\.\.512"):
        measure_limits(513)


def test_the_limits_program_prints_the_units_it_names() -> None:
    text = run_check("limits", "--quick", "--threads", 1, "--mib", 64)
    streams = [float(figure) for figure in re.findall(r"^read, .* ([\d.]+) GB/s", text, re.MULTILINE)]
    assert streams
    assert all(0.1 < gigabytes < 1000 for gigabytes in streams), text
    (clock,) = re.findall(r"([\d.]+) GHz", text)
    assert 0.1 < float(clock) < 10


def mapped_bytes(path: Path) -> int:
    """Of a file that this process has mapped, how many bytes of memory it sees of it."""
    lines = iter(Path("/proc/self/smaps").read_text().splitlines())
    parts = [next(line for line in lines if line.startswith("Rss:")) for line in lines if line.endswith(str(path))]
    return sum(int(part.split()[1]) << 10 for part in parts)


@pytest.mark.skipif(not hasattr(os, "uname") or os.uname().sysname != "Linux", reason="a call of Linux")
@pytest.mark.skipif(
    hasattr(os, "uname") and [int(n) for n in os.uname().release.split("-")[0].split(".")[:2]] < [5, 14],
    reason="a call of Linux 5.14",
)
def test_a_model_has_its_file_mapped_ahead_until_it_is_closed(tmp_path: Path) -> None:
    path = tmp_path / "large.gguf"
    shutil.copy(pyengine.demo_model_path(), path)
    size = 80 << 20
    os.truncate(path, size)  # what follows the tensors is no matter
    with Model.open(path, tokenizer_ahead=False) as model:
        for _ in range(1000):
            if mapped_bytes(path) == size:
                break
            time.sleep(0.01)
        assert mapped_bytes(path) == size
        with model.session(n_ctx=8) as session:
            assert session.eval([1]).size == model.n_vocab
    assert mapped_bytes(path) == 0
    with GgufFile.open(path) as file:  # nobody computes with it
        assert file.tensors
        time.sleep(0.02)
        assert mapped_bytes(path) < size // 2
