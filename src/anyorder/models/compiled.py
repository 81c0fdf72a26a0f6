"""Decoding through compiled code with static shapes, for models whose parts between attentions are plain.

The number of revealed positions changes with every step, so attention, one fused kernel already, stays
outside. All between two attentions works on rows, and is compiled once for each number of rows.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import sys
from collections.abc import Callable, Iterable
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from anyorder.models.attention import Candidates, merge_heads, merge_with_self
from anyorder.models.blocks import Block
from anyorder.models.layers import RMSNorm
from anyorder.models.positions import Rotation
from anyorder.models.transformer import AnyOrderTransformer

FEWEST = 8
"""Buckets are multiples of it, but for a single candidate, which is a bucket of its own."""
SHAPES = 1024
"""Shapes that code is made for in a process, of all models; PyTorch runs further ones eagerly and says so."""


def bucket(m: int) -> int:
    """The number of candidates that `m` >= 1 candidates are padded to.

    A quarter more at most, or 7 where that is more; 8 % over all steps of exact sampling with N = 256. There
    are 4 log2(N) - 15 buckets up to N = 32, 64, ..., so 17 for 256.
    """
    if m == 1:
        return 1
    step = max(FEWEST, 2 ** (m - 1).bit_length() // 8)
    return -(-m // step) * step


def compile_decoding(model: Any, *, backend: str | Callable[..., Any] = "inductor") -> None:
    """Decode with compiled code from now on, where no gradients are asked for and the model evaluates.

    Candidates are padded to `bucket` many. For each bucket and each number of images, three pieces of code
    are made when they are first needed: before the first attention, between two, after the last. All blocks
    share them. This takes seconds each, and PyTorch keeps them on disk for the next process. On a GPU they
    are CUDA graphs (PyTorch's own, `mode="reduce-overhead"`), one for each block, which hold the activations
    of their bucket for as long as the process lives. Weights and their names stay as they are; results are
    those of eager code up to rounding. The location head, the prefix of a condition, what is known from the
    start, and all but the first of several tokens that are revealed at once run eagerly.

    Args:
        model: an `AnyOrderTransformer`, on the device that it is to run on.
        backend: of `torch.compile`; another one than the default is good for tests.

    Raises:
        ValueError: another kind of model, or there is no compiler.
    """
    if not isinstance(model, AnyOrderTransformer):
        raise ValueError(
            f"compile=true is for models trained here, not for a {type(model).__name__}: leave compile out"
        )
    device = model.head.weight.device
    if backend == "inductor":
        require_compiler(device)
    graphs = backend == "inductor" and device.type == "cuda"
    model.compiled = CompiledBlocks(backend=backend, **({"mode": "reduce-overhead"} if graphs else {}))


def require_compiler(device: torch.device) -> None:
    """Refuse to compile without a compiler.

    Raises:
        ValueError: no C++ compiler for the CPU, or no Triton for a GPU.
    """
    compiler = os.environ.get("CXX", "clang++" if sys.platform == "darwin" else "g++")
    if device.type == "cpu" and shutil.which(compiler) is None:
        raise ValueError(
            f"compile=true needs a C++ compiler on the CPU, there is no {compiler}: install it, name another "
            "one in CXX, or leave compile out"
        )
    if device.type == "cuda" and importlib.util.find_spec("triton") is None:
        raise ValueError("compile=true needs Triton on a GPU: install it, or leave compile out")


class CompiledBlocks:
    """Runs blocks one after another, with compiled code for everything but attention."""

    def __init__(self, **options: Any):
        """`options` are those of `torch.compile`."""
        limits = torch._dynamo.config  # 8 shapes by default; under these names PyTorch 2.6 knows them, too
        limits.cache_size_limit = max(limits.cache_size_limit, SHAPES)
        limits.accumulated_cache_size_limit = max(limits.accumulated_cache_size_limit, SHAPES)
        self._enter = torch.compile(_enter, dynamic=False, **options)
        self._between = torch.compile(_between, dynamic=False, **options)
        self._leave = torch.compile(_leave, dynamic=False, **options)

    @staticmethod
    def pad(positions: Tensor) -> Tensor:
        """Candidates (B, M), the last of them repeated until they fill a bucket."""
        surplus = bucket(positions.shape[1]) - positions.shape[1]
        return torch.cat((positions, positions[:, -1:].expand(-1, surplus)), dim=1) if surplus else positions

    def __call__(
        self,
        blocks: Iterable[Any],
        norm: RMSNorm,
        x: Tensor,
        rotation: Rotation | None,
        attends: list[Candidates],
    ) -> Tensor:
        """Inputs (B, M, D), M a bucket, to normalised outputs (B, M, D); one of `attends` per block."""
        if x.device.type == "cuda":  # the graphs may write over what they returned in the last step
            torch.compiler.cudagraph_mark_step_begin()
        blocks, x = list(blocks), _plain(x)
        q, k, v = self._enter(blocks[0], x, rotation)
        for (block, following), attend in zip(pairwise(blocks), attends, strict=False):
            x, q, k, v = self._between(block, following, x, *_attend(attend, q, k, v), rotation)
        return self._leave(blocks[-1], norm, x, *_attend(attends[-1], q, k, v))


Attended = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]
"""Queries, keys and values (B, H, M, D / H), and attention to the prefix: (B, M, H, D / H), (B, H, M, 1)."""


def _attend(attend: Candidates, q: Tensor, k: Tensor, v: Tensor) -> Attended:
    out, total = attend.prefix_alone(q, k, v)
    return q, k, v, _plain(out.transpose(1, 2)), _plain(total)


def _plain(x: Tensor) -> Tensor:
    """`x` in the one layout that code is made for; `contiguous` leaves any strides where there is one row."""
    return x.contiguous().view(-1).view(x.shape)


def _enter(block: Block, x: Tensor, rotation: Rotation | None) -> tuple[Tensor, Tensor, Tensor]:
    return block.before(x, rotation)


def _between(
    block: Block,
    following: Block,
    x: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    total: Tensor,
    rotation: Rotation | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    x = _after(block, x, q, k, v, out, total)
    return x, *following.before(x, rotation)


def _leave(
    block: Block, norm: RMSNorm, x: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, total: Tensor
) -> Tensor:
    return norm(_after(block, x, q, k, v, out, total))


def _after(block: Block, x: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, total: Tensor) -> Tensor:
    """The rest of a block, from its inputs (B, M, D) and attention to the prefix."""
    return block.after(x, merge_heads(merge_with_self(q, k, v, out.transpose(1, 2), total)))
