"""``--session NAME``: goes on in another process as if it had never stopped, and never loses what it has."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pyengine import Chat, Model, SamplerSettings, demo_model_path
from pyengine.chat_file import read_chat
from pyengine.generate import End, collect
from tests.cli.test_run import ENV, RUN, check_failure
from tests.support import DATA, ROOT, needs_data

TURNS = ("Tom has 48 apples and buys 27 more. How many apples does he have now?", "And if he gives 19 away?")


@pytest.fixture
def env(tmp_path: Path) -> dict[str, str]:
    return ENV | {"XDG_STATE_HOME": str(tmp_path / "state")}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "state" / "pyengine" / "sessions"


def say(env: dict[str, str], *args: str, model: str = "--demo") -> subprocess.CompletedProcess[bytes]:
    command = [*RUN, model, "--session", "talk", *args]
    return subprocess.run(command, capture_output=True, env=env, cwd=ROOT, stdin=subprocess.DEVNULL, timeout=60)


def report(done: subprocess.CompletedProcess[bytes]) -> dict[str, object]:
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)  # type: ignore[no-any-return]


@pytest.mark.parametrize("kv_type", ["f16", "q8_0"])
def test_a_session_resumed_by_another_process_goes_on_as_if_uninterrupted(
    kv_type: str, env: dict[str, str], folder: Path
) -> None:
    flags = ("--json", "--kv-type", kv_type, "--ctx-size", "512", "-t", "1")
    first = report(say(env, *flags, "--seed", "7", "--system", "Be brief.", TURNS[0]))
    second = report(say(env, *flags, TURNS[1]))  # seed and system prompt are remembered
    with Model.open(demo_model_path()) as model, model.session(n_ctx=512, kv_type=kv_type, threads=1) as session:  # type: ignore[arg-type]
        settings = SamplerSettings(seed=7, temperature=0.6, top_p=0.95, min_p=0.0)
        chat = Chat(model, session=session, system="Be brief.", settings=settings)
        for said, text in ((first, TURNS[0]), (second, TURNS[1])):
            events = list(chat.send(text))
            end = events[-1]
            assert isinstance(end, End)
            assert said["text"] == collect(events).text
            assert said["ids"] == [token.id for event in events for token in event.tokens]
            assert said["usage"]["prompt_tokens"] == end.stats.prompt_tokens  # type: ignore[index]
            assert said["usage"]["reused_tokens"] == end.stats.reused_tokens  # type: ignore[index]
        assert read_chat(folder / "talk.chat").messages == chat.messages
    assert sorted(os.listdir(folder)) == ["talk.chat", "talk.keys", "talk.lock"]
    assert folder.stat().st_mode & 0o777 == 0o700
    assert all((folder / name).stat().st_mode & 0o777 == 0o600 for name in os.listdir(folder))


def test_flags_prevail_over_what_was_saved(env: dict[str, str], folder: Path) -> None:
    assert say(env, "--seed", "7", "--top-k", "5", "--stop", "X", "-n", "200", TURNS[0]).returncode == 0
    assert say(env, "--seed", "8", "-n", "210", "--system", "Be long.", TURNS[1]).returncode == 0
    saved = read_chat(folder / "talk.chat")
    assert (saved.settings.seed, saved.settings.top_k, saved.stop, saved.max_tokens) == (8, 5, ("X",), 210)
    assert saved.messages[0] == {"role": "system", "content": "Be long."}
    assert len(saved.messages) == 5


def test_two_processes_do_not_have_one_session(env: dict[str, str], folder: Path) -> None:
    command = [*RUN, "--demo", "--session", "talk"]
    with subprocess.Popen(command, env=env, cwd=ROOT, stdin=_terminal(), stderr=subprocess.PIPE) as first:
        try:
            deadline = time.monotonic() + 30
            while not (folder / "talk.lock").exists() or not (folder / "talk.lock").read_bytes():
                assert time.monotonic() < deadline
                assert first.poll() is None
                time.sleep(0.02)
            done = say(env, TURNS[0])
            check_failure(done, 1, "talk", "in use", str(first.pid))
        finally:
            first.kill()
    assert say(env, TURNS[0]).returncode == 0  # a lock does not outlive its process


def _terminal() -> int:
    master, slave = os.openpty()
    _terminals.append(master)
    return slave


_terminals: list[int] = []


def test_a_damaged_session_is_refused_and_left_alone(env: dict[str, str], folder: Path) -> None:
    assert say(env, TURNS[0]).returncode == 0
    path = folder / "talk.chat"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 4
    path.write_bytes(data)
    check_failure(say(env, TURNS[1]), 1, "talk.chat", "damaged", "checksum")
    assert path.read_bytes() == data


def test_damaged_keys_cost_time_and_nothing_else(env: dict[str, str], folder: Path) -> None:
    flags = ("--json", "--seed", "3")
    report(say(env, *flags, TURNS[0]))
    files = {name: (folder / name).read_bytes() for name in ("talk.chat", "talk.keys")}
    good = report(say(env, *flags, TURNS[1]))
    for name, data in files.items():
        (folder / name).write_bytes(data if name == "talk.chat" else data[:-1000] + b"\0" * 1000)
    done = say(env, *flags, TURNS[1])
    again = report(done)
    assert b"damaged" in done.stderr
    assert again["ids"] == good["ids"]
    assert again["usage"]["reused_tokens"] < good["usage"]["reused_tokens"] or good["usage"]["reused_tokens"] <= 64  # type: ignore[index]
    assert again["usage"]["prompt_tokens"] == good["usage"]["prompt_tokens"]  # type: ignore[index]


def test_a_session_that_cannot_be_written_answers_and_says_so(env: dict[str, str], folder: Path) -> None:
    assert say(env, TURNS[0]).returncode == 0
    before = {name: (folder / name).read_bytes() for name in ("talk.chat", "talk.keys")}
    code = (  # as a full disk
        "import resource, signal, sys; signal.signal(signal.SIGXFSZ, signal.SIG_IGN); "
        "resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000)); "
        "from pyengine.cli.run import main; sys.exit(main(sys.argv[1:]))"
    )
    command = [sys.executable, "-c", code, "--demo", "--session", "talk", TURNS[1]]
    done = subprocess.run(command, capture_output=True, env=env, cwd=ROOT, stdin=subprocess.DEVNULL, timeout=60)
    assert done.returncode == 0
    assert done.stdout.strip()
    assert done.stderr.decode().count("is not saved") == 1
    assert {name: (folder / name).read_bytes() for name in before} == before
    assert sorted(os.listdir(folder)) == ["talk.chat", "talk.keys", "talk.lock"]


def test_what_a_killed_process_left_is_removed(env: dict[str, str], folder: Path) -> None:
    assert say(env, TURNS[0]).returncode == 0
    (folder / ".talk.keys.123.part").write_bytes(b"half")
    (folder / ".other.keys.123.part").write_bytes(b"half")
    assert say(env, TURNS[1]).returncode == 0
    assert sorted(os.listdir(folder)) == [".other.keys.123.part", "talk.chat", "talk.keys", "talk.lock"]


@needs_data
def test_a_session_of_another_model_is_refused(env: dict[str, str]) -> None:
    assert say(env, TURNS[0]).returncode == 0
    other = str(DATA / "gguf" / "stories260K-llama-F32.gguf")
    done = say(env, "--chat-template", "chatml", "x", model=other)
    check_failure(done, 2, "conversation with", "architecture is qwen3", "llama")


@pytest.mark.parametrize("name", ["", "a/b", "..", "-x", "x" * 61, "a b"])
def test_names_that_could_be_paths_are_refused(name: str, env: dict[str, str]) -> None:
    done = subprocess.run(
        [*RUN, "--demo", f"--session={name}", "x"], capture_output=True, env=env, cwd=ROOT, stdin=subprocess.DEVNULL
    )
    check_failure(done, 2, "--session", "expected at most 60 letters")


@needs_data
def test_a_model_without_a_template_has_no_conversation(env: dict[str, str]) -> None:
    done = say(env, "x", model=str(DATA / "gguf" / "stories260K-llama-F32.gguf"))
    check_failure(done, 1, "no chat template")


def test_raw_text_is_no_conversation(env: dict[str, str]) -> None:
    check_failure(say(env, "--raw", "x"), 2, "--session needs a conversation")


def test_a_chat_that_fills_the_context_shifts_and_says_so_with_the_numbers(env: dict[str, str], folder: Path) -> None:
    told = b""
    for turn in range(6):
        done = say(env, "--overflow", "shift", "--ctx-size", "160", TURNS[turn % 2])
        assert done.returncode == 0, done.stderr
        told += done.stderr
    assert b"the context of 160 tokens is full: the model no longer sees the" in told
    assert b"are read again" in told
    assert len(read_chat(folder / "talk.chat").messages) == 12
    command = [*RUN, "--demo", "--overflow", "error", "--ctx-size", "64", "--think", "hide", TURNS[0]]
    done = subprocess.run(command, capture_output=True, env=env, cwd=ROOT, stdin=subprocess.DEVNULL, timeout=60)
    assert done.returncode == 3
    assert b"the context of 64 tokens is full: the prompt took" in done.stderr
