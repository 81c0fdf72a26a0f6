"""Stages of the any-order model: train it on random orders, extract orders, fine-tune it on them."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from anyorder.artifacts import Artifact, RowWriter, load_array, read_manifest
from anyorder.contracts import Grid
from anyorder.data.caches import OrderSet, TokenSet, check_tokenizer, check_tokens
from anyorder.decode import extract_orders, sample
from anyorder.evaluation import figures
from anyorder.likelihood import token_nll
from anyorder.logits import SCORES, Streams
from anyorder.models.transformer import AnyOrderTransformer, Architecture, TransformerConfig
from anyorder.orders import STATIC, kendall, mean_jump, position_entropy, random_orders, static_order
from anyorder.policies import PolicyConfig
from anyorder.runs.checkpoint import save_model
from anyorder.runs.common import (
    SHOWN,
    batches,
    device,
    fit,
    load_tokenizer,
    load_transformer,
    require_made_from,
    slices,
    spread,
    to_uint8,
    training_facts,
)
from anyorder.runs.precision import fast_dtype
from anyorder.runs.trainer import TrainConfig

Orders = Callable[[np.ndarray, int, torch.Generator], Tensor]
"""(rows (B,), step, generator) -> orders (B, N) int64: the only thing in which trainings differ."""


@dataclass
class TrainStage:
    """Train the any-order model; with `orders`, fine-tune it on an order cache. The loss is the same."""

    inputs: ClassVar[tuple[str, ...]] = ("tokens", "orders", "init", "tokenizer")
    tokens: Path
    order: str = "random"
    """random, or a static order (raster, hilbert, ...) for a model of that order alone."""
    orders: Path | None = None
    """Order cache to train on instead; only the images it covers are used."""
    random_share: float = 0.0
    """With `orders` or a static order: share of images that get a random order all the same."""
    random_share_end: float | None = None
    """Anneal that share linearly to this value over the training."""
    init: Path | None = None
    """Model to start from; it brings its own architecture."""
    tokenizer: Path | None = None
    """Only for pictures during training (train.sample_every)."""
    model: Architecture = field(default_factory=Architecture)
    train: TrainConfig = field(default_factory=TrainConfig)

    def __post_init__(self) -> None:
        for share in (self.random_share, self.random_share_end or 0.0):
            if not 0 <= share <= 1:
                raise ValueError(f"random_share must lie in [0, 1], got {share}")
        if self.order != "random" and self.order not in STATIC:
            raise ValueError(f"order must be random or one of {', '.join(STATIC)}, got '{self.order}'")
        if self.orders is not None and self.order != "random":
            raise ValueError(f"give either order={self.order} or orders={self.orders}, not both")
        if self.order == "random" and self.orders is None and (self.random_share or self.random_share_end):
            raise ValueError(
                "random_share goes with orders=... or a static order: all orders are random here"
            )
        if self.init is not None and self.model != Architecture():
            raise ValueError("init=... brings its own architecture: remove the model.* settings")
        if bool(self.train.sample_every) != (self.tokenizer is not None):
            raise ValueError("pictures during training need both tokenizer=... and train.sample_every > 0")

    def run(self, artifact: Artifact) -> dict[str, Any]:
        """Write the model and its log."""
        tokens, test = TokenSet(self.tokens), TokenSet(self.tokens, "test")
        model = self._model(tokens)
        orders, examples = self._orders(tokens)

        def loss(model: nn.Module, rows: np.ndarray, step: int, generator: torch.Generator) -> Any:
            batch, labels = (x.to(device()) for x in tokens.batch(rows))
            order = orders(rows, step, generator).to(device())
            return token_nll(model, batch, labels, order).mean(), {}  # type: ignore[arg-type]

        def evaluate(model: nn.Module, step: int) -> dict[str, float]:
            return {"test_nll": exact_nll(model, test, self.order, limit=512)}

        def picture(model: nn.Module, step: int) -> None:
            assert self.tokenizer is not None
            images = preview(model, self.tokenizer, self.order)
            figures.save_image(figures.image_grid(images), artifact.folder / f"samples/step-{step:08d}.png")

        if self.tokenizer is not None:
            check_tokenizer(tokens, artifact.identity["inputs"]["tokenizer"])
        drawing = picture if self.tokenizer is not None else None
        result = fit(artifact, model, loss, examples, self.train, evaluate=evaluate, sample=drawing)
        save_model(artifact.folder, result.model, model.config, "transformer")
        here = self.train.steps * self.train.batch_size * self.train.accumulation * tokens.grid.n
        before = read_manifest(self.init) if self.init else {"training_tokens": 0, "training_seconds": 0.0}
        return {
            "test_nll": exact_nll(result.model, test, self.order, limit=len(test)),
            "training_tokens": here + before["training_tokens"],
            "training_seconds": result.seconds + before["training_seconds"],
            **training_facts(result),
        }

    def _model(self, tokens: TokenSet) -> AnyOrderTransformer:
        torch.manual_seed(self.train.seed)
        if self.init is None:
            grid = (tokens.grid.h, tokens.grid.w)
            settings = vars(self.model)
            return AnyOrderTransformer(
                TransformerConfig(
                    **settings, vocab_size=tokens.vocab_size, grid=grid, num_classes=len(tokens.classes)
                )
            )
        require_made_from(self.init, "tokens", self.tokens)
        return load_transformer(self.init).train()

    def _orders(self, tokens: TokenSet) -> tuple[Orders, int]:
        """Where orders come from, and the number of images to train on."""
        grid = tokens.grid
        if self.orders is not None:
            cache = OrderSet(self.orders)
            check_tokens(cache, tokens)
            return self._mixed(cache.batch, grid), len(cache)
        if self.order == "random":
            return lambda rows, step, generator: random_orders(len(rows), grid, generator), len(tokens)
        fixed = static_order(self.order, grid)
        return self._mixed(lambda rows: fixed.expand(len(rows), -1), grid), len(tokens)

    def _mixed(self, own: Callable[[np.ndarray], Tensor], grid: Grid) -> Orders:
        """An image's own order, or a random one with the probability of this step."""
        end = self.random_share if self.random_share_end is None else self.random_share_end

        def orders(rows: np.ndarray, step: int, generator: torch.Generator) -> Tensor:
            share = self.random_share + (end - self.random_share) * (step - 1) / max(1, self.train.steps - 1)
            at_random = torch.rand(len(rows), 1, generator=generator) < share
            return torch.where(at_random, random_orders(len(rows), grid, generator), own(rows))

        return orders


@torch.no_grad()
def exact_nll(model: nn.Module, test: TokenSet, order: str, limit: int) -> float:
    """Exact mean negative log-likelihood under a random or static order, nats per token, fp32."""
    generator, total = torch.Generator().manual_seed(0), 0.0
    some = spread(limit, len(test))
    for rows in batches(some, 128):
        batch, labels = (x.to(device()) for x in test.batch(rows))
        orders = (
            random_orders(len(rows), test.grid, generator)
            if order == "random"
            else static_order(order, test.grid).expand(len(rows), -1)
        )
        total += float(token_nll(model, batch, labels, orders.to(device())).mean(1).sum())  # type: ignore[arg-type]
    return total / len(some)


def preview(model: nn.Module, tokenizer: Path, order: str) -> np.ndarray:
    """A few samples (n, H, W, 3) uint8; classes in turn, always the same seeds."""
    assert isinstance(model, AnyOrderTransformer)
    streams = Streams(range(SHOWN), device())
    labels = torch.arange(SHOWN, device=device()) % max(1, model.config.num_classes)
    made = sample(model, order, streams, condition=labels)
    return to_uint8(load_tokenizer(tokenizer).decode(made.tokens, model.grid))


@dataclass
class OrdersStage:
    """Extract the order in which the model itself would reveal each training image."""

    inputs: ClassVar[tuple[str, ...]] = ("model", "tokens")
    model: Path
    tokens: Path
    policy: PolicyConfig = field(default_factory=PolicyConfig)
    """Its order must be a score; entropy by default, token_likelihood is the paper's."""
    limit: int | None = None
    """Only the first images of the training split."""
    batch_size: int = 64
    """Images per call; memory grows with batch_size * N * depth * width."""
    bf16: bool = True
    """Score in bfloat16, where the hardware has it."""
    seed: int = 0
    """Of the location temperature."""

    def __post_init__(self) -> None:
        if self.policy.order not in SCORES:
            raise ValueError(
                f"policy.order must be one of {', '.join(SCORES)} to extract, got '{self.policy.order}'"
            )

    def run(self, artifact: Artifact) -> dict[str, Any]:
        """Write `train.{order,log_prob,seconds}.npy` and the statistics of the orders."""
        require_made_from(self.model, "tokens", self.tokens)
        tokens = TokenSet(self.tokens)
        n = min(self.limit or len(tokens), len(tokens))
        self._extract(artifact, tokens, n)
        orders = torch.from_numpy(load_array(artifact.folder / "train.order.npy").astype(np.int64))
        labels = tokens.batch(np.arange(n))[1].numpy()
        classes = tokens.classes or ["all"]
        maps = figures.mean_rank_per_class(orders.numpy(), labels, classes, tokens.grid)
        figures.save_image(maps, artifact.folder / "mean_rank.png")
        raster = static_order("raster", tokens.grid)
        return {
            "rows": n,
            "examples": n,
            "seconds": float(load_array(artifact.folder / "train.seconds.npy").sum()),
            "tokens": artifact.identity["inputs"]["tokens"],
            "policy": self.policy.label,
            "token_blind": self.policy.token_blind,
            "mean_log_prob": float(load_array(artifact.folder / "train.log_prob.npy").mean()),
            "kendall_with_raster": float(kendall(orders[:2000], raster).mean()),
            "mean_jump": mean_jump(orders, tokens.grid),
            "position_entropy": [round(h, 4) for h in position_entropy(orders).tolist()],
            "device": str(device()),
        }

    def _extract(self, artifact: Artifact, tokens: TokenSet, n: int) -> None:
        """Go through the images; a killed run goes on after its last batch."""
        model = load_transformer(self.model)
        model = model.to(fast_dtype(device(), self.bf16))
        width = ((tokens.grid.n,), np.uint16), ((tokens.grid.n,), np.float32), ((), np.float32)
        rows = RowWriter(
            artifact.folder, dict(zip(("train.order", "train.log_prob", "train.seconds"), width, strict=True))
        )
        with tqdm(total=n, initial=rows.rows, desc="orders", unit="image") as bar:
            for some in slices(n, self.batch_size, rows.rows):
                begin = time.perf_counter()
                batch, labels = (x.to(device()) for x in tokens.batch(some))
                streams = Streams([self.seed + int(row) for row in some], device())
                policy = self.policy.build(tokens.grid, streams)
                found = extract_orders(model, batch, policy, streams, condition=labels)
                seconds = np.full(len(some), (time.perf_counter() - begin) / len(some))
                rows.append(
                    **{
                        "train.order": found.order.cpu().numpy(),
                        "train.log_prob": found.log_prob.cpu().numpy(),
                        "train.seconds": seconds,
                    }
                )
                bar.update(len(some))
        rows.close()
