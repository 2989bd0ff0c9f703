"""``--stream-json`` as a host meets it: a child process, two pipes, one JSON object a line."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import queue
import random
import shutil
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Self

import pytest

from pyengine import Chat, Model, SamplerSettings, demo_model_path
from pyengine.cli import host as host_module
from pyengine.cli.host import MAX_LINE, Host
from pyengine.cli.stream import MAX_QUEUE
from pyengine.generate import collect
from pyengine.tokenizer import Tokenizer
from tests.cli.test_run import ENV, RUN, SLOW
from tests.support import ROOT

QUESTION = [{"role": "user", "content": "Tom has 48 apples and buys 27 more. How many apples does he have now?"}]
Object = dict[str, Any]


class Engine:
    """The child, and what it says."""

    def __init__(self, *args: str, command: list[str] = RUN, env: dict[str, str] | None = None) -> None:
        self.process = subprocess.Popen(
            [*command, "--demo", "--stream-json", "-t", "1", *args],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=ENV | (env or {}),
            cwd=ROOT,
        )
        self.lines: queue.SimpleQueue[bytes] = queue.SimpleQueue()
        self.seen: list[Object] = []
        self.may_read = threading.Event()
        self.may_read.set()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        self.hello = self.next()

    def _read(self) -> None:
        assert self.process.stdout is not None
        while self.may_read.wait() and (line := self.process.stdout.readline()):
            self.lines.put(line)
        self.lines.put(b"")

    def send(self, **request: Any) -> None:
        self.send_line(json.dumps(request).encode())

    def send_line(self, line: bytes) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(line + b"\n")
        self.process.stdin.flush()

    def next(self, seconds: float = 30.0) -> Object:
        line = self.lines.get(timeout=seconds)
        assert line, f"the engine ended: {self.process.stderr.read() if self.process.stderr else ''!r}"
        event = json.loads(line.decode())
        assert isinstance(event, dict)
        assert line.count(b"\n") == 1
        self.seen.append(event)
        return event

    def until(self, **wanted: Any) -> list[Object]:
        """The events up to the first that has these values."""
        events: list[Object] = []
        while not events or any(events[-1].get(name) != value for name, value in wanted.items()):
            events.append(self.next())
        return events

    def answer(self, request_id: str | int, **request: Any) -> list[Object]:
        """All events of a generation."""
        self.send(request="generate", id=request_id, **request)
        return self.until(event="end", id=request_id)

    def end(self) -> int:
        assert self.process.stdin is not None
        self.process.stdin.close()
        return self.process.wait(60)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.process.kill()
        self.process.wait()
        self.may_read.set()
        self._reader.join()
        for stream in (self.process.stdin, self.process.stdout, self.process.stderr):
            assert stream is not None
            with contextlib.suppress(BrokenPipeError):
                stream.close()


@pytest.fixture(scope="module")
def engine() -> Iterator[Engine]:
    with Engine() as started:
        yield started


def text_of(events: list[Object], kind: str = "text") -> str:
    return "".join(event["text"] for event in events if event["event"] == kind)


# ---- what a host is told ----


def test_the_first_line_says_what_speaks(engine: Engine) -> None:
    assert engine.hello["event"] == "hello"
    assert engine.hello["protocol"] == 1
    assert engine.hello["pid"] == engine.process.pid
    assert engine.hello["model"]["architecture"] == "qwen3"
    assert engine.hello["limits"] == {"line_bytes": MAX_LINE, "queue": MAX_QUEUE}


def test_a_conversation_is_the_one_that_the_library_has(engine: Engine) -> None:
    with Model.open(demo_model_path()) as model, Chat(model, settings=SamplerSettings(seed=5)) as chat:
        messages: list[Object] = []
        reused = []
        for turn in (QUESTION[0]["content"], "And if he gives 19 away?"):
            expected = list(chat.send(turn))
            messages.append({"role": "user", "content": turn})
            settings = {"seed": 5, "temperature": 0.8, "min_p": 0.05}
            events = engine.answer(turn[:9], messages=messages, settings=settings, ids=True)
            kinds = [event["event"] for event in events]
            assert kinds[:2] == ["accepted", "started"]
            assert kinds.count("end") == 1
            reply = collect(expected)
            assert (text_of(events), text_of(events, "reasoning")) == (reply.text, reply.reasoning)
            ids = [token["id"] for event in events for token in event.get("tokens", ())]
            assert ids == [token.id for event in expected for token in event.tokens]
            end = events[-1]
            assert end["reason"] == "eog"
            assert end["usage"]["completion_tokens"] == len(ids)
            assert end["seed"] == 5
            reused.append(end["usage"]["reused_tokens"])
            messages.append({"role": "assistant", "content": reply.text})
        assert reused[1] > 0


def test_plain_text_settings_stops_and_numbers(engine: Engine) -> None:
    events = engine.answer("p", prompt="12 + 30 =", max_tokens=7, settings={"top_logprobs": 2, "temperature": 0})
    tokens = [token for event in events for token in event.get("tokens", ())]
    assert len(tokens) == 7
    assert all(len(token["top"]) == 2 and token["logprob"] <= 0 for token in tokens)
    assert events[-1]["reason"] == "length"
    whole = text_of(events)
    stop = whole[2:4]
    events = engine.answer("q", prompt="12 + 30 =", max_tokens=7, stop=[stop], settings={"temperature": 0})
    assert events[-1]["reason"] == "stop"
    assert events[-1]["stop"] == stop
    assert text_of(events) == whole[: whole.index(stop)]
    engine.send(request="count", id="c", prompt="12 + 30 =")
    counted = engine.until(event="count", id="c")[-1]
    assert counted["tokens"] == events[-1]["usage"]["prompt_tokens"]
    engine.send(request="stats", id="s")
    stats = engine.until(event="stats", id="s")[-1]
    assert stats["running"] is None
    assert stats["queued"] == []
    assert stats["totals"]["completion_tokens"] > 7
    assert stats["memory"]["kv_bytes"] > 0


def test_a_prompt_that_does_not_fit_is_an_error_and_shifting_is_told(engine: Engine) -> None:
    engine.send(request="generate", id="long", prompt="word " * 5000)
    error = engine.until(event="error", id="long")[-1]
    assert error["code"] == "context_full"
    assert "1024" in error["message"]
    messages = []
    for _ in range(60):
        messages += [*QUESTION, {"role": "assistant", "content": "48 + 27 = 75 apples."}]
    engine.send(request="generate", id="m", messages=[*messages, *QUESTION])
    assert engine.until(event="error", id="m")[-1]["code"] == "context_full"
    events = engine.answer("n", messages=[*messages, *QUESTION], overflow="shift", max_tokens=20)
    shifted = next(event for event in events if event["event"] == "shifted")
    assert shifted["dropped_messages"] % 2 == 0
    assert shifted["prompt_tokens"] <= 768
    assert events[-1]["reason"] in ("eog", "length")


# ---- lines that are no requests ----

GOOD: Object = {"request": "generate", "id": "g", "messages": QUESTION}
HOSTILE: list[tuple[bytes, str]] = [
    (b"not json", "bad_json"),
    (b"{", "bad_json"),
    (b'{"request":"stats","id":1}{}', "bad_json"),
    (b'{"request":"stats","id":NaN}', "bad_json"),
    (b'{"request":"stats","id":1,"id":2}', "bad_json"),
    (b'\xff\xfe{"request":"stats","id":1}', "bad_json"),
    (b'{"request":"stats","id":"\xc3"}', "bad_json"),
    (b'\xef\xbb\xbf{"request":"stats","id":1}', "bad_json"),
    (b"\x00", "bad_json"),
    (b"[" * 100_000, "bad_json"),
    (b'{"a":' * 50_000, "bad_json"),
    (b'{"request":"stats","id":1,"x":' + b"[" * 900 + b"]" * 900 + b"}", "bad_json"),
    (b"1" * 5000, "bad_json"),
    (b"[]", "bad_request"),
    (b'"stats"', "bad_request"),
    (b"null", "bad_request"),
    (b"{}", "bad_request"),
    (b'{"request":"stats"}', "bad_request"),
    (b'{"request":"stats","id":null}', "bad_request"),
    (b'{"request":"stats","id":true}', "bad_request"),
    (b'{"request":"stats","id":1.5}', "bad_request"),
    (b'{"request":"stats","id":""}', "bad_request"),
    (b'{"request":"stats","id":"%s"}' % (b"x" * 129), "bad_request"),
    (b'{"request":"stats","id":9007199254740992}', "bad_request"),
    (b'{"request":"stats","id":"\\ud800"}', "invalid_text"),
    (b'{"request":"load","id":1,"path":"a\\uDfff"}', "invalid_text"),
    (b'{"request":"stats","id":1,"more":2}', "bad_request"),
    (b'{"request":7,"id":1}', "bad_request"),
    (b'{"request":"__init__","id":1}', "unknown_request"),
    (b'{"request":"cancel","id":1}', "bad_request"),
    (b'{"request":"cancel","id":1,"target":"nobody"}', "not_found"),
    (b'{"request":"save","id":1,"path":""}', "bad_request"),
    (b'{"request":"save","id":1,"path":"a\\u0000b"}', "bad_request"),
    (b'{"request":"generate","id":1}', "bad_request"),
    (b'{"request":"generate","id":1,"prompt":""}', "bad_request"),
    (b'{"request":"generate","id":1,"prompt":"x","messages":[]}', "bad_request"),
    (b'{"request":"generate","id":1,"messages":[]}', "bad_request"),
    (b'{"request":"generate","id":1,"messages":[7]}', "bad_message"),
    (b'{"request":"generate","id":1,"messages":[{"role":"<|x|>","content":""}]}', "bad_message"),
    (b'{"request":"generate","id":1,"messages":[{"role":"user","content":{}}]}', "bad_message"),
    (b'{"request":"generate","id":1,"messages":[{"role":"user","content":"\\ud800"}]}', "invalid_text"),
    (b'{"request":"generate","id":1,"prompt":"x","settings":{"temprature":1}}', "bad_request"),
    (b'{"request":"generate","id":1,"prompt":"x","settings":{"temperature":-1}}', "bad_option"),
    (b'{"request":"generate","id":1,"prompt":"x","settings":{"seed":-1}}', "bad_option"),
    (b'{"request":"generate","id":1,"prompt":"x","settings":{"logit_bias":{"x":1}}}', "bad_request"),
    (b'{"request":"generate","id":1,"prompt":"x","settings":{"top_p":1e999}}', "bad_json"),
    (b'{"request":"generate","id":1,"prompt":"x","max_tokens":0}', "bad_request"),
    (b'{"request":"generate","id":1,"prompt":"x","max_tokens":99999999999999999999}', "bad_request"),
    (b'{"request":"generate","id":1,"prompt":"x","overflow":"shift"}', "bad_request"),
    (b'{"request":"generate","id":1,"prompt":"x","stop":""}', "bad_request"),
    (b'{"request":"generate","id":1,"prompt":"x","stop":[""]}', "bad_request"),
]


def test_each_hostile_line_is_an_error_event_and_costs_nothing_else(engine: Engine) -> None:
    engine.send(request="stats", id="before")
    engine.until(event="stats", id="before")
    for line, code in HOSTILE:
        engine.send_line(line)
        error = engine.next()
        assert (error["event"], error["code"]) == ("error", code), (line[:80], error)
        assert isinstance(error["line"], int)
        assert 10 < len(error["message"]) < 600
    assert engine.answer("after", messages=QUESTION)[-1]["reason"] == "eog"


def test_every_field_of_every_wrong_type_is_refused_by_name(engine: Engine) -> None:
    full = {
        **GOOD,
        "settings": {},
        "max_tokens": 3,
        "stop": ["x"],
        "think_budget": 5,
        "loop_limit": 9,
        "overflow": "stop",
        "ids": True,
        "parse_special": False,
    }
    wrong: dict[str, list[Any]] = {name: [7, "text", [], {}, 1.5, True] for name in full}
    right: dict[str, tuple[type, ...]] = {"request": (str,), "id": (str, int), "messages": (list,), "settings": (dict,)}
    right |= {"max_tokens": (int,), "stop": (list,), "think_budget": (int,), "loop_limit": (int,), "overflow": (str,)}
    right |= {"ids": (bool,), "parse_special": (bool,)}
    for name, values in wrong.items():
        for value in values:
            if type(value) in right[name]:
                continue
            engine.send(**{**full, name: value})
            error = engine.next()
            assert error["event"] == "error", (name, value)
            assert name in error["message"]
            assert error.get("field") == name


def test_a_line_too_long_is_not_kept_and_the_next_one_is_read(engine: Engine) -> None:
    engine.send_line(b'{"request":"generate","id":"huge","prompt":"' + b"x" * MAX_LINE + b'"}')
    assert engine.next()["code"] == "line_too_long"
    engine.send(request="stats", id="s2")
    assert engine.next()["event"] == "stats"


def test_mutated_lines_never_stop_the_engine(engine: Engine) -> None:
    rng = random.Random(4)
    base = json.dumps({**GOOD, "max_tokens": 2, "settings": {"temperature": 0.5}}).encode()
    for number in range(300):
        line = bytearray(base)
        for _ in range(rng.randint(1, 4)):
            at = rng.randrange(len(line))
            match rng.randrange(3):
                case 0:
                    line[at] = rng.randrange(256)
                case 1:
                    del line[at : at + rng.randint(1, 9)]
                case 2:
                    line[at:at] = bytes(rng.choices(b'{}[]",:\\u0123a\xc3b', k=rng.randint(1, 5)))
        engine.send_line(bytes(line).replace(b"\n", b" "))
        engine.send(request="stats", id=f"m{number}")
    engine.until(event="stats", id="m299")
    engine.send(request="stats", id="drained")
    while engine.until(event="stats", id="drained")[-1]["running"] is not None or engine.seen[-1]["queued"]:
        time.sleep(0.02)
        engine.send(request="stats", id="drained")
    assert engine.process.poll() is None
    assert not any(event.get("code") == "internal" for event in engine.seen)
    assert engine.answer("still here", messages=QUESTION)[-1]["reason"] == "eog"


# ---- cancel, queue, ids ----


@pytest.mark.parametrize("where", ["prefill", "decode"])
def test_cancel_stops_the_running_request_at_once_and_the_next_one_goes_on(where: str) -> None:
    long = "word " * 300 if where == "prefill" else "12"
    slow = {"SLOW": "0.05", "STUCK_ABOVE": "50"}
    with Engine(command=SLOW, env=slow) as engine:
        engine.send(request="generate", id="first", prompt=long)
        engine.send(request="generate", id="second", prompt="12", max_tokens=2)
        engine.until(event="started", id="first")
        if where == "decode":
            engine.until(event="text", id="first")
        else:
            time.sleep(0.3)
        start = time.monotonic()
        engine.send(request="cancel", id="c", target="first")
        events = engine.until(event="end", id="first")
        assert time.monotonic() - start < 1.0  # promised: 0.25 on a machine that is free
        assert events[-1]["reason"] == "cancelled"
        if not any(event["event"] == "ok" for event in events):
            engine.until(event="ok", id="c")
        assert engine.until(event="end", id="second")[-1]["reason"] == "length"


def test_waiting_requests_can_be_cancelled_ids_are_unique_and_the_queue_ends() -> None:
    with Engine(command=SLOW, env={"SLOW": "0.2", "STUCK_ABOVE": "50"}) as engine:
        engine.send(request="generate", id=0, prompt="word " * 300)
        engine.until(event="started", id=0)
        for number in range(1, MAX_QUEUE + 1):
            engine.send(request="generate", id=number, prompt="12", max_tokens=1)
            assert engine.until(event="accepted", id=number)[-1]["waiting"] == number
        engine.send(request="generate", id="x", prompt="12")
        assert engine.next()["code"] == "queue_full"
        engine.send(request="cancel", id="c", target=7)
        end, ok = engine.next(), engine.next()
        assert (end["event"], end["id"], end["reason"], end["usage"]) == ("end", 7, "cancelled", None)
        assert (ok["event"], ok["id"]) == ("ok", "c")
        engine.send(request="generate", id=9, prompt="12")
        assert engine.next()["code"] == "duplicate_id"
        engine.send(request="cancel", id="c", target=7)
        assert engine.next()["code"] == "not_found"
        for number in range(MAX_QUEUE + 1):
            if number != 7:
                engine.send(request="cancel", id="all", target=number)
        ends = {event["id"]: event["reason"] for event in engine.until(event="end", id=0) if event["event"] == "end"}
        while len(ends) < MAX_QUEUE:
            event = engine.next()
            if event["event"] == "end":
                ends[event["id"]] = event["reason"]
        assert set(ends.values()) == {"cancelled"}
        assert set(ends) == set(range(MAX_QUEUE + 1)) - {7}
        engine.send(request="generate", id=7, prompt="12", max_tokens=1)
        assert engine.until(event="end", id=7)[-1]["reason"] == "length"


# ---- the end ----


def test_a_host_that_closes_stdin_ends_everything() -> None:
    with Engine(command=SLOW, env={"STUCK_ABOVE": "50"}) as engine:
        engine.send(request="generate", id="a", prompt="word " * 300)
        engine.send(request="generate", id="b", prompt="12")
        engine.until(event="started", id="a")
        assert engine.end() == 0
        ends = {}
        while line := engine.lines.get(timeout=10):
            event = json.loads(line)
            if event["event"] == "end":
                ends[event["id"]] = event["reason"]
        assert ends == {"a": "cancelled", "b": "cancelled"}
        assert engine.process.stderr is not None
        assert engine.process.stderr.read() == b""


def test_finish_answers_what_was_asked_before_it_ends() -> None:
    with Engine() as engine:
        engine.send(request="generate", id="a", messages=QUESTION)
        engine.send(request="finish", id="f")
        engine.send(request="generate", id="b", prompt="12")
        events = engine.until(event="end", id="a")
        assert any(event["event"] == "error" and event["code"] == "finishing" for event in events)
        assert engine.process.wait(60) == 0  # though stdin is still open


@pytest.mark.parametrize("busy", [True, False])
def test_a_host_that_stops_reading_for_good_ends_the_engine_quietly(busy: bool) -> None:
    with subprocess.Popen(
        [*SLOW, "--demo", "--stream-json", "-t", "1"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=ENV | {"STUCK_ABOVE": "50"},
        cwd=ROOT,
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.readline()
        if busy:
            process.stdin.write(b'{"request":"generate","id":1,"prompt":"%s"}\n' % (b"word " * 300))
            process.stdin.flush()
            while b"started" not in process.stdout.readline():
                pass
        process.stdout.close()
        assert process.wait(60) == 141  # stdin is open, and a prompt is being read
        assert process.stderr.read() == b""


def test_a_host_that_does_not_read_makes_the_engine_wait_and_loses_nothing() -> None:
    with Engine() as engine:
        engine.may_read.clear()
        never = {str(token): "-inf" for token in Tokenizer.from_gguf(demo_model_path()).eog_ids}
        settings = {"top_logprobs": 300, "logit_bias": never}
        engine.send(request="generate", id="fat", prompt="12", max_tokens=900, settings=settings)
        used = [_cpu(engine.process.pid)]
        deadline = time.monotonic() + 30
        while len(used) < 4 or used[-1] != used[-4]:  # until it stands still
            assert time.monotonic() < deadline
            time.sleep(0.3)
            used.append(_cpu(engine.process.pid))
        engine.send(request="stats", id="s")  # is read all the same
        engine.may_read.set()
        events = engine.until(event="end", id="fat")
        n = sum(len(event.get("tokens", ())) for event in events)
        assert n == events[-1]["usage"]["completion_tokens"]
        assert n > host_module.MAX_UNREAD  # else it had no reason to wait
        if not any(event["event"] == "stats" for event in events):
            engine.until(event="stats", id="s")


def _cpu(pid: int) -> int:
    """Clock ticks."""
    fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    return int(fields[11]) + int(fields[12])


def test_a_model_that_does_not_open_is_an_event_and_an_exit_code(tmp_path: Path) -> None:
    command = [*RUN, str(tmp_path / "no.gguf"), "--stream-json"]
    done = subprocess.run(command, capture_output=True, env=ENV, cwd=ROOT, stdin=subprocess.DEVNULL, timeout=60)
    assert done.returncode == 1
    assert json.loads(done.stdout)["code"] == "file_not_found"
    assert b"no.gguf" in done.stderr


def test_what_was_read_can_be_kept_for_the_next_process(tmp_path: Path) -> None:
    path = str(tmp_path / "keys")
    with Engine() as engine:
        engine.answer("a", prompt="word " * 200, max_tokens=1)
        engine.send(request="save", id="s", path=path)
        saved = engine.until(event="ok", id="s")[-1]["tokens"]
    with Engine() as engine:
        engine.send(request="load", id="l", path=path)
        assert engine.until(event="ok", id="l")[-1]["tokens"] == saved
        usage = engine.answer("a", prompt="word " * 200, max_tokens=1)[-1]["usage"]
        assert usage["reused_tokens"] == usage["prompt_tokens"] - 1
        engine.send(request="load", id="l", path=str(tmp_path))
        assert engine.until(event="error", id="l")[-1]["code"] == "cannot_read"


@pytest.mark.parametrize(("args", "words"), [(["--json"], "--json"), (["--session", "x"], "--session")])
def test_options_that_a_request_says_itself_are_refused(args: list[str], words: str) -> None:
    command = [*RUN, "--demo", "--stream-json", *args]
    done = subprocess.run(command, capture_output=True, env=ENV, cwd=ROOT, stdin=subprocess.DEVNULL, timeout=60)
    assert done.returncode == 2
    assert words in done.stderr.decode()


# ---- lines ----


def lines_of(chunks: list[bytes], limit: int) -> list[bytes | None]:
    reader, writer = os.pipe()
    null = os.open(os.devnull, os.O_WRONLY)
    host = Host(reader, null)

    def feed() -> None:
        for chunk in chunks:
            os.write(writer, chunk)
            time.sleep(0.001)
        os.close(writer)

    thread = threading.Thread(target=feed)
    thread.start()
    try:
        return list(host.lines(limit))
    finally:
        thread.join()
        host.close()
        os.close(reader)
        os.close(null)


def test_lines_do_not_depend_on_how_they_arrive() -> None:
    data = b"one\r\n\ntwo\n" + b"x" * 10 + b"\n" + b"y" * 11 + b"\n" + b"z" * 30 + b"\nlast"
    expected = [b"one", b"", b"two", b"x" * 10, None, None, b"last"]
    rng = random.Random(1)
    cuts: list[list[int]] = [[], list(range(len(data))), *(sorted(rng.sample(range(len(data)), 5)) for _ in range(10))]
    for cut in cuts:
        edges = [0, *cut, len(data)]
        chunks = [data[a:b] for a, b in itertools.pairwise(edges) if a < b]
        assert lines_of(chunks, 10) == expected, cut
    assert lines_of([b"x" * 12], 10) == [None]
    assert lines_of([], 10) == []


def test_an_event_is_one_line_in_every_language() -> None:
    event = {"text": "a\nb\r\x85\u2028\u2029\x0b\x0c\ud800 é"}
    line = host_module._line(event).decode()
    assert len(line.splitlines()) == 1
    assert json.loads(line)["text"] == event["text"].replace("\ud800", "?")


def test_the_example_host_in_c_runs(tmp_path: Path) -> None:
    compiler = shutil.which(os.environ.get("CC", "cc"))
    assert compiler
    program = tmp_path / "stream_host"
    source = ROOT / "examples" / "stream_host.c"
    flags = ["-std=c99", "-D_POSIX_C_SOURCE=200809L", "-Wall", "-Wextra", "-Wpedantic", "-Werror"]
    subprocess.run([compiler, *flags, str(source), "-o", str(program)], check=True)
    command = [str(program), "What is 12 + 30?", *RUN, "--demo", "-s", "3"]
    done = subprocess.run(command, capture_output=True, env=ENV, cwd=ROOT, timeout=60)
    assert done.returncode == 0, done.stderr
    assert done.stdout == b"12 + 30 = 42\n"
    command = [str(program), 'quote " backslash \\ tab \t \u00e9', *RUN, "no such file"]
    done = subprocess.run(command, capture_output=True, env=ENV, cwd=ROOT, timeout=60)
    assert done.returncode == 1
    assert b"file_not_found" in done.stderr
