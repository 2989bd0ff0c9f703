"""Reads a SentencePiece ``tokenizer.model``: the few protobuf fields GGUF needs, with every length checked.

Wire format: a key (field number * 8 + wire type) as varint, then a varint (type 0), 8 bytes (1), a varint length and so
many bytes (2), or 4 bytes (5). Fields, from sentencepiece_model.proto:

    ModelProto       1 pieces*, 2 trainer_spec, 3 normalizer_spec
    SentencePiece    1 piece, 2 score (float), 3 type (1 normal, 2 unknown, 3 control, 4 user-defined, 5 unused, 6 byte)
    TrainerSpec      3 model_type (1 unigram, 2 BPE)
    NormalizerSpec   2 precompiled_charsmap, 3 add_dummy_prefix, 4 remove_extra_whitespaces
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from pyengine.errors import FileError, FormatError, UnsupportedError

_BPE = 2


@dataclass(frozen=True)
class SentencePieceModel:
    """Pieces in id order, as (text, score, type); types are GGUF's token types, too."""

    pieces: list[tuple[str, float, int]]
    add_dummy_prefix: bool
    remove_extra_whitespaces: bool


def read_sentencepiece(path: Path) -> SentencePieceModel:
    """Errors: ``FileError``, ``FormatError``; ``UnsupportedError`` for models that are not BPE."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise FileError(f"cannot read {path}: {error.strerror}", code="cannot_read") from error
    try:
        model = _parse(data, path)
    except (ValueError, IndexError, struct.error) as error:
        raise FormatError(f"{path} is no SentencePiece model: {error}", code="bad_sentencepiece") from None
    if not model.pieces:
        raise FormatError(f"{path} is no SentencePiece model: it has no pieces", code="bad_sentencepiece")
    return model


def _parse(data: bytes, path: Path) -> SentencePieceModel:
    pieces: list[tuple[str, float, int]] = []
    model_type, prefix, remove, charsmap = 1, True, True, b""  # the defaults of the proto
    for field, value in _fields(data):
        if field == 1:
            pieces.append(_piece(_bytes(value)))
        elif field == 2:
            model_type = dict(_fields(_bytes(value))).get(3, 1)  # type: ignore[assignment]
        elif field == 3:
            spec = dict(_fields(_bytes(value)))
            prefix, remove = bool(spec.get(3, 1)), bool(spec.get(4, 1))
            charsmap = _bytes(spec.get(2, b""))
    if pieces and model_type != _BPE:
        kind = {1: "unigram", 3: "word", 4: "character"}.get(model_type, f"type {model_type}")
        raise UnsupportedError(f"{path} is a {kind} SentencePiece model; expected BPE", code="unsupported_tokenizer")
    if charsmap:
        raise UnsupportedError(
            f"{path} normalises its text with a character map, which GGUF cannot express", code="unsupported_tokenizer"
        )
    return SentencePieceModel(pieces, prefix, remove)


def _piece(data: bytes) -> tuple[str, float, int]:
    text, score, kind = "", 0.0, 1
    for field, value in _fields(data):
        if field == 1:
            text = _bytes(value).decode("utf-8")
        elif field == 2:
            (score,) = struct.unpack("<f", _bytes(value))
        elif field == 3 and isinstance(value, int):
            kind = value
    if not 1 <= kind <= 6:
        raise ValueError(f"piece {text!r} has type {kind}; expected 1 to 6")
    return text, score, kind


def _bytes(value: int | bytes) -> bytes:
    if isinstance(value, int):
        raise ValueError("a number where bytes were expected")
    return value


def _fields(data: bytes) -> Iterator[tuple[int, int | bytes]]:
    """Yields (field number, value): an int for varints, the raw bytes otherwise."""
    at = 0
    while at < len(data):
        key, at = _varint(data, at)
        wire = key & 7
        if wire == 0:
            number, at = _varint(data, at)
            yield key >> 3, number
            continue
        if wire == 2:
            length, at = _varint(data, at)
        elif wire in (1, 5):
            length = 8 if wire == 1 else 4
        else:
            raise ValueError(f"wire type {wire} at byte {at}")
        if length > len(data) - at:
            raise ValueError(f"a field of {length} bytes at byte {at} of {len(data)}")
        yield key >> 3, data[at : at + length]
        at += length


def _varint(data: bytes, at: int) -> tuple[int, int]:
    value = 0
    for shift in range(0, 70, 7):
        byte = data[at]  # IndexError past the end: the caller reports it
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
    raise ValueError(f"a number of more than 10 bytes ends at byte {at}")
