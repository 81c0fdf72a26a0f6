"""Does the quickstart show that own orders win? Run it with several seeds, with and without bf16, and count.

    python tools/quickstart_seeds.py docs/results/quickstart.json seeds=0,1,2,3,4 bf16=off,on out=runs/seeds

These are the defaults. Each run is `anyorder quickstart seed=S out=OUT/S-BF16`; a stopped script goes on.
A seed counts if the ordered model has a lower FD and a higher consistency than random order, and is
better than raster in one of the two at least. The JSON file is written after every run.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

GENERATORS = ("raster", "random", "ordered")
SHOWN = ("fd", "kid", "recall", "precision", "consistency", "nll")


def one_run(seed: int, bf16: str, out: Path) -> dict[str, Any]:
    """Run the quickstart and return its row of numbers."""
    command = [sys.executable, "-m", "anyorder", "quickstart", f"seed={seed}", f"out={out}"]
    subprocess.run(command, env=os.environ | {"ANYORDER_BF16": bf16}, check=True)
    row: dict[str, Any] = {"seed": seed, "bf16": bf16}
    for name in GENERATORS:
        found = json.loads((out / f"eval-{name}/metrics.json").read_text(encoding="utf-8"))
        row[name] = {key: round(found[key], 4) for key in SHOWN}
    manifests = [json.loads(path.read_text(encoding="utf-8")) for path in out.glob("*/manifest.json")]
    return row | verdict(row) | {"minutes": round(sum(m["seconds"] for m in manifests) / 60, 1)}


def verdict(row: dict[str, Any]) -> dict[str, bool]:
    """Whether own orders beat random order in both numbers, and raster in one."""
    better = {
        name: [
            row["ordered"]["fd"] < row[name]["fd"],
            row["ordered"]["consistency"] > row[name]["consistency"],
        ]
        for name in ("random", "raster")
    }
    return {"beats random in both": all(better["random"]), "beats raster in one": any(better["raster"])}


def summary(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """For each processor mode: how many seeds count, and means and spreads of the numbers."""
    found: dict[str, Any] = {}
    for bf16 in sorted({row["bf16"] for row in rows}):
        chosen = [row for row in rows if row["bf16"] == bf16]
        held = sum(row["beats random in both"] and row["beats raster in one"] for row in chosen)
        found[f"bf16 {bf16}"] = {"seeds": len(chosen), "method wins": held} | {
            name: {key: spread([row[name][key] for row in chosen]) for key in SHOWN} for name in GENERATORS
        }
    return found


def spread(values: list[float]) -> str:
    """Mean and, of several, standard deviation."""
    spread = f" ± {statistics.stdev(values):.4f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.4f}{spread}"


def main(arguments: list[str]) -> None:
    """Run all, print and write a JSON file."""
    settings = dict(a.split("=") for a in arguments if "=" in a)
    out = Path(settings.get("out", "runs/seeds"))
    rows: list[dict[str, Any]] = []
    for seed in settings.get("seeds", "0,1,2,3,4").split(","):
        for bf16 in settings.get("bf16", "off,on").split(","):
            rows.append(one_run(int(seed), bf16, out / f"{seed}-{bf16}"))
            command = " ".join(["python", "tools/quickstart_seeds.py", *arguments])
            text = json.dumps({"command": command, "summary": summary(rows), "runs": rows}, indent=1)
            print(text)
            for path in (a for a in arguments if "=" not in a):
                Path(path).write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
