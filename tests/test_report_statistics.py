"""What seeds can tell: intervals, tests, their correction, and ranks, against scipy, by hand and by simulation."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from spectraformer.report.ranking import critical_difference, friedman, rank, ranking_words, ranks_of
from spectraformer.report.statistics import (
    Estimate,
    holm,
    least_difference,
    paired_difference,
    pooled_deviation,
    pooled_difference,
    untested_difference,
)

PROBABILITIES = st.lists(st.floats(0, 1), min_size=1, max_size=30)


def test_the_interval_over_seeds_is_students():
    values = [0.30, 0.34, 0.35]
    found = Estimate.of(values, 500)
    expected = stats.t.interval(0.95, 2, loc=np.mean(values), scale=stats.sem(values))
    assert (found.low, found.high) == pytest.approx(expected) and found.basis == "seeds"
    assert found.deviation == pytest.approx(np.std(values, ddof=1)) and found.count == 3
    assert Estimate.of([0.98, 1.0], 500).high == 1.0  # an accuracy has an end


def test_one_seed_has_the_interval_of_its_test_set_and_no_deviation():
    found = Estimate.of([0.8], 10)
    # Wilson (1927) by hand: (p + z²/2n ± z sqrt(p (1 − p) / n + z²/4n²)) / (1 + z²/n)
    z = 1.959964
    middle, half = 0.8 + z**2 / 20, z * math.sqrt(0.16 / 10 + z**2 / 400)
    assert (found.low, found.high) == pytest.approx(
        ((middle - half) / (1 + z**2 / 10), (middle + half) / (1 + z**2 / 10))
    )
    assert found.deviation is None and found.basis == "test set"
    for certain in (0.0, 1.0):
        edge = Estimate.of([certain], 500)
        assert 0 <= edge.low < edge.high <= 1


def test_seeds_that_agree_leave_no_width():
    found = Estimate.of([0.1, 0.1, 0.1], 500)
    assert found.low == found.mean == found.high == 0.1 and found.deviation == 0


@pytest.mark.slow
@pytest.mark.parametrize("seeds", [2, 3, 5])
def test_the_interval_covers_what_it_says(seeds):
    generator = np.random.default_rng(seeds)
    draws = 0.4 + 0.01 * generator.standard_normal((4000, seeds))
    covered = np.mean([(e := Estimate.of(list(draw), 500)).low <= 0.4 <= e.high for draw in draws])
    assert abs(covered - 0.95) < 4 * math.sqrt(0.95 * 0.05 / 4000)


@pytest.mark.slow
def test_the_interval_of_one_seed_covers_test_sets():
    generator = np.random.default_rng(0)
    hits = generator.binomial(500, 0.37, 4000)
    covered = np.mean([(e := Estimate.of([hit / 500], 500)).low <= 0.37 <= e.high for hit in hits])
    assert abs(covered - 0.95) < 0.015


def test_the_paired_test_is_scipys():
    first, second = {0: 0.31, 1: 0.33, 2: 0.36, 7: 0.9}, {0: 0.30, 1: 0.33, 2: 0.31, 8: 0.1}
    found = paired_difference(first, second)
    a, b = ([side[seed] for seed in (0, 1, 2)] for side in (first, second))  # only seeds that both have
    expected = stats.ttest_rel(a, b)
    assert found.p == pytest.approx(expected.pvalue) and found.seeds == 3 and found.freedom == 2
    assert (found.low, found.high) == pytest.approx(tuple(expected.confidence_interval(0.95)))
    assert found.mean == pytest.approx(0.02)
    assert paired_difference({0: 0.3, 1: 0.4}, {1: 0.3, 2: 0.4}) is None


def test_differences_that_do_not_vary_have_no_t():
    # 0.31 − 0.30 and 0.35 − 0.34 differ by rounding alone.
    constant = paired_difference({0: 0.31, 1: 0.35}, {0: 0.30, 1: 0.34})
    assert constant.p is None and constant.low == constant.high == pytest.approx(0.01)
    equal = paired_difference({0: 0.3, 1: 0.4}, {0: 0.3, 1: 0.4})
    assert equal.p == 1.0 and equal.mean == 0


def test_the_pooled_test_of_two_groups_is_the_classical_one():
    a, b = [0.31, 0.33, 0.36], [0.30, 0.29, 0.28, 0.31]
    deviation, freedom = pooled_deviation([a, b, [0.5]])
    found = pooled_difference(Estimate.of(a, 500), Estimate.of(b, 500), deviation, freedom)
    assert found.p == pytest.approx(stats.ttest_ind(a, b).pvalue) and freedom == 5
    one = pooled_difference(Estimate.of([0.36], 500), Estimate.of(b, 500), deviation, freedom)
    assert one.error == pytest.approx(deviation * math.sqrt(1 + 1 / 4)) and one.seeds == 1
    assert pooled_difference(Estimate.of([0.36], 500), Estimate.of([0.3], 500), 0.01, 1) is None
    assert pooled_deviation([[0.1], [0.2]]) == (0.0, 0)


def test_without_seeds_there_is_no_p():
    found = untested_difference(Estimate.of([0.4], 500), Estimate.of([0.3], 500), 500)
    half = 1.959964 * math.sqrt((0.24 + 0.21) / 500)
    assert found.p is None and (found.low, found.high) == pytest.approx((0.1 - half, 0.1 + half))


def test_holm_by_hand():
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([]) == [] and holm([0.5, 0.9]) == [1.0, 1.0]


@given(PROBABILITIES)
def test_holm_keeps_the_order_and_lies_between_no_correction_and_bonferronis(ps):
    adjusted = holm(ps)
    for p, q in zip(ps, adjusted, strict=True):
        assert p <= q <= min(1.0, len(ps) * p) or q == pytest.approx(p)
    order = sorted(range(len(ps)), key=lambda i: ps[i])
    assert all(adjusted[i] <= adjusted[j] for i, j in itertools.pairwise(order))


@pytest.mark.slow
def test_so_many_comparisons_err_with_five_per_cent_at_most():
    """25 attentions that are all alike, 5 seeds: any is called different from the first in at most 5 % of worlds."""
    generator = np.random.default_rng(1)
    wrong = 0
    for _ in range(400):
        world = generator.normal(0.4, 0.01, (25, 5))
        base = dict(enumerate(world[0]))
        found = [paired_difference(dict(enumerate(row)), base) for row in world[1:]]
        wrong += min(holm([one.p for one in found])) < 0.05
    assert wrong / 400 < 0.05 + 3 * math.sqrt(0.05 * 0.95 / 400)


def test_the_least_difference_is_where_the_test_passes():
    found = paired_difference({0: 0.31, 1: 0.33, 2: 0.36}, {0: 0.30, 1: 0.33, 2: 0.31})
    least = least_difference(found, 24)
    for factor, passes in ((1.001, True), (0.999, False)):
        p = 2 * stats.t.sf(factor * least / found.error, found.freedom)
        assert bool(24 * p < 0.05) is passes


def test_ranks_by_hand():
    """Four attentions on five tasks; two share the second place on task t, all the first on x."""
    table = {
        "a": [0.50, 0.60, 0.70, 0.80, 0.5],  # ranks 1, 1, 1, 2, 2.5
        "b": [0.40, 0.50, 0.60, 0.90, 0.5],  # 2.5, 2, 3, 1, 2.5
        "c": [0.40, 0.30, 0.65, 0.70, 0.5],  # 2.5, 4, 2, 3, 2.5
        "d": [0.10, 0.40, 0.20, 0.60, 0.5],  # 4, 3, 4, 4, 2.5
    }
    found = rank(list(table), list("tuvwx"), list(table.values()))
    assert found.labels == ("a", "b", "c", "d")
    assert found.ranks == ((1, 1, 1, 2, 2.5), (2.5, 2, 3, 1, 2.5), (2.5, 4, 2, 3, 2.5), (4, 3, 4, 4, 2.5))
    assert found.means == pytest.approx((1.5, 2.2, 2.8, 3.5))
    scipys = stats.friedmanchisquare(*table.values())
    assert found.statistic == pytest.approx(scipys.statistic)
    assert found.p == pytest.approx(scipys.pvalue, abs=0.05)  # its chi squared law is for many tasks
    assert found.critical == pytest.approx(2.569 * math.sqrt(4 * 5 / 30), rel=1e-3)
    assert found.groups == [(0, 3)]  # 3.5 − 1.5 < 2.1
    assert ranking_words(found)[1] == "Mean ranks more than 2.1 apart differ (Nemenyi): no pair does."


@pytest.mark.parametrize(("k", "n", "exact"), [(2, 3, 2 / 2**3), (3, 3, 6 / 6**3), (2, 6, 2 / 2**6)])
def test_p_is_right_for_few_tasks(k, n, exact):
    """Perfect agreement: as probable as one order of k in all tasks but the first."""
    ranks = np.tile(np.arange(1.0, k + 1)[:, None], (1, n))
    statistic, p = friedman(ranks)
    assert statistic == pytest.approx(n * (k - 1))
    assert p == pytest.approx(exact, abs=4 * math.sqrt(exact / 9999))


def test_ties_everywhere_differ_in_nothing():
    assert friedman(ranks_of(np.full((4, 3), 0.5))) == (0.0, 1.0)


@pytest.mark.parametrize(("k", "q"), [(2, 1.960), (5, 2.728), (10, 3.164)])  # Demšar (2006), table 5a
def test_critical_differences(k, q):
    assert critical_difference(k, 7) == pytest.approx(q * math.sqrt(k * (k + 1) / 42), rel=1e-3)


def test_groups_do_not_differ_and_their_neighbours_do():
    labels = [f"a{i}" for i in range(6)]
    found = rank(labels, [f"t{i}" for i in range(30)], [[0.9 - 0.1 * i] * 30 for i in range(6)])
    assert found.p == pytest.approx(1e-4)  # the ranks as they are count among the 10 000: never 0
    assert found.means == (1, 2, 3, 4, 5, 6) and found.critical == pytest.approx(1.377, abs=1e-3)
    assert found.groups == [(i, i + 1) for i in range(5)]
    words = ranking_words(found)
    assert "10 of 15 pairs do" in words[1]


def test_gaps_cost_as_few_numbers_as_can_be():
    table = [[0.5, 0.6, 0.7, 0.8], [0.4, 0.5, 0.6, 0.9], [0.3, 0.5, None, 0.7], [0.2, None, None, None]]
    found = rank(list("abcd"), ["t", "u", "v", "w"], table)
    assert found.tasks == ("t", "u", "w") and found.labels == ("a", "b", "c")
    assert found.left_out == ("d",) and found.missing == ("v",) and found.refusal is None
    assert found.ranks[0] == (1, 1, 2)


@pytest.mark.parametrize(
    ("table", "reason"),
    [
        ([[0.5, 0.6], [0.4, 0.7]], "2 tasks with the same attentions; a test over tasks needs 3"),
        ([[0.5, 0.6, 0.7]], "1 attention on all 3 tasks; a ranking needs two"),
        ([[0.5, None, 0.7], [None, 0.6, None]], "task"),
    ],
)
def test_too_little_is_refused_with_a_reason_and_ranked_all_the_same(table, reason):
    found = rank(["a", "b"][: len(table)], ["t", "u", "v"][: len(table[0])], table)
    assert reason in found.refusal and found.p is None and found.critical is None and found.groups == []
    assert found.labels and len(found.ranks[0]) == len(found.tasks)
    assert ranking_words(found)[0].startswith("No test over tasks: ")
