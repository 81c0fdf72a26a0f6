"""MaskGIT's VQGAN tokenizer, as ARPG and others use it: reading its configuration off a file."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from anyorder.adapters.layers import count, shape_of
from anyorder.tokenizers.maskgit_vq import MaskGITVQConfig


def config_of(tensors: Mapping[str, Tensor]) -> MaskGITVQConfig:
    """The configuration of a file.

    Raises:
        ValueError: a tensor that tells it is missing or of another rank.
    """
    channels = shape_of(tensors, "encoder.conv_in.weight", 4)[0]
    levels = range(count(tensors, "encoder.down."))
    widths = [shape_of(tensors, f"encoder.down.{i}.block.0.conv1.weight", 4)[0] for i in levels]
    vocab_size, code_dim = shape_of(tensors, "quantize.embedding.weight")
    return MaskGITVQConfig(
        channels=channels,
        multipliers=tuple(width // channels for width in widths),
        res_blocks=count(tensors, "encoder.mid."),
        vocab_size=vocab_size,
        code_dim=code_dim,
    )
