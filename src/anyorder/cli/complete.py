"""The command `anyorder complete`: picture files in, completed picture files out."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image, ImageOps, UnidentifiedImageError

from anyorder.inference.inpainting import Filling
from anyorder.inference.masks import Box, Padding, box_mask
from anyorder.inference.pipeline import Pipeline
from anyorder.method.policy_config import PolicyConfig
from anyorder.report.figures import save_image


@dataclass
class CompleteConfig:
    """Draw parts of a picture: inpainting (mask= or box=), outpainting (pad=), variations (keep=).

    Writes 0000.png, 0001.png, ... into out=FOLDER. Pixels outside of what is drawn stay as they are.
    """

    pipeline: str
    """Folder of a pipeline, or a Hugging Face hub id."""
    image: Path
    """The picture; its sides must be divisible by the tokenizer's factor."""
    mask: Path | None = None
    """Picture of the same size: white is drawn, black is kept."""
    box: Box | None = None
    """Instead of a mask: the rectangle left,top,right,bottom (pixels) is drawn."""
    pad: Padding | None = None
    """Pixels to add on the left,top,right,bottom, and to draw."""
    keep: float | None = None
    """Instead of all these: share of patches to keep, chosen at random; the others are drawn."""
    label: str = ""
    """Name or number of a class; empty draws without one."""
    prompt: str | None = None
    """A text, for a pipeline that takes them."""
    num_images: int = 1
    """How many completions."""
    seed: int = 0
    """Completion i is drawn from seed + i."""
    policy: PolicyConfig | None = None
    """The order to draw in; the pipeline's own by default."""
    guidance: float = 1.0
    """Classifier-free guidance scale; 1 is none."""
    feather: int = Filling.feather
    """Pixels inside the hole over which the step at its seam fades out."""
    margin: int = Filling.margin
    """Patches around the hole that are drawn, too; their known pixels are kept all the same."""

    def __post_init__(self) -> None:
        if self.mask is not None and self.box is not None:
            raise ValueError("give either mask=... or box=..., not both")


def complete_file(config: CompleteConfig, out: Path) -> list[Path]:
    """Complete one picture and write the results; returns their paths.

    Raises:
        FileNotFoundError: no such pipeline or picture.
        ValueError: no picture, or settings that do not fit it; see `Pipeline.complete`.
    """
    picture = _open(config.image)
    mask: Any = _open(config.mask) if config.mask is not None else None
    if config.box is not None:
        mask = box_mask(config.box, (picture.height, picture.width))
    pipe = Pipeline.from_pretrained(config.pipeline)
    label = None if config.label == "" else pipe.typed(config.label)
    made = pipe.complete(
        picture, mask, label, config.num_images, config.policy, config.guidance,
        config.seed, pad=config.pad, keep=config.keep,
        feather=config.feather, margin=config.margin, prompt=config.prompt,
    )  # fmt: skip
    paths = [out / f"{i:04d}.png" for i in range(len(made.images))]
    for image, path in zip(made.images, paths, strict=True):
        save_image(image, path)
    return paths


def _open(path: Path) -> Image.Image:
    try:
        with Image.open(path) as image:
            return ImageOps.exif_transpose(image)
    except UnidentifiedImageError as e:
        raise ValueError(f"{path} is no picture that can be read: give a PNG, JPEG or WebP file") from e
