"""Running one stage: skipped if its artifact is up to date, resumed if it was killed."""

import contextlib
import dataclasses
import itertools
import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from anyorder.contracts import require
from anyorder.files import read_manifest
from anyorder.inference import processes
from anyorder.inference.device import device, memory_for
from anyorder.settings import defaults, flatten, read_stored
from anyorder.stages.artifacts import Artifact, Completion, recorded_input

log = logging.getLogger("anyorder")
_MODELS, _TOKENIZERS = ("train", "iterate", "convert", "pipeline"), ("tokenizer", "convert", "pipeline")
MADE_BY = {
    "data": ("data",), "tokenizer": _TOKENIZERS, "tokens": ("tokens",), "model": _MODELS, "scorer": _MODELS,
    "features": ("features",), "attribute_features": ("features",), "orders": ("orders",),
    "samples": ("sample",), "a": ("eval",), "b": ("eval",), "other": ("tokens",),
    "settings": ("tune",),
}  # fmt: skip
"""Role of an input -> stages that make such a thing."""
INITIAL = {"train": _MODELS, "tokenizer": _TOKENIZERS, "features": ("features",)}
"""Stage -> stages that make what it can start from, `init`."""


def execute(name: str, stage: Any, out: Path, *, overwrite: bool = False) -> bool:
    """Run one stage unless its artifact is up to date.

    A stage may say which settings (dotted names) do not change what it writes, `aside`, and which continue
    the work that is there when they become larger, `grows`. Of several processes the leader runs it alone
    unless it works `together`; then `run` returns what the manifest holds in the leader.

    Args:
        name: what its manifest calls the stage.
        stage: its configuration.
        out: folder of the artifact.
        overwrite: replace what was made there under other settings.

    Returns:
        Whether anything was done.

    Raises:
        ValueError, FileNotFoundError: bad configuration or inputs; `out` is as it was before.
        OSError: the disk is full; what was finished is kept.
    """
    begun = processes.leader_does(lambda: _begin(name, stage, out, overwrite))
    with begun[1] if begun else contextlib.nullcontext() as artifact:
        stage = processes.told(begun[0] if begun else stage)
        names = ("folder", "identity", "current")  # what processes without the artifact know of it
        facts = {key: getattr(artifact, key, None) for key in names}
        seen = processes.told(SimpleNamespace(**facts, leads=False))
        if seen.current:
            log.info("%s is up to date", out)
            return False
        log.info("%s -> %s", name, out)
        where = str(device())  # refused before the work if there is none
        if artifact or getattr(stage, "together", False):
            with memory_for(getattr(stage, "batch_size", None)):
                found = stage.run(artifact or seen)
        if artifact:
            artifact.finish(**{"device": where, **found})
        processes.barrier()
    return True


def _begin(name: str, stage: Any, out: Path, overwrite: bool) -> tuple[Any, Artifact]:
    """The stage with all its inputs, and its folder; the leader alone reads and locks."""
    stage = resolved(stage)
    made_from = split(stage)
    for role, folder in made_from[1].items():
        _require_stage(name, role, folder)
    if hasattr(stage, "explain"):
        stage.explain(out)
    return stage, Artifact(out, name, *made_from, grows=getattr(stage, "grows", ()), overwrite=overwrite)


def _require_stage(name: str, role: str, folder: Path) -> None:
    """A ValueError if an input of stage `name` was made by a stage that does not make such a thing."""
    wanted, made_by = INITIAL if role == "init" else MADE_BY, read_manifest(folder)["stage"]
    allowed = wanted.get(name if role == "init" else role, ())
    foreign = made_by not in itertools.chain(*MADE_BY.values())  # somebody's own stage
    mend = f"give a folder that {' or '.join(f'anyorder {stage}' for stage in allowed)} made"
    fits = not allowed or foreign or made_by in allowed
    require(fits, f"{role}={folder} was made by anyorder {made_by}: {mend}")


def split(stage: Any) -> tuple[dict[str, Any], dict[str, Path], Completion]:
    """Settings of a stage, the artifacts it reads by role, and how to complete older settings.

    The folders of artifacts are no settings: moving them leaves what was made of them up to date. Settings
    that a stage puts `aside` are recorded, but not compared. What a stage has `observed` of files that are no
    artifacts counts as settings; an older artifact does not record it, and what cannot be observed any more
    (of all that the stage `observes`) is not compared. A stage may have some `spelled` alike for that.
    """
    settings = dataclasses.asdict(stage)
    given = {role: settings.pop(role) for role in stage.inputs}
    inputs = {role: path for role, path in given.items() if path is not None}
    observed = stage.observed() if hasattr(stage, "observed") else {}
    unknown = {*getattr(stage, "observes", ())} - observed.keys()

    def compared(then: dict[str, Any]) -> dict[str, Any]:
        left_out = {*stage.inputs, *getattr(stage, "aside", ()), *unknown}
        flat = flatten(observed | completed(then, stage))
        found = {key: value for key, value in flat.items() if key not in left_out}
        return stage.spelled(found) if hasattr(stage, "spelled") else found

    return settings | observed, inputs, compared


def resolved(stage: Any) -> Any:
    """The stage with the inputs that were not given: those that the manifests of its other inputs record.

    A stage's `provenance` maps a role to (the input whose manifest records it, its role there).

    Raises:
        FileNotFoundError: an input is not a finished artifact, or what it was made from is no longer there.
        ValueError: an input that the stage needs is neither given nor recorded.
    """
    for role, (source, recorded) in getattr(stage, "provenance", {}).items():
        folder = getattr(stage, source)
        if getattr(stage, role) is None and folder is not None:
            stage = dataclasses.replace(stage, **{role: recorded_input(folder, recorded)})
    missing = [role for role in getattr(stage, "required", ()) if getattr(stage, role) is None]
    if missing:
        raise ValueError(f"no artifact records which {missing[0]} to take: give {missing[0]}=FOLDER")
    return stage


def completed(then: dict[str, Any], like: Any) -> dict[str, Any]:
    """A recorded configuration with the defaults of settings that did not exist when it was recorded.

    A new setting's default is what was done before it existed, so that it makes no artifact stale. `like` is
    a configuration of now, for its fields.
    """
    found = defaults(type(like)) | read_stored(type(like), then)
    for name, value in found.items():
        group = getattr(like, name, None)
        if isinstance(value, dict) and dataclasses.is_dataclass(group):
            found[name] = completed(value, group)
    return found
