"""Stages that show what a model is worth: sample from it, and measure the samples."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from anyorder.artifacts import Artifact, RowWriter, load_array, read_manifest, write_json
from anyorder.contracts import AnyOrderModel, class_labels
from anyorder.data.caches import ImageSet, OrderSet, TokenSet, check_tokenizer
from anyorder.data.sunsets import consistency
from anyorder.data.text import index_of
from anyorder.decode import extract_orders, sample
from anyorder.evaluation import figures, metrics
from anyorder.evaluation.classes import agreement, class_agreement
from anyorder.evaluation.features import ClassifierFeatures
from anyorder.evaluation.memorisation import closeness, copied_share, nearest_distance
from anyorder.guidance import GuidanceConfig, Guided
from anyorder.likelihood import joint_nll
from anyorder.logits import Sampling, Streams
from anyorder.models.compiled import compile_decoding
from anyorder.policies import PolicyConfig
from anyorder.runs.common import (
    SHOWN,
    as_condition,
    batches,
    device,
    load_any_order,
    load_tokenizer,
    require_made_from,
    require_trained_on,
    slices,
    spread,
    to_uint8,
    trained_before,
    uint8_batches,
)
from anyorder.runs.precision import fast_dtype
from anyorder.runs.prepare import load_extractor, training_features

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
        figures.drawing_pictures(artifact.folder, images, orders, tokens.grid)


@dataclass
class EvalStage:
    """Measure samples against the test split, and the model's likelihood under the same policy."""

    inputs: ClassVar[tuple[str, ...]] = (
        "samples", "model", "features", "data", "tokens", "scorer", "orders", "attribute_features"
    )  # fmt: skip
    samples: Path
    model: Path
    features: Path
    data: Path
    tokens: Path
    scorer: Path | None = None
    """The scorer that the samples were drawn with, if any."""
    orders: Path | None = None
    """The order cache that the samples were drawn with, if any."""
    attribute_features: Path | None = None
    """Features whose classifier learnt an attribute (features label=...): have samples what was asked for?"""
    nll_images: int = 1000
    """Test images for the likelihood; 0 leaves it out."""
    batch_size: int = 64
    """Test images per call."""
    kid_subset_size: int = 1000
    """Images in each of KID's subsets."""

    def run(self, artifact: Artifact) -> dict[str, Any]:
        """Write `metrics.json`, and `samples.safetensors`: features and logits of the samples."""
        for folder, role in ((self.samples, "model"), (self.samples, "tokens"), (self.tokens, "data")):
            require_made_from(folder, role, getattr(self, role))
        require_made_from(self.features, "data", self.data)
        for role in ("scorer", "orders"):
            require_made_from(self.samples, role, getattr(self, role))
        if read_manifest(self.samples)["config"].get("prompts"):
            raise ValueError(f"{self.samples} was drawn for prompts: evaluate samples without prompts=")
        extractor = load_extractor(self.features)
        reference = metrics.FeatureStatistics.load(
            self.features / "reference.safetensors", extractor.name, artifact.identity["inputs"]["data"]
        )
        images, source = load_array(self.samples / "images.npy"), artifact.identity["inputs"]["samples"]
        drawn = metrics.statistics(extractor, uint8_batches(images), source, "generated images")
        drawn.save(artifact.folder / SAMPLES)
        found = metrics.evaluate(extractor, reference, drawn, self.kid_subset_size)
        made = read_manifest(self.samples)
        found |= {
            "policy": made["policy"],
            "scorer": self.scorer.name if self.scorer else None,
            "token_blind": made["token_blind"],
            "seconds_per_image": made["seconds_per_image"],
            **trained_before(self.model),
            **self._likelihood(made),
            **self._memorisation(extractor, reference, drawn),
            **self._agreement(images),
        }
        if isinstance(extractor, ClassifierFeatures):
            labels = torch.from_numpy(np.array(load_array(self.samples / "labels.npy")))
            found |= class_agreement(reference.logits, drawn.logits, labels)._asdict()
        if read_manifest(self.data)["config"]["source"] == "sunsets":
            found["consistency"] = consistency(np.array(images))
        write_json(artifact.folder / "metrics.json", found)
        return {"examples": len(images), "metrics": found, "device": str(device())}

    def _agreement(self, images: np.ndarray) -> dict[str, Any]:
        """Share of samples that an attribute's classifier assigns to the value that was asked for.

        Beside it the same share of test images and their own values: what the classifier allows.
        """
        if self.attribute_features is None:
            return {}
        require_made_from(self.attribute_features, "data", self.data)
        made, test = read_manifest(self.attribute_features), TokenSet(self.tokens, "test")
        name = made["config"].get("label") or "of the class"
        column = index_of(name, list(test.attributes), "attribute")
        extractor = load_extractor(self.attribute_features)
        reference = metrics.FeatureStatistics.load(
            self.attribute_features / "reference.safetensors", extractor.name, made["inputs"]["data"]
        )
        logits = torch.cat([extractor(batch)[1].cpu() for batch in uint8_batches(images)])
        asked = torch.from_numpy(np.array(load_array(self.samples / "condition.npy")[:, 1 + column]))
        own = torch.from_numpy(test.further[:, column].astype(np.int64))
        return {
            "attribute": name,
            f"agreement_{name}": agreement(logits, asked),
            f"agreement_{name}_of_test": agreement(reference.logits, own),
        }

    def _memorisation(
        self, extractor: Any, test: metrics.FeatureStatistics, drawn: metrics.FeatureStatistics
    ) -> dict[str, float]:
        """Are samples nearer to training images than test images are, or their very tokens?"""
        training = training_features(self.features, extractor, ImageSet(self.data)).features
        of_samples, of_test = (nearest_distance(some.features, training) for some in (drawn, test))
        known, unseen = (TokenSet(self.tokens, split).tokens for split in ("train", "test"))
        return {
            **closeness(of_samples, of_test)._asdict(),
            "token_copies": copied_share(load_array(self.samples / "tokens.npy"), known),
            "token_copies_of_test": copied_share(unseen, known),
        }

    def _likelihood(self, made: dict[str, Any]) -> dict[str, Any]:
        """What test images cost under the policy that the samples were drawn with, nats per token.

        `nll`, exact: token-blind policies without location noise, and fixed and random orders. p(x) is then a
        product of the model's conditionals along an order that the image determines, or that ignores it;
        tokens that are drawn in parallel are conditioned on those of the steps before only.
        `bound` = `bound_tokens` + `bound_location`: samples of a location head. -log q(order, x) of one order
        is an upper bound on -log p(x); the order is the greedy maximum of q. None where the locations are
        drawn at another temperature or by another model.
        """
        policy = PolicyConfig(**made["config"]["policy"])
        exact = policy.token_blind and (policy.deterministic or policy.order == "random")
        located = policy.order == "location" and policy.temperature in (None, 1) and self.scorer is None
        located = located and not policy.parallel
        if not self.nll_images or not (exact or located):
            return {"nll": None, "bits_per_dim": None}
        test, model = TokenSet(self.tokens, "test"), load_any_order(self.model)
        scorer = load_any_order(self.scorer) if self.scorer else None
        own = _of_classes(self.orders)
        some, total = spread(self.nll_images, len(test)), torch.zeros(2, dtype=torch.float64)
        hidden = made["config"].get("hide", ())
        policy = policy if exact else PolicyConfig("token_likelihood", location=1.0)
        for rows in tqdm(list(batches(some, self.batch_size)), desc="likelihood", unit="batch"):
            batch, labels = (x.to(device()) for x in test.batch(rows))
            labels = test.without(labels, hidden)
            streams = Streams(rows.tolist(), device())
            order = policy.build(test.grid, streams, own(labels))
            found = extract_orders(
                model, batch, order, streams,
                condition=as_condition(model, test, labels), grid=test.grid, scorer=scorer,
            )  # fmt: skip
            parts = [-found.log_prob]
            if not exact:
                with torch.no_grad():
                    parts = list(joint_nll(model, batch, labels, found.order))  # type: ignore[arg-type]
            total[: len(parts)] += torch.stack([part.double().mean(1).sum().cpu() for part in parts])
        h, w = read_manifest(self.tokens)["image_size"]
        content, where = (total / len(some)).tolist()
        bits = metrics.bits_per_dim(content + where, test.grid.n, 3 * h * w)
        if exact:
            return {"nll": content, "bits_per_dim": bits, "nll_images": len(some)}
        bound = {"bound": content + where, "bound_tokens": content, "bound_location": where}
        return {"nll": None, "bits_per_dim": bits, **bound, "nll_images": len(some)}


def _of_classes(orders: Path | None) -> Callable[[Tensor], Tensor | None]:
    """Labels (B,) to the orders (B, N) of their classes, or to None where no order cache is given."""
    if orders is None:
        return lambda labels: None
    cache = OrderSet(orders)
    return lambda labels: cache.of_classes(labels).to(labels.device)
