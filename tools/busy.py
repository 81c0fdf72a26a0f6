"""How fast training and sampling are alone, and beside busy processes; run it on an otherwise idle machine.

    python tools/busy.py [docs/results/busy.json] [seconds=10] [repeats=3]

`now` is the package as it is; `before` waits as libgomp does by default, on all threads. Two processes that
multiply matrices on two threads each are busy beside it: `now` should keep a quarter of its idle speed there,
and lose at most 5 % against `before` when alone. Rates are medians of repeats, taken in turns.
"""

from __future__ import annotations

import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

CORES = len(os.sched_getaffinity(0))
VARIANTS = {
    "now": {},
    "before": {"GOMP_SPINCOUNT": "300000", "OMP_NUM_THREADS": str(CORES)},
}
WORKS = {"training": "examples/s", "sampling": "images/s"}
BUSY = "import torch; torch.set_num_threads(2); a = torch.randn(256, 256)\nwhile True: a @ a"


def training() -> Callable[[], int]:
    """Steps of a small transformer, as the trainer makes them."""
    import torch

    from anyorder.contracts import Grid
    from anyorder.method.loss import token_nll
    from anyorder.models.architecture import TransformerConfig
    from anyorder.models.transformer import AnyOrderTransformer
    from anyorder.orders import random_orders

    model = AnyOrderTransformer(TransformerConfig(depth=4, width=128, heads=4, vocab_size=128, grid=(8, 8)))
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    tokens, order = torch.randint(128, (32, 64)), random_orders(32, Grid(8, 8))

    def step() -> int:
        token_nll(model, tokens, None, order).mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        return len(tokens)

    return step


def sampling() -> Callable[[], int]:
    """Batches of the model that comes with the package."""
    from anyorder import Pipeline

    pipe = Pipeline.from_pretrained("fashion32")
    return lambda: len(pipe(num_images=32, generator=0).images)


def rate(name: str, seconds: float) -> float:
    """Items per second, from the second step on: what happens once is not counted, trials of threads are."""
    import anyorder  # noqa: F401, I001 - before torch, as the command does: it sets how long threads spin
    import torch

    from anyorder.inference.device import Threads

    step = {"training": training, "sampling": sampling}[name]()
    step()
    done, begin = 0, time.perf_counter()
    with Threads(torch.device("cpu")) as threads:
        while time.perf_counter() < begin + seconds:
            done += step()
            threads.step()
    return done / (time.perf_counter() - begin)


def measured(name: str, variant: str, busy: bool, seconds: float) -> float:
    """`rate` in a process of its own, beside two busy ones or alone."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("OMP_", "GOMP_"))}
    others = [subprocess.Popen([sys.executable, "-c", BUSY], env=environment) for _ in range(2 * busy)]
    try:
        if others:
            time.sleep(3)  # until they have loaded PyTorch
        command = [sys.executable, __file__, "--rate", name, str(seconds)]
        run = subprocess.run(
            command, env=environment | VARIANTS[variant], capture_output=True, text=True, check=True
        )
        return float(run.stdout)
    finally:
        for other in others:
            other.kill()
            other.wait()


def main(arguments: list[str]) -> None:
    """Measure in turns, print and write a JSON file."""
    settings = dict(a.split("=") for a in arguments if "=" in a)
    seconds, repeats = float(settings.get("seconds", 10)), int(settings.get("repeats", 3))
    rates: dict[tuple[str, str, bool], list[float]] = {}
    for _ in range(repeats):
        for key in [
            (name, variant, busy) for name in WORKS for variant in VARIANTS for busy in (False, True)
        ]:
            rates.setdefault(key, []).append(measured(*key, seconds))
    median = {key: statistics.median(values) for key, values in rates.items()}
    rows: list[dict[str, Any]] = [
        {
            "work": f"{name}, {unit}",
            **{
                f"{variant}, {'busy' if busy else 'alone'}": round(median[name, variant, busy], 1)
                for variant in VARIANTS
                for busy in (False, True)
            },
            "kept when busy": round(median[name, "now", True] / median[name, "now", False], 2),
            "kept before": round(median[name, "before", True] / median[name, "before", False], 2),
            "alone against before": round(median[name, "now", False] / median[name, "before", False], 2),
        }
        for name, unit in WORKS.items()
    ]
    result = {
        "command": " ".join(["python", "tools/busy.py", *arguments]),
        "cores": CORES,
        "processor": platform.processor() or platform.machine(),
        "load before": round(os.getloadavg()[0], 1),
        "rows": rows,
        "rates": {
            f"{n}, {v}, {'busy' if b else 'alone'}": [round(x, 1) for x in r]
            for (n, v, b), r in rates.items()
        },
    }
    text = json.dumps(result, indent=1)
    print(text)
    for out in (a for a in arguments if "=" not in a):
        Path(out).write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--rate"]:
        print(rate(sys.argv[2], float(sys.argv[3])))
    else:
        main(sys.argv[1:])
