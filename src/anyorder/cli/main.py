"""The command `anyorder`: one sub-command per stage, and a few that run many.

Heavy libraries are imported only by the command that needs them, so that `anyorder --help` is quick.
"""

from __future__ import annotations

import errno
import logging
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from anyorder import __version__

GROUPS = {
    "whole runs": {
        "quickstart": "the whole method on procedural sunsets, in minutes, with a report",
        "run": "an experiment file: every stage that is not up to date, then a report",
        "report": "one HTML page about one or more run folders",
        "demo": "watch pictures being drawn in their own order, in a browser",
    },
    "stages": {
        "data": "decode a folder, parquet files or a Hugging Face data set to one size",
        "tokenizer": "train the VQ tokenizer",
        "features": "train the feature network that measures quality",
        "tokens": "encode all images",
        "train": "train the any-order model, or fine-tune it on extracted orders",
        "orders": "extract the order of every training image from the model's confidence",
        "iterate": "rounds of extraction and fine-tuning with a location head: hard EM on q(order, x)",
        "sample": "draw images in a fixed, random or inferred order",
        "eval": "measure samples and the model's likelihood",
        "compare": "two evaluations: differences with bootstrap intervals",
        "completion": "draw holes of test images, and measure them against what was there",
        "grid": "likelihood and samples on a grid that the model was not trained on",
        "pipeline": "put model and tokenizer into one folder for Pipeline.from_pretrained",
    },
    "pictures": {"complete": "draw parts of a picture: inpainting, outpainting, variations"},
    "published models": {"convert": "downloaded weights of LlamaGen, RandAR, ARPG, MaskGIT-VQ to a folder"},
    "the machine": {"bench": "times as shares of what the machine can do, measured in the same run"},
}
USAGE = """usage: anyorder COMMAND [key=value ...] [--dry-run] [--traceback]
       anyorder run EXPERIMENT.yaml [stage.key=value ...]
       anyorder COMMAND --help

Settings are written key=value with dotted keys, for example train.steps=100; out=FOLDER says where a
stage writes. The same command again resumes what was interrupted and skips what is up to date.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code: 0 done, 1 failed, 2 wrong usage, 130 interrupted."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    traceback = "--traceback" in arguments
    arguments = [a for a in arguments if a != "--traceback"]
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(_help())
        return 0 if arguments else 2
    if arguments[0] == "--version":
        print(f"anyorder {__version__}")
        return 0
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    try:
        return _dispatch(arguments[0], arguments[1:])
    except KeyboardInterrupt:
        print("anyorder: interrupted; the same command goes on from here", file=sys.stderr)
        return 130
    except (ValueError, OSError, ImportError) as e:
        if traceback:
            raise
        print(f"anyorder: error: {_message(e)}", file=sys.stderr)
        return 2 if isinstance(e, ValueError | FileNotFoundError) else 1


def _message(e: Exception) -> str:
    if isinstance(e, OSError) and (e.errno == errno.ENOSPC or "No space left" in str(e)):
        return f"the disk is full ({e}): free some space and run the same command again, it goes on from here"
    return str(e)


def _help() -> str:
    lines = [USAGE]
    for group, commands in GROUPS.items():
        lines += [f"{group}:", *(f"  {name:11} {text}" for name, text in commands.items()), ""]
    return "\n".join(lines)


def _dispatch(command: str, arguments: list[str]) -> int:
    commands = [name for group in GROUPS.values() for name in group]
    if command not in commands:
        from anyorder.settings import did_you_mean

        hint = did_you_mean(command, commands)
        raise ValueError(f"unknown command '{command}'{hint} Commands: {', '.join(commands)}")
    if command == "bench":
        arguments = _spelled_out(arguments, "--against")
    dry_run = "--dry-run" in arguments
    arguments = [a for a in arguments if a != "--dry-run"]
    asked_help = any(a in ("-h", "--help") for a in arguments)
    unknown = [a for a in arguments if a.startswith("-") and a not in ("-h", "--help")]
    if unknown:
        raise ValueError(
            f"unknown option {unknown[0]}: settings are written key=value; options: --dry-run, --help"
        )
    own: dict[str, Callable[[list[str], bool, bool], None]] = {
        "run": _run,
        "quickstart": _quickstart,
        "report": _report,
        "bench": _bench,
        "demo": _demo,
        "complete": _complete,
        "convert": _convert,
    }
    if command == "features" and arguments[:1] == ["train"]:
        arguments = arguments[1:]
    if command == "sample" and any(a.startswith("pipeline=") for a in arguments):
        _draw(arguments, dry_run)
    elif command in own:
        own[command](arguments, dry_run, asked_help)
    else:
        _stage(command, arguments, dry_run, asked_help)
    return 0


def _spelled_out(arguments: list[str], option: str) -> list[str]:
    """`--option VALUE` and `--option=VALUE` as `option=VALUE`."""
    spelled, rest = [], iter(arguments)
    for a in rest:
        joined = f"{a}={next(rest, '')}" if a == option else a
        spelled.append(joined.removeprefix("--") if joined.startswith(f"{option}=") else joined)
    return spelled


def _out(arguments: list[str], default: str | None = None) -> tuple[Path, list[str]]:
    """Take `out=` from the arguments."""
    found = [a.partition("=")[2] for a in arguments if a.startswith("out=")]
    out = found[-1] if found else default
    if not out:
        raise ValueError("say where to write: add out=FOLDER")
    return Path(out), [a for a in arguments if not a.startswith("out=")]


def _stage(name: str, arguments: list[str], dry_run: bool, asked_help: bool) -> None:
    from anyorder.settings import describe, parse
    from anyorder.stages.experiment import STAGES, execute

    if asked_help:
        print(f"anyorder {name} out=FOLDER [key=value ...]\n\n{STAGES[name].__doc__}\n")
        print(describe(STAGES[name]))
        if name == "sample":
            from anyorder.cli.sample import SampleConfig

            print(f"\nanyorder sample pipeline=NAME out=FOLDER [key=value ...]\n\n{SampleConfig.__doc__}\n")
            print(describe(SampleConfig))
        return
    out, settings = _out(arguments)
    stage = parse(STAGES[name], {}, settings)
    if dry_run:
        print(f"anyorder {name} -> {out}\n{_settings(stage)}")
    else:
        execute(name, stage, out)


def _settings(stage: object) -> str:
    """A resolved configuration as YAML."""
    import dataclasses
    import json

    import yaml

    plain = json.loads(json.dumps(dataclasses.asdict(stage), default=str))  # type: ignore[call-overload]
    return yaml.safe_dump(plain, sort_keys=False, default_flow_style=None)


def _run(arguments: list[str], dry_run: bool, asked_help: bool) -> None:
    if asked_help or not arguments or "=" in arguments[0]:
        print("anyorder run EXPERIMENT.yaml [out=FOLDER] [stage.key=value ...] [--dry-run]")
        if not asked_help:
            raise ValueError("give an experiment file, for example experiments/fashion32.yaml")
        return
    _experiment(Path(arguments[0]), arguments[1:], dry_run)


def _quickstart(arguments: list[str], dry_run: bool, asked_help: bool) -> None:
    if asked_help:
        print("anyorder quickstart [out=runs/quickstart] [stage.key=value ...] [--dry-run]")
        return
    from importlib.resources import files

    _experiment(Path(str(files("anyorder.stages") / "quickstart.yaml")), arguments, dry_run)


def _experiment(path: Path, overrides: list[str], dry_run: bool) -> None:
    from anyorder.stages.experiment import load_experiment

    experiment = load_experiment(path, overrides)
    if dry_run:
        print("\n".join(experiment.plan()))
        return
    experiment.run()
    _write_report([experiment.out], experiment.out / "report.html", data_images=True)


def _report(arguments: list[str], dry_run: bool, asked_help: bool) -> None:
    if asked_help:
        print("anyorder report RUN... [out=RUN/report.html] [data_images=true]\n")
        print("run folders of one experiment are its seeds: stages of equal names are one variant")
        print("out=FILE.md writes the tables alone as Markdown, out=FILE.json as JSON; manifests are enough")
        print("data_images=false leaves out figures that contain images of the data set")
        return
    folders = [Path(a) for a in arguments if "=" not in a]
    if not folders:
        raise ValueError("give one or more run folders, for example runs/quickstart")
    out, rest = _out(arguments, str(folders[0] / "report.html"))
    settings = dict(a.split("=", 1) for a in rest if "=" in a)
    images = settings.pop("data_images", "true").lower()
    if settings or images not in ("true", "false"):
        raise ValueError(f"report takes out=FILE and data_images=true|false, got {' '.join(rest)}")
    if dry_run:
        print(f"report of {', '.join(map(str, folders))} -> {out}")
        return
    _write_report(folders, out, data_images=images == "true")


def _write_report(folders: list[Path], out: Path, data_images: bool) -> None:
    from anyorder.report.summary import report

    table = report(folders, out, data_images=data_images)
    if table is not None:
        print(table.text())
    print(f"report: {out}")


def _bench(arguments: list[str], dry_run: bool, asked_help: bool) -> None:
    from anyorder.bench.bench import against, bench, load_result
    from anyorder.bench.workloads import BenchConfig
    from anyorder.settings import describe, parse

    if asked_help:
        print("anyorder bench [out=bench.json] [key=value ...] [against=OLD.json]")
        print("anyorder bench NEW.json against=OLD.json  compares two results without measuring")
        print("--against FILE is the same as against=FILE\n")
        print(f"{BenchConfig.__doc__}\n\n{describe(BenchConfig)}")
        return
    out, rest = _out(arguments, "bench.json")
    old, settings = _against(rest)
    files = [Path(a) for a in settings if "=" not in a]
    if files and (len(settings) > 1 or old is None):
        raise ValueError(
            "two results are compared by anyorder bench NEW.json against=OLD.json, without settings"
        )
    config = parse(BenchConfig, {}, [] if files else settings)
    before = load_result(old) if old else None  # a wrong file is refused before anything is measured
    if dry_run:
        print(_settings(config))
        return
    result = load_result(files[0]) if files else bench(config, out)
    if before is not None:
        table = against(result, before)
        print(f"\n{table.caption}\n{table.text()}")


def _against(arguments: list[str]) -> tuple[Path | None, list[str]]:
    """Take `against=FILE` from the arguments."""
    found = [a.partition("=")[2] for a in arguments if a.startswith("against=")]
    if found and not found[-1]:
        raise ValueError("say what to compare with: --against FILE")
    return Path(found[-1]) if found else None, [a for a in arguments if not a.startswith("against=")]


def _demo(arguments: list[str], dry_run: bool, asked_help: bool) -> None:
    try:
        import starlette  # noqa: F401
        import uvicorn  # noqa: F401
    except ImportError as e:
        raise ImportError(f"the demo needs a web server ({e}): pip install 'anyorder[demo]'") from e
    from anyorder.demo.server import DemoConfig, serve
    from anyorder.settings import describe, parse

    if asked_help:
        print(f"anyorder demo pipeline=FOLDER [key=value ...]\n\n{DemoConfig.__doc__}\n")
        print(describe(DemoConfig))
        return
    config = parse(DemoConfig, {}, arguments)
    if dry_run:
        print(_settings(config))
    else:
        serve(config)


def _draw(arguments: list[str], dry_run: bool) -> None:
    from anyorder.cli.sample import SampleConfig, sample_files
    from anyorder.settings import parse

    out, settings = _out(arguments)
    config = parse(SampleConfig, {}, settings)
    if dry_run:
        print(f"anyorder sample -> {out}\n{_settings(config)}")
        return
    for path in [*sample_files(config, out), out / "generation.webp"]:
        print(path)


def _complete(arguments: list[str], dry_run: bool, asked_help: bool) -> None:
    from anyorder.cli.complete import CompleteConfig, complete_file
    from anyorder.settings import describe, parse

    if asked_help:
        print("anyorder complete pipeline=FOLDER image=FILE out=FOLDER [key=value ...]\n")
        print(f"{CompleteConfig.__doc__}\n")
        print(describe(CompleteConfig))
        return
    out, settings = _out(arguments)
    config = parse(CompleteConfig, {}, settings)
    if dry_run:
        print(f"anyorder complete -> {out}\n{_settings(config)}")
        return
    for path in complete_file(config, out):
        print(path)


def _convert(arguments: list[str], dry_run: bool, asked_help: bool) -> None:
    from anyorder.settings import describe, parse
    from anyorder.stages.convert import ConvertConfig, convert

    if asked_help:
        print(f"anyorder convert SOURCE DEST [key=value ...]\n\n{ConvertConfig.__doc__}\n")
        print(describe(ConvertConfig))
        return
    paths = [a for a in arguments if "=" not in a]
    if len(paths) != 2:
        raise ValueError(
            f"give the downloaded file and the folder to write, got {' '.join(paths) or 'neither'}: "
            "anyorder convert SOURCE DEST [key=value ...]"
        )
    settings = [a for a in arguments if "=" in a]
    config = parse(ConvertConfig, {"source": paths[0]}, settings)
    if dry_run:
        print(f"anyorder convert {paths[0]} -> {paths[1]}\n{_settings(config)}")
    else:
        convert(config, Path(paths[1]))


if __name__ == "__main__":
    sys.exit(main())
