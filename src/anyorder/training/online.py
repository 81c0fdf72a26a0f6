"""Orders extracted while a model trains, by the moving average of its weights, again every k epochs."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from anyorder.data.caches import TokenSet
from anyorder.files import load_array, save_array
from anyorder.inference.device import device
from anyorder.method.decoding import extract_orders
from anyorder.method.policy_config import PolicyConfig
from anyorder.method.sampling import Streams
from anyorder.orders import random_orders

_UNKNOWN = np.iinfo(np.uint16).max


class OnlineOrders:
    """The images' own orders, (B, N) int64, each extracted when its image first comes up in a round.

    A round lasts `every` epochs and has a file of its own, `online/round-NNN.npy`: what a killed run wrote
    ahead of its last checkpoint is written again with the same numbers, and later rounds never change it.
    """

    scorer: nn.Module | None = None
    """Moving average of the model's weights; see `watch`."""

    def __init__(
        self, folder: Path, tokens: TokenSet, policy: PolicyConfig, every: int, batch_size: int, *, warm: bool
    ):
        """Orders for the images of `tokens`, in `folder`/online.

        Args:
            folder: of the training.
            tokens: the training split.
            policy: how orders are extracted.
            every: epochs in a round, at least 1.
            batch_size: examples in a step.
            warm: whether the model can score from the start; otherwise orders are random in the first round.
        """
        self.folder, self.tokens, self.policy = folder / "online", tokens, policy
        self.steps, self.warm = math.ceil(len(tokens) * every / batch_size), warm
        self.round = -1
        self.orders = np.empty((0, 0), np.uint16)

    def watch(self, scorer: nn.Module) -> None:
        """Take the model that scores; the trainer calls this before the first step."""
        self.scorer = scorer

    def __call__(self, rows: np.ndarray, step: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Orders of `rows` at a step of training, from 1, and whether they are the images' own (B,) bool."""
        this = (step - 1) // self.steps
        is_own = torch.full((len(rows),), this > 0 or self.warm)
        if not is_own.any():
            return random_orders(len(rows), self.tokens.grid, generator), is_own
        if this != self.round:
            self._open(this)
        missing = np.unique(rows[self.orders[rows, 0] == _UNKNOWN])
        if len(missing):
            self.orders[missing] = self._extract(missing)
        return torch.from_numpy(self.orders[rows].astype(np.int64)), is_own

    def evaluations(self) -> int:
        """Candidate evaluations that extraction has cost so far, by what the round files hold."""
        files = [load_array(path) for path in sorted(self.folder.glob("round-*.npy"))]
        extracted = sum(int((orders[:, 0] != _UNKNOWN).sum()) for orders in files)
        return extracted * self.policy.evaluations(self.tokens.grid.n)

    def _open(self, this: int) -> None:
        """The file of a round, made if need be, all unknown."""
        path, shape = self.folder / f"round-{this:03d}.npy", (len(self.tokens), self.tokens.grid.n)
        if not path.is_file():
            save_array(path, np.full(shape, _UNKNOWN, np.uint16))
        self.orders, self.round = np.load(path, mmap_mode="r+"), this

    def _extract(self, rows: np.ndarray) -> np.ndarray:
        assert self.scorer is not None, "the trainer has not handed over the model"
        batch, labels = (x.to(device()) for x in self.tokens.batch(rows))
        streams = Streams(rows.tolist(), device())
        policy = self.policy.build(self.tokens.grid, streams)
        found = extract_orders(self.scorer, batch, policy, streams, condition=labels)  # type: ignore[arg-type]
        return found.order.cpu().numpy().astype(np.uint16)
