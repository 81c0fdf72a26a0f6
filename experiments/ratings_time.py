"""What one rating for several positions costs, and how near its orders are to the exact ones.

    python experiments/ratings_time.py MODEL TOKENS

Least CPU time of three runs per image on one thread, of the model of experiments/groups_time.py; orders of 96
validation images of a trained model that scores. Prints JSON.
"""

import json
import sys
from pathlib import Path

import torch
from groups_time import SIZE, sampling

from anyorder.data.caches import TokenSet
from anyorder.data.rows import evenly_spaced
from anyorder.inference.weights import load_any_order
from anyorder.method.decoding import extract_orders
from anyorder.method.policy_config import PolicyConfig
from anyorder.orders import kendall

POLICIES = [PolicyConfig("entropy", rate_every=8, rescore=share) for share in (1.0, 0.75, 0.5, 0.25)]


def times() -> dict[str, float]:
    """CPU milliseconds per image."""
    return {policy.label: sampling(policy, False) for policy in (PolicyConfig("raster"), *POLICIES)}


def agreement(model: Path, tokens: Path) -> list[dict[str, object]]:
    """Kendall's tau with the exact orders and with those of whole ratings, nats per token."""
    images = TokenSet(tokens, "validation")
    batch, labels = images.batch(evenly_spaced(96, len(images)))
    scorer, policies = load_any_order(model), [PolicyConfig("entropy"), *POLICIES]
    made = [extract_orders(scorer, batch, policy, condition=labels) for policy in policies]
    exact, whole = made[0].order, made[1].order
    return [
        {
            "policy": policy.label,
            "evaluations": policy.evaluations(images.grid.n),
            "tau": round(float(kendall(found.order, exact).mean()), 3),
            "tau_with_whole_ratings": round(float(kendall(found.order, whole).mean()), 3),
            "nats_per_token": round(-float(found.log_prob.mean()), 4),
        }
        for policy, found in zip(policies, made, strict=True)
    ]


if __name__ == "__main__":
    torch.manual_seed(0)
    sampling(PolicyConfig("raster"), False, 1)  # warms up
    orders = agreement(*map(Path, sys.argv[1:]))
    print(json.dumps({"model": SIZE, "policies_ms_per_image": times(), "orders": orders}))
