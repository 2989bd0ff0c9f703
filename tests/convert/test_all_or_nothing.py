"""Whatever happens, a file under the final name is complete; otherwise there is none, and no temporary one either."""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

import pyengine
import pyengine_convert
from pyengine.errors import EngineError, FileError, FormatError, NumericError, UnsupportedError
from pyengine_convert import writer
from pyengine_convert.checkpoint import SourceTensor, open_checkpoint
from pyengine_convert.cli import main
from pyengine_convert.convert import convert, make_plan
from tests.convert.checkpoints import config, save, weights, write_json
from tests.support import DATA, needs_data

pytestmark = needs_data


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.fixture
def out(tmp_path: Path) -> Path:
    (tmp_path / "out").mkdir()
    return tmp_path / "out" / "m.gguf"


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return save(tmp_path / "m", config())


@pytest.mark.parametrize(
    "error", [RuntimeError("injected"), KeyboardInterrupt(), OSError(28, "No space left on device")]
)
@pytest.mark.parametrize("after", [0, 1, 10])
def test_a_failure_while_writing_leaves_nothing(source: Path, out: Path, error: BaseException, after: int) -> None:
    calls = 0

    def fail(_size: int) -> None:
        nonlocal calls
        calls += 1
        if calls > after:
            raise error

    with pytest.raises((type(error), FileError)):
        convert(source, out, "q8_0", threads=2, progress=fail)
    assert calls == after + 1
    assert names(out.parent) == []


def test_a_failure_while_reading_leaves_nothing(source: Path, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read = SourceTensor.read

    def fail(self: SourceTensor, start: int, count: int) -> Any:
        if self.name.startswith("model.layers.1."):
            raise FormatError("injected")
        return read(self, start, count)

    monkeypatch.setattr(SourceTensor, "read", fail)
    with pytest.raises(FormatError, match="injected"):
        convert(source, out, "q8_0", threads=3)
    assert names(out.parent) == []


def test_a_file_that_does_not_read_back_as_meant_is_not_published(
    source: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every tensor's bytes are looked at: one flipped bit anywhere in the first pieces is noticed."""
    plan = make_plan(source, "q8_0")
    check = writer.verify
    for tensor in (plan.tensors[0], plan.tensors[7], plan.tensors[-1]):

        def damage(path: Path, keys: Any, tensors: Any, checks: Any, name: str = tensor.name) -> None:
            from pyengine.gguf_file import GgufFile

            with GgufFile.open(path, "header") as file:
                at = file.tensors[name].offset + 3
            data = bytearray(path.read_bytes())
            data[at] ^= 1
            path.write_bytes(data)
            check(path, keys, tensors, checks)

        with monkeypatch.context() as patch:
            patch.setattr(writer, "verify", damage)
            with pytest.raises(EngineError, match="after writing"):
                convert(source, out, "q8_0")
        assert names(out.parent) == []


def test_an_existing_file_stays_unless_force_is_given_and_then_until_the_end(source: Path, out: Path) -> None:
    out.write_bytes(b"precious")
    with pytest.raises(FileError, match="--force"):
        convert(source, out, "q8_0")
    assert out.read_bytes() == b"precious"

    def fail(_size: int) -> None:
        assert out.read_bytes() == b"precious"
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert(source, out, "q8_0", force=True, progress=fail)
    assert (names(out.parent), out.read_bytes()) == (["m.gguf"], b"precious")
    convert(source, out, "q8_0", force=True)
    assert out.read_bytes()[:4] == b"GGUF"
    assert names(out.parent) == ["m.gguf"]


def test_two_conversions_to_one_name_do_not_meet(source: Path, out: Path) -> None:
    seen = []

    def second(_size: int) -> None:
        if not seen:
            with pytest.raises(FileError, match="another conversion") as error:
                convert(source, out, "f16")
            seen.append(error.value.code)

    convert(source, out, "q8_0", progress=second)
    assert seen == ["busy"]
    assert names(out.parent) == ["m.gguf"]


CHILD = """
import sys
from pathlib import Path
from pyengine_convert.convert import convert
def slow(size):
    print("wrote", size, flush=True)
    sys.stdin.readline()
convert(Path(sys.argv[1]), Path(sys.argv[2]), "q8_0", progress=slow)
"""


@contextmanager
def child(code: str, *arguments: object, **options: Any) -> Iterator[subprocess.Popen[str]]:
    """A Python process that finds the same packages as this one; ended with the block."""
    command = [sys.executable, "-P", "-c", code, *map(str, arguments)]
    places = [str(Path(str(package.__file__)).parents[1]) for package in (pyengine, pyengine_convert)]
    pipe = subprocess.PIPE
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(places)}
    with subprocess.Popen(
        command, stdin=pipe, stdout=pipe, stderr=pipe, text=True, env=environment, **options
    ) as process:
        try:
            yield process
        finally:
            process.kill()


@pytest.mark.parametrize("after", [1, 4])
def test_a_killed_conversion_publishes_nothing_and_the_next_one_succeeds(source: Path, out: Path, after: int) -> None:
    with child(CHILD, source, out) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        for _ in range(after):
            assert process.stdout.readline().startswith("wrote")
            process.stdin.write("\n")
            process.stdin.flush()
        assert process.stdout.readline().startswith("wrote")
    assert process.returncode == -signal.SIGKILL
    assert names(out.parent) == [".m.gguf.journal", ".m.gguf.part"]  # nobody was left to remove it
    convert(source, out, "q8_0")
    assert names(out.parent) == ["m.gguf"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_and_a_termination_clean_up_and_say_so(source: Path, out: Path, number: signal.Signals) -> None:
    code = CHILD.replace('convert(Path(sys.argv[1]), Path(sys.argv[2]), "q8_0", progress=slow)', "") + (
        "from pyengine_convert import cli\n"
        "cli._Progress.advance = lambda self, size: slow(size)\n"
        "sys.exit(cli.main([sys.argv[1], '-o', sys.argv[2]]))\n"
    )
    with child(code, source, out) as process:
        assert process.stdout is not None
        assert process.stdout.readline().startswith("wrote")
        time.sleep(0.05)  # into the read of stdin
        process.send_signal(number)
        _, messages = process.communicate(timeout=30)
    assert process.returncode == 130
    assert messages == "pyengine-convert: interrupted: nothing was written\n"
    assert names(out.parent) == []


def test_a_full_disk_is_a_message_and_leaves_nothing(source: Path, out: Path) -> None:
    """The limit on file size stands for the disk: the write fails in the middle in the same way."""
    limit = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (40_000, 40_000))  # noqa: E731
    code = "import sys; from pyengine_convert.cli import main; sys.exit(main(sys.argv[1:]))"
    with child(code, source, "-o", out, preexec_fn=limit) as process:
        _, messages = process.communicate(timeout=60)
    assert process.returncode == 1
    assert "cannot write" in messages
    assert "File too large" in messages
    assert names(out.parent) == []


def test_too_little_space_is_known_before_anything_is_written(
    source: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from collections import namedtuple

    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(writer.shutil, "disk_usage", lambda _: usage(10**9, 10**9 - 1000, 1000))
    calls: list[int] = []
    with pytest.raises(FileError, match="GB free") as error:
        convert(source, out, "f16", progress=calls.append)
    assert (error.value.code, calls, names(out.parent)) == ("no_space", [], [])


# --- bad checkpoints --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("kind", ["f32", "bf16", "q4_0"])
def test_weights_that_are_not_finite_are_named(tmp_path: Path, out: Path, bad: float, kind: str) -> None:
    tensors = weights(config())
    tensors["model.layers.1.mlp.up_proj.weight"][17, 5] = bad
    save(tmp_path / "m", config(), tensors)
    with pytest.raises(NumericError, match=r"blk\.1\.ffn_up\.weight\[17, 5\] is -?(nan|inf)"):
        convert(tmp_path / "m", out, kind)
    assert names(out.parent) == []


def test_weights_beyond_float16_are_refused_for_f16_only(tmp_path: Path, out: Path) -> None:
    tensors = weights(config())
    tensors["lm_head.weight"][3, 4] = -70000.0
    save(tmp_path / "m", config(), tensors)
    with pytest.raises(FormatError, match=r"output\.weight\[3, 4\] is -70000.*--type bf16"):
        convert(tmp_path / "m", out, "f16")
    convert(tmp_path / "m", out, "bf16")


def drop(name: str) -> Any:
    return lambda tensors: tensors.pop(name)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (drop("model.norm.weight"), ["no model.norm.weight"]),
        (drop("model.layers.0.mlp.up_proj.weight"), ["no model.layers.0.mlp.up_proj.weight"]),
        (drop("lm_head.weight"), ["no lm_head.weight"]),
        (lambda t: t.update({"model.extra": np.ones(3, np.float32)}), ["model.extra", "llama"]),
        (lambda t: t.update({"model.layers.2.mlp.up_proj.weight": t["lm_head.weight"].copy()}), ["model.layers.2"]),
        (
            lambda t: t.update({"model.layers.0.self_attn.k_proj.weight": np.ones((128, 64), np.float32)}),
            ["k_proj", "[128, 64]", "[64, 64]", "kv"],
        ),
        (lambda t: t.update({"model.norm.weight": np.ones((64, 1), np.float32)}), ["model.norm", "[64, 1]", "[64]"]),
        (lambda t: t.update({"lm_head.weight": t["lm_head.weight"].astype(np.float64)}), ["lm_head", "F64", "BF16"]),
        (lambda t: t.update({"lm_head.weight": t["lm_head.weight"].astype(np.int8)}), ["lm_head", "I8"]),
    ],
)
def test_missing_extra_and_misshaped_tensors_are_named(
    tmp_path: Path, out: Path, change: Any, words: list[str]
) -> None:
    tensors = weights(config())
    change(tensors)
    save(tmp_path / "m", config(), tensors)
    with pytest.raises((FormatError, UnsupportedError)) as error:
        convert(tmp_path / "m", out, "f16")
    for word in words:
        assert word in str(error.value)
    assert names(out.parent) == []


def rewrite(path: Path, change: Any) -> None:
    """Changes the JSON header of a safetensors file and nothing else."""
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    change(header)
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + length :])


NORM = "model.norm.weight"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda h: h[NORM].update(dtype="F8_E4M3"), ["F8_E4M3", "64"]),
        (lambda h: h[NORM].update(dtype="F4"), ["F4"]),
        (lambda h: h[NORM].update(shape=[65]), ["256 bytes", "260"]),
        (lambda h: h[NORM].update(shape=[-64]), ["damaged"]),
        (lambda h: h[NORM].update(shape=[2**40, 2**40]), ["expected"]),
        (lambda h: h[NORM].update(shape="64"), ["damaged"]),
        (lambda h: h[NORM].pop("dtype"), ["damaged"]),
        (lambda h: h[NORM].update(data_offsets=[0, 256]), ["begins at"]),
        (lambda h: h.pop(NORM), ["begins at", "left over"]),
        (lambda h: h.update(extra={"dtype": "F32", "shape": [1], "data_offsets": [10**9, 10**9 + 4]}), ["extra"]),
        (lambda h: h.update(extra=[1]), ["damaged"]),
    ],
)
def test_damaged_safetensors_headers_are_named(source: Path, change: Any, words: list[str]) -> None:
    rewrite(source / "model.safetensors", change)
    with pytest.raises((FormatError, UnsupportedError)) as error:
        open_checkpoint(source)
    assert any(word in str(error.value) for word in words)


def test_a_safetensors_file_cut_anywhere_is_refused(source: Path) -> None:
    path = source / "model.safetensors"
    data = path.read_bytes()
    for cut in (*range(0, 200, 3), *range(200, len(data), 9973), len(data) - 1):
        path.write_bytes(data[:cut])
        with pytest.raises(FormatError):
            open_checkpoint(source)
    path.write_bytes(data + b"\0")
    with pytest.raises(FormatError, match="left over"):
        open_checkpoint(source)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n", "git lfs pull"),
        (b"<!DOCTYPE html><html></html>", "web page"),
        (b"", "cut short"),
        (b"\xff" * 64, "no safetensors"),
        (b"\x08" + bytes(7) + b"[1,2,3] ", "not a JSON object"),
        (b"\x08" + bytes(7) + b"{{{{{{{{", "not valid JSON"),
    ],
)
def test_what_is_no_safetensors_file_is_named(source: Path, content: bytes, words: str) -> None:
    (source / "model.safetensors").write_bytes(content)
    with pytest.raises(FormatError, match=words):
        open_checkpoint(source)


def bomb(header: bytes, size: int | None = None) -> Callable[[Path], None]:
    """A file that declares this header; ``size``: of the (sparse) file."""

    def make(source: Path) -> None:
        path = source / "model.safetensors"
        path.write_bytes(len(header).to_bytes(8, "little") + header)
        if size is not None:
            path.write_bytes(size.to_bytes(8, "little"))
            os.truncate(path, 8 + size)

    return make


def indexed(shard: str) -> Callable[[Path], None]:
    def make(source: Path) -> None:
        save_file(weights(config()), source.parent / "outside.safetensors")
        index = {"weight_map": dict.fromkeys(weights(config()), shard)}
        (source / "model.safetensors.index.json").write_text(json.dumps(index))

    return make


def only(name: str) -> Callable[[Path], None]:
    return lambda source: (source / "model.safetensors").rename(source / name) and None


def configured(arch: str = "LlamaForCausalLM", **changes: Any) -> Callable[[Path], None]:
    return lambda source: write_json(source / "config.json", config(arch, **changes))


def cut(source: Path) -> None:
    path = source / "model.safetensors"
    os.truncate(path, path.stat().st_size - 1000)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (indexed("../outside.safetensors"), "expected a file in the same folder"),
        (indexed("/etc/passwd"), "expected a file in the same folder"),
        (indexed(".."), "expected a file in the same folder"),
        (indexed("gone.safetensors"), "gone.safetensors, which is missing: download it again"),
        (indexed("config.json"), "no safetensors file"),
        (lambda source: rewrite(source / "model.safetensors", lambda h: h[NORM].update(dtype="I32")), "I32"),
        (cut, "ends 1000 bytes early: download it again"),
        (bomb(b"{}", size=(16 << 20) + 1), "header of 16777217 bytes"),
        (bomb(b"{}", size=1 << 40), "header of 1099511627776 bytes"),
        (bomb(b"[" * 100_000), "not valid JSON"),
        (bomb(b'{"a":' * 100_000), "not valid JSON"),
        (bomb(b'{"a": {"dtype": "F32", "shape": [' + b"1," * 100_000 + b'1], "data_offsets": [0, 4]}}'), "damaged"),
        (
            bomb(b'{"a": {"dtype": "F32", "shape": [1' + b"0" * 5000 + b'], "data_offsets": [0, 4]}}'),
            "model.safetensors",
        ),
        (only("pytorch_model.bin"), "Pickled weights (.bin, .pt, .pth) are not read: they can run code"),
        (only("consolidated.00.pth"), "found consolidated.00.pth. Pickled weights"),
        (configured(hidden_size=96), "expected [300, 96] (vocab, embd)"),
        (configured(num_hidden_layers=3), "has no model.layers.2."),
        (configured(num_hidden_layers=1), "model.layers.1."),
        (configured(vocab_size=299), "[300, 64]; expected [299, 64]"),
        (configured("MambaForCausalLM"), "the architecture is MambaForCausalLM; known are LlamaForCausalLM"),
    ],
)
def test_a_malformed_checkpoint_is_one_clear_error_and_nothing_is_written(
    source: Path, out: Path, capsys: pytest.CaptureFixture[str], make: Callable[[Path], None], words: str
) -> None:
    make(source)
    assert main([str(source), "-o", str(out), "--type", "q8_0"]) == 1
    printed = capsys.readouterr().err
    assert printed.startswith("pyengine-convert: error: ")
    assert printed.count("\n") == 1
    assert words in printed
    assert names(out.parent) == []


def test_a_shrinking_checkpoint_is_an_error(source: Path, out: Path) -> None:
    """Checked once, cut afterwards: a mapping would end in SIGBUS."""
    path = source / "model.safetensors"

    def cut(_size: int) -> None:
        os.truncate(path, 5000)

    with pytest.raises(FormatError, match="changed while it was read"):
        convert(source, out, "f32", progress=cut)
    assert names(out.parent) == []


@pytest.mark.parametrize(
    ("index", "words"),
    [
        ({"weight_map": {"a": "gone.safetensors"}}, "gone.safetensors, which is missing"),
        ({"weight_map": {"a": "../m/model.safetensors"}}, "in the same folder"),
        ({"weight_map": {"a": 3}}, "weight_map"),
        ({}, "weight_map"),
        ({"weight_map": {"absent": "model.safetensors"}}, "has absent, but it has not"),
    ],
)
def test_a_bad_index_is_named(source: Path, index: Any, words: str) -> None:
    (source / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(EngineError, match=words):
        open_checkpoint(source)


def test_a_tensor_in_two_shards_is_refused(source: Path) -> None:
    save_file({NORM: np.ones(64, np.float32)}, source / "other.safetensors")
    index = {"weight_map": {NORM: "model.safetensors", "x": "other.safetensors"}}
    (source / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(FormatError, match=NORM):
        open_checkpoint(source)


# --- the command ------------------------------------------------------------------------------------------------------


def test_the_command_reports_size_bits_and_seconds(out: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(DATA / "models" / "stories260K-llama"), "-o", str(out), "--type", "q4_0", "--verbose"]) == 0
    printed = capsys.readouterr()
    assert printed.out == ""
    assert "note: 5 tensors kept in F16, e.g. blk.0.ffn_down.weight: rows of 172 are no multiple of 32" in printed.err
    summary = printed.err.splitlines()[-1]
    assert f"{out.stat().st_size / 1e6:.1f} MB" in summary
    assert "bits each" in summary
    assert "blk.4.attn_q.weight" in printed.err


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["missing", "-o", "OUT"], 1, "missing does not exist"),
        (["SRC", "-o", "nowhere/m.gguf"], 1, "nowhere is no directory"),
        (["SRC", "-o", "."], 1, "is a directory"),
        (["SRC", "-o", "OUT", "--pre", "nonsense"], 2, "nonsense"),
    ],
)
def test_the_command_ends_with_its_own_message_and_code(
    source: Path, out: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], code: int, words: str
) -> None:
    actual = [a.replace("SRC", str(source)).replace("OUT", str(out)) for a in arguments]
    assert main(actual) == code
    printed = capsys.readouterr().err
    assert printed.startswith("pyengine-convert: error: ")
    assert words in printed
    assert names(out.parent) == []


def test_names_from_files_cannot_drive_the_terminal() -> None:
    from pyengine_convert.cli import printable

    assert printable("a\x1b[31mb\u202ec\n") == "a\ufffd[31mb\ufffdc\ufffd"
