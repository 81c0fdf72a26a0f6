"""Classifier-free guidance as a wrapper that is itself an any-order model."""

import math
import typing
from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from anyorder import contracts

Schedule = typing.Literal["constant", "linear", "power-cosine"]


@dataclass(frozen=True)
class GuidanceConfig:
    """How strongly samples follow their condition."""

    scale: float = 1.0
    """1 is no guidance, larger follows the condition more closely; the final scale of schedules that grow."""
    schedule: Schedule = "constant"
    """Constant, or growing from 1 to the scale: linearly, or by a power-cosine."""
    power: float = 2.75
    """Exponent of the power-cosine schedule; larger waits longer."""
    interval: tuple[float, float] = (0.0, 1.0)
    """Shares of the image, 0 to 1, between which guidance acts, both included; elsewhere the scale is 1."""
    locations: typing.Literal["guided", "unguided"] | None = None
    """Inferred orders rate positions by the guided distribution, or by the conditional one alone; by default
    guided where the generator rates, and unguided where a scoring model does."""

    renamed: typing.ClassVar[dict[str, str]] = {"locations=guided": "locations="}
    """Versions before this default guided no scoring model; see `settings.read_stored`."""

    def __post_init__(self) -> None:
        contracts.require(math.isfinite(self.scale), f"scale must be a number, got {self.scale}")
        begin, end = self.interval
        text = f"interval must be two rising shares in [0, 1], got {begin:g} and {end:g}"
        contracts.require(0 <= begin <= end <= 1, text)
        text = f"locations must be guided or unguided, got '{self.locations}'"
        contracts.require(self.locations in (None, "guided", "unguided"), text)
        text = f"schedule must be constant, linear or power-cosine, got '{self.schedule}'"
        contracts.require(self.schedule in typing.get_args(Schedule), text)
        contracts.require(self.power > 0, f"power must be > 0, got {self.power}")
        text = f"power={self.power} is the exponent of schedule=power-cosine: choose that, or leave power out"
        contracts.require(self.power == GuidanceConfig.power or self.schedule == "power-cosine", text)

    def require_effect(self, *, rated: bool, scored: bool, scaled: bool) -> None:
        """A ValueError for settings that have no effect.

        `rated`: the order rates positions by a model's distributions; `scored`: by those of a scoring model;
        `scaled`: some images are guided at all.
        """
        unused = [f.name for f in fields(self)[1:] if getattr(self, f.name) != f.default]
        text = f"{' and '.join(unused)} has no effect at scale=1: give a scale, say 2, or leave it out"
        contracts.require(scaled or not unused, text)
        text = f"locations={self.locations} is about inferred orders, which rate positions: leave it out"
        contracts.require(self.locations is None or rated, text)
        text = "locations=unguided has no effect: a scoring model is unguided by default; leave it out"
        contracts.require(self.locations != "unguided" or not scored, text)

    def at(self, fraction: float) -> float:
        """The scale when this share (0 to 1) of the image is revealed."""
        if not self.interval[0] <= fraction <= self.interval[1]:
            return 1.0
        cosine = (1 - math.cos(math.pi * fraction**self.power)) / 2
        ramp = {"constant": 1.0, "linear": fraction, "power-cosine": cosine}
        return 1 + (self.scale - 1) * ramp[self.schedule]


@dataclass
class GuidedState:
    """The wrapped model's state of 2B rows, conditional then unconditional, and how many are revealed.

    `revealed` is (B,) int64 once images differ.
    """

    inner: typing.Any
    revealed: int | Tensor
    n: int
    unguided: Tensor | None = None  #: (B, M, V), the last conditional logits, for unguided locations.
    twice: tuple[Tensor, int, Tensor] | None = None  #: The last positions, their version, and (2B, M).


def rating_log_probs(state: typing.Any, log_p: Tensor) -> Tensor:
    """What positions are rated by (B, M, V): `log_p` of what `score` returned, or that without guidance."""
    unguided = getattr(state, "unguided", None)
    return log_p if unguided is None else unguided.float().log_softmax(-1)


class Guided:
    """Logits u + s (c - u) from conditional c and unconditional u, both computed in one batch."""

    copies = 2  #: Rows of the model for each image.

    def __init__(self, model: contracts.AnyOrderModel, config: GuidanceConfig):
        """Wrap `model`; it is not copied."""
        self.model, self.config = model, config
        self.vocab_size, self.grid = model.vocab_size, model.grid
        self.joint_steps = getattr(model, "joint_steps", False)

    def forward(
        self,
        tokens: Tensor,
        condition: Tensor | None,
        order: Tensor,
        grid: contracts.Grid | None = None,
        sizes: Sequence[int] | None = None,
    ) -> Tensor:
        """Teacher-forced guided logits (B, N, V) in order steps."""
        both = (tokens.repeat(2, 1), _both(condition), order.repeat(2, 1), grid)
        logits = self.model.forward(*both) if sizes is None else self._grouping.forward(*both, sizes)
        n = tokens.shape[1]
        steps = torch.tensor(sizes or [1] * n)
        begins = (steps.cumsum(0) - steps).repeat_interleave(steps).tolist()
        scale = torch.tensor([self.config.at(i / n) for i in begins], dtype=torch.float32)
        return _mix(logits, scale.to(logits.device)[None, :, None])

    def start(
        self, batch_size: int, condition: Tensor | None = None, grid: contracts.Grid | None = None
    ) -> GuidedState:
        """State of 2B rows."""
        inner = self.model.start(2 * batch_size, _both(condition), grid)
        return GuidedState(inner, 0, (grid or self.grid).n)

    def score(self, state: GuidedState, positions: Tensor) -> Tensor:
        """Guided logits (B, M, V)."""
        return self._guided(state, self.model.score(state.inner, _twice(state, positions)))

    def _guided(self, state: GuidedState, logits: Tensor) -> Tensor:
        if self.config.locations == "unguided":
            state.unguided = logits.chunk(2)[0]
        if isinstance(state.revealed, int):
            return _mix(logits, self.config.at(state.revealed / state.n))
        scales = [self.config.at(revealed / state.n) for revealed in state.revealed.tolist()]
        return _mix(logits, torch.tensor(scales, device=logits.device, dtype=torch.float32)[:, None, None])

    def append(self, state: GuidedState, positions: Tensor, tokens: Tensor) -> GuidedState:
        """Both halves see the same tokens."""
        inner = self.model.append(state.inner, _twice(state, positions), tokens.repeat(2, 1))
        return GuidedState(inner, state.revealed + positions.shape[1], state.n)

    def append_some(
        self, state: GuidedState, positions: Tensor, tokens: Tensor, counts: Tensor
    ) -> GuidedState:
        """Both halves see the same tokens; then images may differ in how much is revealed, and in scale."""
        both = (x.repeat(2, *[1] * (x.ndim - 1)) for x in (positions, tokens, counts))
        inner = self.model.append_some(state.inner, *both)  # type: ignore[attr-defined]
        return GuidedState(inner, state.revealed + counts, state.n)

    @property
    def grouped(self) -> bool:
        """As the wrapped model."""
        return getattr(self.model, "grouped", False)

    @property
    def _grouping(self) -> contracts.GroupingModel:
        if not isinstance(self.model, contracts.GroupingModel):
            raise ValueError("the guided model predicts no groups: reveal positions as candidates")
        return self.model

    def score_group(self, state: GuidedState, positions: Tensor) -> Tensor:
        """Guided logits (B, K, V)."""
        return self._guided(state, self._grouping.score_group(state.inner, positions.repeat(2, 1)))

    def append_group(self, state: GuidedState, tokens: Tensor) -> GuidedState:
        """Both halves see the same tokens."""
        inner = self._grouping.append_group(state.inner, tokens.repeat(2, 1))
        return GuidedState(inner, state.revealed + tokens.shape[1], state.n)

    def locate(self, state: GuidedState, revealed: Tensor) -> Tensor:
        """Log q(next position) of the conditional half, (B, N) nats; guidance is for content only."""
        if not isinstance(self.model, contracts.LocatingModel):
            raise ValueError("the guided model has no location head: choose another order")
        return self.model.locate(state.inner, revealed.repeat(2, 1)).chunk(2)[0]


def _both(condition: Tensor | None) -> Tensor:
    if condition is None:
        text = "guidance needs class labels, attributes or a prompt: give one, or leave guidance_scale at 1"
        raise ValueError(text)
    return torch.cat((condition, torch.full_like(condition, -1)))


def _twice(state: GuidedState, positions: Tensor) -> Tensor:
    """Positions of both halves: for those of the last call the same memory, by which a model knows them."""
    if state.twice is not None and contracts.same_memory(positions, *state.twice[:2]):
        return state.twice[2][:, : positions.shape[1]]
    twice = positions.repeat(2, 1)
    state.twice = None if positions.is_inference() else (positions, positions._version, twice)
    return twice


def _mix(logits: Tensor, scale: float | Tensor) -> Tensor:
    conditional, unconditional = logits.float().chunk(2)
    return (conditional - unconditional).mul_(scale).add_(unconditional)  # in place: V numbers a candidate
