"""Pipeline folders: a model, its tokenizer and what belongs to them."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from anyorder.contracts import AnyOrderNetwork, TokenizerNetwork
from anyorder.data.caches import TEXT
from anyorder.data.captions import CaptionTokenizer, Vocabulary
from anyorder.files import load_array, read_json, save_array, write_json, write_text
from anyorder.inference.weights import kind_of, load_any_order, load_tokenizer, save_model
from anyorder.method.policy_config import PolicyConfig
from anyorder.settings import parse, read_stored

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
    policy, orders = parse(PolicyConfig, read_stored(PolicyConfig, index["policy"])), folder / CLASS_ORDERS
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
