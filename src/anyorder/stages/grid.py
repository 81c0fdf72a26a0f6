"""The stage that takes a model to a grid it was not trained on."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from statistics import mean, stdev
from typing import Any, ClassVar

import numpy as np
import torch
from tqdm import tqdm

from anyorder.contracts import AnyOrderModel
from anyorder.data.caches import TokenSet, check_tokenizer
from anyorder.data.images import to_uint8
from anyorder.data.rows import batches, evenly_spaced
from anyorder.files import read_manifest, write_json
from anyorder.inference.device import device
from anyorder.inference.weights import load_any_order, load_tokenizer
from anyorder.method.decoding import sample
from anyorder.method.guidance import GuidanceConfig, Guided
from anyorder.method.loss import token_nll
from anyorder.method.policy_config import PolicyConfig
from anyorder.method.sampling import Sampling, Streams
from anyorder.orders import random_orders
from anyorder.report import figures
from anyorder.stages.artifacts import Artifact
from anyorder.stages.common import as_condition, require_trained_on


@dataclass
class GridStage:
    """Likelihood and samples of a model on another grid than the one of its training."""

    inputs: ClassVar[tuple[str, ...]] = ("model", "tokens", "other", "tokenizer")
    model: Path
    tokens: Path
    """The cache the model was trained on."""
    other: Path
    """Tokens of images of another size, by the same tokenizer."""
    tokenizer: Path
    n: int = 500
    """Test images for the likelihoods, spread evenly over the split."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Random orders of each image."""
    samples: int = 16
    """Pictures drawn on the other grid, of classes in turn."""
    policy: PolicyConfig = field(default_factory=lambda: PolicyConfig("random"))
    """The order that they are drawn in; an inferred order costs O(N^2) on large grids."""
    sampling: Sampling = field(default_factory=Sampling)
    guidance: GuidanceConfig = field(default_factory=GuidanceConfig)
    batch_size: int = 16
    """Images per call."""

    def __post_init__(self) -> None:
        if self.n < 1 or self.samples < 1 or self.batch_size < 1 or not self.seeds:
            raise ValueError(
                "n, samples and batch_size must be >= 1 and seeds one number at least, got "
                f"{self.n}, {self.samples}, {self.batch_size} and {self.seeds}"
            )
        if self.policy.order == "class_mean":
            raise ValueError("policy.order=class_mean is of one grid: choose another order")

    def run(self, artifact: Artifact) -> dict[str, Any]:
        """Write `metrics.json`, and a picture: images of the test split above samples."""
        own, other = TokenSet(self.tokens, "test"), TokenSet(self.other, "test")
        require_trained_on(self.model, own)
        for tokens in (own, other):
            check_tokenizer(tokens, artifact.identity["inputs"]["tokenizer"])
        if own.classes != other.classes:
            raise ValueError(
                f"{self.other} has other classes than {self.tokens}: tokenize the same kind of images"
            )
        model = load_any_order(self.model)
        found = {name: self._nll(model, tokens) for name, tokens in (("own", own), ("other", other))}
        write_json(artifact.folder / "metrics.json", found)
        figures.save_image(self._picture(model, other), artifact.folder / "grid.png")
        return {
            "examples": self.n,
            "grids": {
                name: [tokens.grid.h, tokens.grid.w] for name, tokens in (("own", own), ("other", other))
            },
            "next_position": read_manifest(self.model)["config"].get("model", {}).get("next_position"),
            "metrics": found,
            "policy": self.policy.label,
            "device": str(device()),
        }

    def _nll(self, model: Any, tokens: TokenSet) -> dict[str, Any]:
        """Exact negative log-likelihood in random orders, nats per token: mean, deviation, each seed."""
        rows = evenly_spaced(self.n, len(tokens))
        values = []
        for seed in self.seeds:
            generator, total = torch.Generator().manual_seed(seed), 0.0
            for some in tqdm(list(batches(rows, self.batch_size)), desc=f"{tokens.grid.h} x {tokens.grid.w}"):
                batch, labels = (x.to(device()) for x in tokens.batch(some))
                order = random_orders(len(some), tokens.grid, generator).to(device())
                condition = as_condition(model, tokens, labels)
                with torch.no_grad():
                    nll = token_nll(model, batch, condition, order, tokens.grid)
                total += float(nll.double().mean(1).sum())
            values.append(total / len(rows))
        return {"mean": mean(values), "std": stdev(values) if len(values) > 1 else None, "seeds": values}

    def _picture(self, model: Any, tokens: TokenSet) -> Any:
        tokenizer = load_tokenizer(self.tokenizer)
        rows = evenly_spaced(self.samples, len(tokens))
        true, _ = tokens.batch(rows)
        streams = Streams(range(len(rows)), device())
        classes = max(1, len(tokens.classes))
        labels = torch.arange(len(rows), device=device()) % classes
        drawer: AnyOrderModel = Guided(model, self.guidance) if self.guidance.scale != 1 else model
        made = sample(
            drawer,
            self.policy.build(tokens.grid, streams),
            streams,
            condition=as_condition(model, tokens, labels),
            grid=tokens.grid,
            sampling=self.sampling,
        )
        pictures = [to_uint8(tokenizer.decode(x.to(device()), tokens.grid)) for x in (true, made.tokens)]
        return figures.image_grid(np.concatenate(pictures), columns=min(8, len(rows)), scale=2)
