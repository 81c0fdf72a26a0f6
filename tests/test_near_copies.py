"""The tool that says what samples are worth without near copies of training images."""

import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from anyorder.evaluation.metrics import kernel_distance

ROOT = Path(__file__).parents[1]
_spec = importlib.util.spec_from_file_location("near_copies", ROOT / "tools/near_copies.py")
near_copies = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(near_copies)


def test_near_copies_are_left_out_of_both(tmp_path, capsys):
    rng = np.random.default_rng(0)
    training, features = rng.integers(9, size=(5, 1, 8)), rng.normal(size=(40, 3))
    features = torch.from_numpy(features).float()
    tokens = np.full((20, 8), 9)
    tokens[:4, :6] = training[2, 0, :6]  # three quarters of a training image
    tokens[4, :5] = training[2, 0, :5]  # less
    for i in range(2):
        for kind, inputs in (("samples", {}), ("eval", {"samples": f"../samples{i}"})):
            (folder := tmp_path / f"{kind}{i}").mkdir()
            facts = {"stage": kind, "config": {}, "inputs": dict.fromkeys(inputs, ""), "files": {}}
            facts |= {"fingerprint": "0" * 16, "other_files": [], "input_folders": inputs}
            (folder / "manifest.json").write_text(json.dumps(facts))
        np.save(tmp_path / f"samples{i}/tokens.npy", tokens if i == 0 else np.full_like(tokens, 9))
        np.save(tmp_path / f"samples{i}/labels.npy", np.zeros(20))
        save_file({"features": features[20 * i :][:20].clone()}, tmp_path / f"eval{i}/samples.safetensors")
    (tmp_path / "data").mkdir()
    np.save(tmp_path / "data/train.tokens.npy", training)
    save_file({"features": features}, tmp_path / "data/reference.safetensors")
    folders = [str(tmp_path / name) for name in ("eval0", "eval1")]
    typed = [*folders, f"features={tmp_path}/data", f"tokens={tmp_path}/data"]
    near_copies.main(typed)
    out = capsys.readouterr().out
    assert "16 of 20 are left" in out
    assert "0.00%, 0.00%, 20.00%; mean 6.55 of 8".replace("6.55", f"{(4 * 2 + 3 + 15 * 8) / 20:.1f}") in out
    left = [line.split() for line in out.splitlines() if "  left  " in line]
    for i, found in enumerate(left):
        kept = features[20 * i :][4:20]
        assert float(found[3]) == pytest.approx(
            1000 * kernel_distance(features, kept, subset_size=16)[0], abs=0.06
        )
    near_copies.main([*typed, "shared=0.6"])
    assert "15 of 20 are left" in capsys.readouterr().out
    np.save(tmp_path / "samples1/labels.npy", np.ones(20))
    with pytest.raises(SystemExit, match="other labels"):
        near_copies.main(typed)
