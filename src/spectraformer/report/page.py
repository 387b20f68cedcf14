"""The page that anybody can open: one HTML file that needs nothing else, in light, dark and print."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from importlib import resources
from typing import Any

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from spectraformer.config import canonical, to_json
from spectraformer.records import Record
from spectraformer.report.plots import INK, MUTED, PALETTE, PANELS, RULE, legend_svg, marks, panel_svg
from spectraformer.report.table import PARITY, SPACE, Row, Section, cells, devices, facts, flatten, percent

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


def html_page(found: Sequence[Section]) -> str:
    """The page about these sections."""
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    template = environment.from_string(resources.files(__package__).joinpath(TEMPLATE).read_text(encoding="utf-8"))
    records = [record for section in found for record in section.records]
    shared = _shared(records)
    tasks = sorted({section.task for section in found})
    return template.render(
        title=f"Results on {tasks[0] if len(tasks) == 1 else _count(len(tasks), 'task')}",
        summary=" ".join(summary(section) for section in found),
        counts=[
            _count(len(records), "run"),
            _count(len({record.content["attention"] for record in records}), "attention"),
            *devices(records),
        ],
        sections=[_view(section, f"section-{i}") for i, section in enumerate(found, 1)],
        shared=shared,
        runs=[
            _run(section, row, record, shared) for section in found for row in section.rows for record in row.records
        ],
        footnotes=footnotes(found),
        light=LIGHT,
        dark=DARK,
    )


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}" + "s" * (number != 1)


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


def footnotes(found: Sequence[Section]) -> list[str]:
    """What has to be known to read the tables, and no more: notes on what does not occur are left out."""
    rows = [row for section in found for row in section.rows]
    protocols = {section.protocol for section in found}
    notes = [
        "Test accuracy is measured once, with the weights of the step that was best on dev. "
        "“Over majority” is the difference, in points, to always answering the most common class of the test set.",
    ]
    if any(row.test.count > 1 for row in rows):
        notes.append("± is the standard deviation over seeds (n − 1 in the denominator).")  # noqa: RUF001
    errors = [_sampling_error(section) for section in found]
    notes.append(
        "The finite test set alone leaves a standard error of about "
        + "; ".join(f"{error:.1f} points on {section.title}" for error, section in zip(errors, found, strict=True))
        + ": smaller differences mean little."
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
    kinds = {record.content["memory_kind"] for section in found for record in section.records}
    meaning = {"process": "of the whole process, libraries included", "cuda": "allocated on the GPU"}
    notes.append(
        "Peak memory is that "
        + ", or where marked that ".join(meaning.get(kind, kind) for kind in sorted(kinds, reverse=True))
        + "."
    )
    return notes


def _sampling_error(section: Section) -> float:
    """Largest standard error of a test accuracy p over n examples, sqrt(p (1 − p) / n), in points."""
    return max(
        100 * math.sqrt(p * (1 - p) / record.content["data"]["counts"]["test"])
        for record in section.records
        for p in [record.content["accuracy"]["test"]]
    )


def _view(section: Section, identifier: str) -> dict[str, Any]:
    """What the template needs of a section."""
    top = _top(max(max(row.test.mean + (row.test.deviation or 0.0), row.majority) for row in section.rows))
    look = marks(section)
    return {
        "id": identifier,
        "task": section.task,
        "protocol": section.protocol,
        "title": section.title,
        "facts": facts(section),
        "bars": [{**_bar(row, top), "mark": Markup(legend_svg(look[row.label]))} for row in section.rows],
        "ticks": [{"at": 100 * at / top, "text": f"{100 * at:.0f}"} for at in _ticks(top)],
        "table": [{"row": row, "cells": _numbers(row)} for row in section.rows],
        "columns": list(_numbers(section.rows[0])),
        "panels": [{"title": panel.title, "drawing": Markup(panel_svg(section, panel))} for panel in PANELS],
    }


def _numbers(row: Row) -> dict[str, str]:
    """The cells beside the name."""
    return {column: text for column, text in cells(row).items() if column != "attention"}


def _top(largest: float) -> float:
    """End of the axis of the bars: the next tenth, so that every bar is a length from 0."""
    return min(1.0, max(1, math.ceil(10 * largest - 1e-9)) / 10)


def _ticks(top: float) -> list[float]:
    step = 0.1 if top <= 0.6 else 0.2
    return [i * step for i in range(math.floor(top / step + 1e-9) + 1)]


def _bar(row: Row, top: float) -> dict[str, Any]:
    """Places on the axis in percent of its length."""
    spread = row.test.deviation or 0.0
    return {
        "row": row,
        "text": percent(row.test),
        "end": 100 * row.test.mean / top,
        "majority": 100 * row.majority / top,
        "low": 100 * max(0.0, row.test.mean - spread) / top,
        "high": 100 * min(top, row.test.mean + spread) / top,
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
        "seconds": f"{content['seconds']:,.0f} s",
        "sessions": content["sessions"],
        "started": str(content.get("started") or "").replace("T", " ")[:16],
    }
