"""The command `anyorder`: one sub-command per stage, and a few that run many."""

import contextlib
import ctypes
import errno
import inspect
import logging
import os
import sys
import time
from collections.abc import Callable, Collection, Sequence

from anyorder import __version__, settings
from anyorder.cli import commands

FLAGS = ("--dry-run", "--traceback", "--help", "--help-all", "--yes", "-q", "--quiet", "-v", "--verbose")
FIRST = """anyorder: any-order autoregressive image models. Begin with one of these:

  anyorder sample pipeline=fashion32 out=images   generate images with the model that comes with the package
  anyorder demo pipeline=emoji64                  the same in a browser
  anyorder fit FOLDER                             train a model on your own images, in the time you give
  anyorder quickstart                             train a model on procedural images, with a report

usage: anyorder --help lists all commands, anyorder COMMAND --help the settings of one"""
USAGE = """usage: anyorder COMMAND [key=value ...] [--dry-run] [--quiet | --verbose] [--traceback]
       anyorder run EXPERIMENT.yaml [stage.key=value ...]
       anyorder COMMAND --help | --help-all
       anyorder --version | --completion > FILE   (then: source FILE)

Settings are written key=value or --key value with dotted keys, for example train.steps=100. out=FOLDER says
where a command writes; overwrite=true replaces what was made there with other settings. The same command
again resumes what was interrupted and skips what is up to date. --quiet shows errors and results alone,
--verbose adds time and part of the program to each message. Exit codes: 0 done, 1 failed, 2 wrong usage
or missing input, 130 interrupted. No colours are used.

device=cpu, cuda, cuda:1 or mps says where to compute; by default it is the first GPU.
torchrun --nproc-per-node=N -m anyorder COMMAND ... shares a stage or a run among N processes.
"""
GROUPS = {
    "whole runs": {
        "fit": "a model of your own images: plans, trains, compares; begin here",
        "quickstart": "the whole method on procedural sunsets, in minutes, with a report",
        "run": "an experiment file: every stage that is not up to date, then a report",
        "plan": "parameters, FLOPs, memory, hours and disk of an experiment",
        "report": "one HTML page about one or more run folders",
        "demo": "watch images being generated, in a browser",
        "ls": "what run folders hold: stages, sizes, up to date or why not",
        "clean": "delete the checkpoints of finished trainings",
        "verify": "compare artifacts and what they were made from with their hashes",
    },
    "stages": {
        "data": "decode a folder, parquet files or a Hugging Face data set to one size",
        "tokenizer": "train the VQ tokenizer",
        "features": "make the feature space of FD and KID: a trained classifier or a pretrained network",
        "tokens": "encode all images",
        "train": "train the any-order model, or fine-tune it on extracted orders",
        "orders": "extract the order of every training image from the model's confidence",
        "iterate": "rounds of extraction and fine-tuning with a location head",
        "tune": "search temperature and guidance scale on the validation split",
        "sample": "generate images in a fixed, random or inferred order",
        "eval": "measure samples and the model's likelihood",
        "compare": "two evaluations: differences with bootstrap intervals",
        "completion": "fill holes of test images and measure the results",
        "grid": "likelihood and samples on a grid that the model was not trained on",
        "pipeline": "put model and tokenizer into one folder for Pipeline.from_pretrained",
    },
    "images": {"complete": "generate parts of an image: inpainting, outpainting, variations"},
    "published models": {"convert": "downloaded weights of LlamaGen, RandAR, ARPG, MaskGIT-VQ to a folder"},
    "the machine": {"bench": "times as shares of what the machine can do, measured in the same run"},
}
"""What `anyorder --help` says; functions of `commands` of these names do it, `stage` does all others."""
COMMANDS = {name: about for group in GROUPS.values() for name, about in group.items()}
PARALLEL = (commands.stage, commands.run, commands.quickstart)
"""What several processes of torchrun do together; of anything else the first one does all."""


# --- from arguments to a command --------------------------------------------------------------------------


def _help(name: str = "", full: bool = False) -> None:
    if not name:
        print(USAGE)
        for group, members in GROUPS.items():
            lines = [f"  {name:11} {about}" for name, about in members.items()]
            print("\n".join([f"{group}:", *lines, ""]))
        return
    doc = getattr(commands, name, commands.stage).__doc__
    usage = inspect.cleandoc(doc or "").replace("\nanyorder", "\n       anyorder")
    print(f"usage: anyorder {name} {usage}\n\n{name}: {COMMANDS[name]}")
    print(f"example: anyorder {name} {commands.EXAMPLES[name]}")
    for config in _configs(name):
        print(f"\n{inspect.getdoc(config)}\n\n{settings.describe(config, full)}")


def _configs(name: str) -> list[type]:
    """What holds the settings of a command; nothing for those that take only folders or a file."""
    without = ("run", "quickstart", "report", "verify", "ls", "clean")
    kinds = ["sample pipeline", name] if name == "sample" else [name] if name not in without else []
    return [commands.config_class(kind) for kind in kinds]


def _completion() -> str:
    """A script that completes commands and settings in bash, and in zsh after `bashcompinit`."""
    lines = ["_anyorder() {", "  local words", "  case ${COMP_WORDS[1]} in"]
    for name in COMMANDS:
        keys = dict.fromkeys(key for config in _configs(name) for key in settings.names(config))
        common = [f"{key}=" for key in (*keys, "out", "overwrite", "device")]
        lines.append(f'    {name}) words="{" ".join([*common, *FLAGS])}" ;;')
    lines += ["  esac", f'  [ "$COMP_CWORD" -eq 1 ] && words="{" ".join(COMMANDS)}"']
    lines += ['  COMPREPLY=($(compgen -W "$words" -- "${COMP_WORDS[COMP_CWORD]}"))', "}"]
    return "\n".join([*lines, "complete -o nospace -o default -F _anyorder anyorder"])


def _understand(arguments: list[str]) -> commands.Call:
    """Split the arguments; a ValueError names the command or option nearest to an unknown one."""
    arguments = [f"{text[2:]}=true" if text in ("--csv", "--latex") else text for text in arguments]
    rest = settings.as_overrides(arguments, FLAGS)
    words = [text for text in rest if text not in FLAGS]
    name, *words = words or [""]
    if name not in COMMANDS:
        hint = settings.did_you_mean(name, COMMANDS)
        raise ValueError(f"unknown command '{name}'{hint} Commands: {', '.join(COMMANDS)}")
    given = [text for text in words if "=" in text and "/" not in text.partition("=")[0]]
    paths = [text for text in words if text not in given]
    call = commands.Call(name, paths, given, "--dry-run" in rest, "--yes" in rest)
    if device := call.take("device"):
        os.environ["ANYORDER_DEVICE"] = device
    return call


def _function(call: commands.Call) -> Callable[[commands.Call], str]:
    """What does the command; `sample` is a stage unless it is given a pipeline."""
    is_stage = call.name == "sample" and not any(text.startswith("pipeline=") for text in call.settings)
    return commands.stage if is_stage else getattr(commands, call.name, commands.stage)


class _Once(logging.Filter):
    """Passes a warning only the first time."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[str] = set()

    def filter(self, record: logging.LogRecord) -> bool:
        text = record.getMessage()
        new = record.levelno < logging.WARNING or text not in self.seen
        self.seen.add(text)
        return new


def _set_up_log(flags: Collection[str]) -> None:
    quiet = _follows() or bool({"-q", "--quiet"} & {*flags})
    verbose = bool({"-v", "--verbose"} & {*flags})
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(asctime)s %(name)s: %(message)s" if verbose else "%(message)s"))
    handler.addFilter(_Once())
    logging.basicConfig(level=logging.ERROR if quiet else logging.INFO, handlers=[handler])
    if quiet:
        os.environ["TQDM_DISABLE"] = "1"  # read when tqdm is imported, which is later
    if not sys.stderr.isatty():
        os.environ.setdefault("TQDM_MININTERVAL", "10")  # seconds: logs of jobs are read, not watched


def _follows() -> bool:
    """Whether this is one of several processes of torchrun, but the first, which alone talks."""
    return "LOCAL_RANK" in os.environ and os.environ.get("RANK") != "0"


def keep_freed_memory() -> None:
    """Let glibc keep up to 1 GiB that was freed, and take no block below 1 GiB from the system alone.

    Otherwise each large tensor on a CPU is given back and mapped anew, page by page: a fifth of the time of a
    training. Its largest memory grows by a third. Does nothing where the user has set glibc's variables.
    """
    set_by_user = any(name.startswith(("MALLOC_", "GLIBC_TUNABLES")) for name in os.environ)
    mallopt = None if set_by_user or sys.platform != "linux" else getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt:
        for threshold in (-3, -1):  # M_MMAP_THRESHOLD and M_TRIM_THRESHOLD of malloc.h
            mallopt(threshold, 1 << 30)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code: 0 done, 1 failed, 2 wrong usage, 130 interrupted."""
    given = [*(sys.argv[1:] if argv is None else argv)]
    arguments = ["--help" if a == "-h" or (a == "help" and i == 0) else a for i, a in enumerate(given)]
    _set_up_log({*arguments})
    follows, function = _follows(), None
    try:
        if not arguments:
            print(FIRST)
        elif arguments[0] == "--version":
            print(f"anyorder {__version__}")
        elif arguments[0] == "--completion":
            print(_completion())
        elif arguments[0] in ("--help", "--help-all"):
            _help()
        else:
            call = _understand(arguments)
            if {"--help", "--help-all"} & {*arguments}:
                _help(call.name, "--help-all" in arguments)
            else:
                function = _function(call)
                keep_freed_memory()
                parallel = function in PARALLEL and not call.dry_run
                with contextlib.ExitStack() as world:
                    if parallel:
                        from anyorder.inference.processes import joined

                        world.enter_context(joined())
                    written = "" if follows and not parallel else function(call)
                if written and not call.dry_run and not follows:
                    print(written)
        sys.stdout.flush()
        return 0 if arguments else 2
    except BrokenPipeError:  # of a reader that has seen enough: anyorder --help | head
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except KeyboardInterrupt:
        if not follows:
            then = "goes on from here" if function in (*PARALLEL, commands.fit) else "begins anew"
            print(f"anyorder: interrupted; the same command {then}", file=sys.stderr)
        return 130
    except (ValueError, OSError, ImportError, MemoryError) as e:
        if "--traceback" in arguments:
            raise
        if follows:  # torchrun ends it meanwhile if the first process has the same to say
            time.sleep(5)
        full = isinstance(e, OSError) and (e.errno == errno.ENOSPC or "No space left" in str(e))
        advice = "the disk is full: free some space and run the same command again, it goes on from here: "
        reason = " ".join(str(e).splitlines()) or "out of memory"
        print(f"anyorder: error: {advice if full else ''}{reason}", file=sys.stderr)
        return 2 if isinstance(e, ValueError | FileNotFoundError) else 1
