"""Write the emoji without skin-tone variants as a folder of images: GROUP/NAME.png below train and test.

Beside each image NAME.txt holds its name, for a data stage with captions=txt.

    python experiments/emoji_folder.py ../shared/data/noto-emoji runs/emoji

Variants are near copies: they would let a model that learns by heart look good on held-out images. The
split is made anew, 1,200 images to train (and to cut the validation split from) and the rest to test: the
164 of the original test split are too few for FD.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq

TRAIN = 1200


def main(source: str, out: str) -> None:
    """Write all images; stops if `out` exists."""
    rows = [row for path in sorted(Path(source).glob("*.parquet")) for row in pq.read_table(path).to_pylist()]
    bases = sorted({row["base"]: row for row in rows if "skin tone" not in row["name"]}.items())
    split = np.random.default_rng(0).permutation(len(bases))
    for number, place in enumerate(split):
        _, row = bases[place]
        folder = Path(out, "train" if number < TRAIN else "test", row["group"].replace(" & ", " and "))
        folder.mkdir(parents=True, exist_ok=True)
        name = "".join(c if c.isalnum() else "-" for c in row["name"])
        (folder / f"{name}-{place}.png").write_bytes(row["image"]["bytes"])
        (folder / f"{name}-{place}.txt").write_text(row["name"], encoding="utf-8")
    print(f"{len(bases)} images in {out}: {TRAIN} to train, {len(bases) - TRAIN} to test")


if __name__ == "__main__":
    if Path(sys.argv[2]).exists():
        sys.exit(f"{sys.argv[2]} exists: give another folder")
    main(*sys.argv[1:])
