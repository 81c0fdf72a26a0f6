"""The stage that repeats extraction and fine-tuning, the second future work of OAR (arXiv 2504.17069 v1).

Hard EM on q(order, x) = prod q(position) q(token | position). E-step: for each training image the order that
is greedily the most likely under the current model, its tokens being given. M-step: fine-tune content and
location head on these orders. -log q(order, x) of the extracted order bounds -log p(x) from above.
"""

import dataclasses
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from anyorder.contracts import at_least, require
from anyorder.files import atomic, read_manifest
from anyorder.inference.weights import CONFIG, WEIGHTS, load_any_order
from anyorder.method.policy_config import PolicyConfig
from anyorder.models.transformer import AnyOrderTransformer, Architecture
from anyorder.stages.artifacts import Artifact
from anyorder.stages.common import TrainingStage
from anyorder.stages.execute import execute
from anyorder.stages.orders import OrdersStage
from anyorder.stages.train import TrainStage
from anyorder.training.config import TrainConfig

_MEASURED = [f"{split}_{kind}" for split in ("train", "validation", "test") for kind in ("nll", "bound")]


@dataclass
class IterateStage(TrainingStage):
    """Rounds of {extract orders with the current model, fine-tune on them}: hard EM on q(order, x)."""

    grows: ClassVar[tuple[str, ...]] = ()
    inputs: ClassVar[tuple[str, ...]] = ("model", "tokens")
    model: Path
    """Any-order model to start from, with or without a location head."""
    tokens: Path
    """Token cache that the model was trained on."""
    rounds: int = 3
    """Largest number of rounds."""
    patience: int = 1
    """Stop after this many rounds without a lower bound on the validation split (the test split without
    one); the best round's model is kept."""
    first: PolicyConfig = field(default_factory=PolicyConfig)
    """Order policy of the first extraction, if the model has no location head yet."""
    policy: PolicyConfig = field(default_factory=lambda: PolicyConfig("token_likelihood", location=1.0))
    """Order policy of extraction with a location head; by default the most likely position and true token."""
    limit: int | None = None
    """Train on so many images only, evenly spread over all; null takes all."""
    test_limit: int = 512
    """Test images, and validation images, that the bound is measured on."""
    jitter: float = 0.0
    """Standard deviation of noise on the ranks of extracted orders, in steps."""
    random_share: float = 0.5
    """Share of random orders in the first round; later rounds go down to `random_floor` in equal parts."""
    random_floor: float = 0.1
    """Share of random orders in the last round: keeps the any-order ability that extraction needs."""
    train: TrainConfig = field(default_factory=TrainConfig)
    """Training of each round."""

    def __post_init__(self) -> None:
        at_least(1, self, "rounds", "patience")
        shares = f"got {self.random_floor} and {self.random_share}"
        ordered = 0 <= self.random_floor <= self.random_share <= 1
        require(ordered, f"random_floor <= random_share must lie in [0, 1], {shares}")
        text = "random_floor is the share of the last round of several: leave it out, or give rounds > 1"
        require(self.rounds > 1 or self.random_floor == IterateStage.random_floor, text)
        for policy in (self.first, self.policy):  # bad settings of later rounds are refused before the first
            self._extraction(self.model, policy)
        self._training(self.model, self.tokens, 0)

    def run(self, artifact: Artifact) -> dict[str, Any]:
        """Write `round-N/{orders,model}`, and the model of the best round."""
        history: list[dict[str, Any]] = []
        model, best = self.model, 0
        for done in range(self.rounds):
            model = self._round(artifact.folder / f"round-{done + 1}", model, done)
            history.append(_facts(model))
            best = min(range(len(history)), key=lambda i: _watched(history[i]))
            if done - best >= self.patience:
                break
        if not artifact.leads:
            return {}
        winner = artifact.folder / f"round-{best + 1}" / "model"
        for name in (CONFIG, WEIGHTS):
            with atomic(artifact.folder / name) as temporary:
                shutil.copyfile(winner / name, temporary)
        kept = ("parameters", "training_tokens", "training_seconds", *_MEASURED)
        return {
            **{key: value for key, value in read_manifest(winner).items() if key in kept},
            "rounds": history,
            "best_round": best + 1,
            "extraction_evaluations": sum(facts["extraction_evaluations"] for facts in history),
        }

    def _round(self, folder: Path, model: Path, done: int) -> Path:
        """One E-step and one M-step; either is skipped if it is finished."""
        network = load_any_order(model)
        located = getattr(network.config, "location", False)
        if done == 0:
            text = f"iterate trains a location head, {model} is a {type(network).__name__}, which takes none"
            require(located or isinstance(network, AnyOrderTransformer), f"{text}: give a transformer")
            self._require_effect(located)
        execute("orders", self._extraction(model, self.policy if located else self.first), folder / "orders")
        execute("train", self._training(model, folder / "orders", done), folder / "model")
        return folder / "model"

    def _extraction(self, model: Path, policy: PolicyConfig) -> OrdersStage:
        return OrdersStage(
            model, self.tokens, policy=policy, limit=self.limit, test_limit=self.test_limit,
            seed=0 if policy.deterministic else self.train.seed,
        )  # fmt: skip

    def _training(self, model: Path, orders: Path, done: int) -> TrainStage:
        above = (self.random_share - self.random_floor) * (1 - done / max(1, self.rounds - 1))
        return TrainStage(
            self.tokens, orders=orders, init=model, jitter=self.jitter,
            random_share=self.random_floor + above, model=Architecture(location=True),
            train=dataclasses.replace(self.train, seed=self.train.seed + done),
        )  # fmt: skip

    def _require_effect(self, located: bool) -> None:
        """A ValueError for an order policy that no round would use."""
        changed = self.first != PolicyConfig()
        text = f"first is for a model without a location head, {self.model} has one: leave it out"
        require(not (located and changed), text)
        changed = self.policy != type(self)(self.model, self.tokens).policy
        text = "policy is for models with a location head, of the second round on: give first, or rounds > 1"
        require(located or self.rounds > 1 or not changed, text)


def _watched(facts: dict[str, Any]) -> float:
    """The bound that the best round is chosen by."""
    return facts.get("validation_bound", facts["test_bound"])


def _facts(model: Path) -> dict[str, Any]:
    """Results of a finished round, from its manifests."""
    trained, orders = read_manifest(model), read_manifest(model.parent / "orders")
    return {
        "policy": orders["policy"],
        "random_share": trained["config"]["random_share"],
        **{key: trained[key] for key in (*_MEASURED, "training_tokens") if key in trained},
        "gap": _watched(trained) - trained["train_bound"],
        "extraction_evaluations": orders["extraction_evaluations"],
    }
