"""What does its own order cost a bundled model, beside a fixed order and a random one?

    OMP_NUM_THREADS=1 python experiments/own_order_cost.py docs/results/order_cost.json

Seconds of processor time for images, decoded and all, in float32; the least of the repeats, which take turns.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import torch

from anyorder import Pipeline
from anyorder.files import versions, write_json
from anyorder.inference.folders import BUNDLED


def seconds(pipe: Pipeline, images: int, repeats: int) -> dict[str, float]:
    """The least seconds of processor time by order."""
    found: dict[str, list[float]] = {"own": [], "raster": [], "random": []}
    for _ in range(repeats):
        for name, times in found.items():
            begin = time.process_time()
            pipe([0], images, None if name == "own" else name, generator=0, batch_size=images)
            times.append(time.process_time() - begin)
    return {name: round(min(times), 3) for name, times in found.items()}


def main() -> None:
    """Time all that are bundled."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--images", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=5)
    given = parser.parse_args()
    rows = {}
    for name in sorted(path.name for path in BUNDLED.iterdir() if path.is_dir()):
        pipe = Pipeline.from_pretrained(name)
        found = seconds(pipe, given.images, given.repeats)
        rows[name] = {
            "policy": pipe.policy.label,
            **found,
            "own / raster": round(found["own"] / found["raster"], 2),
        }
        print(name, rows[name], flush=True)
    facts = {"images": given.images, "repeats": given.repeats, "threads": torch.get_num_threads()}
    write_json(given.out, {**facts, "versions": versions(), "rows": rows})


if __name__ == "__main__":
    main()
