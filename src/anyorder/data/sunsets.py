"""Procedural sunsets: small images in which the order of generation matters.

After the example that motivates OAR (arXiv 2504.17069, Sec. 1): the sun's colour causes the clouds' colour,
so an image that begins with its sun can give its clouds the right colour. The causes of every image are
known, and `causes_of` reads them from pixels alone.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from anyorder.contracts import Grid, require
from anyorder.files import RowWriter

SUNS = ("yellow", "orange", "red", "magenta")
CAUSES = ("sun", "cloud", "sun_row", "sun_col", "sun_radius", "horizon", "clouds", "cloud_row", "cloud_col")
"""Columns of the causes: index into SUNS; cloud colour in [0, 8), of which 2k and 2k + 1 belong to sun k;
sun centre, sun radius and horizon in pixels; number of clouds; centre of the largest cloud in pixels."""

_SUN = np.array([(255, 232, 80), (255, 140, 25), (222, 28, 32), (236, 50, 172)], np.float32)
# Two skies per sun; the clouds are lit by both, so each sky has one cloud colour.
_ZENITH, _HORIZON, _CLOUD = np.array(
    [
        [(52, 104, 182), (246, 190, 150), (255, 246, 226)],  # yellow sun: blue sky, cream clouds
        [(38, 112, 140), (236, 196, 160), (255, 248, 165)],  # teal, lemon
        [(58, 70, 128), (238, 170, 120), (255, 174, 118)],  # orange sun: slate, peach
        [(84, 56, 116), (222, 130, 100), (238, 148, 52)],  # dusk, amber
        [(28, 34, 84), (224, 108, 84), (196, 34, 92)],  # red sun: navy, crimson
        [(46, 28, 52), (196, 84, 72), (236, 72, 62)],  # charcoal, scarlet
        [(40, 26, 104), (222, 138, 168), (232, 160, 238)],  # magenta sun: indigo, lavender
        [(24, 50, 104), (176, 116, 184), (166, 98, 216)],  # night blue, violet
    ],
    np.float32,
).swapaxes(0, 1)
_CLOUD_FLOOR = 0.36  # clouds lie above this share of the height, the sun below it
_MAX_CLOUDS, _PUFFS = 3, 5
_CLOSE = 60.0  # RGB distance at which a pixel no longer counts as sun or cloud
_LEAST_SHARE = 0.008  # of the pixels of the part of the image where it is looked for
_NUMBERS = 64  # uniform numbers per image
_BLOCK = 128  # images painted at a time
_STARTS = {"train": 0, "validation": 2**41, "test": 2**40}  # in the endless sequence of a seed


def sunsets(
    n: int, size: tuple[int, int] = (32, 32), seed: int = 0, first: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    """Paint images `first` to `first + n` of the endless sequence of `seed`; image i depends on these only.

    Returns:
        Images (n, height, width, 3) uint8 and their causes (n, len(CAUSES)) int64, columns as in `CAUSES`.

    Raises:
        ValueError: `size`, height and width in pixels, is below 16 x 16.
    """
    require(min(size) >= 16, f"a sunset needs at least 16 x 16 pixels, got {size}")
    # One counter step of Philox makes eight float32 numbers: the sequence can be entered at any image.
    generator = np.random.Generator(np.random.Philox(key=seed, counter=first * _NUMBERS // 8))
    numbers = generator.random((n, _NUMBERS), dtype=np.float32)
    scenes = [_Scene(numbers[i : i + _BLOCK], *size) for i in range(0, n, _BLOCK)]
    images = [np.zeros((0, *size, 3), np.uint8), *map(_paint, scenes)]
    causes = [np.zeros((0, len(CAUSES)), np.int64), *(scene.causes() for scene in scenes)]
    return np.concatenate(images), np.concatenate(causes)


class _Scene:
    """B scenes from uniform numbers (B, _NUMBERS) in [0, 1); lengths in pixels, arrays (B,) unless noted."""

    def __init__(self, u: np.ndarray, height: int, width: int):
        self.height, self.width, side = height, width, min(height, width)
        self.sun = (u[:, 0] * len(SUNS)).astype(np.int64)
        self.cloud = 2 * self.sun + (u[:, 1] < 0.5)
        self.radius = (0.11 + 0.04 * u[:, 2]) * side
        self.horizon = (0.64 + 0.12 * u[:, 3]) * height
        highest = _CLOUD_FLOOR * height + 0.03 * height + self.radius
        self.row = highest + (self.horizon - 0.1 * self.radius - highest) * u[:, 4]
        self.col = self.radius + (width - 2 * self.radius) * u[:, 5]
        self.clouds = 1 + (u[:, 6] < 0.7) + (u[:, 6] < 0.3)
        self.tint = 16 * (u[:, 7:10] - 0.5)  # (B, 3), small offset of the cloud colour
        self.phase = u[:, 10]
        self.puffs = _puffs(u[:, 16:], self.clouds, height, width)

    def causes(self) -> np.ndarray:
        """(B, len(CAUSES)) int64."""
        numbers = (self.sun, self.cloud, self.row, self.col, self.radius, self.horizon, self.clouds)
        return np.stack((*numbers, self.puffs[:, 0, 0], self.puffs[:, 0, 1]), axis=1).astype(np.int64)


def _puffs(u: np.ndarray, clouds: np.ndarray, height: int, width: int) -> np.ndarray:
    """Clouds as heaps of ellipses, the first the largest; absent ones have size 0.

    (B, _MAX_CLOUDS * _PUFFS, 4) centre row and column, half height and half width.
    """
    u = u[:, : _MAX_CLOUDS * (4 + 2 * (_PUFFS - 1))].reshape(len(u), _MAX_CLOUDS, -1)
    place, shape = u[:, :, :4], u[:, :, 4:].reshape(len(u), _MAX_CLOUDS, _PUFFS - 1, 2)
    scale = np.array([1.0, 0.7, 0.6])
    half_w = (0.17 + 0.10 * place[..., 0]) * width * scale
    half_h = (0.045 + 0.02 * place[..., 1]) * height * scale
    row = (0.13 + 0.15 * place[..., 2]) * height
    col = place[..., 3] * (width - 1.2 * half_w) + 0.6 * half_w
    base = np.stack((row, col, half_h, half_w), axis=-1)[:, :, None]
    offset = (np.arange(_PUFFS - 1) + 0.5 + 0.6 * (shape[..., 0] - 0.5)) / (_PUFFS - 1) * 1.5 - 0.75
    bulge = (0.8 + 0.6 * shape[..., 1]) * (1.15 - offset**2)
    row, col, half_h, half_w = (v[..., None] for v in (row, col, half_h, half_w))
    tall, wide = half_h * bulge, 0.36 * half_w * np.ones_like(bulge)
    heap = np.stack((row - 0.75 * half_h * bulge, col + offset * half_w, tall, wide), axis=-1)
    puffs = np.concatenate((base, heap), axis=2)
    puffs[..., 2:] *= (np.arange(_MAX_CLOUDS) < clouds[:, None])[..., None, None]
    return puffs.reshape(len(u), -1, 4).astype(np.float32)


def _paint(s: _Scene) -> np.ndarray:
    """(B, height, width, 3) uint8."""
    y = np.arange(s.height, dtype=np.float32)[None, :, None] + 0.5
    x = np.arange(s.width, dtype=np.float32)[None, None, :] + 0.5
    row, col, radius, horizon = (v[:, None, None] for v in (s.row, s.col, s.radius, s.horizon))
    sun, cloud = _SUN[s.sun][:, None, None], (_CLOUD[s.cloud] + s.tint)[:, None, None]
    zenith, glow = _ZENITH[s.cloud][:, None, None], _HORIZON[s.cloud][:, None, None]
    distance = np.hypot(y - row, x - col)
    body, rim = _cloud_cover(s, y, x)

    image = _mix(zenith, glow, (y / horizon).clip(0, 1) ** 1.6)
    image = _mix(image, sun, 0.35 * np.exp((1 - distance / radius).clip(max=0) / 0.8))  # halo
    image = _mix(image, sun, (radius + 0.5 - distance).clip(0, 1))
    image = _mix(image, cloud, body)
    image = _mix(image, _mix(cloud, sun, 0.35), rim)
    image = _mix(image, _sea(s, y, x, sun, zenith, glow), (y - horizon + 0.5).clip(0, 1))
    return image.round().clip(0, 255).astype(np.uint8)


def _sea(
    s: _Scene, y: np.ndarray, x: np.ndarray, sun: np.ndarray, zenith: np.ndarray, glow: np.ndarray
) -> np.ndarray:
    """The sea, which mirrors the sky darkly and the sun in a path that ripples break up."""
    col, radius, horizon, phase = (v[:, None, None] for v in (s.col, s.radius, s.horizon, s.phase))
    depth = ((y - horizon) / (s.height - horizon)).clip(0, 1)
    crests = 2 * np.pi * (5.5 * depth**0.7 + phase) + 1.5 * np.sin(5 * x / s.width + 9 * phase)
    ripple = np.sin(crests)
    water = _mix(0.62 * glow + 0.1 * zenith, 0.45 * zenith, depth**0.6) * (1 + 0.08 * ripple[..., None])
    half_width = radius * (0.75 + 0.5 * depth + 0.3 * ripple)
    path = (half_width + 0.5 - np.abs(x - col)).clip(0, 1) * (0.75 + 0.2 * ripple) * (1 - 0.55 * depth)
    return _mix(water, sun, path)


def _mix(a: np.ndarray, b: np.ndarray, share: np.ndarray | float) -> np.ndarray:
    """`a` where `share` (B, H, W) is 0, `b` where it is 1."""
    return a + (b - a) * np.asarray(share)[..., None]


def _cloud_cover(s: _Scene, y: np.ndarray, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """How much of each pixel is cloud, and how much is the rim of one that the sun lights from below."""
    body = np.zeros((len(s.sun), s.height, s.width), np.float32)
    for k in range(s.puffs.shape[1]):
        row, col, half_h, half_w = s.puffs[:, k].T[:, :, None, None]
        inside = 1 - np.hypot((y - row) / (half_h + 1e-6), (x - col) / (half_w + 1e-6))
        np.maximum(body, (inside * half_h + 0.5).clip(0, 1) * (half_h > 0), out=body)
    below = np.concatenate((body[:, 1:], np.zeros_like(body[:, :1])), axis=1)
    return body, body**2 * (1 - below)


@dataclass
class SunsetCauses:
    """Causes that were found in n images, (n,) int64, in the numbers of `CAUSES`; -1 where there is none."""

    sun: np.ndarray
    cloud: np.ndarray

    @property
    def consistent(self) -> np.ndarray:
        """(n,) bool: a sun and a cloud were found, and the cloud's colour is one that this sun gives."""
        return (self.sun >= 0) & (self.cloud >= 0) & (self.cloud // 2 == self.sun)


def causes_of(images: np.ndarray) -> SunsetCauses:
    """Read the colours of sun and clouds in images (n, height, width, 3) uint8; stands mild blur and noise.

    Clouds are in the upper part of the image, the sun is in the lower: every pair of neighbours close to one
    of the known colours votes for it, the most votes win, and too few votes mean that there is none.

    Raises:
        ValueError: another shape or dtype.
    """
    fits = images.ndim == 4 and images.shape[3] == 3 and images.dtype == np.uint8
    require(fits, f"images must be uint8 (n, height, width, 3), got {images.dtype} {images.shape}")
    floor = round(_CLOUD_FLOOR * images.shape[1])
    blocks = [images[i : i + _BLOCK] for i in range(0, len(images), _BLOCK)]
    sun = [_vote(block[:, floor:], _SUN) for block in blocks]
    cloud = [_vote(block[:, :floor], _CLOUD) for block in blocks]
    none = np.zeros(0, np.int64)
    return SunsetCauses(np.concatenate((none, *sun)), np.concatenate((none, *cloud)))


def _vote(images: np.ndarray, colors: np.ndarray) -> np.ndarray:
    """Index (n,) int64 of the color (K, 3) that most pixels of each image are close to, -1 if few are."""
    distance = np.linalg.norm(images[:, :, :, None].astype(np.float32) - colors, axis=4)
    close = (distance == distance.min(axis=3, keepdims=True)) & (distance < _CLOSE)
    pairs = close[:, :, 1:] & close[:, :, :-1]  # a lone pixel is noise
    share = pairs.mean(axis=(1, 2))
    return np.where(share.max(axis=1) > _LEAST_SHARE, share.argmax(axis=1), -1)


def sun_first(orders: np.ndarray, causes: np.ndarray, grid: Grid, size: tuple[int, int]) -> float:
    """Share in [0, 1] of sunsets whose sun is revealed before their largest cloud: half for random orders.

    Args:
        orders: (n, N) integers, order[i, k] = raster position revealed at step k.
        causes: (n, len(CAUSES)) int64, columns as in `CAUSES`.
        grid, size: of the positions, and (height, width) of the images in pixels.
    """
    column = {name: causes[:, i] for i, name in enumerate(CAUSES)}
    rank = np.argsort(orders, axis=1)

    def revealed(what: str) -> np.ndarray:
        row = column[f"{what}_row"].clip(0, size[0] - 1) * grid.h // size[0]
        col = column[f"{what}_col"].clip(0, size[1] - 1) * grid.w // size[1]
        return rank[np.arange(len(rank)), row * grid.w + col]

    return float((revealed("sun") < revealed("cloud")).mean())


def write_sunsets(
    folder: str | Path, size: tuple[int, int], n_train: int, n_test: int, seed: int = 0, n_validation: int = 0
) -> dict[str, Any]:
    """Write the arrays of a sunsets data artifact: those of `ingest`, and `{split}.causes.npy`.

    Called again after a kill, it continues with the first missing image. The images of a split do not depend
    on the sizes of the others; without validation images there is no such split.

    Returns:
        Facts for the manifest: `classes` (the sun's colours), `counts` by split, and `causes` (column names).

    Raises:
        ValueError: `size` or a number of images is too small.
    """
    require(n_train >= 1 and n_test >= 0, f"need n_train >= 1 and n_test >= 0, got {n_train} and {n_test}")
    require(n_validation >= 0, f"max_validation must be at least 0, got {n_validation}")
    labels, table = ((), np.int64), ((len(CAUSES),), np.int64)
    specs = {"images": ((*size, 3), np.uint8), "labels": labels, "causes": table}
    counts = {"train": n_train, **({"validation": n_validation} if n_validation else {}), "test": n_test}
    for split in counts:
        writer = RowWriter(folder, {f"{split}.{name}": spec for name, spec in specs.items()})
        with tqdm(total=counts[split], initial=writer.rows, desc=f"{split} sunsets", unit="image") as bar:
            while (n := min(_BLOCK, counts[split] - writer.rows)) > 0:
                images, causes = sunsets(n, size, seed, _STARTS[split] + writer.rows)
                arrays = {"images": images, "labels": causes[:, 0], "causes": causes}
                writer.append(**{f"{split}.{name}": array for name, array in arrays.items()})
                bar.update(n)
        writer.close()
    return {"classes": list(SUNS), "counts": counts, "causes": list(CAUSES)}
