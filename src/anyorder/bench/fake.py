"""Running a model at any size without its memory, on PyTorch's fake tensors: what it costs is counted.

The program that runs is the real one: forward, backward and the kernels of a CPU in the precision that is
asked for. Kernels of GPUs keep about the same tensors; what they use inside is not seen.
"""

from collections import abc
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch

from anyorder.bench import costs
from anyorder.models import layers


@dataclass(frozen=True)
class Pass:
    """Forward and backward pass over one batch, or a forward pass without gradients."""

    cost: costs.Cost
    peak: int
    """Most bytes alive at once beside the weights: activations, and gradients where there are any."""


@contextmanager
def imagined() -> abc.Iterator[None]:
    """All tensors that are made have shapes and types, but no memory.

    Raises:
        ImportError: this PyTorch has no fake tensors.
    """
    try:
        from torch._subclasses import fake_tensor
    except ImportError as e:
        text = f"costs are counted on PyTorch's fake tensors, which {torch.__version__} lacks"
        raise ImportError(text) from e
    without_packing = mock.patch.dict("os.environ", {layers.SWITCH: "0"})  # it has no fake version
    as_on_gpus = mock.patch("anyorder.models.attention.WRITTEN_OUT", 0)
    with fake_tensor.FakeTensorMode(), without_packing, as_on_gpus:
        yield


def build(make: abc.Callable[[], torch.nn.Module], dtype: torch.dtype | None = None) -> Any:
    """The module that `make` builds, without memory; call it, and use the module, within `imagined`.

    `dtype` is that of its parameters.
    """
    from torch._subclasses import fake_tensor

    with fake_tensor.unset_fake_temporarily(), torch.device("meta"):
        module = make()
    for part in module.modules():
        for tensors in (part._parameters, part._buffers):
            for name, x in tensors.items():
                if x is not None:
                    trained = isinstance(x, torch.nn.Parameter)
                    made: torch.Tensor = torch.empty(x.shape, dtype=dtype if dtype and trained else x.dtype)
                    tensors[name] = torch.nn.Parameter(made, x.requires_grad) if trained else made  # type: ignore[assignment]
    return module


def measure(module: torch.nn.Module, work: abc.Callable[[], Any], *given: torch.Tensor) -> Pass:
    """Count `work`, which runs a module of `build`; like weights, `given` tensors are no part of the peak."""
    with costs.Alive([*module.parameters(), *module.buffers(), *given]) as alive:
        cost = costs.count(work)
    return Pass(cost, alive.peak)
