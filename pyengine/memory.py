"""How much memory this process may still take: the machine's, and what its control groups leave."""

from __future__ import annotations

import functools
import mmap
from pathlib import Path

from pyengine.errors import OutOfMemory

try:
    import resource
except ImportError:  # Windows
    resource = None  # type: ignore[assignment]

_UNLIMITED = 1 << 60  # version 1 says "no limit" by a number near 2^63


def available_memory(root: str = "") -> int | None:
    """Bytes that can be taken without swapping, control groups included; ``None`` where the system does not say.

    ``root``: a folder with ``proc/`` and ``sys/`` in tests.
    """
    free = _meminfo(root, "MemAvailable")
    return None if free is None else min([free, *_left_by_groups(root)])


def total_memory(root: str = "") -> int | None:
    """Bytes of memory in the machine; ``None`` where the system does not say."""
    return _meminfo(root, "MemTotal")


def memory_is_refused() -> bool:
    """Whether this system refuses memory, by a limit (``ulimit -v``) or by its policy, before there is none."""
    if resource is None:
        return False
    limits = (resource.getrlimit(kind)[0] for kind in (resource.RLIMIT_AS, resource.RLIMIT_DATA))
    return any(limit != resource.RLIM_INFINITY for limit in limits) or _strict_accounting()


@functools.cache
def _strict_accounting() -> bool:
    return _number(Path("/proc/sys/vm/overcommit_memory")) == 2


# numpy 2 ends the process, or reports an error without an exception, when it is refused memory for small things.
NUMPY_BYTES = 4 << 20


def need_memory(size: int, what: str) -> None:
    """``OutOfMemory`` unless ``size`` bytes can be had now, on systems that refuse memory.

    For libraries that end the process when they are refused some; the size is what they need at most.
    """
    if not memory_is_refused():
        return
    try:
        mmap.mmap(-1, size).close()
    except (OSError, ValueError, OverflowError):
        raise OutOfMemory(
            f"not enough memory: {what} needs {size / 1e6:.0f} MB, which the system refuses", code="out_of_memory"
        ) from None


def _meminfo(root: str, key: str) -> int | None:
    try:
        with open(f"{root}/proc/meminfo", encoding="ascii") as info:
            fields = dict(line.split(":", 1) for line in info)
        return int(fields[key].split()[0]) * 1024
    except (OSError, KeyError, ValueError, IndexError):
        return None


def _left_by_groups(root: str) -> list[int]:
    """What each group with a limit leaves: the process's own and its ancestors, versions 2 and 1.

    Pages of files count as free, as they do in MemAvailable.
    """
    left = []
    try:
        lines = Path(f"{root}/proc/self/cgroup").read_text().splitlines()
    except OSError:
        return []
    for line in lines:  # "0::/path" (version 2) or "9:memory:/path" (version 1)
        _, controllers, path = line.split(":", 2)
        if controllers and "memory" not in controllers.split(","):
            continue
        v2 = not controllers
        mount = Path(f"{root}/sys/fs/cgroup" + ("" if v2 else "/memory"))
        limit_name, usage_name = ("memory.max", "memory.current") if v2 else (
            "memory.limit_in_bytes", "memory.usage_in_bytes")  # fmt: skip
        # Inside a container the path may not exist below the mount; its root then does.
        folder = mount / path.strip("/")
        for group in (folder, *folder.parents):
            limit, usage = _number(group / limit_name), _number(group / usage_name)
            if limit is not None and usage is not None and limit < _UNLIMITED:
                left.append(max(0, limit - max(0, usage - _reclaimable(group / "memory.stat"))))
            if group == mount:
                break
    return left


def _number(path: Path) -> int | None:
    try:
        return int(path.read_text())
    except (OSError, ValueError):  # absent, or "max"
        return None


def _reclaimable(stat: Path) -> int:
    try:
        fields = dict(line.split() for line in stat.read_text().splitlines())
        return sum(int(fields.get("total_" + name, fields.get(name, 0))) for name in ("active_file", "inactive_file"))
    except (OSError, ValueError):
        return 0
