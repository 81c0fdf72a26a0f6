"""In- and outpainting of pixels: what is kept, what is drawn, and that nothing leaks."""

import dataclasses

import numpy as np
import pytest
import torch
from conftest import PUBLISHED, published, seeded, transformer
from PIL import Image

from anyorder import Pipeline
from anyorder.cli import main as cli
from anyorder.contracts import TokenizerNetwork
from anyorder.inference.inpainting import extend, fading_step, open_tokens
from anyorder.inference.masks import box_mask, canvas, read_images, shaped_mask
from anyorder.method.policy_config import PolicyConfig
from anyorder.tokenizers.vq import VQConfig, VQModel

SIZE = (12, 16)
"""Height and width in pixels: 3 x 4 patches."""
CLASSES = ("cat", "dog", "owl")


def tokenizer(attention: bool = True) -> TokenizerNetwork:
    """Factor 4, five codes, every token sees the whole picture."""
    config = VQConfig(
        channels=8, multipliers=(1, 1, 2), groups=2, res_blocks=1, attention=attention, z_channels=8,
        vocab_size=5, code_dim=4,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return VQModel(config).eval()


MODELS = {"transformer": lambda: transformer(num_classes=3), **{
    name: (lambda model_class=model_class: published(model_class)) for name, model_class in PUBLISHED.items()
}}  # fmt: skip


@pytest.fixture(scope="module", params=MODELS)
def pipe(request):
    return Pipeline(MODELS[request.param](), tokenizer(), CLASSES)


@pytest.fixture(scope="module")
def ours():
    return Pipeline(transformer(num_classes=3), tokenizer(), CLASSES)


def images_of(n: int = 2, size: tuple[int, int] = SIZE, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (n, *size, 3), dtype=np.uint8)


def arrays(out) -> np.ndarray:
    return np.stack([np.asarray(image) for image in out.images])


HOLES = {
    "box": box_mask((5, 3, 11, 12), SIZE),
    "one pixel": box_mask((7, 7, 8, 8), SIZE),
    "two holes": box_mask((0, 0, 3, 3), SIZE) | box_mask((13, 9, 16, 12), SIZE),
}


@pytest.mark.parametrize("hole", HOLES)
def test_masked_pixels_change_no_pixel_of_the_result(pipe, hole):
    mask, first = HOLES[hole], images_of()
    others = [np.where(mask[..., None], fill, first).astype(np.uint8) for fill in (0, 255, images_of(seed=1))]
    out = [arrays(pipe.complete(some, mask, ["cat", "owl"], generator=3)) for some in (first, *others)]
    for again in out[1:]:
        np.testing.assert_array_equal(again, out[0])


@pytest.mark.parametrize("hole", HOLES)
@pytest.mark.parametrize("feather", [0, 2])
def test_known_pixels_stay_bit_by_bit(pipe, hole, feather):
    mask, given = HOLES[hole], images_of()
    out = pipe.complete(given, mask, "dog", feather=feather, guidance_scale=2.0)
    np.testing.assert_array_equal(arrays(out)[:, ~mask], given[:, ~mask])
    patches = mask.reshape(3, 4, 4, 4).any((1, 3)).ravel()
    assert (out.known.numpy() == ~patches).all()
    assert (out.log_prob[:, : (~patches).sum()] == 0).all()
    assert out.order.sort(1).values.tolist() == [list(range(12))] * 2


def test_what_is_kept_reaches_what_is_drawn(ours):
    mask, given = HOLES["box"], images_of()
    out = [arrays(ours.complete(some, mask, order="random")) for some in (given, 255 - given)]
    assert (out[0][:, mask] != out[1][:, mask]).any()


def test_masks_of_different_sizes_in_one_batch(ours):
    given = images_of(3)
    together = ours.complete(given, list(HOLES.values()), [0, 1, 2], order="entropy", generator=5)
    for i, mask in enumerate(HOLES.values()):
        alone = ours.complete(given[i], mask, i, order="entropy", generator=5 + i)
        np.testing.assert_array_equal(arrays(alone)[0], arrays(together)[i])


def test_a_mask_of_everything_is_sampling(ours):
    everything = np.ones(SIZE, bool)
    out = ours.complete(images_of(1), everything, "cat", 2, order="random", generator=4)
    drawn = ours("cat", 2, order="random", generator=4, grid=(3, 4))
    assert torch.equal(out.tokens, drawn.tokens)
    np.testing.assert_array_equal(arrays(out), arrays(drawn))


def test_several_completions_of_one_image(ours):
    out = ours.complete(images_of(1), HOLES["box"], num_images=8)
    assert len({image.tobytes() for image in out.images}) > 3


def test_the_scorer_decides_where(ours):
    scored = Pipeline(ours.model, ours.tokenizer, CLASSES, scorer=transformer(seed=7, num_classes=3))
    given, mask = images_of(4), np.ones(SIZE, bool)
    for order in (None, "entropy", PolicyConfig("entropy")):
        assert not torch.equal(
            scored.complete(given, mask, order=order).order, ours.complete(given, mask, order=order).order
        )
    for order in ("raster", "token_likelihood", torch.arange(12)):
        scored.complete(given, mask, order=order)


def test_outpainting_keeps_the_picture_in_its_place(pipe):
    given = images_of(1)
    out = pipe.complete(Image.fromarray(given[0]), pad=(4, 8, 0, 4), class_labels="owl")
    (image,) = arrays(out)
    assert image.shape == (24, 20, 3)
    np.testing.assert_array_equal(image[8:20, 4:20], given[0])
    assert out.tokens.shape == (1, 30)
    assert out.known.sum() == 12
    also = pipe.complete(given[0], HOLES["one pixel"], pad=(4, 8, 0, 4))
    assert also.known.sum() == 11


def test_variations_keep_a_share_of_the_tokens(pipe):
    given = images_of(1)
    out = pipe.complete(given, keep=0.3, class_labels="cat", num_images=4)
    tokens = pipe.tokenizer.encode(torch.from_numpy(given).permute(0, 3, 1, 2).float() / 127.5 - 1)
    assert out.known.sum(1).tolist() == [4] * 4
    assert len({tuple(row) for row in out.known.tolist()}) > 1
    assert torch.equal(out.tokens[out.known], tokens.expand(4, -1)[out.known])
    alone = pipe.complete(given, keep=0.3, class_labels="cat", generator=2)
    assert torch.equal(alone.tokens[0], out.tokens[2])


def test_a_share_below_one_leaves_something_to_generate(pipe):
    out = pipe.complete(images_of(1), keep=0.999)
    assert (~out.known).sum() == 1


@pytest.mark.parametrize("how", [{"mask": HOLES["box"]}, {"keep": 0.5}, {"pad": (4, 0, 0, 4)}], ids=str)
@pytest.mark.parametrize("order", ["entropy", "random"])
def test_a_completion_step_by_step_is_the_same(ours, order, how):
    image, settings = (
        images_of(1)[0],
        {"class_labels": "dog", "num_images": 3, "order": order, "generator": 4},
    )
    expected = ours.complete(image, **how, **settings)
    found = [*ours.stream_completion(image, **how, **settings)]
    begun, known = found[0][0], int(expected.known.sum(1)[0])
    assert all(one is begun for one, _ in found)
    assert [step.total for _, step in found] == [len(found)] * (expected.grid.n - known)
    assert torch.equal(begun.known, expected.known)
    steps = [step for _, step in found]
    order, tokens = (torch.cat([getattr(s, name) for s in steps], 1) for name in ("positions", "tokens"))
    assert torch.equal(order, expected.order[:, known:])
    pixels = begun.finish(ours.tokenizer, begun.tokens.scatter(1, order, tokens))
    np.testing.assert_array_equal(pixels.permute(0, 2, 3, 1).numpy(), arrays(expected))
    for changes, message in (
        ({"keep": 2}, "keep must be a share"),
        ({**how, "order": "zigzag"}, "zigzag"),
        ({**how, "class_labels": "cow"}, "cow"),
        ({}, "say what to generate"),
    ):
        with pytest.raises(ValueError, match=message):
            ours.stream_completion(image, **changes)


def test_an_animation_of_a_completion_begins_with_what_is_known(ours, tmp_path):
    out = ours.complete(images_of(1)[0], keep=0.5, num_images=2)
    out.save_animation(tmp_path / "a.webp", scale=1)
    with Image.open(tmp_path / "a.webp") as film:
        assert film.n_frames == 7
        first = np.asarray(film.convert("RGB"))[:12, :16]
    blank = (first == 128).all(-1).reshape(3, 4, 4, 4).all((1, 3)).flatten()
    np.testing.assert_array_equal(~blank, out.known[0].numpy())


def test_other_forms_of_images_and_masks(ours):
    given, mask = images_of(1)[0], HOLES["box"]
    grey = Image.fromarray((mask * 255).astype(np.uint8))
    forms = [mask, grey, grey.convert("1"), grey.convert("RGB"), mask * np.uint8(255), torch.from_numpy(mask)]
    wanted = arrays(ours.complete(given, mask))
    for form in forms:
        np.testing.assert_array_equal(arrays(ours.complete(Image.fromarray(given), form)), wanted)
        np.testing.assert_array_equal(arrays(ours.complete([given], [form])), wanted)
    assert read_images(Image.new("RGBA", (16, 12))).shape == (1, 12, 16, 3)
    assert read_images(Image.new("L", (16, 12))).shape == (1, 12, 16, 3)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        ({"mask": np.ones((12, 12), bool)}, r"the mask has \(12, 12\) pixels \(height, width\)"),
        ({"mask": np.zeros(SIZE, bool)}, "nothing to generate: white .True. marks the pixels to generate"),
        ({"mask": [np.ones(SIZE, bool)] * 3}, "got 3 masks for 2 images"),
        ({"mask": np.ones(SIZE)}, "bool or uint8 arrays"),
        ({"mask": HOLES["box"], "class_labels": 3}, r"lie in \[0, 3\)"),
        ({"mask": HOLES["box"], "class_labels": "cow"}, "unknown class"),
        ({"mask": HOLES["box"], "class_labels": [0, 1, 2]}, "3 labels for num_images=2"),
        ({"mask": HOLES["box"], "num_images": 3}, "2 images for num_images=3"),
        ({"mask": HOLES["box"], "guidance_scale": 2.0}, "guidance needs class labels"),
        ({"mask": HOLES["box"], "feather": -1}, "feather must be >= 0"),
        ({"mask": HOLES["box"], "keep": 0.5}, "either keep"),
        ({}, "say what to generate"),
        ({"keep": 1.0}, "keep must be a share"),
        ({"pad": (0, 0, 0, 0)}, "pad must be pixels"),
        ({"pad": (4, 4)}, "pad must be pixels"),
        ({"pad": (10**7, 0, 0, 0)}, "pad makes an image of .* allowed are 64,000,000 in all"),
        ({"pad": (1, 0, 0, 0)}, "12 x 17 pixels .* patches of 4 x 4"),
        ({"image": images_of(2, (10, 16)), "keep": 0.5}, "10 x 16 pixels .* multiple of 4"),
        (
            {"image": [images_of(1)[0], images_of(1, (8, 8))[0]], "keep": 0.5},
            "one size, got 8 x 8, 12 x 16",
        ),
        ({"image": [], "keep": 0.5}, "no image"),
        ({"image": images_of() / 255, "keep": 0.5}, "uint8 arrays"),
        ({"keep": 0.5, "num_images": 0}, "num_images"),
    ],
)
def test_bad_input_is_refused_with_the_reason(ours, call, message):
    with pytest.raises(ValueError, match=message):
        ours.complete(**{"image": images_of(), **call})


def test_large_images_from_coarse_to_fine(pipe):
    out = pipe.coarse_to_fine("dog", 2, order="random", guidance_scale=1.5, factor=2)
    assert [image.size for image in out.images] == [(24, 16)] * 2
    assert out.tokens.shape == (2, 24)
    alone = pipe.coarse_to_fine("dog", order="random", guidance_scale=1.5, generator=1)
    assert torch.equal(alone.tokens[0], out.tokens[1])


# --- the parts


def test_tokens_are_drawn_where_their_patch_has_a_masked_pixel():
    mask = torch.from_numpy(box_mask((7, 3, 8, 5), SIZE))[None]
    assert open_tokens(mask, 4).reshape(3, 4).int().tolist() == [[0, 1, 0, 0], [0, 1, 0, 0], [0, 0, 0, 0]]
    assert open_tokens(mask, 4, margin=1).reshape(3, 4).int().tolist() == [[1, 1, 1, 0]] * 3


def test_known_values_are_carried_into_the_hole():
    known = torch.zeros(1, 1, 3, 5, dtype=torch.bool)
    known[..., 0] = True
    values = torch.full((1, 2, 3, 5), torch.pi)
    values[..., 0] = torch.tensor([[1.0] * 3, [-2.0] * 3])
    everywhere, ring = extend(values, known)
    torch.testing.assert_close(everywhere, torch.tensor([1.0, -2.0]).view(1, 2, 1, 1).expand(1, 2, 3, 5))
    assert ring[0, 0, 1].tolist() == [0, 1, 2, 3, 4]
    near, ring = extend(values, known, rings=2)
    assert ring[0, 0, 1].tolist() == [0, 1, 2, -1, -1]
    assert near[0, 0, 1].tolist() == pytest.approx([1, 1, 1, 0, 0])
    nothing, ring = extend(values, torch.zeros_like(known))
    assert (nothing == 0).all()
    assert (ring == -1).all()


def test_the_step_at_the_seam_fades_out():
    known = torch.zeros(1, 1, 1, 6, dtype=torch.bool)
    known[..., 0] = True
    step = torch.randn(1, 3, 1, 6, generator=seeded(0))
    step[..., 0] = 1
    faded = fading_step(step, known, 3)
    assert faded[0, 0, 0].tolist() == pytest.approx([0, 0.75, 0.5, 0.25, 0, 0])


def test_shapes_and_canvas():
    assert shaped_mask("centre", (8, 8)).sum() == 16
    assert shaped_mask("lower", (9, 4)).nonzero()[0].min() == 6
    with pytest.raises(ValueError, match="choose one of centre, lower"):
        shaped_mask("center", (8, 8))
    with pytest.raises(ValueError, match="0 <= left < right <= 8"):
        box_mask((0, 0, 9, 4), (8, 8))
    with pytest.raises(ValueError, match="left,top,right,bottom, got 1,2"):
        box_mask((1, 2), (8, 8))
    large, mask = canvas(images_of(1), HOLES["box"], (0, 1, 2, 3))
    assert large.shape == (1, 16, 18, 3)
    assert (mask[0, 1:13, :16] == HOLES["box"]).all()
    assert mask.sum() == HOLES["box"].sum() + 16 * 18 - 12 * 16


# --- the command


@pytest.fixture
def files(ours, tmp_path):
    ours.save_pretrained(tmp_path / "pipe")
    Image.fromarray(images_of(1)[0]).save(tmp_path / "in.png")
    Image.fromarray((HOLES["box"] * 255).astype(np.uint8)).save(tmp_path / "mask.png")
    return tmp_path


def test_the_command_writes_images(files, capsys):
    command = [
        "complete",
        f"pipeline={files}/pipe",
        f"image={files}/in.png",
        "class_labels=dog",
        "num_images=2",
    ]
    assert cli.main([*command, f"mask={files}/mask.png", f"out={files}/a"]) == 0
    assert cli.main([*command, "box=5,3,11,12", f"out={files}/b"]) == 0
    for name in ("0000.png", "0001.png"):
        a, b = (np.asarray(Image.open(files / folder / name)) for folder in "ab")
        np.testing.assert_array_equal(a, b)
        np.testing.assert_array_equal(a[~HOLES["box"]], images_of(1)[0][~HOLES["box"]])
    assert f"wrote 2 images in {files}/b; next: look at {files}/b/0000.png" in capsys.readouterr().out
    assert cli.main([*command, "pad=4,4,4,4", "policy.order=raster", f"out={files}/c"]) == 0
    assert Image.open(files / "c/0000.png").size == (24, 20)
    assert cli.main([*command, "keep=0.5", "class_labels=2", "guidance_scale=1.5", f"out={files}/d"]) == 0
    assert cli.main([*command, "keep=0.5", "sampling.temperature=0", f"out={files}/e"]) == 0
    coldest = Pipeline.from_pretrained(files / "pipe").complete(
        images_of(1)[0], keep=0.5, class_labels="dog", num_images=2, sampling={"temperature": 0}
    )
    np.testing.assert_array_equal(np.asarray(Image.open(files / "e/0001.png")), arrays(coldest)[1])


def test_the_command_samples_without_a_class(files, ours):
    command = ["sample", f"pipeline={files}/pipe", "num_images=2"]
    assert cli.main([*command, "class_labels=null", f"out={files}/a"]) == 0
    assert cli.main([*command, f"out={files}/b"]) == 0
    images = [np.asarray(Image.open(files / f"{name}/0001.png")) for name in "ab"]
    np.testing.assert_array_equal(images[0], arrays(ours(num_images=2))[1])
    np.testing.assert_array_equal(images[1], arrays(ours([0, 1]))[1])


def test_images_are_replaced_only_where_that_is_meant(files, capsys):
    out = files / "out"
    command = ["complete", f"pipeline={files}/pipe", f"image={files}/in.png", "keep=0.5", f"out={out}"]
    assert cli.main([*command, "num_images=2"]) == 0
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    assert cli.main([*command, "num_images=2"]) == 0  # up to date
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    (out / "0001.png").unlink()
    assert cli.main([*command, "num_images=2"]) == 0  # what is missing is made again
    assert (out / "0001.png").read_bytes() == before["0001.png"]
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    assert cli.main([*command, "seed=7"]) == 2
    assert "add overwrite=true" in capsys.readouterr().err
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    assert cli.main([*command, "seed=7", "overwrite=true"]) == 0
    assert sorted(path.name for path in out.iterdir()) == ["0000.png", "manifest.json"]
    Image.fromarray(images_of(1)[0][::-1]).save(files / "in.png")  # the same settings, another image
    assert cli.main([*command, "seed=7"]) == 2
    sampled = ["sample", f"pipeline={files}/pipe", "num_images=2", f"out={out}"]
    assert cli.main(sampled) == 2
    assert "holds the artifact of stage 'complete'" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["sample", "complete"])
def test_images_of_others_are_not_written_over(files, command, capsys):
    out = files / "mine"
    out.mkdir()
    (out / "0000.png").write_bytes(b"mine")
    settings = ["num_images=1"] if command == "sample" else [f"image={files}/in.png", "keep=0.5"]
    assert cli.main([command, f"pipeline={files}/pipe", f"out={out}", *settings]) == 2
    assert "files that no manifest vouches for (0000.png)" in capsys.readouterr().err
    assert {path.name: path.read_bytes() for path in out.iterdir()} == {"0000.png": b"mine"}


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (["mask=m", "box=0,0,1,1"], "either mask"),
        (["box=0,0,99,1"], "box must be"),
        ([], "say what to generate"),
        (["keep=0.5", "out=x", "--dry-run"], "keep: 0.5"),
        (["--help"], "white is generated"),
    ],
)
def test_the_command_says_what_is_wrong(files, settings, said, capsys):
    cli.main(["complete", f"pipeline={files}/pipe", f"image={files}/in.png", f"out={files}/o", *settings])
    captured = capsys.readouterr()
    assert said in captured.out + captured.err


def test_no_picture_is_named(files, capsys):
    (files / "in.png").write_bytes(b"no picture")
    arguments = [f"pipeline={files}/pipe", f"image={files}/in.png", "keep=0.5", f"out={files}/o"]
    assert cli.main(["complete", *arguments]) == 2
    assert "in.png: no decoder knows its first bytes" in capsys.readouterr().err


def test_output_of_a_call_knows_nothing_given(ours):
    assert ours("cat").known is None
    assert {field.name for field in dataclasses.fields(ours("cat"))} >= {"images", "order", "known"}
