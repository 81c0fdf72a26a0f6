"""Captions as tokens, and the names of everything that a condition may hold."""

import dataclasses
from collections import abc
from functools import cached_property
from typing import Any

import numpy as np
import torch

from anyorder.contracts import at_least
from anyorder.data.classes import index_of

_UNKNOWN = "[UNK]"


@dataclasses.dataclass
class TextConfig:
    """How captions become tokens."""

    vocab_size: int = 512
    """Largest number of different caption tokens, at least 2."""
    length: int = 16
    """Largest number of tokens in a caption; longer captions are cut."""
    captions: int = 10
    """Where images have several captions, keep at most so many of each: training takes one at random at each
    step, all else the first."""

    def __post_init__(self) -> None:
        at_least(2, self, "vocab_size")
        at_least(1, self, "length", "captions")


class CaptionTokenizer:
    """Byte-pair encoding of lower-case text.

    Raises:
        ImportError: when it learns or encodes, and the library `tokenizers` is not installed.
    """

    def __init__(self, definition: str):
        """From JSON as `train` makes it and the `tokenizers` library reads it."""
        self.definition = definition

    @classmethod
    def train(cls, captions: abc.Sequence[str], vocab_size: int) -> "CaptionTokenizer":
        """Learn at most `vocab_size` tokens; the same captions give the same ones."""
        library = _library()
        tokenizer = library.Tokenizer(library.models.BPE(unk_token=_UNKNOWN))
        normalizers, split = library.normalizers, library.pre_tokenizers
        tokenizer.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])
        # Metaspace marks where words begin, so that "red" is another token than the end of "tired".
        words = [split.WhitespaceSplit(), split.Punctuation(), split.Metaspace()]
        tokenizer.pre_tokenizer = split.Sequence(words)
        options = {"special_tokens": [_UNKNOWN], "show_progress": False, "limit_alphabet": vocab_size - 1}
        trainer = library.trainers.BpeTrainer(vocab_size=vocab_size, **options)
        tokenizer.train_from_iterator(map(_encodable, captions), trainer)
        return cls(tokenizer.to_str())

    @cached_property
    def _tokenizer(self) -> Any:
        return _library().Tokenizer.from_str(self.definition)

    @property
    def vocab_size(self) -> int:
        """Number of tokens."""
        return self._tokenizer.get_vocab_size()

    def encode(self, captions: abc.Sequence[str], length: int) -> np.ndarray:
        """Tokens (n, length) int64, cut or filled with -1; an empty caption is none at all."""
        tokens = np.full((len(captions), length), -1, np.int64)
        encoded = self._tokenizer.encode_batch(list(map(_encodable, captions)))
        for row, found in zip(tokens, encoded, strict=True):
            ids = found.ids[:length]
            row[: len(ids)] = ids
        return tokens


def _encodable(text: str) -> str:
    """The text with "?" for lone surrogates, such as broken JSON holds."""
    return text.encode(errors="replace").decode()


def several(captions: abc.Sequence[str], count: int) -> list[str]:
    """`count` captions of each text with one in each line; of fewer lines each again, in turn."""
    split = (text.split("\n") for text in captions)
    return [lines[i % len(lines)] for lines in split for i in range(count)]


def _library() -> Any:
    try:
        import tokenizers
    except ImportError as e:
        raise ImportError(f"captions need the library tokenizers ({e}): pip install 'anyorder[text]'") from e
    return tokenizers


@dataclasses.dataclass
class Vocabulary:
    """Names of everything that a condition may hold."""

    classes: list[str] = dataclasses.field(default_factory=list)
    attributes: dict[str, list[str]] = dataclasses.field(default_factory=dict)  # name -> values
    captions: CaptionTokenizer | None = None
    length: int = 0  # largest number of tokens in a caption

    def condition(
        self,
        n: int,
        labels: abc.Sequence[int] | None = None,
        attributes: abc.Mapping[str, abc.Sequence[str | None]] | None = None,
        prompts: abc.Sequence[str] | None = None,
    ) -> torch.Tensor:
        """The condition of n images, (n, 1 + A + L) int64, -1 for whatever is not given.

        Args:
            n, labels: number of images, and class index of each.
            attributes: name of an attribute -> the value for each image, None for none.
            prompts: caption of each; an empty one is none.

        Raises:
            ValueError: unknown attribute or value (with a suggestion), or prompts without captions.
            ImportError: prompts without the library `tokenizers`.
        """
        condition = torch.full((n, 1 + len(self.attributes) + self.length), -1)
        if labels is not None:
            condition[:, 0] = torch.as_tensor(labels)
        for name, values in (attributes or {}).items():
            column = 1 + index_of(name, list(self.attributes), "attribute")
            known = self.attributes[name]
            codes = [-1 if value is None else index_of(str(value), known, name) for value in values]
            condition[:, column] = torch.as_tensor(codes)
        if prompts is not None:
            if self.captions is None:
                mend = "leave the prompt out, or train one on data with captions=COLUMN"
                raise ValueError(f"prompts need a model that was trained with captions: {mend}")
            tokens = self.captions.encode(prompts, self.length)
            condition[:, 1 + len(self.attributes) :] = torch.from_numpy(tokens)
        return condition
