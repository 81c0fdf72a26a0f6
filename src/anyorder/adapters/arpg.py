"""ARPG (arXiv 2503.10568): queries that carry nothing but a position read what was revealed, in one pass.

A causal self-decoder turns [class, x_1, x_2, ...] into one set of keys and values; the queries of a
cross-decoder, all of them the mask embedding, are rotated by the position that they ask about and only
read. Scoring any number of positions is therefore one call that writes nothing.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from anyorder import families
from anyorder.adapters.layers import FeedForward, GPTConfig, PublishedModel, heads_of, norm, rotate
from anyorder.contracts import require
from anyorder.models import attention
from anyorder.models.attention import Attend, merge_heads, split_heads
from anyorder.models.layers import Linear
from anyorder.tokenizers.vq import VQ16

Read = Callable[[Tensor], Tensor]
"""Queries (B, H, M, D / H) to what they read, of the same shape."""


def read_config(tensors: Mapping[str, Tensor], grid: tuple[int, int], heads: int) -> GPTConfig:
    """The configuration of an ARPG file; see `families.Family`."""
    vocab_size, width = families.shape_of(tensors, "head.weight")
    depth, heads = 2 * families.count_blocks(tensors, "layers.self_dec."), heads or heads_of(width)
    num_classes = families.shape_of(tensors, "embeddings.weight")[0] - vocab_size - 3
    return GPTConfig(depth, width, heads, vocab_size, grid, num_classes)


class SelfAttention(nn.Module):
    """Multi-head self-attention; who sees whom is an argument, never `self.training`."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.to_q, self.to_k, self.to_v, self.proj = (Linear(width, width, bias=False) for _ in range(4))

    def forward(self, x: Tensor, factors: Tensor, attend: Attend) -> Tensor:
        """Inputs (B, T, D) and their rotations (B, T, D / H / 2) to outputs (B, T, D)."""
        q, k, v = (split_heads(project(x), self.heads) for project in (self.to_q, self.to_k, self.to_v))
        return self.proj(merge_heads(attend(rotate(q, factors), rotate(k, factors), v)))


class CrossAttention(nn.Module):
    """Queries read keys and values that all layers share."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.to_q, self.proj = (Linear(width, width, bias=False) for _ in range(2))

    def forward(self, x: Tensor, factors: Tensor, read: Read) -> Tensor:
        """Queries (B, M, D) and the rotations (B, M, D / H / 2) of their targets to outputs (B, M, D)."""
        return self.proj(merge_heads(read(rotate(split_heads(self.to_q(x), self.heads), factors))))


class Block(nn.Module):
    """Pre-norm residual block of either decoder."""

    def __init__(self, attention: nn.Module, width: int):
        super().__init__()
        self.attn = attention
        self.ffn = FeedForward(width)
        self.attn_norm = norm(width)
        self.ffn_norm = norm(width)

    def forward(self, x: Tensor, factors: Tensor, attend: Attend | Read) -> Tensor:
        """(B, T, D) to (B, T, D)."""
        x = x + self.attn(self.attn_norm(x), factors, attend)
        return x + self.ffn(self.ffn_norm(x))


class TwoDecoders(nn.Module):
    """The self-decoder that remembers and the cross-decoder that reads, under their published names."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        width, heads, half = config.width, config.heads, config.depth // 2
        self.heads = heads
        self.self_dec = nn.ModuleList(Block(SelfAttention(width, heads), width) for _ in range(half))
        self.cross_dec = nn.ModuleList(Block(CrossAttention(width, heads), width) for _ in range(half))
        self.norm = norm(width)
        self.to_k, self.to_v = (Linear(width, width, bias=False) for _ in range(2))

    def remember(self, x: Tensor, factors: Tensor, attends: list[Attend]) -> tuple[Tensor, Tensor]:
        """Inputs (B, T, D) to the keys and values (B, H, T, D / H) that queries read."""
        x = self.norm(attention.run_blocks(self.self_dec, x, factors, attends))
        return rotate(split_heads(self.to_k(x), self.heads), factors), split_heads(self.to_v(x), self.heads)


@dataclass
class State(attention.DecodingState):
    """What has been revealed so far; the cache is that of the self-decoder: class token, revealed tokens."""

    keys: Tensor
    """(B, H, N + 1, D / H), read by queries; as many are valid as in `cache`."""
    values: Tensor
    rotations: Tensor
    """(N + 1, D / H / 2) complex64."""


class ARPG(PublishedModel):
    """p(x[pi_i] | x[pi_<i], pi_<=i, c) for any order pi.

    Rows of `embeddings`: V codes, the mask, the classes, the null class, and one that is not used here.
    """

    decoders = 2

    def __init__(self, config: GPTConfig):
        super().__init__(config)
        require(config.depth % 2 == 0, f"depth must be even, half for each decoder, got {config.depth}")
        self.embeddings = nn.Embedding(config.vocab_size + config.num_classes + 3, config.width)
        self.layers = TwoDecoders(config)
        self.norm = norm(config.width)
        self.head = Linear(config.width, config.vocab_size, bias=False)

    def _class_token(self, labels: Tensor) -> Tensor:
        """(B, 1, D)."""
        return self.embeddings(labels + self.vocab_size + 1)[:, None]

    def _ask(self, factors: Tensor, read: Read) -> Tensor:
        """Logits (B, M, V) of the positions with the rotations (B, M, D / H / 2)."""
        queries = self.embeddings.weight[self.vocab_size].expand(*factors.shape[:2], -1)
        blocks = self.layers.cross_dec
        x = attention.run_blocks(blocks, queries, factors, [read] * len(blocks))
        return self.head(self.norm(x))

    def _teacher_forced(self, tokens: Tensor, labels: Tensor, order: Tensor, rotations: Tensor) -> Tensor:
        seen = order[:, :-1]
        x = torch.cat((self._class_token(labels), self.embeddings(tokens.gather(1, seen))), dim=1)
        # The last row of the table is the class token's.
        factors = rotations[torch.cat((torch.full_like(order[:, :1], len(rotations) - 1), seen), dim=1)]
        k, v = self.layers.remember(x, factors, [attention.causal] * len(self.layers.self_dec))
        return self._ask(rotations[order], lambda q: attention.causal(q, k, v))

    def _start(self, labels: Tensor, rotations: Tensor, cache: attention.Cache) -> State:
        state = State(cache, torch.empty_like(cache.keys[0]), torch.empty_like(cache.values[0]), rotations)
        return self._remember(state, self._class_token(labels), rotations[None, -1:])

    def score(self, state: State, positions: Tensor) -> Tensor:
        """Logits (B, M, V) of candidate positions (B, M): O(M L) attention, nothing is written."""
        state.require_current()
        k, v = (x[:, :, : state.cache.length] for x in (state.keys, state.values))
        return self._ask(state.rotations[positions], lambda q: F.scaled_dot_product_attention(q, k, v))

    def append(self, state: State, positions: Tensor, tokens: Tensor) -> State:
        """Reveal tokens (B, K) at positions (B, K), as one causal block."""
        state.require_current()
        return self._remember(state, self.embeddings(tokens), state.rotations[positions]).advance()

    def _remember(self, state: State, x: Tensor, factors: Tensor) -> State:
        """Run inputs (B, T, D) behind the cache and write them into it, in place."""
        k, v = self.layers.remember(x, factors, state.cache.extend(self.config.joint_steps))
        new = slice(state.cache.length, state.cache.length + x.shape[1])
        state.keys[:, :, new], state.values[:, :, new] = k, v
        state.cache.length += x.shape[1]
        return state


FAMILY = families.Family(
    ARPG,
    GPTConfig,
    marker="layers.cross_dec.0.attn.to_q.weight",
    read_config=read_config,
    files=tuple(
        families.File("hp-l33/ARPG", f"arpg_{size}.pt", VQ16, guidance=(scale, "linear"))
        for size, scale in (("300m", 5.0), ("700m", 6.0), ("1b", 7.5))
    ),
    class_table="embeddings.weight",
    first_class=lambda config: config.vocab_size + 1,  # behind the codes and the mask
)
