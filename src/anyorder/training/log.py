"""The log of a training: `metrics.jsonl`, TensorBoard, Weights & Biases, and loggers of your own."""

import contextlib
import json
import math
import os
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from PIL import Image

from anyorder import families
from anyorder.files import write_text
from anyorder.inference import processes
from anyorder.training.config import TrainConfig


class Logger(Protocol):
    """Where a training reports to, beside `metrics.jsonl`; an own one is made as Class(folder, step)."""

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Values of a step by name; they may be infinite or NaN."""

    def images(self, step: int, images: Mapping[str, Image.Image]) -> None:
        """Figures of a step by name: samples, and maps of their orders."""

    def close(self) -> None:
        """The training ends, or is interrupted."""


class Log(contextlib.AbstractContextManager["Log"]):
    """One JSON line per report in `metrics.jsonl`, and the loggers that the configuration asks for.

    Lines beyond `step`, and half lines that a kill left, are dropped when the log is opened. Values that are
    not finite are written as null. Of several processes the leader alone writes.
    """

    def __init__(self, folder: Path, step: int, config: TrainConfig):
        self.path, self.writes = folder / "metrics.jsonl", processes.leads()
        self.loggers: list[Logger] = []
        if self.writes:
            own = [families.resolve("loggers", config.logger)] if config.logger else []
            kinds: list[Any] = [TensorBoard] * config.tensorboard + [WeightsAndBiases] * config.wandb + own
            self.loggers = [kind(folder, step) for kind in kinds]
            write_text(self.path, "".join(_lines_until(step, self.path)))

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Append the values of a step."""
        if not self.writes:
            return
        finite = {name: value if math.isfinite(value) else None for name, value in values.items()}
        with open(self.path, "a", encoding="utf-8") as f:
            f.write(json.dumps({"step": step, **finite}) + "\n")
        for logger in self.loggers:
            logger.scalars(step, values)

    def images(self, step: int, images: Mapping[str, Image.Image] | None) -> None:
        """Pass figures on to the loggers; None: there are none."""
        for logger in self.loggers if images else ():
            logger.images(step, images or {})

    def __exit__(self, *_: object) -> None:
        for logger in self.loggers:
            logger.close()


class TensorBoard:
    """Event files in the folder."""

    def __init__(self, folder: Path, step: int):
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as e:
            raise ValueError("tensorboard=true needs TensorBoard: pip install 'anyorder[log]'") from e
        self.board = SummaryWriter(folder, purge_step=step + 1)

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """See `Logger`."""
        for name, value in values.items():
            self.board.add_scalar(name, value, step)

    def images(self, step: int, images: Mapping[str, Image.Image]) -> None:
        """See `Logger`."""
        for name, image in images.items():
            self.board.add_image(name, np.asarray(image), step, dataformats="HWC")

    def close(self) -> None:
        """See `Logger`."""
        self.board.close()


class WeightsAndBiases:
    """A run of Weights & Biases; the same folder goes on with the same run."""

    def __init__(self, folder: Path, step: int):
        try:
            import wandb
        except ImportError as e:
            raise ValueError("wandb=true needs Weights & Biases: pip install 'anyorder[log]'") from e
        number = folder / "wandb.id"
        if step == 0 or not number.is_file():
            write_text(number, uuid.uuid4().hex)
        project = os.environ.get("WANDB_PROJECT", "anyorder")
        self.image = wandb.Image
        self.run = wandb.init(
            project=project, name=folder.name, dir=folder, id=number.read_text("utf-8"), resume="allow"
        )

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """See `Logger`."""
        self.run.log(dict(values), step=step)

    def images(self, step: int, images: Mapping[str, Image.Image]) -> None:
        """See `Logger`."""
        self.run.log({name: self.image(image) for name, image in images.items()}, step=step)

    def close(self) -> None:
        """See `Logger`."""
        self.run.finish()


def _lines_until(step: int, path: Path) -> Iterator[str]:
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True) if path.is_file() else []
    for line in lines:
        with contextlib.suppress(json.JSONDecodeError):
            if json.loads(line)["step"] <= step:
                yield line
