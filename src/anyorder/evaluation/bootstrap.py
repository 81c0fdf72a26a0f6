"""Bootstrap intervals of differences: two sets of generated images against one reference.

Generated and reference images are resampled with replacement (Efron 1979). A resample is a row of *counts*,
float64 (R, n): how often it holds each image; features are never copied. An interval of one pair of sets is
about the noise of the images; `pooled` over several seeds also about that of training.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from anyorder.contracts import require
from anyorder.evaluation import metrics

LEADING = 256
"""Of more dimensions, the noise of the Fréchet distance is that of these with the largest variance."""


class Difference(NamedTuple):
    """A metric of two sets, and the interval of a - b; relative to b where b is above zero, else None.

    `draws` are a - b of the resamples, moved so that their mean is the estimate.
    """

    a: float
    b: float
    difference: float
    low: float
    high: float
    relative: float | None
    relative_low: float | None
    relative_high: float | None
    draws: Sequence[float] = ()
    confidence: float = 0.95

    @classmethod
    def read(cls, values: Mapping[str, Any]) -> "Difference":
        """From JSON, which has null for what is not finite: there are no draws then."""
        bounds: dict[str, Any] = {key: math.nan for key in ("low", "high") if values[key] is None}
        finite = {} if None not in values.get("draws", ()) else {"draws": ()}
        return cls(**{**values, **bounds, **finite})

    @property
    def reversed(self) -> "Difference":
        """The same of b - a."""

        def inverse(ratio: float | None) -> float | None:
            return None if ratio is None or ratio <= -1 else 1 / (1 + ratio) - 1

        ratios = inverse(self.relative), inverse(self.relative_high), inverse(self.relative_low)
        rest = [-draw for draw in self.draws], self.confidence
        return Difference(self.b, self.a, -self.difference, -self.high, -self.low, *ratios, *rest)


def compare(
    real: metrics.FeatureStatistics,
    a: metrics.FeatureStatistics,
    b: metrics.FeatureStatistics,
    resamples: int = 400,
    confidence: float = 0.95,
    seed: int = 0,
) -> dict[str, Difference]:
    """Differences a - b of `distance` (Fréchet), `kid` (of all images), `precision` and `recall` of two sets.

    Sets of one size are resampled together, image by image: they have the same labels and random streams,
    whose share in the noise cancels. Both meet the same resample of the reference.

    Raises:
        ValueError: `resamples` < 2, `confidence` outside (0, 1), features of different extractors, or sets
            of 3 or fewer images.
    """
    _require_enough(real, a, b)
    text = f"resamples must be >= 2 and confidence lie in (0, 1), got {resamples} and {confidence}"
    require(resamples >= 2 and 0 < confidence < 1, text)
    text = f"the features are by '{real.extractor}', '{a.extractor}' and '{b.extractor}'"
    one = real.extractor == a.extractor == b.extractor
    require(one, f"{text}: evaluate both sets with one extractor")
    generator = torch.Generator().manual_seed(seed)
    counts = resample_counts(a.n, resamples, generator)
    others = counts if a.n == b.n else resample_counts(b.n, resamples, generator)
    reals = resample_counts(real.n, resamples, torch.Generator().manual_seed(seed + 1))
    of_a, of_b = _metrics(real, a, counts, reals), _metrics(real, b, others, reals)
    return {name: _difference(of_a[name], of_b[name], confidence) for name in of_a}


def resample_counts(n: int, resamples: int, generator: torch.Generator) -> Tensor:
    """How often each of n images is in each resample, (1 + resamples, n) float64; row 0 is the set itself."""
    rows = torch.randint(n, (resamples, n), generator=generator)
    while n > 1 and (alone := (rows == rows[:, :1]).all(1)).any():  # KID is about pairs of different images
        rows[alone] = torch.randint(n, (int(alone.sum()), n), generator=generator)
    counts = [torch.bincount(row, minlength=n) for row in rows]
    return torch.stack([torch.ones(n, dtype=torch.int64), *counts]).double()


def measures(real: metrics.FeatureStatistics, fake: metrics.FeatureStatistics) -> dict[str, float]:
    """`distance`, `kid` (of all images), `precision` and `recall` of one set."""
    _require_enough(real, fake)
    once = [torch.ones(1, x.n, dtype=torch.float64) for x in (fake, real)]
    return {name: float(value) for name, value in _metrics(real, fake, *once).items()}


def pooled(seeds: Sequence[Difference], confidence: float = 0.95, draws: int = 4000) -> tuple[float, float]:
    """Interval of the mean difference over seeds: seeds are resampled, and of each its images.

    All seeds share a resample of the reference. Few resampled seeds vary too little, by (S - 1) / S: that is
    made good.
    """
    table = torch.tensor([seed.draws for seed in seeds], dtype=torch.float64)
    (s, resamples), generator = table.shape, torch.Generator().manual_seed(0)
    chosen = torch.randint(s, (draws, s), generator=generator)
    which = torch.randint(resamples, (draws, 1), generator=generator)
    estimates = table.mean(1)
    spread = (estimates[chosen].mean(1) - estimates.mean()) * math.sqrt(s / max(1, s - 1))
    values = estimates.mean() + spread + (table - estimates[:, None])[chosen, which].mean(1)
    tail = (1 - confidence) / 2
    return float(values.quantile(tail)), float(values.quantile(1 - tail))


def _require_enough(*sets: metrics.FeatureStatistics) -> None:
    least = min(each.n for each in sets)
    require(least > 3, f"precision and recall need more than 3 images of each set, got {least}")


def _metrics(
    real: metrics.FeatureStatistics, fake: metrics.FeatureStatistics, counts: Tensor, reals: Tensor
) -> dict[str, Tensor]:
    precision, recall = precision_recall_of_counts(real.features, fake.features, counts, real_counts=reals)
    return {
        "distance": _frechet_of_resamples(real, fake, counts, reals),
        "kid": kernel_of_counts(real.features, fake.features, counts, real_counts=reals),
        "precision": precision,
        "recall": recall,
    }


def _frechet_of_resamples(
    real: metrics.FeatureStatistics, fake: metrics.FeatureStatistics, counts: Tensor, reals: Tensor
) -> Tensor:
    """The Fréchet distance (R,) of every pair of resamples; row 0 is that of the sets, of all dimensions."""
    mean, covariance = real.gaussian
    x, y = (s.features.double() - mean for s in (real, fake))
    if len(counts) > 1 and len(mean) > LEADING:
        leading = torch.linalg.eigh(covariance).eigenvectors[:, -LEADING:]
        x, y = x @ leading, y @ leading
    pairs = zip(reals[1:], counts[1:], strict=True)
    rows = [metrics.frechet_distance(gaussian_of_counts(x, r), gaussian_of_counts(y, c)) for r, c in pairs]
    estimate = metrics.frechet_distance(real.gaussian, fake.gaussian)
    return torch.tensor([estimate, *rows], dtype=torch.float64)


def gaussian_of_counts(x: Tensor, counts: Tensor) -> metrics.Gaussian:
    """Moments of a resample of x (n, dim), from how often (n,) it holds each."""
    n = counts.sum()
    mean = counts @ x / n
    return metrics.Gaussian(mean, ((x * counts[:, None]).T @ x - n * torch.outer(mean, mean)) / (n - 1))


def _difference(a: Tensor, b: Tensor, confidence: float) -> Difference:
    low, high = _interval(a - b, confidence)
    ratios: tuple[Any, Any, Any] = (None, None, None)
    if (b > 0).all():
        # To first order around the estimates: resamples, of leading dimensions alone, lie elsewhere.
        ratio = a[0] / b[0] - 1 + (a - b * a[0] / b[0]) / b[0]
        ratios = float(ratio[0]), *_interval(ratio, confidence)
    estimate, resampled = (a - b)[0], (a - b)[1:]
    draws = [float(f"{x:.5g}") for x in resampled - resampled.mean() + estimate]
    return Difference(float(a[0]), float(b[0]), float(estimate), low, high, *ratios, draws, confidence)


def _interval(values: Tensor, confidence: float) -> tuple[float, float]:
    """Quantiles of the resamples, moved so that their mean is the estimate (row 0).

    Resamples hold images twice and miss others: alone that raises distances and lowers recall. The question
    is how an estimate from n images varies, not what n images less than n different ones would give.
    """
    estimate, resampled = values[0], values[1:]
    tail = (1 - confidence) / 2
    shift = float(estimate - resampled.mean())
    return float(resampled.quantile(tail)) + shift, float(resampled.quantile(1 - tail)) + shift


def kernel_of_counts(
    real: Tensor, fake: Tensor, counts: Tensor, chunk: int = 1024, real_counts: Tensor | None = None
) -> Tensor:
    """Unbiased squared MMD (KID's kernel) of every resample of the features `fake` (n, dim), (R,) float64.

    Pairs of an image with itself, and with copies of it in the resample, are left out; `chunk` rows of the
    kernel matrix are held at once. `real` is resampled too if its counts are given.
    """
    real, fake = real.double(), fake.double()
    reals = torch.ones(1, len(real), dtype=torch.float64) if real_counts is None else real_counts
    parts = zip(fake.split(chunk), counts.split(chunk, 1), strict=True)
    between = sum(((metrics.kernel(part, real) @ reals.T) * rows.T).sum(0) for part, rows in parts)
    apart = 2 * between / (len(fake) * len(real))
    return _kernel_within(real, reals, chunk) + _kernel_within(fake, counts, chunk) - apart


def _kernel_within(x: Tensor, counts: Tensor, chunk: int) -> Tensor:
    """Mean of the kernel over pairs of different images of every resample."""
    n, copies, itself = len(x), counts.square(), (x.square().mean(1) + 1) ** 3
    parts = zip(x.split(chunk), counts.split(chunk, 1), strict=True)
    pairs = sum((metrics.kernel(part, x) @ counts.T * rows.T).sum(0) for part, rows in parts)
    return (pairs - copies @ itself) / (n * n - copies.sum(1))


def precision_recall_of_counts(
    real: Tensor, fake: Tensor, counts: Tensor, k: int = 3, chunk: int = 1024,
    real_counts: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """`metrics.precision_recall` of every resample of `fake`, (R,) float64 each.

    The balls of a manifold keep their radii; a resample decides which of them exist. `real` is resampled too
    if its counts are given.
    """
    centre = real.double().mean(0)
    real, fake = real.double() - centre, fake.double() - centre
    reals = torch.ones(1, len(real), dtype=torch.float64) if real_counts is None else real_counts
    precision = _covered(real, fake, reals, counts, k, chunk)
    return precision, _covered(fake, real, counts, reals, k, chunk)


def _covered(points: Tensor, queries: Tensor, there: Tensor, counts: Tensor, k: int, chunk: int) -> Tensor:
    """Share (R,) of the resampled queries that lie in a ball of the resampled points."""
    radius, exists = metrics.manifold_radius(points, k, chunk), (there > 0).float().T
    hits = torch.zeros((), dtype=torch.float64)
    for part, rows in zip(queries.split(chunk), counts.split(chunk, 1), strict=True):
        inside = (torch.cdist(part, points) <= radius).float() @ exists > 0
        hits = hits + (inside * rows.T).sum(0)
    return hits / len(queries)
