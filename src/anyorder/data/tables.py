"""Tables of images: parquet files and Hugging Face data sets."""

import contextlib
import hashlib
import json
import math
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import Any, ClassVar

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from anyorder.contracts import require
from anyorder.data import listing, sources
from anyorder.data.images import BadImage


@dataclass(frozen=True)
class Shards(sources.Source):
    """Files of one ending; those named like splits, or in such folders (`train*`, `val*`), are the splits."""

    path: Any  # a file, or a folder of them
    columns: sources.Columns = sources.NO_COLUMNS
    test_fraction: float = 0.1
    ending: ClassVar[str]

    @property
    def _single(self) -> bool:
        return self.path.is_file()

    @property
    def _root(self) -> Any:
        return self.path.parent if self._single else self.path

    def _listed(self) -> list[str]:
        """Names of all files below the folder, or of the single one."""
        return [self.path.name] if self._single else listing.list_files(self.path).files

    @cached_property
    def _parts(self) -> sources.Parts:
        splits: sources.Parts = defaultdict(list)
        names = [name for name in self._listed() if name.lower().endswith(self.ending)]
        if self._single:
            return {"train": names}
        for name in names:
            splits[listing.split_of_file(name)].append(name)
        if "train" not in splits:
            for test in splits["test"] + splits["validation"]:
                mend = "name its files train*"
                raise ValueError(f"{self.path} holds a test split ({test}) and no training split: {mend}")
            splits["train"] = splits.pop(None, [])
        return splits

    def stats(self) -> listing.Stats:
        """See `Source`."""
        return listing.stats(self._root, [part for parts in self._parts.values() for part in parts])


@dataclass(frozen=True)
class ParquetSource(Shards):
    """Parquet files with a Hugging Face `Image` column (a struct of `bytes` and `path`)."""

    ending = ".parquet"

    @contextlib.contextmanager
    def _open(self, part: str, footer: Any = None) -> Iterator[pq.ParquetFile]:
        try:
            with pq.ParquetFile(self._file(part), metadata=footer) as file:
                yield file
        except (pa.ArrowException, OSError) as e:
            raise ValueError(f"{self._root / part} is not a sound parquet file ({e})") from e

    def _names(self, part: str, column: str) -> list[str] | None:
        with self._open(part) as file:
            _check_column(column, file.schema_arrow.names, self._root / part)
            return _described(file.schema_arrow, column)

    def _read(self, part: str) -> Iterable[sources.Item]:
        path = self._root / part
        with self._open(part) as file:
            _image_column(file.schema_arrow, self.columns.image, path)  # or refuse
            batches = file.iter_batches(batch_size=256, columns=self.columns.texts)
            yield from _items(self, (row for batch in batches for row in batch.to_pylist()), part, path)

    def _file(self, part: str) -> Any:
        """What pyarrow reads a part from."""
        return self._root / part

    def stats(self) -> listing.Stats:
        """See `Source`: of the files, and of those that rows name in place of images."""
        parts = super().stats()
        return parts | {name: stat for part in parts for name, stat in self._named(part).items()}

    def _named(self, part: str) -> listing.Stats:
        with self._open(part) as file:
            schema, facts = file.schema_arrow, file.metadata
            image = _image_column(schema, self.columns.image, self._root / part)
            groups = [facts.row_group(i) for i in range(facts.num_row_groups)]
            chunks = [group.column(i) for group in groups for i in range(facts.num_columns)]
            held = [chunk.statistics for chunk in chunks if chunk.path_in_schema == f"{image}.bytes"]
            if _is_bytes(schema.field(image)) or (held and all(s and s.null_count == 0 for s in held)):
                return {}
            rows = file.read(columns=[f"{image}.path" if held else image]).to_pylist()
        root = self._root.resolve()
        found = [_image(row.get(image), part, self._root) for row in rows]
        return listing.stats(root, [str(p.relative_to(root)) for p in found if isinstance(p, Path)])

    @cached_property
    def _last(self) -> dict[str, Any]:
        """What was read last: a part, its footer, first row and images of a row group."""
        return {"part": None}

    def image(self, name: str) -> Any:
        """See `Source`; reads a whole row group, which is kept for the next call."""
        part, _, number = name.rpartition("#")
        row, last = int(number), self._last
        if last["part"] != part or not last["begin"] <= row < last["begin"] + len(last["images"]):
            last |= self._group(part, row)
        return _image(last["images"][row - last["begin"]].as_py(), part, self._root)

    def _group(self, part: str, row: int) -> dict[str, Any]:
        """The row group that holds a row."""
        with self._open(part, self._last["footer"] if self._last["part"] == part else None) as file:
            groups = (file.metadata.row_group(i).num_rows for i in range(file.num_row_groups))
            begins = np.cumsum([0, *groups])
            found = int(np.searchsorted(begins, row, side="right")) - 1
            gone = f"{self._root / part} has {begins[-1]} rows, no row {row}: run data again"
            require(row < begins[-1], gone)
            image = _image_column(file.schema_arrow, self.columns.image, self._root / part)
            images = file.read_row_group(found, columns=[image]).column(0)
            return {"part": part, "footer": file.metadata, "begin": int(begins[found]), "images": images}


@dataclass(frozen=True)
class RemoteSource(ParquetSource):
    """Parquet files at an address that fsspec knows, such as hf://datasets/USER/NAME, read where they are."""

    path: str

    @property
    def _single(self) -> bool:
        return self.path.endswith(self.ending)

    @cached_property
    def _root(self) -> PurePosixPath:
        root = PurePosixPath(fsspec.core.url_to_fs(self.path)[1])
        return root.parent if self._single else root

    def _listed(self) -> list[str]:
        try:
            system, root = fsspec.core.url_to_fs(self.path)
            found = [str(PurePosixPath(name).relative_to(self._root)) for name in system.find(root)]
        except (OSError, ValueError, ImportError) as e:
            raise ValueError(f"{self.path} cannot be listed ({e}): check the address and the network") from e
        named = any(name.endswith(self.ending) for name in found)
        require(named, f"{self.path} holds no parquet files: give the address of some, or download the data")
        return sorted(found)

    def _file(self, part: str) -> Any:
        return fsspec.core.url_to_fs(self.path)[0].open(str(self._root / part))

    def stats(self) -> listing.Stats:
        """See `Source`: sizes, and hashes of what is known of a file's version; {} if it is out of reach."""
        try:
            parts = [part for parts in self._parts.values() for part in parts]
            system, _ = fsspec.core.url_to_fs(self.path)
            found = {part: system.info(str(self._root / part)) for part in parts}
        except (OSError, ValueError):
            return {}
        return {part: (facts["size"], _version(facts)) for part, facts in found.items()}


def _version(facts: dict[str, Any]) -> int:
    known = [str(facts.get(key)) for key in ("blob_id", "ETag", "etag", "mtime", "last_modified", "created")]
    return int(hashlib.sha256(" ".join(known).encode()).hexdigest()[:12], 16)


@dataclass(frozen=True)
class HubSource(sources.Source):
    """A Hugging Face data set, by its id; needs the extra `data`."""

    name: str
    columns: sources.Columns = sources.NO_COLUMNS
    test_fraction: float = 0.1

    @cached_property
    def _tables(self) -> dict[str, Any]:
        """Tables of undecoded images by split."""
        try:
            import datasets
        except ImportError as e:
            need = "Hugging Face data sets need: pip install 'anyorder[data]'"
            raise ValueError(f"{self.name} is no local path, and {need}") from e
        tables = datasets.load_dataset(self.name)
        for split, table in tables.items():
            for column in self.columns.texts:
                _check_column(column, table.column_names, f"{self.name} ({split})")
        undecoded = datasets.Image(decode=False)
        return {s: t.cast_column(self._image_of(t), undecoded) for s, t in tables.items()}

    @cached_property
    def _parts(self) -> sources.Parts:
        kinds: dict[str | None, str] = {}
        for name in self._tables:
            kinds.setdefault(listing.split_of_file(name), name)
        train = kinds.get("train") or next(iter(self._tables))
        test = next((kinds[k] for k in ("test", "validation") if k in kinds and kinds[k] != train), None)
        others = [name for name in self._tables if name not in (train, test)]
        return {"train": [train], "test": [test] if test else [], None: others}

    def stats(self) -> listing.Stats:
        """See `Source`: of the downloaded files, whose addresses hold the revision; {} if it is not known."""
        try:
            tables = self._tables.values()
        except (OSError, ValueError):  # the hub is out of reach: reading the images will say so
            return {}
        found = [getattr(table, "info", None) for table in tables]
        sums = [(info and info.download_checksums) or {} for info in found]
        return {
            name: (facts.get("num_bytes") or -1, int((facts.get("checksum") or "0")[:12], 16))
            for each in sums
            for name, facts in each.items()
        }

    @property
    def _root(self) -> Path:
        import datasets

        config = getattr(datasets, "config", None)
        return Path(getattr(config, "HF_CACHE_HOME", "~/.cache/huggingface")).expanduser()

    def _names(self, part: str, column: str) -> list[str] | None:
        return getattr(self._tables[part].features[column], "names", None)

    def _image_of(self, table: Any) -> str:
        images = [name for name, feature in table.features.items() if type(feature).__name__ == "Image"]
        require(bool(images), f"the data set has no Image column; it has {', '.join(table.features)}")
        return _chosen(self.columns.image, images, self.name)

    def _read(self, part: str) -> Iterable[sources.Item]:
        columns, table = self.columns.texts, self._tables[part]
        rows = table.select_columns(columns) if columns else [{}] * len(table)
        return _items(self, rows, part, self.name)

    def image(self, name: str) -> Any:
        """See `Source`."""
        part, _, row = name.rpartition("#")
        table = self._tables[part]
        return _image(table[int(row)].get(self._image_of(table)), part, self._root)


def _items(
    source: Any, rows: Iterable[dict[str, Any]], part: str, where: str | Path
) -> Iterator[sources.Item]:
    """The items of a part of a source."""
    names = {column: source._names(part, column) for column in source.columns.texts}
    return (item_of(source.columns, row, names, where, f"{part}#{i}") for i, row in enumerate(rows))


def item_of(
    columns: sources.Columns,
    row: Mapping[str, Any],
    names: Mapping[str, list[str] | None],
    where: str | Path,
    name: str,
) -> sources.Item:
    """The item of a row of texts, class numbers (see `names`), and captions, which may be lists."""
    captions = row.get(columns.caption or "")
    several = isinstance(captions, list | tuple) and all(isinstance(text, str) for text in captions)
    row = {**row, str(columns.caption): sources.joined(captions or ())} if several else row
    texts = {c: _text(row.get(c), names.get(c), c, where) for c in columns.texts}
    caption = texts.get(columns.caption or "")
    caption = " ".join(caption.splitlines()) if caption and not several else caption
    attributes = tuple(texts[column] or None for column in columns.attributes)
    return sources.Item(texts.get(columns.label or "") or None, name, attributes, caption)


def _image(value: Any, part: str, root: Path) -> bytes | Path | BadImage:
    """Bytes, or a path that does not leave the data's folder: rows may come from anybody."""
    data, path = (value.get("bytes"), value.get("path")) if isinstance(value, dict) else (value, None)
    if isinstance(data, str):
        data, path = None, data
    if data is not None or not path:
        return data or b""
    # No path at all, such as one with a zero byte, or a root that is no folder of this machine.
    with contextlib.suppress(ValueError, OSError, AttributeError):
        file = ((root / part).parent / path).resolve()
        if file.is_relative_to(root.resolve()):
            return file
    return BadImage("path outside the data", f"{path!r} is not below {root}")


def _described(schema: pa.Schema, column: str) -> list[str] | None:
    """Class names of a column in the description that the library `datasets` writes."""
    try:
        metadata = json.loads((schema.metadata or {}).get(b"huggingface", b"{}"))
        names = metadata["info"]["features"][column]["names"]
    except (ValueError, KeyError, TypeError):
        return None
    return names if isinstance(names, list) and all(isinstance(name, str) for name in names) else None


def _check_column(column: str, present: list[str], where: str | Path) -> None:
    require(column in present, f"{where} has no column {column!r}; it has {', '.join(present)}")


def _is_bytes(column: pa.Field) -> bool:
    return pa.types.is_binary(column.type) or pa.types.is_large_binary(column.type)


def _image_column(schema: pa.Schema, asked: str | None, where: str | Path) -> str:
    """A struct with `bytes`; a column of bytes, or of paths if it is asked for, will do."""
    structs = [f.name for f in schema if pa.types.is_struct(f.type) and f.type.get_field_index("bytes") >= 0]
    plain = [f.name for f in schema if _is_bytes(f)]
    paths = [f.name for f in schema if pa.types.is_string(f.type) or pa.types.is_large_string(f.type)]
    if asked is not None:
        _check_column(asked, schema.names, where)
        return _chosen(asked, structs + plain + paths, where)
    present = ", ".join(schema.names)
    require(bool(structs or plain), f"{where} has no image column (a struct with `bytes`); it has {present}")
    return _chosen(None, structs or plain, where)


def _chosen(asked: str | None, images: list[str], where: str | Path) -> str:
    known = asked is None or asked in images
    require(known, f"column {asked!r} of {where} holds no images; {', '.join(images)} may")
    several = f"{where} has several columns of images: choose image={' or image='.join(images)}"
    require(asked is not None or len(images) == 1, several)
    return asked or images[0]


def _text(value: Any, names: list[str] | None, column: str, where: str | Path) -> str | None:
    """The text of a label, attribute or caption, no other value; Hugging Face marks hidden labels by -1."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return None
    holds = f"column {column!r} of {where} holds"
    if names and isinstance(value, int):
        require(value < len(names), f"{holds} {value}, it lists {len(names)} classes")
        return names[value] if value >= 0 else None
    if isinstance(value, float) and value.is_integer():  # whole numbers of a column that has gaps
        return str(int(value))
    text = f"{holds} {type(value).__name__}, such as {str(value)[:60]}, and not one text or number for each"
    require(isinstance(value, str | int | float), f"{text} image: choose another column")
    return str(value)
