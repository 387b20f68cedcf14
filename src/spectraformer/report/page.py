"""The page that anybody can open: one HTML file that needs nothing else, in light, dark and print."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from importlib import resources
from typing import Any

from jinja2 import Environment, FunctionLoader, StrictUndefined
from markupsafe import Markup

from spectraformer.config import canonical, to_json
from spectraformer.records import Record
from spectraformer.report.analysis import Analysis, Part, board_words, summary
from spectraformer.report.comparisons import comparison_cells, comparison_numbers
from spectraformer.report.curves import PANELS, legend_svg, marks, panel_svg
from spectraformer.report.drawing import INK, MUTED, PALETTE, RULE
from spectraformer.report.heatmap import Heatmap
from spectraformer.report.leaderboard import Leaderboard, tables
from spectraformer.report.pareto import front_svg, front_words
from spectraformer.report.published import beside_cells, beside_words
from spectraformer.report.rank_chart import ranking_svg
from spectraformer.report.ranking import Ranking, ranking_words
from spectraformer.report.rows import Row, Section, devices, flatten
from spectraformer.report.statistics import TEST_SET
from spectraformer.report.table import NOTHING, cells, facts, interval, numbers, percent

TEMPLATE = "page.html.j2"
LIGHT = {"ink": INK, "muted": MUTED, "rule": RULE, **{f"series-{i}": c for i, c in enumerate(PALETTE, 1)}}
# Blue and vermillion are too dark on a dark page; each mode has six of Okabe and Ito's seven colours beside black.
DARK_SERIES = ("#56b4e9", "#e69f00", "#009e73", "#cc79a7", "#f0e442", "#d55e00")
DARK = {
    "ink": "#e8eaed",
    "muted": "#9aa2ad",
    "rule": "#30353d",
    **{f"series-{i}": c for i, c in enumerate(DARK_SERIES, 1)},
}


def html_page(found: Analysis, notes: Sequence[str]) -> str:
    """The page about these runs."""
    environment = Environment(
        loader=FunctionLoader(lambda name: resources.files(__package__).joinpath(name).read_text(encoding="utf-8")),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    records = [record for section in found.sections for record in section.records]
    shared = _shared(records)
    tasks = sorted({section.task for section in found.sections})
    sentences = [summary(section) for section in found.sections]
    return environment.get_template(TEMPLATE).render(
        title=f"Results on {tasks[0] if len(tasks) == 1 else _count(len(tasks), 'task')}",
        lead=[text for board in found.boards if (text := board_words(board))] or sentences[:1],
        summaries=sentences if len(sentences) > 1 else [],
        counts=[
            _count(len(records), "run"),
            _count(len({record.content["attention"] for record in records}), "attention"),
            *devices(records),
        ],
        boards=[_board(board, f"board-{i}") for i, board in enumerate(found.boards, 1) if len(board.sections) > 1],
        sections=[_part(part, found.baseline, f"section-{i}") for i, part in enumerate(found.parts, 1)],
        shared=shared,
        runs=[
            _run(section, row, record, shared)
            for section in found.sections
            for row in section.rows
            for record in row.records
        ],
        footnotes=notes,
        light=LIGHT,
        dark=DARK,
    )


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}" + "s" * (number != 1)


def _table(
    caption: str,
    columns: Sequence[str],
    lines: Sequence[Sequence[str]],
    values: Sequence[Sequence[float | None]],
    *,
    rows: Sequence[Row | None] = (),
    bold: Sequence[Collection[int]] = (),
) -> dict[str, Any]:
    """What the template needs of a table: texts, and what they are sorted by; the first column names the line."""
    shown = []
    for i, (texts, sorts) in enumerate(zip(lines, values, strict=True)):
        row = rows[i] if rows else None
        strong = bold[i] if bold else ()
        shown.append(
            {
                "name": row.name if row else texts[0],
                "settings": row.settings if row else (),
                "exact": row is not None and row.exact,
                "cells": [
                    {"text": text, "value": sort, "best": j in strong}
                    for j, (text, sort) in enumerate(zip(texts[1:], sorts, strict=True), 1)
                ],
            }
        )
    return {"caption": caption, "columns": columns, "lines": shown}


def _board(board: Leaderboard, identifier: str) -> dict[str, Any]:
    """What the template needs of a leaderboard."""
    name = "" if board.protocol == "strict" else f", {board.protocol} protocol"
    return {
        "id": identifier,
        "title": f"Leaderboard{name}",
        "tables": [
            {
                "title": table.title,
                "notes": table.notes,
                **_table(
                    f"{table.title} of each attention on each task{name}; bold is the best of a column",
                    table.columns,
                    table.lines,
                    table.numbers,
                    bold=table.best,
                ),
            }
            for table in tables(board)
        ],
        "ranking": _ranking(board.ranking, name),
    }


def _ranking(found: Ranking, name: str) -> dict[str, Any]:
    words = ranking_words(found)
    columns = ["attention", "mean rank", *found.tasks]
    lines = [
        [label, f"{mean:.2f}", *(f"{x:g}" for x in ranks)]
        for label, mean, ranks in zip(found.labels, found.means, found.ranks, strict=True)
    ]
    values = [(mean, *ranks) for mean, ranks in zip(found.means, found.ranks, strict=True)]
    drawing = ""
    if found.critical is not None:
        alt = "; ".join(f"{line[0]} has mean rank {line[1]}" for line in lines)
        drawing = ranking_svg(found, f"ranks{name}", f"Mean ranks over tasks. {alt}.")
    return {
        "words": words,
        "drawing": Markup(drawing),
        "critical": found.critical,
        "table": _table(f"Ranks over tasks{name}", columns, lines, values) if lines else None,
    }


def _part(part: Part, baseline: str, identifier: str) -> dict[str, Any]:
    """What the template needs of a section."""
    section = part.section
    top = _top(max(max(row.test.high, row.majority) for row in section.rows))
    look = marks(section)
    texts = [cells(row) for row in section.rows]
    compared = [comparison_cells(comparison) for comparison in part.comparisons]
    return {
        "id": identifier,
        "task": section.task,
        "protocol": section.protocol,
        "title": section.title,
        "baseline": baseline,
        "facts": facts(section),
        "bars": [{**_bar(row, top), "mark": Markup(legend_svg(look[row.label]))} for row in section.rows],
        "bases": {row.test.basis for row in section.rows},
        "ticks": [{"at": 100 * at / top, "text": f"{100 * at:.0f}"} for at in _ticks(top)],
        "table": _table(
            f"{section.title}: accuracy, size and speed of each attention",
            list(texts[0]),
            [list(line.values()) for line in texts],
            [list(numbers(row).values()) for row in section.rows],
            rows=section.rows,
        ),
        "conclusions": part.conclusions,
        "comparisons": _table(
            f"{section.title}: differences of test accuracy to {baseline}, points",
            list(compared[0]),
            [list(line.values()) for line in compared],
            [[comparison_numbers(c).get(name) for name in list(compared[0])[1:]] for c in part.comparisons],
            rows=[comparison.row for comparison in part.comparisons],
        )
        if compared
        else None,
        "heatmap": _heatmap(part.heatmap) if part.heatmap else None,
        "fronts": [
            {"title": front.title, "words": front_words(front), "drawing": Markup(front_svg(section, front))}
            for front in part.fronts
        ],
        "beside": _beside(part) if part.beside else None,
        "panels": [
            {"title": panel.title, "drawing": Markup(panel_svg(section, panel))}
            for panel in PANELS
            if panel.across == "step" or any(row.device for row in section.rows)
        ],
    }


def _beside(part: Part) -> dict[str, Any]:
    assert part.beside is not None
    both = [beside_cells(part.beside, row, theirs) for row, theirs in part.beside.pairs]
    return {
        "words": beside_words(part.beside),
        "table": _table(
            f"{part.section.title} beside the published figures",
            list(both[0][0]),
            [list(texts.values()) for texts, _ in both],
            [list(values.values()) for _, values in both],
            rows=[row for row, _ in part.beside.pairs],
        ),
    }


def _heatmap(found: Heatmap) -> dict[str, Any]:
    return {
        "weights": found.weights,
        "left_out": found.left_out,
        "lines": [
            {
                "component": component,
                "cells": [
                    {
                        "shade": None if row is None else found.shade(row),
                        "text": NOTHING if row is None else f"{100 * row.test.mean:.1f}",
                        "title": "no run"
                        if row is None
                        else f"{row.label}: {percent(row.test)} %, {_count(row.test.count, 'seed')}",
                    }
                    for row in line
                ],
            }
            for component, line in zip(found.components, found.rows, strict=True)
        ],
    }


def _top(largest: float) -> float:
    """End of the axis of the bars: the next tenth, so that every bar is a length from 0."""
    return min(1.0, max(1, math.ceil(10 * largest - 1e-9)) / 10)


def _ticks(top: float) -> list[float]:
    step = 0.1 if top <= 0.6 else 0.2
    return [i * step for i in range(math.floor(top / step + 1e-9) + 1)]


def _bar(row: Row, top: float) -> dict[str, Any]:
    """Places on the axis in percent of its length."""
    return {
        "row": row,
        "text": percent(row.test),
        "interval": interval(row.test),
        "alone": row.test.basis == TEST_SET,
        "end": 100 * row.test.mean / top,
        "majority": 100 * row.majority / top,
        "low": 100 * row.test.low / top,
        "high": 100 * min(top, row.test.high) / top,
    }


def _settings(record: Record) -> dict[str, str]:
    """Configuration, versions and device as texts, by path."""
    tree = {**to_json(record.run), "versions": record.content.get("versions") or {}}
    rest = {name: record.content.get(name) for name in ("device", "git_commit")}
    found = {path: item for path, item in flatten({**tree, **rest}) if item is not None}
    return {path: item if isinstance(item, str) else canonical(item) for path, item in found.items()}


def _shared(records: Sequence[Record]) -> dict[str, str]:
    """Settings that are the same in all runs."""
    every = [set(_settings(record).items()) for record in records]
    return dict(sorted(every[0].intersection(*every[1:])))


def _run(section: Section, row: Row, record: Record, shared: Mapping[str, str]) -> dict[str, Any]:
    content = record.content
    elsewhere = {"task", "protocol", "attention.name", "train.seed", *shared}  # in columns of their own, or in the list
    return {
        "section": section.title,
        "label": row.label,
        "key": content["key"][:12],
        "settings": [f"{path}={text}" for path, text in sorted(_settings(record).items()) if path not in elsewhere],
        "seed": record.run.train.seed,
        "seconds": NOTHING if content["seconds"] is None else f"{content['seconds']:,.0f} s",
        "sessions": content["sessions"],
        "started": str(content.get("started") or "").replace("T", " ")[:16],
    }
