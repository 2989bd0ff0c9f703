"""The model card: what the front matter of ``README.md`` says, as ``general.*`` keys."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from pyengine_convert.keyvalues import KeyValues
from pyengine_convert.source import read_text

_HUB = "https://huggingface.co"  # where the ids of a card lead to
_WORDS = {"license": "license", "license_name": "license.name", "license_link": "license.link"}
_LISTS = {"tags": ("tags", "pipeline_tag"), "languages": ("languages", "language")}
_ORIGINS = {"base_model": "base_model", "dataset": "datasets"}


def write_card(keys: KeyValues, folder: Path, notes: list[str]) -> None:
    """Adds the keys. A card is for people: one that cannot be read is a note, no error."""
    path = folder / "README.md"
    if not path.is_file():
        return
    front = re.match(r"\ufeff?---[ \t]*\r?\n(.*?)\r?\n---[ \t]*(?:\r?\n|$)", read_text(path), re.DOTALL)
    if front is None:
        return
    try:
        card = yaml.load(front[1], yaml.BaseLoader)  # noqa: S506: text, lists and mappings only; "no" stays Norwegian
    except (yaml.YAMLError, RecursionError) as error:
        notes.append(f"the front matter of README.md is no YAML; left out ({str(error).splitlines()[0]})")
        return
    if not isinstance(card, dict):
        return
    for field, key in _WORDS.items():
        if words := list(_texts(card.get(field))):
            keys.string(f"general.{key}", ", ".join(words))
    for kind, field in _ORIGINS.items():
        ids = list(_texts(card.get(field)))
        if ids:
            keys.u32(f"general.{kind}.count", len(ids))
        for i, text in enumerate(ids):
            organisation, slash, name = text.rpartition("/")
            keys.string(f"general.{kind}.{i}.name", name)
            if slash:
                keys.string(f"general.{kind}.{i}.organization", organisation)
                where = "datasets/" if kind == "dataset" else ""
                keys.string(f"general.{kind}.{i}.repo_url", f"{_HUB}/{where}{text}")
    for key, fields in _LISTS.items():
        keys.strings(f"general.{key}", list(dict.fromkeys(t for field in fields for t in _texts(card.get(field)))))


def _texts(value: Any) -> Iterator[str]:
    """A text, or the texts of a list, without empty ones."""
    for text in value if isinstance(value, list) else [value]:
        if isinstance(text, str) and text.strip():
            yield text.strip()
