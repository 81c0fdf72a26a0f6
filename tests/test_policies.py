import math
from functools import partial

import pytest
import torch
from conftest import POLICIES, Watched, seeded, transformer
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from anyorder.contracts import Grid, Progress
from anyorder.method.decoding import complete, generate, sample, trace
from anyorder.method.policies import FixedOrder, InferredOrder, LocatedOrder
from anyorder.method.policy_config import PolicyConfig, make_policy
from anyorder.method.sampling import SCORES, Streams
from anyorder.method.schedules import reveals
from anyorder.orders import STATIC, inverse, random_orders, static_order
from anyorder.settings import parse, read_stored

GRID = Grid(2, 3)
MODEL = transformer(depth=1)


def progress(revealed: Tensor, last: int = -1, grid: Grid = GRID) -> Progress:
    rows = len(revealed)
    never, still_open = torch.full(revealed.shape, -1), int((~revealed[0]).sum())
    return Progress(
        grid, revealed, torch.full((rows,), last), 0, grid.n, still_open, torch.zeros(revealed.shape), never,
        revealed_at=never.clone(), noise=partial(Streams(range(rows)).gumbel, 0),
    )  # fmt: skip


def nothing(rows: int = 1) -> Tensor:
    return torch.zeros(rows, GRID.n, dtype=torch.bool)


# --- the contract


def test_every_position_is_revealed_once(policy):
    streams, model = Streams(range(3)), Watched(MODEL)
    rule = policy(GRID, streams)
    steps = list(generate(model, rule, streams))
    assert [s.positions.shape[1] for s in steps] == rule.sizes(6)
    assert rule.steps or rule.sizes(6) == ([4, 2] if rule.per_step == 4 else [1] * 6)
    assert [s.index for s in steps] == list(range(len(steps)))
    assert all(s.total == 6 for s in steps)
    result = trace(iter(steps))
    assert torch.equal(result.order.sort(1).values, torch.arange(6).expand(3, -1))
    for step in steps:
        assert torch.equal(result.tokens.gather(1, step.positions), step.tokens)


@settings(max_examples=60, deadline=None)
@given(
    name=st.sampled_from(sorted(POLICIES)),
    h=st.integers(1, 3),
    w=st.integers(1, 4),
    rows=st.integers(1, 3),
    seed=st.integers(0, 10_000),
)
def test_known_positions_are_never_touched(name, h, w, rows, seed):
    grid, streams = Grid(h, w), Streams(range(rows))
    tokens = torch.randint(5, (rows, grid.n), generator=seeded(seed))
    known = torch.rand(1, grid.n, generator=seeded(seed)) < 0.5
    known = known.repeat(rows, 1).gather(1, random_orders(rows, grid, seeded(seed)))  # as many in each row
    rule = POLICIES[name](grid, streams)
    result = complete(Watched(MODEL), tokens, known, rule, streams, grid=grid)
    assert torch.equal(result.tokens[known], tokens[known])
    assert torch.equal(result.order.sort(1).values, torch.arange(grid.n).expand(rows, -1))
    count = int(known[0].sum())
    assert known.gather(1, result.order[:, :count]).all()
    assert not known.gather(1, result.order[:, count:]).any()


def test_proposals_are_open_and_selections_are_proposed(policy):
    revealed = torch.tensor(
        [[True, False, True, False, False, True], [False, True, True, True, False, False]]
    )
    now = progress(revealed, last=2)
    now.total = 3
    rule = policy(GRID, Streams(range(2)))
    candidates = rule.propose(now)
    assert not revealed.gather(1, candidates).any()
    logits = torch.randn(*candidates.shape, 5, generator=seeded(0))
    ratings = rule.rate(logits, torch.zeros_like(candidates))
    assert ratings.shape == candidates.shape
    chosen = rule.select(now, candidates, ratings)
    assert chosen.shape == (2, rule.take(now))
    assert all(len(set(row)) == len(row) for row in candidates.gather(1, chosen).tolist())


# --- fixed orders


@pytest.mark.parametrize("per_step", [1, 2, 5, 9])
def test_fixed_order_is_followed(per_step):
    order = random_orders(3, GRID, seeded(0))
    streams = Streams(range(3))
    rule = FixedOrder(order, GRID, per_step=per_step)
    assert torch.equal(trace(generate(MODEL, rule, streams)).order, order)


def test_fixed_order_skips_what_is_known():
    order = torch.tensor([5, 4, 3, 2, 1, 0])
    known = torch.tensor([[False, True, False, False, True, False], [True, True, False, False, False, False]])
    zeros = torch.zeros(2, 6, dtype=torch.int64)
    result = complete(MODEL, zeros, known, FixedOrder(order, GRID), Streams(range(2)))
    assert result.order.tolist() == [[1, 4, 5, 3, 2, 0], [0, 1, 5, 4, 3, 2]]


def test_fixed_order_refuses():
    with pytest.raises(ValueError, match="exactly once"):
        FixedOrder(torch.zeros(6, dtype=torch.int64), GRID)
    with pytest.raises(ValueError, match="per_step must be >= 1, got 0"):
        FixedOrder(torch.arange(6), GRID, per_step=0)


# --- inferred orders


def chosen_positions(rule: InferredOrder, ratings: list[float]) -> list[int]:
    now = progress(nothing())
    candidates = rule.propose(now)
    return candidates.gather(1, rule.select(now, candidates, torch.tensor([ratings]))).tolist()[0]


def test_the_best_rated_come_first():
    ratings = [0.1, 0.5, 0.2, 0.9, 0.3, 0.0]
    assert chosen_positions(InferredOrder(), ratings) == [3]
    assert chosen_positions(InferredOrder(per_step=3), ratings) == [3, 1, 4]
    assert chosen_positions(InferredOrder(per_step=99), ratings) == [3, 1, 4, 2, 0, 5]


@pytest.mark.parametrize("score", SCORES)
def test_sign_reverses_the_ratings(score):
    logits, tokens = torch.randn(2, 6, 5, generator=seeded(0)), torch.zeros(2, 6, dtype=torch.int64)
    forward, backward = (InferredOrder(score, sign).rate(logits, tokens) for sign in (1, -1))
    assert torch.equal(forward, SCORES[score](logits, tokens))
    assert torch.equal(backward, -forward)


def test_location_temperature_draws_from_a_softmax():
    """Gumbel-max: rating r at temperature T wins with probability proportional to exp(r / T)."""
    rows, temperature = 8000, 0.5
    rule = InferredOrder(temperature=temperature)
    ratings = torch.tensor([0.0, 0.5, -0.5, 1.0, 0.2, 0.1])
    now = progress(nothing(rows))
    candidates = rule.propose(now)
    winners = rule.select(now, candidates, ratings.expand(rows, -1)).flatten().bincount(minlength=6)
    expected = rows * (ratings / temperature).softmax(0)
    assert ((winners - expected) ** 2 / expected).sum() < 20.5  # chi-square, 5 degrees of freedom: p < 0.001


@pytest.mark.parametrize(("to", "distances"), [("last", [2, 1, 1, 2]), ("nearest", [1, 1, 1, 2])])
def test_distance_is_paid_in_nats(to, distances):
    """Patches 0 and 3 (last) of a 1 x 6 grid are revealed; once distance is paid, the rest decides."""
    rule = InferredOrder(distance=0.7, distance_to=to, per_step=4)
    revealed = torch.tensor([[True, False, False, True, False, False]])
    now = progress(revealed, last=3, grid=Grid(1, 6))
    candidates = rule.propose(now)
    assert candidates.tolist() == [[1, 2, 4, 5]]
    rest = torch.tensor([[0.02, 0.04, 0.01, 0.03]])
    assert rule.select(now, candidates, 0.7 * torch.tensor([distances]) + rest).tolist() == [[1, 3, 0, 2]]


def test_distance_is_euclidean():
    rule = InferredOrder(distance=1.0, per_step=6)
    now = progress(torch.tensor([[True] + [False] * 5]), last=0)
    candidates = rule.propose(now)
    nearest = candidates.gather(1, rule.select(now, candidates, torch.tensor([[0, 0, 0.1, 0, 0]])))
    assert nearest.tolist() == [[3, 1, 4, 2, 5]]  # 0.9, 1, sqrt(2), 2, sqrt(5)


def test_location_noise_belongs_to_positions():
    rule = InferredOrder(temperature=1.0, per_step=2)
    now = progress(torch.tensor([[True, False, True, False, False, False]] * 3))
    candidates = rule.propose(now)
    chosen = candidates.gather(1, rule.select(now, candidates, torch.zeros(3, 4)))
    assert torch.equal(
        chosen, now.noise(torch.arange(6)).masked_fill(now.revealed, -torch.inf).topk(2).indices
    )


def test_distance_counts_from_the_first_reveal_on():
    assert chosen_positions(InferredOrder(distance=100.0), [0, 0, 0, 0, 0.1, 0]) == [4]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"steps": -1}, "steps must be >= 0"),
        ({"steps": 2, "per_step": 2}, "give either per_step or steps, got 2 and 2"),
        ({"steps": 2, "schedule": "sine"}, "unknown schedule 'sine': choose one of constant"),
        ({"schedule": "cosine"}, "schedule 'cosine' needs to know in how many steps"),
        ({"min_distance": -1.0}, "min_distance must be >= 0"),
        ({"min_distance": 2.0}, "give per_step or steps, too"),
        ({"distance_to": "nearest"}, "changes nothing without distance"),
        ({"rescore": 0.0}, r"rescore must lie in \(0, 1\]"),
        ({"min_distance": math.inf, "per_step": 2}, "min_distance must be >= 0, got inf"),
        ({"rate_every": 1.5}, "rate_every must be a whole number, got 1.5"),
        ({"per_step": "2"}, "per_step must be a whole number, got '2'"),
        ({"rate_every": 0}, "rate_every must be >= 1"),
        ({"rate_every": 2, "temperature": 1.0}, "rate_every takes no per_step"),
        ({"rate_every": 2, "steps": 3}, "rate_every takes no per_step"),
        ({"class_weight": -1.0}, "class_weight must be >= 0"),
        ({"score": "luck"}, "unknown score 'luck': choose one of token_likelihood"),
        ({"sign": 0}, "sign must be 1"),
        ({"temperature": -0.1}, "temperature must be >= 0"),
        ({"distance_to": "moon"}, "distance_to must be 'last' or 'nearest', got 'moon'"),
        ({"per_step": 0}, "per_step must be >= 1"),
    ],
)
def test_inferred_order_refuses(settings, message):
    with pytest.raises(ValueError, match=message):
        InferredOrder(**settings)


def test_only_the_rule_of_the_paper_peeks():
    assert {score: InferredOrder(score).token_blind for score in SCORES} == {
        "token_likelihood": False,
        "max_prob": True,
        "entropy": True,
        "margin": True,
    }
    assert FixedOrder.token_blind
    assert InferredOrder().name == "entropy"
    assert InferredOrder("margin", -1).name == "margin-reversed"


# --- several positions at once


def of_a_step(rule, now: Progress, ratings: Tensor) -> Tensor:
    """Positions (B, K) that an inferred or a fixed order reveals now."""
    candidates = rule.propose(now)
    return candidates.gather(1, rule.select(now, candidates, ratings.gather(1, candidates)))


@settings(max_examples=80, deadline=None)
@given(
    h=st.integers(1, 6),
    w=st.integers(1, 6),
    k=st.integers(1, 9),
    min_distance=st.sampled_from([0.0, 1.0, 1.2, 1.5, 2.0, 2.9, 9.0]),
    seed=st.integers(0, 10_000),
)
def test_positions_of_a_step_keep_their_distance_where_possible(h, w, k, min_distance, seed):
    """Against the greedy rule written out for one image: the best that is far enough, or else the best."""
    grid, rows = Grid(h, w), 3
    order = random_orders(rows, grid, seeded(seed))
    revealed = torch.zeros(rows, grid.n, dtype=torch.bool).scatter(1, order[:, : grid.n // 3], True)
    now = progress(revealed, grid=grid)
    wanted = torch.randn(rows, grid.n, generator=seeded(seed + 1))
    at, min_distance = grid.coordinates(), min_distance if k > 1 else 0.0
    for rule in (
        InferredOrder(per_step=k, min_distance=min_distance),
        FixedOrder(
            wanted.argsort(1, descending=True), grid, per_step=k, min_distance=min_distance if k > 1 else 0.0
        ),
    ):
        for row, found in enumerate(of_a_step(rule, now, wanted).tolist()):
            left = [p for p in wanted[row].argsort(descending=True).tolist() if not revealed[row, p]]
            expected: list[int] = []
            while left and len(expected) < k:
                far = [p for p in left if all((at[p] - at[q]).norm() > min_distance - 1e-3 for q in expected)]
                expected.append((far or left)[0])
                left.remove(expected[-1])
            assert found == expected


def test_with_one_position_per_step_the_distance_changes_nothing():
    for order in ("random", "entropy"):
        near, far = (
            trace(generate(MODEL, config.build(GRID, Streams(range(3))), Streams(range(3))))
            for config in (PolicyConfig(order), PolicyConfig(order, steps=6, min_distance=3.0))
        )
        assert torch.equal(near.order, far.order)
        assert torch.equal(near.tokens, far.tokens)


def test_steps_are_for_what_is_open():
    """With 2 of 6 positions known, 3 steps reveal 1, 2 and 1 of the others."""
    prefix = (torch.tensor([[5, 2], [0, 1]]), torch.zeros(2, 2, dtype=torch.int64))
    rule = InferredOrder(steps=3, schedule="constant")
    steps = generate(MODEL, rule, Streams(range(2)), known=prefix)
    assert [step.positions.shape[1] for step in steps] == reveals(4, 3)


def test_a_fixed_order_of_some_images():
    order = random_orders(3, GRID, seeded(0))
    rule = FixedOrder(order, GRID, steps=3, name="mine")
    some = rule.subset(torch.tensor([2, 0]))
    assert torch.equal(inverse(some.rank), order[[2, 0]])
    assert (some.steps, some.name) == (3, "mine")
    assert FixedOrder(torch.arange(6), GRID).subset(torch.tensor([1])).rank.shape == (6,)


# --- lazy orders


def test_lazy_candidates_are_the_best_and_those_with_news():
    """On a line of 8: position 0 is rated best; next to 5, revealed since, lie the ones to look at again."""
    grid = Grid(1, 8)
    revealed = torch.tensor([[False] * 5 + [True] + [False] * 2])
    now = progress(revealed, last=5, grid=grid)
    now.step, now.total = 1, 8
    now.ratings = torch.tensor([[0.9, 0.1, 0.2, 0.3, 0.4, 0.0, 0.5, 0.6]])
    now.rated_at = torch.zeros(1, 8, dtype=torch.int64)
    now.revealed_at = torch.tensor([[-1, -1, -1, -1, -1, 0, -1, -1]])
    assert InferredOrder(rescore=0.5).propose(now).tolist() == [[0, 4, 6, 7]]
    assert InferredOrder(rescore=0.4).propose(now).tolist() == [[0, 4, 7]]
    assert InferredOrder(rescore=0.01).propose(now).tolist() == [[0]]
    assert InferredOrder(rescore=0.01, per_step=3).propose(now).tolist() == [[0, 4, 7]]
    assert InferredOrder(rescore=0.4, distance=1.0).propose(now).tolist() == [[3, 4, 6]], "0 is far from 5"
    everything = [[0, 1, 2, 3, 4, 6, 7]]
    assert InferredOrder().propose(now).tolist() == everything
    now.step = 0
    assert InferredOrder(rescore=0.5).propose(now).tolist() == everything, "at the first step"


# --- what users write


def test_make_policy():
    streams = Streams(range(3))
    for name in STATIC:
        rule = make_policy(name, GRID, streams)
        assert rule.name == name
        assert torch.equal(inverse(rule.rank), static_order(name, GRID))
    for score in SCORES:
        assert make_policy(PolicyConfig(score, per_step=2), GRID, streams) == InferredOrder(score, per_step=2)
    order = random_orders(3, GRID, seeded(0))
    rule = make_policy(order, GRID, streams)
    assert torch.equal(inverse(rule.rank), order)
    assert (rule.name, rule.per_step) == ("given", 1)
    assert make_policy(rule, GRID, streams) is rule
    random = make_policy("random", GRID, Streams(range(3)))
    assert random.name == "random"
    assert torch.equal(inverse(random.rank), Streams(range(3)).permutation(6))
    with pytest.raises(
        ValueError, match=r"unknown order 'rastre', did you mean 'raster'\?: choose one of random, raster"
    ):
        make_policy("rastre", GRID, streams)


@pytest.mark.parametrize("order", ["random", *STATIC, *SCORES])
def test_policy_config_builds(order):
    config = PolicyConfig(order=order, per_step=2)
    rule = config.build(GRID, Streams(range(2)))
    assert (rule.name, rule.per_step, rule.token_blind) == (order, 2, config.token_blind)
    assert config.label == f"{order}, per_step 2"


def test_policy_config_passes_every_setting_on():
    config = PolicyConfig("margin", -1, 0.5, 0.25, "nearest", per_step=3)
    assert config.build(GRID, Streams([0])) == InferredOrder("margin", -1, 0.5, 0.25, "nearest", per_step=3)
    assert config.label == "margin, sign -1, temperature 0.5, distance 0.25, distance_to nearest, per_step 3"
    assert PolicyConfig().label == "entropy"
    quick = PolicyConfig("entropy", steps=4, schedule="cosine", min_distance=2.0, rescore=0.5)
    built = InferredOrder(steps=4, schedule="cosine", min_distance=2.0, rescore=0.5)
    assert quick.build(GRID, Streams([0])) == built
    assert quick.label == "entropy, rescore 0.5, steps 4, schedule cosine, min_distance 2"
    assert quick.parallel
    assert not PolicyConfig(rescore=0.5).parallel
    assert not PolicyConfig("token_likelihood").token_blind


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"order": "zigzag"}, "unknown order 'zigzag'"),
        ({"order": "raster", "sign": -1}, "belong to inferred orders .* not to 'raster'"),
        ({"order": "random", "temperature": 0.5}, "not to 'random'"),
        ({"order": "hilbert", "distance": 0.5}, "not to 'hilbert'"),
        ({"order": "hilbert", "distance_to": "nearest"}, "not to 'hilbert'"),
        ({"order": "raster", "per_step": 0}, "per_step must be >= 1"),
        ({"order": "raster", "rescore": 0.5}, "not to 'raster': remove rescore"),
        ({"order": "location", "rescore": 0.5}, "not to 'location'"),
        ({"order": "random", "schedule": "cosine"}, "give steps="),
        ({"order": "information", "steps": 4}, "expected information takes"),
        ({"order": "entropy", "per_step": 0}, "per_step must be >= 1"),
        ({"order": "entropy", "temperature": -1}, "temperature must be >= 0"),
    ],
)
def test_policy_config_refuses(settings, message):
    with pytest.raises(ValueError, match=message):
        PolicyConfig(**settings)


# --- settings of earlier versions


def test_saved_policies_are_read_under_earlier_names():
    stored = {"order": "entropy", "steps": 3, "spread": 1.5, "refresh": 1, "full_every": 0}
    assert parse(PolicyConfig, read_stored(PolicyConfig, stored)) == PolicyConfig(steps=3, min_distance=1.5)
    with pytest.raises(ValueError, match="refresh=8 cannot be read"):
        read_stored(PolicyConfig, {"order": "entropy", "refresh": 8})
    with pytest.raises(ValueError, match="min_distance"):
        parse(PolicyConfig, {"spread": 1.5})


# --- ties


@pytest.mark.parametrize("n", [6, 40, 600])
def test_equal_ratings_go_to_the_first_position(n):
    """Whatever their number is, and however many are taken."""
    now = progress(torch.zeros(2, n, dtype=torch.bool), grid=Grid(1, n))
    now.step, now.rated_at = 1, torch.zeros(2, n, dtype=torch.int64)
    equal = torch.zeros(2, n)
    for k in (1, 3, 6):
        first = torch.arange(k).expand(2, -1)
        assert torch.equal(InferredOrder(per_step=k).select(now, torch.arange(n).expand(2, -1), equal), first)
        now.location = equal
        assert torch.equal(LocatedOrder(0.0, per_step=k).propose(now), first)
    assert torch.equal(InferredOrder(rescore=4 / n).propose(now), torch.arange(4).expand(2, -1))
    far = InferredOrder(per_step=3, min_distance=2.0).select(now, torch.arange(n).expand(2, -1), equal)
    assert far.tolist() == [[0, 2, 4]] * 2


# --- what users hand over


@pytest.mark.parametrize("kind", [list, torch.Tensor.numpy, lambda x: x.int(), lambda x: x.to(torch.uint8)])
def test_orders_of_any_integer_type_are_taken(kind):
    order = torch.tensor([5, 0, 3, 1, 4, 2])
    given = order.tolist() if kind is list else kind(order)
    assert torch.equal(sample(MODEL, given, Streams(range(2))).order, order.expand(2, -1))


def test_orders_that_do_not_fit_the_images_are_refused():
    with pytest.raises(ValueError, match="got 3 orders for 2 images"):
        make_policy(random_orders(3, GRID, seeded(0)), GRID, Streams(range(2)))
    with pytest.raises(ValueError, match="an order holds whole numbers"):
        make_policy([0.0, 1.0, 2.0, 3.0, 4.0, 5.0], GRID, Streams(range(2)))


@pytest.mark.parametrize("name", ["temperature", "distance", "location", "min_distance"])
def test_numbers_that_are_none_are_refused(name):
    with pytest.raises(ValueError, match=name):
        PolicyConfig("entropy", **{name: math.nan})
