"""Mean ranks over tasks, drawn with Nemenyi's critical difference."""

from __future__ import annotations

from matplotlib.figure import Figure

from spectraformer.report.drawing import INK, PALETTE, RULE, drawing_settings, for_page, saved_png, saved_svg, shortened
from spectraformer.report.ranking import Ranking
from spectraformer.report.rows import EXACT


def ranking_svg(found: Ranking, title: str, description: str) -> str:
    """Mean ranks to stand in an HTML page."""
    with drawing_settings(f"{title}/ranks/page"):
        return for_page(saved_svg(_ranks(found, None), transparent=True), description)


def ranking_files(found: Ranking, title: str) -> tuple[bytes, bytes]:
    """Mean ranks as an SVG and a PNG file."""
    with drawing_settings(f"{title}/ranks"):
        figure = _ranks(found, title)
        return saved_svg(figure), saved_png(figure)


def _ranks(found: Ranking, title: str | None) -> Figure:
    """A line an attention: its mean rank, and half the critical difference to both sides.

    Two differ if and only if their bars do not meet.
    """
    k = len(found.labels)
    head = 0.75 if title else 0.3
    height = 0.55 + head + 0.23 * k
    figure = Figure(figsize=(7.2 if title else 4.9, height), facecolor="white" if title else "none")
    left = 0.27 if title else 0.36
    axes = figure.add_axes((left, 0.5 / height, 0.97 - left, 0.23 * k / height))
    axes.set(xlim=(0.6, k + 0.4), ylim=(k - 0.4, -0.6))
    axes.grid(True, axis="x")
    axes.grid(False, axis="y")
    axes.tick_params(axis="y", length=0, labelcolor=INK, labelsize=9)
    axes.set_yticks(range(k), [shortened(label) for label in found.labels])
    axes.set_xlabel("mean rank over tasks; 1 is best")
    half = (found.critical or 0.0) / 2
    if half:
        reach = found.means[0] + found.critical if found.critical else 0.0
        axes.axvline(reach, color=INK, linewidth=1.0, linestyle=(0, (4, 2)))
        axes.hlines(
            range(k),
            [max(0.6, mean - half) for mean in found.means],
            [min(k + 0.4, mean + half) for mean in found.means],
            color=PALETTE[0],
            alpha=0.28,
            linewidth=7,
        )
    for i, (mean, label) in enumerate(zip(found.means, found.labels, strict=True)):
        axes.plot([mean], [i], marker="o", markersize=5.5, color=INK if label == EXACT else PALETTE[0])
    if title:
        figure.text(0.02, 1 - 0.25 / height, title, size=13, weight="bold", va="center")
    axes.spines["bottom"].set_color(RULE)
    return figure
