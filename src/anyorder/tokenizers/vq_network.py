"""Convolutional encoders and decoders; the VQ tokenizer's have the names of LlamaGen's published files."""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from anyorder import contracts, families

if TYPE_CHECKING:
    from anyorder.tokenizers.vq import VQConfig


class ConvTokenizer(contracts.TokenizerNetwork):
    """A convolutional encoder, a codebook (`nearest`, `lookup`) and a convolutional decoder."""

    def __init__(self, config: Any, encoder: nn.Sequential, decoder: nn.Sequential, quantize: nn.Module):
        super().__init__()
        self.config, self.vocab_size = config, config.vocab_size
        self.factor = 2 ** (len(config.multipliers) - 1)
        self.encoder, self.decoder = encoder, decoder
        self.quantize: Any = quantize

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """Images (B, 3, H, W) float in [-1, 1] to tokens (B, N) int64 in raster order, N = H * W / factor**2.

        Raises:
            ValueError: wrong number of channels, or sides not divisible by `factor`.
        """
        return self.quantize.nearest(self._latents(images))

    @torch.no_grad()
    def decode(self, tokens: Tensor, grid: contracts.Grid) -> Tensor:
        """Tokens (B, N) int64 in raster order to images (B, 3, h * factor, w * factor) float in [-1, 1].

        Raises:
            ValueError: a token outside [0, vocab_size), or N differs from `grid.n`.
        """
        check_tokens(tokens, grid, self.vocab_size)
        return self._decode(self.quantize.lookup(tokens), grid).clamp(-1, 1)

    def grid(self, images: Tensor) -> contracts.Grid:
        """The grid of tokens that `images` (B, 3, H, W) are cut into; errors as for `encode`."""
        return grid_of(images.shape, self.factor)

    def _latents(self, images: Tensor) -> Tensor:
        """What is quantised, (B, N, D) float; checks the images."""
        raise NotImplementedError

    def _decode(self, codes: Tensor, grid: contracts.Grid) -> Tensor:
        """Codes (B, N, D) to images, about [-1, 1]."""
        raise NotImplementedError


def check_tokens(tokens: Tensor, grid: contracts.Grid, vocab_size: int) -> None:
    """A ValueError unless tokens are (B, N) of `grid` in [0, vocab_size)."""
    allowed = f"in [0, {vocab_size})"
    expected = f"grid {grid.h} x {grid.w} takes tokens of shape (B, {grid.n}) {allowed}"
    contracts.require(tokens.shape[1:] == (grid.n,), f"{expected}, got {tuple(tokens.shape)}")
    low, high = (int(t) for t in tokens.aminmax()) if tokens.numel() else (0, 0)
    mend = "decode them with the tokenizer that made them"
    fits = 0 <= low <= high < vocab_size
    contracts.require(fits, f"tokens must lie {allowed}, got {low} to {high}: {mend}")


def grid_of(shape: tuple[int, ...], factor: int) -> contracts.Grid:
    """The grid of patches of `factor` pixels of images of a shape (B, 3, H, W); a ValueError if none fits."""
    fits = len(shape) == 4 and shape[1] == 3 and 0 not in shape[2:]
    contracts.require(fits, f"images must have shape (B, 3, H, W), got {tuple(shape)}")
    h, w = shape[2:]
    text = f"images of {h} x {w} pixels (height x width) cannot be cut into patches of {factor} x {factor}: "
    text += f"resize, crop or pad both sides to a multiple of {factor}"
    contracts.require(h % factor == w % factor == 0, text)
    return contracts.Grid(h // factor, w // factor)


def read_sizes(tensors: dict[str, Tensor], levels: str, first: str) -> dict[str, Any]:
    """Settings of a tokenizer's file that all kinds have; `first` names the first weight of a level."""
    channels = families.shape_of(tensors, "encoder.conv_in.weight", 4)[0]
    names = [f"{levels}{i}.{first}" for i in range(families.count_blocks(tensors, levels))]
    multipliers = tuple(families.shape_of(tensors, name, 4)[0] // channels for name in names)
    vocab_size, code_dim = families.shape_of(tensors, "quantize.embedding.weight")
    return {"channels": channels, "multipliers": multipliers, "vocab_size": vocab_size, "code_dim": code_dim}


def encoder(config: VQConfig) -> nn.Sequential:
    """Images (B, 3, H, W) to features (B, z_channels, H / factor, W / factor)."""
    widths = [config.channels, *(m * config.channels for m in config.multipliers)]
    deepest = len(widths) - 2
    levels = (
        Level(config, *sides, config.res_blocks, i == deepest, "halve" if i < deepest else "")
        for i, sides in enumerate(pairwise(widths))
    )
    return named(
        conv_in=conv3(3, config.channels),
        conv_blocks=nn.Sequential(*levels),
        mid=_middle(widths[-1], config),
        **ending(widths[-1], config.groups, conv3(widths[-1], config.z_channels)),
    )


def decoder(config: VQConfig) -> nn.Sequential:
    """Features (B, z_channels, h, w) to images (B, 3, h * factor, w * factor)."""
    widths = [m * config.channels for m in reversed(config.multipliers)]
    last = len(widths) - 1
    levels = (
        Level(config, *sides, config.res_blocks + 1, i == 0, "double" if i < last else "")
        for i, sides in enumerate(pairwise([widths[0], *widths]))
    )
    return named(
        conv_in=conv3(config.z_channels, widths[0]),
        mid=_middle(widths[0], config),
        conv_blocks=nn.Sequential(*levels),
        **ending(widths[-1], config.groups, conv3(widths[-1], 3)),
    )


class Level(nn.Module):
    """The blocks of one resolution, (B, before, H, W) to (B, width, H, W), and the `change` to the next."""

    def __init__(self, config: VQConfig, before: int, width: int, blocks: int, attention: bool, change: str):
        super().__init__()
        self.res = nn.ModuleList(ResBlock(before if i == 0 else width, width, config) for i in range(blocks))
        self.attn = nn.ModuleList(_attention(width, config, attention) for _ in range(blocks))
        self.downsample: nn.Module = nn.Identity()
        self.upsample: nn.Module = nn.Identity()
        if change == "halve":  # padded below and to the right only, as in VQGAN
            pad = nn.ZeroPad2d((0, 1, 0, 1))
            self.downsample = named(pad=pad, conv=nn.Conv2d(width, width, 3, stride=2))
        elif change == "double":
            self.upsample = named(repeat=nn.Upsample(scale_factor=2.0), conv=conv3(width, width))

    def forward(self, x: Tensor) -> Tensor:
        """The next level's input."""
        for res, attn in zip(self.res, self.attn, strict=True):
            x = attn(res(x))
        return self.upsample(self.downsample(x))


class ResBlock(nn.Module):
    """Two pre-activated convolutions beside a shortcut, (B, before, H, W) to (B, width, H, W)."""

    def __init__(self, before: int, width: int, config: VQConfig):
        super().__init__()
        self.norm1 = norm(before, config.groups)
        self.conv1 = conv3(before, width)
        self.norm2 = norm(width, config.groups)
        self.dropout = nn.Dropout(config.dropout)
        self.conv2 = conv3(width, width)
        self.nin_shortcut = nn.Identity() if before == width else nn.Conv2d(before, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Shortcut and convolutions, added."""
        h = self.conv1(nn.functional.silu(self.norm1(x)))
        h = self.conv2(self.dropout(nn.functional.silu(self.norm2(h))))
        return self.nin_shortcut(x) + h


class Attention(nn.Module):
    """Single-head self-attention over all pixels of (B, width, H, W), beside a shortcut."""

    def __init__(self, width: int, config: VQConfig):
        super().__init__()
        self.norm = norm(width, config.groups)
        self.q, self.k, self.v, self.proj_out = (nn.Conv2d(width, width, 1) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        """Shortcut and attention, added."""
        h = self.norm(x)
        q, k, v = (conv(h).flatten(2).mT[:, None] for conv in (self.q, self.k, self.v))
        h = nn.functional.scaled_dot_product_attention(q, k, v)[:, 0].mT.unflatten(2, x.shape[2:])
        return x + self.proj_out(h)


def _middle(width: int, config: VQConfig) -> nn.Sequential:
    first, attention = ResBlock(width, width, config), _attention(width, config, True)
    return nn.Sequential(first, attention, ResBlock(width, width, config))


def _attention(width: int, config: VQConfig, present: bool) -> nn.Module:
    return Attention(width, config) if present and config.attention else nn.Identity()


def norm(width: int, groups: int) -> nn.GroupNorm:
    """GroupNorm with the epsilon of all published tokenizers."""
    return nn.GroupNorm(groups, width, eps=1e-6)


def conv3(before: int, width: int, bias: bool = True) -> nn.Conv2d:
    """A 3 x 3 convolution that keeps height and width."""
    return nn.Conv2d(before, width, 3, padding=1, bias=bias)


def ending(width: int, groups: int, last: nn.Module) -> dict[str, nn.Module]:
    """What encoders and decoders end with."""
    return {"norm_out": norm(width, groups), "silu": nn.SiLU(), "conv_out": last}


def named(**modules: nn.Module) -> nn.Sequential:
    """Modules one after the other, under these names."""
    made = nn.Sequential()
    for name, module in modules.items():
        made.add_module(name, module)
    return made
