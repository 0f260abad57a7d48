"""Which policy is fastest, decided from step times that were measured in turn, or that it can't be told.

In each round every policy takes a step on the same batch, so that what disturbs a round disturbs all of it. Two
policies are compared by the logarithms of their ratios within rounds: the Hodges-Lehmann estimate of the centre and its
exact interval, which is Wilcoxon's signed-rank test turned around (Hollander & Wolfe 1999, sections 3.2 and 3.3). A
few rounds that were disturbed hardly move it.

The rule. float32 is the choice unless a half policy took less time beyond noise, which is: the 95% interval of its
ratio to float32 is below 1. Of two such half policies the faster one beyond noise is taken, else mixed_bfloat16: it has
float32's range, so that there is no loss scale to watch, and nothing overflows. Six rounds are the fewest that can
show a difference.

Measuring may stop before the time is over where the fastest is so by a tenth in every round, or by a much stricter
interval (99.8%, from ten rounds on), so that looking again and again hardly adds errors (Haybittle 1971, Peto et al.
1976); tests/test_fastest.py counts them.
"""

import dataclasses
import functools
import math
from collections.abc import Mapping, Sequence

import numpy as np

from tfhalf.precision import POLICIES

FLOAT32, FLOAT16, BFLOAT16 = POLICIES
LEAST_ROUNDS, MOST_ROUNDS = 6, 40
_CONFIDENCE, _STRICT = 0.95, 0.998
# A policy is no longer measured after this many rounds that were all slower than float32's by this factor.
_ROUNDS_TO_BE_OUT, _MUCH_SLOWER = 3, 1.1


@dataclasses.dataclass(frozen=True)
class Ratio:
    """How many times as long one policy takes as another, with its interval; infinite bounds: too few rounds."""

    centre: float
    low: float
    high: float

    @property
    def is_noise(self) -> bool:
        """Whether the two can't be told apart."""
        return self.low <= 1 <= self.high

    def to_json(self) -> list[float | None]:
        """Returns it as JSON values, which have no infinite number."""
        return [self.centre, self.low, None if math.isinf(self.high) else self.high]

    @classmethod
    def from_json(cls, value: list[float | None]) -> "Ratio":
        """Returns what `to_json` made a list of."""
        return cls(value[0], value[1], math.inf if value[2] is None else value[2])

    def __str__(self) -> str:
        if math.isinf(self.high):
            return f"{self.centre:.2f} (few rounds)"
        return f"{self.centre:.2f} ({self.low:.2f} to {self.high:.2f})"


@dataclasses.dataclass(frozen=True)
class Fastest:
    """What was decided.

    Attributes:
        policy: the choice.
        ratios: policy to its ratio to float32, of those that were compared with it.
        within_noise: policies that may be as fast as the choice, or faster: the measurement can't tell.
    """

    policy: str
    ratios: dict[str, Ratio]
    within_noise: tuple[str, ...]


def compare(times: Sequence[float], others: Sequence[float], confidence: float = _CONFIDENCE) -> Ratio:
    """Compares step times of the same rounds; where one list is shorter, its rounds count.

    Args:
        times: seconds, by round.
        others: as times; at least one round must be in both.
        confidence: of the interval, two-sided.
    """
    rounds = min(len(times), len(others))
    logs = np.log(np.asarray(times[:rounds], "float64") / np.asarray(others[:rounds], "float64"))
    first, second = _pairs(rounds)
    means = np.sort((logs[first] + logs[second]) / 2)  # Walsh averages
    rank = _rank(rounds, (1 - confidence) / 2)
    low, high = (means[rank - 1], means[-rank]) if rank else (-np.inf, np.inf)
    return Ratio(*(float(np.exp(value)) for value in (np.median(means), low, high)))


@functools.cache
def _pairs(rounds: int) -> tuple[np.ndarray, np.ndarray]:
    return np.triu_indices(rounds)


@functools.cache
def _rank(rounds: int, error: float) -> int:
    """The largest rank r for which a signed-rank sum is below r in at most `error` of cases; 0 where there is none."""
    counts = np.ones(1)
    for rank in range(1, rounds + 1):  # each rank is in the sum or not
        counts = np.concatenate([counts, np.zeros(rank)]) + np.concatenate([np.zeros(rank), counts])
    return int(np.searchsorted(np.cumsum(counts) / 2.0**rounds, error, side="right"))


def is_out(times: Sequence[float], others: Sequence[float]) -> bool:
    """Returns whether a policy is so much slower than another that measuring it further is a waste."""
    pairs = list(zip(times, others, strict=False))
    return len(pairs) >= _ROUNDS_TO_BE_OUT and all(slow > _MUCH_SLOWER * fast for slow, fast in pairs)


def is_decided(times: Mapping[str, Sequence[float]]) -> bool:
    """Returns whether one policy is the fastest so clearly that measuring can stop.

    Args:
        times: policy to its seconds, by round.
    """
    best = min(times, key=lambda policy: float(np.median(times[policy])))
    return all(
        is_out(times[policy], times[best]) or compare(times[best], times[policy], _STRICT).high < 1
        for policy in times
        if policy != best
    )


def decide(times: Mapping[str, Sequence[float]]) -> Fastest:
    """Decides by the rule above.

    Args:
        times: policy to its seconds, by round, at least one; of policies that may be chosen. Without float32 only the
            half policies are compared, with each other.
    """
    halves = [policy for policy in (BFLOAT16, FLOAT16) if policy in times]
    if FLOAT32 not in times:
        policy = _of_halves(times, halves)
        return Fastest(policy, {}, _like(times, policy))
    ratios = {policy: compare(times[policy], times[FLOAT32]) for policy in halves}
    faster = [policy for policy in halves if ratios[policy].high < 1]
    policy = _of_halves(times, faster) if faster else FLOAT32
    return Fastest(policy, ratios, _like(times, policy))


def _of_halves(times: Mapping[str, Sequence[float]], halves: list[str]) -> str:
    if len(halves) == 2 and compare(times[FLOAT16], times[BFLOAT16]).high < 1:
        return FLOAT16
    return halves[0]


def _like(times: Mapping[str, Sequence[float]], choice: str) -> tuple[str, ...]:
    """The policies that weren't shown to be slower than the choice."""
    return tuple(
        policy
        for policy in times
        if policy != choice
        and compare(times[policy], times[choice]).low <= 1
        and not is_out(times[policy], times[choice])
    )
