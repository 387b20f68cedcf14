"""Tasks from files: every accepted form gives exactly the tokens, labels and splits that its content says."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from spectraformer.tasks import image, retrieval, text
from spectraformer.tasks.image import grey_levels, mean_pool
from spectraformer.tasks.selection import choose_balanced, shuffled
from spectraformer.tasks.sources import hub_table
from task_sources import (
    AAN_LINES,
    PAIRS,
    REVIEWS,
    build,
    encode,
    offer_datasets,
    reviews,
    text_of,
    write_aan,
    write_binary_pictures,
    write_jpeg_pictures,
    write_pairs,
    write_pictures,
    write_review_folder,
    write_reviews,
)


@pytest.fixture(autouse=True)
def _no_default_source(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SPECTRAFORMER_DATA", raising=False)
    hub_table.cache_clear()


def review_tables() -> dict[str, pa.Table]:
    return {
        name: pa.table(
            {"text": [text for split, _, text in reviews() if split == name], "label": [0] * REVIEWS + [1] * REVIEWS}
        )
        for name in ("train", "test")
    }


@pytest.mark.parametrize("form", ["parquet", "folder with parquet", "aclImdb", "folder with aclImdb", "datasets"])
def test_every_form_of_reviews_gives_the_same_content(
    form: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = str(tmp_path)
    if form == "parquet":
        source = str(write_reviews(tmp_path / "any.parquet"))
    elif form == "folder with parquet":
        write_reviews(tmp_path / "imdb.parquet")
    elif form == "aclImdb":
        source = str(write_review_folder(tmp_path / "renamed"))
    elif form == "folder with aclImdb":
        write_review_folder(tmp_path / "aclImdb")
    else:
        source = "datasets"
        offer_datasets(monkeypatch, review_tables())
    recipe = text.TASK.recipe("full", source, 3)
    columns, splits = build(recipe)
    assert (recipe.label, recipe.length, recipe.vocab_size, recipe.num_classes) == ("text (custom)", 4096, 512, 2)
    assert str(tmp_path) not in recipe.source + str(recipe.arguments)
    assert recipe.arguments["seed"] == 3
    found = [text_of(*row).decode() for row in zip(columns["tokens"], columns["lengths"], strict=True)]
    assert found == [text for _, _, text in reviews()]
    names = ("train", "dev", "test", "published_train")
    assert [np.bincount(splits[name].labels).tolist() for name in names] == [[18, 18], [2, 2], [20, 20], [20, 20]]
    for name, (rows, labels) in splits.items():
        official = "test" if name == "test" else "train"
        assert [reviews()[row][:2] for row in rows[:, 0]] == [(official, label) for label in labels]
    assert splits["published_train"].rows[:, 0].tolist() == list(range(2 * REVIEWS))
    strict = np.concatenate([splits[name].rows[:, 0] for name in ("train", "dev", "test")])
    assert sorted(strict) == list(range(4 * REVIEWS))


def test_the_hash_of_a_folder_covers_names_and_content(tmp_path: Path) -> None:
    folder = write_review_folder(tmp_path / "aclImdb")
    digest = text.TASK.recipe("full", str(folder), 0).arguments["sha256"]
    file = folder / "test" / "pos" / "3_10.txt"
    content = file.read_bytes()
    file.write_bytes(content[:-1] + b"!")
    changed = text.TASK.recipe("full", str(folder), 0).arguments["sha256"]
    file.write_bytes(content)
    file.rename(file.with_name("3_9.txt"))
    renamed = text.TASK.recipe("full", str(folder), 0).arguments["sha256"]
    assert len({item["aclImdb"] for item in (digest, changed, renamed)}) == 3


def test_a_text_is_cut_at_4000_bytes_and_at_256(tmp_path: Path) -> None:
    rows = [(split, label, f"{number}".zfill(4) + "é" * 3000) for split, label, number in _many_reviews()]
    source = str(write_reviews(tmp_path / "long.parquet", rows))
    columns, _ = build(text.TASK.recipe("full", source, 0))
    assert columns["tokens"].shape == (len(rows), 4096)
    assert (columns["lengths"] == 4000).all()
    assert text_of(columns["tokens"][5], 4000) == rows[5][2].encode()[:4000]
    columns, splits = build(text.TASK.recipe("tiny", source, 0))
    assert columns["tokens"].shape == (1400, 256)
    assert (columns["lengths"] == 256).all()
    assert [np.bincount(splits[name].labels).tolist() for name in ("train", "dev", "test")] == [
        [500, 500],
        [100, 100],
        [100, 100],
    ]
    chosen = {text_of(tokens, 256)[:4] for tokens in columns["tokens"]}
    assert len(chosen) == 1400
    other, _ = build(text.TASK.recipe("tiny", source, 1))
    assert {text_of(tokens, 256)[:4] for tokens in other["tokens"]} != chosen


def _many_reviews() -> list[tuple[str, int, int]]:
    train = [("train", label, 700 * label + number) for label in (0, 1) for number in range(700)]
    return train + [("test", label, 1400 + 120 * label + number) for label in (0, 1) for number in range(120)]


def test_a_dev_text_occurs_nowhere_else(tmp_path: Path) -> None:
    repeated = [("train", label, f"train twice {label} {number}") for label in (0, 1) for number in range(30)] * 2
    leaked = [
        (split, label, f"leaked {label} {number}")
        for split in ("train", "test")
        for label in (0, 1)
        for number in range(30)
    ]
    source = str(write_reviews(tmp_path / "imdb.parquet", reviews() + repeated + leaked))
    for seed in range(3):
        columns, splits = build(text.TASK.recipe("full", source, seed))
        texts = [tokens.tobytes() for tokens in columns["tokens"]]
        counts = [texts.count(texts[row]) for row in splits["dev"].rows[:, 0]]
        assert counts == [1] * 22
        assert len(splits["test"].labels) == 2 * REVIEWS + 60


def picture_source(form: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[str, dict[str, np.ndarray]]:
    arrays = write_pictures(tmp_path / "cifar10.npz")
    if form == "npz":
        return str(tmp_path / "cifar10.npz"), arrays
    if form == "folder with npz":
        return str(tmp_path), arrays
    if form == "binary":
        return str(write_binary_pictures(tmp_path / "renamed", arrays)), arrays
    if form == "folder with binary":
        write_binary_pictures(tmp_path / "cifar-10-batches-bin", arrays)
        return str(tmp_path), arrays
    if form == "jpeg":
        write_jpeg_pictures(tmp_path / "cifar10_jpeg.npz", arrays)
        return str(tmp_path / "cifar10_jpeg.npz"), arrays
    tables = {}
    for name in ("train", "test"):
        files = [{"bytes": encode(picture, "PNG"), "path": None} for picture in arrays[f"x_{name}"]]
        tables[name] = pa.table({"img": files, "label": arrays[f"y_{name}"].astype(np.int64)})
    offer_datasets(monkeypatch, tables)
    return "datasets", arrays


@pytest.mark.parametrize("form", ["npz", "folder with npz", "binary", "folder with binary", "jpeg", "datasets"])
def test_every_form_of_pictures_gives_the_same_content(
    form: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, arrays = picture_source(form, tmp_path, monkeypatch)
    recipe = image.TASK.recipe("full", source, 0)
    columns, splits = build(recipe)
    expected = grey_levels(np.concatenate([arrays["x_train"], arrays["x_test"]])).reshape(120, 1024)
    assert recipe.label == ("image (jpeg) (custom)" if form == "jpeg" else "image (custom)")
    assert (recipe.length, recipe.vocab_size, recipe.num_classes) == (1024, 256, 10)
    assert columns["tokens"].dtype == np.uint8
    if form == "jpeg":
        error = columns["tokens"].astype(float) - expected
        assert np.sqrt((error**2).mean()) < 4
    else:
        np.testing.assert_array_equal(columns["tokens"], expected)
    assert (columns["lengths"] == 1024).all()
    labels = np.concatenate([arrays["y_train"], arrays["y_test"]])
    for rows, chosen in splits.values():
        np.testing.assert_array_equal(labels[rows[:, 0]], chosen)
    assert [np.bincount(splits[name].labels).tolist() for name in ("train", "dev", "test")] == [
        [9] * 10,
        [1] * 10,
        [2] * 10,
    ]
    strict = np.concatenate([split.rows[:, 0] for split in splits.values()])
    assert sorted(strict) == list(range(120))
    assert splits["test"].rows[:, 0].tolist() == list(range(100, 120))


def test_tiny_pictures_are_means_of_the_full_ones(tmp_path: Path) -> None:
    arrays = write_pictures(tmp_path / "p.npz", train=1300, test=200)
    recipe = image.TASK.recipe("tiny", str(tmp_path / "p.npz"), 0)
    columns, splits = build(recipe)
    assert columns["tokens"].shape == (1400, 256)
    grey = grey_levels(np.concatenate([arrays["x_train"], arrays["x_test"]])).astype(float)
    means = np.floor((grey[:, ::2, ::2] + grey[:, 1::2, ::2] + grey[:, ::2, 1::2] + grey[:, 1::2, 1::2]) / 4 + 0.5)
    numbers = {picture.tobytes(): row for row, picture in enumerate(means.astype(np.uint8))}
    rows = [numbers[tokens.tobytes()] for tokens in columns["tokens"]]
    assert rows == sorted(set(rows))
    labels = np.concatenate([arrays["y_train"], arrays["y_test"]])[rows]
    for name, each in (("train", 100), ("dev", 20), ("test", 20)):
        chosen = splits[name].rows[:, 0]
        np.testing.assert_array_equal(labels[chosen], splits[name].labels)
        assert np.bincount(splits[name].labels).tolist() == [each] * 10
        assert {rows[row] >= 1300 for row in chosen} == {name == "test"}


def test_the_mean_of_four_pixels_rounds_halves_up() -> None:
    blocks = np.array([[[0, 0], [0, 1]], [[0, 0], [1, 1]], [[255, 255], [255, 254]], [[9, 9], [9, 9]]], np.uint8)
    assert mean_pool(blocks).ravel().tolist() == [0, 1, 255, 9]


def test_grey_levels_are_those_of_tensorflow() -> None:
    colours = np.stack(np.meshgrid(*[np.arange(0, 256, 3)] * 3, indexing="ij"), axis=-1).reshape(-1, 3)
    # In whole numbers: (2989 R + 5870 G + 1140 B) / 10000 · 255.5 / 255. Float32 rounds a few across a level.
    exact = (colours @ np.array([2989, 5870, 1140])) * 511 // 5_100_000
    difference = grey_levels(colours.astype(np.uint8)).astype(int) - exact
    assert abs(difference).max() <= 1
    assert np.count_nonzero(difference) < 20
    extremes = [[0, 0, 0], [255, 255, 255], [255, 0, 0], [0, 255, 0], [0, 0, 255], [1, 1, 1]]
    assert grey_levels(np.array(extremes, np.uint8)).tolist() == [0, 255, 76, 149, 29, 1]


def test_aan_lines_become_pairs_of_the_texts_as_they_stand(tmp_path: Path) -> None:
    recipe = retrieval.TASK.recipe("full", str(write_aan(tmp_path / "lra")), 0)
    columns, splits = build(recipe)
    documents = [text_of(*row).decode() for row in zip(columns["tokens"], columns["lengths"], strict=True)]
    assert documents == ["b'alpha\\n'", "b'beta \"q'", "b'gamma'", "delta", "épsilon"]
    for split, file in (("train", "train"), ("dev", "eval"), ("test", "test")):
        fields = [line.split("\t") for line in AAN_LINES[file]]
        assert [[documents[row] for row in pair] for pair in splits[split].rows] == [line[3:] for line in fields]
        assert splits[split].labels.tolist() == [float(line[0]) for line in fields]
        assert splits[split].rows.dtype == np.int32
    assert (recipe.label, recipe.length, recipe.vocab_size) == ("retrieval (custom)", 4096, 512)
    assert retrieval.TASK.documents == 2


def test_aan_line_ends_and_long_texts(tmp_path: Path) -> None:
    lines = {
        "train": ["1\tA\tB\t" + "x" * 5000 + "\t" + "x" * 4000 + "y\r", "0\tA\tC\tw\tv"],
        "eval": ["0\tA\tB\ty\tz\r"],
        "test": ["0\tA\tB\tz\tw"],
    }
    columns, splits = build(retrieval.TASK.recipe("full", str(write_aan(tmp_path / "lra", lines)), 0))
    documents = [text_of(*row) for row in zip(columns["tokens"], columns["lengths"], strict=True)]
    assert documents == [b"x" * 4000, b"w", b"v", b"y", b"z"]
    assert [splits[name].rows.tolist() for name in ("train", "dev", "test")] == [[[0, 0], [1, 2]], [[3, 4]], [[4, 1]]]


def test_pairs_over_documents(tmp_path: Path) -> None:
    recipe = retrieval.TASK.recipe("full", str(write_pairs(tmp_path / "pairs")), 0)
    columns, splits = build(recipe)
    documents = [text_of(*row).decode() for row in zip(columns["tokens"], columns["lengths"], strict=True)]
    assert documents == [reviews()[row][2] for row in (0, 3, 7, 9, 12)]
    assert recipe.label == "retrieval (imdb-film) (custom)"
    for name, given in (("train", "train"), ("dev", "val"), ("test", "test")):
        chosen = [row for row in range(4) if PAIRS["split"][row] == given]
        expected = [[reviews()[PAIRS[column][row]][2] for column in ("doc1", "doc2")] for row in chosen]
        assert [[documents[row] for row in pair] for pair in splits[name].rows] == expected
        assert splits[name].labels.tolist() == [PAIRS["label"][row] for row in chosen]


def test_tiny_pairs_use_only_their_documents(tmp_path: Path) -> None:
    count = 1600
    rng = np.random.default_rng(0)
    folder = write_pairs(
        tmp_path,
        split=["train"] * 1100 + ["val"] * 250 + ["test"] * 250,
        label=[row % 2 for row in range(count)],
        doc1=rng.integers(0, 10, count),
        doc2=rng.integers(20, 30, count),
    )
    columns, splits = build(retrieval.TASK.recipe("tiny", str(folder), 0))
    assert columns["tokens"].shape == (20, 256)
    assert [np.bincount(splits[name].labels).tolist() for name in ("train", "dev", "test")] == [
        [500, 500],
        [100, 100],
        [100, 100],
    ]
    assert splits["train"].rows[:, 0].max() == 9
    assert splits["train"].rows[:, 1].min() == 10


def test_content_does_not_depend_on_the_order_of_blocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("spectraformer.tasks.selection.BLOCK", 7)
    write_pictures(tmp_path / "cifar10.npz")
    sources: list[tuple[Callable[..., object], str]] = [
        (text.make_recipe, str(write_reviews(tmp_path / "r.parquet"))),
        (image.make_recipe, str(tmp_path / "cifar10.npz")),
        (retrieval.make_recipe, str(write_aan(tmp_path / "lra"))),
        (retrieval.make_recipe, str(write_pairs(tmp_path / "pairs"))),
    ]
    for make_recipe, source in sources:
        recipe = make_recipe("full", source, 0)
        assert len(recipe.blocks) == -(-len(build(recipe)[0]["lengths"]) // 7)
        assert max(len(block.rows) for block in recipe.blocks) <= 7
        (columns, splits), (others, same) = build(recipe), build(make_recipe("full", source, 0), order=-1)
        for name, column in columns.items():
            np.testing.assert_array_equal(column, others[name])
        for name, split in splits.items():
            np.testing.assert_array_equal(split.rows, same[name].rows)


def test_the_seed_moves_dev_and_nothing_else(tmp_path: Path) -> None:
    source = str(write_reviews(tmp_path / "r.parquet"))
    (columns, one), (others, two) = (build(text.TASK.recipe("full", source, seed)) for seed in (0, 1))
    np.testing.assert_array_equal(columns["tokens"], others["tokens"])
    np.testing.assert_array_equal(one["test"].rows, two["test"].rows)
    assert one["dev"].rows.tolist() != two["dev"].rows.tolist()


def test_choices_are_uniform_and_pinned() -> None:
    # Pinned: another order would silently make other dev sets of the same seed.
    assert shuffled(np.arange(8), 0, "train 0").tolist() == [1, 4, 2, 5, 3, 7, 0, 6]
    labels = np.arange(40) % 2
    counts = np.zeros(40)
    for seed in range(1000):
        counts[choose_balanced("train", np.arange(40), labels, 2, 10, seed)] += 1
    # Each row is chosen with probability 1/4: standard deviation 13.7 of 1000.
    assert abs(counts - 250).max() < 5 * 13.7
