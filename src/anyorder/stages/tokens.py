"""The stage that encodes images as tokens."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch

from anyorder.contracts import Grid, TokenizerNetwork, require
from anyorder.data.caches import TEXT, ImageSet, splits
from anyorder.data.captions import CaptionTokenizer, TextConfig
from anyorder.files import save_array, write_text
from anyorder.inference import processes
from anyorder.inference.device import device
from anyorder.inference.weights import load_tokenizer
from anyorder.stages.artifacts import Artifact
from anyorder.stages.common import Rows


@dataclass
class TokensStage:
    """Encode every image as tokens, once."""

    together: ClassVar[bool] = True
    inputs: ClassVar[tuple[str, ...]] = ("data", "tokenizer")
    data: Path
    """Images."""
    tokenizer: Path
    """Tokenizer, trained here or converted."""
    batch_size: int = 256
    """Images encoded at once."""
    mirror: bool = False
    """Encode every training image a second time, left and right exchanged: for few images; not for images
    with writing."""
    text: TextConfig = field(default_factory=TextConfig)
    """How captions become tokens, where the data have captions."""

    def run(self, artifact: Artifact) -> dict[str, Any]:
        """Write `SPLIT.{tokens,labels}.npy`, and what the data have of `SPLIT.{attributes,captions}.npy`."""
        sets = [ImageSet(self.data, split) for split in splits(self.data)]
        further = processes.told(self._conditions(sets, artifact) if artifact.leads else {})
        model, images = load_tokenizer(self.tokenizer), sets[0]
        grid = Grid(*(side // model.factor for side in images.size))
        for each in sets:
            self._encode(model, each, grid.n, artifact)
        return {
            "examples": sum(map(len, sets)),
            "grid": [grid.h, grid.w],
            "vocab_size": model.vocab_size,
            "classes": images.classes,
            "image_size": list(images.size),
            "tokenizer": artifact.identity["inputs"]["tokenizer"],
            "data": artifact.identity["inputs"]["data"],
            **further,
        }

    def _conditions(self, sets: list[ImageSet], artifact: Artifact) -> dict[str, Any]:
        """Write attributes and caption tokens of all splits; facts for the manifest."""
        (artifact.folder / TEXT).unlink(missing_ok=True)  # of an earlier configuration
        facts: dict[str, Any] = {}
        if sets[0].attributes:
            facts["attributes"] = sets[0].attributes
            for images in sets:
                values = self._with_copies(images, images.attribute_values())
                save_array(artifact.folder / f"{images.split}.attributes.npy", values)
        captions = [images.captions() for images in sets]
        if captions[0] is None:
            mend = "leave out text.*, or run data with captions="
            require(self.text == TextConfig(), f"{self.data} has no captions: {mend}")
            return facts
        tokenizer = CaptionTokenizer.train(captions[0], self.text.vocab_size)
        write_text(artifact.folder / TEXT, tokenizer.definition)
        for images, some in zip(sets, captions, strict=True):
            tokens = tokenizer.encode(some or [], self.text.length).astype(np.int32)
            tokens = self._with_copies(images, tokens)
            save_array(artifact.folder / f"{images.split}.captions.npy", tokens)
        return facts | {"text": {"vocab_size": tokenizer.vocab_size, "length": self.text.length}}

    def _with_copies(self, images: ImageSet, rows: np.ndarray) -> np.ndarray:
        """Rows (n, ...) of a split, of the training split a second time where it is mirrored."""
        return np.concatenate((rows, rows)) if self.mirror and images.split == "train" else rows

    def _encode(self, model: TokenizerNetwork, images: ImageSet, n: int, artifact: Artifact) -> None:
        """Encode one split as n tokens each, going on where a killed run stopped."""
        split, numbers = images.split, self._with_copies(images, np.arange(len(images)))
        names = {f"{split}.tokens": ((n,), np.int32), f"{split}.labels": ((), np.int64)}
        rows = Rows(artifact.folder, names, len(numbers), self.batch_size, f"{split} tokens")
        for some in rows:
            pixels, labels = images.batch(numbers[some])
            copies = torch.from_numpy(some >= len(images))[:, None, None, None]
            pixels = torch.where(copies, pixels.flip(-1), pixels)
            tokens = model.encode(pixels.to(device())).cpu().numpy()
            rows.append(**{f"{split}.tokens": tokens, f"{split}.labels": labels.numpy()})
