"""Text: is a film review, read byte by byte, positive or negative?

IMDb (Maas et al., 2011, Learning Word Vectors for Sentiment Analysis): 25 000 + 25 000 reviews, balanced, HTML line
breaks kept. Token b + 1 stands for byte b of the UTF-8 form, as in the Long Range Arena (Tay et al., arXiv
2011.04006, whose ByteTextEncoder also reserves 0 for padding); the first 4000 bytes count.

The official release repeats itself: 96 training texts repeat an earlier one of train, 199 of test one of test, and 123
distinct texts, in 123 test reviews, are in train and test both (418 in all; the same when cut to 4000 bytes). They
stay where they are: results remain comparable. A dev text occurs nowhere else.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from spectraformer.checks import require_choice, require_integer
from spectraformer.config import TrainConfig
from spectraformer.tasks.base import SIZES, Array, Columns, Recipe, Split, Task, index_splits
from spectraformer.tasks.selection import (
    Corpus,
    build_texts,
    choose_rows,
    make_blocks,
    strict_splits,
)
from spectraformer.tasks.sources import (
    checked_table,
    describe_source,
    find_source,
    hub_table,
    parquet_table,
    parquet_texts,
    require_labels,
    require_splits,
    sha256_of,
    sha256_of_parts,
    stamp_of,
    table_texts,
    unknown_source,
)

HUB_NAME = "stanfordnlp/imdb"
EXPECTED = (
    "an aclImdb folder (train and test, each with pos and neg), a parquet file with columns split, label and text "
    f"(or a folder with imdb.parquet), or 'datasets' for {HUB_NAME} through the datasets package"
)
# Bytes kept, and padded length.
LENGTHS = {"full": (4000, 4096), "tiny": (256, 256)}
OFFICIAL = (25_000, 25_000)
KINDS = {"split": "text", "label": "integer", "text": "text"}
REVIEW_NAME = re.compile(r"(\d+)_(\d+)\.txt")


def make_recipe(size: str, source: str | None, seed: int) -> Recipe:
    """The recipe of the text task.

    Args:
        size: "full", or "tiny": the first 256 bytes of 1000 / 200 / 200 reviews.
        source: See :data:`EXPECTED`; None looks in the folder named by the environment.
        seed: Of which reviews are held out as dev and which are in the tiny size.

    Raises:
        ValueError: If there is no such source, or it does not hold what it should.
    """
    require_choice("size", size, SIZES)
    require_integer("seed", seed, least=0)
    corpus = open_corpus(source)
    rows, fraction = choose_rows(corpus, size, 2, seed)
    keep, length = LENGTHS[size]
    return Recipe(
        label="text" if corpus.counts == OFFICIAL else "text (custom)",
        source=describe_source(corpus.kind, corpus.sha256),
        arguments={
            "task": "text",
            "form": corpus.kind,
            "sha256": corpus.sha256,
            "seed": seed,
            "size": size,
            "bytes": keep,
        },
        length=length,
        vocab_size=512,
        num_classes=2,
        blocks=make_blocks(corpus.read, rows, corpus.name, keep, length),
        build=build_texts,
        split=partial(_split, labels=corpus.labels[rows], test=corpus.test[rows], fraction=fraction, seed=seed),
    )


def _split(columns: Columns, labels: Array, test: Array, fraction: float, seed: int) -> dict[str, Split]:
    """Also ``published_train``, with nothing held out: the published protocol selects on the test set."""
    whole = index_splits(labels, published_train=np.flatnonzero(~test))
    return strict_splits(columns, labels, test, fraction, seed) | whole


def open_corpus(source: str | None) -> Corpus:
    """The reviews of a source, in a form that it is recognised by.

    Raises:
        ValueError: If it is none of :data:`EXPECTED`.
    """
    if source == "datasets":
        return _hub()
    path = find_source(source, "text", EXPECTED)
    if path.is_file():
        return _parquet(path)
    if (path / "imdb.parquet").is_file():
        return _parquet(path / "imdb.parquet")
    for folder in (path, path / "aclImdb"):
        if (folder / "train").is_dir() and (folder / "test").is_dir():
            return _folder(folder)
    raise unknown_source(path, "text", EXPECTED)


def _parquet(path: Path) -> Corpus:
    stamp, kinds = stamp_of(path), tuple(KINDS.items())
    sha256 = {path.name: sha256_of(path)}
    table = parquet_table(path, stamp, kinds)
    return _from_table("parquet", sha256, table, lambda rows: partial(parquet_texts, path, stamp, kinds, rows))


def _from_table(
    kind: str, sha256: dict[str, str], table: Any, read: Callable[[Sequence[int]], Callable[[], list[bytes]]]
) -> Corpus:
    where = next(iter(sha256))
    labels = require_labels(where, np.asarray(table["label"]), 2)
    test = require_splits(where, table["split"].to_pylist(), ("train", "test")) == 1
    return Corpus(kind, sha256, labels, test, read)


def _folder(folder: Path) -> Corpus:
    """In the order of split, label and number, which is also that of the parquet file and of the hub."""
    names: list[str] = []
    labels: list[int] = []
    test: list[bool] = []
    for split in ("train", "test"):
        for label, sentiment in enumerate(("neg", "pos")):
            found = _reviews(folder, f"{split}/{sentiment}")
            names += found
            labels += [label] * len(found)
            test += [split == "test"] * len(found)
    digest = sha256_of_parts(part for name in names for part in (name.encode(), (folder / name).read_bytes()))
    return Corpus(
        "folder",
        {"aclImdb": digest},
        np.asarray(labels, np.uint8),
        np.asarray(test),
        lambda rows: partial(_folder_texts, folder, [names[row] for row in rows]),
    )


def _reviews(folder: Path, part: str) -> list[str]:
    """Names of the reviews of one split and label, by number."""
    if not (folder / part).is_dir():
        raise ValueError(f"{folder} has no folder {part}; expected {EXPECTED}")
    found = {path.name: REVIEW_NAME.fullmatch(path.name) for path in (folder / part).glob("*.txt")}
    wrong = sorted(name for name, match in found.items() if match is None)
    if wrong:
        raise ValueError(f"{folder / part} has a file {wrong[0]!r}; expected names such as 0_9.txt: number and rating")
    if not found:
        raise ValueError(f"{folder / part} has no .txt files; expected {EXPECTED}")
    numbers = {name: (int(match[1]), name) for name, match in found.items() if match is not None}
    return [f"{part}/{name}" for name in sorted(found, key=numbers.__getitem__)]


def _folder_texts(folder: Path, names: list[str]) -> list[bytes]:
    return [(folder / name).read_bytes() for name in names]


def _hub() -> Corpus:
    columns = ("label", "text")
    table = checked_table(hub_table(HUB_NAME, columns), HUB_NAME, KINDS)
    digest = sha256_of_parts([np.asarray(table["label"], np.int64).tobytes(), *table_texts(table, range(len(table)))])
    return _from_table("hub", {HUB_NAME: digest}, table, lambda rows: partial(_hub_texts, HUB_NAME, columns, rows))


def _hub_texts(name: str, columns: tuple[str, ...], rows: Sequence[int]) -> list[bytes]:
    return table_texts(hub_table(name, columns), rows)


TASK = Task(
    name="text",
    claim="sentiment of a film review, byte by byte",
    sources=EXPECTED,
    recipe=make_recipe,
    train={
        "full": TrainConfig(steps=50_000, batch_size=32, learning_rate=1e-4, warmup=80, eval_every=500),
        "tiny": TrainConfig(steps=600, batch_size=32, learning_rate=1e-3, warmup=60, eval_every=100),
    },
)
