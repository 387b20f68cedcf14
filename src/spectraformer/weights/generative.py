"""Rows made by a neural network from Gaussian noise: dgm, inn."""

from __future__ import annotations

import math
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional

from ..checks import require_integer
from .base import Projection
from .learned import LearnedWeight, parameter


class HeadwiseMLP(nn.Module):
    """g independent multilayer perceptrons with leaky ReLU, zero at initialisation by their last layer.

    Args:
        copies: g.
        widths: Sizes of input, hidden layers and output.
        generator: CPU generator; hidden weights are N(0, 2 / fan_in).
    """

    def __init__(self, copies: int, widths: tuple[int, ...], generator: torch.Generator) -> None:
        super().__init__()
        self.weights = nn.ParameterList()
        self.biases = nn.ParameterList()
        for fan_in, fan_out in pairwise(widths):
            weight = torch.randn(copies, fan_in, fan_out, generator=generator, dtype=torch.float64)
            self.weights.append(parameter(weight * math.sqrt(2 / max(1, fan_in))))
            self.biases.append(parameter(torch.zeros(copies, 1, fan_out)))
        nn.init.zeros_(self.weights[-1])

    def forward(self, x: Tensor) -> Tensor:  # (g, m, widths[0]) -> (g, m, widths[-1])
        last = len(self.weights) - 1
        for layer, (weight, bias) in enumerate(zip(self.weights, self.biases, strict=True)):
            x = torch.baddbmm(bias, x, weight)
            if layer < last:
                x = functional.leaky_relu(x, 0.2)
        return x


class _NoiseDriven(LearnedWeight):
    """A W whose rows are a trained function of the Gaussian buffer ``noise``, (g, m, d)."""

    noise: Tensor

    def __init__(
        self,
        head_dim: int,
        num_features: int,
        *,
        num_heads: int | None = None,
        generator: torch.Generator,
    ) -> None:
        super().__init__(head_dim, num_features, num_heads=num_heads, generator=generator)
        self.register_buffer("noise", torch.empty(self.num_copies, num_features, head_dim))
        self.redraw(generator)

    @torch.no_grad()
    def redraw(self, generator: torch.Generator) -> None:
        self.noise.copy_(torch.randn(self.noise.shape, generator=generator, dtype=torch.float64))


class DeepGenerative(_NoiseDriven):
    r"""A trained generator network: **its own kernel**, the Gaussian one at initialisation.

    .. math:: \omega_i = \varepsilon_i W_0 + g_\theta(\varepsilon_i), \quad \varepsilon_i \sim N(0, I_d)

    with g a perceptron d, 2d, 4d, d whose last layer starts at zero and :math:`W_0` at I. :meth:`redraw`
    replaces :math:`\varepsilon`; done every step in training it fits the law rather than m points of it.

    Args:
        head_dim: d, at least 1.
        num_features: m, at least 1.
        num_heads: Sets of parameters; ``None`` for one that heads share.
        generator: CPU generator, the only source of randomness.

    Raises:
        ValueError: If a size is not a positive integer.

    References:
        Chowdhury et al., On learning the transformer kernel, arXiv 2110.08323.
    """

    def __init__(
        self,
        head_dim: int,
        num_features: int,
        *,
        num_heads: int | None = None,
        generator: torch.Generator,
    ) -> None:
        super().__init__(head_dim, num_features, num_heads=num_heads, generator=generator)
        d = head_dim
        self.skip = parameter(torch.eye(d).repeat(self.num_copies, 1, 1))
        self.network = HeadwiseMLP(self.num_copies, (d, 2 * d, 4 * d, d), generator)

    def forward(self) -> Projection:
        return self._equally_weighted(self.noise @ self.skip + self.network(self.noise))


class InvertibleFlow(_NoiseDriven):
    r"""A trained invertible network of couplings: **its own kernel**, the Gaussian one at initialisation.

    .. math:: \omega = T_K \circ \dots \circ T_1(\varepsilon), \quad
              T_k: (a, b) \mapsto \bigl(a,\; b \odot e^{\tanh s_k(a)} + t_k(a)\bigr),
              \quad \varepsilon \sim N(0, I_d)

    (a, b) is a random split of the coordinates into halves, the next layer swaps their roles, and s, t are
    perceptrons d/2, 2d, d that start at zero. The density is exact (:meth:`log_density`). :meth:`redraw`
    replaces :math:`\varepsilon`; the splits stay.

    Args:
        head_dim: d, at least 1; at d = 1 a layer is one scale and one shift.
        num_features: m, at least 1.
        num_heads: Sets of parameters; ``None`` for one that heads share.
        num_layers: K, at least 1; an even number moves all coordinates equally often.
        generator: CPU generator, the only source of randomness.

    Raises:
        ValueError: If a size is not a positive integer.

    References:
        Dinh, Sohl-Dickstein and Bengio, Density estimation using Real NVP, arXiv 1605.08803.
    """

    fixed: Tensor
    moved: Tensor

    def __init__(
        self,
        head_dim: int,
        num_features: int,
        *,
        num_heads: int | None = None,
        num_layers: int = 4,
        generator: torch.Generator,
    ) -> None:
        super().__init__(head_dim, num_features, num_heads=num_heads, generator=generator)
        require_integer("num_layers", num_layers)
        d, self.num_layers = head_dim, num_layers
        self.layers = nn.ModuleList()
        splits = []
        for layer in range(num_layers):
            if layer % 2 == 0:
                order = torch.randperm(d, generator=generator)
            splits.append(order if layer % 2 == 0 else order.flip(0))
            # Without inputs, at d = 1, a hidden layer would be a constant that no gradient reaches.
            hidden = (2 * d,) if d > 1 else ()
            widths = (d // 2, *hidden, 2 * (d - d // 2))
            self.layers.append(HeadwiseMLP(self.num_copies, widths, generator))
        split = torch.stack(splits)
        self.register_buffer("fixed", split[:, : d // 2].contiguous())
        self.register_buffer("moved", split[:, d // 2 :].contiguous())

    def _flow(self) -> tuple[Tensor, Tensor]:  # (g, m, d), (g, m)
        x = self.noise
        log_det = x.new_zeros(x.shape[:2])
        for layer, network in enumerate(self.layers):
            raw_scale, shift = network(x[..., self.fixed[layer]]).chunk(2, dim=-1)
            log_scale = raw_scale.tanh()
            moved = self.moved[layer]
            x = x.index_copy(-1, moved, x[..., moved] * log_scale.exp() + shift)
            log_det = log_det + log_scale.sum(-1)
        return x, log_det

    def forward(self) -> Projection:
        return self._equally_weighted(self._flow()[0])

    def log_density(self) -> Tensor:  # (g, m)
        """Log density of the rows under the learned law; a regulariser towards N(0, I) needs it."""
        gaussian = -0.5 * (self.noise.square().sum(-1) + self.head_dim * math.log(2 * math.pi))
        return gaussian - self._flow()[1]
