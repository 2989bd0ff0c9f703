"""Runs pytest where no network is: in a new network namespace that has a loopback interface and nothing else.

``python -m tests.house.offline [PYTEST ARGUMENT ...]`` (``make test-offline``). Ends with 0 and a reason where the
system does not permit namespaces; ends with an error where the namespace has another interface, or is none.
"""

from __future__ import annotations

import ctypes
import fcntl
import os
import socket
import struct
import sys

import pytest

_NEW_USER, _NEW_NET = 0x10000000, 0x40000000  # linux/sched.h
_SIOCGIFFLAGS, _SIOCSIFFLAGS, _UP = 0x8913, 0x8914, 1  # linux/sockios.h, linux/if.h


def enter() -> str:
    """Enters the namespace, as the superuser or as a user that is root in it; why that is not possible, else ""."""
    if not sys.platform.startswith("linux"):
        return f"{sys.platform} has no network namespaces"
    uid, gid = os.getuid(), os.getgid()
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.unshare(_NEW_NET) != 0:
        if libc.unshare(_NEW_USER | _NEW_NET) != 0:
            return f"unshare: {os.strerror(ctypes.get_errno())}"
        for name, text in (("setgroups", "deny"), ("uid_map", f"0 {uid} 1"), ("gid_map", f"0 {gid} 1")):
            with open(f"/proc/self/{name}", "w") as file:
                file.write(text)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as control:
        request = struct.pack("16sh14x", b"lo", 0)
        (flags,) = struct.unpack_from("h", fcntl.ioctl(control, _SIOCGIFFLAGS, request), 16)
        fcntl.ioctl(control, _SIOCSIFFLAGS, struct.pack("16sh14x", b"lo", flags | _UP))
    return ""


def main(arguments: list[str]) -> int:
    before = os.readlink("/proc/self/ns/net") if os.path.exists("/proc/self/ns/net") else ""
    try:
        reason = enter()
    except OSError as error:
        reason = str(error)
    if reason:
        print(f"skipped: this system does not permit a network namespace ({reason})")
        return 0
    interfaces = [name for _, name in socket.if_nameindex()]
    if interfaces != ["lo"] or os.readlink("/proc/self/ns/net") == before:
        print(f"the namespace has the interfaces {interfaces}; expected lo and nothing else")
        return 1
    print("no network: the only interface is lo", flush=True)
    return int(pytest.main(arguments))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
