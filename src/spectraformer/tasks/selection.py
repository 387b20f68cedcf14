"""From documents of a source to blocks, tokens, and seeded choices of which belong to which split."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from spectraformer.tasks.base import Array, Columns, Split, index_splits

# Documents a block: some 10 MB of tokens, well below a second to build.
BLOCK = 2500
# Of each class of the training examples, held out as dev.
DEV_FRACTION = 0.1
# Examples at size "tiny", all classes together.
TINY = {"train": 1000, "dev": 200, "test": 200}
# Token 0 is padding, so byte b is token b + 1. UTF-8 has no byte above this one, which leaves room in uint8.
LARGEST_BYTE = 0xF4


class Block(NamedTuple):
    """Some documents of a source, and how to read them.

    Picklable if ``read`` is: a ``functools.partial`` of a module-level function.
    """

    read: Callable[[], Any]
    rows: Sequence[int]  # their numbers in the source, for error messages
    where: str  # the source, likewise
    keep: int  # tokens kept of each at most
    length: int  # padded length


@dataclass(frozen=True)
class Corpus:
    """Labelled documents with an official division into train and test, and how to read them.

    Attributes:
        kind: The form of the source, one word.
        sha256: By name, the first that of the documents.
        labels: (n,) uint8.
        test: (n,) bool.
        read: From row numbers to a picklable function that reads them.
    """

    kind: str
    sha256: dict[str, str]
    labels: Array
    test: Array
    read: Callable[[Sequence[int]], Callable[[], Any]]

    @property
    def name(self) -> str:
        """The file, folder or package that holds the documents."""
        return next(iter(self.sha256))

    @property
    def counts(self) -> tuple[int, int]:
        """Examples of train and test."""
        return int((~self.test).sum()), int(self.test.sum())


def make_blocks(
    read: Callable[[Sequence[int]], Callable[[], Any]], rows: Sequence[int], where: str, keep: int, length: int
) -> list[Block]:
    """Blocks of at most :data:`BLOCK` rows, in their order; ``read`` maps row numbers to a picklable reader."""
    parts = [rows[start : start + BLOCK] for start in range(0, len(rows), BLOCK)]
    return [Block(read(part), part, where, keep, length) for part in parts]


def build_texts(block: Block) -> Columns:
    """Bytes as tokens: byte b is token b + 1, 0 is padding.

    Returns:
        ``tokens`` (n, length) uint8, ``lengths`` (n,) int32 and ``digest`` (n,) uint64, equal for equal tokens.

    Raises:
        ValueError: For an empty document, and for bytes that are not of UTF-8.
    """
    texts = [text[: block.keep] for text in block.read()]
    tokens = np.zeros((len(texts), block.length), np.uint8)
    for row, (number, text) in enumerate(zip(block.rows, texts, strict=True)):
        values = np.frombuffer(text, np.uint8)
        if not len(values):
            raise ValueError(f"document {number} of {block.where} is empty; expected text")
        if values.max() > LARGEST_BYTE:
            raise ValueError(f"document {number} of {block.where} has byte {values.max():#x}; expected UTF-8 text")
        tokens[row, : len(values)] = values + 1
    lengths = np.fromiter(map(len, texts), np.int32, len(texts))
    return {"tokens": tokens, "lengths": lengths, "digest": digest_rows(texts)}


def digest_rows(rows: Iterable[bytes]) -> Array:
    """64-bit hashes of byte strings, (n,) uint64."""
    parts = b"".join(hashlib.blake2b(row, digest_size=8).digest() for row in rows)
    return np.frombuffer(parts, "<u8").astype(np.uint64)


def shuffled(rows: Array, seed: int, purpose: str) -> Array:
    """Rows in a random order that depends on (seed, purpose) only, whatever numpy's default generator is."""
    sequence = np.random.SeedSequence((seed, *purpose.encode()))
    uniform = np.random.Generator(np.random.PCG64(sequence)).random(len(rows))
    ordered: Array = rows[np.argsort(uniform, kind="stable")]
    return ordered


def choose_balanced(name: str, rows: Array, labels: Array, num_classes: int, count: int, seed: int) -> Array:
    """A random choice with equally many rows of each class, in ascending order.

    Args:
        name: What the rows are; choices of another name are independent.
        rows: (n,) row numbers to choose from.
        labels: Class of every row number.
        num_classes: Classes.
        count: How many to choose, a multiple of ``num_classes``.
        seed: Of the choice.

    Raises:
        ValueError: If a class has too few.
    """
    each = count // num_classes
    chosen = []
    for label in range(num_classes):
        members = rows[labels[rows] == label]
        if len(members) < each:
            raise ValueError(f"{name} has {len(members)} examples of class {label}; expected at least {each}")
        chosen.append(shuffled(members, seed, f"{name} {label}")[:each])
    return np.sort(np.concatenate(chosen))


def choose_rows(corpus: Corpus, size: str, num_classes: int, seed: int) -> tuple[Sequence[int], float]:
    """Rows of a size, ascending, and which fraction of each class of train becomes dev.

    At full size all rows; at tiny size 1000 / 200 / 200 with equally many of each class.

    Raises:
        ValueError: If a class has too few.
    """
    if size != "tiny":
        return range(len(corpus.labels)), DEV_FRACTION
    held_in = TINY["train"] + TINY["dev"]
    chosen = [
        choose_balanced(name, np.flatnonzero(rows), corpus.labels, num_classes, count, seed)
        for name, rows, count in (("train", ~corpus.test, held_in), ("test", corpus.test, TINY["test"]))
    ]
    return np.sort(np.concatenate(chosen)).tolist(), TINY["dev"] / held_in


def strict_splits(columns: Columns, labels: Array, test: Array, fraction: float, seed: int) -> dict[str, Split]:
    """Train, dev and test, where dev is held out of train and shares no document with either.

    Dev has the same fraction of each class, drawn among documents that occur once in the whole table; so repeated
    documents all stay where they are, in train and test.

    Args:
        columns: Holds ``digest`` (n,), equal for equal documents.
        labels: (n,) uint8.
        test: (n,) bool, the official split.
        fraction: Of each class, in (0, 1).
        seed: Of the choice.

    Raises:
        ValueError: If a class has too few documents.
    """
    _, inverse, counts = np.unique(columns["digest"], return_inverse=True, return_counts=True)
    once = counts[inverse.reshape(-1)] == 1
    held = np.zeros(len(labels), bool)
    for label in np.unique(labels):
        members = ~test & (labels == label)
        wanted = round(fraction * int(members.sum()))
        candidates = np.flatnonzero(members & once)
        if not 0 < wanted <= len(candidates):
            raise ValueError(
                f"class {label} has {members.sum()} training examples, {len(candidates)} of them without a duplicate; "
                f"expected enough to hold out {fraction:.0%} as dev"
            )
        held[shuffled(candidates, seed, f"held out {label}")[:wanted]] = True
    return index_splits(
        labels, train=np.flatnonzero(~test & ~held), dev=np.flatnonzero(held), test=np.flatnonzero(test)
    )
