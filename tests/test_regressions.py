"""Faults that were found by reading: each would come back here."""

import dataclasses
import io
import json
import os
import shutil
import subprocess
import sys
import tarfile
from contextlib import redirect_stdout
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from PIL import Image
from torch import nn

from anyorder import files
from anyorder.cli import fit as fit_command
from anyorder.cli import images as image_commands
from anyorder.cli import main as cli
from anyorder.cli import runs
from anyorder.cli.plan import plan
from anyorder.cli.planner import PlanConfig
from anyorder.data import ingest
from anyorder.data.caches import TokenSet
from anyorder.data.sources import Columns, open_source
from anyorder.evaluation import bootstrap, metrics
from anyorder.evaluation.metrics import FeatureStatistics
from anyorder.files import RowWriter, read_json
from anyorder.inference.weights import load_any_order
from anyorder.method.policy_config import PolicyConfig
from anyorder.method.sampling import Sampling
from anyorder.models import conditioning
from anyorder.models.groups import layout
from anyorder.report import evaluations
from anyorder.report.summary import report
from anyorder.settings import parse
from anyorder.stages import fit, floors
from anyorder.stages.artifacts import Artifact, require_no_artifact
from anyorder.stages.eval import EvalStage
from anyorder.stages.experiment import load_experiment
from anyorder.stages.sample import SampleStage
from anyorder.stages.tune import TuneStage
from anyorder.tokenizers import losses
from anyorder.training import memory
from anyorder.training.checkpoint import Checkpoints
from anyorder.training.config import TrainConfig
from anyorder.training.trainer import train


def photographs(folder: Path, n: int) -> None:
    folder.mkdir(parents=True)
    for i in range(n):
        Image.fromarray(np.full((16, 16, 3), 4 * i, np.uint8)).save(folder / f"{folder.name}{i}.png")


# --- what a kill leaves -----------------------------------------------------------------------------------


def test_a_kill_while_rows_are_closed_loses_none(tmp_path, monkeypatch):
    arrays = {"a": ((2,), np.int64), "b": ((), np.int64)}
    writer, real = RowWriter(tmp_path, arrays), os.replace
    writer.append(a=np.ones((9, 2)), b=np.arange(9))

    def killed(source, target):
        if str(target).endswith("b.npy"):
            raise KeyboardInterrupt
        real(source, target)

    monkeypatch.setattr(os, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        writer.close()
    monkeypatch.undo()
    again = RowWriter(tmp_path, arrays)
    assert again.rows == 9
    again.append(a=np.ones((1, 2)), b=np.array([9]))
    again.close()
    assert np.load(tmp_path / "b.npy").tolist() == list(range(10))


def test_reading_images_goes_on_after_a_kill_between_rows_and_count(tmp_path, monkeypatch):
    for name in ("a", "b"):
        photographs(tmp_path / "photos" / name, 20)
    times, real = iter([0, 31, 31]), files.write_json
    clock = type("Clock", (), {"monotonic": staticmethod(lambda: next(times, 32))})
    monkeypatch.setattr(ingest, "time", clock)

    def killed(path, value):
        if str(path).endswith("train.partial") and "count" in value:
            raise KeyboardInterrupt
        real(path, value)

    monkeypatch.setattr(files, "write_json", killed)
    with pytest.raises(KeyboardInterrupt):
        ingest.ingest(open_source(str(tmp_path / "photos")), tmp_path / "out", (16, 16))
    monkeypatch.undo()
    ingest.ingest(open_source(str(tmp_path / "photos")), tmp_path / "out", (16, 16))
    ingest.ingest(open_source(str(tmp_path / "photos")), tmp_path / "whole", (16, 16))
    for name in ("train.images.npy", "train.labels.npy", "test.images.npy"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def grown(folder: Path, steps: int, **settings) -> Artifact:
    return Artifact(folder, "train", {"train": {"steps": steps}}, {}, grows=("train.steps",), **settings)


def test_an_extension_that_did_nothing_leaves_what_was_finished(tmp_path):
    artifact = grown(tmp_path, 100)
    (tmp_path / "model.safetensors").write_text("100")
    artifact.finish()
    grown(tmp_path, 200).close()
    assert grown(tmp_path, 100).current
    # Killed at once: nothing is closed.
    code = f"import test_regressions as t; t.grown(t.Path({str(tmp_path)!r}), 200); t.os._exit(9)"
    assert subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parent).returncode == 9
    assert not (tmp_path / "manifest.json").exists()
    assert grown(tmp_path, 100).current
    assert (tmp_path / "model.safetensors").read_text() == "100"


# --- what is not ours -------------------------------------------------------------------------------------


def test_new_images_never_take_the_place_of_a_picture_of_the_user(tmp_path):
    def made(n, **settings):
        config = image_commands.SampleConfig(pipeline="fashion32", num_images=n)
        names = [*image_commands._numbered(n), *image_commands.SAMPLE_FIGURES]
        with image_commands._open("images", config, tmp_path, settings.get("overwrite", False), names) as it:
            for name in image_commands._numbered(n):
                (tmp_path / name).write_text("generated")
            it.finish(n)

    made(2)
    (tmp_path / "0003.png").write_text("the user's")
    with pytest.raises(ValueError, match=r"no manifest vouches for \(0003.png\)"):
        made(4, overwrite=True)
    assert (tmp_path / "0003.png").read_text() == "the user's"


def test_files_of_the_user_stay_in_the_folder_of_a_stage(tmp_path):
    (tmp_path / "grid.png").write_text("a cat")
    with pytest.raises(ValueError, match=r"no manifest vouches for \(grid.png\)"):
        Artifact(tmp_path, "sample", {}, {})
    (tmp_path / "grid.png").unlink()
    with Artifact(tmp_path, "sample", {}, {}):  # stopped before it is finished
        (tmp_path / "grid.png").write_text("generated")
    mine = [tmp_path / name for name in ("notes.md", "photo.png")]
    for path in mine:
        path.write_text("mine")
    with Artifact(tmp_path, "sample", {"seed": 1}, {}, overwrite=True) as artifact:
        assert not (tmp_path / "grid.png").exists()
        (tmp_path / "grid.png").write_text("generated")
        artifact.finish()
    assert files.read_manifest(tmp_path)["other_files"] == ["grid.png"]
    with Artifact(tmp_path, "sample", {"seed": 2}, {}, overwrite=True) as artifact:
        artifact.finish()
    assert [path.read_text() for path in mine] == ["mine", "mine"]


def test_data_are_not_written_into_their_source(tmp_path):
    photographs(tmp_path / "photos" / "a", 4)
    before = sorted(tmp_path.rglob("*"))
    assert cli.main(["data", f"source={tmp_path}/photos", f"out={tmp_path}/photos"]) == 2
    assert sorted(tmp_path.rglob("*")) == before


def test_images_in_the_folder_of_their_pipeline_are_up_to_date(tmp_path):
    shutil.copytree(Path(fit.folders.BUNDLED) / "fashion32", tmp_path / "pipe")
    config = image_commands.SampleConfig(pipeline=str(tmp_path / "pipe"), num_images=1)
    for current in (False, True):
        out = tmp_path / "pipe" / "images"
        with image_commands._open("images", config, out, False, ["0000.png"]) as artifact:
            assert artifact.current == current
            if not current:
                (out / "0000.png").write_text("generated")
                artifact.finish(1)


def test_copies_of_checkpoints_are_left_alone(tmp_path):
    checkpoints = Checkpoints(tmp_path, keep=2)
    for step in (1, 2):
        checkpoints.save(step, {"w": torch.ones(2)}, {})
    mine = tmp_path / "checkpoints/step-best-of-mine"
    shutil.copytree(tmp_path / "checkpoints/step-00000001", mine)
    checkpoints.save(3, {"w": torch.ones(2)}, {})
    assert mine.is_dir()
    assert Checkpoints(tmp_path).load_latest()[0] == 3


def test_the_manifest_of_a_web_page_stops_nothing(tmp_path):
    Artifact(tmp_path / "run", "data", {}, {}).finish()
    (tmp_path / "site").mkdir()
    (tmp_path / "site/manifest.json").write_text('{"name": "a web app"}')
    require_no_artifact(tmp_path / "site" / "bench.json")
    assert [path.name for path, _ in evaluations.find_artifacts([tmp_path])] == ["run"]


def test_nested_runs_are_cleaned_once(tmp_path):
    artifact = Artifact(tmp_path / "run/t", "train", {}, {})
    folder = tmp_path / "run/t/checkpoints/step-00000001"
    folder.mkdir(parents=True)
    (folder / "state.safetensors").write_text("x")
    artifact.finish()
    assert len(runs.checkpoints([tmp_path, tmp_path / "run"])) == 1


# --- trainings --------------------------------------------------------------------------------------------


def trained(folder: Path, values, steps: int = 200):
    torch.manual_seed(0)
    seen = iter(values)

    def loss(model, rows, step, generator):
        return model(torch.ones(len(rows), 2)).pow(2).mean(), {}

    config = TrainConfig(steps=steps, batch_size=2, eval_every=5, patience=2, save_every=1000)
    return train(nn.Linear(2, 1), loss, 4, config, folder, evaluate=lambda *_: {"test_nll": next(seen)})


def test_a_value_that_is_no_number_is_never_the_best(tmp_path):
    first = trained(tmp_path, [float("nan"), 3.0, 2.0, 4.0, 5.0])
    assert first.steps == 25
    assert trained(tmp_path, [], steps=400).steps == 25  # resumed: what JSON holds can be compared


def test_more_steps_after_patience_are_not_announced(tmp_path, caplog):
    assert trained(tmp_path, [1.0, 2.0, 3.0]).steps == 15
    with caplog.at_level("INFO", "anyorder"):
        assert trained(tmp_path, [], steps=400).steps == 15
    assert "extended" not in caplog.text


def test_a_report_of_a_training_that_stopped_before_its_first_logged_step(tmp_path):
    trained(tmp_path / "any-order", [1.0, 2.0, 3.0, 4.0])
    shutil.rmtree(tmp_path / "any-order/checkpoints")
    log = (tmp_path / "any-order/metrics.jsonl").read_text()
    shutil.rmtree(tmp_path / "any-order")
    artifact = Artifact(tmp_path / "any-order", "train", {"order": "random", "train": {"steps": 15}}, {})
    (tmp_path / "any-order/metrics.jsonl").write_text(log)
    artifact.finish()
    report([tmp_path], tmp_path / "report.html")
    assert (tmp_path / "report.html").is_file()


def test_advice_on_memory_keeps_its_word(monkeypatch):
    trainer = type("Trainer", (), {"config": TrainConfig(batch_size=5)})
    monkeypatch.setattr(memory, "_fits", lambda trainer, n: n <= 2)
    assert memory.advice(trainer).endswith("accumulation=2 fits")
    trainer.config = TrainConfig(batch_size=4)
    assert memory.advice(trainer).endswith("accumulation=2 fits, with steps of the same size")


# --- data -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("inside", ["", "data"])
def test_splits_inside_classes_are_found_below_a_folder_around_all(tmp_path, inside):
    for label in ("cat", "dog"):
        for split, n in (("train", 6), ("test", 3)):
            photographs(tmp_path / "given" / inside / label / split, n)
    source = open_source(str(tmp_path / "given"))
    assert source.has_test_split
    assert (source.count("train"), source.count("test")) == (12, 6)
    assert not any("/test" in item.name for item in source.items["train"])


def test_long_captions_are_no_foreign_file(tmp_path, monkeypatch):
    (tmp_path / "x.json").write_text(json.dumps(["a caption"] * 9))
    with pytest.raises(ValueError, match="too large"):
        read_json(tmp_path / "x.json", largest=10)
    assert len(read_json(tmp_path / "x.json")) == 9


class Labelled:
    """Three images of two classes; label -1 is hidden."""

    classes = ("x", "y")
    labels = (0, 1, -1)

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, i):
        return np.zeros((8, 8, 3), np.uint8), self.labels[i]


def nothing_to_train() -> dict:
    return {"test": Labelled()}


def both() -> dict:
    return {"train": Labelled(), "test": Labelled()}


class Beyond(Labelled):
    """A label that has no name."""

    labels = (0, 2)


def test_own_data_sets_say_what_is_wrong():
    found = open_source(f"{__name__}:both").items["train"]
    assert [item.label for item in found] == ["x", "y", None]
    with pytest.raises(ValueError, match="training images"):
        open_source(f"{__name__}:nothing_to_train").count("train")
    with pytest.raises(ValueError, match="label 2 of item 1 of train; classes has 2 names"):
        open_source(f"{__name__}:Beyond").items["train"]


# --- fit --------------------------------------------------------------------------------------------------


@pytest.fixture
def untimed(monkeypatch):
    """`fit` without its trial."""
    rates = dict.fromkeys(("samples-random", "orders"), 0.01)
    rates |= dict.fromkeys(("any-order", "tokenizer", "features"), 0.05)
    monkeypatch.setattr(fit, "rehearse", lambda values, facts: dict.fromkeys(values["stages"], 0.01) | rates)


def test_a_folder_with_its_own_few_test_images_can_be_fitted(tmp_path, untimed):
    for split, n in (("train", 40), ("test", 12)):
        for label in ("a", "b"):
            photographs(tmp_path / "photos" / split / label, n)
    config = fit.FitConfig(source=str(tmp_path / "photos"), time="10m", preset="tiny")
    with redirect_stdout(said := io.StringIO()):
        fit_command.fit_folder(config, tmp_path / "out", [], dry_run=True, overwrite=False)
    assert "test_fraction: 0.1" in said.getvalue()


def test_a_refused_override_is_not_kept(tmp_path, untimed):
    photographs(tmp_path / "photos" / "a", 60)
    config = fit.FitConfig(source=str(tmp_path / "photos"), time="10m", preset="tiny")
    wrong = ["any-order.train.steps=10"]
    with pytest.raises(ValueError, match="warmup"):
        fit_command.fit_folder(config, tmp_path / "out", wrong, dry_run=False, overwrite=False)
    assert not (tmp_path / "out/experiment.yaml").exists()


def test_truth_values_of_overrides_are_those_of_settings():
    given = {"False": False, "true": True, "7": 7, "5e2": 500, "010": "010", "1e-3": "1e-3", "x": "x"}
    assert {text: fit.typed(text) for text in given} == given
    assert [fit.patch_side({"model": {"multipliers": x}}) for x in ("1,2,2", [1, 2, 2])] == [4, 4]


# --- settings ---------------------------------------------------------------------------------------------


def test_many_unknown_settings_are_answered_briefly():
    with pytest.raises(ValueError, match="unknown setting") as error:
        parse(TrainConfig, {f"nothing{i}": 1 for i in range(5000)})
    assert len(str(error.value)) < 10_000


def test_seeds_are_not_negative():
    with pytest.raises(ValueError, match="seed must be >= 0, got -1"):
        SampleStage(model=Path("m"), seed=-1)


def test_endings_are_read_in_either_case(tmp_path):
    image = io.BytesIO()
    Image.new("RGB", (8, 8)).save(image, "png")
    table = pa.table({"image": [image.getvalue()] * 3, "label": ["a"] * 3})
    for path in (tmp_path / "TRAIN.PARQUET", tmp_path / "inside" / "TRAIN.PARQUET"):
        path.parent.mkdir(exist_ok=True)
        pq.write_table(table, path)
    for given in (tmp_path / "TRAIN.PARQUET", tmp_path / "inside"):
        assert open_source(str(given)).count("train") + open_source(str(given)).count("test") == 3
    with tarfile.open(tmp_path / "A.TAR", "w") as tar:
        for i in range(3):
            member = tarfile.TarInfo(f"{i}.png")
            member.size = len(image.getvalue())
            tar.addfile(member, io.BytesIO(image.getvalue()))
    source = open_source(str(tmp_path / "A.TAR"))
    read = [source.image(item.name) for split in ("train", "test") for item in source.items[split]]
    assert read == [image.getvalue()] * 3


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_captions_are_read_in_the_encodings_of_text_editors(tmp_path, encoding):
    photographs(tmp_path / "a", 3)
    lines = [
        json.dumps({"file_name": f"a{i}.png", "text": "red\u2028shoe"}, ensure_ascii=False) for i in range(3)
    ]
    (tmp_path / "a/all.jsonl").write_text("\n".join(lines), encoding=encoding)
    (tmp_path / "a/a0.txt").write_text("red shoe", encoding=encoding)
    for asked, expected in (("all.jsonl", {"red shoe"}), ("txt", {"red shoe", None})):
        source = open_source(str(tmp_path / "a"), Columns(caption=asked))
        found = {item.caption for split in ("train", "test") for item in source.items[split]}
        assert found == expected
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for name in ("a0.png", "a0.txt"):
            tar.add(tmp_path / "a" / name, name)
    (item,) = open_source(str(tmp_path / "a.tar"), Columns(caption="txt"), 0).items["train"]
    assert item.caption == "red shoe"


def test_damaged_weights_of_a_loss_are_refused(tmp_path):
    for name in ("vgg.pth", "vgg.safetensors"):
        (tmp_path / name).write_text("this is a web page " * 99)
        with pytest.raises(ValueError, match=f"{name} cannot be read as weights"):
            losses._read_weights(tmp_path / name, ["a"], "VGG-16")


def test_floors_of_mirrored_tokens_are_of_the_images_of_the_labels(tmp_path, monkeypatch):
    labels, taken = np.repeat([0, 1, 2], 4), []
    np.save(tmp_path / "labels.npy", np.repeat(1, 4))
    features = torch.arange(12.0)[:, None].repeat(1, 3)  # each image's number
    others = FeatureStatistics("x")
    others.update(features, features)
    monkeypatch.setattr(floors, "_decoder", lambda *_: None)
    monkeypatch.setattr(floors.metrics, "statistics", lambda *_, **__: others)
    monkeypatch.setattr(floors.bootstrap, "measures", lambda _, found: taken.append(found.features) or {})
    pool = SimpleNamespace(labels=np.concatenate([labels] * 2))  # mirrored copies are behind
    floors.floors(tmp_path, None, SimpleNamespace(name="x"), others, others, pool, 12)  # type: ignore[arg-type]
    assert sorted(taken[0][:, 0].tolist()) == [4, 5, 6, 7]


# --- plan -------------------------------------------------------------------------------------------------


def test_a_plan_counts_the_images_that_are_asked_for_and_no_own_model(tmp_path):
    stages = {"data": {"size": [16, 16], "max_train": 50_000}}
    (tmp_path / "x.yaml").write_text(yaml.safe_dump({"out": str(tmp_path), "stages": stages}))
    found = plan(load_experiment(tmp_path / "x.yaml"), PlanConfig(kind="h100"))
    assert found["stages"][0]["disk (GB)"] > 50_000 * 16 * 16 * 3 / 1e9
    stages = {"model": {"stage": "train", "tokens": "runs/tokens", "network": "mine:Net"}}
    (tmp_path / "x.yaml").write_text(yaml.safe_dump({"out": str(tmp_path), "stages": stages}))
    with pytest.raises(ValueError, match="none of these stages is counted: model"):
        plan(load_experiment(tmp_path / "x.yaml"), PlanConfig(kind="h100"))


def test_points_of_a_search_are_refused_before_the_first_is_sampled():
    with pytest.raises(ValueError, match="temperature must be >= 0"):
        TuneStage(model=Path("m"), features=Path("f"), temperatures=(1.0, -1.0))


# --- location heads -----------------------------------------------------------------------------------------


@pytest.fixture
def trains(tmp_path, capsys):
    """Runs `train` on tokens of a 2 x 2 grid in the folder; gives the exit status and what was printed."""
    generator = np.random.default_rng(0)
    with Artifact(tmp_path / "tokens", "tokens", {}, {}) as artifact:
        for split, n in (("train", 12), ("test", 6)):
            files.save_array(
                artifact.folder / f"{split}.tokens.npy", generator.integers(0, 4, (n, 4), np.int32)
            )
            files.save_array(artifact.folder / f"{split}.labels.npy", np.arange(n) % 2)
        facts = {"grid": [2, 2], "vocab_size": 4, "classes": ["a", "b"], "image_size": [8, 8]}
        artifact.finish(tokenizer="none", data="none", **facts)

    def run(out: str, *settings: str) -> tuple[int, str]:
        small = () if any("init=" in text for text in settings) else ("model.depth=1", "model.width=16")
        steps = ("train.steps=4", "train.batch_size=4", "train.ema=0.5", "model.heads=1"[: 99 * bool(small)])
        command = ["train", f"tokens={tmp_path}/tokens", f"out={tmp_path}/{out}", *small, *steps, *settings]
        code = cli.main([text for text in command if text])
        return code, capsys.readouterr().err

    assert run("headless")[0] == 0
    assert run("headed", "model.location=true", "order=raster")[0] == 0
    return run


@pytest.mark.parametrize(
    ("init", "settings", "message"),
    [
        (None, ["online.order=location"], "online.order=location needs a location head"),
        (None, ["online.order=entropy", "online.location=1"], "needs a location head"),
        ("headless", ["online.order=location"], "headless has none: give model.location=true"),
        ("headless", ["learn_orders=2"], "learn_orders needs a location head"),
        (
            "headless",
            ["train.patience=1", "train.watch=test_bound", "train.eval_every=2"],
            "watch=test_bound is not evaluated: choose one of train_nll, test_nll",
        ),
        ("headed", ["order=raster", "train.compile=true"], "train.compile covers models without a location"),
    ],
)
def test_what_needs_a_head_or_forbids_it_is_refused_before_the_first_step(
    trains, tmp_path, init, settings, message
):
    code, errors = trains("out", *([f"init={tmp_path}/{init}"] if init else []), *settings)
    assert code == 2
    assert message in errors
    assert "example/s" not in errors
    assert not (tmp_path / "out" / "metrics.jsonl").exists()


def test_a_head_without_orders_to_learn_stays_as_it_is(trains, tmp_path):
    """Weight decay would shrink it."""
    assert trains("further", f"init={tmp_path}/headed", "train.weight_decay=1")[0] == 0
    before, after = (load_any_order(tmp_path / name).state_dict() for name in ("headed", "further"))
    heads = [name for name in before if name.startswith("location.")]
    assert heads
    assert all(torch.equal(before[name], after[name]) for name in heads)
    assert not torch.equal(before["head.weight"], after["head.weight"])
    assert "test_bound" in read_json(tmp_path / "further/manifest.json")


@pytest.mark.parametrize(
    ("settings", "bounded"),
    [({}, True), ({"per_step": 2}, True), ({"per_step": 2, "min_distance": 2.0}, False),
     ({"per_step": 2, "entropy_limit": 1e-6}, False)],
)  # fmt: skip
def test_bounds_of_a_head_are_of_the_steps_that_are_sampled(trains, tmp_path, monkeypatch, settings, bounded):
    code, _ = trains("grouped", "model.location=true", "order=raster", "groups=4,2")
    assert code == 0
    stage = EvalStage(samples=Path("s"), features=Path("f"), model=tmp_path / "grouped")
    made = {"config": {"policy": dataclasses.asdict(PolicyConfig("location", **settings))}}
    found = stage._likelihood(made, TokenSet(tmp_path / "tokens", "test"))
    assert (found.get("bound") is not None) == bounded


# --- few images ---------------------------------------------------------------------------------------------


def test_intervals_of_few_images_are_numbers():
    """A resample of one image alone has no KID."""
    torch.manual_seed(0)
    sets = []
    for n in (4, 5, 5):
        one = FeatureStatistics("x")
        one.update(torch.randn(n, 3), torch.randn(n, 2))
        sets.append(one)
    for difference in bootstrap.compare(*sets).values():
        assert all(np.isfinite([difference.low, difference.high, *difference.draws]))
    few = FeatureStatistics("x")
    few.update(torch.randn(3, 3), torch.randn(3, 2))
    with pytest.raises(ValueError, match="need more than 3 images of each set, got 3"):
        bootstrap.compare(sets[0], sets[1], few)
    with pytest.raises(ValueError, match="need more than 3 images of each set, got 3"):
        bootstrap.measures(sets[0], few)


def test_parts_of_the_inception_score_hold_several_images():
    extractor = SimpleNamespace(name="x", dim=3, num_classes=2, metric="FD")
    sets = []
    for n in (8, 8):
        one = FeatureStatistics("x")
        one.update(torch.randn(n, 3), 9 * torch.randn(n, 2))
        sets.append(one)
    found = metrics.evaluate(extractor, *sets)
    assert found["inception_score"] > 1
    assert any("Inception Score of 4 parts of 2 images" in note for note in found["notes"])


# --- values out of range ------------------------------------------------------------------------------------


def test_values_that_would_overflow_are_refused():
    with pytest.raises(ValueError, match="temperature must be 0, or at least 1e-6"):
        Sampling(temperature=1e-39)
    with pytest.raises(ValueError, match=r"seed must be below 2\*\*63"):
        TrainConfig(seed=2**64)
    with pytest.raises(ValueError, match="sum to 4 positions"):
        layout([1] * 5, 4, torch.device("cpu"))


def test_labels_of_any_whole_type_are_taken_and_others_refused():
    for dtype in (torch.uint8, torch.int16, torch.int64):
        found = conditioning.read_condition(
            torch.tensor([0, 1], dtype=dtype), 2, [2], torch.device("cpu"), None
        )
        assert found.tolist() == [[0], [1]]
    with pytest.raises(ValueError, match="labels must have shape"):
        conditioning.read_condition(torch.tensor([0.5, 1.0]), 2, [2], torch.device("cpu"), None)


def test_a_last_evaluation_that_is_not_finite_leaves_no_older_value(tmp_path):
    values = iter([1.0, float("nan")])
    config = TrainConfig(steps=2, batch_size=1, eval_every=1, warmup=0)
    model = nn.Linear(1, 1)
    result = train(
        model, lambda m, *_: (m(torch.ones(1, 1)).sum(), {}), 2, config, tmp_path,
        evaluate=lambda *_: {"test_nll": next(values)},
    )  # fmt: skip
    assert "test_nll" not in result.metrics
