"""Whether generated images are copies of training images: distances to the nearest one, and equal tokens.

Test images, which were not trained on, are the reference: data sets hold near duplicates, and a distance or a
share says nothing on its own.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor


class Closeness(NamedTuple):
    """How near samples are to training images, compared with test images."""

    nearest_training_ratio: float
    """Median distance of samples to their nearest training image over that of test images; copies: 0."""
    nearest_training_share: float
    """Share of samples nearer to a training image than all but 1 % of test images are; expect 0.01."""


def nearest_distance(queries: Tensor, points: Tensor, chunk: int = 512) -> Tensor:
    """Euclidean distance (m,) float32 of queries (m, dim) to the nearest of one or more points (n, dim).

    `chunk` rows of the distance matrix are held at once.
    """
    centre = points.mean(0)
    points = points - centre
    found = []
    for part in (queries - centre).split(chunk):
        # Products cancel where two points are close: they are good enough to find the nearest one only.
        nearest = torch.cdist(part, points).argmin(1)
        found.append((part - points[nearest]).norm(dim=1))
    return torch.cat(found)


def closeness(samples: Tensor, test: Tensor) -> Closeness:
    """Compare the distances of samples (m,) and test images (n,) to their nearest training images."""
    return Closeness(
        nearest_training_ratio=float(samples.median() / test.median()),
        nearest_training_share=float((samples < test.double().quantile(0.01)).double().mean()),
    )


def copied_share(tokens: np.ndarray, training: np.ndarray, chunk: int = 4096) -> float:
    """Share of the rows of `tokens` (m, N) that equal a row of `training` (n, N), both integers."""
    samples = [row.tobytes() for row in np.asarray(tokens, dtype=np.int32)]
    distinct = set(samples)
    copies: set[bytes] = set()
    for begin in range(0, len(training), chunk):  # read piece by piece: a cache may exceed the memory
        rows = np.asarray(training[begin : begin + chunk], dtype=np.int32)
        copies |= distinct.intersection(row.tobytes() for row in rows)
    return sum(row in copies for row in samples) / len(samples)
