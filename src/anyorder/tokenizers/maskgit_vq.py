"""MaskGIT's VQGAN (arXiv 2202.04200), the tokenizer of RandAR-L-MaskGIT: 1024 codes, factor 16.

Convolutions and GroupNorm alone, average pooling, no convolution around the codebook, nearest code by
Euclidean distance. The published networks work on images in [0, 1]; the contract's are in [-1, 1].
"""

from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor, nn

from anyorder import contracts, families
from anyorder.tokenizers import vq_network as network

MASKGIT_VQ = families.File("fun-research/TiTok", "maskgit-vqgan-imagenet-f16-256.bin")
GROUPS = 32  # of every GroupNorm


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
        contracts.at_least(1, self, "channels", "res_blocks", "vocab_size", "code_dim")
        fits = self.channels % GROUPS == 0 and min(self.multipliers, default=0) >= 1
        text = f"channels must be a multiple of {GROUPS} and multipliers one number >= 1 per resolution, got"
        contracts.require(fits, f"{text} {self.channels} and {self.multipliers}")


class MaskGITVQ(network.ConvTokenizer):
    """Images to tokens and back; a `contracts.Tokenizer`."""

    def __init__(self, config: MaskGITVQConfig):
        super().__init__(config, _encoder(config), _decoder(config), Codebook(config))

    def _latents(self, images: Tensor) -> Tensor:
        self.grid(images)
        return self.encoder((images + 1) / 2).flatten(2).mT

    def _decode(self, codes: Tensor, grid: contracts.Grid) -> Tensor:
        return self.decoder(codes.mT.unflatten(2, (grid.h, grid.w))) * 2 - 1


class Codebook(nn.Module):
    """V codes of D dimensions."""

    def __init__(self, config: MaskGITVQConfig):
        super().__init__()
        self.embedding = nn.Embedding(config.vocab_size, config.code_dim)

    def lookup(self, tokens: Tensor) -> Tensor:
        """Codes (..., D) of tokens (...)."""
        return self.embedding(tokens)

    def nearest(self, latents: Tensor) -> Tensor:
        """Tokens (B, N) int64 of encoder outputs (B, N, D): smallest Euclidean distance."""
        codes = self.embedding.weight.float()
        with torch.autocast(latents.device.type, enabled=False):
            # |z - e|^2 without |z|^2, which is the same for every code
            return (codes.square().sum(-1) - 2 * latents.float() @ codes.T).argmin(-1)


def _encoder(config: MaskGITVQConfig) -> nn.Sequential:
    """Images (B, 3, H, W) in [0, 1] to features (B, D, H / factor, W / factor)."""
    widths = [config.channels, *(m * config.channels for m in config.multipliers)]
    conv_in = network.conv3(3, config.channels, bias=False)
    blocks = [_blocks(before, width, config.res_blocks) for before, width in pairwise(widths)]
    pooled = [network.named(pool=nn.AvgPool2d(2), block=block) for block in blocks[1:]]
    return network.named(
        conv_in=conv_in,
        down=nn.Sequential(network.named(block=blocks[0]), *pooled),
        mid=_blocks(widths[-1], widths[-1], config.res_blocks),
        **network.ending(widths[-1], GROUPS, nn.Conv2d(widths[-1], config.code_dim, 1)),
    )


def _decoder(config: MaskGITVQConfig) -> nn.Sequential:
    """Features (B, D, h, w) to images (B, 3, h * factor, w * factor), about [0, 1]."""
    widths = [m * config.channels for m in config.multipliers]
    conv_in = network.conv3(config.code_dim, widths[-1])
    mid = _blocks(widths[-1], widths[-1], config.res_blocks)
    levels = {}
    for i, (width, before) in enumerate(pairwise([*widths, widths[-1]])):
        parts: dict[str, nn.Module] = {"block": _blocks(before, width, config.res_blocks)}
        if i:
            parts |= {"repeat": nn.Upsample(scale_factor=2.0), "upsample_conv": network.conv3(width, width)}
        levels[str(i)] = network.named(**parts)
    return network.named(
        conv_in=conv_in,
        mid=mid,
        up=network.named(**dict(reversed(levels.items()))),  # numbered from full resolution, run from deepest
        **network.ending(widths[0], GROUPS, network.conv3(widths[0], 3)),
    )


class ResBlock(nn.Module):
    """Two pre-activated convolutions beside a shortcut, (B, before, H, W) to (B, width, H, W).

    Where the width changes, the shortcut is a convolution of the block's *result*, not of its input: so the
    published weights were trained.
    """

    def __init__(self, before: int, width: int):
        super().__init__()
        self.norm1 = network.norm(before, GROUPS)
        self.conv1 = network.conv3(before, width, bias=False)
        self.norm2 = network.norm(width, GROUPS)
        self.conv2 = network.conv3(width, width, bias=False)
        self.nin_shortcut = None if before == width else nn.Conv2d(width, width, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Shortcut and convolutions, added."""
        h = self.conv1(nn.functional.silu(self.norm1(x)))
        h = self.conv2(nn.functional.silu(self.norm2(h)))
        return h + (x if self.nin_shortcut is None else self.nin_shortcut(h))


def _blocks(before: int, width: int, n: int) -> nn.Sequential:
    return nn.Sequential(*(ResBlock(before if i == 0 else width, width) for i in range(n)))


def read_config(tensors: dict[str, Tensor], grid: tuple[int, int], heads: int) -> MaskGITVQConfig:
    """The configuration of a file; see `families.Family`."""
    sizes = network.read_sizes(tensors, "encoder.down.", "block.0.conv1.weight")
    return MaskGITVQConfig(**sizes, res_blocks=families.count_blocks(tensors, "encoder.mid."))


FAMILY = families.Family(
    MaskGITVQ, MaskGITVQConfig, "encoder.down.0.block.0.conv1.weight", read_config, (MASKGIT_VQ,)
)
