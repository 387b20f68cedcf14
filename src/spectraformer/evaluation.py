"""From a run to its model on a device, and from a model to its accuracy on a split."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn import functional

from spectraformer.captured import Captured, capture
from spectraformer.checkpoint import load_saved_model
from spectraformer.config import Run
from spectraformer.distributed import ALONE, Group
from spectraformer.interruption import Interruption
from spectraformer.model import Classifier
from spectraformer.records import MODEL, Record
from spectraformer.tasks.dataset import Dataset, Loader


class Evaluation(NamedTuple):
    """Of one split: accuracy in [0, 1], and mean cross-entropy in nats."""

    accuracy: float
    loss: float


def resolve_device(device: str) -> torch.device:
    """The device of a name; "auto" is a GPU if there is one.

    Raises:
        ValueError: If there is no such device.
    """
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        found = torch.device(device)
    except RuntimeError:
        raise ValueError(f"device is {device!r}; expected auto, cpu, cuda or cuda:N") from None
    if found.type not in ("cpu", "cuda"):
        raise ValueError(f"device is {device!r}; expected auto, cpu, cuda or cuda:N")
    count = torch.cuda.device_count()
    if found.type == "cuda" and (found.index or 0) >= count:
        have = f"this machine has {count} GPU(s)" if count else "this machine has no GPU that torch can use"
        raise ValueError(f"device is {device!r}, but {have}; nearest: {'cuda:0' if count else 'cpu'}")
    return found


def resolve_precision(run: Run, device: torch.device) -> Run:
    """The run with "auto" replaced by the precision it means on a device: results depend on it."""
    if run.train.precision != "auto":
        return run
    precision = "bfloat16" if device.type == "cuda" else "float32"
    return replace(run, train=replace(run.train, precision=precision))


def make_model(run: Run, dataset: Dataset) -> Classifier:
    """The model a run trains, with fresh weights that are a function of the seed.

    Raises:
        ValueError: For attentions that do not exist or do not fit, and for models too large to be made.
    """
    with enough_memory(run), torch.random.fork_rng(devices=[]):
        torch.manual_seed(run.train.seed)
        return Classifier(
            run.model,
            run.attention,
            vocab_size=dataset.vocab_size,
            max_length=dataset.length,
            num_classes=dataset.num_classes,
            documents=dataset.documents,
            seed=run.train.seed,
            protocol=run.protocol,
        )


@contextmanager
def enough_memory(run: Run) -> Iterator[None]:
    """Raises ``ValueError`` with a model's sizes if what is made inside cannot be allocated."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not isinstance(error, MemoryError) and not re.search("alloc|out of memory|Storage size", str(error)):
            raise
        sizes = ", ".join(f"model.{name}={getattr(run.model, name)}" for name in ("depth", "width", "hidden"))
        raise ValueError(
            f"a model with {sizes}, model.classifier={run.model.classifier} and "
            f"attention.num_features={run.attention.num_features} cannot be made: {str(error).splitlines()[0]}"
        ) from error


def autocast(device: torch.device, precision: str) -> AbstractContextManager[Any]:
    """Lower precision where it is asked for."""
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bfloat16")


def load_model(record: Record, dataset: Dataset) -> Classifier:
    """The model a run tested, in evaluation mode: its logits are bitwise those of the test.

    Raises:
        DamagedError: If its weights are damaged.
        ValueError: If the data is not what the run was trained on.
    """
    if dataset.fingerprint != record.content["data"]["sha256"]:
        raise ValueError(
            f"{record.path.name} was trained on other data than {dataset.label}: {record.content['data']['source']}"
        )
    model = make_model(record.run, dataset)
    model.load_state_dict(load_saved_model(record.path / MODEL, record.content["model"]))
    return model.eval()


class Evaluator:
    """Accuracy and loss of a model on every example of a split.

    All batches have one size: the last is filled up with examples that do not count.

    Args:
        model: Any weights it has when it is called.
        loader: Of the split.
        batch_size: Examples a batch.
        precision: "float32" or "bfloat16".
        group: Processes that share the batches.
    """

    def __init__(self, model: nn.Module, loader: Loader, batch_size: int, precision: str, group: Group = ALONE) -> None:
        self.model = model
        self.loader = loader
        self.precision = precision
        self.group = group
        examples, device = len(loader), loader.device
        size = min(batch_size, examples)
        self.batches = -(-examples // size)
        # In order of length, so that a batch is as short as it can be; filled up with the longest.
        places = torch.arange(self.batches * size).clamp(max=examples - 1)
        self.examples = torch.from_numpy(loader.by_length)[places].view(self.batches, size).to(device)
        self.counts = (torch.arange(self.batches * size) < examples).view(self.batches, size).to(device)
        self.place = torch.zeros(1, dtype=torch.int64, device=device)
        self.correct = torch.zeros((), dtype=torch.int64, device=device)
        self.loss = torch.zeros((), dtype=torch.float64, device=device)
        self._captured: Captured | None = None

    def __call__(self, interruption: Interruption | None = None) -> Evaluation:
        """Evaluates the weights as they are.

        Raises:
            Interrupted: If the user asked to stop meanwhile.
        """
        was_training = self.model.training
        self.model.eval()
        try:
            run = self._batch if self._captured is None else self._captured.run
            self.correct.zero_()
            self.loss.zero_()
            for number in range(self.group.rank, self.batches, self.group.size):
                # Processes that stop at different batches would wait for each other for ever.
                if interruption is not None and self.group.size == 1:
                    interruption.check()
                self.place.fill_(number)
                run()
            self.group.sum_([self.correct])
            self.group.sum_([self.loss])
        finally:
            self.model.train(was_training)
        return Evaluation(int(self.correct) / len(self.loader), float(self.loss) / len(self.loader))

    def capture(self) -> str | None:
        """Records the work of a batch if that can be done; returns why not."""
        if self._captured is None:
            was_training = self.model.training
            self.model.eval()
            sums = (self.correct, self.loss)
            self._captured = capture(
                self._batch, self.model, self.loader.device, state=(self.place, *sums), results=lambda: sums
            )
            self.model.train(was_training)
        return self._captured.reason

    @torch.no_grad()
    def _batch(self) -> None:
        counts = self.counts.index_select(0, self.place)[0]
        batch = self.loader.batch(self.examples.index_select(0, self.place)[0])
        with autocast(self.loader.device, self.precision):
            logits = self.model(batch.tokens, batch.lengths).float()
        loss = functional.cross_entropy(logits, batch.labels, reduction="none").double()
        self.correct += ((logits.argmax(-1) == batch.labels) & counts).sum()
        self.loss += loss.masked_fill(~counts, 0.0).sum()


def evaluate(
    model: nn.Module, loader: Loader, batch_size: int, precision: str, interruption: Interruption | None = None
) -> Evaluation:
    """Accuracy and loss on every example of a split; see :class:`Evaluator`.

    Raises:
        Interrupted: If the user asked to stop meanwhile.
    """
    return Evaluator(model, loader, batch_size, precision)(interruption)


@contextmanager
def deterministic() -> Iterator[None]:
    """Only deterministic kernels inside; the former settings after."""
    # Without this, cuBLAS refuses to be deterministic; it is read when cuBLAS is first used.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    filled = torch.utils.deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]
    torch.use_deterministic_algorithms(True)
    # It would cost a kernel for most tensors; nothing here reads what it has not written.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        torch.utils.deterministic.fill_uninitialized_memory = filled  # type: ignore[attr-defined]
