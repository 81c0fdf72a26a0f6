"""The command `anyorder complete`: image files in, completed image files out."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from anyorder.data.images import load_image
from anyorder.inference.masks import Box, Padding, box_mask
from anyorder.inference.pipeline import Pipeline
from anyorder.method.policy_config import PolicyConfig
from anyorder.report.figures import save_image


@dataclass
class CompleteConfig:
    """Generate parts of an image: inpainting (mask= or box=), outpainting (pad=), variations (keep=).

    Writes 0000.png, 0001.png, ... into out=FOLDER. Pixels outside of what is generated stay as they are.
    """

    pipeline: str
    """Folder of a pipeline, "fashion32" (comes with the package), or a Hugging Face hub id."""
    image: Path
    """The image; its sides must be divisible by the tokenizer's factor."""
    mask: Path | None = None
    """Image of the same size: white is generated, black and transparent are kept."""
    box: Box | None = None
    """Instead of a mask: the rectangle left,top,right,bottom (pixels) is generated."""
    pad: Padding | None = None
    """Pixels to add on the left,top,right,bottom, and to generate."""
    keep: float | None = None
    """Instead of all these: share of patches to keep, in [0, 1), chosen at random; others are generated."""
    label: str = ""
    """Name or number of a class; by default none."""
    prompt: str | None = None
    """A text, for a pipeline that was trained with captions."""
    num_images: int = 1
    """How many completions; by default 1."""
    seed: int = 0
    """Completion i is generated from seed + i; by default 0."""
    policy: PolicyConfig | None = None
    """The order to generate in; by default the pipeline's policy."""
    guidance: float = 1.0
    """Scale of classifier-free guidance: 1 (default) is none, larger follows class and prompt closer."""
    feather: int | None = None
    """Pixels inside the hole over which the step at its seam fades out; by default 2, and 0 is none."""
    margin: int | None = None
    """Patches around the hole that are generated, too, while their known pixels are kept; by default 0."""

    def __post_init__(self) -> None:
        if self.mask is not None and self.box is not None:
            raise ValueError("give either mask=... or box=..., not both")


def complete_file(config: CompleteConfig, out: Path) -> list[Path]:
    """Complete one image and write the results; returns their paths.

    Raises:
        FileNotFoundError: no such pipeline.
        ValueError: an image or mask that cannot be read, or settings that do not fit it.
    """
    image = load_image(config.image)
    mask = config.mask if config.box is None else box_mask(config.box, image.shape[:2])
    pipe = Pipeline.from_pretrained(config.pipeline)
    label = None if config.label == "" else pipe.typed(config.label)
    made = pipe.complete(
        image, mask, label, config.num_images, config.policy, config.guidance, config.seed,
        pad=config.pad, keep=config.keep, feather=config.feather, margin=config.margin, prompt=config.prompt,
    )  # fmt: skip
    paths = [out / f"{i:04d}.png" for i in range(len(made.images))]
    for generated, path in zip(made.images, paths, strict=True):
        save_image(generated, path)
    return paths
