"""A validation split: everything that is chosen is chosen on it, the test split is measured last."""

import csv
import json
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import yaml
from hypothesis import given
from hypothesis import strategies as st

from anyorder.cli import main as cli
from anyorder.data.caches import OrderSet, TokenSet, splits
from anyorder.data.images import to_uint8
from anyorder.evaluation import bootstrap
from anyorder.evaluation.metrics import FeatureStatistics, frechet_distance
from anyorder.files import read_json, read_manifest
from anyorder.inference.weights import load_tokenizer
from anyorder.report.summary import report
from anyorder.settings import parse
from anyorder.stages.artifacts import Artifact
from anyorder.stages.features import load_extractor, reference_file
from anyorder.stages.floors import reference_split
from anyorder.stages.sample import stratified
from anyorder.stages.train import TrainStage
from anyorder.stages.tune import TuneStage, best

TINY_VQ = {
    "channels": 8, "multipliers": [1, 1, 2], "groups": 1, "res_blocks": 1, "attention": False,
    "z_channels": 8, "vocab_size": 16, "code_dim": 4, "codebook_update": "ema", "revive_after": 5,
}  # fmt: skip
TINY = {"depth": 1, "width": 32, "heads": 2}
STEPS = {"steps": 4, "batch_size": 8, "log_every": 2, "eval_every": 2, "save_every": 2}
WATCHED = {**STEPS, "patience": 3, "watch": "validation_nll"}
QUICK = {"policy": {"order": "entropy", "per_step": 8}}
EXPERIMENT = {
    "data": {"max_train": 40, "max_validation": 12, "max_test": 10, "size": [16, 16]},
    "tokenizer": {"data": "data", "model": TINY_VQ, "train": STEPS},
    "tokens": {"data": "data", "tokenizer": "tokenizer"},
    "features": {"data": "data", "extractor": "efficientnet-lite0", "max_train": 30},
    "any": {"stage": "train", "tokens": "tokens", "model": TINY, "train": WATCHED},
    "orders": {"model": "any", "tokens": "tokens", "test_limit": 6, **QUICK},
    "ordered": {"stage": "train", "tokens": "tokens", "init": "any", "orders": "orders", "train": WATCHED},
    "iterate": {"model": "any", "tokens": "tokens", "rounds": 2, "patience": 2, "test_limit": 4,
                "first": QUICK["policy"], "train": {**STEPS, "steps": 2},
                "policy": {"order": "token_likelihood", "location": 1.0, "per_step": 8}},
    "tune": {"model": "any", "features": "features", "temperatures": [0.5, 1.0], "scales": [1.5],
             "num_images": 8, **QUICK},
    "chosen": {"stage": "sample", "model": "any", "settings": "tune", "classes": "validation",
               "num_images": 10, **QUICK},
    "eval-chosen": {"stage": "eval", "samples": "chosen", "features": "features", "split": "validation",
                    "nll_images": 4},
    "uniform": {"stage": "sample", "model": "any", "classes": "uniform", "num_images": 8, **QUICK},
    "eval-uniform": {"stage": "eval", "samples": "uniform", "features": "features", "split": "test",
                     "nll_images": 0},
}  # fmt: skip


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    folder = tmp_path_factory.mktemp("validation")
    (folder / "x.yaml").write_text(
        yaml.safe_dump({"out": str(folder / "out"), "stages": EXPERIMENT}, sort_keys=False)
    )
    assert cli.main(["run", str(folder / "x.yaml")]) == 0
    return folder / "out"


def test_tokens_and_orders_have_the_third_split(out):
    assert splits(out / "data") == splits(out / "tokens") == ["train", "validation", "test"]
    assert [len(TokenSet(out / "tokens", split)) for split in splits(out / "tokens")] == [40, 12, 10]
    orders = OrderSet(out / "orders")
    assert len(orders) == 40
    assert orders.held_out("validation").shape == orders.held_out("test").shape == (6, 16)


def test_an_independent_network_makes_features_of_every_split(out):
    made = read_manifest(out / "features")
    assert made["metric_name"] == "FD (efficientnet-lite0)"
    sizes = {"reference": 10, "validation": 12, "train": 30}
    assert {"extractor.json", *(f"{name}.safetensors" for name in sizes)} == set(made["files"])
    source = read_manifest(out / "data")["fingerprint"]
    for name, n in sizes.items():
        found = FeatureStatistics.load(out / f"features/{name}.safetensors", made["extractor"], source)
        assert found.features.shape == (n, 1280)


@pytest.mark.parametrize("name", ["any", "ordered"])
def test_training_looks_at_the_test_split_once(out, name):
    lines = [json.loads(line) for line in (out / name / "metrics.jsonl").read_text().splitlines()]
    seen = {key for line in lines for key in line}
    assert {"train_nll", "validation_nll"} <= seen
    assert not {key for key in seen if "test" in key}
    facts = read_manifest(out / name)
    assert facts["test_nll"] > 0
    assert facts["validation_nll"] > 0
    assert ("validation_any_order_nll" in facts) == ("any_order_nll" in facts) == (name == "ordered")


def test_nothing_is_chosen_on_the_test_split(out, tmp_path):
    stage = TrainStage(tokens=out / "tokens")
    stage.train.patience, stage.train.watch = 1, "test_nll"
    with pytest.raises(ValueError, match=r"watch=test_nll is not evaluated: choose one of .*validation_nll"):
        stage.run(Artifact(tmp_path / "x", "train", {}, {}))


def test_rounds_are_chosen_on_the_validation_split(out):
    facts = read_manifest(out / "iterate")
    bounds = [round_["validation_bound"] for round_ in facts["rounds"]]
    assert facts["best_round"] == 1 + bounds.index(min(bounds))
    assert all(r["gap"] == pytest.approx(r["validation_bound"] - r["train_bound"]) for r in facts["rounds"])


# --- the search ---------------------------------------------------------------------------------------------


def test_samples_take_the_best_point_of_the_search(out):
    rows = read_json(out / "tune" / "table.json")
    assert [(row["temperature"], row["guidance_scale"]) for row in rows] == [(0.5, 1.5), (1.0, 1.5)]
    made, chosen = read_manifest(out / "tune"), read_manifest(out / "chosen")
    assert made["points"] == rows
    assert made["best"] == best(rows)
    assert (chosen["temperature"], chosen["guidance_scale"]) == (made["best"]["temperature"], 1.5)
    assert {path.name for path in (out / "tune").iterdir()} == {"manifest.json", "table.json", "search.png"}


def test_near_ties_are_decided_by_kid():
    rows = [{"distance": d, "kid": k} for d, k in ((1.02, 0.0), (1.0, 0.3), (1.009, 0.2))]
    assert best(rows) == rows[2]


def test_a_killed_search_goes_on(out, tmp_path, monkeypatch, caplog):
    command = [
        "tune", f"model={out}/any", f"features={out}/features", "temperatures=0.5,1", "scales=1.5",
        "num_images=8", "policy.order=entropy", "policy.per_step=8", f"out={tmp_path}/t",
    ]  # fmt: skip
    measure, calls = bootstrap.measures, []

    def dying(*sets):
        calls.append(len(calls))
        if len(calls) == 2:
            raise ValueError("killed")
        return measure(*sets)

    monkeypatch.setattr(bootstrap, "measures", dying)
    assert cli.main(command) == 2
    assert "FD of 8 images in 1280 features prefers low temperatures: give num_images" in caplog.text
    assert (tmp_path / "t" / "point-2" / "images.npy").is_file()
    assert cli.main(command) == 0
    assert len(calls) == 3
    assert (tmp_path / "t" / "table.json").read_bytes() == (out / "tune" / "table.json").read_bytes()
    assert read_manifest(tmp_path / "t")["fingerprint"] == read_manifest(out / "tune")["fingerprint"]


def test_settings_are_those_of_the_same_policy(out, tmp_path, capsys):
    command = ["sample", f"model={out}/any", f"settings={out}/tune", f"out={tmp_path}/s", "num_images=4"]
    assert cli.main([*command, "policy.order=raster"]) == 2
    assert "not for raster: run tune with this policy" in capsys.readouterr().err
    assert cli.main([*command, "sampling.temperature=0.9"]) == 2
    assert "leave sampling.temperature and guidance.scale out" in capsys.readouterr().err
    same = [*command, "policy.order=entropy", "policy.per_step=8"]
    assert cli.main([*same, "guidance.schedule=linear"]) == 2
    assert "is a search with guidance.schedule=constant: say so here, too" in capsys.readouterr().err
    assert cli.main([*same, "sampling.top_k=5"]) == 2
    assert "is a search with sampling.top_k=0" in capsys.readouterr().err


def test_another_policy_keeps_the_guidance_of_the_samples(out, tmp_path):
    assert cli.main(["pipeline", f"samples={out}/chosen", "policy.order=raster", f"out={tmp_path}/p"]) == 0
    stored, chosen = read_json(tmp_path / "p/pipeline.json"), read_manifest(out / "chosen")
    assert stored["guidance"]["scale"] == chosen["guidance_scale"] == 1.5
    assert stored.get("sampling", {}).get("temperature", 1.0) == chosen["temperature"]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"temperatures": [0.1, 0.2, 0.3, 0.4]}, "1 to 12 different points, got 4 x 4"),
        ({"temperatures": []}, "1 to 12 different points, got 0 x 4"),
        ({"temperatures": [0.5, 0.5]}, "1 to 12 different points, got 2 x 4"),
        ({"guidance": {"scale": 2}}, "temperature and scale are searched"),
        ({"num_images": 3}, "num_images must be >= 4, got 3"),
    ],
)
def test_searches_that_cannot_be_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        parse(TuneStage, {"model": "m", "features": "f", **settings})


# --- evaluation ---------------------------------------------------------------------------------------------


@given(st.lists(st.integers(0, 5), min_size=1, max_size=60), st.integers(1, 200), st.integers(0, 3))
def test_samples_have_the_mix_of_classes_of_the_real_images(labels, n, seed):
    labels = np.array(labels)
    rows = stratified(labels, n, seed)
    assert len(rows) == n
    assert np.ptp(np.bincount(rows, minlength=len(labels))[np.unique(rows)]) <= 1  # no image far more often
    wanted = np.bincount(labels, minlength=6) * n / len(labels)
    assert (abs(np.bincount(labels[rows], minlength=6) - wanted) < 1 + 1e-9).all()


def test_evaluations_have_floors_with_the_classes_of_the_samples(out):
    for name, split, n, pool in (
        ("chosen", "validation", 12, "train"),
        ("uniform", "test", 10, "validation"),
    ):
        found = read_manifest(out / f"eval-{name}")["metrics"]
        assert found["floor_split"] == pool
        assert (found["split"], found["n_real"]) == (split, n)
        real, through = found["floors"]["real images"], found["floors"]["reconstructions"]
        assert 4 <= real["images"] == through["images"] <= found["n_fake"]
        assert real["distance"] < through["distance"]  # the tokenizer is hardly trained
    labels = np.load(out / "uniform" / "labels.npy")
    assert np.bincount(labels).tolist() == [2, 2, 2, 2]
    held = TokenSet(out / "tokens", "validation").labels
    assert sorted(np.load(out / "chosen" / "labels.npy")) != sorted(TokenSet(out / "tokens", "test").labels)
    assert set(np.load(out / "chosen" / "labels.npy").tolist()) <= set(held.tolist())


def test_the_split_must_be_said(out, tmp_path, capsys):
    command = ["eval", f"samples={out}/uniform", f"features={out}/features", f"out={tmp_path}/e"]
    assert cli.main(command) == 2
    assert "has a validation split: say split=validation while you choose" in capsys.readouterr().err
    two = [f"a={out}/eval-chosen", f"b={out}/eval-uniform", f"out={tmp_path}/c"]
    assert cli.main(["compare", *two]) == 2
    assert "is about the validation split" in capsys.readouterr().err


def test_a_reference_file_of_the_test_images_gives_the_same_distance(out, tmp_path, capsys):
    np.savez(tmp_path / "r.npz", arr_0=np.load(out / "data" / "test.images.npy"))
    command = ["eval", f"samples={out}/uniform", f"features={out}/features", "split=test", "nll_images=0"]
    assert cli.main([*command, f"reference={tmp_path}/r.npz", f"out={tmp_path}/e"]) == 0
    found = read_manifest(tmp_path / "e")["metrics"]
    assert found["fd_of_reference"] == pytest.approx(found["fd"], rel=1e-6)
    np.savez(tmp_path / "m.npz", mu=np.zeros(2048), sigma=np.eye(2048))
    assert cli.main([*command, f"reference={tmp_path}/m.npz", f"out={tmp_path}/f"]) == 2
    assert "holds mu, sigma, FD (efficientnet-lite0) needs arr_0" in capsys.readouterr().err


def test_numbers_say_run_and_split_and_leave_out_what_was_set_aside(out, tmp_path):
    aside = out / "eval-uniform/.replaced/manifest.json"
    aside.parent.mkdir()
    aside.write_text(json.dumps(read_manifest(out / "eval-uniform") | {"fingerprint": "of an older one"}))
    report([out], tmp_path / "r.csv")
    shutil.rmtree(aside.parent)
    with open(tmp_path / "r.csv") as file:
        rows = {row["samples"]: row for row in csv.DictReader(file)}
    assert {name: (row["run"], row["split"]) for name, row in rows.items()} == {
        "chosen": (str(out), "validation"), "uniform": (str(out), "test"),
    }  # fmt: skip


def test_reconstructions_are_compared_with_the_images_that_they_are_of(out, tmp_path):
    """Not with the whole split: its mean alone lies elsewhere."""
    command = ["eval", f"samples={out}/uniform", f"features={out}/features", "split=test", "nll_images=0"]
    assert cli.main([*command, "rfd_images=4", f"out={tmp_path}/e"]) == 0
    rows, data = np.array([0, 3, 6, 9]), TokenSet(out / "tokens", "test")
    tokenizer, extractor = load_tokenizer(out / "tokenizer"), load_extractor(out / "features")
    pixels = torch.from_numpy(to_uint8(tokenizer.decode(data.batch(rows)[0], data.grid))).permute(0, 3, 1, 2)
    made, real = FeatureStatistics("x"), FeatureStatistics("x")
    made.update(*extractor(pixels))
    images = torch.from_numpy(np.load(out / "data/test.images.npy")[rows]).permute(0, 3, 1, 2)
    real.update(*extractor(images))
    expected = frechet_distance(real.gaussian, made.gaussian)
    assert read_manifest(tmp_path / "e")["metrics"]["rfd"] == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize(
    "images", [np.zeros((4, 8, 8, 3)), np.zeros((4, 3, 8, 8), np.uint8), np.zeros((1, 8, 8, 3), np.uint8)]
)
def test_images_of_a_reference_file_that_are_none_are_refused(images, tmp_path):
    np.savez(tmp_path / "r.npz", arr_0=images)
    with pytest.raises(
        ValueError, match=r"arr_0 must be \(n, height, width, 3\) uint8, got \(\d, .*int8|float64"
    ):
        reference_file(tmp_path / "r.npz", SimpleNamespace(metric="FD", dim=2))


def test_moments_of_a_reference_file_are_those_of_inception(tmp_path):
    inception = SimpleNamespace(metric="FID", dim=2)
    np.savez(tmp_path / "m.npz", mu=np.array([1.0, 2.0]), sigma=np.eye(2))
    found = reference_file(tmp_path / "m.npz", inception)
    assert (found.mean.tolist(), found.covariance.tolist()) == ([1, 2], [[1, 0], [0, 1]])
    np.savez(tmp_path / "n.npz", mu=np.array([1.0, np.nan]), sigma=np.eye(2))
    with pytest.raises(ValueError, match="mu or sigma is not finite"):
        reference_file(tmp_path / "n.npz", inception)
    np.savez(tmp_path / "w.npz", mu=np.zeros(3), sigma=np.eye(3))
    with pytest.raises(ValueError, match=r"mu and sigma of 2 features are needed, got \(\(3,\), \(3, 3\)\)"):
        reference_file(tmp_path / "w.npz", inception)
    np.save(tmp_path / "a.npy", np.zeros(3))
    (tmp_path / "t.npz").write_bytes(b"text")
    for name in ("a.npy", "t.npz", "missing.npz"):
        with pytest.raises(ValueError, match=f"{name} cannot be read .*: give an .npz with mu and sigma"):
            reference_file(tmp_path / name, inception)


def test_without_a_validation_split_there_is_none_to_compare_with(tmp_path):
    with pytest.raises(ValueError, match="has no validation split: run data with max_validation"):
        reference_split(tmp_path, "validation")
    assert reference_split(tmp_path, None) == reference_split(tmp_path, "test") == "test"
