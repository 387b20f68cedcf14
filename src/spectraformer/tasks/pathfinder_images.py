"""Pathfinder images: are two dots on the same curve?

The law is that of the published generator (github.com/drewlinsley/pathfinder, ``snakes2.py``; Linsley et al. 2018,
arXiv:1805.08315; Kim et al. 2020, arXiv:1906.01558) with the settings of the Long Range Arena (Tay et al. 2021,
arXiv:2011.04006). Two target curves of ``contour_length`` paddles grow alternately from two origins, each new paddle
ending on a circle around a pivot one margin ahead of the last, with probability proportional to
``(1 - dilated mask) cos²(continuity · turn)``. A paddle whose mask clashes is drawn again a few times; then both curves
start again. Distractors follow in the same way. One dot marks an origin, the other the end of the same or of the other
curve. Bright values are divided by the brightest, as the original does when it stores an image.

Nothing is approximated: the original, too, starts in whole degrees and rounds pivots to pixels, so every paddle it can
draw is drawn once and stamped. Four things differ:

- a target curve keeps clear of the other's newest paddle, and distractors of both targets' last paddles (the original
  tests the masks before these are in them, so that curves sometimes touch);
- dots whose discs would touch are drawn again;
- labels are balanced exactly: of examples 2k and 2k + 1 one has label 1, which one is random;
- dots near the border, and masks that reach beyond it, ignore the border.
"""

from __future__ import annotations

import math
import random
from dataclasses import replace
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from spectraformer.checks import require_integer
from spectraformer.tasks.pathfinder_paddles import (
    MOST_FREE,
    Direction,
    Pair,
    Pieces,
    Seed,
    Settings,
    dot_stamp,
    make_pieces,
)

Array = NDArray[Any]

MOST_ATTEMPTS = 100_000

HARD = Settings()
INTERMEDIATE = replace(HARD, contour_length=9, distractor_length=3, num_distractors=6)
EASY = replace(HARD, contour_length=6, distractor_length=2, num_distractors=10)
# LRA's 128 x 128 set; "35 / (14 / 3)" distractors there are integer divisions.
PATHX = Settings(
    image_size=128,
    seed_distance=20,
    marker_radius=3.0,
    num_distractors=8,
    continuity=1.8,
    paddle_length=5,
    paddle_thickness=1.5,
    margins=(2, 3),
    target_contrast=0.9,
    distractor_contrast=0.9,
)


class Picture(NamedTuple):
    """One example and how it came about. Coordinates are (row, column); curves 0 and 1 are the targets."""

    image: Array  # (image_size, image_size) uint8
    label: int  # 1: both dots are on the same curve
    dots: Array  # (2,) int64: curves of the dot at an origin and of the one at an end
    tips: Array  # (2, 2) int64: where these dots are
    paddles: Array  # (paddles, 5) int64: curve, and both ends in the order of growth
    attempts: int  # at the two target curves


class _Paddle(NamedTuple):
    direction: Direction
    at: Pair  # where it is stamped, counted with the border outside the image
    pivot: Pair


class _Field:
    """What a growing curve has to keep clear of: the mask of what is taken, and the same dilated by a margin."""

    def __init__(self, planes: Array) -> None:
        self.planes = planes  # (2, width, width) uint8
        self.mask = planes[0]
        self.dilated = planes[1].reshape(-1)

    def copy(self) -> _Field:
        return _Field(self.planes.copy())

    def add(self, paddle: _Paddle) -> None:
        stamp, (y, x) = paddle.direction.stamp.planes, paddle.at
        reach = stamp.shape[1] // 2
        view = self.planes[:, y - reach : y + reach + 1, x - reach : x + reach + 1]
        np.maximum(view, stamp, out=view)

    def has_room(self, paddle: _Paddle) -> bool:
        limit, (y, x) = paddle.direction.stamp.limit, paddle.at
        reach = len(limit) // 2
        clash = self.mask[y - reach : y + reach + 1, x - reach : x + reach + 1] > limit
        return b"\x01" not in clash.tobytes()  # half the time of any(); this is the innermost loop


class _Canvas:
    """Grows curves for one setting and margin."""

    def __init__(self, settings: Settings, margin: int) -> None:
        self.settings = settings
        self.pieces: Pieces = make_pieces(settings, margin)
        size, pad = settings.image_size, self.pieces.pad
        self.width = size + 2 * pad
        self.offsets = np.array([y * self.width + x for y, x in self.pieces.candidates])
        planes = np.full((2, self.width, self.width), 255, dtype=np.uint8)
        for plane, border in zip(planes, (settings.padding, settings.padding + margin), strict=True):
            plane[pad + border : pad + size - border, pad + border : pad + size - border] = 0
        self.empty = _Field(planes)
        border = pad + 2 * settings.seed_distance
        self.middle = np.full_like(planes[0], 255)
        self.middle[border:-border, border:-border] = 0
        self.first_origins: dict[int, Array] = {}

    def free(self, mask: Array, seed: Seed) -> Array:
        """(places,) int64: where, row by row, a curve may start in this direction."""
        size, pad = self.settings.image_size, self.pieces.pad
        taken = mask > MOST_FREE
        hit = np.zeros((size, size), dtype=bool)
        for y, x in seed.shape:
            hit |= taken[pad + y : pad + y + size, pad + x : pad + x + size]
        return np.flatnonzero(~hit)

    def inside(self, at: Pair) -> bool:
        low, high = self.pieces.pad, self.pieces.pad + self.settings.image_size
        return low <= at[0] < high and low <= at[1] < high

    def start(self, seed: Seed, at: Pair) -> _Paddle | None:
        """A first paddle, unless it leaves the image."""
        pivot = _add(at, seed.pivot)
        if self.inside(at) and self.inside(_add(at, seed.direction.ends[1])) and self.inside(pivot):
            return _Paddle(seed.direction, at, pivot)
        return None

    def start_anywhere(self, rng: random.Random, mask: Array | None) -> _Paddle | None:
        """A first paddle in a free place of a mask; without a mask, in the middle of an empty image."""
        for _ in range(self.settings.paddle_retrials + 1):
            degree = int(360 * rng.random())
            seed = self.pieces.seeds[degree]
            if mask is not None:
                places = self.free(mask, seed)
            else:
                if degree not in self.first_origins:
                    self.first_origins[degree] = self.free(self.middle, seed)
                places = self.first_origins[degree]
            if not len(places):
                return None
            y, x = divmod(int(places[int(len(places) * rng.random())]), self.settings.image_size)
            paddle = self.start(seed, (y + self.pieces.pad, x + self.pieces.pad))
            if paddle is not None:
                return paddle
        return None

    def start_beside(self, rng: random.Random, first: _Paddle) -> _Paddle | None:
        """The first paddle of the second target curve."""
        for _ in range(self.settings.paddle_retrials + 1):
            seed = self.pieces.seeds[int(360 * rng.random())]
            bearing = math.radians(int(360 * rng.random()))
            distance = self.settings.seed_distance
            at = round(first.at[0] + distance * math.sin(bearing)), round(first.at[1] + distance * math.cos(bearing))
            paddle = self.start(seed, at)
            if paddle is not None:
                return paddle
        return None

    def extend(self, rng: random.Random, last: _Paddle, field: _Field, rival: _Paddle | None) -> _Paddle | None:
        """The paddle after the last one, kept clear of a field and of the other curve's newest; None in a dead end."""
        pivot = _add(last.pivot, last.direction.step)
        weights = last.direction.turn * (255 - field.dilated[pivot[0] * self.width + pivot[1] + self.offsets])
        cumulative = weights.cumsum()
        total = float(cumulative[-1])
        if total < 255e-4:
            return None
        for _ in range(self.settings.paddle_retrials + 1):
            choice = int(cumulative.searchsorted(total * rng.random(), side="right"))
            paddle = _Paddle(self.pieces.nexts[choice], _add(pivot, self.pieces.candidates[choice]), pivot)
            if field.has_room(paddle) and not (rival and _clash(paddle, rival)):
                return paddle
        return None

    def targets(self, rng: random.Random) -> tuple[list[list[_Paddle]], _Field] | None:
        """One attempt at the two target curves, and the field that holds both."""
        first = self.start_anywhere(rng, None)
        second = first and self.start_beside(rng, first)
        if first is None or second is None:
            return None
        if _clash(first, second):
            return None
        # The newest paddles are not in the field: the next one of the curve begins inside its margin.
        field = self.empty.copy()
        curves = [[first], [second]]
        for _ in range(self.settings.contour_length - 1):
            for curve, other in (curves, curves[::-1]):
                paddle = self.extend(rng, curve[-1], field, other[-1])
                if paddle is None:
                    return None
                field.add(curve[-1])
                curve.append(paddle)
        for curve in curves:
            field.add(curve[-1])
        return curves, field

    def distractor(self, rng: random.Random, field: _Field) -> tuple[list[_Paddle], _Field] | None:
        """One attempt at a distractor, and the field with it."""
        first = self.start_anywhere(rng, field.mask)
        if first is None:
            return None
        field = field.copy()
        curve = [first]
        for _ in range(self.settings.distractor_length - 1):
            paddle = self.extend(rng, curve[-1], field, None)
            if paddle is None:
                return None
            field.add(curve[-1])
            curve.append(paddle)
        field.add(curve[-1])
        return curve, field


@lru_cache(maxsize=16)
def _canvas(settings: Settings, margin: int) -> _Canvas:
    return _Canvas(settings, margin)


def _add(a: Pair, b: Pair) -> Pair:
    return a[0] + b[0], a[1] + b[1]


def _clash(a: _Paddle, b: _Paddle) -> bool:
    """Whether two paddles are too near each other, as :meth:`_Field.has_room` tells."""
    limit, mask = a.direction.stamp.limit, b.direction.stamp.mask
    y, x, side = b.at[0] - a.at[0], b.at[1] - a.at[1], len(limit)
    if abs(y) >= side or abs(x) >= side:
        return False
    shared = limit[max(y, 0) : side + min(y, 0), max(x, 0) : side + min(x, 0)]
    return bool((mask[max(-y, 0) : side - max(y, 0), max(-x, 0) : side - max(x, 0)] > shared).any())


def label_of(seed: int, index: int) -> int:
    """The label of an example, 0 or 1: of examples 2k and 2k + 1 exactly one has label 1."""
    return (index + random.Random(f"pathfinder-label/{seed}/{index // 2}").getrandbits(1)) % 2


def draw(settings: Settings, seed: int, index: int) -> Picture:
    """Example number ``index``; a pure function of the arguments.

    Raises:
        ValueError: If ``seed`` or ``index`` is no integer of at least 0, or the curves do not fit into the image.
    """
    require_integer("seed", seed, least=0)
    require_integer("index", index, least=0)
    label = label_of(seed, index)
    rng = random.Random(f"pathfinder/{seed}/{index}")
    canvas = _canvas(settings, settings.margins[int(len(settings.margins) * rng.random())])
    pad = canvas.pieces.pad
    attempts = 0
    while attempts < MOST_ATTEMPTS:
        attempts += 1
        grown = canvas.targets(rng)
        if grown is None:
            continue
        curves, field = grown
        origin = int(2 * rng.random())
        end = origin if label else 1 - origin
        marked = curves[origin][0], curves[end][-1]
        if math.dist(marked[0].at, marked[1].at) >= 2 * settings.marker_radius + 2:
            break
    else:
        raise ValueError(
            f"pathfinder.contour_length is {settings.contour_length}; expected two curves of so many paddles to fit "
            f"into {settings.image_size} x {settings.image_size} pixels; they did not in {MOST_ATTEMPTS} attempts"
        )
    for _ in range(settings.num_distractors):
        for _ in range(settings.distractor_retrials + 1):
            added = canvas.distractor(rng, field)
            if added is not None:
                curves.append(added[0])
                field = added[1]
                break
    paddles = [
        (curve, *_add(paddle.at, paddle.direction.ends[0]), *_add(paddle.at, paddle.direction.ends[1]))
        for curve, grown_paddles in enumerate(curves)
        for paddle in grown_paddles
    ]
    return Picture(
        image=_render(canvas, curves, [paddle.at for paddle in marked]),
        label=label,
        dots=np.array([origin, end]),
        tips=np.array([paddle.at for paddle in marked]) - pad,
        paddles=np.array(paddles) - np.array([0, pad, pad, pad, pad]),
        attempts=attempts,
    )


def _render(canvas: _Canvas, curves: list[list[_Paddle]], dots: list[Pair]) -> Array:
    """(image_size, image_size) uint8: the maximum of paddles and dots, the brightest of which is 255."""
    settings = canvas.settings
    bright = np.zeros((canvas.width, canvas.width))
    contrasts = [settings.target_contrast] * 2 + [settings.distractor_contrast] * (len(curves) - 2)
    stamps = [
        (paddle.at, contrast * paddle.direction.stamp.ink)
        for curve, contrast in zip(curves, contrasts, strict=True)
        for paddle in curve
    ]
    dot = dot_stamp(settings)
    for (y, x), values in [*stamps, *((at, dot) for at in dots)]:
        reach = len(values) // 2
        view = bright[y - reach : y + reach + 1, x - reach : x + reach + 1]
        np.maximum(view, values, out=view)
    pad = canvas.pieces.pad
    inner = bright[pad:-pad, pad:-pad]
    return np.asarray(inner * (255.0 / inner.max()) + 0.5, dtype=np.uint8)
