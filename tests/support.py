"""Where the tests find their data, in one place."""

from __future__ import annotations

import os
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
