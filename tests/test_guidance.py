import math

import pytest
import torch
from conftest import GRID, incremental, seeded, transformer
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close

from anyorder.bench.memory import _peak_of_cpu
from anyorder.method import decoding
from anyorder.method.decoding import generate, sample
from anyorder.method.guidance import GuidanceConfig, Guided
from anyorder.method.sampling import Streams
from anyorder.orders import random_orders
from anyorder.settings import parse, read_stored

MODEL = transformer(num_classes=3)
LABELS = torch.tensor([2, 0, 1])
TOKENS = torch.randint(5, (3, 6), generator=seeded(0))
ORDER = random_orders(3, GRID, seeded(0))
CLOSE = {"rtol": 1e-4, "atol": 2e-5}
SCHEDULES = ("constant", "linear")


@pytest.fixture(autouse=True)
def _no_grad():
    with torch.no_grad():
        yield


def forward(config: GuidanceConfig) -> torch.Tensor:
    return Guided(MODEL, config).forward(TOKENS, LABELS, ORDER)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_scale_one_is_the_conditional_model(schedule):
    assert_close(forward(GuidanceConfig(1.0, schedule)), MODEL(TOKENS, LABELS, ORDER), **CLOSE)


def test_scale_zero_is_the_unconditional_model():
    assert_close(forward(GuidanceConfig(0.0)), MODEL(TOKENS, None, ORDER), **CLOSE)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("scale", [-1.0, 0.5, 3.0])
def test_logits_are_a_linear_combination(schedule, scale):
    config = GuidanceConfig(scale, schedule)
    c, u = MODEL(TOKENS, LABELS, ORDER), MODEL(TOKENS, None, ORDER)
    assert not torch.allclose(c, u)
    scales = torch.tensor([config.at(step / 6) for step in range(6)])[:, None]
    assert_close(forward(config), scales * c + (1 - scales) * u, **CLOSE)
    assert_close(incremental(Guided(MODEL, config), TOKENS, LABELS, ORDER), forward(config), **CLOSE)


def test_rows_without_a_label_are_not_guided():
    config = GuidanceConfig(4.0)
    mixed = Guided(MODEL, config).forward(TOKENS, torch.tensor([2, -1, 1]), ORDER)
    assert_close(mixed[1], MODEL(TOKENS, None, ORDER)[1], **CLOSE)
    assert_close(mixed[[0, 2]], forward(config)[[0, 2]], **CLOSE)


def test_guided_samples():
    plain, same, strong = (
        sample(model, "entropy", Streams(range(3)), condition=LABELS)
        for model in (MODEL, Guided(MODEL, GuidanceConfig()), Guided(MODEL, GuidanceConfig(5.0)))
    )
    assert torch.equal(plain.tokens, same.tokens)
    assert not torch.equal(plain.tokens, strong.tokens)


@given(
    scale=st.floats(1, 20, exclude_min=True),
    schedule=st.sampled_from(SCHEDULES),
    fractions=st.tuples(st.floats(0, 1), st.floats(0, 1)),
)
def test_schedules_grow_from_one_to_the_scale(scale, schedule, fractions):
    config = GuidanceConfig(scale, schedule)
    assert config.at(0.0) == (scale if schedule == "constant" else 1)
    assert config.at(1.0) == pytest.approx(scale)
    early, late = sorted(fractions)
    assert 1 <= config.at(early) <= config.at(late) + 1e-9
    assert config.at(late) <= scale + 1e-9


def test_schedules_in_closed_form():
    assert GuidanceConfig(3.0, "linear").at(0.25) == 1.5
    assert GuidanceConfig(3.0).at(0.25) == 3.0


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"schedule": "cosine"}, "constant or linear, got 'cosine'"),
        ({"scale": math.nan}, "scale must be a number"),
    ],
)
def test_guidance_config_refuses(settings, message):
    with pytest.raises(ValueError, match=message):
        GuidanceConfig(**settings)


def test_a_schedule_without_effect_is_refused():
    config = GuidanceConfig(schedule="linear")
    with pytest.raises(ValueError, match="schedule has no effect at scale=1"):
        config.require_effect(False)
    config.require_effect(True)


@pytest.mark.parametrize("locations", [None, "guided"])
def test_saved_guidance_of_earlier_versions_is_read(locations):
    stored = {"scale": 2.0, "schedule": "linear", "power": 2.75, "interval": [0.0, 1.0]}
    stored["locations"] = locations
    assert parse(GuidanceConfig, read_stored(GuidanceConfig, stored)) == GuidanceConfig(2.0, "linear")
    with pytest.raises(ValueError, match=r"interval=.* cannot be read"):
        read_stored(GuidanceConfig, stored | {"interval": [0.0, 0.5]})


def test_guided_scoring_takes_the_memory_of_plain_scoring(monkeypatch):
    """Twice the rows: half as many candidates at once, and no further copies of the logits."""
    monkeypatch.setattr(decoding, "LOGITS", 2**16)
    model = transformer(num_classes=3, vocab_size=512, grid=(8, 8))
    plain, guided = (
        _peak_of_cpu(
            lambda m=m: next(generate(m, "entropy", Streams(range(4)), condition=torch.zeros(4).long()))
        )
        for m in (model, Guided(model, GuidanceConfig(2.0)))
    )
    logits = 4 * decoding.LOGITS
    assert plain > 2 * logits
    assert guided < 1.3 * plain
    assert guided < 4 * logits


def test_guidance_needs_labels():
    guided = Guided(MODEL, GuidanceConfig(2.0))
    with pytest.raises(ValueError, match="guidance needs class labels"):
        guided.forward(TOKENS, None, ORDER)
    with pytest.raises(ValueError, match="guidance needs class labels"):
        guided.start(3)
