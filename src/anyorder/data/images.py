"""From any image file to a fixed-size array, and from a source of images to a data artifact."""

from __future__ import annotations

import contextlib
import io
import os
from collections import Counter
from collections.abc import Iterable, Iterator
from itertools import islice
from multiprocessing.pool import ThreadPool
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor
from tqdm import tqdm

from anyorder.data.rows import slices
from anyorder.data.sources import Item, Source
from anyorder.files import RowWriter, read_json, write_json

Size = tuple[int, int]
Color = tuple[int, int, int]

SPLITS = ("train", "test")
MAX_PIXELS = 64_000_000
_GAP = 3.0  # how much larger than needed a cheap first reduction may leave the image; 3 is visually lossless
_BLOCK = 256  # images in memory at a time
_LISTED = 1000  # skipped images named in the manifest
_ORIENTATION_TAG = 0x0112
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


class BadImage(ValueError):
    """An image that cannot be used; `kind` is one of few words to count by, the message says more."""

    def __init__(self, kind: str, detail: str):
        super().__init__(f"{kind}: {detail}")
        self.kind = kind


def load_image(
    image: bytes | str | Path,
    size: Size,
    fit: str = "crop",
    fill: Color = (255, 255, 255),
    max_pixels: int = MAX_PIXELS,
) -> np.ndarray:
    """Decode one image, upright, in RGB, at a fixed size.

    Of an animation the first frame is taken; 16- and 32-bit samples are scaled to 8 bits.

    Args:
        image: the file's bytes or its path.
        size: (height, width) in pixels.
        fit: "crop" covers the size and cuts the overhang evenly; "letterbox" shows all of the image and
            fills the rest.
        fill: RGB in [0, 255] behind transparent pixels and around a letterboxed image.
        max_pixels: larger images are refused before they are decoded (so are those beyond Pillow's own
            limit against decompression bombs, twice `PIL.Image.MAX_IMAGE_PIXELS`).

    Returns:
        (height, width, 3) uint8.

    Raises:
        BadImage: the image is unreadable, too large, damaged or no image at all.
        ValueError: `size` or `fit` is not allowed.
    """
    _check_format(size, fit)
    try:
        with _open(image) as opened:
            if opened.width * opened.height > max_pixels:
                detail = f"{opened.width} x {opened.height} pixels, allowed are {max_pixels} (max_pixels)"
                raise BadImage("too many pixels", detail)
            rgb = _decode(opened, size, fill)
        return np.asarray(_crop(rgb, size) if fit == "crop" else _letterbox(rgb, size, fill))
    except BadImage:
        raise
    except Image.DecompressionBombError as e:
        raise BadImage("too many pixels", str(e)) from e
    except UnidentifiedImageError as e:
        raise BadImage("not an image", "no decoder knows its first bytes") from e
    except Exception as e:  # foreign bytes make decoders raise anything: struct.error, SyntaxError, ...
        from_system = getattr(e, "errno", None) is not None
        kind = "unreadable file" if from_system else "damaged image"
        raise BadImage(kind, f"{type(e).__name__}: {e}") from e


def _check_format(size: Size, fit: str) -> None:
    if len(size) != 2 or min(size) < 1:
        raise ValueError(f"size must be a positive (height, width) in pixels, got {size}")
    if fit not in ("crop", "letterbox"):
        raise ValueError(f"fit must be 'crop' or 'letterbox', got {fit!r}")


def _open(image: bytes | str | Path) -> Image.Image:
    if isinstance(image, bytes):
        if not image:
            raise BadImage("empty file", "zero bytes")
        return Image.open(io.BytesIO(image))
    if not os.path.isfile(image):  # opening a pipe would wait for ever
        raise BadImage("unreadable file", f"{image} is no regular file, or a broken link")
    if not os.path.getsize(image):
        raise BadImage("empty file", "zero bytes")
    return Image.open(image)


def _decode(image: Image.Image, size: Size, fill: Color) -> Image.Image:
    """Upright RGB at full or, where the format has a cheap way to it, reduced size."""
    side = int(_GAP * max(size))
    image.draft(None, (side, side))
    image.load()
    orientation = None
    with contextlib.suppress(Exception):  # broken EXIF is no reason to lose a whole image
        orientation = image.getexif().get(_ORIENTATION_TAG)
    if image.mode == "F" or image.mode.startswith("I"):
        image = _eight_bits(image)
    if image.has_transparency_data:
        layer = image.convert("RGBA")
        image = Image.new("RGBA", layer.size, (*fill, 255))
        image.alpha_composite(layer)
    image = image.convert("RGB")
    return image.transpose(_UPRIGHT[orientation]) if orientation in _UPRIGHT else image


def _eight_bits(image: Image.Image) -> Image.Image:
    """Scale the smallest common range that holds all samples to [0, 255]; Pillow's `convert` would clip."""
    samples = np.nan_to_num(np.asarray(image, np.float32))
    ranges = (1.0, 255.0, 65535.0) if image.mode == "F" else (65535.0, 2.0**31)
    top = float(samples.max())
    white = next((r for r in ranges if top <= r), top)
    return Image.fromarray((samples.clip(0) * (255 / white)).round().astype(np.uint8))


def _crop(image: Image.Image, size: Size) -> Image.Image:
    h, w = size
    scale = min(image.width / w, image.height / h)
    left, top = (image.width - w * scale) / 2, (image.height - h * scale) / 2
    box = (left, top, min(left + w * scale, image.width), min(top + h * scale, image.height))
    return image.resize((w, h), Image.Resampling.LANCZOS, box, _GAP)


def _letterbox(image: Image.Image, size: Size, fill: Color) -> Image.Image:
    h, w = size
    scale = min(w / image.width, h / image.height)
    inner = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
    canvas = Image.new("RGB", (w, h), fill)
    resized = image.resize(inner, Image.Resampling.LANCZOS, reducing_gap=_GAP)
    canvas.paste(resized, ((w - inner[0]) // 2, (h - inner[1]) // 2))
    return canvas


def ingest(
    source: Source,
    folder: str | Path,
    size: Size,
    fit: str = "crop",
    fill: Color = (255, 255, 255),
    max_pixels: int = MAX_PIXELS,
    max_train: int | None = None,
    max_test: int | None = None,
) -> dict[str, Any]:
    """Decode a source into the arrays of a data artifact.

    Writes `{split}.images.npy` (n, H, W, 3) uint8 and `{split}.labels.npy` (n,) int64 (index into
    `classes`, 0 where there are none) for the splits train and test; where the source has them, also
    `{split}.attributes.npy` (n, A) int64 (index into the values, -1 for none or a value that the train
    split does not have) and `{split}.captions.json`, a list of n texts, empty where there is none.
    Called again after a kill, a finished split is not decoded a second time.

    Args:
        source: where the images come from.
        folder: the artifact's folder.
        size: (height, width) in pixels.
        fit: see `load_image`.
        fill: see `load_image`.
        max_pixels: see `load_image`.
        max_train: how many training images to take, spread evenly over the source; None for all.
        max_test: the same for the test split.

    Returns:
        Facts for the manifest: `classes` (names, sorted, from the whole train split), `attributes` (name to
        sorted values) if there are any, `counts` by split, and `skipped` by split: `reasons` (kind to count)
        and `first` (name and reason of up to 1000).

    Raises:
        ValueError: not one image of a split could be used, or `size`, `fit` or a limit is not allowed.
    """
    _check_format(size, fit)
    if min(max_train or 0, max_test or 0) < 0:
        raise ValueError(f"max_train and max_test must not be negative, got {max_train} and {max_test}")
    decoding = {"size": size, "fit": fit, "fill": fill, "max_pixels": max_pixels}
    classes = source.classes()
    attributes = source.attributes()
    facts: dict[str, Any] = {"classes": classes, "counts": {}, "skipped": {}}
    facts |= {"attributes": attributes} if attributes else {}
    for split, limit in zip(SPLITS, (max_train, max_test), strict=True):
        done = Path(folder) / f".{split}.partial"  # the suffix makes Artifact drop it with other old work
        settings = repr((source, decoding, limit))
        if not (done.is_file() and read_json(done)["settings"] == settings):
            count, skipped = _ingest_split(source, Path(folder), split, limit, classes, attributes, decoding)
            write_json(done, {"settings": settings, "count": count, "skipped": skipped})
        result = read_json(done)
        facts["counts"][split], facts["skipped"][split] = result["count"], result["skipped"]
    return facts


def _ingest_split(
    source: Source,
    folder: Path,
    split: str,
    limit: int | None,
    classes: list[str],
    attributes: dict[str, list[str]],
    decoding: dict[str, Any],
) -> tuple[int, dict[str, Any]]:
    for path in (*folder.glob(f"{split}.*.npy*"), *folder.glob(f"{split}.captions.json")):
        path.unlink()
    arrays: dict[str, Any] = {"images": ((*decoding["size"], 3), np.uint8), "labels": ((), np.int64)}
    arrays |= {"attributes": ((len(attributes),), np.int64)} if attributes else {}
    writer = RowWriter(folder, {f"{split}.{name}": kind for name, kind in arrays.items()})
    index = {name: i for i, name in enumerate(classes)}
    reasons: Counter[str] = Counter()
    first: list[dict[str, str]] = []
    captions: list[str] = []
    codes = [{value: i for i, value in enumerate(values)} for values in attributes.values()]

    def read(item: Item) -> dict[str, Any] | BadImage:
        try:
            found = {"images": load_image(item.image, **decoding), "labels": _label(item.label, index)}
        except BadImage as e:
            return e
        values = zip(codes, item.attributes, strict=True)
        return found | {"attributes": [code.get(value, -1) if value else -1 for code, value in values]}

    total = source.count(split)
    taken = min(total, total if limit is None else limit)
    items = _spread(source.items(split), total, taken)
    with ThreadPool(os.cpu_count()) as pool, tqdm(total=taken, desc=f"{split} images", unit="image") as bar:
        while block := list(islice(items, _BLOCK)):
            results = pool.map(read, block, chunksize=8)
            good = [r for r in results if not isinstance(r, BadImage)]
            for item, result in zip(block, results, strict=True):
                if isinstance(result, BadImage):
                    reasons[result.kind] += 1
                    first += [{"name": item.name, "reason": str(result)}] * (len(first) < _LISTED)
                else:
                    captions.append(item.caption or "")
            if good:
                writer.append(**{f"{split}.{name}": np.array([r[name] for r in good]) for name in arrays})
            bar.update(len(block))
    if not writer.rows and (first or split == "train"):
        listed = "; ".join(f"{skip['name']}: {skip['reason']}" for skip in first[:5])
        raise ValueError(f"none of {taken} {split} images could be used: {listed or 'there are none'}")
    writer.close()
    if source.captioned:
        write_json(folder / f"{split}.captions.json", captions)
    return writer.rows, {"reasons": dict(reasons), "first": first}


def _label(label: str | None, index: dict[str, int]) -> int:
    if not index:
        return 0
    if label is None:
        raise BadImage("no label", "the other images have one")
    if label not in index:
        raise BadImage("unknown label", f"{label!r} does not occur in the train split")
    return index[label]


def _spread(items: Iterable[Item], total: int, taken: int) -> Iterator[Item]:
    """`taken` of `total` items at even distances: sources are often sorted by class."""
    return (item for i, item in enumerate(items) if (i + 1) * taken // total > i * taken // total)


def to_uint8(images: Tensor) -> np.ndarray:
    """Images (B, 3, H, W) float in [-1, 1] to (B, H, W, 3) uint8."""
    return from_float(images).permute(0, 2, 3, 1).cpu().numpy()


def from_float(images: Tensor) -> Tensor:
    """Float in [-1, 1], clamped, to uint8."""
    return images.float().clamp(-1, 1).add(1).mul(127.5).round().to(torch.uint8)


def uint8_batches(images: np.ndarray, size: int = 256) -> Iterator[Tensor]:
    """(n, H, W, 3) uint8 as batches (B, 3, H, W) uint8."""
    for rows in slices(len(images), size):
        yield torch.from_numpy(np.array(images[rows])).permute(0, 3, 1, 2)
