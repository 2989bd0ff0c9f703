"""kill -9 at random moments and disks that fill up, against the converter as a process (`make convert-faults`).

    python -m tests.convert.faults [--kills 100] [--full 50] [--seed N]

Whatever happens, what stands under the final name is the whole file or nothing; `--resume` ends in the bytes of a run
that nobody disturbed. The moments are spread over the whole run: start, header, data, sync, verification, renaming. The
disk is a tmpfs of its own where it may be mounted (root), filled up by another file in the middle of the conversion;
elsewhere a limit on the size of files stands for it.

The checkpoint: llama, 14 million random weights in two shards; pieces and checkpoints are small, and so many.
"""

from __future__ import annotations

import argparse
import collections
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from safetensors.numpy import save_file

from pyengine_convert import writer
from pyengine_convert.convert import convert
from tests.convert.checkpoints import config, save, weights, write_json
from tests.support import ROOT

SHAPE = {"hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 12, "head_dim": 64, "vocab_size": 2048}
PIECE, CHECKPOINT = 1 << 16, 1 << 19
SPLIT = 2_000_000  # bytes of tensors a file, of about 9 MB

# argv: source, out, split or 0, resume?, at (bytes written when the disk fills up; -1: never), left (bytes it has then)
CHILD = f"""
import os, resource, shutil, sys
from pathlib import Path
from pyengine_convert import writer
from pyengine_convert.convert import convert
from pyengine.errors import FileError
source, out = map(Path, sys.argv[1:3])
split, resume, at, left = map(int, sys.argv[3:7])
writer._PIECE, writer._CHECKPOINT = {PIECE}, {CHECKPOINT}
written = 0
def progress(size):
    global written
    before, written = written, written + size
    if before <= at < written:
        if os.path.ismount(out.parent):
            free = os.statvfs(out.parent).f_bavail * os.statvfs(out.parent).f_frsize
            with open(out.parent / "filler", "wb") as file:
                os.posix_fallocate(file.fileno(), 0, max(free - left, 1))
        else:
            size = before + left
            resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))
print("ready", flush=True)
try:
    convert(source, out, "q4_k_m", threads=2, split=split or None, resume=bool(resume), progress=progress)
except FileError as error:
    print(error.code, str(error), flush=True)
    sys.exit(1)
print("done", flush=True)
"""


class Case(NamedTuple):
    split: int
    resume: bool


def start(source: Path, out: Path, case: Case, at: int = -1, left: int = 0) -> subprocess.Popen[str]:
    arguments = [source, out, case.split, int(case.resume), at, left]
    command = [sys.executable, "-c", CHILD, *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT)


def contents(folder: Path) -> dict[str, bytes]:
    """Files under their final names."""
    return {p.name: p.read_bytes() for p in folder.iterdir() if not p.name.startswith(".") and p.name != "filler"}


def remains(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir() if p.name.startswith("."))


def check(condition: bool, what: str) -> None:
    if not condition:
        raise SystemExit(f"FAILED: {what}")


def check_published(folder: Path, expected: dict[str, bytes], what: str) -> None:
    """Only whole files have final names, and the first part of a split model only when all are there."""
    found = contents(folder)
    for name, data in found.items():
        check(expected.get(name) == data, f"{what}: {name} stands under its final name and is not the whole file")
    check(min(expected) not in found or found == expected, f"{what}: the model opens, but parts are missing")


def phase(folder: Path, expected: dict[str, bytes]) -> str:
    """How far a killed conversion came, by what it left."""
    if contents(folder):
        return "while the files got their names, or just after"
    journal = next(folder.glob(".*.journal"), None)
    if journal is None:
        return "before the journal"
    lines = journal.read_bytes().count(b"\n")
    if lines < 2:
        return "before the first checkpoint"
    done = json.loads(journal.read_bytes().split(b"\n")[lines - 1])["done"]
    return "verification and after" if done >= 0.99 * sum(map(len, expected.values())) else "between checkpoints"


def finish(source: Path, out: Path, case: Case, expected: dict[str, bytes], what: str) -> float:
    """To the end, undisturbed; the seconds it took."""
    with start(source, out, case) as process:
        assert process.stdout is not None
        said, began = process.stdout.readline(), time.monotonic()
        rest, errors = process.communicate(timeout=300)
        seconds = time.monotonic() - began
    said += rest
    check(process.returncode == 0 and said == "ready\ndone\n", f"{what}, then to the end: {said}{errors}")
    check(contents(out.parent) == expected, f"{what}: other bytes at the end")
    check(not remains(out.parent), f"{what}: left behind {remains(out.parent)}")
    return seconds


def kill(source: Path, whole: dict[int, dict[str, bytes]], count: int, rng: random.Random) -> None:
    phases: collections.Counter[str] = collections.Counter()
    cases = [Case(0, True), Case(SPLIT, True), Case(0, False), Case(SPLIT, False)]
    number = -1
    while sum(phases.values()) < count:
        number += 1
        case = cases[number // 5 % len(cases)]
        expected = whole[case.split]
        with tempfile.TemporaryDirectory() as folder:
            out = Path(folder) / "m.gguf"
            if number % 10 == 0:  # how long it takes, from "ready" on
                duration = finish(source, out, case, expected, "undisturbed")
                for name in expected:
                    (out.parent / name).unlink()
            for again in range(rng.choice((1, 1, 2, 3))):  # several kills of one conversion: the later ones resumed
                if again and contents(out.parent):
                    break
                with start(source, out, case) as process:
                    assert process.stdout is not None
                    process.stdout.readline()  # "ready": Python has started
                    time.sleep(rng.uniform(0, duration))
                    process.send_signal(signal.SIGKILL)
                    killed = process.wait() == -signal.SIGKILL  # else it had just ended
                check_published(out.parent, expected, f"kill {number}")
                if killed:
                    phases[phase(out.parent, expected)] += 1
            if contents(out.parent) != expected:
                if not case.resume and contents(out.parent):  # parts with final names are files that exist
                    for name in contents(out.parent):
                        (out.parent / name).unlink()
                finish(source, out, case, expected, f"kill {number} of {case}")
    print(
        f"{sum(phases.values())} kills in {number + 1} conversions: never a partial file under a final name; all ended"
    )
    print("in the bytes of the undisturbed run, with --resume and without. When they came:")
    for name, n in phases.most_common():
        print(f"  {n:4} {name}")


@contextmanager
def disk(size: int) -> Iterator[Path]:
    """A folder; on a file system of ``size`` bytes of its own where one may be mounted."""
    with tempfile.TemporaryDirectory() as name:
        options = ["-t", "tmpfs", "-o", f"size={size}", "tmpfs", name]
        mounted = os.geteuid() == 0 and subprocess.run(["mount", *options], check=False).returncode == 0
        try:
            yield Path(name)
        finally:
            if mounted:
                subprocess.run(["umount", name], check=True)


def fill(source: Path, whole: dict[int, dict[str, bytes]], count: int, rng: random.Random) -> None:
    messages: collections.Counter[str] = collections.Counter()
    mounted = False
    for number in range(count):
        case = Case((0, SPLIT)[number % 2], number % 4 < 2)
        expected = whole[case.split]
        size = sum(map(len, expected.values()))
        what = f"full disk {number} of {case}"
        with disk(2 * size + writer._HEADER_RESERVE + (8 << 20)) as folder:
            mounted = os.path.ismount(folder)
            out = folder / "m.gguf"
            at = rng.randrange(int(size * 0.95))
            left = rng.choice((0, rng.randrange(4096), rng.randrange(max(int(size * 0.98) - at, 1))))
            with start(source, out, case, at, left) as process:
                said, errors = process.communicate(timeout=300)
            if said.endswith("done\n"):  # the space that was left sufficed
                check(contents(folder) == expected, f"{what}: other bytes")
                messages["enough was left"] += 1
                continue
            check(process.returncode == 1 and "cannot_write" in said, f"{what}: {said}{errors}")
            messages[said.rpartition(": ")[2].strip()] += 1
            check(not contents(folder), f"{what}: something under a final name")
            check(case.resume or not remains(folder), f"{what}: left behind {remains(folder)}")
            (folder / "filler").unlink(missing_ok=True)
            finish(source, out, case, expected, what)
    where = "a tmpfs that another file filled up" if mounted else "a limit on the size of files"
    print(f"{count} full disks ({where}): nothing under a final name; the bytes of the undisturbed run afterwards")
    print("  " + ", ".join(f"{n} x {message}" for message, n in messages.most_common()))


def make_source(folder: Path) -> Path:
    values = config(**SHAPE)
    tensors = weights(values, dtype="BF16")
    save(folder, values, tensors)
    (folder / "model.safetensors").unlink()
    names = sorted(tensors)
    parts = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for file, members in parts.items():
        save_file({n: tensors[n] for n in members}, folder / file)
    write_json(
        folder / "model.safetensors.index.json", {"weight_map": {n: f for f, members in parts.items() for n in members}}
    )
    return folder


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--full", type=int, default=50)
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    rng = random.Random(args.seed)
    with tempfile.TemporaryDirectory() as name:
        source = make_source(Path(name) / "m")
        whole = {}
        for split in (0, SPLIT):
            (Path(name) / f"{split}").mkdir()
            report = convert(source, Path(name) / f"{split}" / "m.gguf", "q4_k_m", split=split or None)
            whole[split] = {p.name: p.read_bytes() for p in report.paths}
        if args.kills:
            kill(source, whole, args.kills, rng)
        if args.full:
            fill(source, whole, args.full, rng)


if __name__ == "__main__":
    main()
