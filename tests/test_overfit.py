"""Every task, tiny, is learned by heart: by softmax, by a positive variant (posrf) and a signed one (ssr)."""

import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

import spectraformer
from spectraformer.config import AttentionConfig, ModelConfig, Run, TrainConfig
from spectraformer.tasks import TASKS, open_dataset, prepare
from spectraformer.tasks.base import Recipe, Split
from spectraformer.train import Trainer
from spectraformer.watch import Silent

EXAMPLES = 24
FROM_FILES = ("text", "image", "retrieval")
ATTENTIONS = ("softmax", "posrf-orf", "oprf-ssr")


def few(recipe: Recipe) -> Recipe:
    """The first block of a recipe, and of it the first examples."""
    columns = recipe.build(recipe.blocks[0])
    if len(recipe.blocks) > 1 and "labels" in columns:
        # Splits of a generator are ranges of rows: one block is part of train.
        rows = np.arange(EXAMPLES, dtype=np.int32)[:, None]
        split = (rows, columns["labels"][:EXAMPLES].astype(np.uint8))
        return _with_split(recipe, recipe.blocks[:1], dict.fromkeys(("train", "dev", "test"), split))
    parts = [recipe.build(block) for block in recipe.blocks]
    whole = {name: np.concatenate([part[name] for part in parts]) for name in parts[0] if name != "tokens"}
    rows, labels = recipe.split(whole)["train"]
    split = (rows[:EXAMPLES], labels[:EXAMPLES])
    return _with_split(recipe, recipe.blocks, dict.fromkeys(("train", "dev", "test"), split))


def _with_split(recipe, blocks, splits):
    made = {name: Split(*split) for name, split in splits.items()}
    return replace(recipe, blocks=blocks, split=lambda columns: made, distinct=None)


@pytest.fixture(scope="module", params=TASKS)
def dataset(request, tmp_path_factory):
    name = request.param
    source = os.environ.get("SPECTRAFORMER_DATA")
    if name in FROM_FILES and not (source and Path(source).is_dir()):
        pytest.skip(f"task {name} is made from files: SPECTRAFORMER_DATA names no folder of them")
    path = tmp_path_factory.mktemp(name) / name
    recipe = few(TASKS[name].recipe("tiny", None, 0))
    prepare.prepare(recipe, path, task=name, size="tiny", version=spectraformer.__version__, workers=1)
    return open_dataset(path)


@pytest.mark.slow
@pytest.mark.parametrize("attention", ATTENTIONS)
def test_a_tiny_task_is_learned_by_heart(dataset, attention, tmp_path):
    assert dataset.length <= 256
    run = Run(
        task=dataset.manifest["task"],
        size="tiny",
        attention=AttentionConfig(name=attention, num_features=128),
        model=ModelConfig(dropout=0.0),
        train=TrainConfig(steps=300, batch_size=12, learning_rate=2e-3, warmup=20, eval_every=20, precision="float32"),
    )
    trainer = Trainer(run, dataset, torch.device("cpu"), tmp_path, "key", Silent())
    accuracy = 0.0
    while accuracy < 0.95 and trainer.step < run.train.steps:
        trainer.train_step()
        if trainer.step % 10 == 0:
            accuracy = trainer.evaluate("train").accuracy
    assert accuracy >= 0.95, f"{accuracy:.2f} of {EXAMPLES} examples after {trainer.step} steps"
