"""The stages on a tiny experiment: what they write, skip, resume and refuse."""

import csv
import dataclasses
import json
import shutil
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from conftest import transformer
from PIL import Image

from anyorder import Pipeline
from anyorder.cli import main as cli
from anyorder.contracts import Grid
from anyorder.data import caches
from anyorder.data.caches import TokenSet
from anyorder.evaluation.metrics import FeatureStatistics, frechet_distance
from anyorder.files import RowWriter, fingerprint, load_array, read_json, read_manifest
from anyorder.inference import device, pipeline
from anyorder.inference.weights import load_model
from anyorder.method.decoding import extract_orders
from anyorder.method.loss import image_nll
from anyorder.method.policy_config import PolicyConfig
from anyorder.method.sampling import Sampling, Streams
from anyorder.models import compiled as compiled_module
from anyorder.orders import random_orders
from anyorder.report.summary import report
from anyorder.settings import as_overrides, flatten, parse
from anyorder.stages import orders as extract
from anyorder.stages.artifacts import Artifact
from anyorder.stages.compare import CompareStage
from anyorder.stages.execute import execute, split
from anyorder.stages.experiment import STAGES, load_experiment
from anyorder.stages.features import FeaturesStage
from anyorder.stages.iterate import IterateStage
from anyorder.stages.orders import OrdersStage, class_orders
from anyorder.stages.sample import SampleStage
from anyorder.stages.tokenizer import TokenizerStage
from anyorder.stages.train import TrainStage
from anyorder.training.config import TrainConfig

TINY_VQ = {
    "channels": 8, "multipliers": [1, 1, 2], "groups": 1, "res_blocks": 1, "attention": False,
    "z_channels": 8, "vocab_size": 16, "code_dim": 4, "codebook_update": "ema", "revive_after": 5,
}  # fmt: skip
TINY_MODEL = {"depth": 1, "width": 32, "heads": 2}
STEPS = {"steps": 4, "batch_size": 8, "log_every": 2, "eval_every": 2, "save_every": 2}
MADE = {"tokenizer": "tokenizer", "tokens": "tokens"}
MEASURED = {"features": "features"}

EXPERIMENT = {
    "stages": {
        "data": {"max_train": 48, "max_test": 24, "size": [16, 16]},
        "tokenizer": {"data": "data", "model": TINY_VQ, "train": STEPS},
        "features": {"data": "data", "channels": [8, 16], "train": STEPS},
        "tokens": {"data": "data", "tokenizer": "tokenizer", "batch_size": 20},
        "raster": {"stage": "train", "tokens": "tokens", "order": "raster", "random_share": 0.5,
                   "random_share_end": 0.0, "model": TINY_MODEL, "train": STEPS},
        "any": {"stage": "train", "tokens": "tokens", "model": TINY_MODEL,
                "train": {**STEPS, "sample_every": 4}},
        "orders": {"model": "any", "tokens": "tokens", "limit": 20, "batch_size": 8},
        "ordered": {"stage": "train", "tokens": "tokens", "init": "any", "orders": "orders",
                    "random_share": 0.2, "train": STEPS},
        "drawn": {"stage": "sample", "model": "ordered", **MADE, "num_images": 10, "batch_size": 4},
        "peeking": {"stage": "sample", "model": "ordered", **MADE, "num_images": 5,
                    "policy": {"order": "token_likelihood"}, "guidance": {"scale": 2.0}, "bf16": False},
        "guided-by-any": {"stage": "sample", "model": "ordered", "scorer": "any", "num_images": 5},
        "eval-guided-by-any": {"stage": "eval", "samples": "guided-by-any", **MEASURED, "nll_images": 8},
        "eval-drawn": {"stage": "eval", "samples": "drawn", "model": "ordered", "data": "data", **MEASURED,
                       "tokens": "tokens", "nll_images": 8},
        "eval-peeking": {"stage": "eval", "samples": "peeking", **MEASURED},
        "compare": {"a": "eval-guided-by-any", "b": "eval-peeking", "resamples": 200},
        "pipeline": {"model": "ordered", "scorer": "any"},
        "orders-shrunk": {"stage": "orders", "model": "any", "tokens": "tokens", "orders": "orders",
                          "limit": 20, "policy": {"order": "margin", "class_weight": 1.0, "rate_every": 3}},
        "by-shrunk": {"stage": "sample", "model": "ordered", "scorer": "any", "orders": "orders",
                      "num_images": 5, "policy": {"order": "margin", "class_weight": 1.0, "rate_every": 3}},
        "eval-by-shrunk": {"stage": "eval", "samples": "by-shrunk", **MEASURED, "nll_images": 8},
        "pipeline-shrunk": {"stage": "pipeline", "samples": "by-shrunk"},
        "located": {"stage": "train", "tokens": "tokens", "init": "any", "orders": "orders", "jitter": 1.0,
                    "random_share": 0.3, "model": {"location": True}, "train": STEPS},
        "learnt": {"stage": "train", "tokens": "tokens", "init": "located", "learn_orders": 2,
                   "train": STEPS},
        "by-location": {"stage": "sample", "model": "located", "num_images": 10,
                        "policy": {"order": "location"}},
        "adaptive": {"stage": "sample", "model": "any", "num_images": 10,
                     "policy": {"order": "entropy", "per_step": 4, "entropy_limit": 3.0}},
        "eval-adaptive": {"stage": "eval", "samples": "adaptive", **MEASURED, "nll_images": 8},
        "eval-by-location": {"stage": "eval", "samples": "by-location", **MEASURED, "nll_images": 8},
        "classes": {"stage": "train", "tokens": "tokens", "orders": "orders", "orders_as": "class_mean",
                    "model": TINY_MODEL, "train": STEPS},
        "by-class": {"stage": "sample", "model": "classes", "orders": "orders", **MADE, "num_images": 10,
                     "policy": {"order": "class_mean"}, "sampling": {"temperature": 0.9, "top_k": 20}},
        "eval-by-class": {"stage": "eval", "samples": "by-class", **MEASURED, "nll_images": 8},
        "grouped": {"stage": "train", "tokens": "tokens", "init": "any", "orders": "orders", "groups": [8, 4],
                    "groups_schedule": "cosine", "model": {"location": True}, "train": STEPS},
        "by-groups": {"stage": "sample", "model": "grouped", "num_images": 10,
                      "policy": {"order": "location", "steps": 4}},
        "eval-by-groups": {"stage": "eval", "samples": "by-groups", **MEASURED, "nll_images": 8},
        "online": {"stage": "train", "tokens": "tokens", "init": "any", "model": {"location": True},
                   "online": {"order": "entropy", "rescore": 0.25}, "train": {**STEPS, "ema": 0.5}},
        "iterate": {"model": "any", "tokens": "tokens", "rounds": 2, "limit": 16, "test_limit": 8,
                    "policy": {"order": "token_likelihood", "location": 1.0, "per_step": 4}, "train": STEPS},
    }
}  # fmt: skip


@pytest.fixture(scope="module")
def experiment(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    path = folder / "tiny.yaml"
    path.write_text(yaml.safe_dump({"out": str(folder / "tiny"), **EXPERIMENT}, sort_keys=False))
    assert cli.main(["run", str(path)]) == 0
    return path, folder / "tiny"


def test_every_stage_leaves_a_manifest(experiment):
    _, out = experiment
    for name in EXPERIMENT["stages"]:
        manifest = read_manifest(out / name)
        assert manifest["seconds"] > 0
        assert manifest["versions"]["torch"] == torch.__version__
        assert set(manifest["files"]) == {
            str(p.relative_to(out / name))
            for p in (out / name).rglob("*")
            if p.suffix in {".npy", ".safetensors", ".json"}
            and p.name != "manifest.json"
            and not p.name.endswith("seconds.npy")
            and "checkpoints" not in p.parts
        }


def test_equal_training_tokens_are_counted_along_the_chain(experiment):
    _, out = experiment
    tokens = 4 * 8 * 16
    assert read_manifest(out / "raster")["training_tokens"] == tokens
    assert read_manifest(out / "ordered")["training_tokens"] == 2 * tokens
    assert read_manifest(out / "ordered")["training_seconds"] > read_manifest(out / "any")["training_seconds"]


def test_a_model_that_starts_anew_counts_the_training_behind_its_orders(experiment):
    _, out = experiment
    assert read_manifest(out / "classes")["training_tokens"] == 2 * 4 * 8 * 16


def test_location_heads_have_a_bound_and_no_likelihood(experiment):
    _, out = experiment
    found = read_json(out / "eval-by-location" / "metrics.json")
    assert found["nll"] is None
    assert found["token_blind"]
    assert found["bound"] == pytest.approx(found["bound_tokens"] + found["bound_location"])
    assert 0 < found["bound_location"] < np.log(16)
    trained = read_manifest(out / "located")
    assert trained["test_bound"] > trained["test_nll"] > 0
    assert trained["train_bound"] > trained["train_nll"] > 0


def test_a_head_that_learns_by_itself_has_a_bound_without_locations(experiment):
    _, out = experiment
    trained = read_manifest(out / "learnt")
    assert trained["test_bound"] > trained["test_nll"] > 0
    assert trained["any_order_nll"] > 0
    logged = (out / "learnt/metrics.jsonl").read_text()
    assert all(f'"{name}"' in logged for name in ("content", "location", "test_nll"))
    assert trained["parameters"] == read_manifest(out / "located")["parameters"]


def test_steps_that_differ_are_counted(experiment):
    _, out = experiment
    found, even = (read_json(out / f"eval-{name}" / "metrics.json") for name in ("adaptive", "drawn"))
    assert 4 <= found["steps_per_image"] < even["steps_per_image"] == 16
    assert load_array(out / "adaptive/steps.npy").mean() == pytest.approx(found["steps_per_image"])
    assert found["nll"] > 0
    assert not found["nll_is_bound"]
    assert "steps/image" in (out / "report.html").read_text()


def test_a_head_is_added_to_a_model_that_has_none(experiment):
    _, out = experiment
    before, after = (load_model(out / name, "transformer") for name in ("any", "located"))
    assert (before.config.location, after.config.location) == (False, True)
    assert after.config.depth == before.config.depth


def test_groups_are_learnt_drawn_and_measured(experiment):
    _, out = experiment
    model = load_model(out / "grouped", "transformer")
    assert model.config.grouped
    assert not load_model(out / "any", "transformer").config.grouped
    found, facts = (
        read_json(out / f"{name}/metrics.json") for name in ("eval-by-groups", "eval-by-location")
    )
    assert found["bound"] == pytest.approx(found["bound_tokens"] + found["bound_location"])
    assert found.keys() == facts.keys()


def test_pictures_while_training_show_the_orders_that_are_trained_on(experiment):
    _, out = experiment
    orders, labels = out / "orders", torch.tensor([2, 0])
    own, of_class = {"orders": orders}, {"orders": orders, "orders_as": "class_mean"}
    shown = [
        TrainStage(tokens=out / "tokens", **settings)._shown_order(labels)
        for settings in (own, of_class, {"order": "halton"})
    ]
    assert shown[0].order == read_manifest(orders)["config"]["policy"]["order"]
    assert torch.equal(shown[1], caches.OrderSet(orders).of_classes(labels))
    assert shown[2] == "halton"


def test_class_orders_are_drawn_and_measured(experiment):
    _, out = experiment
    table = load_array(out / "orders" / "class_order.npy")
    labels, orders = (load_array(out / "by-class" / f"{name}.npy") for name in ("labels", "order"))
    np.testing.assert_array_equal(orders, table[labels])
    assert 0 < read_json(out / "eval-by-class" / "metrics.json")["nll"] < 10


def test_class_orders_rank_positions_by_their_mean_rank():
    orders = np.array([[0, 1, 2], [1, 0, 2], [0, 2, 1], [2, 1, 0]])
    table = class_orders(orders, np.array([0, 0, 0, 2]), 3)
    assert table.tolist() == [[0, 1, 2], [0, 1, 2], [2, 1, 0]], "class 1 has no image: the mean of all"


def test_orders_are_extracted_while_training(experiment):
    _, out = experiment
    orders = load_array(out / "online" / "online" / "round-000.npy")
    seen = orders[:, 0] != np.iinfo(np.uint16).max
    assert seen.sum() == 4 * 8
    trained = read_manifest(out / "online")
    assert trained["extraction_evaluations"] == 4 * 8 * (
        16 + 3 * 4 + 4 * 3 + 4 * 2
    )  # one candidate is not rated
    assert (np.sort(orders[seen], axis=1) == np.arange(16)).all()


def test_rounds_of_extraction_and_fine_tuning_are_recorded(experiment):
    path, out = experiment
    manifest = read_manifest(out / "iterate")
    rounds = manifest["rounds"]
    assert 1 <= len(rounds) <= 2
    assert rounds[0]["policy"] == "entropy"
    assert [facts["random_share"] for facts in rounds] == [0.5, 0.1][: len(rounds)]
    assert manifest["test_bound"] == min(facts["test_bound"] for facts in rounds)
    for facts in rounds:
        assert facts["gap"] == pytest.approx(facts["test_bound"] - facts["train_bound"])
    best = out / f"iterate/round-{manifest['best_round']}/model/model.safetensors"
    assert (out / "iterate" / "model.safetensors").read_bytes() == best.read_bytes()
    assert load_experiment(path).plan()[-1].startswith("up to date")


def test_orders_are_permutations_of_the_images_they_cover(experiment):
    _, out = experiment
    orders = load_array(out / "orders" / "train.order.npy")
    assert orders.shape == (20, 16)
    assert (np.sort(orders, axis=1) == np.arange(16)).all()
    assert len(read_manifest(out / "orders")["position_entropy"]) == 16
    assert (out / "orders" / "mean_rank.png").stat().st_size > 0


def test_samples_do_not_depend_on_the_batch_size(experiment, tmp_path):
    path, _ = experiment
    again = load_experiment(path, ["drawn.batch_size=7", "drawn.bf16=false"]).stages["drawn"][1]
    other = load_experiment(path, ["drawn.batch_size=3", "drawn.bf16=false"]).stages["drawn"][1]
    from anyorder.stages.experiment import execute

    execute("sample", again, tmp_path / "a")
    execute("sample", other, tmp_path / "b")
    for name in ("tokens", "order", "labels"):
        np.testing.assert_array_equal(
            load_array(tmp_path / f"a/{name}.npy"), load_array(tmp_path / f"b/{name}.npy")
        )


def test_compiled_stages_draw_and_order_what_eager_ones_do(experiment, tmp_path, monkeypatch):
    path, out = experiment
    compiled = []

    def compile_decoding(model, asked, images):  # with a backend that needs no C++ compiler
        compiled.append(model)
        compiled_module.compile_decoding(model, asked, images, backend="eager")

    for stage in (pipeline, extract):
        monkeypatch.setattr(stage, "compile_decoding", compile_decoding)
    overrides = ["guided-by-any.compile=true", "orders.compile=true"]
    stages = load_experiment(path, overrides).stages
    for name, arrays in (("guided-by-any", ("tokens", "order")), ("orders", ("train.order", "test.order"))):
        kind, stage = stages[name]
        assert execute(kind, stage, tmp_path / name)
        assert read_manifest(tmp_path / name)["config"]["compile"] is True
        for array in arrays:
            a, b = (load_array(folder / name / f"{array}.npy") for folder in (out, tmp_path))
            assert (a == b).mean() > 0.99  # in the last bits a likely tie may fall the other way
    assert len(compiled) == 3  # drawer and scorer, then the model whose orders they are


def test_peeking_policies_have_no_likelihood(experiment):
    _, out = experiment
    assert read_json(out / "eval-peeking" / "metrics.json")["nll"] is None
    blind = read_json(out / "eval-drawn" / "metrics.json")
    assert 0 < blind["nll"] < 10
    assert blind["bits_per_dim"] == pytest.approx(blind["nll"] * 16 / (3 * 16 * 16 * np.log(2)))
    assert 0 <= blind["consistency"] <= 1


def test_evaluations_keep_what_comparisons_need(experiment):
    _, out = experiment
    evaluation = read_manifest(out / "eval-drawn")
    found, source = evaluation["metrics"], evaluation["inputs"]["samples"]
    kept = FeatureStatistics.load(out / "eval-drawn" / "samples.safetensors", found["extractor"], source)
    assert kept.n == 10
    reference = FeatureStatistics.load(
        out / "features" / "reference.safetensors", found["extractor"], evaluation["inputs"]["data"]
    )
    assert frechet_distance(reference.gaussian, kept.gaussian) == pytest.approx(found["fd"], rel=1e-6)


def test_classes_and_copies_are_measured(experiment):
    _, out = experiment
    found = read_json(out / "eval-drawn" / "metrics.json")
    shares = ("class_coverage", "class_agreement", "class_distance", "nearest_training_share", "token_copies")
    assert all(0 <= found[name] <= 1 for name in (*shares, "token_copies_of_test"))
    assert found["nearest_training_ratio"] > 0


def test_copies_of_training_images_are_found_in_an_evaluation(experiment, tmp_path):
    """Samples whose pixels and tokens are training images, in the place of drawn ones."""
    from anyorder.stages.experiment import execute

    path, out = experiment
    copied = tmp_path / "drawn"
    shutil.copytree(out / "drawn", copied)
    for name, source in (("images", "data/train.images"), ("tokens", "tokens/train.tokens")):
        np.save(copied / f"{name}.npy", np.array(load_array(out / f"{source}.npy")[:10]))
    stage = dataclasses.replace(load_experiment(path).stages["eval-drawn"][1], samples=copied)
    execute("eval", stage, tmp_path / "eval")
    found = read_json(tmp_path / "eval" / "metrics.json")
    assert found["token_copies"] == found["nearest_training_share"] == 1
    assert found["nearest_training_ratio"] < 1e-3
    assert found["notes"][-1].startswith("100 % of drawn are training images, token for token")


def test_features_of_training_images_are_made_where_they_are_missing(experiment, tmp_path):
    """Feature artifacts of older versions have none; their fingerprint stays."""
    from anyorder.data.caches import ImageSet
    from anyorder.stages.features import load_extractor, training_features

    _, out = experiment
    shutil.copytree(out / "features", tmp_path / "features")
    (tmp_path / "features" / "train.safetensors").unlink()
    extractor = load_extractor(tmp_path / "features")
    again = training_features(tmp_path / "features", extractor, ImageSet(out / "data"))
    first = training_features(out / "features", extractor, ImageSet(out / "data"))
    torch.testing.assert_close(again.features, first.features)
    assert again.n == 48


def test_another_feature_network_replaces_the_features_of_the_first(experiment, tmp_path):
    _, out = experiment
    command = ["features", f"data={out}/data", f"out={tmp_path}/f", "channels=8", "train.batch_size=8"]
    for steps in (1, 2):
        assert cli.main([*command, f"train.steps={steps}", "overwrite=true"]) == 0
        name = read_manifest(tmp_path / "f")["extractor"]
        data = read_manifest(out / "data")["fingerprint"]
        assert FeatureStatistics.load(tmp_path / "f" / "train.safetensors", name, data).n == 48


def test_comparisons_hold_differences_with_intervals(experiment, tmp_path, capsys):
    _, out = experiment
    manifest = read_manifest(out / "compare")
    assert (manifest["a"], manifest["b"], manifest["paired"]) == ("eval-guided-by-any", "eval-peeking", True)
    assert set(manifest["metrics"]) == {"distance", "kid", "precision", "recall"}
    distance, own = manifest["metrics"]["distance"], read_json(out / "eval-peeking" / "metrics.json")["fd"]
    assert distance["b"] == pytest.approx(own, rel=1e-6)
    assert distance["low"] < distance["difference"] < distance["high"]
    assert read_json(out / "compare" / "comparison.json") == manifest["metrics"]
    shutil.copytree(out / "eval-drawn", tmp_path / "old")
    (tmp_path / "old" / "samples.safetensors").unlink()
    command = ["compare", f"b={out}/eval-drawn", f"features={out}/features", f"out={tmp_path}/c"]
    assert cli.main([*command, f"a={tmp_path}/old"]) == 2
    assert "run eval again" in capsys.readouterr().err
    assert cli.main([*command, f"a={out}/drawn"]) == 2


# --- what artifacts were made from ---------------------------------------------------------------------


def test_a_moved_run_still_knows_what_its_artifacts_were_made_from(experiment, tmp_path, monkeypatch):
    _, out = experiment
    shutil.copytree(out, tmp_path / "moved")
    monkeypatch.chdir(tmp_path)
    assert read_manifest("moved/drawn")["input_folders"]["model"] == "../ordered"
    command = ["eval", "samples=moved/drawn", "features=moved/features", "nll_images=8", "out=eval"]
    assert cli.main(command) == 0
    assert read_json("eval/metrics.json") == read_json("moved/eval-drawn/metrics.json")
    assert read_manifest("eval")["input_folders"]["data"] == "../moved/data"


def test_what_was_made_from_a_folder_that_is_gone_says_which_setting_to_give(experiment, tmp_path, capsys):
    _, out = experiment
    shutil.copytree(out / "drawn", tmp_path / "drawn")
    command = ["eval", f"samples={tmp_path}/drawn", f"features={out}/features", f"out={tmp_path}/e"]
    assert cli.main(command) == 2
    error = capsys.readouterr().err
    assert f"the model of {tmp_path}/drawn is no longer at {tmp_path}/ordered: give model=FOLDER" in error
    manifest = read_json(tmp_path / "drawn" / "manifest.json")
    del manifest["input_folders"]
    (tmp_path / "drawn" / "manifest.json").write_text(json.dumps(manifest))
    assert cli.main(command) == 2
    assert "does not record the folder of its model: give model=FOLDER" in capsys.readouterr().err
    given = [f"model={out}/ordered", f"tokens={out}/tokens", "nll_images=8"]
    assert cli.main([*command, *given, f"model={out}/any"]) == 2
    assert "was made with model" in capsys.readouterr().err
    assert cli.main([*command, *given]) == 0
    assert read_json(tmp_path / "e" / "metrics.json") == read_json(out / "eval-drawn" / "metrics.json")


def test_a_pipeline_of_samples_generates_as_they_were(experiment, tmp_path):
    _, out = experiment
    assert cli.main(["pipeline", f"samples={out}/guided-by-any", f"out={tmp_path}/p"]) == 0
    pipe = Pipeline.from_pretrained(tmp_path / "p")
    assert pipe.scorer is not None
    assert pipe.policy == PolicyConfig()
    assert cli.main(["pipeline", f"samples={out}/by-class", f"out={tmp_path}/q"]) == 0
    pipe = Pipeline.from_pretrained(tmp_path / "q")
    assert (pipe.policy.order, pipe.sampling) == ("class_mean", Sampling(0.9, top_k=20))
    assert cli.main(["pipeline", f"out={tmp_path}/r"]) == 2


def test_half_a_pipeline_is_its_rounded_weights(experiment, tmp_path):
    _, out = experiment
    for name in ("false", "true"):
        assert cli.main(["pipeline", f"model={out}/any", f"half={name}", f"out={tmp_path}/{name}"]) == 0
    whole, half = (Pipeline.from_pretrained(tmp_path / name) for name in ("false", "true"))
    for role in ("model", "tokenizer"):
        sizes = [(tmp_path / name / role / "model.safetensors").stat().st_size for name in ("false", "true")]
        assert sizes[1] < 0.7 * sizes[0]  # names of tensors and integers stay
        found = getattr(half, role).state_dict()
        for key, tensor in getattr(whole, role).state_dict().items():
            assert found[key].dtype == tensor.dtype
            expected = tensor.half().float() if tensor.is_floating_point() else tensor
            assert torch.equal(found[key], expected)
    assert len(half(num_images=2).images) == 2


def test_evaluations_reproduce_and_keep_times_apart(experiment, tmp_path):
    path, out = experiment
    kind, stage = load_experiment(path).stages["eval-drawn"]
    execute(kind, stage, tmp_path / "again")
    assert fingerprint(tmp_path / "again") == fingerprint(out / "eval-drawn")
    assert not {"seconds_per_image", "training_seconds"} & set(read_json(out / "eval-drawn" / "metrics.json"))
    assert read_manifest(out / "eval-drawn")["metrics"]["seconds_per_image"] > 0


def test_random_orders_give_a_bound_and_inferred_orders_a_likelihood(experiment, tmp_path):
    _, out = experiment
    assert not read_json(out / "eval-drawn" / "metrics.json")["nll_is_bound"]
    command = ["sample", f"model={out}/any", "num_images=8"]
    assert cli.main([*command, "policy.order=random", f"out={tmp_path}/s"]) == 0
    command = ["eval", f"samples={tmp_path}/s", f"features={out}/features", f"out={tmp_path}/e"]
    assert cli.main([*command, "nll_images=8"]) == 0
    assert read_json(tmp_path / "e" / "metrics.json")["nll_is_bound"]


# --- resuming, extending, repeating --------------------------------------------------------------------


def test_log_settings_leave_a_finished_run_up_to_date(experiment):
    path, _ = experiment
    changed = [
        f"{name}.train.{setting}"
        for name in ("any", "tokenizer", "features", "iterate")
        for setting in ("log_every=1", "save_every=3", "keep=3", "tensorboard=true", "eval_every=3")
    ]
    plan = load_experiment(path, [*changed, "any.train.sample_every=2"]).plan()
    assert all(line.startswith("up to date") for line in plan)
    with_patience = ["any.train.patience=9", "any.train.eval_every=3"]
    assert not load_experiment(path, with_patience).plan()[5].startswith("up to date")


def test_more_steps_extend_a_finished_run_and_fewer_are_refused(experiment, tmp_path, capsys, caplog):
    _, out = experiment
    command = ["train", f"tokens={out}/tokens", "model.width=32", "model.heads=2", "model.depth=1"]
    command += ["train.batch_size=8", "train.eval_every=0", f"out={tmp_path}/m"]
    assert cli.main([*command, "train.steps=3"]) == 0
    first = fingerprint(tmp_path / "m")
    with caplog.at_level("INFO", "anyorder"):
        assert cli.main([*command, "train.steps=5", "train.log_every=1"]) == 0
    assert "extended from 3 to 5 steps" in caplog.text
    manifest = read_manifest(tmp_path / "m")
    assert (manifest["steps"], manifest["config"]["train"]["steps"]) == (5, 5)
    assert manifest["training_tokens"] == 5 * 8 * 16
    assert manifest["fingerprint"] != first
    steps = [json.loads(line)["step"] for line in (tmp_path / "m/metrics.jsonl").read_text().splitlines()]
    assert steps == [3, 4, 5]
    capsys.readouterr()
    assert cli.main([*command, "train.steps=4"]) == 2
    assert "train.steps=4, but 5 are done already" in capsys.readouterr().err
    assert read_manifest(tmp_path / "m") == manifest


@pytest.mark.parametrize("stage", ["tokenizer", "features"])
def test_tokenizers_and_classifiers_start_from_another_one(experiment, tmp_path, stage):
    _, out = experiment
    command = [stage, f"data={out}/data", f"init={out}/{stage}", "train.steps=1", "train.learning_rate=1e-9"]
    command += ["train.batch_size=8", f"out={tmp_path}/x"]
    assert cli.main([*command, *(["channels=8,16"] if stage == "features" else [])]) == 0
    kind = "vq" if stage == "tokenizer" else "classifier"
    before, after = (load_model(folder, kind) for folder in (out / stage, tmp_path / "x"))
    for (name, a), b in zip(before.named_parameters(), after.parameters(), strict=True):
        if "embedding" not in name:  # the codebook follows moving averages, not the learning rate
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_another_seed_repeats_what_is_random_in_models_and_samples(experiment):
    path, _ = experiment
    first, second = load_experiment(path).stages, load_experiment(path, ["seed=2", "out=x"]).stages
    for name in ("data", "tokenizer", "features", "compare"):
        assert dataclasses.replace(first[name][1], **inputs_of(second[name][1])) == second[name][1], name
    assert (second["any"][1].train.seed, second["iterate"][1].train.seed) == (2, 2)
    assert (second["drawn"][1].seed, second["orders"][1].seed) == (200_000, 0), "these orders have no noise"
    noisy = load_experiment(path, ["seed=2", "orders.policy.temperature=1"]).stages["orders"][1]
    assert noisy.seed == 200_000
    assert second["ordered"][1].init == Path("x/any")
    for wrong in ("seed=-1", "seed=1.5", "seed=x"):
        with pytest.raises(ValueError, match="seed must be an integer >= 0"):
            load_experiment(path, [wrong])


def test_a_dry_run_lists_all_stages_where_the_images_are_gone(tmp_path, capsys):
    def planned():
        assert cli.main(["run", str(path), "--dry-run"]) == 0
        return [line.split("  ")[0].strip() for line in capsys.readouterr().out.splitlines()]

    path, images = tmp_path / "x.yaml", tmp_path / "images"
    path.write_text(
        f"out: {tmp_path}/out\n"
        f"stages: {{data: {{source: {images}, size: [16, 16]}}, tokenizer: {{data: data}}}}"
    )
    assert planned() == ["to run", "to run"]
    images.mkdir()
    for i in range(3):
        Image.new("RGB", (16, 16), (i, 0, 0)).save(images / f"{i}.png")
    execute("data", load_experiment(path).stages["data"][1], tmp_path / "out" / "data")
    assert planned() == ["up to date", "to run"]
    shutil.rmtree(images)
    assert planned() == ["to run", "to run"]


def inputs_of(stage):
    return {role: getattr(stage, role) for role in stage.inputs}


def test_orders_are_extracted_in_float32_unless_asked(experiment, tmp_path, monkeypatch):
    assert not OrdersStage(Path("m"), Path("t")).bf16
    _, out = experiment
    monkeypatch.setattr("anyorder.inference.device.native_bf16", lambda device: True)
    command = ["orders", f"model={out}/any", f"tokens={out}/tokens", "limit=20", f"out={tmp_path}/o"]
    assert cli.main(command) == 0
    for name in ("train.order", "test.order"):
        np.testing.assert_array_equal(
            load_array(tmp_path / "o" / f"{name}.npy"), load_array(out / "orders" / f"{name}.npy")
        )


def test_inferred_orders_are_rated_in_float32(experiment, tmp_path, monkeypatch):
    path, out = experiment
    monkeypatch.setattr("anyorder.inference.device.native_bf16", lambda device: True)
    stages = load_experiment(path).stages
    for name, same in (("drawn", ("tokens", "order")), ("guided-by-any", ())):
        execute("sample", stages[name][1], tmp_path / name)
        for array in same:
            a, b = (load_array(folder / name / f"{array}.npy") for folder in (out, tmp_path))
            np.testing.assert_array_equal(a, b)
    tokens = TokenSet(out / "tokens", "test")
    for order, scorer, dtypes in (
        ("margin", None, (torch.float32, None)),
        ("margin", out / "any", (torch.bfloat16, torch.float32)),
        ("raster", None, (torch.bfloat16, None)),
    ):
        stage = SampleStage(
            model=out / "ordered", tokenizer=out / "tokenizer", scorer=scorer, policy=PolicyConfig(order)
        )
        pipe = stage.load_pipeline(tokens, bf16=True)
        found = tuple(
            next(m.parameters()).dtype if m is not None else None for m in (pipe.model, pipe.scorer)
        )
        assert found == dtypes, order


@pytest.mark.parametrize("n", [1, 2, 5])
def test_tiny_test_splits(tmp_path, n):
    """One test image, say of 30, is enough for all but distances; no NaN in any JSON."""
    settings = {
        name: dict(EXPERIMENT["stages"][name]) for name in ("data", "tokenizer", "tokens", "any", "orders")
    }
    settings["data"] |= {"max_train": 29, "max_test": n}
    (tmp_path / "x.yaml").write_text(
        yaml.safe_dump({"out": str(tmp_path), "stages": settings}, sort_keys=False)
    )
    assert cli.main(["run", str(tmp_path / "x.yaml")]) == 0
    for path in tmp_path.rglob("*.json*"):
        assert not {"NaN", "Infinity"} & set(path.read_text().replace(",", " ").replace(":", " ").split()), (
            path
        )
    code = cli.main(["features", f"data={tmp_path}/data", f"out={tmp_path}/f", "channels=8", "train.steps=1"])
    assert code == (2 if n < 2 else 0)


# --- running again --------------------------------------------------------------------------------------


def test_second_run_does_nothing_and_a_change_runs_what_depends_on_it(experiment, capsys):
    path, out = experiment
    before = {name: (out / name / "manifest.json").stat().st_mtime_ns for name in EXPERIMENT["stages"]}
    assert cli.main(["run", str(path)]) == 0
    assert before == {name: (out / name / "manifest.json").stat().st_mtime_ns for name in before}
    capsys.readouterr()
    assert cli.main(["run", str(path), "orders.limit=10", "--dry-run"]) == 0
    plan = dict(reversed(line.rsplit(None, 1)) for line in capsys.readouterr().out.splitlines())
    status = {name: plan[str(out / name)].startswith("to run") for name in before}
    assert [name for name, to_run in status.items() if to_run] == [
        "orders", "ordered", "drawn", "peeking", "guided-by-any", "eval-guided-by-any", "eval-drawn",
        "eval-peeking", "compare", "pipeline", "orders-shrunk", "by-shrunk", "eval-by-shrunk",
        "pipeline-shrunk", "located", "learnt", "by-location", "eval-by-location", "classes", "by-class",
        "eval-by-class", "grouped", "by-groups", "eval-by-groups",
    ]  # fmt: skip


def test_a_scorer_of_its_own_is_part_of_the_evidence(experiment, tmp_path):
    _, out = experiment
    found = read_json(out / "eval-guided-by-any" / "metrics.json")
    assert found["scorer"] == "any"
    assert found["nll"] != read_json(out / "eval-drawn" / "metrics.json")["nll"]
    assert "entropy by any" in (out / "report.html").read_text()
    parts = [f"{role}={out / role}" for role in ("features", "data", "tokens")]
    command = ["eval", f"samples={out}/guided-by-any", f"model={out}/ordered", *parts, f"out={tmp_path}/e"]
    assert cli.main([*command, f"scorer={out}/ordered"]) == 2
    assert read_manifest(out / "eval-guided-by-any")["inputs"]["scorer"] == fingerprint(out / "any")


def test_report_is_one_page_with_the_comparison(experiment, tmp_path):
    _, out = experiment
    page = (out / "report.html").read_text()
    assert "token_likelihood" in page
    assert "data:image/webp" in page
    floor = read_manifest(out / "features")["floor"]
    assert floor.keys() == {"fd", "kid", "precision", "recall"}
    assert 0 <= floor["fd"] < min(read_json(p)["fd"] for p in out.glob("eval-*/metrics.json"))
    assert "not measured" not in page
    assert cli.main(["report", str(out), f"out={tmp_path}/r.html", "data_images=false"]) == 0
    without = (tmp_path / "r.html").read_text()
    assert "what the tokens keep" in page
    assert "what the tokens keep" not in without
    for _ in range(2):  # its own files are written again
        assert cli.main(["report", str(out), f"out={tmp_path}/r.md", "--csv", "--latex"]) == 0
    (tmp_path / "mine.csv").write_text("mine")
    assert cli.main(["report", str(out), f"out={tmp_path}/mine.md", "--csv"]) == 2
    assert (tmp_path / "mine.csv").read_text() == "mine"
    assert not (tmp_path / "mine.md").exists()
    rows = list(csv.DictReader((tmp_path / "r.csv").open()))
    assert all(row["metric"] for row in rows)
    assert {row["samples"] for row in rows} >= {"drawn", "peeking"}
    assert (tmp_path / "r.tex").read_text().count("\\toprule") >= 2
    assert "| token_likelihood |" in (tmp_path / "r.md").read_text()
    with pytest.raises(FileNotFoundError, match="no finished artifact"):
        report([tmp_path / "nothing"], tmp_path / "r.html")


def test_artifacts_that_do_not_belong_together_are_refused(experiment, tmp_path):
    path, out = experiment
    other = load_experiment(path, ["data.seed=1", f"out={tmp_path}/other"])
    for name in ("data", "tokenizer", "tokens"):
        kind, stage = other.stages[name]
        from anyorder.stages.experiment import execute

        execute(kind, stage, tmp_path / "other" / name)
    mixed = [f"tokens={tmp_path}/other/tokens", f"out={tmp_path}/mixed"]
    assert cli.main(["orders", f"model={out}/any", *mixed]) == 2
    assert cli.main(["train", f"init={out}/any", *mixed]) == 2
    assert cli.main(["train", f"orders={out}/orders", *mixed]) == 2
    assert cli.main(["sample", f"model={out}/any", f"tokenizer={out}/tokenizer", *mixed]) == 2


@pytest.mark.parametrize(
    ("stage", "settings", "message"),
    [
        (TrainStage, {"tokens": "t", "order": "rastr"}, "order must be"),
        (TrainStage, {"tokens": "t", "orders": "o", "order": "raster"}, "either"),
        (TrainStage, {"tokens": "t", "random_share": 0.5}, "all orders are random"),
        (TrainStage, {"tokens": "t", "model": {"location": True}}, "needs orders to learn"),
        (TrainStage, {"tokens": "t", "orders": "o", "jitter": -1}, "jitter must be >= 0"),
        (TrainStage, {"tokens": "t", "orders": "o", "online": {"order": "entropy"}}, "extracts the orders"),
        (TrainStage, {"tokens": "t", "online": {"order": "raster"}}, "must be an inferred order"),
        (TrainStage, {"tokens": "t", "online": {"order": "entropy"}}, "give train.ema"),
        (
            TrainStage,
            {"tokens": "t", "order": "raster", "model": {"location": True}, "train": {"compile": True}},
            "train.compile covers",
        ),
        (TrainStage, {"tokens": "t", "groups": [4], "train": {"compile": True}}, "train.compile covers"),
        (TrainStage, {"tokens": "t", "groups": [4, 0]}, "numbers of steps >= 1"),
        (TrainStage, {"tokens": "t", "groups_schedule": "cosine"}, "goes with it"),
        (TrainStage, {"tokens": "t", "train": {"patience": 1, "eval_every": 0}}, "patience needs"),
        (IterateStage, {"model": "m", "tokens": "t", "random_floor": 0.9}, "random_floor"),
        (IterateStage, {"model": "m", "tokens": "t", "rounds": 0}, "rounds must be >= 1, got 0"),
        (TrainStage, {"tokens": "t", "order": "raster", "random_share": 1.5}, "random_share"),
        (TrainStage, {"tokens": "t", "order": "raster", "random_share_ramp": (0.2, 0.8)}, "give both"),
        (
            TrainStage,
            {"tokens": "t", "order": "raster", "random_share_end": 1, "random_share_ramp": (0.8, 0.2)},
            "two shares of the steps",
        ),
        (TrainStage, {"tokens": "t", "init": "m", "model": {"depth": 3}}, "its architecture"),
        (TrainStage, {"tokens": "t", "init_share": 0.5}, "init_share must lie in"),
        (TrainStage, {"tokens": "t", "init": "m", "init_share": 1.0}, "got 1.0"),
        (TrainStage, {"tokens": "t", "init": "m", "lora": 2, "init_share": 0.5}, "without lora"),
        (TrainStage, {"tokens": "t", "tokenizer": "v"}, "train.sample_every"),
        (TrainStage, {"tokens": "t", "orders_as": "class_mean"}, "give orders=FOLDER"),
        (TrainStage, {"tokens": "t", "online_every": 2}, "goes with online"),
        (TrainStage, {"tokens": "t", "train": {"patience": 1, "watch": "test_bound"}}, "is not evaluated"),
        (TokenizerStage, {"data": "d", "train": {"patience": 1}}, "one of validation_psnr, validation_ssim"),
        (FeaturesStage, {"data": "d", "train": {"patience": 1}}, "choose one of test_accuracy"),
        (FeaturesStage, {"data": "d", "init": "f", "extractor": "inception"}, "for a classifier"),
        (FeaturesStage, {"data": "d", "extractor": "resnet"}, "efficientnet-lite0, inception, timm:NAME or"),
        (FeaturesStage, {"data": "d", "max_train": 3}, "max_train must be at least 4, got 3"),
        (TokenizerStage, {"data": "d", "init": "t", "model": {"channels": 16}}, "its architecture"),
        (TrainStage, {"tokens": "t", "model": {"width": 10}}, "multiple"),
        (CompareStage, {"a": "a", "b": "b", "features": "f", "resamples": 10}, ">= 200"),
        (CompareStage, {"a": "a", "b": "b", "features": "f", "confidence": 95}, "confidence must lie"),
        (OrdersStage, {"tokens": "t", "model": "m", "policy": {"order": "raster"}}, "policy.order"),
        (OrdersStage, {"tokens": "t", "model": "m", "orders": "o"}, "class_weight > 0: give both"),
        (OrdersStage, {"tokens": "t", "model": "m", "policy": {"class_weight": 1}}, "give both"),
        (
            OrdersStage,
            {"tokens": "t", "model": "m", "policy": {"ordr": "entropy"}},
            "did you mean policy.order",
        ),
    ],
)
def test_bad_settings_are_refused_with_the_reason(stage, settings, message):
    with pytest.raises(ValueError, match=message):
        parse(stage, settings)


def test_policies_of_fixed_orders_take_no_score_settings():
    with pytest.raises(ValueError, match="belong to inferred orders"):
        PolicyConfig(order="raster", temperature=1.0)
    with pytest.raises(ValueError, match="unknown order"):
        PolicyConfig(order="rastr")
    assert PolicyConfig(order="margin", sign=-1, distance=0.5).label == "margin, sign -1, distance 0.5"


# --- experiment files and the command line -----------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "overrides", "message"),
    [
        ("stages: {dat: {}}", [], "did you mean 'data'"),
        ("stags: {}", [], "did you mean 'stages'"),
        ("stages: {data: {sorce: x}}", [], "did you mean source"),
        ("stages: {data: {}}", ["dta.seed=1"], "did you mean 'data'"),
        ("stages: {data: {}}", ["data.seed=x"], "expected int"),
        ("stages: {tokens: {data: data}}", [], "required"),
        ("", [], "has no stages"),
        ("out: [a]\nstages: {data: {}}", [], r"out must be the name of a folder, got \['a'\]"),
        ("out: false\nstages: {data: {}}", [], "out must be the name of a folder, got False"),
        ("stages: {'': {stage: data}}", [], "a stage cannot be called ''"),
        ('stages: {"a\\0b": {stage: data}}', [], "a stage cannot be called"),
        ("stages: {data: {max_test: 0}}", [], "max_test must be >= 1, got 0"),
    ],
)
def test_unknown_names_get_a_suggestion(tmp_path, text, overrides, message, capsys):
    path = tmp_path / "x.yaml"
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        load_experiment(path, overrides)
    assert cli.main(["run", str(path), *overrides]) == 2
    assert "error" in capsys.readouterr().err


def test_overrides_name_earlier_stages_as_the_file_does(tmp_path, monkeypatch):
    """Whatever lies in the current folder under that name."""
    stages = {
        "data": {}, "any-order": {"stage": "train", "tokens": "here"},
        "samples": {"stage": "sample", "model": "elsewhere"},
        "any": {"stage": "train", "tokens": "here"}, "any.0.5": {"stage": "train", "tokens": "here"},
    }  # fmt: skip
    (tmp_path / "x.yaml").write_text(yaml.safe_dump({"out": "runs/x", "stages": stages}))
    (tmp_path / "any-order").mkdir()
    monkeypatch.chdir(tmp_path)
    overrides = as_overrides(["samples.model=any-order", "--any-order.train.batch-size", "5"])
    found = load_experiment("x.yaml", overrides).stages
    assert found["samples"][1].model == Path("runs/x/any-order")
    assert found["any-order"][1].train.batch_size == 5
    found = load_experiment("x.yaml", ["any.0.5.train.steps=3", "any.train.steps=4"]).stages
    assert [found[name][1].train.steps for name in ("any.0.5", "any")] == [3, 4]
    with pytest.raises(ValueError, match="out= is empty: say where to write"):
        load_experiment("x.yaml", ["out="])


def test_reports_name_what_is_out_of_date(experiment, tmp_path, capsys):
    run = tmp_path / "run"
    shutil.copytree(experiment[1], run)
    said = []
    for _ in range(2):
        assert cli.main(["report", str(run), f"out={tmp_path}/r.md"]) == 0
        said.append(capsys.readouterr().out)
        manifest = json.loads((run / "any/manifest.json").read_text())
        (run / "any/manifest.json").write_text(json.dumps(manifest | {"fingerprint": "another"}))
    assert "out of date" not in said[0]
    assert f"out of date, as anyorder ls says: {run}/" in said[1]


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        ([], 2, "usage"),
        (["--help"], 0, "quickstart"),
        (["--version"], 0, "anyorder 0."),
        (["trian"], 2, "did you mean 'train'"),
        (["train", "--fast"], 2, "unknown option --fast"),
        (["train", "steps=3"], 2, "out=FOLDER"),
        (["train", "out=x", "tokens=nowhere", "--dry-run"], 0, "tokens: nowhere"),
        (["features", "train", "out=x", "data=nowhere", "--dry-run"], 0, "extractor: classifier"),
        (["tokens", "out=x", "data=nowhere", "tokenizer=nowhere"], 2, "not a finished artifact"),
        (["data", "--help"], 0, "source="),
        (["run"], 2, "give an experiment file"),
        (["run", "--help"], 0, "anyorder run"),
        (["run", "nowhere.yaml"], 2, "nowhere.yaml"),
        (["quickstart", "--dry-run", "out=nowhere"], 0, "to run"),
        (["quickstart", "--help"], 0, "out=runs/quickstart"),
        (["report"], 2, "run folders"),
        (["report", "nowhere"], 2, "no finished artifact"),
        (["report", "x", "colour=red"], 2, "data_images"),
        (["report", "x", "out=x.yaml"], 2, "out=x.yaml must end with one of .html, .md, .tex, .json, .csv"),
        (["report", "runs/lr=0.1"], 2, "runs/lr=0.1 holds no finished artifact"),
        (["report", "x", "--dry-run"], 0, "report of x"),
        (["report", "--help"], 0, "RUN"),
        (["bench", "--help"], 0, "batch_size"),
        (["bench", "--dry-run"], 0, "repeats: 5"),
        (["bench", "repeats=0"], 2, "must be >= 1"),
    ],
)
def test_command_line(arguments, code, said, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert cli.main(arguments) == code
    captured = capsys.readouterr()
    assert said in captured.out + captured.err


def test_exit_codes_of_a_full_disk_and_of_ctrl_c(tmp_path, monkeypatch, capsys):
    def stop(error):
        def run(*_):
            raise error

        return run

    full = OSError(28, "No space left on device", "x.npy")
    monkeypatch.setattr(cli.commands, "quickstart", stop(full))
    assert cli.main(["quickstart"]) == 1
    assert "free some space" in capsys.readouterr().err
    monkeypatch.setattr(cli.commands, "quickstart", stop(KeyboardInterrupt()))
    assert cli.main(["quickstart"]) == 130
    monkeypatch.setattr(cli.commands, "quickstart", stop(ValueError("bad")))
    with pytest.raises(ValueError, match="bad"):
        cli.main(["quickstart", "--traceback"])


def test_stage_help_lists_every_setting(capsys):
    for name in STAGES:
        assert cli.main([name, "--help-all"]) == 0
        text = capsys.readouterr().out
        fields = [field.name for field in dataclasses.fields(STAGES[name])]
        assert all(f"{field}=" in text or f"{field}." in text for field in fields)


def test_help_is_dedented_and_begins_with_what_matters(capsys):
    assert cli.main(["sample", "--help-all"]) == 0
    text = capsys.readouterr().out
    assert "\n       anyorder sample model=FOLDER" in text
    assert "\norders.png shows when" in text
    assert text.index("policy.order=") < text.index("policy.per_step=")
    assert not [line for line in text.splitlines() if "  " in line.strip() and "=" not in line]


def test_older_configurations_are_completed_with_defaults():
    now = TrainStage(tokens=Path("t"), online=PolicyConfig("entropy"), train=TrainConfig(ema=0.9))
    told, _, completion = split(now)
    then = {key: value for key, value in told.items() if key not in ("online", "jitter")}
    then["train"] = {key: value for key, value in told["train"].items() if key != "patience"}
    found = completion(then)
    assert (found["jitter"], found["train.patience"], found["train.ema"]) == (0.0, 0, 0.9)
    assert found["online"] is None, "what did not exist was off, whatever is asked for now"
    assert {"tokenizer", "train.log_every"} <= {*now.aside}
    assert found.keys() == flatten(told | {"online": None}).keys() - {*now.aside}


# --- the Python interface ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pipe(experiment):
    return Pipeline.from_pretrained(experiment[1] / "pipeline")


def test_pipeline_draws_what_it_says(pipe):
    out = pipe(class_labels=["red", 1], guidance_scale=2.0, generator=3)
    assert [image.size for image in out.images] == [(16, 16)] * 2
    assert out.order.sort(1).values.tolist() == [list(range(16))] * 2
    assert out.tokens.shape == out.log_prob.shape == (2, 16)
    assert (out.log_prob <= 0).all()


@pytest.mark.parametrize(
    "order", ["raster", "random", "margin", torch.arange(16).flip(0), PolicyConfig("max_prob")]
)
def test_pipeline_takes_any_order(pipe, order):
    out = pipe(num_images=2, order=order, generator=[7, 8])
    alone = pipe(num_images=1, order=order, generator=8)
    assert torch.equal(out.tokens[1:], alone.tokens)
    if isinstance(order, torch.Tensor):
        assert torch.equal(out.order, order.expand(2, -1))


def test_pipeline_draws_on_other_grids(pipe):
    out = pipe(num_images=1, grid=(3, 5), order="hilbert")
    assert out.images[0].size == (20, 12)
    assert pipe(num_images=1, grid=Grid(2, 2)).tokens.shape == (1, 4)


def test_pipeline_draws_with_compiled_code(pipe, monkeypatch):
    eager = pipe(num_images=2, generator=3)
    compile_decoding = partial(compiled_module.compile_decoding, backend="eager")
    monkeypatch.setattr(pipeline, "compile_decoding", compile_decoding)
    try:
        assert pipe.compile_decoding() is pipe
        assert pipe.model.compiled is not None
        assert pipe.scorer.compiled is not None
        compiled = pipe(num_images=2, generator=3)
    finally:
        pipe.model.compiled = pipe.scorer.compiled = None
    assert torch.equal(compiled.tokens, eager.tokens)
    assert torch.equal(compiled.order, eager.order)


def test_pipeline_streams_its_steps(pipe):
    steps = list(pipe.stream(num_images=2, generator=torch.Generator().manual_seed(0)))
    assert [step.index for step in steps] == list(range(16))
    assert {step.total for step in steps} == {16}


def test_pipeline_scores_with_its_scorer(pipe):
    tokens = pipe(num_images=2).tokens
    alone = Pipeline(pipe.model, pipe.tokenizer, pipe.classes)
    assert not torch.equal(pipe(num_images=2).order, alone(num_images=2).order)
    order = extract_orders(pipe.scorer, tokens, "entropy").order
    assert torch.equal(pipe(num_images=2).order, order)
    peeking = {"num_images": 2, "order": "token_likelihood"}
    assert torch.equal(pipe(**peeking).tokens, alone(**peeking).tokens)


def test_pipeline_round_trip(pipe, tmp_path):
    pipe.save_pretrained(tmp_path / "p")
    again = Pipeline.from_pretrained(tmp_path / "p")
    assert again.classes == pipe.classes
    assert again.policy == pipe.policy
    assert again.scorer is not None
    assert torch.equal(again(num_images=2).tokens, pipe(num_images=2).tokens)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        ({"class_labels": "purple"}, "unknown class"),
        ({"class_labels": 99}, "lie in"),
        ({"num_images": 0}, "num_images"),
        ({"num_images": 2, "generator": [1]}, "1 seeds for 2"),
        ({"order": "rastr"}, "unknown order"),
        ({"guidance_scale": 2.0}, "guidance needs class labels"),
    ],
)
def test_pipeline_refuses_bad_input(pipe, call, message):
    with pytest.raises(ValueError, match=message):
        pipe(**call)


def test_damaged_pipelines_are_named(pipe, tmp_path, monkeypatch):
    with pytest.raises(FileNotFoundError, match="no pipeline folder"):
        Pipeline.from_pretrained(tmp_path)
    pipe.save_pretrained(tmp_path / "p")
    index = tmp_path / "p" / "pipeline.json"
    index.write_text(index.read_text().replace('"format": 1', '"format": 9'))
    with pytest.raises(ValueError, match="format 9"):
        Pipeline.from_pretrained(tmp_path / "p")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(FileNotFoundError, match="neither a folder nor a hub id"):
        Pipeline.from_pretrained("nobody/nothing at all")
    with pytest.raises(FileNotFoundError, match="a folder, did you mean 'fashion32'"):
        Pipeline.from_pretrained("fashion3")
    with pytest.raises(ValueError, match="16"):
        Pipeline(pipe.model, type("T", (), {"vocab_size": 17})())


def test_push_to_hub_uploads_the_folder(pipe, monkeypatch):
    seen = {}

    class Api:
        def __init__(self, token):
            seen["token"] = token

        def create_repo(self, repo_id, private, exist_ok):
            seen["repo"] = (repo_id, private, exist_ok)

        def upload_folder(self, repo_id, folder_path, delete_patterns):
            assert delete_patterns == ["class_order.npy"]
            seen["files"] = sorted(p.name for p in __import__("pathlib").Path(folder_path).rglob("*.*"))
            return "address"

    monkeypatch.setattr("huggingface_hub.HfApi", Api)
    assert pipe.push_to_hub("me/sunsets", token="t", private=True) == "address"
    assert seen["repo"] == ("me/sunsets", True, True)
    assert seen["files"].count("model.safetensors") == 3


def test_killed_stages_go_on_after_their_last_batch(experiment, tmp_path):
    """Orders, samples and tokens keep the rows on disk: here the files as a kill would leave them."""
    from anyorder.stages.experiment import execute

    path, _ = experiment
    stage = load_experiment(path).stages["orders"][1]
    execute("orders", stage, tmp_path / "o")
    whole = load_array(tmp_path / "o" / "train.order.npy")
    killed = tmp_path / "killed"
    shutil.copytree(tmp_path / "o", killed)
    manifest = read_json(killed / "manifest.json")
    identity = {key: manifest[key] for key in ("stage", "config", "inputs")}
    (killed / ".identity.json").write_text(json.dumps(identity))
    (killed / "manifest.json").unlink()
    for name in ("order", "log_prob", "seconds"):  # 13 whole rows and a torn one
        array = np.load(killed / f"train.{name}.npy")
        (killed / f"train.{name}.npy").unlink()
        rows = array.tobytes()[: 13 * array[0].nbytes + 1]
        (killed / f"train.{name}.npy.partial").write_bytes(b"\0" * 128 + rows)
    execute("orders", stage, killed)
    np.testing.assert_array_equal(load_array(killed / "train.order.npy"), whole)


def test_the_batch_size_makes_no_orders_stale(experiment):
    path, out = experiment
    stage = load_experiment(path).stages["orders"][1]
    for size in (None, 5):
        settings, inputs, completion = split(dataclasses.replace(stage, batch_size=size))
        assert Artifact.is_current(out / "orders", "orders", settings, inputs, completion)


def test_a_run_goes_on_with_the_batch_size_it_began_with(experiment, tmp_path, monkeypatch):
    """However much memory is free by then; what it was made with is recorded."""
    path, out = experiment
    stage = dataclasses.replace(load_experiment(path).stages["orders"][1], batch_size=None)
    monkeypatch.setattr(extract, "images_at_once", lambda *_: 8)
    append = RowWriter.append

    def killed(self, **arrays):
        if self.rows:
            raise KeyboardInterrupt
        append(self, **arrays)

    monkeypatch.setattr(RowWriter, "append", killed)
    with pytest.raises(KeyboardInterrupt):
        execute("orders", stage, tmp_path / "orders")
    part = tmp_path / "orders/train.order.npy.partial"
    part.write_bytes(part.read_bytes()[:-3])  # a torn row: the whole batch is computed again
    monkeypatch.setattr(extract, "images_at_once", lambda *_: 3)
    seen = []
    monkeypatch.setattr(
        RowWriter, "append", lambda self, **a: seen.append(len(a[min(a)])) or append(self, **a)
    )
    assert execute("orders", stage, tmp_path / "orders")
    assert seen[:3] == [8, 8, 4]
    manifest = read_manifest(tmp_path / "orders")
    assert manifest["batch_sizes"] == [8]
    assert manifest["fingerprint"] == fingerprint(out / "orders")
    other = dataclasses.replace(stage, batch_size=5)
    assert other._batch_sizes(tmp_path / "orders/batch_size.txt", None, None) == [8, 5]


def test_images_at_once_follow_the_free_memory(monkeypatch):
    model = transformer(depth=2, width=16)
    each = 4 * 2 * 6 * 16 * 4
    for free, images in ((0, 1), (2 * 5 * each, 4), (2 * 8 * each, 8), (2**40, 64)):
        monkeypatch.setattr(device, "free_memory", lambda device, free=free: free)
        assert device.images_at_once(model, Grid(2, 3)) == images
    monkeypatch.setattr(device, "free_memory", lambda device: 2 * 8 * each)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert device.images_at_once(model, Grid(2, 3)) == 2
    monkeypatch.undo()
    assert device.free_memory(torch.device("cpu")) > 2**20


def test_the_share_of_random_orders_follows_its_ramp():
    settings = {"order": "raster", "random_share": 1, "random_share_end": 0.2, "train": {"steps": 101}}
    stage = parse(TrainStage, {"tokens": "t", **settings, "random_share_ramp": (0.25, 0.75)})
    shares = [stage._random_share(step) for step in (1, 26, 51, 76, 101)]
    assert shares == pytest.approx([1, 1, 0.6, 0.2, 0.2])


def test_the_average_of_the_first_and_the_trained_weights_is_written_and_measured(experiment, tmp_path):
    _, out = experiment
    few = ["train.steps=3", "train.batch_size=4", "train.learning_rate=0.01", f"init={out}/any"]
    for share in (0.0, 0.25):
        command = ["train", f"tokens={out}/tokens", *few, f"init_share={share}", f"out={tmp_path}/{share}"]
        assert cli.main(command) == 0
    first, trained, written = (
        load_model(folder) for folder in (out / "any", tmp_path / "0.0", tmp_path / "0.25")
    )
    for one, other, both in zip(*(model.parameters() for model in (first, trained, written)), strict=True):
        torch.testing.assert_close(both, one * 0.25 + other * 0.75)
    test = TokenSet(out / "tokens", "test")
    orders = random_orders(len(test), test.grid, torch.Generator().manual_seed(0))
    nll = image_nll(written, *test.batch(np.arange(len(test))), orders)["nll"].mean()
    assert read_manifest(tmp_path / "0.25")["test_nll"] == pytest.approx(float(nll), abs=1e-5)


def test_the_orders_of_some_images_are_of_all_classes(experiment):
    """Folders come class by class: the first images would be of the first classes."""
    _, out = experiment
    tokens, cache = TokenSet(out / "tokens"), caches.OrderSet(out / "orders")
    assert list(cache.rows[[0, -1]]) == [0, len(tokens) - 1]
    assert len(set(cache.rows.tolist())) == len(cache) == 20
    labels = tokens.labels[cache.rows]
    assert np.array_equal(class_orders(np.int64(cache.orders), labels, 4), cache.class_orders)
    batch, condition = tokens.batch(cache.rows[:8])
    streams = Streams(cache.rows[:8].tolist())
    found = extract_orders(load_model(out / "any"), batch, "entropy", streams, condition=condition)
    assert torch.equal(found.order, cache.batch(range(8)))


def test_a_bound_is_measured_on_the_images_of_its_likelihood(experiment, tmp_path, monkeypatch):
    _, out = experiment
    monkeypatch.setattr("anyorder.stages.train.MEASURED", 5)
    few = ["order=raster", "model.location=true", "model.depth=1", "model.width=32", "model.heads=2"]
    steps = ["train.steps=2", "train.batch_size=4"]
    assert cli.main(["train", f"tokens={out}/tokens", *few, *steps, f"out={tmp_path}/m"]) == 0
    test, model = TokenSet(out / "tokens", "test"), load_model(tmp_path / "m")
    order = torch.arange(16).expand(len(test), -1)
    found = image_nll(model, *test.batch(np.arange(len(test))), order, location=True)
    manifest = read_manifest(tmp_path / "m")
    for name in ("nll", "bound"):
        assert manifest[f"test_{name}"] == pytest.approx(float(found[name].mean()), abs=1e-5)


def test_training_behind_a_pipeline_is_counted(experiment):
    _, out = experiment
    before, after = read_manifest(out / "ordered"), read_manifest(out / "pipeline")
    assert after["training_tokens"] == before["training_tokens"] > 0


def test_orders_of_a_version_with_shards_are_up_to_date(experiment):
    path, out = experiment
    stage = load_experiment(path).stages["orders"][1]
    then = {**read_manifest(out / "orders")["config"], "shards": 1}
    assert split(stage)[2](then) == split(stage)[2](split(stage)[0])
