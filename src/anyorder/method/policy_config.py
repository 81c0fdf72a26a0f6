"""A policy as configuration files and users write it."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any, Literal

import torch
from torch import Tensor

from anyorder.contracts import Grid, OrderPolicy
from anyorder.method.policies import FixedOrder, InferredOrder, InformativeOrder, LocatedOrder
from anyorder.method.sampling import SCORES, TOKEN_BLIND, Streams
from anyorder.method.schedules import Pace, Shape
from anyorder.orders import STATIC, random_orders, static_order


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
