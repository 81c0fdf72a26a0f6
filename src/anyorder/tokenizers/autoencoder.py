"""Autoencoders of others as tokenizers: the VQ models of diffusers, and continuous ones with a codebook.

Nothing of diffusers is imported. What counts is the interface: `encode(images)` gives latents (B, C, h, w)
or an object with `latents` or `latent_dist.mode()`; `decode(latents)` gives images or what has a `sample`.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from anyorder import contracts, families
from anyorder.tokenizers import vq_network

ROWS = 4096
"""Patches whose nearest codes are looked for at once."""


@dataclass
class AutoencoderConfig:
    """Of an `AutoencoderTokenizer`, as `wrap` finds it."""

    autoencoder: str
    """Import path of the class of the autoencoder, such as diffusers:VQModel."""
    arguments: str
    """What the class is made with, as JSON."""
    vocab_size: int
    """Codes in the codebook."""
    channels: int
    """Channels of a latent and of a code."""
    factor: int
    """Pixels per patch side."""


class AutoencoderTokenizer(contracts.TokenizerNetwork):
    """The code nearest to each latent; the decoder gets the codes."""

    codebook: Tensor  #: (V, C)
    autoencoder: Any

    def __init__(self, config: AutoencoderConfig):
        super().__init__()
        self.config, self.vocab_size, self.factor = config, config.vocab_size, config.factor
        arguments = json.loads(config.arguments)
        self.autoencoder = families.resolve("networks", config.autoencoder)(**arguments)
        self.looks_up = bool(arguments.get("lookup_from_codebook"))  # VQ models that decode tokens themselves
        self.register_buffer("codebook", torch.zeros(config.vocab_size, config.channels))

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """See `vq_network.ConvTokenizer`."""
        vq_network.grid_of(images.shape, self.factor)
        z = _latents(self.autoencoder, images)
        return _nearest(z.movedim(1, -1).flatten(0, -2), self.codebook).view(len(z), -1)

    @torch.no_grad()
    def decode(self, tokens: Tensor, grid: contracts.Grid) -> Tensor:
        """See `vq_network.ConvTokenizer`."""
        vq_network.check_tokens(tokens, grid, self.vocab_size)
        codes, shape = self.codebook[tokens], (len(tokens), grid.h, grid.w, self.config.channels)
        z: Tensor = codes.view(shape).movedim(-1, 1)
        how = {"force_not_quantize": True, "shape": shape} if hasattr(self.autoencoder, "quantize") else {}
        made = self.autoencoder.decode(tokens.flatten() if self.looks_up else z, **how)
        return getattr(made, "sample", made).clamp(-1, 1)


FAMILY = families.Family(AutoencoderTokenizer, AutoencoderConfig)


def wrap(
    autoencoder: Any,
    *,
    images: Tensor | None = None,
    vocab_size: int = 1024,
    arguments: Mapping[str, Any] | None = None,
) -> AutoencoderTokenizer:
    """A tokenizer of an autoencoder, in evaluation mode.

    Args:
        autoencoder: a `diffusers.VQModel` or another module with its interface, whose `quantize.embedding`
            holds the codes; or a continuous one, `diffusers.AutoencoderKL` say.
        images: for a continuous one (B, 3, H, W) float in [-1, 1]: the codes are k-means of their latents.
        vocab_size: for a continuous one, how many codes.
        arguments: what its class is made with, JSON-able; by default its `config`, as diffusers keeps it.

    Raises:
        ValueError: continuous and no images, fewer latents than codes, or no arguments and no `config`.
    """
    given = getattr(autoencoder, "config", None) if arguments is None else arguments
    path = f"{type(autoencoder).__module__}:{type(autoencoder).__qualname__}"
    if not isinstance(given, Mapping):
        raise ValueError(f"{path} has no config of names and values: give arguments={{...}}")
    plain = {name: value for name, value in given.items() if not name.startswith("_")}
    device = next(autoencoder.parameters()).device
    with torch.no_grad():
        if hasattr(autoencoder, "quantize"):
            codebook, side = autoencoder.quantize.embedding.weight.detach(), 64
            sized = _latents(autoencoder, torch.zeros(1, 3, side, side, device=device))
        else:
            if images is None:
                raise ValueError(f"{path} is continuous: give images=..., from which the codes are made")
            sized, side = _latents(autoencoder, images.to(device)), images.shape[-1]
            codebook = k_means(sized.movedim(1, -1).flatten(0, -2), vocab_size)
    v, c = codebook.shape
    config = AutoencoderConfig(path, json.dumps(plain), v, c, factor=side // sized.shape[-1])
    made = AutoencoderTokenizer(config).to(device)
    made.autoencoder.load_state_dict(autoencoder.state_dict())
    made.codebook.copy_(codebook)
    return made.eval()


def k_means(vectors: Tensor, k: int, rounds: int = 20, seed: int = 0) -> Tensor:
    """Centres (k, C) of vectors (n, C), by Lloyd's algorithm from k of them at random; O(n k C) a round.

    A centre that is nearest to nothing stays where it is. A ValueError refuses fewer than k vectors.
    """
    n = len(vectors)
    contracts.require(n >= k, f"{k} codes need as many latents, got {n}: give more images")
    first = torch.randperm(n, generator=torch.Generator().manual_seed(seed))[:k]
    centres = vectors[first.to(vectors.device)]
    for _ in range(rounds):
        nearest = _nearest(vectors, centres)
        count = nearest.bincount(minlength=k)[:, None]
        total = torch.zeros_like(centres).index_add_(0, nearest, vectors)
        centres = torch.where(count > 0, total / count.clamp_min(1), centres)
    return centres


def _nearest(vectors: Tensor, codes: Tensor) -> Tensor:
    return torch.cat([torch.cdist(some, codes).argmin(1) for some in vectors.split(ROWS)])


def _latents(autoencoder: Any, images: Tensor) -> Tensor:
    found = autoencoder.encode(images)
    if hasattr(found, "latent_dist"):
        return found.latent_dist.mode()
    return getattr(found, "latents", found)
