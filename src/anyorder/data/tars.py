"""Tar shards as the library webdataset writes them: files of one name and several endings are one example."""

from __future__ import annotations

import json
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby
from typing import Any

from anyorder.contracts import require
from anyorder.data import sources
from anyorder.data.images import BadImage, suffixes
from anyorder.data.tables import Shards, item_of

JSON = "json"
"""Ending of a file whose keys are columns, too."""


@dataclass(frozen=True)
class TarSource(Shards):
    """Tar files, not compressed: `0001.jpg`, `0001.cls` and `0001.txt` are image, class and caption of 0001.

    The columns are the endings of the files, and the keys of a file that ends with json. Any image is read by
    its place in the file, which its name holds: `train-000.tar#0001.jpg@1536+20480` (offset + bytes).
    """

    ending = ".tar"

    def _read(self, part: str, with_images: bool) -> Iterator[sources.Item]:
        path, seen = self._root / part, set[str]()
        try:
            with tarfile.open(path, "r:") as file:
                members = ((*_key(member.name), member) for member in file if member.isreg())
                for key, group in groupby(members, lambda found: found[0]):
                    example = {ending: member for _, ending, member in group}
                    texts = _texts(file, example, self.columns.texts)
                    seen |= {*example, *texts}
                    item = self._item(part, key, example, texts)
                    yield item._replace(image=self.image(item.name)) if with_images else item
        except (tarfile.TarError, OSError, EOFError) as e:
            mend = "write it again, without compression"
            raise ValueError(f"{path} is not a sound tar file ({e}): {mend}") from e
        for column in self.columns.texts:
            require(column in seen, f"{path} has no column {column!r}; it has {', '.join(sorted(seen))}")

    def _item(
        self, part: str, key: str, members: dict[str, tarfile.TarInfo], texts: dict[str, Any]
    ) -> sources.Item:
        columns = self.columns
        named = [columns.image] if columns.image else [e for e in members if f".{e}" in suffixes()]
        image = next((members[ending] for ending in named if ending in members), None)
        place = f"{image.name}@{image.offset_data}+{image.size}" if image else key
        return item_of(columns, texts, {}, self._root / part, f"{part}#{place}", b"")

    def image(self, name: str) -> Any:
        """See `Source`."""
        part, _, place = name.partition(".tar#")
        offset, plus, size = place.rpartition("@")[2].partition("+")
        if not plus:
            return BadImage("no image", f"the example has none of {', '.join(sorted(suffixes())[:3])}, ...")
        with open(f"{self._root / part}.tar", "rb") as file:
            file.seek(int(offset))
            return file.read(int(size))


def _key(name: str) -> tuple[str, str]:
    """What names the example, and the ending: all behind the first point of the file's own name."""
    folder, slash, last = name.rpartition("/")
    stem, _, ending = last.partition(".")
    return f"{folder}{slash}{stem}", ending.lower()


def _texts(file: tarfile.TarFile, members: dict[str, tarfile.TarInfo], columns: list[str]) -> dict[str, Any]:
    """What an example has of the columns: contents of files, else values of its json."""

    def content(ending: str) -> bytes:
        opened = file.extractfile(members[ending])
        assert opened is not None, "only regular files are looked at"
        return opened.read()

    found = {c: content(c).decode(errors="replace").strip() for c in columns if c in members and c != JSON}
    if JSON in members and found.keys() < {*columns}:
        try:
            values = json.loads(content(JSON))
        except (ValueError, RecursionError):
            values = None
        found = {**(values if isinstance(values, dict) else {}), **found}
    return found
