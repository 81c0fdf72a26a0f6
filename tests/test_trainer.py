"""The trainer; run as a script, this file trains in processes that kill themselves."""

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import GRID, transformer
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from anyorder.inference import device
from anyorder.inference.weights import read_tensors
from anyorder.method.loss import token_nll
from anyorder.orders import random_orders
from anyorder.stages.common import training_facts
from anyorder.training import checkpoint, log, trainer
from anyorder.training.checkpoint import Checkpoints
from anyorder.training.config import TrainConfig, batch_indices, learning_rate
from anyorder.training.trainer import NonFiniteLoss, train

EXAMPLES = 10
CONFIG = {
    "steps": 12, "batch_size": 4, "accumulation": 2, "learning_rate": 0.01, "warmup": 3, "min_lr_ratio": 0.1,
    "weight_decay": 0.1, "clip": 0.5, "ema": 0.9, "bf16": False, "seed": 7,
    "log_every": 3, "eval_every": 6, "save_every": 4,
}  # fmt: skip


class Tiny(nn.Module):
    """Dropout, matrices, vectors, and a buffer that `forward` updates, as a codebook's usage counts are."""

    def __init__(self):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.layers = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Dropout(0.3), nn.Linear(8, 1))
        self.register_buffer("mean", torch.zeros(4))

    def forward(self, x):
        if self.training:
            self.mean.lerp_(x.detach().mean(0), 0.1)
        return self.layers(x - self.mean)


def data():
    rows = torch.randn(EXAMPLES, 4, generator=torch.Generator().manual_seed(1))
    return rows, rows.sum(1, keepdim=True)


def squared_error(model, indices, step, generator):
    x, y = (t[indices] for t in data())
    noise = torch.randn(x.shape, generator=generator)
    error = model(x + 0.1 * noise) - y
    return error.square().mean(), {"absolute": error.abs().mean()}


def test_error(model, step):
    assert not model.training
    x, y = data()
    return {"test_error": (model(x) - y).square().mean()}


test_error.__test__ = False


def run(folder, loss=squared_error, model=None, **changes):
    hooks = {k: changes.pop(k) for k in ("sample", "extra", "evaluate", "examples") if k in changes}
    hooks = {"evaluate": test_error, "examples": EXAMPLES, **hooks}
    return train(model or Tiny(), loss, config=TrainConfig(**{**CONFIG, **changes}), folder=folder, **hooks)


def state(folder):
    """Everything that a run is: weights, averages and optimizer state."""
    return Checkpoints(folder).load_latest()[1]


def lines(folder, *without):
    rows = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [{k: v for k, v in row.items() if k not in ("examples_per_second", *without)} for row in rows]


def assert_equal(a, b):
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    folder = tmp_path_factory.mktemp("uninterrupted")
    return folder, run(folder)


# --- kill -9 --------------------------------------------------------------------------------------------


def die(*_, **__):
    os.kill(os.getpid(), signal.SIGKILL)


def die_in_loss(step, calls):
    def loss(model, indices, now, generator):
        found = squared_error(model, indices, now, generator)
        calls[0] -= now == step
        return die() if now == step and calls[0] == 0 else found

    return {"loss": loss}


def die_in_log():
    def write(self, step, values):
        with open(self.path, "a") as f:
            f.write('{"step": ' + str(step) + ', "lo')
            f.flush()
            if step == 6:
                die()
            f.truncate(f.tell() - len('{"step": ' + str(step) + ', "lo'))
        whole(self, step, values)

    whole, log.Log.write = log.Log.write, write
    return {}


def die_at_save(module, name, at):
    """Die where the `at`-th save calls `module.name`."""
    whole, calls = getattr(module, name), [0]

    def hooked(*args, **kwargs):
        calls[0] += 1
        return die() if calls[0] == at else whole(*args, **kwargs)

    setattr(module, name, hooked)
    return {}


KILLS = {
    "before the first checkpoint": [lambda: die_in_loss(2, [1])],
    "between checkpoints, between micro-steps": [lambda: die_in_loss(7, [2])],
    "evaluating": [lambda: {"evaluate": die}],
    "half a line of the log": [die_in_log],
    "saving, before the tensors": [lambda: die_at_save(checkpoint.weights, "write_tensors", 2)],
    "saving, between tensors and facts": [lambda: die_at_save(checkpoint.files, "write_json", 2)],
    "saving, before the rename": [lambda: die_at_save(os, "rename", 1)],
    "saving, before pruning": [lambda: die_at_save(Checkpoints, "prune", 3)],
    "twice": [lambda: die_in_loss(6, [1]), lambda: die_in_loss(11, [2])],
}


def _in_a_child(task):
    """Exit status of `task` in a forked process, negative for a signal."""
    if pid := os.fork():
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    task()
    os._exit(0)


def _killed_and_resumed(folder):
    """One fresh process imports, its forks train: much faster than one interpreter for each."""
    import torch._dynamo  # seconds that the first optimizer step would spend in each fork  # noqa: F401

    for name, kills in KILLS.items():
        for arm in kills:
            status = _in_a_child(lambda arm=arm, name=name: run(folder / name, **arm()))
            assert status == -signal.SIGKILL, (name, status)
        status = _in_a_child(lambda name=name: run(folder / name))
        assert status == 0, (name, status)


@pytest.fixture(scope="module")
def resumed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("resumed")
    done = subprocess.run([sys.executable, __file__, folder], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.mark.parametrize("name", KILLS)
def test_killed_and_resumed_is_bit_identical(name, resumed, uninterrupted):
    folder, _ = uninterrupted
    assert_equal(state(resumed / name), state(folder))
    assert lines(resumed / name) == lines(folder)
    left = [path.name for path in (resumed / name / "checkpoints").iterdir()]
    assert all(name.startswith("step-") for name in left)
    assert sorted(left) == ["step-00000008", "step-00000012"]


# --- stopping and going on ------------------------------------------------------------------------------


@pytest.mark.parametrize("step", [4, 5, 12])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signal_saves_stops_and_resumes_exactly(tmp_path, number, step, uninterrupted):
    def loss(model, indices, now, generator):
        if now == step and not sent:
            sent.append(signal.raise_signal(number))
        return squared_error(model, indices, now, generator)

    sent, handler = [], signal.getsignal(number)
    with pytest.raises(KeyboardInterrupt, match=f"stopped after step {step} of 12"):
        run(tmp_path, loss)
    assert signal.getsignal(number) is handler
    assert Checkpoints(tmp_path).load_latest()[0] == step
    assert run(tmp_path).steps == 12
    assert_equal(state(tmp_path), state(uninterrupted[0]))
    assert lines(tmp_path) == lines(uninterrupted[0])


def test_signal_that_comes_late_in_a_step_saves_too(tmp_path, monkeypatch):
    def save(self, step, *rest):
        signal.raise_signal(signal.SIGINT)
        whole(self, step, *rest)

    whole = Checkpoints.save
    monkeypatch.setattr(Checkpoints, "save", save)
    with pytest.raises(KeyboardInterrupt, match="after step 4"):
        run(tmp_path)
    monkeypatch.undo()
    assert Checkpoints(tmp_path).load_latest()[0] == 4


def test_second_signal_stops_at_once(tmp_path):
    def loss(model, indices, step, generator):
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)
        raise AssertionError("not reached")

    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, loss)
    assert Checkpoints(tmp_path).load_latest() is None


def test_trains_in_another_thread(tmp_path, uninterrupted):
    thread = threading.Thread(target=run, args=(tmp_path,))
    thread.start()
    thread.join()
    assert_equal(state(tmp_path), state(uninterrupted[0]))


def test_finished_run_returns_at_once(uninterrupted):
    def loss(*_):
        raise AssertionError("must not train")

    folder, first = uninterrupted
    model = Tiny()
    again = run(folder, loss, model)
    assert_equal(again.model.state_dict(), first.model.state_dict())
    assert_equal(model.state_dict(), {k[6:]: t for k, t in state(folder).items() if k.startswith("model.")})
    assert (again.seconds, again.metrics, again.steps) == (first.seconds, first.metrics, 12)
    assert first.examples == again.examples == 12 * 8
    assert not again.model.training


def test_damaged_checkpoint_goes_back_to_the_one_before(tmp_path, uninterrupted, caplog):
    run(tmp_path)
    os.truncate(tmp_path / "checkpoints" / "step-00000012" / "state.safetensors", 99)
    run(tmp_path)
    assert "step-00000012 is damaged" in caplog.text
    assert_equal(state(tmp_path), state(uninterrupted[0]))
    assert lines(tmp_path) == lines(uninterrupted[0])


def test_another_configuration_or_model_is_refused(tmp_path):
    run(tmp_path, steps=4)
    with pytest.raises(ValueError, match=r"made with seed=7 \(now 8\): use these"):
        run(tmp_path, seed=8)
    with pytest.raises(ValueError, match=r"made with steps=4 \(now 3\): .*only steps may grow"):
        run(tmp_path, steps=3)
    with pytest.raises(ValueError, match=r"examples=10 \(now 3\)"):
        run(tmp_path, steps=4, examples=3)
    wide = Tiny()
    wide.layers[3] = nn.Linear(8, 2)
    with pytest.raises(
        ValueError, match=r"step 4 \(model\) does not fit Tiny: layers\.3\.weight is \(1, 8\)"
    ):
        run(tmp_path, model=wide, steps=4)
    assert run(tmp_path, steps=4, log_every=1, save_every=9, keep=1).steps == 4


def test_more_steps_extend_a_run_and_say_what_becomes_of_the_learning_rate(tmp_path, caplog):
    first = run(tmp_path / "a", steps=4)
    with caplog.at_level("INFO", "anyorder"):
        longer = run(tmp_path / "a", steps=12)
    assert "extended from 4 to 12 steps: from step 5 on, the learning rate follows" in caplog.text
    assert (first.steps, longer.steps) == (4, 12)
    rates = {row["step"]: row["lr"] for row in lines(tmp_path / "a") if "lr" in row}
    long, short = TrainConfig(**CONFIG), TrainConfig(**{**CONFIG, "steps": 4})
    assert rates == {s: learning_rate(short if s <= 4 else long, s) for s in (3, 4, 6, 9, 12)}
    run(tmp_path / "b", steps=4)  # extended in two parts as in one, if the length is said at once
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "b", partial(stopping, 7))
    run(tmp_path / "b")
    assert_equal(state(tmp_path / "a"), state(tmp_path / "b"))


def stopping(step, model, indices, now, generator):
    if now == step:
        signal.raise_signal(signal.SIGINT)
    return squared_error(model, indices, now, generator)


def test_values_that_are_not_finite_are_null_in_the_log(tmp_path):
    result = run(tmp_path, evaluate=lambda model, step: {"test_psnr": float("inf"), "test_x": 1.0})
    assert [row["test_psnr"] for row in lines(tmp_path) if "test_psnr" in row] == [None, None]
    assert "test_psnr" not in result.metrics
    assert "Infinity" not in (tmp_path / "metrics.jsonl").read_text()


def test_full_disk_stops_the_run_with_the_earlier_checkpoint(tmp_path, monkeypatch):
    def full(step, *_):
        raise OSError(28, "No space left on device")

    run(tmp_path / "a")
    monkeypatch.setattr(
        checkpoint.files, "write_json", lambda path, value: full(0) if value["step"] == 8 else None
    )
    with pytest.raises(OSError, match="No space left"):
        run(tmp_path / "b")
    assert [p.name for p in (tmp_path / "b" / "checkpoints").iterdir()] == ["step-00000004"]


@pytest.mark.parametrize(
    ("most", "advice"), [(2, "batch_size=2 train.accumulation=4 fits"), (0, "smaller model")]
)
def test_out_of_memory_names_the_batch_that_fits(tmp_path, most, advice):
    def loss(model, indices, now, generator):
        if len(indices) > most:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return squared_error(model, indices, now, generator)

    with pytest.raises(ValueError, match=f"out of memory with train.batch_size=4: .*{advice}"):
        run(tmp_path, loss)


def test_other_errors_of_pytorch_are_not_about_memory(tmp_path):
    def loss(model, *_):
        raise RuntimeError("the shapes do not fit")

    with pytest.raises(RuntimeError, match="the shapes do not fit"):
        run(tmp_path, loss)


# --- what a step does -----------------------------------------------------------------------------------


def test_log(uninterrupted):
    folder, result = uninterrupted
    rows = lines(folder)
    assert [row["step"] for row in rows] == [3, 6, 6, 9, 12, 12]
    assert list(rows[0]) == ["step", "loss", "absolute", "lr", "grad_norm"]
    assert list(rows[2]) == ["step", "test_error"]
    config = TrainConfig(**CONFIG)
    assert [rows[i]["lr"] for i in (0, 1, 3, 4)] == [learning_rate(config, s) for s in (3, 6, 9, 12)]
    assert rows[4]["loss"] < rows[0]["loss"]
    assert {**rows[4], **rows[5]}.items() <= {**result.metrics, "step": 12}.items()
    assert result.metrics["examples_per_second"] > 0
    assert result.seconds > 0


def test_logged_loss_is_the_mean_since_the_last_line(tmp_path):
    seen = []

    def loss(model, indices, step, generator):
        found = squared_error(model, indices, step, generator)
        seen.append(found[0].item())
        parts = {"late": torch.tensor(float(step))} if step == 6 else {}
        return found[0], parts

    run(tmp_path, loss, steps=6, eval_every=0)
    first, second = lines(tmp_path)
    assert first["loss"] == pytest.approx(np.mean(seen[:6]))
    assert second["loss"] == pytest.approx(np.mean(seen[6:]))
    assert "late" not in first
    assert second["late"] == 6


@pytest.mark.parametrize("warmup", [0, 10])
def test_learning_rate(warmup):
    config = TrainConfig(steps=110, warmup=warmup, learning_rate=2.0, min_lr_ratio=0.25)
    rates = [learning_rate(config, step) for step in range(1, 111)]
    if warmup:
        assert rates[:10] == pytest.approx([0.2 * i for i in range(1, 11)])
    assert max(rates) == pytest.approx(2.0, abs=1e-3)
    assert rates[(warmup + 110) // 2 - 1] == pytest.approx((2 + 0.5) / 2)
    assert rates[-1] == 0.5
    assert rates[warmup:] == sorted(rates[warmup:], reverse=True)


def test_min_lr_ratio_one_is_constant():
    config = TrainConfig(steps=5, min_lr_ratio=1.0)
    assert {learning_rate(config, step) for step in range(1, 6)} == {3e-4}


def plain(model, indices, step, generator):
    x, y = (t[indices] for t in data())
    return (model(x) - y).square().mean(), {}


def linear():
    layer = nn.Linear(4, 1)
    nn.init.constant_(layer.weight, 0.5)
    nn.init.constant_(layer.bias, 0.5)
    return layer


def test_accumulation_equals_a_larger_batch(tmp_path):
    a = run(tmp_path / "a", plain, linear(), batch_size=6, accumulation=1)
    b = run(tmp_path / "b", plain, linear(), batch_size=2, accumulation=3)
    torch.testing.assert_close(a.model.state_dict(), b.model.state_dict())
    assert lines(tmp_path / "a")[0]["loss"] == pytest.approx(lines(tmp_path / "b")[0]["loss"])


def test_progress_shows_the_share_of_the_peak(tmp_path, monkeypatch):
    """A pass over 4 examples multiplies (4, 4) by (4, 1) forward, and (1, 4) by (4, 4) for the gradient."""
    monkeypatch.setattr(trainer.devices, "peak_flops", lambda *_: 1e4)
    seen, shown = [], trainer.Trainer.shown

    def noted(self):
        seen.append((self.flops, dict(self.metrics), shown(self)))
        return seen[-1][-1]

    monkeypatch.setattr(trainer.Trainer, "shown", noted)
    result = run(tmp_path / "a", plain, linear())
    logged = [line["mfu"] for line in lines(tmp_path / "a") if "loss" in line]
    assert logged[-1] == training_facts(result)["mfu"] > 0
    for flops, metrics, line in seen:
        assert flops == 2 * (2 * 4 * 4 + 2 * 4 * 4)
        assert metrics["mfu"] == pytest.approx(flops * metrics["examples_per_second"] / 8 / 1e4, rel=0.01)
        assert line["mfu"] == f"{metrics['mfu']:.1%}"
    seen.clear()
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))  # no C++, which takes long
    run(tmp_path / "b", plain, linear(), compile=True, steps=3)
    assert [line for *_, line in seen if "mfu" in line] == [], "compiled code hides what it computes"
    assert all({"mfu", "peak_memory"}.isdisjoint(line) for line in lines(tmp_path / "b"))


def test_peaks_are_found_by_the_name_of_the_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "NVIDIA H100 80GB HBM3")
    assert device.peak_flops(torch.device("cuda"), True) == 989e12
    assert device.peak_flops(torch.device("cuda"), False) == 67e12
    assert device.peak_flops(torch.device("cpu"), True) is None


def first_gradient(folder):
    """AdamW's mean of gradients after one step is (1 - beta1) times the gradient."""
    slots = [t for name, t in state(folder).items() if name.endswith("exp_avg")]
    return torch.cat([t.flatten() for t in slots]) / 0.1


def test_clipping(tmp_path):
    run(tmp_path / "a", plain, linear(), steps=1, warmup=0, clip=0.25)
    run(tmp_path / "b", plain, linear(), steps=1, warmup=0, clip=0)
    norm = first_gradient(tmp_path / "b").norm().item()
    assert norm > 1
    assert first_gradient(tmp_path / "a").norm().item() == pytest.approx(0.25, rel=1e-4)
    assert lines(tmp_path / "a")[0]["grad_norm"] == pytest.approx(norm)


def test_weight_decay_spares_vectors(tmp_path):
    def nothing(model, indices, step, generator):
        return sum(p.sum() for p in model.parameters()) * 0, {}

    model = linear()
    run(tmp_path, nothing, model, steps=1, warmup=0, min_lr_ratio=1.0)
    torch.testing.assert_close(model.weight, torch.full((1, 4), 0.5 * (1 - 0.01 * 0.1)))
    assert model.bias.item() == 0.5


def test_average_of_weights(tmp_path):
    average = Tiny()
    steps = iter(range(1, 12))

    def loss(model, indices, step, generator):
        if step > 1:  # the weights that the step before made
            t = next(steps)
            assert t == step - 1
            follow(model, t)
        return squared_error(model, indices, step, generator)

    def follow(model, t):
        for a, p in zip(average.parameters(), model.parameters(), strict=True):
            a.data.lerp_(p.data, 1 - min(0.5, (1 + t) / (10 + t)))

    model = Tiny()
    result = run(tmp_path, loss, model, ema=0.5, accumulation=1)
    follow(model, 12)
    torch.testing.assert_close(list(result.model.parameters()), list(average.parameters()))
    assert torch.equal(result.model.mean, model.mean)
    assert not torch.equal(result.model.layers[0].weight, model.layers[0].weight)


def test_without_average_the_model_itself_is_returned(tmp_path):
    model = Tiny()
    result = run(tmp_path, model=model, ema=0.0)
    assert result.model is model
    assert not model.training
    assert not any(name.startswith("average") for name in state(tmp_path))


def test_evaluation_changes_nothing(tmp_path, uninterrupted):
    looked = []

    def look(model, step):
        assert not torch.is_grad_enabled()
        assert not model.training
        torch.rand(5)
        looked.append(step)
        return {}

    model = Tiny()
    run(tmp_path, model=model, evaluate=look, sample=look, eval_every=5, sample_every=4)
    assert looked == [4, 5, 8, 10, 12, 12]
    assert model.training
    assert_equal(state(tmp_path), state(uninterrupted[0]))


def test_seeds_differ_between_uses_and_steps(tmp_path):
    seen = []

    def loss(model, indices, step, generator):
        seen.extend([torch.initial_seed(), generator.initial_seed()])
        return squared_error(model, indices, step, generator)

    run(tmp_path, loss, steps=5)
    assert len(set(seen)) == 2 * 2 * 5


@pytest.mark.parametrize(("native", "dtype"), [(True, torch.bfloat16), (False, torch.float32)])
def test_bf16_autocast(tmp_path, monkeypatch, native, dtype):
    monkeypatch.setattr("anyorder.inference.device.native_bf16", lambda device: native)
    seen = []

    def loss(model, indices, step, generator):
        seen.append(model(data()[0]).dtype)
        return squared_error(model, indices, step, generator)

    result = run(tmp_path, loss, steps=1, warmup=0, bf16=True, accumulation=1)
    assert seen == [dtype]
    assert {p.dtype for p in result.model.parameters()} == {torch.float32}


def test_compile(tmp_path, monkeypatch):
    graphs = []

    def backend(graph, inputs):  # a tenth of the time of the default backend, which makes C++ of the graph
        graphs.append(graph)
        return graph.forward

    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=backend))
    monkeypatch.setattr(shutil, "which", lambda name: name)  # and needs no C++ compiler
    compiled = run(tmp_path / "a", plain, linear(), steps=3, compile=True)
    assert graphs
    assert_equal(
        compiled.model.state_dict(), run(tmp_path / "b", plain, linear(), steps=3).model.state_dict()
    )


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler")
def test_compiled_transformer_trains_alike_and_keeps_its_names(tmp_path):
    def loss(model, indices, step, generator):
        tokens = torch.randint(5, (4, 6), generator=generator)
        return token_nll(model, tokens, None, random_orders(4, GRID, generator)).mean(), {}

    def trained(folder, compile):
        model = transformer(depth=1, rotary=True, qk_norm=True)
        return run(folder, loss, model, steps=3, compile=compile, ema=0.5, accumulation=1, eval_every=0)

    eager, compiled = (trained(tmp_path / str(compile), compile) for compile in (False, True))
    assert state(tmp_path / "True").keys() == state(tmp_path / "False").keys()
    # AdamW begins with the signs of gradients, however small they are: losses are close, not weights.
    assert compiled.metrics["loss"] == pytest.approx(eager.metrics["loss"], rel=1e-4)
    assert not any("_orig_mod" in name for name in state(tmp_path / "True"))


def test_compiling_needs_a_compiler(tmp_path, monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(ValueError, match=r"needs a C\+\+ compiler on the CPU, there is no no-such-compiler"):
        run(tmp_path, plain, linear(), steps=3, compile=True)


def test_extra_parameters_are_trained_and_resumed(tmp_path):
    def once(extra):
        def loss(model, indices, step, generator):
            total, parts = squared_error(model, indices, step, generator)
            return total + (extra(data()[0]) - 3).square().mean(), parts

        return loss

    extra = linear()
    run(tmp_path, once(extra), extra=extra, steps=4)
    assert not torch.equal(extra.weight, linear().weight)
    again = linear()
    run(tmp_path, once(again), extra=again, steps=4)
    assert_equal(again.state_dict(), extra.state_dict())
    assert state(tmp_path)["optimizer.2.exp_avg"].shape == extra.weight.shape


def test_extra_parameters_may_join_late(tmp_path):
    def late(extra, stop):
        def loss(model, indices, step, generator):
            if step == stop:
                signal.raise_signal(signal.SIGINT)
            total, parts = squared_error(model, indices, step, generator)
            return total + (extra(data()[0]).square().mean() if step > 3 else 0), parts

        return loss

    extra, again = linear(), linear()
    run(tmp_path / "a", late(extra, None), extra=extra, steps=6)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "b", late(again, 2), extra=again, steps=6)
    assert_equal(again.state_dict(), linear().state_dict())
    run(tmp_path / "b", late(again, None), extra=again, steps=6)
    assert_equal(state(tmp_path / "a"), state(tmp_path / "b"))


def test_tensorboard(tmp_path, monkeypatch):
    pytest.importorskip("tensorboard")
    run(tmp_path, steps=3, tensorboard=True)
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tmp_path)).Reload().Scalars("loss")
    assert [(e.step, e.value) for e in events] == [(3, pytest.approx(lines(tmp_path)[0]["loss"]))]
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(ValueError, match=r"pip install 'anyorder\[log\]'"):
        run(tmp_path, steps=3, tensorboard=True)


# --- non-finite numbers ---------------------------------------------------------------------------------

CONSTANT = {"warmup": 0, "min_lr_ratio": 1.0}


def bad_loss(model, total):
    return total * float("nan")


def bad_gradient(model, total):
    return total + (model.layers[0].weight * 0).sum().sqrt()


@pytest.mark.parametrize("spoil", [bad_loss, bad_gradient])
def test_non_finite_step_is_named_and_the_weights_before_it_kept(tmp_path, spoil):
    def loss(model, indices, step, generator):
        total, parts = squared_error(model, indices, step, generator)
        return (spoil(model, total) if step == 7 else total), parts

    with pytest.raises(NonFiniteLoss, match=r"broke down at step 7 .*nan") as caught:
        run(tmp_path / "a", loss, **CONSTANT, log_every=50, save_every=10, eval_every=0)
    assert isinstance(caught.value, ValueError)
    assert isinstance(caught.value, FloatingPointError)
    assert Checkpoints(tmp_path / "a").load_latest() is None
    run(tmp_path / "b", **CONSTANT, steps=6)
    kept, before = read_tensors(tmp_path / "a" / "nonfinite-step-00000007.safetensors"), state(tmp_path / "b")
    for name in kept:
        if name.startswith("model.layers"):
            assert torch.equal(kept[name], before[name]), name
    facts = json.loads((tmp_path / "a" / "nonfinite-step-00000007.json").read_text())
    assert facts["step"] == 7
    assert facts["indices"] == [batch_indices(7, b, 4, EXAMPLES).tolist() for b in (12, 13)]


def test_no_checkpoint_of_non_finite_buffers(tmp_path):
    def loss(model, indices, step, generator):
        found = squared_error(model, indices, step, generator)
        if step == 4:
            model.mean[0] = torch.nan
        return found[0].detach() * 0 + model.layers[3].bias.sum(), {}

    with pytest.raises(NonFiniteLoss, match=r"step 4 .finite loss, but non-finite weights or buffers"):
        run(tmp_path, loss, accumulation=1)
    assert Checkpoints(tmp_path).load_latest() is None


# --- settings and data ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"steps": 0}, "steps must be >= 1, got 0"),
        ({"keep": 0}, "keep must be >= 1"),
        ({"seed": -1}, "seed must be >= 0"),
        ({"clip": -0.5}, "clip must be >= 0"),
        ({"ema": 1.0}, r"ema must be in \[0, 1\), got 1.0"),
        ({"beta2": float("nan")}, r"beta2 must be in \[0, 1\)"),
        ({"learning_rate": 0.0}, "learning_rate must be above 0"),
        ({"steps": 5, "warmup": 6}, r"warmup must be in \[0, steps = 5\], got 6"),
        ({"min_lr_ratio": 1.1}, r"min_lr_ratio must be in \[0, 1\]"),
    ],
)
def test_bad_settings(changes, message):
    with pytest.raises(ValueError, match=message):
        TrainConfig(**changes)


def test_no_examples(tmp_path):
    with pytest.raises(ValueError, match="no examples"):
        run(tmp_path, examples=0)


@given(st.integers(0, 2**40), st.integers(1, 9), st.integers(1, 12))
def test_batches_are_cut_from_shuffled_epochs(seed, size, examples):
    row = np.concatenate([batch_indices(seed, batch, size, examples) for batch in range(3 * examples)])
    assert row.dtype == np.int64
    for epoch in row.reshape(-1, examples):
        assert sorted(epoch) == list(range(examples))


def test_epochs_and_seeds_shuffle_differently():
    orders = {tuple(batch_indices(seed, epoch, 50, 50)) for seed in range(3) for epoch in range(3)}
    assert len(orders) == 9


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_steps_never_wait_for_the_device(tmp_path, monkeypatch):
    step = trainer.Trainer.step

    def watched(self):
        torch.cuda.set_sync_debug_mode("error" if self.step_number > 1 else "default")
        try:
            step(self)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    def loss(model, indices, step, generator):
        x = torch.randn(8, 4, device="cuda", generator=generator)
        return (model(x) - x.sum(1, keepdim=True)).square().mean(), {}

    monkeypatch.setattr(trainer.Trainer, "step", watched)
    config = TrainConfig(**{**CONFIG, "bf16": True})
    result = train(Tiny(), loss, EXAMPLES, config, tmp_path, device="cuda")
    assert result.metrics["loss"] > 0


if __name__ == "__main__":
    _killed_and_resumed(Path(sys.argv[1]))


# --- early stopping ---------------------------------------------------------------------------------------


def scripted(values, seen=None):
    """An evaluation that returns one value after another, and keeps the weights it saw."""

    def evaluate(model, step):
        if seen is not None:
            seen[step] = {name: t.clone() for name, t in model.state_dict().items()}
        return {"test_nll": values[step]}

    return evaluate


def test_training_stops_when_the_watched_value_no_longer_falls(tmp_path):
    values, seen = {2: 3.0, 4: 1.0, 6: 2.0, 8: 1.5, 10: 0.5, 12: 0.1}, {}
    result = run(tmp_path, evaluate=scripted(values, seen), eval_every=2, patience=2)
    assert result.steps == 8, "two evaluations after the best one"
    assert_equal(result.model.state_dict(), seen[4])


def test_without_patience_the_last_weights_are_delivered(tmp_path):
    values, seen = {6: 1.0, 12: 2.0}, {}
    result = run(tmp_path, evaluate=scripted(values, seen))
    assert result.steps == 12
    assert_equal(result.model.state_dict(), seen[12])


def test_early_stopping_resumes_exactly(tmp_path):
    values = {2: 3.0, 4: 1.0, 6: 2.0, 8: 1.5, 10: 0.5, 12: 0.1}
    whole = run(tmp_path / "whole", evaluate=scripted(values), eval_every=2, patience=2)

    def interrupted(model, indices, step, generator):
        if step == 7:
            raise RuntimeError("the machine went away")
        return squared_error(model, indices, step, generator)

    with pytest.raises(RuntimeError, match="went away"):
        run(tmp_path / "part", interrupted, evaluate=scripted(values), eval_every=2, patience=2)
    again = run(tmp_path / "part", evaluate=scripted(values), eval_every=2, patience=2)
    assert again.steps == whole.steps
    assert_equal(again.model.state_dict(), whole.model.state_dict())


def test_what_is_watched_must_be_evaluated(tmp_path):
    with pytest.raises(ValueError, match="watch=test_nll is not evaluated: choose one of test_error"):
        run(tmp_path, patience=1)
    with pytest.raises(ValueError, match="patience needs evaluations"):
        TrainConfig(patience=1, eval_every=0)


def test_what_should_rise_is_watched_for_rising(tmp_path):
    values, seen = {2: 1.0, 4: 3.0, 6: 2.0, 8: 2.5, 10: 4.0, 12: 5.0}, {}

    def evaluate(model, step):
        return {"test_psnr": scripted(values, seen)(model, step)["test_nll"]}

    result = run(tmp_path, evaluate=evaluate, eval_every=2, patience=2, watch="test_psnr")
    assert result.steps == 8
    assert_equal(result.model.state_dict(), seen[4])
    with pytest.raises(ValueError, match="watch=test_psnr is for patience"):
        TrainConfig(watch="test_psnr")


def test_losses_may_watch_the_averaged_model(tmp_path):
    handed = []
    result = train(Tiny(), squared_error, EXAMPLES, TrainConfig(**CONFIG), tmp_path, ready=handed.append)
    assert handed == [result.model]
