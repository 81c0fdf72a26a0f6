"""Downloaded weights of published models -> folders that `anyorder` loads."""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from anyorder.adapters import arpg, llamagen, maskgit_vq
from anyorder.artifacts import Artifact, fingerprint, sha256
from anyorder.contracts import AnyOrderNetwork, TokenizerNetwork
from anyorder.models.vq import WINDOW
from anyorder.policies import PolicyConfig
from anyorder.runs.checkpoint import KINDS, kind_of, load_state, read_tensors, save_model
from anyorder.runs.common import load_tokenizer
from anyorder.runs.pretrained import INDEX, Parts, save_parts

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


@dataclass
class ConvertConfig:
    """Turn a downloaded file (.pt, .bin, .safetensors) of a published model into a folder.

    A tokenizer becomes a tokenizer folder. An any-order model becomes a model folder, or with tokenizer=
    a pipeline folder for Pipeline.from_pretrained.
    """

    source: Path
    """The downloaded file."""
    tokenizer: Path | None = None
    """The tokenizer that the model was trained with: another downloaded file, or a converted folder."""
    kind: Kind = "auto"
    """What the file holds; auto looks at its tensors."""
    grid: tuple[int, int] = (16, 16)
    """Rows and columns of patches in training, which the file does not say; (24, 24) at 384 pixels."""
    heads: int = 0
    """Attention heads, which the file does not say either; 0: as published for its width."""
    joint_steps: bool = False
    """Positions of one step see one another as in the published samplers; see docs/adapters.md."""
    extrapolated: int | None = None
    """Rotary frequencies that are not stretched on other grids (RandAR: 2); see docs/adapters.md."""
    policy: PolicyConfig | None = None
    """The order that the pipeline draws in; random by default, raster for LlamaGen."""


def convert(config: ConvertConfig, out: Path) -> None:
    """Write the folder, unless it is up to date.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not a file of a known model, tensors that do not fit, or a tokenizer that does not.
    """
    identity = {**dataclasses.asdict(config), "sha256": _hashes(config)}
    if Artifact.is_current(out, "convert", identity, {}):
        log.info("%s is up to date", out)
        return
    model = build(config.source, config.kind, config.grid, config.heads, config.joint_steps)
    if config.extrapolated is not None:
        if not isinstance(model, AnyOrderNetwork):
            raise ValueError("extrapolated is a setting of any-order models: a tokenizer has no positions")
        model.config = dataclasses.replace(model.config, extrapolated=config.extrapolated)
    parts = _parts(model, config) if config.tokenizer is not None else None
    artifact = Artifact(out, "convert", identity, {})
    if parts is None:
        (out / INDEX).unlink(missing_ok=True)  # of an earlier conversion to a pipeline
        save_model(out, model, model.config, kind_of(model))
    else:
        save_parts(out, parts)
    parameters = sum(p.numel() for p in model.parameters())
    artifact.finish(kind=kind_of(model), parameters=parameters)
    log.info("%s: %s, %.1f million parameters", out, type(model).__name__, parameters / 1e6)


def _hashes(config: ConvertConfig) -> dict[str, str]:
    """What the files hold, so that a file that was replaced is converted again."""
    found = {}
    for role, path in (("source", config.source), ("tokenizer", config.tokenizer)):
        if path is not None:
            found[role] = fingerprint(path) if path.is_dir() else sha256(_existing(path))
    return found


def _parts(model: nn.Module, config: ConvertConfig) -> Parts:
    """The model with its tokenizer.

    Raises:
        ValueError: they do not belong together.
    """
    assert config.tokenizer is not None
    if not isinstance(model, AnyOrderNetwork):
        raise ValueError(f"{config.source} is a tokenizer itself: leave tokenizer= out")
    tokenizer = read_tokenizer(config.tokenizer)
    return combine(model, tokenizer, config.policy)


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
        return maskgit_vq.config_of(tensors)
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
