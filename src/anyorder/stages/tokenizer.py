"""The stage that trains the tokenizer."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import nn

from anyorder.data.caches import ImageSet
from anyorder.data.images import to_uint8
from anyorder.data.rows import batches, evenly_spaced
from anyorder.evaluation import metrics
from anyorder.inference.device import device
from anyorder.inference.weights import load_model, save_model
from anyorder.report import figures
from anyorder.stages.artifacts import Artifact
from anyorder.stages.common import SHOWN, TrainingStage, training_facts
from anyorder.tokenizers.losses import LossConfig, TokenizerLoss, codebook_usage
from anyorder.tokenizers.vq import VQConfig, VQModel
from anyorder.training.config import TrainConfig
from anyorder.training.trainer import train

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
class TokenizerStage(TrainingStage):
    """Train the VQ tokenizer and measure it on the test split."""

    inputs: ClassVar[tuple[str, ...]] = ("data", "init")
    data: Path
    """Images to train on."""
    init: Path | None = None
    """VQ tokenizer to start from; it brings its architecture."""
    model: VQConfig = field(default_factory=lambda: SMALL)
    loss: LossConfig = field(default_factory=LossConfig)
    train: TrainConfig = field(default_factory=TrainConfig)

    def __post_init__(self) -> None:
        if self.init is not None and self.model != SMALL:
            raise ValueError("init=... brings its architecture: remove the model.* settings")
        self.train.require_watched(("test_psnr", "test_ssim"))

    def run(self, artifact: Artifact) -> dict[str, Any]:
        """Write the model, its log, and reconstructions of test images."""
        images, test = ImageSet(self.data), ImageSet(self.data, "test")
        torch.manual_seed(self.train.seed)
        model = VQModel(self.model) if self.init is None else load_model(self.init, "vq").train()
        assert isinstance(model, VQModel)
        objective = TokenizerLoss(self.loss).to(device())

        def loss(model: nn.Module, rows: np.ndarray, step: int, generator: torch.Generator) -> Any:
            assert isinstance(model, VQModel)
            return objective(model, images.batch(rows)[0].to(device()), step)

        def evaluate(model: nn.Module, step: int) -> dict[str, float]:
            assert isinstance(model, VQModel)
            return {f"test_{key}": value for key, value in measure_tokenizer(model, test, 1024).items()}

        adversary = objective if any(True for _ in objective.parameters()) else None
        result = train(
            model, loss, len(images), self.train, artifact.folder, device=device(), extra=adversary,
            evaluate=evaluate,
        )  # fmt: skip
        best = result.model
        assert isinstance(best, VQModel)
        save_model(artifact.folder, best, model.config, "vq")
        shown = reconstructions(best, test if len(test) else images)
        figures.save_image(shown, artifact.folder / "reconstructions.png")
        return {"test": measure_tokenizer(best, test, len(test)), **training_facts(result)}


def measure_tokenizer(model: VQModel, images: ImageSet, limit: int) -> dict[str, float]:
    """PSNR (dB), SSIM, codebook usage and perplexity over at most `limit` images; empty if there are none."""
    tokens, psnr, ssim, some = [], 0.0, 0.0, evenly_spaced(limit, len(images))
    if not (n := len(some)):
        return {}
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
