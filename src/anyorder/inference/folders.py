"""Pipeline folders: a model, its tokenizer and what belongs to them."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from anyorder.contracts import AnyOrderNetwork, TokenizerNetwork
from anyorder.data.caches import TEXT
from anyorder.data.captions import CaptionTokenizer, Vocabulary
from anyorder.families import kind_of
from anyorder.files import load_array, read_json, save_array, write_json, write_text
from anyorder.inference import weights
from anyorder.method.policy_config import PolicyConfig
from anyorder.orders import validate
from anyorder.settings import parse, read_stored

INDEX, CLASS_ORDERS = "pipeline.json", "class_order.npy"
BUNDLED = Path(__file__).parent.parent / "pretrained"


def bundled() -> list[str]:
    """Names of the pipelines that come with the package."""
    return sorted(path.parent.name for path in BUNDLED.glob(f"*/{INDEX}"))


@dataclass(eq=False, repr=False)
class Parts:
    """What a pipeline is made of.

    Raises:
        ValueError: the parts do not fit together.
    """

    model: AnyOrderNetwork
    """The generator."""
    tokenizer: TokenizerNetwork
    """The one whose tokens the model was trained on."""
    classes: Sequence[str] = ()
    """Class names, for labels given by name."""
    policy: PolicyConfig = PolicyConfig()  # noqa: RUF009 - frozen
    """The order to generate in unless a call says another; by default lowest entropy first."""
    scorer: AnyOrderNetwork | None = None
    """The scoring model, which decides where, for token-blind inferred orders and "location"; by default the
    model itself."""
    class_orders: Tensor | None = None
    """(classes, N) integers, an order for each class, for order "class_mean". On other grids than the model's
    the ranks are interpolated, see `orders.stretch`."""
    vocabulary: Vocabulary = field(default_factory=Vocabulary)
    """Names of attributes and captions, where the model takes them."""

    def __post_init__(self) -> None:
        self.classes, self.policy = list(self.classes), self.policy or PolicyConfig()
        self.vocabulary = self.vocabulary or Vocabulary(self.classes)
        for role, name in (("tokenizer", "vocab_size"), ("scorer", "vocab_size"), ("scorer", "num_classes")):
            part, ours = getattr(self, role), getattr(self.model, name)
            if part is not None and getattr(part, name) != ours:
                raise ValueError(
                    f"the model has {name} {ours}, the {role} {getattr(part, name)}: "
                    f"give the {role} that belongs to the model"
                )
        if self.class_orders is not None:
            self.class_orders = validate(self.class_orders, self.model.grid).to(torch.int64)
            if self.class_orders.ndim != 2 or self.model.num_classes not in (0, len(self.class_orders)):
                raise ValueError(
                    f"class_orders must have a row for each of the model's {self.model.num_classes} classes, "
                    f"got shape {tuple(self.class_orders.shape)}"
                )
        for network in filter(None, (self.model, self.tokenizer, self.scorer)):
            network.eval()


def save_parts(folder: str | Path, parts: Parts) -> None:
    """Write `pipeline.json`, `model/`, `tokenizer/`, and what else there is: scorer, orders, vocabulary."""
    folder, vocabulary = Path(folder), parts.vocabulary
    (folder / CLASS_ORDERS).unlink(missing_ok=True)  # of an older pipeline in the same folder
    if parts.class_orders is not None:
        save_array(folder / CLASS_ORDERS, parts.class_orders.cpu().numpy().astype(np.uint16))
    for role in ("scorer", "model", "tokenizer"):
        if (network := getattr(parts, role)) is not None:
            weights.save_model(folder / role, network, network.config, kind_of(network))
    policy = dataclasses.asdict(parts.policy)
    index = {"format": 1, "classes": parts.classes, "policy": policy, "scorer": parts.scorer is not None}
    if vocabulary.attributes or vocabulary.length:
        index |= {"attributes": vocabulary.attributes, "text_length": vocabulary.length}
        if vocabulary.captions is not None:
            write_text(folder / TEXT, vocabulary.captions.definition)
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
    index: Any = read_json(folder / INDEX)
    if not isinstance(index, dict) or index.get("format") != 1:
        found = index.get("format") if isinstance(index, dict) else type(index).__name__
        raise ValueError(f"{folder / INDEX} has format {found}, this version reads 1: update anyorder")
    try:
        classes, length = [str(name) for name in index["classes"]], int(index.get("text_length", 0))
        policy = parse(PolicyConfig, read_stored(PolicyConfig, index["policy"]))
        captions = CaptionTokenizer((folder / TEXT).read_text("utf-8")) if length else None
        vocabulary = Vocabulary(classes, dict(index.get("attributes", {})), captions, length)
    except (AttributeError, KeyError, TypeError) as e:
        raise ValueError(
            f"{folder / INDEX} is damaged: {type(e).__name__} {e}; save the pipeline again"
        ) from e
    orders = folder / CLASS_ORDERS
    return Parts(
        weights.load_any_order(folder / "model"),
        weights.load_tokenizer(folder / "tokenizer"),
        classes,
        policy,
        weights.load_any_order(folder / "scorer") if index.get("scorer") else None,
        torch.from_numpy(load_array(orders).astype(np.int64)) if orders.is_file() else None,
        vocabulary,
    )


def find_parts(path_or_hub_id: str | Path) -> Parts:
    """The parts of a pipeline folder, of one that comes with the package, or of one from the hub.

    Raises:
        FileNotFoundError: neither a folder nor a reachable hub id.
        ValueError: the folder is damaged, or a known repository has no such file.
    """
    folder, name = Path(path_or_hub_id).expanduser(), str(path_or_hub_id)
    if folder.is_dir():
        return load_parts(folder)
    return load_parts(BUNDLED / name) if name in bundled() else _download(name)


def _download(hub_id: str) -> Parts:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    from anyorder.inference.hub import find, load_published

    published = find(hub_id)
    try:
        if published is not None:
            return load_published(published)
        folder = Path(snapshot_download(hub_id, allow_patterns=["*.json", "*.safetensors", "*.npy"]))
    except (HFValidationError, HfHubHTTPError, LocalEntryNotFoundError, OSError) as e:
        raise FileNotFoundError(
            f"'{hub_id}' is neither a folder nor a hub id that can be reached: {e}"
        ) from e
    return load_parts(folder)
