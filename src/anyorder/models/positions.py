"""Learned functions of real 2-D coordinates, and the displacements within a grid."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from anyorder.contracts import Grid

if TYPE_CHECKING:
    pass


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

    def forward(self, coordinates: Tensor) -> Tensor:
        """Coordinates (..., 2) in patches to encodings (..., D)."""
        angles = (coordinates[..., None] * self.frequencies).flatten(-2)
        features = torch.cat((angles.sin(), angles.cos()), dim=-1)
        return self.out(F.silu(self.hidden(features.to(self.hidden.weight.dtype))))


def displacements(grid: Grid, device: torch.device | str | None = None) -> Tensor:
    """All displacements between two positions of a grid, ((2h - 1)(2w - 1), 2) float32, in patches."""
    down, right = Grid(2 * grid.h - 1, 2 * grid.w - 1).coordinates(device).unbind(1)
    # Numbers, not a tensor made of them: a GPU would have to finish all its work before it took one.
    return torch.stack((down - (grid.h - 1), right - (grid.w - 1)), dim=1)


def displacement_index(grid: Grid, start: Tensor, end: Tensor) -> Tensor:
    """Row of `displacements` that leads from positions `start` to positions `end`, int64."""
    down = end // grid.w - start // grid.w + grid.h - 1
    return down * (2 * grid.w - 1) + end % grid.w - start % grid.w + grid.w - 1


@dataclass
class PositionTables:
    """The encodings of one grid, evaluated once per forward pass or decoding run."""

    grid: Grid
    current: Tensor | None
    """A, (N, D)."""
    first: Tensor | None
    """S, (N, D)."""
    following: Tensor | None
    """R: ((2h - 1)(2w - 1), D) by displacement, or (N, D) by position."""
    cos: Tensor | None
    """(N + 1, D / H / 2); row N, for the condition, is the identity rotation."""
    sin: Tensor | None


@dataclass
class Rotation:
    """cos and sin (B, 1, T, D / H / 2) of the positions that rotate queries and keys."""

    queries: tuple[Tensor, Tensor]
    keys: tuple[Tensor, Tensor]


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary encoding: halves of the last dimension are real and imaginary parts."""
    re, im = x.chunk(2, -1)
    cos, sin = cos.to(x.dtype), sin.to(x.dtype)
    return torch.cat((re * cos - im * sin, re * sin + im * cos), dim=-1)
