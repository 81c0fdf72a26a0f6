"""The stage that tells a difference from luck: two evaluated sets of samples, with intervals."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from anyorder.evaluation.bootstrap import compare
from anyorder.evaluation.metrics import FeatureStatistics
from anyorder.files import read_manifest, write_json
from anyorder.stages.artifacts import Artifact
from anyorder.stages.common import require_made_from
from anyorder.stages.sample import SAMPLES


@dataclass
class CompareStage:
    """Differences a - b of FD, KID, precision and recall of two evaluations, with bootstrap intervals."""

    inputs: ClassVar[tuple[str, ...]] = ("a", "b", "features")
    a: Path
    """An eval artifact."""
    b: Path
    """The eval artifact to compare it with, say of the raster model."""
    features: Path
    """The feature space that both were evaluated in."""
    resamples: int = 400
    """How often the samples are drawn again."""
    confidence: float = 0.95
    """Of the intervals."""
    seed: int = 0
    """Of the draws."""

    def __post_init__(self) -> None:
        if self.resamples < 200:
            raise ValueError(
                f"resamples must be >= 200, fewer say little of an interval's ends, got {self.resamples}"
            )
        if not 0 < self.confidence < 1:
            raise ValueError(f"confidence must lie in (0, 1), got {self.confidence}")

    def run(self, artifact: Artifact) -> dict[str, Any]:
        """Write `comparison.json`."""
        for folder in (self.a, self.b):
            require_made_from(folder, "features", self.features)
        made = read_manifest(self.features)
        reference = FeatureStatistics.load(
            self.features / "reference.safetensors", made["extractor"], made["inputs"]["data"]
        )
        a, b = (_samples(folder, made["extractor"]) for folder in (self.a, self.b))
        found = compare(reference, a, b, self.resamples, self.confidence, self.seed)
        differences = {name: difference._asdict() for name, difference in found.items()}
        write_json(artifact.folder / "comparison.json", differences)
        return {
            "a": self.a.name,
            "b": self.b.name,
            "paired": a.n == b.n,
            "metric_name": made["metric_name"],
            "metrics": differences,
        }


def _samples(folder: Path, extractor: str) -> FeatureStatistics:
    """What an eval artifact holds of its samples.

    Raises:
        FileNotFoundError: the artifact is of a version that did not keep them.
    """
    path = folder / SAMPLES
    if not path.is_file():
        raise FileNotFoundError(f"{folder} holds no {SAMPLES}: delete its manifest.json and run eval again")
    return FeatureStatistics.load(path, extractor, read_manifest(folder)["inputs"]["samples"])
