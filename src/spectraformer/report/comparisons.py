"""Which attentions differ from the baseline by more than seed noise, and which cannot be told apart from it."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from spectraformer.report.rows import Row, Section
from spectraformer.report.statistics import (
    LEVEL,
    Difference,
    holm,
    least_difference,
    paired_difference,
    pooled_deviation,
    pooled_difference,
    untested_difference,
)
from spectraformer.report.table import ALONE, NOTHING, SPACE, signed

Verdict = Literal["above", "below", "not told apart", "not testable"]
TESTS = {"paired": "paired t", "pooled": f"pooled t {ALONE}", "none": NOTHING}


@dataclass(frozen=True)
class Comparison:
    """One row against the baseline of the same task, protocol, data and training.

    Attributes:
        row: The row.
        baseline: What it is compared with.
        difference: Test accuracy of the row minus that of the baseline.
        adjusted: Holm's p among all comparisons of the section by the same test; None without a test.
        least: Smallest difference in favour or against that would have passed Holm's first step; None without a test.
    """

    row: Row
    baseline: Row
    difference: Difference
    adjusted: float | None
    least: float | None

    @property
    def verdict(self) -> Verdict:
        """In words; "above" and "below" only if the adjusted p is below 5 %."""
        if self.adjusted is None:
            return "not testable"
        if self.adjusted >= 1 - LEVEL:
            return "not told apart"
        return "above" if self.difference.mean > 0 else "below"


def compare(section: Section, baseline: str) -> list[Comparison]:
    """Every row that has a baseline of the same setup, in the order of the section.

    Two or more seeds that both have are compared by a paired t test. Fewer are compared by a t test with the standard
    deviation over seeds that the rows of the same setup have in common, if that has 2 degrees of freedom or more. The
    two kinds rest on different assumptions, so each is corrected among its own.

    Args:
        section: Of one task and protocol.
        baseline: Name of the attention to compare with.
    """
    pairs = []
    by_setup: dict[str, list[Row]] = {}
    for row in section.rows:
        by_setup.setdefault(row.setup, []).append(row)
    for row in section.rows:
        peers = by_setup[row.setup]
        named = sorted((peer for peer in peers if peer.name == baseline), key=lambda peer: (not peer.usual, peer.label))
        if named and row is not named[0]:
            pairs.append((row, named[0], _difference(row, named[0], peers)))
    adjusted: dict[int, float] = {}
    tests = {}
    for test in ("paired", "pooled"):
        family = [i for i, (_, _, d) in enumerate(pairs) if d.test == test and d.p is not None]
        adjusted |= dict(zip(family, holm([p for i in family if (p := pairs[i][2].p) is not None]), strict=True))
        tests[test] = len(family)
    return [
        Comparison(
            row, base, found, adjusted.get(i), least_difference(found, tests[found.test]) if i in adjusted else None
        )
        for i, (row, base, found) in enumerate(pairs)
    ]


def _difference(row: Row, baseline: Row, peers: Sequence[Row]) -> Difference:
    deviation, freedom = pooled_deviation([list(peer.by_seed.values()) for peer in peers])
    return (
        paired_difference(row.by_seed, baseline.by_seed)
        or pooled_difference(row.test, baseline.test, deviation, freedom)
        or untested_difference(
            row.test,
            baseline.test,
            min(record.content["data"]["counts"]["test"] for side in (row, baseline) for record in side.records),
        )
    )


def conclusions(section: Section, found: Sequence[Comparison], baseline: str) -> list[str]:
    """What the comparisons say, in sentences; what they cannot say, too."""
    if all(row.name == baseline for row in section.rows):
        return []
    if not found:
        return [f"No {baseline} run of this task has the data and training of another: nothing to compare with."]
    said = []
    for test, mark, supposed in (
        ("paired", "", ""),
        ("pooled", f"{ALONE} ", ", if theirs is that of the rows with several seeds"),
    ):
        tested = [c for c in found if c.difference.test == test and c.adjusted is not None]
        for verdict in ("above", "below"):
            some = [comparison for comparison in tested if comparison.verdict == verdict]
            if some:
                said.append(
                    f"{mark}{verdict.capitalize()} {baseline} by more than seed noise{supposed}: {_listed(some)}."
                )
        level = [comparison for comparison in tested if comparison.verdict == "not told apart"]
        if level:
            least = 100 * statistics.median(c.least for c in level if c.least is not None)
            said.append(
                f"{mark}Not told apart from {baseline}: {_listed(level)}. That is no proof of equality: with "
                f"{_seeds([c.difference.seeds for c in level])} and {len(tested)} comparison{'s' * (len(tested) != 1)} "
                f"a difference had to be about {least:.1f}{SPACE}points to count."
            )
    untested = [comparison for comparison in found if comparison.adjusted is None]
    if untested:
        beyond = [c for c in untested if not c.difference.low <= 0 <= c.difference.high]
        text = (
            f"Seed noise is unknown for {len(untested)} of {len(found)}, "
            f"so whether they differ from {baseline} cannot be said. "
        )
        if beyond:
            text += f"More than the noise of a finite test set: {_listed(beyond)}."
        else:
            text += "None differs by more than the noise of a finite test set."
        said.append(text)
    if len(section.rows) > len(found) + sum(row.name == baseline for row in section.rows):
        said.append(f"Rows without a {baseline} run of the same data and training are not compared.")
    return said


def _listed(found: Sequence[Comparison]) -> str:
    return ", ".join(f"{c.row.label}{SPACE}({signed(100 * c.difference.mean, 1)})" for c in found)


def _seeds(counts: Sequence[int]) -> str:
    low, high = min(counts), max(counts)
    return f"{low} seed{'s' * (low != 1)}" if low == high else f"{low} to {high} seeds"


def probability(p: float | None) -> str:
    """Such as "0.031", or "< 0.001"."""
    return NOTHING if p is None else "< 0.001" if p < 0.001 else f"{p:.3f}"


def comparison_cells(found: Comparison) -> dict[str, str]:
    """A comparison as texts, by column; differences in points."""
    difference = found.difference
    mark = f" {ALONE}" * (difference.test == "none")
    return {
        "attention": found.row.label,
        "difference": signed(100 * difference.mean, 2),
        "95 % interval": f"{signed(100 * difference.low, 2)} to {signed(100 * difference.high, 2)}{mark}",
        "seeds": str(difference.seeds),
        "test": TESTS[difference.test],
        "p": probability(difference.p),
        "p, corrected": probability(found.adjusted),
        "verdict": found.verdict,
    }


def comparison_numbers(found: Comparison) -> dict[str, float | None]:
    """What the columns of :func:`comparison_cells` are sorted by."""
    difference = found.difference
    return {
        "difference": difference.mean,
        "95 % interval": difference.low,
        "seeds": difference.seeds,
        "p": difference.p,
        "p, corrected": found.adjusted,
    }


COMPARISON_COLUMNS = (
    *("task", "protocol", "attention", "baseline", "test", "seeds"),
    *("difference", "low", "high", "p", "p_holm", "least_difference", "verdict"),
)


def comparison_values(section: Section, found: Comparison) -> dict[str, Any]:
    """A comparison at full precision, by the names of ``COMPARISON_COLUMNS``."""
    difference = found.difference
    return {
        "task": section.task,
        "protocol": section.protocol,
        "attention": found.row.label,
        "baseline": found.baseline.label,
        "test": difference.test,
        "seeds": difference.seeds,
        "difference": difference.mean,
        "low": difference.low,
        "high": difference.high,
        "p": difference.p,
        "p_holm": found.adjusted,
        "least_difference": found.least,
        "verdict": found.verdict,
    }
