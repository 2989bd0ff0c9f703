"""The check programs of the operations and of the thread pool, run as `make test` builds them."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from tests.support import ROOT


def _program(name: str) -> Path:
    """The built check; missing where PYENGINE_CHECKS_DIR promises it is a failure, elsewhere a reason to skip."""
    named = os.environ.get("PYENGINE_CHECKS_DIR")
    path = Path(named or ROOT / "build" / "checks") / name
    if not path.is_file():
        if named:
            pytest.fail(f"PYENGINE_CHECKS_DIR is {named}, but {name} is not there")
        pytest.skip(f"{path} is not built (PE_BUILD_TESTS)")
    return path


def _run(name: str) -> str:
    done = subprocess.run([_program(name)], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def _count(output: str, name: str) -> int:
    """How many comparisons the program says it made; a check that compares nothing proves nothing."""
    line = output.strip().splitlines()[-1]
    assert line.startswith(f"{name}: "), output
    assert line.endswith(" checks, 0 failures"), output
    return int(line.split()[1])


def test_every_tier_equals_the_scalar_operations_and_they_equal_long_double_arithmetic() -> None:
    assert _count(_run("ops_check"), "ops_check") > 100_000


def test_the_thread_pool_loses_no_task_no_wakeup_and_no_cpu_time() -> None:
    assert _count(_run("pool_check"), "pool_check") > 1_000
