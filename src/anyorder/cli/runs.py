"""`anyorder ls` and `anyorder clean`: what run folders hold, and what of it can go."""

import contextlib
from collections import abc
from pathlib import Path
from typing import Any

from anyorder import files
from anyorder.contracts import require
from anyorder.report.tables import Table
from anyorder.stages import artifacts
from anyorder.stages.data import source_state


def folders(run: Path) -> list[Path]:
    """Folders of finished and unfinished artifacts below `run`; a ValueError if there are none."""
    found = {path.parent for name in (files.MANIFEST, artifacts.IDENTITY) for path in run.rglob(name)}
    found = {f for f in found if artifacts.REPLACED not in f.relative_to(run).parts}  # it may come back
    found = {f for f in found if (f / artifacts.IDENTITY).is_file() or _manifest(f) is not None}
    require(bool(found), f"{run} holds no artifacts: give the folder of a run, for example runs/quickstart")
    return sorted(found)


def overview(runs: abc.Sequence[Path]) -> str:
    """A line for each artifact: stage, size, and whether it is up to date with what it was made from."""
    rows = []
    for run in runs:
        for path in folders(run):
            kind = (_manifest(path) or {"stage": "?"})["stage"]
            size = sum(file.stat().st_size for file in _files(path))
            rows.append({"folder": str(path), "stage": kind, "MB": f"{size / 1e6:.1f}", "state": state(path)})
    return Table(list(rows[0]), rows).text()


def state(folder: Path) -> str:
    """Whether an artifact is finished and made from what is there now, or why not."""
    manifest = _manifest(folder)
    if manifest is None or (folder / artifacts.IDENTITY).is_file():
        return "unfinished: the same command goes on"
    if gone := artifacts.missing(folder, manifest):
        return f"{gone[0]} is missing: the same command makes it again"
    if manifest["stage"] == "data":
        return source_state(manifest["config"])
    return outdated(folder) or "up to date"


def outdated(folder: Path) -> str:
    """Which of an artifact's inputs is gone or was made again; empty if none is."""
    manifest = _manifest(folder) or {"inputs": {}}
    for role, source in artifacts.input_folders(folder, manifest).items():
        if not (source / files.MANIFEST).is_file():
            return f"its {role} is no longer at {source}"
        if not files.made_from(manifest, role, source):
            return f"out of date: its {role} {source} was made again"
    return ""


def report_at(path: Path) -> Path:
    """The path, for a report; a ValueError if another file lies there, an artifact's or somebody's."""
    artifacts.require_no_artifact(path)
    begin = {".html": b"<title>anyorder", ".csv": b"run,metric,split", ".tex": b"% anyorder"}[path.suffix]
    ours = not path.is_file() or begin in path.read_bytes()[:1000]
    require(ours, f"{path} is no report of anyorder, and is kept: move it away, or choose another out=")
    return path


def checkpoints(runs: abc.Sequence[Path]) -> list[Path]:
    """Files of checkpoints that finished trainings left, as their manifests list them."""
    found: dict[Path, Path] = {}  # by the resolved path, as runs may lie in one another
    for folder in (folder for run in runs for folder in folders(run)):
        finished = _manifest(folder) if not (folder / artifacts.IDENTITY).is_file() else None
        for name in (finished or {}).get("other_files", ()):
            path, resolved = folder / name, folder.resolve() / name
            inside = path.is_file() and path.resolve() == resolved  # no links, no ".."
            if inside and Path(name).parts[0] == "checkpoints":
                found[resolved] = path
    return [*found.values()]


def delete(paths: abc.Sequence[Path]) -> None:
    """Delete files, and folders of these that are empty then."""
    for file in paths:
        file.unlink()
    for folder in sorted({parent for file in paths for parent in list(file.parents)[:2]}, reverse=True):
        with contextlib.suppress(OSError):  # holds something else
            folder.rmdir()


def _manifest(folder: Path) -> dict[str, Any] | None:
    """None where there is none, or one of another program."""
    with contextlib.suppress(OSError, ValueError):
        return files.read_manifest(folder)
    return None


def _files(folder: Path) -> abc.Iterator[Path]:
    """Files of an artifact without those of artifacts inside it."""
    for path in folder.iterdir():
        if path.is_file():
            yield path
        elif path.is_dir() and not path.is_symlink() and not (path / files.MANIFEST).is_file():
            yield from _files(path)
