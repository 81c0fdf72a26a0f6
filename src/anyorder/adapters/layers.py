"""Layers, configuration and checks that the published GPT families share.

LlamaGen (arXiv 2406.06525), RandAR (arXiv 2412.01827) and ARPG (arXiv 2503.10568) are Llama-like: no biases,
RMSNorm, SwiGLU, rotary positions. Modules have the names of the published state dicts.

Shapes: B images, T inputs, M candidates, D width, H heads, V codebook size, N positions.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from anyorder import contracts
from anyorder.models import attention, conditioning, layers
from anyorder.models.positions import check_shapes


@dataclass
class GPTConfig:
    """Size of a published model; the defaults are those of the L models at 256 x 256 pixels."""

    depth: int = 24
    """Number of blocks, of both decoders together where there are two."""
    width: int = 1024
    """Width D of every hidden state, a multiple of 4 * heads."""
    heads: int = 16
    """Number of attention heads, H; published models have heads of width 64."""
    vocab_size: int = 16384
    """V, the tokenizer's codebook size."""
    grid: tuple[int, int] = (16, 16)
    """Rows and columns of patches in training."""
    num_classes: int = 1000
    """Number of class labels."""
    label_dropout: float = 0.1
    """Share of labels hidden in training, in [0, 1); guidance needs more than 0."""
    extrapolated: int | None = None
    """On other grids than in training: how many of the highest rotary frequencies of either axis are kept,
    while the others are stretched to the extent of training (RandAR uses 2); null stretches none."""
    joint_steps: bool = False
    """Positions of one step see one another as in the published sampler (RandAR: queries see the earlier
    ones; ARPG: tokens see all), unlike in training. For given and random orders of several positions per
    step; one at a time it changes nothing, but that ARPG takes the known patches of a hole as one step."""

    def __post_init__(self) -> None:
        self.grid = (self.grid[0], self.grid[1])
        contracts.at_least(1, self, "depth", "width", "heads", "vocab_size", "num_classes")
        width, unit = self.width, 4 * self.heads
        contracts.require(width % unit == 0, f"width must be a multiple of 4 * heads = {unit}, got {width}")
        share, kept = self.label_dropout, self.extrapolated
        contracts.require(0 <= share < 1, f"label_dropout must lie in [0, 1), got {share}")
        contracts.require((kept or 0) >= 0, f"extrapolated must be >= 0 frequencies or null, got {kept}")
        contracts.Grid(*self.grid)


def heads_of(width: int) -> int:
    """H, which no tensor tells: heads are 64 wide, in LlamaGen-3B (D = 3200) 100.

    Raises:
        ValueError: not a published width.
    """
    head_width = 100 if width == 3200 else 64
    whole = width % head_width == 0
    contracts.require(whole, f"width {width} is no multiple of {head_width}: say how many heads, heads=...")
    return width // head_width


class PublishedModel(contracts.AnyOrderNetwork):
    """What the adapters share: labels, rotations, checks, the start of a pass and of decoding."""

    config: GPTConfig
    decoders, inputs = 1, 1
    """Decoders that share the blocks, the first of which has a cache; inputs that it holds per position."""

    def __init__(self, config: GPTConfig):
        """Build from a configuration; weights come from the global random generator."""
        super().__init__()
        self.config, self.grid = config, contracts.Grid(*config.grid)
        self.vocab_size, self.num_classes = config.vocab_size, config.num_classes

    def forward(
        self, tokens: Tensor, condition: Tensor | None, order: Tensor, grid: contracts.Grid | None = None
    ) -> Tensor:
        """Teacher-forced logits (B, N, V) in order steps; see `contracts.AnyOrderModel`.

        Raises:
            ValueError: shapes that do not fit the grid, labels out of range, an order that it cannot take.
        """
        check_shapes(tokens, order, grid or self.grid)
        layers.unpack(self)
        labels = self._labels(len(tokens), condition)
        return self._teacher_forced(tokens, labels, order, self._rotations(grid))

    def start(
        self, batch_size: int, condition: Tensor | None = None, grid: contracts.Grid | None = None
    ) -> attention.DecodingState:
        """The state before anything is revealed: O(depth * B * N * D); refuses labels out of range."""
        labels = self._labels(batch_size, condition, check=True)
        layers.pack(self)
        config, length = self.config, self.inputs * (grid or self.grid).n + 1
        size = (config.depth // self.decoders, batch_size, config.heads, length, config.width // config.heads)
        cache = attention.Cache.empty(next(self.parameters()), *size)
        return self._start(labels, self._rotations(grid), cache)

    def _teacher_forced(self, tokens: Tensor, labels: Tensor, order: Tensor, rotations: Tensor) -> Tensor:
        """Logits (B, N, V), from checked labels (B,) and the rotations (N + 1, D / H / 2) of the grid."""
        raise NotImplementedError

    def _start(self, labels: Tensor, rotations: Tensor, cache: attention.Cache) -> attention.DecodingState:
        """The state with an empty cache."""
        raise NotImplementedError

    @property
    def joint_steps(self) -> bool:
        """Whether the positions of one step see one another."""
        return self.config.joint_steps

    def _labels(self, batch_size: int, condition: Tensor | None, check: bool | None = None) -> Tensor:
        """Labels (B,) int64 in [0, num_classes]; None and -1 become `num_classes`, the null label."""
        sizes, where = [self.num_classes], next(self.parameters()).device
        values = conditioning.read_condition(condition, batch_size, sizes, where, check)
        if self.training and condition is not None:
            values = conditioning.hide(values, 0, self.config.label_dropout, 0.0)
        return torch.where(values[:, 0] < 0, self.num_classes, values[:, 0])

    def _rotations(self, grid: contracts.Grid | None) -> Tensor:
        """The table of `rotation_table`, where the weights are."""
        kept, head_width = self.config.extrapolated, self.config.width // self.config.heads
        stretched, where = self.grid if kept is not None else None, next(self.parameters()).device
        return rotation_table(grid or self.grid, head_width, where, stretched, kept or 0)


class FeedForward(nn.Module):
    """SwiGLU: w2(silu(w1 x) * w3 x); hidden width 8/3 D, rounded up to 256."""

    def __init__(self, width: int):
        super().__init__()
        hidden = -(-int(8 * width / 3) // 256) * 256
        self.w1 = layers.Linear(width, hidden, bias=False)
        self.w3 = layers.Linear(width, hidden, bias=False)
        self.w2 = layers.Linear(hidden, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """(..., D) to (..., D)."""
        return self.w2(nn.functional.silu(self.w1(x)) * self.w3(x))


def norm(width: int) -> layers.RMSNorm:
    """The norm of all three families."""
    return layers.RMSNorm(width, eps=1e-5)


def rotation_table(
    grid: contracts.Grid,
    head_width: int,
    device: torch.device | str | None = None,
    stretched_to: contracts.Grid | None = None,
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
    """Rotary encoding of (B, H, T, D / H) by (B, T, D / H / 2) complex64, rows of `rotation_table`.

    Neighbours (x0, x1), (x2, x3), ... are real and imaginary parts.
    """
    pairs = torch.view_as_complex(x.float().unflatten(-1, (-1, 2)).contiguous())
    return torch.view_as_real(pairs * factors[:, None]).flatten(-2).to(x.dtype)
