"""Experiment files: stages in the paper's order; every stage reads artifacts and writes one.

    data -> tokenizer -> tokens -> train (random orders) -> orders -> train (extracted orders)
         -> features                                     -> sample -> eval -> compare

A stage is a dataclass: its fields are its configuration, `inputs` names those that are artifacts, and
`run` does the work. `execute` skips a stage whose artifact is up to date and resumes one that was killed.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

from anyorder.contracts import require
from anyorder.files import MANIFEST
from anyorder.settings import did_you_mean, load_yaml, parse
from anyorder.stages.artifacts import Artifact
from anyorder.stages.execute import execute, resolved, split

NAMES = (
    "data", "tokenizer", "features", "tokens", "train", "orders", "iterate", "sample", "eval", "compare",
    "completion", "grid", "pipeline",
)  # fmt: skip
STAGES: dict[str, Any] = {
    name: getattr(import_module(f"anyorder.stages.{name}"), f"{name.capitalize()}Stage") for name in NAMES
}
"""By name of the command: stages/NAME.py holds the class NameStage."""
SAMPLES_PER_SEED = 100_000
"""Distance between the first random streams of samples (and extracted orders) of two experiment seeds."""


@dataclasses.dataclass
class Experiment:
    """Named stages in the sequence in which they run."""

    out: Path
    stages: dict[str, tuple[str, Any]]
    """Artifact name -> (stage name, configuration)."""

    def run(self, overwrite: bool = False) -> None:
        """Run every stage that is not up to date; `overwrite` replaces those of other settings."""
        for name, (kind, stage) in self.stages.items():
            execute(kind, stage, self.out / name, overwrite=overwrite)

    def plan(self) -> list[str]:
        """One line per stage: what would be run; only finished stages with finished inputs are looked at."""
        lines: list[str] = []
        stale: set[Path] = set()
        for name, (kind, stage) in self.stages.items():
            current = not stale & set(_inputs(stage)) and _is_current(self.out / name, kind, stage)
            stale |= set() if current else {self.out / name}
            lines.append(f"{'up to date' if current else 'to run':10}  {kind:9}  {self.out / name}")
        return lines


def _is_current(folder: Path, kind: str, stage: Any) -> bool:
    if not all((path / MANIFEST).is_file() for path in (folder, *_inputs(stage))):
        return False
    try:
        settings, inputs, completion = split(resolved(stage))
    except FileNotFoundError:  # images or inputs of inputs are gone: running the stage says so
        return False
    return Artifact.is_current(folder, kind, settings, inputs, completion)


def _inputs(stage: Any) -> Iterable[Path]:
    return filter(None, (getattr(stage, role) for role in stage.inputs))


def load_experiment(path: str | Path, overrides: Sequence[str] = ()) -> Experiment:
    """Read an experiment file and apply `stage.key=value` overrides.

    The file holds `out` (a folder), `seed` (0 by default) and `stages`: artifact name -> settings, in
    sequence. The setting `stage` says what kind of stage it is where the name does not. Inputs name earlier
    artifacts of the file, or are paths. `out=` and `seed=` replace those of the file. The seed repeats an
    experiment: it is added to the seeds of all trainings of the any-order model, and gives samples other
    random streams; data, tokenizer and features stay the same, so that results can be compared.

    Raises:
        FileNotFoundError: no such file.
        ValueError: unknown stage or setting (with a suggestion), or a bad value; the stage is named.
    """
    values = load_yaml(path)
    _refuse_unknown(values, ("out", "seed", "stages"), f"setting in {path}")
    templates = values.get("stages") or {}
    by_stage = _by_stage(overrides, list(templates))
    out = Path(by_stage.pop("out", [values.get("out", f"runs/{Path(path).stem}")])[-1])
    seed = str(by_stage.pop("seed", [values.get("seed", 0)])[-1])
    require(seed.isdecimal(), f"seed must be an integer >= 0, got seed={seed}")
    stages: dict[str, tuple[str, Any]] = {}
    for name, given in templates.items():
        settings = dict(given or {})
        kind = settings.pop("stage", name)
        _refuse_unknown([kind], STAGES, f"stage of '{name}' in {path}")
        for role in (*STAGES[kind].inputs, *getattr(STAGES[kind], "references", ())):
            if settings.get(role) in stages:
                settings[role] = out / settings[role]
        try:
            stage = parse(STAGES[kind], settings, by_stage.get(name, ()))
        except ValueError as e:
            raise ValueError(f"stage '{name}': {e}") from e
        stages[name] = kind, _reseeded(kind, stage, int(seed))
    return Experiment(out, stages)


def _reseeded(kind: str, stage: Any, seed: int) -> Any:
    """The stage of another repetition."""
    if kind in ("train", "iterate"):
        training = dataclasses.replace(stage.train, seed=stage.train.seed + seed)
        return dataclasses.replace(stage, train=training)
    if kind in ("orders", "sample"):
        return dataclasses.replace(stage, seed=stage.seed + SAMPLES_PER_SEED * seed)
    return stage


def _by_stage(overrides: Sequence[str], names: list[str]) -> dict[str, list[Any]]:
    """Overrides by the stage they name; `out=` and `seed=` stand alone."""
    found: dict[str, list[Any]] = {}
    for override in overrides:
        key, _, value = override.partition("=")
        stage, _, rest = key.partition(".")
        if key in ("out", "seed"):
            rest = value
        else:
            _refuse_unknown([stage], names, f"stage in override '{override}'")
            rest = override.removeprefix(f"{stage}.") if rest else ""
        found.setdefault(stage, []).append(rest)
    return found


def _refuse_unknown(names: Iterable[str], allowed: Iterable[str], what: str) -> None:
    for name in names:
        if name not in allowed:
            hint = did_you_mean(name, allowed)
            raise ValueError(f"unknown {what}: '{name}'{hint} Allowed: {', '.join(allowed)}")
