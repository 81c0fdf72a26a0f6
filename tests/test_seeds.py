"""Repetition over seeds in experiment files."""

import pytest
import yaml

from anyorder.cli import main as cli
from anyorder.stages.experiment import load_experiment
from anyorder.stages.seeds import expand

REPEATED = {
    "tokens": {"tokenizer": "t"},
    "raster-s{seed}": {"stage": "train", "tokens": "tokens", "train": {"seed": "{seed}", "steps": 3}},
    "samples-s{seed}": {"stage": "sample", "model": "raster-s{seed}", "seed": "{seed}"},
    "pipeline": {"model": "raster-s0"},
    "late-{seed}": {"notes": ["{seed}", "s{seed}/{seed}", 1.5, None]},
}


def test_neighbouring_templates_are_made_seed_by_seed() -> None:
    assert list(expand(REPEATED, [0, 2])) == [
        "tokens", "raster-s0", "samples-s0", "raster-s2", "samples-s2", "pipeline", "late-0", "late-2",
    ]  # fmt: skip


def test_placeholders_are_filled_in_everywhere_and_alone_become_integers() -> None:
    found = expand(REPEATED, [0, 2])
    assert found["raster-s2"]["train"] == {"seed": 2, "steps": 3}
    assert found["samples-s2"] == {"stage": "sample", "model": "raster-s2", "seed": 2}
    assert found["late-2"] == {"notes": [2, "s2/2", 1.5, None]}
    assert found["pipeline"] == REPEATED["pipeline"]
    assert REPEATED["raster-s{seed}"]["train"]["seed"] == "{seed}"


def test_files_without_seeds_stay_as_they_are() -> None:
    stages = {"data": {"size": [16, 16]}, "tokens": None}
    assert expand(stages, []) == stages


@pytest.mark.parametrize(
    ("stages", "seeds", "message"),
    [
        ({"a-s{seed}": {}}, [], "add seeds: "),
        ({"a-s{seed}": {}}, [0, 0], r"different integers >= 0.* got \[0, 0\]"),
        ({"a-s{seed}": {}}, [0.5], "different integers"),
        ({"a-s{seed}": {}}, [True], "different integers"),
        ({"a-s{seed}": {}}, 3, "different integers"),
        ({"a": {"model": "b-s{seed}"}}, [0], "'a' is not repeated, but 'b-s{seed}' holds {seed}"),
        ({"a-s{seed}": {"model": "b-s{sead}"}}, [0], "unknown placeholder {sead} in 'b-s{sead}'"),
        ({"a-{size}": {}}, [0], "unknown placeholder {size}"),
        ({"a-s{seed}": {"train": {"seed": {"seed": None}}}}, [0], "with quotes"),
        ({"a-s0": {}, "a-s{seed}": {}}, [0], "'a-s0' is given twice"),
        ({"a-s{seed}": {}, "b": {}, "a-s0": {}}, [0], "'a-s0' is given twice"),
    ],
)
def test_mistakes_are_named(stages, seeds, message) -> None:
    with pytest.raises(ValueError, match=message):
        expand(stages, seeds)


@pytest.fixture
def path(tmp_path):
    text = """
seeds: [0, 1]
stages:
  tokens: {data: nowhere, tokenizer: nowhere}
  raster-s{seed}: {stage: train, tokens: tokens, order: raster, train: {steps: 3, seed: "{seed}"}}
  orders-s{seed}: {stage: orders, model: "raster-s{seed}", tokens: tokens}
"""
    (tmp_path / "x.yaml").write_text(text)
    assert yaml.safe_load(text)["seeds"] == [0, 1]
    return tmp_path / "x.yaml"


def test_overrides_name_all_seeds_or_one(path) -> None:
    one = "raster-s1.train.steps=20"
    for overrides in ([one, "raster-s{seed}.train.steps=10"], ["raster-s{seed}.train.steps=10", one]):
        stages = load_experiment(path, overrides).stages
        assert [stages[f"raster-s{seed}"][1].train.steps for seed in (0, 1)] == [10, 20]
    stages = load_experiment(path, ["raster-s{seed}.train.warmup={seed}"]).stages
    assert [stages[f"raster-s{seed}"][1].train.warmup for seed in (0, 1)] == [0, 1]
    with pytest.raises(ValueError, match=r"did you mean 'raster-s\{seed\}'"):
        load_experiment(path, ["raster-s{sed}.train.steps=1"])
    with pytest.raises(ValueError, match="unknown stage in override"):
        load_experiment(path, ["raster-s2.train.steps=1"])


def test_stages_of_a_seed_read_those_of_their_seed(path, capsys) -> None:
    experiment = load_experiment(path)
    assert list(experiment.stages) == ["tokens", "raster-s0", "orders-s0", "raster-s1", "orders-s1"]
    assert experiment.stages["orders-s1"][1].model == experiment.out / "raster-s1"
    assert experiment.stages["raster-s1"][1].train.seed == 1
    assert cli.main(["run", str(path), "--dry-run"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 5


def test_a_mistake_in_a_file_names_the_file(path, capsys) -> None:
    path.write_text(path.read_text().replace("[0, 1]", "[]"))
    assert cli.main(["run", str(path)]) == 2
    assert "x.yaml: stage 'raster-s{seed}' is repeated over seeds" in capsys.readouterr().err


def test_other_seeds_than_those_of_the_file(path):
    path.write_text(
        path.read_text() + "  best: {stage: pipeline, model: raster-s0, tokenizer: x, tokens: tokens}\n"
    )
    experiment = load_experiment(path, ["seeds=1"])
    assert list(experiment.stages) == ["tokens", "raster-s1", "orders-s1", "best"]
    assert experiment.stages["best"][1].model == experiment.out / "raster-s0"
    with pytest.raises(ValueError, match="integers >= 0, such as seeds=0,1, got 'seeds=x'"):
        load_experiment(path, ["seeds=x"])
