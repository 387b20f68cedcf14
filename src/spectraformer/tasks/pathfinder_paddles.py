"""The pieces that Pathfinder images are put together from: anti-aliased paddles, their masks, dots, and turns.

Everything here depends on integers only: a curve starts in one of 360 whole degrees and goes on to one of the pixels of
a small circle. So each paddle is drawn once and stamped from then on.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from spectraformer.checks import require_integer, require_number
from spectraformer.tasks.sources import require_package

Array = NDArray[Any]

Pair = tuple[int, int]  # rows, columns

LEAST_CLASH = math.ceil(1.8 * 255)  # two masks sum to this: anti-aliased edges may share a pixel, but no more
MOST_FREE = math.floor(0.3 * 255)  # a pixel of this mask is still free for a new curve


@dataclass(frozen=True, kw_only=True)
class Settings:
    """All numbers that decide a Pathfinder image; the defaults are those of LRA's hard 32 x 32 images.

    Attributes:
        image_size: Height and width, pixels.
        padding: Border no curve enters, pixels.
        antialias: Paddles and dots are drawn so many times larger, then reduced.
        seed_distance: Between the origins of the two target curves, pixels; the first lies twice that from the border.
        marker_radius: Of the dots, pixels.
        contour_length: Paddles of a target curve.
        distractor_length: Paddles of a distractor curve.
        num_distractors: Distractor curves wanted; those that find no place are left out.
        continuity: Higher is straighter: a turn of π / (2 · continuity) has probability 0.
        paddle_length: Pixels.
        paddle_thickness: Pixels; a multiple of 1 / antialias.
        margins: Half of the gap between paddles, pixels; one of them is drawn for each image.
        target_contrast: Brightness of target paddles, where that of dots is 1.
        distractor_contrast: Brightness of distractor paddles.
        paddle_retrials: Further draws of a paddle that would touch another curve.
        distractor_retrials: Further attempts at a distractor.

    Raises:
        ValueError: For numbers that no image can have.
    """

    image_size: int = 32
    padding: int = 1
    antialias: int = 2
    seed_distance: int = 7
    marker_radius: float = 1.5
    contour_length: int = 14
    distractor_length: int = 4
    num_distractors: int = 5
    continuity: float = 1.0
    paddle_length: int = 2
    paddle_thickness: float = 0.5
    margins: tuple[int, ...] = (1,)
    target_contrast: float = 1.5
    distractor_contrast: float = 2.0
    paddle_retrials: int = 2
    distractor_retrials: int = 4

    def __post_init__(self) -> None:
        for name in ("image_size", "padding", "antialias", "seed_distance", "distractor_length", "paddle_length"):
            require_integer(f"pathfinder.{name}", getattr(self, name))
        require_integer("pathfinder.contour_length", self.contour_length, least=2)
        for name in ("num_distractors", "paddle_retrials", "distractor_retrials"):
            require_integer(f"pathfinder.{name}", getattr(self, name), least=0)
        for name in ("marker_radius", "continuity", "paddle_thickness", "target_contrast", "distractor_contrast"):
            require_number(f"pathfinder.{name}", getattr(self, name), 0.0, math.inf, "a positive finite number")
        if not isinstance(self.margins, tuple) or not self.margins:
            raise ValueError(f"pathfinder.margins is {self.margins!r}; expected a tuple of integers such as (1,)")
        for margin in self.margins:
            require_integer("each of pathfinder.margins", margin)
        if not float(self.paddle_thickness * self.antialias).is_integer():
            raise ValueError(
                f"pathfinder.paddle_thickness is {self.paddle_thickness}; expected a multiple of 1/antialias = "
                f"1/{self.antialias}; nearest: {max(1, round(self.paddle_thickness * self.antialias)) / self.antialias}"
            )
        if 4 * self.seed_distance >= self.image_size:
            raise ValueError(
                f"pathfinder.seed_distance is {self.seed_distance}; expected less than a quarter of "
                f"image_size={self.image_size}, or no first origin fits; nearest: {(self.image_size - 1) // 4}"
            )


class Stamp(NamedTuple):
    """A paddle in one direction: square arrays centred where it is stamped, values 0 to 255."""

    ink: Array  # (side, side) uint8
    mask: Array  # (side, side) uint8: the paddle and its margin
    limit: Array  # (side, side) uint8: the fullest mask that leaves room for this one
    planes: Array  # (2, side + 2 margin, side + 2 margin) uint8: the mask, and the mask with another margin


class Direction(NamedTuple):
    """A paddle of one direction, and what follows from it."""

    stamp: Stamp
    ends: tuple[Pair, Pair]  # from where it is stamped to its ends, the one nearer to the curve's origin first
    step: Pair  # from its pivot to the next paddle's
    turn: Array  # (candidates,) float64: weights of the next paddle's directions


class Seed(NamedTuple):
    """A direction in which a curve may start; its paddle is stamped at the origin."""

    direction: Direction
    pivot: Pair  # from the origin to the pivot
    shape: tuple[Pair, ...]  # from the origin to the pixels that have to be free


class Pieces(NamedTuple):
    """All pieces for one margin."""

    reach: int  # stamps have side 2 reach + 1
    pad: int  # nothing that starts inside the image reaches further outside
    candidates: tuple[Pair, ...]  # from a pivot to where the next paddle may end
    nexts: tuple[Direction, ...]  # the paddle of each candidate, stamped at its far end
    seeds: tuple[Seed, ...]  # one a degree


@lru_cache(maxsize=16)
def make_pieces(settings: Settings, margin: int) -> Pieces:
    """Draws every paddle that an image with this margin can need (0.1 to 1 s)."""
    length = settings.paddle_length
    reach = length + math.ceil(settings.paddle_thickness) + margin
    radius = length + margin
    arc = np.arange(0.0, 2.0 * math.pi, 1.0 / radius)  # a pixel apart
    candidates = tuple(sorted({(_floor(radius * math.sin(a)), _floor(radius * math.cos(a))) for a in arc}))
    angles = np.arctan2(*np.array(candidates, dtype=np.float64).T)

    def direction(angle: float, drawn: float) -> Direction:
        turns = np.abs(angles - angle)
        turns = np.minimum(np.minimum(turns, 2.0 * math.pi - turns) * settings.continuity, 0.5 * math.pi)
        other = move(drawn, length)
        ends = ((0, 0), other) if drawn == angle else (other, (0, 0))
        return Direction(_stamp(settings, margin, drawn), ends, move(angle, length + 2 * margin), np.cos(turns) ** 2)

    def seed(angle: float) -> Seed:
        towards = direction(angle, angle)
        back = move(angle + math.pi, length + margin)
        end = towards.ends[1]
        # The original's shape lies one pixel further down and right, and is cut there: kept, as it decides how near
        # to other curves distractors start.
        full = np.argwhere(towards.stamp.mask == 255) - reach + 1
        shape = tuple((int(y), int(x)) for y, x in full if max(abs(y), abs(x)) <= radius)
        return Seed(towards, (end[0] + back[0], end[1] + back[1]), shape)

    return Pieces(
        reach=reach,
        pad=max(reach + 2 * margin + 1, dot_stamp(settings).shape[0] // 2),
        candidates=candidates,
        nexts=tuple(direction(float(a), float(a) - math.pi if a >= 0 else float(a) + math.pi) for a in angles),
        seeds=tuple(seed(math.radians(degree)) for degree in range(-180, 180)),
    )


@lru_cache(maxsize=16)
def dot_stamp(settings: Settings) -> Array:
    """A dot, (side, side) uint8, centred on its pixel."""
    scale = settings.antialias
    reach = math.ceil(settings.marker_radius) + 3  # three pixels of ringing
    offsets = np.arange((2 * reach + 1) * scale) - reach * scale
    disc = offsets[:, None] ** 2 + offsets[None, :] ** 2 <= (settings.marker_radius * scale) ** 2
    return _reduce(np.where(disc, np.uint8(255), np.uint8(0)), 2 * reach + 1)


def move(angle: float, distance: float) -> Pair:
    """The pixel at a distance in a direction, rounded up, as the original does."""
    return _ceil(distance * math.sin(angle)), _ceil(distance * math.cos(angle))


def _stamp(settings: Settings, margin: int, angle: float) -> Stamp:
    scale = settings.antialias
    reach = settings.paddle_length + math.ceil(settings.paddle_thickness) + margin
    centre = reach * scale
    rows, columns = move(angle, settings.paddle_length * scale)
    large = _pillow("Image").new("L", (2 * centre + 1, 2 * centre + 1))
    line = [(centre, centre), (centre + columns, centre + rows)]
    _pillow("ImageDraw").Draw(large).line(line, fill=255, width=round(settings.paddle_thickness * scale))
    drawn = np.array(large)
    side = 2 * reach + 1
    blown = margin * scale
    mask = _reduce(_dilate(drawn, blown)[blown:-blown, blown:-blown], side)
    limit = np.minimum(LEAST_CLASH - 1 - mask.astype(np.int64), 255).astype(np.uint8)
    return Stamp(_reduce(drawn, side), mask, limit, np.stack([np.pad(mask, margin), _dilate(mask, margin)]))


def _dilate(image: Array, radius: int) -> Array:
    """Maximum over a disc; the result is larger by the radius on every side."""
    height, width = image.shape
    out = np.zeros((height + 2 * radius, width + 2 * radius), dtype=image.dtype)
    for y in range(-radius, radius + 1):
        for x in range(-radius, radius + 1):
            if y * y + x * x <= radius * radius:
                view = out[radius + y : radius + y + height, radius + x : radius + x + width]
                np.maximum(view, image, out=view)
    return out


def _reduce(image: Array, side: int) -> Array:
    pillow = _pillow("Image")
    return np.array(pillow.fromarray(np.ascontiguousarray(image)).resize((side, side), pillow.Resampling.LANCZOS))


def _pillow(module: str) -> Any:
    return require_package(f"PIL.{module}", "drawing Pathfinder images")


# Multiples of a right angle give 1e-16 where 0 is meant.
def _ceil(value: float) -> int:
    return math.ceil(round(value, 9))


def _floor(value: float) -> int:
    return math.floor(round(value, 9))
