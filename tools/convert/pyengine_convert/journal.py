"""What an unfinished file holds so far, so that a killed conversion can go on.

A text file beside the unfinished one: a first line that identifies the conversion, then a line for every checkpoint:
the data up to there is on the disk. A line cut off in the middle is as good as none.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from pyengine.errors import FileError
from pyengine_convert.encode import Loss


@dataclass
class State:
    """How far a file has come: ``offset`` bytes of file number ``volume``, up to row ``row`` of its tensor ``tensor``.

    ``losses`` and ``checks`` (CRC-32 of first pieces) are those of the tensors so far, by name; ``done`` counts bytes
    of tensor data.
    """

    volume: int = 0
    tensor: int = 0
    row: int = 0
    offset: int = 0
    done: int = 0
    losses: dict[str, Loss] = field(default_factory=dict)
    checks: dict[str, int] = field(default_factory=dict)

    def copy(self) -> State:
        return replace(self, losses=dict(self.losses), checks=dict(self.checks))


class Journal:
    """The journal of one conversion, being written."""

    def __init__(self, path: Path, state: State) -> None:
        self._path = path
        self._file = open(path, "ab")  # noqa: SIM115
        self._told = set(list(state.losses)[:-1])  # the last may be incomplete

    @classmethod
    def begin(cls, path: Path, identity: str, state: State) -> Journal:
        """Goes on with the journal that ``state`` is from; a new one at the beginning of a file."""
        if not state.offset:
            path.write_text(json.dumps({"conversion": identity}) + "\n", encoding="utf-8")
        return cls(path, state)

    def checkpoint(self, state: State) -> None:
        """To be called when everything before has been synced."""
        names = [name for name in state.losses if name not in self._told]
        line = {
            "volume": state.volume,
            "tensor": state.tensor,
            "row": state.row,
            "offset": state.offset,
            "done": state.done,
            "losses": {n: [state.losses[n].error, state.losses[n].energy, state.losses[n].weights] for n in names},
            "checks": {n: state.checks[n] for n in names},
        }
        self._told.update(names[:-1])
        self._file.write(json.dumps(line).encode() + b"\n")
        self._file.flush()
        os.fsync(self._file.fileno())

    def close(self) -> None:
        self._file.close()


def read(path: Path, identity: str) -> State:
    """The last checkpoint; the beginning where there is no journal, or none that got as far as its first line. Errors:
    ``FileError`` when it is not of the conversion ``identity``."""
    try:
        lines = path.read_bytes().split(b"\n")[:-1]
    except FileNotFoundError:
        return State()
    if not lines:  # a full disk
        return State()
    parsed = []
    with suppress(ValueError):  # damaged from there on
        for line in lines:
            parsed.append(json.loads(line))
    if not parsed or not isinstance(parsed[0], dict) or parsed[0].get("conversion") != identity:
        raise FileError(
            f"{path} belongs to a conversion of another source or with other options; start again without --resume",
            code="other_conversion",
        )
    state = State()
    for line in parsed[1:]:
        _apply(state, line)
    return state


def _apply(state: State, line: Mapping[str, Any]) -> None:
    for name in ("volume", "tensor", "row", "offset", "done"):
        setattr(state, name, line[name])
    state.losses.update({name: Loss(*sums) for name, sums in line["losses"].items()})
    state.checks.update(line["checks"])
