"""Order policies: where to go next. Fixed orders, and orders inferred from the model's confidence."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from anyorder.contracts import Grid, OrderPolicy, Progress
from anyorder.logits import SCORES, TOKEN_BLIND, Streams
from anyorder.orders import STATIC, inverse, random_orders, static_order, validate

Score = Literal["entropy", "max_prob", "margin", "token_likelihood"]


class _Decided:
    """A policy that proposes just what is to be revealed: nothing is left to rate or select."""

    token_blind = True
    rated = False
    sequential = False

    def rate(self, log_p: Tensor, tokens: Tensor) -> Tensor:
        """All candidates are wanted: zeros (B, M)."""
        return torch.zeros(tokens.shape, device=tokens.device)

    def select(self, progress: Progress, candidates: Tensor, ratings: Tensor) -> Tensor:
        """Every candidate, in the sequence they were proposed."""
        return torch.arange(candidates.shape[1], device=candidates.device).expand_as(candidates)


class FixedOrder(_Decided):
    """Follows an order given beforehand, skipping positions that are known already."""

    located = False

    def __init__(self, order: Tensor, grid: Grid, *, per_step: int = 1, name: str = "given"):
        """Take the order to follow.

        Args:
            order: (N,) or (B, N) int64, one order for all images or one each.
            grid: the grid it covers.
            per_step: positions revealed in parallel, K.
            name: for reports.

        Raises:
            ValueError: not a permutation of the grid, or per_step < 1.
        """
        self.name = name
        self.per_step = _at_least_one(per_step)
        self.rank = inverse(validate(order, grid))

    def propose(self, progress: Progress) -> Tensor:
        """The next K open positions of the order, (B, K)."""
        n = progress.grid.n
        waiting = self.rank.to(progress.revealed.device).masked_fill(progress.revealed, n)
        k = min(self.per_step, int((~progress.revealed[0]).sum()))
        return waiting.topk(k, dim=1, largest=False, sorted=True).indices


@dataclass(frozen=True)
class InferredOrder:
    """The model chooses: every open position is scored, the K that it is surest of are revealed.

    With `score="token_likelihood"` this is the paper's rule (OAR, arXiv 2504.17069 v1, Sec. 3: the most
    likely position-token pair), which looks at the drawn token and so changes the distribution that is
    sampled. The other scores are token-blind: p(x) stays a normalised autoregressive density.
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
    per_step: int = 1
    """Positions revealed in parallel, K."""
    location: float = 0.0
    """Weight of the location head's log-probability in the ratings. At 1, with the likelihood of the true
    token, extraction is the greedy E-step of hard EM on q(order, x)."""
    refresh: int = 1
    """Steps between two scorings: one scoring decides the next `refresh` positions, which are still drawn one
    after another. Costs N (N + 1) / (2 refresh) evaluations."""

    def __post_init__(self) -> None:
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
        if self.refresh > 1 and (self.per_step > 1 or not self.token_blind):
            raise ValueError("refresh > 1 needs per_step=1 and an order that is decided before the tokens")
        _at_least_one(self.per_step)

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

    def propose(self, progress: Progress) -> Tensor:
        """All open positions (B, M), in raster order."""
        return (~progress.revealed).nonzero()[:, 1].reshape(len(progress.revealed), -1)

    def rate(self, log_p: Tensor, tokens: Tensor) -> Tensor:
        """Confidence (B, M) in nats, larger is wanted more."""
        return self.sign * SCORES[self.score](log_p, tokens)

    def select(self, progress: Progress, candidates: Tensor, ratings: Tensor) -> Tensor:
        """The K best after the location head, location noise and distance prior, best first."""
        if self.location:
            assert progress.where is not None
            ratings = ratings + self.location * progress.where.gather(1, candidates)
        if self.temperature:
            ratings = ratings + self.temperature * progress.noise.gather(1, candidates)
        if self.distance:
            ratings = ratings - self.distance * _distance(progress, candidates, self.distance_to)
        k = max(self.per_step, self.refresh)
        return ratings.topk(min(k, candidates.shape[1]), dim=1).indices


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
        if self.score != "entropy" or self.per_step != 1 or self.refresh != 1:
            raise ValueError("expected information takes score='entropy', per_step=1 and refresh=1")
        if self.distance or self.location:
            raise ValueError("expected information knows no distance and no location head: leave them at 0")
        if self.top < 1:
            raise ValueError(f"top must be >= 1, got {self.top}")

    @property
    def name(self) -> str:
        """For reports."""
        return "information"

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

    At temperature 1 (order, x) is drawn ancestrally from q(order, x).
    """

    temperature: float = 1.0
    """Gumbel noise of this scale on log q(position): 1 draws from the head, 0 takes its likeliest."""
    per_step: int = 1
    """Positions revealed in parallel, K, without replacement."""

    name = "location"
    located = True

    def __post_init__(self) -> None:
        if self.temperature < 0:
            raise ValueError(f"temperature must be >= 0, got {self.temperature}")
        _at_least_one(self.per_step)

    def propose(self, progress: Progress) -> Tensor:
        """The K positions that the head wants most, (B, K)."""
        assert progress.where is not None
        wanted = progress.where + self.temperature * progress.noise
        k = min(self.per_step, int((~progress.revealed[0]).sum()))
        return wanted.masked_fill(progress.revealed, -torch.inf).topk(k, dim=1).indices


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


def _at_least_one(per_step: int) -> int:
    if per_step < 1:
        raise ValueError(f"per_step must be >= 1, got {per_step}")
    return per_step


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
    if isinstance(order, PolicyConfig):
        return order.build(grid, streams)
    if not isinstance(order, str):
        return order
    if order == "random":
        return FixedOrder(random_rows(grid, streams), grid, per_step=per_step, name="random")
    if order in STATIC:
        return FixedOrder(static_order(order, grid), grid, per_step=per_step, name=order)
    if order in SCORES:
        return InferredOrder(score=order, per_step=per_step)  # type: ignore[arg-type]
    if order == "information":
        return InformativeOrder(per_step=per_step)
    if order == "location":
        return LocatedOrder(per_step=per_step)
    if order == "class_mean":
        raise ValueError("class_mean needs the orders of the classes: give each image's as a tensor (B, N)")
    raise ValueError(_unknown(order))


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

    def __post_init__(self) -> None:
        if self.order not in ("random", *STATIC, *SCORES, *OWN):
            raise ValueError(_unknown(self.order))
        if self.order not in ("information", "location"):  # what these would do anyway is left unsaid
            object.__setattr__(self, "sign", None if self.sign == 1 else self.sign)
            object.__setattr__(self, "temperature", self.temperature or None)
        changed = {key for key, value in vars(self).items() if value != getattr(PolicyConfig, key)}
        if wrong := changed - self._settings():
            raise ValueError(
                "sign, temperature, distance, location and refresh belong to inferred orders "
                f"({', '.join(INFERRED)}; temperature to location, too), not to '{self.order}': "
                f"remove {', '.join(sorted(wrong))}"
            )
        if self.order in (*SCORES, "information", "location"):
            self._rule()
        _at_least_one(self.per_step)

    def _settings(self) -> set[str]:
        """The fields that mean something for this order."""
        if self.order in SCORES:
            return set(vars(self))
        own = {"information": {"sign", "temperature"}, "location": {"temperature"}}
        return {"order", "per_step"} | own.get(self.order, set())

    def _rule(self) -> OrderPolicy:
        """The policy of an inferred order."""
        given: dict[str, Any] = {"sign": self.sign, "temperature": self.temperature}
        given = {key: value for key, value in given.items() if value is not None}
        if self.order == "location":
            return LocatedOrder(**given, per_step=self.per_step)
        if self.order == "information":
            return InformativeOrder(**given, per_step=self.per_step)
        return InferredOrder(
            self.order,  # type: ignore[arg-type]
            **given,
            distance=self.distance,
            distance_to=self.distance_to,
            per_step=self.per_step,
            location=self.location,
            refresh=self.refresh,
        )

    @property
    def inferred(self) -> bool:
        """Whether every open position is scored to decide where."""
        return self.order in INFERRED

    def evaluations(self, n: int) -> int:
        """Candidate evaluations per image of n positions: what deciding where costs the scorer."""
        if not self.inferred:
            return 0
        scorings = sum(range(n, 0, -max(self.per_step, self.refresh)))
        return scorings * (1 + InformativeOrder.top if self.order == "information" else 1)

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
        if self.order == "class_mean":
            if orders is None:
                raise ValueError("order class_mean needs the orders of the classes: give orders=...")
            return FixedOrder(orders, grid, per_step=self.per_step, name="class_mean")
        if self.order in ("random", *STATIC):
            return make_policy(self.order, grid, streams, per_step=self.per_step)
        return self._rule()
