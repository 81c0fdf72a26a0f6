"""The stage that tells a difference from noise: two evaluated sets of samples, with intervals."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from anyorder import files
from anyorder.contracts import require
from anyorder.evaluation.bootstrap import compare
from anyorder.evaluation.metrics import FeatureStatistics
from anyorder.stages.artifacts import Artifact
from anyorder.stages.common import SAMPLES, require_made_from
from anyorder.stages.features import load_reference


@dataclass
class CompareStage:
    """Differences a - b of FD, KID, precision and recall of two evaluations, with bootstrap intervals."""

    inputs: ClassVar[tuple[str, ...]] = ("a", "b", "features")
    provenance: ClassVar[dict[str, tuple[str, str]]] = {"features": ("a", "features")}
    required: ClassVar[tuple[str, ...]] = ("features",)
    a: Path
    """An eval artifact."""
    b: Path
    """The eval artifact to compare it with, say of the raster model; evaluated in the same feature space."""
    features: Path | None = None
    """Where the features of both evaluations are, if they were moved."""
    resamples: int = 400
    """Bootstrap resamples, at least 200."""
    confidence: float = 0.95
    """Coverage of the intervals, in (0, 1)."""
    seed: int = 0
    """Seed of the resampling."""

    def __post_init__(self) -> None:
        few = f"resamples must be >= 200, fewer say little of an interval's ends, got {self.resamples}"
        require(self.resamples >= 200, few)
        require(0 < self.confidence < 1, f"confidence must lie in (0, 1), got {self.confidence}")

    def run(self, artifact: Artifact) -> dict[str, Any]:
        """Write `comparison.json`."""
        assert self.features
        for folder in (self.a, self.b):
            require_made_from(folder, "features", self.features)
        made = files.read_manifest(self.features)
        one, other = (files.read_manifest(f)["metrics"].get("split", "test") for f in (self.a, self.b))
        require(one == other, f"{self.a} is about the {one} split, {self.b} about {other}: compare one split")
        a, b = (_samples(folder, made["extractor"]) for folder in (self.a, self.b))
        reference = load_reference(self.features, one)
        found = compare(reference, a, b, self.resamples, self.confidence, self.seed)
        differences = {name: difference._asdict() for name, difference in found.items()}
        files.write_json(artifact.folder / "comparison.json", differences)
        facts = {"paired": a.n == b.n, "metric_name": made["metric_name"], "metrics": differences}
        return {"a": self.a.name, "b": self.b.name, **facts}


def _samples(folder: Path, extractor: str) -> FeatureStatistics:
    """Features of the samples in an eval artifact; older versions did not keep them."""
    path = folder / SAMPLES
    if not path.is_file():
        raise FileNotFoundError(f"{folder} holds no {SAMPLES}: delete its manifest.json and run eval again")
    return FeatureStatistics.load(path, extractor, files.read_manifest(folder)["inputs"]["samples"])
