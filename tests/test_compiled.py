"""Compiled decoding: the same pictures as eager decoding, and no more code than there are buckets."""

import shutil

import pytest
import torch
from conftest import CAPTIONS, published, several_conditions, transformer
from torch._dynamo.testing import CompileCounter
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.testing import assert_close

from anyorder.adapters.randar import RandAR
from anyorder.contracts import Grid
from anyorder.method.decoding import complete, extract_orders, sample
from anyorder.method.guidance import GuidanceConfig, Guided
from anyorder.method.policy_config import PolicyConfig
from anyorder.method.sampling import Streams
from anyorder.models import compiled as compiled_module
from anyorder.models.compiled import bucket, compile_decoding, require_compiler

GRID = Grid(3, 4)
SIZES = {bucket(m) for m in range(1, GRID.n + 1)}
PIECES = 3
TOKENS = torch.arange(3 * GRID.n).view(3, GRID.n) % 5


@pytest.fixture
def counter():
    """A backend that counts what it compiles, and nothing is compiled yet."""
    torch._dynamo.reset()
    return CompileCounter()


def model(**changes):
    return transformer(grid=(GRID.h, GRID.w), **changes)


def assert_same(got, expected):
    assert torch.equal(got.tokens, expected.tokens)
    assert torch.equal(got.order, expected.order)
    assert_close(got.log_prob, expected.log_prob, rtol=0, atol=1e-4)


def both(run, *models, backend="eager"):
    """What `run` returns eagerly, then compiled."""
    eager = run()
    for each in models:
        compile_decoding(each, backend=backend)
    return run(), eager


@pytest.mark.parametrize("n", [32, 64, 128, 256, 1024])
def test_buckets_waste_a_quarter_at_most_and_are_few(n):
    sizes = [bucket(m) for m in range(1, n + 1)]
    assert all(m <= size <= max(m + 7, 1.25 * m) for m, size in enumerate(sizes, 1))
    assert all(bucket(size) == size for size in sizes)
    assert sizes == sorted(sizes)
    assert len(set(sizes)) == 4 * n.bit_length() - 19
    if n == 256:
        assert sum(sizes) / sum(range(1, n + 1)) == pytest.approx(1.08, abs=0.005)


@pytest.mark.parametrize(
    "order",
    [
        "raster",
        "entropy",
        "token_likelihood",
        PolicyConfig("entropy", rescore=0.3),
        PolicyConfig("entropy", per_step=3),
        "information",
    ],
    ids=str,
)
@pytest.mark.parametrize("changes", [{}, {"rotary": True, "qk_norm": True}, {"depth": 1}], ids=str)
def test_samples_are_those_of_eager_decoding(order, changes):
    drawer = model(**changes)
    assert_same(*both(lambda: sample(drawer, order, Streams(range(3)), chunk=11), drawer))


@pytest.mark.parametrize("guided", [False, True])
@pytest.mark.parametrize("order", ["entropy", "location"])
def test_conditions_guidance_and_the_location_head(order, guided):
    drawer = model(num_classes=3, attributes=(4, 2), location=True, **CAPTIONS)
    condition = several_conditions(3, (3, 4, 2, 7, 7))
    whole = Guided(drawer, GuidanceConfig(2.0, "linear", locations="unguided")) if guided else drawer
    run = lambda: sample(whole, order, Streams(range(3)), condition=condition)  # noqa: E731
    assert_same(*both(run, drawer))


def test_a_scorer_is_compiled_beside_the_drawer():
    drawer, scorer = model(depth=1), model(seed=1)
    run = lambda: sample(drawer, "entropy", Streams(range(3)), scorer=scorer)  # noqa: E731
    assert_same(*both(run, drawer, scorer))


def test_extraction_and_completion():
    drawer = model(rotary=True)
    known = torch.zeros(3, GRID.n, dtype=torch.bool).scatter(1, torch.tensor([[1, 7], [0, 11], [3, 4]]), True)

    def run():
        streams = Streams(range(3))
        return extract_orders(drawer, TOKENS), complete(drawer, TOKENS, known, "entropy", streams)

    for compiled, eager in zip(*both(run, drawer), strict=True):
        assert_same(compiled, eager)


@pytest.mark.parametrize("changes", [{"rotary": True, "qk_norm": True}, {"next_position": "none"}], ids=str)
def test_code_is_made_once_for_each_bucket(changes, counter):
    """Not for each step, block, chunk, order or model of the same size; anew for another number of images."""
    for seed in (0, 1):
        drawer = model(depth=3, seed=seed, **changes)
        compile_decoding(drawer, backend=counter)
        for order in ("raster", "entropy", "token_likelihood"):
            sample(drawer, order, Streams(range(3)))
            sample(drawer, order, Streams(range(3)), chunk=8)
        assert counter.frame_count == PIECES * len(SIZES)
    sample(drawer, "raster", Streams(range(2)))  # one candidate at a time: one bucket
    assert counter.frame_count == PIECES * (len(SIZES) + 1)


def test_many_buckets_do_not_reach_the_limit_on_recompiling(counter):
    drawer, sizes = transformer(depth=1, grid=(8, 8)), sorted({bucket(m) for m in range(1, 65)})
    assert len(sizes) > 8
    compile_decoding(drawer, backend=counter)
    state = drawer.start(1)
    with torch.no_grad():
        for m in sizes:
            state.scored.count = 0
            drawer.score(state, torch.arange(m)[None])
    assert counter.frame_count == 2 * len(sizes)  # between blocks there is nothing: it is one


def test_surplus_candidates_are_never_kept():
    drawer = model()
    compile_decoding(drawer, backend="eager")
    state, positions = drawer.start(2), torch.arange(3, 12).expand(2, -1)
    with torch.no_grad():
        state.cache.keys.fill_(torch.nan), state.cache.values.fill_(torch.nan)
        assert drawer.score(state, positions).shape == (2, 9, 5)
    assert state.scored.count == 9
    assert state.cache.keys[:, :, :, :9].isfinite().all()
    assert state.cache.keys[:, :, :, 9:].isnan().all()
    assert state.cache.values[:, :, :, 9:].isnan().all()


def test_gradients_and_training_go_without(counter):
    drawer = model(dropout=0.1)
    names = list(drawer.state_dict())
    compile_decoding(drawer, backend=counter)
    assert list(drawer.state_dict()) == names
    positions = torch.arange(4)[None]
    drawer.score(drawer.start(1), positions).sum().backward()
    assert drawer.head.weight.grad is not None
    with torch.no_grad():
        drawer.train().score(drawer.start(1), positions)
        assert counter.frame_count == 0
        drawer.eval().score(drawer.start(1), positions)
        assert counter.frame_count == PIECES


def test_other_models_are_refused():
    for other in (published(RandAR), Guided(model(num_classes=2), GuidanceConfig(2.0))):
        with pytest.raises(ValueError, match=f"not for a {type(other).__name__}: leave compile out"):
            compile_decoding(other, backend="eager")


def wrong(graph, inputs):
    """A backend whose code gives twice of everything."""
    return lambda *args: tuple(2 * x if x.is_floating_point() else x for x in graph.forward(*args))


def broken(graph, inputs):
    raise RuntimeError("no such instruction\nat line 7")


@pytest.mark.parametrize(("backend", "fault"), [(wrong, "differs from eager code"), (broken, "it fails")])
def test_code_that_is_wrong_is_left_for_eager_code(backend, fault, caplog):
    torch._dynamo.reset()
    drawer = model(rotary=True)
    results = both(lambda: sample(drawer, "entropy", Streams(range(3))), drawer, backend=backend)
    assert_same(*results)
    assert drawer.compiled.refuted
    (message,) = [record.getMessage() for record in caplog.records if record.name == "anyorder"]
    assert fault in message


def test_the_first_calls_of_each_shape_are_checked(counter, monkeypatch):
    drawer, ran = model(), []
    compile_decoding(drawer, backend=counter, checks=2)
    original = compiled_module.run_blocks
    monkeypatch.setattr(compiled_module, "run_blocks", lambda *args: ran.append(0) or original(*args))
    for rows, checked in ((1, 1), (1, 2), (1, 2), (2, 3), (1, 3)):
        with torch.no_grad():
            drawer.score(drawer.start(rows), torch.arange(4).expand(rows, -1))
        assert len(ran) == checked
    assert not drawer.compiled.refuted


def test_gpus_compile_by_themselves_where_it_pays(monkeypatch):
    """For many images, models of ours and with Triton; nothing on a CPU."""
    there = []
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name in there or None)
    drawer, other = model(), published(RandAR)
    with FakeTensorMode():
        drawer.head.weight = torch.nn.Parameter(torch.empty(5, 16, device="cuda"))
    for names, images, expected in (([], 1024, False), (["triton"], 1023, False), (["triton"], 1024, True)):
        there[:] = names
        for each in (drawer, other):
            compile_decoding(each, None, images)
        assert bool(drawer.compiled) == expected
    compile_decoding(cpu := model(), None, 10**6)
    assert cpu.compiled is None


def test_a_compiler_is_needed(monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    drawer = model()
    with pytest.raises(ValueError, match=r"needs a C\+\+ compiler on the CPU, there is no no-such-compiler"):
        compile_decoding(drawer)
    assert drawer.compiled is None
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match="needs Triton on a GPU"):
        require_compiler(torch.device("cuda"))


def everything(drawer, streams):
    """A fixed order, an inferred one, and extraction."""
    tokens = TOKENS.to(streams.device)
    return (
        sample(drawer, "raster", streams),
        sample(drawer, "entropy", streams),
        extract_orders(drawer, tokens, streams=streams),
    )


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler")
def test_compiled_code_draws_what_eager_code_draws():
    drawer = model(rotary=True, qk_norm=True)
    runs = both(lambda: everything(drawer, Streams(range(3))), drawer, backend="inductor")
    for compiled, eager in zip(*runs, strict=True):
        assert_same(compiled, eager)


@pytest.mark.gpu
@pytest.mark.timeout(900)
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_cuda_graphs_draw_what_eager_code_draws():
    """Twice: the first run warms up and records, the second one replays."""
    drawer = model(width=64, rotary=True, qk_norm=True).cuda()
    runs = both(lambda: everything(drawer, Streams(range(3), "cuda")), drawer, backend="inductor")
    again = everything(drawer, Streams(range(3), "cuda"))
    for compiled, eager, replayed in zip(*runs, again, strict=True):
        assert_same(compiled, eager)
        assert_same(replayed, eager)
