"""What lies below a folder: its files, how people name splits, and whether anything has changed."""

import contextlib
import hashlib
import itertools
import json
import os
import re
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from anyorder.contracts import require
from anyorder.files import MANIFEST

_SYSTEM = {"__macosx", "thumbs.db", "desktop.ini", "$recycle.bin", "system volume information", "@eadir"}
HIDDEN = "hidden or system entry"
_SAMPLES = {"grid.png", "orders.png", "generation.webp"}  # of the command `anyorder sample`
_WORDS = (
    "(?:(?P<train>train|training|trn)|(?P<test>test|testing|tst)"
    "|(?P<validation>val|valid|validation|validate|dev|devel|eval|evaluation|holdout))"
)
_AROUND = r"(?:images?|imgs?|data|dataset|sets?|split|full|\d+)"
_FOLDER = re.compile(rf"(?:{_AROUND}[-_ .]?)?{_WORDS}(?:[-_ .]?{_AROUND})*", re.IGNORECASE)
_FILE = re.compile(rf"(?:^|[-_. ]){_WORDS}(?![a-z])", re.IGNORECASE)


@dataclass
class Listing:
    """Files below a folder."""

    files: list[str]  # paths relative to the folder, sorted, with "/"
    ignored: dict[str, list[str]] = field(default_factory=lambda: defaultdict(list))  # reason -> entries


def list_files(root: Path) -> Listing:
    """All files below a folder, except hidden and system entries and folders that anyorder wrote.

    Links are followed, each folder once.

    Raises:
        ValueError: anyorder wrote `root` itself.
    """
    found, seen = Listing([]), {os.path.realpath(root)}

    def path_of(*path: str) -> str:
        return Path(os.path.relpath(os.path.join(*path), root)).as_posix()

    def unreadable(error: OSError) -> None:
        found.ignored["unreadable folder"].append(path_of(error.filename))

    for folder, subfolders, files in os.walk(root, onerror=unreadable, followlinks=True):
        if _is_artifact(Path(folder), files) or (Path(folder) != root and {*files} >= _SAMPLES):
            mend = "source= takes a folder of images"
            require(Path(folder) != root, f"{root} was written by anyorder: {mend}")
            found.ignored["written by anyorder"].append(path_of(folder))
            subfolders.clear()
            continue
        names = (*subfolders, *files)
        hidden = set(filter(is_hidden, names))
        found.ignored[HIDDEN] += [path_of(folder, name) for name in sorted(hidden)]
        found.files += [path_of(folder, name) for name in files if name not in hidden]
        visible = sorted({*subfolders} - hidden, reverse=True)
        paths = {os.path.realpath(os.path.join(folder, s)): s for s in visible}
        subfolders[:] = sorted(paths[path] for path in paths.keys() - seen)  # links may lead in circles
        seen |= paths.keys()
    found.files.sort()
    return found


def is_hidden(name: str) -> bool:
    """Whether a file or folder of this name is hidden or the system's."""
    return name.startswith(".") or name.lower() in _SYSTEM


def _is_artifact(folder: Path, files: Sequence[str]) -> bool:
    """Whether a stage wrote, or is writing, this folder."""
    manifest = None
    if MANIFEST in files:
        with contextlib.suppress(OSError, ValueError, RecursionError):
            manifest = json.loads((folder / MANIFEST).read_bytes())
    finished = isinstance(manifest, dict) and {"stage", "fingerprint"} <= manifest.keys()
    return finished or ".identity.json" in files


# --- splits ---


def split_of_folder(name: str) -> str | None:
    """One of train, test and validation if a folder is named like it, such as `Train`, `dev`, `val2017`."""
    return getattr(_FOLDER.fullmatch(name), "lastgroup", None)


def split_of_file(name: str) -> str | None:
    """The same for a file's path, such as `train-00000-of-00002.parquet` or `default/test/0000.parquet`."""
    *folders, last = name.split("/")
    kinds = (getattr(_FILE.search(last), "lastgroup", None), *map(split_of_folder, folders))
    return next(filter(None, kinds), None)


def split_and_class(names: Sequence[str]) -> list[tuple[str | None, str | None]]:
    """The split and the class of every image of a folder, from its path relative to the folder, with "/".

    Understood are `cat/1.png`, `train/cat/1.png`, `cat/train/1.png`, and folders around these: a single
    folder is a class only if it has no folders of images alone. The split is "train" everywhere if nothing
    names one, None for an image beside the splits.

    Raises:
        ValueError: a folder may be a split or a class, or there is a test split but no training split.
    """
    folders = [name.split("/")[:-1] for name in names]

    def at(level: int) -> list[str | None]:
        return [f[level] if len(f) > level else None for f in folders]

    def kinds(level: int) -> list[str | None]:
        return [f and split_of_folder(f) for f in at(level)]

    # Folders that all images share may lie around the splits: data/train/cat/1.png.
    shared = next(i for i in itertools.count() if len({*at(i)}) > 1 or None in at(i))
    level = next((i for i in range(shared + 1) if any(kinds(i))), None)
    below = shared + 1  # cat/train/1.png
    if level is None and not all(kinds(below)):
        if "train" in kinds(below) and len({*kinds(below)} - {None}) > 1:
            raise _unclear(at(below), kinds(below))
        return [("train", label) for label in at(0 if None in at(shared) else shared)]
    found = below if level is None else level
    splits, named = kinds(found), _listed(at(found))
    mend = "none names the training split: call its folder train"
    require("train" in splits, f"the folders {named} name a test split, and {mend}")
    if level is None:
        return list(zip(splits, at(shared), strict=True))
    if None in splits and len({*splits} - {None}) < 2:  # a single name may as well be a class
        raise _unclear(at(level), splits)
    while kinds(level + 1) == splits:  # train/train/cat/1.png, as archives unpack
        level += 1
    return list(zip(splits, at(level + 1), strict=True))


def _unclear(folders: Sequence[str | None], splits: Sequence[str | None]) -> ValueError:
    pairs = list(zip(folders, splits, strict=True))
    named = _listed(name for name, split in pairs if split)
    others = _listed(name for name, split in pairs if not split) or "loose images"
    mend = "Put the classes into folders below train/ and test/, or move what does not belong there"
    return ValueError(f"is {named} a split or a class, beside {others}? {mend}")


def _listed(names: Iterable[str | None]) -> str:
    found = sorted({name for name in names if name})
    return ", ".join(found[:5]) + (", ..." if len(found) > 5 else "")


def held_out(names: Sequence[str], fraction: float) -> list[bool]:
    """Which of these unique names become the test split, a share in [0, 1) of them.

    The name decides, so that added images move no others. At least one goes to either side if there are two
    names and `fraction` is above 0.
    """
    digests = (hashlib.sha256(os.fsencode(name)).digest() for name in names)
    hashes = [int.from_bytes(digest[:8], "big") for digest in digests]
    chosen = [value < fraction * 2**64 for value in hashes]
    if fraction and len(names) > 1 and len({*chosen}) == 1:
        chosen[hashes.index(max(hashes) if chosen[0] else min(hashes))] ^= True
    return chosen


# --- changes ---

Stats = dict[str, tuple[int, int]]
"""Name -> size in bytes and time of the last change in ns."""


def stats(root: Path, names: Iterable[str]) -> Stats:
    """Of each file; (-1, -1) for one that cannot be looked at."""
    found = dict.fromkeys(names, (-1, -1))
    for name in found:
        with contextlib.suppress(OSError):
            stat = (root / name).stat()
            found[name] = stat.st_size, stat.st_mtime_ns
    return found


def digest(found: Stats) -> str:
    """A short text that differs for other names, sizes or times."""
    lines = json.dumps(sorted(found.items())).encode()
    return f"{len(found)} files, {hashlib.sha256(lines).hexdigest()[:16]}"


def changes(before: Stats, now: Stats) -> str:
    """What was added, deleted and changed, with a few names."""
    groups = {
        "added": now.keys() - before.keys(),
        "deleted": before.keys() - now.keys(),
        "changed": {name for name in before.keys() & now.keys() if tuple(before[name]) != tuple(now[name])},
    }
    return "; ".join(f"{len(names)} {verb} ({_listed(names)})" for verb, names in groups.items() if names)
