"""Training states on disk: safetensors + JSON, hashed, never half a file."""

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from anyorder import files
from anyorder.inference import processes, weights
from anyorder.training import distributed

STATE, FACTS = "state.safetensors", "facts.json"
State = tuple[int, dict[str, Tensor], dict[str, Any]]


class Checkpoints:
    """The training states of one run: `checkpoints/step-00001000/{state.safetensors, facts.json}`.

    A sharded state has one `shard-*.safetensors` for each process in place of `state.safetensors`, and can be
    read by any number of processes. A state is written under a temporary name and renamed once it is whole,
    so a kill at any moment leaves the earlier ones intact. One run at a time may write into a folder.
    """

    def __init__(self, folder: str | Path, keep: int = 2):
        """Open the states of the run in `folder`, of which the `keep` newest are kept."""
        self.folder, self.keep = Path(folder) / "checkpoints", keep
        self._sweep()

    def save(
        self, step: int, tensors: Mapping[str, Tensor], facts: Mapping[str, Any], sharded: bool = False
    ) -> None:
        """Write the state after `step`, then prune older ones and any later ones (found damaged, or undone).

        `facts`, JSON-able, are what else the run needs to resume. After an OSError earlier states are intact.
        Every process calls this; with `sharded` each writes what it holds, otherwise the leader writes all.
        """
        self._sweep()
        final = self.folder / f"step-{step:08d}"
        temporary = self.folder / f".{final.name}.tmp"
        try:
            if sharded:
                written = {"files": _write_shards(temporary, tensors)}
            elif processes.leads():
                weights.write_tensors(temporary / STATE, tensors)
                written = _check(temporary / STATE)
            if processes.leads():
                files.write_json(temporary / FACTS, {"step": step, **written, "facts": dict(facts)})
                files.sync(temporary)
                if final.exists():
                    shutil.rmtree(final)
                temporary.rename(final)
                files.sync(self.folder)
        finally:
            if processes.leads():
                shutil.rmtree(temporary, ignore_errors=True)
        self.prune(step)
        processes.barrier()

    def load_latest(self, layout: Mapping[str, Tensor] | None = None) -> State | None:
        """The newest intact state as (step, tensors, facts), or None if there never was one.

        Tensors that are sharded in `layout` are read so. A state that any process finds damaged is named in a
        warning of the logger `anyorder`, and all take the one before it.

        Raises:
            ValueError: there are states, but all of them are damaged.
        """
        damaged = []
        for folder in processes.told(self._folders()[::-1]):
            problems = [*filter(None, processes.gathered(_problem(folder)))]
            if not problems:
                return _load(folder, layout or {})
            damaged.append(f"{folder} ({problems[0]})")
            weights.log.warning("checkpoint %s is damaged: %s; trying the one before it", folder, problems[0])
        if damaged:
            listed = "; ".join(damaged)
            raise ValueError(f"no intact checkpoint: {listed}; delete {self.folder} to start anew")
        return None

    def _folders(self) -> list[Path]:
        # step-7-best is not ours.
        return sorted(folder for folder in self.folder.glob("step-*") if folder.name[5:].isdecimal())

    def prune(self, step: int) -> None:
        """Keep the state after `step` and those before it, `keep` in all."""
        if not processes.leads():
            return
        folders = self._folders()
        end = folders.index(self.folder / f"step-{step:08d}") + 1
        for folder in set(folders) - set(folders[max(0, end - self.keep) : end]):
            shutil.rmtree(folder)

    def _sweep(self) -> None:
        """Remove what a killed process left: what it had not written, and folders that it had emptied."""
        if processes.leads():
            for folder in self.folder.glob(".step-*.tmp"):
                shutil.rmtree(folder)
            for folder in self._folders():
                if not any(folder.iterdir()):
                    folder.rmdir()
        processes.barrier()


def _write_shards(folder: Path, tensors: Mapping[str, Tensor]) -> dict[str, dict[str, Any]]:
    """Write what each process holds; size and hash of every file."""
    distributed.write_shards(folder, tensors)
    names = processes.told(sorted(path.name for path in folder.iterdir()))
    mine = {name: _check(folder / name) for name in names[processes.rank() :: processes.size()]}
    return {name: check for checks in processes.gathered(mine) for name, check in checks.items()}


def _problem(folder: Path) -> str:
    """What is wrong with this process's share of the files in a folder, or ""."""
    try:
        stored = files.read_json(folder / FACTS)
        checks = stored.get("files", {STATE: stored})  # of a state that is not sharded they stand alone
        for name in [*checks][processes.rank() :: processes.size()]:
            path, check = folder / name, checks[name]
            if (size := path.stat().st_size) != check["bytes"]:
                return f"{name} has {size} bytes instead of {check['bytes']}"
            if files.sha256(path) != check["sha256"]:
                return f"{name} was altered, its SHA-256 is not the one in {FACTS}"
        return "" if {"step", "facts"} <= {*stored} else f"{FACTS} is incomplete"
    except (OSError, ValueError, KeyError) as e:
        return str(e)


def _load(folder: Path, layout: Mapping[str, Tensor]) -> State:
    stored = files.read_json(folder / FACTS)
    whole = "files" not in stored and not layout
    tensors = weights.read_tensors(folder / STATE) if whole else distributed.read_shards(folder, layout)
    return stored["step"], tensors, stored["facts"]


def _check(path: Path) -> dict[str, Any]:
    """Size and hash of a file that is on disk."""
    files.sync(path)
    return {"bytes": path.stat().st_size, "sha256": files.sha256(path)}
