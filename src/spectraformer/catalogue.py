"""Tables of all variants and attentions as Markdown, made from the code: ``python -m spectraformer.catalogue``."""

from __future__ import annotations

import argparse
import inspect
import re
from collections.abc import Callable
from pathlib import Path

import torch

from spectraformer import registry
from spectraformer.baselines import ATTENTIONS
from spectraformer.baselines.base import Baseline
from spectraformer.components import COMPONENTS, ComponentFunction
from spectraformer.config import AttentionConfig
from spectraformer.model import build_attention
from spectraformer.weights import WEIGHTS
from spectraformer.weights.base import WeightMatrix

MARKS: dict[registry.Standing, str] = {
    "unbiased": "U",
    "vanishing": "B",
    "deterministic": "D",
    "learned": "L",
    "refused": "–",
}
# The encoder of the Long Range Arena.
HEADS, HEAD_DIM, LENGTH = 2, 32, 1024
LEGEND = """\
| mark | standing | what it means |
|---|---|---|
| U | unbiased | E φ(q)·φ(k) is the kernel exactly, for any number of features |
| B | biased, vanishing | the bias vanishes as the head dim, the number of features or the order of the rule grows |
| D | deterministic | a fixed rule without randomness to average over; accurate for small norms |
| L | learned | the rows have a learned law, Gaussian or nearly so at the start, then with a kernel of its own |
| – | refused | has no meaning; the error says why and what to use instead |
| ± | | beside a mark: features are signed, so denominators are guarded and counted; without it they are positive |
"""
REFUSED = """\
Refused are the discrete functions with rows that are not exactly N(0, I): the exponents of their features are
quantiles of Φ(ω), and with any other rows they follow the wrong law, so the product of features estimates no kernel.
"""


def claim(cls: object) -> str:
    """The first sentence of a docstring."""
    text = inspect.getdoc(cls) or ""
    first = re.sub(r":class:`(\w+)`", r"\1", " ".join(text.split("\n\n")[0].split()))
    return first.rstrip(".")


def _references(cls: type) -> str:
    """Identifiers and venues named in the References section."""
    text = inspect.getdoc(cls) or ""
    if "References:" not in text:
        return ""
    lines = text.split("References:")[1].splitlines()
    found = " ".join(line.strip() for line in lines if line.strip())
    found = re.sub(r"(?<![\w/.])(\d{4}\.\d{4,5})", r"[\1](https://arxiv.org/abs/\1)", found)
    return found.rstrip(".").replace("|", "\\|")


def _options(cls: type) -> str:
    parameters = inspect.signature(cls).parameters.values()
    hidden = ("num_heads", "generator")
    named = [p for p in parameters if p.kind is p.KEYWORD_ONLY and p.name not in hidden]
    return ", ".join(f"`{p.name}={p.default!r}`" for p in named)


def _cell(component: type[ComponentFunction], weight: WeightMatrix) -> str:
    standing = registry.standing(component, weight)
    signed = standing != "refused" and not (component.positive and not weight.signed)
    return MARKS[standing] + ("±" if signed else "")


def variants_page() -> str:
    """The whole page; weight matrices with their default options, at a common head dim."""
    generator = torch.Generator().manual_seed(0)
    weights = {name: factory(16, 32, generator=generator) for name, factory in WEIGHTS.items()}
    pairs = [registry.standing(f, w) for f in COMPONENTS.values() for w in weights.values()]
    counts = ", ".join(f"{pairs.count(key)} {key}" for key in MARKS)
    lines = [
        "# Variants",
        "",
        "Made from the code by `python -m spectraformer.catalogue`; a test keeps it so. A variant is named",
        "`component-weight`, for example `oprf-orf`.",
        "",
        f"{len(COMPONENTS)} component functions × {len(weights)} weight matrices = {len(pairs)} pairs: {counts}.",
        "",
        LEGEND,
        "| f \\ W | " + " | ".join(weights) + " |",
        "|---|" + "---|" * len(weights),
        *(
            f"| {name} | " + " | ".join(_cell(component, weight) for weight in weights.values()) + " |"
            for name, component in COMPONENTS.items()
        ),
        "",
        REFUSED,
        "## Component functions",
        "",
        "| name | what it is | options | source |",
        "|---|---|---|---|",
        *(f"| `{n}` | {claim(f)} | {_options(f)} | {_references(f)} |" for n, f in COMPONENTS.items()),
        "",
        "## Weight matrices",
        "",
        "| name | what it is | standing | options | source |",
        "|---|---|---|---|---|",
        *(
            f"| `{n}` | {claim(f)} | {weights[n].claim} | {_options(f)} | {_references(f)} |"
            for n, f in WEIGHTS.items()
        ),
        "",
    ]
    return "\n".join(lines)


def attentions_page() -> str:
    """Every attention by name: what it costs, what masks it takes, what it adds to a model, and where it is from."""
    lines = [
        "# Attentions",
        "",
        "Made from the code by `python -m spectraformer.catalogue`; a test keeps it so. n is the number of tokens, m",
        "that of random features, d the head dim. Parameters are what an attention adds to one layer at its defaults,",
        f"with {HEADS} heads of {HEAD_DIM} and {LENGTH} tokens; the projections that all have are not counted.",
        "",
        "All take any length up to the longest they were made for, and exact key padding: padding is seen by no query.",
        "",
        "## To compare with",
        "",
        "| name | what it is | time | memory | causal | cross | parameters | options | source |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for name, factory in ATTENTIONS.own.items():
        assert isinstance(factory, type) and issubclass(factory, Baseline)
        forms = (_tick(factory.has_causal_form), _tick(factory.has_cross_form))
        cells = (claim(factory), factory.complexity, factory.memory, *forms, _added(name), _options(factory))
        lines.append(f"| `{name}` | {' | '.join(cells)} | {factory.source} |")
    lines += [
        "",
        "## Random features",
        "",
        "A name is `component-weight`. Time is n·m·d and memory n + m·d for all of them, causal too; a state of",
        "m·(d + 1) numbers a head decodes token by token. Cross attention is always possible.",
        "",
        "| component function | features | causal | parameters | source |",
        "|---|---|---|---|---|",
    ]
    for name, component in COMPONENTS.items():
        causal = _tick(not component.needs_minimum)
        sign = "positive" if component.positive else "signed"
        lines.append(f"| `{name}` | {sign} | {causal} | {_added(f'{name}-mc')} | {_references(component)} |")
    lines += ["", "| weight matrix | parameters | source |", "|---|---|---|"]
    lines += [f"| `{name}` | {_added(f'posrf-{name}')} | {_references(weight)} |" for name, weight in WEIGHTS.items()]
    return "\n".join([*lines, ""])


def _tick(has: bool) -> str:
    return "yes" if has else "no"


def _added(name: str) -> str:
    """How many trained numbers an attention adds to a layer."""
    attention = build_attention(AttentionConfig(name=name), HEAD_DIM, HEADS, LENGTH, 0)
    return f"{sum(parameter.numel() for parameter in attention.parameters()):,}"


PAGES: dict[str, Callable[[], str]] = {"variants.md": variants_page, "attentions.md": attentions_page}


def main() -> None:
    """Writes the pages."""
    parser = argparse.ArgumentParser(description="Write the tables of all variants and attentions as Markdown.")
    parser.add_argument("--out", type=Path, default=Path("docs"), help="folder to write to")
    folder: Path = parser.parse_args().out
    for name, page in PAGES.items():
        (folder / name).write_text(page(), encoding="utf-8")


if __name__ == "__main__":
    main()
