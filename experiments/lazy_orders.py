"""How near are lazy orders to the exact one, and what do they cost?

    python experiments/lazy_orders.py

Extracts the orders of test images with the any-order model of experiments/evidence_fashion32.yaml: exactly,
with several shares of rescored positions, and with several positions per scoring. As a yardstick the exact
order is extracted with a little Gumbel noise on the ratings, too: so much changes what is within the noise of
a score. Writes Kendall's tau to the exact order (mean over images, and of the orders by mean rank), candidate
evaluations and CPU seconds relative to the exact order, and the mean log-probability along the order.
"""

from __future__ import annotations

import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from anyorder.contracts import AnyOrderModel
from anyorder.data.caches import TokenSet
from anyorder.data.rows import evenly_spaced, slices
from anyorder.files import fingerprint, versions, write_json
from anyorder.inference.weights import load_any_order
from anyorder.method.decoding import extract_orders
from anyorder.method.policy_config import PolicyConfig
from anyorder.method.sampling import Streams
from anyorder.orders import inverse, kendall
from anyorder.stages.common import as_condition

RUNS = Path("runs/evidence")
MODEL = RUNS / "random-s0"
OUT = Path("docs/results/lazy-orders.json")
IMAGES, BATCH = 128, 64
WAYS: tuple[dict[str, Any], ...] = (
    {},
    {"temperature": 0.001},
    {"temperature": 0.01},
    {"rescore": 0.1},
    {"rescore": 0.2},
    {"rescore": 0.35},
    {"rescore": 0.5},
    {"rescore": 0.7},
)


def extract(model: AnyOrderModel, tokens: Tensor, condition: Tensor | None, policy: PolicyConfig) -> Any:
    """Orders (n, N), log-probabilities (n, N) and CPU seconds."""
    begin, parts = time.process_time(), []
    for some in slices(len(tokens), BATCH, 0):
        rows = torch.as_tensor(list(some))
        streams = Streams(rows.tolist())
        own = None if condition is None else condition[rows]
        found = extract_orders(model, tokens[rows], policy.build(model.grid, streams), streams, condition=own)
        parts.append((found.order, found.log_prob))
    order, log_prob = (torch.cat(part) for part in zip(*parts, strict=True))
    return order, log_prob, time.process_time() - begin


def by_mean_rank(order: Tensor) -> Tensor:
    """One order for all images, (N,): what class orders are made of."""
    return inverse(order).double().mean(0).argsort(stable=True)


def main() -> None:
    """Both directions of the entropy score, every way."""
    model, test = load_any_order(MODEL), TokenSet(RUNS / "tokens", "test")
    tokens, labels = test.batch(evenly_spaced(IMAGES, len(test)))
    condition, n = as_condition(model, test, labels), test.grid.n
    found: list[dict[str, Any]] = []
    for sign in (1, -1):
        exact: Any = None
        for way in WAYS:
            policy = PolicyConfig("entropy", sign=sign, **way)  # type: ignore[arg-type]
            order, log_prob, seconds = extract(model, tokens, condition, policy)
            exact = exact or (order, policy.evaluations(n), seconds)
            found.append(
                {
                    "policy": policy.label,
                    "kendall": float(kendall(order, exact[0]).mean()),
                    "kendall_of_mean_ranks": float(kendall(by_mean_rank(order), by_mean_rank(exact[0]))),
                    "evaluations": policy.evaluations(n) / exact[1],
                    "cpu_seconds": seconds / exact[2],
                    "cpu_seconds_per_image": seconds / IMAGES,
                    "nats_per_token": -float(log_prob.mean()),
                }
            )
            print(" ".join(f"{key} {value}" for key, value in found[-1].items()), flush=True)
    write_json(
        OUT,
        {
            "command": "python experiments/lazy_orders.py",
            "model": {"folder": str(MODEL), "fingerprint": fingerprint(MODEL), **asdict(model.config)},
            "images": IMAGES,
            "batch_size": BATCH,
            "threads": torch.get_num_threads(),
            "versions": versions(),
            "orders": found,
        },
    )


if __name__ == "__main__":
    main()
