"""Times as shares of what the machine can do, measured in the same run."""

import dataclasses
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from anyorder import files
from anyorder.bench import workloads
from anyorder.bench.memory import peak_memory
from anyorder.bench.workloads import BenchConfig, Workload
from anyorder.inference.device import device, fast_dtype
from anyorder.inference.figures import save_image
from anyorder.report.curves import scaling_curves
from anyorder.report.tables import Table
from anyorder.settings import flatten, parse

SHORTEST = 0.02
"""Seconds that one measurement lasts at least: short work is run several times in a row."""
AXES = {
    "batch_size": "images at once, B", "grid": "positions, N",
    "vocab_size": "codebook size, V", "depth": "depth, blocks",
}  # fmt: skip
FIXED, FLOAT32 = "sampling, fixed order", ", float32"
SIZES = ("model", "tokenizer", "grid", "vocab_size", "batch_size", "images")
"""Settings that two results must share to be compared."""


def bench(config: BenchConfig, out: Path) -> dict[str, Any]:
    """Measure, print tables, and write `out` (JSON) and, of sweeps, a figure beside it (PNG).

    Where bfloat16 is fast, sampling is also measured in float32, under a name that says so. One share is of
    the matmul rate at the shape of training in the same dtype. The other is of the least time
    that matmul rate and memory bandwidth allow; it passes 100 % where caches hold what was counted as moved.
    """
    base, cuda = measure(config), device().type == "cuda"
    sweeps = {name: _sweep(config, name, base) for name, values in vars(config.over).items() if values}
    result = {
        "config": dataclasses.asdict(config),
        "device": torch.cuda.get_device_name() if cuda else f"CPU, {torch.get_num_threads()} threads",
        "dtype": str(fast_dtype(device(), True)),
        "versions": files.versions(),
        **base,
        "sweeps": sweeps,
        "memory": peak_memory(workloads.Subject(dataclasses.replace(config, compile=False)), config.memory),
    }
    files.write_json(out, result)
    print("\n\n".join(table.text() for table in tables(result)))
    print(f"written to {out}")
    if sweeps:
        curves = {
            AXES[name]: [row | {"value": point["value"]} for point in points for row in point["rows"]]
            for name, points in sweeps.items()
        }
        figure = out.with_suffix(".png")
        save_image(scaling_curves(curves, ["images/s", "share of attainable (%)"]), figure)
        print(f"figure in {figure}")
    return result


def measure(config: BenchConfig) -> dict[str, list[dict[str, Any]]]:
    """Time ceilings and workloads in turns, so that a change of the machine's speed affects all of them."""
    torch.manual_seed(0)
    subject = workloads.Subject(config)
    tops = workloads.ceilings(subject)
    names = list(config.only or workloads.WORKLOADS)
    runs = {name: workloads.workload(name, subject) for name in names}
    if subject.dtype != torch.float32:
        again = [name for name in names if name.startswith("sampling")]
        runs |= {name + FLOAT32: workloads.workload(name, subject, torch.float32) for name in again}
    seconds = _times(tops | runs, config.repeats)
    measured = {name: _row(top, seconds[name]) for name, top in tops.items()}
    rows = []
    for name, run in runs.items():
        dtype = torch.float32 if name.endswith(FLOAT32) else subject.dtype
        product = measured[workloads.matmul_name(dtype, subject.tokens.numel())]
        limits = 1e9 * product["GFLOP/s"], 1e9 * measured[workloads.MEMORY]["GB/s"]
        fixed = seconds.get(FIXED + FLOAT32 if name.endswith(FLOAT32) else FIXED)
        rows.append({"workload": name} | _row(run, seconds[name], limits, fixed))
    return {"ceilings": [{"ceiling": name} | row for name, row in measured.items()], "rows": rows}


def _times(works: dict[str, Workload], repeats: int) -> dict[str, list[float]]:
    calls = {name: _warm_up(work.run) for name, work in works.items()}
    times: dict[str, list[float]] = {name: [] for name in works}
    for _ in tqdm(range(repeats), desc="bench", unit="round"):
        for name, work in works.items():
            times[name].append(_seconds(work.run, calls[name]))
    return times


def _warm_up(run: Callable[[], Any]) -> int:
    """How many runs make one measurement."""
    seconds = min(_seconds(run), _seconds(run))  # the first one pays for what happens once
    return max(1, min(1000, round(SHORTEST / seconds)))


def _seconds(run: Callable[[], Any], calls: int = 1) -> float:
    """Seconds per run."""
    wait = torch.cuda.synchronize if device().type == "cuda" else bool
    wait()
    begin = time.perf_counter()
    for _ in range(calls):
        run()
    wait()
    return (time.perf_counter() - begin) / calls


def _row(
    work: Workload, seconds: list[float], limits: tuple[float, ...] = (), fixed: list[float] | None = None
) -> dict[str, Any]:
    """Rates, and shares of the limits: matmul rate (FLOP/s) and memory bandwidth (bytes/s).

    `fixed` are the seconds of sampling in a fixed order, beside which other sampling is put.
    """
    median, cost = statistics.median(seconds), work.cost
    row = {
        "seconds": median,
        "spread (%)": 100 * (max(seconds) - min(seconds)) / median,
        "images/s": work.images / median if work.images else None,
        "GFLOP": cost.flops / 1e9,
        "GB": cost.bytes / 1e9,
        "GFLOP/s": cost.flops / median / 1e9 or None,
        "GB/s": cost.bytes / median / 1e9,
    }
    if not limits:
        return row
    return row | {
        "share of matmul (%)": 100 * cost.flops / median / limits[0],
        "share of attainable (%)": 100 * cost.seconds(*limits) / median,
        "bound by": "matmul" if cost.flops / limits[0] > cost.bytes / limits[1] else "memory",
        "relative to a fixed order": median / statistics.median(fixed) if fixed and work.sampling else None,
    }


def _sweep(config: BenchConfig, name: str, base: dict[str, Any]) -> list[dict[str, Any]]:
    """A point for each value of one size; `base` where it is that of `config`."""
    points = []
    for value in getattr(config.over, name):
        changes = {
            "batch_size": {"batch_size": value, "images": value},
            "grid": {"grid": (value, value)},
            "vocab_size": {"vocab_size": value},
            "depth": {"model": dataclasses.replace(config.model, depth=value)},
        }
        changed = dataclasses.replace(config, **changes[name])
        result = base if changed == config else measure(changed)
        points.append({"value": value**2 if name == "grid" else value, **result})
    return points


def tables(result: dict[str, Any]) -> list[Table]:
    """Ceilings, workloads, every sweep, and memory."""
    found = [_table(result["ceilings"], "images/s"), _table(result["rows"])]
    for name, points in result["sweeps"].items():
        measured = zip(*(point["rows"] for point in points), strict=True)
        values = [{AXES[name]: point["value"]} for point in points]
        rows = [value | row for rows in measured for value, row in zip(values, rows, strict=True)]
        found.append(_table(rows, "GFLOP/s", "GB/s"))
    return [*found, Table(list(result["memory"][0]), result["memory"])] if result["memory"] else found


def _table(rows: list[dict[str, Any]], *without: str) -> Table:
    columns = [name for name in rows[0] if name not in ("GFLOP", "GB", *without)]
    return Table(columns, [{name: row[name] for name in columns} for row in rows])


def load_result(path: Path) -> dict[str, Any]:
    """A file that `bench` wrote.

    Raises:
        FileNotFoundError: no such file.
        ValueError: it is not the result of a bench.
    """
    result = files.read_json(path)
    if not isinstance(result, dict) or not {"config", "device", "rows"} <= set(result):
        raise ValueError(f"{path} is not a result of anyorder bench: give the JSON file that it wrote")
    return result


def against(new: dict[str, Any], old: dict[str, Any]) -> Table:
    """Two results side by side: ratios of time below 1 are faster, ratios of shares above 1 are better.

    Raises:
        ValueError: they were measured at other sizes, or have no workload in common.
    """
    sizes, before = _sizes(new), _sizes(old)
    other = [f"{name} is {size} and {before[name]}" for name, size in sizes.items() if size != before[name]]
    if other:
        text = f"the results are of different sizes: {', '.join(other)}"
        raise ValueError(f"{text}; run one of them again with the settings of the other")
    rows, rows_before = _by_name(new), _by_name(old)
    compared = [_ratios(name, row, rows_before[name]) for name, row in rows.items() if name in rows_before]
    if not compared:
        raise ValueError(f"no workload is in both results: {'; '.join(rows)} and {'; '.join(rows_before)}")
    return Table(list(compared[0]), compared, f"{new['device']} against {old['device']}")


def _sizes(result: dict[str, Any]) -> dict[str, Any]:
    """By dotted name, with defaults for settings that are newer than the result."""
    known = {name: value for name, value in result["config"].items() if name in SIZES}
    config = dataclasses.asdict(parse(BenchConfig, known))
    return flatten({name: config[name] for name in SIZES})


def _by_name(result: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Rows by workload and, of sweeps, value."""
    named = {row["workload"]: row for row in result["rows"]}
    for name, points in result.get("sweeps", {}).items():
        for point in points:
            named |= {f"{row['workload']}, {AXES[name]} = {point['value']}": row for row in point["rows"]}
    return named


def _ratios(name: str, new: dict[str, Any], old: dict[str, Any]) -> dict[str, Any]:
    of = {"time": "seconds", "share of matmul": "share of matmul (%)"}
    of["share of attainable"] = "share of attainable (%)"
    ratios = {
        f"ratio of {what}": new[key] / old[key] if new.get(key) and old.get(key) else None
        for what, key in of.items()
    }
    times = {"workload": name, "seconds": new["seconds"], "seconds before": old["seconds"]}
    return {**times, **ratios, "spread (%)": max(new["spread (%)"], old["spread (%)"])}
