"""Readers of what the stages write: images, their tokens, and orders of those tokens."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from anyorder.contracts import Grid, class_labels
from anyorder.data.captions import CaptionTokenizer, Vocabulary, index_of
from anyorder.files import load_array, read_json, read_manifest
from anyorder.orders import of_classes

Indices = Sequence[int] | np.ndarray | Tensor
TEXT = "text.json"
"""Definition of the caption tokenizer in a token cache."""
_SAMPLE = 256  # rows looked at when a cache is opened


class _Split:
    """What all caches of images have, one split at a time, memory-mapped.

    Attributes:
        labels: (n,) int64, index into `classes`; 0 where there are none.
        classes: class names, empty if the images have none.
        attributes: name of each further attribute -> its values.
        fingerprint: of the artifact.
    """

    def __init__(self, folder: str | Path, split: str, what: str):
        self.folder, self.split = Path(folder), split
        self._manifest = read_manifest(folder)
        self.fingerprint: str = self._manifest["fingerprint"]
        self.classes: list[str] = self._manifest["classes"]
        self.attributes: dict[str, list[str]] = self._manifest.get("attributes", {})
        self._path = self.folder / f"{split}.{what}.npy"
        self._rows = load_array(self._path)
        self.labels = _read_labels(self.folder, split, len(self), len(self.classes))

    def __len__(self) -> int:
        return len(self._rows)

    def attribute_values(self) -> np.ndarray:
        """(n, A) int64, index into the values of each attribute, -1 for none."""
        return _read_columns(self.folder, self.split, len(self), [len(v) for v in self.attributes.values()])


class ImageSet(_Split):
    """One split of a data artifact.

    Attributes:
        images: (n, H, W, 3) uint8.
    """

    def __init__(self, folder: str | Path, split: str = "train"):
        """Open `{split}.images.npy` and `{split}.labels.npy`; errors as for `TokenSet`."""
        super().__init__(folder, split, "images")
        self.images = found = self._rows
        if found.ndim != 4 or found.shape[3] != 3 or found.dtype != np.uint8:
            raise _damaged(self._path, f"got {found.dtype} {found.shape}, expected uint8 (n, H, W, 3)")

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
        texts = read_json(path) if path.is_file() else None
        if texts is not None and len(texts) != len(self):
            raise _damaged(path, f"got {len(texts)} captions, there are {len(self)} images")
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
    """One split of a token cache.

    Attributes:
        tokens: (n, N) uint16 or int32, in [0, vocab_size), raster order.
        further: (n, A + L) int32, value of each attribute, then caption tokens; -1 for none.
        text_vocab: number of caption tokens, 0 if there are no captions.
        text_length: L.
        grid: the grid of the N positions.
        vocab_size: size of the tokenizer's codebook.
        tokenizer: fingerprint of the tokenizer that made the tokens.
        data: fingerprint of the data artifact that was tokenized.
    """

    def __init__(self, folder: str | Path, split: str = "train"):
        """Open `{split}.tokens.npy` and `{split}.labels.npy`.

        Raises:
            FileNotFoundError: `folder` is no finished artifact, or has no such split.
            ValueError: a file is damaged; the message names it.
        """
        super().__init__(folder, split, "tokens")
        self.tokens = found = self._rows
        self.grid = Grid(*self._manifest["grid"])
        self.vocab_size: int = self._manifest["vocab_size"]
        self.tokenizer: str = self._manifest["tokenizer"]
        self.data: str = self._manifest["data"]
        if found.ndim != 2 or found.shape[1] != self.grid.n or found.dtype.kind not in "iu":
            raise _damaged(self._path, f"got {found.dtype} {found.shape}, expected (n, {self.grid.n})")
        sample = _sample(found)
        if sample.size and not 0 <= sample.min() <= sample.max() < self.vocab_size:
            held = f"tokens from {sample.min()} to {sample.max()}"
            raise _damaged(self._path, f"it holds {held}, the vocabulary has {self.vocab_size}")
        text = self._manifest.get("text") or {"vocab_size": 0, "length": 0}
        self.text_vocab, self.text_length = text["vocab_size"], text["length"]
        columns = [self.attribute_values()]
        if self.text_length:
            columns.append(_read_captions(self.folder, split, len(self), self.text_vocab, self.text_length))
        self.further = np.concatenate(columns, axis=1).astype(np.int32)

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
        tokens = self.tokens[rows].astype(np.int64)
        labels, further = np.array(self.labels[rows]), self.further[rows]
        if further.shape[1]:
            labels = np.concatenate((labels[:, None], further), axis=1)
        return torch.from_numpy(np.asarray(tokens)), torch.from_numpy(labels)

    def without(self, condition: Tensor, parts: Sequence[str]) -> Tensor:
        """A condition (see `batch`) with some parts hidden: "class", "captions", or attributes by name.

        Raises:
            ValueError: the condition has no such part; the message suggests one.
        """
        width = 1 + self.further.shape[1]
        columns = {"class": [0], **{name: [1 + i] for i, name in enumerate(self.attributes)}}
        columns |= {"captions": list(range(len(columns), width))} if self.text_length else {}
        left = condition.clone().reshape(len(condition), -1)
        for part in parts:
            index_of(part, list(columns), "part of the condition")
            left[:, columns[part]] = -1
        return left.view_as(condition)


class OrderSet:
    """Orders extracted for the train split of a token cache, memory-mapped.

    Attributes:
        orders: (n, N) uint16, a permutation of raster positions in every row.
        log_prob: (n, N) float32, nats, of each token in order steps when it was revealed.
        test_orders: (m, N) int64 tensor, orders of m images spread evenly over the test split.
        class_orders: (classes, N) int64 tensor, the mean order of each class.
        tokens: fingerprint of the token cache that the orders are for.
        policy: name of the policy that extracted them.
        fingerprint: of this cache.
    """

    def __init__(self, folder: str | Path):
        """Open `train.order.npy` and `train.log_prob.npy`.

        Raises:
            FileNotFoundError: `folder` is no finished artifact.
            ValueError: a file is damaged; the message names it.
        """
        self.folder = Path(folder)
        manifest = read_manifest(folder)
        self.fingerprint: str = manifest["fingerprint"]
        self.tokens: str = manifest["tokens"]
        self.policy: str = manifest["policy"]
        path = self.folder / "train.order.npy"
        self.orders = load_array(path)
        if self.orders.ndim != 2 or len(self.orders) != manifest["rows"]:
            raise _damaged(path, f"got shape {self.orders.shape}, expected {manifest['rows']} rows")
        if (np.sort(_sample(self.orders), axis=1) != np.arange(self.orders.shape[1])).any():
            raise _damaged(path, f"a row is no permutation of {self.orders.shape[1]} positions")
        path = self.folder / "train.log_prob.npy"
        self.log_prob = load_array(path)
        if self.log_prob.shape != self.orders.shape:
            raise _damaged(path, f"got shape {self.log_prob.shape}, the orders have {self.orders.shape}")
        self.test_orders = self._small("test.order.npy")
        self.class_orders = self._small("class_order.npy")

    def _small(self, name: str) -> Tensor:
        """A short table of orders, (n, N) int64."""
        table = np.array(load_array(self.folder / name)).astype(np.int64)
        if table.shape[1:] != self.orders.shape[1:] or (np.sort(table) != np.arange(table.shape[-1])).any():
            raise _damaged(self.folder / name, f"a row is no permutation of {self.orders.shape[1]} positions")
        return torch.from_numpy(table)

    def __len__(self) -> int:
        return len(self.orders)

    def batch(self, indices: Indices) -> Tensor:
        """Orders (B, N) int64 of the given rows."""
        return torch.from_numpy(np.asarray(self.orders[np.asarray(indices)].astype(np.int64)))

    def of_classes(self, condition: Tensor) -> Tensor:
        """The mean order of the class of each condition, (B, N) int64; of all classes where there is none."""
        return of_classes(self.class_orders, class_labels(condition).cpu())


def check_tokenizer(tokens: TokenSet, tokenizer: str) -> None:
    """Refuse tokens that another tokenizer made.

    Args:
        tokens: the token cache.
        tokenizer: fingerprint of the tokenizer in use.

    Raises:
        ValueError: the fingerprints differ.
    """
    if tokens.tokenizer != tokenizer:
        raise ValueError(
            f"the tokens in {tokens.folder} were made by tokenizer {tokens.tokenizer}, not by {tokenizer}: "
            "tokenize the images again with this tokenizer, or use the one that made them"
        )


def check_tokens(orders: OrderSet, tokens: TokenSet) -> None:
    """Refuse orders that are for other tokens; orders may cover only the first images.

    Raises:
        ValueError: the orders were extracted from another token cache, or `tokens` is not the train split.
    """
    mend = "extract the orders again from these tokens, or use the tokens that they are for"
    if orders.tokens != tokens.fingerprint:
        raise ValueError(
            f"the orders in {orders.folder} are for token cache {orders.tokens}, "
            f"but {tokens.folder} is {tokens.fingerprint}: {mend}"
        )
    fits = len(orders) <= len(tokens) and orders.orders.shape[1:] == tokens.tokens.shape[1:]
    if tokens.split != "train" or not fits:
        raise ValueError(
            f"the orders in {orders.folder} are for {orders.orders.shape} tokens of the train split, "
            f"got {tokens.tokens.shape} tokens of the {tokens.split} split: {mend}"
        )


def _read_labels(folder: Path, split: str, rows: int, classes: int) -> np.ndarray:
    path = folder / f"{split}.labels.npy"
    labels = load_array(path)
    if labels.shape != (rows,) or labels.dtype != np.int64:
        raise _damaged(path, f"got {labels.dtype} {labels.shape}, expected int64 ({rows},)")
    if rows and not 0 <= labels.min() <= labels.max() < max(1, classes):
        raise _damaged(path, f"labels from {labels.min()} to {labels.max()}, there are {classes} classes")
    return labels


def _read_columns(folder: Path, split: str, rows: int, sizes: list[int]) -> np.ndarray:
    """Values (rows, A) int64 of the attributes."""
    if not sizes:
        return np.empty((rows, 0), np.int64)
    path = folder / f"{split}.attributes.npy"
    values = np.array(load_array(path))
    if values.shape != (rows, len(sizes)) or values.dtype != np.int64:
        raise _damaged(path, f"got {values.dtype} {values.shape}, expected int64 ({rows}, {len(sizes)})")
    if (values < -1).any() or (values >= np.array(sizes)).any():
        raise _damaged(path, f"there are {sizes} values of the attributes, it holds others")
    return values


def _read_captions(folder: Path, split: str, rows: int, vocab: int, length: int) -> np.ndarray:
    """Caption tokens (rows, L) int64."""
    path = folder / f"{split}.captions.npy"
    tokens = np.array(load_array(path)).astype(np.int64)
    if tokens.shape != (rows, length) or (tokens.size and not -1 <= tokens.min() <= tokens.max() < vocab):
        raise _damaged(path, f"got {tokens.shape}, expected ({rows}, {length}) tokens in [0, {vocab}) or -1")
    return tokens


def _sample(rows: np.ndarray) -> np.ndarray:
    """Rows spread evenly over the file, the first and the last among them."""
    count = min(len(rows), _SAMPLE)
    return rows[np.linspace(0, max(0, len(rows) - 1), count, dtype=np.int64)]


def _damaged(path: Path, what: str) -> ValueError:
    return ValueError(f"{path} is damaged: {what}; delete its folder and run the stage again")
