"""What networks cost in training and in use, at any size: parameters, FLOPs, bytes moved, memory.

All functions but `speeds` are to be used within `fake.imagined`.
"""

import os
import timeit
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

from anyorder.bench import costs
from anyorder.bench.fake import Pass, build, measure
from anyorder.contracts import Grid
from anyorder.evaluation.features import Classifier, ClassifierConfig
from anyorder.families import family
from anyorder.inference.device import fast_dtype
from anyorder.method import decoding
from anyorder.method import loss as losses
from anyorder.method.sampling import Streams, entropy, sample_tokens
from anyorder.models.transformer import AnyOrderTransformer, TransformerConfig
from anyorder.tokenizers import losses as terms
from anyorder.tokenizers.vq import VQConfig, VQModel
from anyorder.training import lora


def speeds(side: int = 1024, mib: int = 16) -> tuple[float, float, float, float, float]:
    """Of this CPU: FLOP/s in bfloat16 (0: not native) and float32, bytes/s, bytes of memory, seconds to call.

    Products of side x side; reading and writing so many MiB, where a function of each number is computed, as
    between the products of a network; operators of a model too small to compute. The best of some runs.
    """
    rates, seconds = {}, partial(timeit.repeat, repeat=7, number=1)
    for dtype in (torch.bfloat16, torch.float32):
        a = torch.randn(side, side).to(dtype)
        rates[dtype] = 2 * side**3 / min(seconds(partial(torch.matmul, a, a)))
    b = torch.ones(mib * 2**18)
    moved = 2 * b.nbytes / min(seconds(partial(nn.functional.silu, b)))
    native = fast_dtype(torch.device("cpu"), True) == torch.bfloat16
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    tiny = AnyOrderTransformer(TransformerConfig(depth=1, width=8, heads=1, grid=(4, 4), vocab_size=8)).eval()
    run = partial(decoding.sample, tiny, "raster", Streams([0]))
    call = min(seconds(run)) / costs.count(run).operators
    return rates[torch.bfloat16] * native, rates[torch.float32], moved, memory, call


def _tokens(model: Any, batch: int) -> tuple[Tensor, Tensor]:
    """Tokens and orders (B, N) int64."""
    n = model.grid.n
    return torch.zeros(batch, n, dtype=torch.int64), torch.arange(n).expand(batch, n)


def parameters(kind: str, config: Any) -> int:
    """Of a network of some kind, see `families`."""
    return _size(_network(kind, config))


def _network(kind: str, config: Any, dtype: torch.dtype | None = None) -> Any:
    return build(lambda: family(kind).model_class(config), dtype)


def _size(module: nn.Module, trained: bool = False) -> int:
    return sum(p.numel() for p in module.parameters() if p.requires_grad or not trained)


def train_generator(
    kind: str, config: Any, rank: int, batch: int, bf16: bool, passes: int, sizes: Sequence[int] | None
) -> tuple[int, int, Pass]:
    """Parameters, those that are trained, and forward and backward pass of an any-order model.

    `rank` is that of low-rank updates, 0 trains all; of several `passes` of a step the gradients of the first
    are alive in the second. `sizes` are those of the steps of a grouped model.
    """
    model = _network(kind, config)
    if rank:
        lora.add_low_rank(model, rank)
    tokens, order = _tokens(model, batch)
    steps: losses.Steps = {"sizes": sizes} if sizes else {}
    nll: Any = losses.joint_nll if getattr(config, "location", False) else losses.token_nll

    def loss() -> Any:
        found = nll(model, tokens, None, order, **steps)
        return sum(part.mean() for part in (found if isinstance(found, tuple) else (found,)))

    return _size(model), _size(model, trained=True), _training(model.train(), loss, bf16, passes)


def _training(module: nn.Module, loss: Callable[[], Any], bf16: bool, passes: int) -> Pass:
    """Forward and backward pass of a loss; the peak is that of the second one if there are several."""

    def work() -> None:
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            total = loss()
        total.backward()

    first = measure(module, work)
    if passes == 1:
        return first
    kept = sum(p.grad.nbytes for p in module.parameters() if p.grad is not None)
    return Pass(first.cost, kept + measure(module, work).peak)


def train_classifier(config: ClassifierConfig, batch: int, bf16: bool, passes: int) -> tuple[int, Pass]:
    """Parameters, and forward and backward pass of the classifier of features."""
    model = build(lambda: Classifier(config))
    images, labels = torch.zeros(batch, 3, *[config.image_size] * 2), torch.zeros(batch, dtype=torch.int64)
    return _size(model), _training(model.train(), lambda: model.loss(images, labels)[0], bf16, passes)


def train_tokenizer(
    config: VQConfig, loss: terms.LossConfig, side: tuple[int, int], batch: int, bf16: bool, passes: int
) -> tuple[int, Pass]:
    """Parameters of tokenizer and discriminator, and forward and backward pass, all terms of the loss on."""
    model: VQModel = build(lambda: VQModel(config))
    plain = terms.LossConfig(**{**vars(loss), "lpips": 0.0, "vgg_path": None, "lpips_path": None})
    objective: terms.TokenizerLoss = build(lambda: terms.TokenizerLoss(plain))
    if loss.lpips:
        objective.config = loss
        objective.perceptual = build(_Perceptual if loss.vgg_path else terms.LitePerceptualLoss)
    images = torch.zeros(batch, 3, *side)
    both = nn.ModuleList([model.train(), objective])

    def work() -> Tensor:
        total, _ = objective(model, images, loss.discriminator_start)
        objective._passes.clear()
        return total

    return _size(both), _training(both, work, bf16, passes)


@torch.no_grad()
def decoding_step(
    kind: str, config: Any, images: int, known: int, candidates: int, revealed: int, most: int, bf16: bool
) -> tuple[int, Pass, int]:
    """Parameters, scoring candidates of each of some images and revealing so many, and bytes of the cache.

    `known` positions are revealed before; with `bf16` weights and cache are of that type. The peak is that of
    the largest step, which scores `most` candidates; more than `revealed` are rated.
    """
    sampled = lambda positions, log_p: sample_tokens(log_p, torch.zeros(positions.shape))  # noqa: E731
    content, rate = (None, entropy) if most > revealed else (sampled, None)
    model = _network(kind, config, torch.bfloat16 if bf16 else None)
    tokens, order = _tokens(model.eval(), images)
    chunk = max(1, min(decoding.ROWS["cuda"], decoding.LOGITS // model.vocab_size) // images)

    def step(state: Any, begin: int, count: int, kept: int) -> Any:
        decoding.score_candidates(model, state, order[:, begin : begin + count], content, rate, chunk)
        last = begin + (count - 1) // chunk * chunk
        return model.append(state, order[:, last : last + kept], tokens[:, last : last + kept])

    def measured(known: int, count: int) -> tuple[Pass, tuple[Tensor, Tensor]]:
        before = known - min(known, revealed)  # what the last step revealed may wait to run with the next one
        state = model.start(images, None)
        state = model.append(state, order[:, :before], tokens[:, :before]) if before else state
        state = step(state, before, known - before, known - before) if known else state
        cache = state.cache.keys, state.cache.values
        return measure(model, lambda: step(state, known, count, revealed), *cache), cache

    # Fake tensors have no values, by which a candidate that was scored is known again.
    with mock.patch("anyorder.models.attention.Scored.find", _find):
        found, cache = measured(known, candidates)
        peak = max(found.peak, measured(1, most)[0].peak if most > candidates else 0)
    return _size(model), Pass(found.cost, peak), sum(x.nbytes for x in cache)


def _find(scored: Any, positions: Tensor, missing: int | None = None) -> slice | None:
    """As `attention.Scored.find`, by the place of the positions in memory alone."""
    if not scored.count or scored.latest[0].storage_offset() != positions.storage_offset():
        return None
    begin = scored.latest[2].start
    return slice(begin, begin + positions.shape[1])


@torch.no_grad()
def code(kind: str, config: Any, images: int, side: tuple[int, int]) -> tuple[int, Pass, Pass]:
    """Parameters of a convolutional tokenizer; encoding and decoding some images."""
    tokenizer = _network(kind, config)
    pixels = torch.zeros(images, 3, *side)
    h, w = (x // tokenizer.factor for x in side)
    tokens = torch.zeros(images, h * w, dtype=torch.int64)
    tokenizer.eval()
    encode = measure(tokenizer, lambda: tokenizer.encode(pixels))
    lookup = tokenizer.quantize.lookup  # `decode` would look at the values of tokens
    return _size(tokenizer), encode, measure(tokenizer, lambda: tokenizer._decode(lookup(tokens), Grid(h, w)))


class _Perceptual(terms.PerceptualLoss):
    """LPIPS with weights of the right shapes; counting needs no file."""

    def __init__(self) -> None:
        nn.Module.__init__(self)
        before = 3
        for head, (stage, width) in enumerate(zip(terms.VGG16_STAGES, (64, 128, 256, 512, 512), strict=True)):
            for i in stage:
                self.register_buffer(f"features_{i}_weight", torch.empty(width, before, 3, 3))
                self.register_buffer(f"features_{i}_bias", torch.empty(width))
                before = width
            self.register_buffer(f"head_{head}", torch.empty(1, width, 1, 1))
        for name in ("mean", "std"):
            self.register_buffer(name, torch.empty(3, 1, 1))
