from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from anyorder.contracts import Grid, Tokenizer
from anyorder.tokenizers.vq import WINDOW, Quantizer, VQConfig, VQModel, VQOutput, straight_through

KEYMAPS = Path(__file__).parent / "keymaps"
SMALL: dict[str, Any] = {
    "channels": 8,
    "multipliers": (1, 2),
    "res_blocks": 1,
    "z_channels": 8,
    "vocab_size": 32,
    "code_dim": 4,
    "groups": 4,
}


def small(seed: int = 0, **changes: Any) -> VQModel:
    torch.manual_seed(seed)
    return VQModel(VQConfig(**{**SMALL, **changes}))


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def pictures(b: int = 4, h: int = 8, w: int = 8, seed: int = 0) -> Tensor:
    return torch.rand(b, 3, h, w, generator=seeded(seed)) * 2 - 1


def directions(*shape: int, seed: int = 0) -> Tensor:
    return F.normalize(torch.randn(*shape, generator=seeded(seed)), dim=-1)


@pytest.mark.parametrize(("name", "multipliers"), [("vq16", (1, 1, 2, 2, 4)), ("vq8", (1, 2, 2, 4))])
def test_layout_is_that_of_the_published_files(name: str, multipliers: tuple[int, ...]) -> None:
    published = json.loads((KEYMAPS / f"llamagen_{name}.json").read_text())
    with torch.device("meta"):
        model = VQModel(VQConfig(multipliers=multipliers))
    assert {key: list(value.shape) for key, value in model.state_dict().items()} == published["keys"]
    assert sum(p.numel() for p in model.parameters()) == published["parameters"]


def test_defaults_are_vq16() -> None:
    assert VQConfig() == VQConfig(multipliers=(1, 1, 2, 2, 4))
    assert VQModel(VQConfig()).factor == 16


def test_config_survives_json() -> None:
    config = VQConfig(**{**SMALL, "codebook_update": "ema"})
    assert VQConfig(**json.loads(json.dumps(dataclasses.asdict(config)))) == config


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"channels": 0}, "channels must be at least 1, got 0"),
        ({"res_blocks": 0}, "res_blocks"),
        ({"vocab_size": 0}, "vocab_size"),
        ({"multipliers": ()}, "multipliers need"),
        ({"multipliers": (1, 0)}, "multipliers need"),
        ({"groups": 5}, r"groups=5 does not divide widths \[128, 128, 256, 256, 512\]"),
        ({"dropout": 1.0}, "dropout"),
        ({"commitment": -0.1}, "commitment"),
        ({"codebook_update": "kmeans"}, "'ema' or 'gradient', got 'kmeans'"),
        ({"ema_decay": 1.0}, "ema_decay"),
        ({"revive_after": -1}, "revive_after"),
    ],
)
def test_config_refuses(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        VQConfig(**change)


@settings(max_examples=20, deadline=None)
@given(
    levels=st.integers(1, 4),
    h=st.integers(1, 3),
    w=st.integers(1, 3),
    b=st.integers(1, 2),
    attention=st.booleans(),
)
def test_images_to_tokens_and_back(levels: int, h: int, w: int, b: int, attention: bool) -> None:
    model = small(multipliers=(1,) * levels, attention=attention)
    assert isinstance(model, Tokenizer)
    assert model.factor == 2 ** (levels - 1)
    images = pictures(b, h * model.factor, w * model.factor)
    tokens = model.encode(images)
    assert tokens.shape == (b, h * w)
    assert tokens.dtype == torch.int64
    assert 0 <= tokens.min() <= tokens.max() < model.vocab_size
    decoded = model.decode(tokens, model.grid(images))
    assert decoded.shape == images.shape
    assert decoded.abs().max() <= 1
    assert not decoded.requires_grad
    output = model(images)
    assert torch.equal(output.tokens, tokens)
    torch.testing.assert_close(output.reconstruction.clamp(-1, 1), decoded)


def test_tokens_are_in_raster_order() -> None:
    model = small(multipliers=(1, 1, 1), res_blocks=1, attention=False).eval()
    images = pictures(1, 8, 16)
    latents = model._latents(images)
    z = F.normalize(model.quant_conv(model.encoder(images)), dim=1)
    for p in range(8):
        torch.testing.assert_close(latents[0, p], z[0, :, p // 4, p % 4])


def test_decode_lays_tokens_out_in_raster_order() -> None:
    model, grid = small().eval(), Grid(2, 3)
    tokens = torch.tensor([[5, 1, 0, 31, 2, 2]])
    z = torch.empty(1, 4, 2, 3)
    for p, token in enumerate(tokens[0]):
        z[0, :, p // 3, p % 3] = F.normalize(model.quantize.embedding.weight[token], dim=0)
    expected = model.decoder(model.post_quant_conv(z)).clamp(-1, 1)
    torch.testing.assert_close(model.decode(tokens, grid), expected)


def test_rows_do_not_influence_one_another() -> None:
    model = small()
    images = pictures(3)
    torch.testing.assert_close(model(images).reconstruction[1:2], model(images[1:2]).reconstruction)


@pytest.mark.parametrize("shape", [(8, 8), (2, 1, 8, 8), (2, 3, 9, 8), (2, 3, 8, 3), (2, 3, 0, 8)])
def test_encode_refuses(shape: tuple[int, ...]) -> None:
    model = small(multipliers=(1, 1, 1))
    with pytest.raises(ValueError, match=r"shape \(B, 3, H, W\)|multiple of 4"):
        model.encode(torch.zeros(shape))


@pytest.mark.parametrize("token", [-1, 32])
def test_decode_refuses_tokens_out_of_range(token: int) -> None:
    tokens = torch.tensor([[0, 1, token, 3]])
    with pytest.raises(ValueError, match=r"tokens must lie in \[0, 32\), got"):
        small().decode(tokens, Grid(2, 2))


@pytest.mark.parametrize("shape", [(4,), (1, 5), (1, 2, 2)])
def test_decode_refuses_tokens_that_do_not_fit_the_grid(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"takes tokens of shape \(B, 4\)"):
        small().decode(torch.zeros(shape, dtype=torch.int64), Grid(2, 2))


def test_decode_of_no_images_is_no_images() -> None:
    assert small().decode(torch.zeros(0, 4, dtype=torch.int64), Grid(2, 2)).shape == (0, 3, 4, 4)


def quantizer(**changes: Any) -> Quantizer:
    torch.manual_seed(0)
    return Quantizer(VQConfig(**{**SMALL, "vocab_size": 7, **changes}))


@pytest.mark.parametrize("vocab_size", [7, 2**20])
def test_nearest_is_the_closest_code_at_any_length(vocab_size: int) -> None:
    quantize = quantizer(vocab_size=vocab_size, code_dim=2)
    scale = torch.rand(vocab_size, 1, generator=seeded(1)) + 0.1
    quantize.embedding.weight.data *= scale
    latents = directions(5, 6, 2, seed=2)
    tokens = quantize.nearest(latents)
    codes = F.normalize(quantize.embedding.weight, dim=-1)
    chosen = (latents * codes[tokens]).sum(-1)
    best = torch.stack([(codes @ z).max() for z in latents.flatten(0, 1)]).view(5, 6)
    torch.testing.assert_close(chosen, best)
    distances = [(codes - z).norm(dim=-1).min() for z in latents.flatten(0, 1)]
    torch.testing.assert_close(
        (2 - 2 * chosen).clamp_min(0).sqrt().flatten(), torch.stack(distances), atol=1e-3, rtol=0
    )
    torch.testing.assert_close(quantize.lookup(tokens), codes[tokens])


def test_every_code_is_its_own_nearest() -> None:
    quantize = quantizer()
    assert torch.equal(quantize.nearest(quantize.lookup(torch.arange(7))), torch.arange(7))


def test_straight_through_has_the_value_of_codes_and_the_gradient_of_latents() -> None:
    latents, codes = directions(2, 3, 4).requires_grad_(), directions(2, 3, 4, seed=1).requires_grad_()
    quantized = straight_through(latents, codes)
    torch.testing.assert_close(quantized, codes)
    gradient = directions(2, 3, 4, seed=2)
    quantized.backward(gradient)
    assert torch.equal(latents.grad, gradient)
    assert codes.grad is None


def test_encoder_learns_from_the_reconstruction_through_the_quantisation() -> None:
    model = small()
    model(pictures()).reconstruction.square().mean().backward()
    assert model.encoder.conv_in.weight.grad.abs().sum() > 0
    assert model.quantize.embedding.weight.grad is None


@pytest.mark.parametrize("update", ["ema", "gradient"])
def test_losses_have_their_closed_form(update: str) -> None:
    model = small(codebook_update=update, commitment=0.5)
    output = model(pictures())
    codes = F.normalize(model.quantize.embedding.weight, dim=-1)[output.tokens]
    error = (codes - output.latents).square().mean()
    torch.testing.assert_close(output.commitment_loss, 0.5 * error)
    torch.testing.assert_close(output.codebook_loss, error if update == "gradient" else torch.tensor(0.0))
    model.zero_grad()
    output.codebook_loss.backward() if update == "gradient" else output.commitment_loss.backward()
    assert (model.quantize.embedding.weight.grad is None) == (update == "ema")
    assert (model.encoder.conv_in.weight.grad is None) == (update == "gradient")


def test_losses_are_float32_under_autocast() -> None:
    model = small()
    with torch.autocast("cpu", torch.bfloat16):
        output = model(pictures())
        tokens = model.encode(pictures())
    assert output.reconstruction.dtype == torch.bfloat16
    assert output.latents.dtype == output.commitment_loss.dtype == output.codebook_loss.dtype == torch.float32
    assert torch.equal(output.tokens, tokens)


def batch_of(latents: Tensor, quantize: Quantizer) -> tuple[Tensor, Tensor]:
    return latents, quantize.nearest(latents)


def test_first_update_seeds_every_code_from_the_data() -> None:
    quantize = quantizer(codebook_update="ema")
    latents, tokens = batch_of(directions(50, 4), quantize)
    quantize.update(latents, tokens, seeded(0))
    distance = torch.cdist(quantize.embedding.weight, latents).min(dim=1).values
    assert torch.all(distance == 0)
    assert len(quantize.embedding.weight.unique(dim=0)) == 7
    assert torch.equal(quantize.idle, torch.zeros(7, dtype=torch.int64))


def test_seeding_takes_batches_smaller_than_the_codebook() -> None:
    quantize = quantizer(codebook_update="ema")
    latents, tokens = batch_of(directions(3, 4), quantize)
    quantize.update(latents, tokens, seeded(0))
    assert torch.all(torch.cdist(quantize.embedding.weight, latents).min(dim=1).values == 0)


def test_moving_average_has_its_closed_form() -> None:
    quantize = quantizer(codebook_update="ema", ema_decay=0.8)
    quantize.idle.zero_()
    sums = quantize.embedding.weight.clone()
    for seed in range(4):
        latents, tokens = batch_of(directions(9, 4, seed=seed), quantize)
        quantize.update(latents, tokens, seeded(seed))
        for k in set(tokens.tolist()):
            sums[k] = 0.8 * sums[k] + 0.2 * latents[tokens == k].sum(0)
        torch.testing.assert_close(quantize.embedding.weight, sums)
        torch.testing.assert_close(quantize.lookup(torch.arange(7)), F.normalize(sums, dim=-1))


def test_moving_average_finds_the_clusters() -> None:
    quantize = quantizer(codebook_update="ema", ema_decay=0.5)
    centres = torch.eye(4)
    for seed in range(30):
        noise = 0.05 * torch.randn(64, 4, generator=seeded(seed))
        latents, tokens = batch_of(F.normalize(centres.repeat(16, 1) + noise, dim=-1), quantize)
        quantize.update(latents, tokens, seeded(seed))
    assert (quantize.lookup(quantize.nearest(centres)) * centres).sum(-1).min() > 0.99


def test_a_code_out_of_use_stands_still() -> None:
    quantize = quantizer(codebook_update="ema")
    quantize.idle.zero_()
    latents, tokens = batch_of(directions(1, 4).repeat(20, 1), quantize)
    others = torch.arange(7) != tokens[0]
    before = quantize.embedding.weight.clone()
    quantize.update(latents, tokens, seeded(0))
    assert torch.equal(quantize.embedding.weight[others], before[others])
    assert not torch.equal(quantize.embedding.weight[~others], before[~others])
    assert torch.equal(quantize.idle, others.long())


@pytest.mark.parametrize("update", ["ema", "gradient"])
def test_revival_brings_the_codebook_into_use(update: str) -> None:
    def used_after(revive_after: int) -> int:
        quantize = quantizer(vocab_size=64, codebook_update=update, revive_after=revive_after)
        quantize.embedding.weight.data = F.normalize(torch.ones(64, 4) + 1e-3 * directions(64, 4), dim=-1)
        if hasattr(quantize, "idle"):
            quantize.idle.zero_()
        for seed in range(40):
            latents, tokens = batch_of(directions(512, 4, seed=seed), quantize)
            quantize.update(latents, tokens, seeded(seed))
        return len(quantize.nearest(directions(4096, 4, seed=99)).unique())

    assert used_after(revive_after=0) < 40
    assert used_after(revive_after=3) >= 60


def test_revival_waits_for_its_time_and_goes_where_the_error_is() -> None:
    quantize = quantizer(vocab_size=2, revive_after=2)
    quantize.idle.zero_()
    quantize.embedding.weight.data = torch.eye(4)[:2]
    near, far = torch.eye(4)[0].repeat(99, 1), torch.tensor([[0.6, 0.0, 0.8, 0.0]])
    for expected in (torch.eye(4)[1], far[0]):
        latents, tokens = batch_of(torch.cat((near, far)), quantize)
        quantize.update(latents, tokens, seeded(0))
        torch.testing.assert_close(quantize.embedding.weight.data[1], expected)


def test_recent_tokens_are_remembered_oldest_first() -> None:
    quantize = quantizer()
    assert torch.all(quantize.codebook_used == -1)
    for tokens in (torch.tensor([1, 2]), torch.tensor([3])):
        quantize.update(directions(len(tokens), 4), tokens, seeded(0))
    assert quantize.codebook_used[-4:].tolist() == [-1, 1, 2, 3]
    quantize.update(directions(WINDOW + 5, 4), torch.arange(WINDOW + 5) % 7, seeded(0))
    assert torch.equal(quantize.codebook_used, ((torch.arange(WINDOW) + 5) % 7).float())


def test_published_configuration_learns_by_gradient_alone() -> None:
    quantize = quantizer()
    before = quantize.embedding.weight.clone()
    quantize.update(*batch_of(directions(9, 4), quantize), seeded(0))
    assert torch.equal(quantize.embedding.weight, before)
    assert set(quantize.state_dict()) == {"embedding.weight", "codebook_used"}


def train(model: VQModel, steps: range) -> VQOutput:
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.05)
    for step in steps:
        output = model(pictures(seed=step))
        model.quantize.update(output.latents.detach().flatten(0, 1), output.tokens.flatten(), seeded(step))
        optimizer.zero_grad()
        loss = output.reconstruction.square().mean() + output.commitment_loss + output.codebook_loss
        loss.backward()
        optimizer.step()
    return output


@pytest.mark.parametrize("update", ["ema", "gradient"])
def test_resumed_training_is_bit_identical(update: str) -> None:
    changes: dict[str, Any] = {"codebook_update": update, "revive_after": 2}
    straight, resumed = small(**changes), small(seed=1, **changes)
    train(straight, range(4))
    resumed.load_state_dict(straight.state_dict())
    train(straight, range(4, 9))
    train(resumed, range(4, 9))
    assert straight.state_dict().keys() == resumed.state_dict().keys()
    for key, value in straight.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[key]), key


def update_by_values(self: Quantizer, latents: Tensor, tokens: Tensor, generator: torch.Generator) -> None:
    """`Quantizer.update` as it reads: it looks at which codes are dead, and at how many."""

    def reseed(dead: Tensor) -> None:
        error, count = 1 - (latents * self.lookup(tokens)).sum(-1), int(dead.sum())
        again = count > len(error)
        chosen = torch.multinomial(error.clamp_min(1e-6), count, replacement=again, generator=generator)
        self.embedding.weight[dead] = latents[chosen]
        self.idle[dead] = 0

    if self.idle[0] < 0:
        return reseed(torch.ones_like(self.idle, dtype=torch.bool))
    used = torch.bincount(tokens, minlength=len(self.idle)) > 0
    if self.config.codebook_update == "ema":
        self._follow(latents, tokens, used)
    self.idle.copy_(torch.where(used, 0, self.idle + 1))
    dead = self.idle >= self.config.revive_after
    if self.config.revive_after and dead.any():
        reseed(dead)


@pytest.mark.parametrize("update", ["ema", "gradient"])
@pytest.mark.parametrize(("vocab_size", "revive_after"), [(32, 1), (32, 2), (300, 1), (300, 2), (80, 0)])
@torch.no_grad()
def test_codes_are_revived_without_looking_as_by_looking(update, vocab_size, revive_after) -> None:
    """64 outputs a step: fewer than there are codes, dead codes, or enough for all."""
    if update == "gradient" and not revive_after:
        return
    config = VQConfig(vocab_size=vocab_size, code_dim=4, codebook_update=update, revive_after=revive_after)
    blind, looking, revived = Quantizer(config), Quantizer(config), []
    looking.load_state_dict(blind.state_dict())
    for step in range(8):
        latents = directions(64, 4, seed=step)
        tokens = blind.nearest(latents)
        before = blind.embedding.weight.clone()
        blind.update(latents, tokens, seeded(step))
        update_by_values(looking, latents, tokens, seeded(step))
        assert torch.equal(blind.embedding.weight, looking.embedding.weight)
        assert torch.equal(blind.idle, looking.idle)
        moved = (blind.embedding.weight != before).any(1)
        revived.append(int(moved.sum() - moved[tokens.unique()].sum()))
    assert any(revived[1:]) == (revive_after > 0)


def test_same_seed_same_codebook() -> None:
    first, second, other = (small(codebook_update="ema") for _ in range(3))
    for model, seed in ((first, 5), (second, 5), (other, 6)):
        output = model(pictures())
        model.quantize.update(output.latents.detach().flatten(0, 1), output.tokens.flatten(), seeded(seed))
    assert torch.equal(first.quantize.embedding.weight, second.quantize.embedding.weight)
    assert not torch.equal(first.quantize.embedding.weight, other.quantize.embedding.weight)


@pytest.mark.parametrize("mode", [True, False])
def test_forward_encode_and_decode_change_nothing(mode: bool) -> None:
    model = small(codebook_update="ema", revive_after=1).train(mode)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    output = model(pictures())
    model.decode(model.encode(pictures()), Grid(4, 4))
    assert output.tokens.shape == (4, 16)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_dropout_acts_in_training_only() -> None:
    model = small(dropout=0.5)
    torch.manual_seed(0)
    assert not torch.equal(model(pictures()).latents, model(pictures()).latents)
    model.eval()
    assert torch.equal(model(pictures()).latents, model(pictures()).latents)


def test_attention_sees_the_whole_image() -> None:
    images = pictures(1, 64, 64).requires_grad_()
    seen = {}
    for attention in (True, False):
        model = small(attention=attention, multipliers=(1, 1), groups=8)
        h = model.encoder.mid[1](images.mean(1, keepdim=True).expand(-1, 8, -1, -1))
        (gradient,) = torch.autograd.grad(h[0, 0, 0, 0], images)
        seen[attention] = int((gradient != 0).any(1).sum())
    assert seen[False] == 1
    assert seen[True] > 4000
