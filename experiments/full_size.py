"""A published model of size L with random weights on this machine: load, sample, extract orders.

    python experiments/full_size.py randar OUT.json
    python experiments/full_size.py arpg OUT.json

Weights are random, in a file of the published kind, and go through `anyorder.runs.convert` as a download
would. Eight images of 16 x 16 tokens; peak memory is that of the process so far (its largest resident set).
"""

from __future__ import annotations

import resource
import sys
import tempfile
import time
from collections.abc import Callable
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch

from anyorder.adapters.arpg import ARPG
from anyorder.adapters.layers import GPTConfig
from anyorder.adapters.randar import RandAR
from anyorder.files import versions, write_json
from anyorder.inference.convert import build
from anyorder.method.decoding import extract_orders, sample
from anyorder.method.policy_config import PolicyConfig
from anyorder.method.sampling import Streams

KINDS = {"randar": (RandAR, "model"), "arpg": (ARPG, "state_dict")}
IMAGES = 8
RESCORE = 0.05
"""Positions decided by one scoring: at 1 these models would score 32,896 candidates an image."""


def write_weights(kind: str, file: Path) -> None:
    """A file of random weights, as published."""
    torch.manual_seed(0)
    model, wrapper = KINDS[kind]
    torch.save({wrapper: model(GPTConfig()).state_dict()}, file)


def measure(rows: list[dict[str, Any]], what: str, work: Callable[[], Any]) -> Any:
    """Run and note time, and the largest resident set so far."""
    begin = time.perf_counter()
    result = work()
    seconds = time.perf_counter() - begin
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    rows.append({"what": what, "seconds": round(seconds, 1), "peak_memory_mib": round(peak)})
    print(rows[-1], flush=True)
    return result


def main(kind: str, out: Path) -> None:
    """Measure everything, one after another, and write `out`."""
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / f"{kind}-l.pt"
        writer = get_context("spawn").Process(target=write_weights, args=(kind, file))
        writer.start()
        writer.join()
        model = measure(rows, "load", lambda: build(file).eval())
    streams, labels = Streams(range(IMAGES)), torch.arange(IMAGES)
    inferred = PolicyConfig(order="entropy", rescore=RESCORE)
    made = measure(
        rows,
        f"sample {IMAGES} images, random order",
        lambda: sample(model, "random", streams, condition=labels),
    )
    measure(
        rows,
        f"sample {IMAGES} images, entropy order, rescore {RESCORE}",
        lambda: sample(model, inferred, streams, condition=labels),
    )
    measure(
        rows,
        f"extract orders of {IMAGES} images, entropy, rescore {RESCORE}",
        lambda: extract_orders(
            model, made.tokens, inferred.build(model.grid, streams), streams, condition=labels
        ),
    )
    parameters = sum(p.numel() for p in model.parameters())
    result = {
        "kind": kind,
        "parameters": parameters,
        "device": f"CPU, {torch.get_num_threads()} threads, float32",
        "versions": versions(),
        "rows": rows,
    }
    write_json(out, result)


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
