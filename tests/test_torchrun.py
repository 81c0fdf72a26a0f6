"""Under torchrun itself: it stops, it loses workers, and the same command goes on.

As a script this file prints what `kills` found: `ANYORDER_KILLS=20 python tests/test_torchrun.py FOLDER`.
"""

import contextlib
import itertools
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest
from test_processes import KILLS, distance, logged, tokens, trained, wait_for

STEPS = 60
PLAIN = [sys.executable, "-m"]
TORCHRUN = [*PLAIN, "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m"]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "ANYORDER_BF16": "off"}


@contextlib.contextmanager
def running(arguments, log):
    """torchrun with two workers; nothing of it is left behind."""
    with open(log, "w") as said:
        agent = subprocess.Popen([*TORCHRUN, "anyorder", *arguments], stderr=said, env=ENVIRONMENT)
        try:
            yield agent
        finally:
            if agent.poll() is None:
                end([*workers(agent), agent.pid])
            agent.wait()


def workers(agent):
    """Process ids of the workers that torchrun started."""
    pids = []
    for path in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            parent = int((path / "stat").read_text().rpartition(")")[2].split()[1])
            if parent == agent.pid and b"anyorder" in (path / "cmdline").read_bytes():
                pids.append(int(path.name))
    return sorted(pids)


def end(pids, number=signal.SIGKILL):
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)


def alone(folder, **train):
    """The folder of an uninterrupted training in one process, without torchrun."""
    tokens(folder)
    arguments = trained(folder, folder / "alone", **train)
    subprocess.run([*PLAIN, "anyorder", "-q", *arguments], check=True, env=ENVIRONMENT)
    return folder / "alone"


def wait_for_steps(agent, out):
    """Wait until torchrun's workers have made further steps, or ended."""
    before = logged(out)
    wait_for(lambda: logged(out) > before or agent.poll() is not None, time.perf_counter() + 300)


# --- kills ------------------------------------------------------------------------------------------------


def kills(folder):
    """Kill one worker, all, or torchrun too, at random or while they save; the same command goes on."""
    expected, rng, found = alone(folder, steps=STEPS, save_every=1000), random.Random(KILLS), Counter()
    apart = {False: 0.0, True: 0.0}
    for number in itertools.count():
        shard, out, most = number % 2 == 1, folder / f"{number}", found["kills"] + (KILLS + 1) // 2
        arguments = trained(folder, out, steps=STEPS, shard=shard)
        while not (out / "manifest.json").is_file():
            with running(arguments, folder / "log") as agent:
                struck = found["kills"] < min(most, KILLS) and strike(agent, out, rng, found)
                assert (agent.wait(600) == 0) != struck, (folder / "log").read_text()[-3000:]
            check(folder / "log", found)
            print(dict(found), file=sys.stderr, flush=True)
        apart[shard] = max(apart[shard], distance(expected, out))
        if shard and found["kills"] >= KILLS:
            return {**found, "DDP": apart[False], "shard": apart[True]}


def strike(agent, out, rng, found):
    """Kill, at any time or while a state is written, and count what was hit; whether the run was hit."""
    wait_for_steps(agent, out)
    if rng.random() < 0.5:
        wait_for(lambda: unfinished(out) or agent.poll() is not None, time.perf_counter())
    else:
        time.sleep(rng.uniform(0, 0.5))
    pids = workers(agent) if agent.poll() is None else []
    if len(pids) < 2 or (out / "manifest.json").is_file():
        return False
    kind = rng.choice(("one", "one", "all", "all and torchrun"))
    saving = bool(unfinished(out))
    end([rng.choice(pids)] if kind == "one" else [*pids, *[agent.pid] * (kind != "all")])
    found.update({"kills": 1, f"of {kind}": 1, "while a state was written": int(saving)})
    return True


def unfinished(out):
    """The state that is being written."""
    return [*out.glob("checkpoints/.step*")]


def check(log, found):
    """The workers that were left said why they end; the one trace, if any, is torchrun's."""
    said = log.read_text()
    assert said.count("Traceback") <= 1, said[-3000:]
    assert "anyorder: error: " not in said.replace("anyorder: error: another process of this run ended", "")
    found["said that another process ended"] += "another process of this run ended" in said


@pytest.mark.slow
@pytest.mark.timeout(7200)
def test_killed_workers_of_torchrun_go_on(tmp_path):
    found = kills(tmp_path)
    print(found)
    assert found["kills"] == KILLS
    assert found["while a state was written"] > 0
    assert found["said that another process ended"] > 0
    assert found["DDP"] == 0
    assert found["shard"] < 1e-6


# --- stops ------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_torchrun_starts_stops_and_goes_on(tmp_path):
    """SIGTERM to torchrun, or to one worker, stops all after the same step; then they go on to the end."""
    length, out, steps = {"steps": 120, "save_every": 1000}, tmp_path / "out", [0]
    expected = alone(tmp_path, **length)
    for name in ("torchrun", "worker"):
        with running(trained(tmp_path, out, **length), tmp_path / "log") as agent:
            wait_for_steps(agent, out)
            end([agent.pid] if name == "torchrun" else workers(agent)[1:], signal.SIGTERM)
            assert agent.wait(60) != 0
        said = (tmp_path / "log").read_text()
        assert said.count("anyorder: interrupted") == 1, said[-3000:]
        state = sorted((out / "checkpoints").glob("step-*"))[-1]
        steps.append(json.loads((state / "facts.json").read_text())["step"])
        assert state.name == f"step-{steps[-1]:08d}"
    assert 0 < steps[1] < steps[2] < 120
    with running(trained(tmp_path, out, **length), tmp_path / "log") as agent:
        assert agent.wait(300) == 0, (tmp_path / "log").read_text()[-3000:]
    logged = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in logged if "loss" in row] == list(range(1, 121))
    assert distance(expected, out) == 0


if __name__ == "__main__":
    print(json.dumps(kills(Path(sys.argv[1]))))
