"""What samples are worth without those that nearly are training images, beside others of the same labels.

    python tools/near_copies.py EVAL OTHER_EVAL features=FOLDER tokens=FOLDER [shared=0.75]

Samples of the first that share this part of their tokens, or more, with a training image are left out; of the
second those of the same numbers. Prints FD, KID x 1000, recall and precision: of all, of what is left, and of
as many of the first at random, since fewer samples alone raise FD.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file

from anyorder.evaluation.metrics import FeatureStatistics, frechet_distance, kernel_distance, precision_recall
from anyorder.files import read_manifest
from anyorder.stages.artifacts import input_folders


def unlike(tokens: np.ndarray, training: np.ndarray) -> np.ndarray:
    """How many tokens (n,) of each sample (n, N) differ from those of its nearest training image (m, N)."""
    return np.array([(training != sample).sum(1).min() for sample in tokens])


def measures(real: torch.Tensor, samples: torch.Tensor) -> str:
    """FD, KID x 1000, recall and precision of features (n, dim)."""
    sides = FeatureStatistics("real"), FeatureStatistics("samples")
    for side, features in zip(sides, (real, samples), strict=True):
        side.update(features, features[:, :1])
    distance = frechet_distance(sides[0].gaussian, sides[1].gaussian)
    kid, _ = kernel_distance(real, samples, subset_size=min(1000, len(samples)))
    found = precision_recall(real, samples)
    return f"{distance:8.1f}{1000 * kid:8.1f}{found.recall:8.3f}{found.precision:11.3f}"


def main(arguments: list[str]) -> None:
    """Print the shares of copies and the table."""
    settings = dict(a.split("=", 1) for a in arguments if "=" in a)
    folders = [Path(a) for a in arguments if "=" not in a]
    samples = [input_folders(folder, read_manifest(folder))["samples"] for folder in folders]
    features = [load_file(folder / "samples.safetensors")["features"] for folder in folders]
    real = load_file(Path(settings["features"]) / "reference.safetensors")["features"]
    training = np.load(Path(settings["tokens"]) / "train.tokens.npy")
    training = training.reshape(-1, training.shape[-1])
    labels = [np.load(folder / "labels.npy") for folder in samples]
    if not np.array_equal(*labels):
        sys.exit("the samples have other labels: generate both with the same seed")
    distances = [unlike(np.load(folder / "tokens.npy"), training) for folder in samples]
    n = training.shape[1]
    for folder, found in zip(folders, distances, strict=True):
        shares = ", ".join(f"{(found <= n * part).mean():.2%}" for part in (0, 1 / 8, 1 / 4))
        print(f"{folder}: at most 0, 1/8, 1/4 of the tokens unlike: {shares}; mean {found.mean():.1f} of {n}")
    kept = torch.from_numpy(distances[0] > n * (1 - float(settings.get("shared", 0.75))))
    chance = torch.randperm(len(kept), generator=torch.Generator().manual_seed(0))[: int(kept.sum())]
    print(f"{int(kept.sum())} of {len(kept)} are left")
    print(f"{'':42}{'FD':>8}{'KID':>8}{'recall':>8}{'precision':>11}")
    for folder, all_features in zip(folders, features, strict=True):
        print(f"{folder.name[-36:]:36}  all   {measures(real, all_features)}")
        print(f"{folder.name[-36:]:36}  left  {measures(real, all_features[kept])}")
    print(f"{'as many of the first at random':36}        {measures(real, features[0][chance])}")


if __name__ == "__main__":
    main(sys.argv[1:])
