"""Closed forms of FLOPs and bytes against what the models' own operations add up to."""

import copy
import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from anyorder.bench.costs import Cost, TokenizerCosts, TransformerCosts, fixed, inferred, matmul, total
from anyorder.contracts import Grid
from anyorder.method.decoding import extract_orders, sample
from anyorder.method.loss import token_nll
from anyorder.method.sampling import Streams
from anyorder.models.transformer import AnyOrderTransformer, TransformerConfig
from anyorder.orders import random_orders
from anyorder.tokenizers.vq import VQConfig, VQModel

B, GRID = 3, Grid(2, 5)
N = GRID.n
MOVES = (2 * GRID.h - 1) * (2 * GRID.w - 1)
VARIANTS = (
    {},
    {"rotary": True, "qk_norm": True},
    {"next_position": "absolute"},
    {"next_position": "none", "current_position": "none"},
)


class Operands(TorchDispatchMode):
    """Adds up the numbers that products, convolutions and attention read and write, without biases."""

    def __init__(self, scores: tuple[int, int] = (0, 0)):
        """`scores` is the shape of attention's scores, which count as kept."""
        super().__init__()
        self.scores = scores
        self.numbers = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        if name in ("mm", "bmm", "addmm", "convolution", "_scaled_dot_product_flash_attention_for_cpu"):
            written = result[:1] if isinstance(result, tuple) else (result,)
            tensors = [t for t in (*args, *written) if isinstance(t, Tensor) and t.ndim > 1]
            self.numbers += sum(t.numel() for t in tensors if tuple(t.shape[-2:]) != self.scores)
        return result


def transformer(**changes) -> tuple[AnyOrderTransformer, TransformerCosts]:
    torch.manual_seed(0)
    config = TransformerConfig(**{"depth": 2, "width": 48, "heads": 3, "vocab_size": 11, **changes})
    config.grid = (GRID.h, GRID.w)
    return AnyOrderTransformer(config), TransformerCosts(config, B)


def attention_flops(q, k, *others, out_shape=None, **settings) -> int:
    """Two products, from the shapes (B, H, M, d) of queries and (B, H, L, d) of keys."""
    return 4 * math.prod(q) * k[2]


def counted_flops(work: Callable[[], object]) -> int:
    # The plain kernel is the one whose products the counter sees as they are.
    # Candidates call a fused one by name, whatever is allowed.
    fused = {torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: attention_flops}
    with FlopCounterMode(display=False, custom_mapping=fused) as counter, sdpa_kernel(SDPBackend.MATH):
        work()
    return counter.get_total_flops()


def moved_bytes(work: Callable[[], object], scores: tuple[int, int] = (0, 0)) -> int:
    with Operands(scores) as operands:
        work()
    return 4 * operands.numbers


def inputs() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(11, (B, N), generator=generator), random_orders(B, GRID, generator)


def beyond_causal(model: AnyOrderTransformer) -> float:
    """FLOPs of the pairs that a causal mask leaves out: the counter takes them for computed."""
    return 4.0 * model.config.depth * model.config.width * B * N * (N - 1) / 2


@pytest.mark.parametrize("changes", VARIANTS)
def test_forward_counts_every_product(changes):
    model, costs = transformer(**changes)
    tokens, order = inputs()
    run = lambda: model(tokens, None, order)  # noqa: E731
    assert costs.forward().flops == counted_flops(run) - beyond_causal(model)
    with torch.no_grad():
        assert costs.forward().bytes == moved_bytes(run)


@pytest.mark.parametrize("changes", VARIANTS)
def test_training_is_three_times_forward_and_the_optimizer(changes):
    model, costs = transformer(**changes)
    tokens, order = inputs()
    counted = counted_flops(lambda: token_nll(model, tokens, None, order).mean().backward())
    # Coordinates are not learned: the first product of each encoding has one backward, not two.
    rows = {"first": N, "current": N, "following": N if changes.get("next_position") else MOVES}
    encodings = [(getattr(model, name), n) for name, n in rows.items()]
    fewer = sum(2 * n * e.hidden.weight.numel() for e, n in encodings if e is not None)
    assert costs.training().flops == counted + fewer - 3 * beyond_causal(model)
    assert costs.parameters == sum(p.numel() for p in model.parameters() if p.grad is not None)
    assert costs.training().bytes == 3 * costs.forward().bytes + 28 * costs.parameters


@pytest.mark.parametrize("cached", [1, 7])
@torch.no_grad()
def test_score_counts_every_product(cached):
    model, costs = transformer()
    state = model.start(B)
    for position in range(cached):
        model.score(state, torch.full((B, 1), position))
        state = model.append(state, torch.full((B, 1), position), torch.ones(B, 1, dtype=torch.long))
    open_ones = torch.arange(cached, N).expand(B, -1)
    m = N - cached
    run = lambda: model.score(copy.deepcopy(state), open_ones)  # noqa: E731 - nothing is scored twice
    # A candidate meets its own key outside of the products.
    own, depth, width = B * m, model.config.depth, model.config.width
    cost = costs.score(m, cached)
    assert cost.flops == counted_flops(run) + 4 * depth * width * own
    assert cost.bytes == moved_bytes(run, scores=(m, cached)) + 4 * depth * 2 * width * own


def test_append_counts_what_was_not_scored():
    model, costs = transformer()
    state = model.start(B)
    positions = torch.arange(N).expand(B, -1)
    cached, inputs = 4, 3
    state = model.append(state, positions[:, :cached], torch.ones(B, cached, dtype=torch.long))
    rest = positions[:, cached:]
    model.score(state, rest)
    some = rest[:, : inputs + 1]
    counted = counted_flops(lambda: model.append(state, some, torch.ones_like(some)))
    # The first was scored; of the others each is behind it, and the counter sees no mask.
    masked = 4 * model.config.depth * model.config.width * B * inputs * (inputs - 1) / 2
    assert costs.append(inputs, cached + 1).flops == counted - masked


@pytest.mark.parametrize(
    ("order", "calls", "again"),
    [("random", fixed(N), 0), ("entropy", inferred(N, 4), N), ("location", fixed(N), 0)],
)
def test_sampling_counts_every_call(order, calls, again):
    model, costs = transformer(location=True)
    model.requires_grad_(False)  # the counter's hooks stumble over weights that are inputs
    calls = list(calls)
    run = lambda: sample(model, order, Streams(range(B)), chunk=4)  # noqa: E731
    own = 4 * model.config.depth * model.config.width * B * sum(m for m, _ in calls)
    expected = costs.decoding(calls, again) + (order == "location") * N * costs.locate()
    assert expected.flops == counted_flops(run) + own


def test_extraction_costs_as_much_as_sampling():
    model, _ = transformer(location=True)
    tokens, _ = inputs()
    counted = [
        counted_flops(lambda: sample(model, "entropy", Streams(range(B)))),
        counted_flops(lambda: extract_orders(model, tokens, "entropy")),
    ]
    assert counted[0] == counted[1]


def test_calls_of_an_inferred_order():
    assert list(inferred(3, 2)) == [(2, 0), (1, 0), (2, 1), (1, 2)]
    assert sum(m for m, _ in inferred(16, 5)) == 16 * 17 // 2


def test_the_cache_is_counted():
    model, costs = transformer()
    state = model.start(B)
    assert costs.cache(N) == 4 * (state.keys.numel() + state.values.numel())


@pytest.mark.parametrize(
    "changes", [{}, {"multipliers": (1, 2, 2), "res_blocks": 2}, {"attention": False}, {"multipliers": (2,)}]
)
def test_tokenizer_counts_every_product(changes):
    torch.manual_seed(0)
    shape = {"channels": 4, "multipliers": (1, 3), "res_blocks": 1, "z_channels": 6, "groups": 2}
    config = VQConfig(**{**shape, "vocab_size": 13, "code_dim": 5, **changes})
    model, costs = VQModel(config), TokenizerCosts(config, GRID, B)
    images = torch.rand(B, 3, GRID.h * config.factor, GRID.w * config.factor) * 2 - 1
    tokens = model.encode(images)
    assert costs.encode().flops == counted_flops(lambda: model.encode(images))
    assert costs.decode().flops == counted_flops(lambda: model.decode(tokens, GRID))
    # Halving pads a row and a column, which the count leaves out.
    assert costs.encode().bytes == pytest.approx(moved_bytes(lambda: model.encode(images)), rel=0.05)
    assert costs.decode().bytes == moved_bytes(lambda: model.decode(tokens, GRID))


def test_costs_add_up_and_bound_the_time():
    product = matmul(2, 3, 4)
    assert product == Cost(48, 4 * (6 + 12 + 8))
    assert total([product, 2 * product]) == 3 * product
    assert Cost(10, 6).seconds(2, 3) == 5
    assert Cost(10, 60).seconds(2, 3) == 20
