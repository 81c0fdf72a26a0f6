import math

import pytest
import torch
import torch.nn.functional as F
from conftest import seeded
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.testing import assert_close

from anyorder.method.sampling import (
    SCORES,
    TOKEN_BLIND,
    Sampling,
    Streams,
    entropy,
    margin,
    max_prob,
    sample_tokens,
    token_likelihood,
    truncate,
)

P = torch.tensor([0.1, 0.4, 0.2, 0.3])
LARGEST_UNIFORM = 1 - 2**-24


def kept(logits: Tensor, **settings: float) -> list[list[int]]:
    """The tokens that can still be drawn."""
    return [row.isfinite().nonzero().flatten().tolist() for row in truncate(logits, Sampling(**settings))]


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, [0, 1, 2, 3]),
        ({"top_k": 2}, [1, 3]),
        ({"top_k": 9}, [0, 1, 2, 3]),
        ({"top_p": 0.4 - 1e-4}, [1]),
        ({"top_p": 0.4 + 1e-4}, [1, 3]),
        ({"top_p": 0.7 + 1e-4}, [1, 2, 3]),
        ({"top_p": 1e-6}, [1]),
        ({"min_p": 0.5 + 1e-4}, [1, 3]),
        ({"min_p": 0.5 - 1e-4}, [1, 2, 3]),
        ({"temperature": 0}, [1]),
        ({"top_k": 3, "top_p": 4 / 9 + 1e-4}, [1, 3]),  # after top_k, 0.4 of 0.9 is left to the best token
        ({"temperature": 0.5, "top_p": 0.5}, [1]),  # 0.16 of 0.30: the temperature comes first
    ],
)
def test_truncation_keeps(settings, expected):
    assert kept(P.log()[None], **settings) == [expected]


def test_truncation_leaves_ratios_alone():
    logits = P.log()
    assert_close(truncate(logits, Sampling()), logits)
    assert_close(truncate(logits, Sampling(temperature=2.0)), logits / 2)
    assert_close(truncate(logits, Sampling(top_k=2)).softmax(-1), torch.tensor([0, 4 / 7, 0, 3 / 7]))
    assert_close(truncate(logits, Sampling(top_p=0.8)).softmax(-1), torch.tensor([0, 4 / 9, 2 / 9, 3 / 9]))
    assert truncate(logits.bfloat16(), Sampling()).dtype == torch.float32


def test_ties():
    flat = torch.zeros(3, 6)
    assert [len(row) for row in kept(flat, top_k=2)] == [2, 2, 2]
    assert [len(row) for row in kept(flat, top_p=0.4)] == [3, 3, 3]
    assert kept(flat, min_p=0.99) == [list(range(6))] * 3
    assert kept(flat, temperature=0) == [list(range(6))] * 3


def test_truncation_is_row_by_row():
    logits = torch.randn(2, 3, 7, generator=seeded(0))
    sampling = Sampling(temperature=0.8, top_k=5, top_p=0.9, min_p=0.05)
    rows = torch.stack([truncate(row, sampling) for row in logits.flatten(0, 1)]).view_as(logits)
    assert_close(truncate(logits, sampling), rows)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"temperature": math.nan}, "temperature must be >= 0"),
        ({"temperature": -1}, "temperature"),
        ({"top_k": -1}, "top_k"),
        ({"top_p": 0}, "top_p"),
        ({"top_p": 1.1}, "top_p"),
        ({"min_p": 1}, "min_p"),
        ({"min_p": -0.1}, "min_p"),
    ],
)
def test_sampling_refuses(settings, message):
    with pytest.raises(ValueError, match=message):
        Sampling(**settings)


def test_draw_frequencies():
    n = 20_000
    tokens = sample_tokens(P.log().expand(n, -1), torch.rand(n, generator=seeded(0)))
    counts = tokens.bincount(minlength=4)
    assert ((counts - n * P) ** 2 / (n * P)).sum() < 16.3  # chi-square, 3 degrees of freedom: p < 0.001


def test_draw_inverts_the_distribution_function():
    uniform = torch.tensor([0.0, 0.09, 0.11, 0.49, 0.51, 0.69, 0.71, 0.99])
    assert sample_tokens(P.log().expand(8, -1), uniform).tolist() == [0, 0, 1, 1, 2, 2, 3, 3]


@pytest.mark.parametrize("uniform", [0.0, 0.5, LARGEST_UNIFORM])
@given(data=st.data())
def test_impossible_tokens_are_never_drawn(uniform, data):
    possible = data.draw(st.lists(st.booleans(), min_size=1, max_size=40).filter(any))
    scale = data.draw(st.sampled_from([0.1, 3.0, 30.0]))
    logits = scale * torch.randn(len(possible), generator=seeded(data.draw(st.integers(0, 99))))
    logits = logits.masked_fill(~torch.tensor(possible), -torch.inf)
    token = sample_tokens(logits[None], torch.tensor([uniform]))
    assert logits.softmax(-1)[token] > 0


def test_largest_uniform_is_safe_in_a_large_vocabulary():
    logits = torch.full((50, 16_384), -torch.inf)
    logits[:, 100:600] = torch.randn(50, 500, generator=seeded(0))
    for uniform in (0.0, LARGEST_UNIFORM):
        tokens = sample_tokens(logits, torch.full((50,), uniform))
        assert ((tokens >= 100) & (tokens < 600)).all()


def test_impossible_tokens_stay_impossible_when_sums_run_in_parallel(monkeypatch):
    """On a GPU, neighbouring prefix sums come from different trees of additions: in floats they waver."""

    def scan(x: Tensor, dim: int, dtype: torch.dtype | None = None) -> Tensor:
        shift = 1
        while shift < x.shape[-1]:
            x = x + F.pad(x, (shift, 0))[..., : x.shape[-1]]
            shift *= 2
        return x

    p = torch.rand(4096, generator=seeded(0)).masked_fill(torch.rand(4096, generator=seeded(1)) < 0.8, 0)
    p = p.log().softmax(-1)
    sums = scan(p, -1)
    assert (sums.diff()[p[1:] == 0] != 0).any()
    monkeypatch.setattr(Tensor, "cumsum", scan)
    tokens = sample_tokens(p.log().expand(4096, -1), sums.clamp_max(LARGEST_UNIFORM))
    assert (p[tokens] > 0).all()


def test_draw_keeps_the_shape():
    logits = torch.randn(2, 3, 5, generator=seeded(0))
    uniform = torch.rand(2, 3, generator=seeded(1))
    tokens = sample_tokens(logits, uniform)
    assert tokens.dtype == torch.int64
    assert torch.equal(
        tokens, torch.stack([sample_tokens(*row) for row in zip(logits, uniform, strict=True)])
    )


# --- random numbers of images

EVERYWHERE = torch.arange(256)
NUMBERS = {
    "uniform": lambda streams: streams.uniform(3, EVERYWHERE),
    "gumbel": lambda streams: streams.gumbel(3, EVERYWHERE),
    "permutation": lambda streams: streams.permutation(256),
}


def chi_square_uniform(counts: Tensor) -> float:
    """How many standard deviations counts of equally likely cells are from what is expected."""
    expected, freedom = counts.sum().item() / counts.numel(), counts.numel() - 1
    statistic = (counts - expected).double().square().sum().item() / expected
    return (statistic - freedom) / math.sqrt(2 * freedom)


def cells(x: Tensor, n: int) -> Tensor:
    """Cells 0..n - 1 of equal size of numbers in (0, 1)."""
    return (x.double() * n).long()


def test_random_bits_are_those_of_splitmix64():
    """The reference in Python's integers, of any size."""
    mask = 2**64 - 1

    def mix(x: int) -> int:
        x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & mask
        x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & mask
        return x ^ (x >> 31)

    step = 0x9E3779B97F4A7C15
    assert mix(1234567 + step) == 6457827717110365317, "the first number of SplitMix64 from this seed"
    for seed in (0, 7, 2**63 + 5, 2**64 - 1, -3):
        start = mix((mix((seed + step) & mask) + 4 * 11) & mask)
        expected = [(2 * (mix((start + n * step) & mask) >> 41) + 1) / 2**24 for n in (1, 2, 256)]
        assert Streams([seed]).uniform(11, torch.tensor([0, 1, 255]))[0].tolist() == expected


@pytest.mark.parametrize("name", NUMBERS)
def test_numbers_of_an_image_depend_on_its_seed_only(name):
    of = NUMBERS[name]
    together = of(Streams([5, 6, 7]))
    assert torch.equal(together[1:2], of(Streams([6])))
    assert torch.equal(together[[2, 0]], of(Streams([5, 6, 7]).subset(torch.tensor([2, 0]))))
    assert torch.equal(together, of(Streams([5, 6, 7]))), "nothing is used up"
    assert len(together.unique(dim=0)) == 3


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("name", NUMBERS)
def test_numbers_of_an_image_are_the_same_on_a_gpu(name):
    assert torch.equal(NUMBERS[name](Streams([5, 6], "cuda")).cpu(), NUMBERS[name](Streams([5, 6])))


def test_numbers_of_a_position_do_not_depend_on_the_others():
    streams, some = Streams([5, 6]), torch.tensor([[9, 4], [200, 9]])
    for of in (streams.uniform, streams.gumbel):
        assert torch.equal(of(3, some), of(3, EVERYWHERE).gather(1, some))
        assert torch.equal(of(torch.tensor([3, 8]), some)[1], of(8, some)[1]), "each image at its own step"


def test_uniform_and_gumbel_distributions():
    uniform = Streams(range(256)).uniform(0, EVERYWHERE)
    assert 0 < uniform.min() < 1e-4
    assert 1 - 1e-4 < uniform.max() < 1
    assert abs(chi_square_uniform(cells(uniform, 1000).flatten().bincount(minlength=1000))) < 4
    gumbel = Streams(range(256)).gumbel(0, EVERYWHERE)
    assert gumbel.mean() == pytest.approx(0.5772, abs=0.02)
    assert gumbel.var() == pytest.approx(math.pi**2 / 6, rel=0.02)


def test_gumbel_is_finite_at_the_ends(monkeypatch):
    for bits in (0, -1):  # the smallest and the largest uniform number
        monkeypatch.setattr(Streams, "_bits", lambda self, *_: torch.tensor([[bits]]))  # noqa: B023
        assert 0 < Streams([0]).uniform(0, EVERYWHERE).item() < 1
        assert Streams([0]).gumbel(0, EVERYWHERE).isfinite().all()


def neighbours() -> dict[str, tuple[Tensor, Tensor]]:
    """Pairs of numbers, (n,) each, that differ in one input by the smallest amount."""
    streams, following = Streams(range(256)), Streams(range(1, 257))
    here = streams.uniform(0, EVERYWHERE)
    noise = torch.exp(-torch.exp(-streams.gumbel(0, EVERYWHERE).double())).clamp_max(1 - 2**-25)
    return {
        "position": (here[:, :-1].flatten(), here[:, 1:].flatten()),
        "seed": (here.flatten(), following.uniform(0, EVERYWHERE).flatten()),
        "step": (here.flatten(), streams.uniform(1, EVERYWHERE).flatten()),
        "a thousand steps": (here.flatten(), streams.uniform(1000, EVERYWHERE).flatten()),
        "purpose": (here.flatten(), noise.flatten()),
    }


@pytest.mark.parametrize("name", neighbours())
def test_neighbouring_numbers_are_independent(name):
    one, other = neighbours()[name]
    counts = (16 * cells(one, 16) + cells(other, 16)).bincount(minlength=256)
    assert abs(chi_square_uniform(counts)) < 4
    assert abs(torch.corrcoef(torch.stack((one, other)).double())[0, 1]) < 4 / math.sqrt(len(one))


def test_permutations_are_uniform():
    order = Streams(range(24_000)).permutation(4)
    assert torch.equal(order.sort(1).values, torch.arange(4).expand_as(order))
    which = (order * torch.tensor([64, 16, 4, 1])).sum(1).unique(return_counts=True)[1]
    assert len(which) == 24
    assert abs(chi_square_uniform(which)) < 4


# --- confidence


def test_scores_of_a_known_distribution():
    log_p, tokens = P.log()[None], torch.tensor([2])
    assert token_likelihood(log_p, tokens).item() == pytest.approx(math.log(0.2), rel=1e-5)
    assert max_prob(log_p, tokens).item() == pytest.approx(math.log(0.4), rel=1e-5)
    assert entropy(log_p, tokens).item() == pytest.approx(sum(p * math.log(p) for p in P.tolist()), rel=1e-5)
    assert margin(log_p, tokens).item() == pytest.approx(math.log(0.4 / 0.3), rel=1e-4)


def test_scores_of_certainty():
    log_p, tokens = torch.tensor([[0.0, -torch.inf, -torch.inf]]), torch.tensor([0])
    assert [SCORES[name](log_p, tokens).item() for name in SCORES] == [0, 0, 0, math.inf]
    assert token_likelihood(log_p, torch.tensor([1])).item() == -math.inf
    single = torch.zeros(2, 3, 1, device="meta")  # with one token only, wherever the log_p are
    assert margin(single, tokens).shape == (2, 3)
    assert margin(single, tokens).device == single.device
    assert margin(torch.zeros(2, 1), tokens).tolist() == [math.inf, math.inf]


@pytest.mark.parametrize("name", SCORES)
def test_token_blind_scores_ignore_the_token(name):
    log_p = torch.randn(20, 6, generator=seeded(0)).log_softmax(-1)
    zeros = torch.zeros(20, dtype=torch.int64)
    first, second = SCORES[name](log_p, zeros), SCORES[name](log_p, zeros + 1)
    assert first.dtype == torch.float32
    assert torch.equal(first, second) == (name in TOKEN_BLIND)
