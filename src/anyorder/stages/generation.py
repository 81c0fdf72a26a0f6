"""What the stages that generate images share: a pipeline from the folders of artifacts."""

from __future__ import annotations

from pathlib import Path

from anyorder.data.caches import OrderSet, TokenSet, check_tokenizer
from anyorder.inference.device import device, fast_dtype
from anyorder.inference.pipeline import Pipeline
from anyorder.inference.weights import load_any_order, load_tokenizer
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
    bf16: bool = False,
    compiled: bool = False,
) -> Pipeline:
    """A pipeline of artifacts that belong together.

    Args:
        artifact: of the stage; its identity says which tokenizer it takes.
        tokens: the cache that the models were trained on.
        model: folder of the generator.
        tokenizer: folder of the tokenizer.
        scorer: folder of the scoring model, if it is not the generator.
        orders: folder of the order cache with the orders of the classes.
        bf16: compute in bfloat16 where the hardware has it.
        compiled: generate through compiled code.

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
    ).to(fast_dtype(device(), bf16))
    return pipe.compile_decoding() if compiled else pipe
