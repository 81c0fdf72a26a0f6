import math
from itertools import pairwise

import pytest
import torch
from conftest import seeded
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.testing import assert_close

from anyorder import orders
from anyorder.contracts import Grid
from anyorder.orders import STATIC, inverse, permute, random_orders, static_order, validate

GRIDS = [Grid(h, w) for h in range(1, 13) for w in range(1, 13)]
LINE = torch.arange(8)


def jumps(walk: list[int], grid: Grid) -> list[tuple[int, int]]:
    """Rows and columns crossed by each step."""
    return [(abs(a // grid.w - b // grid.w), abs(a % grid.w - b % grid.w)) for a, b in pairwise(walk)]


@pytest.mark.parametrize("name", STATIC)
def test_static_orders_are_permutations(name):
    for grid in GRIDS:
        order = static_order(name, grid)
        assert order.dtype == torch.int64
        assert validate(order, grid) is order


@pytest.mark.parametrize("name", ["snake", "spiral_in", "spiral_out"])
def test_steps_go_to_neighbours(name):
    for grid in GRIDS:
        assert all(sum(jump) == 1 for jump in jumps(STATIC[name](grid), grid))


def test_hilbert_steps_go_to_neighbours():
    for grid in GRIDS:
        assert all(max(jump) == 1 for jump in jumps(orders.hilbert(grid), grid)), grid
    for side in (2, 4, 8, 16, 32):
        grid = Grid(side, side)
        assert all(sum(jump) == 1 for jump in jumps(orders.hilbert(grid), grid)), grid


def test_hilbert_keeps_quadrants_together():
    grid = Grid(8, 8)
    walk = orders.hilbert(grid)
    quarters = [{(p // 8 // 4, p % 8 // 4) for p in walk[i : i + 16]} for i in range(0, 64, 16)]
    assert [len(quarter) for quarter in quarters] == [1, 1, 1, 1]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("raster", [0, 1, 2, 3, 4, 5]),
        ("column", [0, 3, 1, 4, 2, 5]),
        ("snake", [0, 1, 2, 5, 4, 3]),
        ("spiral_in", [0, 1, 2, 5, 4, 3]),
        ("spiral_out", [3, 4, 5, 2, 1, 0]),
        ("diagonal", [0, 1, 3, 2, 4, 5]),
    ],
)
def test_static_orders_of_a_small_grid(name, expected):
    assert static_order(name, Grid(2, 3)).tolist() == expected


def test_spiral_ends_in_the_middle():
    assert orders.spiral_in(Grid(3, 3)) == [0, 1, 2, 5, 8, 7, 6, 3, 4]


def test_subsample_reveals_dyadic_lattices():
    walk = orders.subsample(Grid(8, 8))
    for side in (1, 2, 4, 8):
        step = 8 // side
        assert sorted(walk[: side * side]) == [
            r * 8 + c for r in range(0, 8, step) for c in range(0, 8, step)
        ]


def test_halton_prefixes_cover_the_picture():
    walk = orders.halton(Grid(8, 8))
    for length in (8, 16, 32):
        quadrants = torch.tensor([p // 8 // 4 * 2 + p % 8 // 4 for p in walk[:length]]).bincount(minlength=4)
        assert (quadrants - length / 4).abs().max() <= 2, (length, quadrants)


def test_unknown_names_are_refused():
    with pytest.raises(ValueError, match="choose one of raster, column"):
        static_order("zigzag", Grid(2, 2))


@pytest.mark.parametrize(
    ("order", "message"),
    [
        (torch.arange(5), "needs 6 positions"),
        (torch.arange(6.0), "integers"),
        (torch.tensor([0, 1, 2, 3, 4, 4]), "exactly once"),
        (torch.tensor([0, 1, 2, 3, 4, 6]), "exactly once"),
        (torch.tensor([[0, 1, 2, 3, 4, 5], [-1, 1, 2, 3, 4, 5]]), "exactly once"),
    ],
)
def test_validate_refuses(order, message):
    with pytest.raises(ValueError, match=message):
        validate(order, Grid(2, 3))


@given(rows=st.integers(1, 4), h=st.integers(1, 5), w=st.integers(1, 5), seed=st.integers(0, 2**31))
def test_round_trips(rows, h, w, seed):
    grid = Grid(h, w)
    order = validate(random_orders(rows, grid, seeded(seed)), grid)
    rank = inverse(order)
    assert torch.equal(inverse(rank), order)
    assert torch.equal(order.gather(1, rank), torch.arange(grid.n).expand_as(order))
    for values in (torch.rand(rows, grid.n), torch.rand(rows, grid.n, 2), torch.rand(rows, grid.n, 2, 3)):
        steps = permute(values, order)
        assert torch.equal(steps[0, 0], values[0, order[0, 0]])
        assert torch.equal(permute(steps, rank), values)


def test_random_orders_are_uniform_and_seeded():
    grid = Grid(1, 3)
    found = random_orders(6000, grid, seeded(0))
    assert torch.equal(found, random_orders(6000, grid, seeded(0)))
    _, counts = found.unique(dim=0, return_counts=True)
    assert len(counts) == 6
    assert ((counts - 1000) ** 2 / 1000).sum() < 20  # chi-square, 5 degrees of freedom: p < 0.002


# --- statistics


def test_rank_correlations_of_equal_and_opposite_orders():
    some = random_orders(5, Grid(2, 4), seeded(0))
    assert_close(orders.kendall(some, some), torch.ones(5, dtype=torch.float64))
    assert_close(orders.kendall(some, some.flip(1)), -torch.ones(5, dtype=torch.float64))
    assert orders.kendall(torch.zeros(2, 1), torch.zeros(2, 1)).isnan().all()


def test_rank_correlations_count_swaps():
    """One swap of neighbours: tau loses 2 of N(N-1)/2 pairs' worth."""
    swapped = LINE.clone()
    swapped[[2, 3]] = swapped[[3, 2]]
    assert orders.kendall(LINE, swapped) == pytest.approx(1 - 2 / 28)


def test_rank_correlations_equal_their_definitions():
    a, b = (random_orders(4, Grid(2, 3), seeded(seed)) for seed in (1, 2))
    ra, rb = inverse(a).double(), inverse(b).double()
    pairs = [(i, j) for i in range(6) for j in range(i)]
    tau = sum(((ra[:, i] - ra[:, j]) * (rb[:, i] - rb[:, j])).sign() for i, j in pairs) / len(pairs)
    assert_close(orders.kendall(a, b), tau)
    assert_close(orders.kendall(a[0], b), orders.kendall(a[:1].expand(4, -1), b))


def test_position_entropy():
    constant = LINE.expand(10, -1)
    assert orders.position_entropy(constant).tolist() == [0.0] * 8
    random: Tensor = orders.position_entropy(random_orders(4000, Grid(2, 4), seeded(0)))
    assert_close(random, torch.full((8,), math.log(8), dtype=torch.float64), rtol=0, atol=5e-3)
    halves = torch.tensor([[0, 1, 2], [1, 0, 2]])
    assert_close(orders.position_entropy(halves), torch.tensor([1.0, 1.0, 0.0]).double() * math.log(2))


def test_mean_jump():
    grid = Grid(3, 4)
    assert orders.mean_jump(static_order("snake", grid), grid) == 1
    assert orders.mean_jump(static_order("raster", grid), grid) == pytest.approx(
        (9 + 2 * math.hypot(1, 3)) / 11
    )
    both = torch.stack((static_order("snake", grid), static_order("raster", grid)))
    assert orders.mean_jump(both, grid) == pytest.approx((11 + 9 + 2 * math.hypot(1, 3)) / 22)
    assert math.isnan(orders.mean_jump(torch.zeros(1, dtype=torch.int64), Grid(1, 1)))
