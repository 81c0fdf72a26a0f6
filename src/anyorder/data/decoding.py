"""Pixels without a cache: images are decoded when they are asked for, ahead of time by worker processes."""

import contextlib
import itertools
import os
import signal
import zlib
from collections.abc import Generator, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.utils.data import DataLoader

from anyorder.contracts import require
from anyorder.data import images
from anyorder.data.sources import Columns, FolderSource, OwnSource, Source

WORKERS = "ANYORDER_WORKERS"
"""Environment variable: worker processes that decode images ahead, by default one for each CPU core that this
process may use, of several processes on a machine for its share; 0 decodes in the process itself."""
CROP_RANGE = 1.1
"""Crops are cut from images that are so many times larger, as in LlamaGen's ten-crop (arXiv 2406.06525)."""
CROPS = 5
"""The four corners and the middle, in the sequence of torchvision's FiveCrop."""
Batches = Iterable[np.ndarray]
"""Row numbers (B,) of each batch."""
_DECODING = ("size", "fit", "fill", "max_pixels")
Ahead = contextlib.AbstractContextManager[None]


class Found(NamedTuple):
    """What became of some rows."""

    pixels: Any  # (g, H, W, 3) uint8, of the g rows that could be read
    checksums: list[int | None]  # CRC-32 of each of these; of crops that of the whole image, at the first one
    failures: dict[int, tuple[str, str]]  # place among the rows -> kind of reason, and the rest of it
    error: str = ""  # the whole source cannot be read


class Reader:
    """Images of a source, a map-style data set of `torch.utils.data` whose items are batches of rows."""

    def __init__(self, source: Source, names: np.ndarray, decoding: Mapping[str, Any], crops: int = 1):
        """Images of these `names` (n,), bytes; `decoding` are arguments of `load_image`.

        With `crops`, 1 or `CROPS`, row k * n + i is crop k of image i.
        """
        self.source, self.names, self.decoding, self.crops = source, names, decoding, crops

    def __len__(self) -> int:
        return len(self.names) * self.crops

    def name(self, row: int) -> str:
        """Name of an image in the source."""
        return os.fsdecode(self.names[row % len(self.names)])

    def __getitem__(self, rows: np.ndarray) -> Found:
        try:
            return self._read(rows)
        except (OSError, ValueError, MemoryError) as e:  # raised in a worker, it would be many lines
            return Found(np.empty((0, 0, 0, 3), np.uint8), [], {}, str(e))

    def _read(self, rows: np.ndarray) -> Found:
        pixels = np.empty((len(rows), *self.decoding["size"], 3), np.uint8)
        checksums: list[int | None] = [None] * len(rows)
        failures = {}
        for place in np.argsort(rows % len(self.names), kind="stable"):  # what is stored together, together
            try:
                pixels[place], checksums[place] = self._image(int(rows[place]))
            except images.BadImage as e:
                failures[int(place)] = e.kind, e.detail
        pixels = np.delete(pixels, [*failures], axis=0) if failures else pixels
        return Found(pixels, [c for i, c in enumerate(checksums) if i not in failures], failures)

    def _image(self, row: int) -> tuple[np.ndarray, int | None]:
        image = self.source.image(self.name(row))
        if isinstance(image, images.BadImage):
            raise image
        first = row < len(self.names)
        whole = images.load_image(image, **self.decoding) if first else None
        checksum = None if whole is None else zlib.crc32(whole.data)
        if self.crops == 1 and whole is not None:
            return whole, checksum
        h, w = self.decoding["size"]
        large = int(CROP_RANGE * h), int(CROP_RANGE * w)
        whole = images.load_image(image, **{**self.decoding, "size": large})
        down, right = large[0] - h, large[1] - w
        corners = ((0, 0), (0, right), (down, 0), (down, right), (round(down / 2), round(right / 2)))
        top, left = corners[row // len(self.names)]
        return whole[top : top + h, left : left + w], checksum

    def stream(self, batches: Batches, alone: bool = False) -> Generator[Found]:
        """Read `batches` of row numbers in this sequence; workers read ahead of what is asked for.

        `alone` where the other processes of torchrun do not read: all cores are then this one's.

        Raises:
            ValueError: the source as a whole cannot be read.
        """
        batches, most = iter(batches), _workers(alone)
        first = list(itertools.islice(batches, max(2, most)))
        batches = itertools.chain(first, batches)
        if most == 0 or len(first) < 2:
            yield from map(_sound, map(self.__getitem__, batches))
            return
        loader: Any = DataLoader(
            self, batch_size=None, sampler=batches, num_workers=min(most, len(first)), collate_fn=_shared,  # type: ignore[arg-type]
            worker_init_fn=_ignore_signals, generator=torch.Generator(),
        )  # fmt: skip
        for found in loader:
            yield _sound(found._replace(pixels=found.pixels.numpy()))


def _workers(alone: bool) -> int:
    given = os.environ.get(WORKERS, "")
    require(not given or given.isdecimal(), f"{WORKERS} must be a number from 0 on, got '{given}'")
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    sharers = 1 if alone else int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return int(given) if given else max(1, cores // sharers)


def _sound(found: Found) -> Found:
    require(not found.error, found.error)
    return found


def _shared(found: Found) -> Found:
    """Tensors go through shared memory from a worker to its parent."""
    return found._replace(pixels=torch.from_numpy(found.pixels))


def _ignore_signals(worker: int) -> None:
    """Ctrl-C and SIGTERM reach workers, too: the parent finishes its step with them and then ends them."""
    for kind in (signal.SIGINT, signal.SIGTERM):
        signal.signal(kind, signal.SIG_IGN)


class Decoded:
    """Images as an array (n, H, W, 3) uint8 that holds none: `self[rows]` decodes these rows."""

    def __init__(self, reader: Reader, checksums: np.ndarray):
        """`checksums` (n,) are those of the pixels when the data were made."""
        self._reader, self._checksums = reader, checksums
        self.shape = (len(reader), *reader.decoding["size"], 3)
        self._coming: Iterator[tuple[np.ndarray, Found]] = iter(())
        self._next: tuple[np.ndarray, Found] | None = None

    def __len__(self) -> int:
        return len(self._reader)

    def __getitem__(self, rows: np.ndarray) -> np.ndarray:
        """Pixels (B, H, W, 3) uint8 of rows (B,).

        Raises:
            ValueError: an image can no longer be read, or is not the one that was there.
        """
        if self._next is None:
            self._next = next(self._coming, None)
        if self._next is not None and np.array_equal(self._next[0], rows):
            found, self._next = self._next[1], None
        else:
            found = _sound(self._reader[rows])
        self._check(rows, found)
        return found.pixels

    def _check(self, rows: np.ndarray, found: Found) -> None:
        mend = "put it back, or run data again with overwrite=true"
        for place, (kind, detail) in found.failures.items():
            name = self._reader.name(rows[place])
            raise ValueError(f"{name} can no longer be read ({kind}: {detail}): {mend}")
        for row, checksum in zip(rows, found.checksums, strict=True):
            text = "has other pixels than when the data were made (the file or the version of Pillow changed)"
            same = checksum is None or checksum == self._checksums[row]
            require(same, f"{self._reader.name(row)} {text}: {mend}")

    @contextlib.contextmanager
    def ahead(self, batches: Batches) -> Iterator[None]:
        """Read `batches` of row numbers before they are asked for, in this sequence; others may be, too."""
        batches, expected = itertools.tee(batches)
        with contextlib.closing(self._reader.stream(batches)) as stream:
            self._coming = zip(expected, stream, strict=False)
            try:
                yield
            finally:
                self._coming, self._next = iter(()), None


def ahead(pixels: np.ndarray | Decoded, batches: Batches) -> Ahead:
    """Have the workers decode `batches` of row numbers before they are asked for; an array needs none."""
    return pixels.ahead(batches) if isinstance(pixels, Decoded) else contextlib.nullcontext()


def described(source: Source, where: str, settings: Mapping[str, Any]) -> dict[str, Any]:
    """What a manifest holds so that `opened` can read the images again; `settings` of the data stage."""
    kept = {name: settings[name] for name in ("image", *_DECODING)}
    return {"kind": type(source).__name__, "source": where, **kept}


def opened(
    facts: Mapping[str, Any], names: np.ndarray, checksums: np.ndarray, crops: bool = False
) -> Decoded:
    """Images of these names and checksums (n,), from what `described` returned; with `crops` see `Reader`.

    A ValueError refuses images that are too small to have different crops.
    """
    from anyorder.data import tables, tars

    known: list[Any] = [FolderSource, OwnSource, tars.TarSource]
    known += [tables.ParquetSource, tables.RemoteSource, tables.HubSource]
    kind = next(each for each in known if each.__name__ == facts["kind"])
    where = Path(facts["source"]) if os.path.isabs(facts["source"]) else facts["source"]
    source = kind(where) if facts["image"] is None else kind(where, Columns(image=facts["image"]))
    decoding = {name: facts[name] for name in _DECODING}
    decoding |= {name: tuple(facts[name]) for name in ("size", "fill")}
    text = f"crops need images of at least 10 x 10 pixels, got size={decoding['size']}"
    require(not crops or min(decoding["size"]) >= 10, text)
    return Decoded(Reader(source, names, decoding, CROPS if crops else 1), checksums)
