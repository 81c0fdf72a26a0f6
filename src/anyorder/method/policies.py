"""Order policies: where to go next. Fixed orders, and orders inferred from the model's confidence."""

import math
from dataclasses import dataclass, field, replace
from typing import Literal, Self

import torch
from torch import Tensor

from anyorder.contracts import Grid, Progress, at_least, require
from anyorder.method.sampling import score_of
from anyorder.method.schedules import ParallelSchedule, descending
from anyorder.orders import inverse, validate


def open_positions(progress: Progress) -> Tensor:
    """All open positions (B, M) int64, in raster order; closed ones behind, where other images have more."""
    # Not by `nonzero`: on a GPU the host would wait at every step for the number, which it knows.
    return progress.revealed.byte().argsort(dim=1, stable=True)[:, : progress.open]


@dataclass(frozen=True, eq=False)
class _Decided(ParallelSchedule):
    """A policy that proposes just what is to be revealed: nothing is left to rate or select."""

    token_blind = True
    rated = False
    located = False
    look_ahead = 0

    def subset(self, rows: Tensor) -> Self:
        """The same policy for some images (R,) int64 of the batch."""
        return self

    def _next(self, progress: Progress, priority: Tensor) -> Tensor:
        """The positions (B, K) to reveal now, by priority (B, N): the largest first."""
        everywhere = torch.arange(priority.shape[1], device=priority.device)
        return self.first(progress, everywhere.expand_as(priority), priority)

    def rate(self, log_p: Tensor, tokens: Tensor) -> Tensor:
        """Zeros (B, M)."""
        return torch.zeros_like(tokens, dtype=torch.float32)

    def select(self, progress: Progress, candidates: Tensor, ratings: Tensor) -> Tensor:
        """Every candidate, in the sequence they were proposed."""
        return torch.arange(candidates.shape[1], device=candidates.device).expand_as(candidates)


@dataclass(frozen=True, eq=False)
class FixedOrder(_Decided):
    """Follows an order given beforehand, a permutation of the grid; skips positions that are known.

    With `min_distance` the next position that keeps it to the others of the same step goes first.
    """

    order: Tensor
    """(N,) or (B, N) int64, one order for all images or one each."""
    grid: Grid
    name: str = field(default="given", kw_only=True)
    rank: Tensor = field(init=False, repr=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "rank", inverse(validate(self.order, self.grid)))

    def subset(self, rows: Tensor) -> Self:
        """The policy with the orders of some images (R,) int64 of the batch."""
        return replace(self, order=self.order[rows.to(self.order.device)]) if self.order.ndim == 2 else self

    def propose(self, progress: Progress) -> Tensor:
        """The next K open positions of the order, (B, K)."""
        return self._next(progress, -self.rank.to(progress.revealed.device).expand_as(progress.revealed))


@dataclass(frozen=True)
class InferredOrder(ParallelSchedule):
    """The model chooses: every open position is scored, the K with the highest ratings are revealed.

    `score="token_likelihood"` is the paper's rule (OAR, arXiv 2504.17069 v1, Sec. 3: the most likely
    position-token pair), which looks at the sampled token and so changes the distribution that is sampled.
    The other scores are token-blind: p(x) stays a normalised autoregressive density.

    With `rescore` below 1, half of what is scored at a step are the positions with the highest last ratings,
    half are those around which most was revealed since (a reveal at d patches counts 1 / d^2). Only what was
    scored at this step can be revealed, so log-probabilities stay exact.

    `look_ahead` positions with the highest ratings are rated anew, see `decoding.expected_information`; each
    costs another scoring of all open positions. Sign -1 takes the least certain: no position can tell more
    than its entropy. With `rate_every` K, one rating chooses K positions, which follow one by one in raster
    order: each still sees those before it, and the last ones need no rating. Other fields as of
    `PolicyConfig`. With `location=1` and the likelihood of true tokens, extraction is the greedy E-step of
    hard EM on q(order, x).
    """

    score: str = "entropy"
    sign: Literal[1, -1] = 1
    temperature: float = 0.0
    distance: float = 0.0
    distance_to: Literal["last", "nearest"] = "last"
    location: float = 0.0
    rescore: float = 1.0
    rate_every: int = 1
    class_weight: float = 0.0
    class_orders: Tensor | None = field(default=None, compare=False, repr=False)
    """(B, N) int64, the order of each image's class, for `class_weight`."""
    class_rank: Tensor | None = field(init=False, default=None, compare=False, repr=False)
    look_ahead: int = 0

    rated = True

    def __post_init__(self) -> None:
        super().__post_init__()
        score_of(self.score)  # refuses an unknown one
        if self.class_orders is not None:  # once, not at every step
            object.__setattr__(self, "class_rank", inverse(self.class_orders))
        require(self.sign in (1, -1), f"sign must be 1 (most certain first) or -1, got {self.sign}")
        at_least(0, self, "temperature", "location", "class_weight", "look_ahead")
        at_least(1, self, "rate_every")
        require(math.isfinite(self.distance), f"distance must be a number, got {self.distance}")
        text = f"distance_to must be 'last' or 'nearest', got '{self.distance_to}'"
        require(self.distance_to in ("last", "nearest"), text)
        text = f"distance_to='{self.distance_to}' changes nothing without distance: give both"
        require(self.distance_to == "last" or self.distance != 0, text)
        require(0 < self.rescore <= 1, f"rescore must lie in (0, 1], got {self.rescore}")
        parallel = (self.per_step, self.steps)
        changing = (self.temperature, self.distance, self.location)  # from step to step, unlike a rating
        text = "entropy_limit takes a score that does not look at the token, and no rescore: leave one out"
        rated = self.token_blind and self.rescore == 1
        require(self.entropy_limit is None or rated, text)
        text = "rate_every takes no per_step, steps, temperature, distance or head: leave them out"
        require(self.rate_every == 1 or (parallel, changing) == ((1, 0), (0, 0, 0)), text)
        plain = (self.score, *parallel, self.distance, self.location, self.class_weight)
        once = self.rescore == self.rate_every == 1
        text = "expected information takes score='entropy' and no rescore, per_step, steps, distance or head"
        require(not self.look_ahead or (once and plain == ("entropy", 1, 0, 0, 0, 0)), text)

    def subset(self, rows: Tensor) -> Self:
        """The policy for some images (R,) int64 of the batch."""
        return self if self.class_orders is None else replace(self, class_orders=self.class_orders[rows])

    @property
    def name(self) -> str:
        """For reports: the score, marked where it is reversed."""
        if self.look_ahead:
            return "information"
        return self.score if self.sign == 1 else f"{self.score}-reversed"

    @property
    def located(self) -> bool:
        """Whether the location head has a say."""
        return self.location > 0

    @property
    def token_blind(self) -> bool:
        """False for the paper's rule."""
        return score_of(self.score)[1]

    def evaluations(self, n: int) -> int:
        """Candidate evaluations to decide where, looking ahead included, per image of n open positions."""
        total, still_open = 0, n
        for step, k in enumerate(self.sizes(n)):
            scored = self._scored(step, still_open, k)
            total += scored if scored > 1 or not self.token_blind else 0  # nothing to choose: not rated
            still_open -= k
        return total * (1 + self.look_ahead)

    def _scored(self, step: int, still_open: int, k: int) -> int:
        """How many of the open positions are scored at a step that reveals k of them."""
        if step % self.rate_every or still_open <= self.rate_every > 1:
            return 1  # the last ones all follow, in raster order, whatever their ratings
        share = 1 if step == 0 else self.rescore
        return min(still_open, max(k, self.rate_every, math.ceil(share * still_open - 1e-9)))

    def propose(self, progress: Progress) -> Tensor:
        """Open positions (B, M) in raster order: all, or those whose ratings may have changed most."""
        positions = open_positions(progress)
        m = self._scored(progress.step, progress.open, self.take(progress))
        if m == progress.open:
            return positions
        priority = self._priority(progress, positions, progress.ratings.gather(1, positions))
        if m < self.rate_every:
            stale = progress.rated_at < progress.step - progress.step % self.rate_every
            priority = priority.masked_fill(stale.gather(1, positions), -torch.inf)
            return positions.gather(1, self._first_of_group(progress, priority))
        highest = descending(priority)[:, : (m + 1) // 2]
        staleness = _staleness(progress).gather(1, positions).scatter(1, highest, -1)
        columns = torch.cat((highest, descending(staleness)[:, : m // 2]), dim=1)
        return positions.gather(1, columns.sort(1).values)

    def rate(self, log_p: Tensor, tokens: Tensor) -> Tensor:
        """Confidence scores (B, M) in nats, larger is revealed earlier."""
        return self.sign * score_of(self.score)[0](log_p, tokens)

    def _priority(self, progress: Progress, positions: Tensor, ratings: Tensor) -> Tensor:
        """Ratings (B, M) after the location head, noise and the distance prior."""
        if self.location:
            assert progress.location is not None
            ratings = ratings + self.location * progress.location.gather(1, positions)
        if self.temperature:
            assert progress.noise is not None
            ratings = ratings + self.temperature * progress.noise(positions)
        if self.class_rank is not None:
            ratings = ratings - self.class_weight * self.class_rank.gather(1, positions) / progress.grid.n
        if self.distance:
            ratings = ratings - self.distance * _distance(progress, positions, self.distance_to)
        return ratings

    def select(self, progress: Progress, candidates: Tensor, ratings: Tensor) -> Tensor:
        """The K of highest priority, highest first."""
        priority = self._priority(progress, candidates, ratings)
        if self.rate_every > 1:
            return self._first_of_group(progress, priority)
        return self.first(progress, candidates, priority)

    def _first_of_group(self, progress: Progress, priority: Tensor) -> Tensor:
        """The first column in raster order (B, 1) of what is left of the positions that one rating chose."""
        left = self.rate_every - progress.step % self.rate_every
        return descending(priority)[:, :left].amin(1, keepdim=True)


@dataclass(frozen=True)
class LocatedOrder(_Decided):
    """The location head chooses, at the cost of a fixed order; at temperature 1 (order, x) ~ q(order, x)."""

    temperature: float = 1.0
    """Gumbel noise of this scale on log q(position): 1 samples from it, 0 takes the likeliest."""

    name = "location"
    located = True

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(0, self, "temperature")

    def propose(self, progress: Progress) -> Tensor:
        """The K positions that the head prefers, (B, K)."""
        assert progress.location is not None
        priority = progress.location
        if self.temperature:
            assert progress.noise is not None
            everywhere = torch.arange(progress.grid.n, device=priority.device)
            priority = priority + self.temperature * progress.noise(everywhere)
        return self._next(progress, priority)


def _staleness(progress: Progress) -> Tensor:
    """How much was revealed around each position since it was scored last, (B, N) float32."""
    at = progress.grid.coordinates(progress.revealed.device)
    # Whole numbers add up exactly in any sequence: the choice does not depend on the batch.
    near = (1000 / torch.cdist(at, at).square().clamp_min(1)).round()
    new = progress.revealed_at[:, None, :] >= progress.rated_at[:, :, None]
    return (near * new).sum(-1)


def _distance(progress: Progress, candidates: Tensor, to: str) -> Tensor:
    """Euclidean distance in patches, (B, M); zero while nothing is revealed."""
    if progress.open == progress.grid.n:
        return torch.zeros_like(candidates, dtype=torch.float32)
    at = progress.grid.coordinates(candidates.device)
    here = at[candidates]
    if to == "last":
        return (here - at[progress.last][:, None]).norm(dim=-1)
    gap = torch.cdist(here, at.expand(len(here), -1, -1))
    return gap.masked_fill(~progress.revealed[:, None], torch.inf).amin(-1)
