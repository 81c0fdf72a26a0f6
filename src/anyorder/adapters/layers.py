"""What the published GPT families share: norms, feed-forward, 2-D rotary encoding, caches.

LlamaGen (arXiv 2406.06525), RandAR (arXiv 2412.01827) and ARPG (arXiv 2503.10568) are Llama-like: no biases,
RMSNorm, SwiGLU, rotary positions. Modules bear the names of the published state dicts.

Shapes: B images, T inputs, M candidates, L cached inputs, D width, H heads, V codebook size, N positions.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from anyorder.contracts import AnyOrderNetwork, Grid
from anyorder.models.attention import attend_with_self, keep
from anyorder.models.layers import Linear, RMSNorm

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]
"""Queries, keys, values, each (B, H, T, D / H), to outputs of the same shape."""


@dataclass
class GPTConfig:
    """Size of a published model; the defaults are those of the L models at 256 x 256 pixels."""

    depth: int = 24
    """Number of blocks, of both decoders together where there are two."""
    width: int = 1024
    """D."""
    heads: int = 16
    """H; the head width D / H, 64 in the published models, must be divisible by 4."""
    vocab_size: int = 16384
    """V, the tokenizer's codebook size."""
    grid: tuple[int, int] = (16, 16)
    """Rows and columns of patches in training."""
    num_classes: int = 1000
    """Number of class labels."""
    label_dropout: float = 0.1
    """Share of labels replaced by the null label in training, for guidance."""
    extrapolated: int | None = None
    """On other grids: how many of the highest rotary frequencies of either axis turn by the patch as in
    training, while the others are stretched to its extent (RandAR's choice is 2); None: all by the patch."""
    joint_steps: bool = False
    """Positions of one step see one another as in the published sampler (RandAR: queries see the earlier
    ones; ARPG: tokens see all), which was not so in training; matters only with several per step."""

    def __post_init__(self) -> None:
        self.grid = (self.grid[0], self.grid[1])
        for name in ("depth", "width", "heads", "vocab_size", "num_classes"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be >= 1, got {getattr(self, name)}")
        if self.width % (4 * self.heads):
            raise ValueError(f"width must be a multiple of 4 * heads = {4 * self.heads}, got {self.width}")
        if not 0 <= self.label_dropout < 1:
            raise ValueError(f"label_dropout must lie in [0, 1), got {self.label_dropout}")
        if self.extrapolated is not None and self.extrapolated < 0:
            raise ValueError(f"extrapolated must be >= 0 frequencies or null, got {self.extrapolated}")
        Grid(*self.grid)


def shape_of(tensors: Mapping[str, Tensor], name: str, rank: int = 2) -> tuple[int, ...]:
    """The shape of a tensor that a configuration is read off.

    Raises:
        ValueError: it is missing, or has another number of dimensions.
    """
    if name not in tensors:
        raise ValueError(f"missing {name}")
    if tensors[name].ndim != rank:
        raise ValueError(f"{name} is {tuple(tensors[name].shape)}, expected {rank} dimensions")
    return tuple(tensors[name].shape)


def count(tensors: Mapping[str, Tensor], prefix: str) -> int:
    """How many blocks `prefix`0, `prefix`1, ... there are: the largest number and one."""
    numbers = [name[len(prefix) :].partition(".")[0] for name in tensors if name.startswith(prefix)]
    return max((int(number) + 1 for number in numbers if number.isdecimal()), default=0)


def heads_of(width: int) -> int:
    """H, which no tensor tells: heads are 64 wide, in LlamaGen-3B (D = 3200) 100.

    Raises:
        ValueError: not a published width.
    """
    head_width = 100 if width == 3200 else 64
    if width % head_width:
        raise ValueError(f"width {width} is no multiple of {head_width}: say how many heads, heads=...")
    return width // head_width


class PublishedModel(AnyOrderNetwork):
    """What the adapters have in common: labels, rotations, checks."""

    config: GPTConfig

    def __init__(self, config: GPTConfig):
        """Take over what the contract asks for."""
        super().__init__()
        self.config = config
        self.vocab_size = config.vocab_size
        self.num_classes = config.num_classes
        self.grid = Grid(*config.grid)

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next(self.parameters()).device

    def _labels(self, batch_size: int, condition: Tensor | None) -> Tensor:
        """Labels (B,) int64 in [0, num_classes]; None and -1 become `num_classes`, the null label."""
        null = self.num_classes
        if condition is None:
            return torch.full((batch_size,), null, device=self.device)
        condition = torch.where(condition < 0, null, condition)
        if self.training and self.config.label_dropout:
            hidden = torch.rand(condition.shape, device=self.device) < self.config.label_dropout
            condition = torch.where(hidden, null, condition)
        return condition

    def _check_labels(self, batch_size: int, condition: Tensor | None) -> None:
        if condition is None:
            return
        wrong = (condition < -1) | (condition >= self.num_classes)
        if condition.shape != (batch_size,) or bool(wrong.any()):
            raise ValueError(
                f"labels must have shape ({batch_size},) and lie in [0, {self.num_classes}) (-1 for none), "
                f"got shape {tuple(condition.shape)} with values {condition.unique().tolist()[:8]}"
            )

    def _rotations(self, grid: Grid) -> Tensor:
        """The table of `rotation_table`, on the device of the weights."""
        stretched = self.grid if self.config.extrapolated is not None else None
        head_width = self.config.width // self.config.heads
        return rotation_table(grid, head_width, self.device, stretched, self.config.extrapolated or 0)

    def _empty_cache(self, depth: int, batch_size: int, length: int) -> Cache:
        """O(depth * B * L * D) for `length` inputs, in the dtype that the layers compute in."""
        dtype = next(self.parameters()).dtype
        if torch.is_autocast_enabled(self.device.type):
            dtype = torch.get_autocast_dtype(self.device.type)
        heads = self.config.heads
        shape = (depth, batch_size, heads, length, self.config.width // heads)
        keys, values = (torch.empty(shape, device=self.device, dtype=dtype) for _ in range(2))
        return Cache(keys, values, 0)


def check_shapes(tokens: Tensor, order: Tensor, grid: Grid) -> None:
    """Refuse tokens and orders that do not fill the grid.

    Raises:
        ValueError: they do not.
    """
    if tokens.shape[1:] != (grid.n,) or order.shape != tokens.shape:
        raise ValueError(
            f"a {grid.h} x {grid.w} grid needs tokens and order of shape (B, {grid.n}), "
            f"got {tuple(tokens.shape)} and {tuple(order.shape)}"
        )


# --- layers -----------------------------------------------------------------------------------------------


class FeedForward(nn.Module):
    """SwiGLU: w2(silu(w1 x) * w3 x); hidden width 8/3 D, rounded up to 256."""

    def __init__(self, width: int):
        """No biases."""
        super().__init__()
        hidden = -(-int(8 * width / 3) // 256) * 256
        self.w1 = Linear(width, hidden, bias=False)
        self.w3 = Linear(width, hidden, bias=False)
        self.w2 = Linear(hidden, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """(..., D) to (..., D)."""
        return self.w2(F.silu(self.w1(x)) * self.w3(x))


def norm(width: int) -> RMSNorm:
    """The norm of all three families."""
    return RMSNorm(width, eps=1e-5)


def split_heads(x: Tensor, heads: int) -> Tensor:
    """(B, T, D) to (B, H, T, D / H)."""
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


# --- positions --------------------------------------------------------------------------------------------


def rotation_table(
    grid: Grid,
    head_width: int,
    device: torch.device | str | None = None,
    stretched_to: Grid | None = None,
    extrapolated: int = 0,
) -> Tensor:
    """Rotary factors e^(i angle) of every position, (N + 1, D / H / 2) complex64, base 10000.

    The first half of the angles turns with the row, the second with the column. Row N is for the class
    token and *zero*, as published: its queries and keys vanish, so others see it through its value alone.

    Args:
        grid: the N positions.
        head_width: D / H.
        device: where to put the table.
        stretched_to: grid of training, to whose extent the coordinates are stretched, except for the highest
            frequencies (as RandAR does for resolution extrapolation, after NTK-aware interpolation).
        extrapolated: how many frequencies of either axis are not stretched.
    """
    quarter = head_width // 4
    frequencies = 10000.0 ** (-torch.arange(quarter, device=device) / quarter)
    at = grid.coordinates(device)[:, :, None].expand(-1, -1, quarter)
    if stretched_to is not None:
        pairs = ((stretched_to.h, grid.h), (stretched_to.w, grid.w))
        scale = torch.tensor([(before - 1) / max(1, now - 1) for before, now in pairs], device=device)
        low = torch.arange(quarter, device=device) >= extrapolated
        at = torch.where(low, at * scale[:, None], at)
    angles = (at * frequencies).flatten(1)
    table = torch.polar(torch.ones_like(angles), angles)
    return torch.cat((table, torch.zeros_like(table[:1])))


def rotate(x: Tensor, factors: Tensor) -> Tensor:
    """Rotary encoding: neighbours (x0, x1), (x2, x3), ... are real and imaginary parts.

    Args:
        x: (B, H, T, D / H).
        factors: (B, T, D / H / 2) complex64, rows of `rotation_table`.
    """
    pairs = torch.view_as_complex(x.float().unflatten(-1, (-1, 2)).contiguous())
    return torch.view_as_real(pairs * factors[:, None]).flatten(-2).to(x.dtype)


# --- who sees whom ----------------------------------------------------------------------------------------


def causal(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Each input sees itself and the earlier ones."""
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)


@dataclass
class Cache:
    """Keys and values of the inputs so far, preallocated and written in place."""

    keys: Tensor
    """(depth, B, H, L, D / H); the first `length` inputs are valid."""
    values: Tensor
    length: int

    @property
    def room(self) -> int:
        """Free slots."""
        return self.keys.shape[3] - self.length

    def extend(self, joint: bool = False) -> list[Attend]:
        """One attention per layer: new inputs see the cache and, causally or all, one another.

        Their keys and values are written; `length` is for the caller to raise, after the last layer.
        """
        layers = zip(self.keys, self.values, strict=True)
        return [partial(_extend, keys, values, self.length, joint) for keys, values in layers]

    def keep(self, columns: Tensor) -> None:
        """Make one more input part of the cache: the one in slot `length` + columns (B,) of each row."""
        keep(self.keys, self.values, self.length, columns)
        self.length += 1


def _extend(keys: Tensor, values: Tensor, begin: int, joint: bool, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    end = begin + k.shape[2]
    keys[:, :, begin:end], values[:, :, begin:end] = k, v
    keys, values = keys[:, :, :end], values[:, :, :end]
    return (
        F.scaled_dot_product_attention(q, keys, values) if joint else _causal_behind(begin, q, keys, values)
    )


def _causal_behind(length: int, q: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """The last inputs see the first `length` ones and, causally, one another."""
    if q.shape[2] == 1:
        return F.scaled_dot_product_attention(q, keys, values)
    mask = torch.ones(q.shape[2], keys.shape[2], dtype=torch.bool, device=q.device).tril(length)
    return F.scaled_dot_product_attention(q, keys, values, attn_mask=mask)


@dataclass
class Candidates:
    """Attention of queries that see the cache and themselves but not one another.

    Keys and values go to free slots of the cache, `behind` slots after what is valid, from where `Cache.keep`
    takes the chosen one. With `joint`, queries see the earlier queries as well. The first `pending` inputs
    are no queries but the next of the cache, which queries see.
    """

    cache: Cache
    pending: int = 0
    behind: int = 0
    joint: bool = False
    layer: int = 0

    def __call__(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """(B, H, pending + M, D / H) each."""
        keys, values = self.cache.keys[self.layer], self.cache.values[self.layer]
        self.layer += 1
        first, end = self.pending, self.cache.length + self.pending
        free = slice(self.cache.length + self.behind, self.cache.length + self.behind + k.shape[2])
        keys[:, :, free], values[:, :, free] = k, v
        if self.joint:
            assert not self.behind, "queries that see one another are scored together"
            return _causal_behind(self.cache.length, q, keys[:, :, : free.stop], values[:, :, : free.stop])
        k, v, keys, values = k[:, :, first:], v[:, :, first:], keys[:, :, :end], values[:, :, :end]
        # One input that waits sees all that the queries see: the cache is read once for both.
        if first <= 1:
            return attend_with_self(q, k, v, keys, values)
        before = _causal_behind(self.cache.length, q[:, :, :first], keys, values)
        return torch.cat((before, attend_with_self(q[:, :, first:], k, v, keys, values)), dim=2)
