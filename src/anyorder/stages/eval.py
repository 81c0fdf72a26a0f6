"""The stage that compares generated images with real ones."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from tqdm import tqdm

from anyorder.data import caches
from anyorder.data import rows as select
from anyorder.data.captions import index_of
from anyorder.data.images import uint8_batches
from anyorder.data.sunsets import causes_of
from anyorder.evaluation import classes, memorization, metrics
from anyorder.evaluation.features import ClassifierFeatures
from anyorder.files import load_array, read_manifest, write_json
from anyorder.inference.device import device
from anyorder.inference.weights import load_any_order
from anyorder.method.decoding import extract_orders
from anyorder.method.loss import image_nll
from anyorder.method.policy_config import PolicyConfig
from anyorder.method.sampling import Streams
from anyorder.settings import parse, read_stored
from anyorder.stages import common
from anyorder.stages import features as spaces
from anyorder.stages.artifacts import Artifact

BY_EXTRACTION = PolicyConfig("token_likelihood", location=1.0)
"""The order of a likelihood bound: greedily the most likely under the location head and the tokens."""


@dataclass
class EvalStage:
    """Measure samples against the test split, and the model's likelihood under the same order policy.

    The manifests of `samples` and `features` say which model, data and orders these were made with.
    """

    inputs: ClassVar[tuple[str, ...]] = (
        "samples", "model", "features", "data", "tokens", "scorer", "orders", "attribute_features"
    )  # fmt: skip
    provenance: ClassVar[dict[str, tuple[str, str]]] = {
        "data": ("features", "data"),
        **{role: ("samples", role) for role in ("model", "tokens", "scorer", "orders")},
    }
    required: ClassVar[tuple[str, ...]] = ("model", "data", "tokens")
    samples: Path
    """Artifact of the sample stage."""
    features: Path
    """Artifact of the features stage: the feature space of the distances."""
    model: Path | None = None
    """Where the model of the samples is, if it was moved."""
    data: Path | None = None
    """Where the images behind the features are, if they were moved."""
    tokens: Path | None = None
    """Where the token cache of the samples is, if it was moved."""
    scorer: Path | None = None
    """Where the scoring model of the samples is, if it was moved."""
    orders: Path | None = None
    """Where the order cache of the samples is, if it was moved."""
    attribute_features: Path | None = None
    """Features whose classifier learnt an attribute (features label=...): measures whether samples have the
    attribute that was asked for."""
    nll_images: int = 1000
    """Test images for the likelihood; 0 leaves it out."""
    batch_size: int = 64
    """Test images whose orders are inferred at once."""
    kid_subset_size: int = 1000
    """Images in each of KID's subsets."""

    def run(self, artifact: Artifact) -> dict[str, Any]:
        """Write `metrics.json`, and `samples.safetensors`: features and logits of the samples."""
        assert self.model
        assert self.data
        assert self.tokens
        for role in ("model", "tokens", "scorer", "orders"):
            common.require_made_from(self.samples, role, getattr(self, role))
        for folder in (self.tokens, self.features):
            common.require_made_from(folder, "data", self.data)
        made = read_manifest(self.samples)
        if made["config"].get("prompts"):
            raise ValueError(f"{self.samples} was made for prompts: evaluate samples without prompts=")
        extractor, reference = spaces.load_extractor(self.features), spaces.load_reference(self.features)
        images, source = load_array(self.samples / "images.npy"), artifact.identity["inputs"]["samples"]
        generated = metrics.statistics(extractor, uint8_batches(images), source, "generated images")
        generated.save(artifact.folder / common.SAMPLES)
        found = metrics.evaluate(extractor, reference, generated, self.kid_subset_size)
        found |= {
            "policy": made["policy"],
            "scorer": self.scorer.name if self.scorer else None,
            "token_blind": made["token_blind"],
            "training_tokens": common.trained_before(self.model)["training_tokens"],
            **self._likelihood(made),
            **self._memorization(extractor, reference, generated),
            **self._attribute_agreement(images),
        }
        if isinstance(extractor, ClassifierFeatures):
            labels = torch.from_numpy(np.array(load_array(self.samples / "labels.npy")))
            found |= classes.class_agreement(reference.logits, generated.logits, labels)._asdict()
        if read_manifest(self.data)["config"]["source"] == "sunsets":
            found["consistency"] = causes_of(np.array(images)).shares()["consistency"]
        write_json(artifact.folder / "metrics.json", found)
        times = {
            "seconds_per_image": made["seconds_per_image"],
            "training_seconds": common.trained_before(self.model)["training_seconds"],
        }  # in the manifest alone: equal samples give equal files
        return {"examples": len(images), "metrics": found | times, "device": str(device())}

    def _attribute_agreement(self, images: np.ndarray) -> dict[str, Any]:
        """Share of samples that an attribute's classifier assigns to the value that was asked for.

        Beside it the same share of test images and their own values: what the classifier allows.
        """
        if self.attribute_features is None:
            return {}
        common.require_made_from(self.attribute_features, "data", self.data)
        test = caches.TokenSet(self.tokens, "test")  # type: ignore[arg-type]
        name = read_manifest(self.attribute_features)["config"].get("label") or "of the class"
        column = index_of(name, list(test.attributes), "attribute")
        extractor = spaces.load_extractor(self.attribute_features)
        reference = spaces.load_reference(self.attribute_features)
        logits = torch.cat([extractor(batch)[1].cpu() for batch in uint8_batches(images)])
        asked = torch.from_numpy(np.array(load_array(self.samples / "condition.npy")[:, 1 + column]))
        true = torch.from_numpy(test.further[:, column].astype(np.int64))
        return {
            "attribute": name,
            f"agreement_{name}": classes.agreement(logits, asked),
            f"agreement_{name}_of_test": classes.agreement(reference.logits, true),
        }

    def _memorization(
        self, extractor: Any, test: metrics.FeatureStatistics, generated: metrics.FeatureStatistics
    ) -> dict[str, float]:
        """Whether samples are nearer to training images than test images are, or equal their tokens."""
        training = spaces.training_features(self.features, extractor, caches.ImageSet(self.data)).features  # type: ignore[arg-type]
        distances = (memorization.nearest_distance(x.features, training) for x in (generated, test))
        known, unseen = (caches.TokenSet(self.tokens, split).tokens for split in ("train", "test"))  # type: ignore[arg-type]
        tokens = load_array(self.samples / "tokens.npy")
        return {
            **memorization.closeness(*distances)._asdict(),
            "token_copies": memorization.copied_share(tokens, known),
            "token_copies_of_test": memorization.copied_share(unseen, known),
        }

    def _likelihood(self, made: dict[str, Any]) -> dict[str, Any]:
        """Cross-entropy of test images under the order policy of the samples, nats per token.

        `nll`: token-blind policies without location noise, and fixed and random orders. p(x) is then a
        product of the model's conditionals along an order that the image determines: exact. Random orders
        (`nll_is_bound`): exact for the order, and an upper bound on -log p(x) of the samples' density, a
        mixture over orders. Tokens generated in parallel are conditioned on earlier steps only.
        `bound` = `bound_tokens` + `bound_location`: samples of a location head. -log q(order, x) of one order
        is an upper bound on -log p(x); the order is the greedy maximum of q. None where the locations are
        sampled at another temperature or by another model.
        """
        policy = parse(PolicyConfig, read_stored(PolicyConfig, made["config"]["policy"]))
        exact = policy.token_blind and (policy.deterministic or policy.order == "random")
        located = policy.order == "location" and policy.temperature in (None, 1) and self.scorer is None
        located = located and not policy.parallel
        if not self.nll_images or not (exact or located):
            return {"nll": None, "bits_per_dim": None}
        test, model = caches.TokenSet(self.tokens, "test"), load_any_order(self.model)  # type: ignore[arg-type]
        scorer = load_any_order(self.scorer) if self.scorer else None
        cache = caches.OrderSet(self.orders) if self.orders else None
        values: dict[str, list[torch.Tensor]] = {}
        rows = select.evenly_spaced(self.nll_images, len(test))
        for some in tqdm(list(select.batches(rows, self.batch_size)), desc="likelihood", unit="batch"):
            tokens, labels = test.batch(some)
            labels = test.without(labels, made["config"].get("hide", ()))
            condition = common.as_condition(model, test, labels.to(device()))
            of_class = cache.of_classes(labels).to(device()) if cache else None
            streams, tokens = Streams(some.tolist(), device()), tokens.to(device())
            order = (policy if exact else BY_EXTRACTION).build(test.grid, streams, of_class)
            found = extract_orders(
                model, tokens, order, streams, condition=condition, grid=test.grid, scorer=scorer
            )
            if policy.parallel:
                each = {"nll": -found.log_prob.double().mean(1)}
            else:
                each = image_nll(model, tokens, condition, found.order, test.grid, location=not exact)
            for name, value in each.items():
                values.setdefault(name, []).append(value)
        means = {name: float(torch.cat(value).mean()) for name, value in values.items()}
        h, w = read_manifest(self.tokens)["image_size"]  # type: ignore[arg-type]
        bits = metrics.bits_per_dim(means.get("bound", means["nll"]), test.grid.n, 3 * h * w)
        shared = {"bits_per_dim": bits, "nll_images": len(rows)}
        if exact:
            return {"nll": means["nll"], "nll_is_bound": policy.order == "random", **shared}
        content, bound = means["nll"], means["bound"]
        parts = {"bound": bound, "bound_tokens": content, "bound_location": bound - content}
        return {"nll": None, **parts, **shared}
