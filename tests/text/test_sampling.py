"""The samplers against a plain oracle, and the promise "same seed, same text".

The oracle below works on Python lists with ``math.exp`` and ``math.fsum``, sorts everything, and shares no code with
the engine.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import numpy as np
import pytest

from pyengine import _core
from pyengine.dry import find_breakers
from pyengine.errors import InvalidArgument, NumericError
from pyengine.sampling import SAMPLERS, Sampler, SamplerSettings, philox4x64, uniform

Scored = list[tuple[int, float]]  # (id, logit)


# ---- the oracle ----


def softmax(scored: Scored) -> list[float]:
    peak = max(logit for _, logit in scored)
    weights = [math.exp(logit - peak) for _, logit in scored]
    total = math.fsum(weights)
    return [w / total for w in weights]


def by_logit(scored: Scored) -> Scored:
    return sorted(scored, key=lambda c: (-c[1], c[0]))


def oracle_penalties(scored: Scored, s: SamplerSettings, history: list[int]) -> Scored:
    window = history if s.repeat_last_n == -1 else history[-s.repeat_last_n :] if s.repeat_last_n else []
    out = []
    for token, logit in scored:
        count = window.count(token)
        if count:
            logit = logit / s.repeat_penalty if logit > 0 else logit * s.repeat_penalty
            logit = logit - s.frequency_penalty * count - s.presence_penalty
        out.append((token, logit))
    return out


def oracle_dry(scored: Scored, s: SamplerSettings, history: list[int], breakers: set[int]) -> Scored:
    """For every candidate: the longest earlier text just before an occurrence of it that also ends the history."""
    window = history if s.dry_penalty_last_n == -1 else history[-s.dry_penalty_last_n :] if s.dry_penalty_last_n else []
    unbroken = 0
    while unbroken < len(window) and window[-1 - unbroken] not in breakers:
        unbroken += 1
    out = []
    for token, logit in scored:
        best = -1
        for at in range(1, len(window)):
            if window[at] == token:
                length = 0
                while length < min(at, unbroken) and window[at - 1 - length] == window[-1 - length]:
                    length += 1
                best = max(best, length)
        if best >= s.dry_allowed_length and unbroken >= s.dry_allowed_length and len(window) > s.dry_allowed_length:
            logit -= s.dry_multiplier * s.dry_base ** (best - s.dry_allowed_length)
        out.append((token, logit))
    return out


def oracle_top_n_sigma(scored: Scored, s: SamplerSettings) -> Scored:
    logits = [logit for _, logit in scored]
    mean = math.fsum(logits) / len(logits)
    sigma = math.sqrt(math.fsum((x - mean) ** 2 for x in logits) / len(logits))
    least = max(logits) - s.top_n_sigma * sigma
    return [c for c in scored if c[1] >= least]


def oracle_top_k(scored: Scored, s: SamplerSettings) -> Scored:
    return by_logit(scored)[: s.top_k]


def oracle_mass(ordered: Scored, probabilities: dict[int, float], mass: float) -> Scored:
    total, kept = 0.0, []
    for c in ordered:
        kept.append(c)
        total += probabilities[c[0]]
        if total >= mass:
            break
    return kept


def oracle_top_p(scored: Scored, s: SamplerSettings) -> Scored:
    return oracle_mass(by_logit(scored), {c[0]: p for c, p in zip(scored, softmax(scored), strict=True)}, s.top_p)


def oracle_typical_p(scored: Scored, s: SamplerSettings) -> Scored:
    p = {c[0]: p for c, p in zip(scored, softmax(scored), strict=True)}
    entropy = -math.fsum(q * math.log(q) for q in p.values() if q > 0)
    ordered = sorted(scored, key=lambda c: (abs(-math.log(p[c[0]]) - entropy), c[0]))
    return oracle_mass(ordered, p, s.typical_p)


def oracle_min_p(scored: Scored, s: SamplerSettings) -> Scored:
    p = softmax(scored)
    least = s.min_p * max(p)
    return [c for c, q in zip(scored, p, strict=True) if q >= least]


def oracle_xtc(scored: Scored, s: SamplerSettings) -> Scored:
    """Always removes: used with probability 1."""
    scored = by_logit(scored)
    above = sum(q >= s.xtc_threshold for q in softmax(scored))
    return scored[max(0, above - 1) :]


def oracle_temperature(scored: Scored, s: SamplerSettings) -> Scored:
    if s.temperature == 0:
        return by_logit(scored)[:1]
    return [(token, logit / s.temperature) for token, logit in scored]


def oracle(logits: Sequence[float], s: SamplerSettings, history: list[int], breakers: set[int]) -> dict[int, float]:
    """id -> probability, by the rules each sampler is known for."""
    scored: Scored = [(i, float(x) + s.logit_bias.get(i, 0.0)) for i, x in enumerate(logits)]
    scored = [c for c in scored if c[1] > -math.inf]
    for name in s.samplers:
        match name:
            case "penalties":
                scored = oracle_penalties(scored, s, history)
            case "dry" if s.dry_multiplier and s.dry_base >= 1:
                scored = oracle_dry(scored, s, history, breakers)
            case "top_n_sigma" if s.top_n_sigma > 0:
                scored = oracle_top_n_sigma(scored, s)
            case "top_k" if s.top_k > 0:
                scored = oracle_top_k(scored, s)
            case "typical_p" if s.typical_p < 1:
                scored = oracle_typical_p(scored, s)
            case "top_p" if s.top_p < 1:
                scored = oracle_top_p(scored, s)
            case "min_p" if s.min_p > 0:
                scored = oracle_min_p(scored, s)
            case "xtc" if s.xtc_probability > 0 and s.xtc_threshold <= 0.5:
                scored = oracle_xtc(scored, s)
            case "temperature":
                scored = oracle_temperature(scored, s)
    return {c[0]: p for c, p in zip(scored, softmax(scored), strict=True)}


class Letters:
    """A vocabulary of n tokens; token i reads as given, or as "t<i> "."""

    def __init__(self, n: int, texts: dict[int, str]) -> None:
        self.n_vocab = n
        self.texts = texts

    def token_bytes(self, id: int) -> bytes:
        return self.texts.get(id, f"t{id} ").encode()

    def encode(self, text: str, add_special: bool = True, parse_special: bool = False) -> list[int]:
        assert not add_special
        assert not parse_special
        return [{v: k for k, v in self.texts.items()}[c] for c in text]


def check(logits: np.ndarray, s: SamplerSettings, history: list[int], breakers: dict[int, str] | None = None) -> None:
    breakers = breakers or {}
    sampler = Sampler(s, Letters(len(logits), breakers))
    before = logits.copy()
    ids, probabilities = sampler.distribution(logits, history)
    expected = oracle(logits.tolist(), s, history, set(breakers))
    assert ids.tolist() == sorted(expected)
    np.testing.assert_allclose(probabilities, [expected[i] for i in ids.tolist()], rtol=1e-9, atol=1e-300)
    np.testing.assert_array_equal(logits, before)
    assert sampler.sample(logits, history).id in expected


OFF = SamplerSettings(temperature=1.0, top_k=0, top_p=1.0, min_p=0.0, seed=1)
ONE_STEP = {
    "temperature": [{"temperature": t} for t in (0.0, 0.1, 0.6, 1.0, 3.0, 1e-4)],
    "top_k": [{"top_k": k} for k in (-1, 0, 1, 2, 40, 500, 100000)],
    "top_p": [{"top_p": p} for p in (0.0, 0.1, 0.5, 0.95, 0.999, 1.0)],
    "min_p": [{"min_p": p} for p in (0.0, 0.01, 0.05, 0.5, 1.0)],
    "typical_p": [{"typical_p": p} for p in (0.05, 0.2, 0.9, 0.999, 1.0)],
    "top_n_sigma": [{"top_n_sigma": n} for n in (-1.0, 0.0, 0.5, 1.0, 3.0)],
    "xtc": [{"xtc_probability": 1.0, "xtc_threshold": t} for t in (0.0, 0.01, 0.1, 0.3, 0.5, 0.6)],
    "penalties": [
        {"repeat_penalty": 1.3},
        {"repeat_penalty": 0.7, "repeat_last_n": 3},
        {"presence_penalty": 0.8, "frequency_penalty": 0.3, "repeat_last_n": -1},
        {"repeat_penalty": 2.0, "repeat_last_n": 0},
        {"repeat_penalty": 1.1, "frequency_penalty": -0.5, "repeat_last_n": 500},
    ],
    "logit_bias": [{"logit_bias": {0: 5.0, 3: -math.inf, 7: -2.5}}],
}


@pytest.mark.parametrize("name", ONE_STEP)
@pytest.mark.parametrize("n_vocab", [1, 2, 50, 997, 6000])
def test_each_sampler_keeps_what_its_definition_says(name: str, n_vocab: int) -> None:
    rng = np.random.default_rng(n_vocab)
    for overrides in ONE_STEP[name]:
        if max(overrides.get("logit_bias", {}), default=0) >= n_vocab:
            continue
        settings = dataclasses.replace(OFF, **overrides)
        for scale in (0.5, 3.0):
            logits = (rng.standard_normal(n_vocab) * scale).astype(np.float32)
            check(logits, settings, rng.integers(0, n_vocab, 100).tolist())


def test_dry_penalises_what_would_continue_a_repeat() -> None:
    rng = np.random.default_rng(5)
    breakers = {0: "\n", 1: ":"}
    for trial in range(300):
        n_tokens = int(rng.integers(2, 6))
        history = rng.integers(0, n_tokens, int(rng.integers(0, 60))).tolist()
        settings = dataclasses.replace(
            OFF,
            dry_multiplier=float(rng.uniform(0.1, 2)),
            dry_base=float(rng.choice([0.5, 1.0, 1.2, 1.75])),
            dry_allowed_length=int(rng.integers(0, 5)),
            dry_penalty_last_n=int(rng.choice([-1, 0, 1, 10, 30, 1000])),
            dry_sequence_breakers=("\n", ":") if trial % 2 else ("\n",),
        )
        check(rng.standard_normal(6).astype(np.float32), settings, history, breakers if trial % 2 else {0: breakers[0]})


def test_dry_penalty_stops_growing_and_stays_quick_on_a_long_loop() -> None:
    settings = dataclasses.replace(OFF, dry_multiplier=0.8, dry_sequence_breakers=())
    ids, p = Sampler(settings).distribution(np.zeros(4, dtype=np.float32), [2] * 50000)
    assert ids.tolist() == [0, 1, 2, 3]
    assert p[2] == pytest.approx(0.0, abs=1e-300)
    assert np.isfinite(p).all()


def test_dry_breakers_of_several_tokens() -> None:
    letters = Letters(8, {1: "a", 2: "b", 3: "xa", 4: "ab", 5: "zabz", 6: "c"})
    assert find_breakers(letters, ["ab"]) == {1: [(2,)], 3: [(2,)], 4: [()], 5: [()]}
    settings = dataclasses.replace(OFF, dry_multiplier=1.0, dry_sequence_breakers=("ab",), dry_allowed_length=2)
    sampler = Sampler(settings, letters)
    logits = np.zeros(8, dtype=np.float32)
    repeat = [7, 6, 0, 7, 6]  # "7 6" was followed by 0
    _, p = sampler.distribution(logits, repeat)
    assert p[0] < p[1]
    _, p = sampler.distribution(logits, [7, 1, 2, 6, 0, 7, 1, 2, 6])  # "ab" in between: only one token since
    assert p[0] == p[3]
    _, p = sampler.distribution(logits, [7, 2, 1, 6, 0, 7, 2, 1, 6])  # "ba" breaks nothing
    assert p[0] < p[3]


def test_the_whole_chain_in_any_order() -> None:
    rng = np.random.default_rng(11)
    for _ in range(60):
        n = int(rng.integers(2, 400))
        settings = SamplerSettings(
            temperature=float(rng.choice([0.0, 0.6, 1.3])),
            top_k=int(rng.choice([0, 5, 40])),
            top_p=float(rng.choice([0.5, 0.95, 1.0])),
            min_p=float(rng.choice([0.0, 0.05])),
            typical_p=float(rng.choice([0.7, 1.0])),
            top_n_sigma=float(rng.choice([-1.0, 1.5])),
            xtc_probability=float(rng.choice([0.0, 1.0])),
            dry_multiplier=float(rng.choice([0.0, 0.8])),
            repeat_penalty=1.1,
            presence_penalty=0.1,
            seed=int(rng.integers(0, 2**63)),
            samplers=tuple(rng.permutation(SAMPLERS).tolist()[: int(rng.integers(0, 10))]),
            dry_sequence_breakers=("\n",),
        )
        history = rng.integers(0, min(n, 5), 80).tolist()
        check((rng.standard_normal(n) * 2).astype(np.float32), settings, history, {0: "\n"})


def test_the_known_defaults_and_order() -> None:
    s = SamplerSettings()
    assert (s.temperature, s.top_k, s.top_p, s.min_p, s.typical_p) == (0.8, 40, 0.95, 0.05, 1.0)
    assert (s.repeat_penalty, s.repeat_last_n, s.presence_penalty, s.frequency_penalty) == (1.0, 64, 0.0, 0.0)
    assert (s.dry_multiplier, s.dry_base, s.dry_allowed_length, s.dry_penalty_last_n) == (0.0, 1.75, 2, -1)
    assert (s.top_n_sigma, s.xtc_probability, s.xtc_threshold, s.seed) == (-1.0, 0.0, 0.1, None)
    assert " ".join(s.samplers) == "penalties dry top_n_sigma top_k typical_p top_p min_p xtc temperature"


# ---- ties, greed, determinism ----


@pytest.mark.parametrize("n_vocab", [3, 200, 5000])
def test_ties_go_to_the_lower_id(n_vocab: int) -> None:
    flat = np.full(n_vocab, 1.25, dtype=np.float32)
    for settings in (
        dataclasses.replace(OFF, temperature=0.0),
        dataclasses.replace(OFF, top_k=1),
        dataclasses.replace(OFF, top_p=0.0),
    ):
        assert Sampler(settings).distribution(flat)[0].tolist() == [0]
    assert Sampler(dataclasses.replace(OFF, top_k=2)).distribution(flat)[0].tolist() == [0, 1]


def test_greedy_is_argmax_after_penalties() -> None:
    rng = np.random.default_rng(3)
    sampler = Sampler(SamplerSettings(temperature=0.0))
    for _ in range(50):
        logits = rng.integers(-4, 4, 3000).astype(np.float32)  # many equal maxima
        assert sampler.sample(logits).id == int(np.argmax(logits))
    logits = np.array([2.0, 1.9, 0.0], dtype=np.float32)
    assert Sampler(SamplerSettings(temperature=0.0, repeat_penalty=1.2)).sample(logits, [0]).id == 1


def test_same_seed_same_draw_whatever_came_before() -> None:
    rng = np.random.default_rng(9)
    rows = rng.standard_normal((30, 1000)).astype(np.float32)
    settings = SamplerSettings(seed=42)
    forwards = [Sampler(settings).sample(row, position=i).id for i, row in enumerate(rows)]
    sampler = Sampler(settings)
    backwards = [sampler.sample(rows[i], position=i).id for i in reversed(range(30))]
    assert forwards == backwards[::-1]
    assert forwards != [
        Sampler(dataclasses.replace(settings, seed=43)).sample(r, position=i).id for i, r in enumerate(rows)
    ]


def test_no_seed_means_a_new_one_each_time_and_it_is_told() -> None:
    a, b = Sampler(SamplerSettings()), Sampler(SamplerSettings())
    assert a.seed != b.seed
    logits = np.zeros(1000, dtype=np.float32)
    again = Sampler(SamplerSettings(seed=a.seed, top_k=0))
    draws = [Sampler(SamplerSettings(seed=a.seed, top_k=0)).sample(logits, position=i).id for i in range(5)]
    assert draws == [again.sample(logits, position=i).id for i in range(5)]


def test_draws_are_frozen() -> None:
    """The same text from the same seed in every release."""
    logits = np.sin(np.arange(500, dtype=np.float64) * 0.7).astype(np.float32) * 3
    sampler = Sampler(SamplerSettings(seed=7))
    assert [sampler.sample(logits, position=i).id for i in range(12)] == [
        469,
        460,
        29,
        2,
        146,
        20,
        155,
        361,
        92,
        433,
        155,
        487,
    ]


@pytest.mark.parametrize("seed", [0, 1, 2**63, 2**64 - 1])
def test_random_numbers_are_philox(seed: int) -> None:
    from numpy.random import Philox

    for counter in ((0, 0, 0, 0), (5, 0, 0, 0), (2**40, 1, 0, 0), (123, 2**33, 7, 2**63)):
        theirs = Philox(key=np.array([seed, 0], dtype=np.uint64), counter=np.array(counter, dtype=np.uint64))
        words = [int(w) for w in theirs.random_raw(4)]  # numpy counts up before its first block
        assert list(philox4x64(seed, (counter[0] + 1, *counter[1:]))) == words
    u = [uniform(seed, i, 0) for i in range(2000)]
    assert 0 <= min(u) < 0.01 < 0.99 < max(u) < 1
    assert np.mean(u) == pytest.approx(0.5, abs=0.03)
    assert abs(np.corrcoef(u, [uniform(seed, i, 1) for i in range(2000)])[0, 1]) < 0.08


def test_draws_follow_the_distribution() -> None:
    """Chi-square over 20,000 draws: below the 99.9 % point for 9 degrees of freedom (27.9)."""
    logits = np.log(np.arange(1, 11)).astype(np.float32)
    sampler = Sampler(dataclasses.replace(OFF, seed=2024))
    counts = np.bincount([sampler.sample(logits, position=i).id for i in range(20000)], minlength=10)
    expected = np.arange(1, 11) / 55 * 20000
    assert float(np.sum((counts - expected) ** 2 / expected)) < 27.9


def test_xtc_happens_as_often_as_asked() -> None:
    sampler = Sampler(dataclasses.replace(OFF, xtc_probability=0.3, xtc_threshold=0.2, seed=4))
    logits = np.array([1.0, 0.9, -9.0], dtype=np.float32)
    removed = sum(0 not in sampler.distribution(logits, position=i)[0] for i in range(3000))
    assert removed / 3000 == pytest.approx(0.3, abs=0.03)


# ---- log-probabilities ----


def test_logprobs_are_the_models_own() -> None:
    logits = np.random.default_rng(1).standard_normal(2000).astype(np.float32)
    expected = logits.astype(np.float64) - math.log(math.fsum(math.exp(float(x)) for x in logits))
    settings = SamplerSettings(seed=1, top_logprobs=5, temperature=0.3, logit_bias={3: 100.0})
    result = Sampler(settings).sample(logits)
    assert result.id == 3
    assert result.logprob == pytest.approx(expected[3], rel=1e-12)
    best = np.argsort(-expected, kind="stable")[:5]
    assert [t.id for t in result.top_logprobs] == best.tolist()
    assert [t.logprob for t in result.top_logprobs] == pytest.approx(expected[best].tolist(), rel=1e-12)
    assert Sampler(SamplerSettings(top_logprobs=0)).sample(logits).top_logprobs == ()
    assert Sampler(SamplerSettings()).sample(logits).logprob is None


# ---- refusals ----


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("temperature", -0.1),
        ("temperature", math.nan),
        ("temperature", "hot"),
        ("top_k", 1.5),
        ("top_k", True),
        ("top_p", -0.1),
        ("min_p", 1.1),
        ("typical_p", -1.0),
        ("xtc_probability", 2.0),
        ("xtc_threshold", -0.1),
        ("dry_multiplier", -1.0),
        ("dry_allowed_length", -1),
        ("dry_penalty_last_n", -2),
        ("dry_sequence_breakers", ("",)),
        ("repeat_penalty", 0.0),
        ("repeat_last_n", -2),
        ("presence_penalty", math.inf),
        ("seed", -1),
        ("seed", 2**64),
        ("logit_bias", {-1: 1.0}),
        ("logit_bias", {1: math.inf}),
        ("logit_bias", {1: math.nan}),
        ("top_logprobs", -1),
        ("samplers", ("top_k", "top_k")),
        ("samplers", ("mirostat",)),
    ],
)
def test_impossible_settings_are_refused_by_name(name: str, value: object) -> None:
    with pytest.raises(InvalidArgument) as error:
        SamplerSettings(**{name: value})
    assert error.value.field == name
    assert name in str(error.value)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_damaged_logits_are_an_error_never_a_token(bad: float) -> None:
    logits = np.zeros(100, dtype=np.float32)
    logits[50] = bad
    with pytest.raises(NumericError):
        Sampler().sample(logits)


def test_every_token_forbidden_is_an_error() -> None:
    settings = SamplerSettings(logit_bias={0: -math.inf, 1: -math.inf})
    with pytest.raises(NumericError):
        Sampler(settings).sample(np.zeros(2, dtype=np.float32))


def test_a_bias_outside_the_vocabulary_is_an_error() -> None:
    with pytest.raises(InvalidArgument):
        Sampler(SamplerSettings(logit_bias={9: 1.0})).sample(np.zeros(2, dtype=np.float32))


def test_dry_without_a_tokenizer_says_what_is_missing() -> None:
    with pytest.raises(InvalidArgument, match="tokenizer"):
        Sampler(SamplerSettings(dry_multiplier=1.0))


# ---- the native shortlist ----


def plain_exp(x: np.ndarray) -> np.ndarray:
    """The engine's exponential as numpy operations: k ln 2 + r, Taylor to r^13, scaled by 2^k."""
    x = np.maximum(x, -700.0)
    k = np.rint(x * 1.4426950408889634)
    r = x - k * 6.93147180369123816490e-01
    r = r - k * 1.90821492927058770002e-10
    y = np.full_like(r, 1.0 / math.factorial(13))
    for n in range(12, -1, -1):
        y = y * r + 1.0 / math.factorial(n)
    return np.ldexp(y, k.astype(np.int32))


class Plain(Sampler):
    """The chain on all candidates, from the first step on."""

    def _start(self, raw: np.ndarray, history: Sequence[int]) -> tuple[object, int]:  # type: ignore[override]
        return self._everything(raw), 0


def rows_of_all_kinds(rng: np.random.Generator, n: int) -> list[np.ndarray]:
    rows = [rng.standard_normal(n) * scale for scale in (0.01, 1.0, 4.0, 30.0)]
    rows.append(rng.integers(-3, 3, n).astype(np.float64))  # ties everywhere
    rows.append(np.where(rng.random(n) < 0.5, 0.0, -0.0))  # equal, though not in their bits
    rows.append(np.where(rng.random(n) < 0.9, -np.inf, rng.standard_normal(n)))
    rows[-1][n // 2] = 0.5
    rows.append(np.sort(rng.standard_normal(n)))  # the best ones in one group
    return [row.astype(np.float32) for row in rows]


@pytest.mark.parametrize("n", [1, 2, 63, 64, 65, 1000, 40000])
def test_the_shortlist_changes_no_bit_of_what_is_drawn_from(n: int, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(n)
    chains = [
        {},
        {"temperature": 0.0},
        {"temperature": 0.0, "top_n_sigma": 1.0, "top_k": 0},
        {"temperature": 0.6, "min_p": 0.0},
        {"temperature": 0.6, "min_p": 0.0, "top_k": 0},
        {"top_k": 0, "top_p": 0.9999, "min_p": 0.0, "temperature": 2.0},
        {"top_k": 0, "top_p": 1.0, "min_p": 0.002},
        {"top_k": 0, "top_p": 0.0},
        {"top_k": 700, "xtc_probability": 0.5},
        {"top_k": 0, "typical_p": 0.9},
        {"samplers": ("temperature", "top_p", "top_k")},
        {"samplers": ("top_p", "penalties", "temperature"), "repeat_penalty": 1.5},
        {"samplers": ("top_k", "penalties", "temperature"), "repeat_penalty": 1.5, "temperature": 0.0, "top_k": 3},
    ]
    changes = [
        {},
        {"repeat_penalty": 1.4, "repeat_last_n": -1},
        {"presence_penalty": -2.0, "frequency_penalty": 0.4},
        {"dry_multiplier": 1.5, "dry_sequence_breakers": ()},
        {"logit_bias": {0: -math.inf, n - 1: 3.0, n // 2: 6.0}, "repeat_penalty": 0.5},
    ]
    history = rng.integers(0, min(n + 5, 40), 200).tolist()  # some ids that short rows lack
    for row in rows_of_all_kinds(rng, n):
        best = int(np.argmax(row))
        for chain in chains:
            for change in changes:
                settings = SamplerSettings(seed=int(rng.integers(2**40)), **{**chain, **change})
                if settings.logit_bias and np.isneginf(row[1:]).all() and n < 3:
                    continue
                past = [*history, best, best, best, best]
                try:
                    ids, p = Sampler(settings).distribution(row, past)
                except NumericError:
                    with pytest.raises(NumericError):
                        Plain(settings).distribution(row, past)
                    continue
                with monkeypatch.context() as patch:
                    patch.setattr("pyengine.sampling._exp", plain_exp)
                    plain_ids, plain_p = Plain(settings).distribution(row, past)
                    drawn = Plain(settings).sample(row, past)
                assert ids.tolist() == plain_ids.tolist(), settings
                assert p.tobytes() == plain_p.tobytes(), settings
                assert Sampler(settings).sample(row, past) == drawn


def test_the_native_exponential_is_the_numpy_one_to_the_last_bit_and_right() -> None:
    rng = np.random.default_rng(0)
    x = np.concatenate([-rng.exponential(scale, 5000) for scale in (1e-9, 0.1, 1.0, 30.0, 500.0)])
    x = np.concatenate([x, [0.0, -0.0, -700.0, -1e300, -np.inf, -0.5 * math.log(2), -math.log(2)]])
    ours = _core.exp(x)
    assert ours.tobytes() == plain_exp(x).tobytes()
    right = np.array([math.exp(v) for v in np.maximum(x, -700.0)])
    assert (np.abs(ours - right) <= 2 * np.spacing(right)).all()


@pytest.mark.parametrize("n", [1, 64, 100, 5000])
def test_the_k_largest_are_those_of_a_full_sort(n: int) -> None:
    rng = np.random.default_rng(n)
    for row in rows_of_all_kinds(rng, n):
        order = sorted(range(n), key=lambda i: (-float(row[i]), i))
        for k in {0, 1, 2, 40, n // 2, n - 1, n, n + 1}:
            ids, values = _core.top_k(row, k)
            assert ids.tolist() == sorted(order[:k])
            assert values.tolist() == row[ids].astype(np.float64).tolist()


@pytest.mark.parametrize("bad", [math.nan, -math.nan, math.inf])
@pytest.mark.parametrize("settings", [{}, {"temperature": 0.0}, {"top_k": 0}, {"top_k": 0, "min_p": 0.0, "top_p": 1.0}])
def test_damaged_logits_are_found_wherever_they_are(bad: float, settings: dict[str, float]) -> None:
    for at in (0, 63, 64, 98, 99):
        logits = np.zeros(100, dtype=np.float32)
        logits[at] = bad
        with pytest.raises(NumericError):
            Sampler(SamplerSettings(**settings)).sample(logits)  # type: ignore[arg-type]
