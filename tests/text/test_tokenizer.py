"""Every published id, no difference from the original tokenizers, lossless streaming, markers only on request."""

from __future__ import annotations

import os
import random
import time
import unicodedata

import numpy as np
import pytest
import tokenizers

from pyengine.errors import FormatError, InvalidArgument, UnsupportedError
from pyengine.tokenizer import PRE_TOKENIZERS, Tokenizer
from tests.support import DATA, needs_data
from tests.text.vocabularies import (
    CONTROL,
    HF_TOKENIZERS,
    USER_DEFINED,
    VOCABULARIES,
    from_hf,
    hf_tokenizer,
    metadata_of,
    random_text,
    small_metadata,
    vocabulary,
    vocabulary_path,
)

TRIALS = int(os.environ.get("PYENGINE_TEXT_TRIALS", "1000"))  # random strings for each vocabulary
STORIES = DATA / "models" / "stories260K-llama"


def published_vectors(name: str) -> list[tuple[str, list[int]]]:
    path = vocabulary_path(name)
    with open(f"{path}.inp", encoding="utf-8", newline="") as file:
        texts = file.read().split("\n__ggml_vocab_test__\n")
    with open(f"{path}.out", encoding="utf-8") as file:
        ids = [[int(i) for i in line.split()] for line in file.read().split("\n")]
    return list(zip(texts, ids[: len(texts)], strict=True))


@needs_data
@pytest.mark.parametrize("name", VOCABULARIES)
def test_every_published_id_is_reproduced(name: str) -> None:
    vectors = published_vectors(name)
    assert len(vectors) >= 46
    tokenizer = vocabulary(name)
    for text, ids in vectors:
        assert tokenizer.encode(text, add_special=False) == ids, text
        assert tokenizer.decode(ids) == text


@needs_data
@pytest.mark.parametrize("name", HF_TOKENIZERS)
def test_no_difference_from_the_original_tokenizer(name: str) -> None:
    rng = random.Random(name)
    ours, theirs = from_hf(name), hf_tokenizer(name)
    assert ours.n_vocab == theirs.get_vocab_size()
    for _ in range(TRIALS):
        text = unicodedata.normalize("NFC", random_text(rng, 30))  # the file says NFC; GGUF vocabularies do without
        assert ours.encode(text, add_special=False) == theirs.encode(text, add_special_tokens=False).ids, repr(text)
        assert ours.decode(ours.encode(text, add_special=False)) == text


@needs_data
@pytest.mark.parametrize("name", HF_TOKENIZERS)
def test_markers_are_found_where_the_original_finds_them(name: str) -> None:
    rng = random.Random(name)
    ours, theirs = from_hf(name), hf_tokenizer(name)
    markers = [*ours.special_strings, "<think", "|im_end|>", "<", ">"]
    for _ in range(TRIALS // 4):
        parts = [rng.choice(markers) if rng.random() < 0.4 else random_text(rng, 4) for _ in range(12)]
        text = unicodedata.normalize("NFC", "".join(parts))
        ids = ours.encode(text, add_special=False, parse_special=True)
        assert ids == theirs.encode(text, add_special_tokens=False).ids, repr(text)


@needs_data
def test_sentencepiece_agrees_with_sentencepiece_and_with_the_original() -> None:
    sentencepiece = pytest.importorskip("sentencepiece")
    processor = sentencepiece.SentencePieceProcessor(model_file=str(STORIES / "tokenizer.model"))
    original = tokenizers.Tokenizer.from_file(str(STORIES / "tokenizer.json"))
    ours = Tokenizer.from_gguf(DATA / "gguf" / "stories260K-llama-F32.gguf")
    rng = random.Random(1)
    stories = (DATA / "text" / "tinystories.txt").read_text(encoding="utf-8")
    compared = 0
    for trial in range(TRIALS):
        start = rng.randrange(len(stories) - 300)
        text = stories[start : start + rng.randrange(300)] if trial % 2 else random_text(rng, 30)
        ids = ours.encode(text, add_special=False)
        assert ids == original.encode(text, add_special_tokens=False).ids, repr(text)
        assert ours.decode(ids) == text
        # This SentencePiece model squeezes spaces, which its Hugging Face and GGUF forms do not.
        if text == text.strip(" ") and "  " not in text:
            compared += 1
            assert ids == processor.encode(text), repr(text)
    assert compared > TRIALS // 4


@needs_data
@pytest.mark.parametrize("name", VOCABULARIES)
def test_any_text_survives_the_round_trip(name: str) -> None:
    rng = random.Random(2)
    tokenizer = vocabulary(name)
    for _ in range(TRIALS // 8):
        text = random_text(rng, 30)
        assert tokenizer.decode(tokenizer.encode(text, add_special=False)) == text


def streamed(tokenizer: Tokenizer, ids: list[int], **options: bool) -> list[str]:
    stream = tokenizer.stream(**options)
    return [*map(stream.feed, ids), stream.flush()]


@needs_data
@pytest.mark.parametrize("name", VOCABULARIES)
def test_streamed_pieces_join_to_the_decoded_text_for_any_ids(name: str) -> None:
    rng = random.Random(3)
    tokenizer = vocabulary(name)
    low = 300 if tokenizer.model == "llama" else 512  # among these are all byte tokens
    for trial in range(200):
        limit = low if trial % 2 else tokenizer.n_vocab
        ids = [rng.randrange(limit) for _ in range(rng.randrange(40))]
        for options in ({"start": True}, {"start": False}, {"start": True, "skip_special": True}):
            assert "".join(streamed(tokenizer, ids, **options)) == tokenizer.decode(ids, **options)


@needs_data
@pytest.mark.parametrize("name", VOCABULARIES)
def test_streaming_never_splits_a_character(name: str) -> None:
    text = "héllo 👩\u200d👩\u200d👧\u200d👦 🏳️\u200d🌈 中文 𐐷 \U0010fffd"
    tokenizer = vocabulary(name)
    pieces = streamed(tokenizer, tokenizer.encode(text, add_special=False), start=True)
    assert "".join(pieces) == text
    assert not any("\ufffd" in piece for piece in pieces)


@needs_data
def test_an_unfinished_character_is_replaced_at_the_end() -> None:
    tokenizer = vocabulary("gpt-2")
    ids = tokenizer.encode("𐐷", add_special=False)
    assert len(ids) > 1
    assert tokenizer.decode(ids[:-1]) == "\ufffd" == "".join(streamed(tokenizer, ids[:-1]))


@needs_data
def test_only_the_start_of_a_text_loses_the_space_that_sentencepiece_added() -> None:
    tokenizer = vocabulary("llama-spm")
    ids = tokenizer.encode("Hello")
    assert ids[0] == tokenizer.bos_id == 1
    assert tokenizer.decode(ids, skip_special=True) == "Hello"
    assert tokenizer.decode(ids[1:], start=False) == " Hello" == "".join(streamed(tokenizer, ids[1:]))


@needs_data
@pytest.mark.parametrize("name", [*VOCABULARIES, *HF_TOKENIZERS])
def test_text_becomes_a_marker_only_when_asked(name: str) -> None:
    tokenizer = from_hf(name) if name in HF_TOKENIZERS else vocabulary(name)
    assert tokenizer.special_strings
    markers = set(tokenizer.special_strings.values())
    for text, token in tokenizer.special_strings.items():
        for sample in (text, f"a {text} b", text + text, f"<{text}>"):
            ids = tokenizer.encode(sample, add_special=False)
            assert not markers & set(ids), sample
            assert tokenizer.decode(ids) == sample
        assert tokenizer.encode(text, add_special=False, parse_special=True) == [token]
        assert tokenizer.token_id(text) == token


@needs_data
def test_specials_of_the_files() -> None:
    llama, qwen, r1 = vocabulary("llama-bpe"), vocabulary("qwen2"), from_hf("r1-distill-qwen")
    assert (llama.bos_id, llama.eos_id, llama.add_bos) == (
        128000,
        128001,
        True,
    )  # the file does not say; the family does
    assert llama.eog_ids == {128001, 128009}  # <|eot_id|> is found by its name
    assert (qwen.add_bos, qwen.eog_ids) == (False, {151643, 151645})
    assert r1.encode("Hi")[0] == 151646
    assert r1.is_control(151644)
    assert not r1.is_control(151648)  # <｜User｜>, <think>
    assert r1.token_bytes(151648) == b"<think>"
    assert r1.decode([151646, *r1.encode("x", add_special=False)], skip_special=True) == "x"


def test_merging_cannot_build_a_control_token() -> None:
    """The merges of a hostile file lead to a control token; a whole word equals another one."""
    markers = (("ab", CONTROL),)
    metadata = small_metadata(markers)
    metadata["tokenizer.ggml.tokens"] = [*metadata["tokenizer.ggml.tokens"][:256], "ab"]
    metadata["tokenizer.ggml.token_type"] = np.array([1] * 256 + [CONTROL], np.int32)
    with pytest.raises(FormatError, match="merges"):
        Tokenizer.from_metadata(metadata)
    tokenizer = Tokenizer.from_metadata(small_metadata((("word", CONTROL),), pre="llama-bpe", merges=[]))
    assert tokenizer.decode(tokenizer.encode("word")) == "word"
    assert len(tokenizer.encode("word")) == 4
    assert tokenizer.encode("word", parse_special=True) == [257]


def test_longest_marker_wins_and_plain_user_tokens_are_text() -> None:
    tokenizer = Tokenizer.from_metadata(
        small_metadata((("<a>", CONTROL), ("<a><b>", CONTROL), ("zzz", USER_DEFINED), ("<t>", USER_DEFINED)))
    )
    parse = lambda text: tokenizer.encode(text, parse_special=True)  # noqa: E731
    assert parse("<a><b>") == [258]
    assert parse("<a><a>zzz<t>") == [257, 257, 259, 260]
    assert tokenizer.encode("zzz") == [259]
    assert 260 not in tokenizer.encode("<t>")
    assert tokenizer.decode(parse("<a>x<t>"), skip_special=True) == "x<t>"


@pytest.mark.parametrize("pre", PRE_TOKENIZERS)
def test_every_known_pre_tokenizer_builds_and_is_lossless(pre: str) -> None:
    tokenizer = Tokenizer.from_metadata(small_metadata(pre=pre))
    rng = random.Random(pre)
    for _ in range(50):
        text = random_text(rng, 20)
        assert tokenizer.decode(tokenizer.encode(text, add_special=False)) == text
    assert tokenizer.decode([tokenizer.encode("ab", add_special=False)[0]]) == "ab"


def test_an_unknown_pre_tokenizer_is_named_and_can_be_overridden() -> None:
    with pytest.raises(UnsupportedError, match=r"'newest'.*llama-bpe.*qwen2") as caught:
        Tokenizer.from_metadata(small_metadata(pre="newest"))
    assert caught.value.code == "unknown_pretokenizer"
    assert Tokenizer.from_metadata(small_metadata(pre="newest"), override="qwen2").pre == "qwen2"
    with pytest.raises(UnsupportedError, match="names no pre-tokenizer"):
        Tokenizer.from_metadata(small_metadata(pre=None))


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        ({"model": None}, FormatError, "model is missing"),
        ({"model": "bert"}, UnsupportedError, "'bert' is not supported"),
        ({"model": 3}, FormatError, "wrong type"),
        ({"tokens": None}, FormatError, "tokens is missing"),
        ({"tokens": "abc"}, FormatError, "tokens"),
        ({"tokens": np.arange(3)}, FormatError, "no array of texts"),
        ({"tokens": ["a", "b", "a"], "token_type": None}, FormatError, "'a' appears twice, as 0 and 2"),
        ({"token_type": np.ones(3, np.int32)}, FormatError, "3 entries for 257"),
        ({"token_type": np.full(257, 9, np.int32)}, FormatError, "unknown type 9"),
        ({"token_type": np.full(257, 6, np.int32)}, FormatError, "typed as a byte"),
        ({"merges": None}, FormatError, "merges is missing"),
        ({"merges": ["a nothere"]}, FormatError, "do not fit"),
        ({"merges": ["ab"]}, FormatError, "do not fit"),
        ({"merges": [f"a {'b' * 100}"]}, FormatError, "make no token"),
        ({"bos_token_id": 257}, FormatError, "is 257, outside"),
        ({"eos_token_id": -1}, FormatError, "is -1, outside"),
        ({"eot_token_id": True}, FormatError, "wrong type"),
        ({"add_bos_token": True}, FormatError, "bos_token_id is missing"),
        ({"model": "llama"}, FormatError, "scores is missing"),
        ({"model": "llama", "scores": np.zeros(4, np.float32)}, FormatError, "4 entries"),
        ({"model": "llama", "scores": np.full(257, np.nan, np.float32)}, FormatError, "not finite"),
    ],
)
def test_a_malformed_vocabulary_is_an_error_that_names_the_key(
    changes: dict[str, object], error: type[Exception], words: str
) -> None:
    with pytest.raises(error, match=words):
        Tokenizer.from_metadata(small_metadata(**changes))


def test_text_that_is_not_unicode_and_ids_that_do_not_exist_are_clear_errors() -> None:
    tokenizer = Tokenizer.from_metadata(small_metadata())
    with pytest.raises(InvalidArgument, match=r"surrogate U\+DCFF at character 2"):
        tokenizer.encode(b"ok\xff".decode("utf-8", "surrogateescape"))
    for token in (-1, 257):
        for call in (tokenizer.token_bytes, tokenizer.piece, tokenizer.is_control, lambda t: tokenizer.decode([t])):
            with pytest.raises(InvalidArgument, match="outside the vocabulary of 257"):
                call(token)


def test_empty_text_has_no_ids() -> None:
    assert Tokenizer.from_metadata(small_metadata()).encode("") == []
    assert Tokenizer.from_metadata(small_metadata()).decode([]) == ""


def test_a_dropped_tokenizer_leaves_no_memory_behind() -> None:
    words = " ".join(
        f"{i}abcdefgh" for i in range(20_000)
    )  # 5 MB in the library's cache of words, which it never frees

    def resident() -> int:
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGESIZE")

    if not os.path.exists("/proc/self/statm"):
        pytest.skip("needs /proc")
    for _ in range(2):
        Tokenizer.from_metadata(small_metadata()).encode(words)
    before = resident()
    for _ in range(6):
        Tokenizer.from_metadata(small_metadata()).encode(words)
    assert resident() - before < 15e6


@needs_data
@pytest.mark.as_built
@pytest.mark.parametrize("name", ["llama-bpe", "qwen2"])
def test_a_large_vocabulary_is_ready_within_a_second(name: str) -> None:
    metadata = metadata_of(vocabulary_path(name))
    best = min(_cpu_seconds(lambda: Tokenizer.from_metadata(metadata)) for _ in range(2))
    assert best < 1.0


@needs_data
@pytest.mark.parametrize("name", ["llama-bpe", "llama-spm", "deepseek-llm"])
@pytest.mark.parametrize("unit", ["a", " ", "\n", "中", "<"])
def test_long_runs_take_linear_time(name: str, unit: str) -> None:
    """Four times the text may take at most nine times the time; quadratic would be sixteen."""
    tokenizer = vocabulary(name)
    small, large = (unit * (n // len(unit)) + "a" for n in (1 << 15, 1 << 17))
    tokenizer.encode(small)
    quick = min(_cpu_seconds(lambda: tokenizer.encode(small)) for _ in range(3))
    assert min(_cpu_seconds(lambda: tokenizer.encode(large)) for _ in range(2)) < 9 * quick + 0.05


def _cpu_seconds(work: object) -> float:
    start = time.process_time()
    work()  # type: ignore[operator]
    return time.process_time() - start
