"""Evaluations side by side: every run, and the mean and spread of runs that differ in their seed only."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any, Literal

from anyorder.evaluation.bootstrap import Difference
from anyorder.report.records import Found
from anyorder.report.tables import Spread, Table

NO_LIKELIHOOD = "not a likelihood"
"""What a policy that looks at the drawn tokens has in the place of one."""

Best = Literal["min", "max"]
QUALITY: dict[str, Best | None] = {
    "distance": "min",
    "KID x 1000": "min",
    "precision": "max",
    "recall": "max",
    "IS": "max",
    "consistency": "max",
    "class coverage": "max",
    "class agreement": "max",
    "class distance": "min",
    "attribute agreement": "max",
}
COST: dict[str, Best | None] = {
    "nats/token (exact)": "min",
    "nats/token (bound)": "min",
    "bound: tokens": None,
    "bound: locations": None,
    "bits/dim": "min",
    "s/image": "min",
    "extraction evaluations": None,
    "training tokens": None,
    "training s": None,
}
COPIES: dict[str, Best | None] = {
    "nearest training image, ratio": None,
    "nearer than 99 % of test": None,
    "equal tokens": None,
    "equal tokens, test": None,
}
"""Columns of the three tables about samples, and which end is better where one is."""


@dataclass(frozen=True)
class Evaluation:
    """One evaluated set of samples."""

    path: Path
    manifest: dict[str, Any]
    extraction: int | None = None
    """Position evaluations that extracting its model's orders took, where a manifest says so."""

    @property
    def name(self) -> str:
        """Short name, with the seed."""
        return short_name(self.path.name)

    @property
    def variant(self) -> str:
        """Name without the seed."""
        return _unseeded(self.name)

    @property
    def seed(self) -> int | None:
        """Seed at the end of the name, `-s3`, if there is one."""
        found = re.search(r"-s(\d+)$", self.name)
        return int(found[1]) if found else None

    @property
    def metrics(self) -> dict[str, Any]:
        """What the stage eval measured."""
        return self.manifest["metrics"]

    @property
    def fingerprint(self) -> str:
        """Of the artifact."""
        return self.manifest["fingerprint"]

    @property
    def distance(self) -> float:
        """Fréchet distance to the test split."""
        return self.metrics["fid"] if "fid" in self.metrics else self.metrics["fd"]

    @property
    def order(self) -> str:
        """Policy, and the model that decides where if it is another one."""
        scorer = self.metrics.get("scorer")
        return f"{self.metrics['policy']} by {_unseeded(scorer)}" if scorer else self.metrics["policy"]

    def row(self) -> dict[str, Any]:
        """Every column of the tables; None where there is no value."""
        m = self.metrics
        blind = m["token_blind"]
        return {
            "samples": self.name,
            "order": self.order,
            "token-blind": blind,
            "distance": self.distance,
            "KID x 1000": 1000 * m["kid"],
            "precision": m["precision"],
            "recall": m["recall"],
            "IS": m["inception_score"],
            "consistency": m.get("consistency"),
            "class coverage": m.get("class_coverage"),
            "class agreement": m.get("class_agreement"),
            "class distance": m.get("class_distance"),
            "attribute agreement": m.get(f"agreement_{m.get('attribute')}"),
            "nats/token (exact)": m.get("nll") if blind else NO_LIKELIHOOD,
            "nats/token (bound)": m.get("bound") if blind else NO_LIKELIHOOD,
            "bound: tokens": m.get("bound_tokens") if blind else None,
            "bound: locations": m.get("bound_location") if blind else None,
            "bits/dim": m.get("bits_per_dim") if blind else None,
            "s/image": m["seconds_per_image"],
            "extraction evaluations": self.extraction,
            "training tokens": m["training_tokens"],
            "training s": m["training_seconds"],
            "nearest training image, ratio": m.get("nearest_training_ratio"),
            "nearer than 99 % of test": m.get("nearest_training_share"),
            "equal tokens": m.get("token_copies"),
            "equal tokens, test": m.get("token_copies_of_test"),
        }


@dataclass(frozen=True)
class Variant:
    """Evaluations that differ in their seed only, by seed."""

    name: str
    evaluations: Sequence[Evaluation]

    @property
    def order(self) -> str:
        """Policy, and the model that decides where if it is another one."""
        return self.evaluations[0].order

    @property
    def policy(self) -> str:
        """Label of the policy alone."""
        return self.evaluations[0].metrics["policy"]

    @property
    def distance(self) -> float:
        """Mean Fréchet distance over the seeds."""
        return mean(evaluation.distance for evaluation in self.evaluations)

    def row(self) -> dict[str, Any]:
        """Every column of the tables, numbers as mean and spread."""
        rows = [evaluation.row() for evaluation in self.evaluations]
        averaged = {column: _together([row[column] for row in rows]) for column in rows[0]}
        return {**averaged, "samples": self.name, "seeds": len(rows)}


def short_name(folder: str) -> str:
    """Name of the samples that an eval artifact is about."""
    return folder.removeprefix("eval-")


def _unseeded(name: str) -> str:
    return re.sub(r"-s\d+$", "", name)


def _together(values: list[Any]) -> Any:
    """Mean and spread of numbers; what is not a number must be equal in all, or is left out."""
    if all(isinstance(value, int | float) and not isinstance(value, bool) for value in values):
        return values[0] if len(set(values)) == 1 else Spread.of(values)
    return values[0] if all(value == values[0] for value in values) else None


def read_evaluations(artifacts: Found) -> list[Evaluation]:
    """The evaluations among the artifacts, with what the models behind them cost to make."""
    made = {manifest["fingerprint"]: manifest for _, manifest in artifacts}
    return [
        Evaluation(path, manifest, _extraction(manifest, made))
        for path, manifest in artifacts
        if manifest["stage"] == "eval"
    ]


def _extraction(evaluation: dict[str, Any], made: dict[str, dict[str, Any]]) -> int | None:
    """Position evaluations spent on the orders behind a model: as said, or of all extractions behind it."""
    model = evaluation["inputs"].get("model", "")
    for manifest in (evaluation["metrics"], made.get(model, {})):
        if manifest.get("extraction_evaluations") is not None:
            return manifest["extraction_evaluations"]
    behind, new = set[str](), {model}
    while new:  # a model may be behind another in two ways: as its start, and by its orders
        behind |= new
        new = {f for b in new for f in made.get(b, {}).get("inputs", {}).values()} - behind
    known = [
        made[f]["extraction_evaluations"] for f in behind & made.keys() if "extraction_evaluations" in made[f]
    ]
    return sum(known) if known else None


def group(evaluations: Sequence[Evaluation]) -> list[Variant]:
    """Evaluations of one folder that differ in the ending `-s<seed>` only, in the sequence they came."""
    found: dict[tuple[Path, str], list[Evaluation]] = {}
    for evaluation in evaluations:
        found.setdefault((evaluation.path.parent, evaluation.variant), []).append(evaluation)
    return [
        Variant(
            name, sorted(members, key=lambda evaluation: (evaluation.seed is not None, evaluation.seed or 0))
        )
        for (_, name), members in found.items()
    ]


def tables(rows: Sequence[dict[str, Any]], metric_name: str) -> list[Table]:
    """Three tables about samples: quality; likelihood and cost; likeness to training images.

    Args:
        rows: of evaluations, or of variants.
        metric_name: what the distance is called.
    """
    captions = (
        (QUALITY, f"Distance is {metric_name} of generated images to the test split."),
        (COST, "Training tokens and seconds of the whole chain of models; extraction is counted apart."),
        (
            COPIES,
            "Ratio: median distance to the nearest training image over that of test images (1: as far). "
            "Nearer: share of samples nearer to one than 99 % of the test images are (by chance 0.01). "
            "Equal tokens: share of samples, and of test images, whose tokens are those of a training image.",
        ),
    )
    return [table for columns, caption in captions if (table := _table(rows, columns, caption)) is not None]


def _table(rows: Sequence[dict[str, Any]], columns: dict[str, Best | None], caption: str) -> Table | None:
    """The columns that have a number in any of the rows, None if there are none."""
    measured = [name for name in columns if any(isinstance(row[name], int | float) for row in rows)]
    if not measured:
        return None
    first = ["samples", *(["seeds"] if "seeds" in rows[0] else []), "order", "token-blind"]
    shown = [{name: row[name] for name in (*first, *measured)} for row in rows]
    # A KID below zero is at its noise floor: no best then.
    noise = {"KID x 1000"} if any((row["KID x 1000"] or 0) < 0 for row in rows) else set()
    best = {name: end for name in measured if (end := columns[name]) is not None and name not in noise}
    return Table([*first, *measured], shown, caption, best)


Differences = dict[tuple[str, str], dict[str, Difference]]
"""Comparisons by the fingerprints of the two evaluations, in both directions."""


def read_differences(artifacts: Found) -> Differences:
    """The comparisons among the artifacts."""
    found: Differences = {}
    for _, manifest in artifacts:
        if manifest["stage"] == "compare":
            a, b = manifest["inputs"]["a"], manifest["inputs"]["b"]
            differences = {name: Difference(**value) for name, value in manifest["metrics"].items()}
            found[b, a] = {name: difference.reversed for name, difference in differences.items()}
            found[a, b] = differences
    return found


def difference_table(artifacts: Found) -> Table | None:
    """Every comparison among the artifacts, None if there are none."""
    rows = [
        {
            "a": short_name(manifest["a"]),
            "b": short_name(manifest["b"]),
            "metric": name,
            "of a": values["a"],
            "of b": values["b"],
            "a - b": values["difference"],
            "interval": f"{values['low']:+.4g} to {values['high']:+.4g}",
            "relative (%)": None if values["relative"] is None else 100 * values["relative"],
            "relative interval (%)": percent_interval(Difference(**values)),
            "differs": not values["low"] <= 0 <= values["high"],
        }
        for _, manifest in artifacts
        if manifest["stage"] == "compare"
        for name, values in manifest["metrics"].items()
    ]
    if not rows:
        return None
    sure = sorted({m["config"]["confidence"] for _, m in artifacts if m["stage"] == "compare"})
    caption = (
        f"Intervals of {' and '.join(f'{100 * c:g} %' for c in sure)} from resampled samples; models and "
        "test split stay as they are. KID is of all samples at once."
    )
    return Table(list(rows[0]), rows, caption)


def percent_interval(difference: Difference) -> str | None:
    """The interval of the relative difference in percent."""
    if difference.relative_low is None or difference.relative_high is None:
        return None
    return f"{100 * difference.relative_low:+.1f} to {100 * difference.relative_high:+.1f}"
