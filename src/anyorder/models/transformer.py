"""The any-order transformer: a decoder-only network whose every input says where the next patch is.

The input of step i >= 1 is E[x[pi_{i-1}]] + A(pi_{i-1}) + R(pi_i - pi_{i-1}); the input of step 0 is
condition + S(pi_0) (OAR, arXiv 2504.17069 v1, Sec. 3), behind a prefix of P inputs where the condition is
more than a class (`models.conditioning`). A, R and S are functions of real 2-D coordinates in patches, not
tables of a fixed grid: one model serves several resolutions and aspect ratios.

Shapes: B images, T steps, M candidates, L cached steps, D width, H heads, V codebook size.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from anyorder.contracts import AnyOrderNetwork, Grid, require
from anyorder.families import Family
from anyorder.models import attention, conditioning, groups, layers, location
from anyorder.models import positions as encoding
from anyorder.models.architecture import Architecture as Architecture
from anyorder.models.architecture import TransformerConfig as TransformerConfig
from anyorder.models.blocks import Block
from anyorder.orders import inverse

if TYPE_CHECKING:
    from anyorder.models.compiled import CompiledBlocks


@dataclass
class State(attention.DecodingState):
    """What has been revealed so far."""

    tables: encoding.PositionTables
    pending: Tensor
    """(B, K, D): condition, or tokens of the last step with their positions; the next ones are missing."""
    last: Tensor
    """(B, K) int64: positions of these tokens, N for the condition."""
    hidden: Tensor
    """(B, D): what the last token was predicted from; the condition before the first."""
    content: Tensor
    """(B, D): embedding of the last token, without its position."""
    start: Tensor
    """(B, D): the class."""
    asked: Tensor
    """(B, D): the whole condition, prefix included."""
    scored: attention.Scored
    where: location.LocationTables | None
    """Of the location head."""
    prefix: int
    """P: how long the cache is before the first step."""
    missing: int | None
    """How many positions are open; None where images may differ."""
    together: "Together | None" = None
    """What `score_group` scored last."""


class Together(NamedTuple):
    """A step that waits behind the valid part of the cache."""

    positions: Tensor
    """(B, K) int64."""
    hidden: Tensor | None = None
    """(B, D): what the last of its tokens is predicted from; None: a scored candidate like any other."""
    inputs: int = 0
    """How long it is."""


class AnyOrderTransformer(AnyOrderNetwork):
    """p(x[pi_i] | x[pi_<i], pi_<=i, c) for any order pi (OAR, arXiv 2504.17069 v1, Sec. 3)."""

    def __init__(self, config: TransformerConfig):
        """Build from a configuration; weights come from the global random generator."""
        super().__init__()
        self.config, self.grid = config, Grid(*config.grid)
        self.vocab_size, self.num_classes = config.vocab_size, config.num_classes
        width, following = config.width, config.next_position != "none"
        self.token_embedding = nn.Embedding(config.vocab_size + 1, width)  # the last row hides a token
        self.condition_embedding = nn.Embedding(config.num_classes + 1, width)  # the last row is "no label"
        self.current = encoding.CoordinateEncoding(width) if config.current_position == "absolute" else None
        self.first = encoding.CoordinateEncoding(width) if following else None
        self.following = encoding.CoordinateEncoding(width) if following else None
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.depth))
        self.norm = layers.RMSNorm(width)
        self.head = layers.Linear(width, config.vocab_size, bias=False)
        self.location = location.LocationHead(width) if config.location else None
        further = (config.attributes, config.text_vocab, config.text_length)
        self.prefix = conditioning.Prefix(width, *further) if config.attributes or further[2] else None
        self.compiled: CompiledBlocks | None = None
        """What `score` runs the blocks with once `compile_decoding` was called."""
        self._initialise()

    @property
    def grouped(self) -> bool:
        """Whether it was trained to predict the positions of one step together."""
        return self.config.grouped

    def _initialise(self) -> None:
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.trunc_normal_(module.weight, std=0.02)
                if isinstance(module, nn.Linear) and module.bias is not None:
                    nn.init.zeros_(module.bias)
        for block in self.blocks:  # the residual stream keeps its scale with depth
            for branch in (block.attention.out, block.mlp.down):  # type: ignore[union-attr]
                nn.init.trunc_normal_(branch.weight, std=0.02 / math.sqrt(2 * len(self.blocks)))  # type: ignore[union-attr, arg-type]

    def _tables(self, grid: Grid) -> encoding.PositionTables:
        """A, S, R and the rotations on a grid: O(N) small-network evaluations."""
        config, weight = self.config, self.head.weight
        at, relative = grid.coordinates(weight.device), config.next_position == "relative"
        ahead = encoding.displacements(grid, at.device) if relative else at
        inputs = ((self.current, at), (self.first, at), (self.following, ahead))
        current, first, following = (each(to) if each is not None else None for each, to in inputs)
        angles = at, config.width // config.heads, weight.dtype
        rotary = encoding.rotary_tables(*angles) if config.rotary else None
        return encoding.PositionTables(grid, current, first, following, relative, rotary)

    def _content(self, tables: encoding.PositionTables, tokens: Tensor, at: Tensor, start: Tensor) -> Tensor:
        """E[x] + A(position), (B, T, D); plus the class (B, D) where every input holds it."""
        x = self.token_embedding(tokens)
        if self.config.class_at == "every":
            x = x + start[:, None]
        return x if tables.current is None else x + F.embedding(at, tables.current)

    def _condition(self, images: int, condition: Tensor | None, check: bool = False) -> tuple[Tensor, Tensor]:
        """Embedding of the class (B, D), and the prefix (B, P, D); see `read_condition`."""
        config = self.config
        sizes = [max(config.num_classes, 1), *(self.prefix.sizes if self.prefix is not None else [])]
        # Without classes, labels are ignored in training.
        look = check or (None if config.num_classes else False)
        values = conditioning.read_condition(condition, images, sizes, self.head.weight.device, look)
        if self.training and condition is not None and (config.num_classes or self.prefix is not None):
            shares = config.label_dropout, config.part_dropout
            values = conditioning.hide(values, len(config.attributes), *shares)
        labelled = (values[:, 0] >= 0) & (config.num_classes > 0)
        start = self.condition_embedding(values[:, 0].where(labelled, config.num_classes))
        if self.prefix is None:
            return start, start.new_empty(images, 0, start.shape[1])
        return start, self.prefix(values[:, 1:])

    def _nothing(self, like: Tensor) -> Tensor:
        """Embedding of no token, (B, D)."""
        return self.token_embedding.weight[-1].expand_as(like)

    def _location_head(self) -> location.LocationHead:
        headless = "this model has no location head: train one with location=true, or choose another order"
        require(self.location is not None, headless)
        return self.location  # type: ignore[return-value]

    def forward(
        self,
        tokens: Tensor,
        condition: Tensor | None,
        order: Tensor,
        grid: Grid | None = None,
        sizes: Sequence[int] | None = None,
    ) -> Tensor:
        """Teacher-forced logits (B, N, V) in order steps; see `contracts.GroupingModel`.

        Raises:
            ValueError: shapes or sizes that do not fit the grid, or a condition that does not fit the model.
        """
        given = self._condition(len(tokens), condition)
        hidden = self._hidden(tokens, *given, order, grid or self.grid, sizes)
        return self.head(hidden[:, -tokens.shape[1] :])

    def joint(
        self,
        tokens: Tensor,
        condition: Tensor | None,
        order: Tensor,
        grid: Grid | None = None,
        sizes: Sequence[int] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Teacher-forced content and location; arguments and errors as of `forward`.

        Returns:
            Logits (B, N, V), and log-probabilities (B, N, N) float32 nats of each position to be next, -inf
            where it is revealed already. Positions of one step are drawn without replacement from what is
            known before it.
        """
        grid, head = grid or self.grid, self._location_head()
        start, prefix = self._condition(len(tokens), condition)
        hidden = self._hidden(tokens, start, prefix, order, grid, sizes)
        read, hidden = hidden.split((prefix.shape[1], order.shape[1]), dim=1)
        content = self.token_embedding(tokens.gather(1, order[:, :-1]))
        content = torch.cat((self._nothing(start)[:, None], content), dim=1)
        asked = self._asked(start, read).to(hidden.dtype)
        behind = torch.cat((asked[:, None], hidden[:, :-1]), dim=1)
        known = groups.layout(sizes, grid.n, order.device).behind
        before = F.pad(order[:, :-1], (1, 0), value=grid.n)  # the position of the last token
        behind, content, before = behind[:, known], content[:, known], before[:, known]
        if not self.config.location_gradient:
            behind, content, asked = behind.detach(), content.detach(), asked.detach()
        closed = location.revealed_before(inverse(order))
        where = head(behind, content, asked, before, closed[:, known], head.tables(grid), closed)
        return self.head(hidden), where

    @staticmethod
    def _asked(start: Tensor, read: Tensor) -> Tensor:
        """The whole condition, (B, D): the class (B, D), and what was read of the prefix (B, P, D)."""
        return start + read[:, -1] if read.shape[1] else start

    def _hidden(
        self,
        tokens: Tensor,
        start: Tensor,
        prefix: Tensor,
        order: Tensor,
        grid: Grid,
        sizes: Sequence[int] | None = None,
    ) -> Tensor:
        """Hidden states (B, P + N, D): of the prefix, and what the tokens of each step are predicted from."""
        encoding.check_shapes(tokens, order, grid)
        layers.unpack(self)
        tables, plan, ahead = self._tables(grid), groups.layout(sizes, grid.n, order.device), prefix.shape[1]
        current, asked = order[:, plan.holds], order[:, plan.asks]
        first, following = asked[:, : plan.first], asked[:, plan.first :]
        seen = tokens.gather(1, current)
        if self.training and self.config.token_dropout:
            hidden = torch.rand(seen.shape, device=seen.device) < self.config.token_dropout
            seen = torch.where(hidden, self.vocab_size, seen)
        x = self._content(tables, seen, current, start) + tables.next(current, following)
        opening = start[:, None].expand(-1, first.shape[1], -1)  # condition + S(position)
        opening = opening if tables.first is None else opening + F.embedding(first, tables.first)
        x = torch.cat((prefix, opening, x), dim=1)
        before = F.pad(current, (ahead + plan.first, 0), value=grid.n)
        after = F.pad(asked, (ahead, 0), value=grid.n)
        rotation, attend = tables.rotation(before, after), attention.causal
        if plan.group is not None:
            ids = torch.cat((torch.arange(-ahead, 0, device=order.device), plan.group))
            attend = partial(attention.causal, mask=groups.visible(ids))
        for block in self.blocks:
            if self.config.checkpointing and self.training:
                x = checkpoint(block, x, rotation, attend, use_reentrant=False)
            else:
                x = block(x, rotation, attend)
        read, x = self.norm(x).split((ahead, x.shape[1] - ahead), dim=1)
        return torch.cat((read, x[:, plan.outputs]), dim=1)

    def start(self, batch_size: int, condition: Tensor | None = None, grid: Grid | None = None) -> State:
        """A cache of O(depth * B * (P + N) * D) that holds the prefix only; the class is pending.

        Weights must not change while it is used, see `layers.pack`. Refuses conditions out of range.
        """
        grid, config = grid or self.grid, self.config
        layers.unpack(self)
        layers.pack(self if self.compiled is None else self.head)
        start, prefix = self._condition(batch_size, condition, check=True)
        weight, length = self.head.weight, prefix.shape[1]
        size = (config.depth, batch_size, config.heads, length + grid.n, config.width // config.heads)
        state = State(
            cache=attention.Cache.empty(weight, *size),
            tables=self._tables(grid),
            pending=start[:, None],
            last=torch.full((batch_size, 1), grid.n, device=weight.device),
            hidden=start,
            content=self._nothing(start),
            start=start,
            asked=start,
            scored=attention.Scored.empty(start, grid.n),
            where=self.location.tables(grid) if self.location is not None else None,
            prefix=length,
            missing=grid.n,
        )
        if length:
            nowhere = torch.full((batch_size, length), grid.n, device=weight.device)
            read = self._extend(state, prefix, nowhere, nowhere)
            state.hidden = state.asked = self._asked(start, self.norm(read))
        return state

    def _extend(self, state: State, x: Tensor, before: Tensor, after: Tensor) -> Tensor:
        """Run inputs (B, T, D) as one causal block into the cache."""
        rotation = state.tables.rotation(before, after)
        state.cache.reserve(x.shape[1])
        x = attention.run_blocks(self.blocks, x, rotation, state.cache.extend())
        state.cache.length += x.shape[1]
        return x

    @staticmethod
    def _inputs(state: State, positions: Tensor, pending: Tensor, last: Tensor) -> Tensor:
        """Pending inputs (B, M, D) or (B, 1, D), at `last`, completed with positions (B, M): (B, M, D)."""
        if state.cache.length == state.prefix:
            ahead = 0.0 if state.tables.first is None else F.embedding(positions, state.tables.first)
        else:
            ahead = state.tables.next(last, positions)
        return (pending + ahead).expand(-1, positions.shape[1], -1)

    def score(self, state: State, positions: Tensor) -> Tensor:
        """Logits (B, M, V) of candidate positions (B, M).

        Each attends to the shared prefix and to itself: O(M L), no copies of the cache. All are remembered
        until `append`: neither the chosen one nor a second score of some of them runs the network again.
        """
        state.require_current()
        found = state.scored.find(positions, state.missing)
        if found is not None:
            return self.head(state.scored.pick(found))
        state.together = None
        if state.last.shape[1] > 1:
            return self.head(self._run_alone(state, positions))
        differ = state.cache.lengths is not None  # hidden states are kept, keys and values are not
        room = state.scored.positions.shape[1] if differ else state.cache.room
        columns = state.scored.columns(positions.shape[1], room)
        x = self._run(state, positions, None if differ else columns)
        if columns is not None:
            state.scored.add(columns, positions, x)
        return self.head(x)

    def _run(self, state: State, positions: Tensor, columns: slice | None) -> Tensor:
        """Hidden states (B, M, D) of candidates; their keys and values go to `columns` behind the cache."""
        m, length = positions.shape[1], state.cache.length
        free = None if columns is None else slice(length + columns.start, length + columns.stop)
        attends = state.cache.candidates(free)
        compiled = None if self.training or torch.is_grad_enabled() else self.compiled
        if compiled is not None:
            positions = compiled.pad(positions)
        x = self._inputs(state, positions, state.pending, state.last)
        rotation = state.tables.rotation(state.last.expand_as(positions), positions)
        if compiled is not None:
            return compiled(self.blocks, self.norm, x, rotation, attends)[:, :m]
        return self.norm(attention.run_blocks(self.blocks, x, rotation, attends))

    def _run_alone(self, state: State, positions: Tensor) -> Tensor:
        """Hidden states (B, M, D) of candidates, each as a step of its own behind a step of several."""
        k, m = state.last.shape[1], positions.shape[1]
        last, positions = state.last.repeat(1, m), positions.repeat_interleave(k, dim=1)
        x = self._inputs(state, positions, state.pending.repeat(1, m, 1), last)
        rotation = state.tables.rotation(last, positions)
        x = attention.run_blocks(self.blocks, x, rotation, state.cache.candidates(None, size=k))
        return self.norm(x[:, ::k])

    def score_group(self, state: State, positions: Tensor) -> Tensor:
        """Logits (B, K, V) of the positions (B, K) of one step; see `contracts.GroupingModel`."""
        state.require_current()
        if positions.shape[1] == state.last.shape[1] == 1:
            logits = self.score(state, positions)
            state.together = Together(positions)
            return logits
        m = max(positions.shape[1], state.last.shape[1])
        at, last = groups.padded(positions, m), groups.padded(state.last, m)
        x = self._inputs(state, at, groups.padded(state.pending, m), last)
        rotation = state.tables.rotation(last, at)
        state.cache.reserve(m)  # steps that shrink have more inputs than positions
        x = attention.run_blocks(self.blocks, x, rotation, state.cache.extend(joint=True))
        x = self.norm(x[:, : positions.shape[1]])
        state.scored.count, state.together = 0, Together(positions, x[:, -1], m)
        return self.head(x)

    def locate(self, state: State, revealed: Tensor) -> Tensor:
        """Log-probability of each position to be next, (B, N) float32 nats; -inf where `revealed` (B, N)."""
        state.require_current()
        head, content = self._location_head(), state.content[:, None]
        assert state.where is not None
        hidden, asked = state.hidden[:, None].to(content.dtype), state.asked.to(content.dtype)
        return head(hidden, content, asked, state.last[:, -1:], revealed[:, None], state.where)[:, 0]

    def append(self, state: State, positions: Tensor, tokens: Tensor) -> State:
        """Reveal tokens (B, K) at positions (B, K), in that sequence, one by one; the old state is used up.

        The input that leads to the first position is taken from `score`; the others run as one causal block.
        """
        state.require_current()
        if state.cache.lengths is not None:
            every = torch.full_like(positions[:, 0], positions.shape[1])
            return self.append_some(state, positions, tokens, every)
        if state.last.shape[1] > 1:  # the first position becomes a step of its own
            self.score_group(state, positions[:, :1])
            following = self.append_group(state, tokens[:, :1])
            positions, tokens = positions[:, 1:], tokens[:, 1:]
            return self.append(following, positions, tokens) if positions.shape[1] else following
        found, hidden, inputs = state.scored.find(positions[:, :1], state.missing), state.hidden, []
        # Step i's input holds the token before it, so K reveals run K inputs, and the last token is pending.
        before, after = torch.cat((state.last, positions[:, :-1]), dim=1), positions
        if found is not None:
            hidden = state.scored.pick(found)[:, 0]
            state.cache.keep(found)
            before, after = before[:, 1:], after[:, 1:]
        else:
            inputs.append(self._inputs(state, positions[:, :1], state.pending, state.last))
        if positions.shape[1] > 1:
            inputs.append(self._rest(state, positions, tokens))
        if inputs:
            hidden = self.norm(self._extend(state, torch.cat(inputs, dim=1), before, after)[:, -1])
        return self._advance(state, positions[:, -1:], tokens[:, -1:], hidden, positions.shape[1])

    def _rest(self, state: State, positions: Tensor, tokens: Tensor) -> Tensor:
        """Inputs (B, K - 1, D) that lead from each of the positions (B, K) to the next."""
        x = self._content(state.tables, tokens[:, :-1], positions[:, :-1], state.start)
        return x + state.tables.next(positions[:, :-1], positions[:, 1:])

    def append_some(self, state: State, positions: Tensor, tokens: Tensor, counts: Tensor) -> State:
        """As of `append`, the first `counts` (B,) of them in each image; see `contracts.AdaptiveModel`.

        All K inputs run, also the one to the first position. The cache of each image stays packed.
        """
        state.require_current()
        lengths, cache = state.cache.let_differ(), state.cache
        first = self._inputs(state, positions[:, :1], state.pending, state.last)
        x = torch.cat((first, self._rest(state, positions, tokens)), dim=1)
        hidden = self._extend(state, x, torch.cat((state.last, positions[:, :-1]), dim=1), positions)
        cache.lengths = lengths + counts
        cache.length = int(cache.lengths.max())
        last = hidden[torch.arange(len(x), device=x.device), (counts - 1).clamp_min(0)]
        return self._advance(state, positions[:, -1:], tokens[:, -1:], self.norm(last), None)

    def append_group(self, state: State, tokens: Tensor) -> State:
        """Reveal tokens (B, K) at the positions that `score_group` scored last; the old state is used up."""
        state.require_current()
        require(state.together is not None, "append_group reveals what score_group scored: call that first")
        positions, hidden, inputs = state.together  # type: ignore[misc]
        if hidden is None:
            return self.append(state, positions, tokens)
        state.cache.length += inputs
        return self._advance(state, positions, tokens, hidden, positions.shape[1])

    def _advance(
        self, state: State, positions: Tensor, tokens: Tensor, hidden: Tensor, revealed: int | None
    ) -> State:
        """The state in which the tokens (B, K) of the last step are pending."""
        state.scored.count = 0
        known = revealed is not None and state.missing is not None
        return state.advance(
            pending=self._content(state.tables, tokens, positions, state.start),
            last=positions,
            hidden=hidden,
            content=self.token_embedding(tokens[:, -1]),
            together=None,
            missing=state.missing - revealed if known else None,  # type: ignore[operator]
        )


FAMILY = Family(AnyOrderTransformer, TransformerConfig, class_table="condition_embedding.weight")
