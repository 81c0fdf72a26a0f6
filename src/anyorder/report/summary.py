"""The report of one or more runs: what their artifacts say, side by side, on one page."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from anyorder.report import curves
from anyorder.report.conclusions import conclusions
from anyorder.report.evaluations import (
    Evaluation,
    Variant,
    difference_table,
    group,
    read_differences,
    read_evaluations,
    tables,
)
from anyorder.report.page import Details, Figure, Gallery, Section, write_markdown, write_report
from anyorder.report.records import LOG, Found, find_artifacts
from anyorder.report.tables import Spread, Table


def report(folders: Sequence[Path], out: Path, *, data_pictures: bool = True) -> Table | None:
    """Write one self-contained page about the runs in `folders`, or its tables as Markdown.

    Args:
        folders: run folders; every finished artifact below them is told of. Copies of the manifests will do:
            what they have no picture for is left out.
        out: the `.html` file, or an `.md` file.
        data_pictures: show reconstructions, which are pictures of the data set itself.

    Returns:
        Quality of all evaluated samples, over seeds where there are seeds; None if there are none.

    Raises:
        FileNotFoundError: a folder without artifacts.
    """
    artifacts = find_artifacts(folders)

    def of(stage: str) -> Found:
        return [(path, manifest) for path, manifest in artifacts if manifest["stage"] == stage]

    evaluations = read_evaluations(artifacts)
    variants = group(evaluations)
    sections = [
        *_conclusions(variants, artifacts),
        *_quality(evaluations, variants),
        *_intervals(artifacts),
        *_samples(of("sample")),
        *_completions(of("completion"), data_pictures),
        *_other_grids(of("grid"), data_pictures),
        *_orders(of("orders")),
        *_rounds(of("iterate")),
        *_tokenizer(of("tokenizer"), data_pictures),
        *_training(of("train")),
        _costs(artifacts),
        Section("Manifests", "", [Details(f"{m['stage']}: {path.name}", m) for path, m in artifacts]),
    ]
    write = write_markdown if out.suffix == ".md" else write_report
    write(out, f"anyorder: {', '.join(Path(f).name for f in folders)}", sections)
    shown = variants if len(variants) < len(evaluations) else evaluations
    return tables([each.row() for each in shown], _metric_name(evaluations))[0] if evaluations else None


def _conclusions(variants: Sequence[Variant], artifacts: Found) -> list[Section]:
    """One section for each run: distances in one feature space compare with nothing else."""
    by_run: dict[Path, list[Variant]] = {}
    for variant in variants:
        by_run.setdefault(variant.evaluations[0].path.parent, []).append(variant)
    differences = read_differences(artifacts)
    return [
        conclusions(own, differences, "Conclusions" if len(by_run) == 1 else f"Conclusions: {run.name}")
        for run, own in by_run.items()
    ]


def _metric_name(evaluations: Sequence[Evaluation]) -> str:
    return ", ".join(sorted({evaluation.metrics["metric_name"] for evaluation in evaluations}))


def _quality(evaluations: Sequence[Evaluation], variants: Sequence[Variant]) -> list[Section]:
    """The orders side by side: mean and spread over seeds where there are seeds, and every run."""
    if not evaluations:
        return []
    text = (
        "nats/token (exact) is the negative log-likelihood of test images under the order that the samples "
        "were drawn in. nats/token (bound) is an upper bound on it, for locations that are drawn themselves: "
        "what tokens cost and what locations cost. A policy that looks at the drawn token has neither."
    )
    notes = sorted({note for evaluation in evaluations for note in evaluation.metrics["notes"]})
    name, sections = _metric_name(evaluations), []
    if len(variants) < len(evaluations):
        spread = "Mean ± sample standard deviation over seeds."
        averaged = tables([variant.row() for variant in variants], name)
        sections.append(Section("Orders, over seeds", " ".join([spread, text, *notes]), averaged))
        text, notes = "The same, run by run.", []
    single = tables([evaluation.row() for evaluation in evaluations], name)
    return [*sections, Section("Raster, random and ordered generation", " ".join([text, *notes]), single)]


def _intervals(artifacts: Found) -> list[Section]:
    table = difference_table(artifacts)
    return [Section("Differences", "", [table])] if table is not None else []


def _pictures(found: Found, name: str, title: str, caption: str | None = None) -> list[Figure]:
    """The pictures of this name that are there: records of a run may be manifests alone."""
    there = [path for path, _ in found if (path / name).is_file()]
    return [
        Figure(path / name, path.name if caption is None else caption, f"{title}: {path.name}")
        for path in there
    ]


def _samples(samples: Found) -> list[Section]:
    if not samples:
        return []
    parts = [
        ("grid.png", "Samples", "The first samples of each set, not selected."),
        ("orders.png", "Order maps", "Each sample beside the order it was drawn in, light first, dark last."),
        ("drawing.webp", "Drawing", "Pictures being drawn, each in its own order."),
    ]
    return [
        Section(title, text, [Gallery(shown)])
        for name, title, text in parts
        if (shown := _pictures(samples, name, title))
    ]


def _completions(completions: Found, pictures: bool) -> list[Section]:
    if not completions:
        return []
    text = (
        "Holes in test images, drawn given the rest. FD or FID: between completed and true images. Inside "
        "the hole: hole_mse (pixels in [0, 1]), hole_psnr (dB), and for token-blind policies hole_nll (nats "
        "per true token). Mean ± sample standard deviation over seeds."
    )
    masks = dict.fromkeys(m["config"]["mask"] for _, m in completions)
    tables = [_completion_table([f for f in completions if f[1]["config"]["mask"] == mask]) for mask in masks]
    shown = _pictures(completions, "grid.png", "Completion") if pictures else []
    caption = "Each row: the true image, its hole, completions from several seeds."
    galleries = [Section("Completions", caption, [Gallery(shown)])] if shown else []
    return [Section("Completion", text, tables), *galleries]


def _completion_table(completions: Found) -> Table:
    """Completions of one hole, side by side."""
    rows = [
        {
            "completion": path.name,
            "mask": m["config"]["mask"],
            "policy": m["policy"],
            **{name: Spread.of(found["seeds"]) for name, found in m["metrics"].items()},
        }
        for path, m in completions
    ]
    columns = list(dict.fromkeys(name for row in rows for name in row))
    lower: dict[str, Any] = {c: "min" for c in columns if c in ("fd", "fid", "hole_mse", "hole_nll")}
    return Table(columns, rows, best=lower | {"hole_psnr": "max"})


def _other_grids(grids: Found, pictures: bool) -> list[Section]:
    if not grids:
        return []
    rows = [
        {
            "model": path.name,
            "next position": m["next_position"],
            "trained on": "{} x {}".format(*m["grids"]["own"]),
            "grid": "{} x {}".format(*m["grids"]["other"]),
            "nats/token there": Spread.of(m["metrics"]["other"]["seeds"]),
            "where trained": Spread.of(m["metrics"]["own"]["seeds"]),
        }
        for path, m in grids
    ]
    text = (
        "Exact negative log-likelihood of test images in random orders; mean ± deviation over draws of these."
    )
    shown = _pictures(grids, "grid.png", "On other grids") if pictures else []
    galleries = [Gallery(shown)] if shown else []
    return [Section("On other grids", text, [Table(list(rows[0]), rows), *galleries])]


def _orders(orders: Found) -> list[Section]:
    if not orders:
        return []
    rows = [
        {
            "orders": path.name,
            "policy": m["policy"],
            "images": m["rows"],
            "Kendall's tau with raster": m["kendall_with_raster"],
            "mean jump (patches)": m["mean_jump"],
            "first step entropy (nats)": m["position_entropy"][0],
            "nats/token": -m["mean_log_prob"],
            "sun before cloud": m.get("sun_first"),
            "extraction evaluations": m.get("extraction_evaluations"),
            "seconds": m["seconds"],
        }
        for path, m in orders
    ]
    rows = _without_empty(rows)
    shown = _pictures(orders, "mean_rank.png", "mean rank")
    text = (
        "Orders extracted from training images: when each patch is drawn on average, for all and per class."
    )
    return [
        Section("Extracted orders", text, [Table(list(rows[0]), rows), *([Gallery(shown)] if shown else [])])
    ]


def _without_empty(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows without the columns that none of them has a value for."""
    return [{k: v for k, v in row.items() if any(other[k] is not None for other in rows)} for row in rows]


def _rounds(iterated: Found) -> list[Section]:
    if not iterated:
        return []
    rows = [
        {
            "run": path.name,
            "round": number,
            "E-step": facts["policy"],
            "random share": facts["random_share"],
            "train bound": facts["train_bound"],
            "test bound": facts["test_bound"],
            "gap": facts["gap"],
            "training tokens": facts["training_tokens"],
            "extraction evaluations": facts["extraction_evaluations"],
        }
        for path, m in iterated
        for number, facts in enumerate(m["rounds"], start=1)
    ]
    text = (
        "Hard EM on q(order, x): orders are extracted with the model of the round before, then content and "
        "location are fine-tuned on them. The bound is -log q(order, x) in nats per token, which is never "
        "below -log p(x)."
    )
    table = Table(list(rows[0]), rows, best={"test bound": "min"})
    return [Section("Rounds of extraction and fine-tuning", text, [table])]


def _tokenizer(tokenizers: Found, pictures: bool) -> list[Section]:
    if not tokenizers:
        return []
    rows = [
        {
            "tokenizer": path.name,
            "PSNR (dB)": m["test"]["psnr"],
            "SSIM": m["test"]["ssim"],
            "codebook usage (%)": 100 * m["test"]["codebook_usage"],
            "codebook perplexity": m["test"]["codebook_perplexity"],
            "parameters": m["parameters"],
        }
        for path, m in tokenizers
    ]
    items: list[Any] = [Table(list(rows[0]), rows, "Measured on the test split.")]
    if pictures:
        alt, caption = (
            "test images above their reconstructions",
            "Test images, and what the tokens keep of them.",
        )
        items += _pictures(tokenizers, "reconstructions.png", alt, caption)
    return [Section("Tokenizer", "", items)]


def _training(trained: Found) -> list[Section]:
    if not trained:
        return []
    logs = [(path.name, path / LOG) for path, _ in trained if (path / LOG).is_file()]
    starts = [_steps_before(path, trained) for path, _ in trained if (path / LOG).is_file()]
    rows = [
        {
            "model": path.name,
            "orders": _trained_on(m),
            "parameters": m["parameters"],
            "train nats/token": m.get("train_nll"),
            "test nats/token": m["test_nll"],
            "test bound": m.get("test_bound"),
            "under random orders": m.get("any_order_nll"),
            "training tokens": m["training_tokens"],
            "training s": m["training_seconds"],
        }
        for path, m in trained
    ]
    rows = _without_empty(rows)
    caption = (
        "Nats/token of the tokens, under the orders of training and under random ones; the bound adds what "
        "the location head pays for the order."
    )
    items: list[Any] = [Table(list(rows[0]), rows, caption)]
    if logs:
        text = "Loss of the models; fine-tuning goes on where its start left off."
        items.append(Figure(curves.loss_curves(logs, starts=starts), text, "loss curves"))
    return [Section("Training", "", items)]


def _trained_on(manifest: dict[str, Any]) -> str:
    """Where the orders of a training came from, for tables."""
    config = manifest["config"]
    if config.get("online"):
        return f"extracted while training: {config['online']['order']}"
    if "orders" not in manifest["inputs"]:
        return config["order"]
    return "extracted, the mean of each class" if config.get("orders_as") == "class_mean" else "extracted"


def _steps_before(path: Path, trained: Found) -> int:
    """Steps behind the model that a training started from."""
    own = dict(trained)[path]["inputs"].get("init")
    for other, manifest in trained:
        if manifest["fingerprint"] == own:
            return manifest.get("steps", manifest["config"]["train"]["steps"]) + _steps_before(other, trained)
    return 0


def _costs(artifacts: Found) -> Section:
    rows = [
        {
            "artifact": path.name,
            "stage": m["stage"],
            "seconds": m["seconds"],
            "examples/s": m["examples_per_second"],
        }
        for path, m in artifacts
    ]
    total = {"artifact": "all", "stage": "", "seconds": sum(m["seconds"] for _, m in artifacts)}
    return Section("Time", "", [Table(["artifact", "stage", "seconds", "examples/s"], [*rows, total])])
