"""From a source of images to the arrays of a data artifact."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Iterator
from itertools import islice
from multiprocessing.pool import ThreadPool
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from anyorder.data.images import MAX_PIXELS, WHITE, BadImage, Color, Size, check_format, load_image
from anyorder.data.sources import Item, Source
from anyorder.files import RowWriter, read_json, write_json

SPLITS = ("train", "test")
_BLOCK = 256  # images in memory at a time
_LISTED = 1000  # skipped images named in the manifest


def ingest(
    source: Source,
    folder: str | Path,
    size: Size,
    fit: str = "crop",
    fill: Color = WHITE,
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
    check_format(size, fit)
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
                    reason = f"{result.kind}: {result.detail}"
                    first += [{"name": item.name, "reason": reason}] * (len(first) < _LISTED)
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
