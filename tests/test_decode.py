import math
from typing import Any

import pytest
import torch
from conftest import GRID, POLICIES, TabularModel, Watched, seeded, tabular, transformer
from torch import Tensor
from torch.testing import assert_close

from anyorder.contracts import Grid, OrderPolicy, Progress
from anyorder.method.decoding import (
    complete,
    extract_orders,
    generate,
    sample,
    sample_coarse_to_fine,
    trace,
)
from anyorder.method.guidance import GuidanceConfig, Guided
from anyorder.method.loss import token_nll
from anyorder.method.policies import FixedOrder, InferredOrder
from anyorder.method.policy_config import PolicyConfig
from anyorder.method.sampling import SCORES, TOKEN_BLIND, Sampling, Streams
from anyorder.orders import STATIC, kendall, permute, random_orders, static_order

MODEL = transformer(depth=1, num_classes=3)
SMALL = transformer(vocab_size=3, grid=(2, 2))
INFORMATION = InferredOrder(sign=-1, look_ahead=4)
LABELS = torch.tensor([0, 1, 2, -1])
STRICT = {"rtol": 1e-4, "atol": 2e-5}


def chi_square(images: Tensor, p: Tensor) -> float:
    """Sampled images (S, N) against a joint distribution p, (V,) * N."""
    powers = len(p) ** torch.arange(p.ndim - 1, -1, -1)
    counts = (images * powers).sum(1).bincount(minlength=p.numel())
    expected = len(images) * p.flatten()
    return float(((counts - expected) ** 2 / expected).sum())


def limit(cells: int) -> float:
    """Five standard deviations above the mean of chi-square with `cells` - 1 degrees of freedom."""
    return cells - 1 + 5 * math.sqrt(2 * (cells - 1))


# --- the loop


def test_sampling_does_not_depend_on_the_batch(policy):
    """The same seeds in batches of 5, 3 and 1, in any sequence, for every policy."""

    def run(seeds: list[int]) -> tuple[Tensor, Tensor]:
        streams = Streams(seeds)
        result = sample(MODEL, policy(GRID, streams), streams, condition=LABELS[torch.tensor(seeds) % 4])
        return result.tokens, result.order

    tokens, order = run([0, 1, 2, 3, 4])
    for seeds in ([4, 0, 2], [3]):
        some_tokens, some_order = run(seeds)
        assert torch.equal(some_tokens, tokens[seeds])
        assert torch.equal(some_order, order[seeds])


def test_sampling_does_not_depend_on_the_number_of_threads(policy):
    found, threads = [], torch.get_num_threads()
    try:
        for n in (1, 2):
            torch.set_num_threads(n)
            streams = Streams(range(4))
            found.append(sample(MODEL, policy(GRID, streams), streams, condition=LABELS))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(found[0].tokens, found[1].tokens)
    assert torch.equal(found[0].order, found[1].order)


@pytest.mark.parametrize("chunk", [1, 2, 6])
@pytest.mark.parametrize("order", ["entropy", "token_likelihood", "random"])
def test_chunks_change_nothing(order, chunk):
    whole, chunked = (
        sample(MODEL, order, Streams(range(4)), condition=LABELS, chunk=size) for size in (64, chunk)
    )
    assert torch.equal(chunked.tokens, whole.tokens)
    assert torch.equal(chunked.order, whole.order)
    assert_close(chunked.log_prob, whole.log_prob, **STRICT)


@pytest.mark.parametrize("order", [*STATIC, "random", *SCORES])
def test_log_prob_of_a_sample_is_teacher_forced(order):
    result = sample(MODEL, order, Streams(range(4)), condition=LABELS)
    nll = token_nll(MODEL, result.tokens, LABELS, result.order)
    assert_close(-result.log_prob, nll, **STRICT)


def test_steps_describe_what_happened():
    streams = Streams(range(2))
    rule = InferredOrder("margin", per_step=4)
    steps = list(generate(MODEL, rule, streams, condition=LABELS[:2]))
    assert [(s.index, s.total, tuple(s.positions.shape)) for s in steps] == [(0, 6, (2, 4)), (1, 6, (2, 2))]
    result = trace(iter(steps))
    assert torch.equal(result.order, torch.cat([s.positions for s in steps], dim=1))
    assert torch.equal(permute(result.tokens, result.order), torch.cat([s.tokens for s in steps], dim=1))
    assert torch.equal(result.log_prob, torch.cat([s.log_prob for s in steps], dim=1))


def test_policies_are_told_where_the_loop_is():
    seen = []

    class Spy(FixedOrder):
        def propose(self, progress: Progress) -> Tensor:
            seen.append((progress.step, progress.last.tolist(), progress.revealed.sum(1).tolist()))
            return super().propose(progress)

    rule, streams = Spy(torch.arange(6), GRID, per_step=2), Streams(range(2))
    list(generate(MODEL, rule, streams, condition=LABELS[:2]))
    assert seen == [(0, [-1, -1], [0, 0]), (1, [1, 1], [2, 2]), (2, [3, 3], [4, 4])]
    seen.clear()
    known = (torch.tensor([[5, 2], [0, 1]]), torch.zeros(2, 2, dtype=torch.int64))
    list(generate(MODEL, rule, streams, condition=LABELS[:2], known=known))
    assert seen == [(0, [2, 1], [2, 2]), (1, [1, 3], [4, 4])]


def test_the_best_token_at_temperature_zero():
    result = sample(MODEL, "raster", Streams(range(4)), condition=LABELS, sampling=Sampling(temperature=0))
    best = MODEL.forward(result.tokens, LABELS, result.order).argmax(-1)
    assert torch.equal(permute(result.tokens, result.order), best)


@pytest.mark.parametrize("grid", [Grid(1, 1), Grid(4, 3)])
def test_other_grids(grid):
    streams = Streams(range(2))
    result = sample(MODEL, "entropy", streams, condition=LABELS[:2], grid=grid)
    assert result.tokens.shape == (2, grid.n)
    extracted = extract_orders(MODEL, result.tokens, condition=LABELS[:2], grid=grid)
    assert torch.equal(extracted.order, result.order)
    again = complete(
        MODEL,
        result.tokens,
        result.tokens < 2,
        "snake",
        streams,
        condition=LABELS[:2],
        grid=grid,
    )
    assert again.order.shape == (2, grid.n)


def test_integers_of_any_type_are_taken():
    """int32 tokens and labels, as caches hold them."""
    tokens, known = cases()
    for convert in (torch.Tensor.int, torch.Tensor.long):
        found = extract_orders(MODEL, convert(tokens), condition=convert(LABELS))
        streams, condition = Streams(range(4)), convert(LABELS)
        made = complete(MODEL, convert(tokens), known, "entropy", streams, condition=condition)
        assert found.tokens.dtype == made.tokens.dtype == torch.int64
        assert torch.equal(found.order, extract_orders(MODEL, tokens, condition=LABELS).order)


def test_no_images_are_refused():
    with pytest.raises(ValueError, match="no images to generate"):
        sample(MODEL, "raster", Streams([]))


@pytest.mark.parametrize("order", ["raster", "entropy", "token_likelihood", "margin"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_logits_that_are_not_finite_are_refused(order, value):
    class Broken(Watched):
        """From the third reveal on its first logit is broken."""

        def score(self, state: Any, positions: Tensor) -> Tensor:
            logits = super().score(state, positions).clone()
            logits[..., 0] = value if self.appends > 1 else logits[..., 0]
            return logits

    with pytest.raises(ValueError, match="logits are not finite, seen at step 2"):
        sample(Broken(MODEL), order, Streams(range(2)), condition=LABELS[:2])


# --- what it costs


def evaluations(order: str | OrderPolicy, chunk: int = 64) -> tuple[int, int, int, int]:
    """Calls of score, of append, candidates per image, inputs per image that run through the network."""
    model, through = transformer(depth=1), []
    model.blocks[0].register_forward_hook(lambda block, args, out: through.append(out.shape[1]))
    watched = Watched(model)
    sample(watched, order, Streams(range(2)), chunk=chunk)
    return watched.calls, watched.appends, watched.candidates, sum(through)


def test_cost_of_a_fixed_order():
    n = GRID.n
    for order in ("raster", "random"):
        assert evaluations(order) == (n, n - 1, n, n)


@pytest.mark.parametrize("score", SCORES)
def test_cost_of_an_inferred_order(score):
    """Token-blind orders ask for the chosen position a second time rather than draw for every candidate.

    Nothing runs through the network again for it.
    """
    n = GRID.n
    pairs = n * (n + 1) // 2
    again = n if score in TOKEN_BLIND else 0
    last = int(score in TOKEN_BLIND)  # nothing to choose: not rated
    assert evaluations(score) == (n + again - last, n - 1, pairs + again - last, pairs)
    calls, appends, candidates, through = evaluations(score, chunk=2)
    assert (calls, appends) == (3 + 3 + 2 + 2 + 1 + 1 + again - last, n - 1)
    assert (candidates, through) == (pairs + again - last, pairs)


def test_cost_of_parallel_decoding():
    """Of each 3 revealed together 2 are run again, behind the first; after the last reveal nothing is run."""
    assert evaluations(InferredOrder(per_step=3)) == (2 + 2, 1, 6 + 3 + 6, 6 + 3 + 2)


@pytest.mark.parametrize(
    "config",
    [
        PolicyConfig("entropy"),
        PolicyConfig("entropy", per_step=4),
        PolicyConfig("entropy", rescore=0.3),
        PolicyConfig("max_prob", sign=-1, rescore=0.6),
        PolicyConfig("entropy", steps=3, schedule="cosine", min_distance=1.5),
        PolicyConfig("entropy", steps=3, schedule="cosine", rescore=0.5),
        PolicyConfig("raster", steps=2),
    ],
)
def test_the_stated_evaluations_are_those_that_are_made(config):
    """Where: as stated, all by the scorer; what: each position once, by the drawer."""
    scorer, drawer = Watched(transformer(depth=1)), Watched(transformer(depth=1))
    rule = config.build(GRID, Streams(range(2)))
    sample(drawer, rule, Streams(range(2)), scorer=scorer)
    assert (scorer.candidates, drawer.candidates) == (config.evaluations(GRID.n), GRID.n)
    assert config.evaluations(64) <= 64 * 65 // 2


# --- order extraction


@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize("per_step", [1, 4])
def test_extracted_orders_are_permutations_of_the_given_image(score, per_step):
    tokens = torch.randint(5, (4, 6), generator=seeded(0))
    found = extract_orders(MODEL, tokens, InferredOrder(score, per_step=per_step), condition=LABELS)
    assert torch.equal(found.tokens, tokens)
    assert torch.equal(found.order.sort(1).values, torch.arange(6).expand(4, -1))
    if per_step == 1:
        assert_close(-found.log_prob, token_nll(MODEL, tokens, LABELS, found.order), **STRICT)


@pytest.mark.parametrize("score", sorted(TOKEN_BLIND))
def test_extraction_recovers_the_order_of_sampling(score):
    """A token-blind rule goes the same way whether the tokens are drawn or given."""
    drawn_ones = sample(MODEL, score, Streams(range(4)), condition=LABELS)
    found = extract_orders(MODEL, drawn_ones.tokens, score, condition=LABELS)
    assert torch.equal(found.order, drawn_ones.order)
    assert_close(found.log_prob, drawn_ones.log_prob, **STRICT)


def joint(model: TabularModel) -> Tensor:
    return model.joint.reshape([model.vocab_size] * model.grid.n)


def marginals(model: TabularModel) -> Tensor:
    """p(x[n] = v), (N, V)."""
    axes = range(model.grid.n)
    return torch.stack([joint(model).sum([other for other in axes if other != axis]) for axis in axes])


@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize("sign", [1, -1])
def test_the_first_position_in_closed_form(score, sign):
    model = tabular(3)
    p = marginals(model)
    top = p.sort(1, descending=True).values
    images = model.images
    confidence = {
        "token_likelihood": p.gather(1, images.T).T.log(),
        "max_prob": top[:, 0].log(),
        "entropy": (p * p.log()).sum(1),
        "margin": (top[:, 0] / top[:, 1]).log(),
    }[score].expand(len(images), -1)
    found = extract_orders(model, images, InferredOrder(score, sign))
    assert torch.equal(found.order[:, 0], (sign * confidence).argmax(1))
    assert len(found.order[:, 0].unique()) == (1 if score in TOKEN_BLIND else 4)


def test_extraction_by_likelihood_is_greedy_at_every_step():
    """Each chosen position has the largest conditional likelihood of its true token, by enumeration."""
    model = tabular(3)
    images = model.images[::5]
    found = extract_orders(model, images, "token_likelihood")
    for tokens, order in zip(images, found.order, strict=True):
        agree = torch.ones(len(model.images), dtype=torch.bool)
        for step, chosen in enumerate(order):
            mass = model.joint * agree
            likelihood = torch.stack([mass[model.images[:, p] == tokens[p]].sum() for p in range(4)])
            likelihood[order[:step]] = -1
            assert likelihood.argmax() == chosen
            agree &= model.images[:, chosen] == tokens[chosen]


def test_extraction_refuses_another_length():
    with pytest.raises(ValueError, match="5 tokens per image do not fill a 2 x 3 grid"):
        extract_orders(MODEL, torch.zeros(1, 5, dtype=torch.int64))


# --- lazy orders and expected information


@pytest.mark.parametrize(("score", "sign"), [("entropy", 1), ("margin", -1), ("token_likelihood", 1)])
def test_a_lazy_order_that_scores_everything_is_exact(score, sign):
    exact, all_of_it = (
        sample(MODEL, InferredOrder(score, sign, **settings), Streams(range(4)), condition=LABELS)
        for settings in ({}, {"rescore": 0.999})
    )
    assert torch.equal(all_of_it.order, exact.order)
    assert torch.equal(all_of_it.tokens, exact.tokens)
    assert torch.equal(all_of_it.log_prob, exact.log_prob)


@pytest.mark.parametrize("settings", [{"rescore": 0.3}, {"rescore": 0.5, "sign": -1}])
@pytest.mark.parametrize("chunk", [1, 64])
def test_lazy_orders_draw_from_the_current_prefix(settings, chunk):
    """Log-probabilities are those of teacher forcing, alone, guided, and with a scorer."""
    rule = InferredOrder(**settings)
    for scorer in (None, transformer(seed=2, num_classes=3)):
        made = sample(MODEL, rule, Streams(range(4)), condition=LABELS, scorer=scorer, chunk=chunk)
        assert_close(-made.log_prob, token_nll(MODEL, made.tokens, LABELS, made.order), **STRICT)
        found = extract_orders(MODEL, made.tokens, rule, condition=LABELS, scorer=scorer)
        assert torch.equal(found.order, made.order)
    guided = Guided(MODEL, GuidanceConfig(2.0))
    made = sample(guided, rule, Streams(range(4)), condition=LABELS, chunk=chunk)
    assert_close(-made.log_prob, token_nll(guided, made.tokens, LABELS, made.order), **STRICT)


def test_lazy_is_nearer_to_the_exact_order_the_more_it_scores():
    model = transformer(depth=1, grid=(5, 5))
    tokens = torch.randint(5, (32, 25), generator=seeded(0))
    exact = extract_orders(model, tokens).order
    near = [
        float(kendall(extract_orders(model, tokens, InferredOrder(rescore=share)).order, exact).mean())
        for share in (0.1, 0.5, 0.9)
    ]
    assert near == sorted(near)
    assert near[-1] > 0.6


@pytest.mark.parametrize(("score", "sign"), [("entropy", 1), ("margin", -1)])
def test_one_rating_decides_several_steps(score, sign):
    """Every third step all open positions are scored; the three best follow in raster order."""
    model = transformer(depth=1, grid=(4, 4))
    tokens = torch.randint(5, (3, 16), generator=seeded(0))
    order = extract_orders(model, tokens, InferredOrder(score, sign, rate_every=3)).order
    for begin in range(0, 16, 3):
        state = model.start(3, None, model.grid)
        if begin:
            state = model.append(state, order[:, :begin], tokens.gather(1, order[:, :begin]))
        still_open = order[:, begin:].sort(1).values
        rated = sign * SCORES[score](model.score(state, still_open).log_softmax(-1), tokens[:, :1])
        best = still_open.gather(1, rated.topk(min(3, 16 - begin), 1).indices).sort(1).values
        assert torch.equal(order[:, begin : begin + 3], best)
    exact = InferredOrder(score, sign)
    assert InferredOrder(score, sign, rate_every=3).evaluations(16) == sum(range(16, 1, -3))
    assert torch.equal(
        extract_orders(model, tokens, InferredOrder(score, sign, rate_every=1)).order,
        extract_orders(model, tokens, exact).order,
    )


def test_one_rating_for_several_steps_may_look_at_fewer_positions():
    """What was not rated waits; the last positions follow in raster order without a rating."""
    model, tokens = Watched(transformer(depth=1, grid=(4, 4))), torch.randint(5, (3, 16), generator=seeded(0))
    rule = InferredOrder(rate_every=4, rescore=0.5)
    assert InferredOrder(rate_every=4).evaluations(16) == 16 + 12 + 8
    assert rule.evaluations(16) == 16 + 6 + 4
    order = extract_orders(model, tokens, rule).order
    assert torch.equal(order.unflatten(1, (4, 4)).sort(-1).values.flatten(1), order)
    assert torch.equal(order.sort(1).values, torch.arange(16).expand(3, -1))
    # Each step scores what it reveals, but the first of a rating is among what was rated.
    assert model.candidates == 16 + 6 + 4 + 16
    assert torch.equal(
        order[:, :4], extract_orders(model.model, tokens, InferredOrder(rate_every=4)).order[:, :4]
    )
    # With all shares scored it is the exact rule.
    every = (
        extract_orders(model.model, tokens, InferredOrder(rate_every=4, rescore=r)).order for r in (1, 0.999)
    )
    assert torch.equal(*every)


def test_a_class_weight_moves_the_order_of_an_image_towards_that_of_its_class():
    model = transformer(depth=1, grid=(4, 4))
    tokens = torch.randint(5, (8, 16), generator=seeded(0))
    by_class, streams = random_orders(8, model.grid, seeded(1)), Streams(range(8))
    exact = extract_orders(model, tokens, "margin").order
    found = {
        weight: extract_orders(
            model, tokens, PolicyConfig("margin", class_weight=weight).build(model.grid, streams, by_class)
        ).order
        for weight in (1e-6, 0.1, 1.0, 1e6)
    }
    assert torch.equal(found[1e-6], exact)
    assert torch.equal(found[1e6], by_class)
    near = [float(kendall(order, by_class).mean()) for order in found.values()]
    assert near == sorted(near)
    with pytest.raises(ValueError, match="needs the orders of the classes"):
        PolicyConfig("margin", class_weight=1.0).build(model.grid, streams)
    some = PolicyConfig("margin", class_weight=1e6).build(model.grid, streams, by_class)
    known = torch.zeros(8, 16, dtype=torch.bool).index_fill(0, torch.tensor([2, 5]), True)
    assert torch.equal(complete(model, tokens, known, some, streams).order[0], by_class[0])


def test_completion_with_lazy_orders_and_few_steps():
    tokens, known = cases()
    for config in (
        PolicyConfig("entropy", rescore=0.4),
        PolicyConfig("entropy", steps=2, schedule="cosine", min_distance=1.5, rescore=0.5),
        PolicyConfig("random", steps=2, min_distance=1.5),
    ):
        found = complete(Watched(MODEL), tokens, known, config, Streams(range(4)), condition=LABELS)
        assert torch.equal(found.tokens[known], tokens[known])
        assert torch.equal(found.order.sort(1).values, torch.arange(6).expand(4, -1))


def test_completion_takes_a_policy_with_an_order_for_each_image():
    tokens, known = cases()
    order = random_orders(4, GRID, seeded(1))
    found, expected = (
        complete(MODEL, tokens, known, rule, Streams(range(4)), condition=LABELS)
        for rule in (FixedOrder(order, GRID), order)
    )
    assert torch.equal(found.order, expected.order)
    assert torch.equal(found.tokens, expected.tokens)


def test_expected_information_begins_where_most_is_learned():
    """Three copies of a fair coin and an independent one: a copy says much."""
    coins = torch.zeros(2, 2, 2, 2)
    for side, fourth in ((0, 0), (0, 1), (1, 0), (1, 1)):
        coins[side, fourth, side, side] = 0.25  # the independent coin lies at position 1
    model = TabularModel(coins, Grid(2, 2))
    order = sample(model, INFORMATION, Streams(range(8))).order
    assert (order[:, 0] != 1).all()
    first = sample(model, InferredOrder(sign=-1, look_ahead=1), Streams([0])).order[0, 0]
    assert first == sample(model, InferredOrder(sign=-1), Streams([0])).order[0, 0], "a short list of one"


def test_expected_information_leaves_the_states_as_they_were():
    made = sample(MODEL, INFORMATION, Streams(range(3)), condition=LABELS[:3])
    assert_close(-made.log_prob, token_nll(MODEL, made.tokens, LABELS[:3], made.order), **STRICT)
    scored = sample(MODEL, INFORMATION, Streams(range(3)), condition=LABELS[:3], scorer=MODEL)
    assert torch.equal(scored.order, made.order)


# --- which distribution is sampled

BLIND = ["raster", "random", *sorted(TOKEN_BLIND)]
BLIND_RULES = {
    "noise": InferredOrder("entropy", temperature=0.5),
    "distance": InferredOrder("max_prob", distance=0.3),
    "reversed": InferredOrder("margin", sign=-1, distance=0.3, distance_to="nearest"),
    "information": InferredOrder(sign=-1, look_ahead=2),
    "lazy": InferredOrder("entropy", rescore=0.4),
    "lazy, reversed": InferredOrder("margin", sign=-1, rescore=0.3),
}


@pytest.mark.parametrize("order", [*BLIND, *BLIND_RULES])
def test_token_blind_orders_sample_the_joint_distribution(order):
    model = tabular()
    found = sample(model, BLIND_RULES.get(order, order), Streams(range(4000)))
    assert chi_square(found.tokens, joint(model)) < limit(16)


@pytest.mark.parametrize("order", ["entropy", "margin", "information", "lazy"])
def test_samples_follow_the_density_of_their_own_order(order):
    """Also where the conditionals agree with no joint: p(x) along the order that the image determines."""
    rule = BLIND_RULES.get(order, order)
    found = sample(SMALL, rule, Streams(range(6000)))
    assert chi_square(found.tokens, density(rule).reshape(3, 3, 3, 3)) < limit(81)


def test_the_token_peeking_rule_is_biased():
    """Why token-blind scores are the default: the paper's rule does not sample the model's distribution.

    Each position draws a token and the most likely pair wins, so likely tokens are revealed more often
    than the model says.
    """
    model = tabular()
    found = sample(model, "token_likelihood", Streams(range(4000)))
    assert chi_square(found.tokens, joint(model)) > 10 * limit(16)
    mean_log_p = joint(model)[tuple(found.tokens.T)].log().mean()
    assert mean_log_p > (model.joint * model.joint.log()).sum() + 0.1


def test_revealing_all_at_once_samples_the_product_of_marginals():
    """Parallel decoding ignores what revealed tokens say of one another; in the limit, everything."""
    model = tabular()
    p = marginals(model)
    product = torch.einsum("a,b,c,d->abcd", *p)
    for rule in (InferredOrder(per_step=4), POLICIES["hilbert,per_step=4"](model.grid, Streams([]))):
        found = sample(model, rule, Streams(range(4000)))
        assert chi_square(found.tokens, product) < limit(16)
        assert chi_square(found.tokens, joint(model)) > limit(16)


PARALLEL = [
    InferredOrder("entropy", per_step=2),
    InferredOrder("margin", sign=-1, steps=3, schedule="cosine", min_distance=1.2, rescore=0.5),
    FixedOrder(torch.tensor([3, 0, 1, 2]), SMALL.grid, steps=2, min_distance=1.2),
]


@pytest.mark.parametrize("rule", PARALLEL)
def test_parallel_orders_have_a_density_that_samples_follow(rule):
    """A product of conditionals given the steps before: what likelihoods of parallel decoding measure."""
    images = torch.cartesian_prod(*[torch.arange(3)] * 4)
    p = extract_orders(SMALL, images, rule).log_prob.double().sum(1).exp()
    assert p.sum() == pytest.approx(1, abs=1e-4)
    found = sample(SMALL, rule, Streams(range(6000)))
    assert chi_square(found.tokens, p.reshape([3] * 4)) < limit(81)


def density(order: str | OrderPolicy) -> Tensor:
    """p(x) of all 81 images under `SMALL`, whose conditionals agree with no joint distribution."""
    images = torch.cartesian_prod(*[torch.arange(3)] * 4)
    noise = Streams([7] * len(images))  # the same location noise for every image
    extracted = extract_orders(SMALL, images, order, noise)
    nll = token_nll(SMALL, images, None, extracted.order).sum(1).detach()
    assert_close(-nll, extracted.log_prob.sum(1), **STRICT)
    return (-nll).double().exp()


@pytest.mark.parametrize("order", [*STATIC, "random", *sorted(TOKEN_BLIND), *BLIND_RULES])
def test_token_blind_orders_have_a_normalised_density(order):
    rule = BLIND_RULES.get(order, static_order(order, SMALL.grid) if order in STATIC else order)
    assert density(rule).sum() == pytest.approx(1, abs=1e-4)


def test_the_token_peeking_rule_has_no_normalised_density():
    assert abs(density("token_likelihood").sum() - 1) > 0.05


@pytest.mark.parametrize("order", ["spiral_in", "entropy", "margin"])
def test_samples_follow_the_density(order):
    """Exact likelihood and sampling describe the same distribution, also for an inconsistent model."""
    expected = density(order if order in SCORES else static_order(order, SMALL.grid))
    found = sample(SMALL, order, Streams(range(4000)))
    assert chi_square(found.tokens, expected.reshape([3] * 4)) < limit(81)


def test_a_tabular_model_has_one_density_for_all_orders():
    """The chain rule, for a model that is exact: even for the peeking rule."""
    model = tabular()
    for order in ("raster", "entropy", "token_likelihood"):
        found = extract_orders(model, model.images, order)
        assert_close(found.log_prob.double().sum(1).exp(), model.joint, rtol=1e-4, atol=1e-6)
    everything = random_orders(16, model.grid, seeded(0))
    nll = token_nll(model, model.images, None, everything).sum(1)
    assert_close((-nll).double().exp(), model.joint, rtol=1e-4, atol=1e-6)


# --- completion


def cases() -> tuple[Tensor, Tensor]:
    tokens = torch.randint(5, (4, 6), generator=seeded(0))
    known = torch.tensor(
        [[False] * 6, [True] * 6, [True, False, True, False, False, False], [False] * 5 + [True]]
    )
    return tokens, known


@pytest.mark.parametrize("order", ["raster", "random", "entropy", "token_likelihood", "per row"])
def test_completion(order):
    tokens, known = cases()
    rule = random_orders(4, GRID, seeded(1)) if order == "per row" else order
    found = complete(Watched(MODEL), tokens, known, rule, Streams(range(4)), condition=LABELS)
    assert torch.equal(found.tokens[known], tokens[known])
    assert torch.equal(found.order.sort(1).values, torch.arange(6).expand(4, -1))
    nll = token_nll(MODEL, found.tokens, LABELS, found.order)
    for row, count in enumerate(known.sum(1).tolist()):
        given_ones = known[row].nonzero().flatten()
        assert torch.equal(found.order[row, :count], given_ones)
        assert (found.log_prob[row, :count] == 0).all()
        assert_close(-found.log_prob[row, count:], nll[row, count:].detach(), **STRICT)
        if order == "per row":
            left = [p for p in rule[row].tolist() if not known[row, p]]
            assert found.order[row, count:].tolist() == left


@pytest.mark.parametrize("order", ["raster", "random", "entropy", "token_likelihood"])
def test_completion_does_not_depend_on_the_batch(order):
    tokens, known = cases()
    together = complete(MODEL, tokens, known, order, Streams(range(4)), condition=LABELS)
    for row in range(4):
        one = slice(row, row + 1)
        alone = complete(MODEL, tokens[one], known[one], order, Streams([row]), condition=LABELS[one])
        assert torch.equal(alone.tokens, together.tokens[one])
        assert torch.equal(alone.order, together.order[one])


def test_completion_of_nothing_known_is_sampling():
    tokens = torch.zeros(4, 6, dtype=torch.int64)
    for order in ("hilbert", "random", "entropy"):
        drawn_ones = sample(MODEL, order, Streams(range(4)), condition=LABELS)
        found = complete(MODEL, tokens, tokens > 0, order, Streams(range(4)), condition=LABELS)
        assert torch.equal(found.tokens, drawn_ones.tokens)
        assert torch.equal(found.order, drawn_ones.order)


def test_completion_ignores_what_stands_at_unknown_positions():
    tokens, known = cases()
    runs = [
        complete(MODEL, some, known, "entropy", Streams(range(4)), condition=LABELS)
        for some in (tokens, tokens.where(known, (tokens + 1) % 5))
    ]
    assert torch.equal(runs[0].tokens, runs[1].tokens)


@pytest.mark.parametrize("order", ["raster", "entropy"])
def test_completion_samples_the_conditional_distribution(order):
    model = tabular()
    tokens = torch.tensor([[0, 1, 1, 0]]).expand(4000, -1)
    known = torch.tensor([[False, True, False, False]]).expand(4000, -1)
    found = complete(model, tokens, known, order, Streams(range(4000)))
    assert (found.tokens[:, 1] == 1).all()
    conditional = joint(model)[:, 1] / joint(model)[:, 1].sum()
    assert chi_square(found.tokens[:, [0, 2, 3]], conditional) < limit(8)


def test_completion_refuses():
    tokens, known = cases()
    for wrong in (known[:, :5], known.long()):
        with pytest.raises(ValueError, match=r"known must be bool of shape \(4, 6\)"):
            complete(MODEL, tokens, wrong, "raster", Streams(range(4)), condition=LABELS)
    with pytest.raises(ValueError, match="5 tokens per image do not fill a 2 x 3 grid"):
        complete(MODEL, tokens[:, :5], known[:, :5], "raster", Streams(range(4)), condition=LABELS)


def test_known_tokens_come_first_in_the_loop():
    tokens = torch.randint(5, (2, 6), generator=seeded(0))
    prefix = (torch.tensor([[4, 1], [0, 5]]), torch.tensor([[3, 2], [1, 0]]))
    streams = Streams(range(2))
    rule = POLICIES["raster,per_step=1"](GRID, streams)
    found = trace(
        generate(MODEL, rule, streams, targets=tokens, condition=LABELS[:2], known=prefix),
        prefix,
    )
    assert found.order.tolist() == [[4, 1, 0, 2, 3, 5], [0, 5, 1, 2, 3, 4]]
    assert torch.equal(found.tokens.gather(1, prefix[0]), prefix[1])
    nll = token_nll(MODEL, found.tokens, LABELS[:2], found.order).detach()
    assert_close(-found.log_prob[:, 2:], nll[:, 2:], **STRICT)


@pytest.mark.parametrize("order", ["random", "entropy", PolicyConfig("raster")])
def test_coarse_to_fine_draws_the_small_grid_first(order):
    coarse = sample(MODEL, order, Streams(range(4)), condition=LABELS)
    fine = sample_coarse_to_fine(MODEL, order, Streams(range(4)), 2, condition=LABELS)
    assert fine.tokens.shape == (4, 24)
    assert torch.equal(fine.tokens.view(4, 4, 6)[:, ::2, ::2].flatten(1), coarse.tokens)
    assert fine.order[:, :6].tolist() == [[0, 2, 4, 12, 14, 16]] * 4
    nll = token_nll(MODEL, fine.tokens, LABELS, fine.order, Grid(4, 6)).detach()
    assert_close(-fine.log_prob[:, 6:], nll[:, 6:], **STRICT)
    three = sample_coarse_to_fine(MODEL, order, Streams(range(4)), 3, condition=LABELS)
    assert torch.equal(three.tokens.view(4, 6, 9)[:, ::3, ::3].flatten(1), coarse.tokens)
    with pytest.raises(ValueError, match="factor must be >= 2, got 1"):
        sample_coarse_to_fine(MODEL, order, Streams(range(4)), 1, condition=LABELS)


# --- where and what by different models


def test_a_model_that_scores_for_itself_changes_nothing():
    model = transformer()
    seeds = range(3)
    alone = sample(model, "entropy", Streams(seeds))
    guided = sample(model, "entropy", Streams(seeds), scorer=model)
    assert torch.equal(alone.tokens, guided.tokens)
    assert torch.equal(alone.order, guided.order)
    torch.testing.assert_close(alone.log_prob, guided.log_prob)


def test_the_scorer_decides_where_and_the_drawer_what():
    torch.manual_seed(1)
    scorer, drawer = transformer(), transformer(depth=1)
    made = sample(drawer, "margin", Streams(range(4)), scorer=scorer)
    assert torch.equal(extract_orders(scorer, made.tokens, "margin").order, made.order)
    found = extract_orders(drawer, made.tokens, "margin", scorer=scorer)
    assert torch.equal(found.order, made.order)
    torch.testing.assert_close(-found.log_prob, token_nll(drawer, made.tokens, None, made.order))


def test_a_peeking_rule_cannot_be_scored_by_another_model():
    model = transformer()
    with pytest.raises(ValueError, match="leave scorer out"):
        sample(model, "token_likelihood", Streams([0]), scorer=model)
