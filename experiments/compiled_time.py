"""Sampling through compiled code against eager sampling, taking turns in one process, on the CPU.

OMP_NUM_THREADS=1 python experiments/compiled_time.py docs/results/compiled-time.json
"""

import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch

from anyorder.files import versions, write_json
from anyorder.method.decoding import sample
from anyorder.method.sampling import Streams
from anyorder.models.compiled import bucket, compile_decoding
from anyorder.models.transformer import AnyOrderTransformer, TransformerConfig

ROUNDS = 5
SIZE: dict[str, Any] = {"depth": 8, "width": 512, "heads": 8, "vocab_size": 1024, "grid": (16, 16)}


def compare(model: AnyOrderTransformer, images: int) -> dict[str, Any]:
    """CPU seconds of this thread for whole pictures in a fixed order, after a warm-up of both ways."""
    ways = {"eager": None, "compiled": model.compiled}
    seconds: dict[str, list[float]] = {way: [] for way in ways}
    first, made = {}, {}
    for turn in range(ROUNDS + 1):
        for way, compiled in ways.items():
            model.compiled = compiled
            wall, begin = time.perf_counter(), time.thread_time()
            made[way] = sample(model, "raster", Streams(range(images)))
            if turn:
                seconds[way].append(time.thread_time() - begin)
            else:
                first[way] = time.perf_counter() - wall
    ratios = [c / e for c, e in zip(seconds["compiled"], seconds["eager"], strict=True)]
    return {
        "images": images,
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


@torch.no_grad()
def score(model: AnyOrderTransformer, images: int, candidates: int) -> dict[str, Any]:
    """CPU seconds of scoring all open positions once, after a warm-up."""
    ways = {"eager": None, "compiled": model.compiled}
    seconds: dict[str, list[float]] = {way: [] for way in ways}
    state, n = model.start(images), model.grid.n
    known = torch.arange(n - candidates).expand(images, -1)
    state = model.append(state, known, known)
    for turn in range(2 * ROUNDS + 1):
        for way, compiled in ways.items():
            model.compiled, state.scored.count = compiled, 0
            begin = time.thread_time()
            model.score(state, torch.arange(n - candidates, n).expand(images, -1))
            seconds[way] += [time.thread_time() - begin] if turn else []
    ratio = statistics.median(seconds["compiled"]) / statistics.median(seconds["eager"])
    sizes = {"images": images, "candidates": candidates, "bucket": bucket(candidates)}
    return {**sizes, "seconds": seconds, "compiled / eager": ratio}


def main(out: Path) -> None:
    """Whole pictures in a fixed order; single scorings, of which inferred orders are made."""
    torch.manual_seed(0)
    model = AnyOrderTransformer(TransformerConfig(**SIZE)).eval()
    compile_decoding(model)
    compiled = model.compiled
    result: dict[str, Any] = {"model": SIZE, "threads": torch.get_num_threads(), "versions": versions()}
    for images in (1, 4):
        model.compiled = compiled
        result.setdefault("pictures", []).append(compare(model, images))
        write_json(out, result)
    for candidates in (29, 125, 221):
        model.compiled = compiled
        result.setdefault("scorings", []).append(score(model, 4, candidates))
        write_json(out, result)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
