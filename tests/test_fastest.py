"""The interval against scipy's test, and the rule against simulated steps whose true times are known."""

import json
import math

import numpy as np
import pytest
from scipy import stats

from tfhalf import fastest
from tfhalf.fastest import BFLOAT16, FLOAT16, FLOAT32


@pytest.mark.parametrize("rounds", [6, 11, 30])
@pytest.mark.parametrize("confidence", [0.95, 0.998])
def test_interval_is_scipys_test_turned_around(rounds, confidence):
    random = np.random.default_rng(rounds)
    seen = set()
    for shift in np.linspace(-0.2, 0.2, 41):
        times, others = np.exp(random.normal(shift, 0.1, rounds)), np.ones(rounds)
        ratio = fastest.compare(times, others, confidence)
        is_faster = stats.wilcoxon(np.log(times), alternative="less", method="exact").pvalue <= (1 - confidence) / 2
        is_slower = stats.wilcoxon(np.log(times), alternative="greater", method="exact").pvalue <= (1 - confidence) / 2
        assert (ratio.high < 1, ratio.low > 1) == (is_faster, is_slower)
        seen.add((is_faster, is_slower))
    assert len(seen) == 3 or (rounds, confidence) == (6, 0.998)  # 1 in 64 is no 0.001


def test_five_rounds_show_nothing_and_six_do():
    assert math.isinf(fastest.compare([1.0] * 5, [2.0] * 5).high)
    assert fastest.compare([1.0] * 6, [2.0] * 6) == fastest.Ratio(0.5, 0.5, 0.5)
    few = fastest.compare([1.0], [2.0])
    assert str(few) == "0.50 (few rounds)"
    assert fastest.Ratio.from_json(json.loads(json.dumps(few.to_json(), allow_nan=False))) == few


def test_one_disturbed_round_moves_little():
    plain = fastest.compare([0.8] * 12, [1.0] * 12)
    disturbed = fastest.compare([0.8] * 11 + [40.0], [1.0] * 12)
    assert plain.centre == disturbed.centre == pytest.approx(0.8)
    assert disturbed.high < 1


def steady(**seconds):
    return {name: [value * (1 + 0.001 * (turn % 3)) for turn in range(12)] for name, value in seconds.items()}


@pytest.mark.parametrize(
    ("seconds", "expected", "within_noise"),
    [
        ({FLOAT32: 1.0, FLOAT16: 0.5, BFLOAT16: 0.6}, FLOAT16, ()),
        ({FLOAT32: 1.0, FLOAT16: 0.6, BFLOAT16: 0.5}, BFLOAT16, ()),
        ({FLOAT32: 1.0, FLOAT16: 0.5, BFLOAT16: 0.5}, BFLOAT16, (FLOAT16,)),
        ({FLOAT32: 1.0, FLOAT16: 1.0, BFLOAT16: 1.0}, FLOAT32, (FLOAT16, BFLOAT16)),
        ({FLOAT32: 1.0, FLOAT16: 0.9, BFLOAT16: 1.1}, FLOAT16, ()),
        ({FLOAT32: 1.0, FLOAT16: 6.0, BFLOAT16: 1.1}, FLOAT32, ()),
        ({FLOAT32: 1.0}, FLOAT32, ()),
        ({FLOAT16: 1.0, BFLOAT16: 1.0}, BFLOAT16, (FLOAT16,)),
        ({FLOAT16: 0.9, BFLOAT16: 1.0}, FLOAT16, ()),
        ({FLOAT16: 1.0}, FLOAT16, ()),
    ],
)
def test_rule(seconds, expected, within_noise):
    decided = fastest.decide(steady(**seconds))
    assert (decided.policy, decided.within_noise) == (expected, within_noise)


def test_a_faster_half_that_is_not_shown_to_be_is_not_taken():
    times = {FLOAT32: [1.0] * 12, FLOAT16: [0.95] * 12, BFLOAT16: [0.5, 2.0] * 6}
    decided = fastest.decide(times)
    assert decided.policy == FLOAT16
    assert decided.within_noise == (BFLOAT16,)
    assert decided.ratios[BFLOAT16].is_noise


def simulate(random, true: dict[str, float]) -> fastest.Fastest:
    """As `tfhalf.trial` does, on a machine whose speed drifts; rounds are disturbed, and steps, some of them much."""
    times = {policy: [] for policy in true}
    live = list(true)
    for turn in range(fastest.MOST_ROUNDS):
        everywhere = np.exp(random.normal(0, 0.2) + 0.3 * np.sin(turn / 7))
        for policy in live:
            alone = np.exp(random.normal(0, 0.04)) * (random.choice([1.0, 1.5], p=[0.9, 0.1]))
            times[policy].append(true[policy] * everywhere * alone)
        live = [p for p in live if p == FLOAT32 or not fastest.is_out(times[p], times[FLOAT32])]
        if turn + 1 >= fastest.LEAST_ROUNDS and fastest.is_decided(times):
            break
    return fastest.decide(times)


@pytest.mark.parametrize("times", [100, pytest.param(1000, marks=pytest.mark.soak)])
def test_a_slower_policy_is_never_taken_and_an_equal_one_rarely(times):
    random = np.random.default_rng(1)
    equal = [simulate(random, {FLOAT32: 1.0, FLOAT16: 1.0, BFLOAT16: 1.0}) for _ in range(times)]
    taken = sum(one.policy != FLOAT32 for one in equal)
    assert taken <= stats.binom.ppf(0.99, times, 0.05)  # 2.5% for each of two
    slower = [simulate(random, {FLOAT32: 1.0, FLOAT16: 1.03, BFLOAT16: 1.2}) for _ in range(times)]
    assert [one.policy for one in slower] == [FLOAT32] * times
    assert any(one.within_noise for one in slower)  # and it says that it can't tell


def test_the_fastest_is_found_or_said_to_be_within_noise():
    random = np.random.default_rng(2)
    for true in ({FLOAT32: 1.0, FLOAT16: 1.4, BFLOAT16: 0.7}, {FLOAT32: 1.0, FLOAT16: 0.6, BFLOAT16: 0.7}):
        best = min(true, key=true.get)
        for _ in range(40):
            decided = simulate(random, true)
            assert decided.policy == best or best in decided.within_noise
    near = [simulate(random, {FLOAT32: 1.0, FLOAT16: 1.5, BFLOAT16: 0.98}) for _ in range(40)]
    assert all(one.policy == BFLOAT16 or BFLOAT16 in one.within_noise for one in near)
    assert {one.policy for one in near} <= {FLOAT32, BFLOAT16}


def test_what_dropped_out_is_slower_though_its_rounds_are_few():
    decided = fastest.decide({FLOAT32: [1.0] * 6, FLOAT16: [6.0] * 3})
    assert (decided.policy, decided.within_noise) == (FLOAT32, ())


def test_stops_early_only_where_it_is_clear():
    assert not fastest.is_decided({FLOAT32: [1.0] * 9, BFLOAT16: [0.95] * 9})
    assert fastest.is_decided({FLOAT32: [1.0] * 10, BFLOAT16: [0.95] * 10})
    assert not fastest.is_decided({FLOAT32: [1.0] * 10, BFLOAT16: [0.95] * 9 + [1.2]})
    assert fastest.is_decided({FLOAT32: [1.0] * 6, BFLOAT16: [0.9] * 6, FLOAT16: [1.3] * 3})
    assert fastest.is_decided({FLOAT32: [1.0]})
    assert fastest.is_out([1.2] * 3, [1.0] * 3)
    assert not fastest.is_out([1.2, 1.2, 1.05], [1.0] * 3)
    assert not fastest.is_out([6.0] * 2, [1.0] * 2)
