"""The stage that measures completion: holes in test images, whose true content is known."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from anyorder import files
from anyorder.data import rows as row_numbers
from anyorder.data.caches import ImageSet, TokenSet
from anyorder.data.images import uint8_batches
from anyorder.evaluation import metrics
from anyorder.inference.device import device
from anyorder.inference.inpainting import Filling, open_tokens
from anyorder.inference.masks import shaped_mask
from anyorder.method.guidance import GuidanceConfig
from anyorder.method.policy_config import PolicyConfig
from anyorder.method.sampling import Sampling
from anyorder.report import figures
from anyorder.stages import generation
from anyorder.stages.artifacts import Artifact
from anyorder.stages.common import as_condition, require_made_from
from anyorder.stages.features import load_extractor

SHOWN = 8
"""Images in the figure."""


@dataclass
class CompletionStage:
    """Generate what is masked in test images, over several seeds, and measure it against what was there."""

    inputs: ClassVar[tuple[str, ...]] = (
        "model", "tokenizer", "tokens", "features", "data", "scorer", "orders"
    )  # fmt: skip
    provenance: ClassVar[dict[str, tuple[str, str]]] = {
        "tokens": ("model", "tokens"),
        "tokenizer": ("tokens", "tokenizer"),
        "data": ("features", "data"),
    }
    required: ClassVar[tuple[str, ...]] = ("tokens", "tokenizer", "data")
    model: Path
    """Any-order model, trained here or converted."""
    features: Path
    """Artifact of the features stage: the feature space of the distance."""
    tokenizer: Path | None = None
    """Tokenizer; by default the one that made the tokens."""
    tokens: Path | None = None
    """Token cache of the images; by default the one the model was trained on; needed for a converted
    model."""
    data: Path | None = None
    """Where the images behind the features are, if they were moved."""
    scorer: Path | None = None
    """Scoring model, which decides where, for inferred orders; by default the model itself."""
    orders: Path | None = None
    """Order cache with an order for each class, for policy.order=class_mean."""
    mask: Literal["centre", "lower"] = "centre"
    """The hole: the centre is half of the width and of the height, lower is the lower third."""
    n: int = 500
    """Images, at least 4, evenly spaced over the test split; by default 500."""
    policy: PolicyConfig = field(default_factory=PolicyConfig)
    """The order; by default lowest entropy first."""
    sampling: Sampling = field(default_factory=Sampling)
    guidance: GuidanceConfig = field(default_factory=GuidanceConfig)
    filling: Filling = field(default_factory=Filling)
    seeds: tuple[int, ...] = (0, 1, 2)
    """The images are completed once for each; the spread over them is reported."""
    batch_size: int = 64
    """Images completed at once; completions do not depend on it, up to rounding."""
    bf16: bool = True
    """Compute in bfloat16 where the hardware has it; false is slower and exact in float32."""

    def __post_init__(self) -> None:
        if self.n < 4 or self.batch_size < 1 or not self.seeds:
            raise ValueError(
                f"n must be >= 4, batch_size >= 1 and seeds one number at least, got {self.n}, "
                f"{self.batch_size} and {self.seeds}"
            )
        generation.check_order(self.policy, self.scorer, self.orders)

    def run(self, artifact: Artifact) -> dict[str, Any]:
        """Write `SEED.{images,order}.npy`, `SEED.log_prob.npy` where exact, `metrics.json` and a figure."""
        assert self.tokens
        assert self.data
        tokens, images = TokenSet(self.tokens, "test"), ImageSet(self.data, "test")
        for folder in (self.features, self.tokens):
            require_made_from(folder, "data", self.data)
        rows = row_numbers.evenly_spaced(self.n, len(images))
        hole = shaped_mask(self.mask, images.size)
        for seed in self.seeds:
            self._complete(artifact, seed, tokens, images, rows, hole)
        found = self._measure(artifact, images, rows, hole, images.size[0] // tokens.grid.h)
        files.write_json(artifact.folder / "metrics.json", found)
        figures.save_image(self._figure(artifact, images, rows, hole), artifact.folder / "grid.png")
        return {
            "examples": len(rows) * len(self.seeds),
            "policy": self.policy.label,
            "token_blind": self.policy.token_blind,
            "metrics": found,
            "device": str(device()),
        }

    def _complete(
        self,
        artifact: Artifact,
        seed: int,
        tokens: TokenSet,
        images: ImageSet,
        rows: np.ndarray,
        hole: np.ndarray,
    ) -> None:
        """Batch by batch; a killed run goes on after its last batch."""
        assert self.tokenizer
        pipe = generation.load_pipeline(
            artifact, tokens, self.model, self.tokenizer, self.scorer, self.orders,
            policy=self.policy, bf16=self.bf16,
        )  # fmt: skip
        names: dict[str, Any] = {
            f"{seed}.images": ((*images.size, 3), np.uint8),
            f"{seed}.order": ((tokens.grid.n,), np.uint16),
        }
        names |= {f"{seed}.log_prob": ((tokens.grid.n,), np.float32)} if self._exact() else {}
        writer = files.RowWriter(artifact.folder, names)
        with tqdm(total=len(rows), initial=writer.rows, desc=f"{self.policy.label}, seed {seed}") as bar:
            for some in row_numbers.slices(len(rows), self.batch_size, writer.rows):
                true = np.array(images.images[rows[some]])
                labels = torch.from_numpy(np.array(images.labels[rows[some]]))
                settings: dict[str, Any] = {
                    "condition": as_condition(pipe.model, tokens, labels),
                    "guidance_scale": self.guidance,
                    # Far apart, so that no image meets the numbers of another one in the next seed.
                    "generator": [1_000_000 * seed + int(row) for row in rows[some]],
                }
                made = pipe.complete(
                    true, hole, order=self.policy, sampling=self.sampling, **settings, **vars(self.filling)
                )
                values = [np.stack([np.asarray(image) for image in made.images]), made.order.cpu().numpy()]
                if self._exact():
                    order = made.order if self.policy.order == "random" else self.policy
                    values.append(pipe.log_prob_of(true, made, order=order, **settings).cpu().numpy())
                writer.append(**dict(zip(names, values, strict=True)))
                bar.update(len(some))
        writer.close()

    def _measure(
        self, artifact: Artifact, images: ImageSet, rows: np.ndarray, hole: np.ndarray, factor: int
    ) -> dict[str, Any]:
        """Mean, standard deviation over the seeds and the values of each seed, metric by metric."""
        extractor = load_extractor(self.features)
        true = np.array(images.images[rows])
        reference = metrics.statistics(extractor, uint8_batches(true), description="true images")
        generated = int(open_tokens(torch.from_numpy(hole)[None], factor, self.filling.margin).sum())
        values: dict[str, list[float]] = {}
        for seed in self.seeds:
            made = np.array(files.load_array(artifact.folder / f"{seed}.images.npy"))
            found = metrics.statistics(extractor, uint8_batches(made), description=f"seed {seed}")
            error = np.square((made[:, hole].astype(np.float64) - true[:, hole]) / 255).mean((1, 2))
            distance = metrics.frechet_distance(reference.gaussian, found.gaussian)
            of_seed = {
                "fid" if extractor.metric == "FID" else "fd": distance,
                "hole_mse": float(error.mean()),
                "hole_psnr": float(-10 * np.log10(error.clip(1e-10)).mean()),
            }
            if self._exact():
                log_prob = files.load_array(artifact.folder / f"{seed}.log_prob.npy").astype(np.float64)
                of_seed["hole_nll"] = float(-log_prob.sum(1).mean() / generated)
            for name, value in of_seed.items():
                values.setdefault(name, []).append(value)
        return {name: generation.over_seeds(x) for name, x in values.items()}

    def _exact(self) -> bool:
        """Whether the likelihood of the true tokens is one of the distribution that was sampled from."""
        decided = self.policy.deterministic or self.policy.order == "random"
        return self.policy.token_blind and decided and not self.policy.parallel

    def _figure(
        self, artifact: Artifact, images: ImageSet, rows: np.ndarray, hole: np.ndarray
    ) -> Image.Image:
        """A row for each image: true, with its hole, and completed from each seed."""
        shown = row_numbers.evenly_spaced(SHOWN, len(rows))
        true = np.array(images.images[rows[shown]])
        cut = np.where(hole[..., None], np.uint8(figures.UNREVEALED), true)
        made = [files.load_array(artifact.folder / f"{seed}.images.npy")[shown] for seed in self.seeds]
        columns = np.stack([true, cut, *made], axis=1)
        return figures.image_grid(columns.reshape(-1, *true.shape[1:]), columns.shape[1], scale=3)
