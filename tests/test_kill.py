"""`kill -9`, a second process, a full or a stalled disk: the same command goes on, to equal artifacts.

Every test is a fresh process that imports everything once; its forks run the command line. Timings come from
a quiet run, so nothing here depends on how fast the machine is. ANYORDER_KILLS says how many kills (100).
"""

import importlib
import json
import math
import os
import random
import re
import signal
import subprocess
import sys
import time
import traceback
from collections import Counter
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image

KILLS = int(os.environ.get("ANYORDER_KILLS", "100"))
TINY_VQ = {
    "channels": 8, "multipliers": [1, 1, 2], "groups": 1, "res_blocks": 1, "attention": False,
    "z_channels": 8, "vocab_size": 16, "code_dim": 4, "codebook_update": "ema", "revive_after": 2,
}  # fmt: skip
SMALL = {"depth": 1, "width": 32, "heads": 2}
STEPS = {"steps": 4, "batch_size": 4, "log_every": 1, "eval_every": 2, "save_every": 1}
DATA = {"stage": "data", "max_train": 16, "max_validation": 4, "max_test": 8}
QUICK = {"policy": {"order": "entropy", "per_step": 8}}
EXPERIMENT = {
    "data": {**DATA, "size": [16, 16]},
    "large": {**DATA, "size": [24, 16]},
    "photos": {"stage": "data", "source": "PHOTOS", "size": [16, 16], "cache": False},
    "tokenizer": {"data": "data", "model": TINY_VQ, "train": STEPS},
    "features": {"data": "data", "channels": [8, 16], "train": {**STEPS, "ema": 0.5}},
    "tokens": {"data": "data", "tokenizer": "tokenizer", "batch_size": 5},
    "photo-tokens": {"stage": "tokens", "data": "photos", "tokenizer": "tokenizer", "batch_size": 7,
                     "mirror": True, "crops": True},
    "large-tokens": {"stage": "tokens", "data": "large", "tokenizer": "tokenizer"},
    "any": {"stage": "train", "tokens": "tokens", "model": SMALL, "train": {**STEPS, "sample_every": 2}},
    "orders": {"model": "any", "tokens": "tokens", "test_limit": 4, "batch_size": 6, **QUICK},
    "ordered": {"stage": "train", "tokens": "tokens", "init": "any", "orders": "orders",
                "random_share": 0.2, "train": {**STEPS, "patience": 3, "watch": "validation_nll"}},
    "online": {"stage": "train", "tokens": "tokens", "init": "any", "online": {**QUICK["policy"]},
               "train": {**STEPS, "ema": 0.5}},
    "iterate": {"model": "any", "tokens": "tokens", "rounds": 2, "patience": 2, "limit": 8, "test_limit": 4,
                "first": QUICK["policy"], "train": {**STEPS, "steps": 2},
                "policy": {"order": "token_likelihood", "location": 1.0, "per_step": 8}},
    "sample": {"model": "ordered", "num_images": 8, "batch_size": 3, **QUICK},
    "scored": {"stage": "sample", "model": "ordered", "scorer": "any", "num_images": 8, **QUICK},
    "tune": {"model": "any", "features": "features", "temperatures": [1.0], "scales": [1.0, 1.5],
             "num_images": 4, **QUICK},
    "eval": {"samples": "sample", "features": "features", "split": "test", "nll_images": 4},
    "eval-scored": {"stage": "eval", "samples": "scored", "features": "features", "split": "test",
                    "nll_images": 4},
    "compare": {"a": "eval-scored", "b": "eval", "resamples": 200},
    "completion": {"model": "ordered", "features": "features", "num_images": 4, "batch_size": 3,
                   "seeds": [0, 1]},
    "grid": {"model": "any", "other": "large-tokens", "num_images": 4, "seeds": [0], "samples": 2},
    "pipeline": {"samples": "scored"},
}  # fmt: skip
WRITES = ("os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate")


def stage_of(name):
    return EXPERIMENT[name].get("stage", name)


# --- forks that run the command line --------------------------------------------------------------------


class Watch:
    """Counts and times, in a child, what it does to the files of each artifact; dies at a moment of one."""

    def __init__(self, out, target="", operation=0, begun=-1):
        self.out, self.target, self.operation, self.begun = f"{out}/", target, operation, begun
        self.name, self.seen, self.seconds = "", Counter(), {}
        sys.addaudithook(self)

    def __call__(self, event, arguments):
        writes = event == "open" and isinstance(arguments[2], int) and arguments[2] & os.O_ACCMODE
        if not (writes or event in WRITES):
            return
        path = str(arguments[0])
        if path.startswith(self.out) and (name := path.removeprefix(self.out).split("/")[0]) in EXPERIMENT:
            if name != self.name:
                self.name, self.seconds[name] = name, time.perf_counter()
                if name == self.target and self.begun >= 0:
                    os.write(self.begun, b".")
            self.seen[name] += 1
        if self.operation and self.seen[self.target]:
            self.operation -= 1
            if not self.operation:
                os.kill(os.getpid(), signal.SIGKILL)


def fork(folder, out, log, arm=lambda: None):
    """Process id of a child that runs the experiment of `folder` into `out`; what it says goes to `log`."""
    if pid := os.fork():
        return pid
    code = 99
    try:
        descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(descriptor, 1)
        os.dup2(descriptor, 2)
        after = arm()
        code = importlib.import_module("anyorder.cli.main").main(
            ["run", str(folder / "x.yaml"), f"out={out}"]
        )
        if after:
            after()
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def wait(pid):
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def run(folder, out, log):
    code, said = wait(fork(folder, out, log)), log.read_text()
    assert code == 0, said[-3000:]
    return said


def quiet(folder):
    """Two uninterrupted runs; the second one, without imports, is timed."""
    stages = EXPERIMENT | {"photos": {**EXPERIMENT["photos"], "source": str(photos(folder / "photos"))}}
    (folder / "x.yaml").write_text(yaml.safe_dump({"stages": stages}, sort_keys=False))
    for name in ("first", "quiet"):
        arm = partial(measured, folder / name)
        code = wait(fork(folder, folder / name, folder / "quiet.log", arm))
        assert code == 0, (folder / "quiet.log").read_text()[-3000:]
        facts(folder)
    assert_equal(folder, folder / "first")


def photos(folder):
    """A folder of images of two classes."""
    noise = np.random.default_rng(0).integers(0, 256, (16, 20, 24, 3), np.uint8)
    for i, pixels in enumerate(noise):
        path = folder / "ab"[i % 2] / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(path)
    return folder


def measured(out):
    """In a child: write down, at the end, the times and the number of operations of each artifact."""
    watch = Watch(out)

    def after():
        begun = [*watch.seconds.values(), time.perf_counter()]
        seconds = {name: begun[i + 1] - begun[i] for i, name in enumerate(watch.seconds)}
        found = {"seconds": seconds, "operations": watch.seen, "modules": list(sys.modules)}
        (out.parent / "facts.json").write_text(json.dumps(found))

    return after


def facts(folder):
    """What the quiet run measured; its imports are made here, once for all forks."""
    found = json.loads((folder / "facts.json").read_text())
    for name in found["modules"]:
        try:
            importlib.import_module(name)
        except Exception:
            continue
    return found


def files_of(out):
    """Every file of the artifacts: a kill leaves nothing behind."""
    return sorted(str(p.relative_to(out)) for name in EXPERIMENT for p in (out / name).rglob("*"))


def assert_equal(folder, out):
    from anyorder.files import read_manifest
    from anyorder.stages.artifacts import verify

    for name in EXPERIMENT:
        ours, theirs = read_manifest(out / name), read_manifest(folder / "quiet" / name)
        assert ours["fingerprint"] == theirs["fingerprint"], name
        values, expected = ours.get("metrics", {}), theirs.get("metrics", {})
        assert {k: v for k, v in values.items() if "seconds" not in k} == {
            k: v for k, v in expected.items() if "seconds" not in k
        }, name
        assert verify(out / name) == [], name
    assert set(files_of(out)) ^ set(files_of(folder / "quiet")) == set()
    assert (out / "report.html").stat().st_size > 0


# --- the scenarios --------------------------------------------------------------------------------------


def reached(out):
    """The artifact at which a killed run was; nothing between two of them."""
    for name in EXPERIMENT:
        if not (out / name / "manifest.json").is_file() or (out / name / ".identity.json").is_file():
            return name if (out / name).is_dir() else ""
    return ""


def kills(folder):
    """Kill each artifact's stage several times, at random times and before random operations on its files."""
    known, rng = facts(folder), random.Random(KILLS)
    hits, moments, total = Counter(), Counter(), 0
    quota = math.ceil(KILLS / len(EXPERIMENT))
    for attempt in range(20):
        out, spent = folder / f"killed-{attempt}", Counter()
        for target in EXPERIMENT:
            while spent[target] < quota and not (out / target / "manifest.json").is_file():
                spent[target] += 1
                kind = rng.choice(("time", "operation"))
                if kill(folder, out, target, known, rng, kind) != -signal.SIGKILL:
                    break
                total += 1
                hits[reached(out)] += 1
                moments[kind] += 1
        run(folder, out, folder / "killed.log")
        assert_equal(folder, out)
        assert run(folder, out, folder / "again.log").count("up to date") == len(EXPERIMENT)
        stages = Counter(stage_of(name) for name in hits.elements() if name)
        if total >= KILLS and set(stages) == set(map(stage_of, EXPERIMENT)):
            return {"kills": total, "between": hits[""], "passes": attempt + 1, **moments, "stages": stages}
    raise AssertionError(f"{total} kills reached only {hits}")


def kill(folder, out, target, known, rng, kind):
    """Exit code of a run that is killed while it works on `target`, if that takes as long as it should."""
    begun, at_child = os.pipe()
    operation = rng.randint(1, known["operations"][target]) if kind == "operation" else 0
    pid = fork(folder, out, folder / "killed.log", lambda: Watch(out, target, operation, at_child) and None)
    os.close(at_child)
    if kind == "time" and os.read(begun, 1):
        time.sleep(rng.uniform(0, known["seconds"][target]))
        os.kill(pid, signal.SIGKILL)
    os.close(begun)
    code = wait(pid)
    assert code in (0, -signal.SIGKILL), (folder / "killed.log").read_text()[-3000:]
    return code


def two_at_once(folder):
    """One wins, whoever begins; the other says who holds the folder, and may try again."""
    facts(folder)
    for i, target in enumerate(("", "", "features", "iterate")):  # what is begun when the second one starts
        out, logs = folder / f"both-{i}", [folder / f"both-{i}-{j}.log" for j in range(2)]
        begun, at_child = os.pipe()
        pids = [fork(folder, out, logs[0], lambda x=(out, target, 0, at_child): Watch(*x) and None)]
        os.close(at_child)
        if target:
            os.read(begun, 1)
        pids.append(fork(folder, out, logs[1]))
        codes = [wait(pid) for pid in pids]
        os.close(begun)
        assert sorted(codes) == [0, 2], [log.read_text()[-1000:] for log in logs]
        winner, said = pids[codes.index(0)], logs[codes.index(2)].read_text()
        assert re.search(rf"error: .* is being written by process {winner} on \S+ since 20", said), said[
            -1000:
        ]
        assert "Traceback" not in said
        assert_equal(folder, out)
    return {"rounds": i + 1}


def full_disk(folder):
    """A disk that grows a little after each failure; a failure is one line, and the next run goes on."""
    facts(folder)
    disk, log = folder / "disk", folder / "full.log"
    out, ballast = disk / "out", disk / "ballast"
    used = sum(p.stat().st_blocks * 512 for p in (folder / "quiet").rglob("*"))
    size, free, failures = os.statvfs(disk).f_blocks * os.statvfs(disk).f_frsize, 8192, Counter()
    assert size > 1.5 * used
    ballast.write_bytes(bytes(size - free))
    while code := wait(fork(folder, out, log)):
        said = log.read_text()
        errors = [line for line in re.split(r"[\r\n]", said) if "error" in line.lower()]
        assert len(errors) == 1, said[-3000:]
        assert errors[0].startswith("anyorder: error: the disk is full: free some space"), said[-3000:]
        assert code == 1
        assert "Traceback" not in said
        failures[reached(out)] += 1
        assert failures.total() < 200, failures
        free += random.Random(free).randrange(4096, used // 8)
        os.truncate(ballast, max(0, size - free))
    assert len(failures) > 3, failures
    assert_equal(folder, out)
    return dict(failures)


def stalled_disk(folder):
    """Bringing a file to disk blocks until others have tried: the run waits, they are told who holds it."""
    facts(folder)
    out = folder / "stalled"
    targets = random.Random(1).sample(list(EXPERIMENT), 4)
    (stall, at_child), (released, release) = os.pipe(), os.pipe()

    def arm():
        sync, left = os.fsync, list(targets)

        def blocks(descriptor):
            path = os.readlink(f"/proc/self/fd/{descriptor}")
            name = path.removeprefix(f"{out}/").split("/")[0]
            if name in left and ".identity" not in path:
                left.remove(name)
                os.write(at_child, b".")
                os.read(released, 1)
            sync(descriptor)

        os.fsync = blocks

    pid = fork(folder, out, folder / "stalled.log", arm)
    os.close(at_child)
    stalls = 0
    while os.read(stall, 1):
        stalls += 1
        code, said = wait(fork(folder, out, folder / "second.log")), (folder / "second.log").read_text()
        assert code == 2, said[-1000:]
        assert f"is being written by process {pid} on " in said, said[-1000:]
        time.sleep(1)
        os.write(release, b".")
    assert wait(pid) == 0, (folder / "stalled.log").read_text()[-3000:]
    assert stalls == len(targets)
    assert_equal(folder, out)
    return {"stalls": stalls, "at": targets}


# --- the tests ------------------------------------------------------------------------------------------


def scenario(function, folder, *before):
    """What a scenario returns, in a process of its own, with one thread: threads do not survive a fork."""
    command = [*before, sys.executable, __file__, function.__name__, str(folder)]
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    assert done.returncode == 0, done.stderr[-5000:]
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("kill")
    scenario(quiet, folder)
    return folder


@pytest.mark.slow
@pytest.mark.timeout(7200)
def test_killed_runs_end_with_the_same_artifacts(folder):
    found = scenario(kills, folder)
    print(json.dumps(found))
    assert found["kills"] >= KILLS
    assert min(found["time"], found["operation"]) > 0
    assert set(found["stages"]) == set(map(stage_of, EXPERIMENT))


def test_every_stage_is_in_the_experiment():
    from anyorder.stages.experiment import STAGES

    assert set(map(stage_of, EXPERIMENT)) == set(STAGES)


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_of_two_processes_one_wins_and_the_other_says_who_holds_the_folder(folder):
    assert scenario(two_at_once, folder)["rounds"] == 4


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_a_full_disk_is_one_line_and_the_run_goes_on(folder):
    (folder / "disk").mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=32m", "tmpfs", str(folder / "disk")]
    try:  # seen by the processes below alone, and gone with them
        tried = subprocess.run(["unshare", "-rm", *mount], capture_output=True, text=True, check=False)
    except OSError as e:
        pytest.skip(f"no disk can be mounted here: {e}")
    if tried.returncode:
        pytest.skip(f"no disk can be mounted here: {tried.stderr.strip()}")
    print(scenario(full_disk, folder, "unshare", "-rm", "sh", "-c", f'{" ".join(mount)} && exec "$@"', "sh"))


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_a_stalled_disk_is_waited_for(folder):
    print(scenario(stalled_disk, folder))


if __name__ == "__main__":
    print(json.dumps(globals()[sys.argv[1]](Path(sys.argv[2]))))
