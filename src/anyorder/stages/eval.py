"""The stage that compares generated images with real ones."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from tqdm import tqdm

from anyorder.data.caches import ImageSet, OrderSet, TokenSet
from anyorder.data.captions import index_of
from anyorder.data.images import uint8_batches
from anyorder.data.rows import batches, evenly_spaced
from anyorder.data.sunsets import consistency
from anyorder.evaluation import metrics
from anyorder.evaluation.classes import agreement, class_agreement
from anyorder.evaluation.features import ClassifierFeatures
from anyorder.evaluation.memorization import closeness, copied_share, nearest_distance
from anyorder.files import load_array, read_manifest, write_json
from anyorder.inference.device import device
from anyorder.inference.weights import load_any_order
from anyorder.method.decoding import extract_orders
from anyorder.method.loss import joint_nll
from anyorder.method.policy_config import PolicyConfig
from anyorder.method.sampling import Streams
from anyorder.settings import parse, read_stored
from anyorder.stages.artifacts import Artifact
from anyorder.stages.common import as_condition, require_made_from, trained_before
from anyorder.stages.features import load_extractor, training_features
from anyorder.stages.sample import SAMPLES


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
        policy = parse(PolicyConfig, read_stored(PolicyConfig, made["config"]["policy"]))
        exact = policy.token_blind and (policy.deterministic or policy.order == "random")
        located = policy.order == "location" and policy.temperature in (None, 1) and self.scorer is None
        located = located and not policy.parallel
        if not self.nll_images or not (exact or located):
            return {"nll": None, "bits_per_dim": None}
        test, model = TokenSet(self.tokens, "test"), load_any_order(self.model)
        scorer = load_any_order(self.scorer) if self.scorer else None
        class_orders = OrderSet(self.orders).of_classes if self.orders else None
        some, total = evenly_spaced(self.nll_images, len(test)), torch.zeros(2, dtype=torch.float64)
        hidden = made["config"].get("hide", ())
        policy = policy if exact else PolicyConfig("token_likelihood", location=1.0)
        for rows in tqdm(list(batches(some, self.batch_size)), desc="likelihood", unit="batch"):
            batch, labels = (x.to(device()) for x in test.batch(rows))
            labels = test.without(labels, hidden)
            streams = Streams(rows.tolist(), device())
            order = policy.build(test.grid, streams, class_orders and class_orders(labels).to(device()))
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
