"""The residual block of the transformer: attention and SwiGLU."""

import math

from torch import Tensor, nn

from anyorder.models import attention, layers, positions
from anyorder.models.architecture import TransformerConfig


class Attention(nn.Module):
    """Projections of multi-head self-attention; who attends to whom is an argument of `Block`."""

    def __init__(self, config: TransformerConfig):
        super().__init__()
        self.heads = config.heads
        self.qkv = layers.Linear(config.width, 3 * config.width, bias=False)
        self.out = layers.Linear(config.width, config.width, bias=False)
        size = config.width // config.heads
        self.q_norm, self.k_norm = (layers.RMSNorm(size) if config.qk_norm else nn.Identity() for _ in "qk")

    def project(self, x: Tensor, rotation: positions.Rotation | None) -> tuple[Tensor, Tensor, Tensor]:
        """Inputs (B, T, D) to queries, keys and values, each (B, H, T, D / H)."""
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        q, k = self.q_norm(q), self.k_norm(k)
        if rotation is not None:
            q, k = positions.rotate(q, *rotation.queries), positions.rotate(k, *rotation.keys)
        return q.to(v.dtype), k.to(v.dtype), v


class Block(nn.Module):
    """Pre-norm residual block."""

    def __init__(self, config: TransformerConfig):
        super().__init__()
        self.attention_norm = layers.RMSNorm(config.width)
        self.attention = Attention(config)
        self.mlp_norm = layers.RMSNorm(config.width)
        self.mlp = SwiGLU(config.width)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor, rotation: positions.Rotation | None, attend: attention.Attend) -> Tensor:
        """(B, T, D) to (B, T, D)."""
        return self.after(x, attention.merge_heads(attend(*self.before(x, rotation))))

    def before(self, x: Tensor, rotation: positions.Rotation | None) -> tuple[Tensor, Tensor, Tensor]:
        """What comes before attention: inputs (B, T, D) to queries, keys, values (B, H, T, D / H)."""
        return self.attention.project(self.attention_norm(x), rotation)

    def after(self, x: Tensor, attended: Tensor) -> Tensor:
        """What comes after it: inputs and outputs of the heads, both (B, T, D), to outputs (B, T, D)."""
        # A sum lies in memory as its first term: for few rows as `Linear` returns, and wants, them.
        x = self.dropout(self.attention.out(attended)) + x
        return self.dropout(self.mlp(self.mlp_norm(x))) + x


class SwiGLU(nn.Module):
    """w2(silu(w1 x) * w3 x) with w1 and w3 fused; hidden width 8/3 D, rounded up to 32."""

    def __init__(self, width: int):
        super().__init__()
        hidden = 32 * math.ceil(8 * width / 3 / 32)
        self.gate_up = layers.Linear(width, 2 * hidden, bias=False)
        self.down = layers.Linear(hidden, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """(..., D) to (..., D)."""
        gate, up = self.gate_up(x).chunk(2, -1)
        return self.down(nn.functional.silu(gate) * up)
