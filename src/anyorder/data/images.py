"""The one reader of images and masks: files, bytes, Pillow images and arrays, to RGB or to a mask."""

import contextlib
import io
import os
from collections.abc import Iterator

import numpy as np
import torch
from PIL import Image, ImageCms, UnidentifiedImageError

Size = tuple[int, int]
Color = tuple[int, int, int]
ImageLike = bytes | str | os.PathLike[str] | Image.Image | np.ndarray

FORMATS = (
    "AVIF", "BMP", "DIB", "GIF", "ICO", "JPEG", "JPEG2000", "MPO", "PCX", "PNG", "PPM", "QOI", "SGI", "TGA",
    "TIFF", "WEBP",
)  # fmt: skip
"""Formats that are read. EPS and its kind are left out: Pillow starts another program for them."""
WHITE: Color = (255, 255, 255)
MAX_PIXELS = 64_000_000
MOST_PIXELS = 178_956_970
"""No more can be allowed: Pillow refuses such images as decompression bombs."""
MAX_BYTES = 2**29
"""Larger files are refused before they are opened."""
GENERATE = 128
"""Grey values of a mask from here on are generated."""
_GAP = 3.0  # how much larger than needed a cheap first reduction may leave the image; 3 is visually lossless
_ORIENTATION_TAG = 0x0112
_UPRIGHT = dict(enumerate((
    "FLIP_LEFT_RIGHT", "ROTATE_180", "FLIP_TOP_BOTTOM", "TRANSPOSE", "ROTATE_270", "TRANSVERSE", "ROTATE_90",
), start=2))  # fmt: skip
"""EXIF orientation -> what undoes it."""
_PROFILE_MODES = {"RGB ": "RGB", "GRAY": "L", "CMYK": "CMYK"}


class BadImage(ValueError):
    """An image that cannot be used.

    Attributes:
        kind: one of few phrases to count by, such as "damaged image".
        detail: the rest of the message.
    """

    def __init__(self, kind: str, detail: str, where: str = ""):
        super().__init__(f"{kind}: {where}{detail}")
        self.kind, self.detail = kind, detail


def load_image(
    image: ImageLike,
    size: Size | None = None,
    fit: str = "crop",
    fill: Color = WHITE,
    max_pixels: int = MAX_PIXELS,
) -> np.ndarray:
    """Read one image, upright, in RGB (sRGB if it has a colour profile); of an animation the first frame.

    Samples of 16 and 32 bits and floats are scaled to 8 bits: the smallest common range that holds them all
    (1, 255 or 65535; 2**31 for integers) becomes 255.

    Args:
        image: a path, the bytes of a file, a Pillow image of any mode, or an array (H, W), (H, W, 3) or
            (H, W, 4) of bool, uint8, uint16 or float.
        size: (height, width) in pixels; None leaves the size as it is.
        fit: "crop" covers `size` and cuts what hangs over evenly; "letterbox" shows all and fills the rest.
        fill: RGB in [0, 255] behind transparent pixels and around a letterboxed image.
        max_pixels: larger images are refused before they are decoded; `MOST_PIXELS` at most.

    Returns:
        (height, width, 3) uint8.

    Raises:
        BadImage: the image is unreadable, too large, damaged, or no image; the message has its path.
        ValueError: `size` or `fit` is not allowed.
    """
    check_format(size, fit)
    with _errors(image):
        rgb = _decode(image, size, fill, max_pixels)
        if size is not None:
            rgb = _crop(rgb, size) if fit == "crop" else _letterbox(rgb, size, fill)
        return np.array(rgb)


def load_mask(mask: ImageLike, max_pixels: int = MAX_PIXELS) -> np.ndarray:
    """Read a mask, (H, W) bool: white is to be generated, True; black and transparent are kept.

    A mask of the values 0 and 1 alone is understood, too. Arguments and errors as for `load_image`.
    """
    with _errors(mask):
        grey = np.asarray(_decode(mask, None, (0, 0, 0), max_pixels).convert("L"))
    return grey == 1 if grey.max() == 1 else grey >= GENERATE


def check_format(size: Size | None, fit: str) -> None:
    """Refuse, by a ValueError, a size or a way to fit that `load_image` does not know."""
    if size is not None and (len(size) != 2 or min(size) < 1):
        raise ValueError(f"size must be a positive (height, width) in pixels, got {size}")
    if fit not in ("crop", "letterbox"):
        raise ValueError(f"fit must be 'crop' or 'letterbox', got {fit!r}")


@contextlib.contextmanager
def _errors(image: ImageLike) -> Iterator[None]:
    """Turn whatever decoders raise into `BadImage` with the path; foreign bytes make them raise anything."""
    where = f"{os.fspath(image)}: " if isinstance(image, str | os.PathLike) else ""
    try:
        yield
    except BadImage as e:
        raise BadImage(e.kind, e.detail, where) from e.__cause__
    except Image.DecompressionBombError as e:
        raise BadImage("too many pixels", str(e), where) from e
    except UnidentifiedImageError as e:
        raise BadImage("not an image", "no decoder knows its first bytes", where) from e
    except Exception as e:
        kind = "damaged image" if getattr(e, "errno", None) is None else "unreadable file"
        raise BadImage(kind, f"{type(e).__name__}: {e}", where) from e


def _require(holds: bool, kind: str, detail: str) -> None:
    if not holds:
        raise BadImage(kind, detail)


def _decode(image: ImageLike, size: Size | None, fill: Color, max_pixels: int) -> Image.Image:
    """Upright RGB at full size or, where the format has a cheap way to it, not much larger than `size`."""
    if isinstance(image, np.ndarray):
        image = _from_array(image)
    opened = contextlib.nullcontext(image) if isinstance(image, Image.Image) else _open(image)
    with opened as found:
        detail = f"{found.width} x {found.height} pixels, allowed are {max_pixels} (max_pixels)"
        _require(found.width * found.height <= max_pixels, "too many pixels", detail)
        _require(found.format in (None, *FORMATS), "not an image", f"{found.format} files are not read")
        if size is not None and found is not image:  # a user's image stays as it is
            found.draft(None, (int(_GAP * max(size)),) * 2)
        return _upright(found, fill)


def _open(image: bytes | str | os.PathLike[str]) -> Image.Image:
    if isinstance(image, bytes):
        file: io.BytesIO | str = io.BytesIO(image)
        length = len(image)
    else:
        file = path = os.path.expanduser(image) if isinstance(image, str) else os.fspath(image)
        # Opening a pipe or a device would wait for ever.
        _require(os.path.isfile(path), "unreadable file", "no regular file, or a broken link")
        length = os.path.getsize(path)
    _require(length > 0, "empty file", "zero bytes")
    _require(length <= MAX_BYTES, "too many bytes", f"{length:,} bytes, allowed are {MAX_BYTES:,}")
    return Image.open(file, formats=_openable())


def _openable() -> tuple[str, ...]:
    """The formats that this build of Pillow has; MPO is read by the reader of JPEG."""
    Image.init()
    return tuple(name for name in FORMATS if name in Image.OPEN)


def suffixes() -> set[str]:
    """Endings of the names of image files, such as ".jpg"."""
    formats = _openable()
    return {suffix for suffix, name in Image.registered_extensions().items() if name in (*formats, "MPO")}


def _upright(image: Image.Image, fill: Color) -> Image.Image:
    image.load()
    orientation = None
    with contextlib.suppress(Exception):  # broken EXIF is no reason to lose a whole image
        orientation = image.getexif().get(_ORIENTATION_TAG)
    if image.mode == "F" or image.mode.startswith("I"):
        image = _from_samples(image)
    profile = image.info.get("icc_profile")
    if image.has_transparency_data:
        layer = image.convert("RGBA")
        behind = Image.new("RGB", layer.size, fill)
        image = Image.composite(_rgb(layer.convert("RGB"), profile), behind, layer.getchannel("A"))
    else:
        image = _rgb(image, profile)
    undo = _UPRIGHT.get(orientation or 1)
    return image.transpose(Image.Transpose[undo]) if undo else image


def _rgb(image: Image.Image, profile: bytes | None) -> Image.Image:
    """sRGB; an image without a profile, or with an unsound one, is taken to be sRGB."""
    if image.mode == "LAB":
        return _to_srgb(image, ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB")))
    with contextlib.suppress(Exception):
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile or b""))
        mode = _PROFILE_MODES[source.profile.xcolor_space]
        fits = (mode == "CMYK") == (image.mode == "CMYK")
        if fits and "sRGB" not in ImageCms.getProfileDescription(source):
            return _to_srgb(image.convert(mode), source)
    return image.convert("RGB")


def _to_srgb(image: Image.Image, source: ImageCms.ImageCmsProfile) -> Image.Image:
    target = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB"))
    converted = ImageCms.profileToProfile(image, source, target, outputMode="RGB")
    assert converted is not None, "only in-place conversion returns nothing"
    return converted


def _from_samples(image: Image.Image) -> Image.Image:
    """A grey image of more than 8 bits at 8 bits; Pillow's `convert` would clip."""
    samples = np.asarray(image)
    grey = Image.fromarray(_eight_bits(samples))
    grey.info = {key: image.info[key] for key in ("icc_profile",) if key in image.info}
    if isinstance(clear := image.info.get("transparency"), int):
        grey.putalpha(Image.fromarray((samples != clear) * np.uint8(255)))
    return grey


def _from_array(array: np.ndarray) -> Image.Image:
    if array.ndim == 3 and array.shape[2] == 1:
        array = array[..., 0]
    known = array.dtype in (np.bool_, np.uint8, np.uint16) or array.dtype.kind == "f"
    _require(
        known and array.ndim in (2, 3) and array.shape[2:] in ((), (3,), (4,)) and array.size > 0,
        "not an image",
        "arrays must be (H, W), (H, W, 3) or (H, W, 4) of bool, uint8, uint16 or float, "
        f"got {array.dtype} of shape {array.shape}",
    )
    return Image.fromarray(np.ascontiguousarray(_eight_bits(array)))


def _eight_bits(samples: np.ndarray) -> np.ndarray:
    """Samples of any type to uint8: the smallest common range that holds them all becomes [0, 255]."""
    if samples.dtype in (np.uint8, np.bool_):
        return samples if samples.dtype == np.uint8 else samples * np.uint8(255)
    values = np.asarray(samples, np.float32)
    top = float(values.max(where=np.isfinite(values), initial=0))
    values = np.nan_to_num(values, posinf=top)
    ranges = (1.0, 255.0, 65535.0) if samples.dtype.kind == "f" else (65535.0, 2.0**31)
    white = next((r for r in ranges if top <= r), top)
    return (values.clip(0) * (255 / white)).round().astype(np.uint8)


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


def to_uint8(images: torch.Tensor) -> np.ndarray:
    """Images (B, 3, H, W) float in [-1, 1] to (B, H, W, 3) uint8."""
    return from_float(images).permute(0, 2, 3, 1).cpu().numpy()


def from_float(images: torch.Tensor) -> torch.Tensor:
    """Float in [-1, 1], clamped, to uint8."""
    return images.float().clamp(-1, 1).add(1).mul(127.5).round().to(torch.uint8)


def uint8_batches(images: np.ndarray, size: int = 256) -> Iterator[torch.Tensor]:
    """(n, H, W, 3) uint8 as batches (B, 3, H, W) uint8."""
    for begin in range(0, len(images), size):
        yield torch.from_numpy(np.array(images[begin : begin + size])).permute(0, 3, 1, 2)
