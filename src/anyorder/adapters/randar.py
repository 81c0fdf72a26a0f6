"""RandAR (arXiv 2412.01827): a query token before each image token says which position comes next.

The sequence is [class, p_1, x_1, p_2, x_2, ...] with p_i the query of the i-th position of the order and x_i
its token; logits are read off the queries. All queries are one learned vector, rotated by their position
before the first layer, and queries and keys are rotated again in every layer.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from anyorder import families
from anyorder.adapters import layers, llamagen
from anyorder.models import attention
from anyorder.tokenizers.maskgit_vq import MASKGIT_VQ
from anyorder.tokenizers.vq import VQ16


@dataclass
class State(attention.DecodingState):
    """What has been revealed so far: class token, then query and token of each position."""

    rotations: Tensor
    """(N + 1, D / H / 2) complex64."""
    pending: tuple[Tensor, Tensor]
    """Inputs (B, T, D) behind the cache, with their rotations (B, T, D / H / 2): they run with the candidates
    that are scored next, so that a step reads the weights once."""
    scored: attention.Scored


class RandAR(llamagen.GPT):
    """p(x[pi_i] | x[pi_<i], pi_<=i, c) for any order pi."""

    inputs = 2

    def __init__(self, config: layers.GPTConfig):
        super().__init__(config)
        self.pos_instruct_embeddings = torch.nn.Parameter(0.02 * torch.randn(1, config.width))

    def _queries(self, factors: Tensor) -> Tensor:
        """Query tokens (B, M, D) of positions with the rotations (B, M, D / H / 2)."""
        x = self.pos_instruct_embeddings.expand(*factors.shape[:2], -1)
        return attention.merge_heads(layers.rotate(attention.split_heads(x, self.config.heads), factors))

    def _teacher_forced(self, tokens: Tensor, labels: Tensor, order: Tensor, rotations: Tensor) -> Tensor:
        factors, seen = rotations[order], self.tok_embeddings(tokens.gather(1, order))
        # The token of the last step is seen by nobody.
        x = torch.cat((self._class(labels), _interleave(self._queries(factors), seen)[:, :-1]), dim=1)
        factors = torch.cat((rotations[-1:].expand(len(order), 1, -1), _interleave(factors, factors)), dim=1)
        attends = [attention.causal] * len(self.layers)
        return self._logits(attention.run_blocks(self.layers, x, factors[:, :-1], attends)[:, 1::2])

    def _start(self, labels: Tensor, rotations: Tensor, cache: attention.Cache) -> State:
        pending = self._class(labels), rotations[-1:].expand(len(labels), 1, -1)
        positions = labels.new_empty(len(labels), len(rotations) - 1)
        return State(cache, rotations, pending, attention.Scored(positions))

    def score(self, state: State, positions: Tensor) -> Tensor:
        """Logits (B, M, V) of candidate positions (B, M): their queries see what is revealed and themselves.

        Keys and values of the queries are kept in the state, so that `append` need not run them.
        """
        state.require_current()
        asked, joint, cache = state.rotations[positions], self.config.joint_steps, state.cache
        before, turned = state.pending
        x, factors = torch.cat((before, self._queries(asked)), 1), torch.cat((turned, asked), 1)
        waiting = before.shape[1]
        if joint:  # a query that saw others is of no use without them: only the first one is kept
            state.scored.count = 0
        columns = state.scored.columns(positions.shape[1], cache.room - waiting)
        assert columns is not None, "more candidates than open positions"
        free = slice(cache.length + columns.start, cache.length + waiting + columns.stop)
        x = attention.run_blocks(self.layers, x, factors, cache.candidates(free, waiting, joint))
        cache.length += waiting
        state.pending = before[:, :0], turned[:, :0]
        state.scored.add(columns, positions)
        if joint:
            state.scored.count = 1
        return self._logits(x[:, waiting:])

    def append(self, state: State, positions: Tensor, tokens: Tensor) -> State:
        """Reveal tokens (B, K) at positions (B, K): query and token of each, as one causal block.

        The first query is taken from `score` where it was scored; the rest runs with what is scored next.
        """
        state.require_current()
        factors = state.rotations[positions]
        x = _interleave(self._queries(factors), self.tok_embeddings(tokens))
        factors = _interleave(factors, factors)
        found = state.scored.find(positions[:, :1])
        if found is not None:
            state.cache.keep(found)
            x, factors = x[:, 1:], factors[:, 1:]
        # Where nothing was scored since the last `append`, what that one left waits in front.
        before, turned = state.pending
        state.scored.count = 0
        return state.advance(pending=(torch.cat((before, x), dim=1), torch.cat((turned, factors), dim=1)))


def _interleave(queries: Tensor, tokens: Tensor) -> Tensor:
    """(B, K, ...) and (B, K, ...) to (B, 2K, ...): the first of each, then the second of each, ..."""
    return torch.stack((queries, tokens), dim=2).flatten(1, 2)


FILES = tuple(
    families.File(
        "ziqipang/RandAR", f"randar_{name}_360k_bs_1024_lr_0.0004.safetensors", vq, guidance=(4.0, "linear")
    )
    for name, vq in (("0.3b_llamagen", VQ16), ("0.3b_maskgit", MASKGIT_VQ), ("0.7b_llamagen", VQ16))
)
MARKER = "pos_instruct_embeddings"
FAMILY = families.Family(
    RandAR, layers.GPTConfig, MARKER, llamagen.read_config, FILES, class_table=llamagen.CLASS_TABLE
)
