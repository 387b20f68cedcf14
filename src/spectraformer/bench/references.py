r"""What each competitor should compute, in float64 with every weight in memory, and how far from it an output is.

Legend: b batch, h heads, n tokens, r of them compared, d head dim, m features.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from spectraformer.bench.workload import Inputs

# From queries, keys and values of one head, (1, 1, n, d) float64, and rows (r,) to the output there, (1, 1, r, d).
Reference = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
Run = Callable[[Tensor, Tensor, Tensor], Tensor]
SAMPLED_ROWS = 256


def softmax_reference(*, is_causal: bool) -> Reference:
    r"""Softmax attention, :math:`\mathrm{softmax}(q k^\top/\sqrt d)\,v`."""

    def run(query: Tensor, key: Tensor, value: Tensor, rows: Tensor) -> Tensor:
        logits = query[..., rows, :] @ key.mT * query.shape[-1] ** -0.5
        return _averaged((logits - logits.amax(-1, keepdim=True)).exp(), value, rows if is_causal else None)

    return run


def random_feature_reference(omega: Tensor, *, is_causal: bool, floor: float = 0.0) -> Reference:
    r"""Attention with the weights :math:`\varphi(q)\cdot\varphi(k)` of positive random features.

    .. math:: \varphi_i(x) = e^{\omega_i\cdot x' - |x'|^2/2 - c} + \epsilon, \qquad x' = x\,d^{-1/4}

    With :math:`\epsilon = 0` the shift c cancels. With it, c is what performer-pytorch takes: the largest logit
    :math:`\omega_i\cdot x'` of a query, and of all keys and features of a head.

    Args:
        omega: Rows of W, (m, d).
        is_causal: Whether query t sees keys 0..t only.
        floor: :math:`\epsilon`, >= 0.

    References:
        Choromanski et al., Rethinking Attention with Performers, arXiv 2009.14794, Lemma 1.
    """
    omega = omega.double()

    def features(x: Tensor, dims: tuple[int, ...]) -> Tensor:
        x = x * x.shape[-1] ** -0.25
        logits = x @ omega.mT
        half = 0.5 * x.square().sum(-1, keepdim=True)
        return (logits - half - logits.amax(dims, keepdim=True).detach()).exp() + floor

    def run(query: Tensor, key: Tensor, value: Tensor, rows: Tensor) -> Tensor:
        weights = features(query[..., rows, :], (-1,)) @ features(key, (-2, -1)).mT
        return _averaged(weights, value, rows if is_causal else None)

    return run


def feature_map_reference(features: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]], *, is_causal: bool) -> Reference:
    """Attention with the weights that a feature map's own dense features give.

    Args:
        features: From queries and keys to phi(q) and phi(k), (b, h, n, m), in float64.
        is_causal: Whether query t sees keys 0..t only.
    """

    def run(query: Tensor, key: Tensor, value: Tensor, rows: Tensor) -> Tensor:
        phi_query, phi_key = features(query, key)
        return _averaged(phi_query[..., rows, :] @ phi_key.mT, value, rows if is_causal else None)

    return run


def _averaged(weights: Tensor, value: Tensor, causal_rows: Tensor | None) -> Tensor:  # (b, h, r, n), (b, h, n, d)
    if causal_rows is not None:
        weights = weights * (torch.arange(value.shape[-2], device=value.device) <= causal_rows[:, None])
    return weights @ value / weights.sum(-1, keepdim=True)


def largest_error(run: Run, reference: Reference, inputs: Inputs, *, most_rows: int) -> dict[str, float]:
    """Relative error of an output, and of gradients where inputs require them, against float64.

    The competitor gets all of the inputs; the first and last head of the first and last batch item are compared.

    Args:
        run: The competitor.
        reference: What it should compute.
        inputs: In the competitor's dtype: the reference gets the same rounded numbers.
        most_rows: Longest sequence of which all outputs and gradients are compared; of longer ones SAMPLED_ROWS
            outputs are, without gradients.

    Returns:
        By name ("output", "query", ...), the norm of the difference over the norm of the reference, the largest over
        the heads compared; infinite where anything is not finite.
    """
    tokens = (inputs.query, inputs.key, inputs.value)
    batch, heads, n, _ = inputs.query.shape
    every = n <= most_rows
    rows = torch.linspace(0, n - 1, n if every else SAMPLED_ROWS, dtype=torch.float64, device=inputs.query.device)
    rows = rows.round().long()
    backward = inputs.query.requires_grad
    with torch.set_grad_enabled(backward):
        out = run(*tokens)
        got = (out, *torch.autograd.grad(out, tokens, inputs.grad)) if backward else (out,)
    backward = backward and every
    names = ("output", "query", "key", "value") if backward else ("output",)
    found = dict.fromkeys(names, 0.0)
    for item in sorted({0, batch - 1}):
        for head in sorted({0, heads - 1}):
            place = (slice(item, item + 1), slice(head, head + 1))
            exact = [x[place].detach().double().requires_grad_(backward) for x in tokens]
            with torch.set_grad_enabled(backward):
                want = [reference(exact[0], exact[1], exact[2], rows)]
                if backward:
                    want += torch.autograd.grad(want[0], exact, inputs.grad[place].double())
            have = [x[place].detach() for x in got]
            have[0] = have[0][..., rows, :]
            for name, x, y in zip(names, have, want, strict=False):
                error = ((x.double() - y).norm() / y.detach().norm()).item()
                found[name] = max(found[name], error if error == error else float("inf"))
    return found
