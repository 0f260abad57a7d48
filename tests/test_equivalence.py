"""The statistics of paired runs, held to statsmodels-free oracles: hand-made numbers, scipy's tests, simulation."""

import math

import numpy as np
import pytest
from scipy import stats

from tfhalf import equivalence

TRIALS = 1000
# Of a share of 5% in that many trials, three standard errors.
NOISE = 3 * math.sqrt(0.05 * 0.95 / TRIALS)


def test_interval_and_p_values_are_those_of_scipys_t_tests():
    rng = np.random.default_rng(0)
    for count in (2, 5, 30):
        true = rng.normal(0.9, 0.02, count)
        half = true + rng.normal(0.004, 0.01, count)
        verdict = equivalence.parity(true, half, margin=0.02)
        interval = stats.ttest_rel(half, true).confidence_interval(0.90)
        np.testing.assert_allclose([verdict.low, verdict.high], interval, rtol=1e-12)
        above = stats.ttest_1samp(half - true, -0.02, alternative="greater").pvalue
        below = stats.ttest_1samp(half - true, 0.02, alternative="less").pvalue
        assert verdict.p_equivalent == pytest.approx(max(above, below), rel=1e-9)
        assert (verdict.kind == "equivalent") == (max(above, below) < 0.05)


@pytest.mark.parametrize(
    ("half", "kind"),
    [
        ([1.0, 2.0, 3.0], "equivalent"),
        ([1.1, 2.0, 2.9], "equivalent"),
        ([11.0, 12.0, 13.0], "different"),
        ([-9.0, -8.0, -7.1], "different"),
        ([1.0, 2.9, 3.0], "undecided"),
        ([2.0, 3.0, 4.0], "different"),  # at the margin in every seed is no longer within it
    ],
)
def test_verdicts_by_hand(half, kind):
    verdict = equivalence.parity([1.0, 2.0, 3.0], half, margin=1.0)
    assert verdict.kind == kind
    assert str(verdict).startswith(kind)
    assert (verdict.more_seeds == 0) == (kind != "undecided")


@pytest.mark.parametrize("count", [5, 10])
@pytest.mark.parametrize("scatter", ["normal", "heavy", "skewed", "counted"])
def test_a_difference_at_the_margin_is_called_equivalent_in_at_most_5_percent(count, scatter):
    rng = np.random.default_rng(1)
    shape = [2, TRIALS, count]
    true, half = {
        "normal": rng.normal(size=shape),
        "heavy": rng.standard_t(5, size=shape),
        "skewed": rng.exponential(size=shape),
        "counted": np.round(rng.normal(size=shape) * 4) / 4,  # of a thousand pictures, some
    }[scatter]
    half += rng.choice([-2.0, 2.0], [TRIALS, 1])
    called = [equivalence.parity(*pair, margin=2.0).kind for pair in zip(true, half, strict=True)]
    assert called.count("equivalent") / TRIALS <= 0.05 + NOISE


def test_only_where_differences_are_skewed_by_themselves_the_rate_is_higher():
    rng = np.random.default_rng(1)
    rows = 2.0 + rng.exponential(size=[TRIALS, 5]) - 1
    called = [equivalence.parity(np.zeros(5), row, margin=2.0).kind for row in rows]
    assert 0.12 < called.count("equivalent") / TRIALS < 0.18  # the docstring's 15%


def test_no_difference_is_called_different_in_at_most_5_percent_and_found_equivalent_with_ten_seeds():
    rng = np.random.default_rng(2)
    kinds = [equivalence.parity(rng.normal(size=10), rng.normal(size=10), margin=2.0).kind for _ in range(TRIALS)]
    assert kinds.count("different") == 0
    assert kinds.count("equivalent") / TRIALS > 0.98  # the literature's 99%
    within = [
        equivalence.parity(np.zeros(10), 2.0 + math.sqrt(2) * rng.normal(size=10), margin=2.0).kind
        for _ in range(TRIALS)
    ]
    assert within.count("different") / TRIALS <= 0.05 + NOISE


def test_five_seeds_at_one_deviation_seldom_decide_though_the_models_are_the_same():
    rng = np.random.default_rng(3)
    kinds = [equivalence.parity(rng.normal(size=5), rng.normal(size=5), margin=1.0).kind for _ in range(TRIALS)]
    assert 0.05 < kinds.count("equivalent") / TRIALS < 0.13


def test_looking_again_and_again_costs_more_than_alpha():
    rng = np.random.default_rng(4)
    rows = 2.0 + rng.normal(size=[TRIALS, 20])
    looked = [
        any(equivalence.parity(np.zeros(n), row[:n], margin=2.0).kind == "equivalent" for n in (5, 10, 20))
        for row in rows
    ]
    assert 0.09 < np.mean(looked) < 0.13  # the docstring's 11%


def test_as_many_more_seeds_as_it_says_decide_in_four_of_five_cases():
    rng = np.random.default_rng(5)
    seen = np.array([0.1, -1.3, 1.9, -0.4, 0.6])
    verdict = equivalence.parity(np.zeros(5), seen, margin=0.8)
    assert verdict.kind == "undecided"
    total = 5 + verdict.more_seeds
    rates = []
    for count in (total, total - 2):
        rows = rng.normal(seen.mean(), seen.std(ddof=1), [TRIALS, count])
        rates.append(
            np.mean([equivalence.parity(np.zeros(count), row, margin=0.8).kind != "undecided" for row in rows])
        )
    assert rates[0] > 0.8 - NOISE
    assert rates[1] < rates[0]


def test_a_difference_near_the_margin_is_never_decided():
    verdict = equivalence.parity(np.zeros(4), [0.9, 1.1, 1.05, 0.95], margin=1.0)
    assert verdict.kind == "undecided"
    assert verdict.more_seeds is None
    assert "more than 1000" in str(verdict)


def test_a_half_run_that_failed_makes_it_different():
    verdict = equivalence.parity([0.9, 0.9, 0.9], [0.9, math.nan, 0.9], margin=0.1)
    assert (verdict.kind, verdict.num_failed, verdict.num_pairs) == ("different", 1, 2)
    assert "1 more half run" in str(verdict)
    assert equivalence.parity([0.9, 0.9], [math.nan, math.inf], margin=0.1).kind == "different"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (([0.9], [0.9], 0.1), "float32_scores must be two scores or more, got 1"),
        (([0.9, 0.9], [0.9], 0.1), "half_scores has 1 scores"),
        (([0.9, math.nan], [0.9, 0.9], 0.1), r"numbers \[1\] aren't finite"),
        (([0.9, 0.9], [0.9, 0.9], 0.0), "margin must be above 0, got 0"),
        (([0.9, 0.9], [0.9, 0.9], math.nan), "margin must be above 0"),
        (([0.9, 0.9], [0.9, 0.9], 0.1, 0.5), "alpha must be above 0 and below 0.5"),
    ],
)
def test_what_it_refuses(arguments, words):
    with pytest.raises(ValueError, match=words):
        equivalence.parity(*arguments)


def test_margin_is_two_standard_deviations_but_not_less_than_an_example():
    assert equivalence.margin_of([1.0, 2.0, 3.0]) == 2.0
    assert equivalence.margin_of([0.98, 0.98, 0.98], smallest=0.001) == 0.001
    with pytest.raises(ValueError, match="two scores or more"):
        equivalence.margin_of([1.0])
