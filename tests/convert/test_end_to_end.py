"""The trained models, converted and run by the engine, tell the expected story."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from pyengine.model import Model
from pyengine_convert.convert import convert
from tests.convert.checkpoints import STORIES
from tests.support import DATA, needs_data


@needs_data
@pytest.mark.parametrize("name", STORIES)
@pytest.mark.parametrize("kind", ["f32", "f16"])
def test_a_converted_model_generates_the_expected_text(tmp_path: Path, name: str, kind: str) -> None:
    golden = json.loads((DATA / "golden" / "golden.json").read_text())["stories260K"]
    convert(DATA / "models" / name, tmp_path / "m.gguf", kind)
    # The smallest gap between the two best logits is 0.004: F16 weights keep the text for a while, F32 for all of it.
    length = len(golden["greedy_ids"]) if kind == "f32" else 40
    with Model.open(tmp_path / "m.gguf") as model, model.session(n_ctx=256, kv_type="f32") as session:
        ids: list[int] = list(golden["prompt_ids"])
        fresh = ids
        for _ in range(length):
            fresh = [int(session.eval(fresh).argmax())]
            ids += fresh
        assert ids[1:] == golden["greedy_ids"][:length]
        if kind == "f32":
            assert model.tokenizer.decode(ids[1:]) == golden["text"]


@needs_data
@pytest.mark.parametrize("kind", ["bf16", "q8_0", "q4_0"])
def test_rounded_models_stay_close_to_the_exact_one(tmp_path: Path, kind: str) -> None:
    """Mean cross-entropy over a story, against the exact file's: what rounding may cost at most, in nats."""
    import numpy as np

    source = DATA / "models" / "stories260K-llama-256d"
    with open(DATA / "text" / "tinystories.txt", encoding="utf-8") as file:
        text = file.read(1500)

    def loss(path: Path) -> float:
        with Model.open(path) as model, model.session(n_ctx=512, kv_type="f32") as session:
            ids = model.tokenizer.encode(text)[:400]
            logits = session.eval(ids, all_logits=True).astype(np.float64)
            logs = (
                logits
                - np.log(np.exp(logits - logits.max(1, keepdims=True)).sum(1, keepdims=True))
                - logits.max(1, keepdims=True)
            )
            return float(-logs[np.arange(len(ids) - 1), ids[1:]].mean())

    for each in ("f32", kind):
        convert(source, tmp_path / f"{each}.gguf", each)
    exact, rounded = loss(tmp_path / "f32.gguf"), loss(tmp_path / f"{kind}.gguf")
    assert exact < 2.0  # a trained model: chance is ln 512 = 6.2
    assert abs(rounded - exact) < {"bf16": 0.005, "q8_0": 0.005, "q4_0": 0.06}[kind]
