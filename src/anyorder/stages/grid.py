"""The stage that takes a model to a grid it was not trained on."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from anyorder.contracts import require
from anyorder.data.caches import TokenSet
from anyorder.data.rows import evenly_spaced
from anyorder.files import read_manifest, write_json
from anyorder.inference import figures
from anyorder.inference.device import device
from anyorder.inference.pipeline import Pipeline
from anyorder.method.loss import image_nll
from anyorder.method.policy_config import PolicyConfig
from anyorder.orders import random_orders
from anyorder.stages.artifacts import Artifact
from anyorder.stages.common import as_condition, require_made_from
from anyorder.stages.generation import GeneratingStage, over_seeds


@dataclass(kw_only=True)
class GridStage(GeneratingStage):
    """Likelihood and samples of a model on another grid than the one of its training."""

    inputs: ClassVar[tuple[str, ...]] = (*GeneratingStage.inputs, "other")
    provenance = GeneratingStage.provenance | {"tokenizer": ("other", "tokenizer")}
    other: Path
    """Tokens of images of another size, by the same tokenizer."""
    num_images: int = 500
    """Test images for the likelihoods, evenly spaced over the split; by default 500."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Seeds of the random orders; each image is measured in one random order for each."""
    samples: int = 16
    """Images generated on the other grid, of classes in turn; by default 16."""
    policy: PolicyConfig = field(default_factory=lambda: PolicyConfig("random"))
    """The order they are generated in; by default random. An inferred order costs O(N^2) on large grids."""

    def __post_init__(self) -> None:
        text = "num_images and samples must be >= 1 and seeds one or more different numbers, got"
        fits = min(self.num_images, self.samples) >= 1 and 0 < len(self.seeds) == len({*self.seeds})
        require(fits, f"{text} {self.num_images}, {self.samples} and {self.seeds}")
        super().__post_init__()

    def run(self, artifact: Artifact) -> dict[str, Any]:
        """Write `metrics.json`, and a figure: images of the test split above samples."""
        assert self.tokens
        trained, other = TokenSet(self.tokens, "test"), TokenSet(self.other, "test")
        pipe = self.load_pipeline(trained)
        require_made_from(self.other, "tokenizer", self.tokenizer)
        text = f"{self.other} has other classes than {self.tokens}: tokenize the same kind of images"
        require(trained.classes == other.classes, text)
        both = {"own": trained, "other": other}
        found = {name: self._nll(pipe.model, tokens) for name, tokens in both.items()}
        write_json(artifact.folder / "metrics.json", found)
        figures.save_image(self._figure(pipe, other), artifact.folder / "grid.png")
        return {
            "examples": self.num_images,
            "grids": {name: [tokens.grid.h, tokens.grid.w] for name, tokens in both.items()},
            "next_position": read_manifest(self.model)["config"].get("model", {}).get("next_position"),
            "metrics": found,
            "policy": self.policy.label,
        }

    def _nll(self, model: Any, tokens: TokenSet) -> dict[str, Any]:
        """Negative log-likelihood along random orders, nats per token: mean, deviation, each seed."""
        batch, labels = (x.to(device()) for x in tokens.batch(evenly_spaced(self.num_images, len(tokens))))
        condition = as_condition(model, tokens, labels)
        values = []
        for seed in tqdm(self.seeds, desc=f"{tokens.grid.h} x {tokens.grid.w}", unit="seed"):
            order = random_orders(len(batch), tokens.grid, torch.Generator().manual_seed(seed)).to(device())
            values.append(float(image_nll(model, batch, condition, order, tokens.grid)["nll"].mean()))
        return over_seeds(values)

    def _figure(self, pipe: Pipeline, tokens: TokenSet) -> Image.Image:
        """Images of the test split above samples."""
        rows = evenly_spaced(self.samples, len(tokens))
        labels = torch.arange(len(rows)) % max(1, len(tokens.classes))
        made = pipe(
            None, len(rows), self.policy, self.guidance,
            sampling=self.sampling, grid=tokens.grid, condition=as_condition(pipe.model, tokens, labels),
        )  # fmt: skip
        shown = [*pipe.decode(tokens.batch(rows)[0], tokens.grid), *made.images]
        return figures.image_grid(np.stack([np.asarray(x) for x in shown]), min(8, len(rows)), scale=2)
