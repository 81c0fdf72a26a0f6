"""Whether generated images are copies of training images: distances to the nearest one, and equal tokens.

Test images, which were not trained on, are the reference: data sets hold near duplicates, and a distance or a
share says nothing alone.
"""

import logging
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

MOST_COPIES = 0.01
"""Share of copies beyond that of test images; with more, distances reward copying."""
log = logging.getLogger("anyorder")


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


def copies(metrics: Mapping[str, Any]) -> bool:
    """Whether more samples than test images, by `MOST_COPIES`, have the tokens of a training image."""
    return metrics.get("token_copies", 0) > metrics.get("token_copies_of_test", 0) + MOST_COPIES


def warnings(metrics: Mapping[str, Any], name: str) -> list[str]:
    """What to print with the numbers of these samples, if anything; logged, too."""
    if not copies(metrics):
        return []
    share = f"{100 * metrics['token_copies']:.0f} % of {name} are training images, token for token"
    log.warning("%s: FD, KID and recall take them for real ones", share)
    return [f"{share}: FD, KID and recall take them for real ones."]
