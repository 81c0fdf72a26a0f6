"""Every setting changes something or is refused.

`EFFECTS` lists for every field of the classes that several commands share, and `COMMANDS` for every further
setting of each command, two values between which something that is written, asked of a model or refused
differs. A setting that is in neither table fails here.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import own_parts
import pytest
import torch
from conftest import transformer
from safetensors.torch import save_file
from test_losses import vgg_weights
from torch import nn

from anyorder.contracts import Grid
from anyorder.data.captions import CaptionTokenizer, TextConfig, several
from anyorder.inference.inpainting import Filling, with_hole
from anyorder.method.decoding import complete, extract_orders, sample
from anyorder.method.guidance import GuidanceConfig, Guided
from anyorder.method.policy_config import PolicyConfig
from anyorder.method.sampling import Sampling, Streams, truncate
from anyorder.models.blocks import Block
from anyorder.models.transformer import AnyOrderTransformer, Architecture, TransformerConfig
from anyorder.orders import random_orders
from anyorder.tokenizers.losses import LossConfig, TokenizerLoss
from anyorder.tokenizers.vq import VQConfig, VQModel
from anyorder.training import distributed, trainer
from anyorder.training.config import TrainConfig

GRID = Grid(3, 4)
LABELS = torch.tensor([0, 1, 2])
Settings = dict[str, Any]


class Pair(NamedTuple):
    """Two values of a setting, beside other settings that it needs."""

    a: Any
    b: Any
    beside: Settings = {}  # noqa: RUF012 - never changed


def numbers(*tensors: torch.Tensor) -> list[Any]:
    return [tensor.tolist() for tensor in tensors]


# --- classes that several commands share --------------------------------------------------------------------


def of_sampling(config: Sampling) -> Any:
    return numbers(truncate(torch.tensor([3.0, 2.0, 1.5, 0.0, -1.0]), config))


def of_guidance(config: GuidanceConfig) -> Any:
    guided = Guided(transformer(num_classes=3, grid=(3, 4)), config)
    made = sample(guided, "entropy", Streams(range(3)), condition=LABELS)
    return [config.at(i / 12) for i in range(12)], numbers(made.order)


def of_policy(config: PolicyConfig) -> Any:
    model = transformer(grid=(3, 4), location=True)
    tokens = torch.randint(5, (3, 12), generator=torch.Generator().manual_seed(1))
    streams = Streams(range(3))
    by_class = torch.arange(12).flip(0).expand(3, -1) if config.by_class else None
    found = extract_orders(model, tokens, config.build(GRID, streams, by_class), streams)
    return numbers(found.order), config.evaluations(12)


def of_filling(config: Filling) -> Any:
    torch.manual_seed(0)
    tokenizer = VQModel(VQConfig(8, (1, 2), 1, 8, 5, 4, groups=2)).eval()
    images = torch.arange(3 * 48, dtype=torch.uint8).view(1, 3, 6, 8)
    mask = torch.zeros(1, 6, 8, dtype=torch.bool)
    mask[:, 2:5, 2:6] = True
    begun = with_hole(tokenizer, images, mask, config)
    made = complete(transformer(grid=(3, 4)), begun.tokens, begun.known, "raster", Streams([0]), grid=GRID)
    return numbers(begun.finish(tokenizer, made.tokens), begun.known)


def of_text(config: TextConfig) -> Any:
    texts = [f"a {color} shoe\na {color} boot" for color in ("red", "green", "blue")]
    captions = several(texts, min(2, config.captions))
    return CaptionTokenizer.train(captions, config.vocab_size).encode(captions, config.length).tolist()


def of_architecture(config: Architecture) -> Any:
    """Names and outputs of a seeded model in training, its gradients, and how often blocks run."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 5, "grid": (3, 4), "num_classes": 3, "attributes": (2,)}
    model = AnyOrderTransformer(TransformerConfig(**vars(config), **sizes)).train()
    tokens, order = torch.randint(5, (8, 12)), random_orders(8, GRID, torch.Generator().manual_seed(0))
    calls = []
    with pytest.MonkeyPatch.context() as patch:
        run = Block.forward
        patch.setattr(Block, "forward", lambda *args: calls.append(1) or run(*args))
        condition = torch.tensor([[0, 0], [1, 1], [2, 0], [0, 1]] * 2)
        if config.location:
            logits, where = model.joint(tokens, condition, order)
            where.gather(2, order[..., None]).sum().backward()
        else:
            logits = model(tokens, condition, order)
            logits.sum().backward()
    grad = model.token_embedding.weight.grad
    return sorted(model.state_dict()), numbers(logits), grad is None or grad.sum().item(), len(calls)


def of_vq(config: VQConfig) -> Any:
    torch.manual_seed(0)
    model, images = VQModel(config).train(), torch.rand(2, 3, 8, 8) * 2 - 1
    for step in range(3):
        found = model(images)
        model.quantize.update(
            found.latents.detach().flatten(0, 1), found.tokens.flatten(), torch.Generator().manual_seed(step)
        )
    losses = found.commitment_loss.item(), found.codebook_loss.item()
    return sorted(model.state_dict()), numbers(found.reconstruction, found.tokens), losses


def of_loss(config: LossConfig) -> Any:
    torch.manual_seed(0)
    tokenizer = VQModel(VQConfig(8, (1, 2), 1, 8, 64, 4, groups=2, revive_after=1)).train()
    loss, images = TokenizerLoss(config), torch.rand(2, 3, 32, 32) * 2 - 1
    steps = 1 if config.lpips else 3  # of a large network
    totals = []
    for step in range(steps):
        totals.append(loss(tokenizer, images, step)[0].item())
        loss.update_codebook(tokenizer, step)
    return totals, len(list(loss.parameters())), sum(p.numel() for p in loss.parameters())


def of_training(config: TrainConfig) -> Any:
    """Weights, checkpoints, lines of the log, and when the hooks were called."""
    import tempfile

    torch.manual_seed(0)
    model, hooks = nn.Sequential(nn.Linear(3, 3, bias=False), nn.Dropout(0.2)), []
    x = torch.randn(16, 3)

    def loss(model: nn.Module, rows: np.ndarray, step: int, generator: torch.Generator) -> Any:
        return (model(x[rows]) - 1).square().mean(), {}

    def evaluate(model: nn.Module, step: int) -> dict[str, float]:
        hooks.append(("evaluate", step))
        return {"test_nll": step, "train_nll": -step}

    with pytest.MonkeyPatch.context() as patch, tempfile.TemporaryDirectory() as folder:
        patch.setenv("ANYORDER_BF16", "on")
        patch.setattr(distributed, "require_compiler", lambda device: None)
        patch.setattr(torch, "compile", lambda model: hooks.append("compiled") or model)
        run = SimpleNamespace(log=lambda *_, **__: None, finish=lambda: hooks.append("wandb"))
        stand_in = SimpleNamespace(init=lambda **_: run, Image=None)
        patch.setitem(sys.modules, "wandb", stand_in)
        result = trainer.train(
            model, loss, 16, config, folder, evaluate=evaluate, sample=lambda *args: hooks.append(args[1])
        )
        lines = [json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text().splitlines()]
        names = sorted(p.name for p in Path(folder).rglob("*") if p.is_dir() or "events" in p.name)
    hooks += [recorder.seen for recorder in own_parts.Recorder.made]
    own_parts.Recorder.made.clear()
    return (
        numbers(*result.model.state_dict().values()), hooks, [sorted(line) for line in lines],
        [name.partition(".out.")[0] for name in names],
    )  # fmt: skip


FEW = {"steps": 4, "batch_size": 4, "log_every": 2, "eval_every": 2, "save_every": 2, "bf16": False}
SMALL = {"depth": 2, "width": 16, "heads": 2, "label_dropout": 0.0, "part_dropout": 0.0}
SMALL_VQ = {
    "channels": 8, "multipliers": (1, 2), "res_blocks": 1, "z_channels": 8, "vocab_size": 16, "code_dim": 4,
    "groups": 2, "attention": False,
}  # fmt: skip
VGG = {"lpips": 1.0, "vgg_path": Path("vgg.safetensors")}
ADVERSARY = {"adversarial": 0.5, "discriminator_channels": 8, "discriminator_layers": 1}
GUIDED = {"scale": 6.0}

EFFECTS: dict[type, tuple[Callable[[Any], Any], Settings, dict[str, Pair]]] = {
    Sampling: (of_sampling, {}, {
        "temperature": Pair(1.0, 0.5), "top_k": Pair(0, 2), "top_p": Pair(1.0, 0.5), "min_p": Pair(0.0, 0.5),
    }),
    GuidanceConfig: (of_guidance, GUIDED, {
        "scale": Pair(1.0, 3.0), "schedule": Pair("constant", "linear"),
        "power": Pair(1.0, 2.0, {"schedule": "power-cosine"}), "interval": Pair((0.0, 1.0), (0.5, 1.0)),
        "locations": Pair("guided", "unguided"),
    }),
    PolicyConfig: (of_policy, {}, {
        "order": Pair("entropy", "raster"), "sign": Pair(1, -1), "temperature": Pair(None, 5.0),
        "distance": Pair(0.0, 2.0), "distance_to": Pair("last", "nearest", {"distance": 1.0}),
        "location": Pair(0.0, 5.0), "rescore": Pair(1.0, 0.3),
        "rate_every": Pair(1, 4), "class_weight": Pair(1.0, 90.0), "per_step": Pair(1, 4),
        "steps": Pair(0, 3),
        "schedule": Pair("constant", "cosine", {"steps": 3}), "min_distance": Pair(0.0, 2.0, {"per_step": 4}),
        "entropy_limit": Pair(None, 0.5, {"per_step": 4}),
    }),
    Filling: (of_filling, {}, {"margin": Pair(0, 1), "feather": Pair(0, 2)}),
    TextConfig: (of_text, {}, {"vocab_size": Pair(512, 12), "length": Pair(16, 1), "captions": Pair(10, 1)}),
    Architecture: (of_architecture, SMALL, {
        "depth": Pair(1, 2), "width": Pair(16, 32), "heads": Pair(1, 2),
        "next_position": Pair("relative", "absolute"), "current_position": Pair("absolute", "none"),
        "class_at": Pair("first", "every"), "rotary": Pair(False, True), "qk_norm": Pair(False, True),
        "dropout": Pair(0.0, 0.5), "token_dropout": Pair(0.0, 0.5), "label_dropout": Pair(0.0, 0.9),
        "part_dropout": Pair(0.0, 0.9), "location": Pair(False, True),
        "location_gradient": Pair(True, False, {"location": True}), "checkpointing": Pair(False, True),
    }),
    VQConfig: (of_vq, SMALL_VQ, {
        "channels": Pair(8, 16), "multipliers": Pair((1, 2), (1, 1)), "res_blocks": Pair(1, 2),
        "z_channels": Pair(8, 16), "vocab_size": Pair(16, 8), "code_dim": Pair(4, 8), "groups": Pair(2, 4),
        "attention": Pair(False, True), "dropout": Pair(0.0, 0.5), "commitment": Pair(0.25, 1.0),
        "codebook_update": Pair("gradient", "ema"), "revive_after": Pair(0, 1),
        "ema_decay": Pair(0.99, 0.5, {"codebook_update": "ema"}),
    }),
    LossConfig: (of_loss, {}, {
        "l1": Pair(1.0, 2.0), "l2": Pair(1.0, 2.0), "lpips": Pair(1.0, 2.0, VGG),
        "vgg_path": Pair(Path("vgg.safetensors"), Path("other.safetensors"), VGG),
        "lpips_path": Pair(None, Path("heads.safetensors"), VGG), "adversarial": Pair(0.5, 1.0, ADVERSARY),
        "discriminator_start": Pair(0, 2, ADVERSARY), "discriminator_channels": Pair(8, 16, ADVERSARY),
        "discriminator_layers": Pair(1, 2, ADVERSARY), "seed": Pair(0, 1),
    }),
    TrainConfig: (of_training, FEW, {
        "steps": Pair(4, 5), "batch_size": Pair(4, 5), "accumulation": Pair(1, 2),
        "learning_rate": Pair(1e-3, 1e-2), "warmup": Pair(0, 2), "min_lr_ratio": Pair(0.0, 1.0),
        "beta1": Pair(0.9, 0.5), "beta2": Pair(0.95, 0.5), "weight_decay": Pair(0.05, 0.5),
        "clip": Pair(1.0, 1e-9), "ema": Pair(0.0, 0.5), "bf16": Pair(False, True),
        "compile": Pair(False, True), "seed": Pair(0, 1), "log_every": Pair(2, 1), "eval_every": Pair(2, 1),
        "save_every": Pair(2, 1), "sample_every": Pair(0, 2), "patience": Pair(0, 1, {"steps": 8}),
        "watch": Pair("test_nll", "train_nll", {"patience": 1, "steps": 8}), "keep": Pair(2, 1),
        "tensorboard": Pair(False, True), "wandb": Pair(False, True),
        "logger": Pair("", "own_parts:Recorder"),
    }),
}  # fmt: skip
"""By class: what is observed of an instance, settings that make it small, and the pairs."""


@pytest.fixture(scope="module")
def perceptual(tmp_path_factory):
    """A folder of weights for `LossConfig`."""
    folder = tmp_path_factory.mktemp("vgg")
    save_file(vgg_weights(), folder / "vgg.safetensors")
    save_file(vgg_weights(1), folder / "other.safetensors")
    heads = {f"lin{i}.model.1.weight": torch.rand(1, n, 1, 1) for i, n in enumerate((64, 128, 256, 512, 512))}
    save_file(heads, folder / "heads.safetensors")
    return folder


@pytest.mark.parametrize(
    ("config", "name"), [(config, name) for config, (_, _, pairs) in EFFECTS.items() for name in pairs]
)
def test_fields_have_an_effect(config, name, perceptual, monkeypatch):
    monkeypatch.chdir(perceptual)
    observe, small, pairs = EFFECTS[config]
    pair = pairs[name]
    if name == "tensorboard" or (config, name) == (TextConfig, "vocab_size"):
        pytest.importorskip({"tensorboard": "tensorboard"}.get(name, "tokenizers"))
    a, b = (config(**{**small, **pair.beside, name: value}) for value in (pair.a, pair.b))
    assert observe(a) != observe(b)


@pytest.mark.parametrize("config", [config for config in EFFECTS if config is not TextConfig])
def test_nothing_but_the_setting_makes_the_difference(config):
    observe, small, _ = EFFECTS[config]
    assert observe(config(**small)) == observe(config(**small))


def test_every_field_of_shared_classes_is_in_the_table():
    for config, (_, _, pairs) in EFFECTS.items():
        # Sharding changes nothing in one process: see the test below, and test_processes.py.
        elsewhere = {"shard"} if config is TrainConfig else set()
        assert {*pairs} == {f.name for f in dataclasses.fields(config)} - elsewhere, config


@pytest.mark.parametrize("shard", [False, True])
def test_weights_are_sharded_among_several_processes_alone(shard, monkeypatch, tmp_path):
    """What is asked for in one process and in two; what sharding does is compared in test_processes.py."""
    asked = []

    def objective(loss: Any, modules: Any, compiled: bool, sharded: bool) -> Any:
        asked.append(sharded)
        raise InterruptedError

    monkeypatch.setattr(distributed, "objective", objective)
    monkeypatch.setattr(trainer.processes, "rank", lambda: 0)
    for size in (1, 2):
        monkeypatch.setattr(trainer.processes, "size", lambda size=size: size)
        config = TrainConfig(**FEW, shard=shard, accumulation=2)
        with pytest.raises(InterruptedError):
            trainer.Trainer(nn.Linear(3, 3), None, 16, config, tmp_path, torch.device("cpu"), None)
    assert asked == [False, shard]
