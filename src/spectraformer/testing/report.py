"""What the contract checks share: the report, the statistics, the inputs."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

# One false alarm in 150 000 tests of a standard normal z.
MAX_Z = 4.5
# Some rules integrate low degrees exactly in every draw: what is left is rounding, alike in all of them.
ROUNDING = 1e-6


class ContractError(AssertionError):
    """A weight matrix or component function breaks its contract; the message lists how."""


@dataclass
class Report:
    """What a contract check found.

    Attributes:
        subject: Name of what was checked.
        passed: Checks that hold, in words.
        failed: Checks that do not, each with what was found.
    """

    subject: str
    passed: list[str] = field(default_factory=list)
    failed: list[str] = field(default_factory=list)

    def expect(self, holds: bool, claim: str, found: str = "") -> None:
        """Records one check."""
        (self.passed if holds else self.failed).append(claim if holds or not found else f"{claim}; found {found}")

    def attempt(self, claim: str, check: Callable[[], None]) -> None:
        """Runs checks that may raise; an exception is a failure of ``claim``, not the end of the report."""
        try:
            check()
        except Exception as error:
            self.failed.append(f"{claim}; raised {type(error).__name__}: {error}")

    def __str__(self) -> str:
        lines = [f"{self.subject}: {len(self.passed)} checks passed, {len(self.failed)} failed"]
        return "\n".join(
            lines + [f"  FAILED  {text}" for text in self.failed] + [f"  passed  {x}" for x in self.passed]
        )

    def verdict(self) -> Report:
        """The report itself, or ``ContractError`` if anything failed."""
        if self.failed:
            raise ContractError(str(self))
        return self


def seeded(seed: int) -> torch.Generator:
    """A CPU generator."""
    return torch.Generator().manual_seed(seed)


def name_of(factory: object) -> str:
    """What a report calls a factory."""
    return getattr(factory, "__name__", type(factory).__name__)


def z_score(samples: Tensor, expected: float) -> float:
    """(mean - expected) / standard error of independent samples, (n,); rounding of float32 counts as error."""
    samples = samples.detach().double()
    error = samples.std() / math.sqrt(samples.numel())
    return float((samples.mean() - expected) / error.clamp_min(ROUNDING * max(1.0, abs(expected))))


def random_tokens(
    d: int, n: int, norm: float, seed: int, batch: int = 1, heads: int = 2
) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys of the given root mean square norm after scaling, and values, (batch, heads, n, d)."""
    generator = seeded(seed)
    x, y, v = (torch.randn(batch, heads, n, d, generator=generator) for _ in range(3))
    size = norm * d**0.25 / math.sqrt(d)
    return x * size, y * size, v
