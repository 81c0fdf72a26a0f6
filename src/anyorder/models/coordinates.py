"""Learned functions of real 2-D coordinates, and the displacements within a grid."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from anyorder.contracts import Grid


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
