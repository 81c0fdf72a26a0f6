import errno
import json
import os
import resource
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from anyorder import files as artifacts
from anyorder.files import (
    MANIFEST,
    RowWriter,
    atomic,
    fingerprint,
    load_array,
    read_json,
    read_manifest,
    save_array,
    sha256,
    versions,
    write_json,
    write_text,
)
from anyorder.stages.artifacts import Artifact

ARRAYS = {"tokens": ((4,), np.int32), "labels": ((), np.int64)}


def rows(n: int, first: int = 0) -> dict[str, np.ndarray]:
    labels = np.arange(first, first + n)
    return {"tokens": labels[:, None] * 10 + np.arange(4), "labels": labels}


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@contextmanager
def largest_file(size: int) -> Iterator[None]:
    """Let the system refuse to write beyond `size` bytes, as a full disk does."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


# --- single files


def test_a_crash_leaves_the_old_file(tmp_path):
    path = tmp_path / "deep" / "notes.txt"
    write_text(path, "old")

    def crash() -> None:
        with atomic(path) as temporary:
            temporary.write_text("half of the n")
            assert path.read_text() == "old"
            raise RuntimeError("crash")

    with pytest.raises(RuntimeError, match="crash"):
        crash()
    assert path.read_text() == "old"
    assert names(path.parent) == ["notes.txt"]
    write_text(path, "nèw")
    assert path.read_text(encoding="utf-8") == "nèw"
    assert names(path.parent) == ["notes.txt"]


def test_what_a_kill_left_is_removed_and_what_others_write_is_not(tmp_path):
    path = tmp_path / "report.html"
    left = tmp_path / ".report.html.01234567.tmp"
    left.write_text("half")
    os.utime(left, (0, 0))
    fresh = tmp_path / ".report.html.76543210.tmp"
    fresh.write_text("about to be locked by another process")
    (tmp_path / ".other.html.01234567.tmp").write_text("of another file")
    with artifacts.atomic(path) as theirs:
        theirs.write_text("theirs")
        artifacts.write_text(path, "ours")
        assert theirs.read_text() == "theirs"
        assert not left.exists()
    assert path.read_text() == "theirs"
    assert fresh.exists()
    fresh.unlink()
    assert sorted(p.name for p in tmp_path.iterdir()) == [".other.html.01234567.tmp", "report.html"]


def test_a_full_disk_leaves_the_old_file(tmp_path):
    write_json(tmp_path / "facts.json", {"a": 1})
    save_array(tmp_path / "x.npy", np.arange(3))
    with largest_file(4096):
        with pytest.raises(OSError):
            write_json(tmp_path / "facts.json", {"a": "b" * 10_000})
        with pytest.raises(OSError):
            save_array(tmp_path / "x.npy", np.zeros(10_000))
    assert read_json(tmp_path / "facts.json") == {"a": 1}
    assert load_array(tmp_path / "x.npy").tolist() == [0, 1, 2]
    assert names(tmp_path) == ["facts.json", "x.npy"]


def test_no_space_is_reported_and_cleaned_up(tmp_path, monkeypatch):
    def no_space(*args: object, **kwargs: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    write_text(tmp_path / "notes.txt", "old")
    monkeypatch.setattr(artifacts.os, "fsync", no_space)
    with pytest.raises(OSError, match="No space left") as caught:
        write_text(tmp_path / "notes.txt", "new")
    assert caught.value.errno == errno.ENOSPC
    assert (tmp_path / "notes.txt").read_text() == "old"
    assert names(tmp_path) == ["notes.txt"]


def test_json_round_trip(tmp_path):
    value = {"path": tmp_path, "number": np.float32(0.5), "count": np.int64(3), "list": [1, None, True]}
    write_json(tmp_path / "x.json", value)
    assert read_json(tmp_path / "x.json") == {**value, "path": str(tmp_path), "number": 0.5, "count": 3}
    with pytest.raises(TypeError, match="cannot write set to JSON"):
        write_json(tmp_path / "x.json", {"a": {1}})


def test_damaged_json_is_named(tmp_path):
    for damage in (b'{"a": 1', b"\xff\xfe\x00"):
        (tmp_path / "x.json").write_bytes(damage)
        with pytest.raises(ValueError, match=r"x\.json is not valid JSON .* make it again"):
            read_json(tmp_path / "x.json")
    with pytest.raises(FileNotFoundError):
        read_json(tmp_path / "y.json")


def test_arrays(tmp_path):
    array = np.arange(6, dtype=np.int32).reshape(2, 3)
    save_array(tmp_path / "x.npy", array)
    found = load_array(tmp_path / "x.npy")
    assert isinstance(found, np.memmap)
    assert not found.flags.writeable
    np.testing.assert_array_equal(found, array)
    with pytest.raises(FileNotFoundError, match=r"y\.npy does not exist: run the stage"):
        load_array(tmp_path / "y.npy")
    whole = (tmp_path / "x.npy").read_bytes()
    for damage in (whole[:-1], whole[:20], b"", b"something else"):
        (tmp_path / "x.npy").write_bytes(damage)
        with pytest.raises(ValueError, match=r"x\.npy is damaged"):
            load_array(tmp_path / "x.npy")


def test_arrays_hold_no_pickles(tmp_path):
    np.save(tmp_path / "x.npy", np.array([{"a": 1}], dtype=object), allow_pickle=True)
    with pytest.raises(ValueError, match="damaged"):
        load_array(tmp_path / "x.npy")


# --- arrays that grow


def test_rows_become_arrays(tmp_path):
    writer = RowWriter(tmp_path / "new", ARRAYS)
    writer.append(**rows(3))
    writer.append(**rows(2, first=3))
    assert writer.rows == 5
    assert names(tmp_path / "new") == ["labels.npy.partial", "tokens.npy.partial"]
    writer.close()
    assert names(tmp_path / "new") == ["labels.npy", "tokens.npy"]
    for name, expected in rows(5).items():
        found = load_array(tmp_path / "new" / f"{name}.npy")
        assert found.dtype == ARRAYS[name][1]
        np.testing.assert_array_equal(found, expected)


def test_no_rows(tmp_path):
    RowWriter(tmp_path, ARRAYS).close()
    assert load_array(tmp_path / "tokens.npy").shape == (0, 4)
    assert load_array(tmp_path / "labels.npy").shape == (0,)


@pytest.mark.parametrize("dtype", [np.uint8, np.float16, np.float64, np.bool_, ">i4"])
@pytest.mark.parametrize("shape", [(), (3,), (2, 3, 4)])
def test_headers_are_those_of_numpy(tmp_path, dtype, shape):
    array = np.arange(5 * int(np.prod(shape))).reshape(5, *shape).astype(dtype)
    writer = RowWriter(tmp_path, {"x": (shape, dtype)})
    writer.append(x=array)
    writer.close()
    np.save(tmp_path / "y.npy", array)
    with open(tmp_path / "x.npy", "rb") as x, open(tmp_path / "y.npy", "rb") as y:
        for file in (x, y):
            assert np.lib.format.read_magic(file) == (1, 0)
        header, expected = (np.lib.format.read_array_header_1_0(file) for file in (x, y))
        assert header == expected
        assert x.tell() % 64 == 0  # aligned, as the format asks
        assert x.read() == y.read()


def abandon(folder: Path, written: int, cut: dict[str, int]) -> None:
    """Write rows, then lose the last bytes of some arrays, as a kill does."""
    writer = RowWriter(folder, ARRAYS)
    if written:
        writer.append(**rows(written))
    for name in ARRAYS:
        path = folder / f"{name}.npy.partial"
        path.write_bytes(path.read_bytes()[: path.stat().st_size - cut.get(name, 0)])


@pytest.mark.parametrize(
    ("cut", "left"),
    [
        ({}, 5),
        ({"tokens": 1}, 4),  # 16 bytes per row
        ({"tokens": 16}, 4),
        ({"tokens": 17}, 3),
        ({"labels": 8 * 3}, 2),  # 8 bytes per row
        ({"tokens": 1, "labels": 9}, 3),
        ({"labels": 8 * 5}, 0),
        ({"labels": 8 * 5 + 100}, 0),  # not even the header is whole
    ],
)
def test_resuming_after_a_kill(tmp_path, cut, left):
    abandon(tmp_path, 5, cut)
    writer = RowWriter(tmp_path, ARRAYS)
    assert writer.rows == left
    writer.append(**rows(7 - left, first=left))
    writer.close()
    for name, expected in rows(7).items():
        np.testing.assert_array_equal(load_array(tmp_path / f"{name}.npy"), expected)


@given(written=st.integers(0, 6), tokens=st.integers(0, 120), labels=st.integers(0, 70))
def test_a_cut_loses_whole_rows_only(tmp_path_factory, written, tokens, labels):
    folder = tmp_path_factory.mktemp("rows")
    abandon(folder, written, {"tokens": tokens, "labels": labels})
    left = max(0, min(written, (16 * written - tokens) // 16, (8 * written - labels) // 8))
    writer = RowWriter(folder, ARRAYS)
    assert writer.rows == left
    writer.close()
    np.testing.assert_array_equal(load_array(folder / "tokens.npy"), rows(left)["tokens"].reshape(left, 4))


def test_a_full_disk_keeps_the_rows_before(tmp_path):
    writer = RowWriter(tmp_path, ARRAYS)
    writer.append(**rows(10))
    with largest_file(4096):
        with pytest.raises(OSError):
            writer.append(**rows(1000, first=10))
        assert writer.rows == 10
        again = RowWriter(tmp_path, ARRAYS)  # what the next run does, while the disk is still full
        assert 10 <= again.rows < 1010
        again.close()
    expected = rows(again.rows)
    for name in ARRAYS:
        np.testing.assert_array_equal(load_array(tmp_path / f"{name}.npy"), expected[name])


def test_finished_arrays_are_not_written_again(tmp_path):
    writer = RowWriter(tmp_path, ARRAYS)
    writer.append(**rows(3))
    writer.close()
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    again = RowWriter(tmp_path, ARRAYS)
    assert again.rows == 3
    again.close()
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_kill_while_the_headers_are_written(tmp_path):
    """One array has its final name, the other has not: no row is lost, and they agree."""
    writer = RowWriter(tmp_path, ARRAYS)
    writer.append(**rows(3))
    writer.close()
    (tmp_path / "labels.npy").rename(tmp_path / "labels.npy.partial")
    again = RowWriter(tmp_path, ARRAYS)
    assert again.rows == 3
    again.append(**rows(2))
    again.close()
    for name, expected in rows(2).items():
        found = load_array(tmp_path / f"{name}.npy")
        np.testing.assert_array_equal(found, np.concatenate((rows(3)[name], expected)))


@pytest.mark.parametrize("n", [0, 3])
def test_rows_begin_anew_where_none_are_to_be_kept(tmp_path, n):
    """Whatever was there: finished, with other rows, or with none."""
    writer = RowWriter(tmp_path, ARRAYS)
    writer.append(**rows(n))
    writer.close()
    for path in tmp_path.glob("*.npy"):  # cut short, say
        path.write_bytes(path.read_bytes()[:140])
    again = RowWriter(tmp_path, {"labels": ((2,), np.uint8)}, most=0)
    assert again.rows == 0
    again.append(labels=np.ones((4, 2)))
    again.close()
    assert (load_array(tmp_path / "labels.npy") == np.ones((4, 2), np.uint8)).all()


def test_rows_must_fit(tmp_path):
    writer = RowWriter(tmp_path, ARRAYS)
    with pytest.raises(AssertionError, match="expected"):
        writer.append(tokens=np.zeros((2, 4)))
    with pytest.raises(AssertionError, match="unequal length"):
        writer.append(tokens=np.zeros((2, 4)), labels=np.zeros(3))
    with pytest.raises(AssertionError, match=r"rows of \(5,\), expected \(4,\)"):
        writer.append(tokens=np.zeros((2, 5)), labels=np.zeros(2))


# --- artifact folders


def finished(folder: Path, value: int = 0, config: object = None, **inputs: Path) -> Path:
    artifact = Artifact(folder, "encode", {"seed": config}, inputs, overwrite=True)
    save_array(folder / "x.npy", np.array([value]))
    artifact.finish(examples=10, seconds=4.0, seed=7)
    return folder


def test_the_manifest(tmp_path):
    source = finished(tmp_path / "source")
    folder = tmp_path / "out"
    artifact = Artifact(folder, "train", {"lr": 0.1, "path": Path("a"), "grid": (2, 3)}, {"tokens": source})
    assert not artifact.current
    assert names(folder) == [".identity.json"]
    save_array(folder / "model" / "x.npy", np.arange(2))
    write_json(folder / "facts.json", {})
    (folder / "grid.png").write_bytes(b"png")
    save_array(folder / "checkpoints" / "step.npy", np.arange(2))
    artifact.finish(examples=10, seconds=4.0, device="cpu", seed=7)
    manifest = read_manifest(folder)
    assert {key: manifest[key] for key in ("stage", "config", "inputs", "seconds", "seed", "device")} == {
        "stage": "train",
        "config": {"lr": 0.1, "path": "a", "grid": [2, 3]},
        "inputs": {"tokens": fingerprint(source)},
        "seconds": 4.0,
        "seed": 7,
        "device": "cpu",
    }
    assert manifest["examples_per_second"] == 2.5
    assert manifest["files"] == {name: sha256(folder / name) for name in ("facts.json", "model/x.npy")}
    assert manifest["other_files"] == ["checkpoints/step.npy", "grid.png"]
    assert manifest["input_folders"] == {"tokens": "../source"}
    assert manifest["versions"] == versions()
    assert {"python", "platform", "anyorder", "torch", "numpy"} <= versions().keys()
    assert ".identity.json" not in names(folder)


def test_the_clock_runs_from_the_start(tmp_path):
    begin = time.time()
    artifact = Artifact(tmp_path, "encode", {}, {})
    artifact.finish()
    manifest = read_manifest(tmp_path)
    assert 0 <= manifest["seconds"] <= time.time() - begin + 0.01
    assert manifest["examples_per_second"] is None


def test_an_artifact_is_current_for_its_own_configuration_and_inputs(tmp_path):
    source = finished(tmp_path / "source")
    out = finished(tmp_path / "out", config=1, source=source)
    assert Artifact(out, "encode", {"seed": 1}, {"source": source}).current
    finished(tmp_path / "source", config="another", value=0)  # made anew, the same bytes
    assert Artifact(out, "encode", {"seed": 1}, {"source": source}).current
    finished(tmp_path / "source", config="a third", value=1)
    with pytest.raises(ValueError, match=r"other settings or inputs \(inputs\.source .* overwrite=true"):
        Artifact(out, "encode", {"seed": 1}, {"source": source})
    assert not Artifact(out, "encode", {"seed": 1}, {"source": source}, overwrite=True).current


def test_another_configuration_makes_an_artifact_stale(tmp_path):
    finished(tmp_path, config=1)
    with pytest.raises(ValueError, match=r"\(seed 1 -> 2\): add overwrite=true"):
        Artifact(tmp_path, "encode", {"seed": 2}, {})
    assert Artifact(tmp_path, "encode", {"seed": 1}, {}).current
    stale = Artifact(tmp_path, "encode", {"seed": 2}, {}, overwrite=True)
    assert not stale.current
    with pytest.raises(FileNotFoundError, match="not a finished artifact"):
        fingerprint(tmp_path)
    stale.close()  # nothing was done: the old one is back
    assert Artifact(tmp_path, "encode", {"seed": 1}, {}).current
    assert names(tmp_path) == [MANIFEST, "x.npy"]


def leave_work(folder: Path) -> None:
    RowWriter(folder, ARRAYS).append(**rows(2))
    write_text(folder / "checkpoints" / "step-1" / "model.safetensors", "weights")
    write_text(folder / "metrics.jsonl", "{}\n")
    write_text(folder / "mine.txt", "the user's")


def test_work_is_resumed_under_the_same_configuration(tmp_path):
    Artifact(tmp_path, "encode", {"seed": 1}, {})
    leave_work(tmp_path)
    assert not Artifact(tmp_path, "encode", {"seed": 1}, {}).current
    assert RowWriter(tmp_path, ARRAYS).rows == 2
    assert (tmp_path / "checkpoints" / "step-1" / "model.safetensors").is_file()
    assert (tmp_path / "metrics.jsonl").is_file()


def test_work_of_another_configuration_is_discarded(tmp_path):
    write_text(tmp_path / "mine.txt", "the user's")
    Artifact(tmp_path, "encode", {"seed": 1}, {})
    leave_work(tmp_path)
    with pytest.raises(ValueError, match="seed 1 -> 2"):
        Artifact(tmp_path, "encode", {"seed": 2}, {})
    assert RowWriter(tmp_path, ARRAYS).rows == 2
    Artifact(tmp_path, "encode", {"seed": 2}, {}, overwrite=True)
    assert names(tmp_path) == [".identity.json", "mine.txt"]
    assert RowWriter(tmp_path, ARRAYS).rows == 0


def test_finished_arrays_of_another_configuration_are_discarded(tmp_path):
    """They would pass for the rows of this one."""
    Artifact(tmp_path, "encode", {"seed": 1}, {})
    writer = RowWriter(tmp_path, ARRAYS)
    writer.append(**rows(2))
    writer.close()
    Artifact(tmp_path, "encode", {"seed": 1}, {})
    assert RowWriter(tmp_path, ARRAYS).rows == 2
    Artifact(tmp_path, "encode", {"seed": 2}, {}, overwrite=True)
    assert RowWriter(tmp_path, ARRAYS).rows == 0


def test_another_stage_is_refused(tmp_path):
    finished(tmp_path / "done")
    Artifact(tmp_path / "begun", "encode", {}, {})
    for folder in (tmp_path / "done", tmp_path / "begun"):
        before = {path: path.read_bytes() for path in folder.iterdir()}
        with pytest.raises(ValueError, match="holds the artifact of stage 'encode', not 'train'"):
            Artifact(folder, "train", {}, {})
        assert {path: path.read_bytes() for path in folder.iterdir()} == before


def test_inputs_must_be_finished(tmp_path):
    Artifact(tmp_path / "begun", "encode", {}, {})
    with pytest.raises(FileNotFoundError, match=r"begun is not a finished artifact .* run its stage first"):
        Artifact(tmp_path / "out", "train", {}, {"tokens": tmp_path / "begun"})
    assert not (tmp_path / "out").exists()


def test_fingerprints_name_the_content(tmp_path):
    a, b, c = (finished(tmp_path / name, value, name) for name, value in (("a", 1), ("b", 1), ("c", 2)))
    assert fingerprint(a) == fingerprint(b) != fingerprint(c)
    renamed = finished(tmp_path / "d", 1)
    (renamed / "x.npy").rename(renamed / "y.npy")
    (renamed / MANIFEST).rename(renamed / ".identity.json")  # what a kill before the end leaves
    Artifact(renamed, "encode", {"seed": None}, {}).finish()
    assert fingerprint(renamed) != fingerprint(a)


def test_a_full_disk_leaves_an_artifact_unfinished(tmp_path):
    artifact = Artifact(tmp_path, "encode", {"seed": 1}, {})
    with largest_file(64), pytest.raises(OSError):
        artifact.finish()
    assert names(tmp_path) == [".identity.json"]
    assert artifact.identity.items() <= json.loads((tmp_path / ".identity.json").read_text()).items()
    artifact.finish()
    assert Artifact(tmp_path, "encode", {"seed": 1}, {}).current


def test_settings_that_are_newer_than_an_artifact_may_be_filled_in(tmp_path):
    old = {"train": {"steps": 3}, "order": "raster"}

    def completed(then):
        return {"jitter": 0.0, "share": (1, 2), **then}

    Artifact(tmp_path, "train", old, {}).finish()
    new = {**old, "jitter": 0.0, "share": [1, 2]}
    assert Artifact.is_current(tmp_path, "train", new, {}, completed)
    assert not Artifact.is_current(tmp_path, "train", new, {})
    assert not Artifact.is_current(tmp_path, "train", {**new, "jitter": 1.0}, {}, completed)


def test_work_that_was_begun_before_a_setting_existed_goes_on(tmp_path):
    Artifact(tmp_path, "train", {"steps": 3}, {})
    (tmp_path / "rows.npy.partial").write_bytes(b"half")
    Artifact(tmp_path, "train", {"steps": 3, "jitter": 0.0}, {}, lambda then: {"jitter": 0.0, **then})
    assert (tmp_path / "rows.npy.partial").exists()
    completed = {"completed": lambda then: {"jitter": 0.0, **then}}
    with pytest.raises(ValueError, match=r"jitter 0\.0 -> 1\.0"):
        Artifact(tmp_path, "train", {"steps": 3, "jitter": 1.0}, {}, **completed)
    assert (tmp_path / "rows.npy.partial").exists()
    Artifact(tmp_path, "train", {"steps": 3, "jitter": 1.0}, {}, **completed, overwrite=True)
    assert not (tmp_path / "rows.npy.partial").exists()
