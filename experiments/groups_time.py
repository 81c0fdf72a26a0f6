"""CPU time of sampling in fewer steps, with and without groups, of a training step, and of inferred orders.

    python experiments/groups_time.py

Weights are random: times do not depend on them. Least of three runs (five for training), as JSON.
"""

import json
import time
from collections.abc import Callable
from typing import Any

import torch

from anyorder.method.decoding import sample
from anyorder.method.loss import token_nll
from anyorder.method.policy_config import PolicyConfig
from anyorder.method.sampling import Streams
from anyorder.method.schedules import reveals
from anyorder.models.architecture import TransformerConfig
from anyorder.models.transformer import AnyOrderTransformer
from anyorder.orders import random_orders

IMAGES, BATCH, STEPS = 100, 32, (64, 32, 16, 8)
SIZE: dict[str, Any] = {
    "depth": 4, "width": 96, "heads": 4, "vocab_size": 512, "grid": (8, 8), "num_classes": 5,
}  # fmt: skip


def least(run: Callable[[], Any], times: int) -> float:
    """CPU milliseconds."""
    taken = []
    for _ in range(times):
        begin = time.process_time()
        run()
        taken.append(time.process_time() - begin)
    return 1000 * min(taken)


POLICIES = {
    "raster": {"order": "raster"},
    "location head": {"order": "location"},
    "location head, groups, 16 steps": {"order": "location", "steps": 16},
    "entropy, rate_every 32": {"order": "entropy", "rate_every": 32},
    "entropy, rate_every 16": {"order": "entropy", "rate_every": 16},
    "entropy, rate_every 8": {"order": "entropy", "rate_every": 8},
    "entropy, rescore 0.1": {"order": "entropy", "rescore": 0.1},
    "entropy": {"order": "entropy"},
}


def sampling(policy: PolicyConfig, grouped: bool, times: int = 3) -> float:
    """Milliseconds per image."""
    model = AnyOrderTransformer(TransformerConfig(**SIZE, grouped=grouped, location=True)).eval()
    labels = torch.arange(IMAGES) % SIZE["num_classes"]
    run = lambda: sample(model, policy, Streams(range(IMAGES)), condition=labels)  # noqa: E731
    return round(least(run, times) / IMAGES, 2)


def by_steps(grouped: bool) -> dict[int, float]:
    """Milliseconds per image in random order."""
    return {steps: sampling(PolicyConfig("random", steps=steps), grouped) for steps in STEPS}


def by_policy() -> dict[str, float]:
    """Milliseconds per image; the model itself decides where."""
    return {name: sampling(PolicyConfig(**p), "groups" in name, 2) for name, p in POLICIES.items()}  # type: ignore[arg-type]


def training() -> dict[int, float]:
    """Milliseconds of a loss and its gradient, by steps."""
    model = AnyOrderTransformer(TransformerConfig(**SIZE, grouped=True)).train()
    tokens, order, labels = (
        torch.randint(512, (BATCH, 64)),
        random_orders(BATCH, model.grid),
        torch.arange(BATCH) % 5,
    )

    def run(steps: int) -> None:
        token_nll(model, tokens, labels, order, sizes=reveals(64, steps)).mean().backward()

    return {steps: round(least(lambda steps=steps: run(steps), 5), 1) for steps in STEPS}


if __name__ == "__main__":
    torch.manual_seed(0)
    facts = {"model": SIZE, "images": IMAGES, "batch": BATCH, "threads": torch.get_num_threads()}
    sampling(PolicyConfig("raster"), False)  # warms up
    made = {"groups_ms_per_image": by_steps(True), "candidates_ms_per_image": by_steps(False)}
    print(json.dumps({**facts, **made, "training_ms": training(), "policies_ms_per_image": by_policy()}))
