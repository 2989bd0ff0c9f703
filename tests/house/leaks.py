"""The suite with the engine built for AddressSanitizer: ``python -m tests.house.leaks PYTHON CHECKS [PYTEST OPTIONS]``.

``make leaks`` builds the engine with sanitizers for an environment of its own, PYTHON, and its check programs into
CHECKS. Every process of the suite writes what its sanitizers find into a file; Python allocates with malloc, so that
what only a Python object holds is seen as held. A finding is a leak with one of our libraries among the callers, or
an error of memory or of undefined behaviour anywhere; what Python itself leaves at its end is none. Left out are the
tests marked ``as_built``, which this burden would falsify. Exit status 1 when there was a finding or a test failed.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

OURS = re.compile(r"libpyengine|_core\.|/checks/|pe::")


def findings(text: str) -> list[str]:
    """The records of a sanitizer's report that are to be mended."""
    records = [record.strip() for record in re.split(r"\n\s*\n", text)]
    leaks = [r for r in records if re.match(r"(Direct|Indirect) leak", r) and OURS.search(r)]
    errors = [r for r in records if "runtime error:" in r or re.search(r"ERROR: AddressSanitizer(?!.*leak)", r)]
    return errors + leaks


def library(name: str) -> str:
    return subprocess.run(
        ["gcc", f"-print-file-name={name}"], capture_output=True, text=True, check=True
    ).stdout.strip()


def main(arguments: list[str]) -> int:
    python, checks, *rest = arguments
    with tempfile.TemporaryDirectory() as folder:
        options = f"log_path={folder}/log:exitcode=0:allocator_may_return_null=1"
        env = {
            **os.environ,
            "LD_PRELOAD": f"{library('libasan.so')} {library('libstdc++.so')}",
            "PYTHONMALLOC": "malloc",
            "ASAN_OPTIONS": f"detect_leaks=1:{options}",
            "UBSAN_OPTIONS": f"print_stacktrace=1:log_path={folder}/log",
            "PYENGINE_CHECKS_DIR": checks,
        }
        command = [python, "-m", "pytest", "-m", "not peer and not as_built", *rest]
        passed = subprocess.run(command, env=env, check=False).returncode == 0
        logs = sorted(Path(folder).iterdir())
        found = [record for log in logs for record in findings(log.read_text(errors="replace"))]
    for record in found[:20]:
        print(f"{record}\n")
    print(f"leaks: {len(logs)} processes had something to say, {len(found)} findings of ours")
    return 0 if passed and not found else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
