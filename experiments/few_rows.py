"""How quick are the ways to multiply few rows by a large matrix, as decoding does?

    OMP_NUM_THREADS=2 python experiments/few_rows.py docs/results/few-rows.json

GFLOP/s for the matrices of RandAR-L and of a 24 million parameter model, at several numbers of rows:
PyTorch's plain product; a copy of the weight in oneDNN's own layout; the weight as it lies times the
transposed inputs; and the same where the inputs are transposed already. So many matrices take turns that none
stays in the processor's cache. Medians of seven rounds in which the ways take turns.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

from anyorder.files import versions, write_json

SHAPES = ((1024, 3072), (1024, 1024), (1024, 2816), (2816, 1024), (512, 1536), (512, 2752))
"""Inputs and outputs."""
ROWS = (1, 2, 4, 8, 12, 16, 24, 32, 48, 64, 128)
ROUNDS, MEBIBYTES = 7, 192


def ways(x: Tensor, weights: list[Tensor], copies: list[Tensor]) -> dict[str, Callable[[], Any]]:
    """Name -> products of x (rows, inputs) with all weights (outputs, inputs)."""

    def multiply(a: Tensor, b: Tensor) -> Tensor:
        return torch.ops.mkldnn._linear_pointwise(a, b, None, "none", [], "")

    transposed = x.t().contiguous().t()
    return {
        "plain": lambda: [linear(x, weight) for weight in weights],
        "copy": lambda: [multiply(x, copy) for copy in copies],
        "swapped": lambda: [multiply(weight, x) for weight in weights],
        "swapped, transposed inputs": lambda: [multiply(weight, transposed) for weight in weights],
    }


def seconds(works: dict[str, Callable[[], Any]]) -> dict[str, float]:
    """Median of each, after a warm-up."""
    found: dict[str, list[float]] = {name: [] for name in works}
    for turn in range(ROUNDS + 1):
        for name, work in works.items():
            begin = time.perf_counter()
            work()
            found[name] += [time.perf_counter() - begin] if turn else []
    return {name: statistics.median(times) for name, times in found.items()}


@torch.no_grad()
def main(out: Path) -> None:
    """Every shape with every number of rows."""
    torch.manual_seed(0)
    rates = []
    for inputs, outputs in SHAPES:
        count = MEBIBYTES * 2**20 // (4 * inputs * outputs)
        weights = [torch.randn(outputs, inputs) for _ in range(count)]
        copies = [torch.ops.mkldnn._reorder_linear_weight(weight, None) for weight in weights]
        for rows in ROWS:
            took = seconds(ways(torch.randn(rows, inputs), weights, copies))
            flops = 2 * rows * inputs * outputs * count
            found = {name: round(flops / value / 1e9, 1) for name, value in took.items()}
            rates.append({"inputs": inputs, "outputs": outputs, "rows": rows, **found})
            print(rates[-1], flush=True)
    write_json(out, {"threads": torch.get_num_threads(), "versions": versions(), "gflops": rates})


if __name__ == "__main__":
    main(Path(sys.argv[1]))
