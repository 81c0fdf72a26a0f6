"""Conditions: class labels, and a prefix of attributes and a caption that is read before the first patch.

The prefix is A attributes, then L caption tokens, each with an embedding of its place. A learned "nothing"
stands where nothing is given, so that every prefix is A + L inputs long: plain causal attention needs no
mask, and the captions of other images in a batch change nothing.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Prefix(nn.Module):
    """Embeddings of attributes and caption tokens, in this sequence."""

    def __init__(self, width: int, attributes: Sequence[int], text_vocab: int, text_length: int):
        """Tables with a row per value, the last one for "nothing"; arguments as of `TransformerConfig`."""
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
        pairs = [(table.weight, values) for table, values in zip(tables, columns, strict=False)]
        read = [F.embedding(v.where(v >= 0, len(w) - 1), w) for w, v in pairs]
        return torch.cat(read, dim=1) + self.place.weight


def read_condition(
    condition: Tensor | None, batch_size: int, sizes: Sequence[int], device: torch.device, check: bool | None
) -> Tensor:
    """A condition in the one form that models embed, (B, C) int64, -1 for nothing.

    Args:
        condition: (B,) labels, (B, up to C) columns if C > 1, -1 for nothing; or None.
        batch_size: B.
        sizes: number of values of each of the C columns: classes, attributes, caption tokens.
        device: where the model is.
        check: look for values out of range. None: where that neither waits for a GPU nor breaks a graph.

    Raises:
        ValueError: another shape, or values out of range.
    """
    if condition is None:
        return torch.full((batch_size, len(sizes)), -1, device=device)
    if check is None:
        check = condition.device.type == "cpu" and not torch.compiler.is_compiling()
    values = (condition[:, None] if condition.ndim == 1 else condition).long()
    fits = condition.ndim == 1 or (condition.ndim == 2 and len(sizes) > 1)
    fits = fits and len(values) == batch_size and values.shape[1] <= len(sizes)
    fits = fits and not condition.is_floating_point()
    if fits and check:
        limits = torch.tensor(sizes[: values.shape[1]], device=values.device)
        fits = not bool(((values < -1) | (values >= limits)).any())
    if not fits:
        several = f", or ({batch_size}, up to {len(sizes)}) within {list(sizes[:8])}" * (len(sizes) > 1)
        text = f"labels must have shape ({batch_size},) and lie in [0, {sizes[0]}) (-1 for none){several}"
        got = f"got shape {tuple(condition.shape)} with values {condition.unique().tolist()[:8]}"
        raise ValueError(f"{text}, {got}")
    return F.pad(values, (0, len(sizes) - values.shape[1]), value=-1)


def hide(condition: Tensor, attributes: int, everything: float, each: float) -> Tensor:
    """Hide conditions at random, as guidance and partial conditions need it in training.

    Args:
        condition: (B, 1 + A + L) int64; the result has -1 where hidden.
        attributes: A.
        everything: share of images that lose their whole condition.
        each: share of classes, of each attribute and of captions hidden one by one, besides.
    """
    rows, width, device = len(condition), condition.shape[1], condition.device
    if everything:
        condition = torch.where((torch.rand(rows, device=device) < everything)[:, None], -1, condition)
    if width > 1 and each:
        part = torch.arange(width, device=device).clamp(max=attributes + 1)
        hidden = torch.rand(rows, attributes + 2, device=device) < each
        condition = torch.where(hidden[:, part], -1, condition)
    return condition
