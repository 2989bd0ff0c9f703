"""A GGUF file as the source: its metadata and meaning stay, its tensors get other types; importance; several files."""

from __future__ import annotations

import hashlib
import re
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from gguf import GGUFReader, GGUFWriter

from pyengine.errors import FileError, FormatError, UnsupportedError
from pyengine.model import Model
from pyengine_convert.cli import main
from pyengine_convert.convert import Options, convert
from pyengine_convert.recipe import RECIPES
from tests.convert.readback import Readback
from tests.support import DATA, needs_data

pytestmark = needs_data

FOLDER = DATA / "models" / "stories260K-llama-256d"
F16 = DATA / "gguf" / "stories260K-llama-256d-F16.gguf"
Floats = npt.NDArray[np.float32]


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_gguf_file_and_its_checkpoint_give_the_same_tensors(tmp_path: Path, recipe: str) -> None:
    """For every recipe: F32 GGUF -> recipe equals checkpoint -> recipe, byte for byte, and the engine opens it."""
    convert(FOLDER, tmp_path / "full.gguf", "f32")
    convert(tmp_path / "full.gguf", tmp_path / "a.gguf", recipe, threads=2)
    convert(FOLDER, tmp_path / "b.gguf", recipe, threads=1)
    ours, direct = Readback(tmp_path / "a.gguf"), Readback(tmp_path / "b.gguf")
    assert ours.bytes == direct.bytes
    assert ours.types == direct.types
    assert ours.metadata["general.file_type"] == RECIPES[recipe].file_type
    assert ours.metadata.keys() == direct.metadata.keys()


def raw_keys(path: Path) -> dict[str, tuple[Any, list[Any]]]:
    """Keys with their types and bytes, as the format's package reads them."""
    return {
        name: (field.types, [part.tobytes() for part in field.parts])
        for name, field in GGUFReader(path).fields.items()
        if not name.startswith("GGUF.")
    }


def test_metadata_is_carried_over_with_its_types(tmp_path: Path) -> None:
    convert(F16, tmp_path / "m.gguf", "q5_k_s")
    before, after = raw_keys(F16), raw_keys(tmp_path / "m.gguf")
    changed = {"general.file_type", "general.quantization_version"}
    assert {k: v for k, v in after.items() if k not in changed} == {k: v for k, v in before.items() if k not in changed}
    assert Readback(tmp_path / "m.gguf").metadata["general.file_type"] == 16
    convert(F16, tmp_path / "n.gguf", "q8_0", options=Options(name="another"))
    assert Readback(tmp_path / "n.gguf").metadata["general.name"] == "another"


def test_a_tensor_that_keeps_its_type_is_copied(tmp_path: Path) -> None:
    source = DATA / "gguf" / "stories260K-llama-256d-Q4_K_M.gguf"
    convert(source, tmp_path / "m.gguf", "q4_k_m")  # nothing to round: needs no --allow-requantize
    assert Readback(tmp_path / "m.gguf").bytes == Readback(source).bytes


def test_what_is_quantised_already_is_rounded_again_only_when_asked(tmp_path: Path) -> None:
    source = DATA / "gguf" / "stories260K-llama-256d-Q4_0.gguf"
    with pytest.raises(UnsupportedError, match=r"is Q4_0.*--allow-requantize"):
        convert(source, tmp_path / "m.gguf", "q5_k_m")
    assert list(tmp_path.iterdir()) == []
    convert(source, tmp_path / "m.gguf", "q8_0", options=Options(allow_requantize=True))
    convert(DATA / "gguf" / "stories260K-llama-256d-Q8_0.gguf", tmp_path / "n.gguf", "q4_k_s")


def test_the_losses_reported_are_those_the_format_package_sees(tmp_path: Path) -> None:
    report = convert(F16, tmp_path / "m.gguf", "q4_k_m", threads=2)
    exact, packed = Readback(F16), Readback(tmp_path / "m.gguf")
    worst = {}
    for name, values in exact.values.items():
        difference = packed.values[name].astype(np.float64) - values
        rmse = float(np.sqrt(np.mean(difference**2)))
        assert report.losses[name].rmse == pytest.approx(rmse, rel=1e-4), name
        worst[name] = rmse / float(np.sqrt(np.mean(values.astype(np.float64) ** 2)))
    assert report.worst is not None
    assert report.worst.name == max(worst, key=worst.__getitem__)
    assert report.losses[report.worst.name].relative == pytest.approx(max(worst.values()), rel=1e-4)
    assert report.size == (tmp_path / "m.gguf").stat().st_size


def test_the_command_prints_a_table_and_a_summary(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "m.gguf"
    assert main([str(F16), "-o", str(out), "--type", "Q4_K_M", "--table", "--tensor-type", "ffn_up=q6_k",
                 "--output-type", "q8_0", "--token-embedding-type", "q5_k"]) == 0  # fmt: skip
    lines = capsys.readouterr().err.splitlines()
    assert re.split(r"\s+", lines[0]) == ["tensor", "shape", "from", "to", "RMSE", "of", "RMS", "bytes"]
    kinds = {line.split()[0]: re.search(r" F(?:16|32) +(\w+)", line) for line in lines[1:-1]}
    assert {name: m[1] for name, m in kinds.items() if m} == Readback(out).types
    assert Readback(out).types["blk.3.ffn_up.weight"] == "Q6_K"
    assert (Readback(out).types["output.weight"], Readback(out).types["token_embd.weight"]) == ("Q8_0", "Q5_K")
    assert re.search(r"MB, 2\.23 M weights, \d\.\d\d bits each, [\d.]+ s, largest loss \d\.\d\d% in blk\.", lines[-1])


def test_wrong_arguments_are_refused_before_anything_is_read(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for extra in (["--type", "q7"], ["--tensor-type", "a=q7"], ["--tensor-type", "(=q8_0"], ["--output-type", "x"]):
        assert main([str(F16), "-o", str(tmp_path / "m.gguf"), *extra]) == 2
        assert "error: " in capsys.readouterr().err
    for extra in (["--split-size", "2X"], ["--split-size", "0"], ["--tensor-type", "q8_0"]):
        with pytest.raises(SystemExit) as error:
            main([str(F16), "-o", str(tmp_path / "m.gguf"), *extra])
        assert error.value.code == 2
    assert list(tmp_path.iterdir()) == []


def test_a_file_is_never_written_over_its_source(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    path.write_bytes(F16.read_bytes())
    with pytest.raises(FileError, match="is the source"):
        convert(path, path, "q8_0", force=True)
    assert path.read_bytes() == F16.read_bytes()


# --- importance matrices ----------------------------------------------------------------------------------------------


def imatrix(path: Path, tensors: dict[str, Floats], counts: float = 7.0, kind: str = "imatrix") -> Path:
    """As llama.cpp writes them, with the format's own package."""
    writer = GGUFWriter(path, "llama")
    writer.add_string("general.type", kind)
    writer.add_array("imatrix.datasets", ["text"])
    writer.add_uint32("imatrix.chunk_count", 1)
    writer.add_uint32("imatrix.chunk_size", 512)
    for name, mean in tensors.items():
        writer.add_tensor(f"{name}.in_sum2", (mean * counts).reshape(1, -1).astype(np.float32))
        writer.add_tensor(f"{name}.counts", np.array([[counts]], np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def importance_for(source: Readback) -> dict[str, Floats]:
    rng = np.random.default_rng(4)
    matrices = [n for n, shape in source.shapes.items() if len(shape) == 2 and n.startswith("blk")]
    return {n: np.exp(1.5 * rng.standard_normal(source.shapes[n][1])).astype(np.float32) for n in matrices}


@pytest.mark.parametrize("recipe", ["q2_k", "q3_k_m", "q4_0", "q4_k_m", "q5_k_s", "iq4_xs"])
@pytest.mark.parametrize("source", [F16, FOLDER], ids=["gguf", "folder"])
def test_an_importance_matrix_lowers_the_error_where_it_counts(tmp_path: Path, recipe: str, source: Path) -> None:
    exact = Readback(F16)
    importance = importance_for(exact)
    path = imatrix(tmp_path / "i.gguf", importance)
    report = convert(source, tmp_path / "with.gguf", recipe, options=Options(imatrix=path))
    convert(source, tmp_path / "without.gguf", recipe)
    with_it, without = Readback(tmp_path / "with.gguf"), Readback(tmp_path / "without.gguf")
    compared = 0
    for name, weights in importance.items():
        if with_it.types[name] != without.types[name]:
            continue  # a few recipes choose other types (test_recipes.py)
        error = [float((weights * (f.values[name] - exact.values[name]) ** 2).sum()) for f in (with_it, without)]
        assert error[0] < 0.97 * error[1], name
        compared += 1
    assert compared >= 25
    assert with_it.metadata["quantize.imatrix.file"] == "i.gguf"
    assert with_it.metadata["quantize.imatrix.entries_count"] == len(importance)
    assert [note for note in report.notes if re.search(r"no importance, e\.g\. (output|token_embd)\.weight", note)]


def test_matrices_without_counts_weigh_all_columns_alike(tmp_path: Path) -> None:
    importance = importance_for(Readback(F16))
    path = imatrix(tmp_path / "i.gguf", {n: np.full_like(w, 3) for n, w in importance.items()})
    convert(F16, tmp_path / "with.gguf", "q4_k_m", options=Options(imatrix=path))
    convert(F16, tmp_path / "without.gguf", "q4_k_m")
    assert Readback(tmp_path / "with.gguf").bytes == Readback(tmp_path / "without.gguf").bytes


def test_a_file_that_is_no_fitting_importance_matrix_is_refused(tmp_path: Path) -> None:
    one = {"blk.0.ffn_up.weight": np.ones(256, np.float32)}
    for words, path in {
        "general.type": imatrix(tmp_path / "1.gguf", one, kind="model"),
        "128 columns": imatrix(tmp_path / "2.gguf", {"blk.0.ffn_up.weight": np.ones(128, np.float32)}),
        "negative": imatrix(tmp_path / "3.gguf", {"blk.0.ffn_up.weight": -np.ones(256, np.float32)}),
        "none with counts": imatrix(tmp_path / "4.gguf", one, counts=0.0),
    }.items():
        with pytest.raises(FormatError, match=words):
            convert(F16, tmp_path / "m.gguf", "q4_k_m", options=Options(imatrix=path))
    assert not (tmp_path / "m.gguf").exists()


# --- several files ----------------------------------------------------------------------------------------------------


def test_a_split_model_is_the_whole_one_in_parts(tmp_path: Path) -> None:
    whole = convert(F16, tmp_path / "whole.gguf", "q4_k_m")
    report = convert(F16, tmp_path / "m.gguf", "q4_k_m", split=300_000, threads=2)
    names = [path.name for path in report.paths]
    count = len(names)
    assert count == 5
    assert names == [f"m-{i + 1:05}-of-{count:05}.gguf" for i in range(count)]
    assert sorted(p.name for p in tmp_path.iterdir()) == [*names, "whole.gguf"]
    parts = [Readback(path) for path in report.paths]
    expected = Readback(whole.path)
    assert {n: b for part in parts for n, b in part.bytes.items()} == expected.bytes
    for i, part in enumerate(parts):
        assert sum(map(len, part.bytes.values())) <= 300_000
        assert part.metadata["split.no"] == i
        assert (part.metadata["split.count"], part.metadata["split.tensors.count"]) == (count, len(expected.bytes))
        assert part.metadata["general.architecture"] == "llama"
    assert {k: v for k, v in parts[0].metadata.items() if not k.startswith("split.")} == expected.metadata
    with Model.open(report.path) as one, Model.open(whole.path) as other:
        tokens = [1, 403, 407, 261]
        with one.session(n_ctx=16) as a, other.session(n_ctx=16) as b:
            assert np.array_equal(a.eval(tokens), b.eval(tokens))


def test_a_split_model_is_a_source_too_and_what_fits_is_not_split(tmp_path: Path) -> None:
    split = convert(F16, tmp_path / "m.gguf", "f16", split=1_000_000)
    assert len(split.paths) > 2
    convert(split.path, tmp_path / "a.gguf", "q4_k_m", split=10**9)
    convert(F16, tmp_path / "b.gguf", "q4_k_m")
    assert Readback(tmp_path / "a.gguf").bytes == Readback(tmp_path / "b.gguf").bytes
    assert Readback(tmp_path / "a.gguf").metadata == Readback(tmp_path / "b.gguf").metadata
    with pytest.raises(FileError, match="exists already"):
        convert(F16, tmp_path / "m.gguf", "f16", split=1_000_000)


# --- inspect ----------------------------------------------------------------------------------------------------------


def test_inspect_prints_what_a_file_holds(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = DATA / "gguf" / "stories260K-qwen3-256d-Q4_K_M.gguf"
    assert main(["inspect", str(path)]) == 0
    printed = capsys.readouterr().out
    file = Readback(path)
    for key in file.metadata:
        assert f"\n{key} = " in printed
    for name, kind in file.types.items():
        assert re.search(rf"^{re.escape(name)} .* {kind} +{len(file.bytes[name])}$", printed, re.M), name
    for kind in set(file.types.values()):
        members = [n for n, k in file.types.items() if k == kind]
        size = sum(len(file.bytes[n]) for n in members)
        assert re.search(rf"^{kind} +{len(members)} tensors +\d+ weights +{size} bytes", printed, re.M)


def test_inspect_prints_hostile_text_safely_and_the_hash_of_the_template(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    template = "{{ 'x' }}\x1b[31m"
    writer = GGUFWriter(tmp_path / "m.gguf", "llama")
    writer.add_string("general.name", "\x1b]0;owned\x07 \u202egnp")
    writer.add_string("tokenizer.chat_template", template)
    writer.add_string("long", "y" * 1000)
    writer.add_tensor("name", np.zeros((2, 4), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    assert main(["inspect", str(tmp_path / "m.gguf")]) == 0
    printed = capsys.readouterr().out
    assert all(c.isprintable() or c == "\n" for c in printed)
    assert f"sha256 {hashlib.sha256(template.encode()).hexdigest()}" in printed
    assert "(1000 characters)" in printed
    assert "y" * 200 not in printed


def test_inspect_of_something_else_is_one_message(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "x").write_bytes(b"no gguf at all, but long enough to be looked at")
    for path in (tmp_path / "x", tmp_path / "absent"):
        assert main(["inspect", str(path)]) == 1
        printed = capsys.readouterr()
        assert printed.out == ""
        assert printed.err.startswith("pyengine-convert: error: ")
        assert len(printed.err.splitlines()) == 1
