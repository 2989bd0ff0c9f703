"""Random strings through the original ``tokenizer.json`` and through what the converter makes of it: no id may differ.

``python -m tests.text.differences [--strings N] [NAME ...]`` (``make tokenizers``); ``test_tokenizer.py`` has a share.
Strings are first normalised as the file says: GGUF vocabularies are used without normalisation (docs/text.md).
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import tokenizers

from pyengine.tokenizer import Tokenizer
from pyengine_convert.keyvalues import KeyValues
from pyengine_convert.source import Config
from pyengine_convert.vocabulary import read_vocabulary
from tests.support import DATA
from tests.text.vocabularies import random_text, tokenizer_json

NAMES = ("qwen3", "r1-distill-qwen", "stories260K")


class Pair(NamedTuple):
    """The original, and ours as a converted model has it."""

    original: tokenizers.Tokenizer
    ours: Tokenizer


def pair(name: str) -> Pair:
    """Through the converter's own reading of a checkpoint folder."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        if name == "stories260K":
            source = DATA / "models" / "stories260K-llama" / "tokenizer.json"
            folder = source.parent
        else:
            source = folder / "tokenizer.json"
            source.write_text(json.dumps(tokenizer_json(name)), encoding="utf-8")
        original = tokenizers.Tokenizer.from_file(str(source))
        rows = original.get_vocab_size()
        vocabulary = read_vocabulary(folder, Config({}, "config.json"), rows)
    keys = KeyValues()
    vocabulary.write(keys)
    return Pair(original, Tokenizer.from_metadata({key: value.value for key, value in keys.items()}))


def texts(rng: random.Random, markers: list[str]) -> Iterator[tuple[str, bool]]:
    """(text, whether it holds markers): every fourth has them, and pieces of them."""
    while True:
        for _ in range(3):
            yield random_text(rng, 30), False
        yield "".join(rng.choice(markers) if rng.random() < 0.4 else random_text(rng, 4) for _ in range(12)), True


def compare(name: str, strings: int, seed: int = 0) -> Iterator[str]:
    """Compares ``strings`` strings; yields a sentence for each that differs."""
    original, ours = pair(name)
    rng = random.Random(f"{name} {seed}")
    markers = list(ours.special_strings)
    # The character that SentencePiece writes for a space is a space to it, too.
    spaced = (lambda text: text.replace("\u2581", " ")) if ours.adds_space else str
    normalise = original.normalizer.normalize_str if name != "stories260K" else str  # its normaliser adds the space
    for (text, marked), _ in zip(texts(rng, [*markers, "<think", "|im_end|>", "<", ">"]), range(strings), strict=False):
        text = normalise(text)
        ids = ours.encode(text, add_special=False, parse_special=True)
        expected = original.encode(text, add_special_tokens=False).ids
        if ids != expected:
            yield f"{name}: {text!r}: {ids}, the original has {expected}"
        elif not marked and (back := ours.decode(ids)) != spaced(text) and not any(m in text for m in markers):
            yield f"{name}: {text!r} comes back as {back!r}"  # text after a marker may get a space: docs/text.md


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", default=NAMES, metavar="NAME", help=f"of {', '.join(NAMES)}")
    parser.add_argument("--strings", type=int, default=1_000_000, help="for each vocabulary")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    total = 0
    for name in args.names:
        start = time.monotonic()
        found = 0
        for sentence in compare(name, args.strings, args.seed):
            found += 1
            if found <= 20:
                print(sentence, flush=True)
        total += found
        print(f"{name}: {args.strings} strings, {found} differences, {time.monotonic() - start:.0f} s", flush=True)
    return 1 if total else 0


if __name__ == "__main__":
    sys.exit(main())
