"""Downloaded weights of published models -> folders that `anyorder` loads."""

from __future__ import annotations

import argparse
import importlib
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from anyorder.adapters import arpg, llamagen, maskgit
from anyorder.contracts import AnyOrderNetwork, TokenizerNetwork
from anyorder.inference.folders import Parts
from anyorder.inference.weights import KINDS, load_state, load_tokenizer, read_tensors
from anyorder.method.policy_config import PolicyConfig
from anyorder.tokenizers.vq import WINDOW

Kind = Literal["auto", "vq", "maskgit_vq", "randar", "llamagen", "arpg"]

MARKS = {
    "vq": "encoder.conv_blocks.0.res.0.conv1.weight",
    "maskgit_vq": "encoder.down.0.block.0.conv1.weight",
    "randar": "pos_instruct_embeddings",
    "llamagen": "layers.0.attention.wqkv.weight",
    "arpg": "layers.cross_dec.0.attn.to_q.weight",
}
"""Kind of model -> a tensor by which its files are known; the first that fits (RandAR extends LlamaGen)."""

WRAPPERS = ("model", "module", "state_dict")
"""Entries under which training programs store the weights."""

log = logging.getLogger("anyorder")


def combine(model: AnyOrderNetwork, tokenizer: TokenizerNetwork, policy: PolicyConfig | None = None) -> Parts:
    """What a pipeline of published parts is made of.

    Raises:
        ValueError: they have different codebooks.
    """
    if model.vocab_size != tokenizer.vocab_size:
        raise ValueError(
            f"the model has {model.vocab_size} tokens, the tokenizer {tokenizer.vocab_size}: published "
            "models with 16384 tokens take LlamaGen's VQ-16, those with 1024 MaskGIT's VQGAN"
        )
    if policy is None:
        policy = PolicyConfig(order="raster" if isinstance(model, llamagen.LlamaGen) else "random")
    return Parts(model, tokenizer, [], policy)


def read_tokenizer(path: Path) -> TokenizerNetwork:
    """A tokenizer from a downloaded file or a folder.

    Raises:
        FileNotFoundError: neither.
        ValueError: something else than a tokenizer.
    """
    model = load_tokenizer(path) if path.is_dir() else build(path)
    if not isinstance(model, TokenizerNetwork):
        raise ValueError(f"{path} holds a {type(model).__name__}, no tokenizer")
    return model


# --- from files to models ---------------------------------------------------------------------------------


def build(
    path: Path,
    kind: Kind = "auto",
    grid: tuple[int, int] = (16, 16),
    heads: int = 0,
    joint_steps: bool = False,
) -> Any:
    """The model of a downloaded file, on the CPU and in evaluation mode.

    Raises:
        FileNotFoundError: no such file.
        ValueError: unreadable, no known model, or tensors that do not fit; the first ones are named.
    """
    tensors = read_weights(path)
    found = recognise(tensors, path) if kind == "auto" else kind
    try:
        config = _configure(found, tensors, grid, heads)
    except ValueError as e:
        raise ValueError(f"{path} does not fit {KINDS[found][1]}: {e}") from e
    if joint_steps:
        config.joint_steps = True
    module, model_class, _ = KINDS[found]
    model = getattr(importlib.import_module(module), model_class)(config)
    load_state(model, tensors, path)
    return model.eval()


def _configure(kind: str, tensors: dict[str, Tensor], grid: tuple[int, int], heads: int) -> Any:
    if MARKS[kind] not in tensors:
        raise ValueError(f"missing {MARKS[kind]}")
    if kind == "vq":
        # Files may or may not hold the tokens that were used last in training.
        tensors.setdefault("quantize.codebook_used", torch.full((WINDOW,), -1.0))
        return llamagen.vq_config(tensors)
    if kind == "maskgit_vq":
        return maskgit.config_of(tensors)
    return (arpg.config_of if kind == "arpg" else llamagen.gpt_config)(tensors, grid, heads)


def recognise(tensors: Mapping[str, Tensor], source: str | Path) -> str:
    """The kind of model that the tensors belong to.

    Raises:
        ValueError: none that is known.
    """
    for kind, mark in MARKS.items():
        if mark in tensors:
            return kind
    raise ValueError(
        f"{source} holds no known model: its first tensors are {', '.join(list(tensors)[:5]) or 'none'}; "
        f"known are {', '.join(f'{kind} (by {mark})' for kind, mark in MARKS.items())}; "
        "if it is one of these, say which: kind=..."
    )


def read_weights(path: Path) -> dict[str, Tensor]:
    """The tensors of a downloaded file by name; pickles are read as weights only and can run no code.

    Raises:
        FileNotFoundError: no such file.
        ValueError: damaged, or holding something else than tensors.
    """
    stored: Any = read_tensors(path) if _existing(path).suffix == ".safetensors" else _unpickle(path)
    for wrapper in WRAPPERS:
        if isinstance(stored, Mapping) and isinstance(stored.get(wrapper), Mapping):
            stored = stored[wrapper]
    if not isinstance(stored, Mapping) or not all(isinstance(t, Tensor) for t in stored.values()):
        raise ValueError(
            f"{path} holds no weights: expected tensors by name, alone or under {', '.join(WRAPPERS)}"
        )
    return {name.removeprefix("_orig_mod.").removeprefix("module."): t for name, t in stored.items()}


def _existing(path: Path) -> Path:
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
        reason = str(e).strip().partition("\n")[0]
        raise ValueError(f"{path} cannot be read as weights: {reason}") from e
