"""The plan is what then happens: sizes against arithmetic, files, real sessions and the memory of a process."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import gguf
import numpy as np
import pytest

import pyengine
from benchmarks import plan_memory
from benchmarks.make_model import make_model
from pyengine import FileError, FormatError, InvalidArgument, Model, UnsupportedError, planner, quant, synthetic
from pyengine.memory import available_memory
from pyengine.model import KvType, shape_bytes
from pyengine.recipe import Facts, find_recipe
from pyengine.shape import CARDS, Shape, from_config
from tests.support import DATA, needs_data

GIB = 2**30
K = 1024
RAM = 18 * GIB  # 16 GiB to plan with
PUBLISHED = {
    "r1-distill-llama-8b": "DeepSeek-R1-Distill-Llama-8B",
    "r1-0528-qwen3-8b": "DeepSeek-R1-0528-Qwen3-8B",
    "r1-distill-qwen-1.5b": "DeepSeek-R1-Distill-Qwen-1.5B",
    "r1-distill-qwen-7b": "DeepSeek-R1-Distill-Qwen-7B",
    "r1-distill-qwen-14b": "DeepSeek-R1-Distill-Qwen-14B",
    "r1-distill-qwen-32b": "DeepSeek-R1-Distill-Qwen-32B",
}


# --- KV cache: by hand ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("card", "layers", "kv_heads", "head_dim"),
    [
        ("r1-8b-card", 40, 64, 64),
        ("r1-distill-llama-8b", 32, 8, 128),
        ("r1-0528-qwen3-8b", 36, 8, 128),
        ("r1-distill-qwen-1.5b", 28, 2, 128),
        ("r1-distill-qwen-7b", 28, 4, 128),
        ("r1-distill-qwen-14b", 48, 8, 128),
        ("r1-distill-qwen-32b", 64, 8, 128),
    ],
)
def test_the_cache_of_every_card_is_what_arithmetic_says(card: str, layers: int, kv_heads: int, head_dim: int) -> None:
    plan = pyengine.plan(card, quantisations=["Q4_0"], ram=RAM)
    assert len(plan.contexts) >= 6
    for context in plan.contexts:
        elements = 2 * layers * kv_heads * head_dim * context  # keys and values
        assert plan.cell("Q4_0", context, "f16").memory.kv == elements * 2
        assert plan.cell("Q4_0", context, "q8_0").memory.kv == elements // 32 * 34  # 32 int8 and a float16 scale


def test_the_card_needs_39_4_gib_of_cache_at_63k_and_its_advice_says_that_no_16_gib_machine_runs_that() -> None:
    plan = pyengine.plan("r1-8b-card", quantisations=["Q4_K_M"], ram=16 * GIB)
    cell = plan.cell("Q4_K_M", 63 * K)
    assert cell.memory.kv == 640 * K * 63 * K
    assert round(cell.memory.kv / GIB, 1) == 39.4
    assert cell.verdict == "no"
    assert cell.machine == 48
    assert any("640 KiB" in sentence for sentence in plan.advice)


# --- weights --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["f16", "q8_0", "q6_k", "q5_k_m", "q4_k_m", "q4_k_s", "q4_0"])
def test_weights_of_a_recipe_are_the_bytes_of_a_file_of_it(tmp_path: Path, kind: str) -> None:
    """A file with two of the layers, as the gguf package reads it."""
    for card in ("r1-8b-card", "r1-distill-llama-8b", "r1-0528-qwen3-8b", "r1-distill-qwen-1.5b"):
        shape = dataclasses.replace(CARDS[card], layers=2, embd=512, ff=768, vocab=1000)
        table = synthetic.table(shape, kind)
        with open(tmp_path / "model.gguf", "wb") as file:
            assert synthetic.write(file, shape, table) == synthetic.size(shape, table)
        tensors = gguf.GGUFReader(tmp_path / "model.gguf").tensors
        expected = sum(rows * cols // block * size for rows, cols, block, size in map(_blocks, tensors))
        plan = pyengine.plan(tmp_path / "model.gguf", quantisations=[kind], contexts=[K], ram=RAM)
        assert plan.rows[0].weights == plan.rows[1].weights == sum(t.n_bytes for t in tensors) == expected
        assert plan.rows[1].bits == pytest.approx(8 * expected / sum(t.n_elements for t in tensors))


def _blocks(tensor: gguf.ReaderTensor) -> tuple[int, int, int, int]:
    block, size = gguf.GGML_QUANT_SIZES[tensor.tensor_type]
    return tensor.n_elements // int(tensor.shape[0]), int(tensor.shape[0]), block, size


def test_published_sizes_of_llama_8b_are_met() -> None:
    """GiB of files as they are published, which hold the vocabulary, too."""
    plan = pyengine.plan("r1-distill-llama-8b", contexts=[K], ram=RAM)
    sizes = {row.quantisation: row.weights / GIB for row in plan.rows}
    for name, published in {
        "F16": 14.96,
        "Q8_0": 7.95,
        "Q6_K": 6.14,
        "Q5_K_M": 5.33,
        "Q4_K_M": 4.58,
        "Q2_K": 2.95,
    }.items():
        assert sizes[name] == pytest.approx(published, abs=0.02), name


@needs_data
@pytest.mark.parametrize(
    ("name", "kind"),
    [(f"stories260K-llama-256d-{k}", k) for k in ("Q2_K", "Q3_K_M", "Q4_0", "Q4_K_M", "Q5_K_M", "Q6_K", "Q8_0", "F16")]
    + [(f"stories260K-{a}-256d-{k}", k) for a in ("qwen2", "qwen3") for k in ("Q4_K_M", "Q8_0")],
)
def test_recipes_are_those_of_files_that_llama_cpp_wrote(name: str, kind: str) -> None:
    plan = pyengine.plan(DATA / "gguf" / f"{name}.gguf", quantisations=[kind], contexts=[256], ram=RAM)
    own, recipe = plan.rows
    assert own.quantisation == planner.THIS_FILE
    assert recipe.weights == own.weights


def test_a_row_that_is_no_whole_number_of_blocks_falls_back() -> None:
    facts = Facts("qwen2", 24, 7, tied=True)
    assert find_recipe("q4_k_m").format_of("blk.3.attn_q.weight", (896, 896), facts) == "Q5_0"
    assert find_recipe("Q6_K").format_of("blk.3.attn_q.weight", (896, 896), facts) == "Q8_0"
    assert find_recipe("Q4_0").format_of("blk.3.attn_q.weight", (72, 72), facts) == "F16"


# --- shapes ---------------------------------------------------------------------------------------------------------


@needs_data
@pytest.mark.parametrize("card", PUBLISHED)
def test_cards_are_the_published_configurations(card: str) -> None:
    path = DATA / "configs" / f"{PUBLISHED[card]}.config.json"
    read, built_in = from_config(path), CARDS[card]
    same = {f: getattr(built_in, f) for f in Shape.__dataclass_fields__ if f != "merges"}
    assert {f: getattr(read, f) for f in same} == same
    converter = _hyper(path)
    for field in ("vocab", "embd", "ff", "layers", "heads", "kv_heads", "head_dim", "context", "tied"):
        assert getattr(read, field) == getattr(converter, field), field
    symbols = [(t.gguf, tuple(converter.size(s) for s in t.shape)) for t in converter.arch.tensors(converter)]
    assert sorted(t for t in read.tensors() if t[0] != "rope_freqs.weight") == sorted(symbols)


def _hyper(path: Path):  # type: ignore[no-untyped-def]
    from pyengine_convert.architectures import read_hyper
    from pyengine_convert.source import Config, read_json

    return read_hyper(Config(read_json(path), str(path)))


GOOD = {
    "architectures": ["LlamaForCausalLM"], "hidden_size": 256, "num_attention_heads": 4, "num_hidden_layers": 2,
    "intermediate_size": 512, "vocab_size": 1000, "max_position_embeddings": 4096,
}  # fmt: skip


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            {"architectures": ["GPT2LMHeadModel"]},
            'architectures is ["GPT2LMHeadModel"]; expected one of LlamaForCausalLM',
        ),
        ({"hidden_size": None}, "hidden_size is missing; expected an integer"),
        ({"num_hidden_layers": "40"}, 'num_hidden_layers is "40"; expected an integer from 1 to 512'),
        ({"num_hidden_layers": True}, "num_hidden_layers is true; expected"),
        ({"num_key_value_heads": 3}, "num_key_value_heads is 3; expected a divisor of 4"),
        ({"hidden_size": 255}, "num_attention_heads is 4; expected a divisor of 255"),
        ({"vocab_size": 10**9}, "vocab_size is 1000000000; expected"),
    ],
)
def test_a_config_that_cannot_be_planned_is_refused_by_key(tmp_path: Path, change: dict, words: str) -> None:
    path = tmp_path / "config.json"
    path.write_text(json.dumps(GOOD))
    assert from_config(tmp_path).kv_heads == 4  # all heads, where it says nothing
    path.write_text(json.dumps(GOOD | change))
    with pytest.raises((FormatError, UnsupportedError)) as refused:
        pyengine.plan(path, ram=RAM)
    assert words in str(refused.value)


def test_what_is_no_model_is_refused_with_what_was_found_and_expected(tmp_path: Path) -> None:
    (tmp_path / "broken.json").write_text("{")
    (tmp_path / "list.json").write_text("[]")
    cases: list[tuple[object, type[Exception], str]] = [
        ("r1-9b", InvalidArgument, "cards: r1-8b-card, r1-distill-llama-8b"),
        (tmp_path / "none.gguf", FileError, "none.gguf"),
        (tmp_path / "none.json", FileError, "none.json"),
        (tmp_path / "broken.json", FormatError, "not valid JSON"),
        (tmp_path / "list.json", FormatError, "holds a JSON list; expected an object"),
    ]
    for model, kind, words in cases:
        with pytest.raises(kind, match=words):
            pyengine.plan(model, ram=RAM)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"contexts": [65537]}, "a context of 65537 tokens; expected 1..65536"),
        ({"contexts": [0]}, "expected 1..65536"),
        ({"quantisations": ["Q4_X"]}, "unknown type 'Q4_X'; known are F32"),
        ({"quantisations": []}, "no quantisation"),
        ({"kv_types": ["q4_0"]}, "a KV type is 'q4_0'; expected f16"),
        ({"ram": 2 * GIB}, "ram is 2 GiB; expected more than 2"),
        ({"threads": 513}, "threads is 513"),
    ],
)
def test_impossible_options_are_refused_with_their_range(options: dict, words: str) -> None:
    with pytest.raises(InvalidArgument) as refused:
        pyengine.plan("r1-8b-card", **({"ram": RAM} | options))
    assert words in str(refused.value)


# --- the same code plans and allocates -------------------------------------------------------------------------------


def shape_of(model: Model) -> dict[str, int]:
    names = ("n_ctx_train", "n_layers", "n_embd", "n_heads", "n_kv_heads", "n_ff")
    return {name: getattr(model, name) for name in names} | {"head_dim": model.head_dim_k}


def test_a_shape_needs_what_a_session_of_that_model_allocates() -> None:
    files = [pyengine.demo_model_path(), *(sorted((DATA / "gguf").glob("*.gguf")) if DATA.is_dir() else ())]
    compared = 0
    for file in files:
        with Model.open(file, tokenizer_ahead=False) as model:
            for kv in ("f16", "f32", "q8_0"):
                if kv == "q8_0" and model.head_dim_k % 32:
                    continue
                for n_ctx, threads in ((0, 1), (300, 2), (model.n_ctx_train, 7)):
                    got = shape_bytes(**shape_of(model), n_ctx=n_ctx, threads=threads, kv_type=kv)
                    assert got == model.session_bytes(n_ctx=n_ctx, threads=threads, kv_type=kv)
                    compared += 1
    assert compared >= 9


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"n_layers": 0}, "n_layers is 0; expected 1..512"),
        ({"n_kv_heads": 3}, "n_kv_heads must divide n_heads"),
        ({"n_embd": 2**21}, "n_embd is 2097152; expected 1..1048576"),
        ({"head_dim": 2**20}, "head_dim_k is 1048576"),
        ({"n_ff": 2**40}, "expected 0..2^32-1"),
    ],
)
def test_an_impossible_shape_is_refused_by_name(change: dict[str, int], words: str) -> None:
    shape = {
        "n_ctx_train": 4096,
        "n_layers": 2,
        "n_embd": 256,
        "n_heads": 4,
        "n_kv_heads": 2,
        "n_ff": 512,
        "head_dim": 64,
    }
    with pytest.raises(InvalidArgument) as refused:
        shape_bytes(**(shape | change))
    assert words in str(refused.value)


@pytest.mark.as_built
@pytest.mark.skipif(not Path("/proc/self/smaps").exists(), reason="only Linux says what a process uses")
@pytest.mark.parametrize(
    ("arch", "heads", "kv_heads", "kind", "n_ctx", "kv"),
    [
        ("llama", 16, 16, "Q8_0", 512, "f16"),
        ("llama", 16, 16, "Q4_K_M", 1536, "q8_0"),
        ("qwen3", 16, 4, "Q4_0", 2048, "f16"),
    ],
)
def test_a_process_takes_the_memory_that_was_planned(
    tmp_path: Path, arch: str, heads: int, kv_heads: int, kind: str, n_ctx: int, kv: KvType
) -> None:
    """A text that fills the context; heads like the large models', so that its cache dominates, as a long one's does.

    ``benchmarks/plan_memory.py`` does the same for large files.
    """
    path = tmp_path / "model.gguf"
    make_model(path, Shape("small", arch, 16, 256, 512, heads, kv_heads, 128, 2000, 4096), kind)
    used = plan_memory.use(path, n_ctx, kv, fill=True)
    assert used.planned_anonymous == pytest.approx(used.anonymous, rel=0.02, abs=2 << 20)
    assert used.planned_mapped == pytest.approx(used.mapped, rel=0.02)


# --- verdicts, machines, advice --------------------------------------------------------------------------------------


def test_verdicts_follow_the_memory_that_is_there() -> None:
    needed = pyengine.plan("r1-distill-qwen-7b", quantisations=["Q4_0"], contexts=[4 * K], ram=RAM)
    total = needed.cell("Q4_0", 4 * K).memory.total
    for spare, verdict in ((-1, "no"), (0, "tight"), (GIB // 2 - 1, "tight"), (GIB // 2, "fits")):
        ram = 2 * GIB + total + spare
        plan = pyengine.plan("r1-distill-qwen-7b", quantisations=["Q4_0"], contexts=[4 * K], ram=ram)
        assert plan.cell("Q4_0", 4 * K).verdict == verdict


def test_the_largest_context_fits_and_256_tokens_more_do_not() -> None:
    for ram in (8, 12, 16, 24, 64):
        plan = pyengine.plan("r1-distill-llama-8b", quantisations=["Q8_0", "Q4_0"], ram=ram * GIB)
        for row in plan.rows:
            for kv, largest in row.largest.items():
                around = [n for n in (largest, largest + 256) if 1 <= n <= 131072]
                there = pyengine.plan(
                    "r1-distill-llama-8b",
                    quantisations=[row.quantisation],
                    contexts=around or [1],
                    kv_types=[kv],
                    ram=ram * GIB,
                )
                verdicts = [c.verdict == "fits" for c in there.cells]
                assert verdicts == [n <= largest for n in (around or [1])]


def test_the_smallest_machine_runs_it_and_the_next_smaller_one_does_not() -> None:
    plan = pyengine.plan("r1-8b-card", ram=RAM)
    for cell in plan.cells:
        assert cell.machine is not None
        below = max((m for m in planner.MACHINES if m < cell.machine), default=0)
        for machine, fits in ((cell.machine, True), (below, False)):
            assert (machine * GIB - planner.SYSTEM_BYTES - cell.memory.total >= planner.MARGIN_BYTES) == fits


def test_advice_says_what_fits_or_what_is_missing() -> None:
    small = pyengine.plan("r1-distill-llama-8b", ram=int(2.5 * GIB))
    assert "Nothing fits" in small.advice[0]
    assert "8 GiB runs it" in small.advice[0]
    large = pyengine.plan("r1-distill-llama-8b", ram=16 * GIB)
    assert large.advice[0].startswith("Q8_0 is the largest that fits with 8k tokens")
    assert any("KV q8_0 saves 7.50 of 16.0 GiB at 128k" in sentence for sentence in large.advice)


def test_a_control_group_limits_what_is_available(tmp_path: Path) -> None:
    def write(path: str, text: str) -> None:
        file = tmp_path / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)

    def available() -> int | None:
        return available_memory(str(tmp_path))

    assert available() is None  # the system does not say
    write("proc/meminfo", "MemTotal: 16384 kB\nMemAvailable:   8192 kB\n")
    assert available() == 8192 * K
    write("proc/self/cgroup", "0::/a/b\n")
    write("sys/fs/cgroup/a/b/memory.max", "max\n")
    write("sys/fs/cgroup/a/b/memory.current", "5000000\n")
    assert available() == 8192 * K
    write("sys/fs/cgroup/a/memory.max", "6000000\n")  # the parent's
    write("sys/fs/cgroup/a/memory.current", "5000000\n")
    assert available() == 1_000_000
    write("sys/fs/cgroup/a/memory.stat", "anon 1\nactive_file 300000\ninactive_file 700000\n")
    assert available() == 2_000_000  # pages of files give way
    write("sys/fs/cgroup/a/memory.current", "9000000\n")
    assert available() == 0
    write("proc/self/cgroup", "5:cpu:/c\n4:memory:/c\n")
    write("sys/fs/cgroup/memory/memory.limit_in_bytes", "9223372036854771712\n")
    write("sys/fs/cgroup/memory/memory.usage_in_bytes", "1\n")
    assert available() == 8192 * K
    write("sys/fs/cgroup/memory/c/memory.limit_in_bytes", "4000000\n")
    write("sys/fs/cgroup/memory/c/memory.usage_in_bytes", "3000000\n")
    write("sys/fs/cgroup/memory/c/memory.stat", "total_inactive_file 500000\n")
    assert available() == 1_500_000


# --- speed ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tier", quant.tiers())
@pytest.mark.parametrize(("kv_type", "tolerance"), [(0, 1e-6), (1, 1e-6), (8, 1e-6)])
def test_attention_is_softmax_attention(tier: str, kv_type: int, tolerance: float) -> None:
    rng = np.random.default_rng(3)
    name = {0: "F32", 1: "F16", 8: "Q8_0"}[kv_type]
    for n_keys, heads, dim in ((1, 1, 32), (255, 4, 64), (256, 8, 128), (700, 3, 96)):
        k, v = (quant.quantise(name, rng.standard_normal((n_keys, dim))) for _ in range(2))
        q = rng.standard_normal((heads, dim)).astype(np.float32)
        y = quant.attend(tier, kv_type, k.reshape(-1), v.reshape(-1), n_keys, q)
        wide_k, wide_v = (quant.dequantise(name, x, n_keys, dim).astype(np.float64) for x in (k, v))
        scores = q.astype(np.float64) @ wide_k.T / np.sqrt(dim)
        p = np.exp(scores - scores.max(axis=1, keepdims=True))
        expected = p / p.sum(axis=1, keepdims=True) @ wide_v
        assert np.abs(y - expected).max() < tolerance * 10
    with pytest.raises(InvalidArgument, match="do not fit"):
        quant.attend(tier, kv_type, np.zeros(7, np.uint8), np.zeros(7, np.uint8), 1, np.ones((1, 32), np.float32))


def test_a_forecast_adds_up_what_was_measured() -> None:
    from pyengine.forecast import Speed, Work

    speed = Speed("scalar", 1, {"Q4_0": 10e9, "Q6_K": 5e9}, {"Q4_0": 100e9, "Q6_K": 50e9}, {"f16": 2e9})
    work = Work({"Q4_0": 10**9, "Q6_K": 10**9}, {"Q4_0": 10**9, "Q6_K": 2 * 10**9}, 10**9, "Q6_K")
    assert work.decode(speed, "f16", 0) == pytest.approx(1 / (0.1 + 0.2))
    assert work.decode(speed, "f16", 10**9) == pytest.approx(1 / (0.1 + 0.2 + 0.5))
    assert work.prefill(speed) == pytest.approx(1 / (0.01 + 0.02))  # the head's 10^9 are not done for every token


def test_speed_is_measured_for_every_format_and_falls_with_depth() -> None:
    plan = pyengine.plan(
        "r1-distill-llama-8b", quantisations=["Q8_0", "Q4_K_M"], contexts=[K, 63 * K], ram=64 * GIB, speed=True
    )
    assert plan.speed is not None
    assert set(plan.speed.stream) == set(plan.speed.products) == {"Q8_0", "Q4_K", "Q6_K"}
    assert set(plan.speed.cache) == {"f16", "q8_0"}
    for row in plan.rows:
        assert row.prefill is not None
        assert row.prefill > 0
        for kv in plan.kv_types:
            near, far = (plan.cell(row.quantisation, c, kv).decode or 0 for c in (K, 63 * K))
            assert near > far > 0
