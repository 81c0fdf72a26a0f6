"""Where images come from: a folder, parquet files, or a Hugging Face data set."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

from anyorder.data import listing
from anyorder.data.classes import in_sequence
from anyorder.data.images import BadImage, suffixes

SIDECARS = {".txt", ".json", ".jsonl", ".csv", ".tsv", ".xml", ".md", ".yaml", ".yml", ".html", ".log", ".py"}
"""Files that are expected beside images; other unknown files may be images that cannot be read."""
UNKNOWN = "unknown suffix"


class Item(NamedTuple):
    """One image, not yet decoded."""

    image: bytes | Path | BadImage
    label: str | None
    name: str
    """Unique in its source; also decides the split where the source has none."""
    attributes: tuple[str | None, ...] = ()
    """Value of each of the source's attributes, None where it has none."""
    caption: str | None = None


class Source:
    """Images in a fixed sequence; `split` is "train" or "test"."""

    captioned = False
    """Whether its items have captions."""

    def classes(self) -> list[str]:
        """Class names, in the source's sequence if it has one; empty if the images have no classes."""
        raise NotImplementedError

    def attributes(self) -> dict[str, list[str]]:
        """Names of further attributes, and the values of each in the train split or in the source's list."""
        return {}

    def count(self, split: str) -> int:
        """How many items the split has."""
        raise NotImplementedError

    def items(self, split: str) -> Iterator[Item]:
        """The items of a split; the same ones in the same sequence every time."""
        raise NotImplementedError

    def ignored(self) -> dict[str, list[str]]:
        """Reason -> names of entries that are no items."""
        return {}

    def stats(self) -> listing.Stats:
        """Sizes and times of the files that are read; empty for a data set that has no files here."""
        return {}


@dataclass(frozen=True)
class Columns:
    """Columns of parquet files and Hugging Face data sets; None for none."""

    label: str | None = None
    """Class of each image."""
    caption: str | None = None
    """Text about each image."""
    attributes: tuple[str, ...] = ()
    """Further attributes."""
    image: str | None = None
    """The image; may be left out where there is one column of images."""

    @property
    def texts(self) -> list[str]:
        """The columns of texts."""
        named = (self.label, *self.attributes, self.caption)
        return list(dict.fromkeys(column for column in named if column is not None))


NO_COLUMNS = Columns()


def open_source(where: str | Path, columns: Columns = NO_COLUMNS, test_fraction: float = 0.1) -> Source:
    """The source at `where`: a folder of images, parquet file(s), or a Hugging Face data set id.

    Args:
        where: a path, or an id such as "user/name".
        columns: what is read from parquet files and Hugging Face data sets.
        test_fraction: share in [0, 1) of the images that become the test split where the source has none, at
            least one image; an image's name alone decides where it goes.

    Raises:
        FileNotFoundError: `where` is neither a path nor an id.
        ValueError: `test_fraction` is out of range, a column was named for an image folder, or `where` is
            not what it has to be.
    """
    from anyorder.data.tables import HubSource, ParquetSource

    if not 0 <= test_fraction < 1:
        raise ValueError(f"test_fraction must be at least 0 and below 1, got {test_fraction}")
    path = Path(where).expanduser()
    if path.is_file():
        return ParquetSource(path, columns, test_fraction)
    if not path.is_dir():
        if path.exists() or str(where).count("/") > 1 or str(where).startswith((".", "/", "~")):
            raise FileNotFoundError(f"{where}: no such file or folder")
        return HubSource(str(where), columns, test_fraction)
    if any(name.endswith(".parquet") for name in listing.list_files(path).files):
        return ParquetSource(path, columns, test_fraction)
    if columns != NO_COLUMNS:
        raise ValueError(
            f"{where} is an image folder: it has no columns, and its classes are its subfolders; leave out "
            "image, label, captions and attributes, or put the images into parquet files"
        )
    return FolderSource(path, test_fraction)


@dataclass(frozen=True)
class FolderSource(Source):
    """Images below a folder; subfolders name the classes, or the splits and in them the classes.

    See `listing.split_and_class`. Validation images are the test split where no folder is named test.
    """

    path: Path
    test_fraction: float = 0.1

    @cached_property
    def _found(self) -> tuple[dict[str, list[Item]], dict[str, list[str]]]:
        """Items by split, and what is ignored."""
        found, known = listing.list_files(self.path), suffixes()
        names: list[str] = []
        ignored = found.ignored
        for name in found.files:
            suffix = Path(name).suffix.lower()
            unknown = "text beside the images" if suffix in SIDECARS else UNKNOWN
            (names if suffix in known else ignored[unknown]).append(name)
        if not names:
            others = ", ".join(f"{len(v)} x {reason}" for reason, v in ignored.items() if v) or "nothing"
            raise FileNotFoundError(
                f"{self.path} holds no images (files with a suffix such as .jpg, .png, .webp), but {others}"
            )
        splits: dict[str | None, list[Item]] = {"train": [], "test": [], "validation": [], None: []}
        for name, (split, label) in zip(names, listing.split_and_class(names), strict=True):
            splits[split].append(Item(self.path / name, label, name))
        unused = splits["validation"] if splits["test"] else []
        ignored |= {"beside the splits": [item.name for item in (*splits[None], *unused)]}
        return self._train_and_test(splits["train"], splits["test"] or splits["validation"]), ignored

    def _train_and_test(self, train: list[Item], test: list[Item]) -> dict[str, list[Item]]:
        if test:
            return {"train": train, "test": test}
        chosen = listing.held_out([item.name for item in train], self.test_fraction)
        pairs = list(zip(train, chosen, strict=True))
        return {split: [i for i, c in pairs if c == (split == "test")] for split in ("train", "test")}

    def classes(self) -> list[str]:
        """See `Source`; by number or alphabet."""
        return in_sequence(item.label for item in self._found[0]["train"] if item.label is not None)

    def count(self, split: str) -> int:
        """See `Source`."""
        return len(self._found[0][split])

    def items(self, split: str) -> Iterator[Item]:
        """See `Source`."""
        return iter(self._found[0][split])

    def ignored(self) -> dict[str, list[str]]:
        """See `Source`."""
        return self._found[1]

    def stats(self) -> listing.Stats:
        """See `Source`."""
        return listing.stats(self.path, (item.name for items in self._found[0].values() for item in items))
