"""Figures made of images: sample grids, maps of the generation order, animations of a generation.

Images are uint8 (n, H, W, 3), orders (n, N) int as in `contracts`. The same input gives the same pixels.
matplotlib is imported where it is used, and never through pyplot, which keeps state and needs a display.
"""

from __future__ import annotations

import contextlib
import io
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont, ImageOps

from anyorder.contracts import Grid, require
from anyorder.data.classes import display_name
from anyorder.files import atomic

if TYPE_CHECKING:
    from matplotlib.figure import Figure

UNREVEALED = 128
"""Grey value of positions that have no token yet."""
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
"""Okabe-Ito: distinguishable under all common colour-vision deficiencies."""
MAP = "viridis_r"
"""Light is first, dark is last; perceptually uniform, so that equal steps look equal."""
_STYLE: dict[Any, Any] = {
    "font.size": 9, "axes.titlesize": 9, "axes.spines.top": False, "axes.spines.right": False,
    "axes.edgecolor": "#888888", "axes.grid": True, "grid.color": "#e4e4e4", "grid.linewidth": 0.6,
    "xtick.color": "#444444", "ytick.color": "#444444", "legend.frameon": False,
}  # fmt: skip


def save_image(image: Image.Image, path: str | Path) -> None:
    """Write an image atomically, in the format that the file's ending names.

    Raises:
        ValueError: Pillow writes no such format.
    """
    with atomic(path) as temporary:
        image.save(temporary, format=_format(path))


def _format(path: str | Path) -> str:
    suffix = Path(path).suffix.lower()
    if (known := Image.registered_extensions()).get(suffix) not in Image.SAVE:
        raise ValueError(f"cannot write '{suffix}' images ({path}): choose .png, .webp or .gif")
    return known[suffix]


def image_grid(images: np.ndarray, columns: int = 8, scale: int = 1, gap: int = 2) -> Image.Image:
    """Images (n, H, W, 3) uint8 in rows on white, `columns` per row, enlarged without smoothing.

    Raises:
        ValueError: the images are not uint8 (n, H, W, 3), or there are none.
    """
    _require_images(images)
    columns = min(columns, len(images))
    rows = math.ceil(len(images) / columns)
    images = images.repeat(scale, axis=1).repeat(scale, axis=2)
    padding = (0, rows * columns - len(images)), (0, gap), (0, gap), (0, 0)
    tiles = np.pad(images, padding, constant_values=255).reshape(rows, columns, -1, images.shape[2] + gap, 3)
    canvas = np.concatenate(np.concatenate(tiles, axis=1), axis=1)
    return Image.fromarray(canvas[: canvas.shape[0] - gap, : canvas.shape[1] - gap])


def prompt_grid(rows: Sequence[np.ndarray], prompts: Sequence[str], scale: int = 3) -> Image.Image:
    """A row of images below each prompt; for each prompt (n, H, W, 3) uint8, enlarged `scale` times."""
    font, strips, names = ImageFont.load_default(12), [], [*map(display_name, prompts)]
    grids = [image_grid(images, columns=len(images), scale=scale) for images in rows]
    width = max(*(grid.width for grid in grids), *(math.ceil(font.getlength(name)) + 8 for name in names))
    for grid, name in zip(grids, names, strict=True):
        strips.append(ImageOps.expand(grid, (0, 18, width - grid.width, 0), "white"))
        ImageDraw.Draw(strips[-1]).text((2, 2), name, "black", font)
    return Image.fromarray(np.concatenate([np.asarray(strip) for strip in strips]))


def _require_images(images: np.ndarray) -> None:
    if images.ndim != 4 or images.shape[-1] != 3 or images.dtype != np.uint8 or len(images) == 0:
        found = f"{images.dtype} of shape {images.shape}"
        raise ValueError(f"figures take one or more uint8 images (n, H, W, 3), got {found}")


def ranks(orders: np.ndarray, grid: Grid) -> np.ndarray:
    """Orders (n, N) to the step at which each position is revealed, (n, h, w).

    Raises:
        ValueError: a row is not a permutation of the grid's positions.
    """
    orders = np.asarray(orders)
    valid = orders.shape[1:] == (grid.n,) and (np.sort(orders, axis=1) == np.arange(grid.n)).all()
    text = f"orders must be permutations of the {grid.n} positions of a {grid.h}x{grid.w} grid, got shape"
    require(bool(valid), f"{text} {orders.shape}")
    return orders.argsort(axis=1).reshape(-1, grid.h, grid.w)


def order_map(rank: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Steps (h, w) from 0 to N - 1 as a heat map (H, W, 3) uint8 of `size`; light first, dark last."""
    from matplotlib import colormaps

    h, w = rank.shape
    rows, columns = np.arange(size[0]) * h // size[0], np.arange(size[1]) * w // size[1]
    heat = colormaps[MAP](rank / max(1, rank.size - 1))[rows][:, columns, :3] * 255
    return heat.round().astype(np.uint8)


def order_panel(
    images: np.ndarray, orders: np.ndarray, grid: Grid, columns: int = 4, scale: int = 2
) -> Image.Image:
    """Each image beside the map of its order, with a key; `columns` pairs per row, at most."""
    _require_images(images)
    maps = [order_map(rank, images.shape[1:3]) for rank in ranks(orders, grid)]
    if len(maps) != len(images):
        raise ValueError(f"got {len(images)} images and {len(maps)} orders: give one order for each image")
    pairs = np.concatenate([images, np.stack(maps)], axis=2)
    return _with_key(image_grid(pairs, columns, scale, gap=6), grid.n)


def _with_key(panel: Image.Image, steps: int, height: int = 26) -> Image.Image:
    """Add a strip below: the colour of the first and of the last step."""
    font, first, last = ImageFont.load_default(12), "first", f"last of {steps}"
    left, right = font.getlength(first) + 8, font.getlength(last) + 8
    bar = min(160, max(40, int(panel.width - left - right)))
    width = max(panel.width, math.ceil(left + bar + right))
    canvas = ImageOps.expand(panel, (0, 0, width - panel.width, height), "white")
    gradient = order_map(np.arange(bar)[None], (10, bar))
    canvas.paste(Image.fromarray(gradient), (int(left), panel.height + 10))
    for x, text in ((2, first), (left + bar + 6, last)):
        ImageDraw.Draw(canvas).text((x, panel.height + 15), text, "#333333", font, anchor="lm")
    return canvas


CLASS_MAPS = 29
"""Maps of classes in a figure, those with the most images: a figure of a thousand takes minutes."""


def mean_rank_per_class(
    orders: np.ndarray, labels: np.ndarray, classes: Sequence[str], grid: Grid, columns: int = 6
) -> Image.Image:
    """Mean step of each position: a map for all, and for each of the largest classes in `labels` (n,)."""
    rank, labels = ranks(orders, grid), np.asarray(labels)
    maps = [(f"all ({len(rank)})", rank.mean(0))]
    found, images = np.unique(labels, return_counts=True)
    for label in np.sort(found[np.argsort(-images, kind="stable")[:CLASS_MAPS]]):
        members = rank[labels == label]
        name = display_name(classes[label])
        name = name if len(name) <= 16 else f"{name[:15]}…"
        maps.append((f"{name} ({len(members)})", members.mean(0)))
    columns = min(columns, len(maps))
    rows = math.ceil(len(maps) / columns)
    with styled_figure(1.45 * columns + 0.8, 1.45 * rows * grid.h / grid.w + 0.35 * rows) as figure:
        axes = figure.subplots(rows, columns, squeeze=False)
        scale = {"vmin": min(mean.min() for _, mean in maps), "vmax": max(mean.max() for _, mean in maps)}
        for axis in axes.flat:
            axis.set_axis_off()
        for axis, (name, mean) in zip(axes.flat, maps, strict=False):
            shown = axis.imshow(mean, cmap=MAP, **scale)
            axis.set_title(display_name(name, mathtext=True), fontsize=8)
        bar = figure.colorbar(shown, ax=axes, shrink=min(1.0, 2 / rows), pad=0.02)
        bar.set_label(f"mean step (0 to {grid.n - 1})")
        bar.outline.set_visible(False)
        return rendered(figure)


def generation_frames(
    images: np.ndarray, orders: np.ndarray, grid: Grid, frames: int = 24, known: int | np.ndarray = 0
) -> np.ndarray:
    """Images as they are revealed in their orders, from the first `known` positions, one or (n,), to all.

    Returns:
        (T, n, H, W, 3) uint8, 2 <= T <= frames, evenly spaced over the steps; grey where not yet revealed.
    """
    require(frames >= 2, f"an animation needs at least 2 frames, got {frames}")
    _require_images(images)
    sides = zip(images.shape[1:3], (grid.h, grid.w), strict=True)
    rows, columns = (np.arange(size) * k // size for size, k in sides)
    rank, given = ranks(orders, grid)[:, rows][:, :, columns, None], np.reshape(known, (-1, 1, 1, 1))
    moments = np.unique(np.linspace(given.min(), grid.n, frames).round().astype(int))
    shown = [rank < np.maximum(moment, given) for moment in moments]
    return np.stack([np.where(seen, images, np.uint8(UNREVEALED)) for seen in shown])


def save_sample_figures(
    folder: Path, images: np.ndarray, orders: np.ndarray, grid: Grid, columns: int = 4, scale: int = 3
) -> None:
    """Write grid.png, orders.png (order maps of the first half) and generation.webp to a folder."""
    save_image(image_grid(images, columns, scale), folder / "grid.png")
    half = slice(max(1, len(images) // 2))
    panel = order_panel(images[half], orders[half], grid, columns=max(1, columns // 2), scale=scale)
    save_image(panel, folder / "orders.png")
    frames = generation_frames(images, orders, grid)
    save_animation(folder / "generation.webp", frames, columns=columns, scale=scale)


def save_animation(
    path: Path, frames: np.ndarray, columns: int = 8, scale: int = 2, seconds: float = 4, hold: float = 2
) -> None:
    """Write frames (T, n, H, W, 3) uint8 as an endless animation of grids: `.gif`, or lossless `.webp`.

    The last frame stays for `hold` seconds, the others take `seconds` together.

    Raises:
        ValueError: the file's ending names no animated format, or there are fewer than 2 frames.
    """
    require(_format(path) in ("GIF", "WEBP"), f"animations are .gif or .webp files, got {path}")
    require(len(frames) >= 2, f"an animation needs at least 2 frames, got {len(frames)}")
    first, *rest = [image_grid(images, columns, scale) for images in frames]
    durations = [round(1000 * seconds / len(rest))] * len(rest) + [round(1000 * hold)]
    options: dict[str, Any] = {"append_images": rest, "duration": durations, "loop": 0, "lossless": True}
    with atomic(path) as temporary:
        first.save(temporary, format=_format(path), save_all=True, **options)


@contextlib.contextmanager
def styled_figure(width: float, height: float, dpi: int = 160) -> Iterator[Figure]:
    """A matplotlib figure in the house style, without pyplot; sizes in inches."""
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context(_STYLE):
        yield Figure(figsize=(width, height), dpi=dpi, layout="constrained")


def rendered(figure: Figure) -> Image.Image:
    """The figure as an RGB image."""
    figure.savefig(buffer := io.BytesIO(), format="png")
    return Image.open(buffer).convert("RGB")
