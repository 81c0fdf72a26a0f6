"""The stage that puts a model, its tokenizer and its orders into one pipeline folder."""

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from anyorder.contracts import require
from anyorder.data.caches import TokenSet
from anyorder.files import read_manifest
from anyorder.inference.folders import save_parts
from anyorder.method.guidance import GuidanceConfig
from anyorder.method.policy_config import PolicyConfig, stored_policy
from anyorder.method.sampling import Sampling
from anyorder.settings import parse_stored
from anyorder.stages.artifacts import Artifact
from anyorder.stages.common import own_names, require_made_from, trained_before
from anyorder.stages.generation import GeneratingStage, load_parts


@dataclass
class PipelineStage:
    """Put a trained model and its tokenizer into one folder that `Pipeline.from_pretrained` loads.

    Give `samples`, and the pipeline generates as they were generated; or give `model`, and what you change.
    """

    inputs: ClassVar[tuple[str, ...]] = ("samples", *GeneratingStage.inputs)
    # In this sequence: the tokenizer is found by the tokens, these by the model.
    provenance: ClassVar[dict[str, tuple[str, str]]] = {
        **{role: ("samples", role) for role in GeneratingStage.inputs},
        **GeneratingStage.provenance,
    }
    required: ClassVar[tuple[str, ...]] = ("model", "tokens", "tokenizer")
    samples: Path | None = None
    """Samples whose model, scoring model, orders, order policy, sampling and guidance the pipeline takes."""
    model: Path | None = None
    """Any-order model; by default the one of the samples."""
    tokenizer: Path | None = None
    """Tokenizer; by default the one that made the tokens."""
    tokens: Path | None = None
    """Token cache that the model was trained on; needed for a converted model."""
    scorer: Path | None = None
    """Scoring model, which decides where; by default the one of the samples, else the model itself."""
    orders: Path | None = None
    """Order cache that holds the orders of the classes, for order class_mean and for class_weight."""
    policy: PolicyConfig | None = None
    """Order unless a call gives another; by default the one of the samples, else entropy."""
    sampling: Sampling | None = None
    """How tokens are sampled unless a call says it; by default as the samples were, else at temperature 1."""
    good_orders: tuple[str, ...] = ()
    """Names of further orders that the model is good at, such as random; the web page of `anyorder demo`
    offers these first, and only fixed orders as experiments. By default none but the policy: then it offers
    all there are."""
    example_class: str | None = None
    """Class that the web page opens with; by default the one with most images."""
    half: bool = False
    """Write all weights as float16: half the size on disk. They are read as float32."""

    def __post_init__(self) -> None:
        require(bool(self.samples or self.model), "give samples=FOLDER or model=FOLDER to put together")
        named = {f"good_orders={name}": PolicyConfig(name) for name in self.good_orders}
        for name, policy in {"this policy": self.policy, **named}.items():
            fits = self.orders or self.samples or not policy or not policy.by_class
            require(bool(fits), f"{name} needs the orders of the classes: give orders=FOLDER")

    def run(self, artifact: Artifact) -> dict[str, Any]:
        """Write the folder."""
        assert self.model
        assert self.tokens
        for role in GeneratingStage.inputs if self.samples else ():
            require_made_from(self.samples, role, getattr(self, role))  # type: ignore[arg-type]
        tokens = TokenSet(self.tokens, "test")
        pipe = load_parts(self, tokens)
        policy, guidance, sampling = self.policy or PolicyConfig(), GuidanceConfig(), self.sampling
        if self.samples:
            made = read_manifest(self.samples)
            config = made["config"]
            # The manifest says temperature and scale of a search, if there was one.
            drawn = config.get("sampling", {}) | {"temperature": made.get("temperature", 1.0)}
            sampling = sampling or parse_stored(Sampling, drawn)
            if not self.policy:
                policy = stored_policy(config["policy"])
            if (scale := made.get("guidance_scale", 1)) != 1:
                guidance = parse_stored(GuidanceConfig, config.get("guidance", {}) | {"scale": scale})
        classes = tokens.classes
        if pipe.model.num_classes != len(classes):
            classes = own_names(self.model)
        vocabulary = dataclasses.replace(tokens.vocabulary, classes=classes)
        example = self.example_class or (classes[np.bincount(tokens.labels).argmax()] if classes else None)
        parts = dataclasses.replace(
            pipe, classes=classes, policy=policy, vocabulary=vocabulary, guidance=guidance,
            sampling=sampling or Sampling(), good_orders=self.good_orders, example_class=example,
        )  # fmt: skip
        for network in filter(None, (parts.model, parts.tokenizer, parts.scorer) if self.half else ()):
            network.half()
        save_parts(artifact.folder, parts)
        return {"parameters": read_manifest(self.model)["parameters"], **trained_before(self.model)}
