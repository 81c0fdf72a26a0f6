"""The report of one or more runs: a table, a verdict, images side by side; everything else folded below."""

import csv
import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from anyorder import files
from anyorder.contracts import require
from anyorder.report import curves, evaluations, page, verdict
from anyorder.report.evaluations import Evaluation, Found
from anyorder.report.page import Section
from anyorder.report.tables import Spread, Table

LOG = "metrics.jsonl"
Names = Mapping[Path, str]
"""Of artifacts by their folders, each unlike all others of the report."""
WRITERS = {
    ".html": page.write_report, ".md": page.write_markdown, ".tex": page.write_latex,
    ".json": page.write_records,
}  # fmt: skip
ENDINGS = *WRITERS, ".csv"
Columns = Mapping[str, str | Callable[[dict[str, Any]], Any]]
"""By name of the column: a key of the manifest, with dots between levels, or a value made from it."""


def report(folders: Sequence[Path], out: Path, *, data_images: bool = True) -> Table | None:
    """Write one self-contained page about runs (`.html`); the tables alone as `.md` or `.json`.

    A `.csv` has a row for each evaluation, with every measure; `.tex` takes the package booktabs. Stages of
    equal name in several run folders are one variant with several seeds. Missing images are
    left out, and without `data_images` those that contain images of the data set.

    Returns:
        The main table; None if no samples were evaluated.

    Raises:
        FileNotFoundError: a folder without artifacts.
    """
    artifacts = evaluations.find_artifacts(folders)

    def of(stage: str) -> Found:
        return [(path, manifest) for path, manifest in artifacts if manifest["stage"] == stage]

    evaluated, compared = evaluations.read_evaluations(artifacts), evaluations.difference_table(artifacts)
    spaces = evaluations.spaces(evaluated)
    names = evaluations.labels(path for path, _ in artifacts)
    opening = [_opening(space, artifacts, names, images=i == 0) for i, space in enumerate(spaces)]
    for section, space in zip(opening if len(spaces) > 1 else [], spaces, strict=False):
        section.title = f"Results: {evaluations.metric_names(space)}, {space[0].split} split"
    folded = [
        *(section for space in spaces for section in _measures(space)),
        *([Section("Differences", "", [compared])] if compared else []),
        *_samples(of("sample"), names),
        *(kind.section(found, names, data_images) for kind in KINDS if (found := _rounds(of(kind.stage)))),
        *_losses(of("train"), names),
        Section("Time", "", [_times(artifacts, names)]),
        Section("Manifests", "", [page.Details(f"{m['stage']}: {names[path]}", m) for path, m in artifacts]),
    ]
    for section in folded:
        section.folded = True
    if out.suffix == ".csv":
        require(bool(evaluated), "no samples were evaluated: run the stage eval first")
        rows = [
            {"run": str(e.run), "metric": e.metrics["metric_name"], "split": e.split} | e.row()
            for e in evaluated
        ]
        _write_csv(out, rows)
        return None
    WRITERS[out.suffix](out, f"anyorder: {', '.join(Path(f).name for f in folders)}", [*opening, *folded])
    return opening[0].tables[0] if opening else None


def _write_csv(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Unrounded values, a column for each measure that one of the rows has."""
    shown = [name for name in rows[0] if any(row[name] is not None for row in rows)]
    writer = csv.DictWriter(buffer := io.StringIO(), shown, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    files.write_text(path, buffer.getvalue())


def _opening(evaluated: Sequence[Evaluation], artifacts: Found, names: Names, *, images: bool) -> Section:
    """The main table, the verdict, and the first run's images of the baselines and the best other variant."""
    variants, differences = evaluations.group(evaluated), evaluations.read_differences(artifacts)
    best = verdict.best_comparison(variants, differences)
    shown = [v for v in variants if v.policy in verdict.BASELINES or (best and v is best.variant)]
    folders = {manifest["fingerprint"]: (path, manifest) for path, manifest in artifacts}
    inputs = [variant.evaluations[0].manifest["inputs"].get("samples") for variant in shown or variants[:3]]
    chosen = [folders[i] for i in inputs if i in folders]
    gallery = _images(chosen, names, "grid.png", "samples") if images else []
    results = verdict.main_table(variants, differences), verdict.verdict(variants, differences)
    return Section("Results", "", [*results, *gallery])


def _measures(evaluated: Sequence[Evaluation]) -> list[Section]:
    """Every measure, over seeds where there are seeds, and of every run."""
    variants, name = evaluations.group(evaluated), evaluations.metric_names(evaluated)
    split = evaluated[0].split
    text = (
        "nats/token (exact) is the negative log-likelihood of held-out images in the order of the samples. "
        "nats/token (bound) is an upper bound for random orders and for orders that the model samples. "
        "A policy that looks at the sampled token before it chooses the position has neither."
    )
    notes = sorted({note for evaluation in evaluated for note in evaluation.metrics.get("notes", [])})
    text, several = " ".join([text, *notes]), len(variants) < len(evaluated)
    runs = evaluations.labels(e.run for e in evaluated)
    rows = [{"run": runs[e.run]} | e.row() if several else e.row() for e in evaluated]
    single = evaluations.tables(rows, name, split)
    if not several:
        return [Section("All measures", text, single)]
    averaged = evaluations.tables([variant.row() for variant in variants], name, split)
    text = f"Mean ± standard deviation over seeds. {text}"
    return [Section("All measures, over seeds", text, averaged), Section("All measures, by run", "", single)]


def _images(found: Found, names: Names, name: str, title: str) -> list[page.Item]:
    """A gallery of the images of this name, where there are any."""
    there = [p for p, _ in found if (p / name).is_file()]
    figures = [page.Figure(p / name, names[p].replace("samples-", ""), f"{title}: {names[p]}") for p in there]
    return [page.Gallery(figures)] if figures else []


def _samples(samples: Found, names: Names) -> list[Section]:
    parts = [
        ("grid.png", "Samples", "The first samples of each set, not selected."),
        ("orders.png", "Order maps", "Each sample beside the map of its order, light first, dark last."),
        ("generation.webp", "Generation", "Samples as they are generated, each in its order."),
        ("drawing.webp", "Generation", "The same; older runs name the file so."),
    ]
    found = [Section(title, text, _images(samples, names, name, title)) for name, title, text in parts]
    return [section for section in found if section.items]


def _rounds(found: Found) -> Found:
    """An entry for each round of `iterate`, other artifacts as they are."""
    return [
        (path, {**round_, "round": i} if "rounds" in manifest else manifest)
        for path, manifest in found
        for i, round_ in enumerate(manifest.get("rounds", [{}]), start=1)
    ]


def _table(found: Found, names: Names, first: str, columns: Columns) -> Table:
    """A row for each artifact, `first` with the name; columns without any value are left out."""
    rows = [{first: names[p], **{name: _value(m, c) for name, c in columns.items()}} for p, m in found]
    shown = [name for name in (first, *columns) if any(row[name] is not None for row in rows)]
    return Table(shown, [{name: row[name] for name in shown} for row in rows])


def _value(manifest: dict[str, Any], column: str | Callable[[dict[str, Any]], Any]) -> Any:
    if not isinstance(column, str):
        return column(manifest)
    found: Any = manifest
    for part in column.split("."):
        found = found.get(part) if found else None
    return found


def _seeds(key: str) -> Callable[[dict[str, Any]], float | None]:
    """A column: a metric, with mean and deviation where it was measured for several seeds."""

    def column(manifest: dict[str, Any]) -> float | None:
        found = (manifest["metrics"].get(key) or {}).get("seeds") or [None]
        return Spread.of(found) if len(found) > 1 else found[0]

    return column


@dataclass(frozen=True)
class Kind:
    """How the artifacts of a stage are shown: a table with their names in the `first` column, and images."""

    stage: str
    title: str
    text: str
    first: str
    columns: Columns
    image: str = ""
    alt: str = ""
    of_data: bool = False

    def section(self, found: Found, names: Names, data_images: bool) -> Section:
        """The section; `data_images`: with images that contain images of the data set."""
        shown = self.image and (data_images or not self.of_data)
        images = _images(found, names, self.image, self.alt) if shown else []
        return Section(self.title, self.text, [_table(found, names, self.first, self.columns), *images])


KINDS = (
    Kind(
        "completion", "Completions",
        "Holes in test images, generated given the rest. FD or FID, KID, recall: against true images. "
        "Inside the hole: hole_mse (pixels in [0, 1]), hole_psnr (dB), and for token-blind policies hole_nll "
        "(nats per true token). Mean ± deviation over seeds. Rows of images: true, its hole, completions.",
        "completion", {"mask": "config.mask", "policy": "policy", **{
            name: _seeds(name.lower())
            for name in ("FD", "FID", "KID", "recall", "hole_mse", "hole_psnr", "hole_nll")}},
        "grid.png", "completions", of_data=True,
    ),
    Kind(
        "grid", "On other grids",
        "Exact negative log-likelihood of test images in random orders; mean ± deviation over these orders.",
        "model", {"next position": "next_position",
         "trained on": lambda m: "{} x {}".format(*m["grids"]["own"]),
         "grid": lambda m: "{} x {}".format(*m["grids"]["other"]),
         "nats/token there": _seeds("other"), "where trained": _seeds("own")},
        "grid.png", "generated on other grids", of_data=True,
    ),
    Kind(
        "orders", "Extracted orders",
        "Orders extracted from training images: mean step of each position, for all images and per class.",
        "orders", {"policy": "policy", "images": "rows",
         "Kendall's tau with raster": "kendall_with_raster", "mean jump (patches)": "mean_jump",
         "first step entropy (nats)": lambda m: m["position_entropy"][0],
         "nats/token": lambda m: -m["mean_log_prob"], "sun before cloud": "sun_first",
         "extraction evaluations": "extraction_evaluations", "seconds": "seconds"},
        "mean_rank.png", "mean step of each position",
    ),
    Kind(
        "iterate", "Rounds of extraction and fine-tuning",
        "Hard EM on q(order, x): orders are extracted with the model of the round before, then content and "
        "location are fine-tuned on them. The bound is -log q(order, x) >= -log p(x), in nats per token.",
        "run", {"round": "round", "E-step": "policy", "random share": "random_share",
         "train bound": "train_bound", "test bound": "test_bound", "gap": "gap",
         "training tokens": "training_tokens", "extraction evaluations": "extraction_evaluations"},
    ),
    Kind(
        "tune", "Search of temperature and guidance",
        "On the validation split, the same points for every method: least distance, of near ties least KID.",
        "search", {"policy": "policy", "distance": "metric_name", "temperature": "best.temperature",
         "guidance scale": "best.guidance_scale", "FD or FID": "best.distance",
         "KID x 1000": lambda m: 1000 * m["best"]["kid"], "recall": "best.recall",
         "points": lambda m: len(m["points"])},
        "search.png", "distance and KID of every point",
    ),
    Kind(
        "tokenizer", "Tokenizer", "Measured on the test split.",
        "tokenizer", {"PSNR (dB)": "test.psnr", "SSIM": "test.ssim",
         "codebook usage (%)": lambda m: 100 * m["test"]["codebook_usage"],
         "codebook perplexity": "test.codebook_perplexity", "parameters": "parameters"},
        "reconstructions.png", "test images above what the tokens keep of them", of_data=True,
    ),
    Kind(
        "train", "Training",
        "Nats/token in the orders of training and in random ones; the bound adds the cost of locations.",
        "model", {"orders": lambda m: _trained_on(m), "parameters": "parameters",
         "train nats/token": "train_nll", "test nats/token": "test_nll", "test bound": "test_bound",
         "under random orders": "any_order_nll", "training tokens": "training_tokens",
         "training s": "training_seconds"},
    ),
)  # fmt: skip


def _losses(trained: Found, names: Names) -> list[Section]:
    # A training that stopped before its first logged step holds no loss.
    kept = [path for path, _ in trained if (path / LOG).is_file()]
    logged = [path for path in kept if any("loss" in line for line in curves.read_metrics(path / LOG))]
    if not logged:
        return []
    starts = [_steps_before(path, trained) for path in logged]
    image = curves.loss_curves([(names[path], path / LOG) for path in logged], starts)
    text = "Fine-tuning continues at the last step of the model that it started from."
    return [Section("Loss", text, [page.Figure(image, "", "loss curves")])]


def _trained_on(manifest: dict[str, Any]) -> str | None:
    """Where the orders of a training came from, for tables; None of models made by hand, which do not say."""
    config = manifest["config"]
    if config.get("online"):
        return f"extracted while training: {config['online']['order']}"
    if "orders" not in manifest["inputs"]:
        return config.get("order")
    return "extracted, the mean of each class" if config.get("orders_as") == "class_mean" else "extracted"


def _steps_before(path: Path, trained: Found) -> int:
    """Steps of the models that a training started from."""
    start = dict(trained)[path]["inputs"].get("init")
    for other, manifest in trained:
        if manifest["fingerprint"] == start:
            made = manifest.get("steps") or manifest["config"].get("train", {}).get("steps", 0)
            return made + _steps_before(other, trained)
    return 0


def _times(artifacts: Found, names: Names) -> Table:
    # The rounds of iterate are artifacts of their own.
    total = sum(m.get("seconds") or 0 for _, m in artifacts if m["stage"] != "iterate")
    columns = {"stage": "stage", "seconds": "seconds", "examples/s": "examples_per_second"}
    every = [*artifacts, (Path("all"), {"stage": "", "seconds": total})]
    return _table(every, {**names, Path("all"): "all"}, "artifact", columns)
