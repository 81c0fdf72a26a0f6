"""How few positions could a lazy order score, if it forecast the ratings well?

    python experiments/lazy_bound.py
    python experiments/lazy_bound.py elsewhere

A forecast keeps mean and covariance of all ratings: each reveal adds a mean change and its covariance,
each look at a position corrects the others. It looks one by one at the position that is most likely to beat
the best seen at this step, and stops once every other lies so many standard deviations (`margin`) below. The
changes are learnt from exact orders of training images (`fitted`), with less detail (`by distance`), without
correlations (`alone`), or come from a formula with a few constants (`formula`). With a margin, the number of
looks differs between images; `looks` of sqrt(n) give all images of a batch the same number, `together` at
once instead of one by one.

Orders of test images are really extracted with what the rule has seen. As it is a study of what to look at,
everything is scored and hidden from the rule: evaluations are counted, seconds are not. Margins and
constants were chosen on the same images; `elsewhere` keeps one margin on other images.
"""

from __future__ import annotations

import math
import sys
from bisect import bisect
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from anyorder.contracts import AnyOrderModel, Grid, Progress
from anyorder.data.caches import TokenSet
from anyorder.data.rows import evenly_spaced, slices
from anyorder.files import fingerprint, versions, write_json
from anyorder.inference.weights import load_any_order
from anyorder.method.decoding import extract_orders
from anyorder.method.policies import InferredOrder
from anyorder.orders import kendall
from anyorder.stages.common import as_condition

RUNS = Path("runs/evidence")
MODEL = RUNS / "random-s0"
OUT = Path("docs/results/lazy-bound.json")
ELSEWHERE = Path("docs/results/lazy-bound-elsewhere.json")
IMAGES, FIT, FEW, BATCH = 128, 512, 64, 64
STAGES = [9, 24, 42]
"""Steps at which the learnt changes become others: early reveals tell more."""
PRIOR = 100.0
"""Reveals that the estimates of one revealed position count as less than those by distance."""
HIDDEN = -1e9
EXACT_FLOOR = -1e8
NEVER = 1e6
"""A margin that stops no image."""


@dataclass(frozen=True)
class Forecast:
    """How ratings change when a position is revealed."""

    stages: list[int]
    mean: Tensor
    """(S, N, N) [stage, revealed, open], nats."""
    covariance: Tensor
    """(S, N, N, N) [stage, revealed, open, open]."""

    def change(self, position: Tensor, step: int) -> tuple[Tensor, Tensor]:
        """Mean (B, N) and covariance (B, N, N) of what revealing `position` (B,) at `step` changes."""
        stage = bisect(self.stages, step)
        return self.mean[stage, position], self.covariance[stage, position]


def distances(grid: Grid) -> Tensor:
    """Between all positions, (N, N) patches."""
    at = grid.coordinates()
    return torch.cdist(at, at)


def learn(order: Tensor, ratings: Tensor, grid: Grid, prior: float = PRIOR) -> Forecast:
    """The changes along exact orders (B, N) with all ratings (B, N, N) [step, position]."""
    revealed = order[:, :-1]
    known = ratings[:, 1:] > EXACT_FLOOR
    change = torch.where(known, ratings[:, 1:] - ratings[:, :-1], 0.0)
    kind = (10 * distances(grid)).round().long()
    means, covariances = [], []
    for begin, end in zip([0, *STAGES], [*STAGES, grid.n - 1], strict=True):
        q, seen = revealed[:, begin:end].flatten(), known[:, begin:end].flatten(0, 1).float()
        by_kind = _averages(change[:, begin:end].flatten(0, 1), seen, kind[q])[kind]
        total, count = torch.zeros(2, grid.n, grid.n)
        total.index_add_(0, q, change[:, begin:end].flatten(0, 1))
        count.index_add_(0, q, seen)
        mean = (total + prior * by_kind) / (count + prior)
        rest = (change[:, begin:end].flatten(0, 1) - mean[q]) * seen
        size = _averages(rest.square(), seen, kind[q]).sqrt()[kind]
        scaled = rest / size[q].clamp_min(1e-4)
        correlation = scaled.T @ scaled / (seen.T @ seen).clamp_min(1)
        rows = [
            (rest[q == p].T @ rest[q == p] + prior * correlation * size[p, :, None] * size[p])
            / (seen[q == p].T @ seen[q == p] + prior)
            for p in range(grid.n)
        ]
        means.append(mean)
        covariances.append(_positive(torch.stack(rows)))
    return Forecast(STAGES, torch.stack(means), torch.stack(covariances))


def _averages(values: Tensor, seen: Tensor, kind: Tensor) -> Tensor:
    """Mean of the seen values of each kind."""
    total, count = torch.zeros(2, int(kind.max()) + 1)
    total.index_add_(0, kind.flatten(), values.flatten() * seen.flatten())
    count.index_add_(0, kind.flatten(), seen.flatten())
    kinds = total / count.clamp_min(1)
    return torch.cat((kinds, kinds.new_zeros(1000)))  # distances that never occur


def _positive(matrices: Tensor) -> Tensor:
    """The nearest covariances: pairs that are never open together leave small negative eigenvalues."""
    values, vectors = torch.linalg.eigh(matrices.double())
    return ((vectors * values.clamp_min(1e-6)[..., None, :]) @ vectors.mT).float()


def alone(forecast: Forecast) -> Forecast:
    """The same without correlations: a look tells nothing of other positions."""
    variance = forecast.covariance.diagonal(dim1=-2, dim2=-1)
    return Forecast(forecast.stages, forecast.mean, torch.diag_embed(variance))


def formula(grid: Grid, sign: int) -> Forecast:
    """A change of all together, and one that falls off with the distance, less at later steps."""
    d = distances(grid)
    size = 0.5 * (0.3 + 0.7 / d.clamp_min(1))
    near = size[:, :, None] * size[:, None] * (0.3 + 0.7 * torch.exp(-d / 1.5)) + 1e-5 * torch.eye(grid.n)
    steps = 1.0 + torch.arange(grid.n - 1)[:, None, None, None]
    mean = sign * (0.12 if sign == 1 else 0.06) / d.clamp_min(1)
    return Forecast(
        list(range(1, grid.n - 1)),
        mean.expand(grid.n - 1, -1, -1),
        near * steps**-0.2 + (0.45 / steps).square(),
    )


class Looks:
    """Decides for a batch which positions to look at, and goes to the best that it saw."""

    def __init__(
        self,
        forecast: Forecast,
        margin: tuple[float, float] = (NEVER, NEVER),
        looks: Callable[[int], int] = int,
        together: bool = False,
    ) -> None:
        """`margin`: at the first and last step; `looks`: the most, of n open positions."""
        self.forecast, self.margin, self.looks, self.together = forecast, margin, looks, together
        self.evaluations = 0.0

    def choose(self, ratings: Tensor, progress: Progress) -> Tensor:
        """Where each image goes (B,); of ratings (B, N) only those looked at are used."""
        step, n = progress.step, progress.total
        if step == 0:
            self.mean, self.covariance = ratings, ratings.new_zeros(*ratings.shape, n)
            self.evaluations += ratings.numel()
            return ratings.argmax(1)
        mean, covariance = self.forecast.change(progress.last, step - 1)
        self.mean, self.covariance = self.mean + mean, self.covariance + covariance
        margin = self.margin[0] + (self.margin[1] - self.margin[0]) * step / (n - 1)
        seen = progress.revealed.clone()
        going = torch.ones(len(ratings), dtype=torch.bool)
        best = torch.full((len(ratings), 1), HIDDEN)
        count = max(1, min(n - step, self.looks(n - step)))
        for k in range(1 if self.together else count):
            size = self.covariance.diagonal(dim1=1, dim2=2).clamp_min(1e-8).sqrt()
            hope = (self.mean - best) / size if k else self.mean + size
            top = hope.masked_fill(seen, -math.inf).topk(count if self.together else 1, 1)
            going = going & ((k == 0) | (top.values[:, 0] > -margin))
            if not going.any():
                break
            self._see(ratings, top.indices, going)
            seen = seen.scatter(1, top.indices, going[:, None] | seen.gather(1, top.indices))
            fresh = seen & ~progress.revealed
            self.mean = torch.where(fresh, ratings, self.mean)
            best = ratings.masked_fill(~fresh, HIDDEN).amax(1, keepdim=True)
        self.evaluations += float(fresh.sum())
        return ratings.masked_fill(~fresh, HIDDEN).argmax(1)

    def _see(self, ratings: Tensor, at: Tensor, going: Tensor) -> None:
        """Correct all ratings by those at columns (B, k), in the images that are still looking."""
        rows = self.covariance.gather(1, at[:, :, None].expand(-1, -1, ratings.shape[1]))
        among = rows.gather(2, at[:, None].expand(-1, at.shape[1], -1)) + 1e-6 * torch.eye(at.shape[1])
        gain = torch.linalg.solve(among, rows).mT * going[:, None, None]
        surprise = (ratings - self.mean).gather(1, at)
        self.mean = self.mean + (gain @ surprise[..., None])[..., 0]
        self.covariance = self.covariance - gain @ rows


@dataclass(frozen=True)
class Following(InferredOrder):
    """Scores everything, keeps it in `record`, and goes where `rule` says, if there is one."""

    rule: Looks | None = None
    record: tuple[list[Tensor], ...] = ()

    def select(self, progress: Progress, candidates: Tensor, ratings: Tensor) -> Tensor:
        """The best of what the rule looked at, (B, 1)."""
        everywhere = torch.full(progress.revealed.shape, HIDDEN).scatter(1, candidates, ratings)
        for record in self.record:
            record.append(everywhere)
        if self.rule is None:
            return super().select(progress, candidates, ratings)
        return (candidates == self.rule.choose(everywhere, progress)[:, None]).int().argmax(1, keepdim=True)


def extract(
    model: AnyOrderModel, data: tuple[Tensor, Tensor | None], **settings: Any
) -> tuple[Tensor, Tensor]:
    """Orders (B, N) and all ratings (B, N, N) [step, position] along them."""
    (tokens, condition), orders, ratings = data, [], []
    for some in slices(len(tokens), BATCH, 0):
        rows = torch.as_tensor(list(some))
        record: list[Tensor] = []
        policy = Following(record=(record,), **settings)
        own = None if condition is None else condition[rows]
        orders.append(extract_orders(model, tokens[rows], policy, condition=own).order)
        ratings.append(torch.stack(record, dim=1))
    return torch.cat(orders), torch.cat(ratings)


def contest(order: Tensor, ratings: Tensor) -> dict[str, Any]:
    """How close the choice is, and how well the ratings of the step before tell it."""
    two = ratings[:, :-1].topk(2, dim=-1).values
    gap = two[..., 0] - two[..., 1]
    open_now = ratings[:, 1:] > EXACT_FLOOR
    before = ratings[:, :-1]
    ahead = ((before > before.gather(2, order[:, 1:, None])) & open_now).sum(-1)
    return {
        "median_gap": float(gap.median()),
        "gap_below_0.01": float((gap < 0.01).float().mean()),
        "best_among_first_of_the_step_before": {
            str(k): float((ahead < k).float().mean()) for k in (1, 2, 4, 8, 12, 20)
        },
    }


def rules(fit: tuple[Tensor, Tensor], grid: Grid, sign: int) -> dict[str, Callable[[], Looks]]:
    """What is tried, by name."""
    fitted, few = learn(*fit, grid), learn(fit[0][:FEW], fit[1][:FEW], grid)
    plain, given = learn(*fit, grid, prior=1e9), formula(grid, sign)
    margins = ((2.5, 1.0), (3.0, 1.0), (3.0, 1.5))

    def root(n: int) -> int:
        return round(1.28 * n**0.5)

    named: dict[str, Callable[[], Looks]] = {
        f"fitted, margin {a:g} to {b:g}": lambda a=a, b=b: Looks(fitted, (a, b))  # type: ignore[misc]
        for a, b in margins
    }
    return named | {
        f"fitted on {FEW}, margin 3 to 1": lambda: Looks(few, (3, 1)),
        "by distance, margin 3 to 1": lambda: Looks(plain, (3, 1)),
        "alone, margin 2 to 0.7": lambda: Looks(alone(fitted), (2, 0.7)),
        "formula, margin 3 to 1": lambda: Looks(given, (3, 1)),
        "fitted, looks": lambda: Looks(fitted, looks=root),
        "fitted, looks, together": lambda: Looks(fitted, looks=root, together=True),
        "formula, looks, together": lambda: Looks(given, looks=root, together=True),
    }


def images(model: AnyOrderModel, split: str, count: int, skip: int = 0) -> tuple[Tensor, Tensor | None]:
    """Tokens and condition of `count` images, evenly spread; `skip` takes those just behind them."""
    found = TokenSet(RUNS / "tokens", split)
    tokens, labels = found.batch([(at + skip) % len(found) for at in evenly_spaced(count, len(found))])
    return tokens, as_condition(model, found, labels)


def measure(
    model: AnyOrderModel,
    rule: Looks,
    data: tuple[Tensor, Tensor | None],
    exact: Tensor,
    **settings: Any,
) -> dict[str, float]:
    """Share of the evaluations and Kendall's tau to the exact orders."""
    n, order = model.grid.n, extract(model, data, rule=rule, **settings)[0]
    return {
        "evaluations": rule.evaluations / len(order) / (n * (n + 1) // 2),
        "kendall": float(kendall(order, exact).mean()),
    }


def main() -> None:
    """Both directions of the entropy score, every rule."""
    model = load_any_order(MODEL)
    test, train = images(model, "test", IMAGES), images(model, "train", FIT)
    n = model.grid.n
    result: dict[str, Any] = {}
    for sign in (1, -1):
        order, ratings = extract(model, test, sign=sign)
        fit = extract(model, train, sign=sign)
        result[f"entropy, sign {sign}"] = {"contest": contest(order, ratings), "rules": []}
        for name, make in rules(fit, model.grid, sign).items():
            row = {"rule": name, **measure(model, make(), test, order, sign=sign)}
            result[f"entropy, sign {sign}"]["rules"].append(row)
            print(sign, *row.values(), flush=True)
    write_json(
        OUT,
        {
            "command": "python experiments/lazy_bound.py",
            "model": {"folder": str(MODEL), "fingerprint": fingerprint(MODEL), **asdict(model.config)},
            "images": IMAGES,
            "fit_images": FIT,
            "one_look_at_each_step": (2 * n - 1) / (n * (n + 1) // 2),
            "versions": versions(),
            "orders": result,
        },
    )


def elsewhere() -> None:
    """One margin on other test images."""
    model, rows = load_any_order(MODEL), []
    test, train = images(model, "test", IMAGES, skip=1), images(model, "train", FIT)
    facts = {"model": MODEL.name, "score": "entropy"}
    for sign in (1, -1):
        order, _ = extract(model, test, sign=sign)
        forecast = learn(*extract(model, train, sign=sign), model.grid)
        found = measure(model, Looks(forecast, (3, 1.5)), test, order, sign=sign)
        rows.append({**facts, "sign": sign, "other_images": True, **found})
        print(*rows[-1].values(), flush=True)
    write_json(
        ELSEWHERE,
        {
            "command": "python experiments/lazy_bound.py elsewhere",
            "rule": "fitted, margin 3 to 1.5",
            "images": IMAGES,
            "fit_images": FIT,
            "versions": versions(),
            "orders": rows,
        },
    )


if __name__ == "__main__":
    elsewhere() if sys.argv[1:] == ["elsewhere"] else main()
