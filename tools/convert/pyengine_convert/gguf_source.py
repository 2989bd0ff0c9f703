"""A GGUF file as the source: its metadata as it is, its tensors read a few rows at a time and requantised."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np

from pyengine import quant
from pyengine.errors import UnsupportedError
from pyengine.gguf_file import GgufFile, TensorInfo
from pyengine.model import Model
from pyengine_convert.imatrix import Importance, importance_of
from pyengine_convert.keyvalues import KeyValues
from pyengine_convert.plan import Packed, PlannedTensor
from pyengine_convert.recipe import QUANTISATION_VERSION, Choice, Facts, Recipe

_FULL = {"F32", "F16", "BF16", "Q8_0"}  # precise enough to be rounded once more


def open_source(path: Path) -> GgufFile:
    """Opens and checks the file, as a model too: what cannot be run is known before anything is written."""
    with Model.open(path) as model:
        _ = model.tokenizer
    return GgufFile.open(path)


def facts(file: GgufFile, importance: bool) -> Facts:
    """What recipes look at."""
    arch = str(file.metadata["general.architecture"])
    heads = _largest(file.metadata[f"{arch}.attention.head_count"])
    kv_heads = _largest(file.metadata.get(f"{arch}.attention.head_count_kv", heads))
    layers = int(file.metadata[f"{arch}.block_count"])
    return Facts(arch, layers, heads // max(kv_heads, 1), "output.weight" not in file.tensors, importance)


def _largest(value: object) -> int:
    """Counts may be one for all layers or one for each."""
    return int(np.max(np.asarray(value)))


def copy_keys(file: GgufFile, recipe: Recipe, name: str | None, notes: list[str]) -> KeyValues:
    """All keys, but for those that the new file has its own values for."""
    own: dict[str, int | str] = {
        "general.file_type": recipe.file_type,
        "general.quantization_version": QUANTISATION_VERSION,
    }
    if name is not None:
        own["general.name"] = name
    keys = KeyValues()
    for key, value in file.metadata.items():
        if key.startswith(("split.", "quantize.imatrix.")):
            continue
        if key in own:
            _add(keys, key, own.pop(key))
        elif not keys.copy(key, value, *file.metadata.value_type(key)):
            notes.append(f"{key} left out: an empty array")
    for key, value in own.items():
        _add(keys, key, value)
    return keys


def _add(keys: KeyValues, key: str, value: int | str) -> None:
    if isinstance(value, str):
        keys.string(key, value)
    else:
        keys.u32(key, value)


def plan_tensors(
    file: GgufFile, choice: Choice, known: Facts, importance: Importance, allow_requantise: bool
) -> Iterator[PlannedTensor]:
    """Every tensor in the file's order. Errors: ``UnsupportedError``, ``FormatError``."""
    for tensor in file.tensors.values():
        shape = tensor.dims[::-1]
        kind, note = choice.of(tensor.name, shape, known)
        if tensor.type_name == kind:
            note = note or "as it was"
        elif tensor.type_name not in _FULL and not allow_requantise:
            raise UnsupportedError(
                f"{tensor.name} is {tensor.type_name}: quantising it again loses twice; use an F32, F16, BF16 or Q8_0 "
                "file, or --allow-requantize",
                code="quantised_source",
                field=tensor.name,
            )
        weights = importance_of(importance, tensor.name, shape)
        data = file.data(tensor.name)
        yield PlannedTensor(
            tensor.name,
            shape,
            kind,
            tensor.type_name,
            partial(_packed, file, tensor, data),
            source=tensor.type_name,
            note=note,
            importance=weights,
            copied=tensor.type_name == kind,
        )


def _packed(file: GgufFile, tensor: TensorInfo, data: Packed, start: int, count: int) -> Packed:
    size = quant.find(tensor.type_name).row_bytes(tensor.cols)
    packed = data[start * size : (start + count) * size].copy()  # what is checked is what will be written
    file.check_unchanged()
    return packed.reshape(count, size)
