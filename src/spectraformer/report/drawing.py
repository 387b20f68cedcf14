"""How every drawing looks, and how it becomes a file or part of the page, whose colours follow light or dark mode.

Colours are those of Okabe and Ito (2008, https://jfly.uni-koeln.de/color/), told apart with every common kind of colour
blindness; dashes and shapes tell them apart in print without colour.
"""

from __future__ import annotations

import io
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import matplotlib as mpl
from matplotlib import style
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

INK, MUTED, RULE = "#1b1e23", "#646b75", "#dfe2e6"
PALETTE = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00")
RESOLUTION = 160  # of PNG files, dots an inch
LABEL = 24  # characters of a name in a picture


@contextmanager
def drawing_settings(salt: str) -> Iterator[None]:
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


def saved_svg(figure: Figure, *, transparent: bool = False) -> bytes:
    """The figure as an SVG file: the same bytes for the same figure."""
    file = io.BytesIO()
    FigureCanvasSVG(figure)
    metadata: dict[str, Any] = dict.fromkeys(("Date", "Creator", "Format", "Type"))
    figure.savefig(file, format="svg", metadata=metadata, transparent=transparent)
    return file.getvalue()


def saved_png(figure: Figure) -> bytes:
    """The figure as a PNG file: the same bytes for the same figure."""
    file = io.BytesIO()
    FigureCanvasAgg(figure)
    figure.savefig(file, format="png", metadata={"Software": None}, dpi=RESOLUTION)
    return file.getvalue()


def shortened(name: str) -> str:
    """A name for a picture, where there is no room for a long one."""
    name = " ".join(name.split())
    return name if len(name) <= LABEL else name[: LABEL - 1] + "\N{HORIZONTAL ELLIPSIS}"


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


def css_variable(colour: str) -> str:
    """The colour as the page names it."""
    names = {INK: "ink", MUTED: "muted", RULE: "rule", **{c: f"series-{i}" for i, c in enumerate(PALETTE, 1)}}
    return f"var(--{names[colour]})"


def for_page(svg: bytes, description: str) -> str:
    """Matplotlib's file as an element of an HTML page: no size of its own, colours by CSS variables.

    The page defines --ink, --muted, --rule and --series-1 to --series-6.
    """
    text = svg.decode()
    text = text[text.index("<svg") :]
    text = re.sub(r"<defs>\s*<style.*?</style>\s*</defs>", "", text, count=1, flags=re.S)
    text = re.sub(r'font-family: [^;"]*;? ?', "", text)
    text = text.replace("xlink:href", "href")
    used = set(re.findall(r'(?:href="#|url\(#)([^")]+)', text))
    text = re.sub(r' id="([^"]*)"', lambda m: m[0] if m[1] in used else "", text)
    text = re.sub(r' d="[^"]*"', lambda m: re.sub(r"(\.\d\d)\d+", r"\1", m[0]), text)
    for colour in (INK, MUTED, RULE, *PALETTE):
        text = text.replace(colour, css_variable(colour))
    text = re.sub(r"\s*\n\s*", " ", text)
    box = re.search(r'viewBox="[^"]*"', text)
    assert box
    description = description.replace("&", "&amp;").replace("<", "&lt;").replace('"', "&quot;")
    return re.sub(r"<svg[^>]*>", lambda _: f'<svg {box[0]} role="img" aria-label="{description}">', text, count=1)
