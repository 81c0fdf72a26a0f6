"""Long work over many images: batches as large as memory allows, and parts that several processes share."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch

from anyorder.contracts import AnyOrderNetwork, Grid
from anyorder.files import load_array, save_array

LARGEST = {"cpu": 64, "cuda": 1024}
"""Images in a batch: more keep a device no busier, and a killed run loses more of its work."""
SHARE = 0.5
"""Part of the free memory for caches; the rest is for logits, activations and other processes."""


def images_at_once(model: AnyOrderNetwork, grid: Grid, processes: int = 1) -> int:
    """Images whose caches fit into half of the free memory that `processes` share, a power of two.

    An image takes 4 depth N D numbers of the weights' type: keys and values, twice, since some models keep
    two entries for each position.
    """
    weight = next(model.parameters())
    bytes_each = 4 * model.config.depth * grid.n * model.config.width * weight.element_size()
    fit = int(SHARE * free_memory(weight.device) / processes / bytes_each)
    return 2 ** (min(max(fit, 1), LARGEST.get(weight.device.type, 64)).bit_length() - 1)


def free_memory(device: torch.device) -> int:
    """Free bytes; 2 GiB where the system does not tell."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        with open("/proc/meminfo") as f:
            return next(int(line.split()[1]) * 1024 for line in f if line.startswith("MemAvailable"))
    except (OSError, StopIteration):
        return 2 * 2**30


def share_out(parts: Sequence[Path], finished: Callable[[], bool], work: Callable[[int], Any]) -> None:
    """Work on every part that no other process is working on, then on those that others left unfinished.

    Any number of processes may call this with the same folders; it returns when all parts are finished. A
    process that is killed releases its part, and the next one resumes it.

    Args:
        parts: one folder for each part, made if need be.
        finished: whether the parts are joined already.
        work: does part i or the rest of it; does nothing if it is done.
    """
    for wait in (False, True):
        for i, folder in enumerate(parts):
            if finished():
                return
            with claimed(folder, wait=wait) as mine:
                if mine and not finished():
                    work(i)


@contextmanager
def claimed(folder: Path, *, wait: bool = True) -> Iterator[bool]:
    """Hold a folder, made if need be, against other processes; yields whether it is held.

    Raises:
        ValueError: the system has no `flock`.
    """
    try:
        import fcntl
    except ImportError as e:  # not on Windows
        raise ValueError("shards need a system with flock (Linux, macOS): leave shards at 1") from e
    folder.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            yield False
        else:
            yield True
    finally:
        os.close(descriptor)  # lets go of the folder


def join(parts: Sequence[Path], names: Sequence[str], folder: Path) -> None:
    """Join arrays NAME.npy of all parts, row by row, into `folder`, and remove the parts.

    The last name is written last: when it is there, all are, and nothing but removing is left to do.
    """
    if not (folder / f"{names[-1]}.npy").is_file():
        for name in names:
            whole = np.concatenate([load_array(part / f"{name}.npy") for part in parts])
            save_array(folder / f"{name}.npy", whole)
    for part in parts:
        shutil.rmtree(part, ignore_errors=True)
