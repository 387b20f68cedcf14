"""All that a report says, computed once; and the summary of it in Markdown."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from spectraformer.baselines import ATTENTIONS
from spectraformer.records import Record
from spectraformer.registry import nearest
from spectraformer.report.comparisons import Comparison, compare, conclusions
from spectraformer.report.heatmap import Heatmap, heatmap
from spectraformer.report.leaderboard import Leaderboard, Table, leaderboards, tables
from spectraformer.report.pareto import Front, fronts
from spectraformer.report.published import Beside, PublishedTable, beside_cells, beside_published, beside_words
from spectraformer.report.ranking import ranking_words
from spectraformer.report.rows import EXACT, Section, sections
from spectraformer.report.table import SPACE, escape_markdown, markdown_table


@dataclass(frozen=True)
class Part:
    """What is said of one task under one protocol.

    Attributes:
        section: Its rows.
        comparisons: Of its rows with the baseline.
        conclusions: What they say, in sentences.
        beside: It beside the published table, or None.
        heatmap: Of component functions and weight matrices, or None.
        fronts: Of accuracy and costs.
    """

    section: Section
    comparisons: tuple[Comparison, ...]
    conclusions: tuple[str, ...]
    beside: Beside | None
    heatmap: Heatmap | None
    fronts: tuple[Front, ...]


@dataclass(frozen=True)
class Analysis:
    """What is said of all runs.

    Attributes:
        parts: One a task and protocol.
        boards: One a protocol.
        baseline: The attention that others are compared with.
    """

    parts: tuple[Part, ...]
    boards: tuple[Leaderboard, ...]
    baseline: str

    @property
    def sections(self) -> list[Section]:
        """Of all parts."""
        return [part.section for part in self.parts]


def analyse(records: Sequence[Record], published: PublishedTable, baseline: str) -> Analysis:
    """Everything from checked records.

    Args:
        records: As :func:`spectraformer.report.rows.check_records` returns them.
        published: Figures to stand beside them; may be empty.
        baseline: The attention to compare with.

    Raises:
        ValueError: If the baseline is no attention of these runs; softmax may be absent.
    """
    names = sorted({record.content["attention"] for record in records})
    if baseline not in names and baseline != EXACT:
        known = "" if baseline not in ATTENTIONS else ", none of which is of it"
        raise ValueError(
            f"baseline is {baseline!r}; expected an attention of these runs{known}: "
            f"{', '.join(names)}{nearest(baseline, names)}"
        )
    found = sections(records)
    parts = []
    for section in found:
        compared = compare(section, baseline)
        parts.append(
            Part(
                section=section,
                comparisons=tuple(compared),
                conclusions=tuple(conclusions(section, compared, baseline)),
                beside=beside_published(section, published),
                heatmap=heatmap(section),
                fronts=tuple(fronts(section)),
            )
        )
    return Analysis(tuple(parts), tuple(leaderboards(found)), baseline)


def board_words(board: Leaderboard) -> str:
    """Which attention has the best average over tasks, in a sentence; "" where no two have one."""
    complete = [line for line in board.lines if line.average is not None]
    if len(board.sections) < 2 or len(complete) < 2:
        return ""
    best = complete[0]
    assert best.average is not None
    text = (
        f"Over {len(board.sections)} tasks, {best.label} has the highest average test accuracy of "
        f"{len(complete)} attentions, {100 * best.average:.1f}{SPACE}%"
    )
    exact = next((line for line in complete if line.label == EXACT), None)
    if exact is not None and exact.average is not None and exact is not best:
        text += f"; {EXACT} has {100 * exact.average:.1f}{SPACE}%"
    return f"{text}. The order of means says nothing of noise: see the intervals and comparisons."


def summary(section: Section) -> str:
    """One sentence: which attention answers best, and how far it is above the simplest answer and from softmax."""
    best = [row for row in section.rows if row.test.mean == section.rows[0].test.mean]
    first, names = best[0], _listed([row.label for row in best])
    if len(section.rows) == 1:
        reached = f"{names} has"
    else:
        reached = f"{names} {'is' if len(best) == 1 else 'are'} the best of {len(section.rows)} with"
    sides = [f"{_points(first.margin)} the majority class"]
    exact = [row for row in section.rows if row.exact]
    if len(exact) == 1 and exact[0] not in best:
        sides.append(f"{_points(first.test.mean - exact[0].test.mean)} softmax")
    share = f"{100 * first.test.mean:.1f}{SPACE}%"
    return f"On {section.title}, {reached} a test accuracy of {share}, {' and '.join(sides)}."


def _points(difference: float) -> str:
    text = f"{abs(100 * difference):.1f}"
    if not float(text):
        return "level with"
    return f"{text}{SPACE}points {'above' if difference > 0 else 'below'}"


def _listed(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


def leaderboard_markdown(found: Analysis, notes: Sequence[str]) -> str:
    """Leaderboards, ranking, comparisons in words, and the published figures, ready for a README."""
    lines: list[str] = []
    for board in found.boards:
        name = "" if len(found.boards) == 1 else f" ({board.protocol} protocol)"
        for table in tables(board):
            lines += [f"### {escape_markdown(table.title)}{name}", "", *_table(table), ""]
            lines += [f"- {escape_markdown(note)}" for note in table.notes] + [""] * bool(table.notes)
        words = [text for text in (board_words(board), *ranking_words(board.ranking)) if text]
        lines += [f"### Ranking over tasks{name}", "", escape_markdown(" ".join(words)), ""]
    if any(part.conclusions for part in found.parts):
        lines += [f"### Differences from {escape_markdown(found.baseline)}", ""]
        lines += [
            f"- {escape_markdown(f'{part.section.title}: ' + ' '.join(part.conclusions))}"
            for part in found.parts
            if part.conclusions
        ]
        lines.append("")
    for part in found.parts:
        if part.beside is not None:
            cells = [beside_cells(part.beside, row, theirs)[0] for row, theirs in part.beside.pairs]
            lines += [f"### {escape_markdown(part.section.title)} beside the published figures", ""]
            lines += [escape_markdown(" ".join(beside_words(part.beside))), ""]
            lines += [*markdown_table(list(cells[0]), [list(texts.values()) for texts in cells]), ""]
    return "\n".join([*lines, *(f"- {escape_markdown(note)}" for note in notes), ""])


def _table(table: Table) -> list[str]:
    return markdown_table(table.columns, table.lines, table.best)
