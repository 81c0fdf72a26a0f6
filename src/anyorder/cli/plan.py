"""The command `anyorder plan`: what an experiment costs on some machine, before anything runs."""

from dataclasses import asdict
from typing import Any

from anyorder.bench import estimates, fake
from anyorder.cli import planner
from anyorder.contracts import require
from anyorder.inference.device import PEAKS
from anyorder.report.tables import Table
from anyorder.stages.experiment import Experiment

KINDS = {
    "a100": planner.Kind(*PEAKS["A100"], 2.04e12, 80e9),
    "h100": planner.Kind(*PEAKS["H100"], 3.35e12, 80e9),
    "h200": planner.Kind(*PEAKS["H200"], 4.8e12, 141e9),
    "l40s": planner.Kind(*PEAKS["L40S"], 0.864e12, 48e9),
    "rtx4090": planner.Kind(*PEAKS["RTX 4090"], 1.008e12, 24e9),
}
"""Bytes/s and bytes of memory are of the same data sheets as the peaks."""
UNCOUNTED = (
    "not counted anywhere: decoding of image files, evaluations during training, start-up, and what eval "
    "does beside features: floors, likelihoods, reconstructions"
)


def plan(experiment: Experiment, config: planner.PlanConfig) -> dict[str, Any]:
    """Costs of every stage that is counted, and of all together; the machine they are for.

    Raises:
        ValueError: sizes that neither the file nor the settings say.
    """
    kind = planner.Kind(*estimates.speeds()) if config.kind == "cpu" else KINDS[config.kind]
    with fake.imagined():
        counted = planner.Planner(experiment, config, kind)
        found = {path.name: counted.costs(path) for path in counted.stages}
    rows = [costs.row(name) for name, costs in found.items() if costs]
    require(bool(rows), f"none of these stages is counted: {', '.join(found) or 'there are none'}")
    largest = max((costs.memory for costs in found.values() if costs), default=0.0)
    totals = {name: sum(row[name] or 0 for row in rows) or None for name in ("PFLOP", "hours", "disk (GB)")}
    return {
        "config": asdict(config),
        "machine": kind._asdict(),
        "stages": rows,
        "together": {"stage": "together", **totals, "GiB per GPU": largest / planner.GIB},
        "not counted": [name for name, costs in found.items() if costs is None],
    }


def describe(found: dict[str, Any]) -> str:
    """The plan as text."""
    config, machine = found["config"], planner.Kind(**found["machine"])
    table = Table(list(found["stages"][0]), [*found["stages"], found["together"]]).text()
    memory = f"{machine.memory / planner.GIB:.0f} GiB"
    rate = f"{(machine.bf16 or machine.float32) / 1e12:,.3g} TFLOP/s, {memory}"
    share = f"kernels at {config['efficiency']:.0%} of these"
    lines = [f"{config['gpus']} x {config['kind']} ({rate}), {share}", table]
    lines += [
        f"{row['stage']} does not fit into {memory}: smaller batch_size; in a training "
        "with more accumulation, or train.shard=true"
        for row in found["stages"]
        if (row["GiB per GPU"] or 0) * planner.GIB > machine.memory
    ]
    if found["not counted"]:
        lines.append(f"not counted: {', '.join(found['not counted'])}")
    return "\n".join([*lines, UNCOUNTED])
