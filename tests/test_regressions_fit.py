"""Faults of `fit`, and of the data that people bring to it, that were found in use."""

import io
import shutil
from contextlib import redirect_stdout

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from anyorder.cli import fit as command
from anyorder.cli.main import main
from anyorder.data.images import BadImage, load_image
from anyorder.data.ingest import _validation_rows
from anyorder.data.sources import FolderSource, open_source
from anyorder.families import is_own
from anyorder.stages import experiment, fit


def photos(folder, count, classes=("a", "b")):
    noise = np.random.default_rng(0)
    for name in classes:
        (folder / name).mkdir(parents=True)
        for i in range(count):
            pixels = noise.integers(0, 255, (32, 32, 3), np.uint8)
            Image.fromarray(pixels).save(folder / name / f"{i}.png")
    return folder


@pytest.fixture
def untimed(monkeypatch):
    """`fit` without its trial."""
    rates = dict.fromkeys(("samples-random", "orders"), 0.01)
    rates |= dict.fromkeys(("any-order", "tokenizer", "features"), 0.05)
    monkeypatch.setattr(fit, "rehearse", lambda values, facts: dict.fromkeys(values["stages"], 0.01) | rates)


@pytest.fixture
def runs(monkeypatch):
    """Folders that experiments would have written to."""
    found = []
    monkeypatch.setattr(experiment.Experiment, "run", lambda self, overwrite=False: found.append(self.out))
    monkeypatch.setattr(command.summary, "report", lambda *_: None)
    monkeypatch.setattr(command, "comparison", lambda out: "")
    return found


def planned(folder, *overrides):
    """What `fit --dry-run` prints."""
    config = fit.FitConfig(source=str(folder), time="10m", preset="tiny")
    with redirect_stdout(said := io.StringIO()):
        command.fit_folder(config, folder.parent / "out", overrides, dry_run=True, overwrite=False)
    return said.getvalue()


# --- the plan and where it is -----------------------------------------------------------------------------


def test_a_copied_plan_works_in_the_folder_that_was_asked_for(tmp_path, untimed, runs):
    typed = ["fit", str(photos(tmp_path / "photos", 30)), "time=10m"]
    assert main([*typed, f"out={tmp_path}/a"]) == 0
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    assert main([*typed, f"out={tmp_path}/b", "overwrite=true"]) == 0
    assert runs == [tmp_path / "a", tmp_path / "b"]


@pytest.mark.parametrize("stages", ["images: {stage: data}", "data: {}", "data: {stage: features, data: x}"])
def test_an_own_experiment_is_no_plan(tmp_path, capsys, stages):
    (tmp_path / "experiment.yaml").write_text(f"stages: {{{stages}}}\n")
    assert main(["fit", "photos", f"out={tmp_path}"]) == 2
    assert (
        "experiment.yaml is no plan of anyorder fit, and is kept: choose another" in capsys.readouterr().err
    )


def test_one_bad_file_does_not_end_the_rehearsal(tmp_path):
    folder = photos(tmp_path / "photos", 30)
    config = fit.FitConfig(source=str(folder))
    facts = fit.look(config)
    source = open_source(folder, test_fraction=facts.test_fraction)
    names = [item.name for item in source.items["train"]]
    for i in _validation_rows(source, 1):  # which alone was in the rehearsal
        (folder / names[i]).write_bytes(b"")
    short = fit.rehearsal(fit.adapt(fit.preset("tiny"), facts, config), 8)
    short["stages"] = {"data": short["stages"]["data"]}
    path = tmp_path / "rehearsal.yaml"
    path.write_text(fit.as_yaml({**short, "out": str(tmp_path / "out")}))
    experiment.load_experiment(path).run()
    assert short["stages"]["data"]["max_validation"] == facts.validation == 4


def test_bad_files_that_come_first_do_not_end_the_look(tmp_path):
    folder = photos(tmp_path / "photos", 30)
    (folder / "0").mkdir()
    for i in range(70):
        (folder / f"0/{i}.png").write_bytes(b"")
    assert fit.look(fit.FitConfig(source=str(folder))).side == 32


def test_one_caption_is_enough_wherever_it_is(tmp_path):
    folder = photos(tmp_path / "photos", 30)
    (folder / "b/0.txt").write_text("  \n")
    assert not fit.look(fit.FitConfig(source=str(folder))).captions, "it is blank"
    typed = ["data", f"source={folder}", "size=16", "captions=txt", "max_train=2", f"out={tmp_path}/data"]
    assert main(typed) == 2
    for i in range(1, 30):
        (folder / f"b/{i}.txt").write_text("words")
    assert fit.look(fit.FitConfig(source=str(folder))).captions
    assert main([*typed, "overwrite=true"]) == 0


def test_another_report_html_is_kept(tmp_path, runs, untimed, capsys):
    folder, page = photos(tmp_path / "photos", 30), tmp_path / "out" / "report.html"
    page.parent.mkdir()
    page.write_text("mine")
    (tmp_path / "x.yaml").write_text("stages: {data: {source: sunsets}}")
    for typed in (["fit", str(folder), "--time", "10m"], ["run", str(tmp_path / "x.yaml")]):
        assert main([*typed, f"out={page.parent}"]) == 2
        assert f"{page} is no report of anyorder, and is kept" in capsys.readouterr().err
    assert (page.read_text(), runs) == ("mine", [])


def test_a_file_is_no_output_folder(tmp_path, capsys):
    (tmp_path / "file").write_text("mine")
    for out in ("file", "file/below"):
        assert main(["data", "source=sunsets", "size=16", "max_train=2", f"out={tmp_path}/{out}"]) == 2
        assert f"{tmp_path}/file is a file, not a folder: choose another out=" in capsys.readouterr().err


def test_without_test_images_nothing_is_decoded(tmp_path, monkeypatch, capsys):
    folder = photos(tmp_path / "photos", 3)
    monkeypatch.setattr("anyorder.stages.data.ingest", pytest.fail)
    assert main(["data", f"source={folder}", "size=16", "test_fraction=0", f"out={tmp_path}/data"]) == 2
    assert "has no test images, which later stages need: give test_fraction" in capsys.readouterr().err


def test_of_few_images_two_stop_early(tmp_path):
    assert fit.look(fit.FitConfig(source=str(photos(tmp_path / "photos", 6)))).validation == 2


@pytest.mark.parametrize("count", [1, 2])
def test_too_few_images_are_said_to_be_too_few(tmp_path, capsys, count):
    assert main(["fit", str(photos(tmp_path / "photos", count, ["a"])), f"out={tmp_path}/out"]) == 2
    said = capsys.readouterr().err
    assert "photos has too few images" in said
    assert "add some, 2 to train are needed" in said
    assert "max_validation" not in said


def test_the_plan_counts_what_the_overrides_leave(tmp_path, untimed):
    folder = photos(tmp_path / "photos", 50)
    counts = {}
    for text in (
        "",
        "data.max_validation=20",
        "data.max_train=20",
        "data.max_test=3",
        "data.test_fraction=0.5",
    ):
        words = planned(folder, *([text] if text else [])).split()
        counts[text.partition("=")[0]] = [int(words[i].replace(",", "")) for i in (2, 5, 9)]
    train, validation, test = counts.pop("")
    found = train + validation
    halves = counts.pop("data.test_fraction")
    assert counts == {
        "data.max_validation": [found - 20, 20, test],
        "data.max_train": [20, validation, test],
        "data.max_test": [train, validation, 3],
    }
    assert sum(halves) == found + test
    assert halves[2] > 30
    with pytest.raises(ValueError, match=rf"data.max_validation={found} must be below the {found} to train"):
        planned(folder, f"data.max_validation={found}")


def test_the_plan_shows_captions_only_where_they_are_kept(tmp_path, untimed):
    folder = photos(tmp_path / "photos", 30)
    (folder / "a/1.txt").write_text("a caption")
    assert ", captions" in planned(folder)
    assert ", captions" not in planned(folder, "data.captions=null")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("any-order.train.steps=abc", "stage 'any-order': train.steps='abc': expected int"),
        ("any-order.train.batch_size=0", "stage 'any-order': train: batch_size must be >= 1, got 0"),
        ("samples-raster.num_images=null", "stage 'samples-raster': num_images='null': expected int"),
        ("data.max_train=abc", "max_train='abc': expected int"),
    ],
)
def test_a_bad_override_is_named_before_anything_is_timed(tmp_path, monkeypatch, override, message):
    monkeypatch.setattr(fit, "rehearse", None)
    with pytest.raises(ValueError, match=message):
        planned(photos(tmp_path / "photos", 30), override)


def test_a_new_tokenizer_and_free_batches_can_be_planned(tmp_path, untimed):
    folder = photos(tmp_path / "photos", 30)
    assert "patches of 4 x 4 pixels" in planned(folder, "tokenizer.init=null")
    more = "tokenizer.model.multipliers=1,2,2,2"
    assert "patches of 8 x 8 pixels" in planned(folder, "tokenizer.init=null", more)
    values = yaml.safe_load(planned(folder, "orders.batch_size=null"))
    assert fit.rehearsal(values, 8)["stages"]["orders"]["limit"] == 64


# --- own data sets ----------------------------------------------------------------------------------------


class Items(list):
    """A data set, and the name of its classes."""


def items_of(monkeypatch, *items):
    monkeypatch.setitem(globals(), "made", lambda: Items(items))
    return open_source(f"{__name__}:made", test_fraction=0)


GREY = torch.full((3, 8, 8), 0.5)


def test_labels_may_be_tensors_or_numbers_of_numpy(monkeypatch):
    labels = (torch.tensor(0), torch.tensor([1]), np.int64(2), 3, "4")
    assert items_of(monkeypatch, *((GREY, label) for label in labels)).classes() == [*"01234"]
    with pytest.raises(ValueError, match="of item 0 of train: give a name or one whole number"):
        items_of(monkeypatch, (GREY, torch.tensor([0, 1]))).classes()


def test_the_first_item_does_not_decide_for_all(monkeypatch):
    source = items_of(monkeypatch, (GREY, None, None), (GREY, "x", "a caption"))
    assert (source.columns.label, source.columns.caption) == ("label", "caption")
    assert source.classes() == ["x"]
    source = items_of(monkeypatch, GREY)
    assert (source.columns.label, source.columns.caption) == (None, None)


def test_floats_that_overshoot_a_little_are_clamped(monkeypatch):
    over = GREY.clone()
    over[:, 0, 0], over[:, 0, 1] = 1.1, -0.1
    mean = load_image(GREY.movedim(0, -1).numpy()).mean()
    for image in (over, over.movedim(0, -1).numpy(), GREY.clone().requires_grad_()):
        assert load_image(items_of(monkeypatch, image).image("train 0")).mean() == pytest.approx(mean, abs=1)


@pytest.mark.parametrize("image", [GREY - 1.5, GREY * 510, GREY * torch.nan])
def test_other_floats_are_refused(monkeypatch, image):
    found = items_of(monkeypatch, image).image("train 0")
    assert isinstance(found, BadImage)
    assert "values outside [0, 1]: a tensor of floats from" in str(found)


def test_arrays_and_whole_numbers_keep_their_ranges(monkeypatch):
    for image in (np.full((8, 8, 3), 200.0), torch.full((3, 8, 8), 200, dtype=torch.uint8)):
        assert load_image(items_of(monkeypatch, image).image("train 0")).max() == 200


def test_a_folder_that_is_there_is_no_module(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert is_own("data", "trip:2020")
    photos(tmp_path / "trip:2020", 3)
    assert not is_own("data", "trip:2020")
    assert isinstance(open_source("trip:2020"), FolderSource)
