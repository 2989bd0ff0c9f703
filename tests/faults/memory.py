"""Commands under every limit of memory: ``python -m tests.faults.memory [--step KIB]``.

The address space may grow by so much and no more (RLIMIT_AS), from nothing to as much as the command needs, in steps.
Each run ends with the undisturbed output and code 0, or with one message and code 1: no crash, no traceback, no hang.
"""

from __future__ import annotations

import argparse
import os
import resource
import shutil
import sys
import tempfile
from pathlib import Path

os.environ["OPENBLAS_NUM_THREADS"] = "1"  # a process that forks has one thread

from tests.faults.changed import commands
from tests.faults.isolated import Outcome, Tally, one_message, run


def address_space() -> int:
    """Bytes of this process."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    return pages * resource.getpagesize()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--step", type=int, default=1024, help="KiB between two limits (default 1024)")
    parser.add_argument("--most", type=int, default=256, help="MiB of the largest limit (default 256)")
    args = parser.parse_args()
    import pyengine

    good = True
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        folder = root / "out"
        model = pyengine.demo_model_path()
        for command, (program, work) in commands(root).items():
            tally = Tally(f"memory limits, {command}")

            def limited(extra: int | None, work=work) -> Outcome:  # type: ignore[no-untyped-def]
                shutil.rmtree(folder, ignore_errors=True)
                folder.mkdir()

                def child() -> int:
                    if extra is not None:
                        limit = address_space() + extra
                        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
                    return work(model, folder)

                return run(child)

            outcome = limited(None)
            assert outcome.code == 0, outcome
            expected = (folder / "result").read_bytes()
            for extra in range(0, args.most << 20, args.step << 10):
                outcome = limited(extra)
                what = f"with {extra >> 10} KiB more: {outcome}"
                if outcome.code == 0:
                    tally.add("enough")
                    tally.check((folder / "result").read_bytes() == expected, f"{what}: another result")
                else:
                    tally.add("told")
                    tally.check(outcome.code == 1 and one_message(outcome.messages, program), what)
                    tally.check("internal error" not in outcome.messages, what)
            tally.check(set(tally.ends) == {"enough", "told"}, f"both ends occur: {tally.ends}")
            good &= tally.report()
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
