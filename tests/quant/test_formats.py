"""Packed formats against the `gguf` package: reading is exact, the simple quantisers agree byte for byte."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import gguf
import numpy as np
import numpy.typing as npt
import pytest
from gguf.quants import dequantize, quantize

from pyengine import quant
from pyengine.errors import InvalidArgument, UnsupportedError
from pyengine.synthetic import coded_blocks
from tests.support import ROOT

Floats = npt.NDArray[np.float32]
Bytes = npt.NDArray[np.uint8]

FORMATS = list(quant.FORMATS)
EXACT = ["F32", "F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0"]  # the gguf package writes these too
FITTED = ["Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_NL", "IQ4_XS"]
READ_ONLY = ["IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S", "TQ1_0", "TQ2_0", "MXFP4"]
WRITTEN = [name for name in FORMATS if name not in READ_ONLY]
BLOCKS = [name for name in WRITTEN if quant.FORMATS[name].block_size > 1]


def peer_dequantise(name: str, packed: Bytes) -> Floats:
    with np.errstate(all="ignore"):  # NaN and infinite scales on random bytes
        return dequantize(packed, gguf.GGMLQuantizationType[name]).astype(np.float32, copy=False)


def peer_quantise(name: str, values: Floats) -> Bytes:
    with np.errstate(all="ignore"):
        return quantize(values, gguf.GGMLQuantizationType[name]).view(np.uint8).reshape(values.shape[0], -1)


def assert_same_floats(ours: Floats, theirs: Floats) -> None:
    """Equal bits; any NaN equals any NaN."""
    different = (ours.view(np.uint32) != theirs.view(np.uint32)) & ~(np.isnan(ours) & np.isnan(theirs))
    assert not different.any(), f"{different.sum()} of {different.size} differ, first at {np.argwhere(different)[0]}"


def gaussian(rows: int, cols: int, seed: int = 0) -> Floats:
    return np.random.default_rng(seed).standard_normal((rows, cols)).astype(np.float32)


def assorted(rows: int, cols: int, seed: int = 1) -> Floats:
    """Rows of many magnitudes (no scale overflows fp16), and the shapes rounding trips over."""
    rng = np.random.default_rng(seed)
    x = gaussian(rows, cols, seed) * np.exp(rng.uniform(-30, 8, (rows, 1))).astype(np.float32)
    x[0] = 0
    x[1] = 0.75
    x[2] = -np.abs(x[2])
    x[3] = np.abs(x[3])
    x[4, ::2] = 0
    x[5] = np.round(gaussian(1, cols, seed + 1)[0] * 8) / 4  # ties
    x[6] = np.where(np.arange(cols) % 32 == 5, 127, np.arange(cols) % 32 - 15.5)  # exact halves in Q8_0
    x[7] = rng.choice(np.array([-1, 1], np.float32), cols)  # both signs of the largest magnitude
    return x.astype(np.float32)


def test_the_list_of_formats_is_that_of_the_gguf_package() -> None:
    for name, fmt in quant.FORMATS.items():
        kind = gguf.GGMLQuantizationType[name]
        assert (fmt.type, fmt.block_size, fmt.block_bytes) == (kind.value, *gguf.GGML_QUANT_SIZES[kind])
        assert fmt.can_quantise == (name not in READ_ONLY)
    assert sorted(EXACT + FITTED) == sorted(WRITTEN)


def test_the_codebooks_are_those_of_the_gguf_package() -> None:
    made = subprocess.run([sys.executable, ROOT / "tools" / "codebooks.py"], check=True, capture_output=True, text=True)
    assert made.stdout == (ROOT / "csrc" / "quant" / "codebooks.h").read_text()


@pytest.mark.parametrize("name", FORMATS)
def test_random_bytes_dequantise_to_the_same_bits(name: str) -> None:
    fmt = quant.FORMATS[name]
    cols = fmt.block_size * 5
    packed = np.random.default_rng(7).integers(0, 256, (2000, fmt.row_bytes(cols)), dtype=np.uint8)
    assert_same_floats(quant.dequantise(name, packed, 2000, cols), peer_dequantise(name, packed).reshape(2000, cols))


@pytest.mark.parametrize("name", READ_ONLY)
def test_blocks_that_llama_cpp_wrote_dequantise_to_the_same_bits(name: str) -> None:
    """Real ones, from normally distributed weights (tests/quant/make_blocks.py), and random ones with such scales."""
    fmt = quant.FORMATS[name]
    with np.load(Path(__file__).parent / "blocks.npz") as arrays:
        packed = arrays[name]
    packed = np.concatenate([packed, coded_blocks(np.random.default_rng(1), 64, 0.02, name)])
    ours = quant.dequantise(name, packed, len(packed), fmt.block_size)
    assert_same_floats(ours, peer_dequantise(name, packed))
    assert 0.6 < ours[:-64].std() / 0.02 < 1.3
    assert 0.6 < ours[-64:].std() / 0.02 < 1.6


@pytest.mark.parametrize("name", READ_ONLY)
def test_a_format_that_is_only_read_says_so(name: str) -> None:
    with pytest.raises(UnsupportedError, match="can be read, but not written") as error:
        quant.quantise(name, gaussian(2, 256))
    assert error.value.code == "read_only_format"


@pytest.mark.parametrize("name", WRITTEN)
def test_quantised_weights_dequantise_to_the_same_bits(name: str) -> None:
    packed = quant.quantise(name, assorted(64, 768))
    assert_same_floats(quant.dequantise(name, packed, 64, 768), peer_dequantise(name, packed).reshape(64, 768))


@pytest.mark.parametrize("name", ["F16", "BF16"])
def test_every_16_bit_pattern_widens_exactly(name: str) -> None:
    every = np.arange(65536, dtype=np.uint16)
    packed = every.view(np.uint8).reshape(1, -1)
    expected = (
        every.view(np.float16).astype(np.float32) if name == "F16" else (every.astype(np.uint32) << 16).view(np.float32)
    )
    assert_same_floats(quant.dequantise(name, packed, 1, 65536), expected.reshape(1, -1))


def test_narrowing_rounds_to_nearest_even_at_every_boundary() -> None:
    """The neighbourhood of every midpoint of two fp16 values, denormals included, and of bfloat16 ones."""
    halves = np.arange(0x7BFF, dtype=np.uint16)
    low, high = halves.view(np.float16).astype(np.float64), (halves + 1).view(np.float16).astype(np.float64)
    middle = ((low + high) / 2).astype(np.float32)  # exact: one more bit
    near = [middle, np.nextafter(middle, np.float32(0)), np.nextafter(middle, np.float32(1e9))]
    x = np.concatenate([*near, *(-v for v in near)]).reshape(1, -1)
    assert np.array_equal(quant.quantise("F16", x), x.astype(np.float16).view(np.uint8))

    bits = (np.arange(0x7F7F, dtype=np.uint32) << 16) | 0x8000
    y = np.concatenate([bits - 1, bits, bits + 1]).view(np.float32).reshape(1, -1)
    assert np.array_equal(quant.quantise("BF16", y), peer_quantise("BF16", y))


@pytest.mark.parametrize("name", EXACT)
def test_simple_quantisers_write_the_bytes_of_the_gguf_package(name: str) -> None:
    x = assorted(400, 1024)
    assert np.array_equal(quant.quantise(name, x), peer_quantise(name, x))


def plain_error(x: Floats, sub_block: int, levels: int, symmetric: bool) -> float:
    """RMSE of rounding to `levels` evenly spaced values per sub-block, scales kept exactly: step / sqrt(12)."""
    parts = x.reshape(-1, sub_block)
    symmetric_step = np.abs(parts).max(1) / (levels / 2)  # codes -levels / 2 .. levels / 2 - 1
    step = symmetric_step if symmetric else (parts.max(1) - parts.min(1)) / (levels - 1)
    return float(np.sqrt(np.mean(step**2) / 12))


@pytest.mark.parametrize(
    ("name", "sub_block", "levels", "symmetric"),
    [("Q2_K", 16, 4, False), ("Q3_K", 16, 8, True), ("Q4_K", 32, 16, False), ("Q5_K", 32, 32, False),
     ("Q6_K", 16, 64, True), ("IQ4_NL", 32, 16, True), ("IQ4_XS", 32, 16, True)],
)  # fmt: skip
def test_fitted_quantisers_lose_no_more_than_plain_rounding(
    name: str, sub_block: int, levels: int, symmetric: bool
) -> None:
    """True RMSE, as the gguf package reads the file. Rounded scales cost a little, fitting them gains more; no code of
    b bits a weight can have an error below 2^-b on Gaussian weights."""
    x = gaussian(200, 1024, seed=3)
    restored = peer_dequantise(name, quant.quantise(name, x)).reshape(x.shape)
    rmse = float(np.sqrt(np.mean((restored.astype(np.float64) - x) ** 2)))
    fmt = quant.FORMATS[name]
    assert 2 ** (-8 * fmt.block_bytes / fmt.block_size) < rmse < 1.02 * plain_error(x, sub_block, levels, symmetric)


@pytest.mark.parametrize("importance", [None, "ramp"])
@pytest.mark.parametrize("name", WRITTEN)
@pytest.mark.parametrize("source", ["F32", "F16", "BF16", "Q8_0"])
def test_converting_is_reading_and_quantising_and_tells_what_was_lost(
    source: str, name: str, importance: str | None
) -> None:
    weights = None if importance is None else np.linspace(0.1, 3, 768, dtype=np.float32)
    packed = quant.quantise(source, 0.02 * gaussian(21, 768, seed=4))
    x = peer_dequantise(source, packed).reshape(21, 768)
    got, error, energy = quant.convert(source, packed, name, 21, 768, importance=weights)
    assert np.array_equal(got, quant.quantise(name, x, importance=weights))
    restored = peer_dequantise(name, got).reshape(x.shape).astype(np.float64)
    assert error == pytest.approx(float(((restored - x) ** 2).sum()), rel=1e-5)
    assert energy == pytest.approx(float((x.astype(np.float64) ** 2).sum()), rel=1e-5)


def test_converting_takes_rows_that_lie_anywhere_and_refuses_other_sizes() -> None:
    x = gaussian(3, 64)
    memory = np.empty(x.nbytes + 1, np.uint8)
    memory[1:] = x.view(np.uint8).reshape(-1)
    assert np.array_equal(quant.convert("F32", memory[1:], "Q4_0", 3, 64)[0], quant.quantise("Q4_0", x))
    for source, data in (("F32", memory), ("BF16", memory[1:]), ("Q4_K", memory[1:])):
        with pytest.raises(InvalidArgument, match=r"do not fit|no shape"):
            quant.convert(source, data, "Q4_0", 3, 64)
    x[2, 5] = np.nan
    with pytest.raises(InvalidArgument, match=r"row 2, column 5 is NaN"):
        quant.convert("F32", x.view(np.uint8), "Q4_0", 3, 64)
    with pytest.raises(UnsupportedError, match="can be read, but not written"):
        quant.convert("F32", gaussian(1, 256).view(np.uint8), "IQ2_S", 1, 256)


@pytest.mark.parametrize("name", FITTED)
def test_the_error_follows_the_scale_of_the_weights(name: str) -> None:
    """Scaling by a power of two changes nothing but exponents, as long as the fp16 scales stay normal."""
    x = gaussian(8, 512, seed=5)
    small = peer_dequantise(name, quant.quantise(name, x)).reshape(x.shape)
    large = peer_dequantise(name, quant.quantise(name, x * 64)).reshape(x.shape)
    error = [float(np.linalg.norm(small - x)), float(np.linalg.norm(large / 64 - x))]
    assert error[1] == pytest.approx(error[0], rel=0.01)


def importance_of(cols: int, seed: int = 21) -> Floats:
    """Of columns: most alike, some a thousand times the rest, some without any."""
    rng = np.random.default_rng(seed)
    importance = np.exp(rng.standard_normal(cols) * 1.5)
    importance[:: cols // 8] *= 1000
    importance[3 :: cols // 8] = 0
    return importance.astype(np.float32)


def weighted_error(name: str, x: Floats, importance: Floats, packed: Bytes) -> float:
    restored = peer_dequantise(name, packed).reshape(x.shape)
    return float(np.sqrt((importance * (restored.astype(np.float64) - x) ** 2).sum()))


@pytest.mark.parametrize("name", [f for f in BLOCKS if f != "Q8_0"])
def test_an_importance_lowers_the_error_where_it_counts(name: str) -> None:
    x, importance = gaussian(40, 1024, seed=8), importance_of(1024)
    without = weighted_error(name, x, importance, quant.quantise(name, x))
    assert weighted_error(name, x, importance, quant.quantise(name, x, importance=importance)) < 0.97 * without


@pytest.mark.parametrize("name", FITTED)
def test_only_the_proportions_of_an_importance_count(name: str) -> None:
    x, importance = gaussian(8, 512, seed=9), importance_of(512)
    assert np.array_equal(quant.quantise(name, x), quant.quantise(name, x, importance=np.full(512, 7e-9)))
    assert np.array_equal(quant.quantise(name, x), quant.quantise(name, x, importance=np.zeros(512)))
    small = quant.quantise(name, x, importance=importance)
    assert np.array_equal(small, quant.quantise(name, x, importance=importance * np.float32(2**-40)))


def test_exact_types_do_not_depend_on_importance() -> None:
    x = gaussian(4, 512)
    for name in ("F32", "F16", "BF16", "Q8_0"):
        assert np.array_equal(quant.quantise(name, x), quant.quantise(name, x, importance=importance_of(512)))


@pytest.mark.parametrize("bad", [np.nan, np.inf, -1.0])
def test_an_importance_that_is_no_weight_is_refused(bad: float) -> None:
    importance = importance_of(512)
    importance[17] = bad
    with pytest.raises(InvalidArgument, match="column 17"):
        quant.quantise("Q4_K", gaussian(2, 512), importance=importance)
    with pytest.raises(InvalidArgument, match="512 columns"):
        quant.quantise("Q4_K", gaussian(2, 512), importance=importance[:256])


def scanned(blocks: Floats, importance: Floats, levels: Floats, ends: Floats) -> npt.NDArray[np.float64]:
    """The least weighted error of each block over a dense scan: the largest weight given each of `ends`."""
    x, w = blocks.astype(np.float64), importance.astype(np.float64)
    best = (w * x * x).sum(1)
    middles = (levels[1:] + levels[:-1]) / 2
    top = np.take_along_axis(x, np.abs(x).argmax(1)[:, None], 1)
    for end in ends:
        step = top / end
        for _ in range(3):
            q = levels[np.searchsorted(middles, x / step)]
            best = np.minimum(best, (w * (x - step * q) ** 2).sum(1))
            step = (w * x * q).sum(1, keepdims=True) / (w * q * q).sum(1, keepdims=True)
    return best


@pytest.mark.parametrize(("name", "low", "high"), [("Q4_0", -8, 7), ("Q5_0", -16, 15), ("IQ4_NL", 0, 0)])
def test_the_fit_of_one_scale_is_that_of_a_dense_scan(name: str, low: int, high: int) -> None:
    x, importance = gaussian(300, 32, seed=14), np.exp(gaussian(1, 32, seed=15)[0])
    levels = np.arange(low, high + 1.0)
    if name == "IQ4_NL":  # the format's values, as the gguf package has them
        levels = np.array(gguf.quants.IQ4_NL.kvalues, np.float64)
    ends = np.concatenate([np.linspace(1.2 * levels[0], 0.5 * levels[0], 400), np.linspace(0.5, 1.2, 400) * levels[-1]])
    packed = quant.quantise(name, x, importance=importance)
    restored = peer_dequantise(name, packed).reshape(x.shape)
    ours = (importance * (restored.astype(np.float64) - x) ** 2).sum()
    assert ours < 1.03 * scanned(x, np.broadcast_to(importance, x.shape), levels, ends).sum()


@pytest.mark.parametrize("name", WRITTEN)
def test_what_is_written_decodes_to_finite_values(name: str) -> None:
    rng = np.random.default_rng(11)
    tiny = gaussian(64, 512, 12) * np.exp2(rng.integers(-149, -20, (64, 1))).astype(np.float32)
    mixed = gaussian(64, 512, 13) * np.exp2(rng.integers(-140, 12, (64, 512))).astype(np.float32)
    x = np.concatenate([tiny, mixed, np.zeros((1, 512), np.float32)]).astype(np.float32)
    assert np.isfinite(peer_dequantise(name, quant.quantise(name, x))).all()


@pytest.mark.parametrize("name", WRITTEN)
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_weight_that_is_not_finite_is_refused(name: str, bad: float) -> None:
    x = gaussian(3, 512)
    x[1, 300] = bad
    with pytest.raises(InvalidArgument):
        quant.quantise(name, x)


@pytest.mark.parametrize("name", [f for f in WRITTEN if f != "F32"])
def test_a_weight_too_large_for_the_format_is_refused(name: str) -> None:
    x = gaussian(2, 512)
    x[1, 77] = 3.4e38  # a float, but past the largest bfloat16 and any fp16 scale
    with pytest.raises(InvalidArgument):
        quant.quantise(name, x)


@pytest.mark.parametrize("name", WRITTEN)
def test_threads_do_not_change_a_byte(name: str) -> None:
    x = assorted(37, 512)
    assert np.array_equal(quant.quantise(name, x, threads=1), quant.quantise(name, x, threads=3))
    w = importance_of(512)
    assert np.array_equal(quant.quantise(name, x, 1, importance=w), quant.quantise(name, x, 3, importance=w))


@pytest.mark.parametrize("name", BLOCKS)
def test_a_row_that_is_no_whole_number_of_blocks_is_refused(name: str) -> None:
    with pytest.raises(InvalidArgument):
        quant.quantise(name, gaussian(1, quant.FORMATS[name].block_size + 1))
