"""Where the tests find their data, in one place."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


def _find_data() -> Path | None:
    named = os.environ.get("PYENGINE_TEST_DATA")
    if named:  # a wrong name must fail loudly, not skip
        path = Path(named)
        if not path.is_dir():
            raise RuntimeError(f"PYENGINE_TEST_DATA names {named}, which is no directory")
        return path
    path = ROOT.parent / "shared" / "data"
    return path if path.is_dir() else None


_FOUND = _find_data()
HAVE_DATA = _FOUND is not None
DATA = _FOUND or Path("no-test-data")
needs_data = pytest.mark.skipif(
    not HAVE_DATA, reason="test data not found: set PYENGINE_TEST_DATA or put it at ../shared/data"
)


def check_program(name: str) -> Path:
    """A built C++ check; missing where PYENGINE_CHECKS_DIR promises it is a failure, elsewhere a reason to skip."""
    named = os.environ.get("PYENGINE_CHECKS_DIR")
    path = Path(named or ROOT / "build" / "checks").resolve() / name
    if not path.is_file():
        if named:
            pytest.fail(f"PYENGINE_CHECKS_DIR is {named}, but {name} is not there")
        pytest.skip(f"{path} is not built (PE_BUILD_TESTS)")
    return path


def run_check(name: str, *args: object, requests: str = "") -> str:
    """The output of a check program that found nothing wrong."""
    command = [check_program(name), *map(str, args)]
    done = subprocess.run(command, input=requests, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, f"{done.returncode}: {done.stdout[-2000:]}{done.stderr[-3000:]}"
    return done.stdout


def comparisons(output: str) -> int:
    """How many comparisons a check says it made; one that compares nothing proves nothing."""
    line = output.strip().splitlines()[-1]
    assert line.endswith(" checks, 0 failures"), output
    return int(line.split()[1])
