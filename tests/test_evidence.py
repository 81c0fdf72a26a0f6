"""Classes, copies and intervals: closed forms, and cases made so that the answer is known."""

import numpy as np
import pytest
import torch
from torch import Tensor

from anyorder.evaluation import bootstrap
from anyorder.evaluation.bootstrap import (
    Difference,
    compare,
    gaussian_of_counts,
    kernel_of_counts,
    measures,
    pooled,
    precision_recall_of_counts,
    resample_counts,
)
from anyorder.evaluation.classes import class_agreement, matched_rows
from anyorder.evaluation.memorization import closeness, copied_share, nearest_distance
from anyorder.evaluation.metrics import FeatureStatistics, frechet_distance, kernel_distance, precision_recall


def normal(n: int, dim: int, seed: int = 0) -> Tensor:
    return torch.randn(n, dim, generator=torch.Generator().manual_seed(seed))


def features(values: Tensor, extractor: str = "pixels") -> FeatureStatistics:
    result = FeatureStatistics(extractor)
    result.update(values, values)
    return result


def logits(classes: list[int], count: int = 4) -> Tensor:
    return torch.eye(count)[classes]


# --- classes -----------------------------------------------------------------------------------------------


def test_classes_by_hand() -> None:
    """The test split holds 0, 0, 1, 2; the samples 0, 0, 0, 3 were meant to be 0, 1, 0, 3."""
    found = class_agreement(logits([0, 0, 1, 2]), logits([0, 0, 0, 3]), torch.tensor([0, 1, 0, 3]))
    assert found["class_coverage"] == pytest.approx(1 / 3)  # class 3 is none of the test split's
    assert found["class_agreement"] == pytest.approx(3 / 4)
    assert found["class_distance"] == pytest.approx((0.25 + 0.25 + 0.25 + 0.25) / 2)


def test_the_same_classes_agree_in_full() -> None:
    labels = torch.tensor([0, 1, 2, 3, 3])
    found = class_agreement(logits(labels.tolist()), logits(labels.tolist()), labels)
    assert found == {"class_coverage": 1, "class_agreement": 1, "class_distance": 0}
    with pytest.raises(ValueError, match="4 samples and 3 labels"):
        class_agreement(logits([0]), logits([0, 1, 2, 3]), torch.zeros(3, dtype=torch.int64))


def test_matched_rows_have_the_labels_of_the_samples() -> None:
    pool = np.array([0, 0, 0, 1, 1, 2, 3, 3])
    rows = matched_rows(np.array([1, 0, 0, 1, 2]), pool)
    assert pool[rows].tolist() == [0, 0, 1, 1, 2]
    assert len(set(rows.tolist())) == 5
    assert (rows == matched_rows(np.array([0, 0, 1, 1, 2]), pool)).all()


def test_matched_rows_keep_the_mix_where_the_pool_has_too_few() -> None:
    """A class cut short alone would move FD by the mix and not by the images."""
    pool = np.repeat([0, 1, 2], [300, 80, 1])
    found = pool[matched_rows(np.repeat([0, 1, 2, 3], [200, 100, 2, 2]), pool)]
    assert np.bincount(found).tolist() == [160, 80, 1]  # the rare ones do not decide
    scarce = pool[matched_rows(np.repeat([0, 2], [10, 10]), pool)]
    assert np.bincount(scarce).tolist() == [5, 0, 1]  # not below half


# --- copies ------------------------------------------------------------------------------------------------


def test_nearest_distance_is_exact_for_copies_and_does_not_depend_on_chunks() -> None:
    points, queries = normal(50, 6) + 1000, normal(20, 6, 1) + 1000
    queries[3] = points[17]
    found = nearest_distance(queries, points, chunk=7)
    assert found[3] == 0
    expected = torch.cdist(queries.double(), points.double(), compute_mode="donot_use_mm_for_euclid_dist")
    torch.testing.assert_close(found, expected.min(1).values.float(), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(found, nearest_distance(queries, points), rtol=1e-5, atol=1e-5)


def test_a_copying_model_is_found_out() -> None:
    training, test, honest = normal(400, 5), normal(200, 5, 1), normal(200, 5, 2)
    copies = training[:200] + 1e-3 * normal(200, 5, 3)
    yardstick = nearest_distance(test, training)
    fair = closeness(nearest_distance(honest, training), yardstick)
    found = closeness(nearest_distance(copies, training), yardstick)
    assert fair["nearest_training_ratio"] == pytest.approx(1, abs=0.15)
    assert fair["nearest_training_share"] < 0.05
    assert found["nearest_training_ratio"] < 0.05
    assert found["nearest_training_share"] == 1


@pytest.mark.parametrize("dtype", [np.uint16, np.int32, np.int64])
def test_equal_tokens_are_counted(dtype: type) -> None:
    training = np.arange(40, dtype=dtype).reshape(10, 4)
    tokens = np.array([training[2], training[2], training[9], [0, 1, 2, 4]], dtype=np.int32)
    assert copied_share(tokens, training, chunk=3) == 3 / 4
    assert copied_share(training, training) == 1
    assert copied_share(tokens[3:], training) == 0


# --- intervals ---------------------------------------------------------------------------------------------


def test_counts_of_one_are_the_metrics_themselves() -> None:
    real, fake = features(normal(60, 4)), features(normal(50, 4, 1) * 1.3 + 0.2)
    once = torch.ones(1, 50, dtype=torch.float64)
    found = gaussian_of_counts(fake.features.double(), once[0])
    torch.testing.assert_close(found, fake.gaussian)
    distance = frechet_distance(real.gaussian, found)
    assert distance == pytest.approx(frechet_distance(real.gaussian, fake.gaussian), rel=1e-9)
    precision, recall = precision_recall_of_counts(real.features, fake.features, once, chunk=9)
    assert (float(precision), float(recall)) == pytest.approx(precision_recall(real.features, fake.features))
    pair = kernel_of_counts(real.features[:50], fake.features, once, chunk=9)
    subset = kernel_distance(real.features[:50], fake.features, subsets=1, subset_size=50)
    assert float(pair) == pytest.approx(subset[0], rel=1e-9)


def test_counts_are_as_good_as_copies_of_the_features() -> None:
    real, fake = features(normal(60, 3)), normal(30, 3, 1)
    counts = resample_counts(30, 2, torch.Generator().manual_seed(0))
    assert counts.sum(1).tolist() == [30, 30, 30]
    assert counts[0].tolist() == [1] * 30
    for row in counts:
        copies = features(fake.repeat_interleave(row.long(), 0)).gaussian
        found = gaussian_of_counts(fake.double(), row)
        torch.testing.assert_close(found, copies, rtol=1e-6, atol=1e-6)
        distance = frechet_distance(real.gaussian, found)
        assert distance == pytest.approx(frechet_distance(real.gaussian, copies), rel=1e-6)


def test_a_resample_of_the_kernel_distance_leaves_out_pairs_of_one_image() -> None:
    """Three images of which one is drawn twice and one never: the only pair within is (0, 1)."""
    real, fake = normal(5, 2), normal(3, 2, 1)
    counts = torch.tensor([[2.0, 1.0, 0.0]], dtype=torch.float64)

    def kernel(x: Tensor, y: Tensor) -> Tensor:
        return (x.double() @ y.double().T / 2 + 1) ** 3

    within = kernel(real, real)
    between = (2 * kernel(fake[:1], real) + kernel(fake[1:2], real)).sum() / 15
    expected = (within.sum() - within.trace()) / 20 + kernel(fake[:1], fake[1:2]) - 2 * between
    assert float(kernel_of_counts(real, fake, counts)) == pytest.approx(float(expected), rel=1e-9)


def test_resamples_of_the_reference_are_as_good_as_copies() -> None:
    real, fake = features(normal(40, 3)), features(normal(30, 3, 1))
    counts, reals = (resample_counts(n, 2, torch.Generator().manual_seed(s)) for n, s in ((30, 0), (40, 1)))
    distances = bootstrap._frechet_of_resamples(real, fake, counts, reals)
    for row, (c, r) in enumerate(zip(counts, reals, strict=True)):
        copies = [features(x.features.repeat_interleave(w.long(), 0)) for x, w in ((real, r), (fake, c))]
        expected = frechet_distance(*(x.gaussian for x in copies))
        assert float(distances[row]) == pytest.approx(expected, rel=1e-6)
    there = kernel_of_counts(real.features, fake.features, counts, real_counts=reals)
    back = kernel_of_counts(fake.features, real.features, reals, real_counts=counts)
    torch.testing.assert_close(there, back, rtol=1e-9, atol=1e-12)
    precision, recall = precision_recall_of_counts(real.features, fake.features, counts, real_counts=reals)
    swapped = precision_recall_of_counts(fake.features, real.features, reals, real_counts=counts)
    torch.testing.assert_close(torch.stack(swapped), torch.stack((recall, precision)), atol=0.04, rtol=0)
    once = measures(real, fake)
    assert (once["precision"], once["recall"]) == (float(precision[0]), float(recall[0]))
    assert once["distance"] == float(distances[0])


def test_the_noise_of_many_dimensions_is_that_of_the_leading_ones(monkeypatch) -> None:
    scale = torch.tensor([3.0, 2.0, 0.01, 0.01])
    real, a, b = (features(normal(80, 4, s) * scale) for s in range(3))
    exact = compare(real, a, b, 60)["distance"]
    monkeypatch.setattr(bootstrap, "LEADING", 2)
    found = compare(real, a, b, 60)["distance"]
    assert (found.relative, found.relative_low, found.relative_high) == pytest.approx(
        (exact.relative, exact.relative_low, exact.relative_high), rel=0.01
    )
    assert (found.a, found.b, found.difference) == (exact.a, exact.b, exact.difference)
    assert (found.low, found.high) == pytest.approx((exact.low, exact.high), rel=0.01)


def seed_of(draws: list[float]) -> Difference:
    return Difference(0, 0, float(np.mean(draws)), 0, 0, None, None, None, draws)


def test_pooled_intervals_are_over_seeds_and_images() -> None:
    noise = [x / 50 - 1 for x in range(101)]
    alone = np.quantile(noise, [0.025, 0.975])
    assert pooled([seed_of(noise)] * 3) == pytest.approx(tuple(alone), abs=0.06), "they share the reference"
    low, high = pooled([seed_of([x, x]) for x in (-3.0, -2.0, -1.0)])
    assert (low, high) == pytest.approx((-3.2, -0.8), abs=0.1)  # widened by sqrt(3 / 2)
    wider = pooled([seed_of([x + y for y in noise]) for x in (-3.0, -2.0, -1.0)])
    assert wider[0] < low < high < wider[1]


def test_draws_that_are_not_finite_are_none_at_all() -> None:
    """Older comparisons of four images: a resample of one alone had no KID, and JSON has null for it."""
    real, fake = features(normal(9, 2)), features(normal(4, 2, 1))
    found = compare(real, fake, features(normal(4, 2, 2)), 400)["kid"]
    assert np.isfinite(found.draws).all()
    values = {**found._asdict(), "low": None, "draws": [None, *found.draws[1:]]}
    assert Difference.read(values).draws == ()
    assert Difference.read({**values, "draws": [1.0, 2.0]}).reversed.draws == [-1, -2]


def test_a_set_does_not_differ_from_itself() -> None:
    real, fake = features(normal(80, 4)), features(normal(60, 4, 1))
    for difference in compare(real, fake, fake, resamples=50).values():
        assert difference.difference == difference.low == difference.high == 0


def test_two_draws_of_one_model_do_not_differ_and_two_models_do() -> None:
    real = features(normal(300, 4))
    first, second, far = (features(normal(200, 4, seed) + shift) for seed, shift in ((1, 0), (2, 0), (3, 1)))
    same, other = compare(real, first, second, 200), compare(real, far, first, 200)
    for name in ("distance", "kid", "recall"):
        assert same[name].low < 0 < same[name].high, name
    assert other["distance"].low > 0
    assert other["kid"].low > 0
    assert other["recall"].high < 0
    assert other["distance"].relative == pytest.approx(other["distance"].a / other["distance"].b - 1)
    assert other["distance"].low < other["distance"].difference < other["distance"].high
    assert same == compare(real, first, second, 200)  # seeded


def test_intervals_cover_the_truth_as_often_as_they_say() -> None:
    """Differences of two draws of one model are 0: of 60 intervals of 90 %, 54 hold it give or take."""
    real, hits = features(normal(300, 2)), 0
    for seed in range(60):
        a, b = features(normal(100, 2, 2 * seed + 1)), features(normal(90, 2, 2 * seed + 2))
        found = compare(real, a, b, resamples=100, confidence=0.9)["kid"]
        hits += found.low <= 0 <= found.high
    assert 46 <= hits <= 60


def test_pairs_share_their_noise() -> None:
    """The same images a little worse: resampled together the difference is sure, apart it is not."""
    real, base = features(normal(300, 3)), normal(100, 3, 1)
    a, b = features(base + 0.05), features(base)
    together, apart = compare(real, a, b, 100), compare(real, a, features(base[:99]), 100)
    assert together["distance"].high - together["distance"].low < 0.5 * (
        apart["distance"].high - apart["distance"].low
    )


def test_a_reversed_difference_is_that_of_the_reversed_sets() -> None:
    real, a, b = features(normal(90, 3)), features(normal(70, 3, 1) + 1), features(normal(70, 3, 2) + 0.7)
    one, other = compare(real, a, b, 50)["distance"], compare(real, b, a, 50)["distance"]
    back = one.reversed
    assert (back.a, back.b, back.low, back.high) == pytest.approx((other.a, other.b, other.low, other.high))
    assert back.relative == pytest.approx(other.relative)
    assert back.relative_low < back.relative < back.relative_high
    nothing = Difference(1, 0, 1, 0, 2, None, None, None).reversed
    assert nothing.relative is nothing.relative_low is None


@pytest.mark.parametrize(
    ("settings", "message"),
    [({"resamples": 1}, "resamples must be >= 2"), ({"confidence": 1.0}, "confidence lie in")],
)
def test_impossible_intervals_are_refused(settings: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        compare(features(normal(9, 2)), features(normal(9, 2)), features(normal(9, 2)), **settings)
    with pytest.raises(ValueError, match="one extractor"):
        compare(features(normal(9, 2)), features(normal(9, 2), "other"), features(normal(9, 2)))
