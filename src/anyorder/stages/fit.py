"""`anyorder fit`: an experiment file that fits the images, the machine and the time.

Only `look` and `rehearse` do anything; the plan is made of pure functions of what they found.
"""

import contextlib
import dataclasses
import io
import json
import logging
import math
import re
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any, Literal

import torch
import yaml

from anyorder import files
from anyorder.contracts import require
from anyorder.data import images, sources
from anyorder.data.classes import index_of
from anyorder.inference import folders, weights
from anyorder.inference.device import device, native_bf16
from anyorder.settings import parse
from anyorder.stages.experiment import STAGES, load_experiment

Values = dict[str, Any]
SHARES = {"tokenizer": 16, "features": 4, "any-order": 45, "ordered": 15, "raster": 20}
"""How trainings share the time that the rest leaves. Raster is best after a sixth of the steps that any-order
and ordered need together (docs/results/few.md); here it gets a third."""
GENERATORS = ("raster", "any-order", "ordered")
PASSES = {"tokenizer": 60, "features": 400, "raster": 60, "any-order": 240, "ordered": 100}
"""How often each training repeats the images at most; on 43 and on 492 images all were best well before."""
EVALUATED = 0.1
"""Evaluations of a training: after each tenth of it, or so that they take a tenth of its time."""
FEW, LEAST = 500, 20
"""Training images below which a warning says what to expect, and steps below which nothing is learnt."""
PER_STAGE = 1.5
"""Seconds that a stage takes beside its work: loading, checkpoints, figures."""


@dataclasses.dataclass(kw_only=True)
class FitConfig:
    """A model of your own images: plan, training, samples, comparison and pipeline folder.

    Settings of the experiment are given by stage, for example `any-order.train.steps=500` or
    `tokens.mirror=false` where left and right must not be exchanged.
    """

    source: str
    """A folder of images (sub-folders are classes), parquet files, or a Hugging Face data set id."""
    time: str = ""
    """Time to spend, such as 20m or 1h30m; by default 30m on a CPU and 1h on a GPU."""
    preset: Literal["tiny", "small", "base"] | None = None
    """Size of images and models: tiny (32 pixels, minutes), small (64 pixels, from half an hour on two cores)
    or base (128 pixels, for a GPU); by default by machine, time and images."""
    label: str | None = None
    """Column of the class (parquet and Hugging Face)."""
    captions: str | None = None
    """Column of a text about each image (parquet and Hugging Face); texts in a.txt beside a.jpg are found."""


@dataclasses.dataclass(frozen=True)
class Facts:
    """What the plan depends on."""

    train: int  # images to train on
    validation: int  # cut from these, to stop early
    test: int  # the source's test split, or a share that is held out
    classes: int
    side: int  # pixels, median of the shorter sides
    cores: int
    bf16: bool
    gpu: int  # GiB of memory, 0 without a GPU
    captions: bool = False  # in text files beside the images
    test_fraction: float = 0.1


def seconds_of(text: str) -> int:
    """Seconds of a text such as 90s, 20m or 1h30m; a ValueError for others."""
    found = re.fullmatch(r"(?:(\d+)h)?(?:(\d+)m)?(?:(\d+)s)?", text)
    parts = found.groups() if found else ()
    seconds = sum(int(part or 0) * unit for part, unit in zip(parts, (3600, 60, 1), strict=False))
    require(seconds > 0, f"time must be such as 20m, 90s or 1h30m, got '{text}'")
    return seconds


# --- what there is ----------------------------------------------------------------------------------------


def look(config: FitConfig, overrides: Sequence[str] = ()) -> Facts:
    """Count the images and their classes, measure some, and look at the machine.

    `overrides` of the stage data say what is counted. Errors as of `open_source`, and for too few images.
    """
    given = [text.removeprefix("data.") for text in overrides if text.startswith("data.")]
    columns = {"label": config.label, "captions": config.captions}
    asked = parse(STAGES["data"], {"source": config.source, **columns}, given)
    chosen = {text.partition("=")[0] for text in given}
    source, share = asked.opened, asked.test_fraction
    if not source.has_test_split and "test_fraction" not in chosen:
        count = source.count("train") + source.count("test")  # a tenth is held out, of few images a fifth
        share = round(min(0.2, max(0.1, 16 / max(1, count))), 3)
    source = dataclasses.replace(asked, test_fraction=share).opened
    sides = []
    for item in source.items["train"]:
        with contextlib.suppress(images.BadImage):  # skipped and counted by the data stage
            sides.append(min(images.load_image(source.image(item.name)).shape[:2]))
        if len(sides) == 64:
            break
    readable = bool(sides) or source.count("train") == 0
    require(readable, f"no image of {config.source} can be read: look at them")
    counts = *_counts(source, asked, "max_validation" in chosen), len(source.classes())
    text = f"{config.source} has {counts[3]} classes and only {counts[0]} images to train: merge classes, or"
    require(2 * counts[3] <= counts[0] or counts[3] < 2, f"{text} do without (all in one folder, no label=)")
    gpu = torch.cuda.get_device_properties(0).total_memory >> 30 if device().type == "cuda" else 0
    machine = torch.get_num_threads(), native_bf16(device()), gpu
    described = any(file.read_bytes().strip() for file in getattr(source, "captions", {}).values())
    return Facts(*counts, int(median(sides)), *machine, described, share)


def _counts(source: sources.Source, asked: Any, chosen: bool) -> tuple[int, int, int]:
    """Images to train, validate and test, as the stage data will cut them; `chosen`: max_validation is."""
    found, test = source.count("train"), source.count("test")
    text = f"{asked.source} has too few images, {found} to train and {test} held out"
    require(found >= 2, f"{text}: add some, 2 to train are needed, {FEW} are better")
    validation = asked.max_validation if chosen else min(500, max(min(2, found // 2), found // 10))
    text = f"data.max_validation={validation} must be below the {found} to train: choose a smaller number"
    require(validation < found, text)
    return len(range(found - validation)[: asked.max_train]), validation, len(range(test)[: asked.max_test])


def rehearse(values: Values, facts: Facts) -> dict[str, float]:
    """Run the experiment on few images, for few steps, in a folder that is deleted; seconds per unit.

    The unit of a training is a step; of other stages an image, see `_images`.
    """
    tried = 8 * facts.cores.bit_length()  # steps that try out numbers of threads
    short = rehearsal(values, tried + 8)
    with tempfile.TemporaryDirectory() as name, _quiet():
        folder = Path(name)
        files.write_text(folder / "rehearsal.yaml", as_yaml({**short, "out": name}))
        load_experiment(folder / "rehearsal.yaml").run()
        few = dataclasses.replace(facts, **files.read_manifest(folder / "data")["counts"])
        stages = short["stages"].items()
        return {stage: _measured(folder / stage, _images(stage, settings, few)) for stage, settings in stages}


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    logging.disable(logging.INFO)
    try:
        with contextlib.redirect_stderr(io.StringIO()):  # progress bars
            yield
    finally:
        logging.disable(logging.NOTSET)


def _measured(folder: Path, images: int) -> float:
    """Seconds per step, by the last line of a training's log; of another stage seconds per image."""
    manifest, log = files.read_manifest(folder), folder / "metrics.jsonl"
    if not log.is_file():
        return manifest["seconds"] / images
    lines = map(json.loads, log.read_text(encoding="utf-8").splitlines())
    speed = [line["examples_per_second"] for line in lines if "examples_per_second" in line][-1]
    return manifest["config"]["train"]["batch_size"] / speed


# --- the plan: pure functions -----------------------------------------------------------------------------


def choose_preset(facts: Facts, seconds: float) -> tuple[str, str]:
    """Name of a preset, and why."""
    if facts.gpu and facts.side >= 96 and seconds >= 1800 and facts.train >= 2000:
        return "base", f"there is a GPU, and {facts.train:,} images of {facts.side} pixels"
    if facts.train < 100:
        return "tiny", f"{facts.train} images are too few for a larger model"
    if facts.side < 48:
        return "tiny", f"the images are small ({facts.side} pixels)"
    if not facts.gpu and seconds * facts.cores < 3600:
        return "tiny", "little time for a CPU; small (64 pixels) needs 1 hour on one core, 30 minutes on two"
    return "small", "enough images and time"


def adapt(values: Values, facts: Facts, config: FitConfig) -> Values:
    """A preset's experiment for these images: all but the numbers of steps and samples."""
    side, n = values["stages"]["data"]["size"][0], facts.train
    size = side if facts.side >= 0.75 * side else max(16, side // 2)
    changes = {"data.source": config.source, "data.size": [size, size], "tokens.mirror": n < 20_000}
    if size < side and "init" in values["stages"]["tokenizer"]:
        changes["tokenizer.init"] = "fashion32"  # smaller patches, so that as many remain
    changes |= {"data.test_fraction": facts.test_fraction, "data.max_validation": facts.validation}
    captions = config.captions or (sources.SIDECAR if facts.captions else None)
    columns = {"data.label": config.label, "data.captions": captions}
    changes |= {key: value for key, value in columns.items() if value is not None}
    dropout = 0.2 if n < 2000 else 0.1 if n < 20_000 else 0.0
    changes |= {f"{name}.model.dropout": dropout for name in ("raster", "any-order")}
    left_out = ("features", "eval-") if facts.classes < 2 else ()  # the features are a classifier's
    stages = {name: stage for name, stage in values["stages"].items() if not name.startswith(left_out)}
    batches = {name: stage["train"]["batch_size"] for name, stage in stages.items() if "train" in stage}
    changes |= {f"{name}.train.batch_size": min(most, max(4, n // 4)) for name, most in batches.items()}
    return put({**values, "stages": stages}, changes)


def put(values: Values, changes: Mapping[str, Any]) -> Values:
    """A copy of an experiment with other settings, `stage.key` -> value; a ValueError for unknown stages."""
    found = json.loads(json.dumps(values))  # also takes YAML's aliases apart
    for key, value in changes.items():
        stage, *groups, last = key.split(".")
        index_of(stage, list(found["stages"]), f"stage in override '{key}'")
        inner = found["stages"][stage]
        for group in groups:
            inner = inner.setdefault(group, {})
        inner[last] = value
    return found


def patch_side(tokenizer: Values) -> int:
    """Pixels of a patch's side: of the tokenizer to start from, or of a new one."""
    if init := tokenizer.get("init"):
        return weights.load_tokenizer(Path(init) if Path(init).is_dir() else folders.BUNDLED / init).factor
    return 2 ** (len(parse(STAGES["tokenizer"], {"data": "data", **tokenizer}).model.multipliers) - 1)


def rehearsal(values: Values, steps: int) -> Values:
    """The same experiment, as short as can be: one generator, few images."""
    samples = ("samples-random", "samples-ordered")
    kept = ("data", "tokenizer", "features", "tokens", "any-order", "orders", *samples, "eval-random")
    stages = {name: stage for name, stage in values["stages"].items() if name in kept}
    short = {"steps": steps, "warmup": 0, "eval_every": steps, "log_every": 8, "save_every": steps}
    changes = {f"{s}.train.{k}": v for s in stages if "train" in stages[s] for k, v in short.items()}
    at_once = int(stages["orders"]["batch_size"] or 64)
    validation = min(8, int(stages["data"]["max_validation"]))  # not 1, which may be a bad file
    changes |= {"data.max_train": 2 * at_once, "data.max_test": 16, "data.max_validation": validation}
    changes |= {"orders.limit": at_once, "orders.test_limit": 1}
    changes |= {f"{name}.num_images": at_once for name in samples}
    return put({**values, "stages": stages}, {**changes, "samples-ordered.model": "any-order"})


def _images(name: str, settings: Mapping[str, Any], facts: Facts) -> int:
    """How many images a stage that trains nothing works on."""
    held_out = facts.validation + facts.test
    match name.split("-")[0]:
        case "samples":
            return int(settings["num_images"])
        case "orders":
            return int(settings.get("limit") or facts.train)
        case "tokens":
            return facts.train * (2 if settings["mirror"] else 1) + held_out
    return facts.train + held_out


def evaluation_steps(name: str, settings: Mapping[str, Any], facts: Facts) -> float:
    """Training steps that last as long as one evaluation: a third of a step for each batch of images."""
    looked_at = facts.validation + (min(512, facts.train) if name in GENERATORS else 0)
    return looked_at / int(settings["train"]["batch_size"]) / 3


def expected(values: Values, rates: Mapping[str, float], facts: Facts) -> dict[str, float]:
    """Seconds that each stage takes, by the measured seconds per unit; trainings may stop earlier."""
    found = {}
    for name, settings in values["stages"].items():
        like = "any-order" if name in GENERATORS else f"{name.split('-')[0]}-random"
        units = float(_images(name, settings, facts))
        if train := settings.get("train"):
            often = 2 + int(train["steps"]) / max(1, int(train["eval_every"]))
            units = int(train["steps"]) + often * evaluation_steps(name, settings, facts)
        found[name] = PER_STAGE + rates.get(name, rates.get(like, 0.0)) * units
    return found


def fill(values: Values, rates: dict[str, float], facts: Facts, seconds: float, given: list[str]) -> Values:
    """Choose the numbers of samples and steps so that all stages together take the time; `given` are kept.

    Raises:
        ValueError: the time is too short for anything to be learnt.
    """
    tenth, stages = 0.1 * seconds, values["stages"]
    n = min(1000, max(16, int(tenth / 3 / rates["samples-random"])))
    limit = min(2 * facts.train, max(16, int(tenth / rates["orders"])))
    chosen: Values = {f"{name}.num_images": n for name in stages if name.startswith("samples-")}
    chosen |= {"orders.limit": limit, "orders.test_limit": min(limit, 200)}
    values = put(values, {key: value for key, value in chosen.items() if key not in given})
    free = [name for name in SHARES if name in stages and f"{name}.train.steps" not in given]
    at_rest = expected(put(values, {f"{name}.train.steps": 0 for name in free}), rates, facts)
    left, parts = seconds - sum(at_rest.values()), sum(SHARES[name] for name in free)
    like = {name: rates["any-order" if name in GENERATORS else name] * (1 + EVALUATED) for name in free}
    needed = max((LEAST * like[name] * parts / SHARES[name] for name in free), default=0.0)
    minutes = math.ceil(1.4 * (seconds - left + needed) / 60)
    text = f"{seconds / 60:.0f} min are too few: give time={minutes}m or more"
    require(left >= needed or not free, text)  # who gives all steps decides the time
    chosen = {}
    for name, rate in like.items():
        most = PASSES[name] * facts.train / int(stages[name]["train"]["batch_size"])
        steps = int(min(left * SHARES[name] / parts / rate, max(LEAST, most)))
        chosen |= schedule(name, steps, rate, evaluation_steps(name, stages[name], facts))
    return put(values, {key: value for key, value in chosen.items() if key not in given})


def schedule(name: str, steps: int, rate: float, evaluation: float) -> Values:
    """Settings of a training of so many steps of `rate` seconds; a checkpoint a minute."""
    evaluated = max(1, steps * EVALUATED, evaluation / EVALUATED)
    found = {"steps": steps, "warmup": steps // 20, "eval_every": min(steps, round(evaluated))}
    found |= {"save_every": max(1, min(steps, round(60 / rate)))}
    return {f"{name}.train.{key}": value for key, value in found.items()}


def as_yaml(values: Values) -> str:
    """The text of an experiment file."""
    return yaml.safe_dump(values, sort_keys=False, default_flow_style=None, width=110)


def preset(name: str, overrides: Sequence[str] = ()) -> Values:
    """The experiment of a preset; a ValueError for `overrides` that its stages refuse."""
    path = Path(__file__).parent / f"{name}.yaml"
    load_experiment(path, overrides)
    return yaml.safe_load(path.read_text(encoding="utf-8"))


def typed(text: str) -> Any:
    """Numbers and truth values as YAML has them; other texts are read by their settings."""
    known = {"true": True, "false": False, "null": None}
    if re.fullmatch(r"(0|[1-9]\d*)(e\+?\d{1,2})?", text.lower()):  # 5e2, too; 010 is a name
        return int(text) if text.isdecimal() else int(float(text))
    return known.get(text.lower(), text)
