"""Files: written atomically, errors that name them, arrays that grow row by row and survive a kill."""

import contextlib
import fcntl
import glob
import hashlib
import json
import math
import os
import platform
import re
import secrets
import time
from collections.abc import Iterator, Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

MANIFEST = "manifest.json"
TIMES = ("seconds.npy", "timing.json")
"""Endings of files that hold times: they differ from run to run and do not count as content."""
TEMPORARY = re.compile(r"\..+\.[0-9a-f]{8}\.tmp")
"""Names of the files that `atomic` writes first."""
LARGEST_JSON = 1 << 28
"""Bytes."""


def expanded(path: str | Path) -> Path:
    """`~` at the beginning is the home folder; in `./~` it is a name, as `Path.expanduser` does not know."""
    try:
        return Path(path).expanduser() if str(path).startswith("~") else Path(path)
    except RuntimeError as e:
        raise ValueError(f"{path}: {e} Write ./{path} if it is a name") from e


@contextlib.contextmanager
def atomic(path: str | Path) -> Iterator[Path]:
    """Yield a temporary path beside `path` that takes its place only if the block succeeds.

    What a killed process left of an earlier attempt is removed.

    Raises:
        OSError: the disk is full or the folder cannot be written; the old file is left as it was.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    for left in path.parent.glob(f".{glob.escape(path.name)}.*.tmp"):
        with contextlib.suppress(OSError):  # who writes it now holds the lock, or takes it within seconds
            if time.time() - left.stat().st_mtime > 10:
                with _locked(left, os.O_WRONLY):
                    left.unlink()
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")  # processes may share the folder
    with _locked(temporary, os.O_WRONLY | os.O_CREAT):
        mode = temporary.stat().st_mode  # by the umask; safetensors puts a file of its own in this place
        try:
            yield temporary
            temporary.chmod(mode)
            with open(temporary, "rb+") as f:
                os.fsync(f.fileno())
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def _locked(path: Path, flags: int) -> Iterator[None]:
    """Open and lock a file; an OSError where another process holds it, or locks are unknown."""
    descriptor = os.open(path, flags, 0o666)
    try:
        with contextlib.suppress(OSError) if flags & os.O_CREAT else contextlib.nullcontext():
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    finally:
        os.close(descriptor)


def sync(path: Path) -> None:
    """Bring a file, or the names in a folder, to disk (POSIX); a rename alone may be lost with the power."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_text(path: str | Path, text: str) -> None:
    """Write `text` atomically, UTF-8; undecodable bytes of file names become escapes."""
    with atomic(path) as temporary:
        temporary.write_text(text, encoding="utf-8", errors="backslashreplace")


def write_json(path: str | Path, value: Any) -> None:
    """Write `value` atomically as indented JSON, see `plain`."""
    write_text(path, json.dumps(plain(value), indent=2, allow_nan=False) + "\n")


def plain(value: Any) -> Any:
    """`value` as JSON has it: paths are texts, tuples lists; NaN and infinity, which JSON lacks, are null.

    Raises:
        TypeError: a value that JSON cannot hold.
    """
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, Path):
        return str(value)
    value = value.item() if isinstance(value, np.generic) else value
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if not isinstance(value, str | int | float | None):
        raise TypeError(f"cannot write {type(value).__name__} to JSON")
    return value


def read_json(path: str | Path, largest: int = LARGEST_JSON) -> Any:
    """Read JSON of at most `largest` bytes.

    Raises:
        FileNotFoundError: no such file.
        ValueError: the file is not JSON, too large or nested too deeply; the message names it.
    """
    path, damage = Path(path), ""
    if (size := path.stat().st_size) > largest:
        raise ValueError(f"{path} is too large ({size >> 20} MiB): it is no file of anyorder's")
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except RecursionError:
        damage = "nested too deeply"
    except ValueError as e:
        damage = str(e)
    raise ValueError(f"{path} is not valid JSON ({damage}); delete its folder and make it again")


def sha256(path: str | Path) -> str:
    """Hash of a file's bytes, hexadecimal."""
    with open(path, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def versions() -> dict[str, str]:
    """Versions of Python, the platform and the packages that numbers depend on."""
    found = {"python": platform.python_version(), "platform": platform.platform()}
    for name in ("anyorder", "torch", "numpy", "pillow", "torchmetrics"):
        with contextlib.suppress(PackageNotFoundError):
            found[name] = version(name)
    return found


def read_manifest(folder: str | Path) -> dict[str, Any]:
    """The manifest of a finished artifact.

    Raises:
        FileNotFoundError: `folder` is not a finished artifact.
        ValueError: its manifest is damaged, or a file of something else.
    """
    path = Path(folder) / MANIFEST
    if not path.is_file():
        raise FileNotFoundError(f"{folder} is not a finished artifact (no {MANIFEST}): run its stage first")
    manifest = read_record(path)
    kinds = {"fingerprint": str, "files": dict, "other_files": list, "input_folders": dict}
    found = {"other_files": [], "input_folders": {}} | manifest  # older ones lack these
    if not all(isinstance(found.get(key), kind) for key, kind in kinds.items()):
        raise ValueError(f"{path} is incomplete ({', '.join(kinds)}): run the stage again")
    names, folders = (*found["files"], *found["other_files"]), found["input_folders"]
    texts = all(isinstance(text, str) for text in (*names, *found["files"].values(), *folders.values()))
    if not texts or not folders.keys() <= found["inputs"].keys() or not all(map(_is_inside, names)):
        raise ValueError(f"{path} names what is no file of its folder: run the stage again")
    return manifest


def _is_inside(name: str) -> bool:
    return not os.path.isabs(name) and ".." not in Path(name).parts and "\0" not in name


def read_record(path: Path) -> dict[str, Any]:
    """A manifest, or what a folder is being made from: a mapping with `stage`, `config` and `inputs`.

    Raises:
        ValueError: damaged, or a file of something else; the message names it.
    """
    record = read_json(path)
    kinds = {"stage": str, "config": dict, "inputs": dict}
    if not isinstance(record, dict) or not all(isinstance(record.get(k), kind) for k, kind in kinds.items()):
        raise ValueError(f"{path} is not the manifest of an artifact: choose another folder")
    return record


def fingerprint(folder: str | Path) -> str:
    """Short name of an artifact's *content*: equal if and only if its files are the same bytes."""
    return read_manifest(folder)["fingerprint"]


def fingerprints(folder: str | Path, role: str, stage: str = "") -> list[str]:
    """Names of an artifact's content as an input of a stage in this role, the one to record first.

    Of a pipeline that serves as a tokenizer only the tokenizer counts; earlier versions recorded all of it.
    """
    serves = stage if role == "init" else role  # a tokenizer begins as a tokenizer
    manifest, inside = read_manifest(folder), "tokenizer/"
    own = {n.removeprefix(inside): x for n, x in manifest["files"].items() if n.startswith(inside)}
    return [*([name_of(own)] if own and serves == "tokenizer" else []), manifest["fingerprint"]]


def made_from(record: Mapping[str, Any], role: str, folder: str | Path) -> bool:
    """Whether an artifact with this record was made from what is now in a folder, in this role."""
    return record["inputs"].get(role) in fingerprints(folder, role, record["stage"])


def name_of(hashes: Mapping[str, str]) -> str:
    """The fingerprint of files with these hashes."""
    return hashlib.sha256(json.dumps(hashes, sort_keys=True).encode()).hexdigest()[:16]


class RowWriter:
    """Several `.npy` arrays that grow together, row by row, and survive a kill.

    Rows go to `NAME.npy.partial`; `close` writes the final header and renames. Opening again continues
    after the last row that all arrays hold; arrays that are finished already have all their rows. Plain
    writes are used rather than a memory map, so that a full disk is an `OSError` and not a bus error.
    """

    rows: int
    """Number of complete rows on disk."""
    _HEADER = 128

    def __init__(self, folder: str | Path, arrays: Mapping[str, Any], batch: int = 1, most: float = math.inf):
        """Open or reopen; `arrays` maps a name to (shape of one row, dtype).

        What a kill left of the last `batch` rows is dropped, so that batches keep their bounds, and all rows
        behind the first `most`; 0 begins anew, whatever is there.
        """
        self.folder = Path(folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        self.specs = {name: (tuple(shape), np.dtype(dtype)) for name, (shape, dtype) in arrays.items()}
        self._files: dict[str, BinaryIO] = {}
        finished = [path for name in self.specs if (path := self.folder / f"{name}.npy").is_file()]
        if len(finished) == len(self.specs) and most > 0:
            self.rows = min(len(load_array(path)) for path in finished)
            if self.rows <= most:
                return
        for path in finished:  # a kill came while they were closed
            os.replace(path, f"{path}.partial")
        for name in self.specs:
            self._partial(name).touch()
            self._files[name] = open(self._partial(name), "rb+")  # noqa: SIM115
        sizes = {name: math.prod(shape) * dtype.itemsize for name, (shape, dtype) in self.specs.items()}
        whole = [(os.stat(f.name).st_size - self._HEADER) // sizes[name] for name, f in self._files.items()]
        self.rows = int(min(max(0, min(whole)) // batch * batch, most))
        for name, file in self._files.items():
            file.truncate(self._HEADER + self.rows * sizes[name])
            file.seek(0, os.SEEK_END)

    def _partial(self, name: str) -> Path:
        return self.folder / f"{name}.npy.partial"

    def append(self, **arrays: np.ndarray) -> None:
        """Append the same number of rows to every array and flush them to disk.

        Raises:
            OSError: the disk is full; the rows before this call are kept.
        """
        assert arrays.keys() == self.specs.keys(), f"expected {list(self.specs)}, got {list(arrays)}"
        counts = {len(a) for a in arrays.values()}
        assert len(counts) == 1, f"arrays of unequal length: {counts}"
        for name, rows in arrays.items():
            shape, dtype = self.specs[name]
            assert rows.shape[1:] == shape, f"{name}: rows of {rows.shape[1:]}, expected {shape}"
            self._files[name].write(np.ascontiguousarray(rows, dtype=dtype).tobytes())
        for file in self._files.values():
            file.flush()
        self.rows += counts.pop()

    def close(self) -> None:
        """Write the headers and give the arrays their final names."""
        for name, file in self._files.items():
            shape, dtype = self.specs[name]
            file.seek(0)
            file.write(_npy_header((self.rows, *shape), dtype, self._HEADER))
            file.flush()
            os.fsync(file.fileno())
            file.close()
            os.replace(self._partial(name), self.folder / f"{name}.npy")


def _npy_header(shape: tuple[int, ...], dtype: np.dtype, length: int) -> bytes:
    description = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": shape}
    start = np.lib.format.magic(1, 0) + (length - 10).to_bytes(2, "little") + repr(description).encode()
    assert len(start) < length, f"header of {description} is longer than {length} bytes"
    return start.ljust(length - 1) + b"\n"


def save_array(path: str | Path, array: np.ndarray) -> None:
    """Write one `.npy` atomically."""
    with atomic(path) as temporary, open(temporary, "wb") as f:
        np.save(f, array)


def load_array(path: str | Path) -> np.ndarray:
    """Open a `.npy` as a read-only memory map.

    Raises:
        FileNotFoundError: no such file.
        ValueError: truncated or not an array; the message names the file.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist: run the stage that writes it")
    try:
        return np.load(path, mmap_mode="r", allow_pickle=False)
    except (ValueError, EOFError) as e:
        raise ValueError(f"{path} is damaged ({e}); delete its folder and run the stage again") from e
