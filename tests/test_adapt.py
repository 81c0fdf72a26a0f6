"""Published models for one's own classes and grid, trained whole or by low-rank updates."""

import copy

import pytest
import torch
import yaml
from conftest import published, seeded, transformer
from torch.testing import assert_close

from anyorder import Pipeline, families
from anyorder.adapters.arpg import ARPG
from anyorder.adapters.llamagen import LlamaGen
from anyorder.adapters.randar import RandAR
from anyorder.cli import main as cli
from anyorder.contracts import Grid
from anyorder.files import read_json, read_manifest
from anyorder.inference.weights import load_model, read_tensors
from anyorder.orders import random_orders, static_order
from anyorder.settings import parse
from anyorder.stages.train import TrainStage
from anyorder.training.lora import adapt, add_low_rank, merge_low_rank

FAMILIES = {"randar": RandAR, "arpg": ARPG, "llamagen": LlamaGen}
MODELS = {**{k: lambda v=v: published(v) for k, v in FAMILIES.items()}, "ours": lambda: transformer()}


def logits(model, condition, grid=None):
    grid = grid or model.grid
    n, rows = grid.n, len(condition)
    tokens = torch.randint(5, (rows, n), generator=seeded(0))
    raster = isinstance(model, LlamaGen)
    order = static_order("raster", grid).expand(rows, -1) if raster else random_orders(rows, grid, seeded(1))
    return model.forward(tokens, condition, order, grid).detach()


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("classes", [2, 7])
def test_new_classes_begin_as_no_class(family, classes):
    model = MODELS[family]()
    adapted = adapt(model, Grid(4, 3), classes)
    assert (adapted.num_classes, adapted.grid) == (classes, Grid(4, 3))
    assert model.num_classes == 3
    grid = Grid(2, 3)
    none = logits(model, torch.tensor([-1, -1]), grid)
    for label in (-1, 0, classes - 1):
        assert_close(logits(adapted, torch.tensor([label, label]), grid), none)
    assert not torch.allclose(logits(model, torch.tensor([0, 0]), grid), none)


@pytest.mark.parametrize("family", FAMILIES)
def test_as_many_classes_are_the_same_ones(family):
    model = MODELS[family]()
    labels = torch.tensor([0, 1, 2, -1])
    assert_close(logits(adapt(model, model.grid, 3), labels), logits(model, labels))
    assert adapt(model, model.grid, 0).num_classes == 1


@pytest.mark.parametrize("family", FAMILIES)
def test_known_classes_keep_their_rows(family):
    model = MODELS[family]()
    adapted = adapt(model, model.grid, 4, [2, None, 0, 1])
    expected = logits(model, torch.tensor([2, -1, 0, 1, -1]))
    assert_close(logits(adapted, torch.tensor([0, 1, 2, 3, -1])), expected)
    turned = adapt(model, model.grid, 3, [1, 2, 0])
    assert_close(logits(turned, torch.tensor([2, 0, 1, -1])), logits(model, torch.tensor([0, 1, 2, -1])))


@pytest.mark.parametrize("name", MODELS)
def test_low_rank_updates_change_nothing_at_first_and_are_merged(name):
    model = MODELS[name]()
    labels = torch.tensor([0, 0, -1])
    before, keys, size = (
        logits(model, labels),
        set(model.state_dict()),
        sum(p.numel() for p in model.parameters()),
    )
    add_low_rank(model, 2)
    trained = {k for k, p in model.named_parameters() if p.requires_grad}
    table = families.family(families.kind_of(model)).class_table
    assert table in trained
    assert all("weight.0" in k for k in trained - {table})
    assert not any(k.startswith(("head", "output")) for k in trained)
    assert_close(logits(model, labels), before)
    for name, parameter in model.named_parameters():
        if name.endswith(".up"):
            parameter.data.normal_(0, 0.1, generator=seeded(2))
    changed = logits(model, labels)
    assert not torch.allclose(changed, before)
    averaged = copy.deepcopy(model)  # as the trainer does
    merge_low_rank(averaged)
    assert set(averaged.state_dict()) == keys
    assert sum(p.numel() for p in averaged.parameters()) == size
    assert_close(logits(averaged, labels), changed)


def test_a_location_head_is_trained_whole():
    model = transformer(location=True)
    add_low_rank(model, 1)
    assert all(p.requires_grad for k, p in model.named_parameters() if k.startswith("location"))


# --- the stage

TINY_VQ = {
    "channels": 8, "multipliers": [1, 1, 2], "groups": 1, "res_blocks": 1, "attention": False,
    "z_channels": 8, "vocab_size": 16, "code_dim": 4, "codebook_update": "ema", "revive_after": 5,
}  # fmt: skip
STEPS = {"steps": 2, "batch_size": 8, "log_every": 2, "eval_every": 2, "save_every": 1}
EXPERIMENT = {
    "stages": {
        "data": {"max_train": 24, "max_test": 12, "size": [16, 16]},
        "tokenizer": {"data": "data", "model": TINY_VQ, "train": STEPS},
        "tokens": {"data": "data", "tokenizer": "tokenizer"},
    }
}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    out = tmp_path_factory.mktemp("runs")
    (out / "x.yaml").write_text(yaml.safe_dump({"out": str(out), **EXPERIMENT}, sort_keys=False))
    assert cli.main(["run", str(out / "x.yaml")]) == 0
    for family, model_class in FAMILIES.items():
        model = published(model_class, width=64, vocab_size=16, num_classes=6, grid=[3, 3])
        torch.save({"model": model.state_dict()}, out / f"{family}.pt")
        assert cli.main(["convert", f"{out}/{family}.pt", f"{out}/{family}", "heads=1", "grid=3,3"]) == 0
    return out


SETTINGS = [f"train.{key}={value}" for key, value in STEPS.items()]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("lora", [0, 2])
@pytest.mark.parametrize("ema", [0.0, 0.5])
def test_a_converted_model_is_trained_on_own_images(run, family, lora, ema, tmp_path):
    order = ["order=raster"] if family == "llamagen" else []
    command = ["train", f"init={run}/{family}", f"tokens={run}/tokens", f"lora={lora}", f"out={tmp_path}/own"]
    pictures = [f"tokenizer={run}/tokenizer", "train.sample_every=2"]
    assert cli.main([*command, *order, *SETTINGS, *pictures, f"train.ema={ema}"]) == 0
    model = load_model(tmp_path / "own")
    assert type(model) is FAMILIES[family]
    assert (model.num_classes, model.grid) == (4, Grid(4, 4))
    before, after = (read_tensors(f / "model.safetensors") for f in (run / family, tmp_path / "own"))
    assert before.keys() == after.keys()
    changed = {
        k for k in before if before[k].shape == after[k].shape and not torch.equal(before[k], after[k])
    }
    assert bool(changed & {"output.weight", "head.weight"}) == (lora == 0)
    assert any("atten" in k or "attn" in k for k in changed)
    assert read_manifest(tmp_path / "own")["training_tokens"] == 2 * 8 * 16
    more = ["pipeline", f"model={tmp_path}/own", f"tokens={run}/tokens", f"tokenizer={run}/tokenizer"]
    assert cli.main([*more, f"policy.order={'raster' if order else 'random'}", f"out={tmp_path}/p"]) == 0
    assert Pipeline.from_pretrained(tmp_path / "p")("red", 2).tokens.shape == (2, 16)


def test_fine_tuning_goes_on_with_orders_of_the_model_itself(run, tmp_path):
    """Random orders first, then the orders that the adapted model prefers."""
    own, tokens = f"{tmp_path}/own", f"tokens={run}/tokens"
    assert cli.main(["train", f"init={run}/randar", tokens, f"out={own}", *SETTINGS]) == 0
    assert cli.main(["orders", f"model={own}", tokens, f"out={tmp_path}/orders", "test_limit=8"]) == 0
    command = [
        "train",
        f"init={own}",
        tokens,
        f"orders={tmp_path}/orders",
        f"out={tmp_path}/ordered",
        "lora=1",
    ]
    assert cli.main([*command, *SETTINGS]) == 0
    assert read_manifest(tmp_path / "ordered")["training_tokens"] == 2 * 2 * 8 * 16
    assert read_json(tmp_path / "ordered" / "config.json")["kind"] == "randar"


def test_own_models_take_low_rank_updates(run, tmp_path):
    tokens, small = f"tokens={run}/tokens", ["model.depth=1", "model.width=32", "model.heads=2"]
    assert cli.main(["train", tokens, *small, f"out={tmp_path}/a", *SETTINGS]) == 0
    assert cli.main(["train", tokens, f"init={tmp_path}/a", "lora=2", f"out={tmp_path}/b", *SETTINGS]) == 0
    a, b = (read_tensors(tmp_path / name / "model.safetensors") for name in "ab")
    assert a.keys() == b.keys()
    assert torch.equal(a["head.weight"], b["head.weight"])
    assert not torch.equal(a["blocks.0.mlp.down.weight"], b["blocks.0.mlp.down.weight"])


def test_what_does_not_go_together_is_refused(run, tmp_path, capsys):
    for settings in ({"lora": 2}, {"lora": -1, "init": "m"}):
        with pytest.raises(ValueError, match="lora must be a rank"):
            parse(TrainStage, {"tokens": "t", **settings})
    command = ["train", f"init={run}/arpg", f"tokens={run}/tokens", f"out={tmp_path}/x", *SETTINGS]
    assert cli.main([*command, "model.location=true", "order=raster"]) == 2
    assert "no location head" in capsys.readouterr().err
    model = published(ARPG, width=64, vocab_size=15)
    torch.save(model.state_dict(), tmp_path / "w.pt")
    assert cli.main(["convert", f"{tmp_path}/w.pt", f"{tmp_path}/m", "heads=1"]) == 0
    assert cli.main([*command, f"init={tmp_path}/m"]) == 2
    assert "knows 15 tokens" in capsys.readouterr().err
