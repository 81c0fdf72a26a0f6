"""Bootstrap intervals of differences: two sets of generated images against one reference.

Generated images are resampled with replacement (Efron 1979). A resample is a row of *counts*, float64 (R, n):
how often it holds each image; features are never copied. Reference and models stay as they are: an interval
is about the noise of sampling, not about that of training.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from anyorder.evaluation import metrics
from anyorder.evaluation.metrics import FeatureStatistics


class Difference(NamedTuple):
    """A metric of two sets, and the interval of a - b; relative to b where b is above zero, else None."""

    a: float
    b: float
    difference: float
    low: float
    high: float
    relative: float | None
    relative_low: float | None
    relative_high: float | None

    @classmethod
    def read(cls, values: Mapping[str, Any]) -> Difference:
        """From JSON, which has null for the bounds of an unbounded interval."""
        bounds = {key: math.nan for key in ("low", "high") if values[key] is None}
        return cls(**{**values, **bounds})

    @property
    def reversed(self) -> Difference:
        """The same of b - a."""

        def inverse(ratio: float | None) -> float | None:
            return None if ratio is None or ratio <= -1 else 1 / (1 + ratio) - 1

        ratios = inverse(self.relative), inverse(self.relative_high), inverse(self.relative_low)
        return Difference(self.b, self.a, -self.difference, -self.high, -self.low, *ratios)


def compare(
    real: FeatureStatistics,
    a: FeatureStatistics,
    b: FeatureStatistics,
    resamples: int = 400,
    confidence: float = 0.95,
    seed: int = 0,
) -> dict[str, Difference]:
    """Differences a - b of `distance` (Fréchet), `kid` (of all images), `precision` and `recall` of two sets.

    Sets of one size are resampled together, image by image: they have the same labels and random streams,
    whose share in the noise cancels.

    Raises:
        ValueError: `resamples` < 2, `confidence` outside (0, 1), or features of different extractors.
    """
    if resamples < 2 or not 0 < confidence < 1:
        raise ValueError(
            f"resamples must be >= 2 and confidence lie in (0, 1), got {resamples} and {confidence}"
        )
    if len({real.extractor, a.extractor, b.extractor}) > 1:
        raise ValueError(
            f"the features are by '{real.extractor}', '{a.extractor}' and '{b.extractor}': "
            "evaluate both sets with one extractor"
        )
    generator = torch.Generator().manual_seed(seed)
    counts = resample_counts(a.n, resamples, generator)
    others = counts if a.n == b.n else resample_counts(b.n, resamples, generator)
    of_a, of_b = _metrics(real, a, counts), _metrics(real, b, others)
    return {name: _difference(of_a[name], of_b[name], confidence) for name in of_a}


def resample_counts(n: int, resamples: int, generator: torch.Generator) -> Tensor:
    """How often each of n images is in each resample, (1 + resamples, n) float64; row 0 is the set itself."""
    rows = torch.randint(n, (resamples, n), generator=generator)
    counts = [torch.bincount(row, minlength=n) for row in rows]
    return torch.stack([torch.ones(n, dtype=torch.int64), *counts]).double()


def _metrics(real: FeatureStatistics, fake: FeatureStatistics, counts: Tensor) -> dict[str, Tensor]:
    precision, recall = precision_recall_of_counts(real.features, fake.features, counts)
    return {
        "distance": frechet_of_counts(real.gaussian, fake.features, counts),
        "kid": kernel_of_counts(real.features, fake.features, counts),
        "precision": precision,
        "recall": recall,
    }


def _difference(a: Tensor, b: Tensor, confidence: float) -> Difference:
    low, high = _interval(a - b, confidence)
    ratios: tuple[Any, Any, Any] = (None, None, None)
    if (b > 0).all():
        ratio = a / b - 1
        ratios = float(ratio[0]), *_interval(ratio, confidence)
    return Difference(float(a[0]), float(b[0]), float(a[0] - b[0]), low, high, *ratios)


def _interval(values: Tensor, confidence: float) -> tuple[float, float]:
    """Quantiles of the resamples, moved so that their mean is the estimate (row 0).

    Resamples hold images twice and miss others: alone that raises distances and lowers recall. The question
    is how an estimate from n images varies, not what n images less than n different ones would give.
    """
    estimate, resampled = values[0], values[1:]
    tail = (1 - confidence) / 2
    shift = float(estimate - resampled.mean())
    return float(resampled.quantile(tail)) + shift, float(resampled.quantile(1 - tail)) + shift


def frechet_of_counts(real: metrics.Gaussian, fake: Tensor, counts: Tensor) -> Tensor:
    """`metrics.frechet_distance` of every resample of the features `fake` (n, dim), (R,) float64."""
    x = fake.double() - real.mean
    y, n = x @ metrics.root(real.covariance), len(fake)  # the covariance of y is A^1/2 B A^1/2
    means, squares = counts @ x / n, counts @ x.square().sum(1)
    traces = (squares - n * means.square().sum(1)) / (n - 1)
    crosses = torch.stack([_root_trace(y, row) for row in counts])
    return (means.square().sum(1) + real.covariance.trace() + traces - 2 * crosses).clamp(min=0)


def _root_trace(y: Tensor, counts: Tensor) -> Tensor:
    n, there = len(y), counts > 0
    y, weights = y[there], counts[there]
    mean = weights @ y / n
    covariance = ((y * weights[:, None]).T @ y - n * torch.outer(mean, mean)) / (n - 1)
    return torch.linalg.eigvalsh(covariance).clamp(min=0).sqrt().sum()


def kernel_of_counts(real: Tensor, fake: Tensor, counts: Tensor, chunk: int = 1024) -> Tensor:
    """Unbiased squared MMD (KID's kernel) of every resample of the features `fake` (n, dim), (R,) float64.

    Pairs of an image with itself, and with copies of it in the resample, are left out; `chunk` rows of the
    kernel matrix are held at once.
    """
    real, fake = real.double(), fake.double()
    n, m, copies = len(fake), len(real), counts.square()
    real_itself, fake_itself = ((x.square().mean(1) + 1) ** 3 for x in (real, fake))
    within = sum(metrics.kernel(part, real).sum() for part in real.split(chunk)) - real_itself.sum()
    parts = zip(fake.split(chunk), counts.split(chunk, 1), strict=True)
    pairs = sum((metrics.kernel(part, fake) @ counts.T * rows.T).sum(0) for part, rows in parts)
    between = torch.cat([metrics.kernel(part, real).mean(1) for part in fake.split(chunk)])
    among = (pairs - copies @ fake_itself) / (n * n - copies.sum(1))
    return within / (m * (m - 1)) + among - 2 * (counts @ between) / n


def precision_recall_of_counts(
    real: Tensor, fake: Tensor, counts: Tensor, k: int = 3, chunk: int = 1024
) -> tuple[Tensor, Tensor]:
    """`metrics.precision_recall` of every resample of `fake`, (R,) float64 each.

    The balls of the generated manifold keep their radii; a resample decides which of them exist.
    """
    centre = real.double().mean(0)
    real, fake = real.double() - centre, fake.double() - centre
    fits = metrics.covered(real, fake, k, chunk)
    radius, there = metrics.manifold_radius(fake, k, chunk), (counts > 0).float().T
    hits = torch.zeros(len(counts), dtype=torch.float64)
    for part in real.split(chunk):
        inside = (torch.cdist(part, fake) <= radius).float()
        hits += (inside @ there > 0).sum(0)
    return counts @ fits.double() / len(fake), hits / len(real)
