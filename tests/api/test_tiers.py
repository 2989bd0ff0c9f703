"""The instruction-set tiers from outside: one answer, chosen by name, refused in words."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

import pyengine
from pyengine import quant
from tests.support import DATA, needs_data

PROGRAM = """
import hashlib, sys, pyengine
with pyengine.Model.open(sys.argv[1]) as model, model.session(n_ctx=300, threads=2) as session:
    rows = [session.eval([(i * i + 7 * i) % 500 for i in range(270)], all_logits=True), session.eval([9])]
print(hashlib.sha256(b"".join(row.tobytes() for row in rows)).hexdigest())
"""


def run(tier: str, *args: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYENGINE_ISA": tier}
    command = [sys.executable, "-P", "-c", PROGRAM, *args]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


@needs_data
@pytest.mark.parametrize("name", ["llama-256d-Q4_K_M", "qwen3-256d-Q8_0", "llama-256d-Q3_K_M", "llama-256d-F16"])
def test_a_whole_model_gives_the_same_bits_on_every_tier(name: str) -> None:
    answers = {tier: run(tier, str(DATA / "gguf" / f"stories260K-{name}.gguf")) for tier in quant.tiers()}
    assert all(done.returncode == 0 for done in answers.values()), answers
    assert len({done.stdout for done in answers.values()}) == 1


@pytest.mark.parametrize("tier", ["sse9", ""])
def test_an_unknown_tier_is_an_error_that_names_it_and_what_there_is(tier: str) -> None:
    done = run(tier, str(pyengine.demo_model_path()))
    if tier == "":  # an empty variable is as good as none
        assert done.returncode == 0, done.stderr
        return
    assert "CpuError" in done.stderr
    assert 'asks for "sse9"' in done.stderr
    assert "scalar" in done.stderr


ON_A_SMALL_STACK = """
import sys, threading, pyengine
def work():
    with pyengine.Model.open(sys.argv[1]) as model, model.session(n_ctx=512, threads=1) as session:
        session.eval(list(range(3, 303)))
        session.eval([3])
        print("done")
threading.stack_size(256 << 10)
thread = threading.Thread(target=work)
thread.start()
thread.join()
"""


@pytest.mark.parametrize("tier", quant.tiers())
def test_a_call_gets_along_with_the_stack_the_header_promises(tier: str) -> None:
    command = [sys.executable, "-P", "-c", ON_A_SMALL_STACK, str(pyengine.demo_model_path())]
    environment = {**os.environ, "PYENGINE_ISA": tier}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "done\n"), done.stderr
