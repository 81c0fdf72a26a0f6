"""One trainer for tokenizer, transformer and classifier.

Steps are counted from 1 to `steps`. All that is random, and the position in the data, is a *function* of
(seed, step): the examples of a step come from a permutation seeded by (seed, epoch), and before each
micro-step both PyTorch's global generator (dropout) and the generator handed to the loss are seeded by
(seed, step, micro-step). No generator state needs saving, and a run that was killed at any moment and
started again ends with the same bits as one that was not (on a GPU as far as its kernels are
deterministic, see `torch.use_deterministic_algorithms`). Seeds are mixed by `numpy.random.SeedSequence`.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import json
import math
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from anyorder.files import write_json, write_text
from anyorder.inference.device import fast_dtype
from anyorder.inference.weights import load_state, write_tensors
from anyorder.models.compiled import require_compiler
from anyorder.training.checkpoint import Checkpoints

METRICS = "metrics.jsonl"

Loss = Callable[[nn.Module, np.ndarray, int, torch.Generator], tuple[Tensor, dict[str, Tensor]]]
"""(model, indices of the batch's examples (b,) int64, step, generator) -> (scalar loss, scalar parts to log).

Parts may be any scalars on the same device under names other than `loss`; they are not differentiated.
"""


class NonFiniteLoss(FloatingPointError, ValueError):
    """The loss, its gradient or the weights became NaN or infinite."""


@dataclass
class TrainConfig:
    """How to train: AdamW (Loshchilov & Hutter, arXiv 1711.05101), linear warm-up, cosine decay."""

    steps: int = 10_000
    """Updates of the weights."""
    batch_size: int = 64
    """Examples in a micro-step."""
    accumulation: int = 1
    """Micro-steps whose gradients are averaged into one step."""
    learning_rate: float = 3e-4
    """Peak of the schedule."""
    warmup: int = 0
    """Steps over which the learning rate rises linearly to its peak."""
    min_lr_ratio: float = 0.0
    """Learning rate at the last step, as a fraction of the peak in [0, 1]; 1 keeps it constant."""
    beta1: float = 0.9
    """Decay of AdamW's mean of gradients."""
    beta2: float = 0.95
    """Decay of AdamW's mean of squared gradients."""
    weight_decay: float = 0.05
    """Decoupled weight decay of matrices and kernels; vectors (biases, gains) have none."""
    clip: float = 1.0
    """Largest norm of the whole gradient; 0 leaves it as it is."""
    ema: float = 0.0
    """Decay of the moving average of weights, in [0, 1); 0 is off. It starts as (1 + step) / (10 + step)."""
    bf16: bool = True
    """Compute the loss under bfloat16 autocast where the hardware has it; weights stay float32."""
    compile: bool = False
    """Run the model through torch.compile (on a CPU with a C++ compiler): takes minutes, then is faster."""
    seed: int = 0
    """Seed of data order, dropout and the loss's generator."""
    log_every: int = 50
    """Steps between lines of metrics.jsonl; losses are checked for NaN then, too."""
    eval_every: int = 1000
    """Steps between evaluations; 0 is never."""
    save_every: int = 1000
    """Steps between checkpoints; the last step always has one."""
    sample_every: int = 0
    """Steps between samples; 0 is never."""
    patience: int = 0
    """Evaluations without a new best `watch` after which to stop, with the best weights; 0 is off."""
    watch: str = "test_nll"
    """Evaluated value that `patience` watches; smaller is better."""
    keep: int = 2
    """Checkpoints kept."""
    tensorboard: bool = False
    """Log to TensorBoard, too (extra 'log')."""

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "accumulation", "log_every", "save_every", "keep"):
            self._require(name, getattr(self, name) >= 1, "at least 1")
        for name in ("seed", "eval_every", "sample_every", "weight_decay", "clip", "patience"):
            self._require(name, getattr(self, name) >= 0, "at least 0")
        for name in ("beta1", "beta2", "ema"):
            self._require(name, 0 <= getattr(self, name) < 1, "in [0, 1)")
        self._require("learning_rate", 0 < self.learning_rate < math.inf, "above 0 and finite")
        self._require("warmup", 0 <= self.warmup <= self.steps, f"in [0, steps = {self.steps}]")
        self._require("min_lr_ratio", 0 <= self.min_lr_ratio <= 1, "in [0, 1]")
        if self.patience and not self.eval_every:
            raise ValueError("patience needs evaluations: give eval_every > 0")

    def _require(self, name: str, holds: bool, allowed: str) -> None:
        if not holds:
            raise ValueError(f"{name} must be {allowed}, got {getattr(self, name)}")


_BESIDE = {"compile", "log_every", "save_every", "sample_every", "keep", "tensorboard"}
"""Settings that may change between two parts of a run, for they do not change where it leads."""


@dataclass
class TrainResult:
    """What a finished run leaves."""

    model: nn.Module
    """The trained model, averaged if `ema` is on, the best evaluated one with `patience`; evaluating."""
    seconds: float
    """Time spent on training steps, over all resumptions, without evaluations and checkpoints."""
    steps: int
    """Updates made."""
    examples: int
    """Examples seen, repetitions counted."""
    metrics: dict[str, float]
    """The last logged and the last evaluated values, under the names they have in metrics.jsonl."""


def train(
    model: nn.Module,
    loss: Loss,
    examples: int,
    config: TrainConfig,
    folder: str | Path,
    *,
    device: torch.device | str = "cpu",
    evaluate: Callable[[nn.Module, int], Mapping[str, float]] | None = None,
    sample: Callable[[nn.Module, int], None] | None = None,
    extra: nn.Module | None = None,
    ready: Callable[[nn.Module], None] | None = None,
) -> TrainResult:
    """Train `model`, or go on from the last checkpoint in `folder`; at once if that is the last step.

    The same call after a kill continues and ends with the same weights, optimizer state and log (times
    aside) as an uninterrupted run, if `model` and `extra` are initialised alike and `loss` draws from its
    generator and PyTorch's global one only. Ctrl-C or SIGTERM finishes the step and saves; a second one
    stops at once.

    Args:
        model: moved to `device` and trained in place; the averaged weights are a copy.
        loss: see `Loss`; called in training mode, under autocast if `bf16`.
        examples: size of the data set; batches take indices in [0, examples), every epoch in a new order.
        config: how to train.
        folder: takes `checkpoints/`, `metrics.jsonl` and TensorBoard's `events.*`.
        device: where to compute.
        evaluate: (model, step) -> values to log, named `test_...` by convention; called without gradients
            and autocast, in evaluation mode, with averaged weights if `ema` is on.
        sample: (model, step), as `evaluate` but for its side effects.
        extra: parameters of the loss itself, such as a discriminator: moved, optimised, clipped on their own
            and checkpointed, but not averaged. `loss` holds it and keeps the two gradients apart.
        ready: handed the averaged model (the model itself without `ema`) before the first step, for losses
            that look at it; it is updated in place after every step.

    Raises:
        KeyboardInterrupt: stopped by a signal, after the checkpoint is written.
        NonFiniteLoss: names the first bad step; `nonfinite-step-*.safetensors` and `.json` hold the weights
            before it (buffers may be later) and its examples. No checkpoint is ever made of a bad state.
        ValueError: the checkpoint is of another configuration or model, or all checkpoints are damaged.
        OSError: the disk is full; earlier checkpoints are intact.
    """
    if examples < 1:
        raise ValueError(f"no examples to train on: got examples={examples}")
    run = _Run(model, loss, examples, config, Path(folder), torch.device(device), extra)
    run.resume()
    if ready:
        ready(run.average)
    per_step = config.batch_size * config.accumulation
    with (
        _Log(run.folder, run.step, config.tensorboard) as log,
        _postponed_signals() as stopped,
        tqdm(
            total=config.steps * per_step, initial=run.step * per_step, unit="example", unit_scale=True
        ) as bar,
    ):
        while run.step < config.steps and not stopped and not run.exhausted:
            run.update()
            bar.update(per_step)
            if run.due(config.log_every):
                log.write(run.step, run.report())
                bar.set_postfix(step=run.step, loss=run.metrics["loss"])
            if evaluate and run.due(config.eval_every):
                log.write(run.step, run.evaluate(evaluate))
            if sample and run.due(config.sample_every):
                run.look(sample)
            if run.due(config.save_every):
                run.save()
        run.save()
        if stopped:
            raise KeyboardInterrupt(f"stopped after step {run.step} of {config.steps}; run again to go on")
    return TrainResult(run.best.eval(), run.seconds, run.step, run.step * per_step, run.metrics)


class _Run:
    """The state of a run, and what can be done to it."""

    def __init__(
        self,
        model: nn.Module,
        loss: Loss,
        examples: int,
        config: TrainConfig,
        folder: Path,
        device: torch.device,
        extra: nn.Module | None,
    ):
        self.loss, self.examples, self.config = loss, examples, config
        self.folder, self.device = folder, device
        self.bf16 = fast_dtype(device, config.bf16) == torch.bfloat16
        self.model = model.to(device).train()
        self.average = copy.deepcopy(model).requires_grad_(False).eval() if config.ema else model
        self.callable: Any = _compiled(model, device) if config.compile else model
        self.best = copy.deepcopy(self.average) if config.patience else self.average
        self.watched: list[float] = []
        """Values of `watch`, oldest first."""
        self.trained = {"model": model} | ({"extra": extra.to(device).train()} if extra else {})
        self.modules = self.trained | ({"average": self.average} if config.ema else {})
        self.modules |= {"best": self.best} if config.patience else {}
        self.optimizer = _adamw(self.trained.values(), config)
        self.generator = torch.Generator(device)
        self.checkpoints = Checkpoints(folder, config.keep)
        self.step, self.seconds = 0, 0.0
        self.saved = 0
        """Step of the newest checkpoint."""
        self.metrics: dict[str, float] = {}
        self.pending: list[dict[str, Tensor]] = []
        """Values of the steps that were not read yet, on the device."""
        self.window: list[dict[str, float]] = []
        """Values of the steps since the last line of the log."""
        self.bad = torch.zeros((), device=device)
        """1 from the first non-finite step on."""
        self.mark = time.perf_counter()

    def due(self, every: int) -> bool:
        return every > 0 and (self.step % every == 0 or self.step == self.config.steps)

    def update(self) -> None:
        """One step; never waits for the device."""
        self.step += 1
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.config, self.step)
        parts = [self._backward(micro) for micro in range(self.config.accumulation)]
        values = {name: torch.stack([part[name] for part in parts]).mean() for name in parts[0]}
        limit = self.config.clip or math.inf
        norms = [nn.utils.clip_grad_norm_(m.parameters(), limit) for m in self.trained.values()]
        # The norm of no gradient at all (a discriminator before its start) is made on the CPU.
        norms = [norm.to(self.device, non_blocking=True) for norm in norms]
        finite = torch.stack([values["loss"], *norms]).isfinite().all()
        # The fused kernel makes no update where found_inf is 1 (torch.amp uses it so): weights stay as they
        # were before the first bad step until the host learns of it.
        self.bad = torch.maximum(self.bad, 1 - finite.float())
        self.optimizer.found_inf = self.bad  # type: ignore[attr-defined]
        self.optimizer.step()
        self.optimizer.zero_grad()
        if self.config.ema:
            _lerp(self.average, self.model, min(self.config.ema, (1 + self.step) / (10 + self.step)))
        self.pending.append({**values, "grad_norm": norms[0], "_finite": finite.float()})

    def _backward(self, micro: int) -> dict[str, Tensor]:
        """Add the gradient of one micro-step; its loss and parts, float32 scalars."""
        for_torch, for_loss = _seeds(self.config.seed, self.step, micro)
        torch.manual_seed(for_torch)
        self.generator.manual_seed(for_loss)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16):
            total, parts = self.loss(self.callable, self._indices(micro), self.step, self.generator)
        (total / self.config.accumulation).backward()
        assert "loss" not in parts, "the name 'loss' is taken by the loss itself"
        return {name: value.detach().float() for name, value in {"loss": total, **parts}.items()}

    def _indices(self, micro: int, step: int | None = None) -> np.ndarray:
        batch = ((step or self.step) - 1) * self.config.accumulation + micro
        return batch_indices(self.config.seed, batch, self.config.batch_size, self.examples)

    def read(self) -> None:
        """Bring the values of the last steps to the host: the only place that waits for the device.

        Raises:
            NonFiniteLoss: one of them was not finite.
        """
        if not self.pending:
            return
        numbers = iter(torch.stack([value for row in self.pending for value in row.values()]).tolist())
        now = time.perf_counter()
        seconds, self.mark = now - self.mark, now
        self.seconds += seconds
        rows = [{name: next(numbers) for name in row} for row in self.pending]
        for step, row in enumerate(rows, self.step - len(rows) + 1):
            if not row.pop("_finite"):
                self._give_up(step, f"loss {row['loss']}, gradient norm {row['grad_norm']}")
            row["seconds"] = seconds / len(rows)
        self.window += rows
        self.pending.clear()

    @contextlib.contextmanager
    def _off_the_clock(self) -> Iterator[None]:
        self.read()
        yield
        self.mark = time.perf_counter()

    def report(self) -> dict[str, float]:
        """Means over the steps since the last report, and the speed."""
        self.read()
        names = dict.fromkeys(name for row in self.window for name in row)
        means = {name: fmean(row[name] for row in self.window if name in row) for name in names}
        speed = self.config.batch_size * self.config.accumulation / means.pop("seconds")
        norm = means.pop("grad_norm")
        rate = self.optimizer.param_groups[0]["lr"]
        self.window.clear()
        line = {**means, "lr": rate, "grad_norm": norm, "examples_per_second": round(speed, 1)}
        self.metrics |= line
        return line

    def look(self, at: Callable[[nn.Module, int], Any]) -> Any:
        """Show `at` the model as it would be delivered."""
        with self._off_the_clock(), torch.no_grad():
            found = at(self.average.eval(), self.step)
        self.model.train()
        return found

    def evaluate(self, evaluate: Callable[[nn.Module, int], Mapping[str, float]]) -> dict[str, float]:
        line = {name: float(value) for name, value in self.look(evaluate).items()}
        self.metrics |= line
        if self.config.patience:
            self._judge(line)
        return line

    def _judge(self, line: Mapping[str, float]) -> None:
        """Keep the weights if they are the best so far."""
        if self.config.watch not in line:
            raise ValueError(f"watch={self.config.watch} is not evaluated: choose one of {', '.join(line)}")
        self.watched.append(line[self.config.watch])
        if self.watched[-1] <= min(self.watched):
            self.best.load_state_dict(self.average.state_dict())

    @property
    def exhausted(self) -> bool:
        """Whether the last `patience` evaluations brought no new best value."""
        since = len(self.watched) - 1 - self.watched.index(min(self.watched)) if self.watched else 0
        return 0 < self.config.patience <= since

    def save(self) -> None:
        """Write a checkpoint, unless this step has one.

        Raises:
            NonFiniteLoss: the weights are not finite although the losses so far were.
        """
        if self.saved == self.step:
            return
        with self._off_the_clock():
            if not _is_finite(self.modules.values()):
                self._give_up(self.step, "finite loss, but non-finite weights or buffers after the update")
            state = self.optimizer.state_dict()["state"]
            tensors = {f"optimizer.{i}.{name}": t for i, slot in state.items() for name, t in slot.items()}
            facts = {
                "config": self._lasting_config(),
                "seconds": self.seconds,
                "metrics": self.metrics,
                "window": self.window,
                "watched": self.watched,
            }
            self.checkpoints.save(self.step, tensors | self._weights(), facts)
        self.saved = self.step

    def resume(self) -> None:
        """Take up the latest checkpoint, if there is one."""
        found = self.checkpoints.load_latest()
        if found is None:
            return
        self.step, tensors, facts = found
        self.saved = self.step
        self._require_same_config(facts["config"])
        for name, module in self.modules.items():
            load_state(module, _below(tensors, name), f"the checkpoint of step {self.step} ({name})")
        state: dict[int, dict[str, Tensor]] = {}
        for key, tensor in _below(tensors, "optimizer").items():
            index, name = key.split(".")
            state.setdefault(int(index), {})[name] = tensor
        groups = self.optimizer.state_dict()["param_groups"]
        self.optimizer.load_state_dict({"state": state, "param_groups": groups})
        self.seconds, self.metrics, self.window = facts["seconds"], facts["metrics"], facts["window"]
        self.watched = facts["watched"]
        self.mark = time.perf_counter()

    def _weights(self) -> dict[str, Tensor]:
        return {f"{name}.{k}": t for name, m in self.modules.items() for k, t in m.state_dict().items()}

    def _lasting_config(self) -> dict[str, Any]:
        config = dataclasses.asdict(self.config) | {"examples": self.examples}
        beside = _BESIDE if self.config.patience else _BESIDE | {"eval_every"}
        return {name: value for name, value in config.items() if name not in beside}

    def _require_same_config(self, other: Mapping[str, Any]) -> None:
        mine = self._lasting_config()
        if changed := [f"{k}={other.get(k)} (now {v})" for k, v in mine.items() if other.get(k) != v]:
            raise ValueError(
                f"the checkpoint in {self.checkpoints.folder} was made with {', '.join(changed)}: "
                "use these values to go on, or delete the folder to start anew"
            )

    def _give_up(self, step: int, reason: str) -> None:
        """Keep what shows the error again, and raise it."""
        path = self.folder / f"nonfinite-step-{step:08d}.safetensors"
        write_tensors(path, self._weights())
        indices = [self._indices(micro, step).tolist() for micro in range(self.config.accumulation)]
        write_json(path.with_suffix(".json"), {"step": step, "reason": reason, "indices": indices})
        raise NonFiniteLoss(
            f"training broke down at step {step} ({reason}): its examples and the weights are in {path}; "
            "try a lower learning_rate, a longer warmup, clip=1 or bf16=false"
        )


class _Log:
    """`metrics.jsonl`, and TensorBoard if asked for; lines beyond `step` are dropped when opened."""

    def __init__(self, folder: Path, step: int, tensorboard: bool):
        self.path = folder / METRICS
        write_text(self.path, "".join(_lines_until(step, self.path)))
        self.board = _summary_writer(folder, step) if tensorboard else None

    def write(self, step: int, values: Mapping[str, float]) -> None:
        with open(self.path, "a", encoding="utf-8") as f:
            f.write(json.dumps({"step": step, **values}) + "\n")
        if self.board:
            for name, value in values.items():
                self.board.add_scalar(name, value, step)

    def __enter__(self) -> _Log:
        return self

    def __exit__(self, *_: object) -> None:
        if self.board:
            self.board.close()


def _lines_until(step: int, path: Path) -> Iterator[str]:
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True) if path.is_file() else []
    for line in lines:
        with contextlib.suppress(json.JSONDecodeError):  # a kill may leave half a line
            if json.loads(line)["step"] <= step:
                yield line


def _summary_writer(folder: Path, step: int) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as e:
        raise ValueError("tensorboard=true needs TensorBoard: pip install 'anyorder[log]'") from e
    return SummaryWriter(folder, purge_step=step + 1)


@contextlib.contextmanager
def _postponed_signals() -> Iterator[list[int]]:
    """Yield a list that the first SIGINT or SIGTERM is put on; the second one interrupts at once."""
    stopped: list[int] = []

    def handle(number: int, frame: object) -> None:
        if stopped:
            raise KeyboardInterrupt
        stopped.append(number)

    if threading.current_thread() is not threading.main_thread():  # Python allows handlers only there
        yield stopped
        return
    before = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stopped
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def learning_rate(config: TrainConfig, step: int) -> float:
    """Linear warm-up, then cosine decay (Loshchilov & Hutter, arXiv 1608.03983) to `min_lr_ratio`.

    Args:
        config: peak, warm-up, floor and length.
        step: in [1, steps].
    """
    if step < config.warmup:
        return config.learning_rate * step / config.warmup
    done = (step - config.warmup) / max(1, config.steps - config.warmup)
    cosine = 0.5 * (1 + math.cos(math.pi * done))
    return config.learning_rate * (config.min_lr_ratio + (1 - config.min_lr_ratio) * cosine)


def batch_indices(seed: int, batch: int, size: int, examples: int) -> np.ndarray:
    """Examples of a batch, (size,) int64: batches are cut from one endless row of shuffled epochs.

    Args:
        seed: of the run.
        batch: number of the batch, from 0.
        size: examples in a batch; may exceed `examples`.
        examples: in an epoch, each of them once.
    """
    epochs, offsets = np.divmod(np.arange(batch * size, (batch + 1) * size), examples)
    touched = range(epochs[0], epochs[-1] + 1)
    return np.concatenate([_shuffled(seed, e, examples)[offsets[epochs == e]] for e in touched])


_DATA, _STEP = 0, 1  # first words of the seeds, so that the two uses never meet


@lru_cache(maxsize=2)
def _shuffled(seed: int, epoch: int, examples: int) -> np.ndarray:
    return np.random.default_rng(np.random.SeedSequence((seed, _DATA, epoch))).permutation(examples)


def _seeds(seed: int, step: int, micro: int) -> tuple[int, int]:
    first, second = np.random.SeedSequence((seed, _STEP, step, micro)).generate_state(2, np.uint64)
    return int(first), int(second)


def _compiled(model: nn.Module, device: torch.device) -> Any:
    """The model, compiled at its first call; it shares the weights, whose names stay those of `model`."""
    require_compiler(device)
    return torch.compile(model)


def _adamw(modules: Any, config: TrainConfig) -> torch.optim.AdamW:
    parameters = [p for module in modules for p in module.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=config.learning_rate, betas=(config.beta1, config.beta2), fused=True)


@torch.no_grad()
def _lerp(average: nn.Module, model: nn.Module, decay: float) -> None:
    """Move averaged parameters towards the model's; buffers are averages or constants already: copied."""
    torch._foreach_lerp_(list(average.parameters()), list(model.parameters()), 1 - decay)
    for mine, its in zip(average.buffers(), model.buffers(), strict=True):
        mine.copy_(its)


def _is_finite(modules: Any) -> bool:
    checks = [p.isfinite().all() for module in modules for p in module.parameters()]
    # A buffer may hold infinities on purpose, as attention masks do.
    checks += [~b.isnan().any() for module in modules for b in module.buffers()]
    return bool(torch.stack(checks).all())


def _below(tensors: Mapping[str, Tensor], name: str) -> dict[str, Tensor]:
    return {key.removeprefix(f"{name}."): t for key, t in tensors.items() if key.startswith(f"{name}.")}
