"""Training in several processes: DDP, or FSDP2 (`fully_shard`), around the loss as a module.

A pass over one batch is what is reproducible; the processes share the passes of a step. So every number is
the same for any number of processes, but for the order of floating-point sums.
"""

import contextlib
import functools
import warnings
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import get_ema_multi_avg_fn

from anyorder.contracts import require
from anyorder.inference import processes
from anyorder.models.compiled import require_compiler


def own_passes(accumulation: int) -> range:
    """Which of the passes of a step are this process's; a ValueError if they cannot be shared equally."""
    world = processes.size()
    text = f"train.accumulation={accumulation} passes of a step cannot be shared by {world} processes: give a"
    mend = f"multiple of {world}, and as much less train.batch_size for steps of the same size"
    require(accumulation % world == 0, f"{text} {mend}")
    return range(processes.rank(), accumulation, world)


class _Objective(nn.Module):
    """A loss and all that it trains, so that gradients of all of it are synchronised."""

    def __init__(self, loss: Any, modules: Mapping[str, nn.Module]):
        super().__init__()
        self.loss, self.trained = loss, nn.ModuleDict(modules)

    def forward(self, *arguments: Any) -> Any:
        return self.loss(*arguments)


def objective(loss: Any, modules: Mapping[str, nn.Module], compiled: bool, shard: bool) -> Any:
    """The loss with its first argument filled in by `modules["model"]`, its gradients synchronised.

    With `shard`, the parameters of `modules` are sharded in place. In one process it is the loss alone.
    """
    model: Any = modules["model"]
    if compiled:  # at the first call; it shares the weights, whose names stay those of `model`
        require_compiler(next(model.parameters()).device)
        model = torch.compile(model)
    loss = functools.partial(loss, model)
    if processes.size() == 1:
        return loss
    whole = _Objective(loss, modules)
    if shard:
        return shard_parameters(whole)
    # A discriminator has no gradients before its start.
    options: dict[str, Any] = {"broadcast_buffers": False, "find_unused_parameters": "extra" in modules}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # newer names that PyTorch 2.12 does not know
        return DistributedDataParallel(whole, **options)


def shard_parameters(module: nn.Module, like: nn.Module | None = None) -> nn.Module:
    """Shard, in place, what is trained; frozen parameters stay whole, since losses may change them.

    `like` is the module that a copy, in which nothing is trained, is sharded alike.
    """
    known = f"train.shard=true needs PyTorch 2.9 or newer, this is {torch.__version__}: leave it out"
    require(torch.__version__ >= "2.9", known)
    from torch.distributed import device_mesh, fsdp

    pairs = zip(module.parameters(), (like or module).parameters(), strict=True)
    frozen = {p for p, trained in pairs if not trained.requires_grad}
    mesh = device_mesh.init_device_mesh(next(module.parameters()).device.type, (processes.size(),))
    for name, blocks in module.named_modules():  # transformers run, and gather, one block after another
        if isinstance(blocks, nn.ModuleList) and name.rpartition(".")[2] in ("blocks", "layers"):
            for block in blocks:
                fsdp.fully_shard(block, mesh=mesh, ignored_params=frozen)
    fsdp.fully_shard(module, mesh=mesh, ignored_params=frozen)
    return module


@contextlib.contextmanager
def synchronised(objective: Any, last: bool) -> Iterator[None]:
    """Gradients are sent in the last pass of a step alone."""
    if isinstance(objective, DistributedDataParallel):
        with contextlib.nullcontext() if last else objective.no_sync():
            yield
        return
    if isinstance(objective, nn.Module):
        objective.set_requires_gradient_sync(last)  # type: ignore[operator]
    yield


def local(x: Tensor) -> Tensor:
    """What this process holds of a tensor."""
    return x.to_local() if hasattr(x, "to_local") else x


def full(x: Tensor) -> Tensor:
    """A tensor whole, from all processes, which must all ask for it."""
    return x.full_tensor() if hasattr(x, "full_tensor") else x


@torch.no_grad()
def copy_whole(target: nn.Module, source: nn.Module) -> nn.Module:
    """`target`, with the weights and buffers of a sharded module."""
    for kind in ("parameters", "buffers"):
        for whole, x in zip(getattr(target, kind)(), getattr(source, kind)(), strict=True):
            whole.copy_(full(x))
    return target


@torch.no_grad()
def lerp(average: nn.Module, model: nn.Module, decay: float) -> None:
    """Move averaged parameters towards the model's; buffers are averages or constants already: copied."""
    averages, weights = ([local(p) for p in module.parameters()] for module in (average, model))
    get_ema_multi_avg_fn(decay)(averages, weights, 0)
    for averaged, current in zip(average.buffers(), model.buffers(), strict=True):
        averaged.copy_(current)


def is_finite(modules: Iterable[nn.Module]) -> bool:
    """Whether there is no NaN or infinity in any process."""
    modules = list(modules)
    checks = [local(p).isfinite().all() for module in modules for p in module.parameters()]
    # A buffer may hold infinities on purpose, as attention masks do.
    checks += [~b.isnan().any() for module in modules for b in module.buffers()]
    return not processes.agreed(not torch.stack(checks).all())


def write_shards(folder: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write what each process holds, as `shard-*.safetensors`; an OSError where it cannot be written."""
    from torch.distributed import checkpoint as dcp  # takes as long to import as PyTorch

    folder.mkdir(parents=True, exist_ok=True)
    try:
        writer = dcp.HuggingFaceStorageWriter(str(folder), save_distributed=True)
        dcp.save(dict(tensors), storage_writer=writer)
    except dcp.CheckpointException as e:  # no Exception, and it hides which one it was
        full = [error for error, _ in e.failures.values() if isinstance(error, OSError)]
        raise full[0] if full else OSError(f"cannot write {folder}: {e}") from e


def read_shards(folder: Path, layout: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of all files, whole or as they are sharded in `layout`."""
    from torch.distributed import checkpoint as dcp

    reader = dcp.HuggingFaceStorageReader(str(folder))
    stored: Mapping[str, Any] = reader.read_metadata().state_dict_metadata
    tensors = {name: torch.empty(x.size, dtype=x.properties.dtype) for name, x in stored.items()}
    for name, like in layout.items():
        if name in tensors and tensors[name].shape == like.shape:
            tensors[name] = torch.empty_like(like, requires_grad=False)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # in one process it may be
        dcp.load(tensors, storage_reader=reader, no_dist=True)
    return tensors
