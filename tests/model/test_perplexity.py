"""Perplexity, divergence and saved logits against plain numpy from whole rows of logits."""

from __future__ import annotations

import dataclasses
import io
import math
import struct
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from gguf import GGMLQuantizationType as Type
from numpy.typing import NDArray

from pyengine import FormatError, InvalidArgument, Model, saved_logits
from pyengine.files import check_target, replacing
from pyengine.perplexity import Scores, joined, report, score
from pyengine.saved_logits import LogitsWriter, SavedLogits, vocabulary_hash
from pyengine.windows import Ids, RowBuffer, scored_rows, text_windows
from tests.reference.configs import BY_NAME
from tests.reference.decoder import decode
from tests.reference.gguf_writer import write_gguf
from tests.reference.weights import make_weights

CONFIG = BY_NAME["llama-gqa2"]
CONTEXT = 75  # odd, and not a multiple of anything
TEXT = "".join(chr(ord("!") + (7 * i * i + 3 * i) % 90) for i in range(400))


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One model in float and with its matrices in Q8_0."""
    folder = tmp_path_factory.mktemp("models")
    weights = make_weights(CONFIG)
    for name, types in (("f32", {}), ("q8_0", {"blk.*.weight": Type.Q8_0})):
        write_gguf(folder / name, CONFIG, weights, types)
    return {name: folder / name for name in ("f32", "q8_0")}


@pytest.fixture(scope="module")
def windows(files: dict[str, Path]) -> Ids:
    with Model.open(files["f32"]) as model:
        return text_windows(model.tokenizer, TEXT, CONTEXT)


@pytest.fixture
def saved(files: dict[str, Path], windows: Ids, tmp_path: Path) -> Path:
    """The float model's logits."""
    path = tmp_path / "base"
    scores(files["f32"], windows, save=path)
    return path


def scores(path: Path, windows: Ids, *, base: Path | None = None, save: Path | None = None) -> list[Scores]:
    with Model.open(path) as model, model.session(n_ctx=windows.shape[1], kv_type="f32") as session:
        if base is not None:
            with SavedLogits(base) as logits:
                return list(score(session, windows, base=logits))
        if save is not None:
            with replacing(save) as file:
                writer = LogitsWriter(file, model.n_vocab, windows, vocabulary(model))
                return list(score(session, windows, save=writer))
        return list(score(session, windows))


def vocabulary(model: Model) -> bytes:
    return vocabulary_hash(model.metadata["tokenizer.ggml.tokens"])


def log_softmax(logits: NDArray[np.floating]) -> NDArray[np.float64]:
    x = logits.astype(np.float64)
    x -= x.max(axis=-1, keepdims=True)
    return x - np.log(np.exp(x).sum(axis=-1, keepdims=True))


def plain(path: Path, windows: Ids) -> Iterator[NDArray[np.float64]]:
    """Log probabilities [n_ctx, n_vocab] of each window, from one evaluation of it all."""
    with Model.open(path) as model, model.session(n_ctx=windows.shape[1], kv_type="f32") as session:
        for ids in windows:
            session.truncate(0)
            yield log_softmax(session.eval(ids, all_logits=True))


def second_half(log_p: NDArray[np.float64], ids: Ids) -> NDArray[np.float64]:
    """-log p of the tokens n_ctx // 2 + 1 .. n_ctx - 1 of a window."""
    return np.array([-log_p[i, ids[i + 1]] for i in range(len(ids) // 2, len(ids) - 1)])


# ---- windows ----


def test_windows_are_the_text_in_order_and_begin_with_bos_where_the_file_asks_for_it(files: dict[str, Path]) -> None:
    with Model.open(files["f32"]) as model:
        tokenizer = model.tokenizer
    ids = tokenizer.encode(TEXT, add_special=False)
    count = len(ids) // CONTEXT
    got = text_windows(tokenizer, TEXT, CONTEXT)
    assert got.tolist() == [ids[i * CONTEXT : (i + 1) * CONTEXT] for i in range(count)]
    assert text_windows(tokenizer, TEXT, CONTEXT, 2).tolist() == got[:2].tolist()
    tokenizer.add_bos, tokenizer.bos_id = True, 5
    shifted = [5, *ids]
    expected = [[5, *shifted[i * CONTEXT + 1 : (i + 1) * CONTEXT]] for i in range(len(shifted) // CONTEXT)]
    assert text_windows(tokenizer, TEXT, CONTEXT).tolist() == expected
    with pytest.raises(InvalidArgument, match=f"has {len(shifted)} tokens; expected at least 1000"):
        text_windows(tokenizer, TEXT, 1000)


# ---- perplexity ----


def test_perplexity_is_that_of_the_plain_decoder(files: dict[str, Path], windows: Ids) -> None:
    weights = make_weights(CONFIG)
    nll = [second_half(log_softmax(decode(CONFIG, weights, ids.tolist())), ids) for ids in windows]
    got = report(scores(files["f32"], windows))
    flat = np.concatenate(nll)
    assert got.windows == len(windows) > 3
    assert got.positions == len(flat) == len(windows) * scored_rows(CONTEXT)
    assert got.perplexity.value == pytest.approx(math.exp(flat.mean()), rel=1e-5)
    error = math.sqrt((np.square(flat).mean() - flat.mean() ** 2) / (len(flat) - 1))  # llama.cpp's formula
    assert got.perplexity.error == pytest.approx(error * math.exp(flat.mean()), rel=1e-5)
    means = np.array([part.mean() for part in nll])
    between = math.exp(flat.mean()) * means.std(ddof=1) / math.sqrt(len(means))
    assert got.between_windows == pytest.approx(between, rel=1e-4)


def test_likelihoods_are_those_of_all_logits_at_once(files: dict[str, Path], windows: Ids) -> None:
    for path in files.values():
        expected = [second_half(log_p, ids) for log_p, ids in zip(plain(path, windows), windows, strict=True)]
        for got, nll in zip(scores(path, windows), expected, strict=True):
            np.testing.assert_allclose(got.nll, nll, rtol=0, atol=1e-6)


def test_logits_of_a_window_are_never_held_all_at_once(
    files: dict[str, Path], windows: Ids, monkeypatch: pytest.MonkeyPatch
) -> None:
    for n_vocab in (100, 32000, 152064, 1 << 20):
        rows = RowBuffer(n_vocab).rows
        assert rows == 16 or rows * n_vocab * 4 <= 64 << 20
    expected = joined(scores(files["f32"], windows)).nll
    monkeypatch.setattr("pyengine.perplexity.RowBuffer", lambda n_vocab: RowBuffer(n_vocab, limit=0))
    assert RowBuffer(CONFIG.vocab_size, limit=0).rows < scored_rows(CONTEXT) / 2
    assert joined(scores(files["f32"], windows)).nll.tobytes() == expected.tobytes()


# ---- divergence ----


def test_divergence_is_that_of_the_full_distributions(files: dict[str, Path], windows: Ids, saved: Path) -> None:
    got = report(scores(files["q8_0"], windows, base=saved)).divergence
    assert got is not None
    kld, same, nll, base_nll = [], [], [], []
    for p, q, ids in zip(plain(files["f32"], windows), plain(files["q8_0"], windows), windows, strict=True):
        rows = slice(CONTEXT // 2, CONTEXT - 1)
        kld.append((np.exp(p) * (p - q)).sum(axis=1)[rows])
        same.append((p.argmax(axis=1) == q.argmax(axis=1))[rows])
        nll.append(second_half(q, ids))
        base_nll.append(second_half(p, ids))
    k, s, n, b = map(np.concatenate, (kld, same, nll, base_nll))
    exact = 3e-6  # what 16 bits lose
    assert k.mean() > 100 * exact
    assert got.mean.value == pytest.approx(k.mean(), abs=exact)
    assert got.mean.error == pytest.approx(k.std(ddof=1) / math.sqrt(len(k)), rel=0.01)
    assert [got.median, got.p90, got.p99, got.p999, got.maximum] == pytest.approx(
        [np.quantile(k, q) for q in (0.5, 0.9, 0.99, 0.999, 1.0)], abs=30 * exact
    )
    assert got.same_top.value == pytest.approx(s.mean(), abs=1 / len(s))
    assert got.base.value == pytest.approx(math.exp(b.mean()), rel=1e-6)
    assert got.ratio.value == pytest.approx(math.exp(n.mean() - b.mean()), rel=1e-6)
    assert got.ratio.error == pytest.approx(got.ratio.value * (n - b).std(ddof=1) / math.sqrt(len(n)), rel=1e-3)


def test_a_model_does_not_differ_from_itself(files: dict[str, Path], windows: Ids, saved: Path) -> None:
    got = report(scores(files["f32"], windows, base=saved)).divergence
    assert got is not None
    assert got.ratio == dataclasses.replace(got.ratio, value=1.0, error=0.0)
    assert 0 <= got.mean.value <= got.maximum < 1e-6
    assert got.same_top.value == 1.0


# ---- the file ----


def test_a_saved_file_has_the_documented_layout(files: dict[str, Path], windows: Ids, saved: Path) -> None:
    """Read back with nothing but struct and the text of the module."""
    data = io.BytesIO(saved.read_bytes())
    magic, version, n_vocab, n_ctx, n_windows, digest = struct.unpack("<8s4I32s", data.read(56))
    with Model.open(files["f32"]) as model:
        assert (magic, version, n_vocab, digest) == (b"PELOGITS", 1, model.n_vocab, vocabulary(model))
    assert (n_windows, n_ctx) == windows.shape
    assert data.read(4 * windows.size) == windows.astype("<i4").tobytes()
    for log_p, ids in zip(plain(files["f32"], windows), windows, strict=True):
        for at in range(n_ctx // 2, n_ctx - 1):
            (nll,) = struct.unpack("<d", data.read(8))
            assert nll == pytest.approx(-log_p[at, ids[at + 1]], abs=1e-6)
            offsets = np.frombuffer(data.read(2 * n_vocab), dtype="<f2").astype(np.float64)
            assert offsets.max() == 0
            np.testing.assert_allclose(offsets, log_p[at] - log_p[at].max(), rtol=2**-11, atol=1e-6)
    assert data.read() == b""
    assert saved.stat().st_size == saved_logits.file_size(n_vocab, windows)


def test_a_cut_or_longer_or_foreign_file_is_refused(saved: Path, tmp_path: Path) -> None:
    whole = saved.read_bytes()
    bad = tmp_path / "bad"
    for size in (0, 1, 8, 9, 55, 56, 57, 200, len(whole) // 2, len(whole) - 1):
        bad.write_bytes(whole[:size])
        with pytest.raises(FormatError, match=r"cut|header alone needs|begins with") as caught:
            SavedLogits(bad)
        assert str(bad) in str(caught.value)
    for data, code, words in (
        (whole + b"\0", "cut_file", f"too long: it has {len(whole) + 1} bytes, .* take {len(whole)}"),
        (b"_logits_" + whole[8:], "foreign_file", "begins with b'_logits_'; expected b'PELOGITS'"),
        (b"GGUF" + whole[4:], "foreign_file", "begins with"),
        (whole[:8] + struct.pack("<I", 2) + whole[12:], "bad_version", "version 2; this program reads version 1"),
        (whole[:12] + struct.pack("<I", 0) + whole[16:], "bad_header", "a vocabulary of 0"),
        (whole[:12] + struct.pack("<3I", *[2**32 - 1] * 3) + whole[24:], "cut_file", "is cut"),
        (whole[:56] + struct.pack("<i", -1) + whole[60:], "bad_header", "token id outside"),
    ):
        bad.write_bytes(data)
        with pytest.raises(FormatError, match=words) as caught:
            SavedLogits(bad)
        assert caught.value.code == code


@pytest.mark.parametrize("damage", [b"\x00\x7e", b"\x00\x3c"], ids=["nan", "above_the_largest"])
def test_damaged_logits_are_refused_not_averaged(
    files: dict[str, Path], windows: Ids, saved: Path, damage: bytes
) -> None:
    data = bytearray(saved.read_bytes())
    data[-2:] = damage
    saved.write_bytes(data)
    with pytest.raises(FormatError, match=f"damaged: in window {len(windows) - 1}"):
        scores(files["q8_0"], windows, base=saved)


def test_logits_of_another_vocabulary_or_text_are_refused(saved: Path, files: dict[str, Path], windows: Ids) -> None:
    with Model.open(files["f32"]) as model:
        known = vocabulary(model)
    with SavedLogits(saved) as base:
        base.check(CONFIG.vocab_size, known, windows)
        base.check(CONFIG.vocab_size, known, windows[:1])
        other = windows.copy()
        other[1, 7] += 1
        for vocab, digest, ids, words in (
            (CONFIG.vocab_size + 1, known, windows, f"vocabulary of {CONFIG.vocab_size} tokens; the model has"),
            (CONFIG.vocab_size, bytes(32), windows, "as many tokens as the model's, but not the same"),
            (CONFIG.vocab_size, known, other, f"another text: token 7 of window 1 is {windows[1, 7]} in the file and"),
            (CONFIG.vocab_size, known, windows[:, :-1], f"windows of {CONTEXT} tokens; {CONTEXT - 1} were asked"),
            (CONFIG.vocab_size, known, np.concatenate([windows, windows]), f"holds logits of {len(windows)} windows"),
        ):
            with pytest.raises(InvalidArgument, match=words) as caught:
                base.check(vocab, digest, ids)
            assert caught.value.code == "other_logits"


# ---- whole or not at all ----


def _half(path: Path) -> None:
    with replacing(path) as file:
        file.write(b"half")
        assert not path.exists()
        raise RuntimeError("halfway")


def test_a_file_appears_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "out"
    with pytest.raises(RuntimeError, match="halfway"):
        _half(path)
    assert list(tmp_path.iterdir()) == []
    path.write_bytes(b"old")
    with replacing(path) as file:
        file.write(b"new")
        assert path.read_bytes() == b"old"
    assert path.read_bytes() == b"new"
    assert list(tmp_path.iterdir()) == [path]
    for target, words in (
        (path, "exists already; --force"),
        (tmp_path, "is a directory"),
        (path / "x", "no directory"),
    ):
        with pytest.raises(OSError, match=words):
            check_target(target, force=False)
    with pytest.raises(OSError, match=r"GB free; the file needs 1000000000\.00 GB"):
        check_target(path, force=True, size=10**18)
