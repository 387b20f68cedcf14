"""Rows by number: values and gradients are those of torch's own indexing."""

import pytest
import torch

from spectraformer.ops.rows import select_rows, token_rows


def compare(rows, inverse, shape):
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    y = x.detach().requires_grad_()
    found, expected = select_rows(x, rows, inverse), y[rows]
    assert found.equal(expected)
    weight = torch.randn_like(found)
    (found * weight).sum().backward()
    (expected * weight).sum().backward()
    torch.testing.assert_close(x.grad, y.grad, rtol=0, atol=0)


@pytest.mark.parametrize("shape", [(50,), (50, 3), (50, 3, 2)])
def test_a_permutation(shape):
    order = torch.randperm(50)
    compare(order, order.argsort(), shape)


def test_a_part():
    compare(torch.randperm(50)[:20], None, (50, 3))


def test_gradcheck():
    order = torch.randperm(6)
    x = torch.randn(6, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: select_rows(x, order, order.argsort()), (x,))


@pytest.mark.parametrize("heads", [1, 3])
def test_tokens_by_number_for_all_heads_or_for_each(heads):
    x, chosen = torch.randn(2, 3, 7, 4), torch.randint(7, (2, heads, 5))
    expected = x.gather(2, chosen.expand(2, 3, 5).unsqueeze(-1).expand(-1, -1, -1, 4))
    assert x[token_rows(x, chosen)].equal(expected)
