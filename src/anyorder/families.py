"""Families of models, and the parts that users bring.

A module that holds a model which can be saved declares it as `FAMILY`, from which loading, conversion and the
hub read all they need; loading one model imports no others. Own parts are found by `resolve`.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import inspect
import os
import re
from collections.abc import Callable, Iterator, Mapping
from contextvars import ContextVar
from dataclasses import dataclass
from importlib.metadata import entry_points
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, get_type_hints

if TYPE_CHECKING:
    from torch import Tensor, nn

REGISTRY = {
    "vq": "anyorder.tokenizers.vq",
    "maskgit_vq": "anyorder.tokenizers.maskgit_vq",
    "autoencoder": "anyorder.tokenizers.autoencoder",
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
    guidance: tuple[float, str] = (1.0, "constant")
    """Scale and schedule that its authors recommend; docs/how-to/published-weights.md says where."""


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


def resolve(group: str, name: str) -> Any:
    """An own part: `package.module:Name`, or a name that an installed package registers.

    Such names are entry points of the group "anyorder.GROUP"; groups are policies (scores, too), networks,
    features and data. Nothing but modules that Python can import is ever run.

    Raises:
        ValueError: neither can be found, the import fails, or `loading` refuses it.
    """
    _check_origin(name)
    try:
        if ":" in name:
            module, _, path = name.partition(":")
            return functools.reduce(getattr, path.split("."), importlib.import_module(module))
        for entry in entry_points(group=f"anyorder.{group}", name=name):
            return entry.load()
    except (ImportError, AttributeError, ValueError) as e:
        mend = "install its package, or put its folder on PYTHONPATH"
        raise ValueError(f"cannot import '{name}' ({e}): {mend}") from e
    text = f"write package.module:Name, or install the package that registers it as anyorder.{group}"
    raise ValueError(f"unknown name '{name}': {text}")


def is_own(group: str, name: str) -> bool:
    """Whether a name is that of an own part, see `resolve`, and no file or folder; imports nothing."""
    module = re.fullmatch(r"[\w.]+:[\w.]+", name) and not os.path.exists(name)
    return bool(module or entry_points(group=f"anyorder.{group}", name=name))


@contextlib.contextmanager
def loading(folder: Path, refused: str = "") -> Iterator[None]:
    """While a folder is loaded, no own part is imported from the folder itself; with `refused`, none at all.

    The outermost one counts. A ValueError of `resolve` says so, or gives `refused` as the reason.
    """
    token = _LOADING.set(_LOADING.get() or (folder, refused))
    try:
        yield
    finally:
        _LOADING.reset(token)


_LOADING: ContextVar[tuple[Path, str] | None] = ContextVar("_LOADING", default=None)


def _check_origin(name: str) -> None:
    folder, refused = _LOADING.get() or (None, "")
    if refused:
        raise ValueError(f"{refused}: {name}")
    top = name.partition(":")[0].partition(".")[0]
    inside = folder.rglob("*") if folder else ()
    same = [path for path in inside if path.name.partition(".")[0] == top]
    if any(path.is_file() or any(path.rglob("*.[ps][yo]*")) for path in same):
        raise ValueError(f"{folder} brings '{top}' itself: code of a model folder is not run, install it")


def parameters(part: Any) -> list[str]:
    """Names of the parameters of a function or class."""
    return list(inspect.signature(part).parameters)


def family(kind: str) -> Family:
    """The family of a kind of model; a ValueError if it is unknown.

    Of an own network, the class `Network(config)`; the annotation says which dataclass the config is.
    """
    if kind in REGISTRY:
        return importlib.import_module(REGISTRY[kind]).FAMILY
    if not is_own("networks", kind):
        allowed = f"{', '.join(REGISTRY)}, or package.module:Class"
        raise ValueError(f"unknown kind of model {kind!r}, allowed: {allowed}")
    network = resolve("networks", kind)
    hints = get_type_hints(network.__init__) if isinstance(network, type) else {}  # type: ignore[misc]
    if not hasattr(network, "load_state_dict") or not hasattr(hints.get("config"), "__dataclass_fields__"):
        raise ValueError(f"{kind} must be a class made by Class(config), config annotated as a dataclass")
    return Family(network, hints["config"])


def published() -> dict[str, Family]:
    """Kind -> family, of all kinds that are converted from downloaded files."""
    families = {kind: family(kind) for kind in REGISTRY}
    return {kind: each for kind, each in families.items() if each.marker}


def kind_of(model: nn.Module) -> str:
    """The kind that a model is saved as: one of `REGISTRY`, or the import path of an own class.

    Raises:
        ValueError: an own class that cannot be found again by this path.
    """
    for kind, module in REGISTRY.items():
        if type(model).__module__ == module and family(kind).model_class is type(model):
            return kind
    path = f"{type(model).__module__}:{type(model).__qualname__}"
    if "<locals>" in path or resolve("networks", path) is not type(model):
        raise ValueError(f"{path} cannot be saved: define the class at the top of a module, to import it")
    family(path)
    return path


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
