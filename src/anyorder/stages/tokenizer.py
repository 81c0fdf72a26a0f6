"""The stage that trains the tokenizer."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import nn

from anyorder.contracts import require
from anyorder.data.caches import ImageSet, splits
from anyorder.data.images import to_uint8
from anyorder.data.rows import batches, evenly_spaced
from anyorder.evaluation import metrics
from anyorder.inference import figures, folders, processes, weights
from anyorder.inference.device import device
from anyorder.stages import common
from anyorder.stages.artifacts import Artifact
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
class TokenizerStage(common.TrainingStage):
    """Train the VQ tokenizer and measure it on the test split."""

    inputs: ClassVar[tuple[str, ...]] = ("data", "init")
    data: Path
    """Images to train on."""
    init: Path | None = None
    """VQ tokenizer to start from, a folder, or "fashion32", "fashion64" or "emoji64" of the package; it
    brings its architecture."""
    mirror: bool = False
    """Train on mirrored images, too."""
    crops: bool = False
    """Train on five crops of every image instead of the whole, for data with cache=false; see tokens."""
    model: VQConfig = field(default_factory=lambda: SMALL)
    loss: LossConfig = field(default_factory=LossConfig)
    train: TrainConfig = field(default_factory=TrainConfig)

    def __post_init__(self) -> None:
        if self.init is not None and str(self.init) in folders.bundled() and not self.init.is_dir():
            self.init = folders.BUNDLED / self.init
        given = self.init is not None and self.model != SMALL
        require(not given, "init=... brings its architecture: remove the model.* settings")
        names = [f"{split}_{value}" for split in ("validation", "test") for value in ("psnr", "ssim")]
        self.train.require_watched(names, samples=False)
        learnt = self.model.codebook_update == "gradient" and self.model.revive_after
        refused = "train.shard=true cannot revive codes that learn by gradients: give model.revive_after=0"
        require(not (self.train.shard and learnt), refused)
        if self.init is None and self.model.codebook_update == "gradient":
            decay = self.model.ema_decay == VQConfig.ema_decay
            text = "model.ema_decay is for model.codebook_update=ema: choose that, or leave it out"
            require(decay, text)
            text = "loss.seed is for re-seeding unused codes: give model.revive_after, or leave it out"
            require(self.model.revive_after > 0 or self.loss.seed == 0, text)

    def run(self, artifact: Artifact) -> dict[str, Any]:
        """Write the model, its log, and reconstructions of test images."""
        images = ImageSet(self.data, crops=self.crops, mirror=self.mirror)
        test = ImageSet(self.data, "test")
        held_out = ImageSet(self.data, splits(self.data)[1])
        self.train.require_watched([f"{held_out.split}_{value}" for value in ("psnr", "ssim")], samples=False)
        torch.manual_seed(self.train.seed)
        model = VQModel(self.model) if self.init is None else weights.load_tokenizer(self.init).train()
        trainable = f"init={self.init} is no VQ tokenizer: choose one that anyorder tokenizer trained"
        require(isinstance(model, VQModel), trainable)
        assert isinstance(model, VQModel)
        objective = TokenizerLoss(self.loss).to(device())
        frozen = [p for p in model.quantize.parameters() if not p.requires_grad]

        def loss(model: nn.Module, rows: np.ndarray, step: int, generator: torch.Generator) -> Any:
            return objective(model, images.batch(rows, device=device())[0], step)

        def after(step: int) -> dict[str, torch.Tensor]:
            parts = objective.update_codebook(model, step, processes.stacked)
            processes.same([*model.quantize.buffers(), *frozen])  # GPUs sum in any sequence
            return parts

        def evaluate(model: nn.Module, step: int) -> dict[str, float]:
            found = _measured(model, held_out, 1024)
            return {f"{held_out.split}_{key}": value for key, value in found.items()}

        result = train(
            model, loss, len(images), self.train, artifact.folder, device=device(), evaluate=evaluate,
            extra=objective if any(True for _ in objective.parameters()) else None, after=after,
            ahead=images.ahead,
        )  # fmt: skip
        if not artifact.leads:
            return {}
        weights.save_model(artifact.folder, result.model, model.config, "vq")
        _save_reconstructions(result.model, test if len(test) else images, artifact.folder)
        return {"test": _measured(result.model, test, len(test)), **common.training_facts(result)}


def _reconstructed(model: nn.Module, pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens of images (B, 3, H, W) in [-1, 1], and the images that they decode to."""
    assert isinstance(model, VQModel)
    tokens = model.encode(pixels)
    return tokens, model.decode(tokens, model.grid(pixels)).clamp(-1, 1)


def _measured(model: nn.Module, images: ImageSet, limit: int) -> dict[str, float]:
    """PSNR (dB), SSIM, codebook usage and perplexity over at most `limit` images; empty if there are none."""
    tokens, psnr, ssim, some = [], 0.0, 0.0, evenly_spaced(limit, len(images))
    if not (n := len(some)):
        return {}
    with images.ahead(batches(some, 256)):
        for rows in batches(some, 256):
            pixels = images.batch(rows, device=device())[0]
            found, decoded = _reconstructed(model, pixels)
            psnr += float(metrics.psnr(decoded, pixels).sum())
            ssim += float(metrics.ssim(decoded, pixels).sum())
            tokens.append(found.cpu())
    usage, perplexity = codebook_usage(torch.cat(tokens), model.vocab_size).tolist()  # type: ignore[arg-type]
    return {"psnr": psnr / n, "ssim": ssim / n, "codebook_usage": usage, "codebook_perplexity": perplexity}


def _save_reconstructions(model: nn.Module, images: ImageSet, folder: Path) -> None:
    """The first images above their reconstructions."""
    pixels = images.batch(np.arange(min(common.SHOWN, len(images))), device=device())[0]
    both = np.concatenate((to_uint8(pixels), to_uint8(_reconstructed(model, pixels)[1])))
    shown = figures.image_grid(both, columns=len(pixels), scale=2)
    figures.save_image(shown, folder / "reconstructions.png")
