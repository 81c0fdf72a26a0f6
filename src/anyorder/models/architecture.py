"""The size of an any-order transformer and its switches."""

from dataclasses import dataclass
from typing import Literal, get_args, get_type_hints

from anyorder.contracts import Grid, at_least, require


@dataclass
class Architecture:
    """Size and switches that users choose."""

    depth: int = 6
    """Number of blocks, >= 1."""
    width: int = 256
    """Width D of every hidden state, a multiple of 4 * heads."""
    heads: int = 4
    """Number of attention heads, H."""
    next_position: Literal["relative", "absolute", "none"] = "relative"
    """How an input says where the next patch is: by displacement (the paper), position, or not (ablation)."""
    current_position: Literal["absolute", "none"] = "absolute"
    """How an input says where its own patch is: by its position, or not at all (ablation)."""
    class_at: Literal["first", "every"] = "first"
    """Which inputs contain the class: the first alone, as in the paper, or every one."""
    rotary: bool = False
    """Rotate queries by the next position and keys by the current one (2-D RoPE), besides the sums."""
    qk_norm: bool = False
    """RMS-normalise queries and keys of each head."""
    dropout: float = 0.0
    """Dropout probability on residual branches in training, in [0, 1)."""
    token_dropout: float = 0.0
    """Share of input tokens hidden in training, in [0, 1); their positions stay."""
    label_dropout: float = 0.1
    """Share of images whose whole condition is hidden in training, in [0, 1); guidance needs more than 0."""
    part_dropout: float = 0.3
    """Share of each part of a several-part condition hidden in training, in [0, 1); any may be left out."""
    location: bool = False
    """Add a head that predicts the next position, besides the token: order and content as one model."""
    location_gradient: bool = True
    """Whether the location head's loss trains the whole model, or with false the head alone."""
    checkpointing: bool = False
    """Recompute blocks in the backward pass: about `depth` times less memory, a third more time."""

    def __post_init__(self) -> None:
        at_least(1, self, "depth", "width", "heads")
        whole = self.width % (4 * self.heads) == 0
        require(whole, f"width must be a multiple of 4 * heads = {4 * self.heads}, got {self.width}")
        for name in ("dropout", "token_dropout", "label_dropout", "part_dropout"):
            share = getattr(self, name)
            require(0 <= share < 1, f"{name} must lie in [0, 1), got {share}")
        hints = get_type_hints(Architecture)
        for name in ("next_position", "current_position", "class_at"):
            value, allowed = getattr(self, name), get_args(hints[name])
            listed = f"{', '.join(allowed[:-1])} or {allowed[-1]}"
            require(value in allowed, f"{name} must be {listed}, got '{value}'")
        both = "none" not in (self.next_position, self.current_position) or not self.rotary
        require(both, "rotary tells both positions: it cannot be combined with a position of 'none'")


@dataclass
class TransformerConfig(Architecture):
    """An architecture, and the sizes that follow from the tokens it is trained on."""

    vocab_size: int = 512
    """V, the tokenizer's codebook size."""
    grid: tuple[int, int] = (8, 8)
    """Rows and columns of patches in training."""
    num_classes: int = 0
    """Number of class labels; 0 is unconditional."""
    attributes: tuple[int, ...] = ()
    """Number of values of each attribute of an image."""
    text_vocab: int = 0
    """Number of different caption tokens; 0 takes no captions."""
    text_length: int = 0
    """Most tokens of a caption."""
    grouped: bool = False
    """Whether positions of one step are predicted together, each aware of the others (`models.groups`)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        text = "attributes must have >= 1 value each, text_vocab and text_length both be 0 or >= 1, got "
        text += f"{list(self.attributes)}, {self.text_vocab} and {self.text_length}"
        require(min(self.attributes, default=1) >= 1, text)
        require((self.text_vocab < 1) == (self.text_length < 1), text)
        at_least(1, self, "vocab_size")
        at_least(0, self, "num_classes")
        Grid(*self.grid)
