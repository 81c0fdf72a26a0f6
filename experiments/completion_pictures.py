"""Pictures of completion: a hole filled, a lower third added, a colour changed by text.

    python experiments/completion_pictures.py PIPELINE OUT.png

PIPELINE takes captions (runs/text_fashion32/pipeline of text_fashion32.yaml). What is completed are pictures
that the same pipeline has drawn: no picture of the data set is shown.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np

from anyorder.inference.pipeline import Pipeline
from anyorder.report import figures

SOURCES = ("Red T-shirt", "Black Shoes", "Blue Shirt")
COLOURS = ("Red", "Blue", "Black", "White", "Pink")
GUIDANCE = 3.0
HIDDEN = 200
"""Grey of what the model is not shown."""


def arrays(images: Any) -> np.ndarray:
    """(n, H, W, 3) uint8."""
    return np.stack([np.asarray(image) for image in images])


def holes(size: int) -> dict[str, np.ndarray]:
    """White is drawn: the centred half of the area, and the lower third."""
    centre, lower = np.zeros((size, size), bool), np.zeros((size, size), bool)
    inner = round(size * 0.5**0.5 / 2)
    middle = slice(size // 2 - inner, size // 2 + inner)
    centre[middle, middle] = True
    lower[-round(size / 3) :] = True
    return {"centred half": centre, "lower third": lower}


def filled(pipe: Pipeline, sources: np.ndarray, mask: np.ndarray, order: str) -> np.ndarray:
    """Each source, what is shown of it, and three completions by its own prompt."""
    rows = []
    for i, (source, prompt) in enumerate(zip(sources, SOURCES, strict=True)):
        made = pipe.complete(source, mask, None, 3, order, GUIDANCE, generator=100 * i, prompt=prompt)
        completions = arrays(made.images)
        assert (completions[:, ~mask] == source[~mask]).all(), "known pixels stay"
        shown = np.where(mask[..., None], np.uint8(HIDDEN), source)
        rows.append(np.concatenate((np.stack((source, shown)), completions)))
    return np.concatenate(rows)


def recoloured(pipe: Pipeline, source: np.ndarray) -> np.ndarray:
    """A source, what is shown of it, and its middle drawn again with other colours asked for."""
    mask = np.zeros(source.shape[:2], bool)
    mask[8:24, 4:28] = True
    shown = np.where(mask[..., None], np.uint8(HIDDEN), source)
    made = [
        pipe.complete(source, mask, None, 1, "random", GUIDANCE, generator=7, prompt=f"{colour} T-shirt")
        for colour in COLOURS
    ]
    return np.concatenate((np.stack((source, shown)), *(arrays(one.images) for one in made)))


def main(pipeline: str, out: Path) -> None:
    """Draw the sources, complete them, write one figure."""
    pipe = Pipeline.from_pretrained(pipeline)
    sources = arrays(pipe(None, len(SOURCES), "random", GUIDANCE, 3, prompt=list(SOURCES)).images)
    rows, names = [], []
    for what, mask in holes(sources.shape[1]).items():
        for order in ("random", "entropy"):
            rows.append(filled(pipe, sources, mask, order))
            names.append(f"{what}, {order} order: drawn picture, what is shown of it, three completions")
    rows.append(np.concatenate([recoloured(pipe, source) for source in (sources[0], sources[2])]))
    names.append("colour by text: picture, what is shown of it, " + ", ".join(COLOURS).lower())
    figures.save_image(figures.prompt_grid(rows, names, scale=3), out)


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
