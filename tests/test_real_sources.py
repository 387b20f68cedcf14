"""The tasks from files on real data, found through the environment variable SPECTRAFORMER_DATA."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest

from spectraformer.tasks import image, retrieval, text
from task_sources import build, text_of

DATA = Path(os.environ.get("SPECTRAFORMER_DATA") or "absent")


def real(name: str) -> pytest.MarkDecorator:
    return pytest.mark.skipif(
        not (DATA / name).is_file(), reason=f"needs {name} in the folder that SPECTRAFORMER_DATA names"
    )


@real("imdb.parquet")
def test_real_reviews(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPECTRAFORMER_DATA", str(DATA))
    recipe = text.TASK.recipe("full", None, 0)
    assert recipe.label == "text"
    assert len(recipe.arguments["sha256"]["imdb.parquet"]) == 64
    columns, splits = build(recipe)
    assert {name: np.bincount(split.labels).tolist() for name, split in splits.items()} == {
        "train": [11_250, 11_250],
        "dev": [1250, 1250],
        "test": [12_500, 12_500],
        "published_train": [12_500, 12_500],
    }
    digest = columns["digest"]
    parts = {name: set(digest[split.rows[:, 0]].tolist()) for name, split in splits.items()}
    assert not parts["dev"] & (parts["train"] | parts["test"])
    # What the module says of duplicates.
    assert 25_000 - len(parts["published_train"]) == 96
    assert 25_000 - len(parts["test"]) == 199
    assert len(parts["published_train"] & parts["test"]) == 123
    assert np.isin(digest[25_000:], digest[:25_000]).sum() == 123
    assert columns["lengths"].max() == 4000
    assert text_of(columns["tokens"][0], columns["lengths"][0]).startswith(
        b"Story of a man who has unnatural feelings for a pig."
    )


@real("imdb.parquet")
def test_real_tiny_reviews(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPECTRAFORMER_DATA", str(DATA))
    columns, splits = build(text.TASK.recipe("tiny", None, 0))
    parts = {name: set(columns["digest"][split.rows[:, 0]].tolist()) for name, split in splits.items()}
    assert not parts["dev"] & (parts["train"] | parts["test"])
    assert [len(splits[name].labels) for name in ("train", "dev", "test")] == [1000, 200, 200]


@real("cifar10_jpeg.npz")
def test_real_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPECTRAFORMER_DATA", str(DATA))
    recipe = image.TASK.recipe("full", None, 0)
    assert recipe.label == "image (jpeg)"
    assert sum(len(block.rows) for block in recipe.blocks) == 60_000
    # The first blocks of train and of test are enough to see that numbers, labels and pixels meet.
    with np.load(DATA / "cifar10_gray_lossless_subset.npz", allow_pickle=False) as true:
        for block, name, first in ((recipe.blocks[0], "train", 0), (recipe.blocks[20], "test", 50_000)):
            decoded = recipe.build(block)["tokens"]
            numbers = true[f"idx_{name}"] + first
            held = (numbers >= block.rows[0]) & (numbers <= block.rows[-1])
            assert held.sum() > 100
            error = decoded[numbers[held] - block.rows[0]].astype(float) - true[f"x_{name}"][held]
            assert 32.5 < 10 * np.log10(255**2 / (error**2).mean()) < 34
            labels = image.open_corpus(None).labels
            np.testing.assert_array_equal(labels[numbers[held]], true[f"y_{name}"][held])


@pytest.mark.slow
@real("cifar10_jpeg.npz")
def test_all_real_pictures_divide_as_officially(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPECTRAFORMER_DATA", str(DATA))
    columns, splits = build(image.TASK.recipe("full", None, 0))
    assert {name: np.bincount(split.labels).tolist() for name, split in splits.items()} == {
        "train": [4500] * 10,
        "dev": [500] * 10,
        "test": [1000] * 10,
    }
    parts = {name: set(columns["digest"][split.rows[:, 0]].tolist()) for name, split in splits.items()}
    assert not parts["dev"] & (parts["train"] | parts["test"])


@real("retrieval_pairs.parquet")
def test_real_pairs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPECTRAFORMER_DATA", str(DATA))
    recipe = retrieval.TASK.recipe("full", None, 0)
    assert recipe.label == "retrieval (imdb-film)"
    splits = recipe.split({})
    assert {name: np.bincount(split.labels).tolist() for name, split in splits.items()} == {
        "train": [73_543, 73_543],
        "dev": [9045, 9045],
        "test": [8718, 8718],
    }
    documents = np.concatenate([np.asarray(block.rows) for block in recipe.blocks])
    assert len(documents) == len(np.unique(documents)) == 35_807
    assert documents[splits["train"].rows[:2]].tolist() == [[17159, 17160], [1443, 555]]
