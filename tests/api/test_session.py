"""Sessions: one answer whatever the way there, and failures that lose nothing."""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

import pyengine
from pyengine import Cancelled, ContextFull, InvalidArgument, Model, NumericError, UnsupportedError
from pyengine.gguf_file import GgufFile
from pyengine.model import KvType
from tests.support import DATA, needs_data

PROMPT = [(7 * i * i + 3 * i) % 500 for i in range(300)]  # longer than one attention chunk of 256
FILES = [
    "stories260K-llama-256d-Q4_0.gguf",
    "stories260K-llama-256d-Q8_0.gguf",
    "stories260K-llama-256d-Q3_K_M.gguf",
    "stories260K-llama-256d-Q6_K.gguf",
    "stories260K-llama-256d-F16.gguf",
    "stories260K-qwen2-256d-Q4_K_M.gguf",
    "stories260K-qwen3-256d-Q4_K_M.gguf",
]


@pytest.fixture(scope="module")
def demo() -> Iterator[Model]:
    with Model.open(pyengine.demo_model_path()) as model:
        yield model


def all_logits(model: Model, pieces: list[list[int]], **options: object) -> bytes:
    with model.session(n_ctx=320, **options) as session:  # type: ignore[arg-type]
        return b"".join(session.eval(piece, all_logits=True).tobytes() for piece in pieces)


@needs_data
@pytest.mark.parametrize("name", FILES)
def test_logits_do_not_depend_on_threads_chunks_or_batches(name: str) -> None:
    with Model.open(DATA / "gguf" / name) as model:
        for kv_type in ("f16", "f32", "q8_0"):
            expected = all_logits(model, [PROMPT], threads=1, chunk=300, kv_type=kv_type)
            for threads, chunk in itertools.product((1, 2, 3, 4), (1, 2, 3, 7, 16, 64, 255, 256, 257)):
                if threads == 3 and chunk not in (2, 64):  # the full matrix is a target of its own
                    continue
                got = all_logits(model, [PROMPT], threads=threads, chunk=chunk, kv_type=kv_type)
                assert got == expected, f"{threads} threads, chunks of {chunk}, {kv_type}"
            cuts = [0, 1, 5, 6, 130, 256, 257, 300]
            pieces = [PROMPT[a:b] for a, b in itertools.pairwise(cuts)]
            assert all_logits(model, pieces, threads=2, kv_type=kv_type) == expected


@needs_data
@pytest.mark.parametrize("name", FILES)
def test_logits_of_a_q8_0_cache_are_close_to_those_of_f16(name: str) -> None:
    with Model.open(DATA / "gguf" / name) as model:

        def logits(kv_type: KvType) -> np.ndarray:
            with model.session(n_ctx=320, kv_type=kv_type) as session:
                return session.eval(PROMPT, all_logits=True).astype(np.float64)

        exact, half, eight = logits("f32"), logits("f16"), logits("q8_0")

    def error(x: np.ndarray) -> float:
        return float(np.sqrt(np.mean((x - exact) ** 2) / np.mean(exact**2)))

    assert error(eight) < 0.02
    assert error(eight) > error(half)  # it is another cache: 8 bits cannot be as good as 11


@needs_data
def test_a_q8_0_cache_needs_head_dimensions_of_whole_blocks() -> None:
    with Model.open(DATA / "gguf" / "stories260K-llama-F32.gguf") as model:
        with pytest.raises(UnsupportedError, match="multiples of 32; this model has one of 8: use an F16 cache"):
            model.session(kv_type="q8_0")
        with pytest.raises(UnsupportedError, match="multiples of 32"):
            model.session_bytes(kv_type="q8_0")


@needs_data
@pytest.mark.parametrize("name", FILES[::3])
def test_logits_do_not_depend_on_where_the_cache_is_hit(name: str) -> None:
    with Model.open(DATA / "gguf" / name) as model, model.session(n_ctx=320, threads=2) as session:
        expected = session.eval(PROMPT).tobytes()
        for cut in (1, 2, 17, 255, 256, 257, 298):
            other = [*PROMPT[:cut], 499 - PROMPT[cut], 3, 1]
            session.truncate(0)
            session.eval(other)
            assert session.reuse(PROMPT) == cut
            assert session.eval(PROMPT[cut:]).tobytes() == expected, f"cache hit after {cut} tokens"


@needs_data
def test_logits_are_the_same_for_every_chunk_size_and_every_cache_hit_point() -> None:
    with Model.open(DATA / "gguf" / FILES[5], prefix_bytes=0) as model, model.session(n_ctx=320, threads=2) as session:
        expected = session.eval(PROMPT).tobytes()
        for chunk in range(1, len(PROMPT) + 1):
            with model.session(n_ctx=320, threads=1 + chunk % 4, chunk=chunk) as other:
                assert other.eval(PROMPT).tobytes() == expected, f"chunks of {chunk}"
        for cut in range(1, len(PROMPT)):
            session.truncate(0)
            session.prefill([*PROMPT[:cut], 499 - PROMPT[cut]])  # no id is its own mirror image
            assert session.reuse(PROMPT) == cut
            assert session.eval(PROMPT[cut:]).tobytes() == expected, f"cache hit after {cut} tokens"


@needs_data
def test_logits_do_not_depend_on_mapping_or_copying() -> None:
    path = DATA / "gguf" / FILES[5]
    with Model.open(path) as mapped, Model.open(path, copy=True) as copied:
        assert all_logits(mapped, [PROMPT]) == all_logits(copied, [PROMPT])


def test_truncate_and_reuse_keep_exactly_what_they_say(demo: Model) -> None:
    with demo.session(n_ctx=64, threads=1) as session:
        session.prefill([1, 2, 3, 4, 5])
        assert session.tokens == [1, 2, 3, 4, 5]
        session.truncate(3)
        assert len(session) == 3
        with pytest.raises(InvalidArgument, match="holds 3"):
            session.truncate(4)
        assert session.reuse([1, 2, 9]) == 2
        assert session.tokens == [1, 2]
        assert session.reuse([1, 2]) == 1  # something must be left to evaluate
        with pytest.raises(InvalidArgument):
            session.reuse([])


def test_impossible_tokens_are_refused_and_change_nothing(demo: Model) -> None:
    with demo.session(n_ctx=16, threads=1) as session:
        session.prefill([1, 2])
        for bad in ([-1], [demo.n_vocab], [3, 2**31 - 1], [2**40]):
            with pytest.raises(InvalidArgument):
                session.eval(bad)
        with pytest.raises(InvalidArgument, match="empty"):
            session.eval([])
        with pytest.raises(ContextFull, match="16 tokens is full: it holds 2, and 15 more"):
            session.eval([1] * 15)
        assert session.tokens == [1, 2]
        session.eval([1] * 14)


def test_a_second_thread_gets_an_error_not_a_corrupted_cache(demo: Model) -> None:
    with demo.session(n_ctx=2048, threads=1, chunk=64) as session:
        started = threading.Event()

        def work() -> None:
            started.set()
            session.prefill([5] * 2000)

        worker = threading.Thread(target=work)
        worker.start()
        started.wait()
        refused = False
        while worker.is_alive() and not refused:
            try:
                session.reuse([5] * 10)
            except InvalidArgument as e:
                refused = e.code == "busy"
        session.cancel() if not refused else None
        worker.join()
        assert refused


def test_idle_sessions_of_two_models_use_no_cpu_time_and_change_no_answer(demo: Model) -> None:
    with Model.open(pyengine.demo_model_path()) as other, demo.session(threads=2) as a, other.session(threads=3) as b:
        for _ in range(3):
            for session in (a, b):
                session.eval([1, 2, 3])
        other.tokenizer  # noqa: B018 - the thread that builds it has ended then
        time.sleep(0.05)
        before = time.process_time()
        time.sleep(0.5)
        assert time.process_time() - before < 0.02
        assert a.eval([5, 6]).tobytes() == b.eval([5, 6]).tobytes()


def test_cancel_from_another_thread_stops_a_prefill_and_keeps_whole_chunks(demo: Model) -> None:
    with demo.session(n_ctx=8192, threads=2, chunk=32) as session:
        stopper = threading.Timer(0.05, session.cancel)
        stopper.start()
        cancelled = False
        for _ in range(1000):
            session.truncate(0)
            try:
                session.prefill([7] * 8000)
            except Cancelled:
                cancelled = True
                break
        stopper.join()
        assert cancelled
        kept = len(session)
        assert kept % 32 == 0
        with demo.session(n_ctx=8192, threads=1) as fresh:
            fresh_logits = fresh.eval([7] * (kept + 1))
        assert session.eval([7]).tobytes() == fresh_logits.tobytes()


def test_cancel_before_an_eval_is_met_by_it_and_can_be_taken_back(demo: Model) -> None:
    with demo.session(n_ctx=32, threads=1) as session:
        session.cancel()
        with pytest.raises(Cancelled):
            session.eval([1])
        session.eval([1])  # the request was consumed
        session.cancel()
        session.clear_cancel()
        session.eval([1])


def test_closing_while_generating_is_safe(demo: Model) -> None:
    session = demo.session(n_ctx=8192, threads=2, chunk=64)
    outcome: list[str] = []

    def work() -> None:
        try:
            session.prefill([3] * 8000)
            outcome.append("finished")
        except Cancelled:
            outcome.append("cancelled")

    worker = threading.Thread(target=work)
    worker.start()
    time.sleep(0.02)
    session.close()
    worker.join()
    assert outcome in (["cancelled"], ["finished"])
    with pytest.raises(InvalidArgument, match="closed"):
        session.eval([1])


def test_a_closed_model_leaves_its_sessions_alive() -> None:
    model = Model.open(pyengine.demo_model_path())
    session = model.session(n_ctx=32, threads=1)
    before = session.eval([1, 2, 3])
    session.truncate(0)
    model.close()
    assert session.eval([1, 2, 3]).tobytes() == before.tobytes()
    with pytest.raises(InvalidArgument, match="closed"):
        model.session()
    session.close()


def test_damaged_weights_are_an_error_never_a_sample(tmp_path: Path) -> None:
    source = pyengine.demo_model_path()
    damaged = bytearray(source.read_bytes())
    with GgufFile.open(source, load="header") as file:
        tensor = file.tensors["blk.0.ffn_down.weight"]
    damaged[tensor.offset : tensor.offset + 2] = b"\x00\x7e"  # the first block's scale becomes NaN
    path = tmp_path / "damaged.gguf"
    path.write_bytes(damaged)
    with Model.open(path) as model, model.session(n_ctx=32, threads=1) as session:
        with pytest.raises(NumericError, match="download it again"):
            session.eval([1, 2, 3])
        assert len(session) == 0


def test_options_out_of_range_are_named(demo: Model) -> None:
    with pytest.raises(InvalidArgument, match=r"threads is 100000; expected 0\.\.512"):
        demo.session(threads=100000)
    with pytest.raises(InvalidArgument, match="n_ctx"):
        demo.session(n_ctx=2**31)
    with pytest.raises(InvalidArgument, match="kv_type is 'q3'"):
        demo.session(kv_type="q3")  # type: ignore[arg-type]
    with pytest.raises(InvalidArgument, match="rope_attn_scale"):
        Model.open(pyengine.demo_model_path(), rope_attn_scale=1.5)


def test_session_bytes_are_what_the_formula_says(demo: Model) -> None:
    kv, scratch = demo.session_bytes(n_ctx=1000, kv_type="f16")
    head = demo.head_dim_k + demo.head_dim_v
    assert kv == demo.n_layers * demo.n_kv_heads * 1000 * head * 2
    assert 0 < scratch < 64 << 20
    assert demo.session_bytes(n_ctx=1000, kv_type="f32")[0] == 2 * kv
    assert demo.session_bytes(n_ctx=1000, kv_type="q8_0")[0] == kv // 64 * 34  # 32 elements in 34 bytes


def test_loading_reports_progress_and_can_be_stopped() -> None:
    seen: list[float] = []
    Model.open(pyengine.demo_model_path(), copy=True, progress=seen.append).close()
    assert seen == sorted(seen)
    assert seen[0] == 0.0
    assert seen[-1] == 1.0
    with pytest.raises(Cancelled):
        Model.open(pyengine.demo_model_path(), progress=lambda _: False)

    def broken(_: float) -> None:
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        Model.open(pyengine.demo_model_path(), progress=broken)


def test_greedy_decoding_equals_one_prefill(demo: Model) -> None:
    with demo.session(n_ctx=128, threads=2) as step, demo.session(n_ctx=128, threads=1) as whole:
        ids = [1, 2, 3]
        rows = [step.eval(ids)]
        for _ in range(60):
            ids.append(int(np.argmax(rows[-1])))
            rows.append(step.eval(ids[-1:]))
        assert np.array_equal(whole.eval(ids, all_logits=True)[2:], np.stack(rows))
