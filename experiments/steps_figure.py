"""FD, recall and likelihood against the number of steps: of the cells of experiments/steps_fashion32.yaml.

    python experiments/steps_figure.py

Reads docs/results/steps/eval-KIND-STEPS[-VARIATION]/manifest.json, writes docs/results/steps.png and prints a
table.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from anyorder.files import read_manifest
from anyorder.report.curves import quality_against_steps
from anyorder.report.figures import save_image

CELLS = Path("docs/results/steps")
PANELS = {"fd": "FD (own classifier)", "recall": "recall", "nll": "exact likelihood (nats per token)"}
ANY_ORDER = ("random", "inferred", "follows")
"""Kinds that are drawn by the any-order model; the others are far off the scale."""
WHOLE = {"lazy": 64}
"""Cells that are named for what they do, in as many steps as there are positions."""


def cell(folder: Path) -> tuple[str, str, int, Mapping[str, Any]]:
    """Kind of order, variation, steps and metrics."""
    _, kind, steps, *variation = folder.name.split("-")
    variation = [steps] if steps in WHOLE else variation
    metrics = read_manifest(folder)["metrics"]
    return kind, ", ".join(variation), WHOLE.get(steps) or int(steps), metrics


def main() -> None:
    """Figure and table."""
    cells = [cell(folder) for folder in sorted(CELLS.glob("eval-*"))]
    cells.sort(key=lambda some: (some[0], -some[2], some[1]))
    shown = [some for some in cells if some[0] in ANY_ORDER]
    save_image(quality_against_steps(shown, PANELS), CELLS.with_suffix(".png"))
    whole = {
        kind: metrics["fd"] for kind, variation, steps, metrics in cells if steps == 64 and not variation
    }
    print("| order | steps | FD | against 64 steps | KID | precision | recall | nats per token |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- |")
    for kind, variation, steps, m in cells:
        name, more = f"{kind}, {variation}" if variation else kind, 100 * (m["fd"] / whole[kind] - 1)
        values = (
            *(name, steps, f"{m['fd']:.3f}", f"{more:+.0f} %", f"{1000 * m['kid']:.1f}e-3"),
            *(f"{m['precision']:.3f}", f"{m['recall']:.3f}", f"{m['nll']:.3f}"),
        )
        print(f"| {' | '.join(map(str, values))} |")


if __name__ == "__main__":
    main()
