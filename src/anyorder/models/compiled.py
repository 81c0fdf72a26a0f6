"""Decoding through compiled code with static shapes, for models whose parts between attentions are plain.

The number of revealed positions changes with every step, so attention, one fused kernel already, stays
outside. All between two attentions works on rows, and is compiled once for each number of rows. The first
calls of each are compared with eager code, which goes on alone where they differ.
"""

import importlib.util
import logging
import os
import shutil
import sys
from collections import Counter
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from anyorder.contracts import require
from anyorder.models.attention import Candidates, merge_heads, merge_with_self, run_blocks
from anyorder.models.blocks import Block
from anyorder.models.positions import Rotation
from anyorder.models.transformer import AnyOrderTransformer

log = logging.getLogger("anyorder")
IMAGES, CHECKS = 1024, 3
"""Images from which a GPU decodes with compiled code where nobody says whether; and calls of each shape that
are compared with eager code: of a CUDA graph these are the warm-up, the recording and a replay."""


def bucket(m: int) -> int:
    """The number of candidates that `m` >= 1 candidates are padded to: a quarter more at most, or 7."""
    step = max(8, 2 ** (m - 1).bit_length() // 8)
    return -(-m // step) * step if m > 1 else 1


def compile_decoding(
    model: Any,
    asked: bool | None = True,
    images: int = 0,
    *,
    backend: str | Callable[..., Any] = "inductor",
    checks: int = CHECKS,
) -> None:
    """Decode with compiled code from now on, where no gradients are asked for and the model evaluates.

    For each `bucket` of candidates and number of images, code that all blocks share is made when first
    needed, which takes seconds; on a GPU it becomes CUDA graphs. Results are those of eager code up to
    rounding; where they are not, or there is no code, a warning says so and eager code goes on.

    Args:
        model: an `AnyOrderTransformer` on the device it is to run on; a ValueError refuses others.
        asked: None compiles on a CUDA GPU with Triton, if there are at least `IMAGES` images, a model that
            can be compiled.
        images: how many are going to be decoded.
        backend: of `torch.compile`.
        checks: calls of each shape that are compared with eager code.
    """
    own = isinstance(model, AnyOrderTransformer)
    device = model.head.weight.device if own else torch.device("cpu")
    if asked is None:
        asked = device.type == "cuda" and images >= IMAGES and bool(importlib.util.find_spec("triton"))
    if not asked:
        return
    refused = f"compile=true is for models trained here, not for a {type(model).__name__}: leave compile out"
    require(own, refused)
    options = {}
    if backend == "inductor":
        require_compiler(device)
        options = {"mode": "reduce-overhead"} if device.type == "cuda" else {}
    model.compiled = CompiledBlocks(checks, backend=backend, **options)


def require_compiler(device: torch.device) -> None:
    """Refuse, with a ValueError, to compile without C++ compiler (on the CPU) or Triton (on a GPU)."""
    compiler = os.environ.get("CXX", "clang++" if sys.platform == "darwin" else "g++")
    missing = f"compile=true needs a C++ compiler on the CPU, there is no {compiler}"
    instead = "install it, name another one in CXX, or leave compile out"
    require(device.type != "cpu" or bool(shutil.which(compiler)), f"{missing}: {instead}")
    triton = device.type != "cuda" or bool(importlib.util.find_spec("triton"))
    require(triton, "compile=true needs Triton on a GPU: install it, or leave compile out")


class CompiledBlocks:
    """Runs blocks one after another, with compiled code for everything but attention."""

    def __init__(self, checks: int = CHECKS, **options: Any):
        # 8 shapes by default, further ones run eagerly; under these names PyTorch 2.6 knows the limits, too.
        for limit in ("cache_size_limit", "accumulated_cache_size_limit"):
            setattr(torch._dynamo.config, limit, max(1024, getattr(torch._dynamo.config, limit)))
        self._enter = torch.compile(Block.before, dynamic=False, **options)
        self._between = torch.compile(_between, dynamic=False, **options)
        self._leave = torch.compile(_leave, dynamic=False, **options)
        self.checks, self.refuted, self._checked = checks, False, Counter[Any]()

    @staticmethod
    def pad(positions: Tensor) -> Tensor:
        """Candidates (B, M), the last of them repeated until they fill a bucket."""
        surplus = bucket(positions.shape[1]) - positions.shape[1]
        return torch.cat((positions, positions[:, -1:].expand(-1, surplus)), dim=1)

    def __call__(
        self, blocks: Any, norm: nn.Module, x: Tensor, rotation: Rotation | None, attends: list[Candidates]
    ) -> Tensor:
        """Inputs (B, M, D), M a bucket, to normalised outputs (B, M, D); one of `attends` per block."""
        shape, inputs = (*x.shape, x.dtype), (blocks, norm, x, rotation, attends)
        if not self.refuted and self._checked[shape] >= self.checks:
            return self._run(*inputs)
        made = None if self.refuted else self._attempt(*inputs)
        # After it, so that the cache keeps the keys and values of eager code.
        eager = norm(run_blocks(blocks, x, rotation, attends))
        if made is not None:
            error = float((made - eager).abs().max() / eager.abs().max())
            if not error <= torch.finfo(eager.dtype).eps ** 0.5:
                self._refute(f"it differs from eager code by {error:.1g} of the largest value")
            self._checked[shape] += 1
        return eager

    def _attempt(self, *inputs: Any) -> Tensor | None:
        try:
            return self._run(*inputs)
        except torch.OutOfMemoryError:
            raise
        except Exception as e:  # of a compiler, of any kind
            self._refute(f"it fails ({next(iter(str(e).splitlines()), type(e).__name__)})")
            return None

    def _refute(self, fault: str) -> None:
        self.refuted = True
        log.warning("compiled decoding is off, eager code goes on: %s", fault)

    def _run(
        self, blocks: Any, norm: nn.Module, x: Tensor, rotation: Rotation | None, attends: list[Candidates]
    ) -> Tensor:
        if x.device.type == "cuda":  # the graphs may write over what they returned in the last step
            torch.compiler.cudagraph_mark_step_begin()
        x = _plain(x)
        heads = self._enter(blocks[0], x, rotation)
        for pair, attend in zip(pairwise(blocks), attends, strict=False):
            x, *heads = self._between(*pair, rotation, x, *_attend(attend, *heads))
        return self._leave(blocks[-1], norm, x, *_attend(attends[-1], *heads))


def _attend(attend: Candidates, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, ...]:
    """Queries, keys, values, and attention to the prefix: (B, M, H, D / H), and (B, H, M, 1)."""
    out, total = attend.prefix_alone(q, k, v)
    return q, k, v, _plain(out.transpose(1, 2)), _plain(total)


def _plain(x: Tensor) -> Tensor:
    """`x` in the one layout that code is made for; `contiguous` leaves any strides where there is one row."""
    return x.contiguous().view(-1).view(x.shape)


def _between(block: Block, following: Block, rotation: Any, x: Tensor, *attended: Tensor) -> Any:
    x = _after(block, x, *attended)
    return x, *following.before(x, rotation)


def _leave(block: Block, norm: nn.Module, x: Tensor, *attended: Tensor) -> Tensor:
    return norm(_after(block, x, *attended))


def _after(block: Block, x: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, total: Tensor) -> Tensor:
    return block.after(x, merge_heads(merge_with_self(q, k, v, out.transpose(1, 2), total)))
