"""Fine-tuning a published model: other classes, another grid, low-rank updates."""

import dataclasses
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from anyorder import families
from anyorder.contracts import AnyOrderNetwork, Grid


def adapt(
    model: AnyOrderNetwork, grid: Grid, num_classes: int, known: Sequence[int | None] | None = None
) -> AnyOrderNetwork:
    """A published model for other classes and another grid; everything else is as it was.

    New classes begin as "no class" does, which every guided model has learnt.

    Args:
        model: one of the adapters; it is not changed.
        grid: of the tokens that it is to learn.
        num_classes: of these; without any there is one that all images belong to.
        known: the class of the model that each class is, None for a new one; by default as many classes as
            before are the same ones, and all others are new.
    """
    num_classes, before = max(1, num_classes), model.num_classes
    config = dataclasses.replace(model.config, grid=(grid.h, grid.w), num_classes=num_classes)
    tensors = model.state_dict()
    known = known or (range(before) if num_classes == before else [None] * num_classes)
    if list(known) != list(range(before)):
        declared = families.family(families.kind_of(model))
        table, first = tensors[declared.class_table], declared.first_class(model.config)
        rows = [first + (before if row is None else row) for row in known]
        tensors[declared.class_table] = torch.cat((table[:first], table[rows], table[first + before :]))
    adapted = type(model)(config).to(next(model.parameters()).device)
    adapted.load_state_dict(tensors)
    return adapted.train(model.training)


class LowRank(nn.Module):
    """W to W + up down, of rank r (LoRA, arXiv 2106.09685, Sec. 4.1); nothing changes at first."""

    def __init__(self, weight: Tensor, rank: int):
        """For a matrix (out, in)."""
        super().__init__()
        out, into = weight.shape
        self.down = nn.Parameter(torch.randn(rank, into, device=weight.device) * into**-0.5)
        self.up = nn.Parameter(torch.zeros(out, rank, device=weight.device))

    def forward(self, weight: Tensor) -> Tensor:
        """(out, in) to (out, in)."""
        return weight + self.up @ self.down


def add_low_rank(model: AnyOrderNetwork, rank: int) -> None:
    """Freeze a model but for its class table, its location head and updates of rank >= 1 of its matrices."""
    table, kind = families.family(families.kind_of(model)).class_table, type(model).__name__
    if not table:
        raise ValueError(f"lora={rank} is for transformers and converted models, got a {kind}: leave it out")
    model.requires_grad_(False)
    for name, module in list(model.named_modules()):
        if name.partition(".")[0] == "location":
            module.requires_grad_(True)
        # The last matrix is left alone: it is as large as the codebook.
        elif isinstance(module, nn.Linear) and name not in ("head", "output"):
            parametrize.register_parametrization(module, "weight", LowRank(module.weight, rank))
    model.get_parameter(table).requires_grad_(True)


def merge_low_rank(model: nn.Module) -> None:
    """Add the updates to the weights, in place; copies made with the updates are of no use afterwards."""
    for module in model.modules():
        if parametrize.is_parametrized(module, "weight"):
            parametrize.remove_parametrizations(module, "weight", leave_parametrized=True)
