"""Weights and training states on disk: safetensors + JSON, never pickle, never half a file."""

from __future__ import annotations

import dataclasses
import importlib
import logging
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
from safetensors import SafetensorError
from torch import Tensor, nn

from anyorder.artifacts import atomic, read_json, sha256, write_json
from anyorder.runs.config import parse

WEIGHTS, CONFIG = "model.safetensors", "config.json"
STATE, FACTS = "state.safetensors", "facts.json"

KINDS = {
    "vq": ("anyorder.models.vq", "VQModel", "VQConfig"),
    "transformer": ("anyorder.models.transformer", "AnyOrderTransformer", "TransformerConfig"),
    "maskgit_vq": ("anyorder.adapters.maskgit_vq", "MaskGITVQ", "MaskGITVQConfig"),
    "llamagen": ("anyorder.adapters.llamagen", "LlamaGen", "GPTConfig"),
    "randar": ("anyorder.adapters.randar", "RandAR", "GPTConfig"),
    "arpg": ("anyorder.adapters.arpg", "ARPG", "GPTConfig"),
    "classifier": ("anyorder.evaluation.features", "Classifier", "ClassifierConfig"),
}
"""Kind of a saved model -> module, model class, configuration class; imported when one is loaded."""

log = logging.getLogger("anyorder")


def kind_of(model: nn.Module) -> str:
    """The kind that a model is saved as.

    Raises:
        ValueError: it is none of `KINDS`.
    """
    name = (type(model).__module__, type(model).__name__)
    for kind, (module, model_class, _) in KINDS.items():
        if name == (module, model_class):
            return kind
    raise ValueError(f"{name[1]} cannot be saved: allowed are {', '.join(KINDS)}")


def save_model(folder: str | Path, model: nn.Module, config: Any, kind: str) -> None:
    """Write `model.safetensors` and `config.json` (kind and configuration) into `folder`.

    Args:
        folder: made if need be.
        model: its `state_dict` is written; tensors may live on any device.
        config: the dataclass instance that `model` was built from.
        kind: one of `KINDS`.

    Raises:
        ValueError: unknown kind.
        OSError: the disk is full; older files are left as they were.
    """
    _require_kind(kind, "kind")
    write_tensors(Path(folder) / WEIGHTS, model.state_dict())
    write_json(Path(folder) / CONFIG, {"kind": kind, "config": dataclasses.asdict(config)})


def load_model(folder: str | Path, kind: str | None = None) -> nn.Module:
    """Build the model that `save_model` wrote, on the CPU and in evaluation mode.

    Args:
        folder: where `save_model` wrote.
        kind: refuse any other kind of model.

    Raises:
        FileNotFoundError: there is no model in `folder`.
        ValueError: damaged file, another kind, unknown setting, or tensors that do not fit the model.
    """
    folder = Path(folder)
    for path in (folder / CONFIG, folder / WEIGHTS):
        if not path.is_file():
            raise FileNotFoundError(f"{folder} holds no model ({path.name} is missing): train one first")
    stored = read_json(folder / CONFIG)
    found = _require_kind(stored.get("kind"), folder / CONFIG)
    if kind not in (None, found):
        raise ValueError(f"{folder} holds a model of kind '{found}', expected '{kind}'")
    module, model_class, config_class = KINDS[found]
    package = importlib.import_module(module)
    try:
        config = parse(getattr(package, config_class), stored["config"])
    except ValueError as e:
        raise ValueError(f"{folder / CONFIG} does not fit this version's {config_class}: {e}") from e
    model = getattr(package, model_class)(config)
    load_state(model, read_tensors(folder / WEIGHTS), folder / WEIGHTS)
    return model.eval()


def _require_kind(kind: Any, source: str | Path) -> str:
    if kind not in KINDS:
        raise ValueError(f"{source}: unknown kind of model {kind!r}, allowed: {', '.join(KINDS)}")
    return kind


def load_state(module: nn.Module, tensors: Mapping[str, Tensor], source: str | Path) -> None:
    """Copy `tensors` into `module`, every name and shape of it and nothing else.

    Raises:
        ValueError: names the first tensors that are missing, unexpected or of another shape, and `source`.
    """
    wanted = module.state_dict()
    problems = [f"missing {name}" for name in wanted if name not in tensors]
    problems += [f"unexpected {name}" for name in tensors if name not in wanted]
    problems += [
        f"{name} is {tuple(tensors[name].shape)}, expected {tuple(tensor.shape)}"
        for name, tensor in wanted.items()
        if name in tensors and tensors[name].shape != tensor.shape
    ]
    if problems:
        more = f" and {len(problems) - 5} more" if len(problems) > 5 else ""
        raise ValueError(f"{source} does not fit {type(module).__name__}: {'; '.join(problems[:5])}{more}")
    module.load_state_dict(tensors)


def write_tensors(path: str | Path, tensors: Mapping[str, Tensor]) -> None:
    """Write tensors atomically as safetensors.

    Raises:
        OSError: the disk is full or cannot be written; an older file is left as it was.
    """
    # A copy of each: safetensors refuses tensors that share memory, such as tied embeddings.
    copies = {name: t.detach().to("cpu", copy=True).contiguous() for name, t in tensors.items()}
    with atomic(path) as temporary:
        try:
            safetensors.torch.save_file(copies, temporary)
        except SafetensorError as e:
            raise OSError(f"cannot write {path}: {e}") from e


def read_tensors(path: str | Path) -> dict[str, Tensor]:
    """Read safetensors into memory of their own.

    Raises:
        FileNotFoundError: no such file.
        ValueError: damaged; the message names the file.
    """
    try:
        # A copy of each: the loader maps the file, and pruning or truncating it must not reach us.
        return {name: tensor.clone() for name, tensor in safetensors.torch.load_file(path).items()}
    except SafetensorError as e:
        raise ValueError(f"{path} is damaged ({e}): restore it or train again") from e


class Checkpoints:
    """The training states of one run: `checkpoints/step-00001000/{state.safetensors, facts.json}`.

    A state is written under a temporary name and renamed once it is whole, so a kill at any moment leaves
    the earlier ones intact. One process at a time may write into a folder.
    """

    def __init__(self, folder: str | Path, keep: int = 2):
        """Open the states of the run in `folder`, of which the `keep` newest are kept."""
        self.folder = Path(folder) / "checkpoints"
        self.keep = keep
        self._sweep()

    def save(self, step: int, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> None:
        """Write the state after `step`, then prune older ones and any later ones (found damaged, or undone).

        Args:
            step: number of the step, in [0, 10^8).
            tensors: by name, on any device.
            facts: whatever else the run must remember; JSON-able.

        Raises:
            OSError: the disk is full; the earlier states are left as they were.
        """
        self._sweep()
        final = self.folder / f"step-{step:08d}"
        temporary = self.folder / f".{final.name}.tmp"
        try:
            write_tensors(temporary / STATE, tensors)
            size, digest = (temporary / STATE).stat().st_size, sha256(temporary / STATE)
            write_json(
                temporary / FACTS, {"step": step, "bytes": size, "sha256": digest, "facts": dict(facts)}
            )
            _sync(temporary)
            if final.exists():
                shutil.rmtree(final)
            os.rename(temporary, final)
            _sync(self.folder)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
        self._prune(final)

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
            raise ValueError(
                f"no intact checkpoint: {'; '.join(damaged)}; delete {self.folder} to start anew"
            )
        return None

    def _folders(self) -> list[Path]:
        return sorted(self.folder.glob("step-*"))

    def _prune(self, newest: Path) -> None:
        folders = self._folders()
        upto = folders.index(newest) + 1
        for folder in folders[: max(0, upto - self.keep)] + folders[upto:]:
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
