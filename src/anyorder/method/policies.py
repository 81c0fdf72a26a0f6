"""Order policies: where to go next. Fixed orders, and orders inferred from the model's confidence."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import Literal

import torch
from torch import Tensor

from anyorder.contracts import Grid, Progress
from anyorder.method.sampling import SCORES, TOKEN_BLIND
from anyorder.method.schedules import Pace
from anyorder.orders import inverse, validate

Score = Literal["entropy", "max_prob", "margin", "token_likelihood"]


def waiting_positions(progress: Progress) -> Tensor:
    """All open positions (B, M) int64, in raster order."""
    return (~progress.revealed).nonzero()[:, 1].reshape(len(progress.revealed), -1)


@dataclass(frozen=True, eq=False)
class _Decided(Pace):
    """A policy that proposes just what is to be revealed: nothing is left to rate or select."""

    token_blind = True
    rated = False
    sequential = False

    def _next(self, progress: Progress, wanted: Tensor) -> Tensor:
        """The positions (B, K) to go to now; wanted (B, N), larger is wanted more."""
        waiting = waiting_positions(progress)
        k = self.take(progress, waiting.shape[1])
        return waiting.gather(1, self.best(waiting, wanted.gather(1, waiting), k, progress.grid))

    def rate(self, log_p: Tensor, tokens: Tensor) -> Tensor:
        """All candidates are wanted: zeros (B, M)."""
        return torch.zeros(tokens.shape, device=tokens.device)

    def select(self, progress: Progress, candidates: Tensor, ratings: Tensor) -> Tensor:
        """Every candidate, in the sequence they were proposed."""
        return torch.arange(candidates.shape[1], device=candidates.device).expand_as(candidates)


@dataclass(frozen=True, eq=False)
class FixedOrder(_Decided):
    """Follows an order given beforehand, skipping positions that are known already.

    With `spread` it goes to the next position that keeps the distance to those of the same step first.

    Raises:
        ValueError: not a permutation of the grid, or a pace that makes no sense.
    """

    order: Tensor
    """(N,) or (B, N) int64, one order for all images or one each."""
    grid: Grid
    """The grid it covers."""
    name: str = field(default="given", kw_only=True)
    """For reports."""
    rank: Tensor = field(init=False, repr=False)
    """Its inverse."""

    located = False

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "rank", inverse(validate(self.order, self.grid)))

    def of(self, rows: Tensor) -> FixedOrder:
        """The same for some images (R,) int64 of the batch."""
        return replace(self, order=self.order[rows]) if self.order.ndim == 2 else self

    def propose(self, progress: Progress) -> Tensor:
        """The next K open positions of the order, (B, K)."""
        return self._next(progress, -self.rank.to(progress.revealed.device).expand_as(progress.revealed))


@dataclass(frozen=True)
class InferredOrder(Pace):
    """The model chooses: every open position is scored, the K that it is surest of are revealed.

    With `score="token_likelihood"` this is the paper's rule (OAR, arXiv 2504.17069 v1, Sec. 3: the most
    likely position-token pair), which looks at the drawn token and so changes the distribution that is
    sampled. The other scores are token-blind: p(x) stays a normalised autoregressive density.

    With `rescore` below 1 it is lazy: half of what is scored at a step are the positions that their last
    ratings put first, half are those around which most was revealed since (a reveal at d patches counts
    1 / d^2). Only what was scored at this step can be revealed, so log-probabilities stay exact.
    """

    score: Score = "entropy"
    """How sure the model is of a position, in nats."""
    sign: Literal[1, -1] = 1
    """1: most certain first; -1: least certain first."""
    temperature: float = 0.0
    """Gumbel noise of this scale (nats) on the ratings: 0 takes the best, larger explores."""
    distance: float = 0.0
    """Nats lost per patch of distance; keeps the drawing local."""
    distance_to: Literal["last", "nearest"] = "last"
    """Distance to the patch revealed last, or to the nearest revealed one."""
    location: float = 0.0
    """Weight of the location head's log-probability in the ratings. At 1, with the likelihood of the true
    token, extraction is the greedy E-step of hard EM on q(order, x)."""
    refresh: int = 1
    """Steps between two scorings: one scoring decides the next `refresh` positions, which are still drawn one
    after another. Costs N (N + 1) / (2 refresh) evaluations."""
    rescore: float = 1.0
    """Share of the open positions that is scored at each step; 1 scores all, the exact order."""
    full_every: int = 0
    """Where `rescore` is below 1: score all open positions every so many steps; 0: at the first only."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.score not in SCORES:
            raise ValueError(f"unknown score '{self.score}': choose one of {', '.join(SCORES)}")
        if self.sign not in (1, -1):
            raise ValueError(f"sign must be 1 (most certain first) or -1, got {self.sign}")
        if self.temperature < 0:
            raise ValueError(f"temperature must be >= 0, got {self.temperature}")
        if self.distance_to not in ("last", "nearest"):
            raise ValueError(f"distance_to must be 'last' or 'nearest', got '{self.distance_to}'")
        if self.location < 0:
            raise ValueError(f"location must be >= 0, got {self.location}")
        if self.refresh < 1:
            raise ValueError(f"refresh must be >= 1, got {self.refresh}")
        if self.refresh > 1 and (self.per_step > 1 or self.steps or not self.token_blind):
            raise ValueError(
                "refresh > 1 needs per_step=1, steps=0 and an order that is decided before the tokens"
            )
        if not 0 < self.rescore <= 1:
            raise ValueError(f"rescore must lie in (0, 1], got {self.rescore}")
        if self.full_every < 0 or (self.full_every and self.rescore == 1):
            raise ValueError(f"full_every must be >= 0 and needs rescore < 1, got {self.full_every}")
        if self.rescore < 1 and self.refresh > 1:
            raise ValueError("rescore < 1 and refresh > 1 are two ways to score less: give one of them")

    @property
    def rated(self) -> bool:
        """Every candidate is scored."""
        return True

    @property
    def sequential(self) -> bool:
        """Whether one scoring decides several positions."""
        return self.refresh > 1

    @property
    def name(self) -> str:
        """For reports: the score, marked where it is reversed."""
        return self.score if self.sign == 1 else f"{self.score}-reversed"

    @property
    def located(self) -> bool:
        """Whether the location head has a say."""
        return self.location > 0

    @property
    def token_blind(self) -> bool:
        """False for the paper's rule."""
        return self.score in TOKEN_BLIND

    def sizes(self, n: int) -> list[int]:
        """Positions decided by each scoring, out of n open ones."""
        return super().sizes(n) if self.refresh == 1 else Pace(per_step=self.refresh).sizes(n)

    def take(self, progress: Progress, waiting: int) -> int:
        """How many of the `waiting` open positions this scoring decides."""
        return super().take(progress, waiting) if self.refresh == 1 else min(self.refresh, waiting)

    def evaluations(self, n: int) -> int:
        """Candidate evaluations to decide where, per image of n open positions."""
        total, waiting = 0, n
        for step, k in enumerate(self.sizes(n)):
            total += self._budget(step, waiting, k)
            waiting -= k
        return total

    def _budget(self, step: int, waiting: int, k: int) -> int:
        """How many of the `waiting` positions are scored at a step that reveals k of them."""
        if self.rescore == 1 or step == 0 or (self.full_every and step % self.full_every == 0):
            return waiting
        return min(waiting, max(k, math.ceil(self.rescore * waiting - 1e-9)))

    def propose(self, progress: Progress) -> Tensor:
        """Open positions (B, M) in raster order: all, or those that are worth another look."""
        waiting = waiting_positions(progress)
        n = waiting.shape[1]
        m = self._budget(progress.step, n, self.take(progress, n))
        if m == n:
            return waiting
        best = self._wanted(progress, waiting, progress.ratings.gather(1, waiting)).topk((m + 1) // 2, 1)
        news = _news(progress).gather(1, waiting).scatter(1, best.indices, -1)
        rest = news.argsort(dim=1, descending=True, stable=True)[:, : m // 2]
        columns = torch.cat((best.indices, rest), dim=1)
        return waiting.gather(1, columns.sort(1).values)

    def rate(self, log_p: Tensor, tokens: Tensor) -> Tensor:
        """Confidence (B, M) in nats, larger is wanted more."""
        return self.sign * SCORES[self.score](log_p, tokens)

    def _wanted(self, progress: Progress, positions: Tensor, ratings: Tensor) -> Tensor:
        """Ratings (B, M) after the location head, location noise and distance prior."""
        if self.location:
            assert progress.where is not None
            ratings = ratings + self.location * progress.where.gather(1, positions)
        if self.temperature:
            ratings = ratings + self.temperature * progress.noise.gather(1, positions)
        if self.distance:
            ratings = ratings - self.distance * _distance(progress, positions, self.distance_to)
        return ratings

    def select(self, progress: Progress, candidates: Tensor, ratings: Tensor) -> Tensor:
        """The K most wanted, best first."""
        wanted = self._wanted(progress, candidates, ratings)
        k = self.take(progress, int((~progress.revealed[0]).sum()))
        return self.best(candidates, wanted, k, progress.grid)


@dataclass(frozen=True)
class InformativeOrder(InferredOrder):
    """Prefers the position whose outcome tells most about the others: greedy expected information.

    The gain of a position is the fall in the summed entropy of all other open positions when its most
    likely token is revealed, looked up one step ahead for the `top` positions that the ratings put first
    (the least certain: no position can tell more than its own entropy). Costs `top` further scorings of all
    open positions per step. The looked-up token is the model's, not the drawn one: the order is token-blind.
    """

    sign: Literal[1, -1] = -1
    """Which positions are looked up: 1 the most, -1 the least certain."""
    top: int = 4
    """How many positions are looked up at each step."""

    def __post_init__(self) -> None:
        super().__post_init__()
        exact = self.refresh == 1 and self.rescore == 1
        if self.score != "entropy" or not exact or self.per_step != 1 or self.steps:
            raise ValueError(
                "expected information takes score='entropy', per_step=1, steps=0, refresh=1 and rescore=1"
            )
        if self.distance or self.location:
            raise ValueError("expected information knows no distance and no location head: leave them at 0")
        if self.top < 1:
            raise ValueError(f"top must be >= 1, got {self.top}")

    @property
    def name(self) -> str:
        """For reports."""
        return "information"

    def evaluations(self, n: int) -> int:
        """Candidate evaluations to decide where, those of looking ahead included."""
        return super().evaluations(n) * (1 + self.top)

    def select(self, progress: Progress, candidates: Tensor, ratings: Tensor) -> Tensor:
        """The most informative of the short list, (B, 1)."""
        assert progress.uncertainty_after is not None
        entropy = -self.sign * ratings
        listed = ratings.topk(min(self.top, candidates.shape[1]), dim=1).indices
        if listed.shape[1] == 1:
            return listed
        before = entropy.sum(1, keepdim=True) - entropy.gather(1, listed)
        positions = candidates.gather(1, listed)
        after = torch.stack([progress.uncertainty_after(p) for p in positions.unbind(1)], dim=1)
        gain = before - after
        if self.temperature:
            gain = gain + self.temperature * progress.noise.gather(1, positions)
        return listed.gather(1, gain.argmax(1, keepdim=True))


@dataclass(frozen=True)
class LocatedOrder(_Decided):
    """The location head chooses: no candidate is scored to decide where; it costs what a fixed order does.

    At temperature 1 (order, x) is drawn ancestrally from q(order, x); several positions of one step are
    drawn without replacement.
    """

    temperature: float = 1.0
    """Gumbel noise of this scale on log q(position): 1 draws from the head, 0 takes its likeliest."""

    name = "location"
    located = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.temperature < 0:
            raise ValueError(f"temperature must be >= 0, got {self.temperature}")

    def propose(self, progress: Progress) -> Tensor:
        """The K positions that the head wants most, (B, K)."""
        assert progress.where is not None
        return self._next(progress, progress.where + self.temperature * progress.noise)


def _news(progress: Progress) -> Tensor:
    """How much was revealed around each position since it was scored last, (B, N) float32."""
    at = progress.grid.coordinates(progress.revealed.device)
    # Whole numbers add up exactly in any sequence: the choice does not depend on the batch.
    near = (1000 / torch.cdist(at, at).square().clamp_min(1)).round()
    new = progress.revealed_at[:, None, :] >= progress.rated_at[:, :, None]
    return (near * new).sum(-1)


def _distance(progress: Progress, candidates: Tensor, to: str) -> Tensor:
    """Euclidean distance in patches, (B, M); zero while nothing is revealed."""
    if not bool(progress.revealed.any()):
        return torch.zeros(candidates.shape, device=candidates.device)
    at = progress.grid.coordinates(candidates.device)
    here = at[candidates]
    if to == "last":
        return (here - at[progress.last][:, None]).norm(dim=-1)
    gap = torch.cdist(here, at.expand(len(here), -1, -1))
    return gap.masked_fill(~progress.revealed[:, None], torch.inf).amin(-1)
