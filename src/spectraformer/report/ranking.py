"""Ranks over tasks: does any attention rank better than another, and how far apart must two be to say so?"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from spectraformer.report.statistics import LEVEL
from spectraformer.report.table import SPACE

LEAST_TASKS, LEAST_ATTENTIONS = 3, 2
PERMUTATIONS = 9999
CHUNK = 500  # permutations at once: bounds memory

Ranks = NDArray[np.float64]


@dataclass(frozen=True)
class Ranking:
    """Ranks of attentions over tasks, best first; rank 1 is the highest accuracy, ties share the mean of theirs.

    Attributes:
        tasks: Titles of the tasks that count, N.
        labels: Attentions that have all of them, k, by mean rank.
        ranks: Of each attention in each task, in [1, k].
        means: Mean rank of each, in [1, k].
        left_out: Attentions that lack one of these tasks.
        missing: Tasks that too few attentions have.
        statistic: Friedman's chi squared, corrected for ties; None if refused.
        p: Probability of one as large if all attentions were alike; None if refused.
        critical: Nemenyi's critical difference of two mean ranks; None if refused.
        refusal: Why there is no test, or None.
    """

    tasks: tuple[str, ...]
    labels: tuple[str, ...]
    ranks: tuple[tuple[float, ...], ...]
    means: tuple[float, ...]
    left_out: tuple[str, ...]
    missing: tuple[str, ...]
    statistic: float | None
    p: float | None
    critical: float | None
    refusal: str | None

    @property
    def groups(self) -> list[tuple[int, int]]:
        """First and last place of each largest group in which no two mean ranks are the critical difference apart."""
        if self.critical is None:
            return []
        found: list[tuple[int, int]] = []
        for first, mean in enumerate(self.means):
            last = max(i for i, other in enumerate(self.means) if other - mean <= self.critical + 1e-12)
            if not found or last > found[-1][1]:
                found.append((first, last))
        return found


def rank(
    labels: Sequence[str],
    tasks: Sequence[str],
    accuracies: Sequence[Sequence[float | None]],  # (attentions, tasks)
) -> Ranking:
    """Friedman's test over tasks and Nemenyi's critical difference, where there is enough to make them of.

    Attentions and tasks that leave gaps are left out so that as many numbers as can be are used.

    Args:
        labels: One an attention.
        tasks: One a column.
        accuracies: In any unit, higher is better; None where there is none.

    References:
        Demšar (2006), Statistical comparisons of classifiers over multiple data sets, JMLR 7.
    """
    kept, columns = _complete(accuracies, len(tasks))
    table = np.array([[accuracies[i][j] for j in columns] for i in kept], dtype=np.float64).reshape(len(kept), -1)
    ranks = ranks_of(table) if table.size else table
    means = ranks.mean(1) if table.size else np.zeros(len(kept))
    order = sorted(range(len(kept)), key=lambda i: (means[i], labels[kept[i]]))
    refusal = _refusal(len(columns), len(kept))
    statistic = p = critical = None
    if refusal is None:
        statistic, p = friedman(ranks)
        critical = critical_difference(len(kept), len(columns))
    return Ranking(
        tasks=tuple(tasks[j] for j in columns),
        labels=tuple(labels[kept[i]] for i in order),
        ranks=tuple(tuple(map(float, ranks[i])) for i in order),
        means=tuple(float(means[i]) for i in order),
        left_out=tuple(label for i, label in enumerate(labels) if i not in kept),
        missing=tuple(task for j, task in enumerate(tasks) if j not in columns),
        statistic=statistic,
        p=p,
        critical=critical,
        refusal=refusal,
    )


def _complete(accuracies: Sequence[Sequence[float | None]], tasks: int) -> tuple[list[int], list[int]]:
    """Rows and columns without gaps: tasks that most have first, as many as keep the most numbers."""
    filled = [sum(line[j] is not None for line in accuracies) for j in range(tasks)]
    order = sorted(range(tasks), key=lambda j: (-filled[j], j))
    best: tuple[tuple[bool, int, int], list[int], list[int]] = ((False, 0, 0), [], [])
    for count in range(1, tasks + 1):
        columns = sorted(order[:count])
        kept = [i for i, line in enumerate(accuracies) if all(line[j] is not None for j in columns)]
        worth = (_refusal(count, len(kept)) is None, len(kept) * count, count)
        if worth >= best[0]:
            best = (worth, kept, columns)
    return best[1], best[2]


def _refusal(tasks: int, attentions: int) -> str | None:
    if tasks < LEAST_TASKS:
        return (
            f"{tasks} task{'s' * (tasks != 1)} with the same attentions; a test over tasks needs {LEAST_TASKS} or more"
        )
    if attentions < LEAST_ATTENTIONS:
        return f"{attentions} attention{'s' * (attentions != 1)} on all {tasks} tasks; a ranking needs two or more"
    return None


def ranks_of(table: Ranks) -> Ranks:  # (k, N) -> (k, N)
    """Ranks within each column, 1 for the highest; ties share their mean."""
    from scipy import stats  # type: ignore[import-untyped]

    return np.asarray(stats.rankdata(-table.round(9), axis=0), dtype=np.float64)


def friedman(
    ranks: Ranks,  # (k, N)
) -> tuple[float, float]:
    """Friedman's chi squared of ranks within tasks, corrected for ties, and its p by permutation.

    p is the share of 9999 seeded permutations of the ranks within each task, and of the ranks as they are, that give
    a statistic as large: right for few tasks and few attentions, where the chi squared law is not.
    """
    k, n = ranks.shape
    ties = sum(float(np.sum(c**3 - c)) for c in (np.unique(column, return_counts=True)[1] for column in ranks.T))
    spread = 1 - ties / (n * (k**3 - k))
    squares = float(np.square(ranks.sum(1)).sum())
    if spread <= 0:
        return 0.0, 1.0
    statistic = (12 * squares / (n * k * (k + 1)) - 3 * n * (k + 1)) / spread
    generator = np.random.default_rng(0)
    extreme = 1
    for start in range(0, PERMUTATIONS, CHUNK):
        shape = (min(CHUNK, PERMUTATIONS - start), n, k)
        permuted = generator.permuted(np.broadcast_to(ranks.T, shape), axis=2)
        extreme += int((np.square(permuted.sum(1)).sum(1) >= squares - 1e-6).sum())
    return statistic, extreme / (PERMUTATIONS + 1)


def critical_difference(attentions: int, tasks: int) -> float:
    r"""Nemenyi's critical difference of two mean ranks at 5 %, :math:`q_{k} \sqrt{k (k + 1) / 6N}`.

    q is the quantile of the studentised range of k normals over the square root of 2.
    """
    from scipy import stats

    quantile = float(stats.studentized_range.ppf(LEVEL, attentions, np.inf)) / math.sqrt(2)
    return quantile * math.sqrt(attentions * (attentions + 1) / (6 * tasks))


def ranking_words(found: Ranking) -> list[str]:
    """What the ranking says, in sentences."""
    said = []
    if found.refusal is not None:
        said.append(f"No test over tasks: {found.refusal}.")
    else:
        assert found.p is not None and found.critical is not None and found.statistic is not None
        k, n = len(found.labels), len(found.tasks)
        p = f"p{SPACE}<{SPACE}0.001" if found.p < 0.001 else f"p{SPACE}={SPACE}{found.p:.3f}"
        if found.p < 1 - LEVEL:
            pairs = [
                (a, b)
                for (a, first), (b, second) in itertools.combinations(zip(found.labels, found.means, strict=True), 2)
                if second - first > found.critical
            ]
            said.append(f"The {k} attentions do not all rank alike over {n} tasks (Friedman, {p}).")
            said.append(
                f"Mean ranks more than {found.critical:.1f} apart differ (Nemenyi): "
                + (f"{len(pairs)} of {k * (k - 1) // 2} pairs do." if pairs else "no pair does.")
            )
        else:
            said.append(
                f"Over {n} tasks the ranks of the {k} attentions do not differ by more than chance (Friedman, {p}): "
                f"no two are told apart. Mean ranks would have to be {found.critical:.1f} apart (Nemenyi)."
            )
    if found.left_out:
        said.append(f"Left out, for want of one of these tasks: {', '.join(found.left_out)}.")
    if found.missing:
        said.append(f"Tasks that too few attentions have: {', '.join(found.missing)}.")
    return said
