"""What the work costs, counted from configurations: FLOPs, and bytes that have to move.

A multiply-add is two FLOPs. Matrix products, convolutions and attention count; what is done to each number
by itself does not. Each of them reads its operands and writes its result once, in the numbers it computes
with; attention keeps its scores to itself. Biases are left out.

Shapes: B images, N positions, D width, V codebook size; M candidates scored at once, L cached steps.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from anyorder.contracts import Grid
from anyorder.models.location import NEIGHBOURS
from anyorder.models.transformer import TransformerConfig
from anyorder.tokenizers.vq import VQConfig

FLOAT32 = 4
"""Bytes of a number."""
FEATURES = 128
"""Inputs of a coordinate encoding."""
KEYS = 64
"""Key width of the location head."""


@dataclass(frozen=True)
class Cost:
    """Work to do; costs add up, and multiply by numbers of times."""

    flops: float = 0.0
    bytes: float = 0.0

    def __add__(self, other: Cost) -> Cost:
        return Cost(self.flops + other.flops, self.bytes + other.bytes)

    def __rmul__(self, times: float) -> Cost:
        return Cost(times * self.flops, times * self.bytes)

    def seconds(self, flops_per_second: float, bytes_per_second: float) -> float:
        """The least time of it (the roofline): arithmetic and memory work side by side, the slower counts."""
        return max(self.flops / flops_per_second, self.bytes / bytes_per_second)


def matmul(rows: int, inputs: int, outputs: int, size: int = FLOAT32) -> Cost:
    """(rows, inputs) times (inputs, outputs), in numbers of `size` bytes."""
    moved = rows * inputs + inputs * outputs + rows * outputs
    return Cost(2.0 * rows * inputs * outputs, float(size * moved))


def total(costs: Iterable[Cost]) -> Cost:
    """The sum."""
    return sum(costs, Cost())


# --- the transformer --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class TransformerCosts:
    """Of an `AnyOrderTransformer` without attributes and captions, on B images at once."""

    config: TransformerConfig
    batch: int
    """B"""
    size: int = FLOAT32
    """Bytes of a number that it computes with."""

    @property
    def grid(self) -> Grid:
        """That of training."""
        return Grid(*self.config.grid)

    @property
    def hidden(self) -> int:
        """Width inside the feed-forward network."""
        return 32 * math.ceil(8 * self.config.width / 3 / 32)

    def forward(self) -> Cost:
        """All steps teacher forced, N (N + 1) / 2 pairs of attention per head."""
        n, rows = self.grid.n, self.batch * self.grid.n
        attention = self._attention(rows, pairs=self.batch * n * (n + 1) / 2, keys=rows)
        return self._tables() + self._blocks(rows) + self._head(rows) + attention

    def training(self) -> Cost:
        """One step: two products backward for each one forward, then AdamW.

        AdamW reads a float32 weight, its gradient and two moments, and writes all but the gradient. What
        checkpointing computes a second time is not counted.
        """
        return 3 * self.forward() + Cost(0, 7 * FLOAT32 * self.parameters)

    def decoding(self, calls: Iterable[tuple[int, int]], again: int = 0) -> Cost:
        """The start of a decoding run, and its calls of `score`: (M, L) each.

        Appending what was scored costs nothing more; see `append` for the others. `again` candidates per
        image are scored once more, the head alone: the chosen ones, where the order is decided first.
        """
        return self._start() + total(self.score(*call) for call in calls) + again * self._head(self.batch)

    def score(self, candidates: int, cached: int) -> Cost:
        """M candidates per image that attend to L cached steps and to themselves."""
        rows = self.batch * candidates
        keys = self.batch * cached + rows
        attention = self._attention(rows, pairs=rows * (cached + 1), keys=keys)
        return self._blocks(rows) + self._head(rows) + attention

    def append(self, inputs: int, cached: int) -> Cost:
        """T inputs per image that were not scored, one causal block behind L cached steps.

        Of K positions revealed together these are K - 1.
        """
        rows = self.batch * inputs
        pairs = rows * (cached + (inputs + 1) / 2)
        return self._blocks(rows) + self._attention(rows, pairs, keys=self.batch * cached + rows)

    def locate(self) -> Cost:
        """The location head, once."""
        width, n = self.config.width, self.grid.n
        shapes = ((3 * width, width), (width, KEYS), (KEYS, n), (KEYS, self._moves), (KEYS, NEIGHBOURS))
        around = self.batch * matmul(n, NEIGHBOURS, 1, self.size)
        return total(matmul(self.batch, *shape, self.size) for shape in shapes) + around

    def cache(self, positions: int) -> int:
        """Bytes of the keys and values of so many positions per image, in all layers."""
        return 2 * self.config.depth * self.batch * positions * self.config.width * self.size

    @property
    def parameters(self) -> int:
        """All that a content loss trains: without the location head."""
        width, vocab = self.config.width, self.config.vocab_size
        encoding = FEATURES * width + width**2 + 2 * width
        norms = 2 * width + 2 * width // self.config.heads * self.config.qk_norm
        block = sum(i * o for i, o in self._linears) + norms
        embeddings = (vocab + 1 + self.config.num_classes + 1) * width
        head = width + width * vocab
        return embeddings + len(self._encoded) * encoding + self.config.depth * block + head

    @property
    def _linears(self) -> list[tuple[int, int]]:
        """Inputs and outputs of a block's products."""
        d = self.config.width
        return [(d, 3 * d), (d, d), (d, 2 * self.hidden), (self.hidden, d)]

    def _blocks(self, rows: int) -> Cost:
        """All products of all blocks but attention's."""
        return self.config.depth * total(matmul(rows, *shape, self.size) for shape in self._linears)

    def _head(self, rows: int) -> Cost:
        return matmul(rows, self.config.width, self.config.vocab_size, self.size)

    def _attention(self, rows: int, pairs: float, keys: int) -> Cost:
        """`rows` queries to as many outputs in all blocks, from `keys` keys and as many values."""
        width = self.config.width
        return self.config.depth * Cost(4.0 * width * pairs, 2.0 * self.size * width * (rows + keys))

    @property
    def _moves(self) -> int:
        """Displacements within the grid."""
        return (2 * self.grid.h - 1) * (2 * self.grid.w - 1)

    @property
    def _encoded(self) -> list[int]:
        """Number of coordinates that each encoding is evaluated at."""
        n, following = self.grid.n, self.config.next_position
        after = {"none": [], "absolute": [n, n], "relative": [n, self._moves]}[following]
        return after + [n] * (self.config.current_position != "none")

    def _tables(self) -> Cost:
        return total(self._encoding(rows, self.config.width) for rows in self._encoded)

    def _start(self) -> Cost:
        where = [self.grid.n, self._moves] if self.config.location else []
        return self._tables() + total(self._encoding(rows, KEYS) for rows in where)

    def _encoding(self, rows: int, width: int) -> Cost:
        return matmul(rows, FEATURES, width, self.size) + matmul(rows, width, width, self.size)


def fixed(n: int) -> Iterator[tuple[int, int]]:
    """Calls (M, L) of `score` where the order is known beforehand: one candidate per step."""
    return ((1, step) for step in range(n))


def inferred(n: int, chunk: int) -> Iterator[tuple[int, int]]:
    """Calls (M, L) of `score` where all open positions are looked at."""
    for step in range(n):
        for begin in range(step, n, chunk):
            yield min(chunk, n - begin), step


# --- the tokenizer ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class TokenizerCosts:
    """Of a `VQModel`, on B images of a grid's size at once."""

    config: VQConfig
    grid: Grid
    batch: int
    """B"""
    size: int = FLOAT32
    """Bytes of a number that it computes with."""

    def encode(self) -> Cost:
        """Images to tokens; the codebook is searched in float32."""
        c, n, widths = self.config, self.grid.n, self._widths
        work = self._conv(self._area(0), 3, c.channels)
        for i, (before, width) in enumerate(zip([c.channels, *widths[:-1]], widths, strict=True)):
            work += self._level(i, before, width, c.res_blocks)
            if i < len(widths) - 1:
                work += self._conv(self._area(i + 1), width, width, read=self._area(i))
        work += self._middle() + self._conv(n, widths[-1], c.z_channels)
        work += self._conv(n, c.z_channels, c.code_dim, side=1)
        return work + matmul(self.batch * n, c.code_dim, c.vocab_size)

    def decode(self) -> Cost:
        """Tokens to images."""
        c, n, widths = self.config, self.grid.n, self._widths
        work = self._conv(n, c.code_dim, c.z_channels, side=1) + self._conv(n, c.z_channels, widths[-1])
        work += self._middle()
        for i in reversed(range(len(widths))):
            work += self._level(i, widths[min(i + 1, len(widths) - 1)], widths[i], c.res_blocks + 1)
            if i > 0:
                work += self._conv(self._area(i - 1), widths[i], widths[i])
        return work + self._conv(self._area(0), widths[0], 3)

    @property
    def _widths(self) -> list[int]:
        return [m * self.config.channels for m in self.config.multipliers]

    def _area(self, level: int) -> int:
        """Pixels at a resolution; 0 is that of the images."""
        return self.grid.n * 4 ** (len(self.config.multipliers) - 1 - level)

    def _conv(self, area: int, before: int, width: int, side: int = 3, read: int | None = None) -> Cost:
        """A convolution with `side` x `side` taps that writes `area` pixels, and reads as many or `read`."""
        taps, pixels = side**2 * before * width, (read or area) * before + area * width
        return Cost(2.0 * self.batch * area * taps, float(self.size * (taps + self.batch * pixels)))

    def _res(self, area: int, before: int, width: int) -> Cost:
        work = self._conv(area, before, width) + self._conv(area, width, width)
        return work if before == width else work + self._conv(area, before, width, side=1)

    def _attention(self, area: int, width: int) -> Cost:
        """Self-attention over all pixels, where the tokenizer has any."""
        products = 4 * self._conv(area, width, width, side=1)
        pairs = Cost(4.0 * self.batch * area**2 * width, 4.0 * self.size * self.batch * area * width)
        return self.config.attention * (products + pairs)

    def _level(self, level: int, before: int, width: int, blocks: int) -> Cost:
        area, deepest = self._area(level), level == len(self.config.multipliers) - 1
        work = self._res(area, before, width) + (blocks - 1) * self._res(area, width, width)
        return work + deepest * blocks * self._attention(area, width)

    def _middle(self) -> Cost:
        width = self._widths[-1]
        return 2 * self._res(self.grid.n, width, width) + self._attention(self.grid.n, width)
