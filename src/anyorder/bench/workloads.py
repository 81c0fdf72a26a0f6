"""What `anyorder bench` measures: the machine's ceilings, and workloads as shares of them.

To add a workload, write a function from a `Subject` to a `Workload` and add it to `WORKLOADS`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from anyorder.bench.costs import Cost, count
from anyorder.contracts import Grid
from anyorder.inference.device import device, fast_dtype, native_bf16
from anyorder.method.decoding import extract_orders, sample
from anyorder.method.loss import token_nll
from anyorder.method.sampling import Streams
from anyorder.models.compiled import compile_decoding
from anyorder.models.transformer import AnyOrderTransformer, Architecture, TransformerConfig
from anyorder.orders import random_orders
from anyorder.settings import did_you_mean
from anyorder.tokenizers.vq import VQConfig, VQModel

EMULATED_ROWS = 64
"""Rows of a bfloat16 product where the hardware has none: emulation is hundreds of times slower."""


@dataclass
class TokenizerSize:
    """Size of the untrained tokenizer, which makes images that fit the grid."""

    channels: int = 32
    """Width at full resolution."""
    multipliers: tuple[int, ...] = (1, 2, 4)
    """Width at each resolution, in units of channels; each level after the first halves both sides."""


@dataclass
class Over:
    """Sweeps: everything is measured at each value of one size while the others stay, and plotted."""

    batch_size: tuple[int, ...] = ()
    """Images at once, in training and in sampling, for example 1,4,16."""
    grid: tuple[int, ...] = ()
    """Sides of square grids in patches, for example 8,16,32."""
    vocab_size: tuple[int, ...] = ()
    """Codebook sizes, for example 1024,16384."""
    depth: tuple[int, ...] = ()
    """Numbers of blocks, for example 4,8,16."""

    def __post_init__(self) -> None:
        for name, values in vars(self).items():
            if min(values, default=1) < 1:
                raise ValueError(f"{name} must list numbers >= 1, got {list(values)}")


@dataclass
class BenchConfig:
    """Sizes to measure at, in bfloat16 where the hardware has it (or `ANYORDER_BF16=on`), else in float32."""

    model: Architecture = field(default_factory=lambda: Architecture(depth=8, width=512, heads=8))
    tokenizer: TokenizerSize = field(default_factory=TokenizerSize)
    grid: tuple[int, int] = (16, 16)
    """Rows and columns of patches."""
    vocab_size: int = 1024
    """Codebook size."""
    batch_size: int = 16
    """Images at once in a training step, in scoring, and in the tokenizer."""
    images: int = 4
    """Images at once in sampling and in order extraction."""
    chunk: int = 256
    """Candidates per image that are scored in one call."""
    compile: bool = False
    """Sample and extract through torch.compile; compiling takes minutes, before anything is timed."""
    triad_mib: int = 256
    """Size in MiB of each of three arrays that measure memory bandwidth; take far more than the caches."""
    repeats: int = 5
    """Timed runs of each workload; the median is reported."""
    only: tuple[str, ...] = ()
    """Names of the workloads to measure; all by default. The ceilings are always measured."""
    over: Over = field(default_factory=Over)
    memory: tuple[int, ...] = (8, 16, 32)
    """Sides of the square grids at which the peak memory of sampling in an inferred order is measured."""

    def __post_init__(self) -> None:
        for name in ("batch_size", "images", "chunk", "triad_mib", "repeats"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be >= 1, got {getattr(self, name)}")
        if min(self.memory, default=1) < 1:
            raise ValueError(f"memory must list sides >= 1, got {list(self.memory)}")
        for name in self.only:
            if name not in WORKLOADS:
                hint = did_you_mean(name, WORKLOADS) or "."
                raise ValueError(f"unknown workload '{name}'{hint} Choose from {'; '.join(WORKLOADS)}")
        self.transformer(), self.vq()  # they refuse sizes that do not fit

    def transformer(self) -> TransformerConfig:
        """The model that is measured: with a location head, and unconditional."""
        settings = vars(self.model) | {"location": True}
        return TransformerConfig(**settings, vocab_size=self.vocab_size, grid=self.grid)

    def vq(self) -> VQConfig:
        """The tokenizer that is measured."""
        size = self.tokenizer
        groups = math.gcd(32, size.channels)
        return VQConfig(size.channels, size.multipliers, vocab_size=self.vocab_size, groups=groups)


@dataclass(frozen=True)
class Workload:
    """Something to time."""

    run: Callable[[], Any]
    cost: Cost
    """Of one run."""
    images: int = 0
    """Images that one run processes; 0: it is not about images."""

    @classmethod
    def counted(cls, run: Callable[[], Any], images: int = 0) -> Workload:
        """Run it once to count its cost."""
        return cls(run, count(run), images)


class Subject:
    """Models with random weights and random inputs for them, on the device."""

    def __init__(self, config: BenchConfig):
        """Weights and inputs come from the global random generator; none are zero."""
        self.config = config
        self.device = device()
        self.dtype = fast_dtype(self.device, True)
        self.grid = Grid(*config.grid)
        self.model = AnyOrderTransformer(config.transformer()).to(self.device)
        if config.compile:
            compile_decoding(self.model)
        self.tokens = self.random_tokens(config.batch_size)
        self.order = random_orders(config.batch_size, self.grid).to(self.device)
        self.streams = Streams(range(config.images), self.device)

    @cached_property
    def tokenizer(self) -> VQModel:
        """Built only if it is measured."""
        return VQModel(self.config.vq()).to(self.device).eval()

    def random_tokens(self, rows: int, grid: Grid | None = None) -> Tensor:
        """(rows, N) int64."""
        return torch.randint(self.config.vocab_size, (rows, (grid or self.grid).n), device=self.device)

    def autocast(self) -> torch.autocast:
        """bfloat16 where it pays."""
        return torch.autocast(self.device.type, self.dtype, enabled=self.dtype == torch.bfloat16)

    def without_gradients(self, work: Callable[[], Any]) -> Callable[[], Any]:
        """`work` as it is run for anything but training."""

        def run() -> None:
            self.model.eval()
            with torch.no_grad(), self.autocast():
                work()

        return run


# --- ceilings ---------------------------------------------------------------------------------------------

MEMORY = "memory, triad"


def matmul_name(dtype: torch.dtype, rows: int) -> str:
    """How the ceiling of a dtype is called at some number of rows."""
    return f"{str(dtype).removeprefix('torch.')} matmul, {rows:,d} rows"


def ceilings(subject: Subject) -> dict[str, Workload]:
    """Products of the model's own feed-forward shape, with the rows of training and of decoding; memory."""
    trained, decoded = subject.config.batch_size * subject.grid.n, subject.config.images
    found = {matmul_name(torch.float32, n): _product(subject, torch.float32, n) for n in (trained, decoded)}
    emulated = not native_bf16(subject.device)
    for n in (trained, decoded):
        n = min(n, EMULATED_ROWS) if emulated else n
        name = matmul_name(torch.bfloat16, n) + ", emulated" * emulated
        found[name] = _product(subject, torch.bfloat16, n)
    return {**found, MEMORY: _triad(subject)}


def _product(subject: Subject, dtype: torch.dtype, rows: int) -> Workload:
    weight = subject.model.blocks[0].mlp.gate_up.weight.detach().to(dtype).T  # type: ignore[union-attr, operator]
    x = torch.randn(rows, len(weight), device=subject.device).to(dtype)
    return Workload.counted(lambda: x @ weight)


def _triad(subject: Subject) -> Workload:
    """a = b + s c: two arrays are read and one is written."""
    a, b, c = torch.randn(3, subject.config.triad_mib * 2**18, device=subject.device)
    return Workload(lambda: torch.add(b, c, alpha=1.5, out=a), Cost(bytes=3 * 4 * a.numel()))


# --- workloads --------------------------------------------------------------------------------------------


def training(subject: Subject) -> Workload:
    """Forward, backward and AdamW on a batch in random orders."""
    optimizer = torch.optim.AdamW(subject.model.parameters(), fused=True)

    def step() -> None:
        subject.model.train()
        with subject.autocast():
            loss = token_nll(subject.model, subject.tokens, None, subject.order).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    return Workload.counted(step, len(subject.tokens))


def scoring(subject: Subject) -> Workload:
    """The likelihood of a batch, teacher forced."""
    run = subject.without_gradients(lambda: token_nll(subject.model, subject.tokens, None, subject.order))
    return Workload.counted(run, len(subject.tokens))


def sampling(order: str) -> Build:
    """Generating images in an order."""

    def build(subject: Subject) -> Workload:
        run = lambda: sample(subject.model, order, subject.streams, chunk=subject.config.chunk)  # noqa: E731
        return Workload.counted(subject.without_gradients(run), subject.config.images)

    return build


def extraction(subject: Subject) -> Workload:
    """The orders of given images."""
    images, chunk = subject.config.images, subject.config.chunk
    tokens = subject.random_tokens(images)
    run = lambda: extract_orders(subject.model, tokens, "entropy", subject.streams, chunk=chunk)  # noqa: E731
    return Workload.counted(subject.without_gradients(run), images)


def encoding(subject: Subject) -> Workload:
    """Images to tokens."""
    batch, side = len(subject.tokens), subject.tokenizer.factor
    shape = (batch, 3, side * subject.grid.h, side * subject.grid.w)
    images = 2 * torch.rand(shape, device=subject.device) - 1
    return Workload.counted(subject.without_gradients(lambda: subject.tokenizer.encode(images)), batch)


def decoding(subject: Subject) -> Workload:
    """Tokens to images."""
    run = subject.without_gradients(lambda: subject.tokenizer.decode(subject.tokens, subject.grid))
    return Workload.counted(run, len(subject.tokens))


Build = Callable[[Subject], Workload]
WORKLOADS: Mapping[str, Build] = MappingProxyType(
    {
        "training step": training,
        "teacher-forced scoring": scoring,
        "sampling, fixed order": sampling("random"),
        "sampling, location head": sampling("location"),
        "sampling, inferred order": sampling("entropy"),
        "order extraction": extraction,
        "tokenizer encode": encoding,
        "tokenizer decode": decoding,
    }
)
