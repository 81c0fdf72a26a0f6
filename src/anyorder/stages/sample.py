"""The stage that generates the images to be evaluated."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from torch import Tensor
from tqdm import tqdm

from anyorder.contracts import AnyOrderModel, class_labels
from anyorder.data.caches import OrderSet, TokenSet, check_tokenizer
from anyorder.data.images import to_uint8
from anyorder.data.rows import slices
from anyorder.files import RowWriter, load_array
from anyorder.inference.device import device, fast_dtype
from anyorder.inference.weights import load_any_order, load_tokenizer
from anyorder.method.decoding import sample
from anyorder.method.guidance import GuidanceConfig, Guided
from anyorder.method.policy_config import PolicyConfig
from anyorder.method.sampling import Sampling, Streams
from anyorder.models.compiled import compile_decoding
from anyorder.report import figures
from anyorder.stages.artifacts import Artifact
from anyorder.stages.common import SHOWN, as_condition, require_trained_on

SAMPLES = "samples.safetensors"
"""Features and logits of the samples in an eval artifact, so that comparisons need no second pass."""


@dataclass
class SampleStage:
    """Draw images for the classes, attributes and captions of the test split, or for prompts."""

    inputs: ClassVar[tuple[str, ...]] = ("model", "tokenizer", "tokens", "scorer", "orders")
    model: Path
    tokenizer: Path
    tokens: Path
    """The cache the model was trained on, for its test labels."""
    scorer: Path | None = None
    """Model that decides where, if not the model itself: the one its orders were extracted with."""
    orders: Path | None = None
    """Order cache that holds the orders of the classes, for policy.order=class_mean."""
    n: int = 1000
    """Number of images."""
    prompts: tuple[str, ...] = ()
    """Draw for these texts alone, n / len(prompts) images for each, all from the same seeds."""
    hide: tuple[str, ...] = ()
    """What the model is not told of test images: class, captions, or attributes by their names."""
    policy: PolicyConfig = field(default_factory=PolicyConfig)
    """Where to go next; token-blind by default, so that samples follow the model's own distribution."""
    sampling: Sampling = field(default_factory=Sampling)
    guidance: GuidanceConfig = field(default_factory=GuidanceConfig)
    batch_size: int = 64
    """Images per call; samples do not depend on it."""
    bf16: bool = True
    """Sample in bfloat16, where the hardware has it."""
    compile: bool = False
    """Draw through compiled code, on a GPU as CUDA graphs: takes minutes at first. Not for converted models.
    On a CPU it was measured not to pay."""
    seed: int = 0
    """Image i is drawn from stream seed + i."""

    def __post_init__(self) -> None:
        if self.n < 1 or self.batch_size < 1:
            raise ValueError(f"n and batch_size must be >= 1, got {self.n} and {self.batch_size}")
        if self.prompts and (self.hide or self.n % len(self.prompts)):
            raise ValueError(
                f"n must be a multiple of the {len(self.prompts)} prompts, and they leave nothing to hide: "
                f"got n={self.n}, hide={list(self.hide)}"
            )

    def run(self, artifact: Artifact) -> dict[str, Any]:
        """Write `{images,tokens,order,log_prob,labels,seconds}.npy` and pictures of the first samples.

        Where the model takes more than classes, `condition.npy` (n, 1 + A + L) int64 is what was asked for.
        """
        tokens = TokenSet(self.tokens, "test")
        for model in filter(None, (self.model, self.scorer)):
            require_trained_on(model, tokens)
        check_tokenizer(tokens, artifact.identity["inputs"]["tokenizer"])
        self._draw(artifact, tokens, self._asked(tokens))
        self._pictures(artifact, tokens)
        seconds = load_array(artifact.folder / "seconds.npy")
        return {
            "examples": self.n,
            "seconds": float(seconds.sum()),
            "seconds_per_image": float(np.median(seconds)),
            "policy": self.policy.label,
            "token_blind": self.policy.token_blind,
            "device": str(device()),
        }

    def _asked(self, tokens: TokenSet) -> Tensor:
        """What each picture is asked to be, (n,) or (n, 1 + A + L) int64."""
        if self.prompts:
            each = [prompt for prompt in self.prompts for _ in range(self.n // len(self.prompts))]
            return tokens.vocabulary.condition(self.n, prompts=each)
        shuffled = np.random.default_rng(self.seed).permutation(len(tokens))
        return tokens.batch(np.resize(shuffled, self.n))[1]

    def _draw(self, artifact: Artifact, tokens: TokenSet, asked: Tensor) -> None:
        """Batch by batch; a killed run goes on after its last batch."""
        told, per_prompt = tokens.without(asked, self.hide), self.n // max(1, len(self.prompts))
        model, tokenizer = load_any_order(self.model), load_tokenizer(self.tokenizer)
        drawer: AnyOrderModel = model.to(fast_dtype(device(), self.bf16))
        drawer = Guided(drawer, self.guidance) if self.guidance.scale != 1 else drawer
        scorer = load_any_order(self.scorer) if self.scorer else None
        scorer = scorer.to(fast_dtype(device(), self.bf16)) if scorer is not None else None
        for each in filter(None, (model, scorer) if self.compile else ()):
            compile_decoding(each)
        own = _of_classes(self.orders)
        h, w, n = tokens.grid.h * tokenizer.factor, tokens.grid.w * tokenizer.factor, tokens.grid.n
        names = {
            "images": ((h, w, 3), np.uint8),
            "tokens": ((n,), np.int32),
            "order": ((n,), np.uint16),
            "log_prob": ((n,), np.float32),
            "labels": ((), np.int64),
            "seconds": ((), np.float32),
        }
        names |= {"condition": (tuple(asked.shape[1:]), np.int64)} if asked.ndim > 1 else {}
        rows = RowWriter(artifact.folder, names)
        with tqdm(total=self.n, initial=rows.rows, desc=f"samples, {self.policy.label}", unit="image") as bar:
            for some in slices(self.n, self.batch_size, rows.rows):
                begin = time.perf_counter()
                streams = Streams([self.seed + int(row) % per_prompt for row in some], device())
                condition = told[some].to(device())
                policy = self.policy.build(tokens.grid, streams, own(condition))
                made = sample(
                    drawer, policy, streams, condition=as_condition(model, tokens, condition),
                    grid=tokens.grid, sampling=self.sampling, scorer=scorer,
                )  # fmt: skip
                images = to_uint8(tokenizer.decode(made.tokens, tokens.grid))
                wanted = {"condition": asked[some].numpy()} if asked.ndim > 1 else {}
                rows.append(
                    images=images,
                    tokens=made.tokens.cpu().numpy(),
                    order=made.order.cpu().numpy(),
                    log_prob=made.log_prob.cpu().numpy(),
                    labels=class_labels(asked[some]).numpy(),
                    seconds=np.full(len(some), (time.perf_counter() - begin) / len(some)),
                    **wanted,
                )
                bar.update(len(some))
        rows.close()

    def _pictures(self, artifact: Artifact, tokens: TokenSet) -> None:
        """The first samples, as they come: a grid, half of them beside their orders, all being drawn.

        Of prompts: a row of pictures for each.
        """
        if self.prompts:
            per_prompt = self.n // len(self.prompts)
            first = np.arange(self.n).reshape(len(self.prompts), per_prompt)[:, :8]
            rows = [np.array(load_array(artifact.folder / "images.npy")[row]) for row in first]
            figures.save_image(figures.prompt_grid(rows, self.prompts), artifact.folder / "prompts.png")
        images = np.array(load_array(artifact.folder / "images.npy")[:SHOWN])
        orders = load_array(artifact.folder / "order.npy")[:SHOWN].astype(np.int64)
        figures.save_sample_figures(artifact.folder, images, orders, tokens.grid)


def _of_classes(orders: Path | None) -> Callable[[Tensor], Tensor | None]:
    """Labels (B,) to the orders (B, N) of their classes, or to None where no order cache is given."""
    if orders is None:
        return lambda labels: None
    cache = OrderSet(orders)
    return lambda labels: cache.of_classes(labels).to(labels.device)
