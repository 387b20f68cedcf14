"""Pathfinder images: labels that can be seen, the law of growth, its order, and what is refused."""

from __future__ import annotations

import math
import os
import random
import subprocess
import sys
import zlib
from collections import Counter
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from scipy import ndimage, stats

from spectraformer.tasks import pathfinder_images
from spectraformer.tasks.pathfinder import SETTINGS, Block, build_block
from spectraformer.tasks.pathfinder_images import EASY, HARD, INTERMEDIATE, PATHX, Picture, draw, label_of
from spectraformer.tasks.pathfinder_paddles import LEAST_CLASH, MOST_FREE, Settings, dot_stamp, make_pieces, move

LEVELS = {"hard": HARD, "intermediate": INTERMEDIATE, "easy": EASY}
TINY = SETTINGS["pathfinder"]["tiny"]
EIGHT = np.ones((3, 3))  # neighbours


@pytest.fixture(scope="module")
def pictures() -> dict[str, list[Picture]]:
    return {name: [draw(settings, 1, index) for index in range(48)] for name, settings in LEVELS.items()}


def everyone(pictures: dict[str, list[Picture]]) -> Iterable[tuple[Settings, Picture]]:
    return ((LEVELS[name], picture) for name, drawn in pictures.items() for picture in drawn)


# Labels


def test_labels_are_balanced_in_every_pair_but_do_not_follow_the_index() -> None:
    labels = np.array([label_of(3, index) for index in range(2000)]).reshape(-1, 2)
    assert (labels.sum(axis=1) == 1).all()
    assert 400 < labels[:, 0].sum() < 600


def test_each_dot_is_at_a_tip_of_its_curve_and_the_label_says_whether_the_curves_agree(
    pictures: dict[str, list[Picture]],
) -> None:
    seen = Counter()
    for _, picture in everyone(pictures):
        origins = {curve: picture.paddles[picture.paddles[:, 0] == curve][0, 1:3] for curve in (0, 1)}
        ends = {curve: picture.paddles[picture.paddles[:, 0] == curve][-1, 3:5] for curve in (0, 1)}
        first = [curve for curve in (0, 1) if (origins[curve] == picture.tips[0]).all()]
        second = [curve for curve in (0, 1) if (ends[curve] == picture.tips[1]).all()]
        assert first == [picture.dots[0]]
        assert second == [picture.dots[1]]
        assert picture.label == (first == second)
        seen[first[0], second[0]] += 1
    assert min(seen[pair] for pair in ((0, 0), (0, 1), (1, 0), (1, 1))) > 15


def target_pixels(picture: Picture, curve: int) -> np.ndarray:
    """(points, 2): points along the paddles of a curve."""
    ends = picture.paddles[picture.paddles[:, 0] == curve][:, 1:].astype(float)
    along = np.linspace(0, 1, 9)[:, None]
    return (ends[:, None, :2] * (1 - along) + ends[:, None, 2:] * along).reshape(-1, 2)


def test_label_can_be_read_off_the_image_where_curves_are_far_apart() -> None:
    """Without distractors, the gaps within a curve close before the curves meet; only the image is looked at then."""
    settings = replace(PATHX, num_distractors=0, contour_length=6, margins=(2,))
    labels = []
    for index in range(60):
        picture = draw(settings, 0, index)
        gap = np.linalg.norm(target_pixels(picture, 0)[:, None] - target_pixels(picture, 1), axis=2).min()
        if gap < 16:
            continue
        dots, count = ndimage.label(ndimage.binary_opening(picture.image > 100, np.ones((4, 4))))
        assert count == 2
        joined, _ = ndimage.label(ndimage.binary_dilation(picture.image > 100, EIGHT, iterations=4))
        parts = [set(joined[dots == dot]) for dot in (1, 2)]
        assert picture.label == (parts[0] == parts[1])
        labels.append(picture.label)
    assert len(labels) > 20
    assert 5 < sum(labels) < len(labels) - 5


# Pictures


def test_curves_have_their_numbers_of_paddles(pictures: dict[str, list[Picture]]) -> None:
    for settings, picture in everyone(pictures):
        lengths = Counter(picture.paddles[:, 0].tolist())
        assert sorted(lengths) == list(range(len(lengths)))
        assert [lengths.pop(0), lengths.pop(1)] == [settings.contour_length] * 2
        assert set(lengths.values()) <= {settings.distractor_length}
        assert len(lengths) <= settings.num_distractors


def test_published_numbers_of_distractors() -> None:
    for settings, paddles in ((HARD, 20), (INTERMEDIATE, 20), (EASY, 20), (PATHX, 35)):
        assert settings.distractor_length == settings.contour_length // 3
        assert settings.num_distractors == paddles // settings.distractor_length
        assert settings.image_size in (32, 128)


def test_ink_and_parts_are_in_ranges_found_by_looking(pictures: dict[str, list[Picture]]) -> None:
    """Ink is pixels above 64; parts are connected through edges and corners."""
    ranges = {"hard": (0.14, 0.21, 15, 24), "intermediate": (0.11, 0.16, 14, 21), "easy": (0.10, 0.15, 15, 23)}
    for name, (least, most, fewest_parts, most_parts) in ranges.items():
        images = [picture.image > 64 for picture in pictures[name]]
        assert all(least < image.mean() < most for image in images)
        assert fewest_parts < np.mean([ndimage.label(image, EIGHT)[1] for image in images]) < most_parts


def test_dashes_of_path_x_can_be_counted() -> None:
    """At 128 x 128 dashes are apart: two are hidden below dots, and a few touch."""
    for index in range(2):
        picture = draw(PATHX, 1, index)
        parts = ndimage.label(picture.image > 64, EIGHT)[1]
        assert len(picture.paddles) - 12 <= parts <= len(picture.paddles)
        assert 0.03 < (picture.image > 64).mean() < 0.05


def test_images_are_grey_bytes_up_to_white_with_two_separate_dots(pictures: dict[str, list[Picture]]) -> None:
    for settings, picture in everyone(pictures):
        image, size = picture.image, settings.image_size
        assert image.shape == (size, size)
        assert image.dtype == np.uint8
        assert image.max() == 255
        assert (image == 0).mean() > 0.2
        assert all(image[y, x] > 200 for y, x in picture.tips)
        assert math.dist(*picture.tips) >= 2 * settings.marker_radius + 2


@pytest.mark.parametrize("settings", [HARD, PATHX], ids=["hard", "pathx"])
def test_a_dot_is_a_disc_of_its_radius(settings: Settings) -> None:
    dot = dot_stamp(settings) / 255
    assert dot.sum() == pytest.approx(math.pi * settings.marker_radius**2, rel=0.06)
    assert dot[len(dot) // 2, len(dot) // 2] > 0.95
    rows, columns = np.nonzero(dot > 0.5)
    assert np.ptp(rows) + 1 == np.ptp(columns) + 1 == pytest.approx(2 * settings.marker_radius, abs=1)


def test_dots_wider_than_paddles_may_reach_over_the_border() -> None:
    settings = replace(EASY, marker_radius=8.0)
    for index in range(4):
        picture = draw(settings, 0, index)
        assert all(picture.image[y, x] > 200 for y, x in picture.tips)


@pytest.mark.parametrize("settings", [HARD, PATHX], ids=["hard", "pathx"])
def test_a_paddle_has_its_length_and_thickness(settings: Settings) -> None:
    """A line of (length s + 1) x (thickness s) pixels, drawn s times larger and reduced."""
    scale, margin = settings.antialias, settings.margins[0]
    pieces = make_pieces(settings, margin)
    ink = pieces.seeds[180].direction.stamp.ink / 255  # to the right
    side = 2 * pieces.reach + 1
    reduction = (2 * pieces.reach * scale + 1) / side
    area = (settings.paddle_length * scale + 1) * settings.paddle_thickness * scale / reduction**2
    assert ink.sum() == pytest.approx(area, rel=0.08)
    assert ink.sum(axis=0).argmax() >= pieces.reach
    assert ink.sum(axis=1).argmax() == pieces.reach


def test_brightness_is_relative_to_the_brightest_pixel() -> None:
    """Dots are white while paddles are darker, and darker than white once paddles are brighter than they."""
    faint, fainter, bright = (
        draw(replace(HARD, target_contrast=contrast, distractor_contrast=0.001), 0, 0) for contrast in (0.5, 0.25, 4.0)
    )
    away = np.ones((32, 32), dtype=bool)
    for y, x in faint.tips:
        away[max(y - 4, 0) : y + 5, max(x - 4, 0) : x + 5] = False
    y, x = faint.tips[0]
    assert fainter.image[y, x] == 255
    assert int(faint.image[away].max()) == pytest.approx(2 * int(fainter.image[away].max()), abs=2)
    assert 50 <= faint.image[away].max() <= 77  # half of 0.4 to 0.6: a line covers half a pixel
    assert bright.image[away].max() == 255
    assert 80 < bright.image[y - 1, x - 1] < 130  # of the dot, and not below its paddle


# Growth


def naive_paddles(settings: Settings, curves: list[Any], pad: int) -> list[np.ndarray]:
    """The mask of each curve as a whole image, from its paddles' masks."""
    width = settings.image_size + 2 * pad
    masks = []
    for curve in curves:
        mask = np.zeros((width, width), dtype=np.int64)
        for paddle in curve:
            stamp, (y, x) = paddle.direction.stamp.mask, paddle.at
            reach = len(stamp) // 2
            for row, column in np.ndindex(stamp.shape):
                at = y + row - reach, x + column - reach
                mask[at] = max(mask[at], stamp[row, column])
        masks.append(mask)
    return masks


@pytest.mark.parametrize("settings", [HARD, EASY, TINY], ids=["hard", "easy", "tiny"])
def test_targets_never_clash_and_the_field_holds_both(settings: Settings) -> None:
    canvas = pathfinder_images._canvas(settings, 1)
    rng = random.Random(0)
    pad = canvas.pieces.pad
    inner = slice(pad + 1, -pad - 1)
    disc = np.array([[0, 1, 0], [1, 1, 1], [0, 1, 0]], dtype=bool)
    found = 0
    while found < 12:
        grown = canvas.targets(rng)
        if grown is None:
            continue
        found += 1
        curves, field = grown
        one, two = naive_paddles(settings, curves, pad)
        assert (one + two).max() < LEAST_CLASH
        both = np.maximum(one, two)
        np.testing.assert_array_equal(field.planes[0][inner, inner], both[inner, inner])
        dilated = ndimage.grey_dilation(field.planes[0], footprint=disc)
        np.testing.assert_array_equal(field.planes[1][pad:-pad, pad:-pad], dilated[pad:-pad, pad:-pad])


@pytest.mark.parametrize(("continuity", "margin"), [(1.0, 1), (1.8, 2)])
def test_turns_have_the_published_law(continuity: float, margin: int) -> None:
    """Chi-square of 4000 next paddles on an empty image, and beside an obstacle, against the formula written out."""
    settings = replace(PATHX, continuity=continuity, margins=(margin,), padding=1)
    canvas = pathfinder_images._canvas(settings, margin)
    pad, radius = canvas.pieces.pad, settings.paddle_length + margin
    seed = canvas.pieces.seeds[180 + 20]
    first = canvas.start(seed, (64 + pad, 64 + pad))
    assert first is not None
    obstacle = canvas.start(canvas.pieces.seeds[180 + 90], (62 + pad, 82 + pad))
    assert obstacle is not None
    crowded = canvas.empty.copy()
    crowded.add(obstacle)
    angle = math.radians(20)
    pivot = np.add(first.pivot, [math.ceil((radius + margin) * f(angle)) for f in (math.sin, math.cos)])
    for field in (canvas.empty, crowded):
        law: dict[tuple[int, int], float] = {}
        for step in range(1000):
            bearing = step / radius
            if bearing >= 2 * math.pi:
                break
            end = (math.floor(pivot[0] + radius * math.sin(bearing)), math.floor(pivot[1] + radius * math.cos(bearing)))
            turn = abs(math.atan2(end[0] - pivot[0], end[1] - pivot[1]) - angle)
            turn = min(turn, 2 * math.pi - turn)
            free = 1 - field.planes[1][end] / 255
            law[end] = free * max(math.cos(min(continuity * turn, math.pi / 2)), 0.0) ** 2
        rng = random.Random(5)
        drawn = Counter()
        for _ in range(4000):
            paddle = canvas.extend(rng, first, canvas.empty if field is canvas.empty else _roomy(field), None)
            assert paddle is not None
            drawn[paddle.at] += 1
        ends = [end for end in law if law[end] > 0.005 * sum(law.values())]
        assert sum(drawn[end] for end in ends) > 3800
        expected = np.array([law[end] for end in ends])
        observed = np.array([drawn[end] for end in ends])
        assert stats.chisquare(observed, expected / expected.sum() * observed.sum()).pvalue > 1e-3


def _roomy(field: Any) -> Any:
    """The same weights, but no paddle is refused afterwards."""
    copied = field.copy()
    copied.mask[:] = 0
    return copied


def test_pivots_and_origins_are_a_margin_apart_from_paddles() -> None:
    """The next paddle's pivot lies a margin ahead of this one's end, and the first one's a margin behind its origin."""
    for settings in (HARD, PATHX):
        for margin in settings.margins:
            pieces = make_pieces(settings, margin)
            for degree, seed in zip(range(-180, 180), pieces.seeds, strict=True):
                towards = np.array([math.sin(math.radians(degree)), math.cos(math.radians(degree))])
                assert np.abs(np.array(seed.pivot) + margin * towards).max() < 2
                assert np.abs(np.array(seed.direction.ends[1]) - settings.paddle_length * towards).max() < 1
            for candidate, following in zip(pieces.candidates, pieces.nexts, strict=True):
                ahead = np.add(following.step, np.negative(candidate))
                towards = np.array(candidate) / np.linalg.norm(candidate)
                assert np.abs(ahead - margin * towards).max() < 2


def test_starts_are_free_in_the_shape_of_the_paddle() -> None:
    canvas = pathfinder_images._canvas(HARD, 1)
    rng = random.Random(3)
    grown = None
    while grown is None:
        grown = canvas.targets(rng)
    mask, pad = grown[1].mask, canvas.pieces.pad
    for degree in (0, 45, 180, 300):
        seed = canvas.pieces.seeds[degree]
        assert seed.shape
        expected = [
            32 * y + x
            for y, x in np.ndindex(32, 32)
            if all(mask[pad + y + dy, pad + x + dx] <= MOST_FREE for dy, dx in seed.shape)
        ]
        assert canvas.free(mask, seed).tolist() == expected


def test_moves_are_rounded_up_but_right_angles_are_exact() -> None:
    assert move(math.radians(30), 4) == (2, 4)
    assert move(math.pi, 4) == (0, -4)
    assert move(-math.pi / 2, 3) == (-3, 0)
    assert move(math.radians(200), 3) == (-1, -2)


# Order


def test_an_example_depends_on_nothing_but_seed_and_index() -> None:
    first = build_block(Block(HARD, 7, 0, 6))
    draw(EASY, 7, 3)
    second = build_block(Block(HARD, 7, 3, 6))
    for name, column in second.items():
        np.testing.assert_array_equal(first[name][3:], column)
    other = build_block(Block(HARD, 8, 3, 6))
    assert not (other["tokens"] == second["tokens"]).all(axis=1).any()


@pytest.mark.slow
def test_another_process_draws_the_same() -> None:
    program = (
        "import zlib; from spectraformer.tasks.pathfinder_images import EASY, draw;"
        "print(zlib.crc32(b''.join(draw(EASY, 0, index).image.tobytes() for index in range(5))))"
    )
    # Another hash seed: no order of a set or of names may matter.
    result = subprocess.run(
        [sys.executable, "-c", program],
        env={**os.environ, "PYTHONHASHSEED": "1"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert int(result.stdout) == zlib.crc32(b"".join(draw(EASY, 0, index).image.tobytes() for index in range(5)))


def test_images_are_distinct(pictures: dict[str, list[Picture]]) -> None:
    assert len({picture.image.tobytes() for _, picture in everyone(pictures)}) == 3 * 48


# Refusals


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"image_size": 0}, "image_size is 0; expected an integer of at least 1"),
        ({"padding": 0}, "padding is 0"),
        ({"antialias": 1.5}, "antialias is 1.5"),
        ({"contour_length": 1}, "contour_length is 1; expected an integer of at least 2"),
        ({"distractor_length": 0}, "distractor_length is 0"),
        ({"num_distractors": -1}, "num_distractors is -1; expected an integer of at least 0"),
        ({"paddle_length": True}, "paddle_length is True"),
        ({"paddle_retrials": -1}, "paddle_retrials is -1"),
        ({"distractor_retrials": -1}, "distractor_retrials is -1"),
        ({"marker_radius": 0.0}, "marker_radius is 0.0; expected a positive finite number"),
        ({"continuity": math.nan}, "continuity is nan"),
        ({"target_contrast": -1.0}, "target_contrast is -1.0"),
        ({"distractor_contrast": math.inf}, "distractor_contrast is inf"),
        ({"paddle_thickness": 0.7}, r"paddle_thickness is 0.7; expected a multiple of .* nearest: 0.5"),
        ({"margins": ()}, r"margins is \(\); expected a tuple of integers"),
        ({"margins": [1]}, r"margins is \[1\]; expected a tuple"),
        ({"margins": (1, 0)}, "each of pathfinder.margins is 0"),
        ({"seed_distance": 8}, r"seed_distance is 8; expected less than a quarter of image_size=32.* nearest: 7"),
    ],
)
def test_settings_that_no_image_can_have(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(HARD, **changes)


def test_curves_that_do_not_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pathfinder_images, "MOST_ATTEMPTS", 20)
    with pytest.raises(ValueError, match=r"contour_length is 60; expected two curves .* 16 x 16"):
        draw(replace(TINY, contour_length=60), 0, 0)
