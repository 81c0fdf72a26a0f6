"""Captions and attributes from the columns of a table to pictures that were asked for."""

import io
import json
import shutil
import sys

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from PIL import Image

from anyorder import Pipeline
from anyorder.cli import main as cli
from anyorder.data.caches import ImageSet, TokenSet
from anyorder.data.captions import CaptionTokenizer, TextConfig, Vocabulary
from anyorder.data.classes import index_of
from anyorder.data.ingest import ingest
from anyorder.data.sources import Columns, open_source
from anyorder.evaluation.classes import agreement
from anyorder.files import load_array, read_json, read_manifest

pytest.importorskip("tokenizers", reason="captions need: pip install 'anyorder[text]'")

COLOURS = {"Red": (220, 20, 20), "Green": (20, 200, 20), "Blue": (20, 20, 220)}
KINDS = ("shirt", "shoe")
TINY_VQ = {
    "channels": 8, "multipliers": [1, 1, 2], "groups": 1, "res_blocks": 1, "attention": False,
    "z_channels": 8, "vocab_size": 16, "code_dim": 4, "codebook_update": "ema", "revive_after": 5,
}  # fmt: skip
STEPS = {"steps": 4, "batch_size": 8, "log_every": 2, "eval_every": 2, "save_every": 2}
MADE = {"tokenizer": "tokenizer", "tokens": "tokens"}


def png(colour):
    buffer = io.BytesIO()
    Image.new("RGB", (16, 16), colour).save(buffer, "PNG")
    return {"bytes": buffer.getvalue(), "path": None}


def write_table(path, n, seed=0, without=()):
    """Plain pictures with their colour, kind and a caption; rows of `without` have none of them."""
    rng = np.random.default_rng(seed)
    colours, kinds = rng.choice(list(COLOURS), n).tolist(), rng.choice(KINDS, n).tolist()
    captions = [f"A {colour} {kind}, size {i}" for i, (colour, kind) in enumerate(zip(colours, kinds))]  # noqa: B905
    pictures = [png(COLOURS[colour]) for colour in colours]
    for row in without:
        colours[row], captions[row] = None, None if row % 2 else ""
    columns = {"picture": pictures, "kind": kinds, "colour": colours, "text": captions}
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(columns), path)


def experiment_of(source):
    draw = {"stage": "sample", "model": "model", **MADE, "num_images": 12, "bf16": False}
    measure = {"stage": "eval", "model": "model", "features": "features", "attribute_features": "colours",
               "data": "data", "tokens": "tokens", "nll_images": 8}  # fmt: skip
    train = {"depth": 1, "width": 32, "heads": 2}
    return {
        "data": {"source": str(source), "size": [16, 16], "label": "kind", "captions": "text",
                 "attributes": ["colour", "kind"]},
        "tokenizer": {"data": "data", "model": TINY_VQ, "train": STEPS},
        "features": {"data": "data", "channels": [8, 16], "train": STEPS},
        "colours": {"stage": "features", "data": "data", "label": "colour", "channels": [8, 16],
                    "train": {**STEPS, "steps": 60, "learning_rate": 1e-2}},
        "tokens": {"data": "data", "tokenizer": "tokenizer", "text": {"vocab_size": 60, "length": 5}},
        "model": {"stage": "train", "tokens": "tokens", "model": train, "train": STEPS},
        "orders": {"model": "model", "tokens": "tokens", "limit": 20, "test_limit": 8},
        "ordered": {"stage": "train", "tokens": "tokens", "init": "model", "orders": "orders",
                    "orders_as": "class_mean", "train": STEPS},
        "drawn": draw,
        "told-the-text": {**draw, "hide": ["class", "colour", "kind"], "guidance": {"scale": 2.0}},
        "prompted": {**draw, "prompts": ["a red shoe", "a blue shoe", ""]},
        "eval-drawn": {**measure, "samples": "drawn"},
        "eval-told-the-text": {**measure, "samples": "told-the-text"},
        "pipeline": {"model": "ordered", **MADE},
    }  # fmt: skip


@pytest.fixture(scope="module")
def experiment(tmp_path_factory):
    folder = tmp_path_factory.mktemp("text")
    write_table(folder / "table/train-0.parquet", 60, without=(3, 4, 8))
    write_table(folder / "table/test-0.parquet", 16, seed=1, without=(0, 1))
    path = folder / "text.yaml"
    settings = {"out": str(folder / "out"), "stages": experiment_of(folder / "table")}
    path.write_text(yaml.safe_dump(settings, sort_keys=False))
    assert cli.main(["run", str(path), "--traceback"]) == 0
    return path, folder / "out"


def test_a_plan_counts_attributes_and_captions(experiment, tmp_path):
    path, out = experiment
    assert cli.main(["plan", str(path), f"out={tmp_path}/plan.json"]) == 0
    rows = {row["stage"]: row for row in read_json(tmp_path / "plan.json")["stages"]}
    model = Pipeline.from_pretrained(out / "pipeline").model
    assert model.config.attributes == (3, 2)
    trained = sum(weights.numel() for weights in model.parameters())
    assert round(rows["model"]["parameters (M)"] * 1e6) == trained


# --- caption tokens


def test_captions_are_whole_words_where_they_are_frequent():
    captions = ["a red shoe", "a tired dog", "RED shoes"] * 5
    tokenizer = CaptionTokenizer.train(captions, 200)
    ids = tokenizer.encode(["Red", "shoe", "red shoe", "red-shoe"], 4)
    assert ids[2, :2].tolist() == [ids[0, 0], ids[1, 0]]
    assert (ids[2, 2:] == -1).all()
    assert {ids[0, 0], ids[1, 0]} <= set(ids[3].tolist())
    assert ids[0, 0] not in tokenizer.encode(["tired"], 4)
    assert tokenizer.vocab_size <= 200
    assert 0 <= ids[ids >= 0].min() <= ids.max() < tokenizer.vocab_size


def test_the_vocabulary_has_no_more_tokens_than_asked_for():
    captions = [chr(0x4E00 + i) * 3 for i in range(300)]
    assert CaptionTokenizer.train(captions, 100).vocab_size == 100


def test_a_name_with_a_comma_is_found_in_brackets():
    with pytest.raises(ValueError, match=r"""a name with a comma is written \["Shoes, red"\]"""):
        index_of("red", ["Shoes, red", "Hats"], "class")


def test_the_same_captions_give_the_same_tokens():
    captions = [f"picture {i} of {i % 7} things" for i in range(200)]
    definition = CaptionTokenizer.train(captions, 80).definition
    assert CaptionTokenizer.train(captions, 80).definition == definition
    again = CaptionTokenizer(definition)
    assert again.vocab_size == CaptionTokenizer.train(captions, 80).vocab_size
    assert (again.encode(captions, 6) == CaptionTokenizer.train(captions, 80).encode(captions, 6)).all()


def test_captions_are_cut_and_empty_ones_are_none():
    tokenizer = CaptionTokenizer.train(["a b c d"], 20)
    assert (tokenizer.encode(["", "  \n"], 3) == -1).all()
    assert (tokenizer.encode(["a b c d a b c d", "a"], 3) >= 0).tolist() == [[True] * 3, [True, False, False]]
    assert tokenizer.encode(["☃"], 3)[0, 1:].tolist() == [0, -1]  # the start of a word, one unknown, no more
    assert tokenizer.encode([], 3).shape == (0, 3)


def test_the_library_is_needed_to_encode_only(monkeypatch):
    definition = CaptionTokenizer.train(["a b"], 20).definition
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    tokenizer = CaptionTokenizer(definition)
    with pytest.raises(ImportError, match=r"anyorder\[text\]"):
        tokenizer.encode(["a"], 3)
    with pytest.raises(ImportError, match=r"anyorder\[text\]"):
        CaptionTokenizer.train(["a"], 3)


def test_vocabulary_gives_conditions_by_name():
    captions = CaptionTokenizer.train(["red blue"], 20)
    vocabulary = Vocabulary(["a", "b"], {"colour": ["Blue", "Red"], "size": ["L"]}, captions, 3)
    condition = vocabulary.condition(2, [1, 0], {"colour": ["Red", "Blue"]}, ["red", ""])
    assert condition[:, :3].tolist() == [[1, 1, -1], [0, 0, -1]]
    assert (condition[:, 3:] >= 0).tolist() == [[True, False, False], [False] * 3]
    assert (vocabulary.condition(3) == -1).all()
    assert vocabulary.condition(2, attributes={"colour": ["Red", None]})[:, 1].tolist() == [1, -1]


def test_unknown_names_get_a_suggestion():
    with pytest.raises(
        ValueError, match=r"unknown colour 'Rad', did you mean 'Red'.*choose one of Blue, Red"
    ):
        index_of("Rad", ["Blue", "Red"], "colour")
    with pytest.raises(ValueError, match="did you mean 'RED'"):
        index_of("red", ["RED"], "colour")
    with pytest.raises(ValueError, match="'x': choose one of none"):
        index_of("x", [], "attribute")
    with pytest.raises(ValueError, match="trained with captions"):
        Vocabulary().condition(1, prompts=["red"])


@pytest.mark.parametrize(("name", "least"), [("vocab_size", 2), ("length", 1), ("captions", 1)])
def test_text_config_refuses(name, least):
    with pytest.raises(ValueError, match=f"{name} must be >= {least}, got {least - 1}"):
        TextConfig(**{name: least - 1})


# --- data


def test_columns_become_attributes_and_captions(tmp_path):
    write_table(tmp_path / "t/train.parquet", 6, without=(2, 3))
    write_table(tmp_path / "t/test.parquet", 3, seed=2)
    table = pq.read_table(tmp_path / "t/test.parquet").to_pydict()
    table["colour"][1] = "Beige"  # not in the train split
    pq.write_table(pa.table(table), tmp_path / "t/test.parquet")
    source = open_source(tmp_path / "t", Columns("kind", "text", ("colour",)))
    facts = ingest(source, tmp_path / "out", (4, 4))
    train = pq.read_table(tmp_path / "t/train.parquet").to_pydict()
    values = sorted({colour for colour in train["colour"] if colour})
    assert facts["attributes"] == {"colour": values}
    expected = [values.index(colour) if colour else -1 for colour in train["colour"]]
    assert load_array(tmp_path / "out/train.attributes.npy").tolist() == [[code] for code in expected]
    assert read_json(tmp_path / "out/train.captions.json") == [text or "" for text in train["text"]]
    assert load_array(tmp_path / "out/test.attributes.npy")[1].tolist() == [-1]


def test_images_that_are_skipped_take_their_captions_along(tmp_path):
    write_table(tmp_path / "train.parquet", 5)
    table = pq.read_table(tmp_path / "train.parquet").to_pydict()
    table["picture"][2]["bytes"] = b"junk"
    pq.write_table(pa.table(table), tmp_path / "train.parquet")
    source = open_source(tmp_path / "train.parquet", Columns(None, "text", ("colour",)), 0)
    ingest(source, tmp_path / "out", (4, 4))
    left = [text for i, text in enumerate(table["text"]) if i != 2]
    assert read_json(tmp_path / "out/train.captions.json") == left
    assert len(load_array(tmp_path / "out/train.attributes.npy")) == 4


def test_sources_refuse_columns_that_are_not_there(tmp_path):
    write_table(tmp_path / "t/train.parquet", 3)
    for columns in (Columns(caption="txt"), Columns(attributes=("txt",))):
        with pytest.raises(ValueError, match="has no column 'txt'; it has picture, kind"):
            open_source(tmp_path / "t", columns).classes()
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder/a.png").write_bytes(png("red")["bytes"])
    for columns in (Columns(caption="text"), Columns(attributes=("colour",))):
        with pytest.raises(ValueError, match="leave out image, label and attributes"):
            open_source(tmp_path / "folder", columns)
    assert cli.main(["data", "captions=text", f"out={tmp_path}/sunsets"]) == 2


def test_caches_hold_what_pictures_may_be_asked_for(experiment):
    _, out = experiment
    images, tokens = ImageSet(out / "data"), TokenSet(out / "tokens")
    assert tokens.attributes == images.attributes == {"colour": ["Blue", "Green", "Red"], "kind": [*KINDS]}
    assert tokens.text_length == 5
    batch, condition = tokens.batch([0, 3])
    assert batch.shape == (2, 16)
    assert condition.shape == (2, 1 + 2 + 5)
    assert condition.dtype == torch.int64
    assert (condition[1, [1, *range(3, 8)]] == -1).all()
    labels, names = images.labels_of("colour")
    assert names[labels[0]].lower() in images.captions()[0].lower()
    kind = images.attributes["kind"][int(condition[0, 2])]
    assert images.classes[int(condition[0, 0])] == kind
    asked = tokens.vocabulary.condition(1, prompts=[images.captions()[0]])
    assert torch.equal(asked[0, 3:], condition[0, 3:])
    with pytest.raises(ValueError, match="did you mean 'colour'"):
        images.labels_of("color")


def test_parts_of_a_condition_can_be_hidden(experiment):
    tokens = TokenSet(experiment[1] / "tokens")
    condition = tokens.batch([0, 1])[1]
    told = tokens.without(condition, ["class", "captions", "kind"])
    assert (told == -1).tolist()[0] == [True, False, True] + [True] * 5
    assert torch.equal(told[:, 1], condition[:, 1])
    assert torch.equal(tokens.without(condition, []), condition)
    with pytest.raises(ValueError, match="did you mean 'captions'"):
        tokens.without(condition, ["caption"])


@pytest.mark.parametrize(
    ("name", "spoil", "message"),
    [
        ("captions", lambda a: a[:, :2], "expected"),
        ("captions", lambda a: np.full_like(a, 99), "tokens from 99 to 99, the vocabulary has"),
        ("attributes", lambda a: a[:3], "expected int64"),
        ("attributes", lambda a: a + 7, "values of the attribute colour from .*, it has 3"),
    ],
)
def test_damaged_caches_are_named(experiment, tmp_path, name, spoil, message):
    shutil.copytree(experiment[1] / "tokens", tmp_path / "tokens")
    path = tmp_path / f"tokens/train.{name}.npy"
    np.save(path, spoil(np.load(path)))
    with pytest.raises(ValueError, match=rf"train.{name}.npy is damaged.*{message}"):
        TokenSet(tmp_path / "tokens")


def test_data_without_captions_have_labels_alone(experiment, tmp_path, capsys):
    write_table(tmp_path / "t/train-0.parquet", 8)
    write_table(tmp_path / "t/test-0.parquet", 4)
    data = ["data", f"source={tmp_path}/t", "size=[16,16]", "label=kind", f"out={tmp_path}/data"]
    tokens = ["tokens", f"data={tmp_path}/data", f"tokenizer={experiment[1]}/tokenizer", f"out={tmp_path}/x"]
    assert cli.main(data) == 0
    assert cli.main([*tokens, "text.length=3"]) == 2
    assert "has no captions: leave out text.*" in capsys.readouterr().err
    assert cli.main(tokens) == 0
    assert TokenSet(tmp_path / "x").batch([0, 1])[1].shape == (2,)
    assert TokenSet(tmp_path / "x").vocabulary == Vocabulary(list(KINDS))


def test_captions_that_do_not_fit_their_images_are_refused(experiment, tmp_path):
    shutil.copytree(experiment[1] / "data", tmp_path / "data")
    (tmp_path / "data/train.captions.json").write_text(json.dumps(["one"]))
    with pytest.raises(ValueError, match="got 1 captions, there are 60 images"):
        ImageSet(tmp_path / "data").captions()


# --- stages


def test_models_take_all_conditions(experiment):
    config = read_json(experiment[1] / "model/config.json")["config"]
    tokens = TokenSet(experiment[1] / "tokens")
    assert config["num_classes"] == 2
    assert config["attributes"] == [3, 2]
    assert (config["text_vocab"], config["text_length"]) == (tokens.text_vocab, 5)


def test_samples_say_what_was_asked_and_hide_it_from_the_model(experiment):
    _, out = experiment
    drawn, told = (load_array(out / name / "condition.npy") for name in ("drawn", "told-the-text"))
    assert np.array_equal(drawn, told)
    assert np.array_equal(drawn[:, 0], load_array(out / "drawn/labels.npy"))
    assert drawn.shape == (12, 8)


def test_prompts_differ_in_nothing_but_the_text(experiment):
    _, out = experiment
    condition = load_array(out / "prompted/condition.npy")
    assert (condition[:, :3] == -1).all()
    assert (condition[8:] == -1).all()
    assert len(np.unique(condition, axis=0)) == 3
    tokens = load_array(out / "prompted/tokens.npy").reshape(3, 4, 16)
    order = load_array(out / "prompted/order.npy").reshape(3, 4, 16)
    assert (out / "prompted/prompts.png").stat().st_size > 0
    pipe = Pipeline.from_pretrained(out / "pipeline")
    pipe.model, pipe.scorer = _model(out), None
    for row, prompt in enumerate(("a red shoe", "a blue shoe")):
        made = pipe(prompt=prompt, num_images=4)
        assert np.array_equal(made.tokens.numpy(), tokens[row])
        assert np.array_equal(made.order.numpy(), order[row])
    assert np.array_equal(pipe(num_images=4).tokens.numpy(), tokens[2])


def _model(out):
    from anyorder.inference.weights import load_any_order

    return load_any_order(out / "model")


def test_agreement_with_attributes_is_measured(experiment):
    _, out = experiment
    found = read_json(out / "eval-drawn/metrics.json")
    assert found["attribute"] == "colour"
    assert 0 <= found["agreement_colour"] <= 1
    assert found["agreement_colour_of_test"] == 1  # plain colours are easy to tell
    assert read_manifest(out / "colours")["test"]["test_accuracy"] == 1
    assert found["nll"] > 0
    assert found["nll"] != read_json(out / "eval-told-the-text/metrics.json")["nll"]
    assert "attribute agreement" in (out / "report.html").read_text()


def test_pictures_of_the_asked_colour_agree(experiment, tmp_path):
    """Test images in the place of samples: the asked colour is theirs, or never is."""
    _, out = experiment
    images, tokens = ImageSet(out / "data", "test"), TokenSet(out / "tokens", "test")
    for shift, share in ((0, 1), (1, 0)):
        samples, target = tmp_path / f"samples-{shift}", tmp_path / f"eval-{shift}"
        shutil.copytree(out / "drawn", samples)
        condition = tokens.batch(range(12))[1].numpy()
        known = condition[:, 1] >= 0
        condition[known, 1] = (condition[known, 1] + shift) % 3
        np.save(samples / "images.npy", np.array(images.images[:12]))
        np.save(samples / "condition.npy", condition)
        arguments = [f"{role}={out}/{role}" for role in ("model", "features", "data", "tokens")]
        arguments += [f"samples={samples}", f"attribute_features={out}/colours", f"out={target}"]
        assert cli.main(["eval", *arguments, "nll_images=0"]) == 0
        assert read_json(target / "metrics.json")["agreement_colour"] == share


def test_agreement_in_closed_form():
    logits = torch.eye(3)[[0, 1, 2, 2]]
    assert agreement(logits, torch.tensor([0, 1, 1, -1])) == pytest.approx(2 / 3)
    with pytest.raises(ValueError, match="0 of 4 targets"):
        agreement(logits, torch.full((4,), -1))
    with pytest.raises(ValueError, match="got 4 images"):
        agreement(logits, torch.zeros(3, dtype=torch.int64))


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (["sample", "prompts=[a,b]", "num_images=3"], "multiple of the 2 prompts"),
        (["sample", "prompts=[a]", "hide=[class]", "num_images=3"], "leave nothing to hide"),
        (["sample", "hide=[color]", "num_images=3"], "did you mean 'colour'"),
        (["tokens", "text.length=0"], "length must be >= 1"),
        (["features", "label=color", "train.steps=2"], "did you mean 'colour'"),
        (["features", "label=colour", "extractor=inception"], "set extractor=classifier"),
        (["eval", "samples={out}/prompted"], "made for prompts"),
        (["eval", "samples={out}/drawn", "attribute_features={out}/features"], "unknown attribute"),
    ],
)
def test_stages_refuse(experiment, tmp_path, capsys, command, message):
    _, out = experiment
    roles = {"sample": ("model", "tokenizer", "tokens"), "tokens": ("data", "tokenizer"),
             "features": ("data",), "eval": ("model", "features", "data", "tokens")}  # fmt: skip
    inputs = [f"{role}={out}/{role}" for role in roles[command[0]]]
    given = [argument.format(out=out) for argument in command]
    assert cli.main([*given, *inputs, f"out={tmp_path}/x"]) == 2
    assert message in capsys.readouterr().err


def test_the_experiment_is_up_to_date(experiment, capsys):
    assert cli.main(["run", str(experiment[0]), "--dry-run"]) == 0
    assert "to run" not in capsys.readouterr().out


# --- the Python interface


@pytest.fixture(scope="module")
def pipe(experiment):
    return Pipeline.from_pretrained(experiment[1] / "pipeline")


def test_pipeline_takes_several_conditions_at_once(pipe):
    wish = {"prompt": "a red shoe", "class_labels": "shoe", "attributes": {"colour": "Red"}}
    made = pipe(**wish, num_images=3, guidance_scale=2.0, generator=5)
    assert made.tokens.shape == (3, 16)
    several = pipe(
        prompt=["a red shoe", "a blue shoe"],
        class_labels="shoe",
        attributes={"colour": ["Red", "Blue"]},
        guidance_scale=2.0,
        generator=5,
    )
    assert torch.equal(several.tokens[0], made.tokens[0])
    assert torch.equal(pipe(prompt="", num_images=2).tokens, pipe(num_images=2).tokens)
    labels = pipe(class_labels=[0, 1])
    assert torch.equal(labels.tokens, pipe(class_labels=[0, 1], prompt="").tokens)


def test_pipeline_with_text_round_trip(pipe, tmp_path):
    pipe.save_pretrained(tmp_path / "p")
    again = Pipeline.from_pretrained(tmp_path / "p")
    wish = {"prompt": "a green shirt", "attributes": {"kind": "shirt"}, "num_images": 2}
    assert torch.equal(again(**wish).tokens, pipe(**wish).tokens)
    assert again.vocabulary.attributes == pipe.vocabulary.attributes


@pytest.mark.parametrize(
    ("call", "message"),
    [
        ({"attributes": {"colour": "Rad"}}, "unknown colour 'Rad', did you mean 'Red'"),
        ({"attributes": {"color": "Red"}}, "unknown attribute 'color', did you mean 'colour'"),
        ({"prompt": ["a", "b", "c"], "attributes": {"colour": ["Red", "Blue"]}}, "2 values of colour"),
        ({"class_labels": "shrt"}, "unknown class 'shrt', did you mean 'shirt'"),
    ],
)
def test_pipeline_refuses(pipe, call, message):
    with pytest.raises(ValueError, match=message):
        pipe(**call)


def test_completions_and_larger_pictures_follow_the_text(pipe):
    image = Image.new("RGB", (16, 16), COLOURS["Red"])
    for draw in (lambda **wish: pipe.complete(image, keep=0.2, **wish), pipe.coarse_to_fine):
        blue, again, none = (
            draw(prompt=prompt, num_images=2, generator=1) for prompt in ("a blue shoe", "a blue shoe", None)
        )
        assert torch.equal(blue.tokens, again.tokens)
        assert not torch.equal(blue.log_prob, none.log_prob)
        attribute = draw(attributes={"colour": "Blue"}, num_images=2, generator=1)
        assert not torch.equal(attribute.log_prob, none.log_prob)


def test_command_line_takes_prompts(pipe, experiment, tmp_path, capsys):
    wish = ["num_images=2", "prompts=[a red shoe, a blue shoe]", "attributes=kind: shoe", "seed=3"]
    command = ["sample", f"pipeline={experiment[1]}/pipeline", *wish]
    assert cli.main([*command, f"out={tmp_path}/drawn", "--traceback"]) == 0
    made = pipe(prompt=["a red shoe", "a blue shoe"], attributes={"kind": "shoe"}, generator=3)
    for i, image in enumerate(made.images):
        assert np.array_equal(np.asarray(Image.open(tmp_path / f"drawn/{i:04d}.png")), np.asarray(image))
    made.images[0].save(tmp_path / "in.png")
    command = ["complete", f"pipeline={experiment[1]}/pipeline", f"image={tmp_path}/in.png", "box=4,4,12,12"]
    assert cli.main([*command, "prompt=a blue shoe", f"out={tmp_path}/completed", "--traceback"]) == 0
    assert (tmp_path / "completed/0000.png").is_file()


def test_pipelines_without_captions_say_so(pipe):
    plain = Pipeline(pipe.model, pipe.tokenizer, pipe.classes)
    with pytest.raises(ValueError, match="trained with captions"):
        plain(prompt="red")


def test_broken_texts_are_read_with_question_marks():
    tokenizer = CaptionTokenizer.train(["a red shoe", "a \ud800 shoe"], 64)
    assert np.array_equal(tokenizer.encode(["a \udfff shoe"], 8), tokenizer.encode(["a ? shoe"], 8))
