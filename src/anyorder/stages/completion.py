"""The stage that measures completion: holes in test images, whose true content is known."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from statistics import mean, stdev
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from anyorder.contracts import AnyOrderModel, OrderPolicy, Tokenizer
from anyorder.data.caches import ImageSet, TokenSet, check_tokenizer
from anyorder.data.images import uint8_batches
from anyorder.data.rows import evenly_spaced, slices
from anyorder.evaluation import metrics
from anyorder.files import RowWriter, load_array, write_json
from anyorder.inference.device import device, fast_dtype
from anyorder.inference.inpainting import Completion, Filling, complete_images, grid_of, open_tokens, to_float
from anyorder.inference.masks import shaped_mask
from anyorder.inference.weights import load_any_order, load_tokenizer
from anyorder.method.decoding import generate, trace
from anyorder.method.guidance import GuidanceConfig, Guided
from anyorder.method.policy_config import PolicyConfig
from anyorder.method.sampling import Sampling, Streams
from anyorder.report import figures
from anyorder.stages.artifacts import Artifact
from anyorder.stages.common import as_condition, require_made_from, require_trained_on
from anyorder.stages.features import load_extractor

SHOWN = 8
"""Images in the picture."""


@dataclass
class CompletionStage:
    """Draw what is masked in test images, over several seeds, and measure it against what was there."""

    inputs: ClassVar[tuple[str, ...]] = ("model", "tokenizer", "tokens", "features", "data", "scorer")
    model: Path
    tokenizer: Path
    tokens: Path
    """The cache the model was trained on."""
    features: Path
    data: Path
    scorer: Path | None = None
    """Model that decides where, if not the model itself: the one its orders were extracted with."""
    mask: Literal["centre", "lower"] = "centre"
    """Centre: half of the width and of the height; lower: the lower third."""
    n: int = 500
    """Images, spread evenly over the test split."""
    policy: PolicyConfig = field(default_factory=PolicyConfig)
    """Where to go next."""
    sampling: Sampling = field(default_factory=Sampling)
    guidance: GuidanceConfig = field(default_factory=GuidanceConfig)
    filling: Filling = field(default_factory=Filling)
    seeds: tuple[int, ...] = (0, 1, 2)
    """The images are completed once for each."""
    batch_size: int = 64
    """Images per call; completions do not depend on it."""
    bf16: bool = True
    """Draw in bfloat16, where the hardware has it."""

    def __post_init__(self) -> None:
        if self.n < 4 or self.batch_size < 1 or not self.seeds:
            raise ValueError(
                f"n must be >= 4, batch_size >= 1 and seeds one number at least, got {self.n}, "
                f"{self.batch_size} and {self.seeds}"
            )
        if self.policy.order == "class_mean":
            raise ValueError("policy.order=class_mean is not supported here: choose another order")

    def run(self, artifact: Artifact) -> dict[str, Any]:
        """Write `SEED.{images,order,log_prob}.npy`, `metrics.json` and a picture."""
        tokens, images = TokenSet(self.tokens, "test"), ImageSet(self.data, "test")
        for folder in filter(None, (self.model, self.scorer)):
            require_trained_on(folder, tokens)
        check_tokenizer(tokens, artifact.identity["inputs"]["tokenizer"])
        for folder in (self.features, self.tokens):
            require_made_from(folder, "data", self.data)
        rows = evenly_spaced(self.n, len(images))
        hole = shaped_mask(self.mask, images.size)
        for seed in self.seeds:
            self._draw(artifact, seed, tokens, images, rows, hole)
        found = self._measure(artifact, images, rows, hole, images.size[0] // tokens.grid.h)
        write_json(artifact.folder / "metrics.json", found)
        figures.save_image(self._picture(artifact, images, rows, hole), artifact.folder / "grid.png")
        return {
            "examples": len(rows) * len(self.seeds),
            "policy": self.policy.label,
            "token_blind": self.policy.token_blind,
            "metrics": found,
            "device": str(device()),
        }

    def _draw(
        self,
        artifact: Artifact,
        seed: int,
        tokens: TokenSet,
        images: ImageSet,
        rows: np.ndarray,
        hole: np.ndarray,
    ) -> None:
        """Batch by batch; a killed run goes on after its last batch."""
        model, tokenizer = load_any_order(self.model), load_tokenizer(self.tokenizer)
        drawer: AnyOrderModel = model.to(fast_dtype(device(), self.bf16))
        drawer = Guided(drawer, self.guidance) if self.guidance.scale != 1 else drawer
        scorer = load_any_order(self.scorer) if self.scorer else None
        scorer = scorer.to(fast_dtype(device(), self.bf16)) if scorer is not None else None
        n = tokens.grid.n
        names = {
            f"{seed}.images": ((*images.size, 3), np.uint8),
            f"{seed}.order": ((n,), np.uint16),
            f"{seed}.log_prob": ((n,), np.float32),
        }
        writer = RowWriter(artifact.folder, names)
        with tqdm(total=len(rows), initial=writer.rows, desc=f"{self.policy.label}, seed {seed}") as bar:
            for some in slices(len(rows), self.batch_size, writer.rows):
                given_pixels = torch.from_numpy(np.array(images.images[rows[some]])).permute(0, 3, 1, 2)
                mask = torch.from_numpy(hole).expand(len(some), -1, -1)
                labels = torch.from_numpy(np.array(images.labels[rows[some]])).to(device())
                condition = as_condition(model, tokens, labels)
                # Far apart, so that no image meets the numbers of another one in the next seed.
                streams = Streams([1_000_000 * seed + int(row) for row in rows[some]], device())
                policy = self.policy.build(tokens.grid, streams)
                made = complete_images(
                    drawer, tokenizer, given_pixels.to(device()), mask.to(device()), policy, streams,
                    condition=condition, sampling=self.sampling, scorer=scorer, filling=self.filling,
                )  # fmt: skip
                log_prob = true_log_prob(
                    drawer, tokenizer, given_pixels.to(device()), made, policy, streams, condition, scorer
                )
                values = made.images.permute(0, 2, 3, 1), made.trace.order, log_prob
                writer.append(**{k: v.cpu().numpy() for k, v in zip(names, values, strict=True)})
                bar.update(len(some))
        writer.close()

    def _measure(
        self, artifact: Artifact, images: ImageSet, rows: np.ndarray, hole: np.ndarray, factor: int
    ) -> dict[str, Any]:
        """Mean, standard deviation over the seeds and the values of each seed, metric by metric."""
        extractor = load_extractor(self.features)
        true = metrics.statistics(extractor, uint8_batches(images.images[rows]), description="true images")
        targets = to_float(torch.from_numpy(np.array(images.images[rows])))[:, torch.from_numpy(hole)]
        drawn_tokens = int(open_tokens(torch.from_numpy(hole)[None], factor, self.filling.margin).sum())
        values: dict[str, list[float]] = {}
        for seed in self.seeds:
            drawn = load_array(artifact.folder / f"{seed}.images.npy")
            some = metrics.statistics(extractor, uint8_batches(drawn), description=f"seed {seed}")
            # From [-1, 1] to [0, 1]: a quarter.
            error = (
                to_float(torch.from_numpy(np.array(drawn)))[:, torch.from_numpy(hole)] - targets
            ).square()
            error = error.double().mean((1, 2)) / 4
            own = {
                "fid" if extractor.metric == "FID" else "fd": metrics.frechet_distance(
                    true.gaussian, some.gaussian
                ),
                "hole_mse": float(error.mean()),
                "hole_psnr": float(-10 * error.clamp_min(1e-10).log10().mean()),
            }
            if self._exact():
                log_prob = load_array(artifact.folder / f"{seed}.log_prob.npy").astype(np.float64)
                own["hole_nll"] = float(-log_prob.sum(1).mean() / drawn_tokens)
            for name, value in own.items():
                values.setdefault(name, []).append(value)
        return {
            name: {"mean": mean(x), "std": stdev(x) if len(x) > 1 else None, "seeds": x}
            for name, x in values.items()
        }

    def _exact(self) -> bool:
        """Whether the likelihood of the true tokens is one of the distribution that was drawn from."""
        decided = self.policy.deterministic or self.policy.order == "random"
        return self.policy.token_blind and decided and not self.policy.parallel

    def _picture(self, artifact: Artifact, images: ImageSet, rows: np.ndarray, hole: np.ndarray) -> Any:
        """A row for each image: true, with its hole, and completed from each seed."""
        shown = evenly_spaced(SHOWN, len(rows))
        true = np.array(images.images[rows[shown]])
        cut = np.where(hole[..., None], np.uint8(figures.UNREVEALED), true)
        drawn = [load_array(artifact.folder / f"{seed}.images.npy")[shown] for seed in self.seeds]
        columns = np.stack([true, cut, *drawn], axis=1)
        return figures.image_grid(columns.reshape(-1, *true.shape[1:]), columns.shape[1], scale=3)


def true_log_prob(
    model: AnyOrderModel,
    tokenizer: Tokenizer,
    images: Tensor,
    made: Completion,
    policy: OrderPolicy,
    streams: Streams,
    condition: Tensor | None,
    scorer: AnyOrderModel | None,
) -> Tensor:
    """Log-probability of the true tokens where others were drawn, (B, N) nats in order steps, 0 where kept.

    Args:
        model: the drawer.
        tokenizer: of the completion.
        images: (B, 3, H, W) uint8, the true ones.
        made: their completion; all keep equally many tokens.
        policy: as it was drawn with.
        streams: one random stream per image.
        condition: (B,) int64 class labels, or None.
        scorer: see `decode.generate`.
    """
    grid = grid_of(images, tokenizer.factor)
    kept = made.known.nonzero()[:, 1].reshape(len(images), -1)
    known = kept, made.trace.tokens.gather(1, kept)
    targets = tokenizer.encode(to_float(images))
    steps = generate(
        model, policy, streams, targets=targets, condition=condition, grid=grid, known=known, scorer=scorer
    )
    return trace(steps, known).log_prob
