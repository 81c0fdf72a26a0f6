"""Which classes a classifier of the data's labels finds in generated images, and whether they are right."""

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
    """Compare the predicted classes of samples with those of the test split.

    Both sides are *predictions*, so that the classifier's own mistakes are in both.

    Args:
        test: logits (n, classes) of test images.
        samples: logits (m, classes) of generated images.
        labels: (m,) int64, the classes that the samples were conditioned on.

    Raises:
        ValueError: a set is empty, or the sizes do not agree.
    """
    if not len(test) or not len(samples) or len(labels) != len(samples):
        got = f"{len(test)} test images, {len(samples)} samples and {len(labels)} labels"
        raise ValueError(f"got {got}: give at least one image of each, and a label for every sample")
    predicted = samples.argmax(1)
    real, fake = _shares(test.argmax(1), test.shape[1]), _shares(predicted, test.shape[1])
    return ClassAgreement(
        class_coverage=float((fake[real > 0] > 0).double().mean()),
        class_agreement=float((predicted == labels).double().mean()),
        class_distance=float((real - fake).abs().sum() / 2),
    )


def agreement(logits: Tensor, asked: Tensor) -> float:
    """Share of images whose predicted value is the one that was asked for.

    Args:
        logits: (n, values) of a classifier.
        asked: (n,) int64 in [0, values), -1 where nothing was asked for.

    Raises:
        ValueError: nothing was asked for in any image, or the sizes do not agree.
    """
    known = asked >= 0
    if len(logits) != len(asked) or not bool(known.any()):
        raise ValueError(
            f"got {len(logits)} images and {int(known.sum())} of {len(asked)} values asked for: "
            "give one for every image, and at least one that is not -1"
        )
    return float((logits.argmax(1) == asked)[known].double().mean())


def _shares(predicted: Tensor, classes: int) -> Tensor:
    """Share (classes,) float64 of each class among the predictions (n,)."""
    return torch.bincount(predicted, minlength=classes).double() / len(predicted)
