"""Importance matrices: what they hold, the file as the format's own package sees it, merging, damaged files."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np
import pytest

import pyengine
from pyengine import FormatError, InvalidArgument, Model, NumericError
from pyengine.imatrix import Entry, ImportanceMatrix, collect
from pyengine.windows import text_windows
from tests.reference.configs import BY_NAME
from tests.reference.gguf_writer import write_gguf
from tests.reference.weights import make_weights

TEXT = "Tom has 48 apples and buys 27 more. How many apples does he have now? " * 8


def collected(windows: np.ndarray, *, output: bool = False, threads: int = 2) -> ImportanceMatrix:
    matrix = ImportanceMatrix(windows.shape[1], ["text"])
    with (
        Model.open(pyengine.demo_model_path()) as model,
        model.session(n_ctx=windows.shape[1], threads=threads) as session,
    ):
        for entries in collect(session, windows, output=output):
            for name, entry in entries.items():
                matrix.add(name, entry)
    return matrix


@pytest.fixture(scope="module")
def windows() -> np.ndarray:
    with Model.open(pyengine.demo_model_path()) as model:
        return text_windows(model.tokenizer, TEXT, 32)


def test_every_matrix_gets_the_sums_of_all_windows(windows: np.ndarray) -> None:
    matrix = collected(windows)
    with Model.open(pyengine.demo_model_path()) as model, model.session(n_ctx=32) as session:
        names = {name for name, t in model.file.tensors.items() if len(t.dims) == 2 and name.startswith("blk.")}
        total: dict[str, np.ndarray] = {}
        for ids in windows:
            session.truncate(0)
            session.observe()
            session.prefill(ids)
            for name, sums in session.inputs.items():
                total[name] = total.get(name, 0) + sums.squares
    assert set(matrix.entries) == names
    for name, entry in matrix.entries.items():
        assert entry.counts.tolist() == [windows.size]
        assert entry.squares.shape == (1, model.file.tensors[name].cols)
        assert (entry.squares[0] == total[name]).all()
    assert matrix.chunk_count == len(windows) > 3
    head = set(collected(windows[:1], output=True).entries) - names
    assert head == {"output.weight" if "output.weight" in model.file.tensors else "token_embd.weight"}


def test_the_file_is_what_the_formats_own_package_reads(windows: np.ndarray, tmp_path: Path) -> None:
    """general.type, the three keys, and a pair of F32 tensors for each matrix: the form of llama.cpp."""
    matrix = collected(windows)
    path = tmp_path / "m.gguf"
    matrix.write(path)
    reader = gguf.GGUFReader(path)
    keys = {name: field.contents() for name, field in reader.fields.items() if not name.startswith("GGUF.")}
    assert keys == {
        "general.type": "imatrix",
        "imatrix.datasets": ["text"],
        "imatrix.chunk_count": len(windows),
        "imatrix.chunk_size": 32,
    }
    assert reader.fields["imatrix.chunk_count"].types == [gguf.GGUFValueType.UINT32]
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    assert set(tensors) == {name + end for name in matrix.entries for end in (".in_sum2", ".counts")}
    for name, entry in matrix.entries.items():
        sums, counts = tensors[name + ".in_sum2"], tensors[name + ".counts"]
        assert sums.tensor_type == counts.tensor_type == gguf.GGMLQuantizationType.F32
        assert (sums.shape.tolist(), counts.shape.tolist()) == ([entry.squares.shape[1], 1], [1, 1])
        assert sums.data.tobytes() == entry.squares.astype("<f4").tobytes()
        assert counts.data.tolist() == [[windows.size]]


def test_the_bytes_do_not_depend_on_threads_and_are_read_back(windows: np.ndarray, tmp_path: Path) -> None:
    for threads in (1, 3):
        collected(windows, threads=threads).write(tmp_path / str(threads))
    assert (tmp_path / "1").read_bytes() == (tmp_path / "3").read_bytes()
    again = ImportanceMatrix.read(tmp_path / "1")
    again.write(tmp_path / "again")
    assert (tmp_path / "again").read_bytes() == (tmp_path / "1").read_bytes()
    assert (again.chunk_size, again.datasets) == (32, ["text"])


def test_merging_parts_gives_the_whole(windows: np.ndarray, tmp_path: Path) -> None:
    parts = []
    for i, part in enumerate((windows[:2], windows[2:])):
        collected(part).write(tmp_path / str(i))
        parts.append(ImportanceMatrix.read(tmp_path / str(i)))
    whole, merged = collected(windows), ImportanceMatrix(32)
    for part in parts:
        merged.merge(part)
    assert merged.datasets == ["text", "text"]
    assert merged.chunk_count == whole.chunk_count
    assert set(merged.entries) == set(whole.entries)
    for name, entry in whole.entries.items():
        np.testing.assert_allclose(merged.entries[name].squares, entry.squares, rtol=1e-6)  # the files hold F32
        assert merged.entries[name].counts == entry.counts


def test_matrices_of_experts_keep_their_rows(tmp_path: Path) -> None:
    matrix = ImportanceMatrix(8, ["a"])
    matrix.add("blk.0.ffn_up_exps.weight", Entry(np.arange(12.0).reshape(3, 4), np.array([1.0, 0.0, 7.0])))
    matrix.write(tmp_path / "m")
    entry = ImportanceMatrix.read(tmp_path / "m").entries["blk.0.ffn_up_exps.weight"]
    assert (entry.squares.tolist(), entry.counts.tolist()) == (np.arange(12.0).reshape(3, 4).tolist(), [1, 0, 7])


def test_matrices_of_different_models_are_not_merged() -> None:
    matrix = ImportanceMatrix(8)
    matrix.add("w", Entry(np.zeros((1, 4)), np.ones(1)))
    with pytest.raises(InvalidArgument, match="w has 5 columns here and 4 columns before"):
        matrix.add("w", Entry(np.zeros((1, 5)), np.ones(1)))


def test_an_overflowing_activation_is_named_not_saved(tmp_path: Path) -> None:
    config = BY_NAME["llama-one_layer"]
    weights = make_weights(config)
    weights["model.layers.0.mlp.up_proj.weight"] *= np.float32(1e30)
    weights["model.layers.0.mlp.gate_proj.weight"] *= np.float32(1e30)
    write_gguf(tmp_path / "m", config, weights)
    ids = np.array([config.prompt], dtype=np.int32)
    words = r"the input of blk\.0\.ffn_down\.weight contains NaN or infinity"
    with Model.open(tmp_path / "m") as model, model.session() as session, pytest.raises(NumericError, match=words):
        list(collect(session, ids))


# ---- damaged files ----


def written(path: Path, keys: dict[str, object], tensors: dict[str, np.ndarray]) -> Path:
    writer = gguf.GGUFWriter(path, "x")
    for key, value in keys.items():
        if isinstance(value, str):
            writer.add_string(key, value)
        elif isinstance(value, list):
            writer.add_array(key, value)
        else:
            writer.add_uint32(key, value)  # type: ignore[arg-type]
    for name, values in tensors.items():
        writer.add_tensor(name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


KEYS: dict[str, object] = {"general.type": "imatrix", "imatrix.chunk_size": 8, "imatrix.datasets": ["a"]}
SUMS, COUNTS = np.ones((1, 4), np.float32), np.ones((1, 1), np.float32)
PAIR = {"w.in_sum2": SUMS, "w.counts": COUNTS}


@pytest.mark.parametrize(
    ("keys", "tensors", "words"),
    [
        (KEYS | {"general.type": "model"}, PAIR, "general.type 'model'; expected 'imatrix'"),
        (KEYS | {"imatrix.chunk_size": 0}, PAIR, "imatrix.chunk_size 0; expected a whole number above 0"),
        (KEYS | {"imatrix.chunk_size": "8"}, PAIR, "imatrix.chunk_size '8'"),
        (KEYS | {"imatrix.datasets": "a"}, PAIR, "imatrix.datasets 'a'; expected strings"),
        (KEYS, {"w.in_sum2": SUMS}, r"no tensor w\.counts, which w needs"),
        (KEYS, {"w.counts": COUNTS}, r"no tensor w\.in_sum2, which w needs"),
        (KEYS, {"w.in_sum2": SUMS.astype(np.float16), "w.counts": COUNTS}, r"w\.in_sum2 is F16; expected F32"),
        (KEYS, {"w.in_sum2": np.ones((2, 4), np.float32), "w.counts": COUNTS}, "2 rows of sums and 1 counts"),
        (KEYS, {"w.in_sum2": -SUMS, "w.counts": COUNTS}, "negative or no finite number"),
        (KEYS, {"w.in_sum2": SUMS * np.float32(np.nan), "w.counts": COUNTS}, "negative or no finite number"),
        (KEYS, {"w": SUMS}, r"no tensor ends in \.in_sum2"),
    ],
)
def test_a_file_that_is_no_importance_matrix_is_refused(
    keys: dict[str, object], tensors: dict[str, np.ndarray], words: str, tmp_path: Path
) -> None:
    path = written(tmp_path / "m", keys, tensors)
    with pytest.raises(FormatError, match=words) as caught:
        ImportanceMatrix.read(path)
    assert str(path) in str(caught.value)


def test_the_undamaged_file_of_those_tests_is_read(tmp_path: Path) -> None:
    assert set(ImportanceMatrix.read(written(tmp_path / "m", KEYS, PAIR)).entries) == {"w"}


def test_an_old_binary_matrix_is_recognised(tmp_path: Path) -> None:
    (tmp_path / "old.dat").write_bytes(b"\x24\0\0\0\x13\0\0\0blk.0.attn_q.weight")
    with pytest.raises(FormatError, match=r"is no GGUF file: .* \(\.dat\) is rewritten by llama\.cpp"):
        ImportanceMatrix.read(tmp_path / "old.dat")
