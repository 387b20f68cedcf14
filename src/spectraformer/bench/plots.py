"""Time and memory against length, the length from which random features are faster marked."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from spectraformer.bench.competitors import EXACT, OURS
from spectraformer.bench.table import Group, Row, break_evens, groups, is_timed, milliseconds
from spectraformer.report.drawing import INK, MUTED, PALETTE, drawing_settings, saved_png, saved_svg, spread

SOLID, DASHED, DOTTED = (), (6, 2), (2, 1.5)
# One look a competitor, the same in every drawing; softmax in ink. Widths in points.
_LOOKS: dict[str, tuple[str, tuple[float, ...], float]] = {
    "posrf-orf": (PALETTE[1], SOLID, 2.6),
    "oprf-orf": (PALETTE[5], SOLID, 1.8),
    "posrf-orf-torch": (PALETTE[1], DOTTED, 1.4),
    "torch": (PALETTE[2], DOTTED, 1.4),
    "torch-compile": (PALETTE[2], SOLID, 1.4),
    "flex-attention": (PALETTE[3], SOLID, 1.4),
    "performer-pytorch": (PALETTE[4], SOLID, 1.4),
    "fla": (PALETTE[0], SOLID, 1.4),
    "sdpa-cudnn": (INK, SOLID, 1.4),
    "sdpa-flash": (INK, DASHED, 1.4),
}
PANEL_WIDTH, PANEL_HEIGHT = 6.0, 3.95  # inches
LEFT, PLOT_WIDTH, BOTTOM, PLOT_HEIGHT = 0.75, 3.35, 0.6, 2.85  # inches, of a panel


class Drawing(NamedTuple):
    """A figure of one shape, bidirectional or causal."""

    name: str  # such as "d64-m128-causal"
    png: bytes
    svg: bytes


def drawings(record: Mapping[str, Any]) -> list[Drawing]:
    """One figure for each shape and kind of a record: time of each mode, and memory where it was counted.

    What was timed at one length only is left out: none, if there is nothing else.
    """
    sheets: dict[Group, list[tuple[Group, list[Row]]]] = {}
    for group, rows in groups(record["rows"]).items():
        if len({row["tokens"] for row in rows if is_timed(row)}) > 1:
            sheets.setdefault(group._replace(mode=""), []).append((group, rows))
    names = _names(list(sheets))
    found = []
    for sheet, panels in sheets.items():
        with drawing_settings(f"attention/{names[sheet]}"):
            found.append(_drawn(names[sheet], record["device"], panels))
    return found


def _names(sheets: Sequence[Group]) -> dict[Group, str]:
    """Short names, longer where sheets differ in batch, heads or dtype too."""
    short = {s: f"d{s.head_dim}-m{s.num_features}" + ("-causal" if s.causal else "") for s in sheets}
    same = {s: list(short.values()).count(name) > 1 for s, name in short.items()}
    return {s: f"{name}-{s.dtype}-{s.batch}x{s.heads}" if same[s] else name for s, name in short.items()}


def _drawn(name: str, device: str, panels: Sequence[tuple[Group, Sequence[Row]]]) -> Drawing:
    kinds = [(group, rows, False) for group, rows in panels]
    kinds += [(group, rows, True) for group, rows in panels if any(_memory(rows, c) for c in _LOOKS)]
    columns = min(2, len(kinds))
    lines = -(-len(kinds) // columns)
    width, height = PANEL_WIDTH * columns, PANEL_HEIGHT * lines + 0.55
    figure = Figure(figsize=(width, height), facecolor="white")
    first = panels[0][0]
    title = f"{'Causal' if first.causal else 'Bidirectional'} attention on {device}"
    detail = (
        f"head dim {first.head_dim}, {first.num_features} features, {first.batch * first.heads} heads, {first.dtype}"
    )
    figure.text(LEFT / width, 1 - 0.27 / height, title, size=13, weight="bold", va="center")
    figure.text(LEFT / width, 1 - 0.53 / height, detail, size=10, color=MUTED, va="center")
    for i, (group, rows, memory) in enumerate(kinds):
        left = PANEL_WIDTH * (i % columns) + LEFT
        bottom = height - 0.55 - PANEL_HEIGHT * (i // columns + 1) + BOTTOM
        axes = figure.add_axes((left / width, bottom / height, PLOT_WIDTH / width, PLOT_HEIGHT / height))
        mode = group.mode.replace("+", " + ")
        axes.set_title(f"{'Peak memory' if memory else 'Time'}, {mode}", loc="left", size=11, pad=8)
        _draw(axes, rows, memory=memory)
    return Drawing(name, saved_png(figure), saved_svg(figure))


def _memory(rows: Sequence[Row], competitor: str) -> dict[int, float]:
    """GiB by length."""
    mine = [row for row in rows if row["competitor"] == competitor and is_timed(row)]
    found = {row["tokens"]: row["memory_bytes"] / 2**30 for row in mine if row["memory_bytes"] is not None}
    return dict(sorted(found.items()))


def _draw(axes: Axes, rows: Sequence[Row], *, memory: bool) -> None:
    curves = {name: _memory(rows, name) if memory else milliseconds(rows, name) for name in _LOOKS}
    curves = {name: points for name, points in curves.items() if points}
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xlabel("tokens")
    axes.set_ylabel("GiB" if memory else "milliseconds")
    lengths = sorted({n for points in curves.values() for n in points})
    axes.xaxis.set_major_locator(FixedLocator(_ticks(lengths)))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: _short(x)))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:,.6g}"))
    axes.yaxis.set_minor_locator(NullLocator())
    for name, points in reversed(curves.items()):  # ours last, on top
        colour, dashes, width = _LOOKS[name]
        (line,) = axes.plot(list(points), list(points.values()), color=colour, linewidth=width)
        line.set_dashes(dashes)
        axes.plot(list(points), list(points.values()), "o", markersize=3.2, color=colour, clip_on=False)
    if len(lengths) > 1:
        axes.set_xlim(lengths[0], lengths[-1])
    if not memory:
        _mark(axes, rows)
    _label(axes, curves)


def _mark(axes: Axes, rows: Sequence[Row]) -> None:
    """The first of ours against the fastest softmax attention there is."""
    met = [found for found in break_evens(rows) if found.met and found.tokens is not None]
    for found in sorted(met, key=lambda x: (OURS.index(x.ours), -(x.tokens or 0)))[:1]:
        assert found.tokens is not None
        axes.axvline(found.tokens, color=MUTED, linewidth=0.9, linestyle=(0, (3, 2)), zorder=1)
        axes.plot([found.tokens], [found.milliseconds], "o", markersize=9, markerfacecolor="none", color=INK, zorder=5)
        axes.annotate(
            f"break-even with\n{found.exact}: {found.tokens:,.0f}",
            (found.tokens, 1.0),
            xycoords=("data", "axes fraction"),
            xytext=(5, -2),
            textcoords="offset points",
            size=9,
            va="top",
            bbox={"facecolor": "white", "edgecolor": "none", "pad": 1.0},
        )


def _label(axes: Axes, curves: Mapping[str, Mapping[int, float]]) -> None:
    """A name beside the end of each curve, moved where names would overlap, and joined to it."""
    to_axes = axes.transAxes.inverted()
    ends = {}
    for name, points in curves.items():
        last = max(points)
        ends[name] = to_axes.transform(axes.transData.transform((last, points[last])))
    order = sorted(ends, key=lambda name: (ends[name][1], name))
    size = 12.5 / (PLOT_HEIGHT * 72)
    for name, at in zip(order, spread([ends[name][1] for name in order], [size] * len(order)), strict=True):
        colour, dashes, width = _LOOKS[name]
        x, y = ends[name]
        lines = ((x, 1.03, y, at, 0.6, (1.0, 1.5)), (1.03, 1.1, at, at, width, dashes))
        for start, end, low, high, thick, pattern in lines:
            (line,) = axes.plot([start, end], [low, high], color=colour, linewidth=thick, transform=axes.transAxes)
            line.set_dashes(pattern)
            line.set_clip_on(False)
        bold = "bold" if name in OURS else "normal"
        said = f"{name} (softmax)" if name in EXACT else name
        axes.text(1.12, at, said, transform=axes.transAxes, size=9, va="center", weight=bold)


def _ticks(lengths: Sequence[int]) -> list[int]:
    """Powers of two between the shortest and the longest length, seven at most."""
    found = [1 << i for i in range(40) if lengths[0] <= 1 << i <= lengths[-1]] or list(lengths)
    return found[:: -(-len(found) // 7)]


def _short(tokens: float) -> str:
    """A power of two as people write it: 512, 8k, 1M."""
    for size, unit in ((1 << 20, "M"), (1 << 10, "k")):
        if tokens >= size:
            return f"{tokens / size:g}{unit}"
    return f"{tokens:g}"
