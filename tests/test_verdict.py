"""Reports from manifests alone: made-up numbers in, the right table and verdict out, whoever wins."""

import itertools
import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from anyorder.cli import main as cli
from anyorder.report import evaluations
from anyorder.report.summary import report
from anyorder.report.tables import MISSING, Spread, format_value

COUNTER = itertools.count()
POLICIES = {"raster": "raster", "random": "random", "ordered": "entropy", "paper": "token_likelihood"}

TRAINED = {
    "config": {"order": "random", "train": {"steps": 1}},
    "parameters": 1, "test_nll": 1.0, "training_tokens": 1, "training_seconds": 1.0,
}  # fmt: skip
EXTRACTED = {
    "policy": "entropy", "rows": 9, "kendall_with_raster": 0.1, "mean_jump": 1.0, "position_entropy": [1.0],
    "mean_log_prob": -1.0,
}  # fmt: skip


def artifact(folder: Path, stage: str, inputs: dict[str, str] | None = None, **facts: Any) -> None:
    """Write a manifest and nothing else; run and name are its fingerprint."""
    manifest = {
        "stage": stage,
        "config": {},
        "files": {},
        "inputs": inputs or {},
        "finished": f"2026-01-01T00:00:00.{next(COUNTER):06d}+00:00",
        "fingerprint": f"{folder.parent.name}/{folder.name}",
    }
    manifest |= {
        "seconds": 1.0,
        "examples_per_second": None,
        **(TRAINED if stage == "train" else {}),
        **facts,
    }
    folder.mkdir(parents=True)
    text = json.dumps(manifest)
    (folder / "manifest.json").write_text(text)


def evaluation(out: Path, name: str, distance: float, recall: float = 0.8, **more: Any) -> None:
    policy = POLICIES[name.partition("-")[0]]
    artifact(
        out / f"eval-{name}",
        "eval",
        {"model": more.pop("model", "nowhere"), "features": more.pop("features", "nowhere")},
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


def comparison(run: Path, a: str, b: str, low: float, high: float, draws: tuple[float, ...] = ()) -> None:
    middle = (low + high) / 2
    interval = {"difference": middle, "low": low, "high": high, "draws": draws}
    interval |= {"relative": middle / 2, "relative_low": low / 2, "relative_high": high / 2}
    artifact(
        run / f"compare-{a}-{b}",
        "compare",
        {"a": f"{run.name}/eval-{a}", "b": f"{run.name}/eval-{b}"},
        a=f"eval-{a}",
        b=f"eval-{b}",
        config={"confidence": 0.95},
        metrics={"distance": {"a": 1.0, "b": 2.0, **interval}},
    )


def seeded(
    folder: Path, intervals: tuple[tuple[float, float], ...] = (), **distances: list[float]
) -> list[Path]:
    """Runs of one experiment, one for each seed; intervals are of ordered against raster."""
    runs = [folder / f"s{seed}" for seed in range(len(next(iter(distances.values()))))]
    for seed, run in enumerate(runs):
        for name, values in distances.items():
            evaluation(run, name, values[seed])
    for run, interval in zip(runs, intervals, strict=False):
        comparison(run, "ordered", "raster", *interval)
    return runs


def changed(run: Path, name: str, **metrics: Any) -> None:
    """Change results of an evaluation."""
    path = run / f"eval-{name}" / "manifest.json"
    manifest = json.loads(path.read_text())
    manifest["metrics"] |= metrics
    path.write_text(json.dumps(manifest))


def markdown(*runs: Path) -> str:
    report(runs, runs[0].parent / "r.md")
    return (runs[0].parent / "r.md").read_text(encoding="utf-8")


def rows(text: str, section: str) -> dict[str, dict[str, str]]:
    """The first table of a section, by the name of the row."""
    lines = text.split(f"## {section}\n")[1].split("## ")[0].splitlines()
    header, _, *cells = [line.strip("| ").split(" | ") for line in lines if line.startswith("|")]
    table = [dict(zip(header, row, strict=True)) for row in cells if len(row) == len(header)]
    return {row[header[0]]: row for row in table}


def line(text: str, part: str) -> str:
    return next(found for found in text.splitlines() if part in found)


BELOW, ACROSS, ABOVE = (-1.2, -0.8), (-0.1, 0.2), (0.8, 1.2)


def test_an_order_wins_if_every_measure_and_every_seed_says_so(tmp_path):
    runs = seeded(tmp_path, (BELOW, BELOW), raster=[2.0, 2.2], random=[4.0, 4.4], ordered=[1.0, 1.2])
    text = markdown(*runs)
    verdict = line(text, "ordered against raster:")
    assert verdict == (
        "ordered against raster: ordered wins (FD -47.6 %, KID x 1000 +0, recall +0.000; "
        "intervals of FD below zero in 2 and above zero in 0 of 2 seeds)."
    )
    table = rows(text, "Results")
    assert [*table] == ["raster", "random", "ordered", "real images"]
    assert table["ordered"]["FD"] == "**1.100 \u00b1 0.141**"
    assert table["ordered"]["verdict"] == "wins"
    assert table["ordered"]["FD against raster"] == "-47.6 %"
    assert table["random"]["verdict"] == "no intervals"
    assert table["raster"]["verdict"] == MISSING


def test_resamples_of_all_seeds_make_one_interval(tmp_path):
    runs = seeded(tmp_path, raster=[2.0, 2.2], ordered=[1.0, 1.2])
    for run, (low, high) in zip(runs, (BELOW, (-2.1, 0.1)), strict=True):  # alone, one seed is within noise
        comparison(run, "raster", "ordered", -high, -low, tuple(np.linspace(-high, -low, 21)))
    text = markdown(*runs)
    found = line(text, "ordered against raster: ordered wins")
    low, high = map(float, re.search(r"interval over 2 seeds ([-+.\d]+) to ([-+.\d]+) %", found).groups())
    assert -95 < low < -47.6 < high < 0
    assert rows(text, "Results")["ordered"]["FD against raster"] == f"-47.6 % ({low:+.1f} to {high:+.1f})"
    changed(runs[0], "ordered", kid=0.002)
    assert "no winner, as FD is lower, but KID is higher" in markdown(*runs)


def test_floors_of_the_samples_are_rows_and_spaces_have_tables_of_their_own(tmp_path):
    floors = {
        "real images": {"distance": 0.25, "kid": 0.0005, "recall": 0.875},
        "reconstructions": {"distance": 0.5, "kid": 0.001, "recall": 0.75},
    }
    run = tmp_path / "run"
    for name, distance in (("raster", 2.0), ("ordered", 0.75)):
        evaluation(run, name, distance, floors=floors)
        evaluation(run, f"{name}-validation", 9 * distance, split="validation")
        evaluation(run, f"{name}-lite", 99 * distance, metric_name="FD (efficientnet-lite0)")
    text = markdown(run)
    table = rows(text, "Results: FD (classifier-0), test split")
    assert [*table] == ["raster", "ordered", "real images", "reconstructions"]
    assert (table["reconstructions"]["FD"], table["reconstructions"]["KID x 1000"]) == ("0.5000", "1.000")
    assert [*rows(text, "Results: FD (classifier-0), validation split")][:2] == [
        "raster-validation", "ordered-validation"
    ]  # fmt: skip
    assert [*rows(text, "Results: FD (efficientnet-lite0), test split")][:2] == [
        "raster-lite",
        "ordered-lite",
    ]


def test_a_comparison_that_was_made_the_other_way_round_counts(tmp_path):
    runs = seeded(tmp_path, (BELOW,), raster=[2.0, 2.2], ordered=[1.0, 1.2])
    comparison(runs[1], "raster", "ordered", 0.8, 1.2)
    assert "ordered wins" in markdown(*runs)


def test_when_raster_wins(tmp_path):
    runs = seeded(tmp_path, (ABOVE, ABOVE), raster=[1.0, 1.2], random=[4.0, 4.4], ordered=[2.0, 4.5])
    text = markdown(*runs)
    assert "ordered against raster: ordered loses (FD +195.5 %" in text
    assert "above zero in 2 of 2 seeds" in text


def test_one_interval_that_holds_zero_is_noise(tmp_path):
    runs = seeded(tmp_path, (BELOW, ACROSS), raster=[2.0, 2.2], ordered=[1.0, 1.2])
    text = markdown(*runs)
    assert "the difference is within noise" in line(text, "ordered against raster:")
    assert "below zero in 1 and above zero in 0 of 2 seeds" in text
    assert rows(text, "Results")["ordered"]["verdict"] == "within noise"


@pytest.mark.parametrize(
    ("metrics", "reasons"),
    [
        ({"kid": 0.002}, "KID is higher"),
        ({"recall": 0.7}, "recall is lower"),
        ({"kid": 0.002, "recall": 0.7}, "KID is higher and recall is lower"),
        ({"token_copies": 0.2}, "ordered copies training images"),
    ],
)
def test_measures_that_disagree_are_named(tmp_path, metrics, reasons):
    runs = seeded(tmp_path, (BELOW, BELOW), raster=[2.0, 2.2], ordered=[1.0, 1.2])
    changed(runs[1], "ordered", **metrics)
    text = markdown(*runs)
    assert f"no winner, as FD is lower, but {reasons} (FD -47.6 %" in line(text, "ordered against raster:")
    assert rows(text, "Results")["ordered"]["verdict"] == f"FD is lower, but {reasons}"


def test_a_higher_distance_may_be_disagreed_with_too(tmp_path):
    runs = seeded(tmp_path, (ABOVE, ABOVE), raster=[1.0, 1.2], ordered=[2.0, 2.2])
    changed(runs[0], "ordered", kid=0.0, recall=0.9, token_copies=0.2)
    assert "as FD is higher, but KID is lower and recall is higher (" in markdown(*runs)
    changed(runs[1], "raster", token_copies=0.2)
    assert "as FD is higher, but KID is lower and recall is higher and raster copies tr" in markdown(*runs)


def test_better_kid_and_recall_do_not_stand_in_the_way(tmp_path):
    runs = seeded(tmp_path, (BELOW, BELOW), raster=[2.0, 2.2], ordered=[1.0, 1.2])
    changed(runs[0], "ordered", kid=0.0, recall=0.9)
    assert "ordered wins" in markdown(*runs)


def test_one_seed_gives_no_verdict(tmp_path):
    (run,) = seeded(tmp_path, (BELOW,), raster=[2.0], ordered=[1.0])
    text = markdown(run)
    verdict = "One seed: no verdict (ordered against raster: FD -50.0 %, KID x 1000 +0, recall +0.000)."
    assert line(text, "One seed") == verdict
    row = rows(text, "Results")["ordered"]
    assert (row["verdict"], row["FD against raster"]) == ("one seed", "-50.0 % (-60.0 to -40.0)")
    assert "over seeds" not in text


def test_without_baseline_or_rival_there_is_no_verdict(tmp_path):
    evaluation(tmp_path / "a", "ordered", 1.0)
    assert "No samples in raster or random order: no verdict." in markdown(tmp_path / "a")
    evaluation(tmp_path / "b", "raster", 1.0)
    assert "No other samples share a run with the baseline: no verdict." in markdown(tmp_path / "b")
    assert "No other samples share a run" in markdown(tmp_path / "a", tmp_path / "b")


def test_without_intervals_there_is_no_verdict(tmp_path):
    text = markdown(*seeded(tmp_path, raster=[2.0, 2.2], ordered=[1.0, 1.2]))
    assert "no verdict, as intervals (stage compare) are missing" in text


def test_the_strongest_baseline_counts(tmp_path):
    runs = seeded(tmp_path, raster=[3.0, 3.0], random=[2.0, 2.0], ordered=[1.0, 1.0], paper=[9.0, 9.0])
    text = markdown(*runs)
    assert "ordered against random" in text
    assert rows(text, "Results")["paper"]["FD against random"] == "+350.0 %"


def test_the_floor_is_that_of_the_features(tmp_path):
    run = tmp_path / "run"
    artifact(run / "features", "features", distance_of_training_images=0.5)
    evaluation(run, "raster", 2.0, features="run/features")
    evaluation(run, "ordered", 0.75, features="run/features")
    table = rows(markdown(run), "Results")
    floor = table["real images"]
    assert (floor["FD"], floor["KID x 1000"], floor["recall"]) == ("0.5000", "not measured", "not measured")
    assert table["ordered"]["FD"] == "**0.7500**"  # the floor is no competitor
    measured = {"fd": 0.25, "kid": 0.0005, "recall": 0.875}
    artifact(tmp_path / "new" / "features", "features", distance_of_training_images=0.5, floor=measured)
    evaluation(tmp_path / "new", "raster", 2.0, features="new/features")
    floor = rows(markdown(tmp_path / "new"), "Results")["real images"]
    assert (floor["FD"], floor["KID x 1000"], floor["recall"]) == ("0.2500", "0.5000", "0.8750")
    evaluation(tmp_path / "apart", "raster", 2.0)
    path = tmp_path / "apart" / "eval-raster" / "manifest.json"
    manifest = json.loads(path.read_text()) | {"input_folders": {"features": "../../new/features"}}
    path.write_text(json.dumps(manifest))
    assert rows(markdown(tmp_path / "apart"), "Results")["real images"]["recall"] == "0.8750"
    evaluation(tmp_path / "old", "raster", 2.0)
    assert rows(markdown(tmp_path / "old"), "Results")["real images"]["FD"] == "not measured"


def test_a_peeking_policy_never_gets_a_number(tmp_path):
    run = tmp_path / "run"
    evaluation(run, "raster", 2.0)
    evaluation(run, "paper", 9.0, nll=1.25, bound=1.25, bound_tokens=1.25, bits_per_dim=1.25)
    text = markdown(run)
    assert "1.25" not in text
    assert "| not a likelihood |" in line(text, "| paper | token_likelihood | no | not")


def test_bounds_and_exact_likelihoods_are_apart(tmp_path):
    run = tmp_path / "run"
    evaluation(run, "raster", 2.0)
    evaluation(run, "ordered", 1.0, nll=None, bound=3.5, bound_tokens=3.25, bound_location=0.25)
    text = markdown(run)
    header = next(
        found for found in text.splitlines() if "nats/token (bound)" in found and "s/image" in found
    )
    columns = header.strip("| ").split(" | ")
    cells = [found.strip("| ").split(" | ") for found in text.split(header)[1].splitlines()[2:4]]
    found = {row[0]: dict(zip(columns, row, strict=True)) for row in cells}
    raster, ordered = found["raster"], found["ordered"]
    assert (ordered["nats/token (exact)"], ordered["nats/token (bound)"]) == (MISSING, "3.500")
    assert (ordered["bound: tokens"], ordered["bound: locations"]) == ("3.250", "0.2500")
    assert raster["nats/token (bound)"] == MISSING


def test_the_likelihood_of_random_orders_is_a_bound(tmp_path):
    evaluation(tmp_path / "run", "random", 1.0, nll=3.5, nll_is_bound=True)
    text = markdown(tmp_path / "run")
    assert "nats/token (exact) | nats/token" not in text
    assert "| random | random | yes | 3.500 |" in text
    assert "| samples | order | token-blind | nats/token (bound) |" in text


def test_extraction_is_counted_once_along_the_chain(tmp_path):
    """Two rounds: the second extraction's model is also the start of the last training."""
    run = tmp_path / "run"
    artifact(run / "any", "train")
    artifact(run / "orders-1", "orders", {"model": "run/any"}, extraction_evaluations=100, **EXTRACTED)
    artifact(run / "first", "train", {"init": "run/any", "orders": "run/orders-1"})
    artifact(run / "orders-2", "orders", {"model": "run/first"}, extraction_evaluations=30, **EXTRACTED)
    artifact(run / "second", "train", {"init": "run/first", "orders": "run/orders-2"})
    artifact(run / "told", "train", {"init": "run/second"}, extraction_evaluations=7)
    for number, model in enumerate(("any", "first", "second", "told")):
        evaluation(run, f"ordered-{model}", 1.0 + number, model=f"run/{model}")
    evaluation(run, "ordered-itself", 9.0, extraction_evaluations=5, model="run/second")
    evaluation(run, "raster", 2.0)
    assert " 130 |" in line(markdown(run), "| ordered-second | entropy | yes | 2.500 |")
    found = {e.name: e.extraction for e in evaluations.read_evaluations(evaluations.find_artifacts([run]))}
    expected = {"any": None, "first": 100, "second": 130, "told": 7, "itself": 5}
    assert found == {"raster": None, **{f"ordered-{name}": value for name, value in expected.items()}}


def test_runs_are_the_seeds_of_a_variant_with_mean_and_spread(tmp_path):
    runs = seeded(tmp_path, raster=[1.0, 2.0, 3.0])
    evaluation(runs[0], "random", 4.0)
    evaluation(runs[0], "ordered", 5.0, scorer="any")
    found = evaluations.read_evaluations(evaluations.find_artifacts(runs))
    variants = {variant.name: variant.row() for variant in evaluations.group(found)}
    assert (variants["raster"]["FD"], variants["raster"]["FD"].deviation) == (2, 1)
    assert (variants["raster"]["seeds"], variants["raster"]["training tokens"]) == (3, 1_000_000)
    assert variants["random"]["FD"] == 4
    assert variants["ordered"]["order"] == "entropy by any"
    text = markdown(*runs)
    assert "2.000 ± 1.000" in text
    assert "## All measures, over seeds" in text
    assert "Mean ± standard deviation over 1 and 3 seeds." in text


def test_what_several_runs_have_is_named_with_its_run(tmp_path):
    runs = seeded(tmp_path, (BELOW, ABOVE), raster=[2.0, 1.0], ordered=[1.0, 2.0])
    for run in runs:
        artifact(run / "any", "train")
        artifact(run / "samples-raster", "sample")
        Image.new("RGB", (4, 4)).save(run / "samples-raster/grid.png")
    artifact(runs[0] / "alone", "train")
    text = markdown(*runs)
    assert [*rows(text, "Training")] == ["s0/any", "alone", "s1/any"]
    assert [*rows(text, "Differences")] == ["s0", "s1"]
    report(runs, tmp_path / "r.html")
    assert re.findall(r"s./raster", (tmp_path / "r.html").read_text()) == ["s0/raster", "s1/raster"]


def test_names_tell_runs_of_one_name_apart():
    paths = [
        Path(text)
        for text in ("a/run/any", "b/run/any", "b/run/round-1/model", "b/more/round-1/model", "b/run/x")
    ]
    found = [*evaluations.labels(paths).values()]
    assert found == ["a/run/any", "b/run/any", "run/round-1/model", "more/round-1/model", "x"]


def test_a_run_that_is_given_twice_is_one_seed(tmp_path):
    (run,) = seeded(tmp_path, raster=[1.0])
    copy = tmp_path / "copy"
    shutil.copytree(run, copy)
    assert "over seeds" not in markdown(run, copy)


def test_pairs_are_of_one_run(tmp_path):
    runs = seeded(tmp_path, raster=[1.0, 8.0])
    evaluation(runs[1], "ordered", 4.0)
    assert "ordered against raster: FD -50.0 %" in markdown(*runs)


def test_differences_are_read_both_ways(tmp_path):
    (run,) = seeded(tmp_path, (BELOW,), raster=[2.0], ordered=[1.0])
    found = evaluations.read_differences(evaluations.find_artifacts([run]))
    back = found["s0/eval-raster", "s0/eval-ordered"]["distance"]
    assert (back.low, back.high) == (0.8, 1.2)
    assert back.relative == pytest.approx(1)
    row = line(markdown(run), "| ordered | raster | distance |")
    assert "| -1.2 to -0.8 |" in row
    assert "| -60.0 to -40.0 | yes |" in row


@pytest.mark.parametrize(
    ("values", "text"),
    [([0.2, 0.3], "0.2500 ± 0.0707"), ([5.0], "5.000 ± 0.000"), ([-1.0, -3.0], "-2.000 ± 1.414")],
)
def test_spreads_are_shown_to_the_decimals_of_the_mean(values, text):
    assert format_value(Spread.of(values)) == text


def test_manifests_and_logs_are_enough(tmp_path):
    (run,) = seeded(tmp_path, raster=[2.0], ordered=[1.0])
    artifact(run / "model", "train")
    (run / "model" / "metrics.jsonl").write_text('{"step": 1, "loss": 1.0}\n')
    assert cli.main(["report", str(run), f"out={tmp_path}/b.html"]) == 0
    page = (tmp_path / "b.html").read_text()
    assert "loss curves" in page
    assert page.index("One seed: no verdict") < page.index("<details>")
    assert cli.main(["report", str(run), f"out={tmp_path}/b.json"]) == 0
    tables = json.loads((tmp_path / "b.json").read_text())["tables"]
    assert tables[0]["rows"][1]["FD"] == 1.0


def test_the_page_opens_with_the_images_of_the_baselines_and_the_best(tmp_path):
    (run,) = seeded(tmp_path, raster=[2.0], random=[3.0], ordered=[1.0], paper=[9.0])
    for name in ("raster", "random", "ordered", "paper"):
        artifact(run / f"samples-{name}", "sample")
        changed_inputs = run / f"eval-{name}" / "manifest.json"
        manifest = json.loads(changed_inputs.read_text())
        manifest["inputs"]["samples"] = f"s0/samples-{name}"
        changed_inputs.write_text(json.dumps(manifest))
        Image.new("RGB", (4, 4)).save(run / f"samples-{name}" / "grid.png")
    report([run], tmp_path / "r.html")
    opening, folded = (tmp_path / "r.html").read_text().split("<details>", 1)
    assert [name for name in POLICIES if f"samples: samples-{name}" in opening] == [
        "raster",
        "random",
        "ordered",
    ]
    assert "Samples: samples-paper" in folded


def test_artifacts_come_in_the_sequence_in_which_they_were_finished(tmp_path):
    """Whatever the times of the files say, which do not survive a copy."""
    for name, time in (("a", "2026-01-03"), ("b", "2026-01-01"), ("c", "2026-01-02")):
        artifact(tmp_path / "run" / name, "pipeline", finished=f"{time}T00:00:00.000+00:00")
    assert [path.name for path, _ in evaluations.find_artifacts([tmp_path / "run"])] == ["b", "c", "a"]
