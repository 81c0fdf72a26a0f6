"""The stage that encodes images as tokens."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from anyorder.contracts import TokenizerNetwork, at_least, require
from anyorder.data.caches import TEXT, ImageSet, splits
from anyorder.data.captions import CaptionTokenizer, TextConfig, several
from anyorder.files import save_array, write_text
from anyorder.inference import processes
from anyorder.inference.device import device
from anyorder.inference.weights import load_tokenizer
from anyorder.stages.artifacts import Artifact
from anyorder.stages.common import Rows
from anyorder.tokenizers.vq_network import grid_of


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
    crops: bool = False
    """Encode five crops of every training image, corners and middle, instead of the whole: with mirror the
    ten crops of LlamaGen. For data with cache=false, as crops are cut from images of 1.1 times the size."""
    text: TextConfig = field(default_factory=TextConfig)
    """How captions become tokens, where the data have captions."""

    def __post_init__(self) -> None:
        at_least(1, self, "batch_size")

    def run(self, artifact: Artifact) -> dict[str, Any]:
        """Write `SPLIT.{tokens,labels}.npy`, and what the data have of `SPLIT.{attributes,captions}.npy`."""
        train, *others = splits(self.data)
        images = ImageSet(self.data, train, self.crops, self.mirror)
        sets = [images, *(ImageSet(self.data, split) for split in others)]
        model = load_tokenizer(self.tokenizer)
        grid = grid_of((1, 3, *images.size), model.factor)
        further = processes.told(self._conditions(sets, artifact) if artifact.leads else {})
        return {
            "examples": sum(self._encode(model, each, grid.n, artifact) for each in sets),
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
                save_array(artifact.folder / f"{images.split}.attributes.npy", images.attribute_values())
        captions = [images.captions() for images in sets]
        if captions[0] is None:
            mend = "leave out text.*, or run data with captions="
            require(self.text == TextConfig(), f"{self.data} has no captions: {mend}")
            return facts
        tokenizer = CaptionTokenizer.train(captions[0], self.text.vocab_size)
        write_text(artifact.folder / TEXT, tokenizer.definition)
        most = 1 + max((text.count("\n") for some in captions for text in some or ()), default=0)
        count = min(most, self.text.captions)
        shape = [count] * (count > 1) + [self.text.length]
        for images, some in zip(sets, captions, strict=True):
            tokens = tokenizer.encode(several(some or [], count), self.text.length).astype(np.int32)
            save_array(artifact.folder / f"{images.split}.captions.npy", tokens.reshape(-1, *shape))
        text = {"vocab_size": tokenizer.vocab_size, "length": self.text.length}
        return facts | {"text": text | ({"captions": count} if count > 1 else {})}

    def _encode(self, model: TokenizerNetwork, images: ImageSet, n: int, artifact: Artifact) -> int:
        """Encode one split as n tokens each, going on where a killed run stopped; how many images it took."""
        split = images.split
        names = {f"{split}.tokens": ((n,), np.int32), f"{split}.labels": ((), np.int64)}
        rows = Rows(artifact.folder, names, len(images), self.batch_size, f"{split} tokens")
        with images.ahead(rows.own):
            for some in rows:
                pixels, labels = images.batch(some, device=device())
                tokens = model.encode(pixels).cpu().numpy()
                rows.append(**{f"{split}.tokens": tokens, f"{split}.labels": labels.numpy()})
        return rows.n - rows.known
