"""A text that goes round in a circle is noticed; one that only repeats something is not."""

from __future__ import annotations

import random

import pytest

from pyengine.loops import LoopDetector

DICE = random.Random(5)
STORY = [DICE.randrange(30000) for _ in range(3000)]


def noticed_at(tokens: list[int], limit: int = 512) -> int | None:
    """How many tokens had come when the detector spoke up."""
    detector = LoopDetector(limit)
    return next((n for n, token in enumerate(tokens, 1) if detector.feed(token)), None)


def oracle(tokens: list[int], limit: int) -> int | None:
    """The definition, tried out: the shortest beginning that ends in enough copies of one passage."""
    for n in range(1, len(tokens) + 1):
        for period in range(1, n // 3 + 1):
            length = max(limit, 3 * period)
            if n >= length and all(tokens[i] == tokens[i - period] for i in range(n - length + period, n)):
                return n
    return None


@pytest.mark.parametrize("period", [1, 2, 7, 60, 170, 171, 300, 2048])
def test_a_passage_that_goes_on_repeating_is_noticed_as_early_as_promised(period: int) -> None:
    passage = STORY[500 : 500 + period] if period > 1 else [7]
    loop = [passage[i % period] for i in range(8000)]
    assert noticed_at(STORY[:400] + loop) == 400 + max(512, 3 * period)


def test_a_passage_longer_than_is_remembered_is_not_noticed() -> None:
    assert noticed_at(STORY[:2049] * 4) is None


def test_what_people_repeat_on_purpose_passes() -> None:
    rulers = (STORY[:40] + [9] * 120) * 2 + STORY[:30]
    zeros = [n for row in range(16) for n in ([48, 44] * 15 + [10])] + STORY
    lines = [n for i in range(400) for n in (1, 2, 3, 4, 5, 1000 + i, 10)]  # entries that differ in one token
    refrain = [n for verse in range(12) for n in (STORY[verse * 60 : verse * 60 + 60] + STORY[2900:2960])]
    quoted_twice = STORY[:1500] + STORY[:1500]
    for text in (rulers, zeros, lines, refrain, quoted_twice, STORY):
        assert noticed_at(text) is None


def test_the_detector_agrees_with_the_definition() -> None:
    found = 0
    for trial in range(300):
        dice = random.Random(trial)
        text: list[int] = []
        while len(text) < 120:
            passage = [dice.randrange(3) for _ in range(dice.randint(1, 9))]
            text += passage * dice.randint(1, 6)
        limit = dice.choice([1, 8, 20, 40])
        assert noticed_at(text, limit) == oracle(text, limit), (trial, limit)
        found += oracle(text, limit) is not None
    assert 50 < found < 300


def test_a_detector_that_starts_anew_has_forgotten() -> None:
    detector = LoopDetector(30)
    assert [detector.feed(7) for _ in range(30)] == [False] * 29 + [True]
    detector.restart()
    assert [detector.feed(7) for _ in range(30)] == [False] * 29 + [True]
