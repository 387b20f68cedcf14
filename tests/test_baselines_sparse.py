"""Informer, Reformer and BigBird equal their papers' definitions, token by token, padding included."""

import math

import pytest
import torch
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode

from spectraformer import model
from spectraformer.attention import kernel_attention
from spectraformer.baselines import ATTENTIONS
from spectraformer.baselines.bigbird import BigBird
from spectraformer.baselines.informer import Informer
from spectraformer.baselines.reformer import Reformer
from spectraformer.config import AttentionConfig, ModelConfig

HEADS, DIM, VALUE_DIM, LONGEST = 2, 6, 5, 64
SMALL = {
    Informer: {"num_queries": 5, "num_keys": 6},
    Reformer: {"chunk_size": 4, "num_buckets": 4},
    BigBird: {"block_size": 4, "num_global_blocks": 1, "num_random_blocks": 2},
}
every = pytest.mark.parametrize("kind", SMALL, ids=lambda kind: kind.__name__)


def make(kind, seed=0, **options):
    return kind(DIM, HEADS, LONGEST, seed, **{**SMALL[kind], **options}).eval()


def tokens(n, s=None, *, batch=2, dtype=torch.float64, grad=False):
    s = n if s is None else s
    sizes = ((n, DIM), (s, DIM), (s, VALUE_DIM))
    return tuple(torch.randn(batch, HEADS, *size, dtype=dtype, requires_grad=grad) for size in sizes)


def ragged(n, batch=2):
    """Real lengths n, about n / 2, ...: the rest is padding."""
    lengths = torch.tensor([max(1, n // (item + 1)) for item in range(batch)])
    return torch.arange(n) < lengths[:, None]


def poisoned(mask, *inputs):
    padding = ~mask[:, None, :, None]
    return tuple(x.masked_fill(padding, math.nan) if x.shape[2] == mask.shape[1] else x for x in inputs)


# What each paper defines, for the real tokens of one sequence and one head: q (n, d), k (s, d), v (s, e).


def informer_definition(module, head, q, k, v):
    sample = module.priority[: len(k)].argsort()[: module.num_keys].tolist()
    scores = q @ k.T / math.sqrt(DIM)
    measure = [max(row[j] for j in sample) - sum(row[j] for j in sample) / len(sample) for row in scores]
    top = sorted(range(len(q)), key=lambda i: -measure[i])[: module.num_queries]
    return torch.stack([scores[i].softmax(0) @ v if i in top else v.mean(0) for i in range(len(q))])


def reformer_definition(module, head, q, k, v):
    n, rounds = len(q), []
    for rotation in module.rotations[:, head].double():
        parts = rotation.split([factor // 2 for factor in module.factors], -1)
        codes = [torch.cat((q @ part, -(q @ part)), -1).argmax(-1).tolist() for part in parts]
        codes = list(zip(*codes, strict=True))
        order = sorted(range(n), key=lambda i: (codes[i], i))
        chunk = {token: place // module.chunk_size for place, token in enumerate(order)}
        rounds.append((codes, chunk))
    out = []
    for i in range(n):
        seen = [
            j for j in range(n) if j != i and any(h[i] == h[j] and chunk[i] - chunk[j] in (0, 1) for h, chunk in rounds)
        ] or [i]
        scores = torch.stack([q[i] @ q[j] / q[j].norm() for j in seen])
        out.append(scores.softmax(0) @ v[seen])
    return torch.stack(out)


def bigbird_definition(module, head, q, k, v, is_causal=False):
    size, graph = module.block_size, module.columns[head].tolist()
    out = []
    for i in range(len(q)):
        everything = i // size < module.num_global_blocks
        seen = [j for j in range(len(k)) if everything or j // size in graph[i // size]]
        seen = [j for j in seen if not is_causal or j <= i]
        out.append((k[seen] @ q[i] / math.sqrt(DIM)).softmax(0) @ v[seen])
    return torch.stack(out)


DEFINITION = {Informer: informer_definition, Reformer: reformer_definition, BigBird: bigbird_definition}


def assert_defined(module, q, k, v, mask=None, tolerance=1e-9, **options):
    """Output at the real queries, inputs poisoned at padding, against the definition on real tokens alone."""
    define = DEFINITION[type(module)]
    if mask is None:
        mask = torch.ones(k.shape[0], k.shape[2], dtype=torch.bool)
        out = module(q, k, v, **options)
    else:
        out = module(*poisoned(mask, q, k, v), key_padding_mask=mask, **options)
    for item, real in enumerate(mask):
        for head in range(HEADS):
            rows = real if q.shape[2] == k.shape[2] else slice(None)
            x, y, z = (t[item, head].double() for t in (q, k, v))
            expected = define(module, head, x[rows], y[real], z[real], **options)
            torch.testing.assert_close(out[item, head][rows].double(), expected, atol=tolerance, rtol=tolerance)


@every
@pytest.mark.parametrize("n", [1, 3, 4, 9, 31, 64])
def test_equals_its_definition(kind, n):
    assert_defined(make(kind), *tokens(n))


@every
@pytest.mark.parametrize("n", [2, 9, 30, 61])
def test_equals_its_definition_of_the_real_tokens(kind, n):
    assert_defined(make(kind), *tokens(n), ragged(n))


@pytest.mark.parametrize("kind", [Informer, Reformer], ids=lambda kind: kind.__name__)
def test_padding_may_stand_anywhere(kind):
    assert_defined(make(kind), *tokens(30), torch.rand(2, 30) < 0.6)


def test_bigbird_without_a_visible_key_is_zero():
    # Blocks from 11 on see each other alone; all their keys are padding, those of other blocks are not.
    module = make(BigBird, num_global_blocks=0, num_random_blocks=0)
    mask = torch.arange(64).expand(2, -1) < 40
    out = module(*poisoned(mask, *tokens(64)), key_padding_mask=mask)
    assert out[:, :, 44:].eq(0).all() and out.isfinite().all()


def test_informer_never_selects_padding():
    # With one sampled key every measure is 0, so nothing else keeps the five real queries ahead of the padding.
    q, k, v = tokens(12)
    mask = (torch.arange(12) >= 7).expand(2, -1)
    out = make(Informer, num_queries=5, num_keys=1)(q, k, v, key_padding_mask=mask)
    torch.testing.assert_close(out[:, :, 7:], kernel_attention(q, k, v, key_padding_mask=mask)[:, :, 7:])


@every
def test_padded_equals_truncated(kind):
    q, k, v = tokens(23, dtype=torch.float32)
    module = make(kind)
    longer = [functional.pad(x, (0, 0, 0, 37), value=math.nan) for x in (q, k, v)]
    mask = (torch.arange(60) < 23).expand(2, -1)
    out = module(*longer, key_padding_mask=mask)
    torch.testing.assert_close(out[:, :, :23], module(q, k, v), atol=1e-5, rtol=1e-5)


@every
def test_gradients_ignore_padding(kind):
    mask = ragged(8)
    q, k, v = (x.requires_grad_() for x in poisoned(mask, *tokens(8)))
    out = make(kind)(q, k, v, key_padding_mask=mask)
    out.masked_fill(~mask[:, None, :, None], 0.0).square().sum().backward()
    for x in (q, v):
        assert x.grad[~mask[:, None, :].expand(-1, HEADS, -1)].eq(0).all()
        assert x.grad.isfinite().all() and x.grad[mask[:, None, :].expand(-1, HEADS, -1)].ne(0).any()


@every
def test_without_real_keys_output_and_gradients_are_zero(kind):
    q, k, v = tokens(9, grad=True)
    mask = torch.zeros(2, 9, dtype=torch.bool)
    out = make(kind)(q, k, v, key_padding_mask=mask)
    assert out.eq(0).all() and make(kind).attend(q, k, v, mask, False).isfinite().all()
    out.sum().backward()
    assert all(x.grad is None or x.grad.eq(0).all() for x in (q, k, v))


def test_informer_attends_across_sequences():
    assert_defined(make(Informer), *tokens(17, 30), ragged(30))


@pytest.mark.parametrize("kind", [Reformer, BigBird], ids=lambda kind: kind.__name__)
def test_one_sequence_only(kind):
    with pytest.raises(ValueError, match=f"{kind.__name__} attends within one sequence, but query has 4 tokens and"):
        make(kind)(*tokens(4, 5))


@every
def test_what_may_be_permuted(kind):
    """Tokens where the sample is all keys and one chunk holds all; else tokens inside a block."""
    options = {Informer: {"num_keys": 12}, Reformer: {"chunk_size": 12}, BigBird: {}}[kind]
    order = torch.randperm(12)
    if kind is BigBird:
        order = torch.cat([4 * block + torch.randperm(4) for block in range(3)])
    module, inputs = make(kind, **options), tokens(12)
    permuted = module(*(x[:, :, order] for x in inputs))
    torch.testing.assert_close(permuted, module(*inputs)[:, :, order])


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        (BigBird, {"block_size": 32}),
        (BigBird, {"block_size": 32, "num_global_blocks": 0}),
        (BigBird, {"num_global_blocks": 0, "num_window_blocks": 31}),
        (BigBird, {"num_global_blocks": 99}),
        (BigBird, {"num_random_blocks": 99}),
        (Informer, {"num_queries": 30, "num_keys": 1}),
    ],
)
def test_limits_are_softmax_attention(kind, options):
    q, k, v = tokens(30)
    mask = ragged(30)
    out = make(kind, **options)(q, k, v, key_padding_mask=mask)
    exact = kernel_attention(q, k, v, key_padding_mask=mask)
    torch.testing.assert_close(*(x.masked_fill(~mask[:, None, :, None], 0.0) for x in (out, exact)))


@pytest.mark.parametrize("num_hashes", [1, 3])
def test_reformer_with_one_bucket_is_softmax_of_shared_queries_without_self(num_hashes):
    module = make(Reformer, num_hashes=num_hashes, chunk_size=15, num_buckets=2)
    module.rotations.fill_(1.0)
    q, k, v = tokens(30)
    q = q.abs()  # x R > 0: all in one bucket, of two chunks; the second sees both
    scores = (q @ functional.normalize(q, dim=-1).mT).masked_fill(torch.eye(30, dtype=torch.bool), -math.inf)
    expected = scores.softmax(-1) @ v
    torch.testing.assert_close(module(q, k, v)[:, :, 15:], expected[:, :, 15:])


def test_reformer_token_that_is_alone_sees_itself():
    q, k, v = tokens(1)
    torch.testing.assert_close(make(Reformer)(q, k, v), v)


def test_reformer_ignores_keys():
    q, k, v = tokens(20)
    assert make(Reformer)(q, k, v).equal(make(Reformer)(q, torch.randn_like(k), v))


def test_reformer_combines_two_hashes_where_buckets_are_many():
    module = make(Reformer, num_buckets=130)
    assert module.factors == (12, 12) and module.num_buckets == 144
    assert_defined(module, *tokens(64))
    wide = make(Reformer, num_buckets=128)
    assert wide.factors == (128,)
    x = torch.randn(1, HEADS, 4000, DIM, dtype=torch.float64)
    assert module._hash(x).max() > 128 and module._hash(x).max() < 144


@every
def test_gradcheck(kind):
    module = make(kind)
    q, k, v = tokens(9, batch=1, grad=True)
    mask = torch.arange(9)[None] < 7
    assert torch.autograd.gradcheck(lambda q, k, v: module(q, k, v, key_padding_mask=mask), (q, k, v))


@every
def test_norms_of_thirty(kind):
    q, k, v = (30 * functional.normalize(x, dim=-1) for x in tokens(30, dtype=torch.float32))
    assert_defined(make(kind), q, k, v, ragged(30), tolerance=1e-3)
    q, k, v = (x.requires_grad_() for x in (q, k, v))
    make(kind)(q, k, v).square().sum().backward()
    assert q.grad.isfinite().all() and v.grad.isfinite().all()


@every
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(kind, dtype):
    # All queries of the Informer: which are in the top u may turn on a rounding.
    module = make(kind, **({"num_queries": 30} if kind is Informer else {}))
    q, k, v = tokens(30, dtype=dtype)
    assert module(q, k, v).dtype == dtype
    assert_defined(module, q, k, v, ragged(30), tolerance=0.03)


@every
def test_autocast(kind):
    module = make(kind, **({"num_queries": 30} if kind is Informer else {}))
    q, k, v = tokens(30, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        assert_defined(module, q, k, v, ragged(30), tolerance=0.03)


@every
@pytest.mark.parametrize("masked", [False, True])
def test_compiles_without_graph_breaks(kind, masked):
    torch.compiler.reset()
    q, k, v = tokens(30, dtype=torch.float32)
    mask = ragged(30) if masked else None
    module = make(kind)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(q, k, v, mask), module(q, k, v, mask))


@every
@pytest.mark.slow
def test_inductor_agrees(kind):
    torch.compiler.reset()
    q, k, v = tokens(30, dtype=torch.float32)
    module = make(kind)
    compiled = torch.compile(module, fullgraph=True)(q, k, v, ragged(30))
    torch.testing.assert_close(compiled, module(q, k, v, ragged(30)), atol=1e-5, rtol=1e-5)


class Largest(TorchDispatchMode):
    """Records the largest tensor any operation makes."""

    numel = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for x in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(x, torch.Tensor):
                self.numel = max(self.numel, x.numel())
        return out


@every
def test_memory_is_linear(kind):
    found = []
    for n in (256, 512):
        module = kind(DIM, HEADS, n, 0, **SMALL[kind])
        q, k, v = tokens(n, batch=1, dtype=torch.float32, grad=True)
        with Largest() as largest:
            module(q, k, v, torch.ones(1, n, dtype=torch.bool)).sum().backward()
        found.append(largest.numel)
    assert found[1] < 2.1 * found[0]


class Named(TorchDispatchMode):
    """Counts operations whose name begins with one of some words."""

    def __init__(self, *words):
        super().__init__()
        self.words, self.found = words, []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function._schema.name.split("::")[1]
        if name.startswith(self.words):
            self.found.append(name)
        return function(*args, **(kwargs or {}))


def test_reformer_moves_tokens_by_permutations_alone():
    """Sums into places would be sorted on a GPU; there are the two sorts of hashing, however many rounds."""
    q, k, v = tokens(61, dtype=torch.float32, grad=True)
    module = make(Reformer, num_hashes=3).train()
    with Named("index_put", "_index_put", "index_add", "index_copy", "scatter", "sort", "argsort", "topk") as moves:
        module(q, k, v, ragged(61)).sum().backward()
    assert moves.found == ["sort", "sort"]


@every
def test_randomness_is_the_seed_and_survives_a_reload(kind):
    inputs = tokens(60)
    out = make(kind)(*inputs)
    assert out.equal(make(kind)(*inputs))
    other = make(kind, seed=1)
    assert not out.equal(other(*inputs))
    other.load_state_dict(make(kind).state_dict())
    assert out.equal(other(*inputs))
    assert not [name for name, _ in other.named_parameters()]


@pytest.mark.parametrize("kind", [Informer, Reformer], ids=lambda kind: kind.__name__)
def test_training_draws_anew_from_the_global_generator(kind):
    module, inputs = make(kind).train(), tokens(60)
    torch.manual_seed(1)
    first, second = module(*inputs), module(*inputs)
    assert not first.equal(second)
    torch.manual_seed(1)
    assert first.equal(module(*inputs))


def test_bigbird_draws_nothing_in_training():
    module, inputs = make(BigBird), tokens(60)
    assert module(*inputs).equal(module.train()(*inputs))


@every
def test_dropout_is_of_training_and_keeps_the_mean(kind):
    q, k, v = tokens(12, batch=1)
    sampled = {Informer: {"num_queries": 12}, Reformer: {"num_buckets": 2, "num_hashes": 1}, BigBird: {}}[kind]
    module = make(kind, dropout=0.5, **sampled)
    if kind is Reformer:  # one bucket whichever rotation is drawn: all tokens in one direction
        q = torch.rand(1, HEADS, 12, 1, dtype=torch.float64) * torch.ones(DIM, dtype=torch.float64)
    expected = module(q, k, v)
    assert expected.equal(module(q, k, v))
    module.train()
    draws = torch.stack([module(q, k, v) for _ in range(400)])
    error = (draws.mean(0) - expected) / (draws.std(0) / math.sqrt(400)).clamp(min=1e-9)
    assert draws.std(0).median() > 0.01 and error.abs().max() < 5


def test_bigbird_graph():
    module = BigBird(DIM, HEADS, 24 * 8, 3, block_size=8)
    seen = []
    for graph in module.columns.tolist():
        for block, row in enumerate(graph):
            row = [column for column in row if column >= 0]
            near = {column for column in (block - 1, block, block + 1) if 0 <= column < 24}
            assert len(row) == len(set(row)) and {0, 1} | near <= set(row)
            assert len(set(row) - {0, 1} - near) == 3
            seen += set(row) - {0, 1} - near
    assert set(seen) == set(range(2, 24))
    assert not module.columns[0].equal(module.columns[1])


@pytest.mark.parametrize("masked", [False, True])
def test_bigbird_causal(masked):
    module = make(BigBird)
    q, k, v = tokens(37)
    assert_defined(module, q, k, v, ragged(37) if masked else None, is_causal=True)
    out = module(q, k, v, is_causal=True)
    later = [torch.cat((x[:, :, :19], torch.randn_like(x[:, :, 19:])), 2) for x in (q, k, v)]
    assert out[:, :, :19].equal(module(*later, is_causal=True)[:, :, :19])


@pytest.mark.parametrize("kind", [Informer, Reformer], ids=lambda kind: kind.__name__)
def test_no_causal_form(kind):
    with pytest.raises(ValueError, match=f"{kind.__name__} has no causal form: a query would see later keys"):
        make(kind)(*tokens(8), is_causal=True)


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        (Informer, {"num_queries": 0}, "num_queries is 0; expected an integer of at least 1"),
        (Informer, {"num_keys": 1.5}, "num_keys is 1.5; expected an integer of at least 1"),
        (Informer, {"dropout": 1.0}, r"dropout is 1.0; expected a probability in \[0, 1\)"),
        (Reformer, {"num_hashes": 0}, "num_hashes is 0; expected an integer of at least 1"),
        (Reformer, {"chunk_size": True}, "chunk_size is True; expected an integer of at least 1"),
        (Reformer, {"num_buckets": 1}, "num_buckets is 1; expected an integer of at least 2"),
        (Reformer, {"num_buckets": 5}, "num_buckets is 5; expected an even number: .*; nearest: 6"),
        (Reformer, {"dropout": -0.1}, r"dropout is -0.1; expected a probability in \[0, 1\)"),
        (BigBird, {"block_size": 0}, "block_size is 0; expected an integer of at least 1"),
        (BigBird, {"num_global_blocks": -1}, "num_global_blocks is -1; expected an integer of at least 0"),
        (BigBird, {"num_window_blocks": 0}, "num_window_blocks is 0; expected an integer of at least 1"),
        (BigBird, {"num_window_blocks": 4}, "num_window_blocks is 4; expected an odd number: .*; nearest: 5"),
        (BigBird, {"num_random_blocks": "3"}, "num_random_blocks is '3'; expected an integer of at least 0"),
        (BigBird, {"dropout": math.nan}, r"dropout is nan; expected a probability in \[0, 1\)"),
    ],
)
def test_options_are_checked(kind, options, message):
    with pytest.raises(ValueError, match=message):
        make(kind, **options)


@pytest.mark.parametrize(("kind", "name"), [(Informer, "key"), (BigBird, "query")])
def test_longer_than_it_was_made_for(kind, name):
    with pytest.raises(ValueError, match=f"{name} has 65 tokens; {kind.__name__} was made for max_length=64"):
        make(kind)(*tokens(65))


def test_reformer_takes_longer_inputs():
    assert_defined(make(Reformer), *tokens(70))


@every
def test_defaults_are_those_of_the_long_range_arena(kind):
    module = kind(32, 2, 4096, 0)
    assert {
        Informer: lambda: (module.num_queries, module.num_keys) == (128, 128),
        Reformer: lambda: (module.num_hashes, module.chunk_size, module.factors) == (2, 64, (128,)),
        BigBird: lambda: (module.block_size, module.columns.shape) == (64, (2, 64, 2 + 3 + 3)),
    }[kind]()
    q, k, v = (torch.randn(1, 2, 200, 32) for _ in range(3))
    assert module(q, k, v).isfinite().all()


@every
def test_the_model_trains_with_it(kind, monkeypatch):
    monkeypatch.setitem(ATTENTIONS.own, "sparse", kind)
    config = ModelConfig(width=12, hidden=8, classifier=8)
    attention = AttentionConfig(name="sparse", options=SMALL[kind])
    classifier = model.Classifier(config, attention, vocab_size=9, max_length=21, num_classes=3)
    before = {name: value.clone() for name, value in classifier.state_dict().items()}
    optimizer = torch.optim.AdamW(classifier.parameters(), 1e-2, weight_decay=0.0)
    logits = classifier(torch.randint(9, (4, 1, 21)), torch.tensor([[21], [20], [13], [2]]))
    functional.cross_entropy(logits, torch.tensor([0, 1, 2, 0])).backward()
    optimizer.step()
    for name, parameter in classifier.named_parameters():
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.ne(0).any() and not parameter.equal(before[name]), name


# The same inputs in Hugging Face transformers, where a setting exists in which it computes the paper's formula.


def test_informer_equals_transformers(monkeypatch):
    """There the sum is divided by the number of keys, not of samples: equal where the sample is all keys."""
    pytest.importorskip("transformers")
    from transformers.models.informer.modeling_informer import InformerProbSparseAttention

    theirs = InformerProbSparseAttention(DIM * HEADS, HEADS, sampling_factor=2).double().eval()
    monkeypatch.setattr(torch, "randint", lambda low, high, size: torch.arange(high)[: size[0]])
    x = torch.randn(2, 40, DIM * HEADS, dtype=torch.float64)
    q, k, v = (f(x).unflatten(-1, (HEADS, DIM)).transpose(1, 2) for f in (theirs.q_proj, theirs.k_proj, theirs.v_proj))
    out = make(Informer, num_queries=2 * 4, num_keys=40)(q, k, v)
    torch.testing.assert_close(theirs.out_proj(out.transpose(1, 2).flatten(2)), theirs(x)[0], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("num_hashes", [1, 2])
def test_reformer_equals_transformers(num_hashes, monkeypatch):
    """There other buckets of a chunk and of the one before are seen too, where the paper masks them, and a pair
    counts once a round, not once in all (Appendix A): equal where chunks are buckets, the same in every round."""
    pytest.importorskip("transformers")
    from transformers import ReformerConfig
    from transformers.models.reformer.modeling_reformer import LSHSelfAttention

    width = HEADS * DIM
    config = ReformerConfig(
        hidden_size=width,
        num_attention_heads=HEADS,
        attention_head_size=DIM,
        num_buckets=4,
        num_hashes=num_hashes,
        lsh_attn_chunk_length=5,
        lsh_num_chunks_before=0,
        is_decoder=False,
    )
    theirs = LSHSelfAttention(config).double().eval()
    module = make(Reformer, num_hashes=num_hashes, chunk_size=5)
    module.rotations.zero_()
    module.rotations[:, :, 0, 0] = module.rotations[:, :, 1, 1] = 1.0  # by the larger of two coordinates, and its sign
    rotations = module.rotations.permute(1, 2, 0, 3).double()
    monkeypatch.setattr(torch, "randn", lambda *size, **options: rotations)
    x = 0.3 * torch.rand(2, 20, width, dtype=torch.float64)
    for head in range(HEADS):
        bucket = torch.arange(20)[torch.randperm(20)] % 4
        x[:, torch.arange(20), head * DIM + bucket % 2] += 2.0 - 4.0 * (bucket // 2)
    theirs.query_key.weight.data = torch.eye(width, dtype=torch.float64)
    q, v = (f(x).unflatten(-1, (HEADS, DIM)).transpose(1, 2) for f in (theirs.query_key, theirs.value))
    out = module(q, torch.zeros_like(q), v).transpose(1, 2).flatten(2)
    torch.testing.assert_close(theirs(x)[0], out, atol=1e-4, rtol=1e-4)


def test_bigbird_equals_transformers(monkeypatch):
    """On its graph: there the last block is global in place of the second."""
    pytest.importorskip("transformers")
    from transformers import BigBirdConfig
    from transformers.models.big_bird.modeling_big_bird import BigBirdBlockSparseAttention, BigBirdModel

    blocks, size = 8, 4
    config = BigBirdConfig(
        hidden_size=HEADS * DIM,
        num_attention_heads=HEADS,
        block_size=size,
        num_random_blocks=1,
        max_position_embeddings=LONGEST,
    )
    theirs = BigBirdBlockSparseAttention(config, seed=0).double().eval()
    chosen = [[[4], [5], [1], [2], [1], [3]], [[5], [6], [6], [1], [2], [4]]]  # (head, block 1 to 6, 1)
    monkeypatch.setattr(theirs, "_bigbird_block_rand_mask_with_head", lambda **_: chosen)
    columns = torch.arange(blocks).repeat(HEADS, blocks, 1)
    for head in range(HEADS):
        for block in range(1, blocks - 1):
            graph = {0, blocks - 1, block - 1, block, block + 1, chosen[head][block - 1][0]}
            columns[head, block] = torch.tensor([c if c in graph else -1 for c in range(blocks)])
    module = make(BigBird)
    module.columns = columns
    x = torch.randn(2, blocks * size, HEADS * DIM, dtype=torch.float64)
    mask = torch.arange(blocks * size) < torch.tensor([[32], [29]])
    blocked, band, rows, keys = BigBirdModel.create_masks_for_block_sparse_attn(mask.double(), size)
    expected = theirs(x, band, rows, keys, blocked, blocked)[0]
    q, k, v = (f(x).unflatten(-1, (HEADS, DIM)).transpose(1, 2) for f in (theirs.query, theirs.key, theirs.value))
    out = module(q, k, v, key_padding_mask=mask).transpose(1, 2).flatten(2)
    torch.testing.assert_close(out[mask], expected[mask], atol=1e-4, rtol=1e-4)
