"""Order policies: where to go next. Fixed orders, and orders inferred from the model's confidence."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, fields, replace
from typing import Any, Literal

import torch
from torch import Tensor

from anyorder.contracts import Grid, OrderPolicy, Progress
from anyorder.logits import SCORES, TOKEN_BLIND, Streams
from anyorder.orders import STATIC, inverse, random_orders, static_order, validate
from anyorder.schedules import OPEN, Shape, reveals

Score = Literal["entropy", "max_prob", "margin", "token_likelihood"]


@dataclass(frozen=True, kw_only=True)
class Pace:
    """How many positions are revealed together at each step, and how far apart they lie.

    Positions of one step are drawn in parallel: none of them knows the others' tokens. That is for models
    that were trained on random orders; one that was trained on a single order (raster, those of classes) has
    only learnt to predict the very next position of it.
    """

    per_step: int = 1
    """Positions revealed in parallel, K."""
    steps: int = 0
    """Reveal everything in so many steps, whatever is open; 0: `per_step` decides."""
    schedule: Shape = "constant"
    """How `steps` share the positions, see `schedules`."""
    spread: float = 0.0
    """Positions of one step lie at least so many patches apart, while there are such positions."""

    def __post_init__(self) -> None:
        if self.per_step < 1:
            raise ValueError(f"per_step must be >= 1, got {self.per_step}")
        if self.steps < 0:
            raise ValueError(f"steps must be >= 0 (0: per_step decides), got {self.steps}")
        if self.schedule not in OPEN:
            raise ValueError(f"unknown schedule '{self.schedule}': choose one of {', '.join(OPEN)}")
        if self.steps and self.per_step > 1:
            raise ValueError(f"give either per_step or steps, got {self.per_step} and {self.steps}")
        if self.schedule != "constant" and not self.steps:
            raise ValueError(f"schedule '{self.schedule}' needs to know in how many steps: give steps=...")
        if self.spread < 0:
            raise ValueError(f"spread must be >= 0, got {self.spread}")

    def sizes(self, n: int) -> list[int]:
        """Positions revealed at each step, out of n open ones."""
        if self.steps:
            return reveals(n, self.steps, self.schedule)
        return [min(self.per_step, n - done) for done in range(0, n, self.per_step)]

    def take(self, progress: Progress, waiting: int) -> int:
        """How many of the `waiting` open positions of each image are revealed now."""
        if self.steps:
            return self.sizes(progress.total)[progress.step]
        return min(self.per_step, waiting)

    def best(self, positions: Tensor, wanted: Tensor, k: int, grid: Grid) -> Tensor:
        """Columns (B, K) of the most wanted positions, best first, `spread` patches apart if possible.

        Greedy: the best of those that keep the distance to all before; where none is left, the best.

        Args:
            positions: (B, M) int64, all different in each row.
            wanted: (B, M), larger is wanted more.
            k: K <= M.
            grid: where the positions lie.
        """
        if k == 1 or not self.spread:
            return wanted.topk(k, dim=1).indices
        at = grid.coordinates(positions.device)
        near = torch.cdist(at, at) < self.spread - 1e-4
        m, chosen = positions.shape[1], []
        rank = wanted.argsort(dim=1, descending=True, stable=True).argsort(1)
        for _ in range(k):
            column = rank.argmin(1, keepdim=True)
            chosen.append(column)
            crowded = near[positions.gather(1, column)[:, 0]].gather(1, positions)
            rank = rank + m * (crowded & (rank < m))  # behind all that keep the distance
            rank = rank.scatter(1, column, 2 * m)  # and what is chosen behind everything
        return torch.cat(chosen, dim=1)


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


def random_rows(grid: Grid, streams: Streams) -> Tensor:
    """A uniformly random order for each image from its own stream, (B, N) int64."""
    return torch.cat([random_orders(1, grid, g) for g in streams.generators]).to(streams.device)


def make_policy(
    order: str | Tensor | OrderPolicy | PolicyConfig, grid: Grid, streams: Streams, *, per_step: int = 1
) -> OrderPolicy:
    """A policy from what users write.

    Args:
        order: the name of a static order, "random", the name of a score (most certain first), an order
            (N,) or (B, N), a `PolicyConfig`, or a policy, which is returned as it is.
        grid: the grid to cover.
        streams: random orders come from each image's own stream.
        per_step: positions per step, for names and tensors.

    Raises:
        ValueError: unknown name (the message lists all), or an order that is no permutation.
    """
    if isinstance(order, Tensor):
        return FixedOrder(order, grid, per_step=per_step)
    if isinstance(order, str):
        order = PolicyConfig(order, per_step=per_step)
    return order.build(grid, streams) if isinstance(order, PolicyConfig) else order


OWN = ("information", "location", "class_mean")
"""Orders with a rule of their own; class_mean needs the orders of each class, see `PolicyConfig.build`."""
INFERRED = (*SCORES, "information")
"""Orders that score every open position at every step."""


def _unknown(order: str) -> str:
    names = f"random, one of {', '.join(STATIC)}, or one of {', '.join((*SCORES, *OWN))}"
    return f"unknown order '{order}': choose {names}"


@dataclass(frozen=True)
class PolicyConfig:
    """A policy as configuration files write it."""

    order: str = "entropy"
    """random, a static order (raster, hilbert, ...), a score (entropy, max_prob, margin, ...), information
    (expected information), location (the location head), or class_mean (one order for each class)."""
    sign: Literal[1, -1] | None = None
    """Of a score; 1: most certain first (the default); -1: least. Of information: which are looked up."""
    temperature: float | None = None
    """Of an inferred order; Gumbel noise of this scale (nats): 0 by default, 1 for the location head."""
    distance: float = 0.0
    """Of a score; nats lost per patch of distance."""
    distance_to: Literal["last", "nearest"] = "last"
    """Of a score; distance to the patch revealed last, or to the nearest revealed one."""
    per_step: int = 1
    """Positions revealed in parallel, K."""
    location: float = 0.0
    """Of a score; weight of the location head's log-probability."""
    refresh: int = 1
    """Of a score; positions decided by one scoring, drawn one after another."""
    steps: int = 0
    """Reveal everything in so many steps, several positions in parallel; 0: `per_step` decides. For models
    that were trained on random orders."""
    schedule: Shape = "constant"
    """How `steps` share the positions: cosine few first, arccos many last, one_minus_cos many first."""
    spread: float = 0.0
    """Positions of one step lie at least so many patches apart, while there are such positions."""
    rescore: float = 1.0
    """Of a score; share of the open positions that is scored at each step: 1 is the exact order."""
    full_every: int = 0
    """Of a score, where `rescore` is below 1: score all open positions every so many steps."""

    def __post_init__(self) -> None:
        if self.order not in ("random", *STATIC, *SCORES, *OWN):
            raise ValueError(_unknown(self.order))
        if self.order not in ("information", "location"):  # what these would do anyway is left unsaid
            object.__setattr__(self, "sign", None if self.sign == 1 else self.sign)
            object.__setattr__(self, "temperature", self.temperature or None)
        changed = {key for key, value in vars(self).items() if value != getattr(PolicyConfig, key)}
        if wrong := changed - self._settings():
            raise ValueError(
                "sign, temperature, distance, location, refresh, rescore and full_every belong to inferred "
                f"orders ({', '.join(INFERRED)}; temperature to location, too), not to '{self.order}': "
                f"remove {', '.join(sorted(wrong))}"
            )
        if self.order in (*SCORES, "information", "location"):
            self._rule()
        Pace(**self._of(Pace))

    def _settings(self) -> set[str]:
        """The fields that mean something for this order."""
        if self.order in SCORES:
            return set(vars(self))
        own = {"information": {"sign", "temperature"}, "location": {"temperature"}}
        return {"order", *self._of(Pace)} | own.get(self.order, set())

    def _of(self, policy: type) -> dict[str, Any]:
        """The settings that `policy` has, too, where they are given."""
        mine = vars(self)
        names = [field.name for field in fields(policy) if mine.get(field.name) is not None]
        return {name: mine[name] for name in names}

    def _rule(self) -> InferredOrder | LocatedOrder:
        """The policy of an inferred order or of a location head."""
        if self.order == "location":
            return LocatedOrder(**self._of(LocatedOrder))
        if self.order == "information":
            return InformativeOrder(**self._of(InformativeOrder))
        return InferredOrder(self.order, **self._of(InferredOrder))  # type: ignore[arg-type]

    @property
    def inferred(self) -> bool:
        """Whether every open position is scored to decide where."""
        return self.order in INFERRED

    def evaluations(self, n: int) -> int:
        """Candidate evaluations per image of n positions: what deciding where costs the scorer."""
        rule = self._rule() if self.inferred else None
        return rule.evaluations(n) if isinstance(rule, InferredOrder) else 0

    @property
    def parallel(self) -> bool:
        """Whether several positions are drawn at once, blind to one another."""
        return self.per_step > 1 or self.steps > 0

    @property
    def deterministic(self) -> bool:
        """Whether an image determines its own order: with `token_blind`, p(x) is an exact density."""
        noise = float(self.order == "location") if self.temperature is None else self.temperature
        return noise == 0 and self.order != "random"

    @property
    def token_blind(self) -> bool:
        """Whether the next position is decided without looking at the candidate tokens."""
        return self.order not in SCORES or self.order in TOKEN_BLIND

    @property
    def label(self) -> str:
        """Short name for tables: the order and every setting that is not the default."""
        default = PolicyConfig(order=self.order)
        changed = [
            f"{key} {value:g}" if isinstance(value, float) else f"{key} {value}"
            for key, value in vars(self).items()
            if value != getattr(default, key)
        ]
        return ", ".join([self.order, *changed])

    def build(self, grid: Grid, streams: Streams, orders: Tensor | None = None) -> OrderPolicy:
        """The policy for a batch; random orders come from the images' streams.

        Args:
            grid: the grid to cover.
            streams: one random stream per image.
            orders: (B, N) int64, each image's order for class_mean: the one of its class.

        Raises:
            ValueError: class_mean without `orders`.
        """
        pace = self._of(Pace)
        if self.order == "class_mean":
            if orders is None:
                raise ValueError(
                    "class_mean needs the orders of the classes: give each image's as a tensor (B, N)"
                )
            return FixedOrder(orders, grid, name="class_mean", **pace)
        if self.order == "random":
            return FixedOrder(random_rows(grid, streams), grid, name="random", **pace)
        if self.order in STATIC:
            return FixedOrder(static_order(self.order, grid), grid, name=self.order, **pace)
        return self._rule()
