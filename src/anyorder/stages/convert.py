"""The command `anyorder convert`: a downloaded file of weights becomes a folder."""

import dataclasses
import inspect
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from anyorder import families
from anyorder.contracts import AnyOrderNetwork, TokenizerNetwork, require
from anyorder.evaluation.features import _digest
from anyorder.files import fingerprint, sha256
from anyorder.inference.convert import build, combine, read_tokenizer, recommended, require_file
from anyorder.inference.folders import save_parts
from anyorder.inference.weights import log, save_model
from anyorder.method.guidance import GuidanceConfig
from anyorder.method.policy_config import PolicyConfig
from anyorder.stages.artifacts import Artifact


@dataclass
class ConvertConfig:
    """Turn a downloaded file (.pt, .bin, .safetensors) of a published model into a folder.

    A tokenizer becomes a tokenizer folder. An any-order model becomes a model folder, or with tokenizer=
    a pipeline folder for Pipeline.from_pretrained.
    """

    source: Path
    """The downloaded file; or package.module:function of your own, which returns a network to store."""
    tokenizer: Path | None = None
    """The tokenizer that the model was trained with: another downloaded file, or a converted folder."""
    kind: str = "auto"
    """What the file holds: vq, maskgit_vq, randar, llamagen or arpg; auto looks at its tensors."""
    grid: tuple[int, int] = (16, 16)
    """Rows and columns of patches in training, which the file does not say; (24, 24) at 384 pixels."""
    heads: int = 0
    """Number of attention heads, which the file does not say either; 0: as published for its width."""
    joint_steps: bool = False
    """Positions of one step see one another, as in the published samplers (published-weights.md)."""
    extrapolated: int | None = None
    """Number of rotary frequencies that are not stretched on other grids (RandAR: 2); null stretches none."""
    policy: PolicyConfig | None = None
    """The order that the pipeline generates in; random by default, raster for LlamaGen."""
    guidance: GuidanceConfig | None = None
    """The guidance that the pipeline generates with; by default what the authors of the file recommend."""


def convert(config: ConvertConfig, out: Path, *, overwrite: bool = False) -> bool:
    """Write the folder, unless it is up to date: False then; `overwrite` replaces another conversion.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not a file of a known model, parts that do not fit, or another conversion is there.
    """
    own = families.is_own("networks", str(config.source))
    model = _made(str(config.source)) if own else None
    identity = {**dataclasses.asdict(config), "sha256": _hashes(config, model)}
    if Artifact.is_current(out, "convert", identity, {}):
        return False
    model = model or build(config.source, config.kind, config.grid, config.heads, config.joint_steps)
    any_order = isinstance(model, AnyOrderNetwork)
    _require_effect(config, model)
    if config.extrapolated is not None:
        model.config = dataclasses.replace(model.config, extrapolated=config.extrapolated)
    parts = None
    if config.tokenizer is not None:
        require(any_order, f"{config.source} is a tokenizer itself: leave tokenizer= out")
        guidance = config.guidance or recommended(families.kind_of(model), config.source.name)
        parts = combine(model, read_tokenizer(config.tokenizer), config.policy, guidance)
    artifact = Artifact(out, "convert", identity, {}, overwrite=overwrite)
    if parts is None:
        save_model(out, model, model.config, families.kind_of(model))
    else:
        save_parts(out, parts)
    parameters = sum(p.numel() for p in model.parameters())
    artifact.finish(kind=families.kind_of(model), parameters=parameters)
    log.info("%s: %s, %.1f million parameters", out, type(model).__name__, parameters / 1e6)
    return True


def _made(name: str) -> Any:
    """The network that an own function returns; a ValueError for what is no such function."""
    function = families.resolve("networks", name)
    mend = "give package.module:function, without arguments, that returns a tokenizer or model with config"
    try:
        inspect.signature(function).bind()
    except TypeError as e:
        raise ValueError(f"{name} cannot be called without arguments ({e}): {mend}") from e
    model = function()
    networks = isinstance(model, AnyOrderNetwork | TokenizerNetwork) and hasattr(model, "config")
    require(networks, f"{name} returned a {type(model).__name__}: {mend}")
    return model


def _require_effect(config: ConvertConfig, model: Any) -> None:
    """A ValueError for settings that the model does not use."""
    changed = {f.name for f in dataclasses.fields(config) if getattr(config, f.name) != f.default}
    if families.is_own("networks", str(config.source)):
        unused, what = changed & {"kind", "grid", "heads", "joint_steps"}, "the function decides it"
    elif not isinstance(model, AnyOrderNetwork):
        unused = changed & {"grid", "heads", "joint_steps", "extrapolated", "policy", "guidance"}
        what = "a tokenizer has no positions"
    else:
        unused = changed & ({"policy", "guidance"} if config.tokenizer is None else set())
        unused |= changed & ({"joint_steps"} if families.kind_of(model) == "llamagen" else set())
        what = "policy and guidance need tokenizer=..., joint_steps a model of more than raster order"
    require(not unused, f"{', '.join(sorted(unused))} has no effect ({what}): leave it out")
    text = "LlamaGen generates in raster order only: leave policy.order out"
    others = config.policy and config.policy.order != "raster"
    require(not (others and families.kind_of(model) == "llamagen"), text)


def _hashes(config: ConvertConfig, own: nn.Module | None) -> dict[str, str]:
    """Hashes of the contents, so that a file that was replaced is converted again."""
    paths = {"tokenizer": config.tokenizer} | ({} if own else {"source": config.source})
    hashes = {} if own is None else {"source": _digest(own)}
    return hashes | {
        role: fingerprint(path) if path.is_dir() else sha256(require_file(path))
        for role, path in paths.items()
        if path is not None
    }
