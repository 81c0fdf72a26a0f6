"""Faults of networks, completions, reports and the page that were left over, a test each."""

import base64
import io
import json
import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import transformer
from emulated_gpu import EmulatedGPU
from own_parts import Counts, CountsConfig, Grey, GreyConfig
from PIL import Image
from test_demo import pipeline, post
from test_verdict import artifact, comparison, line, markdown, rows, seeded

import anyorder.demo
from anyorder import Pipeline
from anyorder.cli import main as cli
from anyorder.contracts import Grid
from anyorder.demo import generation
from anyorder.inference.device import LARGEST, images_at_once
from anyorder.inference.inpainting import Unfinished
from anyorder.method.decoding import sample
from anyorder.method.sampling import Streams
from anyorder.report import summary
from anyorder.training.lora import add_low_rank

# --- own networks


def test_low_rank_updates_of_an_own_network_are_refused_in_one_line():
    with pytest.raises(ValueError, match=r"lora=2 is for .* models, got a Counts: leave it out") as e:
        add_low_rank(Counts(CountsConfig(4, (2, 3))), 2)
    assert "\n" not in str(e.value)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A folder with data, tokens, and a model that is an own network."""
    folder = tmp_path_factory.mktemp("own")
    at = {name: f"{name}={folder / name}" for name in ("data", "tokenizer", "tokens")}
    assert cli.main(["data", "source=own_parts:split_squares", "size=16,16", f"out={folder}/data"]) == 0
    assert cli.main(["convert", "own_parts:grey", str(folder / "tokenizer")]) == 0
    assert cli.main(["tokens", at["data"], at["tokenizer"], f"out={folder}/tokens"]) == 0
    network = ("network=own_parts:Counts", *SHORT, f"out={folder}/model")
    assert cli.main(["train", at["tokens"], *network]) == 0
    return folder


SHORT = ("train.steps=1", "train.batch_size=4", "train.eval_every=0")


@pytest.mark.parametrize(
    ("stage", "settings", "message"),
    [
        ("train", ("init={}/model", "lora=2"), "lora=2 is for .* got a Counts: leave it out"),
        ("train", ("init={}/model", "groups=4,2"), "a Counts predicts no groups: remove groups"),
        ("train", ("network=own_parts:Counts", "groups=4,2"), "Counts predicts no groups .*: remove groups"),
        ("iterate", ("model={}/model",), "iterate trains .* a Counts, which takes none: give"),
    ],
)
def test_what_an_own_network_cannot_is_said_before_anything_runs(trained, stage, settings, message, capsys):
    given = [text.format(trained) for text in settings]
    out = trained / f"{stage}-{len(list(trained.iterdir()))}"
    assert cli.main([stage, f"tokens={trained}/tokens", *given, *SHORT, f"out={out}"]) == 2
    assert re.search(message, error := capsys.readouterr().err.splitlines()[-1]), error
    assert not list(out.rglob("*.npy"))


def fives():
    return Grey(GreyConfig(factor=5))


def test_a_tokenizer_that_does_not_divide_the_images_is_refused_at_once(trained, capsys):
    assert cli.main(["convert", "test_leftovers_models:fives", str(trained / "fives")]) == 0
    given = (f"data={trained}/data", f"tokenizer={trained}/fives", f"out={trained}/cut")
    assert cli.main(["tokens", *given]) == 2
    assert "16 x 16 pixels (height x width) cannot be cut into patches of 5 x 5" in capsys.readouterr().err
    assert not list((trained / "cut").rglob("*.npy*"))


@dataclass
class TiedConfig:
    vocab_size: int
    grid: tuple[int, int]
    num_classes: int = 0
    depth: int = 9


class Tied(Counts):
    """Nine blocks that share one tensor, and numbers that are computed as it is made."""

    def __init__(self, config: TiedConfig):
        super().__init__(config)
        self.rates = torch.linspace(0, 0.1, config.depth).tolist()

    def _logits(self, counts):
        return (counts + 1.0).log() + self.prior


def test_own_networks_may_have_any_depth_and_ask_for_numbers_as_they_are_made(tmp_path):
    pipe = Pipeline(Tied(TiedConfig(4, (2, 3))), Grey(GreyConfig()))
    pipe.save_pretrained(tmp_path)
    assert torch.equal(Pipeline.from_pretrained(tmp_path)(num_images=2).tokens, pipe(num_images=2).tokens)


def test_the_batch_of_an_own_network_does_not_depend_on_what_its_depth_means():
    assert images_at_once(Tied(TiedConfig(4, (2, 3))), Grid(2, 3)) == LARGEST["cpu"]


# --- decoding


def test_completions_are_decoded_in_the_precision_of_generation():
    pipe, everything = pipeline().to(torch.bfloat16), np.ones((6, 8), bool)
    out = pipe.complete(np.zeros((6, 8, 3), np.uint8), everything, order="random", feather=0)
    assert out.images[0].tobytes() == pipe.decode(out.tokens)[0].tobytes()
    exact = Pipeline.decode(pipeline(), out.tokens)[0]
    assert out.images[0].tobytes() != exact.tobytes(), "of no use where both are the same"
    begun = Unfinished(out.tokens, torch.zeros_like(out.tokens, dtype=torch.bool), out.grid)
    painted = generation.paint(pipe, begun, out.tokens, torch.ones_like(begun.known))
    assert Image.open(io.BytesIO(painted)).convert("RGB").tobytes() == out.images[0].tobytes()


def test_looking_ahead_never_waits_for_a_gpu():
    waits = []
    for grid in (Grid(2, 3), Grid(3, 4)):
        with EmulatedGPU() as gpu, torch.no_grad():
            sample(transformer().to("cuda"), "information", Streams(range(2), "cuda"), grid=grid)
        waits.append(gpu.waits)
    assert waits[0] == waits[1]


# --- the page


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"class_labels": "blue"}, "unknown class 'blue'"),
        ({"class_labels": "9"}, r"class labels lie in \[0, 3\), got 9"),
        ({"prompt": "a shoe"}, "caption"),
        ({"image": base64.b64encode(b"no image").decode(), "keep": 0.5}, "not an image"),
    ],
)
def test_code_is_refused_as_images_are(settings, message):
    code, images = (post(path, orders=["raster"], num_images=1, **settings) for path in ("/code", "/draw"))
    assert (code.status_code, code.json()) == (400, images.json())
    with pytest.raises(ValueError, match=message):
        raise ValueError(code.json()["error"])


def test_the_head_on_offer_is_that_of_the_model_that_decides():
    assert "location" in generation.choices(pipeline(location=True))
    pipe = pipeline(location=True)
    pipe.scorer = pipeline().model
    assert "location" not in generation.choices(pipe)


@pytest.mark.skipif(shutil.which("node") is None, reason="needs node")
def test_no_menu_opens_over_a_stroke_and_no_other_button_drags_the_border(tmp_path):
    shutil.copy(Path(anyorder.demo.__file__).parent / "editor.js", tmp_path / "editor.mjs")
    editor = (tmp_path / "editor.mjs").read_text().replace("./player.js", "./player.mjs")
    (tmp_path / "editor.mjs").write_text(editor)
    (tmp_path / "player.mjs").write_text(
        "export const canvas = {focus() {}, setPointerCapture() {}}, $ = () => canvas, Player = {};"
        "export const context = null, element = null;"
    )
    (tmp_path / "run.mjs").write_text("""
        import {Editor} from "./editor.mjs";
        import {canvas} from "./player.mjs";
        globalThis.document = {querySelector: () => ({value: "brush"})};
        const nothing = () => {}, found = [], extend = () => found.push("extended"), border = [0, 0, 0, 0];
        const quiet = {remember: nothing, update: nothing, paint: nothing, stroke: nothing, fit: nothing};
        const editor = {...quiet, at: () => [0, 0], extend, border};
        const event = more => ({button: 0, buttons: 1, isPrimary: true, preventDefault: nothing, ...more});
        const handle = {dataset: {side: 0}, setPointerCapture: nothing};
        Editor.prototype.listenToPointer.call(editor);
        Editor.prototype.listenToHandle.call(editor, handle);
        found.push(canvas.oncontextmenu());
        canvas.onpointerdown(event());
        found.push(canvas.oncontextmenu());
        canvas.onpointerup(event({buttons: 0}));
        found.push(canvas.oncontextmenu());
        handle.onpointerdown(event({button: 2, buttons: 2}));
        handle.onpointermove(event({buttons: 2}));
        handle.onpointerdown(event());
        handle.onpointermove(event());
        handle.onpointermove(event({buttons: 0}));
        handle.onpointermove(event());
        console.log(JSON.stringify(found));
    """)
    done = subprocess.run(["node", tmp_path / "run.mjs"], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == [True, False, True, "extended"]


# --- reports


def test_models_made_by_hand_need_not_say_their_order(tmp_path):
    (run,) = seeded(tmp_path, raster=[2.0])
    artifact(run / "average", "train", config={})
    artifact(run / "further", "train", {"init": "s0/average"})
    for name in ("average", "further"):
        (run / name / "metrics.jsonl").write_text('{"step": 1, "loss": 1.0}\n')
    assert [row["orders"] for row in rows(markdown(run), "Training").values()] == ["\u2013", "random"]


def test_names_are_made_once_and_tell_the_seeds_apart(tmp_path, monkeypatch):
    runs, legends, made = seeded(tmp_path, raster=[2.0, 1.0], ordered=[1.0, 2.0]), [], []
    for run in runs:
        for name in ("raster", "ordered"):
            evaluated = run / f"eval-{name}" / "manifest.json"
            manifest = json.loads(evaluated.read_text())
            manifest["inputs"]["samples"] = f"{run.name}/samples-{name}"
            evaluated.write_text(json.dumps(manifest))
            artifact(run / f"samples-{name}", "sample")
            Image.new("RGB", (4, 4)).save(run / f"samples-{name}" / "grid.png")
        artifact(run / "any", "train")
        (run / "any" / "metrics.jsonl").write_text('{"step": 1, "loss": 1.0}\n')
    labels, curves = summary.evaluations.labels, summary.curves.loss_curves
    monkeypatch.setattr(summary.evaluations, "labels", lambda paths: made.append(1) or labels(paths))
    monkeypatch.setattr(
        summary.curves, "loss_curves", lambda named, *more: legends.extend(named) or curves(named, *more)
    )
    summary.report(runs, tmp_path / "r.html")
    assert [name for name, _ in legends] == ["s0/any", "s1/any"]
    page = (tmp_path / "r.html").read_text()
    opening, folded = page.split("<details>", 1)
    assert "s0/raster" in opening
    for name in ("Samples: s1/samples-raster", "train: s0/any", "train: s1/any"):
        assert name in folded
    assert len(made) <= 3, "of artifacts and runs, not of each row"


def leveled(run: Path, level: float) -> None:
    """The comparison of a run was made at another level."""
    path = run / "compare-ordered-raster" / "manifest.json"
    manifest = json.loads(path.read_text())
    path.write_text(json.dumps(manifest | {"config": {"confidence": level}}))


def test_intervals_have_the_level_of_their_comparison_and_say_it(tmp_path):
    draws = tuple(np.linspace(-2.1, 0.1, 41))
    runs, cells, sentences = seeded(tmp_path, raster=[2.0, 2.2], ordered=[1.0, 1.2]), [], []
    for run in runs:
        comparison(run, "ordered", "raster", -1.2, -0.8, draws)
    for level in (0.95, 0.5):
        for run in runs:
            leveled(run, level)
        text = markdown(*runs)
        cells.append(rows(text, "Results")["ordered"]["FD against raster"])
        sentences.append(line(text, "ordered against raster:"))
        assert "at 95 % unless another level is given" in text
    assert ["at 50 %" in cell for cell in cells] == [False, True]
    assert ["95 % interval over 2 seeds" in sentences[0], "50 % interval" in sentences[1]] == [True, True]
    width = [float(cell.split(" to ")[1].split(")")[0].split(" ")[0]) for cell in cells]
    assert width[1] < width[0]
    leveled(runs[0], 0.9)
    assert "(-60.0 to -40.0 at 90 %)" in rows(markdown(runs[0]), "Results")["ordered"]["FD against raster"]
