"""The any-order transformer: a decoder-only network whose every input says where the next patch is.

The input of step i >= 1 is E[x[pi_{i-1}]] + A(pi_{i-1}) + R(pi_i - pi_{i-1}); the input of step 0 is
condition + S(pi_0) (OAR, arXiv 2504.17069 v1, Sec. 3), behind a prefix of P inputs where the condition is
more than a class (`models.condition`). A, R and S are functions of real 2-D coordinates
in patches, not tables of a fixed grid: one model serves several resolutions and aspect ratios.

Shapes: B images, T steps, M candidates, L cached steps, D width, H heads, V codebook size.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from anyorder.contracts import AnyOrderNetwork, Grid
from anyorder.models.attention import (
    Attend,
    Extend,
    Scored,
    SharedPrefix,
    State,
    _pick,
    causal,
    keep,
    merge_heads,
)
from anyorder.models.conditioning import Prefix, hide
from anyorder.models.layers import Linear, RMSNorm, SwiGLU
from anyorder.models.location import LocationHead, revealed_before
from anyorder.models.positions import (
    CoordinateEncoding,
    PositionTables,
    Rotation,
    displacement_index,
    displacements,
    rotate,
)
from anyorder.orders import inverse

if TYPE_CHECKING:
    from anyorder.models.compiled import CompiledBlocks


@dataclass
class Architecture:
    """Size and switches that users choose."""

    depth: int = 6
    """Number of blocks."""
    width: int = 256
    """D."""
    heads: int = 4
    """H; the head width D / H must be divisible by 4."""
    next_position: Literal["relative", "absolute", "none"] = "relative"
    """How an input says where the next patch is; "none" can only learn one fixed order (ablation)."""
    current_position: Literal["absolute", "none"] = "absolute"
    """How an input says where its own patch is."""
    class_at: Literal["first", "every"] = "first"
    """Which inputs hold the class: the first alone, as in the paper, or every one."""
    rotary: bool = False
    """Rotate queries by the next position and keys by their own (2-D RoPE), besides the sums."""
    qk_norm: bool = False
    """RMS-normalise queries and keys of each head."""
    dropout: float = 0.0
    """On residual branches."""
    token_dropout: float = 0.0
    """Share of input tokens hidden in training (their position stays)."""
    label_dropout: float = 0.1
    """Share of images whose condition is hidden in training, for guidance."""
    part_dropout: float = 0.3
    """Share of classes, of each attribute and of captions hidden on their own in training, besides, so that
    any of them may be left out; for conditions of several parts."""
    location: bool = False
    """A head that says where to go next, besides what is there: order and content as one model."""
    location_gradient: bool = True
    """Whether the location head's loss trains the whole model; if not, content learns as it would without."""
    checkpointing: bool = False
    """Recompute blocks in the backward pass: memory O(depth) less, time about a third more."""

    def __post_init__(self) -> None:
        for name in ("depth", "width", "heads"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be >= 1, got {getattr(self, name)}")
        if self.width % (4 * self.heads):
            raise ValueError(f"width must be a multiple of 4 * heads = {4 * self.heads}, got {self.width}")
        for name in ("dropout", "token_dropout", "label_dropout", "part_dropout"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} must lie in [0, 1), got {getattr(self, name)}")
        if self.next_position not in ("relative", "absolute", "none"):
            raise ValueError(f"next_position must be relative, absolute or none, got '{self.next_position}'")
        if self.current_position not in ("absolute", "none"):
            raise ValueError(f"current_position must be absolute or none, got '{self.current_position}'")
        if self.class_at not in ("first", "every"):
            raise ValueError(f"class_at must be first or every, got '{self.class_at}'")
        if self.rotary and "none" in (self.next_position, self.current_position):
            raise ValueError("rotary tells both positions: it cannot be combined with a position of 'none'")


@dataclass
class TransformerConfig(Architecture):
    """An architecture and what follows from the tokens it is trained on."""

    vocab_size: int = 512
    """V, the tokenizer's codebook size."""
    grid: tuple[int, int] = (8, 8)
    """Rows and columns of patches in training."""
    num_classes: int = 0
    """Number of class labels; 0 is unconditional."""
    attributes: tuple[int, ...] = ()
    """Number of values of each attribute that pictures may be asked for."""
    text_vocab: int = 0
    """Number of caption tokens; 0 takes no captions."""
    text_length: int = 0
    """Most tokens of a caption."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if min(self.attributes, default=1) < 1 or (self.text_vocab < 1) != (self.text_length < 1):
            raise ValueError(
                "attributes must have >= 1 value each, text_vocab and text_length both be 0 or >= 1, got "
                f"{list(self.attributes)}, {self.text_vocab} and {self.text_length}"
            )
        if self.vocab_size < 1 or self.num_classes < 0:
            raise ValueError(
                f"vocab_size must be >= 1 and num_classes >= 0, got {self.vocab_size} and {self.num_classes}"
            )
        Grid(*self.grid)


class Attention(nn.Module):
    """Multi-head self-attention; *who attends to whom* is an argument, never a mode."""

    def __init__(self, config: TransformerConfig):
        """Fused projections without biases."""
        super().__init__()
        self.heads = config.heads
        self.qkv = Linear(config.width, 3 * config.width, bias=False)
        self.out = Linear(config.width, config.width, bias=False)
        head_width = config.width // config.heads
        self.q_norm = RMSNorm(head_width, eps=1e-6) if config.qk_norm else nn.Identity()
        self.k_norm = RMSNorm(head_width, eps=1e-6) if config.qk_norm else nn.Identity()

    def project(self, x: Tensor, rotation: Rotation | None) -> tuple[Tensor, Tensor, Tensor]:
        """Inputs (B, T, D) to queries, keys and values, each (B, H, T, D / H)."""
        b, t, d = x.shape
        q, k, v = self.qkv(x).view(b, t, 3, self.heads, d // self.heads).permute(2, 0, 3, 1, 4)
        q, k = self.q_norm(q), self.k_norm(k)
        if rotation is not None:
            q, k = rotate(q, *rotation.queries), rotate(k, *rotation.keys)
        return q.to(v.dtype), k.to(v.dtype), v


class Block(nn.Module):
    """Pre-norm residual block."""

    def __init__(self, config: TransformerConfig):
        """Attention and SwiGLU."""
        super().__init__()
        self.attention_norm = RMSNorm(config.width, eps=1e-6)
        self.attention = Attention(config)
        self.mlp_norm = RMSNorm(config.width, eps=1e-6)
        self.mlp = SwiGLU(config.width)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor, rotation: Rotation | None, attend: Attend) -> Tensor:
        """(B, T, D) to (B, T, D)."""
        return self.after(x, merge_heads(attend(*self.before(x, rotation))))

    def before(self, x: Tensor, rotation: Rotation | None) -> tuple[Tensor, Tensor, Tensor]:
        """What is to be attended with, from inputs (B, T, D): queries, keys, values (B, H, T, D / H)."""
        return self.attention.project(self.attention_norm(x), rotation)

    def after(self, x: Tensor, attended: Tensor) -> Tensor:
        """Outputs (B, T, D) from the inputs and from what the heads made of them, both (B, T, D)."""
        # A sum lies in memory as its first term: for few rows as `Linear` returns, and wants, them.
        x = self.dropout(self.attention.out(attended)) + x
        return self.dropout(self.mlp(self.mlp_norm(x))) + x


class AnyOrderTransformer(AnyOrderNetwork):
    """p(x[pi_i] | x[pi_<i], pi_<=i, c) for any order pi (OAR, arXiv 2504.17069 v1, Sec. 3)."""

    def __init__(self, config: TransformerConfig):
        """Build from a configuration; weights come from the global random generator."""
        super().__init__()
        self.config = config
        self.vocab_size = config.vocab_size
        self.num_classes = config.num_classes
        self.grid = Grid(*config.grid)
        width = config.width
        self.token_embedding = nn.Embedding(config.vocab_size + 1, width)  # the last row hides a token
        self.condition_embedding = nn.Embedding(config.num_classes + 1, width)  # the last row is "no label"
        self.current = CoordinateEncoding(width) if config.current_position == "absolute" else None
        self.first = CoordinateEncoding(width) if config.next_position != "none" else None
        self.following = CoordinateEncoding(width) if config.next_position != "none" else None
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.depth))
        self.norm = RMSNorm(width, eps=1e-6)
        self.head = Linear(width, config.vocab_size, bias=False)
        self.location = LocationHead(width) if config.location else None
        further = (config.attributes, config.text_vocab, config.text_length)
        self.prefix = Prefix(width, *further) if config.attributes or config.text_length else None
        self.compiled: CompiledBlocks | None = None
        """What `score` runs the blocks with once `compile_decoding` was called."""
        self._initialise()

    def _initialise(self) -> None:
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
            elif isinstance(module, nn.Embedding):
                nn.init.trunc_normal_(module.weight, std=0.02)
        for block in self.blocks:  # the residual stream keeps its scale with depth
            for branch in (block.attention.out, block.mlp.down):  # type: ignore[union-attr]
                nn.init.trunc_normal_(branch.weight, std=0.02 / math.sqrt(2 * len(self.blocks)))  # type: ignore[union-attr, arg-type]

    # --- inputs ------------------------------------------------------------------------------------

    def _tables(self, grid: Grid) -> PositionTables:
        """Evaluate A, S, R and the rotations on a grid: O(N) small-network evaluations."""
        at = grid.coordinates(self.head.weight.device)
        target = displacements(grid, at.device) if self.config.next_position == "relative" else at
        cos, sin = self._rotations(at) if self.config.rotary else (None, None)
        return PositionTables(
            grid=grid,
            current=self.current(at) if self.current is not None else None,
            first=self.first(at) if self.first is not None else None,
            following=self.following(target) if self.following is not None else None,
            cos=cos,
            sin=sin,
        )

    def _rotations(self, at: Tensor) -> tuple[Tensor, Tensor]:
        """Half of the frequencies turn with the row, half with the column, base 100 (small grids)."""
        quarter = self.config.width // self.config.heads // 4
        frequencies = 100.0 ** (-torch.arange(quarter, device=at.device) / quarter)
        angles = (at[:, :, None] * frequencies).flatten(1)
        angles = torch.cat((angles, torch.zeros_like(angles[:1])))
        return angles.cos(), angles.sin()

    def _content(self, tables: PositionTables, tokens: Tensor, positions: Tensor, start: Tensor) -> Tensor:
        """E[x] + A(position), (B, T, D); plus the class (B, D) where every input holds it."""
        x = self.token_embedding(tokens)
        if self.config.class_at == "every":
            x = x + start[:, None]
        return x if tables.current is None else x + F.embedding(positions, tables.current)

    def _next(self, tables: PositionTables, last: Tensor, positions: Tensor) -> Tensor | float:
        """R(next - last) for last in [0, N), (B, T, D)."""
        if tables.following is None:
            return 0.0
        relative = self.config.next_position == "relative"
        index = displacement_index(tables.grid, last, positions) if relative else positions
        return F.embedding(index, tables.following)

    def _rotation(self, tables: PositionTables, last: Tensor, positions: Tensor) -> Rotation | None:
        """Queries turn by the position they ask about, keys by their own."""
        if tables.cos is None or tables.sin is None:
            return None
        cos, sin = tables.cos[:, None], tables.sin[:, None]
        return Rotation(
            queries=(cos[positions].transpose(1, 2), sin[positions].transpose(1, 2)),
            keys=(cos[last].transpose(1, 2), sin[last].transpose(1, 2)),
        )

    @property
    def _sizes(self) -> list[int]:
        """How many values each column of a condition has."""
        return [max(self.config.num_classes, 1), *(self.prefix.sizes if self.prefix is not None else [])]

    def _condition(
        self, batch_size: int, condition: Tensor | None, check: bool = False
    ) -> tuple[Tensor, Tensor]:
        """Embedding of the class (B, D), and the prefix (B, P, D); None and -1 are nothing.

        Raises:
            ValueError: a condition of another shape, or with `check`, which waits for the device, values that
                are out of range.
        """
        sizes = self._sizes
        if condition is None:
            values = torch.full((batch_size, len(sizes)), -1, device=self.head.weight.device)
        else:
            values = condition[:, None] if condition.ndim == 1 else condition
            fits = condition.ndim == 1 or (condition.ndim == 2 and self.prefix is not None)
            fits = fits and len(values) == batch_size and values.shape[1] <= len(sizes)
            if fits and check:
                limits = torch.tensor(sizes[: values.shape[1]], device=values.device)
                fits = not bool(((values < -1) | (values >= limits)).any())
            if not fits:
                raise self._refusal(batch_size, condition)
            values = F.pad(values, (0, len(sizes) - values.shape[1]), value=-1)
            if self.training and (self.config.num_classes or self.prefix is not None):
                dropout = (self.config.label_dropout, self.config.part_dropout)
                values = hide(values, len(self.config.attributes), *dropout)
        classes = self.config.num_classes
        start = self.condition_embedding(values[:, 0].where((values[:, 0] >= 0) & (classes > 0), classes))
        if self.prefix is None:
            return start, start.new_empty(batch_size, 0, start.shape[1])
        return start, self.prefix(values[:, 1:])

    def _refusal(self, batch_size: int, condition: Tensor) -> ValueError:
        sizes, several = self._sizes, ""
        if self.prefix is not None:
            several = f", or ({batch_size}, up to {len(sizes)}) within {sizes[:8]}"
        return ValueError(
            f"labels must have shape ({batch_size},) and lie in [0, {sizes[0]}) (-1 for none){several}, "
            f"got shape {tuple(condition.shape)} with values {condition.unique().tolist()[:8]}"
        )

    # --- teacher forcing ---------------------------------------------------------------------------

    def forward(
        self, tokens: Tensor, condition: Tensor | None, order: Tensor, grid: Grid | None = None
    ) -> Tensor:
        """Teacher-forced logits (B, N, V) in order steps.

        Args:
            tokens: (B, N) int64 in raster order, in [0, V).
            condition: (B,) int64 labels, (B, 1 + A + L) int64 (see `contracts`), or None.
            order: (B, N) int64.
            grid: the grid of `tokens`, where it is not the one of training.

        Raises:
            ValueError: shapes that do not fit the grid.
        """
        hidden = self._hidden(tokens, *self._condition(len(tokens), condition), order, grid)
        return self.head(hidden[:, -tokens.shape[1] :])

    def joint(
        self, tokens: Tensor, condition: Tensor | None, order: Tensor, grid: Grid | None = None
    ) -> tuple[Tensor, Tensor]:
        """Teacher-forced content and location: q(order, x) = prod q(position) q(token | position).

        Args:
            tokens: (B, N) int64 in raster order, in [0, V).
            condition: (B,) int64 labels, (B, 1 + A + L) int64 (see `contracts`), or None.
            order: (B, N) int64.
            grid: the grid of `tokens`, where it is not the one of training.

        Returns:
            Logits (B, N, V) as of `forward`, and log-probabilities (B, N, N) float32 of every position to be
            the one of step i, -inf where it is revealed already.

        Raises:
            ValueError: the model has no location head, or shapes that do not fit the grid.
        """
        grid = grid or self.grid
        start, prefix = self._condition(len(tokens), condition)
        hidden = self._hidden(tokens, start, prefix, order, grid)
        read, hidden = hidden.split((prefix.shape[1], order.shape[1]), dim=1)
        before, current = self._before(order, grid), order[:, :-1]
        content = torch.cat(
            (self._nothing(start)[:, None], self.token_embedding(tokens.gather(1, current))), 1
        )
        asked = self._asked(start, read).to(hidden.dtype)
        behind = torch.cat((asked[:, None], hidden[:, :-1]), dim=1)
        if not self.config.location_gradient:
            behind, content, asked = behind.detach(), content.detach(), asked.detach()
        revealed = revealed_before(inverse(order))
        where = self._head()(behind, content, asked, before, revealed, self._head().tables(grid))
        return self.head(hidden), where

    @staticmethod
    def _asked(start: Tensor, read: Tensor) -> Tensor:
        """All that is asked for, (B, D): the class (B, D), and what was read of the prefix (B, P, D)."""
        return start + read[:, -1] if read.shape[1] else start

    def _hidden(
        self, tokens: Tensor, start: Tensor, prefix: Tensor, order: Tensor, grid: Grid | None
    ) -> Tensor:
        """Hidden states (B, P + N, D): of the prefix, and what the tokens of each step are predicted from."""
        grid = grid or self.grid
        if tokens.shape[1:] != (grid.n,) or order.shape != tokens.shape:
            raise ValueError(
                f"a {grid.h} x {grid.w} grid needs tokens and order of shape (B, {grid.n}), "
                f"got {tuple(tokens.shape)} and {tuple(order.shape)}"
            )
        tables = self._tables(grid)
        current = order[:, :-1]
        seen = tokens.gather(1, current)
        if self.training and self.config.token_dropout:
            hidden = torch.rand(seen.shape, device=seen.device) < self.config.token_dropout
            seen = torch.where(hidden, self.vocab_size, seen)
        x = self._content(tables, seen, current, start) + self._next(tables, current, order[:, 1:])
        x = torch.cat((prefix, self._start(tables, start, order[:, :1]), x), dim=1)
        aside = (prefix.shape[1], 0)
        before, after = (F.pad(p, aside, value=grid.n) for p in (self._before(order, grid), order))
        rotation = self._rotation(tables, before, after)
        for block in self.blocks:
            if self.config.checkpointing and self.training:
                x = checkpoint(block, x, rotation, causal, use_reentrant=False)
            else:
                x = block(x, rotation, causal)
        return self.norm(x)

    @staticmethod
    def _before(order: Tensor, grid: Grid) -> Tensor:
        """Position of the last token before each step, (B, N) int64; N before the first."""
        return torch.cat((torch.full_like(order[:, :1], grid.n), order[:, :-1]), dim=1)

    def _nothing(self, like: Tensor) -> Tensor:
        """Embedding of no token, (B, D)."""
        return self.token_embedding.weight[-1].expand_as(like)

    def _head(self) -> LocationHead:
        if self.location is None:
            raise ValueError(
                "this model has no location head: train one with location=true, or choose another order"
            )
        return self.location

    def _start(self, tables: PositionTables, condition: Tensor, positions: Tensor) -> Tensor:
        """condition + S(position), (B, M, D)."""
        x = condition[:, None].expand(-1, positions.shape[1], -1)
        return x if tables.first is None else x + F.embedding(positions, tables.first)

    # --- decoding ----------------------------------------------------------------------------------

    def start(self, batch_size: int, condition: Tensor | None = None, grid: Grid | None = None) -> State:
        """A cache of O(depth * B * (P + N) * D) that holds the prefix only; the class is pending.

        Raises:
            ValueError: labels, attributes or caption tokens out of range.
        """
        grid = grid or self.grid
        start, prefix = self._condition(batch_size, condition, check=True)
        device, dtype = self.head.weight.device, self.head.weight.dtype
        if torch.is_autocast_enabled(device.type):
            dtype = torch.get_autocast_dtype(device.type)
        heads = self.config.heads
        length = prefix.shape[1]
        shape = (self.config.depth, batch_size, heads, length + grid.n, self.config.width // heads)
        state = State(
            tables=self._tables(grid),
            keys=torch.empty(shape, device=device, dtype=dtype),
            values=torch.empty(shape, device=device, dtype=dtype),
            length=0,
            pending=start,
            last=torch.full((batch_size,), grid.n, device=device),
            hidden=start,
            prefix=length,
            content=self._nothing(start),
            start=start,
            asked=start,
            scored=Scored(
                positions=torch.empty(batch_size, grid.n, dtype=torch.int64, device=device),
                hidden=start.new_empty(batch_size, grid.n, self.config.width),
            ),
            where=self.location.tables(grid) if self.location is not None else None,
        )
        if length:
            nowhere = torch.full((batch_size, length), grid.n, device=device)
            read = self._extend(state, prefix, 0, nowhere, nowhere)
            state.length, state.asked = length, self._asked(start, self.norm(read))
            state.hidden = state.asked
        return state

    def _extend(self, state: State, x: Tensor, length: int, before: Tensor, after: Tensor) -> Tensor:
        """Run inputs (B, T, D) as one causal block into the cache, from slot `length` on."""
        attend = Extend(state, length)
        rotation = self._rotation(state.tables, before, after)
        for block in self.blocks:
            x = block(x, rotation, attend)
        return x

    def _inputs(self, state: State, positions: Tensor) -> Tensor:
        """The pending input completed with each candidate position, (B, M, D)."""
        if state.length == state.prefix:
            return self._start(state.tables, state.pending, positions)
        ahead = self._next(state.tables, state.last[:, None], positions)
        return (state.pending[:, None] + ahead).expand(-1, positions.shape[1], -1)

    def score(self, state: State, positions: Tensor) -> Tensor:
        """Logits (B, M, V) of candidate positions (B, M).

        Each candidate attends to the one shared prefix and to itself: O(M L) attention, no copies of the
        cache. What is computed of the candidates is kept until `append`, which need not run the one that is
        chosen again; nor need another score of some of them.
        """
        found = self._find(state, positions)
        if found is not None:
            return self.head(_pick(state.scored.hidden, found))
        columns = self._columns(state, positions.shape[1])
        x = self._run(state, positions, SharedPrefix(state, columns))
        if columns is not None:
            state.scored.positions[:, columns], state.scored.hidden[:, columns] = positions, x
            state.scored.count = columns.stop
        return self.head(x)

    def _run(self, state: State, positions: Tensor, attend: SharedPrefix) -> Tensor:
        """Hidden states (B, M, D) of candidates that have not been scored."""
        m = positions.shape[1]
        compiled = None if self.training or torch.is_grad_enabled() else self.compiled
        if compiled is not None:
            positions = compiled.pad(positions)
        x = self._inputs(state, positions)
        rotation = self._rotation(state.tables, state.last[:, None].expand_as(positions), positions)
        if compiled is not None:
            return compiled(self.blocks, self.norm, x, rotation, attend)[:, :m]
        for block in self.blocks:
            x = block(x, rotation, attend)
        return self.norm(x)

    @staticmethod
    def _columns(state: State, m: int) -> slice | None:
        """Columns of `scored` for m more candidates; None if they are more than the open positions.

        If they do not fit behind those that are there (all scored twice), these are forgotten.
        """
        room = state.keys.shape[3] - state.length
        begin = state.scored.count if state.scored.count + m <= room else 0
        return slice(begin, begin + m) if m <= room else None

    @staticmethod
    def _find(state: State, positions: Tensor) -> Tensor | None:
        """Columns (B, M) int64 of `scored` that hold the positions (B, M); None if it lacks one of them."""
        if not state.scored.count:  # the usual case, which need not wait for the device
            return None
        match = positions[:, :, None] == state.scored.positions[:, None, : state.scored.count]
        return match.int().argmax(2) if bool(match.any(2).all()) else None

    def locate(self, state: State, revealed: Tensor) -> Tensor:
        """Log-probability of each position to be next, (B, N) float32 nats; -inf where `revealed` (B, N).

        Raises:
            ValueError: the model has no location head.
        """
        hidden, content = state.hidden[:, None].to(state.content.dtype), state.content[:, None]
        head, last, asked = self._head(), state.last[:, None], state.asked.to(state.content.dtype)
        assert state.where is not None
        return head(hidden, content, asked, last, revealed[:, None], state.where)[:, 0]

    def append(self, state: State, positions: Tensor, tokens: Tensor) -> State:
        """Reveal tokens (B, K) at positions (B, K), in that sequence.

        The input that leads to the first position is taken from `score` where it was scored; those that
        lead to the others run as one causal block.
        """
        found = self._find(state, positions[:, :1])
        hidden = state.hidden
        if found is not None:
            hidden = _pick(state.scored.hidden, found)[:, 0]
            keep(state.keys, state.values, state.length, found[:, 0])
            length = state.length + 1
            x, before, after = None, positions[:, :-1], positions[:, 1:]
        else:
            length = state.length
            x = self._inputs(state, positions[:, :1])
            before, after = torch.cat((state.last[:, None], positions[:, :-1]), dim=1), positions
        if positions.shape[1] > 1:
            rest = self._content(state.tables, tokens[:, :-1], positions[:, :-1], state.start)
            rest = rest + self._next(state.tables, positions[:, :-1], positions[:, 1:])
            x = rest if x is None else torch.cat((x, rest), dim=1)
        if x is not None:
            x = self._extend(state, x, length, before, after)
            length += x.shape[1]
            hidden = self.norm(x[:, -1])
        content = self.token_embedding(tokens[:, -1])
        pending = self._content(state.tables, tokens[:, -1:], positions[:, -1:], state.start)[:, 0]
        return replace(
            state,
            length=length,
            pending=pending,
            last=positions[:, -1],
            hidden=hidden,
            content=content,
            scored=replace(state.scored, count=0),
        )
