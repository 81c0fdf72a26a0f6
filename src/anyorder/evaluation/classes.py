"""Classes that a classifier finds in generated images, and whether they are the intended ones."""

import numpy as np
import torch
from torch import Tensor

from anyorder.contracts import require


def class_agreement(test: Tensor, samples: Tensor, labels: Tensor) -> dict[str, float]:
    """Compare predictions for samples, logits (m, classes), with those for test images, logits (n, classes).

    Both sides are *predictions*, so that mistakes of the classifier are in both. The samples were conditioned
    on `labels` (m,) int64.

    Returns:
        Numbers in [0, 1]. class_coverage: share of the classes predicted for test images that are predicted
        for a sample too; class_agreement: share of samples assigned to their label; class_distance:
        total-variation distance of the predicted classes, 0 for the same shares.

    Raises:
        ValueError: a set is empty, or the sizes do not agree.
    """
    if not len(test) or not len(samples) or len(labels) != len(samples):
        got = f"{len(test)} test images, {len(samples)} samples and {len(labels)} labels"
        raise ValueError(f"got {got}: give at least one image of each, and a label for every sample")
    found = [logits.argmax(1) for logits in (test, samples)]
    real, fake = (torch.bincount(x, minlength=test.shape[1]).double() / len(x) for x in found)
    return {
        "class_coverage": float((fake[real > 0] > 0).double().mean()),
        "class_agreement": float((found[1] == labels).double().mean()),
        "class_distance": float((real - fake).abs().sum() / 2),
    }


def agreement(logits: Tensor, targets: Tensor) -> float:
    """Share of images, logits (n, values), whose predicted value is the target (n,) int64, -1 for none.

    Raises:
        ValueError: no image has a target, or the sizes do not agree.
    """
    known = targets >= 0
    text = f"got {len(logits)} images and {int(known.sum())} of {len(targets)} targets: "
    text += "give one for every image, and at least one that is not -1"
    require(len(logits) == len(targets) and bool(known.any()), text)
    return float((logits.argmax(1) == targets)[known].double().mean())


def matched_rows(labels: np.ndarray, pool: np.ndarray, seed: int = 0) -> np.ndarray:
    """Rows of the `pool` of labels (m,) with the classes of `labels` (n,), sorted; at most n, int64.

    Drawn without replacement, in the proportions of `labels`: where the pool has too few of a class that
    makes up a hundredth or more, of all fewer are taken, down to half; of rarer classes what there is.
    """
    draw = np.random.default_rng(seed)
    classes, wanted = np.unique(labels, return_counts=True)
    there = (pool == classes[:, None]).sum(1)
    frequent = (there > 0) & (100 * wanted >= len(labels))
    share = max(0.5, min(1.0, (there[frequent] / wanted[frequent]).min(initial=1.0)))
    counts = np.round(share * wanted).astype(int)
    rows = [draw.permutation(np.flatnonzero(pool == c))[:n] for c, n in zip(classes, counts, strict=True)]
    return np.sort(np.concatenate(rows))
