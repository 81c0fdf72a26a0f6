"""MaskGIT's VQGAN (arXiv 2202.04200), the tokenizer of RandAR-L-MaskGIT: 1024 codes, factor 16.

Convolutions and GroupNorm alone, average pooling, no convolution around the codebook, nearest code by
Euclidean distance. The published networks work on images in [0, 1]; the contract's are in [-1, 1].
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from anyorder import families
from anyorder.contracts import Grid, TokenizerNetwork

MASKGIT_VQ = families.File("fun-research/TiTok", "maskgit-vqgan-imagenet-f16-256.bin")

GROUPS = 32
"""Of every GroupNorm."""


@dataclass
class MaskGITVQConfig:
    """Shape of the tokenizer; the defaults are the published ones."""

    channels: int = 128
    """Number of channels at full resolution, a multiple of 32."""
    multipliers: tuple[int, ...] = (1, 1, 2, 2, 4)
    """Channels at each resolution in units of `channels`; each level after the first halves both sides."""
    res_blocks: int = 2
    """Residual blocks per resolution, and at the lowest one between encoder or decoder and the codebook."""
    vocab_size: int = 1024
    """Number of codes, V."""
    code_dim: int = 256
    """Dimensions of a code."""

    def __post_init__(self) -> None:
        self.multipliers = tuple(self.multipliers)
        for name in ("channels", "res_blocks", "vocab_size", "code_dim"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be >= 1, got {getattr(self, name)}")
        if self.channels % GROUPS or not self.multipliers or min(self.multipliers) < 1:
            raise ValueError(
                f"channels must be a multiple of {GROUPS} and multipliers one number >= 1 per resolution, "
                f"got {self.channels} and {self.multipliers}"
            )

    @property
    def factor(self) -> int:
        """Pixels per patch side."""
        return 2 ** (len(self.multipliers) - 1)


class MaskGITVQ(TokenizerNetwork):
    """Images to tokens and back; a `contracts.Tokenizer`."""

    config: MaskGITVQConfig

    def __init__(self, config: MaskGITVQConfig):
        """Build from a configuration; weights come from the global random generator."""
        super().__init__()
        self.config = config
        self.vocab_size = config.vocab_size
        self.factor = config.factor
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)
        self.quantize = Codebook(config)

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """Images (B, 3, H, W) float in [-1, 1] to tokens (B, N) int64 in raster order, N = H * W / factor**2.

        Raises:
            ValueError: wrong number of channels, or sides not divisible by `factor`.
        """
        if images.ndim != 4 or images.shape[1] != 3 or any(side % self.factor for side in images.shape[2:]):
            raise ValueError(
                f"images must have shape (B, 3, H, W) with sides divisible by {self.factor}, "
                f"got {tuple(images.shape)}: resize or crop them"
            )
        return self.quantize.nearest(self.encoder((images + 1) / 2).flatten(2).mT)

    @torch.no_grad()
    def decode(self, tokens: Tensor, grid: Grid) -> Tensor:
        """Tokens (B, N) int64 in raster order to images (B, 3, h * factor, w * factor) float in [-1, 1].

        Raises:
            ValueError: a token outside [0, vocab_size), or N differs from `grid.n`.
        """
        low, high = (int(t) for t in tokens.aminmax()) if tokens.numel() else (0, 0)
        if tokens.ndim != 2 or tokens.shape[1] != grid.n or low < 0 or high >= self.vocab_size:
            raise ValueError(
                f"grid {grid.h} x {grid.w} takes tokens of shape (B, {grid.n}) in [0, {self.vocab_size}), "
                f"got {tuple(tokens.shape)} in [{low}, {high}]"
            )
        codes = self.quantize.embedding(tokens).mT.unflatten(2, (grid.h, grid.w))
        return self.decoder(codes).clamp(0, 1) * 2 - 1


class Codebook(nn.Module):
    """V codes of D dimensions."""

    def __init__(self, config: MaskGITVQConfig):
        super().__init__()
        self.embedding = nn.Embedding(config.vocab_size, config.code_dim)

    def nearest(self, latents: Tensor) -> Tensor:
        """Tokens (B, N) int64 of encoder outputs (B, N, D): smallest Euclidean distance."""
        codes = self.embedding.weight.float()
        with torch.autocast(latents.device.type, enabled=False):
            # |z - e|^2 without |z|^2, which is the same for every code
            return (codes.square().sum(-1) - 2 * latents.float() @ codes.T).argmin(-1)


class Encoder(nn.Module):
    """Images (B, 3, H, W) in [0, 1] to features (B, D, H / factor, W / factor)."""

    def __init__(self, config: MaskGITVQConfig):
        super().__init__()
        widths = [m * config.channels for m in config.multipliers]
        before = [config.channels, *widths[:-1]]
        self.conv_in = _conv3(3, config.channels, bias=False)
        self.down = nn.ModuleList(Level(a, b, config.res_blocks) for a, b in zip(before, widths, strict=True))
        self.mid = _blocks(widths[-1], widths[-1], config.res_blocks)
        self.norm_out = _norm(widths[-1])
        self.conv_out = nn.Conv2d(widths[-1], config.code_dim, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Features of images."""
        x = self.conv_in(x)
        for i, level in enumerate(self.down):
            x = level(F.avg_pool2d(x, 2) if i else x)
        return self.conv_out(F.silu(self.norm_out(self.mid(x))))


class Decoder(nn.Module):
    """Features (B, D, h, w) to images (B, 3, h * factor, w * factor), about [0, 1]."""

    def __init__(self, config: MaskGITVQConfig):
        super().__init__()
        widths = [m * config.channels for m in config.multipliers]
        deeper = [*widths[1:], widths[-1]]
        self.conv_in = _conv3(config.code_dim, widths[-1])
        self.mid = _blocks(widths[-1], widths[-1], config.res_blocks)
        self.up = nn.ModuleList(
            Level(a, b, config.res_blocks, upsample=i > 0)
            for i, (a, b) in enumerate(zip(deeper, widths, strict=True))
        )
        self.norm_out = _norm(widths[0])
        self.conv_out = _conv3(widths[0], 3)

    def forward(self, x: Tensor) -> Tensor:
        """Images of features; levels are numbered from the full resolution and run from the deepest."""
        x = self.mid(self.conv_in(x))
        for level in reversed(self.up):
            x = level(x)
        return self.conv_out(F.silu(self.norm_out(x)))


class Level(nn.Module):
    """The blocks of one resolution, and in the decoder the change to the next."""

    def __init__(self, before: int, width: int, blocks: int, upsample: bool = False):
        super().__init__()
        self.block = _blocks(before, width, blocks)
        self.upsample_conv = _conv3(width, width) if upsample else None

    def forward(self, x: Tensor) -> Tensor:
        """(B, before, H, W) to (B, width, H, W), or doubled."""
        x = self.block(x)
        if self.upsample_conv is None:
            return x
        return self.upsample_conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


class ResBlock(nn.Module):
    """Two pre-activated convolutions beside a shortcut.

    Where the width changes, the shortcut is a convolution of the block's *result*, not of its input: so the
    published weights were trained.
    """

    def __init__(self, before: int, width: int):
        super().__init__()
        self.norm1 = _norm(before)
        self.conv1 = _conv3(before, width, bias=False)
        self.norm2 = _norm(width)
        self.conv2 = _conv3(width, width, bias=False)
        self.nin_shortcut = None if before == width else nn.Conv2d(width, width, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """(B, before, H, W) to (B, width, H, W)."""
        h = self.conv1(F.silu(self.norm1(x)))
        h = self.conv2(F.silu(self.norm2(h)))
        return h + (x if self.nin_shortcut is None else self.nin_shortcut(h))


def _blocks(before: int, width: int, n: int) -> nn.Sequential:
    return nn.Sequential(*(ResBlock(before if i == 0 else width, width) for i in range(n)))


def _norm(width: int) -> nn.GroupNorm:
    return nn.GroupNorm(GROUPS, width, eps=1e-6)


def _conv3(before: int, width: int, bias: bool = True) -> nn.Conv2d:
    return nn.Conv2d(before, width, 3, padding=1, bias=bias)


def read_config(tensors: dict[str, Tensor], grid: tuple[int, int], heads: int) -> MaskGITVQConfig:
    """The configuration of a file; see `families.Family`."""
    channels = families.shape_of(tensors, "encoder.conv_in.weight", 4)[0]
    levels = range(families.count_blocks(tensors, "encoder.down."))
    widths = [families.shape_of(tensors, f"encoder.down.{i}.block.0.conv1.weight", 4)[0] for i in levels]
    vocab_size, code_dim = families.shape_of(tensors, "quantize.embedding.weight")
    return MaskGITVQConfig(
        channels=channels,
        multipliers=tuple(width // channels for width in widths),
        res_blocks=families.count_blocks(tensors, "encoder.mid."),
        vocab_size=vocab_size,
        code_dim=code_dim,
    )


FAMILY = families.Family(
    MaskGITVQ,
    MaskGITVQConfig,
    marker="encoder.down.0.block.0.conv1.weight",
    read_config=read_config,
    files=(MASKGIT_VQ,),
)
