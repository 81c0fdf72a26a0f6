"""The one order convention: static and random orders, their inverse, and statistics of sets of orders.

`order[b, i]` is the raster position revealed at step i; `rank[b, p]` is the step at which position p is
revealed. Each is the inverse permutation of the other.
"""

import math
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from anyorder.contracts import Grid, require


def inverse(order: Tensor) -> Tensor:
    """The inverse permutation of every row, order <-> rank, (..., N) int64."""
    return order.argsort(-1)


def permute(values: Tensor, order: Tensor) -> Tensor:
    """Values (B, N, ...) at raster positions, put into order steps."""
    index = order.reshape(*order.shape, *[1] * (values.ndim - 2)).expand(*order.shape, *values.shape[2:])
    return values.gather(1, index)


def validate(order: Tensor, grid: Grid) -> Tensor:
    """Return `order` (..., N); a ValueError unless every row is a permutation of the grid's positions."""
    size = f"an order of {grid.h} x {grid.w} needs {grid.n} positions, got shape {tuple(order.shape)}"
    require(order.shape[-1:] == (grid.n,), size)
    require(not order.is_floating_point(), f"an order holds integers, got {order.dtype}")
    every = torch.arange(grid.n, device=order.device).expand_as(order)
    once = torch.equal(order.sort(-1).values, every.to(order.dtype))
    require(once, f"each position 0..{grid.n - 1} must occur exactly once in an order")
    return order


# --- static orders -------------------------------------------------------------------------------------


def raster(grid: Grid) -> list[int]:
    """Left to right, top to bottom."""
    return list(range(grid.n))


def column(grid: Grid) -> list[int]:
    """Top to bottom, left to right."""
    return [r * grid.w + c for c in range(grid.w) for r in range(grid.h)]


def snake(grid: Grid) -> list[int]:
    """Raster with every other row reversed, so that each step goes to a neighbour."""
    return [r * grid.w + (c if r % 2 == 0 else grid.w - 1 - c) for r in range(grid.h) for c in range(grid.w)]


def spiral_in(grid: Grid) -> list[int]:
    """Clockwise from the top-left corner to the middle."""
    rows = [list(range(r * grid.w, (r + 1) * grid.w)) for r in range(grid.h)]
    path: list[int] = []
    while rows:
        path += rows.pop(0)
        rows = [list(column) for column in zip(*rows, strict=True)][::-1]  # turn the rest to the left
    return path


def spiral_out(grid: Grid) -> list[int]:
    """From the middle outwards; `spiral_in` backwards."""
    return spiral_in(grid)[::-1]


def diagonal(grid: Grid) -> list[int]:
    """Anti-diagonals from the top-left corner."""
    return sorted(range(grid.n), key=lambda p: (p // grid.w + p % grid.w, p))


def hilbert(grid: Grid) -> list[int]:
    """A Hilbert-like curve for any h x w: successive positions are neighbours in the image."""
    major, minor = (1, 1j) if grid.w >= grid.h else (1j, 1)
    size = {1: grid.w, 1j: grid.h}
    curve = _hilbert(0, size[major] * major, size[minor] * minor)
    return [int(z.imag) * grid.w + int(z.real) for z in curve]


def _hilbert(corner: complex, along: complex, across: complex) -> Iterator[complex]:
    """Fill the rectangle of two axis-parallel vectors; points are column + row * 1j."""
    length, width = round(abs(along)), round(abs(across))
    step, side = along / length, across / width
    if width == 1:
        yield from (corner + i * step for i in range(length))
    elif length == 1:
        yield from (corner + i * side for i in range(width))
    elif 2 * length > 3 * width:  # long: two halves, one behind the other
        half = _even(length // 2, length) * step
        yield from _hilbert(corner, half, across)
        yield from _hilbert(corner + half, along - half, across)
    else:  # up, along, and down again
        half, up = (length // 2) * step, _even(width // 2, width) * side
        yield from _hilbert(corner, up, half)
        yield from _hilbert(corner + up, along, across - up)
        yield from _hilbert(corner + (along - step) + (up - side), -up, -(along - half))


def _even(half: int, whole: int) -> int:
    """Prefer even halves: the curve then leaves a sub-rectangle on the side where the next begins."""
    return half + 1 if half % 2 and whole > 2 else half


def halton(grid: Grid) -> list[int]:
    """Low-discrepancy order: cells in the sequence in which Halton points (bases 2, 3) first hit them."""
    seen: dict[int, None] = {}
    i = 0
    while len(seen) < grid.n:
        i += 1
        seen.setdefault(int(_radical_inverse(i, 2) * grid.h) * grid.w + int(_radical_inverse(i, 3) * grid.w))
    return list(seen)


def _radical_inverse(i: int, base: int) -> float:
    """The digits of i behind the point, in reverse: 6 = 110 in base 2 is 0.011."""
    value, digit = 0.0, 1.0
    while i:
        digit /= base
        value += i % base * digit
        i //= base
    return value


def subsample(grid: Grid) -> list[int]:
    """Coarse to fine: positions on the coarsest dyadic lattice first, each level in raster order."""

    def level(i: int) -> int:
        return (i & -i).bit_length() if i else 64

    return sorted(range(grid.n), key=lambda p: (-min(level(p // grid.w), level(p % grid.w)), p))


STATIC: dict[str, Callable[[Grid], list[int]]] = {
    f.__name__: f
    for f in (raster, column, snake, spiral_in, spiral_out, diagonal, hilbert, halton, subsample)
}
"""Orders that are the same for every image, by name."""


def static_order(name: str, grid: Grid) -> Tensor:
    """A named order, (N,) int64; a ValueError lists the names."""
    require(name in STATIC, f"unknown order '{name}': choose one of {', '.join(STATIC)}")
    return torch.tensor(STATIC[name](grid))


def random_orders(rows: int, grid: Grid, generator: torch.Generator | None = None) -> Tensor:
    """Uniformly random orders, (rows, N) int64 on the generator's device."""
    device = None if generator is None else generator.device
    return torch.rand(rows, grid.n, generator=generator, device=device, dtype=torch.float64).argsort(1)


def of_classes(table: Tensor, labels: Tensor) -> Tensor:
    """The order of each image's class, (B, N) int64, from a table (classes, N).

    Labels (B,) int64 lie in [-1, classes); -1, no class, takes the order of the mean rank over all classes.
    """
    require(bool((labels < len(table)).all()), f"labels lie in [0, {len(table)}), got {labels.tolist()}")
    of_all = inverse(table).double().mean(0).argsort(stable=True)
    return torch.where(labels[:, None] < 0, of_all, table[labels.clamp(min=0)])


def stretch(order: Tensor, old: Grid, new: Grid) -> Tensor:
    """Orders (B, old.n) int64 on another grid, (B, new.n): ranks are interpolated between patch centres.

    Bilinearly; outside of the outermost centres by the nearest rank. Equal ranks go in raster order.
    """
    if old == new:
        return order
    ranks = inverse(order).double().view(-1, 1, old.h, old.w)
    stretched = F.interpolate(ranks, (new.h, new.w), mode="bilinear", align_corners=False)
    # Rounded, so that ranks that differ by rounding errors only stay in raster order on every machine.
    return stretched.flatten(1).mul(2**20).round().argsort(dim=1, stable=True)


# --- statistics ----------------------------------------------------------------------------------------


def kendall(a: Tensor, b: Tensor) -> Tensor:
    """Kendall's tau of orders (..., N), row by row, in [-1, 1]; nan for N = 1. Costs O(N^2)."""
    ra, rb = torch.broadcast_tensors(inverse(a), inverse(b))
    n = ra.shape[-1]
    agreement = torch.zeros(ra.shape[:-1], dtype=torch.float64, device=ra.device)
    for shift in range(1, n):
        pairs = (ra[..., shift:] - ra[..., :-shift]).sign() * (rb[..., shift:] - rb[..., :-shift]).sign()
        agreement += pairs.sum(-1)
    return agreement / (n * (n - 1) / 2) if n > 1 else agreement.fill_(math.nan)


def position_entropy(order: Tensor) -> Tensor:
    """Entropy of the position revealed at each step over a set of orders (B, N), (N,) float64 in nats."""
    p = F.one_hot(order.cpu(), order.shape[1]).double().mean(0)  # step x position
    return -torch.xlogy(p, p).sum(1)


def mean_jump(order: Tensor, grid: Grid) -> float:
    """Mean Euclidean distance between successive positions, in patches; nan for N = 1."""
    at = grid.coordinates(order.device)[order]
    return float((at[..., 1:, :] - at[..., :-1, :]).norm(dim=-1).mean())
