"""Where the orders of a training come from: random, fixed, from a cache, or extracted while the model trains.

All are a `Source`; it is the only thing in which trainings of the any-order model differ.
"""

import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from anyorder.contracts import Grid
from anyorder.data.caches import TokenSet
from anyorder.files import load_array, save_array
from anyorder.inference import processes
from anyorder.inference.device import device
from anyorder.method.decoding import extract_orders
from anyorder.method.policy_config import PolicyConfig
from anyorder.method.sampling import Streams
from anyorder.orders import inverse, random_orders

Source = Callable[[np.ndarray, int], Tensor | None]
"""(rows (B,), step from 1) -> orders (B, N) int64; None for random ones."""
Orders = Callable[[np.ndarray, int, torch.Generator], tuple[Tensor, Tensor]]
"""(rows (B,), step from 1, generator) -> orders (B, N) int64, and which are not random ones (B,) bool."""
_UNKNOWN = np.iinfo(np.uint16).max


def mixed_orders(source: Source, grid: Grid, share: Callable[[int], float], jitter: float) -> Orders:
    """Orders of a source, with random ones among them, by a probability that `share` gives for each step.

    `jitter` is the deviation in steps of Gaussian noise on the ranks of the source's orders.
    """

    def orders(rows: np.ndarray, step: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        on_cpu = torch.Generator().manual_seed(generator.initial_seed())  # the same orders on any device
        found = source(rows, step)
        from_source = torch.full((len(rows),), found is not None)
        order = random_orders(len(rows), grid, on_cpu) if found is None else found
        if jitter:
            order = (inverse(order) + jitter * torch.randn(order.shape, generator=on_cpu)).argsort(1)
        if share(step):
            at_random = torch.rand(len(rows), 1, generator=on_cpu) < share(step)
            order = torch.where(at_random, random_orders(len(rows), grid, on_cpu), order)
            from_source = from_source & ~at_random[:, 0]
        return order, from_source

    return orders


class OnlineOrders:
    """A `Source`: each image's order is extracted when the image first comes up in a round of `every` epochs.

    Every round has a file `online/round-NNN.npy`: what a killed run wrote ahead of its last checkpoint is
    written again with the same numbers, and later rounds never change it.
    """

    scorer: nn.Module
    """Moving average of the model's weights; see `set_scorer`."""

    def __init__(
        self, folder: Path, tokens: TokenSet, policy: PolicyConfig, every: int, batch_size: int, *, warm: bool
    ):
        """Orders for the images of `tokens`, in `folder`/online; with `batch_size` examples in a step.

        `warm`: the model can score from the start; otherwise orders are random in the first round.
        """
        self.folder, self.tokens, self.policy = folder / "online", tokens, policy
        self.steps, self.warm = math.ceil(len(tokens) * every / batch_size), warm
        self.round, self.orders = -1, np.empty((0, 0), np.uint16)

    def set_scorer(self, scorer: nn.Module) -> None:
        """Take the scoring model; the trainer calls this before the first step."""
        self.scorer = scorer

    def __call__(self, rows: np.ndarray, step: int) -> Tensor | None:
        """See `Source`."""
        current = (step - 1) // self.steps
        if not (current or self.warm):
            return None
        if current != self.round:
            path, shape = self.folder / f"round-{current:03d}.npy", (len(self.tokens), self.tokens.grid.n)
            if processes.leads() and not path.is_file():
                save_array(path, np.full(shape, _UNKNOWN, np.uint16))
            processes.barrier()
            # The leader's changes reach the file, those of the others only their own memory.
            self.orders, self.round = np.load(path, mmap_mode="r+" if processes.leads() else "c"), current
            processes.barrier()
        missing = np.unique(rows[self.orders[rows, 0] == _UNKNOWN])
        for some, found in processes.gathered((missing, self._extract(missing) if len(missing) else missing)):
            if len(some):
                self.orders[some, 1:] = found[:, 1:]
                self.orders[some, 0] = found[:, 0]  # last: a kill in between leaves them missing
        return torch.from_numpy(self.orders[rows].astype(np.int64))

    def evaluations(self) -> int:
        """Candidate evaluations of all extractions so far, from the round files."""
        rounds = map(load_array, self.folder.glob("round-*.npy"))
        extracted = sum(int((orders[:, 0] != _UNKNOWN).sum()) for orders in rounds)
        return extracted * self.policy.evaluations(self.tokens.grid.n)

    def _extract(self, rows: np.ndarray) -> np.ndarray:
        batch, labels = (x.to(device()) for x in self.tokens.batch(rows))
        streams = Streams(rows.tolist(), device())
        policy = self.policy.build(self.tokens.grid, streams)
        # Ratings are computed in float32: in bf16 other orders come out (Kendall's tau 0.72 for margin).
        with torch.autocast(device().type, enabled=False):
            found = extract_orders(self.scorer, batch, policy, streams, condition=labels)  # type: ignore[arg-type]
        return found.order.cpu().numpy().astype(np.uint16)
