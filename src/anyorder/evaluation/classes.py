"""Classes that a classifier finds in generated images, and whether they are the intended ones."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class ClassAgreement(NamedTuple):
    """Shares in [0, 1]."""

    class_coverage: float
    """Share of the classes predicted for the test split that are also predicted for a sample."""
    class_agreement: float
    """Share of samples that are assigned to the class they were conditioned on."""
    class_distance: float
    """Total-variation distance of the predicted classes of samples and test split; 0: the same shares."""


def class_agreement(test: Tensor, samples: Tensor, labels: Tensor) -> ClassAgreement:
    """Compare predictions for samples, logits (m, classes), with those for test images, logits (n, classes).

    Both sides are *predictions*, so that mistakes of the classifier are in both. The samples were conditioned
    on `labels` (m,) int64.

    Raises:
        ValueError: a set is empty, or the sizes do not agree.
    """
    if not len(test) or not len(samples) or len(labels) != len(samples):
        got = f"{len(test)} test images, {len(samples)} samples and {len(labels)} labels"
        raise ValueError(f"got {got}: give at least one image of each, and a label for every sample")
    found = [logits.argmax(1) for logits in (test, samples)]
    real, fake = (torch.bincount(x, minlength=test.shape[1]).double() / len(x) for x in found)
    return ClassAgreement(
        class_coverage=float((fake[real > 0] > 0).double().mean()),
        class_agreement=float((found[1] == labels).double().mean()),
        class_distance=float((real - fake).abs().sum() / 2),
    )


def agreement(logits: Tensor, targets: Tensor) -> float:
    """Share of images, logits (n, values), whose predicted value is the target (n,) int64, -1 for none.

    Raises:
        ValueError: no image has a target, or the sizes do not agree.
    """
    known = targets >= 0
    if len(logits) != len(targets) or not bool(known.any()):
        raise ValueError(
            f"got {len(logits)} images and {int(known.sum())} of {len(targets)} targets: "
            "give one for every image, and at least one that is not -1"
        )
    return float((logits.argmax(1) == targets)[known].double().mean())
