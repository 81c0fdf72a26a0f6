"""How fast are the adapters beside the original programs? The same random weights, order and machine.

    python experiments/adapter_speed.py OUT.json --randar DIR --arpg DIR [--steps 64 --repeats 5 --bf16]

DIR are checkouts of ziqipang/RandAR and hp-l33/ARPG, which are run as they are. Size L, 8 images of 16 x 16
tokens, no guidance, on the CPU, float32 or, both programs, bfloat16; in the 88 (RandAR) and 64 (ARPG) steps
that the originals take by default, and one position per step (256), or in what --steps says alone. Runs of
both programs take turns; results are added to OUT. `least_seconds` are those of the FLOPs of the adapter at
the rate of large matrix products, measured between the runs: no program of these layers can be faster.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import compare_adapters as compare
import torch
from torch import Tensor

from anyorder.bench import costs
from anyorder.contracts import AnyOrderModel
from anyorder.files import versions, write_json
from anyorder.method.sampling import Sampling, Streams, sample_tokens, truncate

SIZE = compare.LARGE._replace(rows=8)
Pair = tuple[str, int, Callable[[], Any], Callable[[], Any]]
"""What is timed, in how many steps, by the original, by the adapter."""


def drawn(model: AnyOrderModel, labels: Tensor, order: Tensor, steps: list[int]) -> Tensor:
    """Tokens (B, N), so many positions of the order at once as `steps` says."""
    state, tokens, streams = (
        model.start(len(labels), labels),
        torch.zeros_like(order),
        Streams(range(len(labels))),
    )
    for known, positions in enumerate(order.split(steps, dim=1)):
        log_p = model.score(state, positions).float().log_softmax(-1)
        found = sample_tokens(truncate(log_p, Sampling()), streams.uniform(known, positions))
        tokens.scatter_(1, positions, found)
        state = model.append(state, positions, found)
    return tokens


def randar(root: Path, dtype: torch.dtype) -> Iterator[Pair]:
    """One position per step, and RandAR's own schedule."""
    original, model = (each.eval().to(dtype) for each in compare.randar_models(root, SIZE))
    _, labels, orders = compare.inputs(SIZE, 1)
    order, n = orders["random order"], SIZE.grid.n
    for steps in (88, n):

        def theirs(steps: int = steps) -> None:
            original.generate(labels, order, (1.0, 1.0), -1 if steps == n else steps)
            original.remove_caches()

        sizes = [1] * n if steps == n else compare.cosine_steps(n, steps)
        yield "RandAR-L", steps, theirs, lambda sizes=sizes: drawn(model, labels, order, sizes)


def arpg(root: Path, dtype: torch.dtype) -> Iterator[Pair]:
    """ARPG's own schedule, and one position per step."""
    original, model = (each.eval().to(dtype) for each in compare.arpg_models(root, SIZE)[:2])
    _, labels, orders = compare.inputs(SIZE, 2)
    order, n = orders["random order"], SIZE.grid.n
    for steps in (64, n):
        sizes = [1] * n if steps == n else compare.arccos_steps(n, steps)
        # At guidance 1 the original draws without a second half.
        yield (
            "ARPG-L",
            steps,
            lambda steps=steps: original.generate(labels.clone(), 1.0, "constant", seq_len=n, num_iter=steps),
            lambda sizes=sizes: drawn(model, labels, order, sizes),
        )


def timed(
    pairs: Iterator[Pair], chosen: int | None, repeats: int, dtype: torch.dtype
) -> Iterator[dict[str, Any]]:
    """Medians of both, taking turns, their ratio, and the least that the products take."""
    a = torch.randn(1024, 1024, dtype=dtype)
    for name, steps, theirs, ours in pairs:
        if chosen not in (None, steps):
            continue
        seconds: dict[str, list[float]] = {"original": [], "adapter": [], "product": []}
        for _ in range(repeats):
            for who, work in (("original", theirs), ("adapter", ours), *[("product", lambda: a @ a)] * 9):
                begin = time.perf_counter()
                work()
                seconds[who].append(time.perf_counter() - begin)
        median = {who: statistics.median(times) for who, times in seconds.items()}
        rate = 2 * 1024**3 / median.pop("product")
        row = {"what": name, "steps": steps, "images": SIZE.rows, "dtype": str(dtype).removeprefix("torch."),
               "seconds": {who: seconds[who] for who in median},
               **{f"{who}_seconds": round(value, 2) for who, value in median.items()},
               "ratio": round(median["original"] / median["adapter"], 3),
               "product_gflops_per_second": round(rate / 1e9, 1),
               "least_seconds": round(costs.count(ours).flops / rate, 2)}  # fmt: skip
        print(row, flush=True)
        yield row


def main() -> None:
    """Time what checkouts were given for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--randar", type=Path, metavar="DIR")
    parser.add_argument("--arpg", type=Path, metavar="DIR")
    parser.add_argument("--steps", type=int)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--bf16", action="store_true")
    given = vars(parser.parse_args())
    torch.manual_seed(0)
    rows = json.loads(given["out"].read_text())["rows"] if given["out"].exists() else []
    with torch.no_grad():
        for name, pairs in (("randar", randar), ("arpg", arpg)):
            if given[name] is not None:
                dtype = torch.bfloat16 if given["bf16"] else torch.float32
                for row in timed(pairs(given[name], dtype), given["steps"], given["repeats"], dtype):
                    rows.append(row)
                    facts = {
                        "device": f"CPU, {torch.get_num_threads()} threads",
                        "versions": versions(),
                    }
                    write_json(given["out"], {**facts, "rows": rows})


if __name__ == "__main__":
    main()
