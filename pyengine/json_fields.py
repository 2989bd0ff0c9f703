"""JSON from outside, asked for by name and type; and sampler settings as JSON."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from pyengine.errors import EngineError
from pyengine.sampling import SamplerSettings

_NAMES: Mapping[type, str] = {
    dict: "an object",
    list: "a list",
    str: "a text",
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    type(None): "null",
}


def kind_of(value: Any) -> str:
    """What a JSON value is, in words."""
    return _NAMES.get(type(value), type(value).__name__)


def parse(text: bytes) -> Any:
    """JSON as RFC 8259 has it: UTF-8, no NaN, no infinities, no name twice in an object.

    Errors: ``ValueError`` with a sentence.
    """
    try:
        value = json.loads(
            text.decode(), parse_constant=_no_constant, parse_float=_finite, object_pairs_hook=_no_duplicates
        )
    except UnicodeDecodeError as error:
        raise ValueError(f"byte {error.start + 1} is no UTF-8") from None
    except RecursionError:
        raise ValueError(_TOO_DEEP) from None
    check_depth(value)
    return value


def check_depth(value: Any) -> None:
    """``ValueError`` when :func:`parse` would refuse it for its depth."""
    level = [value]
    for _ in range(_MAX_DEPTH):
        level = [inner for outer in level for inner in _inside(outer)]
        if not level:
            return
    raise ValueError(_TOO_DEEP)


_MAX_DEPTH = 64
_TOO_DEEP = f"it is nested more than {_MAX_DEPTH} deep"


def _inside(value: Any) -> Iterable[Any]:
    return value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()


def _no_constant(name: str) -> float:
    raise ValueError(f"{name} is no JSON")


def _finite(text: str) -> float:
    value = float(text)
    if math.isinf(value):
        raise ValueError(f"{text[:40]} is too large a number")
    return value


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) != len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"the name {next(n for n in names if names.count(n) > 1)[:60]!r} occurs twice in an object")
    return values


class Fields:
    """A JSON object whose values are asked for by name and type.

    Args:
        values: the object.
        error: makes the exception from a sentence and the name of the field.
        name: of the object, as a prefix of its fields' names: ``"settings."``.
    """

    def __init__(self, values: Mapping[str, Any], error: Callable[[str, str], EngineError], name: str = "") -> None:
        self.values, self._error, self._name = values, error, name

    def value(self, key: str, *types: type) -> Any:
        """A value that must be there. ``int`` where ``float`` is asked for is fine, ``bool`` is no ``int``."""
        if key not in self.values:
            raise self.bad(key, "is missing")
        value = self.values[key]
        if type(value) not in types and not (float in types and type(value) is int):
            raise self.bad(key, f"is {kind_of(value)}; expected {' or '.join(_NAMES[kind] for kind in types)}")
        return value

    def maybe(self, key: str, *types: type) -> Any:
        """As :meth:`value`; ``None`` where it is absent or null."""
        return None if self.values.get(key) is None else self.value(key, *types)

    def fields(self, key: str) -> Fields:
        return Fields(self.value(key, dict), self._error, f"{self._name}{key}.")

    def number(self, key: str, least: int) -> int | None:
        """A whole number that may be absent or null."""
        value: int | None = self.maybe(key, int)
        if value is not None and not least <= value < 2**63:
            raise self.bad(key, f"is {value}; expected at least {least}, or null")
        return value

    def texts(self, key: str) -> tuple[str, ...]:
        """A list of texts that are not empty; it may be absent."""
        texts = self.maybe(key, list) or ()
        if not all(isinstance(text, str) and text for text in texts):
            raise self.bad(key, "is no list of texts that are not empty")
        return tuple(texts)

    def only(self, known: Iterable[str]) -> None:
        """Refuses other names than ``known``."""
        names = list(known)
        for key in self.values:
            if key not in names:
                raise self.bad(key[:60], f"is unknown here; known are {', '.join(names)}")

    def bad(self, key: str, problem: str) -> EngineError:
        name = (self._name + key)[:80]
        return self._error(f"{name!r} {problem}", name)


def settings_to_json(settings: SamplerSettings) -> dict[str, Any]:
    """Every setting by name. Infinities, which JSON lacks, become ``"inf"`` and ``"-inf"``."""
    values = {field.name: getattr(settings, field.name) for field in dataclasses.fields(settings)}
    values["logit_bias"] = {str(token): bias for token, bias in settings.logit_bias.items()}
    result: dict[str, Any] = _infinities_as_text(values)
    return result


def _infinities_as_text(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _infinities_as_text(item) for key, item in value.items()}
    return str(value) if isinstance(value, float) and math.isinf(value) else value


def settings_from_json(fields: Fields, base: SamplerSettings | None = None) -> SamplerSettings:
    """The settings that ``fields`` name over those of ``base`` (default: the defaults).

    Errors: those of ``fields`` for a name or type; ``InvalidArgument`` for a value out of range.
    """
    base = base or SamplerSettings()
    known = {field.name: getattr(SamplerSettings(), field.name) for field in dataclasses.fields(SamplerSettings)}
    fields.only(known)
    values: dict[str, Any] = {}
    for name in fields.values:
        if isinstance(known[name], tuple):
            values[name] = fields.texts(name)
        elif isinstance(known[name], Mapping):
            biases = fields.fields(name)
            values[name] = {_token(biases, key): _float(biases, key) for key in biases.values}
        elif known[name] is None:  # seed, top_logprobs
            values[name] = fields.maybe(name, int)
        elif type(known[name]) is int:
            values[name] = fields.value(name, int)
        else:
            values[name] = _float(fields, name)
    return dataclasses.replace(base, **values)


def _token(fields: Fields, key: str) -> int:
    if not (key.isascii() and key.isdigit() and len(key) <= 10):
        raise fields.bad(key[:40], "is no token id")
    return int(key)


def _float(fields: Fields, key: str) -> float:
    if fields.values[key] in ("inf", "-inf"):
        return float(fields.values[key])
    value: float = fields.value(key, float)
    if type(value) is int and abs(value) > 2**63:
        raise fields.bad(key, "is too large")
    return value
