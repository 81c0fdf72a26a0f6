"""The location head: one-step location and content, the first future work of OAR (arXiv 2504.17069 v1).

After token x_t was sampled from hidden state h_t at position pi_t, the head gives p(pi_{t+1} | everything so
far) without another evaluation of the transformer. With it, q(order, x) = prod q(position) q(token |
position) is an autoregressive model, and -log q(order, x) of any one order is an upper bound on -log p(x).
"""

from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from anyorder.contracts import Grid
from anyorder.models import positions
from anyorder.models.layers import Linear

WINDOW = 3
"""Side of the window of cells around a candidate: itself, which is always open, and its eight neighbours."""
MAPS = 2**22
"""Numbers in a map of scores (B, T, N) that are computed at once: fewer steps where B and N are large."""


class LocationTables(NamedTuple):
    """The head's encodings of a grid, evaluated once per forward pass or decoding run."""

    grid: Grid
    absolute: Tensor
    """K, (N, d)."""
    relative: Tensor
    """R by displacement, ((2h - 1)(2w - 1), d)."""


class LocationHead(nn.Module):
    """Score of position p: q . (K(p) + R(p - pi_t) + C(which neighbours of p are revealed)) / sqrt(d).

    q is a small network of (h_t, E[x_t], c); K and R are functions of coordinates, for any grid. The
    condition c is an input besides h_t, which contains it: orders that depend on the class are learnt fully
    only with it.
    """

    def __init__(self, width: int, key_width: int = 64):
        super().__init__()
        self.query = nn.Sequential(Linear(3 * width, width), nn.SiLU(), Linear(width, key_width))
        self.absolute = positions.CoordinateEncoding(key_width)
        self.relative = positions.CoordinateEncoding(key_width)
        self.context = Linear(WINDOW**2, key_width, bias=False)

    def tables(self, grid: Grid) -> LocationTables:
        """Evaluate K and R on a grid: O(N) small-network evaluations."""
        where = self.context.weight.device
        absolute = self.absolute(grid.coordinates(where))
        return LocationTables(grid, absolute, self.relative(positions.displacements(grid, where)))

    def forward(
        self,
        hidden: Tensor,
        content: Tensor,
        condition: Tensor,
        last: Tensor,
        revealed: Tensor,
        tables: LocationTables,
        closed: Tensor | None = None,
    ) -> Tensor:
        """Log-probability of each position to be next, (B, T, N) float32 nats; -inf where it is revealed.

        Args:
            hidden: (B, T, D), what the last token was predicted from; the condition before the first.
            content: (B, T, D), embedding of the last token.
            condition: (B, D), the embedded condition.
            last: (B, T) int64, position of the last token, N before the first.
            revealed: (B, T, N) bool, at least one position open.
            tables: of the grid of the positions.
            closed: (B, T, N) bool, what cannot be next where that is more than `revealed`.
        """
        every = (hidden, content, condition[:, None].expand_as(hidden), last)
        steps = max(1, MAPS // (len(revealed) * revealed.shape[2]))
        maps = (revealed, revealed if closed is None else closed)
        if revealed.shape[1] <= steps:
            return self._log_probs(tables, *every, *maps)
        parts = zip(*(x.split(steps, dim=1) for x in (*every, *maps)), strict=True)
        # Computed again in the backward pass: each part holds several maps of scores.
        again = partial(checkpoint, self._log_probs, use_reentrant=False, preserve_rng_state=False)
        run = again if torch.is_grad_enabled() else self._log_probs
        return torch.cat([run(tables, *part) for part in parts], dim=1)

    def _log_probs(self, tables: LocationTables, *parts: Tensor) -> Tensor:
        """As of `forward` for some steps, with the condition (B, T, D) of each."""
        hidden, content, condition, last, revealed, closed = parts
        # The condition and embeddings are small beside hidden states: without a norm the head would ignore
        # the class, and begin in the order of another one.
        every = torch.stack((hidden, content, condition), dim=-2)
        query = self.query(nn.functional.rms_norm(every, every.shape[-1:]).flatten(-2))
        score = query @ tables.absolute.T + self._from_last(query, last, tables)
        score = score + around(revealed, query @ self.context.weight, tables.grid)
        score = score.float() * query.shape[-1] ** -0.5
        return score.masked_fill(closed, -torch.inf).log_softmax(-1)

    @staticmethod
    def _from_last(query: Tensor, last: Tensor, tables: LocationTables) -> Tensor:
        """q . R(p - last), (B, T, N); zero where there is no last position."""
        table, grid = query @ tables.relative.T, tables.grid
        everywhere = torch.arange(grid.n, device=query.device)
        index = positions.displacement_index(grid, last.clamp(max=grid.n - 1)[..., None], everywhere)
        return table.gather(-1, index).masked_fill((last == grid.n)[..., None], 0)


def around(revealed: Tensor, weights: Tensor, grid: Grid) -> Tensor:
    """Sum of the weights (B, T, 9) of the revealed cells around each position, (B, T, N).

    Takes revealed (B, T, N) bool; cells beyond the border count as open.
    """
    # Each step's map is a channel with a kernel of its own.
    maps = revealed.reshape(1, -1, grid.h, grid.w).to(weights.dtype)
    kernels = weights.reshape(-1, 1, WINDOW, WINDOW)
    sums = nn.functional.conv2d(maps, kernels, padding=WINDOW // 2, groups=len(kernels))
    return sums.reshape(revealed.shape)


def revealed_before(rank: Tensor) -> Tensor:
    """Positions that are revealed before each step, (B, N, N) bool [step, position], from `rank` (B, N)."""
    return rank[:, None, :] < torch.arange(rank.shape[1], device=rank.device)[:, None]
