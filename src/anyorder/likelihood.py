"""The one loss: training on random orders and on extracted orders differ only in where `order` comes from."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from anyorder.contracts import AnyOrderModel, Grid
from anyorder.orders import permute


def token_nll(
    model: AnyOrderModel,
    tokens: Tensor,
    condition: Tensor | None,
    order: Tensor,
    grid: Grid | None = None,
) -> Tensor:
    """-log p(x[pi_i] | x[pi_<i], pi_<=i, c) of every step (OAR, arXiv 2504.17069 v1, Sec. 3).

    The mean over i is the training loss; the sum is the exact negative log-likelihood under that order.

    Args:
        model: any-order model.
        tokens: (B, N) int64 in raster order.
        condition: (B,) int64 labels, or None.
        order: (B, N) int64.
        grid: the grid of `tokens`, where it is not the model's own.

    Returns:
        (B, N) float32, nats, in order steps.
    """
    logits = model.forward(tokens, condition, order, grid).float().flatten(0, 1)
    target = permute(tokens, order)
    return F.cross_entropy(logits, target.flatten(), reduction="none").view_as(target)
