"""From downloaded files to folders and pipelines; the hub is a stand-in."""

import argparse
import dataclasses
import os
import subprocess
import sys
from pathlib import Path

import pytest
import safetensors.torch
import torch
from conftest import PUBLISHED, published
from torch.testing import assert_close

from anyorder import Pipeline
from anyorder.adapters.llamagen import LlamaGen
from anyorder.adapters.randar import RandAR
from anyorder.cli import main as cli
from anyorder.contracts import Grid
from anyorder.families import family, kind_of
from anyorder.families import published as published_families
from anyorder.inference.convert import build, published_models, recommended
from anyorder.inference.weights import load_model, save_model
from anyorder.method.guidance import GuidanceConfig
from anyorder.method.policy_config import PolicyConfig
from anyorder.stages.convert import ConvertConfig
from anyorder.stages.execute import execute
from anyorder.tokenizers.maskgit_vq import MASKGIT_VQ, MaskGITVQ, MaskGITVQConfig
from anyorder.tokenizers.vq import VQ16, VQConfig, VQModel

FAMILIES = {**PUBLISHED, "llamagen": LlamaGen}
GRID = (2, 2)
MARKS = [declared.marker for declared in published_families().values()]
ON_THE_HUB = published_models()
SIZES = {"width": 128, "grid": GRID, "vocab_size": 32, "label_dropout": 0.1}
"""Heads are 64 wide as in all published models."""


def model_of(name):
    return published(FAMILIES[name], **SIZES)


def vq():
    torch.manual_seed(0)
    return VQModel(VQConfig(32, (1, 2), 1, 8, 32, 4)).eval()


def maskgit_vq():
    torch.manual_seed(0)
    return MaskGITVQ(MaskGITVQConfig(32, (1, 2), 1, 32, 4)).eval()


MODELS = {**{name: lambda name=name: model_of(name) for name in FAMILIES}, "vq": vq, "maskgit_vq": maskgit_vq}


def download(folder, model, name="weights.pt", wrapper="model"):
    """A file as it is published."""
    path, tensors = folder / name, dict(model.state_dict())
    if path.suffix == ".safetensors":
        safetensors.torch.save_file(tensors, path)
    else:
        torch.save({wrapper: tensors, "steps": 7} if wrapper else tensors, path)
    return path


def assert_same(model, other):
    assert type(model) is type(other)
    assert model.config == other.config
    for key, value in other.state_dict().items():
        assert torch.equal(model.state_dict()[key], value), key


# --- from files to models ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize(
    ("file", "wrapper"),
    [("a.pt", "model"), ("a.bin", ""), ("a.pth", "state_dict"), ("a.pt", "module"), ("a.safetensors", "")],
)
def test_a_file_becomes_its_model(tmp_path, name, file, wrapper):
    model = MODELS[name]()
    built = build(download(tmp_path, model, file, wrapper), grid=GRID)
    assert_same(built, model)
    assert not built.training


def test_prefixes_of_training_programs_are_removed(tmp_path):
    model, path = model_of("arpg"), tmp_path / "a.pt"
    torch.save({f"module.{key}": value for key, value in model.state_dict().items()}, path)
    assert_same(build(path, grid=GRID), model)


@pytest.mark.parametrize("prefix", ["module._orig_mod.", "_orig_mod.module.", "_orig_mod."])
def test_nested_prefixes_are_removed(tmp_path, prefix):
    model, path = model_of("arpg"), tmp_path / "a.pt"
    torch.save({f"{prefix}{key}": value for key, value in model.state_dict().items()}, path)
    assert_same(build(path, grid=GRID), model)


@pytest.mark.parametrize("name", ["a.pt", "a.safetensors"])
def test_downloads_that_went_wrong_are_named(tmp_path, name):
    path = tmp_path / name
    for content, message in (
        (
            b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n",
            "a Git LFS pointer, run 'git lfs pull'",
        ),
        (b"\n<!DOCTYPE html><title>Sign in</title>", "a web page, download the file itself"),
    ):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=rf"{name} cannot be read as weights: it is {message}"):
            build(path)


def test_weights_with_nan_are_refused(tmp_path):
    model = model_of("arpg")
    model.head.weight.data[0, 0] = torch.nan
    with pytest.raises(ValueError, match=r"weights.pt is of no use: head.weight holds NaN"):
        build(download(tmp_path, model))


def test_kinds_without_published_files_are_refused(tmp_path):
    path = download(tmp_path, model_of("arpg"))
    with pytest.raises(ValueError, match="kind 'transformer' has no published files"):
        build(path, kind="transformer")
    with pytest.raises(ValueError, match="unknown kind of model 'llama', allowed: vq"):
        build(path, kind="llama")


def test_arguments_of_training_beside_the_weights_are_tolerated(tmp_path):
    model, path = model_of("llamagen"), tmp_path / "a.pt"
    torch.save({"model": model.state_dict(), "args": argparse.Namespace(lr=1e-4)}, path)
    assert_same(build(path, grid=GRID), model)


def test_heads_that_no_tensor_tells_can_be_said(tmp_path):
    path = download(tmp_path, model_of("randar"))
    assert build(path, heads=4).config.heads == 4
    assert build(path).config == dataclasses.replace(model_of("randar").config, grid=(16, 16))
    assert build(path, joint_steps=True).config.joint_steps
    small = download(tmp_path, published(RandAR, width=16), "small.pt")
    with pytest.raises(ValueError, match=r"width 16 is no multiple of 64: say how many heads, heads=\.\.\."):
        build(small)
    assert build(small, heads=2).config.width == 16


def test_a_tokenizer_without_its_recent_tokens(tmp_path):
    model, path = vq(), tmp_path / "a.pt"
    torch.save({k: v for k, v in model.state_dict().items() if k != "quantize.codebook_used"}, path)
    assert_same(build(path), model)


def test_published_vq_files_are_read_as_such(tmp_path):
    """At full size, from names and shapes alone."""
    for multipliers in ((1, 1, 2, 2, 4), (1, 2, 2, 4)):
        with torch.device("meta"):
            model = VQModel(VQConfig(multipliers=multipliers))
        assert family("vq").read_config(model.state_dict(), (16, 16), 0) == model.config


# --- wrong files ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MODELS)
def test_tensors_that_do_not_fit_are_named(tmp_path, name):
    model = MODELS[name]()
    tensors = model.state_dict()
    victim = [key for key in tensors if key not in MARKS and "norm" in key][-1]
    wrong = {
        f"missing {victim}": {k: v for k, v in tensors.items() if k != victim},
        "unexpected extra.weight": {**tensors, "extra.weight": torch.zeros(2)},
        rf"{victim} is \(3,\), expected \(": {**tensors, victim: torch.zeros(3)},
    }
    for message, stored in wrong.items():
        torch.save(stored, tmp_path / "wrong.pt")
        with pytest.raises(ValueError, match=rf"wrong.pt does not fit {type(model).__name__}: {message}"):
            build(tmp_path / "wrong.pt", grid=GRID)


@pytest.mark.parametrize("name", MODELS)
def test_a_file_of_another_kind_than_said(tmp_path, name):
    other = "vq" if name != "vq" else "arpg"
    with pytest.raises(ValueError, match=r"does not fit .*: missing "):
        build(download(tmp_path, MODELS[name]()), kind=other)


def test_a_tensor_of_another_rank_that_tells_the_size(tmp_path):
    path = tmp_path / "a.pt"
    torch.save({**model_of("randar").state_dict(), "tok_embeddings.weight": torch.zeros(3)}, path)
    with pytest.raises(ValueError, match=r"tok_embeddings.weight is \(3,\), expected 2 dimensions"):
        build(path)


def test_files_that_are_no_model(tmp_path):
    path = tmp_path / "a.pt"
    with pytest.raises(FileNotFoundError, match="download it first"):
        build(path)
    torch.save({"fc.weight": torch.zeros(2)}, path)
    with pytest.raises(ValueError, match=r"no known model: its first tensors are fc.weight; known are vq"):
        build(path)
    torch.save({"model": {"step": 3}}, path)
    with pytest.raises(ValueError, match="holds no weights: expected tensors by name"):
        build(path)
    for damaged in (b"", b"<html>not found</html>", b"\x80\x02t\xd4", b"\x80\x02R\xfd"):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match="cannot be read as weights"):
            build(path)
    broken = tmp_path / "a.safetensors"
    broken.write_bytes(b"no")
    with pytest.raises(ValueError, match="damaged"):
        build(broken)


class Malice:
    def __reduce__(self):
        return (Path.touch, (Path("malice"),))


def test_pickles_cannot_run_code(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"model": model_of("arpg").state_dict(), "extra": Malice()}, "a.pt")
    with pytest.raises(ValueError, match="cannot be read as weights"):
        build(Path("a.pt"))
    assert not Path("malice").exists()


# --- folders ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("make", [vq, maskgit_vq])
def test_convert_makes_a_pipeline(tmp_path, name, make, capsys):
    model = model_of(name)
    source = str(download(tmp_path, model))
    tokenizer = download(tmp_path, make(), "tokenizer.bin")
    folder = str(tmp_path / "pipeline")
    command = ["convert", source, folder, f"tokenizer={tokenizer}", "grid=2,2"]
    assert cli.main(command) == 0
    pipe = Pipeline.from_pretrained(folder)
    assert_same(pipe.model, model)
    assert_same(pipe.tokenizer, make())
    assert pipe.policy.order == ("raster" if name == "llamagen" else "random")
    out = pipe(class_labels=[0, 2], guidance_scale=2.0)
    assert [image.size for image in out.images] == [(4, 4)] * 2
    assert out.order.sort(1).values.tolist() == [[0, 1, 2, 3]] * 2
    pipe.save_pretrained(tmp_path / "again")
    again = Pipeline.from_pretrained(tmp_path / "again")
    assert torch.equal(again(class_labels=[0, 2], guidance_scale=2.0).tokens, out.tokens)
    with pytest.raises(ValueError, match=r"class labels lie in \[0, 3\)"):
        pipe(class_labels=3)


def test_parts_are_converted_one_by_one(tmp_path, caplog):
    caplog.set_level("INFO", "anyorder")
    tokenizer, model, pipeline = (tmp_path / name for name in ("tokenizer", "model", "pipeline"))
    execute("convert", ConvertConfig(download(tmp_path, maskgit_vq(), "t.bin")), tokenizer)
    source = download(tmp_path, model_of("randar"))
    execute("convert", ConvertConfig(source, grid=GRID), model)
    execute("convert", ConvertConfig(source, tokenizer, grid=GRID, policy=PolicyConfig("margin")), pipeline)
    assert_same(load_model(tokenizer), maskgit_vq())
    assert_same(load_model(model), model_of("randar"))
    pipe = Pipeline.from_pretrained(pipeline)
    assert pipe.policy == PolicyConfig("margin")
    assert_same(pipe.tokenizer, maskgit_vq())
    with pytest.raises(FileNotFoundError, match=r"convert.*tokenizer="):
        Pipeline.from_pretrained(model)
    assert "RandAR, 0." in caplog.text


def test_a_second_conversion_is_up_to_date_until_the_file_changes(tmp_path):
    config, out = ConvertConfig(download(tmp_path, maskgit_vq())), tmp_path / "out"
    assert execute("convert", config, out)
    assert not execute("convert", config, out)
    changed = maskgit_vq()
    changed.quantize.embedding.weight.data += 1
    download(tmp_path, changed)
    with pytest.raises(ValueError, match="overwrite=true"):
        execute("convert", config, out)
    assert execute("convert", config, out, overwrite=True)
    assert_same(load_model(out), changed)
    assert not execute("convert", config, out)


def test_parts_that_do_not_belong_together(tmp_path):
    source = download(tmp_path, model_of("arpg"))
    other = download(tmp_path, MaskGITVQ(MaskGITVQConfig(32, (1, 2), 1, 16, 4)), "other.bin")
    out = tmp_path / "out"
    with pytest.raises(ValueError, match="32 tokens, the tokenizer 16: published models with 16384"):
        execute("convert", ConvertConfig(source, other), out)
    with pytest.raises(ValueError, match="holds a ARPG, no tokenizer"):
        execute("convert", ConvertConfig(source, source), out)
    with pytest.raises(ValueError, match="is a tokenizer itself: leave tokenizer= out"):
        execute("convert", ConvertConfig(other, other), out)
    assert not out.exists()
    folder = tmp_path / "folder"
    execute("convert", ConvertConfig(source), folder)
    with pytest.raises(ValueError, match="holds a ARPG, expected a tokenizer"):
        execute("convert", ConvertConfig(source, folder), out)


def test_a_tokenizer_is_no_any_order_model(tmp_path):
    from anyorder.inference.weights import load_any_order

    save_model(tmp_path, vq(), vq().config, "vq")
    with pytest.raises(ValueError, match="holds a VQModel, expected an any-order model"):
        load_any_order(tmp_path)
    with pytest.raises(ValueError, match="Linear must be a class made by Class"):
        kind_of(torch.nn.Linear(1, 1))


def test_the_command_says_what_is_wrong(tmp_path, capsys):
    assert cli.main(["convert", "--help-all"]) == 0
    text = capsys.readouterr().out
    assert "anyorder convert SOURCE DEST" in text
    assert all(f"{field.name}" in text for field in dataclasses.fields(ConvertConfig))
    assert cli.main(["convert", "a.pt"]) == 2
    assert "anyorder convert SOURCE DEST" in capsys.readouterr().err
    assert cli.main(["convert", "a.pt", str(tmp_path), "kin=arpg"]) == 2
    assert "did you mean kind?" in capsys.readouterr().err
    assert cli.main(["convert", "a.pt", str(tmp_path / "out")]) == 2
    assert "download it first" in capsys.readouterr().err
    assert cli.main(["convert", "a.pt", str(tmp_path / "out"), "grid=24,24", "--dry-run"]) == 0
    assert "grid: [24, 24]" in capsys.readouterr().out
    assert not (tmp_path / "out").exists()


# --- the hub ----------------------------------------------------------------------------------------------


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A hub that has tiny models under the published names."""
    asked = []

    def hf_hub_download(repo, name):
        asked.append((repo, name))
        if name == MASKGIT_VQ.name:
            return str(download(tmp_path, maskgit_vq(), "maskgit.bin", ""))
        if name.startswith("vq_"):
            return str(download(tmp_path, vq(), "vq.pt"))
        family = {"ziqipang/RandAR": "randar", "hp-l33/ARPG": "arpg", "FoundationVision/LlamaGen": "llamagen"}
        return str(download(tmp_path, model_of(family[repo]), Path(name).name))

    monkeypatch.setattr("huggingface_hub.hf_hub_download", hf_hub_download)
    return asked


@pytest.mark.parametrize("file", ON_THE_HUB, ids=lambda file: file.name)
def test_published_models_come_with_their_tokenizers(hub, file):
    pipe = Pipeline.from_pretrained(f"{file.repo}/{file.name}")
    assert hub == [file[:2], file.tokenizer[:2]]
    assert isinstance(pipe.tokenizer, MaskGITVQ if "maskgit" in file.name else VQModel)
    assert pipe.model.grid == (Grid(24, 24) if "384" in file.name else Grid(16, 16))
    assert pipe.policy.order == ("raster" if isinstance(pipe.model, LlamaGen) else "random")


def test_a_repository_alone_means_its_first_model(hub):
    pipe = Pipeline.from_pretrained("hp-l33/ARPG")
    assert hub[0] == ("hp-l33/ARPG", "arpg_300m.pt")
    out = pipe(class_labels=1, grid=(2, 2), guidance_scale=GuidanceConfig(3.0, interval=(0.0, 0.5)))
    assert out.tokens.shape == (1, 4)
    assert_close(out.log_prob.exp().clamp(0, 1), out.log_prob.exp())


def test_unknown_files_of_known_repositories_are_answered_with_the_known_ones(hub):
    with pytest.raises(ValueError, match=r"one of hp-l33/ARPG/arpg_300m.pt, hp-l33/ARPG/arpg_700m.pt"):
        Pipeline.from_pretrained("hp-l33/ARPG/arpg_2b.pt")
    assert hub == []


def test_the_hub_may_be_out_of_reach(monkeypatch, tmp_path):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(FileNotFoundError, match="'hp-l33/ARPG' is neither a folder nor a hub id that can be"):
        Pipeline.from_pretrained("hp-l33/ARPG")


def test_the_command_imports_torch_only_when_it_runs():
    code = "import sys; from anyorder.cli.main import main; main([]); print('torch' in sys.modules)"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip().endswith("False")


# --- the published files themselves -----------------------------------------------------------------------

WEIGHTS = Path(os.environ.get("ANYORDER_WEIGHTS", "no folder"))


@pytest.mark.weights
@pytest.mark.parametrize("file", [*ON_THE_HUB, VQ16, MASKGIT_VQ], ids=lambda file: file.name)
def test_published_files_load(file):
    """Set ANYORDER_WEIGHTS to the folder that they were downloaded to."""
    if not (WEIGHTS / file.name).is_file():
        pytest.skip(f"{file.name} is not in {WEIGHTS}: set ANYORDER_WEIGHTS")
    model = build(WEIGHTS / file.name)
    assert all(bool(tensor.isfinite().all()) for tensor in model.parameters())


# --- guidance that the authors recommend ------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "name", "scale", "schedule"),
    [
        ("arpg", "arpg_1b.pt", 7.5, "linear"),
        ("arpg", "renamed.pt", 5.0, "linear"),
        ("randar", "randar_0.7b_llamagen_360k_bs_1024_lr_0.0004.safetensors", 4.0, "linear"),
        ("llamagen", "c2i_L_256.pt", 2.0, "constant"),
        ("llamagen", "c2i_XXL_384.pt", 1.75, "constant"),
        ("vq", "vq_ds16_c2i.pt", 1.0, "constant"),
        ("a_package:Network", "a.pt", 1.0, "constant"),
    ],
)
def test_every_published_model_has_the_guidance_of_its_authors(kind, name, scale, schedule):
    assert recommended(kind, name) == GuidanceConfig(scale, schedule)


def test_a_converted_pipeline_is_guided_unless_a_call_says_otherwise(tmp_path):
    file = download(tmp_path, model_of("arpg"))
    tokenizer = download(tmp_path, vq(), "vq.pt")
    execute("convert", ConvertConfig(file, tokenizer=tokenizer, grid=GRID), tmp_path / "out")
    pipe = Pipeline.from_pretrained(tmp_path / "out")
    assert pipe.guidance == GuidanceConfig(5.0, "linear")
    assert "guidance   5, linear" in repr(pipe)

    def log_prob(**settings):
        return pipe(class_labels=[0, 1, 2, 1], generator=3, **settings).log_prob

    default, asked = log_prob(), log_prob(guidance_scale=5.0, guidance_schedule="linear")
    assert torch.equal(default, asked)
    assert not torch.equal(default, log_prob(guidance_scale=1))
    # Without a class there is nothing to be guided by, and likelihoods are the model's own.
    assert torch.equal(pipe(num_images=2).log_prob, pipe(num_images=2, guidance_scale=1).log_prob)
    images = pipe(class_labels=[0, 1]).images
    assert torch.equal(pipe.score(images, [0, 1]), pipe.score(images, [0, 1], guidance_scale=1))
    pipe.save_pretrained(tmp_path / "again")
    assert Pipeline.from_pretrained(tmp_path / "again").guidance == pipe.guidance


def test_guidance_of_a_conversion_is_a_setting(tmp_path):
    file = download(tmp_path, model_of("arpg"))
    own = GuidanceConfig(3.0)
    with pytest.raises(ValueError, match="guidance has no effect"):
        execute("convert", ConvertConfig(file, grid=GRID, guidance=own), tmp_path / "out")
    tokenizer = download(tmp_path, vq(), "vq.pt")
    execute("convert", ConvertConfig(file, tokenizer=tokenizer, grid=GRID, guidance=own), tmp_path / "out")
    assert Pipeline.from_pretrained(tmp_path / "out").guidance == own
