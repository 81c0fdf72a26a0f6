"""Artifact folders: what a stage writes, with a manifest that says how it was made.

`manifest.json` holds the resolved configuration, fingerprints and folders of the inputs, hashes of the files,
versions, seconds and further facts. A folder without it is unfinished: `.identity.json` says what is being
made there, and by whom. An artifact that is replaced waits in `.replaced` until the new one is finished.
"""

import contextlib
import fcntl
import logging
import os
import re
import shutil
import socket
import time
import weakref
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from anyorder import files
from anyorder.settings import flatten

log = logging.getLogger("anyorder")
IDENTITY, REPLACED = ".identity.json", ".replaced"
FOLDERS = re.compile(r"checkpoints|samples|online|model|tokenizer|scorer|round-\d+|point-\d+")
"""Names of the folders that stages make inside an artifact; all others are the user's and never touched."""
CONTENT = (".npy", ".safetensors", ".json")
"""Files of these kinds get a hash, except checkpoints and times."""
FURTHER = re.compile(
    r"(\d{4,}|grid|orders|prompts|reconstructions|mean_rank|search)\.png|(generation|drawing)\.webp|source\.gz"
    r"|batch_size\.txt|wandb\.id|events\..*|.*\.(partial|jsonl)"
)
"""Other files that stages write; all others are the user's and never touched."""
Completion = Callable[[dict[str, Any]], dict[str, Any]]
Inputs = Mapping[str, str | Path]
_open_artifacts: weakref.WeakSet["Artifact"] = weakref.WeakSet()


class Artifact(contextlib.AbstractContextManager["Artifact"]):
    """The folder of one stage, locked until it is finished or closed, or the process ends.

    Attributes:
        folder: where the stage writes.
        current: whether the folder is finished with this very configuration and these inputs.
        leads: whether this is the process that writes; of several, only the first has an `Artifact`.
    """

    leads = True

    def __init__(
        self,
        folder: str | Path,
        stage: str,
        config: Mapping[str, Any],
        inputs: Inputs,
        completed: Completion = lambda then: then,
        *,
        grows: Collection[str] = (),
        overwrite: bool = False,
    ):
        """Open `folder` for `stage`, unless it is up to date. What is refused leaves it as it was.

        Args:
            folder: the artifact's folder, made if need be.
            stage: name of the stage, for the manifest.
            config: resolved configuration, JSON-able.
            inputs: folders of the input artifacts by role.
            completed: adds settings to a recorded configuration that are newer, drops those not compared.
            grows: dotted settings of which a larger value continues the work that is there.
            overwrite: replace what was made under another configuration.

        Raises:
            FileNotFoundError: an input is not a finished artifact.
            ValueError: `folder` is or holds an input, is being written, or holds something else.
        """
        self.folder, self._descriptor, self._opened, self.found = Path(folder), -1, False, set[str]()
        self._inputs, self._grows = dict(inputs), grows
        self._asked = stage, config, self._inputs, completed
        self.identity, self._begin = _identity(stage, config, inputs), time.perf_counter()
        _open_artifacts.add(self)
        for role, path in inputs.items():
            if self.folder.resolve() in (Path(path).resolve(), *Path(path).resolve().parents):
                raise ValueError(f"out={folder} is or holds the input {role}={path}: choose another out=")
        for path in (self.folder, *self.folder.parents):
            if path.exists() and not path.is_dir():
                raise ValueError(f"out={folder}: {path} is a file, not a folder: choose another out=")
        self.current = self.is_current(folder, *self._asked)
        if self.current and not (self.folder / IDENTITY).exists():
            return
        self._made = [path for path in (self.folder, *self.folder.parents) if not path.exists()]
        self.folder.mkdir(parents=True, exist_ok=True)
        self._lock()
        try:
            self._recover()
            self.current = self.is_current(folder, *self._asked)
            if not self.current:
                self._open(overwrite)
        except BaseException:
            self.close()
            raise

    @staticmethod
    def is_current(
        folder: str | Path,
        stage: str,
        config: Mapping[str, Any],
        inputs: Inputs,
        completed: Completion = lambda then: then,
    ) -> bool:
        """Whether `folder` is finished with this very configuration and these inputs; writes nothing."""
        then = _record(Path(folder) / files.MANIFEST)
        if then is None or missing(folder, then):
            return False
        return not _differences(then, stage, config, inputs, completed)

    def finish(self, examples: int | None = None, seconds: float | None = None, **facts: Any) -> None:
        """Write the manifest: from now on the artifact is finished.

        Args:
            examples: number of images or sequences, for examples per second.
            seconds: time of the work, if not that since this object was made (resumed runs).
            **facts: whatever else a reader should know (metrics, counts, classes, device, seed).
        """
        seconds = time.perf_counter() - self._begin if seconds is None else seconds
        names = self._written()
        hashes = {name: files.sha256(self.folder / name) for name in names if _is_content(name)}
        here = self.folder.resolve()
        manifest = {
            **self.identity,
            "input_folders": {role: os.path.relpath(path, here) for role, path in self._inputs.items()},
            "fingerprint": files.name_of(hashes),
            "files": hashes,
            "other_files": [name for name in names if name not in hashes],
            "versions": files.versions(),
            "finished": datetime.now(UTC).isoformat(timespec="milliseconds"),
            "seconds": round(seconds, 3),
            "examples_per_second": round(examples / seconds, 3) if examples and seconds > 0 else None,
            **facts,
        }
        files.write_json(self.folder / files.MANIFEST, manifest)
        self._recover()
        self.close()

    def close(self) -> None:
        """Let go of the folder; where nothing was written, it is as it was before."""
        unfinished = self._opened and not (self.folder / files.MANIFEST).is_file()
        if unfinished and (not self._written() or self._untouched()):
            (self.folder / IDENTITY).unlink(missing_ok=True)
            self._recover()
            with contextlib.suppress(OSError):  # holds something else
                for path in self._made:
                    path.rmdir()
        elif unfinished:
            with contextlib.suppress(OSError):  # the disk may be full
                self._write_identity(self.found, written=self._written())
        self._opened = False
        self._unlock()

    def __exit__(self, *exception: object) -> None:
        self.close()

    def __del__(self) -> None:
        self._unlock()

    def _lock(self) -> None:
        """Keep other runs out. The folder itself is locked, so a crash leaves no lock behind."""
        self._descriptor, who = os.open(self.folder, os.O_RDONLY), None
        for _ in range(100):
            try:
                return fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                who = (_record(self.folder / IDENTITY) or {}).get("writer")
            except OSError:
                return  # a file system without locks
            if who:
                break
            time.sleep(0.05)  # it says who it is right after it has locked
        self._unlock()
        who = who or "another process"
        raise ValueError(f"{self.folder} is being written by {who}: wait for it, or choose another out=")

    def _unlock(self) -> None:
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def _open(self, overwrite: bool) -> None:
        """Begin, resume or replace: the only place where what is there is moved or deleted."""
        done = _record(self.folder / files.MANIFEST)
        then = done or _record(self.folder / IDENTITY)
        if then is None:
            self.refuse(self._written())
            return self._write_identity(_walk(self.folder))
        goes_on = self._goes_on(then, overwrite, done is not None)
        if done:
            listed = _listed(done)
            self.found = set(_walk(self.folder)) - listed
            why = "".join(f"{name} is missing; " for name in missing(self.folder, done)[:3])
            log.info("%s: %swhat is there is kept until the new artifact is finished", self.folder, why)
            for name in [*([] if goes_on else sorted(listed)), files.MANIFEST]:
                _move(self.folder, self.folder / REPLACED, name)  # the manifest last: valid until then
        elif not goes_on and (work := self._written()):
            self.refuse({*work} - {*then.get("written", work)})  # put there since
            log.warning("%s: %d files of unfinished work are discarded", self.folder, len(work))
            for name in work:
                (self.folder / name).unlink()
                _leave_no_empty_folders(self.folder, name)
        if not (done or goes_on) and self.is_current(self.folder / REPLACED, *self._asked):
            log.info("%s: what was set aside was made just so, and is put back", self.folder)
            (self.folder / IDENTITY).unlink()
            self._recover()
            self.current = True
            return
        self._write_identity(self.found)

    def refuse(self, foreign: Iterable[str]) -> None:
        """Let go of the folder by a ValueError if it holds files of the user's that the stage might take."""
        if names := sorted(foreign)[:3]:
            self.close()
            text = f"{self.folder} holds files that no manifest vouches for ({', '.join(names)}): "
            raise ValueError(f"{text}move them away, or choose another out=")

    def _untouched(self) -> bool:
        """Whether nothing was written since what was set aside, to grow, was finished."""
        aside = self.folder / REPLACED / files.MANIFEST
        times = [(self.folder / name).lstat().st_mtime_ns for name in self._written()]
        return bool(times) and aside.is_file() and max(times) <= aside.stat().st_mtime_ns

    def _goes_on(self, then: Mapping[str, Any], overwrite: bool, done: bool) -> bool:
        """Whether the work that is there can be continued; a ValueError if it may not be replaced either."""
        if then["stage"] != self.identity["stage"]:
            raise ValueError(
                f"{self.folder} holds the artifact of stage '{then['stage']}', not "
                f"'{self.identity['stage']}': choose another out="
            )
        differences = _differences(then, *self._asked)
        growing = {*differences} <= {*self._grows}
        numbers = all(isinstance(x, int | float) for pair in differences.values() for x in pair)
        more = growing and numbers and all(was < now for was, now in differences.values())
        states = [self.folder / n for n in then.get("other_files", ()) if n.startswith("checkpoints/")]
        here = any(map(Path.is_file, states))
        if not differences:  # unfinished, or a file is missing since
            return here or not done
        if more and (here or not states):
            return True
        if growing and not overwrite:
            key, (was, now) = next(iter(differences.items()))
            gone = "no checkpoint is left to go on from, add overwrite=true to begin anew"
            mend = gone if more else f"choose {key}>={was}"
            raise ValueError(f"{key}={now}, but {was} are done already: {mend} or another out=")
        if not overwrite and (done or self._written()):
            changes = ", ".join(f"{key} {a} -> {b}" for key, (a, b) in list(differences.items())[:3])
            raise ValueError(
                f"{self.folder} {'was' if done else 'is being'} made with other settings or inputs "
                f"({changes}): add overwrite=true to replace it, or choose another out="
            )
        return False

    def _write_identity(self, found: Iterable[str], **further: Any) -> None:
        self.found = set(found)
        since = datetime.now().astimezone().isoformat(" ", timespec="seconds")
        writer = f"process {os.getpid()} on {socket.gethostname()} since {since}"
        facts = {**self.identity, "found": sorted(self.found), "writer": writer, **further}
        files.write_json(self.folder / IDENTITY, facts)
        self._opened = True
        for name in [*_walk(self.folder), *(entry.name for entry in os.scandir(self.folder))]:
            if files.TEMPORARY.fullmatch(Path(name).name):  # half-written, left by a killed process
                (self.folder / name).unlink(missing_ok=True)

    def _written(self) -> list[str]:
        """The stage's files: without what was there before and what is the user's."""
        return sorted(name for name in {*_walk(self.folder)} - self.found if _is_work(name))

    def _recover(self) -> None:
        """Complete what a kill interrupted: the end of `finish`, or putting back what was set aside.

        That is also what was to be extended, if nothing was written since.
        """
        replaced, begun = self.folder / REPLACED, _record(self.folder / IDENTITY)
        if begun and not (self.folder / files.MANIFEST).is_file():
            self.found = set(begun.get("found", ()))
            if self._untouched():
                (self.folder / IDENTITY).unlink()
        if not (self.folder / IDENTITY).is_file():
            paths = [path for path in replaced.rglob("*") if path.is_symlink() or not path.is_dir()]
            for path in sorted(paths, key=lambda path: path == replaced / files.MANIFEST):
                _move(replaced, self.folder, str(path.relative_to(replaced)))
        elif not (self.folder / files.MANIFEST).is_file():
            return  # work in progress
        shutil.rmtree(replaced, ignore_errors=True)
        (self.folder / IDENTITY).unlink(missing_ok=True)


def _unlock_all() -> None:
    """In a fork: a worker that outlives its killed parent by seconds must not keep folders locked."""
    for artifact in _open_artifacts:
        artifact._unlock()


os.register_at_fork(after_in_child=_unlock_all)


def recorded_input(folder: str | Path, role: str) -> Path | None:
    """The folder of an input of a finished artifact; None if the artifact has no such input.

    Raises:
        FileNotFoundError: `folder` is not a finished artifact, or its input is no longer there.
        ValueError: the artifact is of a version that recorded no folders.
    """
    manifest = files.read_manifest(folder)
    if role not in manifest["inputs"]:
        return None
    if role not in manifest.get("input_folders", {}):
        raise ValueError(f"{folder} does not record the folder of its {role}: give {role}=FOLDER")
    path = input_folders(folder, manifest)[role]
    if not (path / files.MANIFEST).is_file():
        raise FileNotFoundError(f"the {role} of {folder} is no longer at {path}: give {role}=FOLDER")
    return path


def verify(folder: str | Path, seen: set[Path] | None = None) -> list[str]:
    """Compare an artifact's files, and those of its inputs, with their hashes; one line for each problem.

    Those `seen` are taken for verified, and grow by these: each is read once, whatever was made of it.

    Raises:
        FileNotFoundError: `folder` is not a finished artifact.
        ValueError: its manifest is damaged.
    """
    manifest, seen = files.read_manifest(folder), set() if seen is None else seen
    problems: list[str] = []
    if Path(folder).resolve() in seen:
        return problems
    seen.add(Path(folder).resolve())
    for path, digest in ((Path(folder) / name, digest) for name, digest in manifest["files"].items()):
        if not path.is_file():
            problems.append(f"{path} is missing")
        elif files.sha256(path) != digest:
            problems.append(f"{path} was changed")
    for role, source in input_folders(folder, manifest).items():
        if not (source / files.MANIFEST).is_file():
            problems.append(f"{source} ({role} of {folder}) is missing")
        elif not files.made_from(manifest, role, source):
            problems.append(f"{source} ({role} of {folder}) is not what it was made from")
        else:
            problems += verify(source, seen)
    return problems


def missing(folder: str | Path, manifest: Mapping[str, Any]) -> list[str]:
    """Those of the files with a hash, or of all files where none has one, that are no longer there."""
    names = manifest.get("files") or manifest.get("other_files", ())
    return [name for name in names if not (Path(folder) / name).exists()]


def require_no_artifact(path: Path) -> None:
    """A ValueError if a finished artifact has this file: nothing else may write it."""
    listed: Any = ()
    with contextlib.suppress(FileNotFoundError, ValueError):  # ValueError: the manifest of a web page, say
        listed = _listed(files.read_manifest(path.parent))
    if path.name in {*listed, *([files.MANIFEST] if listed else [])}:
        raise ValueError(f"{path} is a file of a finished artifact: choose another out=")


def input_folders(folder: str | Path, manifest: Mapping[str, Any]) -> dict[str, Path]:
    """Where the inputs of a finished artifact were when it was made, by role."""
    recorded = manifest.get("input_folders", {})
    return {role: Path(os.path.normpath(Path(folder) / path)) for role, path in recorded.items()}


def _identity(stage: str, config: Mapping[str, Any], inputs: Inputs) -> dict[str, Any]:
    names = {role: files.fingerprints(path, role, stage)[0] for role, path in inputs.items()}
    return {"stage": stage, "config": files.plain(config), "inputs": names}


def _record(path: Path) -> dict[str, Any] | None:
    return files.read_record(path) if path.is_file() else None


def _differences(
    then: Mapping[str, Any], stage: str, config: Mapping[str, Any], inputs: Inputs, completed: Completion
) -> dict[str, tuple[Any, Any]]:
    """Names of what differs (dotted) with the values of then and now."""
    now = _identity(stage, config, inputs)
    now["inputs"] |= {r: then["inputs"][r] for r, path in inputs.items() if files.made_from(then, r, path)}
    a, b = _compared(then, completed), _compared(now, completed)
    names = [name for name in {**b, **a} if a.get(name) != b.get(name)]
    return {name.removeprefix("config."): (a.get(name), b.get(name)) for name in names}


def _compared(record: Mapping[str, Any], completed: Completion) -> dict[str, Any]:
    part = {key: record[key] for key in ("stage", "config", "inputs")}
    with contextlib.suppress(ValueError):  # a setting that no longer exists: it differs
        part["config"] = files.plain(completed(dict(part["config"])))
    return flatten(part)


def _walk(folder: Path, below: str = "") -> Iterator[str]:
    """Names of files that a stage may have written: no other folders or artifacts, nothing behind links."""
    for entry in sorted(os.scandir(folder / below), key=lambda entry: entry.name):
        name = below + entry.name
        if not entry.is_dir():
            if below or (name != files.MANIFEST and not name.startswith(".")):
                yield name
        elif below or FOLDERS.fullmatch(name):
            if entry.is_symlink():
                yield name
            elif name.startswith(("round-", "point-")) or not any(
                (folder / name / own).is_file() for own in (files.MANIFEST, IDENTITY)
            ):
                yield from _walk(folder, f"{name}/")


def _is_work(name: str) -> bool:
    """Whether a stage might take a file for its work."""
    return name.endswith(CONTENT) or bool(FOLDERS.match(name) or FURTHER.fullmatch(name))


def _is_content(name: str) -> bool:
    path = Path(name)
    other = path.name in (files.MANIFEST, IDENTITY) or name.endswith(files.TIMES)
    return path.suffix in CONTENT and not other and "checkpoints" not in path.parts


def _listed(manifest: Mapping[str, Any]) -> set[str]:
    """The files that a manifest lists."""
    return {*manifest["files"], *manifest.get("other_files", ())}


def _move(source: Path, target: Path, name: str) -> None:
    """Move a file that is below `source` itself, not behind a link or outside."""
    path = source / name
    if os.path.lexists(path) and path.parent.resolve() == source.resolve() / Path(name).parent:
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        os.replace(path, target / name)
        _leave_no_empty_folders(source, name)


def _leave_no_empty_folders(folder: Path, name: str) -> None:
    """Remove the folders between `folder` and a file that is gone: an empty one passes for a checkpoint."""
    with contextlib.suppress(OSError):  # not empty
        for parent in list(Path(name).parents)[:-1]:
            (folder / parent).rmdir()
