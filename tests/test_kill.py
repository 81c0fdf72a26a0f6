"""`kill -9` at any moment of any stage, then the same command: the artifacts are those of a quiet run."""

import random
import signal
import subprocess
import sys
import time

import pytest
import yaml
from test_runs import EXPERIMENT

from anyorder.files import fingerprint


def run(path, out):
    return subprocess.Popen(
        [sys.executable, "-m", "anyorder", "run", str(path), f"out={out}"],
        stderr=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
    )


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_killed_runs_end_with_the_same_artifacts(tmp_path):
    path = tmp_path / "tiny.yaml"
    path.write_text(yaml.safe_dump(EXPERIMENT, sort_keys=False))
    begin = time.perf_counter()
    assert run(path, tmp_path / "quiet").wait() == 0
    length = time.perf_counter() - begin
    rng, kills = random.Random(0), 0
    while True:
        process = run(path, tmp_path / "killed")
        try:  # start-up takes a third of the time: every attempt gets somewhere, none gets far
            code = process.wait(timeout=length * rng.uniform(0.35, 0.6))
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            process.wait()
            kills += 1
            assert kills < 40, "killed runs make no progress"
            continue
        assert code == 0
        break
    assert kills >= 2
    for name in EXPERIMENT["stages"]:
        assert fingerprint(tmp_path / "killed" / name) == fingerprint(tmp_path / "quiet" / name), name
