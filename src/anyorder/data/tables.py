"""Tables of images: parquet files and Hugging Face data sets."""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from anyorder.data import listing
from anyorder.data.classes import in_sequence
from anyorder.data.images import BadImage
from anyorder.data.sources import NO_COLUMNS, Columns, Item, Source

Row = tuple[Any, dict[str, str | None]]
"""Image as it is stored, and the text of each column that is read."""


class _TableSource(Source):
    """What tables of images have in common: rows of an image and texts, in named parts."""

    columns: Columns
    test_fraction: float

    @cached_property
    def _all(self) -> list[str]:
        """Names of all parts."""
        raise NotImplementedError

    @cached_property
    def _parts(self) -> dict[str, list[str]]:
        """Names of the parts of the splits train and test, or of "all" where names decide row by row."""
        raise NotImplementedError

    def _read(self, part: str, with_images: bool) -> Iterator[Row]:
        """Every row of a part; images are None if not asked for."""
        raise NotImplementedError

    def _names(self, part: str, column: str) -> list[str] | None:
        """The class names that the part's description gives to the numbers in a column."""
        raise NotImplementedError

    @property
    def _root(self) -> Path:
        """The folder that paths of images may not leave."""
        raise NotImplementedError

    @cached_property
    def _texts(self) -> dict[str, list[Item]]:
        """The items without their images."""
        return {split: list(self._rows(split, with_images=False)) for split in ("train", "test")}

    @cached_property
    def _held_out(self) -> dict[str, bool]:
        """Name of each row of the parts "all" -> whether it is in the test split."""
        names = [f"{p}#{row}" for p in self._parts["all"] for row, _ in enumerate(self._read(p, False))]
        return dict(zip(names, listing.held_out(names, self.test_fraction), strict=True))

    @property
    def captioned(self) -> bool:  # type: ignore[override]
        """See `Source`."""
        return self.columns.caption is not None

    def classes(self) -> list[str]:
        """See `Source`."""
        column, items = self.columns.label, self._texts["train"]
        return [] if column is None else self._values(column, (item.label for item in items))

    def attributes(self) -> dict[str, list[str]]:
        """See `Source`."""
        items = self._texts["train"]
        named = enumerate(self.columns.attributes)
        return {column: self._values(column, (item.attributes[i] for item in items)) for i, column in named}

    def _values(self, column: str, found: Iterator[str | None]) -> list[str]:
        """In the sequence of the data set's own list, with those that do not occur, where it has one."""
        parts = [part for parts in self._parts.values() for part in parts]
        names = self._names(parts[0], column)
        for part in parts:
            if self._names(part, column) != names:
                raise ValueError(f"{parts[0]} and {part} list other classes for {column!r}: use one of them")
        return names or in_sequence(value for value in found if value)

    def count(self, split: str) -> int:
        """See `Source`."""
        return len(self._texts[split])

    def items(self, split: str) -> Iterator[Item]:
        """See `Source`."""
        return self._rows(split, with_images=True)

    def ignored(self) -> dict[str, list[str]]:
        """See `Source`."""
        used = {part for found in self._parts.values() for part in found}
        return {"beside the splits": [part for part in self._all if part not in used]}

    def _rows(self, split: str, with_images: bool) -> Iterator[Item]:
        by_name = "all" in self._parts
        for part in self._parts["all" if by_name else split]:
            for row, (image, texts) in enumerate(self._read(part, with_images)):
                name = f"{part}#{row}"
                if not by_name or self._held_out[name] == (split == "test"):
                    label, caption = map(texts.get, (self.columns.label or "", self.columns.caption or ""))
                    attributes = tuple(texts[column] or None for column in self.columns.attributes)
                    yield Item(self._image(image, part), label or None, name, attributes, caption)

    def _image(self, value: Any, part: str) -> bytes | Path | BadImage:
        """Bytes, or a path that does not leave the data's folder: rows may come from anybody."""
        data, path = (value.get("bytes"), value.get("path")) if isinstance(value, dict) else (value, None)
        if isinstance(data, str):
            data, path = None, data
        if data is not None or not path:
            return data or b""
        with contextlib.suppress(ValueError, OSError):  # no path at all, such as one with a zero byte
            file = ((self._root / part).parent / path).resolve()
            if file.is_relative_to(self._root.resolve()):
                return file
        return BadImage("path outside the data", f"{path!r} is not below {self._root}")


@dataclass(frozen=True)
class ParquetSource(_TableSource):
    """Parquet files with a Hugging Face `Image` column (a struct of `bytes` and `path`).

    Files or their folders named like splits (`train*`, `test*`, `val*`, `dev*`, ...) are the splits.
    """

    path: Path
    columns: Columns = NO_COLUMNS
    test_fraction: float = 0.1

    @property
    def _root(self) -> Path:
        return self.path.parent if self.path.is_file() else self.path

    @cached_property
    def _all(self) -> list[str]:
        if self.path.is_file():
            return [self.path.name]
        return [name for name in listing.list_files(self.path).files if name.endswith(".parquet")]

    @cached_property
    def _parts(self) -> dict[str, list[str]]:
        if self.path.is_file():
            return {"all": self._all}
        splits: dict[str | None, list[str]] = {}
        for name in self._all:
            splits.setdefault(listing.split_of_file(name), []).append(name)
        test = splits.get("test") or splits.get("validation")
        if test and "train" not in splits:
            raise ValueError(
                f"{self.path} holds a test split ({test[0]}) and no training split: name its files train*"
            )
        train = splits.get("train") or splits[None]
        return {"train": train, "test": test} if test else {"all": train}

    def stats(self) -> listing.Stats:
        """See `Source`."""
        return listing.stats(self._root, self._all)

    def _names(self, part: str, column: str) -> list[str] | None:
        with self._open(part) as file:
            return _described(file.schema_arrow, column)

    def _open(self, part: str) -> pq.ParquetFile:
        try:
            return pq.ParquetFile(self._root / part)
        except (pa.ArrowException, OSError) as e:
            raise ValueError(f"{self._root / part} is not a sound parquet file ({e})") from e

    def _read(self, part: str, with_images: bool) -> Iterator[Row]:
        path, texts = self._root / part, self.columns.texts
        with self._open(part) as file:
            schema = file.schema_arrow
            image_column = _image_column(schema, self.columns.image, path)
            names = {column: _described(schema, column) for column in texts}
            for column in texts:
                _check_column(column, schema.names, path)
            try:
                for batch in file.iter_batches(batch_size=256, columns=[image_column] * with_images + texts):
                    images = batch[image_column].to_pylist() if with_images else [None] * batch.num_rows
                    values = {column: batch[column].to_pylist() for column in texts}
                    for row, image in enumerate(images):
                        yield image, {c: _text(values[c][row], names[c], c, path) for c in texts}
            except (pa.ArrowException, OSError) as e:
                raise ValueError(f"{path} is not a sound parquet file ({e})") from e


@dataclass(frozen=True)
class HubSource(_TableSource):
    """A Hugging Face data set, by its id; needs the extra `data`."""

    name: str
    columns: Columns = NO_COLUMNS
    test_fraction: float = 0.1

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
            for column in self.columns.texts:
                _check_column(column, table.column_names, f"{self.name} ({split})")
        undecoded = datasets.Image(decode=False)
        return {s: t.cast_column(self._image_feature(t), undecoded) for s, t in tables.items()}

    @cached_property
    def _all(self) -> list[str]:
        return list(self._tables)

    def _image_feature(self, table: Any) -> str:
        images = [name for name, feature in table.features.items() if type(feature).__name__ == "Image"]
        if not images:
            raise ValueError(f"the data set has no Image column; it has {', '.join(table.features)}")
        return _chosen(self.columns.image, images, self.name)

    @cached_property
    def _parts(self) -> dict[str, list[str]]:
        kinds: dict[str | None, str] = {}
        for name in self._tables:
            kinds.setdefault(listing.split_of_file(name), name)
        train = kinds.get("train") or next(iter(self._tables))
        test = next((kinds[k] for k in ("test", "validation") if k in kinds and kinds[k] != train), None)
        return {"train": [train], "test": [test]} if test else {"all": [train]}

    @property
    def _root(self) -> Path:
        import datasets

        config = getattr(datasets, "config", None)
        return Path(getattr(config, "HF_CACHE_HOME", "~/.cache/huggingface")).expanduser()

    def _names(self, part: str, column: str) -> list[str] | None:
        return getattr(self._tables[part].features[column], "names", None)

    def _read(self, part: str, with_images: bool) -> Iterator[Row]:
        table, texts = self._tables[part], self.columns.texts
        names = {column: self._names(part, column) for column in texts}
        image_column = self._image_feature(table)
        read = [image_column] * with_images + texts
        if not read:
            yield from [(None, {})] * len(table)
        for row in table.select_columns(read) if read else ():
            yield row.get(image_column), {c: _text(row[c], names[c], c, self.name) for c in texts}


def _described(schema: pa.Schema, column: str) -> list[str] | None:
    """Class names of a column in the description that the library `datasets` writes."""
    try:
        metadata = json.loads((schema.metadata or {}).get(b"huggingface", b"{}"))
        names = metadata["info"]["features"][column]["names"]
    except (ValueError, KeyError, TypeError):
        return None
    return names if isinstance(names, list) and all(isinstance(name, str) for name in names) else None


def _check_column(column: str, present: list[str], where: str | Path) -> None:
    if column not in present:
        raise ValueError(f"{where} has no column {column!r}; it has {', '.join(present)}")


def _image_column(schema: pa.Schema, asked: str | None, path: Path) -> str:
    """A struct with `bytes`; a column of bytes, or of paths if it is asked for, will do."""
    structs = [f.name for f in schema if pa.types.is_struct(f.type) and f.type.get_field_index("bytes") >= 0]
    plain = [f.name for f in schema if pa.types.is_binary(f.type) or pa.types.is_large_binary(f.type)]
    paths = [f.name for f in schema if pa.types.is_string(f.type) or pa.types.is_large_string(f.type)]
    if asked is not None:
        _check_column(asked, schema.names, path)
        return _chosen(asked, structs + plain + paths, path)
    if structs or plain:
        return _chosen(None, structs or plain, path)
    raise ValueError(f"{path} has no image column (a struct with `bytes`); it has {', '.join(schema.names)}")


def _chosen(asked: str | None, images: list[str], where: str | Path) -> str:
    if asked is not None and asked not in images:
        raise ValueError(f"column {asked!r} of {where} holds no images; {', '.join(images)} may")
    if asked is None and len(images) > 1:
        raise ValueError(f"{where} has several columns of images: choose image={' or image='.join(images)}")
    return asked or images[0]


def _text(value: Any, names: list[str] | None, column: str, where: str | Path) -> str | None:
    """The text of a label, attribute or caption; Hugging Face marks hidden test labels by -1.

    Raises:
        ValueError: the column holds neither texts nor numbers.
    """
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return None
    if names and isinstance(value, int):
        if value >= len(names):
            raise ValueError(f"column {column!r} of {where} holds {value}, it lists {len(names)} classes")
        return names[value] if value >= 0 else None
    if isinstance(value, float) and value.is_integer():  # whole numbers of a column that has gaps
        return str(int(value))
    if isinstance(value, str | int | float):
        return str(value)
    raise ValueError(
        f"column {column!r} of {where} holds {type(value).__name__}, such as {str(value)[:60]}, and not one "
        "text or number for each image: choose another column"
    )
