"""What to draw and what to keep: pictures and masks as users have them, as arrays.

A mask is True (white) where pixels are to be *drawn*, False (black) where they are kept.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image

WHITE = 128
"""Grey values from here on are to be drawn."""
SHAPES = ("centre", "lower")
"""Names that `shaped_mask` knows."""
Box = tuple[int, int, int, int]
"""Pixels (left, top, right, bottom), right and bottom excluded, as in Pillow."""
Padding = tuple[int, int, int, int]
"""Pixels to add on the (left, top, right, bottom)."""


def read_pictures(pictures: Any) -> np.ndarray:
    """One or several pictures of one size, (B, H, W, 3) uint8.

    Args:
        pictures: a Pillow image of any mode, a uint8 array (H, W, 3) or (B, H, W, 3), or a list of these.

    Raises:
        ValueError: none, not uint8 RGB, or of different sizes.
    """
    found = [_picture(one) for one in _several(pictures, single_ndim=3)]
    if not found:
        raise ValueError("got no image: give at least one")
    if len(sizes := {one.shape[:2] for one in found}) > 1:
        listed = ", ".join(f"{h} x {w}" for h, w in sorted(sizes))
        raise ValueError(f"images of one call must have one size, got {listed}: call once for each size")
    return np.stack(found)


def _several(pictures: Any, single_ndim: int) -> list[Any]:
    if isinstance(pictures, Image.Image) or (
        not isinstance(pictures, list | tuple) and np.asarray(pictures).ndim == single_ndim
    ):
        return [pictures]
    return list(pictures)


def _picture(picture: Any) -> np.ndarray:
    if isinstance(picture, Image.Image):
        return np.asarray(picture.convert("RGB"))
    array = np.asarray(picture)
    if array.dtype != np.uint8 or array.ndim != 3 or array.shape[2] != 3:
        raise ValueError(
            f"images are Pillow images or uint8 arrays (H, W, 3), got {array.dtype} of shape {array.shape}"
        )
    return array


def read_masks(masks: Any, n: int, size: tuple[int, int]) -> np.ndarray:
    """One mask for all pictures or one each, (n, H, W) bool, True where pixels are to be drawn.

    Args:
        masks: a Pillow image (white is drawn), a bool or uint8 array (H, W) or (n, H, W), or a list of these.
        n: number of pictures.
        size: (height, width) of the pictures in pixels.

    Raises:
        ValueError: another size or number, another dtype, or a mask that leaves nothing to draw.
    """
    found = [_mask(one) for one in _several(masks, single_ndim=2)]
    for mask in found:
        if mask.shape != size:
            raise ValueError(
                f"the mask has {mask.shape} pixels (height, width), the image {size}: "
                "resize the mask to the image (Image.Resampling.NEAREST)"
            )
        if not mask.any():
            raise ValueError(
                "the mask is black everywhere, so there is nothing to draw: white (True) marks the pixels to "
                "draw, black (False) those to keep; is it inverted?"
            )
    if len(found) not in (1, n):
        raise ValueError(f"got {len(found)} masks for {n} images: give one mask, or one per image")
    return np.stack(found * (n if len(found) == 1 else 1))


def _mask(mask: Any) -> np.ndarray:
    if isinstance(mask, Image.Image):
        return np.asarray(mask.convert("L")) >= WHITE
    array = np.asarray(mask)
    if array.dtype == np.uint8:
        array = array >= WHITE
    if array.dtype != np.bool_ or array.ndim != 2:
        raise ValueError(
            f"masks are Pillow images, or bool or uint8 arrays (H, W), "
            f"got {array.dtype} of shape {array.shape}"
        )
    return array


def box_mask(box: Sequence[int], size: tuple[int, int]) -> np.ndarray:
    """A mask (H, W) bool that draws a rectangle.

    Args:
        box: see `Box`.
        size: (height, width) of the picture in pixels.

    Raises:
        ValueError: the box is empty or leaves the picture.
    """
    h, w = size
    if len(box) != 4:
        raise ValueError(f"box must be left,top,right,bottom, got {','.join(map(str, box))}")
    left, top, right, bottom = box
    if not (0 <= left < right <= w and 0 <= top < bottom <= h):
        raise ValueError(
            f"box must be left,top,right,bottom with 0 <= left < right <= {w} and 0 <= top < bottom <= {h}, "
            f"got {left},{top},{right},{bottom}"
        )
    mask = np.zeros(size, dtype=np.bool_)
    mask[top:bottom, left:right] = True
    return mask


def shaped_mask(name: str, size: tuple[int, int]) -> np.ndarray:
    """A mask (H, W) bool by name: the centre (half of either side), or the lower third.

    Raises:
        ValueError: unknown name.
    """
    h, w = size
    boxes = {"centre": (w // 4, h // 4, w - w // 4, h - h // 4), "lower": (0, h - h // 3, w, h)}
    if name not in boxes:
        raise ValueError(f"unknown mask '{name}': choose one of {', '.join(SHAPES)}")
    return box_mask(boxes[name], size)


def pad(images: np.ndarray, mask: np.ndarray, padding: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
    """Put pictures on a larger canvas, for outpainting.

    Args:
        images: (B, H, W, 3) uint8.
        mask: (B, H, W) bool, what is to be drawn of the pictures themselves.
        padding: see `Padding`.

    Returns:
        The canvas (B, top + H + bottom, left + W + right, 3) uint8, black around the pictures, and the mask
        of the same size, True around them.

    Raises:
        ValueError: a negative number of pixels, or none at all.
    """
    if len(padding) != 4 or min(padding) < 0 or max(padding) == 0:
        raise ValueError(
            "pad must be pixels >= 0 to add on the left,top,right,bottom, one of them > 0, "
            f"got {','.join(map(str, padding))}"
        )
    left, top, right, bottom = padding
    around = ((0, 0), (top, bottom), (left, right))
    return np.pad(images, (*around, (0, 0))), np.pad(mask, around, constant_values=True)
