"""Classes, attributes and captions as one condition; the contract tests run over such models, too."""

import pytest
import torch
from conftest import CAPTIONS, GRID, Watched, incremental, seeded, several_conditions, transformer
from torch.testing import assert_close

from anyorder.contracts import class_labels
from anyorder.method.decoding import sample
from anyorder.method.guidance import GuidanceConfig, Guided
from anyorder.method.loss import joint_nll, token_nll
from anyorder.method.sampling import Streams
from anyorder.models.architecture import TransformerConfig
from anyorder.models.conditioning import hide
from anyorder.orders import random_orders

ALL = {"num_classes": 3, "attributes": (4, 2), **CAPTIONS}
SIZES = (3, 4, 2, 7, 7, 7, 7)
TOKENS = torch.randint(5, (3, 6), generator=seeded(0))
ORDER = random_orders(3, GRID, seeded(0))
CONDITION = several_conditions(3, SIZES)
CLOSE = {"rtol": 1e-4, "atol": 2e-5}


def logits(condition, **changes):
    with torch.no_grad():
        return transformer(**{**ALL, **changes})(TOKENS, condition, ORDER)


def test_every_part_of_the_condition_tells_from_the_first_step_on():
    whole = logits(CONDITION)[0]
    for column, size in enumerate(SIZES):
        other = CONDITION.clone()
        other[0, column] = (other[0, column] + 1) % size
        changed = logits(other)[0]
        assert ((changed - whole).abs().amax(1) > 1e-3).all()


def test_nothing_is_minus_one_or_left_out():
    nothing = torch.full_like(CONDITION, -1)
    assert_close(logits(None), logits(nothing))
    assert_close(logits(None), logits(nothing[:, 0]))
    assert_close(logits(CONDITION[:, 0]), logits(torch.cat((CONDITION[:, :1], nothing[:, 1:]), dim=1)))
    short = CONDITION.clone()
    short[:, 5:] = -1
    assert_close(logits(short), logits(short[:, :5]))


def test_captions_of_others_change_nothing():
    """However long the other captions of a batch are, the logits of an image stay the same."""
    for length in (1, 3, 6):
        other = CONDITION.clone()
        other[1:, 1:] = -1
        other[1:, 1 : 1 + length] = 1
        assert_close(logits(other)[0], logits(CONDITION)[0], **CLOSE)


def test_guidance_leads_away_from_no_condition_at_all():
    model = transformer(**ALL)
    with torch.no_grad():
        guided = Guided(model, GuidanceConfig(3.0)).forward(TOKENS, CONDITION, ORDER)
        c, u = model(TOKENS, CONDITION, ORDER), model(TOKENS, None, ORDER)
    assert_close(guided, 3 * c - 2 * u, rtol=1e-3, atol=1e-4)


def test_a_prefix_costs_no_further_call_of_the_loop():
    calls = []
    for condition in (None, CONDITION):
        watched = Watched(transformer(**ALL))
        sample(watched, "entropy", Streams(range(3)), condition=condition)
        calls.append((watched.calls, watched.candidates))
    assert calls[0] == calls[1]


def test_the_location_head_reads_the_caption():
    model = transformer(**ALL, location=True)
    revealed = torch.zeros(3, GRID.n, dtype=torch.bool)
    with torch.no_grad():
        content, where = joint_nll(model, TOKENS, CONDITION, ORDER)
        first = model.locate(model.start(3, CONDITION), revealed)
        other = model.locate(model.start(3, CONDITION.flip(0)), revealed)
    assert_close(content, token_nll(model, TOKENS, CONDITION, ORDER).detach())
    assert_close(-first.gather(1, ORDER[:, :1]), where[:, :1], **CLOSE)
    assert not torch.allclose(first[0], other[0])


def test_models_without_text_have_no_further_weights():
    plain = transformer(num_classes=3).state_dict()
    several = transformer(**ALL).state_dict()
    assert not any("prefix" in name for name in plain)
    assert {name for name in several if name.startswith("prefix.")} == several.keys() - plain.keys()


def test_hiding_everything_draws_as_it_did_before_there_was_text():
    labels = torch.arange(3).repeat(100)
    torch.manual_seed(0)
    hidden = hide(labels[:, None], 0, 0.3, 0.5)[:, 0]
    torch.manual_seed(0)
    assert torch.equal(hidden, torch.where(torch.rand(300) < 0.3, -1, labels))


def test_parts_are_hidden_on_their_own_and_captions_whole():
    torch.manual_seed(0)
    hidden = hide(torch.zeros(4000, 7, dtype=torch.int64), 2, 0.1, 0.2) == -1
    assert torch.equal(hidden[:, 3:].any(1), hidden[:, 3:].all(1))
    shares = hidden.float().mean(0)
    assert_close(shares, torch.full((7,), 0.1 + 0.9 * 0.2), rtol=0, atol=0.03)
    assert hidden.all(1).float().mean().item() == pytest.approx(0.1, abs=0.02)
    assert not hide(torch.zeros(50, 7, dtype=torch.int64), 2, 0, 0).any()


def test_gradients_reach_every_parameter():
    model = transformer(**ALL, label_dropout=0.5, location=True, token_dropout=0.3).train()
    torch.manual_seed(0)
    rows = torch.arange(3).repeat(20)
    parts = joint_nll(model, TOKENS[rows], several_conditions(60, SIZES), ORDER[rows])
    sum(part.mean() for part in parts).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().sum() > 0, name


def test_class_labels_are_the_first_column():
    assert torch.equal(class_labels(CONDITION), CONDITION[:, 0])
    assert torch.equal(class_labels(CONDITION[:, 0]), CONDITION[:, 0])


def test_incremental_in_bf16():
    model = transformer(**ALL, rotary=True).bfloat16()
    with torch.no_grad():
        forward, decoded = model(TOKENS, CONDITION, ORDER), incremental(model, TOKENS, CONDITION, ORDER)
    assert decoded.dtype == torch.bfloat16
    assert ((decoded - forward).abs().float().mean() / forward.float().std()) < 0.05


@pytest.mark.parametrize("column", range(len(SIZES)))
def test_values_out_of_range_are_refused(column):
    for value in (-2, SIZES[column]):
        wrong = CONDITION.clone()
        wrong[0, column] = value
        with pytest.raises(ValueError, match=r"labels must have shape \(3,\) .* or \(3, up to 7\)"):
            transformer(**ALL).start(3, wrong)


def test_conditions_of_another_shape_are_refused():
    for wrong in (CONDITION[:2], torch.zeros(3, 8, dtype=torch.int64), CONDITION[None]):
        with pytest.raises(ValueError, match="labels must have shape"):
            transformer(**ALL).start(3, wrong)
        with pytest.raises(ValueError, match="labels must have shape"):
            logits(wrong)
    for call in (lambda m: m.start(3, CONDITION), lambda m: m(TOKENS, CONDITION, ORDER)):
        with pytest.raises(ValueError, match=r"labels must have shape \(3,\)"):
            call(transformer(num_classes=3))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"attributes": (3, 0)}, "attributes must have >= 1 value"),
        ({"text_vocab": 5}, "both be 0"),
        ({"text_length": 5}, "both be 0"),
        ({"part_dropout": 1.0}, "part_dropout must lie in"),
    ],
)
def test_config_refuses(settings, message):
    with pytest.raises(ValueError, match=message):
        TransformerConfig(**settings)
