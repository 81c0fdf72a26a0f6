"""What the contract does not ask of the adapters: layouts, rotations, the raster model, joint steps."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from conftest import GRID, PUBLISHED, incremental, published, seeded
from torch.testing import assert_close

from anyorder.adapters.arpg import ARPG
from anyorder.adapters.layers import GPTConfig, heads_of, rotate, rotation_table
from anyorder.adapters.llamagen import LlamaGen
from anyorder.adapters.randar import RandAR
from anyorder.contracts import AnyOrderModel, Grid, Tokenizer
from anyorder.method.decoding import complete, sample
from anyorder.method.guidance import GuidanceConfig, Guided
from anyorder.method.policy_config import PolicyConfig
from anyorder.method.sampling import Streams
from anyorder.orders import random_orders
from anyorder.tokenizers.maskgit_vq import MaskGITVQ, MaskGITVQConfig

KEYMAPS = Path(__file__).parent / "keymaps"
CLOSE = {"rtol": 1e-4, "atol": 2e-5}
L, XL, XXL = {}, {"depth": 36, "width": 1280, "heads": 20}, {"depth": 48, "width": 1536, "heads": 24}
FAMILIES = {**PUBLISHED, "llamagen": LlamaGen}


@pytest.fixture(autouse=True)
def _no_grad():
    with torch.no_grad():
        yield


# --- layouts ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "model_class", "config"),
    [
        ("randar_l_llamagen", RandAR, GPTConfig()),
        ("randar_l_maskgit", RandAR, GPTConfig(vocab_size=1024)),
        ("randar_xl_llamagen", RandAR, GPTConfig(**XL)),
        ("arpg_l", ARPG, GPTConfig()),
        ("arpg_xl", ARPG, GPTConfig(**XL)),
        ("arpg_xxl", ARPG, GPTConfig(**XXL)),
        ("maskgit_vq", MaskGITVQ, MaskGITVQConfig()),
    ],
)
def test_layout_is_that_of_the_published_files(name, model_class, config):
    expected = json.loads((KEYMAPS / f"{name}.json").read_text())
    with torch.device("meta"):
        model = model_class(config)
    assert {key: list(value.shape) for key, value in model.state_dict().items()} == expected["keys"]
    assert sum(p.numel() for p in model.parameters()) == expected["parameters"]


@pytest.mark.parametrize(
    ("size", "millions"),
    [({"depth": 12, "width": 768, "heads": 12}, 110.9), (L, 342.9), (XL, 774.7), (XXL, 1411)],
)
def test_llamagen_has_the_layout_of_randar_without_its_query(size, millions):
    with torch.device("meta"):
        raster, any_order = LlamaGen(GPTConfig(**size)), RandAR(GPTConfig(**size))
    assert raster.state_dict().keys() == any_order.state_dict().keys() - {"pos_instruct_embeddings"}
    assert sum(p.numel() for p in raster.parameters()) / 1e6 == pytest.approx(millions, abs=1)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"depth": 0}, "depth must be >= 1, got 0"),
        ({"num_classes": 0}, "num_classes"),
        ({"width": 100}, "multiple of 4 . heads = 64, got 100"),
        ({"label_dropout": 1.0}, "label_dropout"),
        ({"grid": (0, 3)}, "0 x 3"),
    ],
)
def test_config_refuses(change, message):
    with pytest.raises(ValueError, match=message):
        GPTConfig(**change)


def test_two_decoders_need_an_even_depth():
    with pytest.raises(ValueError, match="even, half for each decoder, got 3"):
        published(ARPG, depth=3)


def test_heads_of_published_widths():
    assert [heads_of(width) for width in (768, 1024, 1280, 1536, 3200)] == [12, 16, 20, 24, 32]
    with pytest.raises(ValueError, match=r"heads=\.\.\."):
        heads_of(100)


# --- rotations --------------------------------------------------------------------------------------------


def test_the_class_token_has_no_rotation_at_all():
    """Its row is zero, not the identity: published weights were trained so."""
    table = rotation_table(Grid(3, 4), 8)
    assert table.shape == (13, 4)
    assert torch.equal(table[-1], torch.zeros(4, dtype=torch.complex64))
    assert_close(table[:-1].abs(), torch.ones(12, 4))
    assert_close(table[0], torch.ones(4, dtype=torch.complex64))


def test_first_half_of_the_angles_is_the_row_second_half_the_column():
    table = rotation_table(Grid(3, 4), 8)
    row, column, frequencies = 2, 3, torch.tensor([1.0, 0.01])
    angles = torch.cat((row * frequencies, column * frequencies))
    assert_close(table[row * 4 + column], torch.polar(torch.ones(4), angles))


def test_low_frequencies_are_stretched_to_the_extent_of_training():
    """On a larger grid the highest frequency turns by the patch, the others as far as in training."""
    trained, large = Grid(3, 4), Grid(6, 8)
    table = rotation_table(large, 16, stretched_to=trained, extrapolated=1)
    plain, before = rotation_table(large, 16), rotation_table(trained, 16)
    high, low = [0, 4], [1, 2, 3, 5, 6, 7]
    assert_close(table[:, high], plain[:, high])
    assert_close(table[large.n - 1, low], before[trained.n - 1, low])
    assert_close(table[0], before[0])
    assert_close(rotation_table(trained, 16, stretched_to=trained), before)
    assert_close(rotation_table(large, 16, stretched_to=trained, extrapolated=4), plain)


@pytest.mark.parametrize("name", ["randar", "arpg"])
def test_stretching_changes_other_grids_only(name):
    model = published(PUBLISHED[name])
    stretched = published(PUBLISHED[name], extrapolated=0)
    for grid, same in ((GRID, True), (Grid(5, 6), False)):
        tokens = torch.randint(5, (2, grid.n), generator=seeded(0))
        order = random_orders(2, grid, seeded(1))
        found = [each.forward(tokens, None, order, grid) for each in (model, stretched)]
        assert torch.allclose(*found) == same
    with pytest.raises(ValueError, match="extrapolated must be >= 0"):
        GPTConfig(extrapolated=-1)


def test_rotation_multiplies_neighbours():
    x, angle = torch.tensor([1.0, 0.0, 0.0, 2.0]), torch.tensor([0.3, 0.5])
    turned = rotate(x.view(1, 1, 1, 4), torch.polar(torch.ones(2), angle).view(1, 1, 2)).flatten()
    c, s = angle.cos(), angle.sin()
    assert_close(turned, torch.stack((c[0], s[0], -2 * s[1], 2 * c[1])))


def test_attention_depends_on_displacements_only():
    table = rotation_table(Grid(4, 4), 8)
    q, k = (torch.randn(1, 1, 1, 8, generator=seeded(seed)) for seed in (0, 1))

    def score(a: int, b: int) -> torch.Tensor:
        return (rotate(q, table[None, a : a + 1]) * rotate(k, table[None, b : b + 1])).sum()

    assert_close(score(0, 6), score(5, 11))
    assert not torch.isclose(score(0, 6), score(0, 7))


# --- labels -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FAMILIES)
def test_labels(name):
    model = published(FAMILIES[name])
    tokens, raster = torch.zeros(2, GRID.n, dtype=torch.int64), torch.arange(GRID.n).expand(2, -1)
    null = model(tokens, None, raster)
    assert torch.equal(model(tokens, torch.tensor([-1, -1]), raster), null)
    labelled = model(tokens, torch.tensor([0, 1]), raster)
    assert not torch.allclose(labelled[0], null[0])
    assert not torch.allclose(labelled[0], labelled[1])
    for bad in ([3, 0], [0], [-2, 0]):
        with pytest.raises(ValueError, match=r"lie in \[0, 3\)"):
            model.start(2, torch.tensor(bad))
    with pytest.raises(ValueError, match=r"needs tokens and order of shape \(B, 6\)"):
        model(tokens[:, :5], None, raster)


@pytest.mark.parametrize("name", FAMILIES)
def test_used_states_and_the_null_label_are_refused(name):
    model, raster = published(FAMILIES[name]), torch.arange(GRID.n).expand(2, -1)
    tokens = torch.zeros(2, GRID.n, dtype=torch.int64)
    state = model.start(2)
    following = model.append(state, raster[:, :1], tokens[:, :1])
    for use in (
        lambda: model.score(state, raster[:, 1:2]),
        lambda: model.append(state, raster[:, 1:2], tokens[:, 1:2]),
    ):
        with pytest.raises(ValueError, match="used up by append"):
            use()
    assert model.score(following, raster[:, 1:2]).isfinite().all()
    with pytest.raises(ValueError, match=r"lie in \[0, 3\)"):
        model(tokens, torch.tensor([0, 3]), raster)


@pytest.mark.parametrize("name", FAMILIES)
def test_labels_are_dropped_in_training_only(name):
    model = published(FAMILIES[name], label_dropout=0.99)
    tokens, raster = torch.zeros(1, GRID.n, dtype=torch.int64), torch.arange(GRID.n)[None]
    labelled, null = model(tokens, torch.tensor([0]), raster), model(tokens, None, raster)
    torch.manual_seed(0)
    assert_close(model.train()(tokens, torch.tensor([0]), raster), null, **CLOSE)
    assert_close(model.eval()(tokens, torch.tensor([0]), raster), labelled, **CLOSE)


# --- LlamaGen ---------------------------------------------------------------------------------------------

RASTER = torch.arange(GRID.n).expand(3, -1)
TOKENS = torch.randint(5, (3, GRID.n), generator=seeded(0))
LABELS = torch.tensor([0, 1, 2])


def test_raster_teacher_forced_equals_incremental():
    model = published(LlamaGen)
    assert isinstance(model, AnyOrderModel)
    forward = model(TOKENS, LABELS, RASTER)
    assert_close(incremental(model, TOKENS, LABELS, RASTER), forward, **CLOSE)
    state = model.append(model.start(3, LABELS), RASTER[:, :4], TOKENS[:, :4])
    assert_close(model.score(state, RASTER[:, 4:5]), forward[:, 4:5], **CLOSE)
    guided = Guided(model, GuidanceConfig(2.0))
    assert_close(incremental(guided, TOKENS, LABELS, RASTER), guided.forward(TOKENS, LABELS, RASTER), **CLOSE)


@pytest.mark.parametrize("training", [False, True])
def test_raster_model_never_sees_later_tokens(training):
    model = published(LlamaGen, label_dropout=0.0).train(training)
    before = model(TOKENS, LABELS, RASTER)
    for step in range(GRID.n):
        other = TOKENS.clone()
        other[:, step:] = (other[:, step:] + 1) % 5
        after = model(other, LABELS, RASTER)
        assert torch.equal(after[:, : step + 1], before[:, : step + 1])
        assert step == GRID.n - 1 or not torch.allclose(after[:, step + 1 :], before[:, step + 1 :])


def test_raster_model_on_another_grid():
    grid = Grid(4, 2)
    tokens, raster = torch.randint(5, (2, 8), generator=seeded(1)), torch.arange(8).expand(2, -1)
    model = published(LlamaGen)
    forward = model(tokens, None, raster, grid)
    assert_close(incremental(model, tokens, None, raster, grid), forward, **CLOSE)


def test_raster_model_refuses_every_other_order():
    model = published(LlamaGen)
    refusal = "raster order only.*order='raster'"
    with pytest.raises(ValueError, match=refusal):
        model(TOKENS, LABELS, random_orders(3, GRID, seeded(0)))
    with pytest.raises(ValueError, match=refusal):
        model(TOKENS, LABELS, torch.cat((RASTER[:2], RASTER[:1].flip(1))))
    state = model.start(3, LABELS)
    with pytest.raises(ValueError, match=r"positions \[1\] where 0 is next"):
        model.score(state, RASTER[:, 1:2])
    with pytest.raises(ValueError, match="2 candidates at once"):
        model.score(state, RASTER[:, :2])
    with pytest.raises(ValueError, match=refusal):
        model.append(state, RASTER[:, 1:2], TOKENS[:, 1:2])
    for order in ("entropy", "random", "snake"):
        with pytest.raises(ValueError, match=refusal):
            sample(model, order, Streams(range(3)), condition=LABELS)


def test_raster_model_draws_and_completes_in_raster_order():
    model = published(LlamaGen)
    made = sample(model, "raster", Streams(range(3)), condition=LABELS)
    known = torch.arange(GRID.n).expand(3, -1) < 3
    again = complete(model, made.tokens, known, "raster", Streams(range(3)), condition=LABELS)
    assert torch.equal(again.tokens[:, :3], made.tokens[:, :3])
    assert torch.equal(again.order, RASTER)


# --- steps of several positions ---------------------------------------------------------------------------


def joint(model):
    model.config = dataclasses.replace(model.config, joint_steps=True)
    return model


@pytest.mark.parametrize("name", PUBLISHED)
def test_joint_steps_change_nothing_one_position_at_a_time(name):
    order = random_orders(3, GRID, seeded(0))
    forward = published(PUBLISHED[name])(TOKENS, LABELS, order)
    assert_close(incremental(joint(published(PUBLISHED[name])), TOKENS, LABELS, order), forward, **CLOSE)


def test_randar_joint_queries_see_the_earlier_ones():
    order = random_orders(3, GRID, seeded(0))
    models = published(RandAR), joint(published(RandAR))
    blind, seeing = (model.score(model.start(3, LABELS), order) for model in models)
    assert_close(seeing[:, 0], blind[:, 0], **CLOSE)
    assert not torch.allclose(seeing[:, 1:], blind[:, 1:], atol=1e-3)
    model = joint(published(RandAR))
    shorter = model.score(model.start(3, LABELS), order[:, :3])
    assert_close(shorter, seeing[:, :3], **CLOSE)


def test_randar_joint_step_leaves_what_training_saw():
    """Only the first query's keys and values survive a joint step; the others run again behind tokens."""
    order, model = random_orders(3, GRID, seeded(0)), joint(published(RandAR))
    forward, state = model(TOKENS, LABELS, order), model.start(3, LABELS)
    model.score(state, order[:, :4])
    state = model.append(state, order[:, :4], TOKENS.gather(1, order[:, :4]))
    assert_close(model.score(state, order[:, 4:5]), forward[:, 4:5], **CLOSE)


def test_a_joint_step_is_the_same_in_any_batch():
    model, policy = joint(published(RandAR)), PolicyConfig("random", per_step=GRID.n // 2)
    together = sample(model, policy, Streams(range(3)), chunk=1)
    for seed in range(3):
        alone = sample(model, policy, Streams([seed]))
        assert torch.equal(alone.tokens[0], together.tokens[seed])
    with pytest.raises(ValueError, match="joint_steps is for given and random orders"):
        sample(model, "entropy", Streams([0]))


def test_arpg_joint_tokens_see_one_another_whatever_their_sequence():
    order, model = random_orders(3, GRID, seeded(0)), joint(published(ARPG))

    def after(positions):
        state = model.append(model.start(3, LABELS), positions, TOKENS.gather(1, positions))
        return model.score(state, order[:, 4:5])

    forwards, backwards = after(order[:, :4]), after(order[:, :4].flip(1))
    assert_close(forwards, backwards, **CLOSE)
    assert not torch.allclose(forwards, model(TOKENS, LABELS, order)[:, 4:5], atol=1e-3)


# --- MaskGIT-VQ -------------------------------------------------------------------------------------------


def tokenizer(**changes):
    torch.manual_seed(0)
    sizes = {"channels": 32, "multipliers": (1, 2), "res_blocks": 1, "vocab_size": 7, "code_dim": 4}
    model = MaskGITVQ(MaskGITVQConfig(**{**sizes, **changes})).eval()
    model.quantize.embedding.weight.data *= 0.1
    return model


def test_maskgit_vq_is_a_tokenizer():
    model = tokenizer()
    assert isinstance(model, Tokenizer)
    assert model.factor == 2
    images = torch.rand(2, 3, 4, 6, generator=seeded(0)) * 2 - 1
    tokens = model.encode(images)
    assert tokens.shape == (2, 6)
    assert tokens.dtype == torch.int64
    decoded = model.decode(tokens, Grid(2, 3))
    assert decoded.shape == images.shape
    assert decoded.abs().max() <= 1
    assert torch.equal(model.encode(images[1:]), tokens[1:])


def test_maskgit_vq_takes_the_nearest_code():
    model = tokenizer()
    latents = torch.randn(2, 5, 4, generator=seeded(1))
    expected = torch.cdist(latents, model.quantize.embedding.weight[None]).argmin(-1)
    assert torch.equal(model.quantize.nearest(latents), expected)


def test_maskgit_vq_sees_images_between_zero_and_one():
    model, seen = tokenizer(), []
    model.encoder.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    model.encode(torch.stack((torch.full((3, 4, 4), -1.0), torch.ones(3, 4, 4))))
    assert_close(seen[0], torch.stack((torch.zeros(3, 4, 4), torch.ones(3, 4, 4))))


def test_maskgit_vq_shortcut_is_applied_to_the_result_of_the_block():
    block = tokenizer().encoder.down[1].block[0]
    h = []
    block.conv2.register_forward_hook(lambda module, args, out: h.append(out))
    out = block(torch.randn(1, 32, 4, 4, generator=seeded(0)))
    assert_close(out, h[0] + block.nin_shortcut(h[0]))


def test_maskgit_vq_refuses():
    model = tokenizer()
    with pytest.raises(ValueError, match="multiple of 2"):
        model.encode(torch.zeros(1, 3, 5, 4))
    for tokens, grid in ((torch.full((1, 4), 7), Grid(2, 2)), (torch.zeros(1, 4, dtype=int), Grid(1, 3))):
        with pytest.raises(ValueError, match=r"in \[0, 7\)"):
            model.decode(tokens, grid)
    for change in ({"channels": 20}, {"multipliers": ()}, {"vocab_size": 0}):
        with pytest.raises(ValueError, match="must be"):
            tokenizer(**change)
