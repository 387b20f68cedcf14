"""What is run: frozen dataclasses, checked when made, hashed and stored as JSON.

Only what decides the result stands here; where it runs and how often it is saved does not.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from difflib import get_close_matches
from types import MappingProxyType
from typing import Any, TypeVar, get_args, get_origin, get_type_hints

from spectraformer.checks import check_dropout, require_choice, require_integer, require_number

PRECISIONS = ("auto", "float32", "bfloat16")
PROTOCOLS = ("strict", "published")
ABOVE_ZERO = "a positive finite number"
WORDS = {int: "an integer", float: "a number", str: "text", bool: "true or false"}

C = TypeVar("C")


@dataclass(frozen=True, kw_only=True)
class AttentionConfig:
    """Which attention, and its options.

    Attributes:
        name: "component-weight" such as "oprf-orf", or an attention of :data:`spectraformer.baselines.ATTENTIONS`.
        num_features: m, rows of W; baselines have no use for it.
        options: Further arguments of :class:`spectraformer.FeatureMap` or of the baseline.
    """

    name: str = "oprf-orf"
    num_features: int = 128
    options: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or not self.name:
            raise ValueError(f"attention.name is {self.name!r}; expected a name such as 'oprf-orf' or 'softmax'")
        require_integer("attention.num_features", self.num_features)
        if not isinstance(self.options, Mapping) or not all(isinstance(key, str) for key in self.options):
            raise ValueError(f"attention.options is {self.options!r}; expected a mapping from option names to values")
        try:
            canonical(dict(self.options))
        except TypeError as error:
            raise ValueError(f"attention.options is {self.options!r}; expected JSON values only: {error}") from None
        object.__setattr__(self, "options", MappingProxyType(dict(self.options)))

    def __hash__(self) -> int:
        return hash(canonical(to_json(self)))


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The encoder; the defaults are the paper's.

    Attributes:
        depth: Layers.
        width: Dimension of the residual stream.
        num_heads: Heads; width is a multiple.
        hidden: Hidden dimension of the feed-forward blocks.
        classifier: Hidden dimension of the classifier.
        dropout: On embeddings and on the output of each block, in [0, 1).
    """

    depth: int = 2
    width: int = 64
    num_heads: int = 2
    hidden: int = 128
    classifier: int = 128
    dropout: float = 0.1

    def __post_init__(self) -> None:
        for name in ("depth", "width", "num_heads", "hidden", "classifier"):
            require_integer(f"model.{name}", getattr(self, name))
        if self.width % self.num_heads:
            raise ValueError(f"model.width is {self.width}; expected a multiple of model.num_heads={self.num_heads}")
        check_dropout(self.dropout)


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Training: AdamW with a linear one-cycle schedule.

    Attributes:
        steps: Optimiser steps.
        batch_size: Examples a step.
        learning_rate: At the peak of the cycle.
        warmup: Steps up to the peak, below ``steps``.
        eval_every: Steps between evaluations on the dev set, which also save a checkpoint.
        select_after: Fraction of the steps after which the best dev accuracy counts, in [0, 1).
        accumulate: Parts a batch is computed in; ``batch_size`` is a multiple.
        clip: Gradients are clipped to [-clip, clip].
        weight_decay: Of AdamW.
        precision: "float32", "bfloat16" (autocast), or "auto": bfloat16 on a GPU.
        seed: Of weights, batch order and dropout.
    """

    steps: int = 50_000
    batch_size: int = 32
    learning_rate: float = 1e-4
    warmup: int = 1000
    eval_every: int = 500
    select_after: float = 0.2
    accumulate: int = 1
    clip: float = 1.0
    weight_decay: float = 0.0
    precision: str = "auto"
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "eval_every", "accumulate"):
            require_integer(f"train.{name}", getattr(self, name))
        require_integer("train.warmup", self.warmup, least=0)
        require_integer("train.seed", self.seed, least=0)
        if self.warmup >= self.steps:
            raise ValueError(f"train.warmup is {self.warmup}; expected fewer than train.steps={self.steps}")
        if self.batch_size % self.accumulate:
            raise ValueError(
                f"train.batch_size is {self.batch_size}; expected a multiple of train.accumulate={self.accumulate}"
            )
        require_number("train.learning_rate", self.learning_rate, 0.0, math.inf, ABOVE_ZERO)
        require_number("train.clip", self.clip, 0.0, math.inf, ABOVE_ZERO)
        require_number("train.weight_decay", self.weight_decay, -math.ulp(0.0), math.inf, "a finite number, 0 or more")
        require_number("train.select_after", self.select_after, -math.ulp(0.0), 1.0, "a fraction in [0, 1)")
        require_choice("train.precision", self.precision, PRECISIONS)


@dataclass(frozen=True, kw_only=True)
class Run:
    """One training run. Equal runs on equal data have equal results.

    Attributes:
        task: Name in :data:`spectraformer.tasks.TASKS`.
        size: "full" or "tiny".
        protocol: "strict", or "published": pooling over the padded length, and text's dev set is its test set.
        attention: Which attention.
        model: Its encoder.
        train: Its training.
    """

    task: str
    size: str = "full"
    protocol: str = "strict"
    attention: AttentionConfig = field(default_factory=AttentionConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    train: TrainConfig = field(default_factory=TrainConfig)

    def __post_init__(self) -> None:
        for name in ("task", "size"):
            if not isinstance(getattr(self, name), str):
                raise ValueError(f"{name} is {getattr(self, name)!r}; expected a name")
        require_choice("protocol", self.protocol, PROTOCOLS)
        for name, kind in (("attention", AttentionConfig), ("model", ModelConfig), ("train", TrainConfig)):
            if not isinstance(getattr(self, name), kind):
                raise ValueError(f"{name} is {getattr(self, name)!r}; expected a {kind.__name__}")


def canonical(value: Any) -> str:
    """JSON with sorted keys and no spaces: equal values give equal text. NaN and infinity are a ``TypeError``."""
    try:
        return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)
    except ValueError as error:
        raise TypeError(str(error)) from None


def digest(value: Any) -> str:
    """sha256 of the canonical JSON, in hexadecimal."""
    return hashlib.sha256(canonical(value).encode()).hexdigest()


def to_json(config: Any) -> Any:
    """A configuration as JSON values."""
    if dataclasses.is_dataclass(config) and not isinstance(config, type):
        return {item.name: to_json(getattr(config, item.name)) for item in dataclasses.fields(config)}
    return dict(config) if isinstance(config, Mapping) else config


def from_json(kind: type[C], value: Any, where: str = "") -> C:
    """The inverse of :func:`to_json`.

    Raises:
        ValueError: For missing, unknown or wrongly typed fields, naming the field and the nearest that exists.
    """
    if not isinstance(value, Mapping):
        raise ValueError(
            f"{where or kind.__name__} is {value!r}; expected an object with the fields of {kind.__name__}"
        )
    fields = {item.name: item for item in dataclasses.fields(kind)}  # type: ignore[arg-type]
    for name in value:
        if name not in fields:
            raise ValueError(_unknown(f"{where}{name}", name, list(fields), where))
    types = get_type_hints(kind)
    given = {name: _convert(types[name], item, f"{where}{name}") for name, item in value.items()}
    missing = [
        name
        for name, item in fields.items()
        if name not in given and item.default is dataclasses.MISSING and item.default_factory is dataclasses.MISSING
    ]
    if missing:
        raise ValueError(f"{kind.__name__} has no {', '.join(where + name for name in missing)}")
    return kind(**given)


def replace(run: Run, changes: Mapping[str, Any]) -> Run:
    """A run with other values of some fields, named by their path.

    Args:
        run: Where the others come from.
        changes: From paths such as "train.steps" or "attention.options.center" to values.

    Raises:
        ValueError: For paths that name no field, and for values that do not fit.
    """
    tree = to_json(run)
    for path, value in changes.items():
        *parents, last = path.split(".")
        at: Any = tree
        for depth, name in enumerate(parents):
            if not isinstance(at, dict) or not isinstance(at.get(name), dict):
                inside = ".".join(parents[:depth])
                choices = [key for key, item in at.items() if isinstance(item, dict)] if isinstance(at, dict) else []
                raise ValueError(_unknown(path, name, choices, inside and inside + "."))
            at = at[name]
        free = parents[-1:] == ["options"]
        if not free and last not in at:
            raise ValueError(_unknown(path, last, list(at), "".join(name + "." for name in parents)))
        if not free and isinstance(at[last], dict) and not isinstance(value, Mapping):
            inside = ", ".join(f"{path}.{name}" for name in at[last]) or f"{path}.NAME"
            raise ValueError(f"{path} is {value!r}; expected one of its fields to be set: {inside}")
        at[last] = value
    return from_json(Run, tree)


def _unknown(path: str, name: str, choices: list[str], inside: str) -> str:
    if not choices:
        return f"unknown setting {path!r}: {path.rpartition('.')[0]!r} has no settings inside"
    near = get_close_matches(name, choices, n=1, cutoff=0.4)
    hint = f"; did you mean {inside + near[0]!r}?" if near else ""
    return f"unknown setting {path!r}; expected one of {', '.join(inside + choice for choice in choices)}{hint}"


def _convert(kind: Any, value: Any, where: str) -> Any:
    """JSON has one kind of number, and no dataclasses."""
    if dataclasses.is_dataclass(kind):
        return from_json(kind, value, where + ".")  # type: ignore[arg-type]
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    plain = get_origin(kind) or kind
    if plain in (int, float, str, bool) and (
        not isinstance(value, plain) or (plain is int and isinstance(value, bool))
    ):
        raise ValueError(f"{where} is {value!r}; expected {WORDS[plain]}")
    if get_args(kind) and not isinstance(value, Mapping):
        raise ValueError(f"{where} is {value!r}; expected a mapping from option names to values")
    return value
