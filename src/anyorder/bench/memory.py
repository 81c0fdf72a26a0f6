"""Peak memory of sampling in an inferred order, next to what it should be made of."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from anyorder.bench.costs import FLOAT32
from anyorder.bench.workloads import Subject
from anyorder.contracts import Grid
from anyorder.method.decoding import generate, sample
from anyorder.method.policies import InferredOrder
from anyorder.models.attention import State
from anyorder.models.transformer import AnyOrderTransformer

MIB = 2**20


def peak_memory(subject: Subject, sides: tuple[int, ...]) -> list[dict[str, Any]]:
    """Measured and counted memory, a row per grid of side x side patches; weights are not part of it.

    Not every step is run. Between the first and the last chunk of open positions memory is linear in the
    step: the candidates become fewer, what their attention needs grows. So the peak over the first
    two steps, and over the step at which one chunk is left, is the peak of all. What comes before that last
    one is given, a chunk at a time.

    Returns:
        positions: N.
        peak (MiB): of live tensors on a CPU, as the profiler sees them allocated and freed; the allocator's
            own peak on a GPU, with what autocast caches.
        cache (MiB): keys and values of all positions, O(B N).
        candidates (MiB): hidden states that `score` keeps of all open positions at the first step, O(B N);
            their keys and values wait in free slots of the cache.
        chunk (MiB): float32 logits of one chunk, O(B C V); a few of these are alive at once.
    """
    rows = []
    # What a first run leaves behind belongs to the weights (`models.linear`).
    subject.without_gradients(lambda: sample(subject.model, "raster", subject.streams, grid=Grid(1, 2)))()
    for side in sides:
        grid, config = Grid(side, side), subject.config
        costs = subject.costs(config.images)
        hidden = costs.size * config.images * grid.n * config.model.width
        logits = FLOAT32 * config.images * min(config.chunk, grid.n) * config.vocab_size
        last = max(0, grid.n - config.chunk)
        peak = max(_peak(subject, grid, known, steps) for known, steps in ((0, 2), (last, 1)))
        sizes = {"peak": peak, "cache": costs.cache(grid.n), "candidates": hidden, "chunk": logits}
        rows.append({"positions": grid.n, **{f"{name} (MiB)": size / MIB for name, size in sizes.items()}})
    return rows


class _Piecewise:
    """A model that reads given positions a chunk at a time: they need no more memory than drawn ones."""

    def __init__(self, model: AnyOrderTransformer, chunk: int):
        self.model, self.chunk = model, chunk
        self.grid, self.vocab_size = model.grid, model.vocab_size
        self.forward, self.start, self.score = model.forward, model.start, model.score

    def append(self, state: State, positions: Tensor, tokens: Tensor) -> State:
        for some in zip(positions.split(self.chunk, 1), tokens.split(self.chunk, 1), strict=True):
            state = self.model.append(state, *some)
        return state


def _peak(subject: Subject, grid: Grid, known: int, steps: int) -> int:
    """Bytes that some steps take once `known` positions are given."""
    config = subject.config
    given = torch.arange(known, device=subject.device).expand(config.images, -1)
    tokens = subject.random_tokens(config.images, grid)[:, :known]

    def draw() -> None:
        run = generate(
            _Piecewise(subject.model, config.chunk),
            InferredOrder(),
            subject.streams,
            grid=grid,
            known=(given, tokens),
            chunk=config.chunk,
        )
        list(islice(run, steps))

    measure = _peak_of_gpu if subject.device.type == "cuda" else _peak_of_cpu
    return measure(subject.without_gradients(draw))


def _peak_of_gpu(work: Callable[[], Any]) -> int:
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    work()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def _peak_of_cpu(work: Callable[[], Any]) -> int:
    """Most bytes that `work` allocates and has alive at once, for tensors and within kernels."""
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler would announce its start and stop
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as profiler:
        work()
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(trace))
        events = json.loads(trace.read_text(encoding="utf-8"))["traceEvents"]
    changes = sorted((e["ts"], e["args"]) for e in events if e.get("name") == "[memory]")
    totals = [change["Total Allocated"] for _, change in changes]
    return max(totals) - (totals[0] - changes[0][1]["Bytes"])
