"""Tokenizer files -> metadata: published vocabularies, recognition of pre-tokenizers, token types, special ids."""

from __future__ import annotations

import base64
import gzip
import json
import struct
from pathlib import Path
from typing import Any

import pytest

from pyengine.errors import EngineError, FileError, FormatError, UnsupportedError
from pyengine.gguf_file import GgufFile
from pyengine.tokenizer import Tokenizer
from pyengine_convert.keyvalues import KeyValues
from pyengine_convert.pretokenizer import recognise
from pyengine_convert.sentencepiece_model import read_sentencepiece
from pyengine_convert.source import Config
from pyengine_convert.vocabulary import Vocabulary, read_vocabulary
from tests.convert.checkpoints import bpe_tokenizer, copy_writable, write_json
from tests.support import DATA, needs_data

pytestmark = needs_data

LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
DIGITS = {"type": "Digits", "individual_digits": True}


def split(pattern: str, **changes: Any) -> dict[str, Any]:
    return {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False, **changes}


def sequence(*steps: dict[str, Any]) -> dict[str, Any]:
    return {"type": "Sequence", "pretokenizers": list(steps)}


def folder_with(path: Path, tokenizer: Any, settings: Any = None, generation: Any = None) -> Path:
    path.mkdir()
    write_json(path / "tokenizer.json", tokenizer)
    if settings is not None:
        write_json(path / "tokenizer_config.json", settings)
    if generation is not None:
        write_json(path / "generation_config.json", generation)
    return path


def read(folder: Path, rows: int, **config: Any) -> Vocabulary:
    return read_vocabulary(folder, Config(config, "config.json"), rows)


def published(name: str) -> dict[str, Any]:
    """Through our reader (tests/gguf compares it with the format's package, which takes ten seconds for these)."""
    with GgufFile.open(DATA / "vocab" / f"ggml-vocab-{name}.gguf") as file:
        return {key: v.tolist() if hasattr(v, "tolist") else v for key, v in file.metadata.items()}


def gunzipped(name: str) -> dict[str, Any]:
    with gzip.open(DATA / "tokenizers" / f"{name}.tokenizer.json.gz") as file:
        value = json.load(file)
    assert isinstance(value, dict)
    return value


@pytest.mark.parametrize(("name", "pre"), [("qwen3", "qwen2"), ("r1-distill-qwen", "deepseek-r1-qwen")])
def test_published_qwen_tokenizers_give_the_published_vocabulary(tmp_path: Path, name: str, pre: str) -> None:
    tokenizer = gunzipped(name)
    vocabulary = read(folder_with(tmp_path / "m", tokenizer), 151936)
    expected = published("qwen2")
    trained = len(tokenizer["model"]["vocab"])
    assert vocabulary.tokens[:trained] == expected["tokenizer.ggml.tokens"][:trained]
    assert vocabulary.merges == expected["tokenizer.ggml.merges"]
    assert (vocabulary.model, vocabulary.pre) == ("gpt2", pre)
    added = {entry["id"]: entry for entry in tokenizer["added_tokens"]}
    for i in range(trained, 151936):
        if i in added:
            assert vocabulary.tokens[i] == added[i]["content"]
            marker = added[i]["special"] or added[i]["content"][:2] in ("<|", "<｜")
            assert vocabulary.types[i] == (3 if marker else 4), added[i]
        else:
            assert (vocabulary.tokens[i], vocabulary.types[i]) == (f"[PAD{i}]", 5)
    assert vocabulary.types[:trained] == [1] * trained
    assert vocabulary.types[vocabulary.tokens.index("<think>")] == 4  # visible, not control


def test_the_bos_of_r1_distill_qwen_is_the_one_its_tokenizer_adds(tmp_path: Path) -> None:
    """Its config.json says 151643, which is the EOS."""
    settings = json.loads((DATA / "configs" / "DeepSeek-R1-Distill.tokenizer_config.json").read_text())
    generation = json.loads((DATA / "configs" / "DeepSeek-R1-Distill-Qwen.generation_config.json").read_text())
    folder = folder_with(tmp_path / "m", gunzipped("r1-distill-qwen"), settings, generation)
    vocabulary = read(folder, 152064, bos_token_id=151643, eos_token_id=151643)
    assert vocabulary.ids == {"bos": 151646, "eos": 151643, "padding": 151643}
    assert (vocabulary.add_bos, vocabulary.add_eos) == (True, False)
    assert vocabulary.templates == {"default": settings["chat_template"]}
    assert len(vocabulary.tokens) == 152064


@pytest.mark.parametrize(
    ("name", "steps"),
    [
        ("llama-bpe", sequence(split(LLAMA3), BYTE_LEVEL)),
        ("gpt-2", {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}),
    ],
)
def test_a_tokenizer_json_rebuilt_from_a_published_vocabulary_gives_it_back(
    tmp_path: Path, name: str, steps: dict[str, Any]
) -> None:
    expected = published(name)
    tokens, merges = expected["tokenizer.ggml.tokens"], expected["tokenizer.ggml.merges"]
    types = expected["tokenizer.ggml.token_type"]
    model = {"type": "BPE", "ignore_merges": name == "llama-bpe", "merges": merges}
    model["vocab"] = {t: i for i, t in enumerate(tokens) if types[i] == 1}
    added = [{"id": i, "content": t, "special": True} for i, t in enumerate(tokens) if types[i] == 3]
    folder = folder_with(tmp_path / "m", {"model": model, "added_tokens": added, "pre_tokenizer": steps})
    vocabulary = read(folder, len(tokens), eos_token_id=expected["tokenizer.ggml.eos_token_id"])
    keys = KeyValues()
    vocabulary.write(keys)
    for key in ("model", "pre", "tokens", "token_type", "merges", "eos_token_id"):
        assert keys[f"tokenizer.ggml.{key}"] == expected[f"tokenizer.ggml.{key}"], key


def test_deepseek_llm_is_recognised_and_its_ids_are_the_published_ones(tmp_path: Path) -> None:
    """Through the published vocabulary, with digits isolated singly as its own tokenizer.json does."""
    from pyengine.tokenizer import families

    expected = published("deepseek-llm")
    patterns = families()["deepseek-llm"][0]
    steps = sequence(*map(split, patterns[:-1]), DIGITS, BYTE_LEVEL)
    assert recognise({"pre_tokenizer": steps, "model": {}}, True) == "deepseek-llm"
    assert expected["tokenizer.ggml.pre"] == "deepseek-llm"
    digits = [t for t in expected["tokenizer.ggml.tokens"] if len(t) > 1 and t.isdecimal()]
    assert digits == []  # why single digits and runs of digits are the same here


@pytest.mark.parametrize(
    ("expected", "ignore_merges", "steps"),
    [
        ("llama-bpe", True, sequence(split(LLAMA3), BYTE_LEVEL)),
        ("smaug-bpe", False, sequence(split(LLAMA3), BYTE_LEVEL)),
        ("starcoder", False, sequence(DIGITS, {**BYTE_LEVEL, "use_regex": True})),
        ("gpt-2", False, {**BYTE_LEVEL, "use_regex": True}),
        (
            "deepseek-coder",
            False,
            sequence(
                split(r"[\r\n]"),
                split(r"\s?\p{L}+"),
                split(r"\s?\p{P}+"),
                split("[一-龥ࠀ-一가-퟿]+"),
                DIGITS,
                BYTE_LEVEL,
            ),
        ),
        (None, False, sequence(split(LLAMA3 + "|x"), BYTE_LEVEL)),
        (None, False, sequence(split(LLAMA3, behavior="Removed"), BYTE_LEVEL)),
        (None, False, sequence(split(LLAMA3, invert=True), BYTE_LEVEL)),
        (None, False, sequence(split(LLAMA3))),
        (None, False, {**BYTE_LEVEL, "use_regex": True, "add_prefix_space": True}),
        (None, False, {**BYTE_LEVEL}),
        (None, False, {"type": "Whitespace"}),
        (None, False, None),
    ],
)
def test_pre_tokenizers_are_recognised_by_what_they_do(expected: str | None, ignore_merges: bool, steps: Any) -> None:
    tokenizer = {"pre_tokenizer": steps, "model": {"ignore_merges": ignore_merges}}
    if expected is not None:
        assert recognise(tokenizer, False) == expected
        return
    with pytest.raises(UnsupportedError) as error:
        recognise(tokenizer, False)
    assert "--pre NAME" in str(error.value)
    assert json.dumps(steps, ensure_ascii=False) in str(error.value)  # shows what was found


def test_other_normalisers_are_refused() -> None:
    with pytest.raises(UnsupportedError, match="Lowercase"):
        recognise(
            {"pre_tokenizer": sequence(split(LLAMA3), BYTE_LEVEL), "normalizer": {"type": "Lowercase"}, "model": {}},
            False,
        )


def test_an_unknown_pre_tokenizer_can_be_named(tmp_path: Path) -> None:
    tokenizer = bpe_tokenizer() | {"pre_tokenizer": sequence(split("x+"), BYTE_LEVEL)}
    folder = folder_with(tmp_path / "m", tokenizer)
    with pytest.raises(UnsupportedError, match=r'"x\+"'):
        read(folder, 300)
    assert read_vocabulary(folder, Config({}, "config.json"), 300, pre="qwen2").pre == "qwen2"


def test_merges_written_as_pairs_and_as_text_give_the_same_working_tokenizer(tmp_path: Path) -> None:
    pairs = bpe_tokenizer()
    joined = bpe_tokenizer()
    joined["model"]["merges"] = [" ".join(pair) for pair in pairs["model"]["merges"]]
    one, other = read(folder_with(tmp_path / "1", pairs), 300), read(folder_with(tmp_path / "2", joined), 300)
    assert one == other
    keys = KeyValues()
    one.write(keys)
    tokenizer = Tokenizer.from_metadata({key: value.value for key, value in keys.items()})
    ids = tokenizer.encode("abc hid", add_special=False)
    assert [one.tokens[i] for i in ids] == ["abc", "Ġ", "hid"]


def test_several_ends_of_generation_fill_eos_eot_and_eom(tmp_path: Path) -> None:
    tokenizer = bpe_tokenizer()
    tokenizer["added_tokens"] += [
        {"id": 266, "content": "<|eom_id|>", "special": True},
        {"id": 267, "content": "<|eot_id|>", "special": True},
        {"id": 268, "content": "<|more|>", "special": True},
    ]
    folder = folder_with(tmp_path / "m", tokenizer, {"eos_token": "<|end|>"}, {"eos_token_id": [266, 267, 264, 268]})
    vocabulary = read(folder, 300, eos_token_id=264)
    assert {k: vocabulary.tokens[i] for k, i in vocabulary.ids.items()} == {
        "eos": "<|end|>", "eot": "<|eot_id|>", "eom": "<|more|>",
    } or vocabulary.ids["eom"] == 266  # fmt: skip
    assert vocabulary.ids["eot"] == 267
    assert len(vocabulary.notes) == 1


@pytest.mark.parametrize(
    ("processor", "bos", "eos"),
    [
        (None, False, False),
        ([{"SpecialToken": {"id": "<|end|>"}}, {"Sequence": {"id": "A"}}], True, False),
        ([{"Sequence": {"id": "A"}}, {"SpecialToken": {"id": "<|end|>"}}], False, True),
        ([{"Sequence": {"id": "A"}}], False, False),
    ],
)
def test_add_bos_and_add_eos_follow_the_post_processor(tmp_path: Path, processor: Any, bos: bool, eos: bool) -> None:
    tokenizer = bpe_tokenizer()
    if processor is not None:
        table = {"<|end|>": {"id": "<|end|>", "ids": [264], "tokens": ["<|end|>"]}}
        template = {"type": "TemplateProcessing", "single": processor, "special_tokens": table}
        tokenizer["post_processor"] = {"type": "Sequence", "processors": [{"type": "ByteLevel"}, template]}
    vocabulary = read(folder_with(tmp_path / "m", tokenizer), 300, eos_token_id=264)
    assert (vocabulary.add_bos, vocabulary.add_eos) == (bos, eos)
    assert vocabulary.ids.get("bos") == (264 if bos else None)


def test_chat_templates_come_from_where_transformers_takes_them(tmp_path: Path) -> None:
    several = [{"name": "default", "template": "A"}, {"name": "tool use", "template": "B"}]
    folder = folder_with(tmp_path / "m", bpe_tokenizer(), {"chat_template": several})
    vocabulary = read(folder, 300)
    keys = KeyValues()
    vocabulary.write(keys)
    assert keys["tokenizer.chat_template"] == "A"
    assert keys["tokenizer.chat_template.tool_use"] == "B"
    assert keys["tokenizer.chat_templates"] == ["tool_use"]
    (folder / "chat_template.jinja").write_text("{{ 'é' }}", encoding="utf-8")
    assert read(folder, 300).templates == {"default": "{{ 'é' }}"}


def test_tokens_added_to_a_sentencepiece_model_follow_its_own(tmp_path: Path) -> None:
    folder = copy_writable("stories260K-llama", tmp_path / "m")
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    settings["added_tokens_decoder"] |= {
        "512": {"content": "<|user|>", "special": True},
        "513": {"content": "<think>", "special": False},
    }
    write_json(folder / "tokenizer_config.json", settings)
    vocabulary = read(folder, 516)
    assert vocabulary.tokens[512:] == ["<|user|>", "<think>", "[PAD514]", "[PAD515]"]
    assert vocabulary.types[512:] == [3, 4, 5, 5]
    assert vocabulary.types[:4] == [2, 3, 3, 6]
    assert vocabulary.scores[:3] == [0.0, 0.0, 0.0]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda t: t["added_tokens"].append({"id": 400, "content": "<x>"}), ["400", "'<x>'", "300 rows"]),
        (lambda t: t["model"].update(merges=[["a", "b", "c"]]), ["merge", "two tokens"]),
        (lambda t: t["model"].update(vocab={"a": 0, "b": 0}), ["share an id"]),
        (lambda t: t["model"].update(vocab=[1]), ["model.vocab"]),
        (lambda t: t.update(model=3), ["no model"]),
        (lambda t: t["added_tokens"].append({"id": "x"}), ["added token"]),
        (lambda t: t.update(pre_tokenizer=None) or t["model"].update(type="Unigram"), ["Unigram", "BPE"]),
        (lambda t: t.update(added_tokens=5), ["tokenizer.json", "int"]),
        (lambda t: t["model"].update(merges=5), ["tokenizer.json", "int"]),
        (lambda t: t.update(post_processor={"type": "Sequence", "processors": ["x"]}), ["tokenizer.json", "str"]),
        (
            lambda t: t.update(post_processor={"type": "TemplateProcessing", "single": [{"SpecialToken": {}}]}),
            ["tokenizer.json", "KeyError"],
        ),
    ],
)
def test_damaged_tokenizers_are_refused_by_name(tmp_path: Path, change: Any, words: list[str]) -> None:
    tokenizer = bpe_tokenizer()
    change(tokenizer)
    with pytest.raises((FormatError, UnsupportedError)) as error:
        read(folder_with(tmp_path / "m", tokenizer), 300)
    for word in words:
        assert word in str(error.value)


def test_sentencepiece_with_other_steps_is_refused(tmp_path: Path) -> None:
    tokenizer = json.loads((DATA / "models" / "stories260K-llama" / "tokenizer.json").read_text())
    assert read(folder_with(tmp_path / "good", tokenizer), 512).add_space_prefix
    tokenizer["normalizer"] = {"type": "Sequence", "normalizers": [{"type": "Lowercase"}, tokenizer["normalizer"]]}
    with pytest.raises(UnsupportedError, match="Lowercase"):
        read(folder_with(tmp_path / "bad", tokenizer), 512)


def test_a_folder_without_a_tokenizer_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FileError, match=r"neither tokenizer\.json nor tokenizer\.model"):
        read(tmp_path, 300)


def test_a_special_id_outside_the_vocabulary_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FormatError, match="the eos id is 999"):
        read(folder_with(tmp_path / "m", bpe_tokenizer()), 300, eos_token_id=999)


def test_every_cut_or_changed_sentencepiece_model_is_an_error_or_a_model(tmp_path: Path) -> None:
    data = (DATA / "models" / "stories260K-llama" / "tokenizer.model").read_bytes()
    path = tmp_path / "tokenizer.model"
    refused = 0
    for cut in range(0, len(data), 23):
        for changed in (data[:cut], data[:cut] + b"\xff" + data[cut + 1 :]):
            path.write_bytes(changed)
            try:
                read_sentencepiece(path)
            except EngineError:
                refused += 1
    assert refused > 300


def test_other_kinds_of_tokenizer_model_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.model"
    path.write_bytes(b"".join(base64.b64encode(bytes([i])) + b" %d\n" % i for i in range(256)))  # tiktoken's
    with pytest.raises(FormatError, match="no SentencePiece model"):
        read_sentencepiece(path)
    piece = b"\x0a\x01a\x15" + struct.pack("<f", -1.0)
    path.write_bytes(b"\x0a" + bytes([len(piece)]) + piece + b"\x12\x02\x18\x01")
    with pytest.raises(UnsupportedError, match="unigram"):
        read_sentencepiece(path)
