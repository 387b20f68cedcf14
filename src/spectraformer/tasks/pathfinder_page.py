"""A page of Pathfinder examples, each with its solution.

``python -m spectraformer.tasks.pathfinder_page --out docs/pathfinder.png``
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from spectraformer.tasks.base import Array
from spectraformer.tasks.pathfinder import SETTINGS
from spectraformer.tasks.pathfinder_images import Picture, draw, label_of
from spectraformer.tasks.pathfinder_paddles import Settings
from spectraformer.tasks.sources import require_package

COLUMNS = 8
GAP = 8
HEADING = 20
# Of the two target curves; distractors are grey.
COLOURS = ((255, 176, 32), (64, 170, 255))
GREY = (110, 110, 110)


def solution(picture: Picture, scale: int) -> Any:
    """The same image, enlarged, with a coloured line along each curve and a ring around each dot."""
    drawing = require_package("PIL.ImageDraw", "a page of examples")
    page = enlarged(picture.image // 3, scale)
    pencil = drawing.Draw(page)
    centres = picture.paddles[:, 1:] * scale + scale // 2
    for curve in range(int(picture.paddles[:, 0].max()) + 1):
        colour = COLOURS[curve] if curve < len(COLOURS) else GREY
        points = centres[picture.paddles[:, 0] == curve].reshape(-1, 2)[:, ::-1]
        pencil.line([tuple(point) for point in points.tolist()], fill=colour, width=max(1, scale // 3))
    for curve, (y, x) in zip(picture.dots.tolist(), (picture.tips * scale + scale // 2).tolist(), strict=True):
        pencil.ellipse((x - 2 * scale, y - 2 * scale, x + 2 * scale, y + 2 * scale), outline=COLOURS[curve], width=3)
    return page


def enlarged(image: Array, scale: int) -> Any:
    """A grey image as colours, each pixel ``scale`` x ``scale``."""
    pillow = require_package("PIL.Image", "a page of examples")
    return pillow.fromarray(np.kron(image, np.ones((scale, scale), dtype=np.uint8))).convert("RGB")


def make_page(settings: Settings, seed: int, each: int, scale: int) -> Any:
    """``each`` examples of either label, each above its solution."""
    pillow = require_package("PIL.Image", "a page of examples")
    drawing = require_package("PIL.ImageDraw", "a page of examples")
    side = settings.image_size * scale
    rows = -(-each // COLUMNS)
    section = HEADING + rows * (2 * side + 2 * GAP)
    page = pillow.new("RGB", (COLUMNS * (side + GAP) + GAP, 2 * section), "white")
    pencil = drawing.Draw(page)
    titles = {1: "label 1: both dots are on one curve", 0: "label 0: the dots are on two curves"}
    for top, (label, title) in zip((0, section), titles.items(), strict=True):
        pencil.text(
            (GAP, top + 4), f"{title}; below each: the two target curves in colour, distractors grey", fill="black"
        )
        chosen = [index for index in range(2 * each) if label_of(seed, index) == label]
        for number, index in enumerate(chosen):
            row, column = divmod(number, COLUMNS)
            picture = draw(settings, seed, index)
            at = GAP + column * (side + GAP), top + HEADING + row * (2 * side + 2 * GAP)
            page.paste(enlarged(picture.image, scale), at)
            page.paste(solution(picture, scale), (at[0], at[1] + side + 2))
    return page


def main(arguments: Sequence[str] | None = None) -> None:
    """Draws examples of each label of a Pathfinder task, and their solutions."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--out", required=True, type=Path, help="PNG file to write")
    parser.add_argument("--task", default="pathfinder", choices=tuple(SETTINGS))
    parser.add_argument("--size", default="full", choices=("full", "tiny"))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--each", type=int, default=16, help="examples of each label")
    parser.add_argument("--scale", type=int, default=5, help="a pixel becomes so many")
    options = parser.parse_args(arguments)
    settings = SETTINGS[options.task][options.size]
    make_page(settings, options.seed, options.each, options.scale).save(options.out, optimize=True)


if __name__ == "__main__":
    main()
