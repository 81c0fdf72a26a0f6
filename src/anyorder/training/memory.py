"""Out of memory in training: the error names the batch that fits."""

from __future__ import annotations

import traceback
from typing import TYPE_CHECKING

import torch

from anyorder.inference import processes
from anyorder.inference.device import out_of_memory

if TYPE_CHECKING:
    from anyorder.training.trainer import Trainer


def advice(trainer: Trainer) -> str:
    """The message. Halves are tried out; one of several processes cannot try without the others."""
    before, alone = trainer.config.batch_size, processes.size() == 1
    halves = [before >> i for i in range(1, before.bit_length())]
    size = next((n for n in halves if not alone or _fits(trainer, n)), 0)
    accumulation = trainer.config.accumulation * before // max(size, 1)
    instead = f"train.batch_size={size} train.accumulation={accumulation} {'fits' if alone else 'may fit'}"
    same = ", with steps of the same size" if size and before % size == 0 else ""
    smaller = f"{instead}{same}" if size else "choose a smaller model"
    return f"out of memory with train.batch_size={before}: {smaller}"


def _fits(trainer: Trainer, size: int) -> bool:
    """Whether a pass over so many examples fits into memory; its gradients are dropped."""
    trainer.optimizer.zero_grad()
    rows = trainer.indices(trainer.step_number, 0)[:size]
    try:
        with torch.autocast(trainer.device.type, torch.bfloat16, enabled=trainer.bf16):
            total, _ = trainer.loss(rows, trainer.step_number, trainer.generator)
        total.backward()
    except RuntimeError as e:
        if not out_of_memory(e):
            raise
        traceback.clear_frames(e.__traceback__)
        return False
    return True
