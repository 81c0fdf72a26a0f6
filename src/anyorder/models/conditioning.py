"""What a picture is asked to be, beside its class: attributes and a caption, read before the first patch.

They are a prefix of the decoder's own sequence: A attributes, then L caption tokens, each at a place of its
own. Where nothing is given stands a learned "nothing", so that every prefix is A + L inputs long: plain
causal attention does, without a mask, and how other pictures of a batch are captioned changes nothing.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn


class Prefix(nn.Module):
    """Embeddings of attributes and caption tokens, in this sequence."""

    def __init__(self, width: int, attributes: Sequence[int], text_vocab: int, text_length: int):
        """Tables of `width`: a row for each value, and a last one for "nothing".

        Args:
            width: D.
            attributes: number of values of each attribute.
            text_vocab: number of caption tokens; 0 takes no captions.
            text_length: most tokens of a caption, L.
        """
        super().__init__()
        self.sizes = [*attributes, *[text_vocab] * text_length]
        self.attributes = nn.ModuleList(nn.Embedding(n + 1, width) for n in attributes)
        self.text = nn.Embedding(text_vocab + 1, width) if text_length else None
        self.place = nn.Embedding(len(self.sizes), width)

    def forward(self, condition: Tensor) -> Tensor:
        """Values (B, A + L) int64, -1 for nothing, to inputs (B, A + L, D)."""
        columns = condition.split([1] * len(self.attributes) + [len(self.sizes) - len(self.attributes)], 1)
        tables = [*self.attributes, *([self.text] if self.text is not None else [])]
        # Without captions there is neither a table nor anything in the last columns.
        read = [_embed(table, values) for table, values in zip(tables, columns, strict=False)]
        return torch.cat(read, dim=1) + self.place.weight


def _embed(table: nn.Module, values: Tensor) -> Tensor:
    assert isinstance(table, nn.Embedding)
    return table(torch.where(values < 0, table.num_embeddings - 1, values))


def hide(condition: Tensor, attributes: int, everything: float, each: float) -> Tensor:
    """Hide conditions at random, as guidance and partial conditions need it in training.

    Args:
        condition: (B, 1 + A + L) int64.
        attributes: A.
        everything: share of images that lose their whole condition.
        each: share of classes, of each attribute and of captions hidden on their own, besides.

    Returns:
        (B, 1 + A + L) int64, -1 where hidden.
    """
    rows, width, device = len(condition), condition.shape[1], condition.device
    if everything:
        condition = torch.where((torch.rand(rows, device=device) < everything)[:, None], -1, condition)
    if width > 1 and each:
        part = torch.arange(width, device=device).clamp(max=attributes + 1)
        hidden = torch.rand(rows, attributes + 2, device=device) < each
        condition = torch.where(hidden[:, part], -1, condition)
    return condition
