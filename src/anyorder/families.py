"""Families of models: one declaration each, from which loading, conversion and the hub read all they need.

A module that holds a model which can be saved declares it as `FAMILY`; loading one model imports no others.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from torch import Tensor, nn

REGISTRY = {
    "vq": "anyorder.tokenizers.vq",
    "maskgit_vq": "anyorder.tokenizers.maskgit_vq",
    "transformer": "anyorder.models.transformer",
    "randar": "anyorder.adapters.randar",
    "llamagen": "anyorder.adapters.llamagen",
    "arpg": "anyorder.adapters.arpg",
    "classifier": "anyorder.evaluation.features",
}
"""Kind, as `config.json` names it -> module that declares its `FAMILY`. Files are recognised in this order:
RandAR, which extends LlamaGen, comes first."""


class File(NamedTuple):
    """A file of weights on the Hugging Face hub."""

    repo: str
    name: str
    tokenizer: File | None = None
    """Of the tokenizer that an any-order model was trained with."""
    grid: tuple[int, int] = (16, 16)
    """Rows and columns of patches in training."""


@dataclass(frozen=True)
class Family:
    """How models of one kind are built, recognised and adapted."""

    model_class: type[nn.Module]
    config_class: type
    marker: str = ""
    """A tensor that every downloaded file of this kind has; "" for kinds that nobody publishes."""
    read_config: Callable[[dict[str, Tensor], tuple[int, int], int], Any] | None = None
    """The configuration of a downloaded file from its tensors, the grid, and the number of heads (0: as
    published); may add tensors that the file lacks. Raises ValueError."""
    files: tuple[File, ...] = ()
    """Published models, the default one of each repository first."""
    order: str = "random"
    """The order that images are generated in unless another one is asked for."""
    class_table: str = ""
    """The tensor that holds a row for each class, then one for no class."""
    first_class: Callable[[Any], int] = lambda config: 0
    """The row of class 0 in it, from the configuration."""


def family(kind: str) -> Family:
    """The family of a kind of model; a ValueError if it is unknown."""
    if kind not in REGISTRY:
        raise ValueError(f"unknown kind of model {kind!r}, allowed: {', '.join(REGISTRY)}")
    return importlib.import_module(REGISTRY[kind]).FAMILY


def published() -> dict[str, Family]:
    """Kind -> family, of all kinds that are converted from downloaded files."""
    families = {kind: family(kind) for kind in REGISTRY}
    return {kind: each for kind, each in families.items() if each.marker}


def kind_of(model: nn.Module) -> str:
    """The kind that a model is saved as; a ValueError if it is of no known family."""
    for kind, module in REGISTRY.items():
        if type(model).__module__ == module and family(kind).model_class is type(model):
            return kind
    raise ValueError(f"{type(model).__name__} cannot be saved: allowed are {', '.join(REGISTRY)}")


def shape_of(tensors: Mapping[str, Tensor], name: str, rank: int = 2) -> tuple[int, ...]:
    """The shape of a tensor; a ValueError if it is missing, or has another number of dimensions."""
    if name not in tensors:
        raise ValueError(f"missing {name}")
    if tensors[name].ndim != rank:
        raise ValueError(f"{name} is {tuple(tensors[name].shape)}, expected {rank} dimensions")
    return tuple(tensors[name].shape)


def count_blocks(tensors: Mapping[str, Tensor], prefix: str) -> int:
    """How many blocks `prefix`0, `prefix`1, ... there are: the largest number plus one."""
    numbers = [name[len(prefix) :].partition(".")[0] for name in tensors if name.startswith(prefix)]
    return max((int(number) + 1 for number in numbers if number.isdecimal()), default=0)
