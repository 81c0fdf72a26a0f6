import pytest
from hypothesis import given
from hypothesis import strategies as st

from anyorder.method.schedules import OPEN, reveals


@given(n=st.integers(0, 300), steps=st.integers(1, 400), schedule=st.sampled_from(sorted(OPEN)))
def test_every_step_reveals_something_and_all_is_revealed(n, steps, schedule):
    sizes = reveals(n, steps, schedule)
    assert len(sizes) == min(n, steps)
    assert sum(sizes) == n
    assert all(size >= 1 for size in sizes)


@pytest.mark.parametrize("schedule", OPEN)
def test_shares_go_from_all_to_nothing(schedule):
    share = [OPEN[schedule](i / 50) for i in range(51)]
    assert share[0] == pytest.approx(1)
    assert share[-1] == pytest.approx(0)
    assert share == sorted(share, reverse=True)


def test_shapes():
    assert reveals(64, 16) == [4] * 16
    assert reveals(64, 8, "cosine") == [1, 4, 6, 8, 9, 12, 12, 12]
    assert reveals(64, 8, "one_minus_cos") == reveals(64, 8, "cosine")[::-1]
    assert reveals(64, 8, "arccos") == [5, 5, 6, 5, 7, 7, 8, 21]


@given(n=st.integers(1, 200), steps=st.integers(1, 200))
def test_constant_steps_are_equal_but_for_one(n, steps):
    sizes = reveals(n, steps)
    assert max(sizes) - min(sizes) <= 1


@given(n=st.integers(20, 200))
def test_cosine_begins_with_few_and_ends_with_many(n):
    sizes = reveals(n, 8, "cosine")
    assert sizes[0] == min(sizes)
    assert sum(sizes[:4]) < sum(sizes[4:])


def test_refusals():
    with pytest.raises(ValueError, match="unknown schedule 'sine': choose one of constant, cosine"):
        reveals(4, 2, "sine")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="steps must be >= 1, got 0"):
        reveals(4, 0)
