"""Training and evaluation: interrupted anywhere and resumed, the result is bitwise that of an uninterrupted run."""

from __future__ import annotations

import gc
import math
import time
from contextlib import nullcontext
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from spectraformer import checkpoint as checkpoints
from spectraformer import records
from spectraformer.captured import RECORDERS
from spectraformer.checkpoint import Checkpoint
from spectraformer.config import Run, to_json
from spectraformer.distributed import ALONE, Group, join, own_device
from spectraformer.evaluation import (
    Evaluation,
    Evaluator,
    autocast,
    deterministic,
    make_model,
    resolve_device,
    resolve_precision,
)
from spectraformer.files import DamagedError, only_process, remove_unfinished, require_folder
from spectraformer.interruption import Interrupted, Interruption
from spectraformer.nonfinite import NonFiniteError, explain
from spectraformer.randomness import RandomSpan, on_device, random_states, restore_random, seed_all
from spectraformer.step import Stepper, learning_rate
from spectraformer.stretches import PLAIN, compile_stretches
from spectraformer.tasks.base import Array
from spectraformer.tasks.dataset import BatchOrder, Dataset, Loader
from spectraformer.watch import Silent, Watcher

# Evaluations keep no activations: a larger batch than in training fits.
EVALUATION_BATCHES = 2
SECONDS_BETWEEN_SAVES = 300.0
# How long the host lets a GPU run before it looks: for signals, progress, and whether all is finite.
SECONDS_BETWEEN_LOOKS = 0.4


class Trainer:
    """One run on one device, or on one device for each process of a group.

    Args:
        run: What to train; its precision is resolved.
        dataset: On what.
        device: Where.
        directory: The run's directory.
        key: The run's key.
        watcher: Who is told.
        group: With whom.

    Raises:
        ValueError: If batches cannot be shared by the group.
    """

    def __init__(
        self,
        run: Run,
        dataset: Dataset,
        device: torch.device,
        directory: Path,
        key: str,
        watcher: Watcher,
        group: Group = ALONE,
    ) -> None:
        self.run = run
        self.train = run.train
        self.dataset = dataset
        self.device = device
        self.directory = directory
        self.key = key
        self.watcher = watcher
        self.group = group
        splits = {"train": "train", "dev": "dev", "test": "test"}
        if run.protocol == "published" and "published_train" in dataset.splits:
            splits = {"train": "published_train", "dev": "test", "test": "test"}
        self.splits = splits
        self.loaders = {name: Loader(dataset, split, device) for name, split in splits.items()}
        self.order = BatchOrder(len(self.loaders["train"]), self.train.batch_size, self.train.seed)
        self.model = make_model(run, dataset).to(device)
        self.stepper = Stepper(self.model, self.train, lambda part: self._backward(part), group, device)
        self.evaluators: dict[str, Evaluator] = {}
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
        self._seconds_a_step = math.inf

    # -- state -------------------------------------------------------------------------------------------

    def resume(self) -> None:
        """Continues from the newest whole checkpoint; from the beginning if there is none.

        Raises:
            ValueError: If it is of another version of the model, or the processes do not see the same one.
        """
        group = self.group
        seed_all(self.train.seed, group.rank)
        with group.first_alone():  # what is damaged is set aside once
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
            checkpoints.restore_optimizer(self.model, self.stepper.optimizer, found.optimizer)
            restore_random(found.random, group.rank, found.step)
            self.step, self.progress, self.best = found.step, found.progress, dict(found.best)
        latest, earliest = group.agree(self.step, -self.step)
        if latest != -earliest:
            raise ValueError(
                f"processes go on from different steps of {self.directory.name}, {-earliest} and {latest}; "
                f"expected a folder of runs that all of them share"
            )
        if refused:
            self.watcher.note(f"going on from step {self.step}")
        self.progress["sessions"] += 1

    def save(self) -> None:
        """Writes a checkpoint of the present state."""
        self._count_time()
        peak, _ = records.peak_memory(self.device)
        self.progress["peak_memory_bytes"] = max(filter(None, (peak, self.progress["peak_memory_bytes"])), default=None)
        random = random_states(self.group)
        if self.group.is_first:
            state = Checkpoint(
                step=self.step,
                model=self.model.state_dict(),
                optimizer=checkpoints.optimizer_tensors(self.model, self.stepper.optimizer),
                random=random,
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
        gc.collect()  # memory of a run before this one is not this one's
        records.start_counting_memory(self.device)
        with deterministic(), Interruption() as interruption:
            try:
                self.capture()
                while True:
                    unsaved = time.monotonic() - self._saved
                    signal, is_late = self.group.agree(interruption.received or 0, unsaved > SECONDS_BETWEEN_SAVES)
                    interruption.received = signal or None
                    if self._evaluation_is_due():
                        self.evaluate_dev(interruption)
                        self.save()
                    elif is_late:
                        self.save()
                    if self.step == self.train.steps:
                        break
                    interruption.check()
                    self.train_step(self._steps_before_a_look())
            except Interrupted:
                self.save()
                raise

    def _evaluation_is_due(self) -> bool:
        history = self.progress["history"]
        done = history[-1]["step"] if history else 0
        return self.step > done and (self.step % self.train.eval_every == 0 or self.step == self.train.steps)

    def _steps_before_a_look(self) -> int:
        every = self.train.eval_every
        left = min(self.train.steps, (self.step // every + 1) * every) - self.step
        (count,) = self.group.agree(int(SECONDS_BETWEEN_LOOKS / self._seconds_a_step))
        return max(1, min(count, left, self.stepper.most))

    def capture(self) -> None:
        """Compiles and records steps and evaluations where that can be done; says why if it cannot."""
        name = self.run.attention.name
        if self.device.type == "cuda" and (reason := compile_stretches(self.model.encoder, self.stepper.rehearse)):
            self.watcher.note(f"{name} is trained without torch.compile: {reason}")
        if self.device.type in RECORDERS and (reason := self.stepper.capture() or self._evaluator("dev").capture()):
            self.watcher.note(f"{name} is trained step by step, not by a recording: {reason}")

    def train_step(self, count: int = 1) -> None:
        """So many optimiser steps, none of which waits for the host.

        Raises:
            NonFiniteError: If a loss or gradient is not finite; the weights are those before that step.
        """
        started = time.monotonic()
        examples = self.order(self.step, count)
        rates = [learning_rate(self.train, step) for step in range(self.step, self.step + count)]
        span = RandomSpan(self.device)
        outcome = self.stepper.run(examples, rates)
        seconds = time.monotonic() - started
        self._seconds_a_step = seconds / count
        self.progress["train_seconds"] += seconds
        for loss in outcome.losses:
            self.step += 1
            self.progress["loss_sum"] += loss
            self.watcher.stepped(self.step, loss)
        if outcome.failed:
            number = len(outcome.losses)
            span.rewind(number, count)
            raise self._explain(examples[number], rates[number])

    def _explain(self, examples: Array, rate: float) -> NonFiniteError:
        """Computes a step again, of which nothing is applied, and looks where it fails."""
        self.stepper.plan(examples[None], [rate])
        self.stepper.step()
        loss = self.stepper.outcomes[0, 0]
        self.model.encoder.stretches = PLAIN
        return explain(self.model, loss, self.step, rate, lambda: self._forward(self.stepper.examples[0]))

    def _forward(self, examples: Tensor) -> Tensor:  # (b,)
        batch = self.loaders["train"].batch(examples)
        with autocast(self.device, self.train.precision):
            logits = self.model(batch.tokens, batch.lengths)
        return functional.cross_entropy(logits.float(), batch.labels)

    def _backward(self, examples: Tensor) -> Tensor:
        loss = self._forward(examples) / (self.train.accumulate * self.group.size)
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
        return self._evaluator(split)(interruption)

    def _evaluator(self, split: str) -> Evaluator:
        if split not in self.evaluators:
            size = EVALUATION_BATCHES * self.train.batch_size // self.train.accumulate
            loader, precision = self.loaders[split], self.train.precision
            self.evaluators[split] = Evaluator(self.model, loader, size, precision, self.group)
        return self.evaluators[split]

    def finish(self) -> records.Record:
        """Tests the best weights once and writes the result."""
        self.model.load_state_dict(self.best)
        with deterministic():
            if self.device.type in RECORDERS:
                self._evaluator("test").capture()
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
            "device": records.device_name(self.device) + (f" x {self.group.size}" if self.group.size > 1 else ""),
            "started": progress["started"],
            "finished": _now(),
            "model": checkpoints.save_model(model_path, self.model),
        }
        with self.group.first_alone():
            if self.group.is_first:
                records.write_result(self.directory, content)
        return records.read_record(self.directory)


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
    place = resolve_device(own_device(device))
    run = resolve_precision(run, place)
    make_model(run, dataset)  # a configuration that does not fit is refused before anything is written
    require_folder("runs", runs)
    group = join()
    group.share(run.train.batch_size, run.train.accumulate)
    data = {"sha256": dataset.fingerprint, "label": dataset.label, "source": dataset.manifest["source"]}
    with group.first_alone():
        directory, key = records.open_run(runs, run, data)
    if any(group.agree((directory / records.RESULT).exists())):
        try:
            return records.read_record(directory)
        except DamagedError as error:
            raise DamagedError(f"{error}; remove it, and the last checkpoint is tested again") from None
    told = watcher if watcher is not None and group.is_first else Silent()
    with only_process(directory) if group.is_first else nullcontext(), on_device(place):
        if group.is_first:
            remove_unfinished(directory)
        trainer = Trainer(run, dataset, place, directory, key, told, group)
        trainer.resume()
        told.begin(run, trainer.step, directory)
        try:
            trainer.fit()
            return trainer.finish()
        finally:
            told.end()


def _now() -> str:
    return datetime.now(timezone.utc).isoformat(timespec="seconds")
