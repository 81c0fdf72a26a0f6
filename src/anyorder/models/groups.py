"""Groups: positions of one step that are predicted together, each query aware of the others of its step.

Step g reveals K_g positions. Its inputs hold the tokens of step g - 1 and ask for the positions of step g,
the j-th token with the j-th position; where one step is larger, the last token or position of the other is
repeated. Before the first step, the condition stands for a single token. Inputs attend to all inputs of their
own and of earlier steps (`visible`), so a query knows every token revealed before its step, and of its own
step the positions, not the tokens: what mutual visibility means in LPD (arXiv 2507.01957).

There are max(K_g, K_{g-1}) inputs: N in all while steps grow or stay equal, below 2 N whatever they do. With
groups of one this is the paper's model (OAR, arXiv 2504.17069), input for input.
"""

from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from anyorder.contracts import require

Index = slice | Tensor
"""A slice where every input counts once, else (T,) int64."""


class Layout(NamedTuple):
    """The inputs of a sequence, by the steps of one-by-one reveals 0..N-1 that they belong to."""

    first: int
    """How many inputs, the first ones, hold the condition."""
    holds: Index
    """The reveal whose token each input holds, from the first token on."""
    asks: Index
    """The reveal that each input asks for."""
    outputs: Index
    """The input that the token of each reveal is predicted from."""
    behind: Index
    """How many reveals came before the step of each."""
    group: Tensor | None
    """The step of each input; None: each its own."""


ONE_BY_ONE = Layout(1, slice(0, -1), slice(None), slice(None), slice(None), None)


def layout(sizes: Sequence[int] | None, n: int, device: torch.device) -> Layout:
    """The inputs for steps that reveal so many of n positions; None reveals one by one.

    Raises:
        ValueError: sizes below 1, or whose sum is not n.
    """
    if sizes is None or (len(sizes) == n and set(sizes) == {1}):
        return ONE_BY_ONE
    valid = min(sizes, default=0) >= 1 and sum(sizes) == n
    require(valid, f"sizes of steps must be >= 1 and sum to {n} positions, got {list(sizes)}")
    return _layout(tuple(sizes), device)


@lru_cache(maxsize=256)  # a GPU is sent each of them once
def _layout(sizes: tuple[int, ...], device: torch.device) -> Layout:
    holds, asks, outputs, behind, group = (list[int]() for _ in range(5))
    begin, before = 0, 1
    for step, size in enumerate(sizes):
        m = max(size, before)
        outputs += range(len(asks), len(asks) + size)
        holds += [begin - before + min(j, before - 1) for j in range(m)]
        asks += [begin + min(j, size - 1) for j in range(m)]
        behind += [begin] * size
        group += [step] * m
        begin, before = begin + size, size
    first = sizes[0]
    with torch.inference_mode(False):  # tensors of inference mode could not be used in training
        lists = (holds[first:], asks, outputs, behind, group)
        columns = [torch.tensor(x, dtype=torch.int64, device=device) for x in lists]
    return Layout(first, *columns)


def visible(group: Tensor) -> Tensor:
    """Who attends to whom, (T, T) bool [query, key], from the step of each input, (T,) int64."""
    return group[:, None] >= group


def padded(x: Tensor, m: int) -> Tensor:
    """(B, K, ...) to (B, max(K, m), ...), the last repeated."""
    return torch.cat((x, x[:, -1:].expand(-1, max(0, m - x.shape[1]), *x.shape[2:])), dim=1)
