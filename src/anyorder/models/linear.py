"""A linear layer that is quick with few rows: decoding reads all weights for a handful of inputs."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

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
    1.1 (64 rows) to 2 times (4 to 16 rows) as fast, see docs/performance.md.
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
