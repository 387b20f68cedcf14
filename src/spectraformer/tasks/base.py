"""What a task is: a recipe for arrays, and how it is trained by default.

Prepared data is one table of documents and, for each split, which documents form an example:

- ``tokens`` (documents, length) uint8, padded with 0 behind ``lengths`` (documents,) int32;
- ``rows`` (examples, documents an example) int32 into that table, ``labels`` (examples,) uint8.

A task of single documents has one row number an example; retrieval has two.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from spectraformer.config import ModelConfig, TrainConfig

SIZES = ("full", "tiny")
SPLITS = ("train", "dev", "test")

Array = NDArray[Any]
Columns = Mapping[str, Array]


class Split(NamedTuple):
    """Examples of one split: which documents, and the class."""

    rows: Array  # (examples, documents an example) int32
    labels: Array  # (examples,) uint8


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How one task is made at one size from one source.

    The content is a pure function of the recipe: blocks may be built in any order, by any number of processes, and
    again after an interruption.

    Attributes:
        label: What records and tables call this data; it names a source that differs from the official one.
        source: Where the content comes from, in words.
        arguments: All that decides the content, JSON values only; prepared blocks are reused only if equal.
        length: Padded length, tokens.
        vocab_size: Tokens are below it.
        num_classes: Labels are below it.
        blocks: One picklable description a block; each builds in seconds.
        build: Module-level function from a block to columns: ``tokens`` (n, length) uint8 padded with 0, ``lengths``
            (n,) int32, and any more of n rows each, such as ``labels``.
        split: Function from all columns but ``tokens``, blocks concatenated in order, to train, dev and test.
        distinct: Refill duplicates: function from (row number, attempt from 1 on) to the columns of one replacement
            row, (1, ...) each; None keeps duplicates. Of equal documents the first stays.
    """

    label: str
    source: str
    arguments: Mapping[str, Any]
    length: int
    vocab_size: int
    num_classes: int
    blocks: Sequence[Any]
    build: Callable[[Any], Columns]
    split: Callable[[Columns], Mapping[str, Split]]
    distinct: Callable[[int, int], Columns] | None = None


class MakeRecipe(Protocol):
    """From a size and a source (None: the default one) to a recipe."""

    def __call__(self, size: str, source: str | None, seed: int) -> Recipe: ...


@dataclass(frozen=True, kw_only=True)
class Task:
    """One task of the benchmark.

    Attributes:
        name: In the CLI and in folder names.
        claim: What it asks of a model, in one line.
        sources: What ``--source`` accepts, in words.
        recipe: Makes the recipe of a size and source.
        train: Default training, by size.
        documents: Documents an example, 1 or 2.
        model: Default model, by size; the paper's encoder where absent.
    """

    name: str
    claim: str
    sources: str
    recipe: MakeRecipe
    train: Mapping[str, TrainConfig]
    documents: int = 1
    model: Mapping[str, ModelConfig] = field(default_factory=dict)


def index_splits(labels: Array, **rows: Array) -> dict[str, Split]:
    """Splits of a task of single documents, from the row numbers of each."""
    return {
        name: Split(chosen.astype(np.int32)[:, None], labels[chosen].astype(np.uint8)) for name, chosen in rows.items()
    }


def existing_path(source: str, task: str, expected: str) -> Path:
    """The path a user named as a source.

    Raises:
        ValueError: If nothing is there.
    """
    path = Path(source).expanduser()
    if not path.exists():
        raise ValueError(f"source of task {task} is {source!r}, which does not exist; expected {expected}")
    return path
