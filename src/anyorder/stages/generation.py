"""What the stages that generate images share: a pipeline of artifacts, and statistics over seeds."""

from __future__ import annotations

from pathlib import Path
from statistics import mean, stdev
from typing import Any

from anyorder.data.caches import OrderSet, TokenSet, check_tokenizer
from anyorder.inference.device import device, fast_dtype
from anyorder.inference.pipeline import Pipeline
from anyorder.inference.weights import load_any_order, load_tokenizer
from anyorder.method.policy_config import INFERRED, PolicyConfig
from anyorder.stages.artifacts import Artifact
from anyorder.stages.common import require_trained_on


def load_pipeline(
    artifact: Artifact,
    tokens: TokenSet,
    model: Path,
    tokenizer: Path,
    scorer: Path | None = None,
    orders: Path | None = None,
    *,
    policy: PolicyConfig = PolicyConfig("random"),  # noqa: B008 - frozen
    bf16: bool = False,
    compiled: bool = False,
) -> Pipeline:
    """A pipeline of the artifacts that a stage names, on the device.

    With `bf16` the generator computes in bfloat16 where the hardware has it. The model that decides where, if
    `policy` is inferred, stays float32: in bf16 other orders come out (Kendall's tau 0.72 for margin).

    Raises:
        ValueError: a model was trained on other tokens, or another tokenizer made them.
    """
    for folder in filter(None, (model, scorer)):
        require_trained_on(folder, tokens)
    check_tokenizer(tokens, artifact.identity["inputs"]["tokenizer"])
    pipe = Pipeline(
        load_any_order(model),
        load_tokenizer(tokenizer),
        scorer=load_any_order(scorer) if scorer else None,
        class_orders=OrderSet(orders).class_orders if orders else None,
    )
    if scorer or policy.order not in (*INFERRED, "location"):
        pipe.model.to(fast_dtype(device(), bf16))
    return pipe.compile_decoding() if compiled else pipe


def check_order(policy: PolicyConfig, scorer: Path | None, orders: Path | None) -> None:
    """Refuse inputs that an order lacks, or leaves unused.

    Raises:
        ValueError: class_mean without orders, orders without it, or a scorer that decides nothing.
    """
    if policy.order == "class_mean" and orders is None:
        raise ValueError("policy.order=class_mean needs the orders of the classes: give orders=FOLDER")
    if orders is not None and policy.order != "class_mean":
        raise ValueError(f"orders has no effect on policy.order={policy.order}: leave it out")
    if scorer is not None and not (policy.token_blind and (policy.inferred or policy.order == "location")):
        raise ValueError(f"scorer has no effect on policy.order={policy.order}: leave it out")


def over_seeds(values: list[float]) -> dict[str, Any]:
    """Mean, standard deviation (None of a single one) and each of the values that several seeds gave."""
    return {"mean": mean(values), "std": stdev(values) if len(values) > 1 else None, "seeds": values}
