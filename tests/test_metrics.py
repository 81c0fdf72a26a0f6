import math
from collections.abc import Iterable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torchmetrics.image.inception import InceptionScore
from torchmetrics.image.kid import KernelInceptionDistance

from anyorder.evaluation.metrics import (
    FeatureStatistics,
    Gaussian,
    bits_per_dim,
    evaluate,
    frechet_distance,
    inception_score,
    kernel_distance,
    precision_recall,
    psnr,
    ssim,
    statistics,
)


def normal(n: int, dim: int, seed: int = 0) -> Tensor:
    return torch.randn(n, dim, generator=torch.Generator().manual_seed(seed))


def pictures(n: int, seed: int = 0, size: int = 8) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(256, (n, 3, size, size), generator=generator, dtype=torch.uint8)


class Pixels:
    """Features are channel means, logits the mean of each quarter of the rows."""

    name, metric, dim, num_classes = "pixels", "FD (pixels)", 3, 4

    def __call__(self, images: Tensor) -> tuple[Tensor, Tensor]:
        x = images.float() / 255
        return x.mean((2, 3)), x.unflatten(2, (4, -1)).mean((1, 3, 4)) * 20


def stream(features: Tensor, sizes: list[int]) -> FeatureStatistics:
    result = FeatureStatistics("pixels")
    for part in features.split(sizes):
        result.update(part, part)
    return result


@settings(max_examples=25, deadline=None)
@given(sizes=st.lists(st.integers(1, 9), min_size=2, max_size=8), offset=st.sampled_from([0.0, 1e4]))
def test_moments_do_not_depend_on_batches(sizes: list[int], offset: float) -> None:
    features = normal(sum(sizes), 3) + offset
    result = stream(features, sizes)
    assert result.n == sum(sizes)
    torch.testing.assert_close(result.gaussian.mean, features.double().mean(0), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(result.gaussian.covariance, features.double().T.cov(), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(result.features, features, rtol=0, atol=0)


def test_a_covariance_needs_two_images() -> None:
    with pytest.raises(ValueError, match="at least 2 images, got 1"):
        stream(normal(1, 3), [1]).gaussian  # noqa: B018


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_broken_features_are_named(bad: float) -> None:
    result = stream(normal(4, 3), [4])
    features = normal(3, 3)
    features[1, 2] = bad
    with pytest.raises(ValueError, match=r"'pixels'.* 1 of 3 images, the first is image 5"):
        result.update(features, normal(3, 4))
    with pytest.raises(ValueError, match="image 5"):
        result.update(normal(3, 4), features)
    assert result.n == 4


def test_statistics_survive_a_round_trip_and_refuse_others(tmp_path) -> None:
    path = tmp_path / "reference.safetensors"
    saved = statistics(Pixels(), pictures(10).split(3), data="abc")
    saved.save(path)
    loaded = FeatureStatistics.load(path, "pixels", "abc")
    torch.testing.assert_close(loaded.gaussian.covariance, saved.gaussian.covariance)
    assert torch.equal(loaded.logits, saved.logits)
    assert loaded.n == 10
    for extractor, data in (("pixels", "other"), ("inception-2015", "abc")):
        with pytest.raises(ValueError, match="data 'abc' by 'pixels', expected"):
            FeatureStatistics.load(path, extractor, data)
    path.write_bytes(path.read_bytes()[:50])
    with pytest.raises(ValueError, match="damaged"):
        FeatureStatistics.load(path, "pixels", "abc")
    with pytest.raises(FileNotFoundError, match="missing"):
        FeatureStatistics.load(tmp_path / "missing", "pixels", "abc")


def test_statistics_refuse_floats() -> None:
    with pytest.raises(ValueError, match=r"uint8.*float32"):
        statistics(Pixels(), [torch.zeros(2, 3, 8, 8)])


def gaussian(mean: list[float], covariance: Tensor) -> Gaussian:
    return Gaussian(torch.tensor(mean, dtype=torch.float64), covariance)


def test_frechet_distance_of_diagonal_gaussians() -> None:
    a = gaussian([0, 1, 2], torch.tensor([1.0, 4.0, 9.0]).double().diag())
    b = gaussian([1, 1, 0], torch.tensor([4.0, 4.0, 1.0]).double().diag())
    assert frechet_distance(a, b) == pytest.approx(1 + 4 + (1 - 2) ** 2 + (3 - 1) ** 2, rel=1e-12)
    assert frechet_distance(a, b) == pytest.approx(frechet_distance(b, a), rel=1e-12)
    assert frechet_distance(a, a) == pytest.approx(0, abs=1e-12)


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**32), zeros=st.integers(0, 5))
def test_frechet_distance_of_commuting_covariances(seed: int, zeros: int) -> None:
    """Shared eigenvectors: the distance is that of the standard deviations, even where some vanish."""
    basis = torch.linalg.qr(normal(6, 6, seed).double()).Q
    s, t = normal(2, 6, seed + 1).double().abs()
    s[:zeros] = 0
    a = gaussian([0.0] * 6, basis * s.square() @ basis.T)
    b = gaussian([0.0] * 6, basis * t.square() @ basis.T)
    assert frechet_distance(a, b) == pytest.approx(float((s - t).square().sum()), abs=1e-6)


def test_frechet_distance_of_general_covariances_matches_the_unsymmetric_root() -> None:
    x, y = normal(40, 5).double(), normal(40, 5, 1).double() @ normal(5, 5, 2).double()
    a, b = Gaussian(x.mean(0), x.T.cov()), Gaussian(y.mean(0), y.T.cov())
    roots = np.sqrt(np.linalg.eigvals((a.covariance @ b.covariance).numpy()).real).sum()
    expected = (a.mean - b.mean).square().sum() + a.covariance.trace() + b.covariance.trace() - 2 * roots
    assert frechet_distance(a, b) == pytest.approx(float(expected), rel=1e-10)


@pytest.mark.filterwarnings("ignore:Metric .* will save all extracted features")
def test_kernel_distance_agrees_with_torchmetrics() -> None:
    real, fake = normal(60, 8), normal(60, 8, 1) * 1.5 + 0.3
    reference = KernelInceptionDistance(feature=nn.Identity(), subsets=1, subset_size=60)
    reference.update(real, real=True)
    reference.update(fake, real=False)
    mean, std = kernel_distance(real, fake, subsets=3, subset_size=60)
    assert mean == pytest.approx(float(reference.compute()[0]), rel=1e-4)
    assert std == pytest.approx(0, abs=1e-9)  # subsets of all images differ in their sequence only


def test_kernel_distance_is_unbiased_and_seeded() -> None:
    mean, std = kernel_distance(normal(400, 4), normal(400, 4, 1), subset_size=50)
    assert abs(mean) < 3 * std / math.sqrt(8)  # 400 images hold 8 independent subsets
    draws = [kernel_distance(normal(90, 4), normal(80, 4, 1), 5, 40, seed) for seed in (1, 1, 2)]
    assert draws[0] == draws[1] != draws[2]


@pytest.mark.parametrize("size", [1, 11])
def test_kernel_distance_refuses_impossible_subsets(size: int) -> None:
    with pytest.raises(ValueError, match=f"2 to 10 images, got {size}"):
        kernel_distance(normal(10, 2), normal(20, 2), subset_size=size)


@pytest.mark.filterwarnings("ignore:Metric .* will save all extracted features")
def test_inception_score_agrees_with_torchmetrics() -> None:
    logits = normal(100, 7) * 3
    reference = InceptionScore(feature=nn.Identity(), splits=10)
    reference.update(logits)
    with torch.random.fork_rng():
        torch.manual_seed(5)
        expected = [float(v) for v in reference.compute()]
    assert inception_score(logits, seed=5) == pytest.approx(expected, rel=1e-5)


def test_inception_score_closed_forms() -> None:
    balanced = torch.eye(4).repeat(10, 1) * 1000
    assert inception_score(torch.zeros(40, 4)) == pytest.approx((1, 0))  # no evidence for any class
    assert inception_score(balanced[:1].repeat(40, 1)) == pytest.approx((1, 0))  # a single class
    marginal = inception_score(torch.cat([balanced] * 500), splits=2)[0]
    assert marginal == pytest.approx(4, rel=1e-3)  # sure of each, all equally often
    with pytest.raises(ValueError, match="2 to 5 splits"):
        inception_score(torch.zeros(5, 4))


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 2**32), chunk=st.integers(1, 40))
def test_precision_and_recall_do_not_depend_on_chunks(seed: int, chunk: int) -> None:
    real, fake = normal(30, 2, seed), normal(25, 2, seed + 1) * 1.5
    assert precision_recall(real, fake, chunk=chunk) == precision_recall(real, fake)
    assert precision_recall(real, real, chunk=chunk) == (1, 1)
    assert precision_recall(real, fake + 1000) == (0, 0)


def test_precision_and_recall_by_hand() -> None:
    """On a line with k=1: real 0, 1, 3, 10 reach 1, 1, 2, 7; fake 3.5, 4, 30 reach 0.5, 0.5, 26."""
    real, fake = torch.tensor([[0.0], [1], [3], [10]]), torch.tensor([[3.5], [4], [30]])
    precision, recall = precision_recall(real, fake, k=1)
    assert precision == pytest.approx(2 / 3)  # 30 lies beyond 10 + 7
    assert recall == pytest.approx(2 / 4)  # 3 is within 0.5 of 3.5, 10 within 26 of 30


def test_dropping_a_mode_lowers_recall_only() -> None:
    modes = torch.tensor([[0.0, 0.0], [100.0, 0.0]])
    real = torch.cat([normal(200, 2) + modes[0], normal(200, 2, 1) + modes[1]])
    both = torch.cat([normal(200, 2, 2) + modes[0], normal(200, 2, 3) + modes[1]])
    full, dropped = precision_recall(real, both), precision_recall(real, both[:200])
    assert dropped.precision == pytest.approx(full.precision, abs=0.05)
    assert full.recall > 0.9
    assert dropped.recall < full.recall / 2 + 0.05


def test_precision_and_recall_need_more_images_than_neighbours() -> None:
    with pytest.raises(ValueError, match="more than 3 images, got 9 real and 3 fake"):
        precision_recall(normal(9, 2), normal(3, 2))


@pytest.mark.parametrize(("dtype", "unit"), [(torch.uint8, 1), (torch.float32, 2 / 255)])
def test_psnr_closed_form_per_image(dtype: torch.dtype, unit: float) -> None:
    x = torch.zeros(2, 3, 8, 8, dtype=dtype)
    y = x.clone()
    y[0] += 10 * unit
    y[1] += 20 * unit
    expected = [20 * math.log10(255 / 10), 20 * math.log10(255 / 20)]
    assert psnr(y, x).tolist() == pytest.approx(expected, rel=1e-5)
    assert psnr(x, x).isinf().all()


def test_ssim_is_one_for_equal_images_and_per_image() -> None:
    x, y = pictures(3, size=16), pictures(3, 1, size=16)
    assert ssim(x, x).tolist() == pytest.approx([1, 1, 1])
    mixed = torch.cat([x[:1], y[1:]])
    values = ssim(mixed, x)
    assert values[0] == pytest.approx(1)
    assert (values[1:] < 0.5).all()
    as_float = [t.float() / 127.5 - 1 for t in (mixed, x)]
    torch.testing.assert_close(ssim(*as_float), values, rtol=1e-4, atol=1e-4)
    assert values[1:2].tolist() == pytest.approx(ssim(mixed[1:2], x[1:2]).tolist(), rel=1e-5)


def test_pairs_must_agree() -> None:
    with pytest.raises(ValueError, match=r"agree.*uint8.*float32"):
        psnr(pictures(2), pictures(2).float())
    with pytest.raises(ValueError, match="agree in shape"):
        ssim(pictures(2), pictures(3))


def test_bits_per_dim_of_a_uniform_byte_per_value() -> None:
    assert bits_per_dim(math.log(256), tokens_per_image=12, dimensions=12) == pytest.approx(8)
    assert bits_per_dim(math.log(16), tokens_per_image=64, dimensions=32 * 32 * 3) == pytest.approx(1 / 12)


def of(batches: Iterable[Tensor]) -> FeatureStatistics:
    return statistics(Pixels(), batches)


def test_evaluate_knows_equal_from_different_and_says_what_it_did(capsys) -> None:
    images, darker = pictures(60), pictures(50, 1) // 2
    same = evaluate(Pixels(), of(images.split(7)), of(images.split(60)))
    other = evaluate(Pixels(), of(images.split(20)), of(darker.split(9)))
    assert same["fd"] == pytest.approx(0, abs=1e-9)
    means = [x.float().mean((2, 3)).double() / 255 for x in (images, darker)]
    assert other["fd"] == pytest.approx(
        frechet_distance(*[Gaussian(m.mean(0), m.T.cov()) for m in means]), rel=1e-4
    )
    assert same["precision"] == same["recall"] == 1
    assert other["precision"] == other["recall"] == 0
    assert other["kid"] > same["kid"]
    assert (other["n_real"], other["n_fake"], other["kid_subset_size"]) == (60, 50, 50)
    assert (other["extractor"], other["metric_name"]) == ("pixels", "FD (pixels)")
    assert 1 <= other["inception_score"] <= 4
    assert other["is_std"] >= 0
    few = "Inception Score of 10 parts of 5 images is strongly biased downwards."
    assert other["notes"] == [few, "KID subsets shrunk from 1000 to 50 images."]
    assert "fid" not in other
    assert "features" in capsys.readouterr().err  # the progress bar


def test_evaluate_does_not_depend_on_batches() -> None:
    images, others = pictures(40), pictures(30, 1)
    runs = [evaluate(Pixels(), of(images.split(n)), of(others.split(n + 1))) for n in (1, 40)]
    for key, value in runs[0].items():
        assert runs[1][key] == (
            pytest.approx(value, rel=1e-6, abs=1e-9) if isinstance(value, float) else value
        )


def test_only_fid_is_called_fid_and_few_images_are_noted() -> None:
    extractor = Pixels()
    extractor.metric, extractor.dim = "FID", 2048
    result = evaluate(extractor, of([pictures(30)]), of([pictures(30, 1)]), kid_subset_size=10)
    assert "fid" in result
    assert "fd" not in result
    assert result["notes"] == [
        "FID from 30 images in 2048 dimensions is strongly biased upwards.",
        "Inception Score of 10 parts of 3 images is strongly biased downwards.",
    ]


def test_evaluate_refuses_statistics_of_another_extractor_and_tiny_sets() -> None:
    with pytest.raises(ValueError, match="by other, pixels, the extractor is pixels: compute them"):
        evaluate(Pixels(), FeatureStatistics("other"), of([pictures(5)]))
    with pytest.raises(ValueError, match="at least 2 images, got 1"):
        evaluate(Pixels(), of([pictures(1)]), of([pictures(5)]))
    with pytest.raises(ValueError, match="at least 2 images, got 0"):
        evaluate(Pixels(), of([pictures(5)]), of([]))
