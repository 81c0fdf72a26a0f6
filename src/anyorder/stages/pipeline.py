"""The stage that puts a model, its tokenizer and its orders into one pipeline folder."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from anyorder.data.caches import OrderSet, TokenSet, check_tokenizer
from anyorder.files import read_manifest
from anyorder.inference.folders import Parts, save_parts
from anyorder.inference.weights import load_any_order, load_tokenizer
from anyorder.method.policy_config import PolicyConfig
from anyorder.stages.artifacts import Artifact
from anyorder.stages.common import require_trained_on


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
