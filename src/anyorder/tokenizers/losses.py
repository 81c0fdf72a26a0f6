"""The training losses of a tokenizer: pixels, codebook, perception and, from some step on, an adversary.

The sum is that of VQGAN (arXiv 2012.09841, Sec. 3.1 and Eq. 7), arranged so that one backward pass and one
optimizer train both sides: the generator's term sees the discriminator's weights detached, the
discriminator's term sees the reconstructions detached.
"""

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

from anyorder import efficientnet
from anyorder.contracts import at_least, exact, require
from anyorder.tokenizers.vq import VQModel


@dataclass
class LossConfig:
    """Weights of the tokenizer's losses; a weight of zero leaves the term and its network out."""

    l1: float = 1.0
    """Weight of the mean absolute error of pixels."""
    l2: float = 1.0
    """Weight of the mean squared error of pixels."""
    lpips: float = 0.0
    """Weight of the perceptual distance, in the features of EfficientNet-Lite0 (extra `eval`) or of VGG16."""
    vgg_path: Path | None = None
    """File of VGG16 weights with torchvision's keys `features.N.weight` and `.bias`, .safetensors or .pth;
    null: EfficientNet-Lite0."""
    lpips_path: Path | None = None
    """File of LPIPS's linear heads `linN.model.1.weight`; null: every channel counts the same."""
    adversarial: float = 0.0
    """Weight of the adversarial term, times the adaptive weight; 0 trains without a discriminator."""
    discriminator_start: int = 0
    """Training step at which both adversarial terms begin."""
    discriminator_channels: int = 64
    """Number of channels after the discriminator's first layer, a multiple of 8."""
    discriminator_layers: int = 3
    """How often the discriminator halves the image: 3 rates patches of 70 pixels, 2 of 34, 1 of 16."""
    seed: int = 0
    """Seed of the choices that re-seed unused codes; combined with the step: resuming changes none."""

    def __post_init__(self) -> None:
        at_least(0, self, "l1", "l2", "lpips", "adversarial", "discriminator_start", "seed")
        text = f"lpips_path={self.lpips_path} holds heads for VGG16: give vgg_path, a file with torchvision's"
        text += " VGG16 weights (vgg16-397923af.pth or its .safetensors), or leave it out"
        require(self.vgg_path is not None or self.lpips_path is None or self.lpips == 0, text)
        for what in ("lpips", "adversarial"):
            prefix = "discriminator_" if what == "adversarial" else ("vgg_path", "lpips_path")
            own = {name: value for name, value in vars(self).items() if name.startswith(prefix)}
            unused = [name for name, value in own.items() if value != getattr(LossConfig, name)]
            text = f"{' and '.join(unused)} has no effect at {what}=0: give {what} a weight, or leave it out"
            require(getattr(self, what) > 0 or not unused, text)
        channels, layers = self.discriminator_channels, self.discriminator_layers
        fits = channels > 0 and channels % 8 == 0
        require(fits, f"discriminator_channels must be a positive multiple of 8, got {channels}")
        require(layers >= 1, f"discriminator_layers must be at least 1, got {layers}")


class TokenizerLoss(nn.Module):
    """The training loss of a `VQModel`; its parameters, the discriminator's, go to the same optimizer."""

    def __init__(self, config: LossConfig):
        super().__init__()
        self.config = config
        self.perceptual: PerceptualLoss | LitePerceptualLoss | None = None
        self.discriminator: Discriminator | None = None
        if config.lpips:
            vgg, heads = config.vgg_path, config.lpips_path
            self.perceptual = PerceptualLoss(vgg, heads) if vgg else LitePerceptualLoss()
        if config.adversarial:
            self.discriminator = Discriminator(config.discriminator_channels, config.discriminator_layers)
        self._passes: list[tuple[Tensor, Tensor]] = []
        """Encoder outputs and tokens since the codebook was updated."""

    def forward(self, model: VQModel, images: Tensor, step: int) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss of one training batch, which is remembered for `update_codebook`.

        Args:
            model: the tokenizer in training.
            images: (B, 3, H, W) float in [-1, 1].
            step: training step, from 0; decides whether the adversarial terms count.

        Returns:
            The sum to differentiate, a float32 scalar, and its detached parts before their weights:
            `l1`, `l2`, `commitment` (weighted), `codebook`; where they apply `lpips`, `generator`,
            `discriminator`, `adaptive_weight`.
        """
        output = model(images)
        fake, real = output.reconstruction.float(), images.float()
        parts = {"l1": F.l1_loss(fake, real), "l2": F.mse_loss(fake, real)}
        reconstruction = self.config.l1 * parts["l1"] + self.config.l2 * parts["l2"]
        if self.perceptual is not None:
            parts["lpips"] = self.perceptual(fake, real)
            reconstruction = reconstruction + self.config.lpips * parts["lpips"]
        total = reconstruction + output.commitment_loss + output.codebook_loss
        parts |= {"commitment": output.commitment_loss, "codebook": output.codebook_loss}
        if self.discriminator is not None and step >= self.config.discriminator_start:
            generator = generator_loss(self.discriminator, fake)
            last_layer = model.decoder.get_parameter("conv_out.weight")
            weight = adaptive_weight(reconstruction, generator, last_layer)
            discriminator = discriminator_loss(self.discriminator, real, fake)
            total = total + self.config.adversarial * weight * generator + discriminator
            parts |= {"generator": generator, "discriminator": discriminator, "adaptive_weight": weight}
        self._passes.append((output.latents.detach(), output.tokens))
        return total, {name: part.detach() for name, part in parts.items()}

    def update_codebook(
        self, model: VQModel, step: int, stacked: Callable[[Tensor], Tensor] = lambda x: x[None]
    ) -> dict[str, Tensor]:
        """Learn the codebook from the batches since the last call, in all processes; call it once per step.

        Args:
            model: the tokenizer in training.
            step: training step, from 0; seeds the choice of encoder outputs that become codes.
            stacked: of a tensor (...), those of all P processes (P, ...).

        Returns:
            `codebook_usage` and `codebook_perplexity` of the latest 65,536 training tokens, scalars, see
            `codebook_usage`.
        """
        own = [torch.stack(x) for x in zip(*self._passes, strict=True)]
        self._passes.clear()
        # (P, passes, B, N, ...) to the sequence in which one process would have run the passes.
        latents, tokens = (stacked(x).transpose(0, 1).flatten(0, 3) for x in own)
        # Hashed, because a CPU generator reads no more than the low 32 bits of its seed.
        seed = int(np.random.SeedSequence((self.config.seed, step)).generate_state(1)[0])
        recent = model.quantize.codebook_used
        model.quantize.update(latents, tokens, torch.Generator(recent.device).manual_seed(seed))
        found = codebook_usage(recent.long(), model.vocab_size).to(recent)
        return dict(zip(("codebook_usage", "codebook_perplexity"), found, strict=True))


def codebook_usage(tokens: Tensor, vocab_size: int) -> Tensor:
    """How much of a codebook of V codes is used by tokens, int64 of any shape in [0, V), at least one.

    Entries of -1 are no tokens. Returns (2,) float64, without waiting for a GPU: the share of codes that
    occur, in (0, 1], and the perplexity of their frequencies, in [1, V].
    """
    index = tokens.flatten() + 1
    count = exact(index.new_zeros(vocab_size + 1).index_add_(0, index, torch.ones_like(index))[1:])
    frequency = count / count.sum()
    entropy = torch.special.entr(frequency).sum()
    return torch.stack(((frequency > 0).double().mean(), entropy.exp()))


def generator_loss(discriminator: "Discriminator", fake: Tensor) -> Tensor:
    """Hinge loss of the generator; gives the discriminator's weights no gradient."""
    frozen = {name: p.detach() for name, p in discriminator.named_parameters()}
    return -torch.func.functional_call(discriminator, frozen, (fake,)).float().mean()


def discriminator_loss(discriminator: "Discriminator", real: Tensor, fake: Tensor) -> Tensor:
    """Hinge loss of the discriminator (arXiv 1705.02894); gives the generator no gradient."""
    on_real, on_fake = discriminator(torch.cat((real, fake.detach()))).float().chunk(2)
    return (F.relu(1 - on_real).mean() + F.relu(1 + on_fake).mean()) / 2


def adaptive_weight(reconstruction: Tensor, generator: Tensor, last_layer: Tensor) -> Tensor:
    """Weight in [0, 10,000] that makes both gradients at the last layer equally large (VQGAN, Eq. 7).

    Args:
        reconstruction, generator: scalar losses that depend on `last_layer`.
        last_layer: the decoder's last weight.
    """
    losses = (reconstruction, generator)
    norms = [torch.autograd.grad(x, last_layer, retain_graph=True)[0].norm() for x in losses]
    return (norms[0] / (norms[1] + 1e-4)).clamp(0, 1e4).detach()


class Discriminator(nn.Sequential):
    """PatchGAN (arXiv 1611.07004, Sec. 3.2.2): one logit per overlapping patch.

    GroupNorm in place of BatchNorm, so that the logits of an image do not depend on its batch.
    """

    def __init__(self, channels: int, layers: int):
        super().__init__(nn.Conv2d(3, channels, 4, stride=2, padding=1), nn.LeakyReLU(0.2))
        widths = [channels * min(2**i, 8) for i in range(layers + 1)]
        for i, (before, width) in enumerate(itertools.pairwise(widths), start=1):
            conv = nn.Conv2d(before, width, 4, stride=2 if i < layers else 1, padding=1, bias=False)
            self.extend((conv, nn.GroupNorm(8, width), nn.LeakyReLU(0.2)))
        self.append(nn.Conv2d(widths[-1], 1, 4, padding=1))
        self.smallest = 3 * 2**layers

    def forward(self, images: Tensor) -> Tensor:
        """Images (B, 3, H, W) in [-1, 1] to logits (B, 1, h, w), positive for real.

        Raises:
            ValueError: images too small to leave a patch.
        """
        (h, w), least = images.shape[2:], self.smallest
        text = f"the discriminator takes images of {least} x {least} pixels or more, got {h} x {w}"
        require(min(h, w) >= least, f"{text}: give fewer discriminator_layers")
        return super().forward(images)


VGG16_STAGES = ((0, 2), (5, 7), (10, 12, 14), (17, 19, 21), (24, 26, 28))
"""Indices of the convolutions in torchvision's `vgg16().features`; a 2 x 2 max-pool lies between stages."""


class FeatureDistance(nn.Module):
    """Squared distance of unit-length features, weighted by channel (LPIPS, arXiv 1801.03924, Eq. 1).

    Weights are buffers outside the state dict: they neither train nor enter checkpoints.
    """

    smallest: int
    """Pixels of the shorter side that images need."""

    def forward(self, fake: Tensor, real: Tensor) -> Tensor:
        """Mean distance of two batches (B, 3, H, W) in [-1, 1], a float32 scalar.

        Raises:
            ValueError: images are too small.
        """
        h, w = fake.shape[2:]
        text = f"lpips takes images of {self.smallest} x {self.smallest} pixels or more, got {h} x {w}"
        require(min(h, w) >= self.smallest, f"{text}: set lpips=0")
        with torch.no_grad():
            targets = self._features(real)
        pairs = enumerate(zip(self._features(fake), targets, strict=True))
        parts = [(getattr(self, f"head_{i}", 1.0) * (a - b) ** 2).sum(1).mean() for i, (a, b) in pairs]
        return torch.stack(parts).sum()

    def _features(self, images: Tensor) -> list[Tensor]:
        """Unit-length features (B, C, h, w) float32 at the end of each stage."""
        raise NotImplementedError


class PerceptualLoss(FeatureDistance):
    """In the features of VGG16, by weights from files."""

    smallest = 16
    mean: Tensor
    std: Tensor

    def __init__(self, vgg_path: str | Path, lpips_path: str | Path | None = None):
        """Read the weights; the files are those of `LossConfig`.

        Raises:
            FileNotFoundError: no such file.
            ValueError: a file without the expected weights.
        """
        super().__init__()
        convolutions = [f"features.{i}" for stage in VGG16_STAGES for i in stage]
        names = [f"{name}.{kind}" for name in convolutions for kind in ("weight", "bias")]
        for name, value in _read_weights(vgg_path, names, "torchvision's VGG16").items():
            self.register_buffer(name.replace(".", "_"), value.float(), persistent=False)
        heads = [f"lin{i}.model.1.weight" for i in range(len(VGG16_STAGES))]
        given = _read_weights(lpips_path, heads, "LPIPS's VGG16 heads") if lpips_path else {}
        for i, name in enumerate(heads):
            self.register_buffer(f"head_{i}", given.get(name, torch.ones(())).float(), persistent=False)
        # ImageNet's mean and standard deviation, for images in [-1, 1] instead of [0, 1].
        mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
        self.register_buffer("mean", (2 * mean - 1)[:, None, None], persistent=False)
        self.register_buffer("std", (2 * std)[:, None, None], persistent=False)

    def _features(self, images: Tensor) -> list[Tensor]:
        x, features = (images - self.mean) / self.std, []
        for i, stage in enumerate(VGG16_STAGES):
            x = F.max_pool2d(x, 2) if i else x
            for j in stage:
                weight, bias = getattr(self, f"features_{j}_weight"), getattr(self, f"features_{j}_bias")
                x = F.relu(F.conv2d(x, weight, bias, padding=1))
            features.append(F.normalize(x.float(), dim=1, eps=1e-10))
        return features


LITE_STAGES = (0, 2, 4, 10)
"""Blocks of EfficientNet-Lite0 at the ends of the stages of stride 2, 4, 8 and 16."""


class LitePerceptualLoss(FeatureDistance):
    """In the features of EfficientNet-Lite0, trained on ImageNet (arXiv 1905.11946), channels weighted alike.

    Its weights come with a package.
    """

    smallest = 32

    def __init__(self) -> None:
        """Load the network.

        Raises:
            ImportError: the packages of the extra `eval` are not installed.
        """
        super().__init__()
        self.network = efficientnet.load("lpips without vgg_path")
        for part in self.network.modules():
            for name, value in [*part.named_parameters(recurse=False), *part.named_buffers(recurse=False)]:
                delattr(part, name)
                part.register_buffer(name, value.detach(), persistent=False)

    def train(self, mode: bool = True) -> "LitePerceptualLoss":
        """Stays in evaluation, whatever the `mode`: batch statistics are ImageNet's."""
        return super().train(False)

    def _features(self, images: Tensor) -> list[Tensor]:
        network, features = self.network, []
        # Its pixels are (x - 127) / 128 of x in [0, 255].
        x = network._swish(network._bn0(network._conv_stem((images * 127.5 + 0.5) / 128)))
        for i, block in enumerate(network._blocks[: LITE_STAGES[-1] + 1]):
            x = block(x)
            if i in LITE_STAGES:
                features.append(F.normalize(x.float(), dim=1, eps=1e-10))
        return features


def _read_weights(path: str | Path, names: list[str], what: str) -> dict[str, Tensor]:
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist: give the path of {what} weights")
    safe = path.suffix == ".safetensors"
    try:
        state = load_file(path) if safe else torch.load(path, map_location="cpu", weights_only=True)
    except OSError:
        raise
    except Exception as e:  # whatever a damaged file makes of the parsers
        raise ValueError(f"{path} cannot be read as weights: download it again ({type(e).__name__})") from e
    missing = [name for name in names if name not in state]
    count = f"{len(missing)} of {len(names)} missing"
    require(not missing, f"{path} has no {''.join(missing[:1])} ({count}): not {what} weights")
    return {name: state[name] for name in names}
