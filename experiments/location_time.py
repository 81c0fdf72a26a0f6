"""What the location head costs beside a fixed order, in CPU time: other work hardly touches it.

    OMP_NUM_THREADS=1 python experiments/location_time.py OUT.json

A model of 24 million parameters (8 layers, 512 wide, 16 x 16 tokens), 4 images; both orders take turns.
"""

from __future__ import annotations

import statistics
import sys
import time
from pathlib import Path

import torch

from anyorder.files import versions, write_json
from anyorder.method.decoding import sample
from anyorder.method.sampling import Streams
from anyorder.models.transformer import AnyOrderTransformer, TransformerConfig

PAIRS = 5


@torch.no_grad()
def main(out: Path) -> None:
    """Measure and write `out`: CPU seconds of each pair, and the median of their ratios."""
    torch.manual_seed(0)
    config = TransformerConfig(depth=8, width=512, heads=8, location=True, vocab_size=1024, grid=(16, 16))
    model, streams = AnyOrderTransformer(config).eval(), Streams(range(4))
    pairs = []
    for _ in range(PAIRS):
        seconds = {}
        for order in ("random", "location"):
            begin = time.process_time()
            sample(model, order, streams)
            seconds[order] = time.process_time() - begin
        pairs.append(seconds)
    ratio = statistics.median(pair["location"] / pair["random"] for pair in pairs)
    threads = torch.get_num_threads()
    write_json(out, {"cpu_seconds": pairs, "ratio": ratio, "threads": threads, "versions": versions()})
    print(f"{ratio:.3f}")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
