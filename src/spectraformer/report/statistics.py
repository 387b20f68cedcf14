"""What seeds can tell: means with intervals, differences with tests, and a correction for making many of them.

Numbers alone; accuracies are fractions in [0, 1]. scipy is imported when used: it takes a second, and every command
imports the report.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

LEVEL = 0.95
SEEDS, TEST_SET = "seeds", "test set"
LEAST_FREEDOM = 2  # a pooled deviation of fewer degrees of freedom says nothing
DIGITS = 9  # accuracies are multiples of 1 / examples: what lies below this is rounding

Test = Literal["paired", "pooled", "none"]


@dataclass(frozen=True)
class Estimate:
    """Mean accuracy over seeds, its sample standard deviation (n - 1), and a 95 % interval.

    Of two seeds or more it is Student's t interval of the mean, for new seeds on the same data and test set. Of one
    seed it is Wilson's interval of a proportion, for new test sets and the same weights: it knows nothing of seeds.

    Attributes:
        mean: In [0, 1].
        deviation: In the same unit, or None of one seed.
        count: Number of seeds.
        low: Lower end of the interval, in [0, 1].
        high: Upper end.
        basis: "seeds", or "test set" for one seed.

    References:
        Wilson (1927), Probable inference; Brown, Cai and DasGupta (2001), Interval estimation for a proportion.
    """

    mean: float
    deviation: float | None
    count: int
    low: float
    high: float
    basis: str

    @classmethod
    def of(cls, values: Sequence[float], examples: int) -> Estimate:
        """Of one accuracy or more.

        Args:
            values: One a seed, in [0, 1].
            examples: Of the test set, at least 1.
        """
        mean = min(max(statistics.fmean(values), min(values)), max(values))
        if len(values) == 1:
            return cls(mean, None, 1, *_wilson(mean, examples), TEST_SET)
        deviation = statistics.stdev(values)
        half = quantile(len(values) - 1) * deviation / math.sqrt(len(values))
        return cls(mean, deviation, len(values), max(0.0, mean - half), min(1.0, mean + half), SEEDS)


def quantile(freedom: int, level: float = LEVEL) -> float:
    """Half the width of Student's central ``level`` interval, in standard errors."""
    from scipy import stats  # type: ignore[import-untyped]

    return float(stats.t.ppf(0.5 + level / 2, freedom))


def _wilson(accuracy: float, examples: int) -> tuple[float, float]:
    from scipy import stats

    found = stats.binomtest(round(accuracy * examples), examples).proportion_ci(LEVEL, method="wilson")
    return float(found.low), float(found.high)


@dataclass(frozen=True)
class Difference:
    """Of two accuracies, first minus second.

    Attributes:
        test: "paired": Student's t over the seeds that both have. "pooled": t with the standard deviation of all
            comparable attentions, as if seed noise were alike for all. "none": neither can be made.
        seeds: Pairs; for the others, seeds of the side that has fewer.
        mean: In [-1, 1].
        low: Lower end of the 95 % interval, for this one difference; of "none", of the noise of the test set alone.
        high: Upper end.
        error: Standard error that the interval and p are made from.
        freedom: Degrees of freedom of the error; None of "none".
        p: Two-sided, in [0, 1]; None where there is no test, or where seeds do not vary at all.
    """

    test: Test
    seeds: int
    mean: float
    low: float
    high: float
    error: float
    freedom: int | None
    p: float | None


def paired_difference(first: Mapping[int, float], second: Mapping[int, float]) -> Difference | None:
    """Student's paired t test of accuracies by seed, over the seeds that both have; None of fewer than two.

    It supposes that differences are normal and independent from seed to seed, not that both vary alike.
    """
    both = sorted(first.keys() & second.keys())
    if len(both) < 2:
        return None
    differences = [round(first[seed] - second[seed], DIGITS) for seed in both]
    error = statistics.stdev(differences) / math.sqrt(len(both))  # exactly 0 if they do not vary
    return _tested("paired", len(both), statistics.fmean(differences), error, len(both) - 1)


def pooled_deviation(groups: Sequence[Sequence[float]]) -> tuple[float, int]:
    """Standard deviation within groups, and its degrees of freedom; (0, 0) if no group has two values."""
    freedom = sum(len(group) - 1 for group in groups)
    if not freedom:
        return 0.0, 0
    squares = sum(statistics.variance(group) * (len(group) - 1) for group in groups if len(group) > 1)
    return math.sqrt(squares / freedom), freedom


def pooled_difference(first: Estimate, second: Estimate, deviation: float, freedom: int) -> Difference | None:
    """Student's t test of two means with a deviation pooled over more groups; None if that is too little known."""
    if freedom < LEAST_FREEDOM:
        return None
    error = deviation * math.sqrt(1 / first.count + 1 / second.count)
    mean = round(first.mean - second.mean, DIGITS)
    return _tested("pooled", min(first.count, second.count), mean, error, freedom)


def untested_difference(first: Estimate, second: Estimate, examples: int) -> Difference:
    """With the interval that the test set alone leaves, as if its examples had been drawn anew for each side.

    Both sides answer the same examples, so this is wider than need be for the test set; seeds are not in it at all.
    """
    error = math.sqrt(sum(side.mean * (1 - side.mean) for side in (first, second)) / examples)
    half = statistics.NormalDist().inv_cdf(0.5 + LEVEL / 2) * error
    mean = round(first.mean - second.mean, DIGITS)
    return Difference("none", min(first.count, second.count), mean, mean - half, mean + half, error, None, None)


def _tested(test: Test, seeds: int, mean: float, error: float, freedom: int) -> Difference:
    from scipy import stats

    half = quantile(freedom) * error
    if error:
        p: float | None = float(2 * stats.t.sf(abs(mean) / error, freedom))
    else:
        p = None if mean else 1.0  # a constant difference has no t, however small it is
    return Difference(test, seeds, mean, mean - half, mean + half, error, freedom, p)


def holm(ps: Sequence[float]) -> list[float]:
    """Adjusted p values: those below a level err at all with at most that probability, whatever the dependence.

    Args:
        ps: In [0, 1], in any order; the answer is in the same order.

    References:
        Holm (1979), A simple sequentially rejective multiple test procedure.
    """
    order = sorted(range(len(ps)), key=lambda i: ps[i])
    adjusted, largest = [1.0] * len(ps), 0.0
    for rank, i in enumerate(order):
        largest = max(largest, min(1.0, (len(ps) - rank) * ps[i]))
        adjusted[i] = largest
    return adjusted


def least_difference(difference: Difference, tests: int) -> float:
    """How far from 0 a difference with this error has to be to pass Holm's first step among so many tests."""
    assert difference.freedom is not None
    return quantile(difference.freedom, 1 - (1 - LEVEL) / tests) * difference.error
