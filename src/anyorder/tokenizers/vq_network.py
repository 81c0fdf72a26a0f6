"""Encoder and decoder of the VQ tokenizer: convolutions with the names of LlamaGen's published files."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

if TYPE_CHECKING:
    from anyorder.tokenizers.vq import VQConfig


class Encoder(nn.Module):
    """Images (B, 3, H, W) to features (B, z_channels, H / factor, W / factor)."""

    def __init__(self, config: VQConfig):
        super().__init__()
        widths = [m * config.channels for m in config.multipliers]
        deepest = len(widths) - 1
        self.conv_in = _conv3(3, config.channels)
        self.conv_blocks = nn.ModuleList(
            Level(before, width, config.res_blocks, config, attention=i == deepest, downsample=i < deepest)
            for i, (before, width) in enumerate(zip([config.channels, *widths[:-1]], widths, strict=True))
        )
        self.mid = _middle(widths[-1], config)
        self.norm_out = _norm(widths[-1], config)
        self.conv_out = _conv3(widths[-1], config.z_channels)

    def forward(self, x: Tensor) -> Tensor:
        """Features of images."""
        # Convolutions in bf16 on a CPU take half the time in this layout; the decoder's input has it already.
        x = self.conv_in(x.contiguous(memory_format=torch.channels_last))
        for level in self.conv_blocks:
            x = level(x)
        return self.conv_out(F.silu(self.norm_out(self.mid(x))))


class Decoder(nn.Module):
    """Features (B, z_channels, h, w) to images (B, 3, h * factor, w * factor)."""

    def __init__(self, config: VQConfig):
        super().__init__()
        widths = [m * config.channels for m in reversed(config.multipliers)]
        last = len(widths) - 1
        self.conv_in = _conv3(config.z_channels, widths[0])
        self.mid = _middle(widths[0], config)
        self.conv_blocks = nn.ModuleList(
            Level(before, width, config.res_blocks + 1, config, attention=i == 0, upsample=i < last)
            for i, (before, width) in enumerate(zip([widths[0], *widths[:-1]], widths, strict=True))
        )
        self.norm_out = _norm(widths[-1], config)
        self.conv_out = _conv3(widths[-1], 3)

    def forward(self, x: Tensor) -> Tensor:
        """Images of features."""
        x = self.mid(self.conv_in(x))
        for level in self.conv_blocks:
            x = level(x)
        return self.conv_out(F.silu(self.norm_out(x)))


class Level(nn.Module):
    """The blocks of one resolution, and the change to the next."""

    def __init__(
        self,
        before: int,
        width: int,
        blocks: int,
        config: VQConfig,
        attention: bool,
        downsample: bool = False,
        upsample: bool = False,
    ):
        super().__init__()
        self.res = nn.ModuleList(ResBlock(before if i == 0 else width, width, config) for i in range(blocks))
        self.attn = nn.ModuleList(_attention(width, config, attention) for _ in range(blocks))
        self.downsample = Downsample(width) if downsample else nn.Identity()
        self.upsample = Upsample(width) if upsample else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """(B, before, H, W) to (B, width, H, W), then resampled."""
        for res, attn in zip(self.res, self.attn, strict=True):
            x = attn(res(x))
        return self.upsample(self.downsample(x))


class ResBlock(nn.Module):
    """Two pre-activated convolutions beside a shortcut."""

    def __init__(self, before: int, width: int, config: VQConfig):
        super().__init__()
        self.norm1 = _norm(before, config)
        self.conv1 = _conv3(before, width)
        self.norm2 = _norm(width, config)
        self.dropout = nn.Dropout(config.dropout)
        self.conv2 = _conv3(width, width)
        self.nin_shortcut = nn.Identity() if before == width else nn.Conv2d(before, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        """(B, before, H, W) to (B, width, H, W)."""
        h = self.conv1(F.silu(self.norm1(x)))
        h = self.conv2(self.dropout(F.silu(self.norm2(h))))
        return self.nin_shortcut(x) + h


class Attention(nn.Module):
    """Single-head self-attention over all pixels, beside a shortcut."""

    def __init__(self, width: int, config: VQConfig):
        super().__init__()
        self.norm = _norm(width, config)
        self.q, self.k, self.v, self.proj_out = (nn.Conv2d(width, width, 1) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        """(B, width, H, W) to the same shape."""
        h = self.norm(x)
        q, k, v = (conv(h).flatten(2).mT[:, None] for conv in (self.q, self.k, self.v))
        h = F.scaled_dot_product_attention(q, k, v)[:, 0].mT.unflatten(2, x.shape[2:])
        return x + self.proj_out(h)


class Downsample(nn.Module):
    """Halves height and width; padded below and to the right only, as in VQGAN."""

    def __init__(self, width: int):
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        """(B, width, H, W) to (B, width, H / 2, W / 2)."""
        return self.conv(F.pad(x, (0, 1, 0, 1)))


class Upsample(nn.Module):
    """Doubles height and width."""

    def __init__(self, width: int):
        super().__init__()
        self.conv = _conv3(width, width)

    def forward(self, x: Tensor) -> Tensor:
        """(B, width, H, W) to (B, width, 2 H, 2 W)."""
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


def _middle(width: int, config: VQConfig) -> nn.Sequential:
    return nn.Sequential(
        ResBlock(width, width, config), _attention(width, config, True), ResBlock(width, width, config)
    )


def _attention(width: int, config: VQConfig, present: bool) -> nn.Module:
    return Attention(width, config) if present and config.attention else nn.Identity()


def _norm(width: int, config: VQConfig) -> nn.GroupNorm:
    return nn.GroupNorm(config.groups, width, eps=1e-6)


def _conv3(before: int, width: int) -> nn.Conv2d:
    return nn.Conv2d(before, width, 3, padding=1)
