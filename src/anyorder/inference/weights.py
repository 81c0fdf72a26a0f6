"""Weights on disk: safetensors + JSON, never pickle, never half a file."""

import dataclasses
import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from anyorder.contracts import AnyOrderNetwork, TokenizerNetwork, require
from anyorder.families import Family, family, loading
from anyorder.files import atomic, read_json, write_json
from anyorder.inference.device import device
from anyorder.settings import parse

WEIGHTS, CONFIG = "model.safetensors", "config.json"

log = logging.getLogger("anyorder")


def load_any_order(folder: Path, role: str = "model") -> AnyOrderNetwork:
    """The any-order model of an artifact or pipeline on the device; a ValueError refuses other models.

    In the role "scorer" it is a pipeline's scoring model, if it has one.
    """
    model: Any = load_model(_part(folder, role, "model")).to(device())
    text = f"{folder} holds a {type(model).__name__}, expected an any-order model"
    require(isinstance(model, AnyOrderNetwork), text)
    return model


def load_tokenizer(folder: Path) -> TokenizerNetwork:
    """The tokenizer of an artifact or pipeline on the device; a ValueError refuses other models."""
    model: Any = load_model(_part(folder, "tokenizer")).to(device())
    text = f"{folder} holds a {type(model).__name__}, expected a tokenizer"
    require(isinstance(model, TokenizerNetwork), text)
    return model


def _part(folder: Path, *roles: str) -> Path:
    """The folder of the first of these parts that a pipeline has, or the folder itself."""
    return next((folder / role for role in roles if (folder / role / CONFIG).is_file()), folder)


def save_model(folder: str | Path, model: nn.Module, config: Any, kind: str) -> None:
    """Write `model.safetensors` and `config.json` (kind and configuration) into `folder`.

    Takes the dataclass instance that the model was built from, and a kind of `families.REGISTRY`. After an
    OSError (disk full) older files are as they were.
    """
    family(kind)
    write_tensors(Path(folder) / WEIGHTS, model.state_dict())
    write_json(Path(folder) / CONFIG, {"kind": kind, "config": dataclasses.asdict(config)})


def new_model(kind: str, values: Mapping[str, Any]) -> nn.Module:
    """A model of this kind with fresh weights; errors as of `settings.parse`."""
    declared = family(kind)
    return declared.model_class(parse(declared.config_class, values))


def load_model(folder: str | Path, kind: str | None = None) -> nn.Module:
    """Build the model that `save_model` wrote, on the CPU and in evaluation mode.

    Raises:
        FileNotFoundError: there is no model in `folder`.
        ValueError: damaged, of another kind than `kind`, or tensors that do not fit the configuration.
    """
    folder = Path(folder)
    for path in (folder / CONFIG, folder / WEIGHTS):
        if not path.is_file():
            mend = "train one first; if one is damaged, delete its folder and make it again"
            raise FileNotFoundError(f"{folder} holds no model ({path.name} is missing): {mend}")
    with loading(folder):
        found, declared, config = _read_config(folder / CONFIG)
        require(kind in (None, found), f"{folder} holds a model of kind '{found}', expected '{kind}'")
        return build_model(declared, config, read_tensors(folder / WEIGHTS), folder / WEIGHTS)


def _read_config(path: Path) -> tuple[str, Family, Any]:
    """Kind, family and configuration of a saved model."""
    stored: Any = read_json(path)
    known = isinstance(stored, dict) and isinstance(stored.get("kind"), str)
    require(known, f"{path} is not the configuration of a model: it must hold a kind and a config")
    try:
        declared = family(stored["kind"])
    except ValueError as e:
        raise ValueError(f"{path}: {e}") from e
    name = declared.config_class.__name__
    text = f"{path} must hold the settings of {name} under 'config'"
    require(isinstance(stored.get("config"), dict), text)
    try:
        return stored["kind"], declared, parse(declared.config_class, stored["config"])
    except (ValueError, TypeError) as e:
        raise ValueError(f"{path} does not fit this version's {name}: {e}") from e


def build_model(declared: Family, config: Any, tensors: Mapping[str, Tensor], source: Path) -> nn.Module:
    """A model with the given weights, on the CPU and in evaluation mode.

    Names and shapes are compared before memory is taken: a wrong configuration may need any amount.

    Raises:
        ValueError: tensors that do not fit, or that hold NaN or infinity; names `source`.
    """
    # Own networks may mean anything by depth, and may read numbers as they are built, which "meta" lacks.
    blocks = getattr(config, "depth", 0) if type(config).__module__.startswith("anyorder.") else 0
    text = f"{source} does not fit depth={blocks}: it has only {len(tensors)} tensors"
    require(blocks <= len(tensors), text)
    limit = _Limit(2 * sum(tensor.numel() for tensor in tensors.values()) + 2**22)
    try:
        with default_dtype(torch.float32), limit:  # weights are kept in it, whatever the caller's default is
            model = declared.model_class(config)
    except RuntimeError as e:  # "meta" takes no memory, but a second to import PyTorch's compiler
        with torch.device("meta"), suppress(RuntimeError):
            _require_fit(declared.model_class(config), tensors, source)
        raise ValueError(f"{source} does not fit its configuration: {e}") from e
    load_state(model, tensors, source)
    for name, tensor in tensors.items():
        finite = not tensor.is_floating_point() or bool(tensor.isfinite().all())
        require(finite, f"{source} is of no use: {name} holds NaN or infinity; train again")
    return model.eval()


class _Limit(TorchFunctionMode):
    """A RuntimeError once `torch.empty`, which all weights come from, has made more than `left` numbers."""

    def __init__(self, left: int):
        super().__init__()
        self.left = left

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        if func is torch.empty:
            self.left -= made.numel()
            if self.left < 0:
                raise RuntimeError("the configuration needs far more weights than there are")
        return made


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """PyTorch's default dtype within the block; the caller's own afterwards."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def load_state(module: nn.Module, tensors: Mapping[str, Tensor], source: str | Path) -> None:
    """Copy `tensors` into `module`; a ValueError names those that are missing, unexpected or misshapen."""
    _require_fit(module, tensors, source)
    module.load_state_dict(tensors)


def _require_fit(module: nn.Module, tensors: Mapping[str, Tensor], source: str | Path) -> None:
    expected = {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}
    found = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    problems = [f"missing {name}" for name in expected if name not in found]
    problems += [f"unexpected {name}" for name in found if name not in expected]
    both = [name for name in expected if found.get(name, expected[name]) != expected[name]]
    problems += [f"{name} is {found[name]}, expected {expected[name]}" for name in both]
    more = f" and {len(problems) - 5} more" if len(problems) > 5 else ""
    text = f"{source} does not fit {type(module).__name__}: {'; '.join(problems[:5])}{more}"
    require(not problems, text)


def write_tensors(path: str | Path, tensors: Mapping[str, Tensor]) -> None:
    """Write tensors as safetensors; after an OSError (disk full), an older file is left as it was."""
    # A copy of each: safetensors refuses tensors that share memory, such as tied embeddings.
    copies = {name: t.detach().to("cpu", copy=True).contiguous() for name, t in tensors.items()}
    with atomic(path) as temporary:
        try:
            safetensors.torch.save_file(copies, temporary)
        except SafetensorError as e:
            raise OSError(f"cannot write {path}: {e}") from e


def read_tensors(path: str | Path) -> dict[str, Tensor]:
    """Read safetensors; a ValueError names a file that is damaged or holds no weights."""
    try:
        # A copy of each: the loader maps the file, which may be pruned or truncated later.
        return {name: tensor.clone() for name, tensor in safetensors.torch.load_file(path).items()}
    except SafetensorError as e:
        reason = failed_download(path) or f"{path} is damaged ({e}): restore it or train again"
        raise ValueError(reason) from e


def failed_download(path: str | Path) -> str:
    """A message if the file is a usual mistake in the place of weights; "" otherwise."""
    with Path(path).open("rb") as file:
        begin = file.read(256).lstrip().lower()
    if begin.startswith(b"version https://git-lfs"):
        return f"{path} cannot be read as weights: it is a Git LFS pointer, run 'git lfs pull' in its folder"
    if begin.startswith((b"<!doctype", b"<html")):
        return f"{path} cannot be read as weights: it is a web page, download the file itself"
    return ""
