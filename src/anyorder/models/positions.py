"""Learned functions of real 2-D coordinates, displacements within a grid, rotary encoding."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from anyorder.contracts import Grid, require


class CoordinateEncoding(nn.Module):
    """A learned function of real 2-D coordinates: sin-cos features, then a small network."""

    frequencies: Tensor

    def __init__(self, width: int, features: int = 32, longest: float = 256.0):
        """Use `features` wavelengths per axis, from 2 to `longest` patches, geometrically."""
        super().__init__()
        wavelengths = torch.logspace(math.log10(2.0), math.log10(longest), features)
        self.register_buffer("frequencies", 2 * math.pi / wavelengths, persistent=False)
        self.hidden = nn.Linear(4 * features, width)
        self.out = nn.Linear(width, width)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        """As of `nn.Module`, but frequencies stay float32: rounded ones would move far positions."""
        exact = self.frequencies
        super()._apply(fn, recurse)
        if self.frequencies.dtype != exact.dtype:
            self.frequencies = exact.to(self.frequencies.device)
        return self

    def forward(self, coordinates: Tensor) -> Tensor:
        """Coordinates (..., 2) float32 in patches to encodings (..., D)."""
        angles = (coordinates[..., None] * self.frequencies).flatten(-2)
        features = torch.cat((angles.sin(), angles.cos()), dim=-1)
        return self.out(nn.functional.silu(self.hidden(features.to(self.hidden.weight.dtype))))


def displacements(grid: Grid, device: torch.device | str | None = None) -> Tensor:
    """All displacements between two positions of a grid, ((2h - 1)(2w - 1), 2) float32, in patches."""
    down, right = Grid(2 * grid.h - 1, 2 * grid.w - 1).coordinates(device).unbind(1)
    # Numbers, not a tensor made of them: a GPU would have to finish all its work before it took one.
    return torch.stack((down - (grid.h - 1), right - (grid.w - 1)), dim=1)


def displacement_index(grid: Grid, start: Tensor, end: Tensor) -> Tensor:
    """Row of `displacements` that leads from positions `start` to positions `end`, int64."""
    middle = (2 * grid.h - 1) * (2 * grid.w - 1) // 2  # the row of no displacement
    return end - start + (end // grid.w - start // grid.w) * (grid.w - 1) + middle


def check_shapes(tokens: Tensor, order: Tensor, grid: Grid) -> None:
    """Refuse, with a ValueError, tokens and orders that do not fill the grid."""
    shapes = f"got {tuple(tokens.shape)} and {tuple(order.shape)}"
    needed = f"a {grid.h} x {grid.w} grid needs tokens and order of shape (B, {grid.n}), {shapes}"
    require(tokens.shape[1:] == (grid.n,) and order.shape == tokens.shape, needed)


class Rotation(NamedTuple):
    """cos and signed sin (B, 1, T, D / H) of the positions that rotate queries and keys."""

    queries: tuple[Tensor, Tensor]
    keys: tuple[Tensor, Tensor]


class PositionTables(NamedTuple):
    """The encodings of one grid, evaluated once per forward pass or decoding run."""

    grid: Grid
    current: Tensor | None
    """A, (N, D)."""
    first: Tensor | None
    """S, (N, D)."""
    following: Tensor | None
    """R: ((2h - 1)(2w - 1), D) by displacement if `relative`, else (N, D) by position."""
    relative: bool
    rotary: tuple[Tensor, Tensor] | None
    """See `rotary_tables`."""

    def next(self, last: Tensor, positions: Tensor) -> Tensor | float:
        """R(position - last) for last in [0, N), (B, T, D)."""
        if self.following is None:
            return 0.0
        index = displacement_index(self.grid, last, positions) if self.relative else positions
        return nn.functional.embedding(index, self.following)

    def rotation(self, last: Tensor, positions: Tensor) -> Rotation | None:
        """Queries turn by the position they ask about, keys by the position of their own patch."""
        if self.rotary is None:
            return None
        cos, sin = self.rotary
        queries, keys = ((cos[at][:, None], sin[at][:, None]) for at in (positions, last))
        return Rotation(queries, keys)


def rotary_tables(at: Tensor, head_width: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """cos and signed sin, (N + 1, D / H), for `rotate` and coordinates (N, 2) float32.

    Half of the frequencies turn with the row, half with the column, base 100 (small grids). Row N, for the
    condition, is the identity rotation.
    """
    quarter = head_width // 4
    frequencies = 100.0 ** (-torch.arange(quarter, dtype=torch.float32, device=at.device) / quarter)
    angles = nn.functional.pad((at[:, :, None] * frequencies).flatten(1), (0, 0, 0, 1))
    cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)
    return torch.cat((cos, cos), dim=1), torch.cat((-sin, sin), dim=1)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary encoding: halves of the last dimension are real and imaginary parts."""
    (real, imaginary), cos, sin = x.chunk(2, -1), cos.to(x.dtype), sin.to(x.dtype)
    return x * cos + torch.cat((imaginary, real), dim=-1) * sin
