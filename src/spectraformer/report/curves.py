"""Training curves: dev accuracy and training loss, by step and, where it was measured, by training time."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeGuard

from matplotlib.axes import Axes
from matplotlib.collections import LineCollection, PolyCollection
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator, ScalarFormatter

from spectraformer.records import Record
from spectraformer.report.drawing import (
    INK,
    MUTED,
    PALETTE,
    css_variable,
    drawing_settings,
    for_page,
    saved_png,
    saved_svg,
    spread,
)
from spectraformer.report.rows import Row, Section, timed_records

DASHES = ((), (6, 2), (2, 1.5), (8, 2, 2, 2), (4, 1.5, 1, 1.5, 1, 1.5))
NAMED = 8  # more curves than that cannot be told apart: the others are grey
WRAP = 17  # characters of a label at the end of a curve
POINTS = 100  # of a curve: every so manieth evaluation is drawn, the last one always

Dash = tuple[float, ...]
_Points = list[tuple[float, float]]


class Mark(NamedTuple):
    """How the curves of a row look: colour (a hexadecimal text), dashes in points, and whether it is named."""

    colour: str
    dashes: Dash
    named: bool


@dataclass(frozen=True)
class Panel:
    """One drawing: a quantity of the history against steps or training time."""

    title: str
    across: str
    along: str


PANELS = (
    Panel("Dev accuracy by step", "step", "dev_accuracy"),
    Panel("Dev accuracy by training time", "seconds", "dev_accuracy"),
    Panel("Training loss by step", "step", "train_loss"),
    Panel("Training loss by training time", "seconds", "train_loss"),
)


def marks(section: Section) -> dict[str, Mark]:
    """The look of each row, by label: softmax in ink, the best others in colour, the rest grey."""
    coloured = [row for row in section.rows if not row.exact][:NAMED]
    found = {row.label: Mark(MUTED, (1, 2), False) for row in section.rows}
    exact = [row for row in section.rows if row.exact]
    found |= {row.label: Mark(INK, DASHES[i % len(DASHES)], True) for i, row in enumerate(exact)}
    for i, row in enumerate(coloured):
        found[row.label] = Mark(PALETTE[i % len(PALETTE)], DASHES[(i + i // len(PALETTE)) % len(DASHES)], True)
    return found


def curve_files(section: Section) -> tuple[bytes, bytes]:
    """The four panels as one SVG file, and as one PNG file of 1760 × 1200 pixels."""
    with drawing_settings(section.title):
        figure = Figure(figsize=(11, 7.5), facecolor="white")
        figure.text(0.05, 0.955, section.title, size=15, weight="bold", va="center")
        for i, panel in enumerate(PANELS):
            left, bottom = 0.05 + 0.495 * (i % 2), 0.53 - 0.47 * (i // 2)
            axes = figure.add_axes((left, bottom, 0.315, 0.345))
            axes.text(0, 1.06, panel.title, transform=axes.transAxes, size=11)
            _draw(axes, section, panel)
        return saved_svg(figure), saved_png(figure)


def panel_svg(section: Section, panel: Panel) -> str:
    """One panel to stand in an HTML page."""
    with drawing_settings(f"{section.title}/{panel.title}"):
        figure = Figure(figsize=(5.4, 3.1))
        curves = _draw(figure.add_axes((0.105, 0.16, 0.58, 0.8)), section, panel)
        drawn = saved_svg(figure, transparent=True)
    return for_page(drawn, f"{panel.title} on {section.title}: {_ends(curves, panel)}")


def legend_svg(mark: Mark) -> str:
    """A short piece of the curve, for the legend of the page."""
    dashes = f' stroke-dasharray="{" ".join(f"{1.8 * length:g}" for length in mark.dashes)}"' if mark.dashes else ""
    return (
        '<svg viewBox="0 0 34 10" width="34" height="10" aria-hidden="true">'
        f'<path d="M1 5H33" fill="none" stroke="{css_variable(mark.colour)}" stroke-width="2"{dashes}/></svg>'
    )


class _Curve(NamedTuple):
    """Of one row: its mean over seeds, and the least and largest of them; points are (x, y)."""

    row: Row
    mark: Mark
    mean: _Points
    low: list[float]
    high: list[float]


def curves(section: Section, panel: Panel) -> list[_Curve]:
    """One a row that has points, the best last so that it lies on top; at most ``POINTS`` points, and the last."""
    found, look = [], marks(section)
    for row in reversed(section.rows):
        seeds = [_points(record.content["history"], panel) for record in _drawn(row, panel)]
        shared = sorted(set(seeds[0]).intersection(*seeds[1:])) if seeds else []
        if shared:
            stride = math.ceil(len(shared) / POINTS)
            shared = shared[(len(shared) - 1) % stride :: stride]
            mean = [_mean([points[step] for points in seeds]) for step in shared]
            heights = [[points[step][1] for points in seeds] for step in shared]
            found.append(_Curve(row, look[row.label], mean, list(map(min, heights)), list(map(max, heights))))
    return found


def _drawn(row: Row, panel: Panel) -> list[Record]:
    """All seeds; against time those that had one device to themselves, the same for all."""
    if panel.across == "step":
        return list(row.records)
    return timed_records(row.records) if row.device else []


def _points(history: Sequence[Mapping[str, Any]], panel: Panel) -> dict[int, tuple[float, float]]:
    """(x, y) by step; a loss that is not finite has no place in a drawing."""
    found = {}
    for point in history:
        step, x, y = point.get("step"), point.get(panel.across), point.get(panel.along)
        if isinstance(step, int) and _finite(x) and _finite(y):
            found[step] = (x, y)
    return found


def _mean(points: Sequence[tuple[float, float]]) -> tuple[float, float]:
    return sum(x for x, _ in points) / len(points), sum(y for _, y in points) / len(points)


def _finite(number: object) -> TypeGuard[float]:
    return isinstance(number, (int, float)) and math.isfinite(number)


class _Percent(ScalarFormatter):
    """Ticks with as many digits as tell them apart, and the sign of percent."""

    def __call__(self, x: float, pos: int | None = None) -> str:
        return f"{super().__call__(x, pos)} %"


def _draw(axes: Axes, section: Section, panel: Panel) -> list[_Curve]:
    found = curves(section, panel)
    accuracy = panel.along == "dev_accuracy"
    across, unit = _unit(max((curve.mean[-1][0] for curve in found), default=0.0), panel.across)
    up = 100.0 if accuracy else 1.0
    axes.set_xlabel(unit)
    axes.xaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 5, 10], integer=panel.across == "step"))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:,.10g}"))
    axes.yaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 5, 10]))
    axes.yaxis.set_major_formatter(_Percent(useOffset=False) if accuracy else ScalarFormatter(useOffset=False))
    if not found:
        axes.set(xlim=(0, 1), ylim=(0, 1), xticks=[], yticks=[])
        timed = panel.across == "step" or any(row.device for row in section.rows)
        missing = "no evaluations recorded" if timed else "no times measured"
        axes.text(0.5, 0.5, missing, color=MUTED, ha="center", va="center")
        return []
    ends: dict[str, _End] = {}
    lines, bands = [], []
    for row, mark, mean, low, high in found:
        xs = [x / across for x, _ in mean]
        lines.append([(x, y * up) for x, (_, y) in zip(xs, mean, strict=True)])
        if mark.named and len(row.records) > 1:
            edge = [*zip(xs, low, strict=True), *reversed(list(zip(xs, high, strict=True)))]
            bands.append(([(x, y * up) for x, y in edge], mark.colour))
        ends[row.label if mark.named else "others"] = _End(*lines[-1][-1], mark)
    colours = [curve.mark.colour for curve in found]
    # One collection for all is drawn many times faster than an artist for each.
    axes.add_collection(
        PolyCollection(
            [edge for edge, _ in bands], facecolors=[colour for _, colour in bands], alpha=0.13, linewidths=0
        )
    )
    dashes: Any = [(0, curve.mark.dashes or None) for curve in found]
    widths = [1.8 if curve.mark.named else 1.0 for curve in found]
    axes.add_collection(LineCollection(lines, colors=colours, linewidths=widths, linestyles=dashes))
    axes.autoscale_view()
    across_dots, up_dots = zip(*(line[-1] for line in lines), strict=True)
    axes.scatter(across_dots, up_dots, s=13, c=colours, clip_on=False, linewidths=0, zorder=3)
    axes.set_xlim(left=0)
    if accuracy:
        for majority in sorted({record.content["data"]["majority"]["dev"] for record in section.records}):
            axes.axhline(100 * majority, color=MUTED, linewidth=1.2, linestyle=(0, (1, 1.5)))
            ends["majority class"] = _End(axes.get_xlim()[1], 100 * majority, Mark(MUTED, (1, 1.5), True))
    _name(axes, ends)
    return found


def _unit(longest: float, across: str) -> tuple[float, str]:
    """What to divide by, and the label of the axis."""
    if across == "step":
        return 1.0, "optimiser step"
    for factor, unit in ((3600.0, "hours"), (60.0, "minutes")):
        if longest >= 3 * factor:
            return factor, f"training time, {unit}"
    return 1.0, "training time, seconds"


class _End(NamedTuple):
    """Where a curve ends, in the units of the axes."""

    x: float
    y: float
    mark: Mark


def _name(axes: Axes, ends: Mapping[str, _End]) -> None:
    """A label beside the end of each curve, moved up or down where they would overlap, and joined to it."""
    low, high = axes.get_ylim()
    left, right = axes.get_xlim()
    line = 11.0 / (axes.get_window_extent().height / axes.figure.dpi * 72)  # of text, as a fraction of the axes
    labels = {name: "\n".join(textwrap.wrap(name, WRAP, break_on_hyphens=False)) for name in ends}
    order = sorted(ends, key=lambda name: (ends[name].y, name))
    sizes = [line * (labels[name].count("\n") + 1.15) for name in order]
    wanted = [(ends[name].y - low) / (high - low) for name in order]
    leaders, keys = [], []
    for name, start, at in zip(order, wanted, spread(wanted, sizes), strict=True):
        x = (ends[name].x - left) / (right - left)
        leaders.append([(x, start), (1.0, start), (1.035, at)])
        keys.append([(1.035, at), (1.1, at)])
        axes.text(1.115, at, labels[name], transform=axes.transAxes, size=9, va="center", linespacing=1.05)
    colours = [ends[name].mark.colour for name in order]
    dashes: Any = [(0, ends[name].mark.dashes or None) for name in order]
    for lines, width, look in ((leaders, 0.6, "solid"), (keys, 1.8, dashes)):
        pieces = LineCollection(lines, colors=colours, linewidths=width, linestyles=look, transform=axes.transAxes)
        pieces.set_clip_on(False)
        axes.add_collection(pieces, autolim=False)


def _ends(found: Sequence[_Curve], panel: Panel) -> str:
    """What a reader of the picture learns first, in words: where each curve ends."""
    said = [
        f"{curve.row.label} ends at {100 * curve.mean[-1][1]:.1f} %"
        if panel.along == "dev_accuracy"
        else f"{curve.row.label} ends at {curve.mean[-1][1]:.3g}"
        for curve in reversed(found)
    ]
    return "; ".join(said) + "." if said else "nothing recorded."
