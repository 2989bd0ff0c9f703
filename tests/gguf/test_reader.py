"""The reader's promises: every valid file reads exactly as others read it, every other file gives a clear error."""

from __future__ import annotations

import math
import os
import re
import signal
import struct
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

from pyengine.errors import EngineError, FileError, FormatError, InvalidArgument, UnsupportedError
from pyengine.gguf_file import GgufFile
from tests.gguf.builder import (
    BOOL,
    F32,
    F64,
    I8,
    I16,
    I32,
    I64,
    SCALARS,
    STRING,
    U8,
    U16,
    U32,
    U64,
    Gguf,
    Tensor,
    array,
    f32_tensor,
    small,
    value,
)
from tests.gguf.cases import CASES, Case
from tests.gguf.plain_reader import Plain
from tests.support import DATA, ROOT, needs_data, run_check

MODELS = sorted((DATA / "gguf").glob("*.gguf"))
VOCABULARIES = sorted((DATA / "vocab").glob("*.gguf"))
LOADS = ("header", "mmap", "copy")


@pytest.fixture
def small_file(tmp_path: Path) -> Path:
    return write(tmp_path / "small.gguf", small())


def write(path: Path, file: Gguf | bytes) -> Path:
    path.write_bytes(file if isinstance(file, bytes) else file.build())
    return path


def plain(content: Any) -> Any:
    """Arrays as lists, numpy scalars as Python's."""
    return content.tolist() if isinstance(content, np.ndarray | np.generic) else content


# ---------------------------------------------------------------- valid files


@pytest.mark.parametrize("load", ["mmap", "copy"])
def test_every_value_type_reads_back(tmp_path: Path, load: Any) -> None:
    source = small()
    with GgufFile.open(write(tmp_path / "m.gguf", source), load=load) as file:
        assert file.version == 3
        assert list(file.metadata) == [key.name for key in source.keys]
        found = {key: plain(file.metadata[key]) for key in file.metadata}
        assert found == Plain(tmp_path / "m.gguf").metadata
        assert found["list.strings"] == ["<s>", "", "é", "\x1b[31m red", "日本"]
        assert found["a.bool"] is True
        assert (found["a.u64"], found["a.i64"], found["a.f64"]) == (2**63 + 5, -(2**62), 1e-300)
        for tensor in source.tensors:
            info = file.tensors[str(tensor.name)]
            assert (info.dims, info.type, info.size) == (tuple(tensor.dims), tensor.kind, len(tensor.data))
            assert file.data(info.name).tobytes() == tensor.data


def test_header_mode_has_no_data(small_file: Path) -> None:
    with GgufFile.open(small_file, load="header") as file:
        assert len(file.tensors) == 5
        with pytest.raises(InvalidArgument, match="no tensor data"):
            file.data("token_embd.weight")


def test_version_2_and_other_alignments_are_read(tmp_path: Path) -> None:
    for alignment in (8, 64, 4096, 2**20):
        source = Gguf([value("general.alignment", U32, alignment)], small().tensors, version=2, alignment=alignment)
        with GgufFile.open(write(tmp_path / "m.gguf", source)) as file:
            assert file.version == 2
            for tensor in source.tensors:
                info = file.tensors[str(tensor.name)]
                assert info.offset % alignment == 0
                assert file.data(info.name).tobytes() == tensor.data


def test_a_vocabulary_only_file_is_read(tmp_path: Path) -> None:
    with GgufFile.open(write(tmp_path / "m.gguf", Gguf([value("a", U8, 1)]))) as file:
        assert (plain(file.metadata["a"]), file.tensors) == (1, {})


def test_a_file_without_keys_is_read(tmp_path: Path) -> None:
    with GgufFile.open(write(tmp_path / "m.gguf", Gguf(tensors=[f32_tensor("t", 4)]))) as file:
        assert file.data("t").view(np.float32).tolist() == [0, 1, 2, 3]


def test_the_last_padding_may_be_missing_and_bytes_may_follow(tmp_path: Path) -> None:
    source = Gguf(tensors=[f32_tensor("t", 3)])
    whole = source.build()
    for data in (whole[: source.places["data"] + 12], whole + b"more"):
        with GgufFile.open(write(tmp_path / "m.gguf", data)) as file:
            assert file.data("t").view(np.float32).tolist() == [0, 1, 2]


def test_sizes_of_all_tensor_types_equal_the_gguf_packages(tmp_path: Path) -> None:
    sizes = {int(kind): size for kind, size in gguf.GGML_QUANT_SIZES.items()}
    sizes[9] = (32, 36)  # Q8_1, never stored: the package still has its layout of 2023 with two 32-bit scales
    tensors = [Tensor(f"t{kind}", [block * 3, 2], kind, bytes(6 * size)) for kind, (block, size) in sizes.items()]
    with GgufFile.open(write(tmp_path / "m.gguf", Gguf(tensors=tensors))) as file:
        assert {t.type: t.size for t in file.tensors.values()} == {kind: 6 * size for kind, (_, size) in sizes.items()}
    for kind, (block, size) in sizes.items():
        if block > 1:
            broken = Tensor("t", [block * 3 - 1], kind, bytes(3 * size))
            with pytest.raises(FormatError, match=f"blocks of {block}") as error:
                GgufFile.open(write(tmp_path / "m.gguf", Gguf(tensors=[broken])))
            assert error.value.code == "partial_block"


@needs_data
@pytest.mark.parametrize("path", MODELS, ids=lambda path: path.stem)
def test_models_read_as_with_the_gguf_package(path: Path) -> None:
    oracle = gguf.GGUFReader(path)
    with GgufFile.open(path) as file:
        fields = {key: field.contents() for key, field in oracle.fields.items() if not key.startswith("GGUF.")}
        assert {key: plain(file.metadata[key]) for key in file.metadata} == fields
        assert list(file.tensors) == [tensor.name for tensor in oracle.tensors]
        for expected in oracle.tensors:
            tensor = file.tensors[expected.name]
            assert tensor.dims == tuple(expected.shape.tolist())
            assert (tensor.type, tensor.offset) == (int(expected.tensor_type), expected.data_offset)
            assert file.data(expected.name).tobytes() == expected.data.tobytes()


@needs_data
@pytest.mark.parametrize("path", VOCABULARIES, ids=lambda path: path.stem)
def test_real_vocabularies_read_exactly(path: Path) -> None:
    with GgufFile.open(path) as file:
        assert {key: plain(file.metadata[key]) for key in file.metadata} == Plain(path).metadata


@needs_data
def test_a_152k_vocabulary_opens_within_50_ms() -> None:
    def once() -> float:
        start = time.perf_counter()
        GgufFile.open(DATA / "vocab" / "ggml-vocab-qwen2.gguf").close()
        return time.perf_counter() - start

    assert min(once() for _ in range(10)) < 0.050


# ---------------------------------------------------------------- malformed files


@pytest.mark.parametrize("load", LOADS)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_malformed_file_is_refused(case: Case, load: Any, tmp_path: Path) -> None:
    path = write(tmp_path / "broken.gguf", case.data)
    with pytest.raises(EngineError) as caught:
        GgufFile.open(path, load=load)
    error = caught.value
    assert (error.code, type(error)) == (case.code, UnsupportedError if case.unsupported else FormatError)
    assert case.words in error.message
    assert error.message.isprintable()
    assert error.field.isprintable()
    if case.offset is not None:
        assert error.offset == case.offset
    if case.named is not None:
        assert error.field.startswith(case.named)


def test_hostile_text_in_values_is_data_but_never_in_messages(tmp_path: Path) -> None:
    hostile = "\x1b]0;title\x07 \u202egnp.exe \u200b\x9b31m"
    file = Gguf([value("general.name", STRING, hostile)])
    assert GgufFile.open(write(tmp_path / "m.gguf", file)).metadata["general.name"] == hostile
    with pytest.raises(FormatError) as caught:
        GgufFile.open(write(tmp_path / "m.gguf", Gguf([value("a\u202eb", U8, 1), value("a\u202eb", U8, 1)])))
    assert (caught.value.code, caught.value.field) == ("duplicate_key", "ab")


# ---------------------------------------------------------------- the file system


@contextmanager
def time_limit(seconds: int) -> Iterator[None]:
    def expire(*_: object) -> None:
        raise AssertionError(f"still blocked after {seconds} s")

    before = signal.signal(signal.SIGALRM, expire)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


@pytest.mark.parametrize("load", LOADS)
def test_what_is_no_regular_file_is_refused(tmp_path: Path, load: Any) -> None:
    fifo = tmp_path / "fifo.gguf"
    os.mkfifo(fifo)
    expected = {
        tmp_path / "none.gguf": (FileError, "file_not_found"),
        tmp_path / "none" / "none.gguf": (FileError, "file_not_found"),
        tmp_path: (FileError, "is_directory"),
        fifo: (FileError, "not_regular_file"),
        Path("/dev/zero"): (FileError, "not_regular_file"),
        write(tmp_path / "empty.gguf", b""): (FormatError, "empty_file"),
    }
    for path, (kind, code) in expected.items():
        with time_limit(10), pytest.raises(kind, match=path.name) as caught:
            GgufFile.open(path, load=load)
        assert caught.value.code == code


def test_a_file_without_permission_is_refused(small_file: Path) -> None:
    small_file.chmod(0)
    user = os.geteuid()
    if user == 0:  # the superuser may read everything
        try:
            os.seteuid(65534)
        except OSError as error:
            pytest.skip(f"a namespace without other users ({error})")
    try:
        with pytest.raises(FileError, match="permission") as caught:
            GgufFile.open(small_file)
    finally:
        os.seteuid(user)
    assert caught.value.code == "permission_denied"


def test_a_path_may_have_any_letters(tmp_path: Path) -> None:
    folder = tmp_path / "模型 é ü"
    folder.mkdir()
    with GgufFile.open(write(folder / "ich bin groß.gguf", small())) as file:
        assert len(file.tensors) == 5


@pytest.mark.parametrize("load", LOADS)
def test_a_sparse_terabyte_costs_nothing(tmp_path: Path, load: Any) -> None:
    path = write(tmp_path / "zeros.gguf", b"\0")
    os.truncate(path, 2**40)
    with time_limit(10), pytest.raises(FormatError, match="zeros"):
        GgufFile.open(path, load=load)
    path = write(tmp_path / "small.gguf", small())
    os.truncate(path, 2**40)
    with time_limit(10), GgufFile.open(path, load=load) as file:
        assert len(file.tensors) == 5


def test_tensors_beyond_4_gib_are_read(tmp_path: Path) -> None:
    gap = 5 * 2**30
    source = Gguf(tensors=[Tensor("big", [gap]), f32_tensor("last", 4)])
    source.tensors[0].kind = 24  # I8
    source.tensors[1].offset = gap
    path = write(tmp_path / "m.gguf", source)
    with path.open("r+b") as out:  # a sparse file
        out.seek(source.places["data"] + gap)
        out.write(source.tensors[1].data)
    with GgufFile.open(path) as file:
        assert file.tensors["last"].offset == source.places["data"] + gap
        assert file.data("last").view(np.float32).tolist() == [0, 1, 2, 3]


# ---------------------------------------------------------------- split models


def part(index: int, count: int, tensors: list[Tensor], total: int) -> Gguf:
    keys = [value("split.no", U16, index), value("split.count", U16, count), value("split.tensors.count", I32, total)]
    return Gguf([value("general.architecture", STRING, "llama"), *keys] if index == 0 else keys, tensors)


def write_parts(folder: Path, n_parts: int = 3) -> list[Path]:
    """Two tensors a part, named t0, t1, ..."""
    tensors = [f32_tensor(f"t{i}", 5 + i) for i in range(2 * n_parts)]
    paths = [folder / f"model-{i + 1:05}-of-{n_parts:05}.gguf" for i in range(n_parts)]
    for i, path in enumerate(paths):
        write(path, part(i, n_parts, tensors[2 * i : 2 * i + 2], len(tensors)))
    return paths


@pytest.mark.parametrize("load", LOADS)
def test_all_parts_of_a_split_model_are_read(tmp_path: Path, load: Any) -> None:
    paths = write_parts(tmp_path)
    with GgufFile.open(paths[0], load=load) as file:
        assert file.metadata["general.architecture"] == "llama"
        assert [(t.name, t.part) for t in file.tensors.values()] == [(f"t{i}", i // 2) for i in range(6)]
        for i, tensor in enumerate(file.tensors.values()):
            assert tensor.dims == (5 + i,)
            if load != "header":
                assert file.data(tensor.name).view(np.float32).tolist() == list(range(5 + i))


def test_a_single_part_may_have_any_name(tmp_path: Path) -> None:
    for name in ("model-00001-of-00001.gguf", "renamed.gguf"):
        path = write(tmp_path / name, part(0, 1, [f32_tensor("t", 2)], 1))
        assert list(GgufFile.open(path).tensors) == ["t"]


def _refused(path: Path, code: str, *words: str, kind: type[EngineError] = FormatError) -> None:
    with pytest.raises(kind) as caught:
        GgufFile.open(path)
    assert caught.value.code == code
    for word in words:
        assert word in caught.value.message


def test_a_missing_part_is_named(tmp_path: Path) -> None:
    paths = write_parts(tmp_path)
    paths[1].unlink()
    _refused(paths[0], "split_part_missing", paths[1].name, kind=FileError)


def test_opening_a_later_part_names_the_first(tmp_path: Path) -> None:
    paths = write_parts(tmp_path)
    _refused(paths[1], "split_not_first", "part 2 of 3", paths[0].name)


def test_a_renamed_first_part_is_refused(tmp_path: Path) -> None:
    paths = write_parts(tmp_path)
    _refused(paths[0].rename(tmp_path / "model-00001-of-00002.gguf"), "split_bad_name", "-00001-of-00003.gguf")


@pytest.mark.parametrize(
    "name",
    [
        *("p.gguf", "model-0000x-of-00003.gguf", "model-00001-of-0000x.gguf", "model- 0001-of-00003.gguf"),
        *("model-00001_of-00003.gguf", "model-00002-of-00003.gguf", "model-00001-of-00003.GGUF"),
    ],
)
def test_a_name_that_does_not_tell_the_other_parts_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    write_parts(tmp_path)[0].rename(tmp_path / name)
    monkeypatch.chdir(tmp_path)
    _refused(Path(name), "split_bad_name", "-00001-of-00003.gguf")


def test_a_split_model_need_not_say_how_many_tensors_it_has(tmp_path: Path) -> None:
    for i, path in enumerate(write_parts(tmp_path, 2)):
        file = part(i, 2, [f32_tensor(f"t{i}", 5)], 2)
        file.keys = [key for key in file.keys if key.name != "split.tensors.count"]
        write(path, file)
    with GgufFile.open(tmp_path / "model-00001-of-00002.gguf") as model:
        assert list(model.tensors) == ["t0", "t1"]


CHANGED = """
import os, sys, pyengine
pyengine.guard_mapped_files()
with pyengine.GgufFile.open(sys.argv[1]) as file:
    file.check_unchanged()
    os.truncate(sys.argv[2], os.path.getsize(sys.argv[2]) - 4)
    try:
        file.check_unchanged()
    except pyengine.FileError as error:
        print(error.code, error.message)
"""


@pytest.mark.parametrize("n_parts", [1, 2])
def test_a_guarded_part_that_changes_in_use_is_named(tmp_path: Path, n_parts: int) -> None:
    paths = write_parts(tmp_path, n_parts)
    command = [sys.executable, "-c", CHANGED, str(paths[0]), str(paths[-1])]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    which = "part 2 of the model file" if n_parts == 2 else "the model file"
    assert done.stdout.startswith(f"file_changed {which} was cut or written to"), done


def test_parts_that_do_not_belong_together_are_refused(tmp_path: Path) -> None:
    paths = write_parts(tmp_path)
    second, third = paths[1].read_bytes(), paths[2].read_bytes()
    paths[1].write_bytes(third)
    _refused(paths[0], "split_mismatch", paths[1].name, "part 3 of 3")
    write(paths[1], part(1, 4, [f32_tensor("t2", 7)], 6))
    _refused(paths[0], "split_mismatch", paths[1].name, "part 2 of 4")
    write(paths[1], Gguf(tensors=[f32_tensor("t2", 7)]))
    _refused(paths[0], "split_mismatch", paths[1].name)
    write(paths[1], part(1, 3, [f32_tensor("t2", 7)], 6))
    _refused(paths[0], "split_tensor_count", "5", "6")
    write(paths[1], part(1, 3, [f32_tensor("t0", 7), f32_tensor("t3", 8)], 6))
    _refused(paths[0], "duplicate_tensor", "t0", "part 2")
    write(paths[1], second[:-1])
    _refused(paths[0], "truncated_data", paths[1].name, "download it again")
    write(paths[1], b"<html>")
    _refused(paths[0], "web_page", paths[1].name)


# ---------------------------------------------------------------- in bulk, inside one process


def check(*args: object, requests: str = "") -> str:
    return run_check("gguf_check", *args, requests=requests)


def test_a_file_cut_anywhere_is_refused(small_file: Path) -> None:
    assert check("cut", 1, small_file).startswith("0 opened, ")


@needs_data
def test_a_real_file_cut_at_many_places_is_refused() -> None:
    assert check("cut", 49999, MODELS[0], VOCABULARIES[0]).startswith("0 opened, ")


def test_any_damaged_header_byte_or_integer_gives_a_file_or_an_error(small_file: Path) -> None:
    opened, refused = (int(word) for word in check("mutate", 1, small_file).split()[::2])
    assert opened > 10_000  # most text and numbers may change
    assert refused > 100_000


@needs_data
def test_damaged_headers_of_real_files_give_a_file_or_an_error() -> None:
    check("mutate", 499, *MODELS[:3])


def test_hostile_files_take_no_more_heap_and_time_than_promised(tmp_path: Path) -> None:
    hostile = {
        "keys": Gguf([value(f"{i:x}", U8, 0) for i in range(65536)]),
        "long_keys": Gguf([value(f"{i:065535}", U8, 0) for i in range(64)]),
        "tensors": Gguf(tensors=[Tensor(f"{i:x}", [1], 24, b"\0") for i in range(65536)]),
        "strings": Gguf([array(f"list{i}", STRING, [""] * 2**20) for i in range(2)]),
        "string": Gguf([value("text", STRING, "x" * (16 << 20))]),
    }
    paths = [write(tmp_path / f"{name}.gguf", file) for name, file in hostile.items()]
    paths += [write(tmp_path / f"{case.name}.gguf", case.data) for case in CASES]
    for path in paths:
        start = time.perf_counter()
        check("bounded", path)
        assert time.perf_counter() - start < 1 + path.stat().st_size / 2**20


@needs_data
def test_real_vocabularies_take_no_more_heap_than_promised() -> None:
    for path in VOCABULARIES:
        assert check("bounded", path) == "1 opened, 0 refused\n"


def test_copying_can_be_stopped_and_survives_a_shrinking_file(small_file: Path) -> None:
    check("copying", small_file)


# ---------------------------------------------------------------- typed access, as the model uses it

INTEGERS = {U8: 200, I8: 100, U16: 60000, I16: 30000, U32: 2**32 - 1, I32: 2**31 - 1, U64: 2**64 - 1, I64: 2**63 - 1}


def typed_file() -> Gguf:
    keys = [value(f"int.{SCALARS[kind]}", kind, number) for kind, number in INTEGERS.items()]
    keys += [value(f"minus.{SCALARS[kind]}", kind, -1) for kind in (I8, I16, I32, I64)]
    keys += [value("f32", F32, 0.1), value("f64", F64, 0.1), value("nan", F32, math.nan), value("inf", F64, math.inf)]
    keys += [
        value("huge", F64, 1e300),
        value("yes", BOOL, True),
        value("no", BOOL, False),
        value("text", STRING, "abc"),
    ]
    keys += [array("ints", I32, [5, -6, 7]), array("floats", F64, [1.5, math.inf]), array("bools", BOOL, [1, 0])]
    keys += [array("texts", STRING, ["a", "b"]), array("none", U32, [])]
    return Gguf(keys)


def _typed_answers() -> dict[str, str]:
    """Request -> the value, or "! CODE" and the start of the message's tail."""
    top = 2**64 - 1
    answers = {f"integer int.{SCALARS[kind]} 0 {top}": f"= {number}" for kind, number in INTEGERS.items()}
    answers |= {f"integer minus.{c} 0 {top}": "! value_out_of_range" for c in "bhiq"}
    answers |= {
        "u32 int.B 200 200": "= 200",
        "u32 int.B 0 199": "! value_out_of_range",
        "u32 int.B 201 300": "! value_out_of_range",
        "u32 int.Q 0 4294967295": "! value_out_of_range",
        "u32 f32 0 9": "! wrong_type",
        "u32 yes 0 9": "! wrong_type",
        "u32 text 0 9": "! wrong_type",
        "u32 ints 0 9": "! wrong_type",
        "u32 gone 0 9": "! missing_key",
        "f32 f32": "= 0.100000001",
        "f32 f64": "= 0.100000001",
        "f32 int.B": "! wrong_type",
        "f32 floats": "! wrong_type",
        "f32 nan": "! value_not_finite",
        "f32 inf": "! value_not_finite",
        "f32 huge": "! value_out_of_range",
        "f32 gone": "! missing_key",
        "boolean yes": "= 1",
        "boolean no": "= 0",
        "boolean int.B": "! wrong_type",
        "boolean bools": "! wrong_type",
        "string text": "= abc",
        "string int.B": "! wrong_type",
        "string texts": "! wrong_type",
        "maybe_integer gone 0 1": "= absent",
        "maybe_u32 gone 0 1": "= absent",
        "maybe_f32 gone": "= absent",
        "maybe_boolean gone": "= absent",
        "maybe_string gone": "= absent",
        "maybe_integer int.B 0 255": "= 200",
        "maybe_u32 int.B 0 255": "= 200",
        "maybe_u32 text 0 255": "! wrong_type",
        "maybe_f32 f64": "= 0.100000001",
        "maybe_f32 text": "! wrong_type",
        "maybe_boolean no": "= 0",
        "maybe_boolean text": "! wrong_type",
        "maybe_string text": "= abc",
        "maybe_string yes": "! wrong_type",
        "array ints integer 3 3": "= 3",
        "array ints integer 0 2": "! wrong_length",
        "array ints integer 4 9": "! wrong_length",
        "array ints float 0 9": "! wrong_type",
        "array floats float 2 2": "= 2",
        "array bools bool 2 2": "= 2",
        "array bools integer 2 2": "! wrong_type",
        "array texts string 1 2": "= 2",
        "array texts integer 1 2": "! wrong_type",
        "array none integer 0 0": "= 0",
        "array text string 0 9": "! wrong_type",
        "array gone string 0 9": "! missing_key",
        "integer_at ints 0": "= 5",
        "integer_at ints 1": "! value_out_of_range",
        "integer_at ints 2": "= 7",
        "integer_at floats 0": "! wrong_type",
        "number_at floats 0": "= 1.5",
        "number_at floats 1": "! value_not_finite",
        "number_at ints 0": "! wrong_type",
        "boolean_at bools 1": "= 0",
        "boolean_at ints 0": "! wrong_type",
    }
    return answers


def test_typed_access_gives_the_value_or_names_what_is_wrong(tmp_path: Path) -> None:
    source = typed_file()
    expected = _typed_answers()
    path = write(tmp_path / "typed.gguf", source)
    lines = check("get", path, requests="\n".join(expected) + "\n").splitlines()
    for (request, answer), line in zip(expected.items(), lines, strict=True):
        key = request.split()[1]
        if answer.startswith("="):
            assert line == answer, request
            continue
        _, code, offset, field, message = line.split(" ", 4)
        assert (f"! {code}", field) == (answer, key), request
        assert f"'{key}'" in message
        if code == "missing_key":
            assert int(offset) == -1
        else:
            skip = {"text": 8}.get(key, 12 if key in ("ints", "floats", "bools", "texts", "none") else 0)
            assert int(offset) == source.places[f"key:{key}"] + skip, request


def test_errors_of_typed_access_name_both_the_found_and_the_expected(tmp_path: Path) -> None:
    path = write(tmp_path / "typed.gguf", typed_file())
    requests = {
        "u32 int.H 1 512": "'int.H' is 60000; expected an integer from 1 to 512",
        "u32 minus.i 1 512": "'minus.i' is -1; expected an integer from 1 to 512",
        "u32 text 1 512": "'text' has type string; expected an integer",
        "f32 int.B": "'int.B' has type u8; expected f32 or f64",
        "array ints string 1 2": "'ints' has type array of i32; expected an array of strings",
        "array texts string 3 3": "'texts' has 2 elements; expected exactly 3",
    }
    lines = check("get", path, requests="\n".join(requests) + "\n").splitlines()
    assert [line.split(" ", 4)[4] for line in lines] == list(requests.values())


def test_the_builder_writes_what_the_gguf_package_reads(small_file: Path) -> None:
    oracle = gguf.GGUFReader(small_file)
    assert oracle.get_field("a.u16").contents() == 60000  # type: ignore[union-attr]
    assert [tensor.name for tensor in oracle.tensors] == [tensor.name for tensor in small().tensors]
    assert struct.unpack("<15f", oracle.tensors[0].data.tobytes()[:60]) == tuple(range(15))


# ---------------------------------------------------------------- the list of codes


def test_every_error_code_is_documented() -> None:
    manuals = [(ROOT / "docs" / name).read_text() for name in ("errors.md", "stream.md")]
    listed = {code for text in manuals for code in re.findall(r"^\| `(\w+)` \|", text, re.MULTILINE)}
    python = "".join(path.read_text() for path in sorted((ROOT / "pyengine").rglob("*.py")))
    sources = "".join(path.read_text() for path in sorted((ROOT / "csrc").rglob("*.[ch]*"))) + python
    thrown = set(re.findall(r'Status::k\w+,\s*"(\w+)"', sources))
    thrown |= set(re.findall(r'\bfail\w*\((?:[^"();]*,\s*)?"([a-z0-9]+(?:_[a-z0-9]+)+)"', sources))
    thrown |= {case.code for case in CASES} | set(re.findall(r'\bcode="(\w+)"', python))
    assert thrown - listed == set()
    assert listed - set(re.findall(r'"(\w+)"', sources)) == set()
