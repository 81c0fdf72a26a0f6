"""Every setting of every command changes something or is refused.

`COMMANDS` lists for each setting what to change, with the settings that it needs beside it. What is compared:
the files that are written, which numbers of images and of random streams are asked for, and what is compiled.
The fields of classes that several commands share are tested in test_effects.py; here one of them shows that
the command passes the whole group on.
"""

from __future__ import annotations

import hashlib
import json
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import uvicorn
from conftest import published, transformer
from PIL import Image

from anyorder import Pipeline
from anyorder.adapters.arpg import ARPG
from anyorder.adapters.llamagen import LlamaGen
from anyorder.bench import bench, workloads
from anyorder.cli import fit
from anyorder.cli import images as image_commands
from anyorder.cli import plan as planning
from anyorder.cli.commands import CONFIGS, config_class
from anyorder.data import caches
from anyorder.demo import server
from anyorder.files import TIMES
from anyorder.inference import figures
from anyorder.inference import pipeline as inference
from anyorder.inference.folders import save_parts
from anyorder.method import sampling
from anyorder.settings import _settings, parse
from anyorder.stages import fit as fit_stage
from anyorder.stages import generation
from anyorder.stages import iterate as iterate_stage
from anyorder.stages import orders as orders_stage
from anyorder.stages.execute import execute
from anyorder.stages.experiment import STAGES, load_experiment
from anyorder.tokenizers.vq import VQConfig, VQModel

Settings = dict[str, Any]
INFERRED = {"policy.order": "entropy", "policy.sign": -1}


class Case(NamedTuple):
    """`beside` with `change` against `beside` alone; with a `message` the change is refused."""

    change: Settings
    beside: Settings = {}  # noqa: RUF012 - never changed
    message: str = ""


class Command(NamedTuple):
    """Settings of a small run, and the cases by setting; a key that ends with "." stands for a group."""

    small: Settings
    cases: dict[str, Case]


def change(name: str, value: Any, **beside: Any) -> dict[str, Case]:
    return {name: Case({name: value}, beside)}


def refused(name: str, value: Any, message: str, **beside: Any) -> dict[str, Case]:
    return {name: Case({name: value}, beside, message)}


def group(name: str, key: str, value: Any) -> dict[str, Case]:
    return {f"{name}.": Case({f"{name}.{key}": value})}


VQ = {
    "model.channels": 8, "model.multipliers": (1, 1, 2), "model.groups": 1, "model.res_blocks": 1,
    "model.z_channels": 8, "model.vocab_size": 16, "model.code_dim": 4,
}  # fmt: skip
FEW = {"train.steps": 2, "train.batch_size": 4, "train.log_every": 1, "train.eval_every": 2}
TRAINED = group("train", "seed", 3)
DRAWN = group("policy", "order", "raster") | group("sampling", "temperature", 0)
DRAWN |= group("guidance", "scale", 9)
ONLINE = {"online.order": "entropy", "train.ema": 0.5}
MOVED = "was made with|were made by"

ONE_POINT = {"temperatures": (1.0,), "scales": (1.0,)}
TRANSFORMER = {"model.depth": 1, "model.width": 16, "model.heads": 2}

CHAIN: dict[str, tuple[str, Settings]] = {
    "data": ("data", {"size": (16, 16), "max_train": 16, "max_test": 8}),
    "wide": ("data", {"size": (16, 24), "max_train": 8, "max_test": 8}),
    "streamed": ("data", {"source": "pictures", "size": (16, 16), "cache": False}),
    "vq": ("tokenizer", {"data": "data", **VQ, **FEW}),
    "vq2": ("tokenizer", {"data": "data", **VQ, **FEW, "train.seed": 1}),
    "tokens": ("tokens", {"data": "data", "tokenizer": "vq"}),
    "tokens2": ("tokens", {"data": "data", "tokenizer": "vq2"}),
    "wide-tokens": ("tokens", {"data": "wide", "tokenizer": "vq"}),
    "wide-tokens2": ("tokens", {"data": "wide", "tokenizer": "vq", "batch_size": 3}),
    "features": ("features", {"data": "data", "channels": (8,), **FEW}),
    "features2": ("features", {"data": "data", "channels": (8,), **FEW, "train.seed": 1}),
    "any": ("train", {"tokens": "tokens", "model.depth": 1, "model.width": 16, "model.heads": 2, **FEW}),
    "any2": ("train", {"tokens": "tokens", "model.depth": 1, "model.width": 16, "model.heads": 2, **FEW,
                       "train.seed": 1}),
    "orders": ("orders", {"model": "any", "tokens": "tokens", "test_limit": 4}),
    "orders2": ("orders", {"model": "any2", "tokens": "tokens", "test_limit": 4}),
    "headed": ("train", {"tokens": "tokens", "init": "any", "orders": "orders", "model.location": True,
                         **FEW}),
    "samples": ("sample", {"model": "any", "num_images": 8}),
    "samples2": ("sample", {"model": "any", "num_images": 8, "seed": 9}),
    "scored": ("sample", {"model": "any", "scorer": "any2", "num_images": 8}),
    "by-class": ("sample", {"model": "any", "num_images": 8, "orders": "orders",
                            "policy.order": "class_mean"}),
    "cut": ("data", {"size": (16, 16), "max_train": 16, "max_test": 8, "max_validation": 8}),
    "cut-tokens": ("tokens", {"data": "cut", "tokenizer": "vq"}),
    "cut-features": ("features", {"data": "cut", "channels": (8,), **FEW}),
    "cut-any": ("train", {"tokens": "cut-tokens", **TRANSFORMER, **FEW}),
    "cut-any2": ("train", {"tokens": "cut-tokens", **TRANSFORMER, **FEW, "train.seed": 1}),
    "cut-orders": ("orders", {"model": "cut-any", "tokens": "cut-tokens", "test_limit": 4}),
    "cut-orders2": ("orders", {"model": "cut-any2", "tokens": "cut-tokens", "test_limit": 4}),
    "cut-samples": ("sample", {"model": "cut-any", "num_images": 8}),
    "tune": ("tune", {"model": "cut-any", "features": "cut-features", "num_images": 4,
                      "temperatures": (0.01,), "scales": (3.0,)}),
    "eval": ("eval", {"samples": "samples", "features": "features", "nll_images": 4}),
    "eval2": ("eval", {"samples": "samples2", "features": "features", "nll_images": 4}),
}  # fmt: skip
"""Artifacts that the cases name."""


def generating(**small: Any) -> Settings:
    return {"model": "any", "num_images": 4, "bf16": False, **small}


COMMANDS: dict[str, Command] = {
    "data": Command({"source": "pictures", "size": (8, 8)}, {
        **change("source", "other"), **change("size", (8, 16)), **change("fit", "letterbox"),
        **change("fill", (1, 2, 3), fit="letterbox"), **change("max_pixels", 250),
        **refused("max_skipped", 0.0, "more than max_skipped", max_pixels=240),
        **change("max_train", 2), **change("max_test", 1, test_fraction=0.5), **change("max_validation", 2),
        **change("test_fraction", 0.5), **change("cache", False),
        **change("seed", 1, source="sunsets", size=(16, 16), max_train=2, max_test=1),
        **change("image", "b", source="table.parquet", image="a"),
        **change("label", "kind", source="single.parquet"),
        **change("captions", "text", source="single.parquet"),
        **change("attributes", ("kind",), source="single.parquet"),
    }),
    "tokenizer": Command({"data": "data", **VQ, **FEW}, {
        **change("data", "wide"), **{"init": Case({"init": "vq"}, {})}, **change("mirror", True),
        **change("crops", True, data="streamed"),
        **group("model", "channels", 16), **group("loss", "l1", 3), **TRAINED,
    }),
    "features": Command({"data": "data", "channels": (8,), **FEW}, {
        **change("data", "wide"), **change("init", "features2"),
        **refused("extractor", "inception", "are for a classifier"),
        **refused("label", "hue", "unknown attribute"), **change("channels", (16,)),
        **change("max_train", 8), **TRAINED,
        **refused("bf16", True, "bf16 is for extractor=efficientnet-lite0"),
    }),
    "tokens": Command({"data": "data", "tokenizer": "vq"}, {
        **change("data", "wide"), **change("tokenizer", "vq2"), **change("batch_size", 3),
        **change("mirror", True), **change("crops", True, data="streamed"),
        "text.": Case({"text.length": 3}, {}, "has no captions"),
    }),
    "train": Command({"tokens": "tokens", "model.depth": 1, "model.width": 16, "model.heads": 2, **FEW}, {
        **change("tokens", "tokens2"), **change("order", "raster"), **change("orders", "orders"),
        **change("orders_as", "class_mean", orders="orders"),
        "online.": Case({"online.order": "margin"}, {**ONLINE, "init": "any"}),
        **change("online_every", 2, **ONLINE, **{"train.steps": 9}),
        **change("jitter", 4.0, orders="orders"), **change("random_share", 0.9, orders="orders"),
        **change("random_share_end", 0.9, orders="orders"), **change("init", "any"),
        **change("init_share", 0.5, init="any"),
        **change("random_share_ramp", (0.0, 0.5), order="raster", random_share=1.0, random_share_end=0.0,
                 **{"train.steps": 4}),
        **change("network", "own_parts:Counts"),
        **change("network_settings", {"smoothing": "9"}, network="own_parts:Counts"),
        **change("lora", 2, init="any"), **change("groups", (4,)), **change("learn_orders", 2, init="headed"),
        **change("groups_schedule", "cosine", groups=(4,)),
        **refused("tokenizer", "vq2", MOVED, **{"train.sample_every": 1}),
        **group("model", "depth", 2), **TRAINED,
    }),
    "orders": Command({"model": "any", "tokens": "tokens", "test_limit": 4, "batch_size": 8}, {
        **change("model", "any2"), **refused("tokens", "tokens2", MOVED), **change("data", "data"),
        **change("orders", "orders2", orders="orders", **{"policy.class_weight": 90.0}),
        **group("policy", "sign", -1), **change("limit", 4), **change("test_limit", 3),
        **change("batch_size", 3), **change("bf16", True), **change("compile", True),
        **change("seed", 5, **{"policy.temperature": 9.0}),
    }),
    "iterate": Command({"model": "any", "tokens": "tokens", "rounds": 1, "test_limit": 4, **FEW}, {
        **change("model", "any2"), **refused("tokens", "tokens2", MOVED), **change("rounds", 2),
        **change("patience", 2, rounds=3), **group("first", "sign", -1),
        "policy.": Case({"policy.order": "margin"}, {"model": "headed"}), **change("limit", 4),
        **change("test_limit", 3), **change("jitter", 4.0), **change("random_share", 0.9),
        **change("random_floor", 0.4, rounds=2, patience=2), **TRAINED,
    }),
    "sample": Command(generating(), {
        **change("model", "any2"), **refused("tokens", "tokens2", MOVED),
        **refused("tokenizer", "vq2", MOVED), **change("scorer", "any2", **INFERRED),
        **change("orders", "orders2", orders="orders", **{"policy.order": "class_mean"}),
        **change("num_images", 3), **change("batch_size", 3),
        **change("bf16", True, **{"policy.order": "raster"}), **change("compile", True),
        **change("seed", 5), **change("hide", ("class",)),
        **change("classes", "uniform"),
        **change("settings", "tune", model="cut-any"),
        **refused("prompts", ("a sun",), "prompts need a model"), **DRAWN,
    }),
    "tune": Command({**generating(model="cut-any", features="cut-features"), **ONE_POINT}, {
        **change("model", "cut-any2"), **refused("features", "features", MOVED),
        **refused("tokens", "tokens2", MOVED), **refused("tokenizer", "vq2", MOVED),
        **change("scorer", "cut-any2", **INFERRED),
        **change("orders", "cut-orders2", orders="cut-orders", **{"policy.order": "class_mean"}),
        **change("temperatures", (0.5,)), **change("scales", (2.0,)), **change("num_images", 5),
        **change("batch_size", 3), **change("bf16", True, **{"policy.order": "raster"}), **change("seed", 5),
        **group("policy", "order", "raster"), **group("sampling", "top_k", 1),
        "guidance.": Case({"guidance.schedule": "linear"}, {"scales": (9.0,)}),
    }),
    "eval": Command({"samples": "samples", "features": "features", "nll_images": 4}, {
        **change("samples", "samples2"), **change("features", "features2"), **change("nll_images", 0),
        **change("batch_size", 3), **change("kid_subset_size", 4), **change("rfd_images", 4),
        **{role: Case({role: other}, {"samples": "scored"}, MOVED) for role, other in (
            ("model", "any2"), ("data", "wide"), ("tokens", "tokens2"), ("scorer", "any"),
            ("orders", "orders"),
        )},
        **refused("attribute_features", "features", "unknown attribute"),
        **refused("tokenizer", "vq2", MOVED), **change("reference", "adm.npz"),
        **change("split", "validation", split="test", samples="cut-samples", features="cut-features"),
    }),
    "compare": Command({"a": "eval", "b": "eval2", "resamples": 200}, {
        **change("a", "eval2"), **change("b", "eval"), **refused("features", "features2", MOVED),
        **change("resamples", 201), **change("confidence", 0.5), **change("seed", 1),
    }),
    "completion": Command(generating(features="features", seeds=(0,)), {
        **change("model", "any2"), **change("features", "features2"), **refused("data", "wide", MOVED),
        **refused("tokens", "tokens2", MOVED), **refused("tokenizer", "vq2", MOVED),
        **change("scorer", "any2", **INFERRED),
        **change("orders", "orders2", orders="orders", **{"policy.order": "class_mean"}),
        **change("mask", "lower"), **change("num_images", 5), **change("seeds", (1,)),
        **change("batch_size", 3), **change("bf16", True, **{"policy.order": "raster"}),
        **group("filling", "feather", 0), **DRAWN,
    }),
    "grid": Command({"model": "any", "other": "wide-tokens", "num_images": 4, "seeds": (0,), "samples": 4}, {
        **change("model", "any2"), **refused("other", "tokens2", MOVED),
        **refused("tokens", "tokens2", MOVED), **refused("tokenizer", "vq2", MOVED),
        **change("num_images", 3), **change("seeds", (1,)), **change("samples", 3),
        **change("scorer", "any2", **INFERRED),
        **refused("orders", "orders", "orders has no effect"), **DRAWN,
    }),
    "pipeline": Command({"model": "any"}, {
        **change("samples", "scored"), **change("model", "any2"), **refused("tokens", "tokens2", MOVED),
        **refused("tokenizer", "vq2", MOVED), **change("scorer", "any2"), **change("orders", "orders"),
        **group("policy", "order", "raster"), **group("sampling", "temperature", 0),
        **change("good_orders", ("random",)), **change("example_class", "orange"), **change("half", True),
    }),
    "sample pipeline": Command({"pipeline": "toy", "num_images": 2, "policy.order": "entropy"}, {
        **change("pipeline", "toy2"), **change("class_labels", ("dog",)),
        **refused("prompts", ("red",), "prompts need"),
        **refused("attributes", {"hue": "red"}, "unknown attribute"), **change("num_images", 3),
        **group("sampling", "temperature", 0), **change("scale", 2), **change("compile", True),
        **group("policy", "order", "raster"), **change("guidance_scale", 9.0), **change("seed", 5),
        **change("batch_size", 1),
    }),
    "complete": Command({"pipeline": "toy", "image": "image.png", "pad": (8, 8, 8, 8)}, {
        **change("pipeline", "toy2"), **change("image", "image2.png"),
        "mask": Case({"mask": "mask.png", "pad": None}),
        "box": Case({"box": (0, 0, 4, 4), "pad": None}), **change("pad", (4, 0, 0, 0)),
        "keep": Case({"keep": 0.5, "pad": None}),
        **change("class_labels", ("dog",), class_labels=("cat",), guidance_scale=9.0),
        **refused("prompt", "red", "prompts need"),
        **change("num_images", 2),
        **change("feather", 0), **change("margin", 1), **group("policy", "order", "raster"),
        **group("sampling", "temperature", 0),
        **change("guidance_scale", 9.0, class_labels=("dog",)), **change("seed", 5),
        **change("batch_size", 1, num_images=2),
    }),
    "convert": Command({"source": "arpg.pt", "grid": (2, 2), "tokenizer": "vq.pt"}, {
        **change("source", "arpg2.pt"), **change("tokenizer", "vq2.pt"),
        **refused("kind", "randar", "does not fit RandAR"),
        **change("grid", (2, 3)), **change("heads", 1), **change("joint_steps", True),
        **change("extrapolated", 2), **group("policy", "order", "raster"), **group("guidance", "scale", 2.0),
    }),
    "bench": Command({"model.depth": 1, "model.width": 16, "model.heads": 2, "memory": ()}, {
        **group("model", "depth", 2), **group("tokenizer", "channels", 16), **group("over", "depth", (1, 2)),
        **change("grid", (4, 4)), **change("vocab_size", 8), **change("batch_size", 2), **change("images", 2),
        **change("chunk", 2), **change("compile", True), **change("triad_mib", 1), **change("repeats", 2),
        **change("only", ("training step",)), **change("memory", (2,)),
    }),
    "fit": Command({"source": "pictures", "time": "1h", "preset": "tiny"}, {
        **change("source", "other"), **change("time", "2h"), **change("preset", "small"),
        **change("label", "kind", source="single.parquet"),
        **change("captions", "text", source="single.parquet"),
    }),
    "plan": Command({"images": 100, "classes": 3}, {
        **change("gpus", 2), **change("kind", "a100"), **change("efficiency", 0.2), **change("images", 50),
        **change("classes", 5),
    }),
    "demo": Command({"pipeline": "toy", "port": 0}, {
        **change("pipeline", "toy2"), **change("port", 7999), **change("host", "0.0.0.0"),
        **change("allow_host", ["lab.org"]),
    }),
}  # fmt: skip


PLANNED = """
out: run
stages:
  data: {source: elsewhere/photos, size: 16}
  tokenizer: {data: data, train: {accumulation: 2}}
  tokens: {data: data, tokenizer: tokenizer}
  any: {stage: train, tokens: tokens, model: {depth: 1, width: 16, heads: 2}, train: {accumulation: 2}}
"""


# --- what the cases need ------------------------------------------------------------------------------------


def pictures(folder: Path, n: int = 6) -> None:
    folder.mkdir()
    for i in range(n):
        pixels = np.random.default_rng(i).integers(0, 255, (10, 12 + 4 * i, 3), np.uint8)
        Image.fromarray(pixels).save(folder / f"{i}.png")


def table(path: Path, *columns: str) -> None:
    images = [(path.parent / f"pictures/{i}.png").read_bytes() for i in range(6)]
    found = {
        name: [{"bytes": images[i - k], "path": None} for i in range(6)] for k, name in enumerate(columns)
    }
    words = {"kind": list("aabbab"), "text": [f"image {i}" for i in range(6)]}
    pq.write_table(pa.table(found | words), path)


def toy(seed: int) -> Pipeline:
    torch.manual_seed(seed)
    tokenizer = VQModel(VQConfig(8, (1, 1, 2), 1, 8, 5, 4, groups=1))
    return Pipeline(transformer(seed, num_classes=2, grid=(2, 3)), tokenizer, ["cat", "dog"])


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """The folder with everything that the cases name."""
    folder = tmp_path_factory.mktemp("effects")
    pictures(folder / "pictures")
    for name, (kind, settings) in CHAIN.items():
        execute(kind, parse(STAGES[kind], named(settings, folder)), folder / name)
    pictures(folder / "other", 5)
    table(folder / "table.parquet", "a", "b")
    table(folder / "single.parquet", "a")
    for name, seed in (("toy", 0), ("toy2", 1)):
        save_parts(folder / name, toy(seed))
    for i, name in enumerate(("image.png", "image2.png")):
        Image.fromarray(np.full((8, 12, 3), 40 * i + 20, np.uint8)).save(folder / name)
    Image.fromarray(np.eye(8, 12, dtype=np.uint8) * 255).save(folder / "mask.png")
    sizes = {"width": 128, "grid": (2, 2), "vocab_size": 16}
    for seed, name in enumerate(("arpg.pt", "arpg2.pt")):
        torch.save(published(ARPG, seed, **sizes).state_dict(), folder / name)
        torch.manual_seed(seed)
        vq = VQModel(VQConfig(32, (1, 2), 1, 8, 16, 4))
        torch.save(vq.state_dict(), folder / name.replace("arpg", "vq"))
    np.savez(folder / "adm.npz", arr_0=np.random.default_rng(0).integers(0, 255, (8, 16, 16, 3), np.uint8))
    torch.save(published(LlamaGen, **sizes).state_dict(), folder / "llamagen.pt")
    return folder


def named(settings: Settings, folder: Path) -> Settings:
    """Settings whose names of files and artifacts are paths."""

    def path(value: Any) -> Any:
        known = isinstance(value, str) and (value in CHAIN or (folder / value).exists())
        return str(folder / value) if known else value

    return {key: path(value) for key, value in settings.items()}


# --- what is compared ---------------------------------------------------------------------------------------


@pytest.fixture
def asked(monkeypatch):
    """What a command asks for besides what it writes."""
    found: list[Any] = []

    def watch(owner: Any, name: str, note: Callable[..., Any]) -> None:
        original = getattr(owner, name)
        monkeypatch.setattr(owner, name, lambda *a, **k: found.append(note(*a)) or original(*a, **k))

    for owner in (caches.TokenSet, caches.ImageSet):
        watch(owner, "batch", lambda self, indices: ("batch", len(indices)))
    watch(sampling.Streams, "__init__", lambda self, seeds, *_: ("streams", len(seeds)))
    watch(sampling.Streams, "subset", lambda self, rows: ("streams", len(rows)))

    def compiled(model: Any, asked: bool | None = True, images: int = 0, checks: int = 0) -> None:
        found.extend(["compiled"] * bool(asked))

    for module in (inference, orders_stage, workloads):
        monkeypatch.setattr(module, "compile_decoding", compiled)
    monkeypatch.setenv("ANYORDER_BF16", "on")
    facts = iterate_stage._facts

    def worse(model: Path) -> dict[str, Any]:
        return facts(model) | {"test_bound": int(model.parent.name.removeprefix("round-"))}

    monkeypatch.setattr(iterate_stage, "_facts", worse)  # so that rounds without success end the stage

    def times(works: dict[str, workloads.Workload], repeats: int) -> dict[str, list[float]]:
        found.append(("repeats", repeats))
        return {name: [1.0 + work.cost.flops] for name, work in works.items()}

    def rehearsed(values: Any, facts: Any) -> dict[str, float]:
        return dict.fromkeys(values["stages"], 0.01)

    monkeypatch.setattr(fit_stage, "rehearse", rehearsed)
    watch(generation, "fast_dtype", lambda device, bf16: ("bf16", bf16))

    def app(pipe: Pipeline, hosts: list[str], name: str) -> None:
        found.append((hosts, pipe.model.state_dict()["head.weight"].sum().item()))

    monkeypatch.setattr(bench, "_times", times)
    monkeypatch.setattr(bench, "peak_memory", lambda subject, sides: [{"side": side} for side in sides])
    monkeypatch.setattr(server, "create_app", app)
    watch(socket, "create_server", lambda address: address)
    monkeypatch.setattr(uvicorn.Server, "run", lambda self, sockets: None)
    return found


def written(out: Path) -> dict[str, str]:
    """Hashes of files by name; of logs and manifests what is the same in every run."""
    found = {}
    for path in sorted(path for path in out.rglob("*") if path.is_file()):
        name, data = path.relative_to(out).as_posix(), path.read_bytes()
        if name.endswith((*TIMES, "facts.json", "source.gz")):
            continue
        if path.name == "manifest.json":
            manifest = json.loads(data)
            facts = {key: manifest.get(key) for key in ("rounds", "best_round", "sun_first", "policy")}
            data = json.dumps(facts).encode()
        if name.endswith(".jsonl"):
            lines = [json.loads(line) for line in data.splitlines()]
            data = json.dumps([sorted(line) for line in lines]).encode()
        found[name] = hashlib.sha256(data).hexdigest()
    return found


def ran(command: str, settings: Settings, out: Path) -> Any:
    """Run a command; what it wrote or found."""
    config = parse(config_class(command), settings)
    if command in (*STAGES, "convert"):
        execute(command, config, out)
    elif command == "sample pipeline":
        image_commands.sample_files(config, out)
    elif command == "complete":
        image_commands.complete_file(config, out)
    elif command == "fit":
        return fit.plan(config, out, [])
    elif command == "plan":
        (path := out.with_suffix(".yaml")).write_text(PLANNED)
        found = planning.plan(load_experiment(path), config)
        return {key: value for key, value in found.items() if key != "config"}
    elif command == "bench":
        result = bench.bench(config, out / "bench.json")
        return {key: value for key, value in result.items() if key not in ("config", "versions")}
    else:
        server.serve(config)
        return None
    return written(out)


@pytest.mark.slow
@pytest.mark.timeout(600)  # the bench takes a minute alone, and longer beside other work
@pytest.mark.parametrize(
    ("command", "name"), [(command, name) for command, (_, cases) in COMMANDS.items() for name in cases]
)
def test_settings_have_an_effect(command, name, made, asked, tmp_path, monkeypatch):
    if command in STAGES and command != "grid":  # figures show what other files hold, but for its samples
        for function in ("save_image", "save_sample_figures", "mean_rank_per_class"):
            monkeypatch.setattr(figures, function, lambda *_, **__: None)
    small, cases = COMMANDS[command]
    case = cases[name]
    start = small | case.beside
    if {"init", "network"} & {*case.change, *case.beside}:  # these bring the architecture
        start = {key: value for key, value in start.items() if not key.startswith("model.")}
    before, after = (
        named({key: value for key, value in settings.items() if value is not None}, made)
        for settings in (start, start | case.change)
    )
    if case.message:
        with pytest.raises(ValueError, match=case.message):
            ran(command, after, tmp_path / "b")
        return
    a = ran(command, before, tmp_path / "a"), [*asked]
    asked.clear()
    b = ran(command, after, tmp_path / "b"), [*asked]
    assert a != b


def test_every_setting_is_in_the_table():
    assert {*COMMANDS} == {*STAGES, *CONFIGS}
    for command, (_, cases) in COMMANDS.items():
        for key in _settings(config_class(command)):
            assert key in cases or any(key.startswith(name) for name in cases if name.endswith(".")), key
