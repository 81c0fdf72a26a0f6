"""The processes of one run, as torchrun starts them; a plain command is a world of one.

What is said here goes over gloo, between the hosts' memories: gradients take NCCL between GPUs.
"""

import contextlib
import gc
import itertools
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from tqdm import tqdm

from anyorder.contracts import require
from anyorder.inference.device import device

T = TypeVar("T")
R = TypeVar("R")
PATIENCE = timedelta(days=7)
"""How long processes wait for one that works alone; torchrun notices one that ended."""
_talk: list[Any] = [None]
"""The group in which processes wait for one another; None is PyTorch's default group."""


@contextlib.contextmanager
def joined() -> Iterator[None]:
    """The processes that torchrun started as one world; without torchrun, nothing.

    Raises:
        ValueError: there are more processes than GPUs on this machine.
        ConnectionError: another process ended.
    """
    if "LOCAL_RANK" not in os.environ or dist.is_initialized():
        yield
        return
    gpus, local = torch.cuda.device_count(), int(os.environ["LOCAL_RANK"])
    if device().type == "cuda":
        require(local < gpus, f"there is no GPU for process {local}: give --nproc-per-node={gpus}")
        torch.cuda.set_device(local)
        dist.init_process_group("cpu:gloo,cuda:nccl")
    else:
        dist.init_process_group("gloo")
    _talk[0] = dist.new_group(backend="gloo", timeout=PATIENCE)
    try:
        yield
    except RuntimeError as e:
        if isinstance(e, dist.DistError) or "gloo" in str(e):
            again = "its error is above, or it was killed; the same command goes on from here"
            raise ConnectionError(f"another process of this run ended: {again}") from e
        raise
    gc.collect()  # what still holds the group, before it goes
    _talk[0] = None
    dist.destroy_process_group()


def size() -> int:
    """Number of processes."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """Number of this process, from 0."""
    return dist.get_rank() if size() > 1 else 0


def leads() -> bool:
    """Whether this is the process that writes files and talks to the user."""
    return rank() == 0


def barrier() -> None:
    """Wait until all processes are here."""
    if size() > 1:
        dist.barrier(_talk[0])


def told(value: T) -> T:
    """The leader's value, in every process."""
    box = [value]
    if size() > 1:
        dist.broadcast_object_list(box, group=_talk[0])
    return box[0]


def gathered(value: T) -> list[T]:
    """The values of all processes, in every process."""
    found = [value] * size()
    if size() > 1:
        dist.all_gather_object(found, value, group=_talk[0])
    return found


def collected(value: T) -> list[T]:
    """The values of all processes in the leader, none in the others."""
    found = [value] * size() if leads() else None
    if size() > 1:
        dist.gather_object(value, found, group=_talk[0])
    return found or []


def mapped(work: Callable[[T], R], batches: Sequence[T], what: str) -> Iterator[R]:
    """`work` of each batch, by any process, in their sequence; the leader alone gets them. Shows a bar."""
    with tqdm(total=len(batches), desc=what, unit="batch") as bar:
        for begin in range(0, len(batches), size()):
            mine = [work(batch) for batch in batches[begin + rank() :][:1]]
            yield from itertools.chain(*collected(mine))
            bar.update(len(batches[begin:][: size()]))


def leader_does(work: Callable[[], T]) -> T | None:
    """What `work` returns in the leader, None in the others; all of them raise what it raises."""
    found, error = None, None
    if leads():
        try:
            found = work()
        except (ValueError, OSError) as e:
            error = e
    if (told_error := told(error)) is not None:
        raise error or told_error
    return found


def agreed(flag: bool) -> bool:
    """Whether the flag is set in any process."""
    if size() == 1:
        return flag
    found = torch.tensor(float(flag))
    dist.all_reduce(found, dist.ReduceOp.MAX, group=_talk[0])
    return bool(found)


def mean(values: Tensor) -> Tensor:
    """Means over the processes of values on the device, in place."""
    if size() > 1:
        dist.all_reduce(values)
        values /= size()
    return values


def stacked(x: Tensor) -> Tensor:
    """Tensors of equal shape (...) from all processes, (processes, ...)."""
    if size() == 1:
        return x[None]
    found = [torch.empty_like(x) for _ in range(size())]
    dist.all_gather(found, x.contiguous())
    return torch.stack(found)


def same(tensors: Iterable[Tensor]) -> None:
    """Overwrite tensors with the leader's."""
    for x in tensors if size() > 1 else ():
        dist.broadcast(x, 0)
