"""The procedural sunsets, and reading their causes back from pixels."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageFilter

from anyorder.contracts import Grid
from anyorder.data import sunsets as module
from anyorder.data.caches import ImageSet, splits
from anyorder.data.sunsets import CAUSES, SUNS, causes_of, sun_first, sunsets, write_sunsets
from anyorder.stages.artifacts import Artifact

N = 400


def column(causes: np.ndarray, name: str) -> np.ndarray:
    return causes[:, CAUSES.index(name)]


def degraded(images: np.ndarray, sigma: float, noise: float, seed: int = 0) -> np.ndarray:
    """Gaussian blur and noise (standard deviation in 8-bit levels), as after a lossy tokenizer."""
    blurred = [np.asarray(Image.fromarray(i).filter(ImageFilter.GaussianBlur(sigma))) for i in images]
    noisy = np.stack(blurred) + np.random.default_rng(seed).normal(0, noise, images.shape)
    return noisy.round().clip(0, 255).astype(np.uint8)


@given(st.integers(0, 2**32), st.integers(0, 2**41), st.integers(0, 5), st.integers(1, 5))
@settings(max_examples=20, deadline=None, derandomize=True)
def test_image_depends_on_seed_and_index_only(seed, first, skip, n):
    images, causes = sunsets(skip + n, seed=seed, first=first)
    again, causes_again = sunsets(n, seed=seed, first=first + skip)
    np.testing.assert_array_equal(images[skip:], again)
    np.testing.assert_array_equal(causes[skip:], causes_again)


def test_blocks_do_not_show():
    images, _ = sunsets(module._BLOCK + 3)
    np.testing.assert_array_equal(images[module._BLOCK - 1 :], sunsets(4, first=module._BLOCK - 1)[0])


def test_seeds_and_images_differ():
    images, _ = sunsets(20, seed=0)
    assert len({i.tobytes() for i in images} | {i.tobytes() for i in sunsets(20, seed=1)[0]}) == 40


@pytest.mark.parametrize("size", [(16, 16), (24, 40), (40, 24), (32, 32), (64, 48)])
def test_causes_are_where_they_say(size):
    images, causes = sunsets(60, size, seed=5)
    assert images.shape == (60, *size, 3)
    assert images.dtype == np.uint8
    assert causes.shape == (60, len(CAUSES))
    assert causes.dtype == np.int64
    rows = np.arange(60)
    sun_color = images[rows, column(causes, "sun_row"), column(causes, "sun_col")]
    set_ = column(causes, "sun_row") + 1 >= column(causes, "horizon")
    np.testing.assert_allclose(sun_color[~set_], module._SUN[column(causes, "sun")][~set_], atol=1)
    assert (~set_).sum() > 20
    assert (column(causes, "sun_row") < column(causes, "horizon")).mean() > 0.9
    assert (column(causes, "cloud_row") < module._CLOUD_FLOOR * size[0]).all(), "clouds never cover the sun"
    assert (
        column(causes, "sun_row") - column(causes, "sun_radius") > module._CLOUD_FLOOR * size[0] - 1
    ).all()
    cloud_color = images[rows, column(causes, "cloud_row"), column(causes, "cloud_col")].astype(float)
    distance = np.linalg.norm(cloud_color - module._CLOUD[column(causes, "cloud")], axis=1)
    assert np.quantile(distance, 0.95) < 45
    assert set(column(causes, "clouds")) == {1, 2, 3}


def test_cloud_colour_depends_on_the_sun_and_has_two_variants():
    _, causes = sunsets(N, seed=1)
    sun, cloud = column(causes, "sun"), column(causes, "cloud")
    np.testing.assert_array_equal(cloud // 2, sun)
    counts = np.bincount(cloud, minlength=2 * len(SUNS))
    assert counts.min() > N / 16, f"all eight pairs must occur: {counts}"


@pytest.mark.parametrize("size", [(32, 32), (24, 48), (48, 32)])
def test_true_images_are_consistent(size):
    images, causes = sunsets(N, size, seed=2)
    found = causes_of(images)
    assert found.consistent.mean() >= 0.99
    assert (found.sun == column(causes, "sun")).mean() >= 0.99
    assert (found.cloud == column(causes, "cloud")).mean() >= 0.98


@pytest.mark.parametrize("size", [(32, 32), (64, 64)])
def test_degraded_images_stay_consistent(size):
    images, causes = sunsets(N, size, seed=3)
    found = causes_of(degraded(images, sigma=0.7, noise=8))
    assert found.consistent.mean() >= 0.95
    assert (found.sun == column(causes, "sun")).mean() >= 0.99


def test_transplanted_clouds_score_near_chance():
    images, _ = sunsets(2000, seed=4)
    floor = round(module._CLOUD_FLOOR * 32)
    donors = np.random.default_rng(0).permutation(len(images))
    mixed = np.concatenate([images[donors, :floor], images[:, floor:]], axis=1)
    found = causes_of(mixed)
    assert abs(found.consistent.mean() - 1 / len(SUNS)) < 0.05
    assert min(found.sun.min(), found.cloud.min()) >= 0


def test_consistency_follows_the_share_of_transplants():
    images, causes = sunsets(N, seed=6)
    other = images[np.argsort(column(causes, "sun") % 2 + np.arange(N) / N)]  # any other sequence
    mixed = np.concatenate([other[:, :11], images[:, 11:]], axis=1)
    true = causes_of(other).sun == causes_of(images).sun
    assert abs(causes_of(mixed).consistent.mean() - true.mean()) < 0.02


def test_images_without_sun_or_cloud_count_as_inconsistent():
    images, _ = sunsets(50, seed=7)
    no_sun, no_cloud = images.copy(), images.copy()
    no_sun[:, 11:] = (20, 30, 60)
    no_cloud[:, :13] = (20, 30, 60)
    for blank, sun, cloud in ((no_sun, False, True), (no_cloud, True, False)):
        found = causes_of(blank)
        assert ((found.sun >= 0) == sun).all()
        assert ((found.cloud >= 0) == cloud).all()
        assert not found.consistent.any()
    noise = np.random.default_rng(0).integers(0, 256, (50, 32, 32, 3)).astype(np.uint8)
    assert causes_of(noise).consistent.mean() < 0.05


def test_no_images_and_wrong_images():
    assert sunsets(0)[0].shape == (0, 32, 32, 3)
    assert causes_of(np.zeros((0, 32, 32, 3), np.uint8)).sun.shape == (0,)
    with pytest.raises(ValueError, match=r"images must be uint8 \(n, height, width, 3\), got float32"):
        causes_of(np.zeros((1, 32, 32, 3), np.float32))
    with pytest.raises(ValueError, match="at least 16 x 16 pixels"):
        sunsets(1, (15, 32))


def test_write_sunsets(tmp_path):
    artifact = Artifact(tmp_path, "data", {"seed": 3}, {})
    facts = write_sunsets(tmp_path, (16, 24), n_train=module._BLOCK + 5, n_test=7, seed=3)
    artifact.finish(**facts)
    assert facts == {
        "classes": list(SUNS),
        "counts": {"train": module._BLOCK + 5, "test": 7},
        "causes": list(CAUSES),
    }
    train, test = ImageSet(tmp_path), ImageSet(tmp_path, "test")
    images, causes = sunsets(len(train), (16, 24), seed=3)
    np.testing.assert_array_equal(train.images, images)
    np.testing.assert_array_equal(np.load(tmp_path / "train.causes.npy"), causes)
    np.testing.assert_array_equal(train.labels, column(causes, "sun"))
    assert not {i.tobytes() for i in test.images} & {i.tobytes() for i in train.images}


def test_a_validation_split_changes_no_other(tmp_path):
    write_sunsets(tmp_path / "two", (16, 16), 5, 4, seed=1)
    facts = write_sunsets(tmp_path / "three", (16, 16), 5, 4, seed=1, n_validation=3)
    assert facts["counts"] == {"train": 5, "validation": 3, "test": 4}
    for path in (tmp_path / "two").iterdir():
        assert path.read_bytes() == (tmp_path / "three" / path.name).read_bytes()
    found = [image.tobytes() for split in splits(tmp_path / "three") for image in np.load(
        tmp_path / f"three/{split}.images.npy"
    )]  # fmt: skip
    assert len(set(found)) == 12
    with pytest.raises(ValueError, match="max_validation must be at least 0, got -1"):
        write_sunsets(tmp_path / "none", (16, 16), 5, 4, n_validation=-1)


def test_write_sunsets_resumes(tmp_path, monkeypatch):
    arguments = {"size": (16, 16), "n_train": 2 * module._BLOCK, "n_test": 3, "seed": 1}
    write_sunsets(tmp_path / "whole", **arguments)
    calls = []

    def dying(n, size, seed, first):
        calls.append(first)
        if len(calls) == 2:
            raise RuntimeError("killed")
        return sunsets(n, size, seed, first)

    monkeypatch.setattr(module, "sunsets", dying)
    with pytest.raises(RuntimeError, match="killed"):
        write_sunsets(tmp_path / "resumed", **arguments)
    write_sunsets(tmp_path / "resumed", **arguments)
    assert calls == [0, module._BLOCK, module._BLOCK, module._STARTS["test"]]
    for path in (tmp_path / "whole").iterdir():
        assert path.read_bytes() == (tmp_path / "resumed" / path.name).read_bytes()


@pytest.mark.parametrize(("n_train", "n_test"), [(0, 1), (1, -1)])
def test_write_sunsets_refuses(tmp_path, n_train, n_test):
    with pytest.raises(ValueError, match=f"got {n_train} and {n_test}"):
        write_sunsets(tmp_path, (16, 16), n_train, n_test)


def test_sun_first_compares_the_steps_of_the_two_centres():
    grid, size = Grid(2, 2), (16, 16)
    causes = np.zeros((3, len(CAUSES)), np.int64)
    causes[:, CAUSES.index("sun_row")] = 12  # the lower left patch, position 2
    causes[:, CAUSES.index("cloud_col")] = 15  # the upper right one, position 1
    orders = np.array([[2, 1, 0, 3], [1, 2, 0, 3], [0, 3, 2, 1]])
    assert sun_first(orders, causes, grid, size) == pytest.approx(2 / 3)
