"""Published models: downloaded files, and names on the Hugging Face hub -> parts of a pipeline."""

import argparse
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from anyorder import families
from anyorder.contracts import AnyOrderNetwork, TokenizerNetwork, require
from anyorder.inference import weights
from anyorder.inference.folders import Parts
from anyorder.method.guidance import GuidanceConfig
from anyorder.method.policy_config import PolicyConfig

WRAPPERS = ("model", "module", "state_dict")
"""Entries under which training programs store the weights."""


def combine(
    model: AnyOrderNetwork,
    tokenizer: TokenizerNetwork,
    policy: PolicyConfig | None = None,
    guidance: GuidanceConfig | None = None,
) -> Parts:
    """A pipeline of published parts, by default unguided; a ValueError refuses different codebooks."""
    text = f"the model has {model.vocab_size} tokens, the tokenizer {tokenizer.vocab_size}: published "
    text += "models with 16384 tokens take LlamaGen's VQ-16, those with 1024 MaskGIT's VQGAN"
    require(model.vocab_size == tokenizer.vocab_size, text)
    policy = policy or PolicyConfig(order=families.family(families.kind_of(model)).order)
    return Parts(model, tokenizer, policy=policy, guidance=guidance or GuidanceConfig())


def recommended(kind: str, name: str) -> GuidanceConfig:
    """The guidance of a published file, by its name; of other names, of the first one of its kind."""
    files = families.family(kind).files if kind in families.REGISTRY else ()
    file = next((file for file in files if file.name == name), files[0] if files else None)
    return GuidanceConfig(*file.guidance) if file else GuidanceConfig()  # type: ignore[arg-type]


def read_tokenizer(path: Path) -> TokenizerNetwork:
    """A tokenizer from a downloaded file or a folder; a ValueError refuses other models."""
    model = weights.load_tokenizer(path) if path.is_dir() else build(path)
    require(isinstance(model, TokenizerNetwork), f"{path} holds a {type(model).__name__}, no tokenizer")
    return model


def build(
    path: Path,
    kind: str = "auto",
    grid: tuple[int, int] = (16, 16),
    heads: int = 0,
    joint_steps: bool = False,
) -> Any:
    """The model of a downloaded .pt, .pth, .bin or .safetensors, on the CPU and in evaluation mode.

    Settings as of the command `anyorder convert`.

    Raises:
        FileNotFoundError: no such file.
        ValueError: unreadable, no known model, or tensors that do not fit; the first ones are named.
    """
    tensors = read_weights(path)
    found = families.family(_recognise(tensors, path) if kind == "auto" else kind)
    try:
        if found.read_config is None:
            raise ValueError(f"kind '{kind}' has no published files")
        require(found.marker in tensors, f"missing {found.marker}")
        config = found.read_config(tensors, grid, heads)
    except ValueError as e:
        raise ValueError(f"{path} does not fit {found.model_class.__name__}: {e}") from e
    if joint_steps:
        config.joint_steps = True
    return weights.build_model(found, config, tensors, path)


def _recognise(tensors: Mapping[str, Tensor], source: str | Path) -> str:
    """The kind of model that the tensors belong to."""
    known = families.published()
    for kind, declared in known.items():
        if declared.marker in tensors:
            return kind
    raise ValueError(
        f"{source} holds no known model: its first tensors are {', '.join(list(tensors)[:5]) or 'none'}; "
        f"known are {', '.join(f'{kind} (by {declared.marker})' for kind, declared in known.items())}; "
        "if it is one of these, say which: kind=..."
    )


def read_weights(path: Path) -> dict[str, Tensor]:
    """The tensors of a downloaded file by name; pickles are read as weights only and can run no code.

    Raises:
        FileNotFoundError: no such file.
        ValueError: damaged, or holding something else than tensors.
    """
    is_safe = require_file(path).suffix == ".safetensors"
    stored: Any = weights.read_tensors(path) if is_safe else _unpickle(path)
    for wrapper in WRAPPERS:
        if isinstance(stored, Mapping) and isinstance(stored.get(wrapper), Mapping):
            stored = stored[wrapper]
    text = f"{path} holds no weights: expected tensors by name, alone or under {', '.join(WRAPPERS)}"
    require(isinstance(stored, Mapping) and all(isinstance(t, Tensor) for t in stored.values()), text)
    # Without the prefixes of `DistributedDataParallel` and `torch.compile`, in any nesting.
    return {re.sub(r"^((module|_orig_mod)\.)+", "", name): tensor for name, tensor in stored.items()}


def require_file(path: Path) -> Path:
    """The path; a FileNotFoundError if there is no file."""
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}: download it first")
    return path


def _unpickle(path: Path) -> Any:
    try:
        # Training programs store their arguments beside the weights; a Namespace is as harmless as a dict.
        with torch.serialization.safe_globals([argparse.Namespace]):
            return torch.load(path, map_location="cpu", weights_only=True)
    except OSError:
        raise
    except Exception as e:  # a damaged pickle may fail in any way
        # PyTorch goes on to advise loading without this safety, which no file of something else needs.
        reason, *_ = str(e).strip().partition("In PyTorch 2.6")[0].splitlines() or [""]
        text = f"{path} cannot be read as weights: {reason}"
        raise ValueError(weights.failed_download(path) or text) from e


# --- by name on the Hugging Face hub ------------------------------------------------------------------------


def published_models() -> list[families.File]:
    """The published files of any-order models."""
    return [file for family in families.published().values() for file in family.files if file.tokenizer]


def find_published(hub_id: str) -> families.File | None:
    """The published file that an id names: REPO/FILE, or REPO for the first one of it.

    Raises:
        ValueError: a known repository without this file.
    """
    for file in published_models():
        if hub_id in (file.repo, f"{file.repo}/{file.name}"):
            return file
    siblings = [file for file in published_models() if hub_id.startswith(f"{file.repo}/")]
    listed = ", ".join(f"{file.repo}/{file.name}" for file in siblings)
    require(not siblings, f"unknown model '{hub_id}': choose one of {listed}")
    return None


def load_published(file: families.File) -> Parts:
    """Download a model and its tokenizer, unless they are in the hub's cache, and put them together."""
    from huggingface_hub import hf_hub_download

    assert file.tokenizer is not None
    model = build(Path(hf_hub_download(file.repo, file.name)), grid=file.grid)
    tokenizer = read_tokenizer(Path(hf_hub_download(file.tokenizer.repo, file.tokenizer.name)))
    return combine(model, tokenizer, guidance=recommended(families.kind_of(model), file.name))
