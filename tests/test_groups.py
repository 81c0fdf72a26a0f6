"""Steps of several positions that are predicted together: one mask, in training and in decoding."""

import copy
from itertools import permutations, product

import pytest
import torch
from conftest import GRID, GROUPED, MODELS, Subject, seeded, transformer
from torch import Tensor
from torch.testing import assert_close

from anyorder.contracts import Grid, GroupingModel
from anyorder.method.decoding import complete, extract_orders, sample
from anyorder.method.guidance import GuidanceConfig, Guided
from anyorder.method.loss import image_nll, joint_nll, token_nll
from anyorder.method.policies import InferredOrder, LocatedOrder
from anyorder.method.policy_config import PolicyConfig
from anyorder.method.sampling import Streams
from anyorder.models import groups
from anyorder.models.attention import attend_with_total, merge_with_own
from anyorder.orders import random_orders, static_order

CLOSE = {"rtol": 1e-4, "atol": 2e-5}
SIZES = ([2, 2, 2], [1, 2, 3], [3, 2, 1], [6], [1, 4, 1], [4, 1, 1], [2, 1, 1, 2], [1, 1, 1, 1, 1, 1])
ROWS = 3


@pytest.fixture(autouse=True)
def _no_grad():
    with torch.no_grad():
        yield


def grouped(**changes):
    return transformer(grouped=True, **changes)


@pytest.fixture(params=[*GROUPED, "next=absolute,current=none,qk_norm,conditional", "class,attributes,text"])
def case(request):
    """Transformers of every kind, grouped; with and without guidance."""
    case = MODELS[request.param]
    model = case.build()
    getattr(model, "model", model).config.grouped = True
    return Subject(model, case.classes, case.columns)


def inputs(subject, seed: int = 0):
    order = random_orders(ROWS, subject.model.grid, seeded(seed))
    return subject.tokens(ROWS, seed=seed), subject.condition(ROWS), order


def step_by_step(model, tokens: Tensor, condition: Tensor | None, order: Tensor, sizes: list[int]) -> Tensor:
    """Logits (B, N, V) in order steps from `score_group` and `append_group`."""
    state, logits = model.start(len(tokens), condition), []
    for positions in order.split(sizes, dim=1):
        logits.append(model.score_group(state, positions))
        state = model.append_group(state, tokens.gather(1, positions))
    return torch.cat(logits, dim=1)


# --- the layout and the mask


def test_the_inputs_of_a_sequence():
    plan = groups.layout([1, 3, 2], 6, torch.device("cpu"))
    assert plan.first == 1
    assert plan.asks.tolist() == [0, 1, 2, 3, 4, 5, 5]
    assert plan.holds.tolist() == [0, 0, 0, 1, 2, 3], "without the condition"
    assert plan.outputs.tolist() == [0, 1, 2, 3, 4, 5]
    assert plan.behind.tolist() == [0, 1, 1, 1, 4, 4]
    assert plan.group.tolist() == [0, 1, 1, 1, 2, 2, 2]


@pytest.mark.parametrize("sizes", [[1, 2, 3], [2, 2, 2], [6], [1, 1, 1, 1, 2]])
def test_growing_or_equal_steps_take_no_further_inputs(sizes):
    assert len(groups.layout(sizes, 6, torch.device("cpu")).group) == 6


def test_the_mask_is_causal_between_steps_and_open_within():
    assert groups.visible(torch.tensor([0, 1, 1, 2])).int().tolist() == [
        [1, 0, 0, 0], [1, 1, 1, 0], [1, 1, 1, 0], [1, 1, 1, 1],
    ]  # fmt: skip
    assert torch.equal(groups.visible(torch.arange(5)), torch.ones(5, 5, dtype=torch.bool).tril())


@pytest.mark.parametrize("sizes", [[3, 4], [0, 6], [7, -1], []])
def test_sizes_that_do_not_fit_are_refused(sizes):
    with pytest.raises(ValueError, match="sizes of steps must be >= 1 and sum to 6"):
        grouped()(torch.zeros(1, 6, dtype=torch.int64), None, torch.arange(6)[None], sizes=sizes)


def test_candidates_of_several_inputs_attend_to_the_prefix_and_their_own():
    q, k, v = torch.randn(3, 2, 2, 6, 4, generator=seeded(0))
    keys, values = torch.randn(2, 2, 2, 5, 4, generator=seeded(1))
    found = merge_with_own(q, k, v, *attend_with_total(q, keys, values), 3)
    for own in (slice(0, 3), slice(3, 6)):
        seen = (torch.cat((a, b[:, :, own]), dim=2) for a, b in ((keys, k), (values, v)))
        assert_close(found[:, :, own], torch.nn.functional.scaled_dot_product_attention(q[:, :, own], *seen))


# --- teacher-forced = step by step


def test_teacher_forced_equals_step_by_step(case):
    tokens, condition, order = inputs(case)
    for sizes in SIZES:
        forward = case.model.forward(tokens, condition, order, sizes=sizes)
        assert_close(step_by_step(case.model, tokens, condition, order, sizes), forward, **CLOSE)


def test_groups_of_one_are_the_model_of_before(case):
    tokens, condition, order = inputs(case)
    before, ones = (case.model.forward(tokens, condition, order, sizes=s) for s in (None, [1] * 6))
    assert torch.equal(before, ones)
    state = case.model.start(ROWS, condition)
    alone = case.model.start(ROWS, condition)
    for position in order.split(1, dim=1):
        assert torch.equal(case.model.score_group(state, position), case.model.score(alone, position))
        token = tokens.gather(1, position)
        state, alone = case.model.append_group(state, token), case.model.append(alone, position, token)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("sizes", SIZES[:6])
def test_tokens_of_a_step_and_of_later_ones_change_none_of_its_logits(sizes, training):
    model = grouped(dropout=0.1, token_dropout=0.2).train(training)
    tokens, order = torch.randint(5, (ROWS, 6), generator=seeded(0)), random_orders(ROWS, GRID, seeded(1))

    def logits(tokens: Tensor) -> Tensor:
        torch.manual_seed(1)  # the same dropout
        return model(tokens, None, order, sizes=sizes)

    before, done = logits(tokens), 0
    for size in sizes:
        here = order[:, done : done + 1]  # the first of the step
        after = logits(tokens.scatter(1, here, (tokens.gather(1, here) + 1) % 5))
        end = done + size
        assert_close(after[:, :end], before[:, :end], rtol=0, atol=1e-6)
        if end < 6 and not training:
            assert (after[:, end:] - before[:, end:]).abs().amax((0, 2)).min() > 1e-4, "all later ones see it"
        done = end


def test_positions_of_a_step_see_one_another():
    model, tokens = grouped(), torch.randint(5, (1, 6), generator=seeded(0))
    one, other = torch.tensor([[0, 1, 2, 3, 4, 5]]), torch.tensor([[0, 1, 4, 3, 2, 5]])
    sizes = [1, 2, 1, 2]
    first, second = (model(tokens, None, order, sizes=sizes)[0] for order in (one, other))
    assert_close(first[0], second[0])
    assert not torch.allclose(first[1], second[1], atol=1e-3), "position 1 knows that 2 or 4 comes with it"


def test_candidates_behind_a_step_are_steps_of_their_own(case):
    tokens, condition, order = inputs(case)
    for sizes in ([2], [1, 3], [3, 1], [4]):
        state, known = case.model.start(ROWS, condition), sum(sizes)
        for positions in order[:, :known].split(sizes, dim=1):
            case.model.score_group(state, positions)
            state = case.model.append_group(state, tokens.gather(1, positions))
        scored = case.model.score(copy.deepcopy(state), order[:, known:])
        for column in range(known, 6):
            moved = order.clone()
            moved[:, [known, column]] = order[:, [column, known]]
            forward = case.model.forward(tokens, condition, moved, sizes=[*sizes, *[1] * (6 - known)])
            assert_close(scored[:, column - known], forward[:, known], **CLOSE)


def test_positions_that_were_not_scored_together_are_appended_one_by_one(case):
    tokens, condition, order = inputs(case)
    for begin in ([], [2], [1, 3]):
        done = sum(begin)
        forward = case.model.forward(tokens, condition, order, sizes=[*begin, *[1] * (6 - done)])
        state = case.model.start(ROWS, condition)
        for positions in order[:, :done].split(begin, dim=1) if begin else ():
            case.model.score_group(state, positions)
            state = case.model.append_group(state, tokens.gather(1, positions))
        case.model.score_group(state, order[:, done:])  # looked at, but not taken
        case.model.score(state, order[:, done:])
        state = case.model.append(state, order[:, done:5], tokens.gather(1, order[:, done:5]))
        assert_close(case.model.score(state, order[:, 5:])[:, 0], forward[:, 5], **CLOSE)


def test_models_satisfy_the_protocol(case):
    assert isinstance(case.model, GroupingModel)
    assert case.model.grouped
    assert not transformer().grouped


def test_a_group_that_was_not_scored_cannot_be_appended():
    model = grouped()
    with pytest.raises(ValueError, match="call that first"):
        model.append_group(model.start(1), torch.zeros(1, 2, dtype=torch.int64))


# --- the loop


POLICIES = [
    PolicyConfig("random", steps=3),
    PolicyConfig("hilbert", steps=2),
    PolicyConfig("raster", steps=3, schedule="one_minus_cos"),
    PolicyConfig("spiral_out", steps=4, schedule="cosine", min_distance=1.5),
    PolicyConfig("entropy", steps=3),
    PolicyConfig("margin", sign=-1, per_step=4),
    PolicyConfig("location", steps=3),
]


@pytest.mark.parametrize("policy", POLICIES, ids=lambda policy: policy.label)
@pytest.mark.parametrize(("chunk", "guided"), [(None, False), (1, True)])
def test_log_probabilities_of_samples_are_the_exact_likelihood(policy, chunk, guided):
    model, labels = grouped(num_classes=3, location=True), torch.arange(4) % 3
    model = Guided(model, GuidanceConfig(2.0, "linear")) if guided else model
    sizes = policy.sizes(6)
    made = sample(model, policy, Streams(range(4)), condition=labels, chunk=chunk)
    exact = token_nll(model, made.tokens, labels, made.order, sizes=sizes)
    assert_close(-made.log_prob, exact, **CLOSE)
    assert_close(
        image_nll(model, made.tokens, labels, made.order, sizes=sizes)["nll"], exact.double().mean(1)
    )
    found = extract_orders(model, made.tokens, policy, Streams(range(4)), condition=labels)
    assert torch.equal(found.order, made.order)
    assert_close(found.log_prob, made.log_prob, **CLOSE)


def test_another_model_decides_where():
    model, scorer = grouped(), transformer(seed=1)
    made = sample(model, InferredOrder(steps=3), Streams(range(4)), scorer=scorer)
    assert_close(-made.log_prob, token_nll(model, made.tokens, None, made.order, sizes=[2, 2, 2]), **CLOSE)


def test_completion_begins_behind_what_is_known():
    model, tokens = grouped(), torch.randint(5, (2, 6), generator=seeded(0))
    known = torch.tensor([[True, False, False, True, False, False], [False, True] + [False] * 4])
    policy = PolicyConfig("raster", steps=2)
    made = complete(model, tokens, known, policy, Streams(range(2)))
    for row, given in enumerate((2, 1)):
        one = slice(row, row + 1)
        sizes = [*[1] * given, *policy.sizes(6 - given)]
        exact = token_nll(model, made.tokens[one], None, made.order[one], sizes=sizes)
        assert_close(-made.log_prob[one, given:], exact[:, given:], **CLOSE)


@pytest.mark.parametrize("order", ["entropy", "hilbert"])
def test_grouped_orders_have_a_normalised_density(order):
    model = grouped(vocab_size=3, grid=(2, 2))
    images = torch.cartesian_prod(*[torch.arange(3)] * 4)
    p = extract_orders(model, images, PolicyConfig(order, steps=2)).log_prob.double().sum(1).exp()
    assert p.sum() == pytest.approx(1, abs=1e-4)


def test_orders_of_classes_come_in_groups_too():
    model, labels, config = grouped(num_classes=3), torch.arange(4) % 3, PolicyConfig("class_mean", steps=3)
    orders = random_orders(4, GRID, seeded(0))
    policy = config.build(GRID, Streams(range(4)), orders)
    made = sample(model, policy, Streams(range(4)), condition=labels)
    assert torch.equal(made.order, orders)
    exact = token_nll(model, made.tokens, labels, orders, sizes=config.sizes(6))
    assert_close(-made.log_prob, exact, **CLOSE)


def test_a_batch_does_not_change_its_images():
    model = grouped()
    together = sample(model, PolicyConfig("random", steps=3), Streams(range(5))).tokens
    assert torch.equal(together[[3]], sample(model, PolicyConfig("random", steps=3), Streams([3])).tokens)


def test_other_grids():
    model, grid = grouped(), Grid(3, 4)
    made = sample(model, PolicyConfig("raster", steps=4), Streams(range(2)), grid=grid)
    assert_close(
        -made.log_prob, token_nll(model, made.tokens, None, made.order, grid, sizes=[3] * 4), **CLOSE
    )


# --- where to go


@pytest.mark.parametrize("sizes", SIZES)
def test_location_of_groups_equals_step_by_step(sizes):
    """A step's positions are drawn without replacement from what the head says before it."""
    model, order = grouped(location=True, rotary=True), random_orders(ROWS, GRID, seeded(1))
    tokens = torch.randint(5, (ROWS, 6), generator=seeded(0))
    logits, where = model.joint(tokens, None, order, sizes=sizes)
    assert_close(logits, model(tokens, None, order, sizes=sizes))
    state, closed, step = model.start(ROWS), torch.zeros(ROWS, 6, dtype=torch.bool), 0
    for positions in order.split(sizes, dim=1):
        log_q = model.locate(state, closed)
        for position in positions.split(1, dim=1):
            assert_close(log_q.masked_fill(closed, -torch.inf).log_softmax(1), where[:, step], **CLOSE)
            closed, step = closed.scatter(1, position, True), step + 1
        model.score_group(state, positions)
        state = model.append_group(state, tokens.gather(1, positions))


@pytest.mark.parametrize("sizes", [[2, 2], [1, 3]])
def test_order_and_image_have_a_normalised_density(sizes):
    model = grouped(location=True, vocab_size=2, grid=(2, 2))
    pairs = list(product(permutations(range(4)), product(range(2), repeat=4)))
    orders, images = (torch.tensor(column) for column in zip(*pairs, strict=True))
    content, where = joint_nll(model, images, None, orders, sizes=sizes)
    assert (-(content + where)).sum(1).double().exp().sum() == pytest.approx(1, abs=1e-4)


def test_located_groups_follow_the_head():
    model, n = grouped(location=True, vocab_size=2, grid=(2, 2)), 4000
    made = sample(model, LocatedOrder(steps=2), Streams(range(n)))
    pairs = list(permutations(range(4), 2))
    first = model.locate(model.start(1), torch.zeros(1, 4, dtype=torch.bool))[0].double().exp()
    expected = n * torch.stack([first[a] * first[b] / (1 - first[a]) for a, b in pairs])
    counts = torch.stack([(made.order[:, :2] == torch.tensor(pair)).all(1).sum() for pair in pairs])
    assert ((counts - expected).square() / expected).sum() < 11 + 5 * 22**0.5


# --- training


def test_gradients_reach_every_parameter():
    with torch.enable_grad():
        model = grouped(num_classes=3, location=True).train()
        tokens, order = torch.randint(5, (ROWS, 6), generator=seeded(0)), random_orders(ROWS, GRID, seeded(1))
        content, where = joint_nll(model, tokens, torch.arange(3), order, sizes=[1, 2, 3])
        (content + where).mean().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().sum() > 0, name


def test_layouts_made_in_inference_mode_serve_training():
    model, tokens = grouped(vocab_size=4), torch.zeros(1, 6, dtype=torch.int64)
    order, sizes = static_order("raster", GRID)[None], [1, 1, 2, 2]
    with torch.inference_mode():
        model(tokens, None, order, sizes=sizes)
    with torch.enable_grad():
        model(tokens, None, order, sizes=sizes).sum().backward()
