"""The stage that extracts an order for each image from the model's own confidence (OAR v1, Sec. 3)."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from tqdm import tqdm

from anyorder.artifacts import Artifact, RowWriter, load_array, read_manifest, save_array
from anyorder.contracts import AnyOrderNetwork
from anyorder.data.caches import TokenSet
from anyorder.data.sunsets import sun_first
from anyorder.decode import extract_orders
from anyorder.evaluation import figures
from anyorder.logits import Streams
from anyorder.orders import inverse, kendall, mean_jump, position_entropy, static_order
from anyorder.policies import INFERRED, PolicyConfig
from anyorder.runs.common import (
    as_condition,
    device,
    load_any_order,
    require_made_from,
    require_trained_on,
    slices,
    spread,
    trained_before,
)
from anyorder.runs.precision import fast_dtype


@dataclass
class OrdersStage:
    """Extract the order in which the model itself would reveal each training image."""

    inputs: ClassVar[tuple[str, ...]] = ("model", "tokens", "data")
    model: Path
    tokens: Path
    data: Path | None = None
    """The sunsets behind the tokens: to tell how often the sun is drawn before the clouds that it colours."""
    policy: PolicyConfig = field(default_factory=PolicyConfig)
    """An inferred order, or the location head's; entropy by default, token_likelihood is the paper's."""
    limit: int | None = None
    """Only the first images of the training split."""
    test_limit: int = 512
    """Images of the test split, for likelihoods under the same policy."""
    batch_size: int = 64
    """Images per call; memory grows with batch_size * N * depth * width."""
    bf16: bool = True
    """Score in bfloat16, where the hardware has it."""
    seed: int = 0
    """Of the location temperature."""

    def __post_init__(self) -> None:
        if self.policy.order not in (*INFERRED, "location"):
            allowed = ", ".join((*INFERRED, "location"))
            raise ValueError(f"policy.order must be one of {allowed} to extract, got '{self.policy.order}'")
        if self.test_limit < 1:
            raise ValueError(f"test_limit must be >= 1, got {self.test_limit}")

    def run(self, artifact: Artifact) -> dict[str, Any]:
        """Write `{train,test}.{order,log_prob,seconds}.npy`, `class_order.npy` and statistics of orders."""
        tokens, test = TokenSet(self.tokens), TokenSet(self.tokens, "test")
        require_trained_on(self.model, tokens)
        n = min(self.limit or len(tokens), len(tokens))
        model = load_any_order(self.model).to(fast_dtype(device(), self.bf16))
        self._extract(artifact, model, tokens, np.arange(n))
        self._extract(artifact, model, test, spread(self.test_limit, len(test)))
        orders = torch.from_numpy(load_array(artifact.folder / "train.order.npy").astype(np.int64))
        labels = np.array(tokens.labels[:n])
        classes = tokens.classes or ["all"]
        save_array(artifact.folder / "class_order.npy", class_orders(orders.numpy(), labels, len(classes)))
        maps = figures.mean_rank_per_class(orders.numpy(), labels, classes, tokens.grid)
        figures.save_image(maps, artifact.folder / "mean_rank.png")
        known = {} if self.data is None else {"sun_first": self._sun_first(orders, tokens)}
        raster = static_order("raster", tokens.grid)
        return {
            "rows": n,
            "examples": n,
            "seconds": float(load_array(artifact.folder / "train.seconds.npy").sum()),
            "tokens": artifact.identity["inputs"]["tokens"],
            "scorer": trained_before(self.model),
            "policy": self.policy.label,
            "token_blind": self.policy.token_blind,
            "extraction_evaluations": n * self.policy.evaluations(tokens.grid.n),
            "mean_log_prob": float(load_array(artifact.folder / "train.log_prob.npy").mean()),
            "kendall_with_raster": float(kendall(orders[:2000], raster).mean()),
            "mean_jump": mean_jump(orders, tokens.grid),
            "position_entropy": [round(h, 4) for h in position_entropy(orders).tolist()],
            "device": str(device()),
            **known,
        }

    def _sun_first(self, orders: torch.Tensor, tokens: TokenSet) -> float:
        assert self.data is not None
        require_made_from(self.tokens, "data", self.data)
        if "causes" not in read_manifest(self.data):
            raise ValueError(f"{self.data} holds no sunsets: leave data out, it is only for their causes")
        causes = np.array(load_array(self.data / "train.causes.npy")[: len(orders)])
        size = read_manifest(self.tokens)["image_size"]
        return sun_first(orders.numpy(), causes, tokens.grid, (size[0], size[1]))

    def _extract(
        self, artifact: Artifact, model: AnyOrderNetwork, tokens: TokenSet, images: np.ndarray
    ) -> None:
        """Go through the images; a killed run goes on after its last batch."""
        names = [f"{tokens.split}.{what}" for what in ("order", "log_prob", "seconds")]
        widths = ((tokens.grid.n,), np.uint16), ((tokens.grid.n,), np.float32), ((), np.float32)
        rows = RowWriter(artifact.folder, dict(zip(names, widths, strict=True)))
        with tqdm(total=len(images), initial=rows.rows, desc=f"{tokens.split} orders", unit="image") as bar:
            for some in slices(len(images), self.batch_size, rows.rows):
                begin = time.perf_counter()
                batch, labels = (x.to(device()) for x in tokens.batch(images[some]))
                streams = Streams([self.seed + int(row) for row in images[some]], device())
                policy = self.policy.build(tokens.grid, streams)
                found = extract_orders(
                    model, batch, policy, streams,
                    condition=as_condition(model, tokens, labels), grid=tokens.grid,
                )  # fmt: skip
                seconds = np.full(len(some), (time.perf_counter() - begin) / len(some))
                values = (found.order.cpu().numpy(), found.log_prob.float().cpu().numpy(), seconds)
                rows.append(**dict(zip(names, values, strict=True)))
                bar.update(len(some))
        rows.close()


def class_orders(orders: np.ndarray, labels: np.ndarray, classes: int) -> np.ndarray:
    """One order for each class: positions by their mean rank over its images, ties in raster order.

    Args:
        orders: (n, N) int64.
        labels: (n,) int64 in [0, classes).
        classes: how many; a class without images gets the order of all images.

    Returns:
        (classes, N) uint16.
    """
    rank = inverse(torch.from_numpy(orders)).double()
    members = [torch.from_numpy(labels == c) for c in range(classes)]
    means = torch.stack([(rank[some] if some.any() else rank).mean(0) for some in members])
    return means.argsort(dim=1, stable=True).numpy().astype(np.uint16)
