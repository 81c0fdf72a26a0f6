"""Finished artifacts, and evaluations side by side, with mean and standard deviation over seeds.

Several run folders of one experiment are its seeds: evaluations of equal name are one variant.
"""

import contextlib
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any, Literal

from anyorder.evaluation import memorization
from anyorder.evaluation.bootstrap import Difference
from anyorder.files import MANIFEST, read_manifest
from anyorder.report.tables import Spread, Table

NO_LIKELIHOOD = "not a likelihood"
"""In place of a number for policies that look at the sampled tokens before they choose the position."""
FLOOR = "real images"
"""Name of the row that says what real images score: no generator can be expected to do better."""

Found = list[tuple[Path, dict[str, Any]]]
"""Folders of artifacts with their manifests."""
Columns = dict[str, tuple[str, Literal["min", "max"] | None]]
"""By name of the column: key among the results of `eval`, and which end is the better one."""

QUALITY: Columns = {
    "FD": ("fd", "min"), "FID": ("fid", "min"), "KID x 1000": ("kid", "min"),
    "precision": ("precision", "max"), "recall": ("recall", "max"), "IS": ("inception_score", "max"),
    "consistency": ("consistency", "max"), "class coverage": ("class_coverage", "max"),
    "class agreement": ("class_agreement", "max"), "class distance": ("class_distance", "min"),
    "attribute agreement": ("attribute_agreement", "max"),
    "FD of reference file": ("fd_of_reference", "min"), "rFD of the tokenizer": ("rfd", None),
}  # fmt: skip
LIKELIHOOD: Columns = {
    "nats/token (exact)": ("nll", "min"), "nats/token (bound)": ("bound", "min"),
    "bound: tokens": ("bound_tokens", None), "bound: locations": ("bound_location", None),
    "bits/dim": ("bits_per_dim", "min"),
}  # fmt: skip
COST: Columns = {
    "s/image": ("seconds_per_image", "min"), "steps/image": ("steps_per_image", None),
    "extraction evaluations": ("extraction_evaluations", None),
    "training tokens": ("training_tokens", None), "training s": ("training_seconds", None),
}  # fmt: skip
COPIES: Columns = {
    "nearest training image, ratio": ("nearest_training_ratio", None),
    "nearer than 99 % of test": ("nearest_training_share", None),
    "equal tokens": ("token_copies", None), "equal tokens, test": ("token_copies_of_test", None),
}  # fmt: skip
TABLES = {
    "{metric}: of generated images to the {split} split.": QUALITY,
    "Training tokens and seconds of all models used; extraction is counted apart.": LIKELIHOOD | COST,
    "Ratio: median distance to the nearest training image over that of test images (1: as far). Nearer: "
    "share of samples nearer to one than 99 % of the test images are (by chance 0.01). Equal tokens: share "
    "of samples, and of test images, whose tokens are those of a training image.": COPIES,
}
"""The three tables about samples, by caption."""


@dataclass
class Evaluation:
    """One evaluated set of samples: an `eval` artifact, whose parent folder is the run.

    `extraction` counts the position evaluations spent on the orders of the model, where known; `floors` are
    further rows by name, what real images score in the same feature space; `distance` is that to the `split`.
    """

    path: Path
    manifest: dict[str, Any]
    extraction: int | None
    floors: Mapping[str, Mapping[str, float]]

    def __post_init__(self) -> None:
        self.name, self.run, self.metrics = short_name(self.path), self.path.parent, self.manifest["metrics"]
        self.distance: float = self.metrics["fid"] if "fid" in self.metrics else self.metrics["fd"]
        self.split: str = self.metrics.get("split", "test")
        self.copies = memorization.copies(self.metrics)

    def row(self) -> dict[str, Any]:
        """Every column of the tables; None where there is no value."""
        blind, policy, scorer = (self.metrics.get(key) for key in ("token_blind", "policy", "scorer"))
        found = self.metrics | {
            "kid": 1000 * self.metrics["kid"],
            "attribute_agreement": self.metrics.get(f"agreement_{self.metrics.get('attribute')}"),
            "extraction_evaluations": self.extraction,
        }
        if found.get("nll_is_bound"):
            found |= {"bound": found["nll"], "nll": None}
        if not blind:
            found |= {key: None for key, _ in LIKELIHOOD.values()}
            found |= {"nll": NO_LIKELIHOOD, "bound": NO_LIKELIHOOD}
        columns = {name: found.get(key) for table in TABLES.values() for name, (key, _) in table.items()}
        order = f"{policy} by {scorer}" if scorer else policy
        return {"samples": self.name, "order": order, "token-blind": blind, **columns}


@dataclass
class Variant:
    """Evaluations of equal name, one of each run; `distance` is their mean."""

    name: str
    evaluations: Sequence[Evaluation]

    def __post_init__(self) -> None:
        self.policy: str = self.evaluations[0].metrics["policy"]
        self.distance = mean(evaluation.distance for evaluation in self.evaluations)

    def row(self) -> dict[str, Any]:
        """Every column of the tables, numbers as mean and spread."""
        rows = [evaluation.row() for evaluation in self.evaluations]
        averaged = {column: _together([row[column] for row in rows]) for column in rows[0]}
        return {**averaged, "seeds": len(rows)}


def short_name(folder: str | Path) -> str:
    """Name of the samples that an eval artifact is about."""
    return Path(folder).name.removeprefix("eval-")


def labels(paths: Iterable[Path]) -> dict[Path, str]:
    """By path the end that tells it from all others: the name of an artifact, with its run if need be."""
    ends = {path: ["/".join(path.parts[-n:]) for n in range(1, len(path.parts) + 1)] for path in paths}
    count = Counter(end for each in ends.values() for end in each)
    return {path: next((end for end in each if count[end] == 1), str(path)) for path, each in ends.items()}


def _together(values: list[Any]) -> Any:
    """Mean and spread of numbers; anything else must be equal in all, or is left out."""
    if all(isinstance(value, int | float) and not isinstance(value, bool) for value in values):
        return values[0] if len(set(values)) == 1 else Spread.of(values)
    return values[0] if all(value == values[0] for value in values) else None


def find_artifacts(folders: Sequence[Path]) -> Found:
    """Folder and manifest of every finished artifact in the run folders, oldest first.

    Raises:
        FileNotFoundError: a folder that holds none.
    """
    found: dict[Path, dict[str, Any]] = {}
    for folder in folders:
        paths = sorted(Path(folder).rglob(MANIFEST))
        paths = [path for path in paths if ".replaced" not in path.relative_to(folder).parts]
        manifests = {}
        for path in paths:
            with contextlib.suppress(ValueError):  # of a web page, say
                manifests[path.parent] = read_manifest(path.parent)
        if not manifests:
            raise FileNotFoundError(f"{folder} holds no finished artifact: run its experiment first")
        found |= dict(sorted(manifests.items(), key=lambda item: item[1].get("finished", "")))
    return list(found.items())


def read_evaluations(artifacts: Found) -> list[Evaluation]:
    """The evaluations among the artifacts, with extraction costs and floors; a copy of one is left out."""
    made = {manifest["fingerprint"]: manifest for _, manifest in artifacts}
    found = {(p.name, m["fingerprint"]): (p, m) for p, m in reversed(artifacts) if m["stage"] == "eval"}
    return [Evaluation(p, m, _extraction(m, made), _floors(p, m, made)) for p, m in reversed(found.values())]


def _floors(
    path: Path, evaluation: dict[str, Any], made: dict[str, dict[str, Any]]
) -> dict[str, dict[str, float]]:
    """What real training images score: with the classes of the samples, or as the features record it."""
    names = {"distance": "FID" if "fid" in evaluation["metrics"] else "FD", "kid": "KID x 1000"}
    found = evaluation["metrics"].get("floors")
    if not found:
        features = made.get(evaluation["inputs"].get("features", ""), {})
        elsewhere = path / evaluation.get("input_folders", {}).get("features", "")
        if not features and elsewhere != path and (elsewhere / MANIFEST).is_file():  # of another run
            features = read_manifest(elsewhere)
        measured = {"fd": features.get("distance_of_training_images"), **features.get("floor", {})}
        measured["distance"] = measured.pop("fd")
        found = {FLOOR: measured} if measured["distance"] is not None else {}
    return {
        row: {names.get(key, key): 1000 * x if key == "kid" else x for key, x in values.items()}
        for row, values in found.items()
    }


def _extraction(evaluation: dict[str, Any], made: dict[str, dict[str, Any]]) -> int | None:
    """Position evaluations spent on the orders of a model: as recorded, or summed over its ancestors."""
    model = evaluation["inputs"].get("model", "")
    for manifest in (evaluation["metrics"], made.get(model, {})):
        if manifest.get("extraction_evaluations") is not None:
            return manifest["extraction_evaluations"]
    # A model may have two parents: the one it started from, and the one that its orders were extracted with.
    ancestors, new = set[str](), {model}
    while new:
        ancestors |= new
        new = {f for a in new for f in made.get(a, {}).get("inputs", {}).values()} - ancestors
    known = [made[f].get("extraction_evaluations") for f in ancestors & made.keys()]
    return sum(counts) if (counts := [count for count in known if count is not None]) else None


def spaces(evaluations: Sequence[Evaluation]) -> list[list[Evaluation]]:
    """Evaluations in one feature space against one split: numbers of two are never compared."""
    keys = [(re.sub(r"-[0-9a-f]{8}\)$", ")", e.metrics["metric_name"]), e.split) for e in evaluations]
    return [[e for e, k in zip(evaluations, keys, strict=True) if k == key] for key in dict.fromkeys(keys)]


def group(evaluations: Sequence[Evaluation]) -> list[Variant]:
    """Evaluations of equal name as one variant, in the sequence of their first."""
    names = dict.fromkeys(evaluation.name for evaluation in evaluations)
    return [Variant(name, [e for e in evaluations if e.name == name]) for name in names]


def metric_names(evaluations: Sequence[Evaluation]) -> str:
    """The feature spaces, for captions."""
    return ", ".join(sorted({evaluation.metrics["metric_name"] for evaluation in evaluations}))


def tables(rows: Sequence[dict[str, Any]], metric_name: str, split: str = "test") -> list[Table]:
    """Quality; likelihood and cost; closeness to training images: of evaluations, or of variants.

    A column stays if any row has a number there, a table if any column stays.
    """
    made, first = [], [c for c in ("run", "samples", "seeds", "order", "token-blind") if c in rows[0]]
    for caption, columns in TABLES.items():
        measured = [name for name in columns if any(isinstance(row[name], int | float) for row in rows)]
        if measured:
            shown = [{name: row[name] for name in (*first, *measured)} for row in rows]
            best = best_of(rows, measured)
            title = caption.format(metric=metric_name, split=split)
            made.append(Table([*first, *measured], shown, title, best))
    return made


def best_of(rows: Sequence[dict[str, Any]], columns: Sequence[str]) -> dict[str, Literal["min", "max"]]:
    """The better end of columns that have one; KID below zero is within its noise: none is the best."""
    noise = {"KID x 1000"} if any((row["KID x 1000"] or 0) < 0 for row in rows) else set()
    known = QUALITY | LIKELIHOOD | COST | COPIES
    return {name: end for name in columns if (end := known[name][1]) and name not in noise}


Differences = dict[tuple[str, str], dict[str, Difference]]
"""Comparisons by the fingerprints of the two evaluations, in both directions."""


def read_differences(artifacts: Found) -> Differences:
    """The comparisons among the artifacts."""
    found: Differences = {}
    for manifest in (manifest for _, manifest in artifacts if manifest["stage"] == "compare"):
        a, b = manifest["inputs"]["a"], manifest["inputs"]["b"]
        level = {"confidence": manifest["config"]["confidence"]}  # which results of older versions lack
        found[a, b] = {name: Difference.read(level | value) for name, value in manifest["metrics"].items()}
        found[b, a] = {name: difference.reversed for name, difference in found[a, b].items()}
    return found


def difference_table(artifacts: Found) -> Table | None:
    """Every comparison among the artifacts, None if there are none."""
    compared = [(path, manifest) for path, manifest in artifacts if manifest["stage"] == "compare"]
    runs = labels(path.parent for path, _ in compared)
    rows = [
        {
            **({"run": runs[path.parent]} if len(runs) > 1 else {}),
            "a": short_name(manifest["a"]),
            "b": short_name(manifest["b"]),
            "metric": name,
            "a - b": found.difference,
            "interval": f"{found.low:+.4g} to {found.high:+.4g}",
            "relative (%)": None if found.relative is None else 100 * found.relative,
            "relative interval (%)": percent_interval(found),
            "differs": found.low > 0 or found.high < 0,
        }
        for path, manifest in compared
        for name, values in manifest["metrics"].items()
        for found in [Difference.read(values)]
    ]
    if not rows:
        return None
    levels = " and ".join(f"{100 * c:g} %" for c in sorted({m["config"]["confidence"] for _, m in compared}))
    text = f"Intervals of {levels} from resampled samples and reference images; models stay as they are."
    return Table(list(rows[0]), rows, text)


def percent_interval(difference: Difference) -> str | None:
    """The interval of the relative difference in percent."""
    if difference.relative_low is None or difference.relative_high is None:
        return None
    return f"{100 * difference.relative_low:+.1f} to {100 * difference.relative_high:+.1f}"
