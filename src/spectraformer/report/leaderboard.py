"""All tasks in one table, in the form of the paper: accuracy, training time and memory of each attention."""

from __future__ import annotations

import string
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from spectraformer.report.comparisons import (
    COMPARISON_COLUMNS,
    Comparison,
    comparison_values,
)
from spectraformer.report.ranking import Ranking, rank
from spectraformer.report.rows import Row, Section
from spectraformer.report.table import NOTHING, csv_text, percent, three_digits

HOUR, GIB = 3600.0, 2**30


@dataclass(frozen=True)
class Line:
    """One attention on all tasks; the same options everywhere, and the same departures from the usual training.

    Attributes:
        label: That of its rows.
        rows: One a task, None where it has not run.
    """

    label: str
    rows: tuple[Row | None, ...]

    @property
    def average(self) -> float | None:
        """Mean over tasks of the test accuracy, in [0, 1]; None unless it has all."""
        means = [row.test.mean for row in self.rows if row is not None]
        return fmean(means) if len(means) == len(self.rows) else None

    @property
    def seeds(self) -> str:
        """How many a task, such as "5" or "1-5"."""
        counts = sorted({row.test.count for row in self.rows if row is not None})
        return NOTHING.join(map(str, dict.fromkeys((counts[0], counts[-1]))))


@dataclass(frozen=True)
class Leaderboard:
    """All tasks under one protocol.

    Attributes:
        protocol: Its name.
        sections: One a column.
        lines: By average, best first; then those that lack a task.
        ranking: Of the lines over the tasks.
    """

    protocol: str
    sections: tuple[Section, ...]
    lines: tuple[Line, ...]
    ranking: Ranking

    @property
    def timed_on(self) -> list[str]:
        """Devices that times in it are from, sorted."""
        return sorted({row.device for line in self.lines for row in line.rows if row and row.seconds and row.device})


@dataclass(frozen=True)
class Table:
    """A table as texts.

    Attributes:
        title: What its numbers are, with their unit.
        columns: Names; the first is of the attentions.
        lines: One an attention, one text a column.
        numbers: What the columns but the first are sorted by.
        best: For each line, which columns hold the best of all lines.
        notes: What has to be known to read it.
    """

    title: str
    columns: tuple[str, ...]
    lines: tuple[tuple[str, ...], ...]
    numbers: tuple[tuple[float | None, ...], ...]
    best: tuple[frozenset[int], ...]
    notes: tuple[str, ...] = ()


def leaderboards(found: Sequence[Section]) -> list[Leaderboard]:
    """One a protocol, in the order of the sections."""
    boards = []
    for protocol in dict.fromkeys(section.protocol for section in found):
        columns = tuple(section for section in found if section.protocol == protocol)
        by_label = [{row.label: row for row in section.rows} for section in columns]
        labels = sorted({label for rows in by_label for label in rows})
        lines = [Line(label, tuple(rows.get(label) for rows in by_label)) for label in labels]
        lines.sort(key=_place)
        accuracies = [[None if row is None else row.test.mean for row in line.rows] for line in lines]
        ranking = rank([line.label for line in lines], [section.task for section in columns], accuracies)
        boards.append(Leaderboard(protocol, columns, tuple(lines), ranking))
    return boards


def _place(line: Line) -> tuple[Any, ...]:
    missing = sum(row is None for row in line.rows)
    means = [row.test.mean for row in line.rows if row is not None]
    return missing, -fmean(means), line.label


def tables(board: Leaderboard) -> list[Table]:
    """Accuracy, and time and memory where any run measured them."""
    found = [_accuracy(board)]
    if board.timed_on:
        found.append(_time(board))
    if any(row.peak_memory for line in board.lines for row in line.rows if row):
        found.append(_memory(board))
    return found


def _best(numbers: Sequence[Sequence[float | None]], choose: Callable[..., float]) -> tuple[frozenset[int], ...]:
    """Columns are counted from 1, behind the name; a column of one number has no best."""
    columns = [[number for number in column if number is not None] for column in zip(*numbers, strict=True)]
    tops = [choose(column) if len(column) > 1 else None for column in columns]
    return tuple(
        frozenset(j for j, (x, top) in enumerate(zip(line, tops, strict=True), 1) if x is not None and x == top)
        for line in numbers
    )


def _accuracy(board: Leaderboard) -> Table:
    several = len(board.sections) > 1
    everywhere = len(board.ranking.tasks) == len(board.sections)  # else a rank says less than the column seems to
    means = dict(zip(board.ranking.labels, board.ranking.means, strict=True)) if everywhere else {}
    numbers = [
        (*(row.test.mean if row else None for row in line.rows), *((line.average,) if several else ()))
        for line in board.lines
    ]
    lines = []
    for line in board.lines:
        texts = [line.label, *(percent(row.test) if row else NOTHING for row in line.rows)]
        if several:
            texts.append(NOTHING if line.average is None else f"{100 * line.average:.2f}")
            texts.append(f"{means[line.label]:.1f}" if line.label in means else NOTHING)
        lines.append((*texts, line.seeds))
    ranks = [(means.get(line.label),) if several else () for line in board.lines]
    counts = [max(row.test.count for row in line.rows if row) for line in board.lines]
    best = [
        found | ({len(numbers[0]) + 1} if rank and rank[0] is not None and rank[0] == min(means.values()) else set())
        for found, rank in zip(_best(numbers, max), ranks, strict=True)
    ]
    return Table(
        title="Test accuracy, %",
        columns=("attention", *_tasks(board), *(("average", "mean rank") if several else ()), "seeds"),
        lines=tuple(lines),
        numbers=tuple((*a, *b, c) for a, b, c in zip(numbers, ranks, counts, strict=True)),
        best=tuple(map(frozenset, best)),
    )


def _tasks(board: Leaderboard) -> list[str]:
    return [section.task for section in board.sections]


def _measured(
    board: Leaderboard,
    title: str,
    number: Callable[[Row], float | None],
    mark: Callable[[Row], str],
    notes: Sequence[str],
) -> Table:
    numbers = [tuple(number(row) if row else None for row in line.rows) for line in board.lines]
    return Table(
        title=title,
        columns=("attention", *_tasks(board)),
        lines=tuple(
            (
                line.label,
                *(
                    NOTHING if x is None or row is None else three_digits(x) + mark(row)
                    for x, row in zip(found, line.rows, strict=True)
                ),
            )
            for line, found in zip(board.lines, numbers, strict=True)
        ),
        numbers=tuple(numbers),
        # The least of several devices, or of several ways to measure, is no better for it.
        best=_best(numbers, min) if not notes else tuple(frozenset[int]() for _ in numbers),
        notes=tuple(notes),
    )


def _time(board: Leaderboard) -> Table:
    devices = board.timed_on
    longest = max(row.seconds for line in board.lines for row in line.rows if row and row.seconds)
    unit, size = next(
        (u, s) for u, s in (("hours", HOUR), ("minutes", 60.0), ("seconds", 1.0)) if longest >= s or s == 1
    )
    letters = dict(zip(devices, _letters(len(devices)), strict=True)) if len(devices) > 1 else {}
    notes = [f"{letter}: measured on {device}." for device, letter in letters.items()]
    return _measured(
        board,
        f"Training time, {unit}" + ("" if letters else f", on {devices[0]}"),
        lambda row: row.seconds / size if row.seconds is not None else None,
        lambda row: f" {letters[row.device]}" if letters and row.device else "",
        [*notes, "Times of different letters are of different devices and not comparable."] if notes else [],
    )


def _letters(count: int) -> list[str]:
    return [(string.ascii_lowercase * (1 + i // 26))[i % 26] * (1 + i // 26) for i in range(count)]


MEMORY_KINDS = {"cuda": "allocated on the GPU", "process": "of the whole process"}


def _memory(board: Leaderboard) -> Table:
    measured = [row for line in board.lines for row in line.rows if row and row.peak_memory and row.memory_kind]
    kinds = sorted({row.memory_kind for row in measured if row.memory_kind})
    largest = max(row.peak_memory for row in measured if row.peak_memory)
    unit, size = ("GiB", GIB) if largest >= GIB else ("MiB", 2**20)
    letters = dict(zip(kinds, _letters(len(kinds)), strict=True)) if len(kinds) > 1 else {}
    notes = [f"{letter}: {MEMORY_KINDS.get(kind, kind)}." for kind, letter in letters.items()]
    return _measured(
        board,
        f"Peak memory, {unit}" + ("" if letters else f", {MEMORY_KINDS.get(kinds[0], kinds[0])}"),
        lambda row: row.peak_memory / size if row.peak_memory is not None else None,
        lambda row: f" {letters[row.memory_kind]}" if letters and row.memory_kind else "",
        [*notes, "Memory of different letters was measured in different ways and is not comparable."] if notes else [],
    )


COLUMNS = (
    *("protocol", "task", "attention", "seeds", "accuracy", "deviation", "low", "high", "interval_of"),
    *("seconds", "device", "steps_per_second", "peak_memory_bytes", "memory_kind", "parameters", "state_numbers"),
)


def leaderboard_csv(boards: Sequence[Leaderboard]) -> str:
    """One line a row of a section at full precision, accuracies in [0, 1]; and one for each average over tasks."""
    lines: list[dict[str, Any]] = []
    for board in boards:
        for line in board.lines:
            named = {"protocol": board.protocol, "attention": line.label}
            for section, row in zip(board.sections, line.rows, strict=True):
                if row is not None:
                    lines.append({**named, "task": section.task, **_values(row)})
            if line.average is not None and len(line.rows) > 1:
                lines.append({**named, "task": "average", "accuracy": line.average})
    return csv_text(COLUMNS, lines)


def _values(row: Row) -> dict[str, Any]:
    return {
        "seeds": row.test.count,
        "accuracy": row.test.mean,
        "deviation": row.test.deviation,
        "low": row.test.low,
        "high": row.test.high,
        "interval_of": row.test.basis,
        "seconds": row.seconds,
        "device": row.device,
        "steps_per_second": row.steps_per_second,
        "peak_memory_bytes": row.peak_memory,
        "memory_kind": row.memory_kind,
        "parameters": row.parameters,
        "state_numbers": row.state,
    }


def comparisons_csv(found: Sequence[tuple[Section, Sequence[Comparison]]]) -> str:
    """One line a comparison at full precision."""
    lines = [comparison_values(section, comparison) for section, some in found for comparison in some]
    return csv_text(COMPARISON_COLUMNS, lines)
