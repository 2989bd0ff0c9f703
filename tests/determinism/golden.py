"""The bits of a numerics epoch: hashes of the demo model's logits in every weight format, with every type of cache.

    python -m tests.determinism.golden                     compares, on every tier of this machine
    python -m tests.determinism.golden --program CHECK     compares what a built logits_check computes, e.g. for another
        [--emulator "qemu-aarch64 -L ROOT"] [--quick]      processor: that is `make determinism-aarch64`
    python -m tests.determinism.golden --write             adds what golden.json lacks; never changes a hash of the same
                                                           epoch and the same weights

golden.json: epoch -> model -> {"weights": hash of the tensors' data, cache type: hash of the logits}.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import pyengine
from pyengine import GgufFile, Model, quant
from pyengine.model import KV_TYPES, KvType
from tests.determinism import models

FILE = Path(__file__).parent / "golden.json"
# Longer than a chunk of attention (256 positions).
PROMPT = [*((i * i + 7 * i) % 500 for i in range(270)), 9]
QUICK = (models.DEMO, "demo-F16", "demo-Q4_0", "demo-Q4_K", "demo-Q6_K")


def recorded() -> dict[str, dict[str, str]]:
    """Of this epoch: model -> hashes."""
    everything: dict[str, dict[str, dict[str, str]]] = json.loads(FILE.read_text())
    return everything.get(str(pyengine.numerics_epoch()), {})


def weights_hash(path: Path) -> str:
    """Of the tensors' data: what the quantisers wrote, so that a change there is not taken for one of the numerics."""
    total = hashlib.sha256()
    with GgufFile.open(path) as file:
        for name in sorted(file.tensors):
            total.update(f"{name} {file.tensors[name].type_name}\n".encode())
            total.update(file.data(name))
    return total.hexdigest()


def logits_hash(path: Path, kv_type: KvType) -> str:
    with Model.open(path) as model, model.session(n_ctx=len(PROMPT), threads=2, kv_type=kv_type) as session:
        return hashlib.sha256(session.eval(PROMPT, all_logits=True).tobytes()).hexdigest()


def program_hash(command: Sequence[str], path: Path, kv_type: KvType) -> str:
    """What logits_check computes."""
    arguments = [*command, str(path), str(KV_TYPES[kv_type]), "2", "32"]
    ids = " ".join(map(str, PROMPT)).encode()
    done = subprocess.run(arguments, input=ids, capture_output=True, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"{shlex.join(arguments)} ended with {done.returncode}: {done.stderr.decode()[-500:]}")
    return hashlib.sha256(done.stdout).hexdigest()


def compare(names: Sequence[str], folder: Path, command: Sequence[str] = ()) -> list[str]:
    """What differs from golden.json, in sentences."""
    wrong = []
    for name in names:
        path = models.make(name, folder, None)
        golden = recorded().get(name, {})
        if weights_hash(path) != golden.get("weights"):
            wrong.append(f"{name}: other weights than recorded: the quantiser or the demo model has changed")
            continue
        for kv_type in KV_TYPES:
            got = program_hash(command, path, kv_type) if command else logits_hash(path, kv_type)
            print(
                f"{name} {kv_type}: {got[:16]} {'as recorded' if got == golden.get(kv_type) else 'DIFFERS'}", flush=True
            )
            if got != golden.get(kv_type):
                wrong.append(f"{name}, {kv_type} cache: other bits than epoch {pyengine.numerics_epoch()} has")
    return wrong


def write(names: Sequence[str], folder: Path) -> list[str]:
    everything = json.loads(FILE.read_text()) if FILE.exists() else {}
    epoch = everything.setdefault(str(pyengine.numerics_epoch()), {})
    wrong = []
    for name in names:
        path = models.make(name, folder, None)
        new = {"weights": weights_hash(path), **{kv: logits_hash(path, kv) for kv in KV_TYPES}}
        old = epoch.get(name, new)
        if old["weights"] == new["weights"] and any(old.get(key, new[key]) != new[key] for key in new):
            wrong.append(f"{name}: the bits have changed: that needs a new numerics epoch (docs/numerics.md)")
        else:
            epoch[name] = new
    FILE.write_text(json.dumps(everything, indent=1) + "\n")
    return wrong


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true")
    parser.add_argument("--program", type=Path, help="a built logits_check")
    parser.add_argument("--emulator", default="", help="the command that runs it")
    parser.add_argument("--quick", action="store_true", help=f"only {', '.join(QUICK)}")
    parser.add_argument("--here", type=Path, help=argparse.SUPPRESS)  # folder with the models: compare on this tier
    args = parser.parse_args()
    names = QUICK if args.quick else models.DEMO_NAMES
    if args.here:
        return _report(compare(names, args.here), quant.tier_active())
    with tempfile.TemporaryDirectory(prefix="pyengine-golden-") as folder:
        if args.write:
            return _report(write(names, Path(folder)), FILE.name)
        if args.program:
            command = [*shlex.split(args.emulator), str(args.program)]
            return _report(compare(names, Path(folder), command), shlex.join(command))
        status = 0
        for tier in quant.tiers():
            again = [sys.executable, "-m", "tests.determinism.golden", "--here", folder, *["--quick"] * args.quick]
            status |= subprocess.run(again, env={**os.environ, "PYENGINE_ISA": tier}, check=False).returncode
        return status


def _report(wrong: Sequence[str], where: str) -> int:
    for sentence in wrong:
        print(f"FAILED: {sentence}")
    print(f"golden, epoch {pyengine.numerics_epoch()}: {where}: {len(wrong)} failures")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
