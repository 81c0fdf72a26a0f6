"""Readers of data, token and order artifacts: what they give, and what they refuse."""

import json

import numpy as np
import pytest
import torch

from anyorder.contracts import Grid
from anyorder.data.caches import ImageSet, OrderSet, TokenSet, check_tokens
from anyorder.files import fingerprint, save_array
from anyorder.stages.artifacts import Artifact

N, GRID, VOCAB = 10, Grid(2, 3), 50


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def write(folder, arrays, **facts):
    """A finished artifact, replacing what was there."""
    artifact = Artifact(folder, "some stage", {"run": str(folder)}, {})
    for name, array in arrays.items():
        save_array(folder / f"{name}.npy", array)
    artifact.finish(**facts)
    return folder


@pytest.fixture
def data(tmp_path):
    images = rng().integers(0, 256, (N, 4, 6, 3)).astype(np.uint8)
    images[0, 0, 0] = (0, 51, 255)
    labels = np.arange(N) % 2
    return write(tmp_path / "data", {"train.images": images, "train.labels": labels}, classes=["a", "b"])


def token_arrays(split="train", n=N, seed=0):
    tokens = rng(seed).integers(0, VOCAB, (n, GRID.n)).astype(np.uint16)
    return {f"{split}.tokens": tokens, f"{split}.labels": np.zeros(n, np.int64)}


def write_tokens(folder, arrays=None):
    arrays = arrays or {**token_arrays(), **token_arrays("test", 4)}
    facts = {"classes": [], "grid": [2, 3], "vocab_size": VOCAB, "tokenizer": "tok", "data": "dat"}
    return write(folder, arrays, **facts)


@pytest.fixture
def tokens(tmp_path):
    return write_tokens(tmp_path / "tokens")


def order_arrays(n=N):
    order = np.stack([rng(i).permutation(GRID.n) for i in range(n)]).astype(np.uint16)
    return {
        "train.order": order,
        "train.log_prob": -rng().random((n, GRID.n)).astype(np.float32),
        "test.order": order[:2],
        "class_order": order[1:3],
    }


def write_orders(folder, tokens, arrays=None, rows=N):
    arrays = arrays or order_arrays()
    return write(folder, arrays, tokens=fingerprint(tokens), rows=rows, policy="confidence")


def test_image_set(data):
    images = ImageSet(data)
    assert (len(images), images.size, images.classes) == (N, (4, 6), ["a", "b"])
    assert isinstance(images.images, np.memmap)
    assert images.fingerprint == fingerprint(data)
    for indices in ([0, 3, 3], np.array([0, 3, 3]), torch.tensor([0, 3, 3])):
        pixels, labels = images.batch(indices)
        assert pixels.shape == (3, 3, 4, 6)
        assert pixels.dtype == torch.float32
        assert pixels.is_contiguous()
        torch.testing.assert_close(pixels[0, :, 0, 0], torch.tensor([-1.0, -0.6, 1.0]))
        assert torch.equal(pixels[1], pixels[2])
        assert labels.tolist() == [0, 1, 1]
        assert labels.dtype == torch.int64
    pixels.zero_()
    labels.zero_()
    assert ImageSet(data).batch([1])[1].item() == 1, "batches are copies"


def test_token_set(tokens):
    train, test = TokenSet(tokens), TokenSet(tokens, "test")
    assert (len(train), len(test), train.grid, train.vocab_size) == (N, 4, GRID, VOCAB)
    assert train.classes == []
    batch, labels = train.batch([9, 0])
    assert batch.dtype == labels.dtype == torch.int64
    assert batch.tolist() == token_arrays()["train.tokens"][[9, 0]].tolist()


def test_large_vocabulary_is_read_from_int32(tmp_path):
    arrays = {"train.tokens": np.full((2, 6), 69_999, np.int32), "train.labels": np.zeros(2, np.int64)}
    facts = {"classes": [], "grid": [2, 3], "vocab_size": 70_000, "tokenizer": "t", "data": "d"}
    folder = write(tmp_path / "tokens", arrays, **facts)
    assert (TokenSet(folder).batch(torch.tensor([1]))[0] == 69_999).all()


def test_order_set(tmp_path, tokens):
    orders = OrderSet(write_orders(tmp_path / "orders", tokens))
    assert (len(orders), orders.policy, orders.tokens) == (N, "confidence", fingerprint(tokens))
    batch = orders.batch(torch.tensor([4, 2]))
    assert batch.dtype == torch.int64
    assert torch.equal(batch.sort(dim=1).values, torch.arange(GRID.n).expand(2, -1))
    assert orders.log_prob.dtype == np.float32
    assert torch.equal(orders.held_out("test"), orders.batch([0, 1]))
    assert torch.equal(orders.of_classes(torch.tensor([1, 0, 1])), orders.batch([2, 1, 2]))


def test_matching_caches_pass(tmp_path, tokens):
    check_tokens(OrderSet(write_orders(tmp_path / "orders", tokens)), TokenSet(tokens))


def test_other_tokens_are_refused(tmp_path, tokens):
    orders = OrderSet(write_orders(tmp_path / "orders", tokens))
    other = TokenSet(write_tokens(tmp_path / "other", token_arrays(seed=1)))
    with pytest.raises(
        ValueError, match=rf"token cache {orders.tokens}, but .*other is {other.fingerprint}: extract"
    ):
        check_tokens(orders, other)


def test_another_split_is_refused(tmp_path, tokens):
    orders = OrderSet(write_orders(tmp_path / "orders", tokens))
    with pytest.raises(
        ValueError, match=r"of the train split, got \(4, 6\) tokens of the test split: extract"
    ):
        check_tokens(orders, TokenSet(tokens, "test"))
    more = OrderSet(write_orders(tmp_path / "more", tokens, order_arrays(11), rows=11))
    with pytest.raises(ValueError, match=r"are for \(11, 6\) tokens"):
        check_tokens(more, TokenSet(tokens))


def test_orders_may_cover_only_the_first_images(tmp_path, tokens):
    fewer = OrderSet(write_orders(tmp_path / "fewer", tokens, order_arrays(3), rows=3))
    check_tokens(fewer, TokenSet(tokens))
    assert fewer.batch([2]).shape == (1, 6)


def test_unfinished_and_missing(tmp_path, tokens, data):
    for reader in (ImageSet, TokenSet, OrderSet):
        with pytest.raises(FileNotFoundError, match="not a finished artifact"):
            reader(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"valid\.tokens\.npy does not exist"):
        TokenSet(tokens, "valid")
    with pytest.raises(FileNotFoundError, match=r"test\.images\.npy does not exist"):
        ImageSet(data, "test")


@pytest.mark.parametrize(
    ("name", "damage", "message"),
    [
        ("train.images", lambda a: a[..., :2], r"train\.images\.npy is damaged: got uint8 \(10, 4, 6, 2\)"),
        ("train.images", lambda a: a.astype(np.float32), r"train\.images\.npy is damaged: got float32"),
        ("train.labels", lambda a: a[:-1], r"train\.labels\.npy is damaged: got int64 \(9,\)"),
        ("train.labels", lambda a: a.astype(np.int32), r"train\.labels\.npy is damaged: got int32"),
        (
            "train.labels",
            lambda a: a + 1,
            r"labels\.npy is damaged: it holds labels from 1 to 2, .* 2 cl",
        ),
        ("train.labels", lambda a: a - 1, r"labels\.npy is damaged: it holds labels from -1 to 0"),
    ],
)
def test_damaged_images(data, name, damage, message):
    save_array(data / f"{name}.npy", damage(np.load(data / f"{name}.npy")))
    with pytest.raises(ValueError, match=message):
        ImageSet(data)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda a: a[:, :-1], r"got uint16 \(10, 5\), expected \(n, 6\)"),
        (lambda a: a.astype(np.float32), "got float32"),
        (lambda a: np.where(a == a[0, 0], VOCAB, a), "to 50, the vocabulary has 50"),
        (lambda a: a.astype(np.int32) - 60, "tokens from -"),
    ],
)
def test_damaged_tokens(tokens, damage, message):
    path = tokens / "train.tokens.npy"
    save_array(path, damage(np.load(path)))
    with pytest.raises(ValueError, match=rf"train\.tokens\.npy is damaged: .*{message}.*run the stage again"):
        TokenSet(tokens)


def twice(order):
    order = order.copy()
    order[-1, 0] = order[-1, 1]
    return order


@pytest.mark.parametrize(
    ("name", "damage", "message"),
    [
        ("order", twice, "a row is no permutation of 6 positions"),
        ("order", lambda a: a + 1, "a row is no permutation of 6 positions"),
        ("order", lambda a: a[:-1], r"got uint16 \(9, 6\), expected \(10, N\)"),
        ("order", lambda a: a[0], r"got uint16 \(6,\), expected \(10, N\)"),
        ("log_prob", lambda a: a[:, 1:], r"got float32 \(10, 5\), expected float32 \(10, 6\)"),
    ],
)
def test_damaged_orders(tmp_path, tokens, name, damage, message):
    folder = write_orders(tmp_path / "orders", tokens)
    path = folder / f"train.{name}.npy"
    save_array(path, damage(np.load(path)))
    with pytest.raises(ValueError, match=rf"train\.{name}\.npy is damaged: {message}"):
        OrderSet(folder)


def test_truncated_file(tokens):
    path = tokens / "train.tokens.npy"
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(ValueError, match=r"train\.tokens\.npy is damaged"):
        TokenSet(tokens)


def test_many_rows_are_sampled_with_both_ends(tmp_path):
    arrays = token_arrays(n=5000)
    for row in (0, 4999):
        bad = {k: v.copy() for k, v in arrays.items()}
        bad["train.tokens"][row, 3] = VOCAB
        with pytest.raises(ValueError, match="vocabulary has 50"):
            TokenSet(write_tokens(tmp_path / f"bad{row}", bad))


def test_empty_split(tmp_path):
    folder = write_tokens(tmp_path / "tokens", token_arrays(n=0))
    assert len(TokenSet(folder)) == 0
    assert json.loads((folder / "manifest.json").read_text())["vocab_size"] == VOCAB
