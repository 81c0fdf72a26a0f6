"""From a source of images to the arrays of a data artifact."""

from __future__ import annotations

import hashlib
import logging
import os
from collections import Counter
from collections.abc import Mapping
from itertools import islice
from multiprocessing.pool import ThreadPool
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from anyorder import files
from anyorder.contracts import require
from anyorder.data import images
from anyorder.data.sources import UNKNOWN, Item, Source

_BLOCK = 256  # images in memory at a time
_LISTED = 1000  # skipped images named in the manifest
log = logging.getLogger("anyorder")


Skipped = list[tuple[str, str, str]]
"""Name of an image that could not be used, the kind of reason, and the rest of it."""


def _facts(skipped: Skipped) -> dict[str, Any]:
    first = [{"name": n, "reason": f"{kind}: {detail}" if detail else kind} for n, kind, detail in skipped]
    return {"reasons": dict(Counter(kind for _, kind, _ in skipped)), "first": first[:_LISTED]}


def ingest(
    source: Source,
    folder: str | Path,
    size: images.Size,
    fit: str = "crop",
    fill: images.Color = images.WHITE,
    max_pixels: int = images.MAX_PIXELS,
    max_train: int | None = None,
    max_test: int | None = None,
    max_skipped: float = 0.5,
    max_validation: int = 0,
) -> dict[str, Any]:
    """Decode a source into the arrays of a data artifact.

    Writes `{split}.images.npy` (n, H, W, 3) uint8 and `{split}.labels.npy` (n,) int64 (index into `classes`,
    0 where there are none) for train, test and, if asked for, validation; where the source has them, also
    `{split}.attributes.npy` (n, A) int64 (index into the values, -1 for none or a value that the train split
    does not have) and `{split}.captions.json`, a list of n texts. After a kill, a finished split is
    not decoded a second time.

    Args:
        source: where the images come from.
        folder: the artifact's folder.
        size, fit, fill, max_pixels: see `load_image`.
        max_train, max_test: how many images to take, spread evenly over the source; None for all.
        max_skipped: largest share in [0, 1] of images that may be skipped, and of files that may have an
            unknown suffix.
        max_validation: how many images of the train split become the validation split instead: of each class
            its share, chosen by their names, whatever `max_train` is.

    Returns:
        Facts for the manifest: `classes`, `attributes` (name to values) if there are any, `counts` by split,
        and `skipped` by split and, as `ignored`, of entries that are no images: `reasons` (kind to count)
        and `first` (name and reason of up to 1000).

    Raises:
        ValueError: no image of a split could be used, too many were skipped, or an argument is not allowed.
    """
    images.check_format(size, fit)
    limits = f"max_train and max_test must not be negative, got {max_train} and {max_test}"
    require(min(max_train or 0, max_test or 0) >= 0, limits)
    chosen = _rows(source, max_train, max_validation, max_test)
    decoding = {"size": size, "fit": fit, "fill": fill, "max_pixels": max_pixels}
    classes, attributes = source.classes(), source.attributes()
    ignored = [(name, reason, "") for reason, names in source.ignored().items() for name in names]
    facts: dict[str, Any] = {"classes": classes, "counts": {}, "skipped": {}, "ignored": _facts(ignored)}
    facts |= {"attributes": attributes} if attributes else {}
    for split, rows in chosen.items():
        done = Path(folder) / f"{split}.partial"  # the suffix makes Artifact drop it with other old work
        settings = repr((source, decoding, hashlib.sha256(rows.tobytes()).hexdigest()))
        if not (done.is_file() and files.read_json(done)["settings"] == settings):
            count, skipped = _ingest_split(source, Path(folder), split, rows, classes, attributes, decoding)
            files.write_json(done, {"settings": settings, "count": count, "skipped": skipped})
        result = files.read_json(done)
        facts["counts"][split], facts["skipped"][split] = result["count"], result["skipped"]
    _report(facts, max_skipped)
    for split in chosen:
        (Path(folder) / f"{split}.partial").unlink()
    return facts


def _rows(source: Source, train: int | None, validation: int, test: int | None) -> dict[str, np.ndarray]:
    """Numbers (n,) of the images that each split takes, in the source's train or test split."""
    held = _validation_rows(source, validation)
    rest = np.setdiff1d(np.arange(source.count("train")), held)
    rows = {"train": rest[_spread(train, len(rest))], "test": _spread(test, source.count("test"))}
    return rows | ({"validation": held} if validation else {})


def _spread(limit: int | None, total: int) -> np.ndarray:
    """At most `limit` of `total` numbers, at even distances: sources are often sorted by class."""
    numbers, taken = np.arange(total), total if limit is None else min(limit, total)
    return numbers[(numbers + 1) * taken // max(1, total) > numbers * taken // max(1, total)]


def _validation_rows(source: Source, count: int) -> np.ndarray:
    """Numbers of `count` images of the train split, sorted: of each class its share, by hashes of names."""
    total = source.count("train")
    mend = "choose a smaller number, or 0 for no validation split"
    fits = 0 <= count < max(1, total)
    require(fits, f"max_validation must be at least 0 and below {total} training images, got {count}: {mend}")
    items = source.items("train", with_images=False) if count else ()
    keys = [(item.label or "", hashlib.sha256(os.fsencode(item.name)).digest()) for item in items]
    middles = (2 * np.arange(count) + 1) * total // (2 * max(1, count))
    return np.sort(np.array(sorted(range(len(keys)), key=keys.__getitem__), np.int64)[middles])


def _report(facts: Mapping[str, Any], max_skipped: float) -> None:
    """Log in one line what became of everything, and refuse to lose too much of it."""
    parts = facts["skipped"].values()
    skipped = sum((Counter(part["reasons"]) for part in parts), Counter())
    ignored, used = facts["ignored"]["reasons"], sum(facts["counts"].values())
    said = [f"{count} {split} images" for split, count in facts["counts"].items()]
    said += [f"classes: {len(facts['classes'])}"] * bool(facts["classes"])
    for verb, reasons in (("skipped", skipped), ("ignored", ignored)):
        counted = ", ".join(f"{n} x {reason}" for reason, n in reasons.items())
        said += [f"{verb} {counted}"] * bool(counted)
    log.info("%s", "; ".join(said))
    first = [skip for part in (*parts, facts["ignored"]) for skip in part["first"]]
    shown = "; ".join(f"{skip['name']}: {skip['reason']}" for skip in first[:3])
    for what, n in (("skipped", skipped.total()), ("of unknown suffix", ignored.get(UNKNOWN, 0))):
        require(
            n <= max_skipped * (n + used),
            f"{n} of {n + used} files are {what}, more than max_skipped={max_skipped:g} allows "
            f"({shown}): mend or remove them, or set max_skipped higher",
        )


def _ingest_split(
    source: Source,
    folder: Path,
    split: str,
    rows: np.ndarray,
    classes: list[str],
    attributes: dict[str, list[str]],
    decoding: dict[str, Any],
) -> tuple[int, dict[str, Any]]:
    arrays: dict[str, Any] = {"images": ((*decoding["size"], 3), np.uint8), "labels": ((), np.int64)}
    arrays |= {"attributes": ((len(attributes),), np.int64)} if attributes else {}
    for name in arrays:
        for ending in ("npy", "npy.partial"):  # of a killed run; nothing else, it may be the user's
            (folder / f"{split}.{name}.{ending}").unlink(missing_ok=True)
    writer = files.RowWriter(folder, {f"{split}.{name}": kind for name, kind in arrays.items()})
    index = {name: i for i, name in enumerate(classes)}
    codes = [{value: i for i, value in enumerate(values)} for values in attributes.values()]
    skipped: Skipped = []
    captions: list[str] = []

    def read(item: Item) -> dict[str, Any] | images.BadImage:
        if isinstance(item.image, images.BadImage):
            return item.image
        try:
            found = {"images": images.load_image(item.image, **decoding), "labels": _label(item.label, index)}
        except images.BadImage as e:
            return e
        values = zip(codes, item.attributes, strict=True)
        return found | {"attributes": [code.get(value, -1) if value else -1 for code, value in values]}

    taken, wanted = len(rows), set(rows.tolist())
    numbered = enumerate(source.items("test" if split == "test" else "train"))
    items = (item for i, item in numbered if i in wanted)
    with ThreadPool(os.cpu_count()) as pool, tqdm(total=taken, desc=f"{split} images", unit="image") as bar:
        while block := list(islice(items, _BLOCK)):
            results = pool.map(read, block, chunksize=8)
            good = [r for r in results if not isinstance(r, images.BadImage)]
            for item, result in zip(block, results, strict=True):
                if isinstance(result, images.BadImage):
                    skipped.append((item.name, result.kind, result.detail))
                else:
                    captions.append(item.caption or "")
            if good:
                writer.append(**{f"{split}.{name}": np.array([r[name] for r in good]) for name in arrays})
            bar.update(len(block))
    listed = "; ".join(f"{name}: {kind}: {detail}" for name, kind, detail in skipped[:5]) or "there are none"
    unused = f"none of {taken} {split} images could be used: {listed}"
    require(writer.rows > 0 or (split == "test" and not skipped), unused)
    writer.close()
    if source.columns.caption:
        files.write_json(folder / f"{split}.captions.json", captions)
    return writer.rows, _facts(skipped)


def _label(label: str | None, index: dict[str, int]) -> int:
    if not index:
        return 0
    if label is None:
        raise images.BadImage("no label", "the other images have one")
    if label not in index:
        raise images.BadImage("unknown label", f"{label!r} does not occur in the train split")
    return index[label]
