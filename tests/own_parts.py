"""Parts as users bring them, by import path; see test_own_parts.py."""

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import nn

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
