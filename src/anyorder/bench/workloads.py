"""What `anyorder bench` measures: ceilings of the machine, and workloads; add one to `WORKLOADS`."""

import copy
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor

from anyorder.bench import costs
from anyorder.contracts import Grid, at_least
from anyorder.inference.device import device, fast_dtype
from anyorder.method import decoding
from anyorder.method.loss import token_nll
from anyorder.method.policy_config import PolicyConfig
from anyorder.method.sampling import Streams
from anyorder.models.architecture import Architecture, TransformerConfig
from anyorder.models.compiled import IMAGES, compile_decoding
from anyorder.models.transformer import AnyOrderTransformer
from anyorder.orders import random_orders
from anyorder.settings import did_you_mean
from anyorder.tokenizers.vq import VQConfig, VQModel

MEMORY = "memory, triad"
AT_ONCE = 4
"""Positions of a step, where several are sampled at once."""


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


@dataclass
class BenchConfig:
    """Sizes to measure at, in float32, or in bfloat16 where the hardware has it (or `ANYORDER_BF16=on`).

    Sampling is then measured in both.
    """

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
    compile: bool | None = None
    """Sample and extract through torch.compile; compiling takes minutes, before anything is timed. null does
    so on a GPU, as `sample` does for many images."""
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
        at_least(1, self, "batch_size", "images", "chunk", "triad_mib", "repeats")
        for name, sizes in {**vars(self.over), "memory": self.memory}.items():
            if min(sizes, default=1) < 1:
                raise ValueError(f"{name} must list numbers >= 1, got {list(sizes)}")
        if unknown := [name for name in self.only if name not in WORKLOADS]:
            hint = did_you_mean(unknown[0], WORKLOADS) or "."
            raise ValueError(f"unknown workload '{unknown[0]}'{hint} Choose from {'; '.join(WORKLOADS)}")
        for name in ("location", "location_gradient", "label_dropout", "part_dropout"):
            if getattr(self.model, name) != getattr(Architecture, name):
                raise ValueError(f"model.{name} has no effect: the model has a head and no condition")
        self.transformer(), self.vq()  # they refuse sizes that do not fit

    def transformer(self) -> TransformerConfig:
        """The model that is measured: with a location head, and unconditional."""
        settings = vars(self.model) | {"location": True}
        return TransformerConfig(**settings, vocab_size=self.vocab_size, grid=self.grid)

    def vq(self) -> VQConfig:
        """The tokenizer that is measured."""
        channels, vocab = self.tokenizer.channels, self.vocab_size
        return VQConfig(channels, self.tokenizer.multipliers, vocab_size=vocab, groups=math.gcd(32, channels))


@dataclass(frozen=True)
class Workload:
    """Something to time; `images` is how many of them one run processes."""

    run: Callable[[], Any]
    cost: costs.Cost
    images: int = 0
    sampling: bool = False
    """Whether these are new images."""


class Subject:
    """Models with random weights and random inputs for them, on the device; none are zero."""

    def __init__(self, config: BenchConfig):
        """Everything comes from PyTorch's global random generator."""
        self.config, self.device = config, device()
        self.dtype = fast_dtype(self.device, True)
        self.grid = Grid(*config.grid)
        self.model = AnyOrderTransformer(config.transformer()).to(self.device)
        self.tokens = self.random_tokens(config.batch_size)
        self.known = self.random_tokens(config.images)
        self.order = random_orders(config.batch_size, self.grid).to(self.device)
        self.streams = Streams(range(config.images), self.device)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), fused=True)

    def sampler(self, dtype: torch.dtype) -> "Subject":
        """The same with weights of a dtype, compiled if that is asked for: what sampling runs."""
        found = copy.copy(self)
        found.dtype, found.model = dtype, copy.deepcopy(self.model).to(dtype).eval()
        compile_decoding(found.model, self.config.compile, IMAGES, checks=0)  # eager code would be timed, too
        return found

    @cached_property
    def tokenizer(self) -> VQModel:
        """Built only if it is measured."""
        return VQModel(self.config.vq()).to(self.device).eval()

    @cached_property
    def pixels(self) -> Tensor:
        """Images (B, 3, H, W) in [-1, 1] that fill the grid."""
        h, w = (self.tokenizer.factor * side for side in self.config.grid)
        return 2 * torch.rand(self.config.batch_size, 3, h, w, device=self.device) - 1

    def random_tokens(self, rows: int, grid: Grid | None = None) -> Tensor:
        """(rows, N) int64."""
        return torch.randint(self.config.vocab_size, (rows, (grid or self.grid).n), device=self.device)

    def autocast(self) -> torch.autocast:
        """To `dtype`."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.dtype == torch.bfloat16)


def matmul_name(dtype: torch.dtype, rows: int) -> str:
    """The name of a dtype's ceiling at some number of rows."""
    return f"{str(dtype).removeprefix('torch.')} matmul, {rows:,d} rows"


def ceilings(subject: Subject) -> dict[str, Workload]:
    """Products of the model's feed-forward shape, with the rows of training and of decoding; memory."""
    weight = subject.model.blocks[0].mlp.gate_up.weight.detach().T  # type: ignore[union-attr, operator]
    found = {}
    for dtype in dict.fromkeys((torch.float32, subject.dtype)):
        for rows in (subject.tokens.numel(), subject.config.images):
            x = torch.randn(rows, len(weight), device=subject.device).to(dtype)
            product = partial(torch.matmul, x, weight.to(dtype))
            found[matmul_name(dtype, rows)] = Workload(product, costs.count(product))
    a, b, c = torch.randn(3, subject.config.triad_mib * 2**18, device=subject.device)
    triad = partial(torch.add, b, c, alpha=1.5, out=a)  # two arrays are read and one is written
    return {**found, MEMORY: Workload(triad, costs.Cost(bytes=3 * a.nbytes))}


def workload(name: str, subject: Subject, dtype: torch.dtype | None = None) -> Workload:
    """One of `WORKLOADS`, by default in the subject's dtype; it is run once to count its cost."""
    sampling = name.startswith("sampling")
    few = sampling or name == "order extraction"
    run = partial(WORKLOADS[name], subject.sampler(dtype or subject.dtype) if few else subject)
    images = subject.config.images if few else subject.config.batch_size
    return Workload(run, costs.count(run), images, sampling)


def _train(subject: Subject) -> None:
    """Forward, backward and AdamW on a batch in random orders."""
    subject.model.train()
    with subject.autocast():
        loss = _loss(subject).mean()
    subject.optimizer.zero_grad()
    loss.backward()
    subject.optimizer.step()


def _loss(subject: Subject) -> Tensor:
    return token_nll(subject.model, subject.tokens, None, subject.order)


def _evaluate(work: Callable[[Subject], Any], subject: Subject) -> None:
    """Run what needs no gradients and keeps float32 weights."""
    subject.model.eval()
    with torch.no_grad(), subject.autocast():
        work(subject)


def _sample(order: str | PolicyConfig, subject: Subject) -> Any:
    return decoding.sample(subject.model, order, subject.streams, chunk=subject.config.chunk)


def _sample_groups(subject: Subject) -> Any:
    """The same weights, as a model that predicts the positions of a step together."""
    subject = copy.copy(subject)
    subject.model = copy.copy(subject.model)
    subject.model.config = replace(subject.model.config, grouped=True)
    return _sample(PolicyConfig("random", per_step=AT_ONCE), subject)


def _sample_by_entropy(subject: Subject) -> Any:
    # Without training every token has nearly the largest entropy: a limit between that of 4 and of 5.
    limit = (AT_ONCE - 0.5) * math.log(subject.config.vocab_size)
    return _sample(PolicyConfig("entropy", per_step=4 * AT_ONCE, entropy_limit=limit), subject)


def _extract(subject: Subject) -> Any:
    chunk = subject.config.chunk
    return decoding.extract_orders(subject.model, subject.known, "entropy", subject.streams, chunk=chunk)


WORKLOADS: Mapping[str, Callable[[Subject], Any]] = {
    "training step": _train,
    "teacher-forced scoring": partial(_evaluate, _loss),
    "sampling, fixed order": partial(_sample, "random"),
    "sampling, location head": partial(_sample, "location"),
    "sampling, groups of 4": _sample_groups,
    "sampling, entropy-bounded, 4 at once": _sample_by_entropy,
    "sampling, one rating for 8": partial(_sample, PolicyConfig("entropy", rate_every=8, rescore=0.5)),
    "sampling, inferred order": partial(_sample, "entropy"),
    "order extraction": _extract,
    "tokenizer encode": partial(_evaluate, lambda subject: subject.tokenizer.encode(subject.pixels)),
    "tokenizer decode": partial(_evaluate, lambda x: x.tokenizer.decode(x.tokens, x.grid)),
}
