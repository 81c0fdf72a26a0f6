"""Reports from manifests alone: made-up numbers in, the right words out, whoever wins."""

import json
from pathlib import Path
from typing import Any

import pytest

from anyorder.cli import main as cli
from anyorder.files import read_manifest
from anyorder.report.evaluations import group, read_differences, read_evaluations
from anyorder.report.records import copy_records, find_artifacts
from anyorder.report.summary import report
from anyorder.report.tables import MISSING, Spread, format_value

POLICIES = {"raster": "raster", "random": "random", "ordered": "entropy", "paper": "token_likelihood"}

TRAINED = {
    "config": {"order": "random", "train": {"steps": 1}},
    "parameters": 1, "test_nll": 1.0, "training_tokens": 1, "training_seconds": 1.0,
}  # fmt: skip
EXTRACTED = {
    "policy": "entropy", "rows": 9, "kendall_with_raster": 0.1, "mean_jump": 1.0, "position_entropy": [1.0],
    "mean_log_prob": -1.0,
}  # fmt: skip


def artifact(folder: Path, stage: str, inputs: dict[str, str] | None = None, **facts: Any) -> str:
    """Write a manifest and nothing else; its name is its fingerprint."""
    manifest = {"stage": stage, "config": {}, "inputs": inputs or {}, "fingerprint": folder.name}
    manifest |= {
        "seconds": 1.0,
        "examples_per_second": None,
        **(TRAINED if stage == "train" else {}),
        **facts,
    }
    folder.mkdir(parents=True)
    text = json.dumps(manifest)
    (folder / "manifest.json").write_text(text)
    return folder.name


def evaluation(out: Path, name: str, distance: float, recall: float = 0.8, **more: Any) -> None:
    policy = POLICIES[name.partition("-")[0]]
    artifact(
        out / f"eval-{name}",
        "eval",
        {"model": more.pop("model", "nowhere")},
        metrics={
            "fd": distance, "kid": 0.001, "precision": 0.7, "recall": recall, "inception_score": 3.0,
            "nll": None if policy in ("random", "token_likelihood") else 2.5, "bits_per_dim": None,
            "policy": policy, "scorer": None, "token_blind": policy != "token_likelihood",
            "seconds_per_image": 0.06 if policy == "entropy" else 0.01, "training_tokens": 1_000_000,
            "training_seconds": 100.0, "metric_name": "FD (classifier-0)", "notes": [],
            "class_coverage": 0.9, "nearest_training_ratio": 0.98, "nearest_training_share": 0.02,
            "token_copies": 0.005, "token_copies_of_test": 0.01, **more,
        },
    )  # fmt: skip


def comparison(out: Path, a: str, b: str, low: float, high: float) -> None:
    middle = (low + high) / 2
    interval = {"difference": middle, "low": low, "high": high}
    interval |= {"relative": middle / 2, "relative_low": low / 2, "relative_high": high / 2}
    artifact(
        out / f"compare-{a}-{b}",
        "compare",
        {"a": f"eval-{a}", "b": f"eval-{b}"},
        a=f"eval-{a}",
        b=f"eval-{b}",
        config={"confidence": 0.95},
        metrics={"distance": {"a": 1.0, "b": 2.0, **interval}},
    )


def repeated(out: Path, **distances: list[float]) -> Path:
    for name, values in distances.items():
        for seed, distance in enumerate(values):
            evaluation(out, f"{name}-s{seed}", distance)
    return out


def markdown(out: Path) -> str:
    report([out], out.parent / "r.md")
    return (out.parent / "r.md").read_text(encoding="utf-8")


def paragraph(text: str, start: str) -> str:
    return next(line for line in text.splitlines() if line.startswith(start))


def test_when_an_inferred_order_wins(tmp_path):
    out = repeated(tmp_path / "run", raster=[2.0, 2.2], random=[4.0, 4.4], ordered=[1.0, 1.2])
    comparison(out, "ordered-s0", "raster-s0", -1.2, -0.8)
    comparison(out, "raster-s1", "ordered-s1", 0.5, 1.5)  # made the other way round
    text = markdown(out)
    first = paragraph(text, "Distance to the test split (FD (classifier-0), mean over 2 seeds)")
    assert first.endswith("lowest first: ordered 1.100, raster 2.100, random 4.200.")
    won = paragraph(text, "Lower mean distance than raster order (raster): ordered.")
    assert "in every seed: ordered; with an interval below zero in every seed: ordered;" in won
    assert won.endswith("recall that is not lower: ordered.")
    own = paragraph(text, "ordered (entropy, 2 seeds):")
    assert "Against raster, 47.6 % lower in mean distance (by seed -50.0 %, -45.5 %)" in own
    assert "lower in 2 of 2 seeds. Bootstrap intervals -60.0 to -40.0 %; " in own
    assert "%: below zero in 2 of 2." in own
    assert (
        "Recall is the same (0.800 against 0.800), class coverage is the same (0.900 against 0.900)." in own
    )
    assert "are 0.98 times as far from the nearest training image as test images are; 0.50 % have" in own
    assert "Against random, 73.8 % lower" in own
    assert "No interval was computed." in own
    assert "6.00 times the time per image of raster, and the same number of training tokens." in own
    assert "Exact likelihood: 2.500 nats/token." in own


def test_when_raster_wins(tmp_path):
    out = repeated(tmp_path / "run", raster=[1.0, 1.2], random=[4.0, 4.4], ordered=[2.0, 4.5])
    comparison(out, "ordered-s0", "raster-s0", 0.8, 1.2)
    comparison(out, "ordered-s1", "raster-s1", -0.1, 0.2)
    text = markdown(out)
    assert "No variant has a lower mean distance than raster order (raster)." in text
    own = paragraph(text, "ordered (entropy")
    assert "higher in 2 of 2 seeds" in own
    assert "%: above zero in 1, holding zero in 1 of 2." in own
    against_random = paragraph(text, "Lower mean distance than random order (random): raster, ordered.")
    assert "in every seed: raster;" in against_random
    assert "with an interval below zero in every seed: none;" in against_random


def test_a_lower_distance_at_a_lower_recall_is_said(tmp_path):
    out = tmp_path / "run"
    evaluation(out, "raster", 2.0)
    evaluation(out, "ordered", 1.0, recall=0.7)
    comparison(out, "ordered", "raster", -1.2, 0.1)
    text = markdown(out)
    assert paragraph(text, "Lower mean").endswith("with a mean recall that is not lower: none.")
    assert "Recall is 0.100 lower (0.700 against 0.800)," in text
    assert "Bootstrap interval -60.0 to +5.0 %: holding zero in 1 of 1." in text
    assert "No samples were drawn in random order" in text
    assert "With a single seed nothing is known" in text
    assert "over seeds" not in text.split("## Raster, random and ordered")[1]


def test_a_peeking_policy_never_gets_a_number(tmp_path):
    out = tmp_path / "run"
    evaluation(out, "raster", 2.0)
    evaluation(out, "paper", 9.0, nll=1.25, bound=1.25, bound_tokens=1.25, bits_per_dim=1.25)
    text = markdown(out)
    assert "1.25" not in text
    assert "not a likelihood." in paragraph(text, "paper (token_likelihood")
    row = next(line for line in text.splitlines() if line.startswith("| paper |") and "likelihood |" in line)
    assert "| not a likelihood |" in row


def test_bounds_and_exact_likelihoods_are_apart(tmp_path):
    out = tmp_path / "run"
    evaluation(out, "raster", 2.0)
    evaluation(out, "ordered", 1.0, nll=None, bound=3.5, bound_tokens=3.25, bound_location=0.25)
    text = markdown(out)
    assert "At most 3.500 nats/token (a bound: 3.250 for tokens, 0.2500 for locations)." in text
    header = next(line for line in text.splitlines() if "nats/token (bound)" in line and "s/image" in line)
    rows = dict(line.strip("| ").split(" | ", 1) for line in text.split(header)[1].splitlines()[2:4])
    columns = header.strip("| ").split(" | ")[1:]
    ordered = dict(zip(columns, rows["ordered"].split(" | "), strict=True))
    assert (ordered["nats/token (exact)"], ordered["nats/token (bound)"]) == (MISSING, "3.500")
    assert dict(zip(columns, rows["raster"].split(" | "), strict=True))["nats/token (bound)"] == MISSING


def test_extraction_is_counted_once_along_the_chain(tmp_path):
    """Two rounds: the second extraction's model is also what the last training starts from."""
    out = tmp_path / "run"
    artifact(out / "any", "train")
    artifact(out / "orders-1", "orders", {"model": "any"}, extraction_evaluations=100, **EXTRACTED)
    artifact(out / "first", "train", {"init": "any", "orders": "orders-1"})
    artifact(out / "orders-2", "orders", {"model": "first"}, extraction_evaluations=30, **EXTRACTED)
    artifact(out / "second", "train", {"init": "first", "orders": "orders-2"})
    artifact(out / "told", "train", {"init": "second"}, extraction_evaluations=7)
    for number, model in enumerate(("any", "first", "second", "told")):
        evaluation(out, f"ordered-{model}", 1.0 + number, model=model)
    evaluation(out, "ordered-itself", 9.0, extraction_evaluations=5, model="second")
    evaluation(out, "raster", 2.0)
    text = markdown(out)
    assert "; 130 position evaluations, once, to extract its orders." in paragraph(text, "ordered-second (")
    found = {e.name: e.extraction for e in read_evaluations(find_artifacts([out]))}
    expected = {"any": None, "first": 100, "second": 130, "told": 7, "itself": 5}
    assert found == {"raster": None, **{f"ordered-{name}": value for name, value in expected.items()}}


def test_seeds_are_grouped_with_mean_and_spread(tmp_path):
    out = repeated(tmp_path / "run", raster=[1.0, 2.0, 3.0], random=[4.0])
    evaluation(out, "ordered", 5.0, scorer="any-s0")
    variants = group(read_evaluations(find_artifacts([out])))
    rows = {variant.name: variant.row() for variant in variants}
    assert (rows["raster"]["distance"], rows["raster"]["distance"].deviation) == (2, 1)
    assert (rows["raster"]["seeds"], rows["raster"]["training tokens"]) == (3, 1_000_000)
    assert rows["random"]["distance"] == 4
    assert rows["ordered"]["order"] == "entropy by any"
    text = markdown(out)
    assert "2.000 ± 1.000" in text
    assert "## Orders, over seeds" in text


def test_a_variant_without_seeds_shared_with_the_baseline(tmp_path):
    out = tmp_path / "run"
    evaluation(out, "raster-s0", 2.0)
    evaluation(out, "ordered-s1", 1.0)
    assert "Nothing else was evaluated with the seeds of raster order (raster)." in markdown(out)
    evaluation(out, "raster", 3.0)  # one of no seed stands for all
    assert "Lower mean distance than raster order (raster): ordered." in markdown(out)


def test_differences_are_read_both_ways(tmp_path):
    out = repeated(tmp_path / "run", raster=[2.0], ordered=[1.0])
    comparison(out, "ordered-s0", "raster-s0", -1.2, -0.8)
    found = read_differences(find_artifacts([out]))
    back = found["eval-raster-s0", "eval-ordered-s0"]["distance"]
    assert (back.low, back.high) == (0.8, 1.2)
    assert back.relative == pytest.approx(1)
    text = markdown(out)
    row = paragraph(text, "| ordered-s0 | raster-s0 | distance |")
    assert "| -1.2 to -0.8 |" in row
    assert "| -60.0 to -40.0 | yes |" in row


def test_several_runs_are_concluded_upon_apart(tmp_path):
    for name, distance in (("one", 1.0), ("two", 3.0)):
        evaluation(tmp_path / name, "raster", 2.0)
        evaluation(tmp_path / name, "ordered", distance)
    report([tmp_path / "one", tmp_path / "two"], tmp_path / "r.md")
    one, two = (tmp_path / "r.md").read_text().split("## Conclusions: ")[1:3]
    assert "Lower mean distance than raster order" in one
    assert "No variant has a lower mean distance than raster order" in two


@pytest.mark.parametrize(
    ("values", "text"),
    [([0.2, 0.3], "0.2500 ± 0.0707"), ([5.0], "5.000 ± 0.000"), ([-1.0, -3.0], "-2.000 ± 1.414")],
)
def test_spreads_are_shown_to_the_decimals_of_the_mean(values, text):
    assert format_value(Spread.of(values)) == text


def test_records_are_manifests_and_logs(tmp_path):
    out = repeated(tmp_path / "run", raster=[2.0], ordered=[1.0])
    artifact(out / "model", "train")
    (out / "model" / "metrics.jsonl").write_text('{"step": 1, "loss": 1.0}\n')
    (out / "model" / "picture.png").write_bytes(b"x")
    (out / "model" / "model.safetensors").write_bytes(b"x")
    records = tmp_path / "records"
    assert cli.main(["report", str(out), f"out={tmp_path}/a.md", f"manifests={records}"]) == 0
    files = sorted(str(path.relative_to(records)) for path in records.rglob("*") if path.is_file())
    assert files == [
        "eval-ordered-s0/manifest.json",
        "eval-raster-s0/manifest.json",
        "model/manifest.json",
        "model/metrics.jsonl",
    ]
    assert cli.main(["report", str(records), f"out={tmp_path}/b.md"]) == 0
    original, copy = ((tmp_path / name).read_text().split("\n", 1)[1] for name in ("a.md", "b.md"))
    assert original == copy
    assert "finished" in read_manifest(records / "model")
    assert cli.main(["report", str(records), f"out={tmp_path}/b.html"]) == 0
    assert "loss curves" in (tmp_path / "b.html").read_text()
    copy_records([out, records], tmp_path / "both")
    assert (tmp_path / "both" / "records" / "model" / "manifest.json").is_file()


def test_artifacts_come_in_the_sequence_in_which_they_were_finished(tmp_path):
    """Whatever the times of the files say, which do not survive a copy."""
    for name, time in (("a", "2026-01-03"), ("b", "2026-01-01"), ("c", "2026-01-02")):
        artifact(tmp_path / "run" / name, "pipeline", finished=f"{time}T00:00:00.000+00:00")
    assert [path.name for path, _ in find_artifacts([tmp_path / "run"])] == ["b", "c", "a"]
