"""Several processes: what they train and write is what one process does.

Run as a script, this file forks worlds of processes that run the command line as torchrun starts them: each
has its rank in the environment. Forks share what one process imported, so a world starts at once.
ANYORDER_KILLS says how many kills (6).
"""

import copy
import hashlib
import importlib
import json
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import traceback
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
import torch
import yaml
from test_kill import EXPERIMENT, TINY_VQ, photos

from anyorder.files import RowWriter, load_array
from anyorder.inference import processes
from anyorder.stages.common import Rows
from anyorder.stages.execute import execute
from anyorder.training import distributed

KILLS = int(os.environ.get("ANYORDER_KILLS", "6"))
DEEPER = {
    "tokenizer": {"loss": {"adversarial": 0.1, "discriminator_start": 2, "discriminator_layers": 1,
                           "discriminator_channels": 8}},
    "any": {"model": {"depth": 2, "width": 32, "heads": 2, "dropout": 0.1, "token_dropout": 0.1}},
    "ordered": {"model": {"location": True}},
    "tune": {"batch_size": 3},
    "eval": {"batch_size": 1},
}  # fmt: skip
"""Further settings of `test_kill.EXPERIMENT`: what draws random numbers, what is trained apart or shared."""
FEW = ("data", "tokenizer", "tokens", "any")
"""Stages that show in seconds whether processes train and encode as one."""
SHARED = (*FEW, "features", "orders", "ordered", "sample", "tune", "eval", "completion")
"""These, and one stage of each further kind of shared work."""


# --- worlds of forks --------------------------------------------------------------------------------------


def start(size, folder, arguments, arm=lambda rank: None):
    """Process ids of a world that runs `anyorder ARGUMENTS`; what rank r says goes to folder/r.log."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    pids = []
    for rank in range(size):
        if pid := os.fork():
            pids.append(pid)
            continue
        code = 99
        try:
            log = os.open(folder / f"{rank}.log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(log, 1)
            os.dup2(log, 2)
            ranks = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size}
            known = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, **ranks}
            os.environ.update({name: str(value) for name, value in known.items()})
            arm(rank)
            code = importlib.import_module("anyorder.cli.main").main([str(x) for x in arguments])
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
    return pids


def ended(pids):
    """Exit codes; when one process fails the others are told to end, as by torchrun."""
    codes = {}
    while len(codes) < len(pids):
        pid, status = os.wait()
        codes[pid] = os.waitstatus_to_exitcode(status)
        for other in set(pids) - codes.keys() if codes[pid] else ():
            os.kill(other, signal.SIGTERM)
    return [codes[pid] for pid in pids]


def run(size, folder, *arguments, **options):
    """What the first of `size` processes says; all of them succeed."""
    codes = ended(start(size, folder, arguments, **options))
    said = [(folder / f"{rank}.log").read_text() for rank in range(size)]
    assert codes == [0] * size, "\n".join(said)[-6000:]
    return said


def experiment(folder, names=tuple(EXPERIMENT), **train):
    """An experiment of every stage, or of these, in which a step has two passes."""
    stages = copy.deepcopy({name: stage for name, stage in EXPERIMENT.items() if name in names})
    if "photos" in stages:
        stages["photos"]["source"] = str(photos(folder / "photos"))
    for name, stage in stages.items():
        stage |= DEEPER.get(name, {})
        if "train" in stage:
            stage["train"] |= {"batch_size": 2, "accumulation": 2, **train}
    (folder / "x.yaml").write_text(yaml.safe_dump({"stages": stages}, sort_keys=False))
    return folder / "x.yaml"


def differing(a, b, names=tuple(EXPERIMENT)):
    """Names of the artifacts of two runs that are not the same bytes."""
    from anyorder.files import read_manifest

    return [x for x in names if len({read_manifest(out / x)["fingerprint"] for out in (a, b)}) > 1]


def finer(rank):
    """Arms a world: work is shared in pieces so small that each process gets some."""
    from anyorder.data.rows import batches
    from anyorder.stages import common, features, floors

    common._PART = 1
    for module in (features, floors):
        module.batches = lambda rows, size: batches(rows, min(size, 3))


def compared(rank):
    """Arms a world, as `finer`: after each step, what processes hold whole must be the same in all."""
    from anyorder.training.trainer import Trainer

    finer(rank)
    step = Trainer.step

    def and_compare(self):
        step(self)
        parts = [x for m in self.modules.values() for x in (*m.parameters(), *m.buffers())]
        whole = [x.detach().numpy().tobytes() for x in parts if not hasattr(x, "full_tensor")]
        hashes = {*processes.gathered(hashlib.sha256(b"".join(whole)).hexdigest())}
        assert len(hashes) == 1, f"processes differ after step {self.step_number} in {self.folder.name}"

    Trainer.step = and_compare


# --- the scenarios ----------------------------------------------------------------------------------------


def few_steps(folder):
    """Artifacts that differ between one process and two, which hold the same weights after each step."""
    path = experiment(folder, FEW, steps=5)
    run(1, folder, "run", path, f"out={folder / 'one'}")
    run(2, folder, "run", path, f"out={folder / 'two'}", arm=compared)
    return differing(folder / "one", folder / "two", FEW)


def every_stage(folder):
    """One and two processes write the same bytes; two with sharded weights nearly the same weights."""
    from anyorder.inference.weights import read_tensors

    path = experiment(folder)
    run(1, folder, "run", path, f"out={folder / 'one'}", arm=finer)
    said = run(2, folder, "run", path, f"out={folder / 'two'}", arm=compared)
    assert "->" in said[0]
    assert "->" not in said[1]  # one process talks
    found = {"two": differing(folder / "one", folder / "two")}
    sharded = experiment(folder, shard=True)
    run(2, folder, "run", sharded, f"out={folder / 'sharded'}", arm=compared)
    for name in ("tokenizer", "features", "any", "ordered", "online"):
        a, b = (read_tensors(folder / out / name / "model.safetensors") for out in ("one", "sharded"))
        found[name] = max(float((a[key].double() - b[key].double()).abs().max()) for key in a)
    return found


def shared(folder):
    """Artifacts that differ from those of one process; where one of several is killed, others go on.

    The trainings are those of one process: three would take sums of three terms in another sequence.
    """
    path, found = experiment(folder, SHARED), {}
    run(1, folder, "run", path, f"out={folder / 'one'}", arm=finer)
    untrained = [name for name in SHARED if "train" not in EXPERIMENT[name]]
    deaths = [(3, "tokens"), (2, "orders"), (3, "sample"), (2, "tune"), (3, "eval"), (2, "completion")]
    for name, runs in {"three": [(3, "")], "killed": [*deaths, (3, "")]}.items():
        out = folder / name
        shutil.copytree(folder / "one", out, ignore=lambda path, names: {*untrained} & {*names})
        for size, target in runs:
            codes = ended(start(size, folder, ["run", path, f"out={out}"], killed_in(target)))
            assert (-signal.SIGKILL in codes) == bool(target), (folder / "0.log").read_text()[-3000:]
            assert (0 in codes) != bool(target), codes
            assert not target or not (out / target / "manifest.json").exists()
        found[name] = differing(folder / "one", out, SHARED)
    return found


def killed_in(target):
    """Arms a world, as `finer`: process 1 is killed when it has made a batch of that artifact."""

    def arm(rank):
        from anyorder.stages.common import Rows

        finer(rank)
        append, mapped = Rows.append, processes.mapped

        def die():
            os.kill(os.getpid(), signal.SIGKILL)

        def and_append(self, **arrays):
            append(self, **arrays)
            return die() if target in self.folder.parts else None

        def and_map(work, batches, what):
            after = die if what == "likelihood" else lambda: None
            return mapped(lambda batch: (work(batch), after())[0], batches, what)

        if rank == 1 and target:
            Rows.append = and_append
            processes.mapped = and_map if target == "eval" else mapped

    return arm


SMALL = {"steps": 8, "batch_size": 2, "accumulation": 2, "save_every": 1, "log_every": 1, "eval_every": 4}


def trained(folder, out, **train):
    """Arguments of a small training on tokens in `folder`/tokens."""
    values = {**SMALL, **train}
    model = {"depth": 2, "width": 32, "heads": 2, "dropout": 0.1}
    settings = [f"train.{k}={v}" for k, v in values.items()] + [f"model.{k}={v}" for k, v in model.items()]
    return ["train", f"tokens={folder / 'tokens'}", f"out={out}", *settings]


def tokens(folder, classes=0):
    """A small token cache, without a tokenizer's work."""
    from anyorder.files import save_array
    from anyorder.stages.artifacts import Artifact

    rng = np.random.default_rng(0)
    with Artifact(folder / "tokens", "tokens", {}, {}) as artifact:
        for split, n in (("train", 24), ("test", 6)):
            save_array(artifact.folder / f"{split}.tokens.npy", rng.integers(0, 16, (n, 16), np.int32))
            save_array(artifact.folder / f"{split}.labels.npy", np.arange(n) % max(1, classes))
        artifact.finish(
            grid=[4, 4], vocab_size=16, classes=["a", "b"][:classes], tokenizer="none", data="none",
            image_size=[16, 16],
        )  # fmt: skip


def distance(a, b):
    """Largest difference of the weights of two models."""
    from anyorder.inference.weights import read_tensors

    a, b = (read_tensors(out / "model.safetensors") for out in (a, b))
    return max(float((a[name].double() - b[name].double()).abs().max()) for name in a)


def stopping_at(step, rank):
    """Arms a world: one process is sent SIGTERM while that step is logged."""

    def arm(mine):
        from anyorder.training.trainer import Trainer

        whole = Trainer.summary

        def summary(self):
            if self.step_number == step and mine == rank:
                signal.raise_signal(signal.SIGTERM)
            return whole(self)

        Trainer.summary = summary

    return arm


def last_loss(out):
    rows = map(json.loads, (out / "metrics.jsonl").read_text().splitlines())
    return [row["loss"] for row in rows if "loss" in row][-1]


def two_hundred_steps(folder):
    """Relative differences of the last losses from those of one process."""
    tokens(folder)
    length = {"steps": 200, "save_every": 1000, "log_every": 10, "eval_every": 0, "ema": 0.9}
    run(1, folder, "data", f"out={folder / 'data'}", "size=[16,16]", "max_train=64", "max_test=8")
    model = [f"model.{key}={value}".replace(" ", "").lower() for key, value in TINY_VQ.items()]
    settings = [f"train.{key}={value}" for key, value in {**SMALL, **length}.items()]
    tokenizer = ["tokenizer", f"data={folder / 'data'}", *settings, *model]
    found = {}
    for name, size, further in (("one", 1, []), ("ddp", 2, []), ("fsdp", 2, ["train.shard=true"])):
        run(size, folder, *trained(folder, folder / f"any-{name}", **length), *further)
        run(size, folder, *tokenizer, f"out={folder / f'vq-{name}'}", *further)
        for kind in ("any", "vq"):
            one, here = (last_loss(folder / f"{kind}-{x}") for x in ("one", name))
            found[f"{kind}-{name}"] = abs(here / one - 1)
    return found


def resharded(folder):
    """Differences of the weights after stops and in other numbers of processes; SIGTERM to one stops all.

    All are differences from one process, but for the last one: from two that were not stopped.
    """
    tokens(folder)
    length = {"accumulation": 4, "save_every": 1000, "log_every": 1, "eval_every": 0, "ema": 0.9}
    command = partial(trained, folder, steps=24, **length)
    run(1, folder, *command(folder / "one"))
    run(2, folder, *command(folder / "two", shard=True))
    found = {}
    for name, parts in {
        "4": [(4, 0, False)],
        "4 sharded": [(4, 0, True)],
        "2 sharded, 1, 2 sharded": [(2, 8, True), (1, 16, False), (2, 0, True)],
        "1, 4, 2 sharded, 4 sharded": [(1, 6, False), (4, 12, False), (2, 18, True), (4, 0, True)],
        "4 sharded, 2, 2 sharded, 2": [(4, 6, True), (2, 12, False), (2, 18, True), (2, 0, False)],
        "2 sharded, 2 sharded": [(2, 12, True), (2, 0, True)],
    }.items():
        for size, stop, shard in parts:
            arm = stopping_at(stop, size - 1) if stop else (lambda rank: None)
            codes = ended(start(size, folder, command(folder / name, shard=shard), arm))
            # The second SIGTERM, as of torchrun, may reach a process that has saved and listens no more.
            codes = [130 if code == -signal.SIGTERM and stop else code for code in codes]
            said = "".join((folder / f"{rank}.log").read_text()[-3000:] for rank in range(size))
            assert codes == [130 if stop else 0] * size, f"{codes}: {said}"
            assert "Traceback" not in (folder / "0.log").read_text()
            assert not stop or (folder / name / f"checkpoints/step-{stop:08d}").is_dir()
        found[name] = distance(folder / ("two" if name == "2 sharded, 2 sharded" else "one"), folder / name)
    return found


def three(folder):
    """Difference of the weights in 3 processes from those in 1; a NaN in one of 3 ends all with one line."""
    tokens(folder)
    for size, out in ((1, "one"), (3, "three")):
        run(size, folder, *trained(folder, folder / out, accumulation=3))

    def breaking(rank):
        """Process 1 meets a NaN in step 5."""
        from anyorder.method import loss

        whole, calls = loss.cross_entropy, []

        def broken(*arguments):
            calls.append(rank)
            return whole(*arguments) * (float("nan") if len(calls) == 5 else 1)

        if rank == 1:
            loss.cross_entropy = broken

    codes = ended(start(3, folder, trained(folder, folder / "broken", accumulation=3), breaking))
    assert 2 in codes
    assert 0 not in codes
    said = "".join((folder / f"{rank}.log").read_text() for rank in range(3))
    assert said.count("training broke down at step 5 (loss nan") == 1, said
    assert "Traceback" not in said
    [report] = (folder / "broken").glob("nonfinite-step-*.json")
    assert len(json.loads(report.read_text())["indices"]) == 3
    return distance(folder / "one", folder / "three")


def kills(folder):
    """Kill one process or all, at random, some while they save; go on in another number of processes."""
    tokens(folder)
    run(1, folder, *trained(folder, folder / "quiet", steps=24))
    found, rng, done, saving = {}, random.Random(KILLS), 0, 0
    for shard in (False, True):
        out = folder / f"shard-{shard}"
        for attempt in range(1000):
            size = 2 if attempt == 0 else rng.choice((1, 2, 2))
            begun = time.perf_counter()
            pids = start(size, folder, trained(folder, out, steps=24, shard=shard, ema=0))
            if attempt < KILLS // 2:
                saved = len([*out.glob("checkpoints/step-*")])
                wait_for(lambda out=out, saved=saved: [*out.glob("checkpoints/.step*")] or saved, begun)
                if attempt % 2:
                    time.sleep(rng.uniform(0, 0.5))
                saving += bool([*out.glob("checkpoints/.step*")])
                for pid in pids if rng.random() < 0.3 else [rng.choice(pids)]:
                    os.kill(pid, signal.SIGKILL)
            codes = ended(pids)
            said = (folder / "0.log").read_text()
            done += -signal.SIGKILL in codes
            if codes == [0] * size:
                break
            assert -signal.SIGKILL in codes, said[-3000:]
            assert "Traceback" not in said, said[-3000:]
        found[str(shard)] = distance(folder / "quiet", out)
    return {"kills": done, "while a state was written": saving, **found}


def kinds(folder):
    """Largest difference of the weights of each kind of training, in two processes, from one process."""
    from conftest import published

    from anyorder.adapters import arpg, randar

    tokens(folder, classes=2)
    for name, model in {"randar": randar.RandAR, "arpg": arpg.ARPG}.items():
        network = published(model, width=64, vocab_size=16, num_classes=2, grid=[4, 4])
        torch.save({"model": network.state_dict()}, folder / f"{name}.pt")
        run(1, folder, "convert", folder / f"{name}.pt", folder / name, "heads=1", "grid=4,4")
    small = {"depth": 2, "width": 32, "heads": 2, "dropout": 0.1}
    special = {
        "bf16": {"model": small, "train": {"bf16": True}},
        "checkpointing": {"model": {**small, "checkpointing": True}},
        "groups": {"model": small, "groups": [8, 4]},
        "lora": {"init": "checkpointing", "lora": 2},
        "randar": {"init": str(folder / "randar")},
        "randar-lora": {"init": str(folder / "randar"), "lora": 2},
        "arpg": {"init": str(folder / "arpg")},
        "learn_orders": {"model": {**small, "location": True}, "learn_orders": 2},
    }
    always = {**SMALL, "steps": 5, "save_every": 5, "bf16": False, "ema": 0.5}
    for size, shard in ((1, False), (2, False), (2, True)):
        names = [name for name in special if not (shard and name == "learn_orders")]
        stages = {
            name: {
                "stage": "train", "tokens": str(folder / "tokens"), **special[name],
                "train": {**always, "shard": shard, **special[name].get("train", {})},
            }
            for name in names
        }  # fmt: skip
        (folder / "x.yaml").write_text(yaml.safe_dump({"stages": stages}, sort_keys=False))
        run(size, folder, "run", folder / "x.yaml", f"out={folder / f'{size}-{shard}'}", arm=with_bf16)
    alone, two, sharded = (folder / name for name in ("1-False", "2-False", "2-True"))
    return {
        "DDP": {name: distance(alone / name, two / name) for name in special},
        "shard": {name: distance(alone / name, sharded / name) for name in names},
    }


def with_bf16(rank):
    """Arms a world: bfloat16 is computed wherever a training asks for it."""
    os.environ["ANYORDER_BF16"] = "on"


def in_use(folder):
    """A second run in a folder is refused; where one of two processes is killed, the other says so."""
    tokens(folder)
    second, out = folder / "second", folder / "out"
    second.mkdir()
    command = trained(folder, out, steps=100_000, save_every=1000)
    for victim in (1, 0):
        before, pids = logged(out), start(2, folder, command)
        wait_for(lambda before=before: logged(out) > before, time.perf_counter() + 300)
        for size in (1, 2):
            codes = ended(start(size, second, command))
            said = (second / "0.log").read_text()
            assert codes[0] == 2, said
            assert 0 not in codes
            assert f"out is being written by process {pids[0]} " in said
        os.kill(pids[victim], signal.SIGKILL)
        codes = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]  # nobody else ends it
        said = (folder / f"{1 - victim}.log").read_text()
        assert (codes[victim], codes[1 - victim]) == (-signal.SIGKILL, 1), said[-3000:]
        assert "Traceback" not in said
        error = "anyorder: error: another process of this run ended: its error is above, or it was killed"
        assert said.splitlines()[-1].startswith(error)
    return {}


def logged(out):
    """Bytes of the log of a training so far."""
    lines = out / "metrics.jsonl"
    return lines.stat().st_size if lines.is_file() else 0


def wait_for(holds, begun):
    """Wait until something holds, 20 seconds at most."""
    while not holds() and time.perf_counter() < begun + 20:
        time.sleep(0.01)


def refusals(folder):
    """What is refused, and damage that is noticed; returns nothing."""
    from anyorder.training.checkpoint import Checkpoints

    tokens(folder)
    codes = ended(start(2, folder, trained(folder, folder / "odd", accumulation=3)))
    assert 2 in codes
    error = (folder / "0.log").read_text().splitlines()[-1]
    assert re.search("error: train.accumulation=3 .* cannot be shared by 2 processes: give a multiple", error)
    assert not (folder / "odd").exists()

    # Four states of sharded weights: the newest are damaged, each in another way.
    out = folder / "damaged"
    run(2, folder, *trained(folder, out, shard=True, keep=4))
    states = [sorted(path.glob("shard-*")) for path in sorted(out.glob("checkpoints/step-*"))[1:]]
    assert [len(files) for files in states] == [2, 2, 2]
    states[0][0].unlink()
    os.truncate(states[1][1], 99)
    content = bytearray(states[2][0].read_bytes())
    content[-5] ^= 1
    states[2][0].write_bytes(content)
    manifest = json.loads((out / "manifest.json").read_text())  # as a kill before the end would leave it
    begun = {name: manifest[name] for name in ("stage", "config", "inputs")}
    (out / ".identity.json").write_text(json.dumps(begun))
    (out / "manifest.json").unlink()
    shutil.move(out / "model.safetensors", folder)
    said = run(2, folder, *trained(folder, out, shard=True, keep=4))[0]
    for problem in ("was altered", "has 99 bytes instead of", "No such file"):
        assert problem in said, said[-3000:]
    assert Checkpoints(out).load_latest()[0] == 8
    assert (folder / "model.safetensors").read_bytes() == (out / "model.safetensors").read_bytes()
    return {}


def streamed(folder):
    """Artifacts that differ between one process and two, each with workers, over images without a cache."""
    from anyorder.files import fingerprint

    source, data = photos(folder / "photos"), folder / "data"
    run(1, folder, "data", f"source={source}", "size=16", "test_fraction=0.2", "cache=false", f"out={data}")
    model = [f"model.{key}={value}".replace(" ", "").lower() for key, value in TINY_VQ.items()]
    settings = [f"train.{key}={value}" for key, value in SMALL.items()]
    copies = ["mirror=true", "crops=true"]
    for size in (1, 2):
        out = folder / f"{size}"
        run(size, out.parent, "tokenizer", f"data={data}", f"out={out / 'vq'}", *settings, *model, *copies)
        further = [f"tokenizer={out / 'vq'}", f"out={out / 'tokens'}", "batch_size=3", *copies]
        run(size, out.parent, "tokens", f"data={data}", *further)
    names = ("vq", "tokens")
    return [name for name in names if len({fingerprint(folder / f"{n}" / name) for n in (1, 2)}) > 1]


def rows_in_parts(folder):
    """Arrays of 1003 rows in parts of 16 batches; kills of processes, then another number of them."""
    arrays = {"a": ((2,), np.int64), "b": ((), np.float32)}

    def filling(out, stop, seen):
        def work(arguments):
            with processes.joined():
                rows = Rows(out, arrays, 1003, 3, "rows")
                for i, some in enumerate(rows):
                    if (processes.rank(), i) == stop:
                        os.kill(os.getpid(), signal.SIGKILL)
                    (seen / f"{some[0]}-{os.getpid()}").touch()
                    rows.append(a=np.stack([some, -some], 1), b=some / 7)
            return 0

        def arm(rank):
            importlib.import_module("anyorder.cli.main").main = work

        return arm

    def filled(name, *runs):
        """Files, and how many batches were made twice, after runs of (processes, who stops when)."""
        (folder / f"{name}-seen").mkdir()
        for size, stop in runs:
            codes = ended(start(size, folder, [], filling(folder / name, stop, folder / f"{name}-seen")))
            assert (codes == [0] * size) == (stop is None), (folder / "0.log").read_text()[-3000:]
        made = [path.name.partition("-")[0] for path in (folder / f"{name}-seen").iterdir()]
        return {p.name: p.read_bytes() for p in (folder / name).iterdir()}, len(made) - len({*made})

    expected, twice = filled("one", (1, None))
    assert [*expected] == ["a.npy", "b.npy"] or [*expected] == ["b.npy", "a.npy"]
    assert twice == 0
    assert filled("two", (2, None)) == (expected, 0)
    assert filled("three", (3, None)) == (expected, 0)
    found = {}
    for name, runs in {
        "one, two": [(1, (0, 100)), (2, None)],
        "two, one": [(2, (1, 100)), (1, None)],
        "two, one, three": [(2, (0, 50)), (1, (0, 20)), (3, (1, 30)), (2, None)],
    }.items():
        files, found[name] = filled(name, *runs)
        assert files == expected, name
    return found


def scenario(name, folder):
    """What a scenario returns, in a process of its own, with one thread: threads do not survive a fork."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "ANYORDER_BF16": "off"}
    command = [sys.executable, __file__, name, str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr[-8000:]
    return json.loads(done.stdout)


@pytest.mark.parametrize(("rank", "passes"), [(0, [0, 3]), (1, [1, 4]), (2, [2, 5])])
def test_processes_take_the_passes_of_a_step_in_turn(monkeypatch, rank, passes):
    monkeypatch.setattr(processes, "size", lambda: 3)
    monkeypatch.setattr(processes, "rank", lambda: rank)
    assert list(distributed.own_passes(6)) == passes
    with pytest.raises(
        ValueError, match=r"train.accumulation=4 .* shared by 3 processes: give a multiple of 3"
    ):
        distributed.own_passes(4)


def test_each_process_takes_a_gpu_of_its_own(monkeypatch):
    asked = []
    for name, value in {"RANK": "1", "LOCAL_RANK": "1"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(processes, "device", lambda: torch.device("cuda"))
    monkeypatch.setattr(torch.cuda, "set_device", asked.append)
    for name in ("init_process_group", "new_group", "destroy_process_group"):
        monkeypatch.setattr(processes.dist, name, lambda *a, **k: asked.extend(a))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with processes.joined():
        assert asked == [1, "cpu:gloo,cuda:nccl"]
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with (
        pytest.raises(ValueError, match="no GPU for process 1: give --nproc-per-node=1"),
        processes.joined(),
    ):
        pass


@dataclass
class Hungry:
    inputs: ClassVar[tuple[str, ...]] = ()
    batch_size: int = 8

    def run(self, artifact):
        raise torch.OutOfMemoryError("CUDA out of memory")


def test_a_stage_without_enough_memory_says_what_to_change(tmp_path):
    with pytest.raises(ValueError, match="out of memory with batch_size=8: batch_size=4 needs about half"):
        execute("stage", Hungry(), tmp_path)
    with pytest.raises(ValueError, match="out of memory with batch_size=1: choose a smaller model"):
        execute("stage", Hungry(1), tmp_path)


def test_batches_keep_their_bounds_when_a_kill_tore_one(tmp_path):
    """11 rows of 3 arrays, 4 at a time; of the second batch two rows and a half are on disk."""
    arrays = {"a": ((2,), np.int64), "b": ((), np.float32)}
    begun = RowWriter(tmp_path, arrays, 4)
    begun.append(a=np.zeros((6, 2)), b=np.zeros(6))
    seen, rows = [], Rows(tmp_path, arrays, 11, 4, "rows")
    for some in rows:
        seen.append(some.tolist())
        rows.append(a=np.stack([some, some], 1), b=some)
    assert seen == [[4, 5, 6, 7], [8, 9, 10]]
    assert load_array(tmp_path / "b.npy").tolist() == [0] * 4 + list(range(4, 11))


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_images_without_a_cache_are_the_same_in_two_processes(tmp_path, monkeypatch):
    monkeypatch.setenv("ANYORDER_WORKERS", "2")
    assert scenario("streamed", tmp_path) == []


@pytest.mark.timeout(600)
def test_rows_are_the_same_bytes_in_any_number_of_processes(tmp_path):
    found = scenario("rows_in_parts", tmp_path)
    print(found)
    assert found["one, two"] <= 1
    assert max(found.values()) <= 3 * 16 * 2  # of each killed process, and of each that it took along, a part


@pytest.mark.timeout(600)
def test_a_few_steps_are_the_same_in_two_processes(tmp_path):
    assert scenario("few_steps", tmp_path) == []


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_shared_work_is_the_same_in_three_processes_and_in_others_after_kills(tmp_path):
    assert scenario("shared", tmp_path) == {"three": [], "killed": []}


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_every_stage_is_the_same_in_two_processes(tmp_path):
    found = scenario("every_stage", tmp_path)
    print(found)
    assert found.pop("two") == []
    assert max(found.values()) < 1e-6


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_killed_processes_go_on_in_any_number(tmp_path):
    found = scenario("kills", tmp_path)
    print(found)
    assert found["kills"] >= KILLS // 2 * 2
    assert found["while a state was written"] > 0
    assert found["False"] < 1e-6
    assert found["True"] < 1e-5


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_two_hundred_steps_end_as_in_one_process(tmp_path):
    found = scenario("two_hundred_steps", tmp_path)
    print(found)
    assert found["any-ddp"] == found["vq-ddp"] == 0
    assert max(found.values()) <= 1e-5


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_a_run_goes_on_in_another_number_of_processes(tmp_path):
    found = scenario("resharded", tmp_path)
    print(found)
    assert found.pop("2 sharded, 2 sharded") == 0
    assert max(found.values()) < 1e-6


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_each_kind_of_training_is_the_same_in_two_processes(tmp_path):
    found = scenario("kinds", tmp_path)
    print(found)
    assert {name for name, apart in found["DDP"].items() if apart} == set()
    assert max(found["shard"].values()) < 1e-6


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_a_folder_in_use_is_refused_and_a_killed_process_is_missed(tmp_path):
    scenario("in_use", tmp_path)


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_three_processes_end_as_one_and_a_nan_in_one_of_them_ends_all(tmp_path):
    assert scenario("three", tmp_path) < 1e-5  # three terms are summed in another sequence


@pytest.mark.timeout(600)
def test_what_several_processes_refuse(tmp_path):
    scenario("refusals", tmp_path)


if __name__ == "__main__":
    heavy = ("torch._dynamo", "torch.distributed.fsdp", "torch.distributed.checkpoint")
    for module in ("anyorder.cli.main", "anyorder.stages.experiment", *heavy):
        importlib.import_module(module)
    print(json.dumps(globals()[sys.argv[1]](Path(sys.argv[2]))))
