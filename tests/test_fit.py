"""`anyorder fit`: what is planned for which images, machine and time; and a whole run on few images."""

import dataclasses
import shutil
from importlib import resources

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from anyorder.cli import fit as command
from anyorder.cli.main import main
from anyorder.data.caches import ImageSet, TokenSet
from anyorder.files import read_json, read_manifest
from anyorder.inference.weights import load_tokenizer
from anyorder.method.policy_config import PolicyConfig
from anyorder.stages import fit
from anyorder.stages.execute import execute
from anyorder.stages.experiment import load_experiment
from anyorder.stages.orders import OrdersStage
from anyorder.stages.train import TrainStage

pytestmark = pytest.mark.timeout(600)  # a whole run, on machines that do other things, too
PHOTOS = fit.Facts(486, 54, 60, classes=6, side=64, cores=2, bf16=True, gpu=0)
RATES = {
    "data": 0.001, "tokenizer": 0.1, "features": 0.02, "tokens": 0.002, "any-order": 0.3, "orders": 0.05,
    "samples-random": 0.05, "samples-ordered": 0.1, "eval-random": 0.01,
}  # fmt: skip
PRESETS = ("tiny", "small", "base")


def preset(name):
    return yaml.safe_load((resources.files("anyorder.stages") / f"{name}.yaml").read_text())


def planned(facts=PHOTOS, name="small", minutes=30, given=None, rates=RATES):
    config = fit.FitConfig(source="photos")
    values = fit.put(fit.adapt(preset(name), facts, config), given or {})
    return fit.fill(values, rates, facts, 60 * minutes, list(given or {}))


def steps(values):
    return {name: s["train"]["steps"] for name, s in values["stages"].items() if "train" in s}


@pytest.mark.parametrize("name", PRESETS)
def test_generating_costs_at_most_twice_a_fixed_order(name):
    """172 ratings for 64 positions were measured at 1.6 times."""
    stages = load_experiment(resources.files("anyorder.stages") / f"{name}.yaml").stages
    positions = {"tiny": 64, "small": 64, "base": 256}[name]
    for _, stage in stages.values():
        policy = getattr(stage, "policy", None)
        if isinstance(policy, PolicyConfig) and not isinstance(stage, OrdersStage):
            assert policy.evaluations(positions) <= 172 * positions / 64, policy.label


# --- presets ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PRESETS)
def test_presets_run_as_they_are_and_have_the_same_stages(name):
    with resources.as_file(resources.files("anyorder.stages") / f"{name}.yaml") as path:
        experiment = load_experiment(path, ["data.source=elsewhere"])
    assert list(experiment.stages) == list(preset("tiny")["stages"])


@pytest.mark.parametrize(
    ("changes", "seconds", "name"),
    [
        ({}, 7200, "small"),
        ({}, 1800, "small"),
        ({}, 1200, "tiny"),
        ({"cores": 1}, 1800, "tiny"),
        ({"cores": 8}, 600, "small"),
        ({"train": 50}, 7200, "tiny"),
        ({"side": 32}, 7200, "tiny"),
        ({"gpu": 24}, 600, "small"),
        ({"gpu": 24, "side": 256, "train": 5000}, 3600, "base"),
        ({"side": 256, "train": 5000}, 36000, "small"),
    ],
)
def test_the_preset_follows_images_machine_and_time(changes, seconds, name):
    found, why = fit.choose_preset(dataclasses.replace(PHOTOS, **changes), seconds)
    assert found == name
    assert why


# --- settings that follow from the images -----------------------------------------------------------------


def test_few_images_are_mirrored_and_dropped_out():
    few, many = planned(), planned(dataclasses.replace(PHOTOS, train=30_000))
    assert few["stages"]["tokens"]["mirror"]
    assert not many["stages"]["tokens"]["mirror"]
    dropout = [values["stages"]["any-order"]["model"]["dropout"] for values in (few, many)]
    assert dropout == [0.2, 0.0]
    assert few["stages"]["raster"]["model"] == few["stages"]["any-order"]["model"]


def test_images_are_not_enlarged_much():
    stages = [planned(dataclasses.replace(PHOTOS, side=side))["stages"] for side in (60, 40)]
    assert [stage["data"]["size"] for stage in stages] == [[64, 64], [32, 32]]
    patches = [stage["data"]["size"][0] // fit.patch_side(stage["tokenizer"]) for stage in stages]
    assert patches == [8, 8]


def test_one_class_has_no_features():
    assert "features" in planned()["stages"]
    left = planned(dataclasses.replace(PHOTOS, classes=0))["stages"]
    assert not [name for name in left if name.startswith(("features", "eval"))]


def test_batches_are_no_larger_than_a_quarter_of_the_images():
    tiny = planned(dataclasses.replace(PHOTOS, train=40), "tiny")["stages"]
    assert {stage["train"]["batch_size"] for stage in tiny.values() if "train" in stage} == {10}


def test_overrides_name_a_stage():
    with pytest.raises(ValueError, match="did you mean 'any-order'"):
        fit.put(preset("tiny"), {"any-ordr.train.steps": 3})


def test_experiments_are_copied():
    values = preset("small")
    fit.put(values, {"raster.train.steps": 1, "raster.model.depth": 1})
    assert values == preset("small")
    changed = fit.put(values, {"raster.model.depth": 1})["stages"]
    assert (changed["raster"]["model"]["depth"], changed["any-order"]["model"]["depth"]) == (1, 4)


def test_texts_beside_the_images_become_captions(tmp_path):
    folder = photos(tmp_path / "photos", [""], 12)
    for i in range(11):
        (folder / f"{i}.txt").write_text(f"number\n{i} ")
    facts = fit.look(fit.FitConfig(source=str(folder)))
    assert facts.captions
    values = planned(facts, "tiny")
    assert values["stages"]["data"]["captions"] == "txt"
    times = dict.fromkeys(values["stages"], 1.0)
    assert "one class, captions" in command.describe(values, times, facts, ("tiny", ""))[0]
    typed = ["data", f"source={folder}", "size=16,16", "test_fraction=0.3", f"out={tmp_path}/data"]
    assert main([*typed, "captions=txt"]) == 0
    texts = [read_json(tmp_path / "data" / f"{split}.captions.json") for split in ("train", "test")]
    assert {*texts[0], *texts[1]} == {"", *(f"number {i}" for i in range(11))}
    assert not read_manifest(tmp_path / "data")["ignored"]["reasons"].get("text beside the images")
    assert main([*typed, "captions=txt"]) == 0
    (folder / "3.txt").write_text("three")
    assert main([*typed, "captions=txt"]) == 2  # it has changed
    assert main([*typed, "captions=text"]) == 2


# --- time -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("text", "seconds"), [("90s", 90), ("20m", 1200), ("1h30m", 5400), ("2h", 7200)])
def test_times(text, seconds):
    assert fit.seconds_of(text) == seconds


@pytest.mark.parametrize("text", ["", "20", "m", "0m", "20 minutes", "1.5h"])
def test_other_times_are_refused(text):
    with pytest.raises(ValueError, match="20m, 90s or 1h30m"):
        fit.seconds_of(text)


@pytest.mark.parametrize(("images", "minutes"), [(486, 8), (486, 20), (4000, 8), (4000, 30), (4000, 90)])
def test_the_plan_takes_the_time(minutes, images):
    facts = dataclasses.replace(PHOTOS, train=images)
    total = sum(fit.expected(planned(facts, minutes=minutes), RATES, facts).values())
    assert 0.85 * 60 * minutes < total < 1.05 * 60 * minutes


def test_raster_order_is_trained_a_third_as_long_as_the_others_together():
    found = steps(planned())
    assert found["raster"] == pytest.approx((found["any-order"] + found["ordered"]) / 3, rel=0.02)


def test_few_images_are_not_repeated_for_ever():
    found = steps(planned(minutes=6000))
    batches = {name: planned()["stages"][name]["train"]["batch_size"] for name in found}
    assert found == {name: int(fit.PASSES[name] * 486 / batches[name]) for name in found}


def test_what_is_given_stays_and_the_rest_shares_the_time():
    few = planned(given={"raster.train.steps": 50, "samples-raster.num_images": 20})
    assert steps(few)["raster"] == 50
    assert few["stages"]["samples-raster"]["num_images"] == 20
    assert steps(few)["any-order"] > steps(planned())["any-order"]


def test_evaluations_take_a_tenth_of_a_short_training():
    settings = planned(minutes=8)["stages"]["any-order"]
    cost = fit.evaluation_steps("any-order", settings, PHOTOS)
    assert settings["train"]["eval_every"] >= min(settings["train"]["steps"], round(cost / fit.EVALUATED))


def test_too_little_time_is_refused_with_a_time_that_is_enough():
    with pytest.raises(ValueError, match=r"1 min are too few: give time=(\d+)m") as caught:
        planned(minutes=1)
    enough = int(str(caught.value).split("time=")[1].split("m")[0])
    assert min(steps(planned(minutes=enough)).values()) >= fit.LEAST
    assert enough < 8


def test_who_gives_all_steps_decides_the_time():
    given = {f"{name}.train.steps": 1000 for name in fit.SHARES}
    assert steps(planned(minutes=1, given=given)) == dict.fromkeys(fit.SHARES, 1000)


def test_the_rehearsal_is_short():
    short = fit.rehearsal(planned(), 24)
    assert set(steps(short).values()) == {24}
    assert short["stages"]["data"]["max_train"] == 64
    assert "raster" not in short["stages"]


def test_the_plan_says_why_and_warns():
    values = planned()
    expected = fit.expected(values, RATES, PHOTOS)
    lines = command.describe(values, expected, PHOTOS, ("small", "enough time"))
    text = "\n".join(lines)
    assert "486 to train, 54 to stop early, 60 held out; 6 classes" in text
    assert "preset small: enough time" in text
    assert "warning: 486 images are few" in text
    assert f"{sum(expected.values()) / 60:.1f} min" in lines[-1]
    assert "64 pixels, used at 64x64" in lines[0]
    other = fit.put(values, {"data.size": "48"})
    assert "used at 48" in command.describe(other, expected, PHOTOS, ("small", ""))[0]
    rare, times = dataclasses.replace(PHOTOS, classes=40), dict.fromkeys(values["stages"], 1.0)
    assert "12 images a class" in "\n".join(command.describe(values, times, rare, ("small", "")))


# --- a whole run ------------------------------------------------------------------------------------------


def photos(folder, classes=("dark", "light"), each=30):
    noise = np.random.default_rng(0)
    for number, name in enumerate(classes):
        (folder / name).mkdir(parents=True)
        for i in range(each):
            pixels = noise.integers(0, 100, (16, 16, 3)) + 150 * number
            Image.fromarray(pixels.astype(np.uint8)).save(folder / name / f"{i}.png")
    return folder


SMALL = [
    *(
        f"{name}.model.{key}"
        for name in ("raster", "any-order")
        for key in ("depth=1", "width=24", "heads=1")
    ),
    *(f"samples-{name}.num_images=8" for name in ("raster", "random", "ordered")),
    *(f"{name}.train.steps=3" for name in fit.SHARES),
    *(f"{name}.train.{key}=1" for name in fit.SHARES for key in ("warmup", "eval_every", "save_every")),
]


@pytest.fixture(scope="module")
def fitted(tmp_path_factory):
    folder = tmp_path_factory.mktemp("fit")
    typed = ["fit", str(photos(folder / "photos")), "--time", "2m", f"out={folder}/run", *SMALL]
    assert main(typed) == 0
    return typed, folder / "run"


def test_a_folder_becomes_a_pipeline_a_report_and_an_animation(fitted, capsys):
    _, out = fitted
    assert read_manifest(out / "data")["classes"] == ["dark", "light"]
    for name in ("pipeline/pipeline.json", "report.html", "samples-ordered/generation.webp"):
        assert (out / name).is_file()
    assert main(["sample", f"pipeline={out}/pipeline", "num_images=2", f"out={out}/images"]) == 0


def test_the_same_command_goes_on_with_the_stored_plan(fitted, capsys, monkeypatch):
    typed, out = fitted
    monkeypatch.setattr(fit, "rehearse", None)
    shutil.rmtree(out / "pipeline")
    assert main(typed) == 0
    said = capsys.readouterr().out
    assert said.startswith("images: ")
    assert f"going on with this plan, which is {out}/experiment.yaml" in said
    assert "the model's order" in said
    assert "raster order" in said
    assert "next: anyorder sample pipeline=" in said
    assert (out / "pipeline" / "manifest.json").is_file()


def test_a_plan_for_other_images_is_kept(fitted, capsys, tmp_path):
    _, out = fitted
    before = (out / "experiment.yaml").read_text()
    assert main(["fit", str(tmp_path), f"out={out}"]) == 2
    assert "choose another out=" in capsys.readouterr().err
    assert (out / "experiment.yaml").read_text() == before


def test_a_dry_run_shows_the_file_and_writes_nothing(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(fit, "rehearse", lambda values, facts: RATES)
    typed = [
        "fit",
        str(photos(tmp_path / "photos", ["all"])),
        "--time",
        "5m",
        f"out={tmp_path}/run",
        "--dry-run",
    ]
    assert main(typed) == 0
    text = capsys.readouterr().out
    assert "is not used" not in text
    values = yaml.safe_load(text)
    assert values["stages"]["data"]["source"] == str(tmp_path / "photos")
    assert "features" not in values["stages"]
    assert not (tmp_path / "run").exists()
    typed[3] = "5h"
    typed.append("data.size=16")
    assert main(typed) == 0
    text = capsys.readouterr().out
    assert "# the rest of 300 min is not used" in text
    assert "used at 16\n" in text
    assert "# model: patches of 4 x 4 pixels, 3 blocks of width 96" in text


def test_what_is_wrong_is_said_at_once(tmp_path, capsys):
    folder = str(photos(tmp_path / "photos"))
    for typed, message in [
        ([], "give one folder"),
        ([folder, "any-ordr.train.steps=3"], "did you mean 'any-order'"),
        ([folder, "time=soon"], "20m"),
        ([folder, "preset=huge"], "'tiny' | 'small' | 'base'"),
        ([str(tmp_path / "nothing" / "here")], "no such file or folder"),
    ]:
        assert main(["fit", *typed, f"out={tmp_path}/run"]) == 2
        assert message in capsys.readouterr().err
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "a.png").write_bytes(b"no image")
    assert main(["fit", str(tmp_path / "broken")]) == 2
    assert "broken can be read: look at them" in capsys.readouterr().err


# --- what fit uses of the stages --------------------------------------------------------------------------


def test_mirrored_tokens_are_those_of_mirrored_images(fitted):
    _, out = fitted
    images, tokens = ImageSet(out / "data"), TokenSet(out / "tokens")
    n = len(images)
    assert len(tokens) == 2 * n
    assert len(TokenSet(out / "tokens", "test")) == len(ImageSet(out / "data", "test"))
    found = load_tokenizer(out / "tokenizer").encode(images.batch(range(n))[0].flip(-1))
    mirrored, labels = tokens.batch(range(n, 2 * n))
    assert (found == mirrored).float().mean() > 0.99  # batches of other sizes round differently
    assert torch.equal(labels, tokens.batch(range(n))[1])


def test_the_bundled_tokenizer_is_fine_tuned(fitted, tmp_path, capsys):
    _, out = fitted
    assert read_json(out / "tokenizer" / "config.json")["config"]["channels"] == 16
    assert {"validation_psnr"} <= set(read_manifest(out / "tokenizer")["config"]["train"].values())
    command = ["tokenizer", f"data={out}/data", f"init={out}/raster", f"out={tmp_path}/t", "train.steps=1"]
    assert main(command) == 2
    assert "was made by anyorder train" in capsys.readouterr().err


@pytest.mark.parametrize(("orders_as", "images"), [("own", 4), ("class_mean", 88)])
def test_class_orders_train_on_all_images(fitted, tmp_path, monkeypatch, orders_as, images):
    """The orders of the classes are known for images whose own orders were not extracted."""
    _, out = fitted
    typed = ["orders", f"model={out}/any-order", f"tokens={out}/tokens", "limit=4", "test_limit=2"]
    assert main([*typed, f"out={tmp_path}/orders"]) == 0

    def stop(model, loss, examples, *_, **__):
        raise ValueError(f"{examples} images")

    monkeypatch.setattr("anyorder.stages.train.train", stop)
    stage = TrainStage(
        out / "tokens", orders=tmp_path / "orders", orders_as=orders_as, init=out / "any-order"
    )
    with pytest.raises(ValueError, match=f"^{images} images"):
        execute("train", stage, tmp_path / "m")


def test_fit_is_refused_in_several_processes(monkeypatch, capsys, tmp_path):
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert main(["fit", str(tmp_path), f"out={tmp_path / 'out'}"]) == 2
    assert "start it without torchrun" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_classes_of_one_image_each_are_refused_before_any_work(tmp_path, capsys):
    photos(tmp_path / "photos", classes=[f"c{i}" for i in range(20)], each=1)
    assert main(["fit", str(tmp_path / "photos"), "--time", "1m", f"out={tmp_path}/out"]) == 2
    assert "classes and only" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
