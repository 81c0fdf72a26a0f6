"""The stage that tells a difference from noise: two evaluated sets of samples, with intervals."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from anyorder import files
from anyorder.contracts import require
from anyorder.evaluation.bootstrap import compare
from anyorder.stages import features as spaces
from anyorder.stages.artifacts import Artifact


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
        a, b = (spaces.load_samples(folder, self.features) for folder in (self.a, self.b))
        one, other = (files.read_manifest(f)["metrics"].get("split", "test") for f in (self.a, self.b))
        require(one == other, f"{self.a} is about the {one} split, {self.b} about {other}: compare one split")
        reference = spaces.load_reference(self.features, one)
        found = compare(reference, a, b, self.resamples, self.confidence, self.seed)
        differences = {name: difference._asdict() for name, difference in found.items()}
        files.write_json(artifact.folder / "comparison.json", differences)
        name = files.read_manifest(self.features)["metric_name"]
        facts = {"paired": a.n == b.n, "metric_name": name, "metrics": differences}
        return {"a": self.a.name, "b": self.b.name, **facts}
