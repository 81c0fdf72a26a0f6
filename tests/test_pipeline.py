"""What a pipeline takes: one list of arguments, parts that fit, settings with an effect, any image file."""

import inspect
import io
import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import transformer
from PIL import Image

import anyorder
from anyorder import Pipeline
from anyorder.cli import main as cli
from anyorder.contracts import Grid
from anyorder.data.images import BadImage, to_uint8
from anyorder.inference.request import ImageRequest
from anyorder.inference.weights import default_dtype
from anyorder.method.decoding import extract_orders
from anyorder.method.guidance import GuidanceConfig, Guided
from anyorder.method.loss import token_nll
from anyorder.method.policy_config import PolicyConfig
from anyorder.method.sampling import Sampling
from anyorder.orders import inverse, static_order, stretch, validate
from anyorder.settings import parse
from anyorder.stages.completion import CompletionStage
from anyorder.stages.sample import SampleStage
from anyorder.tokenizers.vq import VQConfig, VQModel

CLASSES = ("cat", "dog", "owl")
GRID = Grid(3, 4)
SIZE = (12, 16)


def tokenizer(vocab_size: int = 5) -> VQModel:
    config = VQConfig(
        channels=8, multipliers=(1, 1, 2), groups=2, res_blocks=1, z_channels=8, vocab_size=vocab_size,
        code_dim=4,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return VQModel(config).eval()


MODEL, TOKENIZER, SCORER = (
    transformer(num_classes=3, grid=(3, 4)),
    tokenizer(),
    transformer(seed=7, num_classes=3, grid=(3, 4)),
)
CLASS_ORDERS = torch.stack([torch.arange(12), torch.arange(12).flip(0), static_order("spiral_in", GRID)])
PIPE = Pipeline(MODEL, TOKENIZER, CLASSES)
FULL = Pipeline(MODEL, TOKENIZER, CLASSES, scorer=SCORER, class_orders=CLASS_ORDERS)
IMAGE = np.random.default_rng(0).integers(0, 256, (*SIZE, 3), dtype=np.uint8)
HOLE = np.zeros(SIZE, bool)
HOLE[4:8, 4:12] = True


# --- one list of arguments


def test_every_method_shows_the_fields_of_a_request():
    fields = list(inspect.signature(ImageRequest).parameters)
    running = ["batch_size", "callback_on_step_end"]
    assert list(inspect.signature(PIPE).parameters) == [*fields[:5], *running, *fields[5:]]
    assert list(inspect.signature(PIPE.stream).parameters) == fields
    repairs = ["pad", "keep", "feather", "margin"]
    shown = list(inspect.signature(PIPE.complete).parameters)
    assert shown == ["image", "mask", *fields[:5], *repairs, *running, *fields[5:]]
    assert set(inspect.signature(PIPE.coarse_to_fine).parameters) == {"factor", *fields}
    with pytest.raises(TypeError, match="guidance"):
        PIPE(guidance=2.0)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ({"order": list(range(11, -1, -1))}, {"order": torch.arange(12).flip(0)}),
        ({"order": np.arange(12, dtype=np.uint16)}, {"order": "raster"}),
        ({"sampling": {"temperature": 0.5, "top_k": 3}}, {"sampling": Sampling(0.5, 3)}),
        ({"generator": np.int64(3)}, {"generator": 3}),
        ({"generator": np.array([3, 9])}, {"generator": [3, 9]}),
        ({"class_labels": np.int64(1)}, {"class_labels": "dog"}),
        ({"class_labels": torch.tensor([0, 2])}, {"class_labels": ["cat", "owl"]}),
        ({"condition": torch.tensor([0, 2])}, {"class_labels": ["cat", "owl"]}),
        ({"num_images": np.int64(2)}, {"num_images": 2}),
        ({"grid": np.array([2, 3])}, {"grid": Grid(2, 3)}),
        ({"class_labels": 1, "guidance_scale": np.float32(2)}, {"class_labels": 1, "guidance_scale": 2}),
        (
            {"class_labels": 1, "guidance_scale": 2, "guidance_schedule": "linear"},
            {"class_labels": 1, "guidance_scale": GuidanceConfig(2.0, "linear")},
        ),
    ],
)
def test_equal_requests(one, other):
    a, b = (PIPE(**{"num_images": 2, **settings}) for settings in (one, other))
    assert torch.equal(a.tokens, b.tokens)
    assert torch.equal(a.order, b.order)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"generator": None}, "generator must be a seed, one seed per image or a torch.Generator, got None"),
        ({"generator": 1.5}, "generator must be a seed"),
        ({"generator": [1, "a"]}, "generator must be a seed"),
        ({"sampling": {"heat": 1}}, "mapping of temperature, top_k, top_p, min_p, got"),
        ({"sampling": 0.5}, "sampling must be a Sampling"),
        ({"sampling": {"temperature": float("nan")}}, "temperature must be >= 0, got nan"),
        ({"guidance_scale": float("nan"), "class_labels": 1}, "guidance_scale must be a finite number"),
        ({"guidance_scale": "2", "class_labels": 1}, "guidance_scale must be a finite number"),
        (
            {"guidance_scale": GuidanceConfig(2.0), "guidance_schedule": "linear"},
            "leave out guidance_schedule",
        ),
        ({"guidance_schedule": "linear"}, "no effect at guidance_scale=1"),
        (
            {"guidance_scale": 2, "guidance_schedule": "steep", "class_labels": 1},
            "constant, linear or power-cosine",
        ),
        ({"order": 5}, "an order is a name, positions, a PolicyConfig or a policy, got 5"),
        ({"order": [0, 1, 1]}, "needs 12 positions"),
        ({"order": ["raster"]}, r"an order holds whole numbers, \(N,\) or \(B, N\), got \['raster'\]"),
        ({"order": [[0, 1], [2]]}, "an order holds whole numbers"),
        ({"order": [0.5] * 12}, "an order holds whole numbers"),
        ({"sampling": {"top_k": 1.5}}, "top_k must be >= 0"),
        ({"sampling": {"top_p": "high"}}, "sampling must be a Sampling or a mapping"),
        ({"order": "class_mean"}, "no orders of classes"),
        ({"grid": 3}, r"grid must be \(rows, columns\)"),
        ({"grid": (2, 3, 4)}, r"grid must be \(rows, columns\)"),
        ({"grid": (0, 3)}, "at least one row"),
        ({"num_images": 1.5}, "num_images must be a whole number"),
        ({"class_labels": 0.5}, "class labels are names or numbers, got 0.5"),
        ({"class_labels": -1}, r"lie in \[0, 3\), got -1"),
        ({"condition": torch.tensor([1]), "class_labels": 1}, r"either condition=\.\.\., or labels"),
    ],
)
def test_wrong_types_and_settings_without_effect_are_refused_in_one_line(settings, message):
    with pytest.raises(ValueError, match=message) as e:
        PIPE(**settings)
    assert "\n" not in str(e.value)


def test_labels_and_attributes_are_taken_in_turn():
    found = PIPE(["cat", "dog"], 5, generator=range(5))
    assert torch.equal(found.tokens, PIPE([0, 1, 0, 1, 0], generator=range(5)).tokens)
    for labels, n in ((["cat", "dog"], 1), ([], 3)):
        with pytest.raises(ValueError, match=f"got {len(labels)} labels for num_images={n}"):
            PIPE(labels, n)
    with pytest.raises(ValueError, match="got 2 labels for num_images=3: give one, or one per image"):
        PIPE.complete([IMAGE] * 3, HOLE, ["cat", "dog"])


@pytest.mark.parametrize(
    ("command", "old", "new"),
    [
        ("sample pipeline=fashion32", "n", "num_images"),
        ("sample pipeline=fashion32", "labels", "class_labels"),
        ("sample pipeline=fashion32", "guidance", "guidance_scale"),
        ("complete pipeline=fashion32 image=x.png", "label", "class_labels"),
        ("complete pipeline=fashion32 image=x.png", "guidance", "guidance_scale"),
        ("sample model=x", "n", "num_images"),
        ("completion model=x features=x", "n", "num_images"),
        ("grid model=x other=x", "n", "num_images"),
    ],
)
def test_settings_have_one_name_everywhere(command, old, new, capsys):
    assert cli.main([*command.split(), "out=x", f"{old}=2"]) == 2
    assert f"setting '{old}' is now called '{new}'" in capsys.readouterr().err


@pytest.mark.parametrize("order", ["random", "entropy", "margin", "token_likelihood", "information"])
def test_the_default_dtype_changes_nothing(order):
    calls = (
        lambda: PIPE("cat", 2, order).tokens,
        lambda: PIPE.complete(IMAGE, HOLE, "cat", 2, order).tokens,
        lambda: PIPE.coarse_to_fine("cat", 1, order).tokens,
    )
    expected = [call() for call in calls]
    with default_dtype(torch.float64):
        found = [call() for call in calls]
    assert all(map(torch.equal, found, expected))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_a_pipeline_is_loaded_in_float32_whatever_the_default(dtype):
    expected = Pipeline.from_pretrained("fashion32")("Shoes", generator=0).tokens
    with default_dtype(dtype):
        pipe = Pipeline.from_pretrained("fashion32")
        assert torch.equal(pipe("Shoes", generator=0).tokens, expected)
    assert {x.dtype for x in pipe.tokenizer.parameters()} == {torch.float32}


@pytest.mark.parametrize("extra", [{"margin": 1}, {"feather": 0}, {"margin": 0, "feather": 2}])
def test_variations_have_no_seam(extra):
    with pytest.raises(
        ValueError, match=r"either keep=\.\.\., or mask=\.\.\. and pad=\.\.\. with margin and feather"
    ):
        PIPE.complete(IMAGE, keep=0.5, **extra)


def test_the_grid_of_images_is_theirs():
    with pytest.raises(ValueError, match="leave out grid"):
        PIPE.complete(IMAGE, HOLE, grid=GRID)
    with pytest.raises(ValueError, match="leave out grid"):
        PIPE.coarse_to_fine("cat", grid=GRID)


def test_a_scorer_is_guided_only_where_asked():
    by_default, unguided, guided = (GuidanceConfig(6.0, locations=x) for x in (None, "unguided", "guided"))
    with pytest.raises(ValueError, match="a scoring model is unguided by default"):
        FULL("cat", guidance_scale=unguided)
    with pytest.raises(ValueError, match="locations=guided is about inferred orders"):
        FULL("cat", order="raster", guidance_scale=guided)
    FULL("cat", order="token_likelihood", guidance_scale=unguided)  # it leaves the scorer out
    PIPE("cat", guidance_scale=unguided)
    plain, default, along = (
        FULL("cat", 4, PolicyConfig("entropy"), scale) for scale in (1.0, by_default, guided)
    )
    assert torch.equal(plain.order[:, 0], default.order[:, 0])  # the scorer rates as without guidance
    assert not torch.equal(default.order, along.order)
    first = extract_orders(
        Guided(SCORER, guided), along.tokens, "entropy", condition=torch.zeros(4, dtype=torch.int64)
    )
    assert torch.equal(first.order, along.order)


@pytest.mark.parametrize("locations", ["guided", "unguided"])
def test_the_guidance_of_a_pipeline_is_for_every_order(locations):
    of_class = PolicyConfig("entropy", class_weight=1.0)
    parts = {"class_orders": CLASS_ORDERS, "guidance": GuidanceConfig(2.0, locations=locations)}
    for policy in (PolicyConfig(), of_class):
        pipe = Pipeline(MODEL, TOKENIZER, CLASSES, policy=policy, **parts)
        for order in (None, "raster", "random", "class_mean", "entropy", of_class):
            validate(pipe("cat", order=order).order, GRID)


def test_class_weight_leaves_an_order_what_it_is():
    both = Pipeline(MODEL, TOKENIZER, CLASSES, scorer=SCORER, class_orders=CLASS_ORDERS)
    peeking = PolicyConfig("token_likelihood", class_weight=1.0)
    alone = Pipeline(MODEL, TOKENIZER, CLASSES, class_orders=CLASS_ORDERS)
    assert torch.equal(both("cat", order=peeking).order, alone("cat", order=peeking).order)
    weighted = PolicyConfig("entropy", class_weight=1.0)
    both("cat", order=weighted, guidance_scale=GuidanceConfig(2.0, locations="guided"))
    with pytest.raises(ValueError, match=r"labels lie in \[0, 3\)"):
        both(condition=torch.tensor([7]), order="class_mean")


def test_a_folder_is_as_it_was_if_a_part_cannot_be_saved(tmp_path):
    class Local(type(TOKENIZER)):
        """Of no importable name."""

    Pipeline(MODEL, TOKENIZER, CLASSES, class_orders=CLASS_ORDERS).save_pretrained(tmp_path)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*.*")}
    other = Pipeline(SCORER, TOKENIZER, CLASSES)
    other.tokenizer = Local(TOKENIZER.config)
    with pytest.raises(ValueError, match="cannot be saved"):
        other.save_pretrained(tmp_path)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*.*")} == before


def test_what_is_completed_and_the_true_images_go_together():
    made = PIPE.complete(IMAGE, HOLE, "dog", num_images=3, order="raster")
    for completed in (made, PIPE("dog", order="raster")):
        with pytest.raises(ValueError, match="one true image for each of its images"):
            PIPE.log_prob_of(IMAGE, completed, "dog", order="raster")


def test_several_labels_for_one_image():
    out = PIPE.complete(IMAGE, HOLE, ["cat", "owl"], order="raster", generator=4)
    alone = PIPE.complete(IMAGE, HOLE, "owl", order="raster", generator=5)
    assert torch.equal(out.tokens[1], alone.tokens[0])


def test_log_probability_of_the_true_image():
    everything = np.ones(SIZE, bool)
    made = PIPE.complete(IMAGE, everything, "dog", order="spiral_in")
    found = PIPE.log_prob_of(IMAGE, made, "dog", order="spiral_in")
    tokens = TOKENIZER.encode(torch.from_numpy(IMAGE).permute(2, 0, 1)[None].float() / 127.5 - 1)
    with torch.no_grad():
        expected = -token_nll(MODEL, tokens, torch.tensor([1]), static_order("spiral_in", GRID)[None], GRID)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    kept = PIPE.complete(IMAGE, HOLE, "dog", order="raster")
    assert (PIPE.log_prob_of(IMAGE, kept, "dog", order="raster")[:, : int(kept.known.sum())] == 0).all()


def test_images_that_keep_more_than_others_are_not_mixed_up():
    """Read as one table, the positions of one image would be taken for those of the next."""
    masks = np.stack([HOLE, np.ones(SIZE, bool)])
    made = PIPE.complete([IMAGE, IMAGE], masks, order="raster")
    for work in (
        lambda: next(PIPE.stream_completion([IMAGE, IMAGE], masks, order="raster")),
        lambda: PIPE.log_prob_of([IMAGE, IMAGE], made, order="raster"),
    ):
        with pytest.raises(ValueError, match=r"keep 0 and \d+ tokens: give masks that keep equally many"):
            work()


@pytest.mark.parametrize(
    "named", [{"good_orders": ["location"]}, {"policy": PolicyConfig("margin", location=1.0)}]
)
def test_orders_by_a_location_head_need_one(named):
    with pytest.raises(ValueError, match="name the location head, and the model that decides has none"):
        Pipeline(MODEL, TOKENIZER, PIPE.classes, **named)


# --- many images, given images, and what shows itself


def test_batches_change_nothing_and_show_a_bar(capsys):
    labels = ["cat", "dog", "owl", "dog", "cat"]
    orders = torch.stack([torch.randperm(12, generator=torch.Generator().manual_seed(i)) for i in range(5)])
    for order in ("random", "entropy", "class_mean", orders, static_order("hilbert", GRID)):
        whole = FULL(labels, order=order, generator=3)
        parts = FULL(labels, order=order, generator=3, batch_size=2)
        assert torch.equal(whole.tokens, parts.tokens)
        assert torch.equal(whole.order, parts.order)
        torch.testing.assert_close(whole.log_prob, parts.log_prob)
        assert len(parts.images) == 5
    assert "5/5" in capsys.readouterr().err
    images = np.stack([IMAGE] * 5)
    for how in ({"mask": HOLE}, {"keep": 0.5}, {"mask": np.stack([HOLE] * 5), "pad": (0, 0, 4, 0)}):
        whole, parts = (PIPE.complete(images, **how, batch_size=size) for size in (64, 2))
        assert torch.equal(whole.tokens, parts.tokens)
        assert torch.equal(whole.known, parts.known)
        shades = np.stack(whole.images).astype(int) - np.stack(parts.images)
        assert abs(shades).max() <= 1, "sums of another sequence may round to the next shade"
    with pytest.raises(ValueError, match="batch_size must be a whole number >= 1, got 0"):
        PIPE(batch_size=0)
    with pytest.raises(ValueError, match="got 2 orders for 5 images"):
        PIPE(num_images=5, order=orders[:2], batch_size=2)


def test_too_little_memory_names_a_batch(monkeypatch):
    def full(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(PIPE.model, "start", full)
    monkeypatch.setattr(PIPE.model, "forward", full)
    image = np.stack([IMAGE] * 2)
    for work in (
        lambda: PIPE(num_images=2, batch_size=2),
        lambda: PIPE.complete(IMAGE, HOLE, batch_size=2),
        lambda: PIPE.score(image, order="token_likelihood", batch_size=2),
        lambda: PIPE.extract_order(image, batch_size=2),
    ):
        with pytest.raises(
            ValueError, match="out of memory with batch_size=2: batch_size=1 needs about half"
        ):
            work()


def test_memory_is_that_of_one_batch():
    seen = []
    original = PIPE.model.start
    PIPE.model.start = lambda n, *rest: seen.append(n) or original(n, *rest)
    try:
        PIPE(num_images=100, order="raster", batch_size=30)
    finally:
        del PIPE.model.start
    assert seen == [30, 30, 30, 10]


def test_callbacks_see_every_step():
    seen = []
    call = lambda pipe, index, step: seen.append((pipe, index, step.positions.shape))  # noqa: E731
    PIPE(num_images=3, batch_size=2, order="raster", callback_on_step_end=call)
    assert [(index, tuple(shape)) for _, index, shape in seen] == [
        *((i, (2, 1)) for i in range(12)),
        *((i, (1, 1)) for i in range(12)),
    ]
    assert seen[0][0] is PIPE
    seen.clear()
    PIPE.complete(IMAGE, HOLE, callback_on_step_end=call)
    assert len(seen) == 2, "the hole has two patches"


@pytest.mark.parametrize("settings", [{}, {"guidance_scale": 2}, {"order": PolicyConfig("raster", steps=3)}])
def test_scores_are_log_likelihoods(settings, tmp_path):
    made = PIPE(["cat", "dog"], **{"order": "spiral_in", **settings})
    expected = PIPE.score(made.images, ["cat", "dog"], **{"order": "spiral_in", **settings}, batch_size=1)
    assert expected.dtype == torch.float64
    tokens = TOKENIZER.encode(torch.from_numpy(np.stack(made.images)).permute(0, 3, 1, 2).float() / 127.5 - 1)
    for row, label in enumerate(("cat", "dog")):
        path = save(tmp_path / "one.png", made.images[row])
        alone = PIPE.score(path, label, **{"order": "spiral_in", **settings})
        torch.testing.assert_close(alone, expected[row : row + 1], rtol=1e-5, atol=1e-5)
    if not settings:
        order = static_order("spiral_in", GRID).expand(2, -1)
        with torch.no_grad():
            nll = token_nll(MODEL, tokens, torch.tensor([0, 1]), order, GRID).sum(1)
        torch.testing.assert_close(expected.float(), -nll, rtol=1e-5, atol=1e-5)


def test_scores_along_inferred_orders_are_those_of_the_extracted_order():
    found = PIPE.score(IMAGE, "cat", order="entropy")
    order = PIPE.extract_order(IMAGE, "cat", order="entropy")
    torch.testing.assert_close(found, PIPE.score(IMAGE, "cat", order=order), rtol=1e-5, atol=1e-5)


def test_orders_are_extracted_by_the_pipelines_rule_or_the_papers():
    images = [IMAGE, IMAGE[::-1]]
    certain = Pipeline(MODEL, TOKENIZER, CLASSES, PolicyConfig("margin"))
    raster = Pipeline(MODEL, TOKENIZER, CLASSES, PolicyConfig("raster"))
    assert torch.equal(certain.extract_order(images), raster.extract_order(images, order="margin"))
    paper = raster.extract_order(images, batch_size=1)
    assert torch.equal(paper, raster.extract_order(images, None, None, "token_likelihood"))
    assert not torch.equal(paper[:1], raster.extract_order(IMAGE, order="raster"))
    for wrong in ({"grid": GRID}, {"sampling": Sampling(0.5)}):
        with pytest.raises(ValueError, match="the images are given: leave out grid and sampling"):
            PIPE.score(IMAGE, **wrong)


def test_an_output_shows_itself(tmp_path):
    out = PIPE("cat", 3)
    assert repr(out) == "PipelineOutput(3 images of 12 x 16 pixels, 3 x 4 patches)"
    assert Image.open(io.BytesIO(out._repr_png_())).size[1] > 3 * 12
    for name in ("x.webp", "x.gif"):
        out.save_animation(tmp_path / name, columns=2)
        with Image.open(tmp_path / name) as image:
            assert image.n_frames > 2
            assert image.size == (2 * 16 * 8 + 2, 2 * 12 * 8 + 2)
    with pytest.raises(ValueError, match=r"animations are .gif or .webp files"):
        out.save_animation(tmp_path / "x.png")


def test_a_pipeline_says_what_it_is():
    assert repr(FULL).splitlines() == [
        "Pipeline:",
        "  images     12 x 16 pixels, 3 x 4 patches",
        f"  model      AnyOrderTransformer, 0.0 million parameters, torch.float32 on {FULL.device}",
        "  tokenizer  VQModel, 5 tokens",
        "  classes    3: cat, dog, owl",
        "  order      entropy",
        "  scorer     AnyOrderTransformer",
    ]


def test_device_and_dtype(tmp_path):
    PIPE.save_pretrained(tmp_path)
    pipe = Pipeline.from_pretrained(tmp_path, device="cpu", dtype=torch.bfloat16)
    assert pipe.device == torch.device("cpu")
    assert {p.dtype for p in pipe.model.parameters()} == {torch.bfloat16}
    assert {p.dtype for p in pipe.tokenizer.parameters()} == {torch.float32}
    tokens = torch.arange(12).view(1, 12) % 5
    fast, slow = (np.asarray(each.decode(tokens)[0]).astype(int) for each in (pipe, PIPE))
    with torch.autocast("cpu", torch.bfloat16), torch.inference_mode():
        expected = to_uint8(TOKENIZER.decode(tokens, GRID))
    np.testing.assert_array_equal(fast, expected[0])
    assert 0 < abs(fast - slow).max() < 16
    for wrong, message in {"cuda:99": "is not there", "gpu": "got 'gpu'", 1.5: r"got '1\.5'"}.items():
        with pytest.raises(ValueError, match=message) as e:
            Pipeline.from_pretrained(tmp_path, device=wrong)
        assert "\n" not in str(e.value)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("n", "no argument 'n': it is called num_images"),
        ("labels", "no argument 'labels': it is called class_labels"),
        ("seed", "no argument 'seed': it is called generator"),
        ("guidance", "no argument 'guidance': it is called guidance_scale"),
        ("ordr", "no argument 'ordr', did you mean 'order'?"),
    ],
)
def test_arguments_have_one_name(name, message):
    for call in (PIPE, PIPE.stream, lambda **s: PIPE.complete(IMAGE, HOLE, **s)):
        with pytest.raises(TypeError, match=message.replace("?", r"\?")):
            call(**{name: 2})


def test_the_package_exports_what_calls_take():
    assert anyorder.Sampling is Sampling
    assert anyorder.PolicyConfig is PolicyConfig
    assert type(PIPE(num_images=1)) is anyorder.PipelineOutput
    assert (Path(anyorder.__file__).parent / "py.typed").is_file()
    with pytest.raises(AttributeError, match="no attribute 'Smapling'"):
        anyorder.Smapling  # noqa: B018


# --- parts that do not fit


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ({"tokenizer": tokenizer(6)}, "the model has vocab_size 5, the tokenizer 6"),
        ({"scorer": transformer(num_classes=3, vocab_size=6)}, "the model has vocab_size 5, the scorer 6"),
        ({"scorer": transformer(num_classes=4)}, "the model has num_classes 3, the scorer 4"),
        ({"class_orders": CLASS_ORDERS[:, :9]}, "needs 12 positions"),
        ({"class_orders": CLASS_ORDERS[:2]}, r"each of the model's 3 classes, got shape \(2, 12\)"),
        ({"class_orders": CLASS_ORDERS[0]}, "class_orders must have a row for each"),
        ({"class_orders": torch.zeros(3, 12, dtype=torch.int64)}, "exactly once"),
        ({"good_orders": ["zigzag"]}, "zigzag"),
        ({"good_orders": ["class_mean"]}, "good_orders names class_mean, and there are no class_orders"),
        ({"classes": CLASSES, "example_class": "mouse"}, "example_class is 'mouse', the classes are"),
    ],
)
def test_parts_that_do_not_fit_are_refused(parts, message):
    with pytest.raises(ValueError, match=message):
        Pipeline(**{"model": MODEL, "tokenizer": TOKENIZER, **parts})


def test_what_the_page_offers_and_the_sampling_are_kept(tmp_path):
    shown = {
        "good_orders": ["random", "class_mean"],
        "example_class": CLASSES[1],
        "sampling": Sampling(0.5, top_k=3),
    }
    pipe = Pipeline(MODEL, TOKENIZER, CLASSES, class_orders=CLASS_ORDERS, **shown)
    pipe.save_pretrained(tmp_path / "a")
    Pipeline.from_pretrained(tmp_path / "a").save_pretrained(tmp_path / "b")
    loaded = Pipeline.from_pretrained(tmp_path / "b")
    assert {name: getattr(loaded, name) for name in shown} == shown
    assert "Sampling(temperature=0.5, top_k=3" in repr(loaded)
    assert torch.equal(
        loaded(num_images=4).tokens, PIPE(num_images=4, order="entropy", sampling=shown["sampling"]).tokens
    )
    assert not torch.equal(loaded(num_images=4).tokens, PIPE(num_images=4, order="entropy").tokens)
    PIPE.save_pretrained(tmp_path / "b")
    assert not {*shown} & {*json.loads((tmp_path / "b/pipeline.json").read_text())}
    assert (PIPE.good_orders, PIPE.example_class) == ([], None)


# --- orders of classes on other grids


def test_ranks_are_interpolated_between_patch_centres():
    assert stretch(torch.tensor([[1, 0]]), Grid(1, 2), Grid(1, 4)).tolist() == [[3, 2, 1, 0]]
    # Ranks 0 to 3 in the corners; by hand: 3 x 3 has 0, .5, 1 / 1, 1.5, 2 / 2, 2.5, 3, ties in raster order.
    assert stretch(torch.arange(4)[None], Grid(2, 2), Grid(3, 3)).tolist() == [[0, 1, 2, 3, 4, 5, 6, 7, 8]]
    assert stretch(CLASS_ORDERS, GRID, GRID) is CLASS_ORDERS
    for grid in (Grid(1, 1), Grid(2, 9), Grid(24, 5)):
        found = validate(stretch(CLASS_ORDERS, GRID, grid), grid)
        rows, columns = (
            ((np.arange(new) + 0.5) * old / new - 0.5).clip(0, old - 1)
            for old, new in zip((GRID.h, GRID.w), (grid.h, grid.w), strict=True)
        )
        for order, given in zip(found, CLASS_ORDERS, strict=True):
            ranks = inverse(given).reshape(GRID.h, GRID.w).numpy()
            across = np.stack([np.interp(columns, np.arange(GRID.w), row) for row in ranks])
            down = np.stack([np.interp(rows, np.arange(GRID.h), column) for column in across.T], axis=1)
            assert order.tolist() == down.round(5).ravel().argsort(kind="stable").tolist()


def test_shipped_model_on_other_grids():
    """The three calls of the README that class orders of one grid alone would refuse."""
    pipe = Pipeline.from_pretrained("fashion32")
    shoes = pipe.class_orders[pipe.classes.index("Shoes")][None]
    out = pipe("Shoes", grid=(12, 8), order="class_mean")
    assert out.images[0].size == (32, 48)
    assert torch.equal(out.order, stretch(shoes, pipe.model.grid, Grid(12, 8)))
    large = pipe.coarse_to_fine("Shoes")
    assert large.images[0].size == (64, 64)
    assert large.order.shape == (1, 256)
    wide = pipe.complete(Image.new("RGB", (32, 32), "white"), pad=(0, 0, 16, 0))
    assert wide.images[0].size == (48, 32)
    ranks = inverse(stretch(shoes, pipe.model.grid, Grid(8, 12)))
    shoe = pipe.complete(
        Image.new("RGB", (32, 32), "white"), pad=(0, 0, 16, 0), class_labels="Shoes", order="class_mean"
    )
    opened = shoe.order[:, 64:]
    assert (ranks.gather(1, opened).diff(dim=1) > 0).all(), "open positions follow the interpolated ranks"


def test_orders_of_classes_on_both_grids_of_coarse_to_fine():
    out = FULL.coarse_to_fine(["cat", "dog", "owl"], order="class_mean")
    fine = Grid(6, 8)
    for row, label in enumerate(range(3)):
        ranks = inverse(stretch(CLASS_ORDERS[label][None], GRID, fine))[0]
        assert (ranks[out.order[row, 12:]].diff() > 0).all()


# --- one reader of images and masks


def save(path, image):
    image.save(path)
    return path


def test_images_are_read_as_those_of_data_are(tmp_path):
    grey = np.linspace(0, 65535, 192).reshape(SIZE).astype(np.uint16)
    eight = (grey / 257).round().astype(np.uint8)[..., None].repeat(3, -1)
    clear = np.dstack([IMAGE, np.full(SIZE, 255, np.uint8)])
    clear[:, 8:, 3] = 0  # hidden colours
    turned = Image.fromarray(np.rot90(IMAGE).copy())
    exif = turned.getexif()
    exif[0x0112] = 6  # turn it by 90 degrees clockwise
    turned.save(tmp_path / "turned.png", exif=exif)
    white = IMAGE.copy()
    white[:, 8:] = 255
    cases = [
        (save(tmp_path / "16.png", Image.fromarray(grey)), eight),
        (save(tmp_path / "float.tif", Image.fromarray((grey / np.float32(65535)).astype(np.float32))), eight),
        (save(tmp_path / "clear.png", Image.fromarray(clear)), white),
        (Image.fromarray(clear), white),
        (tmp_path / "turned.png", IMAGE),
    ]
    for given, expected in cases:
        made = np.asarray(PIPE.complete(given, HOLE, order="raster").images[0]).astype(int)
        assert np.abs(made - expected)[~HOLE].max() <= 1, given


def test_masks_of_16_bits_and_transparent_ones(tmp_path):
    sixteen = save(tmp_path / "16.png", Image.fromarray(HOLE.astype(np.uint16) * 40000))
    clear = np.full((*SIZE, 4), 255, np.uint8)
    clear[..., 3] = HOLE * 255
    expected = PIPE.complete(IMAGE, HOLE, order="raster")
    for mask in (sixteen, str(sixteen), Image.fromarray(clear), HOLE.astype(np.uint8)):
        found = PIPE.complete(IMAGE, mask, order="raster")
        np.testing.assert_array_equal(found.images[0], expected.images[0])


def test_bombs_and_pipes_are_refused_with_their_path(tmp_path, monkeypatch):
    os.mkfifo(tmp_path / "pipe.png")
    monkeypatch.setattr("anyorder.data.images.MAX_PIXELS", 100)
    bomb = save(tmp_path / "bomb.png", Image.new("1", (70_000, 10_000)))
    for path in (tmp_path / "pipe.png", bomb, tmp_path / "none.png"):
        with pytest.raises(BadImage, match=path.name):
            PIPE.complete(path, keep=0.5)
        with pytest.raises(BadImage, match=path.name):
            PIPE.complete(IMAGE, path)


def test_policies_on_other_grids_in_few_steps():
    quick = PolicyConfig("class_mean", steps=4)
    steps = list(FULL.stream("owl", order=quick, grid=(4, 6)))
    assert [step.positions.shape[1] for step in steps] == [6] * 4


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        ([], "has format list"),
        ({"format": 1}, "pipeline.json is damaged: KeyError"),
        ({"format": 1, "classes": 3, "policy": {}}, "pipeline.json is damaged: TypeError"),
        ({"format": 1, "classes": [], "policy": [1]}, "pipeline.json is damaged"),
        ({"format": 1, "classes": [], "policy": {"heat": 1}}, "heat"),
        ({"format": 1, "classes": [], "policy": {}, "sampling": {"heat": 1}}, "heat"),
        (
            {"format": 1, "classes": [], "policy": {}, "sampling": {"temperature": -1}},
            "temperature must be >= 0",
        ),
    ],
)
def test_damaged_indices_are_named_in_one_line(tmp_path, damage, message):
    PIPE.save_pretrained(tmp_path)
    (tmp_path / "pipeline.json").write_text(json.dumps(damage))
    with pytest.raises(ValueError, match=message) as e:
        Pipeline.from_pretrained(tmp_path)
    assert "\n" not in str(e.value)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"policy": {"order": "class_mean"}}, "class_mean' needs the orders of the classes"),
        ({"orders": "x"}, "orders has no effect on policy.order=entropy"),
        ({"scorer": "x", "policy": {"order": "raster"}}, "scorer has no effect on policy.order=raster"),
        ({"scorer": "x", "policy": {"order": "token_likelihood"}}, "scorer has no effect on"),
    ],
)
def test_stages_refuse_inputs_that_their_order_leaves_unused(settings, message):
    inputs = dict.fromkeys(("model", "tokenizer", "tokens", "features", "data"), "x")
    for stage in (SampleStage, CompletionStage):
        named = {name: "x" for name in stage.inputs if name in inputs}
        with pytest.raises(ValueError, match=message):
            parse(stage, {**named, **settings})


def test_a_scale_alone_keeps_the_schedule_of_the_pipeline():
    own = GuidanceConfig(5.0, "linear")
    assert ImageRequest.of(0, guidance_scale=4.0).guidance(own) == GuidanceConfig(4.0, "linear")
    asked = ImageRequest.of(0, guidance_scale=4.0, guidance_schedule="constant")
    assert asked.guidance(own) == GuidanceConfig(4.0)
    assert ImageRequest.of(0, guidance_scale=1.0).guidance(own) == GuidanceConfig()
