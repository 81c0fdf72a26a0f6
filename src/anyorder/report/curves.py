"""Curves of training logs and of measurements."""

from __future__ import annotations

import json
import typing
from collections import abc
from pathlib import Path

import numpy as np
from PIL import Image

from anyorder.data.classes import display_name
from anyorder.inference import figures

if typing.TYPE_CHECKING:
    from matplotlib.axes import Axes

Rows = abc.Sequence[abc.Mapping[str, typing.Any]]
HELD_OUT = ("validation_nll", "test_nll", "test_loss")


def loss_curves(runs: abc.Sequence[tuple[str, str | Path]], starts: list[int] | None = None) -> Image.Image:
    """Training loss (thin: as logged, thick: smoothed), held-out loss (dots) and speed of several runs.

    Args:
        runs: (name, path of a `metrics.jsonl`): lines with `step` and `loss`, some with
            `validation_nll`, `test_nll` or `test_loss`, some with `examples_per_second`. Where a resumed run
            repeats a step, the last counts.
        starts: steps that the models were trained for before; 0 by default.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: a line is not JSON, or a file holds no loss at all.
    """
    logs = []
    for (name, path), start in zip(runs, starts or [0] * len(runs), strict=True):
        logs.append((name, [{**line, "step": line["step"] + start} for line in read_metrics(path)]))
        if not any("loss" in line for line in logs[-1][1]):
            raise ValueError(f"{path} holds no losses yet: train for a while and try again")
    with_speed = any("examples_per_second" in line for _, log in logs for line in log)
    with figures.styled_figure(9.2 if with_speed else 5.6, 3.4) as figure:
        panels = figure.subplots(1, 1 + with_speed, squeeze=False, width_ratios=[1.7, 1][: 1 + with_speed])[0]
        for i, (name, log) in enumerate(logs):
            _plot_run(panels, name, log, figures.COLOURS[i % len(figures.COLOURS)])
        for axis, label in zip(panels, ("loss (nats per token)", "examples per second"), strict=False):
            axis.set(xlabel="step", ylabel=label)
            axis.margins(x=0.02)
        if with_speed:
            panels[1].set_ylim(bottom=0)
        # The steep fall of the first steps would hide all differences: let the curves enter from above.
        curves = [_smooth(_series(log, "loss")[1]) for _, log in logs]
        curves += [values for _, log in logs for key in HELD_OUT if len(values := _series(log, key)[1])]
        top = max(values[len(values) // 20 :].max() for values in curves)
        panels[0].set_ylim(top=top + 0.05 * (top - panels[0].get_ylim()[0]))
        panels[0].legend(loc="upper right")
        return figures.rendered(figure)


def _plot_run(panels: abc.Sequence[Axes], name: str, log: Rows, colour: str) -> None:
    shown, (steps, losses) = display_name(name, mathtext=True), _series(log, "loss")
    panels[0].plot(steps, losses, color=colour, alpha=0.25, linewidth=0.8)
    panels[0].plot(steps, _smooth(losses), color=colour, linewidth=1.8, label=shown)
    for key in HELD_OUT:
        steps, values = _series(log, key)
        if len(steps):
            style: dict[str, typing.Any] = {"color": colour, "markersize": 4, "linewidth": 0.8}
            panels[0].plot(steps, values, "o--", label=f"{shown}, {key.split('_')[0]}", **style)
    if len(panels) > 1:
        panels[1].plot(*_series(log, "examples_per_second"), color=colour, linewidth=1.2)


def _series(log: Rows, key: str) -> tuple[np.ndarray, np.ndarray]:
    points = {line["step"]: line[key] for line in log if line.get(key) is not None}
    steps = sorted(points)
    return np.array(steps), np.array([points[step] for step in steps], dtype=float)


def _smooth(values: np.ndarray, window: float = 0.02) -> np.ndarray:
    """Centred moving average over a share of the curve: no lag, shorter at the ends."""
    kernel = np.ones(min(len(values), 1 + 2 * round(window / 2 * len(values))))
    return np.convolve(values, kernel, "same") / np.convolve(np.ones(len(values)), kernel, "same")


def read_metrics(path: str | Path) -> list[dict[str, typing.Any]]:
    """The lines of a `metrics.jsonl`; a last line cut short by a killed process is left out.

    Raises:
        FileNotFoundError: no such file.
        ValueError: another line is not a JSON object with a `step`; file and line are named.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"no metrics at {path}: give the metrics.jsonl of a training run")
    result = []
    for number, line in enumerate(Path(path).read_text(encoding="utf-8").splitlines(keepends=True), 1):
        if not line.endswith("\n"):
            break
        try:
            result.append(json.loads(line))
            result[-1]["step"]
        except (json.JSONDecodeError, KeyError, TypeError) as e:
            found = line.strip()[:80]
            raise ValueError(f"{path}, line {number}: not a JSON object with a step: {found}") from e
    return result


def scaling_curves(sweeps: abc.Mapping[str, Rows], measures: abc.Sequence[str]) -> Image.Image:
    """How measures of several workloads change with sizes: a column of panels per size, a row per measure.

    Args:
        sweeps: by the label of a size, rows with "workload", "value" and the measures.
        measures: keys of the rows, with units; those in percent get a linear scale, others a logarithmic one.

    Raises:
        ValueError: no size or no measure.
    """
    if not sweeps or not measures:
        raise ValueError("give at least one size and one measure to plot")
    names = list(dict.fromkeys(row["workload"] for rows in sweeps.values() for row in rows))
    with figures.styled_figure(3.4 * len(sweeps) + 2.2, 2.6 * len(measures)) as figure:
        panels = figure.subplots(len(measures), len(sweeps), squeeze=False, sharex="col", sharey="row")
        for column, (size, rows) in enumerate(sweeps.items()):
            for axis, measure in zip(panels[:, column], measures, strict=True):
                for i, name in enumerate(names):
                    _plot_scaling(axis, i, name, [row for row in rows if row["workload"] == name], measure)
                _scale(axis, sorted({row["value"] for row in rows}), measure)
            panels[-1, column].set_xlabel(size)
        for axis, measure in zip(panels[:, 0], measures, strict=True):
            axis.set_ylabel(measure)
        figure.legend(*panels[0, 0].get_legend_handles_labels(), loc="outside right upper")
        return figures.rendered(figure)


def search_curves(rows: Rows, metric: str) -> Image.Image:
    """Distance and KID of the points of a search over the temperature, a line for each guidance scale."""
    with figures.styled_figure(7.2, 2.8) as figure:
        for axis, key, label in zip(figure.subplots(1, 2), ("distance", "kid"), (metric, "KID"), strict=True):
            for i, scale in enumerate(dict.fromkeys(row["guidance_scale"] for row in rows)):
                points = sorted((r["temperature"], r[key]) for r in rows if r["guidance_scale"] == scale)
                colour = figures.COLOURS[i % len(figures.COLOURS)]
                axis.plot(*zip(*points, strict=True), "o-", color=colour, label=f"scale {scale:g}")
            axis.set(xlabel="temperature", ylabel=label)
        figure.legend(*axis.get_legend_handles_labels(), loc="outside right upper")
        return figures.rendered(figure)


def _plot_scaling(axis: Axes, i: int, name: str, rows: Rows, measure: str) -> None:
    points = sorted((row["value"], row[measure]) for row in rows if row.get(measure) is not None)
    x, y = ([point[k] for point in points] for k in (0, 1))
    again, colour = divmod(i, len(figures.COLOURS))
    style: dict[str, typing.Any] = {"color": figures.COLOURS[colour], "markersize": 4, "linewidth": 1.2}
    axis.plot(x, y, ("o-", "s--")[again % 2], label=display_name(name, mathtext=True), **style)


def _scale(axis: Axes, values: list[int], measure: str) -> None:
    """Sizes grow by factors; only those that were measured are named."""
    axis.set_xscale("log", base=2)
    axis.set_xticks(values, [f"{value:,d}" for value in values])
    if measure.endswith("(%)"):
        axis.set_ylim(bottom=0)
    else:
        axis.set_yscale("log")
        axis.locator_params("y", subs=(1, 2, 5))
        axis.yaxis.set_major_formatter("{x:,g}")
    axis.minorticks_off()
