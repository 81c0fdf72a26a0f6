"""Sources, decoding of good and hostile files, and ingestion."""

import contextlib
import io
import json
import os
import struct
import sys
import types
import zlib
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps

from anyorder.data import images as images_module
from anyorder.data.caches import splits
from anyorder.data.images import BadImage, load_image
from anyorder.data.ingest import ingest
from anyorder.data.sources import Columns, FolderSource, open_source
from anyorder.data.tables import HubSource, ParquetSource
from anyorder.stages.artifacts import Artifact

RED, GREEN, BLUE, WHITE = (255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255)
SIZE = (8, 8)


def flags() -> np.ndarray:
    """(8, 8, 3): a different colour in every quarter, so that any turn or flip shows."""
    quarters = np.array([[RED, GREEN], [BLUE, (255, 255, 0)]], np.uint8)
    return quarters.repeat(4, axis=0).repeat(4, axis=1)


def encode(image: np.ndarray | Image.Image, format: str = "PNG", **options) -> bytes:
    image = image if isinstance(image, Image.Image) else Image.fromarray(image)
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def plain(color, mode: str = "RGB", side: int = 8) -> Image.Image:
    return Image.new(mode, (side, side), color)


def raw_png(width: int, height: int, depth: int, color_type: int, rows: bytes = b"") -> bytes:
    """A PNG by hand: what Pillow cannot write, and headers that lie about the size."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", width, height, depth, color_type, 0, 0, 0)
    parts = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + parts


def noise_jpeg(**options) -> bytes:
    pixels = np.random.default_rng(0).integers(0, 256, (64, 64, 3)).astype(np.uint8)
    return encode(pixels, "JPEG", **options)


def animation(format: str) -> bytes:
    return encode(plain(RED), format, save_all=True, append_images=[plain(GREEN), plain(BLUE)])


def palette_with_alpha() -> bytes:
    image = plain(0, "P")
    image.putpalette([255, 0, 0, 0, 255, 0])
    image.info["transparency"] = 0
    return encode(image)


def ico_around(png: bytes) -> bytes:
    return struct.pack("<HHH", 0, 1, 1) + struct.pack("<BBBBHHII", 16, 16, 0, 0, 1, 32, len(png), 22) + png


def sixteen_bit(value: int) -> Image.Image:
    return Image.fromarray(np.full((8, 8), value, np.uint16))


# Files that must be decoded, with the colour they must have all over.
DECODED = {
    "one_bit.png": (encode(plain(1, "1")), WHITE),
    "grey.png": (encode(plain(77, "L")), (77, 77, 77)),
    "grey_alpha.png": (encode(plain((200, 0), "LA")), WHITE),
    "palette.png": (encode(plain(RED).convert("P")), RED),
    "palette_alpha.png": (palette_with_alpha(), WHITE),
    "rgb.png": (encode(plain((10, 20, 30))), (10, 20, 30)),
    "rgb_color_key.png": (encode(plain(RED), transparency=RED), WHITE),
    "rgba.png": (encode(plain((*RED, 128), "RGBA")), (255, 127, 127)),
    "rgba_clear.png": (encode(plain((*RED, 0), "RGBA")), WHITE),
    "grey_16.png": (encode(sixteen_bit(0x8080)), (128, 128, 128)),
    "grey_16_dark.png": (encode(sixteen_bit(1000)), (4, 4, 4)),
    "grey_16.tiff": (encode(sixteen_bit(0x4040), "TIFF"), (64, 64, 64)),
    "grey_32.tiff": (encode(plain(2**30, "I"), "TIFF"), (128, 128, 128)),
    "int_16.tiff": (encode(plain(65535, "I"), "TIFF"), WHITE),
    "float.tiff": (encode(plain(0.5, "F"), "TIFF"), (128, 128, 128)),
    "float_255.tiff": (encode(plain(200.0, "F"), "TIFF"), (200, 200, 200)),
    "float_nan.tiff": (encode(plain(float("nan"), "F"), "TIFF"), (0, 0, 0)),
    "rgb_16.png": (raw_png(8, 8, 16, 2, (b"\0" + b"\xff\xff\x80\x80\x00\x00" * 8) * 8), (255, 128, 0)),
    "grey_16.pgm": (b"P5 8 8 65535\n" + b"\x80\x80" * 64, (128, 128, 128)),
    "cmyk.jpg": (encode(plain((0, 255, 255, 0), "CMYK"), "JPEG", quality=95), (254, 0, 0)),
    "cmyk.tiff": (encode(plain((255, 0, 255, 0), "CMYK"), "TIFF"), GREEN),
    "ycbcr.tiff": (encode(plain((128, 128, 128), "YCbCr"), "TIFF"), (128, 128, 128)),
    "animated.gif": (animation("GIF"), RED),
    "animated.png": (animation("PNG"), RED),
    "animated.webp": (animation("WEBP"), (254, 0, 0)),
    "pages.tiff": (animation("TIFF"), RED),
    "plain.bmp": (encode(plain(BLUE), "BMP"), BLUE),
    "plain.tga": (encode(plain(GREEN), "TGA"), GREEN),
    "plain.ppm": (encode(plain(RED), "PPM"), RED),
    "plain.jp2": (encode(plain(RED), "JPEG2000"), RED),
    "icon.ico": (encode(plain(BLUE, side=16), "ICO", sizes=[(16, 16)]), BLUE),
    "one_pixel.png": (encode(plain((9, 8, 7), side=1)), (9, 8, 7)),
    "thread.png": (encode(Image.new("RGB", (1, 5000), RED)), RED),
    "ribbon.png": (encode(Image.new("RGB", (5000, 1), GREEN)), GREEN),
    "progressive.jpg": (encode(plain((90, 90, 90)), "JPEG", progressive=True), (90, 90, 90)),
    "png_called.jpg": (encode(plain(BLUE)), BLUE),
    "broken_exif.jpg": (encode(plain((50, 50, 50)), "JPEG", exif=b"Exif\0\0MM\0*\xff\xff"), (50, 50, 50)),
    "junk_behind.png": (encode(plain(RED)) + b"junk" * 99, RED),
}

# Files that must be skipped, with the reason.
SKIPPED = {
    "empty.jpg": (b"", "empty file"),
    "text.jpg": (b"this is no image\n", "not an image"),
    "html.png": (b"<html><body>404 Not Found</body></html>", "not an image"),
    "zeros.png": (bytes(2000), "not an image"),
    "signature.png": (b"\x89PNG\r\n\x1a\n", "not an image"),
    "jpeg_start.jpg": (noise_jpeg()[:20], "not an image"),
    "quarter.jpg": (noise_jpeg()[: len(noise_jpeg()) // 4], "damaged image"),
    "half.jpg": (noise_jpeg()[: len(noise_jpeg()) // 2], "damaged image"),
    "most.jpg": (noise_jpeg()[: -len(noise_jpeg()) // 5], "damaged image"),
    "half_progressive.jpg": (noise_jpeg(progressive=True)[:1500], "damaged image"),
    "no_pixels.png": (raw_png(8, 8, 8, 2), "damaged image"),
    "half.png": (encode(Image.effect_noise((64, 64), 50))[:1500], "damaged image"),
    "half.gif": (encode(Image.effect_noise((64, 64), 50), "GIF")[:2000], "damaged image"),
    "half.bmp": (encode(plain(RED, side=64), "BMP")[:3000], "damaged image"),
    "half.tiff": (encode(Image.effect_noise((64, 64), 50), "TIFF")[:900], "damaged image"),
    "half.webp": (encode(Image.effect_noise((64, 64), 50), "WEBP")[:500], "damaged image"),
    "bad_checksum.png": (encode(plain(RED)).replace(b"IDAT", b"IDAX"), "not an image"),
    "large.png": (raw_png(10_000, 7_001, 1, 0), "too many pixels"),
    "bomb.png": (raw_png(60_000, 60_000, 8, 2), "too many pixels"),
    "bomb.ico": (ico_around(raw_png(60_000, 60_000, 8, 2)), "too many pixels"),
}


@pytest.mark.parametrize("name", DECODED)
@pytest.mark.parametrize("fit", ["crop", "letterbox"])
def test_decoded(name, fit, tmp_path):
    data, color = DECODED[name]
    (tmp_path / name).write_bytes(data)
    for source in (data, tmp_path / name, str(tmp_path / name)):
        pixels = load_image(source, SIZE, fit, fill=WHITE)
        assert pixels.dtype == np.uint8
        assert pixels.shape == (8, 8, 3)
        if fit == "crop" or name not in ("thread.png", "ribbon.png"):
            assert abs(pixels.astype(int) - color).max() <= 1


@pytest.mark.parametrize("name", SKIPPED)
def test_skipped(name, tmp_path):
    data, kind = SKIPPED[name]
    (tmp_path / name).write_bytes(data)
    for source in (data, tmp_path / name):
        with pytest.raises(BadImage) as caught:
            load_image(source, SIZE)
        assert (str(tmp_path / name) in str(caught.value)) == (source is not data)
        assert caught.value.kind == kind
        assert str(caught.value).startswith(kind + ": ")


def test_no_file(tmp_path):
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "loop.png").symlink_to(tmp_path / "loop.png")
    (tmp_path / "broken.png").symlink_to(tmp_path / "nowhere")
    os.mkfifo(tmp_path / "pipe.png")
    for name in ("folder.png", "loop.png", "broken.png", "pipe.png", "missing.png", "x" * 300 + ".png"):
        with pytest.raises(BadImage, match="unreadable file"):
            load_image(tmp_path / name, SIZE)


def test_permission_denied(tmp_path, monkeypatch):
    (tmp_path / "secret.png").write_bytes(encode(plain(RED)))

    def refuse(path, **_):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Image, "open", refuse)
    with pytest.raises(BadImage, match=r"unreadable file: .*Permission denied"):
        load_image(tmp_path / "secret.png", SIZE)


STORED = {
    1: lambda u: u,
    2: lambda u: u[:, ::-1],
    3: lambda u: u[::-1, ::-1],
    4: lambda u: u[::-1],
    5: lambda u: u.swapaxes(0, 1),
    6: lambda u: np.rot90(u, 1),
    7: lambda u: np.rot90(u, 2).swapaxes(0, 1),
    8: lambda u: np.rot90(u, -1),
}
"""How a camera stores an upright picture under each EXIF orientation."""


@pytest.mark.parametrize("format", ["PNG", "JPEG", "TIFF", "WEBP"])
@pytest.mark.parametrize("orientation", STORED)
def test_exif_orientation(orientation, format):
    upright = np.concatenate([flags().repeat(4, 0).repeat(4, 1), np.full((32, 16, 3), 128, np.uint8)], axis=1)
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"JPEG": {"quality": 100, "subsampling": 0}, "WEBP": {"lossless": True}}.get(format, {})
    data = encode(np.ascontiguousarray(STORED[orientation](upright)), format, exif=exif, **options)
    assert abs(load_image(data, (32, 48)).astype(int) - upright).max() <= 3


def test_alpha_is_composited_on_fill():
    half_red = encode(plain((*RED, 128), "RGBA"))
    np.testing.assert_allclose(load_image(half_red, SIZE, fill=BLUE)[3, 3], (128, 0, 127), atol=1)


def test_max_pixels_is_checked_before_decoding(monkeypatch):
    data = encode(plain(RED, side=20))
    assert load_image(data, SIZE, max_pixels=400).shape == (8, 8, 3)
    monkeypatch.setattr(images_module, "_upright", lambda *_: pytest.fail("decoded"))
    with pytest.raises(BadImage, match=r"too many pixels: 20 x 20 pixels, allowed are 399 \(max_pixels\)"):
        load_image(data, SIZE, max_pixels=399)


def test_crop_keeps_the_middle():
    thirds = np.concatenate([np.full((20, 20, 3), c, np.uint8) for c in (RED, GREEN, BLUE)], axis=1)
    for image in (thirds, thirds.swapaxes(0, 1).copy()):
        assert (load_image(encode(image), SIZE)[3:-3, 3:-3] == GREEN).all(), (
            "only edges may see beyond the cut"
        )


def test_letterbox_shows_everything_and_fills_the_rest():
    thirds = np.concatenate([np.full((20, 20, 3), c, np.uint8) for c in (RED, GREEN, BLUE)], axis=1)
    boxed = load_image(encode(thirds), (12, 12), "letterbox", fill=(1, 2, 3))
    assert (boxed[:4] == (1, 2, 3)).all()
    assert (boxed[8:] == (1, 2, 3)).all()
    for column, color in ((0, RED), (6, GREEN), (11, BLUE)):
        np.testing.assert_allclose(boxed[4:8, column], np.tile(color, (4, 1)), atol=25)
    thread = load_image(DECODED["thread.png"][0], (8, 9), "letterbox", fill=(1, 2, 3))
    assert (thread[:, 4] == RED).all()
    assert (np.delete(thread, 4, axis=1) == (1, 2, 3)).all()


def test_resampling_is_antialiased():
    checkers = np.indices((256, 256)).sum(0) % 2 * 255
    grey = load_image(encode(checkers.astype(np.uint8)), (16, 16))
    assert abs(grey.astype(int) - 127.5).max() < 6


def test_large_jpeg_uses_the_fast_path_without_visible_loss():
    y, x = np.mgrid[0:960, 0:1280]
    waves = np.stack([128 + 100 * np.sin(x / 90 + c) * np.cos(y / 70) for c in range(3)], axis=2).astype(
        np.uint8
    )
    expected = np.asarray(ImageOps.fit(Image.fromarray(waves), (32, 32), Image.Resampling.LANCZOS))
    loaded = load_image(encode(waves, "JPEG", quality=95), (32, 32))
    assert abs(loaded.astype(int) - expected).mean() < 2


@given(
    source=st.tuples(st.integers(1, 40), st.integers(1, 40)),
    size=st.tuples(st.integers(1, 40), st.integers(1, 40)),
    color=st.tuples(*[st.integers(0, 255)] * 3),
    fit=st.sampled_from(["crop", "letterbox"]),
)
@settings(max_examples=60, deadline=None, derandomize=True)
def test_constant_images_stay_constant(source, size, color, fit):
    data = encode(Image.new("RGB", source, color))
    assert (load_image(data, size, fit, fill=color) == np.array(color)).all()


@given(
    st.sampled_from(["PNG", "JPEG", "GIF", "TIFF", "WEBP", "BMP"]),
    st.lists(st.tuples(st.floats(0, 0.999), st.integers(0, 255)), min_size=1, max_size=8),
)
@settings(max_examples=120, deadline=None, derandomize=True)
@pytest.mark.filterwarnings("ignore")
def test_flipped_bytes_never_raise_anything_else(format, flips):
    data = bytearray(encode(flags(), format))
    for place, value in flips:
        data[int(place * len(data))] = value
    with contextlib.suppress(BadImage):
        assert load_image(bytes(data), SIZE, max_pixels=10**6).shape == (8, 8, 3)


@pytest.mark.parametrize("size", [(0, 8), (8, -1), (8,), (8, 8, 3)])
def test_size_must_be_positive(size, tmp_path):
    with pytest.raises(ValueError, match="size must be a positive") as caught:
        load_image(encode(flags()), size)
    assert not isinstance(caught.value, BadImage)
    with pytest.raises(ValueError, match="size must be a positive"):
        ingest(FolderSource(tmp_path), tmp_path / "out", size)
    assert not (tmp_path / "out").exists()


def test_fit_must_be_known():
    with pytest.raises(ValueError, match="fit must be 'crop' or 'letterbox', got 'stretch'"):
        load_image(encode(flags()), SIZE, "stretch")


# --- folders ---


def fill_folder(root: Path, files: dict[str, bytes]) -> Path:
    for name, data in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(data)
    return root


def test_hostile_folder_is_ingested(tmp_path):
    root = fill_folder(tmp_path / "in", {name: data for name, (data, _) in (DECODED | SKIPPED).items()})
    (root / "folder.png").mkdir()
    (root / "loop.png").symlink_to(root / "loop.png")
    (root / "circle").symlink_to(root)
    fill_folder(root, {"notes.txt": b"no image", os.fsdecode(b"caf\xe9.png"): encode(plain(RED))})
    facts = ingest(open_source(root, test_fraction=0), tmp_path / "out", SIZE)
    good = sorted([*DECODED, os.fsdecode(b"caf\xe9.png")])
    assert facts["classes"] == []
    assert facts["counts"] == {"train": len(good), "test": 0}
    expected = {name: kind for name, (_, kind) in SKIPPED.items()} | {"loop.png": "unreadable file"}
    skipped = facts["skipped"]["train"]
    assert {s["name"]: s["reason"].split(":")[0] for s in skipped["first"]} == expected
    assert skipped["reasons"] == {k: list(expected.values()).count(k) for k in expected.values()}
    assert len(np.load(tmp_path / "out/test.images.npy")) == 0
    for pixels, name in zip(np.load(tmp_path / "out/train.images.npy"), good, strict=True):
        assert abs(pixels.astype(int) - DECODED.get(name, (b"", RED))[1]).max() <= 1


def test_classes_are_first_level_folders(tmp_path):
    red, blue = encode(plain(RED)), encode(plain(BLUE))
    fill_folder(tmp_path / "in", {"b/1.png": red, "a/deep/er/2.PNG": blue, "a/1.png": blue, "loose.png": red})
    facts = ingest(FolderSource(tmp_path / "in", 0), tmp_path / "out", SIZE)
    assert facts["classes"] == ["a", "b"]
    assert np.load(tmp_path / "out/train.labels.npy").tolist() == [0, 0, 1]
    assert np.load(tmp_path / "out/train.images.npy")[:, 0, 0].tolist() == [list(BLUE), list(BLUE), list(RED)]
    assert facts["skipped"]["train"]["reasons"] == {"no label": 1}


@pytest.mark.parametrize("test_name", ["test", "validation", "val"])
def test_split_folders(tmp_path, test_name):
    png = encode(plain(RED))
    names = ["train/cat/1.png", "train/dog/1.png", f"{test_name}/dog/1.png", f"{test_name}/emu/1.png"]
    fill_folder(tmp_path / "in", dict.fromkeys(names, png))
    facts = ingest(open_source(tmp_path / "in"), tmp_path / "out", SIZE)
    assert facts["classes"] == ["cat", "dog"]
    assert facts["counts"] == {"train": 2, "test": 1}
    assert facts["skipped"]["test"]["reasons"] == {"unknown label": 1}
    assert "'emu' does not occur in the train split" in facts["skipped"]["test"]["first"][0]["reason"]
    assert np.load(tmp_path / "out/test.labels.npy").tolist() == [1]


def test_linked_class_folder_is_followed(tmp_path):
    fill_folder(tmp_path / "elsewhere", {"1.png": encode(plain(RED))})
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "cat").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere" / "up").symlink_to(tmp_path / "in")
    source = FolderSource(tmp_path / "in", 0)
    assert [(item.label, item.name) for item in source.items["train"]] == [("cat", "cat/1.png")]


def test_split_by_hash_is_stable_and_complete(tmp_path):
    names = [f"{i}.png" for i in range(200)]
    fill_folder(tmp_path, dict.fromkeys(names, encode(plain(RED))))
    splits = {s: {i.name for i in FolderSource(tmp_path, 0.2).items[s]} for s in ("train", "test")}
    assert splits["train"] | splits["test"] == set(names)
    assert not splits["train"] & splits["test"]
    assert 20 < len(splits["test"]) < 60
    for name in names[:150]:
        (tmp_path / name).unlink()
    rest = {i.name for i in FolderSource(tmp_path, 0.2).items["test"]}
    assert rest == splits["test"] & set(names[150:])
    larger = {i.name for i in FolderSource(tmp_path, 0.5).items["test"]}
    assert rest < larger


def test_limits_spread_over_all_classes(tmp_path):
    files = {
        f"{s}/{c}/{i}.png": encode(plain(RED)) for s in ("train", "test") for c in "abcd" for i in range(5)
    }
    source = FolderSource(fill_folder(tmp_path / "in", files))
    facts = ingest(source, tmp_path / "out", SIZE, max_train=8, max_test=100)
    assert facts["counts"] == {"train": 8, "test": 20}
    assert np.bincount(np.load(tmp_path / "out/train.labels.npy")).tolist() == [2, 2, 2, 2]


def colours_in(folder, split):
    return {tuple(image[0, 0].tolist()) for image in np.load(folder / f"{split}.images.npy")}


def test_validation_images_are_cut_from_training(tmp_path):
    files = {
        f"train/{c}/{i}.png": encode(plain((i, 0, k)))
        for k, (c, n) in enumerate({"a": 20, "b": 8, "c": 4}.items()) for i in range(n)
    }  # fmt: skip
    source = FolderSource(fill_folder(tmp_path / "in", files | {"test/a/1.png": encode(plain(RED))}))
    whole = ingest(source, tmp_path / "whole", SIZE)
    cut = ingest(source, tmp_path / "cut", SIZE, max_validation=8)
    assert (whole["counts"], cut["counts"]) == (
        {"train": 32, "test": 1}, {"train": 24, "test": 1, "validation": 8}
    )  # fmt: skip
    assert np.bincount(np.load(tmp_path / "cut/validation.labels.npy")).tolist() == [5, 2, 1]
    held, train = (colours_in(tmp_path / "cut", split) for split in ("validation", "train"))
    assert not held & train
    assert held | train == colours_in(tmp_path / "whole", "train")
    assert held != {(i, 0, k) for k, n in enumerate((5, 2, 1)) for i in range(n)}, "names decide"
    ingest(source, tmp_path / "few", SIZE, max_validation=8, max_train=6)
    assert colours_in(tmp_path / "few", "validation") == held
    assert colours_in(tmp_path / "few", "train") < train
    assert (splits(tmp_path / "whole"), splits(tmp_path / "cut")) == (
        ["train", "test"], ["train", "validation", "test"]
    )  # fmt: skip
    for wrong in (-1, 32):
        with pytest.raises(ValueError, match=f"below 32 training images, got {wrong}: choose a smaller"):
            ingest(source, tmp_path / "wrong", SIZE, max_validation=wrong)


def test_open_source_refuses(tmp_path, monkeypatch):
    with pytest.raises(FileNotFoundError, match="no such file or folder"):
        open_source(tmp_path / "missing")
    with pytest.raises(ValueError, match="test_fraction must be at least 0 and below 1, got 1"):
        open_source(tmp_path, test_fraction=1)
    with pytest.raises(ValueError, match="its classes are its subfolders; leave out image, label"):
        open_source(tmp_path, Columns("kind"))
    with pytest.raises(FileNotFoundError, match="holds no images"):
        open_source(tmp_path).classes()
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ValueError, match=r"user/name is no local path.*pip install 'anyorder\[data\]'"):
        open_source("user/name").classes()


# --- resuming ---


def test_finished_split_is_not_decoded_again(tmp_path, monkeypatch):
    files = {f"{s}/{i}.png": encode(plain(RED)) for s in ("train", "test") for i in range(3)}
    source = FolderSource(fill_folder(tmp_path / "in", files))
    decoded = []

    def load(image, *args, dying: bool, **options):
        decoded.append(image.parent.name)
        if dying and image.parent.name == "test":
            raise RuntimeError("killed")
        return load_image(image, *args, **options)

    monkeypatch.setattr(images_module, "load_image", lambda *a, **k: load(*a, dying=True, **k))
    with pytest.raises(RuntimeError, match="killed"):
        ingest(source, tmp_path / "out", SIZE)
    assert "train" in decoded
    decoded.clear()
    monkeypatch.setattr(images_module, "load_image", lambda *a, **k: load(*a, dying=False, **k))
    assert ingest(source, tmp_path / "out", SIZE)["counts"] == {"train": 3, "test": 3}
    assert decoded == ["test"] * 3
    decoded.clear()
    ingest(source, tmp_path / "out", (4, 4))
    assert sorted(decoded) == ["test"] * 3 + ["train"] * 3
    assert np.load(tmp_path / "out/train.images.npy").shape == (3, 4, 4, 3)


def test_rows_of_a_killed_split_are_dropped(tmp_path):
    source = FolderSource(fill_folder(tmp_path / "in", {f"{i}.png": encode(plain(RED)) for i in range(3)}), 0)
    (tmp_path / "out").mkdir()
    (tmp_path / "out/train.images.npy.partial").write_bytes(bytes(128 + 2 * 192))
    (tmp_path / "out/train.labels.npy.partial").write_bytes(bytes(128 + 2 * 8))
    assert ingest(source, tmp_path / "out", SIZE)["counts"]["train"] == 3
    assert (np.load(tmp_path / "out/train.images.npy") == RED).all()


def test_new_configuration_of_an_artifact_decodes_again(tmp_path):
    source = FolderSource(fill_folder(tmp_path / "in", {"1.png": encode(plain(RED))}), 0)
    for fill in (1, 2):
        artifact = Artifact(tmp_path / "out", "data", {"fill": fill}, {}, overwrite=True)
        assert not list((tmp_path / "out").glob("*train.partial"))
        artifact.finish(**ingest(source, tmp_path / "out", SIZE, fill=(fill, fill, fill)))
    assert not any(
        "partial" in name for name in json.loads((tmp_path / "out/manifest.json").read_text())["files"]
    )


def test_limits_must_make_sense(tmp_path):
    source = FolderSource(fill_folder(tmp_path / "in", {"1.png": encode(plain(RED))}), 0)
    for limits in ({"max_train": -1}, {"max_test": -1}):
        with pytest.raises(ValueError, match=r"max_train and max_test must not be negative, got .*-1"):
            ingest(source, tmp_path / "out", SIZE, **limits)
    with pytest.raises(ValueError, match="none of 0 train images could be used"):
        ingest(source, tmp_path / "out", SIZE, max_train=0)


def test_nothing_decodable_is_an_error(tmp_path):
    fill_folder(tmp_path / "in", {f"{i}.jpg": b"text" for i in range(9)})
    with pytest.raises(ValueError, match=r"none of 9 train images could be used: 0\.jpg: not an image"):
        ingest(FolderSource(tmp_path / "in", 0), tmp_path / "out", SIZE)
    fill_folder(tmp_path / "split", {"train/1.png": encode(plain(RED)), "test/1.png": b"text"})
    with pytest.raises(ValueError, match="; mend them, or choose others by test_fraction or max_test"):
        ingest(FolderSource(tmp_path / "split"), tmp_path / "out", SIZE)


def test_classes_without_a_training_image_are_named(tmp_path, caplog):
    picture = encode(plain(RED))
    fill_folder(tmp_path / "in", {"a/1.png": picture, "a/2.png": picture, "b/1.png": b"text"})
    facts = ingest(FolderSource(tmp_path / "in", 0), tmp_path / "out", SIZE)
    assert (facts["classes"], facts["classes_without_images"]) == (["a", "b"], ["b"])
    assert "1 classes have no training image, and will not be learnt: b" in caplog.text
    (tmp_path / "in/b/2.png").write_bytes(picture)
    assert "classes_without_images" not in ingest(FolderSource(tmp_path / "in", 0), tmp_path / "out", SIZE)


def test_captions_that_are_asked_for_exist(tmp_path):
    columns = Columns(caption="txt")
    fill_folder(tmp_path / "in", {f"{i}.png": encode(plain(RED)) for i in range(3)})
    with pytest.raises(ValueError, match="captions=txt: none of the training images has one; give them"):
        ingest(FolderSource(tmp_path / "in", 0, columns), tmp_path / "out", SIZE)
    (tmp_path / "in/1.txt").write_text("a red square")
    assert ingest(FolderSource(tmp_path / "in", 0, columns), tmp_path / "out", SIZE)["captions"] == 1
    table = write_parquet(tmp_path / "a.parquet", [encode(plain(RED))] * 3, text=[None, "", None])
    with pytest.raises(ValueError, match="captions=text: none of the training images has one"):
        ingest(open_source(table, Columns(caption="text"), 0), tmp_path / "table", SIZE)


# --- parquet ---


def write_parquet(path: Path, images, features=None, **columns) -> Path:
    structs = [i if isinstance(i, dict) or i is None else {"bytes": i, "path": None} for i in images]
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    table = pa.table({"id": range(len(images)), "picture": pa.array(structs, kind), **columns})
    if features:
        table = table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, path, row_group_size=2)
    return path


PNGS = [encode(plain(c)) for c in (RED, GREEN, BLUE, WHITE)]


def test_parquet_folder(tmp_path):
    write_parquet(tmp_path / "data/train-00000-of-00002.parquet", PNGS[:2], kind=["dog", "cat"])
    write_parquet(tmp_path / "data/train-00001-of-00002.parquet", [b"junk", None, PNGS[2]], kind=["cat"] * 3)
    write_parquet(tmp_path / "data/test-00000-of-00001.parquet", PNGS[2:], kind=["cat", None])
    facts = ingest(open_source(tmp_path, Columns("kind")), tmp_path / "out", SIZE)
    assert facts["classes"] == ["cat", "dog"]
    assert facts["counts"] == {"train": 3, "test": 1}
    assert facts["skipped"]["train"] == {
        "reasons": {"not an image": 1, "empty file": 1},
        "first": [
            {
                "name": "data/train-00001-of-00002.parquet#0",
                "reason": "not an image: no decoder knows its first bytes",
            },
            {"name": "data/train-00001-of-00002.parquet#1", "reason": "empty file: zero bytes"},
        ],
    }
    assert facts["skipped"]["test"]["reasons"] == {"no label": 1}
    assert np.load(tmp_path / "out/train.labels.npy").tolist() == [1, 0, 0]
    assert np.load(tmp_path / "out/train.images.npy")[:, 0, 0].tolist() == [
        list(RED),
        list(GREEN),
        list(BLUE),
    ]


def test_parquet_file_without_labels_is_split_by_hash(tmp_path):
    path = write_parquet(tmp_path / "all.parquet", PNGS * 25)
    source = open_source(path, test_fraction=0.3)
    names = {s: [i.name for i in source.items[s]] for s in ("train", "test")}
    assert source.classes() == []
    assert len(names["train"]) == source.count("train") > 50
    assert len(names["test"]) == source.count("test") > 15
    assert sorted(names["train"] + names["test"]) == sorted(f"all.parquet#{i}" for i in range(100))


def test_parquet_class_labels_and_outside_files(tmp_path):
    (tmp_path / "red.png").write_bytes(PNGS[0])
    features = {"picture": {"_type": "Image"}, "label": {"_type": "ClassLabel", "names": ["zebra", "ant"]}}
    rows = [{"bytes": None, "path": "red.png"}, PNGS[1], PNGS[2]]
    path = write_parquet(tmp_path / "x.parquet", rows, features, label=[0, 1, -1])
    facts = ingest(ParquetSource(path, Columns("label"), 0), tmp_path / "out", SIZE)
    assert facts["classes"] == ["zebra", "ant"]
    assert facts["skipped"]["train"]["reasons"] == {"no label": 1}
    assert np.load(tmp_path / "out/train.labels.npy").tolist() == [0, 1]
    assert (np.load(tmp_path / "out/train.images.npy")[0] == RED).all()


def test_parquet_errors(tmp_path):
    path = write_parquet(tmp_path / "a.parquet", PNGS, number=[1, 2, 3, 4])
    assert ParquetSource(path, Columns("number"), 0).classes() == ["1", "2", "3", "4"]
    with pytest.raises(ValueError, match=r"a\.parquet has no column 'kind'; it has id, picture, number"):
        ParquetSource(path, Columns("kind")).classes()
    pq.write_table(pa.table({"x": [1]}), tmp_path / "b.parquet")
    with pytest.raises(ValueError, match=r"b\.parquet has no image column .*it has x"):
        ParquetSource(tmp_path / "b.parquet").count("train")
    (tmp_path / "c.parquet").write_bytes(path.read_bytes()[:100])
    with pytest.raises(ValueError, match=r"c\.parquet is not a sound parquet file"):
        ParquetSource(tmp_path / "c.parquet").count("train")


# --- Hugging Face ---


class Feature:
    def __init__(self, decode=True, names=None):
        self.decode, self.names = decode, names


class FakeTable:
    """The few methods of `datasets.Dataset` that are used, on plain rows."""

    def __init__(self, rows, features):
        self.rows, self.features, self.column_names = rows, features, list(features)

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, i):
        assert all(type(f).__name__ != "Image" or not f.decode for f in self.features.values())
        return dict(self.rows[i])

    def __iter__(self):
        return map(self.__getitem__, range(len(self)))

    def cast_column(self, name, feature):
        return FakeTable(self.rows, {**self.features, name: feature})

    def select_columns(self, names):
        rows = [{k: r[k] for k in names} for r in self.rows]
        return FakeTable(rows, {k: self.features[k] for k in names})


@pytest.fixture
def hub(monkeypatch):
    """Put a fake `datasets` in place; returns the dictionary of its data sets."""
    image_type = type("Image", (Feature,), {})
    module = types.ModuleType("datasets")
    sets = {}
    module.Image = image_type
    module.load_dataset = sets.__getitem__
    monkeypatch.setitem(sys.modules, "datasets", module)

    def table(*rows):
        dicts = [{"img": {"bytes": b, "path": None}, "label": label} for b, label in rows]
        return FakeTable(dicts, {"img": image_type(), "label": Feature(names=["zebra", "ant"])})

    sets["user/both"] = {
        "train": table((PNGS[0], 0), (PNGS[1], 1), (PNGS[2], -1)),
        "validation": table((PNGS[3], 1)),
    }
    sets["user/one"] = {"all_of_it": table(*[(PNGS[i % 4], i % 2) for i in range(60)])}
    sets["user/text"] = {"train": FakeTable([{"text": "x"}], {"text": Feature()})}
    return sets


def test_hub_source(hub, tmp_path):
    facts = ingest(open_source("user/both", Columns("label")), tmp_path / "out", SIZE)
    assert facts["classes"] == ["zebra", "ant"]
    assert facts["counts"] == {"train": 2, "test": 1}
    assert facts["skipped"]["train"]["reasons"] == {"no label": 1}
    assert np.load(tmp_path / "out/train.labels.npy").tolist() == [0, 1]
    assert np.load(tmp_path / "out/train.images.npy")[:, 0, 0].tolist() == [list(RED), list(GREEN)]
    ingest(open_source("user/both", Columns("label")), tmp_path / "names", SIZE, cache=False)
    assert np.load(tmp_path / "names/train.names.npy").tolist() == [b"train#0", b"train#1"]
    assert not (tmp_path / "names/train.images.npy").exists()


def test_hub_columns_as_attributes_and_captions(hub):
    source = open_source("user/both", Columns(caption="label", attributes=("label",)))
    assert source.classes() == []
    assert source.attributes() == {"label": ["zebra", "ant"]}
    assert [(item.attributes, item.caption) for item in source.items["train"]] == [
        (("zebra",), "zebra"), (("ant",), "ant"), ((None,), None)
    ]  # fmt: skip
    with pytest.raises(ValueError, match="has no column 'text'"):
        open_source("user/both", Columns(caption="text")).classes()


def test_hub_source_without_test_split_or_labels(hub):
    source = HubSource("user/one", test_fraction=0.25)
    assert source.classes() == []
    assert source.count("train") + source.count("test") == 60
    assert 5 < source.count("test") == len(source.items["test"]) < 25


def test_hub_source_errors(hub):
    with pytest.raises(ValueError, match=r"user/both \(train\) has no column 'kind'; it has img, label"):
        HubSource("user/both", Columns("kind")).classes()
    with pytest.raises(ValueError, match="has no Image column; it has text"):
        HubSource("user/text").count("train")


# --- the real thing ---


@pytest.mark.data
def test_fashion_products(tmp_path):
    default = Path(__file__).parents[1] / "../shared/data/fashion-products"
    folder = Path(os.environ.get("ANYORDER_FASHION", default))
    if not folder.is_dir():
        pytest.skip(f"Fashion Products not found at {folder}; set ANYORDER_FASHION to its folder")
    source = open_source(folder, Columns("masterCategory"))
    assert (source.count("train"), source.count("test")) == (38_072, 4_000)
    facts = ingest(source, tmp_path, (32, 24), max_train=200, max_test=50)
    assert len(facts["classes"]) == 7
    assert facts["counts"] == {"train": 200, "test": 50}
    images = np.load(tmp_path / "train.images.npy")
    assert images.shape == (200, 32, 24, 3)
    assert images[:, 0].mean() > 230, "product photographs have a white background"
    assert images.std(axis=(1, 2, 3)).min() > 5
