"""Prepared data: checked when opened, memory-mapped, and put into batches whose order is a function of (seed, step)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from spectraformer.config import digest
from spectraformer.files import DamagedError, read_manifest
from spectraformer.tasks.base import Array, Split
from spectraformer.tasks.prepare import FORMAT, KIND

# On the CPU batches are cut to their longest document, rounded up: few shapes to allocate for.
LENGTH_MULTIPLE = 64


class Batch(NamedTuple):
    """Examples for a model.

    Shapes: b examples, c documents an example, l tokens.
    """

    tokens: Tensor  # (b, c, l) uint8
    lengths: Tensor  # (b, c) int32
    labels: Tensor  # (b,) int64


@dataclass(frozen=True, kw_only=True)
class Dataset:
    """One prepared task.

    Attributes:
        manifest: What the preparation wrote down.
        tokens: (documents, length) uint8.
        lengths: (documents,) int32.
        splits: By name.
        fingerprint: Hash of the content and its meaning: equal for equal data, wherever and whenever it was prepared.
    """

    manifest: Mapping[str, Any]
    tokens: Array
    lengths: Array
    splits: Mapping[str, Split]
    fingerprint: str

    @property
    def length(self) -> int:
        """Padded length, tokens."""
        return int(self.tokens.shape[1])

    @property
    def num_classes(self) -> int:
        """Labels are below it."""
        return int(self.manifest["num_classes"])

    @property
    def vocab_size(self) -> int:
        """Tokens are below it."""
        return int(self.manifest["vocab_size"])

    @property
    def documents(self) -> int:
        """Documents an example."""
        return int(self.splits["train"].rows.shape[1])

    @property
    def label(self) -> str:
        """What tables call this task: its source where that differs, and its size."""
        size = self.manifest["size"]
        return str(self.manifest["label"]) + ("" if size == "full" else f" ({size})")

    def majority(self, split: str) -> float:
        """Accuracy, in [0, 1], of always answering a split's most frequent class."""
        labels = self.splits[split].labels
        return float(np.bincount(labels).max() / len(labels))


def open_dataset(directory: Path, advance: Callable[[int], None] | None = None) -> Dataset:
    """Prepared data, after checking every byte against its manifest.

    Args:
        directory: Where it was prepared.
        advance: Called with the number of bytes checked.

    Raises:
        DamagedError: If it is not whole and unchanged.
    """
    manifest = read_manifest(directory, KIND, FORMAT, advance)
    names = manifest.get("splits", {})
    try:
        tokens = np.load(directory / "tokens.npy", mmap_mode="r", allow_pickle=False)
        lengths = np.load(directory / "lengths.npy", allow_pickle=False)
        splits = {
            name: Split(*(np.load(directory / f"{name}.{part}.npy", allow_pickle=False) for part in ("rows", "labels")))
            for name in names
        }
        fits = tokens.dtype == np.uint8 and tokens.ndim == 2 and {"train", "dev", "test"} <= set(splits)
        fits = fits and lengths.shape == tokens.shape[:1] and 1 <= lengths.min() <= lengths.max() <= tokens.shape[1]
        fits = fits and len({rows.shape[1:] for rows, _ in splits.values()}) == 1
        for rows, labels in splits.values():
            fits = fits and rows.ndim == 2 and len(rows) == len(labels) > 0 <= rows.min() <= rows.max() < len(tokens)
            fits = fits and labels.max() < manifest["num_classes"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DamagedError(f"{directory} cannot be read as a prepared task: {error}") from None
    if not fits:
        raise DamagedError(f"{directory} is not a prepared task: its arrays do not fit each other or its manifest")
    meaning = {key: manifest[key] for key in ("label", "size", "num_classes", "vocab_size", "files")}
    return Dataset(manifest=manifest, tokens=tokens, lengths=lengths, splits=splits, fingerprint=digest(meaning))


class Loader:
    """Batches of one split, gathered on a device, where all of the documents it names are held.

    Args:
        dataset: Where the split is from.
        split: Its name.
        device: Where batches are made.

    Attributes:
        by_length: Numbers of all examples in order of length, on the host.
    """

    def __init__(self, dataset: Dataset, split: str, device: torch.device) -> None:
        rows, labels = dataset.splits[split]
        used, rows = np.unique(rows, return_inverse=True)
        rows = rows.reshape(len(labels), -1)
        lengths = dataset.lengths[used][rows]
        self.by_length = np.argsort(lengths.max(axis=1), kind="stable")
        self.rows = torch.from_numpy(rows).to(device)
        self.lengths = torch.from_numpy(lengths).to(device)
        self.labels = torch.from_numpy(labels.astype(np.int64)).to(device)
        self.tokens = torch.from_numpy(np.ascontiguousarray(dataset.tokens[used])).to(device)
        self.device = device

    def __len__(self) -> int:
        return len(self.rows)

    def batch(
        self,
        examples: Tensor,  # (b,) int64, on the device
    ) -> Batch:
        """The examples of these numbers."""
        lengths = self.lengths[examples]
        return Batch(self.tokens[:, : self._width(lengths)][self.rows[examples]], lengths, self.labels[examples])

    def _width(self, lengths: Tensor) -> int:
        """On the CPU what the longest needs. A GPU has one width for all: nothing waits to learn it."""
        most = self.tokens.shape[1]
        if self.device.type != "cpu":
            return most
        return min(most, -(-int(lengths.max()) // LENGTH_MULTIPLE) * LENGTH_MULTIPLE)


class BatchOrder:
    """Which examples step number s trains on: epochs of permutations laid end to end, cut into batches.

    A pure function of (seed, step): no state to save, none to lose.

    Args:
        examples: How many there are.
        batch_size: Examples a step.
        seed: Of the permutations.
    """

    def __init__(self, examples: int, batch_size: int, seed: int) -> None:
        self.examples = examples
        self.batch_size = batch_size
        self.seed = seed
        self._epoch = -1
        self._permutation: Array = np.empty(0, np.int64)

    def __call__(self, step: int, count: int = 1) -> Array:
        """Numbers of the examples of ``count`` steps from step 0, 1, … on, (count, batch_size)."""
        positions = np.arange(step * self.batch_size, (step + count) * self.batch_size)
        epochs = positions // self.examples
        parts = [
            self._permute(epoch)[positions[epochs == epoch] % self.examples]
            for epoch in range(epochs[0], epochs[-1] + 1)
        ]
        found: Array = np.concatenate(parts).reshape(count, self.batch_size)
        return found

    def _permute(self, epoch: int) -> Array:
        if epoch != self._epoch:
            self._epoch = epoch
            # PCG64 and the shuffle are given by name, so that the order does not move with numpy's default.
            generator = np.random.Generator(np.random.PCG64(np.random.SeedSequence((self.seed, epoch))))
            self._permutation = generator.permutation(self.examples)
        return self._permutation
