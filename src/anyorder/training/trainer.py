"""One training loop for tokenizer, transformer and classifier.

A run that was killed at any moment and started again ends with the same bits as one that was not (on a GPU as
far as its kernels are deterministic, see `torch.use_deterministic_algorithms`), because all randomness is a
function of (seed, step); see `config`.
"""

import contextlib
import copy
import dataclasses
import math
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

from anyorder.files import write_json
from anyorder.inference import device as devices
from anyorder.inference import processes, weights
from anyorder.training import distributed, memory
from anyorder.training.checkpoint import Checkpoints
from anyorder.training.config import TrainConfig, batch_indices, learning_rate, step_seeds
from anyorder.training.log import Log
from anyorder.training.signals import postponed_signals

Loss = Callable[[nn.Module, np.ndarray, int, torch.Generator], tuple[Tensor, dict[str, Tensor]]]
"""(model, indices of the batch's examples (b,) int64, step, generator) -> (scalar loss, scalar parts to log).

Parts may be any scalars on the same device under names other than `loss`; they are not differentiated.
"""
Hook = Callable[[nn.Module, int], Any]
"""(model, step); called in one process, without gradients and autocast, with averaged weights if any."""

MOMENTS = ("exp_avg", "exp_avg_sq")
"""What AdamW remembers of each parameter."""


class NonFiniteLoss(FloatingPointError, ValueError):
    """The loss, its gradient or the weights became NaN or infinite."""


@dataclasses.dataclass
class TrainResult:
    """A finished run."""

    model: nn.Module
    """The trained model: averaged if `ema` is on, the best evaluated one with `patience`; evaluation mode."""
    seconds: float
    """Time of the training steps, over all resumptions, without evaluations and checkpoints."""
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
    sample: Hook | None = None,
    extra: nn.Module | None = None,
    ready: Callable[[nn.Module], None] | None = None,
    after: Callable[[int], dict[str, Tensor]] | None = None,
    ahead: Callable[[Iterator[np.ndarray]], contextlib.AbstractContextManager] = contextlib.nullcontext,
) -> TrainResult:
    """Train `model`, or resume from the last checkpoint in `folder`; a finished run returns at once.

    A run resumes exactly if `model` and `extra` are initialised alike and `loss` takes randomness only from
    its generator and PyTorch's global one. Ctrl-C or SIGTERM finishes the step and saves; a second one stops
    at once. More `steps` than before extend a run; the learning rate then follows the longer schedule.

    Args:
        model: moved to `device` and trained in place; the averaged weights are a copy.
        loss: see `Loss`; called in training mode, under autocast if `bf16`.
        examples: size of the data set; batches take indices in [0, examples), every epoch in a new order.
        config: how to train.
        folder: takes `checkpoints/`, `metrics.jsonl` and TensorBoard's `events.*`.
        device: where to compute.
        evaluate: a `Hook` that returns values to log, named `test_...` by convention.
        sample: a `Hook` that returns figures by name for the loggers, or None.
        extra: parameters of the loss, such as a discriminator: trained, clipped apart and checkpointed,
            but not averaged. `loss` holds it and keeps the two gradients apart.
        ready: called before the first step with the averaged model, which is updated in place.
        after: called with the step after its passes, before the weights change; returns further parts.
        ahead: called with the examples of all passes to come, to have them read before `loss` is called.

    Raises:
        KeyboardInterrupt: stopped by a signal, after the checkpoint is written.
        NonFiniteLoss: names the first bad step; `nonfinite-step-*.safetensors` and `.json` hold the weights
            before it (buffers may be later) and its examples. No checkpoint is ever made of a bad state.
        ValueError: the checkpoint is of another configuration or model, or all checkpoints are damaged.
        OSError: the disk is full; earlier checkpoints are intact.
    """
    if examples < 1:
        raise ValueError(f"no examples to train on: got examples={examples}")
    trainer = Trainer(model, loss, examples, config, Path(folder), torch.device(device), extra, after)
    trainer.resume()
    if ready:
        ready(trainer.unsharded(trainer.average))
    total, done = (steps * trainer.examples_per_step for steps in (config.steps, trainer.step_number))
    with (
        Log(trainer.folder, trainer.step_number, config) as log,
        postponed_signals() as stopped,
        ahead(trainer.upcoming()),
        tqdm(total=total, initial=done, unit="example", unit_scale=True) as bar,
        trainer.threads,
    ):
        while not (trainer.finished or stopped()):
            if ready:
                trainer.unsharded(trainer.average)
            with devices.memory_explained(lambda: memory.advice(trainer)):
                trainer.step()
            trainer.threads.step()
            bar.update(trainer.examples_per_step)
            if trainer.is_time(config.log_every):
                log.write(trainer.step_number, trainer.summary())
                bar.set_postfix(trainer.shown())
            if evaluate and trainer.is_time(config.eval_every):
                log.write(trainer.step_number, trainer.evaluate(evaluate))
            if sample and trainer.is_time(config.sample_every):
                log.images(trainer.step_number, trainer.call(sample))
            if trainer.is_time(config.save_every):
                trainer.save()
        trainer.save()
        if stopped():
            raise KeyboardInterrupt(f"stopped after step {trainer.step_number} of {config.steps}")
    seen = trainer.step_number * trainer.examples_per_step
    best = trainer.unsharded(trainer.best).eval()
    return TrainResult(best, trainer.seconds, trainer.step_number, seen, trainer.metrics)


class Trainer:
    """The state of a run, its step, and its checkpoints."""

    RESUMED = ("seconds", "metrics", "window", "watched")
    """Attributes that a checkpoint holds beside the tensors."""

    def __init__(
        self,
        model: nn.Module,
        loss: Loss,
        examples: int,
        config: TrainConfig,
        folder: Path,
        device: torch.device,
        extra: nn.Module | None,
        after: Callable[[int], dict[str, Tensor]] | None = None,
    ):
        self.examples, self.config, self.after = examples, config, after
        self.folder, self.device = folder, device
        self.passes = distributed.own_passes(config.accumulation)
        """Which of the passes of a step are run in this process."""
        self.bf16 = devices.fast_dtype(device, config.bf16) == torch.bfloat16
        self.peak, self.flops = devices.peak_flops(device, self.bf16), 0
        """FLOP/s of the device, if known, and FLOPs of a step in this process, once they are counted."""
        self.model = model.to(device).train()
        self.average = copy.deepcopy(model).requires_grad_(False).eval() if config.ema else model
        self.best = copy.deepcopy(self.average) if config.patience else self.average
        self.trained = {"model": model} | ({"extra": extra.to(device).train()} if extra else {})
        self.sharded = config.shard and processes.size() > 1
        self.whole = copy.deepcopy(self.average) if self.sharded else self.average
        """The averaged model as hooks see it."""
        self.loss = distributed.objective(loss, self.trained, config.compile, self.sharded)
        for each in {self.average, self.best} - {model} if self.sharded else ():
            distributed.shard_parameters(each, like=model)
        self.modules = self.trained | ({"average": self.average} if config.ema else {})
        self.modules |= {"best": self.best} if config.patience else {}
        self.optimizer = _adamw(self.trained, config)
        self.generator = torch.Generator(device)
        self.checkpoints = Checkpoints(folder, config.keep)
        self.examples_per_step = config.batch_size * config.accumulation
        self.step_number, self.saved_step, self.seconds = 0, 0, 0.0
        self.metrics: dict[str, float] = {}
        self.watched: list[float] = []
        """Evaluated values of `watch`, oldest first, negated where larger is better."""
        self.pending: list[dict[str, Tensor]] = []
        """Values of the steps that were not read yet, on the device."""
        self.window: list[dict[str, float]] = []
        """Values of the steps since the last line of the log."""
        self.nonfinite = torch.zeros((), device=device)
        """1 from the first non-finite step on."""
        self.threads = devices.Threads(device)
        self.clock = time.perf_counter()

    def step(self) -> None:
        """One update of the weights; never waits for the device."""
        self.step_number += 1
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.config, self.step_number)
        found = []
        with self._counted():
            for micro in self.passes:
                for_torch, for_loss = step_seeds(self.config.seed, self.step_number, micro)
                torch.manual_seed(for_torch)
                self.generator.manual_seed(for_loss)
                rows = self.indices(self.step_number, micro)
                with distributed.synchronised(self.loss, micro == self.passes[-1]):
                    with torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16):
                        total, parts = self.loss(rows, self.step_number, self.generator)
                    (total / len(self.passes)).backward()
                assert "loss" not in parts, "the name 'loss' is taken by the loss itself"
                found.append({name: x.detach().float() for name, x in {"loss": total, **parts}.items()})
        values = torch.stack([torch.stack([x[name] for x in found]).mean() for name in found[0]])
        means = processes.mean(values).unbind()
        parts = self.after(self.step_number) if self.after else {}
        self._update({**dict(zip(found[0], means, strict=True)), **parts})

    @contextlib.contextmanager
    def _counted(self) -> Iterator[None]:
        """Count the FLOPs of the first step, for the MFU; compiled code hides them from the counter."""
        if not self.peak or self.flops or self.config.compile:
            yield
            return
        with FlopCounterMode(display=False) as counter:
            yield
        self.flops = counter.get_total_flops()

    def _update(self, values: dict[str, Tensor]) -> None:
        """Clip the gradients, update weights and average; `values` are kept for the log."""
        limit = self.config.clip or math.inf
        clipped = (nn.utils.clip_grad_norm_(module.parameters(), limit) for module in self.trained.values())
        # The norm of no gradient at all (a discriminator before its start) is made on the CPU.
        norms = [distributed.full(norm).to(self.device, non_blocking=True) for norm in clipped]
        finite = torch.stack([values["loss"], *norms]).isfinite().all()
        # The fused kernel makes no update where found_inf is 1 (torch.amp uses it so): weights stay as they
        # were before the first bad step until the host learns of it.
        self.nonfinite = torch.maximum(self.nonfinite, 1 - finite.float())
        self.optimizer.found_inf = self.nonfinite  # type: ignore[attr-defined]
        self.optimizer.step()
        self.optimizer.zero_grad()
        if self.config.ema:
            decay = min(self.config.ema, (1 + self.step_number) / (10 + self.step_number))
            distributed.lerp(self.average, self.model, decay)
        self.pending.append({**values, "grad_norm": norms[0], "_finite": finite.float()})

    def indices(self, step: int, micro: int) -> np.ndarray:
        """Examples of one pass of a step, (batch_size,) int64."""
        batch = (step - 1) * self.config.accumulation + micro
        return batch_indices(self.config.seed, batch, self.config.batch_size, self.examples)

    def upcoming(self) -> Iterator[np.ndarray]:
        """Examples of each pass that is still to be run in this process."""
        for step in range(self.step_number + 1, self.config.steps + 1):
            yield from (self.indices(step, micro) for micro in self.passes)

    def is_time(self, every: int) -> bool:
        """Whether what happens `every` so many steps (0: never) happens now; the last step always counts."""
        return every > 0 and (self.step_number % every == 0 or self.step_number == self.config.steps)

    # --- reading, logging and evaluating ----------------------------------------------------------------

    def _synchronize(self) -> None:
        """Read the last steps' values, the one wait for the device; a NonFiniteLoss if one is not finite."""
        if not self.pending:
            return
        numbers = iter(torch.stack([value for row in self.pending for value in row.values()]).tolist())
        now = time.perf_counter()
        seconds, self.clock = now - self.clock, now
        self.seconds += seconds
        rows = [{name: next(numbers) for name in row} for row in self.pending]
        for step, row in enumerate(rows, self.step_number - len(rows) + 1):
            if not row.pop("_finite"):
                self._dump_and_raise(step, f"loss {row['loss']}, gradient norm {row['grad_norm']}")
            row["seconds"] = seconds / len(rows)
        self.window += rows
        self.pending.clear()

    @contextlib.contextmanager
    def _clock_stopped(self) -> Iterator[None]:
        self._synchronize()
        yield
        self.clock = time.perf_counter()
        self.threads.resume()

    def summary(self) -> dict[str, float]:
        """Means over the steps since the last summary, the speed, and what is reached of a GPU."""
        self._synchronize()
        names = dict.fromkeys(name for row in self.window for name in row)
        means = {name: fmean(row[name] for row in self.window if name in row) for name in names}
        self.window.clear()
        speed, norm = self.examples_per_step / means.pop("seconds"), means.pop("grad_norm")
        rate = self.optimizer.param_groups[0]["lr"]
        line = {**means, "lr": rate, "grad_norm": norm, "examples_per_second": round(speed, 1)}
        if self.peak and self.flops:
            line["mfu"] = round(self.flops * speed / self.examples_per_step / self.peak, 4)
        if self.device.type == "cuda":
            line["peak_memory"] = torch.cuda.max_memory_allocated(self.device)
        self.metrics |= line
        return line

    def call(self, hook: Hook) -> Any:
        """What a hook, called in the leader with the averaged model and the step, returns."""
        with self._clock_stopped(), torch.no_grad():
            average = self.unsharded(self.average).eval()
            found = processes.told(hook(average, self.step_number) if processes.leads() else None)
        self.model.train()
        return found

    def unsharded(self, module: nn.Module) -> nn.Module:
        """`module`, or a whole copy of it that the next call overwrites."""
        return distributed.copy_whole(self.whole, module) if self.sharded else module

    def evaluate(self, evaluate: Callable[[nn.Module, int], Mapping[str, float]]) -> dict[str, float]:
        """Evaluate; with `patience` the weights are kept if they are the best so far."""
        line = {name: float(value) for name, value in self.call(evaluate).items()}
        self.metrics = {k: value for k, value in {**self.metrics, **line}.items() if math.isfinite(value)}
        if self.config.patience:
            self.config.require_watched(line)
            sign = -1 if self.config.watch.endswith(("psnr", "ssim", "accuracy")) else 1
            value = line[self.config.watch]  # JSON knows no NaN
            self.watched.append(sign * value if math.isfinite(value) else 1e300)
            if self.watched[-1] <= min(self.watched):
                self.best.load_state_dict(self.average.state_dict())
        return line

    @property
    def finished(self) -> bool:
        """Whether all steps are done, or the last `patience` evaluations brought no new best value."""
        since = len(self.watched) - 1 - self.watched.index(min(self.watched)) if self.watched else 0
        return self.step_number >= self.config.steps or 0 < self.config.patience <= since

    def shown(self) -> dict[str, Any]:
        """What stands behind the progress bar."""
        each = self.metrics["examples_per_second"] / processes.size()
        alone = {"per_process": f"{each:.1f}/s"} if processes.size() > 1 else {}
        alone |= {"mfu": f"{self.metrics['mfu']:.1%}"} if "mfu" in self.metrics else {}
        return {"step": self.step_number, "loss": self.metrics["loss"], **alone}

    # --- checkpoints ------------------------------------------------------------------------------------

    def save(self) -> None:
        """Write a checkpoint, unless this step has one.

        Raises:
            NonFiniteLoss: the weights are not finite although the losses so far were.
        """
        if self.saved_step == self.step_number:
            return
        with self._clock_stopped():
            if not distributed.is_finite(self.modules.values()):
                reason = "finite loss, but non-finite weights or buffers after the update"
                self._dump_and_raise(self.step_number, reason)
            slots = self.optimizer.state_dict()["state"].items()
            tensors = {f"optimizer.{i}.{name}": t for i, slot in slots for name, t in slot.items()}
            tensors |= self._weights()
            facts = {name: getattr(self, name) for name in self.RESUMED}
            facts |= {"config": self._lasting_config(), "threads": self.threads.best}
            self.checkpoints.save(self.step_number, tensors, facts, self.sharded)
        self.saved_step = self.step_number

    def resume(self) -> None:
        """Load the latest checkpoint, if there is one."""
        found = self.checkpoints.load_latest(self._layout() if self.sharded else {})
        if found is None:
            return
        self.step_number, tensors, facts = found
        self.saved_step = self.step_number
        for name in self.RESUMED:
            setattr(self, name, facts[name])
        self._require_same_config(facts["config"])
        source = f"the checkpoint of step {self.step_number}"
        for name, module in self.modules.items():
            weights.load_state(module, _below(tensors, name), f"{source} ({name})")
        state: dict[int, dict[str, Tensor]] = {}
        for key, tensor in _below(tensors, "optimizer").items():
            index, name = key.split(".")
            state.setdefault(int(index), {})[name] = tensor
        self.optimizer.load_state_dict(self.optimizer.state_dict() | {"state": state})
        self.threads = devices.Threads(self.device, facts.get("threads"))
        self.clock = time.perf_counter()
        self.checkpoints.prune(self.step_number)  # a kill may have come between saving and pruning

    def _weights(self) -> dict[str, Tensor]:
        return {f"{name}.{k}": t for name, m in self.modules.items() for k, t in m.state_dict().items()}

    def _layout(self) -> dict[str, Tensor]:
        """A tensor that is sharded as each of a checkpoint is to be."""
        parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        names = ((i, p, f"optimizer.{i}.{name}") for i, p in enumerate(parameters) for name in MOMENTS)
        return self._weights() | {name: p for _, p, name in names}

    def _lasting_config(self) -> dict[str, Any]:
        config = dataclasses.asdict(self.config) | {"examples": self.examples}
        return {name: value for name, value in config.items() if name not in self.config.log_settings}

    def _require_same_config(self, before: Mapping[str, Any]) -> None:
        now, steps = self._lasting_config(), self.config.steps
        changed = ["steps"] if steps < before["steps"] else []
        changed += [k for k, v in now.items() if before.get(k) != v and k != "steps"]
        if changed:
            listed = ", ".join(f"{k}={before.get(k)} (now {now[k]})" for k in changed)
            raise ValueError(
                f"the checkpoint in {self.checkpoints.folder} was made with {listed}: use these values to "
                "resume (only steps may grow), or another folder to start anew"
            )
        if steps > before["steps"] and not self.finished:
            weights.log.info(
                "extended from %d to %d steps: from step %d on, the learning rate follows the schedule of "
                "the new length (next: %.3g)", before["steps"], steps, self.step_number + 1,
                learning_rate(self.config, self.step_number + 1),
            )  # fmt: skip

    def _dump_and_raise(self, step: int, reason: str) -> None:
        """Write what is needed to reproduce the failure, and raise it."""
        path = self.folder / f"nonfinite-step-{step:08d}.safetensors"
        tensors = {name: distributed.full(t) for name, t in self._weights().items()}
        if processes.leads():
            weights.write_tensors(path, tensors)
            indices = [self.indices(step, micro).tolist() for micro in range(self.config.accumulation)]
            write_json(path.with_suffix(".json"), {"step": step, "reason": reason, "indices": indices})
        processes.barrier()
        raise NonFiniteLoss(
            f"training broke down at step {step} ({reason}): its examples and the weights are in {path}; "
            "try a lower learning_rate, a longer warmup, clip=1 or bf16=false"
        )


def _adamw(modules: Mapping[str, nn.Module], config: TrainConfig) -> torch.optim.AdamW:
    parameters = [p for module in modules.values() for p in module.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=config.learning_rate, betas=(config.beta1, config.beta2), fused=True)


def _below(tensors: Mapping[str, Tensor], name: str) -> dict[str, Tensor]:
    return {key.removeprefix(f"{name}."): t for key, t in tensors.items() if key.startswith(f"{name}.")}
