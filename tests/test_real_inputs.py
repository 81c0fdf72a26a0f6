"""Inputs as people have them: every one gives the right value or is refused in one line."""

import io
import json
import logging
import os
import sys
import types
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image, ImageCms, ImageOps

from anyorder.cli import main as cli
from anyorder.contracts import Grid
from anyorder.data import listing
from anyorder.data.classes import display_name, in_sequence, map_classes
from anyorder.data.images import BadImage, load_image, load_mask
from anyorder.data.ingest import ingest
from anyorder.data.sources import Columns, FolderSource, open_source
from anyorder.data.tables import HubSource, ParquetSource
from anyorder.files import read_json, write_text
from anyorder.inference.figures import mean_rank_per_class, prompt_grid
from anyorder.stages.data import DataStage
from anyorder.stages.execute import split

SIZE = (8, 8)
RED, WHITE, BLACK = (255, 0, 0), (255, 255, 255), (0, 0, 0)


def encoded(image: Image.Image, format: str = "PNG", **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


PNG = encoded(Image.new("RGB", (8, 8), RED))


def fill(root: Path, *names: str | bytes, data: bytes = PNG) -> Path:
    for name in names:
        path = root / os.fsdecode(name)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    return root


# --- images: one reader for files, bytes, Pillow images and arrays ---


def plain(mode: str, color) -> Image.Image:
    return Image.new(mode, (8, 8), color)


def marked(mode: str, color, **info) -> Image.Image:
    image = plain(mode, color)
    image.info |= info
    return image


def palette(transparency=None) -> Image.Image:
    image = plain("P", 1)
    image.putpalette([0, 0, 0, 255, 0, 0])
    return image if transparency is None else marked_palette(image, transparency)


def marked_palette(image: Image.Image, transparency) -> Image.Image:
    image.info["transparency"] = transparency
    return image


def samples(value, dtype) -> Image.Image:
    return Image.fromarray(np.full((8, 8), value, dtype))


def unnamed_profile() -> bytes:
    """sRGB under another name."""
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    return profile.replace("sRGB".encode("utf-16-be"), "xRGB".encode("utf-16-be"))


IMAGES = {
    "1": (plain("1", 1), WHITE),
    "L": (plain("L", 77), (77, 77, 77)),
    "LA, transparent": (plain("LA", (9, 0)), WHITE),
    "P": (palette(), RED),
    "P, transparent index": (palette(1), WHITE),
    "P, table of alphas": (palette(b"\xff\x00"), WHITE),
    "RGB": (plain("RGB", (1, 2, 3)), (1, 2, 3)),
    "RGB, transparent colour": (marked("RGB", RED, transparency=RED), WHITE),
    "RGBA, opaque": (plain("RGBA", (*RED, 255)), RED),
    "RGBA, hidden colour": (plain("RGBA", (*RED, 0)), WHITE),
    "RGBA, half": (plain("RGBA", (*RED, 128)), (255, 127, 127)),
    "RGBa": (plain("RGBA", (*RED, 255)).convert("RGBa"), RED),
    "CMYK": (plain("CMYK", (0, 255, 255, 0)), RED),
    "YCbCr": (plain("YCbCr", (128, 128, 128)), (128, 128, 128)),
    "HSV": (plain("HSV", (0, 255, 255)), RED),
    "LAB": (plain("LAB", (255, 128, 128)), WHITE),
    "I;16": (samples(0x8080, np.uint16), (128, 128, 128)),
    "I;16, transparent": (marked_palette(samples(7, np.uint16), 7), WHITE),
    "I of 16 bits": (plain("I", 65535), WHITE),
    "I of 31 bits": (plain("I", 2**30), (128, 128, 128)),
    "F to 1": (plain("F", 0.5), (128, 128, 128)),
    "F to 255": (plain("F", 100.0), (100, 100, 100)),
    "F, not a number": (plain("F", float("nan")), BLACK),
    "profile that is broken": (marked("RGB", RED, icc_profile=b"junk"), RED),
    "profile": (marked("RGB", (200, 100, 50), icc_profile=unnamed_profile()), (200, 100, 50)),
    "array, grey": (np.full((8, 8), 9, np.uint8), (9, 9, 9)),
    "array, one channel": (np.full((8, 8, 1), 9, np.uint8), (9, 9, 9)),
    "array, RGBA": (np.full((8, 8, 4), (255, 0, 0, 0), np.uint8), WHITE),
    "array, bool": (np.ones((8, 8), bool), WHITE),
    "array, 16 bits": (np.full((8, 8, 3), 0x8080, np.uint16), (128, 128, 128)),
    "array, float": (np.full((8, 8, 3), 0.5), (128, 128, 128)),
    "array, float16": (np.full((8, 8), 1.0, np.float16), WHITE),
}


@pytest.mark.parametrize("name", IMAGES)
def test_images(name):
    image, color = IMAGES[name]
    for size in (None, SIZE, (3, 5)):
        pixels = load_image(image, size)
        assert (pixels.dtype, pixels.shape) == (np.uint8, (*(size or SIZE), 3))
        assert abs(pixels.astype(int) - color).max() <= 1


FILES = {
    "16-bit grey with a transparent value": (
        encoded(samples(1000, np.uint16), transparency=1000), WHITE
    ),
    "float TIFF": (encoded(plain("F", 0.25), "TIFF"), (64, 64, 64)),
    "two images of a phone": (
        encoded(plain("RGB", RED), "MPO", save_all=True, append_images=[plain("RGB", 0)]), (254, 0, 0)
    ),
    "SGI": (encoded(plain("RGB", RED), "SGI"), RED),
    "PCX": (encoded(plain("RGB", RED), "PCX"), RED),
}  # fmt: skip


@pytest.mark.parametrize("name", FILES)
def test_files(name, tmp_path):
    data, color = FILES[name]
    (tmp_path / "x").write_bytes(data)
    for source in (data, tmp_path / "x", str(tmp_path / "x"), Image.open(io.BytesIO(data))):
        assert abs(load_image(source).astype(int) - color).max() <= 1


def test_profiles_are_followed():
    """Primaries that change places: what a file calls red is green."""
    profile = unnamed_profile().replace(b"rXYZ", b"tmpX").replace(b"gXYZ", b"rXYZ").replace(b"tmpX", b"gXYZ")
    for format in ("PNG", "JPEG", "TIFF"):
        data = encoded(plain("RGB", RED), format, icc_profile=profile)
        assert np.abs(load_image(data)[4, 4].astype(int) - (0, 255, 0)).max() <= 3


@pytest.mark.parametrize("orientation", range(1, 9))
def test_orientation_of_pillow_images_files_and_masks(orientation, tmp_path):
    corner = np.zeros((8, 16, 3), np.uint8)
    corner[:4, :8] = 255
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encoded(Image.fromarray(corner), exif=exif)
    upright = np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(data))))
    (tmp_path / "x.png").write_bytes(data)
    for source in (data, tmp_path / "x.png", Image.open(io.BytesIO(data))):
        assert (load_image(source) == upright).all()
        assert (load_mask(source) == (upright[..., 0] > 0)).all()


REFUSED_ARRAYS = {
    "of whole numbers": np.zeros((8, 8), np.int64),
    "channels first": np.zeros((3, 8, 8), np.uint8),
    "two channels": np.zeros((8, 8, 2), np.uint8),
    "a batch": np.zeros((1, 8, 8, 3), np.uint8),
    "empty": np.zeros((0, 8, 3), np.uint8),
    "complex": np.zeros((8, 8), complex),
}


@pytest.mark.parametrize("name", REFUSED_ARRAYS)
def test_refused_arrays(name):
    with pytest.raises(BadImage, match=r"not an image: arrays must be .*got .* of shape"):
        load_image(REFUSED_ARRAYS[name])


def test_a_users_image_stays_as_it_is():
    image = Image.open(io.BytesIO(encoded(Image.new("RGB", (600, 400), RED), "JPEG")))
    assert load_image(image, SIZE).shape == (8, 8, 3)
    assert (image.size, image.mode) == ((600, 400), "RGB")
    image.getpixel((0, 0))
    pixels = load_image(image)
    pixels[:] = 0  # a copy that may be written to
    assert image.getpixel((0, 0)) != BLACK


EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\nshowpage\n%%EOF\n"


@pytest.mark.parametrize("read", [load_image, load_mask])
def test_hostile_files_are_refused_at_once_with_their_path(read, tmp_path, monkeypatch):
    monkeypatch.setattr("anyorder.data.images.MAX_BYTES", 9000)
    fill(tmp_path, "script.eps", data=EPS)
    fill(tmp_path, "script.png", data=EPS)
    fill(tmp_path, "bytes.png", data=bytes(9001))
    fill(tmp_path, "pixels.png", data=encoded(Image.new("1", (9000, 8000))))
    os.mkfifo(tmp_path / "pipe.png")
    expected = {
        "script.eps": "not an image", "script.png": "not an image", "bytes.png": "too many bytes",
        "pixels.png": "too many pixels", "pipe.png": "unreadable file", "none.png": "unreadable file",
    }  # fmt: skip
    for name, kind in expected.items():
        with pytest.raises(BadImage, match=f"{kind}: {tmp_path}/{name}: "):
            read(tmp_path / name)
    with pytest.raises(BadImage, match="unreadable file: /dev/zero: no regular file"):
        read("/dev/zero")
    with pytest.raises(BadImage, match="EPS files are not read"):
        read(Image.open(io.BytesIO(EPS)))


def test_paths_may_begin_with_a_tilde(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    fill(tmp_path, "x.png", "d/cat/x.png")
    assert (load_image("~/x.png") == RED).all()
    assert open_source("~/d").classes() == ["cat"]


def test_names_that_begin_with_a_tilde_are_no_home_folder(tmp_path, monkeypatch):
    """`~` is a common name of a folder for scraps, and of a user's home: its images are others."""
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    fill(tmp_path, "data/~/x.png", "data/~/y.png")
    fill(tmp_path / "home", "x.png", data=b"another")
    for where in ("./data/~", "data"):
        source = open_source(where)
        assert all((load_image(source.image(item.name)) == RED).all() for item in source.items["train"])
    monkeypatch.chdir(tmp_path / "data")
    for where in (".", "./~"):
        source = open_source(where)
        images = [source.image(item.name) for split in ("train", "test") for item in source.items[split]]
        assert len(images) == 2
        assert all((load_image(image) == RED).all() for image in images)


HALF = np.zeros((8, 8), np.uint8)
HALF[:4] = 255
TRANSPARENT = np.dstack([np.full((8, 8, 3), 255, np.uint8), HALF])
MASKS = {
    "L": Image.fromarray(HALF),
    "1": Image.fromarray(HALF).convert("1"),
    "RGB": Image.fromarray(HALF).convert("RGB"),
    "white, transparent where kept": Image.fromarray(TRANSPARENT),
    "16 bits": Image.fromarray(HALF.astype(np.uint16) * 257),
    "float": Image.fromarray(HALF.astype(np.float32) / 255),
    "0 and 1": Image.fromarray(HALF // 255),
    "PNG": encoded(Image.fromarray(HALF)),
    "16-bit PNG": encoded(Image.fromarray(HALF.astype(np.uint16) * 257)),
    "array of bool": HALF > 0,
    "array of uint8": HALF,
    "array of 0 and 1": HALF // 255,
    "array of uint16": HALF.astype(np.uint16) * 257,
    "array of float": HALF / 255,
    "array of RGBA": TRANSPARENT,
}


@pytest.mark.parametrize("name", MASKS)
def test_masks(name):
    mask = load_mask(MASKS[name])
    assert mask.dtype == np.bool_
    assert (mask == (HALF > 0)).all()


# --- folders: which are classes, which are splits, which are neither ---

PAIR = {("train", "cat"): 1, ("train", "dog"): 1, ("test", "cat"): 1}
ALL = {("train", "cat"): 1, ("train", "dog"): 1}
LAYOUTS = {
    "classes": (["cat/1.png", "dog/1.png"], ALL),
    "no classes": (["1.png", "2.png"], {("train", None): 2}),
    "hidden folders": (["cat/1.png", "dog/1.png", ".ipynb_checkpoints/1.png", "cat/.cache/2.png"], ALL),
    "system entries": (["cat/1.png", "dog/1.png", "__MACOSX/cat/1.png", "cat/._1.png", "Thumbs.db"], ALL),
    **{
        f"{train}, {test}": ([f"{train}/cat/1.png", f"{train}/dog/1.png", f"{test}/cat/1.png"], PAIR)
        for train, test in (
            ("train", "test"), ("train", "valid"), ("train", "val"), ("train", "validation"),
            ("training", "testing"), ("train", "dev"), ("Train", "Test"), ("TRAIN", "VAL"),
            ("train2017", "val2017"), ("train_images", "test_images"), ("training_set", "test_set"),
            ("trainset", "testset"), ("images_train", "images_val"), ("train", "test1"), ("train", "eval"),
        )
    },
    "test before validation": (
        ["train/cat/1.png", "train/dog/1.png", "test/cat/1.png", "val/cat/9.png", "extra/1.png"], PAIR
    ),
    "train alone": (["train/cat/1.png", "train/dog/1.png"], ALL),
    "around the splits": (["d/v1/train/cat/1.png", "d/v1/train/dog/1.png", "d/v1/val/cat/1.png"], PAIR),
    "around train alone": (["data/train/cat/1.png", "data/train/dog/1.png"], ALL),
    "around classes": (["animals/cat/1.png", "animals/dog/1.png"], ALL),
    "twice around classes": (["a/v1/cat/1.png", "a/v1/dog/x/1.png"], ALL),
    "one class": (["cat/1.png", "cat/2.png"], {("train", "cat"): 2}),
    "one class with folders": (["cat/1.png", "cat/a/2.png", "cat/b/3.png"], {("train", "cat"): 3}),
    "splits twice": (["train/train/cat/1.png", "train/train/dog/1.png", "test/test/cat/1.png"], PAIR),
    "splits in classes": (["cat/train/1.png", "dog/train/1.png", "cat/test/1.png"], PAIR),
    "a class named train": (["train/train/1.png", "train/car/1.png", "val/car/1.png"], {
        ("train", "train"): 1, ("train", "car"): 1, ("test", "car"): 1
    }),
    "classes like splits": (["test tube/1.png", "trainer/1.png"], {
        ("train", "test tube"): 1, ("train", "trainer"): 1
    }),
    "numbers": (["10/1.png", "9/1.png"], {("train", "10"): 1, ("train", "9"): 1}),
    "no letters": (["猫/1.png", "🐶/1.png"], {("train", "猫"): 1, ("train", "🐶"): 1}),
    "undecodable": ([b"caf\xe9/1.png", b"$x/1.png"], {
        ("train", os.fsdecode(b"caf\xe9")): 1, ("train", "$x"): 1
    }),
}  # fmt: skip


@pytest.mark.parametrize("name", LAYOUTS)
def test_layouts(name, tmp_path):
    files, expected = LAYOUTS[name]
    source = FolderSource(fill(tmp_path, *files), test_fraction=0)
    found = [(split, item.label) for split in ("train", "test") for item in source.items[split]]
    assert {pair: found.count(pair) for pair in found} == expected


UNCLEAR = {
    "a class or a split": (["car/1.png", "train/1.png"], "is train a split or a class, beside car"),
    "a test folder beside classes": (["cat/1.png", "dog/1.png", "test/1.png"], "name a test split, and none"),
    "train beside loose images": (["train/cat/1.png", "1.png"], "is train a split or a class, beside loose"),
    "no training split": (["val/cat/1.png", "test/cat/1.png"], "test, val name a test split, and none names"),
    "splits in some classes": (["cat/train/1.png", "cat/test/1.png", "dog/1.png"], "is test, train a split"),
    "nothing": ([], "holds no images .* but nothing"),
    "no image that is read": (["a.heic", "b.txt"], "1 x unknown suffix"),
}


@pytest.mark.parametrize("name", UNCLEAR)
def test_unclear_layouts_are_refused(name, tmp_path):
    files, message = UNCLEAR[name]
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        FolderSource(fill(tmp_path, *files)).count("train")


def test_numbers_are_classes_in_their_sequence(tmp_path):
    source = FolderSource(fill(tmp_path, *(f"{i}/1.png" for i in (0, 1, 2, 10, 9))), 0)
    assert source.classes() == ["0", "1", "2", "9", "10"]
    assert in_sequence(["b", "10", "9"]) == ["10", "9", "b"]


def test_what_anyorder_wrote_is_no_data(tmp_path):
    fill(tmp_path, "cat/1.png", "dog/1.png", "runs/samples/grid.png", "runs/model/sample.png")
    fill(tmp_path, *(f"drawn/{name}" for name in ("0000.png", "grid.png", "orders.png", "generation.webp")))
    fill(tmp_path, "runs/samples/manifest.json", data=b'{"stage": "sample", "fingerprint": "ab"}')
    fill(tmp_path, "runs/model/.identity.json", data=b"{}")
    fill(tmp_path, "dog/manifest.json", data=b"[1]")  # of somebody else
    source = FolderSource(tmp_path, 0)
    assert sorted(i.name for i in source.items["train"]) == ["cat/1.png", "dog/1.png"]
    assert source.ignored()["written by anyorder"] == ["drawn", "runs/model", "runs/samples"]
    with pytest.raises(ValueError, match="samples was written by anyorder: source= takes a folder of images"):
        open_source(tmp_path / "runs/samples")


@pytest.mark.parametrize("n", [2, 3, 5, 30])
@pytest.mark.parametrize("fraction", [0.001, 0.1, 0.999])
def test_at_least_one_image_is_held_out(n, fraction, tmp_path):
    source = FolderSource(fill(tmp_path, *(f"{i}.png" for i in range(n))), fraction)
    assert source.count("test") >= 1
    assert source.count("train") >= 1
    assert source.count("train") + source.count("test") == n


# --- what is skipped ---


def test_skipped_files_are_counted_listed_and_limited(tmp_path, caplog):
    fill(tmp_path / "in", *(f"{i}.png" for i in range(6)), "a.txt")
    fill(tmp_path / "in", "bad.png", "b.heic", ".hidden.png", data=b"?")
    caplog.set_level(logging.INFO, "anyorder")
    facts = ingest(FolderSource(tmp_path / "in", 0), tmp_path / "out", SIZE)
    assert caplog.messages[-1] == (
        "6 train images; 0 test images; skipped 1 x not an image; "
        "ignored 1 x hidden or system entry, 1 x text beside the images, 1 x unknown suffix"
    )
    assert facts["skipped"]["train"]["first"][0]["name"] == "bad.png"
    assert {"name": "b.heic", "reason": "unknown suffix"} in facts["ignored"]["first"]
    ingest(FolderSource(tmp_path / "in", 0), tmp_path / "out", SIZE, max_skipped=1 / 7)
    with pytest.raises(ValueError, match=r"1 of 7 files are skipped, more than max_skipped=0\.1 .*bad"):
        ingest(FolderSource(tmp_path / "in", 0), tmp_path / "out", SIZE, max_skipped=0.1)


def test_a_folder_of_unknown_images_is_refused(tmp_path):
    fill(tmp_path / "in", "1.png", "2.png", *(f"{i}.heic" for i in range(3)))
    with pytest.raises(ValueError, match="3 of 5 files are of unknown suffix, more than max_skipped"):
        ingest(FolderSource(tmp_path / "in", 0), tmp_path / "out", SIZE)


# --- columns ---

IMAGE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])


def table(path: Path, features=None, **columns) -> Path:
    made = pa.table(columns)
    if features:
        made = made.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    pq.write_table(made, path)
    return path


def structs(n: int) -> pa.Array:
    return pa.array([{"bytes": PNG, "path": None}] * n, IMAGE)


LABELS = {
    "texts": (pa.array(["b", "a", None]), ["a", "b"], ["b", "a", None]),
    "integers": (pa.array([10, 9, 0]), ["0", "9", "10"], ["10", "9", "0"]),
    "integers with gaps": (pa.array([1.0, None, 0.0]), ["0", "1"], ["1", None, "0"]),
    "not a number": (pa.array([1.0, float("nan"), 2.5]), ["1", "2.5"], ["1", None, "2.5"]),
    "bools": (pa.array([True, False, True]), ["False", "True"], ["True", "False", "True"]),
    "empty texts": (pa.array(["a", "", "a"]), ["a"], ["a", None, "a"]),
    "categories": (pa.array(["b", "a", "b"]).dictionary_encode(), ["a", "b"], ["b", "a", "b"]),
    "other things": (pa.array(["010", "yes", "null"]), ["010", "null", "yes"], ["010", "yes", "null"]),
}  # fmt: skip


@pytest.mark.parametrize("name", LABELS)
def test_labels(name, tmp_path):
    column, classes, labels = LABELS[name]
    path = table(tmp_path / "x.parquet", image=structs(len(column)), label=column)
    source = ParquetSource(path, Columns("label"), 0)
    assert source.classes() == classes
    assert [item.label for item in source.items["train"]] == labels


NOT_LABELS = {
    "lists": pa.array([[1, 3], [2]]),
    "structs": pa.array([{"a": 1}, {"a": 2}]),
    "bytes": pa.array([b"a", b"b"]),
    "dates": pa.array([1, 2], pa.date32()),
}


@pytest.mark.parametrize("use", ["label", "caption", "attributes"])
@pytest.mark.parametrize("name", NOT_LABELS)
def test_columns_that_hold_no_texts_are_refused(name, use, tmp_path):
    path = table(tmp_path / "x.parquet", image=structs(2), other=NOT_LABELS[name])
    columns = Columns(**{use: ("other",) if use == "attributes" else "other"})
    with pytest.raises(ValueError, match=r"column 'other' of .*x\.parquet holds .* and not one text"):
        ParquetSource(path, columns, 0).count("train")


def label_feature(*names: str) -> dict:
    return {"label": {"_type": "ClassLabel", "names": list(names)}}


def test_classes_keep_the_sequence_and_the_unused_names_of_the_source(tmp_path):
    path = table(tmp_path / "x.parquet", label_feature("zebra", "ant", "owl"), image=structs(2), label=[2, 0])
    facts = ingest(ParquetSource(path, Columns("label"), 0), tmp_path / "out", SIZE)
    assert facts["classes"] == ["zebra", "ant", "owl"]
    assert np.load(tmp_path / "out/train.labels.npy").tolist() == [2, 0]


def test_files_that_list_other_classes_are_refused(tmp_path):
    table(tmp_path / "train-0.parquet", label_feature("a", "b"), image=structs(1), label=[0])
    table(tmp_path / "train-1.parquet", label_feature("b", "a"), image=structs(1), label=[0])
    with pytest.raises(ValueError, match=r"train-0\.parquet and train-1\.parquet list other classes"):
        ParquetSource(tmp_path, Columns("label"), 0).classes()
    table(tmp_path / "train-1.parquet", label_feature("a", "b"), image=structs(1), label=[2])
    with pytest.raises(ValueError, match=r"column 'label' of .*train-1\.parquet holds 2, it lists 2 classes"):
        ParquetSource(tmp_path, Columns("label"), 0).classes()


@pytest.mark.parametrize("features", [b"no JSON", b"[1]", b'{"info": {"features": {"label": {"names": 3}}}}'])
def test_a_broken_description_is_no_description(features, tmp_path):
    made = pa.table({"image": structs(1), "label": [7]}).replace_schema_metadata({"huggingface": features})
    pq.write_table(made, tmp_path / "x.parquet")
    assert ParquetSource(tmp_path / "x.parquet", Columns("label"), 0).classes() == ["7"]


def test_the_image_column_is_chosen(tmp_path):
    other = encoded(Image.new("RGB", (8, 8), BLACK))
    fill(tmp_path, "images/1.png", data=encoded(Image.new("RGB", (8, 8), WHITE)))
    blacks = pa.array([{"bytes": other, "path": None}] * 2, IMAGE)
    columns = {"image": structs(2), "mask": blacks, "raw": [other] * 2, "file": ["images/1.png"] * 2}
    path = table(tmp_path / "x.parquet", **columns)
    with pytest.raises(ValueError, match=r"several columns of images: choose image=image or image=mask"):
        ParquetSource(path, test_fraction=0).count("train")
    for name, color in (("image", RED), ("mask", BLACK), ("raw", BLACK), ("file", WHITE)):
        source = ParquetSource(path, Columns(image=name), 0)
        (first, _) = source.items["train"]
        assert (load_image(source.image(first.name)) == color).all()
    with pytest.raises(ValueError, match="has no column 'img'; it has image, mask, raw, file"):
        ParquetSource(path, Columns(image="img"), 0).count("train")
    number = table(tmp_path / "y.parquet", image=structs(1), number=[1])
    with pytest.raises(ValueError, match=r"column 'number' of .*y\.parquet holds no images; image may"):
        ParquetSource(number, Columns(image="number"), 0).count("train")
    raw = table(tmp_path / "z.parquet", raw=[PNG])
    source = ParquetSource(raw, test_fraction=0)
    assert [source.image(item.name) for item in source.items["train"]] == [PNG]


def test_rows_cannot_name_files_outside_the_data(tmp_path):
    fill(tmp_path, "secret.png", "data/inside.png")
    (tmp_path / "data/link.png").symlink_to(tmp_path / "secret.png")
    outside = str(tmp_path / "secret.png")
    paths = ["inside.png", "../secret.png", outside, "link.png", "x/../../secret.png", "a\0b"]
    rows = pa.array([{"bytes": None, "path": path} for path in paths], IMAGE)
    source = ParquetSource(table(tmp_path / "data/x.parquet", image=rows), test_fraction=0)
    facts = ingest(source, tmp_path / "out", SIZE, max_skipped=0.9)
    assert facts["counts"]["train"] == 1
    assert facts["skipped"]["train"]["reasons"] == {"path outside the data": 5}
    assert "'../secret.png' is not below" in facts["skipped"]["train"]["first"][0]["reason"]


PARQUET_SPLITS = {
    "prefixes": (["train-00000-of-00001", "test-00000-of-00001"], "all of both"),
    "validation": (["train-0", "validation-0"], "all of both"),
    "dev": (["train-0", "dev-0"], "all of both"),
    "valid": (["x_train", "x_valid"], "all of both"),
    "folders": (["default/train/0000", "default/test/0000"], "all of both"),
    "train alone": (["train-0", "train-1"], "held out"),
    "no names": (["a", "b"], "held out"),
}


@pytest.mark.parametrize("name", PARQUET_SPLITS)
def test_splits_of_parquet_files(name, tmp_path):
    files, kind = PARQUET_SPLITS[name]
    for file in files:
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        table(tmp_path / f"{file}.parquet", image=structs(10))
    fill(tmp_path, ".cache/train.parquet", data=b"?")
    source = open_source(tmp_path, test_fraction=0.2)
    counts = source.count("train"), source.count("test")
    assert sum(counts) == 20
    assert (counts == (10, 10)) == (kind == "all of both")
    assert min(counts) > 0


def test_parquet_files_beside_the_splits(tmp_path):
    for name in ("train", "test", "extra"):
        table(tmp_path / f"{name}.parquet", image=structs(1))
    assert ParquetSource(tmp_path).ignored() == {"beside the splits": ["extra.parquet"]}
    (tmp_path / "train.parquet").unlink()
    with pytest.raises(ValueError, match=r"holds a test split .* and no training split: name its files"):
        ParquetSource(tmp_path).count("train")


def test_hub_data_sets_with_two_images_and_files_elsewhere(tmp_path, monkeypatch):
    class Table(list):
        features = types.MappingProxyType({"a": type("Image", (), {})(), "b": type("Image", (), {})()})
        column_names = ("a", "b")

        def cast_column(self, name, feature):
            return self

        def select_columns(self, names):
            return [{name: row[name] for name in names} for row in self]

    fill(tmp_path, "cache/x.png", "secret.png")
    inside, outside = ({"bytes": None, "path": str(tmp_path / p)} for p in ("cache/x.png", "secret.png"))
    module = types.ModuleType("datasets")
    module.Image = lambda decode: None
    module.config = types.SimpleNamespace(HF_CACHE_HOME=tmp_path / "cache")
    rows = [{"a": {"bytes": PNG, "path": None}, "b": found} for found in (inside, outside)]
    module.load_dataset = {"u/x": {"train": Table(rows), "extra": Table(rows)}}.__getitem__
    monkeypatch.setitem(sys.modules, "datasets", module)
    with pytest.raises(ValueError, match="u/x has several columns of images: choose image=a or image=b"):
        HubSource("u/x").count("train")
    source = HubSource("u/x", Columns(image="b"), 0)
    good, bad = (source.image(item.name) for item in source.items["train"])
    assert good == tmp_path / "cache/x.png"
    assert isinstance(bad, BadImage)
    assert source.ignored() == {"beside the splits": ["extra"]}
    assert source.stats() == {}


def test_changes_of_hub_data_sets_are_seen(monkeypatch):
    """Addresses of downloaded files hold the revision; a hub out of reach leaves the data up to date."""

    class Table:
        column_names, features = ("image",), types.MappingProxyType({"image": type("Image", (), {})()})

        def __init__(self, revision):
            sums = {f"hf://datasets/u/x@{revision}/0.parquet": {"num_bytes": 7, "checksum": "ff" * 32}}
            self.info = types.SimpleNamespace(download_checksums=sums)

        def cast_column(self, name, feature):
            return self

    module = types.ModuleType("datasets")
    module.Image = lambda decode: None
    monkeypatch.setitem(sys.modules, "datasets", module)
    digests = []
    for revision in ("a1", "a1", "b2"):
        module.load_dataset = lambda name, revision=revision: {"train": Table(revision)}
        digests.append(DataStage("u/x").observed()["listing"])
    assert digests[0] == digests[1] != digests[2]

    def unreachable(name):
        raise ConnectionError("no network")

    module.load_dataset = unreachable
    settings, _, compared = split(DataStage("u/x"))
    assert "listing" not in settings
    then = {**settings, "listing": digests[0]}
    assert compared(then) == compared(settings)


# --- classes ---


def test_classes_are_mapped_by_name(caplog):
    assert map_classes(["dog", "CAT ", "emu"], ["cat", "dog", "owl"], 3) == [1, 0, None]
    assert map_classes(["a", "A"], ["A", "a"], 2) == [1, 0]
    assert map_classes(["7", "207"], [], 1000) == [7, 207]
    assert map_classes(["cat", "dog"], [], 1000) == [None, None]
    assert not caplog.messages
    assert map_classes(["cat", "dog"], [], 2) == [0, 1]
    assert "check that class 0 of the model is 'cat'" in caplog.messages[0]


NAMES = {
    "cat": "cat",
    "café 猫 🐶": "café 猫 🐶",
    os.fsdecode(b"caf\xe9"): r"caf\udce9",
    "a\nb\tc\x1b[31m": r"a\nb\tc\x1b[31m",
    "<b>": "<b>",
    "$x^2$": "$x^2$",
}


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.filterwarnings("ignore:Glyph")
def test_names_can_be_printed_and_drawn(name, tmp_path):
    from matplotlib.figure import Figure

    assert display_name(name) == NAMES[name]
    display_name(name).encode()
    text = Figure().text(0, 0, display_name(name, mathtext=True))
    drawn, is_formula = text._preprocess_math(text.get_text())
    assert (drawn, bool(is_formula)) == (NAMES[name], False)
    orders = np.array([[0, 1], [1, 0]])
    mean_rank_per_class(orders, np.array([0, 1]), [name, "$$"], Grid(1, 2))
    prompt_grid([np.zeros((1, 4, 4, 3), np.uint8)], [name])
    write_text(tmp_path / "report.html", name)


# --- the command ---


def test_the_settings_that_errors_name_exist(tmp_path):
    fill(tmp_path / "in", *(f"{i}.png" for i in range(9)))
    fill(tmp_path / "in", "clear.png", data=encoded(Image.new("RGBA", (8, 8), (0, 0, 0, 0))))
    fill(tmp_path / "in", "large.png", data=encoded(Image.new("RGB", (20, 20), RED)))
    base = ["data", f"source={tmp_path}/in", "size=8,8"]
    out = tmp_path / "out"
    assert cli.main([*base, "max_pixels=100", "fill=1,2,3", "max_skipped=0.2", f"out={out}"]) == 0
    made = read_json(out / "manifest.json")
    assert sum(made["counts"].values()) == 10
    images = np.concatenate([np.load(out / f"{split}.images.npy") for split in ("train", "test")])
    assert {tuple(image[0, 0]) for image in images} == {RED, (1, 2, 3)}
    for wrong in ("max_pixels=0", "fill=1,2,300", "max_skipped=2", "max_pixels=1000000000"):
        assert cli.main([*base, wrong, f"out={tmp_path}/wrong"]) == 2
    for wrong in ("label=x", "image=x", "captions=x", "attributes=x", "size=8,8"):
        assert cli.main(["data", wrong, f"out={tmp_path}/wrong"]) == 2
    assert not (tmp_path / "wrong").exists()
    assert cli.main([*base, "test_fraction=0", f"out={tmp_path}/empty"]) == 2
    assert cli.main(["data", f"source={out}", f"out={tmp_path}/again"]) == 2


def test_changes_of_the_source_are_seen(tmp_path):
    source = fill(tmp_path / "in", *(f"{i}.png" for i in range(9)))
    before = FolderSource(source).stats()
    assert listing.digest(before) == listing.digest(FolderSource(source).stats())
    (source / "1.png").unlink()
    fill(source, "new.png")
    fill(source, "2.png", data=PNG + b"more")
    after = FolderSource(source).stats()
    assert listing.digest(before) != listing.digest(after)
    assert listing.changes(before, after) == "1 added (new.png); 1 deleted (1.png); 1 changed (2.png)"
    assert listing.stats(tmp_path, ["nowhere"]) == {"nowhere": (-1, -1)}


@pytest.mark.parametrize("kind", ["structs", "texts", "embedded", "bytes"])
def test_changes_of_files_that_rows_name_are_seen(kind, tmp_path):
    fill(tmp_path / "in", "images/1.png", "images/2.png")
    paths = ["images/1.png", "images/2.png", "../outside.png"]
    data = PNG if kind == "embedded" else None
    columns = {
        "texts": paths, "bytes": [PNG] * 3,
        "structs": pa.array([{"bytes": data, "path": path} for path in paths], IMAGE),
    }  # fmt: skip
    path = table(tmp_path / "in/x.parquet", image=columns.get(kind, columns["structs"]))
    before = ParquetSource(path, Columns(image="image")).stats()
    fill(tmp_path / "in", "images/2.png", data=PNG + b"more")
    after = ParquetSource(path, Columns(image="image")).stats()
    named = kind in ("structs", "texts")
    assert listing.changes(before, after) == ("1 changed (images/2.png)" if named else "")
    assert len(after) == (3 if named else 1)


def test_data_of_a_changed_source_are_not_up_to_date(tmp_path, caplog):
    caplog.set_level(logging.INFO, "anyorder")
    source = fill(tmp_path / "in", *(f"{i}.png" for i in range(9)))
    command = ["data", f"source={source}", "size=8,8", f"out={tmp_path}/out"]
    assert cli.main(command) == 0
    assert cli.main(command) == 0
    assert f"{tmp_path}/out is up to date" in caplog.messages
    caplog.clear()
    (source / "3.png").unlink()
    cli.main(command)
    assert f"{source} has changed since {tmp_path}/out was made: 1 deleted (3.png)" in caplog.messages
    assert f"{tmp_path}/out is up to date" not in caplog.messages
