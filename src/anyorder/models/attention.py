"""Attention with a cache: causal blocks, and candidates that share one prefix.

Shapes: B images, T steps, M candidates, L cached steps, D width, H heads.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from anyorder.models.location import LocationTables
from anyorder.models.positions import PositionTables

if TYPE_CHECKING:
    pass

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]
"""Queries, keys, values, each (B, H, T, D / H), to outputs of the same shape."""


def merge_heads(x: Tensor) -> Tensor:
    """(B, H, T, D / H) to (B, T, D)."""
    return x.transpose(1, 2).flatten(2)


def causal(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Each step attends to itself and to earlier steps; no mask is materialised."""
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)


@dataclass
class State:
    """What has been revealed so far, in one preallocated cache that `append` writes in place."""

    tables: PositionTables
    keys: Tensor
    """(depth, B, H, P + N, D / H); the first `length` of prefix and steps are valid."""
    values: Tensor
    length: int
    pending: Tensor
    """(B, D): condition or last token with its position; only the next position is missing."""
    last: Tensor
    """(B,) int64: position of the last token, N for the condition."""
    hidden: Tensor
    """(B, D): what the last token was predicted from; the condition before the first."""
    prefix: int
    """P: how long the cache is before the first step."""
    content: Tensor
    """(B, D): embedding of the last token, without its position."""
    start: Tensor
    """(B, D): the class."""
    asked: Tensor
    """(B, D): all of the condition, prefix included."""
    scored: Scored
    where: LocationTables | None = None
    """The location head's, where there is one."""


@dataclass
class Scored:
    """The candidates scored since `append`, which need not run again.

    Their keys and values wait in the free slots of the cache, behind the revealed ones: candidate j in slot
    `State.length` + j.
    """

    positions: Tensor
    """(B, N) int64; the first `count` are valid."""
    hidden: Tensor
    """(B, N, D): what the token of each is predicted from."""
    count: int = 0


def _pick(x: Tensor, columns: Tensor) -> Tensor:
    """Columns (B, M) int64 of (B, S, D), (B, M, D)."""
    return x.gather(1, columns[:, :, None].expand(-1, -1, x.shape[2]))


def attend_with_total(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Attention, and the log-sum-exp of its scores, by which it can be merged with attention to more keys.

    Args:
        q: queries (B, H, M, D / H).
        k: keys (B, H, L, D / H), all of them visible.
        v: values, shaped like k.

    Returns:
        Outputs (B, H, M, D / H), and the log-sum-exp (B, H, M, 1) float32.
    """
    fused = None if q.requires_grad else _fused(q, k, v)  # the kernels' log-sum-exp has no gradient
    if fused is not None:
        return fused[0], fused[1][..., None]
    scores = (q @ k.transpose(-1, -2)).float() * q.shape[-1] ** -0.5
    total = scores.logsumexp(-1, keepdim=True)
    return (scores - total).exp().to(v.dtype) @ v, total


def keep(keys: Tensor, values: Tensor, length: int, columns: Tensor) -> None:
    """Put what is in slot `length` + columns (B,) of caches (depth, B, H, L, D / H) into slot `length`."""
    if not bool(columns.any()):  # it lies there, as always where one candidate was scored
        return
    rows, slots = torch.arange(len(columns), device=columns.device), length + columns
    for cache in (keys, values):  # indexing moves the batch to the front
        cache[:, :, :, length] = cache[:, rows, :, slots].transpose(0, 1)


def attend_with_self(q: Tensor, k: Tensor, v: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """Attention of candidates to a shared prefix and to themselves, without a mask or a repeated prefix.

    Args:
        q: queries (B, H, T + M, D / H); the first T of them see the prefix alone.
        k: the candidates' own keys (B, H, M, D / H).
        v: their own values.
        keys: of the prefix, (B, H, L, D / H).
        values: shaped like `keys`.

    Returns:
        Outputs (B, H, T + M, D / H).
    """
    out, total = attend_with_total(q, keys, values)
    others = q.shape[2] - k.shape[2]
    merged = merge_with_self(q[:, :, others:], k, v, out[:, :, others:], total[:, :, others:])
    return torch.cat((out[:, :, :others], merged), dim=2) if others else merged


def merge_with_self(q: Tensor, k: Tensor, v: Tensor, out: Tensor, total: Tensor) -> Tensor:
    """Candidates' attention to others, with its log-sum-exp, and to their own keys (B, H, M, D / H)."""
    own = (q * k).sum(-1, keepdim=True, dtype=torch.float32) * q.shape[-1] ** -0.5
    return out.lerp(v, (own - total).sigmoid().to(v.dtype))


def _fused(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor] | None:
    """One kernel that returns the log-sum-exp (B, H, M), too, where there is one; none is public."""
    if q.device.type == "cpu":
        q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))  # it does not check
        return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v)
    if q.device.type == "cuda" and q.shape[-1] % 8 == 0:
        parameters = torch.backends.cuda.SDPAParams(q, k, v, None, 0.0, False, False)
        if torch.backends.cuda.can_use_flash_attention(parameters):
            return torch.ops.aten._scaled_dot_product_flash_attention(q, k, v)[:2]
    return None


class SharedPrefix:
    """Attention of candidates that see the prefix and themselves but not one another.

    The prefix part and the self part are merged by their log-sum-exps, so that no mask and no repeated
    cache exist. Leaves keys and values of the candidates in free slots of the cache, but for surplus ones
    that only pad.
    """

    def __init__(self, state: State, columns: slice | None):
        """Start at the first layer; candidates go to these columns of `State.scored`, or nowhere."""
        self.state = state
        self.columns = columns
        self.layer = 0

    def __call__(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """(B, H, M, D / H) each."""
        return merge_with_self(q, k, v, *self.prefix_alone(q, k, v))

    def prefix_alone(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Attention (B, H, M, D / H) without the candidates' own keys, and its log-sum-exp (B, H, M, 1).

        Before anything is revealed that is -inf, and the outputs are the candidates' own values.
        """
        length = self.state.length
        keys, values = self.state.keys[self.layer], self.state.values[self.layer]
        self.layer += 1
        if self.columns is not None:
            free = slice(length + self.columns.start, length + self.columns.stop)
            m = free.stop - free.start
            keys[:, :, free], values[:, :, free] = k[:, :, :m], v[:, :, :m]
        if length == 0:
            return v, v.new_full((*v.shape[:3], 1), -torch.inf, dtype=torch.float32)
        return attend_with_total(q, keys[:, :, :length], values[:, :, :length])


class Extend:
    """Causal attention of new steps to the cache and to one another; writes them into the cache."""

    def __init__(self, state: State, length: int):
        """New steps go to cache slots from `length` on."""
        self.state = state
        self.length = length
        self.layer = 0

    def __call__(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """(B, H, T, D / H) each."""
        end = self.length + q.shape[2]
        keys, values = self.state.keys[self.layer], self.state.values[self.layer]
        keys[:, :, self.length : end] = k
        values[:, :, self.length : end] = v
        self.layer += 1
        if self.length == 0:
            return causal(q, k, v)
        visible = torch.ones(q.shape[2], end, dtype=torch.bool, device=q.device).tril(self.length)
        return F.scaled_dot_product_attention(q, keys[:, :, :end], values[:, :, :end], attn_mask=visible)
