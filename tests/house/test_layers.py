"""The layers of the house: who may include, import and define what."""

from __future__ import annotations

import ast
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.support import ROOT

CSRC = ROOT / "csrc"
# folder -> folders it may include from (itself always). Single headers are named with their path.
MAY_INCLUDE: dict[str, set[str]] = {
    "base": set(),
    "quant": {"base"},
    "kernels": {"quant", "base/cpu_features.h"},
    "gguf": {"base", "quant/formats.h", "quant/formats.def"},
    "runtime": {"base", "kernels/kernels.h"},
    "model": {"base", "quant", "kernels/kernels.h", "gguf", "runtime"},
    "api": {"base", "quant", "gguf", "kernels/kernels.h", "model", "runtime"},
    "bindings": {"pyengine.h"},
}
KERNEL_HEADERS = {"stddef.h", "stdint.h", "string.h", "float.h", "limits.h", "math.h", "immintrin.h", "arm_neon.h"}


def includes(path: Path) -> list[tuple[str, str]]:
    return re.findall(r'^\s*#include\s+([<"])([^>"]+)', path.read_text(), re.M)


def sources(folder: Path) -> list[Path]:
    return sorted(p for p in folder.rglob("*") if p.suffix in {".h", ".cc", ".def"})


def test_folders_include_only_the_layers_below_them() -> None:
    wrong = []
    for folder, allowed in MAY_INCLUDE.items():
        for path in sources(CSRC / folder):
            for bracket, name in includes(path):
                own = name.split("/")[0] == folder
                if bracket == "<" or own or name in allowed or name.split("/")[0] in allowed:
                    continue
                wrong.append(f"{path.relative_to(ROOT)} includes {name}")
    assert not wrong


def test_kernels_use_c_headers_only() -> None:
    wrong = []
    for path in sources(CSRC / "kernels"):
        if path.name == "dispatch.cc":
            continue
        found = {name for bracket, name in includes(path) if bracket == "<"}
        wrong += [f"{path.relative_to(ROOT)} includes <{name}>" for name in sorted(found - KERNEL_HEADERS)]
    assert not wrong


def test_only_dispatch_knows_the_tiers() -> None:
    tiers = {p.name for p in (CSRC / "kernels").iterdir() if p.is_dir()}
    assert {"scalar", "avx2", "avx512"} <= tiers
    wrong = []
    for path in sources(CSRC):
        for _, name in includes(path):
            parts = name.split("/")
            foreign_tier = parts[0] == "kernels" and parts[1] in tiers and path.parent.name != parts[1]
            dispatches = path.parent.name in tiers or path.name == "dispatch.cc"
            if foreign_tier or (name == "kernels/tiers.h" and not dispatches):
                wrong.append(f"{path.relative_to(ROOT)} includes {name}")
    assert not wrong


def test_the_forward_pass_stays_a_page_that_names_no_architecture() -> None:
    text = (CSRC / "model" / "forward.cc").read_text()
    code = re.sub(r"//.*", "", text)
    assert len(text.splitlines()) <= 600
    for banned in ("llama", "qwen", "new ", "malloc", "throw", "vector", "avx", "tier"):
        assert banned not in code.lower(), banned


def test_library_code_neither_prints_nor_exits_nor_reads_the_environment() -> None:
    banned = re.compile(r"\b(printf|fprintf|puts|cout|cerr|std::exit|exit|abort|signal|sigaction)\s*\(|std::c(out|err)")
    wrong = []
    for path in sources(CSRC):
        code = re.sub(r"/\*.*?\*/", "", re.sub(r"//.*", "", path.read_text()), flags=re.S)
        if path.name == "file_guard.cc":  # the one signal handler, installed where the host asks for it
            code = re.sub(r"\bsigaction\(", "", code)
        if banned.search(code):
            wrong.append(f"{path.relative_to(ROOT)}: {banned.search(code)}")
        if re.search(r"\bgetenv\b", code) and path.name != "dispatch.cc":
            wrong.append(f"{path.relative_to(ROOT)} reads the environment")
        if re.search(r"std::j?thread\b\s*[({a-z]", code) and path.parent.name != "runtime":
            wrong.append(f"{path.relative_to(ROOT)} starts threads")
    assert not wrong


def test_the_c_header_includes_c_headers_only() -> None:
    assert {name for _, name in includes(CSRC / "api" / "pyengine.h")} == {"stddef.h", "stdint.h"}


def imports(path: Path) -> set[str]:
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module)
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def test_python_modules_import_only_the_layers_below_them() -> None:
    package = ROOT / "pyengine"
    core_users = {
        "__init__.py",
        "model.py",
        "gguf_file.py",
        "quant.py",
        "capi.py",
        "sampling.py",
        "machine.py",
        "threads.py",
    }
    wrong = []
    for path in package.rglob("*.py"):
        names = imports(path)
        if "pyengine._core" in names and path.name not in core_users:
            wrong.append(f"{path.name} imports _core")
        if any(n.split(".")[0] in {"tools", "pyengine_convert", "gguf", "torch", "transformers"} for n in names):
            wrong.append(f"{path.name} imports {sorted(names)}")
        if path.parent == package and any(n.startswith("pyengine.cli") for n in names):
            wrong.append(f"{path.name} imports a command")
    assert not wrong


def _kernel_objects() -> list[Path]:
    checks = os.environ.get("PYENGINE_CHECKS_DIR")
    build = Path(checks).resolve().parent if checks else ROOT / "build"
    instrumented = {"fuzz", "coverage"}  # clang's, with symbols of their own; nothing of them is shipped
    found = build.rglob("pe_kernels_*.dir/**/*.o")
    return sorted(path for path in found if path.relative_to(build).parts[0] not in instrumented)


def test_every_kernel_object_defines_one_strong_entry_and_nothing_weak() -> None:
    """A template instantiated under -mavx512 may be picked by the linker for everyone and crash an older CPU."""
    objects = _kernel_objects()
    if not objects and not os.environ.get("PYENGINE_CHECKS_DIR"):
        pytest.skip("no native build tree: run through make test")
    assert objects, "PYENGINE_CHECKS_DIR is set, but its build tree holds no kernel objects"
    nm = shutil.which("nm")
    assert nm, "nm (binutils) is needed"
    for path in objects:
        table = subprocess.run([nm, "-C", str(path)], check=True, capture_output=True, text=True).stdout
        strong = [line for line in table.splitlines() if re.search(r" [TDBR] ", line)]
        weak = [line for line in table.splitlines() if re.search(r" [WVu] ", line) and "DW.ref" not in line]
        assert len(strong) == 1, f"{path}:\n" + "\n".join(strong)
        assert not weak, f"{path}:\n" + "\n".join(weak)


def test_long_files_say_why_they_are_long() -> None:
    wrong = []
    for path in [*sources(CSRC), *(ROOT / "pyengine").rglob("*.py"), *(ROOT / "tools" / "convert").rglob("*.py")]:
        lines = path.read_text().splitlines()
        if len(lines) > 600 and path.parent.parent.name != "kernels" and "long" not in "\n".join(lines[:12]).lower():
            wrong.append(f"{path.relative_to(ROOT)}: {len(lines)} lines")
    assert not wrong
