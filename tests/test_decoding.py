"""Images that are decoded when they are asked for: the rows, pixels, tokens and models of a cache."""

import io
import itertools
import json
import os
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from anyorder.contracts import Grid
from anyorder.data import decoding, tars
from anyorder.data.caches import ImageSet, TokenSet
from anyorder.data.images import load_image
from anyorder.data.ingest import ingest
from anyorder.data.sources import Columns, FolderSource, open_source
from anyorder.data.sunsets import sun_first
from anyorder.files import fingerprint, load_array, read_manifest
from anyorder.settings import parse
from anyorder.stages.artifacts import Artifact
from anyorder.stages.execute import execute
from anyorder.stages.experiment import STAGES
from anyorder.stages.features import load_reference
from anyorder.training.trainer import Trainer

VQ = {
    "model.channels": 8, "model.multipliers": (1, 1, 2), "model.groups": 1, "model.res_blocks": 1,
    "model.z_channels": 8, "model.vocab_size": 16, "model.code_dim": 4,
}  # fmt: skip
STEPS = {
    "train.steps": 6,
    "train.batch_size": 4,
    "train.log_every": 1,
    "train.eval_every": 3,
    "train.save_every": 1,
}


def picture(seed, size=(20, 24)):
    """A smooth image, as bytes of a PNG file."""
    noise = np.random.default_rng(seed).integers(0, 256, (4, 5, 3), np.uint8)
    file = io.BytesIO()
    Image.fromarray(noise).resize(size[::-1], Image.Resampling.BICUBIC).save(file, "PNG")
    return file.getvalue()


PICTURES = [picture(i) for i in range(30)]
PICTURES[7] = b"no image"


def folder(root):
    for i, data in enumerate(PICTURES):
        path = root / "ab"[i % 2] / f"{i:02d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    return root


def table(root):
    root.mkdir()
    rows = [{"bytes": data, "path": None} for data in PICTURES]
    found = pa.table({"picture": rows, "kind": ["ab"[i % 2] for i in range(30)]})
    pq.write_table(found.slice(0, 20), root / "train-0.parquet", row_group_size=7)
    pq.write_table(found.slice(20), root / "train-1.parquet", row_group_size=7)
    return root


def add(tar, name, data):
    member = tarfile.TarInfo(name)
    member.size = len(data)
    tar.addfile(member, io.BytesIO(data))


def shards(root):
    root.mkdir()
    for shard in range(2):
        with tarfile.open(root / f"shard-{shard}.tar", "w") as tar:
            for i in range(15 * shard, 15 * shard + 15):
                add(tar, f"x/{i:04d}.png", PICTURES[i])
                add(tar, f"x/{i:04d}.cls", b"ab"[i % 2 : i % 2 + 1] + b"\n")
                add(tar, f"x/{i:04d}.json", json.dumps({"text": f"image {i}", "hue": "red"}).encode())
    return root


def stage(name, out, **settings):
    execute(name, parse(STAGES[name], settings), out)
    return out


def data(out, source, **settings):
    return stage(
        "data", out, source=str(source), size=(16, 16), max_validation=4, test_fraction=0.3, **settings
    )


@pytest.fixture(params=["0", "2"])
def workers(request, monkeypatch):
    monkeypatch.setenv(decoding.WORKERS, request.param)
    monkeypatch.setattr("anyorder.data.ingest._BLOCK", 4)
    return request.param


@pytest.mark.parametrize("kind", [folder, table, shards])
def test_rows_and_pixels_are_those_of_a_cache(kind, tmp_path, workers):
    source = kind(tmp_path / "in")
    label = {} if kind is folder else {"label": "kind" if kind is table else "cls"}
    cached, streamed = (data(tmp_path / f"{c}", source, cache=c, **label) for c in (True, False))
    assert not [*streamed.glob("*.images.npy")]
    facts = [read_manifest(out) for out in (cached, streamed)]
    for key in ("counts", "classes", "skipped", "ignored"):
        assert facts[0][key] == facts[1][key]
    assert sum(facts[0]["counts"].values()) == 29
    assert sum(part["reasons"].get("not an image", 0) for part in facts[1]["skipped"].values()) == 1
    for split in ("train", "validation", "test"):
        a, b = ImageSet(cached, split), ImageSet(streamed, split)
        rows = np.random.default_rng(0).permutation(len(a))
        assert a.size == b.size
        assert len(a) == len(b) == len(b.images)
        with b.ahead([rows, rows[:2], rows[:3]]):
            for some in (rows, rows[1:], rows[:2], rows[:3], rows[:1]):  # two come unannounced
                for x, y in zip(a.batch(some), b.batch(some), strict=True):
                    assert torch.equal(x, y)


@pytest.mark.parametrize("name", ["own_parts:Squares", "own_parts:split_squares"])
def test_own_data_sets_are_read_again(name, tmp_path, workers):
    cached, streamed = (
        stage("data", tmp_path / f"{c}", source=name, size=(8, 8), cache=c) for c in (True, False)
    )
    a, b = ImageSet(cached), ImageSet(streamed)
    assert np.array_equal(a.images[np.arange(len(a))], b.images[np.arange(len(a))])


def test_parquet_at_an_address_is_read_where_it_is(tmp_path, workers):
    local = table(tmp_path / "in")
    cached = data(tmp_path / "cached", local, label="kind")
    streamed = data(tmp_path / "streamed", f"file://{local}", label="kind", cache=False)
    assert read_manifest(streamed)["decoding"]["kind"] == "RemoteSource"
    a, b = ImageSet(cached), ImageSet(streamed)
    assert np.array_equal(a.images[np.arange(len(a))], b.images[np.arange(len(a))])
    one = open_source(f"file://{local}/train-1.parquet", Columns("kind"))
    assert one.count("train") + one.count("test") == 10
    before = one.stats()
    os.utime(local / "train-1.parquet", (1, 1))
    assert open_source(one.path).stats() != before
    with pytest.raises(ValueError, match="holds no parquet files: give the address of some"):
        open_source(f"file://{tmp_path}/cached").count("train")
    for address in (f"file://{tmp_path}/missing", "nothing://known/here"):
        with pytest.raises(ValueError, match=r"holds no parquet files|cannot be listed .*check the address"):
            open_source(address).count("train")
        assert open_source(address).stats() == {}


def test_a_table_that_became_shorter_says_so(tmp_path):
    path = table(tmp_path / "in") / "train-1.parquet"
    source = open_source(path)
    assert source.image("train-1.parquet#9") == PICTURES[29]
    pq.write_table(pq.read_table(path).slice(0, 5), path)
    with pytest.raises(ValueError, match=r"train-1\.parquet has 5 rows, no row 9: run data again"):
        open_source(path).image("train-1.parquet#9")


def test_tokens_and_trainings_are_those_of_a_cache(tmp_path, monkeypatch):
    monkeypatch.setenv(decoding.WORKERS, "2")
    source, found = folder(tmp_path / "in"), {}
    for cache in (True, False):
        out = tmp_path / f"{cache}"
        data(out / "data", source, cache=cache)
        made = {"data": out / "data"}
        stage("tokenizer", out / "vq", **made, mirror=True, **VQ, **STEPS)
        stage("features", out / "features", **made, channels=(8,), **STEPS)
        stage("tokens", out / "tokens", **made, tokenizer=out / "vq", mirror=True, batch_size=5)
        names = [f"{name}/model.safetensors" for name in ("vq", "features")]
        names += [f"tokens/{split}.tokens.npy" for split in ("train", "validation", "test")]
        reference = load_reference(out / "features").features
        found[cache] = [*((out / name).read_bytes() for name in names), reference.numpy().tobytes()]
    assert found[True] == found[False]


def stopped(step, monkeypatch):
    """Send SIGTERM to this process and its workers while that step is logged."""
    whole = Trainer.summary

    def summary(self):
        if self.step_number == step:
            children = Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()
            assert children
            for pid in map(int, children):
                os.kill(pid, signal.SIGTERM)
                os.kill(pid, signal.SIGINT)
            signal.raise_signal(signal.SIGTERM)
        return whole(self)

    monkeypatch.setattr(Trainer, "summary", summary)


def test_a_stopped_training_goes_on_exactly(tmp_path, monkeypatch):
    monkeypatch.setenv(decoding.WORKERS, "2")
    made = {"data": data(tmp_path / "data", folder(tmp_path / "in"), cache=False)}
    whole = stage("tokenizer", tmp_path / "whole", **made, **VQ, **STEPS)
    with monkeypatch.context() as patch:
        stopped(3, patch)
        with pytest.raises(KeyboardInterrupt, match="after step 3"):
            stage("tokenizer", tmp_path / "parts", **made, **VQ, **STEPS)
    assert fingerprint(stage("tokenizer", tmp_path / "parts", **made, **VQ, **STEPS)) == fingerprint(whole)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_killed_training_goes_on_at_once_and_exactly(tmp_path):
    """The workers of a killed process do not keep its folder locked."""
    made = data(tmp_path / "data", folder(tmp_path / "in"), cache=False)
    settings = {**VQ, **STEPS, "train.steps": 40}
    typed = [f"{k}={v}".replace(" ", "").replace("(", "[").replace(")", "]") for k, v in settings.items()]
    command = [sys.executable, "-m", "anyorder", "tokenizer", f"data={made}", *typed]
    environment = {**os.environ, decoding.WORKERS: "2", "OMP_NUM_THREADS": "1"}
    subprocess.run([*command, f"out={tmp_path}/whole"], check=True, env=environment)
    for state in (5, 20, 30):
        running = subprocess.Popen([*command, f"out={tmp_path}/parts"], env=environment)
        wanted = tmp_path / f"parts/checkpoints/step-{state:08d}"
        while not wanted.is_dir():
            assert running.poll() is None
            time.sleep(0.01)
        running.kill()
        running.wait()
    subprocess.run([*command, f"out={tmp_path}/parts"], check=True, env=environment)
    assert fingerprint(tmp_path / "parts") == fingerprint(tmp_path / "whole")


def test_a_fork_does_not_keep_a_folder_locked(tmp_path):
    with Artifact(tmp_path / "a", "stage", {}, {}) as artifact:
        read, write = os.pipe()
        if not (child := os.fork()):
            os.close(write)
            os.read(read, 1)
            os._exit(0)
        artifact.close()
        Artifact(tmp_path / "a", "stage", {}, {}).close()
    os.close(write)
    os.waitpid(child, 0)


@pytest.mark.parametrize("cache", [True, False])
def test_a_killed_split_goes_on(cache, tmp_path, monkeypatch):
    monkeypatch.setenv(decoding.WORKERS, "0")
    monkeypatch.setattr("anyorder.data.ingest._BLOCK", 4)
    source = folder(tmp_path / "in")
    (source / "a/00.txt").write_text("first")
    (source / "a/02.png").write_bytes(b"no image")
    columns, decoded, whole = Columns(caption="txt"), [], decoding.images.load_image

    def load(image, **options):
        decoded.append(image.name)
        if len(decoded) == dies[0]:
            raise RuntimeError("killed")
        return whole(image, **options)

    def run(name):
        decoded.clear()
        return ingest(open_source(source, columns, 0.3), tmp_path / name, (8, 8), cache=cache)

    monkeypatch.setattr(decoding.images, "load_image", load)
    dies = [0]
    facts, total = run("whole"), len(decoded)
    for seconds, dies[0] in ((0, 14), (30, 6), (0, 3)):  # every block is noted, or none
        monkeypatch.setattr("anyorder.data.ingest._SAVED", seconds)
        with pytest.raises(RuntimeError, match="killed"):
            run("parts")
    dies[0] = 0
    assert run("parts") == facts
    assert len(decoded) == total - 12
    files = {path.name for path in (tmp_path / "whole").iterdir()}
    assert files == {path.name for path in (tmp_path / "parts").iterdir()}
    for name in files:
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "parts" / name).read_bytes()


# --- crops ---


def test_crops_are_corners_and_middle_of_a_larger_image(tmp_path, workers):
    streamed = data(tmp_path / "out", folder(tmp_path / "in"), cache=False)
    plain, images = ImageSet(streamed), ImageSet(streamed, crops=True, mirror=True)
    n, names = len(plain), load_array(streamed / "train.names.npy")
    assert len(images) == len(images.labels) == 10 * n
    with images.ahead(np.arange(10 * n).reshape(10, n)):
        found = [images.batch(np.arange(k * n, k * n + n)) for k in range(10)]
    large = np.stack([load_image(tmp_path / "in" / os.fsdecode(name), (17, 17)) for name in names])
    for k, (y, x) in enumerate(((0, 0), (0, 1), (1, 0), (1, 1), (0, 0))):
        expected = torch.from_numpy(large[:, y : y + 16, x : x + 16]).permute(0, 3, 1, 2) / 127.5 - 1
        torch.testing.assert_close(found[k][0], expected)
        torch.testing.assert_close(found[k + 5][0], expected.flip(-1))
    assert all(np.array_equal(labels, plain.labels) for _, labels in found)


def test_tokens_of_crops(tmp_path):
    streamed = data(tmp_path / "data", folder(tmp_path / "in"), cache=False)
    tokenizer = stage("tokenizer", tmp_path / "vq", data=streamed, crops=True, **VQ, **STEPS)
    made = {"data": streamed, "tokenizer": tokenizer}
    crops = stage("tokens", tmp_path / "crops", **made, crops=True, mirror=True, batch_size=7)
    plain = stage("tokens", tmp_path / "plain", **made)
    many, few = (load_array(out / "train.tokens.npy") for out in (crops, plain))
    assert len(many) == 10 * len(few)
    assert (load_array(crops / "test.tokens.npy") == load_array(plain / "test.tokens.npy")).all()
    labels = load_array(plain / "train.labels.npy")
    assert load_array(crops / "train.labels.npy").tolist() == labels.tolist() * 10


def test_crops_need_larger_images(tmp_path):
    source = folder(tmp_path / "in")
    with pytest.raises(
        ValueError, match="holds pixels, crops are cut from larger images: run data with cache=false"
    ):
        ImageSet(data(tmp_path / "cached", source), crops=True)
    small = stage("data", tmp_path / "small", source=str(source), size=(8, 9), cache=False)
    with pytest.raises(ValueError, match=r"at least 10 x 10 pixels, got size=\(8, 9\)"):
        ImageSet(small, crops=True)


# --- what has changed since ---


def test_images_that_are_gone_or_others_are_named(tmp_path, workers):
    source = folder(tmp_path / "in")
    images = ImageSet(data(tmp_path / "out", source, cache=False))
    rows = np.arange(len(images))
    first, second = (source / os.fsdecode(name) for name in load_array(tmp_path / "out/train.names.npy")[:2])
    second.write_bytes(PICTURES[3])
    with pytest.raises(ValueError, match=rf"{second.name} has other pixels than .* run data again"):
        images.images[rows[1:]]
    first.unlink()
    with (
        images.ahead([rows[:1], rows[2:]]),
        pytest.raises(
            ValueError, match=rf"{first.name} can no longer be read \(unreadable file: .*put it back"
        ),
    ):
        images.batch(rows[:1])


def test_crops_of_images_that_are_others_are_refused(tmp_path, workers):
    """Each image is looked at with its first crop; all are when tokens are made."""
    source = folder(tmp_path / "in")
    images = ImageSet(data(tmp_path / "out", source, cache=False), crops=True)
    (source / os.fsdecode(load_array(tmp_path / "out/train.names.npy")[1])).write_bytes(PICTURES[3])
    images.batch(np.arange(1))
    with pytest.raises(ValueError, match="has other pixels than when the data were made"):
        images.batch(np.arange(2))


def test_what_was_begun_of_others_does_not_go_on(tmp_path, monkeypatch):
    """Own data sets have no files whose times could tell."""
    others = ["1", "2"]

    class Changing(FolderSource):
        def _read(self, part):
            for item in super()._read(part):
                yield item._replace(label=others["/a/" in f"/{item.name}"])

    def begun():
        ingest(Changing(folder(tmp_path / "in")), tmp_path / "out", (8, 8))

    with monkeypatch.context() as context:
        context.setattr("anyorder.data.ingest._report", lambda *_: 1 / 0)  # both splits are done then
        with pytest.raises(ZeroDivisionError):
            begun()
    before = np.array(load_array(tmp_path / "out/train.labels.npy"))
    others.reverse()
    begun()
    assert (load_array(tmp_path / "out/train.labels.npy") == 1 - before).all()


def test_numbers_of_workers_are_checked(monkeypatch, tmp_path):
    monkeypatch.setenv(decoding.WORKERS, "many")
    with pytest.raises(ValueError, match="ANYORDER_WORKERS must be a number from 0 on, got 'many'"):
        ingest(FolderSource(folder(tmp_path / "in")), tmp_path / "out", (8, 8))
    monkeypatch.delenv(decoding.WORKERS)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "1000")
    assert decoding._workers(alone=False) == 1
    assert decoding._workers(alone=True) == len(os.sched_getaffinity(0))


def test_sunsets_are_always_kept():
    with pytest.raises(ValueError, match="cache has no effect on sunsets"):
        parse(STAGES["data"], {"cache": False})


# --- tar shards ---


def test_tar_shards_have_columns(tmp_path):
    source = open_source(shards(tmp_path / "in"), Columns("cls", "text", ("hue",)), 0)
    item, *_ = source.items["train"]
    assert (item.label, item.caption, item.attributes) == ("a", "image 0", ("red",))
    assert source.image(item.name) == PICTURES[0]
    assert item.name.startswith("shard-0.tar#x/0000.png@512+")
    assert len(source.stats()) == 2
    assert open_source(tmp_path / "in/shard-1.tar", test_fraction=0).count("train") == 15
    with pytest.raises(ValueError, match=r"shard-0.tar has no column 'kind'; it has cls, hue, json"):
        open_source(tmp_path / "in", Columns("kind")).classes()


def test_hostile_tar_shards(tmp_path):
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        add(tar, "1.txt", b"a caption alone")
        add(tar, "2.png", PICTURES[0])
        add(tar, "2.seg.png", PICTURES[1])
        add(tar, "2.json", b"{broken")
        add(tar, "3.png", PICTURES[2])
        add(tar, "3.json", json.dumps({"text": "three"}).encode())
        link = tarfile.TarInfo("4.png")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(link)
    facts = ingest(open_source(tmp_path / "a.tar", Columns(caption="text"), 0), tmp_path / "out", (16, 16))
    assert facts["counts"]["train"] == 2
    assert facts["skipped"]["train"]["reasons"] == {"no image": 2}
    assert json.loads((tmp_path / "out/train.captions.json").read_text()) == ["", "three"]
    masks = open_source(tmp_path / "a.tar", Columns(image="seg.png"), 0)
    found = [masks.image(item.name) for item in masks.items["train"]]
    assert [image for image in found if isinstance(image, bytes)] == [PICTURES[1]]
    (tmp_path / "b.tar").write_bytes((tmp_path / "a.tar").read_bytes()[:3000])
    (tmp_path / "c.tar").write_bytes(b"\x1f\x8b" + bytes(600))
    for name in ("b", "c"):
        with pytest.raises(ValueError, match=rf"{name}\.tar is not a sound tar file .*without compression"):
            open_source(tmp_path / f"{name}.tar").count("train")


def test_two_files_of_one_ending_in_an_example_are_refused(tmp_path):
    """The library webdataset refuses them, too: which of them is the image, nobody knows."""
    path = archive(tmp_path / "a.tar", ("1.png", PICTURES[0]), ("1.PNG", PICTURES[1]))
    with pytest.raises(ValueError, match=r"a\.tar has two files '1\.PNG' that are png of 1: leave one out"):
        open_source(path).count("train")


def archive(path, *members, **sizes):
    """A tar file of (name, bytes), and of files with gaps (name=size) that hold no byte."""
    with tarfile.open(path, "w") as tar:
        for name, content in members:
            add(tar, name, content)
        for name, size in sizes.items():
            member = tarfile.TarInfo(name.replace("_", "."))
            member.pax_headers = {
                "GNU.sparse.major": "0", "GNU.sparse.minor": "1", "GNU.sparse.map": "0,0",
                "GNU.sparse.size": str(size),
            }  # fmt: skip
            tar.addfile(member)
    return path


SOUND = [(f"{i}.png", PICTURES[i]) for i in range(3)]
REASONS: dict[str, tuple[list[tuple[str, bytes]], dict[str, int], dict[str, int], dict[str, int]]] = {
    "of another system": (
        [("._0.png", b"junk"), (".DS_Store", b"x"), ("__MACOSX/0.png", b"x")], {}, {},
        {"hidden or system entry": 3},
    ),
    "in the folder itself": ([("./3.png", PICTURES[3])], {}, {}, {}),
    "gaps of a TiB": ([], {"3_png": 2**40}, {"no image": 1}, {}),
    "a text with gaps": ([("2.txt", b"red"), ("3.png", PICTURES[3])], {"3_txt": 2**40}, {}, {}),
    "a name like an offset": ([("x@a+b.txt", b"")], {}, {"no image": 1}, {}),
    "no bytes": ([("3.png", b"")], {}, {"empty file": 1}, {}),
}  # fmt: skip


@pytest.mark.parametrize("name", REASONS)
def test_what_is_no_image_in_a_tar_file_is_counted(name, tmp_path):
    more, gaps, skipped, ignored = REASONS[name]
    path, texts = archive(tmp_path / "a.tar", *SOUND, *more, **gaps), "txt" if "text" in name else None
    source = open_source(path, Columns(caption=texts), 0)
    facts = ingest(source, tmp_path / "out", (16, 16))
    assert facts["skipped"]["train"]["reasons"] == skipped
    assert facts["ignored"]["reasons"] == ignored
    named = sum(member.endswith("png") and "X" not in member and "_" not in member for member, _ in more)
    assert facts["counts"]["train"] == 3 + named - skipped.get("empty file", 0)


def test_labels_of_a_tar_file_that_are_not_utf8_stay_apart(tmp_path):
    labels = [(f"{i}.cls", b"caf" + bytes([0xE8 + i])) for i in range(3)]
    path = archive(tmp_path / "a.tar", *itertools.chain(*zip(SOUND, labels, strict=True)))
    assert open_source(path, Columns("cls"), 0).classes() == ["caf\\xe8", "caf\\xe9", "caf\\xea"]


def test_tar_files_that_are_cut_off_or_joined_are_refused(tmp_path):
    """The library takes whatever is no header for the end, and says nothing of what is behind it."""
    whole = archive(tmp_path / "whole.tar", *SOUND).read_bytes()
    with tarfile.open(tmp_path / "whole.tar") as tar:
        begin = tar.getmembers()[2].offset
    ends = {
        "cut": b"",
        "in-header": whole[begin : begin + 200],
        "damaged": b"?" * 2000,
        "joined": bytes(1024) + whole,
    }
    for name, end in ends.items():
        (tmp_path / f"{name}.tar").write_bytes(whole[:begin] + end)
        with pytest.raises(
            ValueError, match=rf"{name}\.tar is not a sound tar file \(at byte {begin} follows"
        ):
            open_source(tmp_path / f"{name}.tar").count("train")


def test_examples_of_several_images_need_a_choice(tmp_path):
    path = archive(tmp_path / "a.tar", *SOUND, ("2.jpg", PICTURES[5]))
    with pytest.raises(ValueError, match=r"a\.tar has png and jpg of 2: choose image=png or image=jpg"):
        open_source(path).count("train")
    assert open_source(path, Columns(image="png"), 0).count("train") == 3
    with pytest.raises(ValueError, match=r"a\.tar has no column 'webp'; it has jpg, png"):
        open_source(path, Columns(image="webp"), 0).count("train")


def test_large_texts_and_long_names_are_refused(tmp_path):
    path = archive(tmp_path / "a.tar", *SOUND, ("2.txt", bytes(tars.MAX_TEXT + 1)))
    with pytest.raises(ValueError, match=r"a\.tar: 2\.txt has 16,777,217 bytes, allowed are 16,777,216"):
        open_source(path, Columns(caption="txt")).count("train")
    path = archive(tmp_path / "b.tar", *SOUND, ("L" * 10**6 + ".png", PICTURES[3]))
    with pytest.raises(
        ValueError, match=r"the name b'b\.tar#L{10}.*\.\.\. has 1,000,0.. bytes, allowed are 4,096"
    ):
        ingest(open_source(path, test_fraction=0), tmp_path / "out", (16, 16))


@pytest.mark.parametrize("name", ["a.tar.gz", "a.tgz", "a.zip", "a.png"])
def test_single_files_of_other_kinds_are_refused(name, tmp_path):
    (tmp_path / name).write_bytes(PICTURES[0])
    with pytest.raises(ValueError, match=rf"{name} is no parquet file and no tar file without compression"):
        open_source(tmp_path / name)


def test_a_tar_beside_images_is_no_source(tmp_path):
    folder(tmp_path / "in")
    (tmp_path / "in/backup.tar").write_bytes(b"")
    assert isinstance(open_source(tmp_path / "in"), FolderSource)


def test_blocks_are_read_in_sequence(tmp_path, workers):
    names = [os.fsencode(f"a/{i:02d}.png") for i in range(0, 30, 2)]
    reader = decoding.Reader(
        FolderSource(folder(tmp_path / "in")), np.array(names), {"size": (4, 4), "fit": "crop"}
    )
    assert len(reader) == 15
    blocks = [np.arange(i, min(i + 4, 15)) for i in range(0, 15, 4)]
    expected = [load_image(tmp_path / "in" / os.fsdecode(name), (4, 4)) for name in names]
    found = [image for block in reader.stream(iter(blocks)) for image in block.pixels]
    assert np.array_equal(found, expected)
    endless = reader.stream(itertools.cycle(blocks))
    assert [len(next(endless).pixels) for _ in range(9)] == [4, 4, 4, 3, 4, 4, 4, 3, 4]
    endless.close()


# --- captions of folders ---


def captions_of(source):
    return {item.name: item.caption for split in ("train", "test") for item in source.items[split]}


def test_captions_from_lines_and_json_lines(tmp_path):
    source = folder(tmp_path / "in")
    (source / "a/00.txt").write_text(" one  red\n\nor two \n")
    (source / "notes.jsonl").write_text("{}")
    (source / "b/captions.jsonl").write_text('{"file_name": "01.png", "captions": ["x", "y  z"]}\n\n')
    (source / "captions.jsonl").write_text(
        '{"file_name": "a/02.png", "text": "first\\nline"}\n'
        '{"file_name": "./a/02.png", "caption": "second"}\n'
        '{"file_name": "gone.png", "text": "nothing"}\n'
    )
    assert captions_of(open_source(source, Columns(caption="txt")))["a/00.png"] == "one red or two"
    lines = open_source(source, Columns(caption="lines"))
    assert captions_of(lines) == dict.fromkeys(captions_of(lines)) | {"a/00.png": "one red\nor two"}
    described = open_source(source, Columns(caption="captions.jsonl"))
    assert {k: v for k, v in captions_of(described).items() if v} == {
        "a/02.png": "first line\nsecond", "b/01.png": "x\ny z"
    }  # fmt: skip
    assert described.ignored()["caption of no image"] == ["gone.png"]
    assert described.ignored()["text beside the images"] == ["a/00.txt", "notes.jsonl"]
    assert {"captions.jsonl", "b/captions.jsonl"} <= described.stats().keys()
    with pytest.raises(ValueError, match=r"has no file other\.jsonl: name one that is there"):
        captions_of(open_source(source, Columns(caption="other.jsonl")))
    with pytest.raises(ValueError, match="captions=lines a caption from each of its lines, and captions"):
        open_source(source, Columns(caption="text"))
    for line in ("[1]", "{", '{"file_name": "a"}', '{"file_name": "a", "text": 3}'):
        (source / "notes.jsonl").write_text(f'{{"file_name": "a", "text": ""}}\n{line}\n')
        with pytest.raises(ValueError, match=r"notes\.jsonl, line 2 is .* and not such as {"):
            captions_of(open_source(source, Columns(caption="notes.jsonl")))


def test_several_captions_of_a_table(tmp_path):
    rows = [{"bytes": data, "path": None} for data in PICTURES[:3]]
    found = {"picture": rows, "several": [["a b", "c"], [], None], "one": ["a\nb", "c", None]}
    pq.write_table(pa.table(found), tmp_path / "x.parquet")
    for column, expected in (("several", ["a b\nc", "", None]), ("one", ["a b", "c", None])):
        source = open_source(tmp_path / "x.parquet", Columns(caption=column), 0)
        assert [item.caption for item in source.items["train"]] == expected


def test_training_draws_one_of_several_captions(tmp_path):
    pytest.importorskip("tokenizers", reason="captions need: pip install 'anyorder[text]'")
    source = folder(tmp_path / "in")
    for i in range(30):
        (source / "ab"[i % 2] / f"{i:02d}.txt").write_text("\n".join("rgb"[: i % 3 + 1]))
    made = data(tmp_path / "data", source, captions="lines")
    tokenizer = stage("tokenizer", tmp_path / "vq", data=made, **VQ, **STEPS)
    settings = {"data": made, "tokenizer": tokenizer, "mirror": True, "text.length": 2}
    tokens = TokenSet(stage("tokens", tmp_path / "tokens", **settings))
    assert tokens.captions.shape == (len(tokens), 3, 2)
    counts = np.array([len({*map(tuple, row)}) for row in tokens.captions])
    texts = ImageSet(made).captions()
    assert counts.tolist() == [1 + text.count("\n") for text in texts] * 2
    rows = np.flatnonzero(counts == 3).repeat(40)
    generator = torch.Generator().manual_seed(3)
    drawn = tokens.batch(rows, generator)[1][:, -2:].numpy()
    assert np.array_equal(drawn, tokens.batch(rows, generator)[1][:, -2:])
    assert {*map(tuple, drawn)} == {*map(tuple, tokens.captions[rows[0]])}
    first = tokens.batch(rows)[1][:, -2:]
    assert np.array_equal(first, tokens.captions[rows, 0])
    assert torch.equal(generator.get_state(), torch.Generator().manual_seed(3).get_state())
    few = TokenSet(stage("tokens", tmp_path / "few", **settings, **{"text.captions": 1}))
    assert few.captions.shape == (len(tokens), 1, 2)


def test_a_damaged_table_is_one_line(tmp_path, workers):
    """Also where a worker meets the damage."""
    path = table(tmp_path / "in") / "train-0.parquet"
    images = ImageSet(data(tmp_path / "out", tmp_path / "in", cache=False))
    path.write_bytes(path.read_bytes()[:100])
    rows = np.arange(len(images))
    with (
        images.ahead([rows[:5], rows[5:]]),
        pytest.raises(ValueError, match=r"^\S+train-0\.parquet is not a sound parquet file \([^\n]*\)$"),
    ):
        images.batch(rows[:5])


def test_statistics_of_sunsets_are_those_of_their_own_images(tmp_path):
    """Mirrored copies have no causes of their own."""
    data = stage("data", tmp_path / "data", size=(16, 16), max_train=16, max_test=8)
    vq = stage("tokenizer", tmp_path / "vq", data=data, **VQ, **STEPS)
    tokens = stage("tokens", tmp_path / "tokens", data=data, tokenizer=vq, mirror=True)
    small = {"model.depth": 1, "model.width": 16, "model.heads": 2}
    model = stage("train", tmp_path / "model", tokens=tokens, **small, **STEPS)
    orders = stage("orders", tmp_path / "orders", model=model, tokens=tokens, data=data, test_limit=4)
    facts, causes = read_manifest(orders), load_array(data / "train.causes.npy")
    expected = sun_first(load_array(orders / "train.order.npy")[:16], causes, Grid(4, 4), (16, 16))
    assert (facts["rows"], facts["sun_first"]) == (32, expected)
