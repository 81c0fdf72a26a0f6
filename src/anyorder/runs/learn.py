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

from anyorder.artifacts import Artifact, read_manifest
from anyorder.contracts import Grid
from anyorder.data.caches import OrderSet, TokenSet, check_tokenizer, check_tokens
from anyorder.decode import sample
from anyorder.evaluation import figures
from anyorder.likelihood import joint_nll, token_nll
from anyorder.logits import Streams
from anyorder.models.transformer import AnyOrderTransformer, Architecture, TransformerConfig
from anyorder.orders import STATIC, inverse, random_orders, static_order
from anyorder.policies import INFERRED, PolicyConfig
from anyorder.runs.checkpoint import save_model
from anyorder.runs.common import (
    SHOWN,
    batches,
    device,
    fit,
    load_tokenizer,
    load_transformer,
    require_made_from,
    spread,
    to_uint8,
    training_facts,
)
from anyorder.runs.online import OnlineOrders
from anyorder.runs.trainer import TrainConfig

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
    """Model to start from; it brings its own architecture, to which `model.location` may add a head."""
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
        if self.init is not None and dataclasses.replace(self.model, location=False) != Architecture():
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
            batch, labels = (x.to(device()) for x in tokens.batch(rows))
            order, is_own = (x.to(device()) for x in orders(rows, step, generator))
            if not model.config.location:  # type: ignore[union-attr]
                return token_nll(model, batch, labels, order).mean(), {}  # type: ignore[arg-type]
            content, where = joint_nll(model, batch, labels, order)  # type: ignore[arg-type]
            where = where * is_own[:, None]  # a random order says nothing of where to go
            return content.mean() + where.mean(), {"content": content.mean(), "location": where.mean()}

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
        save_model(artifact.folder, result.model, model.config, "transformer")
        here = result.examples * tokens.grid.n
        before = self._before()
        everything = np.arange(len(test))
        return {
            "test_nll": exact_nll(result.model, test, everything, self._general(test))["nll"],
            **evaluate(result.model, result.steps),
            "training_tokens": here + before["training_tokens"],
            "training_seconds": result.seconds + before["training_seconds"],
            **training_facts(result),
        }

    def _before(self) -> dict[str, Any]:
        """What was trained before: the model to start from, or the one that the orders come from.

        A model that starts anew on another one's orders counts that one's training as its own.
        """
        if self.init is not None:
            return read_manifest(self.init)
        if self.orders is not None:
            return read_manifest(self.orders)["scorer"]
        return {"training_tokens": 0, "training_seconds": 0.0}

    def _model(self, tokens: TokenSet) -> AnyOrderTransformer:
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
        require_made_from(self.init, "tokens", self.tokens)
        model = load_transformer(self.init)
        if self.model.location and not model.config.location:
            larger = AnyOrderTransformer(dataclasses.replace(model.config, location=True)).to(device())
            larger.load_state_dict(model.state_dict(), strict=False)
            model = larger
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
            share = self.random_share + (end - self.random_share) * (step - 1) / max(1, self.train.steps - 1)
            at_random = torch.rand(len(rows), 1, generator=generator) < share
            strangers = random_orders(len(rows), grid, generator)
            order, is_own = own(rows, step, generator)
            if self.jitter:
                noise = torch.randn(order.shape, generator=generator)
                order = (inverse(order) + self.jitter * noise).argsort(1)
            return torch.where(at_random, strangers, order), is_own & ~at_random[:, 0]

        return orders

    # --- what is measured: the likelihood under the orders of training, on training and test images

    def _watched(self, tokens: TokenSet, own: Own | None, examples: int) -> Watched:
        rows = spread(WATCHED, examples)
        return tokens, rows, own(rows) if own is not None else self._general(tokens, len(rows))

    def _watched_test(self, test: TokenSet) -> Watched:
        rows = spread(WATCHED, len(test))
        if self.orders is None:
            return test, rows, self._general(test, len(rows))
        cache = OrderSet(self.orders)
        if self.orders_as == "class_mean":
            return test, rows, cache.of_classes(test.batch(rows)[1])
        return test, spread(len(cache.test_orders), len(test)), cache.test_orders

    def _general(self, tokens: TokenSet, n: int | None = None) -> Tensor:
        """The static order of training for n images, or random ones."""
        n = n or len(tokens)
        if self.order == "random":
            return random_orders(n, tokens.grid, torch.Generator().manual_seed(0))
        return static_order(self.order, tokens.grid).expand(n, -1)


def _known(own: Own | None, grid: Grid) -> Orders:
    """Orders known beforehand; random ones where there are none."""

    def orders(rows: np.ndarray, step: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        is_own = torch.full((len(rows),), own is not None)
        return (own(rows) if own is not None else random_orders(len(rows), grid, generator)), is_own

    return orders


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
        if model.config.location:  # type: ignore[union-attr]
            content, where = joint_nll(model, batch, labels, order)  # type: ignore[arg-type]
            totals += [float(content.mean(1).sum()), float(where.mean(1).sum())]
        else:
            totals[0] += float(token_nll(model, batch, labels, order).mean(1).sum())  # type: ignore[arg-type]
    content, where = totals / len(rows)
    return {"nll": content} | ({"bound": content + where} if model.config.location else {})  # type: ignore[union-attr]


def preview(model: nn.Module, tokenizer: Path, order: str) -> np.ndarray:
    """A few samples (n, H, W, 3) uint8; classes in turn, always the same seeds."""
    assert isinstance(model, AnyOrderTransformer)
    streams = Streams(range(SHOWN), device())
    labels = torch.arange(SHOWN, device=device()) % max(1, model.config.num_classes)
    made = sample(model, order, streams, condition=labels)
    return to_uint8(load_tokenizer(tokenizer).decode(made.tokens, model.grid))
