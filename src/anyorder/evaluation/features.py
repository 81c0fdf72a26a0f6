"""Feature extractors: the spaces that images are compared in.

Only the Inception network of 2015 may call its Fréchet distance "FID". Every other extractor reports
"FD (name)": its numbers compare with those of the same extractor only.
"""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from anyorder import efficientnet
from anyorder.contracts import require
from anyorder.families import Family
from anyorder.files import sha256

INCEPTION_SHA256 = "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2"
INCEPTION_FILE = "weights-inception-2015-12-05-6726825d.pth"
INCEPTION_URL = f"https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/{INCEPTION_FILE}"


class FeatureExtractor(Protocol):
    """Maps images to features and logits."""

    name: str
    """Names the network *and* its weights: statistics of different names are never compared."""
    metric: str
    """What the Fréchet distance in this feature space is called: "FID" or "FD (name)"."""
    dim: int
    num_classes: int
    """0 where the network has no classes: there is no Inception Score then."""

    def __call__(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Images (B, 3, H, W) uint8 to features (B, dim) and logits (B, num_classes), both float32."""
        ...


def _digest(network: nn.Module) -> str:
    """A short hash of the weights."""
    digest = hashlib.sha256()
    for name, tensor in sorted(network.state_dict().items()):
        digest.update(name.encode() + tensor.detach().cpu().float().numpy().tobytes())
    return digest.hexdigest()[:8]


class Inception2015:
    """The Inception network of FID (Heusel et al. 2017, arXiv 1706.08500) as ported by torch-fidelity.

    Features are the 2048 pooled activations, logits the 1008 outputs without bias (Inception Score).
    """

    name = "inception-2015"
    metric = "FID"
    dim = 2048
    num_classes = 1008

    def __init__(self, weights: str | Path | None = None, device: torch.device | str = "cpu"):
        """Load the network from a file; None: from torch's hub cache, or downloaded (96 MB).

        Raises:
            ImportError: torch-fidelity, or the torchvision that it needs, cannot be imported.
            FileNotFoundError: the weights can be neither found nor downloaded.
            ValueError: the file holds other weights; distances would not be FID.
        """
        try:
            from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
        except (ImportError, RuntimeError) as e:  # RuntimeError: a torchvision built for another torch
            mend = "with the torchvision of your torch, or evaluate with a classifier"
            raise ImportError(f"FID needs torch-fidelity ({e}): pip install 'anyorder[fid]', {mend}") from e
        path, self.device = inception_weights(weights), device
        self.network = FeatureExtractorInceptionV3(self.name, ["2048", "logits_unbiased"], str(path))
        self.network.to(device)

    @torch.inference_mode()
    def __call__(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Images (B, 3, H, W) uint8 to features (B, 2048) and logits (B, 1008), both float32."""
        features, logits = self.network(images.to(self.device))
        return features.float(), logits.float()


def inception_weights(path: str | Path | None = None) -> Path:
    """The verified weights file of Inception-2015, downloaded if `path` is None and the cache is empty.

    Raises:
        FileNotFoundError: it is not there and cannot be downloaded.
        ValueError: the file's hash is not that of the original weights.
    """
    if path is None:
        path = Path(torch.hub.get_dir(), "checkpoints", INCEPTION_FILE)
        if not path.is_file():
            _download(path)
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no Inception weights at {path}: download {INCEPTION_URL} to that file")
    found, right = sha256(path), INCEPTION_SHA256
    text = f"{path} has sha256 {found[:8]}…, the weights that define FID have {right[:8]}…: delete it and"
    require(found == right, f"{text} download {INCEPTION_URL}")
    return path


def _download(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        torch.hub.download_url_to_file(INCEPTION_URL, str(path), hash_prefix=INCEPTION_SHA256)
    except (OSError, RuntimeError) as e:  # RuntimeError: the hash differs (a proxy's error page, say)
        mend = f"fetch {INCEPTION_URL} on another machine and put it at {path}, or evaluate with a classifier"
        raise FileNotFoundError(f"the Inception weights cannot be downloaded ({e}): {mend}") from e


@dataclass(frozen=True)
class ClassifierConfig:
    """Shape of the classifier whose features serve where Inception's do not (small, unnatural images)."""

    num_classes: int
    """Classes in the data set, at least 2."""
    image_size: int = 32
    """Shorter side of the images in pixels, at least 16."""
    channels: tuple[int, ...] = (32, 64, 128)
    """Widths of 1 to 4 stages, multiples of 8; the sides halve from 16 on; features have the last width."""
    label_smoothing: float = 0.1
    """Share of the target spread over all classes (Szegedy et al. 2016, arXiv 1512.00567), in [0, 1)."""

    def __post_init__(self) -> None:
        text = f"a classifier needs at least 2 classes, the data set has {self.num_classes}: evaluate with "
        require(self.num_classes >= 2, f"{text}Inception-2015, or give the data set labels")
        text = f"the classifier takes images of at least 16 pixels, got {self.image_size}"
        require(self.image_size >= 16, text)
        if not 1 <= len(self.channels) <= 4 or any(c < 8 or c % 8 for c in self.channels):
            raise ValueError(f"channels must be 1 to 4 positive multiples of 8, got {self.channels}")


class ResidualBlock(nn.Module):
    """Pre-activation residual block (He et al. 2016, arXiv 1603.05027) with group normalisation."""

    def __init__(self, channels: int):
        super().__init__()
        self.norm1, self.norm2 = nn.GroupNorm(8, channels), nn.GroupNorm(8, channels)
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, h, w) to the same shape."""
        h = self.conv1(F.relu(self.norm1(x)))
        return x + self.conv2(F.relu(self.norm2(h)))


class Classifier(nn.Module):
    """Small residual network trained on the data set's own labels: 0.43 M parameters by default.

    A strided stem brings any image size to 16x16, so that 64x64 images cost hardly more than 32x32.
    """

    def __init__(self, config: ClassifierConfig):
        super().__init__()
        self.config = config
        widths, stride = config.channels, config.image_size // 16
        stages = [nn.Conv2d(3, widths[0], stride + 2, stride, padding=1), ResidualBlock(widths[0])]
        for before, width in pairwise(widths):
            stages += [nn.Conv2d(before, width, 2, 2), ResidualBlock(width)]
        self.trunk = nn.Sequential(*stages, nn.GroupNorm(8, widths[-1]), nn.ReLU())
        self.head = nn.Linear(widths[-1], config.num_classes)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Images (B, 3, H, W) float in [-1, 1] to features (B, channels[-1]) and logits (B, classes).

        Raises:
            ValueError: the images are not of the size that the classifier was made for.
        """
        h, w, side = *images.shape[-2:], self.config.image_size
        text = f"the classifier was made for images of {side} pixels (shorter side), got {h}x{w}"
        require(min(h, w) == side, f"{text}: resize them, or train another classifier")
        features = self.trunk(images).mean((2, 3))
        return features, self.head(features)

    def loss(self, images: Tensor, labels: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Smoothed cross entropy in nats and accuracy in [0, 1] of images in [-1, 1] and labels (B,)."""
        logits = self(images)[1].float()
        loss = F.cross_entropy(logits, labels, label_smoothing=self.config.label_smoothing)
        return loss, {"accuracy": (logits.argmax(1) == labels).float().mean()}


FAMILY = Family(Classifier, ClassifierConfig)


class ClassifierFeatures:
    """A trained classifier as a feature extractor, named after a hash of its weights."""

    def __init__(self, classifier: Classifier):
        self.classifier = classifier
        self.name = f"classifier-{_digest(classifier)}"
        self.metric = f"FD ({self.name})"
        self.dim = classifier.config.channels[-1]
        self.num_classes = classifier.config.num_classes

    @torch.inference_mode()
    def __call__(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Images (B, 3, H, W) uint8 to features (B, dim) and logits (B, num_classes), both float32."""
        images = images.to(self.classifier.head.weight.device).float() / 127.5 - 1
        return self.classifier(images)


class PretrainedFeatures:
    """A network trained on other images: it knows neither the data set nor its labels."""

    def __init__(
        self, name: str, network: nn.Module, pooled: Callable[[Tensor], Tensor], head: nn.Module | None,
        size: tuple[int, int], mean: Any, std: Any, mode: str, device: torch.device | str, bf16: bool,
    ):  # fmt: skip
        """Features are `pooled` of images (B, 3, *size) normalised by `mean` and `std`; logits are `head`'s.

        Images in [0, 1] are resized by `mode`, with antialiasing; other aspect ratios are stretched. With
        `bf16` the network computes under bfloat16 autocast, and name and metric say so.
        """
        self.bf16, name = bf16, f"{name}, bf16" if bf16 else name
        self.network, self.device = network.to(device).eval(), device
        self.pooled, self.head, self.size, self.mode = pooled, head, size, mode
        self.mean, self.std = (torch.tensor(x, device=device).view(-1, 1, 1) for x in (mean, std))
        self.name, self.metric = f"{name}-{_digest(network)}", f"FD ({name})"
        found = self(torch.zeros(1, 3, *size, dtype=torch.uint8))
        self.dim, self.num_classes = (x.shape[1] for x in found)

    @torch.inference_mode()
    def __call__(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Images (B, 3, H, W) uint8 to features (B, dim) and logits (B, num_classes), both float32."""
        pixels = images.to(self.device).float() / 255
        resized = F.interpolate(pixels, self.size, mode=self.mode, antialias=True).clamp(0, 1)
        with torch.autocast(torch.device(self.device).type, torch.bfloat16, enabled=self.bf16):
            features = self.pooled((resized - self.mean) / self.std).float()
        return features, features[:, :0] if self.head is None else self.head(features).float()


LITE = "efficientnet-lite0"
TIMM = "timm:"
"""Before the name of a model of the library timm."""


def efficientnet_lite(device: torch.device | str = "cpu", bf16: bool = False) -> PretrainedFeatures:
    """EfficientNet-Lite0, trained on ImageNet, see `efficientnet`.

    Features are the 1,280 channels before the classes, averaged over 4x4 places of images of 128 pixels;
    pixels are normalised as in its training, (x - 127) / 128.

    Raises:
        ImportError: the packages of the extra `eval` are not installed.
    """
    network = efficientnet.load(f"extractor={LITE}")
    return PretrainedFeatures(
        LITE, network, lambda x: network.extract_features(x).mean((2, 3)), network._fc,
        (128, 128), [127 / 255], [128 / 255], "bilinear", device, bf16,
    )  # fmt: skip


def timm_features(name: str, device: torch.device | str = "cpu", bf16: bool = False) -> PretrainedFeatures:
    """A pretrained model of the library timm, say `timm:vit_small_patch14_dinov2.lvd142m`, downloaded once.

    Features are what its classes are made from; size and normalisation are those of its training.

    Raises:
        ImportError: timm is not installed.
        ValueError: timm knows no such model, or cannot load it.
    """
    try:
        import timm
    except ImportError as e:
        raise ImportError(f"{name} needs the library timm ({e}): pip install 'anyorder[timm]'") from e
    try:
        network = timm.create_model(name.removeprefix(TIMM), pretrained=True)
    except (RuntimeError, OSError) as e:
        known = "choose a name of timm.list_models(pretrained=True), and let it download the weights once"
        raise ValueError(f"extractor={name} cannot be loaded ({e}): {known}") from e
    made = timm.data.resolve_model_data_config(network)
    head = network.get_classifier() if network.num_classes else None
    return PretrainedFeatures(
        name, network, lambda x: network.forward_head(network.forward_features(x), pre_logits=True), head,
        made["input_size"][1:], made["mean"], made["std"], made["interpolation"], device, bf16,
    )  # fmt: skip
