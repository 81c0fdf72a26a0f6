"""The log of a training: `metrics.jsonl`, and TensorBoard."""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from anyorder.files import write_text
from anyorder.inference import processes


class Log:
    """One JSON line per report in `metrics.jsonl`, and TensorBoard if asked for.

    Lines beyond `step`, and half lines that a kill left, are dropped when the log is opened. Values that are
    not finite are written as null. Of several processes the leader alone writes.
    """

    def __init__(self, folder: Path, step: int, tensorboard: bool):
        self.path, self.board, self.writes = folder / "metrics.jsonl", None, processes.leads()
        if self.writes:
            write_text(self.path, "".join(_lines_until(step, self.path)))
            self.board = _summary_writer(folder, step) if tensorboard else None

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Append the values of a step."""
        if not self.writes:
            return
        finite = {name: value if math.isfinite(value) else None for name, value in values.items()}
        with open(self.path, "a", encoding="utf-8") as f:
            f.write(json.dumps({"step": step, **finite}) + "\n")
        if self.board:
            for name, value in values.items():
                self.board.add_scalar(name, value, step)

    def __enter__(self) -> Log:
        return self

    def __exit__(self, *_: object) -> None:
        if self.board:
            self.board.close()


def _lines_until(step: int, path: Path) -> Iterator[str]:
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True) if path.is_file() else []
    for line in lines:
        with contextlib.suppress(json.JSONDecodeError):
            if json.loads(line)["step"] <= step:
                yield line


def _summary_writer(folder: Path, step: int) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as e:
        raise ValueError("tensorboard=true needs TensorBoard: pip install 'anyorder[log]'") from e
    return SummaryWriter(folder, purge_step=step + 1)
