"""The command `anyorder convert`: a downloaded file of weights becomes a folder."""

import dataclasses
import inspect
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

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

    inputs: ClassVar[tuple[str, ...]] = ()
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

    @cached_property
    def _own(self) -> Any:
        """The network of an own function; None for a file."""
        return _made(str(self.source)) if families.is_own("networks", str(self.source)) else None

    def observed(self) -> dict[str, Any]:
        """Hashes of the contents, so that a file that was replaced is converted again."""
        hashes = {"source": _digest(self._own)} if self._own else {}
        paths = {"tokenizer": self.tokenizer} | ({} if self._own else {"source": self.source})
        for role, path in paths.items():
            if path is not None:
                hashes[role] = fingerprint(path) if path.is_dir() else sha256(require_file(path))
        return {"sha256": hashes}

    def run(self, artifact: Artifact) -> dict[str, Any]:
        """Write the folder; a ValueError for what is no known model, or parts that do not fit."""
        model = self._own or build(self.source, self.kind, self.grid, self.heads, self.joint_steps)
        kind, out = families.kind_of(model), artifact.folder
        self._require_effect(model, kind)
        if self.extrapolated is not None:
            model.config = dataclasses.replace(model.config, extrapolated=self.extrapolated)
        if self.tokenizer is None:
            save_model(out, model, model.config, kind)
        else:
            text = f"{self.source} is a tokenizer itself: leave tokenizer= out"
            require(isinstance(model, AnyOrderNetwork), text)
            guidance = self.guidance or recommended(kind, self.source.name)
            save_parts(out, combine(model, read_tokenizer(self.tokenizer), self.policy, guidance))
        parameters = sum(p.numel() for p in model.parameters())
        log.info("%s: %s, %.1f million parameters", out, type(model).__name__, parameters / 1e6)
        return {"kind": kind, "parameters": parameters}

    def _require_effect(self, model: Any, kind: str) -> None:
        """A ValueError for settings that the model does not use."""
        changed = {f.name for f in dataclasses.fields(self) if getattr(self, f.name) != f.default}
        if self._own:
            unused, what = changed & {"kind", "grid", "heads", "joint_steps"}, "the function decides it"
        elif not isinstance(model, AnyOrderNetwork):
            unused = changed & {"grid", "heads", "joint_steps", "extrapolated", "policy", "guidance"}
            what = "a tokenizer has no positions"
        else:
            unused = changed & ({"policy", "guidance"} if self.tokenizer is None else set())
            unused |= changed & ({"joint_steps"} if kind == "llamagen" else set())
            what = "policy and guidance need tokenizer=..., joint_steps a model of more than raster order"
        require(not unused, f"{', '.join(sorted(unused))} has no effect ({what}): leave it out")
        others = self.policy and self.policy.order != "raster" and kind == "llamagen"
        require(not others, "LlamaGen generates in raster order only: leave policy.order out")


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
