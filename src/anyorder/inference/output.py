"""What a pipeline returns, and how it shows itself."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from anyorder.contracts import Grid
from anyorder.inference import figures


@dataclass(repr=False, eq=False)
class PipelineOutput:
    """The result of a call; a notebook shows images beside maps of their orders."""

    images: list[Image.Image]
    order: torch.Tensor  #: (B, N) int64, order[b, i] = raster position revealed at step i.
    tokens: torch.Tensor  #: (B, N) int64, raster order.
    log_prob: torch.Tensor  #: (B, N) float32 nats, in order steps: under the (guided) model when sampled.
    grid: Grid  #: Rows and columns of patches, N in all.
    steps: torch.Tensor  #: (B,) int64, steps that each image took; they differ with `entropy_limit`.
    known: torch.Tensor | None = None  #: (B, N) bool, of `complete`: tokens that were kept, first in `order`.

    def save_animation(self, path: str | Path, *, columns: int = 8, scale: int | None = None) -> None:
        """Write how the images were generated, as an endless `.webp` or `.gif`, `columns` images per row.

        `scale` enlarges each pixel, by default to 128 screen pixels per image or more. A ValueError refuses
        other formats.
        """
        known = 0 if self.known is None else self.known.sum(1).cpu().numpy()
        frames = figures.generation_frames(*self._arrays(), self.grid, known=known)
        figures.save_animation(Path(path), frames, columns, scale or self._scale)

    def __repr__(self) -> str:
        w, h = self.images[0].size
        patches = f"{self.grid.h} x {self.grid.w} patches"
        return f"PipelineOutput({len(self.images)} images of {h} x {w} pixels, {patches})"

    def _repr_png_(self) -> bytes | None:
        """At most 16 images, as IPython asks for them."""
        return figures.order_panel(*self._arrays(16), self.grid, scale=self._scale)._repr_png_()

    def _arrays(self, most: int | None = None) -> tuple[np.ndarray, np.ndarray]:
        images = np.stack([np.asarray(image) for image in self.images[:most]])
        return images, self.order[:most].cpu().numpy()

    @property
    def _scale(self) -> int:
        return max(1, 128 // max(self.images[0].size))

    @classmethod
    def joined(cls, parts: Sequence["PipelineOutput"]) -> "PipelineOutput":
        """The outputs of one or more batches as one."""
        names = ("order", "tokens", "log_prob", "steps") + (("known",) if parts[0].known is not None else ())
        columns = {name: torch.cat([getattr(part, name) for part in parts]) for name in names}
        return cls([image for part in parts for image in part.images], grid=parts[0].grid, **columns)
