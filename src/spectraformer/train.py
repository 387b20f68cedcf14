"""Training and evaluation: interrupted anywhere and resumed, the result is bitwise that of an uninterrupted run."""

from __future__ import annotations

import math
import time
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from spectraformer import checkpoint as checkpoints
from spectraformer import records
from spectraformer.checkpoint import Checkpoint
from spectraformer.config import Run, TrainConfig, to_json
from spectraformer.evaluation import (
    Evaluation,
    autocast,
    deterministic,
    evaluate,
    make_model,
    resolve_device,
    resolve_precision,
)
from spectraformer.files import DamagedError, only_process, remove_unfinished, require_folder
from spectraformer.interruption import Interrupted, Interruption
from spectraformer.nonfinite import require_finite
from spectraformer.tasks.base import Array
from spectraformer.tasks.dataset import BatchOrder, Dataset, Loader
from spectraformer.watch import Silent, Watcher

BETAS = (0.9, 0.999)
EPSILON = 1e-6
# torch.optim.lr_scheduler.OneCycleLR's defaults: where the cycle begins and ends, as fractions of its peak.
FIRST_FRACTION = 1 / 25
LAST_FRACTION = FIRST_FRACTION / 1e4
# Evaluations keep no activations: a larger batch than in training fits.
EVALUATION_BATCHES = 2
SECONDS_BETWEEN_SAVES = 300.0


def learning_rate(train: TrainConfig, step: int) -> float:
    """One linear cycle: up to the peak in ``warmup`` steps, then down to almost nothing at the last step.

    Args:
        train: Peak, warm-up and number of steps.
        step: 0 for the first.
    """
    peak, last = train.learning_rate, train.steps - 1
    if step < train.warmup:
        return peak * (FIRST_FRACTION + (1 - FIRST_FRACTION) * step / train.warmup)
    down = (step - train.warmup) / max(last - train.warmup, 1)
    return peak * (1 - (1 - LAST_FRACTION) * down)


class Trainer:
    """One run on one device.

    Args:
        run: What to train; its precision is resolved.
        dataset: On what.
        device: Where.
        directory: The run's directory.
        key: The run's key.
        watcher: Who is told.
    """

    def __init__(
        self, run: Run, dataset: Dataset, device: torch.device, directory: Path, key: str, watcher: Watcher
    ) -> None:
        self.run = run
        self.train = run.train
        self.dataset = dataset
        self.device = device
        self.directory = directory
        self.key = key
        self.watcher = watcher
        splits = {"train": "train", "dev": "dev", "test": "test"}
        if run.protocol == "published" and "published_train" in dataset.splits:
            splits = {"train": "published_train", "dev": "test", "test": "test"}
        self.splits = splits
        self.loaders = {name: Loader(dataset, split, device) for name, split in splits.items()}
        self.order = BatchOrder(len(self.loaders["train"]), self.train.batch_size, self.train.seed)
        self.model = make_model(run, dataset).to(device)
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(),
            lr=self.train.learning_rate,
            betas=BETAS,
            eps=EPSILON,
            weight_decay=self.train.weight_decay,
        )
        self.step = 0
        self.best: dict[str, Tensor] = {}
        self.progress: dict[str, Any] = {
            "history": [],
            "best_step": None,
            "best_accuracy": -1.0,
            "loss_sum": 0.0,
            "train_seconds": 0.0,
            "seconds": 0.0,
            "peak_memory_bytes": None,
            "sessions": 0,
            "started": _now(),
        }
        self._saved = self._counted = time.monotonic()

    # -- state -------------------------------------------------------------------------------------------

    def resume(self) -> None:
        """Continues from the newest whole checkpoint; from the beginning if there is none."""
        torch.manual_seed(self.train.seed)
        found, refused = checkpoints.latest_checkpoint(self.directory / records.CHECKPOINTS, self.key)
        for reason in refused:
            self.watcher.note(f"checkpoint refused: {reason}")
        if found is not None:
            try:
                self.model.load_state_dict(found.model)
            except RuntimeError as error:
                raise ValueError(
                    f"the checkpoint in {self.directory} is of another version of this model; remove it to start anew: "
                    f"{error}"
                ) from None
            checkpoints.restore_optimizer(self.model, self.optimizer, found.optimizer)
            checkpoints.restore_random(found.random)
            self.step, self.progress, self.best = found.step, found.progress, dict(found.best)
        if refused:
            self.watcher.note(f"going on from step {self.step}")
        self.progress["sessions"] += 1

    def save(self) -> None:
        """Writes a checkpoint of the present state."""
        self._count_time()
        peak, _ = records.peak_memory(self.device)
        self.progress["peak_memory_bytes"] = max(filter(None, (peak, self.progress["peak_memory_bytes"])), default=None)
        state = Checkpoint(
            step=self.step,
            model=self.model.state_dict(),
            optimizer=checkpoints.optimizer_tensors(self.model, self.optimizer),
            random=checkpoints.random_tensors(),
            best=self.best,
            progress=self.progress,
        )
        checkpoints.write_checkpoint(self.directory / records.CHECKPOINTS, self.key, state)
        self._saved = time.monotonic()

    def _count_time(self) -> None:
        now = time.monotonic()
        self.progress["seconds"] += now - self._counted
        self._counted = now

    # -- training ----------------------------------------------------------------------------------------

    def fit(self) -> None:
        """Trains to the last step, evaluating and saving on the way.

        Raises:
            Interrupted: If the user asked to stop; everything is saved.
            NonFiniteError: If a loss or gradient is not finite; the weights are those before the step.
        """
        records.start_counting_memory(self.device)
        with deterministic(), Interruption() as interruption:
            try:
                while True:
                    if self._evaluation_is_due():
                        self.evaluate_dev(interruption)
                        self.save()
                    elif time.monotonic() - self._saved > SECONDS_BETWEEN_SAVES:
                        self.save()
                    if self.step == self.train.steps:
                        break
                    interruption.check()
                    self.train_step()
            except Interrupted:
                self.save()
                raise

    def _evaluation_is_due(self) -> bool:
        history = self.progress["history"]
        done = history[-1]["step"] if history else 0
        return self.step > done and (self.step % self.train.eval_every == 0 or self.step == self.train.steps)

    def train_step(self) -> None:
        """One optimiser step."""
        started = time.monotonic()
        rate = learning_rate(self.train, self.step)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.model.train()
        examples = self.order(self.step)
        loss = torch.zeros((), device=self.device)
        for part in np.split(examples, self.train.accumulate):
            loss += self._backward(part)
        require_finite(self.model, loss, self.step, rate, lambda: self._forward(examples))
        nn.utils.clip_grad_value_(self.model.parameters(), self.train.clip)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.step += 1
        value = float(loss)
        self.progress["loss_sum"] += value
        self.progress["train_seconds"] += time.monotonic() - started
        self.watcher.stepped(self.step, value)

    def _forward(self, examples: Array) -> Tensor:
        batch = self.loaders["train"].batch(examples)
        with autocast(self.device, self.train.precision):
            logits = self.model(batch.tokens, batch.lengths)
        return functional.cross_entropy(logits.float(), batch.labels)

    def _backward(self, examples: Array) -> Tensor:
        loss = self._forward(examples) / self.train.accumulate
        loss.backward()  # type: ignore[no-untyped-call]
        return loss.detach()

    def evaluate_dev(self, interruption: Interruption | None = None) -> None:
        """Evaluates the dev set, adds a row to the history, and keeps the weights if they are the best so far."""
        accuracy, loss = self.evaluate("dev", interruption)
        self._count_time()
        history = self.progress["history"]
        steps = self.step - (history[-1]["step"] if history else 0)
        row = {
            "step": self.step,
            "learning_rate": learning_rate(self.train, self.step - 1),
            "train_loss": self.progress["loss_sum"] / steps,
            "dev_loss": loss,
            "dev_accuracy": accuracy,
            "seconds": self.progress["train_seconds"],
        }
        history.append(row)
        self.progress["loss_sum"] = 0.0
        counts = self.step >= self.train.select_after * self.train.steps
        if counts and accuracy > self.progress["best_accuracy"]:
            self.progress["best_step"], self.progress["best_accuracy"] = self.step, accuracy
            self.best = {name: x.detach().cpu().clone() for name, x in self.model.state_dict().items()}
        self.watcher.evaluated(row)

    def evaluate(self, split: str, interruption: Interruption | None = None) -> Evaluation:
        """Accuracy and loss of the present weights on "train", "dev" or "test"."""
        size = EVALUATION_BATCHES * self.train.batch_size // self.train.accumulate
        return evaluate(self.model, self.loaders[split], size, self.train.precision, interruption)

    def finish(self) -> records.Record:
        """Tests the best weights once and writes the result."""
        self.model.load_state_dict(self.best)
        dev, test = self.evaluate("dev"), self.evaluate("test")
        peak, kind = records.peak_memory(self.device)
        self._count_time()
        model_path = self.directory / records.MODEL
        progress, dataset = self.progress, self.dataset
        content = {
            "format": records.FORMAT,
            "key": self.key,
            "run": to_json(self.run),
            "task": dataset.label,
            "attention": self.run.attention.name,
            "protocol": self.run.protocol,
            "data": {
                "sha256": dataset.fingerprint,
                "source": dataset.manifest["source"],
                "counts": {name: len(loader) for name, loader in self.loaders.items()},
                "majority": {name: dataset.majority(self.splits[name]) for name in ("dev", "test")},
            },
            "accuracy": {"dev": dev.accuracy, "test": test.accuracy},
            "loss": {"train": progress["history"][-1]["train_loss"], "dev": dev.loss, "test": test.loss},
            "best_step": progress["best_step"],
            "steps": self.step,
            "steps_per_second": self.step / max(progress["train_seconds"], math.ulp(1.0)),
            "seconds": progress["seconds"],
            "peak_memory_bytes": max(filter(None, (peak, progress["peak_memory_bytes"])), default=None),
            "memory_kind": kind,
            "parameters": sum(parameter.numel() for parameter in self.model.parameters()),
            "sessions": progress["sessions"],
            "history": progress["history"],
            "versions": records.versions(),
            "git_commit": records.git_commit(),
            "device": records.device_name(self.device),
            "started": progress["started"],
            "finished": _now(),
            "model": checkpoints.save_model(model_path, self.model),
        }
        return records.write_result(self.directory, content)


def train(
    run: Run, dataset: Dataset, runs: Path, *, device: str = "auto", watcher: Watcher | None = None
) -> records.Record:
    """Trains a run, or goes on with it, or returns its result if it is done.

    Args:
        run: What to train.
        dataset: On what.
        runs: Where runs are.
        device: "auto", "cpu", "cuda" or "cuda:N".
        watcher: Who is told how it goes.

    Raises:
        ValueError: For configurations that do not fit, and for a run that another process works on.
        Interrupted: If the user asked to stop; calling again goes on.
        NonFiniteError: If a loss or gradient is not finite.
    """
    place = resolve_device(device)
    run = resolve_precision(run, place)
    make_model(run, dataset)  # a configuration that does not fit is refused before anything is written
    require_folder("runs", runs)
    data = {"sha256": dataset.fingerprint, "label": dataset.label, "source": dataset.manifest["source"]}
    directory, key = records.open_run(runs, run, data)
    if (directory / records.RESULT).exists():
        try:
            return records.read_record(directory)
        except DamagedError as error:
            raise DamagedError(f"{error}; remove it, and the last checkpoint is tested again") from None
    told = watcher or Silent()
    with only_process(directory):
        remove_unfinished(directory)
        trainer = Trainer(run, dataset, place, directory, key, told)
        trainer.resume()
        told.begin(run, trainer.step, directory)
        try:
            trainer.fit()
            return trainer.finish()
        finally:
            told.end()


def _now() -> str:
    return datetime.now(timezone.utc).isoformat(timespec="seconds")
