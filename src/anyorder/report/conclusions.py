"""What the numbers say, in plain words: which order, how much better, at what cost, how sure.

Every sentence is written from manifests, whatever wins. Baselines are known by their policy: samples in
raster order, and in random order.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import mean
from typing import Any

from anyorder.evaluation.bootstrap import Difference
from anyorder.report.evaluations import NO_LIKELIHOOD, Differences, Evaluation, Variant, percent_interval
from anyorder.report.page import Section
from anyorder.report.tables import Table, format_value

BASELINES = ("raster", "random")


@dataclass(frozen=True)
class Match:
    """One variant against a baseline: evaluations of equal seed, and the comparison of each pair if made."""

    variant: Variant
    baseline: Variant
    pairs: Sequence[tuple[Evaluation, Evaluation]]
    differences: Sequence[dict[str, Difference] | None]

    @property
    def relative(self) -> float:
        """Difference of the mean distances over the pairs, relative to the baseline's."""
        ours, theirs = (mean(pair[side].distance for pair in self.pairs) for side in (0, 1))
        return ours / theirs - 1

    @property
    def per_seed(self) -> list[float]:
        """The same for each pair."""
        return [ours.distance / theirs.distance - 1 for ours, theirs in self.pairs]

    @property
    def lower(self) -> int:
        """Number of pairs with a lower distance than the baseline's."""
        return sum(value < 0 for value in self.per_seed)

    @property
    def compared(self) -> list[Difference]:
        """The differences in distance that have an interval."""
        return [found["distance"] for found in self.differences if found]

    @property
    def surely_lower(self) -> int:
        """Number of pairs whose interval lies below zero."""
        return sum(difference.high < 0 for difference in self.compared)

    @property
    def surely_higher(self) -> int:
        """Number of pairs whose interval lies above zero."""
        return sum(difference.low > 0 for difference in self.compared)

    def change(self, key: str) -> float | None:
        """Mean difference of a metric over the pairs, None where one of them has none."""
        sides = [[pair[side].metrics.get(key) for pair in self.pairs] for side in (0, 1)]
        ours, theirs = ([value for value in side if value is not None] for side in sides)
        return mean(ours) - mean(theirs) if len(ours) == len(theirs) == len(self.pairs) else None

    def ratio(self, key: str) -> float | None:
        """Ratio of the means of a metric over the pairs; None where the baseline is 0."""
        ours, theirs = (mean(pair[side].metrics[key] for pair in self.pairs) for side in (0, 1))
        return ours / theirs if theirs else None


def conclusions(variants: Sequence[Variant], differences: Differences, title: str = "Conclusions") -> Section:
    """The section that answers which order, how much better, at what cost and how sure.

    Args:
        variants: of one run; all were evaluated in one feature space.
        differences: the comparisons, both ways.
        title: of the section.
    """
    ranked = sorted(variants, key=lambda variant: variant.distance)
    baselines = {policy: found for policy in BASELINES if (found := _baseline(ranked, policy))}
    metric = variants[0].evaluations[0].metrics["metric_name"]
    matches = [
        match
        for variant in ranked
        for baseline in baselines.values()
        if variant is not baseline and (match := _match(variant, baseline, differences)) is not None
    ]
    paragraphs = [_ranking(ranked, metric), *(_summary(p, baselines.get(p), matches) for p in BASELINES)]
    for variant in ranked:
        own = [match for match in matches if match.variant is variant]
        if own:
            paragraphs.append(_about(variant, own))
    paragraphs.append(_sureness(variants, matches))
    return Section(title, "\n\n".join(paragraphs), [_table(matches, ranked)])


def _baseline(ranked: Sequence[Variant], policy: str) -> Variant | None:
    """The variant drawn in this order; the one with the least distance if there are several."""
    return next((variant for variant in ranked if variant.policy == policy), None)


def _match(variant: Variant, baseline: Variant, differences: Differences) -> Match | None:
    """Evaluations of equal seed, or with a baseline that has none; None if the two share no seed."""
    theirs = {evaluation.seed: evaluation for evaluation in baseline.evaluations}
    both = [(ours, theirs.get(ours.seed, theirs.get(None))) for ours in variant.evaluations]
    pairs = [(ours, other) for ours, other in both if other is not None]
    found = [differences.get((ours.fingerprint, other.fingerprint)) for ours, other in pairs]
    return Match(variant, baseline, pairs, found) if pairs else None


# --- sentences --------------------------------------------------------------------------------------------


def _ranking(ranked: Sequence[Variant], metric: str) -> str:
    places = ", ".join(f"{variant.name} {format_value(variant.distance)}" for variant in ranked)
    counts = sorted({len(variant.evaluations) for variant in ranked})
    seeds = f"mean over {' or '.join(map(str, counts))} seeds" if max(counts) > 1 else "one seed each"
    return f"Distance to the test split ({metric}, {seeds}), lowest first: {places}."


def _summary(policy: str, baseline: Variant | None, matches: Sequence[Match]) -> str:
    """Which variants are better than a baseline, which of them surely, and which at no loss of recall."""
    if baseline is None:
        return f"No samples were drawn in {policy} order: nothing can be said against that baseline."
    against = [match for match in matches if match.baseline is baseline]
    if not against:
        return f"Nothing else was evaluated with the seeds of {policy} order ({baseline.name})."
    lower = [match for match in against if match.relative < 0]
    if not lower:
        return f"No variant has a lower mean distance than {policy} order ({baseline.name})."

    def which(test: Callable[[Match], bool]) -> str:
        return _names([match.variant.name for match in lower if test(match)])

    return (
        f"Lower mean distance than {policy} order ({baseline.name}): {which(lambda m: True)}. "
        f"Of these in every seed: {which(lambda m: m.lower == len(m.pairs))}; "
        f"with an interval below zero in every seed: {which(lambda m: m.surely_lower == len(m.pairs))}; "
        f"with a mean recall that is not lower: {which(lambda m: (m.change('recall') or 0) >= 0)}."
    )


def _about(variant: Variant, matches: Sequence[Match]) -> str:
    start = f"{variant.name} ({variant.order}, {_count(len(variant.evaluations), 'seed')}):"
    sentences = [start, *map(_against, matches), _likelihood(variant), _copies(variant)]
    return " ".join([*filter(None, sentences), _cost(variant, matches[0])])


def _against(match: Match) -> str:
    """How much better than a baseline, in how many seeds, how sure, and recall."""
    n, better = len(match.pairs), match.relative < 0
    text = f"Against {match.baseline.name}, {_percent(match.relative)} in mean distance"
    if n > 1:
        text += f" (by seed {', '.join(f'{100 * value:+.1f} %' for value in match.per_seed)})"
        holds = match.lower if better else sum(value > 0 for value in match.per_seed)
        text += f", {'lower' if better else 'higher'} in {holds} of {n} seeds"
    return f"{text}. {_intervals(match)} {_diversity(match)}"


def _intervals(match: Match) -> str:
    if not match.compared:
        return "No interval was computed."
    shown = [
        f"{percent_interval(difference)} %"
        if difference.relative is not None
        else f"{difference.low:+.4g} to {difference.high:+.4g}"
        for difference in match.compared
    ]
    n, lower, higher = len(shown), match.surely_lower, match.surely_higher
    sides = ((lower, "below zero"), (higher, "above zero"), (n - lower - higher, "holding zero"))
    found = ", ".join(f"{side} in {count}" for count, side in sides if count)
    return f"Bootstrap interval{'s' * (n > 1)} {'; '.join(shown)}: {found} of {n}."


def _diversity(match: Match) -> str:
    """Recall, and the share of classes where it was measured, beside the baseline's."""
    parts = []
    for key, name in (("recall", "Recall"), ("class_coverage", "class coverage")):
        if (change := match.change(key)) is not None:
            ours, theirs = (mean(pair[side].metrics[key] for pair in match.pairs) for side in (0, 1))
            how = "the same" if change == 0 else f"{abs(change):.3f} {'lower' if change < 0 else 'higher'}"
            parts.append(f"{name} is {how} ({ours:.3f} against {theirs:.3f})")
    return f"{', '.join(parts)}."


def _copies(variant: Variant) -> str:
    """Whether samples are nearer to training images than test images are; nothing where not measured."""
    row = variant.row()
    columns = ("nearest training image, ratio", "equal tokens", "equal tokens, test")
    ratio, equal, equal_test = (row[column] for column in columns)
    if ratio is None or equal is None or equal_test is None:
        return ""
    return (
        f"Its samples are {ratio:.2f} times as far from the nearest training image as test images are; "
        f"{100 * equal:.2f} % have the tokens of a training image, of test images {100 * equal_test:.2f} %."
    )


def _likelihood(variant: Variant) -> str:
    row = variant.row()
    if not row["token-blind"]:
        return "It looks at the drawn tokens before it decides where they go: " + NO_LIKELIHOOD + "."
    if row["nats/token (exact)"] is not None:
        return f"Exact likelihood: {format_value(row['nats/token (exact)'])} nats/token."
    if row["nats/token (bound)"] is not None:
        parts = (f"{format_value(row[f'bound: {part}'])} for {part}" for part in ("tokens", "locations"))
        return f"At most {format_value(row['nats/token (bound)'])} nats/token (a bound: {', '.join(parts)})."
    return "Its likelihood was not measured."


def _cost(variant: Variant, match: Match) -> str:
    """Time per image and training tokens as multiples of a baseline's, and the extraction of orders."""
    time, ratio = match.ratio("seconds_per_image"), match.ratio("training_tokens")
    text = f"Cost: {time:.2f} times the time per image of {match.baseline.name}"
    if ratio is not None:
        tokens = "the same number of" if ratio == 1 else f"{ratio:.2f} times the"
        text += f", and {tokens} training tokens"
    extraction = variant.row()["extraction evaluations"]
    if extraction is not None:
        text += f"; {format_value(extraction)} position evaluations, once, to extract its orders"
    return f"{text}."


def _sureness(variants: Sequence[Variant], matches: Sequence[Match]) -> str:
    """How far the numbers carry."""
    fewest = min(len(variant.evaluations) for variant in variants)
    seeds = (
        "With a single seed nothing is known of how results vary between trainings."
        if fewest == 1
        else f"Every variant was trained with {fewest} seeds or more; so few show the direction of a "
        "difference, not its distribution."
    )
    intervals = (
        "Intervals are of the draw of samples alone, with model and test split as they are."
        if any(match.compared for match in matches)
        else "No bootstrap intervals were computed."
    )
    return f"{seeds} {intervals}"


def _table(matches: Sequence[Match], ranked: Sequence[Variant]) -> Table:
    """The same in numbers; without baselines, the ranking."""
    if not matches:
        rows: list[dict[str, Any]] = [{"variant": v.name, "distance": v.row()["distance"]} for v in ranked]
        return Table(list(rows[0]), rows)
    rows = [
        {
            "variant": match.variant.name,
            "against": match.baseline.name,
            "seeds": len(match.pairs),
            "distance (%)": 100 * match.relative,
            "by seed (%)": ", ".join(f"{100 * value:+.1f}" for value in match.per_seed),
            "lower in": _of(match.lower, len(match.pairs)),
            "surely lower": _of(match.surely_lower, len(match.compared)),
            "surely higher": _of(match.surely_higher, len(match.compared)),
            "recall": match.change("recall"),
            "nats/token (exact)": match.change("nll")
            if match.variant.row()["token-blind"]
            else NO_LIKELIHOOD,
            "time per image": match.ratio("seconds_per_image"),
            "training tokens": match.ratio("training_tokens"),
        }
        for match in matches
    ]
    caption = (
        "Differences to the baseline, means over seeds: distance relative, recall and nats/token absolute, "
        "time and training tokens as ratios. Surely: the interval of the difference does not hold zero."
    )
    return Table(list(rows[0]), rows, caption)


def _percent(relative: float) -> str:
    return (
        "no difference"
        if relative == 0
        else f"{abs(100 * relative):.1f} % {'lower' if relative < 0 else 'higher'}"
    )


def _of(count: int, total: int) -> str | None:
    return f"{count} of {total}" if total else None


def _count(n: int, noun: str) -> str:
    return f"{n} {noun}{'s' * (n != 1)}"


def _names(names: Sequence[str]) -> str:
    return ", ".join(names) or "none"
