"""The command `anyorder sample pipeline=...`: pictures from a pipeline, being drawn in their order."""

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
class DrawConfig:
    """Draw pictures with a pipeline: 0000.png, 0001.png, ..., grid.png, orders.png and generation.webp.

    generation.webp is an animation of the pictures being drawn, orders.png shows when each patch was.
    """

    pipeline: str
    """Folder of a pipeline, the name of one that comes with the package (fashion32), or a hub id."""
    labels: tuple[str, ...] = ()
    """Names or numbers of classes, in turn; all classes in turn by default, none where a prompt is given."""
    prompts: tuple[str, ...] = ()
    """Texts, in turn, for a pipeline that takes them."""
    attributes: dict[str, str] = field(default_factory=dict)
    """Values by name, such as baseColour: Red, for a pipeline that takes them."""
    n: int = 16
    """How many pictures."""
    policy: PolicyConfig | None = None
    """The order to draw in; the pipeline's own by default."""
    sampling: Sampling = field(default_factory=Sampling)
    guidance: float = 1.0
    """Classifier-free guidance scale; 1 is none."""
    seed: int = 0
    """Picture i is drawn from seed + i."""
    scale: int = 4
    """Screen pixels per pixel in grid, orders and animation."""
    compile: bool = False
    """Draw through compiled code, see `models.compiled`: for many pictures, since compiling takes a while."""

    def __post_init__(self) -> None:
        if self.n < 1 or self.scale < 1:
            raise ValueError(f"n and scale must be >= 1, got {self.n} and {self.scale}")


def draw(config: DrawConfig, out: Path) -> list[Path]:
    """Draw the pictures and write the files; returns the paths of the pictures.

    Raises:
        FileNotFoundError: no such pipeline.
        ValueError: an unknown class, attribute or value, prompts to a pipeline that takes none, or nothing
            to compile with.
    """
    pipe = Pipeline.from_pretrained(config.pipeline)
    if config.compile:
        pipe.compile_decoding()
    wanted = [pipe.typed(label) for label in config.labels]
    if not wanted and not config.prompts and not config.attributes:
        wanted = list(range(pipe.model.num_classes))
    made = pipe(
        _in_turn(wanted, config.n), config.n, config.policy, config.guidance, config.seed,
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
