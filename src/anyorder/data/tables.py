"""Tables of images: parquet files and Hugging Face data sets."""

from __future__ import annotations

import contextlib
import json
import math
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from anyorder.contracts import require
from anyorder.data import listing
from anyorder.data.images import BadImage
from anyorder.data.sources import NO_COLUMNS, Columns, Item, Parts, Source


class _TableSource(Source):
    """What tables of images have in common: rows of an image and texts."""

    def _rows(self, part: str, columns: list[str]) -> Iterator[dict[str, Any]]:
        raise NotImplementedError

    def _image_column(self, part: str) -> str:
        raise NotImplementedError

    def _where(self, part: str) -> str:
        """Name of the part in messages."""
        raise NotImplementedError

    @property
    def _root(self) -> Path:
        """The folder that paths of images may not leave."""
        raise NotImplementedError

    def _read(self, part: str, with_images: bool) -> Iterator[Item]:
        columns, where, image = self.columns, self._where(part), self._image_column(part)
        names = {column: self._names(part, column) for column in columns.texts}
        rows = self._rows(part, [image] * with_images + columns.texts)
        for i, row in enumerate(rows):
            texts = {column: _text(row[column], names[column], column, where) for column in columns.texts}
            label, caption = texts.get(columns.label or ""), texts.get(columns.caption or "")
            attributes = tuple(texts[column] or None for column in columns.attributes)
            stored = self._image(row[image], part) if with_images else b""
            yield Item(stored, label or None, f"{part}#{i}", attributes, caption)

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

    def _where(self, part: str) -> str:
        return str(self._root / part)

    @cached_property
    def _parts(self) -> Parts:
        if self.path.is_file():
            return {"train": [self.path.name]}
        splits: Parts = defaultdict(list)
        for name in listing.list_files(self.path).files:
            if name.endswith(".parquet"):
                splits[listing.split_of_file(name)].append(name)
        if "train" not in splits:
            for test in splits["test"] + splits["validation"]:
                raise ValueError(
                    f"{self.path} holds a test split ({test}) and no training split: name its files train*"
                )
            splits["train"] = splits.pop(None)
        return splits

    def stats(self) -> listing.Stats:
        """See `Source`."""
        return listing.stats(self._root, [part for parts in self._parts.values() for part in parts])

    @contextlib.contextmanager
    def _open(self, part: str) -> Iterator[pq.ParquetFile]:
        try:
            with pq.ParquetFile(self._root / part) as file:
                yield file
        except (pa.ArrowException, OSError) as e:
            raise ValueError(f"{self._root / part} is not a sound parquet file ({e})") from e

    def _names(self, part: str, column: str) -> list[str] | None:
        with self._open(part) as file:
            _check_column(column, file.schema_arrow.names, self._where(part))
            return _described(file.schema_arrow, column)

    def _image_column(self, part: str) -> str:
        with self._open(part) as file:
            return _image_column(file.schema_arrow, self.columns.image, self._where(part))

    def _rows(self, part: str, columns: list[str]) -> Iterator[dict[str, Any]]:
        with self._open(part) as file:
            for batch in file.iter_batches(batch_size=256, columns=columns):
                yield from batch.to_pylist()


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
        return {s: t.cast_column(self._image_of(t), undecoded) for s, t in tables.items()}

    @cached_property
    def _parts(self) -> Parts:
        kinds: dict[str | None, str] = {}
        for name in self._tables:
            kinds.setdefault(listing.split_of_file(name), name)
        train = kinds.get("train") or next(iter(self._tables))
        test = next((kinds[k] for k in ("test", "validation") if k in kinds and kinds[k] != train), None)
        others = [name for name in self._tables if name not in (train, test)]
        return {"train": [train], "test": [test] if test else [], None: others}

    @property
    def _root(self) -> Path:
        import datasets

        config = getattr(datasets, "config", None)
        return Path(getattr(config, "HF_CACHE_HOME", "~/.cache/huggingface")).expanduser()

    def _where(self, part: str) -> str:
        return self.name

    def _names(self, part: str, column: str) -> list[str] | None:
        return getattr(self._tables[part].features[column], "names", None)

    def _image_of(self, table: Any) -> str:
        images = [name for name, feature in table.features.items() if type(feature).__name__ == "Image"]
        require(bool(images), f"the data set has no Image column; it has {', '.join(table.features)}")
        return _chosen(self.columns.image, images, self.name)

    def _image_column(self, part: str) -> str:
        return self._image_of(self._tables[part])

    def _rows(self, part: str, columns: list[str]) -> Iterator[dict[str, Any]]:
        table = self._tables[part]
        yield from table.select_columns(columns) if columns else [{}] * len(table)


def _described(schema: pa.Schema, column: str) -> list[str] | None:
    """Class names of a column in the description that the library `datasets` writes."""
    try:
        metadata = json.loads((schema.metadata or {}).get(b"huggingface", b"{}"))
        names = metadata["info"]["features"][column]["names"]
    except (ValueError, KeyError, TypeError):
        return None
    return names if isinstance(names, list) and all(isinstance(name, str) for name in names) else None


def _check_column(column: str, present: list[str], where: str) -> None:
    require(column in present, f"{where} has no column {column!r}; it has {', '.join(present)}")


def _image_column(schema: pa.Schema, asked: str | None, where: str) -> str:
    """A struct with `bytes`; a column of bytes, or of paths if it is asked for, will do."""
    structs = [f.name for f in schema if pa.types.is_struct(f.type) and f.type.get_field_index("bytes") >= 0]
    plain = [f.name for f in schema if pa.types.is_binary(f.type) or pa.types.is_large_binary(f.type)]
    paths = [f.name for f in schema if pa.types.is_string(f.type) or pa.types.is_large_string(f.type)]
    if asked is not None:
        _check_column(asked, schema.names, where)
        return _chosen(asked, structs + plain + paths, where)
    present = ", ".join(schema.names)
    require(bool(structs or plain), f"{where} has no image column (a struct with `bytes`); it has {present}")
    return _chosen(None, structs or plain, where)


def _chosen(asked: str | None, images: list[str], where: str) -> str:
    known = asked is None or asked in images
    require(known, f"column {asked!r} of {where} holds no images; {', '.join(images)} may")
    several = f"{where} has several columns of images: choose image={' or image='.join(images)}"
    require(asked is not None or len(images) == 1, several)
    return asked or images[0]


def _text(value: Any, names: list[str] | None, column: str, where: str) -> str | None:
    """The text of a label, attribute or caption; Hugging Face marks hidden test labels by -1.

    Raises:
        ValueError: the column holds neither texts nor numbers.
    """
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return None
    holds = f"column {column!r} of {where} holds"
    if names and isinstance(value, int):
        require(value < len(names), f"{holds} {value}, it lists {len(names)} classes")
        return names[value] if value >= 0 else None
    if isinstance(value, float) and value.is_integer():  # whole numbers of a column that has gaps
        return str(int(value))
    require(
        isinstance(value, str | int | float),
        f"{holds} {type(value).__name__}, such as {str(value)[:60]}, and not one text or number for each "
        "image: choose another column",
    )
    return str(value)
