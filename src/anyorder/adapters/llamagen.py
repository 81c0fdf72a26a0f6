"""LlamaGen (arXiv 2406.06525): its GPT as a raster-only baseline.

The sequence is [class, x_0, x_1, ...]: input i predicts token i, and no input says which position that is.
Position enters by rotating queries and keys by the input's *own* position, so that raster is the only order.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from anyorder import families
from anyorder.adapters import layers
from anyorder.models import attention
from anyorder.models.layers import Linear
from anyorder.tokenizers.vq import VQ16

CLASS_TABLE = "cls_embedding.embedding_table.weight"


def read_config(tensors: dict[str, Tensor], grid: tuple[int, int], heads: int) -> layers.GPTConfig:
    """The configuration of a GPT or RandAR file; see `families.Family`."""
    vocab_size, width = families.shape_of(tensors, "tok_embeddings.weight")
    depth, heads = families.count_blocks(tensors, "layers."), heads or layers.heads_of(width)
    num_classes = families.shape_of(tensors, CLASS_TABLE)[0] - 1
    return layers.GPTConfig(depth, width, heads, vocab_size, grid, num_classes)


class Attention(nn.Module):
    """Multi-head self-attention with one fused projection; who sees whom is an argument."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.wqkv = Linear(width, 3 * width, bias=False)
        self.wo = Linear(width, width, bias=False)

    def forward(self, x: Tensor, factors: Tensor, attend: attention.Attend) -> Tensor:
        """Inputs (B, T, D) and their rotations (B, T, D / H / 2) to outputs (B, T, D)."""
        asked, v = self.wqkv(x).split((2 * x.shape[-1], x.shape[-1]), dim=-1)
        q, k = layers.rotate(attention.split_heads(asked, 2 * self.heads), factors).chunk(2, dim=1)
        return self.wo(attention.merge_heads(attend(q, k, attention.split_heads(v, self.heads))))


class Block(nn.Module):
    """Pre-norm residual block."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.attention = Attention(width, heads)
        self.feed_forward = layers.FeedForward(width)
        self.attention_norm = layers.norm(width)
        self.ffn_norm = layers.norm(width)

    def forward(self, x: Tensor, factors: Tensor, attend: attention.Attend) -> Tensor:
        """(B, T, D) to (B, T, D)."""
        x = self.attention(self.attention_norm(x), factors, attend) + x
        return self.feed_forward(self.ffn_norm(x)) + x


class GPT(layers.PublishedModel):
    """The modules of LlamaGen's GPT, which RandAR takes over."""

    def __init__(self, config: layers.GPTConfig):
        super().__init__(config)
        table = nn.Embedding(config.num_classes + 1, config.width)  # the last row is the null label's
        self.cls_embedding = nn.ModuleDict({"embedding_table": table})
        self.tok_embeddings = nn.Embedding(config.vocab_size, config.width)
        self.layers = nn.ModuleList(Block(config.width, config.heads) for _ in range(config.depth))
        self.norm = layers.norm(config.width)
        self.output = Linear(config.width, config.vocab_size, bias=False)

    def _class(self, labels: Tensor) -> Tensor:
        """Labels (B,) to (B, 1, D)."""
        return self.cls_embedding["embedding_table"](labels)[:, None]

    def _logits(self, x: Tensor) -> Tensor:
        return self.output(self.norm(x))

    def _extend(self, cache: attention.Cache, x: Tensor, factors: Tensor) -> Tensor:
        """Run inputs (B, T, D) behind the cache and write them into it; outputs (B, T, D)."""
        x = attention.run_blocks(self.layers, x, factors, cache.extend())
        cache.length += x.shape[1]
        return x


@dataclass
class State(attention.DecodingState):
    """What has been revealed so far: always the first positions of the raster."""

    rotations: Tensor
    """(N + 1, D / H / 2) complex64."""
    revealed: int
    logits: Tensor
    """(B, 1, V) of the next position."""


class LlamaGen(GPT):
    """p(x_i | x_<i, c) in raster order, behind the any-order contract: every other order is refused."""

    def _teacher_forced(self, tokens: Tensor, labels: Tensor, order: Tensor, rotations: Tensor) -> Tensor:
        _require_raster(order, 0)
        x = torch.cat((self._class(labels), self.tok_embeddings(tokens[:, :-1])), dim=1)
        factors = rotations.roll(1, 0)[None, :-1]
        attends = [attention.causal] * len(self.layers)
        return self._logits(attention.run_blocks(self.layers, x, factors, attends))

    def _start(self, labels: Tensor, rotations: Tensor, cache: attention.Cache) -> State:
        x = self._extend(cache, self._class(labels), rotations[None, -1:])
        return State(cache, rotations, 0, self._logits(x))

    def score(self, state: State, positions: Tensor) -> Tensor:
        """Logits (B, 1, V) of the next position of the raster, known since `append`; refuses all others."""
        state.require_current()
        _require_raster(positions[:, :1], state.revealed)
        if positions.shape[1] != 1:
            raise ValueError(_refusal(f"{positions.shape[1]} candidates at once"))
        return state.logits

    def append(self, state: State, positions: Tensor, tokens: Tensor) -> State:
        """Reveal tokens (B, K) at the next K positions of the raster, as one causal block."""
        state.require_current()
        _require_raster(positions, state.revealed)
        x = self._extend(state.cache, self.tok_embeddings(tokens), state.rotations[positions])
        return state.advance(revealed=state.revealed + positions.shape[1], logits=self._logits(x[:, -1:]))


def _require_raster(positions: Tensor, begin: int) -> None:
    """Refuse positions (B, K) other than `begin`, `begin` + 1, ..."""
    expected = torch.arange(begin, begin + positions.shape[1], device=positions.device)
    if not torch.equal(positions, expected.expand_as(positions)):
        raise ValueError(_refusal(f"positions {positions[0, :8].tolist()} where {begin} is next"))


def _refusal(got: str) -> str:
    text = f"LlamaGen generates in raster order only, got {got}: use order='raster', or a model trained on"
    return f"{text} random orders (RandAR, ARPG, or one of your own)"


MARKER = "layers.0.attention.wqkv.weight"
FILES = tuple(
    families.File(
        "FoundationVision/LlamaGen", f"c2i_{size}_{16 * side}.pt", VQ16, (side, side), (scale, "constant")
    )
    for size, side in (("B", 16), ("L", 16), ("B", 24), ("L", 24), ("XL", 24), ("XXL", 24))
    for scale in [2.0 if size in "BL" else 1.75]
)
FAMILY = families.Family(
    LlamaGen, layers.GPTConfig, MARKER, read_config, FILES, order="raster", class_table=CLASS_TABLE
)
