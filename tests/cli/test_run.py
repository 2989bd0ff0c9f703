"""``pyengine-run``: what goes where, a message and exit code for each failure, Ctrl-C, conversations on a terminal."""

from __future__ import annotations

import argparse
import json
import os
import signal
import struct
import subprocess
import sys
import time
from pathlib import Path

import pytest

import pyengine
from pyengine.cli import common
from pyengine.cli.options import add_sampler_options, sampler_settings
from pyengine.tokenizer import Tokenizer
from tests.cli.terminal import Terminal
from tests.support import DATA, ROOT, needs_data

STORIES = DATA / "gguf" / "stories260K-llama-F32.gguf"
ENV = {k: v for k, v in os.environ.items() if k not in ("PYENGINE_ISA", "NO_COLOR")} | {"PYTHONPATH": str(ROOT)}
RUN = [sys.executable, "-m", "pyengine.cli.run"]
SLOW = [sys.executable, "-m", "tests.cli.slow_run"]
GREEDY = ["--temp", "0"]
# The stories model has no template. With this one every reply is reasoning until it is closed.
THINKING = "{% for m in messages %}{{ m.content }}{% endfor %}<think>"
TALKING = "{% for m in messages %}{{ m.content }}{% endfor %}"


def run(*args: str | Path | bytes, stdin: bytes | None = None, env: dict[str, str] | None = None, **options: object):
    """The finished process; stdin is /dev/null unless given."""
    source = {"input": stdin} if stdin is not None else {"stdin": subprocess.DEVNULL}
    command = [*RUN, *map(os.fsencode, args)]
    return subprocess.run(command, capture_output=True, timeout=60, env=env or ENV, cwd=ROOT, **source, **options)  # type: ignore[call-overload]


def check_failure(process: subprocess.CompletedProcess[bytes], code: int, *words: str) -> None:
    """One clear message, no traceback, nothing on stdout."""
    message = process.stderr.decode()
    assert process.returncode == code, message
    assert process.stdout == b""
    assert "Traceback" not in message
    assert len(message.strip().splitlines()) == 1, message
    for word in words:
        assert word in message


# ---- what goes where ----


@needs_data
def test_stdout_is_the_answer_and_nothing_else() -> None:
    golden = json.loads((DATA / "golden" / "golden.json").read_text())["stories260K"]
    opening = "Once upon a time"
    done = run(STORIES, opening, "--raw", *GREEDY, "-n", "60")
    assert done.returncode == 0
    assert done.stderr == b""
    answer = done.stdout.decode()
    assert answer.endswith("\n")
    assert golden["text"].startswith(opening + answer.rstrip("\n"))
    assert len(answer) > 100


@needs_data
def test_options_may_stand_anywhere() -> None:
    orders = [("--raw", "-n", "5", *GREEDY, STORIES, "Once"), (STORIES, "--raw", "-n", "5", "Once", *GREEDY)]
    assert len({run(*order).stdout for order in [*orders, (STORIES, "Once", "--raw", "-n", "5", *GREEDY)]}) == 1
    assert run(*orders[1]).returncode == 0


@needs_data
def test_json_has_everything() -> None:
    golden = json.loads((DATA / "golden" / "golden.json").read_text())["stories260K"]
    opening = "Once upon a time"
    n_opening = len(Tokenizer.from_gguf(STORIES).encode(opening))
    done = run(
        STORIES,
        opening,
        "--raw",
        *GREEDY,
        "-n",
        "20",
        "--json",
        "--top-logprobs",
        "2",
        "--seed",
        "5",
        "--speculate",
        "off",
    )
    assert (done.returncode, done.stderr) == (0, b"")
    report = json.loads(done.stdout)
    assert report["ids"] == golden["greedy_ids"][n_opening - 1 : n_opening + 19]
    assert golden["text"].startswith(opening + report["text"])
    assert (report["finish_reason"], report["reasoning"], report["seed"]) == ("length", "", 5)
    assert report["usage"] == {
        "prompt_tokens": n_opening,
        "reused_tokens": 0,
        "completion_tokens": 20,
        "reasoning_tokens": 0,
        "drafted_tokens": 0,
        "accepted_tokens": 0,
    }
    assert report["timings"]["decode_tokens_per_second"] > 0
    for token, entry in zip(report["ids"], report["logprobs"], strict=True):
        assert entry["id"] == entry["top"][0]["id"] == token
        assert entry["logprob"] == entry["top"][0]["logprob"] >= entry["top"][1]["logprob"]


@needs_data
def test_reasoning_is_never_on_stdout(tmp_path: Path) -> None:
    template = tmp_path / "thinking.jinja"
    template.write_text(THINKING)
    common_args = [STORIES, "Once upon", *GREEDY, "-n", "40", "--chat-template", template]
    for hiding in ([], ["--think", "hide"], ["--think", "dim"]):  # a line that is drawn over needs a terminal
        hidden = run(*common_args, *hiding)
        assert (hidden.returncode, hidden.stdout, hidden.stderr) == (0, b"", b"")
    shown = run(*common_args, "--think", "show")
    assert shown.stdout == b""
    assert len(shown.stderr) > 40
    assert b"\x1b" not in shown.stderr  # no colours where there is no terminal
    report = json.loads(run(*common_args, "--json", "--think-budget", "8").stdout)
    assert report["reasoning"]
    assert report["text"]
    assert shown.stderr.decode().startswith(report["reasoning"].rstrip())
    assert 8 <= report["usage"]["reasoning_tokens"] < 30


@needs_data
def test_piped_text_comes_before_the_prompt() -> None:
    tokenizer = Tokenizer.from_gguf(STORIES)

    def prompt_tokens(*args: str, stdin: bytes | None = None) -> int:
        done = run(STORIES, *args, "--raw", "--json", "-n", "1", stdin=stdin)
        return int(json.loads(done.stdout)["usage"]["prompt_tokens"])

    assert prompt_tokens("Lily ran", stdin=b"Tom sat\n") == len(tokenizer.encode("Tom sat\n\nLily ran"))
    assert prompt_tokens(stdin=b"\xef\xbb\xbfTom sat\n") == len(tokenizer.encode("Tom sat\n"))
    assert prompt_tokens("-", stdin=b"Tom sat") == len(tokenizer.encode("Tom sat"))
    assert prompt_tokens("Lily ran", stdin=b"") == len(tokenizer.encode("Lily ran"))


@needs_data
def test_files_stand_between_piped_text_and_the_prompt(tmp_path: Path) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    one.write_bytes(b"\xef\xbb\xbfTom sat\n")
    two.write_text("Ben ran\r\n")
    tokenizer = Tokenizer.from_gguf(STORIES)

    def prompt_tokens(*args: str | Path, stdin: bytes | None = None) -> int:
        done = run(STORIES, *args, "--raw", "--json", "-n", "1", stdin=stdin)
        return int(json.loads(done.stdout)["usage"]["prompt_tokens"])

    assert prompt_tokens("-f", one) == len(tokenizer.encode("Tom sat\n"))  # raw text alone is exact
    assert prompt_tokens("-f", one, "--file", two) == len(tokenizer.encode("Tom sat\n\nBen ran"))
    assert prompt_tokens("Lily", "-f", one, stdin=b"") == len(tokenizer.encode("Tom sat\n\nLily"))
    assert prompt_tokens("Lily", "-f", one, stdin=b"Kim\n") == len(tokenizer.encode("Kim\n\nTom sat\n\nLily"))
    one.write_bytes(b"caf\xe9")
    check_failure(run("m.gguf", "-f", one), common.EXIT_USAGE, str(one), "not valid UTF-8 (byte 4)")
    check_failure(run("m.gguf", "hi", "-f", tmp_path / "none"), common.EXIT_ERROR, "none", "No such file")
    two.write_text("\n")
    check_failure(run("m.gguf", "-f", two), common.EXIT_USAGE, "prompt is empty")


def test_an_answer_that_repeats_itself_is_ended_and_json_says_so() -> None:
    args = ["--demo", "hi", "--temp", "0", "-c", "4096", "--logit-bias", "42+1000", "-n", "1200", "--json"]
    loops = run(*args)
    assert loops.returncode == 0
    assert b"repeating itself word for word" in loops.stderr
    report = json.loads(loops.stdout)
    thought = report["usage"]["reasoning_tokens"]  # closed after 512 tokens, and then the answer does the same
    assert 512 < thought < 520
    assert report["finish_reason"] == "loop"
    assert thought + 512 <= report["usage"]["completion_tokens"] < thought + 520
    for free in (["--loop-limit", "0"], ["--raw"]):
        assert json.loads(run(*args, *free).stdout)["finish_reason"] == "length"


@needs_data
def test_the_same_seed_gives_the_same_text() -> None:
    args = [STORIES, "One day", "--raw", "-n", "30", "--temp", "1.2", "--seed"]
    first = run(*args, "11").stdout
    assert first == run(*args, "11", "-t", "1").stdout
    assert first != run(*args, "12").stdout


@needs_data
def test_no_way_to_speculate_changes_the_answer() -> None:
    draft = DATA / "gguf" / "stories260K-llama-256d-Q4_K_M.gguf"
    prompt = (STORIES, "The cat sat. The cat sat. The cat sat. The", "--raw", "--seed", "3", "-n", "120", "-v")
    plain = run(*prompt, "--speculate", "off")
    assert plain.returncode == 0
    assert len(plain.stdout) > 200
    for way in ([], ["--speculate", "ngram"], ["--draft", draft]):
        guessed = run(*prompt, *way)
        assert (guessed.returncode, guessed.stdout) == (0, plain.stdout), guessed.stderr.decode()
    assert "guesses were right" in guessed.stderr.decode()


@needs_data
def test_stop_strings_and_budget_reach_the_engine() -> None:
    done = run(STORIES, "Once upon a time", "--raw", *GREEDY, "-n", "60", "--stop", "outside", "--stop", "zzz")
    assert done.stdout.decode() == ", there was a little girl named Lily. She loved to play \n"


@needs_data
def test_verbose_tells_the_settings_and_the_numbers() -> None:
    text = run(STORIES, "hi", "--raw", "-n", "3", "-v", "--top-p", "0.5", "--kv-type", "f32").stderr.decode()
    for word in ("model: llama", "context 512 of 512", "KV f32", "top_p 0.5", "tokens/s", "seed ", "end: length"):
        assert word in text


@needs_data
def test_a_model_without_a_template_continues_text_and_says_so() -> None:
    done = run(STORIES, "Once upon a time", *GREEDY, "-n", "5")
    assert done.stdout == b", there was a little\n"
    assert b"no chat template" in done.stderr
    check_failure(run(STORIES, "hi", "--system", "You are kind."), 1, "no chat template")


def test_the_demo_model_thinks_and_answers() -> None:
    if not pyengine.demo_model_path().exists():
        pytest.skip("the demo model is not built yet")
    done = run("--demo", "Tom has 48 apples and buys 27 more. How many apples does he have now?", *GREEDY, "--json")
    report = json.loads(done.stdout)
    assert report["finish_reason"] == "eog"
    assert "75" in report["text"]
    assert report["reasoning"].strip()


# ---- failures ----


@pytest.fixture(scope="module")
def bad(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of files that are no models this build runs."""
    folder = tmp_path_factory.mktemp("bad")
    (folder / "empty.gguf").touch()
    (folder / "lfs.gguf").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n")
    (folder / "page.gguf").write_text("<!DOCTYPE html><html><body>404</body></html>")
    if STORIES.exists():
        data = STORIES.read_bytes()
        (folder / "cut.gguf").write_bytes(data[:300000])
        arch = data.index(b"llama", data.index(b"general.architecture"))
        (folder / "arch.gguf").write_bytes(data[:arch] + b"zebra" + data[arch + 5 :])
        name = b"token_embd.weight"
        at = data.index(name) + len(name)
        at += 4 + 8 * struct.unpack_from("<I", data, at)[0]
        (folder / "type.gguf").write_bytes(data[:at] + struct.pack("<I", 99) + data[at + 4 :])
    return folder


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("missing.gguf", ["no file"]),
        ("", ["directory"]),
        ("empty.gguf", ["empty"]),
        ("lfs.gguf", ["Git LFS"]),
        ("page.gguf", ["web page"]),
        pytest.param("cut.gguf", ["early"], marks=needs_data),
        pytest.param("arch.gguf", ["zebra", "llama, qwen2, qwen3"], marks=needs_data),
        pytest.param("type.gguf", ["type 99", "token_embd.weight"], marks=needs_data),
    ],
)
def test_each_bad_file_has_its_own_message(bad: Path, name: str, words: list[str]) -> None:
    check_failure(run(bad / name if name else bad, "hi"), common.EXIT_ERROR, *words)


@pytest.mark.parametrize(
    ("args", "words"),
    [
        ([], ["which model"]),
        (["", "hi"], ["name of the model is empty"]),
        (["m.gguf", ""], ["prompt is empty"]),
        (["m.gguf", " \n"], ["prompt is empty"]),
        (["m.gguf"], ["prompt is empty"]),
        (["m.gguf", b"a\xff"], ["not valid UTF-8", "byte 2"]),
        (["m.gguf", "hi", "--system", b"\xc3"], ["--system", "not valid UTF-8"]),
        (["m.gguf", "hi", "--stop", ""], ["--stop is empty"]),
        (["m.gguf", "hi", "--raw", "--system", "x"], ["--raw"]),
        (["m.gguf", "hi", "--top-p", "-1"], ["--top-p"]),
        (["m.gguf", "hi", "--temp", "nan"], ["--temp"]),
        (["m.gguf", "hi", "--seed", "-2"], ["--seed"]),
        (["m.gguf", "hi", "--samplers", "top_k;magic"], ["--samplers", "magic"]),
        (["m.gguf", "hi", "--logit-bias", "five+1"], ["--logit-bias"]),
        (["m.gguf", "hi", "-n", "0"], ["--n-predict"]),
        (["m.gguf", "hi", "--think-budget", "-1"], ["--think-budget"]),
        (["m.gguf", "hi", "--loop-limit", "-1"], ["--loop-limit"]),
        (["--demo", "a", "b"], ["--demo"]),
        (["m.gguf", "hi", "--draft", ""], ["draft model is empty"]),
        (["m.gguf", "hi", "--draft", "d.gguf", "--speculate", "ngram"], ["--draft", "--speculate"]),
        ([b"\xff.gguf", "hi"], ["not valid UTF-8"]),
    ],
)
def test_each_impossible_command_line_has_its_own_message(args: list[str | bytes], words: list[str]) -> None:
    check_failure(run(*args), common.EXIT_USAGE, *words)


@needs_data
@pytest.mark.parametrize(
    ("args", "code", "words"),
    [
        (["--override-kv", "llama.block_count=u32:1"], 2, ["--override-kv", "tokenizer.ggml.pre"]),
        (["--chat-template", "nowhere.jinja"], 1, ["nowhere.jinja"]),
        (["--draft", "nowhere.gguf"], 1, ["nowhere.gguf"]),
        (["--draft", str(pyengine.demo_model_path())], 2, ["in the draft model", "vocabulary"]),
        (["-t", "-1"], 2, ["threads"]),
        (["-c", "99999999"], 2, ["n_ctx"]),
        (["--raw", "--logit-bias", "9999+1"], 2, ["9999", "512"]),
        (["--raw", "-c", "2"], 3, ["holds 2"]),
        (["--raw", "--dry-multiplier", "1", "--debug-no-such"], 2, ["unrecognized"]),
    ],
)
def test_what_only_the_model_can_refuse(args: list[str], code: int, words: list[str]) -> None:
    process = run(STORIES, "Once upon a time", *args)
    if "unrecognized" in words:  # argparse adds the usage line
        assert process.returncode == code
        assert len(process.stderr.decode().splitlines()) == 2
    else:
        check_failure(process, code, *words)


@needs_data
def test_a_full_context_is_told_and_keeps_the_answer() -> None:
    done = run(STORIES, "Once upon a time", "--raw", *GREEDY, "-c", "12")
    assert done.returncode == common.EXIT_CONTEXT
    assert done.stdout == b", there was a little girl\n"
    assert b"context of 12 tokens is full" in done.stderr


def test_piped_input_must_be_utf8() -> None:
    check_failure(run("m.gguf", stdin=b"abc\xe9t\xe9"), 2, "standard input is not valid UTF-8 (byte 4)")


def test_an_internal_error_is_one_line_and_debug_shows_where(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken() -> int:
        raise KeyError("x")

    assert common.run_command("name", broken) == 1
    assert capsys.readouterr().err == "name: internal error: KeyError: 'x'; --debug shows where\n"
    assert common.run_command("name", broken, debug=True) == 1
    assert "Traceback" in capsys.readouterr().err


@needs_data
def test_a_closed_pipe_is_quiet() -> None:
    command = [*SLOW, str(STORIES), "Once", "--raw", *GREEDY]
    process = subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=ENV, cwd=ROOT
    )
    assert process.stdout is not None
    assert process.stdout.read(3)
    process.stdout.close()
    assert process.wait(20) == common.EXIT_PIPE
    assert process.stderr is not None
    assert process.stderr.read() == b""
    process.stderr.close()


@needs_data
@pytest.mark.parametrize("closed", ["<&-", ">&-", "2>&-", "<&- >&- 2>&-"])
def test_closed_standard_streams_are_empty_ones(closed: str) -> None:
    done = subprocess.run(
        ["sh", "-c", f'"$@" {closed}', "sh", *RUN, str(STORIES), "Once upon a time", "--raw", *GREEDY, "-n", "5"],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        env=ENV,
        cwd=ROOT,
        timeout=60,
        check=False,
    )
    answer = b"" if ">&-" in closed.split() else b", there was a little\n"
    assert (done.returncode, done.stdout, done.stderr) == (0, answer, b"")


@needs_data
def test_raw_text_is_exact(tmp_path: Path) -> None:
    newline = Tokenizer.from_gguf(STORIES).encode("\n", add_special=False)[-1]
    args = [STORIES, "Once", *GREEDY, "-n", "3", "--logit-bias", f"{newline}+1000"]
    assert run(*args, "--raw").stdout == b"\n\n\n"
    template = tmp_path / "talking.jinja"
    template.write_text(TALKING)
    assert run(*args, "--chat-template", template).stdout == b""


@needs_data
def test_a_context_beyond_the_models_own_is_told() -> None:
    done = run(STORIES, "Once", "--raw", *GREEDY, "-n", "1", "-c", "600")
    assert done.returncode == 0
    assert b"made for 512 tokens" in done.stderr


# ---- Ctrl-C ----


@needs_data
@pytest.mark.parametrize("json_output", [False, True])
def test_ctrl_c_ends_a_single_answer(json_output: bool) -> None:
    command = [*SLOW, str(STORIES), "Once upon a time", "--raw", *GREEDY, "-v", *["--json"] * json_output]
    process = subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=ENV, cwd=ROOT
    )
    assert process.stderr is not None
    assert any(b"sampling:" in line for line in iter(process.stderr.readline, b""))
    time.sleep(0.4)
    process.send_signal(signal.SIGINT)
    start = time.monotonic()
    out, err = process.communicate(timeout=20)
    assert time.monotonic() - start < 3.0
    assert process.returncode == common.EXIT_INTERRUPTED
    assert b"interrupted" in err
    assert b"Traceback" not in err
    if json_output:
        assert json.loads(out)["finish_reason"] == "cancelled"


@needs_data
def test_ctrl_c_ends_the_reading_of_a_long_prompt_at_once() -> None:
    env = ENV | {"STUCK_ABOVE": "5"}
    with Terminal([*SLOW, str(STORIES), "One day a girl named Lily went to the park", "--raw", "-v"], env) as terminal:
        terminal.wait_for("sampling:")
        time.sleep(0.2)
        start = time.monotonic()
        terminal.interrupt()
        terminal.wait_for("interrupted")
        assert time.monotonic() - start < 1.2
        assert terminal.exit_code() == common.EXIT_INTERRUPTED


# ---- the pieces ----


def settings_of(*args: str, recommended: dict[str, object] | None = None):
    parser = argparse.ArgumentParser()
    add_sampler_options(parser)
    return sampler_settings(parser.parse_args(args), recommended or {})


def test_every_flag_overrides_what_the_model_recommends() -> None:
    recommended: dict[str, object] = {"temperature": 0.6, "min_p": 0.0}
    assert settings_of(recommended=recommended).temperature == 0.6
    assert settings_of("--temp", "0.8", recommended=recommended).temperature == 0.8
    assert settings_of("--temp", "0.8", recommended=recommended).min_p == 0.0
    assert settings_of().min_p == 0.05


def test_flags_become_settings() -> None:
    s = settings_of(
        "--logit-bias", "5+1.5", "--logit-bias", "6-inf", "--logit-bias", "7:2", "--samplers", "top_k;temperature"
    )
    assert dict(s.logit_bias) == {5: 1.5, 6: float("-inf"), 7: 2.0}
    assert s.samplers == ("top_k", "temperature")
    assert settings_of("--dry-sequence-breaker", "none").dry_sequence_breakers == ()
    assert settings_of("--dry-sequence-breaker", "x").dry_sequence_breakers == ("x",)
    assert settings_of("--seed", "-1").seed is None
    assert settings_of("--top-nsigma", "-1").top_n_sigma == -1.0


def test_a_model_cannot_steer_the_terminal() -> None:
    assert common.printable("a\x1b[31m\r\x07b\x9b2Jc\td\n") == "a[31mb2Jc\td\n"
    assert common.printable("\u202egnp.exe\u2066") == "gnp.exe"
    assert common.printable("שלום 日本 🙂 é") == "שלום 日本 🙂 é"
