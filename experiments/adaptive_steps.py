"""Exact likelihood against steps: as many positions at each step, or as many as their entropies allow.

    python experiments/adaptive_steps.py MODEL TOKENS

64 validation images, one thread; `steps` is the mean over images. Prints JSON lines.
"""

import json
import sys
import time
from pathlib import Path

from anyorder.data.caches import TokenSet
from anyorder.data.rows import evenly_spaced
from anyorder.inference.weights import load_any_order
from anyorder.method.decoding import extract_orders
from anyorder.method.policy_config import PolicyConfig
from anyorder.method.sampling import Streams

IMAGES = 64
SETTINGS = [{}, *({"per_step": k} for k in (2, 4, 8))]
SETTINGS += [{"per_step": 16, "entropy_limit": limit} for limit in (4.0, 12.0, 27.0)]

if __name__ == "__main__":
    model, images = load_any_order(Path(sys.argv[1])), TokenSet(Path(sys.argv[2]), "validation")
    batch, labels = images.batch(evenly_spaced(IMAGES, len(images)))
    for order in ("random", "entropy"):
        for settings in SETTINGS:
            policy, streams, begin = (
                PolicyConfig(order, **settings),
                Streams(range(IMAGES)),
                time.process_time(),
            )
            found = extract_orders(
                model, batch, policy.build(images.grid, streams), streams, condition=labels
            )
            row = {
                "policy": policy.label,
                "steps": round(float(found.steps.double().mean()), 2),
                "most_steps": int(found.steps.max()),
                "nats_per_token": round(-float(found.log_prob.double().mean()), 4),
                "cpu_ms_per_image": round(1000 * (time.process_time() - begin) / IMAGES, 1),
            }
            print(json.dumps(row), flush=True)
