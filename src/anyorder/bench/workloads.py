"""What `anyorder bench` measures: the machine's ceilings, and the workloads that are held against them.

A further workload is a function from a `Subject` to a `Workload`, and a line in `WORKLOADS`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from anyorder.bench.costs import Cost, TokenizerCosts, TransformerCosts, fixed, inferred, matmul
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
    """Size of the untrained tokenizer; its images fit the grid."""

    channels: int = 32
    """Width at full resolution."""
    multipliers: tuple[int, ...] = (1, 2, 4)
    """Width at each resolution in units of channels; each level after the first halves both sides."""


@dataclass
class Over:
    """Values of one size while the others stay: everything is measured again at each, and drawn."""

    batch_size: tuple[int, ...] = ()
    """B, of training and of sampling alike."""
    grid: tuple[int, ...] = ()
    """Sides of square grids, so that N is the square."""
    vocab_size: tuple[int, ...] = ()
    """V."""
    depth: tuple[int, ...] = ()
    """Number of blocks."""

    def __post_init__(self) -> None:
        for name, values in vars(self).items():
            if min(values, default=1) < 1:
                raise ValueError(f"{name} must list numbers >= 1, got {list(values)}")


@dataclass
class BenchConfig:
    """Sizes to measure at.

    In bfloat16 where the hardware has it, float32 elsewhere.
    """

    model: Architecture = field(default_factory=lambda: Architecture(depth=8, width=512, heads=8))
    tokenizer: TokenizerSize = field(default_factory=TokenizerSize)
    grid: tuple[int, int] = (16, 16)
    """Rows and columns of patches."""
    vocab_size: int = 1024
    """Codebook size."""
    batch_size: int = 16
    """Images in a training step, in scoring, and in the tokenizer."""
    images: int = 4
    """Images sampled, and given orders, at once."""
    chunk: int = 256
    """Candidates scored per call."""
    compile: bool = False
    """Sample and extract through compiled code, see `anyorder.models.compiled`; all that is compiled is
    compiled before anything is timed, which takes minutes."""
    triad_mib: int = 256
    """Size of each of the three arrays that the memory bandwidth is measured on; far above all caches."""
    repeats: int = 5
    """Timed runs of each kind; the median counts."""
    only: tuple[str, ...] = ()
    """Workloads to measure, by name; all by default. The ceilings are measured in any case."""
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
    """How many images one run works through; 0: it is not about images."""


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

    def costs(self, batch: int) -> TransformerCosts:
        """Of the transformer."""
        return TransformerCosts(self.model.config, batch, self.dtype.itemsize)

    def tokenizer_costs(self) -> TokenizerCosts:
        """Of the tokenizer."""
        return TokenizerCosts(self.config.vq(), self.grid, self.config.batch_size, self.dtype.itemsize)

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
    inputs, outputs = weight.shape
    x = torch.randn(rows, inputs, device=subject.device).to(dtype)
    return Workload(lambda: x @ weight, matmul(rows, inputs, outputs, dtype.itemsize))


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

    batch = len(subject.tokens)
    return Workload(step, subject.costs(batch).training(), batch)


def scoring(subject: Subject) -> Workload:
    """The likelihood of a batch, teacher forced."""
    batch = len(subject.tokens)
    run = subject.without_gradients(lambda: token_nll(subject.model, subject.tokens, None, subject.order))
    return Workload(run, subject.costs(batch).forward(), batch)


def sampling(
    order: str,
    calls: Callable[[int, int], Iterator[tuple[int, int]]],
    locate: bool = False,
    again: bool = False,
) -> Build:
    """Drawing images in an order that makes these calls (M, L) of `score`, given N and `chunk`.

    With `again` the head runs once more for what was chosen, see `TransformerCosts.decoding`.
    """

    def build(subject: Subject) -> Workload:
        config, n = subject.config, subject.grid.n
        costs = subject.costs(config.images)
        run = lambda: sample(subject.model, order, subject.streams, chunk=config.chunk)  # noqa: E731
        cost = costs.decoding(calls(n, config.chunk), n * again) + (n if locate else 0) * costs.locate()
        return Workload(subject.without_gradients(run), cost, config.images)

    return build


def extraction(subject: Subject) -> Workload:
    """The orders of given images."""
    config = subject.config
    tokens = subject.random_tokens(config.images)
    run = lambda: extract_orders(subject.model, tokens, "entropy", subject.streams, chunk=config.chunk)  # noqa: E731
    cost = subject.costs(config.images).decoding(inferred(subject.grid.n, config.chunk), subject.grid.n)
    return Workload(subject.without_gradients(run), cost, config.images)


def encoding(subject: Subject) -> Workload:
    """Images to tokens."""
    batch, side = len(subject.tokens), subject.tokenizer.factor
    shape = (batch, 3, side * subject.grid.h, side * subject.grid.w)
    images = 2 * torch.rand(shape, device=subject.device) - 1
    run = subject.without_gradients(lambda: subject.tokenizer.encode(images))
    return Workload(run, subject.tokenizer_costs().encode(), batch)


def decoding(subject: Subject) -> Workload:
    """Tokens to images."""
    run = subject.without_gradients(lambda: subject.tokenizer.decode(subject.tokens, subject.grid))
    return Workload(run, subject.tokenizer_costs().decode(), len(subject.tokens))


def _fixed(n: int, chunk: int) -> Iterator[tuple[int, int]]:
    return fixed(n)


Build = Callable[[Subject], Workload]
WORKLOADS: Mapping[str, Build] = MappingProxyType(
    {
        "training step": training,
        "teacher-forced scoring": scoring,
        "sampling, fixed order": sampling("random", _fixed),
        "sampling, location head": sampling("location", _fixed, locate=True),
        "sampling, inferred order": sampling("entropy", inferred, again=True),
        "order extraction": extraction,
        "tokenizer encode": encoding,
        "tokenizer decode": decoding,
    }
)
