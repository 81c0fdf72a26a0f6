"""The stage that measures completion: holes in test images, whose true content is known."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import torch

from anyorder import files
from anyorder.contracts import require
from anyorder.data import rows as row_numbers
from anyorder.data.caches import ImageSet, TokenSet
from anyorder.data.images import uint8_batches
from anyorder.evaluation import metrics
from anyorder.inference import figures
from anyorder.inference.inpainting import Filling, open_tokens
from anyorder.inference.masks import shaped_mask
from anyorder.inference.pipeline import Pipeline
from anyorder.stages.artifacts import Artifact
from anyorder.stages.common import Rows, as_condition, require_made_from
from anyorder.stages.features import load_extractor
from anyorder.stages.generation import GeneratingStage, over_seeds

SHOWN = 8
"""Images in the figure."""


@dataclass(kw_only=True)
class CompletionStage(GeneratingStage):
    """Generate what is masked in test images, over several seeds, and measure it against the true content."""

    together: ClassVar[bool] = True
    inputs: ClassVar[tuple[str, ...]] = (*GeneratingStage.inputs, "features", "data")
    provenance = GeneratingStage.provenance | {"data": ("features", "data")}
    required: ClassVar[tuple[str, ...]] = (*GeneratingStage.required, "data")
    features: Path
    """Artifact of the features stage: the feature space of the distance."""
    data: Path | None = None
    """Where the images behind the features are, if they were moved."""
    mask: Literal["centre", "lower"] = "centre"
    """The hole: the centre is half of the width and of the height, lower is the lower third."""
    num_images: int = 500
    """Images, at least 4, evenly spaced over the test split; by default 500."""
    filling: Filling = field(default_factory=Filling)
    seeds: tuple[int, ...] = (0, 1, 2)
    """The images are completed once for each; the spread over them is reported."""
    batch_size: int = 64
    """Images completed at once; completions do not depend on it, up to rounding."""
    bf16: bool = True
    """Compute in bfloat16 where the hardware has it; false is slower and exact in float32."""

    def __post_init__(self) -> None:
        text = "num_images must be >= 4, batch_size >= 1 and seeds one or more different numbers, got"
        valid = self.num_images >= 4 and self.batch_size >= 1 and 0 < len(self.seeds) == len({*self.seeds})
        require(valid, f"{text} {self.num_images}, {self.batch_size} and {self.seeds}")
        super().__post_init__()

    def run(self, artifact: Artifact) -> dict[str, Any]:
        """Write `SEED.{images,order}.npy`, `SEED.log_prob.npy` where exact, `metrics.json` and a figure."""
        assert self.tokens
        assert self.data
        tokens, images = TokenSet(self.tokens, "test"), ImageSet(self.data, "test")
        for folder in (self.features, self.tokens):
            require_made_from(folder, "data", self.data)
        rows = row_numbers.evenly_spaced(self.num_images, len(images))
        hole, true = shaped_mask(self.mask, images.size), np.array(images.images[rows])
        pipe = self.load_pipeline(tokens, len(rows) * len(self.seeds), bf16=self.bf16)
        condition = as_condition(pipe.model, tokens, torch.from_numpy(np.array(images.labels[rows])))
        made = 0
        for seed in self.seeds:
            # Far apart, so that no image meets the numbers of another one in the next seed.
            seeds = [1_000_000 * seed + int(row) for row in rows]
            made += self._complete(artifact.folder / str(seed), pipe, true, hole, condition, seeds)
        if not artifact.leads:
            return {}
        found = self._measure(artifact.folder, true, hole, pipe.tokenizer.factor)
        files.write_json(artifact.folder / "metrics.json", found)
        self._figure(artifact.folder, true, hole)
        return {
            "examples": made,
            "policy": self.policy.label,
            "token_blind": self.policy.token_blind,
            "metrics": found,
        }

    def _complete(
        self,
        target: Path,
        pipe: Pipeline,
        true: np.ndarray,
        hole: np.ndarray,
        condition: torch.Tensor | None,
        seeds: list[int],
    ) -> int:
        """Batch by batch; a killed run goes on after its last batch; returns how many this one made."""
        n = (hole.size // pipe.tokenizer.factor**2,)
        names: dict[str, Any] = {"images": (true.shape[1:], np.uint8), "order": (n, np.uint16)}
        names |= {"log_prob": (n, np.float32)} if self._exact() else {}
        specs = {f"{target.name}.{name}": x for name, x in names.items()}
        rows = Rows(target.parent, specs, len(true), self.batch_size, f"{self.policy.label}, {target.name}")
        for some in rows:
            settings: dict[str, Any] = {
                "condition": None if condition is None else condition[some],
                "guidance_scale": self.guidance,
                "generator": [seeds[i] for i in some],
            }
            made = pipe.complete(
                true[some], hole, order=self.policy, sampling=self.sampling, batch_size=len(some),
                **settings, **vars(self.filling),
            )  # fmt: skip
            values = [np.stack([np.asarray(image) for image in made.images]), made.order.cpu().numpy()]
            if self._exact():
                order = made.order if self.policy.order == "random" else self.policy
                values.append(pipe.log_prob_of(true[some], made, order=order, **settings).cpu().numpy())
            rows.append(**dict(zip(rows.specs, values, strict=True)))
        return rows.n - rows.known

    def _measure(self, folder: Path, true: np.ndarray, hole: np.ndarray, factor: int) -> dict[str, Any]:
        """Mean, standard deviation over the seeds and the values of each seed, metric by metric."""
        extractor = load_extractor(self.features)
        reference = metrics.statistics(extractor, uint8_batches(true), description="true images")
        generated = int(open_tokens(torch.from_numpy(hole)[None], factor, self.filling.margin).sum())
        values: dict[str, list[float]] = {}
        distance = "fid" if extractor.metric == "FID" else "fd"
        for seed in self.seeds:
            made = np.array(files.load_array(folder / f"{seed}.images.npy"))
            found = metrics.statistics(extractor, uint8_batches(made), description=f"seed {seed}")
            error = np.square((made[:, hole].astype(np.float64) - true[:, hole]) / 255).mean((1, 2))
            both = reference.features, found.features
            of_seed = {
                distance: metrics.frechet_distance(reference.gaussian, found.gaussian),
                "kid": metrics.kernel_distance(*both, subset_size=min(1000, found.n))[0],
                **metrics.precision_recall(*both)._asdict(),
                "hole_mse": float(error.mean()),
                "hole_psnr": float(-10 * np.log10(error.clip(1e-10)).mean()),
            }
            if self._exact():
                log_prob = files.load_array(folder / f"{seed}.log_prob.npy").astype(np.float64)
                of_seed["hole_nll"] = float(-log_prob.sum(1).mean() / generated)
            for name, value in of_seed.items():
                values.setdefault(name, []).append(value)
        return {name: over_seeds(x) for name, x in values.items()}

    def _exact(self) -> bool:
        """Whether the likelihood of the true tokens is one of the distribution that was sampled from."""
        decided = self.policy.deterministic or self.policy.order == "random"
        return self.policy.token_blind and decided and not self.policy.parallel

    def _figure(self, folder: Path, true: np.ndarray, hole: np.ndarray) -> None:
        """A row for each image: true, with its hole, and completed from each seed."""
        shown = row_numbers.evenly_spaced(SHOWN, len(true))
        cut = np.where(hole[..., None], np.uint8(figures.UNREVEALED), true[shown])
        made = [files.load_array(folder / f"{seed}.images.npy")[shown] for seed in self.seeds]
        columns = np.stack([true[shown], cut, *made], axis=1)
        grid = figures.image_grid(columns.reshape(-1, *true.shape[1:]), columns.shape[1], scale=3)
        figures.save_image(grid, folder / "grid.png")
