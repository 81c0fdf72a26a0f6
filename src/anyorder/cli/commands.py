"""What each command does: it returns a line that says what was written and what to type next.

The docstring of a command ends its usage line. Heavy libraries are imported only by the command that needs
them, so that `anyorder --help` is quick.
"""

import dataclasses
import importlib
import os
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any


def _path(text: str) -> Path:
    from anyorder import files

    return files.expanded(text)


@dataclasses.dataclass
class Call:
    """A command as it was typed."""

    name: str
    paths: list[str]
    """Arguments without `=`."""
    settings: list[str]
    """Arguments `key=value`."""
    dry_run: bool
    yes: bool = False

    def take(self, key: str, default: str = "") -> str:
        """Remove `key=` from the settings; its last value, or the default."""
        found = [text.partition("=")[2] for text in self.settings if text.startswith(f"{key}=")]
        self.settings = [text for text in self.settings if not text.startswith(f"{key}=")]
        return found[-1] if found else default

    def of_stages(self) -> list[str]:
        """Remove the settings of an experiment's stages, `stage.key=value`."""
        found = [text for text in self.settings if "." in text.partition("=")[0]]
        self.settings = [text for text in self.settings if text not in found]
        return found

    def flag(self, key: str, default: str = "false") -> bool:
        """Remove `key=true` or `key=false` from the settings."""
        if (value := self.take(key, default).lower()) not in ("true", "false"):
            raise ValueError(f"{key}={value}: expected true or false")
        return value == "true"

    @property
    def folders(self) -> list[Path]:
        """The paths that were typed."""
        return [_path(path) for path in self.paths]

    def out(self, default: str = "") -> Path:
        """Remove `out=` from the settings."""
        if out := self.take("out", default):
            return _path(out)
        raise ValueError(f"say where to write: anyorder {self.name} out=FOLDER ...")

    def file(self, default: str = "", ending: str = "") -> Path:
        """Remove `out=` from the settings: a file, and none of an artifact."""
        from anyorder.stages.artifacts import require_no_artifact

        require_no_artifact(out := self.out(default))
        if out.is_dir() or not out.name.endswith(ending):
            raise ValueError(f"out={out} must be a file, FILE{ending}: choose another name")
        return out

    def parse(self, config: str = "", **values: Any) -> Any:
        """The configuration of the command."""
        from anyorder import settings

        if self.paths:
            raise ValueError(f"settings are written key=value, got '{self.paths[0]}'")
        return settings.parse(config_class(config or self.name), values, self.settings)

    def show(self, config: Any, out: Path | str = "") -> bool:
        """Whether this is a dry run; if so, the resolved configuration is printed as YAML."""
        if self.dry_run:
            import yaml

            from anyorder import files

            print(f"anyorder {self.name} -> {out}" if out else f"anyorder {self.name}")
            values = files.plain(dataclasses.asdict(config))
            print(yaml.safe_dump(values, sort_keys=False, default_flow_style=None))
        return self.dry_run


def config_class(name: str) -> type:
    """The configuration of a command."""
    if name in CONFIGS:
        module, _, class_name = CONFIGS[name].partition(":")
        return getattr(importlib.import_module(module), class_name)
    from anyorder.stages.experiment import STAGES

    return STAGES[name]


CONFIGS = {
    "fit": "anyorder.stages.fit:FitConfig",
    "plan": "anyorder.cli.planner:PlanConfig",
    "sample pipeline": "anyorder.cli.images:SampleConfig",
    "complete": "anyorder.cli.images:CompleteConfig",
    "convert": "anyorder.stages.convert:ConvertConfig",
    "bench": "anyorder.bench.workloads:BenchConfig",
    "demo": "anyorder.demo.server:DemoConfig",
}
"""Configurations that are not stages."""
NEXT = {
    "data": "tokenizer data={out} out={run}/tokenizer",
    "tokenizer": "tokens data={data} tokenizer={out} out={run}/tokens",
    "features": "eval samples=SAMPLES features={out} out={run}/eval",
    "tokens": "train tokens={out} out={run}/any-order",
    "train": "orders model={out} tokens={tokens} policy.order=margin out={run}/orders",
    "orders": "train tokens={tokens} init={model} orders={out} random_share=0.2 out={run}/ordered",
    "iterate": "sample model={out} tokens={tokens} tokenizer={tokenizer} out={run}/samples",
    "sample": "eval samples={out} features={features} out={run}/eval",
    "eval": "compare a={out} b=ANOTHER features={features} out={run}/compare",
    "pipeline": "sample pipeline={out} out={run}/images",
}
"""What to type after a stage."""
MEANING = {
    "data": "images of one size, with classes and splits", "tokenizer": "turns images into tokens and back",
    "features": "the space that images are compared in", "tokens": "the images as tokens",
    "train": "a model of the tokens", "orders": "an order for each training image",
    "iterate": "the best of several rounds of orders and training", "sample": "generated images",
    "eval": "distances to held-out images, and likelihoods", "compare": "the difference of two evaluations",
    "tune": "temperature and guidance, searched", "completion": "how well holes are filled",
    "grid": "the model on a larger grid", "pipeline": "all that generates images, in one folder",
}  # fmt: skip
"""What a stage has written."""
VERB = {True: "wrote", False: "up to date:"}
EXAMPLES = {
    "quickstart": "any-order.train.steps=300 out=runs/short",
    "fit": "photos --time 30m",
    "run": "experiments/fashion32.yaml seed=1 out=runs/fashion32-1",
    "plan": "imagenet256 --gpus 8 --kind h100",
    "report": "runs/quickstart",
    "demo": "pipeline=fashion32",
    "verify": "runs/quickstart/pipeline",
    "ls": "runs/quickstart",
    "clean": "runs/quickstart --yes",
    "data": "source=photos size=64 out=runs/mine/data",
    "tokenizer": "data=runs/mine/data train.steps=3000 out=runs/mine/tokenizer",
    "features": "data=runs/mine/data out=runs/mine/features",
    "tokens": "data=runs/mine/data tokenizer=runs/mine/tokenizer out=runs/mine/tokens",
    "train": "tokens=runs/mine/tokens train.steps=5000 model.depth=4 out=runs/mine/any-order",
    "orders": "model=runs/mine/any-order tokens=runs/mine/tokens policy.order=margin out=runs/mine/orders",
    "iterate": "model=runs/mine/any-order tokens=runs/mine/tokens rounds=2 out=runs/mine/iterate",
    "tune": "model=runs/mine/ordered features=runs/mine/features out=runs/mine/tune",
    "sample": "pipeline=fashion32 class_labels=Shoes,Bags out=images",
    "eval": "samples=runs/mine/samples features=runs/mine/features out=runs/mine/eval",
    "compare": "a=runs/mine/eval b=runs/mine/eval-raster out=runs/mine/compare",
    "completion": "model=runs/mine/ordered features=runs/mine/features out=runs/mine/completion",
    "grid": "model=runs/mine/any-order other=runs/larger/tokens out=runs/mine/grid",
    "pipeline": "samples=runs/mine/samples out=runs/mine/pipeline",
    "complete": "pipeline=fashion32 image=shoe.png keep=0.5 num_images=4 out=variations",
    "convert": "arpg_300m.pt runs/arpg",
    "bench": "out=bench.json",
}
"""An example of each command, for its help."""


def stage(call: Call) -> str:
    """out=FOLDER [key=value ...]"""
    from anyorder.stages.execute import execute

    if call.name == "features" and call.paths == ["train"]:
        call.paths = []
    out, overwrite, config = call.out(), call.flag("overwrite"), call.parse()
    done = call.show(config, out) or execute(call.name, config, out, overwrite=overwrite)
    known = {role: path for role in config.inputs if (path := getattr(config, role)) is not None}
    names = {"data": "DATA", "tokenizer": "TOKENIZER", "tokens": "TOKENS", "features": "FEATURES"}
    names |= {key: shlex.quote(str(path)) for key, path in (known | {"out": out, "run": out.parent}).items()}
    after = NEXT.get(call.name, "report {run}").format(**names)
    return f"{VERB[done]} {out}: {MEANING[call.name]}; next: anyorder {after}"


def sample(call: Call) -> str:
    """pipeline=NAME out=FOLDER [key=value ...]
    anyorder sample model=FOLDER out=FOLDER [scorer=FOLDER] [key=value ...]
    """
    from anyorder.cli.images import own_settings, sample_files

    out, overwrite, own = call.out(), call.flag("overwrite"), own_settings(call.settings)
    config = call.parse("sample pipeline", **own)
    done = call.show(config, out) or sample_files(config, out, overwrite=overwrite)
    n, grid = config.num_images, out / "grid.png"
    return f"{VERB[done]} {n} images, orders.png and generation.webp in {out}; next: look at {grid}"


def complete(call: Call) -> str:
    """pipeline=FOLDER image=FILE out=FOLDER [key=value ...]"""
    from anyorder.cli.images import complete_file, own_settings

    out, overwrite, own = call.out(), call.flag("overwrite"), own_settings(call.settings)
    config = call.parse(**own)
    done = call.show(config, out) or complete_file(config, out, overwrite=overwrite)
    text = f"{config.num_images} images in {out}; next: look at {out / '0000.png'}, or try another seed="
    return f"{VERB[done]} {text}"


def convert(call: Call) -> str:
    """SOURCE DEST [key=value ...]"""
    from anyorder.stages.execute import execute

    if len(call.paths) != 2:
        text = f"give the downloaded file and the folder to write, got {' '.join(call.paths) or 'neither'}"
        raise ValueError(f"{text}: anyorder convert SOURCE DEST [key=value ...]")
    (source, out), call.paths = call.paths, []
    overwrite, config = call.flag("overwrite"), call.parse(source=source)
    done = call.show(config, out) or execute("convert", config, _path(out), overwrite=overwrite)
    after = f"anyorder sample pipeline={shlex.quote(str(out))} out=FOLDER, if it has a tokenizer"
    return f"{VERB[done]} {out}; next: {after}, or anyorder tokens"


def run(call: Call) -> str:
    """EXPERIMENT.yaml [out=FOLDER] [stage.key=value ...] [overwrite=true]

    Instead of a file, give the name of a recipe: imagenet256, imagenet256-randar, imagenet256-arpg,
    imagenet64, fashion256, celebahq256.
    """
    if len(call.paths) != 1:
        raise ValueError("give an experiment file, for example experiments/fashion32.yaml")
    from anyorder.stages.experiment import find_experiment, load_experiment

    overwrite = call.flag("overwrite")
    experiment = load_experiment(find_experiment(call.paths[0]), call.settings)
    if call.dry_run:
        print("\n".join(experiment.plan()))
        return ""
    from anyorder.cli import runs
    from anyorder.inference.processes import leads

    page = runs.report_at(experiment.out / "report.html")
    experiment.run(overwrite)
    return _write_report([experiment.out], page, True) if leads() else ""


def plan(call: Call) -> str:
    """EXPERIMENT.yaml [--gpus 8] [--kind h100] [--efficiency 0.6] [stage.key=value ...] [out=FILE.json]"""
    from anyorder.cli import plan as planning
    from anyorder.files import write_json
    from anyorder.stages.experiment import find_experiment, load_experiment

    if len(call.paths) != 1:
        raise ValueError("give an experiment file or the name of a recipe, for example imagenet256")
    path = find_experiment(call.paths.pop())
    out = call.file(ending=".json") if any(text.startswith("out=") for text in call.settings) else None
    overrides = call.of_stages()
    config = call.parse()
    if out and out.resolve() == path.resolve():
        raise ValueError(f"out={out} is the experiment file itself: choose another name")
    if call.show(config, out or ""):
        return ""
    found = planning.plan(load_experiment(path, overrides), config)
    print(planning.describe(found))
    if not out:
        return ""
    write_json(out, found)
    return f"wrote {out}; next: anyorder run {shlex.quote(str(path))}"


def fit(call: Call) -> str:
    """FOLDER [--time 30m] [preset=tiny|small|base] [out=runs/NAME] [stage.key=value ...]

    FOLDER holds images, in sub-folders of classes if there are any; or parquet files, or a hub data set.
    The plan is kept in out/experiment.yaml: the same command again goes on with it.
    """
    if len(call.paths) != 1:
        raise ValueError("give one folder of images: anyorder fit FOLDER (./FOLDER if its name holds =)")
    if os.environ.get("WORLD_SIZE", "1") != "1":
        raise ValueError("fit measures one process and plans for it: start it without torchrun")
    from anyorder.cli import runs
    from anyorder.cli.fit import fit_folder

    source = call.paths.pop()
    out, overwrite = call.out(f"runs/{_path(source).resolve().stem}"), call.flag("overwrite")
    overrides, page, pipe = call.of_stages(), runs.report_at(out / "report.html"), out / "pipeline"
    fit_folder(call.parse(source=source), out, overrides, dry_run=call.dry_run, overwrite=overwrite)
    return f"wrote {pipe} and {page}; next: anyorder sample pipeline={shlex.quote(str(pipe))} out=images"


def quickstart(call: Call) -> str:
    """[out=runs/quickstart] [stage.key=value ...] [overwrite=true]"""
    call.paths.insert(0, str(Path(__file__).parent.parent / "stages" / "quickstart.yaml"))
    return run(call)


def report(call: Call) -> str:
    """RUN... [out=RUN/report.html] [--csv] [--latex] [data_images=true]

    run folders of one experiment are its seeds: stages of equal names are one variant
    out=FILE.md writes the tables alone as Markdown, out=FILE.json as JSON; manifests are enough
    --csv and --latex write the numbers and the tables beside the page, or alone: out=FILE.csv, out=FILE.tex
    data_images=false leaves out figures that contain images of the data set
    """
    from anyorder.cli import runs
    from anyorder.report import summary

    if not call.paths:
        raise ValueError("give one or more run folders, for example runs/quickstart")
    folders = call.folders
    out, images = call.file(f"{folders[0]}/report.html"), call.flag("data_images", "true")
    if out == folders[0] / "report.html":
        runs.report_at(out)
    beside = [out.with_suffix(end) for key, end in (("csv", ".csv"), ("latex", ".tex")) if call.flag(key)]
    for path in beside:
        runs.report_at(path)
    if out.suffix not in summary.ENDINGS:
        raise ValueError(f"out={out} must end with one of {', '.join(summary.ENDINGS)}")
    if call.settings:
        raise ValueError(f"report takes out=FILE and data_images=true|false, got {call.settings[0]}")
    if call.dry_run:
        print(f"report of {', '.join(map(str, folders))} -> {out}")
        return ""
    written = _write_report(folders, out, images, beside)
    if old := [path for run in folders for path in runs.folders(run) if "made again" in runs.outdated(path)]:
        print(f"out of date, as anyorder ls says: {', '.join(map(str, old))}")
    return written


def _write_report(folders: list[Path], out: Path, data_images: bool, beside: Sequence[Path] = ()) -> str:
    from anyorder.report import summary

    table = summary.report(folders, out, data_images=data_images)
    for path in beside:
        summary.report(folders, path)
    if table is not None:
        print(table.text())
    return f"wrote {', '.join(map(str, [out, *beside]))}; next: open it in a browser"


def bench(call: Call) -> str:
    """[out=bench.json] [key=value ...] [--against OLD.json]
    anyorder bench NEW.json --against OLD.json    compares two results without measuring
    """
    from anyorder.bench import bench

    out, old = call.file("bench.json", ".json"), call.take("against", "none")
    files, call.paths = call.paths, []
    if not old:
        raise ValueError("say what to compare with: --against FILE")
    if files and (len(files) > 1 or call.settings or old == "none"):
        text = "two results are compared by anyorder bench NEW.json against=OLD.json, without settings"
        raise ValueError(text)
    config = call.parse()
    before = bench.load_result(Path(old)) if old != "none" else None  # refused before anything is measured
    if call.show(config, out):
        return ""
    result = bench.load_result(Path(files[0])) if files else bench.bench(config, out)
    if before is not None:
        table = bench.against(result, before)
        print(f"\n{table.caption}\n{table.text()}")
    after = f"anyorder bench out=NEW.json --against {shlex.quote(str(out))}"
    return "" if files else f"wrote {out}; next, after a change: {after}"


def demo(call: Call) -> str:
    """pipeline=FOLDER [key=value ...]"""
    try:
        import starlette  # noqa: F401
        import uvicorn  # noqa: F401
    except ImportError as e:
        raise ImportError(f"the demo needs a web server ({e}): pip install 'anyorder[demo]'") from e
    from anyorder.demo.server import serve

    config = call.parse()
    if not call.show(config):
        serve(config)
    return ""


def verify(call: Call) -> str:
    """FOLDER..."""
    from anyorder.stages.artifacts import verify

    if not call.paths or call.settings:
        raise ValueError("give one or more artifact folders: anyorder verify FOLDER...")
    seen = set[Path]()
    if problems := [problem for folder in call.folders for problem in verify(folder, seen)]:
        raise OSError("; ".join(problems))
    print(f"{', '.join(call.paths)}: every file with a hash is as it was written")
    return ""


def ls(call: Call) -> str:
    """RUN..."""
    from anyorder.cli import runs

    print(runs.overview(_runs(call)))
    return ""


def clean(call: Call) -> str:
    """RUN... [--yes]

    Lists the checkpoints of finished trainings and their size; --yes deletes them.
    Nothing becomes out of date; a finished training can then no longer be extended by more train.steps.
    """
    from anyorder.cli import runs

    found = runs.checkpoints(_runs(call))
    text = f"{len(found)} files of checkpoints, {sum(path.stat().st_size for path in found):,} bytes"
    if not call.yes or call.dry_run:
        print("\n".join([*map(str, found), f"would delete {text}: add --yes"]))
        return ""
    runs.delete(found)
    print(f"deleted {text}")
    return ""


def _runs(call: Call) -> list[Path]:
    """The run folders that were typed."""
    if not call.paths or call.settings:
        raise ValueError(f"give one or more run folders: anyorder {call.name} runs/quickstart")
    return call.folders
