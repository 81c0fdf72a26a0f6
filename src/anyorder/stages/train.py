"""The stage that trains the any-order model, on random orders, one fixed order, or extracted orders."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from torch import Tensor, nn

from anyorder.contracts import AnyOrderNetwork, Grid
from anyorder.data.caches import OrderSet, TokenSet, check_tokenizer, check_tokens
from anyorder.data.images import to_uint8
from anyorder.data.rows import batches, evenly_spaced
from anyorder.files import read_manifest
from anyorder.inference.device import device
from anyorder.inference.weights import kind_of, load_any_order, load_tokenizer, save_model
from anyorder.method.decoding import sample
from anyorder.method.loss import joint_nll, token_nll
from anyorder.method.policy_config import INFERRED, PolicyConfig
from anyorder.method.sampling import Streams
from anyorder.models.transformer import AnyOrderTransformer, Architecture, TransformerConfig
from anyorder.orders import STATIC, inverse, random_orders, static_order
from anyorder.report import figures
from anyorder.stages.artifacts import Artifact
from anyorder.stages.common import (
    SHOWN,
    fit,
    is_converted,
    require_trained_on,
    trained_before,
    training_facts,
)
from anyorder.training.config import TrainConfig
from anyorder.training.lora import adapt, add_low_rank, merge_low_rank
from anyorder.training.online import OnlineOrders

Own = Callable[[np.ndarray], Tensor]
"""Rows (B,) to the images' own orders (B, N) int64."""
Orders = Callable[[np.ndarray, int, torch.Generator], tuple[Tensor, Tensor]]
"""(rows (B,), step, generator) -> orders (B, N) int64, and whether each is the image's own (B,) bool: the
only thing in which trainings differ."""
Watched = tuple[TokenSet, np.ndarray, Tensor]
"""A split, which of its images (n,), and their orders (n, N) int64."""
WATCHED = 512
"""Images that are measured during training."""


@dataclass
class TrainStage:
    """Train the any-order model; with `orders`, fine-tune it on an order cache. The loss is the same.

    With `model.location` the location head learns the images' own orders beside the tokens, and the loss is
    the bound -log q(order, x) / N.
    """

    inputs: ClassVar[tuple[str, ...]] = ("tokens", "orders", "init", "tokenizer")
    tokens: Path
    order: str = "random"
    """random, or a static order (raster, hilbert, ...) for a model of that order alone."""
    orders: Path | None = None
    """Order cache to train on instead; only the images it covers are used."""
    orders_as: Literal["own", "class_mean"] = "own"
    """Each image's own order, or one order for each class: the ranking of its mean ranks (all images)."""
    online: PolicyConfig | None = None
    """Instead of `orders`: extract them while training, by the moving average of the weights."""
    online_every: int = 1
    """With `online`: epochs between two extractions of an image's order."""
    jitter: float = 0.0
    """Steps of Gaussian noise on the ranks of own orders: a guard against memorising one order per image."""
    random_share: float = 0.0
    """With `orders` or a static order: share of images that get a random order all the same."""
    random_share_end: float | None = None
    """Anneal that share linearly to this value over the training."""
    init: Path | None = None
    """Model to start from; it brings its own architecture, to which `model.location` may add a head. A
    converted one gets the classes and the grid of the tokens."""
    lora: int = 0
    """With `init`: train updates of this rank, which are merged when done, and the class table; 0: all."""
    tokenizer: Path | None = None
    """Only for pictures during training (train.sample_every)."""
    model: Architecture = field(default_factory=Architecture)
    train: TrainConfig = field(default_factory=TrainConfig)

    def __post_init__(self) -> None:
        for share in (self.random_share, self.random_share_end or 0.0):
            if not 0 <= share <= 1:
                raise ValueError(f"random_share must lie in [0, 1], got {share}")
        if self.jitter < 0:
            raise ValueError(f"jitter must be >= 0 steps, got {self.jitter}")
        if self.order != "random" and self.order not in STATIC:
            raise ValueError(f"order must be random or one of {', '.join(STATIC)}, got '{self.order}'")
        if self.orders is not None and self.order != "random":
            raise ValueError(f"give either order={self.order} or orders={self.orders}, not both")
        if self.online is not None and (self.orders is not None or self.order != "random"):
            raise ValueError("online extracts the orders itself: give it, or orders=..., or order=...")
        if self.online is not None and self.online.order not in (*INFERRED, "location"):
            raise ValueError(f"online.order must be an inferred order, got '{self.online.order}'")
        if self.online is not None and not self.train.ema:
            raise ValueError(
                "online extracts by the moving average of the weights: give train.ema, say 0.999"
            )
        if self.online_every < 1:
            raise ValueError(f"online_every must be >= 1 epoch, got {self.online_every}")
        if self.order == "random" and self.orders is None and self.online is None:
            own = ("random_share", "random_share_end", "jitter", "orders_as")
            if any(getattr(self, key) != getattr(TrainStage, key) for key in own):
                raise ValueError(
                    f"{', '.join(own)} go with orders=... or a static order: all orders are random here"
                )
            if self.model.location:
                raise ValueError("model.location needs orders to learn: give orders=... or a static order")
        if self.train.compile and self.model.location:
            raise ValueError("train.compile covers models without a location head: leave one of them out")
        if self.lora < 0 or (self.lora and self.init is None):
            raise ValueError(f"lora must be a rank >= 0 and goes with init=..., got {self.lora}")
        plain = dataclasses.replace(self.model, location=False, location_gradient=True)
        if self.init is not None and plain != Architecture():
            raise ValueError("init=... brings its own architecture: remove the model.* settings")
        if bool(self.train.sample_every) != (self.tokenizer is not None):
            raise ValueError("pictures during training need both tokenizer=... and train.sample_every > 0")

    def run(self, artifact: Artifact) -> dict[str, Any]:
        """Write the model and its log."""
        tokens, test = TokenSet(self.tokens), TokenSet(self.tokens, "test")
        model = self._model(tokens)
        fixed, examples = self._own(tokens)
        online = self._online(artifact, tokens)
        orders = self._mixed(online or _known(fixed, tokens.grid), tokens.grid)

        def loss(model: nn.Module, rows: np.ndarray, step: int, generator: torch.Generator) -> Any:
            batch, labels = map(_without_waiting, tokens.batch(rows))
            order, is_own = map(_without_waiting, orders(rows, step, generator))
            if not _has_location(model):
                return token_nll(model, batch, labels, order).mean(), {}  # type: ignore[arg-type]
            content, where = joint_nll(model, batch, labels, order)  # type: ignore[arg-type]
            where = where * is_own[:, None]  # a random order says nothing of where to go
            share = is_own.float().mean().clamp(min=1e-6)
            return content.mean() + where.mean(), {
                "content": content.mean(),
                "location": where.mean() / share,
            }

        watched = [self._watched(tokens, fixed, examples), self._watched_test(test)]

        def evaluate(model: nn.Module, step: int) -> dict[str, float]:
            return {
                f"{split}_{name}": value
                for split, (some, rows, order) in zip(("train", "test"), watched, strict=True)
                for name, value in exact_nll(model, some, rows, order).items()
            }

        def picture(model: nn.Module, step: int) -> None:
            assert self.tokenizer is not None
            images = preview(model, self.tokenizer, self.order)
            figures.save_image(figures.image_grid(images), artifact.folder / f"samples/step-{step:08d}.png")

        if self.tokenizer is not None:
            check_tokenizer(tokens, artifact.identity["inputs"]["tokenizer"])
        drawing = picture if self.tokenizer is not None else None
        ready = online.watch if online is not None else None
        result = fit(
            artifact, model, loss, examples, self.train, evaluate=evaluate, sample=drawing, ready=ready
        )
        merge_low_rank(result.model)
        save_model(artifact.folder, result.model, model.config, kind_of(model))
        here = result.examples * tokens.grid.n
        before = self._before()
        return {
            **evaluate(result.model, result.steps),
            **self._general_nll(result.model, test),
            "training_tokens": here + before["training_tokens"],
            "training_seconds": result.seconds + before["training_seconds"],
            **({"extraction_evaluations": online.evaluations()} if online is not None else {}),
            **training_facts(result),
        }

    def _before(self) -> dict[str, Any]:
        """What was trained before: the model to start from, or the one that the orders come from.

        A model that starts anew on another one's orders counts that one's training as its own.
        """
        if self.init is not None:
            return trained_before(self.init)
        if self.orders is not None:
            return read_manifest(self.orders)["scorer"]
        return {"training_tokens": 0, "training_seconds": 0.0}

    def _model(self, tokens: TokenSet) -> AnyOrderNetwork:
        torch.manual_seed(self.train.seed)
        if self.init is None:
            grid = (tokens.grid.h, tokens.grid.w)
            settings = vars(self.model)
            return AnyOrderTransformer(
                TransformerConfig(
                    **settings,
                    vocab_size=tokens.vocab_size,
                    grid=grid,
                    num_classes=len(tokens.classes),
                    attributes=tuple(len(values) for values in tokens.attributes.values()),
                    text_vocab=tokens.text_vocab,
                    text_length=tokens.text_length,
                )
            )
        require_trained_on(self.init, tokens, adapted=True)
        model = load_any_order(self.init)
        if is_converted(self.init):
            if tokens.further.shape[1]:
                raise ValueError(
                    f"a published model takes classes alone, {tokens.folder} has attributes or captions: run "
                    "data and tokens without them"
                )
            model = adapt(model, tokens.grid, len(tokens.classes))
        if self.model.location and not _has_location(model):
            if not isinstance(model, AnyOrderTransformer):
                raise ValueError("a published model takes no location head: remove model.location")
            head = {"location": True, "location_gradient": self.model.location_gradient}
            larger = AnyOrderTransformer(dataclasses.replace(model.config, **head)).to(device())
            larger.load_state_dict(model.state_dict(), strict=False)
            model = larger
        if self.lora:
            add_low_rank(model, self.lora)
        return model.train()

    def _own(self, tokens: TokenSet) -> tuple[Own | None, int]:
        """The images' own orders (none: all are random), and the number of images to train on."""
        if self.orders is None:
            if self.order == "random":
                return None, len(tokens)
            fixed = static_order(self.order, tokens.grid)
            return lambda rows: fixed.expand(len(rows), -1), len(tokens)
        cache = OrderSet(self.orders)
        check_tokens(cache, tokens)
        if self.orders_as == "class_mean":
            return lambda rows: cache.of_classes(tokens.batch(rows)[1]), len(tokens)
        return cache.batch, len(cache)

    def _online(self, artifact: Artifact, tokens: TokenSet) -> OnlineOrders | None:
        if self.online is None:
            return None
        warm = self.init is not None
        per_step = self.train.batch_size * self.train.accumulation
        return OnlineOrders(artifact.folder, tokens, self.online, self.online_every, per_step, warm=warm)

    def _mixed(self, own: Orders, grid: Grid) -> Orders:
        """An image's own order with some jitter, or a random one with the probability of this step."""
        end = self.random_share if self.random_share_end is None else self.random_share_end

        def orders(rows: np.ndarray, step: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
            on_cpu = torch.Generator().manual_seed(generator.initial_seed())  # the same orders on any device
            order, is_own = own(rows, step, on_cpu)
            if self.jitter:
                noise = torch.randn(order.shape, generator=on_cpu)
                order = (inverse(order) + self.jitter * noise).argsort(1)
            share = self.random_share + (end - self.random_share) * (step - 1) / max(1, self.train.steps - 1)
            if share:
                at_random = torch.rand(len(rows), 1, generator=on_cpu) < share
                order = torch.where(at_random, random_orders(len(rows), grid, on_cpu), order)
                is_own = is_own & ~at_random[:, 0]
            return order, is_own

        return orders

    # --- what is measured: the likelihood under the orders of training, on training and test images

    def _general_nll(self, model: nn.Module, test: TokenSet) -> dict[str, float]:
        """Under the order of training on the whole split; for extracted orders, under random ones."""
        rows = evenly_spaced(len(test) if self._has_no_own else WATCHED, len(test))
        name = "test_nll" if self._has_no_own else "any_order_nll"
        return {name: exact_nll(model, test, rows, self._general(test, len(rows)))["nll"]}

    @property
    def _has_no_own(self) -> bool:
        return self.orders is None and self.online is None

    def _watched(self, tokens: TokenSet, own: Own | None, examples: int) -> Watched:
        rows = evenly_spaced(WATCHED, examples)
        return tokens, rows, own(rows) if own is not None else self._general(tokens, len(rows))

    def _watched_test(self, test: TokenSet) -> Watched:
        rows = evenly_spaced(WATCHED, len(test))
        if self.orders is None:
            return test, rows, self._general(test, len(rows))
        cache = OrderSet(self.orders)
        if self.orders_as == "class_mean":
            return test, rows, cache.of_classes(test.batch(rows)[1])
        return test, evenly_spaced(len(cache.test_orders), len(test)), cache.test_orders

    def _general(self, tokens: TokenSet, n: int) -> Tensor:
        """The static order of training for n images, or random ones."""
        if self.order == "random":
            return random_orders(n, tokens.grid, torch.Generator().manual_seed(0))
        return static_order(self.order, tokens.grid).expand(n, -1)


def _without_waiting(x: Tensor) -> Tensor:
    """On the device; a GPU takes it from pinned memory in its own time, while the host reads on."""
    return x.pin_memory().to(device(), non_blocking=True) if device().type != x.device.type else x


def _known(own: Own | None, grid: Grid) -> Orders:
    """Orders known beforehand; random ones where there are none."""

    def orders(rows: np.ndarray, step: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        is_own = torch.full((len(rows),), own is not None)
        return (own(rows) if own is not None else random_orders(len(rows), grid, generator)), is_own

    return orders


def _has_location(model: nn.Module) -> bool:
    """Whether a location head is trained, too; published models have none."""
    return getattr(model.config, "location", False)


@torch.no_grad()
def exact_nll(model: nn.Module, tokens: TokenSet, rows: np.ndarray, orders: Tensor) -> dict[str, float]:
    """Mean negative log-likelihood of some images along given orders, nats per token, float32.

    Args:
        model: any-order model.
        tokens: the split.
        rows: (n,) which images.
        orders: (n, N) int64, their orders.

    Returns:
        nll, the tokens' part; with a location head also bound, which adds the location's.
    """
    totals = np.zeros(2)
    for some in batches(np.arange(len(rows)), 128):
        batch, labels = (x.to(device()) for x in tokens.batch(rows[some]))
        order = orders[some].to(device())
        if _has_location(model):
            content, where = joint_nll(model, batch, labels, order)  # type: ignore[arg-type]
            totals += [float(content.mean(1).sum()), float(where.mean(1).sum())]
        else:
            totals[0] += float(token_nll(model, batch, labels, order).mean(1).sum())  # type: ignore[arg-type]
    content, where = totals / len(rows)
    return {"nll": content} | ({"bound": content + where} if _has_location(model) else {})


def preview(model: nn.Module, tokenizer: Path, order: str) -> np.ndarray:
    """A few samples (n, H, W, 3) uint8; classes in turn, always the same seeds."""
    assert isinstance(model, AnyOrderNetwork)
    streams = Streams(range(SHOWN), device())
    labels = torch.arange(SHOWN, device=device()) % max(1, model.num_classes)
    made = sample(model, order, streams, condition=labels)
    return to_uint8(load_tokenizer(tokenizer).decode(made.tokens, model.grid))
