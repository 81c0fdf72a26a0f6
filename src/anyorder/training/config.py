"""The settings of a training, and what follows from them at each step: learning rate, examples and seeds.

All randomness, and the position in the data, is a *function* of (seed, step): no generator state needs
saving, and a run that was killed at any moment and resumed ends with the same bits as one that was not.
Seeds are mixed by `numpy.random.SeedSequence`.
"""

import math
from collections.abc import Collection
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from anyorder.contracts import at_least, require


@dataclass
class TrainConfig:
    """How to train: AdamW (Loshchilov & Hutter, arXiv 1711.05101), linear warm-up, cosine decay."""

    steps: int = 10_000
    """Number of weight updates. A larger number extends a run, unless `patience` ended it."""
    batch_size: int = 64
    """Examples per forward and backward pass."""
    accumulation: int = 1
    """Passes whose gradients are averaged into one update, to train with batches larger than memory. Several
    processes share them: take a multiple of their number."""
    shard: bool = False
    """Split weights, averages and AdamW's moments over the processes of torchrun (FSDP2): for models that one
    GPU cannot hold. False keeps all in each process (DDP), which is faster. No effect in one process."""
    learning_rate: float = 3e-4
    """Largest learning rate, reached at the end of the warm-up."""
    warmup: int = 0
    """Steps over which the learning rate rises linearly from 0."""
    min_lr_ratio: float = 0.0
    """Learning rate at the last step, as a fraction of the largest, in [0, 1]; 1 keeps it constant."""
    beta1: float = 0.9
    """Decay of AdamW's mean of gradients, in [0, 1)."""
    beta2: float = 0.95
    """Decay of AdamW's mean of squared gradients, in [0, 1)."""
    weight_decay: float = 0.05
    """Decoupled weight decay of matrices and kernels; biases and gains have none."""
    clip: float = 1.0
    """Largest norm of the whole gradient; 0 does not clip."""
    ema: float = 0.0
    """Decay of the moving average of the weights, in [0, 1); 0 is off. Starts as (1 + step) / (10 + step)."""
    bf16: bool = True
    """Compute the loss under bfloat16 autocast where the hardware has it; weights stay float32."""
    compile: bool = False
    """Run the model through torch.compile: minutes at first (on a CPU with a C++ compiler), then faster."""
    seed: int = 0
    """Seed of initial weights, data order, dropout and random orders."""
    log_every: int = 50
    """Steps between lines of metrics.jsonl; losses are checked for NaN then, too."""
    eval_every: int = 1000
    """Steps between evaluations; 0 is never."""
    save_every: int = 1000
    """Steps between checkpoints; the last step always has one."""
    sample_every: int = 0
    """Steps between images of samples; 0 is never."""
    patience: int = 0
    """Stop after this many evaluations without a better `watch`, and keep the best weights; 0 is off."""
    watch: str = "test_nll"
    """Evaluated value that `patience` watches: choose validation_nll where the data have a validation split.
    Smaller is better, but for PSNR, SSIM and accuracy."""
    keep: int = 2
    """Number of newest checkpoints kept."""
    tensorboard: bool = False
    """Log to TensorBoard, too (pip install 'anyorder[log]'); with sample_every also images."""
    wandb: bool = False
    """Log to Weights & Biases, too (the same extra), to the project WANDB_PROJECT, by default anyorder."""
    logger: str = ""
    """Own logger, package.module:Class, see `training.log.Logger`."""

    def __post_init__(self) -> None:
        at_least(1, self, "steps", "batch_size", "accumulation", "log_every", "save_every", "keep")
        at_least(0, self, "seed", "eval_every", "sample_every", "weight_decay", "clip", "patience")
        self._require("seed", self.seed < 2**63, "below 2**63")
        for name in ("beta1", "beta2", "ema"):
            self._require(name, 0 <= getattr(self, name) < 1, "in [0, 1)")
        self._require("learning_rate", 0 < self.learning_rate < math.inf, "above 0 and finite")
        self._require("warmup", 0 <= self.warmup <= self.steps, f"in [0, steps = {self.steps}]")
        self._require("min_lr_ratio", 0 <= self.min_lr_ratio <= 1, "in [0, 1]")
        require(not self.patience or self.eval_every > 0, "patience needs evaluations: give eval_every > 0")
        if not self.patience and self.watch != TrainConfig.watch:
            raise ValueError(f"watch={self.watch} is for patience: give patience > 0, say 3")

    def _require(self, name: str, holds: bool, allowed: str) -> None:
        require(holds, f"{name} must be {allowed}, got {getattr(self, name)}")

    def require_watched(self, evaluated: Collection[str], *, samples: bool = True) -> None:
        """A ValueError if `patience` watches what is not `evaluated`, or there are no `samples` to show."""
        text = f"sample_every={self.sample_every} is for models that generate images: leave it out"
        require(samples or not self.sample_every, text)
        if self.patience and self.watch not in evaluated:
            raise ValueError(f"watch={self.watch} is not evaluated: choose one of {', '.join(evaluated)}")

    @property
    def log_settings(self) -> set[str]:
        """Names of the settings that do not change the trained weights; free to change on resuming."""
        names = {"shard", "compile", "log_every", "save_every", "sample_every", "keep"}
        names |= {"tensorboard", "wandb", "logger"}
        return names if self.patience else names | {"eval_every"}


def learning_rate(config: TrainConfig, step: int) -> float:
    """Linear warm-up, then cosine decay (Loshchilov & Hutter, arXiv 1608.03983); `step` in [1, steps]."""
    if step < config.warmup:
        return config.learning_rate * step / config.warmup
    done = (step - config.warmup) / max(1, config.steps - config.warmup)
    cosine = 0.5 * (1 + math.cos(math.pi * done))
    return config.learning_rate * (config.min_lr_ratio + (1 - config.min_lr_ratio) * cosine)


_DATA, _STEP = 0, 1  # first words of the seeds, so that data order and step never share one


@lru_cache(maxsize=2)
def _shuffled(seed: int, epoch: int, examples: int) -> np.ndarray:
    return np.random.default_rng(np.random.SeedSequence((seed, _DATA, epoch))).permutation(examples)


def batch_indices(seed: int, batch: int, size: int, examples: int) -> np.ndarray:
    """Examples of a batch, (size,) int64: batches, from 0, are cut from one endless row of shuffled epochs.

    An epoch has each of the `examples` once; `size` may exceed their number.
    """
    epochs, offsets = np.divmod(np.arange(batch * size, (batch + 1) * size), examples)
    touched = range(epochs[0], epochs[-1] + 1)
    return np.concatenate([_shuffled(seed, e, examples)[offsets[epochs == e]] for e in touched])


def step_seeds(seed: int, step: int, micro: int) -> tuple[int, int]:
    """Seeds of PyTorch's global generator (dropout) and of the loss's generator, for one pass of a step."""
    first, second = np.random.SeedSequence((seed, _STEP, step, micro)).generate_state(2, np.uint64)
    return int(first), int(second)
