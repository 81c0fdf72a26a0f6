"""What an evaluation is measured with: the split of the real images, and what real images score."""

from pathlib import Path

import numpy as np
import torch

from anyorder import files
from anyorder.contracts import TokenizerNetwork, require
from anyorder.data import caches
from anyorder.data.images import to_uint8
from anyorder.data.rows import batches, evenly_spaced
from anyorder.evaluation import bootstrap, classes, metrics
from anyorder.evaluation.features import FeatureExtractor
from anyorder.inference import processes
from anyorder.inference.device import device
from anyorder.inference.weights import load_tokenizer
from anyorder.report.evaluations import FLOOR
from anyorder.stages.artifacts import recorded_input
from anyorder.stages.common import require_made_from


def reference_split(data: Path, split: str | None) -> str:
    """The split to compare with; a ValueError where there are two and none is named, or none of that name."""
    cut = "validation" in caches.splits(data)
    mend = "split=validation while you choose, split=test once, at the end"
    require(not cut or split is not None, f"{data} has a validation split: say {mend}")
    fits = cut or split != "validation"
    require(fits, f"{data} has no validation split: run data with max_validation, or use split=test")
    return split or "test"


def floor_split(data: Path, split: str) -> str:
    """The split of the real images that are compared with `split`.

    Validation images for the test split, if any: a classifier's training images have features of their own.
    """
    return "validation" if split == "test" and "validation" in caches.splits(data) else "train"


def floors(
    samples: Path,
    tokenizer: Path | None,
    extractor: FeatureExtractor,
    reference: metrics.FeatureStatistics,
    others: metrics.FeatureStatistics,
    pool: caches.TokenSet,
    images: int,
) -> dict[str, dict[str, float]]:
    """What real images score: images of `pool` with the labels of the samples, as many of each.

    Beside them the same images through the tokenizer (rFD, rKID): no model of its tokens does better. Nothing
    where that leaves 3 images or fewer. `others` holds the features of evenly spaced ones of its `images`;
    further rows of `pool` are copies of them.
    """
    kept = evenly_spaced(others.n, images)
    labels = np.array(files.load_array(samples / "labels.npy"))
    chosen = classes.matched_rows(labels, np.array(pool.labels[kept]))
    if min(len(chosen), reference.n) <= 3:
        return {}
    real, decoder = metrics.FeatureStatistics(extractor.name), _decoder(tokenizer, pool)
    real.update(others.features[chosen], others.logits[chosen])
    through = (_decoded(decoder, pool, rows) for rows in batches(kept[chosen], 256))
    made = metrics.statistics(extractor, through, description="reconstructions")
    rows = {FLOOR: real, "reconstructions": made}
    return {name: {**bootstrap.measures(reference, x), "images": x.n} for name, x in rows.items()}


def reconstructions(
    tokenizer: Path | None,
    extractor: FeatureExtractor,
    held: caches.TokenSet,
    reference: metrics.FeatureStatistics,
    limit: int,
) -> tuple[metrics.FeatureStatistics, metrics.FeatureStatistics]:
    """Features of at most `limit` images of a split, and of these after the tokenizer, by all processes.

    Their distance is what papers call the rFID of a tokenizer (with Inception). `reference` are the features
    of the whole split.
    """
    decoder, found = _decoder(tokenizer, held), metrics.FeatureStatistics(extractor.name)
    chosen, real = evenly_spaced(limit, len(held)), metrics.FeatureStatistics(extractor.name)
    real.update(reference.features[chosen], reference.logits[chosen])

    def work(rows: np.ndarray) -> tuple[torch.Tensor, ...]:
        return tuple(x.cpu() for x in extractor(_decoded(decoder, held, rows)))

    for made in processes.mapped(work, list(batches(chosen, 256)), "reconstructions"):
        found.update(*made)
    return real, found


def _decoder(tokenizer: Path | None, tokens: caches.TokenSet) -> TokenizerNetwork:
    """The tokenizer that made the tokens."""
    tokenizer = tokenizer or recorded_input(tokens.folder, "tokenizer")
    require_made_from(tokens.folder, "tokenizer", tokenizer)
    assert tokenizer
    return load_tokenizer(tokenizer)


def _decoded(decoder: TokenizerNetwork, tokens: caches.TokenSet, rows: np.ndarray) -> torch.Tensor:
    """Images (B, 3, H, W) uint8 of some rows of the tokens."""
    images = to_uint8(decoder.decode(tokens.batch(rows)[0].to(device()), tokens.grid))
    return torch.from_numpy(images).permute(0, 3, 1, 2)
