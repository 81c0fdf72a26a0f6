"""Stages before the any-order model: data, tokenizer, feature space, tokens."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from torch import nn
from tqdm import tqdm

from anyorder.artifacts import Artifact, RowWriter, read_json, save_array, write_json, write_text
from anyorder.contracts import Grid, TokenizerNetwork
from anyorder.data.caches import TEXT, ImageSet
from anyorder.data.images import ingest
from anyorder.data.sources import open_source
from anyorder.data.sunsets import write_sunsets
from anyorder.data.text import CaptionTokenizer, TextConfig
from anyorder.evaluation import figures, metrics
from anyorder.evaluation.features import Classifier, ClassifierConfig, ClassifierFeatures, Inception2015
from anyorder.models.losses import LossConfig, TokenizerLoss, codebook_usage
from anyorder.models.vq import VQConfig, VQModel
from anyorder.runs.checkpoint import load_model, save_model
from anyorder.runs.common import (
    SHOWN,
    batches,
    device,
    fit,
    load_tokenizer,
    slices,
    spread,
    to_uint8,
    training_facts,
    uint8_batches,
)
from anyorder.runs.trainer import TrainConfig


@dataclass
class DataStage:
    """Decode a source of images once, at one size."""

    inputs: ClassVar[tuple[str, ...]] = ()
    source: str = "sunsets"
    """sunsets (made by seed), a folder of images, a parquet file or folder, or a Hugging Face data set id."""
    size: tuple[int, int] = (32, 32)
    """Height and width in pixels."""
    label: str | None = None
    """Column that holds the class (parquet and Hugging Face)."""
    captions: str | None = None
    """Column that holds a text about each image (parquet and Hugging Face)."""
    attributes: tuple[str, ...] = ()
    """Columns of further attributes that pictures may be asked for (parquet and Hugging Face)."""
    fit: Literal["crop", "letterbox"] = "crop"
    """How other aspect ratios are brought to `size`."""
    max_train: int | None = None
    """Take at most this many training images; sunsets makes this many (20,000 by default)."""
    max_test: int | None = None
    """The same for the test split (2,000 by default for sunsets)."""
    test_fraction: float = 0.1
    """Share of images held out where the source has no test split."""
    seed: int = 0
    """Of sunsets."""

    def run(self, artifact: Artifact) -> dict[str, Any]:
        """Write `{train,test}.{images,labels}.npy`, and `{attributes.npy,captions.json}` if asked for."""
        if self.source == "sunsets":
            if self.captions is not None or self.attributes:
                raise ValueError("sunsets have neither captions nor attributes: leave both out")
            n_train = 20_000 if self.max_train is None else self.max_train
            n_test = 2_000 if self.max_test is None else self.max_test
            return write_sunsets(artifact.folder, self.size, n_train, n_test, seed=self.seed)
        source = open_source(
            self.source, self.label, self.test_fraction, self.captions, tuple(self.attributes)
        )
        return ingest(
            source, artifact.folder, self.size, self.fit, max_train=self.max_train, max_test=self.max_test
        )


SMALL = VQConfig(
    channels=32,
    multipliers=(1, 2, 2),
    groups=2,  # on a CPU, GroupNorm in bf16 is quick from 16 channels per group on
    res_blocks=1,
    attention=False,
    z_channels=64,
    vocab_size=512,
    codebook_update="ema",
    revive_after=100,
)
"""A tokenizer of factor 4 for small images, the default of the stage."""


@dataclass
class TokenizerStage:
    """Train the VQ tokenizer and measure it on the test split."""

    inputs: ClassVar[tuple[str, ...]] = ("data",)
    data: Path
    model: VQConfig = field(default_factory=lambda: SMALL)
    loss: LossConfig = field(default_factory=LossConfig)
    train: TrainConfig = field(default_factory=TrainConfig)

    def run(self, artifact: Artifact) -> dict[str, Any]:
        """Write the model, its log, and reconstructions of test images."""
        images, test = ImageSet(self.data), ImageSet(self.data, "test")
        torch.manual_seed(self.train.seed)
        model, objective = VQModel(self.model), TokenizerLoss(self.loss).to(device())

        def loss(model: nn.Module, rows: np.ndarray, step: int, generator: torch.Generator) -> Any:
            assert isinstance(model, VQModel)
            return objective(model, images.batch(rows)[0].to(device()), step)

        def evaluate(model: nn.Module, step: int) -> dict[str, float]:
            assert isinstance(model, VQModel)
            return {f"test_{key}": value for key, value in measure_tokenizer(model, test, 1024).items()}

        adversary = objective if any(True for _ in objective.parameters()) else None
        result = fit(artifact, model, loss, len(images), self.train, extra=adversary, evaluate=evaluate)
        best = result.model
        assert isinstance(best, VQModel)
        save_model(artifact.folder, best, self.model, "vq")
        figures.save_image(reconstructions(best, test), artifact.folder / "reconstructions.png")
        return {"test": measure_tokenizer(best, test, len(test)), **training_facts(result)}


def measure_tokenizer(model: VQModel, images: ImageSet, limit: int) -> dict[str, float]:
    """PSNR (dB), SSIM, codebook usage and perplexity over at most `limit` images."""
    tokens, psnr, ssim, some = [], 0.0, 0.0, spread(limit, len(images))
    n = len(some)
    for rows in batches(some, 256):
        pixels = images.batch(rows)[0].to(device())
        found = model.encode(pixels)
        decoded = model.decode(found, model.grid(pixels)).clamp(-1, 1)
        psnr += float(metrics.psnr(decoded, pixels).sum())
        ssim += float(metrics.ssim(decoded, pixels).sum())
        tokens.append(found.cpu())
    usage, perplexity = codebook_usage(torch.cat(tokens), model.vocab_size)
    return {"psnr": psnr / n, "ssim": ssim / n, "codebook_usage": usage, "codebook_perplexity": perplexity}


def reconstructions(model: VQModel, images: ImageSet) -> Any:
    """Test images above their reconstructions, a Pillow image."""
    pixels = images.batch(np.arange(min(SHOWN, len(images))))[0].to(device())
    decoded = model.decode(model.encode(pixels), model.grid(pixels))
    both = np.concatenate((to_uint8(pixels), to_uint8(decoded)))
    return figures.image_grid(both, columns=len(pixels), scale=2)


TRAINING = "train.safetensors"
"""Features of training images in a features artifact, for the nearest one of a sample."""
NEIGHBOURS = 50_000
"""At most this many training images may be the nearest one of a sample: 400 MB at 2,048 features."""


@dataclass
class FeaturesStage:
    """The feature space of FD, and the reference statistics of the test split in it."""

    inputs: ClassVar[tuple[str, ...]] = ("data",)
    data: Path
    extractor: Literal["classifier", "inception"] = "classifier"
    """A classifier trained on the data set's own labels (FD), or Inception-2015 (FID)."""
    label: str | None = None
    """Attribute that the classifier learns instead of the class; images without a value are left out."""
    channels: tuple[int, ...] = (32, 64, 128)
    """Widths of the classifier's stages."""
    train: TrainConfig = field(default_factory=TrainConfig)
    """Training of the classifier."""

    def __post_init__(self) -> None:
        if self.label is not None and self.extractor != "classifier":
            raise ValueError(f"label={self.label} is what a classifier learns: set extractor=classifier")

    def run(self, artifact: Artifact) -> dict[str, Any]:
        """Write the classifier and `{reference,train}.safetensors`; say how far real images are from real."""
        images, test = ImageSet(self.data), ImageSet(self.data, "test")
        facts = self._train(artifact, images, test) if self.extractor == "classifier" else {}
        write_json(artifact.folder / "extractor.json", {"extractor": self.extractor})
        extractor = load_extractor(artifact.folder)
        batches = uint8_batches(test.images)
        reference = metrics.statistics(extractor, batches, test.fingerprint, "test features")
        reference.save(artifact.folder / "reference.safetensors")
        (artifact.folder / TRAINING).unlink(missing_ok=True)  # of an earlier configuration
        training_features(artifact.folder, extractor, images)
        batches = uint8_batches(images.images[: len(test)])
        floor = metrics.statistics(extractor, batches, description="train features")
        return {
            "extractor": extractor.name,
            "metric_name": extractor.metric,
            "distance_of_training_images": metrics.frechet_distance(reference.gaussian, floor.gaussian),
            **facts,
        }

    def _train(self, artifact: Artifact, images: ImageSet, test: ImageSet) -> dict[str, Any]:
        names = images.labels_of(self.label)[1]
        (labels, known), (test_labels, test_known) = (_labelled(some, self.label) for some in (images, test))
        config = ClassifierConfig(len(names), min(images.size), self.channels)
        torch.manual_seed(self.train.seed)
        model = Classifier(config)

        def loss(model: nn.Module, rows: np.ndarray, step: int, generator: torch.Generator) -> Any:
            assert isinstance(model, Classifier)
            pixels, _ = images.batch(known[rows])
            return model.loss(pixels.to(device()), torch.from_numpy(labels[known[rows]]).to(device()))

        def evaluate(model: nn.Module, step: int) -> dict[str, float]:
            hits = 0
            for rows in batches(test_known, 512):
                found = model(test.batch(rows)[0].to(device()))[1].argmax(1).cpu().numpy()
                hits += int((found == test_labels[rows]).sum())
            return {"test_accuracy": hits / max(1, len(test_known))}

        result = fit(artifact, model, loss, len(known), self.train, evaluate=evaluate)
        save_model(artifact.folder, result.model, config, "classifier")
        return {"test": evaluate(result.model, result.steps), **training_facts(result)}


def _labelled(images: ImageSet, attribute: str | None) -> tuple[np.ndarray, np.ndarray]:
    """Labels (n,) int64, and the rows (k,) int64 that have one."""
    labels = np.array(images.labels_of(attribute)[0])
    return labels, np.flatnonzero(labels >= 0)


def load_extractor(folder: Path) -> ClassifierFeatures | Inception2015:
    """The feature extractor of a features artifact."""
    if read_json(folder / "extractor.json")["extractor"] == "inception":
        return Inception2015(device=device())
    model = load_model(folder, "classifier").to(device())
    assert isinstance(model, Classifier)
    return ClassifierFeatures(model)


def training_features(
    folder: Path, extractor: ClassifierFeatures | Inception2015, images: ImageSet
) -> metrics.FeatureStatistics:
    """Features of (at most 50,000) training images, computed once and kept in the features artifact."""
    path = folder / TRAINING
    if not path.is_file():
        rows = batches(spread(NEIGHBOURS, len(images)), 256)
        pixels = (torch.from_numpy(np.array(images.images[some])).permute(0, 3, 1, 2) for some in rows)
        metrics.statistics(extractor, pixels, images.fingerprint, "training features").save(path)
    return metrics.FeatureStatistics.load(path, extractor.name, images.fingerprint)


@dataclass
class TokensStage:
    """Encode every image once."""

    inputs: ClassVar[tuple[str, ...]] = ("data", "tokenizer")
    data: Path
    tokenizer: Path
    batch_size: int = 256
    """Images per call."""
    text: TextConfig = field(default_factory=TextConfig)
    """How captions become tokens, where the data have captions."""

    def run(self, artifact: Artifact) -> dict[str, Any]:
        """Write `{train,test}.{tokens,labels}.npy`, of data with more `{attributes,captions}.npy`, too."""
        further = self._conditions(artifact)
        model = load_tokenizer(self.tokenizer)
        examples = sum(self._encode(model, split, artifact) for split in ("train", "test"))
        images = ImageSet(self.data)
        grid = [side // model.factor for side in images.size]
        return {
            "examples": examples,
            "grid": grid,
            "vocab_size": model.vocab_size,
            "classes": images.classes,
            "image_size": list(images.size),
            "tokenizer": artifact.identity["inputs"]["tokenizer"],
            "data": artifact.identity["inputs"]["data"],
            **further,
        }

    def _conditions(self, artifact: Artifact) -> dict[str, Any]:
        """Write attributes and caption tokens of both splits; facts for the manifest."""
        (artifact.folder / TEXT).unlink(missing_ok=True)  # of an earlier configuration
        sets = [ImageSet(self.data, split) for split in ("train", "test")]
        facts: dict[str, Any] = {}
        if sets[0].attributes:
            facts["attributes"] = sets[0].attributes
            for images in sets:
                save_array(artifact.folder / f"{images.split}.attributes.npy", images.attribute_values())
        captions = [images.captions() for images in sets]
        if captions[0] is None:
            if self.text != TextConfig():
                raise ValueError(f"{self.data} has no captions: leave out text.*, or run data with captions=")
            return facts
        tokenizer = CaptionTokenizer.train(captions[0], self.text.vocab_size)
        write_text(artifact.folder / TEXT, tokenizer.definition)
        for images, some in zip(sets, captions, strict=True):
            tokens = tokenizer.encode(some or [], self.text.length).astype(np.int32)
            save_array(artifact.folder / f"{images.split}.captions.npy", tokens)
        return facts | {"text": {"vocab_size": tokenizer.vocab_size, "length": self.text.length}}

    def _encode(self, model: TokenizerNetwork, split: str, artifact: Artifact) -> int:
        """Encode one split, going on where a killed run stopped; the number of images."""
        images = ImageSet(self.data, split)
        n = Grid(*(side // model.factor for side in images.size)).n
        names = {f"{split}.tokens": ((n,), np.int32), f"{split}.labels": ((), np.int64)}
        rows = RowWriter(artifact.folder, names)
        with tqdm(total=len(images), initial=rows.rows, desc=f"{split} tokens", unit="image") as bar:
            for some in slices(len(images), self.batch_size, rows.rows):
                pixels, labels = images.batch(some)
                tokens = model.encode(pixels.to(device())).cpu().numpy()
                rows.append(**{f"{split}.tokens": tokens, f"{split}.labels": labels.numpy()})
                bar.update(len(some))
        rows.close()
        return len(images)
