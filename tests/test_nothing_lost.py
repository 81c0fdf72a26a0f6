"""Nothing is lost, and nothing stale is taken for new: folders as users, crashes and programs leave them."""

import json
import os
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
from PIL import Image

from anyorder import files
from anyorder.cli import main as cli
from anyorder.files import RowWriter, load_array, read_manifest, save_array, write_json, write_text
from anyorder.stages.artifacts import Artifact, verify
from anyorder.stages.execute import execute


@dataclass
class Log:
    every: int = 1
    keep: int = 2


@dataclass
class Stage:
    """Writes an array, a log and a checkpoint; `fail` raises before or in the middle."""

    inputs: ClassVar[tuple[str, ...]] = ("source",)
    aside: ClassVar[tuple[str, ...]] = ("fail", "log.every", "log.keep")
    grows: ClassVar[tuple[str, ...]] = ("steps",)
    source: Path | None = None
    value: int = 0
    steps: int = 1
    fail: str = ""
    log: Log = field(default_factory=Log)

    def run(self, artifact):
        if self.fail == "before":
            raise ValueError("this setting does not fit the input")
        begun = artifact.folder / "checkpoints" / "step"
        first = int(begun.read_text()) if begun.exists() else 0
        write_text(begun, str(self.steps))
        if self.fail == "middle":
            raise RuntimeError("crash")
        save_array(artifact.folder / "x.npy", np.array([self.value, self.steps]))
        return {"first": first}


def content(folder):
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


@pytest.fixture
def done(tmp_path):
    execute("stage", Stage(), tmp_path / "done")
    return tmp_path / "done"


# --- A1: what is refused changes nothing


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_refused_command_leaves_a_finished_artifact(done, overwrite):
    before = content(done)
    with pytest.raises(ValueError, match="does not fit" if overwrite else r"value 0 -> 1.*overwrite=true"):
        execute("stage", Stage(value=1, fail="before"), done, overwrite=overwrite)
    assert content(done) == before
    assert not execute("stage", Stage(), done)


def test_a_refused_command_line_leaves_a_finished_artifact(done, capsys):
    before = content(done)
    for out in (done, done / "checkpoints" / ".."):
        assert cli.main(["data", "source=sunsets", "size=16,16", f"out={out}", "overwrite=true"]) == 2
        assert "holds the artifact of stage 'stage'" in capsys.readouterr().err
    assert content(done) == before


@pytest.mark.parametrize("out", [".", "..", "../"])
def test_out_must_not_be_or_hold_an_input(done, out):
    before = content(done.parent)
    with pytest.raises(ValueError, match="is or holds the input source="):
        execute("stage", Stage(source=done), done / out, overwrite=True)
    assert content(done.parent) == before


def test_a_replaced_artifact_is_kept_until_the_new_one_is_finished(done):
    before = content(done)
    with pytest.raises(RuntimeError, match="crash"):
        execute("stage", Stage(value=1, fail="middle"), done, overwrite=True)
    kept = content(done / ".replaced")
    assert kept == before
    execute("stage", Stage(value=1), done)
    assert load_array(done / "x.npy")[0] == 1
    assert not (done / ".replaced").exists()


@pytest.mark.parametrize("cleaned", [False, True])
def test_a_finished_artifact_that_lacks_a_file_is_made_again(done, cleaned):
    before = read_manifest(done)
    (done / "x.npy").unlink()
    if cleaned:  # nothing to go on from
        (done / "checkpoints" / "step").unlink()
    assert execute("stage", Stage(), done)
    assert load_array(done / "x.npy").tolist() == [0, 1]
    assert read_manifest(done)["fingerprint"] == before["fingerprint"]
    assert read_manifest(done)["first"] == (0 if cleaned else 1)
    assert not execute("stage", Stage(), done)


@pytest.mark.parametrize("moved", [0, 1, 2, 3])
def test_a_kill_while_an_artifact_is_set_aside_loses_nothing(done, moved, monkeypatch):
    """After any number of moved files, the manifest is the last, the old artifact comes back."""
    before, calls = content(done), []
    replace = os.replace

    def stop(path, to):
        if ".replaced" in str(to):
            calls.append(path)
            if len(calls) > moved:
                raise KeyboardInterrupt
        elif moved == 3 and str(to).endswith(".identity.json"):
            raise KeyboardInterrupt
        replace(path, to)

    monkeypatch.setattr(os, "replace", stop)
    with pytest.raises(KeyboardInterrupt):
        Artifact(done, "stage", {"value": 1}, {}, overwrite=True)
    monkeypatch.setattr(os, "replace", replace)
    with pytest.raises(ValueError, match="overwrite=true"):
        execute("stage", Stage(value=2), done)
    assert content(done) == before


@pytest.mark.parametrize("finished", [True, False])
def test_a_checkpoint_that_is_given_up_leaves_no_empty_folder(tmp_path, finished):
    """Training would take it for a damaged checkpoint, and refuse to go on."""
    saved = tmp_path / "run/checkpoints/step-00000002/state.bin"
    with Artifact(tmp_path / "run", "stage", {"value": 0}, {}) as artifact:
        write_text(saved, "2")
        if finished:
            artifact.finish()
    with Artifact(tmp_path / "run", "stage", {"value": 1}, {}, overwrite=True):
        assert not saved.parent.exists()
        assert (tmp_path / "run/.replaced/checkpoints/step-00000002/state.bin").exists() == finished
    if finished:
        with pytest.raises(ValueError, match="overwrite=true"):
            execute("stage", Stage(value=2), tmp_path / "run")
        assert saved.read_text() == "2", "what is given up before it wrote anything comes back"


# --- A2: only the stage's files are touched


def test_files_of_others_survive(tmp_path):
    (tmp_path / "elsewhere").mkdir()
    write_text(tmp_path / "elsewhere" / "step-1", "of somebody else")
    out = tmp_path / "mine"
    execute("stage", Stage(), out / "tokenizer")
    execute("stage", Stage(), out)
    theirs = {"notes/my.npy": "a", "x.npy.bak": "b", "photo.png": "c", "mine.npy": "d"}
    for name, text in theirs.items():
        write_text(out / name, text)
    (out / "samples").symlink_to(tmp_path / "elsewhere")
    nested = content(out / "tokenizer")
    execute("stage", Stage(value=1), out, overwrite=True)
    assert {name: (out / name).read_text() for name in theirs} == theirs
    assert content(out / "tokenizer") == nested
    assert content(tmp_path / "elsewhere") == {"step-1": b"of somebody else"}
    assert sorted(read_manifest(out)["files"]) == ["x.npy"]


def test_a_linked_folder_is_neither_followed_nor_taken_for_new_work(done, tmp_path):
    (done / "checkpoints").rename(tmp_path / "store")
    (done / "checkpoints").symlink_to(tmp_path / "store")
    before = content(tmp_path / "store")
    manifest = read_manifest(done)
    write_json(done / "manifest.json", {**manifest, "other_files": ["checkpoints"]})
    execute("stage", Stage(value=1), done, overwrite=True)
    assert content(tmp_path / "store") == before
    assert read_manifest(done)["first"] == 0


def test_a_manifest_names_nothing_outside(done):
    outside = done.parent / "mine.npy"
    outside.write_text("mine")
    manifest = read_manifest(done)
    names = [str(outside), "../mine.npy", *manifest["other_files"]]
    write_json(done / "manifest.json", {**manifest, "other_files": names})
    execute("stage", Stage(value=1), done, overwrite=True)
    assert outside.read_text() == "mine"


def test_files_of_a_foreign_folder_are_not_adopted(tmp_path):
    for name in ("train.mine.npy", "checkpoints/step", "x.npy.partial", "config.json"):
        out = tmp_path / name.replace("/", "-")
        write_text(out / name, "0")
        with pytest.raises(ValueError, match="no manifest vouches for"):
            execute("stage", Stage(), out, overwrite=True)
        assert content(out) == {name: b"0"}
    write_text(tmp_path / "notes" / "notes.txt", "mine")
    execute("stage", Stage(), tmp_path / "notes")
    assert (tmp_path / "notes" / "notes.txt").read_text() == "mine"
    assert "notes.txt" not in read_manifest(tmp_path / "notes")["other_files"]


def test_data_of_a_source_that_changed_are_decoded_again_and_leave_foreign_files(tmp_path):
    source, out = tmp_path / "source", tmp_path / "out"
    source.mkdir()
    for i in range(4):
        Image.new("RGB", (20, 20), (i, 0, 0)).save(source / f"{i}.png")
    write_text(out / "train.images.npy.bak", "mine")
    command = ["data", f"source={source}", "size=16,16", f"out={out}"]
    assert cli.main(command) == 0
    write_text(out / "train.mine.npy", "mine")
    Image.new("RGB", (20, 20), (9, 0, 0)).save(source / "9.png")
    assert cli.main([*command, "overwrite=true"]) == 0
    counts = read_manifest(out)["counts"]
    assert sum(counts.values()) == 5
    assert {split: len(load_array(out / f"{split}.images.npy")) for split in counts} == counts
    assert verify(out) == []
    for name in ("train.images.npy.bak", "train.mine.npy"):
        assert (out / name).read_text() == "mine"


def test_half_written_files_of_a_kill_are_removed_and_those_of_others_stay(done):
    with pytest.raises(RuntimeError):
        execute("stage", Stage(value=1, fail="middle"), done, overwrite=True)
    for name in (
        ".x.npy.0123abcd.tmp",
        "checkpoints/.state.0123abcd.tmp",
        ".mine.tmp",
        "notes/.x.0123abcd.tmp",
    ):
        write_text(done / name, "half")
    execute("stage", Stage(value=1), done)
    assert sorted(content(done)) == [
        ".mine.tmp",
        "checkpoints/step",
        "manifest.json",
        "notes/.x.0123abcd.tmp",
        "x.npy",
    ]


# --- A3: settings that are free to change


def test_settings_put_aside_change_nothing(done):
    assert not execute("stage", Stage(log=Log(every=5, keep=3)), done)
    with pytest.raises(RuntimeError):
        execute("stage", Stage(value=1, fail="middle"), done.parent / "begun")
    execute("stage", Stage(value=1, log=Log(every=7)), done.parent / "begun")
    assert read_manifest(done.parent / "begun")["first"] == 1
    assert read_manifest(done)["config"]["log"] == {"every": 1, "keep": 2}


def test_more_steps_go_on_and_fewer_are_refused(done):
    execute("stage", Stage(steps=3), done)
    assert read_manifest(done)["first"] == 1
    assert load_array(done / "x.npy").tolist() == [0, 3]
    with pytest.raises(ValueError, match="steps=2, but 3 are done already"):
        execute("stage", Stage(steps=2), done)
    with pytest.raises(ValueError, match=r"value 0 -> 1, steps 3 -> 4"):
        execute("stage", Stage(value=1, steps=4), done)


# --- A4: one writer at a time


WRITE = """
import sys, time
from anyorder.stages.artifacts import Artifact
artifact = Artifact(sys.argv[1], "stage", {"value": int(sys.argv[2])}, {})
print("locked", flush=True)
time.sleep(60)
"""


def test_two_processes_do_not_write_one_folder(tmp_path):
    command = [sys.executable, "-c", WRITE, str(tmp_path / "out"), "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as first:
        assert first.stdout.readline() == "locked\n"
        with pytest.raises(ValueError, match=rf"is being written by process {first.pid} on .* since 20"):
            Artifact(tmp_path / "out", "stage", {"value": 0}, {})
        assert (tmp_path / "out" / ".identity.json").is_file()
        first.kill()
        first.wait()
    for _ in range(50):  # a lock dies with its process
        try:
            artifact = Artifact(tmp_path / "out", "stage", {"value": 0}, {})
            break
        except ValueError:
            time.sleep(0.1)
    artifact.finish()


# --- B8, B13: what is there is not taken for what is asked for


def test_orphaned_arrays_are_not_resumed(done):
    (done / "manifest.json").unlink()
    before = content(done)
    with pytest.raises(ValueError, match=r"no manifest vouches for \(checkpoints/step, x\.npy\)"):
        execute("stage", Stage(value=1), done)
    assert content(done) == before


def test_leftovers_are_not_part_of_a_later_result(tmp_path):
    with Artifact(tmp_path, "stage", {"value": 0}, {}) as artifact:
        save_array(tmp_path / "extra.npy", np.zeros(1))
        RowWriter(tmp_path, {"rows": ((), np.int64)}).append(rows=np.zeros(3))
        artifact.finish()
    execute("stage", Stage(value=1), tmp_path, overwrite=True)
    assert sorted(content(tmp_path)) == ["checkpoints/step", "manifest.json", "x.npy"]


def test_times_are_no_content(done):
    again = done.parent / "again"
    with Artifact(again, "stage", {}, {}) as artifact:
        save_array(again / "x.npy", np.array([0, 1]))
        write_json(again / "timing.json", {"seconds": 5})
        save_array(again / "seconds.npy", np.zeros(3))
        artifact.finish()
    assert read_manifest(again)["fingerprint"] == read_manifest(done)["fingerprint"]


def test_what_was_set_aside_comes_back_when_it_is_asked_for_again(done):
    before = content(done)
    with pytest.raises(RuntimeError, match="crash"):
        execute("stage", Stage(value=1, fail="middle"), done, overwrite=True)
    assert content(done) != before
    with pytest.raises(ValueError, match="is being made with other settings"):
        execute("stage", Stage(), done)
    assert not execute("stage", Stage(), done, overwrite=True)
    assert content(done) == before
    assert not (done / ".replaced").exists()
    with pytest.raises(RuntimeError, match="crash"):
        execute(
            "stage", Stage(steps=2, fail="middle"), done
        )  # goes on with the files: only the manifest is aside
    assert execute("stage", Stage(), done, overwrite=True)
    assert verify(done) == []


# --- verify


def test_verify_finds_what_was_changed(done, capsys):
    second = done.parent / "second"
    execute("stage", Stage(source=done, value=1), second)
    assert read_manifest(second)["input_folders"] == {"source": "../done"}
    assert verify(second) == []
    assert cli.main(["verify", str(second), str(done)]) == 0
    whole = (done / "x.npy").read_bytes()
    (done / "x.npy").write_bytes(whole[:-1] + b"!")
    assert verify(second) == [f"{done / 'x.npy'} was changed"]
    assert cli.main(["verify", str(second)]) == 1
    assert "x.npy was changed" in capsys.readouterr().err
    (done / "x.npy").unlink()
    assert verify(done) == [f"{done / 'x.npy'} is missing"]
    execute("stage", Stage(value=5), done, overwrite=True)
    assert verify(second) == [f"{done} (source of {second}) is not what it was made from"]
    done.rename(done.parent / "moved")
    assert verify(second) == [f"{done} (source of {second}) is missing"]
    for arguments, code in (([], 2), ([str(done)], 2)):
        assert cli.main(["verify", *arguments]) == code


def record(folder, **facts):
    """A folder with a manifest that somebody else may have written."""
    folder.mkdir(parents=True, exist_ok=True)
    whole = {
        "stage": "train",
        "config": {},
        "inputs": {"model": "0" * 16},
        "fingerprint": "0" * 16,
        "files": {},
    }
    write_json(folder / "manifest.json", whole | facts)
    return folder


@pytest.mark.parametrize(
    "facts",
    [
        {"files": {"../../secret": "0"}}, {"files": {"/etc/hostname": "0"}}, {"files": {"x": 1}},
        {"files": {"x\0y": "0"}}, {"files": []}, {"other_files": 5}, {"other_files": [5]},
        {"other_files": ["checkpoints/../../x"]}, {"other_files": "checkpoints/x"},
        {"input_folders": ["x"]}, {"input_folders": {"model": 5}}, {"input_folders": {"tokens": "x"}},
        {"fingerprint": 5},
    ],
)  # fmt: skip
def test_manifests_of_others_are_refused_in_one_line(facts, tmp_path, capsys):
    folder = record(tmp_path / "run/x", **facts)
    for command in ("verify", "ls", "clean"):
        assert cli.main([command, str(folder)]) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1
        assert "x/manifest.json" in error or "x holds no artifacts" in error


def test_verify_reads_each_artifact_once(tmp_path, monkeypatch):
    base, read = record(tmp_path / "base"), []
    monkeypatch.setattr(files, "sha256", lambda path: read.append(path) or "0")
    (base / "x").write_text("x")
    record(base, files={"x": "0"}, input_folders={"model": "../top"})  # in a circle
    for name in ("left", "right"):
        record(tmp_path / name, input_folders={"model": "../base"})
    inputs = {"left": "0" * 16, "right": "0" * 16}
    top = record(tmp_path / "top", inputs=inputs, input_folders={role: f"../{role}" for role in inputs})
    assert verify(top) == []
    assert read == [base / "x"]


def test_what_was_set_aside_is_no_artifact_to_be_cleaned(tmp_path, capsys):
    run = tmp_path / "run"
    aside = record(run / "m/.replaced", other_files=["checkpoints/0.pt"]) / "checkpoints/0.pt"
    aside.parent.mkdir()
    aside.write_text("the only one")
    write_json(run / "m/.identity.json", {"stage": "train", "config": {}, "inputs": {}})
    assert cli.main(["clean", str(run), "--yes"]) == 0
    assert aside.read_text() == "the only one"
    assert cli.main(["ls", str(run)]) == 0
    assert ".replaced" not in capsys.readouterr().out


@pytest.mark.parametrize(
    "arguments",
    [
        ["report", "{}", "out={}/x.npy"], ["report", "{}", "out={}/manifest.json"],
        ["report", "{}", "out={}/x.md", "--csv"],
        ["bench", "out={}/x.npy"], ["plan", "imagenet256", "out={}/manifest.json"],
    ],
)  # fmt: skip
def test_commands_do_not_write_over_the_files_of_an_artifact(arguments, done, capsys):
    record(done, files={"x.npy": "0", "x.csv": "0"})
    before = content(done)
    assert cli.main([text.format(done) for text in arguments]) == 2
    assert "is a file of a finished artifact: choose another out=" in capsys.readouterr().err
    assert content(done) == before


def test_a_moved_run_still_knows_its_inputs(done):
    execute("stage", Stage(source=done, value=1), done.parent / "second")
    done.parent.rename(done.parent.with_name("elsewhere"))
    assert verify(done.parent.with_name("elsewhere") / "second") == []


# --- C17: JSON that is not ours


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "not valid JSON"),
        ("[" * 100_000, "nested too deeply"),
        ("[1, 2]", "not the manifest of an artifact"),
        ('{"name": "my web app", "icons": []}', "not the manifest of an artifact"),
        ('{"stage": "stage", "config": [], "inputs": {}}', "not the manifest of an artifact"),
        ('{"stage": 3, "config": {}, "inputs": {}}', "not the manifest of an artifact"),
        ('{"stage": "other", "config": {}, "inputs": {}}', "holds the artifact of stage 'other'"),
    ],
)
def test_a_foreign_manifest_is_named_and_left_alone(tmp_path, text, message):
    path = tmp_path / "manifest.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=message) as caught:
        execute("stage", Stage(), tmp_path, overwrite=True)
    assert str(tmp_path) in str(caught.value)
    assert "\n" not in str(caught.value)
    assert path.read_text() == text
    with pytest.raises(ValueError, match=r"manifest\.json"):
        execute("stage", Stage(source=tmp_path), tmp_path.with_name("out"))


def test_json_holds_no_nan(tmp_path):
    write_json(tmp_path / "x.json", {"a": float("nan"), "b": [np.float32("inf"), np.int64(1)], 3: (1.5,)})
    text = (tmp_path / "x.json").read_text()
    assert json.loads(text, parse_constant=pytest.fail) == {"a": None, "b": [None, 1], "3": [1.5]}


# --- the command line


def test_a_command_says_what_it_wrote_and_what_comes_next(tmp_path, capsys):
    out = tmp_path / "run" / "data"
    command = ["data", "source=sunsets", "--size", "16,16", "max_train=3", "--max-test=2", f"out={out}"]
    for done in ("wrote", "up to date:"):
        assert cli.main(command) == 0
        last = capsys.readouterr().out.splitlines()[-1]
        what = "images of one size, with classes and splits"
        after = f"anyorder tokenizer data={out} out={out.parent}/tokenizer"
        assert last == f"{done} {out}: {what}; next: {after}"
    assert cli.main([*command, "seed=1"]) == 2
    assert "(seed 0 -> 1): add overwrite=true" in capsys.readouterr().err
    assert cli.main([*command, "seed=1", "--overwrite", "true"]) == 0


def test_help_into_a_closed_pipe_is_quiet():
    command = [sys.executable, "-m", "anyorder", "--help"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        process.stdout.close()
        assert process.stderr.read() == b""
        assert process.wait() == 0


def test_the_command_alone_says_how_to_begin(capsys):
    assert cli.main([]) == 2
    assert "anyorder sample pipeline=fashion32" in capsys.readouterr().out


@pytest.mark.parametrize("mine", [False, True])
def test_a_refused_command_leaves_no_empty_folders(tmp_path, mine):
    if mine:
        (tmp_path / "new").mkdir()
    with pytest.raises(ValueError, match="does not fit"):
        execute("stage", Stage(fail="before"), tmp_path / "new" / "run" / "stage")
    assert [path.name for path in tmp_path.iterdir()] == ["new"] * mine
    assert not mine or not any((tmp_path / "new").iterdir())
