"""The command `anyorder sample pipeline=...`: images from a pipeline, and how they are generated."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from anyorder.inference.pipeline import Pipeline
from anyorder.method.policy_config import PolicyConfig
from anyorder.method.sampling import Sampling
from anyorder.report import figures


@dataclass
class SampleConfig:
    """Generate images with a pipeline: 0000.png, 0001.png, ..., grid.png, orders.png and generation.webp.

    orders.png shows when each patch was generated; generation.webp is an animation of it.
    """

    pipeline: str
    """Folder of a pipeline, "fashion32" (comes with the package), or a Hugging Face hub id."""
    labels: tuple[str, ...] = ()
    """Names or numbers of classes, in turn; by default all classes in turn, or none beside prompts or
    attributes."""
    prompts: tuple[str, ...] = ()
    """Texts, in turn, for a pipeline that was trained with captions."""
    attributes: dict[str, str] = field(default_factory=dict)
    """Values by name, such as baseColour: Red, for a pipeline that was trained with attributes."""
    n: int = 16
    """Number of images, at least 1; by default 16."""
    policy: PolicyConfig | None = None
    """The order to generate in; by default the pipeline's policy."""
    sampling: Sampling = field(default_factory=Sampling)
    guidance: float = 1.0
    """Scale of classifier-free guidance: 1 (default) is none, larger follows class and prompt closer."""
    seed: int = 0
    """Image i is generated from seed + i; by default 0."""
    scale: int = 4
    """Screen pixels per image pixel in grid.png, orders.png and generation.webp; by default 4."""
    compile: bool = False
    """Generate through compiled code: pays for many images only, since compiling takes a while."""

    def __post_init__(self) -> None:
        if self.n < 1 or self.scale < 1:
            raise ValueError(f"n and scale must be >= 1, got {self.n} and {self.scale}")


def sample_files(config: SampleConfig, out: Path) -> list[Path]:
    """Generate images and write the files; returns the paths of the images.

    Raises:
        FileNotFoundError: no such pipeline.
        ValueError: an unknown class, attribute or value, prompts for a pipeline that takes none, or nothing
            to compile with.
    """
    pipe = Pipeline.from_pretrained(config.pipeline)
    if config.compile:
        pipe.compile_decoding()
    labels: list[Any] = [pipe.typed(label) for label in config.labels]
    if not labels and not config.prompts and not config.attributes:
        labels = list(range(pipe.model.num_classes))
    made = pipe(
        _in_turn(labels, config.n), config.n, config.policy, config.guidance, config.seed,
        sampling=config.sampling,
        prompt=_in_turn(config.prompts, config.n),
        attributes=config.attributes,
    )  # fmt: skip
    out.mkdir(parents=True, exist_ok=True)
    paths = [out / f"{i:04d}.png" for i in range(config.n)]
    for path, image in zip(paths, made.images, strict=True):
        figures.save_image(image, path)
    images, orders = np.stack([np.asarray(image) for image in made.images]), made.order.cpu().numpy()
    figures.save_sample_figures(out, images, orders, pipe.model.grid, min(8, config.n), config.scale)
    return paths


def _in_turn(values: Sequence[Any], n: int) -> list[Any] | None:
    return [values[i % len(values)] for i in range(n)] if values else None
