"""What is left of a run: its finished artifacts, and copies of their manifests and logs for the records."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from anyorder.files import MANIFEST, read_manifest, write_json, write_text

LOG = "metrics.jsonl"

Found = list[tuple[Path, dict[str, Any]]]
"""Folders of artifacts with their manifests."""


def find_artifacts(folders: Sequence[Path]) -> Found:
    """Folder and manifest of every finished artifact in the folders, oldest first.

    Raises:
        FileNotFoundError: a folder that holds none.
    """
    found: dict[Path, dict[str, Any]] = {}
    for folder in folders:
        inside = [path.parent for path in sorted(Path(folder).rglob(MANIFEST))]
        if not inside:
            raise FileNotFoundError(f"{folder} holds no finished artifact: run its experiment first")
        manifests = {path: read_manifest(path) for path in inside}
        found |= dict(sorted(manifests.items(), key=lambda item: _finished(*item)))
    return list(found.items())


def copy_records(folders: Sequence[Path], to: Path) -> list[Path]:
    """Copy manifests and training logs, neither pictures nor arrays: all that a Markdown report needs.

    Args:
        folders: run folders; several get a folder of their own each below `to`.
        to: where the copies go, as `to/ARTIFACT/manifest.json`.

    Returns:
        The folders written.

    Raises:
        FileNotFoundError: a run folder without artifacts.
    """
    written = []
    for folder in folders:
        below = to / folder.name if len(folders) > 1 else to
        for path, manifest in find_artifacts([folder]):
            copy = below / path.relative_to(folder)
            write_json(copy / MANIFEST, {**manifest, "finished": _finished(path, manifest)})
            if (path / LOG).is_file():
                write_text(copy / LOG, (path / LOG).read_text(encoding="utf-8"))
            written.append(copy)
    return written


def _finished(path: Path, manifest: dict[str, Any]) -> str:
    """When an artifact was finished, ISO 8601 in UTC; of manifests that do not say, the time of the file."""
    time = datetime.fromtimestamp((path / MANIFEST).stat().st_mtime, UTC)
    return manifest.get("finished", time.isoformat(timespec="milliseconds"))
