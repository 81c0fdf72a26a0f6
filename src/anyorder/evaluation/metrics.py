"""Quality of generated images: distances between distributions of features, and of single images.

torchmetrics supplies PSNR and SSIM; its FID, KID and Inception Score each run the feature network and use the
global random generator, so they are computed here, from shared features, and tested against it.
"""

import json
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from torchmetrics.functional import image as pairs
from tqdm import tqdm

from anyorder.contracts import require
from anyorder.evaluation.features import FeatureExtractor
from anyorder.files import atomic


class Gaussian(NamedTuple):
    """The two moments that a Fréchet distance compares, float64."""

    mean: Tensor
    """(dim,)"""
    covariance: Tensor
    """(dim, dim), symmetric and positive semi-definite."""


class FeatureStatistics:
    """Features, logits and moments of a stream of images; the same for every batch size."""

    def __init__(self, extractor: str, data: str = ""):
        """Start with no images; `data` is their fingerprint, "" where none is known."""
        self.extractor, self.data, self.n = extractor, data, 0
        self._features: list[Tensor] = []
        self._logits: list[Tensor] = []

    def update(self, features: Tensor, logits: Tensor) -> None:
        """Add features (B, dim) and logits (B, num_classes).

        Raises:
            ValueError: a feature or logit is NaN or infinite; the message names the first such image.
        """
        features, logits = features.detach().float().cpu(), logits.detach().float().cpu()
        broken = (~(features.isfinite().all(1) & logits.isfinite().all(1))).nonzero()[:, 0].tolist()
        text = f"extractor '{self.extractor}' gave NaN or infinite features for {len(broken)} of"
        first = f"the first is image {self.n + min(broken, default=0)}: look at it and at the weights"
        require(not broken, f"{text} {len(features)} images, {first}")
        self.n += len(features)
        self._features.append(features)
        self._logits.append(logits)

    @property
    def gaussian(self) -> Gaussian:
        """Mean and unbiased covariance; ValueError for fewer than 2 images."""
        require(self.n >= 2, f"a covariance needs at least 2 images, got {self.n}: evaluate more images")
        features = self.features
        mean = features.mean(0, dtype=torch.float64)
        scatter = torch.zeros(2 * mean.shape, dtype=torch.float64)
        for part in features.split(4096):  # in float64, all of them may not fit into memory
            scatter += (part - mean).T @ (part - mean)
        return Gaussian(mean, scatter / (self.n - 1))

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
        # One entry: safetensors writes several in no fixed order, and equal statistics are equal files.
        source = json.dumps({"data": self.data, "extractor": self.extractor})
        with atomic(path) as temporary:
            tensors = {"features": self.features, "logits": self.logits}
            save_file(tensors, temporary, metadata={"source": source})

    @classmethod
    def load(cls, path: str | Path, extractor: str, data: str) -> "FeatureStatistics":
        """Read what `save` wrote for this extractor and these images.

        Raises:
            FileNotFoundError: no such file.
            ValueError: damaged, or of another extractor or other images; both are named.
        """
        if not Path(path).is_file():
            raise FileNotFoundError(f"no feature statistics at {path}: compute and save them first")
        try:
            with safe_open(path, "pt") as file:
                found = json.loads((file.metadata() or {}).get("source", "{}"))
                features, logits = file.get_tensor("features"), file.get_tensor("logits")
        except SafetensorError as e:
            raise ValueError(f"{path} is damaged ({e}): delete it and compute it again") from e
        text = f"{path} holds statistics of data '{found.get('data')}' by '{found.get('extractor')}'"
        text += f", expected data '{data}' by '{extractor}': delete it and compute it again"
        require(found == {"extractor": extractor, "data": data}, text)
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
            fits = images.dtype == torch.uint8 and images.dim() == 4 and images.shape[1] == 3
            got = f"{images.dtype} of shape {tuple(images.shape)}"
            require(fits, f"metrics take uint8 images (B, 3, H, W), got {got}")
            result.update(*extractor(images))
            bar.update(len(images))
    return result


def frechet_distance(a: Gaussian, b: Gaussian) -> float:
    """Squared Fréchet distance of two Gaussians (Dowson & Landau 1982; FID: arXiv 1706.08500, Eq. 6).

    `|m_a - m_b|^2 + tr(A + B - 2 (A^1/2 B A^1/2)^1/2)`. The product in this form is symmetric, so that
    eigenvalues are real and rank-deficient covariances (fewer images than dimensions) need no epsilon.
    """
    of_a = root(a.covariance)
    cross = torch.linalg.eigvalsh(of_a @ b.covariance @ of_a).clamp(min=0).sqrt().sum()
    distance = (a.mean - b.mean).square().sum() + a.covariance.trace() + b.covariance.trace() - 2 * cross
    return max(0.0, float(distance))


def root(covariance: Tensor) -> Tensor:
    """The symmetric square root of a positive semi-definite matrix."""
    values, vectors = torch.linalg.eigh(covariance)
    return vectors * values.clamp(min=0).sqrt() @ vectors.T


def kernel_distance(
    real: Tensor, fake: Tensor, subsets: int = 100, subset_size: int = 1000, seed: int = 0
) -> tuple[float, float]:
    """KID: unbiased squared MMD of random subsets (Bińkowski et al. 2018, arXiv 1801.01401, Sec. 4).

    Features are (n, dim) and (m, dim); a subset holds `subset_size` images of each side, without replacement.

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


def kernel(x: Tensor, y: Tensor) -> Tensor:
    """KID's kernel (x.y / dim + 1)^3 of every pair, (n, m)."""
    return (x @ y.T / x.shape[1] + 1) ** 3


def _mmd2(x: Tensor, y: Tensor) -> Tensor:
    within = kernel(x, x) + kernel(y, y)  # of sets of equal size
    return (within.sum() - within.trace()) / (len(x) * (len(x) - 1)) - 2 * kernel(x, y).mean()


def inception_score(logits: Tensor, splits: int = 10, seed: int = 0) -> tuple[float, float]:
    """exp(E KL(p(y|x) || p(y))) over shuffled splits (Salimans et al. 2016, arXiv 1606.03498, Sec. 4).

    Returns:
        Mean and sample standard deviation over the splits of logits (n, classes); a score is in [1, classes].

    Raises:
        ValueError: fewer than 2 splits, or fewer images than splits.
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

    A set's manifold is the union of balls around its features (n, dim) that reach to their k-th nearest
    neighbour. `chunk` rows of the distance matrix are held at once.

    Raises:
        ValueError: a set has no more than k images.
    """
    if min(len(real), len(fake)) <= k:
        counts = f"{len(real)} real and {len(fake)} fake"
        raise ValueError(f"precision and recall with k={k} need more than {k} images, got {counts}")
    centre = real.double().mean(0)  # distances are computed by products, which cancel far from the origin
    real, fake = real.double() - centre, fake.double() - centre

    def share(points: Tensor, queries: Tensor) -> float:
        radius = manifold_radius(points, k, chunk)
        inside = [(torch.cdist(part, points) <= radius).any(1) for part in queries.split(chunk)]
        return float(torch.cat(inside).double().mean())

    return PrecisionRecall(share(real, fake), share(fake, real))


def manifold_radius(points: Tensor, k: int, chunk: int) -> Tensor:
    """Distance (n,) of each of the points (n, dim) to its k-th nearest other point."""
    radii = []
    for begin in range(0, len(points), chunk):
        distances = torch.cdist(points[begin : begin + chunk], points)
        distances.diagonal(begin).fill_(math.inf)  # of each point to itself
        radii.append(distances.kthvalue(k, dim=1).values)
    return torch.cat(radii)


def psnr(images: Tensor, targets: Tensor) -> Tensor:
    """Peak signal-to-noise ratio (B,) in dB of images (B, 3, H, W), uint8 or in [-1, 1]; equal: infinite."""
    x, y, data_range = _comparable(images, targets)
    return pairs.peak_signal_noise_ratio(x, y, data_range=data_range, reduction="none", dim=(1, 2, 3))


def ssim(images: Tensor, targets: Tensor) -> Tensor:
    """SSIM (Wang et al. 2004, 11x11 Gaussian window), (B,) in [-1, 1]; images as in `psnr`, >= 6 pixels."""
    x, y, data_range = _comparable(images, targets)
    result = pairs.structural_similarity_index_measure(x, y, data_range=data_range, reduction="none")
    assert isinstance(result, Tensor)
    return result


def _comparable(images: Tensor, targets: Tensor) -> tuple[Tensor, Tensor, float]:
    ours, others = (f"{tuple(x.shape)} {x.dtype}" for x in (images, targets))
    require(ours == others, f"images and targets must agree in shape and dtype, got {ours} and {others}")
    if images.dtype == torch.uint8:
        return images.float(), targets.float(), 255.0
    return images.float() + 1, targets.float() + 1, 2.0  # SSIM compares means: none may be negative


def bits_per_dim(nll_per_token: float, tokens_per_image: int, dimensions: int) -> float:
    """Bits per pixel value that the *tokens* cost; compare only models on the same, lossy tokenizer.

    `nll_per_token` is a mean in nats; the image has `dimensions` = H * W * 3 values.
    """
    return nll_per_token * tokens_per_image / (dimensions * math.log(2))


def evaluate(
    extractor: FeatureExtractor,
    real: FeatureStatistics,
    fake: FeatureStatistics,
    kid_subset_size: int = 1000,
    seed: int = 0,
) -> dict[str, Any]:
    """All distribution metrics of generated images against real ones.

    KID subsets shrink, with a note, where a set is smaller than they are; `seed` is that of KID and of the
    Inception Score.

    Returns:
        fid (Inception-2015) or fd (any other extractor), other metrics, sizes, names, and `notes`: caveats to
        print with the numbers.

    Raises:
        ValueError: 3 or fewer images, statistics of another extractor, or NaN features.
    """
    by = {real.extractor, fake.extractor}
    text = f"the statistics are by {', '.join(sorted(by))}, the extractor is {extractor.name}"
    require(by == {extractor.name}, f"{text}: compute them again with this extractor")
    distance = frechet_distance(real.gaussian, fake.gaussian)
    n = min(real.n, fake.n)
    subset_size = min(kid_subset_size, n)
    kid, kid_std = kernel_distance(real.features, fake.features, subset_size=subset_size, seed=seed)
    splits = min(10, fake.n // 2)
    score, score_std = inception_score(fake.logits, splits, seed) if extractor.num_classes else (None, None)
    shape = f"{n} images in {extractor.dim} dimensions"
    biased = f"{extractor.metric} from {shape} is strongly biased upwards."
    few = f"Inception Score of {splits} parts of {fake.n // splits} images is strongly biased downwards."
    shrunk = f"KID subsets shrunk from {kid_subset_size} to {n} images."
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
        "notes": [biased] * (n <= extractor.dim)
        + [few] * (score is not None and fake.n < 50 * splits)
        + [shrunk] * (subset_size < kid_subset_size),
    }
