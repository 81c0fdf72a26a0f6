"""Experiment files: stages in the paper's order; every stage reads artifacts and writes one.

    data -> tokenizer -> tokens -> train (random orders) -> orders -> train (extracted orders)
         -> features                                     -> (tune) -> sample -> eval -> compare

A stage is a dataclass: its fields are its configuration, `inputs` names those that are artifacts, and
`run` does the work. `execute` skips a stage whose artifact is up to date and resumes one that was killed.
"""

import dataclasses
import itertools
import re
from collections.abc import Iterable, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import yaml

from anyorder.contracts import require
from anyorder.data.classes import index_of
from anyorder.files import MANIFEST, expanded
from anyorder.settings import did_you_mean, parse
from anyorder.stages.artifacts import Artifact
from anyorder.stages.execute import execute, resolved, split

NAMES = (
    "data", "tokenizer", "features", "tokens", "train", "orders", "iterate", "tune", "sample", "eval",
    "compare", "completion", "grid", "pipeline",
)  # fmt: skip
STAGES: dict[str, Any] = {
    name: getattr(import_module(f"anyorder.stages.{name}"), f"{name.capitalize()}Stage") for name in NAMES
}
"""By name of the command: stages/NAME.py holds the class NameStage."""
SAMPLES_PER_SEED = 100_000
"""Distance between the first random streams of samples (and extracted orders) of two experiment seeds."""
RECIPES = Path(__file__).parent.parent / "recipes"
"""Experiment files that come with the package."""
LARGEST_YAML, MOST_VALUES = 1 << 20, 100_000
"""Limits of a YAML file: bytes, and values after its aliases are expanded."""


@dataclasses.dataclass
class Experiment:
    """Named stages in the sequence in which they run."""

    out: Path
    stages: dict[str, tuple[str, Any]]
    """Artifact name -> (stage name, configuration)."""

    def run(self, overwrite: bool = False) -> None:
        """Run every stage that is not up to date; `overwrite` replaces those of other settings."""
        self._require_inputs()
        for name, (kind, stage) in self.stages.items():
            execute(kind, stage, self.out / name, overwrite=overwrite)

    def plan(self) -> list[str]:
        """One line per stage: what would be run; only finished stages with finished inputs are looked at."""
        self._require_inputs(paths=False)  # those of a recipe may be still to come
        lines: list[str] = []
        stale: set[Path] = set()
        for name, (kind, stage) in self.stages.items():
            current = not stale & set(_inputs(stage)) and _is_current(self.out / name, kind, stage)
            if not current:
                stale.add(self.out / name)
            lines.append(f"{'up to date' if current else 'to run':10}  {kind:9}  {self.out / name}")
        return lines

    def _require_inputs(self, paths: bool = True) -> None:
        """A ValueError for an input that no earlier stage makes and that is not there: a mistyped name.

        Without `paths` only for those of one word.
        """
        earlier: dict[str, Path] = {}
        for name, (_, stage) in self.stages.items():
            for role in (*stage.inputs, *getattr(stage, "references", ())):
                path = getattr(stage, role)
                if path is None or path.exists() or (len(path.parts) > 1 and not paths):
                    continue
                hint = did_you_mean(str(path), earlier) or ": name an earlier stage, or a folder that exists"
                text = f"stage '{name}': {role}={path} is no earlier stage of the file and no path{hint}"
                require(any(path.resolve().is_relative_to(made) for made in earlier.values()), text)
            earlier[name] = (self.out / name).resolve()


def _is_current(folder: Path, kind: str, stage: Any) -> bool:
    if not all((path / MANIFEST).is_file() for path in (folder, *_inputs(stage))):
        return False
    try:
        return Artifact.is_current(folder, kind, *split(resolved(stage)))
    except FileNotFoundError:  # images or inputs of inputs are gone: running the stage says so
        return False


def _inputs(stage: Any) -> Iterable[Path]:
    return filter(None, (getattr(stage, role) for role in stage.inputs))


def find_experiment(name: str) -> Path:
    """An experiment file, or one of this name that comes with the package; an error lists these."""
    known = [path for folder in (RECIPES, Path(__file__).parent) for path in sorted(folder.glob("*.yaml"))]
    recipes = {path.stem: path for path in known}
    path = expanded(name)
    found = path if path.is_file() else recipes.get(name)
    if found is None:
        hint = did_you_mean(name, recipes)
        raise FileNotFoundError(f"no configuration file {name}{hint or '.'} Recipes are {', '.join(recipes)}")
    return found


def load_experiment(path: str | Path, overrides: Sequence[str] = ()) -> Experiment:
    """Read an experiment file and apply `stage.key=value` overrides.

    The file holds `out` (a folder), `seed` (0 by default) and `stages`: artifact name -> settings, in
    sequence. The setting `stage` says what kind of stage it is where the name does not. Inputs name earlier
    artifacts of the file, or are paths. `out=` and `seed=` replace those of the file. The seed repeats an
    experiment: it is added to the seeds of all trainings of the any-order model, and gives samples other
    random streams; data, tokenizer and features stay the same, so that results can be compared.

    Raises:
        FileNotFoundError: no such file.
        ValueError: unknown stage or setting (with a suggestion), or a bad value; file and stage are named.
    """
    values = load_yaml(path)
    for key in values:
        index_of(key, ("out", "seed", "stages"), f"setting in {path}")
    templates = _mapping(values.get("stages"), f"{path}: stages")
    by_stage = _by_stage(overrides, list(templates))
    require(bool(templates), f"{path} has no stages: give some, stages: {{data: {{source: FOLDER}}, ...}}")
    named = values.get("out")
    require(isinstance(named, str | None), f"{path}: out must be the name of a folder, got {named!r}")
    where = by_stage.pop("out", [named or f"runs/{Path(path).stem}"])[-1]
    require(where != "", "out= is empty: say where to write")
    out = expanded(where)
    seed = str(by_stage.pop("seed", [values.get("seed", 0)])[-1])
    require(seed.isdecimal(), f"seed must be an integer >= 0, got seed={seed}")
    stages: dict[str, tuple[str, Any]] = {}
    for name, given in templates.items():
        text = f"{path}: a stage cannot be called '{name}': choose a name of a folder, not out or seed"
        a_name = Path(name).name == name and name.isprintable()
        require(a_name and name not in ("", "..", "out", "seed"), text)
        settings = _mapping(given, f"{path}, stage '{name}'")
        kind = str(settings.pop("stage", name))
        index_of(kind, list(STAGES), f"stage of '{name}' in {path}")
        roles = (*STAGES[kind].inputs, *getattr(STAGES[kind], "references", ()))
        settings |= {r: out / str(settings[r]) for r in roles if str(settings.get(r)) in stages}
        earlier = {f"{role}={other}": f"{role}={out / other}" for role in roles for other in stages}
        try:
            stage = parse(STAGES[kind], settings, [earlier.get(x, x) for x in by_stage.get(name, ())])
        except ValueError as e:
            raise ValueError(f"{path}, stage '{name}': {e}") from e
        stages[name] = kind, _reseeded(kind, stage, int(seed))
    return Experiment(out, stages)


def _mapping(value: Any, where: str) -> dict[str, Any]:
    require(isinstance(value, dict | None), f"{where} must hold a mapping (key: value), got {value!r}")
    return {str(key): item for key, item in (value or {}).items()}


def _reseeded(kind: str, stage: Any, seed: int) -> Any:
    """The stage of another repetition."""
    if kind in ("train", "iterate"):
        training = dataclasses.replace(stage.train, seed=stage.train.seed + seed)
        return dataclasses.replace(stage, train=training)
    if kind in ("sample", "tune") or (kind == "orders" and not stage.policy.deterministic):
        return dataclasses.replace(stage, seed=stage.seed + SAMPLES_PER_SEED * seed)
    return stage


def _by_stage(overrides: Sequence[str], names: list[str]) -> dict[str, list[Any]]:
    """Overrides by the stage they name; `out=` and `seed=` stand alone."""
    found: dict[str, list[Any]] = {}
    spelled = {name.replace("-", "_"): name for name in names}  # as --any-order.train.steps arrives
    spelled |= {name: name for name in names}
    for override in overrides:
        key, _, value = override.partition("=")
        stages = [name for name in spelled if key.startswith(f"{name}.")]  # names may hold dots, too
        typed = max(stages, key=len, default=key.partition(".")[0])
        stage, rest = spelled.get(typed, typed), key.removeprefix(typed)[1:]
        if key in ("out", "seed"):
            rest = value
        else:
            index_of(stage, names, f"stage in override '{override}'")
            text = f"got override '{override}', expected {stage}.key=value: say which setting of the stage"
            require(bool(rest), text)
            rest = override.removeprefix(f"{typed}.")
        found.setdefault(stage, []).append(rest)
    return found


# --- YAML -------------------------------------------------------------------------------------------------


def load_yaml(path: str | Path) -> dict[str, Any]:
    """Read a YAML file that holds one mapping; an empty file is an empty mapping.

    Scalars stay texts, except `true`, `false`, `null` and integers that YAML itself would write so.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not YAML, not a mapping, too large, or a key that is given twice; the message says where.
    """
    path = expanded(path)
    if not path.is_file():
        raise FileNotFoundError(f"no configuration file {path}")
    if path.stat().st_size > LARGEST_YAML:
        raise ValueError(f"{path} is larger than {LARGEST_YAML >> 20} MiB: that is no configuration")
    try:
        loader = _Loader(path.read_text(encoding="utf-8"))
        node = loader.get_single_node()
        if node is not None and _size(node, {}) > MOST_VALUES:
            raise yaml.YAMLError(f"more than {MOST_VALUES} values, with its aliases expanded")
        values = None if node is None else loader.construct_document(node)
    except (yaml.YAMLError, ValueError, LookupError, AttributeError, RecursionError) as e:  # of !!tags, too
        reason = "nested too deeply" if isinstance(e, RecursionError) else " ".join(str(e).split())
        raise ValueError(f"{path} is not valid YAML: {reason}") from e
    return _mapping(values, str(path))


class _Loader(yaml.SafeLoader):
    """Makes plain values only; what YAML would write differently (010, yes, 1.10) stays a text."""

    yaml_implicit_resolvers = {}  # noqa: RUF012


for _tag, _pattern, _first in (
    ("bool", "(true|false)$", "tf"),
    ("null", "(null|~|)$", ["n", "~", ""]),
    ("int", "(0|-?[1-9][0-9]{0,17})$", "-0123456789"),
    ("merge", "<<$", "<"),
):
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(_pattern), list(_first))


def _size(node: yaml.Node, known: dict[int, int]) -> int:
    """Number of values in a node, an alias counted as often as it is used; refuses equal keys."""
    if id(node) not in known:
        nodes = [] if isinstance(node, yaml.ScalarNode) else node.value
        if isinstance(node, yaml.MappingNode):
            keys: dict[str, yaml.Node] = {}
            for key, _ in node.value:
                if keys.setdefault(name := str(key.value), key) is not key:
                    raise yaml.MarkedYAMLError(None, None, f"key '{name}' is given twice", key.start_mark)
            nodes = itertools.chain(*node.value)
        known[id(node)] = 1 + sum(_size(part, known) for part in nodes)
    return known[id(node)]
