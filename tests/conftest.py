"""Models and policies that every contract test runs over, and a model whose distribution is known.

To put another model under the contract, add a `Case` to `MODELS`.
"""

from __future__ import annotations

import anyorder  # noqa: F401  # isort: skip  # before PyTorch, whose threads it keeps from spinning

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import product
from typing import Any

import hypothesis
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from anyorder.adapters.arpg import ARPG
from anyorder.adapters.layers import GPTConfig
from anyorder.adapters.randar import RandAR
from anyorder.contracts import AnyOrderModel, AnyOrderNetwork, Grid, OrderPolicy
from anyorder.method.guidance import GuidanceConfig, Guided
from anyorder.method.policies import InferredOrder
from anyorder.method.policy_config import PolicyConfig
from anyorder.method.sampling import SCORES, Streams
from anyorder.models.architecture import TransformerConfig
from anyorder.models.transformer import AnyOrderTransformer
from anyorder.orders import STATIC

hypothesis.settings.register_profile(
    "any machine", deadline=None
)  # a busy one takes longer, which is no failure
hypothesis.settings.load_profile("any machine")

GRID = Grid(2, 3)
TINY = {"depth": 2, "width": 16, "heads": 2, "vocab_size": 5, "grid": (GRID.h, GRID.w)}


@dataclass(frozen=True)
class Case:
    """How to build a model, how many classes its condition takes (0: none), sizes of its other columns."""

    build: Callable[[], AnyOrderModel]
    classes: int = 0
    columns: tuple[int, ...] = ()


@dataclass
class Subject:
    """A model under test with inputs that fit it."""

    model: Any
    classes: int
    columns: tuple[int, ...] = ()

    def condition(self, rows: int) -> Tensor | None:
        if self.columns:
            return several_conditions(rows, (self.classes, *self.columns))
        return torch.arange(rows) % self.classes if self.classes else None

    def tokens(self, rows: int, grid: Grid | None = None, seed: int = 0) -> Tensor:
        n = (grid or self.model.grid).n
        return torch.randint(self.model.vocab_size, (rows, n), generator=seeded(seed))

    def train(self, mode: bool) -> None:
        for module in (self.model, getattr(self.model, "model", None)):
            if isinstance(module, nn.Module):
                module.train(mode)


def several_conditions(rows: int, sizes: tuple[int, ...]) -> Tensor:
    """Class, attributes and captions (rows, columns); row 1 has no caption's end, row 2 nothing at all."""
    columns = [torch.randint(n, (rows,), generator=seeded(i)) if n else -1 for i, n in enumerate(sizes)]
    condition = torch.stack([torch.as_tensor(column).expand(rows) for column in columns], dim=1)
    condition[1:2, -2:] = -1
    condition[2:3] = -1
    return condition


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def transformer(seed: int = 0, **changes: Any) -> AnyOrderTransformer:
    """A tiny transformer whose weights are large enough for confident, varied predictions."""
    return _confident(lambda: AnyOrderTransformer(TransformerConfig(**{**TINY, **changes})), seed, 0.3)


def published(model_class: type[AnyOrderNetwork], seed: int = 0, **changes: Any) -> Any:
    """A tiny model of a published family."""
    config = GPTConfig(**{**TINY, "num_classes": 3, "label_dropout": 0.3, **changes})
    return _confident(lambda: model_class(config), seed, 0.1)  # type: ignore[call-arg]


def _confident(build: Callable[[], nn.Module], seed: int, noise: float) -> Any:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = build()
        for parameter in model.parameters():
            parameter.data.add_(noise * torch.randn_like(parameter))
    return model.eval()


class TabularModel:
    """An exact any-order model: conditionals of an enumerated joint distribution, by marginalisation."""

    def __init__(self, joint: Tensor, grid: Grid):
        """`joint` is (V,) * N, one axis per raster position."""
        self.grid = grid
        self.vocab_size = len(joint)
        self.joint = joint.double().flatten()
        self.images = torch.cartesian_prod(*[torch.arange(len(joint))] * grid.n)

    def forward(
        self, tokens: Tensor, condition: Tensor | None, order: Tensor, grid: Grid | None = None
    ) -> Tensor:
        return incremental(self, tokens, condition, order, grid)

    def start(self, batch_size: int, condition: Tensor | None = None, grid: Grid | None = None) -> Tensor:
        assert condition is None
        assert grid in (None, self.grid)
        return self.joint.expand(batch_size, -1)

    def score(self, state: Tensor, positions: Tensor) -> Tensor:
        p = torch.einsum("bs,snv->bnv", state, F.one_hot(self.images, self.vocab_size).double())
        return p.log().gather(1, positions[..., None].expand(-1, -1, self.vocab_size))

    def append(self, state: Tensor, positions: Tensor, tokens: Tensor) -> Tensor:
        return state * (self.images.T[positions] == tokens[..., None]).all(1)


def tabular(vocab_size: int = 2, grid: Grid = Grid(2, 2), seed: int = 0) -> TabularModel:  # noqa: B008
    logits = 1.2 * torch.randn(vocab_size**grid.n, generator=seeded(seed))
    return TabularModel(logits.softmax(0).reshape([vocab_size] * grid.n), grid)


class Watched:
    """Counts what the loop asks of a model, and holds the loop to the contract: only open positions."""

    def __init__(self, model: AnyOrderModel):
        self.model = model
        self.grid = model.grid
        self.vocab_size = model.vocab_size
        self.calls = self.candidates = self.appends = 0

    def start(self, batch_size: int, condition: Tensor | None = None, grid: Grid | None = None) -> Any:
        self.revealed = torch.zeros(batch_size, (grid or self.grid).n, dtype=torch.bool)
        return self.model.start(batch_size, condition, grid)

    def score(self, state: Any, positions: Tensor) -> Tensor:
        assert not self.revealed.gather(1, positions).any(), "a revealed position was scored"
        self.calls += 1
        self.candidates += positions.shape[1]
        return self.model.score(state, positions)

    def append(self, state: Any, positions: Tensor, tokens: Tensor) -> Any:
        assert not self.revealed.gather(1, positions).any(), "a position was revealed twice"
        self.appends += 1
        self.revealed = self.revealed.scatter(1, positions, True)
        return self.model.append(state, positions, tokens)


def incremental(
    model: AnyOrderModel,
    tokens: Tensor,
    condition: Tensor | None,
    order: Tensor,
    grid: Grid | None = None,
) -> Tensor:
    """Logits (B, N, V) in order steps from `score` and `append`, one position at a time."""
    state = model.start(len(tokens), condition, grid)
    logits = []
    for position in order.split(1, dim=1):
        logits.append(model.score(state, position))
        state = model.append(state, position, tokens.gather(1, position))
    return torch.cat(logits, dim=1)


def _architectures() -> Iterable[tuple[str, dict[str, Any]]]:
    switches = product(
        ("relative", "absolute", "none"), ("absolute", "none"), (False, True), (False, True), (0, 3)
    )
    for following, current, rotary, qk_norm, classes in switches:
        if rotary and "none" in (following, current):
            continue
        words = [f"next={following}", f"current={current}", "rotary" * rotary, "qk_norm" * qk_norm]
        name = ",".join([*filter(None, words), "conditional" if classes else "unconditional"])
        yield (
            name,
            {
                "next_position": following,
                "current_position": current,
                "rotary": rotary,
                "qk_norm": qk_norm,
                "num_classes": classes,
                "dropout": 0.1,
                "token_dropout": 0.2,
                "label_dropout": 0.3,
            },
        )


def _transformer_case(changes: dict[str, Any]) -> Case:
    return Case(lambda: transformer(**changes), changes["num_classes"])


MODELS: dict[str, Case] = {name: _transformer_case(changes) for name, changes in _architectures()}
for schedule in ("constant", "linear", "power-cosine"):
    MODELS[f"guided,{schedule}"] = Case(
        lambda schedule=schedule: Guided(transformer(num_classes=3), GuidanceConfig(2.5, schedule)), 3
    )
CAPTIONS = {"text_vocab": 7, "text_length": 4}
for name, changes, columns in (
    ("class,attributes,text", {"num_classes": 3, "attributes": (4, 2), **CAPTIONS}, (4, 2, 7, 7, 7, 7)),
    ("text,rotary,qk_norm", {"rotary": True, "qk_norm": True, **CAPTIONS}, (7, 7, 7, 7)),
    ("class,attributes", {"num_classes": 3, "attributes": (2,), "location": True}, (2,)),
    ("short captions", {"num_classes": 3, **CAPTIONS}, (7, 7)),
    ("class at every input", {"num_classes": 3, "class_at": "every", "rotary": True}, ()),
    ("grouped", {"num_classes": 3, "grouped": True, "rotary": True, "location": True}, ()),
    ("class at every input,text", {"num_classes": 3, "class_at": "every", **CAPTIONS}, (7, 7, 7, 7)),
):
    switches = {"dropout": 0.1, "token_dropout": 0.2, "label_dropout": 0.3, **changes}
    MODELS[name] = Case(lambda s=switches: transformer(**s), changes.get("num_classes", 0), columns)
    MODELS[f"guided,{name}"] = Case(
        lambda s=switches: Guided(transformer(**s), GuidanceConfig(2.5, "linear")),
        changes.get("num_classes", 0),
        columns,
    )
GROUPED = [name for name in MODELS if "grouped" in name]
PUBLISHED: dict[str, type[AnyOrderNetwork]] = {"randar": RandAR, "arpg": ARPG}
for name, model_class in PUBLISHED.items():
    MODELS[name] = Case(lambda model_class=model_class: published(model_class), 3)
    MODELS[f"guided,{name}"] = Case(
        lambda model_class=model_class: Guided(published(model_class), GuidanceConfig(2.5, "linear")), 3
    )
MODELS["tabular"] = Case(lambda: tabular(3, GRID))

PolicyFactory = Callable[[Grid, Streams], OrderPolicy]


def _named(name: str, per_step: int) -> PolicyFactory:
    return lambda grid, streams: PolicyConfig(name, per_step=per_step).build(grid, streams)


def _inferred(**settings: Any) -> PolicyFactory:
    return lambda grid, streams: InferredOrder(**settings)


def _configured(**settings: Any) -> PolicyFactory:
    return lambda grid, streams: PolicyConfig(**settings).build(grid, streams)


POLICIES: dict[str, PolicyFactory] = {
    f"{name},per_step={k}": _named(name, k) for name in (*STATIC, "random") for k in (1, 4)
}
for score, sign, temperature, (distance, to), k in product(
    SCORES, (1, -1), (0.0, 0.7), ((0.0, "last"), (0.5, "last"), (0.5, "nearest")), (1, 4)
):
    POLICIES[f"{score},sign={sign},temperature={temperature},distance={distance}-{to},per_step={k}"] = (
        _inferred(
            score=score,
            sign=sign,
            temperature=temperature,
            distance=distance,
            distance_to=to,
            per_step=k,
        )
    )
for settings in (
    {"order": "random", "steps": 3, "schedule": "cosine", "min_distance": 1.5},
    {"order": "halton", "steps": 2, "schedule": "one_minus_cos"},
    {"order": "entropy", "sign": -1, "steps": 3, "schedule": "arccos", "min_distance": 1.2},
    {"order": "entropy", "rescore": 0.3},
    {"order": "entropy", "sign": -1, "rescore": 0.5},
    {"order": "margin", "rescore": 0.4, "temperature": 0.7, "distance": 0.5},
    {"order": "max_prob", "rescore": 0.3, "steps": 3, "min_distance": 2.0},
    {"order": "token_likelihood", "rescore": 0.4},
    {"order": "entropy", "sign": -1, "rate_every": 4},
    {"order": "margin", "rate_every": 2, "rescore": 0.4},
    {"order": "token_likelihood", "rate_every": 3},
):
    POLICIES[",".join(f"{key}={value}" for key, value in settings.items())] = _configured(**settings)


@pytest.fixture(params=MODELS)
def subject(request: pytest.FixtureRequest) -> Subject:
    """Every model of `MODELS` in turn."""
    case = MODELS[request.param]
    return Subject(case.build(), case.classes, case.columns)


@pytest.fixture(params=POLICIES)
def policy(request: pytest.FixtureRequest) -> PolicyFactory:
    """Every policy of `POLICIES` in turn."""
    return POLICIES[request.param]
