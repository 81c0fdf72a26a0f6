"""A policy as configuration files and users write it."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from anyorder import families
from anyorder.contracts import Grid, OrderPolicy, require
from anyorder.method import policies
from anyorder.method.sampling import SCORES, Streams
from anyorder.method.schedules import ParallelSchedule
from anyorder.orders import STATIC, static_order
from anyorder.settings import did_you_mean, parse_stored

INFERRED = (*SCORES, "information")
"""Orders that score every open position at every step."""
LOOK_AHEAD = 4
"""Positions that order `information` rates one step ahead."""
_SCHEDULE = {field.name for field in fields(ParallelSchedule)}
_OF_SCORES = {
    *("sign", "temperature", "distance", "distance_to", "location", "rescore", "rate_every", "class_weight")
}
_SETTINGS: dict[str, set[str]] = {
    **{name: set() for name in ("random", *STATIC)},
    **dict.fromkeys(SCORES, _OF_SCORES),
    "information": {"sign", "temperature"},
    "location": {"temperature"},
    "class_mean": set(),
}
"""Every order, and its settings beside those of `ParallelSchedule`."""


def _own(order: str) -> Any:
    """What an own order is: a class of policies or a function, of the grid; None of other orders and scores.

    Raises:
        ValueError: it cannot be imported, or takes something else.
    """
    if order in _SETTINGS:
        return None
    own = families.resolve("policies", order)
    first, *_ = [*families.parameters(own), ""]
    text = f"{order} must be a class or function of (grid, ...), or a score of (log_p) or (log_p, tokens)"
    require(first in ("grid", "log_p"), text)
    return own if first == "grid" else None


def stored_policy(values: Mapping[str, Any]) -> "PolicyConfig":
    """The configuration in a manifest, of this version or an earlier one."""
    return parse_stored(PolicyConfig, values)


def make_policy(order: "Order", grid: Grid, streams: Streams) -> OrderPolicy:
    """A policy from what users write.

    Args:
        order: a name as in `PolicyConfig.order`, an order (N,) or (B, N) of integers, a `PolicyConfig`, a
            policy, or a function from the grid to one of these.
        grid: the grid to cover.
        streams: one per image; random orders come from them.

    Raises:
        ValueError: unknown name, no permutation of the grid, or orders for another number of images.
    """
    if callable(order):
        order = order(grid)
    if isinstance(order, str):
        order = PolicyConfig(order)
    if isinstance(order, PolicyConfig):
        return order.build(grid, streams)
    if isinstance(order, Sequence) or hasattr(order, "__array__"):
        try:
            rows = _as_tensor(order)
            require(not rows.is_floating_point(), "")
        except (TypeError, ValueError, RuntimeError) as e:
            raise ValueError(f"an order holds whole numbers, (N,) or (B, N), got {str(order)[:60]}") from e
        text = f"got {len(rows)} orders for {len(streams)} images: give one for all, or one each"
        require(rows.ndim != 2 or len(rows) == len(streams), text)
        return policies.FixedOrder(rows.to(streams.device, torch.int64), grid)
    known = hasattr(order, "propose")
    require(known, f"an order is a name, positions, a PolicyConfig or a policy, got {order!r}")
    return order


def _as_tensor(order: Any) -> Tensor:
    """A tensor of numbers, also of arrays that run backwards."""
    return torch.as_tensor(order.copy() if hasattr(order, "strides") else order)


@dataclass(frozen=True)
class PolicyConfig(ParallelSchedule):
    """A policy as configuration files write it."""

    order: str = "entropy"
    """Which position is next. Start with entropy (most certain first) and rate_every=8. Other scores:
    max_prob, margin, token_likelihood (the paper's rule); or information, random, a static order (raster,
    hilbert, ...), class_mean (one order per class), location (the location head), or your own,
    package.module:Name."""
    sign: Literal[1, -1] | None = None
    """For a score, 1: most certain first (the default); -1: least. For information: which are rated ahead."""
    temperature: float | None = None
    """For inferred orders, Gumbel noise of this scale (nats) on the ratings, by default 0; for the location
    head by default 1, which samples from it."""
    distance: float = 0.0
    """For a score, nats lost per patch of distance; larger keeps successive positions together."""
    distance_to: Literal["last", "nearest"] = "last"
    """For a score, distance to the patch revealed last, or to the nearest revealed one."""
    location: float = 0.0
    """For a score, weight of the location head's log-probability in the ratings; 0 ignores the head."""
    rescore: float = 1.0
    """For a score, share of the open positions that is scored at each step: 1 is the exact order, 0.5 nearly
    the same at half the cost."""
    rate_every: int = 1
    """For a score, steps that one rating decides: the next positions are chosen at once and revealed one by
    one in raster order. 8 takes about an eighth of the evaluations, with rescore=0.5 still fewer."""
    class_weight: float = 0.0
    """For a score, nats that the last position of the class's mean order loses against its first: shrinks the
    order of each image towards that of its class. 0 is the paper; needs the orders of the classes."""

    renamed: ClassVar[dict[str, str]] = {"spread": "min_distance"}
    removed: ClassVar[dict[str, Any]] = {"refresh": 1, "full_every": 0}
    """Settings that are gone: `rescore` was nearer to the exact order at the same cost."""

    def __post_init__(self) -> None:
        known = self.order in _SETTINGS or families.is_own("policies", self.order)
        names = f"{', '.join(_SETTINGS)}, or package.module:Name"
        hint = did_you_mean(self.order, _SETTINGS)
        require(known, f"unknown order '{self.order}'{hint}: choose one of {names}")
        if self.order not in ("information", "location"):  # their defaults are others
            object.__setattr__(self, "sign", None if self.sign == 1 else self.sign)
            object.__setattr__(self, "temperature", self.temperature or None)
        wrong = self.changed().keys() - self._allowed()
        text = "sign, temperature, distance, location, rescore, rate_every and class_weight belong to "
        text += f"inferred orders ({', '.join(INFERRED)}; temperature to location, too)"
        require(not wrong, f"{text}, not to '{self.order}': remove {', '.join(sorted(wrong))}")
        super().__post_init__()
        self._inferred_policy()
        for name in ("rated", "located", "token_blind", "deterministic"):
            self._trait(name)

    def _allowed(self) -> set[str]:
        """The settings of the order; of an own class, those among its parameters."""
        own = _own(self.order)
        if isinstance(own, type):
            return set(families.parameters(own))
        return _SCHEDULE | _SETTINGS.get(self.order, set() if own else _SETTINGS["entropy"])

    def _trait(self, name: str) -> bool | None:
        """What an own policy says of itself; of other orders None."""
        if (own := _own(self.order)) is None:
            return None
        given = name in ("token_blind", "deterministic")  # what a function returns is given beforehand
        value = getattr(own, name, None) if isinstance(own, type) else given
        text = f"{self.order} must say {name} = True or False in its class"
        require(isinstance(value, bool), text)
        return value

    def changed(self) -> dict[str, Any]:
        """The settings that are not the defaults, without the order itself."""
        return {k: v for k, v in vars(self).items() if k != "order" and v != getattr(PolicyConfig, k)}

    def _inferred_policy(self) -> policies.InferredOrder | policies.LocatedOrder | None:
        """The policy, unless it follows an order that is fixed beforehand."""
        settings = self.changed()
        if self.order in SCORES or (self.order not in _SETTINGS and _own(self.order) is None):
            return policies.InferredOrder(self.order, **settings)
        if self.order == "information":
            return policies.InferredOrder(**{"sign": -1, "look_ahead": LOOK_AHEAD, **settings})
        return policies.LocatedOrder(**settings) if self.order == "location" else None

    @property
    def inferred(self) -> bool:
        """Whether every open position is scored to decide where."""
        own = self._trait("rated")
        return isinstance(self._inferred_policy(), policies.InferredOrder) if own is None else own

    @property
    def decided(self) -> bool:
        """Whether a model decides where: by its confidence, or by its location head."""
        return self.inferred or self.order == "location" or bool(self._trait("located"))

    @property
    def uses_head(self) -> bool:
        """Whether a location head decides where, or has a say in it."""
        return self.order == "location" or self.location > 0 or bool(self._trait("located"))

    @property
    def by_class(self) -> bool:
        """Whether the policy needs the orders of the classes."""
        return self.order == "class_mean" or self.class_weight > 0

    def evaluations(self, n: int) -> int:
        """Candidate evaluations per image of n positions: what deciding where costs the scorer."""
        policy = self._inferred_policy()
        if isinstance(policy, policies.InferredOrder):
            return policy.evaluations(n)
        return n * (n + 1) // 2 if self.inferred else 0

    @property
    def deterministic(self) -> bool:
        """Whether an image determines its order: with `token_blind`, p(x) is an exact density."""
        if (own := self._trait("deterministic")) is not None:
            return own
        noise = float(self.order == "location") if self.temperature is None else self.temperature
        return noise == 0 and self.order != "random"

    @property
    def token_blind(self) -> bool:
        """Whether the next position is decided without looking at the candidate tokens."""
        own, policy = self._trait("token_blind"), self._inferred_policy()
        return getattr(policy, "token_blind", True) if own is None else own

    @property
    def label(self) -> str:
        """Short name for tables: the order and every setting that is not the default."""
        values = sorted(self.changed().items(), key=lambda item: item[0] in _SCHEDULE)
        texts = [f"{name} {v:g}" if isinstance(v, float) else f"{name} {v}" for name, v in values]
        return ", ".join([self.order, *texts])

    def build(self, grid: Grid, streams: Streams, orders: Tensor | None = None) -> OrderPolicy:
        """The policy for a batch; random orders come from the images' streams.

        `orders` (B, N) int64 are those of each image's class; a ValueError tells where they lack.
        """
        lacking = f"{self.label} needs the orders of the classes: give a tensor (B, N)"
        require(orders is not None or not self.by_class, lacking)
        policy = self._inferred_policy()
        if isinstance(policy, policies.InferredOrder) and self.class_weight:
            assert orders is not None
            return replace(policy, class_orders=orders.to(streams.device))
        if policy is not None:
            return policy
        if isinstance(own := _own(self.order), type):
            return own(grid, **self.changed())
        if own is not None:
            orders = _as_tensor(own(grid))
        elif self.order == "random":
            orders = streams.permutation(grid.n)
        elif self.order in STATIC:
            orders = static_order(self.order, grid)
        assert orders is not None
        schedule = {name: getattr(self, name) for name in _SCHEDULE}
        return policies.FixedOrder(orders.to(streams.device), grid, name=self.order, **schedule)


Order = str | Tensor | Sequence[Any] | OrderPolicy | PolicyConfig | Callable[[Grid], OrderPolicy]
"""Where to go next, as `make_policy` takes it."""
