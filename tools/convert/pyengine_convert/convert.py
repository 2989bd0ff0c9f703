"""A Hugging Face folder or a GGUF file -> a GGUF file: the one function behind the command."""

from __future__ import annotations

import glob
import math
import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from gguf import size_label

from pyengine.errors import FileError, FormatError, InvalidArgument, UnsupportedError
from pyengine.tokenizer import PRE_TOKENIZERS
from pyengine_convert import gguf_source, lora, writer
from pyengine_convert.architectures import Hyper, Tensor, check_shape, read_hyper
from pyengine_convert.card import write_card
from pyengine_convert.checkpoint import ITEM_BYTES, SourceTensor, open_checkpoint
from pyengine_convert.encode import Loss
from pyengine_convert.imatrix import Importance, importance_of, read_imatrix
from pyengine_convert.keyvalues import KeyValues
from pyengine_convert.plan import Packed, PlannedTensor, permute_heads
from pyengine_convert.recipe import QUANTISATION_VERSION, Choice, Facts, Recipe, make_choice
from pyengine_convert.source import Config, read_json, read_json_if_present
from pyengine_convert.vocabulary import read_vocabulary

# generation_config.json -> general.sampling.*
_SAMPLING_FLOATS = {"temperature": "temp", "top_p": "top_p", "min_p": "min_p", "repetition_penalty": "penalty_repeat"}
_DERIVED = re.compile(r".*\.rotary_emb\.inv_freq")  # tables that old checkpoints store and every reader recomputes


@dataclass(frozen=True)
class Report:
    """What was written: ``size`` in bytes, ``weights`` counted, wall-clock ``seconds``; notes for a careful user."""

    paths: Sequence[Path]
    size: int
    weights: int
    seconds: float
    tensors: Sequence[PlannedTensor]
    losses: Mapping[str, Loss]
    notes: Sequence[str]

    @property
    def path(self) -> Path:
        """The file to open: the first of a split one."""
        return self.paths[0]

    @property
    def bits_per_weight(self) -> float:
        """Of the whole file, metadata included."""
        return self.size * 8 / self.weights

    @property
    def worst(self) -> PlannedTensor | None:
        """The tensor that lost most, relative to its weights; None where nothing was lost."""
        worst = max(self.tensors, key=lambda t: self.losses[t.name].relative)
        return worst if self.losses[worst.name].error else None


@dataclass(frozen=True)
class Plan:
    """Everything a file will hold, before a byte of weights has been read."""

    keys: KeyValues
    tensors: Sequence[PlannedTensor]
    notes: Sequence[str]
    source: str  # identifies the files that are read, for --resume

    @property
    def size(self) -> int:
        """Bytes of tensor data."""
        return sum(t.size for t in self.tensors)


@dataclass(frozen=True)
class Options:
    """What is written, beside the type.

    Attributes:
        name: ``general.name``; by default the folder's name, or what the GGUF file says.
        pre: ``tokenizer.ggml.pre`` instead of recognising it.
        tensor_types: (regular expression, type): matrices whose names it is found in; the first that matches decides.
        output_type, embedding_type: of the matrix that makes the logits, of the embedding.
        pure: every matrix gets the same type.
        imatrix: an importance matrix (imatrix.py).
        lora: folders of LoRA adapters that are merged, in this order (lora.py).
        allow_requantize: round again what a GGUF file already holds with less than 8 bits.
    """

    name: str | None = None
    pre: str | None = None
    tensor_types: Sequence[tuple[str, str]] = ()
    output_type: str | None = None
    embedding_type: str | None = None
    pure: bool = False
    imatrix: Path | None = None
    lora: Sequence[Path] = ()
    allow_requantize: bool = False


def convert(
    source: Path,
    out: Path,
    type_name: str,
    *,
    threads: int = 1,
    force: bool = False,
    options: Options | None = None,
    split: int | None = None,
    resume: bool = False,
    on_plan: Callable[[Plan], None] | None = None,
    progress: writer.Progress | None = None,
) -> Report:
    """Converts ``source``, a checkpoint's folder or a GGUF file (docs/convert.md), to ``out``.

    Args:
        type_name: a key of ``recipe.RECIPES`` in any case: f16, q8_0, q4_k_m, ...
        threads: how many read and encode. The bytes of the file do not depend on it.
        force: replace an existing file.
        split, resume: as :func:`writer.write` says.
        on_plan: called once, before writing; progress: called with bytes written.

    Errors: ``FileError``, ``FormatError``, ``UnsupportedError``, ``NumericError``, ``InvalidArgument``.
    """
    began = time.monotonic()
    plan = make_plan(source, type_name, options)
    if out.exists() and any(out.samefile(path) for path in _files(source)):
        raise FileError(f"{out} is the source", code="is_source")
    if on_plan is not None:
        on_plan(plan)
    written = writer.write(
        out,
        plan.keys,
        plan.tensors,
        threads=threads,
        force=force,
        progress=progress,
        split=split,
        resume=resume,
        source=plan.source,
    )
    weights = sum(math.prod(t.shape) for t in plan.tensors)
    seconds = time.monotonic() - began
    return Report(written.paths, written.size, weights, seconds, plan.tensors, written.losses, plan.notes)


def make_plan(source: Path, type_name: str, options: Options | None = None) -> Plan:
    """Reads the small files and the tables of the large ones, and decides everything. Errors: as :func:`convert`."""
    options = options or Options()
    choice = make_choice(type_name, options.tensor_types, options.output_type, options.embedding_type, options.pure)
    if options.pre is not None and options.pre not in PRE_TOKENIZERS:
        raise InvalidArgument(
            f"unknown pre-tokenizer {options.pre!r}; known are {', '.join(PRE_TOKENIZERS)}", code="unknown_pretokenizer"
        )
    importance = read_imatrix(options.imatrix) if options.imatrix is not None else {}
    plan = _plan_gguf if source.is_file() else _plan_folder
    keys, tensors, notes = plan(source, choice, importance, options)
    if options.imatrix is not None:
        keys.string("quantize.imatrix.file", options.imatrix.name)
        keys.i32("quantize.imatrix.entries_count", len(importance))
        without = [t.name for t in tensors if t.importance is None and t.type not in {"F32", "F16", "BF16", "Q8_0"}]
        if without:
            notes.append(f"{len(without)} quantised tensors have no importance, e.g. {without[0]}")
    read = [*_files(source), *(path for folder in options.lora for path in _files(folder))]
    return Plan(keys, tensors, notes, "\n".join(map(_identity, read)))


def _plan_gguf(
    source: Path, choice: Choice, importance: Importance, options: Options
) -> tuple[KeyValues, list[PlannedTensor], list[str]]:
    if options.pre is not None:
        raise InvalidArgument("--pre is for checkpoints; a GGUF file names its pre-tokenizer", code="pre_with_gguf")
    if options.lora:
        raise InvalidArgument("--lora is for checkpoints; the source is a GGUF file", code="lora_with_gguf")
    file = gguf_source.open_source(source)
    notes: list[str] = []
    known = gguf_source.facts(file, bool(importance))
    tensors = list(gguf_source.plan_tensors(file, choice, known, importance, options.allow_requantize))
    return gguf_source.copy_keys(file, choice.recipe, options.name, notes), tensors, notes


def _plan_folder(
    source: Path, choice: Choice, importance: Importance, options: Options
) -> tuple[KeyValues, list[PlannedTensor], list[str]]:
    if not source.is_dir():
        raise FileError(
            f"{source} does not exist; expected a folder with config.json and safetensors, or a GGUF file",
            code="no_source",
        )
    if not (source / "config.json").exists():
        raise FileError(f"{source} has no config.json: it is no Hugging Face checkpoint", code="no_config")
    config = Config(read_json(source / "config.json"), "config.json")
    hyper = read_hyper(config)
    notes: list[str] = []
    if hyper.rope.kind == "dynamic":
        notes.append(f"dynamic rope scaling left out: it acts beyond the context of {hyper.context} tokens only")
    found = open_checkpoint(source)
    for folder in options.lora:
        found = lora.merge(found, folder, hyper.tied, notes)
    tensors = _plan_tensors(found, hyper, choice, importance, notes)
    vocabulary = read_vocabulary(source, config, hyper.vocab, options.pre)
    keys = KeyValues()
    _write_general(keys, source, hyper, choice.recipe, tensors, options.name, notes)
    hyper.write(keys)
    vocabulary.write(keys)
    return keys, tensors, [*notes, *vocabulary.notes]


def _files(source: Path) -> list[Path]:
    """What is read: every file of a folder, a GGUF file with its other parts."""
    if source.is_dir():
        return sorted(path for path in source.iterdir() if path.is_file())
    first = re.fullmatch(r"(.*-)00001(-of-[0-9]{5}[.]gguf)", source.name)
    others = source.parent.glob(f"{glob.escape(first[1])}[0-9][0-9][0-9][0-9][0-9]{first[2]}") if first else []
    return sorted({source, *others})


def _identity(path: Path) -> str:
    seen = path.stat()
    return f"{path.name} {seen.st_size} {seen.st_mtime_ns}"


def _plan_tensors(
    found: Mapping[str, SourceTensor], hyper: Hyper, choice: Choice, importance: Importance, notes: list[str]
) -> list[PlannedTensor]:
    table = list(hyper.arch.tensors(hyper))
    _check_names(found, table, hyper, notes)
    facts = Facts(hyper.arch.name, hyper.layers, hyper.heads // hyper.kv_heads, hyper.tied, bool(importance))
    planned = [_plan_tensor(found[line.hf], line, hyper, choice, facts, importance) for line in table]
    factors = hyper.rope.factors(hyper.head_dim)
    if factors is not None:
        planned.append(
            PlannedTensor(
                "rope_freqs.weight", factors.shape, "F32", "F32", _rows_of(factors.reshape(1, -1)), source="computed"
            )
        )
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


def _plan_tensor(
    source: SourceTensor, line: Tensor, hyper: Hyper, choice: Choice, facts: Facts, importance: Importance
) -> PlannedTensor:
    if source.dtype not in ITEM_BYTES:
        raise UnsupportedError(
            f"{source.name} has dtype {source.dtype}; expected F32, F16 or BF16",
            code="unsupported_dtype",
            field=source.name,
        )
    check_shape(line, source.shape, hyper)
    kind, note = choice.of(line.gguf, source.shape, facts)
    weights = importance_of(importance, line.gguf, source.shape)
    origin = f"{source.name} {source.dtype}{'+LoRA' if isinstance(source, lora.Merged) else ''}"
    unit = hyper.head_dim if line.heads else 1
    if line.heads and len(source.shape) < 2:
        bias = permute_heads(source.read(0, 1).reshape(source.cols, -1), unit).reshape(1, -1)
        return PlannedTensor(line.gguf, source.shape, kind, source.dtype, _rows_of(bias), source=origin, note=note)
    read = partial(_read_permuted, source, unit) if line.heads else source.read
    return PlannedTensor(line.gguf, source.shape, kind, source.dtype, read, unit, origin, note, weights)


def _read_permuted(source: SourceTensor, head_dim: int, start: int, count: int) -> Packed:
    return permute_heads(source.read(start, count), head_dim)


def _rows_of(rows: npt.NDArray[Any]) -> Callable[[int, int], Packed]:
    packed = rows.view(np.uint8)
    return lambda start, count: packed[start : start + count]


def _write_general(
    keys: KeyValues,
    source: Path,
    hyper: Hyper,
    recipe: Recipe,
    tensors: Sequence[PlannedTensor],
    name: str | None,
    notes: list[str],
) -> None:
    """The ``general.*`` keys."""
    weights = sum(math.prod(t.shape) for t in tensors)
    keys.string("general.architecture", hyper.arch.name)
    keys.string("general.type", "model")
    keys.string("general.name", name or source.resolve().name or hyper.arch.name)
    keys.string("general.size_label", size_label(weights, weights, 0, 0))
    write_card(keys, source, notes)
    keys.u32("general.file_type", recipe.file_type)
    keys.u32("general.quantization_version", QUANTISATION_VERSION)
    generation = Config(read_json_if_present(source / "generation_config.json"), "generation_config.json")
    if generation.boolean("do_sample", True):  # otherwise the numbers there are not in use
        for key, name_in_gguf in _SAMPLING_FLOATS.items():
            if generation.get(key) is not None:
                keys.f32(f"general.sampling.{name_in_gguf}", generation.number(key, above=-1e-9))
        if generation.get("top_k") is not None:
            keys.i32("general.sampling.top_k", generation.integer("top_k", low=0))
