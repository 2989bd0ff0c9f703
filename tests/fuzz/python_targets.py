"""Coverage-guided fuzzing of the Python half, with libFuzzer through atheris (``make fuzz``).

Each target is a function of bytes that must return, or raise an EngineError that keeps the promises of docs/errors.md.
Everything else (another exception, an id outside the vocabulary, a second of time) is a finding.

    python -m tests.fuzz.python_targets tokenizer|template|safetensors|chat [libFuzzer's options and corpus folders]
"""

from __future__ import annotations

import atexit
import hashlib
import json
import os
import shutil
import struct
import sys
import tempfile
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import atheris
import jinja2.parser

from pyengine import chat, chat_file, json_fields, reasoning, sampling, tokenizer
from pyengine import template as template_module
from pyengine.errors import EngineError
from pyengine.template import Template
from pyengine.tokenizer import PRE_TOKENIZERS, Tokenizer
from pyengine_convert import architectures, checkpoint, convert, recipe, source
from tests.fuzz.seeds import CHECKPOINT_CONFIG, MESSAGES, SEEDS


def _instrument(module: types.ModuleType) -> None:
    """Every function of a module. (The import hook of an editable installation goes past that of atheris.)"""
    for thing in list(vars(module).values()):
        if getattr(thing, "__module__", None) != module.__name__:
            continue
        if isinstance(thing, types.FunctionType):
            atheris.instrument_func(thing)
        for member in vars(thing).values() if isinstance(thing, type) else ():
            inner = getattr(member, "fget", None) or getattr(member, "__func__", member)
            if isinstance(inner, types.FunctionType) and inner.__module__ == module.__name__:
                atheris.instrument_func(inner)


for _module in (
    chat,
    chat_file,
    json_fields,
    reasoning,
    sampling,
    tokenizer,
    template_module,
    architectures,
    checkpoint,
    convert,
    source,
    jinja2.parser,  # not its lexer: half of the time, and no decision of ours
):
    _instrument(_module)

# In memory where there is such a folder: a disk would be waited for at every file.
ROOT = Path(tempfile.mkdtemp(prefix="pe-fuzz-", dir="/dev/shm" if os.path.isdir("/dev/shm") else None))
FILE = ROOT / "model.safetensors"


def check(error: EngineError) -> None:
    """An error as docs/errors.md promises it."""
    assert error.code, error
    assert " " in error.message, error
    assert len(error.message) < 100_000, len(error.message)


def fuzz_tokenizer(data: bytes) -> None:
    """A vocabulary made from bytes, and text through it."""
    fdp = atheris.FuzzedDataProvider(data)
    kind = fdp.PickValueInList(["gpt2", "llama", "gpt2", "llama", "bert"])
    n = fdp.ConsumeIntInRange(0, 24)
    tokens = [fdp.ConsumeUnicodeNoSurrogates(fdp.ConsumeIntInRange(0, 6)) for _ in range(n)]
    if fdp.ConsumeIntInRange(0, 7) == 0:  # rarely: they take the time of everything else
        tokens += [f"<0x{byte:02X}>" for byte in range(256)] if kind == "llama" else [*"abcdefgh", "\u0120", "he"]
    types = [1] * n + [6 if t.startswith("<0x") else 1 for t in tokens[n:]]
    for i in range(n):
        types[i] = fdp.ConsumeIntInRange(0, 7) if fdp.ConsumeIntInRange(0, 3) == 0 else 1
    metadata: dict[str, Any] = {
        "tokenizer.ggml.model": kind,
        "tokenizer.ggml.pre": fdp.PickValueInList([*PRE_TOKENIZERS, ""]),
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": types,
        "tokenizer.ggml.scores": [
            fdp.ConsumeFloat() if fdp.ConsumeIntInRange(0, 9) == 0 else -float(i) for i in range(len(tokens))
        ],
        "tokenizer.ggml.merges": [fdp.ConsumeUnicodeNoSurrogates(4) for _ in range(fdp.ConsumeIntInRange(0, 6))],
    }
    for name in ("bos", "eos", "unknown", "eot"):
        if fdp.ConsumeBool():
            metadata[f"tokenizer.ggml.{name}_token_id"] = fdp.ConsumeIntInRange(-1, n)
    for name in ("add_bos_token", "add_eos_token", "add_space_prefix"):
        if fdp.ConsumeBool():
            metadata[f"tokenizer.ggml.{name}"] = fdp.ConsumeBool()
    try:
        built = Tokenizer.from_metadata(metadata)
    except EngineError as error:
        check(error)
        return
    text = fdp.ConsumeUnicode(200)
    for parse_special in (False, True):
        try:
            ids = built.encode(text, parse_special=parse_special)
        except EngineError as error:
            check(error)
            continue
        assert all(0 <= token < built.n_vocab for token in ids), (ids, text, metadata)
        if not parse_special:
            # The unknown token stands for what has no byte tokens.
            special = {built.bos_id, built.eos_id, metadata.get("tokenizer.ggml.unknown_token_id")}
            assert not [i for i in ids if i in built.special_strings.values() and i not in special], (
                ids,
                text,
                metadata,
            )
        built.decode(ids).encode()
        stream = built.stream(start=True)
        assert "".join([*map(stream.feed, ids), stream.flush()]) == built.decode(ids)


def fuzz_template(data: bytes) -> None:
    """A chat template, rendered."""
    text = data.decode("utf-8", "replace")
    try:
        parsed = Template(text)
        out = parsed.render(
            {"messages": MESSAGES, "add_generation_prompt": True, "bos_token": "<s>", "tools": [{"name": "f"}]},
            steps=3000,
            chars=30_000,
        )
        assert len(out) <= 30_000
    except EngineError as error:
        check(error)


_HYPER = architectures.read_hyper(source.Config(CHECKPOINT_CONFIG, "config.json"))
_CHOICE = recipe.make_choice("F32", [], None, None, False)


def fuzz_safetensors(data: bytes) -> None:
    """The tensors of a checkpoint, to the plan of their conversion, and a row of each read."""
    FILE.write_bytes(data)
    try:
        planned = convert._plan_tensors(checkpoint.open_checkpoint(ROOT), _HYPER, _CHOICE, {}, [])
        for tensor in planned:
            tensor.read(0, tensor.row_unit)
    except EngineError as error:
        check(error)


def fuzz_chat(data: bytes) -> None:
    """A saved conversation; the checksum of its header is mended where there is room for one, as a forger would."""
    if len(data) > 48 and data[:8] == chat_file.MAGIC and data[8] & 0x80 == 0:
        text = data[48:]
        prefix = data[:12] + struct.pack("<I", len(text))
        data = prefix + hashlib.sha256(prefix + text).digest() + text
    FILE.write_bytes(data)
    try:
        saved = chat_file.read_chat(FILE)
        json.dumps(saved.messages)
    except EngineError as error:
        check(error)


TARGETS: dict[str, Callable[[bytes], None]] = {
    "tokenizer": fuzz_tokenizer,
    "template": fuzz_template,
    "safetensors": fuzz_safetensors,
    "chat": fuzz_chat,
}


def main() -> None:
    name = sys.argv[1]
    atexit.register(shutil.rmtree, ROOT, ignore_errors=True)
    corpus = ROOT / "seeds"
    corpus.mkdir()
    for i, seed in enumerate(SEEDS.get(name, lambda: [])()):
        (corpus / f"{i:03}").write_bytes(seed)
    atheris.Setup([f"fuzz-{name}", *sys.argv[2:], str(corpus)], TARGETS[name])
    atheris.Fuzz()


if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    main()
