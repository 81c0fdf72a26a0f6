"""What work costs, counted while it runs: FLOPs, bytes that have to move, and bytes that are alive.

A multiply-add is two FLOPs. Matrix products, convolutions and attention count, by PyTorch's formulas; of all
else only the bytes do. Each reads its operands and writes its result once; attention moves no scores.
"""

import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

Formula = Callable[..., int]


@dataclass(frozen=True)
class Cost:
    """FLOPs and bytes of some work."""

    flops: float = 0.0
    bytes: float = 0.0
    """Of matrix products, convolutions and attention."""
    elementwise: float = 0.0
    """Bytes of all else, an upper limit: operators of a compiled model move fewer, lookups read few rows."""
    operators: float = 0.0
    """How many are called, each of which costs the host some time; views included."""

    def seconds(self, flops_per_second: float, bytes_per_second: float) -> float:
        """The least time (the roofline) without elementwise work: arithmetic or memory, what is slower."""
        return max(self.flops / flops_per_second, self.bytes / bytes_per_second)


def count(work: Callable[[], Any]) -> Cost:
    """Run `work` once, without compiled code, and count it."""
    with torch.compiler.set_stance("force_eager"), _Counter() as counter:
        work()
    return Cost(*map(float, (counter.flops, counter.bytes, counter.elementwise, counter.operators)))


class _Counter(TorchDispatchMode):
    """`FlopCounterMode` with the bytes of what it counts and with the kernels of CPUs."""

    def __init__(self) -> None:
        super().__init__()
        self.flops = self.bytes = self.elementwise = self.operators = 0
        self.formulas: dict[Any, Formula] = {**flop_registry, **_kernels_of_cpus()}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.operators += func.namespace != "prim"
        formula = self.formulas.get(func.overloadpacket)
        operands = [x for x in tree_leaves((args, kwargs, result)) if isinstance(x, torch.Tensor)]
        moved = sum(x.numel() * x.itemsize for x in operands)
        if formula is not None:
            self.flops += formula(*args, **(kwargs or {}), out_val=result)
            self.bytes += moved
        elif func.namespace != "prim" and not _is_view(func):
            self.elementwise += moved
        return result


class Alive(TorchDispatchMode):
    """Bytes of the tensors that are alive, but for those that are `given`."""

    def __init__(self, given: list[torch.Tensor]):
        super().__init__()
        self.now = self.peak = 0
        self.known = dict.fromkeys((x.untyped_storage()._cdata for x in given), 0)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for x in tree_leaves(result):
            if (
                isinstance(x, torch.Tensor)
                and (key := (storage := x.untyped_storage())._cdata) not in self.known
            ):
                self.known[key] = storage.nbytes()
                self.now += self.known[key]
                self.peak = max(self.peak, self.now)
                weakref.finalize(storage, self._freed, key)
        return result

    def _freed(self, key: int) -> None:
        self.now -= self.known.pop(key)


def _is_view(func: Any) -> bool:
    """Whether an operator only looks at memory in another shape."""
    says = any(x.alias_info is not None and not x.alias_info.is_write for x in func._schema.returns)
    return says or func.overloadpacket is torch.ops.aten._unsafe_view


def _kernels_of_cpus() -> dict[Any, Formula]:
    """Formulas that PyTorch's registry lacks, for operators that this build has."""
    found: dict[tuple[Any, str], Formula] = {
        (torch.ops.aten, "_scaled_dot_product_flash_attention_for_cpu"): _attention,
        (torch.ops.aten, "_scaled_dot_product_flash_attention_for_cpu_backward"): _attention_backward,
        (torch.ops.mkldnn, "_linear_pointwise"): lambda x, w, *_, **__: 2 * x.numel() * w.shape[0],
        (torch.ops.aten, "_fused_adamw_"): lambda *_, **__: 0,  # moves weights, gradients, moments
    }
    return {getattr(space, name): f for (space, name), f in found.items() if hasattr(space, name)}


def _attention(
    q: torch.Tensor, k: torch.Tensor, v: Any, dropout: float = 0.0, is_causal: bool = False, **settings: Any
) -> int:
    """Two products over all pairs of q (B, H, M, d) and k (B, H, L, d), or over those that are causal."""
    rows, length = q.shape[2], k.shape[2]
    pairs = rows * (length + 1) / 2 if is_causal else rows * length
    return int(4 * q.shape[0] * q.shape[1] * pairs * q.shape[3])


def _attention_backward(grad: Any, q: Any, k: Any, v: Any, *others: Any, **settings: Any) -> int:
    """Five products: the scores are computed again."""
    return _attention(q, k, v, is_causal=others[3]) * 5 // 2
