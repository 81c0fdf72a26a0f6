"""Steps that reveal different numbers of positions in different images, by the entropies of their tokens."""

from pathlib import Path

import pytest
import torch
from conftest import GRID, MODELS, Subject, TabularModel, published, seeded, tabular, transformer
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.testing import assert_close

from anyorder.contracts import Grid
from anyorder.method.decoding import complete, extract_orders, generate, sample, trace
from anyorder.method.guidance import GuidanceConfig, Guided
from anyorder.method.policies import FixedOrder, InferredOrder
from anyorder.method.policy_config import PolicyConfig
from anyorder.method.sampling import Streams, entropy, sample_tokens
from anyorder.models.compiled import compile_decoding
from anyorder.stages.orders import OrdersStage
from anyorder.stages.train import TrainStage
from anyorder.training.config import TrainConfig

SEEDS = (3, 1, 4, 15, 9)
LIMITS = (1e-6, 1.1, 1.5, 2.5)


@pytest.fixture(autouse=True)
def _no_grad():
    with torch.no_grad():
        yield


class AdaptiveTable(TabularModel):
    """The exact model, with different numbers of reveals."""

    def append_some(self, state: Tensor, positions: Tensor, tokens: Tensor, counts: Tensor) -> Tensor:
        valid = torch.arange(positions.shape[1]) < counts[:, None]
        return state * ((self.images.T[positions] == tokens[..., None]) | ~valid[..., None]).all(1)


OWN = [name for name in MODELS if not name.endswith(("randar", "arpg", "tabular"))]


@pytest.fixture(params=[*OWN[:32:5], *OWN[32:]])
def case(request):
    case = MODELS[request.param]
    return Subject(case.build(), case.classes, case.columns)


def alone(model, limit: float, seed: int, order: str, condition: Tensor | None = None, most: int = 4):
    """The rule for one image, written out with a model that knows nothing of it; counts of the steps, too."""
    state, streams = model.start(1, condition), Streams([seed])
    left, revealed, counts = list(range(6)), [], []
    tokens = torch.zeros(1, 6, dtype=torch.int64)
    while left:
        log_p = model.score(state, torch.tensor([left])).log_softmax(-1)
        h = -entropy(log_p, torch.zeros(1))[0]
        certain = order == "entropy"
        ahead = sorted(range(len(left)), key=lambda i, h=h: float(h[i]) if certain else i)
        chosen: list[int] = []
        for i in ahead[:most]:
            sums = h[[*chosen, i]]
            if chosen and float(sums.sum() - sums.max()) > limit:
                break
            chosen.append(i)
        positions = torch.tensor([[left[i] for i in chosen]])
        found = sample_tokens(log_p[:, chosen], streams.uniform(6 - len(left), positions))
        tokens.scatter_(1, positions, found)
        left = [p for p in left if p not in positions[0].tolist()]
        revealed += positions[0].tolist()
        counts.append(len(chosen))
        if left:
            state = model.append(state, positions, found)
    return revealed, tokens[0].tolist(), counts


@pytest.mark.parametrize("order", ["entropy", "raster"])
def test_each_image_follows_the_rule_written_out(case, order):
    model, condition, differing = case.model, case.condition(len(SEEDS)), set()
    for limit in LIMITS:
        made = sample(
            model, PolicyConfig(order, per_step=4, entropy_limit=limit), Streams(SEEDS), condition=condition
        )
        for row, seed in enumerate(SEEDS):
            some = None if condition is None else condition[row : row + 1]
            revealed, tokens, counts = alone(model, limit, seed, order, some)
            assert made.order[row].tolist() == revealed
            assert made.tokens[row].tolist() == tokens
            assert int(made.steps[row]) == len(counts)
            differing.add(tuple(counts))
    assert len(differing) > 2


def test_a_limit_of_zero_is_one_by_one_bit_for_bit(case):
    condition = case.condition(len(SEEDS))
    for order in ("entropy", "raster", "random"):
        limited = PolicyConfig(order, per_step=4, entropy_limit=0)
        found, single = (
            sample(case.model, policy, Streams(SEEDS), condition=condition)
            for policy in (limited, PolicyConfig(order))
        )
        assert all(torch.equal(value, getattr(single, name)) for name, value in vars(found).items())
        assert not limited.parallel
        assert found.steps.tolist() == [6] * len(SEEDS)


def test_a_high_limit_reveals_as_many_as_there_may_be(case):
    condition = case.condition(len(SEEDS))
    for order in ("entropy", "raster"):
        found, even = (
            sample(case.model, policy, Streams(SEEDS), condition=condition)
            for policy in (PolicyConfig(order, per_step=4, entropy_limit=x) for x in (100, None))
        )
        if not getattr(case.model, "grouped", False):  # groups are predicted together, these are not
            assert torch.equal(found.tokens, even.tokens)
            assert_close(found.log_prob, even.log_prob, rtol=1e-4, atol=1e-4)
        assert found.steps.tolist() == even.steps.tolist() == [2] * len(SEEDS)


POLICIES = (
    PolicyConfig("entropy", per_step=4, entropy_limit=1.1),
    PolicyConfig("margin", sign=-1, per_step=3, entropy_limit=1.1, temperature=0.5, distance=0.1),
    PolicyConfig("max_prob", per_step=6, entropy_limit=1.1, min_distance=1.5, location=0.5),
    PolicyConfig("random", per_step=5, entropy_limit=1.1),
    PolicyConfig("location", per_step=3, entropy_limit=1.1),
)


@pytest.mark.parametrize("policy", POLICIES, ids=lambda policy: policy.label)
@pytest.mark.parametrize("guided", [False, True])
def test_an_image_does_not_depend_on_its_batch(policy, guided):
    model = transformer(num_classes=3, location=True, label_dropout=0.1)
    scorer = transformer(1, num_classes=3, location=True) if policy.decided else None
    generator = Guided(model, GuidanceConfig(2.0, "linear")) if guided else model
    condition = torch.tensor([0, 1, 2, 0, 1])
    made = sample(generator, policy, Streams(SEEDS), condition=condition, scorer=scorer)
    assert len(set(made.steps.tolist())) > 1
    for rows in ([4, 0], [2], [3, 1]):
        seeds, some = [SEEDS[row] for row in rows], condition[rows]
        again = sample(generator, policy, Streams(seeds), condition=some, scorer=scorer, chunk=2)
        for name in ("tokens", "order", "steps"):
            assert torch.equal(getattr(again, name), getattr(made, name)[rows]), name
        assert_close(again.log_prob, made.log_prob[rows], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("order", ["entropy", "random"])
def test_logits_that_are_not_finite_are_named(order):
    model = transformer()
    with torch.no_grad():
        model.head.weight.fill_(torch.nan)
    with pytest.raises(ValueError, match="logits are not finite"):
        sample(model, PolicyConfig(order, per_step=4, entropy_limit=1.0), Streams([0]))


def test_images_and_streams_are_as_many():
    tokens = torch.zeros(4, transformer().grid.n, dtype=torch.int64)
    with pytest.raises(ValueError, match="got 4 images and 2 random streams"):
        extract_orders(transformer(), tokens, "entropy", Streams([0, 1]))


def test_log_probabilities_are_those_of_the_positions_before_the_step():
    model, policy = transformer(), PolicyConfig("entropy", per_step=4, entropy_limit=1.1)
    steps = list(generate(model, policy, Streams(SEEDS)))
    made, alone_in = trace(steps), [0] * len(SEEDS)
    for step in steps:
        assert step.valid.shape == step.positions.shape
        for row, count in enumerate(step.valid.sum(1).tolist()):
            before = made.order[row : row + 1, : alone_in[row]]
            state = model.start(1)
            if before.shape[1]:
                state = model.append(state, before, made.tokens[row : row + 1].gather(1, before))
            positions, tokens = step.positions[row : row + 1, :count], step.tokens[row : row + 1, :count]
            if count:
                log_p = model.score(state, positions).log_softmax(-1).gather(-1, tokens[..., None])[..., 0]
                assert_close(step.log_prob[row : row + 1, :count], log_p, rtol=1e-4, atol=1e-4)
            alone_in[row] += count
            # What pads a step changes nothing where it is put once more.
            assert torch.equal(made.tokens[row].gather(0, step.positions[row]), step.tokens[row])
    assert alone_in == [6] * len(SEEDS)


def test_extraction_gives_the_likelihood_of_the_steps():
    """Over all images of a small grid, the probabilities of a token-blind rule sum to 1."""
    model = AdaptiveTable(tabular(2).joint.reshape(2, 2, 2, 2), Grid(2, 2))
    for limit in (0.3, 0.7, 1.3):
        policy = PolicyConfig("entropy", per_step=3, entropy_limit=limit)
        found = extract_orders(model, model.images, policy, Streams(range(16)))
        p = found.log_prob.double().sum(1).exp()
        assert abs(float(p.sum()) - 1) < 1e-4
        taken = sample(model, policy, Streams(range(4000))).tokens @ torch.tensor([8, 4, 2, 1])
        expected = 4000 * p
        assert float(((taken.bincount(minlength=16) - expected) ** 2 / expected).sum()) < 37.7  # p < 0.001


@given(seed=st.integers(0, 500), limit=st.floats(0.01, 4.0), h=st.integers(1, 3), w=st.integers(1, 4))
def test_known_positions_are_kept(seed, limit, h, w):
    grid, policy = Grid(h, w), PolicyConfig("entropy", per_step=4, entropy_limit=limit)
    tokens = torch.randint(5, (4, grid.n), generator=seeded(seed))
    known = torch.rand(4, grid.n, generator=seeded(seed)) < 0.4
    with torch.no_grad():
        found = complete(transformer(depth=1), tokens, known, policy, Streams(range(4)), grid=grid)
    assert torch.equal(found.tokens[known], tokens[known])
    assert torch.equal(found.order.sort(1).values, torch.arange(grid.n).expand(4, -1))
    for row, count in enumerate(known.sum(1).tolist()):
        assert known[row].gather(0, found.order[row, :count]).all()
        assert int(found.steps[row]) <= grid.n - count


def test_gaps_of_the_cache_are_never_read():
    """A NaN that lies in memory by chance would spread, also with a weight of 0."""
    model, policy = transformer(), PolicyConfig("entropy", per_step=4, entropy_limit=1.1)
    state = model.start(2)
    for x in (state.cache.keys, state.cache.values):
        x.fill_(torch.nan)
    positions, tokens = torch.tensor([[0, 1, 2], [3, 3, 3]]), torch.tensor([[1, 2, 3], [1, 1, 1]])
    state = model.append_some(state, positions, tokens, torch.tensor([3, 1]))
    found = model.score(state, torch.tensor([[4, 5], [4, 5]]))
    for row, count in ((0, 3), (1, 1)):
        single = model.append(model.start(1), positions[row : row + 1, :count], tokens[row : row + 1, :count])
        assert_close(found[row : row + 1], model.score(single, torch.tensor([[4, 5]])), rtol=1e-4, atol=1e-4)
    assert sample(model, policy, Streams(SEEDS)).log_prob.isfinite().all()


def test_a_state_whose_images_differ_goes_on_one_by_one():
    model, plain = transformer(), transformer()
    positions, tokens = torch.tensor([[0, 1], [3, 3]]), torch.tensor([[1, 2], [1, 1]])
    state = model.append_some(model.start(2), positions, tokens, torch.tensor([2, 1]))
    state = model.append(state, torch.tensor([[2], [2]]), torch.tensor([[0], [4]]))
    single = plain.append(plain.start(1), torch.tensor([[3, 2]]), torch.tensor([[1, 4]]))
    at = torch.tensor([[5, 4]])
    assert_close(model.score(state, at.expand(2, -1))[1:], plain.score(single, at), rtol=1e-4, atol=1e-4)


def test_compiled_code_agrees():
    policy, eager, compiled = POLICIES[0], transformer(), transformer()
    compile_decoding(compiled, backend="eager")
    found, made = (sample(model, policy, Streams(SEEDS)) for model in (compiled, eager))
    assert torch.equal(found.tokens, made.tokens)
    assert torch.equal(found.steps, made.steps)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"entropy_limit": 1.0}, "needs the most positions of a step: give per_step=8"),
        ({"entropy_limit": 1.0, "steps": 4}, "give per_step=8, say, and not steps"),
        ({"entropy_limit": -1.0, "per_step": 2}, "entropy_limit must be >= 0 nats, got -1.0"),
        ({"entropy_limit": 1.0, "per_step": 2, "rescore": 0.5}, "and no rescore"),
        ({"entropy_limit": 1.0, "per_step": 2, "order": "token_likelihood"}, "does not look at the token"),
    ],
)
def test_what_does_not_go_with_a_limit(settings, message):
    with pytest.raises(ValueError, match=message):
        PolicyConfig(**settings)


def test_models_that_keep_images_in_step_are_refused():
    model = published(type(MODELS["randar"].build()))
    policy = PolicyConfig("raster", per_step=2, entropy_limit=1.0)
    for each in (model, Guided(model, GuidanceConfig(2.0))):
        with pytest.raises(ValueError, match="entropy_limit is not for a RandAR, whose images keep in step"):
            sample(each, policy, Streams([0]), condition=torch.tensor([0]))


def test_extraction_refuses_a_limit():
    policy = PolicyConfig("entropy", per_step=4, entropy_limit=0.5)
    with pytest.raises(ValueError, match=r"policy\.entropy_limit is for generating"):
        OrdersStage(Path("model"), Path("tokens"), policy=policy)
    with pytest.raises(ValueError, match="leave class_weight, entropy_limit out"):
        TrainStage(Path("tokens"), online=policy, train=TrainConfig(ema=0.9))


def test_the_label_says_the_limit():
    policy = PolicyConfig("raster", per_step=4, entropy_limit=0.5)
    assert policy.label == "raster, per_step 4, entropy_limit 0.5"
    assert isinstance(policy.build(GRID, Streams([0])), FixedOrder)
    assert InferredOrder(per_step=4, entropy_limit=0.5).adaptive
