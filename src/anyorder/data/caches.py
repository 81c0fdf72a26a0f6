"""Readers of what the stages write: images, their tokens, and orders of those tokens."""

from pathlib import Path

import numpy as np
import torch

from anyorder import contracts, files
from anyorder.data import captions as texts
from anyorder.data import decoding
from anyorder.data.classes import index_of
from anyorder.data.rows import evenly_spaced
from anyorder.orders import of_classes

Indices = list[int] | np.ndarray | torch.Tensor
TEXT = "text.json"
"""Definition of the caption tokenizer in a token cache."""
_CAPTION = 2  # last word of the seeds by which captions are drawn, so that no other random numbers are alike
_SAMPLE = 256  # rows looked at when a cache is opened


def splits(folder: str | Path) -> list[str]:
    """Names of the splits of images or tokens: train, validation if there is one, and test."""
    cut = (Path(folder) / "validation.labels.npy").is_file()
    return ["train", *["validation"] * cut, "test"]


def without_waiting(x: torch.Tensor, device: torch.device | str) -> torch.Tensor:
    """`x` on a device; a GPU copies it from pinned memory while the host continues."""
    here = torch.device(device).type == x.device.type
    return x if here else x.pin_memory().to(device, non_blocking=True)


class _Split:
    """What all caches of images have, one split at a time, memory-mapped."""

    labels: np.ndarray  # (n,) int64, index into `classes`; 0 where there are none
    copies = 1  # rows of each image, see `ImageSet`

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
        columns = _read(path, (len(self) // self.copies, len(self.attributes)), "int64")
        for column, (name, known) in zip(columns.T, self.attributes.items(), strict=True):
            what, count = f"values of the attribute {name}", len(known)
            _check_range(path, column, what, count, f"it has {count}", -1)
        return np.concatenate([columns] * self.copies)


class ImageSet(_Split):
    """One split of a data artifact: `images` (n, H, W, 3) uint8, and their labels."""

    images: np.ndarray | decoding.Decoded  # of Decoded the rows (B,) of an index are read when it is used

    def __init__(self, folder: str | Path, split: str = "train", crops: bool = False, mirror: bool = False):
        """Open `{split}.images.npy`, or what finds the images again, and `{split}.labels.npy`.

        With `crops` there are five rows for each of n images, with `mirror` twice as many: row k * n + i is
        copy k of image i, the mirrored ones last. Errors are those of `TokenSet`.

        Raises:
            ValueError: crops of images of which the data hold the pixels.
        """
        super().__init__(folder, split)
        self.images = self._images(crops)
        self.copies = (decoding.CROPS if crops else 1) * (2 if mirror else 1)
        labels = self._read_labels(len(self.images) * (2 if mirror else 1) // self.copies)
        self.labels = np.concatenate([labels] * self.copies) if self.copies > 1 else labels

    def _images(self, crops: bool) -> np.ndarray | decoding.Decoded:
        if (facts := self._manifest.get("decoding")) is None:
            text = f"{self.folder} holds pixels, crops are cut from larger images: run data with cache=false"
            contracts.require(not crops, text)
            return _read(self._path("images"), ("n", "H", "W", 3), "uint8")
        names = files.load_array(self._path("names"))
        checksums = _read(self._path("checksums"), (len(names),), "int64")
        return decoding.opened(facts, names, checksums, crops)

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
        texts, n = files.read_json(path, largest=1 << 36), len(self) // self.copies
        _check(len(texts) == n, path, f"got {len(texts)} captions, there are {n} images")
        return texts * self.copies

    @property
    def size(self) -> tuple[int, int]:
        """(height, width) in pixels."""
        return self.images.shape[1], self.images.shape[2]

    def batch(
        self, indices: Indices, device: torch.device | str = "cpu"
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Images (B, 3, H, W) float32 in [-1, 1] on a device, labels (B,) int64 of the given rows."""
        rows, n = np.asarray(indices), len(self.images)
        # As bytes to the device: a quarter of what floats are.
        pixels = without_waiting(torch.from_numpy(np.array(self.images[rows % n])), device)
        pixels = pixels.permute(0, 3, 1, 2).float().div_(127.5).sub_(1).contiguous()
        if (rows >= n).any():
            mirrored = without_waiting(torch.from_numpy(rows >= n), device)[:, None, None, None]
            pixels = torch.where(mirrored, pixels.flip(-1), pixels)
        return pixels, torch.from_numpy(np.array(self.labels[rows]))

    def ahead(self, batches: decoding.Batches) -> decoding.Ahead:
        """Have the rows of these calls of `batch` read before they are asked for; see `decoding.ahead`."""
        return decoding.ahead(self.images, (rows % len(self.images) for rows in batches))


class TokenSet(_Split):
    """One split of a token cache: tokens, labels, attributes and captions."""

    def __init__(self, folder: str | Path, split: str = "train"):
        """Open `{split}.tokens.npy` and `{split}.labels.npy`.

        Raises:
            FileNotFoundError: `folder` is no finished artifact, or has no such split.
            ValueError: a file is damaged; the message names it.
        """
        super().__init__(folder, split)
        self.grid = contracts.Grid(*self._manifest["grid"])
        self.vocab_size: int = self._manifest["vocab_size"]  # of the tokenizer's codebook
        path, limit = self._path("tokens"), f"the vocabulary has {self.vocab_size}"
        self.tokens = _read(path, ("n", self.grid.n))  # (n, N) in [0, vocab_size), raster order
        self.labels = self._read_labels(len(self.tokens))
        _check_range(path, _sample(self.tokens), "tokens", self.vocab_size, limit)
        text = self._manifest.get("text") or {"vocab_size": 0, "length": 0}
        self.text_vocab, self.text_length = text["vocab_size"], text["length"]  # 0 without captions
        several = text.get("captions", 1)
        # (n, C, L): the captions of each image
        self.captions = np.empty((len(self), several, 0), np.int32)
        if self.text_length:
            path, limit = self._path("captions"), f"the vocabulary has {self.text_vocab}"
            shape = (several, self.text_length) if several > 1 else (self.text_length,)
            self.captions = _read(path, (len(self), *shape)).reshape(len(self), several, self.text_length)
            _check_range(path, self.captions, "tokens", self.text_vocab, limit, -1)
        # (n, A + L): value of each attribute, then tokens of the first caption; -1 for none
        self.further = np.concatenate((self.attribute_values(), self.captions[:, 0]), axis=1).astype(np.int32)

    @property
    def vocabulary(self) -> texts.Vocabulary:
        """Names of everything that a condition may hold."""
        captions = None
        if self.text_length:
            captions = texts.CaptionTokenizer((self.folder / TEXT).read_text(encoding="utf-8"))
        return texts.Vocabulary(self.classes, self.attributes, captions, self.text_length)

    def batch(
        self, indices: Indices, generator: torch.Generator | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Tokens (B, N) int64 and the condition of the given rows.

        The condition is labels (B,) int64, or (B, 1 + A + L) if there are attributes or captions. Of several
        captions it has one by the seed of `generator`, which is left as it is, or the first.
        """
        rows = np.asarray(indices)
        labels, further = np.array(self.labels[rows]), self.further[rows]
        if generator is not None and (several := self.captions.shape[1]) > 1:
            draw = np.random.default_rng((generator.initial_seed(), _CAPTION))
            further[:, -self.text_length :] = self.captions[rows, draw.integers(several, size=len(rows))]
        if further.shape[1]:
            labels = np.concatenate((labels[:, None], further), axis=1)
        return _int64(self.tokens[rows]), torch.from_numpy(labels)

    def without(self, condition: torch.Tensor, parts: tuple[str, ...]) -> torch.Tensor:
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
        self.policy_settings = manifest.get("config", {}).get("policy", {})
        self.scorer = manifest.get("scorer", {})  # training behind the model that scored
        path, rows = self.folder / "train.order.npy", manifest["rows"]
        self.orders = _read(path, (rows, "N"))  # (n, N), a permutation of raster positions in every row
        self._check_orders(path, _sample(self.orders))
        path = self.folder / "train.log_prob.npy"
        # (n, N) nats, of each token in order steps when revealed
        self.log_prob = _read(path, self.orders.shape, "float32")
        self.class_orders = self._table("class_order.npy")  # the mean order of each class
        path = self.folder / "train.row.npy"  # which rows of the tokens they are of; older caches: the first
        self.rows = _read(path, (rows,)) if path.is_file() else np.arange(rows)

    def _check_orders(self, path: Path, orders: np.ndarray) -> None:
        n = self.orders.shape[1]
        permuted = orders.shape[1:] == (n,) and (np.sort(orders) == np.arange(n)).all()
        _check(permuted, path, f"a row is no permutation of {n} positions")

    def held_out(self, split: str) -> torch.Tensor:
        """Orders of images spread evenly over the test or the validation split."""
        return self._table(f"{split}.order.npy")

    def _table(self, name: str) -> torch.Tensor:
        table = files.load_array(self.folder / name)
        self._check_orders(self.folder / name, table)
        return _int64(table)

    def __len__(self) -> int:
        return len(self.orders)

    def batch(self, indices: Indices) -> torch.Tensor:
        """Orders (B, N) int64 of the given rows."""
        return _int64(self.orders[np.asarray(indices)])

    def of_classes(self, condition: torch.Tensor) -> torch.Tensor:
        """The mean order of the class of each condition, (B, N) int64; of all classes where there is none."""
        return of_classes(self.class_orders, contracts.class_labels(condition).cpu())


def check_tokens(orders: OrderSet, tokens: TokenSet) -> None:
    """Refuse orders that are for other tokens; orders may cover only some images.

    Raises:
        ValueError: the orders were extracted from another token cache, or `tokens` is not the train split.
    """
    mend = "extract the orders again from these tokens, or use the tokens that they are for"
    contracts.require(
        orders.tokens == tokens.fingerprint,
        f"the orders in {orders.folder} are for token cache {orders.tokens}, "
        f"but {tokens.folder} is {tokens.fingerprint}: {mend}",
    )
    fits = len(orders) <= len(tokens) and orders.orders.shape[1:] == tokens.tokens.shape[1:]
    contracts.require(
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
    contracts.require(holds, f"{path} is damaged: {what}; delete its folder and run the stage again")


def _sample(rows: np.ndarray) -> np.ndarray:
    """Rows spread evenly over the file, the first and the last among them."""
    return rows[evenly_spaced(_SAMPLE, len(rows))]


def _int64(rows: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.array(rows, np.int64))
