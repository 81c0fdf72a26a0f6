"""Pipeline folders: a model, its tokenizer and what belongs to them."""

import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from anyorder import families, files, settings
from anyorder.contracts import AnyOrderNetwork, TokenizerNetwork, require
from anyorder.data.caches import TEXT
from anyorder.data.captions import CaptionTokenizer, Vocabulary
from anyorder.inference import weights
from anyorder.method.guidance import GuidanceConfig
from anyorder.method.policy_config import PolicyConfig
from anyorder.method.sampling import Sampling
from anyorder.orders import validate

INDEX, CLASS_ORDERS = "pipeline.json", "class_order.npy"
BUNDLED = Path(__file__).parent.parent / "pretrained"


def bundled() -> list[str]:
    """Names of the pipelines that come with the package."""
    return sorted(path.parent.name for path in BUNDLED.glob(f"*/{INDEX}"))


@dataclass(eq=False, repr=False)
class Parts:
    """What a pipeline is made of; a ValueError refuses parts that do not fit together."""

    model: AnyOrderNetwork  #: The generator.
    tokenizer: TokenizerNetwork  #: The one whose tokens the model was trained on.
    classes: Sequence[str] = ()  #: Class names, for labels given by name.
    #: The order unless a call gives another.
    policy: PolicyConfig = PolicyConfig()  # noqa: RUF009 - frozen
    #: The scoring model, which decides where for token-blind inferred orders; by default the model itself.
    scorer: AnyOrderNetwork | None = None
    #: (classes, N) integers, an order for each class, for order "class_mean"; see also `orders.stretch`.
    class_orders: torch.Tensor | None = None
    #: Names of attributes and captions, where the model takes them.
    vocabulary: Vocabulary = field(default_factory=Vocabulary)
    #: The guidance of conditional images unless a call gives another.
    guidance: GuidanceConfig = GuidanceConfig()  # noqa: RUF009 - frozen
    #: How tokens are sampled unless a call says it.
    sampling: Sampling = Sampling()  # noqa: RUF009 - frozen
    #: Names of orders that the model is good at, beside the policy; the web page offers these first.
    good_orders: Sequence[str] = ()
    #: Name of the class that the web page opens with; by default the first.
    example_class: str | None = None

    def __post_init__(self) -> None:
        self.classes, self.policy = list(self.classes), self.policy or PolicyConfig()
        self.vocabulary = self.vocabulary or Vocabulary(self.classes)
        for role, name in (("tokenizer", "vocab_size"), ("scorer", "vocab_size"), ("scorer", "num_classes")):
            ours = getattr(self.model, name)
            other = getattr(getattr(self, role), name, ours)
            text = f"the model has {name} {ours}, the {role} {other}"
            require(other == ours, f"{text}: give the {role} that belongs to the model")
        if self.class_orders is not None:
            self.class_orders = validate(self.class_orders, self.model.grid).to(torch.int64)
            shape, n = tuple(self.class_orders.shape), self.model.num_classes
            text = f"class_orders must have a row for each of the model's {n} classes, got shape {shape}"
            require(len(shape) == 2 and n in (0, shape[0]), text)
        self.good_orders = [PolicyConfig(name).order for name in self.good_orders]
        lacking = "good_orders names class_mean, and there are no class_orders: leave it out, or give them"
        require("class_mean" not in self.good_orders or self.class_orders is not None, lacking)
        decides, named = self.scorer or self.model, map(PolicyConfig, self.good_orders)
        headed = hasattr(decides, "locate") and getattr(decides.config, "location", True)
        located = any(each.uses_head for each in (self.policy, *named))
        lacking = "policy or good_orders name the location head, and the model that decides has none"
        require(headed or not located, f"{lacking}: choose another order")
        text = f"example_class is '{self.example_class}', the classes are {', '.join(self.classes)}"
        require(self.example_class in (None, *self.classes), text)
        for network in filter(None, (self.model, self.tokenizer, self.scorer)):
            network.eval()


def save_parts(folder: str | Path, parts: Parts) -> None:
    """Write `pipeline.json`, `model/` and `tokenizer/`, and if given scorer, orders and vocabulary."""
    folder, vocabulary = Path(folder), parts.vocabulary
    networks = {role: getattr(parts, role) for role in ("scorer", "model", "tokenizer")}
    kinds = {role: families.kind_of(one) for role, one in networks.items() if one is not None}  # or refuse
    for taken in (folder, *(folder / role for role in networks)):
        text = f"{taken} is a finished artifact ({files.MANIFEST}): choose another folder for the pipeline"
        require(not (taken / files.MANIFEST).is_file(), text)
    (folder / CLASS_ORDERS).unlink(missing_ok=True)  # of an older pipeline in the same folder
    if parts.class_orders is not None:
        files.save_array(folder / CLASS_ORDERS, parts.class_orders.cpu().numpy().astype(np.uint16))
    for role, kind in kinds.items():
        weights.save_model(folder / role, networks[role], networks[role].config, kind)
    policy, scored = asdict(parts.policy), parts.scorer is not None
    index = {"format": 1, "classes": parts.classes, "policy": policy, "scorer": scored}
    for name in ("guidance", "sampling"):
        if (given := getattr(parts, name)) != getattr(Parts, name):
            index[name] = asdict(given)
    if parts.good_orders:
        index["good_orders"] = parts.good_orders
    if parts.example_class is not None:
        index["example_class"] = parts.example_class
    if vocabulary.attributes or vocabulary.length:
        index |= {"attributes": vocabulary.attributes, "text_length": vocabulary.length}
        if vocabulary.captions is not None:
            files.write_text(folder / TEXT, vocabulary.captions.definition)
    files.write_json(folder / INDEX, index)


def load_parts(folder: str | Path) -> Parts:
    """Read what `save_parts` wrote; a FileNotFoundError or ValueError says what is wrong with the folder."""
    with families.loading(Path(folder)):
        return _load_parts(Path(folder))


def _load_parts(folder: Path) -> Parts:
    if not (folder / INDEX).is_file():
        text = f"{folder} is no pipeline folder (no {INDEX}); make one with stage 'pipeline', or from"
        raise FileNotFoundError(f"{text} downloaded files with 'anyorder convert SOURCE DEST tokenizer=...'")
    index: Any = files.read_json(folder / INDEX)
    found = index.get("format") if isinstance(index, dict) else type(index).__name__
    require(found == 1, f"{folder / INDEX} has format {found}, this version reads 1: update anyorder")
    try:
        classes, length = [str(name) for name in index["classes"]], int(index.get("text_length", 0))
        policy = settings.parse_stored(PolicyConfig, index["policy"])
        guidance = settings.parse_stored(GuidanceConfig, index.get("guidance", {}))
        sampling = settings.parse_stored(Sampling, index.get("sampling", {}))
        captions = CaptionTokenizer((folder / TEXT).read_text("utf-8")) if length else None
        good, example = [str(name) for name in index.get("good_orders", [])], index.get("example_class")
        vocabulary = Vocabulary(classes, dict(index.get("attributes", {})), captions, length)
    except (AttributeError, KeyError, TypeError) as e:
        text = f"{folder / INDEX} is damaged: {type(e).__name__} {e}; save the pipeline again"
        raise ValueError(text) from e
    orders = folder / CLASS_ORDERS
    model, tokenizer = weights.load_any_order(folder / "model"), weights.load_tokenizer(folder / "tokenizer")
    scorer = weights.load_any_order(folder / "scorer") if index.get("scorer") else None
    table = torch.from_numpy(files.load_array(orders).astype(np.int64)) if orders.is_file() else None
    further = vocabulary, guidance, sampling, good, example
    return Parts(model, tokenizer, classes, policy, scorer, table, *further)


def upload(parts: Parts, repo_id: str, token: str | None, private: bool) -> str:
    """Write the parts to a repository of the hub, made if need be; returns the address of the commit."""
    from huggingface_hub import HfApi

    api = HfApi(token=token)
    api.create_repo(repo_id, private=private, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        save_parts(folder, parts)
        # Class orders of an earlier model would be read as those of this one.
        return str(api.upload_folder(repo_id=repo_id, folder_path=folder, delete_patterns=[CLASS_ORDERS]))


def find_parts(path_or_hub_id: str | Path, allow_own: bool = False) -> Parts:
    """The parts of a pipeline folder, of one that comes with the package, or of one from the hub.

    A pipeline of the hub that names own parts by import path is refused without `allow_own`.
    """
    folder, name = files.expanded(path_or_hub_id), str(path_or_hub_id)
    if folder.exists():
        return load_parts(folder)
    return load_parts(BUNDLED / name) if name in bundled() else _download(name, allow_own)


def _download(hub_id: str, allow_own: bool) -> Parts:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    from anyorder.inference.convert import find_published, load_published

    published = find_published(hub_id)
    try:
        if published is not None:
            return load_published(published)
        folder = Path(snapshot_download(hub_id, allow_patterns=["*.json", "*.safetensors", "*.npy"]))
    except (HFValidationError, HfHubHTTPError, LocalEntryNotFoundError, OSError) as e:
        hint = settings.did_you_mean(hub_id, bundled())
        text = f"'{hub_id}' is neither a folder{hint} nor a hub id that can be reached: {e}"
        raise FileNotFoundError(text) from e
    reason = f"'{hub_id}' runs code of a package that is installed here, which takes allow_own=True"
    with families.loading(folder, "" if allow_own else reason):
        return load_parts(folder)
