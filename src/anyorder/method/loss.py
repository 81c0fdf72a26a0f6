"""The one loss: training on random orders and on extracted orders differ only in where `order` comes from."""

from collections.abc import Sequence
from typing import TypedDict, Unpack

import torch
import torch.nn.functional as F
from torch import Tensor

from anyorder import contracts
from anyorder.orders import permute


class Steps(TypedDict, total=False):
    """How many positions each step reveals, for a `GroupingModel`; left out, one."""

    sizes: Sequence[int] | None


LOGITS = 2**26
"""Logits held at once where many images are evaluated."""


def token_nll(
    model: contracts.AnyOrderModel,
    tokens: Tensor,
    condition: Tensor | None,
    order: Tensor,
    grid: contracts.Grid | None = None,
    **steps: Unpack[Steps],
) -> Tensor:
    """-log p(x[pi_i] | x[pi_<i], pi_<=i, c) of every step (OAR, arXiv 2504.17069 v1, Sec. 3).

    The mean over i is the training loss; the sum is the exact negative log-likelihood under that order, with
    `sizes` that of the steps. Arguments as of `forward`; returns (B, N) float32, nats, in order steps.
    """
    return cross_entropy(model.forward(tokens, condition, order, grid, **steps), tokens, order)  # type: ignore[misc]


def joint_nll(
    model: contracts.LocatingModel,
    tokens: Tensor,
    condition: Tensor | None,
    order: Tensor,
    grid: contracts.Grid | None = None,
    **steps: Unpack[Steps],
) -> tuple[Tensor, Tensor]:
    """-log q(token | position) and -log q(position) of every step, q(order, x) being the product of both.

    Their sum over all steps is -log q(order, x), an upper bound on -log p(x) for any order. Returns two
    (B, N) float32, nats, in order steps: content and location.
    """
    logits, locations = model.joint(tokens, condition, order, grid, **steps)  # type: ignore[misc]
    return cross_entropy(logits, tokens, order), -locations.gather(-1, order[..., None]).squeeze(-1)


def cross_entropy(logits: Tensor, tokens: Tensor, order: Tensor) -> Tensor:
    """-log p(token), (B, N) float32 nats, from logits (B, N, V) in order steps and tokens in raster order."""
    target = permute(tokens, order)
    return F.cross_entropy(logits.float().flatten(0, 1), target.flatten(), reduction="none").view_as(target)


@torch.no_grad()
def image_nll(
    model: contracts.AnyOrderModel,
    tokens: Tensor,
    condition: Tensor | None,
    order: Tensor,
    grid: contracts.Grid | None = None,
    *,
    location: bool = False,
    **steps: Unpack[Steps],
) -> dict[str, Tensor]:
    """Mean negative log-likelihood of each image along its order, without gradients, a few images at a time.

    Exact for the given orders; as the density of samples in random orders it is an upper bound (Jensen).
    Arguments as of `AnyOrderModel.forward`, on the model's device.

    Returns:
        nll, and with `location` bound, which adds that of the location head; (n,) float64, nats per token.
    """
    n = tokens.shape[1]
    size = max(1, LOGITS // (n * max(model.vocab_size, n * location)))
    found: list[Tensor] = []
    for begin in range(0, len(tokens), size):
        some = slice(begin, begin + size)
        inputs = (tokens[some], None if condition is None else condition[some], order[some], grid)
        joint = location and joint_nll(model, *inputs, **steps)  # type: ignore[arg-type]
        parts = joint or (token_nll(model, *inputs, **steps),)
        found.append(torch.stack([contracts.exact(part).mean(1) for part in parts]))
    content, *where = torch.cat(found, dim=1)
    return {"nll": content} | ({"bound": content + where[0]} if location else {})
