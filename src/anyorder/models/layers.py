"""Layers: a linear layer that is fast with few rows, RMSNorm with a fast backward pass on the CPU, SwiGLU."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils.weak import WeakTensorKeyDictionary

if TYPE_CHECKING:
    pass

FEW = 128
"""Rows up to which the copy is used; with more of them the layout no longer matters."""

_copies: WeakTensorKeyDictionary = WeakTensorKeyDictionary()
"""Weight -> where its numbers are, their version, the copy; rebuilt when the weight has changed."""


class Linear(nn.Linear):
    """As `nn.Linear`, with the same state dict.

    On a CPU in float32, in evaluation mode without gradients and for at most `FEW` rows, it calls oneDNN: the
    plain product arranges the weight anew at every call. With 8, 16, ... `FEW` / 2 rows the product is
    computed as weight times transposed inputs, which arranges the few inputs instead (the result is a
    transposed view); otherwise with a copy of the weight in oneDNN's own layout, for the memory of the copy.
    1.1 (64 rows) to 2 times (4 to 16 rows) as fast, see docs/results/performance.md.
    """

    def train(self, mode: bool = True) -> Linear:
        """As of `nn.Module`. Copies go when the mode changes: fused optimizers change weights unnoticed."""
        if mode != self.training:
            _copies.pop(self.weight, None)
        return super().train(mode)

    def forward(self, x: Tensor) -> Tensor:
        """(..., in_features) to (..., out_features)."""
        weight = self.weight
        if torch.is_grad_enabled():
            _copies.pop(weight, None)
        if not self._few(x, weight):
            return F.linear(x, weight, self.bias)
        multiply, rows = torch.ops.mkldnn._linear_pointwise, x.numel() // self.in_features
        if rows % 8 or rows > FEW // 2 or self.bias is not None:
            return multiply(x, _arranged(weight), self.bias, "none", [], "")
        # The weight is read once, as it lies; inputs that are transposed themselves need no rearranging.
        product = multiply(weight, x.reshape(rows, -1), None, "none", [], "")
        return product.t().unflatten(0, x.shape[:-1])

    def _few(self, x: Tensor, weight: Tensor) -> bool:
        return (
            x.device.type == "cpu"
            and x.dtype == weight.dtype == torch.float32
            and isinstance(weight, nn.Parameter)  # what is computed, such as low-rank updates, comes anew
            and 0 < x.numel() <= FEW * self.in_features
            and not (self.training or torch.is_grad_enabled())
            and not torch.is_autocast_enabled("cpu")
            and not torch.compiler.is_compiling()
            and AVAILABLE
        )


AVAILABLE = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")
"""Whether this build of PyTorch has the two private operators; without them all products are plain."""


def _arranged(weight: Tensor) -> Tensor:
    now = weight.data_ptr(), weight._version
    known = _copies.get(weight)
    if known is None or known[0] != now:
        known = now, torch.ops.mkldnn._reorder_linear_weight(weight.detach(), None)
        _copies[weight] = known
    return known[1]


class RMSNorm(nn.RMSNorm):
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension, as of `nn.RMSNorm`.

    PyTorch 2.13 has fused kernels on CUDA and `torch.compile` fuses on any device, but eagerly on the CPU the
    backward pass is that of the single operations: three times the time of the formula written out here.
    """

    def forward(self, x: Tensor) -> Tensor:
        """(..., D) to (..., D), in the type of the weight: bfloat16 heads come out as float32."""
        assert self.eps is not None
        x = x.to(self.weight.dtype)  # with two types PyTorch would leave its fused kernels unused
        eager = not torch.compiler.is_compiling()
        if eager and x.device.type == "cpu" and x.dtype == torch.float32:
            if torch.is_grad_enabled():
                return _Normalise.apply(x, self.weight, self.eps)
            return (x * _scale(x, self.eps)).mul_(self.weight)
        return F.rms_norm(x, self.normalized_shape, self.weight, self.eps)


def _scale(x: Tensor, eps: float) -> Tensor:
    """1 / sqrt(mean(x^2) + eps), (..., 1)."""
    length = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    return length.mul_(length).div_(x.shape[-1]).add_(eps).rsqrt_()


class _Normalise(torch.autograd.Function):
    """With y = x / r, r the root mean square: out = y * weight, dx = (dy - y * mean(dy * y)) / r."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        scale = _scale(x, eps)
        y = x * scale
        ctx.save_for_backward(y, weight, scale)
        return y * weight

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        y, weight, scale = ctx.saved_tensors
        each = grad * y
        along = (each @ weight)[..., None]  # sum(dy * y), for dy = grad * weight
        dx = (grad * weight).addcmul_(y, along, value=-1 / y.shape[-1]).mul_(scale)
        return dx, each.flatten(0, -2).sum(0), None


class SwiGLU(nn.Module):
    """w2(silu(w1 x) * w3 x) with w1 and w3 fused; hidden width 8/3 D, rounded up to 32."""

    def __init__(self, width: int):
        """No biases."""
        super().__init__()
        hidden = 32 * math.ceil(8 * width / 3 / 32)
        self.gate_up = Linear(width, 2 * hidden, bias=False)
        self.down = Linear(hidden, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """(..., D) to (..., D)."""
        gate, up = self.gate_up(x).chunk(2, -1)
        return self.down(F.silu(gate) * up)
