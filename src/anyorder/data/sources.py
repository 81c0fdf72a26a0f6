"""Where images come from: a folder, parquet files, tar shards, or a Hugging Face data set."""

import codecs
import json
import math
import posixpath
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from torch import Tensor

from anyorder import families
from anyorder.contracts import require
from anyorder.data import listing
from anyorder.data.classes import in_sequence
from anyorder.data.images import BadImage, suffixes
from anyorder.files import expanded

SIDECARS = {".txt", ".json", ".jsonl", ".csv", ".tsv", ".xml", ".md", ".yaml", ".yml", ".html", ".log", ".py"}
"""Files that are expected beside images; other unknown files may be images that cannot be read."""
UNKNOWN, BESIDE = "unknown suffix", "text beside the images"
SIDECAR, LINES, JSONL = "txt", "lines", ".jsonl"
"""Captions of a folder's images: a text beside each image, every line of it, or a file of JSON lines."""
NAME, TEXTS = "file_name", ("text", "caption", "captions")
"""Keys of such a file: the image, relative to the file, and its caption or captions."""
Parts = dict[str | None, list[str]]
"""One of train, test and validation, or None for no split -> names of the files or tables of images."""


class Item(NamedTuple):
    """What is known of one image."""

    label: str | None
    name: str  # unique in the source; also decides the split where there is none
    attributes: tuple[str | None, ...] = ()  # value of each of the source's attributes
    caption: str | None = None  # of several captions, one in each line


def joined(captions: Iterable[str]) -> str:
    """Captions of one image as one text, one in each line."""
    return "\n".join(filter(None, (" ".join(caption.split()) for caption in captions)))


@dataclass(frozen=True)
class Columns:
    """Columns of parquet files and Hugging Face data sets; None for none."""

    label: str | None = None  # class of each image
    caption: str | None = None  # text about each image
    attributes: tuple[str, ...] = ()
    image: str | None = None  # may be left out where there is one column of images

    @property
    def texts(self) -> list[str]:
        """The columns of texts."""
        named = (self.label, *self.attributes, self.caption)
        return list(dict.fromkeys(column for column in named if column is not None))


NO_COLUMNS = Columns()


class Source:
    """Images in a fixed sequence; `split` is "train" or "test".

    Validation images are the test split where nothing is named test; where the source has neither, an
    image's name decides whether it is among the share `test_fraction` that is held out.
    """

    columns = NO_COLUMNS
    test_fraction = 0.1

    @cached_property
    def _parts(self) -> Parts:
        raise NotImplementedError

    def _read(self, part: str) -> Iterable[Item]:
        """Every item of a part."""
        raise NotImplementedError

    def image(self, name: str) -> Any:
        """The image of the item of this name, as `load_image` takes it, or a BadImage; in any process."""
        raise NotImplementedError

    def _names(self, part: str, column: str) -> list[str] | None:
        """The class names that the part's description gives to the numbers in a column."""
        return None

    def stats(self) -> listing.Stats:
        """Sizes and times (or hashes) of the files that are read; empty if nothing is known of them."""
        return {}

    @cached_property
    def _splits(self) -> dict[str, list[str]]:
        """Parts of the splits train and test, or of "all" where names decide item by item."""
        train, test = self._parts["train"], self._parts.get("test") or self._parts.get("validation")
        return {"train": train, "test": test} if test else {"all": train}

    @cached_property
    def items(self) -> dict[str, list[Item]]:
        """The items of the splits train and test; the same ones in the same sequence every time."""
        found = {s: [x for part in parts for x in self._read(part)] for s, parts in self._splits.items()}
        if (whole := found.pop("all", None)) is not None:
            held_out = listing.held_out([item.name for item in whole], self.test_fraction)
            for split in ("train", "test"):
                found[split] = [x for x, out in zip(whole, held_out, strict=True) if out == (split == "test")]
        return found

    @property
    def has_test_split(self) -> bool:
        """Whether the source itself says which images are for testing."""
        return "all" not in self._splits

    def count(self, split: str) -> int:
        """How many items the split has."""
        return len(self.items[split])

    def classes(self) -> list[str]:
        """Class names, in the source's sequence if it has one; empty if the images have no classes."""
        return self._values(self.columns.label, (item.label for item in self.items["train"]))

    def attributes(self) -> dict[str, list[str]]:
        """Names of further attributes, and the values of each in the train split or in the source's list."""
        items, named = self.items["train"], enumerate(self.columns.attributes)
        return {column: self._values(column, (item.attributes[i] for item in items)) for i, column in named}

    def _values(self, column: str | None, found: Iterable[str | None]) -> list[str]:
        """In the sequence of the source's own list, with those that do not occur, where it has one."""
        parts = [part for parts in self._splits.values() for part in parts] if column else []
        lists = {part: self._names(part, column or "") for part in parts}
        names = next(iter(lists.values()), None)
        for part, others in lists.items():
            same = f"{parts[0]} and {part} list other classes for {column!r}: use one of them"
            require(others == names, same)
        return names or in_sequence(value for value in found if value)

    def ignored(self) -> dict[str, list[str]]:
        """Reason -> names of entries that are no items."""
        used = {part for parts in self._splits.values() for part in parts}
        return {"beside the splits": [p for parts in self._parts.values() for p in parts if p not in used]}


def open_source(where: str | Path, columns: Columns = NO_COLUMNS, test_fraction: float = 0.1) -> Source:
    """The source at `where`: a folder of images, parquet file(s), tar shard(s), or a Hugging Face or own set.

    Args:
        where: a path, an id such as "user/name", an address of parquet files such as
            "hf://datasets/user/name", or of an own data set package.module:Name.
        columns: what is read from parquet files, tar shards and Hugging Face data sets.
        test_fraction: share in [0, 1) of the images that become the test split where the source has none, at
            least one image.

    Raises:
        FileNotFoundError: `where` is neither a path nor an id.
        ValueError: `test_fraction` is out of range, a column was named for an image folder, or `where` is
            not what it has to be.
    """
    from anyorder.data.tables import HubSource, ParquetSource, RemoteSource
    from anyorder.data.tars import TarSource

    require(0 <= test_fraction < 1, f"test_fraction must be at least 0 and below 1, got {test_fraction}")
    if families.is_own("data", str(where)):
        mend = "leave out image, label, captions and attributes"
        require(columns == NO_COLUMNS, f"{where} has no columns: {mend}")
        return OwnSource(str(where), test_fraction)
    if "://" in str(where):
        return RemoteSource(str(where), columns, test_fraction)
    path = expanded(where)
    if path.is_file():
        kinds: dict[str, Any] = {".tar": TarSource, ".parquet": ParquetSource}
        text = f"{where} is no parquet file and no tar file without compression: unpack it into a folder"
        require(path.suffix.lower() in kinds, text)
        return kinds[path.suffix.lower()](path, columns, test_fraction)
    if not path.is_dir():
        if path.exists() or str(where).count("/") > 1 or str(where).startswith((".", "/", "~")):
            raise FileNotFoundError(f"{where}: no such file or folder")
        return HubSource(str(where), columns, test_fraction)
    endings = {Path(name).suffix.lower() for name in listing.list_files(path).files}
    if ".parquet" in endings:
        return ParquetSource(path, columns, test_fraction)
    if ".tar" in endings and not endings & suffixes():
        return TarSource(path, columns, test_fraction)
    known = columns.caption in (None, SIDECAR, LINES) or str(columns.caption).endswith(JSONL)
    require(
        known and columns == Columns(caption=columns.caption),
        f"{where} is an image folder: it has no columns, and its classes are its subfolders; leave out "
        f"image, label and attributes, or put the images into parquet files; captions={SIDECAR} reads the "
        f"text of a.{SIDECAR} beside a.jpg, captions={LINES} a caption from each of its lines, and "
        f"captions=NAME{JSONL} files of JSON lines",
    )
    return FolderSource(path, test_fraction, columns)


@dataclass(frozen=True)
class FolderSource(Source):
    """Images below a folder, in folders of classes and splits as `listing.split_and_class` knows them."""

    path: Path
    test_fraction: float = 0.1
    columns: Columns = NO_COLUMNS

    @cached_property
    def captions(self) -> dict[str, Path]:
        """Name of each image that has a text file beside it -> that file."""
        files = {name: (self.path / name).with_suffix(f".{SIDECAR}") for name in self._found[0]}
        return {name: file for name, file in files.items() if file.is_file()}

    @cached_property
    def _found(self) -> tuple[dict[str, tuple[str | None, str | None]], dict[str, list[str]]]:
        """Name of each image -> split and class, and what is ignored."""
        found, known = listing.list_files(self.path), suffixes()
        names: list[str] = []
        for name in found.files:
            suffix = Path(name).suffix.lower()
            unknown = BESIDE if suffix in SIDECARS else UNKNOWN
            (names if suffix in known else found.ignored[unknown]).append(name)
        if not names:
            others = ", ".join(f"{len(v)} x {reason}" for reason, v in found.ignored.items() if v)
            kinds = "files with a suffix such as .jpg, .png, .webp"
            raise FileNotFoundError(f"{self.path} holds no images ({kinds}), but {others or 'nothing'}")
        return dict(zip(names, listing.split_and_class(names), strict=True)), found.ignored

    @cached_property
    def _parts(self) -> Parts:
        parts: Parts = defaultdict(list)
        for name, (split, _) in self._found[0].items():
            parts[split].append(name)
        return parts

    def _read(self, part: str) -> Iterable[Item]:
        yield Item(self._found[0][part][1], part, caption=self._caption(part))

    def _caption(self, name: str) -> str | None:
        asked = self.columns.caption
        if asked and asked.endswith(JSONL):
            return joined(self._described[name]) if name in self._described else None
        if asked is None or name not in self.captions:
            return None
        text = decoded(self.captions[name].read_bytes())
        return joined(text.splitlines() if asked == LINES else [text])

    @cached_property
    def _texts(self) -> list[str]:
        """Names of the files that hold the captions."""
        asked = self.columns.caption
        if not asked or asked.endswith(JSONL):
            return [name for name in self._found[1][BESIDE] if asked and f"/{name}".endswith(f"/{asked}")]
        return [file.relative_to(self.path).as_posix() for file in self.captions.values()]

    @cached_property
    def _described(self) -> dict[str, list[str]]:
        """Name of each image of the files of JSON lines -> its captions.

        Raises:
            ValueError: there is no such file, or a line is not what it has to be.
        """
        require(bool(self._texts), f"{self.path} has no file {self.columns.caption}: name one that is there")
        found: dict[str, list[str]] = defaultdict(list)
        for file in self._texts:
            for number, line in enumerate(decoded((self.path / file).read_bytes()).split("\n"), 1):
                if line.strip():
                    name, captions = _described(line, f"{self.path / file}, line {number}")
                    found[posixpath.normpath(f"{posixpath.dirname(file) or '.'}/{name}")] += captions
        return found

    def image(self, name: str) -> Path:
        """See `Source`."""
        return self.path / name

    def ignored(self) -> dict[str, list[str]]:
        """See `Source`."""
        ignored = self._found[1] | super().ignored()
        if self.columns.caption:
            read = {*self._texts}
            ignored[BESIDE] = [name for name in ignored.get(BESIDE, ()) if name not in read]
        if str(self.columns.caption).endswith(JSONL):
            ignored["caption of no image"] = [name for name in self._described if name not in self._found[0]]
        return ignored

    def stats(self) -> listing.Stats:
        """See `Source`."""
        names = [item.name for items in self.items.values() for item in items]
        return listing.stats(self.path, names + self._texts)


def decoded(text: bytes, errors: str = "replace") -> str:
    """A text in UTF-8, or in UTF-16 with a byte order mark."""
    encoding = "utf-16" if text[:2] in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE) else "utf-8-sig"
    return text.decode(encoding, errors)


def _described(line: str, where: str) -> tuple[str, list[str]]:
    """Image and captions of a JSON line; a ValueError says what it has to be."""
    try:
        found = json.loads(line)
    except (ValueError, RecursionError):
        found = None
    found = found if isinstance(found, dict) else {}
    name, text = found.get(NAME), next((found[key] for key in TEXTS if key in found), None)
    texts = text if isinstance(text, list) else [text]
    shape = f'{{"{NAME}": "a.jpg", "{TEXTS[0]}": "..."}}, or a list "{TEXTS[-1]}"'
    fits = all(isinstance(each, str) for each in (name, *texts))
    require(fits, f"{where} is {line[:60]!r}, and not such as {shape}")
    return str(name), [str(each) for each in texts]


@dataclass(frozen=True)
class OwnSource(Source):
    """A `torch.utils.data.Dataset` that users bring, made by a function or class without parameters.

    Its items are (image, label, caption) or the first of these: an image as `load_image` takes it, or a
    tensor (3, H, W) in [0, 1], see `_clamped`; None is no label, a whole number one of its `classes`, if it
    has these. {"train": ..., "test": ...} of such data sets is a split.
    """

    name: str
    test_fraction: float = 0.1

    @cached_property
    def columns(self) -> Columns:  # type: ignore[override]
        """What any training item has."""
        items = self.items["train"]
        label, caption = any(i.label for i in items), any(i.caption is not None for i in items)
        return Columns("label" if label else None, "caption" if caption else None)

    @cached_property
    def _sets(self) -> dict[str, Any]:
        made = families.resolve("data", self.name)()
        sets = made if isinstance(made, dict) else {"train": made}
        fits = all(hasattr(one, "__len__") for one in sets.values()) and len(sets.get("train", ())) > 0
        text = f"{self.name} must return a data set with a length, or {{'train': ..., 'test': ...}} of such"
        require(fits, f"{text}, and training images")
        return sets

    @cached_property
    def _parts(self) -> Parts:
        return {part: [part] for part in self._sets}

    def _names(self, part: str, column: str) -> list[str] | None:
        classes = getattr(self._sets[part], "classes", None) if column == "label" else None
        return None if classes is None else list(map(str, classes))

    def _read(self, part: str) -> Iterable[Item]:
        return (self._item(part, i)[1] for i in range(len(self._sets[part])))

    def image(self, name: str) -> Any:
        """See `Source`."""
        part, _, number = name.rpartition(" ")
        return self._item(part, int(number))[0]

    def _item(self, part: str, i: int) -> tuple[Any, Item]:
        found, classes = self._sets[part][i], self._names(part, "label")
        given = [*found, None, None] if isinstance(found, (tuple, list)) else [found, None, None]
        image, label, caption = given[:3]
        if isinstance(image, Tensor):
            image = _clamped(image.detach().movedim(0, -1).cpu().numpy(), strict=True)
        elif isinstance(image, np.ndarray):
            image = _clamped(image, strict=False)
        if hasattr(label, "item"):  # of torch or NumPy
            text = f"{self.name}: label {label} of item {i} of {part}: give a name or one whole number"
            require(math.prod(label.shape) == 1, text)
            label = label.item()
        if classes and label is not None and not isinstance(label, str):  # -1 is none, as in Hugging Face's
            text = f"{self.name}: label {label} of item {i} of {part}; classes has {len(classes)} names"
            require(-1 <= int(label) < len(classes), text)
            label = classes[int(label)] if int(label) >= 0 else None
        label = None if label is None else str(label)
        caption = joined([caption] if isinstance(caption, str) else caption) if caption is not None else None
        return image, Item(label, f"{part} {i}", caption=caption)


def _clamped(image: np.ndarray, strict: bool) -> np.ndarray | BadImage:
    """Floats in [0, 1] where they overshoot a little, as resizing makes them; `strict` refuses all others."""
    if image.dtype.kind != "f":
        return image
    low, high = image.min(initial=0), image.max(initial=0)
    if low >= -0.5 and high <= 1.5:
        return image.clip(0, 1)
    detail = f"a tensor of floats from {low:g} to {high:g}: bring it to [0, 1], or make it uint8"
    return BadImage("values outside [0, 1]", detail) if strict else image
