import shutil

import pytest
import torch
import torch.nn.functional as F
from conftest import seeded
from torch.testing import assert_close

from anyorder.models.layers import RMSNorm


def made(*shape):
    """A norm with a gain that is not 1, and inputs and output gradients of quite different sizes."""
    norm, generator = RMSNorm(shape[-1], eps=1e-6), seeded(0)
    torch.nn.init.normal_(norm.weight, generator=generator)
    x, grad = torch.randn(2, *shape, generator=generator).unbind()
    return norm, x * torch.logspace(-4, 4, shape[-2])[:, None], grad


@pytest.mark.parametrize("shape", [(9, 5), (2, 3, 7, 8), (1, 1)])
def test_agrees_with_the_reference(shape):
    norm, x, grad = made(*shape)
    ours, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
    reference = torch.nn.RMSNorm(shape[-1], eps=1e-6)
    reference.load_state_dict(norm.state_dict())
    out, expected = norm(ours), reference(theirs)
    out.backward(grad)
    expected.backward(grad)
    assert_close(out, expected)
    assert_close(ours.grad, theirs.grad)
    assert_close(norm.weight.grad, reference.weight.grad)


def test_gradients_of_strided_inputs_in_double_precision():
    """Heads are views of the fused projection; the formula itself is checked beyond float32."""
    norm, x, _ = made(2, 3, 4, 8)
    x = x.transpose(1, 2)
    assert not x.is_contiguous()
    ours, exact = x.clone().requires_grad_(), x.double().requires_grad_()
    norm(ours).square().sum().backward()
    F.rms_norm(exact, (8,), norm.weight.detach().double(), 1e-6).square().sum().backward()
    assert_close(ours.grad, exact.grad.float(), rtol=1e-4, atol=1e-6)


def test_bfloat16_inputs_come_out_in_the_type_of_the_weight():
    norm, x, _ = made(4, 8)
    assert torch.equal(norm(x.bfloat16()), norm(x.bfloat16().float()))
    assert norm.bfloat16()(x.bfloat16()).dtype == torch.bfloat16


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler")
def test_compiled_agrees_with_eager():
    norm, x, _ = made(4, 8)
    assert_close(torch.compile(norm, fullgraph=True)(x), norm(x))


def test_nothing_is_kept_without_gradients():
    norm, x, _ = made(4, 8)
    assert norm(x).requires_grad
    with torch.no_grad():
        assert not norm(x).requires_grad
