"""The stage that compares generated images with real ones."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import torch

from anyorder import files
from anyorder.contracts import AnyOrderNetwork, require
from anyorder.data import caches
from anyorder.data import rows as select
from anyorder.data.classes import index_of
from anyorder.data.images import uint8_batches
from anyorder.data.sunsets import causes_of
from anyorder.evaluation import classes, memorization, metrics
from anyorder.inference import processes
from anyorder.inference.device import device
from anyorder.inference.weights import load_any_order
from anyorder.method.decoding import extract_orders
from anyorder.method.loss import image_nll
from anyorder.method.policy_config import PolicyConfig, stored_policy
from anyorder.method.sampling import Streams
from anyorder.stages import common, floors
from anyorder.stages import features as spaces
from anyorder.stages.artifacts import Artifact

BY_EXTRACTION = PolicyConfig("token_likelihood", location=1.0)
"""The order of a likelihood bound: greedily the most likely under the location head and the tokens."""


@dataclass
class EvalStage:
    """Measure samples against held-out images, and the model's likelihood under the same order policy.

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
    together: ClassVar[bool] = True
    references: ClassVar[tuple[str, ...]] = ("tokenizer",)
    aside: ClassVar[tuple[str, ...]] = ("tokenizer",)
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
    """Features of an attribute (features label=...): measures whether samples have the value asked for."""
    tokenizer: Path | None = None
    """Where the tokenizer of the tokens is, if it was moved; for the floor of reconstructions."""
    split: Literal["test", "validation"] | None = None
    """Images to compare with: validation while something is chosen, test once, at the end. Must be given
    where the data have a validation split; test elsewhere."""
    reference: Path | None = None
    """A reference .npz as ADM publishes them (mu and sigma, or images arr_0): measures FD to it, too."""
    rfd_images: int = 0
    """Images of the split that are compared with their own reconstructions: rFD, with extractor=inception the
    rFID of tables of tokenizers, which takes 50,000 images; 0 leaves it out."""
    nll_images: int = 1000
    """Held-out images for the likelihood; 0 leaves it out."""
    batch_size: int = 64
    """Held-out images whose orders are inferred at once."""
    kid_subset_size: int = 1000
    """Images in each of KID's subsets."""

    def __post_init__(self) -> None:
        least = {"nll_images": 0, "rfd_images": 0, "batch_size": 1, "kid_subset_size": 2}
        for name, limit in least.items():
            require(getattr(self, name) >= limit, f"{name} must be >= {limit}, got {getattr(self, name)}")
        require(self.rfd_images != 1, "rfd_images must be 0 or at least 2, for a covariance; got 1")

    def observed(self) -> dict[str, str]:
        """What the reference file holds now, as part of what identifies the artifact."""
        return {"reference_sha256": files.sha256(self.reference)} if self.reference else {}

    def run(self, artifact: Artifact) -> dict[str, Any]:
        """Write `metrics.json`, and `samples.safetensors`: features and logits of the samples."""
        assert self.model
        assert self.data
        assert self.tokens
        for role in ("model", "tokens", "scorer", "orders"):
            common.require_made_from(self.samples, role, getattr(self, role))
        for folder in (self.tokens, self.features):
            common.require_made_from(folder, "data", self.data)
        made = files.read_manifest(self.samples)
        prompts = f"{self.samples} was made for prompts: evaluate samples without prompts="
        require(not made["config"].get("prompts"), prompts)
        split = floors.reference_split(self.data, self.split)
        train, test = (caches.TokenSet(self.tokens, name) for name in ("train", split))
        extractor = spaces.load_extractor(self.features)
        reference = spaces.load_reference(self.features, split)
        images, source = files.load_array(self.samples / "images.npy"), artifact.identity["inputs"]["samples"]
        text = f"{self.samples} holds {len(images)} images: distances and recall need at least 4"
        require(len(images) >= 4, text)
        # What may refuse its input comes before hours of work.
        moments = spaces.reference_file(self.reference, extractor) if self.reference else None
        agreement = self._attribute_agreement(images, test)
        generated = spaces.statistics(extractor, images, np.arange(len(images)), source, "generated images")
        training = spaces.training_features(self.features, extractor, caches.ImageSet(self.data))
        pool = floors.floor_split(self.data, split)
        others = training if pool == "train" else spaces.load_reference(self.features, pool)
        real, photos = caches.TokenSet(self.tokens, pool), len(caches.ImageSet(self.data, pool))
        likelihood = self._likelihood(made, test)
        again = self.rfd_images and floors.reconstructions(
            self.tokenizer, extractor, test, reference, self.rfd_images
        )
        if not artifact.leads:
            return {}
        generated.save(artifact.folder / common.SAMPLES)
        gaps = (memorization.nearest_distance(x.features, training.features) for x in (generated, reference))
        tokens, before = files.load_array(self.samples / "tokens.npy"), common.trained_before(self.model)
        found = metrics.evaluate(extractor, reference, generated, self.kid_subset_size) | {
            "split": split,
            "floors": floors.floors(self.samples, self.tokenizer, extractor, reference, others, real, photos),
            "floor_split": pool,
            "policy": made["policy"],
            "scorer": self.scorer.name if self.scorer else None,
            "token_blind": made["token_blind"],
            "training_tokens": before["training_tokens"],
            **likelihood,
            **memorization.closeness(*gaps),
            "token_copies": memorization.copied_share(tokens, train.tokens),
            "token_copies_of_test": memorization.copied_share(test.tokens, train.tokens),
            **agreement,
        }
        found["notes"] += memorization.warnings(found, self.samples.name)
        if "steps_per_image" in made:  # samples of earlier versions do not say
            found["steps_per_image"] = made["steps_per_image"]
        if again:
            found["rfd"] = metrics.frechet_distance(*(some.gaussian for some in again))
        if moments is not None:
            found["fd_of_reference"] = metrics.frechet_distance(moments, generated.gaussian)
        of_classes = not files.read_manifest(self.features)["config"].get("label")  # not of an attribute
        if of_classes and isinstance(extractor, spaces.features.ClassifierFeatures):
            labels = torch.from_numpy(np.array(files.load_array(self.samples / "labels.npy")))
            found |= classes.class_agreement(reference.logits, generated.logits, labels)
        if files.read_manifest(self.data)["config"]["source"] == "sunsets":
            found["consistency"] = float(causes_of(np.array(images)).consistent.mean())
        files.write_json(artifact.folder / "metrics.json", found)
        # Times are in the manifest alone: equal samples give equal files.
        times = {"seconds_per_image": made["seconds_per_image"]} | before
        return {"examples": len(images), "metrics": found | times}

    def _attribute_agreement(self, images: np.ndarray, test: caches.TokenSet) -> dict[str, Any]:
        """Share of samples whose attribute, by its classifier, has the value that was asked for.

        Beside it the same share of test images and their values: what the classifier allows.
        """
        if self.attribute_features is None:
            return {}
        common.require_made_from(self.attribute_features, "data", self.data)
        name = files.read_manifest(self.attribute_features)["config"].get("label") or "of the class"
        column = index_of(name, list(test.attributes), "attribute")
        extractor = spaces.load_extractor(self.attribute_features)
        reference = spaces.load_reference(self.attribute_features, test.split)
        asked = torch.from_numpy(np.array(files.load_array(self.samples / "condition.npy")[:, 1 + column]))
        text = f"attribute_features: no image of {self.samples} was asked for a {name}: sample classes=test"
        require(bool((asked >= 0).any()), text)
        logits = torch.cat([extractor(batch)[1].cpu() for batch in uint8_batches(images)])
        true = torch.from_numpy(test.further[:, column].astype(np.int64))
        return {
            "attribute": name,
            f"agreement_{name}": classes.agreement(logits, asked),
            f"agreement_{name}_of_test": classes.agreement(reference.logits, true),
        }

    def _likelihood(self, made: dict[str, Any], test: caches.TokenSet) -> dict[str, Any]:
        """Cross-entropy of test images under the order policy of the samples, nats per token.

        `nll` is exact for fixed orders and token-blind policies without location noise: p(x) is a product of
        conditionals along an order that the image determines, where several are generated at once given
        earlier steps, and with groups the positions of their own. For random orders it bounds -log p(x), a
        mixture over orders (`nll_is_bound`). `bound` = `bound_tokens` + `bound_location` of a location head:
        -log q(order, x) of the greedily most likely order bounds -log p(x). None where another model,
        temperature, distance or number of positions chooses the locations.
        """
        policy = stored_policy(made["config"]["policy"])
        exact = policy.token_blind and (policy.deterministic or policy.order == "random")
        located = policy.order == "location" and policy.temperature in (None, 1) and self.scorer is None
        located = located and not (policy.adaptive or policy.min_distance)
        if not self.nll_images or not (exact or located):
            return {"nll": None, "bits_per_dim": None}
        assert self.model
        model = load_any_order(self.model)
        if policy.parallel and not (exact or getattr(model, "grouped", False)):
            return {"nll": None, "bits_per_dim": None}
        rows, hidden = select.evenly_spaced(self.nll_images, len(test)), tuple(made["config"].get("hide", ()))
        means = self._mean_nll(model, policy, exact, test, rows, hidden)
        h, w = files.read_manifest(test.folder)["image_size"]
        bits = metrics.bits_per_dim(means.get("bound", means["nll"]), test.grid.n, 3 * h * w)
        shared = {"bits_per_dim": bits, "nll_images": len(rows)}
        if exact:
            return {"nll": means["nll"], "nll_is_bound": policy.order == "random", **shared}
        content, bound = means["nll"], means["bound"]
        parts = {"bound": bound, "bound_tokens": content, "bound_location": bound - content}
        return {"nll": None, **parts, **shared}

    def _mean_nll(
        self,
        model: AnyOrderNetwork,
        policy: PolicyConfig,
        exact: bool,
        test: caches.TokenSet,
        rows: np.ndarray,
        hidden: tuple[str, ...],
    ) -> dict[str, float]:
        """`image_nll` of test images without the `hidden` parts of their conditions, averaged."""
        scorer = load_any_order(self.scorer, "scorer") if self.scorer else None
        cache = caches.OrderSet(self.orders) if self.orders else None

        def work(some: np.ndarray) -> dict[str, torch.Tensor]:
            tokens, labels = test.batch(some)
            labels = test.without(labels, hidden)
            condition = common.as_condition(model, test, labels.to(device()))
            of_class = cache.of_classes(labels).to(device()) if cache else None
            streams, tokens = Streams(some.tolist(), device()), tokens.to(device())
            order = (policy if exact else BY_EXTRACTION).build(test.grid, streams, of_class)
            found = extract_orders(
                model, tokens, order, streams, condition=condition, grid=test.grid, scorer=scorer
            )
            if policy.parallel and exact:
                return {"nll": -found.log_prob.cpu().double().mean(1)}
            steps: Any = {"sizes": policy.sizes(test.grid.n)} if policy.parallel else {}
            inputs = (tokens, condition, found.order, test.grid)
            each = image_nll(model, *inputs, location=not exact, **steps)
            return {name: value.cpu() for name, value in each.items()}

        batches = list(select.batches(rows, self.batch_size))
        made = list(processes.mapped(work, batches, "likelihood"))
        names = made[0] if made else ()  # the leader's alone
        return processes.told({name: float(torch.cat([x[name] for x in made]).mean()) for name in names})
