"""Retrieval: do two documents, read byte by byte, belong together?

The Long Range Arena (Tay et al., arXiv 2011.04006) asks whether one paper of the ACL Anthology Network cites the
other: 147 086 / 18 090 / 17 437 pairs. Its files, which cannot be redistributed, hold one pair a line: label, two ids
and two texts, divided by tabs. As in its own input pipeline quotes have no meaning and the texts are taken as they
stand: escapes of two characters, and the b'…' around a text where a file has it, are part of what published results
saw. Ids are not used; documents with equal first 4000 bytes are one.

Pairs over a table of documents take the same form: with IMDb (Maas et al., 2011), whether two reviews are of one film.
That is another task, and is labelled so.

The prepared table holds each document once, however many pairs it is in. Bytes become tokens as in
:mod:`spectraformer.tasks.text`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path

import numpy as np

from spectraformer.checks import require_choice, require_integer
from spectraformer.config import TrainConfig
from spectraformer.tasks.base import SIZES, SPLITS, Array, Columns, Recipe, Split, Task
from spectraformer.tasks.selection import TINY, build_texts, choose_balanced, make_blocks
from spectraformer.tasks.sources import (
    Stamp,
    describe_source,
    find_source,
    parquet_table,
    parquet_texts,
    read_parquet,
    require_labels,
    require_splits,
    require_unchanged,
    sha256_of,
    stamp_of,
    unknown_source,
)

EXPECTED = (
    "a folder with LRA's new_aan_pairs.train.tsv, new_aan_pairs.eval.tsv and new_aan_pairs.test.tsv, or with "
    "retrieval_pairs.parquet (columns split, label, doc1, doc2) and imdb.parquet (column text) that its rows are of"
)
AAN_FILES = tuple(f"new_aan_pairs.{name}.tsv" for name in ("train", "eval", "test"))
AAN_COLUMNS = ("label", "id1", "id2", "text1", "text2")
AAN_LABELS = {b"0": 0, b"0.0": 0, b"1": 1, b"1.0": 1}
PAIRS = "retrieval_pairs.parquet"
DOCUMENTS = "imdb.parquet"
PAIR_KINDS = {"split": "text", "label": "integer", "doc1": "integer", "doc2": "integer"}
# Bytes kept, and padded length.
LENGTHS = {"full": (4000, 4096), "tiny": (256, 256)}
OFFICIAL = {"retrieval": (147_086, 18_090, 17_437), "retrieval (imdb-film)": (147_086, 18_090, 17_436)}


@dataclass(frozen=True)
class Pairs:
    """Labelled pairs and how to read their documents.

    Attributes:
        label: What tables call the data.
        sha256: By file name, the first that of the documents.
        splits: Of train, dev and test; rows (n, 2) are document numbers of the source.
        read: From document numbers to a picklable function that returns their bytes.
    """

    label: str
    sha256: dict[str, str]
    splits: dict[str, Split]
    read: Callable[[Sequence[int]], Callable[[], list[bytes]]]


def make_recipe(size: str, source: str | None, seed: int) -> Recipe:
    """The recipe of the retrieval task.

    Args:
        size: "full", or "tiny": 1000 / 200 / 200 pairs, balanced, of the first 256 bytes of their documents.
        source: See :data:`EXPECTED`; None looks in the folder named by the environment.
        seed: Of which pairs are in the tiny size.

    Raises:
        ValueError: If there is no such source, or it does not hold what it should.
    """
    require_choice("size", size, SIZES)
    require_integer("seed", seed, least=0)
    pairs = open_pairs(source)
    splits = pairs.splits
    counts = tuple(len(splits[name].labels) for name in SPLITS)
    if size == "tiny":
        splits = {name: _choose(name, split, seed) for name, split in splits.items()}
    documents, splits = _renumber(splits)
    keep, length = LENGTHS[size]
    return Recipe(
        label=pairs.label if counts == OFFICIAL[pairs.label] else f"{pairs.label} (custom)",
        source=describe_source("document pairs", pairs.sha256),
        arguments={"task": "retrieval", "sha256": pairs.sha256, "seed": seed, "size": size, "bytes": keep},
        length=length,
        vocab_size=512,
        num_classes=2,
        blocks=make_blocks(pairs.read, documents, next(iter(pairs.sha256)), keep, length),
        build=build_texts,
        split=partial(_as_given, splits=splits),
    )


def _choose(name: str, split: Split, seed: int) -> Split:
    chosen = choose_balanced(name, np.arange(len(split.labels)), split.labels, 2, TINY[name], seed)
    return Split(split.rows[chosen], split.labels[chosen])


def _renumber(splits: dict[str, Split]) -> tuple[list[int], dict[str, Split]]:
    """The documents in use, ascending, and the splits with rows into these."""
    documents = np.unique(np.concatenate([split.rows.reshape(-1) for split in splits.values()]))
    renumbered = {
        name: Split(np.searchsorted(documents, rows).astype(np.int32), labels)
        for name, (rows, labels) in splits.items()
    }
    return documents.tolist(), renumbered


def _as_given(columns: Columns, splits: dict[str, Split]) -> dict[str, Split]:
    return splits


def open_pairs(source: str | None) -> Pairs:
    """The pairs of a source, in a form that it is recognised by.

    Raises:
        ValueError: If it is none of :data:`EXPECTED`.
    """
    folder = find_source(source, "retrieval", EXPECTED)
    if any((folder / name).is_file() for name in AAN_FILES):
        return _aan(folder)
    if (folder / PAIRS).is_file():
        return _document_pairs(folder)
    raise unknown_source(folder, "retrieval", EXPECTED)


def _document_pairs(folder: Path) -> Pairs:
    path = folder / DOCUMENTS
    sha256 = {name: sha256_of(folder / name) for name in (DOCUMENTS, PAIRS)}
    stamp, kinds = stamp_of(path), (("text", "text"),)
    count = len(parquet_table(path, stamp, kinds))
    table = read_parquet(folder / PAIRS, PAIR_KINDS)
    labels = require_labels(PAIRS, np.asarray(table["label"]), 2)
    numbers = require_splits(PAIRS, table["split"].to_pylist(), ("train", "val", "test"))
    rows = np.stack([np.asarray(table[name]).astype(np.int64) for name in ("doc1", "doc2")], axis=1)
    wrong = np.flatnonzero(((rows < 0) | (rows >= count)).any(axis=1))
    if len(wrong):
        raise ValueError(
            f"row {wrong[0]} of {PAIRS} names documents {rows[wrong[0]].tolist()}; expected rows of {DOCUMENTS}, "
            f"0 to {count - 1}"
        )
    splits = {name: Split(rows[numbers == number], labels[numbers == number]) for number, name in enumerate(SPLITS)}
    return Pairs("retrieval (imdb-film)", sha256, splits, lambda rows: partial(parquet_texts, path, stamp, kinds, rows))


def _aan(folder: Path) -> Pairs:
    paths = tuple(folder / name for name in AAN_FILES)
    for path in paths:
        if not path.is_file():
            raise ValueError(f"{folder} has no {path.name}; expected {EXPECTED}")
    stamps = tuple(map(stamp_of, paths))
    sha256, splits, places = _index_aan(paths, stamps)
    return Pairs("retrieval", sha256, splits, lambda rows: partial(_aan_texts, paths, stamps, places[list(rows)]))


@lru_cache(maxsize=1)
def _index_aan(paths: tuple[Path, ...], stamps: tuple[Stamp, ...]) -> tuple[dict[str, str], dict[str, Split], Array]:
    """One pass over the files, which are too large to hold.

    Returns:
        sha256 of each file, the splits, and where each distinct document stands: (documents, 3) int64 of file number,
        offset and bytes. Documents are the same if the bytes that can become tokens are.
    """
    numbers: dict[bytes, int] = {}
    places: list[tuple[int, int, int]] = []
    sha256, splits = {}, {}
    for file_number, (split, path) in enumerate(zip(SPLITS, paths, strict=True)):
        digest, offset = hashlib.sha256(), 0
        rows: list[list[int]] = []
        labels: list[int] = []
        with path.open("rb") as file:
            for line_number, line in enumerate(file, 1):
                digest.update(line)
                label, texts = _parse_line(line, f"line {line_number} of {path.name}")
                labels.append(label)
                rows.append([])
                start = offset + len(line.rstrip(b"\r\n")) - len(texts[0]) - len(texts[1]) - 1
                for text, at in zip(texts, (start, start + len(texts[0]) + 1), strict=True):
                    kept = text[: LENGTHS["full"][0]]
                    key = hashlib.blake2b(kept, digest_size=16).digest()
                    if key not in numbers:
                        numbers[key] = len(places)
                        places.append((file_number, at, len(kept)))
                    rows[-1].append(numbers[key])
                offset += len(line)
        if not labels:
            raise ValueError(f"{path} is empty; expected lines of {', '.join(AAN_COLUMNS)}, divided by tabs")
        sha256[path.name] = digest.hexdigest()
        splits[split] = Split(np.asarray(rows, np.int64), np.asarray(labels, np.uint8))
    for path, stamp in zip(paths, stamps, strict=True):
        require_unchanged(path, stamp)
    return sha256, splits, np.asarray(places, np.int64)


def _parse_line(line: bytes, where: str) -> tuple[int, list[bytes]]:
    fields = line.rstrip(b"\r\n").split(b"\t")
    if len(fields) != len(AAN_COLUMNS):
        hint = " (a file of ids only does not hold the texts)" if len(fields) == 3 else ""
        raise ValueError(f"{where} has {len(fields)} fields divided by tabs; expected {', '.join(AAN_COLUMNS)}{hint}")
    if fields[0] not in AAN_LABELS:
        shown = fields[0][:20].decode(errors="replace")
        raise ValueError(f"{where} has label {shown!r}; expected one of {', '.join(map(bytes.decode, AAN_LABELS))}")
    if not fields[3] or not fields[4]:
        raise ValueError(f"{where} has an empty text; expected two documents")
    return AAN_LABELS[fields[0]], fields[3:]


def _aan_texts(paths: Sequence[Path], stamps: Sequence[Stamp], places: Array) -> list[bytes]:
    texts = [b""] * len(places)
    for number, (path, stamp) in enumerate(zip(paths, stamps, strict=True)):
        require_unchanged(path, stamp)
        with path.open("rb") as file:
            for row in np.flatnonzero(places[:, 0] == number):
                file.seek(int(places[row, 1]))
                texts[row] = file.read(int(places[row, 2]))
    return texts


TASK = Task(
    name="retrieval",
    claim="whether two documents belong together, byte by byte",
    sources=EXPECTED,
    recipe=make_recipe,
    documents=2,
    train={
        "full": TrainConfig(steps=50_000, batch_size=16, learning_rate=2e-4, warmup=800, eval_every=1000),
        "tiny": TrainConfig(steps=600, batch_size=32, learning_rate=1e-3, warmup=60, eval_every=100),
    },
)
