"""Row numbers: consecutive batches, and a few rows spread over many."""

from collections.abc import Iterator

import numpy as np


def batches(rows: np.ndarray, size: int) -> Iterator[np.ndarray]:
    """Row numbers, at most `size` at a time."""
    for begin in range(0, len(rows), size):
        yield rows[begin : begin + size]


def slices(n: int, size: int, start: int = 0) -> Iterator[np.ndarray]:
    """Consecutive row numbers from `start` up to n, at most `size` at a time."""
    return batches(np.arange(start, n), size)


def evenly_spaced(limit: int, total: int) -> np.ndarray:
    """At most `limit` row numbers, evenly over all: the first rows of a split may not be like the others."""
    return np.linspace(0, total - 1, min(limit, total)).round().astype(np.int64)
