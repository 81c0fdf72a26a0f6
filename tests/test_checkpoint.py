import dataclasses
import json
import logging
import os
import resource
import subprocess
import sys
from dataclasses import dataclass, field

import pytest
import torch
from conftest import transformer
from torch import nn

from anyorder import families
from anyorder.contracts import Grid
from anyorder.inference.weights import load_model, load_state, read_tensors, save_model, write_tensors
from anyorder.training.checkpoint import Checkpoints


@dataclass
class TinyConfig:
    widths: tuple[int, ...] = (3, 2)
    rate: float = 0.1
    size: tuple[int, int] | None = None
    grid: Grid = field(default_factory=lambda: Grid(2, 2))


class Tiny(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config = config
        self.first = nn.Linear(*config.widths)
        self.tied = nn.Linear(*config.widths)
        self.tied.weight = self.first.weight
        self.register_buffer("count", torch.zeros((), dtype=torch.int64))
        self.register_buffer("transposed", torch.arange(6.0).view(2, 3).T)


FAMILY = families.Family(Tiny, TinyConfig)


@pytest.fixture(autouse=True)
def tiny_kind(monkeypatch):
    monkeypatch.setitem(families.REGISTRY, "tiny", __name__)


@pytest.fixture
def full_disk():
    """No file may grow beyond a few bytes, which fails as a full disk does."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)

    def fill():
        resource.setrlimit(resource.RLIMIT_FSIZE, (64, before[1]))

    yield fill
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_model_round_trip(tmp_path):
    config = TinyConfig(widths=(4, 5), rate=1e-5, size=(7, 8), grid=Grid(3, 4))
    model = Tiny(config)
    model.count += 3
    save_model(tmp_path, model, config, "tiny")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["config.json", "model.safetensors"]
    loaded = load_model(tmp_path, "tiny")
    assert loaded.config == config
    assert not loaded.training
    assert loaded.tied.weight is loaded.first.weight
    assert all(
        torch.equal(a, b) for a, b in zip(*(m.state_dict().values() for m in (model, loaded)), strict=True)
    )


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o007, 0o660)])
def test_colleagues_can_read_weights_as_the_umask_says(umask, mode, tmp_path):
    before = os.umask(umask)
    try:
        save_model(tmp_path, Tiny(TinyConfig()), TinyConfig(), "tiny")
    finally:
        os.umask(before)
    assert {path.name: path.stat().st_mode & 0o777 for path in tmp_path.iterdir()} == {
        "config.json": mode,
        "model.safetensors": mode,
    }


def test_load_model_refuses(tmp_path):
    with pytest.raises(FileNotFoundError, match="holds no model"):
        load_model(tmp_path)
    with pytest.raises(ValueError, match="unknown kind of model 'other', allowed: vq"):
        save_model(tmp_path, Tiny(TinyConfig()), TinyConfig(), "other")
    save_model(tmp_path, Tiny(TinyConfig()), TinyConfig(), "tiny")
    with pytest.raises(ValueError, match="of kind 'tiny', expected 'vq'"):
        load_model(tmp_path, "vq")
    path = tmp_path / "config.json"
    path.write_text('{"kind": "vase"}')
    with pytest.raises(ValueError, match=r"config\.json: unknown kind of model 'vase'"):
        load_model(tmp_path)
    path.write_text('{"kind": "tiny", "config": {"withs": [1, 2]}}')
    with pytest.raises(ValueError, match="does not fit this version's TinyConfig: unknown setting 'withs'"):
        load_model(tmp_path)
    path.write_text('{"kind": "tiny", "config": {"widths": [9, 2]}}')
    with pytest.raises(ValueError, match=r"first\.weight is \(2, 3\), expected \(2, 9\)"):
        load_model(tmp_path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[1, 2]", "must hold a kind and a config"),
        ('{"config": {}}', "must hold a kind and a config"),
        ('{"kind": 3, "config": {}}', "must hold a kind and a config"),
        ('{"kind": "tiny"}', "must hold the settings of TinyConfig under 'config'"),
        ('{"kind": "tiny", "config": [1]}', "must hold the settings of TinyConfig under 'config'"),
        ('{"kind": "tiny", "config": {"widths": "wide"}}', "does not fit this version's TinyConfig"),
        ('{"kind": "tiny", "config": {"widths": null}}', "does not fit this version's TinyConfig"),
        ('{"kind": "tiny", "config": {"widths": [1000000000, 1000000000]}}', "expected .1000000000"),
    ],
)
def test_wrong_configurations_are_one_line(tmp_path, text, message):
    """The last one would take exabytes if the model were built before the shapes are compared."""
    save_model(tmp_path, Tiny(TinyConfig()), TinyConfig(), "tiny")
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ValueError, match=message) as error:
        load_model(tmp_path)
    assert str(tmp_path) in str(error.value)


def test_more_blocks_than_tensors_are_refused_before_they_are_made(tmp_path):
    model = transformer()
    save_model(tmp_path, model, dataclasses.replace(model.config, depth=10**9), "transformer")
    with pytest.raises(ValueError, match="does not fit depth=1000000000: it has only"):
        load_model(tmp_path)


def test_loading_does_not_import_the_compiler_of_pytorch():
    """It takes a second, and elementwise functions on the device "meta" need it."""
    code = "from anyorder import Pipeline; import sys; Pipeline.from_pretrained('fashion32'); "
    run = [sys.executable, "-c", code + "sys.exit('torch._dynamo' in sys.modules)"]
    assert subprocess.run(run).returncode == 0


def test_weights_of_a_failed_training_are_refused(tmp_path):
    model = Tiny(TinyConfig())
    model.first.bias.data[1] = torch.nan
    save_model(tmp_path, model, model.config, "tiny")
    with pytest.raises(ValueError, match=r"model\.safetensors is of no use: first\.bias holds NaN"):
        load_model(tmp_path)


def test_load_state_names_what_does_not_fit():
    model = nn.Linear(2, 2)
    tensors = {f"t{i}": torch.zeros(1) for i in range(6)} | {"weight": torch.zeros(3)}
    with pytest.raises(
        ValueError, match=r"here does not fit Linear: missing bias; unexpected t0.* and 3 more"
    ):
        load_state(model, tensors, "here")


def test_read_tensors_refuses_a_truncated_file(tmp_path):
    path = tmp_path / "a.safetensors"
    write_tensors(path, {"a": torch.zeros(9)})
    os.truncate(path, path.stat().st_size - 1)
    with pytest.raises(ValueError, match=r"a\.safetensors is damaged"):
        read_tensors(path)


def test_tensors_read_do_not_hang_on_the_file(tmp_path):
    path = tmp_path / "a.safetensors"
    write_tensors(path, {"a": torch.ones(4)})
    tensors = read_tensors(path)
    path.write_bytes(bytes(path.stat().st_size))
    assert torch.equal(tensors["a"], torch.ones(4))


STATE = {"a": torch.arange(5.0), "b": torch.zeros((), dtype=torch.bfloat16)}


def names(checkpoints):
    return [p.name for p in sorted(checkpoints.folder.iterdir())]


def test_an_empty_folder_is_no_checkpoint(tmp_path):
    (tmp_path / "checkpoints/step-00000009").mkdir(parents=True)
    checkpoints = Checkpoints(tmp_path)
    assert names(checkpoints) == []  # left by a kill while it was pruned
    assert checkpoints.load_latest() is None
    checkpoints.save(9, {"w": torch.ones(2)}, {})
    assert checkpoints.load_latest()[0] == 9


def test_checkpoints_round_trip_and_prune(tmp_path):
    checkpoints = Checkpoints(tmp_path, keep=2)
    assert checkpoints.load_latest() is None
    for step in (5, 1000, 20000):
        checkpoints.save(step, {**STATE, "a": STATE["a"] + step}, {"seconds": step / 3})
    assert names(checkpoints) == ["step-00001000", "step-00020000"]
    facts = json.loads((checkpoints.folder / "step-00020000" / "facts.json").read_text())
    assert facts["bytes"] == (checkpoints.folder / "step-00020000" / "state.safetensors").stat().st_size
    step, tensors, facts = Checkpoints(tmp_path).load_latest()
    assert (step, facts) == (20000, {"seconds": 20000 / 3})
    assert torch.equal(tensors["a"], STATE["a"] + 20000)
    assert tensors["b"].dtype == torch.bfloat16


def truncate(folder):
    os.truncate(folder / "state.safetensors", 40)


def alter(folder):
    data = bytearray((folder / "state.safetensors").read_bytes())
    data[-1] ^= 1
    (folder / "state.safetensors").write_bytes(data)


def cut_facts(folder):
    os.truncate(folder / "facts.json", 10)


def lose_state(folder):
    (folder / "state.safetensors").unlink()


def empty_facts(folder):
    (folder / "facts.json").write_text("{}")


@pytest.mark.parametrize("harm", [truncate, alter, cut_facts, lose_state, empty_facts])
def test_a_damaged_checkpoint_is_named_and_the_previous_one_used(tmp_path, harm, caplog):
    checkpoints = Checkpoints(tmp_path, keep=1)
    checkpoints.save(1, STATE, {})
    checkpoints.keep = 2
    checkpoints.save(9, STATE, {})
    harm(checkpoints.folder / "step-00000009")
    with caplog.at_level(logging.WARNING, "anyorder"):
        assert checkpoints.load_latest()[0] == 1
    assert "step-00000009 is damaged" in caplog.text
    # The run goes on from step 1: its next checkpoint replaces the damaged one and never loses to it.
    checkpoints.keep = 1
    checkpoints.save(5, STATE, {})
    assert names(checkpoints) == ["step-00000005"]
    harm(checkpoints.folder / "step-00000005")
    with pytest.raises(ValueError, match=r"step-00000005 .*; delete .*checkpoints to start anew"):
        checkpoints.load_latest()
    checkpoints.save(5, STATE, {})
    assert checkpoints.load_latest()[0] == 5


def test_full_disk_loses_nothing(tmp_path, full_disk):
    checkpoints = Checkpoints(tmp_path, keep=1)
    checkpoints.save(1, STATE, {"n": 1})
    full_disk()
    with pytest.raises(OSError, match=r"cannot write .*state\.safetensors"):
        checkpoints.save(2, STATE, {})
    assert names(checkpoints) == ["step-00000001"]
    assert checkpoints.load_latest()[2] == {"n": 1}


def test_left_overs_are_removed_when_opened_and_when_saved(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    left = checkpoints.folder / ".step-00000003.tmp"
    left.mkdir(parents=True)
    (left / "state.safetensors").write_bytes(b"half")
    Checkpoints(tmp_path)
    assert not left.exists()
    left.mkdir()
    checkpoints.save(4, STATE, {})
    assert names(checkpoints) == ["step-00000004"]
