"""What stages share: facts of trainings, and checks that artifacts belong together."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from torch import Tensor
from tqdm import tqdm

from anyorder.contracts import AnyOrderNetwork, class_labels, require
from anyorder.data.caches import TokenSet
from anyorder.data.classes import map_classes
from anyorder.data.rows import slices
from anyorder.files import RowWriter, fingerprint, read_json, read_manifest
from anyorder.inference import processes
from anyorder.inference.device import Threads, device
from anyorder.inference.folders import INDEX
from anyorder.inference.weights import CONFIG, _part
from anyorder.training.config import TrainConfig
from anyorder.training.trainer import TrainResult

log = logging.getLogger("anyorder")

SHOWN = 16
"""Images in the figures that stages make."""
SAMPLES = "samples.safetensors"
"""Features and logits of the samples in an eval artifact, so that comparisons need no second pass."""


class TrainingStage:
    """A stage with a training: log settings are free to change, more steps extend it."""

    together: ClassVar[bool] = True
    train: TrainConfig
    grows: ClassVar[tuple[str, ...]] = ("train.steps",)

    @property
    def aside(self) -> tuple[str, ...]:
        """Settings that do not change what the stage writes."""
        return tuple(f"train.{name}" for name in self.train.log_settings)


class Rows:
    """Arrays of n rows that all processes fill: iterate over batches of row numbers, append what each gives.

    Batches have the same bounds, and are written in sequence, in any number of processes: so are the files.
    A killed run goes on after the last batch on disk. Shows a bar; the arrays are whole after the loop.
    """

    def __init__(self, folder: Path, arrays: Mapping[str, Any], n: int, size: int, what: str):
        """Arrays as of `RowWriter` in `folder`, n rows, `size` of them at a time; `what` names them."""
        self.specs, self.n, self.size, self.what = arrays, n, size, what
        self._writer = RowWriter(folder, arrays, size) if processes.leads() else None
        self._made: dict[str, np.ndarray] = {}
        self._done = processes.told(self._writer.rows if self._writer else 0)
        self._todo = list(slices(n, size, self._done))
        self.own = self._todo[processes.rank() :: processes.size()]
        """Row numbers of the batches that are this process's, in sequence."""

    def append(self, **arrays: np.ndarray) -> None:
        """The rows of the batch."""
        self._made = arrays

    def __iter__(self) -> Iterator[np.ndarray]:
        """Row numbers (B,) of the batches that are this process's."""
        todo = self._todo
        with (
            tqdm(total=self.n, initial=self._done, desc=self.what, unit="image") as bar,
            Threads(device()) as threads,
        ):
            while todo:
                now, todo = todo[: processes.size()], todo[processes.size() :]
                yield from now[processes.rank() :][:1]
                for made in processes.collected(self._made)[: len(now)]:
                    self._writer.append(**made)  # type: ignore[union-attr]  # the leader alone is given them
                bar.update(sum(map(len, now)))
                threads.step()
        if self._writer:
            self._writer.close()
        processes.barrier()


def training_facts(result: TrainResult) -> dict[str, Any]:
    """What the manifest records of a training."""
    facts = {name: getattr(result, name) for name in ("steps", "seconds", "examples")}
    parameters = sum(p.numel() for p in result.model.parameters())
    return {"parameters": parameters, **facts, "device": str(device())}


def trained_before(folder: Path) -> dict[str, Any]:
    """Tokens and seconds of training behind a model; what others trained is not counted."""
    manifest = read_manifest(folder)
    return {key: manifest.get(key, 0) for key in ("training_tokens", "training_seconds")}


def require_made_from(folder: Path, role: str, other: Path | None) -> None:
    """A ValueError if `folder` was made from another artifact in this role than `other` (None: from any)."""
    recorded, given = read_manifest(folder)["inputs"].get(role), fingerprint(other) if other else None
    require(
        recorded == given,
        f"{folder} was made with {role} {recorded}, but {other} is {given}: give the {role} that belongs to "
        f"it, or run the stage that makes {folder} again",
    )


# --- published models among our own -----------------------------------------------------------------------


def is_converted(folder: Path) -> bool:
    """Whether the model was trained by others: `anyorder convert` made the folder."""
    return read_manifest(folder)["stage"] == "convert"


def known_classes(folder: Path, tokens: TokenSet, count: int) -> list[int | None]:
    """Which of the `count` classes of a converted model each class of the tokens is; see `map_classes`."""
    return map_classes(tokens.classes, _own_names(folder), count)


def class_names(folder: Path, model: AnyOrderNetwork, tokens: TokenSet) -> list[str]:
    """Names of the model's classes: those of the tokens if they are as many, else those it came with."""
    return tokens.classes if model.num_classes == len(tokens.classes) else _own_names(folder)


def _own_names(folder: Path) -> list[str]:
    """Class names that a converted model came with; none if they are not known."""
    index = folder / INDEX
    return read_json(index)["classes"] if index.is_file() else []


def require_trained_on(folder: Path, tokens: TokenSet, *, adapted: bool = False) -> None:
    """A ValueError for a model that was not trained on these tokens; a converted one must know as many.

    Unless a converted model is to be `adapted` to their classes, a warning says where labels are left out.
    """
    if not is_converted(folder):
        return require_made_from(folder, "tokens", tokens.folder)
    config = read_json(_part(folder, "model") / CONFIG)["config"]
    vocab_size, count = config["vocab_size"], config["num_classes"]
    require(
        vocab_size == tokens.vocab_size,
        f"{folder} knows {vocab_size} tokens, {tokens.folder} has {tokens.vocab_size}: tokenize the images "
        "with the tokenizer that belongs to the model",
    )
    if adapted:
        return
    if count != len(tokens.classes):
        classes = (folder, count, tokens.folder, len(tokens.classes))
        log.warning("%s has %d classes, %s has %d: labels are left out", *classes)
        return
    require(
        known_classes(folder, tokens, count) == list(range(count)),
        f"{folder} and {tokens.folder} have {count} classes each, but not the same ones in the same "
        "sequence: train the model on these tokens first, or leave the labels out of data",
    )


def as_condition(model: AnyOrderNetwork, tokens: TokenSet, condition: Tensor) -> Tensor | None:
    """The condition as the model takes it: of a published model the class; None of other or no classes."""
    if getattr(model, "prefix", None) is None:
        if not model.num_classes:
            return None  # guidance then says that it needs a condition
        condition = class_labels(condition)
    return condition if model.num_classes in (0, len(tokens.classes)) else None
