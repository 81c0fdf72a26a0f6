"""RandAR (arXiv 2412.01827): a query token before each image token says which position comes next.

The sequence is [class, p_1, x_1, p_2, x_2, ...] with p_i the query of the i-th position of the order and x_i
its token; logits are read off the queries. All queries are one learned vector, rotated by their position
before the first layer, and queries and keys are rotated again in every layer.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from anyorder.adapters.layers import Cache, Candidates, GPTConfig, causal, check_shapes, rotate, split_heads
from anyorder.adapters.llamagen import GPT
from anyorder.contracts import Grid
from anyorder.models.attention import merge_heads


@dataclass
class State:
    """What has been revealed so far."""

    cache: Cache
    """Class token, then query and token of each revealed position."""
    rotations: Tensor
    """(N + 1, D / H / 2) complex64."""
    pending: tuple[Tensor, Tensor]
    """Inputs (B, T, D) behind the cache, with their rotations (B, T, D / H / 2): they run with what is scored
    next, so that a step reads the weights once."""
    scored: Tensor
    """Positions (B, S) whose queries were scored since `append`: they lie in the free slots of the cache."""


class RandAR(GPT):
    """p(x[pi_i] | x[pi_<i], pi_<=i, c) for any order pi."""

    def __init__(self, config: GPTConfig):
        """Build from a configuration; weights come from the global random generator."""
        super().__init__(config)
        self.pos_instruct_embeddings = nn.Parameter(0.02 * torch.randn(1, config.width))

    def _queries(self, factors: Tensor) -> Tensor:
        """Query tokens (B, M, D) of positions with the rotations (B, M, D / H / 2)."""
        x = self.pos_instruct_embeddings.expand(*factors.shape[:2], -1)
        return merge_heads(rotate(split_heads(x, self.config.heads), factors))

    def forward(
        self, tokens: Tensor, condition: Tensor | None, order: Tensor, grid: Grid | None = None
    ) -> Tensor:
        """Teacher-forced logits (B, N, V) in order steps.

        Args:
            tokens: (B, N) int64 in raster order.
            condition: (B,) int64 labels, -1 for none, or None.
            order: (B, N) int64.
            grid: the grid of `tokens`, where it is not the one of training.

        Raises:
            ValueError: shapes that do not fit the grid.
        """
        grid = grid or self.grid
        check_shapes(tokens, order, grid)
        rotations = self._rotations(grid)
        factors = rotations[order]
        label = self.cls_embedding(self._labels(len(tokens), condition))
        seen = self.tok_embeddings(tokens.gather(1, order))
        # The token of the last step is seen by nobody.
        x = torch.cat((label, _interleave(self._queries(factors), seen)[:, :-1]), dim=1)
        factors = torch.cat((rotations[-1:].expand(len(order), 1, -1), _interleave(factors, factors)), dim=1)
        for layer in self.layers:
            x = layer(x, factors[:, :-1], causal)
        return self._logits(x[:, 1::2])

    def start(self, batch_size: int, condition: Tensor | None = None, grid: Grid | None = None) -> State:
        """A cache of O(2 * depth * B * N * D) that holds the class token.

        Raises:
            ValueError: labels out of range.
        """
        grid = grid or self.grid
        self._check_labels(batch_size, condition)
        cache = self._empty_cache(len(self.layers), batch_size, 2 * grid.n + 1)
        rotations = self._rotations(grid)
        label = self.cls_embedding(self._labels(batch_size, condition))
        pending = label, rotations[-1:].expand(batch_size, 1, -1)
        return State(
            cache, rotations, pending, torch.empty(batch_size, 0, dtype=torch.int64, device=self.device)
        )

    def score(self, state: State, positions: Tensor) -> Tensor:
        """Logits (B, M, V) of candidate positions (B, M): their queries see what is revealed and themselves.

        Keys and values of the queries are kept in the state, so that `append` need not run them.
        """
        asked, joint = state.rotations[positions], self.config.joint_steps
        before, turned = state.pending
        x, factors = torch.cat((before, self._queries(asked)), 1), torch.cat((turned, asked), 1)
        if state.scored.shape[1] + x.shape[1] > state.cache.room or joint:
            state.scored = state.scored[:, :0]
        attend = Candidates(state.cache, before.shape[1], state.scored.shape[1], joint)
        for layer in self.layers:
            x = layer(x, factors, attend)
        state.cache.length += before.shape[1]
        state.pending = before[:, :0], turned[:, :0]
        # A query that saw others is of no use without them.
        state.scored = torch.cat((state.scored, positions[:, :1] if joint else positions), dim=1)
        return self._logits(x[:, before.shape[1] :])

    def append(self, state: State, positions: Tensor, tokens: Tensor) -> State:
        """Reveal tokens (B, K) at positions (B, K): query and token of each, as one causal block.

        The query of the first position is taken from `score` where it was scored; the rest runs with what is
        scored next.
        """
        factors = state.rotations[positions]
        x = _interleave(self._queries(factors), self.tok_embeddings(tokens))
        factors = _interleave(factors, factors)
        match = positions[:, :1] == state.scored
        if bool(match.any(1).all()):
            state.cache.keep(match.int().argmax(1))
            x, factors = x[:, 1:], factors[:, 1:]
        # Where nothing was scored since the last `append`, what that one left waits in front.
        before, turned = state.pending
        waiting = torch.cat((before, x), dim=1), torch.cat((turned, factors), dim=1)
        return State(state.cache, state.rotations, waiting, state.scored[:, :0])


def _interleave(queries: Tensor, tokens: Tensor) -> Tensor:
    """(B, K, ...) and (B, K, ...) to (B, 2K, ...): the first of each, then the second of each, ..."""
    return torch.stack((queries, tokens), dim=2).flatten(1, 2)
