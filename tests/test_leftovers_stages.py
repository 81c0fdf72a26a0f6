"""Faults of stages, artifacts and image commands that were left over: each would come back here."""

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import transformer
from PIL import Image

from anyorder.cli import main as cli
from anyorder.cli import runs
from anyorder.files import fingerprint, read_manifest, save_array, write_json
from anyorder.inference.pipeline import Pipeline
from anyorder.stages.artifacts import Artifact, verify
from anyorder.stages.common import Rows
from anyorder.stages.data import DataStage
from anyorder.stages.execute import execute
from anyorder.stages.sample import SampleStage
from anyorder.stages.tokenizer import TokenizerStage
from anyorder.stages.tokens import TokensStage
from anyorder.stages.train import TrainStage
from anyorder.tokenizers.vq import VQConfig, VQModel
from anyorder.training.config import TrainConfig

SHORT = TrainConfig(steps=1, batch_size=2, eval_every=0)


def pipeline(folder: Path, generator: int = 0, tokenizer: int = 0) -> Path:
    """A finished pipeline; numbers choose the weights of its parts."""
    torch.manual_seed(tokenizer)
    coder = VQModel(VQConfig(8, (1, 1, 2), 1, 8, 5, 4, groups=1))
    config = {"weights": [generator, tokenizer]}
    with Artifact(folder, "pipeline", config, {}, overwrite=True) as artifact:
        if not artifact.current:
            made = Pipeline(transformer(generator, num_classes=4, grid=(4, 4), vocab_size=5), coder)
            made.save_pretrained(folder)
            artifact.finish(parameters=0)
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run") / "data"
    execute("data", DataStage(size=(16, 16), max_train=6, max_test=3), folder)
    return folder


# --- a pipeline as a tokenizer ----------------------------------------------------------------------------


def chain(at: Path, data: Path) -> dict[str, tuple[str, object]]:
    """Stages that take the tokenizer of a pipeline, by folder."""
    network = {"network": "own_parts:Counts", "train": SHORT}
    return {
        "tokens": ("tokens", TokensStage(data, at / "pipe")),
        "model": ("train", TrainStage(at / "tokens", **network)),
        "samples": ("sample", SampleStage(model=at / "model", num_images=2)),
        "begun": ("tokenizer", TokenizerStage(data, at / "pipe", train=SHORT)),
    }


@pytest.fixture
def made(tmp_path, data):
    pipeline(tmp_path / "pipe")
    stages = chain(tmp_path, data)
    for name, (kind, stage) in stages.items():
        execute(kind, stage, tmp_path / name)
    return stages


def record_whole_pipelines(at: Path, names: list[str]) -> None:
    """Manifests as earlier versions wrote them."""
    whole = fingerprint(at / "pipe")
    for name in names:
        manifest = read_manifest(at / name)
        role = "init" if name == "begun" else "tokenizer"
        if role in manifest["inputs"]:
            manifest["inputs"][role] = whole
            write_json(at / name / "manifest.json", manifest | {"tokenizer": whole})


@pytest.mark.parametrize("earlier", [False, True])
def test_as_a_tokenizer_a_pipeline_counts_by_its_tokenizer_alone(tmp_path, made, earlier):
    if earlier:
        record_whole_pipelines(tmp_path, list(made))
    pipeline(tmp_path / "pipe", generator=0 if earlier else 1)
    for name, (kind, stage) in made.items():
        assert not execute(kind, stage, tmp_path / name), name
        assert runs.state(tmp_path / name) == "up to date"
        assert verify(tmp_path / name) == []
    assert execute("sample", SampleStage(model=tmp_path / "model", num_images=3), tmp_path / "more")


@pytest.mark.parametrize("earlier", [False, True])
def test_another_tokenizer_in_a_pipeline_is_another_one(tmp_path, made, earlier):
    """As is any other part, where an earlier version recorded all of them."""
    if earlier:
        record_whole_pipelines(tmp_path, list(made))
    pipeline(tmp_path / "pipe", generator=1, tokenizer=0 if earlier else 1)
    for name in ("tokens", "samples", "begun"):
        with pytest.raises(ValueError, match=r"inputs\.(tokenizer|init)"):
            execute(*made[name], tmp_path / name)
        assert "was made again" in runs.state(tmp_path / name)
        assert "is not what it was made from" in verify(tmp_path / name)[0]
    with pytest.raises(ValueError, match="was made with tokenizer"):
        execute("sample", SampleStage(model=tmp_path / "model", num_images=3), tmp_path / "more")


def test_as_a_model_a_pipeline_counts_by_all_it_holds(tmp_path, made):
    stage = SampleStage(model=pipeline(tmp_path / "other"), tokens=tmp_path / "tokens")
    identity = Artifact(tmp_path / "out", "sample", {}, {"model": stage.model}).identity
    assert identity["inputs"]["model"] == fingerprint(tmp_path / "other")


# --- the user's files -------------------------------------------------------------------------------------


def test_what_was_put_into_a_stopped_artifact_is_not_discarded(tmp_path):
    with Artifact(tmp_path, "stage", {"value": 0}, {}):
        save_array(tmp_path / "x.npy", np.zeros(2))
    theirs = {name: tmp_path / name for name in ("notes.json", "mine.npy", "0007.png")}
    for name, path in theirs.items():
        path.write_text(name)
    refused = r"no manifest vouches for \(0007.png, mine.npy, notes.json\): move them away"
    with pytest.raises(ValueError, match=refused):
        Artifact(tmp_path, "stage", {"value": 1}, {}, overwrite=True)
    assert {path.read_text() for path in theirs.values()} == {*theirs}
    for path in theirs.values():
        path.unlink()
    with Artifact(tmp_path, "stage", {"value": 1}, {}, overwrite=True):
        assert not (tmp_path / "x.npy").exists()


# --- spellings of a source --------------------------------------------------------------------------------


def test_another_spelling_of_a_folder_is_the_same_source(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("photos").mkdir()
    for i in range(4):
        Image.new("RGB", (20, 20), (i, 0, 0)).save(f"photos/{i}.png")
    for spelling in ("photos", "photos/", "./photos", f"{tmp_path}/photos", f"../{tmp_path.name}/photos"):
        assert cli.main(["data", f"source={spelling}", "size=16", "out=out"]) == 0, spelling
    assert read_manifest("out")["config"]["source"] == "photos"
    assert runs.state(Path("out")) == "up to date"
    Path("photos").rename("others")
    assert cli.main(["data", "source=others", "size=16", "out=out"]) == 2
    assert "source" in capsys.readouterr().err


def test_sunsets_are_no_folder_of_this_name(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    few = ["data", "size=16", "max_train=2", "max_test=1"]
    for _ in range(2):
        assert cli.main([*few, "out=sunsets"]) == 0
    Path("photos").mkdir()
    for i in range(4):
        Image.new("RGB", (20, 20), (i, 0, 0)).save(f"photos/{i}.png")
    assert cli.main([*few, "out=out"]) == 0
    Path("sunsets").rename("made")
    Path("photos").rename("sunsets")
    assert cli.main([*few, "source=./sunsets", "out=out"]) == 2
    assert "source sunsets -> " in capsys.readouterr().err


# --- interruptions ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("command", "where", "said"),
    [
        (["data", "out=out"], "anyorder.stages.execute.execute", "goes on from here"),
        (["convert", "x.pt", "out"], "anyorder.stages.execute.execute", "begins anew"),
        (["fit", "."], "anyorder.cli.fit.fit_folder", "goes on from here"),
    ],
)
def test_who_interrupts_is_told_whether_the_work_goes_on(monkeypatch, capsys, command, where, said):
    def interrupted(*_, **__):
        raise KeyboardInterrupt("begins anew")

    monkeypatch.setattr(where, interrupted)
    assert cli.main(command) == 130
    assert f"interrupted; the same command {said}" in capsys.readouterr().err


def test_a_resumed_run_counts_what_it_made_itself(tmp_path, data, monkeypatch):
    pipeline(tmp_path / "pipe")
    stage, encode, calls = TokensStage(data, tmp_path / "pipe", batch_size=2), VQModel.encode, []

    def interrupted(self, images):
        calls.append(len(images))
        if len(calls) == 3:
            raise KeyboardInterrupt
        return encode(self, images)

    monkeypatch.setattr(VQModel, "encode", interrupted)
    with pytest.raises(KeyboardInterrupt):
        execute("tokens", stage, tmp_path / "tokens")
    monkeypatch.setattr(VQModel, "encode", encode)
    execute("tokens", stage, tmp_path / "tokens")
    manifest = read_manifest(tmp_path / "tokens")
    rate, seconds = manifest["examples_per_second"], manifest["seconds"]  # rounded to a thousandth
    assert rate * seconds == pytest.approx(9 - 4, abs=0.001 * (rate + seconds))


def test_rows_know_what_an_earlier_run_has_made(tmp_path):
    def rows():
        return Rows(tmp_path, {"x": ((), np.int64)}, 5, 2, "rows")

    begun = rows()
    for some in begun:
        if some[0] == 2:
            break
        begun.append(x=some)
    assert (begun.known, rows().known) == (0, 2)


# --- own networks -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "got"),
    [
        ("own_parts:Grey", r"cannot be called without arguments \(missing a required argument: 'config'\)"),
        ("own_parts:GreyConfig", "returned a GreyConfig"),
        ("os:sep", "cannot be called without arguments .*not a callable"),
        ("os:getcwd", "returned a str"),
        ("torch.nn:Identity", "returned a Identity"),
    ],
)
def test_what_is_no_function_of_a_network_is_not_converted(tmp_path, capsys, name, got):
    assert cli.main(["convert", name, str(tmp_path / "out")]) == 2
    said = capsys.readouterr().err
    assert re.search(got, said)
    assert "give package.module:function, without arguments, that returns a tokenizer or model" in said
    assert said.count("\n") == 1
    assert not (tmp_path / "out").exists()
