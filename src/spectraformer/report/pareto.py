"""Pareto fronts: accuracy against training time, peak memory and the size of the state."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

from spectraformer.report.drawing import (
    INK,
    MUTED,
    PALETTE,
    drawing_settings,
    for_page,
    saved_png,
    saved_svg,
    shortened,
)
from spectraformer.report.rows import EXACT, Row, Section
from spectraformer.report.table import SPACE, three_digits

FRONT, OTHERS = PALETTE[0], MUTED
DECADE = 10.0
SIZE, LINE, GAP = 8.5, 11.5, 5.0  # of labels: letters, line, and distance from the dot, in points


@dataclass(frozen=True)
class Front:
    """Test accuracy against a cost, and the rows that no other beats in both.

    Attributes:
        title: What is drawn.
        axis: Label of the axis of costs.
        unit: Of the costs, in words.
        points: Row and cost, positive, cheapest first.
        best: Labels of the rows on the front.
        note: Who is left out and why; "" for nobody.
        level: Accuracy of an attention whose cost has no bound, in [0, 1], or None.
    """

    title: str
    axis: str
    unit: str
    points: tuple[tuple[Row, float], ...]
    best: frozenset[str]
    note: str = ""
    level: float | None = None


def pareto(points: Sequence[tuple[float, float]]) -> list[bool]:
    """Which points (cost, accuracy) no other beats: none is as cheap and as accurate and better in one of the two."""
    return [
        not any(
            cost <= own_cost and accuracy >= own_accuracy and (cost, accuracy) != (own_cost, own_accuracy)
            for cost, accuracy in points
        )
        for own_cost, own_accuracy in points
    ]


def fronts(section: Section) -> list[Front]:
    """Accuracy against training time, peak memory and the size of the state; those that have two costs or more."""
    timed = [row for row in section.rows if row.seconds and row.device]
    device = _most([row.device for row in timed if row.device])
    weighed = [row for row in section.rows if row.peak_memory and row.memory_kind]
    kind = _most([row.memory_kind for row in weighed if row.memory_kind])
    times = [(row, row.seconds) for row in timed if row.device == device and row.seconds]
    longest = max((seconds for _, seconds in times), default=0.0)
    factor, unit = next(
        (f, u) for f, u in ((3600.0, "hours"), (60.0, "minutes"), (1.0, "seconds")) if longest >= f or f == 1
    )
    memories = [(row, row.peak_memory / 2**20) for row in weighed if row.memory_kind == kind and row.peak_memory]
    exact = next((row.test.mean for row in section.rows if row.exact), None)
    made = [
        _front(
            "Accuracy and training time",
            f"training time, {unit}",
            unit,
            [(row, t / factor) for row, t in times],
            _left(timed, times, f"measured on other devices than {device}"),
        ),
        _front(
            "Accuracy and peak memory",
            "peak memory, MiB",
            "MiB",
            memories,
            _left(weighed, memories, "whose memory was measured in another way"),
        ),
        _front(
            "Accuracy and size of the state",
            "numbers a head of the causal state",
            "numbers",
            [(row, float(row.state)) for row in section.rows if row.state],
            "",
            exact,
        ),
    ]
    return [front for front in made if front is not None]


def _most(names: Sequence[str]) -> str | None:
    return min(set(names), key=lambda name: (-names.count(name), name)) if names else None


def _left(all_rows: Sequence[Row], drawn: Sequence[tuple[Row, float]], why: str) -> str:
    missing = len(all_rows) - len(drawn)
    return f"Without {missing} row{'s' * (missing != 1)} {why}." if missing else ""


def _front(
    title: str, axis: str, unit: str, points: Sequence[tuple[Row, float]], note: str, level: float | None = None
) -> Front | None:
    if len({cost for _, cost in points}) < 2:
        return None
    ordered = sorted(points, key=lambda point: (point[1], -point[0].test.mean, point[0].label))
    best = pareto([(cost, row.test.mean) for row, cost in ordered])
    labels = frozenset(row.label for (row, _), kept in zip(ordered, best, strict=True) if kept)
    return Front(title, axis, unit, tuple(ordered), labels, note, level)


def front_words(front: Front) -> str:
    """Which rows are on the front, in a sentence."""
    named = [
        f"{row.label} ({three_digits(cost)}{SPACE}{front.unit}, {100 * row.test.mean:.1f}{SPACE}%)"
        for row, cost in front.points
        if row.label in front.best
    ]
    text = f"No other is both cheaper and better than {'; '.join(named)}."
    return f"{text} {front.note}".strip()


def front_svg(section: Section, front: Front) -> str:
    """One front to stand in an HTML page."""
    with drawing_settings(f"{section.title}/{front.title}"):
        figure = Figure(figsize=(5.4, 3.4))
        _draw_front(figure.add_axes((0.105, 0.15, 0.86, 0.8)), front)
        return for_page(saved_svg(figure, transparent=True), f"{front.title} on {section.title}. {front_words(front)}")


def front_files(section: Section, found: Sequence[Front]) -> tuple[bytes, bytes]:
    """All fronts of a section side by side, as an SVG and a PNG file."""
    with drawing_settings(f"{section.title}/fronts"):
        width = 5.4 * len(found)
        figure = Figure(figsize=(width, 4.2), facecolor="white")
        figure.text(0.3 / width, 0.95, section.title, size=15, weight="bold", va="center")
        for i, front in enumerate(found):
            axes = figure.add_axes(((5.4 * i + 0.57) / width, 0.12, 4.64 / width, 0.68))
            axes.text(0, 1.05, front.title, transform=axes.transAxes, size=11)
            _draw_front(axes, front)
        return saved_svg(figure), saved_png(figure)


def _draw_front(axes: Axes, front: Front) -> None:
    xs = [cost for _, cost in front.points]
    ys = [100 * row.test.mean for row, _ in front.points]
    best = [(cost, 100 * row.test.mean) for row, cost in front.points if row.label in front.best]
    axes.set_xscale("log")
    axes.set_xlim(min(xs) / (max(xs) / min(xs)) ** 0.06, max(xs) * (max(xs) / min(xs)) ** 0.06)
    low, high = min(ys), max([*ys, *([100 * front.level] if front.level is not None else [])])
    room = (high - low) or 1.0
    axes.set_ylim(low - 0.08 * room, high + 0.16 * room)
    few = max(xs) < DECADE * min(xs)  # powers of ten would leave an axis of one number
    axes.xaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 5, 10]) if few else LogLocator(subs=(1.0, 2.0, 5.0)))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:,.10g}"))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:g} %"))
    axes.set_xlabel(front.axis)
    right = axes.get_xlim()[1]
    steps = [*((x, y) for x, y in best), (right, best[-1][1])]
    axes.step([x for x, _ in steps], [y for _, y in steps], where="post", color=FRONT, linewidth=1.4)
    if front.level is not None:
        axes.axhline(100 * front.level, color=INK, linewidth=1.0, linestyle=(0, (6, 2)))
    colours = [FRONT if row.label in front.best else INK if row.name == EXACT else OTHERS for row, _ in front.points]
    sizes = [34 if colour != OTHERS else 16 for colour in colours]
    axes.scatter(xs, ys, s=sizes, c=colours, linewidths=0, zorder=3, clip_on=False)
    _label(axes, front)


# Where a label may stand beside its dot, best first: to the right, and above.
SIDES = ((0, 1), (1, 1), (-1, 1), (1, 0), (-1, 0), (0, -1), (1, -1), (-1, -1))
_Box = tuple[float, float, float, float]  # left, bottom, right, top, in points from the corner of the axes


def _label(axes: Axes, front: Front) -> None:
    """Names of the front and of softmax, the most accurate first, where there is room beside dots and the line."""
    extent = axes.get_window_extent()
    wide, high = (72 * size / axes.figure.dpi for size in (extent.width, extent.height))
    to_axes = axes.transScale + axes.transLimits
    dots = [(row, *(to_axes.transform((cost, 100 * row.test.mean)) * (wide, high))) for row, cost in front.points]
    line = _steps([(x, y) for row, x, y in dots if row.label in front.best], wide)
    wanted = [dot for dot in dots if dot[0].label in front.best or dot[0].name == EXACT]
    taken: list[_Box] = []

    def write(text: str, box: _Box, colour: str) -> None:
        taken.append(box)
        place = (box[0] / wide, (box[1] + box[3]) / 2 / high)
        axes.text(*place, text, transform=axes.transAxes, size=SIZE, color=colour, va="center", ha="left")

    if front.level is not None:
        text = f"{EXACT}: grows with every token"
        level, length = high * to_axes.transform((front.points[0][1], 100 * front.level))[1], _length(text)
        lefts, bottoms = (2.0, (wide - length) / 2, wide - length - 2.0), (level + 2.0, level - 2.0 - LINE)
        places = [(left, bottom, left + length, bottom + LINE) for bottom in bottoms for left in lefts]
        others = [*line, *((u, v, u, v) for _, u, v in dots)]
        write(text, next((p for p in places if not any(_overlap(p, x) for x in others)), places[0]), MUTED)
    for row, x, y in sorted(wanted, key=lambda dot: -dot[2]):
        text = shortened(row.label)
        boxes = [_beside(x, y, right, up, _length(text)) for right, up in SIDES]
        boxes = [b for b in boxes if b[0] >= -GAP and b[2] <= wide + GAP and b[1] >= 0 and b[3] <= high + GAP]
        others = [*taken, *line, *((u, v, u, v) for _, u, v in dots if (u, v) != (x, y))]
        free = [box for box in boxes if not any(_overlap(box, other) for other in others)]
        if free:
            write(text, free[0], INK)


def _beside(x: float, y: float, right: int, up: int, length: float) -> _Box:
    """Where a label stands on one side of its dot."""
    left, bottom = x + right * GAP - (1 - right) / 2 * length, y + up * GAP - (1 - up) / 2 * LINE
    return left, bottom, left + length, bottom + LINE


def _steps(corners: Sequence[tuple[float, float]], end: float) -> list[_Box]:
    """The line of the front, from its corners, cheapest first: flat up to the next, then straight up to it."""
    flat = [(x, y, right, y) for (x, y), right in zip(corners, [*(x for x, _ in corners[1:]), end], strict=True)]
    return flat + [(x, low, x, y) for (x, y), (_, low) in zip(corners[1:], corners, strict=False)]


def _length(text: str) -> float:
    """Of a text in points, rather too much than too little: fonts differ from machine to machine."""
    return 0.6 * SIZE * len(text)


def _overlap(a: _Box, b: _Box) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]
