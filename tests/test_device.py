"""Where and how to compute: the one switch of bfloat16, waiting threads, and their number."""

import os
import platform
import resource
import subprocess
import sys

import pytest
import torch

from anyorder.cli.main import main
from anyorder.inference import device as module
from anyorder.inference.device import BF16, Threads, fast_dtype, native_bf16
from anyorder.training.config import TrainConfig
from anyorder.training.trainer import train

CPU = torch.device("cpu")


@pytest.mark.parametrize("hardware", [True, False])
@pytest.mark.parametrize(
    ("choice", "expected"), [("on", True), ("OFF", False), ("off", False), ("auto", None), (None, None)]
)
def test_one_variable_decides_about_bf16(monkeypatch, hardware, choice, expected):
    monkeypatch.setattr(module, "_in_hardware", lambda device: hardware)
    monkeypatch.delenv(BF16, raising=False)
    if choice:
        monkeypatch.setenv(BF16, choice)
    expected = hardware if expected is None else expected
    assert native_bf16(CPU) is expected
    assert fast_dtype(CPU, True) == (torch.bfloat16 if expected else torch.float32)
    assert fast_dtype(CPU, False) == torch.float32


def test_another_choice_is_refused(monkeypatch):
    monkeypatch.setenv(BF16, "yes")
    with pytest.raises(ValueError, match="ANYORDER_BF16 must be auto, on or off, got 'yes'"):
        native_bf16(CPU)


@pytest.mark.parametrize(
    ("chosen", "gpus", "expected"),
    [("", 0, "cpu"), ("", 2, "cuda"), ("cpu", 2, "cpu"), ("cuda", 1, "cuda"), ("cuda:1", 2, "cuda:1")],
)
def test_device_is_the_chosen_one_or_the_first_gpu(monkeypatch, chosen, gpus, expected):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    monkeypatch.setenv("ANYORDER_DEVICE", chosen)
    assert module.device() == torch.device(expected)


@pytest.mark.parametrize(
    ("chosen", "error"),
    [
        ("gpu", "device must be cpu, cuda, cuda:NUMBER or mps, got 'gpu'"),
        ("cuda:x", "device must be"),
        ("cuda:2", r"device=cuda:2 is not there: PyTorch .* finds 2 of kind cuda here"),
    ],
)
def test_a_device_that_is_not_there_is_refused(monkeypatch, chosen, error):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("ANYORDER_DEVICE", chosen)
    with pytest.raises(ValueError, match=error):
        module.device()


def test_the_command_line_chooses_the_device(monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("ANYORDER_DEVICE", "")
    assert main(["sample", "pipeline=fashion32", f"out={tmp_path}", "device=tpu"]) == 2
    assert "device must be cpu, cuda, cuda:NUMBER or mps, got 'tpu'" in capsys.readouterr().err


def printed(code: str, without: tuple[str, ...], **variables: str) -> str:
    """What a new process prints: without variables of these beginnings, with those given."""
    bare = {k: v for k, v in os.environ.items() if not k.startswith(without)}
    command = [sys.executable, "-c", code]
    return subprocess.run(command, env=bare | variables, capture_output=True, text=True, check=True).stdout


def spin_count(**variables: str) -> str:
    """The spin count that a process sees after it has imported the package."""
    code = "import anyorder, os; print(os.environ.get('GOMP_SPINCOUNT'))"
    return printed(code, ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY"), **variables).strip()


def test_threads_spin_shortly_unless_the_user_decides():
    assert spin_count() == "3000"
    assert spin_count(GOMP_SPINCOUNT="7") == "7"
    assert spin_count(OMP_WAIT_POLICY="PASSIVE") == "None"


def page_faults(**variables: str) -> int:
    """Page faults of a process that makes a block of 64 MiB 20 times, after what each command does first."""
    code = """
import resource
from anyorder.cli.main import keep_freed_memory
keep_freed_memory()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(20):
    bytearray(64 << 20)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""
    return int(printed(code, ("MALLOC_", "GLIBC_TUNABLES"), **variables))


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the settings are glibc's")
def test_freed_memory_is_kept_unless_the_user_decides():
    pages = (64 << 20) // resource.getpagesize()
    assert page_faults() < 2 * pages
    assert page_faults(MALLOC_MMAP_THRESHOLD_="131072") > 19 * pages


class Machine:
    """A clock and a number of threads, without a processor."""

    def __init__(self, monkeypatch, most: int):
        self.now, self.threads, self.used = 0.0, most, []
        self.seconds: dict[int, float] = {}
        monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
        monkeypatch.setattr(module.time, "perf_counter", lambda: self.now)
        monkeypatch.setattr(torch, "get_num_threads", lambda: self.threads)
        monkeypatch.setattr(torch, "set_num_threads", self.set)

    def set(self, threads: int) -> None:
        self.threads = threads

    def run(self, threads: Threads, steps: int) -> list[int]:
        """Steps that take `seconds` by number of threads; the numbers that they ran on."""
        used = []
        for _ in range(steps):
            used.append(self.threads)
            self.now += self.seconds[self.threads]
            threads.step()
        return used


def test_the_fastest_number_of_threads_is_taken(monkeypatch):
    machine = Machine(monkeypatch, 4)
    machine.seconds = {4: 3.0, 2: 1.0, 1: 2.0}
    with Threads(CPU) as threads:
        assert machine.run(threads, 13) == [4, *[4, 2, 1, 1, 2, 4] * 2]
        assert threads.best == machine.threads == 2
        assert threads.usual == 1.0
        assert machine.run(threads, 20) == [2] * 20
    assert machine.threads == 4


def test_a_trial_ends_where_it_is_clear(monkeypatch):
    """Two steps on fewer threads are enough if both are slow; one slow step may be chance."""
    machine = Machine(monkeypatch, 2)
    threads = Threads(CPU)
    machine.seconds = {2: 50.0, 1: 1.8}  # the first step allocates
    machine.run(threads, 1)
    machine.seconds = {2: 1.0, 1: 1.8}
    assert machine.run(threads, 59) == [2, 1, 1, *[2] * 56]
    assert threads.usual == 1.0
    threads = Threads(CPU)
    machine.run(threads, 2)
    machine.seconds = {2: 1.0, 1: 9.0}
    machine.run(threads, 1)
    machine.seconds = {2: 1.0, 1: 1.1}
    assert machine.run(threads, 8) == [1, 2, 2, 1, 1, 2, 2, 2]


def test_steps_that_become_faster_favour_no_number(monkeypatch):
    machine = Machine(monkeypatch, 2)
    threads = Threads(CPU)
    for step in range(9):
        machine.seconds = {2: 1.0 - 0.05 * step, 1: 1.05 - 0.05 * step}
        machine.run(threads, 1)
    assert threads.best == 2


def test_half_the_speed_is_another_trial(monkeypatch):
    machine = Machine(monkeypatch, 2)
    machine.seconds = {2: 1.0, 1: 2.0}
    threads = Threads(CPU)
    machine.run(threads, 9)
    assert threads.best == 2
    assert set(machine.run(threads, 1000)) == {2}  # nothing changed, nothing is tried
    machine.seconds = {2: 40.0, 1: 4.0}
    machine.run(threads, 40)
    assert threads.best == 1
    # The other processes end: all threads come back without a drop of speed.
    machine.seconds = {2: 1.0, 1: 2.0}
    machine.run(threads, 6000)
    assert threads.best == 2


def test_trials_are_rare(monkeypatch):
    """Where one thread is best, the others are tried again in a few of a hundred steps."""
    machine = Machine(monkeypatch, 2)
    machine.seconds = {2: 4.0, 1: 1.0}
    threads = Threads(CPU)
    used = machine.run(threads, 4000)[9:]
    assert 0 < used.count(2) / len(used) < 0.01


def test_other_work_is_not_timed(monkeypatch):
    machine = Machine(monkeypatch, 2)
    machine.seconds = {2: 1.0, 1: 1.5}
    threads = Threads(CPU)
    for _ in range(9):
        machine.now += 100 * (machine.threads == 2)  # an evaluation
        threads.resume()
        machine.run(threads, 1)
    assert threads.best == 2


def test_a_run_goes_on_with_its_number(monkeypatch):
    machine = Machine(monkeypatch, 2)
    machine.seconds = {2: 1.0, 1: 2.0}
    threads = Threads(CPU, threads=1)
    assert machine.run(threads, 8 * 50) == [1] * 8 * 50
    machine.run(threads, 8 * 5)
    assert threads.best == 2
    assert Threads(CPU, threads=64).best == 2  # of a larger machine


def test_a_checkpoint_remembers_the_number(monkeypatch, tmp_path):
    """Training ends with the threads it began with, and goes on with those that it took."""
    machine = Machine(monkeypatch, 2)
    machine.seconds = {2: 1.0, 1: 0.1}
    used = []

    def loss(model, indices, step, generator):
        used.append(machine.threads)
        machine.now += machine.seconds[machine.threads]
        return model(torch.ones(1, 1)).sum(), {}

    for steps in (12, 20):
        config = TrainConfig(steps=steps, batch_size=1, bf16=False)
        train(torch.nn.Linear(1, 1), loss, 4, config, tmp_path)
        assert machine.threads == 2
    assert used == [2, *[2, 1, 1, 2] * 2, 1, 1, 1, *[1] * 8]


@pytest.mark.parametrize("where", ["cpu", "cuda"])
def test_what_the_user_or_the_device_decides_stays(monkeypatch, where):
    machine = Machine(monkeypatch, 4)
    machine.seconds = {4: 1.0}
    if where == "cpu":
        monkeypatch.setenv("OMP_NUM_THREADS", "4")
    with Threads(torch.device(where), threads=2) as threads:
        assert machine.run(threads, 30) == [4] * 30
