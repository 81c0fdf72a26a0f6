"""What all stages share: the device, batches of rows, and one way to call the trainer."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from anyorder.contracts import AnyOrderNetwork, class_labels
from anyorder.data.caches import TokenSet
from anyorder.files import fingerprint, read_json, read_manifest
from anyorder.inference.device import device
from anyorder.inference.weights import CONFIG, _part
from anyorder.stages.artifacts import Artifact
from anyorder.training.config import TrainConfig
from anyorder.training.trainer import TrainResult, train

log = logging.getLogger("anyorder")

SHOWN = 16
"""Images in the pictures that stages make."""


def fit(
    artifact: Artifact, model: nn.Module, loss: Any, examples: int, config: TrainConfig, **more: Any
) -> TrainResult:
    """Train in the artifact's folder on the default device; resumes from its checkpoints."""
    model.to(device())
    return train(model, loss, examples, config, artifact.folder, device=device(), **more)


def training_facts(result: TrainResult) -> dict[str, Any]:
    """What the manifest says of a training."""
    return {
        "parameters": sum(p.numel() for p in result.model.parameters()),
        "steps": result.steps,
        "seconds": result.seconds,
        "examples": result.examples,
        "device": str(device()),
    }


def require_made_from(folder: Path, role: str, other: Path | None) -> None:
    """Refuse artifacts that do not belong together.

    Raises:
        ValueError: `folder` was made from another artifact in this role than `other` (None: from any).
    """
    got, wanted = read_manifest(folder)["inputs"].get(role), fingerprint(other) if other else None
    if got != wanted:
        raise ValueError(
            f"{folder} was made with {role} {got}, but {other} is {wanted}: "
            f"give the {role} that belongs to it, or run the stage that makes {folder} again"
        )


# --- published models among our own -----------------------------------------------------------------------


def is_converted(folder: Path) -> bool:
    """Whether the model was trained by others: `anyorder convert` made the folder."""
    return read_manifest(folder)["stage"] == "convert"


def require_trained_on(folder: Path, tokens: TokenSet, *, adapted: bool = False) -> None:
    """Refuse a model for tokens that it was not trained on; a converted one must have their codebook's size.

    Args:
        folder: of the model.
        tokens: the tokens it is used with.
        adapted: a converted model is to get their classes; else it is said where labels must be left out.

    Raises:
        ValueError: it was made from other tokens, or has another number of them.
    """
    if not is_converted(folder):
        return require_made_from(folder, "tokens", tokens.folder)
    config = read_json(_part(folder, "model") / CONFIG)["config"]
    if config["vocab_size"] != tokens.vocab_size:
        raise ValueError(
            f"{folder} knows {config['vocab_size']} tokens, {tokens.folder} has {tokens.vocab_size}: "
            "tokenize the images with the tokenizer that belongs to the model"
        )
    if config["num_classes"] != len(tokens.classes) and not adapted:
        log.warning(
            "%s has %d classes, %s has %d: labels are left out",
            folder, config["num_classes"], tokens.folder, len(tokens.classes),
        )  # fmt: skip


def trained_before(folder: Path) -> dict[str, Any]:
    """Tokens and seconds of training that a model has had here; what others trained is not counted."""
    manifest = read_manifest(folder)
    return {key: manifest.get(key, 0) for key in ("training_tokens", "training_seconds")}


def as_condition(model: AnyOrderNetwork, tokens: TokenSet, condition: Tensor) -> Tensor | None:
    """What the tokens are asked to be, as the model takes it: a published one takes the class alone.

    None where a converted model has other classes.
    """
    if not takes_more_than_classes(model):
        condition = class_labels(condition)
    return condition if model.num_classes in (0, len(tokens.classes)) else None


def takes_more_than_classes(model: AnyOrderNetwork) -> bool:
    """Whether a condition may have attributes or a caption."""
    return getattr(model, "prefix", None) is not None
