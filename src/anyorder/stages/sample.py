"""The stage that generates the images to be evaluated."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from torch import Tensor
from tqdm import tqdm

from anyorder.contracts import class_labels
from anyorder.data.caches import TokenSet
from anyorder.data.rows import slices
from anyorder.files import RowWriter, load_array
from anyorder.inference.device import Threads, device
from anyorder.method.guidance import GuidanceConfig
from anyorder.method.policy_config import PolicyConfig
from anyorder.method.sampling import Sampling
from anyorder.report import figures
from anyorder.stages.artifacts import Artifact
from anyorder.stages.common import SHOWN, as_condition
from anyorder.stages.generation import check_order, load_pipeline

SAMPLES = "samples.safetensors"
"""Features and logits of the samples in an eval artifact, so that comparisons need no second pass."""


@dataclass
class SampleStage:
    """Generate images for the classes, attributes and captions of the test split, or for prompts."""

    inputs: ClassVar[tuple[str, ...]] = ("model", "tokenizer", "tokens", "scorer", "orders")
    provenance: ClassVar[dict[str, tuple[str, str]]] = {
        "tokens": ("model", "tokens"),
        "tokenizer": ("tokens", "tokenizer"),
    }
    required: ClassVar[tuple[str, ...]] = ("tokens", "tokenizer")
    model: Path
    """Any-order model, trained here or converted."""
    tokenizer: Path | None = None
    """Tokenizer; by default the one that made the tokens."""
    tokens: Path | None = None
    """Token cache for its test labels; by default the one the model was trained on; a converted model
    needs it."""
    scorer: Path | None = None
    """Scoring model, which decides where, for inferred orders; by default the model itself. Give the one that
    the model's orders were extracted with."""
    orders: Path | None = None
    """Order cache with an order for each class, for policy.order=class_mean."""
    n: int = 1000
    """Number of images, at least 1; by default 1000."""
    prompts: tuple[str, ...] = ()
    """Generate for these texts alone, n / len(prompts) images for each, all from the same seeds."""
    hide: tuple[str, ...] = ()
    """What the model is not told of the test images: class, captions, or attributes by name."""
    policy: PolicyConfig = field(default_factory=PolicyConfig)
    """The order; by default lowest entropy first, a token-blind order: samples follow the model."""
    sampling: Sampling = field(default_factory=Sampling)
    guidance: GuidanceConfig = field(default_factory=GuidanceConfig)
    batch_size: int = 64
    """Images generated at once; samples do not depend on it, up to rounding."""
    bf16: bool = True
    """Generate in bfloat16 where the hardware has it; false computes in float32. Inferred orders are always
    rated in float32."""
    compile: bool = False
    """Generate through compiled code, on a GPU as CUDA graphs: takes minutes at first, not for converted
    models. On a CPU it was measured not to pay."""
    seed: int = 0
    """Image i is generated from seed + i."""

    def __post_init__(self) -> None:
        if self.n < 1 or self.batch_size < 1:
            raise ValueError(f"n and batch_size must be >= 1, got {self.n} and {self.batch_size}")
        check_order(self.policy, self.scorer, self.orders)
        if self.prompts and (self.hide or self.n % len(self.prompts)):
            raise ValueError(
                f"n must be a multiple of the {len(self.prompts)} prompts, and they leave nothing to hide: "
                f"got n={self.n}, hide={list(self.hide)}"
            )

    def run(self, artifact: Artifact) -> dict[str, Any]:
        """Write `{images,tokens,order,log_prob,labels,seconds}.npy` and figures of the first samples.

        Where the model takes more than classes, `condition.npy` (n, 1 + A + L) int64 is what was asked for.
        """
        assert self.tokens
        tokens = TokenSet(self.tokens, "test")
        self._generate(artifact, tokens)
        self._figures(artifact.folder, tokens)
        seconds = load_array(artifact.folder / "seconds.npy")
        return {
            "examples": self.n,
            "seconds": float(seconds.sum()),
            "seconds_per_image": float(np.median(seconds)),
            "policy": self.policy.label,
            "token_blind": self.policy.token_blind,
            "device": str(device()),
        }

    def _conditions(self, tokens: TokenSet) -> Tensor:
        """What each image is asked to be, (n,) or (n, 1 + A + L) int64."""
        if self.prompts:
            each = [prompt for prompt in self.prompts for _ in range(self.n // len(self.prompts))]
            return tokens.vocabulary.condition(self.n, prompts=each)
        shuffled = np.random.default_rng(self.seed).permutation(len(tokens))
        return tokens.batch(np.resize(shuffled, self.n))[1]

    def _generate(self, artifact: Artifact, tokens: TokenSet) -> None:
        """Batch by batch; a killed run goes on after its last batch."""
        assert self.tokenizer
        pipe = load_pipeline(
            artifact, tokens, self.model, self.tokenizer, self.scorer, self.orders,
            policy=self.policy, bf16=self.bf16, compiled=self.compile,
        )  # fmt: skip
        asked, per_prompt = self._conditions(tokens), self.n // max(1, len(self.prompts))
        told, grid, factor = tokens.without(asked, self.hide), tokens.grid, pipe.tokenizer.factor
        names = {
            "images": ((grid.h * factor, grid.w * factor, 3), np.uint8),
            "tokens": ((grid.n,), np.int32),
            "order": ((grid.n,), np.uint16),
            "log_prob": ((grid.n,), np.float32),
            "labels": ((), np.int64),
            "seconds": ((), np.float32),
        }
        names |= {"condition": (tuple(asked.shape[1:]), np.int64)} if asked.ndim > 1 else {}
        rows = RowWriter(artifact.folder, names)
        bar = tqdm(total=self.n, initial=rows.rows, desc=f"samples, {self.policy.label}", unit="image")
        with bar, Threads(device()) as threads:
            for some in slices(self.n, self.batch_size, rows.rows):
                begin = time.perf_counter()
                made = pipe(
                    None, len(some), self.policy, self.guidance,
                    [self.seed + int(row) % per_prompt for row in some],
                    sampling=self.sampling, grid=grid, condition=as_condition(pipe.model, tokens, told[some]),
                )  # fmt: skip
                images = np.stack([np.asarray(image) for image in made.images])
                seconds = np.full(len(some), (time.perf_counter() - begin) / len(some))
                rows.append(
                    images=images,
                    tokens=made.tokens.cpu().numpy(),
                    order=made.order.cpu().numpy(),
                    log_prob=made.log_prob.cpu().numpy(),
                    labels=class_labels(asked[some]).numpy(),
                    seconds=seconds,
                    **({"condition": asked[some].numpy()} if asked.ndim > 1 else {}),
                )
                bar.update(len(some))
                threads.step()
        rows.close()

    def _figures(self, folder: Path, tokens: TokenSet) -> None:
        """The first samples: a grid, half of them with their orders, an animation; a row for each prompt."""
        images = load_array(folder / "images.npy")
        if self.prompts:
            first = np.arange(self.n).reshape(len(self.prompts), -1)[:, :8]
            grid = figures.prompt_grid([np.array(images[row]) for row in first], self.prompts)
            figures.save_image(grid, folder / "prompts.png")
        orders = load_array(folder / "order.npy")[:SHOWN].astype(np.int64)
        figures.save_sample_figures(folder, np.array(images[:SHOWN]), orders, tokens.grid)
