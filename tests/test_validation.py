"""A validation split: everything that is chosen is chosen on it, the test split is measured last."""

import json

import pytest
import yaml

from anyorder.cli import main as cli
from anyorder.data.caches import OrderSet, TokenSet, splits
from anyorder.evaluation.metrics import FeatureStatistics
from anyorder.files import read_manifest
from anyorder.stages.artifacts import Artifact
from anyorder.stages.train import TrainStage

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
