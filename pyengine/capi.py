"""The C interface from Python through cffi (ABI mode): the door a program in another language would use.

The declarations are the installed ``pyengine.h`` itself with its preprocessor lines removed; there is no second copy.

    >>> from pyengine.capi import ffi, lib
    >>> ffi.string(lib.pe_version())
"""

from __future__ import annotations

import sys
from pathlib import Path

import cffi

from pyengine import _core

PACKAGE = Path(_core.__file__ or __file__).parent  # where the wheel puts what CMake built


def header_path() -> Path:
    """The installed ``pyengine.h``."""
    return PACKAGE / "include" / "pyengine.h"


def library_path() -> Path:
    """The installed shared library."""
    name = {"win32": "pyengine.dll", "darwin": "libpyengine.dylib"}.get(sys.platform, "libpyengine.so")
    return PACKAGE / name


def declarations(header: str) -> str:
    """What cffi reads of a header: no preprocessor lines, nothing between ``#ifdef __cplusplus`` and its ``#endif``."""
    kept: list[str] = []
    in_cplusplus = False
    for line in header.splitlines():
        stripped = line.lstrip()
        if stripped.startswith("#ifdef __cplusplus"):
            in_cplusplus = True
        elif stripped.startswith("#endif") and in_cplusplus:
            in_cplusplus = False
        elif not in_cplusplus and not stripped.startswith("#"):
            kept.append(line)
    return "\n".join(kept)


ffi = cffi.FFI()
ffi.cdef(declarations(header_path().read_text(encoding="utf-8")))
lib = ffi.dlopen(str(library_path()))
