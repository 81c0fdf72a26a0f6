"""Where images come from: a folder, parquet files, or a Hugging Face data set."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from anyorder import families
from anyorder.contracts import require
from anyorder.data import listing
from anyorder.data.classes import in_sequence
from anyorder.data.images import suffixes

SIDECARS = {".txt", ".json", ".jsonl", ".csv", ".tsv", ".xml", ".md", ".yaml", ".yml", ".html", ".log", ".py"}
"""Files that are expected beside images; other unknown files may be images that cannot be read."""
UNKNOWN, BESIDE = "unknown suffix", "text beside the images"
SIDECAR = "txt"
"""Ending of the files that hold captions, one beside each image of a folder."""
Parts = dict[str | None, list[str]]
"""One of train, test and validation, or None for no split -> names of the files or tables of images."""


class Item(NamedTuple):
    """One image, not yet decoded."""

    image: Any  # as `load_image` takes it, or a BadImage
    label: str | None
    name: str  # unique in the source; also decides the split where there is none
    attributes: tuple[str | None, ...] = ()  # value of each of the source's attributes
    caption: str | None = None


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

    def _read(self, part: str, with_images: bool) -> Iterator[Item]:
        """Every item of a part; images are empty if not asked for."""
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
    def _held_out(self) -> dict[str, bool]:
        """Name of each item of "all" -> whether it is in the test split."""
        names = [item.name for part in self._splits["all"] for item in self._read(part, False)]
        return dict(zip(names, listing.held_out(names, self.test_fraction), strict=True))

    def items(self, split: str, with_images: bool = True) -> Iterator[Item]:
        """The items of a split; the same ones in the same sequence every time."""
        whole = "all" in self._splits
        for part in self._splits["all" if whole else split]:
            for item in self._read(part, with_images):
                if not whole or self._held_out[item.name] == (split == "test"):
                    yield item

    @cached_property
    def _texts(self) -> dict[str, list[Item]]:
        """The items without their images."""
        return {split: list(self.items(split, with_images=False)) for split in ("train", "test")}

    @property
    def has_test_split(self) -> bool:
        """Whether the source itself says which images are for testing."""
        return "all" not in self._splits

    def count(self, split: str) -> int:
        """How many items the split has."""
        return len(self._texts[split])

    def classes(self) -> list[str]:
        """Class names, in the source's sequence if it has one; empty if the images have no classes."""
        return self._values(self.columns.label, (item.label for item in self._texts["train"]))

    def attributes(self) -> dict[str, list[str]]:
        """Names of further attributes, and the values of each in the train split or in the source's list."""
        items, named = self._texts["train"], enumerate(self.columns.attributes)
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
    """The source at `where`: a folder of images, parquet file(s), a Hugging Face data set, or an own one.

    Args:
        where: a path, an id such as "user/name", or of an own data set package.module:Name.
        columns: what is read from parquet files and Hugging Face data sets.
        test_fraction: share in [0, 1) of the images that become the test split where the source has none, at
            least one image.

    Raises:
        FileNotFoundError: `where` is neither a path nor an id.
        ValueError: `test_fraction` is out of range, a column was named for an image folder, or `where` is
            not what it has to be.
    """
    from anyorder.data.tables import HubSource, ParquetSource

    require(0 <= test_fraction < 1, f"test_fraction must be at least 0 and below 1, got {test_fraction}")
    if families.is_own("data", str(where)):
        mend = "leave out image, label, captions and attributes"
        require(columns == NO_COLUMNS, f"{where} has no columns: {mend}")
        return OwnSource(str(where), test_fraction)
    path = Path(where).expanduser()
    if path.is_file():
        return ParquetSource(path, columns, test_fraction)
    if not path.is_dir():
        if path.exists() or str(where).count("/") > 1 or str(where).startswith((".", "/", "~")):
            raise FileNotFoundError(f"{where}: no such file or folder")
        return HubSource(str(where), columns, test_fraction)
    if any(name.endswith(".parquet") for name in listing.list_files(path).files):
        return ParquetSource(path, columns, test_fraction)
    require(
        columns in (NO_COLUMNS, Columns(caption=SIDECAR)),
        f"{where} is an image folder: it has no columns, and its classes are its subfolders; leave out "
        f"image, label and attributes, or put the images into parquet files; captions={SIDECAR} reads the "
        f"text of a.{SIDECAR} beside a.jpg",
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

    def _read(self, part: str, with_images: bool) -> Iterator[Item]:
        caption = None
        if self.columns.caption and part in self.captions:
            caption = " ".join(self.captions[part].read_text(encoding="utf-8", errors="replace").split())
        yield Item(self.path / part, self._found[0][part][1], part, caption=caption)

    def ignored(self) -> dict[str, list[str]]:
        """See `Source`."""
        ignored = self._found[1] | super().ignored()
        if self.columns.caption:
            read = {text.relative_to(self.path).as_posix() for text in self.captions.values()}
            ignored[BESIDE] = [name for name in ignored.get(BESIDE, ()) if name not in read]
        return ignored

    def stats(self) -> listing.Stats:
        """See `Source`."""
        names = [item.name for items in self._texts.values() for item in items]
        texts = self.captions.items() if self.columns.caption else ()
        known = {*names}
        names += [text.relative_to(self.path).as_posix() for name, text in texts if name in known]
        return listing.stats(self.path, names)


@dataclass(frozen=True)
class OwnSource(Source):
    """A `torch.utils.data.Dataset` that users bring, made by a function or class without parameters.

    Its items are (image, label, caption) or the first of these: an image as `load_image` takes it, or a
    tensor (3, H, W) in [0, 1]; None is no label, a whole number one of its `classes`, if it has these.
    {"train": ..., "test": ...} of such data sets is a split.
    """

    name: str
    test_fraction: float = 0.1

    @cached_property
    def columns(self) -> Columns:  # type: ignore[override]
        """What the first item has."""
        first = next(self._items("train"))
        return Columns("label" if first.label else None, "caption" if first.caption is not None else None)

    @cached_property
    def _sets(self) -> dict[str, Any]:
        made = families.resolve("data", self.name)()
        return made if isinstance(made, dict) else {"train": made}

    @cached_property
    def _parts(self) -> Parts:
        return {part: [part] for part in self._sets}

    def _names(self, part: str, column: str) -> list[str] | None:
        classes = getattr(self._sets[part], "classes", None) if column == "label" else None
        return None if classes is None else list(map(str, classes))

    @cached_property
    def _texts_of(self) -> dict[str, list[Item]]:
        """The items of each part without their images, which may be slow to make."""
        return {part: [item._replace(image=b"") for item in self._items(part)] for part in self._sets}

    def _read(self, part: str, with_images: bool) -> Iterator[Item]:
        return self._items(part) if with_images else iter(self._texts_of[part])

    def _items(self, part: str) -> Iterator[Item]:
        data, classes = self._sets[part], self._names(part, "label")
        for i in range(len(data)):
            found: Any = data[i]
            given = [*found, None, None] if isinstance(found, (tuple, list)) else [found, None, None]
            image, label, caption = given[:3]
            if isinstance(image, Tensor):
                image = image.movedim(0, -1).cpu().numpy()
            if label is not None:
                label = classes[int(label)] if classes and not isinstance(label, str) else str(label)
            yield Item(image, label, f"{part} {i}", caption=caption)
