"""The stage that makes the features that samples are compared in."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar
from zipfile import BadZipFile

import numpy as np
import torch
from torch import nn

from anyorder import families
from anyorder.contracts import require
from anyorder.data import caches, decoding
from anyorder.data.images import uint8_batches
from anyorder.data.rows import batches, evenly_spaced
from anyorder.evaluation import features, metrics
from anyorder.files import read_json, read_manifest, write_json
from anyorder.inference import processes, weights
from anyorder.inference.device import device
from anyorder.stages import common
from anyorder.stages.artifacts import Artifact
from anyorder.training.config import TrainConfig
from anyorder.training.trainer import train

REFERENCES = {"test": "reference.safetensors", "validation": "validation.safetensors"}
"""Features of the test split, and of a validation split, in a features artifact."""
TRAINING = "train.safetensors"
"""Features of training images in a features artifact, for the nearest one of a sample."""
EXTRACTORS = ("classifier", features.LITE, "inception")
NEIGHBOURS = 50_000
"""At most this many training images may be the nearest one of a sample: 400 MB at 2,048 features."""


@dataclass
class FeaturesStage(common.TrainingStage):
    """Make the feature space of FD, and the reference statistics of the test split in it."""

    inputs: ClassVar[tuple[str, ...]] = ("data", "init")
    data: Path
    """Images; the classifier is trained on the training split, test and validation split are references."""
    init: Path | None = None
    """Features artifact whose classifier, of the same shape, training starts from."""
    extractor: str = "classifier"
    """classifier: trained on the labels of the data; efficientnet-lite0: trained on ImageNet (extra eval);
    inception: Inception-2015, whose distance is FID (extra fid); timm:NAME: any of timm (extra timm);
    or an own one, package.module:Name, made without arguments, see `evaluation.features.FeatureExtractor`."""
    bf16: bool = False
    """Compute features of efficientnet-lite0 or timm:NAME in bfloat16: 2.5 times as fast on a CPU with
    AVX512-BF16. It moved FD by 0.2 % and KID by 0.8 %: compare numbers that were made the same way."""
    max_train: int = NEIGHBOURS
    """Keep the features of at most this many training images, at least 4: for floors, and as the nearest one
    of a sample."""
    label: str | None = None
    """Attribute that the classifier learns instead of the class; images without a value are left out."""
    channels: tuple[int, ...] = (32, 64, 128)
    """Widths of the classifier's stages, 1 to 4 multiples of 8."""
    train: TrainConfig = field(default_factory=TrainConfig)
    """Training of the classifier."""

    def __post_init__(self) -> None:
        require(self.max_train >= 4, f"max_train must be at least 4, got {self.max_train}")
        known = self.extractor in EXTRACTORS or self.extractor.startswith(features.TIMM)
        known = known or families.is_own("features", self.extractor)
        names = f"{', '.join(EXTRACTORS)}, timm:NAME or package.module:Name"
        listed = f"extractor must be one of {names}, got '{self.extractor}'"
        require(known, listed)
        for name in ("label", "init"):
            allowed = getattr(self, name) is None or self.extractor == "classifier"
            require(allowed, f"{name}={getattr(self, name)} is for a classifier: set extractor=classifier")
        default = self.train == TrainConfig() and self.channels == FeaturesStage.channels
        text = "channels and train.* are for a classifier: set extractor=classifier, or leave them out"
        require(self.extractor == "classifier" or default, text)
        pretrained = self.extractor.startswith((features.LITE, features.TIMM))
        require(pretrained or not self.bf16, "bf16 is for extractor=efficientnet-lite0 or timm:NAME")
        self.train.require_watched(("test_accuracy",), samples=False)

    def run(self, artifact: Artifact) -> dict[str, Any]:
        """Write the classifier, `{reference,validation,train}.safetensors`, and real against real."""
        images, test = caches.ImageSet(self.data), caches.ImageSet(self.data, "test")
        few = f"{self.data} has {len(test)} test images, features need at least 2: hold out more"
        require(len(test) >= 2, few)
        facts = self._train(artifact, images, test) if self.extractor == "classifier" else {}
        if artifact.leads:
            write_json(artifact.folder / "extractor.json", {"extractor": self.extractor, "bf16": self.bf16})
            (artifact.folder / TRAINING).unlink(missing_ok=True)  # of an earlier configuration
        processes.barrier()
        extractor = load_extractor(artifact.folder)
        for split in caches.splits(self.data)[1:]:  # the test split last, whose features the floor needs
            held = caches.ImageSet(self.data, split).images
            rows, what = np.arange(len(held)), f"{split} features"
            reference = statistics(extractor, held, rows, test.fingerprint, what)
            if artifact.leads:
                reference.save(artifact.folder / REFERENCES[split])
        training = training_features(artifact.folder, extractor, images, self.max_train)
        if not artifact.leads:
            return {}
        floor = _floor(extractor, reference, training)
        return {"extractor": extractor.name, "metric_name": extractor.metric, "floor": floor, **facts}

    def _train(self, artifact: Artifact, images: caches.ImageSet, test: caches.ImageSet) -> dict[str, Any]:
        (labels, names), (test_labels, _) = (some.labels_of(self.label) for some in (images, test))
        known, test_known = (np.flatnonzero(some >= 0) for some in (labels, test_labels))
        config = features.ClassifierConfig(len(names), min(images.size), self.channels)
        torch.manual_seed(self.train.seed)
        model = features.Classifier(config)
        if self.init is not None:
            weights.load_state(model, weights.load_model(self.init, "classifier").state_dict(), self.init)

        def loss(model: nn.Module, rows: np.ndarray, step: int, generator: torch.Generator) -> Any:
            targets = caches.without_waiting(torch.from_numpy(labels[known[rows]]), device())
            pixels = images.batch(known[rows], device=device())[0]
            # Not as a method, which a compiled model would take from the one that is not.
            return features.Classifier.loss(model, pixels, targets)  # type: ignore[arg-type]

        def evaluate(model: nn.Module, step: int) -> dict[str, float]:
            hits = 0
            with test.ahead(batches(test_known, 512)):
                for rows in batches(test_known, 512):
                    found = model(test.batch(rows, device=device())[0])[1].argmax(1).cpu().numpy()
                    hits += int((found == test_labels[rows]).sum())
            return {"test_accuracy": hits / max(1, len(test_known))}

        result = train(
            model, loss, len(known), self.train, artifact.folder, device=device(), evaluate=evaluate,
            ahead=lambda upcoming: images.ahead(known[rows] for rows in upcoming),
        )  # fmt: skip
        if artifact.leads:
            weights.save_model(artifact.folder, result.model, config, "classifier")
        processes.barrier()
        return {"test": evaluate(result.model, result.steps), **common.training_facts(result)}


def _floor(
    extractor: features.FeatureExtractor, test: metrics.FeatureStatistics, training: metrics.FeatureStatistics
) -> dict[str, float]:
    """Distances of as many real training images from the test split; nothing for 3 images or fewer."""
    rows = evenly_spaced(test.n, training.n)
    if min(len(rows), test.n) <= 3:
        return {}
    real = metrics.FeatureStatistics(extractor.name)
    real.update(training.features[rows], training.logits[rows])
    found = metrics.evaluate(extractor, test, real)
    return {"fd": found.get("fd", found.get("fid")), **{k: found[k] for k in ("kid", "precision", "recall")}}


def load_extractor(folder: Path) -> features.FeatureExtractor:
    """The feature extractor of a features artifact."""
    made = read_json(folder / "extractor.json")
    name, bf16 = made["extractor"], made.get("bf16", False)
    if name == "inception":
        return features.Inception2015(device=device())
    if name == features.LITE:
        return features.efficientnet_lite(device(), bf16)
    if name.startswith(features.TIMM):
        return features.timm_features(name, device(), bf16)
    if name != "classifier":
        return families.resolve("features", name)()
    model = weights.load_model(folder, "classifier").to(device())
    assert isinstance(model, features.Classifier)
    return features.ClassifierFeatures(model)


def load_reference(folder: Path, split: str = "test") -> metrics.FeatureStatistics:
    """Features of the test or the validation split in a features artifact."""
    made = read_manifest(folder)
    path = folder / REFERENCES[split]
    return metrics.FeatureStatistics.load(path, made["extractor"], made["inputs"]["data"])


def load_samples(folder: Path, space: Path) -> metrics.FeatureStatistics:
    """Features of the samples in an eval artifact; a ValueError if they are of another features artifact."""
    common.require_made_from(folder, "features", space)
    path = folder / common.SAMPLES
    if not path.is_file():  # older versions did not keep them
        mend = "delete its manifest.json and run eval again"
        raise FileNotFoundError(f"{folder} holds no {common.SAMPLES}: {mend}")
    samples = read_manifest(folder)["inputs"]["samples"]
    return metrics.FeatureStatistics.load(path, read_manifest(space)["extractor"], samples)


def training_features(
    folder: Path, extractor: features.FeatureExtractor, images: caches.ImageSet, limit: int = NEIGHBOURS
) -> metrics.FeatureStatistics:
    """Features of at most `limit` training images, computed once and kept in the features artifact."""
    path = folder / TRAINING
    if not processes.told(path.is_file()):
        rows = evenly_spaced(limit, len(images))
        found = statistics(extractor, images.images, rows, images.fingerprint, "training features")
        if processes.leads():
            found.save(path)
        processes.barrier()
    return metrics.FeatureStatistics.load(path, extractor.name, images.fingerprint)


def statistics(
    extractor: features.FeatureExtractor,
    images: np.ndarray | decoding.Decoded,
    rows: np.ndarray,
    data: str,
    what: str,
) -> metrics.FeatureStatistics:
    """`metrics.statistics` of rows of images (n, H, W, 3) uint8, by all processes; whole in the leader."""

    def work(some: np.ndarray) -> tuple[torch.Tensor, ...]:
        pixels = torch.from_numpy(np.array(images[some])).permute(0, 3, 1, 2)
        return tuple(x.cpu() for x in extractor(pixels))

    result, todo = metrics.FeatureStatistics(extractor.name, data), list(batches(rows, 256))
    with decoding.ahead(images, todo[processes.rank() :: processes.size()]):
        for found in processes.mapped(work, todo, what):
            result.update(*found)
    return result


def reference_file(path: Path, extractor: features.FeatureExtractor) -> metrics.Gaussian:
    """Moments of a reference `.npz` as ADM publishes them (arXiv 2105.05233): `mu`, `sigma`, or `arr_0`.

    `mu` (2048,) and `sigma` (2048, 2048) are those of Inception-2015 and serve it alone; any extractor takes
    the images, `arr_0` (n, H, W, 3) uint8.

    Raises:
        ValueError: not an `.npz`, or one without what the extractor needs.
    """
    try:
        file = np.load(path, allow_pickle=False)
        found = {name: file[name] for name in ("mu", "sigma", "arr_0") if name in file.files}
    except (ValueError, OSError, EOFError, BadZipFile, AttributeError) as e:
        mend = "give an .npz with mu and sigma, or arr_0"
        raise ValueError(f"reference={path} cannot be read ({e}): {mend}") from e
    if extractor.metric == "FID" and {"mu", "sigma"} <= found.keys():
        moments = [torch.from_numpy(found[name].astype(np.float64)) for name in ("mu", "sigma")]
        shapes = tuple(tuple(x.shape) for x in moments)
        fits = shapes == ((extractor.dim,), (extractor.dim, extractor.dim))
        require(fits, f"reference={path}: mu and sigma of {extractor.dim} features are needed, got {shapes}")
        require(all(x.isfinite().all() for x in moments), f"reference={path}: mu or sigma is not finite")
        return metrics.Gaussian(*moments)
    held = ", ".join(found) or "neither"
    mend = "give one with images, or use extractor=inception for mu and sigma"
    require("arr_0" in found, f"reference={path} holds {held}, {extractor.metric} needs arr_0: {mend}")
    shape, dtype = found["arr_0"].shape, found["arr_0"].dtype
    text = f"reference={path}: arr_0 must be (n, height, width, 3) uint8, got {shape} {dtype}"
    require(len(shape) == 4 and shape[3] == 3 and dtype == np.uint8 and shape[0] >= 2, text)
    return metrics.statistics(extractor, uint8_batches(found["arr_0"]), description="reference").gaussian
