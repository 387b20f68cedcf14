"""Pathfinder tasks: recipes, splits, the released folders, and the page of examples."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from spectraformer.tasks import pathfinder, pathfinder_page
from spectraformer.tasks.pathfinder import EXAMPLES, SETTINGS, TASKS
from spectraformer.tasks.pathfinder_images import EASY, draw, label_of

# The tasks


@pytest.mark.parametrize("name", sorted(TASKS))
@pytest.mark.parametrize("size", ["full", "tiny"])
def test_recipes_promise_what_they_build(name: str, size: str) -> None:
    recipe = TASKS[name].recipe(size, None, 0)
    assert recipe.label == name
    assert recipe.length == {"tiny": 256, "full": 128**2 if name == "pathx" else 1024}[size]
    assert json.loads(json.dumps(recipe.arguments)) == recipe.arguments
    assert [block.start for block in recipe.blocks[1:]] == [block.stop for block in recipe.blocks[:-1]]
    total = sum(EXAMPLES[size])
    assert (recipe.blocks[0].start, recipe.blocks[-1].stop) == (0, total)
    columns = recipe.build(recipe.blocks[0]._replace(stop=4))
    assert columns["tokens"].shape == (4, recipe.length)
    assert columns["tokens"].dtype == np.uint8
    assert columns["lengths"].tolist() == [recipe.length] * 4
    assert columns["labels"].tolist() == (columns["dots"][:, 0] == columns["dots"][:, 1]).tolist()
    labels = np.array([label_of(0, index) for index in range(total)]) if size == "tiny" else np.arange(total) % 2
    splits = recipe.split({"labels": labels})
    assert [len(splits[split].labels) for split in ("train", "dev", "test")] == list(EXAMPLES[size])
    assert all(split.labels.mean() == 0.5 for split in splits.values())
    np.testing.assert_array_equal(np.concatenate([split.rows[:, 0] for split in splits.values()]), np.arange(total))
    assert TASKS[name].name == name
    assert TASKS[name].train[size].steps == {"full": 50_000, "tiny": 600}[size]


def test_sizes_and_seeds_that_are_none() -> None:
    with pytest.raises(ValueError, match=r"size is 'small'; expected one of full, tiny"):
        TASKS["pathfinder"].recipe("small", None, 0)
    with pytest.raises(ValueError, match="seed is -1; expected an integer of at least 0"):
        TASKS["pathfinder"].recipe("tiny", None, -1)
    with pytest.raises(ValueError, match="index is -1"):
        draw(EASY, 0, -1)


# Released folders


def released(folder: Path, rows: list[tuple[str, str, int]], *, empty: str = "") -> dict[str, np.ndarray]:
    """A folder in the released form: (folder below, file name, label) a row; metadata by folder."""
    rng = np.random.default_rng(0)
    images: dict[str, np.ndarray] = {}
    (folder / "metadata").mkdir(parents=True)
    for below, name, label in rows:
        path = folder / below / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if f"{below}/{name}" == empty:
            path.touch()
        else:
            images[f"{below}/{name}"] = rng.integers(0, 256, (32, 32), dtype=np.uint8)
            Image.fromarray(images[f"{below}/{name}"]).save(path)
        with (folder / "metadata" / f"{below.split('/')[-1]}.npy").open("a") as metadata:
            metadata.write(f"{below} {name} 0 {label} 1.0 14 4 2 0.5 1 1\n")
    return images


ROWS = [(f"imgs/{part}", f"sample_{number}.png", (number + part) % 2) for part in (2, 10) for number in range(8)]


def test_released_folder_is_read_without_its_empty_file(tmp_path: Path) -> None:
    folder = tmp_path / "pathfinder32" / "curv_contour_length_14"
    images = released(folder, ROWS, empty="imgs/2/sample_3.png")
    recipes = [TASKS["pathfinder"].recipe("full", str(path), 0) for path in (folder, folder.parent, tmp_path)]
    assert recipes[0].arguments == recipes[1].arguments == recipes[2].arguments
    recipe = recipes[0]
    assert recipe.label == "pathfinder (lra files)"
    assert recipe.source.endswith("left out as empty: imgs/2/sample_3.png")
    parts = [recipe.build(block) for block in recipe.blocks]
    columns = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    kept = [row for row in ROWS if row[:2] != ("imgs/2", "sample_3.png")]
    assert columns["labels"].tolist() == [label for *_, label in kept]
    for row, (below, name, _) in zip(columns["tokens"], kept, strict=True):
        np.testing.assert_array_equal(row, images[f"{below}/{name}"].reshape(-1))
    splits = recipe.split(columns)
    assert [len(splits[name].labels) for name in ("train", "dev", "test")] == [12, 1, 2]
    assert sorted(np.concatenate([split.rows[:, 0] for split in splits.values()])) == list(range(15))
    for split in splits.values():
        np.testing.assert_array_equal(split.labels, columns["labels"][split.rows[:, 0]])


def test_other_files_or_seed_are_other_arguments(tmp_path: Path) -> None:
    released(tmp_path / "one", ROWS)
    released(tmp_path / "two", [(below, name, 1 - label) for below, name, label in ROWS])
    arguments = [
        TASKS["pathfinder"].recipe("full", str(tmp_path / name), seed).arguments
        for name, seed in (("one", 0), ("two", 0), ("one", 1))
    ]
    assert len({json.dumps(item, sort_keys=True) for item in arguments}) == 3


def _drop_image(folder: Path) -> None:
    (folder / "imgs/2/sample_0.png").unlink()


def _drop_metadata(folder: Path) -> None:
    for path in (folder / "metadata").iterdir():
        path.unlink()


def _binary_metadata(folder: Path) -> None:
    np.save(folder / "metadata" / "2.npy", np.full((2, 4), 255, dtype=np.uint8))


def _bad_label(folder: Path) -> None:
    (folder / "metadata" / "2.npy").write_text("imgs/2 sample_0.png 0 7 1.0\n")


def _short_line(folder: Path) -> None:
    (folder / "metadata" / "2.npy").write_text("imgs/2 sample_0.png\n")


def _outside(folder: Path) -> None:
    (folder / "metadata" / "2.npy").write_text("../imgs/2 sample_0.png 0 1\n")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_drop_image, r"sample_0.png is missing; .*2.npy lists it"),
        (_drop_metadata, "fewer than 10 images"),
        (_binary_metadata, r"2.npy is no text; expected lines such as"),
        (_bad_label, r"2.npy, line 1: .*label of 0 or 1"),
        (_short_line, r"2.npy, line 1: 'imgs/2 sample_0.png'; expected a folder"),
        (_outside, r"2.npy, line 1"),
    ],
)
def test_damaged_folders(tmp_path: Path, damage: Any, message: str) -> None:
    released(tmp_path, ROWS)
    damage(tmp_path)
    with pytest.raises(ValueError, match=message):
        TASKS["pathfinder"].recipe("full", str(tmp_path), 0)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (Image.new("L", (30, 32)), r"shape \(32, 30\) and mode L; expected \(32, 32\) and mode L"),
        (Image.new("RGB", (32, 32)), r"shape \(32, 32, 3\) and mode RGB"),
        (Image.new("P", (32, 32)), r"shape \(32, 32\) and mode P"),
        (b"no image", "cannot be read as a PNG image"),
    ],
)
def test_damaged_images(tmp_path: Path, content: Any, message: str) -> None:
    released(tmp_path, ROWS)
    path = tmp_path / "imgs" / "2" / "sample_0.png"
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        content.save(path)
    recipe = TASKS["pathfinder"].recipe("full", str(tmp_path), 0)
    with pytest.raises(ValueError, match=message):
        recipe.build(recipe.blocks[0])


def test_truncated_image(tmp_path: Path) -> None:
    released(tmp_path, ROWS)
    path = tmp_path / "imgs" / "2" / "sample_0.png"
    path.write_bytes(path.read_bytes()[:200])
    recipe = TASKS["pathfinder"].recipe("full", str(tmp_path), 0)
    with pytest.raises(ValueError, match="cannot be read as a PNG image"):
        recipe.build(recipe.blocks[0])


def test_sources_that_are_no_such_folder(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="which does not exist; expected the folder curv_contour_length_9"):
        TASKS["pathfinder-intermediate"].recipe("full", str(tmp_path / "absent"), 0)
    with pytest.raises(ValueError, match="without metadata; expected the folder curv_baseline"):
        TASKS["pathfinder-easy"].recipe("full", str(tmp_path), 0)
    released(tmp_path / "curv_baseline", ROWS)
    with pytest.raises(ValueError, match="another level; expected the folder curv_contour_length_14"):
        TASKS["pathfinder"].recipe("full", str(tmp_path / "curv_baseline"), 0)
    with pytest.raises(ValueError, match="takes no source at size 'tiny'"):
        TASKS["pathfinder"].recipe("tiny", str(tmp_path), 0)


def test_page_of_examples(tmp_path: Path) -> None:
    path = tmp_path / "page.png"
    pathfinder_page.main(
        ["--out", str(path), "--task", "pathfinder-easy", "--size", "tiny", "--each", "2", "--scale", "2"]
    )
    with Image.open(path) as page:
        pixels = np.array(page)
    first = next(index for index in range(4) if label_of(0, index) == 1)
    expected = np.kron(draw(SETTINGS["pathfinder-easy"]["tiny"], 0, first).image, np.ones((2, 2), dtype=np.uint8))
    at = pathfinder_page.GAP, pathfinder_page.HEADING
    np.testing.assert_array_equal(pixels[at[1] : at[1] + 32, at[0] : at[0] + 32, 0], expected)
    assert (pixels == pathfinder_page.COLOURS[0]).all(axis=2).any()


def test_file_blocks_of_nothing_but_the_empty_file_are_left_out(tmp_path: Path) -> None:
    released(tmp_path, [*ROWS, ("imgs/11", "sample_0.png", 1)], empty="imgs/11/sample_0.png")
    assert len(TASKS["pathfinder"].recipe("full", str(tmp_path), 0).blocks) == 2


def test_source_of_pathx_is_the_larger_set() -> None:
    assert "pathfinder128" in TASKS["pathx"].sources
    assert pathfinder.VOCAB_SIZE["full"] == 512
