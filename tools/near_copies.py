"""What samples are worth without those that nearly are training images, beside others of the same labels.

    python tools/near_copies.py EVAL OTHER_EVAL [shared=0.75]

Samples of the first that share this part of their tokens, or more, with a training image are left out; of the
second those of the same numbers. Prints FD, KID x 1000, recall and precision: of all, of what is left, and of
as many of the first at random, since fewer samples alone raise FD.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import torch

from anyorder.data.caches import TokenSet
from anyorder.evaluation import bootstrap
from anyorder.evaluation.metrics import FeatureStatistics
from anyorder.files import load_array, read_manifest
from anyorder.stages import features
from anyorder.stages.artifacts import input_folders


def unlike(tokens: np.ndarray, training: np.ndarray) -> np.ndarray:
    """How many tokens (n,) of each sample (n, N) differ from those of its nearest training image (m, N)."""
    return np.array([(training != sample).sum(1).min() for sample in tokens])


def row(name: str, real: FeatureStatistics, samples: FeatureStatistics, some: torch.Tensor) -> str:
    """A line of the table: measures of the samples that `some`, a mask or numbers, picks."""
    picked = FeatureStatistics(samples.extractor)
    picked.update(samples.features[some], samples.logits[some])
    found = bootstrap.measures(real, picked)
    numbers = f"{found['distance']:8.1f}{1000 * found['kid']:8.1f}{found['recall']:8.3f}"
    return f"{name[-42:]:42}{numbers}{found['precision']:11.3f}"


def main(arguments: list[str]) -> None:
    """Print the shares of copies and the table."""
    settings = dict(a.split("=", 1) for a in arguments if "=" in a)
    folders = [Path(a) for a in arguments if "=" not in a]
    inputs = [input_folders(folder, read_manifest(folder)) for folder in folders]
    space, training = inputs[0]["features"], TokenSet(inputs[0]["tokens"]).tokens
    labels, tokens = ([load_array(i["samples"] / f"{x}.npy") for i in inputs] for x in ("labels", "tokens"))
    if not np.array_equal(labels[0], labels[1]):
        sys.exit("the samples have other labels: generate both with the same seed")
    distances, n = [unlike(some, training) for some in tokens], training.shape[1]
    for folder, found in zip(folders, distances, strict=True):
        shares = ", ".join(f"{(found <= n * part).mean():.2%}" for part in (0, 1 / 8, 1 / 4))
        print(f"{folder}: at most 0, 1/8, 1/4 of the tokens unlike: {shares}; mean {found.mean():.1f} of {n}")
    left = torch.from_numpy(distances[0] > n * (1 - float(settings.get("shared", 0.75))))
    chance = torch.randperm(len(left), generator=torch.Generator().manual_seed(0))[: int(left.sum())]
    print(f"{int(left.sum())} of {len(left)} are left")
    print(f"{'':42}{'FD':>8}{'KID':>8}{'recall':>8}{'precision':>11}")
    real, samples = features.load_reference(space), [features.load_samples(f, space) for f in folders]
    for folder, made in zip(folders, samples, strict=True):
        print(row(f"{folder.name}, all", real, made, torch.ones_like(left)))
        print(row(f"{folder.name}, left", real, made, left))
    print(row("as many of the first at random", real, samples[0], chance))


if __name__ == "__main__":
    main(sys.argv[1:])
