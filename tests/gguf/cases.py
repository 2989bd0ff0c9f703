"""Malformed GGUF files: a valid file with one thing wrong, by the name of what is wrong."""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from tests.gguf.builder import (
    ARRAY,
    BOOL,
    F32,
    F64,
    STRING,
    T_F32,
    T_Q4_0,
    T_Q4_K,
    U8,
    U32,
    U64,
    Gguf,
    Key,
    Tensor,
    array,
    f32_tensor,
    small,
    text,
    value,
)


@dataclass(frozen=True)
class Case:
    name: str
    code: str
    data: bytes = field(repr=False)
    offset: int | None = None  # expected, where it matters
    named: str | None = None  # the error's field
    words: str = ""  # something a person must be told
    unsupported: bool = False  # UnsupportedError instead of FormatError

    def __str__(self) -> str:
        return self.name


def _with_keys(*keys: Key) -> Gguf:
    """The small file with more keys in front."""
    file = small()
    file.keys[:0] = keys
    return file


def _with_tensors(*tensors: Tensor) -> Gguf:
    """One good tensor, then these."""
    return Gguf([value("general.architecture", STRING, "llama")], [f32_tensor("good", 8), *tensors])


def _key_case(name: str, code: str, key: Key, at: int | None = None, named: str | None = None, words: str = "") -> Case:
    """`at`: where the error is, counted from the start of the value (negative: before it)."""
    file = _with_keys(key)
    data = file.build()
    place = file.places.get(f"key:{key.name!s}")
    return Case(name, code, data, None if at is None or place is None else place + at, named, words)


def _tensor_case(name: str, code: str, tensor: Tensor, words: str = "", unsupported: bool = False) -> Case:
    file = _with_tensors(tensor)
    data = file.build()
    named = tensor.name if isinstance(tensor.name, str) and len(tensor.name) < 9 and tensor.name.isprintable() else ""
    return Case(name, code, data, named=named, words=words, unsupported=unsupported)


def not_gguf() -> Iterator[Case]:
    lfs = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a21\nsize 4920738407\n"
    yield Case("git_lfs_pointer", "lfs_pointer", lfs, 0, words="Git LFS pointer")
    yield Case("html_page", "web_page", b"\n <!DOCTYPE html><html><head>", 0, words="web page")
    yield Case("html_with_byte_order_mark", "web_page", b"\xef\xbb\xbf<html>" + bytes(100), words="web page")
    yield Case("xml_access_denied", "web_page", b"<?xml version='1.0'?><Error><Code>AccessDenied", words="web page")
    yield Case("json_error", "json_text", b'{"error": "Repository not found"}', words="JSON")
    yield Case("zip", "zip_archive", b"PK\x03\x04" + bytes(60), words="PyTorch")
    yield Case("pickle", "pickle", b"\x80\x02}q\x00(X" + bytes(60), words="convert")
    yield Case("safetensors", "safetensors", struct.pack("<Q", 200) + b'{"__metadata__":{}', words="safetensors")
    yield Case("gzip", "compressed", b"\x1f\x8b\x08\x00" + bytes(60), words="unpack")
    yield Case("xz", "compressed", b"\xfd7zXZ\x00" + bytes(60), words="unpack")
    yield Case("tar", "compressed", b"model.gguf".ljust(257, b"\0") + b"ustar\0" + bytes(300), words="unpack")
    for magic in ("ggml", "ggmf", "ggjt", "ggla"):
        yield Case(
            f"old_{magic}", "old_ggml", magic.encode()[::-1] + struct.pack("<I", 1) + bytes(40), words="before GGUF"
        )
    yield Case("zeros", "all_zeros", bytes(4096), 0, words="download")
    yield Case("random_bytes", "bad_magic", b"\xde\xad\xbe\xef" * 20, 0, words="GGUF")
    yield Case("one_byte", "bad_magic", b"x", 0)


def headers() -> Iterator[Case]:
    yield Case("magic_only", "truncated_header", b"GGUF", words="download")
    yield Case("half_a_magic", "truncated_header", b"GG", words="download")
    yield Case("cut_in_counts", "truncated_header", small().build()[:20])
    for version in (0, 4, 0xFFFFFFFF):
        file = small()
        file.version = version
        yield Case(f"version_{version}", "bad_version", file.build(), 4, words=str(version))
    file = small()
    file.version = 1
    yield Case("version_1", "version_1", file.build(), 4, words="version 1")
    file.version = 3 << 24
    yield Case("big_endian", "big_endian", file.build(), 4, words="big-endian")
    for count, code in ((2**64 - 1, "too_many_keys"), (65537, "too_many_keys"), (65536, "truncated_header")):
        file = small()
        file.n_keys = count
        yield Case(f"key_count_{count}", code, file.build(), 16)
    for count, code in ((2**63, "too_many_tensors"), (65537, "too_many_tensors"), (65536, "truncated_header")):
        file = small()
        file.n_tensors = count
        yield Case(f"tensor_count_{count}", code, file.build(), 8)
    file = Gguf([value("a long string", STRING, "x" * 100)], n_keys=2)
    yield Case("one_key_more_than_present", "truncated_header", file.build(), len(file.build()))
    file = Gguf([value("a", U8, 1)], n_tensors=3)
    yield Case("more_tensors_than_present", "truncated_header", file.build())


def keys() -> Iterator[Case]:
    yield _key_case("key_length_max", "key_too_long", Key("k", U8, b"\1", name_length=2**64 - 1))
    yield _key_case("key_length_wraps", "key_too_long", Key("k", U8, b"\1", name_length=2**64 - 24))
    yield _key_case("key_of_65536_bytes", "key_too_long", value("k" * 65536, U8, 1))
    yield _key_case("key_past_the_end", "truncated_header", Key("k", U8, b"\1", name_length=65535))
    yield _key_case("empty_key", "bad_key", value("", U8, 1), -12)
    yield _key_case("key_with_zero_byte", "bad_key", value("general\0name", U8, 1), words="control")
    yield _key_case("key_with_escape", "bad_key", value("general.\x1b[2J", U8, 1), words="general.[2J")
    yield _key_case("key_bad_utf8", "bad_utf8", value(b"general.\xff", U8, 1))
    yield _key_case("key_overlong_utf8", "bad_utf8", value(b"general.\xc0\xaf", U8, 1))
    file = _with_keys(value("twice", U8, 1), value("twice", U32, 2))
    data = file.build()
    yield Case("duplicate_key", "duplicate_key", data, file.places["key:twice"], words="twice")
    for kind in (13, 255, 2**32 - 1):
        yield _key_case(f"value_type_{kind}", "bad_value_type", Key("k", kind, bytes(8)), -4, "k", str(kind))
        bad = Key("k", ARRAY, struct.pack("<IQ", kind, 1) + bytes(8))
        yield _key_case(f"element_type_{kind}", "bad_value_type", bad, 0, "k")
    for byte in (2, 255):
        yield _key_case(f"bool_{byte}", "bad_bool", Key("k", BOOL, bytes([byte])), 0, "k", str(byte))
    yield _key_case("bool_in_array", "bad_bool", array("k", BOOL, [0, 1, 7]), 14, "k")
    yield _key_case("string_length_max", "string_too_long", Key("k", STRING, text("x", 2**64 - 1)), 0, "k")
    yield _key_case("string_of_16_mib_and_1", "string_too_long", Key("k", STRING, text("x", (16 << 20) + 1)), 0, "k")
    yield _key_case("string_past_the_end", "truncated_header", Key("k", STRING, text("x", 16 << 20)), 8, "k")
    for name, raw in {
        "lone_continuation": b"\x80",
        "cut_sequence": b"\xe6\xa8",
        "surrogate": b"\xed\xa0\x80",
        "overlong_2": b"\xc1\xbf",
        "overlong_3": b"\xe0\x9f\xbf",
        "overlong_4": b"\xf0\x8f\xbf\xbf",
        "past_10ffff": b"\xf4\x90\x80\x80",
        "five_bytes": b"\xf8\x88\x80\x80\x80",
    }.items():
        yield _key_case(f"string_utf8_{name}", "bad_utf8", value("k", STRING, b"12345678" + raw), 0, "k")
    yield _key_case("string_in_array_bad_utf8", "bad_utf8", array("k", STRING, ["ok", b"\xff"]), 12 + 10, "k")
    yield _key_case("string_in_array_length_max", "string_too_long", _array_of(STRING, 1, b"\xff" * 8), 12, "k")
    yield _key_case("array_length_max", "array_too_long", array("k", U8, [1], 2**64 - 1), 4, "k")
    yield _key_case("array_of_4194305", "array_too_long", array("k", U8, [1], 4194305), 4, "k")
    yield _key_case("array_past_the_end", "truncated_header", array("k", U64, [1], 4194304), 12, "k")
    file = Gguf([array("k", STRING, ["a"] * 9, 4194304)])
    yield Case("array_of_strings_past_the_end", "truncated_header", file.build(), len(file.build()), "k")
    nested = struct.pack("<IQ", ARRAY, 1) + struct.pack("<IQ", U8, 1) + b"\1"
    yield _key_case("nested_array", "nested_array", Key("k", ARRAY, nested), 0, "k")
    deep = struct.pack("<IQ", ARRAY, 1) * 10000
    yield _key_case("deeply_nested_array", "nested_array", Key("k", ARRAY, deep), 0, "k")
    align = "general.alignment"
    for number in (0, 1, 4, 2**21, 2**32 - 1):
        yield _key_case(f"alignment_{number}", "value_out_of_range", value(align, U32, number), 0, align, str(number))
    yield _key_case("alignment_negative", "value_out_of_range", value(align, 5, -32), 0, align, "-32")
    yield _key_case("alignment_48", "bad_alignment", value(align, U32, 48), 0, align, "48")
    yield _key_case("alignment_a_string", "wrong_type", value(align, STRING, "32"), 8, align, "string")
    yield _key_case("alignment_a_float", "wrong_type", value(align, F32, 32.0), 0, align, "f32")
    yield _key_case("alignment_an_array", "wrong_type", array(align, U32, [32]), 12, align, "array")


def _array_of(kind: int, count: int, raw: bytes) -> Key:
    return Key("k", ARRAY, struct.pack("<IQ", kind, count) + raw)


def tensors() -> Iterator[Case]:
    yield _tensor_case("tensor_name_empty", "bad_name", Tensor("", [8], data=bytes(32)))
    yield _tensor_case("tensor_name_control", "bad_name", Tensor("a\nb", [8], data=bytes(32)), "control")
    yield _tensor_case("tensor_name_65_bytes", "name_too_long", Tensor("n" * 65, [8], data=bytes(32)))
    yield _tensor_case("tensor_name_bad_utf8", "bad_utf8", Tensor(b"\xff", [8], data=bytes(32)))
    yield _tensor_case("duplicate_tensor", "duplicate_tensor", f32_tensor("good", 8), "good")
    for n_dims in (0, 5, 2**32 - 1):
        yield _tensor_case(
            f"n_dims_{n_dims}", "bad_dims", Tensor("t", [8] * 5, data=bytes(32), n_dims=n_dims), str(n_dims)
        )
    for dim in (0, -1, 2**40 + 1, 2**63):
        yield _tensor_case(f"dim_{dim}", "bad_dims", Tensor("t", [8, dim], data=bytes(32)), "dimension")
    product = Tensor("t", [2**32, 2**32, 4], data=bytes(32))
    yield _tensor_case("product_overflow", "tensor_too_large", product)
    yield _tensor_case("product_wraps_to_32", "tensor_too_large", Tensor("t", [2**40, 2**22, 1], data=bytes(32)))
    yield _tensor_case("product_wraps_below_2_63", "tensor_too_large", Tensor("t", [2**40, 2**21], data=bytes(32)))
    for kind in (4, 5, 31, 32, 33, 36, 37, 38):
        tensor = Tensor("t", [32], kind, bytes(32))
        yield _tensor_case(f"removed_type_{kind}", "removed_tensor_type", tensor, "removed", unsupported=True)
    for kind in (42, 255, -1):
        tensor = Tensor("t", [32], kind, bytes(32))
        yield _tensor_case(f"unknown_type_{kind}", "unknown_tensor_type", tensor, "'t'", unsupported=True)
    yield _tensor_case("row_no_multiple_of_the_block", "partial_block", Tensor("t", [33], T_Q4_0, bytes(36)), "33")
    yield _tensor_case("row_no_multiple_of_256", "partial_block", Tensor("t", [128, 2], T_Q4_K, bytes(144)), "256")
    ok = bytes(32)
    yield _tensor_case("misaligned", "tensor_misaligned", Tensor("t", [8], data=ok, offset=33), "aligned")
    yield _tensor_case("overlap", "tensor_overlap", Tensor("t", [8], data=ok, offset=0), "share")
    yield _tensor_case("hole", "tensor_gap", Tensor("t", [8], data=ok + bytes(64), offset=64), "hole")
    yield _tensor_case("offset_past_the_end", "tensor_past_end", Tensor("t", [8], data=ok, offset=2**20), "outside")
    yield _tensor_case("offset_wraps", "tensor_past_end", Tensor("t", [8], data=ok, offset=2**64 - 32), "outside")
    many = [Tensor(f"t{i}", [2**40, 2**20 - 1], T_F32) for i in range(4)]
    file = _with_tensors(*many)
    file.tensors[2].offset = 32 + (2**62 - 2**42)
    file.tensors[3].offset = 32 + 2 * (2**62 - 2**42)
    yield Case("sum_overflow", "tensor_too_large", file.build())


def data() -> Iterator[Case]:
    file = small()
    whole = file.build()
    start = file.places["data"]
    needed = start + (96 + 160 + 32 + 32 + 48)  # the last tensor's padding is not needed
    for size in (start, start + 1, start + 95, needed - 1):
        missing = f"{needed - size} byte"
        yield Case(f"cut_at_{size}", "truncated_data", whole[:size], size, words=missing)
    yield Case("cut_before_the_data", "truncated_data", whole[: start - 1], start - 1, words="download it again")
    big = Gguf(tensors=[Tensor("t", [2**20, 1000], T_F32, b"")])
    yield Case("cut_4_gb_early", "truncated_data", big.build() + bytes(1000), words="4.2 GB")


def split_keys() -> Iterator[Case]:
    file = _with_keys(value("split.count", 2, 3), value("split.no", 2, 0), value("split.tensors.count", 5, 15))
    yield Case("first_part_under_another_name", "split_bad_name", file.build(), words="-00001-of-00003.gguf")
    file = _with_keys(value("split.count", 2, 3), value("split.no", 2, 1))
    yield Case("second_part_under_another_name", "split_not_first", file.build(), words="part 2 of 3")
    file = _with_keys(value("split.count", U32, 1001))
    yield Case("too_many_parts", "value_out_of_range", file.build(), named="split.count")
    file = _with_keys(value("split.count", F64, 2.0))
    yield Case("split_count_a_float", "wrong_type", file.build(), named="split.count")
    file = _with_keys(array("split.count", U32, [2]))
    yield Case("split_count_an_array", "wrong_type", file.build(), named="split.count")


GROUPS: tuple[Callable[[], Iterator[Case]], ...] = (not_gguf, headers, keys, tensors, data, split_keys)
CASES: list[Case] = [case for group in GROUPS for case in group()]
assert len({case.name for case in CASES}) == len(CASES)
