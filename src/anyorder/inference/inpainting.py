"""In- and outpainting of pixels with any tokenizer and any any-order model (OAR v2, arXiv 2504.17069).

Attention and GroupNorm make a token's receptive field the whole image. Masked pixels are therefore replaced
by the nearest known ones before anything is encoded: neither kept nor generated tokens can depend on them.
Tokens whose own patch is known throughout are kept. They have seen the replacement, not the truth.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from anyorder.contracts import Grid, Tokenizer, require
from anyorder.data.images import from_float
from anyorder.method.sampling import Streams
from anyorder.tokenizers.vq_network import grid_of


@dataclass(frozen=True)
class Filling:
    """How holes are filled."""

    margin: int = 0
    """Patches (0 or more) around the hole whose tokens are generated, too; their known pixels are kept."""
    feather: int = 2
    """Pixels inside the hole over which the step at its seam fades out; 0 leaves generated pixels alone."""

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            require(value >= 0, f"{name} must be >= 0, got {value}")


@dataclass(frozen=True)
class Unfinished:
    """What is known of images that are to be completed."""

    tokens: Tensor  #: (B, N) int64, raster order; they mean nothing where they are not known.
    known: Tensor  #: (B, N) bool, tokens that are kept.
    grid: Grid
    images: Tensor | None = None  #: (B, 3, H, W) uint8; None: no pixel is kept, only tokens are.
    kept: Tensor | None = None  #: (B, 1, H, W) bool, pixels that stay as they are; None: none of them.
    feather: int = 0  #: see `Filling`.

    def finish(self, tokenizer: Tokenizer, tokens: Tensor) -> Tensor:
        """Images (B, 3, H, W) uint8 of tokens (B, N), with the pixels that are kept."""
        made = tokenizer.decode(tokens, self.grid)
        if self.images is None or self.kept is None:
            return from_float(made)
        if self.feather:
            made = made + fading_step(to_float(self.images) - made, self.kept, self.feather)
        return torch.where(self.kept, self.images, from_float(made))


def known_part(tokens: Tensor, known: Tensor) -> tuple[Tensor, Tensor]:
    """Positions and tokens (B, K) that are `known` (B, N) bool of (B, N); a ValueError if some know more."""
    counts = known.sum(1).unique().tolist()
    text = f"these images keep {' and '.join(map(str, counts))} tokens: give masks that keep equally many"
    require(len(counts) == 1, f"{text}, or use complete")
    at = known.nonzero()[:, 1].view(len(known), -1)
    return at, tokens.gather(1, at)


def with_hole(tokenizer: Tokenizer, images: Tensor, mask: Tensor, filling: Filling = Filling()) -> Unfinished:
    """Images of which a part is to be generated; nothing depends on the masked pixels at all.

    Takes images (B, 3, H, W) uint8, sides divisible by the tokenizer's `factor`, and a mask (B, H, W) bool,
    True where pixels are to be generated; all True is sampling. Known pixels stay as they are, bit by bit.
    """
    grid, kept, pixels = grid_of(images.shape, tokenizer.factor), ~mask[:, None], to_float(images)
    known = ~open_tokens(mask, tokenizer.factor, filling.margin)
    tokens = tokenizer.encode(torch.where(kept, pixels, extend(pixels, kept)[0]))
    return Unfinished(tokens, known, grid, images, kept, filling.feather)


def with_part(tokenizer: Tokenizer, images: Tensor, keep: float, streams: Streams) -> Unfinished:
    """Variations: a share `keep` of the tokens, in [0, 1), is known; the streams decide which.

    The others are generated, and no pixel is pasted. Images as of `with_hole`.
    """
    grid = grid_of(images.shape, tokenizer.factor)
    # By rank rather than by threshold: every image keeps equally many, and all run as one batch.
    known = streams.permutation(grid.n) < min(round(keep * grid.n), grid.n - 1)
    return Unfinished(tokenizer.encode(to_float(images)), known, grid)


def open_tokens(mask: Tensor, factor: int, margin: int = 0) -> Tensor:
    """Tokens to generate, (B, N) bool: patches with a masked pixel, and `margin` patches around them."""
    touched = torch.nn.functional.max_pool2d(mask[:, None].float(), factor)
    for _ in range(margin):
        touched = torch.nn.functional.max_pool2d(touched, 3, stride=1, padding=1)
    return touched.flatten(1) > 0


def to_float(images: Tensor) -> Tensor:
    """uint8 to float32 in [-1, 1]."""
    return images.float() / 127.5 - 1


# --- from the known pixels into the hole ------------------------------------------------------------------


def extend(values: Tensor, known: Tensor, rings: int | None = None) -> tuple[Tensor, Tensor]:
    """Carry known values outwards, ring by ring; a pixel takes the mean of its known neighbours.

    Takes values (B, C, H, W), known (B, 1, H, W) bool and how far to go. Returns the extended values, 0 where
    they do not reach, and the ring of each pixel (B, 1, H, W) int64: 0 if known, -1 if not reached.
    """
    values, reached = values * known, known.to(values.dtype)
    ring = torch.where(known, 0, -1)
    while bool((reached == 0).any()) and (rings is None or int(ring.max()) < rings):
        number = 9 * torch.nn.functional.avg_pool2d(reached, 3, stride=1, padding=1)
        fresh = (reached == 0) & (number > 0.5)
        if not bool(fresh.any()):  # nothing is known at all
            break
        total = 9 * torch.nn.functional.avg_pool2d(values, 3, stride=1, padding=1)
        values = torch.where(fresh, total / number.clamp_min(1), values)
        reached = reached + fresh
        ring = torch.where(fresh, ring.max() + 1, ring)
    return values, ring


def fading_step(step: Tensor, known: Tensor, width: int) -> Tensor:
    """What to add to generated pixels, (B, C, H, W): the step at the seam, fading out over `width` pixels.

    Takes the step (B, C, H, W), known minus generated pixels, and known (B, 1, H, W) bool; `width` >= 1.
    """
    carried, ring = extend(step, known, width)
    return torch.where(ring > 0, carried * (1 - ring / (width + 1)), 0)
