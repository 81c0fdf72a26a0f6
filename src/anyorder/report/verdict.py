"""Which order wins: one table and one sentence, written from manifests.

A variant wins against a baseline (samples in raster or random order) only if its Fréchet distance is lower,
with an interval over seeds and resampled images below zero, its mean KID is not higher, its mean recall
is not lower, and its samples are no copies of training images. Older comparisons hold no resamples: there
every seed's interval must be below zero.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import mean
from typing import Any

from anyorder.evaluation import bootstrap
from anyorder.report import evaluations
from anyorder.report.evaluations import Differences, Variant
from anyorder.report.tables import Table

BASELINES = ("raster", "random")


@dataclass(frozen=True)
class Comparison:
    """A variant against a baseline: pairs of evaluations of one run, and intervals of their distances."""

    variant: Variant
    baseline: Variant
    pairs: Sequence[tuple[evaluations.Evaluation, evaluations.Evaluation]]
    intervals: Sequence[bootstrap.Difference]

    @property
    def relative(self) -> float:
        """Difference of the mean Fréchet distances, relative to the baseline's."""
        return mean(a.distance for a, _ in self.pairs) / mean(b.distance for _, b in self.pairs) - 1

    def change(self, key: str) -> float:
        """Difference of the means of a metric."""
        return mean(a.metrics[key] for a, _ in self.pairs) - mean(b.metrics[key] for _, b in self.pairs)

    @property
    def interval(self) -> tuple[float, float] | None:
        """Of the mean difference, in percent of the baseline's mean; None without resamples of every seed."""
        lengths = {len(interval.draws) for interval in self.intervals}
        if len(self.intervals) < max(2, len(self.pairs)) or len(lengths) > 1 or 0 in lengths:
            return None
        low, high = bootstrap.pooled(self.intervals, self.level)
        scale = 100 / mean(b.distance for _, b in self.pairs)
        return scale * low, scale * high

    @property
    def level(self) -> float:
        """Confidence of the intervals, the highest where seeds differ."""
        return max(interval.confidence for interval in self.intervals)

    @property
    def outside(self) -> tuple[int, int]:
        """Seeds whose interval lies below zero, and above."""
        return sum(i.high < 0 for i in self.intervals), sum(i.low > 0 for i in self.intervals)

    @property
    def disagree(self) -> list[str]:
        """What KID, recall and copies of training images say against the sign of the distance."""
        kid, recall, below = self.change("kid"), self.change("recall"), self.relative < 0
        better = self.variant if below else self.baseline
        found = [f"{better.name} copies training images"] * any(pair[not below].copies for pair in self.pairs)
        if below:
            return ["KID is higher"] * (kid > 0) + ["recall is lower"] * (recall < 0) + found
        return ["KID is lower"] * (kid < 0) + ["recall is higher"] * (recall > 0) + found

    @property
    def outcome(self) -> str:
        """The verdict in a few words, for tables."""
        n, side = len(self.pairs), "lower" if self.relative < 0 else "higher"
        if n == 1:
            return "one seed"
        if len(self.intervals) < n:
            return "no intervals"
        interval = self.interval
        if interval[0] <= 0 <= interval[1] if interval else n not in self.outside:
            return "within noise"
        if self.disagree:
            return f"FD is {side}, but {' and '.join(self.disagree)}"
        return "wins" if self.relative < 0 else "loses"

    def sentence(self) -> str:
        """The verdict in one sentence."""
        name, n, (below, above) = self.variant.name, len(self.pairs), self.outside
        numbers = f"FD {100 * self.relative:+.1f} %, KID x 1000 {1000 * self.change('kid'):+.3g}"
        numbers += f", recall {self.change('recall'):+.3f}"
        if n == 1:
            return f"One seed: no verdict ({name} against {self.baseline.name}: {numbers})."
        counts = f"intervals of FD below zero in {below} and above zero in {above} of {n} seeds"
        if self.interval:
            counts = f"{100 * self.level:g} % interval over {n} seeds "
            counts += "{:+.1f} to {:+.1f} %".format(*self.interval)
        verdict = {
            "no intervals": "no verdict, as intervals (stage compare) are missing",
            "within noise": "the difference is within noise",
            "wins": f"{name} wins",
            "loses": f"{name} loses",
        }.get(self.outcome, f"no winner, as {self.outcome}")
        return f"{name} against {self.baseline.name}: {verdict} ({numbers}; {counts})."


def strongest_baseline(variants: Sequence[Variant]) -> Variant | None:
    """Of the samples in raster or random order those with the least mean distance."""
    return min((v for v in variants if v.policy in BASELINES), key=lambda v: v.distance, default=None)


def compare_with(variant: Variant, baseline: Variant, differences: Differences) -> Comparison | None:
    """Pairs of the same run; None if the two share no run."""
    theirs = {evaluation.run: evaluation for evaluation in baseline.evaluations}
    pairs = [(ours, theirs[ours.run]) for ours in variant.evaluations if ours.run in theirs]
    keys = [(a.manifest["fingerprint"], b.manifest["fingerprint"]) for a, b in pairs]
    intervals = [differences[key]["distance"] for key in keys if key in differences]
    return Comparison(variant, baseline, pairs, intervals) if pairs else None


def best_comparison(variants: Sequence[Variant], differences: Differences) -> Comparison | None:
    """The variant of least mean distance that is no baseline, against the strongest baseline."""
    baseline = strongest_baseline(variants)
    if baseline is None:
        return None
    others = sorted((v for v in variants if v.policy not in BASELINES), key=lambda v: v.distance)
    return next(filter(None, (compare_with(variant, baseline, differences) for variant in others)), None)


def verdict(variants: Sequence[Variant], differences: Differences) -> str:
    """One sentence about the best variant and the strongest baseline."""
    if strongest_baseline(variants) is None:
        return "No samples in raster or random order: no verdict."
    best = best_comparison(variants, differences)
    return best.sentence() if best else "No other samples share a run with the baseline: no verdict."


SHOWN = ("samples", "FD", "FID", "KID x 1000", "recall", "consistency")
"""Columns of the first table, as far as they were measured."""


def main_table(variants: Sequence[Variant], differences: Differences) -> Table:
    """Measures of every variant, its comparison with the strongest baseline, and the floor."""
    baseline = strongest_baseline(variants)
    members = [evaluation for variant in variants for evaluation in variant.evaluations]
    rows = [_row(variant, baseline, differences) for variant in variants]
    columns = [c for c in rows[0] if any(row[c] is not None for row in rows)]
    measures = [c for c in columns if c in evaluations.QUALITY]
    unknown = "not measured"
    floors = next((evaluation.floors for evaluation in members if evaluation.floors), {evaluations.FLOOR: {}})
    last = [
        {"samples": name, **{c: floor.get(c, None if c == "consistency" else unknown) for c in measures}}
        for name, floor in floors.items()
    ]
    seeds = " and ".join(map(str, sorted({len(v.evaluations) for v in variants})))
    spread = f"Mean ± standard deviation over {seeds} seeds. " if seeds != "1" else ""
    against = f"against the {members[0].split} split"
    pool = members[0].metrics.get("floor_split", "train")
    of = "training" if pool == "train" else "the validation split"
    caption = f"{spread}{evaluations.metric_names(members)} {against}; {evaluations.FLOOR}: of {of}."
    if any("(" in str(row.get(c)) for row in rows for c in columns if " against " in c):
        caption += " In brackets: the interval over resampled images, at 95 % unless another level is given."
    shown = [{c: row[c] for c in columns} for row in rows] + last
    return Table(columns, shown, caption, evaluations.best_of(rows, measures), unranked=len(last))


def _row(variant: Variant, baseline: Variant | None, differences: Differences) -> dict[str, Any]:
    row = variant.row()
    cells = {column: row[column] for column in SHOWN}
    if baseline is None:
        return cells
    found = compare_with(variant, baseline, differences) if variant is not baseline else None
    change = f"{100 * found.relative:+.1f} %" if found else None
    at = f" at {100 * found.level:g} %" if found and found.intervals and found.level != 0.95 else ""
    if found and found.interval:
        low, high = found.interval
        change = f"{change} ({low:+.1f} to {high:+.1f}{at})"
    elif found and len(found.pairs) == 1 and found.intervals:
        interval = evaluations.percent_interval(found.intervals[0])
        change = f"{change} ({interval}{at})" if interval else change
    return {**cells, f"FD against {baseline.name}": change, "verdict": found.outcome if found else None}
