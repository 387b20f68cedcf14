"""What has to be known to read the tables, and no more: notes on what does not occur are left out."""

from __future__ import annotations

import math

from spectraformer.report.analysis import Analysis
from spectraformer.report.rows import PARITY, Section, far_apart, timed_records
from spectraformer.report.statistics import SEEDS, TEST_SET
from spectraformer.report.table import ALONE, SPACE, three_digits

MEMORY = {"process": "of the whole process, libraries included", "cuda": "allocated on the GPU"}


def footnotes(found: Analysis) -> list[str]:
    """One text a note."""
    rows = [row for section in found.sections for row in section.rows]
    records = [record for row in rows for record in row.records]
    protocols = {section.protocol for section in found.sections}
    notes = [
        "Test accuracy is measured once, with the weights of the step that was best on dev. "
        "“Over majority” is the difference, in points, to always answering the most common class of the test set.",
        *_interval_notes({row.test.basis for row in rows}),
    ]
    errors = [_sampling_error(section) for section in found.sections]
    notes.append(
        "The finite test set alone leaves a standard error of about "
        + "; ".join(f"{e:.1f} points on {section.title}" for e, section in zip(errors, found.sections, strict=True))
        + ": smaller differences mean little."
    )
    notes += _comparison_notes(found)
    if any(board.ranking.critical is not None for board in found.boards):
        notes.append(
            "Ranks over tasks: Friedman's test asks whether any attention ranks better than another, its p from 9999 "
            "permutations of the ranks within tasks; Nemenyi's critical difference, at 5 %, is how far two mean ranks "
            "have to be apart, for all pairs at once. Both take one number a task and know nothing of seeds; with few "
            "tasks and many attentions they find only large differences."
        )
    if "strict" in protocols:
        notes.append(
            "Strict protocol: padding is masked in attention and in pooling; dev and test are disjoint; "
            "the last partial batch counts."
        )
    if "published" in protocols:
        notes.append(
            "Published protocol: as in the published comparisons, pooling averages over the padded length, and the "
            "dev set of the text task is its test set. These rows stand apart and are not comparable with strict ones."
        )
    notes.append(
        "“To softmax” compares with the softmax row of the same task, protocol, model and batches: parameters, and "
        "steps per second if both ran on the same device."
    )
    if any(row.outside_parity for row in rows):
        notes.append(
            f"† More than {100 * PARITY:.0f}{SPACE}% from softmax in parameters: not like for like by the rule of LRA."
        )
    if any(record.content["steps_per_second"] is None for record in records):
        notes.append("Runs that shared their device have no time or memory of their own: a dash stands for them.")
    if any(row.seconds for row in rows):
        notes.append(
            "Training time is that of the optimiser steps, without evaluations and without what is compiled and "
            "recorded when a run begins."
        )
    notes += _speed_notes(found)
    kinds = {row.memory_kind for row in rows if row.memory_kind}
    if kinds:
        said = ", or where marked GPU that ".join(MEMORY.get(kind, kind) for kind in sorted(kinds, reverse=True))
        notes.append(f"Peak memory is that {said}.")
    if any(row.state for row in rows):
        notes.append(
            "“State a head” is how many numbers a head keeps to decode token by token, however many it has seen. "
            "These tasks are not causal; the number says what the attention would need where they are. "
            "A dash: the state grows with every token, as that of softmax, or there is no causal form."
        )
    return notes


def _interval_notes(bases: set[str]) -> list[str]:
    notes = []
    if SEEDS in bases:
        notes.append(
            "± is the standard deviation over seeds (n − 1 in the denominator). The 95 % interval is Student's t "  # noqa: RUF001
            "interval of the mean over seeds: where the mean of many seeds would lie, on this test set."
        )
    if TEST_SET in bases:
        notes.append(
            f"{ALONE} Of one seed there is no spread over seeds. Its interval is Wilson's, of the finite test set "
            "alone: where the accuracy of these very weights would lie on other examples. Other seeds may lie outside."
        )
    return notes


def _speed_notes(found: Analysis) -> list[str]:
    """Rows that have no time because their timed seeds are far apart."""
    said = []
    for section in found.sections:
        for row in section.rows:
            speeds = [record.content["steps_per_second"] for record in timed_records(row.records)]
            if row.device and far_apart(speeds):
                low, high = (three_digits(speed) for speed in (min(speeds), max(speeds)))
                said.append(f"{row.label} on {section.title}, {low} to {high} steps/s")
    words = "Timed seeds that differ by more than a quarter, as under another version of the code, give no time"
    return [f"{words}: {'; '.join(said)}."] if said else []


def _comparison_notes(found: Analysis) -> list[str]:
    tests = {comparison.difference.test for part in found.parts for comparison in part.comparisons}
    notes = []
    if "paired" in tests:
        notes.append(
            f"Paired t: differences to {found.baseline} seed by seed, tested against 0. It supposes that they are "
            "normal and independent. With 2 or 3 seeds only differences many times their spread can pass; with 5 "
            "seeds the differences have to agree well. A rank test could not pass at all: of 5 pairs its least p "
            "is 0.06."
        )
    if "pooled" in tests:
        notes.append(
            f"Pooled t {ALONE}: where fewer than two seeds can be paired, the spread over seeds is taken from all rows "
            "of the same data and training that have several, as if it were the same for all attentions. It often is "
            "not: some fail to train with some seeds. Take these as hints."
        )
    if tests & {"paired", "pooled"}:
        notes.append(
            "Corrected p: by Holm's method, for all comparisons of one task by the same kind of test; if no attention "
            "of a task differed, any would be called different with a probability of 5 % at most. Intervals of "
            "differences are for each alone, not corrected."
        )
    return notes


def _sampling_error(section: Section) -> float:
    """Largest standard error of a test accuracy p over n examples, sqrt(p (1 − p) / n), in points."""
    return max(
        100 * math.sqrt(p * (1 - p) / record.content["data"]["counts"]["test"])
        for record in section.records
        for p in [record.content["accuracy"]["test"]]
    )
