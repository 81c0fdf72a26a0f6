"""Throughput as a share of the machine's own matmul rate, measured in the same run."""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from anyorder.artifacts import versions, write_json
from anyorder.contracts import Grid
from anyorder.decode import extract_orders, sample
from anyorder.evaluation.report import Table
from anyorder.likelihood import token_nll
from anyorder.logits import Streams
from anyorder.models.transformer import AnyOrderTransformer, Architecture, TransformerConfig
from anyorder.orders import random_orders
from anyorder.runs.common import device
from anyorder.runs.precision import fast_dtype


@dataclass
class BenchConfig:
    """Sizes to measure at: training, and sampling in each kind of order, against the matmul rate.

    In bfloat16 where the hardware has it, float32 elsewhere.
    """

    model: Architecture = field(default_factory=lambda: Architecture(depth=8, width=512, heads=8))
    grid: tuple[int, int] = (16, 16)
    """Rows and columns of patches."""
    vocab_size: int = 1024
    """Codebook size."""
    batch_size: int = 16
    """Images in a training step."""
    images: int = 4
    """Images sampled at once."""
    repeats: int = 5
    """Timed runs of each kind; the median counts."""
    only: tuple[str, ...] = ()
    """Workloads to measure, by name; all by default. The matmul is measured in any case."""

    def __post_init__(self) -> None:
        if min(self.batch_size, self.images, self.repeats) < 1:
            raise ValueError("batch_size, images and repeats must be >= 1")


def bench(config: BenchConfig, out: Path) -> dict[str, Any]:
    """Measure, print a table, and write `out` (JSON).

    Rates are FLOPs counted from the configuration over the median time; the share is against a matmul of the
    model's own feed-forward shape and of the same dtype, timed between the other measurements.
    """
    torch.manual_seed(0)
    grid = Grid(*config.grid)
    settings = vars(config.model) | {"location": True}
    model = AnyOrderTransformer(TransformerConfig(**settings, vocab_size=config.vocab_size, grid=config.grid))
    model.to(device())
    runs = _workloads(model, grid, config)
    if unknown := set(config.only) - set(runs):
        raise ValueError(f"unknown workload {', '.join(sorted(unknown))}: choose from {'; '.join(runs)}")
    runs = {name: run for name, run in runs.items() if name in ("matmul", *(config.only or runs))}
    times: dict[str, list[float]] = {name: [] for name in runs}
    for work, _, _ in runs.values():
        work()  # warm-up
    for _ in tqdm(range(config.repeats), desc="bench", unit="round"):
        for name, (work, _, _) in runs.items():
            times[name].append(_seconds(work))
    ceiling = runs["matmul"][1] / statistics.median(times["matmul"])
    rows = [_row(name, *runs[name][1:], times[name], ceiling) for name in runs]
    result = {
        "config": dataclasses.asdict(config),
        "device": _device_name(),
        "dtype": str(fast_dtype(device(), True)),
        "versions": versions(),
        "rows": rows,
    }
    write_json(out, result)
    print(Table(list(rows[0]), rows).text())
    print(f"written to {out}")
    return result


Workload = tuple[Callable[[], Any], float, int]
"""What to run, its FLOPs, and how many images it works through (0: not images)."""


def _workloads(model: AnyOrderTransformer, grid: Grid, config: BenchConfig) -> dict[str, Workload]:
    tokens = torch.randint(config.vocab_size, (config.batch_size, grid.n), device=device())
    order = random_orders(config.batch_size, grid).to(device())
    dtype = fast_dtype(device(), True)
    wide = model.blocks[0].mlp.gate_up.weight.detach().to(dtype).T  # type: ignore[union-attr, operator]
    rows = torch.randn(config.batch_size * grid.n, wide.shape[0], device=device(), dtype=dtype)
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    some, streams = tokens[: config.images], Streams(range(min(config.images, len(tokens))), device())
    n = grid.n

    def train() -> None:
        with torch.autocast(device().type, dtype, enabled=dtype == torch.bfloat16):
            loss = token_nll(model, tokens, None, order).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    def fast(work: Callable[[], Any]) -> Callable[[], Any]:
        def run() -> None:
            with torch.no_grad(), torch.autocast(device().type, dtype, enabled=dtype == torch.bfloat16):
                work()

        return run

    forward = sum(flops(model, i + 1) for i in range(n))
    inferred = sum((n - i) * flops(model, i + 1) for i in range(n))
    b, m = len(tokens), len(some)
    return {
        "matmul": (lambda: rows @ wide, 2.0 * rows.shape[0] * wide.numel(), 0),
        "training step": (train, 3 * b * forward, b),
        "teacher-forced scoring": (fast(lambda: token_nll(model, tokens, None, order)), b * forward, b),
        "sampling, fixed order": (fast(lambda: sample(model, "random", streams)), m * forward, m),
        "sampling, location head": (fast(lambda: sample(model, "location", streams)), m * forward, m),
        "sampling, inferred order": (fast(lambda: sample(model, "entropy", streams)), m * inferred, m),
        "order extraction": (
            fast(lambda: extract_orders(model, some, "entropy", streams)),
            m * inferred,
            m,
        ),
    }


def flops(model: AnyOrderTransformer, context: int) -> float:
    """Twice the multiply-adds of one position that attends to `context` positions."""
    linear = sum(p.numel() for block in model.blocks for p in block.parameters() if p.ndim == 2)
    attention = 2 * model.config.depth * model.config.width * context
    return 2.0 * (linear + model.head.weight.numel() + attention)


def _seconds(work: Callable[[], Any]) -> float:
    _synchronise()
    begin = time.perf_counter()
    work()
    _synchronise()
    return time.perf_counter() - begin


def _synchronise() -> None:
    if device().type == "cuda":
        torch.cuda.synchronize()


def _row(name: str, count: float, images: int, seconds: list[float], ceiling: float) -> dict[str, Any]:
    median = statistics.median(seconds)
    return {
        "workload": name,
        "seconds": median,
        "spread (%)": 100 * (max(seconds) - min(seconds)) / median,
        "images/s": images / median if images else None,
        "GFLOP/s": count / median / 1e9,
        "share of matmul (%)": 100 * count / median / ceiling,
    }


def _device_name() -> str:
    if device().type == "cuda":
        return torch.cuda.get_device_name()
    return f"CPU, {torch.get_num_threads()} threads"
