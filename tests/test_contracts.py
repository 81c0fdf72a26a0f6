"""The contract of `AnyOrderModel`, for every model (DESIGN: AnyOrderModel in contracts.py)."""

import copy

import pytest
import torch
from conftest import POLICIES, Subject, incremental, seeded
from torch import Tensor
from torch.testing import assert_close

from anyorder.contracts import AnyOrderModel, AnyOrderNetwork, Grid, Tokenizer
from anyorder.method.decoding import generate, sample, trace
from anyorder.method.loss import token_nll
from anyorder.method.sampling import Streams
from anyorder.orders import permute, random_orders

CLOSE = {"rtol": 1e-4, "atol": 2e-5}
ROWS = 3


def inputs(subject: Subject, rows: int = ROWS, seed: int = 0) -> tuple[Tensor, Tensor | None, Tensor]:
    order = random_orders(rows, subject.model.grid, seeded(seed))
    return subject.tokens(rows, seed=seed), subject.condition(rows), order


@pytest.fixture(autouse=True)
def _no_grad():
    with torch.no_grad():
        yield


def test_grid_maps_raster_positions_to_rows_and_columns():
    grid = Grid(2, 3)
    assert grid.n == 6
    assert grid.coordinates().tolist() == [[0, 0], [0, 1], [0, 2], [1, 0], [1, 1], [1, 2]]
    with pytest.raises(ValueError, match="0 x 3"):
        Grid(0, 3)


def test_models_satisfy_the_protocol(subject):
    assert isinstance(subject.model, AnyOrderModel)
    assert not isinstance(subject.model, Tokenizer)


def test_teacher_forced_equals_incremental(subject):
    tokens, condition, order = inputs(subject)
    forward = subject.model.forward(tokens, condition, order)
    assert forward.shape == (ROWS, subject.model.grid.n, subject.model.vocab_size)
    assert_close(incremental(subject.model, tokens, condition, order), forward, **CLOSE)


BLOCKS = ([1], [5], [1, 1, 1, 1, 1], [2, 1, 2], [1, 4], [3, 2])


def test_prefill_equals_single_appends(subject):
    """However the known positions are cut into blocks, and none of them scored: what follows is the same."""
    tokens, condition, order = inputs(subject)
    forward = subject.model.forward(tokens, condition, order)
    for sizes in BLOCKS:
        state, known = subject.model.start(ROWS, condition), sum(sizes)
        for positions in order[:, :known].split(sizes, dim=1):
            state = subject.model.append(state, positions, tokens.gather(1, positions))
        logits = subject.model.score(state, order[:, known:])
        assert_close(logits[:, :1], forward[:, known : known + 1], **CLOSE)


def test_blocks_whose_first_position_was_scored(subject):
    tokens, condition, order = inputs(subject)
    forward = subject.model.forward(tokens, condition, order)
    for sizes in BLOCKS:
        state, done = subject.model.start(ROWS, condition), 0
        for positions in order[:, : sum(sizes)].split(sizes, dim=1):
            logits = subject.model.score(state, order[:, done:])
            assert_close(logits[:, :1], forward[:, done : done + 1], **CLOSE)
            state = subject.model.append(state, positions, tokens.gather(1, positions))
            done += positions.shape[1]
        logits = subject.model.score(state, order[:, done : done + 1])
        assert_close(logits, forward[:, done : done + 1], **CLOSE)


def test_the_tensor_of_scored_positions_may_be_written_again(subject):
    """Whether positions were scored is a matter of their values, not of the tensor that holds them."""
    tokens, condition, order = inputs(subject)
    forward = subject.model.forward(tokens, condition, order)
    state, positions = subject.model.start(ROWS, condition), order[:, 1:3].clone()
    subject.model.score(state, positions)
    positions.copy_(order[:, :2])
    state = subject.model.append(state, positions, tokens.gather(1, positions))
    assert_close(subject.model.score(state, order[:, 2:3]), forward[:, 2:3], **CLOSE)


@pytest.mark.parametrize("revealed", [0, 2])
def test_first_position_scored_in_some_rows_only(subject, revealed):
    tokens, condition, order = inputs(subject)
    forward = subject.model.forward(tokens, condition, order)
    state = subject.model.start(ROWS, condition)
    if revealed:
        state = subject.model.append(state, order[:, :revealed], tokens.gather(1, order[:, :revealed]))
    candidates = order[:, revealed : revealed + 2].clone()
    candidates[1] = order[1, revealed + 2 : revealed + 4]  # row 1 never scores what comes next
    subject.model.score(state, candidates)
    positions = order[:, revealed : revealed + 2]
    state = subject.model.append(state, positions, tokens.gather(1, positions))
    logits = subject.model.score(state, order[:, revealed + 2 : revealed + 3])
    assert_close(logits, forward[:, revealed + 2 : revealed + 3], **CLOSE)


@pytest.mark.parametrize("training", [False, True])
def test_later_tokens_change_no_earlier_logit(subject, training):
    tokens, condition, order = inputs(subject)
    subject.train(training)

    def logits(tokens: Tensor) -> Tensor:
        torch.manual_seed(1)  # the same dropout
        return subject.model.forward(tokens, condition, order)

    before = logits(tokens)
    for step in range(tokens.shape[1]):
        later = order[:, step:]
        other = tokens.scatter(1, later, (tokens.gather(1, later) + 1) % subject.model.vocab_size)
        after = logits(other)
        assert_close(after[:, : step + 1], before[:, : step + 1], rtol=0, atol=1e-6)
        assert step == tokens.shape[1] - 1 or not torch.allclose(after[:, step + 1 :], before[:, step + 1 :])


def test_candidates_are_blind_to_one_another(subject):
    tokens, condition, order = inputs(subject)
    state = subject.model.start(ROWS, condition)
    for known in range(4):
        open_positions = order[:, known:]

        def score(size: int, positions: Tensor, state: object = state) -> Tensor:
            fork = copy.deepcopy(state)  # a model may remember what it has scored
            return torch.cat([subject.model.score(fork, p) for p in positions.split(size, dim=1)], dim=1)

        together, alone, in_twos = (score(size, open_positions) for size in (subject.model.grid.n, 1, 2))
        backwards = score(subject.model.grid.n, open_positions.flip(1)).flip(1)
        for other in (backwards, alone, in_twos):
            assert_close(other, together, **CLOSE)
        here = order[:, known : known + 1]
        state = subject.model.append(state, here, tokens.gather(1, here))


def test_score_leaves_the_state_unchanged(subject):
    """Candidates scored twice, in different chunks, or never: what follows is the same."""
    tokens, condition, order = inputs(subject)
    forward = subject.model.forward(tokens, condition, order)
    state = subject.model.start(ROWS, condition)
    for step in range(order.shape[1]):
        here = order[:, step : step + 1]
        some = subject.model.score(state, order[:, step : step + 3])
        first = subject.model.score(state, order[:, step:])
        assert_close(some, first[:, :3], **CLOSE)
        subject.model.score(state, order[:, step:].flip(1))
        assert_close(subject.model.score(state, order[:, step:]), first, **CLOSE)
        assert_close(first[:, :1], forward[:, step : step + 1], **CLOSE)
        state = subject.model.append(state, here, tokens.gather(1, here))


def test_rows_do_not_influence_one_another(subject):
    tokens, condition, order = inputs(subject)
    together = subject.model.forward(tokens, condition, order)
    for row in range(ROWS):
        one = slice(row, row + 1)
        own = None if condition is None else condition[one]
        assert_close(subject.model.forward(tokens[one], own, order[one]), together[one], **CLOSE)


def test_start_leaves_the_model_ready_for_another_run(subject):
    """Two runs that are interleaved do not share a state."""
    tokens, condition, order = inputs(subject)
    forward = subject.model.forward(tokens, condition, order)
    states = [subject.model.start(ROWS, condition) for _ in range(2)]
    for step in range(3):
        for run, sequence in enumerate((order, order.flip(1))):
            here = sequence[:, step : step + 1]
            states[run] = subject.model.append(states[run], here, tokens.gather(1, here))
    assert_close(subject.model.score(states[0], order[:, 3:4]), forward[:, 3:4], **CLOSE)


SAMPLED = (
    "snake,per_step=1",
    "random,per_step=4",
    "entropy,sign=-1,temperature=0.7,distance=0.0-last,per_step=1",
    "token_likelihood,sign=1,temperature=0.0,distance=0.5-nearest,per_step=1",
    "order=random,steps=3,schedule=cosine,min_distance=1.5",
    "order=entropy,sign=-1,rescore=0.5",
)


@pytest.mark.parametrize("name", SAMPLED)
def test_sampling_does_not_depend_on_the_batch(subject, name):
    def run(rows: list[int]) -> tuple[Tensor, Tensor]:
        streams, condition = Streams(rows), subject.condition(4)
        result = sample(
            subject.model,
            POLICIES[name](subject.model.grid, streams),
            streams,
            condition=None if condition is None else condition[rows],
        )
        return result.tokens, result.order

    tokens, order = run([0, 1, 2, 3])
    for rows in ([2], [3, 0, 1]):
        some_tokens, some_order = run(rows)
        assert torch.equal(some_tokens, tokens[rows])
        assert torch.equal(some_order, order[rows])


def test_log_prob_of_the_loop_is_the_one_of_training(subject):
    tokens, condition, _ = inputs(subject)
    streams = Streams(range(ROWS))
    steps = generate(
        subject.model,
        POLICIES["entropy,sign=1,temperature=0.0,distance=0.0-last,per_step=1"](subject.model.grid, streams),
        streams,
        targets=tokens,
        condition=condition,
    )
    found = trace(steps)
    assert torch.equal(found.tokens, tokens)
    nll = token_nll(subject.model, tokens, condition, found.order)
    assert_close(-found.log_prob, nll, **CLOSE)
    logits = subject.model.forward(tokens, condition, found.order).float()
    target = permute(tokens, found.order)
    assert_close(
        nll,
        -logits.log_softmax(-1).gather(-1, target[..., None])[..., 0],
        check_dtype=False,
        **CLOSE,
    )


@pytest.mark.parametrize("grid", [Grid(4, 2), Grid(1, 5), Grid(3, 3), Grid(1, 1)])
def test_other_grids_than_the_one_of_training(subject, grid):
    if not isinstance(getattr(subject.model, "model", subject.model), AnyOrderNetwork):
        pytest.skip("a model of one grid")
    tokens, condition = subject.tokens(ROWS, grid), subject.condition(ROWS)
    order = random_orders(ROWS, grid, seeded(3))
    forward = subject.model.forward(tokens, condition, order, grid)
    assert_close(incremental(subject.model, tokens, condition, order, grid), forward, **CLOSE)
