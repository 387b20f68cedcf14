# mypy: disable-error-code="no-untyped-call,no-any-return"
"""Landmark attention on a GPU: fused Triton kernels, forward and backward, that keep no logits.

Keys are read once and queries once, by strides, whatever the layout; memory is that of inputs and output, and every
sum is taken in an order that depends on shapes alone, so results are the same bits at every run. Triton is imported at
the first call.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from spectraformer.ops.graph import differentiable_once, is_exporting, is_plain, told_apart
from spectraformer.ops.sequences import Sequences

INSTALLED = find_spec("triton") is not None
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
MAX_HEAD_DIM = 256
# 227 KiB of shared memory a program.
CAPABILITIES = (9, 10)
# Products of float32: three products of the tensor cores' short format keep all bits that matter ("tf32x3"), the
# plain units keep all ("ieee"). The short format alone ("tf32") is not offered: it has 10 bits.
PRECISIONS = ("tf32x3", "ieee")


def refusals(query: Tensor, key: Tensor, value: Tensor) -> list[str]:
    """Why the kernels cannot take these tensors; empty if they can."""
    reasons = []
    device = query.device
    if device.type == "cuda":
        capability = _capability(device)
        if capability[0] not in CAPABILITIES:
            found = ".".join(map(str, capability))
            reasons.append(
                f"the GPU has compute capability {found}; tiles are chosen for the shared memory of 9 and 10"
            )
    elif not INTERPRETED:  # Triton's interpreter, which tests use, runs kernels on the CPU
        reasons.append(f"tensors are on {device}, not on a CUDA device")
    if not INSTALLED:
        reasons.append("Triton is not installed")
    if is_exporting():
        reasons.append("the graph is being exported, and kernels would tie it to this device")
    dtypes = {query.dtype, key.dtype, value.dtype}
    if len(dtypes) > 1 and autocast_dtype(device) is None:
        reasons.append(f"query, key and value have different dtypes {sorted(map(str, dtypes))}")
    elif not dtypes.issubset(DTYPES):
        wrong = ", ".join(sorted(str(x) for x in dtypes.difference(DTYPES)))
        reasons.append(f"dtype {wrong} is none of {', '.join(map(str, DTYPES))}")
    d, e = key.shape[-1], value.shape[-1]
    if max(d, e) > MAX_HEAD_DIM:
        reasons.append(f"head dim {d} or value dim {e} is above {MAX_HEAD_DIM}")
    return reasons


_known_capability = cache(torch.cuda.get_device_capability)


def _capability(device: torch.device) -> tuple[int, int]:
    # Compilers do not follow what is cached.
    return torch.cuda.get_device_capability(device) if torch.compiler.is_compiling() else _known_capability(device)


def autocast_dtype(device: torch.device) -> torch.dtype | None:
    """The dtype that autocast gives to queries, keys and values, as it does in torch's own attention; None if off."""
    return torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else None


def landmark_attention(
    query: Tensor,  # (b, h * g, n, d)
    key: Tensor,  # (b, h, s, d)
    value: Tensor,  # (b, h, s, e)
    query_landmarks: Tensor,  # (b | 1, h | 1, m, d)
    key_landmarks: Tensor,  # (b | 1, h | 1, m, d)
    landmark_bias: Tensor,  # (b | 1, h | 1, m)
    key_bias: Tensor | None = None,  # (b | 1, h | 1, s), -inf removes a key
    key_quadratic: Tensor | None = None,  # (b | 1, h | 1, d)
    precision: str = "tf32x3",
    sequences: Sequences | None = None,
) -> Tensor:  # (b, h * g, n, e)
    r"""Two softmax attentions chained through landmarks, see :mod:`spectraformer.ops`.

    The logit of key n at landmark i is :math:`w_i\cdot k_n + t_n + \sum_c C_c k_{nc}^2`. Logits, exponentials and sums
    are float32; products take operands in the dtype of the inputs.

    Args:
        query: Queries, bfloat16, float16 or float32; g query heads share a key head. Any strides but the last: 1.
        key: Keys, same dtype.
        value: Values, same dtype.
        query_landmarks: Rows u_i that queries see, float32.
        key_landmarks: Rows w_i that keys see, float32.
        landmark_bias: a_i, float32.
        key_bias: t_n, float32, or None for 0. A head without any key gives 0.
        key_quadratic: C_c, float32, or None for 0.
        precision: Of products of float32 inputs: one of PRECISIONS.
        sequences: Of a packed batch: tokens and their bias are one batch item then, and b above, of landmarks, their
            bias and key_quadratic, is the number of sequences. No boundary leads outside of the tokens, but output
            and gradients of a token that is in no sequence, or beyond the longest, are undefined.

    Returns:
        Output, dense (packed: tokens before heads), in the dtype of the values. Differentiable once in every operand.

    Raises:
        ValueError: If the precision is unknown.
    """
    if precision not in PRECISIONS:
        raise ValueError(f"precision is {precision!r}; expected one of {PRECISIONS}")
    autocast = autocast_dtype(query.device)
    if autocast is not None:
        query, key, value = (x.to(autocast) for x in (query, key, value))
    tokens = [x if x.stride(-1) == 1 else with_unit_stride(x) for x in (query, key, value)]
    operands = tokens + [
        x if x is None or (x.dtype == torch.float32 and x.stride(-1) == 1) else with_unit_stride(x.float())
        for x in (query_landmarks, key_landmarks, landmark_bias, key_bias, key_quadratic)
    ]
    packing = packing_of(sequences)
    if torch.is_grad_enabled() and True in [x is not None and x.requires_grad for x in operands]:
        out: Tensor = _LandmarkAttention.apply(*told_apart(operands), *packing[:2], (precision, *packing[2:]))
        return out
    if not is_plain(*operands, *packing[:2]):
        forward: Tensor = torch.ops.spectraformer.landmark_attention(*operands, False, precision, *packing)[0]
        return forward
    output: Tensor = launching().planned(_plan_output, (*operands, *packing[:2]), (precision, *packing[2:]))[0]
    return output if sequences is None else heads_first(output)


@cache
def launching() -> Any:
    """The module that launches kernels and imports Triton; to import it at each call would take half an allocation."""
    from spectraformer.ops.triton import launch

    return launch


NOT_PACKED = (None, None, 0, 0)


def packing_of(sequences: Sequences | None) -> tuple[Any, ...]:
    """Sequences as the last arguments of operators: boundaries of keys are None where they are those of queries."""
    if sequences is None:
        return NOT_PACKED
    query, key, *longest = sequences
    return query.contiguous(), None if key is query else key.contiguous(), *longest


def sequences_of(boundaries: Any, longest: Any) -> Sequences | None:
    """The inverse of packing_of."""
    query, key = boundaries
    return None if query is None else Sequences(query, query if key is None else key, *longest)


def completed(packing: tuple[Any, ...]) -> tuple[Any, ...]:
    """The last arguments of an operator, of which those that have their default value are not given to it."""
    return packing + NOT_PACKED[len(packing) :]


def heads_first(x: Tensor) -> Tensor:
    """Packed tokens, (n, h, d), as one batch item, (1, h, n, d)."""
    return x.transpose(0, 1).unsqueeze(0)


def with_unit_stride(x: Tensor) -> Tensor:
    """The same numbers as kernels read them: rows of any stride, columns side by side."""
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


OPERANDS = (
    "Tensor query, Tensor key, Tensor value, Tensor query_landmarks, Tensor key_landmarks, Tensor landmark_bias, "
    "Tensor? key_bias, Tensor? key_quadratic"
)
PACKING = "Tensor? query_boundaries=None, Tensor? key_boundaries=None, SymInt longest_query=0, SymInt longest_key=0"
LIBRARY = torch.library.Library("spectraformer", "FRAGMENT")
LIBRARY.define(f"landmark_attention({OPERANDS}, bool needs_backward, str precision, {PACKING}) -> (Tensor, Tensor)")
LIBRARY.define(
    f"landmark_attention_backward(Tensor grad, {OPERANDS}, Tensor out, Tensor kept, bool[] wanted, str precision, "
    f"{PACKING}) -> Tensor[]"
)


def _forward(*arguments: Any) -> tuple[Tensor, Tensor]:
    *boundaries, longest_query, longest_key = completed(arguments[10:])
    return _attend((*arguments[:8], *boundaries), (*arguments[8:10], longest_query, longest_key))


def _attend(tensors: Sequence[Tensor | None], settings: tuple[Any, ...]) -> tuple[Tensor, Tensor]:
    """The output, and in one allocation what else the backward needs."""
    out, kept = launching().planned(_plan_forward, tensors, settings)
    return out if tensors[8] is None else heads_first(out), kept


def _plan_forward(operands: Any, needs_backward: bool, precision: str, *longest: int) -> Any:
    from spectraformer.ops.triton.forward import plan_forward

    sequences = sequences_of(operands[8:], longest)
    launches, (out, *others) = plan_forward(
        *operands[:8], needs_backward=needs_backward, precision=precision, sequences=sequences
    )
    return launches, (out, tuple(others) if needs_backward else out.new_empty(0, dtype=torch.float32))


def _plan_output(operands: Any, precision: str, *longest: int) -> Any:
    """The forward without a backward: all but the output is scratch."""
    launches, results = _plan_forward(operands, False, precision, *longest)
    return launches, results[:1]


def _kept_sizes(query: Tensor, key: Tensor, boundaries: Tensor | None) -> tuple[int, int]:
    """Pairs of a sequence and a key head, whose landmarks have a state each, and of a batch item and a query head."""
    count = key.shape[0] if boundaries is None else len(boundaries) - 1
    return count * key.shape[1], query.shape[0] * query.shape[1]


def _forward_shapes(*arguments: Any) -> tuple[Tensor, Tensor]:
    from spectraformer.ops.triton.configurations import choose

    query, key, value, query_landmarks, *_ = arguments
    needs_backward, boundaries = arguments[8], completed(arguments[10:])[0]
    (b, heads, n, _), e, m = query.shape, value.shape[-1], query_landmarks.shape[-2]
    out = query.new_empty(b, heads, n, e) if boundaries is None else heads_first(query.new_empty(n, heads, e))
    block = choose("keys", key.dtype, max(key.shape[-1], e), m).landmarks
    states, rows = _kept_sizes(query, key, boundaries)
    kept = states * -(-m // block) * block * (e + 1) + rows * n
    return out, query.new_empty(kept if needs_backward else 0, dtype=torch.float32)


def _backward(*arguments: Any) -> list[Tensor]:
    wanted, precision, *packing = arguments[11:]
    *boundaries, longest_query, longest_key = completed(tuple(packing))
    return _differentiate((*arguments[:11], *boundaries), tuple(wanted), (precision, longest_query, longest_key))


def _differentiate(tensors: tuple[Any, ...], wanted: tuple[bool, ...], settings: tuple[Any, ...]) -> list[Tensor]:
    """Gradients of query, key and value, then of those of the five other operands that are given and wanted."""
    packed = tensors[11] is not None
    if packed:  # the output as the forward made it, whatever became of it
        tensors = (*tensors[:9], tensors[9].transpose(1, 2).contiguous(), *tensors[10:])
    query, key, value, *found = launching().planned(_plan_backward, tensors, (wanted, *settings))
    if packed:
        query, key, value = (heads_first(x) for x in (query, key, value))
    if True not in wanted:
        return [query, key, value]
    in_pieces = (True, True, False, False, True)
    others = zip(found, tensors[4:9], in_pieces, wanted, strict=True)
    return [query, key, value, *[_summed(x, y, pieces=p) for x, y, p, w in others if w and y is not None]]


def _summed(x: Tensor, like: Tensor, *, pieces: bool) -> Tensor:
    """Gradients of one operand, summed over pieces of the tokens and over what the operand serves."""
    if pieces and like.ndim == 4:
        x = x[..., : like.shape[2], :]
    dimensions = [i for i in range(2) if like.shape[i] == 1 and x.shape[i] > 1] + ([2] if pieces else [])
    return x.sum(dimensions).reshape(like.shape) if dimensions else x


def _plan_backward(operands: Any, wanted: tuple[bool, ...], precision: str, *longest: int) -> Any:
    from spectraformer.ops.triton.backward import Wanted, plan_backward
    from spectraformer.ops.triton.launch import pieces

    sequences = sequences_of(operands[11:], longest)
    (_, query, key, value), kept = operands[:4], operands[10]
    (states, rows), n, e = _kept_sizes(query, key, operands[11]), query.shape[2], value.shape[-1]
    # As the forward returned them: rows of landmarks are padded to a multiple of 16, so that nothing lies between.
    padded = (kept.numel() - rows * n) // (states * (e + 1))
    others = pieces(kept, ((states, padded, e), (states, padded), (rows, n)))
    return plan_backward(*operands[:10], *others, wanted=Wanted(*wanted), precision=precision, sequences=sequences)


def _backward_shapes(*arguments: Any) -> list[Tensor]:
    operands, wanted, boundaries = arguments[1:9], arguments[11], completed(arguments[13:])[0]
    others = [x for x, w in zip(operands[3:], wanted, strict=True) if w and x is not None]
    tokens = [x.new_empty(x.shape) for x in operands[:3]]
    if boundaries is not None:
        tokens = [heads_first(x.new_empty(x.shape[2], x.shape[1], x.shape[3])) for x in tokens]
    return [
        *tokens,
        *[x.new_empty(x.shape, dtype=torch.float32) for x in others],
    ]


for _name, _run, _shapes in (
    ("landmark_attention", _forward, _forward_shapes),
    ("landmark_attention_backward", _backward, _backward_shapes),
):
    LIBRARY.impl(_name, _run, "CUDA")
    LIBRARY.impl(_name, _run, "CPU")
    torch.library.register_fake(f"spectraformer::{_name}", _shapes, lib=LIBRARY)


class _LandmarkAttention(torch.autograd.Function):
    """Of operands, boundaries, and (precision, longest query, longest key)."""

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> Tensor:
        *tensors, settings = arguments
        if is_plain(*tensors):
            out, kept = _attend(tensors, (True, *settings))
        else:
            precision, *longest = settings
            out, kept = torch.ops.spectraformer.landmark_attention(
                *tensors[:8], True, precision, *tensors[8:], *longest
            )
        ctx.save_for_backward(*tensors[:8], out, kept, *tensors[8:])
        ctx.settings = settings
        return out

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        tensors, wanted = (with_unit_stride(grad), *ctx.saved_tensors), ctx.needs_input_grad[3:8]
        if is_plain(*tensors):
            query, key, value, *found = _differentiate(tensors, wanted, ctx.settings)
        else:
            precision, *longest = ctx.settings
            query, key, value, *found = torch.ops.spectraformer.landmark_attention_backward(
                *tensors[:11], wanted, precision, *tensors[11:], *longest
            )
        others = iter(found)
        of_others = [next(others) if need else None for need in wanted] if found else NO_GRADIENTS
        return query, key, value, *of_others, None, None, None


NO_GRADIENTS = [None] * 5


if _file := os.environ.get("SPECTRAFORMER_TRITON_CONFIGURATIONS"):  # what `spectraformer bench tune` wrote
    from spectraformer.ops.triton.configuration_file import load_configurations, use_configurations

    use_configurations(load_configurations(Path(_file)))
