"""Artifact folders: what a stage writes, with a manifest that says how it was made.

Every folder holds a `manifest.json` with the resolved configuration, the fingerprints of the input
artifacts, versions, seed, device, seconds and examples per second. A folder without a manifest is
unfinished.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from anyorder.files import (
    MANIFEST,
    TIMES,
    _jsonable,
    fingerprint,
    read_json,
    read_manifest,
    sha256,
    versions,
    write_json,
)


def _identity(stage: str, config: Mapping[str, Any], inputs: Mapping[str, str | Path]) -> dict[str, Any]:
    return {
        "stage": stage,
        "config": json.loads(json.dumps(config, default=_jsonable)),
        "inputs": {role: fingerprint(path) for role, path in inputs.items()},
    }


def _matches(
    then: Mapping[str, Any],
    now: Mapping[str, Any],
    completed: Callable[[dict[str, Any]], dict[str, Any]],
) -> bool:
    """Whether what was recorded is what is asked for now."""
    before, after = _comparable(then, completed), _comparable(now, completed)
    return all(before[key] == value for key, value in after.items())


def _comparable(
    identity: Mapping[str, Any], completed: Callable[[dict[str, Any]], dict[str, Any]]
) -> dict[str, Any]:
    config = json.loads(json.dumps(completed(identity["config"]), default=_jsonable))
    return {**identity, "config": config}


def _is_extended(
    then: Mapping[str, Any],
    now: Mapping[str, Any],
    completed: Callable[[dict[str, Any]], dict[str, Any]],
    grows: Sequence[str],
) -> bool:
    """Whether settings that may grow are larger now than recorded, and all else is equal.

    Raises:
        ValueError: they are smaller.
    """
    before, after = _comparable(then, completed), _comparable(now, completed)
    old, new = ([pop_setting(identity["config"], key) for key in grows] for identity in (before, after))
    if None in (*old, *new) or old == new or any(before[key] != value for key, value in after.items()):
        return False
    for key, was, wanted in zip(grows, old, new, strict=True):
        if wanted < was:
            raise ValueError(
                f"{key}={wanted}, but {was} are done already: choose {key}>={was} or another out="
            )
    return True


def pop_setting(config: dict[str, Any], key: str) -> Any:
    """Take a setting out of a nested configuration; None if there is none."""
    *groups, last = key.split(".")
    for group in groups:
        config = config.get(group) or {}
    return config.pop(last, None)


def recorded_input(folder: str | Path, role: str) -> Path | None:
    """The folder of an input of a finished artifact; None if the artifact has no such input.

    Raises:
        FileNotFoundError: `folder` is not a finished artifact, or what it was made from is no longer there.
        ValueError: the artifact is of a version that recorded no folders.
    """
    manifest = read_manifest(folder)
    if role not in manifest["inputs"]:
        return None
    if role not in manifest.get("input_folders", {}):
        raise ValueError(f"{folder} does not record the folder of its {role}: give {role}=FOLDER")
    path = Path(os.path.normpath(Path(folder) / manifest["input_folders"][role]))
    if not (path / MANIFEST).is_file():
        raise FileNotFoundError(f"the {role} of {folder} is no longer at {path}: give {role}=FOLDER")
    return path


class Artifact:
    """The folder of one stage: is it up to date, may it be resumed, and its manifest when done.

    Attributes:
        folder: where the stage writes.
        current: True if the folder is finished with this very configuration and these inputs.
    """

    def __init__(
        self,
        folder: str | Path,
        stage: str,
        config: Mapping[str, Any],
        inputs: Mapping[str, str | Path],
        completed: Callable[[dict[str, Any]], dict[str, Any]] = lambda then: then,
        grows: Sequence[str] = (),
    ):
        """Open `folder` for `stage`; work begun under another configuration is discarded.

        Args:
            folder: the artifact's folder, made if need be.
            stage: name of the stage, for the manifest.
            config: resolved configuration, JSON-able; decides with `inputs` whether the folder is current.
            inputs: folders of the input artifacts by role.
            completed: fills a recorded configuration up with the settings that did not exist then, and
                leaves out those that do not matter.
            grows: dotted settings whose larger values extend what the folder holds, finished or not.

        Raises:
            FileNotFoundError: an input is not a finished artifact.
            ValueError: the folder holds another stage's artifact, or more than is asked for now.
        """
        self.folder = Path(folder)
        self.identity = _identity(stage, config, inputs)
        self.input_folders = {role: os.path.relpath(path, folder) for role, path in inputs.items()}
        self._begin = time.perf_counter()
        done, begun = self.folder / MANIFEST, self.folder / ".identity.json"
        for path in (done, begun):
            if path.is_file() and (other := read_json(path)["stage"]) != stage:
                raise ValueError(
                    f"{folder} holds the artifact of stage '{other}', not '{stage}': choose another out="
                )
        self.current = self.is_current(folder, stage, config, inputs, completed)
        if not self.current:
            resumed = begun.is_file() and _matches(read_json(begun), self.identity, completed)
            for path in (begun, done):
                then = read_json(path) if path.is_file() and not resumed else None
                if then is not None and _is_extended(then, self.identity, completed, grows):
                    resumed = True
                    done.unlink(missing_ok=True)
            if not resumed and (begun.is_file() or done.is_file()):  # never touch a folder of somebody else
                self._discard()
            write_json(begun, self.identity)

    @staticmethod
    def is_current(
        folder: str | Path,
        stage: str,
        config: Mapping[str, Any],
        inputs: Mapping[str, str | Path],
        completed: Callable[[dict[str, Any]], dict[str, Any]] = lambda then: then,
    ) -> bool:
        """Whether `folder` is finished with this very configuration and these inputs; writes nothing."""
        done = Path(folder) / MANIFEST
        if not done.is_file():
            return False
        return _matches(read_json(done), _identity(stage, config, inputs), completed)

    def _discard(self) -> None:
        """Remove what an earlier configuration left; only files that stages write are touched."""
        for pattern in (MANIFEST, ".identity.json", "*.partial", "*.npy", "metrics.jsonl"):
            for path in sorted(self.folder.rglob(pattern)):
                path.unlink()
        for path in sorted(self.folder.rglob("checkpoints/**/*"), reverse=True):
            path.rmdir() if path.is_dir() else path.unlink()

    def finish(self, examples: int | None = None, seconds: float | None = None, **facts: Any) -> None:
        """Write the manifest: from now on the artifact is finished.

        Args:
            examples: how many images or sequences were worked through, for examples per second.
            seconds: time of the work, where it is not the time since this object was made (resumed runs).
            **facts: whatever else a reader should know (metrics, counts, classes, device, seed).
        """
        seconds = time.perf_counter() - self._begin if seconds is None else seconds
        files = {
            str(path.relative_to(self.folder)): sha256(path)
            for path in sorted(self.folder.rglob("*"))
            if path.is_file()
            and path.suffix in {".npy", ".safetensors", ".json"}
            and path.name not in {MANIFEST, ".identity.json"}
            and not path.name.endswith(TIMES)  # content, not how long it took
            and "checkpoints" not in path.parts
        }
        manifest = {
            **self.identity,
            "input_folders": self.input_folders,
            "fingerprint": hashlib.sha256(json.dumps(files, sort_keys=True).encode()).hexdigest()[:16],
            "files": files,
            "versions": versions(),
            "finished": datetime.now(UTC).isoformat(timespec="milliseconds"),
            "seconds": round(seconds, 3),
            "examples_per_second": round(examples / seconds, 3) if examples and seconds > 0 else None,
            **facts,
        }
        write_json(self.folder / MANIFEST, manifest)
        (self.folder / ".identity.json").unlink(missing_ok=True)
