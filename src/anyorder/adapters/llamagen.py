"""LlamaGen (arXiv 2406.06525): its GPT as a raster-only baseline, and its tokenizers VQ-16 and VQ-8.

The sequence is [class, x_0, x_1, ...]: input i predicts token i, and no input says which position that is.
Position enters by rotating queries and keys by the input's *own* position, so that raster is the only order.
The tokenizers' layout is that of `models.vq`; only their configuration is read off the file here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from anyorder.adapters.layers import (
    Attend,
    Cache,
    FeedForward,
    GPTConfig,
    PublishedModel,
    causal,
    check_shapes,
    count,
    heads_of,
    norm,
    rotate,
    shape_of,
    split_heads,
)
from anyorder.contracts import Grid
from anyorder.models.attention import merge_heads
from anyorder.models.layers import Linear
from anyorder.tokenizers.vq import VQConfig


def gpt_config(tensors: Mapping[str, Tensor], grid: tuple[int, int], heads: int) -> GPTConfig:
    """The configuration of a GPT or RandAR file; `heads` 0 means the published ones.

    Raises:
        ValueError: a tensor that tells it is missing or of another rank.
    """
    vocab_size, width = shape_of(tensors, "tok_embeddings.weight")
    return GPTConfig(
        depth=count(tensors, "layers."),
        width=width,
        heads=heads or heads_of(width),
        vocab_size=vocab_size,
        grid=grid,
        num_classes=shape_of(tensors, "cls_embedding.embedding_table.weight")[0] - 1,
    )


def vq_config(tensors: Mapping[str, Tensor]) -> VQConfig:
    """The configuration of a VQ-16 or VQ-8 file, for `models.vq.VQModel`.

    Raises:
        ValueError: a tensor that tells it is missing or of another rank.
    """
    channels = shape_of(tensors, "encoder.conv_in.weight", 4)[0]
    levels = range(count(tensors, "encoder.conv_blocks."))
    widths = [shape_of(tensors, f"encoder.conv_blocks.{i}.res.0.conv1.weight", 4)[0] for i in levels]
    vocab_size, code_dim = shape_of(tensors, "quantize.embedding.weight")
    return VQConfig(
        channels=channels,
        multipliers=tuple(width // channels for width in widths),
        res_blocks=count(tensors, "encoder.conv_blocks.0.res."),
        z_channels=shape_of(tensors, "encoder.conv_out.weight", 4)[0],
        vocab_size=vocab_size,
        code_dim=code_dim,
    )


class Attention(nn.Module):
    """Multi-head self-attention with one fused projection; who sees whom is an argument."""

    def __init__(self, width: int, heads: int):
        """No biases."""
        super().__init__()
        self.heads = heads
        self.wqkv = Linear(width, 3 * width, bias=False)
        self.wo = Linear(width, width, bias=False)

    def forward(self, x: Tensor, factors: Tensor, attend: Attend) -> Tensor:
        """Inputs (B, T, D) and their rotations (B, T, D / H / 2) to outputs (B, T, D)."""
        asked, v = self.wqkv(x).split((2 * x.shape[-1], x.shape[-1]), dim=-1)
        q, k = rotate(split_heads(asked, 2 * self.heads), factors).chunk(2, dim=1)
        return self.wo(merge_heads(attend(q, k, split_heads(v, self.heads))))


class Block(nn.Module):
    """Pre-norm residual block."""

    def __init__(self, width: int, heads: int):
        """Attention and SwiGLU."""
        super().__init__()
        self.attention = Attention(width, heads)
        self.feed_forward = FeedForward(width)
        self.attention_norm = norm(width)
        self.ffn_norm = norm(width)

    def forward(self, x: Tensor, factors: Tensor, attend: Attend) -> Tensor:
        """(B, T, D) to (B, T, D)."""
        # A sum lies in memory as its first term: for few rows as `Linear` returns, and wants, them.
        x = self.attention(self.attention_norm(x), factors, attend) + x
        return self.feed_forward(self.ffn_norm(x)) + x


class ClassEmbedding(nn.Module):
    """One row per class; the last one is the null label."""

    def __init__(self, num_classes: int, width: int):
        """A table under the published name."""
        super().__init__()
        self.embedding_table = nn.Embedding(num_classes + 1, width)

    def forward(self, labels: Tensor) -> Tensor:
        """Labels (B,) to (B, 1, D)."""
        return self.embedding_table(labels)[:, None]


class GPT(PublishedModel):
    """The modules of LlamaGen's GPT, which RandAR takes over."""

    def __init__(self, config: GPTConfig):
        """Build from a configuration; weights come from the global random generator."""
        super().__init__(config)
        self.cls_embedding = ClassEmbedding(config.num_classes, config.width)
        self.tok_embeddings = nn.Embedding(config.vocab_size, config.width)
        self.layers = nn.ModuleList(Block(config.width, config.heads) for _ in range(config.depth))
        self.norm = norm(config.width)
        self.output = Linear(config.width, config.vocab_size, bias=False)

    def _logits(self, x: Tensor) -> Tensor:
        return self.output(self.norm(x))

    def _extend(self, cache: Cache, x: Tensor, factors: Tensor) -> Tensor:
        """Run inputs (B, T, D) behind the cache and write them into it; outputs (B, T, D)."""
        for layer, attend in zip(self.layers, cache.extend(), strict=True):
            x = layer(x, factors, attend)
        cache.length += x.shape[1]
        return x


@dataclass
class LlamaGenState:
    """What has been revealed so far: always the first positions of the raster."""

    cache: Cache
    rotations: Tensor
    """(N + 1, D / H / 2) complex64."""
    revealed: int
    logits: Tensor
    """(B, 1, V) of the next position."""


class LlamaGen(GPT):
    """p(x_i | x_<i, c) in raster order, behind the any-order contract: every other order is refused."""

    def forward(
        self, tokens: Tensor, condition: Tensor | None, order: Tensor, grid: Grid | None = None
    ) -> Tensor:
        """Teacher-forced logits (B, N, V).

        Args:
            tokens: (B, N) int64 in raster order.
            condition: (B,) int64 labels, -1 for none, or None.
            order: (B, N) int64; must be raster in every row.
            grid: the grid of `tokens`, where it is not the one of training.

        Raises:
            ValueError: shapes that do not fit the grid, or another order.
        """
        grid = grid or self.grid
        check_shapes(tokens, order, grid)
        _require_raster(order, 0)
        label = self.cls_embedding(self._labels(len(tokens), condition))
        x = torch.cat((label, self.tok_embeddings(tokens[:, :-1])), dim=1)
        factors = self._rotations(grid).roll(1, 0)[None, : grid.n]
        for layer in self.layers:
            x = layer(x, factors, causal)
        return self._logits(x)

    def start(
        self, batch_size: int, condition: Tensor | None = None, grid: Grid | None = None
    ) -> LlamaGenState:
        """A cache that holds the class token.

        Raises:
            ValueError: labels out of range.
        """
        grid = grid or self.grid
        self._check_labels(batch_size, condition)
        cache, rotations = self._empty_cache(len(self.layers), batch_size, grid.n + 1), self._rotations(grid)
        x = self.cls_embedding(self._labels(batch_size, condition))
        x = self._extend(cache, x, rotations[None, -1:])
        return LlamaGenState(cache, rotations, 0, self._logits(x))

    def score(self, state: LlamaGenState, positions: Tensor) -> Tensor:
        """Logits (B, 1, V) of the next position of the raster, known since `append`.

        Raises:
            ValueError: any other position.
        """
        _require_raster(positions[:, :1], state.revealed)
        if positions.shape[1] > 1:
            raise ValueError(_refusal(f"{positions.shape[1]} candidates at once"))
        return state.logits

    def append(self, state: LlamaGenState, positions: Tensor, tokens: Tensor) -> LlamaGenState:
        """Reveal tokens (B, K) at the next K positions of the raster, as one causal block.

        Raises:
            ValueError: any other positions.
        """
        _require_raster(positions, state.revealed)
        x = self._extend(state.cache, self.tok_embeddings(tokens), state.rotations[positions])
        logits = self._logits(x[:, -1:])
        return LlamaGenState(state.cache, state.rotations, state.revealed + positions.shape[1], logits)


def _require_raster(positions: Tensor, begin: int) -> None:
    """Refuse positions (B, K) other than `begin`, `begin` + 1, ..."""
    wanted = torch.arange(begin, begin + positions.shape[1], device=positions.device)
    if not torch.equal(positions, wanted.expand_as(positions)):
        raise ValueError(_refusal(f"positions {positions[0, :8].tolist()} where {begin} is next"))


def _refusal(got: str) -> str:
    return (
        f"LlamaGen draws in raster order only, got {got}: use order='raster', or a model that was trained "
        "on random orders (RandAR, ARPG, or one of your own)"
    )
