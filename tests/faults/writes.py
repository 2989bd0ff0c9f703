"""Failing writes and kills while files are written: ``python -m tests.faults.writes [--faults N] [--kills N]``.

Every operation that changes a file - open, write, fsync, truncate, rename, unlink, close - fails in turn (no space,
quota, input/output error, interrupted; once, or from then on), is cut short, or is the last thing the process does.
Whatever happens: the final name holds the whole file or what it held before, the command ends with a message, nothing
else is left behind, and a killed or failed conversion can be done again or resumed to the same bytes.
"""

from __future__ import annotations

import argparse
import ctypes
import errno
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

os.environ["OPENBLAS_NUM_THREADS"] = "1"  # a process that forks has one thread

from tests.faults.isolated import Outcome, Tally, one_message, run

HERE = Path(__file__).parent
FAIL, SHORT, KILL_BEFORE, KILL_AFTER, KILL_MIDDLE = range(5)  # enum kind
ERRORS = (errno.ENOSPC, errno.EIO, errno.EINTR, errno.EDQUOT)


def build_shim(folder: Path) -> Path:
    """Compiles io_faults.c. Errors: ``CalledProcessError``."""
    shim = folder / "io_faults.so"
    flags = ["-std=gnu11", "-shared", "-fPIC", "-O1", "-Wall", "-Wextra", "-Werror"]
    subprocess.run([os.environ.get("CC", "cc"), *flags, "-o", str(shim), str(HERE / "io_faults.c"), "-ldl"], check=True)
    return shim


@dataclass(frozen=True)
class Fault:
    """What operation number ``at`` meets; 0: nothing."""

    at: int = 0
    kind: int = FAIL
    error: int = 0
    forever: bool = False

    def __str__(self) -> str:
        name = ("fails", "is short", "is not reached by a killed process", "is the last", "is cut by a kill")[self.kind]
        error = f" ({errno.errorcode[self.error]})" if self.error else ""
        return f"operation {self.at}{' and all after it' if self.forever else ''} {name}{error}"


class Workflow:
    """Something that writes files: ``work`` into a folder, with what is expected there afterwards.

    Args:
        work: writes into the folder and returns an exit code.
        resume: the same, going on with what an earlier one left; ``None`` where there is no such thing.
        before: files already there, which stay unless the work succeeds.
        forced: replaces what is there.
        litter: whether a kill may leave a temporary file that nobody removes later.
    """

    def __init__(
        self,
        name: str,
        program: str,
        work: Callable[[Path], int],
        *,
        resume: Callable[[Path], int] | None = None,
        before: dict[str, bytes] | None = None,
        litter: bool = False,
        forced: Callable[[Path], int] | None = None,
    ) -> None:
        self.name, self.program, self.work, self.resume = name, program, work, resume
        self.before = before or {}
        self.litter = litter
        self.forced = forced or work
        self.operations = 0
        self.expected: dict[str, bytes] = {}

    def prepare(self, shim: ctypes.CDLL, root: Path) -> None:
        """An undisturbed run: what is expected, and how many operations there are."""
        folder = self._folder(root)
        read, write = os.pipe()

        def counted() -> int:
            shim.io_faults_arm(os.fsencode(folder), 0, 0, 0, 0)
            code = self.work(folder)
            os.write(write, str(shim.io_faults_disarm()).encode())
            return code

        outcome = run(counted)
        os.close(write)
        self.operations = int(os.read(read, 20) or b"0")
        os.close(read)
        assert outcome.code == 0, outcome.messages
        assert self.operations > 5, "the shim sees nothing: is it preloaded?"
        self.expected = contents(folder)
        assert self.expected.keys() > set() or self.before, "nothing was written"

    def _folder(self, root: Path) -> Path:
        folder = root / "out"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        for name, data in self.before.items():
            (folder / name).write_bytes(data)
        return folder

    def trial(self, shim: ctypes.CDLL, root: Path, fault: Fault, tally: Tally, *, resumed: bool = False) -> None:
        """One run with a fault, then one without."""
        work = self.resume if resumed and self.resume else self.work
        folder = self._folder(root)
        what = f"{self.name}{' --resume' if resumed else ''}: {fault}"

        def faulty() -> int:
            shim.io_faults_arm(os.fsencode(folder), fault.at, fault.kind, fault.error, int(fault.forever))
            return work(folder)

        outcome = run(faulty)
        self._judge(outcome, folder, fault, tally, what, resumed)
        if outcome.code == 0:  # done; what could not be removed was all that failed
            return
        if contents(folder) != self.expected:
            again = run(lambda: work(folder))
            # Parts that could not be taken back; a kill leaves what it left, and what has its final name is whole.
            if (fault.forever or outcome.code == -signal.SIGKILL) and "exists already" in again.messages:
                again = run(lambda: self.forced(folder))
            tally.check(again.code == 0, f"{what}; then again, undisturbed: {again}")
        final = contents(folder)
        if self.litter:
            final = {name: data for name, data in final.items() if not name.startswith(".")}
        tally.check(final == self.expected, f"{what}; in the end there are {sorted(final)}, not as undisturbed")

    def _judge(self, outcome: Outcome, folder: Path, fault: Fault, tally: Tally, what: str, resumed: bool) -> None:
        killed = outcome.code == -signal.SIGKILL
        now = contents(folder)
        visible = {name: data for name, data in now.items() if not name.startswith(".")}
        if fault.kind >= KILL_BEFORE:
            tally.add("killed" if killed else "finished before")
            tally.check(killed or outcome.code == 0, f"{what}: {outcome}")
        elif outcome.code == 0:
            tally.add("unharmed")
            tally.check(visible == self.expected, f"{what}: success, but there are {sorted(visible)}")
        else:
            tally.add("told")
            tally.check(outcome.code == 1 and one_message(outcome.messages, self.program), f"{what}: {outcome}")
        for name, data in visible.items():
            good = data in (self.expected.get(name), self.before.get(name))
            tally.check(good, f"{what}: {name} is neither whole nor what it was")
        for name in self.before:
            tally.check(name in visible, f"{what}: {name}, which was there before, is gone")
        # Removing may be what failed; a kill leaves what it left.
        tidy = not killed and not fault.forever and not resumed and outcome.code != 0
        if tidy and visible == self.before:
            left = sorted(now.keys() - visible.keys())
            tally.check(len(left) <= 1, f"{what}: {left} are left behind")


def contents(folder: Path) -> dict[str, bytes]:
    """Every file below a folder, by its relative name."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def workflows(root: Path) -> list[Workflow]:
    """Everything that writes files for a user."""
    import pyengine
    from pyengine_convert import cli, writer

    demo = pyengine.demo_model_path()
    source = root / "source.gguf"
    if not source.exists():
        shutil.copyfile(demo, source)
    # Checkpoints after every piece: many operations of few bytes.
    writer._PIECE, writer._CHECKPOINT = 1 << 16, 1 << 18

    def convert(folder: Path, *options: str) -> int:
        common = ["--type", "q4_0", "--threads", "1", "--name", "m"]
        return cli.main([str(source), "-o", str(folder / "m.gguf"), *common, *options])

    program = "pyengine-convert"
    return [
        Workflow(
            "convert",
            program,
            convert,
            resume=lambda f: convert(f, "--resume"),
            forced=lambda f: convert(f, "--force"),
        ),
        Workflow(
            "convert to several files",
            program,
            lambda f: convert(f, "--split-size", "400K"),
            resume=lambda f: convert(f, "--split-size", "400K", "--resume"),
            forced=lambda f: convert(f, "--split-size", "400K", "--force"),
        ),
        Workflow(
            "convert --force",
            program,
            lambda f: convert(f, "--force"),
            resume=lambda f: convert(f, "--force", "--resume"),
            before={"m.gguf": b"precious"},
        ),
        Workflow("save", "save", save_whole, before={"data.bin": b"precious"}, litter=True),
        Workflow("save a chat", "save", chat_saver(), before={"a.chat": b"precious"}, litter=True),
    ]


def chat_saver() -> Callable[[Path], int]:
    """Saves a conversation with its keys and values."""
    import pyengine
    from pyengine.chat_file import save_chat
    from pyengine.cli.common import run_command
    from pyengine.sampling import SamplerSettings

    model = pyengine.Model.open(pyengine.demo_model_path())
    chat = pyengine.Chat(model, session=model.session(n_ctx=512, threads=1), settings=SamplerSettings(temperature=0.0))
    for _ in chat.send("Tom has 48 apples and buys 27 more. How many apples does he have now?"):
        pass

    def command(folder: Path) -> int:
        save_chat(folder / "a.chat", chat)
        return 0

    return lambda folder: run_command("save", lambda: command(folder))


def save_whole(folder: Path) -> int:
    """What importance matrices, logits and pictures are written with."""
    from pyengine.cli.common import run_command
    from pyengine.files import replacing

    def command() -> int:
        with replacing(folder / "data.bin") as file:
            for i in range(8):
                file.write(bytes([i]) * 5000)
        return 0

    return run_command("save", command)


def faults_of(workflow: Workflow, rng: random.Random) -> Iterator[tuple[Fault, bool]]:
    """Every operation with every error, in random order, over and over; and whether to resume."""
    for round_ in range(1000):
        kinds = [
            (FAIL, error, forever)
            for error in ERRORS
            for forever in (False, True)
            if not (forever and error == errno.EINTR)  # which everybody tries again, and rightly
        ] + [
            (SHORT, 0, False),
            (SHORT, 0, True),
        ]
        every = [(at, kind) for at in range(1, workflow.operations + 1) for kind in kinds]
        rng.shuffle(every)
        for i, (at, (kind, error, forever)) in enumerate(every):
            yield Fault(at, kind, error, forever), (i + round_) % 3 == 0


def kills_of(workflow: Workflow, rng: random.Random) -> Iterator[tuple[Fault, bool]]:
    for _ in range(1000):
        every = [
            (at, kind) for at in range(1, workflow.operations + 1) for kind in (KILL_BEFORE, KILL_AFTER, KILL_MIDDLE)
        ]
        rng.shuffle(every)
        for i, (at, kind) in enumerate(every):
            yield Fault(at, kind), i % 2 == 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--faults", type=int, default=3000, help="failing writes")
    parser.add_argument("--kills", type=int, default=800)
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    if "io_faults" not in os.environ.get("LD_PRELOAD", ""):
        with tempfile.TemporaryDirectory() as folder:
            environment = os.environ | {"LD_PRELOAD": str(build_shim(Path(folder)))}
            return subprocess.run(
                [sys.executable, "-m", "tests.faults.writes", *sys.argv[1:]], env=environment
            ).returncode
    shim = ctypes.CDLL(os.environ["LD_PRELOAD"])
    shim.io_faults_arm.argtypes = [ctypes.c_char_p, ctypes.c_long, ctypes.c_int, ctypes.c_int, ctypes.c_int]
    shim.io_faults_disarm.restype = ctypes.c_long
    good = True
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        every = workflows(root)
        for workflow in every:
            workflow.prepare(shim, root)
        print("operations: " + ", ".join(f"{w.name} {w.operations}" for w in every), flush=True)
        for what, count, make in (("write faults", args.faults, faults_of), ("kills", args.kills, kills_of)):
            tally = Tally(what)
            # As many trials for each as it has operations.
            total = sum(w.operations for w in every)
            for workflow in every:
                share = -(-count * workflow.operations // total)
                trials = make(workflow, random.Random(args.seed))
                for fault, resumed in (next(trials) for _ in range(share)):
                    workflow.trial(shim, root, fault, tally, resumed=resumed)
            good &= tally.report()
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
