import copy
import math
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from conftest import GRID, incremental, seeded, transformer
from torch import Tensor, nn
from torch.testing import assert_close

from anyorder.contracts import Grid
from anyorder.method.decoding import extract_orders, sample
from anyorder.method.loss import token_nll
from anyorder.method.sampling import Streams
from anyorder.models import attention
from anyorder.models.architecture import Architecture, TransformerConfig
from anyorder.models.attention import attend_with_total
from anyorder.models.positions import CoordinateEncoding, rotate
from anyorder.models.transformer import AnyOrderTransformer
from anyorder.orders import random_orders, static_order

TOKENS = torch.randint(5, (3, 6), generator=seeded(0))
ORDER = random_orders(3, GRID, seeded(0))
LABELS = torch.tensor([2, 0, 1])
CLOSE = {"rtol": 1e-4, "atol": 2e-5}
FULL = {
    "num_classes": 3,
    "rotary": True,
    "qk_norm": True,
    "dropout": 0.1,
    "token_dropout": 0.2,
    "label_dropout": 0.3,
}


def train_step(model: AnyOrderTransformer, tokens: Tensor = TOKENS) -> tuple[Tensor, dict[str, Tensor]]:
    """Loss and gradients in training mode with one fixed dropout."""
    torch.manual_seed(1)
    loss = token_nll(model.train(), tokens, LABELS, ORDER).mean()
    model.zero_grad()
    loss.backward()
    return loss.detach(), {name: p.grad for name, p in model.named_parameters()}


# --- other grids


@pytest.mark.parametrize("following", ["relative", "absolute"])
@pytest.mark.parametrize("rotary", [False, True])
def test_large_grid(following, rotary):
    """12 x 8 from a model of 2 x 3: positions beyond those of training are told apart and decode right."""
    model, grid = transformer(next_position=following, rotary=rotary, depth=1), Grid(12, 8)
    tokens = torch.randint(5, (2, grid.n), generator=seeded(0))
    order = random_orders(2, grid, seeded(0))
    with torch.no_grad():
        forward = model(tokens, None, order, grid)
        assert_close(incremental(model, tokens, None, order, grid), forward, **CLOSE)
        first = model.score(model.start(1, None, grid), torch.arange(grid.n)[None])[0]
    assert len(first.unique(dim=0)) == grid.n
    assert sample(model, "hilbert", Streams([0]), grid=grid).order.tolist() == [
        static_order("hilbert", grid).tolist()
    ]


def test_a_grid_has_no_memory_of_the_grid_of_training():
    """The same coordinates on another grid give the same logits: nothing but coordinates goes in."""
    small, large = Grid(2, 2), Grid(5, 7)
    model = transformer(grid=(3, 3))
    tokens = torch.tensor([[1, 4, 0, 2]])
    corner = torch.tensor([[0, 1, large.w, large.w + 1]])  # the top-left 2 x 2 of the larger grid
    path = torch.tensor([[3, 0, 2, 1]])
    with torch.no_grad():
        expected = model(tokens, None, path, small)
        state = model.start(1, None, large)
        logits = []
        for step in range(4):
            here = corner[:, path[0, step]][:, None]
            logits.append(model.score(state, here))
            state = model.append(state, here, tokens[:, path[0, step]][:, None])
    assert_close(torch.cat(logits, dim=1), expected, **CLOSE)


def test_relative_encoding_sees_displacements_only():
    """Without encodings of the current patch, a walk and its translation look alike after the first step."""
    model, grid = transformer(current_position="none"), Grid(3, 4)
    model.first = None  # S is absolute
    tokens = torch.zeros(1, 12, dtype=torch.int64)
    walk = [0, 1, 5, 4]
    with torch.no_grad():
        logits = []
        for shift in (0, 1, 6):
            state = model.start(1, None, grid)
            for here, ahead in pairwise(walk):
                state = model.append(state, torch.tensor([[here + shift]]), tokens[:, :1])
                last = model.score(state, torch.tensor([[ahead + shift]]))
            logits.append(last)
    assert_close(logits[1], logits[0], **CLOSE)
    assert_close(logits[2], logits[0], **CLOSE)


def test_relative_encoding_is_evaluated_at_the_displacement():
    class Coordinates(nn.Module):
        def forward(self, coordinates: Tensor) -> Tensor:
            return coordinates

    model, grid = transformer(), Grid(3, 5)
    model.following = Coordinates()
    here, ahead = torch.meshgrid(torch.arange(grid.n), torch.arange(grid.n), indexing="ij")
    at = grid.coordinates()
    with torch.no_grad():
        assert torch.equal(model._tables(grid).next(here, ahead), at[ahead] - at[here])


def test_rotary_products_depend_on_displacements_only():
    """Query and key of pairs that are equally far apart, in rows and in columns, have the same product."""
    model, grid = transformer(rotary=True, width=32), Grid(4, 5)
    here, ahead = (torch.randint(grid.n, (1, 300), generator=seeded(seed)) for seed in (0, 1))
    rotation = model._tables(grid).rotation(here, ahead)
    q, k = torch.randn(2, 16, generator=seeded(2))
    products = (rotate(q, *rotation.queries) * rotate(k, *rotation.keys)).sum(-1).flatten()
    gap = (grid.coordinates()[ahead] - grid.coordinates()[here])[0]
    _, group = gap.unique(dim=0, return_inverse=True)
    for which in range(int(group.max()) + 1):
        assert products[group == which].std(correction=0) < 1e-5
    assert products.std() > 0.1
    condition = model._tables(grid).rotation(torch.full((1, 1), grid.n), ahead[:, :1])
    assert torch.equal(rotate(k, *condition.keys).flatten(), k)  # the identity, not a zero vector


# --- decoding


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("scale", [1.0, 30.0])
def test_fused_attention_and_its_total(dtype, scale):
    """The kernel that returns the log-sum-exp agrees with attention written out."""
    q, k, v = (
        torch.randn(2, 3, length, 8, generator=seeded(i)).to(dtype) for i, length in enumerate((5, 7, 7))
    )
    q = scale * q
    out, total = attend_with_total(q, k, v)
    written_out = attend_with_total(q.requires_grad_(), k, v)
    close = CLOSE if dtype == torch.float32 else {"rtol": 2e-2, "atol": 2e-2 * scale}
    assert_close(out, written_out[0].detach(), **close)
    assert_close(total, written_out[1].detach(), **close)


def test_fused_attention_of_queries_that_lie_transposed():
    """The CPU's kernel takes the last dimension to be dense without looking."""
    q, k, v = (
        torch.randn(8, 3, length, 2, generator=seeded(i)).transpose(0, 3)
        for i, length in enumerate((5, 7, 7))
    )
    dense = attend_with_total(q.contiguous(), k.contiguous(), v.contiguous())
    for found, expected in zip(attend_with_total(q, k, v), dense, strict=True):
        assert_close(found, expected)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fused_attention_on_a_gpu(dtype):
    q, k, v = (
        torch.randn(2, 3, length, 64, generator=seeded(i)).to("cuda", dtype)
        for i, length in enumerate((5, 7, 7))
    )
    out, total = attend_with_total(q, k, v)
    written_out = attend_with_total(q.requires_grad_(), k, v)
    assert total.dtype == torch.float32
    assert_close(out, written_out[0].detach(), rtol=2e-2, atol=2e-2)
    assert_close(total, written_out[1].detach(), rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize(("m", "slot"), [(5, None), (2, 0), (1, None), (1, 0), (1, 1)])
def test_candidates_attend_as_under_a_mask(m, slot):
    """Shared prefix, merged with themselves: the same as masked attention over prefix and all candidates.

    One candidate that waits right behind the prefix takes another way.
    """
    model, length = transformer(), 4
    state = model.append(model.start(3), ORDER[:, :length], TOKENS[:, :length])
    q, k, v = (torch.randn(3, 2, m, 8, generator=seeded(i)) for i in range(3))
    mask = torch.cat((torch.ones(m, length), torch.eye(m)), dim=1).bool()
    keys, values = (
        torch.cat((cache[0, :, :, :length], new), 2)
        for cache, new in ((state.cache.keys, k), (state.cache.values, v))
    )
    expected = nn.functional.scaled_dot_product_attention(q, keys, values, attn_mask=mask)
    free = None if slot is None else slice(length + slot, length + slot + m)
    assert_close(state.cache.candidates(free)[0](q, k, v), expected, **CLOSE)


def test_scored_candidates_wait_in_the_cache():
    """Scoring holds on to no more memory than `start` took, whatever is scored how often."""
    model = transformer()
    state = model.start(3)
    size = state.cache.keys.shape[3]
    with torch.no_grad():
        for step in range(4):
            for some in (ORDER[:, step : step + 2], ORDER[:, step:], ORDER[:, step:].flip(1)):
                model.score(state, some)
                assert 0 < state.scored.count <= size - step
            here = ORDER[:, step : step + 1]
            before = (state.cache.keys, state.cache.values, state.scored.hidden)
            state = model.append(state, here, TOKENS.gather(1, here))
            assert all(
                x is y
                for x, y in zip(
                    before, (state.cache.keys, state.cache.values, state.scored.hidden), strict=True
                )
            )
            assert state.scored.count == 0


# --- what the inputs tell


@pytest.mark.parametrize(
    ("following", "current", "sees_next"),
    [
        ("relative", "absolute", True),
        ("absolute", "absolute", True),
        ("relative", "none", True),
        ("none", "absolute", False),
    ],
)
def test_next_position_is_an_input(following, current, sees_next):
    model = transformer(next_position=following, current_position=current)
    with torch.no_grad():
        logits = model.score(model.start(1), torch.arange(6)[None])[0]
        state = model.append(model.start(1), torch.tensor([[2]]), torch.tensor([[1]]))
        later = model.score(state, torch.tensor([[0, 1, 3, 4, 5]]))[0]
    for scores in (logits, later):
        assert (len(scores.unique(dim=0)) == len(scores)) == sees_next


def test_null_labels():
    model = transformer(num_classes=3)
    with torch.no_grad():
        none = model(TOKENS, None, ORDER)
        assert_close(model(TOKENS, torch.full((3,), -1), ORDER), none)
        mixed = model(TOKENS, torch.tensor([-1, 0, 1]), ORDER)
        assert_close(mixed[0], none[0])
        assert not torch.allclose(mixed[1:], none[1:])
        unconditional = transformer()
        zeros = torch.zeros(3, dtype=torch.int64)
        assert_close(unconditional(TOKENS, zeros, ORDER), unconditional(TOKENS, None, ORDER))


# --- training


def test_label_dropout_trains_the_null_label():
    def null_gradient(**changes: float) -> float:
        model = transformer(num_classes=3, **changes).train()
        torch.manual_seed(0)
        token_nll(model, TOKENS.repeat(8, 1), LABELS.repeat(8), ORDER.repeat(8, 1)).mean().backward()
        return float(model.condition_embedding.weight.grad[-1].abs().sum())

    assert null_gradient(label_dropout=0.0) == 0
    assert null_gradient(label_dropout=0.5) > 0


def test_share_of_dropped_labels():
    model, labels = transformer(num_classes=3, label_dropout=0.3), torch.zeros(4000, dtype=torch.int64)
    null = model.condition_embedding.weight[-1]
    with torch.no_grad():
        torch.manual_seed(0)
        hidden = (model.train().start(4000, labels).pending == null).all(1)
        assert hidden.float().mean().item() == pytest.approx(0.3, abs=0.03)
        assert not (model.eval().start(4000, labels).pending == null).any()


def test_token_dropout_hides_tokens_but_not_positions():
    model = transformer(token_dropout=0.5, next_position="none", depth=1)
    with torch.no_grad():
        torch.manual_seed(0)
        hidden = model.train()(TOKENS, None, ORDER)
        torch.manual_seed(0)
        other = model((TOKENS + 1) % 5, None, ORDER)
        same = (hidden == other).all(-1)
        assert_close(model.eval()(TOKENS, None, ORDER)[:, 0], hidden[:, 0])
    assert same[:, 0].all()
    assert 0.1 < float(same[:, 1:].float().mean()) < 0.9
    grad = train_step(transformer(token_dropout=0.5))[1]["token_embedding.weight"]
    assert grad[-1].abs().sum() > 0


@pytest.mark.parametrize("branch", ["attention.out", "mlp.down"])
def test_dropout_acts_on_both_branches(branch):
    """With the other branch silenced, two training passes still differ; two in eval mode do not."""
    model = transformer(depth=1, dropout=0.5)
    other = {"attention.out": "mlp.down", "mlp.down": "attention.out"}[branch]
    model.blocks[0].get_submodule(other).weight.data.zero_()
    with torch.no_grad():
        torch.manual_seed(0)
        for training in (True, False):
            first, second = (model.train(training)(TOKENS, None, ORDER) for _ in range(2))
            assert torch.equal(first, second) != training


@pytest.mark.parametrize("rotary", [False, True])
def test_checkpointing_changes_neither_loss_nor_gradients(rotary):
    settings = {**FULL, "rotary": rotary}
    loss, gradients = train_step(transformer(**settings))
    again, recomputed = train_step(transformer(**settings, checkpointing=True))
    assert_close(again, loss)
    assert_close(recomputed, gradients, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_later_tokens_change_no_earlier_logit_in_training(checkpointing):
    model = transformer(**FULL, checkpointing=checkpointing).train()

    def logits(tokens: Tensor) -> Tensor:
        torch.manual_seed(1)
        return model(tokens, LABELS, ORDER).detach()

    before = logits(TOKENS)
    for step in range(6):
        other = TOKENS.scatter(1, ORDER[:, step:], (TOKENS.gather(1, ORDER[:, step:]) + 1) % 5)
        assert_close(logits(other)[:, : step + 1], before[:, : step + 1], rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    "settings",
    [
        FULL,
        {"num_classes": 3, "label_dropout": 0.5, "next_position": "absolute"},
        {"num_classes": 3, "label_dropout": 0.5, "next_position": "none", "current_position": "none"},
    ],
)
def test_gradients_reach_every_parameter(settings):
    loss, gradients = train_step(transformer(**settings))
    assert loss.isfinite()
    for name, gradient in gradients.items():
        assert gradient is not None, name
        assert gradient.isfinite().all(), name
        assert gradient.abs().sum() > 0, name


def test_initial_loss_is_close_to_uniform():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = AnyOrderTransformer(TransformerConfig(vocab_size=64, grid=(4, 4), depth=3, width=64))
    tokens = torch.randint(64, (16, 16), generator=seeded(0))
    nll = token_nll(model.eval(), tokens, None, random_orders(16, model.grid, seeded(0)))
    assert nll.shape == (16, 16)
    assert nll.mean().item() == pytest.approx(math.log(64), abs=0.1)


@pytest.mark.parametrize("settings", [{}, {"rotary": True, "qk_norm": True, "next_position": "absolute"}])
def test_learns_the_entropy_of_the_data_in_every_order(settings):
    """Four images, two of each label: the likelihood reaches log 2 given the label, and log 4 without."""
    images = torch.tensor([[3, 2, 3, 1], [2, 2, 0, 1], [0, 0, 3, 2], [3, 0, 2, 0]])
    labels = torch.tensor([0, 0, 1, 1])
    steps, rows = 250, torch.arange(4).repeat(16)
    sizes = {"vocab_size": 4, "grid": (2, 2), "num_classes": 2, "depth": 2, "width": 32, "heads": 2}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = AnyOrderTransformer(TransformerConfig(**sizes, **settings, label_dropout=0.5)).train()
        optimiser = torch.optim.Adam(model.parameters())
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, 1e-2, steps)
        generator = seeded(0)
        for _ in range(steps):
            order = random_orders(len(rows), model.grid, generator)
            optimiser.zero_grad()
            token_nll(model, images[rows], labels[rows], order).mean().backward()
            optimiser.step()
            schedule.step()
    model.eval()
    order = random_orders(len(rows), model.grid, seeded(9))
    with torch.no_grad():
        for condition, entropy in ((labels[rows], math.log(2)), (None, math.log(4))):
            nll = token_nll(model, images[rows], condition, order).sum(1).mean()
            assert float(nll) == pytest.approx(entropy, abs=0.15)
    found = sample(model, "entropy", Streams(range(600)), condition=labels[:1].expand(600))
    share = (found.tokens[:, None] == images).all(-1).float().mean(0)
    assert share[:2].sum() > 0.9
    exact = extract_orders(model, images, "entropy", condition=labels[:1].expand(4)).log_prob.sum(1).exp()
    assert_close(share, exact, atol=0.05, rtol=0)
    assert exact[:2].min() > 0.2


# --- precision


def test_bf16_agrees_with_fp32():
    model = transformer(num_classes=3, rotary=True, qk_norm=True)
    with torch.no_grad():
        exact = model(TOKENS, LABELS, ORDER)
        with torch.autocast("cpu", torch.bfloat16):
            forward = model(TOKENS, LABELS, ORDER)
            state = model.start(3, LABELS)
            decoded = incremental(model, TOKENS, LABELS, ORDER)
            block = model.append(state, ORDER[:, :3], TOKENS.gather(1, ORDER[:, :3]))
            after_block = model.score(block, ORDER[:, 3:4])
    assert state.cache.keys.dtype == torch.bfloat16
    assert forward.dtype == torch.bfloat16
    scale = exact.std()
    for logits in (forward, decoded):
        assert ((logits.float() - exact).abs().mean() / scale) < 0.05
    assert ((after_block.float() - exact[:, 3:4]).abs().mean() / scale) < 0.05


@pytest.mark.parametrize("grouped", [False, True])
def test_attention_that_is_written_out_is_that_of_the_kernel(grouped, monkeypatch):
    """Output and gradients of short bfloat16 inputs, against the kernel in float32; only in training."""
    torch.manual_seed(0)
    mask = torch.ones(9, 9, dtype=torch.bool).tril(2) if grouped else None
    exact = [torch.randn(2, 3, 9, 8).bfloat16().float().requires_grad_() for _ in range(3)]
    short = [x.detach().bfloat16().requires_grad_() for x in exact]
    expected, found = attention.causal(*exact, mask), attention.causal(*short, mask)
    assert torch.equal(found, attention.causal(*short, mask))
    upstream = torch.randn_like(expected)
    expected.backward(upstream)
    found.backward(upstream.bfloat16())
    assert_close(found.float(), expected, rtol=0.02, atol=0.03)
    for one, other in zip(short, exact, strict=True):
        assert_close(one.grad.float(), other.grad, rtol=0.02, atol=0.06)
    kernel = F.scaled_dot_product_attention(*short, attn_mask=mask, is_causal=mask is None)
    assert not torch.equal(found, kernel), "rounded elsewhere"
    with torch.no_grad():
        assert torch.equal(attention.causal(*(x.detach() for x in short), mask), kernel)
    monkeypatch.setattr(attention, "WRITTEN_OUT", 8)
    assert torch.equal(attention.causal(*short, mask), kernel)


@pytest.mark.parametrize("queries", [1, 4])
def test_attention_to_all_keys_is_that_of_the_kernel(queries, monkeypatch):
    """Written out for bfloat16 on a CPU, of a cache that is not full; the same in any batch."""
    exact = [torch.randn(6, 3, n, 16, generator=seeded(n)).bfloat16().float() for n in (queries, 9, 10)]
    exact = [exact[0], *(x[:, :, :7] for x in exact[1:])]
    expected = F.scaled_dot_product_attention(*exact)
    assert torch.equal(attention.to_all(*exact), expected)
    short = [x.bfloat16() for x in exact]
    found = attention.to_all(*short)
    assert_close(found.float(), expected, rtol=0.02, atol=0.02)
    assert torch.equal(attention.to_all(*(x[1:2] for x in short)), found[1:2])
    monkeypatch.setattr(attention, "WRITTEN_OUT", 0)
    assert torch.equal(attention.to_all(*short), F.scaled_dot_product_attention(*short))


def test_bf16_weights_decode():
    model = transformer(num_classes=3, rotary=True).bfloat16()
    with torch.no_grad():
        decoded = incremental(model, TOKENS, LABELS, ORDER)
        forward = model(TOKENS, LABELS, ORDER)
    assert decoded.dtype == torch.bfloat16
    assert ((decoded - forward).abs().float().mean() / forward.float().std()) < 0.05


@torch.no_grad()
def test_positions_stay_exact_in_bf16():
    """Rounded frequencies would move far positions: 8 bits of an angle of 100 radians are nothing."""
    model = transformer(rotary=True, location=True)
    exact = copy.deepcopy(model)
    encodings = [module for module in model.bfloat16().modules() if isinstance(module, CoordinateEncoding)]
    assert len(encodings) == 5
    for found, kept in zip(
        encodings, (m for m in exact.modules() if isinstance(m, CoordinateEncoding)), strict=True
    ):
        assert found.frequencies.dtype == torch.float32
        assert torch.equal(found.frequencies, kept.frequencies)
        assert found.hidden.weight.dtype == torch.bfloat16
    grid = Grid(40, 40)
    tables = [each._tables(grid) for each in (model, exact)]
    for found, kept in zip(*(table.rotary for table in tables), strict=True):
        assert torch.equal(found, kept.bfloat16())
    close = {"rtol": 2e-2, "atol": 2e-2 * float(tables[1].current.std())}
    assert_close(tables[0].current.float().mean(1), tables[1].current.mean(1), **close)
    assert torch.equal(model.to(torch.float64).first.frequencies, exact.first.frequencies)


def test_large_scores_stay_finite():
    """The merge of prefix and self subtracts the larger maximum first."""
    model = transformer()
    for block in model.blocks:
        block.attention.qkv.weight.data[:32] *= 100
    with torch.no_grad():
        forward = model(TOKENS, None, ORDER)
        decoded = incremental(model, TOKENS, None, ORDER)
    assert decoded.isfinite().all()
    assert_close(decoded, forward, rtol=1e-3, atol=1e-3)


# --- errors


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"depth": 0}, "depth must be >= 1, got 0"),
        ({"width": 0}, "width must be >= 1"),
        ({"heads": 0}, "heads must be >= 1"),
        ({"width": 20, "heads": 2}, "width must be a multiple of 4 \\* heads = 8, got 20"),
        ({"dropout": 1.0}, "dropout must lie in"),
        ({"token_dropout": -0.1}, "token_dropout must lie in"),
        ({"label_dropout": 1.5}, "label_dropout must lie in"),
        ({"next_position": "next"}, "relative, absolute or none, got 'next'"),
        ({"current_position": "relative"}, "absolute or none, got 'relative'"),
        ({"rotary": True, "next_position": "none"}, "rotary tells both positions"),
        ({"rotary": True, "current_position": "none"}, "rotary tells both positions"),
    ],
)
def test_architecture_refuses(settings, message):
    for config in (Architecture, TransformerConfig):
        with pytest.raises(ValueError, match=message):
            config(**settings)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"vocab_size": 0}, "vocab_size must be >= 1"),
        ({"num_classes": -1}, "num_classes must be >= 0"),
        ({"grid": (0, 4)}, "at least one row"),
    ],
)
def test_transformer_config_refuses(settings, message):
    with pytest.raises(ValueError, match=message):
        TransformerConfig(**settings)


def test_forward_refuses_another_grid():
    model = transformer()
    for tokens, order in ((TOKENS[:, :5], ORDER[:, :5]), (TOKENS, ORDER[:, :5]), (TOKENS, ORDER[:2])):
        with pytest.raises(ValueError, match="a 2 x 3 grid needs tokens and order of shape"):
            model(tokens, None, order)
    with pytest.raises(ValueError, match="a 3 x 3 grid needs"):
        model(TOKENS, None, ORDER, Grid(3, 3))


def test_forward_refuses_the_null_label():
    """`num_classes` is the row of "no label": a model that takes it would seem to be conditioned."""
    model, labels = transformer(num_classes=3), torch.tensor([0, 1, 3])
    with pytest.raises(ValueError, match=r"lie in \[0, 3\).*with values \[0, 1, 3\]"):
        model(TOKENS, labels, ORDER)


@torch.no_grad()
def test_a_used_state_is_refused():
    model = transformer(location=True)
    state = model.start(3)
    following = model.append(state, ORDER[:, :1], TOKENS[:, :1])
    for use in (
        lambda: model.score(state, ORDER[:, 1:]),
        lambda: model.append(state, ORDER[:, 1:2], TOKENS[:, 1:2]),
        lambda: model.locate(state, torch.zeros(3, 6, dtype=torch.bool)),
    ):
        with pytest.raises(ValueError, match="used up by append: go on with the one it returned"):
            use()
    model.score(copy.deepcopy(following), ORDER[:, 1:])
    model.score(following, ORDER[:, 1:])


@pytest.mark.parametrize("labels", [[0, 1], [0, 1, 3], [0, 1, -2], [[0], [1], [2]]])
def test_start_refuses_labels(labels):
    with pytest.raises(ValueError, match=r"labels must have shape \(3,\) and lie in \[0, 3\)"):
        transformer(num_classes=3).start(3, torch.tensor(labels))


# --- parts


def test_coordinate_encoding_takes_real_coordinates():
    torch.manual_seed(0)
    encoding = CoordinateEncoding(16)
    between = encoding(torch.tensor([[0.5, -3.25], [0.5, 3.25], [200.0, 100.0]]))
    assert between.shape == (3, 16)
    assert between.isfinite().all()
    assert len(between.unique(dim=0)) == 3
    assert not any("frequencies" in name for name in encoding.state_dict())
