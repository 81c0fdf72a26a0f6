"""What stages share: facts of trainings, and checks that artifacts belong together."""

import itertools
import logging
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from torch import Tensor
from tqdm import tqdm

from anyorder.contracts import AnyOrderNetwork, class_labels, require
from anyorder.data.caches import TokenSet
from anyorder.data.classes import map_classes
from anyorder.data.rows import slices
from anyorder.files import RowWriter, fingerprints, load_array, read_json, read_manifest
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
_PART = 16
"""Batches that one of several processes writes to a file of its own."""


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

    Several processes take parts of 16 batches in turn, and each writes its parts to files of its own; none
    waits for another. The leader then joins them in sequence. Batches have the same bounds in any number of
    processes: so the arrays are the same bytes. A killed run goes on after the last batch of the arrays, or
    the last whole parts, in any number of processes. Shows a bar; the arrays are whole after the loop.
    """

    def __init__(self, folder: Path, arrays: Mapping[str, Any], n: int, size: int, what: str):
        """Arrays as of `RowWriter` in `folder`, n rows, `size` of them at a time; `what` names them."""
        self.folder, self.specs, self.n, self.size, self.what = folder, arrays, n, size, what
        self._writer = RowWriter(folder, arrays, size) if processes.leads() else None
        self._made: dict[str, np.ndarray] = {}
        self._done = processes.told(self._writer.rows if self._writer else 0)
        parts = self._parts(self._done)
        self._whole = processes.told({part for part in parts if self._is_whole(part)})
        self.known = self._done + sum(end - begin for begin, end in self._whole)
        """How many rows an earlier run has made."""
        self._mine = [part for part in parts if part not in self._whole][processes.rank() :: processes.size()]
        self.own = [rows for begin, end in self._mine for rows in slices(end, size, begin)]
        """Row numbers of the batches that are this process's, in sequence."""

    def append(self, **arrays: np.ndarray) -> None:
        """The rows of the batch."""
        self._made = arrays

    def __iter__(self) -> Iterator[np.ndarray]:
        """Row numbers (B,) of the batches that are this process's."""
        bar = tqdm(total=self.n, initial=self.known, desc=self.what, unit="image")
        with bar, Threads(device()) as threads:
            for part in self._mine:
                writer = self._writer_of(part)
                for rows in slices(part[1], self.size, part[0]):
                    yield rows
                    _append(writer, (self._made[name] for name in self.specs))
                    bar.update(min(len(rows) * processes.size(), self.n - bar.n))
                    threads.step()
                if writer is not self._writer:
                    writer.close()
            processes.barrier()
            bar.update(self.n - bar.n)
        if self._writer:
            self._join(self.n)
            self._writer.close()
            for name in self.specs:  # of a run in another number of processes
                for left in self.folder.glob(f"{name}.{'[0-9]' * 9}.npy*"):
                    left.unlink()
        processes.barrier()

    def _parts(self, begin: int) -> list[tuple[int, int]]:
        """First row, and the row behind the last, of each part from a row on."""
        span = _PART * self.size
        bounds = [begin, *range(begin // span * span + span, self.n, span), self.n]
        return list(itertools.pairwise(bounds)) if begin < self.n else []

    def _arrays(self, part: tuple[int, int]) -> dict[str, Any]:
        return {f"{name}.{part[0]:09d}": spec for name, spec in self.specs.items()}

    def _is_whole(self, part: tuple[int, int]) -> bool:
        paths = [self.folder / f"{name}.npy" for name in self._arrays(part)]
        return all(path.is_file() and len(load_array(path)) == part[1] - part[0] for path in paths)

    def _writer_of(self, part: tuple[int, int]) -> RowWriter:
        """What a part is written to: one process alone needs no files between."""
        if processes.size() == 1 and self._writer:
            self._join(part[0])
            return self._writer
        return RowWriter(self.folder, self._arrays(part), most=0)  # what is there has other bounds

    def _join(self, until: int) -> None:
        """Append the parts up to a row to the arrays."""
        assert self._writer is not None, "the leader joins"
        for part in self._parts(self._writer.rows):
            if part[1] <= until:
                paths = [self.folder / f"{name}.npy" for name in self._arrays(part)]
                _append(self._writer, map(load_array, paths))
                for path in paths:
                    path.unlink()


def _append(writer: RowWriter, arrays: Iterable[np.ndarray]) -> None:
    """Append arrays in the sequence of the writer's names, which may be those of a part."""
    writer.append(**dict(zip(writer.specs, arrays, strict=True)))


def training_facts(result: TrainResult) -> dict[str, Any]:
    """What the manifest records of a training."""
    facts = {name: getattr(result, name) for name in ("steps", "seconds", "examples")}
    facts |= {name: result.metrics[name] for name in ("mfu", "peak_memory") if name in result.metrics}
    parameters = sum(p.numel() for p in result.model.parameters())
    return {"parameters": parameters, **facts}


def trained_before(folder: Path) -> dict[str, Any]:
    """Tokens and seconds of training behind a model; what others trained is not counted."""
    manifest = read_manifest(folder)
    return {key: manifest.get(key, 0) for key in ("training_tokens", "training_seconds")}


def require_made_from(folder: Path, role: str, other: Path | None) -> None:
    """A ValueError if `folder` was made from another artifact in this role than `other` (None: from any)."""
    recorded = read_manifest(folder)["inputs"].get(role)
    names = fingerprints(other, role) if other else [None]
    text = f"{folder} was made with {role} {recorded}, but {other} is {names[0]}: give the {role} that"
    require(recorded in names, f"{text} belongs to it, or run the stage that makes {folder} again")


# --- published models among our own -----------------------------------------------------------------------


def is_converted(folder: Path) -> bool:
    """Whether the model was trained by others: `anyorder convert` made the folder."""
    return read_manifest(folder)["stage"] == "convert"


def known_classes(folder: Path, tokens: TokenSet, count: int) -> list[int | None]:
    """Which of the `count` classes of a converted model each class of the tokens is; see `map_classes`."""
    return map_classes(tokens.classes, own_names(folder), count)


def own_names(folder: Path) -> list[str]:
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
    text = f"{folder} knows {vocab_size} tokens, {tokens.folder} has {tokens.vocab_size}: tokenize the images"
    require(vocab_size == tokens.vocab_size, f"{text} with the tokenizer that belongs to the model")
    if adapted:
        return
    if count != len(tokens.classes):
        classes = (folder, count, tokens.folder, len(tokens.classes))
        log.warning("%s has %d classes, %s has %d: labels are left out", *classes)
        return
    text = f"{folder} and {tokens.folder} have {count} classes each, but not the same ones in the same"
    mend = "sequence: train the model on these tokens first, or leave the labels out of data"
    require(known_classes(folder, tokens, count) == list(range(count)), f"{text} {mend}")


def as_condition(model: AnyOrderNetwork, tokens: TokenSet, condition: Tensor) -> Tensor | None:
    """The condition as the model takes it: of a published model the class; None of other or no classes."""
    if getattr(model, "prefix", None) is None:
        if not model.num_classes:
            return None  # guidance then says that it needs a condition
        condition = class_labels(condition)
    return condition if model.num_classes in (0, len(tokens.classes)) else None
