"""A model file that changes while a command uses it: ``python -m tests.faults.changed [--trials N]``.

It is cut, emptied, overwritten in place, made longer, replaced by rename or deleted at a random instant of a run of
pyengine-run, pyengine-perplexity, pyengine-imatrix and pyengine-convert. Each run ends by itself with the undisturbed
output and code 0, or with one message and code 1: no crash, no traceback, no garbage.
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

os.environ["OPENBLAS_NUM_THREADS"] = "1"  # a process that forks has one thread

from tests.faults.isolated import Child, Tally, one_message, run

PROMPT = "What is 12 + 30? Think, and then think again about 17 and 25 and 33."


def commands(root: Path) -> dict[str, tuple[str, Callable[[Path, Path], int]]]:
    """By name: the program, and a run of it with (model, folder for its output), which writes ``result`` there."""
    import pyengine.chat
    import pyengine.generate  # noqa: F401
    from pyengine.cli import imatrix, perplexity, run
    from pyengine_convert import cli, writer

    writer._PIECE = 1 << 14
    text = root / "text.txt"
    text.write_text("Tom has 48 apples and buys 27 more. How many apples does he have now? " * 40)

    def to_file(folder: Path, work: Callable[[], int]) -> int:
        """Standard output into the result, so that it can be compared."""
        with open(folder / "result", "w", encoding="utf-8") as file:
            sys.stdout = file
            return work()

    # Without --demo's template the model is a file like any other.
    answer = ["--temp", "0", "-n", "120", "--threads", "2", "--speculate", "off"]
    return {
        "run": ("pyengine-run", lambda m, f: to_file(f, lambda: run.main([str(m), PROMPT, *answer]))),
        "run --raw": (
            "pyengine-run",
            lambda m, f: to_file(f, lambda: run.main([str(m), PROMPT * 8, "--raw", *answer])),
        ),
        "run --copy": ("pyengine-run", lambda m, f: to_file(f, lambda: run.main([str(m), PROMPT, "--copy", *answer]))),
        "perplexity": (
            "pyengine-perplexity",
            lambda m, f: perplexity.main([str(m), "-f", str(text), "-c", "128", "--save-logits", str(f / "result")]),
        ),
        "imatrix": (
            "pyengine-imatrix",
            lambda m, f: imatrix.main([str(m), "-f", str(text), "-o", str(f / "result"), "-c", "128"]),
        ),
        "convert": (
            "pyengine-convert",
            lambda m, f: cli.main([str(m), "-o", str(f / "result"), "--type", "q4_0", "--name", "m", "--threads", "1"]),
        ),
    }


CHANGES = ("cut", "emptied", "overwritten", "lengthened", "replaced", "deleted")


def change(model: Path, how: str, rng: random.Random) -> None:
    size = model.stat().st_size
    match how:
        case "cut":
            os.truncate(model, rng.randrange(1, size))
        case "emptied":
            os.truncate(model, 0)
        case "overwritten":
            with open(model, "r+b", buffering=0) as file:
                file.write(rng.randbytes(4096) * (size // 4096))
        case "lengthened":
            os.truncate(model, size + 4096)
        case "replaced":
            other = model.with_name("other")
            other.write_bytes(b"another file")
            os.replace(other, model)
        case "deleted":
            model.unlink()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--trials", type=int, default=400)
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    import pyengine

    rng, tally = random.Random(args.seed), Tally("changed files")
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        model, folder = root / "model.gguf", root / "out"
        every = commands(root)
        expected, seconds = {}, {}
        for command, (_, work) in every.items():
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir()
            shutil.copyfile(pyengine.demo_model_path(), model)
            began = time.monotonic()
            outcome = run(lambda work=work: work(model, folder))  # type: ignore[misc]
            seconds[command] = time.monotonic() - began
            assert outcome.code == 0, outcome
            expected[command] = (folder / "result").read_bytes()
            assert expected[command], command
        for i in range(args.trials):
            command = list(every)[i % len(every)]
            how = CHANGES[i // len(every) % len(CHANGES)]
            program, work = every[command]
            shutil.rmtree(folder)
            folder.mkdir()
            model.unlink(missing_ok=True)
            shutil.copyfile(pyengine.demo_model_path(), model)
            child = Child(lambda work=work: work(model, folder))  # type: ignore[misc]
            time.sleep(rng.uniform(0, seconds[command] * 0.9))
            change(model, how, rng)
            outcome = child.wait()
            what = f"{command}, {how}: {outcome}"
            if outcome.code == 0:
                tally.add("unharmed")
                tally.check((folder / "result").read_bytes() == expected[command], f"{what}: another result")
            else:
                tally.add("told")
                tally.check(outcome.code == 1 and one_message(outcome.messages, program), what)
                tally.check("internal error" not in outcome.messages, what)
                written = [p.name for p in folder.iterdir()]
                tally.check(written in ([], ["result"] if "run" in command else []), f"{what}: leaves {written}")
        tally.check(args.trials < 36 or min(tally.ends.values()) > args.trials // 10, f"both ends occur: {tally.ends}")
    return 0 if tally.report() else 1


if __name__ == "__main__":
    sys.exit(main())
