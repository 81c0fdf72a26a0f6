"""The report of one or more runs: what their artifacts say, side by side, on one page."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from anyorder.artifacts import MANIFEST, read_manifest
from anyorder.evaluation import figures
from anyorder.evaluation.report import Details, Figure, Gallery, Section, Table, write_markdown, write_report

Found = list[tuple[Path, dict[str, Any]]]

COLUMNS = {
    "distance": "min",
    "KID x 1000": "min",
    "precision": "max",
    "recall": "max",
    "IS": "max",
    "nats/token": "min",
    "bits/dim": "min",
    "consistency": "max",
    "s/image": "min",
}
"""Measured columns of the comparison and which end is better."""


def find_artifacts(folders: Sequence[Path]) -> Found:
    """Folder and manifest of every finished artifact in the folders, oldest first.

    Raises:
        FileNotFoundError: a folder that holds none.
    """
    found: dict[Path, dict[str, Any]] = {}
    for folder in folders:
        paths = sorted(Path(folder).rglob(MANIFEST), key=lambda path: path.stat().st_mtime)
        if not paths:
            raise FileNotFoundError(f"{folder} holds no finished artifact: run its experiment first")
        found |= {path.parent: read_manifest(path.parent) for path in paths}
    return list(found.items())


def report(folders: Sequence[Path], out: Path, *, data_pictures: bool = True) -> Table | None:
    """Write one self-contained page about the runs in `folders`, or its tables as Markdown.

    Args:
        folders: run folders; every finished artifact below them is told of.
        out: the `.html` file, or an `.md` file.
        data_pictures: show reconstructions, which are pictures of the data set itself.

    Returns:
        The comparison of all evaluated samples, None if there are none.

    Raises:
        FileNotFoundError: a folder without artifacts.
    """
    artifacts = find_artifacts(folders)

    def of(stage: str) -> Found:
        return [(path, manifest) for path, manifest in artifacts if manifest["stage"] == stage]

    table = comparison(of("eval")) if of("eval") else None
    sections = [
        *_comparison(of("eval"), table),
        *_samples(of("sample")),
        *_orders(of("orders")),
        *_tokenizer(of("tokenizer"), data_pictures),
        *_training(of("train")),
        _costs(artifacts),
        Section("Manifests", "", [Details(f"{m['stage']}: {path.name}", m) for path, m in artifacts]),
    ]
    write = write_markdown if out.suffix == ".md" else write_report
    write(out, f"anyorder: {', '.join(Path(f).name for f in folders)}", sections)
    return table


def comparison(evaluations: Found) -> Table:
    """Quality, likelihood and cost of every evaluated set of samples."""
    rows = []
    for path, manifest in evaluations:
        m = manifest["metrics"]
        rows.append(
            {
                "samples": path.name.removeprefix("eval-"),
                "order": f"{m['policy']} by {m['scorer']}" if m.get("scorer") else m["policy"],
                "token-blind": m["token_blind"],
                "distance": m.get("fid", m.get("fd")),
                "KID x 1000": 1000 * m["kid"],
                "precision": m["precision"],
                "recall": m["recall"],
                "IS": m["inception_score"],
                "nats/token": m["nll"],
                "bits/dim": m["bits_per_dim"],
                "consistency": m.get("consistency"),
                "s/image": m["seconds_per_image"],
                "training tokens": m["training_tokens"],
                "training s": m["training_seconds"],
            }
        )
    measured = [name for name in COLUMNS if any(row[name] is not None for row in rows)]
    columns = ["samples", "order", "token-blind", *measured, "training tokens", "training s"]
    names = sorted({manifest["metrics"]["metric_name"] for _, manifest in evaluations})
    caption = f"Distance is {', '.join(names)} of generated images to the test split."
    shown = [{column: row[column] for column in columns} for row in rows]
    noise = {"KID x 1000"} if any(row["KID x 1000"] < 0 for row in rows) else set()
    best = {name: COLUMNS[name] for name in measured if name not in noise}
    return Table(columns, shown, caption, best)  # type: ignore[arg-type]


def _comparison(evaluations: Found, table: Table | None) -> list[Section]:
    if table is None:
        return []
    text = (
        "The orders side by side. nats/token is the exact negative log-likelihood of test images under the "
        "order that the samples were drawn in; a policy that looks at the drawn token has none."
    )
    notes = sorted({note for _, manifest in evaluations for note in manifest["metrics"]["notes"]})
    return [Section("Raster, random and ordered generation", " ".join([text, *notes]), [table])]


def _samples(samples: Found) -> list[Section]:
    if not samples:
        return []
    parts = [
        ("grid.png", "Samples", "The first samples of each set, not selected."),
        ("orders.png", "Order maps", "Each sample beside the order it was drawn in, light first, dark last."),
        ("drawing.webp", "Drawing", "Pictures being drawn, each in its own order."),
    ]
    return [
        Section(
            title,
            text,
            [Gallery([Figure(path / name, path.name, f"{title}: {path.name}") for path, _ in samples])],
        )
        for name, title, text in parts
    ]


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
            "seconds": m["seconds"],
        }
        for path, m in orders
    ]
    shown = [Figure(path / "mean_rank.png", path.name, f"mean rank of {path.name}") for path, _ in orders]
    text = (
        "Orders extracted from training images: when each patch is drawn on average, for all and per class."
    )
    return [Section("Extracted orders", text, [Table(list(rows[0]), rows), Gallery(shown)])]


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
        for path, _ in tokenizers:
            alt = "test images above their reconstructions"
            items.append(
                Figure(path / "reconstructions.png", "Test images, and what the tokens keep of them.", alt)
            )
    return [Section("Tokenizer", "", items)]


def _training(trained: Found) -> list[Section]:
    if not trained:
        return []
    logs = [(path.name, path / "metrics.jsonl") for path, _ in trained]
    rows = [
        {
            "model": path.name,
            "orders": "extracted" if "orders" in m["inputs"] else m["config"]["order"],
            "parameters": m["parameters"],
            "test nats/token": m["test_nll"],
            "training tokens": m["training_tokens"],
            "training s": m["training_seconds"],
        }
        for path, m in trained
    ]
    caption = (
        "Test nats/token: under the order of training, random for models fine-tuned on extracted orders."
    )
    picture = figures.loss_curves(logs, starts=[_steps_before(path, trained) for path, _ in trained])
    curves = Figure(
        picture, "Loss of the models; fine-tuning goes on where its start left off.", "loss curves"
    )
    return [Section("Training", "", [Table(list(rows[0]), rows, caption), curves])]


def _steps_before(path: Path, trained: Found) -> int:
    """Steps behind the model that a training started from."""
    own = dict(trained)[path]["inputs"].get("init")
    for other, manifest in trained:
        if manifest["fingerprint"] == own:
            return manifest["config"]["train"]["steps"] + _steps_before(other, trained)
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
