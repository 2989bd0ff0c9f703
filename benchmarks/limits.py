"""What this machine can do at most, for the benchmarks to stand beside: runs the program ``limits`` (``make limits``).

python benchmarks/limits.py [--threads N]
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class Limits:
    """Of ``threads`` threads together: ``stream`` GB/s from a mapped file; each: the rest."""

    threads: int
    clock_ghz: float
    mac_per_cycle: dict[str, float]
    stream: float
    barrier_us: float

    def int8(self, tier: str) -> float:
        """MAC/cycle of the best int8 instructions that a tier's kernels have; 0 where none was measured."""
        names = ["int8 maddubs 256"]
        if "512" in tier:
            names = ["int8 dpbusd 512", "int8 dpbusd 256", *names]
        return max((self.mac_per_cycle.get(name, 0.0) for name in names), default=0.0)

    def words(self) -> str:
        best = max((v for k, v in self.mac_per_cycle.items() if k.startswith("int8")), default=0.0)
        return (
            f"read stream {self.stream:.1f} GB/s ({self.threads} threads, mapped file), {self.clock_ghz:.2f} GHz, "
            f"int8 {best:.0f} MAC/cycle/core, barrier {self.barrier_us:.2f} us"
        )


def program() -> Path:
    path = Path(os.environ.get("PYENGINE_CHECKS_DIR", ROOT / "build" / "checks")) / "limits"
    if not path.is_file():
        raise SystemExit(f"{path} is not built: run `make limits` once")
    return path


def measure_limits(threads: int = 0) -> Limits:
    """Measured now, in about 3 s: limits of a shared machine do not keep."""
    command: list[str | Path] = [program(), "--quick", "--json", "--mib", "512"]
    if threads:
        command += ["--threads", str(threads)]
    found = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    n = str(found["threads"])
    return Limits(
        threads=found["threads"],
        clock_ghz=found["clock_ghz"],
        mac_per_cycle=found["mac_per_cycle"],
        stream=found["read_gbs"]["file"][n]["median"],
        barrier_us=found["barrier_us"][n],
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--threads", type=int, default=0)
    print(measure_limits(parser.parse_args().threads).words())
