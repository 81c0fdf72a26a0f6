"""A GPU that is not there: tensors on the CPU that say they are on one, and are held to its rules.

Inside `EmulatedGPU()` the device "cuda" exists. Its tensors live in memory of the CPU and compute there, but
mixing them with tensors of the CPU is an error, and what would wait for the device is counted by source line.
"""

from __future__ import annotations

import sys
import warnings
from collections import Counter
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map

import anyorder

CUDA = torch.device("cuda", 0)
OURS = str(Path(anyorder.__file__).parent)
READS = {
    "item", "tolist", "numpy", "cpu", "nonzero", "argwhere", "unique", "masked_select", "equal", "is_nonzero",
    "allclose", "__bool__", "__int__", "__float__", "__index__", "__array__", "__contains__", "bincount",
}  # fmt: skip
"""Functions whose results the host waits for."""
UPLOADS = {"tensor", "as_tensor", "new_tensor"}
"""Functions that copy numbers of the host, which waits until that is done."""
MAY_MIX = {
    "__getitem__",
    "__setitem__",
    "copy_",
    "index_put_",
    "index",
    "__set__",
    "_has_compatible_shallow_copy_type",
}
"""Functions that take tensors of both devices."""
COPIES = {"__getitem__", "__setitem__", "copy_", "index_put_", "index"}
"""Those of them that copy from one to the other."""
KERNELS = {
    "aten._scaled_dot_product_flash_attention": torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
}


class EmulatedGPU(TorchFunctionMode):
    """See above; counts by "file.py:line" of the package."""

    def __init__(self) -> None:
        super().__init__()
        self.reads: Counter[str] = Counter()
        """Blocking reads."""
        self.uploads: Counter[str] = Counter()
        """Blocking copies to the device."""
        self.storages: dict[int, Any] = {}
        """Of the GPU's tensors, by address; held, so that no address is used again."""

    @property
    def waits(self) -> Counter[str]:
        """All that the host waits for."""
        return self.reads + self.uploads

    def on_gpu(self, x: Any) -> bool:
        return isinstance(x, Tensor) and x.untyped_storage().data_ptr() in self.storages

    def put(self, x: Any) -> Any:
        """Label the memory of a tensor."""
        if isinstance(x, Tensor) and x.numel():
            storage = x.untyped_storage()
            self.storages[storage.data_ptr()] = storage
        return x

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        name = getattr(func, "__name__", str(func))
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        here = any(map(self.on_gpu, tensors))
        if name == "__get__":
            return self._attribute(func, args, here)
        if name in ("to", "cuda", "cpu"):
            return self._move(func, name, args, kwargs, here)
        if name == "pin_memory":
            return args[0]
        if here:
            self._check(name, args, kwargs, tensors)
        asked = _is_cuda(kwargs.get("device"))
        if (asked or here) and name in UPLOADS:
            self.uploads[_line()] += 1
        if asked:
            kwargs["device"] = "cpu"
        result = KERNELS.get(str(func), func)(*args, **kwargs)
        stays = here and name not in ("numpy", "tolist")
        return tree_map(self.put, result) if asked or stays else result

    def _attribute(self, func: Any, args: Any, here: bool) -> Any:
        what = func.__self__.__name__
        if here and what in ("device", "is_cuda", "is_cpu"):
            return {"device": CUDA, "is_cuda": True, "is_cpu": False}[what]
        result = func(*args)
        return self.put(result) if here else result

    def _move(self, func: Any, name: str, args: Any, kwargs: Any, here: bool) -> Any:
        """`to`, `cuda` and `cpu`, of tensors; a move copies."""
        x, *rest = args
        given = [a for a in (*rest, kwargs.get("device")) if isinstance(a, str | torch.device)]
        given += [self._attribute(torch.Tensor.device.__get__, (a,), self.on_gpu(a)) for a in rest
                  if isinstance(a, Tensor)]  # fmt: skip
        if sys._getframe(2).f_code.co_filename.endswith("clip_grad.py"):  # groups by device in C++: not seen
            given = []
        there = _is_cuda(given[0]) if given else {"cuda": True, "cpu": False}.get(name, here)
        rest = ["cpu" if isinstance(a, str | torch.device) else a for a in rest]
        kwargs |= {"device": "cpu"} if "device" in kwargs else {}
        result = func(x, *rest, **kwargs) if name == "to" else x
        if there != here:
            result = result.clone()
            if not kwargs.get("non_blocking"):
                (self.reads if here else self.uploads)[_line()] += 1
        return self.put(result) if there else result

    def _check(self, name: str, args: Any, kwargs: Any, tensors: list[Tensor]) -> None:
        if name in READS or _waits(name, args, kwargs):
            self.reads[_line()] += 1
        others = [x for x in tensors if x.numel() and x.ndim and not self.on_gpu(x)]
        if others and name not in MAY_MIX:
            shapes = [tuple(x.shape) for x in others]
            raise RuntimeError(f"{name} got tensors on cuda:0 and on the CPU: {shapes} at {_line()}")
        if others and name in COPIES and not kwargs.get("non_blocking"):
            (self.uploads if self.on_gpu(args[0]) else self.reads)[_line()] += 1


class RealGPU:
    """The same of a GPU that is there: what PyTorch warns of in its debug mode."""

    def __enter__(self) -> Self:
        self._catching = warnings.catch_warnings(record=True)
        self._caught = self._catching.__enter__()
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        return self

    def __exit__(self, *reason: Any) -> None:
        torch.cuda.set_sync_debug_mode("default")
        self._catching.__exit__(*reason)

    @property
    def waits(self) -> Counter[str]:
        """All that the host waits for, by "file.py:line"."""
        found = [w for w in self._caught or () if "synchronizing CUDA operation" in str(w.message)]
        return Counter(f"{Path(w.filename).name}:{w.lineno}" for w in found)


def _waits(name: str, args: Any, kwargs: Any) -> bool:
    """Whether these arguments make a function's result depend on values that the host reads."""
    if name == "multinomial":
        return not kwargs.get("replacement")
    if name == "repeat_interleave":
        return any(isinstance(x, Tensor) for x in args[1:])
    if name == "__setitem__" and not (isinstance(args[2], Tensor) and args[2].numel() > 1):
        return False
    return name in ("__getitem__", "__setitem__") and _has_mask(args[1])


def _is_cuda(device: Any) -> bool:
    return isinstance(device, str | torch.device) and torch.device(device).type == "cuda"


def _has_mask(index: Any) -> bool:
    return any(isinstance(x, Tensor) and x.dtype == torch.bool for x in tree_leaves(index))


def _line() -> str:
    """The innermost line of the package on the stack."""
    frame = sys._getframe()
    while frame is not None and not frame.f_code.co_filename.startswith(OURS):
        frame = frame.f_back  # type: ignore[assignment]
    return f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno}" if frame else "elsewhere"
