"""The models that come with the package."""

import shutil

import numpy as np
import pytest
import torch
from PIL import Image

from anyorder import Pipeline, Sampling
from anyorder.cli import main as cli
from anyorder.inference.folders import BUNDLED, bundled
from anyorder.inference.weights import load_any_order
from anyorder.method.policy_config import PolicyConfig
from anyorder.method.schedules import reveals
from anyorder.orders import inverse, validate


@pytest.fixture(scope="module")
def pipe():
    return Pipeline.from_pretrained("fashion32")


def test_it_is_small_and_says_what_it_is():
    assert bundled() == ["emoji64", "fashion32", "fashion64"]
    assert sum(path.stat().st_size for path in BUNDLED.rglob("*.safetensors")) <= 24.5e6  # a wheel of 25 MB
    for name in bundled():
        assert "Licence" in (BUNDLED / name / "README.md").read_text()


def test_the_scoring_model_of_a_stage_is_that_of_the_pipeline(tmp_path):
    """And its generator only where it has none."""

    def first(network):
        return next(network.parameters())

    whole, alone = BUNDLED / "emoji64", tmp_path
    shutil.copytree(whole / "model", alone / "model")
    pipe = Pipeline.from_pretrained("emoji64")
    torch.testing.assert_close(first(load_any_order(whole, "scorer")), first(pipe.scorer), rtol=0, atol=0)
    torch.testing.assert_close(first(load_any_order(whole)), first(pipe.model), rtol=0, atol=0)
    torch.testing.assert_close(first(load_any_order(alone, "scorer")), first(pipe.model), rtol=0, atol=0)
    assert not torch.equal(first(pipe.scorer), first(pipe.model))


@pytest.mark.parametrize("order", [None, "class_mean", "random"])
def test_smileys_are_yellow_in_every_order_on_offer(order):
    emoji = Pipeline.from_pretrained("emoji64")
    assert order is None or order in emoji.good_orders
    out = emoji("Smileys and Emotion", 12, generator=0, order=order, sampling=Sampling(temperature=0.8))
    images = np.stack([np.asarray(image) for image in out.images]).astype(int)
    assert images.shape == (12, 64, 64, 3)
    corners = images[:, [0, 0, -1, -1], [0, -1, 0, -1]].mean((1, 2))
    assert np.median(corners) > 240
    red, green, blue = np.median(images[:, 16:48, 16:48], (1, 2)).T
    assert np.mean((red > 200) & (green > 130) & (blue < 120)) >= 0.5


def test_emoji_are_completed_with_what_is_given_left_alone():
    emoji = Pipeline.from_pretrained("emoji64")
    image = emoji("Smileys and Emotion", generator=1, sampling=Sampling(temperature=0.8)).images[0]
    mask = np.zeros((64, 64), bool)
    mask[40:] = True
    made = np.asarray(emoji.complete(image, mask, "Smileys and Emotion", generator=2).images[0])
    np.testing.assert_array_equal(made[:40], np.asarray(image)[:40])
    assert (made[40:] != np.asarray(image)[40:]).any()


@pytest.mark.parametrize(
    ("name", "order"),
    [("fashion32", order) for order in (None, "class_mean", "random", "raster")]
    + [("fashion64", order) for order in (None, "class_mean", "random")],
)
def test_products_in_every_order_on_offer(name, order):
    pipe, side = Pipeline.from_pretrained(name), int(name[-2:])
    assert order in (None, *pipe.good_orders)
    out = pipe(class_labels=["Shoes", "Topwear", "Shoes"] * 4, generator=0, order=order)
    assert [image.size for image in out.images] == [(side, side)] * 12
    validate(out.order, pipe.model.grid)
    images = np.stack([np.asarray(image) for image in out.images])
    corners = images[:, [0, 0, -1, -1], [0, -1, 0, -1]].mean((1, 2))
    assert np.median(corners) > 240, "the corners of a product photograph are white"
    middle = slice(3 * side // 8, 5 * side // 8)
    assert np.median(images[:, middle, middle].mean((1, 2, 3))) < 220, "and something stands in its middle"


def test_each_class_has_an_order(pipe):
    order = pipe(["Shoes", "Watches", "Shoes"], order="class_mean").order
    assert torch.equal(order[0], order[2])
    assert not torch.equal(order[0], order[1])


def test_samples_are_as_likely_as_the_evidence_says(pipe):
    """Mean log-probability of its own samples is near the test likelihood, not near that of noise."""
    out = pipe(class_labels=["Topwear"] * 32, generator=5)
    assert 1.5 < -out.log_prob.mean() < 4.5 < np.log(pipe.model.vocab_size)


def test_without_a_class_it_follows_the_mean_of_all(pipe):
    order = pipe(num_images=2, order="class_mean").order
    ranks = inverse(pipe.class_orders).double().mean(0)
    assert torch.equal(order, ranks.argsort(stable=True).expand(2, -1))
    assert pipe(num_images=1, order="raster").order[0].tolist() == list(range(64))


def test_completion_follows_orders_of_classes_on_any_grid(pipe):
    white = Image.new("RGB", (32, 32), "white")
    assert pipe.complete(white, pad=(4, 0, 0, 0), order="raster").images[0].size == (36, 32)
    assert pipe.complete(white, pad=(4, 0, 0, 0), class_labels="Shoes").images[0].size == (36, 32)
    mask = np.zeros((32, 32), bool)
    mask[8:24, 8:24] = True
    assert pipe.complete(white, mask, class_labels="Shoes").images[0].size == (32, 32)


def test_orders_of_classes_in_few_steps(pipe):
    """The same order, several positions at once; also where images have different numbers to draw."""
    quick = PolicyConfig("class_mean", steps=16, schedule="cosine")
    one_by_one = pipe(["Shoes", "Bags"], order="class_mean").order
    assert torch.equal(pipe(["Shoes", "Bags"], order=quick).order, one_by_one)
    steps = list(pipe.stream(["Shoes", "Bags"], order=quick))
    assert [step.positions.shape[1] for step in steps] == reveals(64, 16, "cosine")
    white = Image.new("RGB", (32, 32), "white")
    masks = np.zeros((2, 32, 32), bool)
    masks[0, 8:24, 8:24] = masks[1, :8] = True
    made = pipe.complete([white, white], masks, class_labels=["Shoes", "Bags"], order=quick)
    assert len(made.images) == 2


def test_the_command_writes_images_and_an_animation(tmp_path, capsys):
    command = ["sample", "pipeline=fashion32", "class_labels=Shoes,Bags", "num_images=3", f"out={tmp_path}"]
    assert cli.main(command) == 0
    files = {path.name for path in tmp_path.iterdir()}
    figures = {"grid.png", "orders.png", "generation.webp"}
    assert files == {"0000.png", "0001.png", "0002.png", *figures, "manifest.json"}
    assert "generation.webp" in capsys.readouterr().out
    assert cli.main([*command, "--dry-run"]) == 0
    assert cli.main(["sample", "pipeline=fashion32", "class_labels=Shoos", f"out={tmp_path}/new"]) == 2
    assert "did you mean 'Shoes'" in capsys.readouterr().err
    assert cli.main(["sample", "pipeline=fashion32", "num_images=0", f"out={tmp_path}"]) == 2


def test_command_draws_compiled(tmp_path, monkeypatch):
    """Without a compiler it says so; with one, what is drawn went through compiled code."""
    command = [
        "sample",
        "pipeline=fashion32",
        "num_images=1",
        "class_labels=Shoes",
        "compile=true",
        f"out={tmp_path}",
    ]
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert cli.main(command) == 2
    asked = []
    monkeypatch.setattr(Pipeline, "compile_decoding", lambda pipe: asked.append(pipe))
    assert cli.main(command) == 0
    assert len(asked) == 1


def test_it_survives_being_saved(pipe, tmp_path):
    pipe.save_pretrained(tmp_path)
    again = Pipeline.from_pretrained(tmp_path)
    one, two = (p(class_labels="Bags", num_images=2, generator=1).tokens for p in (pipe, again))
    assert torch.equal(one, two)
