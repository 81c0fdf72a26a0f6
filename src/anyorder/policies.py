"""Order policies: where to go next. Fixed orders, and orders inferred from the model's confidence."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from anyorder.contracts import Grid, OrderPolicy, Progress
from anyorder.logits import SCORES, TOKEN_BLIND, Streams
from anyorder.orders import STATIC, inverse, random_orders, static_order, validate

Score = Literal["entropy", "max_prob", "margin", "token_likelihood"]


class FixedOrder:
    """Follows an order given beforehand, skipping positions that are known already."""

    token_blind = True

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

    def rate(self, log_p: Tensor, tokens: Tensor) -> Tensor:
        """All candidates are wanted: zeros (B, M)."""
        return torch.zeros(tokens.shape, device=tokens.device)

    def select(self, progress: Progress, candidates: Tensor, ratings: Tensor) -> Tensor:
        """Every candidate, in the sequence of the order."""
        return torch.arange(candidates.shape[1], device=candidates.device).expand_as(candidates)


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

    def __post_init__(self) -> None:
        if self.score not in SCORES:
            raise ValueError(f"unknown score '{self.score}': choose one of {', '.join(SCORES)}")
        if self.sign not in (1, -1):
            raise ValueError(f"sign must be 1 (most certain first) or -1, got {self.sign}")
        if self.temperature < 0:
            raise ValueError(f"temperature must be >= 0, got {self.temperature}")
        if self.distance_to not in ("last", "nearest"):
            raise ValueError(f"distance_to must be 'last' or 'nearest', got '{self.distance_to}'")
        _at_least_one(self.per_step)

    @property
    def name(self) -> str:
        """For reports: the score, marked where it is reversed."""
        return self.score if self.sign == 1 else f"{self.score}-reversed"

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
        """The K best after location noise and distance prior, best first."""
        if self.temperature:
            ratings = ratings + self.temperature * progress.noise.gather(1, candidates)
        if self.distance:
            ratings = ratings - self.distance * _distance(progress, candidates, self.distance_to)
        return ratings.topk(min(self.per_step, candidates.shape[1]), dim=1).indices


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
    raise ValueError(_unknown(order))


def _unknown(order: str) -> str:
    return (
        f"unknown order '{order}': choose random, one of {', '.join(STATIC)}, or one of {', '.join(SCORES)}"
    )


@dataclass(frozen=True)
class PolicyConfig:
    """A policy as configuration files write it."""

    order: str = "entropy"
    """random, a static order (raster, hilbert, ...), or a score (entropy, max_prob, margin, ...)."""
    sign: Literal[1, -1] = 1
    """Of a score; 1: most certain first; -1: least certain first."""
    temperature: float = 0.0
    """Of a score; Gumbel noise of this scale (nats) on the ratings."""
    distance: float = 0.0
    """Of a score; nats lost per patch of distance."""
    distance_to: Literal["last", "nearest"] = "last"
    """Of a score; distance to the patch revealed last, or to the nearest revealed one."""
    per_step: int = 1
    """Positions revealed in parallel, K."""

    def __post_init__(self) -> None:
        if self.order in SCORES:
            self._inferred()
            return
        if self.order != "random" and self.order not in STATIC:
            raise ValueError(_unknown(self.order))
        of_scores = ("sign", "temperature", "distance", "distance_to")
        if any(getattr(self, key) != getattr(PolicyConfig, key) for key in of_scores):
            raise ValueError(
                f"sign, temperature and distance belong to inferred orders ({', '.join(SCORES)}), "
                f"not to '{self.order}'"
            )
        _at_least_one(self.per_step)

    def _inferred(self) -> InferredOrder:
        return InferredOrder(
            self.order,  # type: ignore[arg-type]
            self.sign,
            self.temperature,
            self.distance,
            self.distance_to,
            self.per_step,
        )

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

    def build(self, grid: Grid, streams: Streams) -> OrderPolicy:
        """The policy for a batch; random orders come from the images' streams."""
        if self.order in SCORES:
            return self._inferred()
        return make_policy(self.order, grid, streams, per_step=self.per_step)
