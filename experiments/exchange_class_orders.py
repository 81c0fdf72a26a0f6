"""Give each class the mean order of another, or one drawn at random: as regular, without the meaning.

    python experiments/exchange_class_orders.py runs/few/orders runs/few/tokens runs/few/orders-exchanged
    python experiments/exchange_class_orders.py runs/few/orders runs/few/tokens runs/few/orders-drawn SEED

The class with the most images takes the order of the second, and so on; the last takes that of the first.
With a seed each class gets a permutation of its own instead, which shares nothing with others. The folder is
one of orders that `orders_as=class_mean` and `policy.order=class_mean` take; orders of single images are left
as they are.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import sys
from pathlib import Path

import numpy as np

from anyorder import files


def main(orders: str, tokens: str, out: str, seed: str = "") -> None:
    """Write the folder `out`; stops if it exists."""
    shutil.copytree(orders, out)
    table = np.load(Path(orders, "class_order.npy"))
    images = np.bincount(np.load(Path(tokens, "train.labels.npy")), minlength=len(table))
    ranking = np.argsort(-images[: len(table)], kind="stable")
    table[ranking] = table[np.roll(ranking, -1)]
    if seed:
        table = np.random.default_rng(int(seed)).permuted(table, axis=1)
    np.save(Path(out, "class_order.npy"), table)
    manifest = files.read_manifest(out)
    manifest["files"]["class_order.npy"] = files.sha256(Path(out, "class_order.npy"))
    hashes = json.dumps(manifest["files"], sort_keys=True)
    manifest["fingerprint"] = hashlib.sha256(hashes.encode()).hexdigest()[:16]
    files.write_json(Path(out, files.MANIFEST), manifest)
    print(f"{len(table)} orders of classes {'drawn' if seed else 'exchanged'} in {out}")


if __name__ == "__main__":
    if Path(sys.argv[3]).exists():
        sys.exit(f"{sys.argv[3]} exists: give another folder")
    main(*sys.argv[1:])
