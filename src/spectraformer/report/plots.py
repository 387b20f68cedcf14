"""Training curves, as files of their own and as drawings inside the page, whose colours follow its light or dark mode.

Colours are those of Okabe and Ito (2008, https://jfly.uni-koeln.de/color/), told apart with every common kind of colour
blindness; dashes tell them apart in print without colour.
"""

from __future__ import annotations

import io
import math
import re
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeGuard

import matplotlib as mpl
from matplotlib import style
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator, ScalarFormatter

from spectraformer.report.table import Row, Section

INK, MUTED, RULE = "#1b1e23", "#646b75", "#dfe2e6"
PALETTE = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00")
DASHES = ((), (6, 2), (2, 1.5), (8, 2, 2, 2), (4, 1.5, 1, 1.5, 1, 1.5))
NAMED = 8  # more curves than that cannot be told apart: the others are grey
WRAP = 17  # characters of a label at the end of a curve

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
    found |= {row.label: Mark(INK, DASHES[i % len(DASHES)], True) for i, row in enumerate(_exact(section))}
    for i, row in enumerate(coloured):
        found[row.label] = Mark(PALETTE[i % len(PALETTE)], DASHES[(i + i // len(PALETTE)) % len(DASHES)], True)
    return found


def _exact(section: Section) -> list[Row]:
    return [row for row in section.rows if row.exact]


def curves_svg(section: Section) -> bytes:
    """The four panels as one SVG file."""
    with _settings(section.title):
        return _saved(_sheet(section), "svg")


def curves_png(section: Section) -> bytes:
    """The four panels as one PNG file, 1760 × 1200 pixels."""
    with _settings(section.title):
        return _saved(_sheet(section), "png")


def panel_svg(section: Section, panel: Panel) -> str:
    """One panel to stand in an HTML page: no size of its own, colours by CSS variables, identifiers of its own.

    The page defines --ink, --muted, --rule and --series-1 to --series-6.
    """
    with _settings(f"{section.title}/{panel.title}"):
        figure = Figure(figsize=(5.4, 3.1))
        _draw(figure.add_axes((0.105, 0.16, 0.58, 0.8)), section, panel)
        text = _saved(figure, "svg").decode()
    return _for_page(text, f"{panel.title} on {section.title}: {_ends(section, panel)}")


def legend_svg(mark: Mark) -> str:
    """A short piece of the curve, for the legend of the page."""
    dashes = f' stroke-dasharray="{" ".join(f"{1.8 * length:g}" for length in mark.dashes)}"' if mark.dashes else ""
    return (
        '<svg viewBox="0 0 34 10" width="34" height="10" aria-hidden="true">'
        f'<path d="M1 5H33" fill="none" stroke="{_variable(mark.colour)}" stroke-width="2"{dashes}/></svg>'
    )


@contextmanager
def _settings(salt: str) -> Iterator[None]:
    """Drawing settings of our own, whatever the user's are; identifiers of an SVG depend on its salt alone."""
    own: dict[Any, Any] = {
        "svg.fonttype": "none",
        "svg.hashsalt": salt,
        "font.size": 10,
        "text.color": INK,
        "text.parse_math": False,
        "axes.edgecolor": RULE,
        "axes.labelcolor": MUTED,
        "axes.spines.left": False,
        "axes.spines.right": False,
        "axes.spines.top": False,
        "axes.grid": True,
        "axes.grid.axis": "y",
        "axes.axisbelow": True,
        "axes.unicode_minus": True,
        "axes.xmargin": 0.0,
        "axes.ymargin": 0.06,
        "grid.color": RULE,
        "grid.linewidth": 0.8,
        "xtick.color": RULE,
        "xtick.labelcolor": MUTED,
        "ytick.labelcolor": MUTED,
        "ytick.major.size": 0,
        "lines.linewidth": 1.8,
        "lines.scale_dashes": True,
    }
    with style.context("default"), mpl.rc_context(own):
        yield


def _saved(figure: Figure, kind: str) -> bytes:
    file = io.BytesIO()
    if kind == "svg":
        FigureCanvasSVG(figure)
        metadata: dict[str, Any] = dict.fromkeys(("Date", "Creator", "Format", "Type"))
        figure.savefig(file, format=kind, metadata=metadata, transparent=len(figure.axes) == 1)
    else:
        FigureCanvasAgg(figure)
        figure.savefig(file, format=kind, metadata={"Software": None}, dpi=160)
    return file.getvalue()


def _sheet(section: Section) -> Figure:
    figure = Figure(figsize=(11, 7.5), facecolor="white")
    figure.text(0.05, 0.955, section.title, size=15, weight="bold", va="center")
    for i, panel in enumerate(PANELS):
        left, bottom = 0.05 + 0.495 * (i % 2), 0.53 - 0.47 * (i // 2)
        axes = figure.add_axes((left, bottom, 0.315, 0.345))
        axes.set_title(panel.title, loc="left", size=11, pad=10)
        _draw(axes, section, panel)
    return figure


class _Curve(NamedTuple):
    """Of one row: its mean over seeds, and each seed's own if there are several; points are (x, y)."""

    row: Row
    mark: Mark
    mean: _Points
    seeds: list[_Points]


def _curves(section: Section, panel: Panel) -> list[_Curve]:
    """One a row that has points, the best last so that it lies on top."""
    found, look = [], marks(section)
    for row in reversed(section.rows):
        seeds = [_points(record.content["history"], panel) for record in row.records]
        shared = sorted(set(seeds[0]).intersection(*seeds[1:]))
        if shared:
            mean = [_mean([points[step] for points in seeds]) for step in shared]
            single = [list(points.values()) for points in seeds] if len(seeds) > 1 else []
            found.append(_Curve(row, look[row.label], mean, single))
    return found


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


def _draw(axes: Axes, section: Section, panel: Panel) -> None:
    curves = _curves(section, panel)
    accuracy = panel.along == "dev_accuracy"
    across, unit = _unit(max((curve.mean[-1][0] for curve in curves), default=0.0), panel.across)
    up = 100.0 if accuracy else 1.0
    axes.set_xlabel(unit)
    axes.xaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 5, 10], integer=panel.across == "step"))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:,.10g}"))
    axes.yaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 5, 10]))
    axes.yaxis.set_major_formatter(_Percent(useOffset=False) if accuracy else ScalarFormatter(useOffset=False))
    if not curves:
        axes.set(xlim=(0, 1), ylim=(0, 1), xticks=[], yticks=[])
        axes.text(0.5, 0.5, "no evaluations recorded", color=MUTED, ha="center", va="center")
        return
    ends: dict[str, _End] = {}
    for row, mark, mean, seeds in curves:
        for points in seeds:
            axes.plot(
                [x / across for x, _ in points], [y * up for _, y in points], color=mark.colour, lw=0.6, alpha=0.4
            )
        xs, ys = [x / across for x, _ in mean], [y * up for _, y in mean]
        (line,) = axes.plot(xs, ys, color=mark.colour, linewidth=1.8 if mark.named else 1.0)
        line.set_dashes(mark.dashes)
        axes.plot(xs[-1:], ys[-1:], marker="o", markersize=3.6, color=mark.colour, clip_on=False)
        ends[row.label if mark.named else "others"] = _End(xs[-1], ys[-1], mark)
    axes.set_xlim(left=0)
    if accuracy:
        for majority in sorted({record.content["data"]["majority"]["dev"] for record in section.records}):
            axes.axhline(100 * majority, color=MUTED, linewidth=1.2, linestyle=(0, (1, 1.5)))
            ends["majority class"] = _End(axes.get_xlim()[1], 100 * majority, Mark(MUTED, (1, 1.5), True))
    _name(axes, ends)


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
    right = axes.get_xlim()[1]
    line = 11.0 / (axes.get_window_extent().height / axes.figure.dpi * 72)  # of text, as a fraction of the axes
    labels = {name: "\n".join(textwrap.wrap(name, WRAP, break_on_hyphens=False)) for name in ends}
    order = sorted(ends, key=lambda name: (ends[name].y, name))
    sizes = [line * (labels[name].count("\n") + 1.15) for name in order]
    wanted = [(ends[name].y - low) / (high - low) for name in order]
    for name, start, at in zip(order, wanted, spread(wanted, sizes), strict=True):
        x, y, mark = ends[name]
        if x < right:
            axes.plot([x, right], [y, y], color=mark.colour, linewidth=0.5, alpha=0.6)
        for points, width, dashes in (((1.0, start, 1.035, at), 0.7, ()), ((1.035, at, 1.1, at), 1.8, mark.dashes)):
            (piece,) = axes.plot(
                points[::2], points[1::2], color=mark.colour, linewidth=width, transform=axes.transAxes
            )
            piece.set_dashes(dashes)
            piece.set_clip_on(False)
        axes.text(1.115, at, labels[name], transform=axes.transAxes, size=9, va="center", linespacing=1.05)


def spread(wanted: Sequence[float], sizes: Sequence[float]) -> list[float]:
    """Places near the wanted ones, in the same order, of intervals that do not overlap and, if they fit, lie in [0, 1].

    Least squares: neighbours that touch form blocks, each centred at the mean of what its members want.

    Args:
        wanted: Centres, rising.
        sizes: Lengths of the intervals, in the same unit.
    """
    offsets = [sum(sizes[:i]) + size / 2 for i, size in enumerate(sizes)]
    blocks: list[tuple[float, int]] = []  # mean of (wanted − offset), members
    for want, offset in zip(wanted, offsets, strict=True):
        mean, members = want - offset, 1
        while blocks and blocks[-1][0] > mean:
            before, count = blocks.pop()
            mean, members = (before * count + mean * members) / (count + members), count + members
        blocks.append((mean, members))
    room = 1 - sum(sizes)
    means = [min(max(mean, min(0.0, room)), max(0.0, room)) for mean, members in blocks for _ in range(members)]
    return [mean + offset for mean, offset in zip(means, offsets, strict=True)]


def _ends(section: Section, panel: Panel) -> str:
    """What a reader of the picture learns first, in words: where each curve ends."""
    accuracy = panel.along == "dev_accuracy"
    said = [
        f"{curve.row.label} ends at {100 * curve.mean[-1][1]:.1f} %"
        if accuracy
        else f"{curve.row.label} ends at {curve.mean[-1][1]:.3g}"
        for curve in reversed(_curves(section, panel))
    ]
    return "; ".join(said) + "." if said else "no evaluations recorded."


def _variable(colour: str) -> str:
    names = {INK: "ink", MUTED: "muted", RULE: "rule", **{c: f"series-{i}" for i, c in enumerate(PALETTE, 1)}}
    return f"var(--{names[colour]})"


def _for_page(text: str, description: str) -> str:
    """Matplotlib's file as an element of an HTML page."""
    text = text[text.index("<svg") :]
    text = re.sub(r"<defs>\s*<style.*?</style>\s*</defs>", "", text, count=1, flags=re.S)
    text = re.sub(r'font-family: [^;"]*;? ?', "", text)
    text = text.replace("xlink:href", "href")
    used = set(re.findall(r'(?:href="#|url\(#)([^")]+)', text))
    text = re.sub(r' id="([^"]*)"', lambda m: m[0] if m[1] in used else "", text)
    text = re.sub(r' d="[^"]*"', lambda m: re.sub(r"(\.\d\d)\d+", r"\1", m[0]), text)
    for colour in (INK, MUTED, RULE, *PALETTE):
        text = text.replace(colour, _variable(colour))
    text = re.sub(r"\s*\n\s*", " ", text)
    box = re.search(r'viewBox="[^"]*"', text)
    assert box
    description = description.replace("&", "&amp;").replace("<", "&lt;").replace('"', "&quot;")
    return re.sub(r"<svg[^>]*>", lambda _: f'<svg {box[0]} role="img" aria-label="{description}">', text, count=1)
