"""GGUF metadata to be written: an ordered list of typed keys."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from gguf import GGUFValueType as Type


class Value(NamedTuple):
    value: Any
    type: Type
    element: Type | None = None


class KeyValues:
    """Keys in the order they are added; adding one twice is a bug and raises ``ValueError``."""

    def __init__(self) -> None:
        self._values: dict[str, Value] = {}

    def _add(self, key: str, value: Value) -> None:
        if key in self._values:
            raise ValueError(f"metadata key {key} added twice")
        self._values[key] = value

    def u32(self, key: str, value: int) -> None:
        self._add(key, Value(value, Type.UINT32))

    def i32(self, key: str, value: int) -> None:
        self._add(key, Value(value, Type.INT32))

    def f32(self, key: str, value: float) -> None:
        self._add(key, Value(value, Type.FLOAT32))

    def flag(self, key: str, value: bool) -> None:
        self._add(key, Value(value, Type.BOOL))

    def string(self, key: str, value: str) -> None:
        self._add(key, Value(value, Type.STRING))

    def strings(self, key: str, values: Sequence[str]) -> None:
        self._array(key, values, Type.STRING)

    def i32s(self, key: str, values: Sequence[int]) -> None:
        self._array(key, values, Type.INT32)

    def f32s(self, key: str, values: Sequence[float]) -> None:
        self._array(key, values, Type.FLOAT32)

    def copy(self, key: str, value: Any, kind: int, element: int) -> bool:
        """A value as another file has it: GGUF type ids of it and of its elements. False for an empty array, which is
        left out."""
        if Type(kind) == Type.ARRAY:
            values = value.tolist() if hasattr(value, "tolist") else list(value)
            if values:
                self._add(key, Value(values, Type.ARRAY, Type(element)))
            return bool(values)
        self._add(key, Value(value, Type(kind)))
        return True

    def clone(self) -> KeyValues:
        other = KeyValues()
        other._values = dict(self._values)
        return other

    def u16(self, key: str, value: int) -> None:
        self._add(key, Value(value, Type.UINT16))

    def _array(self, key: str, values: Sequence[Any], element: Type) -> None:
        if values:  # GGUF has no use for an empty array, and some readers refuse one
            self._add(key, Value(list(values), Type.ARRAY, element))

    def __getitem__(self, key: str) -> Any:
        return self._values[key].value

    def __contains__(self, key: str) -> bool:
        return key in self._values

    def items(self) -> Iterator[tuple[str, Value]]:
        return iter(self._values.items())

    def __len__(self) -> int:
        return len(self._values)
