"""Headers of checkpoints that a stranger made: an error, never another exception, never a wait."""

from __future__ import annotations

import os
import struct
from pathlib import Path

import pytest

from pyengine.errors import EngineError, FileError, FormatError
from pyengine_convert.checkpoint import open_checkpoint, read_header
from pyengine_convert.source import read_json

ENTRY = b'{"dtype":"F32","shape":[1],"data_offsets":[0,4]}'


def write(path: Path, text: bytes, data: bytes = bytes(4)) -> Path:
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)
    return path


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (b'{"a":' + b"9" * 5000 + b"}", "digits"),
        (b'{"a":' + b"[" * 100_000, "JSON"),
        (b'{"a":' + ENTRY + b',"a":' + ENTRY + b"}", "twice"),
        (b'{"a":NaN}', "NaN"),
        (b"\xff{}", "UTF-8"),
        (b"[]", "object"),
    ],
    ids=["digits", "nested", "twice", "nan", "utf8", "array"],
)
def test_a_header_that_is_no_json_object_is_an_error(tmp_path: Path, text: bytes, words: str) -> None:
    with pytest.raises(FormatError, match=words) as caught:
        read_header(write(tmp_path / "model.safetensors", text))
    assert caught.value.code == "bad_header"


def test_an_integer_of_5000_digits_in_a_configuration_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_bytes(b'{"hidden_size":' + b"9" * 5000 + b"}")
    with pytest.raises(FormatError) as caught:
        read_json(path)
    assert caught.value.code == "bad_json"


def test_a_pipe_in_the_place_of_the_weights_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "model.safetensors")
    with pytest.raises(EngineError) as caught:
        open_checkpoint(tmp_path)
    assert (type(caught.value), caught.value.code) == (FileError, "not_regular_file")
