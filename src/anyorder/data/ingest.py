"""From a source of images to the arrays of a data artifact."""

import contextlib
import functools
import hashlib
import logging
import os
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from anyorder import files
from anyorder.contracts import require
from anyorder.data import images
from anyorder.data.classes import display_name
from anyorder.data.decoding import Found, Reader
from anyorder.data.rows import slices
from anyorder.data.sources import UNKNOWN, Item, Source

_BLOCK = 64  # images that a worker reads at a time
_SAVED = 30  # seconds between two notes of how far a split is
_LONGEST = 4096  # bytes of an image's name
_LISTED = 1000  # skipped images named in the manifest
log = logging.getLogger("anyorder")
Skipped = list[tuple[str, str, str]]
"""Name of an image that could not be used, the kind of reason, and the rest of it."""


def _facts(skipped: Skipped) -> dict[str, Any]:
    first = [{"name": n, "reason": f"{kind}: {detail}" if detail else kind} for n, kind, detail in skipped]
    return {"reasons": dict(Counter(kind for _, kind, _ in skipped)), "first": first[:_LISTED]}


def ingest(
    source: Source,
    folder: Path,
    size: images.Size,
    fit: str = "crop",
    fill: images.Color = images.WHITE,
    max_pixels: int = images.MAX_PIXELS,
    max_train: int | None = None,
    max_test: int | None = None,
    max_skipped: float = 0.5,
    max_validation: int = 0,
    cache: bool = True,
) -> dict[str, Any]:
    """Decode a source into the arrays of a data artifact, by worker processes.

    Writes `{split}.images.npy` (n, H, W, 3) uint8 and `{split}.labels.npy` (n,) int64 (index into `classes`,
    0 where there are none) for train, test and, if asked for, validation; where the source has them, also
    `{split}.attributes.npy` (n, A) int64 (index into the values, -1 for none or a value that the train split
    does not have) and `{split}.captions.json`, a list of n texts. After a kill, it goes on
    with what was not yet decoded. Without `cache`, there are `{split}.names.npy` (n,) bytes and
    `{split}.checksums.npy` (n,) int64 (CRC-32 of the pixels) instead of images, all of which are decoded once
    even so: what cannot be read is skipped, and rows are the same with and without a cache.

    Args:
        source: where the images come from.
        folder: the artifact's folder.
        size, fit, fill, max_pixels: see `load_image`.
        max_train, max_test, max_skipped, max_validation, cache: settings of the stage `data`.

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
    asked = source.columns.caption
    described = asked and any(item.caption for item in source.items["train"])
    text = f"captions={asked}: none of the training images has one; give them captions, or leave captions out"
    require(not asked or bool(described), text)
    decoding = {"size": size, "fit": fit, "fill": fill, "max_pixels": max_pixels}
    classes, attributes = source.classes(), source.attributes()
    codes = _Codes(classes, attributes)
    ignored = [(name, reason, "") for reason, names in source.ignored().items() for name in names]
    facts: dict[str, Any] = {"classes": classes, "counts": {}, "skipped": {}, "ignored": _facts(ignored)}
    facts |= {"attributes": attributes} if attributes else {}
    for split, rows in chosen.items():
        done = folder / f"{split}.partial"  # the suffix makes Artifact drop it with other old work
        items = [source.items["test" if split == "test" else "train"][i] for i in rows]
        digest = hashlib.sha256()
        for item in items:  # what was begun of other names, labels or captions does not go on
            digest.update(repr(item).encode())
        settings = repr((source, decoding, cache, digest.hexdigest()))
        state = files.read_json(done) if done.is_file() else {}
        if state.get("settings") != settings:
            state = {"settings": settings, "images": 0, "rows": 0, "lost": []}
        if "count" not in state:
            save = functools.partial(files.write_json, done)
            count, skipped = _ingest_split(source, folder, split, items, codes, decoding, cache, state, save)
            save({"settings": settings, "count": count, "skipped": skipped})
        result = files.read_json(done)
        facts["counts"][split], facts["skipped"][split] = result["count"], result["skipped"]
    counts = np.bincount(files.load_array(folder / "train.labels.npy"), minlength=len(classes))
    empty = [name for name, count in zip(classes, counts, strict=True) if count == 0] if classes else []
    facts |= {"classes_without_images": empty} if empty else {}
    facts |= {"captions": described} if asked else {}
    _report(facts, max_skipped)
    for split in chosen:
        (folder / f"{split}.partial").unlink()
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
    items = source.items["train"] if count else ()
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
    said += [f"captions of training images: {facts.get('captions')}"] * ("captions" in facts)
    for verb, reasons in (("skipped", skipped), ("ignored", ignored)):
        counted = ", ".join(f"{n} x {reason}" for reason, n in reasons.items())
        said += [f"{verb} {counted}"] * bool(counted)
    log.info("%s", "; ".join(said))
    if empty := facts.get("classes_without_images"):
        shown = ", ".join(map(display_name, empty[:5])) + ", ..." * (len(empty) > 5)
        log.warning("%d classes have no training image, and will not be learnt: %s", len(empty), shown)
    first = [skip for part in (*parts, facts["ignored"]) for skip in part["first"]]
    shown = "; ".join(f"{skip['name']}: {skip['reason']}" for skip in first[:3])
    for what, n in (("skipped", skipped.total()), ("of unknown suffix", ignored.get(UNKNOWN, 0))):
        text = f"{n} of {n + used} files are {what}, more than max_skipped={max_skipped:g} allows ({shown})"
        require(n <= max_skipped * (n + used), f"{text}: mend or remove them, or set max_skipped higher")


def _ingest_split(
    source: Source, folder: Path, split: str, items: list[Item], codes: "_Codes", decoding: dict[str, Any],
    cache: bool, state: dict[str, Any], save: Callable[[dict[str, Any]], None],
) -> tuple[int, dict[str, Any]]:  # fmt: skip
    encoded = [os.fsencode(item.name) for item in items]
    longest = max(encoded, key=len, default=b"")  # all take as much room as the longest
    text = f"the name {longest[:60]!r}... has {len(longest):,} bytes, allowed are {_LONGEST:,}: rename it"
    require(len(longest) <= _LONGEST, text)
    names = np.array(encoded, np.bytes_)
    arrays: dict[str, Any] = {"images": ((*decoding["size"], 3), np.uint8)} if cache else {}
    arrays |= {} if cache else {"names": ((), names.dtype), "checksums": ((), np.int64)}
    arrays |= {"labels": ((), np.int64)}
    arrays |= {"attributes": ((len(codes.attributes),), np.int64)} if codes.attributes else {}
    specs = {f"{split}.{name}": kind for name, kind in arrays.items()}
    writer = files.RowWriter(folder, specs, most=state["rows"])
    if writer.rows < state["rows"]:  # the machine went down before they were on disk
        state |= {"images": 0, "rows": 0, "lost": []}
        writer = files.RowWriter(folder, specs, most=0)
    begin, saved = state["images"], time.monotonic()
    skipped: Skipped = [(name, kind, detail) for name, kind, detail in state["lost"]]
    lost_names = {name for name, _, _ in skipped}
    captions = [item.caption or "" for item in items[:begin] if item.name not in lost_names]
    blocks = list(slices(len(items), _BLOCK, begin))
    with (
        contextlib.closing(Reader(source, names, decoding).stream(blocks, alone=True)) as stream,
        tqdm(total=len(items), initial=begin, desc=f"{split} images", unit="image") as bar,
    ):
        for block, found in zip(blocks, stream, strict=True):
            kept, lost = _sorted(items[block[0] : block[-1] + 1], found, codes)
            skipped += lost
            captions += [row["caption"] for row in kept]
            if kept:
                writer.append(**{f"{split}.{name}": np.array([row[name] for row in kept]) for name in arrays})
            bar.update(len(block))
            if time.monotonic() >= saved + _SAVED:
                save(state | {"images": int(block[-1]) + 1, "rows": writer.rows, "lost": skipped})
                saved = time.monotonic()
    listed = "; ".join(f"{name}: {kind}: {detail}" for name, kind, detail in skipped[:5]) or "there are none"
    unused = f"none of {len(items)} {split} images could be used: {listed}"
    unused += "; mend them, or choose others by test_fraction or max_test" if split == "test" else ""
    require(writer.rows > 0 or (split == "test" and not skipped), unused)
    writer.close()
    if source.columns.caption:
        files.write_json(folder / f"{split}.captions.json", captions)
    return writer.rows, _facts(skipped)


def _sorted(items: Sequence[Item], found: Found, codes: "_Codes") -> tuple[list[dict[str, Any]], Skipped]:
    """The values of what is kept of a block, and what is skipped."""
    kept: list[dict[str, Any]] = []
    skipped: Skipped = []
    decoded = zip(found.pixels, found.checksums, strict=True)
    for place, item in enumerate(items):
        if place in found.failures:
            skipped.append((item.name, *found.failures[place]))
            continue
        pixels, checksum = next(decoded)
        row = {"images": pixels, "checksums": checksum, "names": os.fsencode(item.name)}
        row |= {"caption": item.caption or "", "attributes": codes.values(item)}
        try:
            kept.append(row | {"labels": codes.label(item.label)})
        except images.BadImage as e:
            skipped.append((item.name, e.kind, e.detail))
    return kept, skipped


class _Codes:
    """Numbers of classes and of the values of attributes."""

    def __init__(self, classes: list[str], attributes: dict[str, list[str]]):
        self.classes = {name: i for i, name in enumerate(classes)}
        self.attributes = [{value: i for i, value in enumerate(values)} for values in attributes.values()]

    def label(self, label: str | None) -> int:
        """Number of a class; `BadImage` if there are classes, and this is none of them."""
        if not self.classes:
            return 0
        if label is None:
            raise images.BadImage("no label", "the other images have one")
        if label not in self.classes:
            raise images.BadImage("unknown label", f"{label!r} does not occur in the train split")
        return self.classes[label]

    def values(self, item: Item) -> list[int]:
        """Numbers of the values of the attributes, -1 for none or an unknown one."""
        pairs = zip(self.attributes, item.attributes, strict=True)
        return [code.get(value, -1) if value else -1 for code, value in pairs]
