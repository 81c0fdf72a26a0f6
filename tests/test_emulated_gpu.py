"""Devices are never mixed, and the loops wait for a GPU no more often with more steps.

The same tests run for an emulated GPU, and with `-m gpu` for a real one.
"""

import json
from functools import partial

import numpy as np
import pytest
import torch
import torch._dynamo  # what optimizers import on their first use must not happen under the emulation
from conftest import GRID, published, transformer
from emulated_gpu import CUDA, EmulatedGPU, RealGPU
from PIL import Image
from test_caches import write

from anyorder import Pipeline
from anyorder.adapters.arpg import ARPG
from anyorder.adapters.llamagen import LlamaGen
from anyorder.adapters.randar import RandAR
from anyorder.contracts import Grid
from anyorder.data.caches import without_waiting
from anyorder.evaluation.features import Classifier, ClassifierConfig, ClassifierFeatures
from anyorder.method.decoding import complete, extract_orders, sample
from anyorder.method.guidance import GuidanceConfig, Guided
from anyorder.method.loss import image_nll, token_nll
from anyorder.method.policy_config import PolicyConfig
from anyorder.method.sampling import Streams
from anyorder.models.architecture import Architecture
from anyorder.models.groups import _layout
from anyorder.orders import random_orders
from anyorder.stages.artifacts import Artifact
from anyorder.stages.common import training_facts
from anyorder.stages.features import FeaturesStage
from anyorder.stages.tokenizer import TokenizerStage
from anyorder.stages.train import TrainStage
from anyorder.tokenizers.losses import LossConfig
from anyorder.tokenizers.vq import VQConfig, VQModel
from anyorder.training.config import TrainConfig
from anyorder.training.trainer import train

B = 3


class GeneratorOfCPU(torch.Generator):
    """Wherever it is asked for."""

    def __new__(cls, device=None):
        return torch._C.Generator("cpu")


def test_the_emulation_holds_to_the_rules():
    with EmulatedGPU() as gpu:
        x = torch.ones(2, 3, device="cuda")
        assert x.device == CUDA
        assert (x.T @ x).device == x.to(torch.float64).device == x[0].device == CUDA
        assert x.cpu().device.type == torch.ones(2).device.type == "cpu"
        with pytest.raises(RuntimeError, match="on cuda:0 and on the CPU"):
            x + torch.ones(2, 3)
        assert (x + torch.tensor(1.0)).sum().item() == 12
        module = torch.nn.Linear(3, 1).to("cuda")
        module(x).sum().backward()
        assert module.weight.device == module.weight.grad.device == CUDA
        x[torch.ones(2, 3, dtype=torch.bool).to("cuda")] = 0.0
        assert sum(gpu.reads.values()) == 2
        x[x < 1] = torch.ones(6).to("cuda")
        (x.flatten() + 1).multinomial(1)
        assert sum(gpu.reads.values()) == 4
        before = sum(gpu.uploads.values())
        torch.zeros(3).pin_memory().to("cuda", non_blocking=True)
        torch.tensor([1.0, 2.0], device="cuda")
        x[torch.tensor([0])].add_(1).copy_(torch.ones(1, 3))
        assert sum(gpu.uploads.values()) == before + 3


@pytest.fixture(
    params=[
        "emulated",
        pytest.param(
            "real",
            marks=[
                pytest.mark.gpu,
                pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
            ],
        ),
    ]
)
def gpu(request, monkeypatch):
    """A GPU: within a block `with gpu() as seen`, `seen.waits` counts what the host waits for."""

    def fresh(kind):
        _layout.cache_clear()  # what was sent to it before counts again
        return kind()

    if request.param == "real":
        return partial(fresh, RealGPU)
    monkeypatch.setattr(torch, "Generator", GeneratorOfCPU)
    monkeypatch.setattr("anyorder.inference.device.native_bf16", lambda device: True)
    monkeypatch.setattr("anyorder.inference.device._named", lambda *_: torch.device("cuda"))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H100")
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 3 * 2**30)
    return partial(fresh, EmulatedGPU)


def config_of(steps, **changes):
    return TrainConfig(steps=steps, batch_size=4, log_every=100, save_every=100, ema=0.9, **changes)


@pytest.mark.parametrize("bf16", [False, True])
def test_training_steps_never_wait(bf16, gpu, tmp_path):
    waits = {}
    for steps in (2, 6):
        with gpu() as seen:
            tokens = torch.randint(5, (8, GRID.n)).to("cuda")

            def loss(model, indices, step, generator, tokens=tokens):
                order = without_waiting(random_orders(len(indices), GRID), "cuda")
                return token_nll(model, tokens[: len(indices)], None, order).mean(), {}

            folder = tmp_path / str(steps)
            result = train(transformer(), loss, 8, config_of(steps, bf16=bf16), folder, device="cuda")
        waits[steps] = seen.waits
    assert waits[2] == waits[6]
    facts = training_facts(result)
    line = json.loads((folder / "metrics.jsonl").read_text().splitlines()[-1])
    assert line["peak_memory"] == facts["peak_memory"] > 0
    if isinstance(seen, EmulatedGPU):
        assert facts["peak_memory"] == 3 * 2**30
        assert line["mfu"] == facts["mfu"]


@pytest.fixture
def folders(tmp_path):
    """Images and tokens of two classes."""
    pixels, labels = np.arange(14 * 16 * 16 * 3).astype(np.uint8).reshape(14, 16, 16, 3), np.arange(14) % 2
    cut = {"train": slice(10), "test": slice(10, 14)}
    images = {f"{split}.images": pixels[rows] for split, rows in cut.items()}
    images |= {f"{split}.labels": labels[rows] for split, rows in cut.items()}
    tokens = {f"{split}.tokens": pixels[rows, 0, :6, 0] % 5 for split, rows in cut.items()}
    tokens |= {f"{split}.labels": labels[rows] for split, rows in cut.items()}
    facts = {"classes": ["a", "b"], "grid": [2, 3], "vocab_size": 5, "tokenizer": "tok", "data": "dat"}
    return {
        "data": write(tmp_path / "data", images, classes=["a", "b"]),
        "tokens": write(tmp_path / "tokens", tokens, **facts),
    }


def model_stage(folders, train, **changes):
    shape = {"depth": 1, "width": 16, "heads": 2, "location": changes.get("order") == "raster"}
    return TrainStage(folders["tokens"], model=Architecture(**shape), train=train, **changes)


def tokenizer_stage(folders, train, loss=LossConfig(), **changes):  # noqa: B008
    small = VQConfig(
        channels=8, multipliers=(1, 2), res_blocks=1, z_channels=8, code_dim=4, groups=4, attention=False,
        **changes,
    )  # fmt: skip
    return TokenizerStage(folders["data"], mirror=True, model=small, loss=loss, train=train)


def classifier_stage(folders, train):
    return FeaturesStage(folders["data"], channels=(8,), train=train)


ADVERSARIAL = LossConfig(adversarial=0.1, discriminator_channels=8, discriminator_layers=1)
TRAININGS = {
    "random": model_stage,
    "location": partial(model_stage, order="raster", random_share=0.5, jitter=0.5),
    "groups": partial(model_stage, groups=(3,)),
    "gradient": partial(tokenizer_stage, vocab_size=32, codebook_update="gradient", loss=ADVERSARIAL),
    "revived": partial(tokenizer_stage, vocab_size=32, codebook_update="gradient", revive_after=1),
    "ema": partial(tokenizer_stage, vocab_size=100, codebook_update="ema", revive_after=1),
    "classifier": classifier_stage,
}


class Trained(Exception):
    """Instead of what a stage does after its training."""


@pytest.mark.parametrize("name", TRAININGS)
def test_trainings_of_stages_never_wait(name, gpu, folders, tmp_path, monkeypatch):
    def alone(*args, evaluate, sample=None, **options):
        raise Trained(train(*args, **options))

    waits = {}
    for steps in (2, 6):
        stage = TRAININGS[name](folders, config_of(steps, bf16=False))
        monkeypatch.setattr(f"{type(stage).__module__}.train", alone)
        with gpu() as seen, pytest.raises(Trained):
            stage.run(Artifact(tmp_path / str(steps), "some stage", {}, {}))
        waits[steps] = seen.waits
    assert waits[2] == waits[6]


@pytest.mark.parametrize("name", ["classifier", "likelihood"])
def test_measuring_more_images_is_no_more_waiting(name, gpu, monkeypatch):
    """But for the copy of each batch of images."""
    monkeypatch.setattr("anyorder.method.loss.LOGITS", 2 * GRID.n * 6)  # two images at a time
    waits = {}
    for n in (2, 8):
        with gpu() as seen, torch.no_grad():
            if name == "classifier":
                network = Classifier(ClassifierConfig(2, 16, (8,))).eval().to("cuda")
                features, logits = ClassifierFeatures(network)(torch.zeros(n, 3, 16, 16, dtype=torch.uint8))
                assert features.device == logits.device == CUDA
            else:
                tokens = torch.randint(5, (n, GRID.n)).to("cuda")
                order = random_orders(n, GRID).to("cuda")
                model = transformer(num_classes=2, location=True).to("cuda")
                found = image_nll(model, tokens, tokens[:, 0] % 2, order, location=True)
                assert found["nll"].device == found["bound"].device == CUDA
        waits[n] = seen.waits
    assert waits[2] == waits[8]


def waits_of(gpu, run, grid: Grid, guided: bool = False, **changes) -> dict[str, int]:
    """What a run on a model of a grid waits for."""
    with gpu() as seen, torch.no_grad():
        model = transformer(num_classes=3, location=True, **changes).to("cuda")
        model = Guided(model, GuidanceConfig(scale=2.0)) if guided else model
        tokens = torch.randint(5, (B, grid.n)).to("cuda")
        condition = torch.arange(B, device="cuda")
        trace = run(model, tokens, condition, grid)
        assert trace.tokens.device == trace.order.device == trace.log_prob.device == CUDA
    return seen.waits


def in_order(order):
    return lambda model, tokens, condition, grid: sample(
        model, order, Streams(range(B), "cuda"), condition=condition, grid=grid
    )


def extraction(model, tokens, condition, grid):
    return extract_orders(model, tokens, "entropy", condition=condition, grid=grid)


def completion(model, tokens, condition, grid):
    known = (torch.arange(grid.n) < 2).expand(B, -1).to("cuda")
    streams = Streams(range(B), "cuda")
    return complete(model, tokens, known, "entropy", streams, condition=condition, grid=grid)


RUNS = {
    "fixed": in_order("raster"),
    "random": in_order("random"),
    "inferred": in_order("entropy"),
    "location": in_order("location"),
    "token_likelihood": in_order("token_likelihood"),
    "extraction": extraction,
    "completion": completion,
}


@pytest.mark.parametrize("rotary", [False, True])
@pytest.mark.parametrize("name", RUNS)
def test_more_positions_are_no_more_waiting(name, rotary, gpu):
    few, many = (waits_of(gpu, RUNS[name], grid, rotary=rotary) for grid in (GRID, Grid(3, 4)))
    assert many == few
    assert waits_of(gpu, RUNS[name], GRID, True, rotary=rotary) == few, "guidance must not wait more"


@pytest.mark.parametrize("model_class", [RandAR, ARPG, LlamaGen])
@pytest.mark.parametrize("guided", [False, True])
def test_published_models_stay_on_their_device(model_class, guided, gpu):
    orders = ["raster"] if model_class is LlamaGen else ["raster", "random", "entropy"]
    for order in orders:
        with gpu() as _, torch.no_grad():
            model = published(model_class).to("cuda")
            model = Guided(model, GuidanceConfig(scale=2.0)) if guided else model
            trace = sample(model, order, Streams(range(B), "cuda"), condition=torch.arange(B, device="cuda"))
            assert trace.tokens.device == trace.order.device == trace.log_prob.device == CUDA


@pytest.mark.parametrize("order", ["random", "entropy"])
def test_adaptive_steps_stay_on_their_device(order, gpu):
    """They wait, since the host decides when all images are done."""
    with gpu() as _, torch.no_grad():
        policy = PolicyConfig(order, per_step=3, entropy_limit=2.0)
        trace = sample(transformer().to("cuda"), policy, Streams(range(B), "cuda"))
        assert trace.tokens.device == trace.order.device == trace.log_prob.device == CUDA


def test_a_pipeline_generates_and_completes_on_its_device(gpu):
    small = VQConfig(
        channels=8, multipliers=(1, 2), res_blocks=1, z_channels=8, code_dim=4, groups=4, attention=False,
        vocab_size=5,
    )  # fmt: skip
    side = 2 * GRID.h, 2 * GRID.w
    with gpu() as _, torch.no_grad():
        orders = torch.arange(GRID.n).expand(2, -1)
        pipe = Pipeline(transformer(num_classes=2), VQModel(small).eval(), class_orders=orders).to("cuda")
        assert pipe.tokenizer.encode(torch.zeros(1, 3, *side, device="cuda")).device == CUDA
        for order in ("entropy", "class_mean", "random", list(range(GRID.n))):
            assert len(pipe([0, 1], 2, order, generator=0).images) == 2
        mask = np.zeros(side, bool)
        mask[:2] = True
        picture = Image.new("RGB", side[::-1])
        assert pipe.complete(picture, mask, generator=0).images[0].size == side[::-1]


@pytest.mark.parametrize("order", ["random", "location"])
def test_groups_never_wait(order, gpu):
    run = in_order(PolicyConfig(order, steps=2))
    few, many = (waits_of(gpu, run, grid, grouped=True) for grid in (GRID, Grid(3, 4)))
    assert sum(many.values()) <= sum(few.values())
