"""Counted FLOPs and bytes against closed forms, and against PyTorch's own counter."""

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from anyorder.bench.costs import Cost, count
from anyorder.contracts import Grid
from anyorder.method.decoding import extract_orders, sample
from anyorder.method.loss import token_nll
from anyorder.method.sampling import Streams
from anyorder.models.architecture import TransformerConfig
from anyorder.models.transformer import AnyOrderTransformer
from anyorder.orders import random_orders
from anyorder.tokenizers.vq import VQConfig, VQModel

B, GRID, DEPTH, WIDTH, VOCAB = 3, Grid(2, 5), 2, 48, 11
N = GRID.n
SHAPE = {"depth": DEPTH, "width": WIDTH, "heads": 3, "vocab_size": VOCAB, "grid": (GRID.h, GRID.w)}
PLAIN = {"next_position": "none", "current_position": "none"}
HIDDEN = 128
"""Of the feed-forward network: 8/3 of the width in whole 32s."""
BLOCK = 4 * WIDTH**2 + 3 * WIDTH * HIDDEN
"""Weights of a block's products."""


def transformer(**changes) -> AnyOrderTransformer:
    torch.manual_seed(0)
    return AnyOrderTransformer(TransformerConfig(**SHAPE | changes))


def inputs() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(VOCAB, (B, N), generator=generator), random_orders(B, GRID, generator)


def products(rows: int) -> int:
    """FLOPs of all blocks and of the head, without attention."""
    return 2 * rows * (DEPTH * BLOCK + WIDTH * VOCAB)


def attention(pairs: float) -> float:
    return 4 * DEPTH * WIDTH * pairs


def test_a_product_counts_operands_and_result():
    a, b = torch.ones(2, 3), torch.ones(3, 4)
    assert count(lambda: a @ b) == Cost(2 * 2 * 3 * 4, 4 * (6 + 12 + 8), operators=1)
    assert count(lambda: a.bfloat16() @ b.bfloat16()).bytes == 2 * (6 + 12 + 8)


def test_all_else_counts_its_bytes_and_views_count_nothing():
    """Elementwise work, norms, copies and writes in place; not what only looks at memory in another shape."""
    a, ones = torch.rand(2, 3), torch.ones(3)
    assert count(lambda: a + a) == Cost(elementwise=4 * 3 * 6, operators=1)
    assert count(lambda: a.add_(ones)) == Cost(elementwise=4 * (6 + 3 + 6), operators=1)
    views = count(lambda: a.t().unsqueeze(0).detach())
    assert views == Cost(operators=3), "but each call takes its time"
    assert count(lambda: a[:, :2]).elementwise == 0
    assert count(lambda: torch.nn.functional.linear(a[None], ones[None])).elementwise == 0
    assert count(lambda: a[:, :2].clone()).elementwise == 4 * 2 * 4
    assert count(lambda: a.bfloat16()) == Cost(elementwise=(4 + 2) * 6, operators=1)
    assert count(lambda: torch.mm(a, a.t())).elementwise == 0


def test_forward_counts_every_product():
    model, (tokens, order) = transformer(**PLAIN), inputs()
    pairs = B * N * (N + 1) / 2
    with torch.no_grad():
        cost = count(lambda: model(tokens, None, order))
    assert cost.flops == products(B * N) + attention(pairs)
    weights = DEPTH * BLOCK + WIDTH * VOCAB
    moved = DEPTH * (WIDTH * (1 + 3 + 1 + 1 + 1 + 1) + 3 * HIDDEN) + WIDTH + VOCAB + DEPTH * 4 * WIDTH
    assert cost.bytes == pytest.approx(4 * (weights + B * N * moved), rel=0.02)  # and attention's sums


def test_training_counts_the_backward_pass_and_the_optimizer():
    model, (tokens, order) = transformer(**PLAIN), inputs()
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)

    def step():
        token_nll(model, tokens, None, order).mean().backward()

    pairs = B * N * (N + 1) / 2
    cost = count(step)
    assert cost.flops == 3 * products(B * N) + 3.5 * attention(pairs)
    trained = sum(p.numel() for p in model.parameters() if p.grad is not None)
    assert count(optimizer.step).bytes == pytest.approx(16 * trained, rel=0.01)


@pytest.mark.parametrize("changes", [{}, {"rotary": True, "qk_norm": True}, {"next_position": "absolute"}])
def test_encodings_of_positions_are_as_pytorch_counts_them(changes):
    model, (tokens, order) = transformer(**changes), inputs()
    run = lambda: model(tokens, None, order)  # noqa: E731
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        run()
    masked = attention(B * N * (N - 1) / 2)  # that counter sees no mask
    assert count(run).flops == counter.get_total_flops() - masked


@pytest.mark.parametrize("chunk", [4, 64])
def test_sampling_counts_every_candidate(chunk):
    """Fixed: one candidate per step; inferred: all open ones, and the head again for the chosen one."""
    model = transformer(**PLAIN).eval()
    fixed = count(lambda: sample(model, "raster", Streams(range(B)), chunk=chunk))
    assert fixed.flops == pytest.approx(products(B * N) + attention(B * N * (N - 1) / 2), rel=0.02)
    inferred = count(lambda: sample(model, "entropy", Streams(range(B)), chunk=chunk))
    candidates = N * (N + 1) // 2
    pairs = sum((N - cached) * cached for cached in range(N))
    expected = products(B * candidates) + B * N * 2 * WIDTH * VOCAB + attention(B * pairs)
    assert inferred.flops == pytest.approx(expected, rel=0.02)


def test_extraction_costs_as_much_as_sampling():
    model, tokens = transformer(location=True).eval(), inputs()[0]
    counted = [
        count(lambda: sample(model, "entropy", Streams(range(B)))),
        count(lambda: extract_orders(model, tokens, "entropy")),
    ]
    assert [cost.flops for cost in counted] == [counted[0].flops] * 2
    assert [cost.bytes for cost in counted] == [counted[0].bytes] * 2
    located = count(lambda: sample(model, "location", Streams(range(B))))
    assert count(lambda: sample(model, "raster", Streams(range(B)))).flops < located.flops < counted[0].flops


@pytest.mark.parametrize(
    "changes", [{}, {"multipliers": (1, 2, 2), "res_blocks": 2}, {"attention": False}, {"multipliers": (2,)}]
)
def test_the_tokenizer_is_as_pytorch_counts_it(changes):
    torch.manual_seed(0)
    shape = {"channels": 4, "multipliers": (1, 3), "res_blocks": 1, "z_channels": 6, "groups": 2}
    config = VQConfig(**{**shape, "vocab_size": 13, "code_dim": 5, **changes})
    model = VQModel(config).requires_grad_(False)
    images = torch.rand(B, 3, GRID.h * model.factor, GRID.w * model.factor) * 2 - 1
    tokens = model.encode(images)
    for run in (lambda: model.encode(images), lambda: model.decode(tokens, GRID)):
        with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
            run()
        assert count(run).flops == counter.get_total_flops()


def test_compiled_code_is_counted_too():
    torch.compiler.reset()
    a = torch.ones(2, 3)
    product = torch.compile(lambda: a @ a.T, backend="eager")
    assert count(product).flops == 2 * 2 * 3 * 2


def test_costs_bound_the_time():
    assert Cost(10, 6).seconds(2, 3) == 5
    assert Cost(10, 60).seconds(2, 3) == 20
