"""The command `anyorder`: one sub-command per stage, and a few that run many.

Heavy libraries are imported only by the command that needs them, so that `anyorder --help` is quick.
"""

from __future__ import annotations

import errno
import logging
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from importlib import import_module, resources
from pathlib import Path
from typing import Any, NamedTuple

from anyorder import __version__

FLAGS = ("--dry-run", "--traceback", "--help")
FIRST = """anyorder: any-order autoregressive image models. Begin with one of these:

  anyorder sample pipeline=fashion32 out=images   generate images with the model that comes with the package
  anyorder demo pipeline=fashion32                the same in a browser
  anyorder quickstart                             train a model on procedural images, with a report

usage: anyorder --help lists all commands, anyorder COMMAND --help the settings of one"""
USAGE = """usage: anyorder COMMAND [key=value ...] [--dry-run] [--traceback]
       anyorder run EXPERIMENT.yaml [stage.key=value ...]
       anyorder COMMAND --help

Settings are written key=value or --key value with dotted keys, for example train.steps=100. out=FOLDER says
where a command writes; overwrite=true replaces what was made there with other settings. The same command
again resumes what was interrupted and skips what is up to date.
"""


@dataclass
class Call:
    """A command as it was typed."""

    name: str
    paths: list[str]
    """Arguments without `=`."""
    settings: list[str]
    """Arguments `key=value`."""
    dry_run: bool

    def take(self, key: str, default: str = "") -> str:
        """Remove `key=` from the settings; its last value, or the default."""
        found = [text.partition("=")[2] for text in self.settings if text.startswith(f"{key}=")]
        self.settings = [text for text in self.settings if not text.startswith(f"{key}=")]
        return found[-1] if found else default

    def flag(self, key: str, default: str = "false") -> bool:
        """Remove `key=true` or `key=false` from the settings."""
        if (value := self.take(key, default).lower()) not in ("true", "false"):
            raise ValueError(f"{key}={value}: expected true or false")
        return value == "true"

    def out(self, default: str = "") -> Path:
        """Remove `out=` from the settings."""
        if out := self.take("out", default):
            return Path(out).expanduser()
        raise ValueError(f"say where to write: anyorder {self.name} out=FOLDER ...")

    def parse(self, config: str = "", **values: str) -> Any:
        """The configuration of the command."""
        from anyorder import settings

        if self.paths:
            raise ValueError(f"settings are written key=value, got '{self.paths[0]}'")
        return settings.parse(_config_class(config or self.name), values, self.settings)

    def show(self, config: Any, out: Path | str = "") -> bool:
        """Whether this is a dry run; if so, the resolved configuration is printed as YAML."""
        if self.dry_run:
            import yaml

            from anyorder.files import plain

            print(f"anyorder {self.name} -> {out}" if out else f"anyorder {self.name}")
            print(yaml.safe_dump(plain(asdict(config)), sort_keys=False, default_flow_style=None))
        return self.dry_run


def _config_class(name: str) -> type:
    if name in CONFIGS:
        module, _, class_name = CONFIGS[name].partition(":")
        return getattr(import_module(module), class_name)
    from anyorder.stages.experiment import STAGES

    return STAGES[name]


# --- one function for each command: it says what was written and what to type next ------------------------


def _stage(call: Call) -> str:
    from anyorder.stages.execute import execute

    if call.name == "features" and call.paths == ["train"]:
        call.paths = []
    out, overwrite, stage = call.out(), call.flag("overwrite"), call.parse()
    if call.show(stage, out):
        return ""
    execute(call.name, stage, out, overwrite=overwrite)
    known = {role: path for role in stage.inputs if (path := getattr(stage, role)) is not None}
    names = {"data": "DATA", "tokenizer": "TOKENIZER", "tokens": "TOKENS", "features": "FEATURES"}
    after = NEXT[call.name].format(**(names | known | {"out": out, "run": out.parent}))
    return f"{out}; next: anyorder {after}"


def _sample(call: Call) -> str:
    from anyorder.cli.images import sample_files

    out, config = call.out(), call.parse("sample pipeline")
    if call.show(config, out):
        return ""
    sample_files(config, out)
    return f"{config.n} images, orders.png and generation.webp in {out}; next: look at {out / 'grid.png'}"


def _complete(call: Call) -> str:
    from anyorder.cli.images import complete_file

    out, config = call.out(), call.parse()
    if call.show(config, out):
        return ""
    return f"{', '.join(map(str, complete_file(config, out)))}; next: another seed= for other images"


def _convert(call: Call) -> str:
    from anyorder.stages.convert import convert

    if len(call.paths) != 2:
        raise ValueError(
            f"give the downloaded file and the folder to write, got {' '.join(call.paths) or 'neither'}: "
            "anyorder convert SOURCE DEST [key=value ...]"
        )
    (source, out), call.paths = call.paths, []
    config = call.parse(source=source)
    if call.show(config, out):
        return ""
    convert(config, Path(out).expanduser())
    return (
        f"{out}; next: anyorder sample pipeline={out} out=FOLDER, if it has a tokenizer, or anyorder tokens"
    )


def _run(call: Call) -> str:
    if call.name == "quickstart":
        call.paths = [str(resources.files("anyorder.stages") / "quickstart.yaml"), *call.paths]
    if len(call.paths) != 1:
        raise ValueError("give an experiment file, for example experiments/fashion32.yaml")
    from anyorder.stages.experiment import load_experiment

    overwrite = call.flag("overwrite")
    experiment = load_experiment(Path(call.paths[0]).expanduser(), call.settings)
    if call.dry_run:
        print("\n".join(experiment.plan()))
        return ""
    experiment.run(overwrite)
    return _write_report([experiment.out], experiment.out / "report.html", True)


def _report(call: Call) -> str:
    if not call.paths:
        raise ValueError("give one or more run folders, for example runs/quickstart")
    folders = [Path(path).expanduser() for path in call.paths]
    out = call.out(f"{folders[0]}/report.html")
    images = call.flag("data_images", "true")
    if call.settings:
        raise ValueError(f"report takes out=FILE and data_images=true|false, got {call.settings[0]}")
    if call.dry_run:
        print(f"report of {', '.join(map(str, folders))} -> {out}")
        return ""
    return _write_report(folders, out, images)


def _write_report(folders: list[Path], out: Path, data_images: bool) -> str:
    from anyorder.report.summary import report

    table = report(folders, out, data_images=data_images)
    if table is not None:
        print(table.text())
    return f"{out}; next: open it in a browser"


def _bench(call: Call) -> str:
    from anyorder.bench import bench

    out, old = call.out("bench.json"), call.take("against", "none")
    files, call.paths = call.paths, []
    if not old:
        raise ValueError("say what to compare with: --against FILE")
    if files and (len(files) > 1 or call.settings or old == "none"):
        raise ValueError(
            "two results are compared by anyorder bench NEW.json against=OLD.json, without settings"
        )
    config = call.parse()
    before = bench.load_result(Path(old)) if old != "none" else None  # refused before anything is measured
    if call.show(config, out):
        return ""
    result = bench.load_result(Path(files[0])) if files else bench.bench(config, out)
    if before is not None:
        table = bench.against(result, before)
        print(f"\n{table.caption}\n{table.text()}")
    return "" if files else f"{out}; next, after a change: anyorder bench out=NEW.json --against {out}"


def _demo(call: Call) -> str:
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


def _verify(call: Call) -> str:
    from anyorder.stages.artifacts import verify

    if not call.paths or call.settings:
        raise ValueError("give one or more artifact folders: anyorder verify FOLDER...")
    if problems := [problem for path in call.paths for problem in verify(Path(path).expanduser())]:
        raise OSError("; ".join(problems))
    print(f"{', '.join(call.paths)}: every file is as it was written")
    return ""


# --- the table of commands --------------------------------------------------------------------------------


class Command(NamedTuple):
    """What `anyorder --help` says, and the function that does it."""

    about: str
    run: Callable[[Call], str] = _stage
    usage: str = "out=FOLDER [key=value ...]"


GROUPS: dict[str, dict[str, Command]] = {
    "whole runs": {
        "quickstart": Command(
            "the whole method on procedural sunsets, in minutes, with a report",
            _run,
            "[out=runs/quickstart] [stage.key=value ...] [overwrite=true]",
        ),
        "run": Command(
            "an experiment file: every stage that is not up to date, then a report",
            _run,
            "EXPERIMENT.yaml [out=FOLDER] [stage.key=value ...] [overwrite=true]",
        ),
        "report": Command(
            "one HTML page about one or more run folders",
            _report,
            "RUN... [out=RUN/report.html] [data_images=true]\n\n"
            "run folders of one experiment are its seeds: stages of equal names are one variant\n"
            "out=FILE.md writes the tables alone as Markdown, out=FILE.json as JSON; manifests are enough\n"
            "data_images=false leaves out figures that contain images of the data set",
        ),
        "demo": Command(
            "watch images being generated, in a browser", _demo, "pipeline=FOLDER [key=value ...]"
        ),
        "verify": Command(
            "compare artifacts and what they were made from with their hashes", _verify, "FOLDER..."
        ),
    },
    "stages": {
        "data": Command("decode a folder, parquet files or a Hugging Face data set to one size"),
        "tokenizer": Command("train the VQ tokenizer"),
        "features": Command("train the feature network that measures quality"),
        "tokens": Command("encode all images"),
        "train": Command("train the any-order model, or fine-tune it on extracted orders"),
        "orders": Command("extract the order of every training image from the model's confidence"),
        "iterate": Command("rounds of extraction and fine-tuning with a location head"),
        "sample": Command(
            "generate images in a fixed, random or inferred order",
            _stage,
            "pipeline=NAME out=FOLDER [key=value ...]\n"
            "       anyorder sample model=FOLDER tokenizer=FOLDER out=FOLDER [key=value ...]",
        ),
        "eval": Command("measure samples and the model's likelihood"),
        "compare": Command("two evaluations: differences with bootstrap intervals"),
        "completion": Command("fill holes of test images and measure the results"),
        "grid": Command("likelihood and samples on a grid that the model was not trained on"),
        "pipeline": Command("put model and tokenizer into one folder for Pipeline.from_pretrained"),
    },
    "images": {
        "complete": Command(
            "generate parts of an image: inpainting, outpainting, variations",
            _complete,
            "pipeline=FOLDER image=FILE out=FOLDER [key=value ...]",
        )
    },
    "published models": {
        "convert": Command(
            "downloaded weights of LlamaGen, RandAR, ARPG, MaskGIT-VQ to a folder",
            _convert,
            "SOURCE DEST [key=value ...]",
        )
    },
    "the machine": {
        "bench": Command(
            "times as shares of what the machine can do, measured in the same run",
            _bench,
            "[out=bench.json] [key=value ...] [--against OLD.json]\n"
            "       anyorder bench NEW.json --against OLD.json    compares two results without measuring",
        )
    },
}
COMMANDS = {name: command for group in GROUPS.values() for name, command in group.items()}
CONFIGS = {
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
    "compare": "report {run}",
    "completion": "report {run}",
    "grid": "report {run}",
    "pipeline": "sample pipeline={out} out={run}/images",
}
"""What to type after each stage."""


def _help(name: str = "") -> None:
    if not name:
        print(USAGE)
        for group, commands in GROUPS.items():
            lines = [f"  {name:11} {command.about}" for name, command in commands.items()]
            print("\n".join([f"{group}:", *lines, ""]))
        return
    print(f"usage: anyorder {name} {COMMANDS[name].usage}\n\n{name}: {COMMANDS[name].about}")
    if name not in ("run", "quickstart", "report", "verify"):
        from anyorder import settings

        for config in map(_config_class, ["sample pipeline", name] if name == "sample" else [name]):
            print(f"\n{config.__doc__}\n\n{settings.describe(config)}")


def _understand(arguments: list[str]) -> Call:
    """Split the arguments of a command.

    Raises:
        ValueError: unknown command or option, with the nearest known one.
    """
    from anyorder import settings

    name, *rest = settings.as_overrides(arguments, FLAGS)
    if name not in COMMANDS:
        hint = settings.did_you_mean(name, COMMANDS)
        raise ValueError(f"unknown command '{name}'{hint} Commands: {', '.join(COMMANDS)}")
    words = [text for text in rest if text not in FLAGS]
    paths = [text for text in words if "=" not in text]
    return Call(name, paths, [text for text in words if "=" in text], "--dry-run" in rest)


def _function(call: Call) -> Callable[[Call], str]:
    """What does the command; `sample` is a stage unless it is given a pipeline."""
    of_pipeline = call.name == "sample" and any(text.startswith("pipeline=") for text in call.settings)
    return _sample if of_pipeline else COMMANDS[call.name].run


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code: 0 done, 1 failed, 2 wrong usage, 130 interrupted."""
    arguments = ["--help" if a in ("-h", "help") else a for a in (sys.argv[1:] if argv is None else argv)]
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    try:
        if not arguments:
            print(FIRST)
        elif arguments[0] == "--version":
            print(f"anyorder {__version__}")
        elif arguments[0] == "--help":
            _help()
        else:
            call = _understand(arguments)
            if "--help" in arguments:
                _help(call.name)
            elif written := _function(call)(call):
                print(f"wrote {written}")
        sys.stdout.flush()
        return 0 if arguments else 2
    except BrokenPipeError:  # of a reader that has seen enough: anyorder --help | head
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except KeyboardInterrupt:
        print("anyorder: interrupted; the same command goes on from here", file=sys.stderr)
        return 130
    except (ValueError, OSError, ImportError) as e:
        if "--traceback" in arguments:
            raise
        full = isinstance(e, OSError) and (e.errno == errno.ENOSPC or "No space left" in str(e))
        advice = "the disk is full: free some space and run the same command again, it goes on from here: "
        print(f"anyorder: error: {advice if full else ''}{e}", file=sys.stderr)
        return 2 if isinstance(e, ValueError | FileNotFoundError) else 1


if __name__ == "__main__":
    sys.exit(main())
