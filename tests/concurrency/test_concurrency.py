"""Threads, event loops, forks and the end of the interpreter. ``make concurrency`` runs the native part in full."""

from __future__ import annotations

import asyncio
import os
import random
import re
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest

import pyengine
from pyengine import Chat, End, InvalidArgument, Model
from pyengine.errors import Cancelled
from pyengine.generate import Event, collect
from pyengine.sampling import SamplerSettings
from tests.support import ROOT, comparisons, run_check

GREEDY = SamplerSettings(temperature=0.0)
QUESTIONS = ["What is 12 + 30?", "What is 12 + 31?", "Tom has 48 apples and buys 27 more. How many?"]


@pytest.fixture(scope="module")
def demo() -> Iterator[Model]:
    with Model.open(pyengine.demo_model_path()) as model:
        yield model


def chat_of(model: Model) -> Chat:
    return Chat(model, session=model.session(n_ctx=1024, threads=2), settings=GREEDY, max_tokens=60)


def answer(model: Model, question: str) -> str:
    chat = chat_of(model)
    try:
        return str(collect(chat.send(question)))
    finally:
        chat.session.close()


@pytest.mark.as_built  # forks while threads allocate: the sanitizer's allocator hangs in the child (gcc before 14)
def test_threads_cancels_destructions_forks_and_changed_files_through_the_c_interface() -> None:
    counts = {"generations": 100, "cancels": 90, "destroys": 40, "cycles": 60, "forks": 16, "changes": 12}
    counted = [f"{name}={count}" for name, count in counts.items()]
    assert comparisons(run_check("concurrency_check", pyengine.demo_model_path(), *counted)) > 200


def test_two_chats_of_one_model_in_two_threads_answer_as_each_alone(demo: Model) -> None:
    alone = [answer(demo, question) for question in QUESTIONS]
    assert len(set(alone)) == len(alone)
    wrong: list[str] = []

    def converse(first: int) -> None:
        for i in range(6):
            which = (first + i) % len(QUESTIONS)
            if answer(demo, QUESTIONS[which]) != alone[which]:
                wrong.append(QUESTIONS[which])

    threads = [threading.Thread(target=converse, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_other_threads_run_while_the_engine_computes(demo: Model) -> None:
    with demo.session(n_ctx=8192, threads=1) as session:
        done = threading.Event()
        worker = threading.Thread(target=lambda: (session.prefill([5] * 8000), done.set()))
        ticks = 0
        worker.start()
        while not done.is_set():
            ticks += 1  # holding the lock for one eval would let nobody count
            time.sleep(0)
        worker.join()
    assert ticks > 100


def test_closing_a_session_from_another_thread_at_any_instant_is_safe(demo: Model) -> None:
    rng = random.Random(1)
    for _ in range(40):
        session = demo.session(n_ctx=2048, threads=2)
        ended: list[BaseException] = []

        def work(session: Any = session, ended: list[BaseException] = ended) -> None:
            try:
                while True:
                    session.prefill([5] * 300)
                    session.eval([6, 7])
                    session.truncate(0)
            except (Cancelled, InvalidArgument) as error:
                ended.append(error)

        worker = threading.Thread(target=work)
        worker.start()
        time.sleep(rng.uniform(0, 0.02))
        session.close()
        worker.join(60)
        assert not worker.is_alive()
        assert len(ended) == 1
        assert isinstance(ended[0], Cancelled) or ended[0].code == "closed"  # type: ignore[attr-defined]


# --- event loops ------------------------------------------------------------------------------------------------------


def recipe() -> Callable[[Chat, str], Any]:
    """The function that docs/generation.md shows."""
    text = (ROOT / "docs" / "generation.md").read_text()
    [code] = re.findall(r"```python\n(import asyncio\n.*?)```", text, re.S)
    names: dict[str, Any] = {}
    exec(code, names)
    return names["answer"]  # type: ignore[no-any-return]


def test_the_documented_way_to_generate_in_an_event_loop(demo: Model) -> None:
    stream = recipe()
    expected = [answer(demo, question) for question in QUESTIONS]

    async def one(question: str) -> str:
        chat = chat_of(demo)
        events: list[Event] = [event async for event in stream(chat, question)]
        assert isinstance(events[-1], End)
        chat.session.close()
        return str(collect(events))

    async def main() -> None:
        beats = 0

        async def heart() -> None:
            nonlocal beats
            while True:
                beats += 1
                await asyncio.sleep(0)

        heartbeat = asyncio.create_task(heart())
        assert await asyncio.gather(*map(one, QUESTIONS)) == expected
        heartbeat.cancel()
        assert beats > 100  # the loop was never blocked for an answer

    asyncio.run(main())


@pytest.mark.parametrize("way", ["task", "timeout", "break"])
def test_leaving_an_event_loops_generation_cancels_it_and_the_chat_goes_on(demo: Model, way: str) -> None:
    stream = recipe()

    async def main() -> None:
        chat = Chat(demo, session=demo.session(n_ctx=4096, threads=1), settings=GREEDY)
        long = "What is 1 + 2? " * 400

        async def read() -> None:
            async for _ in (events := stream(chat, long)):
                if way == "break":
                    break
            await events.aclose()

        task = asyncio.create_task(read())
        if way == "break":
            await task
        elif way == "task":
            await asyncio.sleep(0.01)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
        else:
            with pytest.raises(TimeoutError):
                await asyncio.wait_for(task, 0.01)
        chat.clear()
        events = [event async for event in stream(chat, QUESTIONS[0])]
        assert isinstance(events[-1], End)
        assert events[-1].reason in ("eog", "length")
        chat.session.close()

    asyncio.run(main())


# --- the end of the interpreter ---------------------------------------------------------------------------------------

PREPARE = """
import sys, threading, time, random
import pyengine
from pyengine import Chat, Model
from pyengine.generate import generate
model = Model.open(pyengine.demo_model_path())
session = model.session(n_ctx=4096, threads=2)
delay = float(sys.argv[1])
def forever(work):
    def loop():
        try:
            while True:
                work()
        except pyengine.EngineError:
            pass
    return loop
def daemon(work):
    threading.Thread(target=forever(work), daemon=True).start()
def evaluate():
    session.prefill([5] * 300); session.eval([6, 7]); session.truncate(0)
"""
ENDINGS = {
    "objects alive": "logits = session.eval([1, 2]); chat = Chat(model); data = model.file.data('output_norm.weight')",
    "half an answer": "events = generate(session, 'What is 2 + 3?', max_tokens=50); next(events)",
    "a daemon evaluates": "daemon(evaluate); time.sleep(delay)",
    "many daemons": (
        "for _ in range(6):\n"
        "    s = model.session(n_ctx=512, threads=1)\n"
        "    daemon(lambda s=s: (s.eval([5] * 20), s.truncate(0)))\n"
        "time.sleep(delay)"
    ),
    "a daemon opens models": (
        "daemon(lambda: Model.open(pyengine.demo_model_path(), copy=True, progress=lambda f: None).close())\n"
        "time.sleep(delay)"
    ),
    "a daemon generates": (
        "daemon(lambda: list(generate(session, 'What is 2 + 3?', max_tokens=50))); time.sleep(delay)"
    ),
    "an exception": "daemon(evaluate); time.sleep(delay); sys.exit(0)",
    "a thread that is waited for": (
        "threading.Thread(target=forever(evaluate)).start(); time.sleep(delay); session.close()"
    ),
    "cancelled at exit": (
        "import atexit; t = threading.Thread(target=forever(evaluate)); t.start()\n"
        "threading._register_atexit(session.cancel); time.sleep(delay)"
    ),
}


@pytest.mark.parametrize("ending", list(ENDINGS))
def test_the_interpreter_ends_quietly_whatever_is_alive(ending: str) -> None:
    rng = random.Random(ending)
    for _ in range(3):
        command = [sys.executable, "-c", PREPARE + ENDINGS[ending], str(rng.uniform(0, 0.05))]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
        assert (done.returncode, done.stdout, done.stderr) == (0, "", ""), ending


# --- forks ------------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
def test_a_fork_while_another_thread_generates_works_in_both_processes(demo: Model) -> None:
    expected = answer(demo, QUESTIONS[0])
    stop = threading.Event()
    wrong: list[str] = []

    def generate_on() -> None:
        while not stop.is_set():
            if answer(demo, QUESTIONS[0]) != expected:
                wrong.append("parent")

    worker = threading.Thread(target=generate_on)
    worker.start()
    try:
        for _ in range(4):
            time.sleep(random.uniform(0, 0.05))
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", DeprecationWarning)  # a fork among threads: what is tested
                child = os.fork()
            if child == 0:
                code = 1
                try:
                    with demo.session(n_ctx=256, threads=2) as session:
                        ids = demo.tokenizer.encode(QUESTIONS[0])
                        code = 0 if session.eval(ids).size == demo.n_vocab else 2
                finally:
                    os._exit(code)
            assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    finally:
        stop.set()
        worker.join()
    assert not wrong
