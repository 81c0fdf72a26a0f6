"""The location head: q(order, x) is a normalised model of order and content, sampled ancestrally."""

from functools import partial
from itertools import islice, permutations, product

import pytest
import torch
from conftest import GRID, Watched, seeded, transformer
from torch.testing import assert_close

from anyorder.bench.memory import _peak_of_cpu
from anyorder.contracts import Grid, LocatingModel
from anyorder.method.decoding import extract_orders, generate, sample
from anyorder.method.guidance import GuidanceConfig, Guided
from anyorder.method.loss import joint_nll, token_nll
from anyorder.method.policies import InferredOrder, LocatedOrder
from anyorder.method.policy_config import PolicyConfig, make_policy
from anyorder.method.sampling import Streams
from anyorder.models import location as head_module
from anyorder.models.location import LocationHead, around, revealed_before
from anyorder.orders import inverse, random_orders

TOY = Grid(2, 2)
CLOSE = {"rtol": 1e-4, "atol": 2e-5}


@pytest.fixture(autouse=True)
def _no_grad():
    with torch.no_grad():
        yield


def located(**changes):
    return transformer(location=True, **changes)


def toy():
    return located(vocab_size=2, grid=(2, 2))


def enumerated(model):
    """Every (order, image) of the toy: orders (384, 4), images (384, 4) and log q(order, x) (384,)."""
    n = model.grid.n
    pairs = list(product(permutations(range(n)), product(range(model.vocab_size), repeat=n)))
    orders, images = (torch.tensor(column) for column in zip(*pairs, strict=True))
    content, where = joint_nll(model, images, None, orders)
    return orders, images, -(content + where).sum(1)


def codes(images):
    return images @ (2 ** torch.arange(images.shape[1]))


@pytest.mark.parametrize("grid", [GRID, Grid(3, 2), Grid(1, 4)])
@pytest.mark.parametrize("classes", [0, 3])
def test_joint_equals_step_by_step(grid, classes):
    model = located(num_classes=classes, rotary=True, qk_norm=True)
    tokens = torch.randint(5, (3, grid.n), generator=seeded(0))
    condition = torch.arange(3) % classes if classes else None
    order = random_orders(3, grid, seeded(1))
    logits, where = model.joint(tokens, condition, order, grid)
    assert_close(logits, model.forward(tokens, condition, order, grid))
    state, revealed = model.start(3, condition, grid), torch.zeros(3, grid.n, dtype=torch.bool)
    for i, position in enumerate(order.split(1, dim=1)):
        assert_close(model.locate(state, revealed), where[:, i], **CLOSE)
        if i % 2:  # whether or not the position was scored before it is appended
            model.score(state, order[:, i:])
        state = model.append(state, position, tokens.gather(1, position))
        revealed = revealed.scatter(1, position, True)


def test_prefilled_positions_are_located_alike():
    model, order = located(), random_orders(2, GRID, seeded(2))
    tokens = torch.randint(5, (2, GRID.n), generator=seeded(3))
    where = model.joint(tokens, None, order)[1]
    state = model.append(model.start(2), order[:, :3], tokens.gather(1, order[:, :3]))
    revealed = torch.zeros(2, GRID.n, dtype=torch.bool).scatter(1, order[:, :3], True)
    assert_close(model.locate(state, revealed), where[:, 3], **CLOSE)


def test_only_open_positions_have_probability():
    model, order = located(), random_orders(4, GRID, seeded(0))
    where = model.joint(torch.zeros(4, GRID.n, dtype=torch.int64), None, order)[1]
    closed = revealed_before(inverse(order))
    assert (where[closed] == -torch.inf).all()
    assert where[~closed].isfinite().all()
    assert_close(where.exp().sum(-1), torch.ones(4, GRID.n))


def test_location_sees_the_last_token_but_no_later_one():
    model, order = located(), torch.arange(GRID.n).expand(1, -1)
    tokens = torch.zeros(1, GRID.n, dtype=torch.int64)
    before = model.joint(tokens, None, order)[1]
    tokens[0, 2] = 3
    after = model.joint(tokens, None, order)[1]
    assert_close(after[:, :3], before[:, :3], rtol=0, atol=0)
    assert not torch.allclose(after[:, 3, 3:], before[:, 3, 3:])


def test_order_and_image_have_a_normalised_density():
    log_q = enumerated(toy())[2]
    assert_close(log_q.double().exp().sum(), torch.tensor(1.0, dtype=torch.float64))


def test_any_order_bounds_the_likelihood_from_above():
    _, images, log_q = enumerated(toy())
    p = torch.zeros(16).index_add_(0, codes(images), log_q.exp())
    assert (-log_q >= -p.log()[codes(images)] - 1e-6).all()


def test_ancestral_sampling_draws_from_the_joint():
    model, n = toy(), 6000
    made = sample(model, "location", Streams(range(n)))
    orders, images, log_q = enumerated(model)
    expected = torch.zeros(16).index_add_(0, codes(images), log_q.exp())
    found = torch.bincount(codes(made.tokens), minlength=16) / n
    assert_close(found, expected, rtol=0, atol=4 * (0.25 / n) ** 0.5)
    first = torch.zeros(4).index_add_(0, orders[:, 0], log_q.exp())
    assert_close(torch.bincount(made.order[:, 0], minlength=4) / n, first, rtol=0, atol=4 * (0.25 / n) ** 0.5)


def test_at_temperature_zero_the_order_is_a_function_of_the_image():
    model, policy = located(), LocatedOrder(temperature=0)
    made = sample(model, policy, Streams(range(5)))
    again = extract_orders(model, made.tokens, policy, Streams(range(100, 105)))
    assert torch.equal(again.order, made.order)
    assert_close(again.log_prob, made.log_prob, **CLOSE)
    assert_close(-made.log_prob, token_nll(model, made.tokens, None, made.order), **CLOSE)


def test_a_location_costs_what_a_fixed_order_costs():
    class WatchedLocating(Watched):
        def locate(self, state, revealed):
            assert torch.equal(revealed, self.revealed)
            return self.model.locate(state, revealed)

        def forward(self, *inputs):
            raise AssertionError("generation goes step by step")

        joint = forward

    watched = WatchedLocating(located())
    sample(watched, "location", Streams(range(2)))
    assert (watched.calls, watched.candidates, watched.appends) == (GRID.n, GRID.n, GRID.n - 1)


def test_locations_in_few_steps_keep_their_distance():
    """What the head wants most, without the neighbours (the diagonal is far enough)."""
    model, rule = located(), LocatedOrder(temperature=0, steps=3, min_distance=1.4)
    targets = torch.zeros(2, 6).long()
    steps = list(generate(model, rule, Streams(range(2)), targets=targets))
    assert [step.positions.shape[1] for step in steps] == [2, 2, 2]
    first = next(generate(model, LocatedOrder(temperature=0), Streams(range(2)), targets=targets)).positions
    assert torch.equal(steps[0].positions[:, :1], first)
    at = GRID.coordinates()[steps[0].positions]
    assert ((at[:, 0] - at[:, 1]).norm(dim=-1) >= 1.4).all()


@pytest.mark.parametrize("per_step", [2, 4])
def test_several_locations_in_one_step(per_step):
    targets, policy = torch.zeros(2, 6).long(), LocatedOrder(per_step=per_step)
    steps = list(generate(located(), policy, Streams([0, 1]), targets=targets))
    assert [step.positions.shape[1] for step in steps] == {2: [2, 2, 2], 4: [4, 2]}[per_step]
    assert sorted(torch.cat([step.positions for step in steps], 1)[0].tolist()) == list(range(6))


@pytest.mark.parametrize("gradient", [True, False])
def test_the_loss_of_the_head_trains_the_model_or_stops_before_it(gradient):
    model = located(location_gradient=gradient)
    with torch.enable_grad():
        joint_nll(model, torch.zeros(1, 6).long(), None, torch.arange(6)[None])[1].sum().backward()
    assert model.location.context.weight.grad.abs().sum() > 0
    assert (model.blocks[0].mlp.down.weight.grad is not None) == gradient
    assert (model.token_embedding.weight.grad is not None) == gradient


def test_the_e_step_follows_position_and_true_token():
    """With weight 1 on the location, greedy extraction maximises q(position) q(true token) at every step."""
    model, tokens = located(), torch.randint(5, (3, GRID.n), generator=seeded(4))
    order = extract_orders(model, tokens, PolicyConfig("token_likelihood", location=1.0)).order
    state, revealed = model.start(3), torch.zeros(3, GRID.n, dtype=torch.bool)
    everywhere = torch.arange(GRID.n).expand(3, -1)
    for position in order.split(1, dim=1):
        log_p = model.score(state, everywhere).log_softmax(-1).gather(-1, tokens[..., None]).squeeze(-1)
        assert torch.equal((log_p + model.locate(state, revealed)).argmax(1), position[:, 0])
        state = model.append(state, position, tokens.gather(1, position))
        revealed = revealed.scatter(1, position, True)


def test_a_scorer_with_a_head_decides_where():
    drawer, scorer = transformer(seed=1), located()
    made = sample(drawer, LocatedOrder(temperature=0), Streams(range(3)), scorer=scorer)
    alone = extract_orders(scorer, made.tokens, LocatedOrder(temperature=0))
    assert torch.equal(made.order, alone.order)


def test_guidance_leaves_the_location_to_the_conditional_half():
    model, labels = located(num_classes=3), torch.tensor([0, 1, 2])
    guided, revealed = Guided(model, GuidanceConfig(3.0)), torch.zeros(3, GRID.n, dtype=torch.bool)
    where = guided.locate(guided.start(3, labels), revealed)
    assert_close(where, model.locate(model.start(3, labels), revealed), **CLOSE)
    plain = Guided(transformer(num_classes=3), GuidanceConfig(3.0))
    state = plain.start(3, labels)
    with pytest.raises(ValueError, match="no location head"):
        plain.locate(state, revealed)


def test_guided_models_go_where_their_head_says():
    model, labels = located(num_classes=3), torch.tensor([0, 1, 2])
    made = sample(Guided(model, GuidanceConfig(3.0)), LocatedOrder(0.0), Streams(range(3)), condition=labels)
    again = extract_orders(model, made.tokens, LocatedOrder(0.0), condition=labels)
    assert torch.equal(made.order, again.order)


def test_models_without_a_head_say_so():
    for work in (
        lambda model: sample(model, "location", Streams([0])),
        lambda model: model.joint(torch.zeros(1, 6).long(), None, torch.arange(6)[None]),
    ):
        with pytest.raises(ValueError, match="no location head"):
            work(transformer())
    assert isinstance(located(), LocatingModel)


def test_weights_are_those_of_the_revealed_cells_around_each_position():
    revealed = torch.zeros(1, 1, 6, dtype=torch.bool)
    revealed[0, 0, 0] = True  # the top left corner of 2 x 3
    each = torch.stack([around(revealed, cell[None, None], GRID)[0, 0] for cell in torch.eye(9)], dim=-1)
    window = each.reshape(6, 3, 3)
    assert window.sum() == 4, "the corner is in the windows of four positions"
    assert all(window[p, r, c] == 1 for p, r, c in ((0, 1, 1), (1, 1, 0), (3, 0, 1), (4, 0, 0)))


def head_inputs(b, grid, width=16):
    """Inputs of a head in training, all steps of b images."""
    n = grid.n
    hidden, content = (torch.randn(b, n, width, generator=seeded(i), requires_grad=True) for i in (0, 1))
    condition, order = torch.randn(b, width, generator=seeded(2)), random_orders(b, grid, seeded(3))
    last = torch.cat((torch.full((b, 1), n), order[:, :-1]), dim=1)
    return hidden, content, condition, last, revealed_before(inverse(order))


def head_gradients(head, inputs, grid):
    found = head(*inputs, head.tables(grid))
    found.masked_fill(inputs[-1], 0).sum().backward()
    return found.detach(), inputs[0].grad


@torch.enable_grad()
def test_the_head_computes_a_few_maps_at_a_time(monkeypatch):
    """Parts of the steps give the scores and gradients of all steps, in a fraction of the memory."""
    head, grid = LocationHead(16), Grid(24, 24)
    whole, grad = head_gradients(head, head_inputs(2, grid), grid)
    peaks = []
    for part in (2**30, 2**17):
        monkeypatch.setattr(head_module, "MAPS", part)
        inputs = head_inputs(2, grid)
        peaks.append(_peak_of_cpu(partial(head_gradients, head, inputs, grid)) / whole.nbytes)
        again, its_grad = head_gradients(head, head_inputs(2, grid), grid)
        assert_close(again, whole, **CLOSE)
        assert_close(its_grad, grad, rtol=1e-3, atol=1e-4)
    assert peaks[1] < 0.5 * peaks[0]
    assert peaks[1] < 7, "times the map that is returned"


def test_deciding_where_takes_no_maps_of_all_steps():
    """Sampling by the head takes hardly more memory than sampling in a given order."""
    model, grid = located(vocab_size=8), Grid(16, 16)
    peaks = [
        _peak_of_cpu(
            lambda order=order: list(islice(generate(model, order, Streams(range(4)), grid=grid), 3))
        )
        for order in ("raster", "raster", "location")  # the first one allocates what stays
    ]
    assert peaks[2] - peaks[1] < 4 * grid.n**2 * 4, "less than one map (B, N, N)"


def test_names_and_settings():
    assert make_policy("location", GRID, Streams([0])) == LocatedOrder()
    assert LocatedOrder().token_blind
    assert not PolicyConfig("location").deterministic
    assert PolicyConfig("location", temperature=0.0).deterministic
    assert InferredOrder(location=0.5).located
    for wrong, message in (
        ({"order": "location", "sign": -1}, "not to 'location'"),
        ({"order": "location", "temperature": -1.0}, "temperature must be >= 0"),
        ({"order": "entropy", "location": -1.0}, "location must be >= 0"),
    ):
        with pytest.raises(ValueError, match=message):
            PolicyConfig(**wrong)
