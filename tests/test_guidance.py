import math

import pytest
import torch
from conftest import GRID, Watched, incremental, seeded, transformer
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close

from anyorder.bench.memory import _peak_of_cpu
from anyorder.method import decoding
from anyorder.method.decoding import extract_orders, generate, sample
from anyorder.method.guidance import GuidanceConfig, Guided
from anyorder.method.sampling import Streams
from anyorder.orders import random_orders

MODEL = transformer(num_classes=3)
LABELS = torch.tensor([2, 0, 1])
TOKENS = torch.randint(5, (3, 6), generator=seeded(0))
ORDER = random_orders(3, GRID, seeded(0))
CLOSE = {"rtol": 1e-4, "atol": 2e-5}
SCHEDULES = ("constant", "linear", "power-cosine")


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
    power=st.floats(0.1, 10),
    fractions=st.tuples(st.floats(0, 1), st.floats(0, 1)),
)
def test_schedules_grow_from_one_to_the_scale(scale, schedule, power, fractions):
    exponent = {"power": power} if schedule == "power-cosine" else {}
    config = GuidanceConfig(scale, schedule, **exponent)
    assert config.at(0.0) == (scale if schedule == "constant" else 1)
    assert config.at(1.0) == pytest.approx(scale)
    early, late = sorted(fractions)
    assert 1 <= config.at(early) <= config.at(late) + 1e-9
    assert config.at(late) <= scale + 1e-9


def test_schedules_in_closed_form():
    assert GuidanceConfig(3.0, "linear").at(0.25) == 1.5
    assert GuidanceConfig(3.0, "power-cosine", power=1.0).at(0.5) == pytest.approx(2)
    assert GuidanceConfig(3.0, "power-cosine", power=2.0).at(0.5) == pytest.approx(1 + (1 - 0.5**0.5))


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_guidance_acts_in_its_interval_only(schedule):
    """A closed interval: steps 2, 3 and 4 of 6 are guided, as they are without an interval."""
    config = GuidanceConfig(3.0, schedule, interval=(2 / 6, 4 / 6))
    everywhere, nowhere = forward(GuidanceConfig(3.0, schedule)), MODEL(TOKENS, LABELS, ORDER)
    assert_close(forward(config)[:, 2:5], everywhere[:, 2:5], **CLOSE)
    assert_close(forward(config)[:, [0, 1, 5]], nowhere[:, [0, 1, 5]], **CLOSE)
    assert not torch.allclose(everywhere[:, 5], nowhere[:, 5])
    assert_close(incremental(Guided(MODEL, config), TOKENS, LABELS, ORDER), forward(config), **CLOSE)


def by(order, config):
    return sample(Guided(MODEL, config), order, Streams(range(3)), condition=LABELS)


def test_unguided_locations_are_those_of_the_conditional_model():
    """Given what was drawn, the conditional model would have gone the same way."""
    plain = sample(MODEL, "entropy", Streams(range(3)), condition=LABELS)
    guided, unguided = (
        by("entropy", GuidanceConfig(6.0, locations=locations)) for locations in ("guided", "unguided")
    )
    assert torch.equal(unguided.order[:, 0], plain.order[:, 0])
    assert not torch.equal(unguided.order, guided.order)
    again = extract_orders(MODEL, unguided.tokens, "entropy", condition=LABELS)
    assert torch.equal(again.order, unguided.order)


def test_unguided_locations_cost_no_further_call():
    calls = []
    for locations in ("guided", "unguided"):
        watched = Watched(MODEL)
        config = GuidanceConfig(2.0, locations=locations)
        sample(Guided(watched, config), "entropy", Streams(range(3)), condition=LABELS)
        calls.append((watched.calls, watched.candidates))
    assert calls[0] == calls[1]


def test_unguided_locations_leave_content_guided():
    """In a given order, where there is nothing to infer, the setting changes nothing."""
    guided, unguided = (
        by(ORDER, GuidanceConfig(6.0, locations=locations)) for locations in ("guided", "unguided")
    )
    assert torch.equal(guided.tokens, unguided.tokens)
    assert torch.equal(guided.log_prob, unguided.log_prob)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"schedule": "cosine"}, "constant, linear or power-cosine, got 'cosine'"),
        ({"power": 0}, "power"),
        ({"scale": math.nan}, "scale must be a number"),
        ({"interval": (0.5, 0.2)}, "two rising shares in .0, 1., got 0.5 and 0.2"),
        ({"interval": (0.0, 1.5)}, "interval"),
        ({"locations": "both"}, "guided or unguided, got 'both'"),
        ({"scale": 2.0, "power": 2.0}, "is the exponent of schedule=power-cosine"),
        ({"scale": 2.0, "schedule": "linear", "power": 2.0}, "is the exponent of schedule=power-cosine"),
    ],
)
def test_guidance_config_refuses(settings, message):
    with pytest.raises(ValueError, match=message):
        GuidanceConfig(**settings)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"schedule": "linear"}, "schedule has no effect at scale=1"),
        ({"schedule": "linear", "interval": (0.0, 0.5)}, "schedule and interval has no effect at scale=1"),
        ({"scale": 2.0, "locations": "guided"}, "is about inferred orders"),
    ],
)
def test_settings_without_effect_are_refused(settings, message):
    config = GuidanceConfig(**settings)
    with pytest.raises(ValueError, match=message):
        config.require_effect(rated=False, scored=False, scaled=config.scale != 1)


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
