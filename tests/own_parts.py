"""Parts as users bring them, by import path; see test_own_parts.py."""

import types
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn
from torch.utils.data import Dataset

from anyorder.contracts import AnyOrderNetwork, Grid, TokenizerNetwork
from anyorder.method.policies import FixedOrder, open_positions


def backwards(grid):
    return torch.arange(grid.n).flip(0)


def gini(log_p):
    return log_p.exp().square().sum(-1).log()


def surprise(log_p, tokens):
    return -log_p.gather(-1, tokens[..., None]).squeeze(-1)


def neither(image):
    return image


@dataclass(frozen=True)
class Nearest:
    """The open position that is nearest to the last one, by confidence where there are several."""

    grid: Grid
    temperature: float = 0.0

    name: ClassVar = "nearest"
    token_blind: ClassVar = True
    rated: ClassVar = True
    located: ClassVar = False
    deterministic: ClassVar = True
    look_ahead: ClassVar = 0

    def subset(self, rows):
        return self

    def propose(self, progress):
        return open_positions(progress)

    def rate(self, log_p, tokens):
        return gini(log_p)

    def select(self, progress, candidates, ratings):
        at = self.grid.coordinates()
        far = (at[candidates] - at[progress.last.clamp(0)][:, None]).norm(dim=-1)
        return (ratings - 1000 * far - self.temperature).argmax(1, keepdim=True)


class Silent(FixedOrder):
    def __init__(self, grid):
        super().__init__(backwards(grid), grid)


@dataclass
class CountsConfig:
    """Of `Counts`."""

    vocab_size: int
    grid: tuple[int, int]
    num_classes: int = 0
    smoothing: float = 1.0


class Counts(AnyOrderNetwork):
    """Knows only how often each token was seen so far in this image, and a learnt prior."""

    def __init__(self, config: CountsConfig):
        super().__init__()
        self.config, self.num_classes = config, config.num_classes
        self.vocab_size, self.grid = config.vocab_size, Grid(*config.grid)
        self.prior = nn.Parameter(torch.zeros(config.vocab_size))

    def _logits(self, counts):
        return (counts + self.config.smoothing).log() + self.prior

    def forward(self, tokens, condition, order, grid=None):
        seen = F.one_hot(tokens.gather(1, order), self.vocab_size)
        return self._logits((seen.cumsum(1) - seen).float())

    def start(self, batch_size, condition=None, grid=None):
        return self.prior.new_zeros(batch_size, self.vocab_size)

    def score(self, state, positions):
        return self._logits(state)[:, None].expand(-1, positions.shape[1], -1)

    def append(self, state, positions, tokens):
        return state + F.one_hot(tokens, self.vocab_size).sum(1)


class Untyped(nn.Module):
    def __init__(self, config):
        super().__init__()


@dataclass
class GreyConfig:
    """Of `Grey`."""

    vocab_size: int = 4
    factor: int = 4


class Grey(TokenizerNetwork):
    """Mean brightness of each patch, in `vocab_size` levels."""

    def __init__(self, config: GreyConfig):
        super().__init__()
        self.config, self.vocab_size, self.factor = config, config.vocab_size, config.factor

    def encode(self, images):
        mean = F.avg_pool2d(images.mean(1, keepdim=True), self.factor).flatten(1)
        return ((mean + 1) / 2 * self.vocab_size).long().clamp(0, self.vocab_size - 1)

    def decode(self, tokens, grid):
        level = (tokens.view(-1, 1, grid.h, grid.w) + 0.5) / self.vocab_size * 2 - 1
        return F.interpolate(level.expand(-1, 3, -1, -1), scale_factor=self.factor)


def grey():
    return Grey(GreyConfig())


class Moments:
    """Mean and deviation of each colour, as a feature extractor."""

    name, metric, dim, num_classes = "moments", "FD (moments)", 6, 2

    def __call__(self, images):
        pixels = images.float().flatten(2)
        features = torch.cat((pixels.mean(2), pixels.std(2)), dim=1)
        return features, features[:, :2]


class Squares(Dataset):
    """Bright and dark squares with their names, half of them as tensors."""

    classes = ("dark", "bright")

    def __len__(self):
        return 40

    def __getitem__(self, i):
        value = (i % 2 + 1) / 3 + i / 1000
        image = torch.full((3, 16, 16), value)
        if i % 4 < 2:
            image = Image.fromarray(np.full((16, 16, 3), round(255 * value), np.uint8))
        return image, i % 2, f"{self.classes[i % 2]} square"


def split_squares():
    whole = [(image, str(label)) for image, label, _ in map(Squares().__getitem__, range(40))]
    return {"train": whole[:32], "test": whole[32:]}


# --- the interface of diffusers' VQModel and AutoencoderKL


class Codes(nn.Module):
    def __init__(self, n, dim):
        super().__init__()
        self.embedding = nn.Embedding(n, dim)

    def get_codebook_entry(self, indices, shape):
        return self.embedding(indices).view(shape).permute(0, 3, 1, 2)


class VQModel(nn.Module):
    """Stands in for diffusers.VQModel: the same members, the same `decode`."""

    def __init__(self, num_vq_embeddings=8, latent_channels=4, lookup_from_codebook=False):
        super().__init__()
        self.config = {"num_vq_embeddings": num_vq_embeddings, "latent_channels": latent_channels}
        self.config |= {"lookup_from_codebook": lookup_from_codebook, "_class_name": "VQModel"}
        self.encoder = nn.Conv2d(3, latent_channels, 4, 4)
        self.quantize = Codes(num_vq_embeddings, latent_channels)
        self.decoder = nn.ConvTranspose2d(latent_channels, 3, 4, 4)

    def encode(self, x):
        return types.SimpleNamespace(latents=self.encoder(x))

    def decode(self, h, force_not_quantize=False, return_dict=True, shape=None):
        assert force_not_quantize
        if self.config["lookup_from_codebook"]:
            h = self.quantize.get_codebook_entry(h, shape)
        return types.SimpleNamespace(sample=self.decoder(h))


class Continuous(nn.Module):
    """Stands in for diffusers.AutoencoderKL: the latent of a patch is its mean colour."""

    def encode(self, x):
        mean = F.avg_pool2d(x, 4)
        return types.SimpleNamespace(latent_dist=types.SimpleNamespace(mode=lambda: mean))

    def __init__(self):
        super().__init__()
        self.shift = nn.Parameter(torch.zeros(3, 1, 1))

    def decode(self, z):
        return F.interpolate(z + self.shift, scale_factor=4)


class Recorder:
    """A logger that keeps everything."""

    made: ClassVar = []

    def __init__(self, folder, step):
        self.folder, self.seen, self.closed = folder, [(step,)], False
        self.made.append(self)

    def scalars(self, step, values):
        self.seen.append((step, sorted(values)))

    def images(self, step, images):
        self.seen.append((step, {name: image.size for name, image in images.items()}))

    def close(self):
        self.closed = True
