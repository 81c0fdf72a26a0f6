"""What to generate and what to keep: images and masks as users have them, as arrays.

A mask is True (white) where pixels are to be *generated*, False (black) where they are kept.
"""

import os
from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor

from anyorder.contracts import require
from anyorder.data import images as reading

Box = tuple[int, int, int, int]
"""Pixels (left, top, right, bottom), right and bottom excluded, as in Pillow."""
Padding = tuple[int, int, int, int]
"""Pixels to add on the (left, top, right, bottom)."""


def read_images(images: Any) -> np.ndarray:
    """One or several images of one size, (B, H, W, 3) uint8.

    Takes a path, a Pillow image of any mode, a uint8 array (H, W, 3), or several as a list or array. A
    ValueError refuses what cannot be read, and different sizes.
    """
    found = [reading.load_image(one) for one in _several(images, "images", (3,), np.uint8)]
    require(bool(found), "got no image: give at least one")
    sizes = sorted({one.shape[:2] for one in found})
    listed = ", ".join(f"{h} x {w}" for h, w in sizes)
    require(len(sizes) == 1, f"images of one call must have one size, got {listed}: call once for each size")
    return np.stack(found)


def _several(given: Any, what: str, channels: tuple[int, ...], *dtypes: type) -> list[Any]:
    """One or several files, Pillow images or arrays, as a list; arrays only where their meaning is clear."""
    files = str | bytes | os.PathLike | Image.Image
    given = given.cpu().numpy() if isinstance(given, Tensor) else given
    alone = isinstance(given, files) or (isinstance(given, np.ndarray) and given.ndim == 2 + len(channels))
    found = [one if isinstance(one, files) else np.asarray(one) for one in ([given] if alone else given)]
    kinds = " or ".join(np.dtype(dtype).name for dtype in dtypes)
    text = f"{what} are paths, Pillow images or {kinds} arrays ({', '.join(['H', 'W', *map(str, channels)])})"
    for one in found:
        if isinstance(one, np.ndarray):
            fits = one.dtype in dtypes and one.ndim == 2 + len(channels) and one.shape[2:] == channels
            require(fits, f"{text}, got {one.dtype} {one.shape}")
    return found


def _read_masks(masks: Any, n: int, size: tuple[int, int]) -> np.ndarray:
    """One mask for all images or one each, (n, H, W) bool, of `size` (height, width)."""
    found = [reading.load_mask(one) for one in _several(masks, "masks", (), np.bool_, np.uint8)]
    for mask in found:
        text = f"the mask has {mask.shape} pixels (height, width), the image {size}: resize the mask to the"
        require(mask.shape == size, f"{text} image (Image.Resampling.NEAREST)")
        text = "the mask is black everywhere, so there is nothing to generate: white (True) marks the pixels"
        require(bool(mask.any()), f"{text} to generate, black (False) those to keep; is it inverted?")
    text = f"got {len(found)} masks for {n} images: give one mask, or one per image"
    require(len(found) in (1, n), text)
    return np.stack(found * (n if len(found) == 1 else 1))


def box_mask(box: Sequence[int], size: tuple[int, int]) -> np.ndarray:
    """A mask (H, W) bool of `size` (height, width) with a rectangle to generate, see `Box`."""
    h, w = size
    left, top, right, bottom = box if len(box) == 4 else (0, 0, 0, 0)
    text = f"box must be left,top,right,bottom, got {','.join(map(str, box))}: "
    text += f"0 <= left < right <= {w} and 0 <= top < bottom <= {h} must hold"
    require(0 <= left < right <= w and 0 <= top < bottom <= h, text)
    mask = np.zeros(size, dtype=np.bool_)
    mask[top:bottom, left:right] = True
    return mask


def shaped_mask(name: str, size: tuple[int, int]) -> np.ndarray:
    """A mask (H, W) bool by name: "centre" (half of either side), or "lower" (third)."""
    h, w = size
    boxes = {"centre": (w // 4, h // 4, w - w // 4, h - h // 4), "lower": (0, h - h // 3, w, h)}
    require(name in boxes, f"unknown mask '{name}': choose one of {', '.join(boxes)}")
    return box_mask(boxes[name], size)


def canvas(images: np.ndarray, mask: Any, padding: Sequence[int] | None) -> tuple[np.ndarray, np.ndarray]:
    """Images (B, H, W, 3) uint8 with `padding` (see `Padding`), and what to generate of them, (B, H, W) bool.

    The mask is a path or Pillow image (white is generated, black and transparent are kept), a bool or uint8
    array (H, W), or several as a list or array; None: only the padding is generated, which is black.

    Raises:
        ValueError: nothing to generate, or a mask or padding that does not fit.
    """
    require(mask is not None or padding is not None, "say what to generate: mask=..., pad=... or keep=...")
    n, h, w, _ = images.shape
    hole = np.zeros((n, h, w), np.bool_) if mask is None else _read_masks(mask, n, (h, w))
    if padding is None:
        return images, hole
    text = "pad must be pixels >= 0 to add on the left,top,right,bottom, one of them > 0, got"
    valid = len(padding) == 4 and min(padding) >= 0 and max(padding) > 0
    require(valid, f"{text} {','.join(map(str, padding))}")
    left, top, right, bottom = padding
    around = ((0, 0), (top, bottom), (left, right))
    width, height, most = left + w + right, top + h + bottom, reading.MAX_PIXELS
    text = f"pad makes an image of {width} x {height} pixels, allowed are {most:,} in all"
    require(width * height <= most, f"{text}: choose a smaller pad")
    return np.pad(images, (*around, (0, 0))), np.pad(hole, around, constant_values=True)
