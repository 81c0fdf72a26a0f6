"""Peak memory of sampling in an inferred order, beside the sizes of its parts."""

import gc
import json
import os
import tempfile
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from anyorder.bench.workloads import Subject
from anyorder.contracts import Grid
from anyorder.method.decoding import generate, sample
from anyorder.method.policies import InferredOrder
from anyorder.models.layers import unpack
from anyorder.models.transformer import AnyOrderTransformer, State

MIB = 2**20


def peak_memory(subject: Subject, sides: tuple[int, ...]) -> list[dict[str, Any]]:
    """Measured and counted memory, a row per grid of side x side patches; weights are not
    part of it, their copies that decoding packs are.

    Returns:
        positions: N.
        peak (MiB): of live tensors, as the profiler (CPU) or the allocator (GPU) sees them.
        cache (MiB): keys and values of all positions, O(B N).
        candidates (MiB): hidden states of all open positions at the first step, O(B N).
        chunk (MiB): float32 logits of one chunk, O(B C V); a few of these are alive at once.
    """
    rows, subject = [], subject.sampler(subject.dtype)
    # A first run may allocate what stays: that is no memory of sampling.
    sample(subject.model, "raster", subject.streams, grid=Grid(1, 2))
    for side in sides:
        grid, config = Grid(side, side), subject.config
        hidden = subject.dtype.itemsize * config.images * grid.n * config.model.width
        logits = torch.float32.itemsize * config.images * min(config.chunk, grid.n) * config.vocab_size
        # Memory is linear in the step until one chunk of open positions is left: one of its ends is the peak.
        last = max(0, grid.n - config.chunk)
        peak = max(_peak(subject, grid, known, steps) for known, steps in ((0, 2), (last, 1)))
        sizes = {"peak": peak, "cache": _cache(subject, grid), "candidates": hidden, "chunk": logits}
        rows.append({"positions": grid.n, **{f"{name} (MiB)": size / MIB for name, size in sizes.items()}})
    return rows


@torch.no_grad()
def _cache(subject: Subject, grid: Grid) -> int:
    """Bytes of the keys and values that decoding allocates."""
    cache = subject.model.start(subject.config.images, None, grid).cache
    return cache.keys.nbytes + cache.values.nbytes


class _Piecewise:
    """A model that reads known positions a chunk at a time: they need no more memory than sampled ones."""

    def __init__(self, model: AnyOrderTransformer, chunk: int):
        self.model, self.chunk = model, chunk
        self.grid, self.vocab_size = model.grid, model.vocab_size
        self.forward, self.start, self.score = model.forward, model.start, model.score

    def append(self, state: State, positions: torch.Tensor, tokens: torch.Tensor) -> State:
        for some in zip(positions.split(self.chunk, 1), tokens.split(self.chunk, 1), strict=True):
            state = self.model.append(state, *some)
        return state


def _peak(subject: Subject, grid: Grid, known: int, steps: int) -> int:
    """Bytes that some steps take once `known` positions are given."""
    images, chunk = subject.config.images, subject.config.chunk
    positions = torch.arange(known, device=subject.device).expand(images, -1)
    given = positions, subject.random_tokens(images, grid)[:, :known]
    model = _Piecewise(subject.model, chunk)

    def some_steps() -> None:
        run = generate(model, InferredOrder(), subject.streams, grid=grid, known=given, chunk=chunk)
        list(islice(run, steps))

    # Copies of weights from an earlier run would be freed in between; those of this run are counted.
    unpack(subject.model)
    measure = _peak_of_gpu if subject.device.type == "cuda" else _peak_of_cpu
    return measure(some_steps)


def _peak_of_gpu(work: Callable[[], Any]) -> int:
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    work()
    return torch.cuda.max_memory_allocated() - before


def _peak_of_cpu(work: Callable[[], Any]) -> int:
    """Most bytes that `work` allocates and has alive at once, for tensors and within kernels."""
    gc.collect()  # what others left must not be freed, and counted, in between
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler would announce its start and stop
    cpu = torch.profiler.ProfilerActivity.CPU
    with torch.profiler.profile(activities=[cpu], profile_memory=True) as profiler:
        work()
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(trace))
        events = json.loads(trace.read_text(encoding="utf-8"))["traceEvents"]
    changes = sorted((e["ts"], e["args"]) for e in events if e.get("name") == "[memory]")
    totals = [change["Total Allocated"] for _, change in changes]
    return max(totals) - (totals[0] - changes[0][1]["Bytes"])
