"""How many positions are revealed at each step, where several are sampled at once.

A schedule says what share of the positions is still open after the share r of the steps::

    name           open after r           steps     used by
    constant       1 - r                  even
    cosine         cos(r pi / 2)          few first, many last: MaskGIT (arXiv 2202.04200), MAR
                                          (arXiv 2406.11838), RandAR (arXiv 2412.01827)
    arccos         arccos(r) 2 / pi       nearly even, many in the last: Halton-MaskGIT (arXiv 2503.17076),
                                          ARPG (arXiv 2503.10568)
    one_minus_cos  1 - cos((1 - r) pi/2)  many first, few last: cosine backwards

Few first spends the steps where little is known and positions say most of one another.
"""

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from anyorder.contracts import Progress, require

Shape = Literal["constant", "cosine", "arccos", "one_minus_cos"]

OPEN: dict[str, Callable[[float], float]] = {
    "constant": lambda r: 1 - r,
    "cosine": lambda r: math.cos(r * math.pi / 2),
    "arccos": lambda r: math.acos(r) * 2 / math.pi,
    "one_minus_cos": lambda r: 1 - math.cos((1 - r) * math.pi / 2),
}
"""Share of the positions that is open after a share of the steps, both in [0, 1]."""


def reveals(n: int, steps: int, schedule: Shape = "constant") -> list[int]:
    """Positions revealed at each step: min(n, steps) numbers, each >= 1, that sum to n >= 0."""
    require(schedule in OPEN, f"unknown schedule '{schedule}': choose one of {', '.join(OPEN)}")
    require(steps >= 1, f"steps must be >= 1, got {steps}")
    steps = min(n, steps)
    done = [0]
    for step in range(1, steps + 1):
        goal = n - math.floor(n * OPEN[schedule](step / steps) + 0.5)
        done.append(min(max(goal, done[-1] + 1), n - (steps - step)))  # every step has a position left
    return [after - before for before, after in itertools.pairwise(done)]


def descending(values: Tensor) -> Tensor:
    """Columns (B, M) by value (B, M), the largest first, ties by column."""
    # Not `topk`, which breaks ties as it likes, differently for every size and device.
    return values.argsort(dim=1, descending=True, stable=True)


@dataclass(frozen=True, kw_only=True)
class ParallelSchedule:
    """How many positions are revealed together at each step, and how far apart they lie.

    Positions of one step are blind to one another's tokens. That is for models that were trained with groups,
    or on random orders; others have only learnt to predict the very next position.
    """

    per_step: int = 1
    """Positions revealed at each step, in parallel; more than 1 is faster and less exact."""
    steps: int = 0
    """Number of steps for the whole image, several positions in parallel; 0: `per_step` decides."""
    schedule: Shape = "constant"
    """How `steps` share the positions: cosine few first, arccos many last, one_minus_cos many first."""
    min_distance: float = 0.0
    """Smallest distance in patches between positions of one step, kept while there are such positions."""
    entropy_limit: float | None = None
    """With `per_step`, then the most positions of a step: each image reveals as many as keep the sum of their
    entropies, the largest left out, below this many nats. 0 is one by one; by default there is no limit."""

    def __post_init__(self) -> None:
        for name in ("per_step", "steps", "rate_every", "look_ahead"):
            text = f"{name} must be a whole number, got {getattr(self, name, 0)!r}"
            require(hasattr(getattr(self, name, 0), "__index__"), text)
        require(self.per_step >= 1, f"per_step must be >= 1, got {self.per_step}")
        require(self.steps >= 0, f"steps must be >= 0 (0: per_step decides), got {self.steps}")
        reveals(1, 1, self.schedule)  # refuses an unknown one
        both = f"give either per_step or steps, got {self.per_step} and {self.steps}"
        require(self.per_step == 1 or not self.steps, both)
        endless = f"schedule '{self.schedule}' needs to know in how many steps: give steps=..."
        require(self.schedule == "constant" or self.steps > 0, endless)
        require(0 <= self.min_distance < math.inf, f"min_distance must be >= 0, got {self.min_distance}")
        alone = "min_distance is kept between positions of one step: give per_step or steps, too"
        require(not self.min_distance or self.per_step > 1 or self.steps > 0, alone)
        if self.entropy_limit is not None:
            text = f"entropy_limit must be >= 0 nats, got {self.entropy_limit}"
            require(0 <= self.entropy_limit < math.inf, text)
            text = "entropy_limit needs the most positions of a step: give per_step=8, say, and not steps"
            require(self.per_step > 1, text)

    @property
    def adaptive(self) -> bool:
        """Whether images may reveal different numbers of positions at a step."""
        return bool(self.entropy_limit)

    @property
    def most(self) -> int:
        """The most positions of a step where `steps` does not decide."""
        return 1 if self.entropy_limit == 0 else self.per_step

    @property
    def parallel(self) -> bool:
        """Whether several positions are sampled at once, blind to one another."""
        return self.most > 1 or self.steps > 0

    def sizes(self, n: int) -> list[int]:
        """Positions revealed at each step, out of n open ones; at most, with `entropy_limit`."""
        if self.steps:
            return reveals(n, self.steps, self.schedule)
        return [min(self.most, n - done) for done in range(0, n, self.most)]

    def take(self, progress: Progress) -> int:
        """How many open positions of each image are revealed now; at most, with `entropy_limit`."""
        if self.steps:
            return self.sizes(progress.total)[progress.step]
        return min(self.most, progress.open)

    def within_limit(self, progress: Progress, entropies: Tensor) -> Tensor:
        """How many of the first positions, with entropies (B, K) in nats, each image reveals, (B,) int64.

        The sum of the entropies without the largest bounds what the positions tell of one another: their
        joint entropy is at least the largest (EB-Sampler, arXiv 2505.24857, Sec. 3). 0 where none is open.
        """
        assert self.entropy_limit is not None
        dependence = entropies.cumsum(1) - entropies.cummax(1).values
        return (~(dependence > self.entropy_limit)).sum(1).minimum((~progress.revealed).sum(1))

    def first(self, progress: Progress, positions: Tensor, priority: Tensor) -> Tensor:
        """Columns (B, K) of the `positions` (B, M) to reveal now, the highest `priority` (B, M) first.

        Greedy: the first of those that keep `min_distance` to all before, or of all if none does.
        """
        k, closed = self.take(progress), progress.revealed.gather(1, positions)
        by_priority = descending(priority.float().masked_fill(closed, -torch.inf))
        if k == 1 or not self.min_distance:
            return by_priority[:, :k]
        at = progress.grid.coordinates(positions.device)
        near = torch.cdist(at, at) < self.min_distance - 1e-4
        m, chosen = positions.shape[1], []
        rank = by_priority.argsort(1).masked_fill(closed, 2 * m)
        for _ in range(k):
            column = rank.argmin(1, keepdim=True)
            chosen.append(column)
            crowded = near[positions.gather(1, column)[:, 0]].gather(1, positions)
            rank = rank + m * (crowded & (rank < m))  # behind all that keep the distance
            rank = rank.scatter(1, column, 2 * m)  # and what is chosen behind everything
        return torch.cat(chosen, dim=1)
