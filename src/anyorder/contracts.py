"""The notation, and the three contracts that let methods and models meet::

    symbol   code     meaning
    x        tokens   (B, N) int64, codebook index at each *raster* position, in [0, V)
    pi       order    (B, N) int64, order[b, i] = raster position revealed at step i
    pi^-1    rank     (B, N) int64, rank[b, p] = step at which position p is revealed
    h, w, N  grid     Grid(h, w), N = h * w, position p = (p // w, p % w)
    c        condition  (B,) int64 class labels, -1 for none, or (B, 1 + A + L) int64: class, A attributes,
                        L caption tokens, -1 for nothing; or None

Factorisation (OAR, arXiv 2504.17069, Sec. 3): log p(x | pi, c) = sum_i log p(x[pi_i] | x[pi_<i], pi_<=i, c).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn


def exact(x: Tensor) -> Tensor:
    """`x` in float64; on the CPU where it was on one of Apple's GPUs, which have none."""
    return (x.cpu() if x.is_mps else x).double()


def require(holds: bool, message: str) -> None:
    """Raise a ValueError with this message, unless the condition holds."""
    if not holds:
        raise ValueError(message)


def at_least(least: float, settings: Any, *names: str) -> None:
    """A ValueError unless each of these settings is `least` or more, and finite; None passes."""
    for name in names:
        value = getattr(settings, name)
        require(value is None or least <= value < torch.inf, f"{name} must be >= {least}, got {value}")


@dataclass(frozen=True)
class Grid:
    """A grid of h x w patches; raster position p lies at row p // w, column p % w."""

    h: int
    w: int

    def __post_init__(self) -> None:
        text = f"a grid needs at least one row and one column, got {self.h} x {self.w}"
        require(min(self.h, self.w) >= 1, text)

    @property
    def n(self) -> int:
        """Number of positions, N = h * w."""
        return self.h * self.w

    def coordinates(self, device: torch.device | str | None = None) -> Tensor:
        """Row and column of every raster position, (N, 2) float32, in patches."""
        p = torch.arange(self.n, device=device)
        return torch.stack((p // self.w, p % self.w), dim=1).float()


def class_labels(condition: Tensor) -> Tensor:
    """The class labels (B,) of a condition (B,) or (B, 1 + A + L)."""
    return condition if condition.ndim == 1 else condition[:, 0]


def same_memory(positions: Tensor, scored: Tensor, version: int) -> bool:
    """Whether these are the first of the positions that were scored; values, on a GPU, would take a wait."""
    same = positions.data_ptr() == scored.data_ptr() and positions.stride() == scored.stride()
    return same and positions.shape[1] <= scored.shape[1] and scored._version == version


@runtime_checkable
class Tokenizer(Protocol):
    """Turns images into a grid of codebook indices and back."""

    vocab_size: int
    factor: int  #: Pixels per patch side: H x W pixels have (H / factor) x (W / factor) tokens.

    def encode(self, images: Tensor) -> Tensor:
        """Images (B, 3, H, W) float in [-1, 1] to tokens (B, N) int64."""

    def decode(self, tokens: Tensor, grid: Grid) -> Tensor:
        """Tokens (B, N) int64 to images (B, 3, H, W) float in [-1, 1]."""


@runtime_checkable
class AnyOrderModel(Protocol):
    """p(token at the next position | tokens so far, their positions, the next position, condition)."""

    vocab_size: int
    grid: Grid  #: The grid of training; the default of `forward` and `start`.

    def forward(
        self, tokens: Tensor, condition: Tensor | None, order: Tensor, grid: Grid | None = None
    ) -> Tensor:
        """Teacher-forced logits (B, N, V) in order steps; step i never depends on tokens of steps >= i."""

    def start(self, batch_size: int, condition: Tensor | None = None, grid: Grid | None = None) -> Any:
        """The state before anything is revealed."""

    def score(self, state: Any, positions: Tensor) -> Tensor:
        """Logits (B, M, V) of open positions (B, M) int64; candidates are blind to one another."""

    def append(self, state: Any, positions: Tensor, tokens: Tensor) -> Any:
        """Reveal tokens (B, K) at positions (B, K), in sequence; the old state is used up.

        Never recomputes what `score` has computed for the first of the positions.
        """


@runtime_checkable
class LocatingModel(AnyOrderModel, Protocol):
    """A model with a location head: q(order, x) = prod q(position) q(token | position)."""

    def joint(
        self, tokens: Tensor, condition: Tensor | None, order: Tensor, grid: Grid | None = None
    ) -> tuple[Tensor, Tensor]:
        """Logits (B, N, V) as of `forward`; log q(position) (B, N, N) [step, position], -inf if revealed."""

    def locate(self, state: Any, revealed: Tensor) -> Tensor:
        """Log q(next position), (B, N) float32 nats, -inf where `revealed` (B, N) bool; state unchanged."""


@runtime_checkable
class GroupingModel(AnyOrderModel, Protocol):
    """A model that can predict the positions of one step together, each aware of the others of its step.

    A token then depends on all tokens revealed before its step, and on where, not on what, the others of its
    step are: p(x) is the product over steps and their positions of p(token | tokens before, positions).
    """

    @property
    def grouped(self) -> bool:
        """Whether it was trained so; else the positions of one step are candidates, blind to one another."""

    def forward(
        self,
        tokens: Tensor,
        condition: Tensor | None,
        order: Tensor,
        grid: Grid | None = None,
        sizes: Sequence[int] | None = None,
    ) -> Tensor:
        """As of `AnyOrderModel`, for steps that reveal `sizes` positions; None, or ones: one by one."""

    def score_group(self, state: Any, positions: Tensor) -> Tensor:
        """Logits (B, K, V) of the positions (B, K) int64 of the next step, which see one another."""

    def append_group(self, state: Any, tokens: Tensor) -> Any:
        """Reveal tokens (B, K) at the positions that `score_group` scored last; the old state is used up."""


class AdaptiveModel(AnyOrderModel, Protocol):
    """A model whose images may reveal different numbers of positions at a step."""

    def append_some(self, state: Any, positions: Tensor, tokens: Tensor, counts: Tensor) -> Any:
        """`append` the first `counts` (B,) int64 columns of each image, 0 for images that are finished.

        Columns behind them repeat the last one; the largest count is K. From then on, `score` is also given
        closed positions of images with fewer open ones than others; its logits of these are not used.
        """


class TokenizerNetwork(nn.Module, Tokenizer):
    """A tokenizer with weights, as folders and pipelines hold it."""

    config: Any  #: The dataclass instance that it was built from.


class AnyOrderNetwork(nn.Module, AnyOrderModel):
    """An any-order model with weights, as folders and pipelines hold it."""

    config: Any  #: The dataclass instance that it was built from.
    num_classes: int  #: Number of class labels; 0: the model takes none.


@dataclass
class Progress:
    """What a policy may look at: positions, never tokens."""

    grid: Grid
    revealed: Tensor  #: (B, N) bool, positions already known or generated.
    last: Tensor  #: (B,) int64, the position revealed last, -1 before the first.
    step: int  #: How many reveals the loop has made.
    total: int  #: Positions of each image that are to be revealed in all.
    open: int  #: Positions of each image that are still open; the most of any, where they differ.
    ratings: Tensor  #: (B, N) float32, the last rating of each position; 0 before.
    rated_at: Tensor  #: (B, N) int64, the step at which each position was scored last, -1 before.
    revealed_at: Tensor  #: (B, N) int64, the step at which each was revealed, -1 for open and known ones.
    location: Tensor | None = None  #: (B, N) float32, log q(next position), for policies that are `located`.
    #: Standard Gumbel numbers (B, M) float32 of this step for positions (B, M) or (M,).
    noise: Callable[[Tensor], Tensor] | None = None

    @classmethod
    def start(cls, grid: Grid, batch_size: int, device: torch.device | str) -> "Progress":
        """Before anything is revealed."""
        numbers = torch.zeros(batch_size, grid.n, dtype=torch.float32, device=device)
        never = torch.full_like(numbers, -1, dtype=torch.int64)
        revealed, last = torch.zeros_like(never, dtype=torch.bool), never[:, 0].clone()
        return cls(grid, revealed, last, 0, grid.n, grid.n, numbers, never, never.clone())

    def give(self, positions: Tensor) -> None:
        """Mark positions (B, K) as known."""
        self.revealed.scatter_(1, positions, True)
        self.last = positions[:, -1]
        self.open = self.total = self.open - positions.shape[1]

    def reveal(self, positions: Tensor, counts: Tensor | None = None) -> None:
        """Mark positions (B, K) as revealed at this step, and go to the next step.

        `counts` (B,) says how many are different, where that is not K.
        """
        self.revealed.scatter_(1, positions, True)
        self.revealed_at.scatter_(1, positions, self.step)
        self.last = positions[:, -1]
        if counts is None:
            self.open -= positions.shape[1]
        else:  # a GPU waits here for the number
            self.open = int((~self.revealed).sum(1).max())
        self.step += 1


class OrderPolicy(Protocol):
    """Decides where to go: `propose` candidates, `rate` them by the model's distributions, `select` some."""

    @property
    def name(self) -> str:
        """For reports."""

    @property
    def token_blind(self) -> bool:
        """True if the choice ignores the candidate tokens; only then is p(x) a normalised density."""

    @property
    def rated(self) -> bool:
        """True if `select` needs ratings: every candidate is scored to decide where."""

    @property
    def located(self) -> bool:
        """True if it reads `Progress.location`, which takes a `LocatingModel`."""

    @property
    def look_ahead(self) -> int:
        """How many of the best candidates are rated anew by expected information; 0: none."""

    def subset(self, rows: Tensor) -> "OrderPolicy":
        """The same policy for some images (R,) int64 of the batch."""

    def propose(self, progress: Progress) -> Tensor:
        """Candidate positions (B, M) int64, all of them open."""

    def rate(self, log_p: Tensor, tokens: Tensor) -> Tensor:
        """Ratings (B, M) in nats, larger is revealed earlier, from log-probabilities (B, M, V)."""

    def select(self, progress: Progress, candidates: Tensor, ratings: Tensor) -> Tensor:
        """Columns (B, K) int64 of `candidates` to reveal now, all different; ratings are 0 if not `rated`."""


@dataclass
class Step:
    """One turn of the loop: K positions were revealed in each of B images, or up to K where they differ."""

    index: int
    total: int  #: Positions of each image that are to be revealed in all.
    positions: Tensor  #: (B, K) int64.
    tokens: Tensor  #: (B, K) int64.
    log_prob: Tensor  #: (B, K) float32, nats: of each token under the model when it was scored.
    #: (B, K) bool, False where a column repeats what was revealed before it; None: images are alike.
    valid: Tensor | None = None


@dataclass
class Trace:
    """B generated images of N tokens, and the order they were revealed in."""

    tokens: Tensor  #: (B, N) int64 in raster order.
    order: Tensor  #: (B, N) int64; given positions (completion) come first, in raster order.
    log_prob: Tensor  #: (B, N) float32 in order steps, nats; zero for given positions.
    steps: Tensor  #: (B,) int64, how many steps revealed something.
