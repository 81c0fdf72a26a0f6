"""The pipeline, in the paper's order: every stage reads artifacts and writes one.

    data -> tokenizer -> tokens -> train (random orders) -> orders -> train (extracted orders)
         -> features                                     -> sample -> eval -> compare

A stage is a dataclass: its fields are its configuration, `inputs` names those that are artifacts, and
`run` does the work. `execute` skips a stage whose artifact is up to date and resumes one that was killed.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from anyorder.files import MANIFEST
from anyorder.settings import did_you_mean, load_yaml, parse
from anyorder.stages.artifacts import Artifact
from anyorder.stages.compare import CompareStage
from anyorder.stages.completion import CompletionStage
from anyorder.stages.data import DataStage
from anyorder.stages.eval import EvalStage
from anyorder.stages.execute import execute, split
from anyorder.stages.features import FeaturesStage
from anyorder.stages.grid import GridStage
from anyorder.stages.iterate import IterateStage
from anyorder.stages.orders import OrdersStage
from anyorder.stages.pipeline import PipelineStage
from anyorder.stages.sample import SampleStage
from anyorder.stages.seeds import SEED, expand
from anyorder.stages.tokenizer import TokenizerStage
from anyorder.stages.tokens import TokensStage
from anyorder.stages.train import TrainStage

STAGES: dict[str, Any] = {
    "data": DataStage,
    "tokenizer": TokenizerStage,
    "features": FeaturesStage,
    "tokens": TokensStage,
    "train": TrainStage,
    "orders": OrdersStage,
    "iterate": IterateStage,
    "sample": SampleStage,
    "eval": EvalStage,
    "compare": CompareStage,
    "completion": CompletionStage,
    "grid": GridStage,
    "pipeline": PipelineStage,
}


@dataclasses.dataclass
class Experiment:
    """Named stages in the sequence in which they run."""

    out: Path
    stages: dict[str, tuple[str, Any]]
    """Artifact name -> (stage name, configuration)."""

    def run(self) -> None:
        """Run every stage that is not up to date."""
        for name, (kind, stage) in self.stages.items():
            execute(kind, stage, self.out / name)

    def plan(self) -> list[str]:
        """One line per stage: what would be run (a stage is looked at only if its inputs are finished)."""
        lines, stale = [], set()
        for name, (kind, stage) in self.stages.items():
            settings, inputs, completion = split(stage)
            ready = all((path / MANIFEST).is_file() and path not in stale for path in inputs.values())
            current = ready and Artifact.is_current(self.out / name, kind, settings, inputs, completion)
            if not current:
                stale.add(self.out / name)
            lines.append(f"{'up to date' if current else 'to run':10}  {kind:9}  {self.out / name}")
        return lines


def load_experiment(path: str | Path, overrides: Sequence[str] = ()) -> Experiment:
    """Read an experiment file and apply `stage.key=value` overrides.

    The file holds `out` (a folder) and `stages`: artifact name -> settings, in sequence. The setting
    `stage` says what kind of stage it is where the name does not. Inputs name earlier artifacts of the
    file, or are paths. A stage whose name holds `{seed}` is made once for each of `seeds`; overrides name
    all of these (`raster-s{seed}.train.steps=10`) or one (`raster-s0.train.steps=10`), and `seeds=0,1` takes
    these seeds instead of the file's.

    Raises:
        FileNotFoundError: no such file.
        ValueError: unknown stage or setting (with a suggestion), or a bad value; the stage is named.
    """
    values = load_yaml(path)
    _refuse_unknown(values, ("out", "seeds", "stages"), f"setting in {path}")
    templates = values.get("stages") or {}
    seeds, overrides = _seeds(values.get("seeds", []), overrides)
    try:
        # With seeds=... a stage may still read what other runs make of the file's other seeds.
        elsewhere = expand(templates, values.get("seeds", []))
        expanded = expand(templates, seeds)
    except ValueError as e:
        raise ValueError(f"{path}: {e}") from e
    by_stage = _by_stage(overrides, list(templates), list(expanded), seeds)
    out = Path(by_stage.pop("out", [values.get("out", f"runs/{Path(path).stem}")])[0])
    stages: dict[str, tuple[str, Any]] = {}
    for name, settings in expanded.items():
        settings = dict(settings or {})
        kind = settings.pop("stage", name)
        _refuse_unknown([kind], STAGES, f"stage of '{name}' in {path}")
        for role in STAGES[kind].inputs:
            if settings.get(role) in stages or settings.get(role) in elsewhere.keys() - expanded.keys():
                settings[role] = out / settings[role]
        try:
            stages[name] = kind, parse(STAGES[kind], settings, by_stage.get(name, ()))
        except ValueError as e:
            raise ValueError(f"stage '{name}': {e}") from e
    return Experiment(out, stages)


def _seeds(seeds: Any, overrides: Sequence[str]) -> tuple[Any, list[str]]:
    """The seeds of the file, or those of the override `seeds=0,1`; and the other overrides."""
    for override in overrides:
        if override.startswith("seeds="):
            numbers = override.removeprefix("seeds=").strip("[]").split(",")
            if not all(number.strip().isdecimal() for number in numbers):
                raise ValueError(f"seeds must be integers >= 0, such as seeds=0,1, got '{override}'")
            seeds = [int(number) for number in numbers]
    return seeds, [override for override in overrides if not override.startswith("seeds=")]


def _by_stage(
    overrides: Sequence[str], templates: list[str], names: list[str], seeds: Sequence[int]
) -> dict[str, list[str]]:
    """Overrides by the stage they name; `out=` stands alone, templates stand for the stages made from them.

    What is said of one seed wins over what is said of all, in whatever sequence.
    """
    for_all: dict[str, list[str]] = {}
    for_one: dict[str, list[str]] = {}
    for override in overrides:
        key, _, value = override.partition("=")
        if key == "out":
            for_one["out"] = [value]
            continue
        stage, _, rest = override.partition(".")
        stage, rest = (stage, rest) if rest else (key, "")
        _refuse_unknown([stage], dict.fromkeys([*templates, *names]), f"stage in override '{override}'")
        for seed in seeds if SEED in stage else []:
            for_all.setdefault(stage.replace(SEED, str(seed)), []).append(rest.replace(SEED, str(seed)))
        if SEED not in stage:
            for_one.setdefault(stage, []).append(rest)
    return {name: for_all.get(name, []) + for_one.get(name, []) for name in for_all | for_one}


def _refuse_unknown(names: Any, allowed: Any, what: str) -> None:
    for name in names:
        if name not in allowed:
            hint = did_you_mean(name, allowed)
            raise ValueError(f"unknown {what}: '{name}'{hint} Allowed: {', '.join(allowed)}")
