"""How many positions are revealed at each step, where several are drawn at once.

A schedule says what share of the positions is still open after the share r of the steps:

    name           open after r           steps     used by
    constant       1 - r                  even
    cosine         cos(r pi / 2)          few first, many last: MaskGIT (arXiv 2202.04200), MAR
                                          (arXiv 2406.11838), RandAR (arXiv 2412.01827)
    arccos         arccos(r) 2 / pi       nearly even, many in the last: Halton-MaskGIT (arXiv 2503.17076),
                                          ARPG (arXiv 2503.10568)
    one_minus_cos  1 - cos((1 - r) pi/2)  many first, few last: cosine backwards

Few first spends the steps where nothing is known yet and positions say most of one another.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Literal

Shape = Literal["constant", "cosine", "arccos", "one_minus_cos"]

OPEN: dict[str, Callable[[float], float]] = {
    "constant": lambda r: 1 - r,
    "cosine": lambda r: math.cos(r * math.pi / 2),
    "arccos": lambda r: math.acos(r) * 2 / math.pi,
    "one_minus_cos": lambda r: 1 - math.cos((1 - r) * math.pi / 2),
}
"""Share of the positions that is open after a share of the steps, both in [0, 1]."""


def reveals(n: int, steps: int, schedule: Shape = "constant") -> list[int]:
    """Positions revealed at each step.

    Args:
        n: open positions, >= 0.
        steps: in how many steps; more than n are n.
        schedule: see above.

    Returns:
        min(n, steps) numbers, each >= 1, that sum to n.

    Raises:
        ValueError: an unknown schedule, or no steps.
    """
    if schedule not in OPEN:
        raise ValueError(f"unknown schedule '{schedule}': choose one of {', '.join(OPEN)}")
    if steps < 1:
        raise ValueError(f"steps must be >= 1, got {steps}")
    steps = min(n, steps)
    done = [0]
    for step in range(1, steps + 1):
        goal = n - math.floor(n * OPEN[schedule](step / steps) + 0.5)
        done.append(min(max(goal, done[-1] + 1), n - (steps - step)))  # every step has a position left
    return [after - before for before, after in itertools.pairwise(done)]
