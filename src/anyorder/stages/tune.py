"""The stage that searches temperature and guidance scale, the same way for every method."""

import itertools
import logging
import shutil
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from anyorder import files
from anyorder.contracts import at_least, require
from anyorder.data.caches import splits
from anyorder.evaluation import bootstrap
from anyorder.inference import figures, processes
from anyorder.method.guidance import GuidanceConfig
from anyorder.report import curves
from anyorder.stages import features as spaces
from anyorder.stages.artifacts import Artifact, recorded_input
from anyorder.stages.common import require_made_from
from anyorder.stages.execute import execute
from anyorder.stages.generation import GeneratingStage
from anyorder.stages.sample import SampleStage

log = logging.getLogger("anyorder")
TABLE = "table.json"
"""One row for each point that is measured."""
MOST_POINTS = 12
"""Every method gets the same search; a finer one would only fit the noise of the validation split."""
TIE = 1.01
"""Distances up to this times the least are ties: KID decides."""


@dataclass(kw_only=True)
class TuneStage(GeneratingStage):
    """Search temperature and guidance scale on the validation split: least FD, of near ties least KID.

    `sample settings=FOLDER` takes the best point.
    """

    together: ClassVar[bool] = True
    inputs: ClassVar[tuple[str, ...]] = (*GeneratingStage.inputs, "features")
    features: Path
    """Features artifact, of data with a validation split: the space of the distances."""
    temperatures: tuple[float, ...] = (0.8, 0.9, 1.0)
    """Temperatures to try, each with every scale; at most 12 points in all."""
    scales: tuple[float, ...] = (1.0, 1.5, 2.0, 3.0)
    """Guidance scales to try; 1 is no guidance."""
    num_images: int = 2000
    """Images generated for each point, for the classes of validation images; at least 4. With fewer than the
    features have dimensions (EfficientNet-Lite0: 1,280) the least FD is that of too low a temperature."""
    batch_size: int = 64
    """Images generated at once; samples do not depend on it, up to rounding."""
    bf16: bool = True
    """Generate in bfloat16 where the hardware has it."""
    seed: int = 0
    """Image i of every point is generated from seed + i."""

    def __post_init__(self) -> None:
        super().__post_init__()
        points = len({*self.temperatures}) * len({*self.scales})
        got = f"different points, got {len(self.temperatures)} x {len(self.scales)}"
        fits = 1 <= points == len(self.temperatures) * len(self.scales) <= MOST_POINTS
        require(fits, f"temperatures x scales must be 1 to {MOST_POINTS} {got}")
        at_least(4, self, "num_images")
        at_least(1, self, "batch_size")
        searched = self.sampling.temperature == self.guidance.scale == 1
        require(searched, "temperature and scale are searched: set temperatures and scales instead")
        for point in itertools.product(self.temperatures, self.scales):
            self._samples(*point)  # or refuse

    @property
    def _scaled(self) -> bool:
        return self.scales != (1,)

    def run(self, artifact: Artifact) -> dict[str, Any]:
        """Write `table.json` and `search.png`; a killed search goes on with its last point."""
        data = recorded_input(self.features, "data")
        assert data
        assert self.tokens
        require_made_from(self.tokens, "data", data)
        missing = f"{data} has no validation split: run data with max_validation, say 2000"
        require("validation" in splits(self.tokens), missing)
        extractor = spaces.load_extractor(self.features)
        reference = spaces.load_reference(self.features, "validation")
        table, points = artifact.folder / TABLE, list(itertools.product(self.temperatures, self.scales))
        rows: list[dict[str, float]] = processes.told(files.read_json(table) if table.is_file() else [])
        if artifact.leads:
            shutil.rmtree(artifact.folder / f"point-{len(rows)}", ignore_errors=True)  # left by a kill
        begun = len(rows)
        if artifact.leads and self.num_images < (dim := extractor.dim):
            text = "FD of %d images in %d features prefers low temperatures: give num_images=%d or more"
            log.warning(text, self.num_images, dim, 2 * dim)
        for number, (temperature, scale) in enumerate(points[len(rows) :], start=len(rows) + 1):
            folder = artifact.folder / f"point-{number}"
            execute("sample", self._samples(temperature, scale), folder)
            images, what = files.load_array(folder / "images.npy"), f"features of {folder.name}"
            made = spaces.statistics(extractor, images, np.arange(len(images)), "", what)
            if artifact.leads:
                point = {"temperature": temperature, "guidance_scale": scale}
                rows.append(point | bootstrap.measures(reference, made))
                files.write_json(table, rows)
                shutil.rmtree(folder)
            processes.barrier()
        if not artifact.leads:
            return {}
        figures.save_image(curves.search_curves(rows, extractor.metric), artifact.folder / "search.png")
        found = {"metric_name": extractor.metric, "policy": self.policy.label, "best": best(rows)}
        return {"examples": self.num_images * (len(rows) - begun), "points": rows, **found}

    def _samples(self, temperature: float, scale: float) -> SampleStage:
        """The sample stage of one point."""
        shared = {field.name: getattr(self, field.name) for field in fields(GeneratingStage)}
        shared |= {name: getattr(self, name) for name in ("num_images", "batch_size", "bf16", "seed")}
        shared["sampling"] = replace(self.sampling, temperature=temperature)
        shared["guidance"] = replace(self.guidance, scale=scale) if scale != 1 else GuidanceConfig()
        return SampleStage(**shared, classes="validation")


def best(rows: list[dict[str, float]]) -> dict[str, float]:
    """The row of least distance; of those within 1 % of it the one of least KID."""
    least = min(row["distance"] for row in rows)
    return min((row for row in rows if row["distance"] <= TIE * least), key=lambda row: row["kid"])
