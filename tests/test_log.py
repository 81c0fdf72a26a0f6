"""Loggers of trainings: one interface, numbers and figures, closed in any case."""

import sys
import types

import own_parts
import pytest
from PIL import Image

from anyorder.training.config import TrainConfig
from anyorder.training.log import Log

IMAGES = {"samples": Image.new("RGB", (4, 6)), "orders": Image.new("RGB", (8, 6))}


def log_some(folder, step=0, **settings):
    with Log(folder, step, TrainConfig(**settings)) as log:
        log.write(step + 1, {"loss": 2.0, "test_nll": float("inf")})
        log.images(step + 1, IMAGES)
        log.images(step + 1, None)
    return log


def test_an_own_logger_sees_numbers_and_figures(tmp_path):
    log_some(tmp_path, 3, logger="own_parts:Recorder")
    found = own_parts.Recorder.made.pop()
    assert found.folder == tmp_path
    assert found.closed
    assert found.seen == [(3,), (4, ["loss", "test_nll"]), (4, {"samples": (4, 6), "orders": (8, 6)})]
    with pytest.raises(ValueError, match="cannot import 'own_parts:Recoder'"):
        log_some(tmp_path, logger="own_parts:Recoder")


def test_a_logger_is_closed_when_the_training_fails(tmp_path):
    with pytest.raises(KeyboardInterrupt), Log(tmp_path, 0, TrainConfig(logger="own_parts:Recorder")):
        raise KeyboardInterrupt
    assert own_parts.Recorder.made.pop().closed


def test_weights_and_biases_goes_on_with_its_run(tmp_path, monkeypatch):
    calls = []
    run = types.SimpleNamespace(
        log=lambda values, step: calls.append((step, values)), finish=lambda: calls.append("finish")
    )
    stand_in = types.SimpleNamespace(
        init=lambda **settings: calls.append(settings) or run, Image=lambda image: image.size
    )
    monkeypatch.setitem(sys.modules, "wandb", stand_in)
    monkeypatch.setenv("WANDB_PROJECT", "orders")
    log_some(tmp_path, wandb=True)
    log_some(tmp_path, 5, wandb=True)
    log_some(tmp_path, wandb=True)
    first, later, anew = (call for call in calls if isinstance(call, dict))
    assert first == {"project": "orders", "name": tmp_path.name, "dir": tmp_path, "resume": "allow"} | {
        "id": first["id"]
    }
    assert later["id"] == first["id"] != anew["id"]
    assert calls[1:4] == [
        (1, {"loss": 2.0, "test_nll": float("inf")}),
        (1, {"samples": (4, 6), "orders": (8, 6)}),
        "finish",
    ]


def test_a_missing_package_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ValueError, match=r"wandb=true needs Weights & Biases: pip install 'anyorder\[log\]'"):
        log_some(tmp_path, wandb=True)


def test_tensorboard_shows_figures(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    log_some(tmp_path, tensorboard=True)
    events = EventAccumulator(str(tmp_path)).Reload()
    assert sorted(events.Tags()["images"]) == ["orders", "samples"]
    assert events.Images("samples")[0].step == 1
