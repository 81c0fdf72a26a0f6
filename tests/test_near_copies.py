"""The tool that says what samples are worth without near copies of training images."""

import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from anyorder.evaluation import bootstrap
from anyorder.evaluation.metrics import FeatureStatistics

ROOT = Path(__file__).parents[1]
_spec = importlib.util.spec_from_file_location("near_copies", ROOT / "tools/near_copies.py")
near_copies = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(near_copies)


def artifact(folder, fingerprint, **facts):
    folder.mkdir()
    whole = {"stage": "x", "config": {}, "inputs": {}, "files": {}, "fingerprint": fingerprint} | facts
    (folder / "manifest.json").write_text(json.dumps(whole))


def statistics(features, data):
    found = FeatureStatistics("of the test", data)
    found.update(features, features[:, :2])
    return found


def test_near_copies_are_left_out_of_both(tmp_path, capsys):
    rng = np.random.default_rng(0)
    training, features = rng.integers(9, size=(5, 8)), rng.normal(size=(40, 3))
    features = torch.from_numpy(features).float()
    tokens = np.full((20, 8), 9)
    tokens[:4, :6] = training[2, :6]  # three quarters of a training image
    tokens[4, :5] = training[2, :5]  # less
    inputs = {"samples": "s" * 16, "features": "f" * 16, "tokens": "t" * 16}
    for i in range(2):
        artifact(tmp_path / f"samples{i}", "s" * 16)
        folders = {"samples": f"../samples{i}", "features": "../space", "tokens": "../tokens"}
        artifact(tmp_path / f"eval{i}", "e" * 16, inputs=inputs, input_folders=folders)
        np.save(tmp_path / f"samples{i}/tokens.npy", tokens if i == 0 else np.full_like(tokens, 9))
        np.save(tmp_path / f"samples{i}/labels.npy", np.zeros(20))
        statistics(features[20 * i :][:20], "s" * 16).save(tmp_path / f"eval{i}/samples.safetensors")
    artifact(tmp_path / "tokens", "t" * 16, grid=[2, 4], vocab_size=10, classes=["a"])
    np.save(tmp_path / "tokens/train.tokens.npy", training.astype(np.uint16))
    np.save(tmp_path / "tokens/train.labels.npy", np.zeros(5, np.int64))
    artifact(tmp_path / "space", "f" * 16, inputs={"data": "d" * 16}, extractor="of the test")
    statistics(features, "d" * 16).save(tmp_path / "space/reference.safetensors")
    typed = [str(tmp_path / name) for name in ("eval0", "eval1")]
    near_copies.main(typed)
    out = capsys.readouterr().out
    assert "16 of 20 are left" in out
    assert f"0.00%, 0.00%, 20.00%; mean {(4 * 2 + 3 + 15 * 8) / 20:.1f} of 8" in out
    left = [line.split() for line in out.splitlines() if ", left " in line]
    assert len(left) == 2
    real = statistics(features, "")
    for i, found in enumerate(left):
        kept = bootstrap.measures(real, statistics(features[20 * i :][4:20], ""))
        assert [float(x) for x in found[2:]] == pytest.approx(
            [kept["distance"], 1000 * kept["kid"], kept["recall"], kept["precision"]], abs=0.06
        )
    near_copies.main([*typed, "shared=0.6"])
    assert "15 of 20 are left" in capsys.readouterr().out
    np.save(tmp_path / "samples1/labels.npy", np.ones(20))
    with pytest.raises(SystemExit, match="other labels"):
        near_copies.main(typed)
