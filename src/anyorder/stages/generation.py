"""What the stages that generate images share: settings, a pipeline of artifacts, statistics over seeds."""

from dataclasses import dataclass, field
from pathlib import Path
from statistics import mean, stdev
from typing import Any, ClassVar

from anyorder.contracts import require
from anyorder.data.caches import OrderSet, TokenSet
from anyorder.inference.device import device, fast_dtype
from anyorder.inference.pipeline import Pipeline
from anyorder.inference.weights import load_any_order, load_tokenizer
from anyorder.method.guidance import GuidanceConfig
from anyorder.method.policy_config import PolicyConfig
from anyorder.method.sampling import Sampling
from anyorder.stages.common import require_made_from, require_trained_on


@dataclass(kw_only=True)
class GeneratingStage:
    """Inputs and settings of a stage that generates images."""

    inputs: ClassVar[tuple[str, ...]] = ("model", "tokens", "tokenizer", "scorer", "orders")
    provenance: ClassVar[dict[str, tuple[str, str]]] = {
        "tokens": ("model", "tokens"),
        "tokenizer": ("tokens", "tokenizer"),
    }
    required: ClassVar[tuple[str, ...]] = ("tokens", "tokenizer")
    renamed: ClassVar[dict[str, str]] = {"n": "num_images"}
    model: Path
    """Any-order model, trained here or converted."""
    tokenizer: Path | None = None
    """Tokenizer; by default the one that made the tokens."""
    tokens: Path | None = None
    """Token cache; by default the one the model was trained on; a converted model needs it."""
    scorer: Path | None = None
    """Scoring model, which decides where, for inferred orders; by default the model itself. Give the one that
    the model's orders were extracted with."""
    orders: Path | None = None
    """Order cache with an order for each class, for policy.order=class_mean and policy.class_weight."""
    policy: PolicyConfig = field(default_factory=PolicyConfig)
    """The order; by default lowest entropy first, a token-blind order: samples follow the model."""
    sampling: Sampling = field(default_factory=Sampling)
    guidance: GuidanceConfig = field(default_factory=GuidanceConfig)

    def __post_init__(self) -> None:
        order = self.policy.order
        lacking = f"policy '{self.policy.label}' needs the orders of the classes: give orders=FOLDER"
        require(not self.policy.by_class or self.orders is not None, lacking)
        unused = f"has no effect on policy.order={order}: leave it out"
        require(self.policy.by_class or self.orders is None, f"orders {unused}")
        require(self.scorer is None or (self.policy.token_blind and self.policy.decided), f"scorer {unused}")
        scored = self.scorer is not None
        self.guidance.require_effect(rated=self.policy.inferred, scored=scored, scaled=self._scaled)

    @property
    def _scaled(self) -> bool:
        """Whether images are guided."""
        return self.guidance.scale != 1

    def load_pipeline(
        self, tokens: TokenSet, images: int = 0, *, bf16: bool = False, compiled: bool | None = None
    ) -> Pipeline:
        """A pipeline of the inputs, on the device.

        With `bf16` the generator computes in bfloat16 where the hardware has it. The model that decides
        where, if the order is inferred, stays float32: in bf16 other orders come out (Kendall's tau 0.72 for
        margin). `compiled` is for so many `images` as of `Pipeline.compile_decoding`.
        """
        pipe = load_parts(self, tokens)
        if self.scorer or not self.policy.decided:
            pipe.model.to(fast_dtype(device(), bf16))
        return pipe.compile_decoding(compiled, images)


def load_parts(stage: Any, tokens: TokenSet) -> Pipeline:
    """Models, tokenizer and orders of the classes that are inputs of a stage, on the device.

    A ValueError refuses a model that was trained on other tokens, or another tokenizer.
    """
    for folder in filter(None, (stage.model, stage.scorer)):
        require_trained_on(folder, tokens)
    require_made_from(tokens.folder, "tokenizer", stage.tokenizer)
    return Pipeline(
        load_any_order(stage.model),
        load_tokenizer(stage.tokenizer),
        scorer=load_any_order(stage.scorer, "scorer") if stage.scorer else None,
        class_orders=OrderSet(stage.orders).class_orders if stage.orders else None,
    )


def over_seeds(values: list[float]) -> dict[str, Any]:
    """Mean, standard deviation (None of a single one) and each of the values that several seeds gave."""
    return {"mean": mean(values), "std": stdev(values) if len(values) > 1 else None, "seeds": values}
