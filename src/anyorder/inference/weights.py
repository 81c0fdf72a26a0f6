"""Weights on disk: safetensors + JSON, never pickle, never half a file."""

from __future__ import annotations

import dataclasses
import importlib
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
from safetensors import SafetensorError
from torch import Tensor, nn

from anyorder.contracts import AnyOrderNetwork, TokenizerNetwork
from anyorder.files import atomic, read_json, write_json
from anyorder.inference.device import device
from anyorder.settings import parse


def load_any_order(folder: Path) -> AnyOrderNetwork:
    """The any-order model of an artifact or pipeline, our own or a published one, on the device.

    Raises:
        ValueError: another kind of model.
    """
    model = load_model(_part(folder, "model")).to(device())
    if not isinstance(model, AnyOrderNetwork):
        raise ValueError(f"{folder} holds a {type(model).__name__}, expected an any-order model")
    return model


def load_tokenizer(folder: Path) -> TokenizerNetwork:
    """The tokenizer of an artifact or pipeline, on the device, in evaluation mode.

    Raises:
        ValueError: another kind of model.
    """
    model = load_model(_part(folder, "tokenizer")).to(device())
    if not isinstance(model, TokenizerNetwork):
        raise ValueError(f"{folder} holds a {type(model).__name__}, expected a tokenizer")
    return model


def _part(folder: Path, role: str) -> Path:
    """The folder of a part of a pipeline, or the folder itself."""
    return folder / role if (folder / role / CONFIG).is_file() else folder


WEIGHTS, CONFIG = "model.safetensors", "config.json"

KINDS = {
    "vq": ("anyorder.tokenizers.vq", "VQModel", "VQConfig"),
    "transformer": ("anyorder.models.transformer", "AnyOrderTransformer", "TransformerConfig"),
    "maskgit_vq": ("anyorder.tokenizers.maskgit_vq", "MaskGITVQ", "MaskGITVQConfig"),
    "llamagen": ("anyorder.adapters.llamagen", "LlamaGen", "GPTConfig"),
    "randar": ("anyorder.adapters.randar", "RandAR", "GPTConfig"),
    "arpg": ("anyorder.adapters.arpg", "ARPG", "GPTConfig"),
    "classifier": ("anyorder.evaluation.features", "Classifier", "ClassifierConfig"),
}
"""Kind of a saved model -> module, model class, configuration class; imported when one is loaded."""

log = logging.getLogger("anyorder")


def kind_of(model: nn.Module) -> str:
    """The kind that a model is saved as.

    Raises:
        ValueError: it is none of `KINDS`.
    """
    name = (type(model).__module__, type(model).__name__)
    for kind, (module, model_class, _) in KINDS.items():
        if name == (module, model_class):
            return kind
    raise ValueError(f"{name[1]} cannot be saved: allowed are {', '.join(KINDS)}")


def save_model(folder: str | Path, model: nn.Module, config: Any, kind: str) -> None:
    """Write `model.safetensors` and `config.json` (kind and configuration) into `folder`.

    Args:
        folder: made if need be.
        model: its `state_dict` is written; tensors may live on any device.
        config: the dataclass instance that `model` was built from.
        kind: one of `KINDS`.

    Raises:
        ValueError: unknown kind.
        OSError: the disk is full; older files are left as they were.
    """
    _require_kind(kind, "kind")
    write_tensors(Path(folder) / WEIGHTS, model.state_dict())
    write_json(Path(folder) / CONFIG, {"kind": kind, "config": dataclasses.asdict(config)})


def load_model(folder: str | Path, kind: str | None = None) -> nn.Module:
    """Build the model that `save_model` wrote, on the CPU and in evaluation mode.

    Args:
        folder: where `save_model` wrote.
        kind: refuse any other kind of model.

    Raises:
        FileNotFoundError: there is no model in `folder`.
        ValueError: damaged file, another kind, unknown setting, or tensors that do not fit the model.
    """
    folder = Path(folder)
    for path in (folder / CONFIG, folder / WEIGHTS):
        if not path.is_file():
            raise FileNotFoundError(f"{folder} holds no model ({path.name} is missing): train one first")
    stored = read_json(folder / CONFIG)
    found = _require_kind(stored.get("kind"), folder / CONFIG)
    if kind not in (None, found):
        raise ValueError(f"{folder} holds a model of kind '{found}', expected '{kind}'")
    module, model_class, config_class = KINDS[found]
    package = importlib.import_module(module)
    try:
        config = parse(getattr(package, config_class), stored["config"])
    except ValueError as e:
        raise ValueError(f"{folder / CONFIG} does not fit this version's {config_class}: {e}") from e
    model = getattr(package, model_class)(config)
    load_state(model, read_tensors(folder / WEIGHTS), folder / WEIGHTS)
    return model.eval()


def _require_kind(kind: Any, source: str | Path) -> str:
    if kind not in KINDS:
        raise ValueError(f"{source}: unknown kind of model {kind!r}, allowed: {', '.join(KINDS)}")
    return kind


def load_state(module: nn.Module, tensors: Mapping[str, Tensor], source: str | Path) -> None:
    """Copy `tensors` into `module`, every name and shape of it and nothing else.

    Raises:
        ValueError: names the first tensors that are missing, unexpected or of another shape, and `source`.
    """
    wanted = module.state_dict()
    problems = [f"missing {name}" for name in wanted if name not in tensors]
    problems += [f"unexpected {name}" for name in tensors if name not in wanted]
    problems += [
        f"{name} is {tuple(tensors[name].shape)}, expected {tuple(tensor.shape)}"
        for name, tensor in wanted.items()
        if name in tensors and tensors[name].shape != tensor.shape
    ]
    if problems:
        more = f" and {len(problems) - 5} more" if len(problems) > 5 else ""
        raise ValueError(f"{source} does not fit {type(module).__name__}: {'; '.join(problems[:5])}{more}")
    module.load_state_dict(tensors)


def write_tensors(path: str | Path, tensors: Mapping[str, Tensor]) -> None:
    """Write tensors atomically as safetensors.

    Raises:
        OSError: the disk is full or cannot be written; an older file is left as it was.
    """
    # A copy of each: safetensors refuses tensors that share memory, such as tied embeddings.
    copies = {name: t.detach().to("cpu", copy=True).contiguous() for name, t in tensors.items()}
    with atomic(path) as temporary:
        try:
            safetensors.torch.save_file(copies, temporary)
        except SafetensorError as e:
            raise OSError(f"cannot write {path}: {e}") from e


def read_tensors(path: str | Path) -> dict[str, Tensor]:
    """Read safetensors into memory of their own.

    Raises:
        FileNotFoundError: no such file.
        ValueError: damaged; the message names the file.
    """
    try:
        # A copy of each: the loader maps the file, and pruning or truncating it must not reach us.
        return {name: tensor.clone() for name, tensor in safetensors.torch.load_file(path).items()}
    except SafetensorError as e:
        raise ValueError(f"{path} is damaged ({e}): restore it or train again") from e
