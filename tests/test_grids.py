"""The stage that takes models to other grids."""

import pytest
import yaml

from anyorder.cli import main as cli
from anyorder.files import read_json, read_manifest
from anyorder.settings import parse
from anyorder.stages.grid import GridStage

TINY_VQ = {
    "channels": 8, "multipliers": [1, 1, 2], "groups": 1, "res_blocks": 1, "attention": False,
    "z_channels": 8, "vocab_size": 16, "code_dim": 4, "codebook_update": "ema", "revive_after": 5,
}  # fmt: skip
STEPS = {"steps": 2, "batch_size": 8, "log_every": 2, "eval_every": 2, "save_every": 2}
DATA = {"stage": "data", "max_train": 16, "max_test": 8}
SMALL = {"depth": 1, "width": 32, "heads": 2}
ON = {
    "stage": "grid",
    "tokens": "tokens",
    "tokenizer": "tokenizer",
    "num_images": 6,
    "seeds": [0, 1],
    "samples": 3,
}
EXPERIMENT = {
    "stages": {
        "data": {**DATA, "size": [16, 16]},
        "large": {**DATA, "size": [24, 16]},
        "tokenizer": {"data": "data", "model": TINY_VQ, "train": STEPS},
        "tokens": {"data": "data", "tokenizer": "tokenizer"},
        "large-tokens": {"stage": "tokens", "data": "large", "tokenizer": "tokenizer"},
        "model": {"stage": "train", "tokens": "tokens", "model": SMALL, "train": STEPS},
        "there": {**ON, "model": "model", "other": "large-tokens", "guidance": {"scale": 1.5}},
        "orders": {"model": "model", "tokens": "tokens", "limit": 8, "test_limit": 4},
        "by-class": {**ON, "model": "model", "other": "large-tokens", "orders": "orders",
                     "policy": {"order": "class_mean"}},
        "here": {**ON, "model": "model", "other": "tokens", "policy": {"order": "entropy"}},
    }
}  # fmt: skip


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    out = tmp_path_factory.mktemp("grids")
    (out / "x.yaml").write_text(yaml.safe_dump({"out": str(out), **EXPERIMENT}, sort_keys=False))
    assert cli.main(["run", str(out / "x.yaml")]) == 0
    return out


def test_likelihoods_on_both_grids(run):
    there, here = (read_json(run / name / "metrics.json") for name in ("there", "here"))
    assert there["own"] == here["own"] == here["other"]
    assert there["other"]["mean"] != there["own"]["mean"]
    assert len(there["other"]["seeds"]) == 2
    assert read_manifest(run / "there")["grids"] == {"own": [4, 4], "other": [6, 4]}
    assert read_manifest(run / "there")["next_position"] == "relative"
    assert (run / "there" / "grid.png").stat().st_size > 0
    assert (run / "by-class" / "grid.png").stat().st_size > 0
    assert read_manifest(run / "by-class")["policy"] == "class_mean"
    assert "On other grids" in (run / "report.html").read_text()


def test_what_does_not_belong_together_is_refused(run, tmp_path, capsys):
    wrong = ["grid", f"model={run}/model", f"tokens={run}/large-tokens", f"other={run}/tokens"]
    assert cli.main([*wrong, f"tokenizer={run}/tokenizer", f"out={tmp_path}/x"]) == 2
    assert "was made with tokens" in capsys.readouterr().err
    inputs = dict.fromkeys(("model", "tokens", "other", "tokenizer"), "x")
    for settings in ({"num_images": 0}, {"seeds": []}, {"policy": {"order": "class_mean"}}):
        with pytest.raises(ValueError, match=r"must be >= 1|needs the orders of the classes"):
            parse(GridStage, {**inputs, **settings})
