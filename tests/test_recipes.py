"""Every recipe is a valid experiment, its costs can be planned, and it runs end to end at toy size."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from anyorder.adapters.arpg import ARPG
from anyorder.adapters.layers import GPTConfig
from anyorder.adapters.randar import RandAR
from anyorder.bench import costs, estimates, fake
from anyorder.bench.costs import Cost
from anyorder.cli import main as cli
from anyorder.cli import plan as planning
from anyorder.cli.planner import Kind, PlanConfig, Planner, update_bytes
from anyorder.files import read_json, read_manifest
from anyorder.models.architecture import TransformerConfig
from anyorder.models.transformer import AnyOrderTransformer
from anyorder.stages.convert import ConvertConfig
from anyorder.stages.execute import execute
from anyorder.stages.experiment import RECIPES, find_experiment, load_experiment
from anyorder.tokenizers.vq import VQConfig, VQModel
from anyorder.training.config import TrainConfig

NAMES = sorted(path.stem for path in RECIPES.glob("*.yaml"))
CLASSES = ("cat", "dog")


def pictures(folder):
    """A source of tiny images: train and val, two classes, a caption beside each."""
    rng = np.random.default_rng(0)
    for split, count in (("train", 12), ("val", 6)):
        for name in CLASSES:
            (folder / split / name).mkdir(parents=True)
            for i in range(count):
                picture = Image.fromarray(rng.integers(0, 256, (20, 18, 3), np.uint8))
                picture.save(folder / split / name / f"{i}.png")
                (folder / split / name / f"{i}.txt").write_text(f"a {name} number {i}")
    return folder


@pytest.fixture(scope="module")
def downloads(tmp_path_factory):
    """Stand-ins for what the heads of the recipes say to convert, under the same names."""
    folder = tmp_path_factory.mktemp("downloads")
    torch.manual_seed(0)
    vq = VQModel(VQConfig(32, (1, 1, 1), 1, 8, 32, 4))
    torch.save({"model": vq.state_dict()}, folder / "vq.pt")
    execute("convert", ConvertConfig(folder / "vq.pt"), folder / "weights/vq16")
    for name, made in (("randar-l", RandAR), ("arpg-l", ARPG)):
        model = made(
            GPTConfig(depth=2, width=64, heads=1, vocab_size=32, grid=(4, 4), num_classes=len(CLASSES))
        )
        torch.save({"model": model.state_dict()}, folder / f"{name}.pt")
        config = ConvertConfig(folder / f"{name}.pt", tokenizer=folder / "weights/vq16", grid=(4, 4))
        execute("convert", config, folder / "weights" / name)
    images = np.random.default_rng(1).integers(0, 256, (16, 16, 16, 3), np.uint8)
    np.savez(folder / "adm.npz", arr_0=images)
    return folder


def toy(experiment, source):
    """Overrides that shrink every stage and swap what has to be downloaded."""
    found = []
    for name, (kind, stage) in experiment.stages.items():
        changes = {}
        if kind == "data":
            changes = {"source": source, "size": "16,16", "max_train": 16, "max_test": 8, "max_validation": 6}
            changes |= {"label": None, "captions": stage.captions and "txt"}
        elif kind == "features":
            changes = {"extractor": "classifier", "channels": "8,16"}
        elif kind == "tokenizer":
            changes = {"loss.lpips": 0, "loss.vgg_path": None, "loss.lpips_path": None}
            changes |= {
                "loss.discriminator_start": 1,
                "loss.discriminator_layers": 1,
                "loss.discriminator_channels": 8,
            }
            if stage.init is None:
                changes |= {"model.channels": 32, "model.multipliers": "1,1,1", "model.vocab_size": 32}
        elif kind == "train" and stage.init is None:
            changes = {"model.depth": 1, "model.width": 32, "model.heads": 2}
        elif kind == "orders":
            changes = {"limit": 8, "test_limit": 2, "batch_size": 8}
        elif kind == "tune":
            changes = {
                "temperatures": "1.0",
                "scales": f"{stage.scales[0]},{stage.scales[-1]}",
                "num_images": 4,
                "batch_size": 4,
            }
        elif kind == "sample":
            changes = {"num_images": 6, "batch_size": 4}
        elif kind == "eval":
            changes = {"nll_images": 2, "kid_subset_size": 4, "rfd_images": min(8, stage.rfd_images)}
        if hasattr(stage, "train"):
            small = {
                "steps": 2,
                "batch_size": 4,
                "accumulation": 1,
                "warmup": 1,
                "eval_every": 1,
                "save_every": 2,
            }
            changes |= {f"train.{key}": value for key, value in small.items()}
        if kind == "tokens":
            changes = {"batch_size": 8} | ({"text.vocab_size": 64} if stage.text.vocab_size > 512 else {})
        found += [f"{name}.{key}={'null' if value is None else value}" for key, value in changes.items()]
    return found


def test_there_are_the_recipes_that_the_documentation_lists():
    assert {"imagenet256", "imagenet64", "fashion256", "celebahq256"} <= {*NAMES}
    text = (Path(__file__).parents[1] / "docs/how-to/recipes.md").read_text(encoding="utf-8")
    assert all(f"`{name}`" in text for name in NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_a_dry_run_reads_every_setting(name, capsys):
    assert cli.main(["run", name, "--dry-run"]) == 0
    assert "to run" in capsys.readouterr().out
    head = find_experiment(name).read_text(encoding="utf-8").partition("\nout:")[0]
    assert "H100" in head
    assert f"anyorder plan {name}" in head


def test_an_experiment_file_comes_before_a_recipe(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("imagenet64").write_text("stages: {}")
    assert find_experiment("imagenet64") == Path("imagenet64")
    assert cli.main(["run", "imagenet46", "--dry-run"]) == 2
    assert (
        "no configuration file imagenet46, did you mean 'imagenet64'? Recipes are celebahq256, "
        in capsys.readouterr().err
    )


def test_recipes_are_data_of_the_package():
    """The wheel takes every file of the package that git does not ignore."""
    assert RECIPES.parent.name == "anyorder"
    ignored = (Path(__file__).parents[1] / ".gitignore").read_text(encoding="utf-8")
    assert "recipes" not in ignored
    assert "yaml" not in ignored


@pytest.mark.timeout(600)
@pytest.mark.parametrize("name", NAMES)
def test_a_recipe_runs_at_toy_size(name, tmp_path, monkeypatch, downloads):
    monkeypatch.chdir(tmp_path)
    for path in downloads.iterdir():
        Path(path.name).symlink_to(path)
    overrides = toy(load_experiment(find_experiment(name)), pictures(tmp_path / "pictures"))
    assert cli.main(["run", name, *overrides, "--quiet"]) == 0
    out = tmp_path / "runs" / name
    assert (out / "report.html").is_file()
    found = read_manifest(out / "eval-ordered")["metrics"]
    assert np.isfinite(found["fd"])
    assert ("fd_of_reference" in found) == ("imagenet" in name)
    assert ("rfd" in found) is False
    assert np.isfinite(read_manifest(out / "eval-random")["metrics"]["rfd"])
    tuned = read_manifest(out / "tune-ordered")
    assert read_manifest(out / "samples-ordered")["guidance_scale"] == tuned["best"]["guidance_scale"]
    guidance = read_json(out / "pipeline/pipeline.json").get("guidance", {"scale": 1})
    assert guidance["scale"] == tuned["best"]["guidance_scale"]
    assert cli.main(["sample", f"pipeline={out / 'pipeline'}", "num_images=1", "out=one"]) == 0


SHALLOW = [f"{name}.model.depth=2" for name in ("any-order", "raster")]
PLAN = ["plan", "imagenet256", *SHALLOW, "--gpus", "8", "--kind", "h100"]


@pytest.mark.timeout(600)
def test_a_plan_says_what_a_recipe_costs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert cli.main([*PLAN, "out=plan.json"]) == 0
    said = capsys.readouterr().out
    assert "8 x h100 (989 TFLOP/s, 75 GiB), kernels at 60% of these" in said
    assert "not counted anywhere: decoding of image files" in said
    found = read_json(Path("plan.json"))
    rows = {row["stage"]: row for row in found["stages"]}
    trained = rows["any-order"]
    with torch.device("meta"):
        config = TransformerConfig(
            depth=2, width=1024, heads=16, vocab_size=16384, grid=(16, 16), num_classes=1000, qk_norm=True
        )
        model = AnyOrderTransformer(config)
    assert trained["parameters (M)"] * 1e6 == sum(p.numel() for p in model.parameters())
    assert trained["tokens (M)"] == 360_000 * 1024 * 256 / 1e6
    # 6 FLOPs for each weight of a product and token; attention and positions are a little more.
    products = sum(p.numel() for p in model.blocks.parameters()) + 1024 * 16384
    assert trained["PFLOP"] * 1e15 == pytest.approx(6 * products * trained["tokens (M)"] * 1e6, rel=0.1)
    fastest = trained["PFLOP"] * 1e15 / (8 * 0.6 * 989e12) / 3600
    assert fastest < 0.5 * trained["hours"], "elementwise work takes the longer, one operator at a time"
    assert trained["MFU (%)"] == pytest.approx(60 * fastest / trained["hours"])
    parts = ("weights", "optimizer", "activations")
    assert trained["GiB per GPU"] == pytest.approx(sum(trained[part] for part in parts))
    assert trained["weights"] == pytest.approx(3 * 4 * trained["parameters (M)"] * 1e6 / 2**30)  # EMA, DDP
    assert trained["examples/s"] == pytest.approx(360_000 * 1024 / trained["hours"] / 3600)
    assert rows["data"]["disk (GB)"] < 0.1  # images are decoded when they are needed
    # Two sets of tokens, each position of each image scored until it is revealed, 256 candidates at first.
    extracted = 2 * products * (2 * 1_281_167 + 2 * 512) * 256 * 257 / 2
    assert rows["orders"]["PFLOP"] * 1e15 == pytest.approx(extracted, rel=0.15)
    assert cli.main([*PLAN, "any-order.train.compile=true", "out=compiled.json"]) == 0
    compiled = {row["stage"]: row for row in read_json(Path("compiled.json"))["stages"]}["any-order"]
    assert compiled["PFLOP"] == trained["PFLOP"]
    assert fastest < compiled["hours"] < 1.2 * fastest
    together = found["together"]
    assert together["hours"] == pytest.approx(sum(row["hours"] or 0 for row in found["stages"]))
    assert together["GiB per GPU"] == max(row["GiB per GPU"] or 0 for row in found["stages"])


@pytest.mark.timeout(600)
def test_plans_of_sharded_weights_small_memory_and_what_is_not_known(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    stages = {
        "data": {"source": "nowhere", "size": [32, 32]},
        "tokens": {"data": "data", "tokenizer": "weights/vq8"},
        "model": {"stage": "train", "tokens": "tokens", "model": {"depth": 1}, "train": {"accumulation": 4}},
        "grid": {"stage": "grid", "model": "model", "other": "tokens"},
    }
    Path("x.yaml").write_text(json.dumps({"stages": stages}))
    assert cli.main(["plan", "x.yaml"]) == 2
    assert "nowhere is not here: say how many training images it has" in capsys.readouterr().err
    assert cli.main(["plan", "x.yaml", "images=100", "gpus=3"]) == 2
    assert "accumulation=4 passes cannot be shared by 3 GPUs" in capsys.readouterr().err
    memory = {}
    for shard in ("false", "true"):
        assert (
            cli.main(["plan", "x.yaml", "images=100", "gpus=4", f"model.train.shard={shard}", "out=x.json"])
            == 0
        )
        assert "not counted: grid" in capsys.readouterr().out
        memory[shard] = {row["stage"]: row for row in read_json(Path("x.json"))["stages"]}["model"]
    assert memory["true"]["optimizer"] == memory["false"]["optimizer"] / 4
    assert memory["true"]["weights"] < memory["false"]["weights"]
    kind = planning.KINDS["h100"]._replace(memory=1e8)
    monkeypatch.setitem(planning.KINDS, "h100", kind)
    assert cli.main(["plan", "x.yaml", "images=100", "model.train.batch_size=64"]) == 0
    assert "model does not fit into 0 GiB: smaller batch_size" in capsys.readouterr().out
    assert cli.main(["plan", "x.yaml", "images=100", "kind=cpu", "efficiency=0.9"]) == 0
    assert "1 x cpu (" in capsys.readouterr().out
    for bad in ("gpus=0", "efficiency=0", "images=0", "kind=z80"):
        assert cli.main(["plan", "x.yaml", bad]) == 2
    assert cli.main(["plan"]) == 2
    capsys.readouterr()
    stages["tokens"]["tokenizer"] = "weights/unknown"
    Path("x.yaml").write_text(json.dumps({"stages": stages}))
    assert cli.main(["plan", "x.yaml", "images=100"]) == 2
    assert "known without their files are vq16" in capsys.readouterr().err


def planner(**settings):
    """Of no experiment, on GPUs with round numbers."""
    found = Planner.__new__(Planner)
    found.kind, found.config = Kind(8.0, 2.0, 16.0, 1e9), PlanConfig(efficiency=0.5, **settings)
    return found


def test_the_update_is_made_by_every_gpu_unless_weights_are_sharded():
    assert update_bytes(4, 10, True) == 4 * (3 * 10 + 7 * 10 + 3 * 4)
    assert update_bytes(4, 10, False) == 4 * 10 * 10
    moved = 4 * (3 * 10 + 7 * 10 + 3 * 4)
    for gpus, shard, share in ((1, False, 1), (8, False, 1), (8, True, 1 / 8)):
        train = TrainConfig(steps=5, accumulation=8, ema=0.9, shard=shard)
        costs = planner(gpus=gpus)._training(train, 10, 10, fake.Pass(Cost(), 0), 4)
        assert costs.seconds == pytest.approx(5 * moved / 16.0 / 0.5 * share)


def test_time_is_products_or_in_decoding_reading_if_slower_then_the_rest_and_calls():
    cost = Cost(flops=16.0, bytes=160.0, elementwise=32.0, operators=5.0)
    for bf16, products in ((True, 2.0), (False, 8.0)):
        assert planner()._spent(cost, 3, bf16)["seconds"] == 3 * (products + 2.0) / 0.5
        assert planner()._spent(cost, 3, bf16, reads=True)["seconds"] == 3 * (10.0 + 2.0) / 0.5
        few = replace(cost, bytes=1.0)
        assert planner()._spent(few, 3, bf16, reads=True)["seconds"] == 3 * (products + 2.0) / 0.5
        slow = planner()
        slow.kind = slow.kind._replace(call=0.2)
        assert slow._spent(few, 3, bf16)["seconds"] == 3 * ((products + 2.0) / 0.5 + 5 * 0.2)
        train = TrainConfig(steps=1000, bf16=bf16, compile=True, ema=0.0)
        costs = planner()._training(train, 0, 0, fake.Pass(cost, 0))
        assert costs.mfu == pytest.approx(0.5), "of the peak of its own type"
        assert costs.row("x")["MFU (%)"] == 100 * costs.mfu


@pytest.mark.timeout(600)
@pytest.mark.parametrize("name", ["celebahq256", "imagenet256-arpg"])
def test_plans_of_other_recipes(name, capsys, monkeypatch):
    """Tokenizers that go on, discriminators, captions, converted models."""
    monkeypatch.setattr(estimates, "train_tokenizer", lambda *_: (10, fake.Pass(costs.Cost(1e9), 7)))
    monkeypatch.setattr(estimates, "train_generator", lambda *_: (20, 20, fake.Pass(costs.Cost(1e9), 7)))
    monkeypatch.setattr(estimates, "decoding_step", lambda *_: (20, fake.Pass(costs.Cost(1e9, 1e9), 7), 5))
    assert cli.main(["plan", name, "--kind", "a100"]) == 0
    assert "samples-ordered" in capsys.readouterr().out


def test_validation_images_of_sunsets_are_made_besides_those_of_training(tmp_path):
    file, data = tmp_path / "x.yaml", {"source": "sunsets", "max_train": 80, "max_validation": 30}
    file.write_text(json.dumps({"out": str(tmp_path), "stages": {"data": data}}))
    planner = Planner(load_experiment(file), PlanConfig(), planning.KINDS["h100"])
    assert planner._facts(tmp_path / "data")[:3] == (80, 30, 2000)


def test_a_plan_is_not_written_over_an_experiment_or_a_folder(tmp_path, capsys):
    file = tmp_path / "mine.json"
    file.write_text('{"stages": {"data": {"source": "sunsets"}}}')
    for out, message in ((file, "is the experiment file itself"), (tmp_path, "must be a file, FILE.json")):
        assert cli.main(["plan", str(file), f"out={out}"]) == 2
        assert message in capsys.readouterr().err
    assert file.read_text().startswith('{"stages"')
