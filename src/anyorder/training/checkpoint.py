"""Training states on disk: safetensors + JSON, hashed, never half a file."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from anyorder.files import read_json, sha256, write_json
from anyorder.inference.weights import log, read_tensors, write_tensors

STATE, FACTS = "state.safetensors", "facts.json"


class Checkpoints:
    """The training states of one run: `checkpoints/step-00001000/{state.safetensors, facts.json}`.

    A state is written under a temporary name and renamed once it is whole, so a kill at any moment leaves
    the earlier ones intact. One process at a time may write into a folder.
    """

    def __init__(self, folder: str | Path, keep: int = 2):
        """Open the states of the run in `folder`, of which the `keep` newest are kept."""
        self.folder, self.keep = Path(folder) / "checkpoints", keep
        self._sweep()

    def save(self, step: int, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> None:
        """Write the state after `step`, then prune older ones and any later ones (found damaged, or undone).

        `facts`, JSON-able, are what else the run needs to resume. After an OSError earlier states are intact.
        """
        self._sweep()
        final = self.folder / f"step-{step:08d}"
        temporary = self.folder / f".{final.name}.tmp"
        state = temporary / STATE
        try:
            write_tensors(state, tensors)
            check = {"bytes": state.stat().st_size, "sha256": sha256(state)}
            write_json(temporary / FACTS, {"step": step, **check, "facts": dict(facts)})
            _sync(temporary)
            if final.exists():
                shutil.rmtree(final)
            os.rename(temporary, final)
            _sync(self.folder)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
        self.prune(step)

    def load_latest(self) -> tuple[int, dict[str, Tensor], dict[str, Any]] | None:
        """The newest intact state as (step, tensors, facts), or None if there never was one.

        A damaged state is named in a warning of the logger `anyorder`, and the one before it is taken.

        Raises:
            ValueError: there are states, but all of them are damaged.
        """
        damaged = []
        for folder in reversed(self._folders()):
            try:
                return _load(folder)
            except (OSError, ValueError, KeyError) as e:
                damaged.append(f"{folder} ({e})")
                log.warning("checkpoint %s is damaged: %s; trying the one before it", folder, e)
        if damaged:
            listed = "; ".join(damaged)
            raise ValueError(f"no intact checkpoint: {listed}; delete {self.folder} to start anew")
        return None

    def _folders(self) -> list[Path]:
        return sorted(self.folder.glob("step-*"))

    def prune(self, step: int) -> None:
        """Keep the state after `step` and those before it, `keep` in all."""
        folders = self._folders()
        end = folders.index(self.folder / f"step-{step:08d}") + 1
        for folder in set(folders) - set(folders[max(0, end - self.keep) : end]):
            shutil.rmtree(folder)

    def _sweep(self) -> None:
        """Remove what a killed process left unfinished."""
        for folder in self.folder.glob(".step-*.tmp"):
            shutil.rmtree(folder)


def _load(folder: Path) -> tuple[int, dict[str, Tensor], dict[str, Any]]:
    state, stored = folder / STATE, read_json(folder / FACTS)
    if (size := state.stat().st_size) != stored["bytes"]:
        raise ValueError(f"{STATE} has {size} bytes instead of {stored['bytes']}")
    if sha256(state) != stored["sha256"]:
        raise ValueError(f"{STATE} was altered, its SHA-256 is not the one in {FACTS}")
    return stored["step"], read_tensors(state), stored["facts"]


def _sync(folder: Path) -> None:
    """Bring the names in a folder to disk (POSIX); a rename alone may be lost with the power."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
