"""Whether generated images are copies of training images: distances to the nearest one, and equal tokens.

Test images, which were not trained on, are the reference: data sets hold near duplicates, and a distance or a
share says nothing alone.
"""

import numpy as np
import torch
from torch import Tensor


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


def closeness(samples: Tensor, test: Tensor) -> dict[str, float]:
    """Compare the distances of samples (m,) and test images (n,) to their nearest training images.

    Returns:
        nearest_training_ratio: of the medians, 0 for copies; nearest_training_share: of samples nearer than
        all but 1 % of the test images are, by chance 0.01.
    """
    share = (samples < test.double().quantile(0.01)).double().mean()
    ratio = samples.median() / test.median()
    return {"nearest_training_ratio": float(ratio), "nearest_training_share": float(share)}


def copied_share(tokens: np.ndarray, training: np.ndarray, chunk: int = 4096) -> float:
    """Share of the rows of `tokens` (m, N) that equal a row of `training` (n, N), both integers."""
    samples = [row.tobytes() for row in np.asarray(tokens, dtype=np.int32)]
    distinct = set(samples)
    copies: set[bytes] = set()
    for begin in range(0, len(training), chunk):  # read piece by piece: a cache may exceed the memory
        rows = np.asarray(training[begin : begin + chunk], dtype=np.int32)
        copies |= distinct.intersection(row.tobytes() for row in rows)
    return sum(row in copies for row in samples) / len(samples)
