"""Writes GGUF files byte by byte, right or wrong on purpose, without the engine and without the gguf package."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass, field

U8, I8, U16, I16, U32, I32, F32, BOOL, STRING, ARRAY, U64, I64, F64 = range(13)
SCALARS = {U8: "B", I8: "b", U16: "H", I16: "h", U32: "I", I32: "i", F32: "f", BOOL: "B", U64: "Q", I64: "q", F64: "d"}

T_F32, T_F16, T_Q4_0, T_Q8_0, T_Q4_K = 0, 1, 2, 8, 12


def text(value: str | bytes, length: int | None = None) -> bytes:
    """A GGUF string; `length` overrides the true length."""
    raw = value.encode() if isinstance(value, str) else value
    return struct.pack("<Q", len(raw) if length is None else length) + raw


def scalar(kind: int, value: float | bool) -> bytes:
    return struct.pack("<" + SCALARS[kind], value)


@dataclass
class Key:
    """One metadata entry: `payload` is everything after the type."""

    name: str | bytes
    kind: int
    payload: bytes
    name_length: int | None = None

    def encode(self) -> bytes:
        return text(self.name, self.name_length) + struct.pack("<I", self.kind) + self.payload


def value(name: str | bytes, kind: int, content: float | bool | str | bytes) -> Key:
    payload = text(content) if isinstance(content, str | bytes) else scalar(kind, content)
    return Key(name, kind, payload)


def array(name: str, kind: int, items: Sequence[float | str | bytes], count: int | None = None) -> Key:
    """`count` overrides the true number of elements."""
    head = struct.pack("<IQ", kind, len(items) if count is None else count)
    encoded = (text(item) if isinstance(item, str | bytes) else scalar(kind, item) for item in items)
    return Key(name, ARRAY, head + b"".join(encoded))


@dataclass
class Tensor:
    name: str | bytes
    dims: Sequence[int]
    kind: int = T_F32
    data: bytes = b""
    offset: int | None = None  # overrides the true offset
    n_dims: int | None = None

    def encode(self, offset: int) -> bytes:
        dims = b"".join(struct.pack("<Q", dim % 2**64) for dim in self.dims)
        n_dims = len(self.dims) if self.n_dims is None else self.n_dims
        at = offset if self.offset is None else self.offset
        return text(self.name) + struct.pack("<I", n_dims) + dims + struct.pack("<IQ", self.kind % 2**32, at % 2**64)


@dataclass
class Gguf:
    """A file in the making. After `build`, `places` tells where things stand: "key:NAME" the start of an entry's value,
    "tensor:INDEX" the start of a tensor's entry, "data" the start of the data."""

    keys: list[Key] = field(default_factory=list)
    tensors: list[Tensor] = field(default_factory=list)
    magic: bytes = b"GGUF"
    version: int = 3
    n_tensors: int | None = None
    n_keys: int | None = None
    alignment: int = 32
    places: dict[str, int] = field(default_factory=dict)

    def build(self) -> bytes:
        n_tensors = len(self.tensors) if self.n_tensors is None else self.n_tensors
        n_keys = len(self.keys) if self.n_keys is None else self.n_keys
        out = bytearray(self.magic) + struct.pack("<IQQ", self.version, n_tensors % 2**64, n_keys % 2**64)
        for key in self.keys:
            encoded = key.encode()
            if isinstance(key.name, str):
                self.places[f"key:{key.name}"] = len(out) + len(encoded) - len(key.payload)
            out += encoded
        offset = 0
        for index, tensor in enumerate(self.tensors):
            self.places[f"tensor:{index}"] = len(out)
            out += tensor.encode(offset)
            offset += -(-len(tensor.data) // self.alignment) * self.alignment
        if self.tensors:
            out += bytes(-len(out) % self.alignment)
        self.places["data"] = len(out)
        for tensor in self.tensors:
            out += tensor.data + bytes(-len(tensor.data) % self.alignment)
        return bytes(out)


def f32_tensor(name: str, *dims: int) -> Tensor:
    """F32, filled with 0, 1, 2, ..."""
    count = 1
    for dim in dims:
        count *= dim
    return Tensor(name, dims, T_F32, struct.pack(f"<{count}f", *range(count)))


def small() -> Gguf:
    """A valid file with every value type and several tensor types, about 1.5 KB."""
    return Gguf(
        keys=[
            value("general.architecture", STRING, "llama"),
            value("general.name", STRING, "ein Modell — 模型"),
            value("llama.block_count", U32, 2),
            value("a.u8", U8, 200),
            value("a.i8", I8, -100),
            value("a.u16", U16, 60000),
            value("a.i16", I16, -30000),
            value("a.i32", I32, -2000000000),
            value("a.u64", U64, 2**63 + 5),
            value("a.i64", I64, -(2**62)),
            value("a.f32", F32, 0.5),
            value("a.f64", F64, 1e-300),
            value("a.bool", BOOL, True),
            value("a.empty", STRING, ""),
            array("list.strings", STRING, ["<s>", "", "é", "\x1b[31m red", "日本"]),
            array("list.f32", F32, [0.0, -1.5, 3.25]),
            array("list.i32", I32, [1, -2, 3]),
            array("list.bool", BOOL, [0, 1, 1]),
            array("list.none", U64, []),
        ],
        tensors=[
            f32_tensor("token_embd.weight", 8, 3),
            Tensor("blk.0.q8", [64, 2], T_Q8_0, bytes(i % 251 for i in range(4 * 34))),
            Tensor("blk.0.q4", [32], T_Q4_0, bytes(range(18))),
            f32_tensor("blk.0.norm", 5),
            Tensor("blk.0.f16", [3, 2, 2, 2], T_F16, bytes(range(48))),
        ],
    )
