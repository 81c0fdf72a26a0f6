"""The linear layer for few rows: the plain product, whatever happens to its weight."""

import copy

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from anyorder.models.layers import AVAILABLE, FEW, Linear, _copies

pytestmark = pytest.mark.skipif(not AVAILABLE, reason="this build of PyTorch lacks oneDNN's linear operators")


def layer(bias=False):
    torch.manual_seed(0)
    return Linear(24, 40, bias=bias).eval()


def plain(linear, x):
    return nn.functional.linear(x, linear.weight, linear.bias)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(
    "shape", [(1,), (3, 1), (2, 5), (8,), (2, 4), (8, 3), (FEW // 2,), (FEW // 2, 2), (FEW, 2), (0, 3)]
)
@torch.no_grad()
def test_equals_the_plain_product(bias, shape):
    linear, x = layer(bias), torch.randn(*shape, 24)
    assert_close(linear(x), plain(linear, x), rtol=1e-5, atol=1e-5)
    strided = torch.randn(*shape[:-1], 24, max(1, shape[-1])).transpose(-1, -2)
    assert_close(linear(strided), plain(linear, strided), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("rows", [8, 16, FEW // 2])
@torch.no_grad()
def test_inputs_may_lie_in_any_way(rows):
    """Transposed, with gaps, repeated: the product of few rows reads them where they are."""
    linear, wide = layer(), torch.randn(rows, 48)
    for x in (wide[:, :24], wide[:, ::2], torch.randn(24, rows).t(), wide[:1, :24].expand(rows, -1)):
        assert_close(linear(x), plain(linear, x), rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_vectors_of_eight_rows_need_no_copy():
    linear = layer()
    linear(torch.randn(16, 24))
    assert linear.weight not in _copies
    linear(torch.randn(15, 24))
    assert linear.weight in _copies


@torch.no_grad()
def test_only_few_rows_have_a_copy():
    linear = layer()
    linear(torch.randn(FEW + 1, 24))
    assert linear.weight not in _copies
    linear(torch.randn(FEW, 24))
    assert linear.weight in _copies
    linear.train()
    linear(torch.randn(FEW, 24))
    assert linear.weight not in _copies


@torch.no_grad()
def test_the_copy_follows_the_weight():
    linear, x = layer(), torch.randn(2, 24)
    before = linear(x)
    linear.weight.mul_(2)
    assert_close(linear(x), 2 * before)
    linear.load_state_dict({"weight": torch.ones(40, 24)})
    assert_close(linear(x), x.sum(-1, keepdim=True).expand(-1, 40), rtol=1e-5, atol=1e-5)
    linear.weight.data = torch.zeros(40, 24)
    assert (linear(x) == 0).all()


@pytest.mark.parametrize("fused", [False, True])
def test_the_copy_follows_the_optimizer(fused):
    linear, x = layer(), torch.randn(2, 24)
    optimizer = torch.optim.AdamW(linear.parameters(), lr=0.1, fused=fused)
    for step in range(3):
        linear.train(step == 0)  # whether or not training is said to be training
        linear(x).square().sum().backward()
        optimizer.step()
        linear.eval()
        with torch.no_grad():
            assert_close(linear(x), plain(linear, x), rtol=1e-5, atol=1e-5)


def test_gradients_flow():
    linear, x = layer(), torch.randn(2, 24)
    with torch.no_grad():
        linear(x)
    linear(x).sum().backward()
    assert linear.weight.grad is not None


@torch.no_grad()
def test_copies_and_state_dicts_are_those_of_a_linear_layer():
    linear = layer()
    linear(torch.randn(2, 24))
    assert list(linear.state_dict()) == ["weight"]
    twin = copy.deepcopy(linear)
    twin.weight.zero_()
    assert (twin(torch.randn(2, 24)) == 0).all()
    assert linear.weight.abs().sum() > 0
