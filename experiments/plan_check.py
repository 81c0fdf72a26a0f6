"""What `anyorder plan` says of every recipe, and of small trainings and samplings beside what was measured.

    python experiments/plan_check.py docs/results/plan.json

What the file holds already is kept: delete it to measure anew.

Memory: the largest sum of live tensors in a real training step, as PyTorch's profiler sees it, and what
lives between steps. Time: processor time of one thread, so that a busy machine matters less. The efficiency
is measured at the first size of each kind; the plan then says the time of the others. In sampling, peaks and
what operators cost (with a model too small to compute) are measured by the clock: run it on idle cores.
"""

from __future__ import annotations

import dataclasses
import statistics
import sys
import tempfile
import time
import timeit
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch

from anyorder import files
from anyorder.bench import costs, estimates, fake
from anyorder.bench.memory import _peak_of_cpu
from anyorder.cli.plan import plan
from anyorder.cli.planner import Kind, PlanConfig, Planner, update_bytes
from anyorder.method import decoding
from anyorder.method.loss import token_nll
from anyorder.method.policy_config import PolicyConfig
from anyorder.method.sampling import Streams
from anyorder.models import layers
from anyorder.models.architecture import TransformerConfig
from anyorder.models.transformer import AnyOrderTransformer
from anyorder.orders import random_orders
from anyorder.stages.experiment import RECIPES, Experiment, load_experiment
from anyorder.tokenizers.losses import LossConfig, TokenizerLoss
from anyorder.tokenizers.vq import VQConfig, VQModel
from anyorder.training.config import TrainConfig
from anyorder.training.trainer import Trainer

GPUS = {"fashion256": 1, "celebahq256": 1}
"""GPUs that a recipe is sized for, where they are not 8."""
GENERATORS = [
    (TransformerConfig(depth=6, width=256, heads=4, rotary=True, qk_norm=True, grid=(16, 16)), 4),
    (TransformerConfig(depth=3, width=96, heads=3, rotary=True, qk_norm=True, grid=(8, 8)), 64),
    (TransformerConfig(depth=4, width=512, heads=8, vocab_size=4096, grid=(16, 16)), 2),
]
TOKENIZERS = [
    (VQConfig(32, (1, 2, 2), 1, 64, 512, 8, groups=2, attention=False), 64, 4),
    (VQConfig(32, (1, 1, 2, 4), 2, 64, 1024, 8, groups=8), 96, 2),
]
TERMS = LossConfig(adversarial=0.1, discriminator_start=0, discriminator_channels=32, discriminator_layers=2)
POLICIES = (
    PolicyConfig("raster"),
    PolicyConfig("random", steps=16),
    PolicyConfig("entropy", rate_every=8),
)
ROUNDS = 7


def generator(config: TransformerConfig, batch: int, folder: str) -> tuple[Trainer, int, fake.Pass]:
    """A trainer, bytes that live between its steps, and what is counted of a pass."""
    torch.manual_seed(0)
    model = AnyOrderTransformer(config)
    n = model.grid.n
    tokens, order = torch.randint(config.vocab_size, (batch, n)), random_orders(batch, model.grid)

    def loss(model: Any, rows: np.ndarray, step: int, generator: torch.Generator) -> Any:
        return token_nll(model, tokens, None, order).mean(), {}

    train = TrainConfig(batch_size=batch, ema=0.99, bf16=False, steps=1000)
    with fake.imagined():
        size, trained, one = estimates.train_generator("transformer", config, 0, batch, False, 1, None)
        one = with_update(one, size, trained)
    return (
        Trainer(model, loss, batch, train, Path(folder), torch.device("cpu"), None),
        4 * (2 * size + 2 * trained),
        one,
    )


def tokenizer(config: VQConfig, side: int, batch: int, folder: str) -> tuple[Trainer, int, fake.Pass]:
    """The same of a tokenizer and its discriminator."""
    torch.manual_seed(0)
    model, objective = VQModel(config), TokenizerLoss(TERMS)
    images = 2 * torch.rand(batch, 3, side, side) - 1

    def loss(model: Any, rows: np.ndarray, step: int, generator: torch.Generator) -> Any:
        found = objective(model, images, step)
        objective._passes.clear()
        return found

    train = TrainConfig(batch_size=batch, ema=0.99, bf16=False, steps=1000)
    with fake.imagined():
        size, one = estimates.train_tokenizer(config, TERMS, (side, side), batch, False, 1)
        own = estimates.parameters("vq", config)  # the discriminator has no average
        one = with_update(one, own, size)
    trainer = Trainer(model, loss, batch, train, Path(folder), torch.device("cpu"), objective)
    return trainer, 4 * (3 * size + own), one


def with_update(one: fake.Pass, averaged: int, trained: int) -> fake.Pass:
    """A pass and the update of the weights."""
    moved = one.cost.elementwise + update_bytes(averaged, trained, True)
    return dataclasses.replace(one, cost=dataclasses.replace(one.cost, elementwise=moved))


def checked(made: tuple[Trainer, int, fake.Pass], what: str) -> dict[str, Any]:
    """Memory in MiB and seconds of a step; the plan's seconds are those at the measured peaks."""
    trainer, between, one = made
    trainer.step()  # AdamW makes its moments
    peak = _peak_of_cpu(trainer.step)
    a, b = torch.randn(1024, 1024), torch.ones(2**22)
    works = {
        "products": lambda: a @ a,
        "functions": lambda: torch.nn.functional.silu(b),
        "steps": trainer.step,
    }
    found: dict[str, list[float]] = {name: [] for name in works}
    for _ in range(ROUNDS):  # in turns, so that a change of the machine's speed affects all
        for times, work in zip(found.values(), works.values(), strict=True):
            begin = time.process_time()
            work()
            times.append(time.process_time() - begin)
    modules = [*trainer.trained.values(), trainer.average]
    alive = sum(x.nbytes for m in modules for x in m.parameters())
    alive += sum(x.nbytes for s in trainer.optimizer.state.values() for x in s.values() if x.ndim)
    products, functions, step = map(statistics.median, found.values())
    rate, bandwidth = 2 * 1024**3 / products, 2 * b.nbytes / functions
    seconds = one.cost.flops / rate + one.cost.elementwise / bandwidth
    planned, measured = between + one.peak, alive + peak
    return {
        "what": what,
        "memory planned (MiB)": planned / 2**20,
        "memory measured (MiB)": measured / 2**20,
        "memory planned / measured": planned / measured,
        "matmul (GFLOP/s)": rate / 1e9,
        "elementwise (GB/s)": bandwidth / 1e9,
        "seconds measured": step,
        "seconds at these peaks": seconds,
        "efficiency": seconds / step,
        "share of matmul": one.cost.flops / rate / step,
    }


def checks() -> list[dict[str, Any]]:
    """Small trainings; the first of each kind says the share that the plan takes for the others."""
    found = []
    with tempfile.TemporaryDirectory() as folder:
        for kind, make, sizes in (("generator", generator, GENERATORS), ("tokenizer", tokenizer, TOKENIZERS)):
            rows = []
            for number, size in enumerate(sizes):
                what = ", ".join(f"{k}={v}" for k, v in _changed(size[0]).items())
                rows.append(checked(make(*size, f"{folder}/{kind}{number}"), f"{kind}: {what}; {size[1:]}"))
                rows[-1]["seconds planned / measured"] = rows[-1]["efficiency"] / rows[0]["efficiency"]
            found += rows
    return found


def sampled() -> dict[str, Any]:
    """FLOPs, memory and seconds of sampling; the efficiency of the first inferred order is taken for all."""
    rows = []
    peaks = [estimates.speeds() for _ in range(ROUNDS)]
    kind = Kind(0.0, *map(statistics.median, list(zip(*peaks, strict=True))[1:]))
    for config, images in GENERATORS:
        torch.manual_seed(0)
        model = AnyOrderTransformer(config).eval()
        for policy in POLICIES:

            def work(policy: PolicyConfig = policy) -> None:
                with mock.patch.dict(decoding.ROWS, cpu=decoding.ROWS["cuda"]):  # as in plans
                    decoding.sample(model, policy, Streams(range(images)))  # noqa: B023

            with mock.patch.dict(
                "os.environ", {layers.SWITCH: "0"}
            ):  # plans know no packed copies of weights
                work()
                flops, memory = costs.count(work).flops, _peak_of_cpu(work)
            work()
            seconds = statistics.median(timeit.repeat(work, timer=time.process_time, repeat=ROUNDS, number=1))
            given = "transformer", config, model.grid.n, policy, images, images, False
            nothing, config_of = Experiment(Path(), {}), PlanConfig(kind="cpu", efficiency=1.0)
            with fake.imagined():
                alone, found = (
                    Planner(nothing, config_of, each)._decoded(*given)
                    for each in (kind._replace(call=0.0), kind)
                )
            calls, planned = found.seconds - alone.seconds, found.activations + found.cache
            what = ", ".join(f"{k}={v}" for k, v in (_changed(config) | _changed(policy)).items())
            rows.append({
                "what": f"{what}; {images} images",
                "FLOPs planned / measured": found.flops / flops,
                "memory planned (MiB)": planned / 2**20,
                "memory measured (MiB)": memory / 2**20,
                "memory planned / measured": planned / memory,
                "seconds measured": seconds,
                "seconds of calls": calls,
                "seconds at these peaks": alone.seconds,
                "efficiency": alone.seconds / (seconds - calls),
            })  # fmt: skip
            print(rows[-1], flush=True)
    first = rows[len(POLICIES) - 1]["efficiency"]
    for row in rows:
        planned = row["seconds at these peaks"] / first + row["seconds of calls"]
        row["seconds planned / measured"] = planned / row["seconds measured"]
    return {"peaks": kind._asdict(), "rows": rows}


def _changed(config: Any) -> dict[str, Any]:
    default = type(config)()
    return {k: v for k, v in dataclasses.asdict(config).items() if v != getattr(default, k)}


def main(out: str) -> None:
    """Write the file, after the checks and after each recipe."""
    torch.set_num_threads(1)
    path = Path(out)
    result: dict[str, Any] = files.read_json(path) if path.is_file() else {}  # type: ignore[assignment]
    result = {"command": f"python experiments/plan_check.py {out}", "recipes": {}} | result
    if "checks" not in result:
        files.write_json(path, result | {"checks": checks()})
        result = files.read_json(path)  # type: ignore[assignment]
    if "sampling" not in result:
        files.write_json(path, result | {"sampling": sampled()})
        result = files.read_json(path)  # type: ignore[assignment]
    for recipe in sorted(RECIPES.glob("*.yaml")):
        if recipe.stem not in result["recipes"]:
            config = PlanConfig(gpus=GPUS.get(recipe.stem, 8), kind="h100")
            result["recipes"][recipe.stem] = plan(load_experiment(recipe), config)
            files.write_json(path, result)
            print(recipe.stem, flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
