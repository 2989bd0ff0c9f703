"""``pyengine-convert inspect FILE``: what a GGUF file holds. Printed to stdout; text from the file is made safe."""

from __future__ import annotations

import argparse
import hashlib
import sys
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from pyengine.errors import EngineError
from pyengine.gguf_file import GgufFile, TensorInfo
from pyengine_convert.cli import EXIT_FAILED, printable

_WIDEST = 100  # characters of a value


def main(arguments: Sequence[str]) -> int:
    """Prints; returns the exit code: 0 done, 1 failed, 2 wrong usage."""
    parser = argparse.ArgumentParser(prog="pyengine-convert inspect", description="Print what a GGUF file holds.")
    parser.add_argument("file", type=Path, metavar="FILE.gguf", help="a file, or the first part of a split one")
    args = parser.parse_args(arguments)
    try:
        with GgufFile.open(args.file, "header") as file:
            for line in describe(file):
                print(line)
    except EngineError as error:
        print(f"pyengine-convert: error: {printable(str(error))}", file=sys.stderr)
        return EXIT_FAILED
    except BrokenPipeError:
        sys.stderr.close()  # the reader has seen enough
    return 0


def describe(file: GgufFile) -> Iterator[str]:
    """The lines: metadata, chat templates, tensors, sizes by type."""
    tensors = file.tensors.values()
    parts = 1 + max((t.part for t in tensors), default=0)
    several = f" in {parts} files" if parts > 1 else ""
    yield f"GGUF version {file.version}, {len(file.metadata)} keys, {len(tensors)} tensors{several}"
    yield ""
    for key, value in file.metadata.items():
        yield f"{printable(key)} = {_shown(value)}"
    yield ""
    for key in file.metadata:
        if key.startswith("tokenizer.chat_template") and isinstance(file.metadata[key], str):
            text = file.metadata[key].encode("utf-8", "surrogatepass")
            yield f"{printable(key)}: {len(text)} bytes, sha256 {hashlib.sha256(text).hexdigest()}"
    yield ""
    for tensor in tensors:
        shape = " x ".join(map(str, tensor.dims[::-1]))
        yield f"{printable(tensor.name):<32} {shape:<20} {tensor.type_name:<8} {tensor.size:>14}"
    yield ""
    yield from _by_type(list(tensors))


def _shown(value: Any) -> str:
    if isinstance(value, str):
        text = printable(value[: _WIDEST + 1])
        return f'"{text}"' if len(value) <= _WIDEST else f'"{text[:_WIDEST]}..." ({len(value)} characters)'
    if isinstance(value, bool | int | float):
        return f"{value:.7g}" if isinstance(value, float) else str(value)
    first = value[:6].tolist() if hasattr(value, "tolist") else value[:6]
    shown = ", ".join(map(_shown, first))
    return f"[{shown}{', ...' if len(value) > 6 else ''}] ({len(value)})"


def _by_type(tensors: Sequence[TensorInfo]) -> Iterator[str]:
    groups: dict[str, list[TensorInfo]] = defaultdict(list)
    for tensor in tensors:
        groups[tensor.type_name].append(tensor)
    groups = dict(sorted(groups.items(), key=lambda item: -sum(t.size for t in item[1])))
    for kind, members in [*groups.items(), ("all", list(tensors))]:
        size, weights = sum(t.size for t in members), sum(t.rows * t.cols for t in members)
        bits = 8 * size / weights if weights else 0
        yield f"{kind:<8} {len(members):>5} tensors {weights:>14} weights {size:>14} bytes {bits:>7.3f} bits each"
