"""The stage that extracts an order for each image from the model's own confidence (OAR v1, Sec. 3)."""

import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch

from anyorder import files
from anyorder import orders as stats
from anyorder.contracts import AnyOrderNetwork, at_least, require
from anyorder.data import caches
from anyorder.data.rows import evenly_spaced
from anyorder.data.sunsets import sun_first
from anyorder.inference import figures, processes
from anyorder.inference.device import device, fast_dtype, images_at_once
from anyorder.inference.weights import load_any_order
from anyorder.method.decoding import extract_orders
from anyorder.method.policy_config import INFERRED, PolicyConfig
from anyorder.method.sampling import Streams
from anyorder.models.compiled import compile_decoding
from anyorder.stages import common
from anyorder.stages.artifacts import Artifact


@dataclass
class OrdersStage:
    """Extract the order in which the model itself would reveal each training image."""

    together: ClassVar[bool] = True
    inputs: ClassVar[tuple[str, ...]] = ("model", "tokens", "data", "orders")
    removed: ClassVar[dict[str, Any]] = {"shards": 1}
    model: Path
    """Model that scores: trained on random orders, or converted."""
    tokens: Path
    """Token cache that the model was trained on."""
    data: Path | None = None
    """The sunsets behind the tokens: measures how often the sun comes before the clouds it colours."""
    orders: Path | None = None
    """Order cache with an order for each class, for policy.class_weight."""
    policy: PolicyConfig = field(default_factory=PolicyConfig)
    """An inferred order, or location; entropy by default, token_likelihood is the paper's."""
    limit: int | None = None
    """So many training images, evenly spread over all, and no more held-out ones; null takes all."""
    test_limit: int = 512
    """Test images, and validation images, whose orders are extracted, too, for likelihoods under the same
    policy; at least 1."""
    batch_size: int | None = None
    """Images at once; null takes what fits into half of the free memory, at most 64 (CPU) or 1024 (GPU), and
    keeps to it when the work goes on. Orders depend on it up to rounding: the manifest records it."""
    bf16: bool = False
    """Score in bfloat16 where the hardware has it: faster, but it gives other orders (Kendall's tau with
    those of float32: 0.72 for margin, 0.91 for max_prob, 0.96 for entropy)."""
    compile: bool | None = None
    """Score through compiled code (CUDA graphs on a GPU): takes minutes at first, does not pay on a CPU, and
    is not for converted models. null does so on a GPU for 1024 images or more."""
    seed: int = 0
    """Seed of the noise of policy.temperature, image by image."""

    def __post_init__(self) -> None:
        names = f"{', '.join(INFERRED)}, location or an own one that a model decides"
        listed = f"policy.order must be one of {names} to extract, got '{self.policy.order}'"
        require(self.policy.decided, listed)
        unknown = "policy.entropy_limit is for generating: extraction counts its evaluations; leave it out"
        require(not self.policy.adaptive, unknown)
        text = "orders=FOLDER goes with policy.class_weight > 0: give both or neither"
        require(self.policy.by_class == (self.orders is not None), text)
        at_least(1, self, "test_limit", "batch_size", "limit")
        self.test_limit = min(self.test_limit, self.limit or self.test_limit)
        text = f"seed={self.seed} is for orders with noise: give policy.temperature, or leave it out"
        require(self.seed == 0 or not self.policy.deterministic, text)

    @property
    def aside(self) -> tuple[str, ...]:
        """Settings that do not change what the stage writes."""
        return ("batch_size", "compile", *(("seed",) if self.policy.deterministic else ()))

    def run(self, artifact: Artifact) -> dict[str, Any]:
        """Write `SPLIT.{order,log_prob,seconds}.npy`, `class_order.npy` and statistics of orders."""
        tokens, *others = (caches.TokenSet(self.tokens, split) for split in caches.splits(self.tokens))
        common.require_trained_on(self.model, tokens)
        n = min(self.limit or len(tokens), len(tokens))
        model = load_any_order(self.model).to(fast_dtype(device(), self.bf16))
        compile_decoding(model, self.compile, n)
        sizes = self._batch_sizes(artifact.folder / "batch_size.txt", model, tokens)
        rows = evenly_spaced(n, len(tokens))  # folders come class by class
        self._extract(artifact.folder, model, tokens, rows, sizes[-1])
        for held in others:
            self._extract(artifact.folder, model, held, evenly_spaced(self.test_limit, len(held)), sizes[-1])
        if not artifact.leads:
            return {}
        written = [files.load_array(artifact.folder / f"{name}.npy") for name in _arrays(tokens)]
        orders, labels, classes = written[0].astype(np.int64), tokens.labels[rows], tokens.classes or ["all"]
        files.save_array(artifact.folder / "class_order.npy", class_orders(orders, labels, len(classes)))
        files.save_array(artifact.folder / "train.row.npy", rows)
        maps = figures.mean_rank_per_class(orders, labels, classes, tokens.grid)
        figures.save_image(maps, artifact.folder / "mean_rank.png")
        return {
            "rows": n,
            "examples": n,
            "batch_sizes": sizes,
            "seconds": float(written[2].sum()),
            "tokens": artifact.identity["inputs"]["tokens"],
            "scorer": common.trained_before(self.model),
            "policy": self.policy.label,
            "token_blind": self.policy.token_blind,
            "extraction_evaluations": n * self.policy.evaluations(tokens.grid.n),
            "mean_log_prob": float(written[1].mean()),
            **self._statistics(torch.from_numpy(orders), rows, tokens),
        }

    def _statistics(self, orders: torch.Tensor, rows: np.ndarray, tokens: caches.TokenSet) -> dict[str, Any]:
        """How far orders (n, N) agree with raster order and with one another, and what they reveal first."""
        raster = stats.static_order("raster", tokens.grid)
        found: dict[str, Any] = {
            "kendall_with_raster": float(stats.kendall(orders[:2000], raster).mean()),
            "mean_jump": stats.mean_jump(orders, tokens.grid),
            "position_entropy": [round(h, 4) for h in stats.position_entropy(orders).tolist()],
        }
        if self.data is None:
            return found
        common.require_made_from(self.tokens, "data", self.data)
        sunsets = "causes" in files.read_manifest(self.data)
        require(sunsets, f"{self.data} holds no sunsets: leave data out, it is only for their causes")
        causes = files.load_array(self.data / "train.causes.npy")
        h, w = files.read_manifest(self.tokens)["image_size"]
        some = rows < len(causes)  # mirrored copies are behind
        causes, own = np.array(causes[rows[some]]), orders.numpy()[some]
        return found | {"sun_first": sun_first(own, causes, tokens.grid, (h, w))}

    def _batch_sizes(self, note: Path, model: AnyOrderNetwork, tokens: caches.TokenSet) -> list[int]:
        """All batch sizes that the work was done with, the one to go on with last; kept in the file `note`.

        A run goes on with the size it began with, whatever memory is free by then, unless another one is
        asked for: the last bits of ratings, and with them ties between positions, depend on it.
        """
        before = [int(size) for size in note.read_text().split()] if note.is_file() else []
        last = before[-1] if before else 0
        size = processes.told(self.batch_size or last or images_at_once(model, tokens.grid))
        sizes = before if before[-1:] == [size] else [*before, size]
        if processes.leads():
            files.write_text(note, "\n".join(map(str, sizes)))
        return sizes

    def _extract(
        self, folder: Path, model: AnyOrderNetwork, tokens: caches.TokenSet, images: np.ndarray, size: int
    ) -> None:
        """Extract the orders of some images, `size` at once; a killed run resumes after its last batch."""
        cache = caches.OrderSet(self.orders) if self.orders else None
        rows = common.Rows(folder, _arrays(tokens), len(images), size, f"{tokens.split} orders")
        for some in rows:
            begin = time.perf_counter()
            batch, labels = (x.to(device()) for x in tokens.batch(images[some]))
            streams = Streams([self.seed + int(row) for row in images[some]], device())
            policy = self.policy.build(tokens.grid, streams, cache.of_classes(labels) if cache else None)
            found = extract_orders(
                model, batch, policy, streams,
                condition=common.as_condition(model, tokens, labels), grid=tokens.grid,
            )  # fmt: skip
            seconds = np.full(len(some), (time.perf_counter() - begin) / len(some))
            values = (found.order.cpu().numpy(), found.log_prob.float().cpu().numpy(), seconds)
            rows.append(**dict(zip(rows.specs, values, strict=True)))


def _arrays(tokens: caches.TokenSet) -> dict[str, tuple[tuple[int, ...], type]]:
    """Arrays that are written of a split: name, shape of a row, and type."""
    n = tokens.grid.n
    each = {"order": ((n,), np.uint16), "log_prob": ((n,), np.float32), "seconds": ((), np.float32)}
    return {f"{tokens.split}.{what}": kind for what, kind in each.items()}


def class_orders(orders: np.ndarray, labels: np.ndarray, classes: int) -> np.ndarray:
    """One order for each class, (classes, N) uint16: positions by their mean rank, ties in raster order.

    Takes orders (n, N) int64 and labels (n,) in [0, classes); a class without images gets the mean of all.
    """
    rank = orders.argsort(axis=1)
    members = [labels == c for c in range(classes)]
    means = np.stack([(rank[some] if some.any() else rank).mean(0) for some in members])
    return means.argsort(axis=1, kind="stable").astype(np.uint16)
