"""From a name to the object it stands for: the project's own tables first, then other packages' entry points.

A package adds its own variants without touching this one::

    [project.entry-points."spectraformer.weights"]
    my-weight = "my_package:MyWeight"
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping
from difflib import get_close_matches
from importlib.metadata import EntryPoint, entry_points
from typing import Any, Literal, TypeVar

import torch

from spectraformer import components, weights
from spectraformer.components import ComponentFunction
from spectraformer.weights.base import Claim, WeightMatrix

T = TypeVar("T")
Standing = Claim | Literal["refused"]


class Table(Mapping[str, T]):
    """A read-only mapping from names to factories; unknown names are looked up among entry points, then refused.

    Args:
        axis: What the names name, for error messages.
        own: The project's own entries.
        group: Entry-point group of other packages' entries; it cannot replace an own entry.
    """

    def __init__(self, axis: str, own: Mapping[str, T], group: str) -> None:
        self.axis = axis
        self.own = own
        self.group = group

    def _foreign(self) -> dict[str, EntryPoint]:
        return {entry.name: entry for entry in entry_points(group=self.group) if entry.name not in self.own}

    def __getitem__(self, name: str) -> T:
        if name in self.own:
            return self.own[name]
        entry = self._foreign().get(name)
        if entry is None:
            raise KeyError(name)
        try:
            factory: T = entry.load()
        except Exception as error:  # whatever another package does when it is imported
            raise ValueError(
                f"{self.axis} {name!r} cannot be loaded from {entry.value}: {type(error).__name__}: {error}"
            ) from error
        return factory

    def __contains__(self, name: object) -> bool:
        return name in self.own or name in self._foreign()

    def loadable(self) -> tuple[dict[str, T], dict[str, str]]:
        """All that can be loaded, by name, and why the others cannot be."""
        found, broken = {}, {}
        for name in self:
            try:
                found[name] = self[name]
            except ValueError as error:
                broken[name] = str(error)
        return found, broken

    def __iter__(self) -> Iterator[str]:
        yield from self.own
        yield from sorted(self._foreign())

    def __len__(self) -> int:
        return len(self.own) + len(self._foreign())

    def __repr__(self) -> str:
        return f"{self.axis}: {', '.join(self)}"

    def lookup(self, name: object) -> T:
        """The factory called ``name``.

        Raises:
            ValueError: If there is none; the message lists the names and the nearest.
        """
        if isinstance(name, str) and name in self:
            return self[name]
        raise ValueError(f"unknown {self.axis} {name!r}; expected one of {', '.join(self)}{nearest(name, self)}")


def nearest(name: object, choices: Iterable[str]) -> str:
    """The end of an error message: which of the choices may have been meant."""
    near = get_close_matches(str(name).lower(), list(choices), n=1, cutoff=0.5)
    return f"; did you mean {near[0]!r}?" if near else ""


COMPONENTS: Table[type[ComponentFunction]] = Table(
    "component function", components.COMPONENTS, "spectraformer.components"
)
WEIGHTS: Table[type[WeightMatrix]] = Table("weight matrix", weights.WEIGHTS, "spectraformer.weights")


def parse_variant(variant: str) -> tuple[str, str]:
    """Splits ``component-weight``, such as ``oprf-fastfoodl``, into its two names.

    Raises:
        ValueError: If either name is missing or unknown.
    """
    component, dash, weight = variant.partition("-") if isinstance(variant, str) else ("", "", "")
    if not dash or not component or not weight:
        raise ValueError(f"variant is {variant!r}; expected 'component-weight', for example 'oprf-orf'")
    COMPONENTS.lookup(component)
    WEIGHTS.lookup(weight)
    return component, weight


def refusal(component: ComponentFunction | type[ComponentFunction], weight: WeightMatrix) -> str | None:
    """Why f x W has no meaning; None if it has.

    Only discrete features care: their exponents are quantiles of Phi(omega), whose law is right only if each
    row of W is exactly N(0, I).
    """
    if not component.needs_gaussian_rows or weight.gaussian_rows:
        return None
    return (
        "its exponents are quantiles of the rows of W and need rows that are exactly N(0, I), which "
        f"{type(weight).__name__} ({weight.claim}) does not have: the estimate would be of no kernel"
    )


def standing(component: ComponentFunction | type[ComponentFunction], weight: WeightMatrix) -> Standing:
    """What the pair promises: the claim of W, or "refused"."""
    return "refused" if refusal(component, weight) else weight.claim


def meaningful_variants() -> tuple[str, ...]:
    """Every ``component-weight`` that can be loaded and has meaning."""
    matrices = _small_weights()
    return tuple(
        f"{component}-{weight}"
        for component, factory in COMPONENTS.loadable()[0].items()
        for weight, small in matrices.items()
        if refusal(factory, small) is None
    )


def _small_weights() -> dict[str, WeightMatrix]:
    """A small W of every family that can be loaded, to ask what its rows are."""
    generator = torch.Generator().manual_seed(0)
    return {name: factory(2, 8, generator=generator) for name, factory in WEIGHTS.loadable()[0].items()}


def require_meaning(component: ComponentFunction, weight: WeightMatrix) -> None:
    """Raises ``ValueError``, with the reason and what to use instead, if f x W has no meaning."""
    reason = refusal(component, weight)
    if reason is None:
        return
    accepted = [name for name, small in _small_weights().items() if refusal(component, small) is None]
    raise ValueError(
        f"{type(component).__name__} with {type(weight).__name__} is refused: {reason}; use it with one of "
        f"{', '.join(accepted)}, or another component function with this weight matrix"
    )


def build_weight(
    weight: str | WeightMatrix,
    options: Mapping[str, Any] | None,
    head_dim: int,
    num_features: int,
    num_heads: int | None,
    share: bool | None,
    generator: torch.Generator,
) -> WeightMatrix:
    """The weight matrix of a feature map: made from its name, or the object given, checked.

    Args:
        weight: Name or object.
        options: Options for a name.
        head_dim: d.
        num_features: m.
        num_heads: Heads of the feature map, or None.
        share: One W for all heads; None shares a random W but not a learned one.
        generator: Source of its randomness.

    Raises:
        ValueError: For unknown names and options, and for an object that does not fit.
    """
    _require_mapping("weight_options", options)
    if share is False and num_heads is None:
        raise ValueError("share_weight=False needs num_heads: how many weight matrices to draw")
    if isinstance(weight, WeightMatrix):
        if options:
            raise ValueError("weight_options are for a weight given by name; build the object with them instead")
        if weight.head_dim != head_dim:
            raise ValueError(f"weight has head_dim={weight.head_dim}; expected {head_dim}")
        if weight.num_heads not in (None, num_heads):
            raise ValueError(f"weight has num_heads={weight.num_heads}, but the feature map has {num_heads}")
        return weight
    factory = WEIGHTS.lookup(weight)
    shared = (not factory.learned) if share is None else share
    return build(
        factory,
        f"weight matrix {weight!r}",
        options,
        (head_dim, num_features),
        num_heads=None if shared else num_heads,
        generator=generator,
    )


def build_component(
    component: str | ComponentFunction,
    options: Mapping[str, Any] | None,
    head_dim: int,
    num_heads: int | None,
    generator: torch.Generator,
) -> ComponentFunction:
    """The component function of a feature map: made from its name, or the object given, checked.

    Raises:
        ValueError: For unknown names and options, and for an object that does not fit.
    """
    _require_mapping("component_options", options)
    if isinstance(component, ComponentFunction):
        if options:
            raise ValueError("component_options are for a component given by name; build the object with them instead")
        if component.head_dim != head_dim:
            raise ValueError(f"component has head_dim={component.head_dim}; expected {head_dim}")
        if component.num_heads not in (None, num_heads):
            raise ValueError(f"component has num_heads={component.num_heads}, but the feature map has {num_heads}")
        return component
    return build(
        COMPONENTS.lookup(component),
        f"component function {component!r}",
        options,
        (head_dim,),
        num_heads=num_heads,
        generator=generator,
    )


def _require_mapping(name: str, options: object) -> None:
    if options is not None and not isinstance(options, Mapping):
        raise ValueError(f"{name} is {options!r}; expected a mapping from option names to values")


def build(
    factory: Callable[..., T],
    name: str,
    options: Mapping[str, Any] | None,
    sizes: tuple[Any, ...],
    **given: Any,
) -> T:
    """Calls a factory with checked options.

    Args:
        factory: A class whose options are its keyword-only arguments.
        name: What it is called in errors.
        options: By name, or None.
        sizes: Positional arguments.
        given: Keyword arguments that are not the user's to choose.

    Raises:
        ValueError: For an option it does not have; the message lists those it has.
    """
    known = [
        parameter.name
        for parameter in inspect.signature(factory).parameters.values()
        if parameter.kind is parameter.KEYWORD_ONLY and parameter.name not in given
    ]
    unknown = [option for option in options or {} if option not in known]
    if unknown:
        raise ValueError(
            f"{name} has no option {', '.join(map(repr, unknown))}; its options: {', '.join(known) or 'none'}"
        )
    return factory(*sizes, **given, **(options or {}))
