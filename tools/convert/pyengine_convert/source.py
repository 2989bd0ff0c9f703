"""Reading the small files of a checkpoint folder: JSON with errors that name file, key, value and what was expected."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pyengine.errors import FileError, FormatError

_REQUIRED = object()


def read_text(path: Path) -> str:
    """A UTF-8 file. Errors: ``FileError``, ``FormatError`` for bytes that are no UTF-8."""
    try:
        return path.read_bytes().decode("utf-8")
    except OSError as error:
        raise FileError(f"cannot read {path}: {error.strerror}", code="cannot_read") from error
    except UnicodeDecodeError as error:
        raise FormatError(
            f"{path} is not UTF-8 text (byte {error.start})", code="bad_utf8", offset=error.start
        ) from None


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object. Errors: ``FileError``, ``FormatError``."""
    text = read_text(path)
    if text.startswith("version https://git-lfs"):
        raise FormatError(f"{path} is a Git LFS pointer, not the file itself: run `git lfs pull`", code="lfs_pointer")
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:  # also numbers of thousands of digits
        raise FormatError(f"{path} is not valid JSON: {error}", code="bad_json") from None
    if not isinstance(value, dict):
        raise FormatError(f"{path} holds a JSON {type(value).__name__}; expected an object", code="bad_json")
    return value


def read_json_if_present(path: Path) -> dict[str, Any]:
    """As :func:`read_json`; an absent file reads as ``{}``."""
    return read_json(path) if path.exists() else {}


class Config:
    """A JSON object with typed access. A key holding null counts as absent, as it does in ``transformers``."""

    def __init__(self, values: Mapping[str, Any], where: str) -> None:
        self.values = values
        self.where = where

    def get(self, key: str, default: Any = None) -> Any:
        value = self.values.get(key)
        return default if value is None else value

    def integer(self, key: str, default: Any = _REQUIRED, *, low: int = 1, high: int = 2**31 - 1) -> int:
        value = self._get(key, default, "an integer")
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
            raise self.bad(key, value, f"an integer from {low} to {high}")
        return value

    def number(self, key: str, default: Any = _REQUIRED, *, above: float = 0.0) -> float:
        value = self._get(key, default, "a number")
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value) or value <= above:
            raise self.bad(key, value, f"a finite number above {above:g}")
        return float(value)

    def boolean(self, key: str, default: bool) -> bool:
        value = self._get(key, default, "true or false")
        if not isinstance(value, bool):
            raise self.bad(key, value, "true or false")
        return value

    def string(self, key: str, default: Any = _REQUIRED) -> str:
        value = self._get(key, default, "a string")
        if not isinstance(value, str):
            raise self.bad(key, value, "a string")
        return value

    def section(self, key: str) -> Config:
        """A nested object, empty when absent."""
        value = self.get(key, {})
        if not isinstance(value, dict):
            raise self.bad(key, value, "an object")
        return Config(value, f"{self.where}: {key}")

    def bad(self, key: str, value: Any, expected: str) -> FormatError:
        shown = json.dumps(value, ensure_ascii=False, default=str)
        shown = shown if len(shown) <= 200 else shown[:200] + "..."
        return FormatError(f"{self.where}: {key} is {shown}; expected {expected}", code="bad_config", field=key)

    def _get(self, key: str, default: Any, expected: str) -> Any:
        value = self.get(key, default)
        if value is _REQUIRED:
            raise FormatError(f"{self.where}: {key} is missing; expected {expected}", code="missing_key", field=key)
        return value
