"""Readers of what the stages write: images, their tokens, and orders of those tokens."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from anyorder import files
from anyorder.contracts import Grid, class_labels, require
from anyorder.data.captions import CaptionTokenizer, Vocabulary, index_of
from anyorder.data.rows import evenly_spaced
from anyorder.orders import of_classes

Indices = Sequence[int] | np.ndarray | Tensor
TEXT = "text.json"
"""Definition of the caption tokenizer in a token cache."""
_SAMPLE = 256  # rows looked at when a cache is opened


def splits(folder: str | Path) -> list[str]:
    """Names of the splits of images or tokens: train, validation if there is one, and test."""
    cut = (Path(folder) / "validation.labels.npy").is_file()
    return ["train", *["validation"] * cut, "test"]


class _Split:
    """What all caches of images have, one split at a time, memory-mapped."""

    labels: np.ndarray  # (n,) int64, index into `classes`; 0 where there are none

    def __init__(self, folder: str | Path, split: str):
        self.folder, self.split = Path(folder), split
        self._manifest = files.read_manifest(folder)
        self.fingerprint: str = self._manifest["fingerprint"]
        self.classes: list[str] = self._manifest["classes"]  # empty if the images have none
        self.attributes: dict[str, list[str]] = self._manifest.get("attributes", {})  # name -> its values

    def _path(self, what: str) -> Path:
        return self.folder / f"{self.split}.{what}.npy"

    def _read_labels(self, n: int) -> np.ndarray:
        path, count = self._path("labels"), len(self.classes)
        labels = _read(path, (n,), "int64")
        _check_range(path, labels, "labels", max(1, count), f"there are {count} classes")
        return labels

    def __len__(self) -> int:
        return len(self.labels)

    def attribute_values(self) -> np.ndarray:
        """(n, A) int64, index into the values of each attribute, -1 for none."""
        if not self.attributes:
            return np.empty((len(self), 0), np.int64)
        path = self._path("attributes")
        columns = np.array(_read(path, (len(self), len(self.attributes)), "int64"))
        for column, (name, known) in zip(columns.T, self.attributes.items(), strict=True):
            _check_range(
                path, column, f"values of the attribute {name}", len(known), f"it has {len(known)}", -1
            )
        return columns


class ImageSet(_Split):
    """One split of a data artifact: `images` (n, H, W, 3) uint8, and their labels."""

    def __init__(self, folder: str | Path, split: str = "train"):
        """Open `{split}.images.npy` and `{split}.labels.npy`; errors as for `TokenSet`."""
        super().__init__(folder, split)
        self.images = _read(self._path("images"), ("n", "H", "W", 3), "uint8")
        self.labels = self._read_labels(len(self.images))

    def labels_of(self, attribute: str | None) -> tuple[np.ndarray, list[str]]:
        """Labels (n,) int64, -1 for none, and their names: of the class (None) or of an attribute.

        Raises:
            ValueError: there is no such attribute; the message suggests one.
        """
        if attribute is None:
            return self.labels, self.classes
        column = index_of(attribute, list(self.attributes), "attribute")
        return self.attribute_values()[:, column], self.attributes[attribute]

    def captions(self) -> list[str] | None:
        """The n captions, empty where there is none; None if the data were read without captions.

        Raises:
            ValueError: there are not as many captions as images.
        """
        path = self.folder / f"{self.split}.captions.json"
        if not path.is_file():
            return None
        texts = files.read_json(path)
        _check(len(texts) == len(self), path, f"got {len(texts)} captions, there are {len(self)} images")
        return texts

    @property
    def size(self) -> tuple[int, int]:
        """(height, width) in pixels."""
        return self.images.shape[1], self.images.shape[2]

    def batch(self, indices: Indices) -> tuple[Tensor, Tensor]:
        """Images (B, 3, H, W) float32 in [-1, 1] and labels (B,) int64 of the given rows."""
        rows = np.asarray(indices)
        pixels = torch.from_numpy(np.array(self.images[rows])).permute(0, 3, 1, 2)
        return pixels.float().div_(127.5).sub_(1).contiguous(), torch.from_numpy(np.array(self.labels[rows]))


class TokenSet(_Split):
    """One split of a token cache: tokens, labels, attributes and captions."""

    def __init__(self, folder: str | Path, split: str = "train"):
        """Open `{split}.tokens.npy` and `{split}.labels.npy`.

        Raises:
            FileNotFoundError: `folder` is no finished artifact, or has no such split.
            ValueError: a file is damaged; the message names it.
        """
        super().__init__(folder, split)
        self.grid = Grid(*self._manifest["grid"])
        self.vocab_size: int = self._manifest["vocab_size"]  # of the tokenizer's codebook
        self.tokenizer: str = self._manifest["tokenizer"]  # fingerprint of what made the tokens
        self.data: str = self._manifest["data"]  # fingerprint of the images
        path, limit = self._path("tokens"), f"the vocabulary has {self.vocab_size}"
        self.tokens = _read(path, ("n", self.grid.n))  # (n, N) in [0, vocab_size), raster order
        self.labels = self._read_labels(len(self.tokens))
        _check_range(path, _sample(self.tokens), "tokens", self.vocab_size, limit)
        text = self._manifest.get("text") or {"vocab_size": 0, "length": 0}
        self.text_vocab, self.text_length = text["vocab_size"], text["length"]  # 0 without captions
        captions = np.empty((len(self), 0))
        if self.text_length:
            path, limit = self._path("captions"), f"the vocabulary has {self.text_vocab}"
            captions = _read(path, (len(self), self.text_length))
            _check_range(path, captions, "tokens", self.text_vocab, limit, -1)
        # (n, A + L): value of each attribute, then caption tokens; -1 for none
        self.further = np.concatenate((self.attribute_values(), captions), axis=1).astype(np.int32)

    @property
    def vocabulary(self) -> Vocabulary:
        """Names of everything that a condition may hold."""
        captions = None
        if self.text_length:
            captions = CaptionTokenizer((self.folder / TEXT).read_text(encoding="utf-8"))
        return Vocabulary(self.classes, self.attributes, captions, self.text_length)

    def batch(self, indices: Indices) -> tuple[Tensor, Tensor]:
        """Tokens (B, N) int64 and the condition of the given rows.

        The condition is labels (B,) int64, or (B, 1 + A + L) if there are attributes or captions.
        """
        rows = np.asarray(indices)
        labels, further = np.array(self.labels[rows]), self.further[rows]
        if further.shape[1]:
            labels = np.concatenate((labels[:, None], further), axis=1)
        return _int64(self.tokens[rows]), torch.from_numpy(labels)

    def without(self, condition: Tensor, parts: Sequence[str]) -> Tensor:
        """A condition (see `batch`) with some parts hidden: "class", "captions", or attributes by name.

        Raises:
            ValueError: the condition has no such part; the message suggests one.
        """
        width = 1 + self.further.shape[1]
        columns = {"class": [0]} if self.classes else {}
        columns |= {name: [1 + i] for i, name in enumerate(self.attributes)}
        columns |= {"captions": list(range(1 + len(self.attributes), width))} if self.text_length else {}
        left = condition.clone().reshape(len(condition), -1)
        for part in parts:
            index_of(part, list(columns), "part of the condition")
            left[:, columns[part]] = -1
        return left.view_as(condition)


class OrderSet:
    """Orders extracted for the train split of a token cache, memory-mapped."""

    def __init__(self, folder: str | Path):
        """Open `train.order.npy` and the files beside it; errors as for `TokenSet`."""
        self.folder = Path(folder)
        manifest = files.read_manifest(folder)
        self.fingerprint: str = manifest["fingerprint"]
        self.tokens: str = manifest["tokens"]  # fingerprint of the token cache that the orders are for
        self.policy: str = manifest["policy"]  # name of the policy that extracted them
        path, rows = self.folder / "train.order.npy", manifest["rows"]
        self.orders = files.load_array(path)  # (n, N), a permutation of raster positions in every row
        shape = self.orders.shape
        _check(len(shape) == 2 and shape[0] == rows, path, f"got shape {shape}, expected {rows} rows")
        self._check_orders(path, _sample(self.orders))
        path = self.folder / "train.log_prob.npy"
        self.log_prob = files.load_array(path)  # (n, N) nats, of each token in order steps when revealed
        _check(
            self.log_prob.shape == shape, path, f"got shape {self.log_prob.shape}, the orders have {shape}"
        )
        self.class_orders = self._table("class_order.npy")  # the mean order of each class

    def _check_orders(self, path: Path, orders: np.ndarray) -> None:
        n = self.orders.shape[1]
        permuted = orders.shape[1:] == (n,) and (np.sort(orders) == np.arange(n)).all()
        _check(permuted, path, f"a row is no permutation of {n} positions")

    def held_out(self, split: str) -> Tensor:
        """Orders of images spread evenly over the test or the validation split."""
        return self._table(f"{split}.order.npy")

    def _table(self, name: str) -> Tensor:
        table = files.load_array(self.folder / name)
        self._check_orders(self.folder / name, table)
        return _int64(table)

    def __len__(self) -> int:
        return len(self.orders)

    def batch(self, indices: Indices) -> Tensor:
        """Orders (B, N) int64 of the given rows."""
        return _int64(self.orders[np.asarray(indices)])

    def of_classes(self, condition: Tensor) -> Tensor:
        """The mean order of the class of each condition, (B, N) int64; of all classes where there is none."""
        return of_classes(self.class_orders, class_labels(condition).cpu())


def check_tokenizer(tokens: TokenSet, tokenizer: str) -> None:
    """Refuse, by a ValueError, tokens of another tokenizer than the one of this fingerprint."""
    require(
        tokens.tokenizer == tokenizer,
        f"the tokens in {tokens.folder} were made by tokenizer {tokens.tokenizer}, not by {tokenizer}: "
        "tokenize the images again with this tokenizer, or use the one that made them",
    )


def check_tokens(orders: OrderSet, tokens: TokenSet) -> None:
    """Refuse orders that are for other tokens; orders may cover only the first images.

    Raises:
        ValueError: the orders were extracted from another token cache, or `tokens` is not the train split.
    """
    mend = "extract the orders again from these tokens, or use the tokens that they are for"
    require(
        orders.tokens == tokens.fingerprint,
        f"the orders in {orders.folder} are for token cache {orders.tokens}, "
        f"but {tokens.folder} is {tokens.fingerprint}: {mend}",
    )
    fits = len(orders) <= len(tokens) and orders.orders.shape[1:] == tokens.tokens.shape[1:]
    require(
        tokens.split == "train" and fits,
        f"the orders in {orders.folder} are for {orders.orders.shape} tokens of the train split, "
        f"got {tokens.tokens.shape} tokens of the {tokens.split} split: {mend}",
    )


def _read(path: Path, shape: tuple[int | str, ...], dtype: str = "") -> np.ndarray:
    """A memory map of this dtype, by default any integers, and shape, in which texts stand for any size."""
    array = files.load_array(path)
    fits = np.issubdtype(array.dtype, dtype or np.integer) and len(shape) == array.ndim
    fits = fits and all(isinstance(n, str) or n == m for n, m in zip(shape, array.shape, strict=True))
    expected = f"{dtype} ({', '.join(map(str, shape))})".lstrip()
    _check(fits, path, f"got {array.dtype} {array.shape}, expected {expected}")
    return array


def _check_range(path: Path, found: np.ndarray, what: str, end: int, limit: str, low: int = 0) -> None:
    """Values must lie in [low, end)."""
    if found.size:
        first, last = found.min(), found.max()
        _check(low <= first and last < end, path, f"it holds {what} from {first} to {last}, {limit}")


def _check(holds: bool, path: Path, what: str) -> None:
    require(holds, f"{path} is damaged: {what}; delete its folder and run the stage again")


def _sample(rows: np.ndarray) -> np.ndarray:
    """Rows spread evenly over the file, the first and the last among them."""
    return rows[evenly_spaced(_SAMPLE, len(rows))]


def _int64(rows: np.ndarray) -> Tensor:
    return torch.from_numpy(np.array(rows, np.int64))
