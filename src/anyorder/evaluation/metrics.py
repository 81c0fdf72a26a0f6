"""Quality of generated images: distances between distributions of features, and of single images.

Features are computed once and shared by all metrics. torchmetrics supplies PSNR and SSIM; its FID, KID and
Inception Score each run the feature network and the global generator, so these are computed here and tested
against it.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from torchmetrics.functional.image import peak_signal_noise_ratio, structural_similarity_index_measure
from tqdm import tqdm

from anyorder.evaluation.features import FeatureExtractor
from anyorder.files import atomic


class Gaussian(NamedTuple):
    """The two moments that a Fréchet distance compares, float64."""

    mean: Tensor
    """(dim,)"""
    covariance: Tensor
    """(dim, dim), symmetric and positive semi-definite."""


class FeatureStatistics:
    """Moments (float64), features and logits of a stream of images; the same for every batch size.

    The moments merge batch by batch (Chan et al. 1983), which is stable where sums of squares cancel.
    """

    def __init__(self, extractor: str, data: str = ""):
        """Start with no images.

        Args:
            extractor: name of the extractor that makes the features.
            data: fingerprint of the images, "" where none is known.
        """
        self.extractor = extractor
        self.data = data
        self.n = 0
        self.mean = torch.zeros(())
        self._scatter = torch.zeros(())
        self._features: list[Tensor] = []
        self._logits: list[Tensor] = []

    def update(self, features: Tensor, logits: Tensor) -> None:
        """Add features (B, dim) and logits (B, num_classes).

        Raises:
            ValueError: a feature or logit is NaN or infinite; the message names the first such image.
        """
        features, logits = features.detach().float().cpu(), logits.detach().float().cpu()
        broken = ~(features.isfinite().all(1) & logits.isfinite().all(1))
        if broken.any():
            first = int(broken.nonzero()[0, 0])
            raise ValueError(
                f"extractor '{self.extractor}' gave NaN or infinite features for {int(broken.sum())} of "
                f"{len(features)} images, the first is image {self.n + first}: look at it and at the weights"
            )
        self._merge(features.double())
        self._features.append(features)
        self._logits.append(logits)

    def _merge(self, x: Tensor) -> None:
        n, mean = self.n + len(x), x.mean(0)
        delta, centred = mean - self.mean, x - mean
        between = torch.outer(delta, delta) * (self.n * len(x) / n)
        self._scatter = self._scatter + centred.T @ centred + between
        self.mean = self.mean + delta * (len(x) / n)
        self.n = n

    @property
    def covariance(self) -> Tensor:
        """Unbiased covariance (dim, dim) float64; ValueError for fewer than 2 images."""
        if self.n < 2:
            raise ValueError(f"a covariance needs at least 2 images, got {self.n}: evaluate more images")
        return self._scatter / (self.n - 1)

    @property
    def gaussian(self) -> Gaussian:
        """Mean and covariance."""
        return Gaussian(self.mean, self.covariance)

    @property
    def features(self) -> Tensor:
        """All features (n, dim) float32, in the order they came."""
        return torch.cat(self._features)

    @property
    def logits(self) -> Tensor:
        """All logits (n, num_classes) float32, in the order they came."""
        return torch.cat(self._logits)

    def save(self, path: str | Path) -> None:
        """Write features and logits as safetensors, atomically, with the names of extractor and data."""
        tensors = {"features": self.features, "logits": self.logits}
        with atomic(path) as temporary:
            # One entry: safetensors writes several in no fixed order, and equal statistics are equal files.
            source = json.dumps({"data": self.data, "extractor": self.extractor})
            save_file(tensors, temporary, metadata={"source": source})

    @classmethod
    def load(cls, path: str | Path, extractor: str, data: str) -> FeatureStatistics:
        """Read what `save` wrote for this extractor and these images.

        Raises:
            FileNotFoundError: no such file.
            ValueError: damaged, or of another extractor or other images; both are named.
        """
        if not Path(path).is_file():
            raise FileNotFoundError(
                f"no feature statistics at {path}: compute them with `statistics` and save them"
            )
        try:
            with safe_open(path, "pt") as file:
                found = json.loads((file.metadata() or {}).get("source", "{}"))
                features, logits = file.get_tensor("features"), file.get_tensor("logits")
        except SafetensorError as e:
            raise ValueError(f"{path} is damaged ({e}): delete it and compute it again") from e
        if found != {"extractor": extractor, "data": data}:
            raise ValueError(
                f"{path} holds statistics of data '{found.get('data')}' by '{found.get('extractor')}', "
                f"expected data '{data}' by '{extractor}': delete it and compute it again"
            )
        result = cls(extractor, data)
        result.update(features, logits)
        return result


def statistics(
    extractor: FeatureExtractor, batches: Iterable[Tensor], data: str = "", description: str = "features"
) -> FeatureStatistics:
    """Run the extractor over uint8 batches (B, 3, H, W) of any size, with a progress bar.

    Raises:
        ValueError: the images are not uint8 (B, 3, H, W), or a feature is NaN or infinite.
    """
    result = FeatureStatistics(extractor.name, data)
    with tqdm(desc=description, unit="image") as bar:
        for images in batches:
            if images.dtype != torch.uint8 or images.dim() != 4 or images.shape[1] != 3:
                got = f"{images.dtype} of shape {tuple(images.shape)}"
                raise ValueError(f"metrics take uint8 images (B, 3, H, W), got {got}")
            result.update(*extractor(images))
            bar.update(len(images))
    return result


def frechet_distance(a: Gaussian, b: Gaussian) -> float:
    """Squared Fréchet distance of two Gaussians (Dowson & Landau 1982; FID: arXiv 1706.08500, Eq. 6).

    `|m_a - m_b|^2 + tr(A + B - 2 (A^1/2 B A^1/2)^1/2)`. The product in this form is symmetric, so that
    eigenvalues are real and rank-deficient covariances (fewer images than dimensions) need no epsilon.
    """
    values, vectors = torch.linalg.eigh(a.covariance)
    root = vectors * values.clamp(min=0).sqrt() @ vectors.T
    cross = torch.linalg.eigvalsh(root @ b.covariance @ root).clamp(min=0).sqrt().sum()
    distance = (a.mean - b.mean).square().sum() + a.covariance.trace() + b.covariance.trace() - 2 * cross
    return max(0.0, float(distance))


def kernel_distance(
    real: Tensor, fake: Tensor, subsets: int = 100, subset_size: int = 1000, seed: int = 0
) -> tuple[float, float]:
    """KID: unbiased squared MMD with the kernel (x.y / dim + 1)^3 (arXiv 1801.01401, Sec. 4).

    Args:
        real: features (n, dim).
        fake: features (m, dim).
        subsets: number of random subsets.
        subset_size: images of each side in a subset, without replacement; at least 2.
        seed: of the subsets.

    Returns:
        Mean and (population) standard deviation over the subsets; the mean may be slightly negative.

    Raises:
        ValueError: `subset_size` is less than 2 or exceeds a set.
    """
    if not 2 <= subset_size <= min(len(real), len(fake)):
        raise ValueError(f"KID subsets must hold 2 to {min(len(real), len(fake))} images, got {subset_size}")
    generator = torch.Generator().manual_seed(seed)

    def subset(features: Tensor) -> Tensor:
        return features[torch.randperm(len(features), generator=generator)[:subset_size]].double()

    values = torch.stack([_mmd2(subset(real), subset(fake)) for _ in range(subsets)])
    return float(values.mean()), float(values.std(correction=0))


def _mmd2(x: Tensor, y: Tensor) -> Tensor:
    m, dim = x.shape

    def kernel(a: Tensor, b: Tensor) -> Tensor:
        return (a @ b.T / dim + 1) ** 3

    def off_diagonal_mean(k: Tensor) -> Tensor:
        return (k.sum() - k.trace()) / (m * (m - 1))

    return off_diagonal_mean(kernel(x, x)) + off_diagonal_mean(kernel(y, y)) - 2 * kernel(x, y).mean()


def inception_score(logits: Tensor, splits: int = 10, seed: int = 0) -> tuple[float, float]:
    """exp(E KL(p(y|x) || p(y))) over shuffled splits (Salimans et al. 2016, arXiv 1606.03498, Sec. 4).

    Args:
        logits: (n, classes) of the generated images.
        splits: parts whose scores are averaged, in [2, n].
        seed: of the shuffle.

    Returns:
        Mean and sample standard deviation over the splits; the score lies in [1, classes].

    Raises:
        ValueError: fewer images than splits.
    """
    if not 2 <= splits <= len(logits):
        raise ValueError(f"the Inception Score needs 2 to {len(logits)} splits (images), got {splits}")
    generator = torch.Generator().manual_seed(seed)
    log_p = logits.double().log_softmax(1)[torch.randperm(len(logits), generator=generator)]

    def score(part: Tensor) -> Tensor:
        log_marginal = part.logsumexp(0) - math.log(len(part))
        return (part.exp() * (part - log_marginal)).sum(1).mean().exp()

    scores = torch.stack([score(part) for part in log_p.tensor_split(splits)])
    return float(scores.mean()), float(scores.std())


class PrecisionRecall(NamedTuple):
    """Fidelity and diversity, both in [0, 1]."""

    precision: float
    """Share of generated images that lie on the real manifold."""
    recall: float
    """Share of real images that lie on the generated manifold."""


def precision_recall(real: Tensor, fake: Tensor, k: int = 3, chunk: int = 2048) -> PrecisionRecall:
    """Improved precision and recall (Kynkäänniemi et al. 2019, arXiv 1904.06991, Eq. 1-2).

    A set's manifold is the union of balls around its points that reach to their k-th nearest neighbour.

    Args:
        real: features (n, dim), n > k.
        fake: features (m, dim), m > k.
        k: which neighbour.
        chunk: rows of the distance matrix held at once.

    Raises:
        ValueError: a set has no more than k images.
    """
    if min(len(real), len(fake)) <= k:
        counts = f"{len(real)} real and {len(fake)} fake"
        raise ValueError(f"precision and recall with k={k} need more than {k} images, got {counts}")
    centre = real.double().mean(0)  # distances are computed by products, which cancel far from the origin
    real, fake = real.double() - centre, fake.double() - centre
    return PrecisionRecall(_coverage(real, fake, k, chunk), _coverage(fake, real, k, chunk))


def _coverage(points: Tensor, queries: Tensor, k: int, chunk: int) -> float:
    """Share of the queries that lie within the k-th neighbour's distance of any of the points."""
    radius = manifold_radius(points, k, chunk)
    inside = [(torch.cdist(part, points) <= radius).any(1) for part in queries.split(chunk)]
    return float(torch.cat(inside).double().mean())


def manifold_radius(points: Tensor, k: int, chunk: int = 2048) -> Tensor:
    """Distance (n,) of each of the points (n, dim) to its k-th nearest other point."""
    radii = []
    for begin in range(0, len(points), chunk):
        distances = torch.cdist(points[begin : begin + chunk], points)
        itself = torch.arange(len(distances))
        distances[itself, begin + itself] = math.inf
        radii.append(distances.kthvalue(k, dim=1).values)
    return torch.cat(radii)


def psnr(images: Tensor, targets: Tensor) -> Tensor:
    """Peak signal-to-noise ratio (B,) in dB of images (B, 3, H, W), uint8 or in [-1, 1]; equal: infinite."""
    x, y, data_range = _comparable(images, targets)
    return peak_signal_noise_ratio(x, y, data_range=data_range, reduction="none", dim=(1, 2, 3))


def ssim(images: Tensor, targets: Tensor) -> Tensor:
    """Structural similarity (Wang et al. 2004, 11x11 Gaussian window), (B,) in [-1, 1]; images as in `psnr`.

    Images have at least 6 pixels each way.
    """
    x, y, data_range = _comparable(images, targets)
    result = structural_similarity_index_measure(x, y, data_range=data_range, reduction="none")
    assert isinstance(result, Tensor)
    return result


def _comparable(images: Tensor, targets: Tensor) -> tuple[Tensor, Tensor, float]:
    if images.shape != targets.shape or images.dtype != targets.dtype:
        raise ValueError(
            f"images and targets must agree in shape and dtype, got {tuple(images.shape)} {images.dtype} "
            f"and {tuple(targets.shape)} {targets.dtype}"
        )
    return images.float(), targets.float(), 255.0 if images.dtype == torch.uint8 else 2.0


def bits_per_dim(nll_per_token: float, tokens_per_image: int, dimensions: int) -> float:
    """Bits per pixel value that the *tokens* cost; compare only models on the same, lossy tokenizer.

    Args:
        nll_per_token: mean negative log-likelihood in nats.
        tokens_per_image: N.
        dimensions: H * W * 3 of the image.
    """
    return nll_per_token * tokens_per_image / (dimensions * math.log(2))


def evaluate(
    extractor: FeatureExtractor,
    real: FeatureStatistics | Iterable[Tensor],
    fake: FeatureStatistics | Iterable[Tensor],
    kid_subset_size: int = 1000,
    seed: int = 0,
) -> dict[str, Any]:
    """All distribution metrics of generated images against real ones.

    Args:
        extractor: the feature space.
        real: uint8 batches (B, 3, H, W), or their statistics.
        fake: likewise for generated images.
        kid_subset_size: shrunk, with a note, where a set is smaller.
        seed: of the KID subsets and of the Inception Score's shuffle.

    Returns:
        fid (Inception-2015) or fd (any other extractor), other metrics, sizes, names, and `notes`: caveats to
        print with the numbers.

    Raises:
        ValueError: 3 or fewer images, statistics of another extractor, or NaN features.
    """
    real = _resolve(extractor, real, "real images")
    fake = _resolve(extractor, fake, "generated images")
    distance = frechet_distance(real.gaussian, fake.gaussian)
    subset_size = min(kid_subset_size, real.n, fake.n)
    kid, kid_std = kernel_distance(real.features, fake.features, subset_size=subset_size, seed=seed)
    score, score_std = inception_score(fake.logits, splits=min(10, fake.n), seed=seed)
    return {
        "fid" if extractor.metric == "FID" else "fd": distance,
        "kid": kid,
        "kid_std": kid_std,
        **precision_recall(real.features, fake.features)._asdict(),
        "inception_score": score,
        "is_std": score_std,
        "n_real": real.n,
        "n_fake": fake.n,
        "kid_subset_size": subset_size,
        "extractor": extractor.name,
        "metric_name": extractor.metric,
        "notes": _notes(extractor, min(real.n, fake.n), kid_subset_size),
    }


def _resolve(
    extractor: FeatureExtractor, images: FeatureStatistics | Iterable[Tensor], description: str
) -> FeatureStatistics:
    if not isinstance(images, FeatureStatistics):
        return statistics(extractor, images, description=description)
    if images.extractor != extractor.name:
        raise ValueError(
            f"statistics of the {description} are by '{images.extractor}', the extractor is "
            f"'{extractor.name}': compute them again with this extractor"
        )
    return images


def _notes(extractor: FeatureExtractor, n: int, kid_subset_size: int) -> list[str]:
    notes = []
    if n <= extractor.dim:
        notes.append(
            f"{extractor.metric} from {n} images in {extractor.dim} dimensions is strongly biased upwards."
        )
    if n < kid_subset_size:
        notes.append(f"KID subsets shrunk from {kid_subset_size} to {n} images.")
    return notes
