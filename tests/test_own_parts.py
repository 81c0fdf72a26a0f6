"""Parts that users bring: found by import path or entry point, refused in one line, stored by their path."""

import importlib.metadata
import json
import sys
from types import SimpleNamespace

import own_parts
import pytest
import torch
from conftest import GRID, transformer

from anyorder import Pipeline, families
from anyorder.cli import main as cli
from anyorder.contracts import Grid
from anyorder.data.sources import Columns, open_source
from anyorder.method.decoding import generate, sample
from anyorder.method.policies import InferredOrder
from anyorder.method.policy_config import PolicyConfig
from anyorder.method.sampling import SCORES, Streams
from anyorder.settings import parse
from anyorder.stages.train import TrainStage
from anyorder.tokenizers.autoencoder import k_means, wrap
from anyorder.tokenizers.vq import VQConfig, VQModel


def drawn(policy, n=2):
    return sample(transformer(), policy, Streams(range(n)))


def install(monkeypatch, group, name, value):
    """As if an installed package registered this name."""
    point = importlib.metadata.EntryPoint(name, value, f"anyorder.{group}")
    found = importlib.metadata.EntryPoints([point])
    monkeypatch.setattr(families, "entry_points", lambda **wanted: found.select(**wanted))


# --- orders and scores


def test_an_own_function_is_a_fixed_order_and_takes_the_schedule():
    policy = PolicyConfig("own_parts:backwards", per_step=2)
    assert drawn(policy).order.tolist() == [[5, 4, 3, 2, 1, 0]] * 2
    assert len(list(generate(transformer(), policy, Streams([0])))) == 3
    assert policy.token_blind
    assert policy.deterministic
    assert not policy.decided
    assert policy.evaluations(4) == 0
    assert policy.label == "own_parts:backwards, per_step 2"


def test_an_own_score_is_rated_like_ours(monkeypatch):
    policy = PolicyConfig("own_parts:gini", temperature=0.5, rescore=0.5)
    assert policy.token_blind
    assert policy.inferred
    assert policy.evaluations(4) == PolicyConfig("margin", temperature=0.5, rescore=0.5).evaluations(4)
    monkeypatch.setitem(SCORES, "gini", lambda log_p, tokens: own_parts.gini(log_p))
    for settings in ({}, {"sign": -1}, {"temperature": 0.5, "distance": 0.1}):
        found = drawn(PolicyConfig("own_parts:gini", **settings))
        assert torch.equal(found.order, drawn(InferredOrder("gini", **settings)).order)


def test_an_own_score_that_looks_at_tokens_gets_them():
    policy = PolicyConfig("own_parts:surprise")
    assert not policy.token_blind
    found, expected = drawn(policy), drawn(PolicyConfig("token_likelihood", sign=-1))
    assert torch.equal(found.tokens, expected.tokens)
    assert torch.equal(found.order, expected.order)


def test_an_own_class_gets_the_settings_that_its_parameters_name():
    policy = PolicyConfig("own_parts:Nearest", temperature=0.5)
    assert policy.build(GRID, Streams([0])) == own_parts.Nearest(GRID, 0.5)
    assert policy.inferred
    assert policy.decided
    assert policy.deterministic
    assert policy.evaluations(6) == 21
    assert drawn(policy).order.sort(1).values.tolist() == [[0, 1, 2, 3, 4, 5]] * 2


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"order": "own_parts:forwards"}, "cannot import 'own_parts:forwards'"),
        ({"order": "no_such_package:f"}, "cannot import 'no_such_package:f'"),
        ({"order": "own_parts:"}, "unknown order 'own_parts:'"),
        ({"order": "own_parts:Nearest.forwards"}, "cannot import 'own_parts:Nearest.forwards'"),
        ({"order": "own_parts:neither"}, r"must be a class or function of \(grid, ...\), or a score"),
        ({"order": "own_parts:backwards", "temperature": 1.0}, "remove temperature"),
        ({"order": "own_parts:Nearest", "per_step": 2}, "remove per_step"),
        ({"order": "own_parts:Silent"}, "must say deterministic = True or False in its class"),
        ({"order": "gini"}, "unknown order 'gini'.* or package.module:Name"),
    ],
)
def test_what_is_no_order_is_refused_in_one_line(settings, message):
    with pytest.raises(ValueError, match=message) as e:
        PolicyConfig(**settings)
    assert "\n" not in str(e.value)


def test_a_score_is_a_function_of_log_p():
    with pytest.raises(ValueError, match=r"a score is a function of \(log_p\) or \(log_p, tokens\)"):
        InferredOrder("own_parts:backwards")


def test_an_installed_package_registers_a_name(monkeypatch):
    install(monkeypatch, "policies", "gini", "own_parts:gini")
    assert torch.equal(drawn(PolicyConfig("gini")).order, drawn(PolicyConfig("own_parts:gini")).order)
    with pytest.raises(ValueError, match=r"unknown name 'gini': .* registers it as anyorder.networks"):
        families.resolve("networks", "gini")


def test_a_model_is_trained_on_an_own_order(tmp_path):
    stage = parse(TrainStage, {"tokens": tmp_path, "order": "own_parts:backwards"})
    tokens = SimpleNamespace(grid=Grid(2, 3))
    assert stage._general_orders(tokens, 2).tolist() == [[5, 4, 3, 2, 1, 0]] * 2
    assert stage._source(tmp_path, tokens, None)([0, 1], 0).tolist() == [[5, 4, 3, 2, 1, 0]] * 2
    chooses = parse(TrainStage, {"tokens": tmp_path, "order": "own_parts:Nearest"})
    with pytest.raises(ValueError, match="order=own_parts:Nearest chooses as it generates: give a function"):
        chooses._general_orders(tokens, 2)


# --- networks, and pipelines that hold own parts


def own_pipeline(**parts):
    model = own_parts.Counts(own_parts.CountsConfig(4, (2, 3)))
    torch.nn.init.normal_(model.prior)
    return Pipeline(model, own_parts.Grey(own_parts.GreyConfig()), **parts)


@pytest.mark.parametrize("order", ["own_parts:backwards", "own_parts:gini", "own_parts:Nearest"])
def test_own_parts_survive_save_pretrained(order, tmp_path):
    pipe = own_pipeline(policy=PolicyConfig(order))
    pipe.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "model/config.json").read_text())["kind"] == "own_parts:Counts"
    again = Pipeline.from_pretrained(tmp_path)
    assert again.policy == pipe.policy
    a, b = pipe(num_images=3), again(num_images=3)
    assert torch.equal(a.tokens, b.tokens)
    assert torch.equal(a.order, b.order)
    assert again.model.config == pipe.model.config


def test_own_models_keep_the_contract():
    model, tokens = own_pipeline().model, torch.tensor([[0, 1, 1, 2, 3, 3]])
    order, state = torch.tensor([[5, 0, 2, 4, 1, 3]]), own_pipeline().model.start(1)
    for step, logits in enumerate(model.forward(tokens, None, order)[0]):
        position = order[:, step : step + 1]
        torch.testing.assert_close(model.score(state, position)[0, 0], logits)
        state = model.append(state, position, tokens.gather(1, position))


def test_the_hub_needs_an_opt_in(tmp_path, monkeypatch):
    own_pipeline().save_pretrained(tmp_path)
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *_, **__: str(tmp_path))
    with pytest.raises(ValueError, match=r"'a/b' runs code .* takes allow_own=True: own_parts:Counts"):
        Pipeline.from_pretrained("a/b")
    assert Pipeline.from_pretrained("a/b", allow_own=True)(num_images=1).tokens.shape == (1, 6)


def test_an_order_from_the_hub_needs_it_too(tmp_path, monkeypatch):
    model, tokenizer = (
        transformer(vocab_size=4),
        VQModel(VQConfig(channels=8, multipliers=(1, 2), groups=2, vocab_size=4, code_dim=4)),
    )
    Pipeline(model, tokenizer, policy=PolicyConfig("own_parts:gini")).save_pretrained(tmp_path)
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *_, **__: str(tmp_path))
    with pytest.raises(ValueError, match="takes allow_own=True: own_parts:gini"):
        Pipeline.from_pretrained("a/b")
    assert Pipeline.from_pretrained("a/b", allow_own=True).policy.order == "own_parts:gini"


@pytest.mark.parametrize("at", ["own_parts.py", "model/own_parts.py", "own_parts/__init__.py"])
def test_code_in_a_model_folder_is_never_run(at, tmp_path, monkeypatch):
    own_pipeline(policy=PolicyConfig("own_parts:gini")).save_pretrained(tmp_path)
    (tmp_path / at).parent.mkdir(exist_ok=True)
    (tmp_path / at).write_text("raise SystemExit('run')")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "own_parts")
    with pytest.raises(ValueError, match="brings 'own_parts' itself: code of a model folder is not run"):
        Pipeline.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("own_parts:Count", "cannot import 'own_parts:Count'"),
        ("own_parts:backwards", r"own_parts:backwards must be a class made by Class\(config\)"),
        ("own_parts:Untyped", "config annotated as a dataclass"),
        ("own_parts:GreyConfig", "must be a class made by"),
        ("os:system", "must be a class made by"),
        ("magic", "unknown kind of model 'magic', allowed: .* or package.module:Class"),
    ],
)
def test_what_is_no_network_is_refused_in_one_line(kind, message, tmp_path):
    own_pipeline().save_pretrained(tmp_path)
    (tmp_path / "model/config.json").write_text(json.dumps({"kind": kind, "config": {}}))
    with pytest.raises(ValueError, match=message) as e:
        Pipeline.from_pretrained(tmp_path)
    assert "\n" not in str(e.value)


def test_what_cannot_be_imported_again_is_not_saved(tmp_path):
    class Local(own_parts.Counts):
        pass

    local = Pipeline(Local(own_parts.CountsConfig(4, (2, 3))), own_parts.Grey(own_parts.GreyConfig()))
    with pytest.raises(ValueError, match="define the class at the top of a module"):
        local.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="config annotated as a dataclass"):
        families.kind_of(own_parts.Untyped(None))


# --- tokenizers made of others' autoencoders


def autoencoders():
    torch.manual_seed(0)
    images = torch.rand(6, 3, 8, 12, generator=torch.Generator().manual_seed(0)) * 2 - 1
    yield wrap(own_parts.VQModel()), 8
    yield wrap(own_parts.VQModel(lookup_from_codebook=True)), 8
    yield wrap(own_parts.Continuous(), images=images, vocab_size=5, arguments={}), 5


def test_autoencoders_become_tokenizers(tmp_path):
    images = torch.rand(2, 3, 8, 12) * 2 - 1
    for made, vocab_size in autoencoders():
        assert (made.vocab_size, made.factor) == (vocab_size, 4)
        tokens = made.encode(images)
        assert tokens.shape == (2, 6)
        decoded = made.decode(tokens, Grid(2, 3))
        assert decoded.shape == images.shape
        model = transformer(vocab_size=vocab_size)
        Pipeline(model, made).save_pretrained(tmp_path)
        again = Pipeline.from_pretrained(tmp_path).tokenizer
        assert torch.equal(again.encode(images), tokens)
        assert torch.equal(again.decode(tokens, Grid(2, 3)), decoded)


def test_a_wrapped_vq_model_decodes_its_own_codes():
    original = own_parts.VQModel()
    tokens = torch.tensor([[0, 3, 7, 7, 1, 2]])
    codes = original.quantize.get_codebook_entry(tokens, (1, 2, 3, 4))
    expected = original.decode(codes, force_not_quantize=True).sample
    assert torch.equal(wrap(original).decode(tokens, Grid(2, 3)), expected)
    nearest = original.encode(expected).latents[:, None] - original.quantize.embedding.weight[..., None, None]
    assert torch.equal(wrap(original).encode(expected), nearest.norm(dim=2).argmin(1).flatten(1))


def test_codes_are_k_means():
    vectors = torch.tensor([[0.0], [0.1], [0.2], [5.0], [5.2], [9.0]])
    assert k_means(vectors, 3).sort(0).values.flatten().tolist() == pytest.approx([0.1, 5.1, 9.0])
    with pytest.raises(ValueError, match="7 codes need as many latents, got 6"):
        k_means(vectors, 7)
    with pytest.raises(ValueError, match="is continuous: give images="):
        wrap(own_parts.Continuous(), arguments={})
    with pytest.raises(ValueError, match="has no config of names and values: give arguments="):
        wrap(own_parts.Continuous())


def test_the_real_vq_model_of_diffusers():
    diffusers = pytest.importorskip("diffusers")
    vq = diffusers.VQModel(
        block_out_channels=(8, 8), norm_num_groups=4, num_vq_embeddings=16, latent_channels=4,
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
    ).eval()  # fmt: skip
    images = torch.rand(2, 3, 8, 8) * 2 - 1
    made, latents = wrap(vq), vq.encode(images).latents
    assert made.factor == 2
    tokens = made.encode(images)
    assert torch.equal(tokens.flatten(), vq.quantize(latents)[2][2])
    torch.testing.assert_close(made.decode(tokens, Grid(4, 4)), vq.decode(latents).sample)


# --- all of them in stages


def test_own_parts_go_through_the_stages(tmp_path):
    def run(*arguments):
        assert cli.main([*arguments]) == 0, arguments

    at = {name: f"{name}={tmp_path / name}" for name in ("data", "tokenizer", "tokens", "model", "features")}
    short = ("train.steps=2", "train.batch_size=4", "train.eval_every=0")
    run("data", "source=own_parts:split_squares", "size=16,16", f"out={tmp_path / 'data'}")
    run("convert", "own_parts:grey", str(tmp_path / "tokenizer"))
    run("tokens", at["data"], at["tokenizer"], f"out={tmp_path / 'tokens'}")
    network = ("network=own_parts:Counts", "network_settings=smoothing: 0.5")
    run("train", at["tokens"], *network, *short, f"out={tmp_path / 'model'}")
    run("features", at["data"], "extractor=own_parts:Moments", f"out={tmp_path / 'features'}")
    policy = "policy.order=own_parts:gini"
    run("orders", at["model"], at["tokens"], policy, f"out={tmp_path / 'orders'}")
    run("sample", at["model"], policy, "num_images=8", f"out={tmp_path / 'samples'}")
    run("eval", f"samples={tmp_path / 'samples'}", at["features"], f"out={tmp_path / 'eval'}")
    run("pipeline", f"samples={tmp_path / 'samples'}", f"out={tmp_path / 'pipeline'}")
    data = json.loads((tmp_path / "data/manifest.json").read_text())
    assert data["classes"] == ["0", "1"]
    assert sum(data["counts"].values()) == 40
    assert json.loads((tmp_path / "model/config.json").read_text()) == {
        "kind": "own_parts:Counts",
        "config": {"vocab_size": 4, "grid": [4, 4], "num_classes": 2, "smoothing": 0.5},
    }
    metrics = json.loads((tmp_path / "eval/metrics.json").read_text())
    assert metrics["policy"] == "own_parts:gini"
    assert metrics["nll"] > 0
    pipe = Pipeline.from_pretrained(tmp_path / "pipeline")
    assert (type(pipe.model), pipe.policy.order) == (own_parts.Counts, "own_parts:gini")
    assert pipe.classes == ["0", "1"]


def test_an_own_split_and_captions(tmp_path):
    source = open_source("own_parts:split_squares")
    assert [source.count(split) for split in ("train", "test")] == [32, 8]
    assert source.classes() == ["0", "1"]
    squares = open_source("own_parts:Squares", test_fraction=0.2)
    assert {item.caption for item in squares.items["train"]} == {"dark square", "bright square"}
    with pytest.raises(ValueError, match="has no columns: leave out image, label"):
        open_source("own_parts:Squares", Columns(label="x"))
    with pytest.raises(ValueError, match="cannot import 'own_parts:Circles'"):
        open_source("own_parts:Circles").count("train")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"network": "own_parts:Counts", "init": "x"}, "remove init and the model"),
        ({"network": "own_parts:Counts", "model": {"depth": 2}}, "remove init and the model"),
        ({"network_settings": {"a": "1"}}, "network_settings go with network="),
    ],
)
def test_settings_of_an_own_network_that_do_not_fit(settings, message):
    with pytest.raises(ValueError, match=message):
        parse(TrainStage, {"tokens": "t", **settings})
