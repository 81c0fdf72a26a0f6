"""Devices are never mixed, and the loops wait for a GPU no more often with more steps."""

import pytest
import torch
import torch._dynamo  # what optimizers import on their first use must not happen under the emulation
from conftest import GRID, transformer
from emulated_gpu import CUDA, EmulatedGPU

from anyorder.contracts import Grid
from anyorder.method.decoding import complete, extract_orders, sample
from anyorder.method.guidance import GuidanceConfig, Guided
from anyorder.method.loss import token_nll
from anyorder.method.policy_config import PolicyConfig
from anyorder.method.sampling import Streams
from anyorder.orders import random_orders
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
    assert sum(gpu.reads.values()) == 2


@pytest.mark.parametrize("bf16", [False, True])
def test_training_steps_never_wait(bf16, tmp_path):
    reads = {}
    for steps in (2, 6):
        with EmulatedGPU() as gpu:
            tokens = torch.randint(5, (8, GRID.n)).to("cuda")

            def loss(model, indices, step, generator, tokens=tokens):
                order = random_orders(len(indices), GRID).to(tokens.device)
                return token_nll(model, tokens[: len(indices)], None, order).mean(), {}

            config = TrainConfig(steps=steps, batch_size=4, log_every=100, save_every=100, bf16=bf16, ema=0.9)
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(torch, "Generator", GeneratorOfCPU)
                patch.setattr("anyorder.inference.device.native_bf16", lambda device: True)
                patch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H100")
                train(transformer(), loss, 8, config, tmp_path / str(steps), device="cuda")
        reads[steps] = gpu.reads
    assert reads[2] == reads[6]


def reads_of(run, grid: Grid, guided: bool = False, **changes) -> dict[str, int]:
    """Blocking reads of a run on a model of a grid."""
    with EmulatedGPU() as gpu, torch.no_grad():
        model = transformer(num_classes=3, location=True, **changes).to("cuda")
        model = Guided(model, GuidanceConfig(scale=2.0)) if guided else model
        tokens = torch.randint(5, (B, grid.n)).to("cuda")
        condition = torch.arange(B, device="cuda")
        trace = run(model, tokens, condition, grid)
        assert trace.tokens.device == trace.order.device == trace.log_prob.device == CUDA
    return gpu.reads


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
def test_more_positions_are_no_more_waiting(name, rotary):
    """The loop and its policies never wait; models only to find one of several candidates in their cache."""
    few, many = (reads_of(RUNS[name], grid, rotary=rotary) for grid in (GRID, Grid(3, 4)))
    more = {line: count - few.get(line, 0) for line, count in many.items() if count > few.get(line, 0)}
    assert {line.split(":")[0] for line in more} <= {"attention.py"}
    one_candidate = name in ("fixed", "random", "location")
    assert sum(more.values()) <= (0 if one_candidate else Grid(3, 4).n - GRID.n)
    assert reads_of(RUNS[name], GRID, guided=True, rotary=rotary) == few, "guidance must not wait more"


@pytest.mark.parametrize("order", ["random", "location"])
def test_groups_never_wait(order):
    run = in_order(PolicyConfig(order, steps=2))
    few, many = (reads_of(run, grid, grouped=True) for grid in (GRID, Grid(3, 4)))
    assert sum(many.values()) <= sum(few.values())
