"""The stage that reads images into arrays."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from anyorder.data.ingest import ingest
from anyorder.data.sources import open_source
from anyorder.data.sunsets import write_sunsets
from anyorder.stages.artifacts import Artifact


@dataclass
class DataStage:
    """Decode a source of images once, at one size."""

    inputs: ClassVar[tuple[str, ...]] = ()
    source: str = "sunsets"
    """sunsets (made by seed), a folder of images, a parquet file or folder, or a Hugging Face data set id."""
    size: tuple[int, int] = (32, 32)
    """Height and width in pixels."""
    label: str | None = None
    """Column that holds the class (parquet and Hugging Face)."""
    captions: str | None = None
    """Column that holds a text about each image (parquet and Hugging Face)."""
    attributes: tuple[str, ...] = ()
    """Columns of further attributes that pictures may be asked for (parquet and Hugging Face)."""
    fit: Literal["crop", "letterbox"] = "crop"
    """How other aspect ratios are brought to `size`."""
    max_train: int | None = None
    """Take at most this many training images; sunsets makes this many (20,000 by default)."""
    max_test: int | None = None
    """The same for the test split (2,000 by default for sunsets)."""
    test_fraction: float = 0.1
    """Share of images held out where the source has no test split."""
    seed: int = 0
    """Of sunsets."""

    def run(self, artifact: Artifact) -> dict[str, Any]:
        """Write `{train,test}.{images,labels}.npy`, and `{attributes.npy,captions.json}` if asked for."""
        if self.source == "sunsets":
            if self.captions is not None or self.attributes:
                raise ValueError("sunsets have neither captions nor attributes: leave both out")
            n_train = 20_000 if self.max_train is None else self.max_train
            n_test = 2_000 if self.max_test is None else self.max_test
            return write_sunsets(artifact.folder, self.size, n_train, n_test, seed=self.seed)
        source = open_source(
            self.source, self.label, self.test_fraction, self.captions, tuple(self.attributes)
        )
        return ingest(
            source, artifact.folder, self.size, self.fit, max_train=self.max_train, max_test=self.max_test
        )
