"""Which ``tokenizer.ggml.pre`` a ``tokenizer.json`` has, by what it does and never by a model's name."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

from pyengine.errors import UnsupportedError
from pyengine.tokenizer import families

# The cut that ByteLevel makes when its use_regex is set, and the one of Digits.
_BYTE_LEVEL = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_DIGIT = r"\p{N}"


def recognise(tokenizer: Mapping[str, Any], prepends_bos: bool) -> str:
    """The name of the family whose patterns and ``ignore_merges`` equal this byte-level BPE tokenizer's.

    Two names mean the same to every reader: qwen2's rules with a BOS put in front are called deepseek-r1-qwen.
    Errors: ``UnsupportedError`` that shows the patterns and names the way out.
    """
    patterns = _patterns(tokenizer.get("pre_tokenizer"))
    ignore_merges = bool(tokenizer["model"].get("ignore_merges"))
    normalizer = tokenizer.get("normalizer")
    if patterns is not None and (normalizer is None or normalizer.get("type") == "NFC"):
        for name, (known, known_ignore) in families().items():
            if known_ignore == ignore_merges and _same(patterns, known):
                return "deepseek-r1-qwen" if name == "qwen2" and prepends_bos else name
    shown = json.dumps(
        {"normalizer": normalizer, "pre_tokenizer": tokenizer.get("pre_tokenizer"), "ignore_merges": ignore_merges},
        ensure_ascii=False,
    )
    raise UnsupportedError(
        f"tokenizer.json cuts text in a way no known family does: {shown}. If you know which family fits, name it: "
        f"--pre NAME; known are {', '.join(families())}",
        code="unknown_pretokenizer",
        field="pre_tokenizer",
    )


def is_byte_level(tokenizer: Mapping[str, Any]) -> bool:
    """Byte-level BPE (as opposed to SentencePiece's)."""
    steps = _steps(tokenizer.get("pre_tokenizer"))
    return tokenizer["model"].get("type") == "BPE" and any(step.get("type") == "ByteLevel" for step in steps)


def _same(patterns: tuple[str, ...], known: tuple[str, ...]) -> bool:
    patterns, known = tuple(map(_unescaped, patterns)), tuple(map(_unescaped, known))
    # deepseek-llm's file isolates single digits where GGUF readers isolate runs: with no token of several digits in its
    # vocabulary that is the same.
    return patterns == known or (patterns[-1] == _DIGIT and (*patterns[:-1], r"\p{N}+") == known)


def _unescaped(pattern: str) -> str:
    r"""A pattern with ``\uXXXX`` written as the character: files use either spelling."""
    return re.sub(r"\\u([0-9A-Fa-f]{4})|\\U([0-9A-Fa-f]{8})", lambda m: chr(int(m[1] or m[2], 16)), pattern)


def _steps(node: Any) -> list[dict[str, Any]]:
    if not isinstance(node, dict):
        return []
    if node.get("type") == "Sequence":
        return [step for child in node.get("pretokenizers", []) for step in _steps(child)]
    return [node]


def _patterns(node: Any) -> tuple[str, ...] | None:
    """The patterns that are isolated one after the other; None when a step does anything else."""
    steps = _steps(node)
    if not steps or steps[-1].get("type") != "ByteLevel" or steps[-1].get("add_prefix_space"):
        return None
    patterns = []
    for step in steps[:-1]:
        pattern = step.get("pattern", {}).get("Regex")
        if step.get("type") == "Split" and pattern and step.get("behavior") == "Isolated" and not step.get("invert"):
            patterns.append(pattern)
        elif step.get("type") == "Digits" and step.get("individual_digits"):
            patterns.append(_DIGIT)
        else:
            return None
    if steps[-1].get("use_regex", True):
        patterns.append(_BYTE_LEVEL)
    return tuple(patterns) or None
