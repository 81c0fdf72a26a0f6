"""Orders that the location head learns by itself: its gradient is exact on average, and finds what helps."""

from itertools import permutations
from pathlib import Path

import pytest
import torch
from conftest import seeded, transformer
from torch.testing import assert_close

from anyorder.method.loss import joint_nll
from anyorder.models.architecture import TransformerConfig
from anyorder.models.transformer import AnyOrderTransformer
from anyorder.stages.train import TrainStage
from anyorder.training.config import TrainConfig
from anyorder.training.learnt_orders import leave_one_out, loss, sample_orders

ORDERS = torch.tensor(list(permutations(range(4))))


def every_order(model, tokens):
    """-log q(token) and -log q(position), (24, 4), of an image (1, 4) in all orders of a 2 x 2 grid."""
    return joint_nll(model, tokens.expand(24, -1), torch.zeros(24, dtype=torch.int64), ORDERS)


@pytest.mark.parametrize("samples", [2, 3])
def test_the_gradient_is_that_of_all_orders(samples):
    """In expectation over the orders that are sampled, it is that of sum over orders of r(order) * cost."""
    model = transformer(location=True, num_classes=2, grid=(2, 2)).double()
    tokens = torch.tensor([[1, 4, 0, 2]])
    content, where = every_order(model, tokens)
    weights = (-where.double().sum(1)).exp()
    assert abs(float(weights.sum()) - 1) < 1e-5
    exact = (weights * content.sum(1)).sum() / 4
    together = torch.cartesian_prod(*[torch.arange(24)] * samples)
    each = leave_one_out(content[together.flatten()], where[together.flatten()], samples)
    expected = (weights.detach()[together].prod(1) * each).sum()
    assert_close(expected, exact.to(expected.dtype), rtol=1e-5, atol=1e-5)
    parameters = [*model.parameters()]
    found, true, pathwise = (
        torch.autograd.grad(x, parameters, retain_graph=True, allow_unused=True, materialize_grads=True)
        for x in (expected, exact, (weights.detach() * content.sum(1)).sum() / 4)
    )
    for a, b in zip(found, true, strict=True):
        assert_close(a, b, rtol=1e-3, atol=1e-5)
    largest = max(float((a - b).abs().max()) for a, b in zip(true, pathwise, strict=True))
    assert largest > 1e-3, "the policy has a share in the gradient"


def test_advantages_of_unit_size_change_the_policys_share_alone():
    content = torch.rand(6, 4, generator=torch.Generator().manual_seed(0)).requires_grad_()
    where = torch.rand(6, 4, generator=torch.Generator().manual_seed(1)).requires_grad_()
    (a, policy), (b, scaled) = (
        torch.autograd.grad(leave_one_out(content, where, 2, unit).sum(), (content, where))
        for unit in (False, True)
    )
    assert_close(a, b)
    assert_close(policy / policy.std(), scaled / scaled.std())
    assert_close(
        scaled.std(), torch.tensor(1 / 8), rtol=1e-4, atol=1e-6
    )  # a mean over 2 orders and 4 positions


def test_orders_are_sampled_from_the_head_along_the_true_tokens():
    model = transformer(location=True, num_classes=2, grid=(2, 2)).train()
    tokens, n = torch.tensor([[1, 4, 0, 2]]), 6000
    found = sample_orders(model, tokens.expand(n, -1), torch.zeros(n, dtype=torch.int64), range(n))
    assert model.training
    counts = (found[:, None] == ORDERS).all(2).sum(0)
    expected = n * (-every_order(model.eval(), tokens)[1].sum(1)).exp().detach()
    assert int(counts.sum()) == n
    rare = expected < 5  # counted together
    counts, expected = (torch.cat((x[~rare], x[rare].sum()[None])) for x in (counts, expected))
    assert len(counts) >= 5
    assert float(((counts - expected) ** 2 / expected).sum()) < 26.1  # chi-square, 8 degrees: p < 0.001


def test_what_determines_the_others_is_learnt_to_come_first():
    """The token at one position says all others; they say it only together, which is harder to learn."""
    generator, hub = seeded(0), 4
    codes = torch.randint(2, (16, 6), generator=generator)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = AnyOrderTransformer(
            TransformerConfig(depth=1, width=32, heads=2, vocab_size=16, grid=(2, 3), location=True)
        ).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)

    def batch(rows):
        drawn = torch.randint(16, (rows,), generator=generator)
        tokens = codes[drawn].clone()
        tokens[:, hub] = drawn
        return tokens, torch.full((rows,), -1)

    def share_of_hub_first():
        return float((sample_orders(model, *batch(500), range(500))[:, 0] == hub).float().mean())

    before = share_of_hub_first()
    for _ in range(200):
        value, parts = loss(model, *batch(32), 4, generator)
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
    assert {*parts} == {"content", "location"}
    assert before < 0.4
    assert share_of_hub_first() > 0.8


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"learn_orders": 1}, "at least 2 orders for each image, got 1"),
        ({"learn_orders": 2}, "needs a location head: give init=... with one, or model.location=true"),
        ({"learn_orders": 2, "init": Path("a"), "order": "raster"}, "learn_orders takes no orders, online"),
        ({"learn_orders": 2, "init": Path("a"), "groups": (2,)}, "learn_orders takes no orders, online"),
        ({"learn_orders": 2, "init": Path("a"), "random_share": 0.1}, "random_share go with|random_share, "),
        ({"learn_orders": 2, "init": Path("a"), "train": TrainConfig(compile=True)}, "train.compile"),
    ],
)
def test_what_does_not_go_with_it(settings, message):
    with pytest.raises(ValueError, match=message):
        TrainStage(Path("tokens"), **settings)
