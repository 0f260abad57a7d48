"""Is half as good as float32? The statistics of paired runs; no process is started here.

Two means that "look alike" prove nothing: with few runs everything looks alike. An equivalence test turns the burden of
proof round. It states a margin first, the largest difference that wouldn't matter, and calls two things equivalent only
where the data speak against a difference as large as it. The two one-sided tests (TOST) at level alpha are the same as
asking whether the 1 - 2 alpha confidence interval of the mean difference lies within the margins; where it lies
outside of them altogether the two are different; where it holds a margin nothing is decided, and more runs are needed.
Each of the two wrong verdicts has a probability of at most alpha.

Runs are paired by seed: initial weights, order of data and augmentation are the same, so that the difference has less
scatter than two runs of different seeds. Differences are taken as normal (Student's t).

The margin is two standard deviations of float32 runs over seeds (`margin_of`), known before the runs that are judged:
what changing the seed does to a model anyway, nobody misses.

Verdicts hold for a number of seeds that was decided on before. Who adds seeds until the verdict pleases has more than
one try: three looks, at 5, 10 and 20 seeds, make 11% of alpha's 5% (simulated in the tests).

Source: Schuirmann 1987, "A comparison of the two one-sided tests procedure and the power approach for assessing the
equivalence of average bioavailability"; Lakens 2017, "Equivalence tests", https://doi.org/10.1177/1948550617697177
"""

import bisect
import dataclasses
from collections.abc import Sequence

import numpy as np
from scipy import stats

EQUIVALENT, DIFFERENT, UNDECIDED = "equivalent", "different", "undecided"
# The usual power of a study that is planned: the number of seeds which decides in four of five cases.
_POWER = 0.8
_MOST_SEEDS = 1000
_NUM_DEVIATIONS = 2.0


@dataclasses.dataclass(frozen=True)
class Verdict:
    """What paired runs say; `str()` of it is a sentence.

    Attributes:
        kind: "equivalent", "different" or "undecided".
        difference: mean of half minus float32.
        deviation: standard deviation of the differences.
        low, high: the 1 - 2 alpha confidence interval of it.
        margin: as given.
        alpha: as given.
        num_pairs: pairs of runs that have both scores.
        num_failed: half runs without a finite score, whose float32 twins have one.
        p_equivalent: the larger p-value of the two tests against a difference of at least the margin.
        p_different: the p-value of the test against a difference of at most the margin.
    """

    kind: str
    difference: float
    deviation: float
    low: float
    high: float
    margin: float
    alpha: float
    num_pairs: int
    num_failed: int
    p_equivalent: float
    p_different: float

    @property
    def more_seeds(self) -> int | None:
        """So many more seeds would decide with a probability of 80%, if what was seen is the truth.

        0 where it is decided, None where 1,000 in all wouldn't do.
        """
        if self.kind != UNDECIDED:
            return 0
        total = bisect.bisect_left(range(_MOST_SEEDS + 1), _POWER, lo=self.num_pairs + 1, key=self._power)
        return total - self.num_pairs if total <= _MOST_SEEDS else None

    def _power(self, count: int) -> float:
        """Probability that so many seeds decide."""
        degrees, error = count - 1, self.deviation / np.sqrt(count)
        critical = stats.t.ppf(1 - self.alpha, degrees)
        lower, upper = (self.difference - self.margin) / error, (self.difference + self.margin) / error
        # Noncentral t. Of both tests passing together it is a bound, and exact where one of them surely passes.
        both = stats.nct.cdf(-critical, degrees, lower) - stats.nct.cdf(critical, degrees, upper)
        outside = stats.nct.sf(critical, degrees, (abs(self.difference) - self.margin) / error)
        return max(both, outside)

    def __str__(self) -> str:
        percent = f"{100 * (1 - 2 * self.alpha):g}%"
        seen = f"half - float32 = {self.difference:+.4g} ({percent} {self.low:+.4g} to {self.high:+.4g})"
        line = f"{self.kind}: {seen}, margin {self.margin:.4g}, {self.num_pairs} seeds"
        if self.num_failed:
            return f"{line}; {self.num_failed} more half runs failed, whose float32 twins did not"
        if self.kind != UNDECIDED:
            return line
        if self.more_seeds is None:
            return f"{line}; more than {_MOST_SEEDS} would be needed"
        return f"{line}; about {self.more_seeds} more seeds would decide"


def margin_of(float32_scores: Sequence[float], smallest: float = 0.0) -> float:
    """Returns the margin that goes by how float32 runs scatter: two of their standard deviations.

    Args:
        float32_scores: float `[seeds]`, of pilot runs; two or more. Of five, the standard deviation is within a factor
            of 0.6 to 2.9 with a probability of 95%.
        smallest: the margin isn't below it; the worth of one test example, where the score counts examples.

    Raises:
        ValueError: there are fewer than two scores, or one isn't finite.

    Example:

    >>> margin_of([0.91, 0.93, 0.92])
    0.02
    """
    scores = _finite("float32_scores", float32_scores)
    return max(round(_NUM_DEVIATIONS * float(np.std(scores, ddof=1)), 12), smallest)


def parity(
    float32_scores: Sequence[float], half_scores: Sequence[float], margin: float, alpha: float = 0.05
) -> Verdict:
    """Tells whether half is as good as float32, by two one-sided tests on paired runs.

    Args:
        float32_scores: float `[seeds]`, two or more, all finite.
        half_scores: float `[seeds]`, of the same seeds in the same order. What isn't finite is a run that failed: then
            the verdict is "different", whatever the others say.
        margin: the largest difference that doesn't matter, above 0, in the scores' unit; stated before the runs.
        alpha: probability of each wrong verdict at most, above 0 and below 0.5.

    Returns:
        A `Verdict`.

    Raises:
        ValueError: the scores don't pair, are too few or not finite, or margin or alpha are out of range.

    Example:

    >>> print(parity([0.90, 0.92, 0.91, 0.93], [0.91, 0.91, 0.92, 0.93], margin=0.03))
    equivalent: half - float32 = +0.0025 (90% -0.008766 to +0.01377), margin 0.03, 4 seeds
    """
    true = _finite("float32_scores", float32_scores)
    half = np.asarray(half_scores, "float64")
    if half.shape != true.shape:
        raise ValueError(f"parity: half_scores has {half.size} scores, float32_scores {true.size}: they must pair")
    if not (np.isfinite(margin) and margin > 0):
        raise ValueError(f"parity: margin must be above 0, got {margin}")
    if not 0 < alpha < 0.5:
        raise ValueError(f"parity: alpha must be above 0 and below 0.5, got {alpha}")
    differences = (half - true)[np.isfinite(half)]
    failed = half.size - differences.size
    if differences.size < 2:
        nothing = float("nan")
        found = differences.mean() if differences.size else nothing
        return Verdict(DIFFERENT, found, nothing, nothing, nothing, margin, alpha, differences.size, failed, 1.0, 0.0)
    mean, deviation, count = float(differences.mean()), float(differences.std(ddof=1)), differences.size
    error = deviation / np.sqrt(count)
    half_width = stats.t.ppf(1 - alpha, count - 1) * error
    low, high = mean - half_width, mean + half_width
    if failed or low >= margin or high <= -margin:
        kind = DIFFERENT
    else:
        kind = EQUIVALENT if -margin < low and high < margin else UNDECIDED
    return Verdict(
        kind,
        mean,
        deviation,
        low,
        high,
        margin,
        alpha,
        count,
        failed,
        p_equivalent=_p_above(margin - abs(mean), error, count),
        p_different=_p_above(abs(mean) - margin, error, count),
    )


def _finite(name: str, scores: Sequence[float]) -> np.ndarray:
    values = np.asarray(scores, "float64")
    if values.ndim != 1 or values.size < 2:
        raise ValueError(f"{name} must be two scores or more, got {values.size}")
    if not np.isfinite(values).all():
        wrong = np.flatnonzero(~np.isfinite(values)).tolist()
        raise ValueError(f"{name}: numbers {wrong} aren't finite: float32 itself failed there; mend that first")
    return values


def _p_above(distance: float, error: float, count: int) -> float:
    """The p-value of a distance that should be above 0."""
    if error == 0.0:
        return 0.0 if distance > 0 else 1.0
    return float(stats.t.sf(distance / error, count - 1))
