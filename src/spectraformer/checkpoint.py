"""Checkpoints of training: all of its state, in a directory that appears whole, is verified when read, and kept twice.

::

    checkpoints/step-00000500/
        model.safetensors       weights and buffers, redraw counters among them
        best.safetensors        the weights with the best dev accuracy so far, once there are any
        optimizer.safetensors   moments of AdamW
        random.safetensors      states of torch's generators
        state.json              step, best accuracy, history, seconds
        manifest.json           sha256 of each; written last

safetensors and JSON alone: nothing in a checkpoint can run code when it is read.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor, nn

from spectraformer.files import (
    DamagedError,
    new_directory,
    read_json,
    read_manifest,
    remove,
    remove_unfinished,
    sha256_of,
    write_atomically,
    write_manifest,
)

FORMAT = 1
KIND = "checkpoint"
KEEP = 2

Tensors = Mapping[str, Tensor]


@dataclass
class Checkpoint:
    """All state of a training run after a number of steps.

    Attributes:
        step: Optimiser steps done.
        model: Its state_dict.
        optimizer: State of AdamW, by parameter and moment.
        random: States of torch's generators, by device and process.
        best: state_dict with the best dev accuracy so far, empty before there is one.
        progress: JSON values: history, best accuracy, seconds.
    """

    step: int
    model: Tensors
    optimizer: Tensors
    random: Tensors
    best: Tensors = field(default_factory=dict)
    progress: dict[str, Any] = field(default_factory=dict)


def save_tensors(path: Path, tensors: Tensors) -> None:
    """Writes tensors as safetensors; values that share memory are stored one by one."""
    path.write_bytes(_serialised(tensors))


def _serialised(tensors: Tensors) -> bytes:
    return save({name: x.detach().cpu().clone().contiguous() for name, x in tensors.items()})


def load_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file, on the CPU.

    Raises:
        DamagedError: If it cannot be read as one.
    """
    try:
        return load(path.read_bytes())
    except (OSError, SafetensorError, ValueError) as error:
        raise DamagedError(f"{path} is not a safetensors file: {error}") from None


def write_checkpoint(directory: Path, key: str, checkpoint: Checkpoint) -> Path:
    """Writes a checkpoint, then removes all but the newest two; returns its path.

    Args:
        directory: The run's ``checkpoints``.
        key: Of the run: a checkpoint is read back only for the same.
        checkpoint: What to write.
    """
    path = directory / f"step-{checkpoint.step:08d}"
    with new_directory(path) as unfinished:
        for name in ("model", "best", "optimizer", "random"):
            tensors = getattr(checkpoint, name)
            if tensors or name != "best":
                save_tensors(unfinished / f"{name}.safetensors", tensors)
        text = json.dumps({"step": checkpoint.step, "progress": checkpoint.progress}, allow_nan=False)
        (unfinished / "state.json").write_text(text, encoding="utf-8")
        write_manifest(unfinished, {"kind": KIND, "format": FORMAT, "key": key, "step": checkpoint.step})
    for old in list(_newest_first(directory))[KEEP:]:
        remove(old)
    return path


def read_checkpoint(path: Path, key: str) -> Checkpoint:
    """A checkpoint, after checking every byte of it.

    Raises:
        DamagedError: If it is damaged, or belongs to another run.
    """
    manifest = read_manifest(path, KIND, FORMAT)
    if manifest.get("key") != key:
        raise DamagedError(
            f"{path} belongs to run {manifest.get('key')}, another configuration or other data than {key}"
        )
    state = read_json(path / "state.json")
    tensors = {name: load_tensors(path / f"{name}.safetensors") for name in ("model", "optimizer", "random")}
    best = load_tensors(path / "best.safetensors") if "best.safetensors" in manifest["files"] else {}
    return Checkpoint(step=state["step"], progress=state["progress"], best=best, **tensors)


def latest_checkpoint(directory: Path, key: str) -> tuple[Checkpoint | None, list[str]]:
    """The newest checkpoint that is whole, and why newer ones are not used.

    What a killed process left half written is removed. A refused checkpoint is set aside under the name
    ``refused-step-…``, so that it is neither read nor counted again.

    Args:
        directory: The run's ``checkpoints``; need not exist.
        key: Of the run.

    Returns:
        The checkpoint, or None if there is none; one message for each that was refused.
    """
    refused: list[str] = []
    if not directory.is_dir():
        return None, refused
    remove_unfinished(directory)
    for path in _newest_first(directory):
        try:
            return read_checkpoint(path, key), refused
        except DamagedError as error:
            aside = path.with_name(f"refused-{path.name}")
            remove(aside)
            path.rename(aside)
            refused.append(f"{error} (now {aside.name})")
    return None, refused


def _newest_first(directory: Path) -> Iterator[Path]:
    steps = {path: int(path.name[5:]) for path in directory.iterdir() if re.fullmatch(r"step-\d{8,}", path.name)}
    yield from sorted(steps, key=steps.__getitem__, reverse=True)


def optimizer_tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """State of an optimiser by parameter name and entry, such as ``encoder.norm.weight/exp_avg``."""
    return {
        f"{name}/{entry}": value
        for name, parameter in model.named_parameters()
        for entry, value in optimizer.state.get(parameter, {}).items()
    }


def restore_optimizer(model: nn.Module, optimizer: torch.optim.Optimizer, tensors: Tensors) -> None:
    """The inverse of :func:`optimizer_tensors`."""
    for name, parameter in model.named_parameters():
        entries = {key.rpartition("/")[2]: x for key, x in tensors.items() if key.rpartition("/")[0] == name}
        if entries:
            # Step counts stay where AdamW made them; moments live with their parameter.
            optimizer.state[parameter] = {
                entry: x.clone() if x.ndim == 0 and not optimizer.defaults.get("fused") else x.to(parameter.device)
                for entry, x in entries.items()
            }


def save_model(path: Path, model: nn.Module) -> dict[str, Any]:
    """Writes a model's weights atomically; returns their size and sha256 for the record."""
    write_atomically(path, _serialised(model.state_dict()))
    return {"bytes": path.stat().st_size, "sha256": sha256_of(path)}


def load_saved_model(path: Path, expected: Mapping[str, Any]) -> dict[str, Tensor]:
    """Weights that :func:`save_model` wrote.

    Raises:
        DamagedError: If they are missing, or not those of the record.
    """
    if not path.is_file():
        raise DamagedError(f"{path} is missing")
    if path.stat().st_size != expected["bytes"] or sha256_of(path) != expected["sha256"]:
        raise DamagedError(f"{path} is not what the run tested: its size or sha256 does not match {path.parent.name}")
    return load_tensors(path)
