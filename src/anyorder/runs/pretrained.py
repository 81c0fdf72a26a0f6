"""Pipeline folders: a tokenizer, an any-order model, class names and the order to draw in."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from anyorder.artifacts import (
    Artifact,
    load_array,
    read_json,
    read_manifest,
    save_array,
    write_json,
    write_text,
)
from anyorder.contracts import AnyOrderNetwork, TokenizerNetwork
from anyorder.data.caches import TEXT, OrderSet, TokenSet, check_tokenizer
from anyorder.data.text import CaptionTokenizer, Vocabulary
from anyorder.policies import PolicyConfig
from anyorder.runs.checkpoint import kind_of, save_model
from anyorder.runs.common import load_any_order, load_tokenizer, require_trained_on

INDEX, CLASS_ORDERS = "pipeline.json", "class_order.npy"


@dataclass
class Parts:
    """What a pipeline is made of."""

    model: AnyOrderNetwork
    tokenizer: TokenizerNetwork
    classes: list[str]
    policy: PolicyConfig = field(default_factory=PolicyConfig)
    scorer: AnyOrderNetwork | None = None
    """The model that decides where, if not the model itself."""
    class_orders: Tensor | None = None
    """(classes, N) int64, the orders of policy class_mean."""
    vocabulary: Vocabulary | None = None
    """What pictures may be asked to be besides their class, where the model takes more than that."""


def save_parts(folder: str | Path, parts: Parts) -> None:
    """Write `pipeline.json`, `model/`, `tokenizer/`, and what else there is: scorer, orders, vocabulary."""
    folder = Path(folder)
    (folder / CLASS_ORDERS).unlink(missing_ok=True)  # of an older pipeline in the same folder
    if parts.class_orders is not None:
        save_array(folder / CLASS_ORDERS, parts.class_orders.numpy().astype(np.uint16))
    if parts.scorer is not None:
        save_model(folder / "scorer", parts.scorer, parts.scorer.config, kind_of(parts.scorer))
    save_model(folder / "model", parts.model, parts.model.config, kind_of(parts.model))
    save_model(folder / "tokenizer", parts.tokenizer, parts.tokenizer.config, kind_of(parts.tokenizer))
    policy = dataclasses.asdict(parts.policy)
    index = {"format": 1, "classes": parts.classes, "policy": policy, "scorer": parts.scorer is not None}
    if parts.vocabulary is not None:
        index |= {"attributes": parts.vocabulary.attributes, "text_length": parts.vocabulary.length}
        if parts.vocabulary.captions is not None:
            write_text(folder / TEXT, parts.vocabulary.captions.definition)
    write_json(folder / INDEX, index)


def load_parts(folder: str | Path) -> Parts:
    """Read what `save_parts` wrote.

    Raises:
        FileNotFoundError: not a pipeline folder.
        ValueError: damaged, or of a newer format.
    """
    folder = Path(folder)
    if not (folder / INDEX).is_file():
        raise FileNotFoundError(
            f"{folder} is no pipeline folder (no {INDEX}); make one with stage 'pipeline', "
            "or from downloaded files with 'anyorder convert SOURCE DEST tokenizer=...'"
        )
    index = read_json(folder / INDEX)
    if index.get("format") != 1:
        raise ValueError(
            f"{folder / INDEX} has format {index.get('format')}, this version reads 1: update anyorder"
        )
    scorer = load_any_order(folder / "scorer") if index["scorer"] else None
    policy, orders = PolicyConfig(**index["policy"]), folder / CLASS_ORDERS
    return Parts(
        load_any_order(folder / "model"),
        load_tokenizer(folder / "tokenizer"),
        index["classes"],
        policy,
        scorer,
        torch.from_numpy(load_array(orders).astype(np.int64)) if orders.is_file() else None,
        _vocabulary(folder, index),
    )


def _vocabulary(folder: Path, index: dict[str, Any]) -> Vocabulary | None:
    if "attributes" not in index:
        return None
    captions = CaptionTokenizer((folder / TEXT).read_text("utf-8")) if index["text_length"] else None
    return Vocabulary(index["classes"], index["attributes"], captions, index["text_length"])


@dataclass
class PipelineStage:
    """Put a trained model and its tokenizer into one folder that `Pipeline.from_pretrained` loads."""

    inputs: ClassVar[tuple[str, ...]] = ("model", "tokenizer", "tokens", "scorer", "orders")
    model: Path
    tokenizer: Path
    tokens: Path
    scorer: Path | None = None
    """Model that decides where, if not the model itself: the one its orders were extracted with."""
    orders: Path | None = None
    """Order cache that holds the orders of the classes, for policy.order=class_mean."""
    policy: PolicyConfig = field(default_factory=PolicyConfig)
    """The order that the pipeline draws in unless told otherwise."""

    def __post_init__(self) -> None:
        if self.policy.order == "class_mean" and self.orders is None:
            raise ValueError("policy.order=class_mean needs the orders of the classes: give orders=...")

    def run(self, artifact: Artifact) -> dict[str, Any]:
        """Write the folder."""
        tokens = TokenSet(self.tokens, "test")
        for folder in filter(None, (self.model, self.scorer)):
            require_trained_on(folder, tokens)
        check_tokenizer(tokens, artifact.identity["inputs"]["tokenizer"])
        scorer = load_any_order(self.scorer) if self.scorer else None
        model, tokenizer = load_any_order(self.model), load_tokenizer(self.tokenizer)
        orders = OrderSet(self.orders).class_orders if self.orders else None
        vocabulary = tokens.vocabulary if tokens.further.shape[1] else None
        parts = Parts(model, tokenizer, tokens.classes, self.policy, scorer, orders, vocabulary)
        save_parts(artifact.folder, parts)
        return {"parameters": read_manifest(self.model)["parameters"]}
