"""How fast are the adapters beside the original programs? The same random weights, order and machine.

    python experiments/adapter_speed.py OUT.json --randar DIR --arpg DIR [--steps 64 --repeats 5 --bf16]
        [--device cuda --rows 64]

DIR are checkouts of ziqipang/RandAR and hp-l33/ARPG, which are run as they are. Size L, 8 images (--rows) of
16 x 16 tokens, no guidance, on the CPU (--device), float32 or, both programs, bfloat16; in the 88 (RandAR)
and 64 (ARPG) steps that the originals take by default, and one position per step (256), or in what --steps
says alone. Runs of both programs take turns; results are added to OUT. `least_seconds` are those of the FLOPs
of the adapter at the rate of large matrix products, measured between the runs: no program of these layers can
be faster.
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

Pair = tuple[str, int, Callable[[], Any], Callable[[], Any]]
"""What is timed, in how many steps, by the original, by the adapter."""


def drawn(model: AnyOrderModel, labels: Tensor, order: Tensor, steps: list[int]) -> Tensor:
    """Tokens (B, N), so many positions of the order at once as `steps` says."""
    state, tokens, streams = (
        model.start(len(labels), labels),
        torch.zeros_like(order),
        Streams(range(len(labels)), labels.device),
    )
    for known, positions in enumerate(order.split(steps, dim=1)):
        log_p = model.score(state, positions).float().log_softmax(-1)
        found = sample_tokens(truncate(log_p, Sampling()), streams.uniform(known, positions))
        tokens.scatter_(1, positions, found)
        state = model.append(state, positions, found)
    return tokens


def randar(root: Path, size: Any, target: dict[str, Any]) -> Iterator[Pair]:
    """One position per step, and RandAR's own schedule."""
    original, model = (each.eval().to(**target) for each in compare.randar_models(root, size))
    _, labels, orders = compare.inputs(size, 1)
    labels, order, n = labels.to(target["device"]), orders["random order"].to(target["device"]), size.grid.n
    for steps in (88, n):

        def theirs(steps: int = steps) -> None:
            original.generate(labels, order, (1.0, 1.0), -1 if steps == n else steps)
            original.remove_caches()

        sizes = [1] * n if steps == n else compare.cosine_steps(n, steps)
        yield "RandAR-L", steps, theirs, lambda sizes=sizes: drawn(model, labels, order, sizes)


def arpg(root: Path, size: Any, target: dict[str, Any]) -> Iterator[Pair]:
    """ARPG's own schedule, and one position per step."""
    original, model = (each.eval().to(**target) for each in compare.arpg_models(root, size)[:2])
    _, labels, orders = compare.inputs(size, 2)
    labels, order, n = labels.to(target["device"]), orders["random order"].to(target["device"]), size.grid.n
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
    pairs: Iterator[Pair], chosen: int | None, repeats: int, rows: int, target: dict[str, Any]
) -> Iterator[dict[str, Any]]:
    """Medians of both, taking turns, their ratio, and the least that the products take."""
    a = torch.randn(1024, 1024, **target)
    wait = torch.cuda.synchronize if a.is_cuda else lambda: None
    for name, steps, theirs, ours in pairs:
        if chosen not in (None, steps):
            continue
        seconds: dict[str, list[float]] = {"original": [], "adapter": [], "product": []}
        for _ in range(repeats):
            for who, work in (("original", theirs), ("adapter", ours), *[("product", lambda: a @ a)] * 9):
                wait()
                begin = time.perf_counter()
                work()
                wait()
                seconds[who].append(time.perf_counter() - begin)
        median = {who: statistics.median(times) for who, times in seconds.items()}
        rate = 2 * 1024**3 / median.pop("product")
        row = {"what": name, "steps": steps, "images": rows, "dtype": str(a.dtype).removeprefix("torch."),
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
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--rows", type=int, default=8)
    given = vars(parser.parse_args())
    torch.manual_seed(0)
    rows = json.loads(given["out"].read_text())["rows"] if given["out"].exists() else []
    machine = f"CPU, {torch.get_num_threads()} threads"
    machine = torch.cuda.get_device_name() if "cuda" in given["device"] else machine
    with torch.no_grad():
        for name, pairs in (("randar", randar), ("arpg", arpg)):
            if given[name] is not None:
                target = {
                    "device": given["device"],
                    "dtype": torch.bfloat16 if given["bf16"] else torch.float32,
                }
                made = pairs(given[name], compare.LARGE._replace(rows=given["rows"]), target)
                for row in timed(made, given["steps"], given["repeats"], given["rows"], target):
                    rows.append(row)
                    facts = {
                        "device": machine,
                        "versions": versions(),
                    }
                    write_json(given["out"], {**facts, "rows": rows})


if __name__ == "__main__":
    main()
