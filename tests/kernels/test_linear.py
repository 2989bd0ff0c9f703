"""The linear kernels: against float64, against an exact model of their arithmetic, and every tier against scalar."""

from __future__ import annotations

import gguf
import numpy as np
import numpy.typing as npt
import pytest
from gguf.quants import dequantize

from pyengine import quant
from pyengine.synthetic import CODED, coded_blocks, with_scales
from tests.support import comparisons, run_check

Floats = npt.NDArray[np.float32]
Doubles = npt.NDArray[np.float64]
Bytes = npt.NDArray[np.uint8]

FLOAT = ["F32", "F16", "BF16"]
QUANTISED = [name for name in quant.FORMATS if name not in FLOAT]
TIERS = quant.tiers()


def act_block(name: str) -> int:
    """Activations that share a scale when they meet this format."""
    return 32 if quant.FORMATS[name].block_size == 32 else 256


def gaussian(rows: int, cols: int, seed: int) -> Floats:
    return np.random.default_rng(seed).standard_normal((rows, cols)).astype(np.float32)


def packed_weights(name: str, rows: int, cols: int, seed: int, sigma: float = 1) -> Bytes:
    """Rows of blocks: of normally distributed weights where the format is written, else random ones."""
    fmt = quant.FORMATS[name]
    if fmt.can_quantise:
        return quant.quantise(name, np.float32(sigma) * gaussian(rows, cols, seed))
    blocks = coded_blocks(np.random.default_rng(seed), rows * cols // fmt.block_size, sigma, name)
    return blocks.reshape(rows, fmt.row_bytes(cols))


def exact_weights(name: str, packed: Bytes, rows: int, cols: int) -> Doubles:
    kind = gguf.GGMLQuantizationType[name]
    return dequantize(packed, kind).astype(np.float64).reshape(rows, cols)


# ---- every tier equals scalar ----


def test_check_every_tier_equals_scalar_bit_for_bit() -> None:
    """Many shapes, hostile bytes, extreme codes and activations, buffers that end at an unmapped page."""
    # Without a second tier there is nothing to compare with.
    assert comparisons(run_check("kernel_check", "--shapes", 120)) > (10_000 if len(TIERS) > 1 else 0)


@pytest.mark.parametrize("name", list(quant.FORMATS))
def test_tiers_agree_through_the_c_interface(name: str) -> None:
    packed = packed_weights(name, 33, 512, 1)
    x = gaussian(7, 512, 2)
    answers = [quant.linear(tier, name, packed, 33, 512, x) for tier in TIERS]
    assert all(np.array_equal(answers[0].view(np.uint32), other.view(np.uint32)) for other in answers[1:])


@pytest.mark.parametrize("tier", TIERS)
@pytest.mark.parametrize("name", list(quant.FORMATS))
def test_an_output_does_not_depend_on_its_neighbours(tier: str, name: str) -> None:
    packed = packed_weights(name, 19, 256, 3)
    x = gaussian(5, 256, 4)
    together = quant.linear(tier, name, packed, 19, 256, x)
    for t in range(5):
        alone = quant.linear(tier, name, packed, 19, 256, x[t : t + 1])
        assert np.array_equal(alone[0], together[t])
    for r in range(19):
        alone = quant.linear(tier, name, np.ascontiguousarray(packed[r : r + 1]), 1, 256, x)
        assert np.array_equal(alone[:, 0], together[:, r])


# ---- against float64 ----


@pytest.mark.parametrize("tier", TIERS)
@pytest.mark.parametrize("name", QUANTISED)
def test_quantised_linear_is_float64_up_to_the_rounding_of_activations(tier: str, name: str) -> None:
    rows, cols, tokens = 48, 2048, 6
    packed = packed_weights(name, rows, cols, 5, 0.05)
    weights = exact_weights(name, packed, rows, cols)
    x = gaussian(tokens, cols, 6) * np.float32(3)
    error = quant.linear(tier, name, packed, rows, cols, x) - x.astype(np.float64) @ weights.T

    step = np.abs(x).reshape(tokens, -1, act_block(name)).max(2) / 127
    step = np.repeat(step.astype(np.float64), act_block(name), axis=1)
    worst = (step / 2) @ np.abs(weights).T
    assert (np.abs(error) <= worst * 1.001).all()
    # Rounding errors are uniform in +-step / 2 and independent: the true RMSE follows, far below the worst case.
    sigma = np.sqrt((step**2 / 12) @ (weights**2).T)
    assert 0.85 < np.sqrt(np.mean((error / sigma) ** 2)) < 1.15


@pytest.mark.parametrize("tier", TIERS)
@pytest.mark.parametrize("name", FLOAT)
@pytest.mark.parametrize("cols", [1, 15, 16, 17, 172, 1031])
def test_float_linear_is_float64_up_to_float32_sums(tier: str, name: str, cols: int) -> None:
    packed = quant.quantise(name, gaussian(9, cols, 7))
    weights = exact_weights(name, packed, 9, cols)
    x = gaussian(4, cols, 8)
    error = np.abs(quant.linear(tier, name, packed, 9, cols, x) - x.astype(np.float64) @ weights.T)
    roundings = cols / 16 + 5  # along one lane, then up the tree
    assert (error <= roundings * 2.0**-24 * (np.abs(x.astype(np.float64)) @ np.abs(weights).T)).all()


# ---- against the contract, recomputed ----


def fma(a: Floats, b: Floats, c: Floats) -> Floats:
    """a * b + c with one rounding. The product is exact in float64; the sum is rounded to odd there, which keeps what
    the second rounding has to know."""
    product = a.astype(np.float64) * b.astype(np.float64)
    wide = c.astype(np.float64)
    total = product + wide
    back = total - product
    lost = (product - (total - back)) + (wide - back)  # exactly what the addition dropped
    even = (total.view(np.int64) & 1) == 0
    odd = np.nextafter(total, np.where(lost > 0, np.inf, -np.inf))
    return np.where((lost != 0) & even, odd, total).astype(np.float32)


def quantised_activations(x: Floats, block: int) -> tuple[npt.NDArray[np.int64], Floats]:
    """int8 codes [tokens, blocks, block] and scales [tokens, blocks] as kernels.h defines them."""
    parts = x.reshape(x.shape[0], -1, block)
    top = np.abs(parts).max(2)
    codes = np.rint(parts * (np.float32(127) / top)[:, :, None])
    return codes.astype(np.int64), top / np.float32(127)


@pytest.mark.parametrize("tier", TIERS)
@pytest.mark.parametrize("tokens", range(1, 6))  # up to four have kernels of their own
def test_q8_0_follows_the_contract_to_the_last_bit(tier: str, tokens: int) -> None:
    rows, cols = 21, 640
    packed = quant.quantise("Q8_0", gaussian(rows, cols, 9))
    x = gaussian(tokens, cols, 10)
    blocks = packed.reshape(rows, -1, 34)
    d = np.ascontiguousarray(blocks[:, :, :2]).view(np.float16)[:, :, 0].astype(np.float32)
    codes = blocks[:, :, 2:].view(np.int8).astype(np.int64)
    q, a = quantised_activations(x, 32)

    expected = np.zeros((tokens, rows), np.float32)
    for b in range(cols // 32):
        dot = (q[:, b] @ codes[:, b].T).astype(np.float32)
        expected = fma(d[None, :, b] * a[:, None, b], dot, expected)
    assert np.array_equal(quant.linear(tier, "Q8_0", packed, rows, cols, x), expected)


@pytest.mark.parametrize("tier", TIERS)
@pytest.mark.parametrize("tokens", range(1, 6))  # up to four have kernels of their own
def test_q4_k_follows_the_contract_to_the_last_bit(tier: str, tokens: int) -> None:
    rows, cols = 21, 1024
    packed = quant.quantise("Q4_K", gaussian(rows, cols, 11) + np.float32(0.3))
    x = gaussian(tokens, cols, 12)
    blocks = np.ascontiguousarray(packed.reshape(rows, -1, 144))
    d, dmin = (np.ascontiguousarray(blocks[:, :, i : i + 2]).view(np.float16)[:, :, 0] for i in (0, 2))
    scale, minimum = gguf.quants.Q4_K.get_scale_min(np.ascontiguousarray(blocks[:, :, 4:16]).reshape(-1, 12))
    scale, minimum = (v.reshape(rows, -1, 8).astype(np.int64) for v in (scale, minimum))
    pairs = blocks[:, :, 16:].reshape(rows, -1, 4, 1, 32)
    codes = np.concatenate([pairs & 15, pairs >> 4], axis=3).reshape(rows, -1, 8, 32).astype(np.int64)
    q, a = quantised_activations(x, 256)
    q = q.reshape(tokens, -1, 8, 32)

    expected = np.zeros((tokens, rows), np.float32)
    for b in range(cols // 256):
        dot = np.einsum("tjk,rjk,rj->tr", q[:, b], codes[:, b], scale[:, b]).astype(np.float32)
        mins = np.einsum("tjk,rj->tr", q[:, b], minimum[:, b]).astype(np.float32)
        expected = fma(d[None, :, b].astype(np.float32) * a[:, None, b], dot, expected)
        expected = fma(-(dmin[None, :, b].astype(np.float32) * a[:, None, b]), mins, expected)
    assert np.array_equal(quant.linear(tier, "Q4_K", packed, rows, cols, x), expected)


@pytest.mark.parametrize("tier", TIERS)
@pytest.mark.parametrize("name", CODED)
def test_codebook_formats_follow_the_contract_to_the_last_bit(tier: str, name: str) -> None:
    """Blocks with a scale of 1 are whole multiples of the unit that the contract takes into the scale."""
    rows, tokens, unit = (
        21,
        5,
        np.float32({"IQ1": 1 / 8, "IQ2": 1 / 8, "IQ3": 1 if name == "IQ3_S" else 1 / 4}.get(name[:3], 1)),
    )
    size = quant.FORMATS[name].block_size
    cols = 4 * size
    rng = np.random.default_rng(15)
    blocks = coded_blocks(rng, rows * 4, 0.3, name)
    d = np.exp2(rng.integers(-9, -5, rows * 4)) if name == "MXFP4" else rng.uniform(0.001, 0.01, rows * 4)
    packed = with_scales(name, blocks, d.astype(np.float16)).reshape(rows, -1)
    codes = exact_weights(name, with_scales(name, blocks, np.ones(rows * 4, np.float16)), rows, cols) / unit
    assert np.array_equal(codes, np.rint(codes))
    x = gaussian(tokens, cols, 16)
    q, a = quantised_activations(x, size)
    scale = d.astype(np.float16).astype(np.float32).reshape(rows, 4) * unit

    expected = np.zeros((tokens, rows), np.float32)
    for b in range(4):
        dot = (q[:, b] @ codes[:, size * b : size * (b + 1)].T.astype(np.int64)).astype(np.float32)
        expected = fma(scale[None, :, b] * a[:, None, b], dot, expected)
    assert np.array_equal(quant.linear(tier, name, packed, rows, cols, x), expected)


@pytest.mark.parametrize("tier", TIERS)
@pytest.mark.parametrize("name", QUANTISED)
def test_activations_that_are_not_finite_poison_their_token_only(tier: str, name: str) -> None:
    packed = packed_weights(name, 17, 512, 13)
    x = gaussian(5, 512, 14)
    clean = quant.linear(tier, name, packed, 17, 512, x)
    x[1, 300], x[3, 5] = np.nan, -np.inf
    x[4] = 0
    y = quant.linear(tier, name, packed, 17, 512, x)
    assert np.isnan(y[[1, 3]]).all()
    assert np.array_equal(y[[0, 2]], clean[[0, 2]])
    assert not y[4].any()
