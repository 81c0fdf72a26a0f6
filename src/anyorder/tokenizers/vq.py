"""The tokenizer: a convolutional VQ auto-encoder whose default weights are LlamaGen's VQ-16.

VQGAN (arXiv 2012.09841) with the L2-normalised, low-dimensional codebook of ViT-VQGAN (arXiv 2110.04627) in
the layout of LlamaGen (arXiv 2406.06525, Sec. 3.1): its published VQ-16 and VQ-8 files load as they are.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from anyorder import families
from anyorder.contracts import Grid, require
from anyorder.tokenizers import vq_network as network

VQ16 = families.File("FoundationVision/LlamaGen", "vq_ds16_c2i.pt")

WINDOW = 65536
"""Tokens remembered in `quantize.codebook_used`, as many as in the published files."""


@dataclass
class VQConfig:
    """Shape of the tokenizer and how its codebook learns; the defaults are LlamaGen's VQ-16."""

    channels: int = 128
    """Number of channels at full resolution."""
    multipliers: tuple[int, ...] = (1, 1, 2, 2, 4)
    """Channels at each resolution in units of `channels`; each further level halves both sides: (1, 2, 4)
    makes patches of 4 x 4 pixels."""
    res_blocks: int = 2
    """Residual blocks per resolution in the encoder; the decoder has one more."""
    z_channels: int = 256
    """Number of channels between encoder or decoder and the 1 x 1 convolutions around the codebook."""
    vocab_size: int = 16384
    """Number of codes, V."""
    code_dim: int = 8
    """Dimensions of a code; codes and encoder outputs are unit vectors."""
    groups: int = 32
    """Groups of every GroupNorm, a divisor of every number of channels."""
    attention: bool = True
    """Self-attention at the lowest resolution, as published; with false there are only convolutions."""
    dropout: float = 0.0
    """Dropout probability inside the residual blocks in training, in [0, 1)."""
    commitment: float = 0.25
    """Weight of the commitment loss (VQ-VAE, arXiv 1711.00937, Eq. 3), >= 0."""
    codebook_update: Literal["ema", "gradient"] = "gradient"
    """How codes learn: ema, as the moving average of the encoder outputs nearest to them, or gradient, by the
    codebook loss."""
    ema_decay: float = 0.99
    """Share of a code's moving average that stays in one update, in [0, 1)."""
    revive_after: int = 0
    """Updates without use after which a code is re-seeded from encoder outputs; 0: never."""

    def __post_init__(self) -> None:
        self.multipliers = tuple(self.multipliers)
        for name in ("channels", "res_blocks", "z_channels", "vocab_size", "code_dim", "groups"):
            require(getattr(self, name) >= 1, f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("dropout", "ema_decay"):
            require(0 <= getattr(self, name) < 1, f"{name} must lie in [0, 1), got {getattr(self, name)}")
        for name in ("commitment", "revive_after"):
            require(getattr(self, name) >= 0, f"{name} must not be negative, got {getattr(self, name)}")
        text = f"multipliers need one number >= 1 per resolution, got {self.multipliers}"
        require(min(self.multipliers, default=0) >= 1, f"{text}; (1, 2, 4) is factor 4")
        narrow = [m * self.channels for m in self.multipliers if m * self.channels % self.groups]
        mend = f"choose a divisor of {self.channels}"
        require(not narrow, f"groups={self.groups} does not divide widths {narrow}: {mend}")
        how = self.codebook_update
        require(how in ("ema", "gradient"), f"codebook_update must be 'ema' or 'gradient', got {how!r}")


@dataclass
class VQOutput:
    """The result of one pass through the tokenizer."""

    reconstruction: Tensor
    """(B, 3, H, W), about [-1, 1], not clamped."""
    tokens: Tensor
    """(B, N) int64, raster order."""
    latents: Tensor
    """(B, N, D) float32 unit vectors: the encoder's outputs before quantisation."""
    commitment_loss: Tensor
    """float32 scalar, `config.commitment` included."""
    codebook_loss: Tensor
    """float32 scalar; zero where the codebook follows a moving average."""


class VQModel(network.ConvTokenizer):
    """Images to tokens and back; a `contracts.Tokenizer`."""

    def __init__(self, config: VQConfig):
        super().__init__(config, network.encoder(config), network.decoder(config), Quantizer(config))
        self.quant_conv = nn.Conv2d(config.z_channels, config.code_dim, 1)
        self.post_quant_conv = nn.Conv2d(config.code_dim, config.z_channels, 1)

    def forward(self, images: Tensor) -> VQOutput:
        """Reconstruct images as for `encode`, with straight-through gradients past the quantisation."""
        latents = self._latents(images)
        tokens = self.quantize.nearest(latents)
        codes = self.quantize.lookup(tokens)
        quantized = straight_through(latents, codes)
        learned, loss = self.config.codebook_update == "gradient", nn.functional.mse_loss
        return VQOutput(
            reconstruction=self._decode(quantized, self.grid(images)),
            tokens=tokens,
            latents=latents,
            commitment_loss=self.config.commitment * loss(latents, codes.detach()),
            codebook_loss=loss(codes, latents.detach()) if learned else latents.new_zeros(()),
        )

    def _latents(self, images: Tensor) -> Tensor:
        self.grid(images)
        # Convolutions in bf16 on a CPU take half the time in this layout; the decoder's input has it already.
        z = self.quant_conv(self.encoder(images.contiguous(memory_format=torch.channels_last)))
        return nn.functional.normalize(z.flatten(2).mT.float(), dim=-1)

    def _decode(self, codes: Tensor, grid: Grid) -> Tensor:
        z = codes.mT.unflatten(2, (grid.h, grid.w))
        return self.decoder(self.post_quant_conv(z))


def straight_through(latents: Tensor, codes: Tensor) -> Tensor:
    """The value of `codes` with the gradient of `latents` (VQ-VAE, arXiv 1711.00937, Sec. 3.2)."""
    return latents + (codes - latents).detach()


class Quantizer(nn.Module):
    """A codebook of V directions in D dimensions.

    Only the direction of a stored row matters: rows are normalised at every use. With
    `codebook_update="ema"` a row holds the moving average of the *sum* of its encoder outputs: its direction
    is their mean on the sphere, its length their weight, so no other state is needed.
    """

    codebook_used: Tensor
    """(65536,) float32, the latest training tokens, oldest first; -1 where there is none yet."""
    idle: Tensor
    """(V,) int64, updates since a code was last used; -1 before the first update, which seeds every code.
    Only if codes are averaged or revived. Zero it to keep the codes of a file without it."""

    def __init__(self, config: VQConfig):
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocab_size, config.code_dim)
        self.embedding.weight.data = nn.functional.normalize(self.embedding.weight.data, dim=-1)
        self.embedding.weight.requires_grad_(config.codebook_update == "gradient")
        self.register_buffer("codebook_used", torch.full((WINDOW,), -1.0))
        if config.codebook_update == "ema" or config.revive_after:
            self.register_buffer("idle", torch.full((config.vocab_size,), -1))

    def lookup(self, tokens: Tensor) -> Tensor:
        """Codes of tokens (...), unit vectors (..., D) float32."""
        # Rows are gathered before they are normalised: the backward pass then never reads the whole codebook.
        return nn.functional.normalize(nn.functional.embedding(tokens, self.embedding.weight).float(), dim=-1)

    @torch.no_grad()
    def nearest(self, latents: Tensor) -> Tensor:
        """Tokens (...) int64 of unit vectors (..., D): the code of largest cosine, which is the nearest."""
        codes = nn.functional.normalize(self.embedding.weight.float(), dim=-1)
        chunk = max(1, 2**24 // len(codes))  # 64 MiB of cosines at a time
        with torch.autocast(latents.device.type, enabled=False):
            flat = [(z @ codes.T).argmax(-1) for z in latents.flatten(0, -2).split(chunk)]
        return torch.cat(flat).view(latents.shape[:-1])

    @torch.no_grad()
    def update(self, latents: Tensor, tokens: Tensor, generator: torch.Generator) -> None:
        """Learn from one training batch: moving average, seeding and revival of unused codes.

        May run before the backward pass, which reads copies of the codes in use.

        Args:
            latents: (M, D) float32 unit vectors.
            tokens: (M,) int64, their nearest codes.
            generator: on the same device; chooses the encoder outputs that become codes.
        """
        recent = torch.cat((self.codebook_used, tokens.to(self.codebook_used.dtype)))
        self.codebook_used.copy_(recent[-WINDOW:])
        if not hasattr(self, "idle"):
            return
        first = self.idle[0] < 0  # read by the host, this and the like would make a GPU wait
        used = torch.zeros_like(self.idle, dtype=torch.bool).index_fill_(0, tokens, True)
        if self.config.codebook_update == "ema":
            self._follow(latents, tokens, used & ~first)
        self.idle.copy_(torch.where(used, 0, self.idle + 1))
        dead = first | (self.idle >= (self.config.revive_after or torch.inf))
        self._reseed(dead, latents, tokens, generator)

    def _follow(self, latents: Tensor, tokens: Tensor, used: Tensor) -> None:
        """Moving average of the sums of encoder outputs (VQ-VAE, Appendix A.1), for the codes in use."""
        weight, decay = self.embedding.weight, self.config.ema_decay
        sums = torch.zeros_like(weight).index_add_(0, tokens, latents)
        # Unused rows stand still: decaying them would change no direction and end in an underflow.
        weight.copy_(torch.where(used[:, None], decay * weight + (1 - decay) * sums, weight))

    def _reseed(self, dead: Tensor, latents: Tensor, tokens: Tensor, generator: torch.Generator) -> None:
        """Put dead codes on encoder outputs, sampled in proportion to how badly they are represented now.

        Without replacement, unless more are dead than there are outputs.
        """
        error = (1 - (latents * self.lookup(tokens)).sum(-1)).clamp_min(1e-6)
        most, again = min(len(dead), len(error)), generator.clone_state()
        # `multinomial` without replacement, which waits, for as many as may be dead.
        chosen = (error / torch.empty_like(error).exponential_(generator=generator)).topk(most).indices
        if most < len(dead):
            drawn = error.multinomial(len(dead), replacement=True, generator=again)
            chosen = torch.where(dead.sum() > most, drawn, nn.functional.pad(chosen, (0, len(dead) - most)))
        weight, new = self.embedding.weight, latents[chosen[(dead.cumsum(0) - 1).clamp_min(0)]]
        weight.copy_(torch.where(dead[:, None], new.to(weight.dtype), weight))
        self.idle.masked_fill_(dead, 0)


def read_config(tensors: dict[str, Tensor], grid: tuple[int, int], heads: int) -> VQConfig:
    """The configuration of a VQ-16 or VQ-8 file; see `families.Family`."""
    # Files may or may not hold the tokens that were used last in training.
    tensors.setdefault("quantize.codebook_used", torch.full((WINDOW,), -1.0))
    return VQConfig(
        **network.read_sizes(tensors, "encoder.conv_blocks.", "res.0.conv1.weight"),
        res_blocks=families.count_blocks(tensors, "encoder.conv_blocks.0.res."),
        z_channels=families.shape_of(tensors, "encoder.conv_out.weight", 4)[0],
    )


FAMILY = families.Family(VQModel, VQConfig, "encoder.conv_blocks.0.res.0.conv1.weight", read_config, (VQ16,))
