"""Where images come from: a folder, parquet files, or a Hugging Face data set."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

_TEST_NAMES = ("test", "validation", "val")
Row = tuple[dict[str, Any] | None, dict[str, str | None]]
"""Image struct, and the text of each column that is read."""


class Item(NamedTuple):
    """One image, not yet decoded."""

    image: bytes | Path
    label: str | None
    name: str
    """Unique in its source; also decides the split where the source has none."""
    attributes: tuple[str | None, ...] = ()
    """Value of each of the source's attributes, None where it has none."""
    caption: str | None = None


class Source(Protocol):
    """Images in a fixed sequence; `split` is "train" or "test"."""

    @property
    def captioned(self) -> bool:
        """Whether its items have captions."""
        ...

    def classes(self) -> list[str]:
        """Sorted class names of the train split; empty if the images have no classes."""
        ...

    def attributes(self) -> dict[str, list[str]]:
        """Names of further attributes, and the sorted values of each in the train split."""
        ...

    def count(self, split: str) -> int:
        """How many items the split has."""
        ...

    def items(self, split: str) -> Iterator[Item]:
        """The items of a split; the same ones in the same sequence every time."""
        ...


def open_source(
    where: str | Path,
    label_column: str | None = None,
    test_fraction: float = 0.1,
    caption_column: str | None = None,
    attribute_columns: tuple[str, ...] = (),
) -> Source:
    """The source at `where`: a folder of images, parquet file(s), or a Hugging Face data set id.

    Args:
        where: a path, or an id such as "user/name".
        label_column: column of the class names in parquet files and Hugging Face data sets; None for no
            classes. The classes of an image folder are its subfolders.
        test_fraction: share in [0, 1) of the images that become the test split where the source has none;
            an image's name alone decides where it goes.
        caption_column: column of a text about each image; None for no captions.
        attribute_columns: columns of further attributes.

    Raises:
        FileNotFoundError: `where` is neither a path nor an id, or an empty folder.
        ValueError: `test_fraction` is out of range, or a column was asked of an image folder.
    """
    if not 0 <= test_fraction < 1:
        raise ValueError(f"test_fraction must be at least 0 and below 1, got {test_fraction}")
    path = Path(where)
    if path.is_file():
        return ParquetSource(path, label_column, test_fraction, caption_column, attribute_columns)
    if not path.is_dir():
        if str(where).count("/") > 1 or str(where).startswith((".", "/", "~")):
            raise FileNotFoundError(f"{where}: no such file or folder")
        return HubSource(str(where), label_column, test_fraction, caption_column, attribute_columns)
    if any(path.rglob("*.parquet")):
        return ParquetSource(path, label_column, test_fraction, caption_column, attribute_columns)
    if label_column is not None:
        raise ValueError(
            f"{where} is an image folder, its classes are its subfolders: leave out label_column"
        )
    if caption_column is not None or attribute_columns:
        raise ValueError(
            f"{where} is an image folder, it has no columns: leave out captions and attributes, "
            "or put the images into parquet files"
        )
    return FolderSource(path, test_fraction)


def _in_split(name: str, split: str, test_fraction: float) -> bool:
    digest = hashlib.sha256(os.fsencode(name)).digest()
    is_test = int.from_bytes(digest[:8], "big") < test_fraction * 2**64
    return is_test == (split == "test")


@dataclass(frozen=True)
class FolderSource:
    """Images below a folder; the first folder level names the class.

    Subfolders `train` and `test` (or `validation`, `val`), if both are there, are the splits.
    """

    path: Path
    test_fraction: float = 0.1
    captioned = False

    @cached_property
    def _splits(self) -> dict[str, list[Item]]:
        test = next((name for name in _TEST_NAMES if (self.path / name).is_dir()), None)
        if test and (self.path / "train").is_dir():
            return {"train": _find_images(self.path / "train"), "test": _find_images(self.path / test)}
        items = _find_images(self.path)
        return {s: [i for i in items if _in_split(i.name, s, self.test_fraction)] for s in ("train", "test")}

    def classes(self) -> list[str]:
        """See `Source`."""
        return sorted({item.label for item in self._splits["train"] if item.label is not None})

    def attributes(self) -> dict[str, list[str]]:
        """See `Source`."""
        return {}

    def count(self, split: str) -> int:
        """See `Source`."""
        return len(self._splits[split])

    def items(self, split: str) -> Iterator[Item]:
        """See `Source`."""
        return iter(self._splits[split])


def _find_images(root: Path) -> list[Item]:
    Image.init()
    suffixes = {s for s, name in Image.registered_extensions().items() if name in Image.OPEN}
    names, seen = [], {os.path.realpath(root)}
    for folder, subfolders, files in os.walk(root, followlinks=True):
        names += [os.path.relpath(os.path.join(folder, f), root) for f in files]
        paths = {os.path.realpath(os.path.join(folder, s)): s for s in sorted(subfolders, reverse=True)}
        subfolders[:] = [s for path, s in paths.items() if path not in seen]  # links may lead in circles
        seen |= paths.keys()
    names = sorted(Path(n).as_posix() for n in names if Path(n).suffix.lower() in suffixes)
    if not names:
        raise FileNotFoundError(f"{root} holds no images (files with a suffix such as .jpg, .png, .webp)")
    return [Item(root / n, n.split("/")[0] if "/" in n else None, n) for n in names]


class _TableSource:
    """What tables of images have in common: rows of an image struct and texts, in named parts."""

    label_column: str | None
    test_fraction: float
    caption_column: str | None
    attribute_columns: tuple[str, ...]

    @property
    def _columns(self) -> list[str]:
        """The columns of texts that are read."""
        named = (self.label_column, *self.attribute_columns, self.caption_column)
        return list(dict.fromkeys(column for column in named if column is not None))

    @cached_property
    def _parts(self) -> dict[str, list[str]]:
        """Parts of the splits train and test, or of "all" where names decide row by row."""
        raise NotImplementedError

    def _read(self, part: str, with_images: bool) -> Iterator[Row]:
        """Every row of a part; image structs are empty if not asked for."""
        raise NotImplementedError

    def _folder(self, part: str) -> Path:
        """What the paths of images that lie outside the part are relative to."""
        raise NotImplementedError

    @cached_property
    def _texts(self) -> dict[str, list[Item]]:
        """The items without their images."""
        return {split: list(self._rows(split, with_images=False)) for split in ("train", "test")}

    @property
    def captioned(self) -> bool:
        """See `Source`."""
        return self.caption_column is not None

    def classes(self) -> list[str]:
        """See `Source`."""
        return sorted({item.label for item in self._texts["train"] if item.label is not None})

    def attributes(self) -> dict[str, list[str]]:
        """See `Source`."""
        columns = list(zip(*(item.attributes for item in self._texts["train"]), strict=True))
        columns = columns or [()] * len(self.attribute_columns)
        named = zip(self.attribute_columns, columns, strict=True)
        return {name: sorted({value for value in values if value}) for name, values in named}

    def count(self, split: str) -> int:
        """See `Source`."""
        return len(self._texts[split])

    def items(self, split: str) -> Iterator[Item]:
        """See `Source`."""
        return self._rows(split, with_images=True)

    def _rows(self, split: str, with_images: bool) -> Iterator[Item]:
        by_name = "all" in self._parts
        for part in self._parts["all" if by_name else split]:
            for row, (image, texts) in enumerate(self._read(part, with_images)):
                name = f"{part}#{row}"
                if not by_name or _in_split(name, split, self.test_fraction):
                    label, caption = (
                        texts.get(column or "") for column in (self.label_column, self.caption_column)
                    )
                    attributes = tuple(texts[column] or None for column in self.attribute_columns)
                    yield Item(_image_of(image, self._folder(part)), label, name, attributes, caption)


@dataclass(frozen=True)
class ParquetSource(_TableSource):
    """Parquet files with a Hugging Face `Image` column (a struct of `bytes` and `path`).

    In a folder, files named `train*` and `test*` (or `validation*`, `val*`) are the splits.
    """

    path: Path
    label_column: str | None = None
    test_fraction: float = 0.1
    caption_column: str | None = None
    attribute_columns: tuple[str, ...] = ()

    @cached_property
    def _root(self) -> Path:
        return self.path.parent if self.path.is_file() else self.path

    @cached_property
    def _parts(self) -> dict[str, list[str]]:
        files = [self.path] if self.path.is_file() else sorted(self.path.rglob("*.parquet"))
        named = {name: [f for f in files if f.name.startswith(name)] for name in ("train", *_TEST_NAMES)}
        test = next((named[name] for name in _TEST_NAMES if named[name]), [])
        train = named["train"] or files
        parts = {"train": train, "test": test} if named["train"] and test else {"all": train}
        return {s: [f.relative_to(self._root).as_posix() for f in found] for s, found in parts.items()}

    def _folder(self, part: str) -> Path:
        return (self._root / part).parent

    def _read(self, part: str, with_images: bool) -> Iterator[Row]:
        path = self._root / part
        try:
            with pq.ParquetFile(path) as file:
                schema = file.schema_arrow
                image_column = _image_column(schema, path)
                names = {column: _class_names(schema, column, path) for column in self._columns}
                columns = [image_column] * with_images + self._columns
                for batch in file.iter_batches(batch_size=256, columns=columns):
                    images = batch[image_column].to_pylist() if with_images else [{}] * batch.num_rows
                    values = {column: batch[column].to_pylist() for column in self._columns}
                    for row, image in enumerate(images):
                        yield image, {c: _label_text(values[c][row], names[c]) for c in self._columns}
        except (pa.ArrowException, OSError) as e:
            raise ValueError(f"{path} is not a sound parquet file ({e})") from e


@dataclass(frozen=True)
class HubSource(_TableSource):
    """A Hugging Face data set, by its id; needs the extra `data`."""

    name: str
    label_column: str | None = None
    test_fraction: float = 0.1
    caption_column: str | None = None
    attribute_columns: tuple[str, ...] = ()

    @cached_property
    def _tables(self) -> dict[str, Any]:
        """Tables of undecoded images by split."""
        try:
            import datasets
        except ImportError as e:
            raise ValueError(
                f"{self.name} is no local path, and Hugging Face data sets need: pip install 'anyorder[data]'"
            ) from e
        tables = datasets.load_dataset(self.name)
        for split, table in tables.items():
            for column in self._columns:
                _check_column(column, table.column_names, f"{self.name} ({split})")
        return {s: t.cast_column(_image_feature(t), datasets.Image(decode=False)) for s, t in tables.items()}

    @cached_property
    def _parts(self) -> dict[str, list[str]]:
        train = "train" if "train" in self._tables else next(iter(self._tables))
        test = next((name for name in _TEST_NAMES if name in self._tables and name != train), None)
        return {"train": [train], "test": [test]} if test else {"all": [train]}

    def _folder(self, part: str) -> Path:
        return Path()

    def _read(self, part: str, with_images: bool) -> Iterator[Row]:
        table = self._tables[part]
        names = {column: getattr(table.features[column], "names", None) for column in self._columns}
        image_column = _image_feature(table)
        wanted = [image_column] * with_images + self._columns
        if not wanted:
            yield from [({}, {})] * len(table)
        for row in table.select_columns(wanted) if wanted else ():
            yield row.get(image_column, {}), {c: _label_text(row[c], names[c]) for c in self._columns}


def _class_names(schema: pa.Schema, column: str, path: Path) -> list[str] | None:
    _check_column(column, schema.names, path)
    metadata = json.loads((schema.metadata or {}).get(b"huggingface", b"{}"))
    return metadata.get("info", {}).get("features", {}).get(column, {}).get("names")


def _check_column(column: str, present: list[str], where: str | Path) -> None:
    if column not in present:
        raise ValueError(f"{where} has no column {column!r}; it has {', '.join(present)}")


def _image_column(schema: pa.Schema, path: Path) -> str:
    for field in schema:
        if pa.types.is_struct(field.type) and field.type.get_field_index("bytes") >= 0:
            return field.name
    raise ValueError(f"{path} has no image column (a struct with `bytes`); it has {', '.join(schema.names)}")


def _image_feature(table: Any) -> str:
    for name, feature in table.features.items():
        if type(feature).__name__ == "Image":
            return name
    raise ValueError(f"the data set has no Image column; it has {', '.join(table.features)}")


def _image_of(struct: dict[str, Any] | None, folder: Path) -> bytes | Path:
    struct = struct or {}
    if struct.get("bytes") is None and struct.get("path"):
        return folder / struct["path"]
    return struct.get("bytes") or b""


def _label_text(value: Any, names: list[str] | None) -> str | None:
    """Class name of a label; Hugging Face marks hidden test labels by -1."""
    if names and value is not None:
        return names[value] if value >= 0 else None
    return None if value is None else str(value)
