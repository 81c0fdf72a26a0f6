"""Tar shards as the library webdataset writes them: files of one name and several endings are one example."""

import json
import re
import tarfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby
from pathlib import PurePosixPath
from typing import Any

from anyorder.contracts import require
from anyorder.data import images, listing, sources
from anyorder.data.tables import Shards, item_of

JSON = "json"
"""Ending of a file whose keys are columns, too."""
MAX_TEXT = 2**24
"""Bytes of any other file."""


@dataclass(frozen=True)
class TarSource(Shards):
    """Tar files, not compressed: `0001.jpg`, `0001.cls` and `0001.txt` are image, class and caption of 0001.

    The columns are the endings of the files, and the keys of a file that ends with json. Any image is read by
    its place in the file, which its name holds: `train-000.tar#0001.jpg@1536+20480` (offset + bytes).
    """

    ending = ".tar"

    @cached_property
    def _hidden(self) -> dict[str, list[str]]:
        """Part -> its hidden and system entries, once it was read."""
        return {}

    def ignored(self) -> dict[str, list[str]]:
        """See `Source`."""
        found = [name for names in self._hidden.values() for name in names] if self.items else []
        return super().ignored() | {listing.HIDDEN: found}

    def _read(self, part: str) -> Iterable[sources.Item]:
        path, seen = self._root / part, set[str]()
        try:
            with tarfile.open(path, "r:") as file:
                self._hidden[part] = []
                members = ((*_key(member.name), member) for member in self._visible(file, part))
                for key, group in groupby(members, lambda found: found[0]):
                    example: dict[str, tarfile.TarInfo] = {}
                    for _, ending, member in group:
                        twice = f"{path} has two files {member.name!r} that are {ending} of {key}"
                        require(ending not in example, f"{twice}: leave one out")
                        example[ending] = member
                    texts = _texts(file, example, self.columns.texts)
                    seen |= {*example, *texts}
                    yield self._item(part, key, example, texts)
                _require_end(file)
        except (tarfile.TarError, OSError, EOFError) as e:
            mend = "write it again, without compression"
            raise ValueError(f"{path} is not a sound tar file ({e}): {mend}") from e
        for column in filter(None, (self.columns.image, *self.columns.texts)):
            require(column in seen, f"{path} has no column {column!r}; it has {', '.join(sorted(seen))}")

    def _visible(self, file: tarfile.TarFile, part: str) -> Iterator[tarfile.TarInfo]:
        for member in file:
            if any(map(listing.is_hidden, PurePosixPath(member.name).parts)):
                self._hidden[part].append(f"{part}#{member.name}")
            elif not member.isdir():
                yield member
            file.members = []  # type: ignore[attr-defined] # it would keep them all

    def _item(
        self, part: str, key: str, members: dict[str, tarfile.TarInfo], texts: dict[str, Any]
    ) -> sources.Item:
        columns = self.columns
        found = [ending for ending in members if f".{ending}" in images.suffixes()]
        several = f"{self._root / part} has {' and '.join(found)} of {key}"
        mend = f"choose image={' or image='.join(found)}"
        require(columns.image is not None or len(found) < 2, f"{several}: {mend}")
        image = members.get(columns.image or next(iter(found), ""))
        place = f"{image.name}@{image.offset_data}+{image.size}" if image and _is_plain(image) else f"{key}@"
        return item_of(columns, texts, {}, self._root / part, f"{part}#{place}")

    def image(self, name: str) -> Any:
        """See `Source`."""
        part, ending, place = re.split(r"(?i)(\.tar)#", name, maxsplit=1)
        offset, plus, size = place.rpartition("@")[2].partition("+")
        if not plus:
            kinds = self.columns.image or f"{', '.join(sorted(images.suffixes())[:3])}, ..."
            return images.BadImage("no image", f"there is none of {kinds}, or a link, or one with gaps")
        with open(f"{self._root / part}{ending}", "rb") as file:
            file.seek(int(offset))
            return file.read(min(int(size), images.MAX_BYTES + 1))


def _is_plain(member: tarfile.TarInfo) -> bool:
    """Whether its bytes lie in the archive: links and files with gaps have a size alone."""
    return member.isreg() and not member.issparse()


def _require_end(file: tarfile.TarFile) -> None:
    """Zeros alone: the library takes whatever is no header, as where a file was cut off, for the end."""
    assert file.fileobj is not None
    file.fileobj.seek(file.offset)
    rest = file.fileobj.read(2**20)
    if len(rest) < tarfile.BLOCKSIZE or rest.strip(b"\0"):
        what = "something that is no file" if rest else "nothing, and no mark of its end"
        raise tarfile.ReadError(f"at byte {file.offset} follows {what}")


def _key(name: str) -> tuple[str, str]:
    """What names the example, and the ending: all behind the first point of the file's own name."""
    folder, slash, last = name.rpartition("/")
    stem, _, ending = last.partition(".")
    return f"{folder}{slash}{stem}", ending.lower()


def _texts(file: tarfile.TarFile, members: dict[str, tarfile.TarInfo], columns: list[str]) -> dict[str, Any]:
    """What an example has of the columns: contents of files, else values of its json."""

    def content(ending: str) -> bytes:
        opened, text = file.extractfile(member := members[ending]), f"{member.name} has {member.size:,} bytes"
        require(member.size <= MAX_TEXT, f"{file.name!s}: {text}, allowed are {MAX_TEXT:,}")
        assert opened is not None, "only regular files are looked at"
        return opened.read()

    members = {ending: member for ending, member in members.items() if _is_plain(member)}
    # Labels that are not UTF-8 stay apart.
    own = [c for c in columns if c in members and c != JSON]
    found = {c: sources.decoded(content(c), "backslashreplace").strip() for c in own}
    if JSON in members and found.keys() < {*columns}:
        try:
            values = json.loads(content(JSON))
        except (ValueError, RecursionError):
            values = None
        found = {**(values if isinstance(values, dict) else {}), **found}
    return found
