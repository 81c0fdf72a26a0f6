"""Running one stage: skipped if its artifact is up to date, resumed if it was killed."""

from __future__ import annotations

import dataclasses
import logging
from pathlib import Path
from typing import Any

from anyorder.artifacts import Artifact

log = logging.getLogger("anyorder")


def execute(name: str, stage: Any, out: Path) -> bool:
    """Run one stage unless its artifact is up to date.

    Args:
        name: what its manifest calls the stage.
        stage: its configuration.
        out: folder of the artifact.

    Returns:
        Whether anything was done.

    Raises:
        ValueError, FileNotFoundError: bad configuration or inputs.
        OSError: the disk is full; what was finished is kept.
    """
    settings, inputs, defaults = split(stage)
    artifact = Artifact(out, name, settings, inputs, defaults)
    if artifact.current:
        log.info("%s is up to date", out)
        return False
    log.info("%s -> %s", name, out)
    facts = stage.run(artifact)
    artifact.finish(facts.pop("examples", None), facts.pop("seconds", None), **facts)
    return True


def split(stage: Any) -> tuple[dict[str, Any], dict[str, Path], dict[str, Any]]:
    """What a stage is told, the artifacts it reads by role, and the defaults of what it may be told.

    The artifacts' folders are no settings: moving them leaves what was made of them up to date.
    """
    settings = dataclasses.asdict(stage)
    given = {role: settings.pop(role) for role in stage.inputs}
    defaults = {name: value for name, value in _defaults(stage).items() if name in settings}
    return settings, {role: path for role, path in given.items() if path is not None}, defaults


def _defaults(stage: Any) -> dict[str, Any]:
    """Default values of the fields of a dataclass and of the dataclasses nested in it."""
    found: dict[str, Any] = {}
    for field in dataclasses.fields(stage):
        value = getattr(stage, field.name)
        if dataclasses.is_dataclass(value):
            found[field.name] = _defaults(value)
        elif field.default is not dataclasses.MISSING:
            found[field.name] = field.default
    return found
