"""Long work over many images: batches as large as memory allows, and parts that several processes share."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch

from anyorder.contracts import AnyOrderNetwork, Grid
from anyorder.files import load_array, save_array

LARGEST = {"cpu": 64, "cuda": 1024}
"""Images in a batch: more keep a device no busier, and a killed run loses more of its work."""


def images_at_once(model: AnyOrderNetwork, grid: Grid, processes: int = 1) -> int:
    """Images whose caches fit into half of the free memory that `processes` share, a power of two.

    The other half is for logits and activations. An image takes 4 depth N D numbers of the weights' type:
    keys and values, twice, since some models keep two entries for each position.
    """
    weight = next(model.parameters())
    if not hasattr(model.config, "depth"):  # an own network, of which nothing is known
        return LARGEST["cpu"]
    bytes_each = 4 * model.config.depth * grid.n * model.config.width * weight.element_size()
    fit = free_memory(weight.device) // 2 // processes // bytes_each
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


def share_out(
    folder: Path, split: str, count: int, names: Sequence[str], work: Callable[[int, Path], None]
) -> None:
    """Do `work` in `count` parts that any number of processes share, and join its arrays row by row.

    `work` does part i, or the rest of it, in a folder (SPLIT-i-of-COUNT below `folder`), and writes NAME.npy
    there for each of the `names`. Each process takes the parts that no other is working on, then those that
    others left unfinished. A process that is killed releases its part, and the next one resumes it.

    Raises:
        ValueError: the system has no `flock`.
    """
    if count == 1:
        return work(0, folder)
    parts = [folder / f"{split}-{i}-of-{count}" for i in range(count)]
    finished = (folder / f"{names[-1]}.npy").is_file  # the last array is written last
    for wait in (False, True):
        for i, part in enumerate(parts):
            if not finished():
                with _claimed(part, wait=wait) as mine:
                    if mine and not finished():
                        work(i, part)
    joining = folder / ".joining"  # the artifact's folder itself is locked by all who work in it
    with _claimed(joining):
        for name in () if finished() else names:
            save_array(
                folder / f"{name}.npy", np.concatenate([load_array(part / f"{name}.npy") for part in parts])
            )
        for part in parts:
            shutil.rmtree(part, ignore_errors=True)
    shutil.rmtree(joining, ignore_errors=True)


@contextmanager
def _claimed(folder: Path, *, wait: bool = True) -> Iterator[bool]:
    """Hold a folder, made if need be, against other processes; yields whether it is held."""
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
