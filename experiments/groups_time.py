"""CPU time of sampling in fewer steps, with and without groups, and of a training step.

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


def sampling(grouped: bool) -> dict[int, float]:
    """Milliseconds per image in random order, by steps."""
    model, labels = (
        AnyOrderTransformer(TransformerConfig(**SIZE, grouped=grouped)).eval(),
        torch.arange(IMAGES) % 5,
    )
    runs = {
        steps: lambda steps=steps: sample(
            model, PolicyConfig("random", steps=steps), Streams(range(IMAGES)), condition=labels
        )
        for steps in STEPS
    }
    return {steps: round(least(run, 3) / IMAGES, 2) for steps, run in runs.items()}


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
    sampling(False)  # warms up
    made = {"groups_ms_per_image": sampling(True), "candidates_ms_per_image": sampling(False)}
    print(json.dumps({**facts, **made, "training_ms": training()}))
