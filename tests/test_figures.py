import json
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from anyorder.contracts import Grid
from anyorder.inference import figures
from anyorder.inference.figures import (
    UNREVEALED,
    generation_frames,
    image_grid,
    mean_rank_per_class,
    order_map,
    order_panel,
    ranks,
    save_animation,
    save_image,
)
from anyorder.report import curves
from anyorder.report.curves import loss_curves, read_metrics, scaling_curves

GRID = Grid(2, 3)


def images_of(n: int, height: int = 4, width: int = 6) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 100, (n, height, width, 3), dtype=np.uint8)


def permutations(n: int, grid: Grid = GRID, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).permuted(np.tile(np.arange(grid.n), (n, 1)), axis=1)


@settings(max_examples=25, deadline=None)
@given(n=st.integers(1, 9), columns=st.integers(1, 10), scale=st.integers(1, 3), gap=st.integers(0, 3))
def test_grid_holds_every_image_in_place(n: int, columns: int, scale: int, gap: int) -> None:
    images = images_of(n)
    canvas = np.asarray(image_grid(images, columns, scale, gap))
    height, width = 4 * scale + gap, 6 * scale + gap
    used = min(columns, n)
    assert canvas.shape == (-(-n // used) * height - gap, used * width - gap, 3)
    for i, image in enumerate(images):
        y, x = i // used * height, i % used * width
        tile = canvas[y : y + 4 * scale, x : x + 6 * scale]
        assert (tile[::scale, ::scale] == image).all()
        assert (tile == tile[::scale, ::scale].repeat(scale, 0).repeat(scale, 1)).all()
    assert (canvas == 255).all(2).sum() == canvas[..., 0].size - n * 24 * scale**2


def test_prompts_stand_above_their_rows() -> None:
    rows = [np.full((2, 4, 4, 3), value, np.uint8) for value in (50, 100)]
    grid = np.asarray(figures.prompt_grid(rows, ["a", "a rather long prompt that needs more room"], scale=1))
    tops = [int(np.argwhere((grid == value).all(-1))[0, 0]) for value in (50, 100)]
    assert tops[1] - tops[0] > 4 + 12
    assert grid[: tops[0]].min() < 50  # text above each
    assert grid[tops[0] + 8 : tops[1]].min() < 50
    assert grid.shape[1] > 200


@pytest.mark.parametrize("images", [np.zeros((1, 4, 4, 3)), np.zeros((4, 4, 3), np.uint8), images_of(0)])
def test_other_things_than_images_are_refused(images: np.ndarray) -> None:
    with pytest.raises(ValueError, match="one or more uint8 images"):
        image_grid(images)


def test_ranks_invert_orders() -> None:
    orders = permutations(5)
    rank = ranks(orders, GRID).reshape(5, 6)
    assert (np.take_along_axis(rank, orders, 1) == np.arange(6)).all()
    for wrong in (orders[:, :5], np.zeros_like(orders), orders[0]):
        with pytest.raises(ValueError, match="permutations of the 6 positions of a 2x3 grid"):
            ranks(wrong, GRID)


def test_order_map_goes_from_light_to_dark_patch_by_patch() -> None:
    rank = np.array([[0, 1, 2], [5, 4, 3]])
    heat = order_map(rank, (4, 6))
    patches = heat[::2, ::2].astype(float)
    assert (heat == heat[::2, ::2].repeat(2, 0).repeat(2, 1)).all()
    luminance = patches @ [0.2126, 0.7152, 0.0722]
    assert (np.diff(luminance.ravel()[np.argsort(rank.ravel())]) < 0).all()
    assert order_map(np.zeros((1, 1)), (2, 2)).shape == (2, 2, 3)


def test_panel_shows_each_image_beside_its_own_order() -> None:
    images, orders = images_of(4, 24, 60), permutations(4)
    panel = np.asarray(order_panel(images, orders, GRID, columns=2, scale=1))
    for i, rank in enumerate(ranks(orders, GRID)):
        y, x = i // 2 * 30, i % 2 * 126
        assert (panel[y : y + 24, x : x + 60] == images[i]).all()
        assert (panel[y : y + 24, x + 60 : x + 120] == order_map(rank, (24, 60))).all()
    key = panel[54:].reshape(-1, 3).tolist()
    for step in (0, 5):  # the key runs from the colour of the first to the colour of the last step
        assert order_map(np.array([[0, 1, 2], [3, 4, 5]]), (2, 3)).reshape(-1, 3)[step].tolist() in key


def test_key_fits_beside_a_tiny_panel() -> None:
    panel = order_panel(images_of(1, 2, 3), permutations(1), GRID, scale=1)
    assert panel.width > 40


def test_panel_needs_an_order_for_each_image() -> None:
    with pytest.raises(ValueError, match="2 images and 3 orders"):
        order_panel(images_of(2), permutations(3), GRID)


def test_mean_rank_per_class_has_a_map_for_each_class_that_occurs(monkeypatch) -> None:
    shown = []
    rendered = figures.rendered
    monkeypatch.setattr(figures, "rendered", lambda figure: shown.append(figure) or rendered(figure))
    orders, labels = permutations(6), np.array([2, 0, 2, 0, 0, 2])
    long = "a class of a very long name"
    image = mean_rank_per_class(orders, labels, ["shoes", "never", long], GRID, columns=2)
    axes = [axis for axis in shown[0].axes if axis.images]
    assert [axis.get_title() for axis in axes] == [
        "all (6)",
        "shoes (3)",
        "a class of a ve… (3)",
    ]
    expected = [ranks(orders, GRID)[rows].mean(0) for rows in (slice(None), labels == 0, labels == 2)]
    for axis, mean in zip(axes, expected, strict=True):
        np.testing.assert_allclose(axis.images[0].get_array(), mean)
    assert image.mode == "RGB"
    assert image == mean_rank_per_class(orders, labels, ["shoes", "never", long], GRID, columns=2)


def test_mean_rank_per_class_shows_the_largest_of_many_classes(monkeypatch) -> None:
    shown = []
    rendered = figures.rendered
    monkeypatch.setattr(figures, "rendered", lambda figure: shown.append(figure) or rendered(figure))
    monkeypatch.setattr(figures, "CLASS_MAPS", 2)
    labels = np.array([0, 1, 1, 2, 3, 3])
    mean_rank_per_class(permutations(6), labels, ["a", "b", "c", "d"], GRID)
    assert [axis.get_title() for axis in shown[0].axes if axis.images] == ["all (6)", "b (2)", "d (2)"]


def test_animations_need_two_frames() -> None:
    with pytest.raises(ValueError, match="at least 2 frames, got 1"):
        generation_frames(images_of(1), permutations(1), GRID, frames=1)


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 1000), count=st.integers(2, 12))
def test_frames_reveal_patches_in_order(seed: int, count: int) -> None:
    images, orders = images_of(3), permutations(3, seed=seed)
    frames = generation_frames(images, orders, GRID, count)
    assert frames.shape[0] <= count
    assert (frames[0] == UNREVEALED).all()
    assert (frames[-1] == images).all()
    rank = ranks(orders, GRID).repeat(2, 1).repeat(2, 2)
    for frame in frames:
        revealed = (frame != UNREVEALED).all(3)
        steps = revealed[0].sum() // 4
        assert (revealed == (rank < steps)).all()
        assert (frame[revealed] == images[revealed]).all()


def test_what_each_image_knows_is_never_grey() -> None:
    orders, known = permutations(2), np.array([1, GRID.n - 2])
    frames = generation_frames(images_of(2), orders, GRID, GRID.n, known)
    first = (frames[0] != UNREVEALED).all(3).sum((1, 2)) // 4
    assert first.tolist() == known.tolist()
    assert (frames[-1] == images_of(2)).all()


@pytest.mark.parametrize("name", ["x.psd", "x.fli", "x.what"])
def test_formats_that_pillow_only_reads_are_refused(tmp_path, name: str) -> None:
    with pytest.raises(ValueError, match=r"cannot write '\.\w+' images"):
        save_image(Image.new("RGB", (4, 4)), tmp_path / name)


@pytest.mark.parametrize("suffix", ["gif", "webp"])
def test_animation_shows_every_frame_and_holds_the_last(tmp_path, suffix: str) -> None:
    path = tmp_path / f"generation.{suffix}"
    images = images_of(3)
    frames = generation_frames(images, permutations(3), GRID, frames=5)
    save_animation(path, frames, columns=3, scale=2, seconds=1, hold=3)
    first = path.read_bytes()
    durations = []
    with Image.open(path) as animation:
        assert animation.n_frames == len(frames)
        assert animation.info["loop"] == 0
        for i in range(animation.n_frames):
            animation.seek(i)
            pixels = np.asarray(animation.convert("RGB"), dtype=int)
            durations.append(animation.info["duration"])
            error = np.abs(pixels - np.asarray(image_grid(frames[i], 3, 2)))
            assert error.max() <= (0 if suffix == "webp" else 40)  # GIF has 256 colours
    assert durations[-1] == 3000
    assert set(durations[:-1]) == {250}
    save_animation(path, frames, columns=3, scale=2, seconds=1, hold=3)
    assert path.read_bytes() == first
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


def test_animation_refuses_other_formats_and_still_images_of(tmp_path) -> None:
    frames = np.stack([images_of(1)] * 2)
    with pytest.raises(ValueError, match=r"\.gif or \.webp"):
        save_animation(tmp_path / "a.png", frames)
    with pytest.raises(ValueError, match="at least 2 frames, got 1"):
        save_animation(tmp_path / "a.gif", frames[:1])


def test_save_image_is_lossless_and_atomic(tmp_path) -> None:
    image = image_grid(images_of(2))
    save_image(image, tmp_path / "new" / "a.png")
    assert Image.open(tmp_path / "new" / "a.png").tobytes() == image.tobytes()
    with pytest.raises(ValueError, match=r"cannot write '.xyz' images"):
        save_image(image, tmp_path / "a.xyz")
    assert not (tmp_path / "a.xyz").exists()


def write_log(path, *lines: dict) -> str:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return str(path)


def axes_of(monkeypatch, plot) -> list:
    shown = []
    rendered = figures.rendered
    monkeypatch.setattr(figures, "rendered", lambda figure: shown.append(figure) or rendered(figure))
    assert plot().mode == "RGB"
    return shown[0].axes


def test_loss_curves_show_what_is_logged(tmp_path, monkeypatch) -> None:
    a = write_log(
        tmp_path / "a.jsonl",
        {"step": 1, "loss": 9.0, "examples_per_second": 10.0},
        {"step": 2, "loss": 5.0},
        {"step": 2, "loss": 4.0},  # a resumed run repeats a step
        {"step": 2, "test_nll": 4.5},
        {"step": 3, "loss": 3.0},
    )
    b = write_log(tmp_path / "b.jsonl", {"step": 1, "loss": 2.0, "test_loss": None})
    loss, speed = axes_of(monkeypatch, lambda: loss_curves([("raster", a), ("random", b)]))
    raw, _, test = loss.lines[:3]
    assert raw.get_xydata().tolist() == [[1, 9], [2, 4], [3, 3]]
    assert test.get_xydata().tolist() == [[2, 4.5]]
    assert [t.get_text() for t in loss.get_legend().get_texts()] == ["raster", "raster, test", "random"]
    assert speed.lines[0].get_xydata().tolist() == [[1, 10]]
    assert speed.get_ylim()[0] == 0
    assert loss.get_ylabel() == "loss (nats per token)"


def test_loss_curves_without_speed_have_one_panel(tmp_path, monkeypatch) -> None:
    log = write_log(tmp_path / "a.jsonl", *({"step": i, "loss": 50.0 if i < 3 else 2.0} for i in range(100)))
    (panel,) = axes_of(monkeypatch, lambda: loss_curves([("a", log)]))
    assert panel.get_ylim()[1] < 10  # the cliff at the start does not set the scale


def test_scaling_curves_have_a_column_per_size_and_a_row_per_measure(monkeypatch) -> None:
    rows = [
        {"workload": "train", "value": 4, "images/s": 2.0, "share (%)": 50.0},
        {"workload": "train", "value": 1, "images/s": 1.0, "share (%)": 40.0},
        {"workload": "sample", "value": 1, "images/s": 0.5, "share (%)": None},
    ]
    sizes = {"images at once, B": rows, "depth, blocks": rows[:1]}
    panels = axes_of(monkeypatch, lambda: scaling_curves(sizes, ["images/s", "share (%)"]))
    assert [panel.get_xlabel() for panel in panels] == ["", "", *sizes]
    assert [panel.get_ylabel() for panel in panels] == ["images/s", "", "share (%)", ""]
    assert [panel.get_yscale() for panel in panels] == ["log", "log", "linear", "linear"]
    train, sample = panels[0].lines
    assert train.get_xydata().tolist() == [[1, 1], [4, 2]]
    assert sample.get_xydata().tolist() == [[1, 0.5]]
    assert len(panels[2].lines[1].get_xdata()) == 0
    assert [tick.get_text() for tick in panels[2].get_xticklabels()] == ["1", "4"]
    with pytest.raises(ValueError, match="at least one size"):
        scaling_curves({}, ["images/s"])


def test_smoothing_keeps_constants_and_has_no_lag() -> None:
    np.testing.assert_allclose(curves._smooth(np.full(7, 3.0), window=0.5), 3)
    line = np.arange(100.0)
    np.testing.assert_allclose(curves._smooth(line, window=0.1)[10:-10], line[10:-10])
    assert curves._smooth(np.array([4.0])).tolist() == [4]


def test_logs_of_killed_runs_are_read_and_damaged_ones_named(tmp_path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "loss": 2.0}\n{"step": 2, "lo')
    assert read_metrics(path) == [{"step": 1, "loss": 2.0}]
    for line in ("nonsense", "[1, 2]", '{"loss": 1}'):
        path.write_text('{"step": 1}\n' + line + "\n")
        with pytest.raises(ValueError, match=r"metrics\.jsonl, line 2"):
            read_metrics(path)
    path.write_text('{"step": 1, "test_nll": 2.0}\n')
    with pytest.raises(ValueError, match=r"metrics\.jsonl holds no losses yet"):
        loss_curves([("a", path)])
    with pytest.raises(FileNotFoundError, match="no metrics at"):
        read_metrics(tmp_path / "missing.jsonl")


def test_figures_never_touch_pyplot(tmp_path) -> None:
    sys.modules.pop("matplotlib.pyplot", None)
    loss_curves([("a", write_log(tmp_path / "a.jsonl", {"step": 1, "loss": 2.0}))])
    assert "matplotlib.pyplot" not in sys.modules
