"""Runs and data small enough to train in a second: counting digits."""

import numpy as np

import spectraformer
from spectraformer.config import AttentionConfig, ModelConfig, Run, TrainConfig
from spectraformer.tasks.base import Recipe, index_splits
from spectraformer.tasks.dataset import open_dataset
from spectraformer.tasks.prepare import prepare

LENGTH = 24
BLOCK = 40


def build(number):
    """Documents of random length; the class is the most frequent of three tokens."""
    generator = np.random.default_rng((7, number))
    lengths = generator.integers(8, LENGTH + 1, BLOCK).astype(np.int32)
    tokens = generator.integers(1, 4, (BLOCK, LENGTH)).astype(np.uint8)
    tokens[np.arange(LENGTH) >= lengths[:, None]] = 0
    counts = (tokens[:, :, None] == np.arange(1, 4)).sum(1)
    return {"tokens": tokens, "lengths": lengths, "labels": counts.argmax(1).astype(np.uint8)}


def split(columns):
    rows = np.arange(len(columns["labels"]))
    return index_splits(columns["labels"], train=rows[:120], dev=rows[120:170], test=rows[170:])


def recipe(blocks=5, **changes):
    given = {
        "label": "counting",
        "source": "made for a test",
        "arguments": {"blocks": blocks},
        "length": LENGTH,
        "vocab_size": 8,
        "num_classes": 3,
        "blocks": range(blocks),
        "build": build,
        "split": split,
    }
    return Recipe(**(given | changes))


def prepared(path, **changes):
    """A dataset, prepared at a path."""
    prepare(recipe(**changes), path, task="counting", size="tiny", version=spectraformer.__version__, workers=1)
    return open_dataset(path)


def small_run(attention="posrf-orf", options=None, num_features=16, model=None, protocol="strict", **train):
    settings = {"steps": 24, "batch_size": 16, "learning_rate": 3e-3, "warmup": 4, "eval_every": 6} | train
    return Run(
        task="counting",
        size="tiny",
        protocol=protocol,
        attention=AttentionConfig(name=attention, num_features=num_features, options=options or {}),
        model=ModelConfig(width=16, hidden=16, classifier=16, **(model or {})),
        train=TrainConfig(**settings),
    )
