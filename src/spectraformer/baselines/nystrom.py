"""Nyström attention: softmax attention through the means of segments of the sequence."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from spectraformer import ops
from spectraformer.baselines.base import Baseline
from spectraformer.baselines.masked import masked_attention
from spectraformer.checks import require_integer


def pseudo_inverse(
    matrix: Tensor,  # (..., m, m)
    start: Tensor,  # (..., m, m) or (m, m)
    iterations: int,
) -> Tensor:  # (..., m, m)
    r"""Moore-Penrose inverse of A by an iteration of the third order.

    .. math:: Z_{i+1} = \tfrac14 Z_i (13 I - A Z_i (15 I - A Z_i (7 I - A Z_i)))

    An eigenvalue 1 - r of A Z_i becomes :math:`1 - r^3 (3 + r) / 4`: small ones grow 13 / 4 times an iteration, and
    near 1 the error is cubed. It converges if :math:`|A A^+ - A Z_0| < 1`. Rounding errors along directions that A
    maps to 0 grow 13 / 4 times an iteration as well, so that many more iterations than needed do harm.

    Args:
        matrix: A.
        start: :math:`Z_0`.
        iterations: How many.

    References:
        Nyströmformer (Xiong et al., 2021), arXiv 2102.03902, after Razavi et al. (2014).
    """
    identity = torch.eye(matrix.shape[-1], dtype=matrix.dtype, device=matrix.device)
    # In terms of -Z: signs, factors and identities are part of the products, not passes of their own, nor backward.
    shape = matrix.shape
    matrix, negative = (x.expand(shape).reshape(-1, *shape[-2:]) for x in (matrix, -start))
    for _ in range(iterations):
        product = matrix @ negative
        series = torch.add(1.75 * identity, product, alpha=0.25)
        series = torch.baddbmm(3.75 * identity, product, series)
        series = torch.baddbmm(3.25 * identity, product, series)
        negative = negative @ series
    return -negative.view(shape)


def count_real(
    mask: Tensor | None,  # (b, n)
    length: int,
    device: torch.device,
) -> tuple[Tensor, Tensor]:
    """How many tokens of each sequence are real, (b, 1), 1 if none; and how many up to and with each token, (b, n).

    Without a mask all are, and b is 1.
    """
    seen = torch.arange(1, length + 1, device=device)[None] if mask is None else mask.cumsum(-1)
    return seen[:, -1:].clamp(min=1), seen


class Nystrom(Baseline):
    r"""Nyström approximation of softmax attention, with the means of segments as landmarks.

    .. math::
        \mathrm{softmax}(q \tilde k^T / \sqrt d)\; \mathrm{softmax}(\tilde q \tilde k^T / \sqrt d)^+\;
        \mathrm{softmax}(\tilde q k^T / \sqrt d)\, v

    The landmarks are means of queries and of keys over m segments of the **real** tokens of each sequence, equal to
    within a token, so that padding changes nothing. A sequence of at most m real tokens has each of them as a
    landmark; the three factors then are softmax attention, which is computed without the pseudo-inverse.

    The pseudo-inverse starts at :math:`A^T / (|A|_1 |A|_\infty)`, as in the paper, for each head and sequence by
    itself; public code takes one maximum over the batch, which couples its sequences and slows convergence.

    Args:
        head_dim: d.
        num_heads: h.
        max_length: Not used: any length goes.
        seed: Of the convolution's first weights.
        num_landmarks: m; 128 in the Long Range Arena runs of arXiv 2405.15310.
        iterations: Of the pseudo-inverse; 6 in the paper. Many more amplify rounding, see :func:`pseudo_inverse`.
        conv_kernel: Odd width, in tokens, of a depthwise convolution of values, one filter a head, that is added to
            the output; None: none, as in arXiv 2405.15310. The paper's own Long Range Arena runs have 35.

    Raises:
        ValueError: For sizes and options that do not fit.

    References:
        Nyströmformer (Xiong et al., 2021), arXiv 2102.03902.
    """

    complexity = "n m"
    memory = "n m"
    source = "Xiong et al. 2021, arXiv 2102.03902"
    has_cross_form = False

    def __init__(
        self,
        head_dim: int,
        num_heads: int,
        max_length: int,
        seed: int,
        *,
        num_landmarks: int = 128,
        iterations: int = 6,
        conv_kernel: int | None = None,
    ) -> None:
        super().__init__(head_dim, num_heads, max_length, seed)
        require_integer("num_landmarks", num_landmarks)
        require_integer("iterations", iterations)
        self.num_landmarks = num_landmarks
        self.iterations = iterations
        self.conv_kernel = conv_kernel
        self.conv: nn.Parameter | None = None
        if conv_kernel is not None:
            require_integer("conv_kernel", conv_kernel)
            if conv_kernel % 2 == 0:
                raise ValueError(
                    f"conv_kernel is {conv_kernel}; expected an odd width, with as many tokens before as after; "
                    f"nearest: {conv_kernel + 1}"
                )
            bound = conv_kernel**-0.5
            weights = torch.rand(num_heads, 1, conv_kernel, 1, generator=torch.Generator().manual_seed(seed))
            self.conv = nn.Parameter((2 * weights - 1) * bound)

    def attend(
        self,
        query: Tensor,  # (b, h, n, d)
        key: Tensor,  # (b, h, n, d)
        value: Tensor,  # (b, h, n, e)
        mask: Tensor | None,  # (b, n)
        is_causal: bool,
    ) -> Tensor:
        """Attention output, (b, h, n, e)."""
        dtype = torch.promote_types(torch.promote_types(query.dtype, key.dtype), value.dtype)
        q, k, v = (x.to(dtype) for x in (query, key, value))
        with ops.full_precision(query.device):
            out = self._approximate(q, k, v, mask)
            if self.conv is not None:
                reach = self.conv.shape[2] // 2
                out = out + functional.conv2d(v, self.conv.to(dtype), padding=(reach, 0), groups=self.num_heads)
        return out.to(value.dtype)

    def _approximate(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        count, seen = count_real(mask, q.shape[2], q.device)
        landmarks = min(self.num_landmarks, q.shape[2])
        number = torch.arange(landmarks, device=q.device)
        used = count.clamp(max=landmarks)  # (b, 1)
        segment = (seen - 1) * used // count  # (b, n)
        member = segment[:, None, :] == number[:, None]  # (b, m, n)
        if mask is not None:
            member = member & mask[:, None, :]
        # A product with m rows: scattered sums would differ from run to run on a GPU.
        size = member.sum(-1).clamp(min=1)[:, None, :, None].to(q.dtype)
        # One for all heads: one for each would read the members, the largest of all here, as often.
        together = torch.cat((q, k, v), -1).transpose(1, 2).flatten(2)  # (b, n, h (2 d + e))
        means = torch.unflatten(member.to(q.dtype) @ together, -1, (q.shape[1], -1)).transpose(1, 2) / size
        q_mean, k_mean, v_mean = torch.split(means, [q.shape[-1], k.shape[-1], v.shape[-1]], -1)
        exists = (number < used)[:, None, None, :]  # (b, 1, 1, m)
        # The inverse is of the landmarks as both fused softmaxes see them, in full precision.
        precise = ops.compute_dtype(q)
        middle = q_mean.to(precise) @ k_mean.to(precise).transpose(-1, -2) * q.shape[-1] ** -0.5
        middle = middle.masked_fill(~exists, torch.finfo(precise).min).softmax(-1)
        norms = middle.sum(-2).amax(-1) * middle.sum(-1).amax(-1)  # entries are positive
        inverse = pseudo_inverse(middle, middle.transpose(-1, -2) / norms[..., None, None], self.iterations)
        summary = masked_attention(q_mean, k, v, None if mask is None else mask[:, None])
        summary = (inverse @ summary.to(precise)).to(q.dtype)
        # Segments of one token: the means are the tokens, and the first factor is softmax attention itself.
        summary = torch.where((count <= landmarks)[:, None, None], v_mean, summary)
        return masked_attention(q, k_mean, summary, None if mask is None else exists[:, :, 0])
