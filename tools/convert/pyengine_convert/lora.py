"""LoRA adapters merged into the weights they belong to, a few rows at a time while these are read.

A folder as PEFT saves it: ``adapter_config.json`` and ``adapter_model.safetensors``. A matrix W becomes W + s B A, of
the embedding W + s (B A)^T. The product is taken with the engine's float kernel: the bytes are the same on every
machine. What would merge into a model that answers differently is refused by name.
"""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from pyengine import quant
from pyengine.errors import FileError, FormatError, UnsupportedError
from pyengine_convert.checkpoint import ITEM_BYTES, SourceTensor, read_header
from pyengine_convert.source import Config, read_json

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"

# Settings with which a matrix is more than W + s B A, or W not the checkpoint's; and the values that leave it so.
_PLAIN: Mapping[str, tuple[Any, ...]] = {
    "use_dora": (None, False),
    "use_qalora": (None, False),
    "lora_bias": (None, False),
    "layer_replication": (None, []),
    "alora_invocation_tokens": (None, []),
    "arrow_config": (None,),
    "target_parameters": (None, []),
    "trainable_token_indices": (None, [], {}),
    "init_lora_weights": (None, True, False, "gaussian", "eva", "orthogonal"),
}
_NAME = re.compile(r"base_model\.model\.(.+)")
_FACTOR = re.compile(r"(.+)\.lora_(?:embedding_)?([AB])(?:\.default)?(?:\.weight)?")


@dataclass(frozen=True, kw_only=True)
class Merged(SourceTensor):
    """``base`` with ``scale`` b a added: a [rank, cols], b [rows, rank].

    Of the embedding it is the transposed product: a [rank, rows], b [cols, rank]. Float32, whatever the checkpoint
    has: nothing is rounded twice.
    """

    base: SourceTensor
    a: SourceTensor
    b: SourceTensor
    scale: float
    embedding: bool

    def read(self, start: int, count: int) -> npt.NDArray[np.uint8]:
        rank = self.a.shape[0]
        if self.embedding:
            left, right = self.a.read_rows(0, rank)[:, start : start + count].T, self.b.read_rows(0, self.cols)
        else:
            left, right = self.b.read_rows(start, count), self.a.read_rows(0, rank).T
        packed = np.ascontiguousarray(right).view(np.uint8).reshape(-1)
        with np.errstate(over="ignore", invalid="ignore"):  # what is not finite is named where it is encoded
            change = quant.linear(quant.tier_active(), "F32", packed, self.cols, rank, left)
            merged = self.base.read_rows(start, count) + np.float32(self.scale) * change
        return merged.view(np.uint8)


def merge(found: Mapping[str, SourceTensor], folder: Path, tied: bool, notes: list[str]) -> dict[str, SourceTensor]:
    """The tensors of a checkpoint with an adapter's changes. ``tied``: the head is the embedding.

    Errors: ``FileError``, ``FormatError``, ``UnsupportedError``.
    """
    config = _read_config(folder)
    if config.boolean("fan_in_fan_out", False):
        notes.append(f"{CONFIG} sets fan_in_fan_out, which linear layers do not have; ignored, as PEFT does")
    merged = dict(found)
    factors: dict[str, dict[str, SourceTensor]] = defaultdict(dict)
    for name, tensor in read_header(folder / WEIGHTS).items():
        if tensor.dtype not in ITEM_BYTES:
            raise UnsupportedError(
                f"{WEIGHTS}: {name} has dtype {tensor.dtype}; expected F32, F16 or BF16",
                code="unsupported_dtype",
                field=name,
            )
        inner = _NAME.fullmatch(name)
        factor = _FACTOR.fullmatch(inner[1]) if inner else None
        if factor:
            factors[factor[1]][factor[2]] = tensor
            continue
        whole = inner[1].replace(".base_layer.", ".") if inner else name
        if whole not in found:
            raise UnsupportedError(
                f"{WEIGHTS} has {name}, which is neither a LoRA factor nor a tensor of the checkpoint",
                code="unknown_tensor",
                field=name,
            )
        _check_shape(tensor, found[whole].shape, name)
        merged[whole] = tensor  # trained as a whole: modules_to_save, biases
    for module, pair in factors.items():
        merged[f"{module}.weight"] = _merged(merged, module, pair, config)
    if changed := [
        n for n in ("model.embed_tokens.weight", "lm_head.weight") if tied and merged.get(n) != found.get(n)
    ]:
        raise UnsupportedError(
            f"{WEIGHTS} changes {changed[0]}, which the configuration ties to the other end of the model",
            code="tied_adapter",
            field=changed[0],
        )
    if not factors:
        raise FormatError(f"{folder / WEIGHTS} holds no LoRA factors", code="no_adapter")
    notes.append(f"{folder.name}: merged into {len(factors)} matrices")
    return merged


def _read_config(folder: Path) -> Config:
    for name in (CONFIG, WEIGHTS):
        if not (folder / name).is_file():
            pickled = folder / "adapter_model.bin"
            hint = f"; {pickled.name} is not read: it can run code" if name == WEIGHTS and pickled.exists() else ""
            raise FileError(f"{folder} has no {name}: it is no PEFT adapter{hint}", code="no_adapter")
    config = Config(read_json(folder / CONFIG), CONFIG)
    kind = config.string("peft_type")
    if kind != "LORA":
        raise UnsupportedError(
            f"{CONFIG}: peft_type is {kind}; expected LORA", code="unsupported_adapter", field="peft_type"
        )
    for key, plain in _PLAIN.items():
        value = config.get(key)
        if not any(value is p or (value == p and type(value) is type(p)) for p in plain):
            raise UnsupportedError(
                f"{CONFIG}: {key} is {value!r}, which is not merged", code="unsupported_adapter", field=key
            )
    return config


def _merged(
    found: Mapping[str, SourceTensor], module: str, pair: Mapping[str, SourceTensor], config: Config
) -> SourceTensor:
    base = found.get(f"{module}.weight")
    if base is None:
        raise FormatError(
            f"{WEIGHTS} changes {module}, which the checkpoint has not: it is another model's adapter",
            code="unknown_tensor",
            field=module,
        )
    if missing := {"A", "B"} - set(pair):
        raise FormatError(f"{WEIGHTS}: {module} has no lora_{missing.pop()}", code="missing_tensor", field=module)
    if len(base.shape) != 2:
        raise FormatError(f"{WEIGHTS} changes {module}, which is no matrix", code="bad_shape", field=module)
    embedding = "lora_embedding" in pair["A"].name
    rank = Config({"r": _pattern(config, "rank_pattern", module, config.get("r"))}, f"{CONFIG}, for {module}").integer(
        "r", high=65536
    )
    alpha = Config(
        {"lora_alpha": _pattern(config, "alpha_pattern", module, config.get("lora_alpha"))}, f"{CONFIG}, for {module}"
    ).number("lora_alpha", above=-math.inf)
    inner, outer = base.shape[::-1] if not embedding else base.shape
    _check_shape(pair["A"], (rank, inner), pair["A"].name)
    _check_shape(pair["B"], (outer, rank), pair["B"].name)
    scale = alpha / (math.sqrt(rank) if config.boolean("use_rslora", False) else rank)
    return Merged(
        name=base.name,
        dtype="F32",
        shape=base.shape,
        path=base.path,
        offset=base.offset,
        base=base,
        a=pair["A"],
        b=pair["B"],
        scale=scale,
        embedding=embedding,
    )


def _pattern(config: Config, key: str, module: str, otherwise: Any) -> Any:
    """What ``rank_pattern`` or ``alpha_pattern`` says of a module; keys are regular expressions for ends of names."""
    for pattern, value in config.section(key).values.items():
        try:
            if re.fullmatch(rf"(.*\.)?({pattern})", module):
                return value
        except re.error as error:
            raise FormatError(
                f"{CONFIG}: {key} has {pattern!r}, no regular expression: {error}", code="bad_config", field=key
            ) from None
    return otherwise


def _check_shape(tensor: SourceTensor, expected: tuple[int, ...], name: str) -> None:
    if tensor.shape != expected:
        raise FormatError(
            f"{WEIGHTS}: {name} has shape {list(tensor.shape)}; expected {list(expected)}", code="bad_shape", field=name
        )
