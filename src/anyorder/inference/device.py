"""The device to compute on, and whether bfloat16 pays on it."""

import contextlib
import os
import time
import traceback
from collections import abc
from functools import cache
from statistics import fmean

import torch

from anyorder import contracts

DEVICE = "ANYORDER_DEVICE"
"""Environment variable: where to compute, as `device=`."""
BF16 = "ANYORDER_BF16"
"""Environment variable: `on`, `off` or `auto` (default: bfloat16 where the hardware has it)."""

PEAKS = {
    "A100": (312e12, 19.5e12), "H100": (989e12, 67e12), "H200": (989e12, 67e12), "L40S": (362e12, 91.6e12),
    "RTX 4090": (165e12, 82.6e12),
}  # fmt: skip
"""FLOP/s of dense matrix products in bfloat16 and in float32, by a part of the GPU's name: data sheets of
the SXM versions; for the RTX 4090 the Ada architecture paper, appendix A."""


def peak_flops(device: torch.device, bf16: bool) -> float | None:
    """FLOP/s that a GPU reaches at most; None if `PEAKS` does not know it, and for CPUs."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    return next((peaks[0 if bf16 else 1] for known, peaks in PEAKS.items() if known in name), None)


def native_bf16(device: torch.device) -> bool:
    """Whether to compute in bfloat16 on `device`: the one place that decides it.

    `ANYORDER_BF16=on` or `off` decides for every command. By default (`auto`) the hardware does: CUDA devices
    of compute capability 8.0 and up, and x86 CPUs with AMX or AVX512-BF16, multiply bfloat16 matrices fast.
    On a CPU with neither, bfloat16 products were measured at a twelfth of the float32 rate.
    """
    choice = os.environ.get(BF16, "auto").lower()
    contracts.require(choice in ("auto", "on", "off"), f"{BF16} must be auto, on or off, got '{choice}'")
    return choice == "on" or (choice == "auto" and _in_hardware(device))


def _in_hardware(device: torch.device) -> bool:
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()


def fast_dtype(device: torch.device, bf16: bool) -> torch.dtype:
    """bfloat16 if `bf16` and `native_bf16` of the device, float32 otherwise."""
    return torch.bfloat16 if bf16 and native_bf16(device) else torch.float32


def device_of(network: torch.nn.Module) -> torch.device:
    """Where a network is; the CPU if it has no weights."""
    return next(network.parameters(), torch.empty(0)).device


def autocast_like(network: torch.nn.Module) -> torch.autocast:
    """Autocast to bfloat16 beside a network that has bfloat16 weights; else without effect."""
    bf16 = next(network.parameters(), torch.empty(0)).dtype == torch.bfloat16
    return torch.autocast(device_of(network).type, torch.bfloat16, enabled=bf16)


@cache
def _named(name: str, gpus: int) -> torch.device:
    """A device that is there; "" is the first GPU if there is one (not an Apple GPU), else the CPU."""
    found = {"cpu": 1, "cuda": gpus, "mps": int(torch.backends.mps.is_available())}
    kind, _, number = (name or ("cuda" if found["cuda"] else "cpu")).partition(":")
    known = kind in found and (number or "0").isdecimal()
    contracts.require(known, f"device must be cpu, cuda, cuda:NUMBER or mps, got '{name}'")
    there = f"device={name} is not there: PyTorch {torch.__version__} finds {found[kind]} of kind {kind} here"
    contracts.require(int(number or 0) < found[kind], there)
    return torch.device(kind, int(number)) if number else torch.device(kind)


def device(name: str | None = None) -> torch.device:
    """The device of this name, or of `device=` or ANYORDER_DEVICE, by default the first GPU, else the CPU.

    Of several processes that torchrun starts, each has the GPU of its number, as PyTorch's current device.

    Raises:
        ValueError: an unknown device, or one that is not there.
    """
    return _named(os.environ.get(DEVICE, "") if name is None else name, torch.cuda.device_count())


def out_of_memory(error: BaseException) -> bool:
    """Whether an error of PyTorch says that memory was too small, on a GPU or a CPU."""
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)


@contextlib.contextmanager
def memory_explained(advice: abc.Callable[[], str]) -> abc.Iterator[None]:
    """A ValueError with this advice where memory is too small for what is done within the block."""
    try:
        yield
    except RuntimeError as e:
        if not out_of_memory(e):
            raise
        traceback.clear_frames(e.__traceback__)  # they hold what was computed so far
        raise ValueError(advice()) from e


def memory_for(batch_size: int | None) -> contextlib.AbstractContextManager[None]:
    """A ValueError that names a smaller batch where memory is too small for work on so many images."""
    size = batch_size or 0
    mend = f"batch_size={size // 2} needs about half" if size > 1 else "choose a smaller model, or device=cpu"
    return memory_explained(lambda: f"out of memory with batch_size={batch_size}: {mend}")


LARGEST = {"cpu": 64, "cuda": 1024}
"""Images in a batch: more keep a device no busier, and a killed run loses more of its work."""


def images_at_once(model: contracts.AnyOrderNetwork, grid: contracts.Grid) -> int:
    """Images whose caches fit into half of the free memory, a power of two.

    The other half is for logits and activations. An image takes 4 depth N D numbers of the weights' type:
    keys and values, twice, since some models keep two entries for each position. The processes that torchrun
    starts on one machine share the memory of its CPU, and agree on the batch of the first one.
    """
    if not (hasattr(model.config, "depth") and hasattr(model.config, "width")):  # nothing is known of it
        return LARGEST["cpu"]
    weight = next(model.parameters())
    sharers = int(os.environ.get("LOCAL_WORLD_SIZE", 1)) if weight.device.type == "cpu" else 1
    bytes_each = 4 * model.config.depth * grid.n * model.config.width * weight.element_size()
    fit = free_memory(weight.device) // 2 // sharers // bytes_each
    return 2 ** (min(max(fit, 1), LARGEST.get(weight.device.type, 64)).bit_length() - 1)


def free_memory(device: torch.device) -> int:
    """Free bytes; 2 GiB where the system does not tell."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        with open("/proc/meminfo") as f:
            return next(int(line.split()[1]) * 1024 for line in f if line.startswith("MemAvailable"))
    except (OSError, StopIteration):
        return 2 * 2**30


class Threads:
    """Takes the number of CPU threads that is fastest for this work on this machine now.

    Call `step` after each step of a long loop. The first steps are timed with all threads, half of them, and
    so on down to one; the best number stays. The trial is repeated when a step takes twice as long as it did,
    and now and then while fewer than all threads were best; about 2 % of the time goes into these trials.
    Results of one and two threads were found to be bit-identical in float32; in bfloat16 the last bits of
    gradients may differ. With `OMP_NUM_THREADS` set, on a GPU, or with one thread nothing is ever changed.
    As a context manager it restores the number at the end.
    """

    ROUNDS = 4  # timed steps of each number in a trial, fewer where the result is clear
    CLEAR = 1.4  # a number is given up if its first two steps both take this many times those of all threads
    WINDOW = 8  # steps whose mean time is compared with that of the trial
    REST = 50  # trials are at least this many times their duration apart

    def __init__(self, device: torch.device, threads: int | None = None):
        """Start with a trial, or with the number `threads` of a run that goes on."""
        self.most = torch.get_num_threads()
        fixed = device.type != "cpu" or "OMP_NUM_THREADS" in os.environ
        self.choices = [self.most] if fixed else [self.most >> i for i in range(self.most.bit_length())]
        self.best = self.most
        self.usual: float | None = None  # seconds per step with the best number
        self._plan: list[int] = []
        self._times: dict[int, list[float]] = {}
        self._window: list[float] = []
        self._rest_until = 0.0
        self._use(threads) if threads in self.choices else self._begin_trial()
        self._mark = time.perf_counter()

    def __enter__(self) -> "Threads":
        return self

    def __exit__(self, *_: object) -> None:
        if len(self.choices) > 1:
            torch.set_num_threads(self.most)

    def resume(self) -> None:
        """The time since the last step was spent on something else: do not count it."""
        self._mark = time.perf_counter()

    def step(self) -> None:
        """A step is done; the next one may run on another number of threads."""
        if len(self.choices) == 1:
            return
        now = time.perf_counter()
        seconds, self._mark = now - self._mark, now
        self._try(seconds, now) if self._plan else self._watch(seconds, now)

    def _begin_trial(self) -> None:
        if len(self.choices) > 1:
            # In both directions, so that steps that become slower or faster favour no number. The first step
            # is not timed: it allocates.
            self._plan = [self.most, *(self.choices + self.choices[::-1]) * (self.ROUNDS // 2)]
            self._times = {n: [] for n in self.choices}
            self._begun = time.perf_counter()
            torch.set_num_threads(self.most)

    def _try(self, seconds: float, now: float) -> None:
        done = self._plan.pop(0)
        timed = len(self._plan) < self.ROUNDS * len(self.choices)
        if timed:
            self._times[done].append(seconds)
        self._plan = [] if self._clear() else self._plan
        if self._plan:
            torch.set_num_threads(self._plan[0])
            return
        means = {n: fmean(times) for n, times in self._times.items()}
        self._rest_until = now + self.REST * (now - self._begun)
        self._use(min(means, key=means.__getitem__))
        self.usual = means[self.best]

    def _clear(self) -> bool:
        """Whether all threads are the fastest by far: a short command cannot afford more steps on fewer."""
        alone, *fewer = (self._times[n] for n in self.choices)
        return all(len(times) >= 2 and min(times) > self.CLEAR * fmean(alone) for times in fewer)

    def _use(self, threads: int) -> None:
        self.best = threads
        self._window.clear()
        torch.set_num_threads(threads)

    def _watch(self, seconds: float, now: float) -> None:
        self._window.append(seconds)
        if len(self._window) < self.WINDOW:
            return
        mean = fmean(self._window)
        self._window.clear()
        if self.usual is None:  # a run that goes on: its number stays for a while
            self.usual, self._rest_until = mean, now + self.REST * self.WINDOW * mean
        if now > self._rest_until and (mean > 2 * self.usual or self.best < self.most):
            self._begin_trial()
