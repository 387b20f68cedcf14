"""Nyström, Linformer, kernelized attention and Skyformer: each against its definition written out, and its limits."""

import math

import pytest
import torch
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode

from spectraformer.baselines import ATTENTIONS
from spectraformer.baselines.kernelized import Kernelized, gaussian_kernel
from spectraformer.baselines.linformer import Linformer
from spectraformer.baselines.nystrom import Nystrom, pseudo_inverse
from spectraformer.baselines.skyformer import Skyformer
from spectraformer.config import AttentionConfig, ModelConfig
from spectraformer.model import Classifier

HEADS, DIM, LONGEST = 2, 4, 32
MAKE = {"nystrom": Nystrom, "linformer": Linformer, "kernelized": Kernelized, "skyformer": Skyformer}
# Few landmarks, and inverses that have converged.
SMALL = {
    "nystrom": {"num_landmarks": 4, "iterations": 20},
    "linformer": {"num_projections": 5},
    "kernelized": {},
    "skyformer": {"num_features": 8, "iterations": 20},
}
ALL = list(MAKE)
SETS = ["nystrom", "kernelized", "skyformer"]  # functions of the real tokens in order, wherever the padding stands
LINEAR = ["nystrom", "linformer", "skyformer"]


def make(name, seed=0, max_length=LONGEST, dtype=torch.float64, **options):
    return MAKE[name](DIM, HEADS, max_length, seed, **{**SMALL[name], **options}).to(dtype).eval()


def tokens(n, b=3, s=None, e=DIM, norm=2.0, dtype=torch.float64):
    """Queries, keys and values; each of the first two has ``norm``."""
    q, k = (norm * functional.normalize(torch.randn(b, HEADS, x, DIM, dtype=dtype), dim=-1) for x in (n, s or n))
    return q, k, torch.randn(b, HEADS, s or n, e, dtype=dtype)


def mask_of(lengths, n):
    return torch.arange(n) < torch.tensor(lengths)[:, None]


def softmax_attention(q, k, v):
    return (q @ k.T / math.sqrt(q.shape[-1])).softmax(-1) @ v


def define_nystrom(attention, q, k, v, head):
    count, m = len(k), attention.num_landmarks
    if count <= m:
        return softmax_attention(q, k, v)
    members = [[t for t in range(count) if t * m // count == j] for j in range(m)]
    q_mean, k_mean = (torch.stack([x[list(rows)].mean(0) for rows in members]) for x in (q, k))
    first = (q @ k_mean.T / math.sqrt(DIM)).softmax(-1)
    middle = (q_mean @ k_mean.T / math.sqrt(DIM)).softmax(-1)
    last = (q_mean @ k.T / math.sqrt(DIM)).softmax(-1)
    return first @ torch.linalg.pinv(middle) @ last @ v


def define_linformer(attention, q, k, v, head):
    e = attention.project_key
    f = e if attention.project_value is None else attention.project_value
    e, f = (x[head if len(x) > 1 else 0] for x in (e, f))
    keys = sum(torch.outer(e[:, t], k[t]) for t in range(len(k)))
    values = sum(torch.outer(f[:, t], v[t]) for t in range(len(k)))
    return softmax_attention(q, keys, values)


def gaussian(x, y):
    return math.exp(-float((x - y).square().sum()) / (2 * math.sqrt(DIM)))


def define_kernelized(attention, q, k, v, head):
    return torch.stack([sum(gaussian(x, y) * z for y, z in zip(k, v, strict=True)) for x in q])


def define_skyformer(attention, q, k, v, head):
    count, half = len(k), attention.draws.shape[1]
    both = torch.cat((q, k))
    full = torch.tensor([[gaussian(x, y) for y in both] for x in both], dtype=q.dtype)
    if count <= half:
        rows = list(range(2 * count))
    else:
        rows = [math.floor(int(draw) / 2**31 * count) for draw in attention.draws[0]]
        rows += [count + math.floor(int(draw) / 2**31 * count) for draw in attention.draws[1]]
    sketch = full[:, rows]
    inner = full[rows][:, rows] + attention.regularisation * torch.eye(len(rows), dtype=q.dtype)
    approximation = sketch @ torch.linalg.inv(inner) @ sketch.T
    return approximation[:count, count:] @ v


DEFINE = {
    "nystrom": define_nystrom,
    "linformer": define_linformer,
    "kernelized": define_kernelized,
    "skyformer": define_skyformer,
}


def defined(name, attention, q, k, v, mask=None):
    """Rows of real queries from the definition, one sequence and head at a time; 0 elsewhere."""
    out = torch.zeros(*q.shape[:3], v.shape[3], dtype=v.dtype)
    for b in range(q.shape[0]):
        keys = slice(None) if mask is None else mask[b]
        queries = keys if q.shape[2] == k.shape[2] else slice(None)
        for h in range(HEADS):
            values = (q[b, h][queries], k[b, h][keys], v[b, h][keys])
            out[b, h, queries] = DEFINE[name](attention, *values, h).detach()
    return out


@pytest.mark.parametrize("n", [1, 2, 4, 5, 13])
@pytest.mark.parametrize("name", ALL)
def test_equals_its_definition(name, n):
    attention = make(name)
    q, k, v = tokens(n, e=3)
    torch.testing.assert_close(attention(q, k, v), defined(name, attention, q, k, v), rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("name", ALL)
def test_equals_its_definition_with_padding(name):
    attention = make(name)
    q, k, v = tokens(13, b=4)
    mask = mask_of([13, 7, 3, 1], 13)
    out = attention(q, k, v, mask) * mask[:, None, :, None]
    torch.testing.assert_close(out, defined(name, attention, q, k, v, mask), rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("name", ["linformer", "kernelized"])
def test_queries_of_another_sequence(name):
    attention = make(name)
    q, k, v = tokens(3, s=9)
    mask = mask_of([9, 4, 1], 9)
    out = attention(q, k, v, mask)
    torch.testing.assert_close(out, defined(name, attention, q, k, v, mask), rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("options", [{}, {"share_heads": True}, {"share_key_value": False}])
def test_linformer_shares_projections_as_told(options):
    attention = make("linformer", **options)
    expected = {"project_key": (1 if "share_heads" in options else HEADS, 5, LONGEST)}
    if "share_key_value" in options:
        expected["project_value"] = expected["project_key"]
        assert not torch.equal(attention.project_key, attention.project_value)
    assert {name: tuple(x.shape) for name, x in attention.state_dict().items()} == expected
    q, k, v = tokens(6)
    torch.testing.assert_close(attention(q, k, v), defined("linformer", attention, q, k, v))


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("name", ALL)
def test_padding_of_nan_changes_nothing(name, training):
    attention = make(name, dtype=torch.float32).train(training)
    if name == "nystrom":
        attention = MAKE[name](DIM, HEADS, LONGEST, 0, num_landmarks=4, conv_kernel=3).train(training)
    q, k, v = tokens(13, b=1, dtype=torch.float32)
    padded = [functional.pad(x, (0, 0, 0, 8), value=math.nan) for x in (q, k, v)]
    torch.manual_seed(5)
    expected = attention(q, k, v)
    torch.manual_seed(5)
    out = attention(*padded, mask_of([13], 21))[:, :, :13]
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("count", [3, 9])
@pytest.mark.parametrize("name", SETS)
def test_padding_may_stand_anywhere(name, count):
    attention = make(name)
    q, k, v = tokens(count, b=1)
    places = torch.randperm(17)[:count].sort().values
    mask = torch.zeros(1, 17, dtype=torch.bool)
    mask[:, places] = True
    spread = [torch.full((1, HEADS, 17, DIM), math.nan, dtype=x.dtype) for x in (q, k, v)]
    for x, y in zip(spread, (q, k, v), strict=True):
        x[:, :, places] = y
    torch.testing.assert_close(attention(*spread, mask)[:, :, places], attention(q, k, v))


@pytest.mark.parametrize("name", ALL)
def test_a_sequence_of_padding_is_zero_with_finite_gradients(name):
    attention = make(name, dtype=torch.float32)
    values = [x.requires_grad_() for x in tokens(9, dtype=torch.float32)]
    out = attention(*values, mask_of([9, 0, 2], 9))
    assert (out[1] == 0).all() and out.isfinite().all()
    gradients = torch.autograd.grad(out.square().sum(), values)
    assert all(x.isfinite().all() for x in gradients)


@pytest.mark.parametrize("name", ALL)
def test_sequences_of_a_batch_do_not_meet(name):
    attention = make(name, **({"iterations": 2} if name in ("nystrom", "skyformer") else {}))
    q, k, v = tokens(11)
    mask = mask_of([11, 8, 3], 11)
    together = attention(q, k, v, mask)
    for i in range(3):
        alone = attention(q[i : i + 1], k[i : i + 1], v[i : i + 1], mask[i : i + 1])
        torch.testing.assert_close(together[i : i + 1], alone)


@pytest.mark.parametrize("name", SETS)
def test_order_does_not_matter_while_every_token_is_a_landmark(name):
    attention = make(name)
    q, k, v = tokens(4)
    order = torch.tensor([2, 0, 3, 1])
    permuted = attention(q[:, :, order], k[:, :, order], v[:, :, order])
    torch.testing.assert_close(permuted, attention(q, k, v)[:, :, order])


def test_linformer_moves_with_its_columns():
    attention, moved = make("linformer", max_length=7), make("linformer", max_length=7)
    order = torch.randperm(7)
    moved.project_key.data = attention.project_key.data[..., order]
    q, k, v = tokens(7)
    out = moved(q, k[:, :, order], v[:, :, order])
    torch.testing.assert_close(out, attention(q, k, v))
    assert not torch.allclose(attention(q, k[:, :, order], v[:, :, order]), out)


@pytest.mark.parametrize("m", [7, 12])
def test_nystrom_with_as_many_landmarks_as_tokens_is_softmax(m):
    q, k, v = tokens(7)
    exact = functional.scaled_dot_product_attention(q, k, v)
    torch.testing.assert_close(make("nystrom", num_landmarks=m, iterations=1)(q, k, v), exact)


def test_nystrom_factors_are_softmax_when_tokens_repeat_within_segments():
    """12 tokens, each 3 times: the means are the tokens, so the three factors and the inverse give softmax exactly."""
    q, k, v = tokens(12, norm=4)
    q, k = (x[:, :, :4].repeat_interleave(3, dim=2) for x in (q, k))
    exact = functional.scaled_dot_product_attention(q, k, v)
    torch.testing.assert_close(make("nystrom", iterations=30)(q, k, v), exact, rtol=1e-6, atol=1e-6)
    assert not torch.allclose(make("nystrom", iterations=1)(q, k, v), exact, rtol=1e-2)


def test_linformer_with_identity_projections_is_softmax():
    attention = make("linformer", max_length=9, num_projections=9, share_heads=True)
    attention.project_key.data = torch.eye(9, dtype=torch.float64)[None]
    q, k, v = tokens(9)
    torch.testing.assert_close(attention(q, k, v), functional.scaled_dot_product_attention(q, k, v))


@pytest.mark.parametrize("gamma", [1.0, 0.1, 1e-3, 1e-7])
def test_skyformer_with_all_landmarks_is_kernelized_up_to_gamma(gamma):
    n = 6
    q, k, _ = tokens(n)
    identity = torch.eye(n, dtype=torch.float64).expand(*q.shape[:2], n, n)
    skyformer = make("skyformer", num_features=2 * n, regularisation=gamma, iterations=40)
    error = skyformer(q, k, identity) - make("kernelized")(q, k, identity)  # of the kernel matrix itself
    worst = torch.linalg.matrix_norm(error, ord=2).max()
    assert 0 < worst <= gamma


def test_skyformer_inverts_from_the_identity():
    """One iteration on the normalised matrix A, from I: (13 I - 15 A + 7 A^2 - A^3) / 4."""
    q, k, v = tokens(4, b=1)
    both = torch.cat((q, k), 2)
    sketch = gaussian_kernel(both, both)
    inner = sketch + 0.1 * torch.eye(8)
    scale = torch.diag_embed(inner.sum(-1).rsqrt())
    a = scale @ inner @ scale
    inverse = scale @ (13 * torch.eye(8) - 15 * a + 7 * a @ a - a @ a @ a) @ scale / 4
    expected = sketch[:, :, :4] @ inverse @ sketch[:, :, :, 4:] @ v
    torch.testing.assert_close(make("skyformer", iterations=1)(q, k, v), expected)


def test_skyformer_estimates_better_with_more_landmarks():
    q, k, v = tokens(200, norm=1.0)
    exact = make("kernelized")(q, k, v)
    few, many = ((make("skyformer", num_features=m)(q, k, v) - exact).norm() / exact.norm() for m in (4, 64))
    assert many < 0.1 * few and many < 0.02


def test_six_iterations_invert_the_kernel_of_128_landmarks_from_the_identity_only():
    x = 2 * functional.normalize(torch.randn(128, 32), dim=-1)
    inner = gaussian_kernel(x, x) + 0.1 * torch.eye(128)
    scale = inner.sum(-1, keepdim=True).rsqrt()
    normal = inner * scale * scale.T
    exact = torch.linalg.inv(normal.double()).float()
    ours, squared = (
        (pseudo_inverse(normal, start, 6) - exact).norm() / exact.norm()
        for start in (torch.eye(128), normal / normal.sum(-1).max())
    )
    assert ours < 0.1 and squared > 0.9


def test_error_of_the_pseudo_inverse_follows_its_law():
    """An eigenvalue 1 - r of A Z becomes 1 - r^3 (3 + r) / 4: the third order."""
    residuals = torch.tensor([0.9, 0.5, 0.1, 0.0], dtype=torch.float64)
    basis = torch.linalg.qr(torch.randn(4, 4, dtype=torch.float64)).Q
    matrix = basis @ torch.diag(1 - residuals) @ basis.T
    expected = residuals
    for iterations in range(1, 4):
        expected = expected**3 * (3 + expected) / 4
        found = torch.eye(4) - matrix @ pseudo_inverse(matrix, torch.eye(4, dtype=torch.float64), iterations)
        torch.testing.assert_close(basis.T @ found @ basis, torch.diag(expected), rtol=1e-9, atol=1e-12)


def test_pseudo_inverse_is_that_of_moore_and_penrose():
    matrix = torch.randn(5, 2, dtype=torch.float64) @ torch.randn(2, 5, dtype=torch.float64)
    start = matrix.T / (matrix.abs().sum(0).max() * matrix.abs().sum(1).max())
    torch.testing.assert_close(pseudo_inverse(matrix, start, 12), torch.linalg.pinv(matrix), rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("name", ALL)
def test_gradients(name):
    options = {"iterations": 6} if name in ("nystrom", "skyformer") else {}
    if name == "nystrom":
        options |= {"conv_kernel": 3}
    attention = make(name, **options)
    mask = mask_of([9, 6], 9)
    parameters = list(attention.parameters())
    values = [x.requires_grad_() for x in tokens(9, b=2)]
    assert torch.autograd.gradcheck(
        lambda q, k, v, *_: attention(q, k, v, mask), (*values, *parameters), atol=1e-6, fast_mode=True
    )
    assert len(parameters) == (name in ("nystrom", "linformer"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["random", "equal", "opposite"])
@pytest.mark.parametrize("name", ALL)
def test_large_norms_are_finite(name, kind, dtype):
    attention = MAKE[name](DIM, HEADS, 300, 0)
    q, k, v = tokens(300, norm=30)
    if kind == "equal":
        q = k = q[:, :, :1].expand_as(q)
    if kind == "opposite":
        k = -q
    values = [x.to(dtype).requires_grad_() for x in (q, k, v)]
    out = attention(*values, mask_of([300, 200, 1], 300))
    assert out.dtype == dtype and out.isfinite().all()
    gradients = torch.autograd.grad(out.float().square().sum(), values)
    assert all(x.isfinite().all() for x in gradients)


def test_gaussian_kernel_of_a_token_with_itself_is_one():
    x = tokens(50, norm=30, dtype=torch.float32)[0]
    diagonal = gaussian_kernel(x, x).diagonal(dim1=-2, dim2=-1)
    torch.testing.assert_close(diagonal, torch.ones_like(diagonal), rtol=0, atol=1e-3)
    assert gaussian_kernel(x, x).max() <= 1 and gaussian_kernel(x, -x).min() == 0


@pytest.mark.parametrize("name", ["nystrom", "linformer"])
def test_equal_tokens_give_the_mean_of_values(name):
    """The middle factor has rank 1 here; Linformer gives the mean of its projected values."""
    attention = MAKE[name](DIM, HEADS, 300, 0)
    q, k, v = tokens(300, dtype=torch.float32)
    mean = v.mean(2, keepdim=True)
    if name == "linformer":
        attention.project_key.data.fill_(1 / 300)
    out = attention(q[:, :, :1].expand_as(q), k[:, :, :1].expand_as(k), v)
    torch.testing.assert_close(out, mean.expand_as(v), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("name", ALL)
def test_bfloat16_is_near_float32(name, autocast):
    attention = MAKE[name](DIM, HEADS, 150, 0).eval()
    q, k, v = (x.bfloat16() for x in tokens(150, norm=5))
    expected = attention(q.float(), k.float(), v.float())
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        out = attention(q, k, v)
    error = (out.float() - expected).norm() / expected.norm()
    assert out.dtype == torch.bfloat16
    # Linformer's projections and Nyström's two softmaxes work in bfloat16; of the others the output alone is rounded.
    assert error < (0.01 if name in ("linformer", "nystrom") else 0.0025)


@pytest.mark.parametrize("name", ALL)
def test_compiles_to_one_graph(name):
    options = {"iterations": 2} if name in ("nystrom", "skyformer") else {}
    attention = make(name, dtype=torch.float32, **options, **({"conv_kernel": 3} if name == "nystrom" else {})).train()
    mask = mask_of([9, 6, 0], 9)
    values = [x.requires_grad_() for x in tokens(9, dtype=torch.float32)]
    compiled = torch.compile(attention, fullgraph=True, backend="aot_eager")
    found = []
    for call in (attention, compiled):
        torch.manual_seed(1)
        out = call(*values, mask)
        found.append((out, *torch.autograd.grad(out.square().sum(), values)))
    for eager, fused in zip(*found, strict=True):
        torch.testing.assert_close(fused, eager, rtol=1e-4, atol=1e-4)


class Largest(TorchDispatchMode):
    """The largest number of elements of any tensor made inside."""

    numel = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for x in out if isinstance(out, tuple | list) else (out,):
            if isinstance(x, torch.Tensor):
                self.numel = max(self.numel, x.numel())
        return out


@pytest.mark.parametrize("name", ALL)
def test_memory_is_what_is_claimed(name):
    n = 1500
    attention = make(name, max_length=n, dtype=torch.float32)
    values = [x.requires_grad_() for x in tokens(n, b=1, dtype=torch.float32)]
    with Largest() as largest:
        attention(*values, mask_of([n - 1], n)).sum().backward()
    assert (largest.numel < 50 * n) == (name in LINEAR)
    assert ("n²" in attention.memory) == (name not in LINEAR)


@pytest.mark.parametrize("name", ALL)
def test_seed_decides_and_global_generator_does_not(name):
    q, k, v = tokens(40)
    options = {"conv_kernel": 3} if name == "nystrom" else {}
    torch.manual_seed(1)
    first = make(name, seed=3, max_length=40, **options)
    torch.manual_seed(2)
    second = make(name, seed=3, max_length=40, **options)
    other = make(name, seed=4, max_length=40, **options)
    out = first(q, k, v)
    assert torch.equal(second(q, k, v), out) and torch.equal(first(q, k, v), out)
    assert torch.equal(other(q, k, v), out) == (name == "kernelized")
    other.load_state_dict(first.state_dict())
    assert torch.equal(other(q, k, v), out)


def test_skyformer_draws_anew_in_training_only():
    attention = make("skyformer")
    q, k, v = tokens(40)
    evaluated = attention(q, k, v)
    attention.train()
    torch.manual_seed(1)
    first, second = attention(q, k, v), attention(q, k, v)
    torch.manual_seed(1)
    assert torch.equal(attention(q, k, v), first) and not torch.equal(first, second)
    assert torch.equal(attention.eval()(q, k, v), evaluated)


def test_skyformer_draws_uniformly_among_real_tokens():
    n, rounds = 12, 1000
    q = torch.arange(n).float()[None, None, :, None].expand(1, HEADS, n, DIM)  # a token is its number
    mask = torch.ones(1, n, dtype=torch.bool)
    mask[:, [0, 7]] = False
    attention = make("skyformer", num_features=16).train()
    for half, first in ((slice(8), 0), (slice(8, None), 100)):  # queries, then keys
        found = [attention._landmarks(q, q + 100, mask)[0][0, 1, half, 0] - first for _ in range(rounds)]
        counts = torch.bincount(torch.cat(found).long(), minlength=n)
        assert (counts[~mask[0]] == 0).all()
        expected = 8 * rounds / 10
        assert (counts[mask[0]] - expected).abs().max() < 4 * math.sqrt(expected)


def test_causal_kernelized_sees_no_later_key():
    attention = make("kernelized")
    q, k, v = tokens(8)
    out = attention(q, k, v, mask_of([8, 5, 1], 8), is_causal=True)
    for t in (0, 3, 7):
        prefix = attention(q[:, :, : t + 1], k[:, :, : t + 1], v[:, :, : t + 1], mask_of([8, 5, 1], 8)[:, : t + 1])
        torch.testing.assert_close(out[:, :, t], prefix[:, :, t])


@pytest.mark.parametrize("name", ["linformer", "kernelized"])
def test_dropout_is_of_training_and_keeps_the_mean(name):
    attention = make(name, dropout=0.3)
    q, k, v = tokens(5, b=1)
    plain = make(name)(q, k, v)
    assert torch.equal(attention(q, k, v), plain)
    attention.train()
    outs = attention(*(x.expand(4000, -1, -1, -1) for x in (q, k, v)))
    spread = outs.std(0) / math.sqrt(4000)
    assert (spread > 0).all() and ((outs.mean(0) - plain[0]).abs() < 4.5 * spread).all()


def test_nystrom_convolution_adds_neighbouring_values():
    attention, plain = make("nystrom", conv_kernel=5), make("nystrom")
    q, k, v = tokens(9, b=1)
    mask = mask_of([7], 9)
    added = torch.zeros_like(v)
    for h in range(HEADS):
        for t in range(9):
            for offset in range(-2, 3):
                if 0 <= t + offset < 7:
                    added[0, h, t] += attention.conv[h, 0, offset + 2, 0].detach() * v[0, h, t + offset]
    torch.testing.assert_close(attention(q, k, v, mask), plain(q, k, v, mask) + added)
    assert attention.conv.abs().max() <= 5**-0.5


@pytest.mark.parametrize("start", ["original", "exact"])
def test_nystrom_equals_transformers(start):
    """At a length that the landmarks divide and without padding, which there counts in the means of segments.

    Its "original" start divides by the largest column sum of the whole batch, where the paper takes the norm of each
    matrix; with one sequence and head the two are the same, and its other start has the paper's norm.
    """
    modeling = pytest.importorskip("transformers.models.nystromformer.modeling_nystromformer")
    heads, batch = (1, 1) if start == "original" else (HEADS, 3)
    config = modeling.NystromformerConfig(
        hidden_size=heads * DIM,
        num_attention_heads=heads,
        num_landmarks=4,
        segment_means_seq_len=12,
        conv_kernel_size=5,
        attention_probs_dropout_prob=0.0,
    )
    theirs = modeling.NystromformerSelfAttention(config).eval()
    theirs.init_option = start
    ours = Nystrom(DIM, heads, 12, 0, num_landmarks=4, conv_kernel=5)
    ours.conv.data.copy_(theirs.conv.weight)
    x = torch.randn(batch, 12, heads * DIM)
    q, k, v = (
        layer(x).unflatten(-1, (heads, DIM)).transpose(1, 2) for layer in (theirs.query, theirs.key, theirs.value)
    )
    torch.testing.assert_close(ours(q, k, v).transpose(1, 2).flatten(2), theirs(x)[0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ALL)
def test_a_model_trains_with_it(name, monkeypatch):
    monkeypatch.setattr(ATTENTIONS, "own", {**ATTENTIONS.own, name: MAKE[name]})
    options = {"num_landmarks": 4, "conv_kernel": 3} if name == "nystrom" else SMALL[name]
    model = Classifier(
        ModelConfig(width=16, hidden=16, classifier=8),
        AttentionConfig(name=name, options=options),
        vocab_size=20,
        max_length=24,
        num_classes=3,
    )
    optimiser = torch.optim.SGD(model.parameters(), lr=0.1)
    batch, lengths = torch.randint(20, (8, 1, 24)), torch.randint(1, 25, (8, 1))
    model.eval()
    losses = []
    for _ in range(2):
        loss = functional.cross_entropy(model(batch, lengths), torch.arange(8) % 3)
        losses.append(loss.item())
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    assert losses[1] < losses[0]
    assert all(x.grad is not None and x.grad.abs().sum() > 0 for x in model.parameters())


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("nystrom", {"num_landmarks": 0}, "num_landmarks is 0; expected an integer of at least 1"),
        ("nystrom", {"iterations": 1.5}, "iterations is 1.5; expected an integer of at least 1"),
        ("nystrom", {"conv_kernel": 4}, "conv_kernel is 4; expected an odd width.*nearest: 5"),
        ("nystrom", {"conv_kernel": True}, "conv_kernel is True; expected an integer of at least 1"),
        ("linformer", {"num_projections": 0}, "num_projections is 0; expected an integer of at least 1"),
        ("linformer", {"share_heads": "yes"}, "share_heads is 'yes'; expected True or False"),
        ("linformer", {"share_key_value": 1}, "share_key_value is 1; expected True or False"),
        ("linformer", {"dropout": 1.0}, r"dropout is 1.0; expected a probability in \[0, 1\)"),
        ("kernelized", {"dropout": -0.1}, r"dropout is -0.1; expected a probability in \[0, 1\)"),
        ("skyformer", {"num_features": 1}, "num_features is 1; expected an integer of at least 2"),
        ("skyformer", {"num_features": 7}, "num_features is 7; expected an even number.*nearest: 8"),
        ("skyformer", {"regularisation": 0.0}, "regularisation is 0.0; expected a positive finite number"),
        ("skyformer", {"iterations": 0}, "iterations is 0; expected an integer of at least 1"),
    ],
)
def test_options_that_do_not_fit_are_refused(name, options, message):
    with pytest.raises(ValueError, match=message):
        make(name, **options)


@pytest.mark.parametrize("name", ["nystrom", "skyformer"])
def test_queries_of_another_length_are_refused(name):
    with pytest.raises(ValueError, match=f"{MAKE[name].__name__} attends within one sequence, but query has 3 tokens"):
        make(name)(*tokens(3, s=9))


@pytest.mark.parametrize("name", LINEAR)
def test_causal_attention_is_refused(name):
    with pytest.raises(ValueError, match=f"{MAKE[name].__name__} has no causal form"):
        make(name)(*tokens(5), is_causal=True)


def test_linformer_refuses_a_longer_sequence():
    message = (
        "key has 9 tokens, but Linformer has one column a position and was made for max_length=8; expected at most 8"
    )
    with pytest.raises(ValueError, match=message):
        make("linformer", max_length=8)(*tokens(9))
