"""Converted files against those that llama.cpp's own tools wrote from the same models."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from gguf import GGMLQuantizationType
from gguf.quants import quantize
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from pyengine_convert.convert import convert
from tests.convert.checkpoints import STORIES, copy_writable
from tests.convert.readback import Readback
from tests.support import DATA, needs_data

pytestmark = needs_data

# Keys that may differ, and why.
OURS_ONLY = {
    "general.type",  # "model"; newer files have it
    "general.size_label",
    "general.quantization_version",  # the F32 file has none
    "tokenizer.ggml.padding_token_id",
    "qwen2.vocab_size", "qwen3.vocab_size",  # the older writer adds these to llama only
    "qwen2.rope.dimension_count", "qwen3.rope.dimension_count",
}  # fmt: skip
OTHER_VALUE = {"general.name"}  # the folder's name


@pytest.fixture(scope="module")
def converted(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], Path]:
    folder = tmp_path_factory.mktemp("converted")
    paths = {}
    for name in STORIES:
        for kind in ("f32", "f16", "bf16", "q8_0", "q4_0"):
            paths[name, kind] = folder / f"{name}-{kind}.gguf"
            convert(DATA / "models" / name, paths[name, kind], kind, threads=2)
    return paths


@pytest.mark.parametrize(
    ("name", "kind", "reference"),
    [
        ("stories260K-llama", "f32", "stories260K-llama-F32"),
        ("stories260K-llama-256d", "f16", "stories260K-llama-256d-F16"),
        ("stories260K-llama-256d", "q8_0", "stories260K-llama-256d-Q8_0"),
        ("stories260K-qwen2-256d", "q8_0", "stories260K-qwen2-256d-Q8_0"),
        ("stories260K-qwen3-256d", "q8_0", "stories260K-qwen3-256d-Q8_0"),
        ("stories260K-llama-256d", "q4_0", "stories260K-llama-256d-Q4_0"),
    ],
)
def test_tensors_are_byte_equal_to_published_ones_and_keys_agree(
    converted: dict[tuple[str, str], Path], name: str, kind: str, reference: str
) -> None:
    ours, theirs = Readback(converted[name, kind]), Readback(DATA / "gguf" / f"{reference}.gguf")
    assert set(ours.shapes) == set(theirs.shapes)
    assert ours.types == theirs.types
    for tensor, type_name in ours.types.items():
        assert ours.shapes[tensor] == theirs.shapes[tensor]
        if type_name != "Q6_K":  # whose scales are fitted, better (tests/peers/test_quantisers.py)
            assert ours.bytes[tensor] == theirs.bytes[tensor], tensor
    assert set(theirs.metadata) <= set(ours.metadata)
    assert set(ours.metadata) - set(theirs.metadata) <= OURS_ONLY
    for key in set(theirs.metadata) - OTHER_VALUE:
        assert ours.metadata[key] == theirs.metadata[key], key


@pytest.mark.parametrize("name", STORIES)
def test_every_type_holds_the_checkpoint_rounded_as_the_format_says(
    converted: dict[tuple[str, str], Path], name: str
) -> None:
    exact = Readback(converted[name, "f32"])
    source = load_file(DATA / "models" / name / "model.safetensors")
    assert np.array_equal(exact.values["token_embd.weight"], source["model.embed_tokens.weight"])
    assert np.array_equal(exact.values["blk.1.ffn_down.weight"], source["model.layers.1.mlp.down_proj.weight"])
    for kind in ("f16", "bf16", "q8_0", "q4_0"):
        packed = Readback(converted[name, kind])
        assert set(packed.types) == set(exact.types)
        for tensor, values in exact.values.items():
            found = packed.types[tensor]
            assert found == expected_type(tensor, values.shape, kind, "output.weight" in exact.types)
            if found != "Q6_K":  # the gguf package does not write it
                assert packed.bytes[tensor] == quantize(values, GGMLQuantizationType[found]).tobytes(), (kind, tensor)


def expected_type(tensor: str, shape: tuple[int, ...], kind: str, own_head: bool) -> str:
    if len(shape) == 1:
        return "F32"
    if kind in ("q8_0", "q4_0") and shape[-1] % 32:
        return "F16"
    if kind == "q4_0" and tensor == ("output.weight" if own_head else "token_embd.weight"):
        return "Q6_K" if shape[-1] % 256 == 0 else "Q8_0"
    return kind.upper()


def test_a_sharded_checkpoint_gives_the_same_file_as_a_single_one(tmp_path: Path) -> None:
    name = "stories260K-qwen3-256d"
    whole = copy_writable(name, tmp_path / "whole" / name)
    sharded = copy_writable(name, tmp_path / "sharded" / name)
    tensors = load_file(sharded / "model.safetensors")
    (sharded / "model.safetensors").unlink()
    names = sorted(tensors)
    parts = {f"model-0000{i + 1}-of-00003.safetensors": names[i::3] for i in range(3)}
    for part, members in parts.items():
        save_file({n: tensors[n] for n in members}, sharded / part)
    index = {"metadata": {}, "weight_map": {n: part for part, members in parts.items() for n in members}}
    (sharded / "model.safetensors.index.json").write_text(json.dumps(index))
    convert(whole, tmp_path / "whole.gguf", "q8_0")
    convert(sharded, tmp_path / "sharded.gguf", "q8_0")
    assert (tmp_path / "whole.gguf").read_bytes() == (tmp_path / "sharded.gguf").read_bytes()


def test_the_file_is_the_same_for_any_number_of_threads_and_any_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from pyengine_convert import writer

    monkeypatch.setattr(writer, "_PIECE", 2048)  # many pieces even of small tensors
    source = DATA / "models" / "stories260K-llama-256d"
    found = set()
    for i, threads in enumerate((1, 1, 2, 5)):
        convert(source, tmp_path / f"{i}.gguf", "q8_0", threads=threads)
        found.add((tmp_path / f"{i}.gguf").read_bytes())
    assert len(found) == 1


def test_a_tokenizer_json_of_sentencepiece_kind_gives_the_same_ids_as_the_model(tmp_path: Path) -> None:
    from pyengine.tokenizer import Tokenizer

    folder = copy_writable("stories260K-llama", tmp_path / "m")
    convert(folder, tmp_path / "model.gguf", "f16")
    (folder / "tokenizer.model").unlink()
    convert(folder, tmp_path / "json.gguf", "f16")
    ours, theirs = Readback(tmp_path / "json.gguf").metadata, Readback(tmp_path / "model.gguf").metadata
    for key in theirs:
        if key != "tokenizer.ggml.scores":
            assert ours[key] == theirs[key], key
    with open(DATA / "text" / "tinystories.txt", encoding="utf-8") as file:
        text = file.read(20000)
    one, other = Tokenizer.from_gguf(tmp_path / "model.gguf"), Tokenizer.from_gguf(tmp_path / "json.gguf")
    assert one.encode(text) == other.encode(text)


def test_sentencepiece_models_read_as_the_sentencepiece_package_reads_them() -> None:
    import sentencepiece

    from pyengine_convert.sentencepiece_model import read_sentencepiece

    path = DATA / "models" / "stories260K-llama" / "tokenizer.model"
    oracle = sentencepiece.SentencePieceProcessor(model_file=str(path))
    model = read_sentencepiece(path)
    assert len(model.pieces) == oracle.get_piece_size()
    for i, (text, score, kind) in enumerate(model.pieces):
        assert (text, score) == (oracle.id_to_piece(i), oracle.get_score(i))
        assert (kind == 2, kind == 3, kind == 6) == (oracle.is_unknown(i), oracle.is_control(i), oracle.is_byte(i))


def test_the_safetensors_header_reads_as_the_safetensors_package_reads_it() -> None:
    from pyengine_convert.checkpoint import open_checkpoint

    folder = DATA / "models" / "stories260K-qwen2-256d"
    tensors = open_checkpoint(folder)
    with safe_open(folder / "model.safetensors", "numpy") as oracle:
        assert set(tensors) == set(oracle.keys())
        for name, tensor in tensors.items():
            values = oracle.get_tensor(name)
            assert tensor.shape == values.shape
            assert np.array_equal(tensor.read_rows(0, tensor.rows).reshape(values.shape), values)
