"""Sampling through compiled code against eager sampling, taking turns in one process, on the CPU.

OMP_NUM_THREADS=1 python experiments/compiled_time.py docs/results/compiled-time.json
"""

import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch

from anyorder.artifacts import versions
from anyorder.decode import sample
from anyorder.logits import Streams
from anyorder.models.compiled import compile_decoding
from anyorder.models.transformer import AnyOrderTransformer, TransformerConfig

ROUNDS = 3
SIZE: dict[str, Any] = {"depth": 8, "width": 512, "heads": 8, "vocab_size": 1024, "grid": (16, 16)}


def compare(model: AnyOrderTransformer, images: int, order: str) -> dict[str, Any]:
    """CPU seconds of this thread for one run of each kind and round, after a warm-up of both."""
    ways = {"eager": None, "compiled": model.compiled}
    seconds: dict[str, list[float]] = {way: [] for way in ways}
    first, made = {}, {}
    for turn in range(ROUNDS + 1):
        for way, compiled in ways.items():
            model.compiled = compiled
            wall, begin = time.perf_counter(), time.thread_time()
            made[way] = sample(model, order, Streams(range(images)))
            if turn:
                seconds[way].append(time.thread_time() - begin)
            else:
                first[way] = time.perf_counter() - wall
    ratios = [c / e for c, e in zip(seconds["compiled"], seconds["eager"], strict=True)]
    return {
        "images": images,
        "order": order,
        "seconds": seconds,
        "compiled / eager": ratios,
        "median": statistics.median(ratios),
        "first run, wall seconds": first,
        "same tokens": float((made["eager"].tokens == made["compiled"].tokens).float().mean()),
        "same order": float((made["eager"].order == made["compiled"].order).float().mean()),
        "largest difference of log-probabilities": float(
            (made["eager"].log_prob - made["compiled"].log_prob).abs().max()
        ),
    }


def main(out: Path) -> None:
    """Fixed orders first: the larger numbers of candidates are compiled last."""
    torch.manual_seed(0)
    model = AnyOrderTransformer(TransformerConfig(**SIZE)).eval()
    compile_decoding(model)
    compiled, rows = model.compiled, []
    for images, order in ((1, "raster"), (4, "raster"), (1, "entropy"), (4, "entropy")):
        model.compiled = compiled
        rows.append(compare(model, images, order))
        print(json.dumps(rows[-1]), flush=True)
        result = {"model": SIZE, "threads": torch.get_num_threads(), "versions": versions(), "rows": rows}
        out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
