"""Small made-up sources in every accepted form, for the tests of the tasks that read files."""

from __future__ import annotations

import io
import pickle
import sys
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from spectraformer.tasks import image, retrieval, text
from spectraformer.tasks.base import Recipe, Split

TASKS = {"text": text.TASK, "image": image.TASK, "retrieval": retrieval.TASK}
REVIEWS = 20  # of each label and split


def review(split: str, label: int, number: int) -> str:
    return f"{split} {label} review {number} — naïve"


def reviews() -> list[tuple[str, int, str]]:
    return [
        (split, label, review(split, label, number))
        for split in ("train", "test")
        for label in (0, 1)
        for number in range(REVIEWS)
    ]


def write_reviews(path: Path, rows: list[tuple[str, int, str]] | None = None) -> Path:
    splits, labels, texts = zip(*(rows or reviews()), strict=True)
    pq.write_table(
        pa.table({"split": splits, "label": pa.array(labels, pa.int8()), "text": texts, "other": labels}), path
    )
    return path


def write_review_folder(folder: Path) -> Path:
    for split in ("train", "test"):
        for label, name in enumerate(("neg", "pos")):
            (folder / split / name).mkdir(parents=True)
            for number in reversed(range(REVIEWS)):
                text = review(split, label, number)
                (folder / split / name / f"{number}_{1 + 9 * label}.txt").write_bytes(text.encode())
    return folder


def pictures(count: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Smooth colour pictures (count, 32, 32, 3), which JPEG keeps nearly as they are, and balanced labels."""
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 256, (count, 4, 4, 3), np.uint8)
    smooth = [np.asarray(Image.fromarray(picture).resize((32, 32), Image.Resampling.BILINEAR)) for picture in coarse]
    return np.stack(smooth), np.arange(count, dtype=np.uint8) % 10


def write_pictures(path: Path, train: int = 100, test: int = 20) -> dict[str, np.ndarray]:
    x_train, y_train = pictures(train, 1)
    x_test, y_test = pictures(test, 2)
    arrays = {"x_train": x_train, "y_train": y_train, "x_test": x_test, "y_test": y_test}
    np.savez(path, **arrays)
    return arrays


def encode(picture: np.ndarray, kind: str) -> bytes:
    file = io.BytesIO()
    Image.fromarray(picture).save(file, kind)
    return file.getvalue()


def write_jpeg_pictures(path: Path, arrays: Mapping[str, np.ndarray], **changes: Any) -> None:
    files = [encode(picture, "JPEG") for name in ("x_train", "x_test") for picture in arrays[name]]
    header = files[0][: files[0].index(b"\xff\xda")]
    streams = [file.removeprefix(header).removesuffix(b"\xff\xd9") for file in files]
    assert all(file == header + stream + b"\xff\xd9" for file, stream in zip(files, streams, strict=True))
    content = {
        "header": np.frombuffer(header, np.uint8),
        "streams": np.frombuffer(b"".join(streams), np.uint8),
        "offsets": np.cumsum([0, *map(len, streams)]),
        "y_train": arrays["y_train"],
        "y_test": arrays["y_test"],
    }
    np.savez(path, **(content | changes))


def write_binary_pictures(folder: Path, arrays: Mapping[str, np.ndarray]) -> Path:
    folder.mkdir(parents=True)

    def records(x: np.ndarray, y: np.ndarray) -> bytes:
        planes = x.transpose(0, 3, 1, 2).reshape(len(x), -1)
        return np.concatenate([y[:, None], planes], axis=1).astype(np.uint8).tobytes()

    batches = zip(np.array_split(arrays["x_train"], 5), np.array_split(arrays["y_train"], 5), strict=True)
    for number, (x, y) in enumerate(batches, 1):
        (folder / f"data_batch_{number}.bin").write_bytes(records(x, y))
    (folder / "test_batch.bin").write_bytes(records(arrays["x_test"], arrays["y_test"]))
    return folder


AAN_LINES = {
    "train": ["1.0\tA\tB\tb'alpha\\n'\tb'beta \"q'", "0.0\tC\tA\tb'gamma'\tb'alpha\\n'"],
    "eval": ["0\tB\tD\tb'beta \"q'\tdelta"],
    "test": ["1\tE\tC\tépsilon\tb'gamma'"],
}


def write_aan(folder: Path, lines: Mapping[str, list[str]] = AAN_LINES) -> Path:
    folder.mkdir()
    for name, rows in lines.items():
        (folder / f"new_aan_pairs.{name}.tsv").write_bytes("".join(row + "\n" for row in rows).encode())
    return folder


PAIRS = {"split": ["train", "val", "train", "test"], "label": [1, 0, 0, 1], "doc1": [7, 3, 0, 7], "doc2": [3, 9, 7, 12]}


def write_pairs(folder: Path, **changes: Any) -> Path:
    folder.mkdir(exist_ok=True)
    write_reviews(folder / "imdb.parquet")
    pq.write_table(pa.table(PAIRS | changes), folder / "retrieval_pairs.parquet")
    return folder


def offer_datasets(monkeypatch: pytest.MonkeyPatch, tables: Mapping[str, pa.Table]) -> None:
    """A stand-in for the datasets package, with what is used of it."""

    def load_dataset(name: str, split: str) -> Any:
        formats = {"arrow": _Sliced(tables[split])}
        return SimpleNamespace(with_format=formats.__getitem__)

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))


class _Sliced:
    def __init__(self, table: pa.Table) -> None:
        self.table = table

    def __getitem__(self, index: slice) -> pa.Table:
        assert index == slice(None)
        return self.table


def build(recipe: Recipe, order: int = 1) -> tuple[dict[str, np.ndarray], Mapping[str, Split]]:
    """Columns and splits, from blocks that went through a pickle, as for another process, built in either order."""
    blocks = [pickle.loads(pickle.dumps(block)) for block in recipe.blocks]
    built = [recipe.build(block) for block in blocks[::order]][::order]
    columns = {name: np.concatenate([part[name] for part in built]) for name in built[0]}
    return columns, recipe.split({name: column for name, column in columns.items() if name != "tokens"})


def text_of(tokens: np.ndarray, length: int) -> bytes:
    assert not tokens[length:].any()
    return bytes(tokens[:length] - 1)


def refused(task: str, source: str | None, size: str = "full") -> str:
    """What is said when a source is prepared."""
    with pytest.raises(ValueError) as caught:
        build(TASKS[task].recipe(size, source, 0))
    return str(caught.value)
