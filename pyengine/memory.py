"""How much memory this process may still take: the machine's, and what its control groups leave."""

from __future__ import annotations

from pathlib import Path

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
