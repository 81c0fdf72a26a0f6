"""The stage that completes test images, and stages on converted models."""

import numpy as np
import pytest
import torch
import yaml
from conftest import published

from anyorder import Pipeline
from anyorder.adapters.arpg import ARPG
from anyorder.adapters.randar import RandAR
from anyorder.cli import main as cli
from anyorder.files import load_array, read_json, read_manifest
from anyorder.settings import parse
from anyorder.stages.completion import CompletionStage
from anyorder.stages.execute import execute
from anyorder.stages.experiment import load_experiment

TINY_VQ = {
    "channels": 8, "multipliers": [1, 1, 2], "groups": 1, "res_blocks": 1, "attention": False,
    "z_channels": 8, "vocab_size": 16, "code_dim": 4, "codebook_update": "ema", "revive_after": 5,
}  # fmt: skip
STEPS = {"steps": 2, "batch_size": 8, "log_every": 2, "eval_every": 2, "save_every": 2}
MADE = {"tokenizer": "tokenizer", "tokens": "tokens"}
MEASURED = {**MADE, "features": "features", "data": "data", "num_images": 6, "batch_size": 4}

EXPERIMENT = {
    "stages": {
        "data": {"max_train": 24, "max_test": 12, "size": [16, 16]},
        "tokenizer": {"data": "data", "model": TINY_VQ, "train": STEPS},
        "features": {"data": "data", "channels": [8, 16], "train": STEPS},
        "tokens": {"data": "data", "tokenizer": "tokenizer"},
        "any": {"stage": "train", "tokens": "tokens", "model": {"depth": 1, "width": 32, "heads": 2},
                "train": STEPS},
        "orders": {"model": "any", "tokens": "tokens", "limit": 8, "test_limit": 4},
        "by-class": {"stage": "completion", "model": "any", "orders": "orders", **MEASURED, "seeds": [0],
                     "policy": {"order": "class_mean"}},
        "random": {"stage": "completion", "model": "any", **MEASURED, "policy": {"order": "random"},
                   "seeds": [0, 1], "bf16": False},
        "certain": {"stage": "completion", "model": "any", "scorer": "any", **MEASURED, "mask": "lower",
                    "seeds": [3], "guidance": {"scale": 1.5}},
        "peeking": {"stage": "completion", "model": "any", **MEASURED, "seeds": [0, 1],
                    "policy": {"order": "token_likelihood"}},
    }
}  # fmt: skip


@pytest.fixture(scope="module")
def experiment(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    path = folder / "tiny.yaml"
    path.write_text(yaml.safe_dump({"out": str(folder / "tiny"), **EXPERIMENT}, sort_keys=False))
    assert cli.main(["run", str(path)]) == 0
    return path, folder / "tiny"


@pytest.mark.parametrize(
    ("name", "seeds", "hole"), [("random", [0, 1], slice(4, 12)), ("certain", [3], None)]
)
def test_known_pixels_of_test_images_are_kept(experiment, name, seeds, hole):
    _, out = experiment
    rows = np.linspace(0, 11, 6).round().astype(int)
    true = load_array(out / "data" / "test.images.npy")[rows]
    mask = np.zeros((16, 16), bool)
    mask[(hole, hole) if hole else slice(11, 16)] = True
    for seed in seeds:
        images = load_array(out / name / f"{seed}.images.npy")
        np.testing.assert_array_equal(images[:, ~mask], true[:, ~mask])
        assert (images[:, mask] != true[:, mask]).any()
        order = load_array(out / name / f"{seed}.order.npy")
        assert (np.sort(order, axis=1) == np.arange(16)).all()
    assert (out / name / "grid.png").stat().st_size > 0


def test_completion_is_measured_over_seeds(experiment):
    _, out = experiment
    found = read_json(out / "random" / "metrics.json")
    assert set(found) == {"fd", "kid", "precision", "recall", "hole_mse", "hole_psnr", "hole_nll"}
    assert 0 <= found["recall"]["mean"] <= 1
    assert all(len(values["seeds"]) == 2 and values["std"] >= 0 for values in found.values())
    assert 0 < found["hole_mse"]["mean"] < 1
    assert found["hole_nll"]["mean"] == pytest.approx(np.log(16), abs=0.5)
    assert read_json(out / "certain" / "metrics.json")["fd"]["std"] is None
    assert "hole_nll" not in read_json(out / "peeking" / "metrics.json")
    assert not read_manifest(out / "peeking")["token_blind"]
    page = (out / "report.html").read_text()
    assert "hole_psnr" in page
    assert "Completions" in page


def test_completion_in_the_orders_of_the_classes(experiment):
    _, out = experiment
    rows = np.linspace(0, 11, 6).round().astype(int)
    labels = load_array(out / "data" / "test.labels.npy")[rows]
    ranks = load_array(out / "orders" / "class_order.npy").astype(int).argsort(1)[labels]
    order = load_array(out / "by-class" / "0.order.npy").astype(int)
    opened = np.take_along_axis(ranks, order[:, 12:], 1)
    assert (np.diff(opened, axis=1) > 0).all(), "what is open follows the ranks of its class"
    assert "hole_nll" in read_json(out / "by-class" / "metrics.json")


def test_pixel_errors_are_those_of_the_hole(experiment, tmp_path):
    """By hand, from the images that were written."""
    _, out = experiment
    true = load_array(out / "data" / "test.images.npy")[np.linspace(0, 11, 6).round().astype(int)]
    errors = [
        np.mean(((load_array(out / f"random/{seed}.images.npy") / 255.0 - true / 255.0) ** 2)[:, 4:12, 4:12])
        for seed in (0, 1)
    ]
    assert read_json(out / "random" / "metrics.json")["hole_mse"]["seeds"] == pytest.approx(errors, rel=1e-5)


def test_completions_depend_neither_on_the_batch_nor_on_a_kill(experiment, tmp_path):
    path, out = experiment
    stage = load_experiment(path, ["random.batch_size=3"]).stages["random"][1]
    execute("completion", stage, tmp_path / "again")
    for name in ("0.images", "1.order"):
        np.testing.assert_array_equal(
            load_array(tmp_path / "again" / f"{name}.npy"), load_array(out / "random" / f"{name}.npy")
        )


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_images": 3}, "num_images must be >= 4"),
        ({"seeds": []}, "seeds one or more different numbers"),
        ({"seeds": [1, 1]}, r"different numbers, got .* \(1, 1\)"),
        ({"mask": "center"}, "mask"),
        ({"policy": {"order": "class_mean"}}, "class_mean' needs the orders of the classes"),
        ({"filling": {"margin": -1}}, "margin must be >= 0"),
    ],
)
def test_bad_settings_are_refused(settings, message):
    inputs = dict.fromkeys(("model", "tokenizer", "tokens", "features", "data"), "x")
    with pytest.raises(ValueError, match=message):
        parse(CompletionStage, {**inputs, **settings})


# --- converted models in the stages


@pytest.fixture(scope="module", params=[(RandAR, 6), (ARPG, 4)], ids=["randar-other-classes", "arpg"])
def converted(request, experiment, tmp_path_factory):
    """A file of a published family with the tokens of the experiment, and the folder it was converted to."""
    model_class, classes = request.param
    folder = tmp_path_factory.mktemp("converted")
    grid = [3, 3] if model_class is RandAR else [4, 4]
    model = published(model_class, width=64, vocab_size=16, num_classes=classes, grid=grid)
    torch.save({"model": model.state_dict()}, folder / "weights.pt")
    settings = ["heads=1", f"grid={','.join(map(str, grid))}", f"tokenizer={experiment[1]}/tokenizer"]
    assert cli.main(["convert", f"{folder}/weights.pt", f"{folder}/model", *settings]) == 0
    return folder


def test_converted_models_go_through_the_stages(experiment, converted):
    _, out = experiment
    own = [f"model={converted}/model", f"tokens={out}/tokens"]
    both = [*own, f"tokenizer={out}/tokenizer"]
    measured = [f"features={out}/features", f"data={out}/data"]
    assert cli.main(["orders", *own, f"out={converted}/orders", "limit=8", "test_limit=4"]) == 0
    assert cli.main(["sample", *both, f"out={converted}/drawn", "num_images=5", "policy.order=margin"]) == 0
    evaluate = [
        "eval",
        *own,
        *measured,
        f"samples={converted}/drawn",
        f"out={converted}/eval",
        "nll_images=4",
    ]
    assert cli.main(evaluate) == 0
    complete = ["completion", *both, *measured, f"out={converted}/completion", "num_images=4", "seeds=0"]
    assert cli.main(complete) == 0
    assert cli.main(["pipeline", *both, f"out={converted}/pipeline"]) == 0
    assert load_array(converted / "orders" / "train.order.npy").shape == (8, 16)
    assert read_json(converted / "eval" / "metrics.json")["nll"] > 0
    assert read_manifest(converted / "eval")["metrics"]["training_tokens"] == 0
    assert Pipeline.from_pretrained(converted / "pipeline").model.num_classes == (
        4 if read_json(converted / "model/model/config.json")["kind"] == "arpg" else 6
    )


def test_labels_of_other_classes_are_left_out_with_a_warning(experiment, converted, caplog):
    _, out = experiment
    command = ["orders", f"model={converted}/model", f"tokens={out}/tokens", f"out={converted}/again"]
    assert cli.main([*command, "limit=4", "test_limit=4"]) == 0
    other = read_json(converted / "model/model/config.json")["config"]["num_classes"] != 4
    assert ("labels are left out" in caplog.text) == other


def test_a_converted_model_of_another_codebook_is_refused(experiment, tmp_path, capsys):
    _, out = experiment
    model = published(ARPG, width=64, vocab_size=15, grid=[4, 4])
    torch.save(model.state_dict(), tmp_path / "weights.pt")
    assert cli.main(["convert", f"{tmp_path}/weights.pt", f"{tmp_path}/model", "heads=1"]) == 0
    arguments = [f"model={tmp_path}/model", f"tokens={out}/tokens", f"out={tmp_path}/o"]
    assert cli.main(["orders", *arguments]) == 2
    assert "knows 15 tokens" in capsys.readouterr().err
