"""Layers: a linear layer that is fast in decoding, RMSNorm with a fast backward pass."""

import copy
import os
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

SWITCH = "ANYORDER_ONEDNN"
"""Environment variable: 0 multiplies with public operators only; 1, the default, packs weights where
this build of PyTorch has the private oneDNN operators that `pack` and `Linear` call."""
PRIVATE = ("_linear_pointwise", "_reorder_linear_weight", "_is_mkldnn_bf16_supported")


class Linear(nn.Linear):
    """As `nn.Linear`, with the same state dict; between `pack` and `unpack` fast on a CPU.

    The plain product rearranges the weight at every call, the packed copy is made once. 1,024 wide, one
    thread: 1.8 times as fast with 8 rows; 1.5 times with 64 in float32, 1.2 in bfloat16. Small weights take
    up to twice the time with few rows; their rows come out the same in any batch, others up to rounding.
    """

    packed: Tensor | None = None
    """The weight in oneDNN's layout; never part of a state dict, a copy or a pickle."""

    def train(self, mode: bool = True) -> "Linear":
        """As of `nn.Module`; the packed weight goes."""
        self.packed = None
        return super().train(mode)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "packed": None}

    def __deepcopy__(self, memo: dict[int, Any]) -> "Linear":
        """Written out, since that of a parametrized layer passes by `__getstate__`."""
        memo[id(self)] = found = self.__new__(type(self))
        found.__dict__ = copy.deepcopy({**self.__dict__, "packed": None}, memo)
        return found

    def forward(self, x: Tensor) -> Tensor:
        """(..., in_features) to (..., out_features)."""
        if torch.compiler.is_compiling() or self.packed is None or not self._fits(x):
            return F.linear(x, self.weight, self.bias)
        return torch.ops.mkldnn._linear_pointwise(x, self.packed, self.bias, "none", [], "")

    def _fits(self, x: Tensor) -> bool:
        alike = x.device.type == "cpu" and x.dtype == self.weight.dtype and x.numel() > 0
        return alike and not torch.is_grad_enabled() and not torch.is_autocast_enabled("cpu")


def pack(model: nn.Module) -> None:
    """Pack the weights of a model that begins to decode on a CPU, without gradients.

    A model calls this when decoding starts, and `unpack` when anything else runs: weights that have changed
    by then are never met by an old copy.
    """
    unpack(model)
    here = torch.backends.mkldnn.is_available() and all(hasattr(torch.ops.mkldnn, x) for x in PRIVATE)
    plain = model.training or torch.is_grad_enabled() or torch.is_autocast_enabled("cpu")
    if plain or not here or os.environ.get(SWITCH, "1") == "0":
        return
    types = [torch.float32] + [torch.bfloat16] * torch.ops.mkldnn._is_mkldnn_bf16_supported()
    for module in model.modules():
        weight = module.weight.detach() if isinstance(module, Linear) else None
        if weight is not None and weight.device.type == "cpu" and weight.dtype in types:
            module.packed = torch.ops.mkldnn._reorder_linear_weight(weight, None)


def unpack(model: nn.Module) -> None:
    """Drop the copies of `pack`."""
    if not torch.compiler.is_compiling():
        for module in model.modules():
            if isinstance(module, Linear):
                module.packed = None


class RMSNorm(nn.RMSNorm):
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension, as of `nn.RMSNorm`.

    PyTorch 2.13 is fused on CUDA and by `torch.compile`, but eagerly on the CPU its backward pass takes three
    times the time of the formula written out here.
    """

    eps: float

    def __init__(self, width: int, eps: float = 1e-6):
        super().__init__(width, eps)

    def forward(self, x: Tensor) -> Tensor:
        """(..., D) to (..., D), in the type of the weight: bfloat16 heads come out as float32."""
        x = x.to(self.weight.dtype)  # with two types PyTorch would leave its fused kernels unused
        if torch.compiler.is_compiling() or x.device.type != "cpu" or x.dtype != torch.float32:
            return F.rms_norm(x, self.normalized_shape, self.weight, self.eps)
        if torch.is_grad_enabled():
            return _Normalise.apply(x, self.weight, self.eps)
        return (x * _scale(x, self.eps)).mul_(self.weight)


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
