"""Attention with a cache: what the transformer and the adapters share.

Shapes: B images, T inputs, M candidates, L cached inputs, D width, H heads.
"""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor

from anyorder import contracts

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]
"""Queries, keys, values, each (B, H, T, D / H), to outputs of the same shape."""
WRITTEN_OUT = 512
"""Inputs up to which bfloat16 attention on CPUs is written out. For both passes of a training the kernel took
4 times the time with 65 inputs, 1.6 times with 257, the same with 577; for one query 1.4 to 2 times."""
Columns = slice | Tensor
"""Columns of scored candidates: the same in every image, or (B, M) int64."""


def split_heads(x: Tensor, heads: int) -> Tensor:
    """(B, T, D) to (B, H, T, D / H)."""
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


def merge_heads(x: Tensor) -> Tensor:
    """(B, H, T, D / H) to (B, T, D)."""
    return x.transpose(1, 2).flatten(2)


def causal(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """Each input attends to itself and to earlier inputs, or to what a mask (T, T) bool says.

    Short bfloat16 inputs that are trained on a CPU are written out, O(B * H * T^2) in memory; else the fused
    kernel makes no mask.
    """
    if not (_is_short(q) and q.requires_grad):
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None)
    seen = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool).tril() if mask is None else mask
    hidden = torch.zeros(seen.shape, dtype=q.dtype).masked_fill(~seen, -torch.inf)
    return (q * q.shape[-1] ** -0.5 @ k.transpose(-1, -2) + hidden).softmax(-1) @ v


def to_all(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Each input attends to all keys; short bfloat16 inputs on a CPU are written out, too."""
    if not _is_short(q):
        return F.scaled_dot_product_attention(q, k, v)
    return (q * q.shape[-1] ** -0.5 @ k.transpose(-1, -2)).softmax(-1) @ v


def _is_short(q: Tensor) -> bool:
    return q.dtype == torch.bfloat16 and q.device.type == "cpu" and q.shape[2] <= WRITTEN_OUT


def causal_behind(length: int, q: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """The last T inputs attend to the first `length` ones and, causally, to one another."""
    if length == 0:
        return causal(q, keys, values)
    if q.shape[2] == 1:
        return to_all(q, keys, values)
    mask = torch.ones(q.shape[2], keys.shape[2], dtype=torch.bool, device=q.device).tril(length)
    return F.scaled_dot_product_attention(q, keys, values, attn_mask=mask)


def attend_with_total(q: Tensor, k: Tensor, v: Tensor, seen: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Attention (B, H, M, D / H) to L keys, and log-sum-exp (B, H, M, 1) float32 of its scores.

    All keys are visible, or those that are `seen` (B, 1, 1, L) bool.
    """
    plain = q.requires_grad or seen is not None  # the kernels' log-sum-exp has no gradient
    fused = None if plain else _fused(q, k, v)
    if fused is not None:
        return fused[0], fused[1][..., None]
    scores = (q @ k.transpose(-1, -2)).float() * q.shape[-1] ** -0.5
    if seen is not None:
        scores = scores.masked_fill(~seen, -torch.inf)
    total = scores.logsumexp(-1, keepdim=True)
    return (scores - total).exp().to(v.dtype) @ v, total


def _fused(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor] | None:
    """One kernel that also returns the log-sum-exp (B, H, M), where there is one; none is public."""
    if q.device.type == "cpu" and hasattr(torch.ops.aten, "_scaled_dot_product_flash_attention_for_cpu"):
        q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))  # it does not check
        return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v)
    there = hasattr(torch.ops.aten, "_scaled_dot_product_flash_attention")
    if q.device.type == "cuda" and there and q.shape[-1] % 8 == 0:
        parameters = torch.backends.cuda.SDPAParams(q, k, v, None, 0.0, False, False)
        if torch.backends.cuda.can_use_flash_attention(parameters):
            return torch.ops.aten._scaled_dot_product_flash_attention(q, k, v)[:2]
    return None


def merge_with_self(q: Tensor, k: Tensor, v: Tensor, out: Tensor, total: Tensor) -> Tensor:
    """Add each candidate's key and value (B, H, M, D / H) to its attention to others, `out` and `total`."""
    # exp(own) / (exp(own) + exp(total)) is the softmax weight of the candidate's key, without an overflow.
    own = (q * k).sum(-1, keepdim=True, dtype=torch.float32) * q.shape[-1] ** -0.5
    return out.lerp(v, (own - total).sigmoid().to(v.dtype))


def merge_with_own(q: Tensor, k: Tensor, v: Tensor, out: Tensor, total: Tensor, size: int) -> Tensor:
    """The same for candidates of `size` inputs each, which attend to one another: (B, H, M * size, D / H)."""
    alone = (x.unflatten(2, (-1, size)).flatten(1, 2) for x in (q, k, v))
    values, weight = (x.unflatten(1, (q.shape[1], -1)).flatten(2, 3) for x in attend_with_total(*alone))
    return out.lerp(values, (weight - total).sigmoid().to(v.dtype))


def run_blocks(blocks: Any, x: Tensor, rotation: Any, attends: list[Any]) -> Tensor:
    """Inputs (B, T, D) through blocks `block(x, rotation, attend)`, one of `attends` for each."""
    for block, attend in zip(blocks, attends, strict=True):
        x = block(x, rotation, attend)
    return x


@dataclasses.dataclass
class Cache:
    """Keys and values of the inputs so far, preallocated and written in place."""

    keys: Tensor
    """(depth, B, H, L, D / H); the first `length` inputs are valid."""
    values: Tensor
    length: int = 0
    lengths: Tensor | None = None
    """(B,) int64 where images differ: how many inputs of each are valid; `length` is then the largest."""

    @classmethod
    def empty(cls, weight: Tensor, *shape: int) -> "Cache":
        """Room for keys and values (depth, B, H, L, D / H), on the device and in the dtype of `weight`."""
        device, dtype = weight.device, weight.dtype
        if torch.is_autocast_enabled(device.type):
            dtype = torch.get_autocast_dtype(device.type)
        keys, values = (torch.empty(shape, device=device, dtype=dtype) for _ in range(2))
        return cls(keys, values)

    @property
    def room(self) -> int:
        """Free slots."""
        return self.keys.shape[3] - self.length

    def reserve(self, m: int) -> None:
        """Make room for `m` more inputs; where it lacks, twice as much as before.

        Images that differ need none: they pad, and what does not fit is never read.
        """
        if self.room < m and self.lengths is None:
            self.keys, self.values = (F.pad(x, (0, 0, 0, x.shape[3])) for x in (self.keys, self.values))

    def extend(self, joint: bool = False) -> list[Attend]:
        """One attention per layer for new inputs, which are written behind the valid ones.

        They attend to the cache and, causally or with `joint` all, to one another. The caller raises `length`
        after the last layer.
        """
        if self.lengths is not None:
            return [partial(_extend_each, *layer, self.length, self.lengths) for layer in self._layers()]
        return [partial(_extend, *layer, self.length, joint) for layer in self._layers()]

    def candidates(
        self, free: slice | None, pending: int = 0, joint: bool = False, size: int = 1
    ) -> list["Candidates"]:
        """One attention per layer for candidates; see `Candidates`."""
        seen = visible = None
        if self.lengths is not None:
            seen = torch.arange(self.length, device=self.lengths.device) < self.lengths[:, None, None, None]
        elif free is not None and pending > 1 and free.stop - free.start <= 2 * pending:
            visible = _visible(self.length, pending, free.stop - free.start - pending, self.keys.device)
        elif free == slice(self.length, self.length + 1) and not pending:
            joint = True  # one alone lies behind all that it sees: one call without a merge
        each, length = self._layers(), self.length
        return [Candidates(*kv, length, free, pending, joint, size, seen, visible) for kv in each]

    def let_differ(self) -> Tensor:
        """From now on, images may have different numbers of inputs; returns `lengths`."""
        if self.lengths is None:
            self.lengths = torch.full((self.keys.shape[1],), self.length, device=self.keys.device)
            for x in (self.keys, self.values):  # hidden slots are read, with weight 0: no NaN may lie there
                x[:, :, :, self.length :] = 0
        return self.lengths

    def _layers(self) -> list[tuple[Tensor, Tensor]]:
        """Keys and values of each layer; indexed, since views of an iteration cannot be written in place."""
        return [(self.keys[i], self.values[i]) for i in range(len(self.keys))]

    def keep(self, columns: Columns) -> None:
        """Make one more input valid: in each row the one that waits in slot `length` + its one column."""
        for cache in (self.keys, self.values):
            if isinstance(columns, Tensor):  # indexing moves the batch to the front
                rows = torch.arange(len(columns), device=columns.device)
                cache[:, :, :, self.length] = cache[:, rows, :, self.length + columns[:, 0]].transpose(0, 1)
            elif columns.start:  # else it lies there already
                cache[:, :, :, self.length] = cache[:, :, :, self.length + columns.start]
        self.length += 1


def _visible(length: int, pending: int, candidates: int, device: torch.device) -> Tensor:
    """What inputs see, (T, length + T) bool: all before them, but candidates not one another."""
    count = pending + candidates
    seen = torch.ones(count, length + count, dtype=torch.bool, device=device).tril(length)
    seen[pending:, length + pending :] = torch.eye(candidates, dtype=torch.bool, device=device)
    return seen


def _extend(keys: Tensor, values: Tensor, begin: int, joint: bool, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    end = begin + k.shape[2]
    keys[:, :, begin:end], values[:, :, begin:end] = k, v
    keys, values = keys[:, :, :end], values[:, :, :end]
    return to_all(q, keys, values) if joint else causal_behind(begin, q, keys, values)


def _extend_each(
    keys: Tensor, values: Tensor, longest: int, lengths: Tensor, q: Tensor, k: Tensor, v: Tensor
) -> Tensor:
    """The same, causally, behind `lengths` (B,) inputs of each image; what does not fit only pads."""
    end = min(longest + k.shape[2], keys.shape[2])
    keys, values = keys[:, :, :end], values[:, :, :end]
    slots = lengths[:, None] + torch.arange(k.shape[2], device=lengths.device)
    index = slots.clamp(max=end - 1)[:, None, :, None].expand_as(k)
    for cache, new in ((keys, k), (values, v)):
        cache.scatter_(2, index, new.to(cache.dtype))
    seen = torch.arange(end, device=lengths.device) <= slots[:, None, :, None]
    return F.scaled_dot_product_attention(q, keys, values, attn_mask=seen)


@dataclasses.dataclass
class Candidates:
    """One layer's attention of candidates that see the cache and themselves, but not one another.

    Both parts are merged by their log-sum-exps, without a mask or a repeated cache. Keys and values wait in
    free slots, from where `Cache.keep` takes the chosen one.
    """

    keys: Tensor
    """(B, H, L, D / H), this layer's part of the cache."""
    values: Tensor
    length: int
    """How many inputs of the cache are valid."""
    free: slice | None
    """Slots for the inputs' keys and values; further inputs only pad. None: they are not kept."""
    pending: int = 0
    """The first inputs are no candidates, but the next of the cache, and all candidates see them."""
    joint: bool = False
    """Candidates also see the earlier candidates."""
    size: int = 1
    """How many inputs a candidate has; more than 1 goes without pending ones, and keeps nothing."""
    seen: Tensor | None = None
    """(B, 1, 1, length) bool, which inputs of the cache are valid; None: all."""
    visible: Tensor | None = None
    """`_visible`, where candidates are few: one call with a mask is then faster than two that are merged."""

    def __call__(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """(B, H, pending + M, D / H) each."""
        first, end = self.pending, self.length + self.pending
        if self.joint:
            assert self.free is not None
            self._write(k, v)
            end = self.free.stop
            return causal_behind(self.length, q, self.keys[:, :, :end], self.values[:, :, :end])
        if self.size > 1:
            return merge_with_own(q, k, v, *self.prefix_alone(q, k, v), self.size)
        if self.visible is not None:
            self._write(k, v)
            keys, values = (x[:, :, : self.visible.shape[1]] for x in (self.keys, self.values))
            return F.scaled_dot_product_attention(q, keys, values, attn_mask=self.visible)
        # One pending input sees all that candidates see: the cache is read once for both.
        skip = first if first > 1 else 0
        out, total = self.prefix_alone(q[:, :, skip:], k, v)
        own, others = slice(first, None), (x[:, :, first - skip :] for x in (out, total))
        merged = merge_with_self(q[:, :, own], k[:, :, own], v[:, :, own], *others)
        if not first:
            return merged
        before = out[:, :, :1]
        if skip:
            keys, values = self.keys[:, :, :end], self.values[:, :, :end]
            before = causal_behind(self.length, q[:, :, :first], keys, values)
        return torch.cat((before, merged), dim=2)

    def prefix_alone(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Attention (B, H, M, D / H) without the candidates' own keys, and its log-sum-exp (B, H, M, 1).

        Where the cache is empty that is -inf, and the outputs are the candidates' own values.
        """
        self._write(k, v)
        end = self.length + self.pending
        if end == 0:
            return v, v.new_full((*v.shape[:3], 1), -torch.inf, dtype=torch.float32)
        return attend_with_total(q, self.keys[:, :, :end], self.values[:, :, :end], self.seen)

    def _write(self, k: Tensor, v: Tensor) -> None:
        if self.free is not None:
            m = self.free.stop - self.free.start
            self.keys[:, :, self.free], self.values[:, :, self.free] = k[:, :, :m], v[:, :, :m]


@dataclasses.dataclass
class Scored:
    """Candidates scored since the last `append`: the j-th one waits in slot `Cache.length` + j.

    They need not run again, neither when one is appended nor when some of them are scored again.
    """

    positions: Tensor
    """(B, N) int64; the first `count` are valid."""
    hidden: Tensor | None = None
    """(B, N, D): what the token of each is predicted from, where the model keeps it."""
    count: int = 0
    latest: tuple[Tensor, int, Columns] | None = None
    """Positions that were scored last, the version of that tensor, and their columns."""
    most: int = 0
    """Candidates of the largest call."""

    @classmethod
    def empty(cls, like: Tensor, n: int) -> "Scored":
        """Room for `n` candidates with hidden states like (B, D)."""
        positions = torch.empty(len(like), n, dtype=torch.int64, device=like.device)
        return cls(positions, like.new_empty(len(like), n, like.shape[1]))

    def find(self, positions: Tensor, missing: int | None = None) -> Columns | None:
        """Columns that hold the positions (B, M); None if one of them is missing.

        If one call has scored all positions that are `missing` in the image, the device is not waited for.
        """
        if not self.count:
            return None
        m = positions.shape[1]
        if self.latest is not None and contracts.same_memory(positions, *self.latest[:2]):
            known = self.latest[2]
            return known[:, :m] if isinstance(known, Tensor) else slice(known.start, known.start + m)
        match = positions[:, :, None] == self.positions[:, None, : self.count]
        if (missing is None or self.most != missing) and not match.any(2).all():
            return None
        columns = match.int().argmax(2)
        self._remember(positions, columns)
        return columns

    def columns(self, m: int, room: int) -> slice | None:
        """Columns for m more candidates where the cache has `room`; None if there are too few.

        Candidates that are there already are forgotten if the new ones do not fit behind them.
        """
        room = min(room, self.positions.shape[1])
        begin = self.count if self.count + m <= room else 0
        return slice(begin, begin + m) if m <= room else None

    def add(self, columns: slice, positions: Tensor, hidden: Tensor | None = None) -> None:
        """Remember positions (B, M) and hidden states (B, M, D) of scored candidates."""
        self.positions[:, columns] = positions
        if self.hidden is not None and hidden is not None:
            self.hidden[:, columns] = hidden
        m = columns.stop - columns.start
        self.count, self.most = columns.stop, max(self.most, m) if columns.start else m
        self._remember(positions, columns)

    def pick(self, columns: Columns) -> Tensor:
        """Hidden states (B, M, D)."""
        assert self.hidden is not None
        if isinstance(columns, slice):
            return self.hidden[:, columns]
        return self.hidden.gather(1, columns[:, :, None].expand(-1, -1, self.hidden.shape[2]))

    def _remember(self, positions: Tensor, columns: Columns) -> None:
        self.latest = None if positions.is_inference() else (positions, positions._version, columns)


@dataclasses.dataclass
class DecodingState:
    """What every decoding state has: a cache, which `append` writes in place."""

    cache: Cache
    used: bool = dataclasses.field(default=False, init=False)
    """Whether `append` has used this state up: its cache then holds what it does not know of."""

    def require_current(self) -> None:
        """Refuse, with a ValueError, a state that `append` has used up."""
        mend = "go on with the one it returned"
        contracts.require(not self.used, f"this decoding state was used up by append: {mend}")

    def advance(self, **changes: Any) -> Self:
        """The state after an `append`, with these fields changed; this one is used up."""
        following = dataclasses.replace(self, **changes)
        self.used = True
        return following
