"""The malformed files of hostile_check that the engine opens, given to the Python half: tokenizer and chat template.

python -m tests.hostile.text_half CASES    so many files of each class; exit status 1 when a promise was broken
"""

from __future__ import annotations

import itertools
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from pyengine.chat import ChatTemplate
from pyengine.errors import EngineError
from pyengine.gguf_file import GgufFile
from pyengine.tokenizer import Tokenizer
from tests.support import check_program

TEXTS = ("", "the note on the hen", "é \x00 \U0001f600 日本", "<think> <|im_end|> </s> <0x41>", " " * 50 + "a" * 200)
MESSAGES = [{"role": "user", "content": "one <|im_end|> two"}]


def classes() -> list[str]:
    """The names of the 81 classes."""
    return subprocess.run(
        [check_program("hostile_check"), "list"], capture_output=True, text=True, check=True
    ).stdout.split()


def cases(name: str, first: int, count: int) -> Iterator[tuple[int, str, bytes]]:
    """(number, answers that are right, file) of those cases that concern the Python half."""
    command = [check_program("hostile_check"), "emit", name, str(first), str(count)]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None

        def frame() -> bytes:
            assert process.stdout is not None
            (size,) = struct.unpack("<I", process.stdout.read(4))
            return process.stdout.read(size)

        for number in range(first, first + count):
            expected, data = frame().decode(), frame()
            if expected:
                yield number, expected, data
    assert process.returncode == 0


def answer(path: Path) -> str:
    """What the Python half says to a file: ``"runs"``, or the code of an error that keeps its promises."""
    try:
        with GgufFile.open(path, load="header") as file:
            tokenizer = Tokenizer.from_metadata(file.metadata)
            for text, parse_special in itertools.product(TEXTS, (False, True)):
                ids = tokenizer.encode(text, parse_special=parse_special)
                assert all(0 <= token < tokenizer.n_vocab for token in ids), (text, ids)
                tokenizer.decode(ids)
            if "tokenizer.chat_template" in file.metadata:
                ChatTemplate.from_metadata(file.metadata, tokenizer).render(MESSAGES)
    except EngineError as error:
        kept = error.code and " " in error.message and error.message.replace("\n", " ").isprintable()
        return error.code if kept else f"an error that breaks its promises: {error!r}"
    return "runs"


def check(name: str, first: int, count: int) -> tuple[int, list[str]]:
    """How many files of a class were tried, and what went wrong."""
    tried, wrong = 0, []
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "m.gguf"
        for number, expected, data in cases(name, first, count):
            path.write_bytes(data)
            start = time.process_time()
            try:
                found = answer(path)
            except (KeyboardInterrupt, SystemExit):
                raise
            except BaseException as error:  # whatever it is, it is no EngineError: a panic of a library in Rust, too
                found = f"{type(error).__name__}: {error}"
            took = time.process_time() - start
            tried += 1
            if found not in expected.split():
                wrong.append(f"case {name} {number}: {found[:300]}; expected {expected}")
            if took > 1 + len(data) / 2**20:
                wrong.append(f"case {name} {number}: {took:.1f} s for {len(data)} bytes")
    return tried, wrong


def main() -> int:
    count = int(sys.argv[1])
    tried, wrong = 0, []
    for name in (*classes(), "incidents"):
        more, found = check(name, 0, count)
        tried += more
        wrong += found
        if more:
            print(f"  {name:26} {more:8} files, {len(found)} failures", flush=True)
            print("".join(f"FAILED {line}\n" for line in found[:20]), end="", flush=True)
    print(f"text half: {tried} files, {len(wrong)} failures")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
