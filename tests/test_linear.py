"""The linear layer of decoding: the plain product, with packed weights or without."""

import copy

import pytest
import torch
from conftest import published, transformer
from torch import nn
from torch.testing import assert_close

from anyorder import Pipeline
from anyorder.adapters.randar import RandAR
from anyorder.method.decoding import generate, sample
from anyorder.method.sampling import Streams
from anyorder.models.compiled import compile_decoding
from anyorder.models.layers import SWITCH, Linear, pack, unpack
from anyorder.training.lora import add_low_rank

private = pytest.mark.skipif(
    not (torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")),
    reason="this build of PyTorch lacks oneDNN's linear operators",
)


def layer(bias=False):
    torch.manual_seed(0)
    return Linear(24, 40, bias=bias).eval()


def plain(linear, x):
    return nn.functional.linear(x, linear.weight, linear.bias)


@torch.no_grad()
def packed(bias=False, dtype=torch.float32):
    linear = layer(bias).to(dtype)
    pack(linear)
    return linear


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("shape", [(1,), (3, 1), (2, 5), (8,), (2, 4), (8, 3), (64, 2), (300, 2), (0, 3)])
@torch.no_grad()
def test_equals_the_plain_product(bias, shape, dtype):
    linear, x = packed(bias, dtype), torch.randn(*shape, 24, dtype=dtype)
    close = {"rtol": 1e-2, "atol": 1e-2} if dtype == torch.bfloat16 else {"rtol": 1e-5, "atol": 1e-5}
    assert_close(linear(x), plain(linear, x), **close)
    strided = torch.randn(*shape[:-1], 24, max(1, shape[-1]), dtype=dtype).transpose(-1, -2)
    assert_close(linear(strided), plain(linear, strided), **close)


@private
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_rows_are_the_same_in_any_batch(dtype):
    if dtype == torch.bfloat16 and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        pytest.skip("oneDNN has no bfloat16 here")
    linear, x = packed(dtype=dtype), torch.randn(300, 24, dtype=dtype)
    assert linear.packed is not None
    for rows in (slice(0, 1), slice(7, 12), slice(100, 299)):
        assert torch.equal(linear(x[rows]), linear(x)[rows])


@pytest.mark.parametrize("rows", [8, 16, 64])
@torch.no_grad()
def test_inputs_may_lie_in_any_way(rows):
    """Transposed, with gaps, repeated: the product of few rows reads them where they are."""
    linear, wide = packed(), torch.randn(rows, 48)
    for x in (wide[:, :24], wide[:, ::2], torch.randn(24, rows).t(), wide[:1, :24].expand(rows, -1)):
        assert_close(linear(x), plain(linear, x), rtol=1e-5, atol=1e-5)


@private
@torch.no_grad()
def test_weights_are_packed_only_where_they_serve():
    assert packed().packed is not None
    linear = layer()
    pack(linear.train())
    assert linear.packed is None
    with torch.enable_grad():
        pack(linear.eval())
    assert linear.packed is None
    with torch.autocast("cpu", torch.bfloat16):
        pack(linear)
    assert linear.packed is None
    pack(linear.double())
    assert linear.packed is None
    pack(linear.bfloat16())
    assert (linear.packed is not None) == torch.ops.mkldnn._is_mkldnn_bf16_supported()


@private
@torch.no_grad()
def test_the_switch_turns_private_operators_off(monkeypatch):
    monkeypatch.setenv(SWITCH, "0")
    assert packed().packed is None
    monkeypatch.setenv(SWITCH, "1")
    assert packed().packed is not None


def test_samples_are_those_of_the_public_operators(monkeypatch):
    model, found = transformer(grid=(4, 4), location=True), []
    for switch in ("0", "1"):
        monkeypatch.setenv(SWITCH, switch)
        found.append([sample(model, order, Streams(range(3))) for order in ("raster", "entropy", "location")])
    for one, other in zip(*found, strict=True):
        assert torch.equal(one.tokens, other.tokens)
        assert torch.equal(one.order, other.order)
        assert_close(one.log_prob, other.log_prob, rtol=0, atol=1e-4)


@private
@torch.no_grad()
def test_training_and_unpacking_drop_the_copy():
    linear = packed()
    linear.train()
    assert linear.packed is None
    linear = packed()
    linear.eval()
    assert linear.packed is None
    linear = packed()
    unpack(linear)
    assert linear.packed is None


@pytest.mark.parametrize("way", ["data", "fused", "load"])
def test_no_old_weight_is_ever_used(way):
    """Updates through `.data` and by fused optimizers change no version of a weight."""
    model = transformer()
    tokens = torch.zeros(1, 6, dtype=torch.int64)
    order = torch.arange(6)[None]
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, fused=True)

    def update():
        if way == "fused":  # never told to train
            model(tokens, None, order).square().sum().backward()
            optimizer.step()
        elif way == "data":
            for parameter in model.parameters():
                parameter.data.mul_(1.5)
        else:
            model.load_state_dict({k: 1.5 * v for k, v in model.state_dict().items()})

    for _ in range(2):
        before = sample(model, "entropy", Streams([0]))
        update()
        fresh, again = copy.deepcopy(model), sample(model, "entropy", Streams([0]))
        assert not torch.allclose(again.log_prob, before.log_prob)
        assert_close(again.log_prob, sample(fresh, "entropy", Streams([0])).log_prob)
        with torch.no_grad():
            sample(model, "entropy", Streams([0]))
            for parameter in model.parameters():
                parameter.data.mul_(0.9)
            assert_close(model(tokens, None, order), copy.deepcopy(model)(tokens, None, order))


def test_gradients_flow():
    linear, x = packed(), torch.randn(2, 24)
    linear(x).sum().backward()
    assert linear.weight.grad is not None


@torch.no_grad()
def test_copies_and_state_dicts_are_those_of_a_linear_layer():
    linear = packed()
    assert list(linear.state_dict()) == ["weight"]
    twin = copy.deepcopy(linear)
    twin.weight.zero_()
    assert (twin(torch.randn(2, 24)) == 0).all()
    assert linear.weight.abs().sum() > 0


@private
@torch.no_grad()
def test_a_model_with_low_rank_updates_can_be_copied_after_sampling():
    model = published(RandAR)
    add_low_rank(model, 2)
    model.start(1, torch.zeros(1, dtype=torch.int64))
    assert any(m.packed is not None for m in model.modules() if isinstance(m, Linear))
    twin = copy.deepcopy(model)
    assert all(m.packed is None for m in twin.modules() if isinstance(m, Linear))
    order = torch.arange(model.grid.n)[None]
    given = (torch.zeros_like(order), torch.zeros(1, dtype=torch.int64), order)
    assert torch.equal(twin(*given), model(*given))


@torch.no_grad()
def test_weights_packed_before_compiling_are_not_used_after():
    model = transformer()
    known = torch.arange(3)[None], torch.zeros(1, 3, dtype=torch.int64)

    def run(model):
        return torch.cat([step.log_prob for step in generate(model, "entropy", Streams([0]), known=known)], 1)

    run(model)
    compile_decoding(model, backend="eager")
    model.load_state_dict({k: 1.5 * v for k, v in model.state_dict().items()})
    fresh = transformer()
    fresh.load_state_dict(model.state_dict())
    assert_close(run(model), run(fresh))


def test_a_pipeline_loaded_in_inference_mode_samples():
    """Tensors made there have no version: whatever is derived from weights must not ask for it."""
    with torch.inference_mode():
        pipeline = Pipeline.from_pretrained("fashion32")
    expected = Pipeline.from_pretrained("fashion32")
    for run in (torch.no_grad, torch.inference_mode):
        with run():
            found = pipeline(class_labels=[1, 2], generator=3)
        assert torch.equal(found.tokens, expected(class_labels=[1, 2], generator=3).tokens)
