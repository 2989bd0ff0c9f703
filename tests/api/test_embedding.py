"""The C interface as a stranger meets it: the installed header, the installed library, a C compiler."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest

import pyengine
from pyengine import capi, errors

HERE = Path(__file__).parent
CC = shutil.which(os.environ.get("CC", "cc")) or "cc"
CXX = shutil.which(os.environ.get("CXX", "c++")) or "c++"
STRICT = ["-Wall", "-Wextra", "-Wpedantic", "-Werror"]


def greedy(model: pyengine.Model, prompt: list[int], count: int) -> list[int]:
    ids: list[int] = []
    with model.session(n_ctx=256, threads=2) as session:
        logits = session.eval(prompt)
        while True:
            ids.append(int(np.argmax(logits)))
            if len(ids) == count:
                return ids
            logits = session.eval(ids[-1:])


@pytest.mark.parametrize(
    ("compiler", "language", "standard"), [(CC, "c", "c99"), (CXX, "c++", "c++11"), (CXX, "c++", "c++20")]
)
def test_header_compiles_alone_and_strictly(compiler: str, language: str, standard: str, tmp_path: Path) -> None:
    source = tmp_path / "header.c"
    source.write_text('#include "pyengine.h"\n#include "pyengine.h"\nint main(void) { return pe_version() == 0; }\n')
    include = capi.header_path().parent
    command = [compiler, "-x", language, f"-std={standard}", *STRICT, "-fsyntax-only", "-I", str(include), str(source)]
    subprocess.run(command, check=True)


def test_c_program_prints_the_same_greedy_ids_as_python(tmp_path: Path) -> None:
    library = capi.library_path()
    program = tmp_path / "embed"
    command = [CC, "-std=c99", *STRICT, "-I", str(capi.header_path().parent), str(HERE / "embed.c"), str(library)]
    subprocess.run([*command, f"-Wl,-rpath,{library.parent}", "-o", str(program)], check=True)
    path = pyengine.demo_model_path()
    with pyengine.Model.open(path) as model:
        prompt = model.tokenizer.encode("What is 12 + 30?")
        expected = greedy(model, prompt, 40)
    run = subprocess.run([str(program), str(path), "40", *map(str, prompt)], check=True, capture_output=True, text=True)
    assert [int(line) for line in run.stdout.split()] == expected


def test_cffi_evaluates_the_same_bits_as_the_binding() -> None:
    ffi, lib = capi.ffi, capi.lib
    path = pyengine.demo_model_path()
    with pyengine.Model.open(path) as model, model.session(n_ctx=64, threads=1) as session:
        expected = session.eval([1, 2, 3])
    model_out = ffi.new("pe_model **")
    assert lib.pe_model_open(str(path).encode(), ffi.NULL, model_out) == lib.PE_OK
    options = ffi.new("pe_session_options *")
    lib.pe_session_options_init(options)
    options.n_ctx = 64
    session_out = ffi.new("pe_session **")
    assert lib.pe_session_create(model_out[0], options, session_out) == lib.PE_OK
    logits = np.empty(expected.size, np.float32)
    buffer = ffi.cast("float *", logits.ctypes.data)
    assert lib.pe_session_eval(session_out[0], [1, 2, 3], 3, lib.PE_LOGITS_LAST, buffer, logits.size) == lib.PE_OK
    assert logits.tobytes() == expected.tobytes()
    lib.pe_session_free(session_out[0])
    lib.pe_model_close(model_out[0])


def test_every_declared_function_is_exported_and_nothing_else() -> None:
    declared = set(re.findall(r"\b(pe_\w+)\(", capi.declarations(capi.header_path().read_text())))
    for name in declared:
        assert getattr(capi.lib, name)
    nm = shutil.which("nm")
    if not nm:
        pytest.fail("nm (binutils) is needed to look at the library's symbols")
    table = subprocess.run([nm, "-D", "--defined-only", str(capi.library_path())], check=True, capture_output=True)
    exported = {line.split()[-1] for line in table.stdout.decode().splitlines()}
    assert declared <= exported
    # Weak instantiations of the C++ library's templates are unavoidable; nothing of ours but the interface is visible.
    ours = {name for name in exported if "pe" in name and "2pe" in name}
    assert not ours


def test_every_status_of_the_header_has_its_exception() -> None:
    header = capi.header_path().read_text()
    statuses = {int(value) for value in re.findall(r"PE_E_\w+ = (\d+)", header)}
    assert statuses == set(errors.BY_STATUS)


def test_one_header_is_the_only_source_of_declarations() -> None:
    root = HERE.parent.parent
    copies = [p for p in root.glob("**/pyengine.h") if not {".venv", "build"} & set(p.relative_to(root).parts)]
    assert copies == [root / "csrc" / "api" / "pyengine.h"]
    assert capi.header_path().read_bytes() == copies[0].read_bytes()
    assert "cdef(" not in "".join(p.read_text() for p in (root / "pyengine").rglob("*.py") if p.name != "capi.py")


def test_misuse_is_refused_with_a_sentence() -> None:
    ffi, lib = capi.ffi, capi.lib
    out = ffi.new("pe_model **")
    assert lib.pe_model_open(ffi.NULL, ffi.NULL, out) == lib.PE_E_ARGUMENT
    assert lib.pe_model_open(b"x", ffi.NULL, ffi.NULL) == lib.PE_E_ARGUMENT
    options = ffi.new("pe_model_options *")  # struct_size 0: the _init function was not called
    assert lib.pe_model_open(b"x", options, out) == lib.PE_E_ARGUMENT
    assert b"_init" in ffi.string(lib.pe_last_error().message)
    assert lib.pe_session_eval(ffi.NULL, ffi.NULL, 0, lib.PE_LOGITS_NONE, ffi.NULL, 0) == lib.PE_E_ARGUMENT
    assert lib.pe_session_length(ffi.NULL) == 0
    lib.pe_session_cancel(ffi.NULL)
    lib.pe_model_close(ffi.NULL)
    lib.pe_file_close(ffi.NULL)
    assert lib.pe_format_at(1000, ffi.new("pe_format *")) == lib.PE_E_ARGUMENT
    assert lib.pe_tier_name(1000) == ffi.NULL
