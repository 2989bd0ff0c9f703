"""A Hugging Face folder -> a GGUF file: the one function behind the command."""

from __future__ import annotations

import math
import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import numpy.typing as npt
from gguf import size_label

from pyengine.errors import FileError, FormatError, InvalidArgument, UnsupportedError
from pyengine.tokenizer import PRE_TOKENIZERS
from pyengine_convert import writer
from pyengine_convert.architectures import Hyper, Tensor, check_shape, read_hyper
from pyengine_convert.checkpoint import ITEM_BYTES, SourceTensor, open_checkpoint
from pyengine_convert.keyvalues import KeyValues
from pyengine_convert.plan import PlannedTensor, Rows, permute_heads
from pyengine_convert.recipe import RECIPES, Recipe
from pyengine_convert.source import Config, read_json, read_json_if_present, read_text
from pyengine_convert.vocabulary import read_vocabulary

_QUANTISATION_VERSION = 2  # of the block formats
# generation_config.json -> general.sampling.*
_SAMPLING_FLOATS = {"temperature": "temp", "top_p": "top_p", "min_p": "min_p", "repetition_penalty": "penalty_repeat"}
_DERIVED = re.compile(r".*\.rotary_emb\.inv_freq")  # tables that old checkpoints store and every reader recomputes


@dataclass(frozen=True)
class Report:
    """What was written: ``size`` in bytes, ``weights`` counted, wall-clock ``seconds``; notes for a careful user."""

    path: Path
    size: int
    weights: int
    seconds: float
    tensors: Sequence[PlannedTensor]
    notes: Sequence[str]

    @property
    def bits_per_weight(self) -> float:
        """Of the whole file, metadata included."""
        return self.size * 8 / self.weights


@dataclass(frozen=True)
class Plan:
    """Everything a file will hold, before a byte of weights has been read."""

    keys: KeyValues
    tensors: Sequence[PlannedTensor]
    notes: Sequence[str]

    @property
    def size(self) -> int:
        """Bytes of tensor data."""
        return sum(t.size for t in self.tensors)


def convert(
    source: Path,
    out: Path,
    type_name: str,
    *,
    threads: int = 1,
    force: bool = False,
    name: str | None = None,
    pre: str | None = None,
    on_plan: Callable[[Plan], None] | None = None,
    progress: writer.Progress | None = None,
) -> Report:
    """Converts the checkpoint in ``source`` (docs/convert.md says what it may hold) to ``out``.

    Args:
        type_name: a key of ``RECIPES``: f32, f16, bf16, q8_0, q4_0.
        threads: how many read and encode. The bytes of the file do not depend on it.
        force: replace an existing file.
        name: ``general.name``; the folder's name by default.
        pre: ``tokenizer.ggml.pre`` instead of recognising it.
        on_plan: called once, before writing; progress: called with bytes written.

    Errors: ``FileError``, ``FormatError``, ``UnsupportedError``, ``NumericError``, ``InvalidArgument``.
    """
    began = time.monotonic()
    plan = make_plan(source, type_name, name=name, pre=pre)
    if on_plan is not None:
        on_plan(plan)
    size = writer.write(out, plan.keys, plan.tensors, threads=threads, force=force, progress=progress)
    weights = sum(math.prod(t.shape) for t in plan.tensors)
    return Report(out, size, weights, time.monotonic() - began, plan.tensors, plan.notes)


def make_plan(source: Path, type_name: str, *, name: str | None = None, pre: str | None = None) -> Plan:
    """Reads the small files and the tables of the large ones, and decides everything. Errors: as :func:`convert`."""
    if type_name not in RECIPES:
        raise InvalidArgument(f"unknown type {type_name!r}; known are {', '.join(RECIPES)}", code="unknown_type")
    if pre is not None and pre not in PRE_TOKENIZERS:
        raise InvalidArgument(
            f"unknown pre-tokenizer {pre!r}; known are {', '.join(PRE_TOKENIZERS)}", code="unknown_pretokenizer"
        )
    if not source.is_dir():
        what = "is a file" if source.exists() else "does not exist"
        raise FileError(f"{source} {what}; expected a folder with config.json and safetensors", code="no_folder")
    if not (source / "config.json").exists():
        raise FileError(f"{source} has no config.json: it is no Hugging Face checkpoint", code="no_config")
    config = Config(read_json(source / "config.json"), "config.json")
    hyper = read_hyper(config)
    notes: list[str] = []
    tensors = _plan_tensors(open_checkpoint(source), hyper, RECIPES[type_name], notes)
    vocabulary = read_vocabulary(source, config, hyper.vocab, pre)
    keys = KeyValues()
    _write_general(keys, source, hyper, RECIPES[type_name], tensors, name)
    hyper.write(keys)
    vocabulary.write(keys)
    return Plan(keys, tensors, [*notes, *vocabulary.notes])


def _plan_tensors(
    found: Mapping[str, SourceTensor], hyper: Hyper, recipe: Recipe, notes: list[str]
) -> list[PlannedTensor]:
    table = list(hyper.arch.tensors(hyper))
    _check_names(found, table, hyper, notes)
    planned = [_plan_tensor(found[line.hf], line, hyper, recipe) for line in table]
    factors = hyper.rope.factors(hyper.head_dim)
    if factors is not None:
        planned.append(PlannedTensor("rope_freqs.weight", factors.shape, "F32", _rows_of(factors), source="computed"))
    return planned


def _check_names(found: Mapping[str, SourceTensor], table: Sequence[Tensor], hyper: Hyper, notes: list[str]) -> None:
    known = {line.hf for line in table}
    if missing := [line for line in table if line.hf not in found]:
        more = f" (and {len(missing) - 1} more)" if len(missing) > 1 else ""
        raise FormatError(f"the checkpoint has no {missing[0].hf}{more}", code="missing_tensor", field=missing[0].hf)
    extra = sorted(name for name in found if name not in known and not _DERIVED.fullmatch(name))
    if hyper.tied and "lm_head.weight" in extra:
        extra.remove("lm_head.weight")
        notes.append("lm_head.weight left out: the configuration ties the head to the embedding")
    if extra:
        more = f" (and {len(extra) - 1} more)" if len(extra) > 1 else ""
        first = found[extra[0]]
        raise UnsupportedError(
            f"{first.path.name} has {first.name}{more}, which this {hyper.arch.name} configuration has not",
            code="unknown_tensor",
            field=first.name,
        )


def _plan_tensor(source: SourceTensor, line: Tensor, hyper: Hyper, recipe: Recipe) -> PlannedTensor:
    if source.dtype not in ITEM_BYTES:
        raise UnsupportedError(
            f"{source.name} has dtype {source.dtype}; expected F32, F16 or BF16",
            code="unsupported_dtype",
            field=source.name,
        )
    check_shape(line, source.shape, hyper)
    kind, note = recipe.choose(line.gguf, source.shape, hyper.tied)
    origin = f"{source.name} {source.dtype}"
    if not line.heads or len(source.shape) < 2:
        read = source.read_rows if not line.heads else _rows_of(_permuted_bias(source, hyper.head_dim))
        return PlannedTensor(line.gguf, source.shape, kind, read, source=origin, note=note)
    read = partial(_read_permuted, source, hyper.head_dim)
    return PlannedTensor(line.gguf, source.shape, kind, read, row_unit=hyper.head_dim, source=origin, note=note)


def _read_permuted(source: SourceTensor, head_dim: int, start: int, count: int) -> Rows:
    return permute_heads(source.read_rows(start, count), head_dim)


def _permuted_bias(source: SourceTensor, head_dim: int) -> npt.NDArray[np.float32]:
    return permute_heads(source.read_rows(0, 1).reshape(-1, 1), head_dim).reshape(-1)


def _rows_of(vector: npt.NDArray[np.float32]) -> Callable[[int, int], Rows]:
    return lambda start, count: vector.reshape(1, -1)[start : start + count]


def _write_general(
    keys: KeyValues, source: Path, hyper: Hyper, recipe: Recipe, tensors: Sequence[PlannedTensor], name: str | None
) -> None:
    """The ``general.*`` keys."""
    weights = sum(math.prod(t.shape) for t in tensors)
    keys.string("general.architecture", hyper.arch.name)
    keys.string("general.type", "model")
    keys.string("general.name", name or source.resolve().name or hyper.arch.name)
    keys.string("general.size_label", size_label(weights, weights, 0, 0))
    if (licence := _licence(source)) is not None:
        keys.string("general.license", licence)
    keys.u32("general.file_type", recipe.file_type)
    keys.u32("general.quantization_version", _QUANTISATION_VERSION)
    generation = Config(read_json_if_present(source / "generation_config.json"), "generation_config.json")
    if generation.boolean("do_sample", True):  # otherwise the numbers there are not in use
        for key, name_in_gguf in _SAMPLING_FLOATS.items():
            if generation.get(key) is not None:
                keys.f32(f"general.sampling.{name_in_gguf}", generation.number(key, above=-1e-9))
        if generation.get("top_k") is not None:
            keys.i32("general.sampling.top_k", generation.integer("top_k", low=0))


def _licence(source: Path) -> str | None:
    """The ``license:`` line of a model card's front matter."""
    card = source / "README.md"
    if not card.is_file():
        return None
    front = re.match(r"---\s*\n(.*?)\n---", read_text(card), re.DOTALL)
    line = re.search(r"^license:[ \t]*([\w.+-]+)[ \t]*$", front.group(1), re.MULTILINE) if front else None
    return line.group(1) if line else None
