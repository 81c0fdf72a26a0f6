"""CPU time of sampling with fewer steps and lazy orders, by the any-order model of the evidence.

    python experiments/steps_time.py OUT.json

The least of three runs of 100 images each, on one thread.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

import torch

from anyorder.files import versions, write_json
from anyorder.inference.weights import load_any_order
from anyorder.method.decoding import sample
from anyorder.method.policy_config import PolicyConfig
from anyorder.method.sampling import Streams

RUNS = Path("runs/evidence")
IMAGES, REPEATS = 100, 3
FEW = {"schedule": "cosine", "min_distance": 2.0}
WAYS: tuple[dict[str, Any], ...] = (
    *({"order": "random", **more} for more in ({}, *({"steps": k, **FEW} for k in (32, 16, 8)))),
    {"order": "entropy", "sign": -1},
    *({"order": "entropy", "sign": -1, "rescore": share} for share in (0.5, 0.2)),
    *({"order": "entropy", "sign": -1, "steps": k, **FEW} for k in (16, 8)),
    {"order": "entropy", "sign": -1, "steps": 16, **FEW, "rescore": 0.5},
)


def main(out: Path) -> None:
    """Random orders, and orders inferred by the model itself."""
    torch.set_num_threads(1)
    model, found = load_any_order(RUNS / "random-s0"), []
    for way in WAYS:
        policy, seconds = PolicyConfig(**way), []
        for _ in range(REPEATS):
            begin = time.process_time()
            sample(model, policy, Streams(range(IMAGES)), condition=torch.arange(IMAGES) % model.num_classes)
            seconds.append(time.process_time() - begin)
        evaluations = policy.evaluations(model.grid.n) + model.grid.n
        found.append(
            {
                "policy": policy.label,
                "evaluations": evaluations,
                "cpu_ms_per_image": 1000 * min(seconds) / IMAGES,
            }
        )
        print(" ".join(f"{key} {value}" for key, value in found[-1].items()), flush=True)
    command = "python experiments/steps_time.py OUT.json"
    write_json(out, {"command": command, "images": IMAGES, "versions": versions(), "sampling": found})


if __name__ == "__main__":
    main(Path(sys.argv[1]))
