"""Faults of runs, experiments and image commands that were found by hunting: each would come back here."""

from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from conftest import transformer
from PIL import Image

from anyorder.cli import images as image_commands
from anyorder.cli import main as cli
from anyorder.cli import runs
from anyorder.files import read_manifest
from anyorder.inference.pipeline import Pipeline
from anyorder.method.policy_config import PolicyConfig
from anyorder.method.sampling import Sampling
from anyorder.stages.artifacts import Artifact
from anyorder.stages.experiment import load_experiment
from anyorder.tokenizers.vq import VQConfig, VQModel
from anyorder.training.checkpoint import Checkpoints


def toy(**further) -> Pipeline:
    torch.manual_seed(0)
    tokenizer = VQModel(VQConfig(8, (1, 1, 2), 1, 8, 5, 4, groups=1))
    return Pipeline(transformer(0, num_classes=2, grid=(2, 3)), tokenizer, ["cat", "dog"], **further)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# --- artifacts --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["model", "tokenizer", "scorer", "."])
def test_a_pipeline_is_not_saved_over_finished_artifacts(tmp_path, name):
    with Artifact(tmp_path / name, "train", {}, {}) as artifact:
        (tmp_path / name / "model.safetensors").write_text("trained for days")
        artifact.finish()
    before = contents(tmp_path)
    with pytest.raises(ValueError, match=r"is a finished artifact .*: choose another folder"):
        toy().save_pretrained(tmp_path)
    assert contents(tmp_path) == before


def test_a_training_without_checkpoints_is_not_begun_anew_unasked(tmp_path):
    def opened(steps, **settings):
        return Artifact(tmp_path, "train", {"train": {"steps": steps}}, {}, grows=["train.steps"], **settings)

    with opened(3) as artifact:
        Checkpoints(tmp_path).save(3, {"w": torch.ones(2)}, {})
        (tmp_path / "model.safetensors").write_text("trained")
        artifact.finish()
    with opened(5):
        assert (tmp_path / "checkpoints").exists(), "goes on"
    runs.delete(runs.checkpoints([tmp_path]))
    before = contents(tmp_path)
    with pytest.raises(ValueError, match=r"train.steps=5, but 3 are done already: no checkpoint is left"):
        opened(5)
    with pytest.raises(ValueError, match=r"train.steps=2, but 3 are done already: choose train.steps>=3"):
        opened(2)
    assert contents(tmp_path) == before
    with opened(5, overwrite=True) as artifact:
        assert not (tmp_path / "model.safetensors").exists()
        (tmp_path / "model.safetensors").write_text("trained anew")
        artifact.finish()
    assert read_manifest(tmp_path)["config"]["train"]["steps"] == 5


# --- experiment files -------------------------------------------------------------------------------------


def experiment(folder: Path, stages: str) -> Path:
    (folder / "x.yaml").write_text(f"out: {folder}/out\nstages: {{{stages}}}\n")
    return folder / "x.yaml"


@pytest.mark.parametrize("further", [[], ["--dry-run"]])
@pytest.mark.parametrize(
    ("stages", "message"),
    [
        ("data: , tokenizer: {data: data}, tokens: {data: data, tokenizer: tokenizr}", "mean 'tokenizer'?"),
        (
            "tokens: {data: data, tokenizer: tokenizer}, data: , tokenizer: {data: data}",
            "'tokens': data=data",
        ),
    ],
)
def test_a_mistyped_input_is_refused_before_the_first_stage(tmp_path, capsys, stages, message, further):
    path = experiment(tmp_path, stages)
    assert cli.main(["run", str(path), *further]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_inputs_of_earlier_stages_and_of_other_runs_are_taken(tmp_path):
    experiment(tmp_path, f"data: , tokens: {{data: {tmp_path}/out/data, tokenizer: {tmp_path}}}")
    load_experiment(tmp_path / "x.yaml")._require_inputs()
    experiment(tmp_path, "data: , tokens: {data: data, tokenizer: weights/missing}")
    load_experiment(tmp_path / "x.yaml").plan()  # a recipe is listed before its weights are there
    with pytest.raises(ValueError, match="tokenizer=weights/missing is no earlier stage"):
        load_experiment(tmp_path / "x.yaml").run()


@pytest.mark.parametrize("name", ["out", "seed", "../esc", "..", "a/b", "/tmp/x", "."])
def test_stages_have_names_of_folders_inside_of_out(tmp_path, name):
    with pytest.raises(ValueError, match="a stage cannot be called"):
        load_experiment(experiment(tmp_path, f"'{name}': {{stage: data}}"))


@pytest.mark.parametrize("typed", ["data=3", "data.=3"])
def test_an_override_without_a_setting_is_shown_as_it_was_typed(tmp_path, typed):
    with pytest.raises(ValueError, match=f"got override '{typed}', expected data.key=value"):
        load_experiment(experiment(tmp_path, "data: "), [typed])


# --- images from a pipeline -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("typed", "policy", "sampling"),
    [
        (["sampling.top_k=2"], None, Sampling(0.8, top_k=2)),
        (["sampling.temperature=0"], None, Sampling(0)),
        (["policy.steps=4"], PolicyConfig("raster", steps=4, schedule="cosine"), None),
        (["policy.schedule=arccos"], PolicyConfig("raster", steps=3, schedule="arccos"), None),
        (["policy.order=margin"], PolicyConfig("margin"), None),
        (["policy.order=raster", "policy.steps=2"], PolicyConfig("raster", steps=2), None),
        (["seed=3"], None, None),
    ],
)
def test_one_setting_keeps_the_others_of_the_pipeline(tmp_path, capsys, typed, policy, sampling):
    own = {"policy": PolicyConfig("raster", steps=3, schedule="cosine"), "sampling": Sampling(0.8, top_p=1)}
    toy(**own).save_pretrained(tmp_path / "pipe")
    image = ["complete", f"image={tmp_path}/a.png", "keep=0.5"]
    for command in (["sample"], image):
        given = [*command, f"pipeline={tmp_path}/pipe", f"out={tmp_path}/out", *typed, "--dry-run"]
        assert cli.main(given) == 0
        shown = yaml.safe_load(capsys.readouterr().out.partition("\n")[2])
        assert shown["policy"] == (policy and vars(policy))
        assert shown["sampling"] == (sampling and vars(sampling))


def test_a_setting_that_the_policy_of_the_pipeline_does_not_take_names_that_policy(tmp_path, capsys):
    given = ["sample", "pipeline=fashion32", f"out={tmp_path}/out", "policy.steps=4"]
    assert cli.main(given) == 2
    assert "steps" in (said := capsys.readouterr().err)
    assert "the pipeline's own is 'entropy, rate_every 8', policy.order=NAME begins" in said
    assert cli.main([*given, "policy.order=entropy", "--dry-run"]) == 0


def completed(folder: Path, pipeline: str, **settings) -> None:
    config = image_commands.CompleteConfig(pipeline=pipeline, image=folder / "a.png", keep=0.5)
    image_commands.complete_file(config, folder / "out", **settings)


@pytest.fixture
def no_work(tmp_path, monkeypatch):
    """A pipeline and an image; nothing is generated, but counted."""
    toy().save_pretrained(tmp_path / "pipe")
    Image.fromarray(np.zeros((8, 12, 3), np.uint8)).save(tmp_path / "a.png")
    made = []
    blank = Image.new("RGB", (12, 8))
    monkeypatch.setattr(image_commands, "_completed", lambda config: made.append(config) or [blank])
    return made


def test_another_spelling_of_a_path_is_the_same_pipeline(tmp_path, monkeypatch, no_work):
    monkeypatch.chdir(tmp_path)
    for spelling in (f"{tmp_path}/pipe", "pipe", "pipe/", "./pipe", "../" + tmp_path.name + "/pipe"):
        completed(tmp_path, spelling)
    assert len(no_work) == 1


def test_a_changed_image_is_refused_in_a_short_line(tmp_path, no_work):
    completed(tmp_path, f"{tmp_path}/pipe")
    Image.fromarray(np.ones((8, 12, 3), np.uint8)).save(tmp_path / "a.png")
    with pytest.raises(ValueError, match="contents of the files") as refused:
        completed(tmp_path, f"{tmp_path}/pipe")
    assert len(str(refused.value)) < 300 + len(str(tmp_path))
    assert "sha256" not in str(refused.value)


@pytest.mark.parametrize("command", [["sample"], ["complete", "image=a.png", "keep=0.5"]])
def test_interrupted_images_are_said_to_begin_anew(tmp_path, monkeypatch, capsys, no_work, command):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.chdir(tmp_path)
    for name in ("_sample_into", "_completed"):
        monkeypatch.setattr(image_commands, name, interrupted)
    assert cli.main([*command, "pipeline=pipe", "out=out"]) == 130
    said = capsys.readouterr().err
    assert "begins anew" in said
    assert "goes on" not in said
