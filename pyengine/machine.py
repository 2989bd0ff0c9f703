"""The processor this process runs on, and what it can do at most."""

from __future__ import annotations

from dataclasses import dataclass

from pyengine import _core
from pyengine.memory import available_memory


@dataclass(frozen=True)
class Cpus:
    """What the process may run on here and now, affinity mask and control groups included.

    Attributes:
        threads: hardware threads; cores: physical ones; performance: of those, cores of the fastest kind (all, where
            they are alike).
        quota: CPUs' worth of time that control groups grant; 0: no limit.
    """

    threads: int
    cores: int
    performance: int
    quota: float


def cpus() -> Cpus:
    """Asked of the system now."""
    return Cpus(**_core.cpus())


@dataclass(frozen=True)
class Limits:
    """What the machine can do at most, beside which every speed is reported.

    Attributes:
        threads: of which the rest is told.
        clock_hz: of a core.
        read_bytes: a second, from memory, all threads together: median of some rounds; read_lowest, read_highest: their
            range.
        int8_macs, float_macs: multiplications a cycle and core by the best instructions of the tier in use; 0: unknown.
        barrier_seconds: of one meeting of the threads.
    """

    threads: int
    clock_hz: float
    read_bytes: float
    read_lowest: float
    read_highest: float
    int8_macs: float
    float_macs: float
    barrier_seconds: float

    def macs(self, fmt: str) -> float:
        """Multiplications a second, all threads together, with weights of a format; 0: unknown."""
        return (self.float_macs if fmt in {"F32", "F16", "BF16"} else self.int8_macs) * self.clock_hz * self.threads

    def words(self) -> str:
        threads = f"{self.threads} thread" + ("s" if self.threads > 1 else "")
        macs = f"int8 {self.int8_macs:.0f} MAC/cycle/core" if self.int8_macs else "MAC/cycle unknown"
        return (
            f"{threads} read {self.read_bytes / 1e9:.1f} GB/s ({self.read_lowest / 1e9:.1f} .. "
            f"{self.read_highest / 1e9:.1f}), {self.clock_hz / 1e9:.2f} GHz, {macs}, "
            f"barrier {self.barrier_seconds * 1e6:.2f} us"
        )


def measure_limits(threads: int) -> Limits:
    """Measured now, in one or two seconds, with up to 512 MiB of memory. Errors: ``EngineError``."""
    available = available_memory() or 512 << 20
    return Limits(**_core.measure_limits(threads, min(512 << 20, max(available // 4, 1 << 20))))
