"""Every tensor format runs a whole model: the engine on the file, the numpy decoder on the weights that it holds."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from gguf import GGMLQuantizationType as Type
from gguf.quants import dequantize

import pyengine
from pyengine import quant
from pyengine.synthetic import CODED, coded_blocks
from tests.reference.configs import ModelConfig
from tests.reference.decoder import decode, nmse
from tests.reference.gguf_writer import Packed, gguf_name, write_gguf
from tests.reference.weights import Weights, make_weights

CONFIG = ModelConfig("formats", "qwen3", hidden_size=256, intermediate_size=512, head_dim=64, prompt_length=24)
BLOCKS = [name for name in quant.FORMATS if name not in ("F32", "F16", "BF16")]
# What int8 activations cost here is 6e-5 to 1.5e-3; one wrong sign in 256 costs 1e-2.
TOLERANCE = 3e-3


def pack(types: dict[str, str]) -> tuple[Weights, Packed]:
    """The weights that a file holds whose matrices have these types, by Hugging Face name, and their blocks."""
    weights, packed = make_weights(CONFIG), {}
    for i, (name, values) in enumerate(weights.items()):
        if values.ndim == 1:
            continue
        kind = types[gguf_name(name)]
        if kind in CODED:
            count = values.size // quant.FORMATS[kind].block_size
            blocks = coded_blocks(np.random.default_rng(i), count, float(values.std()), kind)
        else:
            blocks = quant.quantise(kind, values)
        blocks = blocks.reshape(values.shape[0], -1)
        packed[gguf_name(name)] = (Type[kind], blocks)
        weights[name] = dequantize(blocks, Type[kind]).astype(np.float32).reshape(values.shape)
    return weights, packed


def matrices() -> list[str]:
    return [gguf_name(name) for name, values in make_weights(CONFIG).items() if values.ndim == 2]


def error(types: dict[str, str], path: Path) -> float:
    weights, packed = pack(types)
    write_gguf(path, CONFIG, weights, tokenizer=False, packed=packed)
    n = CONFIG.prompt_length
    with pyengine.Model.open(path) as model, model.session(n_ctx=n, threads=1, kv_type="f32") as session:
        assert {t.type_name for t in model.file.tensors.values() if len(t.dims) == 2} == set(types.values())
        logits = session.eval(CONFIG.prompt, all_logits=True)
    return nmse(logits, decode(CONFIG, weights, CONFIG.prompt))


@pytest.mark.parametrize("name", BLOCKS)
def test_a_model_in_one_format_computes_what_its_weights_say(name: str, tmp_path: Path) -> None:
    assert error(dict.fromkeys(matrices(), name), tmp_path / "model.gguf") < TOLERANCE


@pytest.mark.parametrize("shift", range(0, len(quant.FORMATS), 6))
def test_any_tensor_may_have_any_type(shift: int, tmp_path: Path) -> None:
    kinds = [name for name in quant.FORMATS if name not in ("F32", "F16", "BF16")]
    types = {name: kinds[(i + shift) % len(kinds)] for i, name in enumerate(matrices())}
    assert error(types, tmp_path / "model.gguf") < TOLERANCE
